"""Mounts images for tests, and looks at what is mounted, always from other processes.

The process that runs the tests must never touch a mount: were the daemon to hang, the test would hang in the kernel
where no time limit reaches it. So everything here starts a process with a time limit: `ocifs` (the command), `agent` (a
function of `tests.support.agent`), `umount`. And whatever happens to the test, a time limit or Ctrl-C included, `mounted`
ends the mount: politely, then by force.

Not here: what a mount should look like.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ocifs.daemon import runtime_dir
from ocifs.driver import erofs_verdict

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

ROOT = Path(__file__).resolve().parents[2]
"""The checkout: where ``python -m`` finds ocifs and the tests."""

DRIVERS = ("fuse", "erofs")
"""Every driver there is; all must pass the same conformance suite."""


def why_not(driver: str) -> str:
    """Say why a driver cannot be used on this machine; empty if it can."""
    return "" if driver == "fuse" else erofs_verdict(runtime_dir()).reason


LIMIT = 60.0
"""Seconds after which a process that looks at a mount is taken to hang. Nothing here takes more than a few."""

PYTHON = (sys.executable, "-X", "faulthandler")


class HangError(AssertionError):
    """A process did not come back within its time limit."""


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Give the environment for processes of the checkout."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **(extra or {})}


def run(
    command: Sequence[str | bytes | Path], *, limit: float = LIMIT, env: Mapping[str, str] | None = None, **more: Any
) -> subprocess.CompletedProcess[str]:
    """Run a command, its output kept as text; one that hangs is killed and fails the test."""
    try:
        return subprocess.run(
            command,
            check=False,
            timeout=limit,
            env=environment(env),
            **{
                "stdin": subprocess.DEVNULL,
                "stdout": subprocess.PIPE,
                "stderr": subprocess.PIPE,
                "encoding": "utf-8",
                "errors": "surrogateescape",
                **more,
            },
        )
    except subprocess.TimeoutExpired as error:
        raise HangError(f"{command} did not end within {limit} seconds; it said {error.stderr!r}") from None


def command(*words: str | Path) -> list[str]:
    """Give the words that run ocifs."""
    return [*PYTHON, "-m", "ocifs", *map(str, words)]


def patched(code: str, *words: str | Path) -> list[str]:
    """Give the words that run ocifs after some code that changes how it goes."""
    return [*PYTHON, "-c", f"{code}\nimport sys\nfrom ocifs.cli import main\nsys.exit(main())", *map(str, words)]


def ocifs(
    *words: str | Path, limit: float = LIMIT, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ocifs and give what it printed and its status."""
    return run(command(*words), limit=limit, env=env)


def start(function: str, *arguments: Any, limit: float = LIMIT) -> subprocess.Popen[str]:
    """Start a function of `tests.support.agent` in the background; `answer` gives what it returned.

    It kills itself a little after ``limit``, should nobody else.
    """
    told = os.memfd_create("arguments")  # they may be longer than a command line or an environment can be
    try:
        os.write(told, json.dumps([_plain(one) for one in arguments]).encode())
        return subprocess.Popen(
            [*PYTHON, "-m", "tests.support.agent", function],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            env=environment({"OCIFS_AGENT_ARGUMENTS": str(told), "OCIFS_AGENT_LIMIT": str(int(limit) + 5)}),
            pass_fds=[told],
            cwd=ROOT,
        )
    finally:
        os.close(told)


def answer(process: subprocess.Popen[str], *, limit: float = LIMIT) -> Any:
    """Give what a function started with `start` returned; one that raised fails the test, and so does one that hangs."""
    try:
        out, err = process.communicate(timeout=limit)
    except BaseException as error:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)  # one that waits for a daemon ends when that does
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        raise HangError(f"{process.args!r} did not end within {limit} seconds; it said {error.stderr!r}") from None
    assert process.returncode == 0, err
    return json.loads(out)


def agent(function: str, *arguments: Any, limit: float = LIMIT) -> Any:
    """Run a function of `tests.support.agent` in a process of its own and give what it returned."""
    return answer(start(function, *arguments, limit=limit), limit=limit)


def _plain(value: Any) -> Any:
    return os.fsdecode(value) if isinstance(value, (Path, bytes)) else value


# -- processes -----------------------------------------------------------------------------------------------------


class Process:
    """A process that is not our child, held so that its number cannot come to mean another."""

    def __init__(self, pid: int) -> None:
        """Hold the process ``pid``, which must be alive."""
        self.pid = pid
        self._fd = os.pidfd_open(pid)

    def signal(self, number: int) -> None:
        """Send a signal; nothing happens if the process is gone."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._fd, number)

    def gone(self, *, within: float = LIMIT) -> bool:
        """Say whether the process ends within so many seconds."""
        return bool(select.select([self._fd], [], [], within)[0])

    def descriptors(self) -> list[str]:
        """List what its open descriptors are, by their names."""
        found = []
        for link in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                found.append(os.readlink(link))
        return sorted(found)

    def memory(self, field: str = "RssAnon") -> int:
        """Give a figure of /proc/PID/status in bytes."""
        status = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field + ":"))

    def close(self) -> None:
        """Let go."""
        os.close(self._fd)


def in_mountinfo(path: Path) -> bool:
    """Say whether something is mounted at ``path``, without touching it."""
    wanted = os.fsencode(path)
    for byte in b"\\ \t\n":
        wanted = wanted.replace(bytes([byte]), b"\\%03o" % byte)
    lines = Path("/proc/self/mountinfo").read_bytes().split(b"\n")
    return any(line.split(b" ")[4] == wanted for line in lines if line)


def records(env: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Give what ``ocifs ps`` knows."""
    done = ocifs("ps", "--json", env=env)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def record_of(path: Path) -> dict[str, Any] | None:
    """Give the record of the mount that is to be seen at ``path``, live or dead, if there is one."""
    found = (one for one in records() if one["mountpoint"] == str(path) and one["state"] != "detached")
    return next(found, None)


# -- mounts --------------------------------------------------------------------------------------------------------


@dataclass
class Mount:
    """Something mounted: where, by whom, and what the daemon logs."""

    path: Path
    pid: int
    log: Path
    process: Process
    record: dict[str, Any]

    def logged(self) -> str:
        """Give the daemon's log so far; kept while it runs."""
        return self.log.read_text("utf-8") if self.log.exists() else ""

    def at(self, path: str | bytes) -> str:
        """Give a path inside the mount."""
        return f"{self.path}/{os.fsdecode(path).lstrip('/')}"


@contextmanager
def mounted(
    reference: str,
    path: Path,
    *options: str,
    driver: str = "fuse",
    cache: Path | None = None,
    env: Mapping[str, str] | None = None,
    limit: float = LIMIT,
    ended: bool = False,
    code: str = "",
) -> Iterator[Mount]:
    """Mount ``reference`` on ``path`` (made if need be) for the length of the block.

    A mount that does not come about, or does not end when it should, fails the test; with ``ended`` the test ends it.
    ``code`` is run first in the process that mounts (see `patched`).
    """
    if not in_mountinfo(path):  # else it is there, and what is mounted may be dead
        path.mkdir(parents=True, exist_ok=True)
    words = [
        "mount",
        "--driver",
        driver,
        *options,
        *(["--cache-dir", str(cache)] if cache else []),
        reference,
        str(path),
    ]
    daemon: Process | None = None
    try:
        done = run(patched(code, *words), limit=limit, env=env)
        assert done.returncode == 0, done.stderr
        record = record_of(path)
        assert record is not None, "ocifs ps does not list the mount"
        daemon = Process(record["pid"])
        yield Mount(path, record["pid"], Path(record["log"]), daemon, record)
        if not ended:
            done = run(["umount", str(path)], limit=30)
            assert done.returncode == 0, done.stderr
            # Longer than it takes: as long as another test's mount namespace holds a copy of the mount.
            assert daemon.gone(within=180), "the daemon goes on after its mount was taken down"
    finally:
        force_away(path, daemon)


def force_away(path: Path, daemon: Process | None = None) -> None:
    """End whatever is left of a mount, by force. Says nothing: it runs after the test has failed or is over."""
    if daemon is not None:
        if not daemon.gone(within=0):
            daemon.signal(signal.SIGKILL)
            daemon.gone(within=10)
        daemon.close()
    elif in_mountinfo(path):
        for pid in _servers_of(path):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    for _ in range(8):  # mounts on top of one another
        if not in_mountinfo(path):
            break
        with contextlib.suppress(HangError):
            run(["umount", "--lazy", "--no-canonicalize", str(path)], limit=10)


def _servers_of(path: Path) -> list[int]:
    """Find daemons by the mount point in their command line: for mounts that came about without telling anybody."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            if b"ocifs" in words and b"mount" in words and os.fsencode(path) in words:
                found.append(int(process.name))
    return found
