"""The configuration and manifest of an image that is another one and a layer more.

A configuration is changed as JSON, not as `ocifs.spec.ImageConfig`, so that what ocifs does not know stays in it (health
checks, build triggers). Left out is what Docker's old builder noted about the container it built in (``container``,
``container_config``, ``docker_version``, ``id``, ``parent``): it would be wrong of the new image.

The result is OCI whatever the base was: what lies in an OCI layout is OCI by the layout's specification, manifests that mix
OCI's and Docker's types are understood by few, and Docker's have no type for zstd. The bytes of layers are the same under
both. Annotations of the base's manifest are left out, for they speak of its build (created, revision, version).

Not here: writing anything (`layout`).
"""

from __future__ import annotations

import datetime
import enum
import json
import posixpath
import re
import shlex
from typing import TYPE_CHECKING, Any, Final

import msgspec

from ocifs.errors import DamagedError, UsageError
from ocifs.spec import MediaType

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ocifs.spec import DiffID, Digest

Json = dict[str, Any]

CREATED_BY: Final = "ocifs commit"

_ONLY_OF_THE_BASE: Final = ("container", "container_config", "docker_version", "id", "parent")
_SHELL: Final = ("/bin/sh", "-c")
_VARIABLE: Final = re.compile(r"[^=\s]+")


class Instruction(enum.StrEnum):
    """What of a configuration can be changed; the values are a Dockerfile's words."""

    CMD = "CMD"
    ENTRYPOINT = "ENTRYPOINT"
    ENV = "ENV"
    LABEL = "LABEL"
    USER = "USER"
    WORKDIR = "WORKDIR"


class Change(msgspec.Struct, frozen=True):
    """One instruction as in a Dockerfile."""

    instruction: Instruction
    words: tuple[str, ...]
    """Of ENV and LABEL: key, value, key, value, …"""


class Recipe(msgspec.Struct, frozen=True):
    """What the new image is to say of itself."""

    message: str = ""
    author: str = ""
    changes: tuple[Change, ...] = ()
    packing: str = "gzip"
    """A key of `ocifs.changes.layer.PACKINGS`."""
    timestamp: int | None = None
    """Seconds since the epoch: when the image was created, and the latest mtime of its new layer; None: now, and any."""


class Layer(msgspec.Struct, frozen=True):
    """A layer of the new manifest."""

    media_type: str
    digest: Digest
    size: int
    annotations: dict[str, str] = {}


def parse_change(text: str) -> Change:
    """Read ``CMD ["a", "b"]`` and the like; UsageError if it is none of those that can be changed."""
    word, _, rest = text.strip().partition(" ")
    if word.upper() not in set(Instruction):
        raise UsageError(f"{text!r}: only {', '.join(Instruction)} can be changed")
    instruction, rest = Instruction(word.upper()), rest.strip()
    match instruction:
        case Instruction.CMD | Instruction.ENTRYPOINT:
            return Change(instruction, _command(text, rest))
        case Instruction.ENV | Instruction.LABEL:
            return Change(instruction, _pairs(text, rest))
        case Instruction.USER | Instruction.WORKDIR:
            return Change(instruction, _one(text, rest))


def _command(text: str, rest: str) -> tuple[str, ...]:
    """JSON words, or a line for a shell."""
    if not rest.startswith("["):
        return (*_SHELL, rest) if rest else ()
    try:
        return tuple(msgspec.json.decode(rest, type=list[str]))
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise UsageError(f"{text!r} is not a JSON list of strings: {error}") from None


def _pairs(text: str, rest: str) -> tuple[str, ...]:
    """``K=V K2="a b"``, or the older ``K a b``."""
    name, _, value = rest.partition(" ")
    if value and "=" not in name:
        return (name, value.strip())
    try:
        words = [word.partition("=") for word in shlex.split(rest)]
    except ValueError as error:
        raise UsageError(f"{text!r}: {error}") from None
    if not words or not all(_VARIABLE.fullmatch(key) and equals for key, equals, _ in words):
        raise UsageError(f"{text!r} is not of the form NAME=VALUE")
    return tuple(part for key, _, value in words for part in (key, value))


def _one(text: str, rest: str) -> tuple[str, ...]:
    if not rest:
        raise UsageError(f"{text!r} has no value")
    return (rest,)


def new_config(
    raw: bytes, recipe: Recipe, *, diff_ids: Iterable[DiffID], added: DiffID, created: str, upto: int
) -> bytes:
    """The configuration ``raw`` with a layer more. ``diff_ids`` are those of its first ``upto`` layers."""
    try:
        config: Json = json.loads(raw)
    except (ValueError, RecursionError):
        raise DamagedError("the image configuration is not JSON") from None
    for key in _ONLY_OF_THE_BASE:
        config.pop(key, None)
    config["created"] = created
    if recipe.author:
        config["author"] = recipe.author
    config["rootfs"] = {"type": "layers", "diff_ids": [*map(str, diff_ids), str(added)]}
    step = {"created": created, "created_by": CREATED_BY}
    if recipe.author:
        step["author"] = recipe.author
    if recipe.message:
        step["comment"] = recipe.message
    config["history"] = [*_history_upto(config.get("history") or [], upto), step]
    config["config"] = _changed(config.get("config") or {}, recipe.changes)
    return _dump(config)


def _history_upto(history: Sequence[Json | None], layers: int) -> list[Json]:
    """The steps that made the first ``layers`` layers, and what belongs to them."""
    kept: list[Json] = []
    for step in history:
        if layers == 0 and not (step or {}).get("empty_layer"):
            break
        layers -= not (step or {}).get("empty_layer")
        kept.append(step or {})
    return kept


def _changed(runtime: Json, changes: Sequence[Change]) -> Json:
    """The ``config`` part with the changes made, as docker commit makes them."""
    changed = dict(runtime)
    said = {change.instruction for change in changes}
    for change in changes:
        match change.instruction:
            case Instruction.CMD:
                changed["Cmd"] = list(change.words)
            case Instruction.ENTRYPOINT:
                changed["Entrypoint"] = list(change.words)
                if Instruction.CMD not in said:
                    changed.pop("Cmd", None)  # the base's were words for the base's entrypoint
            case Instruction.ENV:
                changed["Env"] = _with_variables(changed.get("Env") or [], _paired(change.words))
            case Instruction.LABEL:
                changed["Labels"] = {**(changed.get("Labels") or {}), **dict(_paired(change.words))}
            case Instruction.USER:
                changed["User"] = change.words[0]
            case Instruction.WORKDIR:
                below = posixpath.join("/", changed.get("WorkingDir") or "/", change.words[0])
                changed["WorkingDir"] = "/" + posixpath.normpath(below).lstrip("/")
    return changed


def _paired(words: Sequence[str]) -> list[tuple[str, str]]:
    return list(zip(words[::2], words[1::2], strict=True))


def _with_variables(lines: Sequence[str], pairs: Iterable[tuple[str, str]]) -> list[str]:
    """Environment lines, each variable once, where it stood first."""
    variables = {line.partition("=")[0]: line for line in lines if line is not None}
    variables.update((name, f"{name}={value}") for name, value in pairs)
    return list(variables.values())


def new_manifest(config: bytes, config_digest: Digest, layers: Sequence[Layer]) -> bytes:
    """A manifest of these layers (OCI image specification, manifest.md)."""
    return _dump(
        {
            "schemaVersion": 2,
            "mediaType": MediaType.OCI_MANIFEST,
            "config": descriptor(MediaType.OCI_CONFIG, config_digest, len(config)),
            "layers": [
                descriptor(layer.media_type, layer.digest, layer.size)
                | ({"annotations": layer.annotations} if layer.annotations else {})
                for layer in layers
            ],
        }
    )


def descriptor(media_type: str, digest: Digest, size: int) -> Json:
    """What one document says about another blob (OCI image specification, descriptor.md)."""
    return {"mediaType": media_type, "digest": str(digest), "size": size}


def rfc3339(time_ns: int) -> str:
    """A time as documents have it: in UTC, with as many digits as it needs."""
    seconds, nanoseconds = divmod(time_ns, 10**9)
    text = datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S")
    fraction = f".{nanoseconds:09d}".rstrip("0").rstrip(".")
    return f"{text}{fraction}Z"


def _dump(document: Json) -> bytes:
    try:
        text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    except RecursionError:
        raise DamagedError("the image configuration is nested too deeply") from None
    return text.encode("utf-8", "backslashreplace")
