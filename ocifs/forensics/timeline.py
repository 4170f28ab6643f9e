"""What happened when in an image, as far as its layers tell: when layers were made, and the time of every version.

Two kinds of time are in an image. Every entry of a layer has a modification time, which whoever built the layer chose, and
which a copy keeps from long before. And the configuration's history says when each step was made. So a version's own time
is an *event*; a layer has one, when it was made; and so has a path that a layer deleted, when that layer was made. What no
entry names (implied directories) has no time and makes no event, nor does a step whose time the image does not say or says
to be the epoch, as reproducible builds do.

Events come by path, layers first: sorting by time is what those do who read timelines, and needs all of them in memory.

*Flags* mark what cannot be so or is seldom so by itself: a time later than its layer was made, and content that changed
while the time stayed. For the second the bytes of such versions are compared where their size stayed too; this reads their
data, in layer order, and holds about a hundred bytes for each.

Not here: formats (`ocifs.forensics.bodyfile`, `ocifs.forensics.timesketch`).
"""

from __future__ import annotations

import datetime
import enum
from typing import TYPE_CHECKING, NamedTuple

from ocifs.errors import DamagedError
from ocifs.forensics.hashes import Digests, content_of
from ocifs.history import Change, End
from ocifs.tree import Kind

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ocifs import spec
    from ocifs.forensics.examination import Examination
    from ocifs.history import Version


class What(enum.StrEnum):
    """What an event is. The values are stable."""

    LAYER = "layer"
    """A layer was made."""
    VERSION = "version"
    """A version's own time."""
    DELETED = "deleted"
    """A path was gone from the layer that ended this version on."""


class Flag(enum.StrEnum):
    """What is odd about a version. The values are stable."""

    LATER_THAN_LAYER = "later-than-layer"
    """Its time is later than its layer was made."""
    TIME_KEPT = "time-kept"
    """Its content is not that of the version before, but its time is."""


class Event(NamedTuple):
    """Something that happened at one time."""

    what: What
    time_ns: int
    """Nanoseconds since the epoch, never negative."""
    layer: int
    """From 1: the layer that was made, has the version, or deleted it."""
    version: Version | None = None
    flags: tuple[Flag, ...] = ()


def created_ns(step: spec.History | None) -> int | None:
    """Say when a step was made, in nanoseconds since the epoch, to the microsecond; None if the image does not say."""
    try:
        when = datetime.datetime.fromisoformat(step.created if step else "")
    except ValueError:
        return None
    if when.tzinfo is None:
        return None
    since = when - datetime.datetime.fromtimestamp(0, datetime.UTC)
    nanoseconds = since // datetime.timedelta(microseconds=1) * 1000
    return nanoseconds if nanoseconds > 0 else None


def events(examination: Examination) -> Iterator[Event]:
    """Give all events: of layers, then of versions by path, layer and entry. Raises nothing for data that is damaged."""
    created = [created_ns(step) for step in examination.steps]
    for layer in examination.layers:
        made = created[layer.number - 1]
        if made is not None:
            yield Event(What.LAYER, made, layer.number)
    digests = Digests(["sha256"])
    twins = (content_of(version) for pair in _twins(examination) for version in pair)
    digests.calculate(examination.layers, twins, examination.evidence)
    for _, versions in examination.history.paths():
        yield from _of_path(versions, created, digests)


def _of_path(versions: Sequence[Version], created: Sequence[int | None], digests: Digests) -> Iterator[Event]:
    before: Version | None = None
    for number, version in enumerate(versions):
        flags = []
        if version.entry >= 0:
            made = created[version.layer - 1]
            if made is not None and version.mtime_ns > made:
                flags.append(Flag.LATER_THAN_LAYER)
            if before is not None and _shown(version) and _time_kept(before, version, digests):
                flags.append(Flag.TIME_KEPT)
            yield Event(What.VERSION, version.mtime_ns, version.layer, version, tuple(flags))
        before = version if _shown(version) else before
        gone = _deleted_by(version, versions[number + 1 :])
        made = created[gone - 1] if gone else None
        if made is not None:
            yield Event(What.DELETED, made, gone, version)


def _shown(version: Version) -> bool:
    """Whether the version was in a tree."""
    return version.change in (Change.ADDED, Change.CHANGED)


def _deleted_by(version: Version, later: Sequence[Version]) -> int:
    """Say which layer left nothing at the path of this version; 0 if none did."""
    if version.end not in (End.WHITEOUT, End.OPAQUE, End.REPLACED) or not version.end_layer:
        return 0
    return 0 if any(_shown(other) and other.layer == version.end_layer for other in later) else version.end_layer


# -- content that changed while the time stayed --------------------------------------------------------------------


def _twins(examination: Examination) -> Iterator[tuple[Version, Version]]:
    """Give versions of a path that only their bytes can tell apart."""
    for _, versions in examination.history.paths():
        before: Version | None = None
        for version in versions:
            if _shown(version):
                if before is not None and _same_time(before, version) and _comparable(before, version):
                    yield before, version
                before = version


def _same_time(before: Version, version: Version) -> bool:
    both = before.kind == version.kind == Kind.FILE and before.entry >= 0 and version.entry >= 0
    return both and before.mtime_ns == version.mtime_ns and not before.unreadable and not version.unreadable


def _comparable(before: Version, version: Version) -> bool:
    return before.size == version.size and content_of(before) != content_of(version)


def _time_kept(before: Version, version: Version, digests: Digests) -> bool:
    if not _same_time(before, version):
        return False
    if not _comparable(before, version):
        return before.size != version.size
    try:
        return digests.get(content_of(before)) != digests.get(content_of(version))
    except DamagedError:  # cannot be told
        return False
