"""The merge again, in the plainest way: whole trees as dicts from path to thing, copied and searched without a thought.

For each layer: the *lower* is the view before it; the *upper* is what its entries make of nothing; the result is the lower
without what is hidden, then the upper on top. Whatever `ocifs.overlay` does cleverly (nodes that are shared and moved,
caches of directories, one walk) is done here by looking through everything again. Slow, for small layers only.

A path is a tuple of names. A thing that several paths have is one inode. The limits (L1 to L5) are not here but for
loops of symlinks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ocifs.tar import Entry, EntryType

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ocifs.overlay import MergeOptions

Path = tuple[bytes, ...]
ROOT: Path = ()


class RefusedError(Exception):
    """A rule refuses the image."""


@dataclass(eq=False)
class Thing:
    """One inode."""

    kind: EntryType
    origin: tuple[int, int]
    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    data: tuple[int, int, int] | None = None
    """Layer, layer offset, size."""
    target: bytes = b""
    rdev: tuple[int, int] = (0, 0)
    unreadable: bool = False

    @property
    def implied(self) -> bool:
        """Whether no entry names it."""
        return self.origin[1] == -1

    @property
    def is_directory(self) -> bool:
        return self.kind == EntryType.DIR

    @property
    def is_whiteout_device(self) -> bool:
        return self.kind == EntryType.CHAR and self.rdev == (0, 0)


View = dict[Path, Thing]


def parents(path: Path) -> list[Path]:
    """All that a path goes through, the root first, itself not."""
    return [path[:depth] for depth in range(len(path))]


def steps_to(path: Path) -> list[Path]:
    """All that a path goes through and itself, the root not."""
    return [path[: depth + 1] for depth in range(len(path))]


def names_of(path: bytes) -> list[bytes]:
    return [name for name in path.split(b"/") if name not in (b"", b".")]


def lexical(path: bytes) -> tuple[Path, bool]:
    """Normalise an entry's path; and whether it led out of the root."""
    result: Path = ()
    out = False
    for name in names_of(path):
        if name == b"..":
            out = out or not result
            result = result[:-1]
        else:
            result += (name,)
    return result, out


def naive_merge(
    layers: Sequence[tuple[int, Sequence[Entry]]], options: MergeOptions
) -> tuple[View, list[tuple[str, int, bytes]]]:
    """Every path with its thing, and the warnings as (rule, layer, path)."""
    first = layers[0][0] if layers else 1
    view: View = {ROOT: Thing(EntryType.DIR, (first, -1))}
    warnings: list[tuple[str, int, bytes]] = []
    for number, entries in layers:
        layer = _Layer(number, view, options, warnings)
        for position, entry in enumerate(entries):
            layer.apply(position, entry)
        layer.end()
        view = layer.combined()
    return view, warnings


class _Layer:
    def __init__(self, number: int, lower: View, options: MergeOptions, warnings: list[tuple[str, int, bytes]]) -> None:
        self.number = number
        self.lower = lower
        self.options = options
        self.warnings = warnings
        self.upper: View = {ROOT: Thing(EntryType.DIR, (number, -1))}
        self.whiteouts: dict[Path, tuple[int, Entry]] = {}
        self.opaque: dict[Path, tuple[int, Entry]] = {}
        self.aside: dict[Path, Thing] = {}
        self.pending: list[tuple[int, Entry, Thing]] = []
        self.bound_to_pending: list[tuple[Thing, int, Entry]] = []
        self.from_lower: list[tuple[Path, Entry]] = []
        self.last_header: dict[Thing, int] = {}
        self.placed: dict[Path, tuple[int, Entry]] = {}

    def warn(self, rule: str, entry: Entry) -> None:
        self.warnings.append((rule, self.number, entry.path))

    def refuse(self, rule: str, entry: Entry) -> None:
        if not (self.options.examine or self.options.single_layer):
            raise RefusedError(rule)
        self.warn(rule, entry)

    # One entry

    def apply(self, position: int, entry: Entry) -> None:
        if entry.type == EntryType.OTHER:
            return
        if entry.path == b"":
            self.warn("T15", entry)
            return
        path, out = lexical(entry.path)
        if out:
            self.warn("T13", entry)
        if path == ROOT:
            if entry.type != EntryType.DIR:
                self.refuse("T14", entry)
                return
            self.put_directory(ROOT, position, entry)
            return
        if path[0].startswith(b".wh..wh.") and path[0] != b".wh..wh..opq":
            self.put_aside(path, position, entry)
            return
        name = path[-1]
        if name in (b".wh.", b".wh..", b".wh..."):
            self.refuse("W15", entry)
            return
        try:
            parent = self.real_directory(path[:-1], entry)
        except RecursionError:
            self.refuse("L3", entry)
            return
        if name.startswith(b".wh."):
            self.put_marker(parent, name, position, entry)
            return
        here = (*parent, name)
        if entry.type == EntryType.DIR:
            self.put_directory(here, position, entry)
        elif entry.type == EntryType.HARDLINK:
            self.put_link(here, position, entry)
        else:
            self.put(here, self.thing(position, entry), entry)
        self.placed[here] = (position, entry)

    def thing(self, position: int, entry: Entry) -> Thing:
        thing = Thing(entry.type, (self.number, position), entry.mode)
        self.give_attributes(thing, entry)
        if entry.type == EntryType.SYMLINK:
            thing.mode = 0o777
            thing.target = entry.link
        if entry.type == EntryType.FILE and entry.size:
            thing.data = (self.number, entry.data_offset, entry.size)
        if entry.type in (EntryType.CHAR, EntryType.BLOCK):
            thing.rdev = entry.rdev
        return thing

    def give_attributes(self, thing: Thing, entry: Entry) -> None:
        thing.uid, thing.gid, thing.mtime_ns = entry.uid, entry.gid, entry.mtime_ns
        for name, value in entry.xattrs:
            if name.startswith((b"user.overlay.", b"trusted.overlay.")):
                continue
            if self.options.all_xattrs or name.startswith(b"user.") or name == b"security.capability":
                thing.xattrs[name] = value

    def put(self, path: Path, thing: Thing, entry: Entry) -> None:
        before = self.upper.get(path)
        if before is not None:
            self.warn("T3" if thing.implied or before.implied else "T5", entry)
            for table in (self.upper, self.whiteouts, self.opaque):
                for other in list(table):
                    if path in parents(other):
                        del table[other]
            self.opaque.pop(path, None)
        self.upper[path] = thing

    def put_directory(self, path: Path, position: int, entry: Entry) -> None:
        before = self.upper.get(path)
        if before is None or not before.is_directory:
            self.put(path, self.thing(position, entry), entry)
            return
        if not before.implied:
            self.warn("T5", entry)
        self.upper[path] = self.thing(position, entry)

    def put_marker(self, parent: Path, name: bytes, position: int, entry: Entry) -> None:
        if name == b".wh..wh..opq":
            if parent in self.opaque:
                self.warn("T5", entry)
            self.opaque[parent] = (position, entry)
        elif not name.startswith(b".wh..wh."):
            hidden = (*parent, name[4:])
            if hidden in self.whiteouts:
                self.warn("T5", entry)
            self.whiteouts[hidden] = (position, entry)

    def put_aside(self, path: Path, position: int, entry: Entry) -> None:
        if entry.type == EntryType.FILE:
            self.aside[path] = self.thing(position, entry)
        if entry.type == EntryType.HARDLINK:
            found, _, waiting = self.target(entry)
            if found is not None and not waiting and not found.is_directory:
                self.aside[path] = found

    # Parents

    def real_directory(self, names: Sequence[bytes], entry: Entry) -> Path:
        """Where a path leads in the upper, with what is missing made."""
        todo, here, hops = list(names), ROOT, 0
        while todo:
            name = todo.pop(0)
            if name == b"..":
                here = here[:-1]
                continue
            there = (*here, name)
            thing = self.upper.get(there)
            if thing is None and self.options.follow_dirlinks and self.lower_dirlink(there):
                thing = self.lower[there]
            if thing is not None and thing.kind == EntryType.SYMLINK:
                hops += 1
                if hops > 255:
                    raise RecursionError
                todo = names_of(thing.target) + todo
                here = ROOT if thing.target.startswith(b"/") else here
                continue
            if thing is None or not thing.is_directory:
                self.put(there, Thing(EntryType.DIR, (self.number, -1)), entry)
            here = there
        return here

    def lower_dirlink(self, path: Path) -> bool:
        """Whether a path is a lower symlink, not hidden so far, that led to a directory before this layer."""
        if path not in self.lower or self.lower[path].kind != EntryType.SYMLINK:
            return False
        if any(step in self.whiteouts or step[:-1] in self.opaque for step in steps_to(path)):
            return False
        thing, _, _ = self.search(list(path), follow_last=True)
        return thing is not None and thing.is_directory

    # Links

    def union(self) -> View:
        """The upper, and of the lower what the upper has nothing for; no whiteouts."""
        seen = dict(self.upper)
        for path, thing in self.lower.items():
            if path not in seen and all(
                step not in self.upper or self.upper[step].is_directory for step in parents(path)
            ):
                seen[path] = thing
        return seen

    def search(self, names: list[bytes], *, follow_last: bool = False) -> tuple[Thing | None, Path, Thing | None]:
        """What a path is in the union, where, and the waiting link that it leads to or through."""
        view = self.union()
        waiting = [placeholder for _, _, placeholder in self.pending]
        here, hops = ROOT, 0
        while names:
            name, *names = names
            if name == b"..":
                here = here[:-1]
                continue
            there = (*here, name)
            thing = view.get(there)
            if thing in waiting:
                return (thing if not names else None), there, thing
            if thing is None:
                return None, there, None
            if thing.kind == EntryType.SYMLINK and (names or follow_last):
                hops += 1
                if hops > 255:
                    return None, there, None
                names = names_of(thing.target) + names
                here = ROOT if thing.target.startswith(b"/") else here
                continue
            if not thing.is_directory:
                return (None if names else thing), there, None
            here = there
        return view[here], here, None

    def target(self, entry: Entry) -> tuple[Thing | None, Path, Thing | None]:
        path, _ = lexical(entry.link)
        if path in self.aside:
            return self.aside[path], path, None
        return self.search(list(path))

    def put_link(self, path: Path, position: int, entry: Entry) -> None:
        found, where, _ = self.target(entry)
        if found is None:
            placeholder = self.broken(position, entry)
            self.put(path, placeholder, entry)
            self.pending.append((position, entry, placeholder))
            self.bound_to_pending.append((placeholder, position, entry))
        elif found.is_directory:
            self.refuse("H6", entry)
            self.put(path, self.broken(position, entry), entry)
        else:
            if any(found is placeholder for _, _, placeholder in self.pending):
                self.bound_to_pending.append((found, position, entry))
            self.note_origin(found, where, entry)
            self.give_header(found, position, entry)
            self.put(path, found, entry)

    def broken(self, position: int, entry: Entry) -> Thing:
        made = self.thing(position, changed(entry, type=EntryType.FILE, size=0))
        made.unreadable = True
        return made

    def note_origin(self, found: Thing, where: Path, entry: Entry) -> None:
        if where not in self.aside and self.upper.get(where) is not found:
            self.from_lower.append((where, entry))

    def give_header(self, thing: Thing, position: int, entry: Entry) -> None:
        made = thing.origin[1] if thing.origin[0] == self.number else -1
        if position > self.last_header.get(thing, made):
            self.last_header[thing] = position
            if thing.kind != EntryType.SYMLINK:
                thing.mode = entry.mode
            self.give_attributes(thing, entry)

    # The end

    def end(self) -> None:
        while self.pending:
            self.settle(self.pending[0], [])
        if not self.options.show_whiteout_devices:
            for path, thing in list(self.upper.items()):
                if thing.is_whiteout_device:
                    del self.upper[path]
                    self.whiteouts.setdefault(path, self.placed[path])
        for path, entry in self.from_lower:
            steps = steps_to(path)
            hidden = any(step in self.whiteouts or step[:-1] in self.opaque for step in steps)
            self.warn("H3" if hidden else "H2", entry)

    def settle(self, link: tuple[int, Entry, Thing], entered: list[Thing]) -> None:
        """Bind a waiting link; those that it waits for go before."""
        _, entry, placeholder = link
        entered = [*entered, placeholder]
        while True:
            found, where, waiting = self.target(entry)
            if waiting is None:
                break
            if waiting in entered:
                found = None
                break
            self.settle(next(other for other in self.pending if other[2] is waiting), entered)
        self.pending.remove(link)
        if found is None or found.is_directory:
            self.refuse("H6", entry)
            return
        self.warn("H5", entry)
        self.note_origin(found, where, entry)
        for bound, position, header in self.bound_to_pending:
            if bound is placeholder:
                self.give_header(found, position, header)
        for path, thing in self.upper.items():
            if thing is placeholder:
                self.upper[path] = found
        self.bound_to_pending = [
            (found if bound is placeholder else bound, position, header)
            for bound, position, header in self.bound_to_pending
        ]

    def combined(self) -> View:
        if self.options.single_layer:
            return self.alone()
        # W8: implied directories with only such in them, below a whited-out name.
        for path in self.whiteouts:
            below = [other for other in self.upper if path == other or path in parents(other)]
            if all(self.upper[other].implied for other in below):
                for other in below:
                    del self.upper[other]
        result: View = {}
        for path, thing in self.lower.items():
            steps = steps_to(path)
            if any(step in self.whiteouts or step[:-1] in self.opaque for step in steps):
                continue
            if any(
                step in self.upper and not (self.upper[step].is_directory and self.lower[step].is_directory)
                for step in steps
            ):
                continue
            result[path] = thing
        for path, thing in self.upper.items():
            if not (thing.is_directory and thing.implied and path in result):
                result[path] = thing
        return result

    def alone(self) -> View:
        markers = [((*path[:-1], b".wh." + path[-1]), mark) for path, mark in self.whiteouts.items()]
        markers += [((*path, b".wh..wh..opq"), mark) for path, mark in self.opaque.items()]
        for path, (position, entry) in markers:
            if path not in self.upper:
                thing = Thing(EntryType.FILE, (self.number, position), entry.mode)
                self.give_attributes(thing, entry)
                self.upper[path] = thing
        return self.upper


def changed(entry: Entry, **changes: object) -> Entry:
    values = {name: getattr(entry, name) for name in Entry.__struct_fields__}
    return Entry(**(values | changes))
