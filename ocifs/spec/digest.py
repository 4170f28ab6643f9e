"""Digests of stored bytes and diff IDs of uncompressed layers: two kinds of value that never compare equal.

Not here: which digest something should have (`ocifs.spec.documents`).
"""

from __future__ import annotations

import hashlib
import re
from typing import Final, Protocol, Self

import msgspec

from ocifs.errors import DamagedError, UnsupportedError
from ocifs.spec.quoting import quoted

MAX_DIGEST_LENGTH: Final = 255
"""Characters of the longest digest that is kept: SHA-512's has 135, and a file name 255 at most (NAME_MAX)."""

# image-spec descriptor.md, "Digests". Neither part can hold a slash, and no part of a path made of them can be "..".
_DIGEST: Final = re.compile(r"([a-z0-9]+(?:[+._-][a-z0-9]+)*):([a-zA-Z0-9=_-]+)")
_REGISTERED: Final = {"sha256": 64, "sha512": 128, "blake3": 64}


class Hasher(Protocol):
    """What `Digest.hasher` gives: the part of hashlib's objects that is used."""

    def update(self, data: bytes | bytearray | memoryview, /) -> None:
        """Take more bytes."""

    def hexdigest(self) -> str:
        """Lower-case hex of all bytes so far."""


class _Hash(msgspec.Struct, frozen=True, gc=False):
    """An algorithm and the encoded value, as in ``sha256:9f86…``. Never used itself: see `Digest` and `DiffID`."""

    algorithm: str
    hex: str

    def __str__(self) -> str:
        """Give ``algorithm:encoded``."""
        return f"{self.algorithm}:{self.hex}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``algorithm:encoded`` (image-spec descriptor.md, "Digests"); DamagedError if it is not of that form."""
        match = _DIGEST.fullmatch(text) if len(text) <= MAX_DIGEST_LENGTH else None
        if match is None:
            raise DamagedError(f"{quoted(text)} is not a digest such as sha256:<64 hex digits>")
        algorithm, encoded = match.groups()
        length = _REGISTERED.get(algorithm)
        if length is not None and not re.fullmatch(f"[0-9a-f]{{{length}}}", encoded):
            raise DamagedError(f"{quoted(text)} is not a digest: {algorithm} has {length} lower-case hex digits")
        return cls(algorithm, encoded)

    @classmethod
    def of(cls, data: bytes | memoryview, algorithm: str = "sha256") -> Self:
        """Compute the digest of ``data``."""
        hasher = cls(algorithm, "").hasher()
        hasher.update(data)
        return cls(algorithm, hasher.hexdigest())

    def hasher(self) -> Hasher:
        """Give a fresh hash object of this algorithm; UnsupportedError for any but sha256 and sha512 (rule C5)."""
        if self.algorithm == "sha256":
            return hashlib.sha256()
        if self.algorithm == "sha512":
            return hashlib.sha512()
        raise UnsupportedError(
            f"digest algorithm {self.algorithm} is not supported, only sha256 and sha512: {self} cannot be checked"
        )

    def matches(self, data: bytes | memoryview) -> bool:
        """Whether ``data`` hashes to this digest; UnsupportedError as `hasher`."""
        hasher = self.hasher()
        hasher.update(data)
        return hasher.hexdigest() == self.hex


class Digest(_Hash, frozen=True, gc=False):
    """Hash of bytes as stored: a blob's name. A layer's digest covers its compressed form."""


class DiffID(_Hash, frozen=True, gc=False):
    """Hash of a layer's uncompressed tar (image-spec config.md, "Layer DiffID")."""
