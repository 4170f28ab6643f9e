"""Commands with time limits, mounts that are taken down again, and a namespace in which nothing outlives the program.

Every command runs in a session of its own and is ended with everything it started when its time is up or we are
interrupted. `in_namespaces` gives the whole program its own mounts and processes: whatever happens to it, kill -9
included, the kernel takes both away; no other process can hold a copy of a mount of ours.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

Word = str | Path

CLONE_NEWNS, CLONE_NEWPID = 0x00020000, 0x20000000  # include/uapi/linux/sched.h
MS_REC, MS_PRIVATE = 0x4000, 0x40000  # include/uapi/linux/mount.h
MNT_DETACH = 2  # the same
CPUCLOCK_SCHED = 2  # include/linux/posix-timers.h
PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h


LIBC = ctypes.CDLL(None, use_errno=True)


class FailedError(Exception):
    """Something did not do what it was asked, or not in time; the message is for a footnote."""


class Ran(NamedTuple):
    """A command that has ended: seconds from start to end, what it printed, what it complained about."""

    seconds: float
    output: bytes
    complaint: str = ""


class Piped(NamedTuple):
    """The same for a command that was piped: bytes instead of the output."""

    seconds: float
    size: int
    complaint: str = ""


def in_namespaces(main: Callable[[], int]) -> int:
    """Run `main` in a mount and a process namespace of its own, as process 1; give its status."""
    if LIBC.unshare(CLONE_NEWNS | CLONE_NEWPID) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    child = os.fork()
    if child:
        for number in _ends():
            signal.signal(number, lambda received, _: os.kill(child, received))
        while True:
            with contextlib.suppress(InterruptedError):
                return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 70  # EX_SOFTWARE in sysexits.h
    try:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        for number in _ends():
            signal.signal(number, _interrupt)
        if LIBC.mount(None, b"/", None, MS_REC | MS_PRIVATE, None) or LIBC.mount(b"proc", b"/proc", b"proc", 0, None):
            raise OSError(ctypes.get_errno(), "mount")
        status = main()
    except KeyboardInterrupt:
        status = 130
        print("bench: interrupted before anything was measured", file=sys.stderr)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return status


def _ends() -> list[signal.Signals]:
    """The signals that end us; whoever started us under nohup(1) does not want SIGHUP to."""
    ends = [signal.SIGTERM, signal.SIGINT]
    return ends if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [*ends, signal.SIGHUP]


def _interrupt(number: int, _: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # cleaning up is not to be interrupted
    raise KeyboardInterrupt


# -- commands ------------------------------------------------------------------------------------------------------


def _ended(running: Sequence[subprocess.Popen[bytes]], limit: float) -> list[subprocess.Popen[bytes]]:
    """Wait until at least one has ended and give those; none: the time was up. No polling, which would cost exactness."""
    with contextlib.ExitStack() as opened:
        ends = {}
        for process in running:
            ends[process] = os.pidfd_open(process.pid)
            opened.callback(os.close, ends[process])
        ready = set(select.select(list(ends.values()), [], [], max(limit, 0))[0])
        done = [process for process, end in ends.items() if end in ready]
    for process in done:
        process.wait()
    return done


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a command and all it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)


def _say_why(words: Sequence[Word], process: subprocess.Popen[bytes], complaints: IO[bytes]) -> FailedError:
    complaints.seek(0)
    said = complaints.read().decode(errors="replace").strip().splitlines()
    # GNU tar's last words are that there were others.
    telling = [line.strip() for line in said if "previous errors" not in line]
    last = f": {telling[-1][:200]}" if telling else ""
    return FailedError(f"{Path(words[0]).name} ended with status {process.returncode}{last}")


def _complaint(words: Sequence[Word], process: subprocess.Popen[bytes], complaints: IO[bytes], *, forgive: bool) -> str:
    """What a command complained of when it failed, if somebody forgives it; empty if it did not fail."""
    if not process.returncode:
        return ""
    error = _say_why(words, process, complaints)
    if not forgive:
        raise error
    return str(error)


def run(
    *words: Word,
    limit: float = 120,
    feed: bytes | None = None,
    keep: bool = True,
    forgive: bool = False,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
) -> Ran:
    """Run a command; its output goes to memory (`keep`) or nowhere.

    Raises FailedError if it takes too long, or fails and nobody forgives it.
    """
    with contextlib.ExitStack() as files:
        out: IO[bytes] | int = subprocess.DEVNULL
        if keep:
            out = files.enter_context(os.fdopen(os.memfd_create("output"), "w+b"))
        stdin: IO[bytes] | int = subprocess.DEVNULL
        if feed is not None:
            stdin = files.enter_context(os.fdopen(os.memfd_create("input"), "w+b"))
            stdin.write(feed)
            stdin.seek(0)
        complaints = files.enter_context(tempfile.TemporaryFile())
        began = time.perf_counter()
        process = _start(words, stdin=stdin, stdout=out, stderr=complaints, cwd=cwd, env=env)
        try:
            if not _ended([process], limit):
                raise FailedError(f"{Path(words[0]).name} was stopped after {limit:.0f} s")
            seconds = time.perf_counter() - began
        finally:
            if process.returncode is None:
                _end(process)
        complaint = _complaint(words, process, complaints, forgive=forgive)
        if isinstance(out, int):
            return Ran(seconds, b"", complaint)
        out.seek(0)
        return Ran(seconds, out.read(), complaint)


def _start(
    words: Sequence[Word],
    *,
    stdin: IO[bytes] | int = subprocess.DEVNULL,
    stdout: IO[bytes] | int = subprocess.DEVNULL,
    stderr: IO[bytes] | int = subprocess.DEVNULL,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    environment = {**os.environ, **env} if env else None
    try:
        return subprocess.Popen(
            words, stdin=stdin, stdout=stdout, stderr=stderr, cwd=cwd, env=environment, start_new_session=True
        )
    except FileNotFoundError:
        raise FailedError(f"{words[0]} is not installed") from None


def piped(*words: Word, limit: float = 120, forgive: bool = False) -> Piped:
    """Run a command whose output goes through a pipe to nowhere; errors as with `run`.

    The pipe is emptied with splice(2) to /dev/null, which copies nothing: the time is the command's.
    """
    with tempfile.TemporaryFile() as complaints, open(os.devnull, "wb") as nowhere:
        began = time.perf_counter()
        process = _start(words, stdout=subprocess.PIPE, stderr=complaints)
        watch = threading.Timer(limit, _end, [process])
        watch.start()
        total = 0
        try:
            if process.stdout is not None:  # a pipe was asked for
                with process.stdout as pipe:
                    while got := os.splice(pipe.fileno(), nowhere.fileno(), 1 << 20):
                        total += got
            process.wait()
            seconds = time.perf_counter() - began
        finally:
            watch.cancel()
            if process.returncode is None:
                _end(process)
        if seconds >= limit:
            raise FailedError(f"{Path(words[0]).name} was stopped after {limit:.0f} s")
        complaint = _complaint(words, process, complaints, forgive=forgive)
        return Piped(seconds, total, complaint)


def several(commands: Sequence[Sequence[Word]], at_once: int, *, limit: float = 120) -> float:
    """Run commands to nowhere, so many at a time, the first ones first; give seconds until the last has ended."""
    began = time.perf_counter()
    running: list[subprocess.Popen[bytes]] = []
    waiting = list(commands)
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(_start(waiting.pop(0)))
            done = _ended(running, began + limit - time.perf_counter())
            if not done:
                raise FailedError(f"{Path(commands[0][0]).name} was stopped after {limit:.0f} s")
            for process in done:
                running.remove(process)
                if process.returncode:
                    raise FailedError(f"{Path(commands[0][0]).name} ended with status {process.returncode}")
    finally:
        for process in running:
            _end(process)
    return time.perf_counter() - began


# -- mounts --------------------------------------------------------------------------------------------------------


def real(place: Path) -> Path:
    """The path of a mount point as the kernel's list has it, without touching the mount itself: it may answer nobody."""
    return Path(os.path.realpath(place.parent)) / place.name


def mounted_at(place: Path) -> bool:
    """Whether something is mounted exactly there; found without touching it."""
    wanted = os.fsencode(real(place)).replace(b" ", b"\\040")
    return any(line.split(b" ")[4] == wanted for line in Path("/proc/self/mountinfo").read_bytes().splitlines())


def unmount(place: Path, *, patience: float = 5.0) -> None:
    """Take down whatever is mounted there, by force if need be.

    umount2(2) itself, for umount(8) looks at the mount first, and would wait for a server that does not answer.
    """
    until = time.monotonic() + patience
    path = os.fsencode(real(place))
    while mounted_at(place):
        lazily = time.monotonic() > until
        if LIBC.umount2(path, MNT_DETACH if lazily else 0) == 0:
            continue
        number = ctypes.get_errno()
        if lazily or number != errno.EBUSY:
            raise FailedError(f"{place} could not be unmounted: {os.strerror(number)}")
        time.sleep(0.02)


@contextlib.contextmanager
def mounted(place: Path, *words: Word) -> Iterator[None]:
    """Have a command mount something at `place` for the block's time."""
    try:
        run(*words, keep=False)
        yield
    finally:
        unmount(place)


@contextlib.contextmanager
def served(place: Path, *words: Word, limit: float = 120) -> Iterator[int]:
    """Have a command serve a mount in the foreground; the block runs once it answers, and gets the process's number."""
    with tempfile.TemporaryFile() as complaints:
        process = _start(words, stderr=complaints)
        try:
            until = time.monotonic() + limit
            while not mounted_at(place):
                if process.poll() is not None:
                    raise _say_why(words, process, complaints)
                if time.monotonic() > until:
                    raise FailedError(f"{Path(words[0]).name} had mounted nothing after {limit:.0f} s")
                time.sleep(0.002)
            run("stat", place, limit=limit, keep=False)
            yield process.pid
        except BaseException:
            # It may be stuck, and whoever asked it waits uninterruptibly; its end is the end of that.
            _end(process)
            raise
        finally:
            unmount(place)
            if process.returncode is None and not _ended([process], 10):
                _end(process)


# -- what the kernel knows -----------------------------------------------------------------------------------------


def forget_caches() -> None:
    """Have the kernel drop the page cache, names and inodes; what is dirty is written first."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n", encoding="ascii")


def anonymous_memory(pid: int) -> float:
    """RssAnon of a process in MB (10⁶ bytes): what it allocated, without mapped files."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise FailedError(f"process {pid} has gone")


class Used(NamedTuple):
    """What a process has used so far: CPU in milliseconds, and by thread, how often it went to sleep."""

    cpu: float
    switches: dict[str, int]

    def since(self, before: Used) -> tuple[float, int]:
        """CPU milliseconds and voluntary context switches between two moments; threads that ended are left out."""
        woken = sum(count - before.switches.get(thread, 0) for thread, count in self.switches.items())
        return self.cpu - before.cpu, woken


def used(pid: int) -> Used:
    """CPU time of a process, ended threads included, and the voluntary context switches of its threads."""
    switches = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for line in (task / "status").read_text(encoding="ascii", errors="replace").splitlines():
                if line.startswith("voluntary_ctxt_switches:"):
                    switches[task.name] = int(line.split()[1])
    # The clock of another process's CPU time (clock_getcpuclockid(3)): nanoseconds, where /proc has hundredths of a second.
    clock = ~pid << 3 | CPUCLOCK_SCHED
    return Used(time.clock_gettime_ns(clock) / 1e6, switches)
