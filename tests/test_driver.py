"""Mount options, the choice of a driver, and how the loop waits; nothing here stays mounted."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from ocifs import kernel
from ocifs.driver import Verdict, check_allowed, check_options, choice, choose, erofs_verdict, probe, probing, session
from ocifs.driver.options import libfuse_options
from ocifs.errors import MachineError, OcifsError, UsageError
from tests.support.mounting import LIMIT, run

WORKS = Verdict(works=True)
FAILS = Verdict(works=False, reason="this kernel cannot be trusted")


# -- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["nosuid", "nodev"]),
        (["noexec"], ["nosuid", "nodev", "noexec"]),
        (["suid"], ["nodev", "suid"]),
        (["dev"], ["nosuid", "dev"]),
        (["suid", "dev"], ["suid", "dev"]),
        (["suid", "nosuid"], ["nodev", "nosuid"]),
        (["nosuid", "suid"], ["nodev", "suid"]),
        (["exec", "noexec", "exec"], ["nosuid", "nodev", "exec"]),
        (["atime", "noatime"], ["nosuid", "nodev", "noatime"]),
        (["noatime", "atime"], ["nosuid", "nodev", "atime"]),
        (["ro", "ro"], ["nosuid", "nodev", "ro"]),
        (["allow_other", "nonempty"], ["nosuid", "nodev", "allow_other", "nonempty"]),
    ],
)
def test_options_in_force_are_the_defaults_and_then_the_users(words: list[str], expected: list[str]) -> None:
    assert check_options(words) == tuple(expected)


@pytest.mark.parametrize("word", ["rw", "async", "sync", "remount", "bind", "lazytime"])
def test_options_that_make_no_sense_are_said_to(word: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_options(["ro", word])
    assert str(caught.value) == f"the option '{word}' makes no sense for an image, which is read-only"


@pytest.mark.parametrize("word", ["nosuchthing", "", "RO", "uid=5", "fsname=x", "max_read=4096"])
def test_unknown_options_are_named_with_those_that_are_known(word: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_options([word])
    assert str(caught.value) == (
        f"the option {word!r} is not known; known are allow_other, allow_root, atime, auto_unmount, "
        "default_permissions, dev, exec, noatime, nodev, noexec, nonempty, nosuid, ro, suid"
    )


@pytest.mark.parametrize("word", ["allow_other", "allow_root"])
def test_what_only_root_may_say_is_refused_before_anything_is_done(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1234)
    monkeypatch.setattr("ocifs.driver.options.others_allowed", lambda: False)
    check_allowed(["nosuid", "nodev"])
    with pytest.raises(MachineError) as caught:
        check_allowed(["nosuid", word])
    assert str(caught.value) == (
        f"only root may say {word} on this machine, until root adds a line user_allow_other to /etc/fuse.conf"
    )
    monkeypatch.setattr("ocifs.driver.options.others_allowed", lambda: True)
    check_allowed(["nosuid", word])


def test_what_libfuse_is_told() -> None:
    assert libfuse_options(["nosuid", "nodev", "allow_other"], "oci:image:tag") == {
        *("ro", "default_permissions", "subtype=ocifs", "fsname=oci:image:tag", "nosuid", "nodev", "allow_other")
    }


def test_libfuse_is_not_told_what_it_does_not_know() -> None:
    assert libfuse_options(["atime", "nonempty"], "x") == {"ro", "default_permissions", "subtype=ocifs", "fsname=x"}


@pytest.mark.parametrize(
    ("reference", "shown"),
    [
        (b"oci:a,b", r"oci:a\,b"),
        (b"oci:a\\b", r"oci:a\\b"),
        (b"a\\,b", r"a\\\,b"),
        ("oci:grün".encode(), r"oci:gr\\xc3\\xbcn"),
        (b"oci:\xff", r"oci:\\xff"),
        (b"oci:x,allow_other", r"oci:x\,allow_other"),
    ],
)
def test_a_reference_cannot_become_an_option(reference: bytes, shown: str) -> None:
    assert f"fsname={shown}" in libfuse_options([], os.fsdecode(reference))
    assert len(libfuse_options([], os.fsdecode(reference))) == 4


# -- the choice ------------------------------------------------------------------------------------------------------


@pytest.fixture
def verdict(monkeypatch: pytest.MonkeyPatch) -> Callable[[Verdict | None], list[Path]]:
    """Make the kernel's verdict known; None: it must not be asked. Gives whom it was asked for."""

    def say(wanted: Verdict | None) -> list[Path]:
        asked: list[Path] = []

        def erofs_verdict(runtime: Path) -> Verdict:
            asked.append(runtime)
            assert wanted is not None, "the kernel was asked needlessly"
            return wanted

        monkeypatch.setattr(choice, "erofs_verdict", erofs_verdict)
        return asked

    return say


Say = Callable[[Verdict | None], list[Path]]
FUSES = "the option allow_other is FUSE's: under erofs a mount is everyone's, as any other is"
EXAMINES = "examination shows what only the fuse driver can"


@pytest.mark.parametrize("options", [(), ("nosuid",), ("allow_other",)])
@pytest.mark.parametrize("examining", [0, 1])
def test_fuse_asked_for_is_fuse_and_nothing_is_probed(
    verdict: Say, tmp_path: Path, options: Sequence[str], examining: int
) -> None:
    verdict(None)
    assert choose("fuse", options=options, examining=bool(examining), runtime=tmp_path) == ("fuse", "it was asked for")


@pytest.mark.parametrize("wanted", ["auto", "erofs"])
def test_erofs_is_taken_where_it_works(verdict: Say, tmp_path: Path, wanted: str) -> None:
    asked = verdict(WORKS)
    assert choose(wanted, options=("nosuid", "nodev", "noexec"), examining=False, runtime=tmp_path) == ("erofs", "")
    assert asked == [tmp_path]


def test_auto_says_why_it_takes_fuse(verdict: Say, tmp_path: Path) -> None:
    verdict(FAILS)
    assert choose("auto", options=(), examining=False, runtime=tmp_path) == ("fuse", "this kernel cannot be trusted")
    verdict(None)
    assert choose("auto", options=("allow_other",), examining=False, runtime=tmp_path) == ("fuse", FUSES)
    assert choose("auto", options=(), examining=True, runtime=tmp_path) == ("fuse", EXAMINES)
    assert choose("auto", options=("allow_other",), examining=True, runtime=tmp_path) == ("fuse", EXAMINES)


@pytest.mark.parametrize("option", ["allow_other", "allow_root", "auto_unmount", "default_permissions"])
def test_options_of_fuse_alone_rule_erofs_out(verdict: Say, tmp_path: Path, option: str) -> None:
    verdict(None)
    with pytest.raises(UsageError, match=f"^the erofs driver cannot be used: the option {option} is FUSE's"):
        choose("erofs", options=("nosuid", option), examining=False, runtime=tmp_path)


def test_erofs_by_name_is_refused_where_it_cannot_be(verdict: Say, tmp_path: Path) -> None:
    verdict(None)
    with pytest.raises(UsageError) as usage:
        choose("erofs", options=(), examining=True, runtime=tmp_path)
    assert str(usage.value) == f"the erofs driver cannot be used: {EXAMINES}"
    verdict(FAILS)
    with pytest.raises(MachineError) as machine:
        choose("erofs", options=(), examining=False, runtime=tmp_path)
    assert str(machine.value) == "the erofs driver cannot be used: this kernel cannot be trusted"


# -- the verdict -----------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A root's machine whose kernel and probe can be set; ``probes`` counts."""
    told = SimpleNamespace(release="6.18.5-arch1-1", verdict=WORKS, probes=0, uid=0)

    def probe(_runtime: Path) -> Verdict:
        told.probes += 1
        result: Verdict = told.verdict
        return result

    monkeypatch.setattr(os, "geteuid", lambda: told.uid)
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(release=told.release))
    monkeypatch.setattr(choice, "probe", probe)
    return told


@pytest.mark.parametrize("seen", [WORKS, FAILS])
def test_a_verdict_is_kept(machine: SimpleNamespace, tmp_path: Path, seen: Verdict) -> None:
    machine.verdict = seen
    assert [erofs_verdict(tmp_path) for _ in range(3)] == [seen] * 3
    assert machine.probes == 1
    assert sorted(os.listdir(tmp_path)) == ["erofs-probe.json"]


def test_another_kernel_or_boot_is_probed_again(machine: SimpleNamespace, tmp_path: Path) -> None:
    assert erofs_verdict(tmp_path) == WORKS
    machine.verdict = FAILS
    machine.release = "6.18.6-arch1-1"
    assert erofs_verdict(tmp_path) == FAILS
    assert machine.probes == 2
    kept = tmp_path / "erofs-probe.json"
    about = msgspec.json.decode(kept.read_bytes())
    assert about["release"] == "6.18.6-arch1-1"
    kept.write_bytes(msgspec.json.encode({**about, "boot": "another"}))
    machine.verdict = WORKS
    assert erofs_verdict(tmp_path) == WORKS
    assert machine.probes == 3


@pytest.mark.parametrize("rubbish", [b"", b"{", b"[]", b'{"boot": 1}', b"\xff"])
def test_a_kept_verdict_that_is_rubbish_is_probed_again(
    machine: SimpleNamespace, tmp_path: Path, rubbish: bytes
) -> None:
    (tmp_path / "erofs-probe.json").write_bytes(rubbish)
    assert erofs_verdict(tmp_path) == WORKS
    assert (machine.probes, erofs_verdict(tmp_path), machine.probes) == (1, WORKS, 1)


def test_a_verdict_that_cannot_be_kept_counts_all_the_same(machine: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "erofs-probe.json").mkdir()  # nothing can take its place
    assert erofs_verdict(tmp_path) == WORKS
    assert erofs_verdict(tmp_path) == WORKS
    assert machine.probes == 2


@pytest.mark.parametrize(
    ("release", "probes"),
    [
        ("6.11.99", 0),
        ("5.15.0-91-generic", 0),
        ("6.9.7", 0),
        ("6.12.0", 1),
        ("6.12-rc1", 1),
        ("6.12.0+", 1),
        ("6.100.1", 1),
        ("7.0.0-rc1", 1),
    ],
)
def test_kernels_before_6_12_are_not_probed(
    machine: SimpleNamespace, tmp_path: Path, release: str, probes: int
) -> None:
    machine.release = release
    seen = erofs_verdict(tmp_path)
    assert machine.probes == probes
    if probes:
        assert seen == WORKS
    else:
        reason = f"Linux {release} mounts EROFS from block devices only; 6.12 or newer takes files"
        assert seen == Verdict(works=False, reason=reason)


def test_only_root_can(machine: SimpleNamespace, tmp_path: Path) -> None:
    machine.uid = 1000
    assert erofs_verdict(tmp_path) == Verdict(works=False, reason="only root can mount EROFS")
    assert machine.probes == 0


def can_probe() -> bool:
    release = os.uname().release.split("-")[0].split(".")
    return os.geteuid() == 0 and (int(release[0]), int(release[1])) >= (6, 12) and Path("/dev/fuse").exists()


needs_probe = pytest.mark.skipif(not can_probe(), reason="needs root, /dev/fuse and Linux 6.12")


def mounts() -> list[str]:
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
        return [line for line in file if "ocifs" in line or "probe." in line]


@needs_probe
def test_a_probe_works_or_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    seen = probe(tmp_path)
    assert seen.works or seen.reason
    assert seen.works == (seen.reason == "")
    assert [line for line in mounts() if str(tmp_path) in line] == []
    assert os.listdir(tmp_path) == []


@needs_probe
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_probe_that_is_ended_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom ocifs.driver import probing\n"
        f"probing._probe_read = lambda path: os.kill(os.getpid(), {number:d})\nprobing.probe(Path(sys.argv[1]))"
    )
    told, tell = os.pipe()
    try:
        assert run([sys.executable, "-c", code, str(tmp_path)], pass_fds=[tell]).returncode == -number
    finally:
        os.close(tell)
    with os.fdopen(told) as last:
        # It ends with the last process that has the other end.
        assert select.select([last], [], [], LIMIT)[0]
    assert [line for line in mounts() if str(tmp_path) in line] == []
    assert os.listdir(tmp_path) == []


def test_a_probe_that_has_no_place_says_so_and_may_be_asked_again(tmp_path: Path) -> None:
    verdict = probe(tmp_path / "missing")
    assert (verdict.works, verdict.lasting) == (False, False)
    assert verdict.reason.startswith("the probe has no place to run: ")


def read_probe(monkeypatch: pytest.MonkeyPatch, path: Path, first: bytes, second: bytes | int) -> Verdict:
    """What the probe makes of a file that reads so."""
    path.touch()

    def pread(_fd: int, size: int, offset: int) -> bytes:
        assert size == 4096
        if not offset:
            return first
        assert offset == 4096
        if isinstance(second, int):
            raise OSError(second, os.strerror(second))
        return second

    monkeypatch.setattr(os, "pread", pread)
    return probing._probe_read(path)


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        (probing._GOOD, errno.EIO, ""),
        (
            probing._GOOD,
            bytes(4096),
            "this kernel's EROFS makes zeros of data that cannot be read, instead of an error",
        ),
        (probing._GOOD, b"", "this kernel's EROFS makes zeros of data that cannot be read, instead of an error"),
        (
            probing._GOOD,
            b"x" * 4096,
            "this kernel's EROFS makes something of data that cannot be read, instead of an error",
        ),
        (probing._GOOD, errno.EUCLEAN, "a failing device was answered with Structure needs cleaning"),
        (bytes(4096), errno.EIO, "the kernel's EROFS read wrong bytes from a good device"),
    ],
)
def test_what_a_probe_makes_of_what_it_reads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, first: bytes, second: bytes | int, reason: str
) -> None:
    assert len(probing._GOOD) == 4096
    assert read_probe(monkeypatch, tmp_path / "file", first, second) == Verdict(works=not reason, reason=reason)


@needs_probe
def test_the_kernels_refusal_is_a_machine_error_with_its_words(tmp_path: Path) -> None:
    (tmp_path / "rubbish").write_bytes(bytes(8192))
    (tmp_path / "mnt").mkdir()
    with pytest.raises(MachineError, match=r"^the kernel cannot mount .*/rubbish as EROFS: "):
        kernel.mount_erofs(os.fsencode(tmp_path / "rubbish"), [], os.fsencode(tmp_path / "mnt"))
    with pytest.raises(OcifsError, match=r"^cannot unmount .*/mnt: "):
        kernel.unmount(os.fsencode(tmp_path / "mnt"))


# -- waiting ---------------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes when one looks at it: ``step`` seconds a look."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.step = 1e-6

    def __call__(self) -> float:
        self.now += self.step
        return self.now


class Poll:
    """A descriptor that becomes readable after so many polls; None: never."""

    def __init__(self) -> None:
        self.polls = 0
        self.ready_after: int | None = None

    def poll(self, timeout: int) -> list[tuple[int, int]]:
        assert timeout == 0, "spinning must not sleep"
        self.polls += 1
        return [(5, 1)] if self.ready_after is not None and self.polls > self.ready_after else []


class Waits:
    """A `Waits` under observation."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, cpus: int = 2) -> None:
        self.clock, self.poll = Clock(), Poll()
        self.timers: list[tuple[float, ...]] = []
        self.decoding = False
        monkeypatch.setattr(time, "perf_counter", self.clock)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpus)))
        monkeypatch.setattr(signal, "setitimer", lambda _which, *values: self.timers.append(values))
        self.waiting = session.Waits(lambda: self.decoding)
        self.waiting._poll = self.poll  # type: ignore[assignment]  # it has what is used

    def wait(self, seconds: float, timeout: float = 10.0) -> tuple[int, list[tuple[float, ...]]]:
        """One wait of the loop; give how often was polled, and what the timer was set to."""
        self.poll.polls = 0
        self.timers.clear()
        self.waiting.before_io_wait(timeout)
        before = list(self.timers)
        self.timers.clear()
        self.clock.now += seconds
        self.waiting.after_io_wait(timeout)
        assert self.timers == [(0.05, 0.05)], "awake, the guard is always armed"
        return self.poll.polls, before


DISARMED = [(0,)]


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    yield Waits(monkeypatch)
    monkeypatch.undo()


def test_the_first_wait_does_not_spin(waits: Waits) -> None:
    assert waits.wait(0.00001) == (0, DISARMED)


def test_after_a_short_wait_it_spins_for_a_while_and_then_sleeps_disarmed(waits: Waits) -> None:
    waits.wait(0.0001)
    polls, timers = waits.wait(0.0001)
    assert 40 <= polls <= 50  # 50 microseconds, one a look
    assert timers == DISARMED


def test_a_request_that_comes_while_spinning_keeps_the_guard_armed(waits: Waits) -> None:
    waits.wait(0.0001)
    waits.poll.ready_after = 3
    assert waits.wait(0.00001) == (4, [])


def test_after_a_long_wait_it_does_not_spin_until_requests_keep_coming_again(waits: Waits) -> None:
    waits.wait(0.0001)
    waits.wait(1.0)
    assert waits.wait(0.0001) == (0, DISARMED)
    assert waits.wait(0.0001)[0] > 0


def test_what_counts_as_busy_is_the_whole_wait(waits: Waits) -> None:
    for seconds, spins in ((0.000248, True), (0.000251, False)):
        waits.wait(0.0001)
        waits.wait(1.0)
        waits.wait(seconds)
        assert (waits.wait(0)[0] > 0) is spins


def test_on_one_cpu_it_never_spins(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = Waits(monkeypatch, cpus=1)
    waits.wait(0.0001)
    assert waits.wait(0.0001) == (0, DISARMED)


def test_while_a_span_is_decoded_it_does_not_spin(waits: Waits) -> None:
    waits.wait(0.0001)
    waits.decoding = True
    assert waits.wait(0.0001) == (0, DISARMED)
    waits.decoding = False
    assert waits.wait(0.0001)[0] > 0


def test_a_wait_that_is_none_neither_spins_nor_disarms_nor_counts(waits: Waits) -> None:
    """The loop looks for events without waiting whenever tasks are ready."""
    waits.wait(0.0001)
    assert waits.wait(1.0, timeout=0) == (0, [])
    assert waits.wait(0.0001)[0] > 0, "it says nothing about whether requests keep coming"
    waits.wait(1.0)
    assert waits.wait(0.0, timeout=0) == (0, [])
    assert waits.wait(0.0001)[0] == 0


# -- memory ----------------------------------------------------------------------------------------------------------

HEAPS = """
import re, threading
from ocifs.driver import session
session._keep_heap()
def megabytes(pattern):
    lines = [line for line in open("/proc/self/maps") if re.search(pattern, line)]
    sizes = [int(end, 16) - int(begin, 16) for begin, end in (line.split()[0].split("-") for line in lines)]
    return max(size >> 20 for size in sizes)
def heap():
    return megabytes("heap")
kept = []
threads = [threading.Thread(target=lambda: kept.append(bytes(10 << 20))) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
full = heap()
kept.clear()
empty = heap()
bytes(6 << 20)
print(full, empty, heap(), megabytes(" ---p "))
"""
"""Prints MiB of the heap: when threads have 40, when they are free, after a piece of 6; and the most reserved for others."""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this C library has no such knobs")
def test_threads_take_large_pieces_from_one_heap_which_keeps_some_room() -> None:
    full, empty, after, reserved = map(int, run([sys.executable, "-c", HEAPS]).stdout.split())
    assert 40 <= full < 60
    assert empty < 10
    assert 6 <= after < 20
    assert reserved < 32, "glibc reserves 64 MiB for a heap of a thread"
