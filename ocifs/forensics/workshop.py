"""A process that makes the trees and reports of an examined mount when somebody asks for them.

The daemon of a mount has threads, and a fork of such a process may wait for ever for a lock that a thread held. Merging
needs forks, though: for memory that comes back, and for a death that is not the daemon's. So one process is forked while the
daemon has no thread yet, and waits. It has the image's blobs and indexes open, hence makes everything from the very
files that are mounted, whatever became of their names, and starts at once. What it makes goes into the store (trees,
the history) or into a file without a name (reports). It ends with the daemon.

The protocol: one packet for a request, a MessagePack `Wanted`; one packet for its answer, `Made` or
`ocifs.forked.Failed`, with the descriptor of a report's file. One request at a time.

Concurrency: `Workshop.make` blocks and belongs in a thread; only one may be in it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, BinaryIO, Final, NamedTuple, Self

import msgspec

from ocifs.errors import MachineError
from ocifs.forensics.examination import Examination
from ocifs.forensics.views import open_view
from ocifs.forked import Child, Failed, run_forked, start
from ocifs.history import open_history
from ocifs.image import ImageOptions, merged_tree
from ocifs.spans import SpanCache
from ocifs.store import Store

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ocifs.image import Image
    from ocifs.image_tree import ImageTree
    from ocifs.store import StoredFile

_DOING: Final = "makes what an examined mount shows"
_PACKET: Final = 1 << 16
"""Bytes of the longest packet; a bug's traceback is cut."""
_SHOWN: Final = 32 << 10


Report = Callable[["Image", Examination, BinaryIO], None]
"""Writes a report of an image into a file. Called in a process of its own."""


class Wanted(msgspec.Struct, frozen=True):
    """What is to be made.

    Trees: ``layer``, ``upto`` or ``slack`` of a layer, ``deleted``, ``history``. ``versions``: the history itself.
    ``report``: the one of this name.
    """

    what: str
    layer: int = 0
    name: str = ""


class Made(msgspec.Struct, frozen=True, tag=True):
    """It is there: under ``key`` of the store; a report in the file that came along, and the key is empty."""

    key: str


class Answer(NamedTuple):
    """What `Workshop.make` gives: a key of the store, or for a report a descriptor, which is the caller's to close."""

    key: str
    fd: int


class Workshop:
    """The process, as the daemon sees it. A context manager: at the end of the block the process is gone."""

    def __init__(
        self,
        image: Image,
        cache: Path,
        options: ImageOptions,
        reports: Mapping[str, Report],
        let_go: Callable[[], None] | None = None,
    ) -> None:
        """Fork it, so the caller has no second thread. ``let_go`` is called there first, to close what is the daemon's.

        ``cache`` is the directory of the store, ``options`` those that the image was opened with; ``reports`` are what
        can be asked for, by name.
        """
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

        def main(pipe: int) -> None:
            os.close(pipe)
            self._socket.close()
            if let_go is not None:
                let_go()
            null = os.open(os.devnull, os.O_RDWR)  # whoever reads the daemon's output waits for the end of it
            for stream in range(3):
                os.dup2(null, stream)
            with Store(cache) as store:
                _Bench(image, store, options, reports).serve(theirs)

        try:
            self._child: Child = start(main, _DOING)
        except BaseException:
            self._socket.close()
            raise
        finally:
            theirs.close()

    def make(self, wanted: Wanted) -> Answer:
        """Have something made; blocks until it is. Raises what went wrong, `MachineError` if the process is gone."""
        try:
            self._socket.sendall(msgspec.msgpack.encode(wanted))
            data, fds, _, _ = socket.recv_fds(self._socket, _PACKET, 1)
        except OSError:
            data, fds = b"", []
        if not data:
            raise MachineError(f"the process that {_DOING} is gone; mount the image again")
        answer = msgspec.msgpack.decode(data, type=Made | Failed)
        if isinstance(answer, Failed):
            raise answer.error(_DOING)
        return Answer(answer.key, fds[0] if fds else -1)

    def close(self) -> None:
        """End the process, whatever it is doing. Harmless when repeated."""
        if self._socket.fileno() >= 0:
            self._socket.close()
            self._child.reap(kill=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Bench:
    """The other side: makes one thing after the other."""

    def __init__(self, image: Image, store: Store, options: ImageOptions, reports: Mapping[str, Report]) -> None:
        # The log is the daemon's, which says what it had made.
        self._image = msgspec.structs.replace(image, evidence=None)
        self._store = store
        self._reports = reports
        self._options = msgspec.structs.replace(options, examine=True, layer=None)

    def serve(self, asked: socket.socket) -> None:
        """Answer until the daemon is gone."""
        while request := asked.recv(_PACKET):
            fd = -1
            try:
                key, fd = self._make(msgspec.msgpack.decode(request, type=Wanted))
                answer: Made | Failed = Made(key)
            except Exception as error:  # noqa: BLE001 (the daemon gets to see it)
                failed = Failed.of(error)
                answer = msgspec.structs.replace(failed, message=failed.message[-_SHOWN:])
            with contextlib.suppress(BrokenPipeError):
                socket.send_fds(asked, [msgspec.msgpack.encode(answer)], [fd] if fd >= 0 else [])
            if fd >= 0:
                os.close(fd)

    def _make(self, wanted: Wanted) -> Answer:
        layers = self._image.layers
        if wanted.what == "versions":
            return Answer(self._examination.history.key, -1)
        if wanted.what == "report":
            return Answer("", self._report(wanted.name))
        if wanted.what == "layer":
            alone = msgspec.structs.replace(self._options, layer=wanted.layer)
            only = tuple(layer for layer in layers if layer.number == wanted.layer)
            opened = merged_tree(only, self._store, alone)
        elif wanted.what == "upto":
            lower = tuple(layer for layer in layers if layer.number <= wanted.layer)
            opened = merged_tree(lower, self._store, self._options)
        else:
            opened = open_view(
                self._examination,
                wanted.what,
                self._store,
                layer=wanted.layer,
                all_xattrs=self._options.all_xattrs,
            )
        self._store.keep_bounded()
        return Answer(_closed(opened), -1)

    @cached_property
    def _examination(self) -> Examination:
        follow = self._options.follow_dirlinks
        history = open_history(self._image.layers, self._store, follow_dirlinks=follow)
        return Examination(self._image.resolved, self._image.layers, history, SpanCache())

    def _report(self, name: str) -> int:
        """Write a report into a file without a name; gives its descriptor."""
        examination, write = self._examination, self._reports[name]
        try:
            with tempfile.TemporaryFile(dir=self._store.path) as file:
                run_forked(lambda: _write(write, self._image, examination, file), f"writes the report {name}")
                return os.dup(file.fileno())
        except OSError as error:
            message = f"cannot write a report into the cache directory {self._store.path}: {error.strerror}"
            raise MachineError(message) from error


def _write(write: Report, image: Image, examination: Examination, file: BinaryIO) -> None:
    try:
        write(image, examination, file)
        file.flush()
    except OSError as error:
        raise MachineError(f"cannot write a report into the cache directory: {error.strerror}") from error


def _closed(opened: tuple[ImageTree, StoredFile]) -> str:
    """Close a tree that was made; gives its key."""
    tree, file = opened
    tree.close()
    file.close()
    return os.path.basename(file.name)
