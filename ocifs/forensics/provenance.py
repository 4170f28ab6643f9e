"""Where what is in an image comes from: every version of a path, what ended it, and who holds its bytes.

Paths are looked up in all layers at once, so a name that was deleted is found as one that is there. A symlink on the way
is followed as the image has it now, or had it last: ``bin/sh`` finds ``usr/bin/sh`` where ``bin`` is a link to ``usr/bin``.
The name itself is followed only if that is asked for.

Not here: shell lines that cut bytes out of blobs (`ocifs.forensics.extraction`), proof (`ocifs.forensics.receipt`), lines of
other programs (`ocifs.forensics.annotation`).
"""

from __future__ import annotations

import hashlib
from itertools import islice
from typing import TYPE_CHECKING, Final

from ocifs.errors import DamagedError, NotFoundError
from ocifs.forensics.examination import MAX_HOLES, Examination
from ocifs.history import Change, End
from ocifs.overlay.paths import normalised, shown
from ocifs.tree import Kind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ocifs.history import History, Version

_MAX_LINKS: Final = 40
"""Links followed for one path, as the kernel does (MAXSYMLINKS)."""
_MAX_NAMES: Final = 5000
"""Versions below a directory among which a similar name is looked for."""


# -- finding -------------------------------------------------------------------------------------------------------


def find(history: History, path: bytes, *, follow: bool = False) -> list[Version]:
    """Give every version of a path, by layer and entry; ``follow`` says what a symlink leads to is meant.

    Raises `NotFoundError`, which names the nearest path that some layer had, if none ever had this one.
    """
    names, _ = normalised(path)
    found, names = walk(history, names, follow=follow)
    if not found:
        raise NotFoundError(f"no layer ever had {shown(path)}{_nearest(history, names)}")
    return found


def walk(history: History, names: list[bytes], *, follow: bool) -> tuple[list[Version], list[bytes]]:
    """Give the versions of the path that ``names`` lead to, none if there are none, and that path."""
    for _ in range(_MAX_LINKS):
        found = history.of(b"/".join(names))
        if found:
            target = _link_target(found) if follow else None
            if target is None:
                return found, names
            names = _led_to(names[:-1], target, [])
            continue
        for count in range(1, len(names)):
            target = _link_target(history.of(b"/".join(names[:count])))
            if target is not None:
                names = _led_to(names[: count - 1], target, names[count:])
                break
        else:
            break
    return [], names


def current(versions: Sequence[Version]) -> Version | None:
    """Give the version that the image shows, else the last that it ever showed; None if it never showed any."""
    there = [version for version in versions if version.change in {Change.ADDED, Change.CHANGED}]
    return next((version for version in there if version.end is End.VISIBLE), there[-1] if there else None)


def _link_target(versions: Sequence[Version]) -> bytes | None:
    version = current(versions)
    return version.target if version is not None and version.kind == Kind.SYMLINK else None


def _led_to(directory: list[bytes], target: bytes, rest: list[bytes]) -> list[bytes]:
    above = b"" if target.startswith(b"/") else b"/".join(directory) + b"/"
    return normalised(above + target + b"/" + b"/".join(rest))[0]


def _nearest(history: History, names: Sequence[bytes]) -> str:
    """Say how far a path leads, and what there has a similar name."""
    import difflib  # noqa: PLC0415 (only on a mistake)

    for count in range(len(names) - 1, -1, -1):
        parent = b"/".join(names[:count])
        if not history.of(parent):
            continue
        depth = len(parent) + 1 if parent else 0
        below = (version.path[depth:].partition(b"/")[0] for version in islice(history.below(parent), _MAX_NAMES))
        there = list(dict.fromkeys(name.decode(errors="replace") for name in below if name))
        near = difflib.get_close_matches(names[count].decode(errors="replace"), there, 3, 0.6)
        where = shown(b"/" + parent)
        return f"; below {where} there was {', '.join(near)}" if near else f"; the nearest that one had is {where}"
    return ""


# -- what became of a version --------------------------------------------------------------------------------------


def ended_by(history: History, version: Version) -> Version | None:
    """Give the entry that ended a version: a marker, or what replaced it; None if it has not ended, or no entry did it."""
    if not version.end_layer or version.end_entry < 0:
        return None
    return history.by_entry(version.end_layer, version.end_entry)


def holder(history: History, version: Version) -> Version:
    """Give the entry whose data a version's bytes are: another one for a hard link, else itself.

    Raises `DamagedError` if a hard link's bytes are nobody's, which cannot be for one that is readable.
    """
    if not version.hard_link or not version.extents:
        return version
    # A link names what was there when its layer was written, so the target has the very same extents; it may be a link.
    names, _ = normalised(version.target)
    for candidate in history.of(b"/".join(names)):
        if not candidate.hard_link and candidate.extents == version.extents:
            return candidate
    # Its path is not what it says it is, for a symlink led there: the entry whose data begins where the extents do.
    _, layer, layer_offset, _ = version.extents[0]
    for candidate in history:
        if candidate.layer == layer and not candidate.hard_link and candidate.extents == version.extents:
            return candidate
    raise DamagedError(f"no entry holds the data at offset {layer_offset} of layer {layer}")


def content_hash(examination: Examination, version: Version) -> str:
    """Give the SHA-256 of one file's bytes, in hex, decoding only the spans that hold them.

    Raises `DamagedError` if they cannot be read, or if the file has more holes than anybody wants to hash.
    """
    if version.size - sum(size for _, _, _, size in version.extents) > MAX_HOLES:
        raise DamagedError(f"it has holes of more than {MAX_HOLES >> 30} GiB together, which are not hashed")
    hasher = hashlib.sha256()
    for piece in examination.data(version):
        hasher.update(piece)
    return hasher.hexdigest()
