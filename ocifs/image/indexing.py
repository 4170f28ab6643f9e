"""Layer indexes for an image: from the store, from builds of our own, from builds of other processes.

Not here: what an index is and how one is built (`ocifs.layer_index`), where it is kept (`ocifs.store`).
"""

from __future__ import annotations

import hashlib
import logging
import os
import select
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import msgspec

from ocifs import compression, layer_index
from ocifs.errors import DamagedError, NotFoundError, StaleFormatError
from ocifs.layer_data import LayerData
from ocifs.store import Kind
from ocifs.tree import Warned

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ocifs.layer_index import LayerIndex
    from ocifs.sources import Blob, LayerBlob
    from ocifs.spec import DiffID, Digest
    from ocifs.store import BuildLock, Store, StoredFile

_log = logging.getLogger(__name__)


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


@dataclass(frozen=True, slots=True, eq=False)
class OpenLayer:
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


def layer_key(blob: LayerBlob, stored: Blob) -> str:
    """Under what a layer's index is kept: the blob's digest, else what a docker-archive says of it (module docstring)."""
    if blob.digest is not None:
        return digest_key(blob.digest, blob.diff_id)
    kind = compression.detect(stored.read_at(0, compression.HEAD_SIZE))
    diff_id = blob.diff_id
    if diff_id is None:
        message = f"layer {blob.number} has neither digest nor diff ID to vouch for it; --examine reads it anyway"
        raise DamagedError(message)
    return f"diffid-{diff_id.algorithm}-{diff_id.hex}-{kind.value}-{stored.size}"


def digest_key(digest: Digest, diff_id: DiffID | None = None) -> str:
    """Give the key of the index of a blob. An index holds one diff ID, which only one by the same algorithm equals."""
    other = f"-{diff_id.algorithm}" if diff_id is not None and diff_id.algorithm != "sha256" else ""
    return f"{digest.algorithm}-{digest.hex}{other}"


def closing(wanted: Wanted) -> Callable[..., None]:
    """Give a function for `ExitStack.push` that closes a layer."""

    def close(*_: object) -> None:
        wanted.close()

    return close


class Wanted:
    """A layer on its way to being open: its blob, its key, and its index once that is loaded."""

    def __init__(self, blob: LayerBlob, stored: Blob, key: str, *, tolerant: bool = False) -> None:
        self._tolerant = tolerant
        self.blob = blob
        self.stored = stored
        self.key = key
        self.index: LayerIndex | None = None
        self.copy: StoredFile | None = None

    def load(self, store: Store) -> bool:
        """Load index and re-framed copy from the store if they are there, whole and of this format version."""
        file = store.open_entry(Kind.LAYER, self.key)
        if file is None:
            return False
        try:
            index = layer_index.load(file)
            copy = store.open_entry(Kind.REFRAMED, self.key) if index.reframed else None
            if index.reframed and (copy is None or copy.size != index.data_size):
                if copy is not None:
                    copy.close()
                message = f"the re-framed copy of layer {index.digest} was evicted"
                raise StaleFormatError(message)
        except (StaleFormatError, DamagedError) as error:
            _log.info("rebuilding a layer index: %s", error)
            file.close()
            store.discard(Kind.LAYER, self.key)
            return False
        self.index, self.copy = index, copy
        if not self._tolerant:
            for message in self._contradictions(index):
                raise DamagedError(message)
        return True

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
        if self.index is None:
            message = f"layer {self.blob.number} was not loaded"
            raise RuntimeError(message)
        data: Blob | StoredFile = self.stored
        if self.copy is not None:
            data = self.copy
        warnings = tuple(Warned("C4", self.blob.number, b"", what) for what in self._contradictions(self.index))
        if self.copy is not None:
            self.stored.close()
        return OpenLayer(self.blob, self.key, self.index, LayerData(self.blob.number, self.index, data), warnings)

    def close(self) -> None:
        """Close everything that was opened on the way."""
        self.stored.close()
        if self.copy is not None:
            self.copy.close()
        if self.index is not None:
            self.index.close()


class _Job:
    """One index being built: the child process, and the files it writes into."""

    def __init__(
        self, wanted: Wanted, lock: BuildLock, store: Store, *, tolerant: bool, archive: bool, threads: int
    ) -> None:
        self.wanted = wanted
        self._store = store
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
                    tolerant=tolerant,
                    archive=archive,
                    threads=threads,
                )
            )
            self._undo = undo.pop_all()

    def publish(self) -> None:
        """Put what was built into the store. An index of other bytes than expected goes under their actual digest."""
        built = self.build.result()
        if built.mismatches or (self.wanted.blob.digest is None and self.wanted.blob.diff_id is None):
            self.wanted.key = digest_key(built.digest, built.diff_id)
            remember(self._store, self.wanted.stored, self.wanted.key)
        if built.reframed:
            self._copy_file.publish(self.wanted.key)
        self._index_file.publish(self.wanted.key)

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

    def add(self, blob: LayerBlob) -> Wanted:
        """Open a layer's blob and put it on the list. Raises what makes it unusable."""
        stored = blob.open_stored() if self._tolerant and not isinstance(blob.problem, NotFoundError) else blob.open()
        try:
            # Under examination a blob that is not what its digest says was indexed as what it is.
            known = remembered(self._store, stored) if self._tolerant else None
            if known is not None:
                key = known
            elif self._tolerant and blob.digest is None and blob.diff_id is None:
                key = f"unnamed-{file_identity(stored) or hashlib.sha256(stored.name.encode()).hexdigest()}"
            else:
                key = layer_key(blob, stored)
        except BaseException:
            stored.close()
            raise
        self.wanted.append(Wanted(blob, stored, key, tolerant=self._tolerant))
        return self.wanted[-1]

    def finish(self) -> None:
        """Load or build every index wanted."""
        while missing := [one for one in self.wanted if one.index is None and not one.load(self._store)]:
            with ExitStack() as locks:
                mine: list[tuple[Wanted, BuildLock]] = []
                for one in missing:
                    lock = self._store.try_lock(Kind.LAYER, one.key)
                    if lock is None:
                        continue
                    locks.enter_context(lock)
                    if one.load(self._store):  # another process finished it just before we got the lock
                        lock.release()
                    else:
                        mine.append((one, lock))
                if mine:
                    self._build(mine)
                    continue
            theirs = next((one for one in missing if one.index is None), None)
            if theirs is not None:
                self._progress.waiting(f"layer {theirs.blob.number}")
                with self._store.lock(Kind.LAYER, theirs.key):
                    pass  # whoever had it is done; look again

    def _build(self, mine: list[tuple[Wanted, BuildLock]]) -> None:
        """Build as many at once as there are CPUs, the largest first: it is what the others can hide behind.

        Decompressing one layer with two threads takes more CPU than two layers with one each. So threads are shared out
        by size: only a layer that takes longer than all the others together has something to gain from a second one.
        """
        cpus = len(os.sched_getaffinity(0))
        total = max(1, sum(one.stored.size for one, _ in mine))
        queue = sorted(mine, key=lambda one: one[0].stored.size)
        running: list[_Job] = []
        try:
            while queue or running:
                while queue and len(running) < cpus:
                    one, lock = queue.pop()
                    running.append(self._start(one, lock, threads=max(1, round(cpus * one.stored.size / total))))
                self._step(running)
        finally:
            for job in running:
                self._end(job)

    def _start(self, wanted: Wanted, lock: BuildLock, threads: int) -> _Job:
        job = _Job(wanted, lock, self._store, tolerant=self._tolerant, archive=False, threads=threads)
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

    key: str


def file_identity(stored: Blob) -> str | None:
    """A key for a file as it is now, without reading it: device, inode, size, mtime and ctime, and where in it we are.

    None for bytes that lie in no file: a name and a size do not tell the member of one compressed archive from that of
    the next at the same path.
    """
    place = stored.file_range()
    if place is None:
        return None
    fd, offset, size = place
    status = os.fstat(fd)
    what = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, offset, size)
    return hashlib.sha256(repr(what).encode()).hexdigest()


def remembered(store: Store, stored: Blob) -> str | None:
    """Give the key under which this very file was indexed before, if it was."""
    identity = file_identity(stored)
    file = store.open_entry(Kind.ARCHIVE, identity) if identity is not None else None
    if file is None:
        return None
    with file:
        try:
            return msgspec.json.decode(file.read_at(0, 4096), type=_Remembered).key
        except msgspec.MsgspecError:
            return None


def remember(store: Store, stored: Blob, key: str) -> None:
    """Note the key under which this file, as it is now, was indexed."""
    identity = file_identity(stored)
    if identity is None:
        return
    with store.new(Kind.ARCHIVE) as new:
        new.file.write(msgspec.json.encode(_Remembered(key)))
        new.publish(identity)
