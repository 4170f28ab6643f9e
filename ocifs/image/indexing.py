"""Layer indexes for an image: from the store, from builds of our own, from builds of other processes.

Not here: what an index is and how one is built (`ocifs.layer_index`), where it is kept (`ocifs.store`).
"""

from __future__ import annotations

import hashlib
import logging
import os
import select
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final, Protocol

import msgspec

from ocifs import compression, layer_index
from ocifs.compression import Compression
from ocifs.errors import DamagedError, MachineError, NotFoundError, OcifsError, StaleFormatError
from ocifs.layer_data import LayerData
from ocifs.layer_index import Content
from ocifs.sources import LayerBlob
from ocifs.spec import Digest
from ocifs.store import Kind
from ocifs.tree import Warned

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ocifs.layer_index import LayerIndex
    from ocifs.sources import Blob
    from ocifs.spec import DiffID
    from ocifs.store import BuildLock, Store, StoredFile

_log = logging.getLogger(__name__)

MAX_PASSES: Final = 4
"""Index passes that run at once, at most: each takes about one and a half cores, and 60 MB."""

_MAX_BUILDS: Final = 3
"""How often one index is built before it is an error that it is not there afterwards. Once is usual."""

_SAMPLE: Final = 64 << 10
"""Bytes at each end of a blob without digest that go into its key: 64 KiB, see `layer_key`."""


class Progress(Protocol):
    """Who is told how far long work is. Called from the main thread only."""

    def begin(self, layer: int, label: str, size: int) -> None:
        """Work on a layer starts: ``size`` stored bytes to go. Layer 0 is an archive around the image."""

    def advance(self, layer: int, done: int) -> None:
        """``done`` stored bytes of the layer have been read."""

    def end(self, layer: int) -> None:
        """The layer is finished, or failed."""

    def merging(self, layers: int) -> None:
        """The tree of ``layers`` layers is being merged."""

    def waiting(self, what: str) -> None:
        """Another process is doing the work; we wait for it."""


class Silent:
    """A `Progress` that says nothing."""

    def begin(self, layer: int, label: str, size: int) -> None:
        """Nothing."""

    def advance(self, layer: int, done: int) -> None:
        """Nothing."""

    def end(self, layer: int) -> None:
        """Nothing."""

    def merging(self, layers: int) -> None:
        """Nothing."""

    def waiting(self, what: str) -> None:
        """Nothing."""


class OpenLayer(msgspec.Struct, frozen=True, eq=False):
    """A layer with its index, and the file its spans are read from."""

    blob: LayerBlob
    key: str
    index: LayerIndex
    data: LayerData
    warnings: tuple[Warned, ...]
    """How the layer is not what the image says it is; empty unless examined."""

    @property
    def number(self) -> int:
        """From 1, the base."""
        return self.blob.number

    def close(self) -> None:
        """Close blob and index."""
        self.data.close()


def index_key(digest: Digest, diff_id: DiffID | None, content: Content = Content.LAYER) -> str:
    """Give the key of the index of a blob with this digest: the one place where such keys are made.

    An index holds one diff ID, which only one by the same algorithm can be compared with, so each algorithm has an index of
    its own; and so has whatever the same blob can be taken for.
    """
    prefix = "" if content is Content.LAYER else f"{content.value}-"
    suffix = f"-{diff_id.algorithm}" if diff_id is not None and diff_id.algorithm != "sha256" else ""
    return f"{prefix}{digest.algorithm}-{digest.hex}{suffix}"


def layer_key(blob: LayerBlob, stored: Blob, content: Content = Content.LAYER) -> str:
    """Under what a layer's index is kept: the blob's digest, else what a docker-archive says of it.

    A docker-archive gives only the diff ID, which the same layer has however it was compressed. So compression and stored
    size are part of the key, and a hash of the first and the last 64 KiB of the stored bytes: a gzip header holds the time
    of compression, so the same layer saved twice has the same size and other bytes, and another compressor or level shows
    in the first block. What is left are blobs above 128 KiB of the same uncompressed data and the same size that differ
    only between their ends. Then the older one's index is taken for both, and the SHA-256 that it holds of every span's
    bytes refuses to decode the other: a false alarm, never wrong data.
    """
    if blob.digest is not None:
        return index_key(blob.digest, blob.diff_id, content)
    diff_id = blob.diff_id
    if diff_id is None:
        message = f"layer {blob.number} has neither digest nor diff ID to vouch for it; --examine reads it anyway"
        raise DamagedError(message)
    first = stored.read_at(0, _SAMPLE)
    last = stored.read_at(max(0, stored.size - _SAMPLE), _SAMPLE)
    kind = compression.detect(first[: compression.HEAD_SIZE])
    sample = hashlib.sha256(first + last).hexdigest()[:32]  # a file's name has 255 bytes, a SHA-512 takes 128 of them
    return f"diffid-{diff_id.algorithm}-{diff_id.hex}-{kind.value}-{stored.size}-{sample}"


class Wanted:
    """A layer on its way to being open: its blob, its key, and its index once that is loaded."""

    def __init__(
        self,
        store: Store,
        blob: LayerBlob,
        stored: Blob,
        *,
        tolerant: bool = False,
        content: Content = Content.LAYER,
    ) -> None:
        """Take over ``stored``, unless this raises: `DamagedError` for a layer that nothing vouches for."""
        self.tolerant = tolerant
        self.content = content
        self.blob = blob
        self.stored = stored
        self.index: LayerIndex | None = None
        self.copy: StoredFile | None = None
        self.builds = 0
        self._store = store
        # What a source does not vouch for is known only once it was read.
        unnamed = blob.digest is None and blob.diff_id is None and (tolerant or content is Content.ARCHIVE)
        self._named = None if unnamed else layer_key(blob, stored, content)
        self._built: str | None = None
        self.lock_key = self._named or f"unread-{_hashed(stored.identity() or stored.name)}"
        """Under what the right to build is taken."""

    @property
    def key(self) -> str | None:
        """Under what the index is kept, as far as is known; None before the first pass over what nothing vouches for."""
        return self._built or self._remembered() or self._named

    def _remembered(self) -> str | None:
        """The key under which this very file was indexed as what it is, which is not what the image says it is."""
        if not self.tolerant and self.content is not Content.ARCHIVE:
            return None
        digest = remembered(self._store, self.stored)
        said = self.blob.digest
        if digest is None or (said is not None and said.algorithm != digest.algorithm):
            return None
        return index_key(digest, self.blob.diff_id, self.content)

    def built(self, built: layer_index.Built) -> str:
        """Give the key for what was built: its actual digest if it is not what it was expected to be."""
        if built.mismatches or self._named is None:
            self._built = index_key(built.digest, built.diff_id, self.content)
        else:
            self._built = self._named
        return self._built

    def load(self) -> bool:
        """Load index and re-framed copy from the store if they are there, whole and of this format version.

        Raises `DamagedError` if the index contradicts the image, unless examined.
        """
        key = self.key
        file = self._store.open_entry(Kind.LAYER, key) if key is not None else None
        if key is None or file is None:
            return False
        with ExitStack() as undo:
            undo.callback(file.close)
            try:
                index = layer_index.load(file)
                self._refuse_other_kind(index)
                copy = self._open_copy(key, index)
            except (StaleFormatError, DamagedError) as error:
                _log.info("rebuilding a layer index: %s", error)
                file.discard()
                return False
            if copy is not None:
                undo.callback(copy.close)
            if not self.tolerant:
                for message in self._contradictions(index):
                    raise DamagedError(message)
            undo.pop_all()
        index.on_damage = file.discard
        self.index, self.copy = index, copy
        return True

    def _refuse_other_kind(self, index: LayerIndex) -> None:
        """Raise `StaleFormatError` for an index that cannot answer what is asked of it here, whatever its key."""
        if self.blob.diff_id is not None and self.blob.diff_id.algorithm != index.diff_id.algorithm:
            message = f"{index.name} holds a diff ID by {index.diff_id.algorithm}, not by {self.blob.diff_id.algorithm}"
            raise StaleFormatError(message)
        if self.content is Content.LAYER and index.compression in (Compression.XZ, Compression.BZIP2):
            message = f"{index.name} is of an archive compressed with {index.compression.value}, which no layer is"
            raise StaleFormatError(message)

    def _open_copy(self, key: str, index: LayerIndex) -> StoredFile | None:
        if not index.reframed:
            return None
        copy = self._store.open_entry(Kind.REFRAMED, key)
        if copy is None or copy.size != index.data_size:
            if copy is not None:
                copy.close()
            message = f"the re-framed copy of layer {index.digest} was evicted"
            raise StaleFormatError(message)
        return copy

    def _contradictions(self, index: LayerIndex) -> Iterator[str]:
        """Say how the blob that was indexed is not what this image says it is (rule C4), and where its data breaks off.

        Asked of every index that is loaded, for the same blob may be named by images that say different things of it, and
        an index may have been made under examination.
        """
        blob, name = self.blob, self.stored.name
        if index.stored_size != self.stored.size:
            yield f"{name} has {self.stored.size} bytes, but had {index.stored_size} when it was indexed"
        if blob.digest is not None and blob.digest != index.digest:
            yield f"{name} has the wrong digest: expected {blob.digest}, found {index.digest}"
        broken = [mismatch.message for mismatch in index.mismatches if mismatch.what == "data"]
        if blob.diff_id is not None and blob.diff_id != index.diff_id and not broken:
            yield f"{name} has the wrong diff ID: expected {blob.diff_id}, found {index.diff_id}"
        yield from broken

    def opened(self) -> OpenLayer:
        """Give the layer, once `load` has succeeded."""
        index, copy, key = self.index, self.copy, self.key
        if index is None or key is None:
            message = f"layer {self.blob.number} was not loaded"
            raise RuntimeError(message)
        warnings = tuple(Warned("C4", self.blob.number, b"", what) for what in self._contradictions(index))
        data: Blob | StoredFile = self.stored
        if copy is not None:
            data = copy
            self.stored.close()

        def forget() -> None:
            if index.on_damage is not None:
                index.on_damage()
            if copy is not None:
                copy.discard()

        return OpenLayer(self.blob, key, index, LayerData(self.blob.number, index, data, forget), warnings)

    def close(self) -> None:
        """Close everything that was opened on the way."""
        self.stored.close()
        if self.copy is not None:
            self.copy.close()
        if self.index is not None:
            self.index.close()


class _Job:
    """One index being built: the child process, and the files it writes into."""

    def __init__(self, wanted: Wanted, lock: BuildLock, store: Store) -> None:
        self.wanted = wanted
        self._store = store
        self._identity = wanted.stored.identity()
        with ExitStack() as undo:
            undo.enter_context(lock)
            self._index_file = undo.enter_context(store.new(Kind.LAYER))
            self._copy_file = undo.enter_context(store.new(Kind.REFRAMED))
            blob = wanted.blob
            self.build = undo.enter_context(
                layer_index.Build(
                    wanted.stored,
                    out=self._index_file.file,
                    reframed=self._copy_file.file,
                    expected=layer_index.Expected(blob.size if blob.digest else None, blob.digest, blob.diff_id),
                    tolerant=wanted.tolerant,
                    content=wanted.content,
                )
            )
            self._undo = undo.pop_all()

    def publish(self) -> None:
        """Put what was built into the store. An index of other bytes than expected goes under their actual digest."""
        built = self.build.result()
        key = self.wanted.built(built)
        if built.reframed:
            self._copy_file.publish(key)
        self._index_file.publish(key)
        # A file that was written to while it was read is not what the pass saw.
        identity = self._identity
        if key != self.wanted.lock_key and identity is not None and identity == self.wanted.stored.identity():
            remember(self._store, identity, built.digest)

    def close(self) -> None:
        """Kill the child if it still runs, remove what was not published, release the lock."""
        self._undo.close()


class Indexing:
    """Gets the indexes of many layers: from the store, from builds of our own, from builds of other processes.

    Never waits for another process while holding the right to build something, so two processes that want the same
    layers in different order cannot wait for each other.
    """

    def __init__(self, store: Store, *, tolerant: bool, progress: Progress) -> None:
        self.wanted: list[Wanted] = []
        self._store = store
        self._tolerant = tolerant
        self._progress = progress

    def add(self, blob: LayerBlob, content: Content = Content.LAYER) -> Wanted:
        """Open a layer's blob and put it on the list. Raises what makes it unusable as part of a root file system.

        What is taken for something else need not be usable so, only there.
        """
        if content is not Content.LAYER:
            return self._add(blob, blob.open_stored(), content)
        stored = blob.open_stored() if self._tolerant and not isinstance(blob.problem, NotFoundError) else blob.open()
        return self._add(blob, stored, Content.LAYER)

    def add_archive(self, stored: Blob) -> Wanted:
        """Put a compressed archive around the image on the list, as layer 0; ``stored`` is taken over."""
        blob = LayerBlob(0, None, None, "", stored.size, None, None, lambda: stored)
        return self._add(blob, stored, Content.ARCHIVE)

    def _add(self, blob: LayerBlob, stored: Blob, content: Content) -> Wanted:
        try:
            one = Wanted(self._store, blob, stored, tolerant=self._tolerant, content=content)
        except BaseException:
            stored.close()
            raise
        self.wanted.append(one)
        return one

    def finish(self) -> None:
        """Load or build every index wanted."""
        while missing := [one for one in self.wanted if one.index is None and not one.load()]:
            with ExitStack() as locks:
                mine: list[tuple[Wanted, BuildLock]] = []
                for one in missing:
                    lock = self._store.try_lock(Kind.LAYER, one.lock_key)
                    if lock is None:
                        continue
                    locks.enter_context(lock)
                    if one.load():  # another process finished it just before we got the lock
                        lock.release()
                    else:
                        mine.append((one, lock))
                if mine:
                    self._build(mine)
                    continue
            theirs = next((one for one in missing if one.index is None), None)
            if theirs is not None:
                self._progress.waiting(theirs.stored.name if not theirs.blob.number else f"layer {theirs.blob.number}")
                with self._store.lock(Kind.LAYER, theirs.lock_key):
                    pass  # whoever had it is done; look again

    def _build(self, mine: list[tuple[Wanted, BuildLock]]) -> None:
        """Build as many at once as there are CPUs, up to `MAX_PASSES`, the largest first: others can hide behind it."""
        cpus = len(os.sched_getaffinity(0))
        queue = sorted(mine, key=lambda one: one[0].stored.size)
        running: list[_Job] = []
        try:
            while queue or running:
                while queue and len(running) < min(cpus, MAX_PASSES):
                    one, lock = queue.pop()
                    running.append(self._start(one, lock))
                self._step(running)
        finally:
            for job in running:
                self._end(job)

    def _start(self, wanted: Wanted, lock: BuildLock) -> _Job:
        wanted.builds += 1
        if wanted.builds > _MAX_BUILDS:
            message = (
                f"the index of {wanted.stored.name} was built {_MAX_BUILDS} times and is gone each time; try again"
            )
            raise MachineError(message)
        job = _Job(wanted, lock, self._store)
        self._progress.begin(wanted.blob.number, wanted.stored.name, wanted.stored.size)
        return job

    def _end(self, job: _Job) -> None:
        job.close()
        self._progress.end(job.wanted.blob.number)

    def _step(self, running: list[_Job]) -> None:
        """Wait until one of the builds has news, and take them in."""
        poll = select.poll()
        jobs = {job.build.fileno(): job for job in running}
        for fd in jobs:
            poll.register(fd, select.POLLIN)
        for fd, _ in poll.poll():
            job = jobs[fd]
            over = job.build.step()
            self._progress.advance(job.wanted.blob.number, job.build.stored)
            if over:
                job.publish()
                running.remove(job)
                self._end(job)


# -- files known by identity ---------------------------------------------------------------------------------------


class _Remembered(msgspec.Struct, frozen=True):
    """What a file hashed to when it was last read whole."""

    digest: str


def _hashed(identity: str) -> str:
    return hashlib.sha256(identity.encode(errors="surrogateescape")).hexdigest()


def remembered(store: Store, stored: Blob) -> Digest | None:
    """Give the digest of this very file, if it was indexed before under a key that only its digest gives."""
    identity = stored.identity()
    file = store.open_entry(Kind.ARCHIVE, _hashed(identity)) if identity is not None else None
    if file is None:
        return None
    with file:
        try:
            return Digest.parse(msgspec.json.decode(file.read_at(0, 4096), type=_Remembered).digest)
        except (msgspec.MsgspecError, ValueError, OcifsError):
            return None


def remember(store: Store, identity: str, digest: Digest) -> None:
    """Note the digest of the file that had this identity before it was read and after."""
    with store.new(Kind.ARCHIVE) as new:
        new.file.write(msgspec.json.encode(_Remembered(str(digest))))
        new.publish(_hashed(identity))
