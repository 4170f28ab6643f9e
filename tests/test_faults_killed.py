"""Processes that are killed, hang or fail half-way: while an image is indexed, merged or served.

Whatever dies, nobody hangs, nothing half-made is taken for whole, and the next command finds the place free.

Not here: damaged data (`tests/test_mount_faults.py`), signals in each phase of a mount (`tests/test_mount_endings.py`),
what a killed daemon leaves (`tests/test_mount_lifecycle.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support import layout
from tests.support.mounting import (
    LIMIT,
    Process,
    agent,
    answer,
    environment,
    in_mountinfo,
    mounted,
    ocifs,
    patched,
    record_of,
    run,
    start,
)
from tests.support.tarball import entry, tarball

if TYPE_CHECKING:
    from collections.abc import Iterator

SMALL = b"content of the file\n"
LARGE = hashlib.shake_256(b"killed").hexdigest(6 << 20).encode()
SUM = hashlib.sha256(LARGE).hexdigest()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Give a reference to an image of two layers, the second with a file of a dozen spans."""
    path = tmp_path_factory.mktemp("images") / "image"
    layers = [tarball(entry("file", SMALL)), tarball(entry("large", LARGE))]
    layout.write_layout(path, layers, compression="gzip")
    return f"oci:{path}"


INDEXING, MERGING = "ocifs.layer_index.child:_work", "ocifs.image_tree:write"
"""What the child process that indexes a layer does, and the one that merges layers."""

INSTEAD = """
import importlib, os, signal
module, name = os.environ["AT"].split(":")
def instead(*_, **__):
    if "TOLD" in os.environ:
        told = os.open(os.environ["TOLD"], os.O_WRONLY)
        os.write(told, b"%d\\n" % os.getpid())
        os.close(told)
        while True:
            signal.pause()
    os.kill(os.getpid(), signal.SIGKILL)
setattr(importlib.import_module(module), name, instead)
"""
"""Has a function tell its process's number through a FIFO and go on no more, or, without a FIFO, kill that process."""


@contextlib.contextmanager
def fifo(path: Path) -> Iterator[int]:
    """Make a FIFO and open it for reading."""
    os.mkfifo(path)
    told = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        yield told
    finally:
        os.close(told)


def line_of(told: int) -> str:
    assert select.select([told], [], [], LIMIT)[0], "nobody got there"
    return os.read(told, 100).decode().splitlines()[0]


def made(cache: Path) -> dict[str, int]:
    """How many files of each kind a cache holds; what a killed writer left in ``tmp`` is nobody's until it is swept."""
    return {kind: len(list((cache / kind).iterdir())) for kind in ("layers", "trees", "locks")}


@pytest.mark.parametrize(("what", "layers"), [(INDEXING, 0), (MERGING, 2)], ids=["indexing", "merging"])
def test_a_killed_child_is_one_sentence_and_nothing_is_left(
    image: str, tmp_path: Path, place: Path, driver: str, what: str, layers: int
) -> None:
    """As the kernel kills it when memory runs out."""
    cache = tmp_path / "cache"
    words = ["mount", "--driver", driver, "--cache-dir", str(cache), image, str(place)]
    done = run(patched(INSTEAD, *words), env={"AT": what})
    assert (done.returncode, done.stdout) == (6, "")
    assert "was ended by signal 9" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not in_mountinfo(place)
    assert record_of(place) is None
    assert made(cache) == {"layers": layers, "trees": 0, "locks": 0}
    with mounted(image, place, driver=driver, cache=cache) as mount:
        assert agent("sha256", mount.at("large")) == SUM


@pytest.mark.parametrize(("what", "layers"), [(INDEXING, 0), (MERGING, 2)], ids=["indexing", "merging"])
def test_a_child_ends_with_a_killed_mount_and_leaves_the_place_free(
    image: str, tmp_path: Path, place: Path, driver: str, what: str, layers: int
) -> None:
    cache = tmp_path / "cache"
    words = ["mount", "--driver", driver, "--cache-dir", str(cache), image, str(place)]
    with fifo(tmp_path / "told") as told:
        process = subprocess.Popen(
            patched(INSTEAD, *words),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment({"AT": what, "TOLD": str(tmp_path / "told")}),
        )
        try:
            child = Process(int(line_of(told)))
            process.kill()
            process.wait(LIMIT)
            assert child.gone(), "it goes on without its parent"
            child.close()
            assert record_of(place) is None
            assert list((cache / "trees").iterdir()) == []
            assert len(list((cache / "layers").iterdir())) == layers
            with mounted(image, place, driver=driver, cache=cache) as mount:
                assert agent("sha256", mount.at("large")) == SUM
            assert made(cache) == {"layers": 2, "trees": 1, "locks": 0}
        finally:
            process.kill()
            process.wait(LIMIT)


# -- decoding ------------------------------------------------------------------------------------------------------

RAISING = """
import os
from ocifs.layer_data import LayerData
plain = {name: getattr(LayerData, name) for name in ("begin", "go_on")}
def raising(self, *words):
    if os.path.exists(os.environ["FAIL"]):
        raise {"memory": MemoryError, "bug": ZeroDivisionError}[os.environ["HOW"]]("as the test wants")
    return plain[os.environ["WHERE"]](self, *words)
setattr(LayerData, os.environ["WHERE"], raising)
"""
"""Has decoding a span raise, in its thread, while a file is there."""


@pytest.mark.parametrize("where", ["begin", "go_on"])
@pytest.mark.parametrize("how", ["memory", "bug"])
def test_a_decode_thread_that_raises_costs_its_reader_an_eio_and_nobody_else_anything(
    image: str, tmp_path: Path, driver: str, how: str, where: str
) -> None:
    fail = tmp_path / "fail"
    env = {"FAIL": str(fail), "HOW": how, "WHERE": where}
    cache, path = tmp_path / "cache", tmp_path / "mnt"
    with mounted(image, path, "--cache-memory", "1", driver=driver, cache=cache, env=env, code=RAISING) as mount:
        fail.touch()
        offsets = list(range(0, len(LARGE), 1 << 20))
        readers = [start("pieces", mount.at("large"), offsets, 4096) for _ in range(6)]
        for reader in readers:
            assert set(answer(reader)) == {"EIO"}
        assert agent("read", mount.at("file"), 0, 100) == "EIO"
        assert {"memory": "MemoryError", "bug": "ZeroDivisionError"}[how] in mount.logged()
        assert agent("errors", [["lstat", mount.at("file")], ["listdir", str(mount.path)]]) == ["ok", "ok"]
        fail.unlink()
        assert agent("sha256", mount.at("large")) == SUM
        assert agent("read", mount.at("file"), 0, 100) == SMALL.hex()


# -- ending while somebody waits for data ------------------------------------------------------------------------------

HANGING = """
import os, threading
from ocifs.driver import session
from ocifs.layer_data import LayerData
def hanging(*_):
    os.write(os.open(os.environ["TOLD"], os.O_WRONLY), b".")
    threading.Event().wait()
LayerData.begin = hanging
session.GRACE = 0.1
"""
"""Has every decode say that it is under way and then take for ever, as a read from a server that is gone does."""

SLOW = """
import os, threading, pyfuse3
from ocifs.layer_data import LayerData
begin, terminate, terminated = LayerData.begin, pyfuse3.terminate, threading.Event()
def slow(*words):
    os.write(os.open(os.environ["TOLD"], os.O_WRONLY), b".")
    terminated.wait()
    return begin(*words)
def terminating():
    terminate()
    terminated.set()
LayerData.begin, pyfuse3.terminate = slow, terminating
"""
"""Has every decode say that it is under way and then wait until the session is ending."""

GONE = {"EIO", "ENOTCONN", "ECONNABORTED"}
"""What readers get whose request is dropped: FUSE itself answers the last two, EROFS, whose files are on FUSE, any."""


def wait_for_decode(told: int) -> None:
    assert select.select([told], [], [], LIMIT)[0], "nobody asked the daemon for data"
    assert os.read(told, 1) == b"."


@pytest.mark.parametrize("ending", ["SIGTERM", "umount"])
def test_decodes_that_hang_do_not_keep_a_mount_from_ending(
    image: str, tmp_path: Path, driver: str, ending: str
) -> None:
    env, cache = {"TOLD": str(tmp_path / "told")}, tmp_path / "cache"
    with (
        fifo(tmp_path / "told") as told,
        mounted(image, tmp_path / "mnt", driver=driver, cache=cache, env=env, code=HANGING, ended=True) as mount,
    ):
        readers = []
        for offset in (0, 6 << 20):  # two, as many as there are threads
            readers.append(start("read", mount.at("large"), offset, 4096))
            wait_for_decode(told)
        if ending == "umount":
            assert ocifs("umount", "--lazy", mount.path).returncode == 0
            for reader in readers:
                reader.kill()
                reader.communicate(timeout=LIMIT)
        else:
            mount.process.signal(signal.SIGTERM)
            for reader in readers:
                assert answer(reader) in GONE
        assert mount.process.gone(), "it waits for a thread that does not end"
        assert not in_mountinfo(mount.path)
        assert record_of(mount.path) is None
        assert not mount.log.exists(), "the log is kept if the daemon failed"


def test_a_decode_that_hangs_does_not_keep_a_process_in_the_foreground(
    image: str, tmp_path: Path, place: Path, driver: str
) -> None:
    """Unlike a daemon in the background it ends as a Python program does, which waits for threads of some kinds."""
    options = ["--foreground", "-v", "--driver", driver, "--cache-dir", str(tmp_path / "cache")]
    with fifo(tmp_path / "told") as told:
        process = subprocess.Popen(
            patched(HANGING, "mount", *options, image, place),
            stderr=subprocess.PIPE,
            text=True,
            env=environment({"TOLD": str(tmp_path / "told")}),
        )
        assert process.stderr is not None
        try:
            while "is mounted on" not in (line := process.stderr.readline()):
                assert line, "it ended"
            reader = start("read", f"{place}/large", 0, 4096)
            wait_for_decode(told)
            process.terminate()
            assert answer(reader) in GONE
            said = process.communicate(timeout=LIMIT)[1]
            assert process.returncode == 0, said
            assert "ending without an answer for who waits for data" in said
            assert not in_mountinfo(place)
        finally:
            process.kill()
            process.wait(LIMIT)


def test_who_waits_for_data_when_a_signal_ends_the_mount_gets_it(image: str, tmp_path: Path, driver: str) -> None:
    env, cache = {"TOLD": str(tmp_path / "told")}, tmp_path / "cache"
    with (
        fifo(tmp_path / "told") as told,
        mounted(image, tmp_path / "mnt", driver=driver, cache=cache, env=env, code=SLOW, ended=True) as mount,
    ):
        reader = start("hold", mount.at("file"))  # which does not close it: that would be one more request
        assert reader.stdin is not None
        reader.stdin.close()
        reader.stdin = None
        wait_for_decode(told)
        mount.process.signal(signal.SIGTERM)
        assert answer(reader) == hashlib.sha256(SMALL).hexdigest()
        assert mount.process.gone()
        assert not in_mountinfo(mount.path)
