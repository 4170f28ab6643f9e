"""Lines of other programs: which version of which path one is about, wherever the program saw it.

A program sees an image's path below a mount point, or a name below its ``.ocifs`` (`ocifs.forensics.views`): a deleted file,
one of an earlier state, one version of several, a layer's tar, a piece of slack. Such a name means that very version, not
what the image shows under the path. ``LNN/PATH``, as ``find --deleted``, ``grep --all`` and ``hash --layers all`` print it,
is what layer NN has there, and ``LNN@OFFSET`` its slack.

Not here: what became of a version (`ocifs.forensics.provenance`).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple

from ocifs.forensics.provenance import current, walk
from ocifs.forensics.views import DIRECTORY, SHOWN, is_removed
from ocifs.history import End
from ocifs.overlay.paths import normalised

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ocifs.forensics.examination import Examination
    from ocifs.history import Version

_SEPARATORS: Final = frozenset(b" \t\r\n:,;|\"'`()<>[]{}=\0")
"""What may follow a path in a line that says something about it."""
_MAX_CUTS: Final = 64
"""Places of a line at which a path in it may end, that are tried."""
_MAX_LINKED_CUTS: Final = 8
"""The same where links on the way are followed."""
_MAX_STARTS: Final = 16
"""Places at which one may begin."""

_INSIDE: Final = re.compile(rb"(?:^|(?<=/))\.ocifs(?=/|$)")
_DIGITS: Final = re.compile(rb"[0-9]{1,9}")
_SLACK: Final = re.compile(rb"[0-9]{12,}-[a-z.-]+")
_OF_LAYER: Final = re.compile(rb"L([0-9]{2,9})(@[0-9]+)?")
_ASIDE: Final = re.compile(rb"(.+)~L[0-9]{2,9}~*", re.DOTALL)
_VERSION: Final = re.compile(rb"L([0-9]{2,9})-(added|changed|deleted|overridden)(?:~([0-9]{1,9}))?~*")


class OfLayer(NamedTuple):
    """Bytes of a layer that are no version of a path."""

    layer: int
    what: str
    """``slack``, or ``raw``: its tar or its blob."""


class Annotator:
    """Finds the path that a line is about: the whole line, or the longest part of it that some layer had.

    ``prefix`` is where the program that wrote the lines saw the image, or a part of ``.ocifs``; only paths below it are
    taken for the image's then. Without one a path begins the line, or begins with ``/`` or ``./`` and stands behind a blank.
    """

    def __init__(self, examination: Examination, prefix: bytes = b"") -> None:
        self._history = examination.history
        self._views = _Views(examination)
        self._prefix = prefix.rstrip(b"/")
        inside = _INSIDE.search(self._prefix)
        self._inside = self._prefix[inside.start() :] if inside else b""
        self._known: dict[tuple[bytes, bool], Version | OfLayer | None] = {}

    def find(self, line: bytes) -> Version | OfLayer | None:
        """Give what the line is about; None if unknown.

        Of a path in the image that is what the image shows, else what it showed last; a name in a view says itself.
        """
        starts = list(self._starts(line))
        # Links on the way are followed last, for that is slow and seldom needed: scanners do not follow them.
        for through_links in (False, True):
            for start in starts:
                for stop in _stops(line, start, _MAX_CUTS if not through_links else _MAX_LINKED_CUTS):
                    path = line[start:stop]
                    if self._prefix:
                        path = path[len(self._prefix) :] or b"/"
                        if not path.startswith(b"/"):
                            continue
                    found = self._look_up(self._inside + path, through_links=through_links)
                    if found is not None:
                        return found
        return None

    def _starts(self, line: bytes) -> Iterator[int]:
        if not self._prefix:
            yield 0
        sought = self._prefix or b"/"
        at = line.find(sought)
        for _ in range(_MAX_STARTS):
            if at < 0:
                return
            begins = at - 1 if not self._prefix and line[at - 1 : at] == b"." else at
            if (begins or self._prefix) and (begins == 0 or line[begins - 1] in _SEPARATORS):
                yield begins
            at = line.find(sought, at + 1)

    def _look_up(self, path: bytes, *, through_links: bool) -> Version | OfLayer | None:
        """Look a path up; what was asked last is remembered, for scanners say much about one file."""
        names, _ = normalised(path)
        if not names and not path.startswith((b"/", b".")):
            return None
        key = b"/".join(names), through_links
        if key in self._known:
            return self._known[key]
        found = self._views.find(names[1:]) if names[:1] == [DIRECTORY] else None
        if found is None:
            found = current(walk(self._history, names, follow=False)[0] if through_links else self._history.of(key[0]))
        if found is None and names:
            found = self._views.of_layer(names)
        if len(self._known) >= 1024:  # noqa: PLR2004 (a few hundred kilobytes)
            self._known.clear()
        self._known[key] = found
        return found


def _stops(line: bytes, start: int, limit: int) -> Iterator[int]:
    """Where a path that begins at ``start`` may end, the longest first."""
    cuts = [at for at in range(start + 1, min(len(line), start + 8192)) if line[at] in _SEPARATORS]
    yield len(line)
    yield from reversed(cuts[:limit])


# -- views ---------------------------------------------------------------------------------------------------------


class _Views:
    """The names below ``.ocifs``, read backwards; see `ocifs.examined` and `ocifs.forensics.views`."""

    def __init__(self, examination: Examination) -> None:
        self._history = examination.history
        self._layers = {layer.number for layer in examination.layers}
        self._blobs = {str(layer.blob.digest or layer.index.digest): layer.number for layer in examination.layers}

    def find(self, names: Sequence[bytes]) -> Version | OfLayer | None:
        """Give what a name is, by its components below ``.ocifs``."""
        match names:
            case [b"upto", number, *rest] if rest:
                return self._upto(self._number(number), rest)
            case [b"layers", name, *rest] if rest:
                return self._in_layer(self._number(name.partition(b"-")[0]), rest)
            case [b"deleted", *rest] if rest:
                return self._deleted(rest)
            case [b"history", *rest] if rest:
                return self._of_history(rest)
            case [b"slack", number, name] if _SLACK.fullmatch(name):
                return self._whole(self._number(number), "slack")
            case [b"raw", b"tars", name] if name.endswith(b".tar"):
                return self._whole(self._number(name.removesuffix(b".tar")), "raw")
            case [b"raw", b"blobs", algorithm, encoded]:
                return self._whole(self._blobs.get((algorithm + b":" + encoded).decode(errors="replace"), 0), "raw")
            case _:
                return None

    def of_layer(self, names: Sequence[bytes]) -> Version | OfLayer | None:
        """Give what ``LNN/PATH`` or ``LNN@OFFSET`` is."""
        match = _OF_LAYER.fullmatch(names[0])
        if match is None:
            return None
        number = self._number(match[1])
        if match[2]:
            return self._whole(number, "slack") if len(names) == 1 else None
        return self._in_layer(number, names[1:]) if len(names) > 1 else None

    def _number(self, digits: bytes) -> int:
        """Read a layer's number; 0 if there is none of that name."""
        number = int(digits) if _DIGITS.fullmatch(digits) else 0
        return number if number in self._layers else 0

    @staticmethod
    def _whole(layer: int, what: str) -> OfLayer | None:
        return OfLayer(layer, what) if layer else None

    def _upto(self, layer: int, names: Sequence[bytes]) -> Version | None:
        there = (version for version in self._history.of(b"/".join(names)) if version.change in SHOWN)
        seen = (one for one in there if one.layer <= layer and not 0 < one.end_layer <= layer)
        return next(seen, None)

    def _in_layer(self, layer: int, names: Sequence[bytes]) -> Version | None:
        found = [version for version in self._history.of(b"/".join(names)) if version.layer == layer]
        if not found:
            return self._upto(layer, names)  # a directory that the layer implies
        return next((version for version in reversed(found) if version.end is not End.OVERRIDDEN), found[-1])

    def _deleted(self, names: Sequence[bytes]) -> Version | None:
        match = _OF_LAYER.fullmatch(names[0])
        layer = self._number(match[1]) if match and not match[2] else 0
        path = names[1:] if layer else names
        if not path:
            return None
        # A name that another thing has is followed by who removed it.
        aside = _ASIDE.fullmatch(path[-1])
        for last in (path[-1], aside[1]) if aside else (path[-1],):
            versions = self._history.of(b"/".join((*path[:-1], last)))
            removed = [one for one in versions if is_removed(one, versions) and layer in (0, one.end_layer)]
            if removed:
                return max(removed, key=lambda version: version.end_layer)
            if versions:
                return current(versions)  # a directory that leads to something
        return None

    def _of_history(self, names: Sequence[bytes]) -> Version | None:
        match = _VERSION.fullmatch(names[-1])
        if match is None:
            return current(self._history.of(b"/".join(names)))
        layer, how, place = self._number(match[1]), match[2], int(match[3] or 1)
        versions = self._history.of(b"/".join(names[:-1]))
        if how == b"deleted":
            return next((one for one in versions if is_removed(one, versions) and one.end_layer == layer), None)
        if how == b"overridden":
            hidden = [one for one in versions if one.layer == layer and one.end is End.OVERRIDDEN and one.kind]
            return hidden[place - 1] if 0 < place <= len(hidden) else None
        return next((one for one in versions if one.layer == layer and one.change in SHOWN), None)
