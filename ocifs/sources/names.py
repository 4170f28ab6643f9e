"""Image names: when two spellings mean one image, ``busybox`` and ``docker.io/library/busybox:latest``.

Not here: tags and digests of references (`ocifs.reference`).
"""

from __future__ import annotations

from typing import Final

_DOCKER_HUB: Final = "docker.io"
_ALIASES: Final = {"index.docker.io": _DOCKER_HUB, "registry-1.docker.io": _DOCKER_HUB}


def full_name(name: str) -> str:
    """Complete a name as Docker does: registry ``docker.io``, its path ``library/``, tag ``latest``."""
    body, at, digest = name.partition("@")
    first, slash, rest = body.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        registry, path = _ALIASES.get(first, first), rest
    else:
        registry, path = _DOCKER_HUB, body
    if registry == _DOCKER_HUB and "/" not in path:
        path = "library/" + path
    if not at and ":" not in path.rpartition("/")[2]:
        path += ":latest"
    return f"{registry}/{path}{at}{digest}"


def same_name(one: str, other: str) -> bool:
    """Whether two names mean one image once they are complete."""
    return full_name(one) == full_name(other)
