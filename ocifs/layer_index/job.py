"""What an index is built from, and what comes out: the values that travel between a build and its child process.

A module of its own so that who only loads indexes does not load what builds them.
"""

from __future__ import annotations

import enum
from typing import BinaryIO, NamedTuple, Protocol

import msgspec

from ocifs.compression import Compression
from ocifs.layer_index.format import Mismatch
from ocifs.spec import DiffID, Digest
from ocifs.tar import Damage


class Content(enum.Enum):
    """What a blob is taken for. The value is part of the names of indexes."""

    LAYER = "layer"
    """A tar: plain, or compressed with gzip or zstd."""
    ARCHIVE = "archive"
    """A tar that may also be compressed with xz or bzip2: what is around an image, or in an artifact."""
    BYTES = "bytes"
    """Bytes of any kind, as they are stored: an index without entries, for reading them at random."""


class StoredBytes(Protocol):
    """What is indexed; every blob of `ocifs.sources` is one."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    def read_at(self, offset: int, size: int, /) -> bytes:
        """Give ``size`` bytes at ``offset``, fewer only at the end."""
        ...


class Expected(msgspec.Struct, frozen=True):
    """What a blob ought to be, as far as is known (rule C4)."""

    size: int | None = None
    """Bytes as stored."""
    digest: Digest | None = None
    diff_id: DiffID | None = None


class Built(msgspec.Struct, frozen=True):
    """What was indexed, as it is, not as it was expected: ``digest`` is the key to keep the index under."""

    digest: Digest
    diff_id: DiffID
    stored_size: int
    layer_size: int
    compression: Compression
    entry_count: int
    reframed: bool
    """Whether the index is about the re-framed copy, which must then be kept with it."""
    damage: Damage | None
    """Where the tar stream breaks a rule, if it does."""
    mismatches: tuple[Mismatch, ...]
    """What failed and was tolerated; empty unless ``tolerant``."""


class Job(NamedTuple):
    """One pass: see `ocifs.layer_index.child.build` for what the fields mean."""

    blob: StoredBytes
    expected: Expected
    out: BinaryIO
    reframed: BinaryIO | None
    tolerant: bool
    content: Content = Content.LAYER
