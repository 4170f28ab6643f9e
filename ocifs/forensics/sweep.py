"""The data of many files of an image in one go: layer by layer, front to back, each span decoded once.

What reads a million files path by path decodes spans over and over, for neighbours in a directory need not be neighbours
in a tar. So who needs much data says first what (`Wanted`), then gets it in the order in which it lies (`sweep`).

*Streams.* What is read is a stream: the data of one entry of a layer, under however many names and in however many
versions it is shown, or a gap between those. Streams of a layer do not overlap. One that lies within a span is handled in
the thread that decoded the span; the few that reach over several are handed piece by piece to their taker in the thread
that iterates. Decoders and hashes release the GIL, so this is as fast as the machine decodes or hashes.

*Memory.* Eight bytes for each stream that is wanted, forty while a layer's are sorted; besides, a few decoded spans and the
names of no file at all.

Not here: what is done with the data (`ocifs.forensics.hashes`, `ocifs.forensics.grep`).
"""

from __future__ import annotations

import itertools
import os
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, TypeVar

from ocifs.errors import OcifsError

if TYPE_CHECKING:
    from ocifs.evidence import EvidenceLog
    from ocifs.image import OpenLayer
    from ocifs.layer_data import LayerData
    from ocifs.layer_index import LayerIndex


class Stream(NamedTuple):
    """Bytes to be read of one layer, stored one behind the other from ``layer_offset`` on."""

    layer: int
    """From 1."""
    layer_offset: int
    stored_size: int
    """Bytes in the layer, at least 1."""
    size: int
    """Bytes of the file, holes included."""
    entry: int = -1
    """The entry whose data it is, from 0; -1 for a gap."""
    segments: Sequence[tuple[int, int]] | None = None
    """(file_offset, length) of what is stored; None if there are no holes."""


class Taker(Protocol):
    """Takes one stream's data, in order."""

    def take(self, data: memoryview) -> None:
        """Take the next bytes, valid for this call only."""
        ...

    def hole(self, size: int) -> None:
        """Take ``size`` zeros, which may be more than any memory holds."""
        ...

    def finish(self) -> None:
        """Take note that this was all."""
        ...


_Taker = TypeVar("_Taker", bound=Taker)
_Begun_co = TypeVar("_Begun_co", bound=Taker, covariant=True)


class Begin(Protocol[_Begun_co]):
    """Makes takers."""

    def __call__(self, stream: Stream, *, whole: bool) -> _Begun_co:
        """Make the taker of a stream.

        ``whole``: in a thread, which will hand over all of the stream (less than a span); else in the iterating one.
        """
        ...


class Swept(NamedTuple, Generic[_Taker]):
    """A stream that was read, or broke off with an error."""

    stream: Stream
    taker: _Taker
    error: OcifsError | None


class Wanted:
    """Which data is to be read: of each layer, the layer offsets at which entries' data begins."""

    def __init__(self) -> None:
        self._offsets: dict[int, array[int]] = {}

    def add(self, layer: int, layer_offset: int) -> None:
        """Want the data that begins there; wanting it twice is wanting it once."""
        self._offsets.setdefault(layer, array("Q")).append(layer_offset)

    def settle(self) -> None:
        """Sort, before the first look-up and after the last `add`."""
        for layer, offsets in self._offsets.items():
            self._offsets[layer] = array("Q", (offset for offset, _ in itertools.groupby(sorted(offsets))))

    def of(self, layer: int) -> Sequence[int]:
        """Give what is wanted of a layer, in order."""
        return self._offsets.get(layer, array("Q"))

    def number(self, layer: int, layer_offset: int) -> int:
        """Give the place of an offset among those of its layer; -1 if it is not wanted."""
        offsets = self.of(layer)
        at = bisect_left(offsets, layer_offset)
        return at if at < len(offsets) and offsets[at] == layer_offset else -1


def streams(layer: int, index: LayerIndex, offsets: Sequence[int], *, gaps: bool = False) -> Iterator[Stream]:
    """Give the streams of a layer that begin at ``offsets`` (sorted), in order; ``gaps``: also what is no file's data.

    A file that the layer's end cuts off is not given: nobody sees it. Its bytes are a gap.
    """
    if offsets and offsets[0] == 0 and index.layer_size:
        # Every entry's data is behind its header: this is a blob that is shown as a file, all of it.
        yield Stream(layer, 0, index.layer_size, index.layer_size)
        return
    wanted = iter(offsets)
    want = next(wanted, None)
    end = 0
    if want is not None or gaps:
        for number, entry in enumerate(index.entries()):
            start, stop = entry.data_offset, entry.data_offset + entry.stored_size
            if not entry.stored_size or stop > index.layer_size:
                continue
            is_file = entry.size > 0
            if gaps and is_file:
                if end < start:
                    yield Stream(layer, end, start - end, start - end)
                end = stop
            while want is not None and want < start:
                want = next(wanted, None)
            if want == start:
                yield Stream(layer, start, entry.stored_size, entry.size, number, entry.sparse)
            elif want is None and not gaps:
                return
    if gaps and end < index.layer_size:
        yield Stream(layer, end, index.layer_size - end, index.layer_size - end)


def sweep(
    layers: Iterable[OpenLayer],
    wanted: Wanted,
    begin: Begin[_Taker],
    *,
    gaps: bool = False,
    evidence: EvidenceLog | None = None,
) -> Iterator[Swept[_Taker]]:
    """Read everything that is wanted, in the order of layers and offsets; give each stream when it is through.

    Data that does not decode to what was indexed makes an error of the streams in that span; others are read all the same.
    ``evidence`` is told what was read.
    """
    threads = os.cpu_count() or 1
    with ThreadPoolExecutor(threads, "sweep") as pool:
        for layer in layers:
            found = streams(layer.number, layer.index, wanted.of(layer.number), gaps=gaps)
            run = _Run(layer.data, begin, pool, threads + 1)
            diff_id = str(layer.index.diff_id)
            try:
                for swept in run.results(found):
                    if evidence is not None:
                        stream, _, error = swept
                        said = None if error is None else str(error)
                        evidence.read(stream.layer, diff_id, stream.layer_offset, stream.stored_size, said)
                    yield swept
            finally:
                run.cancel()


# -- one layer -----------------------------------------------------------------------------------------------------


class _Task:
    """What is to be done with one span."""

    def __init__(self, span: int, carried: Stream | None = None) -> None:
        self.span = span
        self.carried = carried
        """A stream that comes from the span before."""
        self.inside: list[Stream] = []
        """Streams that begin and end here."""
        self.leaving: Stream | None = None
        """A stream that begins here and goes on in the next span."""

    @property
    def whole(self) -> bool:
        """Whether the iterating thread needs the decoded span."""
        return self.carried is not None or self.leaving is not None


def _tasks(data: LayerData, found: Iterable[Stream]) -> Iterator[_Task]:
    spans = data.index.spans
    task = _Task(-1)
    for stream in found:
        first = spans.span_at(stream.layer_offset)
        last = spans.span_at(stream.layer_offset + stream.stored_size - 1)
        if first != task.span:
            if task.span >= 0:
                yield task
            task = _Task(first)
        if first == last:
            task.inside.append(stream)
            continue
        task.leaving = stream
        yield task
        yield from (_Task(between, stream) for between in range(first + 1, last))
        task = _Task(last, stream)
    if task.span >= 0:
        yield task


class _Feeding(Generic[_Taker]):
    """A stream on its way into its taker."""

    def __init__(self, stream: Stream, taker: _Taker) -> None:
        self.stream = stream
        self.taker = taker
        self._segments = iter(stream.segments or ((0, stream.stored_size),))
        self._left = 0
        """Bytes of the current segment that are still to come."""
        self._reached = 0
        """Where in the file the taker is."""

    def feed(self, data: memoryview) -> None:
        """Hand on the next stored bytes, not more than there are."""
        while data:
            if not self._left:
                file_offset, self._left = next(self._segments)
                self._to(file_offset)
            part = data[: self._left]
            self.taker.take(part)
            self._left -= len(part)
            self._reached += len(part)
            data = data[len(part) :]

    def end(self) -> None:
        """Hand on the hole at the end, if there is one, and say that this was all."""
        self._to(self.stream.size)
        self.taker.finish()

    def _to(self, file_offset: int) -> None:
        if file_offset > self._reached:
            self.taker.hole(file_offset - self._reached)
            self._reached = file_offset


class _Run(Generic[_Taker]):
    """One layer being read."""

    def __init__(self, data: LayerData, begin: Begin[_Taker], pool: ThreadPoolExecutor, ahead: int) -> None:
        self._data = data
        self._begin = begin
        self._pool = pool
        self._ahead = ahead
        self._pending: deque[tuple[_Task, Future[tuple[memoryview, list[_Taker]]]]] = deque()

    def cancel(self) -> None:
        """Let nothing more be decoded."""
        for _, future in self._pending:
            future.cancel()

    def results(self, found: Iterable[Stream]) -> Iterator[Swept[_Taker]]:
        tasks = _tasks(self._data, found)
        crossing: _Feeding[_Taker] | None = None
        error: OcifsError | None = None
        while True:
            for task in itertools.islice(tasks, self._ahead - len(self._pending)):
                self._pending.append((task, self._pool.submit(self._work, task)))
            if not self._pending:
                return
            task, future = self._pending.popleft()
            try:
                data, takers = future.result()
                failed = None
            except OcifsError as raised:
                data, takers, failed = memoryview(b""), [], raised
            if task.carried is not None and crossing is not None:
                error = error or failed
                if self._feed(crossing, task, data, error):
                    yield Swept(crossing.stream, crossing.taker, error)
                    crossing = error = None
            for stream, taker in itertools.zip_longest(task.inside, takers):
                yield Swept(stream, taker or self._begin(stream, whole=False), failed)
            if task.leaving is not None:
                crossing, error = _Feeding(task.leaving, self._begin(task.leaving, whole=False)), failed
                self._feed(crossing, task, data, error)
            del data

    def _feed(self, crossing: _Feeding[_Taker], task: _Task, data: memoryview, error: OcifsError | None) -> bool:
        """Hand the stream what the span has of it, unless it is broken; say whether this was its last span."""
        stream = crossing.stream
        first, size = self._data.index.spans.layer_range(task.span)
        ends = stream.layer_offset + stream.stored_size <= first + size
        if error is None:
            crossing.feed(_cut(data, first, stream))
            if ends:
                crossing.end()
        return ends

    def _work(self, task: _Task) -> tuple[memoryview, list[_Taker]]:
        """Decode a span and feed what lies within it; in a thread of the pool."""
        data = memoryview(self._data.decode(task.span))
        first, _ = self._data.index.spans.layer_range(task.span)
        takers = []
        for stream in task.inside:
            feeding = _Feeding(stream, self._begin(stream, whole=True))
            feeding.feed(_cut(data, first, stream))
            feeding.end()
            takers.append(feeding.taker)
        return data if task.whole else memoryview(b""), takers


def _cut(data: memoryview, first: int, stream: Stream) -> memoryview:
    """Give what a decoded span, whose first byte is at layer offset ``first``, has of a stream."""
    start = stream.layer_offset - first
    return data[max(0, start) : start + stream.stored_size]
