"""The cache: entries appear whole or not at all, one process builds while others wait, foreign directories are refused."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ocifs.errors import CacheDamagedError, DamagedError, MachineError, StaleFormatError, UsageError
from ocifs.store import DEFAULT_LIMIT, Freed, Kind, Store, StoredFile, default_path, size_limit


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


# -- locks and children ----------------------------------------------------------------------------------------------


@contextmanager
def a_child() -> Iterator[None]:
    """Fork a process that keeps open what we have open, as an index pass does, until the block ends."""
    pid = os.fork()
    if pid == 0:
        while True:
            signal.pause()
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_build_lock_that_was_released_is_free_though_a_child_lives_on(store: Store) -> None:
    lock = store.try_lock(Kind.LAYER, "k")
    assert lock is not None
    waiter = os.open(store.path / "locks" / "layers.k", os.O_RDWR)  # as who waits has it open
    with a_child():
        lock.release()
        fcntl.flock(waiter, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(waiter)


def test_an_entry_that_was_published_can_be_opened_though_a_child_lives_on(store: Store) -> None:
    with store.new(Kind.LAYER) as new:
        new.file.write(b"whole")
        with a_child():
            new.publish("k")
            with open(store.path / "layers" / "k", "rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            assert read(store, Kind.LAYER, "k") == b"whole"


def test_what_was_given_up_is_not_locked_though_a_child_lives_on(store: Store) -> None:
    with store.new(Kind.LAYER) as new:
        path = next((store.path / "tmp").iterdir())
        with open(path, "rb") as file, a_child():
            new.__exit__()
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


# -- what goes wrong -------------------------------------------------------------------------------------------------


def test_locks_of_killed_builders_are_swept_and_those_that_are_held_are_not(store: Store) -> None:
    dead = store.path / "locks" / "layers.dead"
    dead.touch()
    os.utime(dead, (1, 1))
    with store.lock(Kind.LAYER, "alive"):
        alive = store.path / "locks" / "layers.alive"
        os.utime(alive, (1, 1))
        with Store(store.path):
            assert not dead.exists()
            assert alive.exists()
    assert os.listdir(store.path / "locks") == []


def refuse_locks(number: int) -> Any:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return flock


def test_a_file_that_cannot_be_locked_is_told_and_leaves_nothing_open(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, Kind.LAYER, "k", b"x")
    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(fcntl, "flock", refuse_locks(errno.ENOLCK))
    for act in (
        lambda: store.new(Kind.LAYER),
        lambda: store.try_lock(Kind.LAYER, "k"),
        lambda: store.open_entry(Kind.LAYER, "k"),
        lambda: list(store.entries()),
        lambda: store.gc(0),
    ):
        with pytest.raises(MachineError, match=r"^cannot .* the cache directory .*: No locks available"):
            act()
    monkeypatch.undo()
    assert os.listdir("/proc/self/fd") == before
    assert os.listdir(store.path / "tmp") == []


def test_an_exclusive_lock_is_asked_for_with_a_file_open_for_writing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS refuses it otherwise (EBADF)."""
    put(store, Kind.LAYER, "k", b"x")
    flock = fcntl.flock

    def as_nfs(fd: int, how: int) -> None:
        writable = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
        if how & fcntl.LOCK_EX and not writable:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", as_nfs)
    assert [one.in_use for one in store.entries()] == [False]
    assert store.clear().entries == 1


def test_what_is_no_regular_file_is_in_nobodys_use(store: Store, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"foreign")
    (store.path / "layers" / "link").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(store.path / "layers" / "pipe")
    (store.path / "layers" / "directory").mkdir()
    assert sorted((one.key, one.in_use) for one in store.entries()) == [("link", False), ("pipe", False)]
    assert store.clear().entries == 2
    assert os.listdir(store.path / "layers") == ["directory"]
    assert (tmp_path / "elsewhere").read_bytes() == b"foreign"


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.EIO, CacheDamagedError), (errno.ENOMEM, MachineError)], ids=["EIO", "ENOMEM"]
)
def test_an_entry_that_cannot_be_read_is_told(
    store: Store, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
) -> None:
    put(store, Kind.LAYER, "k", b"x")
    file = store.open_entry(Kind.LAYER, "k")
    assert file is not None

    def fail(*_: object) -> bytes:
        raise OSError(number, os.strerror(number))

    with file:
        monkeypatch.setattr(os, "pread", fail)
        with pytest.raises(kind) as caught:
            file.read_at(0, 1)
    assert type(caught.value) is kind
    path = store.path / "layers" / "k"
    assert str(caught.value) == f"the cache entry {path} cannot be read at offset 0: {os.strerror(number)}"


def test_too_many_open_files_are_told_with_what_helps(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(MachineError, match=r"Too many open files; every layer needs a few: .* 'ulimit -n'"):
        store.open_entry(Kind.LAYER, "k")


def test_an_entry_is_discarded_only_where_its_name_still_stands_for_it(store: Store) -> None:
    put(store, Kind.LAYER, "k", b"damaged")
    file = store.open_entry(Kind.LAYER, "k")
    assert file is not None
    with file:
        put(store, Kind.LAYER, "k", b"built again by somebody else")
        file.discard()
        assert read(store, Kind.LAYER, "k") == b"built again by somebody else"
    file = store.open_entry(Kind.LAYER, "k")
    assert file is not None
    with file:
        store.close()
        file.discard()
        assert os.listdir(store.path / "layers") == []
        assert file.read_at(0, 5) == b"built"
        file.discard()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a link to somebody else")
def test_a_symbolic_link_to_the_cache_counts_only_if_it_is_ours(tmp_path: Path) -> None:
    Store(tmp_path / "cache").close()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "cache")
    Store(link).close()
    os.chown(link, 1234, 1234, follow_symlinks=False)
    with pytest.raises(MachineError, match="link is a symbolic link that belongs to user 1234, not to you"):
        Store(link)


# -- the limit -------------------------------------------------------------------------------------------------------


def test_a_store_that_grew_is_made_smaller_when_it_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCIFS_CACHE_SIZE", "20K")
    with Store(tmp_path / "cache") as store:
        for second, key in enumerate(["used", "old", "new"]):
            put(store, Kind.LAYER, key, bytes(8192))
            os.utime(store.path / "layers" / key, (second, second))
        used = store.open_entry(Kind.LAYER, "used")
        assert used is not None
        os.utime(used.fd, (0, 0))
    assert sorted(os.listdir(tmp_path / "cache" / "layers")) == ["new", "used"]
    used.close()
    monkeypatch.setenv("OCIFS_CACHE_SIZE", "0")
    with Store(tmp_path / "cache"):
        pass  # what adds nothing removes nothing
    assert len(os.listdir(tmp_path / "cache" / "layers")) == 2


def test_a_limit_that_is_none_is_no_reason_to_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OCIFS_CACHE_SIZE", "lots")
    with Store(tmp_path / "cache") as store:
        put(store, Kind.LAYER, "k", b"x")
    assert "OCIFS_CACHE_SIZE is 'lots', which is not a size such as 500M or 20GiB" in caplog.text


@pytest.mark.parametrize(
    ("text", "size"),
    [("", DEFAULT_LIMIT), ("0", 0), ("4096", 4096), ("500M", 500 << 20), ("2GiB", 2 << 30), ("1tb", 1 << 40)],
)
def test_the_limit_can_be_set(monkeypatch: pytest.MonkeyPatch, text: str, size: int) -> None:
    monkeypatch.setenv("OCIFS_CACHE_SIZE", text)
    assert size_limit() == size


@pytest.mark.parametrize("text", ["M", "-1", "1.5G", "5X", "\u0665"])
def test_a_limit_that_is_none_is_told(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("OCIFS_CACHE_SIZE", text)
    with pytest.raises(UsageError, match="OCIFS_CACHE_SIZE is "):
        size_limit()


def test_the_default_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_path() == Path("/var/cache/ocifs")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_CACHE_HOME", "/home/u/.xdg")
    assert default_path() == Path("/home/u/.xdg/ocifs")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/u")
    assert default_path() == Path("/home/u/.cache/ocifs")
