"""Mounting an image tree with the kernel's own EROFS: the file-descriptor based mount API through libc's syscall(2).

The kernel (Linux ≥ 6.12 for file-backed mounts) reads the tree's file itself and takes the data of the files from one
device file per layer. mount(8) and mount(2) will not do: the one puts a loop device under every regular file, the other
passes all options in one page, which some 200 layers fill. fsconfig(2) has neither limit.

Not here: who serves the files that are mounted from, and when which driver is right.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from typing import Final

from ocifs.errors import MachineError

# Since Linux 5.1 new calls have the same number on every architecture (alpha aside): include/uapi/asm-generic/unistd.h.
_MOVE_MOUNT: Final = 429
_FSOPEN: Final = 430
_FSCONFIG: Final = 431
_FSMOUNT: Final = 432

# include/uapi/linux/mount.h
_FSOPEN_CLOEXEC: Final = 1
_FSCONFIG_SET_FLAG: Final = 0
_FSCONFIG_SET_STRING: Final = 1
_FSCONFIG_CMD_CREATE: Final = 6
_FSMOUNT_CLOEXEC: Final = 1
_MOUNT_ATTR_RDONLY: Final = 1
_MOUNT_ATTRIBUTES: Final = {"nosuid": 2, "nodev": 4, "noexec": 8, "noatime": 0x10}
_MOVE_MOUNT_F_EMPTY_PATH: Final = 4

_LOG_LIMIT: Final = 16
"""A context keeps the last 8 messages (``fs/fs_context.c``); more are not waited for."""
_AT_FDCWD: Final = -100
MNT_DETACH: Final = 2
"""Flag of umount2(2): take the mount out of sight now, end it when nobody uses it."""

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def mount_erofs(
    source: bytes,
    devices: Sequence[bytes],
    target: bytes,
    *,
    flags: Sequence[str] = (),
    attributes: Sequence[str] = (),
    attaching: Callable[[int], None] = lambda _: None,
) -> int:
    """Mount the EROFS image in the file ``source`` on the directory ``target``, read-only; give its st_dev.

    ``devices`` are the files of the extra devices in the order of the image's device table: all of them or, on pain of
    reading file data from the wrong place, none of that image's files. ``flags`` are further options of EROFS without a
    value, ``attributes`` those of any mount: of mount(8)'s words for them nosuid, nodev, noexec and noatime count.
    Blocks while the kernel reads the superblock: if this very process serves ``source``, call it in a thread.
    ``attaching`` is told the st_dev before the mount can be seen, so that whoever must find it again can write it down.

    Raises `MachineError` with what the kernel said; nothing stays mounted then.
    """
    attached = _MOUNT_ATTR_RDONLY | sum(_MOUNT_ATTRIBUTES.get(word, 0) for word in set(attributes))
    mount = _create(source, devices, flags, attached)
    try:
        device = os.fstat(mount).st_dev
        attaching(device)
        _call("move_mount", _MOVE_MOUNT, mount, b"", _AT_FDCWD, target, _MOVE_MOUNT_F_EMPTY_PATH)
    except OSError as error:
        raise MachineError(f"cannot mount on {os.fsdecode(target)}: {error.strerror}") from error
    finally:
        os.close(mount)
    return device


def _create(source: bytes, devices: Sequence[bytes], flags: Sequence[str], attributes: int) -> int:
    """Make the mount, not yet attached anywhere: a descriptor whose closing would end it."""
    try:
        context = _call("fsopen", _FSOPEN, b"erofs", _FSOPEN_CLOEXEC)
    except OSError as error:
        raise MachineError(f"the kernel has no EROFS to mount with: {error.strerror}") from error
    try:
        _call("fsconfig", _FSCONFIG, context, _FSCONFIG_SET_STRING, b"source", source, 0)
        for device in devices:
            _call("fsconfig", _FSCONFIG, context, _FSCONFIG_SET_STRING, b"device", device, 0)
        for flag in flags:
            _call("fsconfig", _FSCONFIG, context, _FSCONFIG_SET_FLAG, flag.encode(), None, 0)
        _call("fsconfig", _FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        return _call("fsmount", _FSMOUNT, context, _FSMOUNT_CLOEXEC, attributes)
    except OSError as error:
        said = _messages(context)
        raise MachineError(
            f"the kernel cannot mount {os.fsdecode(source)} as EROFS: {error.strerror}{said and f' ({said})'}"
        ) from error
    finally:
        os.close(context)


def unmount(target: bytes, *, flags: int = 0) -> None:
    """End the mount on ``target``. Raises `MachineError`."""
    try:
        umount2(target, flags)
    except OSError as error:
        raise MachineError(f"cannot unmount {os.fsdecode(target)}: {error.strerror}") from error


def umount2(target: bytes, flags: int) -> None:
    """Make the system call itself. Raises `OSError`."""
    if _libc.umount2(ctypes.c_char_p(target), ctypes.c_int(flags)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), os.fsdecode(target))


def _call(name: str, number: int, *arguments: int | bytes | None) -> int:
    """One system call; `OSError` if it fails. Integers are passed as longs, as syscall(2) wants them."""
    passed = [ctypes.c_long(value) if isinstance(value, int) else ctypes.c_char_p(value) for value in arguments]
    result: int = _libc.syscall(ctypes.c_long(number), *passed)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)
    return result


def _messages(context: int) -> str:
    """What the file system wrote into the context's log, as one line: each read(2) gives one message."""
    messages: list[str] = []
    while len(messages) < _LOG_LIMIT:
        try:
            line = os.read(context, 4096)
        except OSError:  # ENODATA: no more
            break
        messages.append(line.decode(errors="backslashreplace").removeprefix("e ").strip())
    return "; ".join(messages)
