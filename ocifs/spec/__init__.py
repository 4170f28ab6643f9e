"""OCI and Docker documents as frozen, validated values: what the JSON around an image's layers says.

Covers the OCI image index, manifest and configuration (image-spec 1.1) and Docker's manifest list, manifest v2 schema 2
and image configuration (v1.2), which have the same shape under other media types. A document is parsed once; from then
on its digests, sizes and platforms are values that cannot be confused: a `Digest` names stored bytes, a `DiffID` names
an uncompressed layer tar, and the two never compare equal.

Two kinds of leniency are deliberate. ``null`` is read as absent everywhere, because the Go tools that write these
documents do (rule C7). A digest of an algorithm ocifs cannot compute is kept, and refused when it is used (rule C5), so
that an image with one such blob can still be listed.

Hostile documents: the size is bounded by `MAX_DOCUMENT_SIZE`, nesting by the interpreter's recursion limit, numbers by
63 bits, and everything that goes wrong is a `DamagedError` or an `UnsupportedError`.

Not here: opening or finding anything (`ocifs.sources`), the words a user types (`ocifs.reference`).

===========  ======================================================
`documents`  the values: descriptor, manifest, index, configuration
`digest`     `Digest`, `DiffID`
`platform`   `Platform`
`parsing`    how they are read from JSON
`quoting`    text out of documents, for messages
===========  ======================================================
"""

from ocifs.spec.digest import MAX_DIGEST_LENGTH, DiffID, Digest, Hasher
from ocifs.spec.documents import (
    DOCUMENT_TYPES,
    INDEX_TYPES,
    MANIFEST_TYPES,
    SCHEMA1_TYPES,
    Descriptor,
    History,
    ImageConfig,
    Index,
    Manifest,
    MediaType,
    RuntimeConfig,
    artifact_kind,
    layer_steps,
)
from ocifs.spec.parsing import MAX_DOCUMENT_SIZE, parse_config, parse_document
from ocifs.spec.platform import Platform
from ocifs.spec.quoting import printable

__all__ = [
    "DOCUMENT_TYPES",
    "INDEX_TYPES",
    "MANIFEST_TYPES",
    "MAX_DIGEST_LENGTH",
    "MAX_DOCUMENT_SIZE",
    "SCHEMA1_TYPES",
    "Descriptor",
    "DiffID",
    "Digest",
    "Hasher",
    "History",
    "ImageConfig",
    "Index",
    "Manifest",
    "MediaType",
    "Platform",
    "RuntimeConfig",
    "artifact_kind",
    "layer_steps",
    "parse_config",
    "parse_document",
    "printable",
]
