"""The evidence log: what was opened and which bytes were read, each line bound to the one before.

JSON Lines (UTF-8, one object a line), appended to and never rewritten::

    {"previous": HEX, "number": N, "time": RFC 3339, "case": …, "examiner": …, "item": …, "event": …, …}

``previous`` is the SHA-256 of the line before, without its newline; 64 zeros in the first. So no line can be altered, left
out or put in without every later one telling. What a chain cannot tell is that its end was cut off: who must prove that
notes the SHA-256 of the last line, the *head*, which `verify` gives and `ocifs evidence verify --head` compares.

Events: ``began`` (a command: its words, who, where), ``mounted``, ``opened`` (an image: reference, source, digests, layers
and whether they are what the image says), ``read`` (a range of a layer's uncompressed tar, and whether its stored bytes
were those that were indexed), ``blob`` (a blob as stored; below ``.ocifs/raw`` unverified), ``view`` (an examined mount made
a view or a report), ``closed``.

Ranges that follow upon one another are joined, up to a second and 64 MiB, so that a file read to its end is a few lines. A
process that is killed may leave out the last second.

A log that cannot be written stops what it is about: the read fails, for one that nobody can prove is worth nothing.

Not here: what an image is (`ocifs.image`), who reads (`ocifs.spans`).
"""

from __future__ import annotations

import datetime
import errno
import fcntl
import hashlib
import os
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

import msgspec

from ocifs.errors import BusyError, DamagedError, MachineError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FIRST: Final = "0" * 64
"""What the first line has for the hash of the one before."""

_TAIL: Final = 1 << 20
"""Bytes of the longest line that is written or read."""
_JOINED_SIZE: Final = 64 << 20
_JOINED_SECONDS: Final = 1.0


class About(msgspec.Struct, frozen=True):
    """What every line says of itself; None where nobody said it."""

    case: str | None = None
    examiner: str | None = None
    item: str | None = None


class _Range(NamedTuple):
    """A range of a layer that was read, not written down yet."""

    layer: int
    start: int
    stop: int
    since: float


class EvidenceLog:
    """A log open for appending; one process at a time. A fork's child goes on with it, and then its parent must not."""

    def __init__(self, path: Path, about: About | None = None) -> None:
        """Open the log, made if need be, for this user alone.

        Raises `BusyError` if another process writes to it, `DamagedError` if it does not end with a line of a log,
        `MachineError` if it cannot be opened.
        """
        self._path = path
        self._about = about or About()
        self._range: _Range | None = None
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise MachineError(f"the evidence log {path} cannot be opened: {error.strerror}") from None
        try:
            self._lock()
            self._size = os.fstat(self._fd).st_size
            self._previous, self._number = self._last()
        except BaseException:
            os.close(self._fd)
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise BusyError(f"another process is writing to the evidence log {self._path}") from None
            raise MachineError(f"the evidence log {self._path} cannot be locked: {error.strerror}") from None

    def _last(self) -> tuple[str, int]:
        """Give the hash of the last line and the number of the next."""
        if not self._size:
            return FIRST, 1
        start = max(0, self._size - _TAIL)
        tail = os.pread(self._fd, _TAIL, start)
        line = tail.rstrip(b"\n").rpartition(b"\n")[2]
        try:
            if not tail.endswith(b"\n"):
                raise ValueError
            number = msgspec.json.decode(line, type=_Line).number
        except (msgspec.MsgspecError, ValueError):
            raise DamagedError(
                f"{self._path} does not end with a line of an evidence log; look at it with 'ocifs evidence verify', and "
                "begin a new file"
            ) from None
        return hashlib.sha256(line).hexdigest(), number + 1

    @property
    def head(self) -> str:
        """The SHA-256 of the last line."""
        return self._previous

    def append(self, event: str, **fields: Any) -> None:  # noqa: ANN401 (whatever JSON can hold)
        """Write a line. Raises `MachineError` if it does not go to the disk whole; nothing of it stays then."""
        self.flush()
        self._write(event, fields)

    def _write(self, event: str, fields: dict[str, Any]) -> None:
        about = msgspec.structs.asdict(self._about)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
        what = {"previous": self._previous, "number": self._number, "time": now, **about, "event": event, **fields}
        line = msgspec.json.encode(what)
        data = line + b"\n"
        try:
            written = os.write(self._fd, data)
            if written != len(data):
                os.ftruncate(self._fd, self._size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise MachineError(
                f"the evidence log {self._path} cannot be written: {error.strerror}; nothing is read without it"
            ) from None
        self._size += len(data)
        self._previous = hashlib.sha256(line).hexdigest()
        self._number += 1

    def read(self, layer: int, layer_offset: int, size: int, problem: str | None = None) -> None:
        """Note that ``size`` bytes at ``layer_offset`` of a layer were read and verified, or what kept them from it."""
        pending = self._range
        if problem is None and pending is not None and (pending.layer, pending.stop) == (layer, layer_offset):
            pending = self._range = pending._replace(stop=layer_offset + size)
            if pending.stop - pending.start < _JOINED_SIZE and time.monotonic() - pending.since < _JOINED_SECONDS:
                return
            self.flush()
            return
        self.flush()
        if problem is None:
            self._range = _Range(layer, layer_offset, layer_offset + size, time.monotonic())
        else:
            self._write("read", _read(layer, layer_offset, size, verified=False) | {"problem": problem})

    def flush(self) -> None:
        """Write down what was read so far."""
        pending, self._range = self._range, None
        if pending is not None:
            start = pending.start
            self._write("read", _read(pending.layer, start, pending.stop - start, verified=True))

    def leave(self) -> None:
        """Let go of the file without a word, because a forked child goes on with it. `close` does nothing then."""
        if self._fd >= 0:
            self._range = None
            os.close(self._fd)
            self._fd = -1

    def close(self) -> None:
        """Write the last line, bring everything to the disk, and let go of the file. Does nothing when repeated."""
        if self._fd < 0:
            return
        try:
            self.append("closed")
            os.fsync(self._fd)
        finally:
            self.leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _read(layer: int, layer_offset: int, size: int, *, verified: bool) -> dict[str, Any]:
    return {"layer": layer, "layer_offset": layer_offset, "size": size, "verified": verified}


# -- verification ----------------------------------------------------------------------------------------------------


class _Line(msgspec.Struct):
    """What verification asks of a line."""

    previous: str
    number: int
    event: str


class Checked(NamedTuple):
    """What `verify` found."""

    lines: int
    head: str
    """SHA-256 of the last line; `FIRST` if there is none."""
    problems: tuple[str, ...]
    """What is wrong, and where; the first hundred."""


def verify(path: Path, head: str | None = None) -> Checked:
    """Check that each line is bound to the one before, and that one of them is ``head``, if that is given.

    Raises `NotFoundError` or `MachineError` if the log cannot be read.
    """
    problems: list[str] = []
    previous, number = FIRST, 0
    head_seen = head is None
    for line in _lines(path):
        number += 1
        whole = line.endswith(b"\n")
        body = line.removesuffix(b"\n")
        try:
            said = msgspec.json.decode(body, type=_Line)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            problems.append(f"line {number} is no line of an evidence log")
        else:
            if said.previous != previous:
                problems.append(f"line {number} does not follow upon line {number - 1} as it is now")
            if said.number != number:
                problems.append(f"line {number} calls itself number {said.number}")
            if not whole:
                problems.append(f"line {number} has no end")
        previous = hashlib.sha256(body).hexdigest()
        head_seen = head_seen or previous == head
    if not head_seen:
        problems.append(f"no line has the SHA-256 {head}: the log was altered, or its end cut off")
    return Checked(number, previous, tuple(problems[:100]))


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while line := file.readline(_TAIL + 1):
                yield line
    except FileNotFoundError:
        raise NotFoundError(f"there is no evidence log {path}") from None
    except OSError as error:
        raise MachineError(f"the evidence log {path} cannot be read: {error.strerror}") from None
