"""Shell lines that cut a file's bytes out of an image on disk with standard tools.

For who does not take ocifs's word for it: each line needs a POSIX shell, coreutils, and gzip, zstd or tar if the layer or
the archive around it is compressed. A *piece* of a file is some bytes of a layer's tar, or a hole::

    gzip -dc < BLOB | tail -c +OFFSET | head -c SIZE

A blob that lies within an uncompressed archive is cut out of it in the same way. Several pieces are written one behind the
other from one decompression, by dd, which reads exactly what it is told to.

Not here: running them.
"""

from __future__ import annotations

import os
import shlex
from typing import TYPE_CHECKING, Final

from ocifs.compression import Compression

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ocifs.forensics.examination import Examination
    from ocifs.history import Version
    from ocifs.sources import LayerBlob

MAX_PIECES: Final = 512
"""Pieces of a file that a line is made for: a line of some 40 KB."""

_DECOMPRESSORS: Final = {Compression.GZIP: "gzip -dc", Compression.ZSTD: "zstd -dcq"}
_DD: Final = "dd bs=64K iflag=fullblock,skip_bytes,count_bytes status=none"


def extraction(examination: Examination, version: Version) -> str | None:
    """Give the line that writes a file's bytes to standard output; undecodable bytes of paths are lone surrogates.

    None if there is none: the bytes are in no layer, the file has more than `MAX_PIECES` pieces, or its blob is no file on
    disk that standard tools find (embedded in a manifest, a member of a compressed archive).
    """
    if version.unreadable or len(version.extents) > MAX_PIECES:
        return None
    if not version.extents:
        return f"head -c {version.size} /dev/zero"
    layers = {layer for _, layer, _, _ in version.extents}
    number = layers.pop()
    if layers:  # no archive has such files: the extents of one are those of one entry
        return None
    opened = examination.layer(number)
    decompressor = _DECOMPRESSORS.get(opened.index.compression, "")
    if len(version.extents) == 1 and version.extents[0][3] == version.size:
        _, _, layer_offset, size = version.extents[0]
        return _one_piece(opened.blob, decompressor, layer_offset, size)
    source = _stored(opened.blob, decompressor)
    return None if source is None else f"{source} | {{ {'; '.join(_pieces(version))}; }}"


def _where(blob: LayerBlob) -> tuple[str, int, int, int] | None:
    """Say where a blob lies: the file, its offset and size there, and the file's size."""
    stored = blob.open_stored()
    try:
        found = stored.file_range()
        if found is None:
            return None
        path = os.readlink(f"/proc/self/fd/{found.fd}")
        return path, found.offset, found.size, os.fstat(found.fd).st_size
    except OSError:  # no /proc
        return None
    finally:
        stored.close()


def _stored(blob: LayerBlob, decompressor: str) -> str | None:
    """Give the words that write a layer's tar."""
    where = _where(blob)
    if where is None:
        return None
    path, offset, size, file_size = where
    name = shlex.quote(path)
    if (offset, size) == (0, file_size):
        return f"{decompressor or 'cat'} < {name}"
    cut = f"tail -c +{offset + 1} {name} | head -c {size}"
    return f"{cut} | {decompressor}" if decompressor else cut


def _one_piece(blob: LayerBlob, decompressor: str, layer_offset: int, size: int) -> str | None:
    if decompressor:
        source = _stored(blob, decompressor)
        return None if source is None else f"{source} | tail -c +{layer_offset + 1} | head -c {size}"
    where = _where(blob)
    if where is None:
        return None
    path, offset, _, _ = where
    return f"tail -c +{offset + layer_offset + 1} {shlex.quote(path)} | head -c {size}"


def _pieces(version: Version) -> Iterator[str]:
    """Give the words that write the pieces, in order, each reading on where the one before has stopped."""
    read_to = written = 0
    for file_offset, _, layer_offset, size in version.extents:
        if file_offset > written:
            yield f"head -c {file_offset - written} /dev/zero"
        yield f"{_DD} skip={layer_offset - read_to} count={size}"
        read_to, written = layer_offset + size, file_offset + size
    if version.size > written:
        yield f"head -c {version.size - written} /dev/zero"
