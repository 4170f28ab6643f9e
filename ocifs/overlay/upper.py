"""One layer as a tree of its own: what its entries make of an empty root, in stream order.

The theory is in `ocifs.overlay`. Not here: what whiteouts do (`ocifs.overlay.combination`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from ocifs.errors import DamagedError
from ocifs.overlay.paths import NAME_MAX, PATH_MAX, SPELT_MAX, components, excess, normalised, shown
from ocifs.tar import Entry, EntryType
from ocifs.tree import Extent, Kind, Node, Origin, Tree, Warned

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ocifs.overlay import LayerInput, MergeOptions

WHITEOUT: Final = b".wh."
OPAQUE: Final = b".wh..wh..opq"
AUFS: Final = b".wh..wh."
NAMELESS: Final = frozenset({b".wh.", b".wh..", b".wh..."})
OVERLAY_XATTRS: Final = (b"trusted.overlay.", b"user.overlay.")

LINKS_MAX: Final = 255  # containerd's fs.RootPath; the kernel itself stops at 40
FOLLOWED_MAX: Final = (
    2**22
)  # components of symlink targets: seconds, where 255 links of 2,048 each take one path a second
XATTR_VALUE_MAX: Final = 65_535  # EROFS has 16 bits for it; Linux allows one byte more
XATTRS_MAX: Final = 65_536  # bytes; linux/limits.h, XATTR_LIST_MAX for the names, here with the values
IMPLIED_MAX: Final = 2**20
IMPLIED_ALL_MAX: Final = 2**22  # in all layers together: some GB, in 10 MB of tar
WARNINGS_MAX: Final = 1000

IMPLIED: Final = -1
WHITEOUT_DEVICE: Final = (0, 0)

_DOT: Final = 0x2E
_AGAIN: Final = "the path occurs again in this layer, and the later entry counts"
_KINDS: Final[dict[int, Kind]] = {
    EntryType.FILE: Kind.FILE,
    EntryType.SYMLINK: Kind.SYMLINK,
    EntryType.CHAR: Kind.CHAR,
    EntryType.BLOCK: Kind.BLOCK,
    EntryType.DIR: Kind.DIR,
    EntryType.FIFO: Kind.FIFO,
}


class Numbered(NamedTuple):
    """An entry and its number in the stream, from 0."""

    number: int
    entry: Entry


class _Found(NamedTuple):
    """Where a path leads: a node, or none; its path if that is the lower's; the placeholder that is in the way."""

    node: Node | None
    borrowed: bytes | None = None
    blocked: Node | None = None


_MISSING: Final = _Found(None)


class _Waiting(msgspec.Struct, eq=False):
    """A hard link whose target was not there yet (H5), with everything that was linked to it meanwhile.

    ``names`` and ``headers`` belong together pairwise, this link's first.
    """

    entry: Entry
    placeholder: Node
    names: list[tuple[Node, bytes]]
    headers: list[Numbered]


class Upper:
    """One layer while it is read."""

    def __init__(
        self, layer: LayerInput, tree: Tree, options: MergeOptions, *, places: bool = False, implied: int = 0
    ) -> None:
        """Begin with an empty root; ``tree`` is the lower, whose warnings go on.

        ``places`` asks for `places`; ``implied`` is how many directories lower layers made that no entry names.
        """
        self.layer = layer.number
        self.options = options
        self.root = Node(Kind.DIR, Origin(layer.number, IMPLIED), children={})
        self.whiteouts: dict[Node, dict[bytes, Numbered]] = {}
        """Names that a directory's whiteouts hide."""
        self.opaque: dict[Node, Numbered] = {}
        self.places: list[tuple[Node, bytes] | None] | None = [] if places else None
        """For each entry the directory and the name that it went to, also if something took that place later; None where
        it went nowhere. The root's name is empty."""
        self.linked: dict[int, Node] = {}
        """With `places`, what each hard link led to when it was read, by its number."""
        self.parents: dict[Node, tuple[Node, bytes]] = {}
        """With `places`, the directory and the name of each directory but the root, also of those replaced later."""
        self._lower = tree.root
        self._warnings = tree.warnings
        self._warned: dict[str, int] = {}
        self._examining = options.examine or options.single_layer
        # Directories by the part of a path before its last slash, as entries spell it: it makes most entries two
        # look-ups. Emptied when a name that a cached path may go through changes its kind.
        self._directories: dict[bytes, Node] = {b"": self.root}
        # Files that are in no tree but can be linked to: AUFS' own (W18), and names that are too long (T17).
        self._hidden: dict[bytes, Node] = {}
        self._devices: list[tuple[Node, bytes, Node, Numbered]] = []
        self._waiting: dict[Node, _Waiting] = {}
        self._borrowed: list[tuple[bytes, Entry]] = []
        self._stamps: dict[Node, int] = {}  # number of the last link entry whose header went into a node (H7)
        self.implied = 0
        """Directories made so far that no entry names."""
        self._implied_before = implied
        self._followed = 0

    # --- what is said about an entry --------------------------------------------------------------------------------

    def _warn(self, rule: str, path: bytes, message: str) -> None:
        count = self._warned.get(rule, 0)
        self._warned[rule] = count + 1
        if count < WARNINGS_MAX:
            self._warnings.append(Warned(rule, self.layer, path, message))

    def _refuse(self, rule: str, entry: Entry, problem: str) -> None:
        """Raise for an entry that breaks a rule; under examination warn."""
        if not self._examining:
            raise self._error(rule, entry, f"{problem}; --examine shows the image nevertheless")
        self._warn(rule, entry.path, problem)

    def _error(self, rule: str, entry: Entry, problem: str) -> DamagedError:
        return DamagedError(
            f"layer {self.layer} is refused by rule {rule}: entry {shown(entry.path)} at layer offset "
            f"{entry.header_offset}: {problem}"
        )

    # --- the stream -------------------------------------------------------------------------------------------------

    def read(self, layer: LayerInput) -> None:  # noqa: C901, PLR0912 (see the next comment)
        """Apply the layer's entries."""
        # One long function: a million turns, and each further call would cost as much as three of its lines.
        for notice in layer.notices:
            self._warn(notice.rule, notice.path, notice.message)
        if layer.damage is not None:
            damage = f"rule {layer.damage.rule} at layer offset {layer.damage.layer_offset}: {layer.damage.message}"
            if not self._examining:
                raise DamagedError(
                    f"layer {self.layer} is refused by {damage}; --examine shows what comes before the damage"
                )
            self._warn(layer.damage.rule, b"", layer.damage.message)
        number_of_layer = self.layer
        directories = self._directories
        places = self.places
        node = self.root
        for number, entry in enumerate(layer.entries):
            path = entry.path
            if places is not None:
                places.append(None)
            head, _, name = (path[:-1] if path[-1:] == b"/" else path).rpartition(b"/")
            parent = directories.get(head)
            if (
                parent is None
                or not name
                or (name[0] == _DOT and (name[:4] == WHITEOUT or name in {b".", b".."}))
                or len(name) > NAME_MAX
                or len(path) > PATH_MAX
            ):
                where = self._locate(entry, number)
                if where is None:
                    continue
                parent, name = where
            siblings = children_of(parent)
            kind = entry.type
            if places is not None and kind != EntryType.OTHER:
                places[-1] = parent, name
            if kind == EntryType.FILE and entry.sparse is None and not entry.xattrs:
                size = entry.size
                node = Node(
                    Kind.FILE,
                    Origin(number_of_layer, number),
                    entry.mode,
                    entry.uid,
                    entry.gid,
                    entry.mtime_ns,
                    size,
                    (Extent(0, number_of_layer, entry.data_offset, size),) if size else (),
                )
            elif kind == EntryType.HARDLINK:
                self._link(parent, name, Numbered(number, entry))
                continue
            elif kind == EntryType.OTHER:  # the scanner has said so (D8)
                continue
            elif kind == EntryType.DIR and (existing := siblings.get(name)) and existing.kind is Kind.DIR:
                self._name_directory(existing, Numbered(number, entry))
                continue
            else:
                node = self._make(Numbered(number, entry))
                if node.kind is Kind.CHAR and node.rdev == WHITEOUT_DEVICE:
                    self._devices.append((parent, name, node, Numbered(number, entry)))
                if places is not None and kind == EntryType.DIR:
                    self.parents[node] = parent, name
            if name in siblings:
                self._replace(parent, name, node, path)
            else:
                siblings[name] = node
        if layer.damage is not None and node.extents:
            # Where a layer breaks off, the data of its last file may be missing: then reading it is an error.
            last = node.extents[-1]
            if last.layer_offset + last.size > layer.damage.layer_offset:
                node.extents, node.unreadable = (), True

    def _locate(self, entry: Entry, number: int) -> tuple[Node, bytes] | None:  # noqa: PLR0911 (a rule each)
        """Find where an entry goes, for every path that is not plain; None: nowhere, or it was a marker."""
        path = entry.path
        if entry.type == EntryType.OTHER:
            return None
        if not path:
            self._warn("T15", path, "an entry without a name is skipped")
            return None
        if len(path) > SPELT_MAX:
            self._warn("L1", path[:PATH_MAX], f"a path of {len(path)} bytes is left out of the tree")
            return None
        names, clamped = normalised(path)
        if clamped:
            self._warn("T13", path, "the path leads out of the root and is clamped to it")
        if not names:
            if entry.type == EntryType.DIR:
                self._place(self.root, b"")
                self._name_directory(self.root, Numbered(number, entry))
            else:
                self._refuse("T14", entry, "the root would not be a directory")
            return None
        name = names[-1]
        if names[0].startswith(AUFS) and names[0] != OPAQUE:
            self._hide(names, Numbered(number, entry))
            return None
        marker = name.startswith(WHITEOUT)
        if name in NAMELESS:
            self._refuse("W15", entry, "a whiteout that names nothing, its directory or the parent of that")
            return None
        too_long = excess([*names[:-1], name[len(WHITEOUT) :]] if marker else names)
        if too_long is not None:
            self._warn(too_long[0], path, too_long[1])
            if not marker:
                self._hide(names, Numbered(number, entry))
            return None
        head = b"/".join(names[:-1])
        parent = self._directories.get(head)
        if parent is None:
            parent = self._walk(names[:-1], entry)
            if parent is None:
                return None
            self._remember(head, parent)
        spelt_head, _, spelt_name = path.rstrip(b"/").rpartition(b"/")
        if spelt_name == name and not clamped:
            self._remember(spelt_head, parent)
        if marker:
            self._mark(parent, name, Numbered(number, entry))
            return None
        return parent, name

    def _remember(self, head: bytes, directory: Node) -> None:
        # By way of a lower symlink a path stops leading there as soon as anything takes or hides the symlink's name.
        if not self.options.follow_dirlinks:
            self._directories[head] = directory

    def _mark(self, directory: Node, name: bytes, marker: Numbered) -> None:
        """Note a whiteout (W1) or an opaque marker (W11) beside its directory."""
        self._place(directory, name)
        if name == OPAQUE:
            again = directory in self.opaque
            self.opaque[directory] = marker
        elif name.startswith(AUFS):  # hidden, without any effect (W19)
            return
        else:
            hidden = self.whiteouts.setdefault(directory, {})
            again = name[len(WHITEOUT) :] in hidden
            hidden[name[len(WHITEOUT) :]] = marker
        if again:
            self._warn("T5", marker.entry.path, _AGAIN)

    def _place(self, directory: Node, name: bytes) -> None:
        """Note where the current entry went."""
        if self.places is not None:
            self.places[-1] = directory, name

    def _name_directory(self, directory: Node, header: Numbered) -> None:
        """Give a directory of this layer, implied or not, the attributes of its entry (T5, T14)."""
        if directory.origin.entry != IMPLIED:
            self._warn("T5", header.entry.path, _AGAIN)
        directory.origin = Origin(self.layer, header.number)
        directory.mode = header.entry.mode
        directory.xattrs = ()
        self._put_attributes(directory, header.entry)

    def _hide(self, names: Sequence[bytes], header: Numbered) -> None:
        """Keep a file that is in no tree, for hard links to it."""
        if header.entry.type == EntryType.FILE:
            self._hidden[b"/".join(names)] = self._make(header)
        elif header.entry.type == EntryType.HARDLINK:
            node = self._find(header.entry.link).node
            if node is not None and node.kind is not Kind.DIR and node not in self._waiting:
                self._hidden[b"/".join(names)] = node

    def _replace(self, parent: Node, name: bytes, node: Node, path: bytes) -> None:
        """Put ``node`` where this layer has something already; never a directory onto a directory."""
        siblings = children_of(parent)
        existing = siblings[name]
        if node.origin.entry == IMPLIED:
            self._warn("T3", path, "something on its path is not a directory, and becomes one")
        elif existing.origin.entry == IMPLIED:
            self._warn("T3", path, "it replaces a directory that this layer has filled before")
        else:
            self._warn("T5", path, _AGAIN)
        siblings[name] = node
        if existing.kind in (Kind.DIR, Kind.SYMLINK):
            self._directories.clear()
            self._directories[b""] = self.root

    # --- parents ----------------------------------------------------------------------------------------------------

    def _walk(self, names: Sequence[bytes], entry: Entry) -> Node | None:
        """Find the directory that ``names`` lead to, made where it is missing (T3, T6, T10); None if it cannot be."""
        todo = list(names[::-1])
        below = self._lower if self.options.follow_dirlinks else None
        stack: list[tuple[Node, Node | None, bytes, int]] = [(self.root, below, b"", 0)]
        links = 0
        while todo:
            name = todo.pop()
            if name == b"..":
                if len(stack) > 1:
                    stack.pop()
                continue
            node, below, _, length = stack[-1]
            siblings = children_of(node)
            child = link = siblings.get(name)
            if below is not None:
                below = None if self._hides(node, name) else (below.children or {}).get(name)
                if child is None and below is not None and below.kind is Kind.SYMLINK:
                    end = self._resolve([*(part for _, _, part, _ in stack[1:]), name], follow_last=True).node
                    link = below if end is not None and end.kind is Kind.DIR else None
            if link is not None and link.kind is Kind.SYMLINK:
                links += 1
                more = components(link.target)
                self._followed += 1 + len(more)
                if links > LINKS_MAX or self._followed > FOLLOWED_MAX:
                    self._refuse("L3", entry, "the symlinks on its path form a loop, or are too many")
                    return None
                if link.target.startswith(b"/"):
                    del stack[1:]
                todo += more[::-1]
                continue
            length += len(name) + 1
            if child is None or child.kind is not Kind.DIR:
                if len(name) > NAME_MAX or length > PATH_MAX + 1:  # by way of a symlink
                    self._warn("L1", entry.path, "symlinks lead it to a path that is too long, so it is left out")
                    return None
                child = self._imply(node, name, entry)
            stack.append((child, below if below is not None and below.kind is Kind.DIR else None, name, length))
        return stack[-1][0]

    def _imply(self, parent: Node, name: bytes, entry: Entry) -> Node:
        """Make a directory that no entry names."""
        self.implied += 1
        if self.implied > IMPLIED_MAX:
            raise self._error("L5", entry, f"the layer asks for over {IMPLIED_MAX} directories that no entry names")
        if self.implied + self._implied_before > IMPLIED_ALL_MAX:
            problem = f"with those below it the layer asks for over {IMPLIED_ALL_MAX} directories that no entry names"
            raise self._error("L5", entry, problem)
        directory = Node(Kind.DIR, Origin(self.layer, IMPLIED), children={})
        if self.places is not None:
            self.parents[directory] = parent, name
        siblings = children_of(parent)
        if name in siblings:
            self._replace(parent, name, directory, entry.path)
        else:
            siblings[name] = directory
        return directory

    def _hides(self, directory: Node, name: bytes) -> bool:
        """Whether a marker that was read so far hides a lower name."""
        return directory in self.opaque or name in self.whiteouts.get(directory, ())

    # --- what an entry becomes --------------------------------------------------------------------------------------

    def _make(self, header: Numbered) -> Node:
        """Make the node of any entry but a hard link."""
        entry = header.entry
        kind = _KINDS[entry.type]
        node = Node(kind, Origin(self.layer, header.number), entry.mode)
        if kind is Kind.FILE:
            node.size = entry.size
            node.extents = self._extents(entry)
        elif kind is Kind.DIR:
            node.children = {}
        elif kind is Kind.SYMLINK:
            if 0 < len(entry.link) <= PATH_MAX:
                node.mode = 0o777
                node.target = entry.link
            else:
                self._refuse("L2", entry, f"no file system can hold a symlink target of {len(entry.link)} bytes")
                node.kind = Kind.FILE
                node.unreadable = True
        else:
            node.rdev = entry.rdev
        self._put_attributes(node, entry)
        return node

    def _extents(self, entry: Entry) -> tuple[Extent, ...]:
        """Say where the bytes of a file are, holes left out (D8)."""
        if entry.sparse is None:
            return (Extent(0, self.layer, entry.data_offset, entry.size),) if entry.size else ()
        extents = []
        layer_offset = entry.data_offset
        for file_offset, size in entry.sparse:
            extents.append(Extent(file_offset, self.layer, layer_offset, size))
            layer_offset += size
        return tuple(extents)

    def _put_attributes(self, node: Node, entry: Entry) -> None:
        """Give ``node`` the owner and time of ``entry``, and its xattrs on top of those it has."""
        node.uid, node.gid, node.mtime_ns = entry.uid, entry.gid, entry.mtime_ns
        if entry.xattrs:
            node.xattrs = self._xattrs(node.xattrs, entry)

    def _xattrs(self, present: Sequence[tuple[bytes, bytes]], entry: Entry) -> tuple[tuple[bytes, bytes], ...]:
        """Join ``present`` and what of the entry's xattrs is shown (D10, W21), sorted; the last of a name wins."""
        result = dict(present)
        total = sum(len(name) + len(value) for name, value in present)
        for name, value in entry.xattrs:
            if not shown_xattr(name, every=self.options.all_xattrs):
                continue
            before = len(name) + len(result[name]) if name in result else 0
            after = total - before + len(name) + len(value)
            namespace, _, rest = name.partition(b".")
            if not (namespace and rest) or len(name) > NAME_MAX or len(value) > XATTR_VALUE_MAX or after > XATTRS_MAX:
                self._refuse("L4", entry, f"no file system can hold its xattr {shown(name)} of {len(value)} bytes")
                continue
            total = after
            result[name] = value
        return tuple(sorted(result.items()))

    # --- hard links -------------------------------------------------------------------------------------------------

    def _link(self, parent: Node, name: bytes, header: Numbered) -> None:
        """Bind a hard link to what its target is at this moment (H1 to H4), or make it wait (H5)."""
        entry = header.entry
        found = self._find(entry.link)
        node = found.node
        if node is None:
            node = self._unreadable(header)
            self._waiting[node] = _Waiting(entry, node, [], [])
        elif node.kind is Kind.DIR:
            self._refuse("H6", entry, f"its hard link target {shown(entry.link)} is a directory")
            node = self._unreadable(header)
        else:
            self._put_header(node, header)
            if found.borrowed is not None:
                self._borrowed.append((found.borrowed, entry))
            if node.kind is Kind.CHAR and node.rdev == WHITEOUT_DEVICE:
                self._devices.append((parent, name, node, header))
        if self.places is not None:
            self.linked[header.number] = node
        waiting = self._waiting.get(node)
        if waiting is not None:
            waiting.names.append((parent, name))
            waiting.headers.append(header)
        siblings = children_of(parent)
        if name in siblings:
            self._replace(parent, name, node, entry.path)
        else:
            siblings[name] = node

    def _unreadable(self, header: Numbered) -> Node:
        """Make a file that reads EIO, for a hard link that leads nowhere."""
        node = Node(Kind.FILE, Origin(self.layer, header.number), header.entry.mode, unreadable=True)
        self._put_attributes(node, header.entry)
        return node

    def _put_header(self, node: Node, header: Numbered) -> None:
        """Apply the header of a link to the inode it shares (H7), unless a later one was applied already."""
        made = node.origin.entry if node.origin.layer == self.layer else IMPLIED
        if header.number > self._stamps.get(node, made):
            self._stamps[node] = header.number
            if node.kind is not Kind.SYMLINK:
                node.mode = header.entry.mode
            self._put_attributes(node, header.entry)

    def _find(self, target: bytes) -> _Found:
        """Find what the target of a hard link is at this moment."""
        head, _, name = target.rpartition(b"/")
        directory = self._directories.get(head)
        if directory is not None:
            node = children_of(directory).get(name)
            if node is not None:
                return _Found(node)
        if len(target) > SPELT_MAX:
            return _MISSING
        names, _ = normalised(target)
        if self._hidden:
            hidden = self._hidden.get(b"/".join(names))
            if hidden is not None:
                return _Found(hidden)
        return self._resolve(names) if excess(names) is None else _MISSING

    def _resolve(self, names: Sequence[bytes], *, follow_last: bool = False) -> _Found:
        """Find what a path is in the upper, else in the lower before this layer's whiteouts (H1 to H3)."""
        todo = list(names[::-1])
        stack: list[tuple[Node | None, Node | None, bytes]] = [(self.root, self._lower, b"")]
        links = 0
        while todo:
            name = todo.pop()
            if name == b"..":
                if len(stack) > 1:
                    stack.pop()
                continue
            upper, lower, _ = stack[-1]
            above = upper.children.get(name) if upper is not None and upper.children is not None else None
            below = lower.children.get(name) if lower is not None and lower.children is not None else None
            node = below if above is None else above
            if node is None:
                return _MISSING
            if node.kind is Kind.DIR:
                stack.append((above, below, name))
            elif node.kind is Kind.SYMLINK and (todo or follow_last):
                links += 1
                more = components(node.target)
                self._followed += 1 + len(more)
                if links > LINKS_MAX or self._followed > FOLLOWED_MAX:
                    return _MISSING
                if node.target.startswith(b"/"):
                    del stack[1:]
                todo += more[::-1]
            elif not todo:
                path = b"/".join([*(part for _, _, part in stack[1:]), name])
                return _Found(node, path if above is None else None)
            else:
                return _Found(None, blocked=node) if node in self._waiting else _MISSING
        upper, lower, _ = stack[-1]
        return _Found(lower if upper is None else upper)

    # --- the end of the stream --------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Say that all entries were read: what had to wait for the end happens now."""
        self._settle_links()
        if not self.options.show_whiteout_devices:
            for parent, name, node, header in reversed(self._devices):  # the last of a path counts
                if children_of(parent).get(name) is node:
                    del children_of(parent)[name]
                    self.whiteouts.setdefault(parent, {}).setdefault(name, header)
        self._report_borrowed()
        if self.options.single_layer:
            self._show_markers()
        else:
            self._drop_ghosts()
        for rule, count in self._warned.items():
            if count > WARNINGS_MAX:
                text = f"{count - WARNINGS_MAX} more warnings of this rule in this layer are not listed"
                self._warnings.append(Warned(rule, self.layer, b"", text))

    def _settle_links(self) -> None:
        """Exchange the placeholders for what their targets are at the end (H5), or refuse (H6)."""
        waiting = self._waiting
        for first in list(waiting.values()):
            stack = [first] if first.placeholder in waiting else []
            entered = {first.placeholder}
            while stack:
                link = stack[-1]
                found = self._find(link.entry.link)
                obstacle = found.blocked or found.node
                before = waiting.get(obstacle) if obstacle is not None else None
                if before is not None and before.placeholder not in entered:
                    entered.add(before.placeholder)
                    stack.append(before)
                else:
                    stack.pop()
                    del waiting[link.placeholder]
                    self._settle(link, found if before is None else _MISSING)

    def _settle(self, link: _Waiting, found: _Found) -> None:
        node = found.node
        if node is None or node.kind is Kind.DIR:
            what = "does not exist" if node is None else "is a directory"
            self._refuse("H6", link.entry, f"its hard link target {shown(link.entry.link)} {what}")
            return
        self._warn("H5", link.entry.path, "its hard link target comes later in the layer")
        if found.borrowed is not None:
            self._borrowed.append((found.borrowed, link.entry))
        for header in link.headers:
            self._put_header(node, header)
        for (parent, name), header in zip(reversed(link.names), reversed(link.headers), strict=True):
            siblings = children_of(parent)
            if siblings[name] is link.placeholder:
                siblings[name] = node
                if node.kind is Kind.CHAR and node.rdev == WHITEOUT_DEVICE:
                    self._devices.append((parent, name, node, header))

    def _report_borrowed(self) -> None:
        """Warn about links into the lower tree, now that all whiteouts of the layer are known (H2, H3)."""
        for path, entry in self._borrowed:
            rule, message = "H2", "its hard link target is in a lower layer"
            node: Node | None = self.root
            for name in path.split(b"/"):
                if node is None or node.children is None:
                    break
                if self._hides(node, name):
                    rule, message = "H3", "its hard link target is hidden by a whiteout of the same layer"
                    break
                node = node.children.get(name)
            self._warn(rule, entry.path, message)

    def _show_markers(self) -> None:
        """Show the markers of a layer alone as empty files; a directory of such a name (W17) goes before."""
        for directory, name, marker in list(self._markers()):
            siblings = children_of(directory)
            if len(name) > NAME_MAX:
                self._warn("T17", marker.entry.path, "a name over 255 bytes is left out of the tree")
            elif name not in siblings:
                siblings[name] = Node(Kind.FILE, Origin(self.layer, marker.number), marker.entry.mode)
                self._put_attributes(siblings[name], marker.entry)

    def _markers(self) -> Iterator[tuple[Node, bytes, Numbered]]:
        for directory, hidden in self.whiteouts.items():
            for name, marker in hidden.items():
                yield directory, WHITEOUT + name, marker
        for directory, marker in self.opaque.items():
            yield directory, OPAQUE, marker

    def _drop_ghosts(self) -> None:
        """Drop implied directories that hold nothing but markers from under whited-out names (W8)."""
        known: dict[Node, bool] = {}
        for directory, hidden in self.whiteouts.items():
            siblings = children_of(directory)
            for name in hidden:
                child = siblings.get(name)
                if child is not None and is_ghost(child, known):
                    del siblings[name]


def is_ghost(node: Node, known: dict[Node, bool]) -> bool:
    """Whether a node is an implied directory with nothing but such in it; ``known`` spares looking twice."""
    if node.origin.entry != IMPLIED:
        return False
    stack = [(node, iter(children_of(node).values()))]
    while stack:
        directory, rest = stack[-1]
        for child in rest:
            if child.origin.entry != IMPLIED or known.get(child) is False:
                known.update((visited, False) for visited, _ in stack)
                return False
            if child not in known:
                stack.append((child, iter(children_of(child).values())))
                break
        else:
            known[directory] = True
            stack.pop()
    return True


def shown_xattr(name: bytes, *, every: bool) -> bool:
    """Whether an extended attribute is shown by its full name (D10, W21); ``every``: also those hidden by default."""
    return not name.startswith(OVERLAY_XATTRS) and (
        every or name.startswith(b"user.") or name == b"security.capability"
    )


def children_of(directory: Node) -> dict[bytes, Node]:
    """Return the names in a node that is known to be a directory."""
    assert directory.children is not None  # noqa: S101  (for the type checker)
    return directory.children
