"""The one place that joins reference, source, documents, layer indexes and tree: from a reference to an open image.

Three steps, each usable alone, because commands need different depths:

1. `resolve`: reference → source → documents of the image for the platform. Reads no layer.
2. `open_layers`: per layer, the index from the store, or built by one pass over the blob and stored.
3. `open_image`: the merged tree from the store, or merged from the indexes and stored; with the layers' data.

Everything that is built is built once and kept under a key that says what it was made from:

* a layer index under the digest of the blob; where a source gives none (docker-archive) under diff ID, compression,
  stored size and a sample of the bytes, see `layer_key`;
* an image tree under a hash of both format versions, the ordered layer keys and every option that changes the tree;
* a compressed outer archive is indexed as a layer is, under its own SHA-256, which is remembered by the file's identity
  (device, inode, size, mtime, ctime), so that a second look does not read it again. The same is remembered of a layer
  that turned out, under examination, not to be what the image says it is.

What is damaged in the cache is built again: at once where it is found while an image is opened, else (while it is served)
by the next one that opens it, for whoever finds damage takes the entry's name away.

Not here: how anything is found (`ocifs.sources`), kept (`ocifs.store`), indexed, merged or read.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import os
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Self

import msgspec

from ocifs import compression, image_tree, reference, sources
from ocifs.errors import CacheDamagedError, MachineError, UnsupportedError, UsageError
from ocifs.forked import run_forked
from ocifs.image import artifact
from ocifs.image.indexing import Indexing, OpenLayer, Progress, Silent, layer_key
from ocifs.image.outer import open_outer_archive
from ocifs.image_tree import ImageTree
from ocifs.layer_index import Content
from ocifs.reference import Reference
from ocifs.rules import RULES_VERSION, MergeOptions, MountPoint
from ocifs.sources import Blob, LayerBlob, ResolvedImage
from ocifs.spec import Platform, printable
from ocifs.store import Kind, Store, StoredFile
from ocifs.tree import Tree, Warned

if TYPE_CHECKING:
    from ocifs.evidence import EvidenceLog

__all__ = [
    "Image",
    "ImageOptions",
    "OpenLayer",
    "Progress",
    "Resolved",
    "Silent",
    "chosen_layers",
    "kept_tree",
    "layer_key",
    "merged_tree",
    "note_opened",
    "open_image",
    "open_layers",
    "open_source",
    "resolve",
]


_log = logging.getLogger(__name__)

_MAX_FILES = 1 << 20
"""Open files asked for at most: the kernel's default for the most a process may have (fs.nr_open)."""


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
    mount_points: tuple[MountPoint, ...] = ()
    """See `MergeOptions`."""
    rootfs_only: bool = False
    """Refuse what is no root file system, instead of showing its blobs as files."""
    unpack: bool = False
    """Of an artifact, show blobs that are tars as directories."""


class Resolved(msgspec.Struct, frozen=True, eq=False):
    """A reference with the documents it leads to."""

    reference: Reference
    image: ResolvedImage

    @property
    def warnings(self) -> tuple[Warned, ...]:
        """What was noticed on the way."""
        return self.image.warnings


class Image(msgspec.Struct, frozen=True, eq=False):
    """An open image: documents, layers and tree. ``layers`` are those that are part of the tree."""

    resolved: Resolved
    layers: tuple[OpenLayer, ...]
    tree: ImageTree
    _tree_file: StoredFile
    evidence: EvidenceLog | None = None
    """Who is told what is read of the layers; whoever opened it closes it."""

    @property
    def warnings(self) -> tuple[Warned, ...]:
        """Everything noticed: documents, layers, merge."""
        layers = (warned for layer in self.layers for warned in layer.warnings)
        return (*self.resolved.warnings, *layers, *self.tree.warnings())

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
    text: str, options: ImageOptions, store: Store | Callable[[], Store] | None, progress: Progress | None = None
) -> Iterator[tuple[Reference, sources.Source]]:
    """The source that a reference names, open for the length of the block.

    ``store`` is needed for compressed archives only, so it may be a function that opens it; without one they are refused.
    """
    parsed = reference.parse(text)

    def open_archive(path: bytes) -> Blob:
        if store is None:
            message = f"{os.fsdecode(path)} is a compressed archive, which cannot be read without a cache"
            raise UnsupportedError(message)
        return open_outer_archive(path, store() if callable(store) else store, progress or Silent())

    source = sources.open_source(
        parsed,
        open_archive=open_archive,
        namespace=options.namespace,
        root=os.fsencode(options.containerd_root) if options.containerd_root else sources.CONTAINERD_ROOT,
    )
    try:
        yield parsed, source
    finally:
        source.close()


def resolve(
    text: str, options: ImageOptions, store: Store | Callable[[], Store] | None, progress: Progress | None = None
) -> Resolved:
    """Find the image that ``text`` names, for the platform asked for. See `ocifs.sources.Source.resolve` for errors.

    ``store`` as for `open_source`.
    """
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


def open_layers(
    resolved: Resolved, store: Store, options: ImageOptions, progress: Progress | None = None
) -> tuple[OpenLayer, ...]:
    """Open the layers that the options leave, each with its index, building those that are not in the store.

    Several are built at once. Raises what makes a layer unusable (missing, encrypted, not what was expected) unless
    ``options.examine`` can make do.
    """
    what = resolved.image.artifact
    if what is not None:
        message = (
            f"{resolved.reference.text} is no root file system but {what}; 'ocifs mount' shows its blobs as files, and "
            "'ocifs inspect' its documents"
        )
        raise UnsupportedError(message)
    _allow_many_files()
    indexing = Indexing(store, tolerant=options.examine, progress=progress or Silent())
    with ExitStack() as undo:
        for layer in chosen_layers(resolved, options):
            undo.callback(indexing.add(layer).close)
        indexing.finish()
        opened = tuple(one.opened() for one in indexing.wanted)
        undo.pop_all()
        return opened


def _allow_many_files() -> None:
    """Raise the limit of open files as far as it goes: an open layer takes two or three, while it is indexed four.

    The usual soft limit of 1024 is there for programs that use select(2); ocifs polls. An image may have any number of
    layers, and hard limits are 4096 to a million.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError) as error:  # a system that forbids it: what does not fit is said when it is met
            _log.info("the limit of open files stays %d: %s", soft, error)


# -- 3: the tree ---------------------------------------------------------------------------------------------------


def open_image(
    text: str,
    store: Store,
    options: ImageOptions,
    progress: Progress | None = None,
    *,
    evidence: EvidenceLog | None = None,
) -> Image:
    """Open the image that ``text`` names: documents, layers, and the merged tree, from the store where it has them.

    ``evidence`` is told what was opened, and kept with the image.

    Raises the errors of `resolve` and `open_layers`, and `DamagedError` for what the layer rules refuse.
    """
    progress = progress or Silent()
    try:
        image = _open_image(text, store, options, progress)
    except CacheDamagedError as error:
        _log.info("building again what is damaged in the cache: %s", error)  # who found it has discarded it
        image = _open_image(text, store, options, progress)
    store.keep_bounded()
    if evidence is not None:
        try:
            note_opened(evidence, image.resolved, image.layers)
        except BaseException:
            image.close()
            raise
        image = msgspec.structs.replace(image, evidence=evidence)
    return image


def note_opened(evidence: EvidenceLog, resolved: Resolved, layers: Sequence[OpenLayer]) -> None:
    """Tell the evidence log which image was opened, and whether its layers are what it says."""
    found = resolved.image
    documents = {"manifest": found.manifest_digest, "config": found.config_digest}
    evidence.append(
        "opened",
        reference=printable(resolved.reference.text),
        source=printable(found.source),
        **{name: None if digest is None else str(digest) for name, digest in documents.items()},
        warnings=[printable(warned.message) for warned in found.warnings],
        layers=[
            {
                "layer": layer.number,
                "digest": str(layer.index.digest),
                "diff_id": str(layer.index.diff_id),
                "stored_size": layer.index.stored_size,
                "size": layer.index.layer_size,
                "problems": [printable(warned.message) for warned in layer.warnings],
            }
            for layer in layers
        ],
    )


def _open_image(text: str, store: Store, options: ImageOptions, progress: Progress) -> Image:
    resolved = resolve(text, options, store, progress)
    is_artifact = resolved.image.artifact is not None and not options.rootfs_only
    contents: tuple[Content, ...] = ()
    with ExitStack() as undo:
        if is_artifact:
            layers, contents = _open_blobs(resolved, store, options, progress)
        else:
            layers = open_layers(resolved, store, options, progress)
        for layer in layers:
            undo.callback(layer.close)
        if is_artifact:
            every = options.all_xattrs

            def make() -> Tree:
                return artifact.tree(resolved.image, layers, contents, all_xattrs=every)

            tree, file = kept_tree(_artifact_key(resolved, layers, options), layers, make, store, progress)
        else:
            tree, file = merged_tree(layers, store, options, progress)
        undo.pop_all()
        return Image(resolved, layers, tree, file)


def merged_tree(
    layers: Sequence[OpenLayer], store: Store, options: ImageOptions, progress: Progress | None = None
) -> tuple[ImageTree, StoredFile]:
    """Open the merged tree of these layers, the base first; as `kept_tree`. ``options`` say how, not which layers."""
    key = _tree_key(layers, options)
    return kept_tree(key, layers, lambda: _merged(layers, options), store, progress or Silent())


def _merge_options(options: ImageOptions) -> MergeOptions:
    return MergeOptions(
        examine=options.examine or options.layer is not None,
        show_whiteout_devices=options.show_whiteout_devices,
        follow_dirlinks=options.follow_dirlinks,
        all_xattrs=options.all_xattrs,
        single_layer=options.layer is not None,
        mount_points=options.mount_points,
    )


def _tree_key(layers: Sequence[OpenLayer], options: ImageOptions) -> str:
    made_from = (
        image_tree.FORMAT_VERSION,
        RULES_VERSION,
        [(layer.number, layer.key) for layer in layers],
        _merge_options(options),
    )
    return hashlib.sha256(msgspec.json.encode(made_from)).hexdigest()


def _merged(layers: Sequence[OpenLayer], options: ImageOptions) -> Tree:
    from ocifs import overlay  # noqa: PLC0415 (a tree that is there already needs no merge)

    inputs = [
        overlay.LayerInput(layer.number, layer.index.entries(), layer.index.damage, layer.index.notices)
        for layer in layers
    ]
    return overlay.merge(inputs, _merge_options(options))


# -- artifacts -----------------------------------------------------------------------------------------------------


def _open_blobs(
    resolved: Resolved, store: Store, options: ImageOptions, progress: Progress
) -> tuple[tuple[OpenLayer, ...], tuple[Content, ...]]:
    """Open the blobs of an artifact: as bytes, or where tars are to be unpacked and it is one, as an archive."""
    _allow_many_files()
    blobs = chosen_layers(resolved, options)
    opened: dict[int, OpenLayer] = {}
    with ExitStack() as undo:
        for content in (Content.ARCHIVE, Content.BYTES) if options.unpack else (Content.BYTES,):
            # Whether it is an archive, and whole, is known afterwards; as bytes it must be what the manifest says.
            indexing = Indexing(store, tolerant=options.examine or content is Content.ARCHIVE, progress=progress)
            with ExitStack() as unopened:
                for blob in blobs:
                    if blob.number not in opened and (content is Content.BYTES or _may_be_tar(blob)):
                        unopened.callback(indexing.add(blob, content).close)
                indexing.finish()
                found = [one.opened() for one in indexing.wanted]
                unopened.pop_all()
            for layer in found:
                if content is Content.BYTES or artifact.is_tar(layer):
                    undo.callback(layer.close)
                    opened[layer.number] = layer
                else:
                    layer.close()
        undo.pop_all()
    layers = tuple(opened[blob.number] for blob in blobs)
    return layers, tuple(Content.ARCHIVE if artifact.is_tar(layer) else Content.BYTES for layer in layers)


def _may_be_tar(blob: LayerBlob) -> bool:
    stored = blob.open_stored()
    try:
        kind = compression.detect(stored.read_at(0, compression.HEAD_SIZE))
    finally:
        stored.close()
    return kind not in (compression.Compression.UNKNOWN, compression.Compression.EMPTY)


def _artifact_key(resolved: Resolved, layers: Sequence[OpenLayer], options: ImageOptions) -> str:
    # The manifest names the blobs; their keys say which of them are unpacked. Its digest says nothing if it is examined
    # and not what that says.
    made_from = (
        image_tree.FORMAT_VERSION,
        RULES_VERSION,
        hashlib.sha256(resolved.image.manifest_raw).hexdigest(),
        [(layer.number, layer.key) for layer in layers],
        options.all_xattrs,
    )
    return hashlib.sha256(b"artifact" + msgspec.json.encode(made_from)).hexdigest()


# -- writing it ----------------------------------------------------------------------------------------------------


def kept_tree(
    key: str, layers: Sequence[OpenLayer], make: Callable[[], Tree], store: Store, progress: Progress
) -> tuple[ImageTree, StoredFile]:
    """Open the tree that is kept under ``key``, and its file, whose closing is the caller's as well.

    If the store has none, ``make`` gives it, of nodes whose data lies in ``layers``; it is called in a forked child, so
    the caller has no second thread. Raises what ``make`` raises, and `MachineError` if it cannot be written.
    """
    tree, file = store.get_or_build(
        Kind.TREE,
        key,
        load=lambda file: (ImageTree.open(file.fd, name=file.name), file),
        build=lambda: _build_tree(key, layers, make, store, progress),
        waiting=lambda: progress.waiting("the merged tree"),
    )
    tree.on_damage = file.discard
    return tree, file


def _build_tree(
    key: str, layers: Sequence[OpenLayer], make: Callable[[], Tree], store: Store, progress: Progress
) -> None:
    progress.merging(len(layers))
    by_number = {layer.number: layer for layer in layers}
    # Device N of the tree is layer N; a layer shown alone leaves the devices before it empty.
    devices = [
        (by_number[number].index.diff_id.hex, by_number[number].index.layer_size) if number in by_number else ("", 0)
        for number in range(1, max(by_number, default=0) + 1)
    ]
    with store.new(Kind.TREE) as new:

        def work() -> None:
            # Nothing here is garbage until the child ends, and looking for it takes a third of the time.
            gc.disable()
            tree = make()
            try:
                image_tree.write(tree, new.file, layers=devices, rules_version=RULES_VERSION, key=key)
                new.file.flush()
            except OSError as error:
                message = f"cannot write the image tree into the cache directory {store.path}: {error.strerror}"
                raise MachineError(message) from error

        run_forked(work, "merges the layers")
        new.publish(key)
