"""The pass over one blob that makes its index: decompress, hash, parse, find restart points.

Runs in a child process (`ocifs.layer_index.child`), because rapidgzip's memory and its crashes must not be the caller's.
Not here: processes and pipes, the file format.

Which way a blob goes
=====================
- *Plain*: fixed spans, one read.
- *gzip*: rapidgzip decompresses and finds deflate block boundaries with their windows. It reads for itself and tells the
  boundaries only at the end, so a second read, from the page cache, takes the digest of the blob and of every span. Both
  reads are tied by digest and diff ID.
- *zstd of small frames*: groups of frames are spans, one read.
- *Everything else* (zstd with a frame too large to be a span, xz, bzip2, gzip that rapidgzip cannot handle): decompressed
  from front to back by the format's own library, while a re-framed copy is written whose spans are independent frames.

rapidgzip is believed nothing that a reader would depend on. Of every span the first 32 KiB are decoded again by the
stock inflate that readers use, from the span's bit and (sparse) window, and compared with what rapidgzip gave out. After
32 KiB a decoder's window holds only what it decoded itself, so the rest follows. The last span is decoded whole, to see
that the blob ends as gzip must. Whatever does not hold sends the blob the slow and certain way, whose verdict counts.

Threads: one lane hashes what was decompressed, one what is stored, one compresses the copy, while the main thread
decompresses and parses; hashlib and the compression libraries release the GIL. A lane runs its jobs one after the
other, so each hash has one owner.
"""

from __future__ import annotations

import collections
import errno
import hashlib
import io
import itertools
import os
import signal
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, BinaryIO, Final, NamedTuple, Protocol

import rapidgzip
import zstandard
from isal import isal_zlib

from ocifs.compression import HEAD_SIZE, Compression, detect, streams, zstd
from ocifs.compression.gzip import MAX_WINDOW, check_last_span, inflate_span, member_tail
from ocifs.errors import DamagedError, MachineError, OcifsError, UnsupportedError
from ocifs.layer_index.format import Mismatch, Writer
from ocifs.layer_index.job import Built, Job, StoredBytes
from ocifs.spec import DiffID, Digest, Hasher
from ocifs.tar import TarScanner, TarSummary

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

GZIP_SPAN: Final = 2 << 20
"""Bytes that a gzip span decodes to, about: rapidgzip's chunk size.

On a layer of 419 MB in 129 MB (binaries, headers, Perl), two threads to nowhere, and a window of 2.4 KB a span:

=========  ==========  ===============  ==================
size       index pass  windows / blob   a span decodes in
=========  ==========  ===============  ==================
512 KiB    380 MB/s    1.5 %            0.8 ms
1 MiB      370 MB/s    0.8 %            1.5 ms
2 MiB      550 MB/s    0.4 %            3 ms
4 MiB      665 MB/s    0.2 %            6 ms
=========  ==========  ===============  ==================

A reader that wants the first bytes of a span pays for those only, so the mean is half of the last column.
"""

FRAME_SIZE: Final = 1 << 20
"""Bytes in a frame of a re-framed copy, and the least that a group of zstd frames holds: 1 MiB, 0.5 ms to decode."""

PLAIN_SPAN: Final = 256 << 10
"""Bytes of a span of an uncompressed blob. Reading one byte hashes all of it, 0.15 ms; a record of 112 bytes is 0.04 %."""

MAX_SPAN: Final = 16 << 20
"""Bytes that a span may decode to, and `MAX_STORED` those it may be stored in, before it is better to re-frame."""
MAX_STORED: Final = 32 << 20

_BOMB_RATIO: Final = 100
_BOMB_SIZE: Final = 64 << 20
"""A gzip blob that has given more than 64 MiB, and a hundred times what it took, goes the certain way.

rapidgzip would need memory in proportion (1.1 GB at a thousandfold) and is slower there than zlib; the re-framed copy
of such data is small.
"""

STALL_SECONDS: Final = 20
"""How long rapidgzip may take for a piece of `_CHUNK` bytes, which is 2 ms of work, before its process is ended.

On some truncated streams one of its threads loops for ever. The process is then started again without it.
"""

_CHUNK: Final = 1 << 20
"""Bytes read or decompressed at a time; `_RING` of them may be under way in a lane."""
_RING: Final = 4


class _Distrusted(Exception):  # noqa: N818 - not an error of anybody's; it never leaves this module
    """rapidgzip failed, or what it said does not hold."""


def run(job: Job, progress: Callable[[int], None], *, certain: bool = False) -> Built:
    """Make the index. ``progress`` is told stored bytes done; with ``certain`` rapidgzip is not used at all."""
    return _Pass(job, progress).run(certain=certain)


class _RapidgzipFile(Protocol):
    """The part of `rapidgzip.RapidgzipFile` that is used."""

    def readinto(self, buffer: bytearray, /) -> int | None: ...
    def available_block_offsets(self) -> dict[int, int]: ...
    def tell_compressed(self) -> int: ...
    def export_index(self, file: BinaryIO, form: object, /) -> None: ...
    def close(self) -> None: ...


class _Lane:
    """A thread that runs jobs in order; at most `_RING` wait."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1)
        self._pending: collections.deque[Future[None]] = collections.deque()

    def put(self, job: Callable[..., None], *arguments: object) -> None:
        while len(self._pending) >= _RING:
            self._pending.popleft().result()
        self._pending.append(self._executor.submit(job, *arguments))

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
        compression = detect(blob.read_at(0, HEAD_SIZE))
        reframed = False
        match compression:
            case Compression.EMPTY | Compression.PLAIN:
                self._plain()
            case Compression.GZIP:
                reframed = not self._gzip(certain=certain)
            case Compression.ZSTD:
                reframed = not self._zstd()
            case Compression.XZ | Compression.BZIP2:
                if not self.job.archive:
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
        groups: list[list[zstd.Frame]] = []
        held = 0
        try:
            for frame in zstd.walk(self.blob.read_at, self.blob.size):
                # Skippable frames go with what is before them, those at the beginning with what comes.
                if not groups or (held >= FRAME_SIZE and frame.bound):
                    groups.append([])
                    held = 0
                groups[-1].append(frame)
                held += frame.bound
        except UnsupportedError as error:
            raise UnsupportedError(f"{self.blob.name}: {error}") from None
        except DamagedError as error:
            if not self.job.tolerant:
                self._broken(error)
            self._reframe(Compression.ZSTD, until=error)
            return False
        for group in groups:
            stored_size = sum(frame.blob_size for frame in group)
            if sum(frame.bound for frame in group) > MAX_SPAN or stored_size > MAX_STORED:
                self._reframe(Compression.ZSTD)
                return False
        offset = 0
        for group in groups:
            start = group[0].blob_offset
            stored = self._read_stored(start, group[-1].blob_offset + group[-1].blob_size - start)
            data = None
            try:
                data = zstd.inflate_unsized(stored, bound=sum(frame.bound for frame in group))
            except DamagedError as error:
                if not self.job.tolerant:
                    self._broken(DamagedError(f"{error}, in the frames at blob_offset {start}"))
            if data is None or (not data and len(groups) > 1):
                # Damaged, or a frame that could have held something holds nothing, which is no span.
                self._begin()
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
            except _Distrusted:
                self._begin()
            else:
                return True
        self._reframe(Compression.GZIP)
        return False

    def _gzip_in_place(self) -> None:
        checkpoints, checks = self._decompress()
        self._layer_lane.drain()
        self._gzip_spans(checkpoints, checks.finish())

    def _decompress(self) -> tuple[_Checkpoints, _SpanChecks]:
        """Run rapidgzip over the blob, feeding hash and scanner; give its restart points and checksums of the spans."""
        source = _SeekableBlob(self.blob)
        checks = _SpanChecks()
        try:
            file: _RapidgzipFile = rapidgzip.RapidgzipFile(
                source.for_rapidgzip(), self.job.threads, chunk_size=GZIP_SPAN
            )
            try:
                self._pump(file, checks)
                signal.setitimer(signal.ITIMER_REAL, STALL_SECONDS)
                return _Checkpoints.exported(file), checks
            finally:
                file.close()  # it would abort the interpreter if it were closed by the garbage collector at exit
        except OcifsError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # from writing the index; C++'s I/O errors come without a number
            # Whatever it was (it raises RuntimeError, ValueError, MemoryError, IndexError, …), the certain way says.
            if source.failure is not None:
                raise source.failure from None
            raise _Distrusted(str(error)) from None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _pump(self, file: _RapidgzipFile, checks: _SpanChecks) -> None:
        # One buffer more than can wait in the lane: a buffer is written to again only when its job is done.
        buffers = itertools.cycle([bytearray(_CHUNK) for _ in range(_RING + 1)])
        position = known = 0
        while True:
            buffer = next(buffers)
            # The signal ends the process whatever its threads do: in a pass SIGALRM has its default action.
            signal.setitimer(signal.ITIMER_REAL, STALL_SECONDS)
            size = file.readinto(buffer)
            if not size:
                return
            view = memoryview(buffer)[:size]
            position += size
            boundaries: list[int] = []
            if position > known:
                # rapidgzip knows all boundaries of a chunk before it gives out the chunk's first byte.
                boundaries = sorted({at for at in file.available_block_offsets().values() if at > known})
                known = boundaries[-1] if boundaries else known
            self._layer_lane.put(self._take, view, boundaries, checks)
            self._scan(view)
            stored = min(file.tell_compressed() // 8, self.blob.size)
            if position > _BOMB_SIZE and position > _BOMB_RATIO * stored:
                raise _Distrusted("it inflates too much")
            self.progress(stored)

    def _take(self, view: memoryview, boundaries: list[int], checks: _SpanChecks) -> None:
        self._layer_hash.update(view)
        checks.feed(view, boundaries)

    def _gzip_spans(self, points: _Checkpoints, checks: dict[int, _Check]) -> None:
        """Read the blob a second time: hash it and its spans, and see whether the spans decode to what came before."""
        spans: list[_Entered] = []
        for number, point in enumerate(points.starts):
            check = checks.get(point.layer_offset)
            last = number + 1 == len(points.starts)
            end = points.layer_size if last else points.starts[number + 1].layer_offset
            start = point.bit_offset // 8
            stop = self.blob.size if last else (points.starts[number + 1].bit_offset + 7) // 8
            size = end - point.layer_offset
            if check is None or check.size != size or size > MAX_SPAN or not 0 < stop - start <= MAX_STORED:
                raise _Distrusted(f"span {number} is not what was decoded")
            stored = self._read_stored(start, stop - start)
            span = _Entered(start, stop - start, point.bit_offset % 8, number == 0, size, number)
            if not self._decodes(stored, span, points, check):
                # A boundary between two members may lie before the header or behind it.
                span = span._replace(at_header=not span.at_header)
                if span.bit or not self._decodes(stored, span, points, check):
                    raise _Distrusted(f"span {number} does not decode")
            spans.append(span)
            self._writer.add_span(
                blob_offset=start,
                blob_size=stop - start,
                layer_offset=point.layer_offset,
                sha256=hashlib.sha256(stored).digest(),
                crc32=check.crc32,
                bit=span.bit,
                at_header=span.at_header,
                window=span.window(points),
            )
        if self._stored_position != self.blob.size:
            raise _Distrusted("the spans do not cover the blob")
        try:
            self._check_end(spans, points)
        except DamagedError as error:
            raise _Distrusted(str(error)) from None

    def _check_end(self, spans: list[_Entered], points: _Checkpoints) -> None:
        """Check that the blob ends as gzip data must, which rapidgzip does not quite."""
        last = spans.pop()
        before = check_last_span(
            self.blob.read_at(last.blob_offset, last.blob_size),
            bit=last.bit,
            window=last.window(points),
            size=last.size,
            at_header=last.at_header,
        )
        # The trailer tells how long its member is, up to 4 GiB. Mostly that is the whole layer; if not, the member's
        # beginning has to be found, in one of the last spans if the trailer does not lie.
        if before is None or before == (points.layer_size - last.size) & 0xFFFFFFFF:
            return
        size = 0
        for span in reversed(spans):
            stored = self.blob.read_at(span.blob_offset, span.blob_size)
            tail = member_tail(
                stored, bit=span.bit, window=span.window(points), size=span.size, at_header=span.at_header
            )
            if tail is not None:
                size += tail
                break
            size += span.size
        if before != size & 0xFFFFFFFF:
            raise DamagedError("the last gzip member's trailer has another size than its data")

    @staticmethod
    def _decodes(stored: bytes, span: _Entered, points: _Checkpoints, check: _Check) -> bool:
        head = min(span.size, MAX_WINDOW)
        try:
            data = inflate_span(stored, bit=span.bit, window=span.window(points), size=head, at_header=span.at_header)
        except DamagedError:
            return False
        return isal_zlib.crc32(data) == check.head_crc32


class _Entered(NamedTuple):
    """A gzip span and how it is entered."""

    blob_offset: int
    blob_size: int
    bit: int
    at_header: bool
    size: int
    number: int

    def window(self, points: _Checkpoints) -> bytes:
        return b"" if self.at_header else points.window(self.number)


class _Check(NamedTuple):
    size: int
    crc32: int
    head_crc32: int
    """Of the first 32 KiB, or of all if that is less."""


class _SpanChecks:
    """CRC-32 of each span of a stream that comes in chunks, the boundaries being told as late as the data."""

    def __init__(self) -> None:
        self._done: dict[int, _Check] = {}
        self._boundaries: collections.deque[int] = collections.deque()
        self._start = self._position = 0
        self._crc = self._head = 0

    def feed(self, view: memoryview, boundaries: list[int]) -> None:
        self._boundaries.extend(boundaries)
        while view:
            size = len(view)
            if self._boundaries:
                size = min(size, self._boundaries[0] - self._position)
            piece, view = view[:size], view[size:]
            in_head = MAX_WINDOW - (self._position - self._start)
            if in_head > 0:
                self._head = isal_zlib.crc32(piece[:in_head], self._head)
            self._crc = isal_zlib.crc32(piece, self._crc)
            self._position += size
            if self._boundaries and self._position == self._boundaries[0]:
                self._boundaries.popleft()
                self._close()

    def _close(self) -> None:
        self._done[self._start] = _Check(self._position - self._start, self._crc, self._head)
        self._start = self._position
        self._crc = self._head = 0

    def finish(self) -> dict[int, _Check]:
        """Give the checks by the layer offset of their spans."""
        if self._position > self._start or not self._done:
            self._close()
        return self._done


class _Start(NamedTuple):
    bit_offset: int
    """In the blob, in bits."""
    layer_offset: int
    window: int | None
    """Number of its window; None if it needs none."""


class _Exported(io.BytesIO):
    """A file that rapidgzip exports its index to, in the format of indexed_gzip (``zran_export_index`` there).

    ``GZIDX``, version, flags, compressed and uncompressed size (8 each), spacing, window size, number of points (4
    each); for each point: compressed offset rounded up, uncompressed offset (8 each), how many bits of the byte before
    belong to it (1), whether it has a window (1); then all windows, 32 KiB each. The windows of a blob of 10 GB would
    take 160 MB, so they are compressed as they come.
    """

    HEAD = struct.Struct("<5sBBQQIII")
    POINT = struct.Struct("<QQBB")

    def __init__(self) -> None:
        super().__init__()
        self.points = b""
        """Everything before the windows, once it has come."""
        self.windows: list[bytes] = []
        """Each as a zstd frame."""
        self._held = bytearray()
        self._compressor = zstandard.ZstdCompressor(level=1)

    def write(self, data: Buffer, /) -> int:
        size = memoryview(data).nbytes
        self._held += data
        if not self.points and len(self._held) >= self.HEAD.size:
            end = self.HEAD.size + self.HEAD.unpack_from(self._held)[7] * self.POINT.size
            if len(self._held) >= end:
                self.points = bytes(self._held[:end])
                del self._held[:end]
        while self.points and len(self._held) >= MAX_WINDOW:
            self.windows.append(self._compressor.compress(self._held[:MAX_WINDOW]))
            del self._held[:MAX_WINDOW]
        return size

    @property
    def complete(self) -> bool:
        return bool(self.points) and not self._held


class _Checkpoints:
    """Restart points: where our spans begin, by what rapidgzip exported."""

    def __init__(self, exported: _Exported) -> None:
        if not exported.complete:
            raise _Distrusted("an index of another size")
        self._windows = exported.windows
        magic, version, _flags, _stored, self.layer_size, _spacing, window_size, count = exported.HEAD.unpack_from(
            exported.points
        )
        if magic != b"GZIDX" or version != 1 or window_size != MAX_WINDOW:
            raise _Distrusted("an index of another format")
        windows = itertools.count()
        self.starts = [_Start(0, 0, None)]
        for number in range(count):
            offset, layer_offset, bits, has_window = exported.POINT.unpack_from(
                exported.points, exported.HEAD.size + number * exported.POINT.size
            )
            window = next(windows) if has_window else None
            # The first point lies behind the first member's header; our first span begins before it. A point that
            # gives nothing more (an empty member, the end) is none. Of several at one place the first is as good.
            if self.starts[-1].layer_offset < layer_offset < self.layer_size:
                self.starts.append(_Start(offset * 8 - bits, layer_offset, window))
        if next(windows) != len(self._windows):
            raise _Distrusted("an index with another number of windows")

    @classmethod
    def exported(cls, file: _RapidgzipFile) -> _Checkpoints:
        exported = _Exported()
        file.export_index(exported, rapidgzip.IndexFormat.INDEXED_GZIP)
        return cls(exported)

    def window(self, number: int) -> bytes:
        window = self.starts[number].window
        return b"" if window is None else zstandard.decompress(self._windows[window])


class _SeekableBlob(io.RawIOBase):
    """A blob as a file object, for rapidgzip. It reads from any of its threads, one at a time."""

    def __init__(self, blob: StoredBytes) -> None:
        self._blob = blob
        self._position = 0
        self.failure: BaseException | None = None
        """What reading raised; it does not survive the way through rapidgzip."""

    def for_rapidgzip(self) -> str | _SeekableBlob:
        """Give what rapidgzip reads fastest: a path if the blob is a whole file, else this object."""
        where = self._blob.file_range()
        if where is not None:
            fd, offset, size = where
            path = f"/proc/self/fd/{fd}"
            if offset == 0 and size == os.fstat(fd).st_size and os.access(path, os.R_OK):
                return path
        return self

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._blob.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def read(self, size: int = -1, /) -> bytes:
        try:
            data = self._blob.read_at(self._position, self._blob.size if size < 0 else size)
        except BaseException as error:  # noqa: BLE001 - kept, and raised again by the pass
            self.failure = error
            return b""
        self._position += len(data)
        return data


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
