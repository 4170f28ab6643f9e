"""A bundle's overlay under programs that wear file systems down, compared with an overlay over a plain directory."""

from __future__ import annotations

import re
import select
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tests.soak.setting import started
from tests.support.mounting import LIMIT, HangError, run

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    from tests.soak.setting import Setting

ELSEWHERE = {"bind-mount", "binderfs", "eventfd", "fanotify", "ioprio", "procfs"}
"""Stressors of stress-ng's class `filesystem` that are not about the file system they work on; fanotify asks every mount of
the machine, also those of other people that do not answer."""
PATIENCE = 60
"""Seconds that a stressor may take longer than it was told."""
ENDS = {0: "passed", 2: "failed", 3: "had no resources", 4: "is not for this file system"}
"""Exit statuses of stress-ng(1)."""


# -- stress-ng -----------------------------------------------------------------------------------------------------


def stressors() -> list[str]:
    """The stressors of file systems that this stress-ng has."""
    said = run(["stress-ng", "--class", "filesystem?"]).stdout
    found = re.search(r"class 'filesystem' stressors: (.+)", said)
    assert found, said
    return sorted(set(found[1].split()) - ELSEWHERE)


def stressed(root: Path, name: str, seconds: int) -> str:
    """What a stressor that verifies what it does says of a file system."""
    place = root / f"soak-{name}"
    assert run(["mkdir", str(place)]).returncode == 0
    # In a namespace that ends with its first process, and then all processes in it do: one that hangs leaves none behind.
    words = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    words += ["stress-ng", f"--{name}", "2", "--timeout", f"{seconds}s", "--verify"]
    words += ["--temp-path", str(place), "--quiet"]
    try:
        done = run(words, limit=seconds + PATIENCE)
    except HangError:
        return f"did not end within {seconds + PATIENCE} s"
    finally:
        assert run(["rm", "-rf", str(place)], limit=300).returncode == 0
    return ENDS.get(done.returncode, f"ended with status {done.returncode}: {(done.stdout + done.stderr)[-500:]}")


def stress(setting: Setting, driver: str) -> str:
    """Run stress-ng's stressors of file systems on a bundle's overlay and on one over a plain directory."""
    names = stressors()
    with setting.over_the_image(driver) as box, setting.over_a_directory() as plain:
        ours = {name: stressed(box / "rootfs", name, setting.stress) for name in names}
        theirs = {name: stressed(plain, name, setting.stress) for name in names}
    worse = {name: (ours[name], theirs[name]) for name in names if ours[name] != theirs[name]}
    counts = [f"{sum(one == end for one in ours.values())} {end}" for end in sorted(set(ours.values()))]
    said = f"{len(names)} stressors, {setting.stress} s each: {', '.join(counts)}; as on an overlay over a directory"
    assert not worse, f"{said} but for {worse}"
    return said


# -- fio -----------------------------------------------------------------------------------------------------------


class Job(NamedTuple):
    """A way in which fio writes, and how it is told."""

    name: str
    words: tuple[str, ...]


JOBS = (
    Job("written at random", ("--rw=randrw", "--ioengine=psync", "--bsrange=4k-64k")),
    Job("written at random through a mapping", ("--rw=randwrite", "--ioengine=mmap", "--bs=4k")),
    Job("written in order, past the page cache", ("--rw=write", "--ioengine=psync", "--bs=128k", "--direct=1")),
    Job("synced", ("--rw=randwrite", "--ioengine=sync", "--bs=16k", "--fsync=64")),
)


def verified(root: Path, job: Job, megabytes: int) -> str:
    """What fio says of a job whose blocks it reads back and verifies; empty if all is well."""
    place = root / "soak-fio"
    assert run(["mkdir", str(place)]).returncode == 0
    words = ["fio", "--name=soak", f"--directory={place}", f"--size={megabytes}m", "--numjobs=2", "--loops=2"]
    words += ["--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--output-format=terse", *job.words]
    done = run(words, limit=900, cwd=root)  # where it leaves what it noted
    assert run(["rm", "-rf", str(place)]).returncode == 0
    return "" if done.returncode == 0 else f"status {done.returncode}: {(done.stdout + done.stderr)[-500:]}"


def copied_up(root: Path, lower: Path) -> str:
    """What fio says of the image's largest file, copied up by being opened, written and verified in place."""
    largest = max((path for path in lower.rglob("*") if _is_file(path)), key=lambda path: path.stat().st_size)
    file = root / largest.relative_to(lower)
    words = ["fio", "--name=soak", f"--filename={file}", f"--size={largest.stat().st_size & ~4095}", "--rw=randwrite"]
    words += ["--bs=4k", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--output-format=terse"]
    done = run(words, limit=900, cwd=root)
    return "" if done.returncode == 0 else f"status {done.returncode}: {(done.stdout + done.stderr)[-500:]}"


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def fio(setting: Setting, driver: str) -> str:
    """Write and verify with fio in several ways on a bundle's overlay and on one over a plain directory."""
    lower = setting.unpacked()
    with setting.over_the_image(driver) as box, setting.over_a_directory() as plain:
        jobs: dict[str, Callable[[Path], str]] = {
            **{job.name: partial(verified, job=job, megabytes=setting.megabytes) for job in JOBS},
            "the image's largest file": lambda root: copied_up(root, lower),
        }
        for name, job in jobs.items():
            ours, theirs = job(box / "rootfs"), job(plain)
            assert ours == theirs == "", f"{name}: {ours or 'well'}; over a plain directory: {theirs or 'well'}"
    return f"{len(jobs)} jobs, two files of {setting.megabytes} MB each: every block verified ({'; '.join(jobs)})"


# -- what is held --------------------------------------------------------------------------------------------------


def stale(setting: Setting, driver: str) -> str:
    """Hold files and directories open for long while the kernel forgets and others write: no ESTALE, nothing changes."""
    until = time.monotonic() + setting.seconds
    drop = Path("/proc/sys/vm/drop_caches")
    rounds = 0
    with (
        setting.over_the_image(driver) as box,
        started("hold", str(box / "rootfs"), "500") as holder,
        started("copy_up", str(box / "rootfs")) as writer,
    ):
        held = _answer(holder)
        assert _answer(writer)
        while rounds < 3 or time.monotonic() < until:  # three: pages, inodes, both
            drop.write_text(str(rounds % 3 + 1), encoding="ascii")
            for process in (writer, holder):
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
                said = _answer(process)
                assert said == "well", f"after {rounds} rounds: {said}"
            rounds += 1
    return f"{held} held for {setting.seconds:g} s, looked at {rounds} times after dropping caches: no ESTALE, all the same"


def _answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], LIMIT)[0], "who holds the tree says nothing any more"
    return process.stdout.readline().strip()
