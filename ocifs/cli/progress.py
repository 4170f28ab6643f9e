"""The progress bar: what long work looks like on a terminal.

Nothing is shown unless standard error is a terminal and the work takes longer than a glance, and only then is rich
loaded. There is no thread: the index pass forks, and a fork with a second thread in it may stand still for ever. So
the bar is drawn when somebody reports progress, at most ten times a second.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from ocifs.cli.output import complain, printable
from ocifs.image import Progress, Silent

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

__all__ = ["Progress", "TerminalProgress", "showing"]

_PATIENCE: Final = 0.2
"""Seconds of work before anything is shown."""
_PERIOD: Final = 0.1
"""Seconds between two drawings."""


class TerminalProgress:
    """A bar for each layer, with bytes. Implements `ocifs.image.Progress`."""

    def __init__(self, doing: str = "indexing") -> None:
        """Show nothing yet; ``doing`` is the word for what is done with a layer."""
        self._doing = doing
        self._started: float | None = None
        self._drawn = 0.0
        self._bar: Bar | None = None
        self._sizes: dict[int, tuple[str, int, int]] = {}
        self._tasks: dict[int, TaskID] = {}
        self._waited = False

    def begin(self, layer: int, label: str, size: int) -> None:
        """A layer's turn comes."""
        self._started = self._started if self._started is not None else time.monotonic()
        self._sizes[layer] = (label, size, 0)
        self._draw()

    def advance(self, layer: int, done: int) -> None:
        """``done`` bytes of the layer in all."""
        label, size, _ = self._sizes.get(layer, ("", 0, 0))
        self._sizes[layer] = (label, size, done)
        self._draw()

    def end(self, layer: int) -> None:
        """The layer is done."""
        label, size, _ = self._sizes.get(layer, ("", 0, 0))
        self._sizes[layer] = (label, size, size)
        self._draw(now=True)

    def merging(self, layers: int) -> None:
        """The last step."""
        if self._bar is not None:
            self._bar.add_task(f"merging {layers} layers", total=None)
            self._draw(now=True)

    def waiting(self, what: str) -> None:
        """Somebody else does our work."""
        if not self._waited:
            self._waited = True
            complain(f"waiting for another ocifs to finish: {what}")

    def _draw(self, *, now: bool = False) -> None:
        moment = time.monotonic()
        if self._bar is None:
            if self._started is None or moment - self._started < _PATIENCE:
                return
            self._bar = _new_bar()
            self._bar.start()
        if not now and moment - self._drawn < _PERIOD:
            return
        self._drawn = moment
        for layer, (label, size, done) in self._sizes.items():
            if layer not in self._tasks:
                # The end of a blob's path is its digest, of which the beginning is enough to know it by.
                last = printable(label).rstrip("/").rsplit("/", 1)[-1][:12]
                words = f"{self._doing} archive {last}" if layer == 0 else f"{self._doing} layer {layer} {last}"
                self._tasks[layer] = self._bar.add_task(words, total=size or None)
            self._bar.update(self._tasks[layer], completed=done)
        self._bar.refresh()

    def pause(self) -> None:
        """Take the bar away until there is more to show, so that lines can be printed; what is done is forgotten."""
        self.close()
        self._sizes.clear()
        self._tasks.clear()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _new_bar() -> Bar:
    from rich.console import Console  # takes 60 ms: only for work that is long anyway
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    return Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        auto_refresh=False,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )


@contextlib.contextmanager
def showing(doing: str = "indexing") -> Iterator[Progress]:
    """Somebody to tell about progress: a bar if standard error is a terminal, else nobody. ``doing``: what it is."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield Silent()
        return
    progress = TerminalProgress(doing)
    try:
        yield progress
    finally:
        progress.close()
