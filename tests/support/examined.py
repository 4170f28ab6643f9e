"""Layers as an image under examination, for tests of what examiners ask.

Not here: the image made to be examined (`tests.support.evidence_image`).
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from ocifs.forensics.examination import Examination, open_examination
from ocifs.image import ImageOptions
from ocifs.store import Store
from tests.support.layout import make_image, put_image

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def examined(place: Path, *layers: bytes, compression: str = "plain") -> Iterator[Examination]:
    """The image of these layers (uncompressed tars, the base first), below ``place``, with a cache there."""
    put_image(place / "image", make_image(layers, compression=compression))
    with (
        Store(place / "cache") as store,
        open_examination(f"oci:{place}/image", store, ImageOptions()) as examination,
    ):
        yield examination


class Memory:
    """A history's file in memory."""

    name = "a history"

    def __init__(self, data: bytes) -> None:
        self.size = len(data)
        self._data = data

    def read_at(self, offset: int, size: int) -> bytes:
        return self._data[offset : offset + size]

    def close(self) -> None:
        pass
