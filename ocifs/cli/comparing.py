"""How images differ: ``diff``.

Not here: how it is found out (`ocifs.forensics.differences`); what a container changed (`changing`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import click

from ocifs.cli import options as opt
from ocifs.cli import output
from ocifs.cli.examining import opened_examination, version_json
from ocifs.cli.options import Choice
from ocifs.errors import DamagedError, UsageError
from ocifs.tree import Kind

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ocifs.forensics.differences import Difference, Side
    from ocifs.forensics.examination import Examination

_MAX_TEXT: Final = 1 << 20
"""Bytes of the largest file of which --content shows lines."""
_TEXT_SAMPLE: Final = 8000
"""A file with a NUL in its first bytes is no text: git looks at as many."""


@click.command(
    epilog=opt.examples(
        "ocifs diff oci:images/app:1.2 oci:images/app:1.3",
        "ocifs diff 'app.tar#2' 'app.tar#3'",
        "ocifs diff --ignore mtime --content old.tar new.tar",
        "ocifs diff --json old.tar new.tar | jq -r 'select(.changed | index(\"mode\")).path'",
    )
)
@click.option("--content", is_flag=True, help="Show the lines in which texts differ; of other files, size and SHA-256.")
@click.option("--ignore", "ignored", metavar="WHAT[,WHAT…]", help="Do not compare this, as mtime,owner.")
@opt.json_lines_option
@click.argument("before", metavar="REF")
@click.argument("after", metavar="REF")
@opt.examination_options
def diff(choice: Choice, before: str, after: str, *, content: bool, ignored: str | None, as_json: bool) -> None:
    """List how two images differ: A added, C changed, D deleted. With REF#N, an image up to its Nth layer.

    Behind what changed stands what of it: type, content, mode, owner, mtime, xattrs, target (of a link), device; --ignore
    takes these words. Files are read only where neither their sizes nor their place in a common layer tell. --content
    adds a unified diff that patch(1) reads; files above 1 MiB count as binary there.

    Fields of --json are change, path, changed, before and after (fields of a version, and sha256; null if there is none),
    problems, and with --content patch. Exit status: 0 no difference, 1 some, 4 if data cannot be read.
    """
    from ocifs.forensics.differences import differences

    left_out = _aspects(ignored)
    found = damaged = False
    with opened_examination(choice, before) as old, opened_examination(choice, after, beside=old) as new:
        for difference in differences(old, new, ignored=left_out, hashed=content):
            found = True
            damaged = damaged or bool(difference.problems)
            lines = _Lines(old, new, difference) if content else None
            if as_json:
                _print_json(difference, lines)
            else:
                _print(difference, lines)
    if found:
        raise click.exceptions.Exit(DamagedError.exit_code if damaged else 1)


def _aspects(words: str | None) -> tuple[str, ...]:
    """What --ignore names. Raises `UsageError`."""
    from ocifs.forensics.differences import ASPECTS

    found = tuple(word.strip() for word in words.split(",")) if words is not None else ()
    for word in found:
        if word not in ASPECTS:
            raise UsageError(f"--ignore {word!r} is none of {', '.join(ASPECTS)}")
    return found


def _print(difference: Difference, lines: _Lines | None) -> None:
    terminal = output.to_terminal()
    what = f"  ({', '.join(difference.changed)})" if difference.changed else ""
    output.print_line(f"{difference.sign} {output.shown(b'/' + difference.path, terminal=terminal)}{what}")
    for problem in difference.problems:
        output.complain(problem)
    for line in lines or ():
        if terminal:
            output.print_line("\t".join(map(output.printable, output.decode(line.removesuffix(b"\n")).split("\t"))))
        else:
            output.write(line)


def _print_json(difference: Difference, lines: _Lines | None) -> None:
    row = {
        "change": difference.sign,
        "path": "/" + output.decode(difference.path),
        "changed": list(difference.changed),
        "before": _side_json(difference.before),
        "after": _side_json(difference.after),
        "problems": list(difference.problems),
    }
    if lines is not None:
        row["patch"] = output.decode(b"".join(lines)) or None
    output.print_json(row)


def _side_json(side: Side | None) -> dict[str, Any] | None:
    if side is None:
        return None
    return {**version_json(side.version), "sha256": side.sha256.hex() if side.sha256 else None}


class _Lines:
    """The lines of --content for one difference."""

    def __init__(self, before: Examination, after: Examination, difference: Difference) -> None:
        self._before = before
        self._after = after
        self._difference = difference

    def __iter__(self) -> Iterator[bytes]:
        from ocifs.forensics.unified import header_name, unified_diff

        one, other = self._difference.before, self._difference.after
        if self._difference.problems or not _content_differs(self._difference):
            return
        path = self._difference.path
        old_name = b"a/" + path if _is_file(one) else b"/dev/null"
        new_name = b"b/" + path if _is_file(other) else b"/dev/null"
        old, new = _text(self._before, one), _text(self._after, other)
        if old is not None and new is not None:
            yield from unified_diff(old, new, old_name, new_name)
        else:
            names = header_name(old_name).rstrip(b"\t"), header_name(new_name).rstrip(b"\t")
            yield b"Binary files %s and %s differ: %s, %s\n" % (*names, _summary(one), _summary(other))


def _content_differs(difference: Difference) -> bool:
    if difference.sign == "C" and not {"content", "type"} & set(difference.changed):
        return False
    return _is_file(difference.before) or _is_file(difference.after)


def _is_file(side: Side | None) -> bool:
    return side is not None and side.version.kind == Kind.FILE


def _text(examination: Examination, side: Side | None) -> bytes | None:
    """The whole of a file if it is a text, nothing of what is no file; None for anything else."""
    if side is None or side.version.kind != Kind.FILE:
        return b""
    if side.version.size > _MAX_TEXT:
        return None
    data = b"".join(examination.data(side.version))
    return None if b"\0" in data[:_TEXT_SAMPLE] else data


def _summary(side: Side | None) -> bytes:
    if side is None or side.version.kind != Kind.FILE:
        return b"no file"
    digest = side.sha256.hex() if side.sha256 else "unreadable"
    return f"{side.version.size} bytes sha256:{digest}".encode("ascii")
