"""What a container added, changed and deleted, compared with the image.

Compared is what the overlay shows with what the image has at the same path, not what overlayfs happened to copy up: a file
that was opened for writing and left as it was is no change. What is below a deleted directory is not listed, as it is not
below a directory that became something else: the line of the top says it all.

Not here: reading the upper directory (`upper`), joining it with the image (`merged`).
"""

from __future__ import annotations

import enum
import os
from typing import TYPE_CHECKING

import msgspec

from ocifs.changes.merged import Gone, Present
from ocifs.changes.upper import OF_THIS_MACHINE, Entry, all_zeros, data_runs
from ocifs.tree import Kind

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ocifs.changes.merged import Merged


class Sign(enum.StrEnum):
    """What happened to a name; the values are docker diff's."""

    ADDED = "A"
    CHANGED = "C"
    DELETED = "D"


class Difference(msgspec.Struct, frozen=True):
    """One line: what happened to which path (from ``/``), and what of it is not as in the image."""

    sign: Sign
    path: bytes
    kind: Kind | None
    """What it is now, for a deleted one what it was; None for a socket."""
    changed: tuple[str, ...] = ()
    """Of a CHANGED one: some of type, mode, owner, mtime, xattrs, content, target, device."""


def differences(merged: Merged) -> Iterator[Difference]:
    """Every difference, in the order of an archive. Errors as `Merged.steps`, and what reading the image's data raises."""
    view = merged.view
    for step in merged.steps():
        if isinstance(step, Gone):
            yield Difference(Sign.DELETED, b"/" + step.path, view.inode(step.image).kind)
        elif isinstance(step, Present):
            now = _now(merged, step)
            if step.image is None:
                yield Difference(Sign.ADDED, b"/" + step.path, now.kind)
            elif changed := _changed(merged, step, step.image, now):
                yield Difference(Sign.CHANGED, b"/" + step.path, now.kind, changed)


class _Attributes(msgspec.Struct, frozen=True):
    kind: Kind | None
    mode: int
    owner: tuple[int, int]
    mtime_ns: int
    xattrs: dict[bytes, bytes]
    rdev: tuple[int, int]
    size: int
    target: bytes


def _now(merged: Merged, step: Present) -> _Attributes:
    return _of_image(merged, step.source) if isinstance(step.source, int) else _of_entry(step.source)


def _of_entry(entry: Entry) -> _Attributes:
    status = entry.status
    return _Attributes(
        entry.kind,
        status.st_mode & 0o7777,
        (status.st_uid, status.st_gid),
        status.st_mtime_ns,
        dict(entry.xattrs),
        entry.rdev,
        status.st_size,
        entry.target,
    )


def _of_image(merged: Merged, ino: int) -> _Attributes:
    found = merged.view.inode(ino)
    return _Attributes(
        found.kind,
        found.mode & 0o7777,
        (found.uid, found.gid),
        found.mtime_ns,
        {name: value for name, value in merged.view.xattrs(ino).items() if name not in OF_THIS_MACHINE},
        found.rdev,
        found.size,
        merged.view.readlink(ino) if found.kind is Kind.SYMLINK else b"",
    )


def _changed(merged: Merged, step: Present, image: int, now: _Attributes) -> tuple[str, ...]:
    """What of a file is not as it is in the image, where its inode is ``image``."""
    if step.source == image:
        return ()
    before = _of_image(merged, image)
    if now.kind is not before.kind:
        return ("type",)
    found = {
        "mode": now.mode != before.mode,
        "owner": now.owner != before.owner,
        "mtime": now.mtime_ns != before.mtime_ns,
        "xattrs": now.xattrs != before.xattrs,
        "target": now.target != before.target,
        "device": now.kind in (Kind.CHAR, Kind.BLOCK) and now.rdev != before.rdev,
        "content": now.kind is Kind.FILE and (now.size != before.size or not _same_data(merged, step, image)),
    }
    return tuple(name for name, differs in found.items() if differs)


def _same_data(merged: Merged, step: Present, image: int) -> bool:
    """Whether two files of one size have the same bytes."""
    view = merged.view
    other = step.data if isinstance(step.source, Entry) else step.source
    if other is not None:
        return other == image or all(
            bytes(one) == bytes(view.read_blocking(image, offset, len(one)))
            for offset, one in _placed(view.pieces(other))
        )
    offset = 0
    with merged.opened(step) as fd:
        for extent in view.tree.extents(image, 0, view.inode(image).size):
            if extent.layer:
                pieces = view.pieces(image, start=offset, size=extent.size)
                same = all(bytes(data) == os.pread(fd, len(data), at) for at, data in _placed(pieces, offset))
            else:
                same = all(all_zeros(fd, *run) for run in data_runs(fd, offset, offset + extent.size))
            if not same:
                return False
            offset += extent.size
    return True


def _placed(pieces: Iterator[bytes | memoryview], offset: int = 0) -> Iterator[tuple[int, bytes | memoryview]]:
    """Pieces of a file from ``offset`` on, each with its own."""
    for piece in pieces:
        yield offset, piece
        offset += len(piece)
