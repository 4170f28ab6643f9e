"""Sparse maps: which pieces of a file are stored, and where in the file they belong; in the three ways that tars have.

Old GNU (type ``S``): four pairs of numbers in the header, more in blocks behind it.
PAX 0.0 and 0.1: all of it in records (`ocifs.tar.pax` makes one list of the first's pairs).
PAX 1.0: lines of text in the first blocks of the file's data.

A map is checked when it is complete; `RefusedError` (rule D8) says what is wrong with it.

Not here: where the blocks come from (`ocifs.tar.scanner`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import msgspec

from ocifs.tar.entry import EXTENSION_LIMIT, Entry, EntryType, RefusedError, shown
from ocifs.tar.header import BLOCK_SIZE, number
from ocifs.tar.pax import decimal

if TYPE_CHECKING:
    from collections.abc import Iterable


class SparseMap(Protocol):
    """A map of which more blocks are to come."""

    @property
    def path(self) -> bytes:
        """The path of the file."""

    def take(self, block: bytes) -> Entry | None:
        """Take the next block; give the entry if the map is complete now."""


def gnu_map(entry: Entry, block: bytes, *, gnu: bool) -> Entry | SparseMap:
    """Read the four segments in an old GNU sparse header, and the file's size. ``gnu``: whether the header is GNU's."""
    if not gnu:  # star has another layout under the same type; archive/tar refuses it too
        raise _bad(entry, "the header is not GNU's")
    try:
        size = number(block[483:495])
    except ValueError:
        raise _bad(entry, "its size is no number") from None
    started = _GnuMap(msgspec.structs.replace(entry, size=size))
    return started.read(block[386:483]) or started


def pax_map(entry: Entry, records: dict[bytes, bytes]) -> Entry | SparseMap | None:
    """Read what PAX records say about a sparse file; None if they say nothing, or speak of an unknown version."""
    version = records.get(b"GNU.sparse.major", b""), records.get(b"GNU.sparse.minor", b"")
    segment_map = records.get(b"GNU.sparse.map", b"")
    if version == (b"", b""):  # formats 0.0 and 0.1 began without version records
        if not segment_map:
            return None
    elif version not in {(b"0", b"0"), (b"0", b"1"), (b"1", b"0")}:
        return None
    if entry.type is not EntryType.FILE and entry.type is not EntryType.OTHER:
        raise _bad(entry, "it is no file")
    size = entry.stored_size
    count = 0
    try:
        if value := records.get(b"GNU.sparse.size") or records.get(b"GNU.sparse.realsize"):
            size = decimal(value)
        if version != (b"1", b"0"):
            count = decimal(records.get(b"GNU.sparse.numblocks", b""))
    except ValueError:
        raise _bad(entry, "its size or its number of segments is no number") from None
    entry = msgspec.structs.replace(entry, path=records.get(b"GNU.sparse.name") or entry.path, size=size)
    if version == (b"1", b"0"):
        return _TextMap(entry)
    texts = segment_map.split(b",") if segment_map else []
    if len(texts) != 2 * count:
        raise _bad(entry, f"{len(texts)} numbers for {count} segments")
    return _complete(entry, _decimals(entry, texts))


class _GnuMap:
    """Old GNU's: arrays of pairs, in the header and in blocks behind it, which the entry's size does not count."""

    def __init__(self, entry: Entry) -> None:
        self._entry = entry
        self._numbers: list[int] = []  # offset, length, …
        self._blocks = 0

    @property
    def path(self) -> bytes:
        return self._entry.path

    def take(self, block: bytes) -> Entry | None:
        self._blocks += 1
        return self.read(block[:505])

    def read(self, array: bytes) -> Entry | None:
        """Take pairs of 12-byte numbers and the flag behind them, which says that a further block follows."""
        try:
            for at in range(0, len(array) - 1, 24):
                if not array[at]:
                    break
                self._numbers += (number(array[at : at + 12]), number(array[at + 12 : at + 24]))
        except ValueError:
            raise _bad(self._entry, "a number that is none") from None
        length = self._blocks * BLOCK_SIZE
        if not array[-1]:
            data_offset = self._entry.data_offset + length
            return _complete(msgspec.structs.replace(self._entry, data_offset=data_offset), self._numbers)
        if length >= EXTENSION_LIMIT:
            raise _bad(self._entry, f"it is longer than {EXTENSION_LIMIT} bytes")
        return None


class _TextMap:
    """PAX 1.0's: the number of segments, then offsets and lengths, a line each, in whole blocks of the stored bytes."""

    def __init__(self, entry: Entry) -> None:
        self._entry = entry
        self._text = bytearray()
        self._newlines = 0
        self._wanted = 0  # newlines; 0: the first line has not come
        self._check_room()

    @property
    def path(self) -> bytes:
        return self._entry.path

    def take(self, block: bytes) -> Entry | None:
        self._text += block
        self._newlines += block.count(b"\n")
        if self._newlines and not self._wanted:
            (count,) = _decimals(self._entry, [bytes(self._text[: self._text.index(b"\n")])])
            if count < 0:
                raise _bad(self._entry, "a negative number of segments")
            self._wanted = 1 + 2 * count
        if not self._wanted or self._newlines < self._wanted:
            self._check_room()
            return None
        lines = bytes(self._text).split(b"\n", self._wanted)[1 : self._wanted]
        entry = msgspec.structs.replace(
            self._entry,
            data_offset=self._entry.data_offset + len(self._text),
            stored_size=self._entry.stored_size - len(self._text),
        )
        return _complete(entry, _decimals(self._entry, lines))

    def _check_room(self) -> None:
        """Refuse a map that needs another block and cannot have one."""
        if self._entry.stored_size - len(self._text) < BLOCK_SIZE:
            raise _bad(self._entry, "it does not end within the file's data")
        if len(self._text) + BLOCK_SIZE > EXTENSION_LIMIT:
            raise _bad(self._entry, f"it is longer than {EXTENSION_LIMIT} bytes")


def _decimals(entry: Entry, texts: Iterable[bytes]) -> list[int]:
    try:
        return [decimal(text) for text in texts]
    except ValueError:
        raise _bad(entry, "a number that is none") from None


def _complete(entry: Entry, numbers: Iterable[int]) -> Entry:
    """The entry with its segments; of one that is no file they are checked only."""
    try:
        segments = _segments(numbers, entry.size, entry.stored_size)
    except ValueError as error:
        raise _bad(entry, str(error)) from None
    if entry.type is not EntryType.FILE:
        return msgspec.structs.replace(entry, size=0)
    return msgspec.structs.replace(entry, sparse=segments)


def _bad(entry: Entry, what: str) -> RefusedError:
    offset = entry.header_offset
    msg = f"the sparse map of {shown(entry.path)} at layer offset {offset} is impossible: {what}"
    return RefusedError(msg, "D8", offset)


def _segments(numbers: Iterable[int], size: int, stored_size: int) -> tuple[tuple[int, int], ...]:
    """Check a sparse map given as flat numbers (offset, length, …); ValueError says what is wrong with it.

    Empty segments vanish and touching ones are joined, so that each costs the sender at least a byte of data.
    """
    found: list[tuple[int, int]] = []
    total = end = 0
    if size < 0:
        raise ValueError("a negative file size")
    iterator = iter(numbers)
    for offset, length in zip(iterator, iterator, strict=True):
        if offset < 0 or length < 0:
            raise ValueError("a negative offset or length")
        if offset < end:
            raise ValueError("segments that overlap or are out of order")
        if offset + length > size:
            raise ValueError(f"a segment up to {offset + length} in a file of {size} bytes")
        if length:
            if found and offset == end:
                start, before = found[-1]
                found[-1] = (start, before + length)
            else:
                found.append((offset, length))
            total += length
        end = offset + length
    if total != stored_size:
        raise ValueError(f"segments of {total} bytes, but {stored_size} bytes of data")
    return tuple(found)
