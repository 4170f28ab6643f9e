"""How a mount comes and goes: when a command returns, and that nothing is left, however it ends.

Nothing left means: no mount, no process, no record. Not here: what is inside a mount, what happens when data is damaged.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ocifs import daemon
from tests.support import layout
from tests.support.mounting import (
    LIMIT,
    HangError,
    Mount,
    Process,
    agent,
    answer,
    command,
    environment,
    force_away,
    in_mountinfo,
    mounted,
    ocifs,
    record_of,
    records,
    run,
    start,
)
from tests.support.tarball import entry, tarball

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CONTENT = b"content of the file\n"
LARGE = os.urandom(1 << 20) * 24  # 24 MiB: a dozen spans, and more than the daemon is given memory for


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Give a reference to an image with a file, a directory and something large."""
    path = tmp_path_factory.mktemp("images") / "image"
    tar = tarball(entry("file", CONTENT), entry("dir/"), entry("dir/other", b"x"), entry("large", LARGE))
    layout.write_layout(path, [tar], compression="plain", tag="it")
    return f"oci:{path}:it"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache") / "cache"


def nothing_left(path: Path, pid: int | None = None) -> bool:
    """Say whether neither mount nor process nor record is left."""
    return not in_mountinfo(path) and record_of(path) is None and (pid is None or not _alive(pid))


def _alive(pid: int) -> bool:
    """Say whether a process is one still: what a container's process 1 has not waited for is listed but dead."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text("utf-8")
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


@contextlib.contextmanager
def foreground(image: str, path: Path, cache: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """Run a mount in the foreground until it says that it is there; gone for certain at the end of the block."""
    path.mkdir(exist_ok=True)
    words = command("mount", "--foreground", "-v", *options, "--cache-dir", cache, image, path)
    process = subprocess.Popen(words, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, env=environment())
    assert process.stderr is not None
    try:
        said = ""
        while "is mounted on" not in said:
            assert select.select([process.stderr], [], [], LIMIT)[0], f"not mounted in time; {said!r}"
            line = process.stderr.readline()
            assert line, f"it ended: {said}"
            said += line
        yield process
    finally:
        force_away(path)
        process.kill()
        process.communicate()


# -- beginning -----------------------------------------------------------------------------------------------------


def test_mount_returns_when_the_mount_answers(image: str, cache: Path, tmp_path: Path, driver: str) -> None:
    with mounted(image, tmp_path / "mnt", driver=driver, cache=cache) as mount:
        assert in_mountinfo(mount.path)
        assert agent("read", mount.at("file"), 0, 100) == CONTENT.hex()
        assert mount.record["reference"] == image
        assert mount.record["driver"] == driver
        assert mount.record["layers"] == 1


def test_the_daemon_keeps_nothing_of_its_starters(image: str, cache: Path, tmp_path: Path, place: Path) -> None:
    """Not its directory, its standard streams, its session, nor other files it had open: a lock among them may wait."""
    lock = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    os.set_inheritable(lock, True)
    try:
        done = run(command("mount", "--cache-dir", cache, image, place), close_fds=False, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        record = record_of(place)
        assert record is not None
        process = Process(record["pid"])
        held = process.descriptors()
        assert str(tmp_path / "lock") not in held
        assert [name for name in held if name.startswith(("/dev/pts", "/dev/tty"))] == []
        assert os.readlink(f"/proc/{process.pid}/cwd") == "/"
        assert os.getsid(process.pid) == process.pid
        done = ocifs("umount", place)
        assert (done.returncode, done.stderr) == (0, "")
        assert process.gone()
        assert nothing_left(place, process.pid)
    finally:
        os.close(lock)


def test_whoever_reads_the_output_of_mount_is_not_kept_waiting(image: str, cache: Path, tmp_path: Path) -> None:
    """A daemon that kept standard error open would make ``x=$(ocifs mount … 2>&1)`` wait for ever."""
    with mounted(image, tmp_path / "mnt", cache=cache):
        pass  # `mounted` reads both streams to their ends


def test_ps_lists_mounts_oldest_first_and_says_what_they_are(image: str, cache: Path, tmp_path: Path) -> None:
    with mounted(image, tmp_path / "a", cache=cache) as a, mounted(image, tmp_path / "b", cache=cache) as b:
        paths = [one["mountpoint"] for one in records() if one["mountpoint"].startswith(str(tmp_path))]
        assert paths == [str(a.path), str(b.path)]
        shown = ocifs("ps").stdout
        assert str(a.pid) in shown
        assert image in shown
    assert [one for one in records() if one["mountpoint"].startswith(str(tmp_path))] == []


@pytest.mark.parametrize(
    "name",
    ["with space", "new\nline", "tab\t\\back", "carriage\rreturn\x0b\x85", "ümläut", "co,mma", "\udcff", "x" * 200],
)
def test_mount_points_of_any_name(image: str, cache: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.mkdir()
    try:
        done = ocifs("mount", "--cache-dir", cache, image, path)
        assert done.returncode == 0, done.stderr
        assert record_of(path) is not None
        assert agent("read", f"{path}/file", 0, 100) == CONTENT.hex()
        assert ocifs("umount", path).returncode == 0
        assert record_of(path) is None
    finally:
        run(["umount", "--lazy", str(path)])


def test_references_of_any_characters_can_be_mounted(tmp_path: Path, cache: Path) -> None:
    place = tmp_path / "a, b\\c ä\n"
    layout.write_layout(place, [tarball(entry("file", CONTENT))], tag="it")
    with mounted(f"oci:{place}:it", tmp_path / "mnt", cache=cache) as mount:
        assert mount.record["reference"] == f"oci:{place}:it"
        assert agent("read", mount.at("file"), 0, 100) == CONTENT.hex()


def test_a_mount_point_reached_through_a_symlink_is_found_again(image: str, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert ocifs("mount", "--cache-dir", cache, image, tmp_path / "link").returncode == 0
    try:
        assert record_of(tmp_path / "real") is not None
        assert ocifs("umount", tmp_path / "link").returncode == 0
        assert nothing_left(tmp_path / "real")
    finally:
        force_away(tmp_path / "real")


# -- refusing ------------------------------------------------------------------------------------------------------


def test_a_second_mount_at_one_place_is_refused_naming_the_first(
    image: str, cache: Path, tmp_path: Path, driver: str
) -> None:
    with mounted(image, tmp_path / "mnt", driver=driver, cache=cache) as mount:
        done = ocifs("mount", "--driver", driver, "--cache-dir", cache, image, mount.path)
        assert done.returncode == 7
        assert image in done.stderr
        assert f"ocifs umount {mount.path}" in done.stderr
        assert agent("read", mount.at("file"), 0, 100) == CONTENT.hex()


@pytest.mark.parametrize(
    ("make", "status", "says"),
    [
        (lambda _: None, 3, "mkdir -p"),
        (lambda path: path.write_text(""), 2, "is a file"),
        (lambda path: (path.mkdir(), (path / "x").write_text("")), 7, "not empty"),
    ],
    ids=["missing", "file", "not-empty"],
)
def test_places_that_cannot_be_mounted_on(
    image: str, cache: Path, tmp_path: Path, make: Callable[[Path], object], status: int, says: str
) -> None:
    path = tmp_path / "mnt"
    make(path)
    done = ocifs("mount", "--cache-dir", cache, image, path)
    assert (done.returncode, done.stdout) == (status, "")
    assert says in done.stderr
    assert str(path) in done.stderr
    assert done.stderr.count("\n") == 1
    assert nothing_left(path)


def test_a_directory_that_is_not_empty_can_be_mounted_on_if_asked(image: str, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    (tmp_path / "mnt" / "mine").write_text("still here")
    with mounted(image, tmp_path / "mnt", "-o", "nonempty", cache=cache) as mount:
        assert "mine" not in agent("walk", mount.path)
    assert (tmp_path / "mnt" / "mine").read_text() == "still here"


def test_a_mount_that_fails_leaves_nothing(cache: Path, tmp_path: Path, place: Path) -> None:
    done = ocifs("mount", "--cache-dir", cache, f"oci:{tmp_path}/nothing:here", place)
    assert done.returncode == 3
    assert nothing_left(place)


# -- ending --------------------------------------------------------------------------------------------------------


def test_umount_by_anyone_ends_the_daemon(image: str, cache: Path, tmp_path: Path, driver: str) -> None:
    with mounted(image, tmp_path / "mnt", driver=driver, cache=cache, ended=True) as mount:
        assert run(["umount", str(mount.path)]).returncode == 0
        assert mount.process.gone()
        assert nothing_left(mount.path, mount.pid)
        assert not mount.log.exists()


def test_ocifs_umount_returns_when_the_daemon_is_gone(image: str, cache: Path, tmp_path: Path, driver: str) -> None:
    with mounted(image, tmp_path / "mnt", driver=driver, cache=cache, ended=True) as mount:
        done = ocifs("umount", mount.path)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert mount.process.gone(within=0)
        assert nothing_left(mount.path, mount.pid)


def test_umount_where_nothing_is_mounted_says_so(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing", Path("/proc")):
        done = ocifs("umount", path)
        assert done.returncode == 3
        assert "nothing of ocifs is mounted" in done.stderr
    assert in_mountinfo(Path("/proc"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_daemon_and_its_mount(
    image: str, cache: Path, tmp_path: Path, driver: str, number: int
) -> None:
    with mounted(image, tmp_path / "mnt", driver=driver, cache=cache, ended=True) as mount:
        mount.process.signal(number)
        assert mount.process.gone()
        assert nothing_left(mount.path, mount.pid)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_a_mount_in_the_foreground(image: str, cache: Path, tmp_path: Path, number: int) -> None:
    with foreground(image, tmp_path / "mnt", cache) as process:
        assert agent("read", f"{tmp_path}/mnt/file", 0, 100) == CONTENT.hex()
        process.send_signal(number)
        assert process.wait(LIMIT) == 0
        assert nothing_left(tmp_path / "mnt", process.pid)


def test_a_mount_in_the_foreground_ends_with_its_mount(image: str, cache: Path, tmp_path: Path, driver: str) -> None:
    with foreground(image, tmp_path / "mnt", cache, "--driver", driver) as process:
        assert ocifs("umount", tmp_path / "mnt").returncode == 0
        assert process.wait(LIMIT) == 0
        assert nothing_left(tmp_path / "mnt", process.pid)


def test_closing_the_terminal_ends_a_mount_in_the_foreground(image: str, cache: Path, place: Path) -> None:
    """`script` gives its command a terminal; when it dies the kernel hangs the session up."""
    words = " ".join(command("mount", "--foreground", "--cache-dir", cache, image, place))
    terminal = subprocess.Popen(
        ["script", "--quiet", "--flush", "--command", words, "/dev/null"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(),
        start_new_session=True,
    )
    try:
        record = _wait_for_record(place)
        process = Process(record["pid"])
        assert agent("read", f"{place}/file", 0, 100) == CONTENT.hex()
        terminal.kill()
        terminal.wait()
        assert process.gone()
        assert nothing_left(place, process.pid)
    finally:
        terminal.kill()
        terminal.communicate()


def test_a_daemon_in_the_background_outlives_the_terminal_it_was_started_from(
    image: str, cache: Path, place: Path
) -> None:
    words = " ".join(command("mount", "--cache-dir", cache, image, place))
    done = run(["script", "--quiet", "--return", "--command", words, "/dev/null"], start_new_session=True)
    assert done.returncode == 0, done.stdout
    assert agent("read", f"{place}/file", 0, 100) == CONTENT.hex()
    assert ocifs("umount", place).returncode == 0


def _wait_for_record(path: Path) -> dict[str, Any]:
    """Ask until a mount is listed; each question takes as long as starting ocifs, so this does not spin."""
    for _ in range(200):
        found = record_of(path)
        if found is not None and in_mountinfo(path):
            return found
    raise AssertionError(f"nothing was mounted on {path}")


def test_a_daemon_whose_starter_died_before_it_was_ready_ends(
    image: str, cache: Path, place: Path, driver: str
) -> None:
    """The starter is killed while the daemon is kept from becoming ready: its stat(2) of the mount is never answered."""
    script = (
        "import os, select, signal, sys\n"
        "from ocifs import cli\n"
        "from ocifs.daemon.running import _Kept\n"
        "ready, starter = _Kept._ready, os.pidfd_open(os.getpid())\n"
        "def killing(kept):\n"
        "    signal.pidfd_send_signal(starter, signal.SIGKILL)\n"
        "    select.select([starter], [], [])\n"
        "    ready(kept)\n"
        "_Kept._ready = killing\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    words = command("mount", "--driver", driver, "--cache-dir", cache, image, place)
    words[words.index("-m") : words.index("-m") + 2] = ["-c", script]
    done = run(words)
    assert done.returncode == -signal.SIGKILL
    for _ in range(200):
        if nothing_left(place):
            break
    assert nothing_left(place)


# -- killed --------------------------------------------------------------------------------------------------------


def _kill(mount: Mount) -> None:
    mount.process.signal(signal.SIGKILL)
    assert mount.process.gone()


DEAD = ("ENOTCONN", "ECONNABORTED", "EIO")
"""What reads of a dead mount answer: FUSE itself the first two, EROFS, whose files are on FUSE, all of them."""


def test_readers_of_a_killed_daemon_get_an_error_at_once(image: str, cache: Path, tmp_path: Path, driver: str) -> None:
    with mounted(image, tmp_path / "mnt", driver=driver, cache=cache, ended=True) as mount:
        holder = start("hold", mount.at("large"))
        _wait_for_line(holder)
        _kill(mount)
        assert agent("read", mount.at("large"), 8 << 20, 4096) in DEAD
        assert answer(holder) in DEAD


STUCK = """
import os, threading
from ocifs.layer_data import LayerData
def stuck(*_, **__):
    os.close(os.open(os.environ["TOLD"], os.O_WRONLY))
    threading.Event().wait()
LayerData.begin = stuck
"""
"""Makes a daemon that never has data: it says so by opening a FIFO when it is asked."""


def test_readers_that_wait_when_the_daemon_is_killed_are_let_go(
    image: str, cache: Path, tmp_path: Path, driver: str
) -> None:
    fifo = tmp_path / "told"
    os.mkfifo(fifo)
    env = {"TOLD": str(fifo)}
    with mounted(image, tmp_path / "mnt", driver=driver, cache=cache, env=env, code=STUCK, ended=True) as mount:
        told = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        try:
            readers = [start("read", mount.at("large"), offset, 4096) for offset in (0, 8 << 20)]
            assert select.select([told], [], [], LIMIT)[0], "nobody asked the daemon for data"
        finally:
            os.close(told)
        _kill(mount)
        for reader in readers:
            assert answer(reader) in DEAD
        assert ocifs("umount", mount.path).returncode == 0
        assert nothing_left(mount.path)


def test_the_next_mount_removes_a_dead_one(image: str, cache: Path, tmp_path: Path, driver: str) -> None:
    with mounted(image, tmp_path / "mnt", driver=driver, cache=cache, ended=True) as mount:
        _kill(mount)
        assert in_mountinfo(mount.path)
        with mounted(image, mount.path, driver=driver, cache=cache) as again:
            assert agent("read", again.at("file"), 0, 100) == CONTENT.hex()
        assert nothing_left(mount.path)


def test_the_next_umount_removes_a_dead_mount(image: str, cache: Path, tmp_path: Path, driver: str) -> None:
    with mounted(image, tmp_path / "mnt", driver=driver, cache=cache, ended=True) as mount:
        _kill(mount)
        done = ocifs("umount", mount.path)
        assert (done.returncode, done.stderr) == (0, "")
        assert nothing_left(mount.path)


def test_ps_leaves_alone_what_is_no_record() -> None:
    for name in ("erofs-probe.json", "something.json"):
        other = daemon.runtime_dir() / name
        kept = other.read_bytes() if other.exists() else None
        other.write_bytes(kept or b"{}")
        try:
            assert ocifs("ps").returncode == 0
            assert other.exists()
        finally:
            if kept is None:
                other.unlink()


def test_ps_lists_a_killed_daemon_as_dead_until_its_mount_is_gone(
    image: str, cache: Path, tmp_path: Path, driver: str
) -> None:
    with mounted(image, tmp_path / "mnt", driver=driver, cache=cache, ended=True) as mount:
        _kill(mount)
        for _ in range(2):
            record = record_of(mount.path)
            assert record is not None
            assert (record["state"], record["reference"]) == ("dead", image)
        assert run(["umount", str(mount.path)]).returncode == 0
        assert record_of(mount.path) is None


def test_a_record_of_a_dead_daemon_says_nothing_about_who_has_its_number_now(
    image: str, cache: Path, tmp_path: Path, driver: str
) -> None:
    """The kernel gives numbers of file systems (st_dev) again as soon as they are free."""
    with mounted(image, tmp_path / "old", driver=driver, cache=cache, ended=True) as old:
        _kill(old)
        assert run(["umount", str(old.path)]).returncode == 0
        stale = Path(old.record["log"]).with_suffix(".json")
        kept = json.loads(stale.read_text())
        with mounted(image, tmp_path / "mnt", driver=driver, cache=cache) as mount:
            number = os.fsencode(json.dumps({**kept, "device": mount.record["device"]}))
            stale.write_bytes(number)
            assert ocifs("umount", "--dead", mount.path).returncode == 0
            assert ocifs("mount", "--cache-dir", cache, image, mount.path).returncode == 7
            assert agent("read", mount.at("file"), 0, 100) == CONTENT.hex()
            stale.write_bytes(number)
            listed = [one for one in records() if one["device"] == mount.record["device"]]
            assert [(one["pid"], one["state"]) for one in listed] == [(mount.pid, "live")]
            assert not stale.exists()


def test_ps_lists_a_daemon_whose_mount_is_out_of_sight_as_detached(
    image: str, cache: Path, tmp_path: Path, driver: str
) -> None:
    def states() -> list[str]:
        return [one["state"] for one in records() if one["mountpoint"] == str(tmp_path / "mnt")]

    with mounted(image, tmp_path / "mnt", driver=driver, cache=cache, ended=True) as mount:
        assert states() == ["live"]
        holder = _holder(mount)
        assert ocifs("umount", "--lazy", mount.path).returncode == 0
        assert states() == ["detached"]
        with mounted(image, mount.path, driver=driver, cache=cache):
            assert states() == ["detached", "live"]
        answer(holder)
        assert mount.process.gone()
        assert states() == []


def test_a_dead_mount_in_use_is_removed_all_the_same(image: str, cache: Path, tmp_path: Path, driver: str) -> None:
    with mounted(image, tmp_path / "mnt", driver=driver, cache=cache, ended=True) as mount:
        holder = _holder(mount)
        _kill(mount)
        assert ocifs("umount", mount.path).returncode == 0
        assert nothing_left(mount.path)
        answer(holder)


# -- in use --------------------------------------------------------------------------------------------------------


def _wait_for_line(process: subprocess.Popen[str], limit: float = LIMIT) -> str:
    line = b""
    while not line.endswith(b"\n"):  # byte by byte: what is buffered here, select would not see
        assert process.stderr is not None
        if not select.select([process.stderr], [], [], limit)[0]:
            raise HangError(f"it said nothing within {limit} seconds")
        byte = os.read(process.stderr.fileno(), 1)
        assert byte, f"it ended: {process.communicate()}"
        line += byte
    return line.decode()


def _holder(mount: Mount, name: str = "file", how: str = "hold") -> subprocess.Popen[str]:
    """Start a process that has something of a mount open by now; `answer` has it let go."""
    holder = start(how, mount.at(name))
    _wait_for_line(holder)
    return holder


@pytest.mark.parametrize(
    ("how", "name"),
    [("hold", "file"), ("hold_directory", "dir"), ("hold_mapping", "large")],
    ids=["open", "cwd", "mapped"],
)
def test_a_busy_mount_is_not_unmounted_and_its_users_are_named(
    image: str, cache: Path, tmp_path: Path, driver: str, how: str, name: str
) -> None:
    with mounted(image, tmp_path / "mnt", driver=driver, cache=cache) as mount:
        holder = _holder(mount, name, how)
        done = ocifs("umount", mount.path)
        assert done.returncode == 7
        assert f"(pid {holder.pid})" in done.stderr
        assert "--lazy" in done.stderr
        assert agent("read", mount.at("file"), 0, 100) == CONTENT.hex()
        answer(holder)


def test_a_lazy_umount_serves_who_is_in_and_frees_the_place_at_once(
    image: str, cache: Path, tmp_path: Path, driver: str
) -> None:
    with mounted(image, tmp_path / "mnt", driver=driver, cache=cache, ended=True) as mount:
        holder = _holder(mount)
        done = ocifs("umount", "--lazy", mount.path)
        assert (done.returncode, done.stderr) == (0, "")
        assert not in_mountinfo(mount.path)
        with mounted(image, mount.path, driver=driver, cache=cache) as again:
            assert again.pid != mount.pid
            assert agent("read", again.at("file"), 0, 100) == CONTENT.hex()
            assert answer(holder) == _sha256(CONTENT)
            assert mount.process.gone()
            # The one that left late takes nothing of the new one's with it.
            assert in_mountinfo(again.path)
            assert record_of(again.path) is not None
        assert nothing_left(mount.path)


def _sha256(data: bytes) -> str:
    return layout.sha256(data).removeprefix("sha256:")


def test_a_late_daemon_does_not_unmount_what_came_after_it(
    image: str, cache: Path, tmp_path: Path, driver: str
) -> None:
    with mounted(image, tmp_path / "mnt", driver=driver, cache=cache, ended=True) as mount:
        holder = _holder(mount)
        assert ocifs("umount", "--lazy", mount.path).returncode == 0
        with mounted(image, mount.path, driver=driver, cache=cache) as again:
            mount.process.signal(signal.SIGTERM)
            assert mount.process.gone()
            assert in_mountinfo(again.path)
            assert agent("read", again.at("file"), 0, 100) == CONTENT.hex()
        answer(holder)


def test_umount_says_so_when_another_mount_namespace_keeps_the_mount(
    image: str, cache: Path, tmp_path: Path, driver: str
) -> None:
    with mounted(image, tmp_path / "mnt", driver=driver, cache=cache, ended=True) as mount:
        # A namespace of private mounts: what is unmounted here stays there.
        keeper = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", "echo there; read line"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert keeper.stdout is not None
            assert keeper.stdout.readline() == "there\n"
            script = (
                "import sys; from pathlib import Path; from ocifs import daemon, errors\n"
                "try: daemon.unmount(Path(sys.argv[1]), patience=0.2)\n"
                "except errors.BusyError as error: print(error)\n"
            )
            words = command(mount.path)
            words[words.index("-m") : words.index("-m") + 2] = ["-c", script]
            done = run(words)
            assert done.returncode == 0, done.stderr
            assert "mount namespace" in done.stdout
            assert f"(pid {mount.pid})" in done.stdout
            assert not in_mountinfo(mount.path)
            assert not mount.process.gone(within=0)
        finally:
            keeper.communicate("\n", timeout=LIMIT)
        assert mount.process.gone(), "with the namespace the last copy of the mount is gone"
        assert nothing_left(mount.path, mount.pid)


# -- again and again -----------------------------------------------------------------------------------------------


def test_ten_mounts_in_a_row_leave_nothing_behind(image: str, cache: Path, tmp_path: Path, driver: str) -> None:
    path = tmp_path / "mnt"

    def files() -> list[str]:
        return sorted(name for name in os.listdir(daemon.runtime_dir()) if name.startswith(_record_name(path)))

    def tidy() -> list[str]:
        return sorted(os.listdir(cache / "locks")) + sorted(os.listdir(cache / "tmp"))

    held = []
    for _ in range(10):
        with mounted(image, path, driver=driver, cache=cache) as mount:
            agent("read", mount.at("file"), 0, 10)
            held.append(mount.process.descriptors())
        assert nothing_left(path, mount.pid)
        assert files() == []
    assert len({len(one) for one in held}) == 1
    assert tidy() == []


def _record_name(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:32]


def test_a_mount_does_not_gather_descriptors_or_threads(image: str, cache: Path, tmp_path: Path, driver: str) -> None:
    with mounted(image, tmp_path / "mnt", "--cache-memory", "4M", driver=driver, cache=cache) as mount:
        agent("walk", mount.path)
        before = mount.process.descriptors()
        for _ in range(5):
            assert agent("readers", [mount.at("large")], {mount.at("large"): _sha256(LARGE)}, 8, 1)["wrong"] == []
        assert mount.process.descriptors() == before
        assert len(list(Path(f"/proc/{mount.pid}/task").iterdir())) <= 16
        assert mount.process.memory() < 200 << 20


# -- readers that die ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slow_image(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Give a reference to an image whose large file takes long to read: each span must be inflated."""
    path = tmp_path_factory.mktemp("slow") / "image"
    data = hashlib.shake_256(b"slow").hexdigest(12 << 20).encode()
    layout.write_layout(path, [tarball(entry("file", CONTENT), entry("large", data))], compression="gzip")
    return f"oci:{path}"


KILLING = """
import os, select, signal
from ocifs.driver.session import Waits
plain = Waits.after_io_wait
def deadly(self, timeout):
    plain(self, timeout)
    if self._poll.poll(0) and os.path.exists(os.environ["VICTIM"]):
        with open(os.environ["VICTIM"]) as file:
            victim = int(file.read())
        os.unlink(os.environ["VICTIM"])
        held = os.pidfd_open(victim)
        os.kill(victim, signal.SIGKILL)
        select.select([held], [], [])
        os.close(held)
Waits.after_io_wait = deadly
"""
"""Makes the daemon kill the process that a file names, just when a request woke it and before it reads that request."""


def test_a_reader_killed_between_wake_up_and_read_does_not_stall_the_daemon(
    slow_image: str, tmp_path: Path, cache: Path
) -> None:
    """The trap of pyfuse3's blocking read (`ocifs.driver`): its request is gone, and the read would wait for another one.

    There is none: the only other process waits for a span to be inflated, which needs the thread that waits in vain.
    """
    victim = tmp_path / "victim"
    options = ("--cache-memory", "1")
    env = {"VICTIM": str(victim)}
    with mounted(slow_image, tmp_path / "mnt", *options, cache=cache, env=env, code=KILLING) as mount:
        reader = start("keep_reading", mount.at("large"), 256 << 10, limit=240)
        for _ in range(15):
            asking = start("ask_without_end", mount.at("file"))
            _wait_for_line(asking)
            (tmp_path / "new").write_text(str(asking.pid))
            (tmp_path / "new").rename(victim)
            assert asking.wait(120) == -signal.SIGKILL  # the moment must come, however busy the machine is
            asking.communicate()
            _drop_what_was_said(reader)
            for _ in range(3):
                _wait_for_line(reader, limit=20)
        assert answer(reader) > 45


def test_readers_killed_at_any_moment_do_not_stall_the_daemon(slow_image: str, tmp_path: Path, cache: Path) -> None:
    """One process reads, each piece from a span that must be inflated anew, and reports each piece.

    Meanwhile thirty threads ask without end and are all killed at once, again and again, so that requests vanish from the
    queue at every possible moment. Then the reader is alone: if the daemon stood still, nothing would wake it.
    """
    with mounted(slow_image, tmp_path / "mnt", "--cache-memory", "1", cache=cache) as mount:
        reader = start("keep_reading", mount.at("large"), 256 << 10, limit=240)
        crowds = start("crowds", mount.at("file"), 30, limit=240)
        assert crowds.stdin is not None
        for _ in range(150):
            crowds.stdin.write("\n")
            crowds.stdin.flush()
            _wait_for_line(crowds)
            _drop_what_was_said(reader)
            for _ in range(2):
                _wait_for_line(reader, limit=20)
        assert answer(crowds) == 150
        assert answer(reader) > 300


def _drop_what_was_said(process: subprocess.Popen[str]) -> None:
    assert process.stderr is not None
    while select.select([process.stderr], [], [], 0)[0]:
        os.read(process.stderr.fileno(), 1 << 16)


def test_a_reader_killed_while_it_waits_for_data_harms_nobody(
    image: str, cache: Path, tmp_path: Path, driver: str
) -> None:
    with mounted(image, tmp_path / "mnt", "--cache-memory", "1", driver=driver, cache=cache) as mount:
        for _ in range(10):
            readers = [start("pieces", mount.at("large"), [at], 1 << 20) for at in range(0, 8 << 20, 1 << 20)]
            for reader in readers[::2]:
                reader.kill()
            for reader in readers[1::2]:
                assert len(answer(reader)) == 1
            for reader in readers[::2]:
                reader.communicate(timeout=LIMIT)
        assert agent("sha256", mount.at("large")) == _sha256(LARGE)
        assert mount.logged() == ""
