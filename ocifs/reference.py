"""What a user types to name an image, taken apart: ``oci:images/debian:12``, ``app.tar#2``, ``containerd:redis``.

The grammar, loosest part last (containers-transports(5) is the model for the named transports)::

    REF        = BODY ["@" DIGEST] ["#" N]         DIGEST selects by digest, N counts layers from 1: the image up to N
    BODY       = "oci:" PATH [":" SELECT]          an OCI image layout
               | "ocidir://" PATH [":" TAG]        the same, as other tools write it
               | "oci-archive:" PATH [":" SELECT]  an OCI image layout in a tar
               | "docker-archive:" PATH [":" SELECT]
               | "dir:" PATH
               | "containerd:" [NAME | ":@" N]
               | PATH [":" SELECT]                 recognised by what is in it
    SELECT     = TAG | "@" N                       N counts manifests from 0

PATH ends at the first colon, except for ``dir:``, where nothing can follow it. A bare PATH that exists wins over any
other reading, colons and all, so a file called ``oci:x`` can be named.

Not here: whether a path is an image, and of what kind (`ocifs.sources`). The only question this module asks about the
world is whether a path exists, and the caller can answer it.
"""

from __future__ import annotations

import enum
import os
import re
from typing import TYPE_CHECKING, Final

import msgspec

from ocifs.errors import DamagedError, NotFoundError, UsageError
from ocifs.spec import Digest

if TYPE_CHECKING:
    from collections.abc import Callable


class Scheme(enum.StrEnum):
    """Where an image is kept. The values are the words before the first colon."""

    OCI = "oci"
    OCI_ARCHIVE = "oci-archive"
    DOCKER_ARCHIVE = "docker-archive"
    DIR = "dir"
    CONTAINERD = "containerd"
    PATH = ""
    """A bare path: recognised by its content."""


class Selector(msgspec.Struct, frozen=True):
    """Which image of a source: all that is given must hold. Nothing given: the only one there is (rule C12)."""

    name: str | None = None
    """Tag (OCI layouts), image name (docker-archive, containerd)."""
    number: int | None = None
    """``:@N``: position among the manifests, from 0."""
    digest: Digest | None = None
    """Of a manifest or index; in a docker-archive, of the configuration (the image ID)."""

    def __str__(self) -> str:
        """Give what stands behind the path's colon."""
        name = "" if self.name is None else self.name
        number = "" if self.number is None else f"@{self.number}"
        digest = "" if self.digest is None else f"@{self.digest}"
        return name + number + digest


class Reference(msgspec.Struct, frozen=True):
    """A parsed reference. ``path`` is empty for containerd, whose root is not part of the reference."""

    text: str
    """As the user typed it, for messages."""
    scheme: Scheme
    path: bytes
    selector: Selector = Selector()
    upto: int | None = None
    """``#N``: only the first N layers, from 1; None: all."""

    def absolute(self) -> str:
        """Give the text with an absolute path in it, so that it means the same wherever it is read again."""
        path = os.fsdecode(self.path)
        if not path or path.startswith("/"):
            return self.text
        start = 0  # of the path in the text: behind the scheme, whose name may hold the same letters
        if self.scheme is not Scheme.PATH:
            start = len(_OCIDIR) if self.text.startswith(_OCIDIR) else self.text.index(":") + 1
        return f"{self.text[:start]}{os.path.abspath(path)}{self.text[start + len(path) :]}"


_UPTO: Final = re.compile(r"(.*)#([0-9]+)", re.DOTALL)
_DIGEST: Final = re.compile(
    r"(.*)@((?:sha256|sha512|blake3):[^@/]*|[a-z0-9]+(?:[+._-][a-z0-9]+)*:[0-9A-Za-z=_-]{32,})", re.DOTALL
)
# A registered algorithm is meant as a digest however wrong it is written; another word only if 32 characters follow.
_NUMBER: Final = re.compile(r"@([0-9]+)")
_MAX_COUNT: Final = 2**31 - 1
_WORD: Final = re.compile(r"[a-z][a-z0-9+-]*")
_OCIDIR: Final = "ocidir://"
_PART: Final = r"[a-z0-9][a-z0-9._-]*"
_ELSEWHERE: Final = re.compile(
    r"(?P<transport>docker://|docker-daemon:|containers-storage:)?"
    rf"(?P<name>(?:{_PART}(?::[0-9]+)?/)?(?:{_PART}/)*(?P<last>{_PART})"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}))?(?P<digest>@[a-z0-9]+:[0-9a-f]+)?)"
)
"""A name as registries have them, or a container engine's own store: ``docker.io/library/alpine:3.20``."""
_SCHEMES: Final = ", ".join(f"{scheme.value}:" for scheme in Scheme if scheme.value)


def parse(text: str, *, exists: Callable[[bytes], bool] = os.path.lexists) -> Reference:
    """Take a reference apart. ``exists`` tells whether a path is there, for bare paths.

    UsageError: not of the grammar. NotFoundError: a bare path that does not exist.
    """
    if not text:
        raise UsageError("the reference is empty: give a path, or one of " + _SCHEMES)
    if "\0" in text:
        raise UsageError(f"the reference {text!r} holds a NUL character")
    readings = [(text, None, None), *_suffixes(text)]
    for body, digest, upto in readings:
        path = _path(body)
        if path and exists(path):
            return Reference(text, Scheme.PATH, path, Selector(digest=_digest(digest, text)), _upto(upto, text))
    body, digest, upto = readings[-1]
    return _parse_named(text, body, _digest(digest, text), _upto(upto, text), exists)


def _suffixes(text: str) -> list[tuple[str, str | None, str | None]]:
    """List the ways to cut ``#N`` and ``@DIGEST`` off the end, shortest cut first."""
    found: list[tuple[str, str | None, str | None]] = []
    body, upto = text, None
    if match := _UPTO.fullmatch(text):
        body, upto = match.groups()
        found.append((body, None, upto))
    if match := _DIGEST.fullmatch(body):
        found.append((match[1], match[2], upto))
    return found


def _parse_named(
    text: str, body: str, digest: Digest | None, upto: int | None, exists: Callable[[bytes], bool]
) -> Reference:
    """Read what is no path that exists as a whole."""
    scheme, rest = _scheme(text, body, exists)
    if scheme is Scheme.DIR:
        path, select = rest, None
    elif scheme is Scheme.CONTAINERD and not rest.startswith(":@"):
        path, select = "", rest or None
    else:
        path, colon, after = rest.partition(":")
        select = after if colon else None
        if select == "" and digest is None:
            raise UsageError(f"{text!r} has nothing behind the colon that ends its path: give a tag or leave it out")
    if not path and scheme is not Scheme.CONTAINERD:
        raise UsageError(f"{text!r} has no path behind {scheme.value}:")
    number = None
    if select and select.startswith("@"):
        match = _NUMBER.fullmatch(select)
        if match is None:
            raise UsageError(f"{text!r}: behind :@ comes the number of a manifest, from 0, or a digest")
        number, select = _count(match[1], text), None
    return Reference(text, scheme, _path(path), Selector(select or None, number, digest), upto)


def _scheme(text: str, body: str, exists: Callable[[bytes], bool]) -> tuple[Scheme, str]:
    """Split the scheme off; what is left of the body begins with the path, if the scheme has one."""
    if body.startswith(_OCIDIR):
        return Scheme.OCI, body.removeprefix(_OCIDIR)
    word, colon, rest = body.partition(":")
    if colon and word and word in set(Scheme):
        return Scheme(word), rest
    if colon and word and exists(_path(word)):
        return Scheme.PATH, body
    if "#" in body:
        raise UsageError(f"{text!r} does not exist; behind # would come a number of layers, from 1, at the very end")
    if colon and _WORD.fullmatch(word):
        message = f"{text!r} is not a path that exists, and {word!r} is none of {_SCHEMES} ocidir://"
        raise UsageError(message + _how_to_copy(text))
    message = f"{text!r}: no such file or directory, nor a reference such as oci:PATH:TAG"
    raise NotFoundError(message + _how_to_copy(text))


def _how_to_copy(text: str) -> str:
    """Say how an image gets here from a registry, if the text may name one there; else nothing."""
    cut = _UPTO.fullmatch(text)
    match = _ELSEWHERE.fullmatch(cut[1] if cut else text)
    # A dot in the last part is more likely a file's suffix.
    if match is None or ("." in match["last"] and not (match["transport"] or match["tag"] or match["digest"])):
        return ""
    source = f"{match['transport'] or 'docker://'}{match['name']}"
    target = f"oci:{match['last']}:{match['tag'] or 'latest'}"
    return f"; if it is in a registry, copy it first: skopeo copy {source} {target}"


def _path(text: str) -> bytes:
    try:
        return os.fsencode(text)
    except UnicodeEncodeError:
        raise UsageError(f"{text!r} holds characters that no file name can have") from None


def _digest(text: str | None, reference: str) -> Digest | None:
    if text is None:
        return None
    try:
        return Digest.parse(text)
    except DamagedError as error:
        raise UsageError(f"{reference!r}: {error}") from None


def _upto(digits: str | None, reference: str) -> int | None:
    if digits is None:
        return None
    count = _count(digits, reference)
    if count == 0:
        raise UsageError(f"{reference!r}: layers count from 1, so nothing is left up to layer 0")
    return count


def _count(digits: str, reference: str) -> int:
    # int() refuses more than 4300 digits with a ValueError of its own.
    if len(digits) > len(str(_MAX_COUNT)) or (count := int(digits)) > _MAX_COUNT:
        raise UsageError(f"{reference!r}: the number {digits[:20]} is too large")
    return count
