"""A baseline: which file should have which hash, as hashdeep and sha256sum write it; and which files differ from it.

Read are the lines of hashdeep (its header names the columns), of ``sha256sum``, ``sha1sum`` and ``md5sum`` with their
escapes, and with ``--tag``. Names may begin with a slash, with ``./``, or with where the image was seen by who made the list
(a *prefix*). A name that is a symlink in the image stands for the file that it leads to, for these programs follow links.

In memory are the names of the list with their hashes, and what `ocifs.forensics.hashes` keeps; nothing of other files.

Not here: lists of hashes without names (`ocifs.forensics.known`), writing such lists (`ocifs.forensics.hash_lists`).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, BinaryIO, Final, NamedTuple

from ocifs.errors import DamagedError, NotFoundError, UsageError
from ocifs.forensics.hashes import ALGORITHMS, Content, Digests, content_of
from ocifs.forensics.provenance import current, find
from ocifs.forensics.verify import Finding
from ocifs.history import End
from ocifs.overlay.paths import normalised, shown
from ocifs.tree import Kind

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ocifs.forensics.examination import Examination
    from ocifs.history import Version

_MAX_LINE: Final = 1 << 16
"""Bytes of the longest line: a path has 4096."""
_LENGTHS: Final = {32: "md5", 40: "sha1", 64: "sha256"}
"""Algorithms by their hexadecimal digits."""
_PLAIN: Final = re.compile(rb"(\\?)([0-9a-fA-F]{32,64}) [ *](.+)", re.DOTALL)
_TAGGED: Final = re.compile(rb"(\\?)(MD5|SHA1|SHA256) \((.+)\) = ([0-9a-fA-F]{32,64})", re.DOTALL)
_ESCAPES: Final = {b"\\\\": b"\\", b"\\n": b"\n", b"\\r": b"\r"}
_STRONGEST: Final = ("sha256", "sha1", "md5")


class Baseline(NamedTuple):
    """Hashes by path."""

    algorithm: str
    hashes: dict[bytes, bytes]
    """By path in the tree, without a leading slash."""


class Compared(NamedTuple):
    """What a comparison found."""

    right: int
    """Files that have their hash."""
    unlisted: int
    """Files that the image shows and the list does not name."""
    findings: list[Finding]


# -- reading -------------------------------------------------------------------------------------------------------


def read(file: BinaryIO, name: str, prefix: bytes = b"") -> Baseline:
    """Read a list; ``name`` is for messages. Raises `UsageError` for a line that is of no known form."""
    prefix = prefix.rstrip(b"/")
    algorithm = ""
    hashes: dict[bytes, bytes] = {}
    columns: list[bytes] | None = None
    number = 0
    while line := file.readline(_MAX_LINE):
        number += 1
        line = line.rstrip(b"\n").removesuffix(b"\r")
        if line.startswith(b"%%%% size,"):
            columns = line[5:].split(b",")
        if not line or line.startswith((b"#", b"%%%%")):
            continue
        parsed = _hashdeep(line, columns) if columns else _sum(line)
        if parsed is None or algorithm not in {"", parsed[0]}:
            kind = algorithm or "hashdeep's or sha256sum's"
            raise UsageError(f"line {number} of {name} is not a line of a list of hashes ({kind})")
        algorithm, digest, path = parsed
        if prefix and not (path + b"/").startswith(prefix + b"/"):
            raise UsageError(f"line {number} of {name} names {shown(path)}, which does not begin with {shown(prefix)}")
        hashes[b"/".join(normalised(path[len(prefix) :])[0])] = digest
    if not hashes:
        raise UsageError(f"{name} names no file")
    return Baseline(algorithm, hashes)


def _hashdeep(line: bytes, columns: list[bytes]) -> tuple[str, bytes, bytes] | None:
    fields = line.split(b",", len(columns) - 1)
    by_name = dict(zip(columns, fields, strict=False))
    for algorithm in _STRONGEST:
        text = by_name.get(algorithm.encode())
        if text is not None and b"filename" in by_name:
            digest = _digest(algorithm, text)
            return None if digest is None else (algorithm, digest, by_name[b"filename"])
    return None


def _sum(line: bytes) -> tuple[str, bytes, bytes] | None:
    if match := _PLAIN.fullmatch(line):
        escaped, text, path = match.groups()
        algorithm = _LENGTHS.get(len(text), "")
    elif match := _TAGGED.fullmatch(line):
        escaped, kind, path, text = match.groups()
        algorithm = kind.decode().lower()
    else:
        return None
    digest = _digest(algorithm, text)
    if escaped:
        path = re.sub(rb"\\[\\nr]", lambda found: _ESCAPES[found[0]], path)
    return None if digest is None else (algorithm, digest, path)


def _digest(algorithm: str, text: bytes) -> bytes | None:
    if algorithm not in ALGORITHMS or _LENGTHS.get(len(text)) != algorithm:
        return None
    try:
        return bytes.fromhex(text.decode("ascii"))
    except ValueError:
        return None


# -- comparing -----------------------------------------------------------------------------------------------------


def compare(examination: Examination, baseline: Baseline) -> Compared:
    """Compare the files that the image shows with a list. Every span that holds one of them is decoded once."""
    hashes = baseline.hashes
    unseen = set(hashes)
    unlisted = 0
    for version in _files(examination):
        if version.path in hashes:
            unseen.discard(version.path)
        else:
            unlisted += 1
    # What is no file by its own path: links, and what is not there.
    contents: dict[bytes, Content] = {}
    findings = []
    for path in sorted(unseen):
        content = _led_to(examination, path)
        if isinstance(content, Finding):
            findings.append(content)
        else:
            contents[path] = content

    def wanted() -> Iterator[Content]:
        yield from contents.values()
        yield from (content_of(version) for version in _files(examination) if version.path in hashes)

    digests = Digests([baseline.algorithm])
    digests.calculate(examination.layers, wanted())
    right = 0
    listed = (version for version in _files(examination) if version.path in hashes)
    pairs = ((version.path, content_of(version)) for version in listed)
    for path, content in (*contents.items(), *pairs):
        try:
            found = digests.get(content)
        except DamagedError as error:
            findings.append(Finding("file", f"{_shown(path)} cannot be read: {error}", entries=(path,)))
            continue
        if found == hashes[path]:
            right += 1
        else:
            words = f"expected {baseline.algorithm}:{hashes[path].hex()}, found {baseline.algorithm}:{found.hex()}"
            findings.append(Finding("file", f"{_shown(path)} has another hash: {words}", entries=(path,)))
    return Compared(right, unlisted, findings)


def _files(examination: Examination) -> Iterator[Version]:
    return (version for version in examination.history if version.end is End.VISIBLE and version.kind == Kind.FILE)


def _led_to(examination: Examination, path: bytes) -> Content | Finding:
    try:
        version = current(find(examination.history, path, follow=True))
    except NotFoundError:
        version = None
    if version is None:
        return Finding("file", f"{_shown(path)} is not in the image", entries=(path,))
    if version.end is not End.VISIBLE:
        message = f"{_shown(path)} is not in the image: layer {version.end_layer} deleted it"
        return Finding("file", message, entries=(path,))
    if version.kind != Kind.FILE:
        return Finding("file", f"{_shown(path)} is not a file", entries=(path,))
    return content_of(version)


def _shown(path: bytes) -> str:
    return shown(b"/" + path)
