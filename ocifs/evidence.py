"""The evidence log: what was opened and which bytes were read, each line bound to the one before.

JSON Lines (UTF-8, one object a line), appended to and never rewritten::

    {"previous": HEX, "number": N, "time": RFC 3339, "case": …, "examiner": …, "item": …, "event": …, …}

``previous`` is the SHA-256 of the line before, without its newline; 64 zeros in the first. So no line can be altered, left
out or put in without every later one telling. What a chain cannot tell is that its last line was altered, its end cut off,
or all of it written anew: who must prove that notes the SHA-256 of the last line, the *head*, which `verify` gives and
`ocifs evidence verify --head` compares.

Events: ``began`` (a command: its words, who, where), ``mounted``, ``opened`` (an image: reference, source, digests, layers
and whether they are what the image says), ``read`` (a range of a layer's uncompressed tar, which its diff ID names, and
whether its stored bytes were those that were indexed), ``blob`` (a blob as stored; below ``.ocifs/raw`` unverified),
``view`` (an examined mount made a view or a report), ``closed``.

Ranges that follow upon one another are joined, up to a second and 64 MiB, so that a file read to its end is a few lines.
What was read last is written down with what comes next; of a mount after a second (`ocifs.spans`). So a mount that is
killed may leave out the last second, a command its last range.

A log that cannot be written stops what it is about: the read fails, for one that nobody can prove is worth nothing. What
was read before and is not written down yet is kept until it can be.

Not here: what an image is (`ocifs.image`), who reads (`ocifs.spans`).
"""

from __future__ import annotations

import datetime
import errno
import fcntl
import hashlib
import os
import stat
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

import msgspec

from ocifs.errors import BusyError, DamagedError, MachineError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FIRST: Final = "0" * 64
"""What the first line has for the hash of the one before."""

_LONGEST: Final = 64 << 20
"""Bytes of the longest line that is written or read, with its newline: an image of 100,000 layers takes half of that."""
_TAIL: Final = 1 << 16
"""Bytes of a log's end that are looked at first for its last line."""
_PROBLEMS: Final = 100
"""Problems that are described; more are counted."""
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
    diff_id: str
    start: int
    stop: int
    since: float


class _End(NamedTuple):
    """Where a log ends."""

    size: int
    """Bytes of the file."""
    previous: str
    """SHA-256 of the last line."""
    number: int
    """Of the next line."""


class EvidenceLog:
    """A log open for appending; one process at a time. A fork's child goes on with it, and then its parent must not."""

    def __init__(self, path: Path, about: About | None = None) -> None:
        """Open the log, made if need be, for this user alone.

        Raises `BusyError` if another process writes to it, `DamagedError` if it does not end with a line of a log,
        `MachineError` if it cannot be opened, or is no regular file.
        """
        self._path = path
        self._about = about or About()
        self._range: _Range | None = None
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        try:
            self._fd = os.open(path, flags, 0o600)
        except OSError as error:
            raise MachineError(f"the evidence log {path} cannot be opened: {error.strerror}") from None
        try:
            found = os.fstat(self._fd)
            if not stat.S_ISREG(found.st_mode):
                raise MachineError(f"the evidence log {path} is no regular file: what goes there cannot be checked")
            self._lock()
            self._end = self._last()
            self._next = self._end
            """Where the log ends once the line is written that is being written."""
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

    def _last(self) -> _End:
        """Say where the log ends."""
        size = os.fstat(self._fd).st_size
        if not size:
            return _End(0, FIRST, 1)
        tail, wanted = b"", _TAIL
        while b"\n" not in tail[:-1] and len(tail) < min(size, _LONGEST):
            tail = os.pread(self._fd, wanted, max(0, size - wanted))
            wanted *= 16
        line = tail.removesuffix(b"\n").rpartition(b"\n")[2]
        try:
            if not tail.endswith(b"\n"):
                raise ValueError
            number = msgspec.json.decode(line, type=_Line).number
        except (msgspec.MsgspecError, ValueError, RecursionError):
            raise DamagedError(
                f"{self._path} does not end with a line of an evidence log; look at it with 'ocifs evidence verify', and "
                "begin a new file"
            ) from None
        return _End(size, hashlib.sha256(line).hexdigest(), number + 1)

    @property
    def head(self) -> str:
        """The SHA-256 of the last line."""
        return self._end.previous

    def append(self, event: str, **fields: Any) -> None:  # noqa: ANN401 (whatever JSON can hold)
        """Write a line. Raises `MachineError` if it does not go to the disk whole; nothing of it stays then."""
        self.flush()
        self._write(event, fields)

    def _write(self, event: str, fields: dict[str, Any]) -> None:
        end = self._settled()
        about = msgspec.structs.asdict(self._about)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
        what = {"previous": end.previous, "number": end.number, "time": now, **about, "event": event, **fields}
        line = msgspec.json.encode(what)
        data = line + b"\n"
        if len(data) > _LONGEST:
            raise self._failed(f"a line of {len(data)} bytes is too long")
        self._next = _End(end.size + len(data), hashlib.sha256(line).hexdigest(), end.number + 1)
        try:
            written = os.write(self._fd, data)
            if written != len(data):
                os.ftruncate(self._fd, end.size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise self._failed(error.strerror or str(error)) from None
        self._end = self._next

    def _settled(self) -> _End:
        """Say where the log ends, also after a write that was interrupted, or of which a part may be left."""
        size = os.fstat(self._fd).st_size
        if size == self._next.size:
            self._end = self._next
        elif self._end.size < size < self._next.size:
            try:
                os.ftruncate(self._fd, self._end.size)
            except OSError as error:
                raise self._failed(error.strerror or str(error)) from None
        elif size != self._end.size:
            raise self._failed("somebody else has changed it")
        return self._end

    def _failed(self, why: str) -> MachineError:
        return MachineError(f"the evidence log {self._path} cannot be written: {why}; nothing is read without it")

    def read(self, layer: int, diff_id: str, layer_offset: int, size: int, problem: str | None = None) -> None:
        """Note that ``size`` bytes at ``layer_offset`` of a layer were read and verified, or what kept them from it.

        The layer has this number in its image, and ``diff_id`` is the digest of its uncompressed tar.
        Raises `MachineError` if it cannot be written down: then the bytes are not to be given to anybody.
        """
        pending = self._range
        stop = layer_offset + size
        if (
            problem is None
            and pending is not None
            and (pending.layer, pending.diff_id, pending.stop) == (layer, diff_id, layer_offset)
            and stop - pending.start <= _JOINED_SIZE
            and time.monotonic() - pending.since < _JOINED_SECONDS
        ):
            self._range = pending._replace(stop=stop)
            return
        self.flush()
        if problem is None:
            self._range = _Range(layer, diff_id, layer_offset, stop, time.monotonic())
        else:
            self._write("read", _read(layer, diff_id, layer_offset, size, verified=False) | {"problem": problem})

    def flush(self) -> None:
        """Write down what was read so far. Raises `MachineError` if that fails; it is kept then."""
        pending = self._range
        if pending is not None:
            layer, diff_id, start, stop, _ = pending
            self._write("read", _read(layer, diff_id, start, stop - start, verified=True))
            self._range = None

    def leave(self) -> None:
        """Let go of the file without a word, because a forked child goes on with it. `close` does nothing then."""
        if self._fd >= 0:
            self._range = None
            os.close(self._fd)
            self._fd = -1

    def close(self) -> None:
        """Write the last line, bring everything to the disk, and let go of the file. Does nothing when repeated.

        Raises `MachineError` if that fails.
        """
        if self._fd < 0:
            return
        try:
            self.append("closed")
            os.fsync(self._fd)
        except OSError as error:
            raise self._failed(error.strerror or str(error)) from None
        finally:
            self.leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _read(layer: int, diff_id: str, layer_offset: int, size: int, *, verified: bool) -> dict[str, Any]:
    return {"layer": layer, "diff_id": diff_id, "layer_offset": layer_offset, "size": size, "verified": verified}


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
    """What is wrong, and where; behind the first hundred how many more there are."""


def verify(path: Path, head: str | None = None) -> Checked:
    """Check that each line is bound to the one before, and that one of them is ``head``, if that is given.

    Raises `NotFoundError` or `MachineError` if the log cannot be read.
    """
    problems: list[str] = []
    more = 0
    previous, number, expected = FIRST, 0, 1
    wanted = None if head is None else head.strip().lower()
    head_seen = wanted in (None, FIRST)
    for line in _lines(path):
        number += 1
        said = _parsed(line)
        for problem in _wrong(line, said, number, expected, previous):
            if len(problems) < _PROBLEMS:
                problems.append(problem)
            else:
                more += 1
        previous = hashlib.sha256(line.removesuffix(b"\n")).hexdigest()
        # One line left out is said once, not of every later one.
        expected = (expected if said is None else said.number) + 1
        head_seen = head_seen or previous == wanted
    if more:
        problems.append(f"and {more} problems more")
    if not head_seen:
        problems.append(f"no line has the SHA-256 {wanted}: the log was altered, or its end cut off")
    return Checked(number, previous, tuple(problems))


def _parsed(line: bytes) -> _Line | None:
    try:
        return msgspec.json.decode(line.removesuffix(b"\n"), type=_Line)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None


def _wrong(line: bytes, said: _Line | None, number: int, expected: int, previous: str) -> Iterator[str]:
    """Say what is wrong with line ``number``, ``said``, which should call itself ``expected`` and follow on ``previous``."""
    if said is None:
        yield f"line {number} is no line of an evidence log"
        return
    if said.previous != previous:
        yield f"line {number} does not follow upon line {number - 1} as it is now"
    if said.number != expected:
        yield f"line {number} calls itself number {said.number} where {expected} should follow"
    if not line.endswith(b"\n"):
        yield f"line {number} has no end"


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while line := file.readline(_LONGEST):
                yield line
    except FileNotFoundError:
        raise NotFoundError(f"there is no evidence log {path}") from None
    except OSError as error:
        raise MachineError(f"the evidence log {path} cannot be read: {error.strerror}") from None
