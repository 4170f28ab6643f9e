"""Damages files as a disk does it: in place, and without a word.

Not here: damage to bytes that are no file yet; what the damage does.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def flip(path: Path, offset: int) -> None:
    """Change one bit of the byte at ``offset``; a negative one counts from the end."""
    with path.open("r+b") as file:
        at = file.seek(offset, os.SEEK_END if offset < 0 else os.SEEK_SET)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 0x10]))
