"""Layers whose spans are pieces of given bytes, without blobs or compression, and a decoder that does as it is told.

``layer(10, 20)`` is a layer of 30 bytes in two spans; `FakeIndex` records every decode, and can make it wait or fail.

Not here: what reads them (`ocifs.spans`), indexes of real blobs (`tests.test_layer_index`).
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import threading
from typing import TYPE_CHECKING

import trio

from ocifs.layer_data import LayerData
from ocifs.layer_index import LayerRange

if TYPE_CHECKING:
    from collections.abc import Sequence

SECONDS = 60
"""After which a test that hangs is a failure."""


def bytes_of(size: int, layer: int = 1) -> bytes:
    """Bytes no two pieces of which are alike."""
    return b"".join(b"%d:%07d " % (layer, number) for number in range(size // 10 + 1))[:size]


class FakeSpans:
    """A span table: where each span begins, and where the last ends."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.offsets = [0, *itertools.accumulate(sizes)]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def span_at(self, layer_offset: int) -> int:
        assert 0 <= layer_offset < self.offsets[-1]
        return bisect.bisect_right(self.offsets, layer_offset) - 1

    def layer_range(self, number: int) -> LayerRange:
        return LayerRange(self.offsets[number], self.offsets[number + 1] - self.offsets[number])


class FakeIndex:
    """An index whose spans are pieces of ``data``; decoding can be made to wait or fail, and is recorded."""

    def __init__(self, data: bytes, sizes: Sequence[int]) -> None:
        assert sum(sizes) == len(data)
        self.data = data
        self.layer_size = len(data)
        self.diff_id = "sha256:" + hashlib.sha256(data).hexdigest()
        self.partly = True
        self.spans = FakeSpans(sizes)
        self.decoded: list[tuple[int, tuple[int, int] | None]] = []
        """Spans in the order of decoding, each with what was decoded of it, from and to; None for all of it."""
        self.failures: dict[int, list[Exception]] = {}
        self.running = self.most = 0
        self.short: set[int] = set()
        self._lock = threading.Lock()
        self.held: dict[int, threading.Event] = {}
        self.started = threading.Semaphore(0)

    def begin(self, number: int, _read_at: object) -> FakeDecoder:
        return FakeDecoder(self, number)

    def decode(self, number: int, read_at: object) -> bytes:
        decoder = self.begin(number, read_at)
        return decoder.read(decoder.left)

    def work(self, number: int, start: int, stop: int) -> bytes:
        """Decode part of a span, with all that was asked to happen then."""
        offset, size = self.spans.layer_range(number)
        with self._lock:
            self.decoded.append((number, None if (start, stop) == (0, size) else (start, stop)))
            self.running += 1
            self.most = max(self.most, self.running)
        self.started.release()
        try:
            if number in self.held:
                assert self.held[number].wait(SECONDS)
            if self.failures.get(number):
                raise self.failures[number].pop(0)
            return self.data[offset + start : offset + stop - (number in self.short)]
        finally:
            with self._lock:
                self.running -= 1

    async def until_started(self, count: int = 1) -> None:
        for _ in range(count):
            assert await trio.to_thread.run_sync(lambda: self.started.acquire(timeout=SECONDS))


class FakeDecoder:
    held = 7

    def __init__(self, index: FakeIndex, number: int) -> None:
        self._index = index
        self._number = number
        self._size = self.left = index.spans.layer_range(number).size

    def read(self, size: int) -> bytes:
        start = self._size - self.left
        self.left -= min(size, self.left)
        return self._index.work(self._number, start, self._size - self.left)


class NoBytes:
    name = "nothing"

    def read_at(self, _offset: int, _size: int, /) -> bytes:
        raise AssertionError

    def close(self) -> None:
        pass


def layer(*sizes: int, number: int = 1) -> tuple[FakeIndex, LayerData]:
    return layer_of(bytes_of(sum(sizes), number), sizes, number=number)


def layer_of(data: bytes, sizes: Sequence[int], *, number: int = 1) -> tuple[FakeIndex, LayerData]:
    index = FakeIndex(data, sizes)
    return index, LayerData(number, index, NoBytes())  # type: ignore[arg-type]  # it has what is used of an index


def joined(parts: list[memoryview]) -> bytes:
    return b"".join(parts)
