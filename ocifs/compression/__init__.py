"""Compressed streams: what they are, where they can be entered, and how to inflate a piece of one.

Pure: bytes in, values out. Nothing here opens a file, logs, or knows what a layer is; what drives a whole pass over a
blob lives in `ocifs.layer_index`.

`gzip` and `zstd` know their format's framing; `streams` decodes any of the formats from front to back. This module only
says which format some bytes have, by looking at them: media types and file names lie (rule C1).
"""

from __future__ import annotations

import enum
from typing import Final

HEAD_SIZE: Final = 512
"""Bytes that `detect` wants to see: one tar block. Fewer are fine if the blob is shorter."""


class Compression(enum.Enum):
    """The closed set of what a blob's bytes can be. The value is what index files and messages say."""

    EMPTY = "empty"
    """No bytes at all: an empty layer (rule D12)."""
    PLAIN = "plain"
    """An uncompressed tar."""
    GZIP = "gzip"
    ZSTD = "zstd"
    XZ = "xz"
    BZIP2 = "bzip2"
    UNKNOWN = "unknown"
    """None of these: not a layer."""


_ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"
_BZIP2_BLOCKS: Final = (b"\x31\x41\x59\x26\x53\x59", b"\x17\x72\x45\x38\x50\x90")
"""How a bzip2 stream goes on after ``BZh1`` … ``BZh9``: a block, or the end of an empty stream."""


def detect(head: bytes) -> Compression:
    """Say what a blob is from its first `HEAD_SIZE` bytes (all of it if it is shorter)."""
    if not head:
        return Compression.EMPTY
    if head[:3] == b"\x1f\x8b\x08":  # RFC 1952: two magic bytes, then deflate, the only method there is
        return Compression.GZIP
    # RFC 8878 section 3.1.2: sixteen magic numbers of skippable frames, which may come first (zstd:chunked, pzstd).
    if head[:4] == _ZSTD_MAGIC or (0x50 <= head[0] <= 0x5F and head[1:4] == b"\x2a\x4d\x18"):
        return Compression.ZSTD
    if head[:6] == b"\xfd7zXZ\x00":
        return Compression.XZ
    if head[:3] == b"BZh" and b"1" <= head[3:4] <= b"9" and head[4:10] in _BZIP2_BLOCKS:
        return Compression.BZIP2
    return Compression.PLAIN if _is_tar(head) else Compression.UNKNOWN


def _is_tar(head: bytes) -> bool:
    """Whether a tar can begin so: a header with a right checksum or a magic, or the zeros of an empty archive."""
    block = head[:512]
    if not any(block):
        return True
    if len(block) < 512:
        return False
    # A magic alone counts too: a header whose checksum is wrong is then reported as just that (rule D6), which helps
    # more than "not a tar". v7 archives have no magic, so there the checksum decides, signed or not (rule D1).
    if block[257:262] == b"ustar":
        return True
    field = block[148:156].strip(b" \0")
    if not field or any(not 0x30 <= digit <= 0x37 for digit in field):
        return False
    rest = block[:148] + b" " * 8 + block[156:]
    unsigned = sum(rest)
    return int(field, 8) in {unsigned, unsigned - 256 * sum(byte >= 0x80 for byte in rest)}
