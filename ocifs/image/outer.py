"""Compressed archives around an image (``docker save | gzip``): random access to the tar inside.

Such a file is indexed as a layer is, under its own SHA-256. The first look reads it whole; a second one finds it again by
the file's identity.

Not here: what is in the tar (`ocifs.sources`).
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from contextlib import ExitStack
from typing import TYPE_CHECKING

from ocifs import layer_index
from ocifs.image.indexing import Wanted, closing, digest_key, file_identity, remember, remembered
from ocifs.sources import LayerBlob
from ocifs.sources.blob import FileBlob
from ocifs.store import Kind

if TYPE_CHECKING:
    from ocifs.image.indexing import Progress
    from ocifs.layer_data import LayerData
    from ocifs.sources import Blob, FileRange
    from ocifs.store import Store

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


def open_outer_archive(path: bytes, store: Store, progress: Progress) -> Blob:
    """Give random access to the tar inside a compressed archive; reads it whole the first time."""
    stored = FileBlob(path)
    wanted = Wanted(LayerBlob(0, None, None, "", stored.size, None, None, lambda: stored), stored, "")
    with ExitStack() as undo:
        undo.push(closing(wanted))
        wanted.key = remembered(store, stored) or ""
        while not (wanted.key and wanted.load(store)):
            name = f"archive-{file_identity(stored)}"
            with store.lock(Kind.LAYER, name, waiting=lambda: progress.waiting(os.fsdecode(path))):
                wanted.key = remembered(store, stored) or ""
                if wanted.key and wanted.load(store):
                    break
                wanted.key = _index_archive(wanted, store, progress)
        undo.pop_all()
        return _DecodedArchive(stored.name, wanted.opened().data)


def _index_archive(wanted: Wanted, store: Store, progress: Progress) -> str:
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
        key = digest_key(built.digest)
        if built.reframed:
            copy_file.publish(key)
        index_file.publish(key)
        remember(store, wanted.stored, key)
        return key
