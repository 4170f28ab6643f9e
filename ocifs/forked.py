"""Runs work in forked child processes, so that its memory and its death are not the caller's.

Merging a million entries takes hundreds of megabytes that an allocator rarely gives back, and the process that merges is
the one that then serves the mount for months. A child takes them with it. `start` is the primitive: a child with a pipe
to its parent, that dies with it, and whose signals are its own; `Failed` is how its errors come through the pipe.
`run_forked` is all that work without progress reports needs.

Fork, not spawn: what the child works on are open descriptors, and starting Python again costs as much as indexing a small
layer. It is safe only while the caller has no other threads, which could hold a lock at that moment.

Not here: progress reports and second attempts (`ocifs.layer_index.child`).
"""

from __future__ import annotations

import faulthandler
import os
import select
import signal
import traceback
from collections.abc import Callable
from typing import NamedTuple, Never

import msgspec

from ocifs import errors
from ocifs.errors import MachineError, OcifsError

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_WAKE_MS = 250


class Failed(msgspec.Struct, frozen=True, tag=True):
    """An exception on its way through a pipe. Made by `of`, turned back by `error`."""

    kind: str
    """Name of the class in `ocifs.errors`; empty for a bug, whose traceback is then the message."""
    message: bytes
    """Not text: a message may name a path with bytes that no text has."""

    @classmethod
    def of(cls, error: BaseException) -> Failed:
        """Pack the exception that is being handled."""
        if isinstance(error, OcifsError):
            # A room's own class comes out as the general one it stands for: same exit status, same errno.
            known = (base.__name__ for base in type(error).__mro__ if getattr(errors, base.__name__, None) is base)
            return cls(next(known), _encoded(str(error)))
        if isinstance(error, MemoryError):
            return cls(MachineError.__name__, b"there is not enough memory")
        return cls("", _encoded(traceback.format_exc()))

    def error(self, doing: str) -> Exception:
        """Give what to raise: the same error, or RuntimeError with the child's traceback. ``doing`` as in `start`."""
        said = os.fsdecode(self.message)
        if not self.kind:
            return RuntimeError(f"the process that {doing} failed:\n{said}")
        kind = getattr(errors, self.kind, None)
        return kind(said) if isinstance(kind, type) and issubclass(kind, OcifsError) else MachineError(said)


def _encoded(text: str) -> bytes:
    try:
        return os.fsencode(text)
    except UnicodeEncodeError:
        return text.encode(errors="backslashreplace")


class Child(NamedTuple):
    """A running child and the end of the pipe that it writes to the other end of; both are the starter's to end."""

    pid: int
    pipe: int

    def reap(self, *, kill: bool = False) -> int:
        """Close the pipe and wait for the child's end, killing it first if asked to; gives its wait status."""
        os.close(self.pipe)
        if kill:
            os.kill(self.pid, signal.SIGKILL)  # it is there until it is waited for
        return os.waitpid(self.pid, 0)[1]


def start(main: Callable[[int], None], doing: str) -> Child:
    """Fork a child that calls ``main`` with the writing end of a pipe, then exits: with status 0, or 1 if it raised.

    ``doing`` completes "the process that …" for messages. The child dies with its parent, ignores ^C (a terminal sends
    it to all; the parent decides what it means), and takes other signals as if it had no handlers. Raises
    `MachineError` if there can be no more processes or files.
    """
    # An interrupt between fork and return would leave a child that nobody knows of.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    child: Child | None = None
    try:
        child = _fork(main, doing, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)  # raises here what came meanwhile
    except BaseException:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if child is not None:
            child.reap(kill=True)
        raise
    return child


def _fork(main: Callable[[int], None], doing: str, mask: set[signal.Signals | int]) -> Child:
    reader = writer = -1
    parent = os.getpid()
    try:
        reader, writer = os.pipe2(os.O_CLOEXEC)
        pid = os.fork()
    except OSError as error:
        for fd in (reader, writer):
            if fd >= 0:
                os.close(fd)
        message = f"the process that {doing} cannot be started: {error.strerror}"
        raise MachineError(message) from None
    if pid == 0:
        _live(main, writer, parent, mask)
    os.close(writer)
    return Child(pid, reader)


def ends_with(parent: int, number: signal.Signals) -> bool:
    """Have the system send this process a signal when the parent that forked it dies; says whether it still lives."""
    import ctypes  # noqa: PLC0415 (1.5 ms, for the few commands that have something to build)

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
    return os.getppid() == parent  # else it died before the line above


def _live(main: Callable[[int], None], pipe: int, parent: int, mask: set[signal.Signals | int]) -> Never:
    status = 1
    try:
        if ends_with(parent, signal.SIGKILL):
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGALRM, signal.SIGUSR1, signal.SIGUSR2):
                signal.signal(number, signal.SIG_DFL)
            signal.set_wakeup_fd(-1)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            faulthandler.disable()  # whose descriptor is the parent's, too
            main(pipe)
            status = 0
    finally:
        # Not sys.exit: what is above on the stack, in buffers and in atexit is the parent's.
        os._exit(status)


def died(status: int, doing: str) -> MachineError:
    """Say how a child ended that did not say so itself. ``status`` is what `Child.reap` gave."""
    if not os.WIFSIGNALED(status):
        return MachineError(f"the process that {doing} ended with status {os.waitstatus_to_exitcode(status)}")
    number = os.WTERMSIG(status)
    how = f"signal {number} ({signal.strsignal(number)})"
    if number == signal.SIGKILL:
        how += ", perhaps because memory ran out; free some and try again"
    return MachineError(f"the process that {doing} was ended by {how}")


def _read_all(pipe: int) -> bytes:
    """Read until the writer is gone."""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    told = bytearray()
    while True:
        # A signal that comes just before the system call would be seen only after it; so no call lasts.
        if poll.poll(_WAKE_MS):
            data = os.read(pipe, 1 << 16)
            if not data:
                return bytes(told)
            told += data


def run_forked(work: Callable[[], None], doing: str) -> None:
    """Call ``work`` in a child and wait for it; what it writes to open files stays, nothing else does.

    ``doing`` completes "the process that …" for the message if it dies. Raises the `OcifsError` that ``work`` raised,
    `MachineError` if it ran out of memory or was killed, RuntimeError with its traceback for anything else.
    """

    def main(pipe: int) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 (a bug, or a signal's exception: the parent gets to see it)
            with os.fdopen(pipe, "wb") as told:
                told.write(msgspec.msgpack.encode(Failed.of(error)))

    child = start(main, doing)
    try:
        told = _read_all(child.pipe)
    except BaseException:
        child.reap(kill=True)
        raise
    status = child.reap()
    if status != 0:
        raise died(status, doing)
    if told:
        raise msgspec.msgpack.decode(told, type=Failed).error(doing)
