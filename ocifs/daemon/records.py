"""Mount records: who is mounted where, and whether their daemons live.

A claim is a file in the runtime directory (``/run/ocifs`` for root, else ``$XDG_RUNTIME_DIR/ocifs``), one per mount point,
locked with flock(2) for as long as its daemon lives. So a lock says who is alive, whatever happened: a record that can be
locked belongs to a dead daemon and is removed by whoever finds it, once its mount is gone. The content (JSON, `Record`) is
what ``ocifs ps`` prints.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from ocifs import kernel
from ocifs.errors import BusyError, MachineError
from ocifs.mountinfo import MountEntry, mount_of, mounted_at

FS_TYPES = {"fuse": "fuse.ocifs", "erofs": "erofs"}
"""File system type in mountinfo by driver: FUSE with subtype ocifs, or the kernel's own."""


class Record(msgspec.Struct, frozen=True):
    """One mount as ``ocifs ps`` shows it. ``started_ns`` counts from the epoch; paths as surrogateescape strings."""

    mountpoint: str
    reference: str
    driver: str
    pid: int
    started_ns: int
    layers: int
    manifest: str
    cache: str
    log: str
    device: int = 0
    """st_dev of the mount, by which it is known wherever it is moved to; 0 until there is one."""
    ready: bool = False
    """Whether the mount has answered."""


RUNTIME_VARIABLE = "OCIFS_RUNTIME_DIR"
"""The environment variable that says where mount records lie: root of a user namespace has no /run of its own."""


def runtime_dir() -> Path:
    """Where mount records lie; made, mode 0700, if need be. Raises `MachineError` if it is not ours alone."""
    if os.environ.get(RUNTIME_VARIABLE, "").startswith("/"):
        path = Path(os.environ[RUNTIME_VARIABLE])
    elif os.geteuid() == 0:
        path = Path("/run/ocifs")
    elif os.environ.get("XDG_RUNTIME_DIR", "").startswith("/"):
        path = Path(os.environ["XDG_RUNTIME_DIR"]) / "ocifs"
    else:
        path = Path(f"/tmp/ocifs-{os.geteuid()}")  # noqa: S108 (checked below: ours, and not writable by others)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.lstat()
    except OSError as error:
        message = (
            f"cannot make the runtime directory {path}: {error.strerror}; set XDG_RUNTIME_DIR to a directory of yours"
        )
        raise MachineError(message) from error
    if status.st_uid != os.geteuid() or status.st_mode & 0o077 or not path.is_dir():
        message = f"the runtime directory {path} is none of yours alone (mode 0700); remove it or set XDG_RUNTIME_DIR"
        raise MachineError(message)
    return path


def real(path: Path) -> Path:
    """The path as mountinfo has it; works on a dead mount point too, which lstat(2) refuses."""
    return Path(os.path.realpath(path))


def _record_path(mountpoint: Path) -> Path:
    return runtime_dir() / (hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:32] + ".json")


def told_plainly(path: Path, error: OSError) -> MachineError:
    """Give an error of the runtime directory as a sentence."""
    return MachineError(f"cannot keep a record in the runtime directory: {path}: {error.strerror}")


def socket_of(log: str | Path) -> Path:
    """Where the daemon that logs to ``log`` is asked for statistics."""
    return Path(log).with_suffix(".socket")


class Claim:
    """The right to mount at one place, held while its descriptor is open (in this process or one forked from it)."""

    def __init__(self, mountpoint: Path) -> None:
        """Claim ``mountpoint``. Raises `BusyError` with the reference of whoever has it."""
        self.path = _record_path(mountpoint)
        self.private = self.path.with_name(f"{self.path.stem}-{os.getpid()}.devices")
        """Where EROFS' device files are served while it is being mounted; made by `private_place`."""
        try:
            self._take(mountpoint)
        except OSError as error:
            raise told_plainly(self.path, error) from error

    def _take(self, mountpoint: Path) -> None:
        with _serialised():
            while True:
                self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
                try:
                    fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    other = _read_record(self._fd)
                    os.close(self._fd)
                    if other is not None and other.ready and not is_of(other, mounted_at(mountpoint)):
                        # It was unmounted lazily and serves who is still in, or its mount is in another namespace.
                        _set_aside(self.path, other.pid)
                        continue
                    what = f"{other.reference} (pid {other.pid})" if other else "another ocifs, which is just starting"
                    message = f"{mountpoint} is taken by {what}; unmount it first: ocifs umount {mountpoint}"
                    raise BusyError(message) from None
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(self._fd), os.stat(self.path)):
                        return
                os.close(self._fd)  # its last holder removed the name while we opened it

    @property
    def log(self) -> Path:
        """Where the daemon logs; beside the record."""
        return self.path.with_suffix(".log")

    @property
    def socket(self) -> Path:
        """Where the daemon is asked for statistics; beside the record."""
        return socket_of(self.log)

    def write(self, record: Record) -> None:
        """Say what is mounted."""
        # Not msgspec's own encoder: a path may hold bytes that are no UTF-8, which only \\u escapes can carry.
        encoded = json.dumps(msgspec.to_builtins(record)).encode()
        try:
            os.pwrite(self._fd, encoded, 0)
            os.ftruncate(self._fd, len(encoded))
        except OSError as error:
            raise told_plainly(self.path, error) from error

    def read(self) -> Record | None:
        """Give what was said last, by whichever process."""
        return _read_record(self._fd)

    def hand_over(self) -> None:
        """Leave the place to a process that was forked from this one."""
        os.close(self._fd)
        self._fd = -1

    def release(self, *, keep_log: bool = False) -> None:
        """Give the place up and remove the record, and the log unless it is to be kept. Harmless if it is not ours."""
        if self._fd < 0:
            return
        with contextlib.suppress(OSError):
            self.private.rmdir()
        with _serialised():
            for path in (self.path, _aside(self.path, os.getpid())):
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(self._fd), os.stat(path)):
                        _forget(path, keep_log=keep_log)
        self.hand_over()  # to nobody


@contextlib.contextmanager
def _serialised() -> Iterator[None]:
    """Let one process at a time decide whose a record is; held for moments only, and while nothing is waited for."""
    fd = os.open(runtime_dir(), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _aside(path: Path, pid: int) -> Path:
    """Where the record of a daemon goes that has lost its place but not its users."""
    return path.with_name(f"{path.stem}-{pid}.aside")


def _set_aside(path: Path, pid: int) -> None:
    """Rename a record with all that lies beside it: the place is free for another; `Claim.release` finds them there."""
    path.rename(_aside(path, pid))
    for suffix in _BESIDE:
        with contextlib.suppress(FileNotFoundError):
            path.with_suffix(suffix).rename(_aside(path, pid).with_suffix(suffix))


def _forget(path: Path, *, keep_log: bool = False) -> None:
    """Remove a record with all that lies beside it."""
    for suffix in (path.suffix, *_BESIDE):
        if not (keep_log and suffix == ".log"):
            path.with_suffix(suffix).unlink(missing_ok=True)


_BESIDE = (".log", ".socket")
"""What a daemon has beside its record: its log, and where it can be asked for statistics."""


def _read_record(fd: int) -> Record | None:
    try:
        return msgspec.convert(json.loads(os.pread(fd, 1 << 20, 0)), Record)
    except (ValueError, RecursionError, msgspec.MsgspecError):
        return None  # claimed, not yet written


def _paths() -> Iterator[Path]:
    """Records of places; what else is JSON in the runtime directory is somebody else's."""
    return runtime_dir().glob("[0-9a-f]" * 32 + ".json")


class State(enum.Enum):
    """How a mount is."""

    LIVE = "live"
    DETACHED = "detached"
    """Its daemon serves who still uses it, but it is nowhere to be seen: unmounted lazily, or in another namespace."""
    DEAD = "dead"
    """Its daemon was killed: it answers errors until the next mount or unmount of its directory removes it."""


class Listed(NamedTuple):
    """A mount and how it is. ``record.mountpoint`` is where it is now."""

    record: Record
    state: State


def records() -> list[Listed]:
    """Every mount of this user, oldest first. Records of dead daemons whose mount is gone are removed on the way."""
    found = []
    with _serialised(), contextlib.ExitStack() as opened:
        paths = (*_paths(), *runtime_dir().glob("*.aside"))
        seen = [(path, *opened.enter_context(_looked_at(path))) for path in paths]
        served = {record.device for _, record, alive in seen if record is not None and alive}
        for path, record, alive in seen:
            there = mount_of(record.device) if record is not None and record.device else None
            if record is None or not is_of(record, there) or (not alive and record.device in served):
                there = None  # the number has been given to another file system since
            if not alive and there is None:
                _forget(path)
            elif record is not None and record.ready:
                # A parent directory may have been renamed.
                now = os.fsdecode(there.mountpoint) if there else record.mountpoint
                state = State.DEAD if not alive else State.LIVE if there else State.DETACHED
                found.append(Listed(msgspec.structs.replace(record, mountpoint=now), state))
        _forget_leftovers()
    return sorted(found, key=lambda one: one.record.started_ns)


_LOGS_KEPT = 7 * 24 * 3600.0
"""Seconds that the log of a mount which failed is kept for whoever asks why: a week."""


def _forget_leftovers() -> None:
    """Remove old logs, and the private places of daemons that are dead."""
    for place in runtime_dir().glob("*.devices"):
        pid = place.stem.rpartition("-")[2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            with contextlib.suppress(OSError):
                if mounted_at(place) is not None:  # killed while it mounted
                    kernel.umount2(os.fsencode(place), kernel.MNT_DETACH)
                place.rmdir()
    for log in runtime_dir().glob("*.log"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - log.stat().st_mtime > _LOGS_KEPT and not log.with_suffix(".json").exists():
                log.unlink()


@contextlib.contextmanager
def _looked_at(path: Path) -> Iterator[tuple[Record | None, bool]]:
    """The record in a file, and whether its daemon lives; locked during the block if it does not."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        yield None, False
        return
    try:
        alive = False
        try:
            # Shared, so that two who look do not take each other for the daemon.
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            alive = True
        yield _read_record(fd), alive
    finally:
        os.close(fd)


def is_of(record: Record, there: MountEntry | None) -> bool:
    """Whether a mount is the one that a record tells of, as far as the mount itself says.

    Numbers of file systems are given again and again. What EROFS is mounted from is named after the record.
    """
    if there is None or there.device != record.device or there.fs_type != FS_TYPES.get(record.driver):
        return False
    return record.driver != "erofs" or there.source.startswith(os.fsencode(Path(record.log).with_suffix("")) + b"-")


@contextlib.contextmanager
def found_at(path: Path) -> Iterator[tuple[MountEntry | None, Record | None, bool]]:
    """What of ocifs is mounted at a path, its record if there is one, and whether its daemon lives.

    Decisions about it hold until the end of the block: nobody claims or gives up a place meanwhile. The record is looked
    for by the mount's st_dev, because the mount may have been moved with a parent directory.
    """
    with _serialised(), contextlib.ExitStack() as opened:
        there = mounted_at(path)
        theirs = [opened.enter_context(_looked_at(one)) for one in _paths()]
        ours = [(record, alive) for record, alive in theirs if record is not None and is_of(record, there)]
        record, alive = max(ours, key=lambda one: one[1], default=(None, False))  # a living one if there is one
        if there is None or (record is None and there.fs_type != FS_TYPES["fuse"]):
            yield None, None, False
        elif alive:
            yield there, record, True
        elif there.fs_type == FS_TYPES["fuse"] and not _is_dead(path):
            yield there, None, True  # another user's: the record is of one that had the number before
        else:
            yield there, record, False


def _is_dead(path: Path) -> bool:
    """Whether nobody serves a FUSE mount any more, as far as this user may ask."""
    try:
        os.statvfs(path)  # not stat(2), which the kernel answers from what it remembers
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False
