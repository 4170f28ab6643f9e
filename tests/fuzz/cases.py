"""The command line of the fuzzers: runs numbered cases until the time or their number is up, and stops at one that fails.

Not here: what a case is and what it must keep.
"""

from __future__ import annotations

import argparse
import faulthandler
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def run_cases(description: str | None, run_case: Callable[[int], object], *, hang_seconds: int = 60) -> None:
    """Call ``run_case`` with a number after the other, as the command line says: ``--seconds``, ``--first``, ``--cases``.

    What it raises is raised after the case's number was printed. A case that takes longer than ``hang_seconds`` ends the
    process with a traceback.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--cases", type=int, default=2**62)
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    number = arguments.first
    while number < arguments.first + arguments.cases and time.monotonic() < deadline:
        faulthandler.dump_traceback_later(hang_seconds, exit=True)
        try:
            run_case(number)
        except BaseException:
            print(f"case {number} fails; again with: --first {number} --cases 1", flush=True)
            raise
        number += 1
    faulthandler.cancel_dump_traceback_later()
    print(f"{number - arguments.first} cases, from {arguments.first}, nothing found")
