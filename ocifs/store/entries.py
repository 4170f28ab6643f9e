"""The files of the cache: an entry that is read, an entry that is written, and the right to build one.

Not here: the directory they are in, and which of them go when it is full (`ocifs.store.directory`).
"""

from __future__ import annotations

import contextlib
import enum
import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Self

from ocifs.errors import CacheDamagedError, MachineError

_MEDIUM = frozenset({errno.EIO, errno.EUCLEAN, errno.EBADMSG, errno.ENODATA, errno.ESTALE})
"""What reading a file answers when the bytes are lost; building it again writes them elsewhere."""


class Kind(enum.Enum):
    """The kinds of entry; the value is the directory's name. Order is the order of eviction: cheapest to lose first."""

    REFRAMED = "reframed"
    HISTORY = "histories"
    TREE = "trees"
    LAYER = "layers"
    ARCHIVE = "archives"


@contextlib.contextmanager
def said_plainly(path: Path, doing: str) -> Iterator[None]:
    """Turn an OSError into a sentence that names the cache directory and what helps."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = "free some space, run 'ocifs cache gc', or choose another place with --cache-dir"
        elif error.errno in (errno.EMFILE, errno.ENFILE):
            advice = "every layer needs a few: raise the limit with 'ulimit -n'"
        else:
            advice = "choose another place with --cache-dir or OCIFS_CACHE_DIR"
        message = f"cannot {doing} the cache directory {path}: {error.strerror}; {advice}"
        raise MachineError(message) from error


class StoredFile:
    """An entry, open for reading and locked against eviction until `close`."""

    def __init__(self, fd: int, name: str) -> None:
        """Take over ``fd``. ``name`` is for messages."""
        self.fd = fd
        self.name = name
        self.size = os.fstat(fd).st_size

    def read_at(self, offset: int, size: int) -> bytes:
        """``size`` bytes at ``offset``; fewer only at the file's end. Thread-safe (pread).

        Raises `CacheDamagedError` if the disk has lost them, `MachineError` if they cannot be read for another reason.
        """
        try:
            return os.pread(self.fd, size, offset)
        except OSError as error:
            message = f"the cache entry {self.name} cannot be read at offset {offset}: {error.strerror}"
            kind = CacheDamagedError if error.errno in _MEDIUM else MachineError
            raise kind(message) from None

    def discard(self) -> None:
        """Forget the entry, so that who wants it next builds it again; this file stays readable. Never raises.

        Goes by path, for the store may be closed by now, but removes only a name that stands for this very file: another
        process may have built the entry again already.
        """
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self.fd), os.stat(self.name, follow_symlinks=False)):
                os.unlink(self.name)

    def file_range(self) -> tuple[int, int, int]:
        """(descriptor, offset, size): the whole file, so that it can stand where a source's blob does."""
        return self.fd, 0, self.size

    def close(self) -> None:
        """Close the descriptor and with it the lock. Harmless when repeated."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        """Nothing to do: the file is open already."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close."""
        self.close()


class NewFile:
    """An entry being written: invisible until `publish`, gone if that is never called."""

    def __init__(self, path: Path, kind: Kind, tmp: int, target: int, published: Callable[[], None]) -> None:
        """Create an empty file in the directory ``tmp``, locked so that no other process takes it for a leftover.

        ``path`` is the cache's, for messages; ``target`` the directory of ``kind``. ``published`` is called afterwards.
        """
        self._path = path
        self._tmp = tmp
        self._target = target
        self._notify = published
        self._name = f"{kind.value}.{os.getpid()}.{os.urandom(8).hex()}"
        with said_plainly(path, "write to"):
            fd = os.open(self._name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=tmp)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
            except BaseException:
                os.close(fd)
                os.unlink(self._name, dir_fd=tmp)
                raise
        self.file: BinaryIO = os.fdopen(fd, "w+b")
        self._published = False

    def publish(self, key: str) -> None:
        """Make the file an entry under ``key``, whole and on disk, replacing one that was there."""
        with said_plainly(self._path, "write to"):
            self.file.flush()
            # Without this a power cut could leave the name on an empty file; readers would notice, but work is lost.
            os.fdatasync(self.file.fileno())
            os.rename(self._name, key, src_dir_fd=self._tmp, dst_dir_fd=self._target)
            # The lock has moved with the file: without this, who opens the entry waits for us and all our children.
            fcntl.flock(self.file.fileno(), fcntl.LOCK_UN)
        self._published = True
        self._notify()

    def __enter__(self) -> Self:
        """Nothing to do: the file is open already."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close, and remove what was not published. Harmless when repeated."""
        if self.file.closed:
            return
        if not self._published:
            with contextlib.suppress(OSError):  # what stays is swept later
                os.unlink(self._name, dir_fd=self._tmp)
        with contextlib.suppress(OSError):  # a failing flush was reported by publish, or the work failed anyway
            fcntl.flock(self.file.fileno(), fcntl.LOCK_UN)
            self.file.close()


class BuildLock:
    """The right to build one entry, held until `release`."""

    def __init__(self, directory: int, name: str, fd: int) -> None:
        """Take over ``fd``, locked, whose name in ``directory`` is ``name``."""
        self._directory = directory
        self._name = name
        self._fd = fd

    def release(self) -> None:
        """Let others build. Harmless when repeated."""
        if self._fd >= 0:
            # The name goes first: who opened it before and gets the lock now will see that it guards nothing.
            with contextlib.suppress(OSError):
                os.unlink(self._name, dir_fd=self._directory)
            # Not left to the close: a child that was forked meanwhile has the same open file, and so the lock.
            with contextlib.suppress(OSError):
                fcntl.flock(self._fd, fcntl.LOCK_UN)
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        """Nothing to do: the lock is held already."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Release."""
        self.release()
