"""Upper directory and image side by side: what an overlay of the two shows, told as what a layer must say.

Three trees meet at every name:

* what is in the *upper* directory;
* what lies *below* it: the directory of the image that overlayfs merges it with. Usually that of the same path; another
  one if it was renamed (``redirect``), none if it is opaque or new;
* what the *image* has at the path itself, which is what a layer is laid over.

Where below and image are the same directory, and nothing above has hidden it, the layer only needs what the upper
directory has: this is the usual case. Otherwise it must hide what the image has there (an opaque marker) and bring along
everything that lies below, because a layer has no word for "renamed".

Whether a name is gone is always said of the image, not of what lies below: a whiteout of something that the image does not
have at that path says nothing and is left out.

Steps come in the order of an archive: each directory right before what is in it, names bytewise, what is gone at the place
its name would have, the opaque marker first.

Not here: tar bytes (`layer`), comparing (`differences`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NoReturn, TypeAlias

import msgspec

from ocifs.changes.upper import Entry, Upper
from ocifs.errors import UnsupportedError
from ocifs.overlay.paths import PATH_MAX
from ocifs.overlay.paths import shown as shortened
from ocifs.rootfs import RootFS
from ocifs.sources.blob import shown
from ocifs.tree import Kind

if TYPE_CHECKING:
    from collections.abc import Iterator

_DOTS: Final = frozenset({b".", b".."})


class Present(msgspec.Struct, frozen=True):
    """A name that is there. ``path`` is relative; that of the root is empty."""

    path: bytes
    source: Entry | int
    """In the upper directory; or an inode of the image, brought along with a renamed directory."""
    image: int | None
    """What the image has at this path: its inode."""
    data: int | None = None
    """The image's inode that has the data of a file whose entry has none (metacopy)."""


class Gone(msgspec.Struct, frozen=True):
    """A name that the image has and that is not there any more, with all that was below it."""

    path: bytes
    image: int
    hidden: bool
    """Whether an opaque marker says so already, so that it needs no whiteout."""


class Opaque(msgspec.Struct, frozen=True):
    """Nothing of what the image has in this directory is left, but for what follows."""

    path: bytes


Step: TypeAlias = Present | Gone | Opaque


@dataclass(frozen=True, slots=True)
class _Level:
    """A directory whose names are being gone through."""

    prefix: bytes
    names: Iterator[bytes]
    in_upper: frozenset[bytes] | None
    """The upper directory's names; None if it has no such directory, so that all comes from ``below``."""
    below: int | None
    image: int | None
    hidden: bool
    """Whether an opaque marker here or above hides what the image has."""

    @property
    def plain(self) -> bool:
        """Whether the layer is laid over just what lies below."""
        return self.below is not None and self.below == self.image and not self.hidden


class Merged:
    """What an overlay of ``upper`` above ``view`` shows."""

    def __init__(self, upper: Upper, view: RootFS) -> None:
        """Look at both. ``view`` is the image as the overlay's lower directory has it."""
        self._upper = upper
        self.view = view

    def steps(self) -> Iterator[Step]:
        """Go through everything once. The caller may ask for the data of the step it was given last, not of others.

        Raises ChangedWhileReadError, MachineError; UnsupportedError for what an upper directory alone does not tell, and
        for paths over PATH_MAX, which no engine can make (and without end they would take memory without end).
        """
        top, root = self._upper.top, self.view.root
        yield Present(b"", top, root)
        # overlayfs does not look whether its root is opaque, and most engines do not heed a marker there (rule W13).
        levels = [self._level(b"", root, root, in_upper=True, hidden=False)]
        while levels:
            level = levels[-1]
            name = next(level.names, None)
            if name is None:
                levels.pop()
                if level.in_upper is not None:
                    self._upper.leave()
                continue
            found = self._at(level, name)
            if found is None:
                continue
            if len(found.path) > PATH_MAX:
                raise UnsupportedError(
                    f"{shortened(b'/' + found.path)} is longer than {PATH_MAX} bytes, which no reader of layers takes: "
                    "remove it or move it up"
                )
            yield found
            if isinstance(found, Present) and _kind(self.view, found.source) is Kind.DIR:
                below = self._below(level, name, found.source)
                image = found.image if self._is_directory(found.image) else None
                hidden = level.hidden
                if image is not None and image != below and not hidden:
                    yield Opaque(found.path)
                    hidden = True
                in_upper = isinstance(found.source, Entry)
                if isinstance(found.source, Entry):
                    self._upper.enter(name, found.source.status)
                levels.append(self._level(found.path + b"/", below, image, in_upper=in_upper, hidden=hidden))

    def opened(self, step: Present) -> AbstractContextManager[int]:
        """The file of the step given last, open for reading. See `Upper.opened`."""
        assert isinstance(step.source, Entry)  # noqa: S101 (of the caller, not of the data)
        return self._upper.opened(step.path.rpartition(b"/")[2], step.source)

    def check_unchanged(self) -> None:
        """Refuse, when all steps are done, if what they told of is not as it was. See `Upper.check_unchanged`."""
        self._upper.check_unchanged()

    def fail_changed(self, step: Present) -> NoReturn:
        """Refuse the step given last because it is not what it was."""
        self._upper.fail_changed(step.path.rpartition(b"/")[2])

    # -- one directory -------------------------------------------------------------------------------------------

    def _level(self, prefix: bytes, below: int | None, image: int | None, *, in_upper: bool, hidden: bool) -> _Level:
        upper = frozenset(self._upper.names()) if in_upper else None
        names = set(upper or ())
        level = _Level(prefix, iter(()), upper, below, image, hidden)
        if not level.plain:
            names |= self._names(below) | self._names(image)
        return _Level(prefix, iter(sorted(names)), upper, below, image, hidden)

    def _at(self, level: _Level, name: bytes) -> Step | None:
        """What there is to say about a name; None if nothing."""
        path = level.prefix + name
        image = self._lookup(level.image, name)
        if level.in_upper is not None and name in level.in_upper:
            entry = self._upper.entry(name)
            if not entry.is_whiteout:
                return Present(path, entry, image, self._data(level, name, entry))
        elif not level.plain and (brought := self._lookup(level.below, name)) is not None:
            return Present(path, brought, image)
        return None if image is None else Gone(path, image, level.hidden)

    def _below(self, level: _Level, name: bytes, source: Entry | int) -> int | None:
        """The directory of the image that the directory ``name`` is merged with."""
        if isinstance(source, int):
            return source
        if source.notes.opaque:
            return None
        found = self._lower(level, name, source)
        return found if self._is_directory(found) else None

    def _data(self, level: _Level, name: bytes, entry: Entry) -> int | None:
        if entry.notes.linked:
            raise UnsupportedError(
                f"{shown(b'/' + level.prefix + name)} has further names in the image that changed with it (the overlay was "
                "mounted with index=on), which its upper directory does not tell: replace it by a copy of itself there, "
                "or mount with index=off"
            )
        if entry.kind is not Kind.FILE or not entry.notes.metacopy:
            return None
        found = self._lower(level, name, entry)
        if found is None or self.view.inode(found).kind is not Kind.FILE:
            raise UnsupportedError(
                f"{shown(b'/' + level.prefix + name)} has its attributes in the upper directory and its data in another "
                "image than this one (metacopy=on): give the image that the overlay was mounted over"
            )
        return found

    def _lower(self, level: _Level, name: bytes, entry: Entry) -> int | None:
        """The inode of the image that overlayfs looks up for an entry (fs/overlayfs/namei.c, ovl_lookup)."""
        redirect = entry.notes.redirect
        if redirect is None:
            return self._lookup(level.below, name)
        found: int | None = self.view.root if redirect.startswith(b"/") else level.below
        for part in redirect.removeprefix(b"/").split(b"/"):
            found = self._lookup(found, part) if part and part not in _DOTS else None
        if found is None:
            raise UnsupportedError(
                f"{shown(b'/' + level.prefix + name)} was renamed from {shown(redirect)} (redirect_dir=on), which this "
                "image does not have: give the image that the overlay was mounted over"
            )
        return found

    # -- the image -----------------------------------------------------------------------------------------------

    def _lookup(self, directory: int | None, name: bytes) -> int | None:
        if directory is None or not self._is_directory(directory):
            return None
        return self.view.lookup(directory, name)

    def _names(self, directory: int | None) -> set[bytes]:
        if directory is None:
            return set()
        return {name for name, *_ in self.view.readdir(directory)} - _DOTS

    def _is_directory(self, ino: int | None) -> bool:
        return ino is not None and self.view.inode(ino).kind is Kind.DIR


def _kind(view: RootFS, source: Entry | int) -> Kind | None:
    return view.inode(source).kind if isinstance(source, int) else source.kind
