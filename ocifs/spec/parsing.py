"""Documents out of JSON.

The classes here are the documents as written; every field may be null or missing. They are read in one go and turned
into the values of `ocifs.spec.documents`, which say what is required.

Not here: opening or finding documents (`ocifs.sources`).
"""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any, Final, TypeVar

import msgspec

from ocifs.errors import DamagedError, UnsupportedError
from ocifs.spec.digest import DiffID, Digest
from ocifs.spec.documents import (
    INDEX_TYPES,
    MANIFEST_TYPES,
    SCHEMA1_TYPES,
    Descriptor,
    History,
    ImageConfig,
    Index,
    Manifest,
    MediaType,
    RuntimeConfig,
)
from ocifs.spec.platform import Platform
from ocifs.spec.quoting import printable

MAX_DOCUMENT_SIZE: Final = 4 * 1024 * 1024
"""Bytes of the largest manifest, index or configuration that is read: 4 MiB, as registries have it.

Real ones are a few KiB; an index with 20 platforms and attestations is about 20 KiB.
"""

_Size = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_Strings = dict[str, str] | None


class _RawPlatform(msgspec.Struct):
    os: str | None = None
    architecture: str | None = None
    variant: str | None = None
    os_version: str | None = msgspec.field(default=None, name="os.version")
    os_features: list[str] | None = msgspec.field(default=None, name="os.features")

    def value(self) -> Platform:
        return Platform(
            self.os or "",
            self.architecture or "",
            self.variant or "",
            self.os_version or "",
            tuple(self.os_features or ()),
        )


class _RawDescriptor(msgspec.Struct, rename="camel"):
    media_type: str | None = None
    digest: str | None = None
    size: _Size | None = None
    annotations: _Strings = None
    data: str | None = None
    platform: _RawPlatform | None = None
    urls: list[str] | None = None
    artifact_type: str | None = None

    def value(self, what: str) -> Descriptor:
        if self.digest is None:
            raise DamagedError(f"{what} has no digest")
        if self.size is None:
            raise DamagedError(f"{what} has no size")
        try:
            data = None if self.data is None else base64.b64decode(self.data, validate=True)
        except (binascii.Error, ValueError):
            raise DamagedError(f"{what} has embedded data that is not base64") from None
        return Descriptor(
            media_type=self.media_type or "",
            digest=_digest(Digest, self.digest, what),
            size=self.size,
            annotations=self.annotations or {},
            data=data,
            platform=None if self.platform is None else self.platform.value(),
            urls=tuple(self.urls or ()),
            artifact_type=self.artifact_type or "",
        )


class _RawDocument(msgspec.Struct, rename="camel"):
    schema_version: int | None = None
    media_type: str | None = None
    artifact_type: str | None = None
    config: _RawDescriptor | None = None
    layers: list[_RawDescriptor] | None = None
    manifests: list[_RawDescriptor] | None = None
    annotations: _Strings = None
    subject: _RawDescriptor | None = None
    fs_layers: Any = None


class _RawRuntime(msgspec.Struct, rename="pascal"):
    env: list[str | None] | None = None
    entrypoint: list[str] | str | None = None
    cmd: list[str] | str | None = None
    user: str | None = None
    working_dir: str | None = None
    labels: dict[str, str | None] | None = None
    exposed_ports: dict[str, Any] | None = None
    volumes: dict[str, Any] | None = None
    stop_signal: str | None = None


class _RawRootfs(msgspec.Struct):
    type: str | None = None
    diff_ids: list[str] | None = None


class _RawHistory(msgspec.Struct):
    created: str | None = None
    created_by: str | None = None
    author: str | None = None
    comment: str | None = None
    empty_layer: bool | None = None


class _RawConfig(_RawPlatform):
    created: str | None = None
    author: str | None = None
    config: _RawRuntime | None = None
    rootfs: _RawRootfs | None = None
    history: list[_RawHistory | None] | None = None


_RAW_DOCUMENT: Final = msgspec.json.Decoder(_RawDocument)
_RAW_CONFIG: Final = msgspec.json.Decoder(_RawConfig)


def parse_document(raw: bytes, media_type: str | None = None) -> Manifest | Index:
    """Read a manifest or an index. ``media_type`` is what the descriptor that led here says, if there was one.

    DamagedError: not JSON, a required field is missing, or the document contradicts its descriptor or itself (one that
    is manifest and index at once could mean one thing to ocifs and another to a runtime, CVE-2021-41190).
    UnsupportedError: schema 1, or a document of another kind.
    """
    document = _decode(_RAW_DOCUMENT, raw, "document")
    own_type = document.media_type or ""
    is_index = _is_index(document, media_type or "", own_type)
    if document.schema_version not in {None, 2}:
        raise DamagedError(f"the document has schemaVersion {document.schema_version}; only 2 has a meaning")
    annotations = document.annotations or {}
    subject = None if document.subject is None else document.subject.value("the subject")
    artifact_type = document.artifact_type or ""
    if is_index:
        return Index(
            own_type or media_type or MediaType.OCI_INDEX,
            tuple(raw.value(f"manifest @{number}") for number, raw in enumerate(document.manifests or ())),
            annotations,
            artifact_type,
            subject,
        )
    if document.config is None:
        raise DamagedError("the manifest has no config")
    return Manifest(
        own_type or media_type or MediaType.OCI_MANIFEST,
        document.config.value("the config"),
        tuple(raw.value(f"layer {number}") for number, raw in enumerate(document.layers or (), 1)),
        annotations,
        artifact_type,
        subject,
    )


def _is_index(document: _RawDocument, told: str, own: str) -> bool:
    """Decide between index and manifest from the descriptor's word, the document's word and what is in it."""
    if told in SCHEMA1_TYPES or own in SCHEMA1_TYPES or document.schema_version == 1 or document.fs_layers is not None:
        raise UnsupportedError(
            "the manifest is of Docker's schema 1, which ended in 2017: convert the image, "
            "for example with skopeo copy --format oci"
        )
    claims = {media_type in INDEX_TYPES for media_type in (told, own) if media_type in INDEX_TYPES | MANIFEST_TYPES}
    has_manifests = document.manifests is not None
    has_layers = document.layers is not None or document.config is not None
    if len(claims) > 1:
        raise DamagedError(f"the document's mediaType {own} contradicts its descriptor, which says {told}")
    if has_manifests and has_layers:
        raise DamagedError("the document is a manifest and an index at once, so it has no certain meaning")
    if claims:
        is_index = claims.pop()
        if has_layers if is_index else has_manifests:
            raise DamagedError(f"the document does not have the content of its type, {own or told}")
        return is_index
    for media_type in (own, told):
        if media_type and media_type not in {"application/json", "text/plain", "application/octet-stream"}:
            kind = printable(media_type)
            raise UnsupportedError(f"the document is of type {kind}, which is neither an image nor an index")
    if has_manifests or has_layers:
        return has_manifests
    raise DamagedError("the document is neither a manifest nor an index: it has no config, layers or manifests")


def parse_config(raw: bytes) -> ImageConfig:
    """Read an image configuration, OCI's or Docker's. Rule C8 is checked by `ImageConfig.rootfs_problem`."""
    config = _decode(_RAW_CONFIG, raw, "image configuration")
    runtime = config.config or _RawRuntime()
    rootfs = config.rootfs or _RawRootfs()
    return ImageConfig(
        platform=config.value(),
        diff_ids=tuple(
            _digest(DiffID, text, f"diff ID {number}") for number, text in enumerate(rootfs.diff_ids or (), 1)
        ),
        rootfs_type="layers" if rootfs.type is None else rootfs.type,
        created=config.created or "",
        author=config.author or "",
        config=RuntimeConfig(
            env=tuple(line for line in runtime.env or () if line is not None),
            entrypoint=_words(runtime.entrypoint),
            cmd=_words(runtime.cmd),
            user=runtime.user or "",
            working_dir=runtime.working_dir or "",
            labels={name: value or "" for name, value in (runtime.labels or {}).items()},
            exposed_ports=tuple(runtime.exposed_ports or ()),
            volumes=tuple(runtime.volumes or ()),
            stop_signal=runtime.stop_signal or "",
        ),
        history=tuple(
            History(
                step.created or "",
                step.created_by or "",
                step.author or "",
                step.comment or "",
                step.empty_layer or False,
            )
            for step in (raw or _RawHistory() for raw in config.history or ())
        ),
    )


_T = TypeVar("_T")
_D = TypeVar("_D", Digest, DiffID)


def _decode(decoder: msgspec.json.Decoder[_T], raw: bytes, what: str) -> _T:
    if len(raw) > MAX_DOCUMENT_SIZE:
        raise DamagedError(f"the {what} has {len(raw)} bytes; more than {MAX_DOCUMENT_SIZE} are never read")
    try:
        return decoder.decode(raw)
    except RecursionError:
        raise DamagedError(f"the {what} is nested too deeply") from None
    except msgspec.ValidationError as error:
        raise DamagedError(f"the {what} is not as specified: {printable(str(error))}") from None
    except (msgspec.MsgspecError, UnicodeError, ValueError) as error:
        raise DamagedError(f"the {what} is not JSON: {printable(str(error))}") from None


def _digest(cls: type[_D], text: str, what: str) -> _D:
    try:
        return cls.parse(text)
    except DamagedError as error:
        raise DamagedError(f"{what}: {error}") from None


def _words(value: list[str] | str | None) -> tuple[str, ...] | None:
    # Docker's first versions wrote a single string, and its reader still takes one.
    return (value,) if isinstance(value, str) else None if value is None else tuple(value)
