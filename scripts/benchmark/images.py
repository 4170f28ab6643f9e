"""What is measured on: the reference image, the same tree unpacked and packed for the peers, images of many entries.

All of it lies below the work directory and is made once; a thing is there when it has its final name. The reference image
is taken as it is: `scripts/make-image` makes one, `--image` names another with the tags `gzip` and `plain`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import stat
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from benchmark.machine import say
from benchmark.processes import FailedError, run

SMALL = 64 << 10
"""Bytes a small file has at most."""
SMALL_FILES = 20_000
"""How many small files are read at most; the reference image has fewer."""
RANDOM_FROM = 1 << 20
"""Bytes a file has at least to be read at random places."""
NEEDED = 9 << 30
"""Bytes of disk space that a first run takes, the making of the reference image included."""


class Layout(NamedTuple):
    """An image in an OCI layout: how ocifs and umoci name it, and its layers' blobs from the base up."""

    path: Path
    tag: str
    blobs: list[Path]

    @property
    def reference(self) -> str:
        """For ocifs."""
        return f"oci:{self.path}:{self.tag}"

    @property
    def size(self) -> int:
        """Bytes of the layers as stored."""
        return sum(blob.stat().st_size for blob in self.blobs)


class Place(NamedTuple):
    """4 KiB to be read: a file's path below the root, and the offset in it."""

    path: bytes
    offset: int


class Contents(NamedTuple):
    """What the reference image's tree holds, as the kernel's overlayfs shows it; every contender is held to it."""

    entries: int
    """Names, the root included: what `find` prints in lines."""
    small: list[bytes]
    files: list[bytes]
    large: bytes
    random: list[Place]
    """In the order in which they are to be read."""


class Images(NamedTuple):
    """Everything below the work directory that workloads read."""

    reference: Layout
    names: list[Path]
    """The layers again, under names that say what they are (layer1.tar.gz)."""
    unpacked: list[Path]
    """The layers as directories, from the base up, with the kernel's whiteouts."""
    squashfs: Path
    archive: Path
    """The merged tree as one tar.gz."""


def read_layout(path: Path, tag: str) -> Layout:
    """Find a tag's layers. Raises FailedError if it is not that kind of layout."""
    try:
        manifests = json.loads((path / "index.json").read_bytes())["manifests"]
        (digest,) = (
            one["digest"] for one in manifests if one["annotations"]["org.opencontainers.image.ref.name"] == tag
        )
        manifest = json.loads((path / "blobs" / digest.replace(":", "/")).read_bytes())
        return Layout(path, tag, [path / "blobs" / layer["digest"].replace(":", "/") for layer in manifest["layers"]])
    except (OSError, KeyError, ValueError) as error:
        raise FailedError(f"{path} is no OCI layout with one image tagged {tag!r}") from error


def once(place: Path, make: Callable[[Path], None], words: str) -> Path:
    """Have something made if it is not there: under another name first, so that half a thing is never taken for one."""
    if not place.exists():
        say(f"{words}: {place}")
        half = place.with_name(f"{place.name}.half")
        if half.is_dir() and not half.is_symlink():
            shutil.rmtree(half)
        half.unlink(missing_ok=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        make(half)
        half.rename(place)
    return place


def check_space(work: Path) -> None:
    """Raise FailedError if a first run would not fit."""
    free = shutil.disk_usage(work).free
    if free < NEEDED and not (work / "whole").exists():
        raise FailedError(f"{work} has {free / 1e9:.0f} GB free, and a first run needs {NEEDED / 1e9:.0f}; see --work")


def prepare(checkout: Path, work: Path, image: Path | None) -> Images:
    """Make or find everything but the images of many entries."""
    check_space(work)
    layout = image or once(
        work / "reference",
        lambda out: _make_image(checkout, out),
        "building the reference image, which takes some minutes",
    )
    reference, plain = read_layout(layout, "gzip"), read_layout(layout, "plain")
    data = work / f"data-{reference.blobs[0].name[:8]}{reference.blobs[-1].name[:8]}"
    unpacked = [
        once(data / f"layer{number}", partial(_unpack, blob), "unpacking a layer")
        for number, blob in enumerate(plain.blobs, 1)
    ]
    names = [data / f"layer{number}.tar.gz" for number in range(1, len(reference.blobs) + 1)]
    for name, blob in zip(names, reference.blobs, strict=True):
        name.unlink(missing_ok=True)
        name.symlink_to(blob.absolute())
    images = Images(reference, names, unpacked, data / "tree.squashfs", data / "tree.tar.gz")
    (work / "whole").touch()
    return images


def _make_image(checkout: Path, out: Path) -> None:
    run(checkout / "scripts/make-image", out, limit=3600)


def _unpack(blob: Path, out: Path) -> None:
    """Unpack one plain layer as a runtime does for overlayfs: whiteouts become devices 0:0 and opaque directories."""
    out.mkdir(parents=True)
    out.chmod(0o755)
    run(
        "tar", "--extract", "--file", blob, "--directory", out, "--numeric-owner", "--same-permissions",
        "--xattrs", "--xattrs-include=*", "--sparse", limit=600,
    )  # fmt: skip
    for folder, _, names in os.walk(os.fsencode(out)):
        for name in (name for name in names if name.startswith(b".wh.")):
            times = os.lstat(folder)
            os.unlink(os.path.join(folder, name))
            if name == b".wh..wh..opq":
                os.setxattr(folder, "trusted.overlay.opaque", b"y")
            else:
                os.mknod(os.path.join(folder, name.removeprefix(b".wh.")), stat.S_IFCHR, os.makedev(0, 0))
            os.utime(folder, ns=(times.st_atime_ns, times.st_mtime_ns))


def pack_squashfs(tree: Path, out: Path) -> None:
    """Make the merged tree a squashfs: zstd, mksquashfs's own settings otherwise."""
    run("mksquashfs", tree, out, "-comp", "zstd", "-no-progress", "-quiet", limit=1800)


def pack_archive(tree: Path, out: Path) -> None:
    """Make the merged tree a tar.gz."""
    with out.open("wb") as file:
        pack = subprocess.Popen(("tar", "-C", tree, "--numeric-owner", "-cf", "-", "."), stdout=subprocess.PIPE)
        status = subprocess.run(("gzip", "-6", "-n"), stdin=pack.stdout, stdout=file, check=False).returncode
    if pack.wait() or status:
        raise FailedError("the merged tree could not be packed as tar.gz")


def wide(checkout: Path, work: Path, entries: int, *, layers: int = 100) -> Layout:
    """Make or find an image of so many empty files; in one layer they lie in one directory."""
    make = checkout / "scripts/make-wide-image"
    flat = ["--flat"] if layers == 1 else []
    path = once(
        work / (f"flat-{entries}" if flat else f"wide-{entries}"),
        lambda out: void(run(make, out, str(entries), str(layers), *flat, limit=1800)),
        f"making an image of {entries:,} entries in {layers} layers",
    )
    return read_layout(path, "latest")


def void(_: object) -> None:
    """Nothing, of anything."""


# -- the tree ------------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """A regular file: path, size, whether it has holes, whether it has other names (which ratarmount fails to read)."""

    path: bytes
    size: int
    sparse: bool
    linked: bool = False


def walk(tree: Path) -> tuple[int, list[Found]]:
    """Count the names below and including a directory; give its regular files by path, in byte order."""
    root = os.fsencode(tree)
    entries, files = 1, []
    for folder, directories, names in os.walk(root):
        entries += len(directories) + len(names)
        for name in names:
            path = os.path.join(folder, name)
            status = os.lstat(path)
            if stat.S_ISREG(status.st_mode):
                sparse = status.st_blocks * 512 < status.st_size
                files.append(Found(os.path.relpath(path, root), status.st_size, sparse, status.st_nlink > 1))
    return entries, sorted(files)


def choose(entries: int, files: list[Found], reads: int) -> Contents:
    """Choose what is read: the same for the same tree, in every run."""
    whole = [file for file in files if not file.sparse and not file.linked]
    big = [file for file in whole if file.size >= RANDOM_FROM]
    dice = random.Random(4096)  # noqa: S311 (the same places every time are the point)
    picked = dice.choices(big, weights=[file.size for file in big], k=reads)
    return Contents(
        entries=entries,
        small=[file.path for file in whole if 0 < file.size <= SMALL][:SMALL_FILES],
        files=[file.path for file in whole],
        large=max(whole, key=lambda file: (file.size, file.path)).path,
        random=[Place(file.path, dice.randrange(file.size // 4096) * 4096) for file in picked],
    )
