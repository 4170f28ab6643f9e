"""Is an image what its digests say, byte by byte; and if not, where is it not, and which files does that concern.

Everything is read from disk and hashed here and now: what the cache says about a blob is not believed but checked as well.

How a layer is checked
======================
All stored bytes are hashed and compared with the digest, all decoded ones with the diff ID. How they are decoded depends:

- *With an index* that was made of the right bytes (it is kept under their digest) span by span, each read and decoded once.
  The index knows a SHA-256 of every span's stored bytes and a checksum of what it decodes to; so if the blob has changed, it
  says in which spans, and its entries say whose data that is. What was decoded is also parsed again, and must give the
  entries that the index has.
- *Without one*, front to back by the format's own library. Then damage is found, but what it concerns cannot be told, for
  nobody knows what was there.

Where spans and blob disagree though the blob has the right digest, the index is wrong: that is a finding too, the index is
taken away, and the layer is decoded again without it. A re-framed copy is not the blob; both are decoded then.

Not here: files against a list of hashes (`ocifs.forensics.baseline`), signatures, which rules the tars break.
"""

from __future__ import annotations

import bisect
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from ocifs import layer_index
from ocifs.compression import HEAD_SIZE, Compression, detect, streams, zstd
from ocifs.errors import CacheDamagedError, DamagedError, OcifsError, StaleFormatError, UnsupportedError
from ocifs.image import chosen_layers, layer_key, note_opened, resolve
from ocifs.sources import stored_pieces
from ocifs.spec import DiffID, Digest
from ocifs.store import Kind
from ocifs.tar import TarScanner

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator

    from ocifs.evidence import EvidenceLog
    from ocifs.image import ImageOptions, Progress, Resolved
    from ocifs.layer_index import LayerIndex
    from ocifs.sources import Blob, LayerBlob
    from ocifs.spec import Hasher
    from ocifs.store import Store, StoredFile

MAX_NAMED: Final = 1000
"""Entries that a finding names; more are counted."""

_SPANS_AHEAD: Final = 2
"""Spans that wait decoded, of 4 MiB or so each."""
_WORTH_A_THREAD: Final = 1 << 20
"""Bytes of a layer below which a thread costs more than it saves."""
_DOCUMENT_RULES: Final = frozenset({"C4", "C5", "C6", "C8"})
"""Rules whose breach means that documents are not what their digests say, or do not agree (`ocifs.rules`)."""


class Finding(msgspec.Struct, frozen=True):
    """Something that is wrong."""

    what: str
    """``document``, ``missing``, ``size``, ``digest``, ``diff-id``, ``span``, ``data`` (does not decode), ``unchecked``
    (cannot be), ``cache`` (ours, not the image's) or ``file`` (against a baseline)."""
    message: str
    """One sentence: what is wrong and where."""
    blob_offset: int | None = None
    blob_size: int | None = None
    """Of a span: ``blob_size`` stored bytes from ``blob_offset`` on are not the right ones."""
    layer_offset: int | None = None
    layer_size: int | None = None
    """What those decode to; of data that does not decode where it breaks off."""
    entry_count: int | None = None
    """How many entries of the layer have data there: 0 if the bytes belong to no file, None if nobody knows."""
    entries: tuple[bytes, ...] = ()
    """The first `MAX_NAMED` of them, by name as the tar has it."""


class Checked(msgspec.Struct, frozen=True):
    """What was found out about one blob."""

    what: str
    """``documents``, ``layer``, or ``baseline``."""
    layer: int = 0
    """From 1; 0 for what is not a layer."""
    digest: str | None = None
    """As it should be."""
    diff_id: str | None = None
    stored_size: int = 0
    """Bytes that were read."""
    layer_size: int = 0
    """Bytes that they decoded to."""
    index: bool = False
    """Whether there was an index, which was checked too."""
    files: int = 0
    """Of a baseline: files that have their hash."""
    unlisted: int = 0
    """Of a baseline: files of the image that it does not name."""
    findings: tuple[Finding, ...] = ()


def verify(
    text: str, store: Store, options: ImageOptions, progress: Progress, evidence: EvidenceLog | None = None
) -> Iterator[Checked]:
    """Check the image that ``text`` names, its documents first, then its layers from the base up.

    Documents so damaged that they lead to no image are a finding. Raises the other errors of `ocifs.image.resolve`.
    """
    options = msgspec.structs.replace(options, examine=True)
    try:
        resolved = resolve(text, options, store, progress)
    except DamagedError as error:
        yield Checked("documents", findings=(Finding("document", str(error)),))
        return
    if evidence is not None:
        note_opened(evidence, resolved, ())
    yield _noted(evidence, _documents(resolved))
    for blob in chosen_layers(resolved, options):
        yield _noted(evidence, _layer(resolved, blob, store, progress))


def _noted(evidence: EvidenceLog | None, checked: Checked) -> Checked:
    if evidence is not None:
        which = str(checked.layer) if checked.layer else checked.what
        size, verified = checked.stored_size, not checked.findings
        evidence.append("blob", which=which, digest=checked.digest, size=size, verified=verified)
    return checked


# -- documents -----------------------------------------------------------------------------------------------------


def _documents(resolved: Resolved) -> Checked:
    """Say what was wrong with manifest, configuration, and the indexes that led to them.

    They were hashed when they were read (`ocifs.sources`): read anew each time, and tolerantly here.
    """
    image = resolved.image
    found = [
        Finding("document", warned.message)
        for warned in image.warnings
        if warned.rule in _DOCUMENT_RULES and not warned.layer
    ]
    size = len(image.manifest_raw) + len(image.config_raw)
    digest = str(image.manifest_digest or image.config_digest)
    return Checked("documents", digest=digest, stored_size=size, findings=tuple(found))


# -- layers --------------------------------------------------------------------------------------------------------


def _layer(resolved: Resolved, blob: LayerBlob, store: Store, progress: Progress) -> Checked:
    """Check one layer of an image: its stored bytes, what they decode to, and the index of it if the store has one.

    The blobs of an artifact are no layers: only their stored bytes are checked.
    """
    checked = Checked(
        "layer",
        layer=blob.number,
        digest=None if blob.digest is None else str(blob.digest),
        diff_id=None if blob.diff_id is None else str(blob.diff_id),
    )
    try:
        stored = blob.open_stored()
    except OcifsError as error:
        missing = Finding("missing", f"layer {blob.number} cannot be read: {error}")
        return msgspec.structs.replace(checked, findings=(missing,))
    with ExitStack() as stack:
        stack.callback(stored.close)
        progress.begin(blob.number, stored.name, stored.size)
        stack.callback(progress.end, blob.number)
        check = _LayerCheck(blob, stored, store, progress, checked)
        for warned in resolved.warnings:
            if warned.layer == blob.number and warned.rule in {"C5", "C6"}:
                check.find("unchecked" if warned.rule == "C5" else "document", warned.message)
        return check.run(stack, decode=resolved.image.artifact is None)


class _Damage(NamedTuple):
    """A span whose stored bytes are not those that the index was made of."""

    number: int
    message: str


class _LayerCheck:
    """One layer being checked."""

    def __init__(self, blob: LayerBlob, stored: Blob, store: Store, progress: Progress, checked: Checked) -> None:
        self._blob = blob
        self._stored = stored
        self._store = store
        self._progress = progress
        self._checked = checked
        self._findings: list[Finding] = []

    def run(self, stack: ExitStack, *, decode: bool) -> Checked:
        blob, stored = self._blob, self._stored
        if blob.descriptor is not None and stored.size != blob.descriptor.size:
            expected = blob.descriptor.size
            self.find("size", f"{stored.name} has the wrong size: expected {expected} bytes, found {stored.size}")
        if blob.digest is None and blob.diff_id is None:
            self.find("unchecked", f"layer {blob.number} has neither digest nor diff ID to be compared with")
        index, copy = self._open_index(stack) if decode else (None, None)
        if index is not None and not index.reframed:
            layer_size = self._by_spans(index)
        else:
            layer_size = self._front_to_back(decode=decode)
        if copy is not None and index is not None:
            self._check_copy(index, copy)
        return msgspec.structs.replace(
            self._checked,
            stored_size=stored.size,
            layer_size=layer_size,
            index=index is not None,
            findings=tuple(self._findings),
        )

    def find(self, what: str, message: str) -> None:
        self._findings.append(Finding(what, message))

    # --- what the cache has -----------------------------------------------------------------------------------------

    def _open_index(self, stack: ExitStack) -> tuple[LayerIndex | None, StoredFile | None]:
        """Open the index that was made of the right bytes, and its re-framed copy, if they are there."""
        blob = self._blob
        if blob.digest is None and blob.diff_id is None:
            return None, None
        key = layer_key(blob, self._stored)
        file = self._store.open_entry(Kind.LAYER, key)
        if file is None:
            return None, None
        stack.callback(file.close)
        try:
            index = layer_index.load(file)
            right = blob.digest in {None, index.digest} and blob.diff_id in {None, index.diff_id}
            if not right or index.mismatches or len(index.spans) == 0:
                return None, None
            index.on_damage = file.discard
        except StaleFormatError:
            return None, None
        except CacheDamagedError as error:
            file.discard()
            self.find("cache", str(error))
            return None, None
        copy = self._store.open_entry(Kind.REFRAMED, key) if index.reframed else None
        if copy is not None:
            stack.callback(copy.close)
        return index, copy

    # --- two ways of decoding ---------------------------------------------------------------------------------------

    def _by_spans(self, index: LayerIndex) -> int:
        """Check with an index; gives the bytes decoded."""
        reading = _Reading(self._stored, self._blob.digest)
        decoded = _Decoded(self._blob.diff_id)
        comparing = _Comparing(index)
        damages: list[_Damage] = []
        wrong_index: CacheDamagedError | None = None
        try:
            with closing(_ahead(index, reading)) as spans:  # so that nobody reads on once this is over
                for number, span in enumerate(spans):
                    try:
                        data = span()
                    except CacheDamagedError:
                        raise
                    except DamagedError as error:
                        damages.append(_Damage(number, str(error)))
                        continue
                    decoded.take(data)
                    if not damages:
                        comparing.take(data)
                    self._progress.advance(self._blob.number, reading.position)
            if not damages:
                comparing.finish()
        except CacheDamagedError as error:
            wrong_index = error
        digest = self._finished(reading)
        if wrong_index is None and not damages:
            self._compare_digest(digest)
            self._compare_diff_id(decoded)
            return decoded.size
        if wrong_index is None and self._blob.digest is not None and digest != self._blob.digest:
            self._compare_digest(digest)
            self._findings += _located(index, damages)
            return decoded.size
        # The stored bytes are the right ones, or nothing says so: whoever is wrong, another look will tell.
        message = str(wrong_index) if wrong_index is not None else damages[0].message
        if index.on_damage is not None:
            index.on_damage()
        before = len(self._findings)
        size = self._front_to_back()
        if wrong_index is not None or len(self._findings) == before:
            self._findings.append(Finding("cache", f"the cached index disagrees with the layer: {message}"))
        else:
            self._findings += _located(index, damages)
        return size

    def _front_to_back(self, *, decode: bool = True) -> int:
        """Check without an index; gives the bytes decoded."""
        reading = _Reading(self._stored, self._blob.digest)
        decoded = _Decoded(self._blob.diff_id)
        if not decode:
            self._compare_digest(self._finished(reading))
            return 0
        problem: Finding | None = None
        try:
            kind = detect(self._stored.read_at(0, HEAD_SIZE))
            if kind in {Compression.UNKNOWN, Compression.XZ, Compression.BZIP2} or self._is_encrypted():
                raise UnsupportedError(f"it is no layer that can be decoded ({kind.value})")
            if kind is Compression.ZSTD:
                for _ in zstd.walk(self._stored.read_at, self._stored.size):
                    pass
            for piece in streams.decode(kind, reading.pieces()):
                decoded.take(piece)
                self._progress.advance(self._blob.number, reading.position)
        except OcifsError as error:
            problem = Finding(
                "data",
                f"{self._stored.name} does not decode: {error}; no index from before says which files that concerns",
                layer_offset=decoded.size,
            )
        self._compare_digest(self._finished(reading))
        if problem is not None:
            self._findings.append(problem)
        else:
            self._compare_diff_id(decoded)
        return decoded.size

    def _finished(self, reading: _Reading) -> Digest | None:
        try:
            return reading.finish()
        except OcifsError as error:
            self.find("data", f"not all of it can be read: {error}")
            return None

    def _is_encrypted(self) -> bool:
        return self._blob.descriptor is not None and self._blob.descriptor.is_encrypted

    def _compare_digest(self, actual: Digest | None) -> None:
        expected = self._blob.digest
        if expected is not None and actual is not None and actual != expected:
            self.find("digest", f"{self._stored.name} has the wrong digest: expected {expected}, found {actual}")

    def _compare_diff_id(self, decoded: _Decoded) -> None:
        expected, actual = self._blob.diff_id, decoded.diff_id()
        if expected is not None and actual != expected:
            self.find("diff-id", f"{self._stored.name} has the wrong diff ID: expected {expected}, found {actual}")

    def _check_copy(self, index: LayerIndex, copy: StoredFile) -> None:
        """Decode the re-framed copy, from which files are read: it is wrong if it is not what the blob decodes to."""
        decoded, comparing = _Decoded(index.diff_id), _Comparing(index)
        try:
            for number in range(len(index.spans)):
                data = index.decode(number, copy.read_at)
                decoded.take(data)
                comparing.take(data)
            comparing.finish()
            wrong = "" if decoded.diff_id() == index.diff_id else "it decodes to another diff ID"
        except CacheDamagedError as error:
            wrong = str(error)
        if wrong:
            copy.discard()
            if index.on_damage is not None:
                index.on_damage()
            self.find("cache", f"the re-framed copy of layer {self._blob.number} is damaged: {wrong}")


def _ahead(index: LayerIndex, reading: _Reading) -> Generator[Callable[[], bytes | memoryview]]:
    """Give what gives each span, in order, decoded in a thread of its own a few ahead of who hashes what they decode to."""
    if index.layer_size < _WORTH_A_THREAD:
        yield from (partial(index.decode, number, reading.read_at) for number in range(len(index.spans)))
        return
    waiting: deque[Future[bytes | memoryview]] = deque()
    with ThreadPoolExecutor(1, "verify") as pool:
        for number in range(len(index.spans)):
            waiting.append(pool.submit(index.decode, number, reading.read_at))
            if len(waiting) > _SPANS_AHEAD:
                yield waiting.popleft().result
        yield from (future.result for future in waiting)


class _Reading:
    """Reads a blob in order, and hashes every byte once, also the one that two spans share."""

    def __init__(self, stored: Blob, digest: Digest | None) -> None:
        self._stored = stored
        self._hasher: Hasher | None = None if digest is None else digest.hasher()
        self._algorithm = "" if digest is None else digest.algorithm
        self.position = 0
        """Bytes hashed so far, from the first one on."""

    def read_at(self, offset: int, size: int, /) -> bytes:
        data = self._stored.read_at(offset, size)
        if offset <= self.position < offset + len(data):
            if self._hasher is not None:
                self._hasher.update(memoryview(data)[self.position - offset :])
            self.position = offset + len(data)
        return data

    def pieces(self) -> Iterator[bytes]:
        for data in stored_pieces(self._stored):
            if self._hasher is not None:
                self._hasher.update(data)
            self.position += len(data)
            yield data

    def finish(self) -> Digest | None:
        """Hash what was not read; gives the digest, None if there is none to be compared with."""
        if self._hasher is None:
            return None
        while data := self._stored.read_at(self.position, 1 << 20):
            self._hasher.update(data)
            self.position += len(data)
        return Digest(self._algorithm, self._hasher.hexdigest())


class _Decoded:
    """Takes what a layer decodes to."""

    def __init__(self, diff_id: DiffID | None) -> None:
        self._type = diff_id or DiffID("sha256", "")
        self._hasher = self._type.hasher()
        self.size = 0

    def take(self, data: bytes | memoryview) -> None:
        self._hasher.update(data)
        self.size += len(data)

    def diff_id(self) -> DiffID:
        return DiffID(self._type.algorithm, self._hasher.hexdigest())


class _Comparing:
    """Parses a layer's tar once more and compares the entries with those of its index."""

    def __init__(self, index: LayerIndex) -> None:
        self._scanner = TarScanner()
        self._entries = index.entries()
        self._index = index

    def take(self, data: bytes | memoryview) -> None:
        for entry in self._scanner.feed(data):
            if entry != next(self._entries, None):
                raise self._differs(f"another entry at layer offset {entry.header_offset}")

    def finish(self) -> None:
        if self._scanner.finish().entry_count != self._index.entry_count or next(self._entries, None) is not None:
            raise self._differs("another number of entries")

    def _differs(self, how: str) -> CacheDamagedError:
        return CacheDamagedError(f"the layer index {self._index.name} has {how} than the layer")


# -- whose data it is ----------------------------------------------------------------------------------------------


def _located(index: LayerIndex, damages: Iterable[_Damage]) -> Iterator[Finding]:
    """Say of each broken span which entries have data in it."""
    damages = list(damages)
    ranges = [index.spans.layer_range(damage.number) for damage in damages]
    starts = [found.layer_offset for found in ranges]
    names: list[list[bytes]] = [[] for _ in damages]
    counts = [0] * len(damages)
    for entry in index.entries():
        if not entry.stored_size:
            continue
        end = entry.data_offset + entry.stored_size
        at = max(0, bisect.bisect_right(starts, entry.data_offset) - 1)
        while at < len(ranges) and starts[at] < end:
            if starts[at] + ranges[at].size > entry.data_offset:
                counts[at] += 1
                if len(names[at]) < MAX_NAMED:
                    names[at].append(entry.path)
            at += 1
    for damage, found, count, some in zip(damages, ranges, counts, names, strict=True):
        span = index.spans[damage.number]
        yield Finding(
            "span",
            damage.message,
            blob_offset=span.blob_offset,
            blob_size=span.blob_size,
            layer_offset=found.layer_offset,
            layer_size=found.size,
            entry_count=count,
            entries=tuple(some),
        )
