"""The writable layer: a kernel overlay over a mounted image, and a tmpfs for changes that nobody wants to keep.

mount(2), not mount(8): no program has to be found, and errors come back as numbers. The overlay is told to keep to itself:

==================  ==================================================================================================
``index=off``       names of one file part when one of them is written, as under Docker and Podman; an index would have
                    the kernel look files of the image up by handle and answer ESTALE when it has forgotten one
``metacopy=off``,   the upper directory is complete in itself: what is in it can be read, compared and packed without
``redirect_dir=     the kernel's help. A directory of the image cannot be renamed (EXDEV); programs copy it then
nofollow``
==================  ==================================================================================================

Not here: where the directories are (`ocifs.bundle.lifecycle`).
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from ocifs.errors import MachineError
from ocifs.mountinfo import file_system_of, mounts

_OPTIONS: Final = ("index=off", "metacopy=off", "redirect_dir=nofollow")
_MS_NOSUID: Final = 2  # include/uapi/linux/mount.h
_MS_NODEV: Final = 4
_PAGE: Final = 4096
"""Bytes of options that mount(2) takes on every machine, the final NUL included."""
_NO_UPPER: Final = frozenset({"overlay", "nfs", "nfs4", "cifs", "smb3", "9p", "vfat", "exfat", "erofs", "squashfs"})
"""File systems that lack what overlayfs needs of an upper directory: xattrs of trusted.*, or whiteouts."""

STACKING_MAX: Final = 2
"""FILESYSTEM_MAX_STACK_DEPTH of include/linux/fs.h: file systems above one another of which each reads the next."""

_libc: Final = ctypes.CDLL(None, use_errno=True)


def mount_overlay(target: Path, *, lower: Path, upper: Path, work: Path, more: Sequence[str] = ()) -> None:
    """Mount an overlay on ``target``. Raises `MachineError` that says what the kernel is likely to mean."""
    places = (f"lowerdir={_escaped(lower)}", f"upperdir={_escaped(upper)}", f"workdir={_escaped(work)}")
    options = os.fsencode(",".join((*places, *_OPTIONS, *more)))
    if len(options) >= _PAGE:
        raise MachineError(f"the paths of the overlay on {target} are too long together: {len(options)} bytes")
    try:
        _mount(b"overlay", target, 0, options)
    except OSError as error:
        raise MachineError(f"cannot put a writable layer on {target}: {_meaning(error, lower, upper)}") from error


def overlay_with(upper: Path) -> str:
    """Where an overlay is mounted that has this upper directory; empty if there is none."""
    wanted = b",upperdir=" + os.fsencode(upper) + b","
    for entry in mounts():
        if entry.fs_type == "overlay" and wanted in b"," + entry.options + b",":
            return os.fsdecode(entry.mountpoint)
    return ""


def mount_tmpfs(target: Path) -> None:
    """Mount an empty file system in memory on ``target``, for us alone. Raises `MachineError`."""
    try:
        _mount(b"tmpfs", target, _MS_NOSUID | _MS_NODEV, b"mode=0700")
    except OSError as error:
        raise MachineError(f"cannot mount a tmpfs on {target}: {error.strerror}") from error


def _mount(kind: bytes, target: Path, flags: int, options: bytes) -> None:
    arguments = (kind, os.fsencode(target), kind, ctypes.c_ulong(flags), options)
    if _libc.mount(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))


def _escaped(path: Path) -> str:
    """A path as overlayfs reads it: commas separate options, colons layers (fs/overlayfs/params.c)."""
    return re.sub(r"([\\,:])", r"\\\1", str(path))


def _meaning(error: OSError, lower: Path, upper: Path) -> str:
    kind = file_system_of(upper)
    if error.errno == errno.ENODEV:
        return "the kernel has no overlayfs; modprobe overlay"
    if error.errno == errno.EPERM:
        return "only root may mount"
    if error.errno == errno.EINVAL and kind in _NO_UPPER:
        return (
            f"{upper} is on {kind}, which cannot keep changes; say --upper with a place on ext4 or xfs, or --ephemeral"
        )
    if error.errno == errno.EINVAL and file_system_of(lower) in ("overlay", "erofs"):
        return (
            f"the kernel stacks {STACKING_MAX} file systems at most, and {lower} is such a stack itself; some kernels count "
            "EROFS, and there --driver fuse needs one level less"
        )
    return str(error.strerror)
