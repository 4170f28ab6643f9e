"""Artifacts: manifests that are no root file system, shown as files."""

from __future__ import annotations

import gzip
import hashlib
import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.command import Run, runner
from tests.support.layout import OCI_MANIFEST, add_to_layout, compress, dump, put_blob, sha256
from tests.support.mounting import agent, mounted, run
from tests.support.tarball import entry, tarball

if TYPE_CHECKING:
    from pathlib import Path

TITLE = "org.opencontainers.image.title"
CREATED = "2024-02-29T12:00:00Z"
CREATED_NS = 1_709_208_000 * 10**9
CHART = tarball(entry("app/Chart.yaml", b"name: app\n"), entry("app/templates/web.yaml", b"kind: Pod\n"))
SBOM = dump({"spdxVersion": "SPDX-2.3"})

Blob = tuple[str, bytes, str]
"""Media type, bytes, title."""


def write_artifact(layout: Path, blobs: list[Blob], config: str, config_data: bytes = b"{}", **manifest: Any) -> str:
    """Write a manifest as ORAS, Helm and Flux do; gives its reference."""
    add_to_layout(layout, (), [])
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": {"mediaType": config, "digest": put_blob(layout, config_data), "size": len(config_data)},
        "layers": [
            {
                "mediaType": media_type,
                "digest": put_blob(layout, data),
                "size": len(data),
                **({"annotations": {TITLE: title}} if title else {}),
            }
            for media_type, data, title in blobs
        ],
        "annotations": {"org.opencontainers.image.created": CREATED},
        **manifest,
    }
    raw = dump(document)
    digest = put_blob(layout, raw)
    add_to_layout(layout, (), [{"mediaType": OCI_MANIFEST, "digest": digest, "size": len(raw)}])
    return f"oci:{layout}"


def helm(layout: Path) -> str:
    chart = ("application/vnd.cncf.helm.chart.content.v1.tar+gzip", compress(CHART, "gzip"), "")
    return write_artifact(layout, [chart], "application/vnd.cncf.helm.config.v1+json", b'{"name":"app"}')


def zarf(layout: Path) -> str:
    kind = "application/vnd.zarf.layer.v1.blob"
    blobs = [
        (kind, b"kind: ZarfPackageConfig\n", "zarf.yaml"),
        (kind, compress(tarball(entry("images.txt", b"none\n")), "zstd"), "components/base.tar.zst"),
        (kind, b"abc checksum\n", "checksums.txt"),
        (kind, bytes(700_000) + b"end", "sboms/large.bin"),
    ]
    return write_artifact(layout, blobs, "application/vnd.zarf.config.v1+json")


def flux(layout: Path) -> str:
    blob = ("application/vnd.cncf.flux.content.v1.tar+gzip", compress(CHART, "gzip"), "")
    return write_artifact(layout, [blob], "application/vnd.cncf.flux.config.v1+json")


def sbom(layout: Path) -> str:
    blob = ("application/spdx+json", SBOM, "sbom.spdx.json")
    empty = "application/vnd.oci.empty.v1+json"
    return write_artifact(layout, [blob], empty, artifactType="application/spdx+json")


@pytest.fixture
def ocifs(capfdbinary: pytest.CaptureFixture[bytes]) -> Run:
    return runner(capfdbinary)


def listing(ocifs: Run, *words: str) -> dict[str, tuple[str, int]]:
    """Path → (type, size) of everything in an artifact."""
    done = ocifs("ls", "-R", "--json", *words)
    assert (done.status, done.err) == (0, "")
    found = [json.loads(line) for line in done.out.splitlines()]
    return {one["path"]: (one["type"], one["size"] if one["type"] == "file" else 0) for one in found}


def test_c10_a_chart_is_a_file_and_on_request_a_directory(tmp_path: Path, ocifs: Run) -> None:
    reference = helm(tmp_path / "chart")
    stored = compress(CHART, "gzip")
    name = "/" + sha256(stored).removeprefix("sha256:")
    assert listing(ocifs, reference) == {name: ("file", len(stored))}
    assert ocifs("cat", reference, name).out == stored
    assert listing(ocifs, "--unpack", reference) == {
        name: ("dir", 0),
        f"{name}/app": ("dir", 0),
        f"{name}/app/Chart.yaml": ("file", 10),
        f"{name}/app/templates": ("dir", 0),
        f"{name}/app/templates/web.yaml": ("file", 10),
    }
    assert ocifs("cat", "--unpack", reference, f"{name}/app/templates/web.yaml").out == b"kind: Pod\n"
    # And the file again, from the same cache.
    assert ocifs("cat", reference, name).out == stored


def test_titles_are_paths(tmp_path: Path, ocifs: Run) -> None:
    reference = zarf(tmp_path / "package")
    packed = compress(tarball(entry("images.txt", b"none\n")), "zstd")
    files = {
        "/checksums.txt": ("file", 13),
        "/components": ("dir", 0),
        "/sboms": ("dir", 0),
        "/sboms/large.bin": ("file", 700_003),
        "/zarf.yaml": ("file", 24),
    }
    assert listing(ocifs, reference) == {**files, "/components/base.tar.zst": ("file", len(packed))}
    assert listing(ocifs, "--unpack", reference) == {
        **files,
        "/components/base.tar.zst": ("dir", 0),
        "/components/base.tar.zst/images.txt": ("file", 5),
    }


def test_media_type_digest_and_annotations_are_attributes(tmp_path: Path, ocifs: Run) -> None:
    import base64  # noqa: PLC0415 (of this test only)

    reference = sbom(tmp_path / "sbom")
    (line,) = ocifs("stat", "--json", reference, "/sbom.spdx.json").out.splitlines()
    found = json.loads(line)
    assert {name: base64.b64decode(value).decode() for name, value in found["xattrs"].items()} == {
        "user.ocifs.media_type": "application/spdx+json",
        "user.ocifs.digest": sha256(SBOM),
        f"user.ocifs.annotation.{TITLE}": "sbom.spdx.json",
    }
    assert (found["mode"], found["mtime_ns"], found["layer"]) == ("0644", CREATED_NS, 1)


@pytest.mark.parametrize("title", ["/etc/passwd", "../up", "a//b", "a/./b", "dir/", "x" * 256, "nul\0"])
def test_c10_a_title_that_is_no_path_inside_is_not_used(title: str, tmp_path: Path, ocifs: Run) -> None:
    reference = write_artifact(tmp_path / "odd", [("text/plain", b"1", title)], "text/x")
    hexed = sha256(b"1").removeprefix("sha256:")
    assert ocifs("ls", reference).out.decode() == f"{hexed}\n"
    assert "its title is no path inside" in ocifs("ls", "-v", reference).err


def test_c10_a_title_that_is_taken_is_not_used(tmp_path: Path, ocifs: Run) -> None:
    blobs = [("a/b", b"1", "x"), ("a/b", b"2", "x"), ("a/b", b"3", "x/y"), ("a/b", b"1", ""), ("a/b", b"1", "")]
    reference = write_artifact(tmp_path / "odd", blobs, "text/x")
    one, two, three = (sha256(data).removeprefix("sha256:") for data in (b"1", b"2", b"3"))
    assert sorted(ocifs("ls", reference).out.decode().split()) == sorted(["x", two, three, one, f"{one}-5"])
    assert ocifs("cat", reference, "x", two, three, one).out == b"1231"


def test_c10_no_titles_make_a_blob_vanish(tmp_path: Path, ocifs: Run) -> None:
    one = sha256(b"1").removeprefix("sha256:")
    titles = [one, f"{one}-4", f"{one}-4-1"]
    blobs = [*(("a/b", b"%d" % number, title) for number, title in enumerate(titles, 2)), ("a/b", b"1", "")]
    reference = write_artifact(tmp_path / "odd", blobs, "text/x")
    assert sorted(ocifs("ls", reference).out.decode().split()) == sorted([*titles, f"{one}-4-2"])
    assert ocifs("cat", reference, f"{one}-4-2").out == b"1"


def test_the_same_blob_twice_alone_is_shown_as_each_layer_names_it(tmp_path: Path, ocifs: Run) -> None:
    reference = write_artifact(tmp_path / "same", [("a/b", b"1", "one"), ("a/b", b"1", "two")], "text/x")
    assert ocifs("ls", "--layer", "1", reference).out == b"one\n"
    assert ocifs("cat", "--layer", "2", reference, "two").out == b"1"


def annotated(layout: Path, annotations: dict[str, str]) -> str:
    """Write an artifact of one blob, ``one``, with these annotations."""
    descriptor = {"mediaType": "a/b", "digest": put_blob(layout, b"1"), "size": 1}
    layers = [{**descriptor, "annotations": {TITLE: "one", **annotations}}]
    return write_artifact(layout, [], "text/x", layers=layers)


def test_annotations_that_no_file_system_can_hold_are_no_attributes(tmp_path: Path, ocifs: Run) -> None:
    many = {f"k{number}": "v" * 4000 for number in range(100)}
    cases: list[dict[str, str]] = [
        {"nul\0user.other": "v", "kept": "v"},
        {"long" * 64: "v", "kept": "v"},
        {"kept": "v", **many},
    ]
    for number, case in enumerate(cases):
        reference = annotated(tmp_path / str(number), case)
        (line,) = ocifs("stat", "--json", reference, "one").out.splitlines()
        found = json.loads(line)["xattrs"]
        assert "user.ocifs.annotation.kept" in found
        assert not any("\0" in name or "long" in name for name in found)
        assert len(found) <= 20
        assert sum(len(name) + len(value) * 3 // 4 for name, value in found.items()) < 65_600


def test_blobs_of_artifacts_are_hashed(tmp_path: Path, ocifs: Run) -> None:
    reference = zarf(tmp_path / "package")
    found = [json.loads(line) for line in ocifs("hash", "--json", reference).out.splitlines()]
    hashes = {one["path"]: one["sha256"] for one in found}
    assert hashes["/sboms/large.bin"] == hashlib.sha256(bytes(700_000) + b"end").hexdigest()
    assert hashes["/checksums.txt"] == hashlib.sha256(b"abc checksum\n").hexdigest()


def test_what_is_not_a_tar_stays_a_file_when_unpacked(tmp_path: Path, ocifs: Run) -> None:
    cut = compress(CHART, "gzip")[:-20]
    blobs = [
        ("a/gzip", gzip.compress(b"text", mtime=0), "text.gz"),
        ("a/tar", cut, "cut.tgz"),
        ("a/empty", b"", "empty"),
    ]
    reference = write_artifact(tmp_path / "odd", blobs, "text/x")
    assert listing(ocifs, "--unpack", reference) == {
        "/cut.tgz": ("file", len(cut)),
        "/empty": ("file", 0),
        "/text.gz": ("file", len(blobs[0][1])),
    }
    assert ocifs("cat", "--unpack", reference, "cut.tgz").out == cut


def test_a_blob_that_is_not_what_the_manifest_says_is_refused(tmp_path: Path, ocifs: Run) -> None:
    reference = sbom(tmp_path / "sbom")
    blob = tmp_path / "sbom" / "blobs" / sha256(SBOM).replace(":", "/")
    blob.write_bytes(SBOM[:-1] + b" ")
    for words in (("ls", reference), ("ls", "--unpack", reference)):
        done = ocifs(*words)
        assert done.status == 4
        assert "wrong digest" in done.err
    done = ocifs("cat", "--examine", reference, "sbom.spdx.json")
    assert (done.status, done.out) == (0, SBOM[:-1] + b" ")
    assert "wrong digest" in done.err


def test_a_container_needs_a_root_file_system(tmp_path: Path, ocifs: Run) -> None:
    reference = helm(tmp_path / "chart")
    done = ocifs("bundle", reference, str(tmp_path / "box"))
    assert done.status == 5
    assert "is no root file system but an artifact" in done.err
    assert not (tmp_path / "box").exists()


def test_an_artifact_is_mounted(tmp_path: Path, driver: str) -> None:
    reference = flux(tmp_path / "flux")
    name = sha256(compress(CHART, "gzip")).removeprefix("sha256:")
    with mounted(reference, tmp_path / "mnt", "--unpack", driver=driver, cache=tmp_path / "cache") as mount:
        assert agent("read", mount.at(f"{name}/app/Chart.yaml"), 0, 100) == b"name: app\n".hex()
        said = run(["getfattr", "-d", mount.at(name)]).stdout
        assert 'user.ocifs.media_type="application/vnd.cncf.flux.content.v1.tar+gzip"' in said


def test_an_artifact_that_skopeo_copied_is_the_same(tmp_path: Path, ocifs: Run) -> None:
    reference = helm(tmp_path / "chart")
    run(["skopeo", "copy", "-q", reference, f"oci:{tmp_path}/copied:v1"])
    assert listing(ocifs, f"oci:{tmp_path}/copied:v1") == listing(ocifs, reference)
