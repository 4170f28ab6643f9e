"""Names that deceive who reads a listing.

A name of Linux is any bytes but NUL and the slash. What is looked for are names that look like something else or like
nothing: made of dots and spaces, with control characters that a terminal obeys or characters that have no width or turn
the direction of writing (Unicode's UAX #9 and the format characters of category Cf), with spaces at an end, or not UTF-8.

Not here: what names mean (`ocifs.forensics.audit`).
"""

from __future__ import annotations

import re
from typing import Final

_PLAIN: Final = re.compile(rb"(?=.*[^.])[!-~](?:[ -~]*[!-~])?", re.DOTALL)
"""Printable ASCII without a space at an end, and not of dots alone: nothing about such a name is odd."""
_TURNING: Final = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_WIDTHLESS: Final = frozenset(
    "\u00ad\u034f\u115f\u1160\u17b4\u17b5\u180e\u200b\u200c\u200d\u2060\u2061\u2062\u2063\u2064\u3164\ufeff\uffa0"
)
_SPACES: Final = " \u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
_DOTS: Final = ".\u2024\u2025\u2026\uff0e"


def oddities(name: bytes) -> list[tuple[str, str]]:
    """Say what is odd about a name (one component of a path): a rule of `ocifs.forensics.audit` and a sentence each."""
    if _PLAIN.fullmatch(name) or not name:
        return []
    found = []
    try:
        text = name.decode("utf-8")
    except UnicodeDecodeError as error:
        text = name.decode("utf-8", "replace")
        found.append(("non-utf8-name", f"the name is not UTF-8: byte 0x{name[error.start]:02x} at {error.start}"))
    if not text.strip(_SPACES + _DOTS):
        found.append(("hidden-name", f"the name is nothing but {_shown(text)}"))
    elif text.strip(_SPACES) != text:
        end = "begins" if text[0] in _SPACES else "ends"
        found.append(("padded-name", f"the name {end} with a space"))
    controls = [character for character in text if character < " " or "\x7f" <= character <= "\x9f"]
    if controls:
        found.append(("control-character", f"the name has control characters: {_shown(controls)}"))
    turning = [character for character in text if character in _TURNING]
    if turning:
        found.append(("turned-name", f"the name turns the direction of writing: {_shown(turning)}"))
    widthless = [character for character in text if character in _WIDTHLESS]
    if widthless:
        found.append(("invisible-character", f"the name has characters that do not show: {_shown(widthless)}"))
    return found


def _shown(characters: str | list[str]) -> str:
    """Name characters, each once, in the order in which they come."""
    return ", ".join(f"U+{ord(character):04X}" for character in dict.fromkeys(characters))
