"""mount, umount and ps as a person runs them: real mounts by real processes, each taken down whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from ocifs.cli import progress as module
from ocifs.driver import Verdict, choice
from tests.support.command import OCIFS, SAMPLE, Run, runner
from tests.support.layout import write_layout
from tests.support.mounting import agent, why_not
from tests.support.tarball import entry, tarball


def _why_not() -> str:
    if not os.path.exists("/dev/fuse") or os.geteuid() != 0:
        return "mounting needs /dev/fuse, and root for these tests"
    return ""


pytestmark = pytest.mark.skipif(_why_not() != "", reason=_why_not())


@pytest.fixture
def run(capfdbinary: pytest.CaptureFixture[bytes]) -> Run:
    return runner(capfdbinary)


def ocifs(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run ocifs in a process of its own, which must end: its pipes must not be held open by the daemon."""
    return subprocess.run([*OCIFS, *map(str, words)], capture_output=True, text=True, timeout=120, check=False)


def mounted(where: Path) -> list[dict[str, Any]]:
    lines = ocifs("ps", "--json").stdout.splitlines()
    return [one for one in map(json.loads, lines) if one["mountpoint"] == str(where)]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pid: int) -> None:
    """Wait for a process that is no child of ours."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([fd], [], [], 60)[0], f"process {pid} goes on"
    finally:
        os.close(fd)


def test_mount_answers_when_it_returns_and_says_nothing(place: Path) -> None:
    done = ocifs("mount", "--driver", "fuse", SAMPLE, place)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (place / "etc/motd").read_text() == "Welcome to the merged view of three layers.\n"
    assert subprocess.run([place / "usr/bin/hello"], stdout=subprocess.PIPE, check=True).stdout == (
        b"Hello from a file system that was never unpacked.\n"
    )
    with pytest.raises(OSError, match="Read-only file system"):
        (place / "new").write_text("")


@pytest.mark.skipif(why_not("erofs") != "", reason=why_not("erofs"))
def test_the_kernels_driver_is_taken_where_it_works_and_shows_the_mount_to_everybody(place: Path) -> None:
    done = ocifs("mount", "-v", SAMPLE, place)
    assert done.returncode == 0
    assert "driver" not in done.stderr
    (record,) = mounted(place)
    assert record["driver"] == "erofs"
    assert as_nobody(place, "etc/motd") == "Welcome to the merged view of three layers.\n"


@pytest.mark.parametrize(
    ("words", "reason", "others"),
    [
        (["--layer", "1"], "examination shows what only the fuse driver can", False),
        (["--examine"], "examination shows what only the fuse driver can", False),
        (["-o", "allow_other"], "the option allow_other is FUSE's", True),
    ],
    ids=["layer", "examine", "allow_other"],
)
def test_what_only_fuse_can_takes_fuse_and_v_says_why(
    place: Path, words: list[str], reason: str, *, others: bool
) -> None:
    done = ocifs("mount", "-v", *words, SAMPLE, place)
    assert done.returncode == 0
    assert f"ocifs: using the fuse driver: {reason}" in done.stderr
    (record,) = mounted(place)
    assert record["driver"] == "fuse"
    assert (as_nobody(place, "etc/group") != "EACCES") is others


def as_nobody(place: Path, name: str) -> str:
    """What a user who is not root reads in a file of the mount, or the name of the error."""
    answer: str = agent("as_user", 4242, place, "read", [name, 0, 4096])
    return answer if answer.startswith("E") else bytes.fromhex(answer).decode()


def test_doctor_says_which_driver_is_taken_and_why_not_the_faster_one(
    monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    def shown() -> dict[str, Any]:
        found: dict[str, Any] = next(
            one for one in map(json.loads, run("doctor", "--json").out.splitlines()) if one["name"] == "driver"
        )
        return found

    monkeypatch.setattr(choice, "erofs_verdict", lambda _: Verdict(works=True))
    assert (shown()["ok"], shown()["detail"]) == (True, "erofs")
    monkeypatch.setattr(choice, "erofs_verdict", lambda _: Verdict(works=False, reason="it makes zeros"))
    assert (shown()["ok"], shown()["detail"]) == (True, "fuse: it makes zeros")


def test_umount_returns_when_the_daemon_is_gone(place: Path) -> None:
    assert ocifs("mount", SAMPLE, place).returncode == 0
    (record,) = mounted(place)
    done = ocifs("umount", place)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not alive(record["pid"])
    assert list(place.iterdir()) == []
    assert mounted(place) == []


def test_umount_by_anyone_ends_the_daemon(place: Path) -> None:
    assert ocifs("mount", "--driver", "fuse", SAMPLE, place).returncode == 0
    (record,) = mounted(place)
    subprocess.run(["umount", place], check=True)
    wait_until_gone(record["pid"])
    assert mounted(place) == []


def test_sigterm_ends_the_daemon_and_the_mount(place: Path) -> None:
    assert ocifs("mount", "--driver", "fuse", SAMPLE, place).returncode == 0
    (record,) = mounted(place)
    os.kill(record["pid"], signal.SIGTERM)
    wait_until_gone(record["pid"])
    assert list(place.iterdir()) == []


def test_after_kill_9_the_next_mount_and_the_next_umount_clean_up(place: Path) -> None:
    for _ in range(2):
        assert ocifs("mount", "--driver", "fuse", SAMPLE, place).returncode == 0
        (record,) = mounted(place)
        os.kill(record["pid"], signal.SIGKILL)
        wait_until_gone(record["pid"])
        assert [one["state"] for one in mounted(place)] == ["dead"]
    done = ocifs("umount", place)
    assert done.returncode == 0, done.stderr
    assert mounted(place) == []
    assert list(place.iterdir()) == []


def test_ps_tells_what_is_mounted(place: Path) -> None:
    before = time.time_ns()
    assert ocifs("mount", "--driver", "fuse", "--upto", "2", SAMPLE, place).returncode == 0
    (record,) = mounted(place)
    assert before < record["started_ns"] < time.time_ns()
    assert (record["reference"], record["driver"], record["layers"]) == (SAMPLE, "fuse", 2)
    assert record["cache"] == os.environ["OCIFS_CACHE_DIR"]
    assert record["manifest"].startswith("sha256:")
    assert alive(record["pid"])
    table = ocifs("ps").stdout
    assert table.splitlines()[0].split() == ["MOUNT", "POINT", "IMAGE", "DRIVER", "LAYERS", "PID", "STATE", "SINCE"]
    assert [str(place), SAMPLE, "fuse", "2", str(record["pid"]), "live"] in [
        line.split()[:6] for line in table.splitlines()
    ]


def test_what_is_in_use_is_not_removed_from_the_cache(place: Path, run: Run) -> None:
    assert ocifs("mount", "--driver", "fuse", SAMPLE, place).returncode == 0
    assert b"in use, kept" in run("cache", "clear").out
    assert (place / "etc/group").read_text().startswith("root:x:0:\n")
    assert ocifs("umount", place).returncode == 0
    assert b"kept" not in run("cache", "clear").out


def test_the_tree_options_change_what_is_mounted(place: Path) -> None:
    assert ocifs("mount", "--layer", "3", SAMPLE, place).returncode == 0
    assert sorted(os.listdir(place / "usr/share")) == [".wh.doc", "themes"]
    assert ocifs("umount", place).returncode == 0
    assert ocifs("mount", f"oci:{SAMPLE}:latest#1", place).returncode == 0
    assert sorted(os.listdir(place / "etc")) == ["group", "motd", "os-release", "passwd", "shadow"]


def test_a_place_that_is_taken_is_refused_with_what_is_there(place: Path) -> None:
    assert ocifs("mount", SAMPLE, place).returncode == 0
    done = ocifs("mount", SAMPLE, place)
    assert done.returncode == 7
    assert SAMPLE in done.stderr or str(place) in done.stderr
    assert f"ocifs umount {place}" in done.stderr


@pytest.mark.parametrize(
    ("prepare", "status", "message"),
    [
        (lambda place: (place / "file").write_text(""), 7, "is not empty (1 names)"),
        (lambda place: place.rmdir(), 3, "there is no directory"),
        (lambda place: (place.rmdir(), place.write_text("")), 2, "is a file"),
    ],
    ids=["not-empty", "missing", "file"],
)
def test_a_place_that_cannot_be_mounted_on_is_refused_before_anything_is_indexed(
    place: Path, prepare: Any, status: int, message: str
) -> None:
    prepare(place)
    done = ocifs("mount", SAMPLE, place)
    assert (done.returncode, done.stdout) == (status, "")
    assert message in done.stderr
    assert not Path(os.environ["OCIFS_CACHE_DIR"]).exists()
    if place.is_file():
        place.unlink()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-o", "rw"], "makes no sense for an image"),
        (["-o", "noexec,frob"], "'frob' is not known"),
        (["--driver", "loop"], "'loop' is not one of"),
        (["--cache-memory", "much"], "is not a size"),
        (["--platform", "x"], "is not a platform"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_done(place: Path, words: list[str], message: str) -> None:
    done = ocifs("mount", *words, SAMPLE, place)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert not Path(os.environ["OCIFS_CACHE_DIR"]).exists()


def test_mount_options_reach_the_kernel(place: Path) -> None:
    assert ocifs("mount", "--driver", "fuse", "-o", "noexec,suid", "-o", "nonempty", SAMPLE, place).returncode == 0
    findmnt = ["findmnt", "-no", "OPTIONS,SOURCE,FSTYPE", str(place)]
    flags, source, kind = subprocess.run(findmnt, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    assert {"ro", "noexec", "nodev"} <= set(flags.split(","))
    assert "nosuid" not in flags.split(",")
    assert (source, kind) == (SAMPLE, "fuse.ocifs")


def test_an_image_that_is_refused_leaves_the_place_free(place: Path, tmp_path: Path) -> None:
    write_layout(tmp_path / "bad", [tarball(entry("a", b"x", checksum="bad"))])
    done = ocifs("mount", tmp_path / "bad", place)
    assert (done.returncode, done.stdout) == (4, "")
    assert mounted(place) == []
    assert ocifs("mount", SAMPLE, place).returncode == 0


def test_foreground_serves_until_it_is_told_to_end(place: Path) -> None:
    words = [*OCIFS, "mount", "--driver", "fuse", "--foreground", "-v", SAMPLE, str(place)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            said = ""
            while "is mounted on" not in said:
                line = server.stderr.readline()
                assert line, f"it ended: {said}"
                said += line
            assert (place / "etc/motd").exists()
            server.send_signal(signal.SIGINT)
            out, _ = server.communicate(timeout=60)
        finally:
            server.kill()
    assert (server.returncode, out) == (0, "")
    assert list(place.iterdir()) == []


def test_umount_of_what_is_not_mounted_is_not_found(place: Path) -> None:
    done = ocifs("umount", place)
    message = f"ocifs: nothing of ocifs is mounted on {place}; 'ocifs ps' lists what is\n"
    assert (done.returncode, done.stderr) == (3, message)


def test_a_busy_mount_is_named_with_who_uses_it_and_can_be_taken_lazily(place: Path) -> None:
    assert ocifs("mount", "--driver", "fuse", SAMPLE, place).returncode == 0
    (record,) = mounted(place)
    with subprocess.Popen(["sleep", "1000"], cwd=place / "etc") as user:
        try:
            done = ocifs("umount", place)
            assert done.returncode == 7
            assert f"sleep (pid {user.pid})" in done.stderr
            assert ocifs("umount", "--lazy", place).returncode == 0
            assert list(place.iterdir()) == []
        finally:
            user.kill()
    wait_until_gone(record["pid"])


def test_ls_agrees_with_gnu_ls_on_the_mount(place: Path) -> None:
    assert ocifs("mount", "--driver", "fuse", SAMPLE, place).returncode == 0
    words = ["ls", "-lnA", "--time-style=long-iso", "--quoting-style=literal"]
    environment = {**os.environ, "LC_ALL": "C"}
    for where in (".", "etc", "srv/almanac", "usr/bin", "dev", "home", "tmp"):
        theirs = subprocess.run([*words, place / where], env=environment, stdout=subprocess.PIPE, check=True).stdout
        ours = subprocess.run([*OCIFS, "ls", "-l", SAMPLE, where], stdout=subprocess.PIPE, check=True).stdout
        assert theirs.partition(b"\n")[2] == ours


def test_a_bar_shows_on_a_terminal_and_is_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 0.0)
    monkeypatch.setattr(module, "_PERIOD", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    master, slave = os.openpty()
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        with module.showing() as progress:
            progress.begin(1, "blob\x1b[31m", 4 << 20)
            progress.advance(1, 2 << 20)
            progress.end(1)
            progress.merging(1)
        terminal.flush()
        os.set_blocking(master, False)
        drawn = ""
        with contextlib.suppress(BlockingIOError):
            while True:
                drawn += os.read(master, 1 << 16).decode()
    os.close(master)
    assert "layer 1 blob\\x1b[31m" in drawn
    assert "2.0/4.2 MiB" in drawn or "2.0/4.0 MiB" in drawn
    assert "merging 1 layer" in drawn
    assert drawn.rstrip().endswith(("\x1b[2K", "\x1b[?25h"))


def test_nothing_is_shown_of_progress_when_piped() -> None:
    done = ocifs("index", SAMPLE)
    assert (done.returncode, done.stderr) == (0, "")
