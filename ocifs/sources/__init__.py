"""Where images are: OCI layouts, archives, ``dir:`` directories, containerd's store. Read-only, one small interface.

========================  =============================================================================================
`open_source`             from a reference to a `Source`
`ocifs.sources.base`      the contracts: `Source`, `Blob`, `LayerBlob`, `ResolvedImage`
`ocifs.sources.resolve`   what all sources with OCI documents share: choosing and verifying
`ocifs.sources.blob`      stored bytes with random access
the others                one place or one format each
========================  =============================================================================================
"""

from __future__ import annotations

from ocifs.sources.base import Blob, FileRange, LayerBlob, Offered, ResolvedImage, Source
from ocifs.sources.blob import stored_pieces
from ocifs.sources.open import CONTAINERD_ROOT, OpenArchive, open_source

__all__ = [
    "CONTAINERD_ROOT",
    "Blob",
    "FileRange",
    "LayerBlob",
    "Offered",
    "OpenArchive",
    "ResolvedImage",
    "Source",
    "open_source",
    "stored_pieces",
]
