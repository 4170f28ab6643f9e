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
import logging
import os
import select
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol, Self

import msgspec

from ocifs import compression, image_tree, layer_index, overlay, reference, sources
from ocifs.errors import DamagedError, MachineError, NotFoundError, StaleFormatError, UnsupportedError, UsageError
from ocifs.forked import run_forked
from ocifs.image_tree import ImageTree
from ocifs.layer_data import LayerData
from ocifs.layer_index import LayerIndex
from ocifs.reference import Reference
from ocifs.sources import Blob, FileRange, LayerBlob, ResolvedImage
from ocifs.sources.blob import FileBlob
from ocifs.spec import Digest, Platform
from ocifs.store import BuildLock, Kind, Store, StoredFile
from ocifs.tree import Warned

_log = logging.getLogger(__name__)


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

    def open_archive(path: bytes) -> Blob:
        if store is None:
            message = f"{os.fsdecode(path)} is a compressed archive, which cannot be read without a cache"
            raise UnsupportedError(message)
        return _open_archive(path, store, progress or Silent())

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


def layer_key(blob: LayerBlob, stored: Blob) -> str:
    """Under what a layer's index is kept: the blob's digest, else what a docker-archive says of it (module docstring)."""
    if blob.digest is not None:
        return _digest_key(blob.digest)
    kind = compression.detect(stored.read_at(0, compression.HEAD_SIZE))
    diff_id = blob.diff_id
    if diff_id is None:
        message = f"layer {blob.number} has neither digest nor diff ID to vouch for it; --examine reads it anyway"
        raise DamagedError(message)
    return f"diffid-{diff_id.algorithm}-{diff_id.hex}-{kind.value}-{stored.size}"


def _digest_key(digest: Digest) -> str:
    return f"{digest.algorithm}-{digest.hex}"


def open_layers(
    resolved: Resolved, store: Store, options: ImageOptions, progress: Progress | None = None
) -> tuple[OpenLayer, ...]:
    """Open the layers that the options leave, each with its index, building those that are not in the store.

    Several are built at once. Raises what makes a layer unusable (missing, encrypted, not what was expected) unless
    ``options.examine`` can make do.
    """
    artifact = resolved.image.artifact
    if artifact is not None:
        message = (
            f"{resolved.reference.text} is no root file system but {artifact}; 'ocifs inspect' shows what is in it"
        )
        raise UnsupportedError(message)
    indexing = _Indexing(store, tolerant=options.examine, progress=progress or Silent())
    with ExitStack() as undo:
        for layer in chosen_layers(resolved, options):
            undo.push(_closing(indexing.add(layer)))
        indexing.finish()
        opened = tuple(one.opened() for one in indexing.wanted)
        undo.pop_all()
        return opened


def _closing(wanted: _Wanted) -> Callable[..., None]:
    def close(*_: object) -> None:
        wanted.close()

    return close


class _Wanted:
    """A layer on its way to being open: its blob, its key, and its index once that is loaded."""

    def __init__(self, blob: LayerBlob, stored: Blob, key: str) -> None:
        self.blob = blob
        self.stored = stored
        self.key = key
        self.index: LayerIndex | None = None
        self.copy: StoredFile | None = None

    def load(self, store: Store) -> bool:
        """Load index and re-framed copy from the store if they are there, whole and of this format version."""
        file = store.open_entry(Kind.LAYER, self.key)
        if file is None:
            return False
        try:
            index = layer_index.load(file)
            if index.stored_size != self.stored.size and not index.mismatches:
                message = (
                    f"{self.stored.name} has {self.stored.size} bytes; the layer {index.digest} has {index.stored_size}: "
                    "it was cut or replaced"
                )
                raise _WrongSizeError(message)
            copy = store.open_entry(Kind.REFRAMED, self.key) if index.reframed else None
            if index.reframed and (copy is None or copy.size != index.data_size):
                if copy is not None:
                    copy.close()
                message = f"the re-framed copy of layer {index.digest} was evicted"
                raise StaleFormatError(message)
        except _WrongSizeError:
            file.close()
            raise
        except (StaleFormatError, DamagedError) as error:
            _log.info("rebuilding a layer index: %s", error)
            file.close()
            store.discard(Kind.LAYER, self.key)
            return False
        self.index, self.copy = index, copy
        return True

    def opened(self) -> OpenLayer:
        """Give the layer, once `load` has succeeded."""
        if self.index is None:
            message = f"layer {self.blob.number} was not loaded"
            raise RuntimeError(message)
        data: Blob | StoredFile = self.stored
        if self.copy is not None:
            self.stored.close()
            data = self.copy
        return OpenLayer(self.blob, self.key, self.index, LayerData(self.blob.number, self.index, data))

    def close(self) -> None:
        self.stored.close()
        if self.copy is not None:
            self.copy.close()
        if self.index is not None:
            self.index.close()


class _WrongSizeError(DamagedError):
    """The blob no longer has the size that was indexed under its digest: the blob is at fault, not the cache."""


class _Job:
    """One index being built: the child process, and the files it writes into."""

    def __init__(
        self, wanted: _Wanted, lock: BuildLock, store: Store, *, tolerant: bool, archive: bool, threads: int
    ) -> None:
        self.wanted = wanted
        self._store = store
        with ExitStack() as undo:
            undo.enter_context(lock)
            self._index_file = undo.enter_context(store.new(Kind.LAYER))
            self._copy_file = undo.enter_context(store.new(Kind.REFRAMED))
            blob = wanted.blob
            self.build = undo.enter_context(
                layer_index.Build(
                    wanted.stored,
                    out=self._index_file.file,
                    reframed=self._copy_file.file,
                    expected=layer_index.Expected(blob.size if blob.digest else None, blob.digest, blob.diff_id),
                    tolerant=tolerant,
                    archive=archive,
                    threads=threads,
                )
            )
            self._undo = undo.pop_all()

    def publish(self) -> None:
        """Put what was built into the store. An index of other bytes than expected goes under their actual digest."""
        built = self.build.result()
        if built.mismatches or (self.wanted.blob.digest is None and self.wanted.blob.diff_id is None):
            self.wanted.key = _digest_key(built.digest)
            _remember(self._store, self.wanted.stored, self.wanted.key)
        if built.reframed:
            self._copy_file.publish(self.wanted.key)
        self._index_file.publish(self.wanted.key)

    def close(self) -> None:
        """Kill the child if it still runs, remove what was not published, release the lock."""
        self._undo.close()


class _Indexing:
    """Gets the indexes of many layers: from the store, from builds of our own, from builds of other processes.

    Never waits for another process while holding the right to build something, so two processes that want the same
    layers in different order cannot wait for each other.
    """

    def __init__(self, store: Store, *, tolerant: bool, progress: Progress) -> None:
        self.wanted: list[_Wanted] = []
        self._store = store
        self._tolerant = tolerant
        self._progress = progress

    def add(self, blob: LayerBlob) -> _Wanted:
        stored = blob.open_stored() if self._tolerant and not isinstance(blob.problem, NotFoundError) else blob.open()
        try:
            # Under examination a blob that is not what its digest says was indexed as what it is.
            remembered = _remembered(self._store, stored) if self._tolerant else None
            if remembered is not None:
                key = remembered
            elif self._tolerant and blob.digest is None and blob.diff_id is None:
                key = f"unnamed-{_identity(stored)}"
            else:
                key = layer_key(blob, stored)
        except BaseException:
            stored.close()
            raise
        self.wanted.append(_Wanted(blob, stored, key))
        return self.wanted[-1]

    def finish(self) -> None:
        """Load or build every index wanted."""
        while missing := [one for one in self.wanted if one.index is None and not one.load(self._store)]:
            mine: list[tuple[_Wanted, BuildLock]] = []
            for one in missing:
                lock = self._store.try_lock(Kind.LAYER, one.key)
                if lock is None:
                    continue
                if one.load(self._store):  # another process finished it just before we got the lock
                    lock.release()
                else:
                    mine.append((one, lock))
            if mine:
                self._build(mine)
                continue
            theirs = missing[0]
            self._progress.waiting(f"layer {theirs.blob.number}")
            with self._store.lock(Kind.LAYER, theirs.key):
                pass  # whoever had it is done; look again

    def _build(self, mine: list[tuple[_Wanted, BuildLock]]) -> None:
        """Build as many at once as there are CPUs, the largest first: it is what the others can hide behind."""
        cpus = len(os.sched_getaffinity(0))
        queue = sorted(mine, key=lambda one: one[0].stored.size)
        running: list[_Job] = []
        try:
            while queue or running:
                while queue and len(running) < cpus:
                    running.append(self._start(*queue.pop(), threads=cpus))
                self._step(running)
        finally:
            for job in running:
                job.close()
            for _, lock in queue:
                lock.release()

    def _start(self, wanted: _Wanted, lock: BuildLock, threads: int) -> _Job:
        self._progress.begin(wanted.blob.number, wanted.stored.name, wanted.stored.size)
        return _Job(wanted, lock, self._store, tolerant=self._tolerant, archive=False, threads=threads)

    def _step(self, running: list[_Job]) -> None:
        """Wait until one of the builds has news, and take them in."""
        poll = select.poll()
        jobs = {job.build.fileno(): job for job in running}
        for fd in jobs:
            poll.register(fd, select.POLLIN)
        for fd, _ in poll.poll():
            job = jobs[fd]
            over = job.build.step()
            self._progress.advance(job.wanted.blob.number, job.build.stored)
            if over:
                job.publish()
                running.remove(job)
                job.close()
                self._progress.end(job.wanted.blob.number)


# -- files known by identity ---------------------------------------------------------------------------------------


class _Remembered(msgspec.Struct, frozen=True):
    """What a file hashed to when it was last read whole."""

    key: str


def _identity(stored: Blob) -> str:
    """A key for a file as it is now, without reading it: device, inode, size, mtime and ctime, and where in it we are."""
    place = stored.file_range()
    if place is None:
        return hashlib.sha256(f"{stored.name} {stored.size}".encode()).hexdigest()
    fd, offset, size = place
    status = os.fstat(fd)
    what = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, offset, size)
    return hashlib.sha256(repr(what).encode()).hexdigest()


def _remembered(store: Store, stored: Blob) -> str | None:
    file = store.open_entry(Kind.ARCHIVE, _identity(stored))
    if file is None:
        return None
    with file:
        try:
            return msgspec.json.decode(file.read_at(0, 4096), type=_Remembered).key
        except msgspec.MsgspecError:
            return None


def _remember(store: Store, stored: Blob, key: str) -> None:
    with store.new(Kind.ARCHIVE) as new:
        new.file.write(msgspec.json.encode(_Remembered(key)))
        new.publish(_identity(stored))


# -- compressed archives around an image ---------------------------------------------------------------------------

_ARCHIVE_CACHE = 16 << 20
"""Bytes of decoded spans kept of a compressed outer archive: 16 MiB. Layers are read through it in order."""


class _DecodedArchive:
    """The uncompressed tar inside a compressed archive, as a `Blob`. Keeps the spans decoded last."""

    def __init__(self, name: str, data: LayerData) -> None:
        self.name = name
        self.size = data.size
        self._data = data
        self._lock = threading.Lock()
        self._spans: OrderedDict[int, bytes] = OrderedDict()
        self._kept = 0
        self._users = 1

    def read_at(self, offset: int, size: int, /) -> bytes:
        """Give ``size`` bytes at ``offset`` of the uncompressed tar."""
        parts = [self._span(span)[start:stop] for span, start, stop in self._data.slices(offset, size)]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _span(self, number: int) -> bytes:
        with self._lock:
            data = self._spans.get(number)
            if data is not None:
                self._spans.move_to_end(number)
                return data
        data = bytes(self._data.decode(number))
        with self._lock:
            if number not in self._spans:
                self._spans[number] = data
                self._kept += len(data)
                while self._kept > _ARCHIVE_CACHE:
                    self._kept -= len(self._spans.popitem(last=False)[1])
        return data

    def file_range(self) -> FileRange | None:
        """Nothing on disk holds these bytes in one piece."""
        return None

    def close(self) -> None:
        """Close index and archive."""
        self._data.close()


def _open_archive(path: bytes, store: Store, progress: Progress) -> Blob:
    """Give random access to the tar inside a compressed archive; reads it whole the first time."""
    stored = FileBlob(path)
    wanted = _Wanted(LayerBlob(0, None, None, "", stored.size, None, None, lambda: stored), stored, "")
    with ExitStack() as undo:
        undo.push(_closing(wanted))
        wanted.key = _remembered(store, stored) or ""
        while not (wanted.key and wanted.load(store)):
            name = f"archive-{_identity(stored)}"
            with store.lock(Kind.LAYER, name, waiting=lambda: progress.waiting(os.fsdecode(path))):
                wanted.key = _remembered(store, stored) or ""
                if wanted.key and wanted.load(store):
                    break
                wanted.key = _index_archive(wanted, store, progress)
        undo.pop_all()
        return _DecodedArchive(stored.name, wanted.opened().data)


def _index_archive(wanted: _Wanted, store: Store, progress: Progress) -> str:
    with store.new(Kind.LAYER) as index_file, store.new(Kind.REFRAMED) as copy_file:
        progress.begin(0, wanted.stored.name, wanted.stored.size)
        try:
            built = layer_index.build(
                wanted.stored,
                out=index_file.file,
                reframed=copy_file.file,
                archive=True,
                progress=lambda done: progress.advance(0, done),
            )
        finally:
            progress.end(0)
        key = _digest_key(built.digest)
        if built.reframed:
            copy_file.publish(key)
        index_file.publish(key)
        _remember(store, wanted.stored, key)
        return key


# -- 3: the tree ---------------------------------------------------------------------------------------------------


def open_image(text: str, store: Store, options: ImageOptions, progress: Progress | None = None) -> Image:
    """Open the image that ``text`` names: documents, layers, and the merged tree, from the store where it has them.

    Raises the errors of `resolve` and `open_layers`, and `DamagedError` for what the layer rules refuse.
    """
    progress = progress or Silent()
    resolved = resolve(text, options, store, progress)
    layers = open_layers(resolved, store, options, progress)
    with ExitStack() as undo:
        for layer in layers:
            undo.callback(layer.close)
        key = _tree_key(layers, options)
        tree, file = store.get_or_build(
            Kind.TREE,
            key,
            load=lambda file: (ImageTree.open(file.fd, name=file.name), file),
            build=lambda: _build_tree(key, layers, store, options, progress),
            waiting=lambda: progress.waiting("the merged tree"),
        )
        undo.pop_all()
        return Image(resolved, layers, tree, file)


def _merge_options(options: ImageOptions) -> overlay.MergeOptions:
    return overlay.MergeOptions(
        examine=options.examine or options.layer is not None,
        show_whiteout_devices=options.show_whiteout_devices,
        follow_dirlinks=options.follow_dirlinks,
        all_xattrs=options.all_xattrs,
        single_layer=options.layer is not None,
    )


def _tree_key(layers: Sequence[OpenLayer], options: ImageOptions) -> str:
    made_from = (
        image_tree.FORMAT_VERSION,
        overlay.RULES_VERSION,
        [(layer.number, layer.key) for layer in layers],
        _merge_options(options),
    )
    return hashlib.sha256(msgspec.json.encode(made_from)).hexdigest()


def _build_tree(key: str, layers: Sequence[OpenLayer], store: Store, options: ImageOptions, progress: Progress) -> None:
    progress.merging(len(layers))
    inputs = [
        overlay.LayerInput(layer.number, layer.index.entries(), layer.index.damage, layer.index.notices)
        for layer in layers
    ]
    by_number = {layer.number: layer for layer in layers}
    # Device N of the tree is layer N; a layer shown alone leaves the devices before it empty.
    devices = [
        (by_number[number].index.diff_id.hex, by_number[number].index.layer_size) if number in by_number else ("", 0)
        for number in range(1, max(by_number, default=0) + 1)
    ]
    with store.new(Kind.TREE) as new:

        def work() -> None:
            tree = overlay.merge(inputs, _merge_options(options))
            try:
                image_tree.write(tree, new.file, layers=devices, rules_version=overlay.RULES_VERSION, key=key)
                new.file.flush()
            except OSError as error:
                message = f"cannot write the image tree into the cache directory {store.path}: {error.strerror}"
                raise MachineError(message) from error

        run_forked(work, "merges the layers")
        new.publish(key)
