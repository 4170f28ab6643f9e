"""How two images differ, or one image up to two of its layers: which names came, changed and went, and what of each.

Two histories are gone through side by side, both in the order of paths, so memory does not follow the number of names. A
file's content is read only where that is the only way to know: sizes differ, or both lie at the same place of the same
uncompressed layer (by diff ID, so also where one is compressed otherwise), or else their digests are compared.

Attributes are those of the entries that made a name. Whether two names are one file is not compared, each name is.

Not here: the lines in which a text differs (`ocifs.forensics.unified`); what a container changed (`ocifs.changes`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec

from ocifs.errors import DamagedError
from ocifs.forensics.digests import BATCH, digests
from ocifs.history import End, Version
from ocifs.history.version import sort_key
from ocifs.tree import Kind

if TYPE_CHECKING:
    from ocifs.forensics.examination import Examination

ASPECTS = ("type", "content", "mode", "owner", "mtime", "xattrs", "target", "device")
"""What of a name can have changed. Stable words."""


class Side(msgspec.Struct, frozen=True, gc=False):
    """A name in one of two images."""

    version: Version
    sha256: bytes | None = None
    """Of a file that was read."""


class Difference(msgspec.Struct, frozen=True, gc=False):
    """A name that is not the same in both images: ``before`` is None if it came, ``after`` if it went."""

    path: bytes
    before: Side | None
    after: Side | None
    changed: tuple[str, ...] = ()
    """Some of `ASPECTS`, in their order, if it is in both. A different type says it all."""
    problems: tuple[str, ...] = ()
    """Why its content could not be compared or read."""

    @property
    def sign(self) -> str:
        """A, C or D: added, changed, deleted."""
        return "A" if self.before is None else "D" if self.after is None else "C"


class _Pair(msgspec.Struct, gc=False):
    before: Version | None
    after: Version | None
    changed: tuple[str, ...] = ()
    undecided: bool = False
    """Whether only reading can say if the content is the same."""


def differences(
    before: Examination, after: Examination, *, ignored: Sequence[str] = (), hashed: bool = False
) -> Iterator[Difference]:
    """Give every difference in the order of paths, but for the ``ignored`` aspects. Up to `BATCH` of them are held.

    ``hashed`` asks for the digests of all files that came, went or have another content or type. Raises
    `CacheDamagedError` if our own files are damaged; what is wrong with the image's is in `Difference.problems`.
    """
    places = _DiffIDs(before, after)
    batch: list[_Pair] = []
    for pair in _joined(before, after):
        if pair.before is not None and pair.after is not None:
            _compare(pair, pair.before, pair.after, places, ignored)
            if not pair.changed and not pair.undecided:
                continue
        batch.append(pair)
        # Nothing waits that need not: only what comes behind a pair whose files have to be read.
        if len(batch) == BATCH or (len(batch) == 1 and not _is_read(pair, hashed=hashed)):
            yield from _settled(batch, before, after, hashed=hashed)
            batch = []
    yield from _settled(batch, before, after, hashed=hashed)


def _joined(before: Examination, after: Examination) -> Iterator[_Pair]:
    """Give every name that either image shows."""
    old, new = _shown(before), _shown(after)
    one, other = next(old, None), next(new, None)
    while one is not None and other is not None:
        if one.path == other.path:
            yield _Pair(one, other)
            one, other = next(old, None), next(new, None)
        elif sort_key(one.path) < sort_key(other.path):
            yield _Pair(one, None)
            one = next(old, None)
        else:
            yield _Pair(None, other)
            other = next(new, None)
    while one is not None:
        yield _Pair(one, None)
        one = next(old, None)
    while other is not None:
        yield _Pair(None, other)
        other = next(new, None)


def _shown(examination: Examination) -> Iterator[Version]:
    return (version for version in examination.history if version.end is End.VISIBLE)


# -- one name ------------------------------------------------------------------------------------------------------


class _DiffIDs:
    """Where a file's bytes are, in words that mean the same for both images."""

    def __init__(self, before: Examination, after: Examination) -> None:
        self._before, self._after = (
            {layer.number: str(layer.index.diff_id) for layer in examination.layers} for examination in (before, after)
        )

    def same(self, one: Version, other: Version) -> bool:
        """Whether two files lie at the same place, so that they are the same unread."""
        return len(one.extents) == len(other.extents) and all(
            here[0] == there[0] and here[2:] == there[2:] and self._before[here[1]] == self._after[there[1]]
            for here, there in zip(one.extents, other.extents, strict=True)
        )


def _compare(pair: _Pair, one: Version, other: Version, places: _DiffIDs, ignored: Sequence[str]) -> None:
    """Note what of a name that is in both images changed."""
    if one.kind != other.kind:
        pair.changed = () if "type" in ignored else ("type",)
        return
    is_file = one.kind == Kind.FILE
    content = is_file and (one.size != other.size or one.unreadable != other.unreadable)
    found = {
        "content": content,
        "mode": one.mode != other.mode,
        "owner": (one.uid, one.gid) != (other.uid, other.gid),
        "mtime": one.mtime_ns != other.mtime_ns,
        "xattrs": one.xattrs != other.xattrs and dict(one.xattrs) != dict(other.xattrs),
        "target": one.kind == Kind.SYMLINK and one.target != other.target,
        "device": one.kind in (Kind.CHAR, Kind.BLOCK) and one.rdev != other.rdev,
    }
    pair.changed = tuple(aspect for aspect, differs in found.items() if differs and aspect not in ignored)
    readable = is_file and not content and not one.unreadable
    pair.undecided = readable and "content" not in ignored and not places.same(one, other)


# -- many files ----------------------------------------------------------------------------------------------------


def _settled(batch: Sequence[_Pair], before: Examination, after: Examination, *, hashed: bool) -> Iterator[Difference]:
    """Read what has to be read for a number of names, and give those that differ."""
    old = _digests(before, [pair.before if _is_read(pair, hashed=hashed) else None for pair in batch])
    new = _digests(after, [pair.after if _is_read(pair, hashed=hashed) else None for pair in batch])
    for pair, one, other in zip(batch, old, new, strict=True):
        problems = tuple(str(digest) for digest in (one, other) if isinstance(digest, DamagedError))
        changed = pair.changed
        if pair.undecided and (problems or one != other):
            changed = ("content", *changed)
        version = pair.before or pair.after
        if version is not None and (changed or pair.before is None or pair.after is None):
            yield Difference(version.path, _side(pair.before, one), _side(pair.after, other), changed, problems)


def _is_read(pair: _Pair, *, hashed: bool) -> bool:
    other = pair.before is None or pair.after is None or not {"content", "type"}.isdisjoint(pair.changed)
    return pair.undecided or (hashed and other)


_Digest = bytes | DamagedError | None


def _digests(examination: Examination, versions: Sequence[Version | None]) -> list[_Digest]:
    """Give the digest of each file; None for what is none, or is not asked for."""
    files = [version for version in versions if version is not None and version.kind == Kind.FILE]
    found = iter(digests(examination, files))
    return [next(found) if version is not None and version.kind == Kind.FILE else None for version in versions]


def _side(version: Version | None, digest: _Digest) -> Side | None:
    return None if version is None else Side(version, digest if isinstance(digest, bytes) else None)
