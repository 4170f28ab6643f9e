"""The file of an image tree: its parts, what is verified and when, damage."""

from __future__ import annotations

import hashlib
import io
import os
import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ocifs import image_tree
from ocifs.errors import DamagedError, MachineError, OcifsError, StaleFormatError, UnsupportedError
from ocifs.image_tree import ImageTree, LayerRecord, Metadata, Piece
from ocifs.tree import Extent, Kind, Node, Origin, Tree, Warned
from tests.support.trees import (
    LAYER_SIZE,
    assert_same,
    content,
    directory,
    file,
    layer_bytes,
    node,
    symlink,
    trees,
    walk,
)

if TYPE_CHECKING:
    from pathlib import Path

LAYERS = [("aa" * 32, LAYER_SIZE), ("bb" * 32, LAYER_SIZE)]
CONTENT = [layer_bytes(1), layer_bytes(2)]


def written(tree: Tree | Node) -> bytes:
    out = io.BytesIO()
    made = tree if isinstance(tree, Tree) else Tree(tree)
    summary = image_tree.write(made, out, layers=LAYERS, rules_version=7, key="the key")
    raw = out.getvalue()
    assert (summary.file_size, summary.image_size) == (len(raw), struct.unpack_from("<I", raw, 1024 + 36)[0] * 512)
    return raw


def opened(path: Path, tree: Tree | Node | bytes) -> ImageTree:
    target = path / "tree"
    target.write_bytes(tree if isinstance(tree, bytes) else written(tree))
    return ImageTree.open(target)


def nid_of(tree: ImageTree, path: bytes) -> int:
    nid = 1
    for name in path.split(b"/"):
        found = tree.image.lookup(nid, name)
        assert found is not None
        nid = found
    return nid


def large() -> Node:
    """A tree whose file has many blocks of 64 KiB."""
    return directory(
        {b"d%02d" % outer: directory({b"f%03d" % inner: file(7, 512) for inner in range(200)}) for outer in range(40)}
    )


def test_file_ends_with_the_footer_that_the_specification_describes() -> None:
    raw = written(directory({b"f": file(5), b"l": symlink(b"x")}))
    size, image_size, *places = struct.unpack_from("<14Q", raw, len(raw) - 160)
    checksum, version, footer_size, magic = struct.unpack_from("<32sII8s", raw, len(raw) - 48)
    assert (size, version, footer_size, magic) == (len(raw), 1, 160, b"ocifTREE")
    starts, sizes = places[::2], places[1::2]
    assert starts[0] == image_size
    assert starts[5] + sizes[5] == len(raw) - 160
    hashes = raw[starts[5] : -160]
    assert hashes == hashlib.sha256(raw[: starts[5]]).digest()  # less than 64 KiB: one hash
    assert checksum == hashlib.sha256(hashes + raw[-160:-48] + raw[-16:]).digest()
    assert raw[starts[0] : starts[0] + sizes[0]] == struct.pack("<IHHi", 1, 1, 0, 0) + struct.pack(
        "<IHHi", 5, 1, 0, 0
    ) + struct.pack("<IHHi", 8, 1, 0, 0)
    assert raw[starts[3] : starts[3] + sizes[3]] == b"[]"
    assert raw[starts[4] : starts[4] + sizes[4]].startswith(b'{"format_version":1,"rules_version":7,"key":"the key"')


def test_metadata_tells_what_is_true_of_the_tree(tmp_path: Path) -> None:
    sparse = node(Kind.FILE, size=9000, extents=(Extent(5000, 2, 100, 300),))
    with opened(tmp_path, directory({b"a-name": sparse, b"b": file(700)})) as tree:
        assert tree.metadata == Metadata(
            format_version=1,
            rules_version=7,
            key="the key",
            layers=(LayerRecord("aa" * 32, LAYER_SIZE), LayerRecord("bb" * 32, LAYER_SIZE)),
            inode_count=3,
            data_size=1000,
            longest_name=6,
            any_xattr=False,
            synthetic_size=4096,
        )
        assert tree.image.device_sizes == (0, LAYER_SIZE, LAYER_SIZE, 4096)
    with opened(tmp_path, directory({b"f": file(1, xattrs=((b"user.x", b""),))})) as tree:
        assert tree.metadata.any_xattr


def test_every_inode_knows_the_entry_that_made_it(tmp_path: Path) -> None:
    children = {b"%03d" % number: Node(Kind.FIFO, Origin(1 + number % 2, number * 3)) for number in range(500)}
    root = Node(Kind.DIR, Origin(2, -1), children=children)
    with opened(tmp_path, root) as tree:
        assert tree.origin(1) == Origin(2, -1)
        for name, child in children.items():
            nid = nid_of(tree, name)
            assert tree.origin(nid) == child.origin
            assert tree.origin(nid + 1) is None
        assert tree.origin(0) is None
        assert tree.origin(1 << 70) is None


def test_unreadable_files_are_marked(tmp_path: Path) -> None:
    root = directory({b"%d" % number: file(0, unreadable=number % 3 == 0) for number in range(50)})
    with opened(tmp_path, root) as tree:
        assert [tree.unreadable(nid_of(tree, b"%d" % number)) for number in range(50)] == [
            number % 3 == 0 for number in range(50)
        ]
        assert not tree.unreadable(0)
        assert not tree.unreadable(1 << 40)
    with opened(tmp_path, directory({b"f": file(0)})) as tree:
        assert not tree.unreadable(1)


def test_warnings_are_kept_in_order_byte_for_byte(tmp_path: Path) -> None:
    warnings = [Warned("T3", 2, b"/a\xff\n", "one — two"), Warned("H2", 0, b"", "x\udcff")]
    with opened(tmp_path, Tree(directory(), list(warnings))) as tree:
        assert tree.warnings() == [warnings[0], Warned("H2", 0, b"", "x\\udcff")]


def test_d10_attributes_that_cannot_be_kept_become_warnings(tmp_path: Path) -> None:
    root = directory({b"f": file(1, xattrs=((b"system.nfs4_acl", b"1"), (b"user.x", b"2")))})
    with opened(tmp_path, root) as tree:
        assert tree.image.xattrs(nid_of(tree, b"f")) == {b"user.x": b"2"}
        assert [(found.rule, found.layer, found.path) for found in tree.warnings()] == [("D10", 1, b"/f")]


def test_extents_name_layers_and_zeros(tmp_path: Path) -> None:
    extents = (Extent(10, 2, 100, 300), Extent(4000, 1, 7, 200), Extent(20_000, 2, 1000, 5))
    root = directory({b"s": node(Kind.FILE, size=25_000, extents=extents), b"f": file(700, 1024)})
    with opened(tmp_path, root) as tree:
        assert list(tree.extents(nid_of(tree, b"f"), 100, 10**6)) == [Piece(1, 1124, 600)]
        nid = nid_of(tree, b"s")
        assert list(tree.extents(nid, 0, 25_000)) == [
            Piece(0, 0, 10),
            Piece(2, 100, 300),
            Piece(0, 0, 3690),
            Piece(1, 7, 200),
            Piece(0, 0, 3992),
            Piece(0, 0, 8192),
            Piece(0, 0, 3616),
            Piece(2, 1000, 5),
            Piece(0, 0, 475),
            Piece(0, 0, 4520),
        ]
        assert list(tree.extents(nid, 15, 3)) == [Piece(2, 105, 3)]
        assert list(tree.extents(nid, 24_999, 3)) == [Piece(0, 0, 1)]


def test_reading_the_file_for_the_kernel_gives_the_image_and_no_more(tmp_path: Path) -> None:
    raw = written(large())
    with opened(tmp_path, raw) as tree:
        assert tree.read_range(0, 4096) == raw[:4096]
        assert tree.read_range(65_000, 200_000) == raw[65_000:265_000]
        assert tree.read_range(tree.image_size - 5, 100) == raw[tree.image_size - 5 : tree.image_size]
        assert tree.read_range(tree.image_size, 100) == b""
        assert tree.read_range(1 << 50, 100) == b""


def test_the_same_tree_makes_the_same_file_and_another_key_another_uuid() -> None:
    assert written(large()) == written(large())
    out = io.BytesIO()
    image_tree.write(Tree(large()), out, layers=LAYERS, rules_version=7, key="other")
    assert out.getvalue()[1024 + 48 : 1024 + 64] != written(large())[1024 + 48 : 1024 + 64]


def test_nothing_is_written_for_a_tree_that_is_refused() -> None:
    out = io.BytesIO()
    with pytest.raises(UnsupportedError):
        image_tree.write(Tree(directory({b"l": symlink(b"")})), out, layers=LAYERS, rules_version=7, key="")
    assert out.getvalue() == b""


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(trees())
def test_any_tree_reads_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, root: Node) -> None:
    with opened(tmp_path_factory.mktemp("t"), root) as tree:

        def read(nid: int, size: int) -> bytes:
            return b"".join(
                CONTENT[layer - 1][start : start + length] if layer else bytes(length)
                for layer, start, length in tree.extents(nid, 0, size)
            )

        paths = assert_same(tree.image, root, read, CONTENT)
        for path, here, _ in walk(root):
            assert tree.origin(paths[path]) == here.origin
            if here.kind is Kind.FILE and here.size > 2:
                pieces = list(tree.extents(paths[path], 1, here.size - 2))
                data = b"".join(
                    CONTENT[layer - 1][start : start + size] if layer else bytes(size) for layer, start, size in pieces
                )
                assert data == content(here, CONTENT)[1:-1]
        tree.verify_all()


# ---- damage


def test_a_flipped_bit_is_found_when_its_block_is_used_and_only_then(tmp_path: Path) -> None:
    raw = bytearray(written(large()))
    with opened(tmp_path, bytes(raw)) as tree:
        first, last = nid_of(tree, b"d00/f000"), nid_of(tree, b"d39/f199")
    at = struct.unpack_from("<I", raw, 1024 + 40)[0] * 512 + 32 * last + 20
    raw[at] ^= 1
    with opened(tmp_path, bytes(raw)) as tree:
        assert tree.image.inode(first).size == 7
        for _ in range(2):
            with pytest.raises(DamagedError) as caught:
                tree.image.inode(last)
            assert f"{tmp_path}/tree is damaged: block {at >> 16} of 64 KiB, at offset {at >> 16 << 16}," in str(
                caught.value
            )
        assert tree.image.inode(first).size == 7
        with pytest.raises(DamagedError):
            tree.read_range(at, 1)
        with pytest.raises(DamagedError, match=f"block {at >> 16} "):
            tree.verify_all()


def test_an_inode_across_the_border_of_two_blocks_is_verified_with_both(tmp_path: Path) -> None:
    raw = bytearray(written(large()))
    base = struct.unpack_from("<I", raw, 1024 + 40)[0] * 512
    with opened(tmp_path, bytes(raw)) as tree:
        nids = [
            entry.nid
            for outer in tree.image.readdir(1)
            if outer.name > b".."
            for entry in tree.image.readdir(outer.nid)
        ]
    crossing = [nid for nid in nids if (base + 32 * nid) >> 16 != (base + 32 * nid + 95) >> 16]
    assert crossing
    raw[base + 32 * crossing[0] + 95] ^= 1  # padding behind it, but in the next block
    with opened(tmp_path, bytes(raw)) as tree, pytest.raises(DamagedError, match="64 KiB"):
        tree.image.inode(crossing[0])


def test_attributes_longer_than_a_block_are_verified_to_their_end(tmp_path: Path) -> None:
    xattrs = tuple((b"user.%d" % number, b"%d" % number * 60_000) for number in range(4))
    behind = ((b"user.behind", b"b" * 65_000), (b"user.more", b"m" * 65_000))
    raw = bytearray(written(directory({b"f": file(1, xattrs=xattrs), b"g": file(1, xattrs=behind)})))
    with opened(tmp_path, bytes(raw)) as tree:
        nid = nid_of(tree, b"f")
        assert tree.image.xattrs(nid) == dict(xattrs)
    at = raw.index(b"3" * 60_000) + 59_000
    assert at >> 16 >= 3
    raw[at] ^= 1
    with opened(tmp_path, bytes(raw)) as tree:
        assert tree.image.inode(nid).size == 1
        with pytest.raises(DamagedError, match=f"block {at >> 16} of 64 KiB"):
            tree.image.xattrs(nid)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 10**9), st.integers(0, 7))
def test_any_flipped_bit_is_found(tmp_path_factory: pytest.TempPathFactory, where: int, bit: int) -> None:
    raw = bytearray(
        written(directory({b"f": file(9), b"s": node(Kind.FILE, size=9000, extents=(Extent(1, 1, 1, 1),))}))
    )
    raw[where % len(raw)] ^= 1 << bit
    with pytest.raises((DamagedError, StaleFormatError)):
        opened(tmp_path_factory.mktemp("t"), bytes(raw)).verify_all()


def test_verify_all_looks_again_at_what_was_good_before(tmp_path: Path) -> None:
    raw = written(large())
    with opened(tmp_path, raw) as tree:
        tree.verify_all()
        with (tmp_path / "tree").open("r+b") as damaged:
            damaged.seek(200_000)
            damaged.write(b"\xff\xfe\xfd")
        with pytest.raises(DamagedError, match="block 3 "):
            tree.verify_all()


@pytest.mark.parametrize("keep", [1, 8, 159, 160, 2000, -1, -512])
def test_truncated_files_are_refused(tmp_path: Path, keep: int) -> None:
    raw = written(directory({b"f": file(5)}))
    with pytest.raises(DamagedError, match=f"{tmp_path}/tree is damaged"):
        opened(tmp_path, raw[:keep])


def test_grown_and_empty_files_are_refused(tmp_path: Path) -> None:
    raw = written(directory())
    with pytest.raises(DamagedError):
        opened(tmp_path, raw + b"\0")
    with pytest.raises(DamagedError, match="bytes, its footer speaks of"):
        opened(tmp_path, b"\0" * 8 + raw)
    with pytest.raises(DamagedError, match="empty"):
        opened(tmp_path, b"")


@pytest.mark.parametrize("version", [0, 2, 99])
def test_other_format_versions_are_stale_not_damaged(tmp_path: Path, version: int) -> None:
    raw = written(directory())
    with pytest.raises(StaleFormatError, match=f"has format version {version}"):
        opened(tmp_path, raw[:-16] + struct.pack("<II", version, 160) + raw[-8:])


def resealed(raw: bytearray) -> bytes:
    """The file with hashes and checksum made to fit again, as only a mistaken writer would."""
    start, size = struct.unpack_from("<QQ", raw, len(raw) - 160 + 96)
    start = min(start, len(raw))
    hashed = b"".join(hashlib.sha256(raw[at : min(at + 65536, start)]).digest() for at in range(0, start, 65536))
    raw[start : start + size] = hashed[:size]
    raw[-48:-16] = hashlib.sha256(raw[start:-160] + raw[-160:-48] + raw[-16:]).digest()
    return bytes(raw)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_well_sealed_nonsense_is_damage_too(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    sparse = node(Kind.FILE, size=9000, extents=(Extent(1, 1, 1, 1),))
    raw = bytearray(written(Tree(directory({b"f": file(9), b"s": sparse}), [Warned("T3", 1, b"/f", "m")])))
    image_size = struct.unpack_from("<Q", raw, len(raw) - 152)[0]
    where = data.draw(st.one_of(st.integers(image_size, len(raw) - 17), st.integers(len(raw) - 160, len(raw) - 49)))
    value = data.draw(st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from([b"\xff" * 8, bytes(8)])))
    raw[where : where + len(value)] = value[: max(0, len(raw) - 16 - where)]
    try:
        sealed = resealed(raw)
    except (struct.error, ValueError, MemoryError):
        return
    try:
        with opened(tmp_path_factory.mktemp("t"), sealed) as tree:
            tree.warnings()
            for nid in (1, 5, 8, 1 << 33):
                tree.origin(nid)
                tree.unreadable(nid)
            list(tree.synthetic(0, 10_000))
    except OcifsError as error:
        assert isinstance(error, DamagedError)


def test_missing_files_are_the_machines_fault(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"cannot open the image tree .*/none: No such file"):
        ImageTree.open(tmp_path / "none")


def test_a_descriptor_will_do_and_stays_its_owners(tmp_path: Path) -> None:
    path = tmp_path / "tree"
    path.write_bytes(written(directory({b"f": file(5)})))
    descriptor = os.open(path, os.O_RDONLY)
    tree = ImageTree.open(descriptor, name="a name")
    os.close(descriptor)
    assert tree.image.lookup(1, b"f") == 5
    tree.close()
