"""Work in a child process: what it writes stays, what it raises arrives, how it dies is told."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from ocifs.errors import DamagedError, MachineError, StaleFormatError, UnsupportedError
from ocifs.forked import run_forked
from tests.support.mounting import LIMIT, environment

if TYPE_CHECKING:
    from pathlib import Path


def test_what_the_child_writes_stays_and_nothing_else_does(tmp_path: Path) -> None:
    seen: list[str] = []
    parent = os.getpid()
    with (tmp_path / "out").open("wb") as out:

        def work() -> None:
            seen.append("here")
            out.write(b"parent" if os.getpid() == parent else b"child")
            out.flush()

        run_forked(work, "writes")
    assert (tmp_path / "out").read_bytes() == b"child"
    assert seen == []


@pytest.mark.parametrize("kind", [DamagedError, UnsupportedError, MachineError, StaleFormatError])
def test_an_expected_failure_arrives_as_it_was_raised(kind: type[Exception]) -> None:
    def work() -> None:
        raise kind("ümläut, \udcff and all")

    with pytest.raises(kind) as raised:
        run_forked(work, "fails")
    assert type(raised.value) is kind
    assert "and all" in str(raised.value)


def test_an_error_class_that_only_its_room_knows_arrives_as_one_that_everybody_does() -> None:
    class RoomError(DamagedError):
        pass

    def work() -> None:
        raise RoomError("something special")

    with pytest.raises(DamagedError, match="something special"):
        run_forked(work, "fails")


def test_a_bug_arrives_with_its_traceback() -> None:
    def work() -> None:
        raise ZeroDivisionError("who divides by that")

    with pytest.raises(RuntimeError, match=r"(?s)the process that divides failed:.*who divides by that"):
        run_forked(work, "divides")


def test_running_out_of_memory_is_the_machines_fault() -> None:
    def work() -> None:
        raise MemoryError

    with pytest.raises(MachineError, match="memory"):
        run_forked(work, "remembers")


def test_being_killed_is_told_with_the_signal() -> None:
    with pytest.raises(MachineError, match=r"the process that dies was ended by signal 9 \(Killed\)"):
        run_forked(lambda: os.kill(os.getpid(), signal.SIGKILL), "dies")


def test_an_exit_in_the_child_is_not_one_of_the_parent() -> None:
    with pytest.raises(RuntimeError, match="SystemExit"):
        run_forked(lambda: sys.exit(3), "exits")
    with pytest.raises(MachineError, match="status 5"):
        run_forked(lambda: os._exit(5), "exits")


def test_the_child_leaves_no_descriptor_and_no_zombie() -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(3):
        run_forked(lambda: None, "does nothing")
    assert sorted(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_an_interrupt_kills_the_child_and_goes_on_up() -> None:
    told, tell = os.pipe()
    parent = os.getpid()

    def work() -> None:
        os.write(tell, b"here")
        signal.pause()

    def interrupt() -> None:
        os.read(told, 4)  # the child has begun
        os.kill(parent, signal.SIGINT)

    sender = threading.Thread(target=interrupt)

    def interrupted() -> None:
        sender.start()
        run_forked(work, "pauses")

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    sender.join()
    os.close(told)
    os.close(tell)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_the_child_dies_with_its_parent(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from ocifs.forked import run_forked\n"
        "def work():\n"
        "    print(os.getpid(), flush=True)\n"
        "    signal.pause()\n"
        "run_forked(work, 'pauses')\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment(), cwd=tmp_path
    )
    assert parent.stdout is not None
    child = os.pidfd_open(int(parent.stdout.readline()))
    parent.kill()
    parent.communicate(timeout=LIMIT)
    assert select.select([child], [], [], LIMIT)[0]
    os.close(child)
