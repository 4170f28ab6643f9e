"""What every path of an image was in every layer: the record that examiners' commands and views answer from.

A merged tree shows what is there; the layers hold everything that ever was: what a whiteout removed, what a later layer
replaced, entries that a later one of the same tar overrode. The *history* of an image is one merge, watched
(`recorder`), and says of every entry of every layer which path it made, what it changed and how it ended: `Version`.
It is kept in the store next to image trees, under a key of the layers and rules that it was made from (`file`), so that
questions about one path read one frame of it, and questions about all of them one pass over a file.

Not here: what is asked (`ocifs.forensics`), file data (`ocifs.spans`), merging (`ocifs.overlay`).
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Sequence

import msgspec

from ocifs.errors import MachineError
from ocifs.forked import run_forked
from ocifs.history import file
from ocifs.history.file import History
from ocifs.history.version import Change, End, Version
from ocifs.image import OpenLayer, Progress, Silent
from ocifs.rules import RULES_VERSION, MergeOptions
from ocifs.store import Kind, Store

__all__ = ["Change", "End", "History", "Version", "open_history"]


def open_history(
    layers: Sequence[OpenLayer], store: Store, *, follow_dirlinks: bool = False, progress: Progress | None = None
) -> History:
    """Open the history of the image that has these layers, the base first, building it if the store has none.

    Raises `MachineError` if it cannot be built. Builds in a forked child, so the caller has no second thread.
    """
    options = MergeOptions(examine=True, follow_dirlinks=follow_dirlinks)
    made_from = (file.FORMAT_VERSION, RULES_VERSION, [(layer.number, layer.key) for layer in layers], options)
    key = hashlib.sha256(b"history" + msgspec.json.encode(made_from)).hexdigest()
    progress = progress or Silent()
    history, stored = store.get_or_build(
        Kind.HISTORY,
        key,
        load=lambda stored: (History(stored), stored),
        build=lambda: _build(key, layers, store, options, progress),
        waiting=lambda: progress.waiting("the history of the layers"),
    )
    history.on_damage = stored.discard
    return history


def _build(key: str, layers: Sequence[OpenLayer], store: Store, options: MergeOptions, progress: Progress) -> None:
    from ocifs import overlay  # noqa: PLC0415 (a history that is there already needs no merge)
    from ocifs.history.recorder import Recorder  # noqa: PLC0415 (likewise)

    progress.merging(len(layers))
    with store.new(Kind.HISTORY) as new:

        def work() -> None:
            # Nothing here is garbage until the child ends, and looking for it takes a third of the time.
            gc.disable()
            recorder = Recorder()
            merging = overlay.Merge(options, recorder)
            for layer in layers:
                index = layer.index
                recorder.begin(index.entries())
                merging.apply(overlay.LayerInput(layer.number, index.entries(), index.damage, index.notices))
            try:
                file.write(recorder.finish(), new.file, key=key)
                new.file.flush()
            except OSError as error:
                message = f"cannot write the history into the cache directory {store.path}: {error.strerror}"
                raise MachineError(message) from error

        run_forked(work, "merges the layers")
        new.publish(key)
