"""Running ocifs as a command, in this process or in one of its own."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from ocifs.cli import main

if TYPE_CHECKING:
    import pytest

SAMPLE = str(Path(__file__).resolve().parent.parent / "sample")
"""The sample image that the README's tour walks through."""

OCIFS = [sys.executable, "-m", "ocifs"]
"""The words that start ocifs in a process of its own."""


class Result(NamedTuple):
    """How a command ended, what it wrote to standard output and to standard error."""

    status: int
    out: bytes
    err: str


class Run(Protocol):
    """Runs a command in this process, through the same boundary as the program."""

    def __call__(self, *words: str) -> Result:
        """Run ``ocifs WORDS…``."""


def runner(captured: pytest.CaptureFixture[bytes]) -> Run:
    """Make a `Run` of pytest's ``capfdbinary``. What ``-v`` does to logging is undone after each command."""

    def run(*words: str) -> Result:
        logger, root = logging.getLogger("ocifs"), logging.getLogger()
        level, handlers = logger.level, list(root.handlers)
        captured.readouterr()
        try:
            status = main(words)
        finally:
            logger.setLevel(level)
            root.handlers[:] = handlers
        out, err = captured.readouterr()
        return Result(status, out, err.decode())

    return run
