"""What is mounted where, as the kernel tells it, without touching any of it: a mount may be dead or hang.

Not here: mounting, unmounting, and which mounts are ours.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple


class MountEntry(NamedTuple):
    """A line of mountinfo (proc_pid_mountinfo(5)). ``number`` is the mount ID, ``device`` the st_dev of what is in it."""

    number: int
    mountpoint: bytes
    fs_type: str
    source: bytes
    device: int


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
    found = []
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        left, _, right = line.partition(b" - ")
        fields, tail = left.split(b" "), right.split(b" ")
        major, _, minor = fields[2].partition(b":")
        device = os.makedev(int(major), int(minor))
        found.append(MountEntry(int(fields[0]), _unescape(fields[4]), tail[0].decode(), _unescape(tail[1]), device))
    return found


def mounted_at(path: str | os.PathLike[str]) -> MountEntry | None:
    """What is mounted exactly at ``path`` (the topmost)."""
    wanted = os.fsencode(path)
    return next((entry for entry in reversed(mounts()) if entry.mountpoint == wanted), None)
