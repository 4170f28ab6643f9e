"""Compressed archives around an image (``docker save | gzip``): random access to the tar inside.

Such a file is indexed as a layer is, under its own SHA-256. The first look reads it whole; a second one finds it again by
the file's identity.

Not here: what is in the tar (`ocifs.sources`).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from contextlib import ExitStack
from typing import TYPE_CHECKING

from ocifs.image.indexing import Indexing
from ocifs.sources.blob import FileBlob

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

    def identity(self) -> str | None:
        """What was decoded, and so what it decodes to, is known by its digest."""
        return f"tar in {self._data.index.digest}"

    def close(self) -> None:
        """Close index and archive."""
        self._data.close()


def open_outer_archive(path: bytes, store: Store, progress: Progress) -> Blob:
    """Give random access to the tar inside a compressed archive; reads it whole the first time."""
    indexing = Indexing(store, tolerant=False, progress=progress)
    with ExitStack() as undo:
        wanted = indexing.add_archive(FileBlob(path))
        undo.callback(wanted.close)
        indexing.finish()
        undo.pop_all()
        return _DecodedArchive(wanted.stored.name, wanted.opened().data)
