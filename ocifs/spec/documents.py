"""The documents as values: descriptors, manifests, indexes, image configurations, and the media types they name.

Not here: the JSON they are written in (`ocifs.spec.parsing`).
"""

from __future__ import annotations

import enum
import re
from typing import TYPE_CHECKING, Final

import msgspec

from ocifs.errors import DamagedError, UnsupportedError
from ocifs.spec.digest import DiffID, Digest
from ocifs.spec.platform import Platform
from ocifs.spec.quoting import printable, quoted

if TYPE_CHECKING:
    from collections.abc import Mapping


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
                f"the image configuration has rootfs.type {quoted(self.rootfs_type)}; only 'layers' has a meaning"
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
