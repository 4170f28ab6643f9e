"""Inodes of an image as members of a tar archive: for an archive of the whole, and for what a layer brings along.

Holes stay holes (GNU sparse format 1.0), because an image may hold a file of an exabyte that has no data at all.

Not here: which inodes, under which names, in which order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ocifs import archive
from ocifs.tree import Kind

if TYPE_CHECKING:
    from collections.abc import Callable

    from ocifs.rootfs import RootFS

    Write = Callable[[bytes | memoryview], object]


def member(view: RootFS, path: bytes, ino: int, hard_link: bytes | None = None) -> archive.Member:
    """An inode under the name ``path``; ``hard_link`` is the path of an earlier member that is the same inode."""
    found = view.inode(ino)
    return archive.Member(
        path,
        found.kind,
        found.mode,
        found.uid,
        found.gid,
        found.mtime_ns,
        size=found.size if found.kind is Kind.FILE else 0,
        target=view.readlink(ino) if found.kind is Kind.SYMLINK else b"",
        rdev=found.rdev,
        xattrs=tuple(view.xattrs(ino).items()),
        hard_link=hard_link,
    )


def write(view: RootFS, ino: int, what: archive.Member, out: Write) -> None:
    """Write a member with the data of inode ``ino``, if it is one that has data. Raises what reading data raises."""
    if what.kind is not Kind.FILE or what.hard_link is not None:
        out(archive.header(what))
        return
    runs: list[tuple[int, int]] = []
    offset, holes = 0, False
    for piece in view.tree.extents(ino, 0, what.size):
        if piece.layer:
            runs.append((offset, piece.size))
        else:
            holes = True
        offset += piece.size
    segments = archive.whole_blocks(runs, what.size) if holes else [(0, what.size)]
    out(archive.header(what, segments if holes else None))
    stored = 0
    for start, size in segments:
        for data in view.pieces(ino, start=start, size=size):
            out(data)
            stored += len(data)
    out(archive.padding(stored))
