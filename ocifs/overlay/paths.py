"""Paths of tar entries and links as lists of names, before anything is looked up.

Not here: what a path leads to (`ocifs.overlay.upper`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

NAME_MAX: Final = 255  # bytes; linux/limits.h
PATH_MAX: Final = 4095  # bytes; linux/limits.h, without the final NUL
SPELT_MAX: Final = 65_536  # bytes of a path before it is normalised: no engine opens one that long
SHOWN_MAX: Final = 200  # characters of a path in a message


def components(path: bytes) -> list[bytes]:
    """Split a link's target. ``..`` stays: what it means depends on the symlinks before it."""
    return [name for name in path.split(b"/") if name not in {b"", b"."}]


def normalised(path: bytes) -> tuple[list[bytes], bool]:
    """Split an entry's path, ``..`` taken as text (T12); and whether it led out of the root (T13)."""
    names: list[bytes] = []
    clamped = False
    for name in path.split(b"/"):
        if name == b"..":
            if names:
                names.pop()
            else:
                clamped = True
        elif name not in {b"", b"."}:
            names.append(name)
    return names, clamped


def excess(names: Sequence[bytes]) -> tuple[str, str] | None:
    """Which rule a path breaks by its length, and how."""
    if any(len(name) > NAME_MAX for name in names):
        return "T17", f"a name over {NAME_MAX} bytes is left out of the tree"
    if sum(map(len, names)) + len(names) - 1 > PATH_MAX:
        return "L1", f"a path over {PATH_MAX} bytes is left out of the tree"
    return None


def shown(path: bytes) -> str:
    """``path`` for a message: printable, in quotes, without its middle if it is very long."""
    text = path[: 4 * SHOWN_MAX].decode("utf-8", "backslashreplace")
    text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    return f"'{text}'" if len(text) <= SHOWN_MAX else f"'{text[:SHOWN_MAX]}…'"
