"""Images at rest, written by hand: OCI layouts, archives and ``dir:`` directories from the bytes of layer tars.

Everything is small and in memory. `make_image` builds the documents and blobs of one image; the writers put them into a
form. Wrong digests and sizes are written on request (``damage``), so that a test can name what it breaks.

Not here: the tars themselves (`tests.support.tarball`).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import zstandard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER_TYPES = {
    "plain": "application/vnd.oci.image.layer.v1.tar",
    "gzip": "application/vnd.oci.image.layer.v1.tar+gzip",
    "zstd": "application/vnd.oci.image.layer.v1.tar+zstd",
}
REF_NAME = "org.opencontainers.image.ref.name"

Json = dict[str, Any]


def sha256(data: bytes) -> str:
    """Give the digest of ``data`` as it is written in documents."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def digest_of(data: bytes, algorithm: str = "sha256") -> str:
    """Give the digest of ``data`` by ``algorithm`` (one that hashlib knows)."""
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"


def compress(data: bytes, compression: str) -> bytes:
    """Compress a layer: ``plain``, ``gzip`` (reproducible) or ``zstd`` (one frame)."""
    if compression == "gzip":
        return gzip.compress(data, mtime=0)
    if compression == "zstd":
        return zstandard.ZstdCompressor(level=3).compress(data)
    assert compression == "plain", compression
    return data


def dump(document: Any) -> bytes:
    """Write JSON bytes."""
    return json.dumps(document).encode()


@dataclass
class Image:
    """One image: every blob by digest, and the pieces a test may want to look at or change."""

    manifest: Json
    manifest_raw: bytes
    config: Json
    config_raw: bytes
    layers: list[bytes]
    """As stored: compressed."""
    tars: list[bytes]
    diff_ids: list[str]
    blobs: dict[str, bytes] = field(default_factory=dict)

    @property
    def manifest_digest(self) -> str:
        """Digest of the manifest."""
        return sha256(self.manifest_raw)

    @property
    def config_digest(self) -> str:
        """Digest of the configuration, which is Docker's image ID."""
        return str(self.manifest["config"]["digest"])

    @property
    def layer_digests(self) -> list[str]:
        """Digests of the stored layers."""
        return [str(layer["digest"]) for layer in self.manifest["layers"] or ()]

    def descriptor(self, **extra: object) -> Json:
        """Give a descriptor of the manifest, for an index."""
        return {
            "mediaType": self.manifest.get("mediaType", OCI_MANIFEST),
            "digest": self.manifest_digest,
            "size": len(self.manifest_raw),
            **extra,
        }

    def digests(self) -> Json:
        """Give what a test asks for most, as plain strings."""
        return {
            "manifest": self.manifest_digest,
            "config": self.config_digest,
            "layers": self.layer_digests,
            "diff_ids": self.diff_ids,
        }


def make_image(
    layers: Sequence[bytes],
    *,
    compression: str | Sequence[str] = "gzip",
    architecture: str = "amd64",
    variant: str = "",
    algorithm: str = "sha256",
    config: Mapping[str, Any] | None = None,
    manifest_extra: Mapping[str, Any] | None = None,
    change_manifest: Callable[[Json], None] | None = None,
    change_config: Callable[[Json], None] | None = None,
) -> Image:
    """Build an image of ``layers`` (uncompressed tars, base first).

    ``config`` and ``manifest_extra`` are merged over the documents' top level; ``change_manifest`` and
    ``change_config`` may edit the finished documents, before their digests are taken, so that a test can say any
    untruth about a layer.
    """
    kinds = [compression] * len(layers) if isinstance(compression, str) else list(compression)
    stored = [compress(layer, kind) for layer, kind in zip(layers, kinds, strict=True)]
    diff_ids = [sha256(layer) for layer in layers]
    config_document: Json = {
        "architecture": architecture,
        "os": "linux",
        "created": "2024-05-01T12:00:00Z",
        "config": {"Env": ["PATH=/usr/bin:/bin"], "Cmd": ["/bin/sh"]},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
        "history": [{"created": "2024-05-01T12:00:00Z", "created_by": f"layer {n}"} for n in range(1, len(layers) + 1)],
        **(config or {}),
    }
    if variant:
        config_document["variant"] = variant
    if change_config is not None:
        change_config(config_document)
    config_raw = dump(config_document)
    manifest: Json = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": {"mediaType": OCI_CONFIG, "digest": digest_of(config_raw, algorithm), "size": len(config_raw)},
        "layers": [
            {"mediaType": LAYER_TYPES[kind], "digest": digest_of(layer, algorithm), "size": len(layer)}
            for layer, kind in zip(stored, kinds, strict=True)
        ],
        **(manifest_extra or {}),
    }
    blobs = {digest_of(data, algorithm): data for data in (config_raw, *stored)}
    if change_manifest is not None:
        change_manifest(manifest)
    manifest_raw = dump(manifest)
    blobs[sha256(manifest_raw)] = manifest_raw
    return Image(manifest, manifest_raw, config_document, config_raw, stored, list(layers), diff_ids, blobs)


def make_index(manifests: Sequence[Json], *, media_type: str = OCI_INDEX, **extra: object) -> bytes:
    """Write an index over descriptors."""
    return dump({"schemaVersion": 2, "mediaType": media_type, "manifests": list(manifests), **extra})


def put_blob(layout: Path, data: bytes, digest: str | None = None) -> str:
    """Write a blob into a layout, under its own digest or a wrong one; give the digest."""
    digest = digest or sha256(data)
    path = blob_path(layout, digest)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return digest


def blob_path(layout: Path, digest: str) -> Path:
    """Say where a layout keeps a blob."""
    algorithm, _, encoded = digest.partition(":")
    return layout / "blobs" / algorithm / encoded


def add_to_layout(layout: Path, blobs: Iterable[bytes], entries: Sequence[Json]) -> None:
    """Put blobs into a layout, creating it, and append descriptors to its ``index.json``."""
    layout.mkdir(parents=True, exist_ok=True)
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    for blob in blobs:
        put_blob(layout, blob)
    index_file = layout / "index.json"
    index: Json = json.loads(index_file.read_text()) if index_file.exists() else {"schemaVersion": 2, "manifests": []}
    index["manifests"] += entries
    index_file.write_bytes(dump(index))


def put_image(layout: Path, image: Image, *, tag: str | None = "latest", **descriptor: Any) -> None:
    """Add an image to a layout under ``tag``; ``descriptor`` overrides fields of its entry in ``index.json``."""
    add_to_layout(layout, (), [])
    for digest, data in image.blobs.items():
        put_blob(layout, data, digest)
    entry = image.descriptor(**descriptor)
    if tag is not None:
        entry["annotations"] = {REF_NAME: tag, **entry.get("annotations", {})}
    add_to_layout(layout, (), [entry])


def write_layout(
    path: Path,
    layers: Sequence[bytes],
    *,
    compression: str | Sequence[str] = "gzip",
    tag: str | None = "latest",
    config: Mapping[str, Any] | None = None,
    manifest_extra: Mapping[str, Any] | None = None,
    change_manifest: Callable[[Json], None] | None = None,
    change_config: Callable[[Json], None] | None = None,
    **image: Any,
) -> Json:
    """Write an OCI layout with one image, or add the image to the layout that is there.

    Gives ``{"manifest": …, "config": …, "layers": […], "diff_ids": […]}``, all digests as text.
    """
    made = make_image(
        layers,
        compression=compression,
        config=config,
        manifest_extra=manifest_extra,
        change_manifest=change_manifest,
        change_config=change_config,
        **image,
    )
    put_image(path, made, tag=tag)
    return made.digests()


def _tar_of(files: Iterable[tuple[str, bytes | tuple[bytes, str]]], compression: str) -> bytes:
    """Write a tar; a value ``(type, target)`` is a link."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in files:
            info = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                info.type, info.linkname = content
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    if compression == "xz":
        import lzma  # noqa: PLC0415 — one rare case

        return lzma.compress(out.getvalue())
    return compress(out.getvalue(), compression)


def write_tar(
    path: Path, files: Iterable[tuple[str, bytes | tuple[bytes, str]]], *, compression: str = "plain"
) -> None:
    """Write files into a tar in the given order; a value ``(tarfile.SYMTYPE, target)`` is a link."""
    path.write_bytes(_tar_of(files, compression))


def archive_directory(path: Path, directory: Path, *, compression: str = "plain", prefix: str = "") -> None:
    """Write a directory's files into a tar: makes an oci-archive of a layout."""
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    write_tar(
        path,
        [(prefix + str(file.relative_to(directory)), file.read_bytes()) for file in files],
        compression=compression,
    )


def write_oci_archive(
    path: Path,
    layers: Sequence[bytes],
    *,
    outer: str = "plain",
    tag: str | None = "latest",
    **image: Any,
) -> Json:
    """Write an oci-archive; ``outer`` compresses the whole of it. Gives digests as `write_layout`."""
    layout = path.with_name(path.name + ".layout")
    digests = write_layout(layout, layers, tag=tag, **image)
    archive_directory(path, layout, compression=outer)
    return digests


def write_docker_archive(
    path: Path,
    images: Sequence[Image],
    *,
    names: Sequence[Sequence[str] | None] = (["example:latest"],),
    style: str = "skopeo",
    outer: str = "plain",
    lower_case: bool = False,
    change_manifest: Callable[[list[Json]], bytes] = dump,
) -> None:
    """Write what ``docker load`` reads.

    ``style``: ``skopeo`` has ``DIFFID.tar``; ``legacy`` has ``ID/layer.tar`` and repeated layers as symbolic links;
    ``hardlink`` repeats them as hard links; ``stored`` keeps layers compressed as ``DIGEST.tar.gz`` (kaniko, Jib).
    ``change_manifest`` turns the entries into the bytes of ``manifest.json``.
    """
    files: list[tuple[str, bytes | tuple[bytes, str]]] = []
    seen: dict[str, str] = {}
    entries: list[Json] = []
    for position, (image, image_names) in enumerate(zip(images, names, strict=True)):
        paths = []
        for number, (tar, stored, diff_id) in enumerate(zip(image.tars, image.layers, image.diff_ids, strict=True), 1):
            hexed = diff_id.removeprefix("sha256:")
            if style == "skopeo":
                name = f"{hexed}.tar"
                if name not in seen:
                    files.append((name, tar))
            elif style == "stored":
                name = f"{sha256(stored).removeprefix('sha256:')}.tar.gz"
                if name not in seen:
                    files.append((name, stored))
            else:
                name = f"{hashlib.sha256(f'{position}/{number}'.encode()).hexdigest()}/layer.tar"
                first = seen.get(hexed)
                if first is None:
                    files.append((name, tar))
                elif style == "legacy":
                    files.append((name, (tarfile.SYMTYPE, f"../{first}")))
                else:
                    files.append((name, (tarfile.LNKTYPE, first)))
                seen.setdefault(hexed, name)
            seen.setdefault(name, name)
            paths.append(name)
        config_name = image.config_digest.removeprefix("sha256:") + ".json"
        if config_name not in seen:
            files.append((config_name, image.config_raw))
        seen[config_name] = config_name
        entry: Json = {"Config": config_name, "RepoTags": image_names, "Layers": paths}
        entries.append({key.lower(): value for key, value in entry.items()} if lower_case else entry)
    files.append(("manifest.json", change_manifest(entries)))
    write_tar(path, files, compression=outer)


def write_dir(path: Path, layers: Sequence[bytes], **image: Any) -> Json:
    """Write skopeo's ``dir:`` form. Gives digests as `write_layout`."""
    made = make_image(layers, **image)
    path.mkdir(parents=True, exist_ok=True)
    (path / "version").write_text("Directory Transport Version: 1.1\n")
    (path / "manifest.json").write_bytes(made.manifest_raw)
    for digest, data in made.blobs.items():
        if digest != made.manifest_digest:
            (path / digest.partition(":")[2]).write_bytes(data)
    return made.digests()
