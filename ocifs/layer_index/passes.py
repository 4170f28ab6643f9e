"""The pass over one blob that makes its index: decompress, hash, parse, find restart points.

Runs in a child process (`ocifs.layer_index.child`), because it takes all the processor it gets, and what decompresses
hostile data may crash. Not here: processes and pipes, the file format, how restart points are found in gzip data
(`ocifs.compression.restarts`).

Which way a blob goes
=====================
- *Plain*: fixed spans.
- *gzip*: decompressed from front to back; spans begin at restart points found on the way.
- *zstd of small frames*: groups of frames are spans.
- *Everything else* (zstd with a frame too large to be a span, xz, bzip2, gzip with too few restart points or with
  damage): decompressed by the format's own library, while a re-framed copy is written whose spans are independent frames.

Each way reads the blob once, but that the headers of zstd's frames and blocks are read before, to see which way to go; and a
way that fails is followed by the last one from the beginning. For gzip ISA-L decides what is accepted, also a few incomplete
Huffman codes that zlib refuses; whatever it refuses is done again by zlib, which says where and what.

Threads
=======
The main thread reads and decompresses. A lane takes what was decompressed and hashes it; for gzip in place it also parses
it and writes entries and spans, which the main thread does otherwise. A lane takes what was stored and hashes it, one
compresses the copy. hashlib and the compression libraries release the GIL. A lane runs its jobs one after the other, so
each hash has one owner, and the index one writer.

Of the processor's time for a layer of 724 MB in 265, 1.4 s decompress, 0.4 look for restart points, 0.56 are the SHA-256
of the layer and 0.4 of the blob and its spans, 0.15 parse 13,727 headers: so the main thread is the longest, and hides the
rest on a second core.
"""

from __future__ import annotations

import collections
import errno
import hashlib
import itertools
import os
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO, Final

import zstandard
from isal import isal_zlib

from ocifs.compression import HEAD_SIZE, Compression, detect, restarts, streams, zstd
from ocifs.errors import DamagedError, MachineError, OcifsError, UnsupportedError
from ocifs.layer_index.format import Mismatch, Writer, pack_window
from ocifs.layer_index.job import Built, Content, Job
from ocifs.spec import DiffID, Digest, Hasher
from ocifs.tar import TarScanner, TarSummary

GZIP_SPAN: Final = 4 << 20
"""Bytes that a gzip span decodes to, about.

Measured on that layer, with 512 KiB, 1, 2 and 4 MiB: the pass at 263, 300, 407, 413 MB/s; an index of 4.4, 2.6, 1.6, 0.9 %
of the blob (32 KiB of window for each span); the mean first read of 1.6, 2.4, 3.4, 6.4 ms. Spans are decoded only as far
as somebody reads, so a larger one costs little when read from its beginning, and the index should stay below 2 %.
"""

FRAME_SIZE: Final = 1 << 20
"""Bytes in a frame of a re-framed copy, and the least that a group of zstd frames holds: 1 MiB, 0.5 ms to decode."""

PLAIN_SPAN: Final = 256 << 10
"""Bytes of a span of an uncompressed blob. Reading one byte hashes all of it, 0.15 ms; a record of 112 bytes is 0.04 %."""

MAX_SPAN: Final = 16 << 20
"""Bytes that a span may decode to, and `MAX_STORED` those it may be stored in, before it is better to re-frame."""
MAX_STORED: Final = 32 << 20

_MAX_GROUPS: Final = 1 << 18
"""Groups of zstd frames that are kept track of, at 16 bytes each: 256 GiB of any data that is not made to hurt."""

_CHUNK: Final = 1 << 20
"""Bytes of the blob read at a time, but by what walks gzip or zstd, which reads as it needs."""
_RING: Final = 4
"""Jobs that may wait or run in a lane, each with what was read or decompressed at a time."""


class _NoSpansError(Exception):
    """The gzip data has too few restart points, or is damaged; never leaves this module."""


class _SourceError(Exception):
    """Carries what went wrong with reading the blob through what decodes it; never leaves this module."""

    def __init__(self, problem: OcifsError) -> None:
        super().__init__()
        self.problem = problem


def run(job: Job, progress: Callable[[int], None], *, certain: bool = False) -> Built:
    """Make the index; with ``certain`` gzip is re-framed at once.

    ``progress`` is told stored bytes done, and 0 when the pass begins anew.
    """
    return _Pass(job, progress).run(certain=certain)


class _Lane:
    """A thread that runs jobs in order; at most `_RING` wait or run."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1)
        self._pending: collections.deque[Future[None]] = collections.deque()

    def put(self, job: Callable[..., None], *arguments: object) -> Future[None]:
        while len(self._pending) >= _RING:
            self._pending.popleft().result()
        future = self._executor.submit(job, *arguments)
        self._pending.append(future)
        return future

    def drain(self) -> None:
        """Wait until everything is done; raises what a job raised."""
        while self._pending:
            self._pending.popleft().result()

    def close(self) -> None:
        self._executor.shutdown(cancel_futures=True)


class _Pass:
    """The state of a pass: hashes, scanner, writer."""

    def __init__(self, job: Job, progress: Callable[[int], None]) -> None:
        self.job = job
        self.blob = job.blob
        self.progress = progress
        self.mismatches: list[Mismatch] = []
        expected = job.expected
        self._digest_type = expected.digest or Digest("sha256", "")
        self._diff_type = expected.diff_id or DiffID("sha256", "")
        self._stored_lane = _Lane()
        self._layer_lane = _Lane()
        self._copy_lane = _Lane()
        self._begin()

    def _begin(self) -> None:
        """Forget everything that was read."""
        for lane in (self._stored_lane, self._layer_lane, self._copy_lane):
            lane.drain()
        self._stored_hash: Hasher = self._digest_type.hasher()
        self._stored_position = 0
        self._layer_hash: Hasher = self._diff_type.hasher()
        self._scanner = TarScanner()
        self._writer = Writer(self.job.out)

    def _begin_anew(self) -> None:
        self._begin()
        self.progress(0)

    def run(self, *, certain: bool) -> Built:
        try:
            return self._run(certain=certain)
        finally:
            for lane in (self._stored_lane, self._layer_lane, self._copy_lane):
                lane.close()

    def _run(self, *, certain: bool) -> Built:
        blob, expected = self.blob, self.job.expected
        if expected.size is not None and blob.size != expected.size:
            self._mismatch("size", str(expected.size), str(blob.size), "bytes")
        as_bytes = self.job.content is Content.BYTES
        compression = Compression.PLAIN if as_bytes else detect(blob.read_at(0, HEAD_SIZE))
        reframed = False
        match compression:
            case Compression.EMPTY | Compression.PLAIN:
                self._plain()
            case Compression.GZIP:
                reframed = not self._gzip(certain=certain)
            case Compression.ZSTD:
                reframed = not self._zstd()
            case Compression.XZ | Compression.BZIP2:
                if self.job.content is not Content.ARCHIVE:
                    self._check_digest(whole=False)
                    raise UnsupportedError(
                        f"{blob.name} is compressed with {compression.value}; layers are plain tar, gzip or zstd"
                    )
                self._reframe(compression)
                reframed = True
            case Compression.UNKNOWN:
                self._check_digest(whole=False)
                raise UnsupportedError(
                    f"{blob.name} is no layer: it is neither a tar nor compressed with gzip or zstd "
                    f"(it begins with {blob.read_at(0, 8).hex(' ')})"
                )
        digest = self._check_digest(whole=True)
        diff_id = self._check_diff_id()
        return self._finish(compression, digest, diff_id, reframed=reframed)

    def _finish(self, compression: Compression, digest: Digest, diff_id: DiffID, *, reframed: bool) -> Built:
        summary: TarSummary = self._scanner.finish()
        if self.job.content is Content.BYTES:
            summary = TarSummary(self.blob.size, self.blob.size, None, (), None, 0)
        data_size = self.blob.size
        if reframed and self.job.reframed is not None:
            data_size = os.fstat(self.job.reframed.fileno()).st_size
        mismatches = tuple(self.mismatches)
        self._writer.finish(
            summary,
            digest=digest,
            diff_id=diff_id,
            stored_size=self.blob.size,
            compression=compression,
            reframed=reframed,
            data_size=data_size,
            mismatches=mismatches,
        )
        return Built(
            digest=digest,
            diff_id=diff_id,
            stored_size=self.blob.size,
            layer_size=summary.size,
            compression=compression,
            entry_count=summary.entry_count,
            reframed=reframed,
            damage=summary.damage,
            mismatches=mismatches,
        )

    # --- what every way shares --------------------------------------------------------------------------------------

    def _mismatch(self, what: str, expected: str, actual: str, unit: str = "") -> None:
        """Refuse the blob, or note why it would be refused."""
        unit = f" {unit}" if unit else ""
        message = f"{self.blob.name} has the wrong {what}: expected {expected}{unit}, found {actual}{unit}"
        if not self.job.tolerant:
            raise DamagedError(message)
        self.mismatches.append(Mismatch(what, expected, actual, message))

    def _broken(self, error: DamagedError) -> None:
        """Take note of data that does not decode, once the digest has been asked whether it is the right data at all."""
        message = f"{self.blob.name}: {error}"
        if not self.job.tolerant:
            self._check_digest(whole=False, because=str(error))
            raise DamagedError(message) from None
        self.mismatches.append(Mismatch("data", "data that decodes to its end", str(error), message))

    def _check_digest(self, *, whole: bool, because: str = "") -> Digest:
        """Compare the blob's digest; ``whole`` says that all of it has been hashed already, else the rest is now."""
        if not whole:
            for _chunk in self._stored_chunks(self._stored_position):
                pass
        self._stored_lane.drain()
        actual = Digest(self._digest_type.algorithm, self._stored_hash.hexdigest())
        expected = self.job.expected.digest
        if expected is not None and actual != expected:
            found = f"{actual} ({because})" if because else str(actual)
            self._mismatch("digest", str(expected), found)
        return actual

    def _check_diff_id(self) -> DiffID:
        self._layer_lane.drain()
        actual = DiffID(self._diff_type.algorithm, self._layer_hash.hexdigest())
        expected = self.job.expected.diff_id
        # Where the data broke off, its diff ID says nothing that was not said already.
        broken = any(mismatch.what == "data" for mismatch in self.mismatches)
        if expected is not None and actual != expected and not broken:
            self._mismatch("diff ID", str(expected), str(actual))
        return actual

    def _read_stored(self, offset: int, size: int) -> bytes:
        """Read bytes of the blob that must be there, hashing those that have not been."""
        data = self.blob.read_at(offset, size)
        if len(data) != size:
            raise DamagedError(f"{self.blob.name} became shorter while it was read: it ends at {offset + len(data)}")
        seen = self._stored_position - offset
        if 0 <= seen < size:
            self._stored_lane.put(self._stored_hash.update, memoryview(data)[seen:])
            self._stored_position = offset + size
        return data

    def _stored_chunks(self, offset: int = 0) -> Iterator[bytes]:
        size = self.blob.size
        for at in range(offset, size, _CHUNK):
            yield self._read_stored(at, min(_CHUNK, size - at))
            self.progress(min(at + _CHUNK, size))

    def _scan(self, data: bytes | memoryview) -> None:
        entries = self._scanner.feed(data)
        if entries:
            self._writer.add_entries(entries)

    # --- plain ------------------------------------------------------------------------------------------------------

    def _plain(self) -> None:
        # The data is what is stored, so one hash is enough if both are of one kind.
        same = self._digest_type.algorithm == self._diff_type.algorithm
        offset = 0
        for chunk in self._stored_chunks():
            if not same:
                self._layer_lane.put(self._layer_hash.update, chunk)
            if self.job.content is not Content.BYTES:
                self._scan(chunk)
            view = memoryview(chunk)
            for at in range(0, len(view), PLAIN_SPAN):
                piece = view[at : at + PLAIN_SPAN]
                self._writer.add_span(
                    blob_offset=offset + at,
                    blob_size=len(piece),
                    layer_offset=offset + at,
                    sha256=hashlib.sha256(piece).digest(),
                )
            offset += len(view)
        if same:
            self._stored_lane.drain()
            self._layer_hash = self._stored_hash

    # --- zstd -------------------------------------------------------------------------------------------------------

    def _zstd(self) -> bool:
        """Index in place and give True, or re-frame and give False."""
        groups: _Groups | None = _Groups()
        try:
            # Also once it is known that there are no groups: only here damage of the framing is found.
            for frame in zstd.walk(self.blob.read_at, self.blob.size):
                if groups is not None and not groups.take(frame):
                    groups = None
        except UnsupportedError as error:
            raise UnsupportedError(f"{self.blob.name}: {error}") from None
        except DamagedError as error:
            if not self.job.tolerant:
                self._broken(error)
            self._reframe(Compression.ZSTD, until=error)
            return False
        if groups is None:
            self._reframe(Compression.ZSTD)
            return False
        offset = 0
        for start, stored_size, bound in groups:
            stored = self._read_stored(start, stored_size)
            data = None
            try:
                data = zstd.inflate_unsized(stored, bound=bound)
            except DamagedError as error:
                if not self.job.tolerant:
                    self._broken(DamagedError(f"{error}, in the frames at blob_offset {start}"))
            if data is None or (not data and len(groups) > 1):
                # Damaged, or a frame that could have held something holds nothing, which is no span.
                self._begin_anew()
                self._reframe(Compression.ZSTD)
                return False
            self._layer_lane.put(self._layer_hash.update, data)
            self._scan(data)
            self._writer.add_span(
                blob_offset=start,
                blob_size=len(stored),
                layer_offset=offset,
                sha256=hashlib.sha256(stored).digest(),
                crc32=isal_zlib.crc32(data),
            )
            offset += len(data)
            self.progress(start + len(stored))
        return True

    # --- re-framing -------------------------------------------------------------------------------------------------

    def _reframe(self, compression: Compression, until: DamagedError | None = None) -> None:
        """Decompress front to back into a re-framed copy. ``until`` is damage that is already known to lie behind."""
        copy = self.job.reframed
        if copy is None:
            raise UnsupportedError(f"{self.blob.name} can only be read through a re-framed copy, and none may be made")
        writer = _CopyWriter(copy, self._writer)
        problem = until
        frame, filled = bytearray(FRAME_SIZE), 0
        try:
            for piece in streams.decode(compression, self._stored_chunks()):
                self._layer_lane.put(self._layer_hash.update, piece)
                self._scan(piece)
                view = memoryview(piece)
                while view:
                    taken = min(len(view), FRAME_SIZE - filled)
                    frame[filled : filled + taken] = view[:taken]
                    view = view[taken:]
                    filled += taken
                    if filled == FRAME_SIZE:
                        self._copy_lane.put(writer.add, frame)
                        frame, filled = bytearray(FRAME_SIZE), 0
        except DamagedError as error:
            problem = until or error
        if problem is not None:
            self._broken(problem)
        if filled:
            self._copy_lane.put(writer.add, frame[:filled])
        self._copy_lane.drain()
        for _chunk in self._stored_chunks(self._stored_position):
            pass

    # --- gzip -------------------------------------------------------------------------------------------------------

    def _gzip(self, *, certain: bool) -> bool:
        """Index in place and give True, or re-frame and give False."""
        if not certain:
            try:
                self._gzip_in_place()
            except _NoSpansError:
                self._begin_anew()
            else:
                return True
        self._reframe(Compression.GZIP)
        return False

    def _gzip_in_place(self) -> None:
        spans = _GzipSpans(self._writer, self._layer_lane, self._stored_lane)

        def read(offset: int, size: int) -> bytes:
            try:
                data = self._read_stored(offset, size)
            except OcifsError as error:
                raise _SourceError(error) from None
            spans.hold(offset, data)
            self.progress(offset + size)
            return data

        try:
            for data, restart in restarts.walk(read, self.blob.size, GZIP_SPAN):
                span = spans.take(data, restart)
                self._layer_lane.put(self._take, data, span)
        except _SourceError as error:
            raise error.problem from None
        except DamagedError as error:
            # Whatever it was, the certain way says it better.
            raise _NoSpansError(str(error)) from None
        spans.finish(self.blob.size)

    def _take(self, data: bytes, span: _GzipSpan) -> None:
        self._layer_hash.update(data)
        span.crc32 = isal_zlib.crc32(data, span.crc32)
        self._scan(data)


class _GzipSpan:
    """A span under way, and what lanes compute about it."""

    def __init__(self, restart: restarts.Restart, layer_offset: int) -> None:
        self.restart = restart
        self.layer_offset = layer_offset
        self.size = 0
        """Bytes that it decoded to so far."""
        self.stored_size = 0
        self.crc32 = 0
        self.sha256 = self.window = b""

    def close(self, pieces: list[memoryview]) -> None:
        """Take the checksum of what is stored, which comes as ``pieces``, and pack the window."""
        self.stored_size = sum(map(len, pieces))
        hasher = hashlib.sha256()
        for piece in pieces:
            hasher.update(piece)
        self.sha256 = hasher.digest()
        if self.restart.window:
            self.window = pack_window(self.restart.window)


class _GzipSpans:
    """Makes spans of the restart points of a blob that is being walked.

    A span ends where the next begins, which is known only when the walk has gone further; so what was stored since its
    beginning is held.
    """

    def __init__(self, writer: Writer, layer_lane: _Lane, stored_lane: _Lane) -> None:
        self._writer = writer
        self._layer_lane = layer_lane
        self._stored_lane = stored_lane
        self._held: collections.deque[tuple[int, bytes]] = collections.deque()
        self._held_to = 0
        self._span = _GzipSpan(restarts.Restart(0, 0, at_header=True, window=b""), 0)

    def hold(self, offset: int, data: bytes) -> None:
        """Take stored bytes, which may overlap with those before."""
        if offset + len(data) > self._held_to:
            new = data[self._held_to - offset :]
            self._held.append((self._held_to, new))
            self._held_to += len(new)
        if self._held_to - self._span.restart.blob_offset > MAX_STORED:
            raise _NoSpansError("a span is stored in too many bytes")

    def take(self, data: bytes, restart: restarts.Restart | None) -> _GzipSpan:
        """Take what was decoded next; gives the span that it is in."""
        if restart is not None and self._span.size:
            # Both spans may have bits in the byte where one ends and the other begins.
            self._end(restart.blob_offset + (restart.bit > 0))
            self._span = _GzipSpan(restart, self._span.layer_offset + self._span.size)
        self._span.size += len(data)
        if self._span.size > MAX_SPAN:
            raise _NoSpansError("a span decodes to too many bytes")
        return self._span

    def finish(self, stored_size: int) -> None:
        """End the last span, with the blob."""
        self._end(stored_size)

    def _end(self, stop: int) -> None:
        span = self._span
        start = span.restart.blob_offset
        while self._held and self._held[0][0] + len(self._held[0][1]) <= start:
            self._held.popleft()
        pieces = [
            memoryview(data)[max(0, start - offset) : stop - offset] for offset, data in self._held if offset < stop
        ]
        closed = self._stored_lane.put(span.close, pieces)
        # The lane of what was decoded, for it writes the entries, and has the checksum only by then.
        self._layer_lane.put(self._write, span, closed)

    def _write(self, span: _GzipSpan, closed: Future[None]) -> None:
        closed.result()
        self._writer.add_span(
            blob_offset=span.restart.blob_offset,
            blob_size=span.stored_size,
            layer_offset=span.layer_offset,
            sha256=span.sha256,
            crc32=span.crc32,
            bit=span.restart.bit,
            at_header=span.restart.at_header,
            window=span.window,
        )


class _Groups:
    """Groups of zstd frames that are to be spans: where each begins, and what it cannot exceed uncompressed.

    Skippable frames go with what is before them, those at the beginning with what comes.
    """

    def __init__(self) -> None:
        self._starts = array("Q")
        self._bounds = array("Q")
        self._end = 0

    def take(self, frame: zstd.Frame) -> bool:
        """Take the next frame; False if there can be no groups, because one is too large or there are too many."""
        if not self._starts or (self._bounds[-1] >= FRAME_SIZE and frame.bound):
            self._starts.append(frame.blob_offset)
            self._bounds.append(0)
        self._end = frame.blob_offset + frame.blob_size
        bound = self._bounds[-1] + frame.bound
        if bound > MAX_SPAN or self._end - self._starts[-1] > MAX_STORED or len(self._starts) > _MAX_GROUPS:
            return False
        self._bounds[-1] = bound
        return True

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """Give each group's blob_offset, stored size and bound."""
        ends = itertools.chain(self._starts[1:], (self._end,))
        for start, end, bound in zip(self._starts, ends, self._bounds, strict=True):
            yield start, end - start, bound


class _CopyWriter:
    """Writes the re-framed copy: independent frames, each with a span in the index.

    Runs in a lane while the main thread adds entries to the same index. Spans without windows are only collected until
    the index is finished, so the two do not meet.
    """

    def __init__(self, file: BinaryIO, index: Writer) -> None:
        self._fd = file.fileno()
        self._index = index
        self._blob_offset = 0
        self._layer_offset = 0
        # Level 1 makes a copy about a tenth larger than gzip's, at several hundred MB/s.
        self._compressor = zstandard.ZstdCompressor(level=1)
        os.ftruncate(self._fd, 0)

    def add(self, data: bytearray) -> None:
        frame = self._compressor.compress(data)
        view = memoryview(frame)
        at = self._blob_offset
        while view:
            done = os.pwrite(self._fd, view, at)
            at += done
            view = view[done:]
        self._index.add_span(
            blob_offset=self._blob_offset,
            blob_size=len(frame),
            layer_offset=self._layer_offset,
            sha256=hashlib.sha256(frame).digest(),
            crc32=isal_zlib.crc32(data),
        )
        self._blob_offset += len(frame)
        self._layer_offset += len(data)


def disk_problem(error: OSError, name: str) -> OcifsError:
    """Turn a failed write of the index or the copy into a sentence."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return MachineError(
            f"the disk is full while indexing {name}; free some space, run 'ocifs cache gc', "
            "or choose another place with --cache-dir"
        )
    return MachineError(f"cannot write the index of {name}: {error.strerror or error}")
