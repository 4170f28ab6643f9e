"""What layers hold and the image does not show: what was removed, by what, and how many bytes nobody sees.

What is removed is never gone: a layer is not written again, so its tar still has the entry and, of a file, the data.

How much is wasted
==================
Counted are bytes of file data as the layers' tars store them: holes, headers and padding are not, and each entry's data
once, for the further names of a file (hard links) have none of their own.

*   stored: the data of all entries of all layers, and *slack*: what lies behind an archive's end, from its first byte that
    is not zero on, or behind the place where a tar breaks off.
*   seen: the data of entries that the image shows, under their own name or another one of the same file.
*   wasted = stored - seen.
*   efficiency = seen / stored; 1 if nothing is stored.

Users of dive know an efficiency, too (its ``filetree/efficiency.go``): the sum over all paths of the smallest size that a
path has in any layer, divided by the sum of all its sizes. Both give the same number where a file was replaced by one of
the same size or was deleted alone. dive counts the smallest version as needed where we count the one that is seen; what a
whiteout removes with its directory, or an opaque marker removes, it counts as needed; a further name of a file has no size
there, and an entry that another one of the same layer overrides does not exist.

Not here: where bytes hide that belong to no file (`ocifs.forensics.slack`); the versions of one path (``ocifs log``).
"""

from __future__ import annotations

import enum
import heapq
from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec

from ocifs.history import Change, End
from ocifs.tree import Kind

if TYPE_CHECKING:
    from ocifs.forensics.examination import Examination
    from ocifs.history import History, Version
    from ocifs.image import OpenLayer


def data_size(version: Version) -> int:
    """Give the bytes of file data that the version's own entry stores: none for a further name of a file."""
    return 0 if version.hard_link else sum(size for _, _, _, size in version.extents)


# -- what was removed ----------------------------------------------------------------------------------------------


class Remnant(msgspec.Struct, frozen=True, gc=False):
    """A version that was removed, or never was in the tree. ``version.end`` says how, ``end_layer`` by which layer."""

    version: Version
    path_visible: bool
    """Whether the image shows something under this path all the same."""


def deleted(examination: Examination, *, replaced: bool = False) -> Iterator[Remnant]:
    """Give what layers hold and the image does not show, in the order of paths, each entry below a removed directory too.

    That is what whiteouts and opaque markers removed; what was below a directory that became something else; entries that
    a later one of their layer overrides; and those that the layer rules leave out. With ``replaced`` also what a later
    layer has something else for under the same path. A directory that only got other attributes is not removed.
    """
    for _, versions in examination.history.paths():
        if len(versions) == 1 and versions[0].end is End.VISIBLE:
            continue
        visible = any(version.end is End.VISIBLE for version in versions)
        by_entry = {(version.layer, version.entry): version for version in versions}
        for version in versions:
            successor = by_entry.get((version.end_layer, version.end_entry))
            if _is_removed(version, successor, replaced=replaced):
                yield Remnant(version, visible)


def _is_removed(version: Version, successor: Version | None, *, replaced: bool) -> bool:
    """Say so of a version; ``successor`` is what took its place under its own path, if that is how it ended."""
    if version.end is End.VISIBLE or version.change is Change.MARKER or not version.kind:
        return False
    if version.end not in (End.REPLACED, End.OVERRIDDEN):
        return True
    if successor is not None and successor.kind == version.kind == Kind.DIR:
        return False
    return version.end is End.OVERRIDDEN or replaced or successor is None


# -- what is wasted ------------------------------------------------------------------------------------------------


class Cause(enum.StrEnum):
    """Why nobody sees the bytes. The values are stable."""

    WHITEOUT = "whiteout"
    OPAQUE = "opaque"
    REPLACED = "replaced"
    OVERRIDDEN = "overridden"
    LEFT_OUT = "left-out"
    SLACK = "slack"


_CAUSES = {
    End.WHITEOUT: Cause.WHITEOUT,
    End.OPAQUE: Cause.OPAQUE,
    End.REPLACED: Cause.REPLACED,
    End.OVERRIDDEN: Cause.OVERRIDDEN,
    End.LEFT_OUT: Cause.LEFT_OUT,
}


class Wasted(msgspec.Struct, frozen=True, gc=False):
    """Bytes that nobody sees: at least 1."""

    path: bytes
    """Empty for slack."""
    layer: int
    """That stores them, from 1."""
    size: int
    cause: Cause
    by: int
    """The layer that removed or replaced them; 0 for what was left out and for slack."""


class LayerWaste(msgspec.Struct):
    """Bytes of one layer."""

    layer: int
    stored: int = 0
    wasted: int = 0
    files: int = 0
    """How many files the wasted bytes are of."""


class Waste(msgspec.Struct):
    """All bytes of an image that nobody sees. The terms are those of the module's docstring."""

    layers: list[LayerWaste]
    """All of them, the base first."""
    causes: dict[Cause, int]
    """Bytes by cause, all causes."""
    largest: list[Wasted]
    """The largest first; of one size in the order of paths."""

    @property
    def stored(self) -> int:
        """Bytes of file data and slack in all layers."""
        return sum(layer.stored for layer in self.layers)

    @property
    def wasted(self) -> int:
        """Those that nobody sees."""
        return sum(layer.wasted for layer in self.layers)

    @property
    def efficiency(self) -> float:
        """The part that is seen, 0 to 1."""
        return (self.stored - self.wasted) / self.stored if self.stored else 1.0


def waste(examination: Examination, count: int | None = None) -> Waste:
    """Add up what nobody sees; ``count`` is how many of the largest are named, None: all.

    Memory follows that number, and the number of hard links that the image shows (some 70 bytes each).
    """
    result = Waste([LayerWaste(layer.number) for layer in examination.layers], dict.fromkeys(Cause, 0), [])

    def found() -> Iterator[Wasted]:
        linked = _shown_by_links(examination.history)
        for version in examination.history:
            size = data_size(version)
            if not size:
                continue
            layer = result.layers[version.layer - 1]
            layer.stored += size
            if version.end is not End.VISIBLE and _content(version) not in linked:
                layer.files += 1
                yield Wasted(version.path, version.layer, size, _CAUSES[version.end], version.end_layer)
        for opened in examination.layers:
            size = slack_size(opened)
            if size:
                result.layers[opened.number - 1].stored += size
                yield Wasted(b"", opened.number, size, Cause.SLACK, 0)

    def counted() -> Iterator[Wasted]:
        for one in found():
            result.layers[one.layer - 1].wasted += one.size
            result.causes[one.cause] += one.size
            yield one

    def largest_first(one: Wasted) -> int:
        return -one.size

    everything = counted()
    if count is None:
        result.largest = sorted(everything, key=largest_first)
    else:
        result.largest = heapq.nsmallest(count, everything, key=largest_first)
        for _ in everything:  # nothing is left unless count is 0
            pass
    return result


def _shown_by_links(history: History) -> set[tuple[int, int]]:
    """Give the contents that the image shows under a further name of their file."""
    return {
        _content(version) for version in history if version.hard_link and version.end is End.VISIBLE and version.extents
    }


def _content(version: Version) -> tuple[int, int]:
    return version.extents[0][1:3]


def slack_size(layer: OpenLayer) -> int:
    """Give the bytes behind the end of a layer's archive, from the first that is not zero on, or behind its damage."""
    index = layer.index
    if index.damage is not None:
        return max(0, index.layer_size - index.damage.layer_offset)
    if index.trailing is None or index.trailing.content_offset is None:
        return 0
    return index.layer_size - index.trailing.content_offset
