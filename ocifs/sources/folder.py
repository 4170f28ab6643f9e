"""Files by name, in a directory or in an archive: what the layouts of images are written over.

The names that come here are made by the sources from constants and validated digests, or looked up in an archive's list
of members; nothing read from an image ever becomes a path on disk.

Not here: what the files mean.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Protocol

from ocifs.errors import DamagedError
from ocifs.sources.blob import FileBlob, os_problem, shown, stat_regular

if TYPE_CHECKING:
    from ocifs.sources.base import Blob


class Folder(Protocol):
    """Files by their relative names."""

    @property
    def name(self) -> str:
        """Where this is, for messages."""

    def size_of(self, name: bytes) -> int:
        """Bytes in the file ``name``; NotFoundError if there is none, DamagedError if it is no regular file."""

    def open(self, name: bytes) -> Blob:
        """Open the file ``name``; errors as `size_of`."""

    def close(self) -> None:
        """Let go of what is held open; opened blobs stay usable."""


def absolute(path: bytes) -> bytes:
    """Give the path from the root, symbolic links as they are; NotFoundError if the working directory is gone."""
    try:
        return os.path.abspath(path)
    except OSError as error:
        raise os_problem(error, f"{shown(path)}, relative to the working directory") from None


class DirectoryFolder:
    """A directory on disk."""

    def __init__(self, path: bytes) -> None:
        """Use the directory ``path``, which is made absolute: a daemon changes its working directory."""
        self._path = absolute(path)
        self.name = shown(self._path)

    def _join(self, name: bytes) -> bytes:
        if name.startswith(b"/") or b".." in name.split(b"/"):
            raise DamagedError(f"{shown(name)} would lie outside {self.name}")
        return os.path.join(self._path, name)

    def size_of(self, name: bytes) -> int:
        """See `Folder.size_of`."""
        return stat_regular(self._join(name)).st_size

    def open(self, name: bytes) -> Blob:
        """See `Folder.open`."""
        return FileBlob(self._join(name))

    def close(self) -> None:
        """Do nothing: nothing is held open."""
