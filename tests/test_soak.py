"""Each part of `scripts/soak` for a moment, on a small image: what it runs for long works, and it says so."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.soak import committed, mounted, overlaid
from tests.soak.setting import Setting, started
from tests.support.containers import needs_containers, write_image
from tests.support.mounting import in_mountinfo, run
from tests.support.tarball import DIR, SYMLINK, entry

if TYPE_CHECKING:
    from collections.abc import Callable

SCRIPT = Path(__file__).resolve().parents[1] / "scripts/soak"
needs_umoci = pytest.mark.skipif(shutil.which("umoci") is None, reason="umoci is not installed")


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    place = tmp_path_factory.mktemp("soak")
    files = [entry(f"srv/tree/{number % 7}/{number}", os.urandom(number * 500)) for number in range(100)]
    mount_points = [entry(f"{name}/", type=DIR) for name in committed.MOUNT_POINTS]
    large = [entry("srv/large", os.urandom(3 << 20)), entry("srv/link", type=SYMLINK, link="large")]
    write_image(place / "image", *mount_points, *files, *large)
    work = place / "work"
    work.mkdir()
    return Setting(
        layout=place / "image",
        tag="latest",
        work=work,
        seconds=0,
        mounts=3,
        readers=64,
        stress=1,
        megabytes=1,
        trees=1,
    )


@needs_containers
@needs_umoci
@pytest.mark.parametrize(
    ("part", "says"),
    [
        (mounted.mounts, "nothing left"),
        (mounted.readers, ", 0 wrong"),
        (overlaid.stale, "no ESTALE"),
        (committed.commits, "each committed image shows what its bundle showed"),
    ],
    ids=["mounts", "readers", "stale", "commits"],
)
def test_a_part_finds_nothing_and_says_what_it_saw(
    setting: Setting, driver: str, part: Callable[[Setting, str], str], says: str
) -> None:
    assert says in part(setting, driver)
    assert sorted(path.name for path in setting.work.iterdir()) in (["cache"], ["cache", "unpacked"])


@needs_containers
@needs_umoci
@pytest.mark.skipif(shutil.which("fio") is None, reason="fio is installed by scripts/soak")
def test_fio_verifies_what_it_writes(setting: Setting, driver: str) -> None:
    assert "every block verified" in overlaid.fio(setting, driver)


@needs_containers
@needs_umoci
@pytest.mark.skipif(shutil.which("stress-ng") is None, reason="stress-ng is installed by scripts/soak")
def test_stressors_end_as_on_any_overlay(setting: Setting, driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"dir", "hdd", "rename", "utime", "xattr"} <= set(overlaid.stressors())
    monkeypatch.setattr(overlaid, "stressors", lambda: ["dir", "rename"])
    assert "2 stressors, 1 s each: 2 passed" in overlaid.stress(setting, driver)


@needs_umoci
@needs_containers
def test_a_wrong_byte_is_found(setting: Setting) -> None:
    """What umoci unpacked is what readers are held to."""
    file = setting.unpacked() / "etc/motd"
    before = file.read_bytes()
    try:
        file.write_bytes(before.upper())
        with pytest.raises(AssertionError, match=r"128 wrong; .*etc/motd"):
            mounted.readers(setting, "fuse")
    finally:
        file.write_bytes(before)


def test_the_program_names_its_parts() -> None:
    said = subprocess.run([sys.executable, SCRIPT, "--list"], capture_output=True, text=True, check=True).stdout
    assert [line.split()[0] for line in said.splitlines()] == ["mounts", "readers", "stress", "fio", "stale", "commits"]


@needs_containers
def test_changes_that_cannot_be_made_are_found(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(committed, "CHANGES", 40)
    monkeypatch.setattr(committed, "started", lambda *words: started(*words[:-1], "0"))
    with pytest.raises(AssertionError, match="seed 0: only 0 of 40 changes could be made"):
        committed.commits(setting, "fuse")


@needs_containers
def test_what_a_killed_soak_left_mounted_is_taken_down(setting: Setting) -> None:
    with setting.place("left") as place:
        left = place / "box" / "mounted"
        left.mkdir(parents=True)
        assert run(["mount", "-t", "tmpfs", "none", str(left)]).returncode == 0
        with setting.place("left"):
            assert not in_mountinfo(left)
            assert not left.exists()


@needs_containers
def test_a_stressor_that_hangs_is_said_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the processes that it started, which hold a lock as long as there are any."""
    program, lock = tmp_path / "stress-ng", tmp_path / "lock"
    program.write_text(f"#!/bin/sh\nexec 9> {lock}\nflock 9\nsleep 1234 &\nwait\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(overlaid, "PATIENCE", 1)
    assert overlaid.stressed(tmp_path, "dir", 0) == "did not end within 1 s"
    assert lock.exists()
    assert run(["flock", "--timeout", "20", str(lock), "true"]).returncode == 0
    assert not (tmp_path / "soak-dir").exists()
