"""A user namespace for who is not root: in it this process is root and may mount, and nothing outside of it changes.

Which ids there are
    Always the user's own, as 0. Where /etc/subuid and /etc/subgid give the user more and newuidmap(1) is there to map them,
    those follow from 1 on, so that most of an image's owners are themselves. Owners beyond are shown as the kernel shows
    who is not mapped, as nobody, and what they alone may read cannot be read.

The mounts are in a mount namespace of their own: they are seen by the container and its daemon alone, and go with them.

Not here: what is started in it (`ocifs.bundle.containers`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pwd
import shutil
import subprocess
from pathlib import Path
from typing import Final, NamedTuple

from ocifs.errors import MachineError

_CLONE_NEWNS: Final = 0x00020000  # include/uapi/linux/sched.h
_CLONE_NEWUSER: Final = 0x10000000
_MS_REC: Final = 0x4000  # include/uapi/linux/mount.h
_MS_PRIVATE: Final = 1 << 18

_ADVICE: Final = (
    "become root, or have it allow user namespaces (the sysctls user.max_user_namespaces, "
    "kernel.unprivileged_userns_clone and kernel.apparmor_restrict_unprivileged_userns, where they exist)"
)
_libc: Final = ctypes.CDLL(None, use_errno=True)


class _Range(NamedTuple):
    start: int
    size: int


def enter() -> int:
    """Move this process into a user and a mount namespace of its own; gives how many ids there are in it, from 0 on.

    It must have no other thread. Raises `MachineError` where the kernel does not allow it.
    """
    uid, gid = os.geteuid(), os.getegid()
    ranges = _subordinate(Path("/etc/subuid"), uid), _subordinate(Path("/etc/subgid"), uid)
    count = 1
    if all(ranges) and shutil.which("newuidmap") and shutil.which("newgidmap"):
        count = _unshare_mapped(uid, gid, ranges[0] or _Range(0, 0), ranges[1] or _Range(0, 0))
    else:
        _unshare()
    if count == 1:
        _map_one(uid, gid)
    if _libc.mount(None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None):
        raise MachineError(f"in a user namespace of an ordinary user nothing can be mounted here; {_ADVICE}")
    return count


def _unshare() -> None:
    if _libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNS):
        reason = os.strerror(ctypes.get_errno())
        raise MachineError(f"an ordinary user gets no user namespace here ({reason}); {_ADVICE}")


def _map_one(uid: int, gid: int) -> None:
    try:
        Path("/proc/self/setgroups").write_text("deny")  # or the kernel lets nobody map a group
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    except OSError as error:
        raise MachineError(f"the user namespace gets no ids ({error.strerror}); {_ADVICE}") from error


def _unshare_mapped(uid: int, gid: int, uids: _Range, gids: _Range) -> int:
    """Enter the namespace and have newuidmap(1) map the user's ranges, from outside of it; 1 if that did not work."""
    count = 1 + min(uids.size, gids.size)
    told, tell = os.pipe2(os.O_CLOEXEC)
    helper = os.fork()
    if helper == 0:
        status = 1
        try:
            os.close(tell)
            if os.read(told, 1):
                status = _run_mappers(os.getppid(), (uid, uids.start), (gid, gids.start), count)
        finally:
            os._exit(status)
    os.close(told)
    try:
        _unshare()
        os.write(tell, b"!")
    finally:
        os.close(tell)
        status = os.waitpid(helper, 0)[1]
    return count if status == 0 else 1


def _run_mappers(pid: int, uids: tuple[int, int], gids: tuple[int, int], count: int) -> int:
    for program, (own, start) in (("newgidmap", gids), ("newuidmap", uids)):
        words = [program, str(pid), "0", str(own), "1", "1", str(start), str(count - 1)]
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, check=False)  # noqa: S603 (our own words)
        if done.returncode:
            return 1
    return 0


def _subordinate(file: Path, uid: int) -> _Range | None:
    """The first range that subuid(5) gives a user."""
    names = {str(uid)}
    with contextlib.suppress(KeyError):
        names.add(pwd.getpwuid(uid).pw_name)
    with contextlib.suppress(OSError):
        for line in file.read_text(errors="replace").splitlines():
            match line.split(":"):
                case [name, start, count] if name in names and start.isdecimal() and count.isdecimal():
                    return _Range(int(start), int(count)) if int(count) else None
    return None
