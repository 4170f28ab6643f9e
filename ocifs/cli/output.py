r"""What a person or a program reads: standard output, standard error, and how values look on them.

Standard output is bytes. On a terminal a name's control characters and undecodable bytes are escaped, because an image's
names are somebody else's words; in a pipe they come out as they are. JSON is pure ASCII: undecodable bytes are lone
surrogates (``\udcXX``, as surrogateescape has it), so every name survives a round trip.

Not here: what is printed (the commands).
"""

from __future__ import annotations

import contextlib
import os
import sys
import unicodedata
from collections.abc import Sequence
from typing import BinaryIO, Final

from ocifs.errors import MachineError

_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


# -- standard output -----------------------------------------------------------------------------------------------


def _stdout() -> BinaryIO:
    if sys.stdout is None:  # the caller closed it
        raise MachineError("standard output is closed, so there is nowhere to write to")
    return sys.stdout.buffer


def write(data: bytes | memoryview) -> None:
    """Write bytes. BrokenPipeError passes (`ocifs.cli.main` ends quietly); any other failure is a `MachineError`."""
    try:
        _stdout().write(data)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise unwritable(error) from error


def unwritable(error: OSError) -> MachineError:
    """Say that standard output takes nothing more, and why."""
    return MachineError(f"cannot write to standard output: {error.strerror}")


def flush() -> None:
    """Write what is still in the buffer; errors as `write`."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise unwritable(error) from error


def discard_output() -> None:
    """Let nothing more be written, so that the interpreter's end does not complain about a broken pipe."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def print_line(text: str) -> None:
    """Write a line of text; lone surrogates become the bytes they stand for."""
    write(encode(text) + b"\n")


def print_json(value: object) -> None:
    """Write one value as one line of ASCII JSON."""
    import json  # only the commands that print JSON pay for it

    write(json.dumps(value, separators=(",", ":")).encode("ascii") + b"\n")


def print_document(value: object) -> None:
    """Write one value as JSON over several lines, for one object that a person may read."""
    import json

    write(json.dumps(value, indent=2).encode("ascii") + b"\n")


def to_terminal() -> bool:
    """Whether a person reads standard output."""
    return sys.stdout is not None and sys.stdout.isatty()


# -- standard error ------------------------------------------------------------------------------------------------


def complain(message: str) -> None:
    """Write ``ocifs: MESSAGE`` as one line to standard error. Names in it may be hostile: nothing is left unescaped."""
    if sys.stderr is None:
        return
    with contextlib.suppress(OSError, ValueError):
        flush_quietly()
        sys.stderr.write(_as_error(f"ocifs: {printable(message)}") + "\n")
        sys.stderr.flush()


def _as_error(line: str) -> str:
    """The line with its priority in front if standard error is the system journal."""
    if "JOURNAL_STREAM" not in os.environ:
        return line
    import logging

    from ocifs.daemon.logs import goes_to_journal, with_priority  # only what systemd started

    level = logging.WARNING if line.startswith("ocifs: warning:") else logging.ERROR
    return with_priority(line, level) if goes_to_journal() else line


def flush_quietly() -> None:
    """Keep the order of what both streams say when they lead to one place."""
    with contextlib.suppress(OSError, MachineError):
        flush()


def sentence(message: str) -> str:
    """Give a message of click's the form of ours: no capital at its start, no full stop."""
    head = message[:1].lower() if message[1:2].islower() else message[:1]
    return (head + message[1:]).rstrip().rstrip(".")


# -- how values look -----------------------------------------------------------------------------------------------


def decode(name: bytes) -> str:
    """A name as text, undecodable bytes as lone surrogates."""
    return name.decode("utf-8", "surrogateescape")


def encode(text: str) -> bytes:
    """Text as bytes: the inverse of `decode`."""
    return text.encode("utf-8", "surrogateescape")


def printable(text: str) -> str:
    """Text that cannot do anything to a terminal: control and format characters, lone surrogates escaped."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else _escaped(character) for character in text)


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # noqa: PLR2004 (surrogateescape: byte 0xNN as U+DCNN)
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def shown(name: bytes, *, terminal: bool) -> str:
    """A name for a line of output: as it is in a pipe, escaped (backslash too, so that it is unambiguous) on a terminal."""
    text = decode(name)
    return printable(text.replace("\\", "\\\\")) if terminal else text


def width(text: str) -> int:
    """Columns that printable text takes on a terminal: wide East Asian characters two, combining ones none."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
        for character in text
    )


def short(digest: object) -> str:
    """A digest for a table: on a terminal only as much of it as tells it from others."""
    text = "-" if digest is None else str(digest)
    algorithm, colon, encoded = text.partition(":")
    return f"{algorithm}:{encoded[:12]}" if colon and to_terminal() else text


def human_size(size: int) -> str:
    """Bytes in binary units with three digits or so: ``310.2 MiB``."""
    value, unit = float(size), 0
    while value >= 1023.95 and unit < len(_UNITS) - 1:  # noqa: PLR2004 (what would be rounded to 1024.0)
        value, unit = value / 1024, unit + 1
    return f"{size} B" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"


def local_time(seconds: float, *, form: str = "%Y-%m-%d %H:%M") -> str:
    """A time in this machine's zone; one that the C library cannot show as seconds with an ``@``, as date(1) reads it."""
    import time

    try:
        return time.strftime(form, time.localtime(seconds))
    except (ValueError, OverflowError, OSError):
        return f"@{int(seconds)}"


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> None:
    """Write rows under a header, columns aligned; ``right`` are the columns (from 0) aligned to the right."""
    lines = [tuple(header), *(tuple(map(printable, row)) for row in rows)]
    widths = [max(width(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        cells = []
        for column, cell in enumerate(line):
            padding = " " * (widths[column] - width(cell))
            cells.append(padding + cell if column in right else cell + padding)
        print_line("  ".join(cells).rstrip())
