"""What a container changed, as a layer: a tar, compressed, with its diff ID and its digest.

The same upper directory above the same image makes the same bytes: the order is that of `merged`, and nothing depends on
the day, the machine or the one who asks. Whiteouts and opaque markers are empty files of nobody, of the epoch.

The names of one file that are in the upper directory are hard links; the first in order has the data.

Holes are told by what is read: each aligned MiB of zeros is one, the rest is written. Where the file system has holes is no
guide, for the same file has fewer of them once it was read: what was allocated and not written counts as data as long as
the page cache has it. A MiB, because linkers leave some hundred KiB of zeros in programs, and ordinary files should be
ordinary members, which every reader takes.

What a layer cannot say is refused, by name: a file that is called as a whiteout is, an attribute with ``=`` in its name,
more attributes than readers take. Left out with a warning: sockets, attributes without a value, and those that are called
as overlayfs's own are, which no reader shows.

Not here: what changed (`merged`), where the layer goes (`layout`).
"""

from __future__ import annotations

import errno
import os
import zlib
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import msgspec
import zstandard

from ocifs import archive, members
from ocifs.changes.merged import Gone, Opaque, Present
from ocifs.changes.upper import Entry, all_zeros, data_runs, signature
from ocifs.errors import UnsupportedError
from ocifs.overlay.upper import XATTRS_MAX
from ocifs.sources.blob import shown
from ocifs.spec import DiffID, Digest, MediaType
from ocifs.tree import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ocifs.changes.merged import Merged

WHITEOUT: Final = b".wh."
OPAQUE_MARKER: Final = b".wh..wh..opq"
"""OCI image specification, layer.md, "Whiteouts"."""

_HOLE: Final = 1 << 20
_MAX_SEGMENTS: Final = 1 << 14
"""Of a file with holes. A map of as many stays below the 1 MiB that Go's archive/tar takes: 2 numbers of up to 20 digits."""
_PIECE: Final = 1 << 20
_ZSTD_FRAME: Final = 1 << 20
"""Frames are what a reader can start at: as large as those that `ocifs.layer_index` makes itself."""


class Packing(NamedTuple):
    """A way to compress a layer."""

    media_type: str
    new: Callable[[], Compressor]


class Compressor(Protocol):
    """Takes a layer's bytes in pieces of any size and gives compressed ones."""

    def compress(self, data: bytes | memoryview, /) -> bytes:
        """Compressed bytes, as far as there are any yet."""

    def flush(self) -> bytes:
        """The rest."""


class _Plain:
    """No compression."""

    def compress(self, data: bytes | memoryview, /) -> bytes:
        return bytes(data)

    def flush(self) -> bytes:
        return b""


class _ZstdFrames:
    """Independent zstd frames, each with its size."""

    def __init__(self) -> None:
        self._encoder = zstandard.ZstdCompressor(level=3)
        self._held = bytearray()

    def compress(self, data: bytes | memoryview, /) -> bytes:
        self._held += data
        full = len(self._held) - len(self._held) % _ZSTD_FRAME
        out = b"".join(
            self._encoder.compress(bytes(self._held[start : start + _ZSTD_FRAME]))
            for start in range(0, full, _ZSTD_FRAME)
        )
        del self._held[:full]
        return out

    def flush(self) -> bytes:
        return self._encoder.compress(bytes(self._held)) if self._held else b""


_GZIP_LEVEL: Final = 6
_GZIP_FORMAT: Final = 16 + zlib.MAX_WBITS
"""zlib's deflateInit2: a gzip wrapper, whose header has no name and no time."""

PACKINGS: Final = {
    "gzip": Packing(MediaType.OCI_LAYER_GZIP, lambda: zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, _GZIP_FORMAT)),
    "zstd": Packing(MediaType.OCI_LAYER_ZSTD, _ZstdFrames),
    "none": Packing(MediaType.OCI_LAYER, _Plain),
}


class Written(NamedTuple):
    """A layer that was written."""

    diff_id: DiffID
    digest: Digest
    size: int
    """Bytes, compressed."""


class LayerSink:
    """Compresses and hashes what is written to it."""

    def __init__(self, out: Callable[[bytes], object], packing: Packing) -> None:
        """Give compressed bytes to ``out``."""
        self._out = out
        self._compressor = packing.new()
        self._plain, self._packed = DiffID("sha256", "").hasher(), Digest("sha256", "").hasher()
        self._size = 0

    def write(self, data: bytes | memoryview) -> None:
        """Take uncompressed bytes."""
        self._plain.update(data)
        self._pass(self._compressor.compress(data))

    def finish(self) -> Written:
        """Write what is held back, and say what was written."""
        self._pass(self._compressor.flush())
        return Written(
            DiffID("sha256", self._plain.hexdigest()), Digest("sha256", self._packed.hexdigest()), self._size
        )

    def _pass(self, packed: bytes) -> None:
        if packed:
            self._packed.update(packed)
            self._size += len(packed)
            self._out(packed)


class LayerWriter:
    """Writes one layer."""

    def __init__(
        self,
        merged: Merged,
        write: Callable[[bytes | memoryview], object],
        *,
        warn: Callable[[bytes, str], object],
        latest: int | None = None,
    ) -> None:
        """``warn`` is told path and reason of what is left out. ``latest``: no mtime is above this many nanoseconds."""
        self._merged = merged
        self._write = write
        self._warn = warn
        self._latest = latest
        self._first_names: dict[tuple[int, int], tuple[bytes, tuple[int, ...]]] = {}
        self._first_brought: dict[int, bytes] = {}

    def write(self) -> None:
        """Write everything, the archive's end included. Errors as `Merged.steps`, and UnsupportedError as said above."""
        for step in self._merged.steps():
            if isinstance(step, Opaque):
                self._marker(os.path.join(step.path, OPAQUE_MARKER))
            elif isinstance(step, Gone):
                if not step.hidden:
                    directory, name = os.path.split(step.path)
                    _refuse_marker(step.path)
                    self._marker(os.path.join(directory, WHITEOUT + name))
            else:
                _refuse_marker(step.path)
                if isinstance(step.source, Entry):
                    self._present(step, step.source)
                else:
                    self._brought(step.path, step.source)
        self._merged.check_unchanged()
        self._write(archive.END)

    def _marker(self, path: bytes) -> None:
        self._write(archive.header(archive.Member(path, Kind.FILE, 0, 0, 0, 0)))

    # -- from the upper directory --------------------------------------------------------------------------------

    def _present(self, step: Present, entry: Entry) -> None:
        for name in entry.left_out:
            self._warn(step.path, f"its attribute {shown(name)} is overlayfs's to every reader")
        if entry.kind is None:
            self._warn(step.path, "a layer cannot hold a socket")
            return
        status = entry.status
        member = archive.Member(
            step.path or b".",
            entry.kind,
            status.st_mode & 0o7777,
            status.st_uid,
            status.st_gid,
            self._clamped(status.st_mtime_ns),
            size=status.st_size if entry.kind is Kind.FILE else 0,
            target=entry.target,
            rdev=entry.rdev if entry.kind in (Kind.CHAR, Kind.BLOCK) else (0, 0),
            xattrs=self._carried(step.path, entry.xattrs),
            hard_link=self._first_name(step, entry),
        )
        if entry.kind is not Kind.FILE or member.hard_link is not None:
            self._write(archive.header(member))
        elif step.data is not None:
            members.write(self._merged.view, step.data, member, self._write)
        else:
            with self._merged.opened(step) as fd:
                self._file(fd, member)

    def _first_name(self, step: Present, entry: Entry) -> bytes | None:
        """The path under which the inode was written already; None if it was not."""
        status = entry.status
        if status.st_nlink == 1 or entry.kind is Kind.DIR:
            return None
        first, seen = self._first_names.setdefault((status.st_dev, status.st_ino), (step.path, signature(status)))
        if seen != signature(status):
            self._merged.fail_changed(step)
        return None if first == step.path else first

    def _carried(self, path: bytes, xattrs: tuple[tuple[bytes, bytes], ...]) -> tuple[tuple[bytes, bytes], ...]:
        for name, value in xattrs:
            if b"=" in name:
                raise UnsupportedError(
                    f"{shown(b'/' + path)} has an attribute with = in its name, {shown(name)}, which no layer can carry: "
                    "remove it (setfattr -x)"
                )
            if not value:
                self._warn(path, f"its attribute {shown(name)} has no value, which a layer cannot say")
        if sum(len(name) + len(value) for name, value in xattrs) > XATTRS_MAX:
            raise UnsupportedError(
                f"{shown(b'/' + path)} has more than {XATTRS_MAX} bytes of attributes, which few file systems hold and "
                "ocifs does not show: remove some (setfattr -x)"
            )
        return tuple((name, value) for name, value in xattrs if value)

    def _clamped(self, mtime_ns: int) -> int:
        return mtime_ns if self._latest is None else min(mtime_ns, self._latest)

    def _file(self, fd: int, member: archive.Member) -> None:
        segments = _segments(fd, member.size)
        self._write(archive.header(member, segments))
        stored = 0
        for start, size in segments or [(0, member.size)]:
            for data in _pieces(fd, start, size):
                self._write(data)
                stored += len(data)
        self._write(archive.padding(stored))

    # -- from the image ------------------------------------------------------------------------------------------

    def _brought(self, path: bytes, ino: int) -> None:
        """Write an inode of the image at a path where the image does not have it."""
        view = self._merged.view
        found = view.inode(ino)
        if found.kind is Kind.FILE:
            view.check_readable(ino)
        first = None
        if found.nlink > 1 and found.kind is not Kind.DIR:
            first = self._first_brought.setdefault(ino, path)
        member = members.member(view, path, ino, None if first == path else first)
        member = msgspec.structs.replace(member, mtime_ns=self._clamped(member.mtime_ns))
        members.write(view, ino, member, self._write)


def _segments(fd: int, size: int) -> list[tuple[int, int]] | None:
    """Where a file has data: all but its holes. None if it has none."""
    kept = _Segments()
    full = size - size % _HOLE  # what is behind is stored whatever it is
    at = 0
    for start, stop in data_runs(fd, 0, full):
        for block in range(max(at, start - start % _HOLE), stop, _HOLE):
            if not all_zeros(fd, block, block + _HOLE):
                kept.add(block, block + _HOLE)
            at = block + _HOLE
    if full < size:
        kept.add(full, size)
    runs = [(start, min(stop, size) - start) for start, stop in kept.found]
    return None if not size or runs == [(0, size)] else archive.whole_blocks(runs, size)


class _Segments:
    """The (start, stop) of segments; if they become too many, holes are closed, each twice as large as those before."""

    def __init__(self) -> None:
        self.found: list[tuple[int, int]] = []
        self._grain = _HOLE

    def add(self, start: int, stop: int) -> None:
        """Add what is behind all others, or touches them."""
        self._join(start, stop)
        while len(self.found) > _MAX_SEGMENTS:
            self._grain *= 2
            before, self.found = self.found, []
            for one in before:
                self._join(*one)

    def _join(self, start: int, stop: int) -> None:
        start -= start % self._grain
        stop += -stop % self._grain
        if self.found and start <= self.found[-1][1]:
            start = self.found.pop()[0]
        self.found.append((start, stop))


def _pieces(fd: int, start: int, size: int) -> Iterator[bytes]:
    end = start + size
    while start < end:
        data = os.pread(fd, min(_PIECE, end - start), start)
        if not data:
            raise OSError(errno.ESTALE, "it became shorter")
        yield data
        start += len(data)


def _refuse_marker(path: bytes) -> None:
    if os.path.basename(path).startswith(WHITEOUT):
        raise UnsupportedError(
            f"{shown(b'/' + path)} is called as the markers of layers are (.wh.), so no layer can carry it: "
            "rename or remove it"
        )
