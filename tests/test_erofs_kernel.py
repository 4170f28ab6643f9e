"""The kernel as the judge of our EROFS images: what it shows must be what was put in.

Every mount is made, looked at and ended by other processes (`tests.support.mounted`). The image, the layers' tars and the
synthetic device are files next to one another, on a file system from which the kernel takes backing files.
"""

from __future__ import annotations

import errno
import random
import re
import shutil
import struct
import subprocess
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from ocifs.erofs.writer import Encoder
from ocifs.tree import Extent, Kind, Node
from tests.support import mounted
from tests.support.damage import flip
from tests.support.trees import (
    content,
    directory,
    encoder,
    file,
    layer_bytes,
    node,
    symlink,
    trees,
    walk,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

CONTENT = [layer_bytes(1), layer_bytes(2)]
ALLOWED_ON_ANY = (b"trusted.", b"security.")
CAPABILITY = struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0)  # cap_net_raw=ep, as setcap(8) writes it
ACL = struct.pack("<I" + "HHI" * 5, 2, 1, 6, 2**32 - 1, 2, 7, 1000, 4, 4, 2**32 - 1, 16, 7, 2**32 - 1, 32, 4, 2**32 - 1)


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory from which the kernel takes backing files."""
    if why := mounted.why_not():
        pytest.skip(why)
    found = tmp_path_factory.mktemp("erofs")
    kind = subprocess.run(["stat", "-f", "-c", "%T", found], capture_output=True, text=True, check=True).stdout.strip()
    if kind in {"tmpfs", "overlayfs"}:
        pytest.skip(f"the kernel takes no backing files from {kind}, which is under {found}")
    return found


def put(place: Path, root: Node, layers: Sequence[bytes]) -> tuple[Encoder, list[Path]]:
    """Write the image and its devices; return the devices' paths."""
    made = encoder(root, [len(layer) for layer in layers])
    with (place / "image").open("wb") as out:
        made.write(out)
        out.write(b"what follows the image is not the kernel's business" * 100)
    devices = []
    for number, layer in enumerate(layers, 1):
        devices.append(place / f"layer-{number}")
        devices[-1].write_bytes(layer + bytes(-len(layer) % 512))  # the kernel reads whole blocks
    if made.synthetic_size:
        devices.append(place / "synthetic")
        with devices[-1].open("wb") as out:  # mostly holes: it may have many GiB
            out.truncate(made.synthetic_size)
            for extent in made.synthetic:
                out.seek(extent.synthetic_offset)
                out.write(layers[extent.layer - 1][extent.layer_offset : extent.layer_offset + extent.size])
    return made, devices


def compare(place: Path, root: Node, layers: Sequence[bytes]) -> dict[bytes, mounted.Seen]:
    """Mount the tree and compare everything."""
    made, devices = put(place, root, layers)
    found = mounted.look(place / "image", devices, place / "mnt")
    assert not isinstance(found, str), found
    links: dict[Node, int] = {}
    for _, here, _ in walk(root):
        links[here] = links.get(here, 0) + 1
    expected = {path: here for path, here, _ in walk(root)}
    assert found.keys() == expected.keys()
    for path, here in expected.items():
        there = found[path]
        assert there.mode == here.kind << 12 | here.mode, path
        assert there.ino == made.placed[here], path
        assert (there.uid, there.gid, there.mtime_ns) == (here.uid, here.gid, here.mtime_ns), path
        assert there.rdev == (here.rdev if here.kind in {Kind.CHAR, Kind.BLOCK} else (0, 0)), path
        if here.kind is Kind.DIR:
            assert there.nlink == 2 + sum(child.kind is Kind.DIR for child in (here.children or {}).values()), path
            assert list(there.names or ()) == sorted(here.children or {}), path
        else:
            assert there.nlink == links[here], path
        if here.kind is Kind.SYMLINK:
            assert there.target == here.target, path
            assert there.size == len(here.target), path
        elif here.kind is Kind.FILE:
            assert there.size == here.size, path
            if here.size <= mounted.READ_LIMIT:
                assert there.data == content(here, layers), path
        assert there.xattrs.keys() == dict(here.xattrs).keys(), path
        for name, value in here.xattrs:
            if here.kind in {Kind.FILE, Kind.DIR} or name.startswith(ALLOWED_ON_ANY):  # xattr(7): user.* elsewhere: no
                assert there.xattrs[name] == value, (path, name)
    return found


def test_every_kind_of_file_with_every_attribute(place: Path) -> None:
    shared = file(700, 1024, xattrs=((b"user.shared", b"1"),))
    symlinks = {
        b"l%04d" % size: symlink(bytes(97 + at % 26 for at in range(size))) for size in (1, 447, 448, 449, 4095)
    }
    root = directory(
        {
            b"empty": file(0, mode=0o600),
            b"one": file(1, 512, mtime_ns=1_700_000_000_123_456_789),
            b"block": file(512, 1024, layer=2),
            b"more": file(9001, 2048, uid=2**32 - 2, gid=2**32 - 2),
            b"setuid": file(5, 512, mode=0o6755, xattrs=((b"security.capability", CAPABILITY),)),
            b"hard": shared,
            b"null": node(Kind.CHAR, mode=0o666, rdev=(1, 3)),
            b"loop": node(Kind.BLOCK, mode=0o660, rdev=(4095, 2**20 - 1)),
            b"fifo": node(Kind.FIFO, mode=0o644, xattrs=((b"trusted.x", b"\0\xff"),)),
            b"acl": file(5, 512, mode=0o674, xattrs=((b"system.posix_acl_access", ACL),)),
            b"big-xattr": file(
                5, 512, xattrs=((b"trusted.a", b"t" * 5000), (b"user.b", b""), (b"user.c", b"u" * 30_000))
            ),
            b"link-xattr": symlink(b"x" * 400, xattrs=((b"trusted.l", b"v" * 40),)),
            b"sticky": directory(
                {b"again": shared, b"empty": directory(), **symlinks},
                mode=0o1777,
                mtime_ns=5,
                xattrs=((b"system.posix_acl_default", ACL), (b"user.d", b"e")),
            ),
            b"n" * 255: file(3, 512),
            b"\xff\n\\ ": file(3, 512),
            b"-": directory({b"x" * 255: directory({b"y" * 255: file(2, 512)})}),
        },
        mode=0o751,
        mtime_ns=(2**62) * 10**9 + 1,
    )
    found = compare(place, root, CONTENT)
    assert found[b"/hard"].ino == found[b"/sticky/again"].ino


def test_directories_of_10000_entries(place: Path) -> None:
    names = [b"%x-%s" % (number * 7919, b"n" * (number % 40)) for number in range(10_000)]
    kinds = [file(0), file(5000, 512), symlink(b"target"), directory()]
    children = {
        name: directory() if number % 50 == 0 else kinds[number % 3] if number % 7 else file(number % 900, 1024)
        for number, name in enumerate(names)
    }
    compare(place, directory({b"d": directory(children), b"long": directory(long_names())}), CONTENT)


def long_names() -> dict[bytes, Node]:
    return {(b"%03d" % number).ljust(255 - number % 3, b"n"): file(1) for number in range(300)}


def test_sparse_files(place: Path) -> None:
    root = directory(
        {
            b"hole": node(Kind.FILE, size=100_000),
            b"head": node(Kind.FILE, size=100_000, extents=(Extent(0, 1, 512, 1000),)),
            b"tail": node(Kind.FILE, size=100_000, extents=(Extent(99_000, 2, 777, 1000),)),
            b"middle": node(Kind.FILE, size=99_999, extents=(Extent(8192, 2, 512, 4096), Extent(50_001, 1, 99, 5))),
            b"unaligned": file(5000, 513),
            b"large": node(Kind.FILE, size=1 << 42, extents=(Extent((1 << 42) - 9, 1, 3, 9),)),
            b"largest": node(Kind.FILE, size=1 << 50),
        }
    )
    found = compare(place, root, CONTENT)
    assert found[b"/hole"].holes == ()
    assert found[b"/head"].holes == ((0, 4096),)
    assert found[b"/tail"].holes == ((98_304, 100_000),)
    assert found[b"/middle"].holes == ((8192, 12_288), (49_152, 53_248))
    assert found[b"/large"].holes == (((1 << 42) - (1 << 32), 1 << 42),)
    assert found[b"/largest"].holes == ()


def test_two_hundred_layers(place: Path) -> None:
    layers = [layer_bytes(number, 1500) for number in range(1, 201)]
    root = directory({b"%d" % number: file(400, 1024, layer=number) for number in range(1, 201)})
    root.children = {**(root.children or {}), b"sparse": node(Kind.FILE, size=9000, extents=(Extent(7, 200, 3, 9),))}
    compare(place, root, layers)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
@given(root=trees())
def test_any_tree_is_shown_as_it_is(place: Path, root: Node) -> None:
    for _, here, _ in walk(root):
        here.uid, here.gid = (
            min(here.uid, 2**32 - 2),
            min(here.gid, 2**32 - 2),
        )  # the last one is nobody: shown as 65534
        # The kernel reads these itself and wants sense in them.
        kept = (
            pair for pair in here.xattrs if not pair[0].startswith(b"system.") and pair[0] != b"security.capability"
        )
        here.xattrs = tuple(kept)
    compare(place, root, CONTENT)


def test_a_large_random_tree(place: Path) -> None:
    choose = random.Random(20)
    root = directory()
    directories = [root]
    every = [file(1)]
    for number in range(20_000):
        parent = choose.choice(directories[-40:])
        assert parent.children is not None
        name = b"%d" % number + bytes(choose.randrange(33, 46) for _ in range(choose.randrange(40)))
        sort = choose.randrange(20)
        if sort == 0:
            made = directory(mode=choose.randrange(0o10000), mtime_ns=choose.randrange(2**60))
            directories.append(made)
        elif sort == 1:
            made = symlink(b"t" * choose.randrange(1, 600))
        elif sort == 2:
            made = choose.choice(every)
        else:
            size = choose.randrange(3000)
            xattrs = ((b"user.x", b"y" * choose.randrange(700)),) if sort == 3 else ()
            made = file(size, 512 * choose.randrange(50), layer=choose.randrange(1, 3), xattrs=xattrs)
            every.append(made)
        parent.children[name] = made
    compare(place, root, CONTENT)


def test_without_its_devices_a_tree_reads_errors_not_its_own_bytes(place: Path) -> None:
    put(place, directory({b"f": file(3000, 512), b"d": directory({b"g": file(1, 0)})}), CONTENT)
    found = mounted.look(place / "image", [], place / "mnt")
    assert not isinstance(found, str), found
    assert found[b"/f"].data == found[b"/d/g"].data == errno.EIO


def test_a_tree_with_a_device_missing_is_not_mounted(place: Path) -> None:
    _, devices = put(place, directory({b"f": file(3000, 512)}), CONTENT)
    found = mounted.look(place / "image", devices[:1], place / "mnt")
    assert isinstance(found, str)
    assert "cannot mount" in found
    assert "as EROFS: " in found


def test_unreadable_files_that_have_a_size_read_errors(place: Path) -> None:
    root = directory({b"f": node(Kind.FILE, size=3000, unreadable=True)})
    _, devices = put(place, root, CONTENT)
    found = mounted.look(place / "image", devices, place / "mnt")
    assert not isinstance(found, str), found
    assert found[b"/f"].data == errno.EIO


@pytest.mark.parametrize("where", [1024, 1030, 1100, 1300])
def test_the_kernel_sums_the_superblock_as_we_do(place: Path, where: int) -> None:
    _, devices = put(place, directory(), CONTENT)
    flip(place / "image", where)
    assert isinstance(mounted.look(place / "image", devices, place / "mnt"), str)


def test_fsck_erofs_has_no_complaint(tmp_path: Path) -> None:
    if not (program := shutil.which("fsck.erofs")):
        pytest.skip("there is no fsck.erofs")
    said = subprocess.run([program, "-V"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"(\d+)\.(\d+)", said)
    if not version or (int(version[1]), int(version[2])) < (1, 7):
        pytest.skip(f"fsck.erofs {version[0] if version else said!r} refuses blocks of 512 bytes, 1.7 is needed")
    extents = (Extent(9000, 1, 700, 300),)
    root = directory({b"f": file(700), b"s": node(Kind.FILE, size=20_000, extents=extents), b"l": symlink(b"x" * 600)})
    _, devices = put(tmp_path, root, CONTENT)
    arguments = [*(f"--device={device}" for device in devices), str(tmp_path / "image")]
    done = subprocess.run([program, "--extract", *arguments], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def test_devices_must_be_whole_blocks_or_the_last_file_cannot_be_read(place: Path) -> None:
    """A tar may end within a block. Who serves it to the kernel must add the rest: a short read is an error."""
    layer = CONTENT[0][:1500]
    root = directory({b"f": file(400, 1024)})
    _, devices = put(place, root, [layer])
    found = mounted.look(place / "image", devices, place / "mnt")
    assert not isinstance(found, str), found
    assert found[b"/f"].data == layer[1024:1424]
    devices[0].write_bytes(layer)
    found = mounted.look(place / "image", devices, place / "mnt")
    assert not isinstance(found, str), found
    assert found[b"/f"].data in {errno.EIO, layer[1024:1424]}  # some kernels fill up with zeros instead
