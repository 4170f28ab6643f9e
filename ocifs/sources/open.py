"""From a reference to the source that can answer it.

Not here: the sources themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ocifs.errors import UnsupportedError
from ocifs.reference import Reference, Scheme
from ocifs.sources.base import Blob, Source
from ocifs.sources.folder import DirectoryFolder
from ocifs.sources.layout import LayoutSource

OpenArchive = Callable[[bytes], Blob]
"""Give random access to the uncompressed tar inside the compressed archive at this path."""

CONTAINERD_ROOT: Final = b"/var/lib/containerd"
"""Where containerd keeps everything unless told otherwise (its ``root`` setting)."""


def open_source(
    reference: Reference,
    *,
    open_archive: OpenArchive | None = None,
    namespace: str = "default",
    root: bytes = CONTAINERD_ROOT,
) -> Source:
    """Open the source that ``reference`` names. ``namespace`` and ``root`` are containerd's."""
    if reference.scheme in {Scheme.OCI, Scheme.PATH}:
        return LayoutSource(DirectoryFolder(reference.path), "OCI layout")
    raise UnsupportedError(f"{reference.text}: not supported yet")
