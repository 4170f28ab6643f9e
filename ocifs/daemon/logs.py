"""Where a daemon's log goes: a bounded file beside its record, the system's log, standard error.

Not here: what is logged.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import TextIO

from ocifs.daemon.records import told_plainly

_LOG_LIMIT = 1 << 20
"""Bytes in a log file before it is begun anew: 1 MiB."""


class _BoundedLog(logging.StreamHandler[TextIO]):
    """Appends to a file that is begun anew when it is full, whatever the file is called by then."""

    def __init__(self, path: Path) -> None:
        super().__init__(path.open("a", encoding="utf-8", errors="backslashreplace"))

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, making room first if need be."""
        with contextlib.suppress(OSError):
            if os.fstat(self.stream.fileno()).st_size > _LOG_LIMIT:
                os.ftruncate(self.stream.fileno(), 0)
                self.stream.write("(what was here is gone: the log had become too long)\n")
        super().emit(record)


def log_to_background(path: Path) -> None:
    """Send the log to a file beside the record and, where there is one, to the system's log.

    Raises `MachineError` if there is no room for the file.
    """
    # What cannot be logged, because the disk is full or the system's log is gone, is lost. Else the logging module says so
    # with a traceback, on the standard error of the command that is waiting for us.
    logging.raiseExceptions = False
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    root.addHandler(logging.NullHandler())  # without any, Python itself writes to standard error
    try:
        file = _BoundedLog(path)
    except OSError as error:
        raise told_plainly(path, error) from error
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root.addHandler(file)
    if Path("/dev/log").exists():
        from logging.handlers import SysLogHandler  # noqa: PLC0415 (2 ms for who waits for the mount, where there is such a log)

        with contextlib.suppress(OSError):
            system = SysLogHandler("/dev/log", SysLogHandler.LOG_DAEMON)
            system.setFormatter(logging.Formatter(f"ocifs[{os.getpid()}]: %(message)s"))
            root.addHandler(system)


_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
"""Levels as syslog(3) has them."""


def goes_to_journal() -> bool:
    """Whether standard error is the system journal (systemd.exec(5), JOURNAL_STREAM)."""
    with contextlib.suppress(OSError):
        status = os.fstat(2)
        return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
    return False


def with_priority(text: str, level: int) -> str:
    """Put before each line what tells the journal how much it matters (sd-daemon(3))."""
    return "\n".join(f"<{_PRIORITIES.get(level, 5)}>{line}" for line in text.split("\n"))


class _JournalFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return with_priority(super().format(record), record.levelno)


def log_to_standard_error() -> None:
    """Log there, with priorities if it is the journal; as much as ``-v`` asks for."""
    logging.basicConfig(format="ocifs: %(message)s")  # does nothing where -v has done it
    if goes_to_journal():
        for handler in logging.getLogger().handlers:
            handler.setFormatter(_JournalFormatter("%(message)s"))
