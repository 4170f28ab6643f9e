r"""Unified diffs of texts as bytes: what ``diff -u`` writes and patch(1) reads.

Lines end at newlines only, whatever their encoding. The shortest list of changes is looked for as Myers describes it ("An
O(ND) Difference Algorithm and Its Variations", 1986): ``rows[d]`` says for each diagonal how far one gets in the first text
with ``d`` changes. That takes time for texts that have little in common, and an image may be made to have such ones; so
after `_WORK` steps everything between what both texts begin and end with counts as changed. The diff is then longer than
need be, and as right.

Not here: which texts are compared, whether something is text.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

CONTEXT: Final = 3
"""Unchanged lines shown around a change."""

_WORK: Final = 500_000
"""Steps of looking for the shortest list of changes, about a second; its memory is 4 bytes a step at most."""

_Block = tuple[int, int, int, int]
"""Lines ``[0]`` to ``[1]`` of the first text became lines ``[2]`` to ``[3]`` of the second; from 0, without the last."""


def unified_diff(before: bytes, after: bytes, before_name: bytes, after_name: bytes) -> Iterator[bytes]:
    """Give the lines of the diff of two texts, each with its newline; none if they are the same."""
    old, new = _lines(before), _lines(after)
    blocks = _blocks(old, new)
    if blocks:
        yield b"--- " + header_name(before_name) + b"\n"
        yield b"+++ " + header_name(after_name) + b"\n"
    for hunk in _hunks(blocks):
        yield from _hunk(hunk, old, new)


def header_name(name: bytes) -> bytes:
    """Give a file's name as it stands in a diff's header: in C's quotes if it has to be, as GNU diff and git write it."""
    if any(byte < 0x20 or byte >= 0x7F or byte in b'"\\' for byte in name):  # noqa: PLR2004 (printable ASCII)
        return b'"' + b"".join(_quoted(byte) for byte in name) + b'"'
    return name + b"\t" if b" " in name else name  # the tab ends the name for who reads a time behind it


def _quoted(byte: int) -> bytes:
    if byte in b'"\\':
        return b"\\%c" % byte
    return b"%c" % byte if 0x20 <= byte < 0x7F else b"\\%03o" % byte  # noqa: PLR2004 (printable ASCII)


def _lines(text: bytes) -> list[bytes]:
    *lines, last = text.split(b"\n")
    return [line + b"\n" for line in lines] + ([last] if last else [])


# -- what changed --------------------------------------------------------------------------------------------------


def _blocks(old: Sequence[bytes], new: Sequence[bytes]) -> list[_Block]:
    """Give what changed, in order, with at least one unchanged line between two blocks."""
    shorter = min(len(old), len(new))
    head = 0
    while head < shorter and old[head] == new[head]:
        head += 1
    tail = 0
    while tail < shorter - head and old[-1 - tail] == new[-1 - tail]:
        tail += 1
    first, second = old[head : len(old) - tail], new[head : len(new) - tail]
    blocks = []
    x = y = 0
    for same_x, same_y, length in [*_matches(first, second), (len(first), len(second), 0)]:
        if same_x > x or same_y > y:
            blocks.append((head + x, head + same_x, head + y, head + same_y))
        x, y = same_x + length, same_y + length
    return blocks


def _matches(old: Sequence[bytes], new: Sequence[bytes]) -> list[tuple[int, int, int]]:
    """Give the runs of lines that stay: (start in ``old``, start in ``new``, length), in order."""
    rows = _rows(old, new)
    found = []
    x, y = len(old), len(new)
    for d in range(len(rows) - 1, -1, -1):
        start, from_right = _start(rows, d, (x - y + d) // 2, len(old), len(new))
        if x > start:
            found.append((start, start - (x - y), x - start))
        x, y = (start - 1, start - (x - y)) if from_right else (start, start - (x - y) - 1)
    return found[::-1]


def _rows(old: Sequence[bytes], new: Sequence[bytes]) -> list[array[int]]:
    """Give for each number of changes how far one gets in ``old`` on each diagonal, -1 for nowhere; none if it is too far.

    Diagonal ``k`` is where the line's number in ``old`` is greater by ``k`` than that in ``new``; in row ``d`` those from
    ``-d`` to ``d`` in steps of two.
    """
    rows: list[array[int]] = []
    work = 0
    while work < _WORK:
        d = len(rows)
        row = array("i", bytes(4 * (d + 1)))
        rows.append(row)
        for i in range(d + 1):
            k = 2 * i - d
            start, _ = _start(rows, d, i, len(old), len(new))
            x = start
            while 0 <= x < len(old) and x - k < len(new) and old[x] == new[x - k]:
                x += 1
            row[i] = x
            work += 1 + x - start
            if x == len(old) and x - k == len(new):
                return rows
    return []


def _start(rows: Sequence[array[int]], d: int, i: int, old: int, new: int) -> tuple[int, bool]:
    """Say where one is on a diagonal just behind the ``d``-th change, and whether that change removed a line of ``old``."""
    if d == 0:
        return 0, False
    before = rows[d - 1]
    added = before[i] if i < d and before[i] - (2 * i - d) <= new else -1
    removed = before[i - 1] + 1 if i and 0 <= before[i - 1] < old else -1
    return (removed, True) if removed > added else (added, False)


# -- how it is written ---------------------------------------------------------------------------------------------


def _hunks(blocks: Sequence[_Block]) -> Iterator[list[_Block]]:
    """Join blocks whose context would touch."""
    hunk: list[_Block] = []
    for block in blocks:
        if hunk and block[0] - hunk[-1][1] > 2 * CONTEXT:
            yield hunk
            hunk = []
        hunk.append(block)
    if hunk:
        yield hunk


def _hunk(blocks: Sequence[_Block], old: Sequence[bytes], new: Sequence[bytes]) -> Iterator[bytes]:
    above = min(CONTEXT, blocks[0][0])
    below = min(CONTEXT, len(old) - blocks[-1][1])
    x = blocks[0][0] - above
    stop = blocks[-1][1] + below
    ranges = _range(x, stop), _range(blocks[0][2] - above, blocks[-1][3] + below)
    yield b"@@ -%s +%s @@\n" % ranges
    for old_start, old_stop, new_start, new_stop in blocks:
        for line in old[x:old_start]:
            yield _line(b" ", line)
        for line in old[old_start:old_stop]:
            yield _line(b"-", line)
        for line in new[new_start:new_stop]:
            yield _line(b"+", line)
        x = old_stop
    for line in old[x:stop]:
        yield _line(b" ", line)


def _range(start: int, stop: int) -> bytes:
    if stop - start == 1:
        return b"%d" % stop
    return b"%d,%d" % (start + 1 if stop > start else start, stop - start)


def _line(sign: bytes, line: bytes) -> bytes:
    return sign + line if line.endswith(b"\n") else sign + line + b"\n\\ No newline at end of file\n"
