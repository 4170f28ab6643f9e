"""From a reference to an open image: what is kept under which key, what is refused, and what is built again."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import random
import struct
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zstandard

from ocifs import image, image_tree, layer_index, overlay
from ocifs.errors import CacheDamagedError, DamagedError, MachineError, OcifsError, UnsupportedError, UsageError
from ocifs.image import ImageOptions, Resolved, open_image, open_layers, resolve
from ocifs.image.indexing import MAX_PASSES, Indexing
from ocifs.rootfs import NotReadableError, RootFS, view
from ocifs.rules import MountPoint
from ocifs.store import Kind, Store
from ocifs.tree import Kind as NodeKind
from tests.support.damage import flip
from tests.support.layout import (
    blob_path,
    compress,
    dump,
    make_image,
    sha256,
    write_docker_archive,
    write_layout,
    write_oci_archive,
)
from tests.support.tarball import CHAR, entry, sparse_pax_1_0, tarball

BASE = tarball(entry("etc/", mode=0o700), entry("etc/a", data=b"one\n"), entry("etc/b", data=b"two\n"))
UPPER = tarball(entry("etc/.wh.a"), entry("etc/c", data=b"three\n" * 500))
TOP = tarball(entry("new", data=b"four\n"))
NOISE_SIZE = 3 << 20
NOISE = random.Random(1).randbytes(NOISE_SIZE)

SEEN_BASE = {"etc": None, "etc/a": b"one\n", "etc/b": b"two\n"}
SEEN_UPPER = {"etc": None, "etc/b": b"two\n", "etc/c": b"three\n" * 500}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "cache") as opened:
        yield opened


class Spy:
    """A `Progress` that remembers what it was told."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def begin(self, layer: int, label: str, size: int) -> None:
        self.events.append(("begin", layer, label, size))

    def advance(self, layer: int, done: int) -> None:
        self.events.append(("advance", layer, done))

    def end(self, layer: int) -> None:
        self.events.append(("end", layer))

    def merging(self, layers: int) -> None:
        self.events.append(("merging", layers))

    def waiting(self, what: str) -> None:
        self.events.append(("waiting", what))

    def built(self) -> list[int]:
        """Layers whose index was built, in order."""
        return sorted(event[1] for event in self.events if event[0] == "begin")


def contents(rootfs: RootFS) -> dict[str, bytes | None]:
    """Path → data; None for whatever is no file."""
    found: dict[str, bytes | None] = {}
    todo = [("", rootfs.root)]
    while todo:
        path, ino = todo.pop()
        for entry_ in rootfs.readdir(ino):
            if entry_.name in (b".", b".."):
                continue
            name = f"{path}{os.fsdecode(entry_.name)}"
            inode = rootfs.inode(entry_.nid)
            found[name] = (
                bytes(rootfs.read_blocking(entry_.nid, 0, inode.size)) if inode.kind is NodeKind.FILE else None
            )
            if inode.kind is NodeKind.DIR:
                todo.append((name + "/", entry_.nid))
    return dict(sorted(found.items()))


def look(store: Store, reference: str, spy: Spy | None = None, **options: Any) -> dict[str, bytes | None]:
    """Open an image and read everything in it."""
    with open_image(reference, store, ImageOptions(**options), spy) as opened:
        return contents(view(opened))


def warned(store: Store, reference: str, **options: Any) -> list[tuple[str, str]]:
    with open_image(reference, store, ImageOptions(**options)) as opened:
        return [(one.rule, one.message) for one in opened.warnings]


def kept(store: Store, kind: Kind) -> list[str]:
    return sorted(one.key for one in store.entries() if one.kind is kind)


def inodes(store: Store, kind: Kind) -> dict[str, int]:
    """Key → inode number: an entry that is built again is another file."""
    directory = store.path / kind.value
    return {name: (directory / name).stat().st_ino for name in sorted(os.listdir(directory))}


def nothing_half_done(store: Store) -> bool:
    return os.listdir(store.path / "tmp") == [] and os.listdir(store.path / "locks") == []


def key(digest: str) -> str:
    return digest.replace(":", "-")


# -- keys ------------------------------------------------------------------------------------------------------------


def test_an_index_is_kept_under_the_blobs_digest(store: Store, tmp_path: Path) -> None:
    digests = write_layout(tmp_path / "image", [BASE, UPPER])
    assert look(store, f"oci:{tmp_path}/image") == SEEN_UPPER
    assert kept(store, Kind.LAYER) == sorted(map(key, digests["layers"]))
    assert kept(store, Kind.REFRAMED) == []
    assert len(kept(store, Kind.TREE)) == 1
    assert nothing_half_done(store)


def sample(stored: bytes) -> str:
    return sha256(stored[:65536] + stored[-65536:]).removeprefix("sha256:")[:32]


def test_a_layer_of_a_docker_archive_is_kept_under_diff_id_compression_size_and_sample(
    store: Store, tmp_path: Path
) -> None:
    made = make_image([BASE])
    stored = made.layers[0]
    diff_id = made.diff_ids[0].removeprefix("sha256:")
    for style in ("skopeo", "stored"):
        write_docker_archive(tmp_path / f"{style}.tar", [made], style=style)
        assert look(store, f"docker-archive:{tmp_path}/{style}.tar") == SEEN_BASE
    assert kept(store, Kind.LAYER) == sorted(
        [
            f"diffid-sha256-{diff_id}-plain-{len(BASE)}-{sample(BASE)}",
            f"diffid-sha256-{diff_id}-gzip-{len(stored)}-{sample(stored)}",
        ]
    )


def test_one_layer_compressed_at_two_times_is_two_blobs(store: Store, tmp_path: Path) -> None:
    """Only the time in the gzip header differs, so the size is the same."""
    layer = tarball(entry("noise", data=NOISE[:200_000]))
    for second in (1, 2):
        made = make_image([layer])
        made.layers[0] = gzip.compress(layer, mtime=second)
        write_docker_archive(tmp_path / "image.tar", [made], style="stored")
        assert look(store, f"docker-archive:{tmp_path}/image.tar") == {"noise": NOISE[:200_000]}
    assert len(kept(store, Kind.LAYER)) == 2


@pytest.mark.parametrize("first", ["archive", "layer"])
def test_an_index_of_an_archive_is_not_one_of_a_layer(store: Store, tmp_path: Path, first: str) -> None:
    """One file of bytes is a compressed archive to one command and a layer to another, which accepts less."""
    write_docker_archive(tmp_path / "archive.tar", [make_image([BASE])], style="stored")
    stored = lzma.compress((tmp_path / "archive.tar").read_bytes())
    (tmp_path / "archive.xz").write_bytes(stored)

    def put(manifest: dict[str, Any]) -> None:
        manifest["layers"][0].update(digest=sha256(stored), size=len(stored))

    write_layout(tmp_path / "image", [(tmp_path / "archive.tar").read_bytes()], change_manifest=put)
    blob_path(tmp_path / "image", sha256(stored)).write_bytes(stored)

    def archive() -> None:
        assert look(store, f"docker-archive:{tmp_path}/archive.xz") == SEEN_BASE

    def layer() -> None:
        with pytest.raises(UnsupportedError, match="is compressed with xz; layers are plain tar, gzip or zstd"):
            look(store, f"oci:{tmp_path}/image")

    for step in (archive, layer) if first == "archive" else (layer, archive):
        step()
    assert key("archive-" + sha256(stored)) in kept(store, Kind.LAYER)
    # Nor where an index of an archive lies under the key of a layer, as it did before there were two kinds of key.
    for directory in ("layers", "reframed"):
        (store.path / directory / key("archive-" + sha256(stored))).rename(store.path / directory / key(sha256(stored)))
    layer()


def test_a_layer_that_two_images_share_is_indexed_once(store: Store, tmp_path: Path) -> None:
    write_layout(tmp_path / "one", [BASE, UPPER])
    write_layout(tmp_path / "two", [BASE, TOP])
    first, second, third = Spy(), Spy(), Spy()
    look(store, f"oci:{tmp_path}/one", first)
    before = inodes(store, Kind.LAYER)
    look(store, f"oci:{tmp_path}/two", second)
    look(store, f"oci:{tmp_path}/one", third)
    assert (first.built(), second.built(), third.built()) == ([1, 2], [2], [])
    assert before.items() < inodes(store, Kind.LAYER).items()
    assert len(kept(store, Kind.LAYER)) == 3


def test_a_layer_that_comes_twice_in_one_image_is_indexed_once(store: Store, tmp_path: Path) -> None:
    write_layout(tmp_path / "image", [TOP, BASE, TOP])
    spy = Spy()
    assert look(store, f"oci:{tmp_path}/image", spy) == {**SEEN_BASE, "new": b"four\n"}
    assert len(spy.built()) == 2
    assert not any(event[0] == "waiting" for event in spy.events)


OPTIONS: dict[str, object] = {
    **dict.fromkeys(["examine", "show_whiteout_devices", "follow_dirlinks", "all_xattrs"], True),
    "layer": 1,
    "mount_points": (MountPoint(b"/proc"),),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_merge_option_makes_a_tree_of_its_own(store: Store, tmp_path: Path, option: str) -> None:
    write_layout(tmp_path / "image", [BASE])
    look(store, f"oci:{tmp_path}/image")
    plain = inodes(store, Kind.TREE)
    value = OPTIONS[option]
    spy = Spy()
    look(store, f"oci:{tmp_path}/image", spy, **{option: value})
    assert ("merging", 1) in spy.events
    assert plain.items() < inodes(store, Kind.TREE).items()
    again = Spy()
    look(store, f"oci:{tmp_path}/image", again, **{option: value})
    assert again.events == []


def test_merge_options_are_those_that_have_a_test_above() -> None:
    assert {field.name for field in msgspec.structs.fields(overlay.MergeOptions)} == {
        *("examine", "show_whiteout_devices", "follow_dirlinks", "all_xattrs", "single_layer", "mount_points")
    }


def test_nothing_else_makes_another_tree(store: Store, tmp_path: Path) -> None:
    write_layout(tmp_path / "image", [BASE, UPPER], config={"author": "somebody"})
    write_layout(tmp_path / "same", [BASE, UPPER], tag="other", config={"author": "somebody else"})
    write_oci_archive(tmp_path / "archive.tar", [BASE, UPPER])
    look(store, f"oci:{tmp_path}/image")
    spy = Spy()
    for reference, options in (
        (f"oci:{tmp_path}/image:latest", {}),
        (f"{tmp_path}/image", {"upto": 2}),
        (f"oci:{tmp_path}/image#2", {}),
        (f"oci:{tmp_path}/same:other", {"namespace": "elsewhere"}),
        (f"oci-archive:{tmp_path}/archive.tar", {}),
    ):
        assert look(store, reference, spy, **options) == SEEN_UPPER
    assert spy.events == []


def test_another_layer_order_is_another_tree(store: Store, tmp_path: Path) -> None:
    write_layout(tmp_path / "one", [BASE, UPPER])
    write_layout(tmp_path / "two", [UPPER, BASE])
    assert "etc/a" not in look(store, f"oci:{tmp_path}/one")
    assert look(store, f"oci:{tmp_path}/two") == {**SEEN_BASE, "etc/c": b"three\n" * 500}


@pytest.mark.parametrize("version", ["image_tree.FORMAT_VERSION", "image.RULES_VERSION"])
def test_other_versions_make_other_trees(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    write_layout(tmp_path / "image", [BASE])
    look(store, f"oci:{tmp_path}/image")
    module, name = version.split(".")
    monkeypatch.setattr({"image_tree": image_tree, "image": image}[module], name, 77)
    spy = Spy()
    assert look(store, f"oci:{tmp_path}/image", spy) == SEEN_BASE
    assert spy.events == [("merging", 1)]
    assert len(kept(store, Kind.TREE)) == 2


def test_a_layer_alone_is_not_the_image_of_that_layer_alone(store: Store, tmp_path: Path) -> None:
    """Layer 2 alone keeps its number, so its tree is another one than that of an image with only this layer."""
    write_layout(tmp_path / "two", [BASE, TOP])
    write_layout(tmp_path / "one", [TOP])
    look(store, f"oci:{tmp_path}/one", layer=1)
    spy = Spy()
    assert look(store, f"oci:{tmp_path}/two", spy, layer=2) == {"new": b"four\n"}
    assert spy.events == [("merging", 1)]


# -- which layers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "options", "expected"),
    [
        ("#1", {}, [1]),
        ("#2", {}, [1, 2]),
        ("", {"upto": 1}, [1]),
        ("#2", {"upto": 1}, [1]),
        ("#1", {"upto": 3}, [1]),
        ("", {"layer": 2}, [2]),
        ("#1", {"layer": 3}, [3]),
        ("", {}, [1, 2, 3]),
    ],
)
def test_which_layers_are_opened(
    store: Store, tmp_path: Path, suffix: str, options: dict[str, Any], expected: list[int]
) -> None:
    write_layout(tmp_path / "image", [BASE, UPPER, TOP])
    spy = Spy()
    with open_image(f"oci:{tmp_path}/image{suffix}", store, ImageOptions(**options), spy) as opened:
        assert [layer.number for layer in opened.layers] == expected
    assert spy.built() == expected


def test_a_layer_alone_shows_its_whiteouts(store: Store, tmp_path: Path) -> None:
    write_layout(tmp_path / "image", [BASE, UPPER])
    assert look(store, f"oci:{tmp_path}/image", layer=2) == {
        "etc": None,
        "etc/.wh.a": b"",
        "etc/c": b"three\n" * 500,
    }


@pytest.mark.parametrize(
    ("suffix", "options", "message"),
    [
        ("", {"layer": 3}, "there is no layer 3: the image has 2, counted from 1"),
        ("", {"layer": 0}, "there is no layer 0: the image has 2, counted from 1"),
        ("", {"layer": -1}, "there is no layer -1: the image has 2, counted from 1"),
        ("", {"upto": 3}, "the image cannot be taken up to layer 3: it has 2, counted from 1"),
        ("", {"upto": 0}, "the image cannot be taken up to layer 0: it has 2, counted from 1"),
        ("#3", {}, "the image cannot be taken up to layer 3: it has 2, counted from 1"),
    ],
)
def test_layers_that_are_not_there_are_said_to_be_so(
    store: Store, tmp_path: Path, suffix: str, options: dict[str, Any], message: str
) -> None:
    write_layout(tmp_path / "image", [BASE, UPPER])
    with pytest.raises(UsageError) as caught:
        open_image(f"oci:{tmp_path}/image{suffix}", store, ImageOptions(**options))
    assert str(caught.value) == message
    assert list(store.entries()) == []


def test_an_image_without_layers_is_an_empty_directory(store: Store, tmp_path: Path) -> None:
    write_layout(tmp_path / "image", [])
    assert look(store, f"oci:{tmp_path}/image") == {}


def test_an_artifact_is_no_root_file_system(store: Store, tmp_path: Path) -> None:
    write_layout(
        tmp_path / "image",
        [BASE],
        manifest_extra={"artifactType": "application/vnd.example.thing"},
        change_manifest=lambda manifest: manifest["config"].update(mediaType="application/vnd.oci.empty.v1+json"),
    )
    with pytest.raises(UnsupportedError) as caught:
        look(store, f"oci:{tmp_path}/image", rootfs_only=True)
    assert str(caught.value).startswith(f"oci:{tmp_path}/image is no root file system but ")
    assert "'ocifs mount' shows its blobs as files" in str(caught.value)
    assert "application/vnd.example.thing" in str(caught.value)
    with pytest.raises(UnsupportedError):
        look(store, f"oci:{tmp_path}/image", examine=True, rootfs_only=True)


# -- what is refused, and examined -----------------------------------------------------------------------------------


def wrong_diff_id(path: Path) -> tuple[str, str]:
    lie = "sha256:" + "0" * 64
    digests = write_layout(path, [BASE], change_config=lambda config: config["rootfs"].update(diff_ids=[lie]))
    name = blob_path(path, digests["layers"][0])
    return f"{name} has the wrong diff ID: expected {lie}, found {sha256(BASE)}", "etc/a"


def wrong_digest(path: Path) -> tuple[str, str]:
    """Another blob of the same size lies under the digest; what is in it is sound."""
    digests = write_layout(path, [BASE], compression="plain")
    name = blob_path(path, digests["layers"][0])
    other = BASE.replace(b"one\n", b"ONE\n")
    name.write_bytes(other)
    return f"{name} has the wrong digest: expected {digests['layers'][0]}, found {sha256(other)}", "etc/a"


def wrong_size(path: Path) -> tuple[str, str]:
    digests = write_layout(path, [BASE], change_manifest=lambda manifest: manifest["layers"][0].update(size=7))
    digest = digests["layers"][0]
    size = blob_path(path, digest).stat().st_size
    return f"{digest} has {size} bytes in OCI layout {path}, its descriptor says 7", "etc/a"


def truncated_gzip(path: Path) -> tuple[str, str]:
    """The blob is what its digest says, but its data ends early."""
    tar = tarball(entry("etc/a", data=b"one\n"), entry("noise", data=NOISE[:300_000]))
    stored = compress(tar, "gzip")[:-100_000]

    def truncate(manifest: dict[str, Any]) -> None:
        manifest["layers"][0].update(digest=sha256(stored), size=len(stored))

    write_layout(path, [tar], change_manifest=truncate)
    name = blob_path(path, sha256(stored))
    name.write_bytes(stored)
    return f"{name}: ", "etc/a"


def broken_tar(path: Path) -> tuple[str, str]:
    """The blob is what its digest says, but a header in it has a bad checksum."""
    write_layout(path, [tarball(entry("etc/a", data=b"one\n"), entry("bad", checksum="bad"))], compression="plain")
    return "layer 1", "etc/a"


FAULTS = [wrong_diff_id, wrong_digest, wrong_size, truncated_gzip, broken_tar]
fault = pytest.mark.parametrize("fault", FAULTS, ids=[one.__name__ for one in FAULTS])


@fault
def test_c4_what_is_wrong_is_refused_and_leaves_nothing(store: Store, tmp_path: Path, fault: Any) -> None:
    message, _ = fault(tmp_path / "image")
    spy = Spy()
    with pytest.raises(DamagedError) as caught:
        look(store, f"oci:{tmp_path}/image", spy)
    assert message in str(caught.value)
    assert [one.kind for one in store.entries() if one.kind is not Kind.LAYER] == []
    assert len(kept(store, Kind.LAYER)) == (fault is broken_tar)  # a broken tar is indexed up to where it breaks
    assert nothing_half_done(store)


@fault
def test_c4_what_is_wrong_is_examined_with_a_warning(store: Store, tmp_path: Path, fault: Any) -> None:
    message, path = fault(tmp_path / "image")
    reference = f"oci:{tmp_path}/image"
    with open_image(reference, store, ImageOptions(examine=True)) as opened:
        assert path in contents_but_damaged(view(opened))
        messages = [one.message for one in opened.warnings]
        rules = {one.rule for one in opened.warnings}
    assert ("D6" in rules) == (fault in (broken_tar, truncated_gzip))
    assert any(message in one for one in messages) or fault is broken_tar, messages
    assert nothing_half_done(store)
    again = Spy()
    with open_image(reference, store, ImageOptions(examine=True), again) as opened:
        assert again.events == []
        assert [one.message for one in opened.warnings] == messages


def contents_but_damaged(rootfs: RootFS) -> list[str]:
    """Every path; files at which the data breaks off are not read."""
    return [os.fsdecode(b"etc/" + one.name) for one in rootfs.readdir(rootfs.resolve(b"etc"))]


@fault
@pytest.mark.parametrize("orders", ["examined first", "refused first", "examined twice"])
def test_c4_whatever_lies_in_the_cache_changes_nothing(store: Store, tmp_path: Path, fault: Any, orders: str) -> None:
    """An index made under examination must not make a later strict opening accept it, nor the other way round."""
    message, path = fault(tmp_path / "image")
    reference = f"oci:{tmp_path}/image"

    def refused() -> None:
        with pytest.raises(DamagedError) as caught:
            open_image(reference, store, ImageOptions()).close()
        assert message in str(caught.value)

    def examined() -> None:
        with open_image(reference, store, ImageOptions(examine=True)) as opened:
            assert path in contents_but_damaged(view(opened))
            assert opened.warnings

    match orders:
        case "examined first":
            steps = [examined, refused, examined, refused]
        case "refused first":
            steps = [refused, examined, refused]
        case _:
            steps = [examined, examined, refused, refused]
    for step in steps:
        step()
    assert nothing_half_done(store)


@pytest.mark.parametrize("size", [NOISE_SIZE, 1 << 45, (1 << 63) - 1])
@pytest.mark.parametrize("compression", ["plain", "gzip", "zstd"])
def test_d6_of_a_layer_that_breaks_off_everything_but_the_last_file_is_shown(
    store: Store, tmp_path: Path, compression: str, size: int
) -> None:
    """Whatever the header of the last file promises. Its name and size are shown, reading it is an error."""
    tar = entry("a", data=b"one\n") + entry("cut", data=NOISE[:1000], size=size)[:-24]
    write_layout(tmp_path / "image", [tar, TOP], compression=compression)
    reference = f"oci:{tmp_path}/image"
    with pytest.raises(DamagedError, match="layer 1 is refused by rule D6 at layer offset "):
        look(store, reference)
    with open_image(reference, store, ImageOptions(examine=True)) as opened:
        assert [(one.rule, one.layer) for one in opened.warnings] == [("D6", 1)]
        rootfs = view(opened)
        ino = rootfs.resolve(b"cut")
        assert rootfs.inode(ino).size == size
        with pytest.raises(NotReadableError, match="no layer holds the data of this file"):
            rootfs.check_readable(ino)
        with pytest.raises(DamagedError):
            rootfs.read_blocking(ino, 0, 1)
        assert rootfs.read_blocking(rootfs.resolve(b"a"), 0, 9) == b"one\n"
        assert rootfs.read_blocking(rootfs.resolve(b"new"), 0, 9) == b"four\n"


def test_d6_of_a_sparse_file_that_breaks_off_nothing_is_made_up(store: Store, tmp_path: Path) -> None:
    tar = sparse_pax_1_0("cut", [(0, NOISE[:512]), (8192, NOISE[:4096])], 1 << 20)[:-1024]
    write_layout(tmp_path / "image", [tar])
    with open_image(f"oci:{tmp_path}/image", store, ImageOptions(examine=True)) as opened:
        rootfs = view(opened)
        with pytest.raises(NotReadableError):
            rootfs.check_readable(rootfs.resolve(b"cut"))


def test_c4_what_another_image_says_wrongly_of_a_sound_layer_is_refused(store: Store, tmp_path: Path) -> None:
    """The index of a sound image is in the cache already when an image lies about the same blob."""
    write_layout(tmp_path / "sound", [BASE])
    message, _ = wrong_diff_id(tmp_path / "lying")
    assert look(store, f"oci:{tmp_path}/sound") == SEEN_BASE
    with pytest.raises(DamagedError) as caught:
        look(store, f"oci:{tmp_path}/lying")
    assert str(caught.value) == message
    assert warned(store, f"oci:{tmp_path}/lying", examine=True) == [("C4", message)]
    assert look(store, f"oci:{tmp_path}/sound") == SEEN_BASE


def test_c4_an_image_that_lied_does_not_spoil_a_sound_one(store: Store, tmp_path: Path) -> None:
    write_layout(tmp_path / "sound", [BASE])
    wrong_diff_id(tmp_path / "lying")
    look(store, f"oci:{tmp_path}/lying", examine=True)
    assert look(store, f"oci:{tmp_path}/sound") == SEEN_BASE
    assert warned(store, f"oci:{tmp_path}/sound", examine=True) == []


def test_c4_an_examined_diff_id_of_another_algorithm_does_not_spoil_a_sound_one(store: Store, tmp_path: Path) -> None:
    """An index holds one diff ID; one taken by SHA-512 must not stand where SHA-256 is looked for."""
    write_layout(tmp_path / "sound", [BASE])
    lie = "sha512:" + "0" * 128
    write_layout(tmp_path / "lying", [BASE], change_config=lambda config: config["rootfs"].update(diff_ids=[lie]))
    look(store, f"oci:{tmp_path}/lying", examine=True)
    assert look(store, f"oci:{tmp_path}/sound") == SEEN_BASE
    with pytest.raises(DamagedError, match="has the wrong diff ID: expected sha512:0"):
        look(store, f"oci:{tmp_path}/lying")


def test_an_index_with_a_diff_id_of_another_algorithm_is_built_again(store: Store, tmp_path: Path) -> None:
    """Under whatever key it came to lie: it is not damage, and 'cache clear' is not the user's to think of."""
    digests = write_layout(tmp_path / "sound", [BASE])
    lie = "sha512:" + "0" * 128
    write_layout(tmp_path / "lying", [BASE], change_config=lambda config: config["rootfs"].update(diff_ids=[lie]))
    look(store, f"oci:{tmp_path}/lying", examine=True)
    [name] = kept(store, Kind.LAYER)
    assert name == key(digests["layers"][0]) + "-sha512"
    (store.path / "layers" / name).rename(store.path / "layers" / key(digests["layers"][0]))
    spy = Spy()
    assert look(store, f"oci:{tmp_path}/sound", spy) == SEEN_BASE
    assert spy.built() == [1]


def test_what_a_file_hashed_to_is_asked_of_one_algorithm_only(store: Store, tmp_path: Path) -> None:
    """Two images examined name one file by digests of two algorithms: wrong by SHA-512, right by SHA-256."""
    digests = write_layout(tmp_path / "image", [BASE], compression="plain")
    lie = "sha512:" + "0" * 128

    def other(manifest: dict[str, Any]) -> None:
        manifest["layers"][0]["digest"] = lie

    write_layout(tmp_path / "lying", [BASE], compression="plain", change_manifest=other)
    path = blob_path(tmp_path / "lying", lie)
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    os.link(blob_path(tmp_path / "image", digests["layers"][0]), path)
    assert [rule for rule, _ in warned(store, f"oci:{tmp_path}/lying", examine=True)] == ["C4"]
    assert warned(store, f"oci:{tmp_path}/image", examine=True) == []


def test_a_file_written_to_while_it_is_indexed_is_not_remembered(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_oci_archive(tmp_path / "image", [BASE], outer="gzip")
    build = layer_index.Build

    def meanwhile(*arguments: Any, **options: Any) -> Any:
        os.utime(tmp_path / "image")  # as writing does
        return build(*arguments, **options)

    monkeypatch.setattr(layer_index, "Build", meanwhile)
    assert look(store, f"oci-archive:{tmp_path}/image") == SEEN_BASE
    assert kept(store, Kind.ARCHIVE) == []
    monkeypatch.undo()
    spy = Spy()
    assert look(store, f"oci-archive:{tmp_path}/image", spy) == SEEN_BASE
    assert spy.built() == [0]
    assert len(kept(store, Kind.ARCHIVE)) == 1


def test_a_blob_of_another_size_is_not_read_through_the_old_index(store: Store, tmp_path: Path) -> None:
    digests = write_layout(tmp_path / "image", [BASE], compression="plain")
    digest, size = digests["layers"][0], len(BASE)
    look(store, f"oci:{tmp_path}/image")

    def longer(manifest: dict[str, Any]) -> None:
        manifest["layers"][0]["size"] = size + 512

    write_layout(tmp_path / "other", [BASE], compression="plain", change_manifest=longer)
    name = blob_path(tmp_path / "other", digest)
    name.write_bytes(BASE + bytes(512))
    with pytest.raises(DamagedError) as caught:
        look(store, f"oci:{tmp_path}/other")
    assert str(caught.value) == f"{name} has {size + 512} bytes, but had {size} when it was indexed"


def test_a_blob_that_changed_since_is_never_read_as_something_else(store: Store, tmp_path: Path) -> None:
    digests = write_layout(tmp_path / "image", [BASE], compression="plain")
    look(store, f"oci:{tmp_path}/image")
    blob_path(tmp_path / "image", digests["layers"][0]).write_bytes(BASE.replace(b"one\n", b"ONE\n"))
    with pytest.raises(DamagedError) as caught:
        look(store, f"oci:{tmp_path}/image")
    assert str(caught.value) == (
        f"blob {digests['layers'][0]} cannot be read in span 0 ({len(BASE)} bytes at blob_offset 0): "
        "its bytes have changed since the index was built"
    )


def test_a_layer_with_neither_digest_nor_diff_id_needs_examination(store: Store, tmp_path: Path) -> None:
    def forget(config: dict[str, Any]) -> None:
        config["rootfs"]["diff_ids"] = ["blake3:" + "0" * 64]

    write_docker_archive(tmp_path / "image.tar", [make_image([BASE], change_config=forget)])
    reference = f"docker-archive:{tmp_path}/image.tar"
    with pytest.raises(OcifsError):
        look(store, reference)
    assert look(store, reference, examine=True) == SEEN_BASE
    assert kept(store, Kind.LAYER) == [key(sha256(BASE))]
    spy = Spy()
    assert look(store, reference, spy, examine=True) == SEEN_BASE
    assert spy.events == []


def test_examined_layers_of_a_compressed_archive_are_not_mistaken_for_those_of_its_next_version(
    store: Store, tmp_path: Path
) -> None:
    """Same path, same member, same size, other bytes; both have a wrong diff ID."""
    for text in (b"old\n", b"new\n"):
        lie = "sha256:" + "7" * 64
        made = make_image([tarball(entry("version", data=text))])
        made.diff_ids[0] = lie  # the member's name
        made.config["rootfs"]["diff_ids"] = [lie]
        made.config_raw = dump(made.config)
        write_docker_archive(tmp_path / "image.tar.gz", [made], outer="gzip")
        assert look(store, f"docker-archive:{tmp_path}/image.tar.gz", examine=True) == {"version": text}
    spy = Spy()
    look(store, f"docker-archive:{tmp_path}/image.tar.gz", spy, examine=True)
    assert spy.events == []


# -- built again -----------------------------------------------------------------------------------------------------


def test_an_evicted_reframed_copy_is_made_again(store: Store, tmp_path: Path) -> None:
    tar = tarball(entry("zeros", data=bytes(20 << 20)))  # as one frame larger than a span may be
    digests = write_layout(tmp_path / "image", [tar], compression="zstd")
    reference = f"oci:{tmp_path}/image"
    assert look(store, reference) == {"zeros": bytes(20 << 20)}
    assert kept(store, Kind.REFRAMED) == [key(digests["layers"][0])]
    copy = store.path / "reframed" / key(digests["layers"][0])
    size = copy.stat().st_size
    spy = Spy()
    look(store, reference, spy)
    assert spy.events == []
    for other in (None, size - 1, size + 1):
        if other is None:
            copy.unlink()
        else:
            os.truncate(copy, other)
        spy = Spy()
        assert look(store, reference, spy) == {"zeros": bytes(20 << 20)}
        assert spy.built() == [1]
        assert copy.stat().st_size == size


def test_a_copy_in_use_outlives_its_eviction(store: Store, tmp_path: Path) -> None:
    write_layout(tmp_path / "image", [tarball(entry("zeros", data=bytes(20 << 20)))], compression="zstd")
    with open_image(f"oci:{tmp_path}/image", store, ImageOptions()) as opened:
        assert store.clear().kept_in_use == 3  # index, copy, tree
        for name in os.listdir(store.path / "reframed"):
            (store.path / "reframed" / name).unlink()
        assert contents(view(opened)) == {"zeros": bytes(20 << 20)}


def _stale_index(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[8:12] = struct.pack("<I", layer_index.FORMAT_VERSION + 1)
    path.write_bytes(data)


def _stale_tree(path: Path) -> None:
    data = bytearray(path.read_bytes())
    at = data.rindex(struct.pack("<I", image_tree.FORMAT_VERSION), len(data) - 24)
    data[at : at + 4] = struct.pack("<I", image_tree.FORMAT_VERSION + 1)
    path.write_bytes(data)


def _damaged_head(path: Path) -> None:
    """In the header of an index (bytes 0 to 247), in the superblock of a tree (bytes 1024 to 1151)."""
    data = bytearray(path.read_bytes())
    data[100 if path.parent.name == "layers" else 1024 + 20] ^= 0xFF
    path.write_bytes(data)


def _damaged_tail(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 0xFF
    path.write_bytes(data)


def _short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _empty(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.parametrize(
    ("kind", "spoil"),
    [
        (Kind.LAYER, _stale_index),
        (Kind.LAYER, _damaged_head),
        (Kind.LAYER, _short),
        (Kind.LAYER, _empty),
        (Kind.TREE, _stale_tree),
        (Kind.TREE, _damaged_head),
        (Kind.TREE, _damaged_tail),
        (Kind.TREE, _short),
        (Kind.TREE, _empty),
    ],
)
def test_a_stale_or_damaged_entry_is_built_again_without_a_word(
    store: Store, tmp_path: Path, kind: Kind, spoil: Any
) -> None:
    write_layout(tmp_path / "image", [BASE, UPPER])
    reference = f"oci:{tmp_path}/image"
    look(store, reference)
    before = inodes(store, kind)
    [victim, *others] = before
    os.link(store.path / kind.value / victim, tmp_path / "held")  # so that its inode number is not used again
    spoil(store.path / kind.value / victim)
    spy = Spy()
    assert look(store, reference, spy) == SEEN_UPPER
    after = inodes(store, kind)
    assert after.keys() == before.keys()
    assert after[victim] != before[victim]
    assert all(after[other] == before[other] for other in others)
    assert len(spy.built()) == (kind is Kind.LAYER)
    assert (("merging", 2) in spy.events) == (kind is Kind.TREE)


def _section(path: Path, number: int) -> int:
    """Where a section of an index begins: 0 META, 1 NOTICES, 2 FRAMES, 3 SPANS."""
    return int(struct.unpack_from("<Q", path.read_bytes(), 24 + 48 * number)[0])


@pytest.mark.parametrize("where", ["entry frame", "table of frames", "notices"])
def test_an_index_found_damaged_while_layers_are_merged_is_built_again_at_once(
    store: Store, tmp_path: Path, where: str
) -> None:
    digests = write_layout(tmp_path / "image", [BASE, UPPER])
    look(store, f"oci:{tmp_path}/image")
    store.clear()
    for layer in open_layers(resolve(f"oci:{tmp_path}/image", ImageOptions(), store), store, ImageOptions()):
        layer.close()
    path = store.path / "layers" / key(digests["layers"][1])
    flip(path, {"entry frame": 248, "table of frames": _section(path, 2), "notices": _section(path, 1)}[where])
    spy = Spy()
    before = open_files()
    assert look(store, f"oci:{tmp_path}/image", spy) == SEEN_UPPER
    assert spy.built() == [2]
    assert open_files() == before
    assert nothing_half_done(store)


def test_what_is_damaged_again_and_again_is_an_error(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_layout(tmp_path / "image", [BASE])

    def merge(*_: object) -> None:
        raise CacheDamagedError("still bad")

    monkeypatch.setattr(overlay, "merge", merge)
    with pytest.raises(CacheDamagedError, match="still bad"):
        look(store, f"oci:{tmp_path}/image")


@pytest.mark.parametrize("what", ["window", "spans", "copy"])
def test_what_is_found_damaged_while_it_is_served_is_an_error_and_built_again_next_time(
    store: Store, tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    text = bytes(random.Random(2).choices(b"ocifs \n", k=6 << 20))  # which refers to what came before
    tar = tarball(entry("text", data=text), entry("zeros", data=bytes(20 << 20)))
    write_layout(tmp_path / "image", [tar], compression="zstd" if what == "copy" else "gzip")
    reference = f"oci:{tmp_path}/image"
    seen = look(store, reference)
    kind = Kind.REFRAMED if what == "copy" else Kind.LAYER
    [victim] = kept(store, kind)
    path = store.path / kind.value / victim
    os.link(path, tmp_path / "held")
    with open_image(reference, store, ImageOptions()) as opened:
        span = opened.layers[0].index.spans[1]
    assert (span.window_size > 0) == (what != "copy")
    at = {"window": span.window_offset, "copy": span.blob_offset}.get(what) or _section(path, 3)
    flip(path, at)
    with open_image(reference, store, ImageOptions()) as opened, pytest.raises(CacheDamagedError):
        contents(view(opened))
    assert not path.exists()
    assert ("it is built again when the layer is opened next" in caplog.text) == (what != "spans")
    spy = Spy()
    assert look(store, reference, spy) == seen
    assert spy.built() == [1]
    assert path.stat().st_ino != (tmp_path / "held").stat().st_ino


def test_a_tree_found_damaged_while_it_is_served_is_an_error_and_built_again_next_time(
    store: Store, tmp_path: Path
) -> None:
    names = [f"{number:04}" + "x" * 200 for number in range(2000)]
    write_layout(tmp_path / "image", [tarball(*(entry(name) for name in names))])
    reference = f"oci:{tmp_path}/image"
    look(store, reference)
    [path] = (store.path / "trees").iterdir()
    with open_image(reference, store, ImageOptions()) as opened:
        flip(path, opened.tree.image_size // 2)  # not in the blocks that opening reads
        with pytest.raises(CacheDamagedError, match=r"^the image tree .* is damaged: block "):
            opened.tree.read_range(0, opened.tree.image_size)
    assert not path.exists()
    spy = Spy()
    assert list(look(store, reference, spy)) == names
    assert spy.events == [("merging", 1)]


def test_a_damaged_blob_is_not_taken_for_a_damaged_cache(store: Store, tmp_path: Path) -> None:
    digests = write_layout(tmp_path / "image", [BASE])
    look(store, f"oci:{tmp_path}/image")
    before = inodes(store, Kind.LAYER)
    flip(blob_path(tmp_path / "image", digests["layers"][0]), 50)
    with pytest.raises(DamagedError, match="its bytes have changed since the index was built") as caught:
        look(store, f"oci:{tmp_path}/image")
    assert not isinstance(caught.value, CacheDamagedError)
    assert inodes(store, Kind.LAYER) == before


# -- compressed archives ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outer", ["gzip", "xz", "zstd"])
@pytest.mark.parametrize("form", ["oci-archive", "docker-archive"])
def test_a_compressed_archive_is_read_once_and_then_known(store: Store, tmp_path: Path, outer: str, form: str) -> None:
    path = tmp_path / "image"
    reference = f"{form}:{path}"

    def write(*layers: bytes) -> None:
        if form == "oci-archive":
            write_oci_archive(path, layers, outer=outer)
        else:
            write_docker_archive(path, [make_image(layers)], outer=outer)

    write(BASE, UPPER)
    first, second, third, fourth = Spy(), Spy(), Spy(), Spy()
    assert look(store, reference, first) == SEEN_UPPER
    assert first.built() == [0, 1, 2]
    assert first.events[0] == ("begin", 0, str(path), path.stat().st_size)
    assert look(store, reference, second) == SEEN_UPPER
    assert second.events == []
    os.utime(path)  # another mtime: it may be another file, so it is read; but it turns out to be the same
    entries = inodes(store, Kind.TREE)
    assert look(store, reference, third) == SEEN_UPPER
    assert third.built() == [0]
    assert inodes(store, Kind.TREE) == entries
    if form == "oci-archive":
        (tmp_path / "image.layout" / "index.json").unlink()
    write(BASE, TOP)
    assert look(store, reference, fourth) == {**SEEN_BASE, "new": b"four\n"}
    assert fourth.built() == [0, 2]
    assert nothing_half_done(store)


def test_an_archive_changed_in_place_with_its_old_size_and_mtime_is_read_again(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "image"
    texts = (b"old\n", b"new\n")
    for text in texts:
        write_oci_archive(tmp_path / os.fsdecode(text[:3]), [tarball(entry("version", data=text))], outer="zstd")
    old, new = ((tmp_path / os.fsdecode(text[:3])).read_bytes() for text in texts)
    size = max(len(old), len(new)) + 8
    padded = [
        data + struct.pack("<II", 0x184D2A50, size - len(data) - 8) + bytes(size - len(data) - 8) for data in (old, new)
    ]
    for text, data in zip(texts, padded, strict=True):
        with path.open("r+b" if path.exists() else "wb") as file:
            file.write(data)
        os.utime(path, ns=(1, 1))
        assert look(store, f"oci-archive:{path}") == {"version": text}


def test_a_compressed_archive_whose_index_was_evicted_is_read_again(store: Store, tmp_path: Path) -> None:
    write_oci_archive(tmp_path / "image", [BASE], outer="gzip")
    look(store, f"oci-archive:{tmp_path}/image")
    for name in os.listdir(store.path / "layers"):
        (store.path / "layers" / name).unlink()
    spy = Spy()
    assert look(store, f"oci-archive:{tmp_path}/image", spy) == SEEN_BASE
    assert spy.built() == [0, 1]


def test_what_is_remembered_of_an_archive_may_be_damaged(store: Store, tmp_path: Path) -> None:
    write_oci_archive(tmp_path / "image", [BASE], outer="gzip")
    look(store, f"oci-archive:{tmp_path}/image")
    [name] = os.listdir(store.path / "archives")
    none = b'{"digest": "sha256:%s"}' % (b"0" * 64)
    for rubbish in (b"", b"{", b'{"digest": 5}', b'{"key": "x"}', b"\xff\xfe", b'{"digest": "sha256:x"}', none):
        (store.path / "archives" / name).write_bytes(rubbish)
        assert look(store, f"oci-archive:{tmp_path}/image") == SEEN_BASE


@pytest.mark.parametrize("cut", [gzip.compress, lzma.compress, zstandard.compress], ids=["gzip", "xz", "zstd"])
def test_a_broken_compressed_archive_is_refused_and_leaves_nothing(store: Store, tmp_path: Path, cut: Any) -> None:
    (tmp_path / "image").write_bytes(cut(tarball(entry("oci-layout", data=NOISE[:100_000])))[:-5000])
    spy = Spy()
    with pytest.raises(DamagedError):
        look(store, f"oci-archive:{tmp_path}/image", spy)
    assert spy.events[-1] == ("end", 0)
    assert list(store.entries()) == []
    assert nothing_half_done(store)


def test_without_a_cache_a_compressed_archive_is_unsupported(tmp_path: Path) -> None:
    write_oci_archive(tmp_path / "image", [BASE], outer="gzip")
    with pytest.raises(UnsupportedError) as caught:
        resolve(f"oci-archive:{tmp_path}/image", ImageOptions(), None)
    assert str(caught.value) == f"{tmp_path}/image is a compressed archive, which cannot be read without a cache"


# -- progress --------------------------------------------------------------------------------------------------------


def test_progress_begins_advances_and_ends_each_layer(store: Store, tmp_path: Path) -> None:
    digests = write_layout(tmp_path / "image", [tarball(entry("noise", data=NOISE)), UPPER, TOP])
    spy = Spy()
    look(store, f"oci:{tmp_path}/image", spy)
    for number, digest in enumerate(digests["layers"], 1):
        path = blob_path(tmp_path / "image", digest)
        size = path.stat().st_size
        events = [
            event for event in spy.events if event[:2] in {(what, number) for what in ("begin", "advance", "end")}
        ]
        assert events[0] == ("begin", number, str(path), size)
        assert events[-1] == ("end", number)
        done = [event[2] for event in events[1:-1]]
        assert done == sorted(done)
        assert all(0 <= one <= size for one in done)
        assert {event[0] for event in events[1:-1]} == {"advance"}
    assert spy.events[-1] == ("merging", 3)


def test_layers_are_indexed_at_once_the_largest_first(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    write_layout(
        tmp_path / "image", [BASE, tarball(entry("noise", data=NOISE)), tarball(entry("n", data=NOISE[:9999]))]
    )
    spy = Spy()
    look(store, f"oci:{tmp_path}/image", spy)
    order = [event[:2] for event in spy.events if event[0] in ("begin", "end")]
    assert order[:2] == [("begin", 2), ("begin", 3)]
    assert order[2][0] == "end"
    assert ("begin", 1) in order[3:]  # both of the others may have ended at the same moment


def test_progress_ends_what_failed_and_what_was_stopped_by_it(store: Store, tmp_path: Path) -> None:
    write_layout(
        tmp_path / "image",
        [BASE, UPPER, TOP],
        change_config=lambda config: config["rootfs"].update(diff_ids=["sha256:" + "0" * 64] * 3),
    )
    spy = Spy()
    with pytest.raises(DamagedError, match="has the wrong diff ID"):
        look(store, f"oci:{tmp_path}/image", spy)
    begun = [event[1] for event in spy.events if event[0] == "begin"]
    assert begun
    assert sorted(event[1] for event in spy.events if event[0] == "end") == sorted(begun)
    assert nothing_half_done(store)


# -- several processes -----------------------------------------------------------------------------------------------


def test_while_another_process_has_a_layer_the_others_are_built_and_no_lock_is_held(
    store: Store, tmp_path: Path
) -> None:
    """So two processes that want the same layers in different order cannot wait for each other."""
    digests = write_layout(tmp_path / "image", [BASE, UPPER])
    first, second = map(key, digests["layers"])
    with Store(store.path) as other:
        theirs = other.try_lock(Kind.LAYER, first)
        assert theirs is not None
        release = theirs.release

        class Waiting(Spy):
            def waiting(self, what: str) -> None:
                super().waiting(what)
                assert kept(other, Kind.LAYER) == [second]
                ours = other.try_lock(Kind.LAYER, second)
                assert ours is not None, "a lock is held while another is waited for"
                ours.release()
                release()  # without having built it

        spy = Waiting()
        assert look(store, f"oci:{tmp_path}/image", spy) == SEEN_UPPER
    waits = [event for event in spy.events if event[0] == "waiting"]
    assert waits == [("waiting", "layer 1")]
    assert spy.events.index(("end", 2)) < spy.events.index(waits[0])
    assert spy.built() == [1, 2]


def test_what_another_process_finished_while_we_asked_is_not_built_again(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between our first look and our lock the other one published: seen under the lock, and nothing is locked after."""
    write_layout(tmp_path / "image", [BASE])
    wrong_diff_id(tmp_path / "lying")

    def try_lock(kind: Kind, key: str) -> Any:
        with Store(store.path) as other:
            look(other, f"oci:{tmp_path}/image")
        return Store.try_lock(store, kind, key)

    monkeypatch.setattr(store, "try_lock", try_lock)
    spy = Spy()
    resolved = resolve(f"oci:{tmp_path}/image", ImageOptions(), store)
    for layer in open_layers(resolved, store, ImageOptions(), spy):
        layer.close()
    assert spy.events == []
    assert nothing_half_done(store)
    for one in list(store.entries()):
        store.discard(one.kind, one.key)
    with pytest.raises(DamagedError, match="has the wrong diff ID"):
        look(store, f"oci:{tmp_path}/lying", spy)
    assert nothing_half_done(store), "the lock must not survive the refusal"


OPEN = textwrap.dedent("""
    import json, sys
    from pathlib import Path
    from ocifs.errors import OcifsError
    from ocifs.image import ImageOptions, open_image
    from ocifs.store import Store
    from tests.test_image import Spy, contents
    from ocifs.rootfs import view

    cache, reference = sys.argv[1:]
    spy = Spy()
    with Store(Path(cache)) as store:
        print("ready", flush=True)
        sys.stdin.readline()
        with open_image(reference, store, ImageOptions(), spy) as image:
            names = sorted(contents(view(image)))
    print(json.dumps({"built": spy.built(), "names": names, "merged": ("merging", 2) in spy.events}))
""")


def at_once(cache: Path, *references: str) -> list[dict[str, Any]]:
    """Open images in processes of their own that start as nearly together as can be."""
    children = [
        subprocess.Popen(
            [sys.executable, "-c", OPEN, str(cache), reference],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        for reference in references
    ]
    try:
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
        for child in children:
            assert child.stdin is not None
            child.stdin.write("go\n")
            child.stdin.flush()
        told = [child.communicate(timeout=120)[0] for child in children]
        assert [child.returncode for child in children] == [0] * len(children)
        return [json.loads(one) for one in told]
    finally:
        for child in children:
            child.kill()
            child.communicate()


def test_processes_at_once_index_each_layer_once(tmp_path: Path) -> None:
    write_layout(tmp_path / "image", [tarball(entry("noise", data=NOISE)), BASE])
    seen = at_once(tmp_path / "cache", *[f"oci:{tmp_path}/image"] * 3)
    assert [one["names"] for one in seen] == [["etc", "etc/a", "etc/b", "noise"]] * 3
    assert sorted(number for one in seen for number in one["built"]) == [1, 2]
    assert sum(one["merged"] for one in seen) == 1
    with Store(tmp_path / "cache") as store:
        assert nothing_half_done(store)


def test_processes_that_share_layers_in_different_order_do_not_wait_for_each_other_for_ever(tmp_path: Path) -> None:
    one, two = (tarball(entry(name, data=NOISE)) for name in ("one", "two"))
    write_layout(tmp_path / "there", [one, two])
    write_layout(tmp_path / "back", [two, one])
    seen = at_once(tmp_path / "cache", f"oci:{tmp_path}/there", f"oci:{tmp_path}/back")
    assert [each["names"] for each in seen] == [["one", "two"]] * 2
    assert sum(len(each["built"]) for each in seen) == 2


# -- the machine -----------------------------------------------------------------------------------------------------


def test_a_disk_that_is_full_when_the_tree_is_written(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_layout(tmp_path / "image", [BASE])

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(image_tree, "write", full)
    with pytest.raises(MachineError) as caught:
        look(store, f"oci:{tmp_path}/image")
    assert str(caught.value) == (
        f"cannot write the image tree into the cache directory {store.path}: No space left on device"
    )
    assert kept(store, Kind.TREE) == []
    assert nothing_half_done(store)
    monkeypatch.undo()
    assert look(store, f"oci:{tmp_path}/image") == SEEN_BASE


MANY = textwrap.dedent("""
    import resource, sys
    from pathlib import Path
    from ocifs.errors import MachineError
    from ocifs.image import ImageOptions, open_image
    from ocifs.rootfs import view
    from ocifs.store import Store
    from tests.test_image import contents

    cache, reference, hard = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, int(hard)))
    with Store(Path(cache)) as store:
        for _ in range(2):
            try:
                with open_image(reference, store, ImageOptions()) as image:
                    print(len(contents(view(image))))
            except MachineError as error:
                print(error)
""")


@pytest.mark.parametrize("hard", [4096, 200])
def test_an_image_may_have_more_layers_than_files_may_usually_be_open(tmp_path: Path, hard: int) -> None:
    """Three descriptors a layer: the soft limit is raised as far as the hard one allows; what does not fit is said."""
    layers = [tarball(entry(f"file{number}", data=b"%d" % number)) for number in range(300)]
    write_layout(tmp_path / "image", layers, compression="plain")
    command = [sys.executable, "-c", MANY, str(tmp_path / "cache"), f"oci:{tmp_path}/image", str(hard)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert done.stderr == ""
    if hard == 200:
        assert all("Too many open files" in line for line in done.stdout.splitlines())
        assert len(done.stdout.splitlines()) == 2
    else:
        assert done.stdout == "300\n300\n"


def test_passes_at_once_are_bounded_however_many_cpus_there_are(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_layout(tmp_path / "image", [tarball(entry(f"file{number}")) for number in range(12)])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    at_once: list[int] = []
    step = Indexing._step

    def counted(self: Indexing, running: list[Any]) -> None:
        at_once.append(len(running))
        step(self, running)

    monkeypatch.setattr(Indexing, "_step", counted)
    assert len(look(store, f"oci:{tmp_path}/image")) == 12
    assert max(at_once) == MAX_PASSES == 4


def test_a_cache_that_grew_too_large_is_made_smaller_once_an_image_is_open(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_layout(tmp_path / "one", [BASE])
    write_layout(tmp_path / "two", [UPPER])
    look(store, f"oci:{tmp_path}/one")
    monkeypatch.setenv("OCIFS_CACHE_SIZE", "0")
    spy = Spy()
    with open_image(f"oci:{tmp_path}/two", store, ImageOptions(), spy) as opened:
        assert [one.in_use for one in store.entries()] == [True, True]
        assert contents(view(opened))
    assert look(store, f"oci:{tmp_path}/two", Spy()) == {"etc": None, "etc/c": b"three\n" * 500}


FULL = textwrap.dedent("""
    import os, subprocess, sys
    from pathlib import Path
    from ocifs.errors import MachineError
    from ocifs.image import ImageOptions, open_image
    from ocifs.store import Store

    cache, reference = sys.argv[1:]
    os.mkdir(cache, 0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k,mode=700", "tmpfs", cache], check=True)
    with Store(Path(cache)) as store:
        try:
            open_image(reference, store, ImageOptions())
        except MachineError as error:
            print(error)
        print(os.listdir(store.path / "tmp"), os.listdir(store.path / "locks"), list(store.entries()))
""")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_disk_that_is_full_while_a_layer_is_indexed(tmp_path: Path) -> None:
    tar = tarball(entry("noise", data=NOISE), entry("zeros", data=bytes(16 << 20)))
    digests = write_layout(tmp_path / "image", [tar], compression="zstd")
    command = ["unshare", "--mount", sys.executable, "-c", FULL, str(tmp_path / "small"), f"oci:{tmp_path}/image"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert done.stdout.splitlines() == [
        (
            f"the disk is full while indexing {blob_path(tmp_path / 'image', digests['layers'][0])}; free some space, "
            "run 'ocifs cache gc', or choose another place with --cache-dir"
        ),
        "[] [] []",
    ]


# -- closing ---------------------------------------------------------------------------------------------------------


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_closing_an_image_closes_every_file(store: Store, tmp_path: Path) -> None:
    write_layout(tmp_path / "image", [BASE, UPPER])
    write_oci_archive(tmp_path / "archive", [BASE, UPPER], outer="gzip")
    before = open_files()
    for reference in (f"oci:{tmp_path}/image", f"oci-archive:{tmp_path}/archive"):
        for _ in range(2):
            look(store, reference)
            assert open_files() == before


@fault
def test_a_refusal_closes_every_file(store: Store, tmp_path: Path, fault: Any) -> None:
    fault(tmp_path / "image")
    before = open_files()
    for examine in (False, True, False):
        try:
            open_image(f"oci:{tmp_path}/image", store, ImageOptions(examine=examine)).close()
        except DamagedError:
            assert not examine
        assert open_files() == before


def test_a_tree_that_cannot_be_used_even_when_fresh_closes_its_file(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_layout(tmp_path / "image", [BASE])

    def refuse(*_: object, **__: object) -> None:
        raise DamagedError("never good")

    monkeypatch.setattr("ocifs.image.ImageTree.open", refuse)
    before = open_files()
    with pytest.raises(DamagedError, match="never good"):
        open_image(f"oci:{tmp_path}/image", store, ImageOptions())
    assert open_files() == before


def test_resolving_reads_no_layer(store: Store, tmp_path: Path) -> None:
    digests = write_layout(tmp_path / "image", [BASE, UPPER])
    for digest in digests["layers"]:
        blob_path(tmp_path / "image", digest).unlink()
    resolved: Resolved = resolve(f"oci:{tmp_path}/image", ImageOptions(), store)
    assert [str(layer.digest) for layer in resolved.image.layers] == digests["layers"]
    assert list(store.entries()) == []


def test_whiteout_devices_are_shown_if_asked_for(store: Store, tmp_path: Path) -> None:
    """That the options of an image reach the merge."""
    write_layout(tmp_path / "image", [BASE, tarball(entry("etc/a", type=CHAR))])
    assert "etc/a" not in look(store, f"oci:{tmp_path}/image")
    assert "etc/a" in look(store, f"oci:{tmp_path}/image", show_whiteout_devices=True)
