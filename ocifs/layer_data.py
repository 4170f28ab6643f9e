"""The uncompressed bytes of one layer by random access, span by span.

Joins a layer index (where the spans are) with the blob they lie in. Stateless but for its open files: what is worth
keeping is kept by `ocifs.spans`, which bounds it over all layers. Safe to call from several threads at once.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from ocifs.errors import CacheDamagedError
from ocifs.layer_index import LayerIndex, SpanDecoder

_log = logging.getLogger(__name__)


class Bytes(Protocol):
    """What a span is read from: a source's blob or a file of the store."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    def read_at(self, offset: int, size: int, /) -> bytes:
        """Return ``size`` bytes at ``offset``; fewer at the end."""
        ...

    def close(self) -> None:
        """Let go of the file."""
        ...


class SpanSlice(NamedTuple):
    """Part of a span: bytes ``start`` to ``stop`` of the decoded span ``span``."""

    span: int
    start: int
    stop: int


class LayerData:
    """One layer's uncompressed tar. ``number`` counts from 1."""

    def __init__(
        self, number: int, index: LayerIndex, stored: Bytes, on_damage: Callable[[], None] | None = None
    ) -> None:
        """Read spans of ``index`` from ``stored``: the blob, or its re-framed copy if the index says so.

        ``on_damage`` is called, in any thread, when index or copy turn out damaged.
        """
        self.number = number
        self.index = index
        self.size = index.layer_size
        self._stored = stored
        self._on_damage = on_damage

    def slices(self, layer_offset: int, size: int) -> Iterator[SpanSlice]:
        """Say which parts of which spans hold ``size`` bytes at ``layer_offset``; nothing beyond the layer's end."""
        stop = min(layer_offset + size, self.size)
        if layer_offset >= stop:
            return
        number = self.index.spans.span_at(layer_offset)
        while layer_offset < stop:
            first, length = self.index.spans.layer_range(number)
            end = min(stop, first + length)
            yield SpanSlice(number, layer_offset - first, end - first)
            layer_offset = end
            number += 1

    def begin(self, span: int) -> SpanDecoder:
        """Read and verify one span, to be decoded with `go_on`; blocking.

        Raises `DamagedError` naming blob, span and offset; `CacheDamagedError` if our own files are to blame, which the
        next one that opens the layer then builds again.
        """
        with self._noticing():
            return self.index.begin(span, self._stored.read_at)

    def go_on(self, decoder: SpanDecoder, size: int) -> bytes | memoryview:
        """Decode the next ``size`` bytes, or what is left; blocking. Errors as `begin`."""
        with self._noticing():
            return decoder.read(size)

    def decode(self, span: int) -> bytes | memoryview:
        """Give all of one span; blocking. Errors as `begin`."""
        with self._noticing():
            return self.index.decode(span, self._stored.read_at)

    @contextlib.contextmanager
    def _noticing(self) -> Iterator[None]:
        try:
            yield
        except CacheDamagedError as error:
            if self._on_damage is not None:
                _log.warning("%s; it is built again when the layer is opened next", error)
                self._on_damage()
            raise

    def close(self) -> None:
        """Close the index and the blob."""
        self._stored.close()
        self.index.close()
