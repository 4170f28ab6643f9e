"""The merged tree of an image as values in memory: what `ocifs.overlay` makes and `ocifs.erofs` writes.

A tree lives only while an image is merged; what serves a mount is the EROFS image written from it. Paths and names are
``bytes``. Layers count from 1 (the base).

Not here: any rule about whiteouts or parents (`ocifs.overlay`), any byte layout (`ocifs.erofs`, `ocifs.image_tree`).
"""

from __future__ import annotations

import enum

import msgspec


class Kind(enum.IntEnum):
    """The closed set of what a name can be. The values are ``S_IFMT`` of ``st_mode`` shifted right by 12."""

    FIFO = 0o01
    CHAR = 0o02
    DIR = 0o04
    BLOCK = 0o06
    FILE = 0o10
    SYMLINK = 0o12


class Extent(msgspec.Struct, frozen=True, gc=False):
    """Bytes of a file: ``size`` bytes at ``file_offset`` lie at ``layer_offset`` of ``layer``'s uncompressed tar."""

    file_offset: int
    layer: int
    layer_offset: int
    size: int


class Origin(msgspec.Struct, frozen=True, gc=False):
    """Which tar entry made a node: ``layer`` from 1, ``entry`` its number in the layer's stream from 0.

    ``entry`` is -1 for a directory that no entry names (implied by a path below it) and for the root without an entry.
    ``layer`` is 0 for what no layer has: a mount point that was asked for.
    """

    layer: int
    entry: int


class Node(msgspec.Struct, eq=False):
    """One inode. Two names of one file are the same `Node` object in two directories.

    ``mode`` is the 12 permission bits. ``mtime_ns`` is nanoseconds since the epoch, never negative. ``size`` is the
    file's size in bytes (FILE only); bytes in no extent are holes. ``unreadable`` marks a file that reads EIO (rules D6,
    H6 and L2 under examination). ``rdev`` is (major, minor) for CHAR and BLOCK. ``xattrs`` holds what is shown, by name.
    """

    kind: Kind
    origin: Origin
    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    size: int = 0
    extents: tuple[Extent, ...] = ()
    target: bytes = b""
    rdev: tuple[int, int] = (0, 0)
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    children: dict[bytes, Node] | None = None
    unreadable: bool = False


class Warned(msgspec.Struct, frozen=True, gc=False):
    """A warning: which rule of the layer rules (``"T3"``), in which layer (from 1; 0: the image), about what."""

    rule: str
    layer: int
    path: bytes
    message: str


class Tree(msgspec.Struct, eq=False):
    """A merged image: the root directory and what was noticed while merging, in the order it was noticed."""

    root: Node
    warnings: list[Warned] = msgspec.field(default_factory=list)
