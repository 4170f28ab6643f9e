"""One FUSE session: mounted, served in an event loop, ended by a signal or because its mount is gone.

Here are the traps of serving with pyfuse3 in one process (blocking reads, signals, memory); what is served, and what is
mounted over it, is the caller's.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import select
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ocifs import kernel
from ocifs.errors import MachineError, OcifsError
from ocifs.mountinfo import MountEntry, mount_of, mounted_at

if TYPE_CHECKING:
    import pyfuse3
    import trio

_log = logging.getLogger(__name__)
_asked_log = _log.getChild("asked")
_asked_log.setLevel(logging.INFO)  # somebody asked for it, whatever -v says

READAHEAD = 1024
"""KiB that the kernel may read ahead on our mounts, where we may say so: 1 MiB, the largest FUSE request. Default: 128."""

GRACE = 5.0
"""Seconds in which a session that was asked to end still answers who waits for data; no disk that works takes so long."""


class Waits:
    """What happens when the loop waits for requests: it spins first, if that pays, and it bounds a read that would hang.

    It is a trio Instrument (trio.abc.Instrument; the loop calls it around every wait).

    *Spinning.* A program that walks a tree sends its next request microseconds after our answer, but falling asleep in
    epoll and being woken again takes longer than the work: polling the FUSE descriptor for a moment instead made
    open+read+close of small files 1.7 times as fast and sequential reading twice. So before the loop goes to sleep it polls
    for up to `SPIN`, provided that the last wait was a short one: then requests are keeping coming. An idle daemon never
    spins, for the wait before was long; nor does one with a single CPU, where spinning keeps the very program from running
    that should send the request; nor while a span is being decoded, which needs the CPU more.

    *Guarding.* pyfuse3 waits until the FUSE descriptor is readable and then reads it, blocking, with the GIL held. If a
    reader is killed between the two, its request is gone, and every thread of this process stands still until somebody
    sends another one: for ever, if everybody else waits for a decode. O_NONBLOCK is no way out (pyfuse3 takes EAGAIN for
    the end), but EINTR is: it makes pyfuse3 wait again. So while the loop is awake an interval timer is armed, whose
    SIGALRM does nothing but interrupt. Going to sleep disarms it: an idle daemon takes no signals. The two setitimer(2)
    calls take 1 µs a wake-up.
    """

    GUARD = 0.05
    """Seconds a read can hang: far above what a wake-up takes, and short enough that nobody notices."""
    SPIN = 50e-6
    """Seconds of polling: a program that reads small files comes back after 10 to 30 µs."""
    BUSY = 250e-6
    """Seconds: a wait shorter than this means that requests keep coming."""

    def __init__(self, decoding: Callable[[], bool]) -> None:
        """Do not spin while ``decoding`` says that worker threads have work."""
        self._decoding = decoding
        self._poll = select.poll()
        self._can_spin = len(os.sched_getaffinity(0)) > 1
        self._slept = 0.0
        self._busy = False

    def watch(self, fd: int) -> None:
        """Spin on this descriptor: the session's."""
        self._poll.register(fd, select.POLLIN)

    def before_io_wait(self, timeout: float) -> None:
        """Spin, then disarm the guard if there is nothing to do."""
        if timeout <= 0:
            return
        now = self._slept = time.perf_counter()
        if self._busy and self._can_spin and not self._decoding():
            poll, end = self._poll.poll, now + self.SPIN
            while time.perf_counter() < end:
                if poll(0):
                    return
        signal.setitimer(signal.ITIMER_REAL, 0)

    def after_io_wait(self, timeout: float) -> None:
        """Arm the guard, and remember whether the wait was a short one."""
        signal.setitimer(signal.ITIMER_REAL, self.GUARD, self.GUARD)
        if timeout > 0:
            self._busy = time.perf_counter() - self._slept < self.BUSY


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
_NEVER = 1 << 30
_TRIMMED = 8 << 20


def _keep_heap() -> None:
    """Have malloc take decoded spans from one heap, and keep there what evicted ones leave.

    Taken from the system each time, as large pieces are, a span costs a page fault for every 4 KiB, under a lock that all
    threads share: decoding at random took 1.4 times the processor time and up to 2.5 times as long. The price is room
    between spans, which is resident and of no use.

    By default each thread has a heap of its own, each with such room. With 134 MB (128 MiB) of spans kept, in MB resident
    (RssAnon), a heap a thread, cut where 64 MiB are free at its end, against one, cut at 8 MiB: after the random reads of
    scripts/bench 344 to 425 against 208 to 217, eight readers at random 254 to 319 against 224 to 248, after `tar` 213 to
    276 against 186 to 214; with two heaps, half-way. It grew no more in 16 GB of spans. Of that 25 MB are there before the
    first read, and 30 are what two decodes under way take. A byte read at random takes the same processor time; in order it
    takes 3 to 5 % more, and `tar` under erofs 4 % longer, because two threads are in each other's way where a piece could
    grow in place.

    Other C libraries have no such knobs.
    """
    with contextlib.suppress(AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_ARENA_MAX, 1)
        libc.mallopt(_M_MMAP_THRESHOLD, _NEVER)
        libc.mallopt(_M_TRIM_THRESHOLD, _TRIMMED)


def _session_fd() -> int:
    """The descriptor of the FUSE session; pyfuse3 keeps it to itself."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}") == "/dev/fuse":
                return int(name)
    message = "the FUSE session has no descriptor"
    raise MachineError(message)


Statistics = dict[str, int]
"""What a mount has done so far, by name; counters unless the name says otherwise."""


@dataclass(frozen=True)
class Keeper:
    """Whoever keeps a mount, as far as a session has to tell it things."""

    attached: Callable[[int], None]
    """Called with the mount's st_dev as soon as it is known: before anybody can see the mount, or just after."""
    ready: Callable[[], None]
    """Called once the mount answers, in a thread of its own: it may wait. What it raises ends the mount."""
    asking: socket.socket | None = None
    """Listens for those who want `Statistics`: each that connects is sent them as JSON."""


class Session:
    """One FUSE session: mounts ``adapter`` on ``place`` and serves it until the mount goes or a signal comes.

    ``begin`` runs once requests are served; what it raises ends the session and is raised by `run`. ``end`` runs when a
    signal asks us to go, or ``begin`` has failed, before the session is closed. ``decoding`` says whether worker threads
    have work. SIGUSR1 logs what ``statistics`` gives.

    What cannot be read keeps no session from ending. A signal leaves requests that are under way `GRACE` to be answered;
    when the mount is gone nobody waits for an answer. Then the rest are dropped, and with them threads that may read from
    a server which is gone (`ocifs.spans`): the kernel gives readers an error, and threads end with the process.
    """

    def __init__(
        self,
        adapter: pyfuse3.Operations,
        place: Path,
        begin: Callable[[], Awaitable[None]],
        end: Callable[[], Awaitable[None]],
        *,
        decoding: Callable[[], bool],
        statistics: Callable[[], Statistics],
        asking: socket.socket | None = None,
    ) -> None:
        self._adapter = adapter
        self._place = place
        self._begin = begin
        self._end = end
        self._decoding = decoding
        self._statistics = statistics
        self._asking = asking
        self.device = 0
        """The FUSE mount's st_dev."""
        self.fd = -1
        """The descriptor that requests come from."""
        self._failed: OcifsError | None = None

    def run(self, options: set[str]) -> None:
        """Mount with ``options``, serve, unmount. Raises `MachineError` if mounting fails."""
        import pyfuse3
        import trio

        class Waiting(Waits, trio.abc.Instrument):
            pass

        signal.signal(signal.SIGALRM, lambda *_: None)
        _keep_heap()
        # A signal between mounting and listening would end us without unmounting: let it wait.
        signal.pthread_sigmask(signal.SIG_BLOCK, _ending_signals())
        # Once we are ending, which must happen in order, another one means nothing. To block it would not do: the system
        # would give it to a worker thread.
        for number in {*_ending_signals(), signal.SIGUSR1}:
            signal.signal(number, lambda *_: None)
        try:
            pyfuse3.init(self._adapter, str(self._place), options)
        except RuntimeError as error:
            message = f"mounting on {self._place} failed ({error}); 'ocifs doctor' says what this machine lacks"
            raise MachineError(message) from error
        self.fd = _session_fd()
        ours = mounted_at(self._place)
        self.device = ours.device if ours else 0
        waiting = Waiting(self._decoding)
        try:
            waiting.watch(self.fd)
            trio.run(self._serve, instruments=[waiting])
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            # libfuse unmounts by name. After a lazy unmount something else may be mounted there by now; after a parent
            # directory was renamed the mount is elsewhere.
            here = mounted_at(self._place) == ours
            if not here:
                detach_moved(ours, self.fd)
            pyfuse3.close(unmount=here)
        if self._failed is not None:
            raise self._failed

    async def _serve(self) -> None:
        import pyfuse3
        import trio

        async with trio.open_nursery() as nursery:
            listening, begun, serving = trio.Event(), trio.Event(), nursery.cancel_scope
            nursery.start_soon(self._obey, listening, begun, serving)
            await listening.wait()
            nursery.start_soon(self._start, begun, serving)
            nursery.start_soon(self._watch_mount, serving)
            nursery.start_soon(self._log_statistics)
            if self._asking is not None:
                nursery.start_soon(self._answer, self._asking)
            # Each worker beyond the first is started under load and takes a 1 MiB buffer; have some from the start.
            await pyfuse3.main(min_tasks=8)
            serving.cancel()

    async def _obey(self, listening: trio.Event, begun: trio.Event, serving: trio.CancelScope) -> None:
        """End the session when a signal asks for it."""
        import trio

        with trio.open_signal_receiver(*_ending_signals()) as received:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _ending_signals())
            listening.set()
            async for number in received:
                _log.info("ending on %s", signal.Signals(number).name)
                # What has begun asks us things, and must not be left without an answer.
                await begun.wait()
                await self._finish(serving)
                return

    async def _finish(self, serving: trio.CancelScope) -> None:
        """Take on nothing more; drop what is not answered in time, for which pyfuse3 would wait for ever."""
        import pyfuse3
        import trio

        await self._end()
        pyfuse3.terminate()
        await trio.sleep(GRACE)
        _log.warning("ending without an answer for who waits for data: none came within %g seconds", GRACE)
        serving.cancel()

    async def _watch_mount(self, serving: trio.CancelScope) -> None:
        """Drop everything when the mount is gone, whoever took it down: pyfuse3 would wait for what is under way."""
        import trio

        # The loop can watch a descriptor for readability only, and once only, which is pyfuse3's. An epoll that waits for
        # nothing in particular becomes readable by what cannot be left out: EPOLLERR (fuse_dev_poll in fs/fuse/dev.c).
        with select.epoll() as watching:
            watching.register(self.fd, 0)
            await trio.lowlevel.wait_readable(watching)
        serving.cancel()

    async def _log_statistics(self) -> None:
        import trio

        with trio.open_signal_receiver(signal.SIGUSR1) as received:
            async for _ in received:
                _asked_log.info("%s", ", ".join(f"{name} {value}" for name, value in self._statistics().items()))

    async def _answer(self, asking: socket.socket) -> None:
        """Send statistics to whoever connects. They fit the socket's buffer, so nobody can keep us waiting."""
        import trio

        while True:
            await trio.lowlevel.wait_readable(asking)
            try:
                with asking.accept()[0] as one:
                    one.setblocking(False)  # noqa: FBT003  (its only signature)
                    one.send(msgspec.json.encode(self._statistics()))
            except OSError as error:
                # Who asked is gone; or no more files may be open, and it would be readable without end.
                _log.debug("nobody could be told the statistics: %s", error)
                await trio.sleep(1)

    async def _start(self, begun: trio.Event, serving: trio.CancelScope) -> None:
        try:
            await self._begin()
        except OcifsError as error:
            self._failed = error
        except OSError as error:
            self._failed = MachineError(f"the mount on {self._place} did not answer: {error.strerror}")
        finally:
            begun.set()
        if self._failed is not None:
            await self._finish(serving)  # it may have got far


def detach_moved(ours: MountEntry | None, fd: int) -> None:
    """Take a mount down where it is now, if it still is somewhere. ``fd`` is the session's that serves it.

    The kernel gives both numbers again as soon as a mount is gone, and then they lead to somebody else's. They are ours as
    long as the session is connected, which ends with the mount.
    """
    moved = mount_of(ours.device) if ours is not None else None
    if moved is not None and ours is not None and moved.number == ours.number and _is_connected(fd):
        with contextlib.suppress(OcifsError):  # not root: who unmounts it finds it dead
            kernel.unmount(moved.mountpoint, flags=kernel.MNT_DETACH)


def _is_connected(fd: int) -> bool:
    """Whether a FUSE session still has its mount (fuse_dev_poll in fs/fuse/dev.c)."""
    poll = select.poll()
    poll.register(fd, 0)
    return not any(events & select.POLLERR for _, events in poll.poll(0))


def _ending_signals() -> set[signal.Signals]:
    """What asks a mount to end; what whoever started us had ignored (as nohup(1) does) stays so."""
    asking = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    return {number for number in asking if signal.getsignal(number) is not signal.SIG_IGN}


async def in_thread(function: Callable[..., object], *arguments: object) -> None:
    """Do what may wait, for the kernel that asks us something in return, or for somebody else."""
    import trio

    # Abandoned if the session ends: then nobody is left to answer what the thread may be waiting for.
    await trio.to_thread.run_sync(lambda: function(*arguments), abandon_on_cancel=True)


def raise_readahead(device: int) -> None:
    """Let the kernel read further ahead on the file system with this st_dev, if we may."""
    path = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    with contextlib.suppress(OSError):  # not root, or no such knob: slower, not wrong
        path.write_text(f"{READAHEAD}\n")
