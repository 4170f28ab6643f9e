"""One conformance suite for all sources: the same image in every form, the same answers.

`FORMS` lists the forms; a test that takes ``form`` runs for each. What only one source does is in
``test_sources_forms.py``, what real tools write in ``test_sources_tools.py``.
"""

from __future__ import annotations

import gzip
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from ocifs.errors import DamagedError, NotFoundError, OcifsError, UnsupportedError
from ocifs.reference import Selector, parse
from ocifs.sources import Blob, Source, open_source
from ocifs.sources.blob import BytesBlob
from ocifs.spec import DiffID, Digest, Platform
from tests.support.bolt import containerd_database
from tests.support.layout import (
    OCI_MANIFEST,
    Image,
    archive_directory,
    make_image,
    put_image,
    write_docker_archive,
    write_tar,
)

AMD64 = Platform("linux", "amd64")
LAYERS = [b"first layer ".ljust(3000, b"1"), b"second layer ".ljust(70_000, b"2"), b"third ".ljust(512, b"3")]


def gunzip(path: bytes) -> Blob:
    """Stand in for the image room, which gives random access to compressed archives."""
    with gzip.open(os.fsdecode(path)) as file:
        return BytesBlob(os.fsdecode(path), file.read())


@dataclass
class Form:
    """One way to keep an image: writes it, and says what it can do."""

    name: str
    reference: str
    has_names: bool = True
    has_manifest: bool = True
    config_has_digest: bool = True

    def write(self, directory: Path, image: Image) -> None:
        """Keep ``image`` below ``directory``, without the blobs that ``image.blobs`` no longer has."""
        layout = directory / "layout"
        kind = self.name.partition(" ")[0]
        if kind in {"oci", "oci-archive"}:
            put_image(layout, image, tag="v1")
        if kind == "oci-archive":
            archive_directory(
                directory / "archive.tar",
                layout,
                compression="gzip" if "gzip" in self.name else "plain",
                prefix="./" if "dot" in self.name else "",
            )
        elif kind == "docker-archive":
            self.write_docker(directory / "archive.tar", image)
        elif kind == "dir":
            layout.mkdir()
            (layout / "version").write_text("Directory Transport Version: 1.1\n")
            (layout / "manifest.json").write_bytes(image.manifest_raw)
            for digest, data in image.blobs.items():
                if digest != image.manifest_digest:
                    (layout / digest.partition(":")[2]).write_bytes(data)
        elif kind == "containerd":
            blobs = directory / "containerd/io.containerd.content.v1.content/blobs/sha256"
            blobs.mkdir(parents=True)
            for digest, data in image.blobs.items():
                (blobs / digest.partition(":")[2]).write_bytes(data)
            if "without" not in self.name:
                meta = directory / "containerd/io.containerd.metadata.v1.bolt/meta.db"
                meta.parent.mkdir()
                target = (OCI_MANIFEST, image.manifest_digest, len(image.manifest_raw))
                meta.write_bytes(containerd_database({"default": {"v1": target}, "other": {}}))

    def write_docker(self, path: Path, image: Image) -> None:
        style = self.name.split()[1]
        write_docker_archive(
            path,
            [image],
            names=[["v1"]],
            style=style,
            outer="gzip" if "gzip" in self.name else "plain",
            lower_case="lower" in self.name,
        )
        if image.config_digest not in image.blobs or len(image.blobs) < len({*image.layer_digests}) + 2:
            lost = [
                tar for tar, digest in zip(image.tars, image.layer_digests, strict=True) if digest not in image.blobs
            ]
            drop_members(path, lost)

    def open(self, directory: Path, selector: str = "") -> tuple[Source, Selector]:
        text = self.reference.replace("DIR", os.fspath(directory)) + selector
        reference = parse(text)
        root = os.fsencode(directory / "containerd")
        return open_source(reference, open_archive=gunzip, root=root), reference.selector


def drop_members(path: Path, contents: list[bytes]) -> None:
    """Write an archive again without the members that have one of these contents, compressed or not."""
    unwanted = {*contents, *(gzip.compress(content, mtime=0) for content in contents)}
    kept: list[tuple[str, bytes | tuple[bytes, str]]] = []
    with tarfile.open(path) as archive:
        compression = "gzip" if archive.fileobj.__class__.__module__ == "gzip" else "plain"
        for member in archive:
            file = archive.extractfile(member) if member.isfile() else None
            data = file.read() if file is not None else b""
            if file is None:
                kept.append((member.name, (member.type, member.linkname)))
            elif data not in unwanted:
                kept.append((member.name, data))
    write_tar(path, kept, compression=compression)


FORMS = [
    Form("oci", "oci:DIR/layout"),
    Form("oci by path", "DIR/layout"),
    Form("oci by ocidir", "ocidir://DIR/layout"),
    Form("oci-archive", "oci-archive:DIR/archive.tar"),
    Form("oci-archive dot names", "oci-archive:DIR/archive.tar"),
    Form("oci-archive gzip", "oci-archive:DIR/archive.tar"),
    Form("oci-archive gzip by path", "DIR/archive.tar"),
    Form("docker-archive skopeo", "docker-archive:DIR/archive.tar", has_manifest=False, config_has_digest=False),
    Form("docker-archive skopeo by path", "DIR/archive.tar", has_manifest=False, config_has_digest=False),
    Form("docker-archive legacy", "docker-archive:DIR/archive.tar", has_manifest=False, config_has_digest=False),
    Form("docker-archive hardlink gzip", "docker-archive:DIR/archive.tar", has_manifest=False, config_has_digest=False),
    Form("docker-archive stored lower", "docker-archive:DIR/archive.tar", has_manifest=False, config_has_digest=False),
    Form("dir", "dir:DIR/layout", has_names=False),
    Form("dir by path", "DIR/layout", has_names=False),
    Form("containerd", "containerd:"),
    Form("containerd by path", "DIR/containerd"),
    Form("containerd without meta.db", "containerd:", has_names=False),
]


@pytest.fixture(params=FORMS, ids=lambda form: form.name)
def form(request: pytest.FixtureRequest) -> Form:
    value = request.param
    assert isinstance(value, Form)
    return value


def stored(form: Form, image: Image, number: int) -> bytes:
    """What a form keeps of layer ``number``: the compressed blob, or the tar itself."""
    plain = form.name.startswith("docker-archive") and "stored" not in form.name
    return image.tars[number - 1] if plain else image.layers[number - 1]


def open_files() -> list[str]:
    return sorted(path.name for path in Path("/proc/self/fd").iterdir())


def snapshot(directory: Path) -> list[tuple[str, int, int, int]]:
    """Everything that a writer would change."""
    found = []
    for path in sorted([directory, *directory.rglob("*")]):
        status = path.lstat()
        found.append((str(path), status.st_mtime_ns, status.st_ctime_ns, status.st_size))
    return found


def test_an_image_is_listed_resolved_and_read(form: Form, tmp_path: Path) -> None:
    made = make_image([*LAYERS, LAYERS[0]])
    form.write(tmp_path, made)
    source, selector = form.open(tmp_path)
    with closing(source):
        (offered,) = source.names()
        assert offered.names == (("v1",) if form.has_names else ())
        assert str(offered.digest) == (made.manifest_digest if form.has_manifest else made.config_digest)
        image = source.resolve(selector, AMD64)
        assert image.name == ("v1" if form.has_names else None)
        assert image.artifact is None
        assert image.config is not None
        assert image.config_raw == made.config_raw
        assert str(image.config_digest) == made.config_digest
        assert image.config.platform == AMD64
        if form.has_manifest:
            assert image.manifest_raw == made.manifest_raw
            assert str(image.manifest_digest) == made.manifest_digest
            assert image.manifest is not None
        else:
            assert image.manifest is None
            assert image.manifest_digest is None
        assert [layer.number for layer in image.layers] == [1, 2, 3, 4]
        assert [str(layer.diff_id) for layer in image.layers] == made.diff_ids
        for layer in image.layers:
            expected = stored(form, made, layer.number)
            assert layer.problem is None
            assert layer.size == len(expected)
            if form.has_manifest:
                assert str(layer.digest) == made.layer_digests[layer.number - 1]
            else:
                assert layer.digest is None
            with closing(layer.open()) as blob:
                assert blob.read_at(0, blob.size) == expected
            with closing(layer.open_stored()) as blob:
                assert blob.size == len(expected)


def test_a_blob_is_random_access(form: Form, tmp_path: Path) -> None:
    made = make_image(LAYERS)
    form.write(tmp_path, made)
    source, selector = form.open(tmp_path)
    blob = source.resolve(selector, AMD64).layers[1].open()
    source.close()
    expected = stored(form, made, 2)
    size = len(expected)
    assert os.fspath(tmp_path) in blob.name
    assert blob.size == size
    assert blob.read_at(3, 4) == expected[3:7]
    assert blob.read_at(size - 2, 10) == expected[-2:]
    assert blob.read_at(size, 1) == b""
    assert blob.read_at(2**62, 1) == b""
    assert blob.read_at(0, 2**62) == expected
    assert blob.read_at(5, 0) == b""
    for offset, length in ((-1, 1), (0, -1)):
        with pytest.raises(OcifsError):
            blob.read_at(offset, length)
    place = blob.file_range()
    if place is not None:
        assert os.pread(place.fd, place.size, place.offset) == expected
    assert (place is None) == ("gzip" in form.name)
    with ThreadPoolExecutor(8) as pool:
        pieces = list(pool.map(lambda offset: blob.read_at(offset, 7), range(0, size, 7)))
    assert b"".join(pieces) == expected
    blob.close()
    blob.close()
    source.close()


def test_nothing_is_written(form: Form, tmp_path: Path) -> None:
    made = make_image(LAYERS)
    form.write(tmp_path, made)
    before = snapshot(tmp_path)
    source, selector = form.open(tmp_path)
    with closing(source):
        for layer in source.resolve(selector, AMD64).layers:
            with closing(layer.open()) as blob:
                blob.read_at(0, blob.size)
    assert snapshot(tmp_path) == before


def test_no_file_stays_open(form: Form, tmp_path: Path) -> None:
    form.write(tmp_path, make_image(LAYERS))
    before = open_files()
    source, selector = form.open(tmp_path)
    image = source.resolve(selector, AMD64)
    blobs = [layer.open() for layer in image.layers]
    source.close()
    blobs += [layer.open() for layer in image.layers]
    for blob in blobs:
        blob.close()
    assert open_files() == before


def test_a_digest_selects(form: Form, tmp_path: Path) -> None:
    made = make_image(LAYERS)
    form.write(tmp_path, made)
    digest = made.manifest_digest if form.has_manifest else made.config_digest
    source, selector = form.open(tmp_path, f"@{digest}")
    assert selector.digest == Digest.parse(digest)
    with closing(source):
        assert source.resolve(selector, AMD64).config_raw == made.config_raw
        with pytest.raises(NotFoundError, match="0000000"):
            source.resolve(Selector(digest=Digest("sha256", "0" * 64)), AMD64)


def test_a_number_selects(form: Form, tmp_path: Path) -> None:
    form.write(tmp_path, make_image(LAYERS))
    source, _ = form.open(tmp_path)
    with closing(source):
        assert len(source.resolve(Selector(number=0), AMD64).layers) == 3
        with pytest.raises(NotFoundError, match=r"no (manifest|image) @1: it has 1"):
            source.resolve(Selector(number=1), AMD64)


def test_a_name_selects_and_a_wrong_one_is_told_what_there_is(form: Form, tmp_path: Path) -> None:
    form.write(tmp_path, make_image(LAYERS))
    source, _ = form.open(tmp_path)
    with closing(source):
        if form.has_names:
            assert source.resolve(Selector(name="v1"), AMD64).name == "v1"
        with pytest.raises(NotFoundError, match="v1" if form.has_names else "v2|without a name|by name"):
            source.resolve(Selector(name="v2"), AMD64)


def test_c9_a_single_image_for_another_platform_is_used_with_a_warning(form: Form, tmp_path: Path) -> None:
    form.write(tmp_path, make_image(LAYERS, architecture="s390x"))
    source, selector = form.open(tmp_path)
    with closing(source):
        image = source.resolve(selector, AMD64)
        assert [warned.message for warned in image.warnings if warned.rule == "C9"] == [
            "the image is for linux/s390x; linux/amd64 was asked for"
        ]
        assert not [w for w in source.resolve(selector, Platform("linux", "s390x")).warnings if w.rule == "C9"]


@pytest.mark.parametrize(
    ("rootfs", "words"),
    [({"type": "layers", "diff_ids": []}, "0 diff IDs"), ({"type": "x", "diff_ids": []}, r"rootfs.type 'x'")],
)
def test_c8_a_wrong_rootfs_is_refused_and_under_examination_a_warning(
    form: Form, tmp_path: Path, rootfs: dict[str, object], words: str
) -> None:
    form.write(tmp_path, make_image(LAYERS, config={"rootfs": rootfs}))
    source, selector = form.open(tmp_path)
    with closing(source):
        with pytest.raises(DamagedError, match=words):
            source.resolve(selector, AMD64)
        image = source.resolve(selector, AMD64, examine=True)
        assert [warned.rule for warned in image.warnings if warned.rule] == ["C8"]
        assert [layer.diff_id for layer in image.layers] == [None, None, None]


def test_c5_diff_ids_of_an_unknown_algorithm_are_the_layers_problem(form: Form, tmp_path: Path) -> None:
    diff_ids = [str(DiffID("blake3", "b" * 64))] * 3
    form.write(tmp_path, make_image(LAYERS, config={"rootfs": {"type": "layers", "diff_ids": diff_ids}}))
    source, selector = form.open(tmp_path)
    with closing(source):
        image = source.resolve(selector, AMD64)
        with pytest.raises(UnsupportedError, match="blake3"):
            image.layers[0].open()


def test_a_missing_layer_is_named_when_it_is_used(form: Form, tmp_path: Path) -> None:
    made = make_image(LAYERS)
    del made.blobs[made.layer_digests[1]]
    form.write(tmp_path, made)
    source, selector = form.open(tmp_path)
    with closing(source):
        image = source.resolve(selector, AMD64)
        assert [layer.problem is None for layer in image.layers] == [True, False, True]
        with pytest.raises(NotFoundError, match=os.fspath(tmp_path)) as caught:
            image.layers[1].open()
        assert "layer 2" in str(caught.value)
        if form.has_manifest:
            assert made.layer_digests[1] in str(caught.value)
        with pytest.raises(NotFoundError):
            image.layers[1].open_stored()


def test_a_configuration_that_is_no_json_is_damaged(form: Form, tmp_path: Path) -> None:
    made = make_image(LAYERS)
    made.config_raw = b"x" * len(made.config_raw)
    made.blobs[made.config_digest] = made.config_raw
    form.write(tmp_path, made)
    source, selector = form.open(tmp_path)
    with closing(source):
        words = "another digest" if form.config_has_digest else "not JSON"
        with pytest.raises(DamagedError, match=words):
            source.resolve(selector, AMD64)
        image = source.resolve(selector, AMD64, examine=True)
        assert image.config is None
        assert "C4" in [warned.rule for warned in image.warnings]
        assert [layer.diff_id for layer in image.layers] == [None, None, None]
