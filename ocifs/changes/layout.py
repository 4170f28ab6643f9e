"""An OCI image layout that is written to so that nobody ever sees half of anything.

Everything is written below a directory of its own in the layout, ``.ocifs-commit-…``. When all is there, each blob is
renamed to where it belongs, then ``index.json`` is replaced by a new one. Whoever reads meanwhile sees the old index with
all its blobs, or the new one with all of its own. What fails before the last step, or is interrupted, is undone. A process
that is killed leaves its directory behind; it is locked while it is in use, so the next one knows which to remove. Killed
in the moment of renaming it may leave blobs that no index names, in a layout that is one already.

Two that write at once: the layout's directory is locked (flock(2)) from reading ``index.json`` to replacing it, so that
neither takes away what the other has added; and while what was left behind is removed, so that nobody's beginning is. Other
tools take no such lock; what they do at the same moment may be lost, as it is among themselves. That blobs found here are
still here is looked at once more under the lock.

A blob that is there already, with the right size, is left alone. One of another layout on the same file system becomes a
further name of the same file where the system allows it; its digest is computed first, as for every blob that is copied.

Not here: what is written (`commit`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Self

import msgspec

from ocifs.compression import HEAD_SIZE, Compression, detect
from ocifs.errors import BusyError, DamagedError, MachineError, UnsupportedError, UsageError
from ocifs.reference import Reference, Scheme
from ocifs.sources import stored_pieces
from ocifs.sources.blob import shown
from ocifs.spec import Digest, Index, MediaType, parse_document

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from io import FileIO

    from ocifs.sources import Blob, LayerBlob

Json = dict[str, Any]

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_MARKER: Final = b"oci-layout"
_INDEX: Final = b"index.json"
_BLOBS: Final = b"blobs"
_STAGING: Final = b".ocifs-commit-"
_TAG: Final = re.compile(
    r"[A-Za-z0-9]+(?:(?:[-._:@+]|--)[A-Za-z0-9]+)*(?:/[A-Za-z0-9]+(?:(?:[-._:@+]|--)[A-Za-z0-9]+)*)*"
)
"""OCI image specification, annotations.md, ``org.opencontainers.image.ref.name``."""
_REF_NAME: Final = "org.opencontainers.image.ref.name"
_FULL_NAME: Final = "io.containerd.image.name"
_MAX_INDEX: Final = 4 << 20

_LAYER_TYPES: Final = {
    Compression.GZIP: MediaType.OCI_LAYER_GZIP,
    Compression.ZSTD: MediaType.OCI_LAYER_ZSTD,
    Compression.PLAIN: MediaType.OCI_LAYER,
    Compression.EMPTY: MediaType.OCI_LAYER,
}


class Destination(msgspec.Struct, frozen=True):
    """Where an image is to go: a layout's directory and a tag in it."""

    path: bytes
    tag: str

    @classmethod
    def of(cls, reference: Reference) -> Destination:
        """What ``oci:PATH:TAG`` names; UsageError for any other reference."""
        selector = reference.selector
        if reference.scheme is not Scheme.OCI or selector.name is None or selector.digest or reference.upto is not None:
            raise UsageError(f"{reference.text!r} is no place for an image: say oci:PATH:TAG")
        if not _TAG.fullmatch(selector.name):
            raise UsageError(
                f"{selector.name!r} is no tag: letters and digits, with one of -._:@+ or -- between them, parts by /"
            )
        return cls(os.path.abspath(reference.path), selector.name)


class LayoutWriter:
    """A layout that is being written to. `publish` is the end; without it nothing has happened but directories made."""

    def __init__(self, path: bytes) -> None:
        """Open the layout at ``path``, or begin one where nothing or an empty directory is.

        UsageError for a directory of something else, MachineError for what the system refuses.
        """
        self.path = path
        """The layout's directory."""
        self._staging = os.path.join(path, _STAGING + secrets.token_hex(8).encode())
        self._staged: dict[Digest, bytes] = {}
        self._found: dict[Digest, int] = {}
        """Blobs that were here already, and their sizes."""
        self._lock = -1
        with _sentence("make", path):
            self._made = _make_directory(path)
        try:
            with _sentence("write to", path), self._locked():
                if not _is_layout(path) and not all(name.startswith(_STAGING) for name in os.listdir(path)):
                    raise UsageError(f"{shown(path)} is neither an OCI layout nor an empty directory")
                self._sweep()
                os.mkdir(self._staging, 0o700)
                self._lock = os.open(self._staging, _DIRECTORY)
                fcntl.flock(self._lock, fcntl.LOCK_EX)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Remove what was not published, and a new layout that nothing was published to."""
        shutil.rmtree(self._staging, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
        if self._made and not os.path.exists(os.path.join(self.path, _INDEX)):
            with contextlib.suppress(OSError):
                os.rmdir(self.path)

    def __enter__(self) -> Self:
        """Nothing to do: it is open already."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close."""
        self.close()

    # -- blobs ---------------------------------------------------------------------------------------------------

    @contextmanager
    def new_blob(self) -> Iterator[NewBlob]:
        """A blob to be written; it counts once `NewBlob.name` was called."""
        path = os.path.join(self._staging, secrets.token_hex(8).encode())
        with _sentence("write", path):
            file = open(path, "xb", buffering=0)  # noqa: SIM115 (the with statement is below)
        with file:
            yield NewBlob(self, file)

    def add_bytes(self, data: bytes) -> Digest:
        """Add a document."""
        digest = Digest.of(data)
        if not self._has(digest, len(data)):
            with self.new_blob() as blob:
                blob.write(data)
                blob.name(digest)
        return digest

    def add_layer(self, layer: LayerBlob) -> tuple[str, Digest, int]:
        """Add a layer of another image: its OCI media type, digest and size. Errors as opening and reading it raise.

        The media type follows from the content, as for every reader (rule C1).
        """
        stored = layer.open()
        try:
            media_type = _LAYER_TYPES.get(detect(stored.read_at(0, HEAD_SIZE)))
            if media_type is None:
                raise UnsupportedError(f"layer {layer.number} is compressed in a way that OCI has no name for")
            if layer.digest is None or not self._has(layer.digest, stored.size):
                digest = self._link(stored, layer.digest) or self._copy(stored, layer.digest)
            else:
                digest = layer.digest
            return media_type, digest, stored.size
        finally:
            stored.close()

    def _link(self, stored: Blob, expected: Digest | None) -> Digest | None:
        """Give a blob that is a file of its own a further name here; None if that cannot be."""
        place = stored.file_range()
        if place is None or place.offset or place.size != os.fstat(place.fd).st_size:
            return None
        path = os.path.join(self._staging, secrets.token_hex(8).encode())
        try:
            # With a directory descriptor this is linkat(2), which can follow the link in /proc to the very file.
            os.link(b"/proc/self/fd/%d" % place.fd, path, src_dir_fd=self._lock, follow_symlinks=True)
        except OSError:  # another file system, too many links, somebody else's file: it can still be copied
            return None
        digest = _checked(stored, expected)
        self.stage(path, digest)
        return digest

    def _copy(self, stored: Blob, expected: Digest | None) -> Digest:
        hasher = (expected or Digest("sha256", "")).hasher()
        with self.new_blob() as blob:
            for data in stored_pieces(stored):
                hasher.update(data)
                blob.write(data)
            digest = Digest(expected.algorithm if expected else "sha256", hasher.hexdigest())
            _compare(stored, digest, expected)
            blob.name(digest)
        return digest

    def stage(self, path: bytes, digest: Digest) -> None:
        """Note that the file at ``path`` is the blob ``digest``."""
        self._staged[digest] = path

    def _blob_path(self, digest: Digest) -> bytes:
        return os.path.join(self.path, _BLOBS, digest.algorithm.encode(), digest.hex.encode())

    def _has(self, digest: Digest, size: int) -> bool:
        if self._is_here(digest, size):
            self._found[digest] = size
            return True
        return digest in self._staged

    def _is_here(self, digest: Digest, size: int) -> bool:
        try:
            status = os.stat(self._blob_path(digest))
        except OSError:
            return False
        return stat.S_ISREG(status.st_mode) and status.st_size == size

    # -- the end -------------------------------------------------------------------------------------------------

    def publish(self, tag: str, descriptor: Json) -> None:
        """Put every blob in its place, then the tag. What fails, for want of space or at a damaged index, is undone."""
        with _sentence("write to", self.path), self._locked():
            staged = self._stage_index(tag, descriptor)
            for digest, size in self._found.items():
                if not self._is_here(digest, size):
                    raise BusyError(f"{shown(self._blob_path(digest))} was removed meanwhile: try again")
            undo = contextlib.ExitStack()
            try:
                self._place(undo)
                os.replace(staged, os.path.join(self.path, _INDEX))
            except BaseException:
                # An interruption may come right behind the last step. Then it is done.
                if os.path.exists(staged):
                    undo.close()
                raise
            _sync_directory(self.path)

    def _place(self, undo: contextlib.ExitStack) -> None:
        """Put everything but the index in its place; ``undo`` takes away what is new."""
        # First what says that this is a layout: then another commit can follow this one if it is killed.
        if not os.path.exists(os.path.join(self.path, _MARKER)):
            marker = self._stage_document(_MARKER, {"imageLayoutVersion": "1.0.0"})
            _replace(marker, os.path.join(self.path, _MARKER), undo)
        blobs = os.path.join(self.path, _BLOBS)
        _make_directory(blobs, undo)
        for digest, path in self._staged.items():
            _make_directory(os.path.dirname(self._blob_path(digest)), undo)
            _replace(path, self._blob_path(digest), undo)
        for directory in sorted({os.path.dirname(self._blob_path(digest)) for digest in self._staged}):
            _sync_directory(directory)
        _sync_directory(blobs)
        _sync_directory(self.path)

    def _stage_index(self, tag: str, descriptor: Json) -> bytes:
        try:
            index = self._index()
            tagged = _tagged(index.get("manifests") or [], tag, descriptor)
            return self._stage_document(_INDEX, {**index, "manifests": tagged})
        except RecursionError:
            path = os.path.join(self.path, _INDEX)
            raise DamagedError(f"{shown(path)} is nested too deeply, so no image can be added to it") from None

    def _index(self) -> Json:
        """``index.json`` as it is now; a new one if there is none."""
        path = os.path.join(self.path, _INDEX)
        try:
            with open(path, "rb") as file:
                raw = file.read(_MAX_INDEX + 1)
        except FileNotFoundError:
            return {"schemaVersion": 2, "mediaType": str(MediaType.OCI_INDEX)}
        if len(raw) > _MAX_INDEX or not isinstance(parse_document(raw, MediaType.OCI_INDEX), Index):
            raise DamagedError(f"{shown(path)} is not an image index, so no image can be added to it")
        index: Json = json.loads(raw)
        return index

    def _stage_document(self, name: bytes, document: Json) -> bytes:
        """Write a document, on disk then; gives where it is."""
        staged = os.path.join(self._staging, name)
        with open(staged, "xb") as file:
            file.write(json.dumps(document, separators=(",", ":")).encode())
            file.flush()
            os.fsync(file.fileno())
        return staged

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fd = os.open(self.path, _DIRECTORY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _sweep(self) -> None:
        """Remove what killed processes have left behind."""
        for name in os.listdir(self.path):
            if not name.startswith(_STAGING):
                continue
            path = os.path.join(self.path, name)
            with contextlib.suppress(OSError):  # somebody else is at it, or it is not ours to remove
                fd = os.open(path, _DIRECTORY | os.O_NOFOLLOW)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path)
                finally:
                    os.close(fd)


class NewBlob:
    """A blob that is being written."""

    def __init__(self, layout: LayoutWriter, file: FileIO) -> None:
        """Write to ``file`` of ``layout``, without a buffer: closing it cannot fail."""
        self._layout = layout
        self._file = file

    def write(self, data: bytes) -> None:
        """Write more bytes; MachineError if they cannot be."""
        with _sentence("write", self._layout.path):
            view = memoryview(data)
            while view:
                view = view[self._file.write(view) :]

    def name(self, digest: Digest) -> None:
        """Say what was written; it is on disk then."""
        with _sentence("write", self._layout.path):
            os.fsync(self._file.fileno())
        self._layout.stage(os.fsencode(self._file.name), digest)


@contextmanager
def _sentence(doing: str, path: bytes) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MachineError(f"cannot {doing} {shown(path)}: {error.strerror}") from error


def _tagged(manifests: list[Json], tag: str, descriptor: Json) -> list[Json]:
    """The manifests with ``tag`` on ``descriptor`` and on no other; where one had it, the new one takes its place."""
    new = {**descriptor, "annotations": {_REF_NAME: tag}}
    kept: list[Json] = []
    for manifest in manifests:
        annotations = manifest.get("annotations") or {}
        if annotations.get(_REF_NAME) == tag:
            if new not in kept:
                kept.append(new)
        elif annotations.get(_FULL_NAME) == tag:
            kept.append({**manifest, "annotations": {k: v for k, v in annotations.items() if k != _FULL_NAME}})
        else:
            kept.append(manifest)
    return kept if new in kept else [*kept, new]


def _checked(stored: Blob, expected: Digest | None) -> Digest:
    hasher = (expected or Digest("sha256", "")).hasher()
    for data in stored_pieces(stored):
        hasher.update(data)
    digest = Digest(expected.algorithm if expected else "sha256", hasher.hexdigest())
    _compare(stored, digest, expected)
    return digest


def _compare(stored: Blob, digest: Digest, expected: Digest | None) -> None:
    if expected is not None and digest != expected:
        raise DamagedError(f"{stored.name} should have the digest {expected} and has {digest}")


def _make_directory(path: bytes, undo: contextlib.ExitStack | None = None) -> bool:
    """Make a directory; False if it was there."""
    try:
        os.mkdir(path)
    except FileExistsError:
        if not os.path.isdir(path):
            raise UsageError(f"{shown(path)} is no directory, so no OCI layout can be there") from None
        return False
    if undo is not None:
        undo.callback(_without_error, os.rmdir, path)
    return True


def _replace(staged: bytes, path: bytes, undo: contextlib.ExitStack) -> None:
    if not os.path.exists(path):
        undo.callback(_without_error, os.unlink, path)
    os.replace(staged, path)


def _without_error(function: Callable[[bytes], object], path: bytes) -> None:
    with contextlib.suppress(OSError):
        function(path)


def _is_layout(path: bytes) -> bool:
    return any(os.path.exists(os.path.join(path, name)) for name in (_MARKER, _INDEX))


def _sync_directory(path: bytes) -> None:
    fd = os.open(path, _DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
