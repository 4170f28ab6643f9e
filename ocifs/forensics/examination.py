"""An image opened to be examined: documents, layers, history, and the data of any version of any file.

Opened tolerantly: what breaks a rule or a digest is a warning, not a refusal. Nothing needs a mount, FUSE or root.

Not here: any question (the other modules of `ocifs.forensics`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Final

import msgspec

from ocifs.errors import DamagedError
from ocifs.history import History, Version, open_history
from ocifs.image import ImageOptions, OpenLayer, Progress, Resolved, note_opened, open_layers, resolve
from ocifs.spans import SpanCache, SpanReader
from ocifs.spec import layer_steps

if TYPE_CHECKING:
    from ocifs import spec
    from ocifs.evidence import EvidenceLog
    from ocifs.store import Store

PIECE_SIZE: Final = 1 << 20
"""Bytes of data given out at a time at most."""
MAX_HOLES: Final = 4 << 30
"""Bytes of holes in a file above which it is not hashed: an image can claim an exabyte of them at no cost."""


class Examination:
    """An image under examination. Made by `open_examination`."""

    def __init__(
        self,
        resolved: Resolved,
        layers: tuple[OpenLayer, ...],
        history: History,
        cache: SpanCache,
        evidence: EvidenceLog | None = None,
    ) -> None:
        self.resolved = resolved
        self.layers = layers
        """Those that are part of it, the base first."""
        self.history = history
        self.evidence = evidence
        self.spans = SpanReader([layer.data for layer in layers], cache, evidence=evidence)

    @cached_property
    def steps(self) -> tuple[spec.History | None, ...]:
        """The build step that wrote each layer, the base's first; None where the image does not say."""
        image = self.resolved.image
        return tuple(layer_steps(image.config, len(image.layers)))

    def layer(self, number: int) -> OpenLayer:
        """Give layer ``number``, from 1."""
        return self.layers[number - 1]

    def step(self, layer: int) -> spec.History | None:
        """Give the build step that wrote layer ``layer``, from 1; None if the image does not say."""
        return self.steps[layer - 1]

    def data(self, version: Version, start: int = 0, size: int | None = None) -> Iterator[bytes | memoryview]:
        """Give a file's bytes from ``start`` on, in pieces of a MiB at most; holes are zeros.

        Raises `DamagedError` if they do not decode to what was indexed, or are not there.
        """
        if version.unreadable:
            raise DamagedError(
                f"no layer holds the data of this file, {_shown(version)}: its layer breaks off, or it is a link to nothing"
            )
        stop = version.size if size is None else min(version.size, start + size)
        at = start
        for file_offset, layer, layer_offset, length in version.extents:
            end = min(stop, file_offset + length)
            if end <= at:
                continue
            yield from _zeros(min(file_offset, stop) - at)
            at = max(at, file_offset)
            while at < end:
                taken = min(PIECE_SIZE, end - at)
                yield from self.spans.read_blocking(layer, layer_offset + at - file_offset, taken)
                at += taken
        yield from _zeros(stop - at)


def _zeros(size: int) -> Iterator[bytes]:
    while size > 0:
        yield bytes(min(size, PIECE_SIZE))
        size -= PIECE_SIZE


def _shown(version: Version) -> str:
    return f"{version.path.decode(errors='backslashreplace')} of layer {version.layer}"


@contextlib.contextmanager
def open_examination(
    text: str,
    store: Store,
    options: ImageOptions,
    progress: Progress | None = None,
    *,
    cache: SpanCache | None = None,
    evidence: EvidenceLog | None = None,
) -> Iterator[Examination]:
    """Open the image that ``text`` names for the length of the block, whatever ``options.examine`` says.

    ``evidence`` is told what was opened and every range that is read.

    Raises the errors of `ocifs.image.resolve` and `open_layers`.
    """
    options = msgspec.structs.replace(options, examine=True)
    with contextlib.ExitStack() as stack:
        resolved = resolve(text, options, store, progress)
        layers = open_layers(resolved, store, options, progress)
        for layer in layers:
            stack.callback(layer.close)
        history = stack.enter_context(
            open_history(layers, store, follow_dirlinks=options.follow_dirlinks, progress=progress)
        )
        store.keep_bounded()
        if evidence is not None:
            note_opened(evidence, resolved, layers)
        yield Examination(resolved, layers, history, cache or SpanCache(), evidence)
