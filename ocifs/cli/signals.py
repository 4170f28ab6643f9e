"""Signals that ask a command to end, for commands that leave something behind unless they are let to undo it.

Not here: signals of daemons (`ocifs.driver`), and those that are passed on to a container (`ocifs.bundle.containers`).
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType


@contextlib.contextmanager
def unwound() -> Iterator[None]:
    """Have SIGTERM and SIGHUP end the block as ^C does: everything that is left on the way is undone.

    The first one counts: what is being undone is not left half-way because somebody asks again.
    """

    def leave(number: int, _: FrameType | None) -> None:
        for other, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(other, lambda *_: None)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
