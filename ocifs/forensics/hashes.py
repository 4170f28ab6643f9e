"""Hashes of every file of an image, each byte decoded and hashed once.

Data is read as `ocifs.forensics.sweep` reads it, hashed in the threads that decode, and kept by where it lies: names that
share it (hard links, versions that a link brought back) share the hash. In memory are the hashes and eight bytes for each
file that has data: 40 MB for a million files and SHA-256.

Not here: lists of known hashes (`ocifs.forensics.known`), file formats (`ocifs.forensics.hash_lists`).
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final, NamedTuple

from ocifs.errors import DamagedError
from ocifs.forensics.examination import MAX_HOLES
from ocifs.forensics.sweep import Stream, Wanted, sweep
from ocifs.tree import Kind

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from ocifs.evidence import EvidenceLog
    from ocifs.history import Version
    from ocifs.image import OpenLayer
    from ocifs.rootfs import RootFS

ALGORITHMS: Final = ("md5", "sha1", "sha256")
"""What can be asked for, in the order in which hash lists have them."""

_SIZES: Final = {"md5": 16, "sha1": 20, "sha256": 32}
_ZEROS: Final = bytes(1 << 20)


class Content(NamedTuple):
    """What identifies the bytes of a file of an image: where they lie, and how long the file is."""

    layer: int
    """0 if the file has no stored bytes: it is empty, or one hole."""
    layer_offset: int
    size: int
    unreadable: bool = False
    """The image does not hold the bytes (`ocifs.history.Version.unreadable`)."""


class File(NamedTuple):
    """A file to be hashed."""

    path: bytes
    """Without a leading slash."""
    content: Content
    version: Version | None = None
    """None for files of the merged tree."""


def content_of(version: Version) -> Content:
    """Give the content of a version that is a file."""
    if not version.extents:
        return Content(0, 0, version.size, version.unreadable)
    _, layer, layer_offset, _ = version.extents[0]
    return Content(layer, layer_offset, version.size, version.unreadable)


def merged_files(view: RootFS) -> Iterator[File]:
    """Give the files of a merged tree, by path, hard links under each of their names."""
    for path, found in view.preorder():
        if found.kind is Kind.FILE:
            if view.tree.unreadable(found.ino):
                yield File(path, Content(0, 0, found.size, unreadable=True))
                continue
            first = (piece for piece in view.tree.extents(found.ino, 0, found.size) if piece[0])
            layer, layer_offset, _ = next(first, (0, 0, 0))
            yield File(path, Content(layer, layer_offset, found.size))


def all_files(history: Iterable[Version]) -> Iterator[File]:
    """Give every version that is a file, by path and layer, those that no tree ever had too."""
    return (File(version.path, content_of(version), version) for version in history if version.kind == Kind.FILE)


class Digests:
    """The hashes of contents. `calculate` makes them."""

    def __init__(self, algorithms: Sequence[str]) -> None:
        self.algorithms = tuple(name for name in ALGORITHMS if name in algorithms)
        self._wanted = Wanted()
        self._width = sum(_SIZES[name] for name in self.algorithms)
        self._digests: dict[int, bytearray] = {}
        self._holes: dict[int, bytes] = {}
        """By size, of files without stored bytes."""
        self._errors: dict[tuple[int, int], str] = {}

    def get(self, content: Content) -> bytes:
        """Give the hashes of a content one behind the other, in the order of `algorithms`.

        Raises `DamagedError` if the image does not have the bytes, or if they do not decode to what was indexed.
        """
        if content.unreadable:
            raise DamagedError("no layer holds its data: its layer breaks off, or it is a link to nothing")
        if not content.layer:
            return self._of_hole(content.size)
        error = self._errors.get((content.layer, content.layer_offset))
        if error is not None:
            raise DamagedError(error)
        at = self._wanted.number(content.layer, content.layer_offset) * self._width
        found = bytes(self._digests.get(content.layer, b"")[at : at + self._width]) if at >= 0 else b""
        if not any(found):  # no data has such hashes: nothing was read there
            raise DamagedError("its layer breaks off within its data")
        return found

    def split(self, digests: bytes) -> dict[str, str]:
        """Give what `get` gives as hexadecimal text by algorithm."""
        found, at = {}, 0
        for name in self.algorithms:
            found[name] = digests[at : at + _SIZES[name]].hex()
            at += _SIZES[name]
        return found

    def calculate(
        self, layers: Iterable[OpenLayer], contents: Iterable[Content], evidence: EvidenceLog | None = None
    ) -> None:
        """Hash all these contents; ``evidence`` is told what was read."""
        for content in contents:
            if content.layer and not content.unreadable:
                self._wanted.add(content.layer, content.layer_offset)
        self._wanted.settle()
        for stream, taker, error in sweep(layers, self._wanted, self._begin, evidence=evidence):
            number = self._wanted.number(stream.layer, stream.layer_offset)
            digests = self._digests.get(stream.layer)
            if digests is None:
                count = len(self._wanted.of(stream.layer))
                digests = self._digests[stream.layer] = bytearray(count * self._width)
            if error is not None:
                self._errors[stream.layer, stream.layer_offset] = str(error)
            elif taker.too_large:
                self._errors[stream.layer, stream.layer_offset] = _TOO_LARGE
            else:
                digests[number * self._width : (number + 1) * self._width] = taker.digests()

    def _begin(self, stream: Stream, *, whole: bool) -> _Hashing:  # noqa: ARG002 (the sweep's signature)
        return _Hashing(self.algorithms, stream.size - stream.stored_size)

    def _of_hole(self, size: int) -> bytes:
        if size > MAX_HOLES:
            raise DamagedError(_TOO_LARGE)
        found = self._holes.get(size)
        if found is None:
            hashing = _Hashing(self.algorithms, size)
            hashing.hole(size)
            found = self._holes[size] = hashing.digests()
        return found


_TOO_LARGE: Final = f"it has holes of more than {MAX_HOLES >> 30} GiB together, which are not hashed"


class _Hashing:
    """Takes one stream."""

    __slots__ = ("_hashes", "too_large")

    def __init__(self, algorithms: Sequence[str], holes: int) -> None:
        self._hashes = [hashlib.new(name, usedforsecurity=False) for name in algorithms]
        self.too_large = holes > MAX_HOLES

    def take(self, data: memoryview) -> None:
        for hashing in self._hashes:
            hashing.update(data)

    def hole(self, size: int) -> None:
        while size > 0 and not self.too_large:
            self.take(memoryview(_ZEROS)[:size])
            size -= len(_ZEROS)

    def finish(self) -> None:
        pass

    def digests(self) -> bytes:
        return b"".join(hashing.digest() for hashing in self._hashes)
