"""How an image reaches the kernel: the ``fuse`` driver, the ``erofs`` driver, and which of them can work here.

``fuse``
    One FUSE session at the mount point; every name, attribute and byte is asked of this process (`ocifs.fuse.Adapter`).
    Works everywhere, without root too, and can show what only ocifs knows (examination).

``erofs`` (root, Linux ≥ 6.12)
    The kernel's EROFS reads the image tree itself, so names, attributes, links and xattrs cost no round trip; FUSE is
    asked only for data, in large pieces. Its files come from a FUSE session at a private place (`ocifs.fuse.DeviceAdapter`),
    which is detached as soon as EROFS has them open. What remains is one mount, and unmounting it ends everything: EROFS
    closes its files, with the last of them the detached FUSE mount goes, and the kernel ends our session.

Which of them
    EROFS must be trusted to answer EIO when a device fails. Some kernels fill the page with zeros instead and keep it:
    wrong bytes for everyone. So `auto` takes ``erofs`` only after `probe` has seen a failing device answered with EIO on
    this very kernel; what it saw is kept until the next boot.

Concurrency contract
    One thread runs trio and pyfuse3. Everything that makes the kernel ask us something in return (mounting EROFS, stat of
    the mount point, unmounting) runs in a worker thread, or we would wait for ourselves.
    pyfuse3 reads the FUSE descriptor with the GIL held; `_Waiting` says what follows from that.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import select
import signal
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import msgspec

from ocifs import kernel
from ocifs.devices import DeviceFile
from ocifs.errors import MachineError, OcifsError, UsageError
from ocifs.mountinfo import MountEntry, mount_of, mounted_at
from ocifs.rootfs import RootFS

if TYPE_CHECKING:
    import pyfuse3
    import trio

_log = logging.getLogger(__name__)

READAHEAD = 1024
"""KiB that the kernel may read ahead on our mounts, where we may say so: 1 MiB, the largest FUSE request. Default: 128."""

_OPPOSITES = {"suid": "nosuid", "dev": "nodev", "exec": "noexec", "atime": "noatime"}
_FUSE_ONLY = frozenset({"allow_other", "allow_root", "auto_unmount", "default_permissions"})
_KNOWN = frozenset({*_OPPOSITES, *_OPPOSITES.values(), *_FUSE_ONLY, "ro", "nonempty"})
_SENSELESS = frozenset({"rw", "async", "sync", "remount", "bind", "lazytime"})
_ALWAYS = ("nosuid", "nodev")
"""Unless told otherwise: an image is somebody else's, and browsing it needs neither."""


# -- options -------------------------------------------------------------------------------------------------------


def check_options(words: Sequence[str]) -> tuple[str, ...]:
    """Give the mount options in force: the user's (``-o``), after our defaults. `UsageError` for one that cannot work."""
    options = dict.fromkeys(_ALWAYS)
    for word in words:
        if word in _SENSELESS:
            message = f"the option {word!r} makes no sense for an image, which is read-only"
            raise UsageError(message)
        if word not in _KNOWN:
            message = f"the option {word!r} is not known; known are {', '.join(sorted(_KNOWN))}"
            raise UsageError(message)
        opposite = _OPPOSITES.get(word) or next((name for name, no in _OPPOSITES.items() if no == word), "")
        options.pop(opposite, None)
        options[word] = None
    return tuple(options)


def _libfuse_options(options: Sequence[str], reference: str) -> set[str]:
    # A comma separates options; libfuse takes a backslash to mean the next character itself (lib/fuse_opt.c).
    shown = reference.encode(errors="surrogateescape").decode("ascii", errors="backslashreplace")
    shown = shown.replace("\\", "\\\\").replace(",", "\\,")
    ours = {"ro", "default_permissions", "subtype=ocifs", f"fsname={shown}"}
    # libfuse mounts nosuid and nodev unless told otherwise (lib/mount.c) and does not know atime, which is the kernel's
    # default; the place was checked for being empty already.
    return ours | {option for option in options if option not in {"atime", "nonempty"}}


# -- a session -----------------------------------------------------------------------------------------------------


class _Waiting:
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


_M_MMAP_THRESHOLD = -3  # malloc.h
_LARGE = 256 << 10


def _give_back_spans() -> None:
    """Have malloc take every decoded span from the system and give it back when it is evicted.

    Left to itself glibc raises its threshold with the first span that is freed, keeps the following ones in the heaps of
    the decoding threads, and ends with twice the cache's bound in memory. Other C libraries have no such knob.
    """
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)


def _session_fd() -> int:
    """The descriptor of the FUSE session; pyfuse3 keeps it to itself."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}") == "/dev/fuse":
                return int(name)
    message = "the FUSE session has no descriptor"
    raise MachineError(message)


class _Session:
    """One FUSE session: mounts ``adapter`` on ``place`` and serves it until the mount goes or a signal comes.

    ``begin`` runs once requests are served; what it raises ends the session and is raised by `run`. ``end`` runs when a
    signal asks us to go, before the session is closed. ``decoding`` says whether worker threads have work.
    """

    def __init__(
        self,
        adapter: pyfuse3.Operations,
        place: Path,
        begin: Callable[[], Awaitable[None]],
        end: Callable[[], Awaitable[None]],
        decoding: Callable[[], bool],
    ) -> None:
        self._adapter = adapter
        self._place = place
        self._begin = begin
        self._end = end
        self._decoding = decoding
        self._failed: OcifsError | None = None

    def run(self, options: set[str]) -> None:
        """Mount with ``options``, serve, unmount. Raises `MachineError` if mounting fails."""
        import pyfuse3  # noqa: PLC0415 (only what mounts may need FUSE)
        import trio  # noqa: PLC0415

        class Waiting(_Waiting, trio.abc.Instrument):
            pass

        signal.signal(signal.SIGALRM, lambda *_: None)
        _give_back_spans()
        # A signal between mounting and listening would end us without unmounting: let it wait.
        signal.pthread_sigmask(signal.SIG_BLOCK, _ending_signals())
        # Once we are ending, which must happen in order, another one means nothing. To block it would not do: the system
        # would give it to a worker thread.
        for number in _ending_signals():
            signal.signal(number, lambda *_: None)
        try:
            pyfuse3.init(self._adapter, str(self._place), options)
        except RuntimeError as error:
            message = f"mounting on {self._place} failed ({error}); 'ocifs doctor' says what this machine lacks"
            raise MachineError(message) from error
        ours = mounted_at(self._place)
        waiting = Waiting(self._decoding)
        try:
            waiting.watch(_session_fd())
            trio.run(self._serve, instruments=[waiting])
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            # libfuse unmounts by name. After a lazy unmount something else may be mounted there by now; after a parent
            # directory was renamed the mount is elsewhere.
            here = mounted_at(self._place) == ours
            if not here:
                _detach_moved(ours)
            pyfuse3.close(unmount=here)
        if self._failed is not None:
            raise self._failed

    async def _serve(self) -> None:
        import pyfuse3  # noqa: PLC0415
        import trio  # noqa: PLC0415

        async with trio.open_nursery() as nursery:
            listening, begun = trio.Event(), trio.Event()
            nursery.start_soon(self._obey, listening, begun)
            await listening.wait()
            nursery.start_soon(self._start, begun)
            # Each worker beyond the first is started under load and takes a 1 MiB buffer; have some from the start.
            await pyfuse3.main(min_tasks=8)
            nursery.cancel_scope.cancel()

    async def _obey(self, listening: trio.Event, begun: trio.Event) -> None:
        """End the session when a signal asks for it."""
        import pyfuse3  # noqa: PLC0415
        import trio  # noqa: PLC0415

        with trio.open_signal_receiver(*_ending_signals()) as received:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _ending_signals())
            listening.set()
            async for number in received:
                _log.info("ending on %s", signal.Signals(number).name)
                # What has begun asks us things, and must not be left without an answer.
                await begun.wait()
                await self._end()
                pyfuse3.terminate()
                return

    async def _start(self, begun: trio.Event) -> None:
        import pyfuse3  # noqa: PLC0415

        try:
            await self._begin()
        except OcifsError as error:
            self._failed = error
        except OSError as error:
            self._failed = MachineError(f"the mount on {self._place} did not answer: {error.strerror}")
        finally:
            begun.set()
        if self._failed is not None:
            await self._end()  # it may have got far
            pyfuse3.terminate()


def _detach_moved(ours: MountEntry | None) -> None:
    """Take a mount down where it is now, if it still is somewhere."""
    moved = mount_of(ours.device) if ours is not None else None
    if moved is not None and ours is not None and moved.number == ours.number:
        with contextlib.suppress(OcifsError):  # not root: who unmounts it finds it dead
            kernel.unmount(moved.mountpoint, flags=kernel.MNT_DETACH)


def _ending_signals() -> set[signal.Signals]:
    """What asks a mount to end; what whoever started us had ignored (as nohup(1) does) stays so."""
    asking = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    return {number for number in asking if signal.getsignal(number) is not signal.SIG_IGN}


async def _in_thread(function: Callable[..., object], *arguments: object) -> None:
    import trio  # noqa: PLC0415

    # Abandoned if the session ends: then nobody is left to answer what the thread may be waiting for.
    await trio.to_thread.run_sync(lambda: function(*arguments), abandon_on_cancel=True)


def _raise_readahead(device: int) -> None:
    """Let the kernel read further ahead on the file system with this st_dev, if we may."""
    path = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    with contextlib.suppress(OSError):  # not root, or no such knob: slower, not wrong
        path.write_text(f"{READAHEAD}\n")


# -- the drivers ---------------------------------------------------------------------------------------------------


def serve_fuse(
    trees: Sequence[RootFS], mountpoint: Path, options: Sequence[str], reference: str, on_ready: Callable[[int], None]
) -> None:
    """Serve ``trees`` at ``mountpoint`` until the mount ends.

    ``on_ready`` is called once a stat(2) was answered, with the mount's st_dev.

    Raises `MachineError` if mounting fails.
    """
    from ocifs.fuse import Adapter  # noqa: PLC0415

    device = 0

    def prove() -> None:
        nonlocal device
        device = os.stat(mountpoint).st_dev
        _raise_readahead(device)

    async def begin() -> None:
        await _in_thread(prove)
        on_ready(device)

    async def end() -> None:
        pass  # pyfuse3 unmounts

    def decoding() -> bool:
        return any(tree.spans.decoding() for tree in trees)

    _Session(Adapter(trees), mountpoint, begin, end, decoding).run(_libfuse_options(options, reference))


def serve_erofs(
    files: Sequence[DeviceFile],
    decoding: Callable[[], bool],
    mountpoint: Path,
    private: Path,
    options: Sequence[str],
    on_ready: Callable[[int], None],
) -> None:
    """Mount EROFS at ``mountpoint``, its files served by us at ``private``; serve until the mount ends.

    ``private`` is an empty directory of ours; it is in use only until EROFS is mounted. ``decoding`` says whether worker
    threads have work. Raises `MachineError` if the kernel refuses.
    """
    from ocifs.fuse import DeviceAdapter  # noqa: PLC0415

    ours: MountEntry | None = None

    def mount() -> None:
        nonlocal ours
        _raise_readahead(os.stat(private).st_dev)
        names = [os.fsencode(private / str(number)) for number in range(len(files))]
        kernel.mount_erofs(names[0], names[1:], os.fsencode(mountpoint), attributes=options)
        ours = mounted_at(mountpoint)
        kernel.unmount(os.fsencode(private), flags=kernel.MNT_DETACH)
        _raise_readahead(os.stat(mountpoint).st_dev)

    def unmount() -> None:
        # Whoever still uses the mount keeps it, but loses us: what the kernel has not cached cannot be read from then on.
        _detach_moved(ours)

    async def begin() -> None:
        await _in_thread(mount)
        on_ready(ours.device if ours else 0)

    async def end() -> None:
        await _in_thread(unmount)

    words = {"ro", "nosuid", "nodev", "noexec", "subtype=ocifs-devices", "fsname=ocifs"}
    _Session(DeviceAdapter(files), private, begin, end, decoding).run(words)


# -- which of them -------------------------------------------------------------------------------------------------

EROFS_SINCE = (6, 12)
"""The first Linux whose EROFS takes plain files as source and devices (fs/erofs/Kconfig: EROFS_FS_BACKED_BY_FILE)."""


class Verdict(msgspec.Struct, frozen=True):
    """Whether the ``erofs`` driver can be used on this machine, and if not, why not and what to do."""

    works: bool
    reason: str = ""
    lasting: bool = True
    """Whether it will be so until the next boot; not if the probe itself could not run."""


def erofs_verdict(runtime: Path) -> Verdict:
    """Tell whether the ``erofs`` driver works here, probing once per boot; what came out is kept in ``runtime``."""
    if os.geteuid() != 0:
        return Verdict(works=False, reason="only root can mount EROFS")
    release = os.uname().release
    numbers = tuple(int(word) for word in release.split("-")[0].split(".")[:2] if word.isdigit())
    if numbers < EROFS_SINCE:
        return Verdict(
            works=False, reason=f"Linux {release} mounts EROFS from block devices only; 6.12 or newer takes files"
        )
    kept = runtime / "erofs-probe.json"
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        seen = msgspec.json.decode(kept.read_bytes(), type=_Probed)
        if (seen.boot, seen.release) == (boot, release):
            return seen.verdict
    verdict = probe(runtime)
    if not verdict.lasting:
        return verdict
    with contextlib.suppress(OSError):  # a full disk: it will be probed again
        new = kept.with_suffix(f".{os.getpid()}.new")
        new.write_bytes(msgspec.json.encode(_Probed(boot, release, verdict)))
        new.rename(kept)
    return verdict


DRIVERS = ("auto", "erofs", "fuse")
"""What ``--driver`` takes."""


def choose(wanted: str, *, options: Sequence[str], examining: bool, runtime: Path) -> tuple[str, str]:
    """Give the driver to use, and why it is not ``erofs`` where that was possible: ``("fuse", "only root can …")``.

    Raises `UsageError` or `MachineError` if ``erofs`` was asked for by name and cannot be.
    """
    if wanted == "fuse":
        return "fuse", "it was asked for"
    only = sorted(_FUSE_ONLY.intersection(options))
    wrong: type[OcifsError]
    if examining:
        wrong, reason = UsageError, "examination shows what only the fuse driver can"
    elif only:
        wrong, reason = (
            UsageError,
            f"the option {only[0]} is FUSE's: under erofs a mount is everyone's, as any other is",
        )
    else:
        verdict = erofs_verdict(runtime)
        if verdict.works:
            return "erofs", ""
        wrong, reason = MachineError, verdict.reason
    if wanted == "erofs":
        message = f"the erofs driver cannot be used: {reason}"
        raise wrong(message)
    return "fuse", reason


class _Probed(msgspec.Struct, frozen=True):
    boot: str
    release: str
    verdict: Verdict


_GOOD = b"ocifs probe. " * 315 + b"\n"
"""What the first half of the probe's file holds: 4096 bytes."""
_PROBE_TIME = 20.0
"""Seconds after which a probe that hangs counts as failed."""


def probe(runtime: Path) -> Verdict:
    """Mount a tiny image whose device fails in its second half, and see what the kernel makes of that.

    The session runs in a process of its own, and the file is read by this one.
    """
    try:
        place = Path(tempfile.mkdtemp(prefix="probe.", dir=runtime))
    except OSError as error:
        return Verdict(works=False, reason=f"the probe has no place to run: {error}", lasting=False)
    try:
        (place / "private").mkdir(mode=0o700)
        (place / "mnt").mkdir(mode=0o700)
        return _probe_at(place)
    except OSError as error:
        return Verdict(works=False, reason=f"the probe could not run: {error}", lasting=False)
    finally:
        for name in ("mnt", "private", ""):
            with contextlib.suppress(OSError):
                (place / name).rmdir()


def _probe_at(place: Path) -> Verdict:
    told, tell = os.pipe2(os.O_CLOEXEC)
    # Forked, not started anew: a new interpreter would look for its modules where whoever called us likes.
    child = os.fork()
    if child == 0:
        _serve_probe(place, tell)
    os.close(tell)
    ended = os.pidfd_open(child)
    try:
        with os.fdopen(told, "rb") as pipe:
            if not select.select([pipe], [], [], _PROBE_TIME)[0]:
                return Verdict(works=False, reason="the probe's mount did not answer", lasting=False)
            answer = pipe.readline().decode(errors="backslashreplace").strip()
        if answer != "ready":
            return Verdict(works=False, reason=answer or "the probe ended without a word", lasting=False)
        return _probe_read(place / "mnt" / "file")
    finally:
        for name in ("mnt", "private"):
            with contextlib.suppress(OcifsError):
                kernel.unmount(os.fsencode(place / name), flags=kernel.MNT_DETACH)
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(ended, signal.SIGTERM)
        if not select.select([ended], [], [], _PROBE_TIME)[0]:
            signal.pidfd_send_signal(ended, signal.SIGKILL)
        os.close(ended)
        os.waitpid(child, 0)


def _probe_read(path: Path) -> Verdict:
    fd = os.open(path, os.O_RDONLY)
    try:
        if os.pread(fd, len(_GOOD), 0) != _GOOD:
            return Verdict(works=False, reason="the kernel's EROFS read wrong bytes from a good device")
        try:
            got = os.pread(fd, len(_GOOD), len(_GOOD))
        except OSError as error:
            if error.errno == errno.EIO:
                return Verdict(works=True)
            return Verdict(works=False, reason=f"a failing device was answered with {error.strerror}")
        kind = "zeros" if not any(got) else "something"
        return Verdict(
            works=False, reason=f"this kernel's EROFS makes {kind} of data that cannot be read, instead of an error"
        )
    finally:
        os.close(fd)


class _Bytes(NamedTuple):
    """A device file of known bytes; beyond them it fails."""

    data: bytes
    size: int

    async def read(self, offset: int, size: int) -> bytes:
        if offset + size > len(self.data):
            message = "the probe's device fails here, as it should"
            raise MachineError(message)
        return self.data[offset : offset + size]


def _serve_probe(place: Path, tell: int) -> NoReturn:
    """Be the probe's session, in a process of its own: a file of two pages, the second of which cannot be read."""

    def ready(_: int) -> None:
        os.write(tell, b"ready\n")

    try:
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        logging.disable()  # that the device fails is as it should be
        try:
            files = [_Bytes(tree := _probe_tree(), len(tree)), _Bytes(_GOOD, 2 * len(_GOOD))]
            serve_erofs(files, bool, place / "mnt", place / "private", _ALWAYS, ready)
        except OcifsError as error:
            os.write(tell, f"{error}\n".encode(errors="backslashreplace"))
    finally:
        # What is above on the stack is the parent's.
        os._exit(0)


def _probe_tree() -> bytes:
    import io  # noqa: PLC0415

    from ocifs.erofs import Encoder  # noqa: PLC0415
    from ocifs.tree import Extent, Kind, Node, Origin  # noqa: PLC0415

    origin, size = Origin(1, 0), 2 * len(_GOOD)
    file = Node(Kind.FILE, origin, mode=0o444, size=size, extents=(Extent(0, 1, 0, size),))
    out = io.BytesIO()
    Encoder(Node(Kind.DIR, origin, children={b"file": file}), layers=[("probe", size)], uuid=bytes(16)).write(out)
    tree = out.getvalue()
    return tree + bytes(-len(tree) % 4096)
