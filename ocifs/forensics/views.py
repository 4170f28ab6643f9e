"""The trees below ``.ocifs`` of an examined mount, made of an image's history: ordinary image trees, kept as such.

``layers`` and ``upto`` are trees that `ocifs.image` merges anyhow. The others are made here:

``deleted``
    What whiteouts, opaque markers and replacements removed. ``LNN/PATH`` is what layer NN removed; ``PATH`` is the latest
    removed version of every path. A directory that a later layer only gave other attributes was not removed; directories
    that lead to something removed are shown as they were just before.

    Where a path was a directory with something removed in it and later, or before, something else that was removed, too,
    the directory has the name and the other thing is called ``NAME~LNN``, NN being who removed it. A name at the top that
    looks like the directory of a layer (``L04``) gives way to it and is found in that one (``L04/L04``).

``history``
    Every path is a directory, in which each of its versions has a name: ``LNN-added`` or ``LNN-changed``, by layer NN, and
    ``LNN-deleted``, an empty file with the time of the marker. An entry that a later one of the same layer overrides is
    ``LNN-overridden``, further ones ``LNN-overridden~2`` and so on. A version that is a directory is an empty directory
    with its attributes. If the path is a directory in which something has such a name, the version's gets a ``~``.

``slack``
    Of one layer: a file for each of its `ocifs.forensics.slack.regions`, called ``OFFSET-KIND`` with the layer offset in
    twelve digits, and ``.benign`` behind that if it is.

Every name of a hard link is a file of its own here, since its names were there at different times. Numbers of layers
have two digits, or as many as that of the last layer.

Not here: who asks for a tree and when (`ocifs.forensics.workshop`), how it is served (`ocifs.forest`).
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import TYPE_CHECKING, Final

import msgspec

from ocifs import image_tree
from ocifs.erofs.layout import NAME_MAX
from ocifs.forensics import slack
from ocifs.history import Change, End
from ocifs.image import Silent, kept_tree
from ocifs.overlay.upper import children_of, shown_xattr
from ocifs.rules import RULES_VERSION
from ocifs.tree import Extent, Kind, Node, Origin, Tree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ocifs.forensics.examination import Examination
    from ocifs.history import Version
    from ocifs.image_tree import ImageTree
    from ocifs.store import Store, StoredFile

DIRECTORY: Final = b".ocifs"
"""What the directory of views is called, in the root of an examined mount."""

VIEWS_VERSION: Final = 1
"""Part of the key of a kept tree: raise it whenever the same layers can come out differently."""

NOBODY: Final = -1
"""The entry of `ocifs.tree.Origin` where no entry made a node."""

_REMOVED: Final = (End.WHITEOUT, End.OPAQUE, End.REPLACED)
SHOWN: Final = (Change.ADDED, Change.CHANGED)
"""Changes of versions that were in the tree."""


def open_view(
    examination: Examination, name: str, store: Store, *, layer: int = 0, all_xattrs: bool = False
) -> tuple[ImageTree, StoredFile]:
    """Open a tree of the store, made first if need be: ``deleted``, ``history``, or ``slack`` of ``layer``.

    Made in a forked child, so the caller has no second thread. Raises what decoding a layer raises.
    """
    make: Callable[[], Tree] = {
        "deleted": lambda: deleted(examination, all_xattrs=all_xattrs),
        "history": lambda: history(examination, all_xattrs=all_xattrs),
        "slack": lambda: slack_of(examination, layer),
    }[name]
    made_from = (
        VIEWS_VERSION,
        image_tree.FORMAT_VERSION,
        RULES_VERSION,
        name,
        layer,
        all_xattrs,
        examination.history.key,
    )
    key = hashlib.sha256(b"view" + msgspec.json.encode(made_from)).hexdigest()
    return kept_tree(key, examination.layers, make, store, Silent())


def number(layer: int, last: int) -> str:
    """Write the number of a layer for a name, ``last`` being that of the last layer."""
    return str(layer).zfill(max(2, len(str(last))))


def _last(examination: Examination) -> int:
    return max((layer.number for layer in examination.layers), default=0)


def _directory() -> Node:
    """Give a directory that is ours, not the image's."""
    return Node(Kind.DIR, Origin(0, NOBODY), mode=0o555, children={})


def _node(version: Version, *, all_xattrs: bool) -> Node:
    """Give what a version was; a directory is empty."""
    kind = Kind(version.kind)
    return Node(
        kind,
        Origin(version.layer, version.entry),
        version.mode,
        version.uid,
        version.gid,
        version.mtime_ns,
        version.size if kind is Kind.FILE else 0,
        tuple(Extent(*extent) for extent in version.extents),
        version.target if kind is Kind.SYMLINK else b"",
        version.rdev,
        tuple(sorted({name: value for name, value in version.xattrs if shown_xattr(name, every=all_xattrs)}.items())),
        children={} if kind is Kind.DIR else None,
        unreadable=version.unreadable,
    )


def _components(path: bytes) -> list[bytes] | None:
    """Split a path; None if a directory cannot have one of its names."""
    names = path.split(b"/") if path else []
    return None if any(len(name) > NAME_MAX or name in (b"", b".", b"..") for name in names) else names


def _name_with(name: bytes, suffix: bytes, taken: dict[bytes, Node]) -> bytes:
    """Give a name that nothing in a directory has, and that is not too long."""
    while True:
        made = name[: NAME_MAX - len(suffix)] + suffix
        if made not in taken:
            return made
        suffix += b"~"


# --- deleted ----------------------------------------------------------------------------------------------------------


class _Removed:
    """A tree that removed versions are put into, in the order of their paths."""

    def __init__(self, *, all_xattrs: bool) -> None:
        self.root = _directory()
        self._all_xattrs = all_xattrs
        self._moved: list[tuple[dict[bytes, Node], bytes, bytes, Node]] = []

    def put(
        self, names: list[bytes], version: Version, above: list[list[Version]], suffix: Callable[[int], bytes]
    ) -> None:
        """Put a version where ``names`` lead; ``above`` has the versions of each directory on the way, the root first."""
        here = self.root
        for depth, name in enumerate(names[:-1], 1):
            children = children_of(here)
            there = children.get(name)
            if there is None or there.kind is not Kind.DIR:
                made = self._leading(above[depth], version.end_layer)
                if there is not None:
                    ended = max(one.end_layer for one in above[depth] if is_removed(one, above[depth]))
                    self._moved.append((children, name, suffix(ended), there))
                there = children[name] = made
            here = there
        if names:
            children_of(here)[names[-1]] = _node(version, all_xattrs=self._all_xattrs)

    def _leading(self, versions: list[Version], before: int) -> Node:
        """Give a directory as it was before layer ``before``, empty."""
        were = [one for one in versions if one.kind == Kind.DIR and one.change in SHOWN]
        found = max((one for one in were if one.layer < before), key=lambda one: one.layer, default=None)
        return _directory() if found is None else _node(found, all_xattrs=self._all_xattrs)

    def finish(self) -> Node:
        """Give names to what had to make way, once all others are given; returns the root."""
        for children, name, suffix, node in self._moved:
            children[_name_with(name, suffix, children)] = node
        return self.root


def is_removed(version: Version, versions: list[Version]) -> bool:
    """Whether a version was taken out of the tree; ``versions`` are all of its path."""
    if version.change not in SHOWN or version.end not in _REMOVED:
        return False
    if version.end is not End.REPLACED or version.kind != Kind.DIR:
        return True
    return not any(one.kind == Kind.DIR and one.change in SHOWN and one.layer == version.end_layer for one in versions)


def _with_directories(examination: Examination) -> Iterator[tuple[bytes, list[Version], list[list[Version]]]]:
    """Give each path, its versions, and those of each directory above it, the root first."""
    stack: list[tuple[bytes, list[Version]]] = []
    for path, versions in examination.history.paths():
        names = path.split(b"/") if path else []
        while stack and not _is_above(stack[-1][0], path):
            stack.pop()
        # What has no version of its own (all that is below it was overridden) leaves a gap.
        depths = {len(above.split(b"/")) if above else 0: found for above, found in stack}
        yield path, versions, [depths.get(depth, []) for depth in range(len(names))]
        stack.append((path, versions))


def _is_above(directory: bytes, path: bytes) -> bool:
    return not directory or path.startswith(directory + b"/")


def deleted(examination: Examination, *, all_xattrs: bool = False) -> Tree:
    """Make the tree of what was removed; see above."""
    last = _last(examination)
    latest = _Removed(all_xattrs=all_xattrs)
    by_layer: dict[int, _Removed] = {}

    def suffix(layer: int) -> bytes:
        return f"~L{number(layer, last)}".encode()

    for path, versions, above in _with_directories(examination):
        removed = [version for version in versions if is_removed(version, versions)]
        names = _components(path)
        if not removed or not names:
            continue
        for version in removed:
            of_layer = by_layer.setdefault(version.end_layer, _Removed(all_xattrs=all_xattrs))
            of_layer.put(names, version, above, suffix)
        latest.put(names, max(removed, key=lambda version: version.end_layer), above, suffix)
    root = latest.finish()
    for layer, of_layer in by_layer.items():
        children_of(root)[f"L{number(layer, last)}".encode()] = of_layer.finish()
    return Tree(root)


# --- history ----------------------------------------------------------------------------------------------------------


def history(examination: Examination, *, all_xattrs: bool = False) -> Tree:
    """Make the tree of all versions of all paths; see above."""
    last = _last(examination)
    root = _directory()
    # The directories from the root to where we are, each with the versions that get a name when all in it have theirs.
    open_: list[tuple[bytes, Node, list[tuple[bytes, Node]]]] = [(b"", root, [])]

    def close() -> None:
        _, directory, versions = open_.pop()
        children = children_of(directory)
        for name, node in versions:
            children[_name_with(name, b"", children)] = node

    @lru_cache(maxsize=1024)
    def time_of(layer: int, entry: int) -> int:
        return 0 if entry < 0 else examination.history.by_entry(layer, entry).mtime_ns

    for path, versions in examination.history.paths():
        found = list(_versions(versions, last, time_of, all_xattrs=all_xattrs))
        names = _components(path)
        if not found or names is None:
            continue
        while len(open_) > len(names) + 1 or any(
            there[0] != name for there, name in zip(open_[1:], names, strict=False)
        ):
            close()
        for name in names[len(open_) - 1 :]:
            made = children_of(open_[-1][1]).setdefault(name, _directory())
            open_.append((name, made, []))
        open_[-1][2].extend(found)
    while open_:
        close()
    return Tree(root)


def _versions(
    versions: list[Version], last: int, time_of: Callable[[int, int], int], *, all_xattrs: bool
) -> Iterator[tuple[bytes, Node]]:
    """Give the name and node of each version of a path, by layer."""
    began = {version.layer for version in versions if version.change in SHOWN}
    overridden = 0
    layer = 0
    for version in versions:
        if version.layer != layer:
            layer, overridden = version.layer, 0
        by = f"L{number(version.layer, last)}"
        if version.change in SHOWN:
            how = "added" if version.change is Change.ADDED else "changed"
            yield f"{by}-{how}".encode(), _node(version, all_xattrs=all_xattrs)
        elif version.end is End.OVERRIDDEN and version.kind and version.change is Change.NONE:
            overridden += 1
            again = f"~{overridden}" if overridden > 1 else ""
            yield f"{by}-overridden{again}".encode(), _node(version, all_xattrs=all_xattrs)
        if version.change in SHOWN and version.end in _REMOVED and version.end_layer not in began:
            name = f"L{number(version.end_layer, last)}-deleted".encode()
            origin = Origin(version.end_layer, version.end_entry)
            mtime_ns = time_of(version.end_layer, version.end_entry)
            yield name, Node(Kind.FILE, origin, mode=0o444, mtime_ns=mtime_ns)


# --- slack ------------------------------------------------------------------------------------------------------------


def slack_of(examination: Examination, layer: int) -> Tree:
    """Make the tree of a layer's slack; see above. Decodes the layer."""
    root = _directory()
    for region in slack.regions(examination, layer):
        name = f"{region.layer_offset:012}-{region.kind}{'.benign' if region.kind.benign else ''}"
        extent = Extent(0, layer, region.layer_offset, region.size)
        node = Node(Kind.FILE, Origin(layer, NOBODY), mode=0o444, size=region.size, extents=(extent,))
        children_of(root)[name.encode()] = node
    return Tree(root)
