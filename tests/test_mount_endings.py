"""Mounts that are ended at bad moments, moved, or have names that programs trip over.

Not here: the ordinary life of a mount (`test_mount_lifecycle`).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ocifs import mountinfo
from ocifs.daemon import runtime_dir
from tests.support import layout
from tests.support.mounting import (
    LIMIT,
    Process,
    agent,
    command,
    environment,
    force_away,
    in_mountinfo,
    mounted,
    ocifs,
    patched,
    record_of,
    run,
    start,
)
from tests.support.tarball import entry, tarball

CONTENT = b"content of the file\n"
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("images") / "image"
    layout.write_layout(path, [tarball(entry("file", CONTENT), entry("dir/"))], tag="it")
    return f"oci:{path}:it"


EARLY = """
import os, signal
from ocifs.driver.session import Session
begin = Session._start
async def start(self, *words):
    os.kill(os.getpid(), signal.SIGTERM)
    await begin(self, *words)
Session._start = start
"""
"""Has SIGTERM arrive when requests are served already and the mount is about to be proved."""

AGAIN = """
import os, signal, pyfuse3
terminate, close = pyfuse3.terminate, pyfuse3.close
def terminate_signalled():
    os.kill(os.getpid(), signal.SIGTERM)
    terminate()
def close_signalled(**words):
    os.kill(os.getpid(), signal.SIGTERM)
    close(**words)
    os.kill(os.getpid(), signal.SIGTERM)
pyfuse3.terminate, pyfuse3.close = terminate_signalled, close_signalled
"""
"""Has more SIGTERMs arrive when the first has begun to end the session, before and after it is closed."""


def test_a_signal_that_comes_before_the_mount_is_ready_ends_it(
    image: str, tmp_path: Path, place: Path, driver: str
) -> None:
    words = ["mount", "--foreground", "--driver", driver, "--cache-dir", str(tmp_path / "cache"), image, str(place)]
    done = run(patched(EARLY, *words))
    assert done.returncode == 0, done.stderr
    assert not in_mountinfo(place)
    assert record_of(place) is None


SIGNALLED = """
import functools, importlib, os, signal
module, _, name = os.environ["AT"].partition(":")
owner = importlib.import_module(module)
*path, last = name.split(".")
for part in path:
    owner = getattr(owner, part)
plain = getattr(owner, last)
@functools.wraps(plain)
def signalled(*words, **more):
    os.kill(os.getpid(), int(os.environ["NUMBER"]))
    return plain(*words, **more)
setattr(owner, last, signalled)
"""
"""Sends the process a signal just as it calls a function."""

PHASES = [
    "ocifs.image:_open_image",
    "ocifs.image.indexing:Indexing.finish",
    "ocifs.image:run_forked",
    "ocifs.daemon.running:_fork_daemon",
    "ocifs.daemon.running:_daemon",
    "pyfuse3:init",
    "ocifs.driver.session:Session._start",
    "ocifs.driver.serving:raise_readahead",
    "ocifs.daemon.running:_Kept._attached",
    "ocifs.daemon.running:_Kept._ready",
]
"""From the claim on: documents, indexing, merging, forking, mounting, before and after the mount can be seen."""


@pytest.mark.parametrize(
    ("phase", "number"),
    [
        *((phase, number) for phase in PHASES for number in (signal.SIGTERM, signal.SIGKILL)),
        *((phase, signal.SIGINT) for phase in PHASES[1::3]),
    ],
)
def test_whatever_signal_comes_in_whatever_phase_the_place_is_free_afterwards(
    image: str, tmp_path: Path, place: Path, phase: str, number: signal.Signals
) -> None:
    cache = tmp_path / "cache"
    before = set(runtime_dir().iterdir())
    words = ["mount", "--cache-dir", str(cache), image, str(place)]
    env = {"AT": phase, "NUMBER": str(int(number))}
    done = run(patched(SIGNALLED, *words), env=env, stderr=subprocess.DEVNULL)
    assert number is not signal.SIGKILL or done.returncode != 0
    for _ in range(100):  # a daemon whose starter was ended finds out when it is ready
        found = record_of(place)
        if found is None or found["state"] == "dead":
            break
    if number is not signal.SIGKILL:
        assert not in_mountinfo(place)
    with mounted(image, place, driver="auto", cache=cache) as mount:
        assert agent("read", mount.at("file"), 0, 100) == CONTENT.hex()
    assert record_of(place) is None
    new = {one for one in runtime_dir().iterdir() if one not in before and one.suffix != ".log"}
    assert {one for one in new if one.name.startswith(Path(mount.record["log"]).stem)} == set()


INTERRUPTED = """
import os
from ocifs.daemon import records, running
class Interrupting:
    def __getattr__(self, name):
        return getattr(os, name)
    def waitpid(self, pid, options):
        os.waitpid(pid, options)
        while not any(one.record.mountpoint == os.environ["PLACE"] for one in records()):
            pass
        raise KeyboardInterrupt
running.os = Interrupting()
"""
"""Has ^C arrive when the mount answers, and whoever waits for that has not heard so yet."""


def test_a_mount_whose_command_was_interrupted_is_none(image: str, tmp_path: Path, place: Path, driver: str) -> None:
    runtime = tmp_path / "runtime"
    words = ["mount", "--driver", driver, "--cache-dir", str(tmp_path / "cache"), image, str(place)]
    done = run(patched(INTERRUPTED, *words), env={"PLACE": str(place), "OCIFS_RUNTIME_DIR": str(runtime)})
    assert (done.returncode, done.stderr) == (130, "")
    assert not in_mountinfo(place)
    assert [one.name for one in runtime.iterdir() if "probe" not in one.name] == []


FORKING = """
import os, signal
from ocifs.daemon import running
started, starter = running._started, os.getpid()
def hooked(*words):
    def interrupt():
        if os.getpid() == starter:
            os.kill(starter, signal.SIGINT)
    os.register_at_fork(after_in_parent=interrupt)
    return started(*words)
running._started = hooked
"""
"""Has ^C arrive when the daemon has just been forked, and Python does what others have asked it to do then."""


def test_an_interrupt_while_the_daemon_is_forked_is_not_lost(image: str, tmp_path: Path, place: Path) -> None:
    done = run(patched(FORKING, "mount", "--cache-dir", str(tmp_path / "cache"), image, str(place)))
    assert (done.returncode, done.stderr) == (130, "")
    assert not in_mountinfo(place)


RECYCLED = """
import os
from ocifs.driver import serving, session
mounted_at, ours = session.mounted_at, []
def remembered(place):
    found = mounted_at(place)
    ours.extend([found] if found is not None else [])
    return found
session.mounted_at = remembered
session.mount_of = lambda device: ours[0]._replace(mountpoint=os.fsencode(os.environ["VICTIM"]))
"""
"""Has the numbers of a mount lead to another one by the time it is gone, as they do when somebody mounts just then."""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a tmpfs")
def test_a_daemon_that_ends_unmounts_nothing_that_has_got_its_numbers(image: str, tmp_path: Path, driver: str) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", victim], check=True)
    try:
        env, cache = {"VICTIM": str(victim)}, tmp_path / "cache"
        with mounted(image, tmp_path / "mnt", driver=driver, cache=cache, env=env, code=RECYCLED) as mount:
            assert agent("read", mount.at("file"), 0, 100) == CONTENT.hex()
        assert in_mountinfo(victim)
    finally:
        subprocess.run(["umount", "--lazy", victim], check=False)


CALLER = """
import signal
signal.signal(signal.SIGTERM, lambda *_: None)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGALRM, signal.SIGUSR1})
"""


def test_a_daemon_takes_signals_whatever_its_caller_did_with_them(image: str, tmp_path: Path, driver: str) -> None:
    with mounted(image, tmp_path / "mnt", driver=driver, cache=tmp_path / "cache", code=CALLER, ended=True) as mount:
        status = Path(f"/proc/{mount.pid}/status").read_text("utf-8")
        assert next(line for line in status.splitlines() if line.startswith("SigBlk:")).split()[1] == "0" * 16
        mount.process.signal(signal.SIGTERM)
        assert mount.process.gone()
        assert not in_mountinfo(mount.path)


def test_a_suspended_reader_keeps_nobody_else_waiting(image: str, tmp_path: Path, driver: str) -> None:
    with mounted(image, tmp_path / "mnt", driver=driver, cache=tmp_path / "cache") as mount:
        suspended = start("hold", mount.at("file"))
        assert suspended.stderr is not None
        try:
            assert suspended.stderr.readline()
            suspended.send_signal(signal.SIGSTOP)
            assert agent("read", mount.at("file"), 0, 100) == CONTENT.hex()
            done = ocifs("umount", mount.path)
            assert done.returncode == 7
            assert f"(pid {suspended.pid})" in done.stderr
            assert ocifs("ps").returncode == 0
        finally:
            suspended.kill()
            suspended.communicate()


def test_further_signals_do_not_keep_the_first_from_ending_in_order(image: str, tmp_path: Path, driver: str) -> None:
    with mounted(image, tmp_path / "mnt", driver=driver, cache=tmp_path / "cache", code=AGAIN, ended=True) as mount:
        mount.process.signal(signal.SIGTERM)
        assert mount.process.gone()
        assert not in_mountinfo(mount.path)
        assert record_of(mount.path) is None


def test_a_mount_moved_with_its_parent_is_listed_and_unmounted_where_it_is(
    image: str, tmp_path: Path, driver: str
) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    with mounted(image, before / "mnt", driver=driver, cache=tmp_path / "cache", ended=True) as mount:
        before.rename(after)
        try:
            assert record_of(after / "mnt") is not None
            assert record_of(before / "mnt") is None
            done = ocifs("umount", after / "mnt")
            assert done.returncode == 0, done.stderr
            assert mount.process.gone()
            assert not in_mountinfo(after / "mnt")
        finally:
            force_away(after / "mnt")


def test_a_signal_ends_a_mount_that_was_moved_with_its_parent(image: str, tmp_path: Path, driver: str) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    with mounted(image, before / "mnt", driver=driver, cache=tmp_path / "cache", ended=True) as mount:
        before.rename(after)
        try:
            mount.process.signal(signal.SIGTERM)
            assert mount.process.gone()
            assert not in_mountinfo(after / "mnt")
        finally:
            force_away(after / "mnt")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a tmpfs")
@pytest.mark.parametrize("name", [b"car\rriage", b"vertical\x0btab", b"next\x85line", b"\xff\xfe"])
def test_somebody_elses_mount_of_any_name_is_no_obstacle(tmp_path: Path, name: bytes) -> None:
    path = os.fsencode(tmp_path) + b"/" + name
    os.mkdir(path)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", path], check=True)
    try:
        assert [entry.fs_type for entry in mountinfo.mounts() if entry.mountpoint == path] == ["tmpfs"]
        assert ocifs("ps").returncode == 0
    finally:
        subprocess.run(["umount", path], check=True)


@pytest.mark.parametrize("name", [b"car\rriage", b"\xff\xfe not text"])
def test_mount_points_of_any_bytes(image: str, tmp_path: Path, driver: str, name: bytes) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    path.mkdir()
    try:
        done = ocifs("mount", "--driver", driver, "--cache-dir", tmp_path / "cache", image, path)
        assert done.returncode == 0, done.stderr
        record = record_of(path)
        assert record is not None
        process = Process(record["pid"])
        assert agent("read", f"{path}/file", 0, 100) == CONTENT.hex()
        assert ocifs("umount", path).returncode == 0
        assert process.gone()
    finally:
        force_away(path)


def test_standard_streams_that_are_closed_do_no_harm(image: str, tmp_path: Path, place: Path) -> None:
    words = command("mount", "--cache-dir", tmp_path / "cache", image, place)
    shell = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *words]
    assert subprocess.run(shell, env=environment(), timeout=LIMIT, check=False).returncode == 0
    assert agent("read", f"{place}/file", 0, 100) == CONTENT.hex()
    assert ocifs("umount", place).returncode == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root probes")
def test_the_probe_loads_nothing_from_where_it_is_run(tmp_path: Path) -> None:
    """Root may run ``ocifs doctor`` in a directory that belongs to somebody else."""
    hostile, runtime = tmp_path / "hostile", tmp_path / "runtime"
    hostile.mkdir()
    runtime.mkdir(mode=0o700)
    for name in ("ctypes", "msgspec", "trio", "pyfuse3", "ocifs", "io", "tempfile"):
        (hostile / f"{name}.py").write_text(f"open({str(tmp_path / 'run')!r}, 'a').write({name!r})\n")
    code = f"from pathlib import Path; from ocifs import driver; driver.probe(Path({str(runtime)!r}))"
    run([sys.executable, "-P", "-c", code], cwd=hostile)
    assert not (tmp_path / "run").exists()
    assert list(runtime.iterdir()) == []
