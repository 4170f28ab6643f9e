"""What is particular to one source or one rule: indexes and platforms, artifacts, damage, hostile archives."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import socket
import tarfile
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ocifs.errors import DamagedError, MachineError, NotFoundError, OcifsError, UnsupportedError, UsageError
from ocifs.reference import parse
from ocifs.sources import Blob, ResolvedImage, Source, open_source
from ocifs.sources.archive import ArchiveFolder
from ocifs.sources.blob import BytesBlob, FileBlob
from ocifs.sources.containerd import ContainerdSource
from ocifs.sources.docker_archive import DockerArchiveSource
from ocifs.sources.layout import LayoutSource
from ocifs.sources.names import full_name
from ocifs.spec import Digest, Platform
from tests.support.bolt import containerd_database
from tests.support.layout import (
    OCI_INDEX,
    OCI_MANIFEST,
    REF_NAME,
    Image,
    Json,
    add_to_layout,
    archive_directory,
    blob_path,
    dump,
    make_image,
    make_index,
    put_blob,
    put_image,
    sha256,
    write_dir,
    write_docker_archive,
    write_layout,
    write_oci_archive,
    write_tar,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

AMD64 = Platform("linux", "amd64")
ONE, TWO = b"1" * 1000, b"2" * 2000
_OPENED: list[Source] = []


@pytest.fixture(autouse=True)
def _close_sources() -> Iterator[None]:
    yield
    while _OPENED:
        _OPENED.pop().close()


def resolve(
    text: str, *, platform: str = "linux/amd64", examine: bool = False, root: Path | None = None
) -> ResolvedImage:
    reference = parse(text)
    source = open_source(reference, root=os.fsencode(root or "/nonexistent"))
    _OPENED.append(source)
    return source.resolve(reference.selector, Platform.parse(platform), examine=examine)


def rules(image: ResolvedImage) -> list[str]:
    return [warned.rule for warned in image.warnings]


def put_index(layout: Path, index: bytes, tag: str | None = "v1") -> Json:
    """Put an index into a layout as a blob, and into its index.json if it has a tag."""
    put_blob(layout, index)
    descriptor: Json = {"mediaType": OCI_INDEX, "digest": sha256(index), "size": len(index)}
    if tag is not None:
        add_to_layout(layout, [], [{**descriptor, "annotations": {REF_NAME: tag}}])
    return descriptor


def for_platform(layout: Path, text: str | None, layer: bytes, **image: Any) -> Json:
    """Put an image without a tag; give its descriptor with the platform ``text``."""
    words = (text or "linux/amd64").split("/")
    made = make_image([layer], architecture=words[1], variant="".join(words[2:]), **image)
    for digest, data in made.blobs.items():
        put_blob(layout, data, digest)
    if text is None:
        return made.descriptor()
    platform = {"os": words[0], "architecture": words[1], **({"variant": words[2]} if words[2:] else {})}
    return made.descriptor(platform=platform)


def only_layer(image: ResolvedImage) -> bytes:
    with closing(image.layers[0].open()) as blob:
        return blob.read_at(0, blob.size)


# --- C9: platforms and indexes ----------------------------------------------------------------------------------------


def test_c9_the_first_match_is_chosen_and_arm64_is_arm64_v8(tmp_path: Path) -> None:
    layout = tmp_path / "l"
    entries = [
        for_platform(layout, "windows/amd64", b"w", compression="plain"),
        for_platform(layout, "linux/arm64/v8", b"arm", compression="plain"),
        for_platform(layout, "linux/amd64", b"amd", compression="plain"),
        for_platform(layout, "linux/amd64", b"second amd", compression="plain"),
    ]
    put_index(layout, make_index(entries))
    assert only_layer(resolve(f"oci:{layout}")) == b"amd"
    assert only_layer(resolve(f"oci:{layout}", platform="linux/arm64")) == b"arm"
    image = resolve(f"oci:{layout}", platform="linux/arm64")
    assert image.index is not None
    assert [str(descriptor.platform) for descriptor in image.platforms] == [
        "windows/amd64",
        "linux/arm64/v8",
        "linux/amd64",
        "linux/amd64",
    ]
    with pytest.raises(
        NotFoundError, match="nothing for platform linux/s390x: it has windows/amd64, linux/arm64/v8, l"
    ):
        resolve(f"oci:{layout}", platform="linux/s390x")


def test_c9_attestations_are_never_chosen(tmp_path: Path) -> None:
    layout = tmp_path / "l"
    attestation = for_platform(layout, "unknown/unknown", b"attestation")
    put_index(layout, make_index([attestation, for_platform(layout, "linux/amd64", b"amd", compression="plain")]))
    assert only_layer(resolve(f"oci:{layout}")) == b"amd"
    with pytest.raises(NotFoundError, match=r"linux/arm64: it has linux/amd64$"):
        resolve(f"oci:{layout}", platform="linux/arm64")
    put_index(layout, make_index([attestation]), "alone")
    with pytest.raises(NotFoundError, match="it lists no image"):
        resolve(f"oci:{layout}:alone")


def test_c9_one_manifest_may_be_listed_for_several_platforms(tmp_path: Path) -> None:
    layout = tmp_path / "l"
    entry = for_platform(layout, "linux/arm64", b"any", compression="plain")
    put_index(layout, make_index([entry, {**entry, "platform": {"os": "linux", "architecture": "amd64"}}]))
    for platform in ("linux/arm64", "linux/amd64"):
        assert only_layer(resolve(f"oci:{layout}", platform=platform)) == b"any"


def test_c9_an_index_inside_an_index_is_followed(tmp_path: Path) -> None:
    layout = tmp_path / "l"
    inner = put_index(layout, make_index([for_platform(layout, "linux/amd64", b"amd", compression="plain")]), None)
    put_index(layout, make_index([for_platform(layout, "linux/arm64", b"arm"), inner]))
    assert only_layer(resolve(f"oci:{layout}")) == b"amd"


def test_c9_without_a_platform_in_the_descriptor_the_configuration_says(tmp_path: Path) -> None:
    layout = tmp_path / "l"
    arm = for_platform(layout, "linux/arm64", b"arm")
    del arm["platform"]
    put_index(layout, make_index([arm, for_platform(layout, None, b"amd", compression="plain")]))
    assert only_layer(resolve(f"oci:{layout}")) == b"amd"
    with pytest.raises(NotFoundError, match="it has linux/arm64, linux/amd64"):
        resolve(f"oci:{layout}", platform="linux/s390x")


def test_c9_an_index_that_contains_itself_is_an_error(tmp_path: Path) -> None:
    layout = tmp_path / "l"
    outer = "sha256:" + "0" * 64
    inner = make_index([{"mediaType": OCI_INDEX, "digest": outer, "size": 400}])
    put_blob(layout, inner)
    looped = make_index([{"mediaType": OCI_INDEX, "digest": sha256(inner), "size": len(inner)}])
    put_blob(layout, looped, outer)
    descriptor = {"mediaType": OCI_INDEX, "digest": outer, "size": len(looped)}
    add_to_layout(layout, [], [descriptor])
    with pytest.raises(DamagedError, match="another digest"):
        resolve(f"oci:{layout}")
    with pytest.raises(DamagedError, match="contains itself"):
        resolve(f"oci:{layout}", examine=True)


def test_c9_indexes_are_not_followed_for_ever(tmp_path: Path) -> None:
    layout = tmp_path / "l"
    inner = for_platform(layout, "linux/amd64", b"amd", compression="plain")
    for depth in range(1, 30):
        inner = put_index(layout, make_index([inner]), f"deep{depth}")
    assert only_layer(resolve(f"oci:{layout}:deep16")) == b"amd"
    with pytest.raises(DamagedError, match="indexes deep"):
        resolve(f"oci:{layout}:deep29")


def test_c9_many_ways_to_one_index_are_walked_once(tmp_path: Path) -> None:
    layout = tmp_path / "l"
    inner = for_platform(layout, "linux/arm64", b"arm")
    for _ in range(12):
        inner = put_index(layout, make_index([inner] * 50), None)
    put_index(layout, make_index([inner]))
    with pytest.raises(NotFoundError, match=r"nothing for platform linux/amd64: it has linux/arm64$"):
        resolve(f"oci:{layout}")


def test_a_missing_nested_index_matters_only_if_nothing_else_matches(tmp_path: Path) -> None:
    layout = tmp_path / "l"
    missing = {"mediaType": OCI_INDEX, "digest": "sha256:" + "d" * 64, "size": 1}
    put_index(layout, make_index([missing, for_platform(layout, "linux/amd64", b"amd", compression="plain")]))
    assert only_layer(resolve(f"oci:{layout}")) == b"amd"
    with pytest.raises(NotFoundError, match=r"it has linux/amd64; .*dddd.*No such file"):
        resolve(f"oci:{layout}", platform="linux/arm64")


def test_a_platform_whose_manifest_was_not_pulled_is_named(tmp_path: Path) -> None:
    layout = tmp_path / "l"
    arm = for_platform(layout, "linux/arm64", b"arm")
    put_index(layout, make_index([arm, for_platform(layout, "linux/amd64", b"amd", compression="plain")]))
    blob_path(layout, arm["digest"]).unlink()
    assert only_layer(resolve(f"oci:{layout}")) == b"amd"
    with pytest.raises(NotFoundError, match=arm["digest"]):
        resolve(f"oci:{layout}", platform="linux/arm64")


def test_a_digest_selects_below_an_index_and_an_untagged_blob(tmp_path: Path) -> None:
    layout = tmp_path / "l"
    arm = for_platform(layout, "linux/arm64", b"arm", compression="plain")
    put_index(layout, make_index([arm, for_platform(layout, "linux/amd64", b"amd")]))
    assert only_layer(resolve(f"oci:{layout}@{arm['digest']}")) == b"arm"
    assert only_layer(resolve(f"oci:{layout}:v1@{arm['digest']}")) == b"arm"
    untagged = for_platform(layout, None, b"untagged", compression="plain")
    assert only_layer(resolve(f"oci:{layout}@{untagged['digest']}")) == b"untagged"
    with pytest.raises(NotFoundError, match=f"{untagged['digest']} below v1"):
        resolve(f"oci:{layout}:v1@{untagged['digest']}")


# --- C12 and names ----------------------------------------------------------------------------------------------------


def test_c12_without_a_name_there_must_be_exactly_one_image(tmp_path: Path) -> None:
    layout = tmp_path / "l"
    write_layout(layout, [ONE], tag="a")
    write_layout(layout, [ONE], tag="b")
    assert resolve(f"oci:{layout}").name == "a"  # two tags, one image
    assert resolve(f"oci:{layout}:b").name == "b"
    write_layout(layout, [TWO], tag="c")
    with pytest.raises(UsageError, match=r"2 images, choose one .*: a sha256:[0-9a-f]+, b sha256:[0-9a-f]+, c sha256"):
        resolve(f"oci:{layout}")
    assert resolve(f"oci:{layout}:@2").name == "c"
    (layout / "index.json").write_text('{"schemaVersion": 2, "manifests": []}')
    with pytest.raises(NotFoundError, match="holds no image"):
        resolve(f"oci:{layout}")
    with pytest.raises(NotFoundError, match="has no image 'x': it is empty"):
        resolve(f"oci:{layout}:x")


def test_c12_artifacts_and_attestations_beside_the_image_do_not_count(tmp_path: Path) -> None:
    layout = tmp_path / "l"
    write_layout(layout, [ONE], tag=None)
    artifact = make_image([b"chart"], manifest_extra={"artifactType": "application/x-chart"})
    put_image(layout, artifact, tag="chart")
    put_image(layout, make_image([b"sig"]), tag=None, artifactType="application/x-signature")
    put_image(layout, make_image([b"att"]), tag=None, platform={"os": "unknown", "architecture": "unknown"})
    image = resolve(f"oci:{layout}")
    assert image.artifact is None
    assert image.layers[0].diff_id == image.config.diff_ids[0] if image.config else None


def test_platforms_side_by_side_in_index_json_are_one_image(tmp_path: Path) -> None:
    layout = tmp_path / "l"
    entries = [
        for_platform(layout, "linux/arm64", b"arm", compression="plain"),
        for_platform(layout, "linux/amd64", b"amd", compression="plain"),
    ]
    add_to_layout(layout, [], entries)
    assert only_layer(resolve(f"oci:{layout}")) == b"amd"
    assert only_layer(resolve(f"oci:{layout}", platform="linux/arm64")) == b"arm"


def test_whole_image_names_in_a_layout_select_too(tmp_path: Path) -> None:
    layout = tmp_path / "l"
    name = {"io.containerd.image.name": "docker.io/library/app:v1"}
    put_image(layout, make_image([ONE]), tag="v1", annotations=name)
    put_image(layout, make_image([TWO]), tag="v1", annotations={"io.containerd.image.name": "example.org/app:v1"})
    for text in ("docker.io/library/app:v1", "app:v1"):
        assert resolve(f"oci:{layout}:{text}").name == text
    with pytest.raises(UsageError, match=r"v1, docker.io/library/app:v1 sha256:.*v1, example.org/app:v1 sha256:"):
        resolve(f"oci:{layout}:v1")


@pytest.mark.parametrize(
    ("short", "full"),
    [
        ("busybox", "docker.io/library/busybox:latest"),
        ("user/app:1", "docker.io/user/app:1"),
        ("index.docker.io/app", "docker.io/library/app:latest"),
        ("localhost/app", "localhost/app:latest"),
        ("example.org:5000/app", "example.org:5000/app:latest"),
        ("app@sha256:abc", "docker.io/library/app@sha256:abc"),
    ],
)
def test_names_are_completed_as_docker_does(short: str, full: str) -> None:
    assert full_name(short) == full
    assert full_name(full) == full


# --- C4 to C7: documents and blobs ------------------------------------------------------------------------------------


def test_c4_a_manifest_of_another_size_or_digest_is_refused_and_examined_with_a_warning(tmp_path: Path) -> None:
    layout = tmp_path / "l"
    digests = write_layout(layout, [ONE])
    path = blob_path(layout, digests["manifest"])
    good = path.read_bytes()
    path.write_bytes(good + b" ")
    with pytest.raises(DamagedError, match=f"{path} has {len(good) + 1} bytes, its descriptor says {len(good)}"):
        resolve(f"oci:{layout}")
    assert rules(resolve(f"oci:{layout}", examine=True)) == ["C4"]
    path.write_bytes(good.replace(b'"schemaVersion": 2', b'"schemaVersion" :2'))
    with pytest.raises(DamagedError, match=f"{path} has another digest, sha256:"):
        resolve(f"oci:{layout}")
    assert rules(resolve(f"oci:{layout}", examine=True)) == ["C4"]


def test_c4_a_layer_of_another_size_is_the_layers_problem(tmp_path: Path) -> None:
    layout = tmp_path / "l"
    digests = write_layout(layout, [ONE], compression="plain")
    with blob_path(layout, digests["layers"][0]).open("ab") as file:
        file.write(b"x")
    with pytest.raises(DamagedError, match=r"layer 1: .* has 1001 bytes .*, its descriptor says 1000"):
        resolve(f"oci:{layout}").layers[0].open()
    image = resolve(f"oci:{layout}", examine=True)
    assert [(warned.rule, warned.layer) for warned in image.warnings] == [("C4", 1)]
    assert only_layer(image) == ONE + b"x"


def test_a_large_document_is_not_read(tmp_path: Path) -> None:
    layout = tmp_path / "l"
    digests = write_layout(layout, [ONE])
    os.truncate(blob_path(layout, digests["manifest"]), 2**40)
    for examine in (False, True):
        with pytest.raises(DamagedError, match="1099511627776 bytes"):
            resolve(f"oci:{layout}", examine=examine)
    os.truncate(layout / "index.json", 2**40)
    with pytest.raises(DamagedError, match="more than 4194304 are never read"):
        resolve(f"oci:{layout}")


def test_c5_sha512_is_supported_and_blake3_is_named(tmp_path: Path) -> None:
    write_layout(tmp_path / "l", [ONE], algorithm="sha512", compression="plain")
    image = resolve(f"oci:{tmp_path}/l")
    assert image.layers[0].digest is not None
    assert image.layers[0].digest.algorithm == "sha512"
    assert only_layer(image) == ONE

    def lie(manifest: Json) -> None:
        manifest["layers"][0]["digest"] = "blake3:" + "b" * 64

    write_layout(tmp_path / "b", [ONE], change_manifest=lie, compression="plain")
    with pytest.raises(UnsupportedError, match="blake3"):
        resolve(f"oci:{tmp_path}/b").layers[0].open()
    put_blob(tmp_path / "b", ONE, "blake3:" + "b" * 64)
    image = resolve(f"oci:{tmp_path}/b", examine=True)
    assert image.layers[0].digest is None
    assert rules(image) == ["C5"]
    assert only_layer(image) == ONE


def test_c6_embedded_data_stands_in_for_blobs(tmp_path: Path) -> None:
    layout = tmp_path / "l"

    def embed(manifest: Json) -> None:
        manifest["layers"][0]["data"] = base64.b64encode(ONE).decode()

    image = make_image([ONE], compression="plain", change_manifest=embed)
    image.manifest["config"]["data"] = base64.b64encode(image.config_raw).decode()
    raw = dump(image.manifest)
    descriptor = {"mediaType": OCI_MANIFEST, "digest": sha256(raw), "size": len(raw)}
    add_to_layout(layout, [], [{**descriptor, "data": base64.b64encode(raw).decode()}])
    resolved = resolve(f"oci:{layout}")
    assert resolved.config_raw == image.config_raw
    assert only_layer(resolved) == ONE
    assert resolved.layers[0].problem is None


def test_c6_embedded_data_that_is_wrong_is_refused_and_examined_without(tmp_path: Path) -> None:
    def embed(manifest: Json) -> None:
        manifest["layers"][0]["data"] = base64.b64encode(TWO[:1000]).decode()
        manifest["config"]["data"] = ""

    layout = tmp_path / "l"
    write_layout(layout, [ONE], compression="plain", change_manifest=embed)
    with pytest.raises(DamagedError, match=r"config .*embedded in its descriptor has 0 bytes"):
        resolve(f"oci:{layout}")
    image = resolve(f"oci:{layout}", examine=True)
    assert rules(image) == ["C6", "C6"]
    assert only_layer(image) == ONE


def test_c7_extra_files_and_null_layers_are_fine(tmp_path: Path) -> None:
    layout = tmp_path / "l"
    write_layout(layout, [], manifest_extra={"layers": None})
    (layout / "README").write_text("x")
    (layout / "blobs" / "notes").write_text("x")
    put_blob(layout, b"junk", "md5:abc")
    assert resolve(f"oci:{layout}").layers == ()


def test_c7_unknown_media_types_in_an_index_are_passed_over(tmp_path: Path) -> None:
    layout = tmp_path / "l"
    write_layout(layout, [ONE], tag=None)
    add_to_layout(layout, [b"{}"], [{"mediaType": "application/x-other", "digest": sha256(b"{}"), "size": 2}])
    assert len(resolve(f"oci:{layout}").layers) == 1
    with pytest.raises(UnsupportedError, match="application/x-other"):
        resolve(f"oci:{layout}:@1")


@pytest.mark.parametrize("kind", ["fifo", "directory", "socket", "dangling", "loop", "device"])
def test_a_blob_that_is_no_file_neither_hangs_nor_acts(tmp_path: Path, kind: str) -> None:
    layout = tmp_path / "l"
    digests = write_layout(layout, [ONE])
    path = blob_path(layout, digests["layers"][0])
    path.unlink()
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case "socket":
            # A socket's path has at most 107 bytes.
            with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as server:
                server.bind(path.name)
        case "dangling":
            path.symlink_to("nowhere")
        case "loop":
            path.symlink_to(path)
        case _:
            path.symlink_to("/dev/zero")
    image = resolve(f"oci:{layout}")
    error = NotFoundError if kind in {"dangling", "loop"} else DamagedError
    with pytest.raises(error, match=str(path)):
        image.layers[0].open()
    (layout / "index.json").unlink()
    os.mkfifo(layout / "index.json")
    with pytest.raises(DamagedError, match="is a FIFO"):
        resolve(f"oci:{layout}")


def test_blobs_may_be_symbolic_links(tmp_path: Path) -> None:
    layout = tmp_path / "l"
    digests = write_layout(layout, [ONE], compression="plain")
    path = blob_path(layout, digests["layers"][0])
    path.rename(tmp_path / "elsewhere")
    path.symlink_to("../../../elsewhere")
    assert only_layer(resolve(f"oci:{layout}")) == ONE


def test_a_path_stays_the_same_when_the_working_directory_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_layout(tmp_path / "l", [ONE], compression="plain")
    monkeypatch.chdir(tmp_path)
    image = resolve("oci:l")
    monkeypatch.chdir("/")
    assert only_layer(image) == ONE


def test_a_blob_that_shrinks_reads_short(tmp_path: Path) -> None:
    path = tmp_path / "b"
    path.write_bytes(ONE)
    with closing(FileBlob(os.fsencode(path))) as blob:
        os.truncate(path, 10)
        assert blob.read_at(0, 1000) == ONE[:10]


def test_a_file_that_may_not_be_read_is_the_machines_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "b"
    path.write_bytes(ONE)

    def denied(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(MachineError, match="Permission denied"):
        FileBlob(os.fsencode(path))


# --- C10 and layers that cannot be mounted ----------------------------------------------------------------------------


def test_c10_an_artifact_is_listed_and_its_layers_are_blobs(tmp_path: Path) -> None:
    layout = tmp_path / "l"
    chart = "application/vnd.cncf.helm.chart.content.v1.tar+gzip"

    def helm(manifest: Json) -> None:
        manifest["config"]["mediaType"] = "application/vnd.cncf.helm.config.v1+json"
        manifest["layers"][0]["mediaType"] = chart

    write_layout(layout, [ONE], compression="plain", change_manifest=helm)
    image = resolve(f"oci:{layout}")
    assert image.artifact == "an artifact with a configuration of type application/vnd.cncf.helm.config.v1+json"
    assert image.config is None
    assert [(layer.media_type, layer.problem) for layer in image.layers] == [(chart, None)]
    with closing(image.layers[0].open_stored()) as blob:
        assert blob.read_at(0, 5) == b"11111"


def test_an_artifact_without_its_configuration_is_listed(tmp_path: Path) -> None:
    layout = tmp_path / "l"
    digests = write_layout(layout, [ONE], manifest_extra={"artifactType": "application/x-thing"})
    blob_path(layout, digests["config"]).unlink()
    image = resolve(f"oci:{layout}")
    assert image.artifact == "an artifact of type application/x-thing"
    assert image.config_raw == b""
    assert rules(image) == ["C10"]


def test_encrypted_and_foreign_layers_say_what_they_are_when_used(tmp_path: Path) -> None:
    def change(manifest: Json) -> None:
        manifest["layers"][0]["mediaType"] += "+encrypted"
        manifest["layers"][1]["mediaType"] = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
        manifest["layers"][1]["urls"] = ["https://example.org/layer"]

    layout = tmp_path / "l"
    write_layout(layout, [ONE, TWO], change_manifest=change, compression="plain")
    image = resolve(f"oci:{layout}")
    assert image.artifact is None
    with pytest.raises(UnsupportedError, match="is encrypted"):
        image.layers[0].open()
    with pytest.raises(UnsupportedError, match=r"is a foreign layer .*https://example.org/layer"):
        image.layers[1].open()
    with closing(image.layers[0].open_stored()) as blob:
        assert blob.size == 1000
    image = resolve(f"oci:{layout}", examine=True)
    with pytest.raises(UnsupportedError, match="is encrypted"):
        image.layers[0].open()
    with closing(image.layers[1].open()) as blob:
        assert blob.size == 2000
    assert [(warned.rule, warned.layer) for warned in image.warnings] == [("C10", 2)]


def test_schema_1_says_what_it_is(tmp_path: Path) -> None:
    write_dir(tmp_path / "d", [ONE])
    (tmp_path / "d" / "manifest.json").write_text('{"schemaVersion": 1, "fsLayers": [], "history": []}')
    with pytest.raises(UnsupportedError, match="schema 1"):
        resolve(f"dir:{tmp_path}/d")


# --- layouts ----------------------------------------------------------------------------------------------------------


def test_layouts_of_another_version_are_unsupported(tmp_path: Path) -> None:
    layout = tmp_path / "l"
    write_layout(layout, [ONE])
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "2.0.0"}')
    with pytest.raises(UnsupportedError, match=r"version '2\.0\.0'"):
        resolve(f"oci:{layout}")
    (layout / "oci-layout").write_text("x")
    with pytest.raises(DamagedError, match="oci-layout is not JSON"):
        resolve(f"oci:{layout}")
    (layout / "oci-layout").unlink()
    assert resolve(f"oci:{layout}").name == "latest"


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="/none: No such file or directory"):
        resolve(f"oci:{tmp_path}/none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFoundError, match=r"index.json: No such file"):
        resolve(f"oci:{tmp_path}/empty")
    with pytest.raises(NotFoundError, match="containerd's store /nonexistent cannot be read"):
        resolve("containerd:x")


# --- recognising bare paths -------------------------------------------------------------------------------------------


def test_a_bare_path_that_is_no_image_says_what_is_known(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("hello\n" * 1000)
    (tmp_path / "nothing").write_bytes(b"")
    write_tar(tmp_path / "tar", [("etc/passwd", b"root")])
    os.mkfifo(tmp_path / "fifo")
    for name in ("empty", "text", "nothing", "tar", "fifo"):
        with pytest.raises((DamagedError, UnsupportedError), match="known are OCI layouts, oci-archives"):
            resolve(f"{tmp_path}/{name}")


def test_a_scheme_with_the_wrong_kind_of_path_says_so(tmp_path: Path) -> None:
    write_layout(tmp_path / "l", [ONE])
    write_oci_archive(tmp_path / "a.tar", [ONE])
    with pytest.raises(UnsupportedError, match=r"a\.tar is not a directory"):
        resolve(f"oci:{tmp_path}/a.tar")
    with pytest.raises(UnsupportedError, match="is a directory, where an archive belongs"):
        resolve(f"oci-archive:{tmp_path}/l")
    with pytest.raises(NotFoundError, match=r"manifest\.json: no such member"):
        resolve(f"docker-archive:{tmp_path}/a.tar")


@pytest.mark.parametrize("outer", ["gzip", "zstd", "xz"])
def test_a_compressed_archive_is_opened_by_whoever_can(tmp_path: Path, outer: str) -> None:
    write_oci_archive(tmp_path / "a.tar", [ONE], outer=outer, compression="plain")
    archive_directory(tmp_path / "plain.tar", tmp_path / "a.tar.layout")
    reference = parse(f"oci-archive:{tmp_path}/a.tar")
    asked = []

    def open_archive(path: bytes) -> Blob:
        asked.append(path)
        return BytesBlob("a.tar", (tmp_path / "plain.tar").read_bytes())

    with closing(open_source(reference, open_archive=open_archive)) as source:
        assert only_layer(source.resolve(reference.selector, AMD64)) == ONE
    assert asked == [os.fsencode(tmp_path / "a.tar")]
    with pytest.raises(UnsupportedError, match=f"is compressed with {outer}"):
        open_source(reference)


def test_the_hybrid_of_docker_25_is_read_either_way(tmp_path: Path) -> None:
    image = make_image([ONE, TWO], compression="plain")
    layout = tmp_path / "l"
    name = {"io.containerd.image.name": "docker.io/library/app:v1"}
    put_image(layout, image, tag="v1", annotations=name)

    def inside(digest: str) -> str:
        return str(blob_path(layout, digest).relative_to(layout))

    saved = {
        "Config": inside(image.config_digest),
        "RepoTags": ["app:v1"],
        "Layers": [inside(digest) for digest in image.layer_digests],
        "LayerSources": {digest: {"mediaType": "x", "size": 1, "digest": digest} for digest in image.diff_ids},
    }
    (layout / "manifest.json").write_bytes(dump([saved]))
    archive_directory(tmp_path / "a.tar", layout)
    by_layout = resolve(f"{tmp_path}/a.tar")
    assert [str(layer.digest) for layer in by_layout.layers] == image.layer_digests
    assert resolve(f"oci-archive:{tmp_path}/a.tar:app:v1").name == "app:v1"
    by_docker = resolve(f"docker-archive:{tmp_path}/a.tar:app:v1")
    assert [str(layer.diff_id) for layer in by_docker.layers] == image.diff_ids
    assert only_layer(by_docker) == ONE
    image.blobs[image.config_digest] = image.config_raw + b" "
    put_blob(layout, image.config_raw + b" ", image.config_digest)
    archive_directory(tmp_path / "a.tar", layout)
    with pytest.raises(DamagedError, match="another digest"):
        resolve(f"docker-archive:{tmp_path}/a.tar:app:v1")
    assert rules(resolve(f"docker-archive:{tmp_path}/a.tar", examine=True)) == ["C4"]


# --- docker-archive (rule C11) ----------------------------------------------------------------------------------------


def test_c11_several_images_need_a_name(tmp_path: Path) -> None:
    one, two = make_image([ONE]), make_image([ONE, TWO])
    archive = tmp_path / "a.tar"
    write_docker_archive(archive, [one, two], names=[["app:1", "app:latest"], None], style="legacy")
    with pytest.raises(UsageError, match=f"2 images, .*: app:1, app:latest linux/amd64 {one.config_digest}, :@1"):
        resolve(f"docker-archive:{archive}")
    assert len(resolve(f"docker-archive:{archive}:app").layers) == 1
    assert len(resolve(f"docker-archive:{archive}:@1").layers) == 2
    assert len(resolve(f"docker-archive:{archive}@{two.config_digest}").layers) == 2
    assert len(resolve(f"{archive}:app:1").layers) == 1
    with pytest.raises(NotFoundError, match="has no image 'other': it has app:1, app:latest"):
        resolve(f"docker-archive:{archive}:other")


def test_c11_images_of_one_name_for_several_platforms_are_chosen_between(tmp_path: Path) -> None:
    images = [make_image([ONE], architecture="arm64"), make_image([TWO])]
    write_docker_archive(tmp_path / "a.tar", images, names=[["app:1"], ["app:1"]])
    assert only_layer(resolve(f"docker-archive:{tmp_path}/a.tar")) == TWO
    assert only_layer(resolve(f"docker-archive:{tmp_path}/a.tar", platform="linux/arm64")) == ONE


def saved(tmp_path: Path, manifest: Any, *files: tuple[str, bytes | tuple[bytes, str]]) -> str:
    """Write an archive of these files and a manifest.json; give a reference to it."""
    write_tar(
        tmp_path / "a.tar", [*files, ("manifest.json", manifest if isinstance(manifest, bytes) else dump(manifest))]
    )
    return f"docker-archive:{tmp_path}/a.tar"


def config_of(*layers: bytes) -> bytes:
    return make_image(layers).config_raw


def test_c11_links_are_followed_inside_the_archive_only(tmp_path: Path) -> None:
    text = saved(
        tmp_path,
        [{"Config": "c", "Layers": ["a/l", "b/l", "up", "abs", "loop", "dir", "hard"]}],
        ("c", config_of(*[ONE] * 7)),
        ("a/l", ONE),
        ("b/l", (tarfile.SYMTYPE, "../a/./l")),
        ("up", (tarfile.SYMTYPE, "../../../../etc/passwd")),
        ("abs", (tarfile.SYMTYPE, "/etc/passwd")),
        ("loop", (tarfile.SYMTYPE, "loop")),
        ("dir", (tarfile.DIRTYPE, "")),
        ("hard", (tarfile.LNKTYPE, "b/l")),
    )
    layers = resolve(text).layers
    for number in (1, 2, 7):
        with closing(layers[number - 1].open()) as blob:
            assert blob.read_at(0, blob.size) == ONE
    for number, error, words in [
        (3, NotFoundError, r"layer 3: .*up: a link to \.\., which is not there"),
        (4, NotFoundError, "abs: a link to etc/passwd, which is not there"),
        (5, DamagedError, "more than 40 links"),
        (6, DamagedError, "is a dir, where a regular file belongs"),
    ]:
        with pytest.raises(error, match=words):
            layers[number - 1].open()


def test_c11_the_last_of_several_members_of_one_name_counts(tmp_path: Path) -> None:
    text = saved(tmp_path, [{"Config": "c", "Layers": ["l"]}], ("c", config_of(ONE)), ("l", TWO), ("./l", ONE))
    assert only_layer(resolve(text)) == ONE


def test_c11_a_configuration_under_another_name_is_a_warning(tmp_path: Path) -> None:
    text = saved(tmp_path, [{"Config": "0" * 64 + ".json", "Layers": []}], ("0" * 64 + ".json", config_of()))
    assert rules(resolve(text)) == ["C4"]
    text = saved(tmp_path, [{"Config": "config.json", "Layers": []}], ("config.json", config_of()))
    assert rules(resolve(text)) == []


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        (b"x", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        ({}, "not a list of images"),
        ([1], "image @0 is not an object"),
        ([{"Config": "c", "Layers": 1}], "Layers is not a list"),
        ([{"Config": "c", "Layers": [1]}], "Layers does not name a member"),
        ([{"Config": "c", "Layers": ["../../etc/passwd"]}], "Layers does not name a member"),
        ([{"Config": "c", "RepoTags": [1]}], "RepoTags holds something that is not text"),
        ([{"Config": "/"}], "Config does not name a member"),
        ([{}], "Config does not name a member"),
    ],
)
def test_c11_a_manifest_that_makes_no_sense_is_damaged(tmp_path: Path, manifest: object, words: str) -> None:
    with pytest.raises(DamagedError, match=words):
        resolve(saved(tmp_path, manifest))


def test_c11_archives_from_before_docker_1_10_are_unsupported(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("repositories", b"{}"), ("x/layer.tar", ONE)])
    for text in (f"docker-archive:{tmp_path}/a.tar", f"{tmp_path}/a.tar"):
        with pytest.raises(UnsupportedError, match=r"before Docker 1\.10"):
            resolve(text)


# --- archives ---------------------------------------------------------------------------------------------------------


class Counting:
    """A sparse archive of many GB: counts what is read."""

    name = "counted"

    def __init__(self, inner: Blob) -> None:
        self.inner = inner
        self.size = inner.size
        self.read = 0

    def read_at(self, offset: int, size: int, /) -> bytes:
        self.read += size
        return self.inner.read_at(offset, size)

    def file_range(self) -> None:
        return None

    def identity(self) -> None:
        return None

    def close(self) -> None:
        self.inner.close()


def test_a_large_archive_is_listed_by_its_headers(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with path.open("wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for number in range(5):
            info = tarfile.TarInfo(f"{number} " + "long" * 40)
            info.size = 20 * 2**30
            file.write(info.tobuf(tarfile.PAX_FORMAT))
            file.seek(info.size, os.SEEK_CUR)
        file.write(bytes(1024))
        archive.offset = file.tell()
    counting = Counting(FileBlob(os.fsencode(path)))
    folder = ArchiveFolder(counting, lambda: counting)
    assert len(folder.names()) == 5
    assert folder.size_of(folder.names()[4]) == 20 * 2**30
    assert counting.read <= 5 * 3 * 512 + 2 * 512
    folder.close()


def test_a_damaged_archive_is_refused(tmp_path: Path) -> None:
    write_oci_archive(tmp_path / "a.tar", [ONE], compression="plain")
    raw = (tmp_path / "a.tar").read_bytes()
    last = raw.rindex(b"ustar") - 257
    for broken, words in (
        (raw[:700], r"b\.tar: the archive is damaged or cut off at offset 700"),
        (raw[:1100], r"b\.tar: the archive is damaged or cut off at offset"),
        (raw[:last] + b"?" + raw[last + 1 :], rf"b\.tar: the archive is damaged or cut off at offset {last}$"),
        (b"?" + raw[1:], r"b\.tar is no tar archive"),
    ):
        (tmp_path / "b.tar").write_bytes(broken)
        with pytest.raises(DamagedError, match=words):
            resolve(f"oci-archive:{tmp_path}/b.tar")


def test_an_archive_that_changed_its_size_since_it_was_listed_is_refused(tmp_path: Path) -> None:
    write_oci_archive(tmp_path / "a.tar", [ONE], compression="plain")
    source = open_source(parse(f"oci-archive:{tmp_path}/a.tar"))
    image = source.resolve(parse("oci:x").selector, AMD64)
    source.close()
    assert only_layer(image) == ONE
    with (tmp_path / "a.tar").open("ab") as file:
        file.write(b"x")
    with pytest.raises(DamagedError, match="bytes when it was listed"):
        image.layers[0].open()


def test_no_file_stays_open_after_a_failure(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("index.json", b"x"), ("manifest.json", b"x")])
    (tmp_path / "b.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:700])
    before = sorted(path.name for path in Path("/proc/self/fd").iterdir())
    for text in ("oci-archive:{}/a.tar", "docker-archive:{}/a.tar", "{}/a.tar", "{}/b.tar", "oci-archive:{}/b.tar"):
        with pytest.raises(DamagedError):
            open_source(parse(text.format(tmp_path)))
    assert sorted(path.name for path in Path("/proc/self/fd").iterdir()) == before


# --- dir: and containerd ----------------------------------------------------------------------------------------------


def test_a_directory_with_dockers_manifest_says_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(DamagedError, match="recognised as a dir: directory"):
        resolve(f"{tmp_path}")


def test_newer_names_of_blobs_in_a_directory_are_found(tmp_path: Path) -> None:
    digests = write_dir(tmp_path / "d", [ONE], algorithm="sha512", compression="plain")
    digest = digests["layers"][0].partition(":")[2]
    (tmp_path / "d" / digest).rename(tmp_path / "d" / f"sha512-{digest}")
    assert only_layer(resolve(f"dir:{tmp_path}/d")) == ONE


def containerd_store(root: Path, images: dict[str, Image], **entries: tuple[str, str, int]) -> Path:
    """Write a store with ``images`` under their names; give the path of meta.db."""
    for image in images.values():
        put_image(root / "io.containerd.content.v1.content", image)
    shutil.rmtree(root / "x", ignore_errors=True)
    meta = root / "io.containerd.metadata.v1.bolt" / "meta.db"
    meta.parent.mkdir(parents=True, exist_ok=True)
    targets = {name: (OCI_MANIFEST, i.manifest_digest, len(i.manifest_raw)) for name, i in images.items()}
    meta.write_bytes(containerd_database({"default": {**targets, **entries}}))
    return meta


def test_images_in_containerd_are_found_by_any_spelling(tmp_path: Path) -> None:
    one, two = make_image([ONE], compression="plain"), make_image([TWO], compression="plain")
    pinned = f"docker.io/library/pinned@{two.manifest_digest}"
    cri = one.config_digest
    containerd_store(tmp_path, {"docker.io/library/app:latest": one, pinned: two, cri: one})
    for text in ("app", "app:latest", "docker.io/library/app:latest", f"app@{one.manifest_digest}", cri):
        assert only_layer(resolve(f"containerd:{text}", root=tmp_path)) == ONE
    for text in (pinned, f"pinned@{two.manifest_digest}", two.manifest_digest, f"@{two.manifest_digest}"):
        assert only_layer(resolve(f"containerd:{text}", root=tmp_path)) == TWO
    with pytest.raises(NotFoundError, match="below app"):
        resolve(f"containerd:app@{two.manifest_digest}", root=tmp_path)


@pytest.mark.parametrize("damage", ["removed", "zeros", "truncated", "fifo", "size", "digest", "other"])
def test_without_a_usable_database_manifests_are_found_in_the_content(tmp_path: Path, damage: str) -> None:
    image = make_image([ONE], compression="plain")
    meta = containerd_store(tmp_path, {"app": image})
    match damage:
        case "removed":
            meta.unlink()
        case "zeros":
            meta.write_bytes(bytes(65536))
        case "truncated":
            os.truncate(meta, 4096 * 3)
        case "fifo":
            meta.unlink()
            os.mkfifo(meta)
        case "size":
            containerd_store(tmp_path, {"app": image}, bad=(OCI_MANIFEST, image.manifest_digest, -5))
        case "digest":
            containerd_store(tmp_path, {"app": image}, bad=(OCI_MANIFEST, "../../x", 5))
        case _:
            meta.write_bytes(containerd_database({}).replace(b"v1", b"v9"))
    found = resolve("containerd:", root=tmp_path)
    assert only_layer(found) == ONE
    assert "names of images are not known" in found.warnings[0].message
    assert only_layer(resolve(f"containerd:@{image.manifest_digest}", root=tmp_path)) == ONE
    with pytest.raises(NotFoundError, match="cannot be searched by name, choose by digest"):
        resolve("containerd:app", root=tmp_path)


def test_without_a_database_what_an_index_lists_is_not_listed_again(tmp_path: Path) -> None:
    content = tmp_path / "io.containerd.content.v1.content"
    entries = [for_platform(content, "linux/arm64", b"arm"), for_platform(content, "linux/amd64", b"amd")]
    index = put_index(content, make_index(entries), None)
    with closing(ContainerdSource(os.fsencode(tmp_path), "default")) as source:
        assert [str(offered.digest) for offered in source.names()] == [index["digest"]]


def test_a_database_that_changes_all_the_time_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    containerd_store(tmp_path, {"app": make_image([ONE])})
    monkeypatch.setattr("ocifs.sources.bbolt.Database.is_current", lambda _: False)
    assert "being written to all the time" in resolve("containerd:", root=tmp_path).warnings[0].message


# --- fuzzing: never any exception but an OcifsError -------------------------------------------------------------------

_FUZZ = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def archive_of(blob: Blob) -> ArchiveFolder:
    return ArchiveFolder(blob, lambda: blob)


def try_all(source: Any) -> None:
    """List, resolve and open everything."""
    for examine in (False, True):
        for number in range(len(source.names()) + 1):
            try:
                image = source.resolve(parse(f"oci:x:@{number}").selector, AMD64, examine=examine)
                for layer in image.layers:
                    with closing(layer.open()) as blob:
                        blob.read_at(0, 10)
            except OcifsError as error:
                assert "\n" not in str(error)


def damaged(raw: bytes, changes: list[tuple[int, bytes]], keep: float) -> bytes:
    changed = bytearray(raw)
    for place, noise in changes:
        offset = place % len(raw)
        changed[offset : offset + len(noise)] = noise
    return bytes(changed[: int(len(changed) * keep)])


_CHANGES = st.lists(st.tuples(st.integers(0, 2**32), st.binary(min_size=1, max_size=12)), max_size=4)
_KEEP = st.sampled_from([1.0, 1.0, 0.9, 0.5, 0.1])


@_FUZZ
@given(_CHANGES, _KEEP)
def test_any_damage_to_an_archive_is_an_ocifs_error(
    tmp_path: Path, changes: list[tuple[int, bytes]], keep: float
) -> None:
    path = tmp_path / "a.tar"
    if not path.exists():
        write_oci_archive(path, [ONE, TWO], compression="plain")
        write_docker_archive(tmp_path / "d.tar", [make_image([ONE, TWO, ONE])], style="legacy")
    for name, make in (
        ("a.tar", lambda folder: LayoutSource(folder, "oci-archive")),
        ("d.tar", DockerArchiveSource),
    ):
        raw = damaged((tmp_path / name).read_bytes(), changes, keep)
        try:
            with closing(make(archive_of(BytesBlob(name, raw)))) as source:
                try_all(source)
        except OcifsError as error:
            assert "\n" not in str(error)


@_FUZZ
@given(_CHANGES, st.sampled_from(["index.json", "manifest", "config"]))
def test_any_damage_to_a_layout_is_an_ocifs_error(tmp_path: Path, changes: list[tuple[int, bytes]], what: str) -> None:
    layout = tmp_path / "l"
    shutil.rmtree(layout, ignore_errors=True)
    digests = write_layout(layout, [ONE, TWO], compression="plain")
    path = layout / "index.json" if what == "index.json" else blob_path(layout, digests[what])
    path.write_bytes(damaged(path.read_bytes(), changes, 1))
    try:
        with closing(open_source(parse(f"oci:{layout}"))) as source:
            try_all(source)
    except OcifsError as error:
        assert "\n" not in str(error)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6) | st.sampled_from(["c", "l", "../x", "\0"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["Config", "config", "Layers", "RepoTags", "x"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@_FUZZ
@given(_VALUES, _VALUES)
def test_any_json_in_a_docker_archive_is_an_ocifs_error(tmp_path: Path, manifest: object, config: object) -> None:
    for document in (manifest, [{"Config": "c", "RepoTags": None, "Layers": manifest}], [manifest]):
        path = tmp_path / "a.tar"
        write_tar(path, [("c", dump(config)), ("l", ONE), ("manifest.json", json.dumps(document).encode())])
        try:
            with closing(DockerArchiveSource(archive_of(FileBlob(os.fsencode(path))))) as source:
                try_all(source)
        except OcifsError as error:
            assert "\n" not in str(error)


def test_a_digest_names_a_blob_and_nothing_else() -> None:
    assert LayoutSource._blob_name(Digest("sha256", "a" * 64)) == b"blobs/sha256/" + b"a" * 64


def test_a_working_directory_that_is_gone_is_the_paths_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(NotFoundError, match="relative to the working directory"):
        open_source(parse("oci:l"))
    with pytest.raises(NotFoundError, match="No such file"):
        open_source(parse(f"oci:{tmp_path}/l"))
