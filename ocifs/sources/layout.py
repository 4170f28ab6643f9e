"""OCI image layouts (image-spec image-layout.md), in a directory or in an archive.

``index.json`` lists what there is; ``blobs/ALG/HEX`` holds it. Tags are annotations of the index's descriptors. Other
files are nobody's business (rule C7), and blobs may be missing until somebody needs them.

Not here: choosing and verifying (`ocifs.sources.resolve`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from ocifs.errors import DamagedError, NotFoundError, UnsupportedError
from ocifs.sources.resolve import Resolver, Top, offered, read_document, within
from ocifs.spec import Descriptor, Digest, Index, MediaType, Platform, parse_document

if TYPE_CHECKING:
    from ocifs.reference import Selector
    from ocifs.sources.base import Blob, Offered, ResolvedImage
    from ocifs.sources.folder import Folder

REF_NAME: Final = "org.opencontainers.image.ref.name"
FULL_NAME: Final = "io.containerd.image.name"
"""BuildKit, containerd and Docker write the whole image name here, and only the tag into `REF_NAME`."""

INDEX_FILE: Final = b"index.json"
MARKER_FILE: Final = b"oci-layout"


class _Marker(msgspec.Struct):
    version: str | None = msgspec.field(default=None, name="imageLayoutVersion")


def descriptor_names(descriptor: Descriptor) -> tuple[str, ...]:
    """Give the names by which an index's annotations let a descriptor be selected."""
    found = (descriptor.annotations.get(key) for key in (REF_NAME, FULL_NAME))
    return tuple(dict.fromkeys(name for name in found if name))


class LayoutSource:
    """An OCI image layout. Reads ``index.json`` once, when it is made."""

    def __init__(self, folder: Folder, kind: str) -> None:
        """Read the layout in ``folder``; ``kind`` is what to call it in messages: ``OCI layout``."""
        self._folder = folder
        self.description = f"{kind} {folder.name}"
        with within(kind):
            self._check_version()
            blob = folder.open(INDEX_FILE)
            with within(blob.name):
                index = parse_document(read_document(blob, "the document"), MediaType.OCI_INDEX)
        if not isinstance(index, Index):
            raise DamagedError(f"{self.description}: index.json is a manifest, where an index belongs")
        self._tops = tuple(Top(descriptor_names(descriptor), descriptor) for descriptor in index.manifests)

    def _check_version(self) -> None:
        """Refuse a layout of a later major version. Some tools leave the file out: the index says enough."""
        try:
            raw = read_document(self._folder.open(MARKER_FILE), "oci-layout")
        except NotFoundError:
            return
        try:
            version = msgspec.json.decode(raw, type=_Marker).version
        except (msgspec.MsgspecError, ValueError, RecursionError):
            raise DamagedError("the file oci-layout is not JSON with an imageLayoutVersion") from None
        if version is not None and not version.startswith("1."):
            raise UnsupportedError(f"image layout version {version[:20]!r} is not supported, only 1.x")

    @staticmethod
    def _blob_name(digest: Digest) -> bytes:
        return f"blobs/{digest.algorithm}/{digest.hex}".encode()

    def size_of(self, digest: Digest) -> int:
        """See `BlobStore.size_of`."""
        with within(f"blob {digest}"):
            return self._folder.size_of(self._blob_name(digest))

    def open_digest(self, digest: Digest) -> Blob:
        """See `BlobStore.open_digest`."""
        with within(f"blob {digest}"):
            return self._folder.open(self._blob_name(digest))

    def names(self) -> tuple[Offered, ...]:
        """See `Source.names`."""
        return offered(self._tops)

    def resolve(self, selector: Selector, platform: Platform | None = None, *, examine: bool = False) -> ResolvedImage:
        """See `Source.resolve`."""
        return Resolver(self, examine=examine).image(self._tops, selector, platform)

    def close(self) -> None:
        """See `Source.close`."""
        self._folder.close()
