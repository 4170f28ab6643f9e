"""The file in which an image's history is kept.

This docstring is the specification of format version 2. Integers are little-endian; offsets count from the start of the
file.

==============  =========================================================================================================
part            content
==============  =========================================================================================================
frames          each one zstd frame with up to 512 versions, fewer if they take more than 256 KiB, but one at least: a
                MessagePack array (of the 16-bit form) of `Version` as arrays, its fields in order. Versions are sorted by
                path, a slash counting as less than every other byte (so that what lies below a directory follows upon it),
                then by layer, then by entry.
entries         for each layer one zstd frame: the number of each entry's version among all, as u32, by entry.
tables          MessagePack: an array of [key, the array of frames, the array of entries]. A frame is [path of its first
                version, number of that among all, offset, stored size, SHA-256], an entries frame [layer, offset, stored
                size, SHA-256, count].
footer          72 bytes: u64 offset and u64 size of the tables, u64 number of versions, 32 bytes SHA-256 of the tables
                followed by the footer without this field, u32 format version, u32 zero, and the magic ``ocifHIST``.
==============  =========================================================================================================

Opening reads the footer and the tables; a frame is read and compared with its checksum when something in it is asked for.
So a damaged byte comes out as `CacheDamagedError`, never as a wrong answer; and memory does not grow with the number of
paths, but for the tables' hundred bytes for each 512.

Not here: what versions are (`ocifs.history.version`), where such files are kept (`ocifs.store`).
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import struct
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import BinaryIO, Final, Protocol, Self

import msgspec
import zstandard

from ocifs.errors import CacheDamagedError, StaleFormatError
from ocifs.history.version import Version, sort_key

FORMAT_VERSION: Final = 2
"""Raised whenever the meaning of any byte changes."""

FRAME_VERSIONS: Final = 512
"""Versions in a frame: decoding one takes about half a millisecond."""
FRAME_SIZE: Final = 256 << 10
"""Bytes above which a frame gets no more versions. One takes a hundred, or megabytes if its entry was made for that."""

_MAGIC: Final = b"ocifHIST"
_FOOTER: Final = struct.Struct("<QQQ32sII8s")
_FRAMES_KEPT: Final = 32
"""Decoded frames kept, 16 Ki versions: some MB."""
_MAX_FRAME: Final = 1 << 30
_ARRAY: Final = struct.Struct(">BH")
"""What a MessagePack array of up to 65,535 begins with: 0xdc, and how many."""
_ADVICE: Final = "run 'ocifs cache clear' to have it built again"


class _Frame(msgspec.Struct, array_like=True, gc=False):
    first: bytes
    number: int
    offset: int
    size: int
    sha256: bytes


class _Entries(msgspec.Struct, array_like=True, gc=False):
    layer: int
    offset: int
    size: int
    sha256: bytes
    count: int


class _Tables(msgspec.Struct, array_like=True):
    key: str
    frames: list[_Frame]
    entries: list[_Entries]


def write(versions: Iterable[Version], out: BinaryIO, *, key: str) -> None:
    """Write the file of all ``versions``, front to back: they come by `sort_key`, layer and entry.

    ``key`` is the store's. An OSError passes through.
    """
    compress = zstandard.ZstdCompressor(level=3).compress
    encode = msgspec.msgpack.Encoder().encode
    frames: list[_Frame] = []
    offset = 0

    def put(data: bytes) -> tuple[int, int, bytes]:
        nonlocal offset
        stored = compress(data)
        out.write(stored)
        offset += len(stored)
        return offset - len(stored), len(stored), hashlib.sha256(stored).digest()

    numbers: dict[int, array[int]] = {}
    count = 0
    for first, some, data in _framed(versions):
        frames.append(_Frame(first, count, *put(data)))
        for number, (layer, entry) in enumerate(some, count):
            if entry >= 0:
                by_entry = numbers.setdefault(layer, array("I"))
                if entry >= len(by_entry):
                    by_entry.frombytes(bytes(by_entry.itemsize * (entry + 1 - len(by_entry))))
                by_entry[entry] = number
        count += len(some)
    entries = []
    for layer, by_entry in sorted(numbers.items()):
        if sys.byteorder == "big":
            by_entry.byteswap()
        entries.append(_Entries(layer, *put(by_entry.tobytes()), len(by_entry)))
    tables = encode(_Tables(key, frames, entries))
    out.write(tables)
    head = struct.pack("<QQQ", offset, len(tables), count)
    tail = struct.pack("<II8s", FORMAT_VERSION, 0, _MAGIC)
    out.write(head + hashlib.sha256(tables + head + tail).digest() + tail)


def _framed(versions: Iterable[Version]) -> Iterator[tuple[bytes, list[tuple[int, int]], bytes]]:
    """Give frame by frame the path of the first version, layer and entry of each, and the data."""
    encode = msgspec.msgpack.Encoder().encode
    some: list[tuple[int, int]] = []
    parts: list[bytes] = []
    first, size = b"", 0
    for version in versions:
        part = encode(version)
        if some and (len(some) == FRAME_VERSIONS or size + len(part) > FRAME_SIZE):
            yield first, some, _ARRAY.pack(0xDC, len(some)) + b"".join(parts)
            some, parts, size = [], [], 0
        first = first if some else version.path
        some.append((version.layer, version.entry))
        parts.append(part)
        size += len(part)
    if some:
        yield first, some, _ARRAY.pack(0xDC, len(some)) + b"".join(parts)


class RandomAccess(Protocol):
    """What a history is read from; `ocifs.store.StoredFile` is one."""

    name: str
    size: int

    def read_at(self, offset: int, size: int) -> bytes:
        """Give ``size`` bytes at ``offset``, fewer only at the end."""
        ...

    def close(self) -> None:
        """Let go of the file."""
        ...


class History:
    """All versions of all paths of an image. Iterating gives them sorted by path, layer and entry.

    Every method may be called from any thread.
    """

    def __init__(self, file: RandomAccess) -> None:
        """Open the history in ``file``, which is closed with it; on errors it is left open.

        Raises `StaleFormatError` if another version of ocifs wrote it, `CacheDamagedError` if it is not whole.
        """
        self.on_damage: Callable[[], None] | None = None
        """Called when damage is found, before the error is raised."""
        self._file = file
        footer = file.read_at(max(0, file.size - _FOOTER.size), _FOOTER.size)
        if len(footer) != _FOOTER.size or footer[-8:] != _MAGIC:
            raise self._damaged("it does not end with a footer")
        offset, size, count, checksum, version, _, _ = _FOOTER.unpack(footer)
        if version != FORMAT_VERSION:
            raise StaleFormatError(f"the history {file.name} has format version {version}, not {FORMAT_VERSION}")
        tables = file.read_at(offset, size) if offset + size <= file.size else b""
        if hashlib.sha256(tables + footer[:24] + footer[-16:]).digest() != checksum:
            raise self._damaged("its tables have a wrong checksum")
        try:
            self._tables = msgspec.msgpack.decode(tables, type=_Tables)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            raise self._damaged("its tables do not parse") from None
        self._count: int = count
        self.key = self._tables.key
        """The store's, under which it is kept."""
        self._firsts = [sort_key(frame.first) for frame in self._tables.frames]
        self._first_numbers = [frame.number for frame in self._tables.frames]
        self._entries_of = {entries.layer: entries for entries in self._tables.entries}
        self._kept_frame = lru_cache(_FRAMES_KEPT)(self._decode_frame)
        self._numbers = lru_cache(8)(self._decode_numbers)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __len__(self) -> int:
        """How many versions there are."""
        return self._count

    def __iter__(self) -> Iterator[Version]:
        """Give all versions, holding one frame at a time."""
        for number in range(len(self._tables.frames)):
            yield from self._decode_frame(number)

    def paths(self) -> Iterator[tuple[bytes, list[Version]]]:
        """Give each path with all its versions, in order."""
        path, versions = b"", list[Version]()
        for version in self:
            if version.path != path and versions:
                yield path, versions
                versions = []
            path = version.path
            versions.append(version)
        if versions:
            yield path, versions

    def of(self, path: bytes) -> list[Version]:
        """Give the versions of one path, without a leading slash; none if no layer ever had it."""
        found = []
        for version in self._from(path):
            if version.path != path:
                break
            found.append(version)
        return found

    def below(self, path: bytes) -> Iterator[Version]:
        """Give the versions of a path and of everything below it."""
        start = path + b"/"
        for version in self._from(path):
            if path and version.path != path and not version.path.startswith(start):
                break
            yield version

    def by_entry(self, layer: int, entry: int) -> Version:
        """Give what became of an entry of a layer's tar. Raises `IndexError` if there is no such entry."""
        entries = self._entries_of.get(layer)
        if entries is None or not 0 <= entry < entries.count:
            raise IndexError(entry)
        number = self._numbers(layer)[entry]
        frame = bisect.bisect_right(self._first_numbers, number) - 1
        return self._frame(frame)[number - self._first_numbers[frame]]

    def _from(self, path: bytes) -> Iterator[Version]:
        key = sort_key(path)
        # The versions of one path may begin in the frame before the first that begins with it.
        number = max(0, bisect.bisect_left(self._firsts, key) - 1)
        for frame in range(number, len(self._firsts)):
            versions = self._frame(frame)
            start = bisect.bisect_left(versions, key, key=lambda version: sort_key(version.path))
            yield from itertools.islice(versions, start, None)

    def _frame(self, number: int) -> Sequence[Version]:
        """Give a frame, and keep it, unless it is a single version, which may be large."""
        first, following = self._first_numbers[number], (*self._first_numbers[number + 1 : number + 2], self._count)[0]
        return self._decode_frame(number) if following - first == 1 else self._kept_frame(number)

    # --- frames -----------------------------------------------------------------------------------------------------

    def _decode_frame(self, number: int) -> Sequence[Version]:
        frame = self._tables.frames[number]
        raw = self._checked(frame.offset, frame.size, frame.sha256, f"frame {number}")
        try:
            return msgspec.msgpack.decode(raw, type=list[Version])
        except (msgspec.MsgspecError, ValueError, RecursionError):
            raise self._damaged(f"frame {number} does not parse") from None

    def _decode_numbers(self, layer: int) -> Sequence[int]:
        entries = self._entries_of[layer]
        raw = self._checked(entries.offset, entries.size, entries.sha256, f"the entries of layer {layer}")
        if len(raw) != 4 * entries.count:
            raise self._damaged(f"the entries of layer {layer} have another number")
        return struct.unpack(f"<{entries.count}I", raw)

    def _checked(self, offset: int, size: int, sha256: bytes, what: str) -> bytes:
        stored = self._file.read_at(offset, size) if offset + size <= self._file.size else b""
        if hashlib.sha256(stored).digest() != sha256:
            raise self._damaged(f"{what} has a wrong checksum")
        try:
            return zstandard.ZstdDecompressor().decompress(stored, max_output_size=_MAX_FRAME)
        except (zstandard.ZstdError, MemoryError):
            raise self._damaged(f"{what} does not decompress") from None

    def _damaged(self, why: str) -> CacheDamagedError:
        if self.on_damage is not None:
            self.on_damage()
        return CacheDamagedError(f"the history {self._file.name} is damaged: {why}; {_ADVICE}")
