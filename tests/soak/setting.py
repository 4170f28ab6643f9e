"""How much is done, on which image and where; the image unpacked, and overlays above it.

Not here: what is done.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.containers import bundled, mounted_in
from tests.support.mounting import PYTHON, ROOT, environment, in_mountinfo, run

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class Setting:
    """What every part is told. ``layout`` and ``tag`` name an image whose layers are plain or gzip (umoci reads no zstd)."""

    layout: Path
    tag: str
    work: Path
    """A directory of ours, not on a tmpfs: overlays lie there."""
    seconds: float
    """How long readers read and things are held, under each driver."""
    mounts: int
    readers: int
    stress: int
    """Seconds that each stressor has."""
    megabytes: int
    """Size of each file that fio writes."""
    trees: int
    """How many trees are generated, changed and committed, the image itself not counted."""

    @property
    def reference(self) -> str:
        """The image, for ocifs."""
        return f"oci:{self.layout}:{self.tag}"

    @property
    def cache(self) -> Path:
        """Where ocifs keeps its indexes."""
        return self.work / "cache"

    def unpacked(self) -> Path:
        """The image's tree in a plain directory, by umoci: made once, and never changed."""
        bundle = self.work / "unpacked"
        if not (bundle / "whole").exists():
            shutil.rmtree(bundle, ignore_errors=True)
            said = run(["umoci", "unpack", "--image", f"{self.layout}:{self.tag}", str(bundle)], limit=900)
            assert said.returncode == 0, said.stderr
            (bundle / "whole").touch()
        return bundle / "rootfs"

    @contextmanager
    def place(self, name: str) -> Iterator[Path]:
        """A new empty directory for the length of the block."""
        path = self.work / name
        _end_mounts(path)  # of a soak that was killed
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def over_the_image(self, driver: str, reference: str = "", upper: Path | None = None) -> Iterator[Path]:
        """A bundle, for the length of the block; its overlay is mounted on ``rootfs``, and ``upper`` outlives it."""
        words = ["--driver", driver, "--cache-dir", str(self.cache), *(["--upper", str(upper)] if upper else [])]
        with (
            self.place(f"bundle-{driver}") as place,
            bundled(reference or self.reference, place / "box", *words) as box,
        ):
            yield box

    @contextmanager
    def over_a_directory(self) -> Iterator[Path]:
        """An overlay over the unpacked image, as any container has one, for the length of the block."""
        lower = self.unpacked()
        with self.place("plain") as place:
            upper, work, merged = (place / name for name in ("upper", "work", "merged"))
            for path in (upper, work, merged):
                path.mkdir()
            options = f"lowerdir={lower},upperdir={upper},workdir={work}"
            try:
                said = run(["mount", "-t", "overlay", "-o", options, "ocifs-soak", str(merged)])
                assert said.returncode == 0, said.stderr
                yield merged
            finally:
                if in_mountinfo(merged):
                    run(["umount", "--lazy", str(merged)])


def _end_mounts(path: Path) -> None:
    """Take down whatever is mounted below a directory. A daemon whose mount is gone ends."""
    for name in reversed(mounted_in(path)):
        run(["umount", "--lazy", "--no-canonicalize", str(path / name)])
    assert mounted_in(path) == []


@contextmanager
def started(*words: str) -> Iterator[subprocess.Popen[str]]:
    """Start a function of `tests.soak.churn` for the length of the block; it is told and tells line by line."""
    process = subprocess.Popen(
        [*PYTHON, "-m", "tests.soak.churn", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(),
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def compared(one: Path, other: Path) -> list[str]:
    """The differences between two trees, by `scripts/compare`.

    Not of link counts: overlayfs counts, as names of one file, those that were parted from it by being written to.
    """
    said = run([sys.executable, str(ROOT / "scripts/compare"), str(one), str(other)], limit=900)
    assert said.returncode in {0, 1}, said.stderr
    *differences, _summary = said.stdout.splitlines()
    return [line for line in differences if ": link count: " not in line]
