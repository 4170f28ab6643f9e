"""What an examined mount says of each object by extended attributes: where it comes from.

=========================  ============================================================================================
user.ocifs.layer           number of the layer and digest of its blob: ``3 sha256:9f…``
user.ocifs.diff_id         digest of the layer's uncompressed tar: ``sha256:5c…``
user.ocifs.created_by      the line of the image's history that wrote the layer, at most 1 KiB of it; not there if the
                           image does not say, nor has an empty one
user.ocifs.verified        ``yes``: when the layer was indexed its bytes had every digest that the image names, and each
                           read compares them again with what was indexed. ``no: …``: what did not agree. ``unknown``: the
                           image names no digest
user.ocifs.data_offset     of a file that has data: where its first byte is in the layer's uncompressed tar, in bytes
user.ocifs.header_offset   where the first header of its tar entry is in there; likewise
user.ocifs.versions        how many versions its path has in the image's layers: those that were in the tree, and entries
                           that a later one of their layer overrides; what ``history/PATH`` has but for ``deleted``
user.ocifs.sha256          of a file: the SHA-256 of its content in hexadecimal, read when it is asked for by name; stands in
                           listings only of mounts that were told so
=========================  ============================================================================================

Values are text without a newline. The layer is the one whose entry made the object: of a directory, the last one that has
an entry for it; of a file with several names, the one that has the data. The last three and the offsets are not there for
what no entry names, as directories that are only implied, and what is ocifs' own. In ``history`` a ``LNN-deleted`` tells of
the marker, whose own name (``.wh.…``) has 0 versions. The kernel lets only files and directories have such attributes.

Not here: who asks (`ocifs.examined`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ocifs.history import Change, End

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ocifs.history import Version
    from ocifs.image import OpenLayer
    from ocifs.spec import History as Step

LAYER: Final = b"user.ocifs.layer"
DIFF_ID: Final = b"user.ocifs.diff_id"
CREATED_BY: Final = b"user.ocifs.created_by"
VERIFIED: Final = b"user.ocifs.verified"
DATA_OFFSET: Final = b"user.ocifs.data_offset"
HEADER_OFFSET: Final = b"user.ocifs.header_offset"
VERSIONS: Final = b"user.ocifs.versions"
SHA256: Final = b"user.ocifs.sha256"

_LONGEST: Final = 1024
"""Bytes of a value: file systems that copies go to have little room (ext4: a block for all of a file)."""


def of_layer(layer: OpenLayer, step: Step | None) -> dict[bytes, bytes]:
    """Give the attributes that all objects of a layer share."""
    found = {
        LAYER: f"{layer.number} {layer.blob.digest or layer.index.digest}".encode(),
        DIFF_ID: str(layer.index.diff_id).encode(),
        VERIFIED: _verified(layer).encode("utf-8", "backslashreplace")[:_LONGEST],
    }
    if step is not None and step.created_by:
        found[CREATED_BY] = _cut(" ".join(step.created_by.split("\n")).encode("utf-8", "backslashreplace"))
    return found


def _cut(text: bytes) -> bytes:
    """Cut UTF-8 between two characters."""
    return text if len(text) <= _LONGEST else text[:_LONGEST].decode(errors="ignore").encode()


def _verified(layer: OpenLayer) -> str:
    if layer.warnings:
        return "no: " + "; ".join(warned.message for warned in layer.warnings)
    return "unknown" if layer.blob.digest is None and layer.blob.diff_id is None else "yes"


def versions_of_path(versions: Iterable[Version]) -> int:
    """Count the versions of a path as `VERSIONS` does."""
    return sum(
        version.change in (Change.ADDED, Change.CHANGED)
        or (version.change is Change.NONE and version.end is End.OVERRIDDEN)
        for version in versions
    )
