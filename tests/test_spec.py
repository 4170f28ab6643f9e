"""Documents: what is read, what is refused and how it is said (rules C5 to C10)."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ocifs.errors import DamagedError, OcifsError, UnsupportedError, UsageError
from ocifs.spec import (
    MAX_DOCUMENT_SIZE,
    Descriptor,
    DiffID,
    Digest,
    History,
    ImageConfig,
    Index,
    Manifest,
    MediaType,
    Platform,
    RuntimeConfig,
    artifact_kind,
    parse_config,
    parse_document,
)

EMPTY_SHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
HEX = "a" * 64
CONFIG = {"mediaType": MediaType.OCI_CONFIG, "digest": f"sha256:{HEX}", "size": 7}


def dump(document: object) -> bytes:
    return json.dumps(document).encode()


def manifest(**changes: object) -> dict[str, Any]:
    return {"schemaVersion": 2, "mediaType": MediaType.OCI_MANIFEST, "config": CONFIG, "layers": [], **changes}


# --- digests ----------------------------------------------------------------------------------------------------------


def test_a_digest_is_computed_and_checked() -> None:
    digest = Digest.parse(f"sha256:{EMPTY_SHA256}")
    assert digest == Digest.of(b"") == Digest("sha256", EMPTY_SHA256)
    assert digest.matches(b"")
    assert not digest.matches(b"x")
    assert str(digest) == f"sha256:{EMPTY_SHA256}"
    assert Digest.of(b"", "sha512").hex.startswith("cf83e1357eefb8bd")


def test_a_digest_is_never_a_diff_id() -> None:
    values: set[object] = {Digest("sha256", HEX), DiffID("sha256", HEX)}
    assert len(values) == 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sha256",
        "sha256:",
        f"sha256:{HEX[1:]}",
        f"sha256:{HEX}a",
        f"sha256:{HEX.upper()}",
        f"sha256:{HEX}\n",
        "sha256:" + "g" * 64,
        f"sha512:{HEX}",
        "SHA256:" + HEX,
        "../../etc:passwd",
        "sha256:../../etc/passwd",
        "a..b:c",
        "x:" + "a" * 300,
    ],
)
def test_what_is_no_digest_is_refused(text: str) -> None:
    with pytest.raises(DamagedError, match="is not a digest"):
        Digest.parse(text)


@pytest.mark.parametrize("text", ["blake3:" + "b" * 64, "sha384:" + "c" * 96, "md5+b64:abc="])
def test_c5_a_digest_of_another_algorithm_is_kept_and_refused_when_used(text: str) -> None:
    digest = Digest.parse(text)
    assert str(digest) == text
    with pytest.raises(UnsupportedError) as caught:
        digest.hasher()
    assert digest.algorithm in str(caught.value)


# --- platforms --------------------------------------------------------------------------------------------------------


def test_a_platform_is_parsed() -> None:
    assert Platform.parse("linux/amd64") == Platform("linux", "amd64")
    assert Platform.parse("linux/arm/v7") == Platform("linux", "arm", "v7")
    assert str(Platform.parse("linux/arm64/v8")) == "linux/arm64/v8"
    for text in ("", "linux", "linux/", "a/b/c/d", "linux/amd 64", "linux/amd64\n"):
        with pytest.raises(UsageError):
            Platform.parse(text)


@pytest.mark.parametrize(
    ("offered", "wanted", "rank"),
    [
        ("linux/arm64", "linux/arm64/v8", 0),
        ("linux/arm64/v8", "linux/arm64", 0),
        ("linux/aarch64", "linux/arm64", 0),
        ("linux/x86_64", "linux/amd64", 0),
        ("linux/amd64", "linux/amd64/v3", 2),
        ("linux/amd64/v2", "linux/amd64/v3", 1),
        ("linux/amd64/v3", "linux/amd64", None),
        ("linux/arm/v7", "linux/arm", 0),
        ("linux/arm/7", "linux/arm/v7", 0),
        ("linux/arm/v6", "linux/arm/v7", 1),
        ("linux/arm/v7", "linux/arm/v6", None),
        ("linux/arm", "linux/arm64", None),
        ("windows/amd64", "linux/amd64", None),
        ("linux/s390x", "linux/s390x", 0),
        ("linux/mips64le/hardfloat", "linux/mips64le", 0),
        ("linux/mips64le", "linux/mips64le/hardfloat", None),
    ],
)
def test_c9_which_platform_runs_where(offered: str, wanted: str, rank: int | None) -> None:
    assert Platform.parse(offered).rank_for(Platform.parse(wanted)) == rank


def test_the_host_is_linux_on_a_known_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    for machine, expected in [
        ("x86_64", "linux/amd64"),
        ("aarch64", "linux/arm64"),
        ("armv7l", "linux/arm/v7"),
        ("i686", "linux/386"),
        ("ppc64le", "linux/ppc64le"),
    ]:
        monkeypatch.setattr("platform.machine", lambda machine=machine: machine)
        assert str(Platform.host()) == expected


# --- manifests and indexes --------------------------------------------------------------------------------------------


def test_a_manifest_is_read() -> None:
    raw = dump(
        manifest(
            layers=[
                {
                    "mediaType": MediaType.OCI_LAYER_ZSTD,
                    "digest": f"sha256:{EMPTY_SHA256}",
                    "size": 0,
                    "data": "",
                    "urls": ["https://example.org/x"],
                    "annotations": {"k": "v"},
                    "unknown": [1, {"deep": None}],
                }
            ],
            annotations={"a": "b"},
            subject={"mediaType": MediaType.OCI_MANIFEST, "digest": f"sha256:{HEX}", "size": 1},
        )
    )
    read = parse_document(raw, MediaType.OCI_MANIFEST)
    assert isinstance(read, Manifest)
    assert read.config == Descriptor(MediaType.OCI_CONFIG, Digest("sha256", HEX), 7)
    assert read.layers == (
        Descriptor(
            MediaType.OCI_LAYER_ZSTD,
            Digest("sha256", EMPTY_SHA256),
            0,
            {"k": "v"},
            data=b"",
            urls=("https://example.org/x",),
        ),
    )
    assert read.annotations == {"a": "b"}
    assert read.subject is not None
    assert artifact_kind(read) is None


def test_an_index_is_read() -> None:
    platform = {"os": "linux", "architecture": "arm64", "variant": "v8", "os.version": "1", "os.features": ["x"]}
    entry = {"mediaType": MediaType.OCI_MANIFEST, "digest": f"sha256:{HEX}", "size": 1, "platform": platform}
    read = parse_document(dump({"schemaVersion": 2, "manifests": [entry]}))
    assert isinstance(read, Index)
    assert read.media_type == MediaType.OCI_INDEX
    assert read.manifests[0].platform == Platform("linux", "arm64", "v8", "1", ("x",))


@pytest.mark.parametrize("media_type", [MediaType.DOCKER_LIST, MediaType.DOCKER_MANIFEST])
def test_dockers_documents_are_read_alike(media_type: MediaType) -> None:
    if media_type is MediaType.DOCKER_LIST:
        read = parse_document(dump({"schemaVersion": 2, "mediaType": media_type, "manifests": []}), media_type)
        assert read == Index(media_type)
    else:
        read = parse_document(dump(manifest(mediaType=media_type)), media_type)
        assert isinstance(read, Manifest)
        assert read.media_type == media_type


def test_c7_null_is_absent() -> None:
    read = parse_document(dump(manifest(layers=None, annotations=None, subject=None, mediaType=None)))
    assert isinstance(read, Manifest)
    assert read.layers == ()
    assert parse_document(dump({"manifests": None}), MediaType.OCI_INDEX) == Index(MediaType.OCI_INDEX)


def test_c7_unknown_media_types_in_an_index_are_read() -> None:
    entry = {"mediaType": "application/x-unheard-of", "digest": f"sha256:{HEX}", "size": 1}
    read = parse_document(dump({"manifests": [entry, {**entry, "mediaType": None}]}))
    assert isinstance(read, Index)
    assert [descriptor.media_type for descriptor in read.manifests] == ["application/x-unheard-of", ""]


@pytest.mark.parametrize(
    "document",
    [
        {"schemaVersion": 1, "fsLayers": [], "history": []},
        {"fsLayers": [{"blobSum": f"sha256:{HEX}"}]},
        {"schemaVersion": 2, "mediaType": MediaType.DOCKER_SCHEMA1_SIGNED},
    ],
)
def test_schema_1_is_unsupported_and_named(document: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=r"schema 1.*convert the image"):
        parse_document(dump(document))


@pytest.mark.parametrize(
    ("document", "told", "message"),
    [
        (manifest(manifests=[]), None, "manifest and an index at once"),
        (manifest(), MediaType.OCI_INDEX, "contradicts its descriptor"),
        ({"mediaType": MediaType.OCI_INDEX, "manifests": []}, MediaType.OCI_MANIFEST, "contradicts its descriptor"),
        ({"manifests": []}, MediaType.OCI_MANIFEST, "does not have the content of its type"),
        ({"config": CONFIG}, MediaType.DOCKER_LIST, "does not have the content of its type"),
        (manifest(config=None), None, "has no config"),
        (manifest(schemaVersion=3), None, "schemaVersion 3"),
        (manifest(layers=[{"size": 1}]), None, "layer 1 has no digest"),
        (manifest(layers=[{"digest": f"sha256:{HEX}"}]), None, "layer 1 has no size"),
        (manifest(layers=[{**CONFIG, "digest": "sha256:x"}]), None, "layer 1: 'sha256:x' is not a digest"),
        (manifest(layers=[{**CONFIG, "size": -1}]), None, r"int.*>= 0.*layers"),
        (manifest(layers=[{**CONFIG, "size": 2**63}]), None, "int"),
        (manifest(layers=[{**CONFIG, "size": "1"}]), None, "int"),
        (manifest(layers=[{**CONFIG, "data": "*"}]), None, "layer 1 has embedded data that is not base64"),
        (manifest(layers={}), None, "array"),
        ([], None, "object"),
        ({}, None, "neither a manifest nor an index"),
    ],
)
def test_a_document_that_makes_no_sense_is_damaged(document: object, told: str | None, message: str) -> None:
    with pytest.raises(DamagedError, match=message):
        parse_document(dump(document), told)


def test_other_documents_are_unsupported_and_named() -> None:
    with pytest.raises(UnsupportedError, match=r"vnd.oci.artifact.manifest"):
        parse_document(dump({"mediaType": MediaType.OCI_ARTIFACT, "blobs": []}))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"null",
        b"\xff",
        b'{"mediaType":"\xff","created":"\xff"}',
        b'{"mediaType":"\\ud800"}',
        b"{}{}",
        b"[" * 100_000,
    ],
)
@pytest.mark.parametrize("parse", [parse_document, parse_config])
def test_what_is_no_json_is_damaged(raw: bytes, parse: Any) -> None:
    with pytest.raises(DamagedError):
        parse(raw)


def test_nesting_is_bounded() -> None:
    with pytest.raises(DamagedError, match="nested too deeply"):
        parse_document(b'{"x":' * 200_000)


def test_the_size_of_a_document_is_bounded() -> None:
    fits = dump(manifest()).ljust(MAX_DOCUMENT_SIZE)
    assert isinstance(parse_document(fits), Manifest)
    with pytest.raises(DamagedError, match="4194305 bytes"):
        parse_document(fits + b" ")


# --- descriptors ------------------------------------------------------------------------------------------------------


def test_c6_embedded_data_is_checked_before_it_is_used() -> None:
    good = Descriptor("", Digest.of(b"hello"), 5, data=b"hello")
    assert good.embedded() == b"hello"
    assert Descriptor("", Digest.of(b""), 0, data=b"").embedded() == b""
    assert Descriptor("", Digest.of(b"hello"), 5).embedded() is None
    with pytest.raises(DamagedError, match="has 4 bytes, its descriptor says 5"):
        Descriptor("", Digest.of(b"hello"), 5, data=b"hell").embedded()
    with pytest.raises(DamagedError, match="another digest"):
        Descriptor("", Digest.of(b"hello"), 5, data=b"hallo").embedded()


def test_c6_embedded_data_is_base64() -> None:
    layer = {**CONFIG, "data": base64.b64encode(b"\0\xff").decode()}
    read = parse_document(dump(manifest(layers=[layer])))
    assert isinstance(read, Manifest)
    assert read.layers[0].data == b"\0\xff"


@pytest.mark.parametrize(
    ("media_type", "urls", "words"),
    [
        (MediaType.OCI_LAYER_GZIP + "+encrypted", (), "encrypted"),
        (MediaType.DOCKER_FOREIGN_GZIP, ("https://example.org/l",), "foreign layer .*example.org/l"),
        (MediaType.DOCKER_FOREIGN, (), "foreign layer"),
        ("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", ("https://example.org/l",), "foreign layer"),
        ("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", (), None),
        (MediaType.OCI_LAYER_GZIP, ("https://example.org/l",), None),
    ],
)
def test_encrypted_and_foreign_layers_are_named(media_type: str, urls: tuple[str, ...], words: str | None) -> None:
    layer = Descriptor(media_type, Digest("sha256", HEX), 1, urls=urls)
    problem = layer.layer_problem()
    assert (problem is None) == (words is None)
    assert words is None or re.search(words, str(problem))
    assert artifact_kind(Manifest("", Descriptor(MediaType.OCI_CONFIG, Digest("sha256", HEX), 1), (layer,))) is None


@pytest.mark.parametrize(
    ("config", "artifact_type", "layers", "kind"),
    [
        (MediaType.OCI_CONFIG, "", [MediaType.OCI_LAYER, MediaType.DOCKER_LAYER_GZIP], None),
        (MediaType.DOCKER_CONFIG, "", [MediaType.DOCKER_LAYER_ZSTD, ""], None),
        (MediaType.OCI_CONFIG, "", [], None),
        ("application/octet-stream", "", [MediaType.DOCKER_LAYER_GZIP], None),
        (MediaType.OCI_CONFIG, "", ["application/vnd.in-toto+json"], "an in-toto attestation"),
        (
            "application/vnd.cncf.helm.config.v1+json",
            "",
            ["application/vnd.cncf.helm.chart.content.v1.tar+gzip"],
            "an artifact with a configuration of type application/vnd.cncf.helm.config.v1+json",
        ),
        ("application/vnd.oci.empty.v1+json", "application/x-thing", [], "an artifact of type application/x-thing"),
        (
            MediaType.OCI_CONFIG,
            "",
            [MediaType.OCI_LAYER, "application/vnd.sylabs.sif.layer.v1.sif"],
            "an artifact whose layer 2 is of type application/vnd.sylabs.sif.layer.v1.sif",
        ),
        (MediaType.OCI_CONFIG, "", ["application/vnd.oci.image.layer.squashfs"], "an artifact whose layer 1 is of"),
    ],
)
def test_c10_artifacts_are_told_from_images(config: str, artifact_type: str, layers: list[str], kind: str) -> None:
    digest = Digest("sha256", HEX)
    found = artifact_kind(
        Manifest(
            "",
            Descriptor(config, digest, 1),
            tuple(Descriptor(layer, digest, 1) for layer in layers),
            artifact_type=artifact_type,
        )
    )
    assert (found or "").startswith(kind or "")
    assert (found is None) == (kind is None)


def test_c9_attestations_are_recognised() -> None:
    digest = Digest("sha256", HEX)
    assert Descriptor("", digest, 1, platform=Platform("unknown", "unknown")).is_attestation
    assert Descriptor("", digest, 1, {"vnd.docker.reference.type": "attestation-manifest"}).is_attestation
    assert not Descriptor("", digest, 1, platform=Platform("linux", "amd64")).is_attestation
    assert not Descriptor("", digest, 1).is_attestation


# --- configurations ---------------------------------------------------------------------------------------------------


def test_a_configuration_is_read() -> None:
    raw = dump(
        {
            "created": "2024-01-01T00:00:00Z",
            "author": "a",
            "architecture": "arm64",
            "variant": "v8",
            "os": "linux",
            "os.version": "6",
            "config": {
                "Env": ["A=b"],
                "Entrypoint": ["/e"],
                "Cmd": None,
                "User": "1:2",
                "WorkingDir": "/w",
                "Labels": {"l": "m"},
                "ExposedPorts": {"80/tcp": {}},
                "Volumes": {"/v": {}},
                "StopSignal": "SIGINT",
                "Healthcheck": {"Test": ["NONE"]},
            },
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{HEX}"]},
            "history": [{"created": "x", "created_by": "y", "author": "z", "comment": "c", "empty_layer": True}],
            "container_config": {"Anything": 1},
        }
    )
    assert parse_config(raw) == ImageConfig(
        platform=Platform("linux", "arm64", "v8", "6"),
        diff_ids=(DiffID("sha256", HEX),),
        created="2024-01-01T00:00:00Z",
        author="a",
        config=RuntimeConfig(
            env=("A=b",),
            entrypoint=("/e",),
            user="1:2",
            working_dir="/w",
            labels={"l": "m"},
            exposed_ports=("80/tcp",),
            volumes=("/v",),
            stop_signal="SIGINT",
        ),
        history=(History("x", "y", "z", "c", empty_layer=True),),
    )


def test_an_old_docker_configuration_is_read() -> None:
    read = parse_config(dump({"config": {"Entrypoint": "/bin/sh", "Labels": None}, "rootfs": None, "history": None}))
    assert read.config.entrypoint == ("/bin/sh",)
    assert not read.platform.is_known


def test_c8_rootfs_must_be_layers_of_the_right_number() -> None:
    config = parse_config(dump({"rootfs": {"type": "layers", "diff_ids": [f"sha256:{HEX}"]}}))
    assert config.rootfs_problem(1) is None
    assert "1 diff IDs but the manifest has 2 layers" in str(config.rootfs_problem(2))
    config = parse_config(dump({"rootfs": {"type": "magic", "diff_ids": []}}))
    assert "'magic'" in str(config.rootfs_problem(0))


# --- fuzzing: never any exception but an OcifsError -------------------------------------------------------------------

_WORDS = (
    "schemaVersion mediaType config layers manifests annotations digest size data platform urls os architecture "
    "rootfs diff_ids type history Env Entrypoint Labels fsLayers subject artifactType empty_layer Volumes"
)
_KEYS = _WORDS.split()
_LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.sampled_from([f"sha256:{HEX}", "blake3:x", *MediaType, "linux", "amd64", 2]),
)
_JSON = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_KEYS) | st.text(), inner, max_size=5),
    max_leaves=20,
)


def try_everything(raw: bytes, told: str | None) -> None:
    try:
        document = parse_document(raw, told)
        if isinstance(document, Manifest):
            artifact_kind(document)
            descriptors = [document.config, *document.layers]
        else:
            descriptors = list(document.manifests)
        for descriptor in descriptors:
            descriptor.layer_problem()
            descriptor.embedded()
    except OcifsError as error:
        assert "\n" not in str(error)
    try:
        config = parse_config(raw)
        config.platform.rank_for(Platform("linux", "amd64"))
        config.rootfs_problem(1)
    except OcifsError as error:
        assert "\n" not in str(error)


@given(_JSON, st.sampled_from([None, "", "x", *MediaType]))
def test_any_json_is_read_or_an_ocifs_error(document: object, told: str | None) -> None:
    try_everything(dump(document), told)


@given(st.binary(max_size=200), st.data())
def test_any_bytes_are_read_or_an_ocifs_error(noise: bytes, data: st.DataObject) -> None:
    raw = dump(manifest(layers=[CONFIG], rootfs={"type": "layers", "diff_ids": [f"sha256:{HEX}"]}))
    start = data.draw(st.integers(0, len(raw)))
    end = data.draw(st.integers(start, len(raw)))
    try_everything(noise, None)
    try_everything(raw[:start] + noise[:4] + raw[end:], None)
