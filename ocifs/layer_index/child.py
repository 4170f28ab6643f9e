"""Builds layer indexes, each in a child process of its own.

A pass over hostile data may need much memory, and the C++ it stands on may abort; neither must happen to whoever wants
the index, who may be serving mounts. So the pass (`ocifs.layer_index.passes`) runs in a forked child that inherits the
open blob and files and tells through a pipe how far it is, and in the end what came out. The child dies with its
parent. A child that dies by itself, takes too much memory or gets nowhere is started again without rapidgzip, the only
part that could be the cause; if that dies too, it is an error with a plain message.

Fork, not spawn: the blob and the files are open descriptors, and starting Python again costs as much as indexing a
small layer. It is safe because the caller has no other threads that could hold a lock at that moment.

Not here: what a pass does, where its files go.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import faulthandler
import os
import resource
import select
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO, Final, Never, Self

import msgspec

from ocifs import errors
from ocifs.errors import MachineError, OcifsError
from ocifs.layer_index.job import Built, Expected, Job, StoredBytes

__all__ = ["Build", "Built", "Expected", "StoredBytes", "build", "wait_any"]

_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
_REPORT_EVERY: Final = 1 << 22
"""Bytes of progress between two reports through the pipe: 4 MiB, a hundred reports a second at most."""

MEMORY_LIMIT: Final = 1 << 30
"""Bytes of memory that a pass with rapidgzip may have resident before it is given up for one without.

It takes 0.3 GiB on ordinary layers and below 1 GiB on one that inflates a thousandfold (its chunks are cut off at 20
times their size, and a handful of them are under way). A limit on allocations (RLIMIT_DATA, RLIMIT_AS) does not work:
its allocator reserves ten times what it uses, and dies when refused.
"""
MAX_THREADS: Final = 4
"""rapidgzip's threads by default, at most. Its memory grows with them, and hashing in one thread keeps pace with three."""
_TOO_LARGE: Final = 75
"""Exit status of a child that exceeded `MEMORY_LIMIT`; any that nothing else uses."""
_WATCH_INTERVAL: Final = 0.05


class _Progress(msgspec.Struct, tag=True):
    stored: int


class _Failed(msgspec.Struct, tag=True):
    kind: str
    """The name of the `OcifsError` class; empty for what must not happen."""
    message: str


class _Finished(msgspec.Struct, tag=True):
    built: Built


_Message = _Progress | _Failed | _Finished


def build(
    blob: StoredBytes,
    *,
    out: BinaryIO,
    expected: Expected | None = None,
    reframed: BinaryIO | None = None,
    progress: Callable[[int], None] | None = None,
    tolerant: bool = False,
    archive: bool = False,
    threads: int = 0,
) -> Built:
    """Index ``blob`` into the file ``out``; returns when it is done.

    ``expected`` is checked in the order size, digest, diff ID (rule C4). ``reframed`` is an empty file for the re-framed
    copy of a blob that has no restart points; `Built.reframed` says whether it was needed. Both files need descriptors,
    and hold rubbish after an error. ``progress`` is told how many stored bytes are done. With ``tolerant`` (examination)
    what does not match is noted in the index instead of raised, and data that breaks off is indexed up to there. With
    ``archive`` the blob is an outer archive, which may also be compressed with xz or bzip2. ``threads`` is how many
    rapidgzip uses; 0: one per CPU, up to `MAX_THREADS`.

    Raises `DamagedError` for a blob that is not what was expected or does not decode, `UnsupportedError` for one that is
    no layer, `MachineError` if the disk is full or the pass was killed.
    """
    one = Build(
        blob, out=out, expected=expected, reframed=reframed, tolerant=tolerant, archive=archive, threads=threads
    )
    with one:
        while not one.step():
            if progress is not None:
                progress(one.stored)
        built = one.result()
        if progress is not None:
            progress(one.stored)
        return built


def wait_any(builds: Iterable[Build]) -> Iterator[Build]:
    """Give each build as it finishes, in the order they do; for several layers at once. Call `Build.result` on each.

    Between two of them all builds make progress; ``stored`` says how much.
    """
    waiting = {one.fileno(): one for one in builds}
    while waiting:
        poll = select.poll()
        for fd in waiting:
            poll.register(fd, select.POLLIN)
        for fd, _event in poll.poll():
            one = waiting.pop(fd)
            if one.step():
                yield one
            else:
                waiting[one.fileno()] = one  # a second attempt has another pipe


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
        archive: bool = False,
        threads: int = 0,
    ) -> None:
        """Start the child process."""
        threads = threads or min(MAX_THREADS, len(os.sched_getaffinity(0)))
        self._job = Job(blob, expected or Expected(), out, reframed, tolerant, archive, threads)
        self._certain = False
        self._outcome: _Failed | _Finished | None = None
        self._pid = self._pipe = -1
        self.stored = 0
        """Stored bytes done so far."""
        self._start()

    def _start(self) -> None:
        self._received = bytearray()
        try:
            reader, writer = os.pipe2(os.O_CLOEXEC)
            parent = os.getpid()
            pid = os.fork()
        except OSError as error:
            raise MachineError(f"cannot start a process to index {self._job.blob.name}: {error.strerror}") from None
        if pid == 0:
            _child(self._job, writer, parent, certain=self._certain)
        os.close(writer)
        self._pid, self._pipe = pid, reader

    def fileno(self) -> int:
        """Give the descriptor that is readable when `step` has something to do."""
        return self._pipe

    def step(self) -> bool:
        """Wait for news of the child; True when the build is over."""
        if self._outcome is not None:
            return True
        data = os.read(self._pipe, 1 << 16)
        self._received += data
        while self._outcome is None and (message := self._next_message()) is not None:
            if isinstance(message, _Progress):
                self.stored = max(self.stored, message.stored)
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

    def _died(self) -> _Failed | None:
        """Say how the child ended without a word, or start it again."""
        status = self._reap()
        name = self._job.blob.name
        killed = os.WIFSIGNALED(status)
        number = os.WTERMSIG(status) if killed else 0
        crashed = killed and number not in {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
        if not self._certain and (crashed or os.waitstatus_to_exitcode(status) == _TOO_LARGE):
            self._certain = True
            self._start()
            return None
        if killed:
            how = f"was ended by signal {number} ({signal.strsignal(number)})"
            if number == signal.SIGKILL:
                how += ", perhaps because memory ran out; free some and try again"
        else:
            how = f"ended with status {os.waitstatus_to_exitcode(status)}"
        return _Failed("MachineError", f"the process that indexes {name} {how}")

    def result(self) -> Built:
        """Give what was built, once `step` said that it is over, or raise what went wrong."""
        match self._outcome:
            case _Finished(built):
                self.stored = built.stored_size
                return built
            case _Failed(kind, message) if kind:
                error_class = getattr(errors, kind)
                raise error_class(message)
            case _Failed(_, message):
                raise RuntimeError(f"the index pass of {self._job.blob.name} failed:\n{message}")
            case None:
                raise RuntimeError("the build is not over")

    def _reap(self) -> int:
        os.close(self._pipe)
        _pid, status = os.waitpid(self._pid, 0)
        self._pid = self._pipe = -1
        return status

    def close(self) -> None:
        """Kill the child if it still runs. Harmless when repeated."""
        if self._pid >= 0:
            if self._outcome is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._pid, signal.SIGKILL)
            self._reap()

    def __enter__(self) -> Self:
        """Nothing to do: the child runs already."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close."""
        self.close()


# --- the child ----------------------------------------------------------------------------------------------------------


def _child(job: Job, pipe: int, parent: int, *, certain: bool) -> Never:
    """Do the work in the forked process; never returns, for what is above on the stack is the parent's."""
    status = 1
    try:
        _live_alone(parent)
        if not certain:
            threading.Thread(target=_watch_memory, daemon=True).start()
        _send(pipe, _work(job, pipe, certain=certain))
        status = 0
    finally:
        # Not sys.exit: atexit handlers, buffered output and open files are the parent's to handle.
        os._exit(status)


def _live_alone(parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's ^C goes to all; the parent decides what it means
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGALRM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    faulthandler.disable()  # whose descriptor is the parent's, too
    # rapidgzip explains itself on standard error, which is the user's.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)


def _watch_memory() -> None:
    page = resource.getpagesize()
    while True:
        time.sleep(_WATCH_INTERVAL)
        with open("/proc/self/statm", "rb") as file:
            resident = int(file.read().split()[1]) * page
        if resident > MEMORY_LIMIT:
            os._exit(_TOO_LARGE)


def _work(job: Job, pipe: int, *, certain: bool) -> _Failed | _Finished:
    from ocifs.layer_index.passes import disk_problem, run  # noqa: PLC0415 (loaded before the fork: `Build`)

    reported = 0

    def progress(stored: int) -> None:
        nonlocal reported
        if stored >= reported + _REPORT_EVERY:
            reported = stored
            _send(pipe, _Progress(stored))

    try:
        return _Finished(run(job, progress, certain=certain))
    except OcifsError as error:
        return _Failed(type(error).__name__, str(error))
    except OSError as error:
        problem = disk_problem(error, job.blob.name)
        return _Failed(type(problem).__name__, str(problem))
    except MemoryError:
        return _Failed("MachineError", f"indexing {job.blob.name} needs more memory than there is")
    except BaseException:  # noqa: BLE001 - a bug: it goes to the parent, which raises it
        return _Failed("", traceback.format_exc())


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
