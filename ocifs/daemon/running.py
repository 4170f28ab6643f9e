"""Serving a mount, in this process or in a daemon of its own.

The daemon tells who waits for it when the mount answers: one line through a socket, ``ready``, or the sentence that says
why not. It goes on only when it has been told that this was heard, so that there is no mount that nobody knows of, whenever
its starter was ended. In the foreground there is no fork and no wait; a service manager is told there
(`ocifs.daemon.notify`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NoReturn

import msgspec

from ocifs.daemon import notify
from ocifs.daemon.logs import log_to_background, log_to_standard_error
from ocifs.daemon.mountpoints import unmounted
from ocifs.daemon.records import Claim, Record, told_plainly
from ocifs.daemon.statistics import listening
from ocifs.driver import Keeper
from ocifs.errors import MachineError, OcifsError
from ocifs.mountinfo import mounted_at

_log = logging.getLogger(__name__)

Serve = Callable[[Keeper], None]
"""What a driver does: serve until the mount ends, telling the keeper what comes about."""


def private_place(claim: Claim) -> Path:
    """An empty directory beside the record, for the files that EROFS is mounted from; gone when the claim is released."""
    try:
        claim.private.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise told_plainly(claim.private, error) from error
    if mounted_at(claim.private) is not None:  # left by a daemon of the same pid, killed at just that moment
        unmounted(claim.private, lazy=True)
    return claim.private


class _Kept:
    """The record of a mount that this process serves, written anew with all that comes about."""

    def __init__(self, record: Record, claim: Claim, announce: Callable[[], None]) -> None:
        self._record = msgspec.structs.replace(record, pid=os.getpid())
        self._claim = claim
        self._announce = announce
        claim.write(self._record)

    def served(self, serve: Serve, asking: socket.socket) -> Record:
        """Serve, and give the record as it was at the end."""
        serve(Keeper(self._attached, self._ready, asking))
        return self._record

    def _attached(self, device: int) -> None:
        self._record = msgspec.structs.replace(self._record, device=device)
        self._claim.write(self._record)

    def _ready(self) -> None:
        self._record = msgspec.structs.replace(self._record, ready=True)
        self._claim.write(self._record)
        self._announce()


def run_foreground(serve: Serve, record: Record, claim: Claim) -> Record:
    """Serve in this process until the mount ends; give its record as it was then."""

    def announce() -> None:
        what = f"{record.reference} is mounted on {record.mountpoint}"
        _log.info("%s", what)
        notify.tell("READY=1", f"STATUS={what}")

    try:
        log_to_standard_error()
        with listening(claim.socket) as asking:
            return _Kept(record, claim, announce).served(serve, asking)
    finally:
        claim.release()


def run_background(serve: Serve, record: Record, claim: Claim) -> Record:
    """Start a daemon that serves; give its record when the mount answers, or raise what the daemon says went wrong.

    From then on the claim is the daemon's. Whatever ends the wait, a signal or an interrupt too, ends the daemon: there is
    a mount if this returns, and none if it raises.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        child, ours = _started(serve, record, claim, before)
    except BaseException:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        raise
    try:
        with ours, _dismissing(ours), ours.makefile("rb") as told:
            # What has come meanwhile is raised here, where it is heard: what is raised while Python forks is lost.
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            os.waitpid(child, 0)
            answer = told.readline()
            if answer == _READY:
                with contextlib.suppress(OSError):  # it has been unmounted since
                    ours.sendall(_HEARD)
                return claim.read() or record
            told.read()
        if answer:
            raise MachineError(answer.decode(errors="surrogateescape").rstrip("\n"))
        message = f"the daemon for {record.mountpoint} died before the mount answered"
        raise MachineError(message)
    finally:
        claim.hand_over()


_ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Blocked in a daemon from its beginning until its session listens, which ends in order (`ocifs.driver.session`)."""
_READY: Final = b"ready\n"
_HEARD: Final = b"!"
"""The answer to `_READY`: without it nobody knows of the mount, and the daemon ends."""
_PATIENCE: Final = 10.0
"""Seconds to wait for a daemon to be gone that is not wanted any more."""


@contextlib.contextmanager
def _dismissing(daemon: socket.socket) -> Iterator[None]:
    """Let a daemon go if the block is left by an exception, and return when it has taken down what it had put up."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            daemon.shutdown(socket.SHUT_WR)
            daemon.settimeout(_PATIENCE)
            while daemon.recv(4096):
                pass
        raise


def _started(serve: Serve, record: Record, claim: Claim, mask: set[signal.Signals | int]) -> tuple[int, socket.socket]:
    """Start a daemon; give the process between it and us, which ends at once, and our end of a socket to the daemon.

    Forked twice: whoever called us may live on, and must not have to wait for a child that it knows nothing of.
    """
    try:
        ours, theirs = socket.socketpair()
        child = os.fork()
    except OSError as error:
        message = f"cannot start a daemon for {record.mountpoint}: {error.strerror}"
        raise MachineError(message) from error
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        ours.close()  # or nobody would see that the reader is gone
        _fork_daemon(serve, record, claim, theirs)
    theirs.close()
    return child, ours


def _fork_daemon(serve: Serve, record: Record, claim: Claim, starter: socket.socket) -> NoReturn:
    """Be the process between the command and the daemon, for a moment."""
    status = 0
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
        if os.fork() == 0:
            _daemon(serve, record, claim, starter)
    except OSError as error:
        status = MachineError.exit_code
        _say(starter, f"cannot start a daemon for {record.mountpoint}: {error.strerror}\n")
    finally:
        os._exit(status)


def _say(starter: socket.socket, line: str) -> None:
    with contextlib.suppress(OSError):
        starter.sendall(line.encode(errors="surrogateescape"))


class _AbandonedError(MachineError):
    """Whoever wanted the mount is gone."""


def _daemon(serve: Serve, record: Record, claim: Claim, starter: socket.socket) -> NoReturn:
    """Be the daemon; never returns. What goes wrong before readiness is told to the starter, later to the log."""
    status, keep_log = 0, False
    try:
        os.chdir("/")
        _forget_handlers()
        _close_inherited()
        log_to_background(claim.log)
        null = os.open(os.devnull, os.O_RDWR)
        # libfuse says on stderr why a mount failed; let it until that is decided.
        for stream in (0, 1):
            os.dup2(null, stream)

        def announce() -> None:
            # Not before: of what systemd.automount(5) has mounted, only its own process group can see what lies below
            # while it waits for us, and mount(8) and its helpers are in that.
            os.setsid()
            heard = b""
            with contextlib.suppress(OSError):
                starter.sendall(_READY)
                heard = starter.recv(1)
            os.dup2(null, 2)
            if not heard:
                raise _AbandonedError(f"the command that was to mount {record.mountpoint} was ended before it did")
            starter.close()

        with listening(claim.socket) as asking:
            _Kept(record, claim, announce).served(serve, asking)
    except OcifsError as error:
        status, keep_log = error.exit_code, not isinstance(error, _AbandonedError)
        _log.error("%s", error)
        _say(starter, f"{error}\n")
    except BaseException:  # noqa: BLE001 (nothing may return into the parent's code)
        status, keep_log = 70, True  # EX_SOFTWARE in sysexits.h: a bug
        _log.exception("the daemon ended in a way that was not foreseen")
    finally:
        claim.release(keep_log=keep_log)
        logging.shutdown()
        # Not sys.exit: nothing of the parent's (its atexit functions, its buffers) may run in the child.
        os._exit(status)


def _forget_handlers() -> None:
    """Take signals as a program that has just begun does: what the caller did with them is not for its daemon."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, _ENDING)


def _close_inherited() -> None:
    """Close what whoever ran us had open and left to us: a lock, a pipe that somebody reads to its end.

    Python opens everything close-on-exec, so what is not is not ours.
    """
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        with contextlib.suppress(OSError):
            if fd > 2 and os.get_inheritable(fd):  # noqa: PLR2004 (beyond the standard streams)
                os.close(fd)


def now_ns() -> int:
    """Nanoseconds since the epoch, for `Record.started_ns`."""
    return time.time_ns()
