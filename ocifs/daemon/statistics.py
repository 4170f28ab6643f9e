"""How statistics get out of a daemon: a socket beside its record, in a directory that only its user can enter.

Whoever connects is sent one JSON object, its end is the end of the stream. A question changes nothing and needs no words,
so nothing is ever read from a client.

Why not a signal and a file: whoever asks would have to wait for the file to change, and two who ask would meet in it.
SIGUSR1 is for people and logs (`ocifs.driver.session`).
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec

from ocifs.daemon.records import Listed, State, socket_of, told_plainly
from ocifs.driver import Statistics
from ocifs.errors import MachineError

PATIENCE = 10.0
"""Seconds `ask` waits for an answer, which a daemon gives between two requests."""


@contextlib.contextmanager
def _reached(path: Path) -> Iterator[str]:
    """Give a name of ``path`` short enough for a socket's address (unix(7): 108 bytes)."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


@contextlib.contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """Give a socket that listens at ``path``; whoever removes the record removes it from there."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as asking:
        try:
            path.unlink(missing_ok=True)  # of a daemon that was killed
            with _reached(path) as name:
                asking.bind(name)
            asking.listen()
        except OSError as error:
            raise told_plainly(path, error) from error
        yield asking


def ask(path: Path) -> Statistics:
    """Ask the daemon that listens at ``path``. Raises `MachineError` if it does not answer."""
    answer = b""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking, _reached(path) as name:
            asking.settimeout(PATIENCE)
            asking.connect(name)
            while piece := asking.recv(1 << 16):
                answer += piece
        return msgspec.json.decode(answer, type=Statistics)
    except (OSError, msgspec.MsgspecError) as error:
        raise MachineError(f"the daemon does not answer at {path}: {error}") from error


def statistics_of(listed: Listed) -> Statistics | None:
    """What the daemon of a mount has done so far; None if it is dead or does not answer."""
    if listed.state is State.DEAD:
        return None
    try:
        return ask(socket_of(listed.record.log))
    except MachineError:
        return None
