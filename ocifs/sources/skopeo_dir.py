"""skopeo's directory form (``dir:``): one image whose ``manifest.json`` and blobs lie beside each other.

A blob's file is named by the hex of its digest. With all platforms copied ``manifest.json`` is an index, and the
manifests below it are ``HEX.manifest.json``. Nothing gives the digest of ``manifest.json`` itself, so it is computed.

Not here: choosing and verifying (`ocifs.sources.resolve`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ocifs.errors import NotFoundError
from ocifs.sources.blob import BytesBlob
from ocifs.sources.resolve import Resolver, Top, offered, read_document, within
from ocifs.spec import Descriptor, Digest, Index, Platform, parse_document

if TYPE_CHECKING:
    from ocifs.reference import Selector
    from ocifs.sources.base import Blob, Offered, ResolvedImage
    from ocifs.sources.folder import Folder

MANIFEST_FILE: Final = b"manifest.json"
VERSION_FILE: Final = b"version"


class DirSource:
    """A ``dir:`` directory. Reads ``manifest.json`` once, when it is made."""

    def __init__(self, folder: Folder) -> None:
        """Read the image in ``folder``."""
        self._folder = folder
        self.description = f"directory {folder.name}"
        blob = folder.open(MANIFEST_FILE)
        with within(blob.name):
            self._raw = read_document(blob, "the document")
            document = parse_document(self._raw)
        self._digest = Digest.of(self._raw)
        platform = None if isinstance(document, Index) else document.config.platform
        self._top = Top((), Descriptor(document.media_type, self._digest, len(self._raw), platform=platform))

    def _name_of(self, digest: Digest) -> bytes:
        """Find the file of a blob: by its hex, or in newer versions of the form by algorithm and hex."""
        names = (digest.hex, f"{digest.hex}.manifest.json", f"{digest.algorithm}-{digest.hex}")
        for name in names:
            try:
                self._folder.size_of(name.encode())
            except NotFoundError:
                continue
            return name.encode()
        return digest.hex.encode()

    def size_of(self, digest: Digest) -> int:
        """See `BlobStore.size_of`."""
        if digest == self._digest:
            return len(self._raw)
        with within(f"blob {digest}"):
            return self._folder.size_of(self._name_of(digest))

    def open_digest(self, digest: Digest) -> Blob:
        """See `BlobStore.open_digest`."""
        if digest == self._digest:
            return BytesBlob(f"{self._folder.name}/manifest.json", self._raw)
        with within(f"blob {digest}"):
            return self._folder.open(self._name_of(digest))

    def names(self) -> tuple[Offered, ...]:
        """See `Source.names`."""
        return offered((self._top,))

    def resolve(self, selector: Selector, platform: Platform | None = None, *, examine: bool = False) -> ResolvedImage:
        """See `Source.resolve`."""
        return Resolver(self, examine=examine).image((self._top,), selector, platform)

    def close(self) -> None:
        """See `Source.close`."""
        self._folder.close()
