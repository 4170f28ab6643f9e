r"""Timelines as bodyfiles, for mactime and plaso.

A line is ``MD5|name|inode|mode|UID|GID|size|atime|mtime|ctime|crtime`` (The Sleuth Kit's body file, version 3). An image
has fewer times than a file system:

========  ============================================================================================================
mtime     of a version: the modification time of its entry
ctime     of a deletion: when the layer that deleted was made
crtime    of a version: when its layer was made; of a layer: the same
atime     never known: 0, as whatever else is not
========  ============================================================================================================

``inode`` is ``LAYER-ENTRY`` (plaso keeps the layer). MD5 is 0, "not calculated". Behind a symlink's name stands `` -> ``
and its target. Then in parentheses what became of a version that is not visible, which keeps names apart (mactime mixes up
lines of the same name), and its flags.

Two forms, because readers differ in how a name is decoded:

*plain*, for mactime. It splits at each ``|`` and then decodes ``%XX``; a decoded newline makes it drop the line. So ``|``,
``%`` and bytes that are no UTF-8 are ``%XX``, and control characters and backslashes ``\xNN`` and ``\\``, which mactime
shows as they are and plaso decodes. Times are whole seconds. mactime also drops a line whose times are all ``0``, as of a
file from the epoch in a layer whose time nobody said; ``00`` is the same number and no such word.

*extended*, for plaso and dfImageTools: a backslash before ``|`` and itself, control characters and bytes that are no UTF-8
as ``\xNN``; times to the nanosecond, the mode as ls shows it.

Not here: what events there are (`ocifs.forensics.timeline`).
"""

from __future__ import annotations

import re
import stat
from typing import TYPE_CHECKING, Final

from ocifs.forensics.timeline import Event, What
from ocifs.history import Change, End
from ocifs.tree import Kind

if TYPE_CHECKING:
    from ocifs.history import Version

_TYPES: Final = {
    Kind.FILE: "r",
    Kind.DIR: "d",
    Kind.SYMLINK: "l",
    Kind.CHAR: "c",
    Kind.BLOCK: "b",
    Kind.FIFO: "p",
}
_ENDED: Final = {
    End.WHITEOUT: "deleted",
    End.OPAQUE: "deleted",
    End.REPLACED: "replaced",
    End.OVERRIDDEN: "overridden",
    End.LEFT_OUT: "left out",
}


def line(event: Event, made_ns: int | None, label: str, *, extended: bool) -> bytes:
    """Write an event as a line.

    ``made_ns`` is when the event's layer was made, None if nobody said; ``label`` says what a layer is. Lines are UTF-8.
    """
    version = event.version
    mtime = event.time_ns if event.what is What.VERSION else 0
    ctime = event.time_ns if event.what is What.DELETED else 0
    crtime = 0 if event.what is What.DELETED else made_ns or 0
    times = [_time(time_ns, fraction=extended) for time_ns in (0, mtime, ctime, crtime)]
    if not extended and event.what is What.VERSION and not any(time.strip("0") for time in times):
        times[1] = "00"
    if version is None:
        name = escaped(label.encode("utf-8", "backslashreplace"), extended=extended)
        fields = [name, str(event.layer), _mode(0, 0, extended=extended), "0", "0", "0"]
    else:
        entry = version.entry if event.what is What.VERSION else version.end_entry
        fields = [
            escaped(_name(version), extended=extended) + _note(event),
            f"{event.layer}-{entry}" if entry >= 0 else f"{event.layer}",
            _mode(version.kind, version.mode, extended=extended),
            str(version.uid),
            str(version.gid),
            str(version.size if version.kind == Kind.FILE else 0),
        ]
    return "|".join(["0", *fields, *times]).encode() + b"\n"


def escaped(name: bytes, *, extended: bool) -> str:
    """Write a name as a field; see the module."""
    return _ODD.sub(_extended if extended else _plain, name.decode("utf-8", "surrogateescape"))


_ODD: Final = re.compile("[\x00-\x1f\x7f-\x9f\\\\|%\udc80-\udcff]")
"""Control characters, C0 and C1; what has a meaning; bytes that are no UTF-8 (surrogateescape: byte 0xNN as U+DCNN)."""


def _plain(match: re.Match[str]) -> str:
    character = match[0]
    if character in "|%":
        return f"%{ord(character):02X}"
    if character >= "\udc80":
        return f"%{ord(character) - 0xDC00:02X}"
    return _extended(match)


def _extended(match: re.Match[str]) -> str:
    character = match[0]
    if character in "\\|":
        return "\\" + character
    return character if character == "%" else f"\\x{ord(character) & 0xFF:02x}"


def _time(time_ns: int, *, fraction: bool) -> str:
    seconds, nanoseconds = divmod(time_ns, 10**9)
    return f"{seconds}.{nanoseconds:09}" if fraction and nanoseconds else str(seconds)


def _mode(kind: int, mode: int, *, extended: bool) -> str:
    shown = stat.filemode(kind << 12 | mode)
    if not kind:
        shown = "-" + shown[1:]
    if extended:
        return shown
    letter = _TYPES[Kind(kind)] if kind else "-"
    return f"{letter}/{letter}{shown[1:]}"


def _name(version: Version) -> bytes:
    is_link = version.kind == Kind.SYMLINK and not version.hard_link
    return b"/" + version.path + (b" -> " + version.target if is_link else b"")


def _note(event: Event) -> str:
    """Say, in parentheses, what the name does not tell."""
    version = event.version
    if version is None:
        return ""
    words = [flag.replace("-", " ") for flag in event.flags]
    if event.what is What.DELETED:
        words.append(f"deleted by layer {event.layer}")
    elif version.change is Change.MARKER:
        words.append(f"layer {version.layer} entry {version.entry}, marker")
    elif version.end is not End.VISIBLE:
        by = f" by layer {version.end_layer}" if version.end_layer > version.layer else ""
        words.append(f"layer {version.layer} entry {version.entry}, {_ENDED[version.end]}{by}")
    return f" ({', '.join(words)})" if words else ""
