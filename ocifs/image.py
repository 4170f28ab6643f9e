"""The one place that joins reference, source, documents, layer indexes and tree: from a reference to an open image.

Three steps, each usable alone, because commands need different depths:

1. `resolve`: reference → source → documents of the image for the platform. Reads no layer.
2. `open_layers`: per layer, the index from the store, or built by one pass over the blob and stored.
3. `open_image`: the merged tree from the store, or merged from the indexes and stored; with the layers' data.

Everything that is built is built once and kept under a key that says what it was made from:

* a layer index under the digest of the blob; where a source gives none (docker-archive) under diff ID, compression and
  stored size, which the index pass checks;
* an image tree under a hash of both format versions, the ordered layer keys and every option that changes the tree;
* a compressed outer archive is indexed as a layer is, under its own SHA-256, which is remembered by the file's identity
  (device, inode, size, mtime, ctime), so that a second look does not read it again.

Not here: how anything is found (`ocifs.sources`), kept (`ocifs.store`), indexed, merged or read.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import msgspec

from ocifs import compression, image_tree, layer_index, overlay, reference, sources
from ocifs.errors import DamagedError, OcifsError, UnsupportedError, UsageError
from ocifs.image_tree import ImageTree
from ocifs.layer_data import LayerData
from ocifs.layer_index import LayerIndex
from ocifs.reference import Reference
from ocifs.sources import Blob, LayerBlob, ResolvedImage
from ocifs.spec import Digest, Platform
from ocifs.store import Kind, Store, StoredFile
from ocifs.tree import Warned


class Progress(Protocol):
    """Who is told how far long work is. Called from the main thread only."""

    def begin(self, layer: int, label: str, size: int) -> None:
        """Work on a layer starts: ``size`` stored bytes to go. Layer 0 is an archive around the image."""

    def advance(self, layer: int, done: int) -> None:
        """``done`` stored bytes of the layer have been read."""

    def end(self, layer: int) -> None:
        """The layer is finished, or failed."""

    def merging(self, layers: int) -> None:
        """The tree of ``layers`` layers is being merged."""

    def waiting(self, what: str) -> None:
        """Another process is doing the work; we wait for it."""


class Silent:
    """A `Progress` that says nothing."""

    def begin(self, layer: int, label: str, size: int) -> None:
        """Nothing."""

    def advance(self, layer: int, done: int) -> None:
        """Nothing."""

    def end(self, layer: int) -> None:
        """Nothing."""

    def merging(self, layers: int) -> None:
        """Nothing."""

    def waiting(self, what: str) -> None:
        """Nothing."""


class ImageOptions(msgspec.Struct, frozen=True):
    """What a user can ask for that changes which image is opened or what its tree is."""

    platform: Platform | None = None
    """None: this machine's."""
    upto: int | None = None
    """Only the first N layers (from 1). A reference's ``#N`` says the same; the smaller one counts."""
    layer: int | None = None
    """That layer alone, merged as under examination, its whiteouts shown as files."""
    examine: bool = False
    show_whiteout_devices: bool = False
    follow_dirlinks: bool = False
    all_xattrs: bool = False
    namespace: str = "default"
    containerd_root: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Resolved:
    """A reference with the documents it leads to."""

    reference: Reference
    image: ResolvedImage

    @property
    def warnings(self) -> tuple[Warned, ...]:
        """What was noticed on the way."""
        return self.image.warnings


@dataclass(frozen=True, slots=True, eq=False)
class OpenLayer:
    """A layer with its index, and the file its spans are read from."""

    blob: LayerBlob
    key: str
    index: LayerIndex
    data: LayerData

    @property
    def number(self) -> int:
        """From 1, the base."""
        return self.blob.number

    def close(self) -> None:
        """Close blob and index."""
        self.data.close()


@dataclass(frozen=True, slots=True, eq=False)
class Image:
    """An open image: documents, layers and tree. ``layers`` are those that are part of the tree."""

    resolved: Resolved
    layers: tuple[OpenLayer, ...]
    tree: ImageTree
    _tree_file: StoredFile

    @property
    def warnings(self) -> tuple[Warned, ...]:
        """Everything noticed: documents, layers, merge."""
        return (*self.resolved.warnings, *self.tree.warnings())

    def close(self) -> None:
        """Close tree and layers."""
        self.tree.close()
        self._tree_file.close()
        for layer in self.layers:
            layer.close()

    def __enter__(self) -> Self:
        """Nothing to do: the image is open already."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close."""
        self.close()


# -- 1: documents --------------------------------------------------------------------------------------------------


@contextmanager
def open_source(
    text: str, options: ImageOptions, store: Store | None, progress: Progress | None = None
) -> Iterator[tuple[Reference, sources.Source]]:
    """The source that a reference names, open for the length of the block.

    ``store`` is needed for compressed archives only; without one they are refused.
    """
    parsed = reference.parse(text)

    def open_archive(path: Path) -> Blob:
        if store is None:
            message = f"{path} is a compressed archive, which cannot be read without a cache"
            raise UnsupportedError(message)
        return _open_archive(path, store, progress or Silent())

    source = sources.open_source(
        parsed,
        open_archive=open_archive,
        namespace=options.namespace,
        root=Path(options.containerd_root) if options.containerd_root else None,
    )
    try:
        yield parsed, source
    finally:
        source.close()


def resolve(text: str, options: ImageOptions, store: Store | None, progress: Progress | None = None) -> Resolved:
    """Find the image that ``text`` names, for the platform asked for. See `ocifs.sources.Source.resolve` for errors."""
    with open_source(text, options, store, progress) as (parsed, source):
        found = source.resolve(parsed.selector, options.platform, examine=options.examine)
        return Resolved(parsed, found)


# -- 2: layers -----------------------------------------------------------------------------------------------------


def chosen_layers(resolved: Resolved, options: ImageOptions) -> tuple[LayerBlob, ...]:
    """The layers that ``--upto``, ``#N`` and ``--layer`` leave. Raises `UsageError` naming how many there are."""
    layers = resolved.image.layers
    if options.layer is not None:
        if not 1 <= options.layer <= len(layers):
            message = f"there is no layer {options.layer}: the image has {len(layers)}, counted from 1"
            raise UsageError(message)
        return (layers[options.layer - 1],)
    limits = [limit for limit in (options.upto, resolved.reference.upto) if limit is not None]
    limit = min(limits, default=len(layers))
    if limits and not 1 <= limit <= len(layers):
        message = f"the image cannot be taken up to layer {limit}: it has {len(layers)}, counted from 1"
        raise UsageError(message)
    return layers[:limit]
