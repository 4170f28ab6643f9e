"""Stored bytes with random access: a regular file, a piece of another blob, bytes in memory.

A file is opened only once it is known to be a regular one: a FIFO would hang, a device might act, a directory has no
bytes. Symbolic links are followed, for build systems and content stores lay out blobs as links; whether the bytes are
the right ones is decided by their digest, not by where they lie.

Not here: where blobs are (the sources), what is in them.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import threading
from typing import TYPE_CHECKING, Final

from ocifs.errors import DamagedError, MachineError, NotFoundError, OcifsError
from ocifs.sources.base import Blob, FileRange

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PIECE_SIZE: Final = 1 << 20
"""Bytes that `stored_pieces` reads at a time."""

_OPEN_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_MISSING = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL})
_DENIED = frozenset({errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM})


def os_problem(error: OSError, what: str) -> OcifsError:
    """Turn a failed system call on ``what`` into the error for a person."""
    reason = os.strerror(error.errno) if error.errno is not None else str(error)
    sentence = f"{what}: {reason}"
    if error.errno in _MISSING:
        return NotFoundError(sentence)
    if error.errno in _DENIED:
        return MachineError(sentence)
    return DamagedError(sentence)


def shown(path: bytes) -> str:
    """Give a path for a message: readable, on one line, every byte recognisable."""
    text = os.fsdecode(path)
    return text if text.isprintable() else ascii(text)[1:-1]


_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


def stat_regular(path: bytes) -> os.stat_result:
    """Stat ``path`` without opening it; NotFoundError if nothing is there, DamagedError if it is no regular file."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise os_problem(error if isinstance(error, OSError) else OSError(errno.ENOENT, ""), shown(path)) from None
    _check_regular(status, path)
    return status


def _check_regular(status: os.stat_result, path: bytes) -> None:
    kind = stat.S_IFMT(status.st_mode)
    if kind != stat.S_IFREG:
        raise DamagedError(f"{shown(path)} is {_KINDS.get(kind, 'no regular file')}, where a regular file belongs")


class FileBlob:
    """The bytes of one regular file. The size is the one at opening; a file that shrinks later reads short."""

    def __init__(self, path: bytes) -> None:
        """Open ``path``; errors as `stat_regular`."""
        stat_regular(path)
        try:
            self._fd = os.open(path, _OPEN_FLAGS)
        except OSError as error:
            raise os_problem(error, shown(path)) from None
        try:
            status = os.fstat(self._fd)
            _check_regular(status, path)  # it may have been replaced since
        except BaseException:
            os.close(self._fd)
            raise
        self.name = shown(path)
        self.size = status.st_size

    def read_at(self, offset: int, size: int, /) -> bytes:
        """See `Blob.read_at`."""
        if offset < 0 or size < 0:
            raise DamagedError(f"{self.name}: {size} bytes at offset {offset} were asked for, which cannot be")
        size = min(size, self.size - offset)
        if size <= 0:
            return b""
        if self._fd < 0:
            raise DamagedError(f"{self.name}: read after it was closed")
        try:
            data = os.pread(self._fd, size, offset)
            if len(data) == size:
                return data
            pieces = [data]  # Linux reads at most 2 GiB - 4 KiB at once
            got = len(data)
            while data and got < size:
                data = os.pread(self._fd, size - got, offset + got)
                pieces.append(data)
                got += len(data)
        except OSError as error:
            raise os_problem(error, f"{self.name}: reading {size} bytes at offset {offset}") from None
        return b"".join(pieces)

    def file_range(self) -> FileRange | None:
        """See `Blob.file_range`."""
        return FileRange(self._fd, 0, self.size)

    def identity(self) -> str | None:
        """See `Blob.identity`: device, inode, size, mtime and ctime."""
        try:
            status = os.fstat(self._fd)
        except OSError:
            return None
        times = f"{status.st_mtime_ns} {status.st_ctime_ns}"
        return f"file {status.st_dev} {status.st_ino} {status.st_size} {times}"

    def close(self) -> None:
        """See `Blob.close`."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class BytesBlob:
    """Bytes in memory, such as those embedded in a descriptor."""

    def __init__(self, name: str, data: bytes) -> None:
        """Give ``data`` under ``name``."""
        self.name = name
        self.size = len(data)
        self._data = data

    def read_at(self, offset: int, size: int, /) -> bytes:
        """See `Blob.read_at`."""
        if offset < 0 or size < 0:
            raise DamagedError(f"{self.name}: {size} bytes at offset {offset} were asked for, which cannot be")
        return self._data[offset : offset + size]

    def file_range(self) -> FileRange | None:
        """Answer None: there is no file."""
        return None

    def identity(self) -> str | None:
        """See `Blob.identity`: the SHA-256 of the bytes."""
        return f"bytes {hashlib.sha256(self._data).hexdigest()}"

    def close(self) -> None:
        """Do nothing."""


class SharedBlob:
    """A blob with several users: closed when the last one lets go."""

    def __init__(self, blob: Blob) -> None:
        """Take over ``blob``; the caller is its first user."""
        self.blob = blob
        self._users = 1
        self._lock = threading.Lock()

    def acquire(self) -> None:
        """Count one user more."""
        with self._lock:
            if self._users == 0:
                raise DamagedError(f"{self.blob.name}: used after it was closed")
            self._users += 1

    def release(self) -> None:
        """Count one user less; the last one closes the blob."""
        with self._lock:
            self._users -= 1
            last = self._users == 0
        if last:
            self.blob.close()


class MemberBlob:
    """A piece of another blob: a member of an archive. The outer blob stays open until the last member is closed."""

    def __init__(self, outer: SharedBlob, name: str, offset: int, size: int) -> None:
        """Give ``size`` bytes at ``offset`` of ``outer`` under ``name``; DamagedError if they are not all there."""
        if offset < 0 or size < 0 or offset + size > outer.blob.size:
            raise DamagedError(
                f"{name}: the archive ends at offset {outer.blob.size}, {size} bytes at offset {offset} are not in it"
            )
        outer.acquire()
        self.name = name
        self.size = size
        self._outer = outer
        self._offset = offset
        self._release: Callable[[], None] | None = outer.release

    def read_at(self, offset: int, size: int, /) -> bytes:
        """See `Blob.read_at`."""
        if offset < 0 or size < 0:
            raise DamagedError(f"{self.name}: {size} bytes at offset {offset} were asked for, which cannot be")
        if self._release is None:
            raise DamagedError(f"{self.name}: read after it was closed")
        size = min(size, self.size - offset)
        return self._outer.blob.read_at(self._offset + offset, size) if size > 0 else b""

    def file_range(self) -> FileRange | None:
        """See `Blob.file_range`."""
        outer = self._outer.blob.file_range()
        return None if outer is None else FileRange(outer.fd, outer.offset + self._offset, self.size)

    def identity(self) -> str | None:
        """See `Blob.identity`: that of the outer blob, and where in it these bytes are."""
        outer = self._outer.blob.identity()
        return None if outer is None else f"{outer}, {self.size} bytes at {self._offset}"

    def close(self) -> None:
        """See `Blob.close`."""
        release, self._release = self._release, None
        if release is not None:
            release()


def stored_pieces(blob: Blob) -> Iterator[bytes]:
    """All bytes of a blob, from front to back; `DamagedError` if there are fewer than its size says."""
    offset = 0
    while offset < blob.size:
        data = blob.read_at(offset, min(PIECE_SIZE, blob.size - offset))
        if not data:
            raise DamagedError(f"{blob.name} ends at {offset}, {blob.size - offset} bytes too early")
        yield data
        offset += len(data)
