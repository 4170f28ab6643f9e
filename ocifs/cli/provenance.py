"""Where what is in an image comes from: ``log``, ``why``, ``annotate``, ``receipt``.

Times are UTC, for what is found out here is compared with logs of other machines. Values are printed whole: they are
evidence.

Not here: the questions themselves (`ocifs.forensics`), checking (`verifying`).
"""

from __future__ import annotations

import datetime
import os
import stat as _stat
import sys
from typing import TYPE_CHECKING, Any, Final

import click

from ocifs.cli import options as opt
from ocifs.cli import output
from ocifs.cli.examining import CHANGES, ENDS, layer_json, opened_examination, version_json
from ocifs.cli.options import Choice
from ocifs.errors import DamagedError, NotFoundError, UsageError
from ocifs.history import End
from ocifs.tree import Kind

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

    from ocifs.forensics.annotation import OfLayer
    from ocifs.forensics.examination import Examination
    from ocifs.history import Version

_ENDED: Final = ("", "deleted", "deleted (opaque directory)", "replaced", "overridden", "left out")
"""How a version ended, in words, by the number of its `ocifs.history.End`."""
_CHUNK: Final = 1 << 16
"""Bytes of standard input read at a time."""
_MAX_LINE: Final = 1 << 20
"""Bytes of the longest line that is looked at; what is longer is passed on, marked unknown."""


# -- how a version looks -------------------------------------------------------------------------------------------


def _mode(version: Version) -> str:
    return _stat.filemode(version.kind << 12 | version.mode) if version.kind else "?" * 10


def _utc(mtime_ns: int) -> str:
    """A time in ISO 8601, UTC, with as many decimals as it has; one beyond year 9999 as seconds with an ``@``."""
    seconds, nanoseconds = divmod(mtime_ns, 10**9)
    decimals = f".{nanoseconds:09}".rstrip("0").rstrip(".")
    try:
        moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    except (ValueError, OverflowError, OSError):
        return f"@{seconds}{decimals}"
    return f"{moment:%Y-%m-%dT%H:%M:%S}{decimals}Z"


def _shown(path: bytes) -> str:
    return output.shown(b"/" + path, terminal=output.to_terminal())


def _step_text(examination: Examination, layer: int) -> str:
    step = examination.step(layer)
    words = [step.created, " ".join(step.created_by.split())] if step else []
    return output.printable("  ".join(word for word in words if word)) or "(the image does not say which step)"


def _attributes(version: Version) -> str:
    words = [_mode(version), f"{version.uid}:{version.gid}"]
    if version.kind == Kind.FILE:
        words.append(f"{version.size} bytes")
    if version.kind in {Kind.CHAR, Kind.BLOCK}:
        words.append(f"device {version.rdev[0]}, {version.rdev[1]}")
    words.append(_utc(version.mtime_ns))
    if version.target:
        target = output.shown(version.target, terminal=output.to_terminal())
        words.append(f"{'hard link to' if version.hard_link else '->'} {target}")
    return "  ".join(words)


def _change_text(version: Version) -> str:
    change = CHANGES[version.change]
    if change == "marker":
        return f"marker, which ended {version.hides}" if version.hides else "marker, without effect"
    if change == "none":
        return "never visible"
    return f"{change}, implied by what is below it" if version.entry < 0 else change


def _end_text(examination: Examination, version: Version) -> str:
    from ocifs.forensics.provenance import ended_by

    if not version.end_layer:
        return ENDS[version.end]
    by = ended_by(examination.history, version)
    entry = f"entry {version.end_entry}, {_shown(by.path)}" if by else "a directory that is only implied"
    return f"{_ENDED[version.end]} by layer {version.end_layer} ({entry})"


def _ended_json(examination: Examination, version: Version) -> dict[str, Any] | None:
    from ocifs.forensics.provenance import ended_by

    if not version.end_layer:
        return None
    by = ended_by(examination.history, version)
    return {
        "path": "/" + output.decode(by.path) if by else None,
        **layer_json(examination, version.end_layer),
    }


# -- log -----------------------------------------------------------------------------------------------------------


@click.command(
    epilog=opt.examples(
        "ocifs log oci:images/app:1.2 /etc/passwd",
        "ocifs log app.tar /root/.ssh/id_rsa",
        "ocifs log --json app.tar /bin/tool | jq -r '[.layer, .sha256, .end] | @tsv'",
    )
)
@click.option("-L", "--dereference", is_flag=True, help="Of a link, show what it leads to.")
@click.option("--no-hash", is_flag=True, help="Do not read the files' data.")
@opt.json_lines_option
@opt.ref_argument
@click.argument("path", metavar="PATH")
@opt.examination_options
def log(choice: Choice, ref: str, path: str, *, dereference: bool, no_hash: bool, as_json: bool) -> None:
    """Show every version of a path.

    That is its layer, build step, attributes, SHA-256, and how it ended. The oldest comes first. What was deleted is found
    too, also below a directory that was. A version whose data cannot be read is shown without its hash, and the exit
    status is 4.
    """
    from ocifs.forensics.provenance import find

    with opened_examination(choice, ref) as examination:
        versions = find(examination.history, opt.inside(path), follow=dereference)
        worst = 0
        for number, version in enumerate(versions):
            sha256, problem = (None, None) if no_hash else _hashed(examination, version)
            worst = max(worst, problem.exit_code if problem else 0)
            if as_json:
                output.print_json(_logged_json(examination, version, sha256, problem))
                continue
            if number:
                output.print_line("")
            for line in _logged_text(examination, version, sha256, problem):
                output.print_line(line)
        if worst:
            raise click.exceptions.Exit(worst)


def _hashed(examination: Examination, version: Version) -> tuple[str | None, DamagedError | None]:
    from ocifs.forensics.provenance import content_hash

    if version.kind != Kind.FILE or CHANGES[version.change] == "marker":
        return None, None
    try:
        return content_hash(examination, version), None
    except DamagedError as error:
        return None, error


def _logged_json(
    examination: Examination, version: Version, sha256: str | None, problem: DamagedError | None
) -> dict[str, Any]:
    return {
        **version_json(version),
        **layer_json(examination, version.layer),
        "sha256": sha256,
        "problem": None if problem is None else str(problem),
        "ended_by": _ended_json(examination, version),
    }


def _logged_text(
    examination: Examination, version: Version, sha256: str | None, problem: DamagedError | None
) -> Iterator[str]:
    yield f"{_shown(version.path)}  layer {version.layer}  {_step_text(examination, version.layer)}"
    yield f"    {_change_text(version)}:  {_attributes(version)}"
    if sha256 is not None:
        yield f"    sha256:{sha256}"
    if problem is not None:
        yield f"    cannot be read: {output.printable(str(problem))}"
    yield f"    {_end_text(examination, version)}"
    if version.end_layer and version.end_layer != version.layer:
        yield f"    by {_step_text(examination, version.end_layer)}"


# -- why -----------------------------------------------------------------------------------------------------------


@click.command(
    epilog=opt.examples(
        "ocifs why oci:images/app:1.2 /usr/bin/env /etc/passwd",
        "ocifs why --json app.tar /bin/tool | jq -r .extract | sh | sha256sum",
        "ocifs why app.tar#2 /root/.ssh/id_rsa",
    )
)
@click.option("-L", "--dereference", is_flag=True, help="Of a link, show what it leads to.")
@opt.json_lines_option
@opt.ref_argument
@click.argument("paths", metavar="PATH…", nargs=-1, required=True)
@opt.examination_options
def why(choice: Choice, ref: str, paths: tuple[str, ...], *, dereference: bool, as_json: bool) -> None:
    """Say which layer and step a path is from, and where it lies.

    Of a path that was deleted the last version is shown. The shell line under Extract writes exactly the file's bytes with
    tail, head, gzip, zstd, or dd of coreutils: it needs no ocifs. Offsets count from 0, in the layer's uncompressed tar.
    """
    with opened_examination(choice, ref) as examination:
        first = True

        def explain(path: str) -> None:
            nonlocal first
            version = _current(examination, path, follow=dereference)
            if as_json:
                output.print_json(_why_json(examination, version))
                return
            if not first:
                output.print_line("")
            first = False
            for label, text in _why_text(examination, version):
                output.print_line(f"{label + ':' if label else '':<12}{text}")

        opt.for_each(paths, explain)


def _current(examination: Examination, path: str, *, follow: bool) -> Version:
    from ocifs.forensics.provenance import current, find

    versions = find(examination.history, opt.inside(path), follow=follow)
    version = current(versions)
    if version is None:
        raise NotFoundError(f"{path} was never visible: 'ocifs log' shows the entries that have its name")
    return version


def _why_json(examination: Examination, version: Version) -> dict[str, Any]:
    from ocifs.forensics.extraction import extraction
    from ocifs.forensics.provenance import holder

    holds = holder(examination.history, version)
    is_file = version.kind == Kind.FILE
    return {
        **version_json(version),
        **layer_json(examination, version.layer),
        "ended_by": _ended_json(examination, version),
        "data": {
            "path": "/" + output.decode(holds.path),
            **layer_json(examination, holds.layer),
            "header_offset": holds.header_offset,
            "extents": [
                {"file_offset": file_offset, "layer_offset": layer_offset, "size": size}
                for file_offset, _, layer_offset, size in holds.extents
            ],
        }
        if is_file and not version.unreadable
        else None,
        "extract": extraction(examination, version) if is_file else None,
    }


def _why_text(examination: Examination, version: Version) -> Iterator[tuple[str, str]]:
    from ocifs.forensics.extraction import extraction
    from ocifs.forensics.provenance import holder

    yield "Path", _shown(version.path)
    yield "Is", _attributes(version)
    yield from _layer_text(examination, version.layer)
    yield "Change", _change_text(version)
    yield "State", _end_text(examination, version)
    if version.end_layer:
        yield "", f"by {_step_text(examination, version.end_layer)}"
    if version.entry >= 0:
        yield "Header", f"at {version.header_offset}, entry {version.entry}"
    if version.kind != Kind.FILE:
        return
    if version.unreadable:
        yield "Data", "missing: its layer breaks off, or it is a link to nothing"
        return
    holds = holder(examination.history, version)
    if holds is not version:
        yield "Data of", f"{_shown(holds.path)}, header at {holds.header_offset} of layer {holds.layer}"
        if holds.layer != version.layer:
            yield from _layer_text(examination, holds.layer)
    yield "Data", _extents_text(version)
    line = extraction(examination, version)
    if line is None:
        yield "Extract", "no line of standard tools: 'ocifs cat' and 'ocifs blob' write it"
    else:
        yield "Extract", output.printable(line) if output.to_terminal() else line


def _layer_text(examination: Examination, number: int) -> Iterator[tuple[str, str]]:
    layer = layer_json(examination, number)
    yield "Layer", f"{number}  {layer['digest']}"
    yield "Diff ID", layer["diff_id"]
    yield "Step", _step_text(examination, number)


def _extents_text(version: Version) -> str:
    if not version.extents:
        return "none: it is empty" if not version.size else "none: it is a hole"
    if len(version.extents) == 1:
        _, _, layer_offset, size = version.extents[0]
        return f"{size} bytes at {layer_offset}"
    stored = sum(size for _, _, _, size in version.extents)
    return f"{stored} bytes in {len(version.extents)} pieces from {version.extents[0][2]} on"


# -- receipt -------------------------------------------------------------------------------------------------------


@click.command(
    epilog=opt.examples(
        "ocifs receipt oci:images/app:1.2 /usr/bin/env > env.receipt",
        "ocifs receipt app.tar#2 /root/.ssh/id_rsa | jq -r .sha256",
    )
)
@click.option("-L", "--dereference", is_flag=True, help="Of a link, take what it leads to.")
@opt.ref_argument
@click.argument("path", metavar="PATH")
@opt.examination_options
def receipt(choice: Choice, ref: str, path: str, *, dereference: bool) -> None:
    """Print a proof that a file is in the image, as JSON.

    Manifest, configuration, layer, offsets and SHA-256: scripts/check-receipt checks it against the layer's blob, without
    ocifs. What it proves and what not it says itself. An image that is not what its digests say gives no receipt (exit
    status 4). Of a file that was deleted the last version is taken.
    """
    from ocifs.forensics.receipt import as_document
    from ocifs.forensics.receipt import receipt as make

    with opened_examination(choice, ref) as examination:
        output.print_document(as_document(make(examination, _current(examination, path, follow=dereference))))


# -- annotate ------------------------------------------------------------------------------------------------------


@click.command(
    epilog=opt.examples(
        "ocifs annotate --prefix /mnt oci:images/app:1.2 < clamscan.log",
        "find . -perm -4000 -print0 | ocifs annotate -0 app.tar",
        "grep -rn password /mnt/etc | ocifs annotate --prefix /mnt --json app.tar | jq .created_by",
    )
)
@click.option("-0", "--null", "by_nul", is_flag=True, help="Lines end with a NUL instead of a newline.")
@click.option("--prefix", metavar="DIR", default="", help="Where the image was seen by what wrote the lines.")
@opt.json_lines_option
@opt.ref_argument
@opt.examination_options
def annotate(choice: Choice, ref: str, *, by_nul: bool, prefix: str, as_json: bool) -> None:
    """Say which layer each line of input is about.

    A line is a path, or what a scanner or grep says about one: the longest part of it counts that is a path in some layer.
    Each comes out as it was, behind layer, visible or deleted, and step, with tabs between. A line in which there is no path
    is marked unknown. Names below a mount's .ocifs mean the very version that they show; LNN/PATH, as find and grep print
    it, what layer NN has.
    """
    from ocifs.forensics.annotation import Annotator

    if sys.stdin is None:
        raise UsageError("standard input is closed: annotate reads lines from it")
    with opened_examination(choice, ref) as examination:
        annotator = Annotator(examination, os.fsencode(prefix))
        end = b"\0" if by_nul else b"\n"
        for lines in _lines(sys.stdin.buffer, end):
            for line in lines:
                found = annotator.find(line) if len(line) <= _MAX_LINE else None
                if as_json:
                    output.print_json(_annotated_json(examination, line, found))
                else:
                    fields = "\t".join(_annotated_text(examination, found))
                    output.write(output.encode(fields) + b"\t" + line + end)
            output.flush()


def _lines(stream: BinaryIO, end: bytes) -> Iterator[list[bytes]]:
    """Lines without their end, as many at a time as have come; one that never ends comes in parts."""
    rest = b""
    while chunk := stream.read1(_CHUNK) if hasattr(stream, "read1") else stream.read(_CHUNK):
        *lines, rest = (rest + chunk).split(end)
        if len(rest) > _MAX_LINE:
            lines.append(rest)
            rest = b""
        if lines:
            yield lines
    if rest:
        yield [rest]


def _annotated_text(examination: Examination, found: Version | OfLayer | None) -> tuple[str, str, str]:
    if found is None:
        return "-", "unknown", "-"
    step = examination.step(found.layer)
    words = output.printable(" ".join(step.created_by.split())) if step else ""
    return str(found.layer), _state(found), words or "-"


def _state(found: Version | OfLayer) -> str:
    if isinstance(found, tuple):
        return found.what
    if not found.end_layer:
        return ENDS[found.end]
    removed = found.end in {End.WHITEOUT, End.OPAQUE}
    return f"{'deleted' if removed else ENDS[found.end]} by {found.end_layer}"


def _annotated_json(examination: Examination, line: bytes, found: Version | OfLayer | None) -> dict[str, Any]:
    if found is None:
        return {"line": output.decode(line), "path": None, "layer": None, "end": "unknown", "end_layer": None}
    if isinstance(found, tuple):
        path, end, end_layer = None, found.what, None
    else:
        path, end, end_layer = "/" + output.decode(found.path), ENDS[found.end], found.end_layer or None
    return {
        "line": output.decode(line),
        "path": path,
        **layer_json(examination, found.layer),
        "end": end,
        "end_layer": end_layer,
    }
