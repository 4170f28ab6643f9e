"""What layers hold and the image does not show: ``deleted`` lists it, ``wasted`` adds up its bytes.

Both read layer indexes and the history only, but for ``deleted --hash``.

Not here: how it is found (`ocifs.forensics.remains`).
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import click

from ocifs.cli import options as opt
from ocifs.cli import output
from ocifs.cli.examining import ENDS, layer_json, opened_examination, version_json
from ocifs.cli.options import Choice
from ocifs.errors import DamagedError
from ocifs.tree import Kind

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ocifs.forensics.examination import Examination
    from ocifs.forensics.remains import Remnant, Waste
    from ocifs.history import Version


def step_text(examination: Examination, layer: int) -> str:
    """The build step that wrote a layer, on one line; a dash if the image does not say."""
    step = examination.step(layer)
    return " ".join(step.created_by.split()) or "-" if step else "-"


# -- deleted -------------------------------------------------------------------------------------------------------


@click.command(
    epilog=opt.examples(
        "ocifs deleted oci:images/app:1.2",
        "ocifs deleted --hash --json app.tar | jq -r 'select(.type == \"file\") | [.sha256, .path] | @tsv'",
        "ocifs deleted --replaced app.tar",
    )
)
@click.option("--replaced", is_flag=True, help="Also what a later layer has something else for under the same path.")
@click.option("--hash", "hashed", is_flag=True, help="Read every file, and show its SHA-256.")
@opt.json_lines_option
@opt.ref_argument
@opt.examination_options
def deleted(choice: Choice, ref: str, *, replaced: bool, hashed: bool, as_json: bool) -> None:
    """List what was deleted, by what, and what is left of it.

    By whiteouts and opaque markers, everything below a removed directory too; entries that a later one of the same layer
    overrides; and what the layer rules leave out of the tree. LAYER has it, BY removed it. DATA says whether a file's data
    is there: 'yes', 'lost' if its layer breaks off before it, 'damaged' if --hash could not read it. The summary counts
    data once, also of files with several names.

    Fields of --json are those of a version, how, path_visible (the image shows something under this path), recoverable,
    sha256, and by: layer, digest, diff_id, created, created_by of the layer that removed it, null for what never was in
    the tree. Exit status 4 if --hash finds damaged data.
    """
    from ocifs.forensics.remains import deleted as all_deleted

    status = 0
    with opened_examination(choice, ref) as examination:
        tally = _Tally()
        if not as_json:
            wide = f"  {'SHA-256':<64}" if hashed else ""
            output.print_line(f"{'HOW':<10}  LAYER     BY            SIZE  {'DATA':<7}{wide}  PATH")
        for remnant, digest in _with_digests(examination, all_deleted(examination, replaced=replaced), hashed=hashed):
            tally.add(remnant.version)
            if as_json:
                output.print_json(_remnant_json(examination, remnant, digest))
            else:
                _print_remnant(remnant, digest, hashed=hashed)
            if hashed and _data_word(remnant.version, digest, hashed=True) == "damaged":
                status = DamagedError.exit_code
        if not as_json:
            tally.print(examination)
    if status:
        raise click.exceptions.Exit(status)


_Digest = bytes | None
"""Of a file that was read: its SHA-256, or nothing if it cannot be read."""


def _with_digests(
    examination: Examination, remnants: Iterator[Remnant], *, hashed: bool
) -> Iterator[tuple[Remnant, _Digest]]:
    if not hashed:
        yield from ((remnant, None) for remnant in remnants)
        return
    from ocifs.forensics.digests import BATCH, digests

    while batch := list(itertools.islice(remnants, BATCH)):
        files = [remnant.version for remnant in batch if remnant.version.kind == Kind.FILE]
        found = iter(digests(examination, files))
        for remnant in batch:
            digest = next(found) if remnant.version.kind == Kind.FILE else None
            yield remnant, _told(remnant.version, digest)


def _told(version: Version, digest: bytes | DamagedError | None) -> _Digest:
    if digest is None or isinstance(digest, bytes):
        return digest
    if not version.unreadable:
        output.complain(str(digest))
    return None


class _Tally:
    """What each layer removed."""

    def __init__(self) -> None:
        self._by_layer: dict[int, list[int]] = {}

    def add(self, version: Version) -> None:
        """Count one."""
        from ocifs.forensics.remains import data_size

        counts = self._by_layer.setdefault(version.end_layer or version.layer, [0, 0, 0])
        counts[0] += 1
        counts[1] += version.kind == Kind.FILE
        counts[2] += data_size(version)

    def print(self, examination: Examination) -> None:
        """Write the summary, after an empty line."""
        output.print_line("")
        if not self._by_layer:
            output.print_line("nothing was deleted")
            return
        rows: list[Sequence[str]] = [
            (str(layer), str(entries), str(files), str(size), step_text(examination, layer))
            for layer, (entries, files, size) in sorted(self._by_layer.items())
        ]
        if len(rows) > 1:
            sums = (str(sum(counts[field] for counts in self._by_layer.values())) for field in range(3))
            rows.append(("all", *sums, ""))
        output.print_table(("BY", "ENTRIES", "FILES", "BYTES", "STEP"), rows, right=(0, 1, 2, 3))


def _data_word(version: Version, digest: _Digest, *, hashed: bool) -> str:
    if version.kind != Kind.FILE:
        return "-"
    if version.unreadable:
        return "lost"
    return "damaged" if hashed and digest is None else "yes"


def _print_remnant(remnant: Remnant, digest: _Digest, *, hashed: bool) -> None:
    version = remnant.version
    terminal = output.to_terminal()
    name = output.shown(b"/" + version.path, terminal=terminal)
    if version.kind == Kind.DIR:
        name += "/"
    elif version.kind == Kind.SYMLINK:
        name += f" -> {output.shown(version.target, terminal=terminal)}"
    size = str(version.size) if version.kind == Kind.FILE else "-"
    by = str(version.end_layer or "-")
    wide = f"  {digest.hex() if digest else '-':<64}" if hashed else ""
    output.print_line(
        f"{ENDS[version.end]:<10}  {version.layer:>5}  {by:>5}  {size:>14}  "
        f"{_data_word(version, digest, hashed=hashed):<7}{wide}  {name}"
    )


def _remnant_json(examination: Examination, remnant: Remnant, digest: _Digest) -> dict[str, Any]:
    version = remnant.version
    return {
        **version_json(version),
        "how": ENDS[version.end],
        "path_visible": remnant.path_visible,
        "recoverable": not version.unreadable if version.kind == Kind.FILE else None,
        "sha256": digest.hex() if digest else None,
        "by": layer_json(examination, version.end_layer) if version.end_layer else None,
    }


# -- wasted --------------------------------------------------------------------------------------------------------


@click.command(
    epilog=opt.examples(
        "ocifs wasted oci:images/app:1.2",
        "ocifs wasted -n 0 --json app.tar | jq -r 'select(.record == \"path\") | [.size, .path] | @tsv'",
        "ocifs wasted --json app.tar | jq 'select(.record == \"total\").efficiency'",
    )
)
@click.option(
    "-n",
    "count",
    metavar="N",
    type=click.IntRange(min=0),
    default=20,
    show_default=True,
    help="Name the N largest; 0: all.",
)
@opt.json_lines_option
@opt.ref_argument
@opt.examination_options
def wasted(choice: Choice, ref: str, *, count: int, as_json: bool) -> None:
    """Add up the bytes in layers that no one sees.

    What was deleted or replaced, what another entry of its layer overrides, what lies behind an archive's end. Counted is
    file data as the layers' tars hold it, of files with several names once. Efficiency is the part of it that the image
    shows; dive's is another one where directories were removed, which it takes for needed.

    With --json each line has a record: 'path' (path, layer, size, cause, by; path is null for slack, the bytes behind an
    archive's end), 'layer' (stored, wasted, files, and the layer's fields) and, last, 'total' (stored, wasted, efficiency,
    causes).
    """
    from ocifs.forensics.remains import waste

    with opened_examination(choice, ref) as examination:
        found = waste(examination, count or None)
        if as_json:
            _waste_json(examination, found)
        else:
            _print_waste(examination, found)


def _waste_json(examination: Examination, found: Waste) -> None:
    for one in found.largest:
        output.print_json(
            {
                "record": "path",
                "path": "/" + output.decode(one.path) if one.path else None,
                "layer": one.layer,
                "size": one.size,
                "cause": one.cause.value,
                "by": one.by or None,
            }
        )
    for layer in found.layers:
        counts = {"stored": layer.stored, "wasted": layer.wasted, "files": layer.files}
        output.print_json({"record": "layer", **layer_json(examination, layer.layer), **counts})
    output.print_json(
        {
            "record": "total",
            "stored": found.stored,
            "wasted": found.wasted,
            "efficiency": found.efficiency,
            "causes": {cause.value: size for cause, size in found.causes.items()},
        }
    )


def _print_waste(examination: Examination, found: Waste) -> None:
    terminal = output.to_terminal()
    if found.largest:
        output.print_line(f"{'SIZE':>14}  LAYER  {'CAUSE':<10}     BY  PATH")
        for one in found.largest:
            name = output.shown(b"/" + one.path, terminal=terminal) if one.path else "(behind the end of the archive)"
            by = str(one.by or "-")
            output.print_line(f"{one.size:>14}  {one.layer:>5}  {one.cause.value:<10}  {by:>5}  {name}")
        output.print_line("")
    output.print_table(
        ("LAYER", "STORED", "WASTED", "FILES", "STEP"),
        [
            (
                str(layer.layer),
                output.human_size(layer.stored),
                output.human_size(layer.wasted),
                str(layer.files),
                step_text(examination, layer.layer),
            )
            for layer in found.layers
        ],
        right=(0, 1, 2, 3),
    )
    causes = ", ".join(f"{cause.value} {output.human_size(size)}" for cause, size in found.causes.items() if size)
    output.print_line("")
    output.print_line(f"Wasted:      {output.human_size(found.wasted)} of {output.human_size(found.stored)}")
    if causes:
        output.print_line(f"Causes:      {causes}")
    output.print_line(f"Efficiency:  {100 * found.efficiency:.2f} %")
