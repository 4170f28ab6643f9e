"""Text out of documents, for messages.

Not here: bytes of names (each room says itself how it shows those).
"""

from __future__ import annotations

from typing import Final

_MAX_SHOWN: Final = 200
"""Characters of a foreign text that a message repeats: enough to recognise it."""


def printable(text: str) -> str:
    """Give a text out of a document for a message: short, on one line, nothing in it that a terminal would obey."""
    short = text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "…"
    return short if short.isprintable() else ascii(short)[1:-1]


def quoted(text: str) -> str:
    """Give a text as `printable` does, in quotes."""
    return f"'{printable(text)}'"
