"""Bytes of a layer's tar that belong to no entry that anybody sees: where data hides, and what is left behind.

What counts is what the layer itself shows. A file that a later layer deletes is no slack (`ocifs.history` has it); an entry
that a later one of the same layer overrides is, for no tree of the image ever had it. `RegionKind` says what there is.

What an archive's headers say is looked at block by block, so finding padding decodes the whole layer, once and in order.
All else comes from index and history, and costs no more than reading those.

Not here: the blob around the tar (names and comments in gzip headers, skippable frames of zstd), the files of
``.ocifs/slack`` (`ocifs.forensics.views`).
"""

from __future__ import annotations

import enum
import string
from typing import TYPE_CHECKING, Final

import msgspec

from ocifs.forensics.examination import PIECE_SIZE
from ocifs.history import Change, End
from ocifs.tar import BLOCK_SIZE, TarScanner, header_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ocifs.forensics.examination import Examination
    from ocifs.history import Version
    from ocifs.tar import Entry


class RegionKind(enum.StrEnum):
    """Why nobody sees the bytes. The values are stable."""

    TRAILING_TAR = "trailing-tar"
    """Another archive, behind the two zero blocks that end the layer's own."""
    TRAILING_DATA = "trailing-data"
    """Something else there that is not zero."""
    ESTARGZ_TOC = "estargz-toc"
    """An archive there that holds nothing but ``stargz.index.json``: builders that keep a layer's bytes as they are put the
    table of contents of eStargz behind its end. Benign."""
    UNPARSED = "unparsed"
    """From where the tar breaks a rule to the layer's end."""
    CUT_OFF = "cut-off"
    """What is there of the data of a file that the layer breaks off in."""
    OVERRIDDEN = "overridden"
    """Data of an entry that a later entry of the layer overrides."""
    LEFT_OUT = "left-out"
    """Data of an entry that the layer rules leave out of the tree."""
    GLOBAL_HEADER = "global-header"
    """The records of a PAX global header, which have no effect; git writes the commit's number there. Benign."""
    MARKER_DATA = "marker-data"
    """Content of a whiteout or an opaque marker."""
    ORPHAN_HEADER = "orphan-header"
    """Headers between entries that belong to none, as an extension header at the end."""
    HEADER_PADDING = "header-padding"
    """Bytes of a header that no reader looks at: behind its fields, behind a text's NUL, behind a record."""
    DATA_PADDING = "data-padding"
    """What fills data up to the next block."""

    @property
    def benign(self) -> bool:
        """Whether tools that mean no harm write this."""
        return self in (RegionKind.ESTARGZ_TOC, RegionKind.GLOBAL_HEADER)


class Region(msgspec.Struct, frozen=True, gc=False):
    """``size`` bytes, at least 1, at ``layer_offset`` of a layer's uncompressed tar.

    Padding begins and ends at a byte that is not zero; everything else is whole.
    """

    kind: RegionKind
    layer_offset: int
    size: int
    note: str
    """What it is, for people, without a path."""
    path: bytes = b""
    """As stored in the entry that it belongs to, or in the first of a trailing archive; empty if there is none."""


def regions(examination: Examination, layer: int, *, padding: bool = True) -> Iterator[Region]:
    """Give what nobody sees of layer ``layer`` (from 1), by rising offset.

    Without ``padding`` the kinds HEADER_PADDING, DATA_PADDING and ORPHAN_HEADER are left out, and hardly any data is
    decoded. Memory follows the number of entries that are not seen. Raises `DamagedError` if data does not decode to what
    was indexed.
    """
    opened = examination.layer(layer)
    index = opened.index
    unseen, linked = _unseen(examination, layer)
    tar = _Tar(examination, layer, index.layer_size)
    end = 0
    for number, entry in enumerate(index.entries()):
        if padding:
            yield from tar.orphans(end, entry.header_offset)
            yield from tar.header_padding(entry)
        end = entry.data_offset + entry.stored_size
        if end > index.layer_size:
            yield from _cut_off(entry, index.layer_size)
            end = index.layer_size
        elif number in unseen and entry.stored_size and entry.data_offset not in linked:
            kind, note = unseen[number]
            if entry.typeflag == ord("g"):
                kind, note = RegionKind.GLOBAL_HEADER, "records of a PAX global header"
            yield Region(kind, entry.data_offset, entry.stored_size, note, entry.path)
        stop = min(end + -end % BLOCK_SIZE, index.layer_size)
        if padding:
            yield from tar.rest(RegionKind.DATA_PADDING, end, stop, "fills the file's last block", entry.path)
        end = stop
    if padding:
        yield from tar.orphans(end, index.end_offset)
    yield from behind_the_end(examination, layer)


def _unseen(examination: Examination, layer: int) -> tuple[dict[int, tuple[RegionKind, str]], set[int]]:
    """Give the entries of a layer that no tree ever had, by number, and where the data is that hard links still show."""
    unseen: dict[int, tuple[RegionKind, str]] = {}
    linked: set[int] = set()
    for version in examination.history:
        if version.hard_link and version.change in (Change.ADDED, Change.CHANGED):
            linked.update(offset for _, of, offset, _ in version.extents[:1] if of == layer)
        if version.layer == layer and version.entry >= 0:
            found = _why_unseen(version)
            if found is not None:
                unseen[version.entry] = found
    return unseen, linked


def _why_unseen(version: Version) -> tuple[RegionKind, str] | None:
    if version.change is Change.MARKER:
        return RegionKind.MARKER_DATA, "content of a whiteout"
    if version.change is not Change.NONE:
        return None
    if version.end is not End.OVERRIDDEN:
        return RegionKind.LEFT_OUT, "data of an entry that is no part of the tree"
    by = f"entry {version.end_entry}" if version.end_entry >= 0 else "an implied directory"
    return RegionKind.OVERRIDDEN, f"data of entry {version.entry}, which {by} of this layer overrides"


def _cut_off(entry: Entry, layer_size: int) -> Iterator[Region]:
    there = layer_size - entry.data_offset
    if there > 0:
        note = f"the first {there} of {entry.stored_size} bytes of a file, where the layer breaks off"
        yield Region(RegionKind.CUT_OFF, entry.data_offset, there, note, entry.path)


# --- behind the end ---------------------------------------------------------------------------------------------------


def behind_the_end(examination: Examination, layer: int) -> Iterator[Region]:
    """Give what lies behind the end of layer ``layer``'s archive, or behind where that breaks off. Errors as `regions`.

    Reads the headers of another archive that is there, and no other data.
    """
    index = examination.layer(layer).index
    damage, trailing = index.damage, index.trailing
    if damage is not None and damage.layer_offset < index.layer_size:
        size = index.layer_size - damage.layer_offset
        yield Region(RegionKind.UNPARSED, damage.layer_offset, size, damage.message)
    if trailing is None or trailing.content_offset is None:
        return
    start = trailing.content_offset
    size = index.layer_size - start
    if not trailing.tar_header:
        note = f"{start - index.end_offset} bytes behind the beginning of the archive's end"
        yield Region(RegionKind.TRAILING_DATA, start, size, note)
        return
    tar = _Tar(examination, layer, index.layer_size)
    entries, first, alone = _nested_archive(tar, start, index.layer_size)
    if alone and first.removeprefix(b"./") == b"stargz.index.json":
        yield Region(RegionKind.ESTARGZ_TOC, start, size, "the table of contents of eStargz", first)
        return
    note = f"another archive of {entries} {'entry' if entries == 1 else 'entries'}"
    yield Region(RegionKind.TRAILING_TAR, start, size, note, first)


def _nested_archive(tar: _Tar, start: int, stop: int) -> tuple[int, bytes, bool]:
    """Give the number of entries, the first one's path, and whether there is one and nothing else but zeros."""
    scanner = TarScanner()
    at, entries, first = start, 0, b""
    while at < stop:
        if step := min(scanner.passable, stop - at):
            scanner.pass_over(step)
        else:
            piece = tar.read(at, min(BLOCK_SIZE, stop - at))
            step = len(piece)
            for entry in scanner.feed(piece):
                first = first or entry.path
                entries += 1
        at += step
    summary = scanner.finish()
    clean = summary.damage is None and (summary.trailing is None or summary.trailing.content_offset is None)
    return entries, first, clean and entries == 1


# --- padding ----------------------------------------------------------------------------------------------------------


class _Tar:
    """A layer's tar, looked at block by block."""

    def __init__(self, examination: Examination, layer: int, size: int) -> None:
        self._spans = examination.spans
        self._layer = layer
        self._size = size

    def read(self, offset: int, size: int) -> bytes:
        """Give bytes of the layer, fewer at its end."""
        size = min(size, self._size - offset)
        return b"".join(self._spans.read_blocking(self._layer, offset, size)) if size > 0 else b""

    def rest(self, kind: RegionKind, start: int, stop: int, note: str, path: bytes) -> Iterator[Region]:
        """Give what is not zero of bytes that should be, less than a block."""
        if start < stop:
            yield from _not_zero(self.read(start, stop - start), kind, start, note, path)

    def orphans(self, start: int, stop: int) -> Iterator[Region]:
        """Give what lies between entries."""
        while start < stop:
            size = min(stop - start, PIECE_SIZE)
            note = "a header that belongs to no entry"
            yield from _not_zero(self.read(start, size), RegionKind.ORPHAN_HEADER, start, note, b"")
            start += size

    def header_padding(self, entry: Entry) -> Iterator[Region]:
        """Give what is not zero of all headers of an entry where no reader looks."""
        kind, at = RegionKind.HEADER_PADDING, entry.header_offset
        while at < entry.data_offset:
            block = self.read(at, BLOCK_SIZE)
            if len(block) < BLOCK_SIZE:
                return
            for start, stop, note in _unused(block):
                yield from _not_zero(block[start:stop], kind, at + start, note, entry.path)
            typeflag = block[156]
            at += BLOCK_SIZE
            if typeflag not in _EXTENSIONS:
                break
            if at >= entry.data_offset:  # the records of a global header are its data
                return
            size = header_size(block)
            stop = at + size + -size % BLOCK_SIZE
            if size <= 0 or stop > entry.data_offset:
                return
            begin = at + size
            if typeflag in _LONG_NAMES:
                begin = at + (self.read(at, size) + b"\0").index(b"\0")
            yield from self.rest(kind, begin, stop, "behind an extension header", entry.path)
            at = stop
        if at < entry.data_offset:
            yield from self._map_padding(entry, at)

    def _map_padding(self, entry: Entry, at: int) -> Iterator[Region]:
        """Give what is not zero in the map of a sparse file, which lies between its header and its data."""
        kind, note = RegionKind.HEADER_PADDING, "behind a sparse map"
        if entry.typeflag == ord("S"):
            for offset in range(at, entry.data_offset, BLOCK_SIZE):
                block = self.read(offset, BLOCK_SIZE)
                for start, stop in (_behind_pairs(block, 0, 504), (505, 512)):
                    yield from _not_zero(block[start:stop], kind, offset + start, note, entry.path)
            return
        text = self.read(at, entry.data_offset - at)  # bounded by `ocifs.tar.EXTENSION_LIMIT`
        count, _, _ = text.partition(b"\n")
        lines = text.split(b"\n", 1 + 2 * int(count)) if count.isdigit() else [text]
        begin = at + len(text) - len(lines[-1])
        yield from _not_zero(lines[-1], kind, begin, note, entry.path)


_EXTENSIONS: Final = frozenset(b"xgLK")
_LONG_NAMES: Final = frozenset(b"LK")
_LINKS: Final = frozenset(b"12")
_NUMBERS: Final = ((100, 108), (108, 116), (116, 124), (124, 136), (136, 148), (148, 156))
_DEVICE_NUMBERS: Final = ((329, 337), (337, 345))
_BEHIND_FIELDS: Final = "behind a header's fields"
_BEHIND_TEXT: Final = "behind a text in a header"
_BEHIND_NUMBER: Final = "behind a number in a header"
_NUMERIC: Final = frozenset((string.octdigits + " \0").encode())


def _unused(block: bytes) -> Iterator[tuple[int, int, str]]:
    """Give the parts of a header block that no reader looks at, by its dialect (see `ocifs.tar`), by rising offset."""
    yield _behind_text(block, 0, 100)
    for first, last in _NUMBERS:
        yield from _behind_number(block, first, last)
    yield (
        _behind_text(block, 157, 257) if block[156] in _LINKS else (157, 257, "a link's target where there is no link")
    )
    magic = block[257:263]
    if magic != b"ustar\0" and block[257:265] != b"ustar  \0":
        yield 257, 512, _BEHIND_FIELDS
        return
    yield _behind_text(block, 265, 297)
    yield _behind_text(block, 297, 329)
    for first, last in _DEVICE_NUMBERS:
        yield from _behind_number(block, first, last)
    if magic == b"ustar\0":
        if block[508:] == b"tar\0":
            yield _behind_text(block, 345, 476)
            yield 500, 508, _BEHIND_FIELDS
        else:
            yield _behind_text(block, 345, 500)
            yield 500, 512, _BEHIND_FIELDS
    elif _NUMERIC.issuperset(block[345:369]) or block[345] & 0x80 or block[357] & 0x80:
        # GNU: two times, an offset and names for several volumes, then the map of a sparse file.
        yield 369, 386, _BEHIND_FIELDS
        if block[156] == ord("S"):
            yield *_behind_pairs(block, 386, 482), "behind a sparse map"
        else:
            yield 386, 495, _BEHIND_FIELDS
        yield 495, 512, _BEHIND_FIELDS
    else:
        yield _behind_text(block, 345, 500)
        yield 500, 512, _BEHIND_FIELDS


def _behind_pairs(block: bytes, first: int, last: int) -> tuple[int, int]:
    """Give what is behind the end of a map of GNU's old sparse files: pairs of 12 bytes each, up to one that is empty."""
    return next((at for at in range(first, last, 24) if not block[at]), last), last


def _behind_text(block: bytes, first: int, last: int) -> tuple[int, int, str]:
    end = block.find(b"\0", first, last)
    return (last if end < 0 else end), last, _BEHIND_TEXT


def _behind_number(block: bytes, first: int, last: int) -> Iterator[tuple[int, int, str]]:
    field = block[first:last]
    if field[0] & 0x80:
        return
    end = first + len(field) - len(field.lstrip(b" \0"))
    end = block.find(b"\0", end, last)
    if end >= 0 and block[end:last].strip(b" \0"):
        yield end, last, _BEHIND_NUMBER


def _not_zero(data: bytes, kind: RegionKind, offset: int, note: str, path: bytes) -> Iterator[Region]:
    left = data.lstrip(b"\0")
    if left:
        yield Region(kind, offset + len(data) - len(left), len(left.rstrip(b"\0")), note, path)
