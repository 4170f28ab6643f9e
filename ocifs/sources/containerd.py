"""containerd's store, read where it lies and without containerd: blobs by digest, image names from ``meta.db``.

Below containerd's root, ``io.containerd.content.v1.content/blobs/ALG/HEX`` holds the content and
``io.containerd.metadata.v1.bolt/meta.db`` says what it is for, by namespace (containerd's ``metadata/buckets.go``)::

    v1 / NAMESPACE / images / NAME / target / { digest, mediatype, size (a signed varint) }

Nothing is locked or written. While containerd runs it may reuse pages of the database under a reader; what was read is
then dropped and read again. Without a usable database the images are what is found in the content: every index, and
every manifest that no index lists; they have no names.

Not here: the database's format (`ocifs.sources.bbolt`), snapshots.
"""

from __future__ import annotations

import os
from contextlib import closing
from typing import TYPE_CHECKING, Final

from ocifs.errors import BusyError, DamagedError, NotFoundError, OcifsError, UnsupportedError
from ocifs.reference import Selector
from ocifs.sources.bbolt import Bucket, Database
from ocifs.sources.blob import FileBlob, os_problem, shown
from ocifs.sources.folder import DirectoryFolder, absolute
from ocifs.sources.names import same_name
from ocifs.sources.resolve import Resolver, Top, listed, offered, read_document, within
from ocifs.spec import MAX_DOCUMENT_SIZE, Descriptor, Digest, Index, Manifest, Platform, parse_document

if TYPE_CHECKING:
    from ocifs.sources.base import Blob, Offered, ResolvedImage

CONTENT: Final = b"io.containerd.content.v1.content"
META: Final = b"io.containerd.metadata.v1.bolt/meta.db"

_MAX_IMAGES: Final = 1_000_000
_ATTEMPTS: Final = 5
_VARINT_SIZE: Final = 10  # bytes of the longest 64-bit varint


class ContainerdSource:
    """The images of one namespace. Reads the database once, when it is made."""

    def __init__(self, root: bytes, namespace: str) -> None:
        """Read the store below ``root``."""
        root = absolute(root)
        self._blobs = os.path.join(root, CONTENT, b"blobs")
        self._folder = DirectoryFolder(self._blobs)
        self.description = f"containerd's namespace {namespace} in {shown(root)}"
        _check_store(root, self._blobs)
        self._meta_problem: OcifsError | None = None
        try:
            self._tops = _read_images(os.path.join(root, META), namespace)
        except _NoNamespaceError as error:
            raise NotFoundError(f"{shown(root)} {error}") from None
        except OcifsError as error:
            self._meta_problem = error
            self.description = f"containerd's content in {shown(root)}"
            self._tops = self._found_images()

    def _found_images(self) -> tuple[Top, ...]:
        """Look through the content for indexes, and manifests that are in none of them."""
        found: dict[Digest, tuple[Descriptor, Manifest | Index]] = {}
        for digest in self._stored_digests():
            try:
                document = self._sniff(digest)
            except OcifsError:
                continue  # a layer, a configuration, something else
            if document is not None:
                found[digest] = Descriptor(document.media_type, digest, self.size_of(digest)), document
        below = {
            inner.digest
            for _, document in found.values()
            if isinstance(document, Index)
            for inner in document.manifests
        }
        return tuple(Top((), descriptor) for digest, (descriptor, _) in found.items() if digest not in below)

    def _stored_digests(self) -> list[Digest]:
        digests = []
        for algorithm in sorted(_list_directory(self._blobs)):
            for name in sorted(_list_directory(os.path.join(self._blobs, algorithm))):
                try:
                    digests.append(Digest.parse(f"{os.fsdecode(algorithm)}:{os.fsdecode(name)}"))
                except DamagedError:
                    continue
        return digests

    def _sniff(self, digest: Digest) -> Manifest | Index | None:
        with closing(self.open_digest(digest)) as blob:
            if blob.size > MAX_DOCUMENT_SIZE or not blob.read_at(0, 64).lstrip().startswith(b"{"):
                return None
            return parse_document(read_document(blob, str(digest)))

    def size_of(self, digest: Digest) -> int:
        """See `BlobStore.size_of`."""
        with within(f"blob {digest}"):
            return self._folder.size_of(f"{digest.algorithm}/{digest.hex}".encode())

    def open_digest(self, digest: Digest) -> Blob:
        """See `BlobStore.open_digest`."""
        with within(f"blob {digest}"):
            return self._folder.open(f"{digest.algorithm}/{digest.hex}".encode())

    def names(self) -> tuple[Offered, ...]:
        """See `Source.names`."""
        return offered(self._tops)

    def resolve(self, selector: Selector, platform: Platform | None = None, *, examine: bool = False) -> ResolvedImage:
        """See `Source.resolve`. A digest may be part of an image's name, and CRI names images by digest alone."""
        resolver = Resolver(self, examine=examine)
        names = {name for top in self._tops for name in top.names}
        pinned = [] if selector.digest is None else [name for name in names if same_name(str(selector), name)]
        if selector.name is not None and pinned:
            selector = Selector(name=pinned[0])
        elif selector.name is not None and selector.name not in names:
            if selector.name.startswith(("sha256:", "sha512:")):
                selector = Selector(digest=Digest.parse(selector.name))
            elif self._meta_problem is not None:
                raise NotFoundError(
                    f"{self.description} cannot be searched by name, choose by digest: {self._meta_problem}"
                )
        if self._meta_problem is not None:
            resolver.warnings.warn("", f"the names of images are not known: {self._meta_problem}")
        return resolver.image(self._tops, selector, platform)

    def close(self) -> None:
        """See `Source.close`."""


class _NoNamespaceError(OcifsError):
    """The database is fine and has no such namespace."""


def _check_store(root: bytes, blobs: bytes) -> None:
    for path in (root, blobs):
        try:
            os.scandir(path).close()
        except OSError as error:
            raise os_problem(error, f"containerd's store {shown(path)} cannot be read, is --root right?") from None


def _list_directory(path: bytes) -> list[bytes]:
    try:
        return os.listdir(path)
    except NotADirectoryError:
        return []
    except OSError as error:
        raise os_problem(error, shown(path)) from None


def _read_images(path: bytes, namespace: str) -> tuple[Top, ...]:
    """Read a namespace's images out of ``meta.db``, all from one moment."""
    for _ in range(_ATTEMPTS):
        blob = FileBlob(path)
        try:
            with within(blob.name):
                database = Database(blob.read_at, blob.size)
                tops: tuple[Top, ...] | OcifsError
                try:
                    tops = _images_of(database.root, namespace)
                except OcifsError as error:
                    tops = error  # if pages were reused under this reader it means nothing
                if database.is_current():
                    if isinstance(tops, OcifsError):
                        raise tops
                    return tops
        finally:
            blob.close()
    raise BusyError(f"{shown(path)} is being written to all the time; stop containerd or try again")


def _images_of(root: Bucket, namespace: str) -> tuple[Top, ...]:
    versions = root.bucket(b"v1")
    if versions is None:
        raise UnsupportedError("the database does not have containerd's bucket v1")
    own = versions.bucket(namespace.encode(errors="replace"))
    if own is None:
        there = listed([shown(name) for name, _ in versions.buckets()])
        raise _NoNamespaceError(f"has no namespace {namespace!r}: it has {there or 'none'}; choose with --namespace")
    images = own.bucket(b"images")
    tops: list[Top] = []
    for name, image in images.buckets() if images is not None else ():
        if len(tops) >= _MAX_IMAGES:
            raise UnsupportedError(f"namespace {namespace} has more than {_MAX_IMAGES} images")
        with within(f"image {shown(name)}"):
            tops.append(Top((os.fsdecode(name),), _target_of(image)))
    return tuple(tops)


def _target_of(image: Bucket) -> Descriptor:
    target = image.bucket(b"target")
    if target is None:
        raise DamagedError("it has no target")
    fields = dict(target.items())
    return Descriptor(
        media_type=fields.get(b"mediatype", b"").decode(errors="replace"),
        digest=Digest.parse(fields.get(b"digest", b"").decode(errors="replace")),
        size=_signed_varint(fields.get(b"size", b"")),
    )


def _signed_varint(data: bytes) -> int:
    """Read what Go's ``binary.PutVarint`` writes: seven bits a byte, low ones first, the sign in the lowest."""
    value = 0
    for position, byte in enumerate(data[:_VARINT_SIZE]):
        value |= (byte & 0x7F) << (7 * position)
        if byte < 0x80:  # noqa: PLR2004 — the bit that says that more follows
            number = value >> 1
            if not value & 1 and number < 2**63:
                return number
            break
    raise DamagedError("its size is not a positive number of 63 bits")
