"""Decoded spans of all layers: found in a cache, waited for, or decoded in a thread; ahead of a reader that runs forward.

This is where the asynchronous colour changes, once: `SpanReader.read` is asynchronous, `SpanReader.read_blocking` does the
same in the calling thread. What they read is a layer's uncompressed tar; what files are made of is `ocifs.rootfs`'s and
`ocifs.devices`'s to know.

How a read is answered
    The usual case costs nothing: the span is in the cache and the answer is a view of it, no copy, no thread. A span that
    somebody is decoding is waited for (single flight: each is decoded at most once at a time, and a failure is shared by
    those who wait but not remembered). Anything else is decoded in a worker thread; decoders release the GIL.

    *Only as far as needed.* A span met out of order is decoded up to where the reader stops, plus `SLACK`: a reader that
    wants one small file from a cold span does not pay for its end. Who then asks for more gets all of it.

    *Ahead.* When a reader has come from the span before, the next one is decoded on another thread while the kernel
    digests this one. One span ahead is enough: decoding is faster than copying through FUSE, and more would evict
    what other readers need.

Concurrency contract
    `SpanCache` and `SpanReader` belong to one thread: under trio the event loop's, in a command the main thread. Only
    `LayerData.decode` runs in worker threads, and it shares nothing but open files. So neither class takes a lock.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ocifs.errors import DamagedError, OcifsError
from ocifs.layer_data import LayerData

if TYPE_CHECKING:
    import trio

_log = logging.getLogger(__name__)

DEFAULT_CACHE = 128 << 20
"""Bytes of decoded spans that are kept: 128 MiB, sixty-four spans of 2 MiB."""

SLACK = 256 << 10
"""Bytes decoded beyond what a reader of a cold span asked for: 256 KiB, some readahead and a few small files."""


_PIECES = 256
"""Pieces of one read after which other requests get their turn: about 3 ms."""


class SpanKey(NamedTuple):
    """A span of a layer: both numbers as everywhere (layers from 1, spans from 0)."""

    layer: int
    span: int


class SpanCache:
    """Decoded spans, least recently used first to go, bounded in bytes. One cache serves all layers and trees."""

    def __init__(self, limit: int = DEFAULT_CACHE) -> None:
        """Keep at most ``limit`` bytes; a span larger than that is handed out but not kept."""
        self.limit = limit
        self.size = 0
        self._spans: OrderedDict[SpanKey, bytes | memoryview] = OrderedDict()

    def get(self, key: SpanKey) -> bytes | memoryview | None:
        """Give what is here of the span: all of it, or its beginning."""
        data = self._spans.get(key)
        if data is not None:
            self._spans.move_to_end(key)
        return data

    def put(self, key: SpanKey, data: bytes | memoryview) -> None:
        """Keep the span, making room for it. The longer one wins if there is one already."""
        old = self._spans.get(key)
        if old is not None:
            if len(old) >= len(data):
                return
            self.size -= len(old)
            del self._spans[key]
        if len(data) > self.limit:
            return
        self._spans[key] = data
        self.size += len(data)
        while self.size > self.limit:
            _, old = self._spans.popitem(last=False)
            self.size -= len(old)

    def __contains__(self, key: SpanKey) -> bool:
        """Tell whether anything of the span is here, without marking it as used."""
        return key in self._spans


class _Flight:
    """A span being decoded, how much of it, and those who wait for it."""

    def __init__(self, landed: trio.Event, need: int) -> None:
        self.landed = landed
        self.need = need
        self.data: bytes | memoryview | None = None
        self.error: OcifsError | None = None


class SpanReader:
    """The layers of an image through one cache. ``decoded_spans`` and ``decoded_bytes`` count the work done."""

    def __init__(self, layers: Sequence[LayerData], cache: SpanCache | None = None, *, threads: int = 2) -> None:
        """Read ``layers``, decoding in at most ``threads`` threads at a time."""
        self.layers = {layer.number: layer for layer in layers}
        self.cache = cache or SpanCache()
        self.decoded_spans = 0
        self.decoded_bytes = 0
        self._flights: dict[SpanKey, _Flight] = {}
        self._last: dict[int, int] = {}
        self._threads = threads
        self._limiter: trio.CapacityLimiter | None = None

    def decoding(self) -> bool:
        """Tell whether a span is being decoded right now."""
        return bool(self._flights)

    async def read(self, layer: int, layer_offset: int, size: int) -> list[memoryview]:
        """Give ``size`` bytes at ``layer_offset`` of a layer's tar as views of its spans; `DamagedError` beyond its end."""
        parts = []
        got = 0
        for span, start, stop in self.layers[layer].slices(layer_offset, size):
            data = await self._span(SpanKey(layer, span), stop)
            parts.append(memoryview(data)[start:stop])
            got += stop - start
        _check_length(layer, got, size)
        return parts

    async def gather(self, pieces: Iterable[tuple[int, int, int]]) -> list[bytes | memoryview]:
        """Read pieces, (layer, layer_offset, size) each, one behind the other; layer 0 stands for zeros.

        A sparse file made to hurt has a piece for every byte, so others are let in between.
        """
        parts: list[bytes | memoryview] = []
        for count, (layer, layer_offset, size) in enumerate(pieces, 1):
            parts += await self.read(layer, layer_offset, size) if layer else [bytes(size)]
            if count % _PIECES == 0:
                import trio  # noqa: PLC0415

                await trio.lowlevel.checkpoint()
        return parts

    def read_blocking(self, layer: int, layer_offset: int, size: int) -> list[memoryview]:
        """Do the same in the calling thread, for who runs no event loop."""
        parts = []
        got = 0
        for span, start, stop in self.layers[layer].slices(layer_offset, size):
            key = SpanKey(layer, span)
            data = self.cache.get(key)
            if data is None or len(data) < stop:
                data = self._decoded(key, self.layers[layer].decode(span))
            parts.append(memoryview(data)[start:stop])
            got += stop - start
        _check_length(layer, got, size)
        return parts

    def _decoded(self, key: SpanKey, data: bytes | memoryview) -> bytes | memoryview:
        self.decoded_spans += 1
        self.decoded_bytes += len(data)
        self.cache.put(key, data)
        return data

    async def _span(self, key: SpanKey, need: int) -> bytes | memoryview:
        """Give the span, or at least its first ``need`` bytes."""
        layer, span = key
        forward = self._last.get(layer) == span - 1
        if forward or self._last.get(layer) != span:
            self._last[layer] = span
            if forward:
                self._decode_ahead(SpanKey(layer, span + 1))
        while True:
            data = self.cache.get(key)
            if data is not None and len(data) >= need:
                return data
            flight = self._flights.get(key)
            if flight is None:
                return await self._decode(key, need, partly=data is None and not forward)
            await flight.landed.wait()
            if flight.error is not None:
                raise flight.error
            if flight.data is not None and len(flight.data) >= need:
                return flight.data
            # It was decoded less far than we need, or its reader was cancelled: look again.

    async def _decode(self, key: SpanKey, need: int, *, partly: bool) -> bytes | memoryview:
        import trio  # noqa: PLC0415 (commands that read without mounting start 80 ms sooner)

        if self._limiter is None:
            self._limiter = trio.CapacityLimiter(self._threads)
        layer = self.layers[key.layer]
        size = layer.index.spans.layer_range(key.span).size
        need = need + SLACK if partly else size
        flight = self._flights[key] = _Flight(trio.Event(), need)
        limit = None if need >= size else need
        try:
            data = await trio.to_thread.run_sync(layer.decode, key.span, limit, limiter=self._limiter)
            if len(data) < min(need, size):
                message = f"span {key.span} of layer {key.layer} decoded to {len(data)} bytes; {size} were expected"
                raise DamagedError(message)
            flight.data = self._decoded(key, data)
        except OcifsError as error:
            flight.error = error
            raise
        finally:
            del self._flights[key]
            flight.landed.set()
        return data

    def _decode_ahead(self, key: SpanKey) -> None:
        """Start decoding a span that nobody asked for yet, if there is such a span and a thread is free for it."""
        layer = self.layers[key.layer]
        if key.span >= len(layer.index.spans) or key in self.cache or key in self._flights:
            return
        if self._threads < 2 or len(self._flights) >= self._threads:  # noqa: PLR2004 (one is for who waits)
            return
        import trio  # noqa: PLC0415

        trio.lowlevel.spawn_system_task(self._ahead, key)

    async def _ahead(self, key: SpanKey) -> None:
        if key in self._flights or key in self.cache:
            return
        try:
            await self._decode(key, 0, partly=False)
        except Exception as error:  # noqa: BLE001 (a system task must not fail; who really reads the span gets the error)
            _log.debug("decoding ahead failed: %s", error)


def _check_length(layer: int, got: int, size: int) -> None:
    if got != size:
        message = f"the image tree points {size - got} bytes beyond the end of layer {layer}"
        raise DamagedError(message)
