"""Each way to mount the reference image's tree, behind one interface: mount it for a block's time, say which process serves.

Whoever is not installed is left out with a reason (`lacking`). Everything is mounted read-only.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

from benchmark.images import Images, Layout
from benchmark.machine import Tools
from benchmark.processes import FailedError, mounted, real, run, served, unmount

RUNTIME = Path("/run/ocifs")
"""Where root's ocifs keeps its mount records; in here it is a private one."""

Mount = Callable[[Path], AbstractContextManager[int | None]]
"""Mounts at a directory for a block's time; the block gets the serving process's number, None for the kernel's own."""


class Mounter(NamedTuple):
    """A contender that mounts."""

    key: str
    mount: Mount
    lacking: str = ""
    """Why it cannot take part; nothing if it can."""
    superset: str = ""
    """Why it shows more than the image holds; nothing if it shows the same."""
    only_in: frozenset[str] = frozenset()
    """The only workloads it takes part in; all if empty."""
    slow_in: frozenset[str] = frozenset()
    """Workloads that it sits out when there is little time."""

    def sits_out(self, workload: str, *, thorough: bool) -> bool:
        """Whether it does not take part, for reasons of time."""
        if self.only_in and (workload not in self.only_in or not thorough):
            return True
        return workload in self.slow_in and not thorough


def use_private_runtime() -> None:
    """Hide the machine's own mounts of ocifs from those of the benchmark, and the other way round."""
    RUNTIME.mkdir(mode=0o700, exist_ok=True)
    run("mount", "-t", "tmpfs", "-o", "mode=0700", "tmpfs", RUNTIME)


# -- ocifs ---------------------------------------------------------------------------------------------------------


def mount_words(tools: Tools, driver: str, cache: Path, reference: str, place: Path) -> list[str | Path]:
    """The command that mounts with ocifs."""
    return [tools.ocifs, "mount", "--driver", driver, "--cache-dir", cache, reference, place]


def daemon_of(place: Path) -> int:
    """The process that serves an ocifs mount."""
    for path in RUNTIME.glob("*.json"):  # what `ocifs ps --json` prints, without the time it takes
        with contextlib.suppress(ValueError, FileNotFoundError):
            record = json.loads(path.read_bytes())
            if record["mountpoint"] == str(real(place)):
                return int(record["pid"])
    raise FailedError("ocifs has no record of the mount")


def take_down(place: Path, pid: int | None) -> None:
    """Unmount what ocifs mounted and wait until its daemon is gone."""
    unmount(place)
    if pid is None:
        return
    try:
        end = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if not select.select([end], [], [], 20)[0]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            raise FailedError("the daemon was still there 20 s after its mount had gone")
    finally:
        os.close(end)
        # Daemons become children of process 1, which we are.
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


@contextlib.contextmanager
def ocifs(tools: Tools, driver: str, cache: Path, layout: Layout, place: Path) -> Iterator[int]:
    """Mount an image with ocifs; the daemon's number."""
    pid = None
    try:
        run(*mount_words(tools, driver, cache, layout.reference, place), limit=300)
        pid = daemon_of(place)
        yield pid
    finally:
        take_down(place, pid)


# -- peers ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _by_kernel(words: list[str | Path], place: Path) -> Iterator[None]:
    with mounted(place, *words, place):
        yield


def overlay_words(images: Images) -> list[str | Path]:
    """The command that mounts the unpacked layers with the kernel's overlayfs; the mount point is to follow."""
    return ["mount", "-t", "overlay", "-o", f"ro,lowerdir={_lower(images)}", "overlay"]


def _lower(images: Images) -> str:
    return ":".join(str(layer) for layer in reversed(images.unpacked))


def ratarmount_words(tools: Tools, images: Images, folder: Path, place: Path) -> list[str | Path]:
    """The command that serves the union of the layers with ratarmount, its indexes in `folder`."""
    threads = str(len(os.sched_getaffinity(0)))
    return [tools.peers / "ratarmount", "-f", "-P", threads, "--index-folders", folder, *images.names, place]


def mounters(tools: Tools, images: Images, work: Path) -> list[Mounter]:
    """Everybody who can mount the reference image's tree, in the order of the table's columns."""
    cache, indexes = work / "cache", work / "ratarmount"
    indexes.mkdir(exist_ok=True)

    def lacking(program: str) -> str:
        return tools.missing.get(program, "")

    def lacking_module(name: str) -> str:
        if any(line.split()[-1] == name for line in Path("/proc/filesystems").read_text().splitlines()):
            return ""
        with contextlib.suppress(FailedError):
            run("modprobe", name)
            return ""
        return f"this kernel has no {name}"

    def squash() -> str:
        return (
            ""
            if images.squashfs.exists()
            else "there is no squashfs of the tree, for mksquashfs is not installed or failed"
        )

    return [
        Mounter("ocifs-erofs", lambda place: ocifs(tools, "erofs", cache, images.reference, place)),
        Mounter("ocifs-fuse", lambda place: ocifs(tools, "fuse", cache, images.reference, place)),
        Mounter("overlayfs", lambda place: _by_kernel(overlay_words(images), place), lacking_module("overlay")),
        Mounter(
            "squashfs",
            lambda place: _by_kernel(["mount", "-t", "squashfs", "-o", "ro,loop", images.squashfs], place),
            squash() or lacking_module("squashfs"),
        ),
        Mounter(
            "fuse-overlayfs",
            lambda place: served(place, "fuse-overlayfs", "-f", "-o", f"lowerdir={_lower(images)}", place),
            lacking("fuse-overlayfs"),
        ),
        Mounter(
            "squashfuse",
            lambda place: served(place, "squashfuse_ll", "-f", images.squashfs, place),
            lacking("squashfuse_ll") or squash(),
        ),
        Mounter(
            "ratarmount",
            lambda place: served(place, *ratarmount_words(tools, images, indexes, place), limit=300),
            lacking("ratarmount"),
            superset="it shows what upper layers deleted, and the deletion marks: it does not apply whiteouts",
            slow_in=frozenset({"small", "readers", "runc", "large"}),
        ),
        Mounter(
            "archivemount",
            lambda place: served(place, "archivemount", "-f", "-o", "readonly", images.archive, place, limit=120),
            lacking("archivemount"),
            only_in=frozenset({"find"}),
        ),
    ]
