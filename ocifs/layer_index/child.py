"""Builds layer indexes, each in a child process of its own.

A pass takes one and a half cores, and the C it stands on may crash over hostile data; neither must happen to whoever
wants the index, who may be serving mounts. So the pass (`ocifs.layer_index.passes`) runs in a forked child that inherits the
open blob and files and tells through a pipe how far it is, and in the end what came out. The child dies with its
parent. A child that crashes is started again to go the slow way, which decompresses gzip with the
standard library's zlib; if that crashes too, it is an error with a plain message.

Not here: what a pass does, where its files go, how a child is started and what becomes of its errors (`ocifs.forked`).
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from typing import BinaryIO, Final, Self

import msgspec

from ocifs.errors import MachineError
from ocifs.forked import Child, Failed, died, start
from ocifs.layer_index.job import Built, Content, Expected, Job, StoredBytes

__all__ = ["Build", "Built", "Content", "Expected", "StoredBytes", "build"]

_REPORT_EVERY: Final = 1 << 22
"""Bytes of progress between two reports through the pipe: 4 MiB, a hundred reports a second at most."""

_SWITCH_INTERVAL: Final = 50e-6
"""Seconds (`sys.setswitchinterval`): a thread that decompresses 32 bytes a call must not wait 5 ms for each."""


class _Progress(msgspec.Struct, tag=True):
    stored: int


class _Finished(msgspec.Struct, tag=True):
    built: Built


_Message = _Progress | Failed | _Finished


def build(
    blob: StoredBytes,
    *,
    out: BinaryIO,
    expected: Expected | None = None,
    reframed: BinaryIO | None = None,
    progress: Callable[[int], None] | None = None,
    tolerant: bool = False,
    content: Content = Content.LAYER,
) -> Built:
    """Index ``blob`` into the file ``out``; returns when it is done.

    ``expected`` is checked in the order size, digest, diff ID (rule C4). ``reframed`` is an empty file for the re-framed
    copy of a blob that has no restart points; `Built.reframed` says whether it was needed. Both files need descriptors,
    and hold rubbish after an error. ``progress`` is told how many stored bytes are done, 0 again if the blob has to be read
    again from its beginning. With ``tolerant`` (examination) what does not match is noted in the index instead of raised,
    and data that breaks off is indexed up to there. ``content`` says what the blob is taken for.
    Raises `DamagedError` for a blob that is not what was expected or does not decode, `UnsupportedError` for one that is
    no layer, `MachineError` if the disk is full or the pass was killed.
    """
    one = Build(blob, out=out, expected=expected, reframed=reframed, tolerant=tolerant, content=content)
    with one:
        while not one.step():
            if progress is not None:
                progress(one.stored)
        built = one.result()
        if progress is not None:
            progress(one.stored)
        return built


class Build:
    """One running build. Arguments as `build`. Leaving the context kills what still runs."""

    def __init__(
        self,
        blob: StoredBytes,
        *,
        out: BinaryIO,
        expected: Expected | None = None,
        reframed: BinaryIO | None = None,
        tolerant: bool = False,
        content: Content = Content.LAYER,
    ) -> None:
        """Start the child process."""
        from ocifs.layer_index import passes  # noqa: F401, PLC0415 (before the fork, so that not every child has to)

        self._job = Job(blob, expected or Expected(), out, reframed, tolerant, content)
        self._doing = f"indexes {blob.name}"
        self._certain = False
        self._outcome: Failed | _Finished | None = None
        self.stored = 0
        """Stored bytes done so far; begins at 0 again when the blob has to be read again."""
        self._child: Child | None = self._start()

    def _start(self) -> Child:
        self._received = bytearray()
        job, certain = self._job, self._certain
        return start(lambda pipe: _main(job, pipe, certain=certain), self._doing)

    def fileno(self) -> int:
        """Give the descriptor that is readable when `step` has something to do."""
        return -1 if self._child is None else self._child.pipe

    def step(self) -> bool:
        """Wait for news of the child; True when the build is over."""
        if self._outcome is not None:
            return True
        data = os.read(self.fileno(), 1 << 16)
        self._received += data
        while self._outcome is None and (message := self._next_message()) is not None:
            if isinstance(message, _Progress):
                self.stored = message.stored
            else:
                self._outcome = message
        if self._outcome is None and not data:
            self._outcome = self._died()
        return self._outcome is not None

    def _next_message(self) -> _Message | None:
        size = int.from_bytes(self._received[:4], "little")
        if len(self._received) < 4 + size or not size:
            return None
        message: _Message = msgspec.msgpack.decode(self._received[4 : 4 + size], type=_Message)
        del self._received[: 4 + size]
        return message

    def _died(self) -> Failed | None:
        """Say how the child ended without a word, or start it again."""
        status = self._reap()
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        crashed = number not in {0, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
        if crashed and not self._certain:
            self._certain = True
            self.stored = 0
            self._child = self._start()
            return None
        return Failed.of(died(status, self._doing))

    def result(self) -> Built:
        """Give what was built, once `step` said that it is over, or raise what went wrong."""
        match self._outcome:
            case _Finished(built):
                self.stored = built.stored_size
                return built
            case Failed() as failed:
                raise failed.error(self._doing)
            case None:
                raise RuntimeError("the build is not over")

    def _reap(self, *, kill: bool = False) -> int:
        child, self._child = self._child, None
        return 0 if child is None else child.reap(kill=kill)

    def close(self) -> None:
        """Kill the child if it still runs. Harmless when repeated."""
        self._reap(kill=self._outcome is None)

    def __enter__(self) -> Self:
        """Nothing to do: the child runs already."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close."""
        self.close()


# --- the child ----------------------------------------------------------------------------------------------------------


def _main(job: Job, pipe: int, *, certain: bool) -> None:
    """Do the work in the forked process."""
    sys.setswitchinterval(_SWITCH_INTERVAL)
    _send(pipe, _work(job, pipe, certain=certain))


def _work(job: Job, pipe: int, *, certain: bool) -> Failed | _Finished:
    from ocifs.layer_index.passes import disk_problem, run  # noqa: PLC0415 (who only loads indexes needs none of it)

    reported = 0

    def progress(stored: int) -> None:
        nonlocal reported
        if not stored or stored >= reported + _REPORT_EVERY:
            reported = stored
            _send(pipe, _Progress(stored))

    try:
        return _Finished(run(job, progress, certain=certain))
    except OSError as error:
        return Failed.of(disk_problem(error, job.blob.name))
    except MemoryError:
        return Failed.of(MachineError(f"indexing {job.blob.name} needs more memory than there is"))
    except BaseException as error:  # noqa: BLE001 - a bug, too: it goes to the parent, which raises it
        return Failed.of(error)


def _send(pipe: int, message: _Message) -> None:
    body = msgspec.msgpack.encode(message)
    view = memoryview(len(body).to_bytes(4, "little") + body)
    while view:
        try:
            view = view[os.write(pipe, view) :]
        except OSError as error:
            if error.errno == errno.EPIPE:
                os._exit(1)  # nobody waits for this any more
            raise
