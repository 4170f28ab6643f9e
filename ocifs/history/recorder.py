"""Watches a merge, and says what became of every entry of every layer.

What it is: an observer of `ocifs.overlay`, which tells it where each entry went and what a layer takes from the tree
below. All rules stay there. In memory it holds every version and every name; it is meant to run in a child process of its
own.

Paths are kept as a tree of names, because a few kilobytes of tar can ask for a million directories, each below the one
before, whose paths would take gigabytes. So memory follows the number of versions, and a version gets its path when it
goes out. Only what never was in a tree has its path all the time, for its names are of nobody else: there memory follows
what the tar spells out.

Three steps for each layer
==========================
1. The layer has been read, and is a tree of its own. Each entry has a *place* in it: a directory and a name. The last entry
   of a place holds it, unless the directory is no longer in the tree, or an implied directory took the name. All other
   entries were overridden within the layer.
2. The layer is put onto the lower tree, which reports what is removed and replaced: the versions there end, and all below.
3. The layer's holders become what their paths are. A version that is still there then was replaced without a report: a
   directory's attributes, or a hard link to the very inode that was there.

Not here: the file that versions are kept in (`ocifs.history.file`).
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Final

from ocifs.history.version import Change, End, Version, sort_key
from ocifs.overlay.paths import normalised
from ocifs.overlay.upper import IMPLIED, WHITEOUT, children_of
from ocifs.tar import EntryType
from ocifs.tree import Kind, Node, Origin

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ocifs.overlay.upper import Upper
    from ocifs.tar import Entry

_KINDS: Final[dict[int, Kind]] = {
    EntryType.FILE: Kind.FILE,
    EntryType.HARDLINK: Kind.FILE,
    EntryType.SYMLINK: Kind.SYMLINK,
    EntryType.CHAR: Kind.CHAR,
    EntryType.BLOCK: Kind.BLOCK,
    EntryType.DIR: Kind.DIR,
    EntryType.FIFO: Kind.FIFO,
}

_Place = tuple[Node, bytes]


class _Path:
    """A path that something had: a name below another one."""

    __slots__ = ("below", "current", "versions")

    def __init__(self) -> None:
        self.below: dict[bytes, _Path] | None = None
        self.versions: list[Version] = []
        self.current: Version | None = None
        """What it is at the moment, if it is there."""

    def child(self, name: bytes) -> _Path:
        if self.below is None:
            self.below = {}
        found = self.below.get(name)
        if found is None:
            found = self.below[name] = _Path()
        return found


class Recorder:
    """Collects versions; hand it to `ocifs.overlay.Merge`, tell it each layer's entries before, and `finish`."""

    def __init__(self) -> None:
        self._root = _Path()
        self._nowhere: list[Version] = []
        """What never was in a tree, with its path."""
        self._entries: Iterable[Entry] = ()
        self._holders: dict[_Path, Version] = {}
        self._markers: dict[int, Version] = {}
        self._opaque: set[int] = set()
        self._gone: set[_Path] = set()
        """Paths that the layer took something from."""
        self._upper: Upper | None = None

    def begin(self, entries: Iterable[Entry]) -> None:
        """Say which layer is merged next: its entries, gone through once more."""
        self._entries = entries

    def finish(self) -> Iterator[Version]:
        """Say that the last layer was merged. Gives the versions, sorted by path, layer and entry; can be called once."""
        self._install()
        self._nowhere.sort(key=_order)
        return heapq.merge(_sorted(self._root), self._nowhere, key=_order)

    # --- a layer on its own -------------------------------------------------------------------------------------------

    def read(self, upper: Upper) -> None:
        """Take what `ocifs.overlay.Observer.read` says."""
        self._install()
        self._upper = upper
        places = upper.places or []
        holder: dict[_Place, int] = {}
        next_at: dict[_Place, int] = {}
        taken_by: dict[int, int] = {}
        for number in reversed(range(len(places))):
            place = places[number]
            if place is not None:
                if place in next_at:
                    taken_by[number] = next_at[place]
                else:
                    holder[place] = number
                next_at[place] = number
        tree = _LayerTree(upper, holder, self._root)
        devices = {marker.number for hidden in upper.whiteouts.values() for marker in hidden.values()}
        self._opaque = {marker.number for marker in upper.opaque.values()}
        effective = devices | self._opaque
        for number, (entry, place) in enumerate(zip(self._entries, places, strict=True)):
            version = _version(upper.layer, number, entry)
            if place is None:
                version.change, version.end = Change.NONE, End.LEFT_OUT
                version.path = b"/".join(normalised(entry.path)[0])
                self._nowhere.append(version)
                continue
            directory, name = place
            path = tree.path(directory, name)
            path.versions.append(version)
            if name.startswith(WHITEOUT) or number in effective:
                version.change, version.end = Change.MARKER, End.LEFT_OUT
                if number in effective:
                    self._markers[number] = version
                elif number in taken_by:
                    version.end, version.end_layer, version.end_entry = End.OVERRIDDEN, upper.layer, taken_by[number]
                continue
            node = upper.linked.get(number)
            taker = tree.taker(directory, name, number, taken_by)
            if taker is None:
                self._holders[path] = version
                node = children_of(directory)[name] if name else upper.root
            else:
                version.change, version.end = Change.NONE, End.OVERRIDDEN
                version.end_layer, version.end_entry = upper.layer, taker
            if node is not None:
                _take(version, node)

    # --- onto the lower tree ------------------------------------------------------------------------------------------

    def removed(self, layer: int, path: bytes, node: Node, by: Origin) -> None:
        """Take what `ocifs.overlay.Observer.removed` says."""
        how = End.OPAQUE if by.entry in self._opaque else End.WHITEOUT
        marker = self._markers.get(by.entry)
        for there in self._there(path, node):
            if self._end(there, how, layer, by.entry) and marker is not None:
                marker.hides += 1

    def replaced(self, layer: int, path: bytes, old: Node, new: Node) -> None:
        """Take what `ocifs.overlay.Observer.replaced` says."""
        found = self._path(path)
        by = self._holders.get(found)
        whole = old.kind is not Kind.DIR or new.kind is not Kind.DIR
        for there in self._there(path, old) if whole else (found,):
            self._end(there, End.REPLACED, layer, IMPLIED if by is None else by.entry)

    def _path(self, path: bytes) -> _Path:
        found = self._root
        for name in path.split(b"/") if path else ():
            found = found.child(name)
        return found

    def _there(self, path: bytes, node: Node) -> Iterator[_Path]:
        """Give the path of a node of the lower tree, and those of everything below it."""
        stack = [(self._path(path), node)]
        while stack:
            found, node = stack.pop()
            yield found
            if node.children:
                stack.extend((found.child(name), child) for name, child in node.children.items())

    def _end(self, path: _Path, how: End, layer: int, entry: int) -> bool:
        version, path.current = path.current, None
        if version is None:
            return False
        version.end, version.end_layer, version.end_entry = how, layer, entry
        self._gone.add(path)
        return True

    def _install(self) -> None:
        """Let the layer's versions be what their paths are."""
        upper = self._upper
        if upper is None:
            return
        for path, version in self._holders.items():
            self._end(path, End.REPLACED, version.layer, version.entry)
            version.change = Change.CHANGED if path in self._gone else Change.ADDED
            path.current = version
        for path in _implied(upper, self._root):
            if path.current is None:
                change = Change.CHANGED if path in self._gone else Change.ADDED
                version = Version(b"", upper.layer, IMPLIED, change, Kind.DIR, 0, 0o755, 0, 0, 0, 0, -1)
                path.versions.append(version)
                path.current = version
        self._upper = None
        self._holders, self._markers, self._gone = {}, {}, set()


class _LayerTree:
    """Questions about the finished tree of a layer, each answered once."""

    def __init__(self, upper: Upper, holder: dict[_Place, int], root: _Path) -> None:
        self._upper = upper
        self._holder = holder
        self._paths: dict[Node, _Path] = {upper.root: root}
        self._takers: dict[Node, int | None] = {upper.root: None}

    def path(self, directory: Node, name: bytes) -> _Path:
        above = self._path_of(directory)
        return above.child(name) if name else above

    def _path_of(self, directory: Node) -> _Path:
        chain = []
        while directory not in self._paths:
            chain.append(directory)
            directory = self._upper.parents[directory][0]
        for node in reversed(chain):
            parent, name = self._upper.parents[node]
            self._paths[node] = self._paths[parent].child(name)
        return self._paths[chain[0] if chain else directory]

    def taker(self, directory: Node, name: bytes, number: int, taken_by: dict[int, int]) -> int | None:
        """Say which entry of the layer took the place of entry ``number``; -1 for an implied directory, None: nobody."""
        if number in taken_by:
            return taken_by[number]
        if not name:
            return None
        there = children_of(directory).get(name)
        if there is None or (there.origin == Origin(self._upper.layer, IMPLIED)):
            return IMPLIED
        return self._taker_of(directory)

    def _taker_of(self, directory: Node) -> int | None:
        """Say the same of a directory, or of the nearest one above it that is no longer in the tree."""
        chain = []
        found = None
        while directory not in self._takers:
            chain.append(directory)
            parent, name = self._upper.parents[directory]
            if children_of(parent).get(name) is not directory:
                found = self._holder.get((parent, name), IMPLIED)
                break
            directory = parent
        else:
            found = self._takers[directory]
        for node in chain:
            self._takers[node] = found
        return found


def _version(layer: int, number: int, entry: Entry) -> Version:
    kind = _KINDS.get(entry.type, 0)
    offset = entry.data_offset
    extents = []
    for file_offset, size in entry.sparse if entry.sparse is not None else [(0, entry.size)] if entry.size else []:
        extents.append((file_offset, layer, offset, size))
        offset += size
    return Version(
        b"",
        layer,
        number,
        Change.ADDED,
        kind,
        entry.typeflag,
        0o777 if kind == Kind.SYMLINK else entry.mode,
        entry.uid,
        entry.gid,
        entry.mtime_ns,
        entry.size,
        entry.header_offset,
        tuple(extents),
        entry.link,
        hard_link=entry.type == EntryType.HARDLINK,
        rdev=entry.rdev,
        xattrs=entry.xattrs,
    )


def _take(version: Version, node: Node) -> None:
    """Let a version be what became of its entry: for a hard link that is the inode it leads to.

    Attributes are the inode's for all its names, as the last header in the layer gave them (H7).
    """
    version.kind = node.kind
    version.unreadable = node.unreadable
    version.mode, version.uid, version.gid, version.mtime_ns = node.mode, node.uid, node.gid, node.mtime_ns
    if version.xattrs or node.xattrs:
        version.xattrs = tuple((dict(version.xattrs) | dict(node.xattrs)).items())
    if version.hard_link:
        version.size, version.rdev = node.size, node.rdev
        version.extents = tuple((e.file_offset, e.layer, e.layer_offset, e.size) for e in node.extents)
    if node.unreadable:
        version.extents = ()


def _order(version: Version) -> tuple[bytes, int, int]:
    return sort_key(version.path), version.layer, version.entry


def _sorted(root: _Path) -> Iterator[Version]:
    """Give every version of a path and of those below it, with its path: which is the order of `sort_key`."""
    stack = [(b"", b"", root)]
    while stack:
        above, name, found = stack.pop()
        path = above + b"/" + name if above else name
        found.versions.sort(key=lambda version: (version.layer, version.entry))
        for version in found.versions:
            version.path = path
            yield version
        found.versions = []  # who takes a version need not keep it
        below, found.below = found.below, None
        if below is not None:
            stack.extend((path, each, below[each]) for each in sorted(below, reverse=True))


def _implied(upper: Upper, root: _Path) -> Iterator[_Path]:
    """Give the directories of a layer's tree that no entry names, the root too."""
    stack = [(root, upper.root)]
    while stack:
        path, node = stack.pop()
        if node.origin == Origin(upper.layer, IMPLIED):
            yield path
        for name, child in children_of(node).items():
            if child.kind is Kind.DIR:
                stack.append((path.child(name), child))
