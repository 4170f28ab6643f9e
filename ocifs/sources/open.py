"""From a reference to the source that can answer it; a bare path is recognised by what is in it.

Not here: the sources themselves.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from ocifs.errors import NotFoundError, OcifsError, UnsupportedError
from ocifs.reference import Reference, Scheme
from ocifs.sources import layout, skopeo_dir
from ocifs.sources.base import Blob
from ocifs.sources.blob import FileBlob, os_problem, shown
from ocifs.sources.folder import DirectoryFolder, absolute
from ocifs.sources.resolve import within

if TYPE_CHECKING:
    from ocifs.sources.archive import ArchiveFolder
    from ocifs.sources.base import Source

OpenArchive = Callable[[bytes], Blob]
"""Give random access to the uncompressed tar inside the compressed archive at this absolute path."""

CONTAINERD_ROOT: Final = b"/var/lib/containerd"
"""Where containerd keeps everything unless told otherwise (its ``root`` setting)."""

_MAGICS: Final = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\0": "xz",
    b"BZh": "bzip2",
    b"LZIP": "lzip",
    b"\x04\x22\x4d\x18": "lz4",
}
_SKIPPABLE: Final = range(0x184D2A50, 0x184D2A60)
"""Magic numbers of zstd's skippable frames (RFC 8878, section 3.1.2), which may come first."""

_KNOWN: Final = (
    "known are OCI layouts, oci-archives, docker-archives, dir: directories and containerd's root; "
    "a reference such as oci:PATH:TAG says which"
)


def open_source(
    reference: Reference,
    *,
    open_archive: OpenArchive | None = None,
    namespace: str = "default",
    root: bytes = CONTAINERD_ROOT,
) -> Source:
    """Open the source that ``reference`` names. ``namespace`` and ``root`` are containerd's.

    ``open_archive`` gives random access to a compressed outer archive; without it such archives are unsupported.
    """
    path = absolute(reference.path) if reference.path else b""
    match reference.scheme:
        case Scheme.OCI:
            return _open_layout(path)
        case Scheme.DIR:
            return skopeo_dir.DirSource(_directory(path))
        case Scheme.OCI_ARCHIVE:
            return _open_oci_archive(_open_folder(path, open_archive))
        case Scheme.DOCKER_ARCHIVE:
            return _open_docker_archive(_open_folder(path, open_archive))
        case Scheme.CONTAINERD:
            return _open_store(root, namespace)
        case Scheme.PATH:
            return _open_path(path, open_archive, namespace)


def _open_store(root: bytes, namespace: str) -> Source:
    from ocifs.sources.containerd import ContainerdSource  # noqa: PLC0415 (with its database reader; rarely needed)

    return ContainerdSource(root, namespace)


def _kind(path: bytes) -> int:
    try:
        return stat.S_IFMT(os.stat(path).st_mode)
    except OSError as error:
        raise os_problem(error, shown(path)) from None


def _directory(path: bytes) -> DirectoryFolder:
    if _kind(path) != stat.S_IFDIR:
        raise UnsupportedError(f"{shown(path)} is not a directory; {_KNOWN}")
    return DirectoryFolder(path)


def _open_layout(path: bytes) -> Source:
    return layout.LayoutSource(_directory(path), "OCI layout")


def _open_folder(path: bytes, open_archive: OpenArchive | None) -> ArchiveFolder:
    """List an archive that may be compressed as a whole."""
    from ocifs.sources.archive import ArchiveFolder  # noqa: PLC0415 (a mount of a layout starts without it)

    if _kind(path) == stat.S_IFDIR:
        raise UnsupportedError(f"{shown(path)} is a directory, where an archive belongs; {_KNOWN}")
    blob = FileBlob(path)
    compression = _compression(blob)
    if compression is None:
        return ArchiveFolder(blob, lambda: FileBlob(path))
    blob.close()
    if open_archive is None:
        raise UnsupportedError(f"{shown(path)} is compressed with {compression}; decompress it first")
    return ArchiveFolder(open_archive(path), lambda: open_archive(path))


def _compression(blob: Blob) -> str | None:
    head = blob.read_at(0, 8)
    if int.from_bytes(head[:4], "little") in _SKIPPABLE:
        return "zstd"
    return next((name for magic, name in _MAGICS.items() if head.startswith(magic)), None)


def _open_oci_archive(folder: ArchiveFolder) -> Source:
    return _or_close(folder, lambda: layout.LayoutSource(folder, "oci-archive"))


def _open_docker_archive(folder: ArchiveFolder) -> Source:
    from ocifs.sources.docker_archive import DockerArchiveSource  # noqa: PLC0415 (as above)

    return _or_close(folder, lambda: DockerArchiveSource(folder))


def _or_close(folder: ArchiveFolder, make: Callable[[], Source]) -> Source:
    try:
        return make()
    except BaseException:
        folder.close()
        raise


def _open_path(path: bytes, open_archive: OpenArchive | None, namespace: str) -> Source:
    """Recognise an image by its content. Where a form is part of another, the richer one is looked for first."""
    if _kind(path) == stat.S_IFDIR:
        return _open_directory(path, namespace)
    try:
        folder = _open_folder(path, open_archive)
    except UnsupportedError:
        raise
    except OcifsError as error:
        raise type(error)(f"{error}; {_KNOWN}") from None
    from ocifs.sources import docker_archive  # noqa: PLC0415 (as above)

    if layout.INDEX_FILE in folder:
        return _open_oci_archive(folder)
    if docker_archive.MANIFEST_FILE in folder or docker_archive.OLD_FILE in folder:
        return _open_docker_archive(folder)
    folder.close()
    raise UnsupportedError(f"{shown(path)} is a tar without index.json or manifest.json, so no image; {_KNOWN}")


def _open_directory(path: bytes, namespace: str) -> Source:
    folder = DirectoryFolder(path)
    if _has(folder, layout.INDEX_FILE):
        return _open_layout(path)
    if _has(folder, skopeo_dir.MANIFEST_FILE):
        with within("recognised as a dir: directory"):
            return skopeo_dir.DirSource(folder)
    from ocifs.sources.containerd import CONTENT  # noqa: PLC0415 (as in `_open_store`)

    try:
        is_store = _kind(os.path.join(path, CONTENT)) == stat.S_IFDIR
    except NotFoundError:
        is_store = False
    if is_store:
        return _open_store(path, namespace)
    raise UnsupportedError(f"{shown(path)} is a directory without index.json or manifest.json, so no image; {_KNOWN}")


def _has(folder: DirectoryFolder, name: bytes) -> bool:
    try:
        folder.size_of(name)
    except NotFoundError:
        return False
    return True
