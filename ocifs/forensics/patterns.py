"""Patterns for names, as fnmatch(3) reads them in a UTF-8 locale: ``*``, ``?``, ``[…]`` with classes, backslashes.

Python's own fnmatch knows no backslash and no classes. A slash and a leading dot are characters like others. What is no
UTF-8 in a name is a lone surrogate, one character for each byte.

Not here: expressions that use them (`ocifs.forensics.find`).
"""

from __future__ import annotations

import re
from typing import Final


def pattern(text: str, *, ignore_case: bool = False) -> re.Pattern[str]:
    """Translate a pattern of fnmatch(3) into one that matches whole names."""
    out, at = [], 0
    while at < len(text):
        character = text[at]
        at += 1
        if character == "*":
            out.append(".*")
        elif character == "?":
            out.append(".")
        elif character == "\\" and at < len(text):
            out.append(re.escape(text[at]))
            at += 1
        elif character == "[" and (match := _BRACKET.match(text, at)):
            out.append(_bracket(match))
            at = match.end()
        else:
            out.append(re.escape(character))
    return re.compile("".join(out), re.DOTALL | (re.IGNORECASE if ignore_case else 0))


_BRACKET: Final = re.compile(r"([!^]?)(\]?(?:\[:[a-z]+:\]|\\.|[^\]\\])*)\]", re.DOTALL)
_CLASSES: Final = {
    "alnum": "a-zA-Z0-9",
    "alpha": "a-zA-Z",
    "blank": r" \t",
    "cntrl": r"\x00-\x1f\x7f",
    "digit": "0-9",
    "graph": "!-~",
    "lower": "a-z",
    "print": " -~",
    "punct": "!-/:-@\\[-`{-~",
    "space": r"\s",
    "upper": "A-Z",
    "xdigit": "0-9A-Fa-f",
}


def _bracket(match: re.Match[str]) -> str:
    inside = re.sub(
        r"\[:([a-z]+):\]|\\(.)|([\\\[\]^&~|])",
        lambda part: _CLASSES.get(part[1], "") if part[1] else "\\" + (part[2] or part[3]),
        match[2],
        flags=re.DOTALL,
    )
    text = f"[{'^' if match[1] else ''}{inside}]"
    try:
        re.compile(text)
    except re.error:  # a range that runs backwards matches nothing
        return "(?!)"
    return text
