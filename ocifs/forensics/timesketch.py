r"""Timelines as rows for Timesketch: fields with names, to be written as JSON Lines or CSV.

Timesketch wants ``message``, ``datetime`` (ISO 8601) and ``timestamp_desc`` of each row, reads ``timestamp`` (microseconds
since the epoch), and keeps whatever else there is as attributes. Text must be Unicode: bytes of a name that are no UTF-8
are written as ``\xNN``.

Not here: what events there are (`ocifs.forensics.timeline`).
"""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Any, Final

from ocifs.forensics.timeline import Event, What
from ocifs.tree import Kind

if TYPE_CHECKING:
    from ocifs.forensics.examination import Examination

COLUMNS: Final = (
    "message",
    "timestamp",
    "datetime",
    "timestamp_desc",
    "data_type",
    "path",
    "layer",
    "entry",
    "layer_digest",
    "layer_created",
    "created_by",
    "change",
    "end",
    "end_layer",
    "mode",
    "uid",
    "gid",
    "size",
    "target",
    "flags",
)
"""The fields of a row, in the order of a CSV's columns."""
_DESCRIPTIONS: Final = {
    What.LAYER: "Layer Created",
    What.VERSION: "Content Modification Time",
    What.DELETED: "Deleted by Layer",
}


def row(event: Event, examination: Examination) -> dict[str, Any]:
    """Give an event's fields, all `COLUMNS`; what does not apply is None, ``flags`` is a list."""
    layer = examination.layer(event.layer)
    step = examination.step(event.layer)
    version = event.version
    found: dict[str, Any] = dict.fromkeys(COLUMNS)
    found |= {
        "message": f"Layer {event.layer}: {step.created_by if step else ''}",
        "timestamp": event.time_ns // 1000,
        "datetime": _iso(event.time_ns),
        "timestamp_desc": _DESCRIPTIONS[event.what],
        "data_type": f"ocifs:{event.what}",
        "layer": event.layer,
        "layer_digest": str(layer.blob.digest or layer.index.digest),
        "layer_created": step.created or None if step else None,
        "created_by": step.created_by or None if step else None,
        "flags": [str(flag) for flag in event.flags],
    }
    if version is None:
        return found
    path = "/" + _text(version.path)
    entry = version.entry if event.what is What.VERSION else version.end_entry
    found |= {
        "message": f"{path} (layer {event.layer}{', deleted' if event.what is What.DELETED else ''})",
        "path": path,
        "entry": entry if entry >= 0 else None,
        "change": version.change.name.lower(),
        "end": version.end.name.lower().replace("_", "-"),
        "end_layer": version.end_layer or None,
        "mode": f"{version.mode:04o}",
        "uid": version.uid,
        "gid": version.gid,
        "size": version.size if version.kind == Kind.FILE else None,
        "target": _text(version.target) if version.target else None,
    }
    return found


def _iso(time_ns: int) -> str:
    """ISO 8601; what lies behind the year 9999 as its end, for there is no way to write it."""
    try:
        when = datetime.datetime.fromtimestamp(time_ns // 10**9, datetime.UTC)
    except (ValueError, OverflowError, OSError):
        when = datetime.datetime.max.replace(tzinfo=datetime.UTC)
    return when.replace(microsecond=time_ns % 10**9 // 1000).isoformat(timespec="microseconds")


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")
