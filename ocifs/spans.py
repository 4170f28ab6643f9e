"""Decoded spans of all layers: found in a cache, waited for, or decoded in a thread; ahead of a reader that runs forward.

This is where the asynchronous colour changes, once: `SpanReader.read` is asynchronous, `SpanReader.read_blocking` does the
same in the calling thread. What they read is a layer's uncompressed tar; what files are made of is `ocifs.rootfs`'s and
`ocifs.devices`'s to know.

How a read is answered
    The usual case costs nothing: the span is in the cache and the answer is a view of it, no copy, no thread. A span that
    somebody is decoding is waited for (single flight: each is decoded at most once at a time, and a failure is shared by
    those who wait but not remembered). Anything else is decoded in a worker thread; decoders release the GIL.

    *Only as far as needed.* A span of gzip met out of order is decoded up to where the reader stops, plus `SLACK`: a
    reader that wants one small file from a cold span does not pay for its end. Who then asks for more goes on from there,
    twice as far each time. Starting `python3 -c 'import numpy'` so decodes about 155 MB of 39 spans that hold 180.

    *Ahead.* When a reader has come from the span before, the next one is decoded on another thread while the kernel
    digests this one. One span ahead is enough: decoding is faster than copying through FUSE, and more would evict
    what other readers need. One read over two spans is no such reader yet. A thread is left for who really waits.

Concurrency contract
    The classes here belong to one thread: under trio the event loop's, in a command the main thread. Only `LayerData` and
    `SpanDecoder` work in worker threads, each decoder in one at a time, and share nothing but open files. So no class takes
    a lock.

    A reader that is cancelled, as all are when a session ends, does not wait for its thread, which may read from a server
    that is gone: it leaves the thread alone, with the decoder, and the span is forgotten. What such a thread gives is
    dropped; until it gives it, it counts as one of those that decode.
"""

from __future__ import annotations

import contextlib
import logging
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ocifs.errors import DamagedError, OcifsError
from ocifs.layer_data import LayerData
from ocifs.layer_index import SpanDecoder

if TYPE_CHECKING:
    import trio

    from ocifs.evidence import EvidenceLog

_log = logging.getLogger(__name__)

DEFAULT_CACHE = 128 << 20
"""Bytes of decoded spans that are kept: 128 MiB, thirty-two spans of 4 MiB."""

SLACK = 256 << 10
"""Bytes decoded beyond what a reader of a cold span asked for: 256 KiB, some readahead and a few small files."""

_WRITTEN_DOWN = 1.0
"""Seconds after a read until the evidence log has it."""

_PIECES = 256
"""Pieces of one read after which other requests get their turn: about 3 ms."""


class SpanKey(NamedTuple):
    """A span of a layer: both numbers as everywhere (layers from 1, spans from 0)."""

    layer: int
    span: int


class DecodedSpan:
    """A span as far as it is decoded: pieces one behind the other, and what gives the next."""

    def __init__(self) -> None:
        self.size = 0
        """Bytes decoded so far."""
        self.decoder: SpanDecoder | None = None
        """What goes on; None if nothing was decoded yet, or all."""
        self._pieces: list[bytes | memoryview] = []
        self._ends: list[int] = []

    @property
    def cost(self) -> int:
        """Bytes of memory it takes: what is decoded, and until the end what is stored."""
        return self.size + (self.decoder.held if self.decoder is not None else 0)

    def append(self, piece: bytes | memoryview, decoder: SpanDecoder | None = None) -> None:
        """Add what was decoded next; ``decoder`` goes on from there, if there is more."""
        self._pieces.append(piece)
        self.size += len(piece)
        self._ends.append(self.size)
        self.decoder = decoder if decoder is not None and decoder.left else None

    def views(self, start: int, stop: int) -> Iterator[memoryview]:
        """Give bytes ``start`` to ``stop``, all decoded, as views: one, unless pieces meet in between."""
        number = bisect_right(self._ends, start)
        while start < stop:
            end = self._ends[number]
            piece = self._pieces[number]
            yield memoryview(piece)[start - end + len(piece) : min(stop, end) - end + len(piece)]
            start = end
            number += 1


class SpanCache:
    """Decoded spans, least recently used first to go, bounded in bytes. One cache serves all layers and trees."""

    def __init__(self, limit: int = DEFAULT_CACHE) -> None:
        """Keep at most ``limit`` bytes; a span that takes more is handed out but not kept."""
        self.limit = limit
        self.size = 0
        self._spans: OrderedDict[SpanKey, tuple[DecodedSpan, int]] = OrderedDict()

    def get(self, key: SpanKey) -> DecodedSpan | None:
        """Give what is here of the span: all of it, or its beginning."""
        found = self._spans.get(key)
        if found is None:
            return None
        self._spans.move_to_end(key)
        return found[0]

    def put(self, key: SpanKey, span: DecodedSpan) -> None:
        """Keep the span, or take note that it has grown; others make room for it."""
        self.drop(key)
        cost = span.cost
        if cost > self.limit:
            return
        self._spans[key] = span, cost
        self.size += cost
        while self.size > self.limit:
            _, (_, cost) = self._spans.popitem(last=False)
            self.size -= cost

    def drop(self, key: SpanKey) -> None:
        """Forget the span, if it is here."""
        _, cost = self._spans.pop(key, (None, 0))
        self.size -= cost

    def peek(self, key: SpanKey) -> DecodedSpan | None:
        """Give what is here of the span without marking it as used."""
        found = self._spans.get(key)
        return None if found is None else found[0]


class _Flight:
    """A span being decoded further, and those who wait for it."""

    def __init__(self, landed: trio.Event) -> None:
        self.landed = landed
        self.span: DecodedSpan | None = None
        self.error: OcifsError | None = None


class _Course:
    """How a layer is being read: where the last read began and ended, and whether it came from the one before it."""

    def __init__(self) -> None:
        self.forward = False
        self.ahead = -1
        """The span that was decoded ahead of this reader, or found to need no decoding."""
        self._first = self._last = -2

    def follow(self, first: int, last: int) -> None:
        """Take note of a read of spans ``first`` to ``last``."""
        if first != self._first:
            self.forward = self._first < first <= self._last + 1
            self.ahead = -1
        self._first, self._last = first, last


class SpanReader:
    """The layers of an image through one cache.

    ``hits`` counts the spans that a reader found decoded as far as needed, ``decoded_spans`` those whose stored bytes were
    read and verified, ``ahead_spans`` those of them that nobody had asked for yet, ``decoded_bytes`` what came out.
    """

    def __init__(
        self,
        layers: Sequence[LayerData],
        cache: SpanCache | None = None,
        *,
        threads: int = 2,
        evidence: EvidenceLog | None = None,
    ) -> None:
        """Read ``layers``, decoding in at most ``threads`` threads at a time; ``evidence`` is told what is read."""
        self.layers = {layer.number: layer for layer in layers}
        self.cache = cache or SpanCache()
        self._evidence = evidence
        self.hits = 0
        self.decoded_spans = 0
        self.ahead_spans = 0
        self.decoded_bytes = 0
        self._flights: dict[SpanKey, _Flight] = {}
        self._ahead: set[SpanKey] = set()
        """Spans that are to be decoded, or are being decoded, and that nobody has asked for yet."""
        self._courses = {number: _Course() for number in self.layers}
        self._threads = threads
        self._limiter: trio.CapacityLimiter | None = None
        self._loop: trio.lowlevel.TrioToken | None = None
        self._writing_down = False

    def decoding(self) -> bool:
        """Tell whether a span is being decoded right now."""
        return bool(self._flights)

    async def read(self, layer: int, layer_offset: int, size: int) -> list[memoryview]:
        """Give ``size`` bytes at ``layer_offset`` of a layer's tar as views of its spans; `DamagedError` beyond its end."""
        if self._evidence is None:
            return await self._read(layer, layer_offset, size)
        with _noted(self._evidence, self.layers[layer], layer_offset, size):
            parts = await self._read(layer, layer_offset, size)
        self._write_down_soon(self._evidence)
        return parts

    def _write_down_soon(self, evidence: EvidenceLog) -> None:
        """Have the evidence log say within a second what was read, though nobody may read on."""
        if self._writing_down:
            return
        import trio  # noqa: PLC0415

        async def write_down() -> None:
            await trio.sleep(_WRITTEN_DOWN)
            self._writing_down = False
            try:
                evidence.flush()
            except OcifsError as error:  # the log keeps it, and the next read fails
                _log.error("%s", error)

        self._writing_down = True
        trio.lowlevel.spawn_system_task(write_down)

    async def _read(self, layer: int, layer_offset: int, size: int) -> list[memoryview]:
        parts: list[memoryview] = []
        got = 0
        slices = list(self.layers[layer].slices(layer_offset, size))
        course = self._courses[layer]
        if slices:
            course.follow(slices[0].span, slices[-1].span)
        for span, start, stop in slices:
            self._ahead.discard(SpanKey(layer, span))
            if course.forward and span == slices[-1].span and course.ahead != span + 1:
                self._decode_ahead(course, SpanKey(layer, span + 1))
            parts += (await self._span(SpanKey(layer, span), stop, whole=course.forward)).views(start, stop)
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
        if self._evidence is None:
            return self._read_blocking(layer, layer_offset, size)
        with _noted(self._evidence, self.layers[layer], layer_offset, size):
            return self._read_blocking(layer, layer_offset, size)

    def _read_blocking(self, layer: int, layer_offset: int, size: int) -> list[memoryview]:
        parts: list[memoryview] = []
        got = 0
        for number, start, stop in self.layers[layer].slices(layer_offset, size):
            key = SpanKey(layer, number)
            span = self.cache.get(key)
            if span is None or span.size < stop:
                span = DecodedSpan()
                piece = self.layers[layer].decode(number)
                _check_decoded(key, len(piece), self._size(key))
                self._grown(key, span, piece)
            parts += span.views(start, stop)
            got += stop - start
        _check_length(layer, got, size)
        return parts

    def _grown(
        self, key: SpanKey, span: DecodedSpan, piece: bytes | memoryview, decoder: SpanDecoder | None = None
    ) -> None:
        self.decoded_spans += not span.size
        self.decoded_bytes += len(piece)
        span.append(piece, decoder)
        self.cache.put(key, span)

    def _size(self, key: SpanKey) -> int:
        return self.layers[key.layer].index.spans.layer_range(key.span).size

    async def _span(self, key: SpanKey, need: int, *, whole: bool) -> DecodedSpan:
        """Give the span, at least its first ``need`` bytes decoded; ``whole`` says to decode all, if anything."""
        while True:
            span = self.cache.get(key)
            if span is not None and span.size >= need:
                self.hits += 1
                return span
            flight = self._flights.get(key)
            if flight is None:
                return await self._decode(key, span or DecodedSpan(), None if whole else need)
            await flight.landed.wait()
            if flight.error is not None:
                raise flight.error
            if flight.span is not None and flight.span.size >= need:
                return flight.span
            # It was decoded less far than we need, or its reader was cancelled: look again.

    async def _decode(self, key: SpanKey, span: DecodedSpan, need: int | None) -> DecodedSpan:
        """Decode the span further: all of it, or as far as ``need`` and some."""
        import trio  # noqa: PLC0415 (commands that read without mounting start 80 ms sooner)

        loop = trio.lowlevel.current_trio_token()
        if self._limiter is None or self._loop is not loop:
            # A thread that one event loop left alone never gives its place back to the next.
            self._limiter, self._loop = trio.CapacityLimiter(self._threads), loop
        layer = self.layers[key.layer]
        target = self._size(key)
        if need is not None and layer.index.partly:
            # Who asks again and again runs through the span: twice as far each time.
            target = min(target, max(need + SLACK, 2 * span.size))

        def further() -> tuple[SpanDecoder, bytes | memoryview]:
            decoder = span.decoder or layer.begin(key.span)
            return decoder, layer.go_on(decoder, target - span.size)

        flight = self._flights[key] = _Flight(trio.Event())
        try:
            decoder, piece = await trio.to_thread.run_sync(further, limiter=self._limiter, abandon_on_cancel=True)
            _check_decoded(key, span.size + len(piece), target)
            self._grown(key, span, piece, decoder)
            flight.span = span
        except BaseException as error:
            # Its decoder may have failed half-way, or a thread be at it still: whoever wants the span next begins anew.
            self.cache.drop(key)
            flight.error = error if isinstance(error, OcifsError) else None
            raise
        finally:
            del self._flights[key]
            flight.landed.set()
        return span

    def _decode_ahead(self, course: _Course, key: SpanKey) -> None:
        """Start decoding a span that nobody asked for yet, if there is such a span and a thread is free for it."""
        if key.span < len(self.layers[key.layer].index.spans) and key not in self._ahead and self._undecoded(key):
            if self._busy() or len(self._ahead) >= self._threads - 1:
                return
            import trio  # noqa: PLC0415

            self._ahead.add(key)
            trio.lowlevel.spawn_system_task(self._fly_ahead, key)
        course.ahead = key.span

    def _busy(self) -> bool:
        """Tell whether whoever wants a span decoded now has to wait for a thread."""
        return len(self._flights) >= self._threads

    def _undecoded(self, key: SpanKey) -> bool:
        """Tell whether something of the span is left to decode that nobody is decoding."""
        span = self.cache.peek(key)
        return key not in self._flights and (span is None or span.size < self._size(key))

    async def _fly_ahead(self, key: SpanKey) -> None:
        try:
            # Since the task was started readers may have come for the span itself, or for the threads.
            if self._undecoded(key) and not self._busy():
                span = self.cache.peek(key)
                self.ahead_spans += span is None
                await self._decode(key, span or DecodedSpan(), None)
        except Exception as error:  # noqa: BLE001 (a system task must not fail; who really reads the span gets the error)
            _log.debug("decoding ahead failed: %s", error)
        finally:
            self._ahead.discard(key)


@contextlib.contextmanager
def _noted(evidence: EvidenceLog, layer: LayerData, layer_offset: int, size: int) -> Iterator[None]:
    """Have the evidence log say what a read came to."""
    diff_id = str(layer.index.diff_id)
    try:
        yield
    except OcifsError as error:
        evidence.read(layer.number, diff_id, layer_offset, size, str(error))
        raise
    evidence.read(layer.number, diff_id, layer_offset, size)


def _check_decoded(key: SpanKey, size: int, expected: int) -> None:
    if size < expected:
        message = f"span {key.span} of layer {key.layer} decoded to {size} bytes; {expected} were expected"
        raise DamagedError(message)


def _check_length(layer: int, got: int, size: int) -> None:
    if got != size:
        message = f"the image tree points {size - got} bytes beyond the end of layer {layer}"
        raise DamagedError(message)
