"""SHA-256 of a number of files at a time, for who goes through all of an image and prints as it goes.

Data is read in the order in which it lies (`ocifs.forensics.hashes`), whatever the order of the question.

Not here: which files are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from ocifs.errors import DamagedError

if TYPE_CHECKING:
    from ocifs.forensics.examination import Examination
    from ocifs.history import Version

BATCH: Final = 1 << 15
"""How many files to ask for at a time: some ten MB of versions, and few spans decoded twice."""


def digests(examination: Examination, versions: Sequence[Version]) -> list[bytes | DamagedError]:
    """Give the SHA-256 of each file, holes as zeros; for one whose data cannot be read the error that says why."""
    if not versions:
        return []
    from ocifs.forensics.hashes import Digests, content_of  # noqa: PLC0415 (threads, for who reads data at all)

    calculated = Digests(("sha256",))
    contents = [content_of(version) for version in versions]
    calculated.calculate(examination.layers, contents, examination.evidence)
    found: list[bytes | DamagedError] = []
    for content, version in zip(contents, versions, strict=True):
        try:
            found.append(calculated.get(content))
        except DamagedError as error:
            path = version.path.decode(errors="backslashreplace")
            found.append(DamagedError(f"{path} of layer {version.layer} cannot be read: {error}"))
    return found
