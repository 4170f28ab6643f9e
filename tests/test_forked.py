"""Work in a child process: what stays of it, and how each way to fail comes out."""

from __future__ import annotations

import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from ocifs import errors
from ocifs.errors import MachineError, OcifsError
from ocifs.forked import Failed, run_forked
from tests.support.spanned import SECONDS

HOME = Path(__file__).parents[1]


def no_child_is_left() -> bool:
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return True
    return False


def test_what_is_written_to_files_stays_and_nothing_else(tmp_path: Path) -> None:
    values = [1]
    with (tmp_path / "file").open("wb") as file:

        def work() -> None:
            values.append(2)
            file.write(b"%d" % os.getpid())
            file.flush()

        run_forked(work, "tries")
    assert values == [1]
    assert int((tmp_path / "file").read_bytes()) != os.getpid()
    assert no_child_is_left()


@pytest.mark.parametrize(
    "kind",
    [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, OcifsError)],
)
def test_an_expected_failure_comes_through_with_its_class_and_message(kind: type[OcifsError]) -> None:
    def work() -> None:
        raise kind("layer 2 is ±broken\udcff")

    with pytest.raises(OcifsError) as caught:
        run_forked(work, "tries")
    assert type(caught.value) is kind
    assert str(caught.value) == "layer 2 is ±broken\udcff"
    assert no_child_is_left()


def test_any_message_comes_through() -> None:
    """Messages hold names of an image, which are any bytes, and they may be longer than a pipe is."""
    message = "a name \udcff and ü \n" + "long " * 50_000

    def work() -> None:
        raise errors.DamagedError(message)

    with pytest.raises(errors.DamagedError) as caught:
        run_forked(work, "tries")
    assert str(caught.value) == message


def test_a_bug_comes_through_with_its_traceback() -> None:
    def work() -> None:
        raise ZeroDivisionError

    with pytest.raises(RuntimeError) as caught:
        run_forked(work, "merges the layers")
    lines = str(caught.value).splitlines()
    assert lines[0] == "the process that merges the layers failed:"
    assert lines[1] == "Traceback (most recent call last):"
    assert lines[-1] == "ZeroDivisionError"
    assert not isinstance(caught.value, OcifsError)


def test_running_out_of_memory_is_the_machines() -> None:
    def work() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
        bytearray(1 << 40)

    with pytest.raises(MachineError) as caught:
        run_forked(work, "tries")
    assert str(caught.value) == "there is not enough memory"


def test_a_child_that_is_killed_is_the_machines() -> None:
    def work() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(MachineError) as caught:
        run_forked(work, "merges the layers")
    assert str(caught.value) == (
        "the process that merges the layers was ended by signal 9 (Killed), perhaps because memory ran out; "
        "free some and try again"
    )
    assert no_child_is_left()


def test_a_child_that_ends_by_itself_is_the_machines() -> None:
    def work() -> None:
        os._exit(3)

    with pytest.raises(MachineError) as caught:
        run_forked(work, "merges the layers")
    assert str(caught.value) == "the process that merges the layers ended with status 3"


def test_exit_in_the_work_ends_only_the_child() -> None:
    with pytest.raises(RuntimeError, match="SystemExit: 0"):
        run_forked(lambda: sys.exit(0), "tries")


def test_what_the_parent_has_buffered_is_not_written_twice(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        file.write("once\n")
        run_forked(lambda: None, "tries")
    assert (tmp_path / "file").read_text() == "once\n"


@pytest.mark.parametrize("kind", ["NoSuchError", "annotations", "OcifsErrorX", "__doc__"])
def test_an_error_of_a_class_that_is_not_known_is_the_machines(kind: str) -> None:
    error = Failed(kind, b"it says so").error("tries")
    assert (type(error), str(error)) == (MachineError, "it says so")


@pytest.mark.parametrize("call", ["fork", "pipe2"])
def test_a_child_that_cannot_be_started_is_the_machines(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def fail(*_: object) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    before = sorted(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(MachineError) as caught:
        run_forked(lambda: None, "merges the layers")
    assert str(caught.value) == (
        "the process that merges the layers cannot be started: Resource temporarily unavailable"
    )
    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGALRM, signal.SIGUSR1])
def test_a_child_has_none_of_its_parents_handlers(number: signal.Signals) -> None:
    def work() -> None:
        os.kill(os.getpid(), number)
        signal.pause()

    before = signal.signal(number, lambda *_: os._exit(0))
    try:
        with pytest.raises(MachineError, match=rf"was ended by signal {int(number)} \("):
            run_forked(work, "tries")
    finally:
        signal.signal(number, before)


def test_no_descriptor_stays_open() -> None:
    def fail() -> None:
        raise errors.DamagedError("no")

    before = sorted(os.listdir("/proc/self/fd"))
    run_forked(lambda: None, "tries")
    with pytest.raises(errors.DamagedError):
        run_forked(fail, "tries")
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_an_interrupt_in_the_parent_kills_the_child(tmp_path: Path) -> None:
    """The child would wait for ever. It ignores ^C itself, which a terminal sends to both."""
    parent = os.getpid()

    def work() -> None:
        (tmp_path / "child").write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGINT)
        # Python loses an interrupt that comes while its after-fork hooks run: wait until the parent waits.
        while Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[0] != "S":
            os.sched_yield()
        os.kill(parent, signal.SIGINT)
        signal.pause()

    with pytest.raises(KeyboardInterrupt):
        run_forked(work, "tries")
    assert no_child_is_left()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "child").read_text()), 0)


def test_a_child_dies_with_its_parent() -> None:
    script = textwrap.dedent("""
        import os, signal
        from ocifs.forked import run_forked

        def work():
            print(os.getpid(), flush=True)
            signal.pause()

        run_forked(work, "waits")
    """)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=HOME) as process:
        assert process.stdout is not None
        child = os.pidfd_open(int(process.stdout.readline()))
        process.kill()
    try:
        assert select.select([child], [], [], SECONDS)[0], "the child lives on"
    finally:
        os.close(child)


def test_an_error_class_that_only_its_room_knows_arrives_as_one_that_everybody_does() -> None:
    class RoomError(errors.DamagedError):
        pass

    def work() -> None:
        raise RoomError("something special")

    with pytest.raises(errors.DamagedError, match="something special") as caught:
        run_forked(work, "fails")
    assert type(caught.value) is errors.DamagedError


def test_the_childs_memory_is_not_the_parents() -> None:
    with tempfile.TemporaryFile() as file:

        def work() -> None:
            taken = bytes(range(256)) * (1 << 20)  # 256 MiB
            file.write(b"%d" % len(taken))
            file.flush()

        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run_forked(work, "takes memory")
        file.seek(0)
        assert file.read() == b"268435456"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10
