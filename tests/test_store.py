"""The cache: entries appear whole or not at all, one process builds while others wait, foreign directories are refused."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from ocifs.errors import DamagedError, MachineError, StaleFormatError
from ocifs.store import Freed, Kind, Store, StoredFile, default_path


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "cache") as opened:
        yield opened


def put(store: Store, kind: Kind, key: str, data: bytes) -> None:
    with store.new(kind) as new:
        new.file.write(data)
        new.publish(key)


def read(store: Store, kind: Kind, key: str) -> bytes | None:
    file = store.open_entry(kind, key)
    if file is None:
        return None
    with file:
        return file.read_at(0, file.size)


def test_an_entry_is_there_once_published(store: Store) -> None:
    assert read(store, Kind.LAYER, "k") is None
    with store.new(Kind.LAYER) as new:
        new.file.write(b"whole")
        assert read(store, Kind.LAYER, "k") is None
        new.publish("k")
    assert read(store, Kind.LAYER, "k") == b"whole"


def test_what_was_not_published_leaves_nothing(store: Store) -> None:
    with pytest.raises(ZeroDivisionError), store.new(Kind.LAYER) as new:
        new.file.write(b"half")
        _ = 1 // 0
    assert list(store.entries()) == []
    assert os.listdir(store.path / "tmp") == []


def test_directories_are_private(store: Store) -> None:
    for directory in (store.path, *(path for path in store.path.iterdir())):
        assert directory.stat().st_mode & 0o777 == 0o700


def test_a_cache_that_others_can_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o700)
    (tmp_path / "cache").chmod(0o770)
    with pytest.raises(MachineError, match=r"can be written by others; run 'chmod go-w "):
        Store(tmp_path / "cache")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory to somebody else")
def test_a_cache_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o700)
    os.chown(tmp_path / "cache", 1234, 1234)
    with pytest.raises(MachineError, match="belongs to user 1234, not to you"):
        Store(tmp_path / "cache")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory to somebody else")
def test_a_directory_inside_that_belongs_to_somebody_else_is_refused(tmp_path: Path) -> None:
    Store(tmp_path / "cache").close()
    os.chown(tmp_path / "cache" / "trees", 1234, 1234)
    with pytest.raises(MachineError, match="trees belongs to user 1234"):
        Store(tmp_path / "cache")


def test_a_file_in_the_way_is_told(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("not a directory")
    with pytest.raises(
        MachineError, match=r"cannot create the cache directory .*; choose another place with --cache-dir"
    ):
        Store(tmp_path / "cache")


def test_an_entry_that_is_a_symlink_is_not_followed(store: Store, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"foreign")
    (store.path / "trees" / "k").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(MachineError, match="cannot read the cache directory"):
        store.open_entry(Kind.TREE, "k")


def test_stale_and_damaged_entries_are_built_again(store: Store) -> None:
    for error in (StaleFormatError("old"), DamagedError("bits")):
        put(store, Kind.TREE, "k", b"bad")

        def load(file: StoredFile, error: Exception = error) -> bytes:
            data = file.read_at(0, 10)
            if data == b"bad":
                raise error
            file.close()
            return data

        assert (
            store.get_or_build(Kind.TREE, "k", load=load, build=lambda: put(store, Kind.TREE, "k", b"good")) == b"good"
        )
        assert read(store, Kind.TREE, "k") == b"good"


def test_a_failing_build_leaves_no_entry_and_no_lock(store: Store) -> None:
    def build() -> None:
        message = "no"
        raise DamagedError(message)

    with pytest.raises(DamagedError, match=r"^no$"):
        store.get_or_build(Kind.LAYER, "k", load=lambda file: file, build=build)
    assert read(store, Kind.LAYER, "k") is None
    assert os.listdir(store.path / "locks") == []


def test_gc_takes_reframed_copies_first_and_the_least_recently_used_first(store: Store) -> None:
    for number, (kind, key) in enumerate(
        [(Kind.LAYER, "old"), (Kind.REFRAMED, "a"), (Kind.REFRAMED, "b"), (Kind.LAYER, "new")]
    ):
        put(store, kind, key, bytes(8192))
        os.utime(store.path / kind.value / key, (1000 + number, 1000 + number))
    assert [(one.kind, one.key) for one in store.entries()] == [
        (Kind.REFRAMED, "a"),
        (Kind.REFRAMED, "b"),
        (Kind.LAYER, "old"),
        (Kind.LAYER, "new"),
    ]
    assert store.gc(limit=3 * 8192) == Freed(entries=1, size=8192, kept_in_use=0)
    assert [one.key for one in store.entries()] == ["b", "old", "new"]
    assert store.gc(limit=3 * 8192) == Freed(0, 0, 0)


def test_entries_in_use_survive_gc_and_clear(store: Store) -> None:
    put(store, Kind.TREE, "used", b"x")
    put(store, Kind.TREE, "idle", b"y")
    file = store.open_entry(Kind.TREE, "used")
    assert file is not None
    with file:
        assert [one.in_use for one in store.entries() if one.key == "used"] == [True]
        assert store.clear().kept_in_use == 1
        assert [one.key for one in store.entries()] == ["used"]
    assert store.clear().entries == 1
    assert list(store.entries()) == []


def test_leftovers_of_killed_writers_are_swept_and_those_of_live_ones_are_not(store: Store) -> None:
    dead = store.path / "tmp" / "layers.1.dead"
    dead.write_bytes(b"half")
    os.utime(dead, (1, 1))
    with store.new(Kind.LAYER) as alive:
        alive.file.write(b"z")
        alive.file.flush()
        name = next(path for path in (store.path / "tmp").iterdir() if path != dead)
        os.utime(name, (1, 1))
        with Store(store.path):
            assert not dead.exists()
            assert name.exists()


WAITER = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    from ocifs.store import Kind, Store
    store = Store(Path(sys.argv[1]))
    def waiting(): print("waiting", flush=True)
    def build(): print("building", flush=True)
    file = store.get_or_build(Kind.LAYER, "k", load=lambda file: file, build=build, waiting=waiting)
    print(file.read_at(0, 10).decode(), flush=True)
    """
)


def test_one_process_builds_while_another_waits(store: Store) -> None:
    with store.lock(Kind.LAYER, "k"):
        other = subprocess.Popen([sys.executable, "-c", WAITER, str(store.path)], stdout=subprocess.PIPE, text=True)
        assert other.stdout is not None
        assert other.stdout.readline() == "waiting\n"  # it has met the lock
        put(store, Kind.LAYER, "k", b"built once")
    out, _ = other.communicate(timeout=30)
    assert out == "built once\n"
    assert other.returncode == 0


KILLED = textwrap.dedent(
    """
    import os, signal, sys
    from pathlib import Path
    from ocifs.store import Kind, Store
    store = Store(Path(sys.argv[1]))
    with store.lock(Kind.LAYER, "k"), store.new(Kind.LAYER) as new:
        new.file.write(b"half")
        new.file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    """
)


def test_a_killed_builder_leaves_neither_entry_nor_lock(store: Store) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(store.path)], check=False, timeout=30)
    leftover = next((store.path / "tmp").iterdir())
    os.utime(leftover, (1, 1))
    with Store(store.path) as again:
        built = again.get_or_build(
            Kind.LAYER, "k", load=lambda file: file, build=lambda: put(again, Kind.LAYER, "k", b"anew")
        )
        with built:
            assert built.read_at(0, 10) == b"anew"
    assert not leftover.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a tmpfs of its own")
def test_a_full_disk_is_told_in_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", tmp_path], check=True)
    try:
        with Store(tmp_path / "cache") as store:
            with pytest.raises((MachineError, OSError)) as caught, store.new(Kind.LAYER) as new:
                new.file.write(bytes(1 << 20))
                new.publish("k")
            if isinstance(caught.value, OSError):
                assert caught.value.errno == errno.ENOSPC  # raised by write itself: the builder's to tell
            assert os.listdir(tmp_path / "cache" / "layers") == []
            assert os.listdir(tmp_path / "cache" / "tmp") == []
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_the_default_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_path() == Path("/var/cache/ocifs")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_CACHE_HOME", "/home/u/.xdg")
    assert default_path() == Path("/home/u/.xdg/ocifs")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/u")
    assert default_path() == Path("/home/u/.cache/ocifs")
