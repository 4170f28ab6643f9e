"""What a path was at one time: the value that histories are made of.

Not here: how versions are found (`ocifs.history.recorder`), how they are kept (`ocifs.history.file`).
"""

from __future__ import annotations

import enum

import msgspec


def sort_key(path: bytes) -> bytes:
    """Give what paths are ordered by: no name has a NUL, so below a directory comes before all that follows it."""
    return path.replace(b"/", b"\0")


class Change(enum.IntEnum):
    """What a version was to its path when its layer was put on the ones below."""

    ADDED = 0
    """The path was not there before."""
    CHANGED = 1
    """It was, and is something else now, or has other attributes."""
    MARKER = 2
    """A whiteout or an opaque marker: never a name of the tree, ``path`` is its own (``etc/.wh.motd``)."""
    NONE = 3
    """It never was in the tree: the rules leave it out, or a later entry of its own layer took its path."""


class End(enum.IntEnum):
    """How a version ended."""

    VISIBLE = 0
    """Not at all: it is what the image shows."""
    WHITEOUT = 1
    """A whiteout of a later layer removed it, or a directory that it was in."""
    OPAQUE = 2
    """The opaque marker of a later layer removed it, or a directory that it was in."""
    REPLACED = 3
    """A later layer has something else under its path, or a file instead of a directory that it was in."""
    OVERRIDDEN = 4
    """A later entry of its own layer took its path, or the path of a directory that it was in."""
    LEFT_OUT = 5
    """It never was in the tree by the layer rules, or is a marker."""


class Version(msgspec.Struct, array_like=True, gc=False):
    """One path in one layer: what an entry of its tar made of it, or a directory that is only implied.

    Each entry of each layer is one version, so nothing in an image's archives is missing here; directories that no
    entry names are versions with ``entry`` -1. ``path`` is the path in the tree, without a leading slash, also where a
    symlink of the layer led the entry elsewhere than its name says; the root is empty.

    Mode, owner, time and attributes are those of the inode when its layer was complete: names that are hard links of one
    another share them (rule H7). What a hard link in a *later* layer makes of them is in that link's version only.
    """

    path: bytes
    layer: int
    """From 1."""
    entry: int
    """Number in the layer's stream, from 0; -1 if no entry names it."""
    change: Change
    kind: int
    """A value of `ocifs.tree.Kind`; 0 for what is not the kind of thing that a tree has."""
    typeflag: int
    """The type byte of the header; 0 if there is no entry."""
    mode: int
    """The 12 permission bits."""
    uid: int
    gid: int
    mtime_ns: int
    size: int
    """Bytes of a file, holes included; of a hard link, those of the file it leads to."""
    header_offset: int
    """Layer offset of the entry's first header block; -1 if there is no entry."""
    extents: tuple[tuple[int, int, int, int], ...] = ()
    """Where a file's bytes are: (file_offset, layer, layer_offset, size), as in `ocifs.tree.Extent`."""
    target: bytes = b""
    """Of a symlink, or of a hard link as stored."""
    hard_link: bool = False
    unreadable: bool = False
    """Its content is not there: a hard link that leads nowhere, a file that the layer's damage cuts off."""
    rdev: tuple[int, int] = (0, 0)
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    """All that the entry has, also those that are not shown."""
    end: End = End.VISIBLE
    end_layer: int = 0
    """The layer that ended it, 0 if none did."""
    end_entry: int = -1
    """The entry of that layer that did; -1 if it was an implied directory."""
    hides: int = 0
    """Of a marker: how many versions it ended. 0 means that it had no effect."""
