"""The life of a mount: claim the place, mount, tell who waits when it answers, end cleanly however it ends.

A mount is one process. The command opens the image (which may index layers for a while, with a progress bar), claims the
mount point, forks, and waits for one line from the child: ``ready`` once the mount has answered a stat(2), or the sentence
that says why not. In the foreground there is no fork and no wait.

Mount records
    A claim is a file in the runtime directory (``/run/ocifs`` for root, else ``$XDG_RUNTIME_DIR/ocifs``), one per mount
    point, locked with flock(2) for as long as its daemon lives. So a lock says who is alive, whatever happened: a record
    that can be locked belongs to a dead daemon and is removed by whoever finds it. The content (JSON, `Record`) is what
    ``ocifs ps`` prints.

How a mount ends
    SIGTERM, SIGINT or an unmount by anyone: the session loop returns, the mount is taken down if it is still there, the
    record goes, exit status 0. After kill -9 the kernel answers ENOTCONN on the mount point; the next ``ocifs mount`` or
    ``ocifs umount`` of that directory removes the dead mount.

    Under the ``erofs`` driver the mount itself outlives a killed daemon and answers ENOTCONN for what the kernel has not
    cached; those two commands find it by the record that nobody has locked.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import select
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn, TextIO

import msgspec

from ocifs import kernel
from ocifs.errors import BusyError, MachineError, NotFoundError, OcifsError, UsageError
from ocifs.mountinfo import MountEntry, mount_of, mounted_at, mounts

_log = logging.getLogger(__name__)

FS_TYPES = {"fuse": "fuse.ocifs", "erofs": "erofs"}
"""File system type in mountinfo by driver: FUSE with subtype ocifs, or the kernel's own."""

GOODBYE = 10.0
"""Seconds `unmount` waits by default for a daemon to be gone before it says what may hold it."""


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
    """st_dev of the mount, by which it is known wherever it is moved to; 0 until the mount answers."""


# -- where things are ----------------------------------------------------------------------------------------------


def runtime_dir() -> Path:
    """Where mount records lie; made, mode 0700, if need be. Raises `MachineError` if it is not ours alone."""
    if os.geteuid() == 0:
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
    if status.st_uid != os.geteuid() or status.st_mode & 0o022 or not path.is_dir():
        message = f"the runtime directory {path} is not yours alone, or no directory; remove it or set XDG_RUNTIME_DIR"
        raise MachineError(message)
    return path


def _real(path: Path) -> Path:
    """The path as mountinfo has it; works on a dead mount point too, which lstat(2) refuses."""
    return Path(os.path.realpath(path))


def _record_path(mountpoint: Path) -> Path:
    return runtime_dir() / (hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:32] + ".json")


# -- claims and records --------------------------------------------------------------------------------------------


def _told_plainly(path: Path, error: OSError) -> MachineError:
    return MachineError(f"cannot keep a record in the runtime directory: {path}: {error.strerror}")


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
            raise _told_plainly(self.path, error) from error

    def _take(self, mountpoint: Path) -> None:
        with _serialised():
            while True:
                self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
                try:
                    fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    other = _read_record(self._fd)
                    os.close(self._fd)
                    if other is not None and other.device and not _is_of(other, mounted_at(mountpoint)):
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

    def write(self, record: Record) -> None:
        """Say what is mounted."""
        # Not msgspec's own encoder: a path may hold bytes that are no UTF-8, which only \\u escapes can carry.
        encoded = json.dumps(msgspec.to_builtins(record)).encode()
        try:
            os.pwrite(self._fd, encoded, 0)
            os.ftruncate(self._fd, len(encoded))
        except OSError as error:
            raise _told_plainly(self.path, error) from error

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
                        path.unlink()
                        if not keep_log:
                            path.with_suffix(".log").unlink(missing_ok=True)
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
    """Rename record and log: the place is free for another; the daemon finds them when it ends (`Claim.release`)."""
    path.rename(_aside(path, pid))
    with contextlib.suppress(FileNotFoundError):
        path.with_suffix(".log").rename(_aside(path, pid).with_suffix(".log"))


def _read_record(fd: int) -> Record | None:
    try:
        return msgspec.convert(json.loads(os.pread(fd, 1 << 20, 0)), Record)
    except (ValueError, RecursionError, msgspec.MsgspecError):
        return None  # claimed, not yet written


def records() -> Iterator[Record]:
    """Every live mount of this user, oldest first. Records of dead daemons whose mount is gone are removed on the way."""
    found = []
    with _serialised():
        for path in (*runtime_dir().glob("*.json"), *runtime_dir().glob("*.aside")):
            with _looked_at(path) as (record, alive):
                there = mount_of(record.device) if record is not None and record.device else None
                if alive:
                    if record is not None and record.device and path.suffix == ".json":
                        # Where it is now: a parent directory may have been renamed.
                        now = os.fsdecode(there.mountpoint) if there else record.mountpoint
                        found.append(msgspec.structs.replace(record, mountpoint=now))
                elif record is None or there is None:
                    path.unlink(missing_ok=True)
                    path.with_suffix(".log").unlink(missing_ok=True)
        _forget_leftovers()
    yield from sorted(found, key=lambda record: record.started_ns)


_LOGS_KEPT = 7 * 24 * 3600.0
"""Seconds that the log of a mount which failed is kept for whoever asks why: a week."""


def _forget_leftovers() -> None:
    """Remove old logs, and the private places of daemons that are dead."""
    for place in runtime_dir().glob("*.devices"):
        pid = place.stem.rpartition("-")[2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            with contextlib.suppress(OSError):  # still mounted: the next mount at its place sees to it
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


def _is_of(record: Record, there: MountEntry | None) -> bool:
    """Whether a mount is the one that a record tells of."""
    return there is not None and there.device == record.device and there.fs_type == FS_TYPES.get(record.driver)


@contextlib.contextmanager
def _found_at(path: Path) -> Iterator[tuple[MountEntry | None, Record | None, bool]]:
    """What of ocifs is mounted at a path, its record if there is one, and whether its daemon lives.

    Decisions about it hold until the end of the block: nobody claims or gives up a place meanwhile. The record is looked
    for by the mount's st_dev, because the mount may have been moved with a parent directory.
    """
    with _serialised(), contextlib.ExitStack() as opened:
        there = mounted_at(path)
        for one in sorted(runtime_dir().glob("*.json"), key=lambda name: name != _record_path(path)):
            record, alive = opened.enter_context(_looked_at(one))
            if record is not None and _is_of(record, there):
                yield there, record, alive
                return
        if there is not None and there.fs_type == FS_TYPES["fuse"]:
            yield there, None, not _is_dead(path)
        else:
            yield None, None, False


# -- before mounting -----------------------------------------------------------------------------------------------


def check_machine() -> None:
    """Raise `MachineError` if FUSE cannot work here, saying what to do about it."""
    try:
        import pyfuse3  # noqa: F401, PLC0415 (asks whether it is there; everything but mounting works without)
    except ImportError as error:
        message = (
            f"pyfuse3 cannot be loaded ({error}); install the packages fuse3, libfuse3-dev, pkg-config and gcc, "
            "then: pip install 'ocifs-mount[fuse]'"
        )
        raise MachineError(message) from error
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        message = (
            "there is no /dev/fuse; load the module with 'modprobe fuse', or start the container with "
            "'--device /dev/fuse --cap-add SYS_ADMIN'"
        )
        raise MachineError(message) from None
    except OSError as error:
        message = f"/dev/fuse cannot be opened ({error.strerror}); become root or ask for permission on it"
        raise MachineError(message) from error
    if os.geteuid() != 0 and not any(os.access(Path(d) / "fusermount3", os.X_OK) for d in os.get_exec_path()):
        message = "fusermount3 is not installed, and without it only root can mount; install the package fuse3"
        raise MachineError(message)


def prepare_mountpoint(mountpoint: Path, *, nonempty: bool = False) -> Path:
    """The real path of a directory that can be mounted on, a dead mount of ours removed from it.

    Raises `NotFoundError`, `UsageError` or `BusyError`, each naming the directory and what to do.
    """
    path = _real(mountpoint)
    with _found_at(path) as (there, record, alive):
        if there is not None:
            if alive:
                what = record.reference if record else os.fsdecode(there.source)
                message = f"{path} has {what} mounted on it already; unmount it first: ocifs umount {path}"
                raise BusyError(message)
            _log.warning("removing the dead mount that a killed daemon left at %s", path)
            _unmounted(path, lazy=True)
    try:
        names = os.listdir(path)
    except FileNotFoundError:
        message = f"there is no directory {mountpoint}; make it first: mkdir -p {mountpoint}"
        raise NotFoundError(message) from None
    except NotADirectoryError:
        message = f"{mountpoint} is not a directory; an image can be mounted only on one"
        raise UsageError(message) from None
    except OSError as error:
        message = f"cannot look into {mountpoint}: {error.strerror}"
        raise MachineError(message) from error
    if names and not nonempty:
        message = (
            f"{mountpoint} is not empty ({len(names)} names), and a mount would hide what is in it; "
            "take another directory, or say -o nonempty"
        )
        raise BusyError(message)
    return path


def _is_dead(path: Path) -> bool:
    try:
        os.stat(path)
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def _detach(path: Path, *, lazy: bool) -> None:
    """Unmount ``path``: umount2(2) for root, fusermount3 for others. Raises OSError (EBUSY among others)."""
    if os.geteuid() == 0:
        kernel.umount2(os.fsencode(path), kernel.MNT_DETACH if lazy else 0)
        return
    command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 (no shell, our own words)
    if done.returncode:
        number = errno.EBUSY if "busy" in done.stderr else errno.EPERM
        raise OSError(number, done.stderr.strip() or "fusermount3 failed", str(path))


def _unmounted(path: Path, *, lazy: bool) -> None:
    """Unmount ``path``, or say in a sentence why not."""
    try:
        _detach(path, lazy=lazy)
    except FileNotFoundError as error:
        message = f"cannot unmount {path}: {error.filename or 'fusermount3'} is not there; install the package fuse3"
        raise MachineError(message) from error
    except OSError as error:
        if error.errno == errno.EBUSY:
            message = f"{path} is in use by {users_of(path)}; end them, or say --lazy"
            raise BusyError(message) from None
        message = f"cannot unmount {path}: {error.strerror}"
        raise MachineError(message) from error


# -- serving -------------------------------------------------------------------------------------------------------


Serve = Callable[[Callable[[int], None]], None]
"""What a driver does: serve until the mount ends, calling its argument with the st_dev once the mount answers."""


def private_place(claim: Claim) -> Path:
    """An empty directory beside the record, for the files that EROFS is mounted from; gone when the claim is released."""
    try:
        claim.private.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise _told_plainly(claim.private, error) from error
    if mounted_at(claim.private) is not None:  # left by a daemon of the same pid, killed at just that moment
        _unmounted(claim.private, lazy=True)
    return claim.private


def run_foreground(serve: Serve, record: Record, claim: Claim) -> Record:
    """Serve in this process until the mount ends; give its record as it was then."""
    try:
        record = msgspec.structs.replace(record, pid=os.getpid())
        claim.write(record)

        def ready(device: int) -> None:
            nonlocal record
            record = msgspec.structs.replace(record, device=device)
            claim.write(record)
            _log.info("%s is mounted on %s", record.reference, record.mountpoint)

        serve(ready)
        return record
    finally:
        claim.release()


def run_background(serve: Serve, record: Record, claim: Claim) -> Record:
    """Start a daemon that serves; give its record when the mount answers, or raise what the daemon says went wrong.

    From then on the claim is the daemon's.
    """
    try:
        told, tell = os.pipe()
        # Forked twice: whoever called us may live on, and must not have to wait for a child that it knows nothing of.
        child = os.fork()
    except OSError as error:
        message = f"cannot start a daemon for {record.mountpoint}: {error.strerror}"
        raise MachineError(message) from error
    if child == 0:
        os.close(told)  # or nobody would see that the reader is gone
        _fork_daemon(serve, record, claim, tell)
    os.close(tell)
    try:
        with os.fdopen(told, "rb") as pipe:
            os.waitpid(child, 0)
            # Without readiness the pipe ends with the daemon, so that nothing of it is left when we say so.
            answer = pipe.readline()
            if answer == b"ready\n":
                return claim.read() or record
            pipe.read()
        if answer:
            raise MachineError(answer.decode(errors="surrogateescape").rstrip("\n"))
        message = f"the daemon for {record.mountpoint} died before the mount answered"
        raise MachineError(message)
    finally:
        claim.hand_over()


def _fork_daemon(serve: Serve, record: Record, claim: Claim, tell: int) -> NoReturn:
    """Be the process between the command and the daemon, for a moment."""
    status = 0
    try:
        if os.fork() == 0:
            _daemon(serve, record, claim, tell)
    except OSError as error:
        status = MachineError.exit_code
        os.write(
            tell, f"cannot start a daemon for {record.mountpoint}: {error.strerror}\n".encode(errors="surrogateescape")
        )
    finally:
        os._exit(status)


def _daemon(serve: Serve, record: Record, claim: Claim, tell: int) -> NoReturn:
    """Be the daemon; never returns. What goes wrong before readiness is told through the pipe, later into the log."""
    status = 0
    try:
        os.setsid()
        os.chdir("/")
        _close_inherited(keep=(tell,))
        log_to_background(claim.log)
        null = os.open(os.devnull, os.O_RDWR)
        record = msgspec.structs.replace(record, pid=os.getpid())
        claim.write(record)
        # libfuse says on stderr why a mount failed; let it until that is decided.
        for stream in (0, 1):
            os.dup2(null, stream)

        def ready(device: int) -> None:
            claim.write(msgspec.structs.replace(record, device=device))
            os.dup2(null, 2)
            try:
                os.write(tell, b"ready\n")
            except BrokenPipeError:
                message = f"the command that was to mount {record.mountpoint} was ended before it did"
                raise MachineError(message) from None
            os.close(tell)

        serve(ready)
    except OcifsError as error:
        status = error.exit_code
        _log.error("%s", error)
        with contextlib.suppress(OSError):
            os.write(tell, f"{error}\n".encode(errors="surrogateescape"))
    except BaseException:  # noqa: BLE001 (nothing may return into the parent's code)
        status = 70  # EX_SOFTWARE in sysexits.h: a bug
        _log.exception("the daemon ended in a way that was not foreseen")
    finally:
        claim.release(keep_log=status != 0)
        logging.shutdown()
        # Not sys.exit: nothing of the parent's (its atexit functions, its buffers) may run in the child.
        os._exit(status)


def _close_inherited(keep: Sequence[int]) -> None:
    """Close what whoever ran us had open and left to us: a lock, a pipe that somebody reads to its end.

    Python opens everything close-on-exec, so what is not is not ours.
    """
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        with contextlib.suppress(OSError):
            if fd > 2 and fd not in keep and os.get_inheritable(fd):  # noqa: PLR2004 (beyond the standard streams)
                os.close(fd)


_LOG_LIMIT = 1 << 20
"""Bytes in a log file before it is begun anew: 1 MiB."""


class _BoundedLog(logging.StreamHandler[TextIO]):
    """Appends to a file that is begun anew when it is full, whatever the file is called by then."""

    def __init__(self, path: Path) -> None:
        super().__init__(path.open("a", encoding="utf-8", errors="backslashreplace"))

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, making room first if need be."""
        with contextlib.suppress(OSError):
            if os.fstat(self.stream.fileno()).st_size > _LOG_LIMIT:
                os.ftruncate(self.stream.fileno(), 0)
                self.stream.write("(what was here is gone: the log had become too long)\n")
        super().emit(record)


def log_to_background(path: Path) -> None:
    """Send the log to a file beside the record and, where there is one, to the system's log."""
    import logging.handlers  # noqa: PLC0415 (pulls in sockets and pickle, which nothing else needs)

    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    file = _BoundedLog(path)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root.addHandler(file)
    if Path("/dev/log").exists():
        with contextlib.suppress(OSError):
            system = logging.handlers.SysLogHandler("/dev/log", logging.handlers.SysLogHandler.LOG_DAEMON)
            system.setFormatter(logging.Formatter(f"ocifs[{os.getpid()}]: %(message)s"))
            root.addHandler(system)


# -- ending --------------------------------------------------------------------------------------------------------


def unmount(mountpoint: Path, *, lazy: bool = False, patience: float = GOODBYE) -> None:
    """Unmount ``mountpoint`` and return when its daemon is gone. Cleans up after a daemon that was killed.

    Raises `NotFoundError` if nothing of ocifs is mounted there, `BusyError` (naming the processes) if it is in use or the
    daemon does not end within ``patience`` seconds.
    """
    path = _real(mountpoint)
    daemon = None
    try:
        with _found_at(path) as (there, record, alive):
            if there is None:
                message = f"nothing of ocifs is mounted on {mountpoint}; 'ocifs ps' lists what is"
                raise NotFoundError(message)
            daemon = _pidfd(record.pid) if record and alive else None
            _unmounted(path, lazy=lazy or not alive)
        if daemon is None or lazy or select.select([daemon], [], [], min(1.0, patience))[0]:
            return
        # Asked only now: the number of a file system that is gone may be another's already.
        also = mount_of(there.device)
        if also is not None:
            where = f"{os.fsdecode(also.mountpoint)}, and its daemon serves that on"
            message = f"{path} is unmounted, but the same mount is also at {where}"
            raise BusyError(message)
        if not select.select([daemon], [], [], patience)[0]:
            message = (
                f"{path} is unmounted, but its daemon (pid {record.pid if record else 0}) still serves: another mount "
                "namespace, such as a container's, holds a copy of the mount; it ends with that namespace"
            )
            raise BusyError(message)
    finally:
        if daemon is not None:
            os.close(daemon)


def _pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def users_of(path: Path) -> str:
    """Name what keeps a mount busy, as far as this user may see: ``vim (pid 71), bash (pid 70)``. Touches nothing in it."""
    there = mounted_at(path)
    if there is None:
        return "nobody any more"
    found = [
        f"another mount, on {os.fsdecode(entry.mountpoint)}"
        for entry in mounts()
        if entry.mountpoint.startswith(there.mountpoint.rstrip(b"/") + b"/")
    ]
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if _is_user(process, there):
                found.append(f"{(process / 'comm').read_text(errors='replace').strip()} (pid {process.name})")
    return ", ".join(found) or "a process that you may not see"


def _is_user(process: Path, there: MountEntry) -> bool:
    """Whether a process has a file of a mount open or mapped, or works in it."""
    number = b"mnt_id:\t%d\n" % there.number
    with contextlib.suppress(OSError):
        for fd in (process / "fdinfo").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile
                if number in fd.read_bytes():
                    return True
    device = b" %02x:%02x " % (os.major(there.device), os.minor(there.device))
    with contextlib.suppress(OSError):
        if device in (process / "maps").read_bytes():
            return True
    for link in ("cwd", "root"):
        with contextlib.suppress(OSError):
            if (os.fsencode(os.readlink(process / link)) + b"/").startswith(there.mountpoint.rstrip(b"/") + b"/"):
                return True
    return False


def now_ns() -> int:
    """Nanoseconds since the epoch, for `Record.started_ns`."""
    return time.time_ns()
