"""What is mounted where, as the kernel tells it, without touching any of it: a mount may be dead or hang.

Not here: mounting, unmounting, and which mounts are ours.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class MountEntry(NamedTuple):
    """A line of mountinfo (proc_pid_mountinfo(5)). ``number`` is the mount ID, ``device`` the st_dev of what is in it."""

    number: int
    mountpoint: bytes
    fs_type: str
    source: bytes
    device: int
    options: bytes
    """Of the file system, as it was told them; not those of the mount."""


def _unescape(field: bytes) -> bytes:
    """Undo mountinfo's octal escapes of space, tab, newline and backslash."""
    out, rest = b"", field
    while b"\\" in rest:
        head, _, rest = rest.partition(b"\\")
        out += head + bytes([int(rest[:3], 8)])
        rest = rest[3:]
    return out + rest


def mounts() -> list[MountEntry]:
    """Every mount this process sees, in mount order (a later one hides an earlier one at the same place)."""
    return _read(Path("/proc/self/mountinfo"))


def _read(mountinfo: Path) -> list[MountEntry]:
    found = []
    # Not splitlines(): the kernel escapes newlines in names, but not the other bytes that it takes for one.
    for line in mountinfo.read_bytes().split(b"\n"):
        left, _, right = line.partition(b" - ")
        fields, tail = left.split(b" "), right.split(b" ")
        with contextlib.suppress(ValueError, IndexError):  # somebody else's mount is no reason to fail
            major, minor = fields[2].split(b":")
            device = os.makedev(int(major), int(minor))
            kind = tail[0].decode(errors="backslashreplace")
            found.append(
                MountEntry(int(fields[0]), _unescape(fields[4]), kind, _unescape(tail[1]), device, _unescape(tail[2]))
            )
    return found


def mount_of(device: int) -> MountEntry | None:
    """What shows the file system with this st_dev, wherever it is now; the topmost if there are several."""
    return next((entry for entry in reversed(mounts()) if entry.device == device), None)


def mounted_at(path: str | os.PathLike[str]) -> MountEntry | None:
    """What is mounted exactly at ``path`` (the topmost)."""
    wanted = os.fsencode(path)
    return next((entry for entry in reversed(mounts()) if entry.mountpoint == wanted), None)


def mount_holding(path: str | os.PathLike[str]) -> MountEntry | None:
    """What the file at ``path`` lies in, symbolic links followed: the mount with the longest place above it."""
    real = os.fsencode(os.path.realpath(path))

    def holds(entry: MountEntry) -> bool:
        return real == entry.mountpoint or real.startswith(entry.mountpoint.rstrip(b"/") + b"/")

    # Reversed, because of two at one place the later one hides the other.
    return max(filter(holds, reversed(mounts())), key=lambda entry: len(entry.mountpoint), default=None)


def file_system_of(path: str | os.PathLike[str]) -> str:
    """The type of what the file at ``path`` lies in, as ``ext4``."""
    there = mount_holding(path)
    return there.fs_type if there is not None else "unknown"


def roots() -> Iterator[tuple[int, int]]:
    """Every process that we may look at, with the st_dev of what its root directory is in: ``(pid, device)``.

    Taken from mountinfo, because a stat(2) of a root may hang, and one in another mount namespace cannot be found by path.
    """
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile, or somebody else's
            root = [entry for entry in _read(process / "mountinfo") if entry.mountpoint == b"/"]
            if root:
                yield int(process.name), root[-1].device
