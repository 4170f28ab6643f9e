"""A receipt: what lets anybody check that a file's bytes are in an image, without ocifs and without the whole image.

The chain, each link a digest or an offset that the one before fixes::

    manifest digest → manifest → layer's digest → stored blob
                    → config digest → config → layer's diff ID → uncompressed tar → header, data → the file's SHA-256

Manifest and configuration are in the receipt as they are stored, byte for byte; of the layer whoever checks needs the blob.
``scripts/check-receipt`` does it, thirty lines of Python's standard library. `PROVES` and `DOES_NOT_PROVE` say what follows.

A docker-archive has no manifest in this sense and no digest of the stored layer: there the chain begins at the
configuration, whose digest is Docker's image ID.

Not here: signatures, which are about the manifest's digest, and who made it.
"""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any, Final

import msgspec

from ocifs.errors import DamagedError, UsageError
from ocifs.forensics.provenance import content_hash, holder
from ocifs.overlay.paths import shown
from ocifs.tree import Kind

if TYPE_CHECKING:
    from ocifs.forensics.examination import Examination
    from ocifs.history import Version
    from ocifs.spec import DiffID, Digest

FORMAT_VERSION: Final = 1

PROVES: Final = (
    "An image with this manifest digest (without a manifest: with this config digest) has this layer, whose uncompressed "
    "tar has at header_offset an entry of this name, whose data are the bytes of the extents, holes between them zeros, "
    "and these have this SHA-256."
)
DOES_NOT_PROVE: Final = (
    "That the path is visible in the image, for other entries and later layers may hide it; who made the manifest, "
    "or when; that the times and build steps that the image states are true."
)


class Document(msgspec.Struct, frozen=True):
    """A manifest or configuration as it is stored."""

    digest: Digest
    raw: bytes


class Header(msgspec.Struct, frozen=True):
    """An entry of the layer's tar, found at ``header_offset`` of it: of a hard link first the link, then what it is to."""

    header_offset: int
    """Of its first header block, which may be an extension's."""
    data_offset: int
    """Of the first byte behind its headers, in the same tar."""
    name: bytes
    """As the tar has it."""
    link: bytes | None
    """What a hard link names; None for a file."""


class Receipt(msgspec.Struct, frozen=True):
    """The proof; every field as the checks need it."""

    path: bytes
    """In the tree; not proven where it is not the name."""
    sha256: str
    size: int
    """Bytes of the file, holes included."""
    manifest: Document | None
    config: Document
    layer: int
    """From 1: the one that holds the data."""
    layer_digest: Digest | None
    """Of the blob; None in a docker-archive."""
    diff_id: DiffID
    headers: tuple[Header, ...]
    extents: tuple[tuple[int, int, int], ...]
    """(file_offset, layer_offset, size) each."""


def receipt(examination: Examination, version: Version) -> Receipt:
    """Make the receipt of a file, which is read for it.

    Raises `UsageError` for what is no file, `DamagedError` if the image is not what its digests say, from the manifest
    to the layer, or the file cannot be read: of such an image nothing can be proven.
    """
    if version.kind != Kind.FILE:
        raise UsageError(f"{shown(b'/' + version.path)} is not a file: receipts are of files")
    sha256 = content_hash(examination, version)
    holds = holder(examination.history, version)
    opened = examination.layer(holds.layer)
    image = examination.resolved.image
    config = Document(image.config_digest, image.config_raw)
    manifest = None if image.manifest_digest is None else Document(image.manifest_digest, image.manifest_raw)
    for what, document in (("manifest", manifest), ("configuration", config)):
        if document is not None and not document.digest.matches(document.raw):
            raise DamagedError(f"the image's {what} is not what its digest says, {document.digest}: it proves nothing")
    for warned in opened.warnings:
        raise DamagedError(
            f"layer {holds.layer} is not what the image says, so nothing can be proven: {warned.message}"
        )
    if opened.blob.diff_id is None:
        raise DamagedError(f"the configuration has no diff ID for layer {holds.layer}: it proves nothing about it")
    # A link into a lower layer has its header there, where this layer's tar does not show it.
    entries = [holds] if holds is version or version.layer != holds.layer else [version, holds]
    return Receipt(
        path=version.path,
        sha256=sha256,
        size=version.size,
        manifest=manifest,
        config=config,
        layer=holds.layer,
        layer_digest=opened.blob.digest,
        diff_id=opened.blob.diff_id,
        headers=tuple(_header(examination, entry) for entry in entries),
        extents=tuple((file_offset, layer_offset, size) for file_offset, _, layer_offset, size in holds.extents),
    )


def _header(examination: Examination, version: Version) -> Header:
    entry = examination.layer(version.layer).index.entry(version.entry)
    return Header(entry.header_offset, entry.data_offset, entry.path, entry.link if version.hard_link else None)


def as_document(made: Receipt) -> dict[str, Any]:
    """Give a receipt as the JSON object that it is handed on as; undecodable bytes of names are lone surrogates."""
    return {
        "ocifs_receipt": FORMAT_VERSION,
        "path": "/" + _text(made.path),
        "size": made.size,
        "sha256": made.sha256,
        "manifest": None if made.manifest is None else _document(made.manifest),
        "config": _document(made.config),
        "layer": {
            "number": made.layer,
            "digest": None if made.layer_digest is None else str(made.layer_digest),
            "diff_id": str(made.diff_id),
        },
        "headers": [
            {
                "header_offset": header.header_offset,
                "data_offset": header.data_offset,
                "name": _text(header.name),
                "hard_link_to": None if header.link is None else _text(header.link),
            }
            for header in made.headers
        ],
        "extents": [
            {"file_offset": file_offset, "layer_offset": layer_offset, "size": size}
            for file_offset, layer_offset, size in made.extents
        ],
        "proves": PROVES,
        "does_not_prove": DOES_NOT_PROVE,
    }


def _document(document: Document) -> dict[str, str]:
    return {"digest": str(document.digest), "raw": base64.b64encode(document.raw).decode("ascii")}


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
