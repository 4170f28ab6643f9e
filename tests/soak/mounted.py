"""Mounts in a row, and many readers of one mount."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ocifs.daemon import runtime_dir
from tests.support.mounting import Mount, agent, in_mountinfo, mounted, record_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.soak.setting import Setting

MEGABYTE = 10**6
THREADS = 16
"""What a daemon may have at most: the loop, its workers, decoders."""
MEMORY = 3 * (128 << 20)
"""Bytes that a daemon may have after much reading: the default bound of its cache is 128 MiB, of which malloc makes up to
1.8 times as much, and each of many readers has a piece of what it waits for."""


class Figures(NamedTuple):
    """What a daemon uses."""

    descriptors: int
    threads: int
    memory: int
    """Bytes that it allocated (RssAnon)."""


def figures(mount: Mount) -> Figures:
    """Look at a mount's daemon."""
    threads = len(list(Path(f"/proc/{mount.pid}/task").iterdir()))
    return Figures(len(mount.process.descriptors()), threads, mount.process.memory())


def span(numbers: Sequence[float]) -> str:
    """The smallest and the largest, once if they are the same for people."""
    least, most = (f"{number:.1f}".removesuffix(".0") for number in (min(numbers), max(numbers)))
    return least if least == most else f"{least} to {most}"


def mounts(setting: Setting, driver: str) -> str:
    """Mount and unmount, again and again: every daemon uses what the first did, and nothing is left of any."""
    seen = []
    with setting.place(f"mounts-{driver}") as place:
        for number in range(1, setting.mounts + 1):
            with mounted(setting.reference, place / "mnt", driver=driver, cache=setting.cache) as mount:
                assert agent("entries", mount.path)
                seen.append(figures(mount))
            left = [path.name for path in runtime_dir().glob(Path(mount.record["log"]).stem + "*")]
            assert left == [], f"after mount {number} there are {left} in {runtime_dir()}"
            assert not in_mountinfo(place / "mnt"), f"after mount {number} there is a mount"
            assert record_of(place / "mnt") is None, f"after mount {number} there is a record"
    left = [str(path) for kind in ("locks", "tmp") for path in (setting.cache / kind).iterdir()]
    assert left == [], f"there are {left}"
    descriptors, threads, memory = (list(column) for column in zip(*seen, strict=True))
    said = (
        f"{setting.mounts} mounts: {span(descriptors)} descriptors, {span(threads)} threads, "
        f"{span([one / MEGABYTE for one in memory])} MB each; nothing left"
    )
    assert len(set(descriptors)) == 1, said
    assert max(threads) <= THREADS, said
    assert max(memory) < 1.25 * min(memory), said
    return said


def readers(setting: Setting, driver: str) -> str:
    """Many processes read all files in orders of their own and compare with checksums of what umoci unpacked."""
    unpacked = agent("walk", setting.unpacked(), limit=900)
    sums = {path: one["sha256"] for path, one in unpacked.items() if one["kind"] == "file"}
    with (
        setting.place(f"readers-{driver}") as place,
        mounted(setting.reference, place / "mnt", driver=driver, cache=setting.cache) as mount,
    ):
        expected = {mount.at(path): digest for path, digest in sums.items()}
        seen, read, wrong = [figures(mount)], 0, []
        for _ in range(2):
            half = setting.seconds / 2
            words = (list(expected), expected, setting.readers, 0 if half else 1, half)
            done = agent("readers", *words, limit=half + 600)
            read += done["read"]
            wrong += done["wrong"]
            seen.append(figures(mount))
        logged = mount.logged()
    descriptors, threads, memory = zip(*seen, strict=True)
    said = (
        f"{setting.readers} readers of {len(sums)} files: {read} read in {setting.seconds:g} s, {len(wrong)} wrong; before, "
        f"half-way and after: {_listed(descriptors)} descriptors, {_listed(threads)} threads, "
        f"{_listed([one / MEGABYTE for one in memory])} MB"
    )
    assert read >= 2 * setting.readers, said
    assert wrong == [], f"{said}: {wrong[:5]}"
    assert logged == "", f"{said}; the daemon complained: {logged[:1000]}"
    assert len(set(descriptors)) == 1, said
    assert max(threads) <= THREADS, said
    assert memory[2] < 1.2 * memory[1] + 10 * MEGABYTE, said
    assert memory[2] < MEMORY, said
    return said


def _listed(numbers: Sequence[float]) -> str:
    return "/".join(f"{number:.0f}" for number in numbers)
