"""Artifacts as files: what to show of a manifest that is no root file system.

A Helm chart, a Zarf package, an SBOM, model weights: an OCI manifest may name blobs of any kind as its layers. Each is
shown as one file, named by its annotation ``org.opencontainers.image.title`` (image-spec annotations.md; ORAS and others
write file names there, also with directories in front), else by the hex of its digest. Media type, digest and
annotations are extended attributes: ``user.ocifs.media_type``, ``user.ocifs.digest``, ``user.ocifs.annotation.KEY``.
On request a blob that is a tar, however compressed, is a directory of what is in it instead.

A title is somebody's text: one that leads out of the root, is absolute, or takes a name that a blob before it has is not
used (rule C10), with a warning. Layers are numbered as elsewhere, so drivers, views and caches treat an artifact as any
other tree.

Not here: which manifests are artifacts (`ocifs.spec.artifact_kind`), indexes and trees in the store (`ocifs.image`).
"""

from __future__ import annotations

import datetime
import itertools
from typing import TYPE_CHECKING, Final

from ocifs.layer_index import Content
from ocifs.overlay.upper import XATTRS_MAX, children_of
from ocifs.rules import MergeOptions
from ocifs.tree import Extent, Kind, Node, Origin, Tree, Warned

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ocifs.image.indexing import OpenLayer
    from ocifs.sources import LayerBlob, ResolvedImage

TITLE: Final = "org.opencontainers.image.title"
CREATED: Final = "org.opencontainers.image.created"

_NAME_MAX: Final = 255
_PATH_MAX: Final = 4095
_ATTRIBUTE_MAX: Final = 4096
"""Bytes of an annotation that is shown as an attribute; a longer one is left to 'ocifs inspect', as are those behind the
first `XATTRS_MAX` bytes of names and values, and names with a NUL."""


def is_tar(layer: OpenLayer) -> bool:
    """Whether a blob that was indexed as an archive is one, whole."""
    index = layer.index
    return index.entry_count > 0 and index.damage is None and not index.mismatches


def tree(
    image: ResolvedImage, layers: Sequence[OpenLayer], unpacked: Sequence[Content], *, all_xattrs: bool = False
) -> Tree:
    """Make the tree of an artifact's blobs; ``unpacked`` says of each what it was indexed as.

    ``all_xattrs`` is about what is unpacked (`ocifs.rules.MergeOptions`).
    """
    mtime_ns = _created_ns(image)
    result = Tree(Node(Kind.DIR, Origin(0, -1), mtime_ns=mtime_ns, children={}))
    spare = itertools.count(1)
    for layer, content in zip(layers, unpacked, strict=True):
        if content is Content.ARCHIVE:
            node = _directory(layer, result, MergeOptions(single_layer=True, all_xattrs=all_xattrs))
        else:
            node = _file(layer, mtime_ns)
        node.xattrs = _with_attributes(node.xattrs, layer.blob)
        _put(result, layer, node, mtime_ns, spare)
    return result


def _created_ns(image: ResolvedImage) -> int:
    said = image.manifest.annotations.get(CREATED, "") if image.manifest is not None else ""
    try:
        when = datetime.datetime.fromisoformat(said)
        return max(0, int(when.timestamp())) * 10**9 if when.tzinfo else 0
    except (ValueError, OverflowError):
        return 0


def _file(layer: OpenLayer, mtime_ns: int) -> Node:
    size = layer.index.layer_size
    extents = (Extent(0, layer.number, 0, size),) if size else ()
    return Node(Kind.FILE, Origin(layer.number, -1), 0o644, mtime_ns=mtime_ns, size=size, extents=extents)


def _directory(layer: OpenLayer, result: Tree, options: MergeOptions) -> Node:
    from ocifs import overlay  # noqa: PLC0415 (only what is unpacked needs a merge)

    index = layer.index
    content = overlay.LayerInput(layer.number, index.entries(), index.damage, index.notices)
    merged = overlay.merge([content], options)
    result.warnings += merged.warnings
    return merged.root


def _with_attributes(present: Sequence[tuple[bytes, bytes]], blob: LayerBlob) -> tuple[tuple[bytes, bytes], ...]:
    """Join ``present`` and what is known of the blob, sorted, within what a file system can hold."""
    found = {"media_type": blob.media_type, "digest": str(blob.digest or "")}
    if blob.descriptor is not None:
        found |= {f"annotation.{key}": value for key, value in blob.descriptor.annotations.items()}
    result = dict(present)
    total = sum(len(name) + len(value) for name, value in present)
    for key, text in found.items():
        name, value = f"user.ocifs.{key}".encode(errors="replace"), text.encode(errors="replace")
        size = len(name) + len(value)
        fits = len(name) <= _NAME_MAX and 0 < len(value) <= _ATTRIBUTE_MAX and total + size <= XATTRS_MAX
        if fits and b"\0" not in name:
            result[name] = value
            total += size
    return tuple(sorted(result.items()))


def _put(result: Tree, layer: OpenLayer, node: Node, mtime_ns: int, spare: Iterator[int]) -> None:
    blob = layer.blob
    title = blob.descriptor.annotations.get(TITLE, "") if blob.descriptor is not None else ""
    names = title.encode(errors="replace").split(b"/") if title else []
    digest = blob.digest or layer.index.digest
    plain = digest.hex.encode()
    if names and not _usable(names):
        result.warnings.append(
            Warned("C10", layer.number, title.encode(errors="replace"), "its title is no path inside")
        )
        names = []
    if names and not _place(result.root, names, node, mtime_ns):
        result.warnings.append(
            Warned("C10", layer.number, title.encode(errors="replace"), "its title is taken already")
        )
        names = []
    if not names:
        # Titles may have taken that, and what would be next. No number is tried twice, so all this ends soon.
        first = plain + b"-%d" % layer.number
        tried = itertools.chain([plain, first], (first + b"-%d" % number for number in spare))
        next(name for name in tried if _place(result.root, [name], node, mtime_ns))


def _usable(names: Sequence[bytes]) -> bool:
    return (
        all(name not in (b"", b".", b"..") and len(name) <= _NAME_MAX and b"\0" not in name for name in names)
        and sum(map(len, names)) + len(names) <= _PATH_MAX
    )


def _place(root: Node, names: Sequence[bytes], node: Node, mtime_ns: int) -> bool:
    """Put a node at a path, unless something else is there or on the way."""
    children = children_of(root)
    for name in names[:-1]:
        there = children.get(name)
        if there is None:
            there = children[name] = Node(Kind.DIR, Origin(0, -1), mtime_ns=mtime_ns, children={})
        elif there.kind is not Kind.DIR or there.origin.layer:
            return False
        children = children_of(there)
    if names[-1] in children:
        return False
    children[names[-1]] = node
    return True
