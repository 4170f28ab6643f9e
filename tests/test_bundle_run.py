"""``ocifs run``: the container's streams, status and terminal are ours, signals reach it, and nothing is left, ever."""

from __future__ import annotations

import contextlib
import os
import pty
import shutil
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ocifs.cli.signals import unwound
from ocifs.daemon import runtime_dir
from ocifs.mountinfo import mounts
from tests.support.containers import needs_containers, ocifs_run, running, write_image
from tests.support.mounting import LIMIT, Process, environment, ocifs, patched, records, run
from tests.support.tarball import entry

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = needs_containers


@pytest.fixture
def image(tmp_path: Path) -> str:
    return write_image(tmp_path / "image")


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """Whatever a test does: no place of a container, no mount, after it than before."""
    before = places(), mounted()
    yield
    assert (places(), mounted()) == before


def places() -> set[str]:
    base = runtime_dir() / "containers"
    return {path.name for path in base.iterdir()} if base.exists() else set()


def mounted() -> list[str]:
    return sorted(os.fsdecode(entry.mountpoint) for entry in mounts() if b"/ocifs/containers/" in entry.mountpoint)


def sh(image: str, script: str, *options: str) -> tuple[int, str, str]:
    """Run a shell script in a container: status, what it said, its complaints."""
    done = run([*ocifs_run(*options, image), "/bin/sh", "-c", script])
    return done.returncode, done.stdout, done.stderr


# -- what a container has ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [0, 1, 7, 126, 255])
def test_the_status_is_the_containers(image: str, status: int) -> None:
    assert sh(image, f"exit {status}", "--rm") == (status, "", "")


def test_a_container_ended_by_a_signal_has_its_number_in_the_status(image: str) -> None:
    assert sh(image, "sh -c 'kill -9 $$'; exit $?")[0] == 137


def test_the_streams_are_ours(image: str) -> None:
    done = subprocess.run(
        [*ocifs_run(image), "/bin/sh", "-c", "cat; echo no >&2; tty"],
        input="yes\n",
        capture_output=True,
        encoding="utf-8",
        env=environment(),
        timeout=LIMIT,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "yes\nnot a tty\n", "no\n")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed_are_empty_and_take_everything(image: str, closed: str) -> None:
    words = [*ocifs_run(image), "/bin/sh", "-c", "cat && echo out && echo err >&2 && exit 3"]
    assert run(["sh", "-c", f'"$@" {closed}', "sh", *words]).returncode == 3


def test_without_arguments_the_images_command_runs(tmp_path: Path) -> None:
    image = write_image(tmp_path / "other", Entrypoint=["/bin/echo", "hello"], Cmd=["world"])
    assert run(ocifs_run(image)).stdout == "hello world\n"
    assert run([*ocifs_run(image), "-n", "you"]).stdout == "hello -n you\n"


def test_options_come_before_the_image_and_arguments_behind(image: str, tmp_path: Path) -> None:
    (tmp_path / "host").mkdir()
    (tmp_path / "host" / "in").write_text("in\n")
    options = ("-e", "A=b c", "-w", "/srv", "-u", "ada", "-v", f"{tmp_path}/host:/h:ro", "-v", f"{tmp_path}/host:/w")
    script = 'echo "$A"; pwd; id -u; id -G; cat /h/in; touch /h/x; echo out > /w/out'
    (tmp_path / "host").chmod(0o777)
    status, out, err = sh(image, script, *options)
    assert (status, out) == (0, "b c\n/srv\n1000\n1000 10\nin\n")
    assert "Read-only file system" in err
    assert (tmp_path / "host" / "out").read_text() == "out\n"


def test_changes_are_gone_with_the_container(image: str) -> None:
    for _ in range(2):
        assert sh(image, "cat /x; echo mine > /x; cat /x") == (
            0,
            "mine\n",
            "cat: can't open '/x': No such file or directory\n",
        )


def test_a_read_only_container_has_no_writable_layer(image: str) -> None:
    status, _, err = sh(image, "echo x > /x", "--read-only")
    assert (status, "Read-only file system" in err) == (1, True)


def test_the_network_is_none_or_the_hosts(image: str) -> None:
    devices = "cat /proc/net/dev | while read name rest; do case $name in *:) echo ${name%:};; esac; done"
    ours = [line.split(":")[0].strip() for line in Path("/proc/self/net/dev").read_text().splitlines() if ":" in line]
    assert "lo" in sh(image, devices)[1].split()
    assert sh(image, devices, "--net", "host")[1].split() == ours
    assert sh(image, "readlink /proc/self/ns/net || ls -l /proc/self/ns/net", "--net", "host")[1].split()[-1] == (
        os.readlink("/proc/self/ns/net")
    )


def test_names_are_found_as_on_the_host(image: str) -> None:
    hosts = Path("/etc/hosts").read_text()
    assert sh(image, "cat /etc/hosts", "--net", "host") == (0, hosts, "")
    assert sh(image, "cat /etc/hosts")[0] == 1
    assert sh(image, "cat /etc/hosts", "--net", "host", "--read-only") == (0, hosts, "")


def test_what_the_image_does_not_allow_gets_a_sentence(image: str) -> None:
    status, _, err = sh(image, "id", "-u", "eve")
    assert (status, err) == (3, "ocifs: the image has no user 'eve': /etc/passwd does not list it\n")


def test_a_runtime_that_is_not_there_gets_a_sentence(image: str, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    done = ocifs("run", "--runtime", "crun", image, env={"PATH": str(tmp_path / "bin")})
    assert (done.returncode, done.stderr) == (6, "ocifs: crun cannot be found; install the package crun\n")
    done = ocifs("run", image, env={"PATH": str(tmp_path / "bin")})
    assert (done.returncode, done.stderr) == (6, "ocifs: runc and crun cannot be found; install the package runc\n")


@pytest.fixture
def crun(tmp_path: Path) -> list[str]:
    """Words to be put before others: crun is found, and runs whatever control groups the machine has."""
    found = shutil.which("crun")
    if found is None:
        pytest.skip("crun is not installed")
    own = tmp_path / "bin" / "crun"
    own.parent.mkdir()
    own.write_text(f'#!/bin/sh\nexec {found} --cgroup-manager=disabled "$@"\n')
    own.chmod(0o755)
    groups = (
        'umount -lR /sys/fs/cgroup; mount -t cgroup2 cgroup2 /sys/fs/cgroup && PATH="$1:$PATH" && shift && exec "$@"'
    )
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", groups, "sh", str(own.parent)]


def test_crun_runs_it_too(image: str, crun: list[str]) -> None:
    words = [*crun, *ocifs_run("--runtime", "crun", image), "/bin/sh", "-c"]
    done = run([*words, "cat /etc/motd; touch /x; id -u >&2; exit 7"])
    assert (done.returncode, done.stdout, done.stderr) == (7, "from the image\n", "0\n")
    with running([*words, TRAPPED], until="up") as container:
        container.send_signal(signal.SIGTERM)
        assert container.communicate(timeout=LIMIT)[0] == "stopped\n"
        assert container.returncode == 5


# -- a terminal ----------------------------------------------------------------------------------------------------


def on_a_terminal(words: list[str], typed: bytes, after: bytes) -> tuple[int, bytes]:
    """Run on a terminal of its own; type when ``after`` has been shown. Gives status and all that was shown."""
    child, terminal = pty.fork()
    if child == 0:
        with contextlib.suppress(OSError):
            os.execve(words[0], words, environment())  # noqa: S606 (no shell is wanted)
        os._exit(127)
    shown = b""
    try:
        with contextlib.suppress(OSError):  # EIO: nobody has the other end open any more
            while data := os.read(terminal, 1024):
                shown += data
                if after in shown and typed:
                    os.write(terminal, typed)
                    typed = b""
    finally:
        os.close(terminal)
        status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status), shown


def test_on_a_terminal_the_container_has_one(image: str) -> None:
    words = [*ocifs_run(image), "/bin/sh", "-c", "tty; read x; echo got $x; exit 3"]
    status, shown = on_a_terminal(words, b"this\r", b"/dev/pts/0")
    assert status == 3
    assert b"got this" in shown


def test_interrupting_on_a_terminal_interrupts_the_program_in_the_container(image: str) -> None:
    words = [*ocifs_run(image), "/bin/sh", "-c", "trap 'echo stopped; exit 5' INT; echo up; sleep 1000 & wait"]
    status, shown = on_a_terminal(words, b"\x03", b"up")
    assert status == 5
    assert b"stopped" in shown


# -- signals -------------------------------------------------------------------------------------------------------

TRAPPED = "trap 'echo stopped; exit 5' TERM INT HUP; trap 'echo one' USR1; echo up; while :; do sleep 1000 & wait; done"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_passed_on(image: str, number: signal.Signals) -> None:
    with running([*ocifs_run(image), "/bin/sh", "-c", TRAPPED], until="up") as container:
        container.send_signal(number)
        out, err = container.communicate(timeout=LIMIT)
        assert (out, err, container.returncode) == ("stopped\n", "", 5)


def test_a_signal_that_does_not_end_it_is_passed_on_as_well(image: str) -> None:
    with running([*ocifs_run(image), "/bin/sh", "-c", TRAPPED], until="up") as container:
        assert container.stdout is not None
        for _ in range(2):
            container.send_signal(signal.SIGUSR1)
            assert container.stdout.readline() == "one\n"
        container.send_signal(signal.SIGTERM)
        assert container.wait(LIMIT) == 5


def test_a_second_signal_ends_what_does_not_listen(image: str) -> None:
    script = "trap 'echo deaf' TERM; echo up; while :; do sleep 1000 & wait; done"
    with running([*ocifs_run(image), "/bin/sh", "-c", script], until="up") as container:
        assert container.stdout is not None
        container.send_signal(signal.SIGTERM)
        assert container.stdout.readline() == "deaf\n"
        container.send_signal(signal.SIGTERM)
        container.communicate(timeout=LIMIT)
        assert container.returncode == 137


def test_a_signal_that_was_ignored_is_not_passed_on(image: str) -> None:
    script = "trap 'echo no' HUP; trap 'echo yes; exit 5' TERM; echo up; while :; do sleep 1000 & wait; done"
    words = ["nohup", *ocifs_run(image), "/bin/sh", "-c", script]
    with running(words, until="up") as container:
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM):
            container.send_signal(number)
        assert container.communicate(timeout=LIMIT)[0] == "yes\n"
        assert container.returncode == 5


def test_whoever_started_us_may_have_ignored_how_children_end(image: str) -> None:
    def ignoring() -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)

    done = run([*ocifs_run(image), "/bin/sh", "-c", "exit 7"], preexec_fn=ignoring)
    assert (done.returncode, done.stdout, done.stderr) == (7, "", "")


def test_the_first_signal_undoes_and_no_other_keeps_it_from_that() -> None:
    undone = []

    def interrupted_again_and_again() -> None:
        with unwound():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                    os.kill(os.getpid(), number)
                undone.append(True)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit, match="143"):
        interrupted_again_and_again()
    assert undone == [True]
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_before_the_container_runs_leaves_nothing(image: str, number: signal.Signals) -> None:
    code = f"import os, ocifs.bundle.containers as c\nc._supervise = lambda place: os.kill(os.getpid(), {number:d})\n"
    assert run(patched(code, "run", image)).returncode == 128 + number


def test_what_a_killed_ocifs_has_left_is_cleared_away_by_the_next(image: str) -> None:
    before = places()
    script = "echo up; exec sleep 1000"
    with running([*ocifs_run(image), "/bin/sh", "-c", script], until="up") as container:
        (place,) = places() - before
        state = run(["runc", "--root", str(runtime_dir() / "containers" / place / "state"), "state", place])
        pid = next(int(line.split(":")[1].strip(" ,")) for line in state.stdout.splitlines() if '"pid"' in line)
        sleeper = Process(pid)
        container.kill()
        container.wait(LIMIT)
        assert place in places()
        assert not sleeper.gone(within=0)
        assert sh(image, "echo again") == (0, "again\n", "")
        assert sleeper.gone()
        sleeper.close()
        assert places() == before


def test_who_lives_is_left_alone_by_the_next(image: str) -> None:
    with running([*ocifs_run(image), "/bin/sh", "-c", "echo up; cat"], until="up") as container:
        assert sh(image, "echo other") == (0, "other\n", "")
        assert container.communicate("still here\n", timeout=LIMIT)[0] == "still here\n"
        assert container.returncode == 0


def test_a_killed_daemon_ends_nothing_for_ever(image: str) -> None:
    with running([*ocifs_run(image), "/bin/sh", "-c", "echo up; cat; exit 4"], until="up") as container:
        here = f"/containers/ocifs-{container.pid}-"
        # A device number is used again: the record of a killed daemon may name the same place.
        (pid,) = [one["pid"] for one in records() if here in one["mountpoint"] and one["state"] == "live"]
        daemon = Process(pid)
        daemon.signal(signal.SIGKILL)
        assert daemon.gone()
        daemon.close()
        container.communicate("", timeout=LIMIT)
        assert container.returncode == 4


def test_a_copy_of_its_mounts_in_another_namespace_keeps_nothing_here(image: str, driver: str) -> None:
    words = [*ocifs_run("--driver", driver, image), "/bin/sh", "-c", "echo up; cat; exit 4"]
    elsewhere = ["unshare", "--mount", "--propagation", "private", "sh", "-c", "echo up; exec cat"]
    with running(words, until="up") as container, running(elsewhere, until="up"):
        (pid,) = [one["pid"] for one in records() if f"/containers/ocifs-{container.pid}-" in one["mountpoint"]]
        daemon = Process(pid)
        assert container.communicate("", timeout=LIMIT) == ("", "")
        assert container.returncode == 4
        assert daemon.gone(within=0)
        daemon.close()


def test_an_image_in_the_way_of_itself(tmp_path: Path) -> None:
    """Links where things are to be mounted lead nowhere but into the image."""
    more = (entry("proc", type=b"2", link="/../../../../srv/proc"), entry("sys", type=b"2", link="nowhere"))
    image = write_image(tmp_path / "odd", *more)
    status, _, err = sh(image, "echo up")
    assert status in (0, 1)
    assert "Traceback" not in err
    assert not Path("/srv/proc").exists()
