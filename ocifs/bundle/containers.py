"""``ocifs run``: a container from nothing to nothing, in the foreground.

For as long as it lives it has a place in the runtime directory, with a bundle whose changes are kept in memory, the
runtime's own state, and a lock. The lock says who is alive, whatever happened: a place whose lock can be taken belongs to
an ocifs that was killed, and the next one that starts a container clears it away, the container included.

The lock is one of fcntl(2), because that belongs to this process alone: the daemon, forked from it, has no part in it.

Signals
    Until the container runs, a signal that asks us to end undoes what was done (`ocifs.cli.signals.unwound`). Then
    signals are waited for, one by one, and passed on to the runtime, which passes them on to the container's first
    process; ^C from a terminal has reached the runtime already. That process is init in there, and the kernel keeps from
    it what it has no handler for: who asks a second time gets the container killed.

Not here: bundles (`ocifs.bundle.lifecycle`), user namespaces (`ocifs.bundle.namespace`).
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Self

from ocifs import daemon, kernel
from ocifs.bundle.lifecycle import Opening, Plan, make_bundle
from ocifs.errors import MachineError, OcifsError
from ocifs.mountinfo import mounts

_log = logging.getLogger(__name__)

RUNTIMES: Final = ("runc", "crun")
"""In the order in which they are looked for."""

_ENDING: Final = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT})
_PASSED_ON: Final = _ENDING | {signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT, signal.SIGALRM}
_BY_KERNEL: Final = 0x80
"""SI_KERNEL of siginfo(2): from the terminal, to all in the foreground, the runtime among them."""
_PATIENCE: Final = 30.0
"""Seconds for a runtime to kill or delete a container: runc itself gives up after 10."""


def find_runtime(name: str | None) -> str:
    """The path of the runtime of that name, or of the first that is there. Raises `MachineError` if there is none."""
    wanted = RUNTIMES if name is None else (name,)
    for one in wanted:
        found = shutil.which(one)
        if found is not None:
            return found
    raise MachineError(f"{' and '.join(wanted)} cannot be found; install the package {wanted[0]}")


def run_container(opening: Opening, plan: Plan, runtime: str) -> int:
    """Run a container of the image that ``opening`` opens, and give its exit status; 128 + N if signal N ended it.

    Raises what `make_bundle` raises. Nothing of it is left.
    """
    base = daemon.runtime_dir() / "containers"
    clear_dead(base)
    with _Place(base, runtime) as place:
        make_bundle(place.bundle, opening, plan)
        return _supervise(place)


# -- places --------------------------------------------------------------------------------------------------------


class _Place:
    """Where one container lives. A context manager: at its end everything is gone."""

    def __init__(self, base: Path, runtime: str) -> None:
        """Take a new place below ``base``."""
        self.name = f"ocifs-{os.getpid()}-{secrets.token_hex(4)}"
        self.path = base / self.name
        self.bundle = self.path / "bundle"
        self.runtime = runtime
        try:
            with _serialised(base):
                self.path.mkdir(mode=0o700)
                self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                fcntl.lockf(self._lock, fcntl.LOCK_EX)
                os.write(self._lock, os.fsencode(runtime))
        except OSError as error:
            raise MachineError(f"cannot keep a container in {base}: {error.strerror}") from error

    def words(self, *command: str) -> list[str]:
        """The runtime's command line for this container."""
        return [self.runtime, "--root", str(self.path / "state"), *command]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        # Nothing may come in between; what comes meanwhile acts afterwards.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)
        try:
            _clear(self.path, self.runtime)
        finally:
            os.close(self._lock)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _clear(place: Path, runtime: str) -> None:
    """Remove a container, its mounts and its place. Raises `MachineError` if a mount cannot be taken down.

    Not by `end_bundle`, which lets be what is in use: nobody but the container was to use this. Another mount namespace
    that was made meanwhile has copies of the mounts, and keeps neither the place nor the daemon.
    """
    if (place / "state" / place.name).exists():
        _ask([runtime, "--root", str(place / "state"), "delete", "--force", place.name])
    inside = os.fsencode(place) + b"/"
    while found := [entry.mountpoint for entry in mounts() if entry.mountpoint.startswith(inside)]:
        kernel.unmount(found[-1], flags=kernel.MNT_DETACH)
    for listed in daemon.records():
        # In a mount namespace that nobody else is in any more, a daemon would serve itself for ever.
        if listed.state is not daemon.State.DEAD and os.fsencode(listed.record.mountpoint).startswith(inside):
            daemon.end(listed.record)
    shutil.rmtree(place, ignore_errors=True)


def _ask(command: list[str]) -> None:
    """Have the runtime do something to a container that may be gone already."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(command, capture_output=True, timeout=_PATIENCE, check=False)  # noqa: S603 (our own words)
        if done.returncode:
            _log.info("%s: %s", " ".join(command), done.stderr.decode(errors="replace").strip())


def clear_dead(base: Path) -> None:
    """Clear away what containers of a killed ocifs have left below ``base``; what cannot be is left, with a warning."""
    with contextlib.suppress(FileNotFoundError), _serialised(base):
        for place in base.iterdir():
            try:
                lock = os.open(place / "lock", os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:  # killed before it had one
                shutil.rmtree(place, ignore_errors=True)
                continue
            except OSError as error:
                _log.warning("cannot look at the container in %s: %s", place, error.strerror)
                continue
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _clear(place, os.fsdecode(os.read(lock, 4096)) or RUNTIMES[0])
            except BlockingIOError:
                pass  # its ocifs lives
            except OcifsError as error:
                _log.warning("a container of a killed ocifs is not cleared away yet: %s", error)
            finally:
                os.close(lock)


@contextlib.contextmanager
def _serialised(base: Path) -> Iterator[None]:
    """Let one process at a time make or judge places; ``base`` is made if need be."""
    base.mkdir(mode=0o700, exist_ok=True)
    fd = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


# -- while it runs -------------------------------------------------------------------------------------------------


def _supervise(place: _Place) -> int:
    """Start the runtime in the foreground, pass signals on, and give its exit status."""
    words = place.words("run", "--bundle", str(place.bundle), place.name)
    # What whoever started us had ignored (as nohup(1) does) would come too, once it is waited for.
    passed_on = {number for number in _PASSED_ON if signal.getsignal(number) is not signal.SIG_IGN}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, passed_on | {signal.SIGCHLD})
    try:
        # Python ignores SIGPIPE, which would go on to the container.
        child = os.posix_spawn(
            place.runtime, words, os.environ, setsigmask=before, setsigdef=(signal.SIGPIPE, signal.SIGXFSZ)
        )
        asked = 0
        while True:
            got = signal.sigwaitinfo(passed_on | {signal.SIGCHLD})
            if got.si_signo == signal.SIGCHLD:
                pid, status = os.waitpid(child, os.WNOHANG)
                if pid:
                    code = os.waitstatus_to_exitcode(status)
                    return code if code >= 0 else 128 - code
                continue
            asked += got.si_signo in _ENDING
            if asked > 1:
                _ask(place.words("kill", place.name, "KILL"))
            elif got.si_code != _BY_KERNEL:
                os.kill(child, got.si_signo)
    except OSError as error:
        raise MachineError(f"cannot start {place.runtime}: {error.strerror}") from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
