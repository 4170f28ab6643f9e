"""A mount as a system service: what the service manager and the journal are told, the units, what a unit allows.

There is no systemd here to run units with, so what a unit says is held against what a mount does: its capabilities are
given to a real mount, its system calls are compared with those of one.
"""

from __future__ import annotations

import configparser
import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ocifs.daemon import notify
from tests.support.command import SAMPLE
from tests.support.mounting import (
    LIMIT,
    PYTHON,
    ROOT,
    Process,
    agent,
    command,
    environment,
    force_away,
    in_mountinfo,
    mounted,
    ocifs,
    run,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a system service is root's")

UNITS = ROOT / "systemd"
MOTD = b"Welcome to the merged view of three layers.\n"


@contextlib.contextmanager
def listener(address: str) -> Iterator[socket.socket]:
    """A service manager's end of sd_notify(3)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address.replace("@", "\0", 1) if address.startswith("@") else address)
        manager.settimeout(LIMIT)
        yield manager


@contextlib.contextmanager
def service(
    place: Path, *options: str, wrapper: Sequence[str] = (), env: Mapping[str, str] | None = None, stderr: int = -1
) -> Iterator[subprocess.Popen[bytes]]:
    """Serve the sample image in the foreground; ended by SIGTERM, or else by force."""
    words = [*wrapper, *command("mount", "--foreground", *options, SAMPLE, place)]
    process = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE if stderr < 0 else stderr, env=environment(env)
    )
    try:
        yield process
        process.terminate()
        assert process.wait(LIMIT) == 0
    finally:
        force_away(place)
        process.kill()
        process.communicate()


# -- the service manager -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["path", "abstract"])
def test_the_service_manager_is_told_when_the_mount_answers(
    place: Path, tmp_path: Path, driver: str, form: str
) -> None:
    address = str(tmp_path / "notify") if form == "path" else f"@ocifs-test-{os.getpid()}-{driver}"
    with (
        listener(address) as manager,
        service(place, "--driver", driver, env={"NOTIFY_SOCKET": address}),
    ):
        told = manager.recv(4096).decode().split("\n")
        assert told == ["READY=1", f"STATUS={SAMPLE} is mounted on {place}"]
        assert agent("read", f"{place}/etc/motd", 0, 100) == MOTD.hex()


def test_the_service_manager_is_not_told_of_a_mount_that_fails(place: Path, tmp_path: Path) -> None:
    with listener(str(tmp_path / "notify")) as manager:
        env = {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        done = ocifs("mount", "--foreground", tmp_path / "missing", place, env=env)
        assert done.returncode == 3
        manager.setblocking(False)
        with pytest.raises(BlockingIOError):
            manager.recv(4096)


def test_a_service_manager_that_is_gone_is_no_obstacle(place: Path, tmp_path: Path) -> None:
    with service(place, "-v", env={"NOTIFY_SOCKET": str(tmp_path / "gone")}) as process:
        wait_for(process, b"is mounted on")


def test_a_name_cannot_become_an_assignment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with listener(str(tmp_path / "notify")) as manager:
        notify.tell("STATUS=new\nMAINPID=1\udcff", "READY=1")
        assert manager.recv(4096) == b"STATUS=new MAINPID=1\\udcff\nREADY=1"


def wait_for(process: subprocess.Popen[bytes], words: bytes) -> bytes:
    """Read what a service says until these words; gives the line they are in."""
    assert process.stderr is not None
    line = b""
    while words not in line:
        assert select.select([process.stderr], [], [], LIMIT)[0], "it says nothing"
        line = process.stderr.readline()
        assert line, "it ended"
    return line


# -- the journal ---------------------------------------------------------------------------------------------------


def journal(stream: int) -> dict[str, str]:
    status = os.fstat(stream)
    return {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}


def test_lines_for_the_journal_carry_their_priority(place: Path) -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as said:
        with service(place, "-v", "--driver", "fuse", env=journal(writing), stderr=writing) as process:
            assert b"<6>" + f"{SAMPLE} is mounted on {place}\n".encode() == said.readline()
            process.send_signal(signal.SIGUSR1)
            assert said.readline().startswith(b"<6>errors 0, ")
        os.close(writing)
        assert said.read() == b"<6>ending on SIGTERM\n"


def test_a_failure_is_an_error_in_the_journal(place: Path, tmp_path: Path) -> None:
    with (tmp_path / "said").open("w+b") as said:
        done = run(
            command("mount", "--foreground", tmp_path / "missing", place), stderr=said, env=journal(said.fileno())
        )
        assert done.returncode == 3
        said.seek(0)
        assert said.read().startswith(b"<3>ocifs: ")


def test_lines_for_anybody_else_carry_none(place: Path) -> None:
    with service(place, "-v", env={"JOURNAL_STREAM": "1:2"}) as process:
        assert wait_for(process, b"is mounted on") == f"ocifs: {SAMPLE} is mounted on {place}\n".encode()


# -- statistics ----------------------------------------------------------------------------------------------------


def statistics(place: Path) -> dict[str, int]:
    done = ocifs("stat-mount", "--json", place)
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout)
    return found


def test_stat_mount_shows_what_a_daemon_has_done(place: Path, tmp_path: Path, driver: str) -> None:
    with mounted(str(SAMPLE), place, driver=driver, cache=tmp_path / "cache") as mount:
        before = statistics(place)
        assert (before["errors"], before["decoded_spans"], before["decoded_bytes"]) == (0, 0, 0)
        assert agent("read", mount.at("etc/motd"), 0, 100) == MOTD.hex()
        after = statistics(place)
        assert after["decoded_spans"] == 1
        assert after["decoded_ahead"] == 0
        assert after["requests"] >= before["requests"] + after["reads"] - before["reads"] > before["requests"]
        assert after["read_bytes"] >= before["read_bytes"] + len(MOTD)
        assert agent("read", mount.at("etc/os-release"), 0, 10)  # in another layer
        other = statistics(place)
        assert other["decoded_spans"] == 2
        assert agent("read", mount.at("etc/passwd"), 0, 10)  # in the same span
        last = statistics(place)
        assert last["span_hits"] - other["span_hits"] == last["reads"] - other["reads"]
        assert last["decoded_spans"] == 2
        assert after["decoded_bytes"] >= len(MOTD)
        assert 0 < after["cached_bytes"] <= after["cache_limit_bytes"] == 128 << 20
        shown = ocifs("stat-mount", place).stdout
        assert "decoded spans:      2\n" in shown
        assert f"pid:                {mount.pid}\n" in shown


def test_ps_shows_statistics_of_those_that_answer(place: Path, tmp_path: Path, driver: str) -> None:
    with mounted(str(SAMPLE), place, driver=driver, cache=tmp_path / "cache", ended=True) as mount:
        assert agent("read", mount.at("etc/motd"), 0, 100) == MOTD.hex()
        table = ocifs("ps", "--statistics").stdout.splitlines()
        assert table[0].split() == ["MOUNT", "POINT", "STATE", "REQUESTS", "READ", "DECODED", "SPANS", "HITS", "ERRORS"]
        (line,) = [line.split() for line in table if line.startswith(f"{place} ")]
        assert (line[1], line[-3], line[-1]) == ("live", "1", "0")
        assert json_of(place)["statistics"]["decoded_spans"] == 1
        mount.process.signal(signal.SIGKILL)
        assert mount.process.gone()
        table = ocifs("ps", "--statistics").stdout.splitlines()
        assert [line.split() for line in table if line.startswith(f"{place} ")] == [[str(place), "dead"]]
        assert json_of(place)["statistics"] is None


def json_of(place: Path) -> Any:
    lines = map(json.loads, ocifs("ps", "-s", "--json").stdout.splitlines())
    return next(one for one in lines if one["mountpoint"] == str(place))


def test_sigusr1_logs_statistics_and_harms_nothing(place: Path, tmp_path: Path, driver: str) -> None:
    with mounted(str(SAMPLE), place, driver=driver, cache=tmp_path / "cache") as mount:
        for _ in range(3):
            mount.process.signal(signal.SIGUSR1)
        assert agent("read", mount.at("etc/motd"), 0, 100) == MOTD.hex()
        statistics(place)  # answered by the loop that has seen the signal before
        assert re.search(r"INFO errors 0, requests \d+, ", mount.logged())


def test_stat_mount_of_what_is_not_or_no_longer_served_says_so(place: Path, tmp_path: Path, driver: str) -> None:
    done = ocifs("stat-mount", place)
    assert (done.returncode, done.stdout) == (3, "")
    with mounted(str(SAMPLE), place, driver=driver, cache=tmp_path / "cache", ended=True) as mount:
        mount.process.signal(signal.SIGKILL)
        assert mount.process.gone()
        done = ocifs("stat-mount", place)
        assert (done.returncode, done.stdout) == (6, "")
        assert f"ocifs umount {place}" in done.stderr


def test_nobody_else_can_reach_a_daemon(place: Path, tmp_path: Path) -> None:
    with mounted(str(SAMPLE), place, cache=tmp_path / "cache") as mount:
        socket_path = mount.log.with_suffix(".socket")
        assert socket_path.is_socket()
        assert agent("as_user", 4242, "/", "errors", [[["stat", str(socket_path)]]]) == ["EACCES"]
    assert not socket_path.exists()


# -- units ---------------------------------------------------------------------------------------------------------


def unit() -> dict[str, list[str]]:
    """What the service's section says, as words."""
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # as configparser's documentation has it
    parser.read_string((UNITS / "ocifs@.service").read_text())
    return {name: value.split() for name, value in parser["Service"].items()}


def test_systemd_finds_no_fault_with_the_units(tmp_path: Path) -> None:
    for source in UNITS.iterdir():
        # This machine's ocifs may be installed nowhere.
        text = source.read_text().replace("=ocifs ", f"={PYTHON[0]} -m ocifs ")
        (tmp_path / source.name).write_text(text)
    units = [tmp_path / name for name in ("ocifs@.service", "srv-app.mount", "srv-app.automount")]
    done = run(["systemd-analyze", "verify", "--man=no", *units])
    assert (done.returncode, done.stderr) == (0, "")


def test_the_service_has_no_mount_namespace_of_its_own() -> None:
    """systemd.exec(5): these set one up, and what is mounted in it stays in it."""
    secluding = ("Protect", "Private", "ReadOnly", "ReadWrite", "Inaccessible", "Bind", "Temporary", "Root", "Mount")
    assert [name for name in unit() if name.startswith((*secluding, "NoExecPaths", "ExecPaths", "DynamicUser"))] == []


def test_the_example_configuration_is_what_the_service_reads() -> None:
    lines = [line for line in (UNITS / "app.conf").read_text().splitlines() if line and not line.startswith("#")]
    names = {line.partition("=")[0] for line in lines}
    assert names == set(re.findall(r"\$\{?(\w+)", " ".join(unit()["ExecStart"])))
    assert "/etc/ocifs/%i.conf" in unit()["EnvironmentFile"]


def test_a_mount_needs_no_more_capabilities_than_the_service_has(place: Path, tmp_path: Path, driver: str) -> None:
    owned = tmp_path / "owned"
    owned.mkdir()
    names = [name.removeprefix("CAP_").lower() for name in unit()["CapabilityBoundingSet"]]
    kept = ",".join(["-all", *(f"+{name}" for name in names)])
    wrapper = ["setpriv", "--no-new-privs", "--bounding-set", kept, "--inh-caps", kept]
    address = str(tmp_path / "notify")
    with (
        listener(address) as manager,
        service(place, "--driver", driver, wrapper=wrapper, env={"NOTIFY_SOCKET": address}) as process,
    ):
        assert manager.recv(4096).startswith(b"READY=1")
        effective = re.search(r"CapEff:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())
        assert effective is not None
        assert int(effective[1], 16).bit_count() == len(names)
        assert agent("read", f"{place}/etc/motd", 0, 100) == MOTD.hex()
    assert not in_mountinfo(place)


def allowed_calls(words: Sequence[str]) -> set[str]:
    """The system calls of a filter, its groups (@mount) unfolded by systemd itself."""
    found: set[str] = set()
    for word in words:
        if not word.startswith("@"):
            found.add(word)
            continue
        listed = run(["systemd-analyze", "--no-pager", "syscall-filter", word]).stdout.splitlines()[1:]
        found |= allowed_calls([line.strip() for line in listed if line.strip() and not line.strip().startswith("#")])
    return found


def test_a_mount_makes_no_system_call_that_the_service_forbids(place: Path, tmp_path: Path, driver: str) -> None:
    trace = tmp_path / "trace"
    wrapper = ["strace", "--follow-forks", "--interruptible=never", "--quiet=all", "--output", str(trace)]
    address = str(tmp_path / "notify")
    words = [*wrapper, *command("mount", "--foreground", "--driver", driver, SAMPLE, place)]
    with listener(address) as manager:
        tracer = subprocess.Popen(words, stdin=subprocess.DEVNULL, env=environment({"NOTIFY_SOCKET": address}))
        try:
            assert manager.recv(4096).startswith(b"READY=1")
            assert agent("read", f"{place}/etc/motd", 0, 100) == MOTD.hex()
            assert ocifs("umount", place).returncode == 0
            assert tracer.wait(LIMIT) == 0
        finally:
            force_away(place)
            tracer.kill()
            tracer.wait()
    # What strace calls syscall_0x… is a call that a signal has interrupted, on its way back.
    made = set(re.findall(r"^\d+ +((?!syscall_)\w+)\(", trace.read_text(errors="replace"), re.MULTILINE))
    assert {"mount" if driver == "fuse" else "fsmount", "read"} <= made
    assert sorted(made - allowed_calls(unit()["SystemCallFilter"])) == []


def test_the_service_cleans_up_after_a_killed_daemon_and_nothing_else(place: Path, tmp_path: Path, driver: str) -> None:
    assert unit()["ExecStopPost"] == ["ocifs", "umount", "--dead", "${DIR}"]
    assert ocifs("umount", "--dead", place).returncode == 0
    with mounted(str(SAMPLE), place, driver=driver, cache=tmp_path / "cache", ended=True) as mount:
        assert ocifs("umount", "--dead", place).returncode == 0
        assert in_mountinfo(place)
        mount.process.signal(signal.SIGKILL)
        assert mount.process.gone()
        done = ocifs("umount", "--dead", place)
        assert (done.returncode, done.stderr) == (0, "")
        assert not in_mountinfo(place)


def test_a_service_that_was_killed_can_be_started_again(place: Path, tmp_path: Path, driver: str) -> None:
    address = str(tmp_path / "notify")
    with listener(address) as manager:
        env = {"NOTIFY_SOCKET": address}
        first = subprocess.Popen(
            command("mount", "--foreground", "--driver", driver, SAMPLE, place), env=environment(env)
        )
        held = Process(first.pid)
        try:
            assert manager.recv(4096).startswith(b"READY=1")
        finally:
            first.kill()
            first.wait()
            held.close()
        assert in_mountinfo(place)
        with service(place, "--driver", driver, env=env):
            assert manager.recv(4096).startswith(b"READY=1")
            assert agent("read", f"{place}/etc/motd", 0, 100) == MOTD.hex()
