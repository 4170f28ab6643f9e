"""What is done to a directory: checked before a mount, unmounted after it, its users named.

Not here: serving what is mounted.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import signal
import subprocess
from pathlib import Path

from ocifs import kernel
from ocifs.daemon.records import Record, found_at, real, socket_of
from ocifs.daemon.statistics import ask
from ocifs.driver import Statistics
from ocifs.errors import BusyError, MachineError, NotFoundError, UsageError
from ocifs.mountinfo import MountEntry, mount_of, mounted_at, mounts

_log = logging.getLogger(__name__)

_AUTOMOUNT = "autofs"
"""What systemd.automount(5) mounts on a directory, to be told when somebody looks into it."""

GOODBYE = 10.0
"""Seconds `unmount` waits by default for a daemon to be gone before it says what may hold it."""


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
    path = real(mountpoint)
    with found_at(path) as (there, record, alive):
        if there is not None:
            if alive:
                what = record.reference if record else os.fsdecode(there.source)
                message = f"{path} has {what} mounted on it already; unmount it first: ocifs umount {path}"
                raise BusyError(message)
            _log.warning("removing the dead mount that a killed daemon left at %s", path)
            unmounted(path, lazy=True)
    trigger = mounted_at(path)
    if trigger is not None and trigger.fs_type == _AUTOMOUNT:
        return path  # looking into it would wait for the very mount that we are asked for
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


def unmounted(path: Path, *, lazy: bool, advice: str = "end them, or say --lazy") -> None:
    """Unmount ``path``, or say in a sentence why not."""
    try:
        _detach(path, lazy=lazy)
    except FileNotFoundError as error:
        message = f"cannot unmount {path}: {error.filename or 'fusermount3'} is not there; install the package fuse3"
        raise MachineError(message) from error
    except OSError as error:
        if error.errno == errno.EBUSY:
            message = f"{path} is in use by {users_of(path)}; {advice}"
            raise BusyError(message) from None
        message = f"cannot unmount {path}: {error.strerror}"
        raise MachineError(message) from error


def clean_up(mountpoint: Path) -> None:
    """Unmount ``mountpoint`` if it is a dead mount of ours; leave alone everything else."""
    path = real(mountpoint)
    with found_at(path) as (there, _, alive):
        if there is not None and not alive:
            unmounted(path, lazy=True)


def unmount(
    mountpoint: Path, *, lazy: bool = False, patience: float = GOODBYE, advice: str = "end them, or say --lazy"
) -> None:
    """Unmount ``mountpoint`` and return when its daemon is gone. Cleans up after a daemon that was killed.

    Raises `NotFoundError` if nothing of ocifs is mounted there, `BusyError` (naming the processes) if it is in use or the
    daemon does not end within ``patience`` seconds.
    """
    path = real(mountpoint)
    daemon = None
    try:
        with found_at(path) as (there, record, alive):
            if there is None:
                message = f"nothing of ocifs is mounted on {mountpoint}; 'ocifs ps' lists what is"
                raise NotFoundError(message)
            daemon = _pidfd(record.pid) if record and alive else None
            unmounted(path, lazy=lazy or not alive, advice=advice)
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
                f"{path} is unmounted, but its daemon (pid {record.pid if record else 0}) still serves: an overlay above "
                "it, or another mount namespace such as a container's, holds a copy of the mount; it ends with that"
            )
            raise BusyError(message)
    finally:
        if daemon is not None:
            os.close(daemon)


def end(record: Record) -> None:
    """Have the daemon of a mount end, wherever that is still to be seen, and wait until it is gone (or `GOODBYE`)."""
    daemon = _pidfd(record.pid)
    if daemon is None:
        return
    try:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(daemon, signal.SIGTERM)
        select.select([daemon], [], [], GOODBYE)
    finally:
        os.close(daemon)


def _pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def statistics_at(mountpoint: Path) -> tuple[Record, Statistics]:
    """What the daemon of the mount at a directory has done so far. Raises `NotFoundError` or `MachineError`."""
    path = real(mountpoint)
    with found_at(path) as (there, record, alive):
        if there is None or record is None:
            raise NotFoundError(f"nothing of ocifs is mounted on {mountpoint}; 'ocifs ps' lists what is")
        if not alive:
            raise MachineError(f"the daemon that served {path} is dead; clean up: ocifs umount {path}")
    return record, ask(socket_of(record.log))


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
