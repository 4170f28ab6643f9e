"""Mount options (``-o``): which make sense, which are in force, and how libfuse is told.

Not here: how the kernel's EROFS is told (`ocifs.kernel`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ocifs.errors import MachineError, UsageError

_OPPOSITES = {"suid": "nosuid", "dev": "nodev", "exec": "noexec", "atime": "noatime"}
FUSE_ONLY = frozenset({"allow_other", "allow_root", "auto_unmount", "default_permissions"})
_KNOWN = frozenset({*_OPPOSITES, *_OPPOSITES.values(), *FUSE_ONLY, "ro", "nonempty"})
_SENSELESS = frozenset({"rw", "async", "sync", "remount", "bind", "lazytime"})
ALWAYS = ("nosuid", "nodev")
"""Unless told otherwise: an image is somebody else's, and browsing it needs neither."""


def check_options(words: Sequence[str], *, more: Sequence[str] = ()) -> tuple[str, ...]:
    """Give the mount options in force: the user's (``-o``), after our defaults. `UsageError` for one that cannot work.

    ``more`` are options that the caller knows, to be named with ours to who gives one that is not known.
    """
    options = dict.fromkeys(ALWAYS)
    for word in words:
        if word in _SENSELESS:
            message = f"the option {word!r} makes no sense for an image, which is read-only"
            raise UsageError(message)
        if word not in _KNOWN:
            message = f"the option {word!r} is not known; known are {', '.join(sorted([*_KNOWN, *more]))}"
            raise UsageError(message)
        opposite = _OPPOSITES.get(word) or next((name for name, no in _OPPOSITES.items() if no == word), "")
        options.pop(opposite, None)
        options[word] = None
    return tuple(options)


def evidence_options(words: Sequence[str]) -> tuple[str, ...]:
    """Give the user's options for a mount of evidence, which is nosuid, nodev and noexec. `UsageError` for the opposites."""
    for word in words:
        if word in ("suid", "dev", "exec"):
            message = f"the option {word!r} makes no sense with --examine: evidence is mounted nosuid, nodev and noexec"
            raise UsageError(message)
    return (*words, "noexec")


def others_allowed() -> bool:
    """Whether ordinary users may let others use their mounts: a line of /etc/fuse.conf (fusermount3(1))."""
    try:
        lines = Path("/etc/fuse.conf").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    return "user_allow_other" in (line.strip() for line in lines)


def check_allowed(options: Sequence[str]) -> None:
    """Raise `MachineError` if this user may not say one of the options in force."""
    if os.geteuid() == 0 or others_allowed():
        return
    for word in ("allow_other", "allow_root"):
        if word in options:
            message = (
                f"only root may say {word} on this machine, until root adds a line user_allow_other to /etc/fuse.conf"
            )
            raise MachineError(message)


def libfuse_options(options: Sequence[str], reference: str) -> set[str]:
    """Say options that `check_options` gave in libfuse's words, and ours with them."""
    # A comma separates options; libfuse takes a backslash to mean the next character itself (lib/fuse_opt.c).
    shown = reference.encode(errors="surrogateescape").decode("ascii", errors="backslashreplace")
    shown = shown.replace("\\", "\\\\").replace(",", "\\,")
    ours = {"ro", "default_permissions", "subtype=ocifs", f"fsname={shown}"}
    # libfuse mounts nosuid and nodev unless told otherwise (lib/mount.c) and does not know atime, which is the kernel's
    # default; the place was checked for being empty already.
    return ours | {option for option in options if option not in {"atime", "nonempty"}}
