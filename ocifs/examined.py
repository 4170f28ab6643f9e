"""A mount under examination: the image, below its root the views of ``.ocifs``, on every object where it comes from.

Joins what makes views (`ocifs.forensics.workshop`) with what serves them (`ocifs.forest`). Below ``.ocifs``::

    layers/NN-HEX12/      one layer alone, its whiteouts as empty files .wh.*
    upto/NN/              the image as layers 1 to NN make it
    deleted/, history/    see `ocifs.forensics.views`
    slack/NN/             likewise
    raw/blobs/ALG/HEX     every blob of the image as stored: manifest, configuration, layers
    raw/tars/NN.tar       the layers' uncompressed tars, decoded as they are read
    reports/NAME          what commands say of the image

Trees are opened when they are first entered, reports made when somebody wants to know their size. What cannot be made is
EIO and a line in the log, and is tried again by whoever comes next.

Trees of the image keep its modes, and so do deleted files. The other views know no modes, so they are for who mounted alone,
whoever else may use the mount.

There are views of whole images (and of their first layers) only: not of a layer that is shown alone, nor of artifacts.

Not here: mount options and life cycle (`ocifs.mount`), values of attributes (`ocifs.forensics.attributes`).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import trio

from ocifs.errors import MachineError, OcifsError
from ocifs.forensics import attributes
from ocifs.forensics.examination import MAX_HOLES
from ocifs.forensics.views import number
from ocifs.forensics.workshop import Answer, Report, Wanted, Workshop
from ocifs.forest import Content, Document, Folder, Forest, Joined, Once, Values
from ocifs.fuse import Served
from ocifs.history import History
from ocifs.image import Image, ImageOptions
from ocifs.image_tree import ImageTree
from ocifs.rootfs import PIECE_SIZE, RootFS
from ocifs.sources import Blob
from ocifs.sources.blob import BytesBlob
from ocifs.spans import SpanReader
from ocifs.spec import layer_steps
from ocifs.store import Kind, Store
from ocifs.tree import Kind as NodeKind
from ocifs.tree import Origin

if TYPE_CHECKING:
    from ocifs.driver import Keeper
    from ocifs.evidence import EvidenceLog

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_HEX: Final = 12
"""Digits of a digest in names."""
_HASHES_KEPT: Final = 1 << 16
"""Hashes of files that are kept: 10 MB."""


class ViewError(OcifsError):
    """A view cannot be shown: an I/O error for who wants to see it."""


@dataclass(frozen=True)
class Examined:
    """What an examined mount shows besides the image."""

    options: ImageOptions
    """Those that the image was opened with."""
    reports: Mapping[str, Report]
    """By file name."""
    visible: bool = False
    """Whether a listing of the root shows ``.ocifs``."""
    list_hashes: bool = False
    """Whether ``getfattr -d`` and the like show every file's SHA-256, and so read it."""


@contextlib.contextmanager
def opened_blobs(image: Image) -> Iterator[dict[str, Blob]]:
    """Every blob of an image by digest, open for the length of the block; without those that are missing."""
    found = image.resolved.image
    with ExitStack() as stack:
        blobs: dict[str, Blob] = {}
        for digest, name, data in (
            (found.manifest_digest, "the manifest", found.manifest_raw),
            (found.config_digest, "the configuration", found.config_raw),
        ):
            named = str(digest) if digest is not None else "sha256:" + hashlib.sha256(data).hexdigest()
            blobs[named] = BytesBlob(name, data)
        actual = {layer.number: layer.index.digest for layer in image.layers}
        for layer in found.layers:
            digest = layer.digest or actual.get(layer.number)
            try:
                if digest is not None and str(digest) not in blobs:
                    blob = layer.open_stored()
                    stack.callback(blob.close)
                    blobs[str(digest)] = blob
            except OcifsError as error:
                _log.info("raw/blobs lacks a layer: %s", error)
        yield blobs


def serve(
    keeper: Keeper,
    *,
    image: Image,
    cache: Path,
    examined: Examined,
    view: RootFS,
    blobs: Mapping[str, Blob],
    serve_fuse: Callable[..., None],
    let_go: Callable[[], None],
) -> None:
    """Serve an examined image by ``serve_fuse``, which is `ocifs.driver.serve_fuse` but for keeper and adapter.

    ``view`` is the image's, ``blobs`` are what `opened_blobs` gave, ``cache`` is the directory of the store. ``let_go`` is
    called in the process that makes views, to close what is not for it.
    """
    with Workshop(image, cache, examined.options, examined.reports, let_go) as workshop, Store(cache) as store:
        maker = _Maker(workshop, store, image)
        views = _views(image, maker, view.spans, blobs, examined.reports)
        provenance = _Provenance(image, maker, list_hashes=examined.list_hashes)
        serve_fuse(keeper, adapter=Forest(view, views, provenance, visible=examined.visible))


# --- what there is ----------------------------------------------------------------------------------------------------


def _views(
    image: Image, maker: _Maker, spans: SpanReader, blobs: Mapping[str, Blob], reports: Mapping[str, Report]
) -> Folder:
    last = max((layer.number for layer in image.layers), default=0)
    by_digest: dict[str, int] = {}
    layers: dict[bytes, Joined] = {}
    upto: dict[bytes, Joined] = {}
    slack: dict[bytes, Joined] = {}
    tars: dict[bytes, Document] = {}

    def tree(what: str, layer: int = 0, *, private: bool = False) -> Joined:
        return Joined(partial(maker.tree, Wanted(what, layer), spans), private=private)

    for layer in image.layers:
        digest = layer.blob.digest or layer.index.digest
        by_digest.setdefault(str(digest), layer.number)
        name = number(layer.number, last)
        layers[f"{name}-{digest.hex[:_HEX]}".encode()] = tree("layer", layer.number)
        upto[name.encode()] = tree("upto", layer.number)
        slack[name.encode()] = tree("slack", layer.number)
        size = layer.index.layer_size
        tars[f"{name}.tar".encode()] = _document(_Tar(spans, layer.number, size), layer.number)
    stored: dict[bytes, dict[bytes, Document]] = {}
    for digest_text, blob in blobs.items():
        algorithm, _, encoded = digest_text.partition(":")
        document = _document(_Stored(blob, digest_text, image.evidence), by_digest.get(digest_text, 0))
        stored.setdefault(algorithm.encode(), {})[encoded.encode()] = document
    return Folder(
        {
            b"deleted": tree("deleted"),
            b"history": tree("history", private=True),
            b"layers": Folder(layers),
            b"raw": Folder(
                {
                    b"blobs": Folder({name: Folder(children) for name, children in stored.items()}),
                    b"tars": Folder(tars),
                },
                private=True,
            ),
            b"reports": Folder(
                {name.encode(): Document(partial(maker.report, name)) for name in reports}, private=True
            ),
            b"slack": Folder(slack, private=True),
            b"upto": Folder(upto),
        }
    )


def _document(content: Content, layer: int) -> Document:
    async def make() -> Content:
        return content

    return Document(make, size=content.size, layer=layer)


class _Tar:
    """A layer's uncompressed tar."""

    def __init__(self, spans: SpanReader, layer: int, size: int) -> None:
        self.size = size
        self._spans = spans
        self._layer = layer

    async def read(self, offset: int, size: int) -> bytes | memoryview:
        """See `ocifs.forest.Content`."""
        parts = await self._spans.read(self._layer, offset, size)
        return parts[0] if len(parts) == 1 else b"".join(parts)


class _Stored:
    """A blob as stored: whatever its bytes are now. The evidence log says that it was read, once, but not what was right."""

    def __init__(self, blob: Blob, digest: str, evidence: EvidenceLog | None) -> None:
        self.size = blob.size
        self._blob = blob
        self._digest = digest
        self._evidence = evidence

    async def read(self, offset: int, size: int) -> bytes:
        """See `ocifs.forest.Content`."""
        if self._evidence is not None:
            self._evidence.append("blob", which=self._digest, digest=self._digest, verified=None)
            self._evidence = None
        return await _in_thread(partial(self._blob.read_at, offset, size))


class _Written:
    """A report, in a file of ours."""

    def __init__(self, fd: int) -> None:
        self.size = os.fstat(fd).st_size
        self._fd = fd

    async def read(self, offset: int, size: int) -> bytes:
        """See `ocifs.forest.Content`."""
        return await _in_thread(partial(os.pread, self._fd, size, offset))


async def _in_thread(work: Callable[[], _T]) -> _T:
    return await trio.to_thread.run_sync(work, abandon_on_cancel=True)  # as in `ocifs.spans`


# --- making it --------------------------------------------------------------------------------------------------------


class _Maker:
    """Has the workshop make things, and opens them."""

    def __init__(self, workshop: Workshop, store: Store, image: Image) -> None:
        self._workshop = workshop
        self._store = store
        self._image = image
        self._turn: trio.Lock | None = None
        self.history = Once(self._open_history)

    async def _make(self, wanted: Wanted, opened: Callable[[Answer], _T]) -> _T:
        what = " ".join(str(word) for word in (wanted.what, wanted.layer, wanted.name) if word)
        if self._image.evidence is not None:
            self._image.evidence.append("view", view=what)
        if self._turn is None:
            self._turn = trio.Lock()
        async with self._turn:
            try:
                return await _in_thread(lambda: opened(self._workshop.make(wanted)))
            except (OcifsError, RuntimeError) as error:
                message = f".ocifs: the view '{what}' cannot be made: {error}"
                raise ViewError(message) from error

    async def tree(self, wanted: Wanted, spans: SpanReader) -> RootFS:
        """Open a tree, made if need be."""

        def opened(answer: Answer) -> ImageTree:
            file = self._store.open_entry(Kind.TREE, answer.key)
            if file is None:
                raise _vanished(answer.key)
            tree = ImageTree.open(file.fd, name=file.name)
            tree.on_damage = file.discard
            return tree

        return RootFS(await self._make(wanted, opened), spans)

    async def report(self, name: str) -> Content:
        """Have a report written."""
        return await self._make(Wanted("report", name=name), lambda answer: _Written(answer.fd))

    async def _open_history(self) -> History:
        def opened(answer: Answer) -> History:
            file = self._store.open_entry(Kind.HISTORY, answer.key)
            if file is None:
                raise _vanished(answer.key)
            history = History(file)
            history.on_damage = file.discard
            return history

        return await self._make(Wanted("versions"), opened)


def _vanished(key: str) -> MachineError:
    return MachineError(f"the cache entry {key} vanished just after it was made; try again")


# --- where things come from -------------------------------------------------------------------------------------------


class _Provenance:
    """See `ocifs.forest.Provenance`, and `ocifs.forensics.attributes` for the values."""

    def __init__(self, image: Image, maker: _Maker, *, list_hashes: bool) -> None:
        found = image.resolved.image
        steps = layer_steps(found.config, len(found.layers))
        self._of_layer = {layer.number: attributes.of_layer(layer, steps[layer.number - 1]) for layer in image.layers}
        self._maker = maker
        self._list_hashes = list_hashes
        self._data_size = sum(layer.index.layer_size for layer in image.layers)
        self._hashes: dict[tuple[Served, int], bytes] = {}
        self._last: tuple[Served | None, int, Origin] = (None, 0, Origin(0, -1))

    def names(self, view: Served, nid: int) -> list[bytes]:
        """See `ocifs.forest.Provenance`."""
        origin = self._origin(view, nid)
        kind = view.inode(nid).kind
        if kind not in (NodeKind.FILE, NodeKind.DIR):
            return []
        names = list(self._of_layer.get(origin.layer, ()))
        if _data_offset(view, nid) is not None:
            names.append(attributes.DATA_OFFSET)
        if origin.entry >= 0:
            names += [attributes.HEADER_OFFSET, attributes.VERSIONS]
        if self._list_hashes and kind is NodeKind.FILE and _is_readable(view, nid):
            names.append(attributes.SHA256)
        return names

    async def value(self, view: Served, nid: int, name: bytes) -> bytes | None:
        """See `ocifs.forest.Provenance`."""
        origin = self._origin(view, nid)
        known = self._of_layer.get(origin.layer, {}).get(name)
        if known is not None:
            return known
        if name == attributes.DATA_OFFSET:
            offset = _data_offset(view, nid)
            return None if offset is None else b"%d" % offset
        if name == attributes.SHA256:
            return await self._sha256(view, nid)
        if name in (attributes.HEADER_OFFSET, attributes.VERSIONS) and origin.entry >= 0:
            history = await self._maker.history.get()
            version = history.by_entry(origin.layer, origin.entry)
            if name == attributes.HEADER_OFFSET:
                return b"%d" % version.header_offset
            return b"%d" % attributes.versions_of_path(history.of(version.path))
        return None

    def _origin(self, view: Served, nid: int) -> Origin:
        """Give `_origin`; who asks for one attribute of an object asks for the others next."""
        if self._last[0] is not view or self._last[1] != nid:
            self._last = view, nid, _origin(view, nid)
        return self._last[2]

    async def _sha256(self, view: Served, nid: int) -> bytes | None:
        found = view.inode(nid)
        if found.kind is not NodeKind.FILE:
            return None
        known = self._hashes.get((view, nid))
        if known is None:
            view.check_readable(nid)
            if isinstance(view, RootFS) and found.size > self._data_size + MAX_HOLES:
                raise ViewError(f".ocifs: a file that claims {found.size} bytes, most of them holes, is not hashed")
            hasher, offset = hashlib.sha256(), 0
            while data := await view.read(nid, offset, PIECE_SIZE):
                hasher.update(data)
                offset += len(data)
            known = hasher.hexdigest().encode()
            if len(self._hashes) >= _HASHES_KEPT:
                self._hashes.clear()
            self._hashes[view, nid] = known
        return known


def _origin(view: Served, nid: int) -> Origin:
    """Say which entry made an object; layer 0 if none did, nor has it a layer."""
    if isinstance(view, RootFS):
        return view.tree.origin(nid) or Origin(0, -1)
    node = view.node(nid) if isinstance(view, Values) else None
    return Origin(node.layer if isinstance(node, Document) else 0, -1)


def _is_readable(view: Served, nid: int) -> bool:
    return not (isinstance(view, RootFS) and view.tree.unreadable(nid))


def _data_offset(view: Served, nid: int) -> int | None:
    if not isinstance(view, RootFS) or view.inode(nid).kind is not NodeKind.FILE or not _is_readable(view, nid):
        return None
    # Finding all pieces of a large file takes milliseconds; nearly always the first byte is one of the first piece.
    for size in (1, view.inode(nid).size):
        for piece in view.tree.extents(nid, 0, size):
            if piece.layer:
                return piece.layer_offset
    return None
