"""Runs a function in a forked child process, so that its memory and its death are not the caller's.

Merging a million entries takes hundreds of megabytes that an allocator rarely gives back, and the process that merges is
the one that then serves the mount for months. A child takes them with it.

Fork is safe only while the caller has no other threads. Not here: progress reports and second attempts
(`ocifs.layer_index.build` has its own child for those).
"""

from __future__ import annotations

import ctypes
import os
import signal
import traceback
from collections.abc import Callable

import msgspec

from ocifs import errors
from ocifs.errors import MachineError, OcifsError

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class _Failed(msgspec.Struct):
    kind: str
    """Name of the class in `ocifs.errors`; empty for a bug, whose traceback is then the message."""
    message: bytes
    """Not text: a message may name a path with bytes that no text has."""


def run_forked(work: Callable[[], None], doing: str) -> None:
    """Call ``work`` in a child and wait for it; what it writes to open files stays, nothing else does.

    ``doing`` completes "the process that …" for the message if it dies. Raises the `OcifsError` that ``work`` raised,
    `MachineError` if it ran out of memory or was killed, RuntimeError with its traceback for anything else.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() == parent:  # else it died before the line above
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C goes to all of a terminal; the parent decides
                status = _work(work, writer)
        finally:
            # Not sys.exit: what is above on the stack, in buffers and in atexit is the parent's.
            os._exit(status)
    os.close(writer)
    try:
        with os.fdopen(reader, "rb") as pipe:
            told = pipe.read()
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    _, how = os.waitpid(pid, 0)
    if how == 0:
        return
    if told:
        failed = msgspec.msgpack.decode(told, type=_Failed)
        said = os.fsdecode(failed.message)
        if not failed.kind:
            message = f"the process that {doing} failed:\n{said}"
            raise RuntimeError(message)
        error_class: type[OcifsError] = getattr(errors, failed.kind)
        raise error_class(said)
    if os.WIFSIGNALED(how):
        number = os.WTERMSIG(how)
        how_named = f"signal {number} ({signal.strsignal(number)})"
        message = f"the process that {doing} was ended by {how_named}; perhaps memory ran out"
        raise MachineError(message)
    message = f"the process that {doing} ended with status {os.waitstatus_to_exitcode(how)}"
    raise MachineError(message)


def _work(work: Callable[[], None], pipe: int) -> int:
    try:
        work()
    except OcifsError as error:
        # A room's own class comes out as the general one it stands for: same exit status, same errno.
        kind = next(base.__name__ for base in type(error).__mro__ if getattr(errors, base.__name__, None) is base)
        failed = _Failed(kind, _encoded(str(error)))
    except MemoryError:
        failed = _Failed("MachineError", b"there is not enough memory")
    except BaseException:  # noqa: BLE001 (a bug, or a signal's exception: the parent gets to see it)
        failed = _Failed("", _encoded(traceback.format_exc()))
    else:
        return 0
    with os.fdopen(pipe, "wb") as told:
        told.write(msgspec.msgpack.encode(failed))
    return 1


def _encoded(text: str) -> bytes:
    try:
        return os.fsencode(text)
    except UnicodeEncodeError:
        return text.encode(errors="backslashreplace")
