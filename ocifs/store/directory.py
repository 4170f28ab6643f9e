"""The cache directory: opened, locked, swept, bounded.

Not here: the files in it one by one (`ocifs.store.entries`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Self, TypeVar

from ocifs.errors import DamagedError, MachineError, OcifsError, StaleFormatError, UsageError
from ocifs.store.entries import BuildLock, Kind, NewFile, StoredFile, said_plainly

_log = logging.getLogger(__name__)

Loaded = TypeVar("Loaded")

DEFAULT_LIMIT = 20 << 30
"""Bytes that `Store.gc` leaves by default: 20 GiB. An index takes about 1 % of its blob, a re-framed copy about 110 %."""

_SIZE = re.compile(r"([0-9]{1,15})([KMGT]?)(?:i?B)?", re.IGNORECASE | re.ASCII)


class Listed(NamedTuple):
    """One entry as `Store.entries` reports it: ``size`` in bytes on disk, ``used`` the time of last use (seconds)."""

    kind: Kind
    key: str
    size: int
    used: float
    in_use: bool


class Freed(NamedTuple):
    """What `Store.gc` or `Store.clear` did: entries and bytes removed, and entries left because they are in use."""

    entries: int
    size: int
    kept_in_use: int


def default_path() -> Path:
    """Where the cache lies if nobody says otherwise: ``/var/cache/ocifs`` for root, XDG's cache directory for others."""
    if os.geteuid() == 0:
        return Path("/var/cache/ocifs")
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG Base Directory specification: a relative path is invalid and ignored.
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "ocifs"


def size_limit() -> int:
    """Bytes the cache may grow to: ``OCIFS_CACHE_SIZE`` (``500M``, ``20GiB``, ``0``), else `DEFAULT_LIMIT`.

    Raises `UsageError` if the variable is set to something else.
    """
    text = os.environ.get("OCIFS_CACHE_SIZE", "").strip()
    if not text:
        return DEFAULT_LIMIT
    match = _SIZE.fullmatch(text)
    if match is None:
        message = f"OCIFS_CACHE_SIZE is {text!r}, which is not a size such as 500M or 20GiB"
        raise UsageError(message)
    return int(match[1]) << 10 * " KMGT".index(match[2].upper() or " ")


class Store:
    """The cache directory, open. Safe to use from several processes at once."""

    def __init__(self, path: Path | None = None) -> None:
        """Open the cache at ``path`` (default: `default_path`), making it if need be.

        Raises `MachineError` if it cannot be made, is not a directory, belongs to somebody else or is writable by
        somebody else.
        """
        self.path = (path or default_path()).absolute()
        self._grew = False
        with said_plainly(self.path, "create"):
            self._refuse_foreign_link(self.path)
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with said_plainly(self.path, "open"):
            self._root = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._dirs: dict[str, int] = {}
        try:
            self._refuse_foreign(self._root, self.path)
            for name in (*(kind.value for kind in Kind), "locks", "tmp"):
                self._dirs[name] = self._open_dir(name)
            self._sweep()
        except BaseException:
            self.close()
            raise

    def _open_dir(self, name: str) -> int:
        with said_plainly(self.path, "write to"), contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=self._root)
        with said_plainly(self.path, "open"):
            fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._root)
        try:
            self._refuse_foreign(fd, self.path / name)
        except BaseException:
            os.close(fd)
            raise
        return fd

    @staticmethod
    def _refuse_foreign_link(path: Path) -> None:
        """Refuse a symbolic link that somebody else made: he could lead us from one cache of ours to another."""
        try:
            status = path.lstat()
        except FileNotFoundError:
            return
        if stat.S_ISLNK(status.st_mode) and status.st_uid != os.geteuid():
            what = f"a symbolic link that belongs to user {status.st_uid}, not to you"
            message = f"the cache directory {path} is {what}; choose another with --cache-dir"
            raise MachineError(message)

    @staticmethod
    def _refuse_foreign(fd: int, path: Path) -> None:
        status = os.fstat(fd)
        if status.st_uid != os.geteuid():
            owner = f"user {status.st_uid}, not to you"
            message = f"the cache directory {path} belongs to {owner}; choose another with --cache-dir"
            raise MachineError(message)
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            advice = f"run 'chmod go-w {path}' if you trust what is in it"
            message = f"the cache directory {path} can be written by others; {advice}"
            raise MachineError(message)

    def _sweep(self) -> None:
        """Remove what killed processes left in ``tmp`` and ``locks``: files that nobody has locked."""
        for directory in (self._dirs["tmp"], self._dirs["locks"]):
            for name in os.listdir(directory):
                with contextlib.suppress(OSError):  # gone, or locked: somebody is at work
                    self._sweep_one(directory, name)

    def _sweep_one(self, directory: int, name: str) -> None:
        # For writing, because NFS gives an exclusive lock to nobody else.
        fd = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
        try:
            # Who writes locks right after creating; in between the file looks abandoned. Age tells them apart.
            if time.time() - os.fstat(fd).st_mtime > 1:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._names(directory, name, fd):
                    os.unlink(name, dir_fd=directory)
        finally:
            os.close(fd)

    def open_entry(self, kind: Kind, key: str) -> StoredFile | None:
        """The entry, locked against eviction; None if there is none. Marks it as used now."""
        with said_plainly(self.path, "read"):
            try:
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                fd = os.open(key, flags, dir_fd=self._dirs[kind.value])
            except FileNotFoundError:
                return None
            try:
                fcntl.flock(fd, fcntl.LOCK_SH)
                with contextlib.suppress(OSError):  # a cache on a disk that became read-only still serves
                    os.utime(fd)
                return StoredFile(fd, str(self.path / kind.value / key))
            except BaseException:
                os.close(fd)
                raise

    @contextlib.contextmanager
    def lock(self, kind: Kind, key: str, *, waiting: Callable[[], None] | None = None) -> Iterator[None]:
        """Hold the right to build the entry; waits while another process has it, after calling ``waiting`` once."""
        lock = self.try_lock(kind, key)
        if lock is None:
            if waiting is not None:
                waiting()
            lock = self._take_lock(kind, key, wait=True)
        with lock:
            yield

    def try_lock(self, kind: Kind, key: str) -> BuildLock | None:
        """The right to build the entry if nobody has it now; the caller releases it."""
        try:
            return self._take_lock(kind, key, wait=False)
        except BlockingIOError:
            return None

    def _take_lock(self, kind: Kind, key: str, *, wait: bool) -> BuildLock:
        name, directory = f"{kind.value}.{key}", self._dirs["locks"]
        while True:
            with said_plainly(self.path, "write to"):
                fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=directory)
            try:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise
                except OSError as error:
                    message = f"cannot lock {name} in the cache directory {self.path}: {error.strerror}"
                    raise MachineError(message) from error
                if self._names(directory, name, fd):
                    return BuildLock(directory, name, fd)
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    @staticmethod
    def _names(directory: int, name: str, fd: int) -> bool:
        """Whether ``name`` still means the file open as ``fd``; if its last holder removed it, a lock guards nothing."""
        try:
            return os.path.samestat(os.fstat(fd), os.stat(name, dir_fd=directory, follow_symlinks=False))
        except FileNotFoundError:
            return False

    def new(self, kind: Kind) -> NewFile:
        """A file to write an entry into; see `NewFile`."""
        return NewFile(self.path, kind, self._dirs["tmp"], self._dirs[kind.value], self._note_growth)

    def discard(self, kind: Kind, key: str) -> None:
        """Forget an entry that turned out stale or damaged. Whoever has it open keeps it."""
        with said_plainly(self.path, "write to"), contextlib.suppress(FileNotFoundError):
            os.unlink(key, dir_fd=self._dirs[kind.value])

    def get_or_build(
        self,
        kind: Kind,
        key: str,
        *,
        load: Callable[[StoredFile], Loaded],
        build: Callable[[], None],
        waiting: Callable[[], None] | None = None,
    ) -> Loaded:
        """The entry as ``load`` understands it, built by ``build`` first if it is missing, stale or damaged.

        ``load`` keeps the file it is given open for as long as it needs it; when it raises, the file is closed here.
        ``build`` publishes the entry itself. One process builds while others wait (see `lock` for ``waiting``).
        """
        loaded = self._try_load(kind, key, load)
        if loaded is not None:
            return loaded
        with self.lock(kind, key, waiting=waiting):
            loaded = self._try_load(kind, key, load)  # somebody may have built it while we waited
            if loaded is not None:
                return loaded
            build()
            file = self.open_entry(kind, key)
            if file is None:  # evicted between the two lines above: 'ocifs cache clear' was quick
                message = f"the cache entry {self.path / kind.value / key} vanished while it was being made; try again"
                raise MachineError(message)
            try:
                return load(file)
            except BaseException:
                file.close()
                raise

    def _try_load(self, kind: Kind, key: str, load: Callable[[StoredFile], Loaded]) -> Loaded | None:
        file = self.open_entry(kind, key)
        if file is None:
            return None
        try:
            return load(file)
        except (StaleFormatError, DamagedError) as error:
            _log.info("rebuilding a cache entry: %s", error)
            file.discard()
            file.close()
            return None
        except BaseException:
            file.close()
            raise

    def entries(self) -> Iterator[Listed]:
        """Every entry there is, in the order of eviction (kind, then least recently used)."""
        for kind in Kind:
            directory = self._dirs[kind.value]
            found = []
            with said_plainly(self.path, "list"):
                for name in os.listdir(directory):
                    with contextlib.suppress(FileNotFoundError):  # evicted by another process meanwhile
                        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
                        if stat.S_ISDIR(status.st_mode):
                            continue  # not ours, and nothing that could be in the way of an entry's name
                        in_use = not self._try_exclusive(kind, name, lambda: None)
                        found.append(Listed(kind, name, status.st_blocks * 512, status.st_mtime, in_use))
            yield from sorted(found, key=lambda one: one.used)

    def _try_exclusive(self, kind: Kind, key: str, act: Callable[[], None]) -> bool:
        """Run ``act`` while nobody has the entry open; False if somebody has."""
        directory = self._dirs[kind.value]
        if not stat.S_ISREG(os.stat(key, dir_fd=directory, follow_symlinks=False).st_mode):
            act()  # a symbolic link or the like: it is opened by nobody
            return True
        flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            fd = os.open(key, os.O_RDWR | flags, dir_fd=directory)  # NFS locks exclusively only what can be written
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
            fd = os.open(key, os.O_RDONLY | flags, dir_fd=directory)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            act()
        except BlockingIOError:
            return False
        finally:
            os.close(fd)
        return True

    def gc(self, limit: int = DEFAULT_LIMIT) -> Freed:
        """Evict entries, re-framed copies first and least recently used first, until ``limit`` bytes are left."""
        listed = list(self.entries())
        total, entries, size, kept = sum(one.size for one in listed), 0, 0, 0
        for one in listed:
            if total - size <= limit:
                break
            if self._evict(one):
                entries, size = entries + 1, size + one.size
            else:
                kept += 1
        return Freed(entries, size, kept)

    def clear(self) -> Freed:
        """Evict everything that is not in use."""
        return self.gc(limit=-1)

    def _evict(self, one: Listed) -> bool:
        directory = self._dirs[one.kind.value]
        with said_plainly(self.path, "remove anything from"):
            try:
                return self._try_exclusive(one.kind, one.key, lambda: os.unlink(one.key, dir_fd=directory))
            except FileNotFoundError:
                return True

    def _note_growth(self) -> None:
        """Note that an entry was added, so that `keep_bounded` looks at the total."""
        self._grew = True

    def keep_bounded(self) -> None:
        """Evict what exceeds `size_limit`, if anything was added since this was last called. Logs what goes wrong."""
        if not self._grew:
            return
        self._grew = False
        try:
            limit = size_limit()
            if self._total() > limit:
                freed = self.gc(limit)
                _log.info("removed %d cache entries, %d bytes", freed.entries, freed.size)
        except OcifsError as error:
            _log.warning("the cache was not made smaller: %s", error)

    def _total(self) -> int:
        """Bytes on disk of all entries, without asking which are in use."""
        total = 0
        with said_plainly(self.path, "list"):
            for kind in Kind:
                directory = self._dirs[kind.value]
                for name in os.listdir(directory):
                    with contextlib.suppress(FileNotFoundError):
                        total += os.stat(name, dir_fd=directory, follow_symlinks=False).st_blocks * 512
        return total

    def close(self) -> None:
        """Close the directories, after `keep_bounded`. Open entries stay open. Harmless when repeated."""
        if self._root < 0:
            return
        self.keep_bounded()
        for fd in (*self._dirs.values(), self._root):
            os.close(fd)
        self._dirs.clear()
        self._root = -1

    def __enter__(self) -> Self:
        """Nothing to do: the store is open already."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close."""
        self.close()
