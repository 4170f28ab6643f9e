"""The EROFS writer and reader: bytes, limits, round trips, damage. The kernel's opinion is in test_erofs_kernel."""

from __future__ import annotations

import io
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ocifs.erofs import DirectoryEntry, Image, Run
from ocifs.erofs.chunks import SyntheticExtent
from ocifs.erofs.layout import crc32c
from ocifs.erofs.writer import Encoder
from ocifs.errors import DamagedError, UnsupportedError
from ocifs.tree import Extent, Kind, Node
from tests.fuzz import fuzz_erofs
from tests.support.trees import (
    LAYER_SIZE,
    UUID,
    assert_same,
    directory,
    encode,
    encoder,
    file,
    layer_bytes,
    node,
    reader,
    symlink,
    trees,
)

BASE = 1536  # one layer: superblock 1024–1152, two device slots to 1408, metadata from the next block


def at(nid: int) -> int:
    return BASE + 32 * nid


# ---- bytes, literally


def test_crc32c_is_castagnoli_without_the_final_inversion() -> None:
    assert crc32c(b"123456789") ^ 0xFFFFFFFF == 0xE3069283  # the check value of CRC-32C in every catalogue


def test_superblock_of_an_empty_image() -> None:
    raw = encode(directory())
    assert len(raw) == 2048
    assert raw[:1024] == bytes(1024)
    checksum = crc32c(raw[1024:1028] + bytes(4) + raw[1032:1536])
    assert raw[1024:1152] == (
        bytes.fromhex("e2e1f5e0")  # magic
        + struct.pack("<I", checksum)
        + bytes.fromhex("03000000")  # checksum, mtime
        + b"\x09\x00"  # 2^9 bytes a block, no superblock extensions
        + b"\x01\x00"  # the root's nid
        + bytes.fromhex("0100000000000000")  # inodes
        + bytes(12)  # build time
        + bytes.fromhex("04000000 03000000 00000000")  # blocks; first block of metadata; of shared attributes
        + UUID
        + bytes(16)  # volume name
        + bytes.fromhex("0c000000")  # chunked files, device table
        + bytes.fromhex("0000 0100 0900")  # algorithms; devices; the device table's place in units of 128
        + bytes(38)
    )


def test_device_table_names_each_layer_and_its_blocks() -> None:
    raw = encode(directory(), [512 * 7, 1025])
    slot = struct.Struct("<64sII56s")
    assert slot.unpack_from(raw, 1152) == (b"0" * 63 + b"1", 7, 1 << 31, bytes(56))
    assert slot.unpack_from(raw, 1280) == (b"0" * 63 + b"2", 3, 1 << 31, bytes(56))
    image = Image(raw)
    assert image.device_sizes == (0, 3584, 1536)
    assert image.device_tags == ("0" * 63 + "1", "0" * 63 + "2")


def test_image_without_layers_has_no_device_table() -> None:
    raw = encode(directory(), [])
    assert struct.unpack_from("<I", raw, 1024 + 80) == (4,)  # feature_incompat
    assert struct.unpack_from("<HH", raw, 1024 + 86) == (0, 0)
    assert [entry.name for entry in Image(raw).readdir(1)] == [b".", b".."]


def test_volume_name_and_uuid_are_kept() -> None:
    out = io.BytesIO()
    Encoder(directory(), layers=[], uuid=b"U" * 16, volume_name=b"a volume").write(out)
    assert (Image(out.getvalue()).uuid, Image(out.getvalue()).volume_name) == (b"U" * 16, b"a volume")


def test_inodes_and_entries_of_a_small_tree() -> None:
    root = directory(
        {
            b"file": file(700, 1024, uid=1, gid=2**32 - 2, mtime_ns=5_000_000_007),
            b"-link": symlink(b"target"),
            b"tty": node(Kind.CHAR, mode=0o620, rdev=(4, 300)),
        },
        mode=0o1777,
    )
    raw = encode(root)
    entry = struct.Struct("<QHBB")
    inode = struct.Struct("<HHHHQIIIIQII16x")
    expected = (
        # The root: extended inode with inline data, 75 bytes of entries, "-" sorted before ".".
        inode.pack(5, 0, 0o41777, 0, 75, 0, 1, 0, 0, 0, 0, 2)
        + entry.pack(6, 60, 7, 0)
        + entry.pack(1, 65, 2, 0)
        + entry.pack(1, 66, 2, 0)
        + entry.pack(9, 68, 1, 0)
        + entry.pack(12, 72, 3, 0)
        + b"-link...filetty"
    ).ljust(5 * 32, b"\0")
    expected += (inode.pack(5, 0, 0o120777, 0, 6, 0, 6, 0, 0, 0, 0, 1) + b"target").ljust(3 * 32, b"\0")
    expected += (
        inode.pack(9, 0, 0o100644, 0, 700, 0x21, 9, 1, 2**32 - 2, 5, 7, 1)  # chunks of two blocks, with indexes
        + struct.pack("<HHI", 0, 1, 2)  # device 1, block 2
    ).ljust(3 * 32, b"\0")
    expected += inode.pack(1, 0, 0o020620, 0, 0, 0x10042C, 12, 0, 0, 0, 0, 1)
    assert raw[at(1) :] == expected.ljust(len(raw) - at(1), b"\0")


def test_extended_attributes_lie_behind_the_inode() -> None:
    attributes = (
        (b"security.capability", b"\x01\0\0\x02"),
        (b"system.posix_acl_access", b"acl"),
        (b"system.posix_acl_default", b""),
        (b"trusted.t", b"12"),
        (b"user.abc", b"value"),
    )
    raw = encode(directory({b"f": file(1, xattrs=attributes)}))
    image = Image(raw)
    nid = image.lookup(1, b"f")
    assert nid is not None
    body = (
        bytes(12)
        + b"\x0a\x06\x04\x00capability\x01\0\0\x02\0\0"
        + b"\x00\x02\x03\x00acl\0"
        + b"\x00\x03\x00\x00"
        + b"\x01\x04\x02\x00t12\0"
        + b"\x03\x01\x05\x00abcvalue"
    )
    assert raw[at(nid) + 64 : at(nid) + 64 + len(body)] == body
    assert struct.unpack_from("<HH", raw, at(nid)) == (9, 1 + (len(body) - 12) // 4)
    assert image.xattrs(nid) == dict(attributes)
    assert image.getxattr(nid, b"user.abc") == b"value"
    assert image.getxattr(nid, b"user.ab") is None
    chunk = (at(nid) + 64 + len(body) + 7) // 8 * 8  # chunk indexes are aligned to 8
    assert raw[chunk : chunk + 8] == struct.pack("<HHI", 0, 1, 1)


# ---- directories


def test_directory_positions_are_stable_and_resumable() -> None:
    root = directory({b"%03d" % number: file(1) for number in range(100)})
    image = Image(encode(root))
    entries = list(image.readdir(1))
    assert len(entries) == 102
    assert [entry.next_position for entry in entries] == sorted({entry.next_position for entry in entries})
    assert entries[0] == DirectoryEntry(b".", 1, Kind.DIR, 12)
    for index, entry in enumerate(entries):
        assert list(image.readdir(1, entry.next_position)) == entries[index + 1 :]
    assert list(image.readdir(1, 1 << 62)) == []


def test_directory_block_is_filled_to_the_last_byte() -> None:
    """24 + 3 bytes of . and .., 12 + 255 of a name, and a name that makes the block exactly full: no NUL ends it."""
    root = directory({b"a" * 255: file(1), b"b" * 206: file(1)})
    image = Image(encode(root))
    assert image.inode(1).size == 512
    assert [entry.name for entry in image.readdir(1)] == [b".", b"..", b"a" * 255, b"b" * 206]
    assert image.lookup(1, b"b" * 206) is not None
    assert image.lookup(1, b"b" * 205) is None
    assert image.lookup(1, b"b" * 207) is None


def test_last_block_may_hold_one_short_name() -> None:
    root = directory({b"a" * 255: file(1), b"b" * 206: file(1), b"c": file(1)})
    image = Image(encode(root))
    assert image.inode(1).size == 512 + 13
    assert image.lookup(1, b"c") is not None
    assert image.lookup(1, b"b" * 206) is not None
    assert image.lookup(1, b"d") is None


def test_a_directorys_last_block_is_never_cut_whatever_lies_before_it() -> None:
    """Behind its inode it must lie within one block; attributes of any length shift it, a long one goes elsewhere."""
    directories = {}
    for value in range(0, 64, 4):
        for tail in (400, 447, 448, 480, 490, 500, 505, 511):
            names = {b"n" * 230: file(1), b"x" * (tail - 27 - 242 - 12): file(1)}
            directories[b"%d-%d" % (value, tail)] = directory(names, xattrs=((b"user.x", b"v" * value),))
    image = Image(encode(directory(directories)))
    for name in directories:
        nid = image.lookup(1, name)
        assert nid is not None
        assert image.inode(nid).size == int(name.split(b"-")[1])
        assert len(list(image.readdir(nid))) == 4
        assert image.lookup(nid, b"n" * 230) is not None


def test_names_that_are_parts_of_others_are_told_apart() -> None:
    """Names lie one behind the other without a separator, so a search finds them across borders too."""
    names = [b"ab", b"abc", b"abca", b"b", b"bc", b"bca", b"ca"]
    image = Image(encode(directory({name: file(1) for name in names})))
    found = {name: image.lookup(1, name) for name in names}
    assert len(set(found.values())) == len(names)
    assert None not in found.values()
    for absent in (b"a", b"c", b"cab", b"aba", b"abcab", b"cb", b"", b"ca\0", b"\0"):
        assert image.lookup(1, absent) is None


def test_every_name_of_a_large_directory_is_found_and_no_other() -> None:
    names = [b"%d" % (number * 7919 % 100_003) for number in range(10_000)]
    root = directory({b"d": directory({name: file(1, 512 * (number % 60)) for number, name in enumerate(names)})})
    image = Image(encode(root))
    nid = image.lookup(1, b"d")
    assert nid is not None
    assert len(list(image.readdir(nid))) == 10_002
    listed = {entry.name: entry.nid for entry in image.readdir(nid)}
    for name in names:
        assert image.lookup(nid, name) == listed[name]
        assert image.lookup(nid, name + b"x") is None
    assert image.lookup(nid, b"\xff") is None
    assert image.lookup(nid, b"!") is None


def test_hard_links_share_an_inode_and_are_counted() -> None:
    shared = file(10)
    root = directory({b"a": shared, b"d": directory({b"b": shared}), b"z": shared})
    image = Image(encode(root))
    nid = image.lookup(1, b"a")
    assert nid is not None
    assert image.lookup(1, b"z") == nid
    assert image.inode(nid).nlink == 3
    assert image.inode(1).nlink == 3
    assert image.inode_count == 3


def test_children_of_a_directory_are_neighbours_in_the_order_of_their_names() -> None:
    root = directory(
        {
            b"%02d" % number: directory({b"%02d" % inner: file(1) for inner in range(30)}) if number % 3 else file(1)
            for number in range(30)
        }
    )
    image = Image(encode(root))

    def read_from_front_to_back(nid: int, last: int) -> int:
        children = [entry for entry in image.readdir(nid) if entry.name not in {b".", b".."}]
        nids = [entry.nid for entry in children]
        assert nids == sorted(nids)
        assert nids[0] > last
        last = nids[-1]
        for entry in children:
            if entry.kind is Kind.DIR:
                last = read_from_front_to_back(entry.nid, last)
        return last

    read_from_front_to_back(1, 1)


def test_deep_trees_need_no_recursion() -> None:
    root = directory()
    here = root
    for _ in range(20_000):
        assert here.children is not None
        here.children[b"d"] = below = directory()
        here = below
    image = Image(encode(root))
    nid: int | None = 1
    for _ in range(20_000):
        assert nid is not None
        nid = image.lookup(nid, b"d")
    assert nid is not None
    assert [entry.name for entry in image.readdir(nid)] == [b".", b".."]


@pytest.mark.parametrize("name", [b"", b"x" * 256, b".", b"..", b"a/b", b"a\0"])
def test_names_that_no_directory_can_have_are_a_mistake_of_the_caller(name: bytes) -> None:
    with pytest.raises(ValueError, match="a name must be 1 to 255"):
        encoder(directory({name: file(1)}))


# ---- symbolic links


@pytest.mark.parametrize("size", [1, 447, 448, 449, 512, 4095])
@pytest.mark.parametrize("xattrs", [(), ((b"user.x", b"y" * 200),)])
def test_symlink_targets_of_any_length(size: int, xattrs: tuple[tuple[bytes, bytes], ...]) -> None:
    targets = {b"%d" % number: bytes(97 + number % 26 for _ in range(size)) for number in range(20)}
    root = directory({name: symlink(target, xattrs=xattrs) for name, target in targets.items()})
    raw = encode(root)
    image = Image(raw)
    for name, target in targets.items():
        nid = image.lookup(1, name)
        assert nid is not None
        assert image.readlink(nid) == target
        assert image.xattrs(nid) == dict(xattrs)
        inline = struct.unpack_from("<H", raw, at(nid))[0] == 5
        assert inline == (64 + size + (12 + 4 + 1 + 200 + 3 if xattrs else 0) <= 512)
        if inline:  # kernels before 6.12: inode, attributes and target within one block
            assert at(nid) % 512 + 64 + (220 if xattrs else 0) + size <= 512


@pytest.mark.parametrize("target", [b"", b"x" * 4096])
def test_symlink_targets_that_no_kernel_can_have_are_refused(target: bytes) -> None:
    with pytest.raises(UnsupportedError, match=r"^/a/link cannot be kept in the image tree: .* 1 to 4095 bytes"):
        encoder(directory({b"a": directory({b"link": symlink(target)})}))


def test_symlink_targets_with_nul_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="NUL"):
        encoder(directory({b"link": symlink(b"a\0b")}))


# ---- file data


def only_file(root: Node) -> tuple[Image, int]:
    image = Image(encode(root, [(1 << 41) - 1024]))
    nid = image.lookup(1, b"f")
    assert nid is not None
    return image, nid


def test_extents_are_cut_at_the_end_of_the_file() -> None:
    image, nid = only_file(directory({b"f": file(1000, 4096)}))
    assert list(image.extents(nid, 0, 10**9)) == [Run(1, 4096, 1000)]
    assert list(image.extents(nid, 999, 5)) == [Run(1, 5095, 1)]
    assert list(image.extents(nid, 1000, 5)) == []
    assert list(image.extents(nid, 0, 0)) == []
    assert list(image.extents(nid, 1 << 62, 5)) == []


def test_empty_files_have_no_chunks() -> None:
    image, nid = only_file(directory({b"f": file(0)}))
    assert list(image.extents(nid, 0, 100)) == []
    assert image.inode(nid).size == 0


def test_files_of_over_1_tib_have_several_chunks() -> None:
    size = (1 << 40) + 5
    image, nid = only_file(directory({b"f": file(size, 1 << 20)}))
    assert list(image.extents(nid, 0, size)) == [Run(1, 1 << 20, size)]
    assert list(image.extents(nid, (1 << 40) - 2, 100)) == [Run(1, (1 << 20) + (1 << 40) - 2, 7)]


def test_data_that_does_not_start_at_a_block_goes_to_the_synthetic_device() -> None:
    made = encoder(directory({b"f": file(5000, 513)}))
    assert made.synthetic == [SyntheticExtent(0, 1, 513, 5000)]
    assert made.synthetic_size == 4096 + 1024
    assert made.device_count == 2


def test_sparse_files_have_holes_where_a_whole_chunk_has_no_data() -> None:
    extents = (Extent(4096, 1, 512, 100), Extent(5000, 1, 612, 4000), Extent(20_480, 1, 8192, 10))
    root = directory({b"f": node(Kind.FILE, size=30_000, extents=extents)})
    made = encoder(root)
    assert made.synthetic == [
        SyntheticExtent(0, 1, 512, 100),
        SyntheticExtent(904, 1, 612, 4000),
        SyntheticExtent(8192, 1, 8192, 10),
    ]
    image = Image(encode(root))
    nid = image.lookup(1, b"f")
    assert nid is not None
    assert list(image.extents(nid, 0, 30_000)) == [
        Run(0, 0, 4096),
        Run(2, 0, 8192),
        Run(0, 0, 8192),
        Run(2, 8192, 4096),
        Run(0, 0, 5424),
    ]
    assert list(image.extents(nid, 4000, 200)) == [Run(0, 0, 96), Run(2, 0, 104)]
    assert made.data_size == 4110


def test_extents_that_continue_one_another_are_one_run() -> None:
    extents = (Extent(100, 1, 612, 1000), Extent(0, 1, 512, 100))
    made = encoder(directory({b"f": node(Kind.FILE, size=1100, extents=extents)}))
    assert made.synthetic == []


def test_files_that_are_one_hole_need_one_index() -> None:
    image, nid = only_file(directory({b"f": node(Kind.FILE, size=1 << 39)}))
    assert list(image.extents(nid, 5, 1 << 39)) == [Run(0, 0, (1 << 39) - 5)]
    assert image.size < 4096


def test_huge_sparse_files_get_larger_chunks() -> None:
    size = 1 << 43
    extents = (Extent(0, 1, 512, 1), Extent(size - 1, 1, 513, 1))
    root = directory({b"f": node(Kind.FILE, size=size, extents=extents)})
    made = encoder(root)
    assert made.size < 16_384  # 1024 chunks of 8 GiB
    image = Image(encode(root))
    nid = image.lookup(1, b"f")
    assert nid is not None
    runs = list(image.extents(nid, 0, size))
    assert [run.device for run in runs] == [2, 0, 2]
    assert sum(run.length for run in runs) == size


def test_sparse_files_that_need_too_many_chunks_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"^/f cannot be kept .* more chunks \(1048577\)"):
        encoder(directory({b"f": node(Kind.FILE, size=(1 << 60) + 1)}))
    with pytest.raises(UnsupportedError, match=r"^/. cannot be kept .* more chunks"):  # all files together
        encoder(directory({b"%d" % number: node(Kind.FILE, size=1 << 60) for number in range(5)}))
    with pytest.raises(UnsupportedError, match="larger than the kernel"):
        encoder(directory({b"f": node(Kind.FILE, size=1 << 63)}))


def test_sparse_files_that_need_over_2_tib_of_addresses_are_refused() -> None:
    size = 1 << 50
    extents = tuple(Extent(number << 47, 1, 512, 1) for number in range(8))
    files = {b"%d" % number: node(Kind.FILE, size=size, extents=extents) for number in range(300)}
    with pytest.raises(UnsupportedError, match="2 TiB of address space"):
        encoder(directory(files))


def test_layers_of_2_tib_are_refused() -> None:
    encoder(directory(), [(1 << 41) - 1024])
    with pytest.raises(UnsupportedError, match=r"^layer 2 has 2199023255552 bytes"):
        encoder(directory(), [512, 1 << 41])


def test_too_many_layers_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="70000 layers"):
        Encoder(directory(), layers=[("", 0)] * 70_000, uuid=UUID)


@pytest.mark.parametrize(
    ("size", "extents"),
    [
        (100, (Extent(50, 1, 512, 51),)),
        (100, (Extent(0, 1, 512, 50), Extent(49, 1, 512, 20))),
        (600, (Extent(0, 1, LAYER_SIZE - 512, 600),)),
    ],
)
def test_extents_that_overlap_or_leave_their_file_or_layer_are_damage(size: int, extents: tuple[Extent, ...]) -> None:
    with pytest.raises(DamagedError, match=r"^/d/f is damaged: "):
        encoder(directory({b"d": directory({b"f": node(Kind.FILE, size=size, extents=extents)})}))


def test_data_of_unreadable_files_is_out_of_reach() -> None:
    image, nid = only_file(directory({b"f": node(Kind.FILE, size=5, unreadable=True)}))
    assert image.inode(nid).size == 5
    with pytest.raises(DamagedError, match="outside of its layer"):
        list(image.extents(nid, 0, 5))


# ---- attributes


def test_owners_modes_and_times_over_their_whole_range() -> None:
    fields = {"uid": 2**32 - 1, "gid": 2**32 - 2, "mode": 0o7777, "mtime_ns": 2**62 * 10**9 + 999_999_999}
    image, nid = only_file(directory({b"f": file(1, **fields)}))
    inode = image.inode(nid)
    assert (inode.uid, inode.gid, inode.mode, inode.mtime_ns) == (2**32 - 1, 2**32 - 2, 0o107777, fields["mtime_ns"])


@pytest.mark.parametrize("seconds", [2**63, 2**64, 2**100])
@pytest.mark.parametrize("size", [0, 1])
def test_times_after_the_last_second_become_it(seconds: int, size: int) -> None:
    image, nid = only_file(directory({b"f": file(size, mtime_ns=seconds * 10**9 + 5)}))
    assert image.inode(nid).mtime_ns == (2**63 - 1) * 10**9 + 5


@pytest.mark.parametrize("fields", [{"uid": 2**32}, {"gid": -1}, {"mtime_ns": -1}])
def test_attributes_out_of_range_are_refused(fields: dict[str, int]) -> None:
    made = encoder(directory({b"f": file(1, **fields)}))
    with pytest.raises(UnsupportedError, match="entry 0 of layer 1"):
        made.write(io.BytesIO())


@pytest.mark.parametrize("rdev", [(4096, 0), (0, 1 << 20), (-1, 0)])
def test_device_numbers_out_of_range_are_refused(rdev: tuple[int, int]) -> None:
    with pytest.raises(UnsupportedError, match="/dev cannot be kept"):
        encoder(directory({b"dev": node(Kind.BLOCK, rdev=rdev)}))


def test_attributes_that_erofs_cannot_hold_are_left_out_and_reported() -> None:
    xattrs = (
        (b"system.nfs4_acl", b"1"),
        (b"user.", b"2"),
        (b"user." + b"n" * 251, b"3"),
        (b"user.big", b"4" * 65_536),
        (b"user.kept", b"5" * 65_535),
        (b"user.kept2", b"5" * 65_535),
        (b"user.kept3", b"5" * 65_535),
        (b"user.too-much", b"6" * 65_535),
    )
    made = encoder(directory({b"d": directory({b"f": file(1, xattrs=xattrs)})}))
    assert [(left.path, left.layer) for left in made.left_out] == [(b"/d/f", 1)] * 5
    assert [left.message.split()[3] for left in made.left_out] == [
        "system.nfs4_acl",
        "user.",
        "user." + "n" * 251,
        "user.big",
        "user.too-much",
    ]
    out = io.BytesIO()
    made.write(out)
    image = Image(out.getvalue())
    nid = image.lookup(image.lookup(1, b"d") or 0, b"f")
    assert nid is not None
    assert image.xattrs(nid) == dict(xattrs[4:7])
    assert made.any_xattr


def test_root_has_attributes_too() -> None:
    xattrs = ((b"user.x", b"y" * 900),)
    image = Image(encode(directory({b"f": file(1)}, xattrs=xattrs, mode=0o700)))
    assert image.xattrs(1) == dict(xattrs)
    assert image.lookup(1, b"f") is not None


# ---- everything


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(trees())
def test_any_tree_reads_back_as_it_was(root: Node) -> None:
    layers = [layer_bytes(1), layer_bytes(2)]
    made = encoder(root, [LAYER_SIZE, LAYER_SIZE])
    out = io.BytesIO()
    made.write(out)
    raw = out.getvalue()
    assert len(raw) == made.size
    image = Image(raw)
    assert_same(image, root, reader(image, made, layers), layers)
    assert list(made.placed.values()) == sorted(made.placed.values())


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(trees())
def test_the_same_tree_makes_the_same_bytes(root: Node) -> None:
    assert encode(root, [LAYER_SIZE, LAYER_SIZE]) == encode(root, [LAYER_SIZE, LAYER_SIZE])


# ---- damage


@pytest.mark.parametrize("number", range(60))
def test_damaged_trees_of_the_fuzzer_come_out_as_damaged(number: int) -> None:
    raw = fuzz_erofs.case(number)
    fuzz_erofs.check(raw)
    if not number:
        fuzz_erofs.check_memory(raw)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_damage_comes_out_as_damaged(data: st.DataObject) -> None:
    raw = bytearray(fuzz_erofs.SEEDS[1])
    for _ in range(data.draw(st.integers(1, 6))):
        where = data.draw(st.integers(1536, len(raw) - 9))
        value = data.draw(
            st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from([b"\xff" * 8, bytes(8), b"\x01"]))
        )
        raw[where : where + len(value)] = value
    fuzz_erofs.use_image(Image(bytes(raw)))


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_superblock_is_refused_or_read(data: st.DataObject) -> None:
    raw = bytearray(fuzz_erofs.SEEDS[1])
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.integers(1024, 1400))
        value = data.draw(st.binary(min_size=1, max_size=8))
        raw[where : where + len(value)] = value
    raw[1028:1032] = bytes(4)
    raw[1028:1032] = struct.pack("<I", crc32c(raw[1024:1536]))
    try:
        image = Image(bytes(raw[: data.draw(st.integers(0, len(raw)))]) if data.draw(st.booleans()) else bytes(raw))
    except DamagedError:
        pass  # anything else is the failure
    else:
        fuzz_erofs.use_image(image)


@pytest.mark.parametrize(
    ("where", "what"),
    [
        (1024, "no superblock"),
        (1032, "no superblock"),  # feature_compat without the checksum
        (1040, "checksum"),
        (1200, "checksum"),  # the device table is covered
    ],
)
def test_damaged_superblocks_are_refused(where: int, what: str) -> None:
    raw = bytearray(fuzz_erofs.SEEDS[1])
    raw[where] ^= 0xFF
    with pytest.raises(DamagedError, match=what):
        Image(bytes(raw))


def test_a_directory_that_is_its_own_child_is_just_read() -> None:
    raw = bytearray(encode(directory({b"d": directory()})))
    image = Image(bytes(raw))
    nid = image.lookup(1, b"d")
    assert nid is not None
    entry = raw.index(struct.pack("<QHBB", nid, 39, 2, 0))
    raw[entry : entry + 8] = struct.pack("<Q", 1)
    image = Image(bytes(raw))
    assert image.lookup(1, b"d") == 1


# ---- verification


def test_nothing_is_used_before_its_block_and_the_next_were_checked() -> None:
    root = directory({b"%05d" % number: file(1, xattrs=((b"user.x", b"y" * 60),)) for number in range(3000)})
    raw = encode(root)
    unchecked = bytearray(b"\1") * ((len(raw) >> 16) + 1)
    asked: list[int] = []

    def check(block: int) -> None:
        asked.append(block)
        unchecked[block] = 0

    image = Image(raw, unchecked=unchecked, check=check)
    assert asked == [0]
    for entry in image.readdir(1):
        image.inode(entry.nid)
        image.xattrs(entry.nid)
        image.lookup(1, entry.name)
    assert sorted(asked) == list(range((len(raw) - 1 >> 16) + 1))
    assert len(set(asked)) == len(asked)
