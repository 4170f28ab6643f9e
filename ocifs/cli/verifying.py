"""``verify``: is an image what its digests say, and are its files what a list of hashes says.

Not here: how that is found out (`ocifs.forensics.verify`, `ocifs.forensics.baseline`).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

import click

from ocifs.cli import options as opt
from ocifs.cli import output
from ocifs.cli.options import Choice
from ocifs.errors import CheckFailedError, MachineError, NotFoundError, OcifsError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ocifs.forensics.baseline import Baseline
    from ocifs.forensics.verify import Checked, Finding

_MAX_SHOWN: Final = 10
"""Entries that a finding names on a terminal or in a pipe; --json names up to a thousand."""


@click.command(
    epilog=opt.examples(
        "ocifs verify oci:images/app:1.2",
        "ocifs verify --baseline app.sha256 app.tar",
        "ocifs verify --json app.tar | jq -r '.findings[].message'",
    )
)
@click.option("--baseline", metavar="FILE", help="Compare files with hashdeep's or sha256sum's output, too.")
@click.option("--prefix", metavar="DIR", default="", help="Baseline: what its paths begin with, as a mount point.")
@opt.json_lines_option
@opt.ref_argument
@opt.examination_options
def verify(choice: Choice, ref: str, *, baseline: str | None, prefix: str, as_json: bool) -> None:
    """Check an image against its digests, byte by byte.

    Reads every blob: manifest, configuration and layers against size and digest, each layer against its diff ID, and what
    the cache knows about it against the layer. What is wrong is said with the span of the blob it is in, and the files that
    have data there. Then the files against the baseline: one that differs or is not there is wrong, those that it does not
    name are counted. The exit status is 1 if anything is wrong.
    """
    listed = None if baseline is None else _read_baseline(baseline, os.fsencode(prefix))
    if prefix and baseline is None:
        raise UsageError("--prefix is about the paths of a --baseline")
    wrong = 0
    for checked in _checks(choice, ref, listed):
        wrong += len(checked.findings)
        if as_json:
            output.print_json(_checked_json(checked))
        else:
            _print_checked(checked)
        output.flush()
    if wrong:
        raise CheckFailedError(f"{ref} is not what it should be: {wrong} finding{'s' if wrong > 1 else ''}")


def _checks(choice: Choice, ref: str, listed: Baseline | None) -> Iterator[Checked]:
    from ocifs.cli.progress import TerminalProgress, showing
    from ocifs.forensics import verify as verifying

    with (
        opt.opened_evidence(choice) as evidence,
        opt.opened_store(choice) as store,
        showing("verifying") as progress,
    ):
        for checked in verifying.verify(ref, store, choice.image_options(), progress, evidence):
            if isinstance(progress, TerminalProgress):
                progress.pause()
            yield checked
    if listed is not None:
        yield _compared(choice, ref, listed)


# -- the baseline --------------------------------------------------------------------------------------------------


def _read_baseline(path: str, prefix: bytes) -> Baseline:
    from ocifs.forensics.baseline import read

    try:
        with open(path, "rb") as file:
            return read(file, path, prefix)
    except FileNotFoundError:
        raise NotFoundError(f"there is no baseline {path}") from None
    except OSError as error:
        raise MachineError(f"cannot read the baseline {path}: {error.strerror}") from error


def _compared(choice: Choice, ref: str, listed: Baseline) -> Checked:
    from ocifs.cli.examining import opened_examination
    from ocifs.forensics.baseline import compare
    from ocifs.forensics.verify import Checked, Finding

    try:
        with opened_examination(choice, ref) as examination:
            compared = compare(examination, listed)
    except OcifsError as error:
        return Checked("baseline", findings=(Finding("unchecked", f"the files cannot be compared: {error}"),))
    return Checked("baseline", files=compared.right, unlisted=compared.unlisted, findings=tuple(compared.findings))


# -- how it looks --------------------------------------------------------------------------------------------------


def _checked_json(checked: Checked) -> dict[str, Any]:
    is_baseline = checked.what == "baseline"
    return {
        "what": checked.what,
        "ok": not checked.findings,
        "layer": checked.layer or None,
        "digest": checked.digest,
        "diff_id": checked.diff_id,
        "stored_size": None if is_baseline else checked.stored_size,
        "uncompressed_size": checked.layer_size if checked.layer else None,
        "index_checked": checked.index if checked.layer else None,
        "files_ok": checked.files if is_baseline else None,
        "files_unlisted": checked.unlisted if is_baseline else None,
        "findings": [_finding_json(finding) for finding in checked.findings],
    }


def _finding_json(finding: Finding) -> dict[str, Any]:
    return {
        "what": finding.what,
        "message": finding.message,
        "blob_offset": finding.blob_offset,
        "blob_size": finding.blob_size,
        "layer_offset": finding.layer_offset,
        "layer_size": finding.layer_size,
        "entry_count": finding.entry_count,
        "entries": [output.decode(name) for name in finding.entries],
    }


def _print_checked(checked: Checked) -> None:
    state = "WRONG" if checked.findings else "ok"
    if checked.what == "baseline":
        words = f"baseline: {checked.files} files have their hash, {checked.unlisted} are not in it"
    elif checked.layer:
        index = ", and its index" if checked.index else ""
        sizes = f"{checked.stored_size} bytes, {checked.layer_size} decoded{index}"
        words = f"layer {checked.layer}: {sizes}  {checked.digest or checked.diff_id or 'without digest'}"
    else:
        words = f"manifest, configuration: {checked.stored_size} bytes  {checked.digest or ''}".rstrip()
    output.print_line(f"{state:<6}{words}")
    for finding in checked.findings:
        output.print_line(f"      {finding.what}: {output.printable(finding.message)}")
        if finding.what == "span":
            output.print_line(f"      {_affected(finding)}")


def _affected(finding: Finding) -> str:
    place = f"layer offset {finding.layer_offset}, {finding.layer_size} bytes"
    if not finding.entry_count:
        return f"({place}) no file has data there"
    names = [output.printable(output.decode(name)) for name in finding.entries[:_MAX_SHOWN]]
    more = finding.entry_count - len(names)
    return f"({place}) has data of {', '.join(names)}{f' and {more} more' if more else ''}"
