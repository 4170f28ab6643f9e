"""OCI and Docker documents as frozen, validated values: what the JSON around an image's layers says.

Covers the OCI image index, manifest and configuration (image-spec 1.1) and Docker's manifest list, manifest v2 schema 2
and image configuration (v1.2), which have the same shape under other media types. A document is parsed once; from then
on its digests, sizes and platforms are values that cannot be confused: a `Digest` names stored bytes, a `DiffID` names
an uncompressed layer tar, and the two never compare equal.

Two kinds of leniency are deliberate. ``null`` is read as absent everywhere, because the Go tools that write these
documents do (rule C7). A digest of an algorithm ocifs cannot compute is kept, and refused when it is used (rule C5), so
that an image with one such blob can still be listed.

Hostile documents: the size is bounded by `MAX_DOCUMENT_SIZE`, nesting by the interpreter's recursion limit, numbers by
63 bits, and everything that goes wrong is a `DamagedError` or an `UnsupportedError`.

Not here: opening or finding anything (`ocifs.sources`), the words a user types (`ocifs.reference`).
"""

from __future__ import annotations

import base64
import binascii
import enum
import hashlib
import platform as _platform
import re
import sys
from typing import TYPE_CHECKING, Annotated, Any, Final, Protocol, Self, TypeVar

import msgspec

from ocifs.errors import DamagedError, UnsupportedError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_DOCUMENT_SIZE: Final = 4 * 1024 * 1024
"""Bytes of the largest manifest, index or configuration that is read: 4 MiB, as registries have it.

Real ones are a few KiB; an index with 20 platforms and attestations is about 20 KiB.
"""

MAX_DIGEST_LENGTH: Final = 255
"""Characters of the longest digest that is kept: SHA-512's has 135, and a file name 255 at most (NAME_MAX)."""


class MediaType(enum.StrEnum):
    """The media types that ocifs knows by name (image-spec ``media-types.md``; Docker's from the distribution spec)."""

    OCI_INDEX = "application/vnd.oci.image.index.v1+json"
    OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
    OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
    OCI_ARTIFACT = "application/vnd.oci.artifact.manifest.v1+json"
    OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
    OCI_LAYER_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
    OCI_LAYER_ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"
    DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
    DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
    DOCKER_SCHEMA1 = "application/vnd.docker.distribution.manifest.v1+json"
    DOCKER_SCHEMA1_SIGNED = "application/vnd.docker.distribution.manifest.v1+prettyjws"
    DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
    DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
    DOCKER_LAYER_GZIP = "application/vnd.docker.image.rootfs.diff.tar.gzip"
    DOCKER_LAYER_ZSTD = "application/vnd.docker.image.rootfs.diff.tar.zstd"
    DOCKER_FOREIGN = "application/vnd.docker.image.rootfs.foreign.diff.tar"
    DOCKER_FOREIGN_GZIP = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"


INDEX_TYPES: Final = frozenset({MediaType.OCI_INDEX, MediaType.DOCKER_LIST})
MANIFEST_TYPES: Final = frozenset({MediaType.OCI_MANIFEST, MediaType.DOCKER_MANIFEST})
SCHEMA1_TYPES: Final = frozenset({MediaType.DOCKER_SCHEMA1, MediaType.DOCKER_SCHEMA1_SIGNED})
DOCUMENT_TYPES: Final = INDEX_TYPES | MANIFEST_TYPES | SCHEMA1_TYPES

_IMAGE_CONFIG_TYPES: Final = frozenset({MediaType.OCI_CONFIG, MediaType.DOCKER_CONFIG, "application/octet-stream", ""})
# Docker pushed configurations as octet-stream until 2016; such images are still in registries.

_TAR_LAYER: Final = re.compile(
    r"application/(?:vnd\.oci\.image\.layer\.(?:nondistributable\.)?v1\.tar(?:\+(?:gzip|zstd))?"
    r"|vnd\.docker\.image\.rootfs\.(?:foreign\.)?diff\.tar(?:\.(?:gzip|zstd))?"
    r"|(?:x-)?(?:tar|gzip|zstd)(?:\+(?:gzip|zstd))?|octet-stream)(?:\+encrypted)?"
)
_ENCRYPTED_SUFFIX: Final = "+encrypted"

# ---------------------------------------------------------------------------------------------------------------------
# Digests
# ---------------------------------------------------------------------------------------------------------------------

# image-spec descriptor.md, "Digests". Neither part can hold a slash, and no part of a path made of them can be "..".
_DIGEST: Final = re.compile(r"([a-z0-9]+(?:[+._-][a-z0-9]+)*):([a-zA-Z0-9=_-]+)")
_REGISTERED: Final = {"sha256": 64, "sha512": 128, "blake3": 64}


class Hasher(Protocol):
    """What `Digest.hasher` gives: the part of hashlib's objects that is used."""

    def update(self, data: bytes | bytearray | memoryview, /) -> None:
        """Take more bytes."""

    def hexdigest(self) -> str:
        """Lower-case hex of all bytes so far."""


class _Hash(msgspec.Struct, frozen=True, gc=False):
    """An algorithm and the encoded value, as in ``sha256:9f86…``. Never used itself: see `Digest` and `DiffID`."""

    algorithm: str
    hex: str

    def __str__(self) -> str:
        """Give ``algorithm:encoded``."""
        return f"{self.algorithm}:{self.hex}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``algorithm:encoded`` (image-spec descriptor.md, "Digests"); DamagedError if it is not of that form."""
        match = _DIGEST.fullmatch(text) if len(text) <= MAX_DIGEST_LENGTH else None
        if match is None:
            raise DamagedError(f"{_quoted(text)} is not a digest such as sha256:<64 hex digits>")
        algorithm, encoded = match.groups()
        length = _REGISTERED.get(algorithm)
        if length is not None and not re.fullmatch(f"[0-9a-f]{{{length}}}", encoded):
            raise DamagedError(f"{_quoted(text)} is not a digest: {algorithm} has {length} lower-case hex digits")
        return cls(algorithm, encoded)

    @classmethod
    def of(cls, data: bytes | memoryview, algorithm: str = "sha256") -> Self:
        """Compute the digest of ``data``."""
        hasher = cls(algorithm, "").hasher()
        hasher.update(data)
        return cls(algorithm, hasher.hexdigest())

    def hasher(self) -> Hasher:
        """Give a fresh hash object of this algorithm; UnsupportedError for any but sha256 and sha512 (rule C5)."""
        if self.algorithm == "sha256":
            return hashlib.sha256()
        if self.algorithm == "sha512":
            return hashlib.sha512()
        raise UnsupportedError(
            f"digest algorithm {self.algorithm} is not supported, only sha256 and sha512: {self} cannot be checked"
        )

    def matches(self, data: bytes | memoryview) -> bool:
        """Whether ``data`` hashes to this digest; UnsupportedError as `hasher`."""
        hasher = self.hasher()
        hasher.update(data)
        return hasher.hexdigest() == self.hex


class Digest(_Hash, frozen=True, gc=False):
    """Hash of bytes as stored: a blob's name. A layer's digest covers its compressed form."""


class DiffID(_Hash, frozen=True, gc=False):
    """Hash of a layer's uncompressed tar (image-spec config.md, "Layer DiffID")."""


# ---------------------------------------------------------------------------------------------------------------------
# Platforms (rule C9)
# ---------------------------------------------------------------------------------------------------------------------

_OS_ALIASES: Final = {"macos": "darwin"}
_ARCHITECTURE_ALIASES: Final = {
    "x86_64": ("amd64", ""),
    "x86-64": ("amd64", ""),
    "aarch64": ("arm64", ""),
    "armhf": ("arm", "v7"),
    "armel": ("arm", "v6"),
    "armv8l": ("arm", "v8"),
    "armv7l": ("arm", "v7"),
    "armv6l": ("arm", "v6"),
    "armv5tel": ("arm", "v5"),
    "i386": ("386", ""),
    "i486": ("386", ""),
    "i586": ("386", ""),
    "i686": ("386", ""),
    "loongarch64": ("loong64", ""),
}
# A machine of one variant runs the ones behind it. An absent variant means the third column of each architecture.
_VARIANTS: Final = {
    "arm": ("v8", "v7", "v6", "v5"),
    "arm64": ("v9", "v8"),
    "amd64": ("v4", "v3", "v2", "v1"),
}
_DEFAULT_VARIANT: Final = {"arm": "v7", "arm64": "v8", "amd64": "v1"}
_PLATFORM: Final = re.compile(r"([A-Za-z0-9_.-]+)/([A-Za-z0-9_.-]+)(?:/([A-Za-z0-9_.-]+))?")


class Platform(msgspec.Struct, frozen=True):
    """What an image runs on (image-spec image-index.md, ``platform``). Words are kept as they are written."""

    os: str
    architecture: str
    variant: str = ""
    os_version: str = ""
    os_features: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Give ``os/arch[/variant]``, fit for a message."""
        words = (self.os or "unknown", self.architecture or "unknown", self.variant)
        return printable("/".join(word for word in words if word))

    @classmethod
    def parse(cls, text: str) -> Platform:
        """Read ``os/arch[/variant]`` as a user types it; UsageError if it is not of that form."""
        match = _PLATFORM.fullmatch(text)
        if match is None:
            raise UsageError(f"{_quoted(text)} is not a platform such as linux/amd64 or linux/arm64/v8")
        return cls(match[1], match[2], match[3] or "")

    @classmethod
    def host(cls) -> Platform:
        """Give this machine's platform. Mounting needs Linux, so the operating system is always ``linux``."""
        machine = _platform.machine().lower()
        if machine in {"mips", "mips64", "ppc64"} and sys.byteorder == "little":
            machine += "le"
        return cls("linux", *_ARCHITECTURE_ALIASES.get(machine, (machine, "")))

    @property
    def is_known(self) -> bool:
        """False for ``unknown/unknown``, which BuildKit gives attestation manifests, and where nothing is said."""
        return self.os not in {"", "unknown"} or self.architecture not in {"", "unknown"}

    def _normalized(self) -> tuple[str, str, str]:
        os = self.os.lower()
        architecture = self.architecture.lower()
        variant = self.variant.lower()
        os = _OS_ALIASES.get(os, os)
        architecture, alias_variant = _ARCHITECTURE_ALIASES.get(architecture, (architecture, ""))
        variant = variant or alias_variant
        if architecture in _VARIANTS:
            variant = f"v{variant}" if variant[:1].isdigit() else variant or _DEFAULT_VARIANT[architecture]
        return os, architecture, variant

    def rank_for(self, wanted: Platform) -> int | None:
        """How well an image of this platform runs where ``wanted`` is asked for: 0 best, None not at all (rule C9).

        ``arm64`` is ``arm64/v8``; an older variant of the same architecture also runs, and ranks behind.
        """
        os, architecture, variant = self._normalized()
        wanted_os, wanted_architecture, wanted_variant = wanted._normalized()
        if (os, architecture) != (wanted_os, wanted_architecture):
            return None
        if wanted.os_version and wanted.os_version != self.os_version:
            return None
        if variant == wanted_variant or not wanted_variant:
            return 0
        order = _VARIANTS.get(architecture, ())
        if variant in order and wanted_variant in order:
            behind = order.index(variant) - order.index(wanted_variant)
            return behind if behind > 0 else None
        return None


# ---------------------------------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------------------------------


class Descriptor(msgspec.Struct, frozen=True):
    """What one document says about another blob (image-spec descriptor.md). ``size`` is in bytes, as stored."""

    media_type: str
    digest: Digest
    size: int
    annotations: Mapping[str, str] = {}
    data: bytes | None = None
    """The blob itself, embedded; not checked yet: `embedded` does."""
    platform: Platform | None = None
    urls: tuple[str, ...] = ()
    artifact_type: str = ""

    def embedded(self) -> bytes | None:
        """Give the embedded bytes once they agree with size and digest (rule C6), None if there are none."""
        if self.data is not None:
            self.check(self.data, "the data embedded in its descriptor")
        return self.data

    def check(self, data: bytes, where: str) -> None:
        """Raise DamagedError unless ``data``, found at ``where``, has this size and digest. Size first (rule C4)."""
        if len(data) != self.size:
            raise DamagedError(f"{self.digest}: {where} has {len(data)} bytes, its descriptor says {self.size}")
        if not self.digest.matches(data):
            found = type(self.digest).of(data, self.digest.algorithm)
            raise DamagedError(f"{self.digest}: {where} has another digest, {found}")

    @property
    def is_attestation(self) -> bool:
        """Whether BuildKit's conventions mark this manifest as an attestation about another one (rule C9)."""
        kind = self.annotations.get("vnd.docker.reference.type")
        return kind == "attestation-manifest" or (self.platform is not None and not self.platform.is_known)

    @property
    def is_encrypted(self) -> bool:
        """Whether the media type says that the blob is encrypted (ocicrypt's ``+encrypted``)."""
        return self.media_type.endswith(_ENCRYPTED_SUFFIX)

    @property
    def is_foreign(self) -> bool:
        """Whether this layer's content is meant to be fetched from ``urls`` and not kept with the image."""
        return ".foreign." in self.media_type or (".nondistributable." in self.media_type and bool(self.urls))

    def layer_problem(self) -> UnsupportedError | None:
        """Say why a layer with this descriptor cannot be part of a root file system; None if it can be."""
        if self.is_encrypted:
            return UnsupportedError(
                f"layer {self.digest} is encrypted ({printable(self.media_type)}): decrypt the image first, "
                "for example with skopeo copy --decryption-key"
            )
        if self.is_foreign:
            urls = printable(", ".join(self.urls[:3]))
            where = f"its content is at {urls}" if urls else "its content is kept elsewhere"
            return UnsupportedError(f"layer {self.digest} is a foreign layer ({printable(self.media_type)}): {where}")
        return None


class Manifest(msgspec.Struct, frozen=True):
    """One image or artifact: a configuration and layers from the base up."""

    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...] = ()
    annotations: Mapping[str, str] = {}
    artifact_type: str = ""
    subject: Descriptor | None = None


class Index(msgspec.Struct, frozen=True):
    """A list of manifests and further indexes, in order."""

    media_type: str
    manifests: tuple[Descriptor, ...] = ()
    annotations: Mapping[str, str] = {}
    artifact_type: str = ""
    subject: Descriptor | None = None


class History(msgspec.Struct, frozen=True):
    """One build step (image-spec config.md, ``history``). ``created`` is kept as text: RFC 3339 by the spec."""

    created: str = ""
    created_by: str = ""
    author: str = ""
    comment: str = ""
    empty_layer: bool = False


class RuntimeConfig(msgspec.Struct, frozen=True):
    """How a container of the image starts (image-spec config.md, ``config``). None: nothing is said."""

    env: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] | None = None
    cmd: tuple[str, ...] | None = None
    user: str = ""
    working_dir: str = ""
    labels: Mapping[str, str] = {}
    exposed_ports: tuple[str, ...] = ()
    volumes: tuple[str, ...] = ()
    stop_signal: str = ""


class ImageConfig(msgspec.Struct, frozen=True):
    """An image's configuration (image-spec config.md)."""

    platform: Platform
    diff_ids: tuple[DiffID, ...]
    """Of the layers from the base up."""
    rootfs_type: str = "layers"
    created: str = ""
    author: str = ""
    config: RuntimeConfig = RuntimeConfig()
    history: tuple[History, ...] = ()

    def rootfs_problem(self, layer_count: int) -> DamagedError | None:
        """Say what keeps this configuration from describing ``layer_count`` layers (rule C8); None if nothing does."""
        if self.rootfs_type != "layers":
            return DamagedError(
                f"the image configuration has rootfs.type {_quoted(self.rootfs_type)}; only 'layers' has a meaning"
            )
        if len(self.diff_ids) != layer_count:
            return DamagedError(
                f"the image configuration has {len(self.diff_ids)} diff IDs but the manifest has {layer_count} layers"
            )
        return None


def layer_steps(config: ImageConfig | None, layers: int) -> list[History | None]:
    """Give the build step that wrote each layer: the history's steps without those that made no layer, in order.

    A history that does not speak of as many layers as there are says nothing certain about any of them.
    """
    steps = [step for step in config.history if not step.empty_layer] if config else []
    return list(steps) if len(steps) == layers else [None] * layers


def artifact_kind(manifest: Manifest) -> str | None:
    """Tell a root file system image from an artifact (rule C10): None for an image, else what it is, as a phrase.

    An image has an image configuration and layers that are tars, whatever their compression. Encrypted and foreign
    layers count as tars: that they cannot be read is `Descriptor.layer_problem`.
    """
    layers = [layer.media_type for layer in manifest.layers]
    if any(layer.startswith("application/vnd.in-toto") for layer in layers):
        return "an in-toto attestation"
    if manifest.artifact_type and manifest.artifact_type not in _IMAGE_CONFIG_TYPES:
        return f"an artifact of type {printable(manifest.artifact_type)}"
    if manifest.config.media_type not in _IMAGE_CONFIG_TYPES:
        return f"an artifact with a configuration of type {printable(manifest.config.media_type)}"
    for number, layer in enumerate(layers, 1):
        if layer and not _TAR_LAYER.fullmatch(layer):
            return f"an artifact whose layer {number} is of type {printable(layer)}"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# JSON
#
# The classes below are the documents as written; every field may be null or missing. They are read in one go and turned
# into the values above, which say what is required.
# ---------------------------------------------------------------------------------------------------------------------

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


_MAX_SHOWN: Final = 200
"""Characters of a foreign text that a message repeats: enough to recognise it."""


def printable(text: str) -> str:
    """Give a text out of a document for a message: short, on one line, nothing in it that a terminal would obey."""
    short = text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "…"
    return short if short.isprintable() else ascii(short)[1:-1]


def _quoted(text: str) -> str:
    return f"'{printable(text)}'"
