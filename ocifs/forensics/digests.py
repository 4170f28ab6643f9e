"""Digests of many files of an image, each span of a layer decoded once.

Data is read in the order in which it lies in its layers, whatever the order of the question: a file read by its path alone
would decode its span again for each neighbour that is asked for later.

Not here: which files are asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ocifs.errors import CacheDamagedError, DamagedError

if TYPE_CHECKING:
    from ocifs.forensics.examination import Examination
    from ocifs.history import Version

BATCH = 8192
"""Files that whoever goes through all of an image asks for at a time, so that memory does not follow their number."""


def digests(examination: Examination, versions: Sequence[Version]) -> list[bytes | DamagedError]:
    """Give the SHA-256 of each file, holes as zeros; for one whose data cannot be read the error that says why.

    Names of one file are read once. Raises `CacheDamagedError` if our own files are to blame.
    """
    order = sorted(range(len(versions)), key=lambda number: place(versions[number]))
    found: list[bytes | DamagedError] = [b""] * len(versions)
    before: int | None = None
    for number in order:
        version = versions[number]
        same = before is not None and not version.unreadable and _same(versions[before], version)
        found[number] = found[before] if same and before is not None else _digest(examination, version)
        before = number
    return found


def place(version: Version) -> tuple[int, int]:
    """Give layer and layer offset of a file's first byte; (0, 0) if no layer has any."""
    return version.extents[0][1:3] if version.extents else (0, 0)


def _same(one: Version, other: Version) -> bool:
    return one.size == other.size and one.extents == other.extents and not one.unreadable


def _digest(examination: Examination, version: Version) -> bytes | DamagedError:
    digest = hashlib.sha256()
    try:
        for piece in examination.data(version):
            digest.update(piece)
    except CacheDamagedError:
        raise
    except DamagedError as error:
        return error
    return digest.digest()
