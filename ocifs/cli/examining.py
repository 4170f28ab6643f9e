"""What examiners' commands share: opening an image under examination, and what a version of a path looks like.

Not here: any command (`provenance`, `remains`, `comparing`, `searching`, `timelines`, `hashing`, `auditing`).
"""

from __future__ import annotations

import base64
import contextlib
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

from ocifs.cli import options as opt
from ocifs.cli import output
from ocifs.cli.listing import TYPE_NAMES
from ocifs.tree import Kind

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ocifs.cli.options import Choice
    from ocifs.forensics.examination import Examination
    from ocifs.history import Version

CHANGES: Final = ("added", "changed", "marker", "none")
"""What ``--json`` calls a `ocifs.history.Change`, by its number. Stable."""
ENDS: Final = ("visible", "whiteout", "opaque", "replaced", "overridden", "left-out")
"""What ``--json`` calls a `ocifs.history.End`, by its number. Stable."""


_given: ContextVar[Examination | None] = ContextVar("given", default=None)


@contextlib.contextmanager
def given(examination: Examination) -> Iterator[None]:
    """Have commands that run in the block examine an image that is open already, whatever they are told to open."""
    token = _given.set(examination)
    try:
        yield
    finally:
        _given.reset(token)


@contextlib.contextmanager
def opened_examination(choice: Choice, ref: str, *, beside: Examination | None = None) -> Iterator[Examination]:
    """The image under examination, its layers indexed and its history built if need be, open for the length of the block.

    ``beside`` is another one that is open: both write one evidence log, if one is wanted. Warnings are shown with -v only:
    'ocifs audit' is the command for them.
    """
    open_already = _given.get()
    if open_already is not None:
        yield open_already
        return
    from ocifs.forensics.examination import open_examination
    from ocifs.spans import SpanCache

    with contextlib.ExitStack() as stack:
        store = stack.enter_context(opt.opened_store(choice))
        evidence = stack.enter_context(opt.opened_evidence(choice)) if beside is None else beside.evidence
        with opt.new_progress() as progress:
            examination = stack.enter_context(
                open_examination(
                    ref,
                    store,
                    choice.image_options(),
                    progress,
                    cache=SpanCache(choice.cache_bytes()),
                    evidence=evidence,
                )
            )
        if choice.verbose:
            layers = (warned for layer in examination.layers for warned in layer.warnings)
            opt.show_warnings((*examination.resolved.warnings, *layers), choice)
        yield examination


def layer_json(examination: Examination, number: int) -> dict[str, Any]:
    """The stable fields that say which layer, and which build step wrote it."""
    layer = examination.layer(number)
    step = examination.step(number)
    return {
        "layer": number,
        "digest": str(layer.blob.digest or layer.index.digest),
        "diff_id": str(layer.index.diff_id),
        "created": step.created or None if step else None,
        "created_by": step.created_by or None if step else None,
    }


def version_json(version: Version) -> dict[str, Any]:
    """The stable fields of a version; what does not apply is null."""
    is_file = version.kind == Kind.FILE
    return {
        "path": "/" + output.decode(version.path),
        "layer": version.layer,
        "entry": version.entry if version.entry >= 0 else None,
        "change": CHANGES[version.change],
        "type": TYPE_NAMES[Kind(version.kind)] if version.kind else None,
        "mode": f"{version.mode:04o}",
        "uid": version.uid,
        "gid": version.gid,
        "size": version.size if is_file else None,
        "mtime_ns": version.mtime_ns,
        "target": output.decode(version.target) if version.target else None,
        "hard_link": version.hard_link,
        "unreadable": version.unreadable,
        "rdev": list(version.rdev) if version.kind in (Kind.CHAR, Kind.BLOCK) else None,
        "xattrs": {output.decode(name): base64.b64encode(value).decode("ascii") for name, value in version.xattrs},
        "header_offset": version.header_offset if version.entry >= 0 else None,
        "data_offset": version.extents[0][2] if version.extents else None,
        "data_layer": version.extents[0][1] if version.extents else None,
        "end": ENDS[version.end],
        "end_layer": version.end_layer or None,
        "end_entry": version.end_entry if version.end_layer and version.end_entry >= 0 else None,
    }
