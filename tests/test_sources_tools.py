"""Images as real tools write them: skopeo, umoci, buildah, and containerd's store after containerd has stopped.

The oracle is the diff ID: every layer that a source gives, decompressed with the standard library, hashes to it.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import zstandard

from ocifs.errors import NotFoundError, UsageError
from ocifs.reference import parse
from ocifs.sources import ResolvedImage, open_source
from ocifs.spec import Platform
from tests.support.layout import (
    OCI_INDEX,
    REF_NAME,
    add_to_layout,
    archive_directory,
    make_image,
    make_index,
    put_image,
    sha256,
)
from tests.support.tarball import DIR, entry, tarball

if TYPE_CHECKING:
    from collections.abc import Iterator

AMD64 = Platform("linux", "amd64")
BASE = tarball(entry("etc/", type=DIR, mode=0o755), entry("etc/hostname", data=b"one\n" * 1000))
CHANGE = tarball(entry("etc/hostname", data=b"two\n"))


def tool(name: str) -> str:
    """Find a program, or skip the test that needs it."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"needs {name}")
    return path


def run(*words: str | os.PathLike[str]) -> str:
    """Run a program; its output is in the failure if it fails."""
    tool(os.fspath(words[0]))
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout


def resolve(text: str, root: Path | None = None, namespace: str = "default") -> ResolvedImage:
    """Resolve a reference and check every layer against its diff ID."""
    reference = parse(text)
    with closing(open_source(reference, root=os.fsencode(root or ""), namespace=namespace)) as source:
        image = source.resolve(reference.selector, AMD64)
        for layer in image.layers:
            with closing(layer.open()) as blob:
                assert blob.size == layer.size
                data = blob.read_at(0, blob.size)
            if data.startswith(b"\x1f\x8b"):
                data = gzip.decompress(data)
            elif data.startswith(b"\x28\xb5\x2f\xfd"):
                data = zstandard.ZstdDecompressor().decompressobj().decompress(data)
            assert layer.diff_id is not None
            assert hashlib.sha256(data).hexdigest() == layer.diff_id.hex
    return image


def diff_ids(image: ResolvedImage) -> list[str]:
    return [str(layer.diff_id) for layer in image.layers]


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """A layout with one image of three layers, two of them alike."""
    layout = tmp_path / "original"
    put_image(layout, make_image([BASE, CHANGE, BASE]), tag="v1")
    return layout


EXPECTED = ["sha256:" + hashlib.sha256(layer).hexdigest() for layer in (BASE, CHANGE, BASE)]


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("oci:{}/copy:v2", ["oci:{}/copy:v2", "oci:{}/copy", "{}/copy", "ocidir://{}/copy:v2", "oci:{}/copy:@0"]),
        ("oci-archive:{}/copy.tar:v2", ["oci-archive:{}/copy.tar:v2", "oci-archive:{}/copy.tar", "{}/copy.tar"]),
        (
            "docker-archive:{}/copy.tar:example.org/app:v2",
            [
                "docker-archive:{}/copy.tar",
                "docker-archive:{}/copy.tar:example.org/app:v2",
                "docker-archive:{}/copy.tar:@0",
                "{}/copy.tar",
            ],
        ),
        ("docker-archive:{}/copy.tar:app", ["docker-archive:{}/copy.tar:app", "docker-archive:{}/copy.tar:app:latest"]),
        ("docker-archive:{}/copy.tar", ["docker-archive:{}/copy.tar", "{}/copy.tar"]),
        ("dir:{}/copy", ["dir:{}/copy", "{}/copy"]),
    ],
)
def test_what_skopeo_writes_is_read(original: Path, tmp_path: Path, written: str, read: list[str]) -> None:
    run("skopeo", "copy", "--quiet", f"oci:{original}:v1", written.format(tmp_path))
    for text in read:
        assert diff_ids(resolve(text.format(tmp_path))) == EXPECTED


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_what_skopeo_compresses_is_read(original: Path, tmp_path: Path, compression: str) -> None:
    # A copy into dir: recompresses what is not compressed.
    run("skopeo", "copy", "-q", f"oci:{original}:v1", f"docker-archive:{tmp_path}/plain.tar:x")
    words = ("--dest-compress-format", compression, "--dest-compress")
    run("skopeo", "copy", "-q", *words, f"docker-archive:{tmp_path}/plain.tar", f"oci:{tmp_path}/copy:v2")
    image = resolve(f"oci:{tmp_path}/copy:v2")
    assert diff_ids(image) == EXPECTED
    assert {layer.media_type.rpartition("+")[2] for layer in image.layers} == {compression}


def test_skopeo_reads_the_same_digests(original: Path) -> None:
    image = resolve(f"oci:{original}:v1")
    inspected = json.loads(run("skopeo", "inspect", f"oci:{original}:v1"))
    assert inspected["Digest"] == str(image.manifest_digest)
    assert inspected["Layers"] == [str(layer.digest) for layer in image.layers]


def test_all_platforms_in_a_directory_by_skopeo_are_read(tmp_path: Path) -> None:
    layout = tmp_path / "multi"
    arm, amd = make_image([BASE], architecture="arm64"), make_image([CHANGE])
    index = make_index(
        [
            arm.descriptor(platform={"os": "linux", "architecture": "arm64"}),
            amd.descriptor(platform={"os": "linux", "architecture": "amd64"}),
        ]
    )
    add_to_layout(
        layout,
        [*arm.blobs.values(), *amd.blobs.values(), index],
        [{"mediaType": OCI_INDEX, "digest": sha256(index), "size": len(index), "annotations": {REF_NAME: "v1"}}],
    )
    run("skopeo", "copy", "-q", "--all", f"oci:{layout}:v1", f"dir:{tmp_path}/dir")
    run("skopeo", "copy", "-q", "--all", f"oci:{layout}:v1", f"oci-archive:{tmp_path}/multi.tar:v1")
    for text in (f"dir:{tmp_path}/dir", f"{tmp_path}/dir", f"oci-archive:{tmp_path}/multi.tar", f"oci:{layout}"):
        assert diff_ids(resolve(text)) == EXPECTED[1:2]
        assert diff_ids(resolve(f"{text}@{arm.manifest_digest}")) == EXPECTED[:1]


def test_dockers_manifests_by_skopeo_are_read(original: Path, tmp_path: Path) -> None:
    run("skopeo", "copy", "-q", "--format", "v2s2", f"oci:{original}:v1", f"dir:{tmp_path}/copy")
    image = resolve(f"dir:{tmp_path}/copy")
    assert diff_ids(image) == EXPECTED
    assert image.manifest is not None
    assert image.manifest.media_type == "application/vnd.docker.distribution.manifest.v2+json"


def test_several_tags_and_images_by_skopeo_are_chosen_by_name(original: Path, tmp_path: Path) -> None:
    put_image(original, make_image([CHANGE]), tag="other")
    archive = f"docker-archive:{tmp_path}/two.tar"
    for tag in ("v1", "other"):
        run("skopeo", "copy", "-q", f"oci:{original}:{tag}", f"oci:{tmp_path}/two:{tag}")
    run("skopeo", "copy", "-q", "--additional-tag", "app:b", f"oci:{original}:v1", f"{archive}:app:a")
    assert diff_ids(resolve(f"oci:{tmp_path}/two:other")) == EXPECTED[1:2]
    assert diff_ids(resolve(f"oci:{tmp_path}/two:v1")) == EXPECTED
    with pytest.raises(UsageError, match=r"holds 2 images.*v1 sha256:.*other sha256:"):
        resolve(f"oci:{tmp_path}/two")
    for name in ("app:a", "app:b", "docker.io/library/app:b"):
        assert diff_ids(resolve(f"{archive}:{name}")) == EXPECTED
    with pytest.raises(NotFoundError, match=r"it has docker.io/library/app:a, docker.io/library/app:b"):
        resolve(f"{archive}:app:c")


def test_what_umoci_writes_is_read(original: Path, tmp_path: Path) -> None:
    layout = tmp_path / "umoci"
    run("skopeo", "copy", "-q", f"oci:{original}:v1", f"oci:{layout}:v1")
    added = tmp_path / "added"
    added.write_text("added\n")
    run("umoci", "insert", "--image", f"{layout}:v1", "--tag", "v2", added, "/added")
    run("umoci", "new", "--image", f"{layout}:empty")
    image = resolve(f"oci:{layout}:v2")
    assert diff_ids(image)[:3] == EXPECTED
    assert len(image.layers) == 4
    assert len(resolve(f"oci:{layout}:v1").layers) == 3
    assert resolve(f"oci:{layout}:empty").layers == ()


def test_what_buildah_writes_is_read(original: Path, tmp_path: Path) -> None:
    tool("buildah")
    storage = ("--root", f"{tmp_path}/storage", "--runroot", f"{tmp_path}/run", "--storage-driver", "vfs")
    container = run("buildah", *storage, "from", f"oci:{original}:v1").strip()
    added = tmp_path / "added"
    added.write_text("added\n")
    run("buildah", *storage, "add", container, added, "/added")
    for target in ("oci:{}/out:b", "oci-archive:{}/out.tar:b", "docker-archive:{}/docker.tar:b", "dir:{}/dir"):
        run("buildah", *storage, "commit", "-q", container, target.format(tmp_path))
    run("buildah", *storage, "rm", container)
    first = resolve(f"oci:{tmp_path}/out:b")
    assert diff_ids(first)[:3] == EXPECTED
    assert len(first.layers) == 4
    for text in ("oci-archive:{}/out.tar", "docker-archive:{}/docker.tar", "dir:{}/dir", "{}/docker.tar", "{}/out.tar"):
        image = resolve(text.format(tmp_path))
        assert diff_ids(image)[:3] == EXPECTED
        assert len(image.layers) == 4


class Containerd:
    """A containerd of its own: root, state and socket in a temporary directory, no CRI, nothing of the machine's."""

    def __init__(self, directory: Path, socket: Path) -> None:
        self.root = directory / "root"
        self.socket = socket
        config = directory / "config.toml"
        config.write_text(
            f'version = 2\nroot = "{self.root}"\nstate = "{directory / "state"}"\n'
            'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
            f'[grpc]\naddress = "{socket}"\n'
            f'[plugins."io.containerd.internal.v1.opt"]\npath = "{directory / "opt"}"\n'
        )
        self.process = subprocess.Popen(
            [tool("containerd"), "--config", config], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        assert self.process.stderr is not None
        said = []
        for line in self.process.stderr:
            said.append(line)
            if "containerd successfully booted" in line:
                return
        pytest.fail("containerd did not start: " + "".join(said[-5:]))

    def ctr(self, *words: str | os.PathLike[str]) -> str:
        return run("ctr", "--address", self.socket, *words)

    def stop(self) -> None:
        self.process.terminate()
        assert self.process.stderr is not None
        self.process.stderr.read()
        self.process.stderr.close()
        self.process.wait()


@pytest.fixture
def containerd(tmp_path: Path) -> Iterator[Containerd]:
    """Start a private containerd; a test may stop it earlier."""
    if os.geteuid() != 0:
        pytest.skip("containerd needs root")
    tool("ctr")
    with tempfile.TemporaryDirectory(prefix="ctr") as short:  # a socket's path has at most 107 bytes
        started = Containerd(tmp_path, Path(short) / "socket")
        try:
            yield started
        finally:
            if started.process.poll() is None:
                started.stop()


def test_containerds_store_is_read_after_it_has_stopped(original: Path, tmp_path: Path, containerd: Containerd) -> None:
    archive_directory(tmp_path / "original.tar", original)
    run("skopeo", "copy", "-q", f"oci:{original}:v1", f"docker-archive:{tmp_path}/docker.tar:example.org/app:v1")
    root = containerd.root
    containerd.ctr("images", "import", "--no-unpack", "--base-name", "example.org/base", tmp_path / "original.tar")
    containerd.ctr("--namespace", "k8s.io", "images", "import", "--no-unpack", tmp_path / "docker.tar")
    for number in range(300):
        containerd.ctr("images", "tag", "example.org/base:v1", f"example.org/many:{number:04}")
    # What an import leaves behind, an index without a name, goes at a time of containerd's choosing, or now.
    containerd.ctr("images", "tag", "example.org/base:v1", "example.org/gone:v1")
    containerd.ctr("images", "remove", "--sync", "example.org/gone:v1")
    listed = containerd.ctr("images", "list", "--quiet").split()

    # While it runs.
    assert diff_ids(resolve("containerd:example.org/base:v1", root)) == EXPECTED

    containerd.stop()
    before = sorted((path, path.lstat().st_mtime_ns) for path in root.rglob("*"))
    image = resolve("containerd:example.org/base:v1", root)
    assert diff_ids(image) == EXPECTED
    assert diff_ids(resolve(f"containerd:example.org/base:v1@{image.manifest_digest}", root)) == EXPECTED
    assert diff_ids(resolve(f"containerd:@{image.manifest_digest}", root)) == EXPECTED
    assert diff_ids(resolve(f"{root}@{image.manifest_digest}")) == EXPECTED
    with closing(open_source(parse("containerd:"), root=os.fsencode(root))) as source:
        assert sorted(name for offered in source.names() for name in offered.names) == sorted(listed)
        assert len(listed) == 301
    assert diff_ids(resolve("containerd:example.org/app:v1", root, "k8s.io")) == EXPECTED
    with pytest.raises(
        NotFoundError, match=r"has no image 'example.org/app:v1': it has example.org/base:v1, .*281 more"
    ):
        resolve("containerd:example.org/app:v1", root)
    with pytest.raises(NotFoundError, match=r"no namespace 'moby': it has default, k8s.io"):
        resolve("containerd:x", root, "moby")
    assert sorted((path, path.lstat().st_mtime_ns) for path in root.rglob("*")) == before

    (root / "io.containerd.metadata.v1.bolt/meta.db").unlink()
    found = resolve(f"containerd:@{image.manifest_digest}", root)
    assert diff_ids(found) == EXPECTED
    assert "the names of images are not known" in found.warnings[0].message
    with pytest.raises(UsageError, match=str(image.manifest_digest)):
        resolve("containerd:", root)
