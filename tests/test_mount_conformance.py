"""What a mount must be, whichever driver serves it: every type, every attribute, every byte, and nothing to write.

One image is built by hand for this, its expectations written beside it. It is mounted in four forms, for data takes a
different way in each: gzip, zstd as one frame (which has no restart points) and as many, and plain. What is not about
data is asked of one form only. All looking is done by other processes (`tests.support.mounting`).

Not here: how a mount comes and goes, what happens when something breaks, which rules decide what the tree is.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import zstandard

from tests.support import layout
from tests.support.mounting import DRIVERS, Mount, agent, mounted, run, why_not
from tests.support.tarball import (
    BLOCKDEV,
    CHAR,
    DIR,
    FIFO,
    HARDLINK,
    entry,
    sparse_gnu,
    sparse_pax_1_0,
    tarball,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

FORMS = ("gzip", "zstd", "zstd-frames", "plain")
MIB = 1 << 20
BUSYBOX = Path("/bin/busybox")
CAPABILITY = bytes.fromhex("01000002 00040000 00000000 00000000 00000000")
"""struct vfs_cap_data, revision 2, effective: permitted is 1 << 10, CAP_NET_BIND_SERVICE (linux/capability.h)."""

NOBODY = 4242


def noise(seed: str, size: int) -> bytes:
    """Give bytes that compress to about half, so that spans end in the middle of things."""
    return hashlib.shake_256(seed.encode()).hexdigest((size + 1) // 2).encode()[:size]


FILES = {
    "sizes/0": b"",
    "sizes/1": b"x",
    "sizes/511": noise("511", 511),
    "sizes/512": noise("512", 512),
    "sizes/513": noise("513", 513),
    "sizes/128K-1": noise("128K-1", (128 << 10) - 1),
    "sizes/128K": noise("128K", 128 << 10),
    "sizes/128K+1": noise("128K+1", (128 << 10) + 1),
    "sizes/several-spans": noise("several spans", 11 * MIB + 123),
    "sizes/zeros": bytes(5 * MIB + 1),
    "sizes/after": b"what follows the large ones\n",
}
SPARSE = {
    "sparse/gnu": ([(0, b"head"), (1 * MIB, noise("gnu", 700)), (3 * MIB - 5, b"tail.")], 3 * MIB),
    "sparse/pax": ([(4096, noise("pax", 3 * 4096 + 17)), (2 * MIB, b"x" * 512)], 5 * MIB + 3),
    "sparse/empty": ([], 1 * MIB),
}
ANY_BYTE_NAMES = [b"n" + bytes([value]) for value in range(1, 256) if value != ord("/")]
LONGEST_NAME = b"\xc3\xa4" * 127 + b"x"
MANY = 10_000


def filled(segments: list[tuple[int, bytes]], size: int) -> bytes:
    data = bytearray(size)
    for at, piece in segments:
        data[at : at + len(piece)] = piece
    return bytes(data)


class Thing(NamedTuple):
    """What a name must look like; None: not asked here."""

    kind: str
    mode: str
    owner: tuple[int, int] = (0, 0)
    mtime_ns: int = 0
    nlink: int = 1
    target: str | None = None
    rdev: list[int] | None = None
    data: bytes | None = None
    xattrs: dict[str, bytes] = {}  # noqa: RUF012  (never changed)


LINK_4095 = "/".join(["d" * 255] * 15) + "/" + "e" * 255
assert len(LINK_4095) == 4095

EXPECTED: dict[str, Thing] = {
    "file": Thing("file", "0644", data=b"content of file\n", xattrs={"user.note": b"a\nb=\0\xff"}, mtime_ns=10**18),
    "dir": Thing("dir", "0755", nlink=2),
    "link": Thing("symlink", "0777", target="file"),
    # attributes
    "modes/setuid": Thing("file", "4755", data=b""),
    "modes/setgid": Thing("file", "2755", data=b""),
    "modes/sticky": Thing("dir", "1777", nlink=2),
    "modes/all": Thing("file", "7777", data=b""),
    "modes/none": Thing("file", "0000", data=b"secret"),
    "modes/write-only": Thing("file", "0200", data=b"w"),
    "owners/user": Thing("file", "0644", (1000, 1001), data=b""),
    "owners/17-bits": Thing("file", "0644", (65536, 65537), data=b""),
    "owners/last": Thing("file", "0644", (2**32 - 2, 2**32 - 2), data=b""),
    "times/ns": Thing("file", "0644", mtime_ns=1_234_567_890_123_456_789, data=b""),
    "times/one-ns": Thing("dir", "0755", mtime_ns=1, nlink=2),
    "times/2262": Thing("file", "0644", mtime_ns=2**33 * 10**9, data=b""),
    "times/before-1970": Thing("file", "0644", mtime_ns=0, data=b""),
    "times/before-1970-pax": Thing("file", "0644", mtime_ns=0, data=b""),
    "times/symlink": Thing("symlink", "0777", mtime_ns=7_000_000_000, target="nowhere"),
    "xattrs/several": Thing(
        "file", "0644", data=b"", xattrs={"user.a": b"1", "user.b": b"", "user.c": bytes(range(256))}
    ),
    "xattrs/large": Thing("file", "0644", data=b"", xattrs={"user.large": b"L" * 3000}),
    "xattrs/capability": Thing("file", "0755", data=b"", xattrs={"security.capability": CAPABILITY}),
    "xattrs/dir": Thing("dir", "0755", nlink=2, xattrs={"user.d": b"on a directory"}),
    # types
    "links/dangling": Thing("symlink", "0777", target="/no/such/place"),
    "links/self": Thing("symlink", "0777", target="self"),
    "links/a": Thing("symlink", "0777", target="b"),
    "links/b": Thing("symlink", "0777", target="a"),
    "links/up": Thing("symlink", "0777", target="../../../../../etc"),
    "links/4095": Thing("symlink", "0777", target=LINK_4095),
    "links/bytes": Thing("symlink", "0777", target=os.fsdecode(b"\xff\n\\")),
    "devices/null": Thing("char", "0666", rdev=[1, 3]),
    "devices/large": Thing("char", "0600", rdev=[4095, 1_048_575]),
    "devices/sda": Thing("block", "0660", (0, 6), rdev=[8, 0]),
    "devices/fifo": Thing("fifo", "0640", (5, 5)),
    # hard links: two groups, in three directories
    "hard/one": Thing("file", "0600", nlink=3, data=b"first group"),
    "hard/deep/two": Thing("file", "0600", nlink=3, data=b"first group"),
    "three": Thing("file", "0600", nlink=3, data=b"first group"),
    "hard/symlink": Thing("symlink", "0777", nlink=2, target="one"),
    "hard/deep/symlink": Thing("symlink", "0777", nlink=2, target="one"),
    "hard/fifo": Thing("fifo", "0644", nlink=2),
    "hard/deep/fifo": Thing("fifo", "0644", nlink=2),
    # the second layer
    "etc/kept": Thing("file", "0644", data=b"from the base"),
    "etc/replaced": Thing("file", "0600", data=b"from above"),
    "etc/added": Thing("file", "0644", data=b"new"),
    "implied/by/its/content": Thing("file", "0644", data=b"!"),
    "implied": Thing("dir", "0755", nlink=3),
    **{path: Thing("file", "0644", data=data) for path, data in FILES.items()},
    **{path: Thing("file", "0644", data=filled(*what)) for path, what in SPARSE.items()},
    **{"names/" + os.fsdecode(name): Thing("file", "0644", data=name) for name in ANY_BYTE_NAMES},
    "names/" + os.fsdecode(LONGEST_NAME): Thing("file", "0644", data=b"long"),
}
DIRECTORIES = {
    ".": 16,
    "modes": 3,
    "owners": 2,
    "times": 3,
    "xattrs": 3,
    "links": 2,
    "devices": 2,
    "hard": 3,
    "hard/deep": 2,
    "etc": 2,
    "implied/by": 3,
    "implied/by/its": 2,
    "sizes": 2,
    "sparse": 2,
    "names": 2,
    "many": 2,
}
"""The directories that have no line above, with their link counts: two and one for each directory in it."""

HARD_LINKS = [
    {"hard/one", "hard/deep/two", "three"},
    {"hard/symlink", "hard/deep/symlink"},
    {"hard/fifo", "hard/deep/fifo"},
]


def layers() -> list[bytes]:
    """Give the layers' tars."""
    base = [
        entry("./", type=DIR, mode=0o755),
        entry("file", b"content of file\n", xattrs={"user.note": b"a\nb=\0\xff"}, mtime=10**9),
        entry("dir/"),
        entry("link", link="file"),
        entry("modes/setuid", mode=0o4755),
        entry("modes/setgid", mode=0o2755),
        entry("modes/sticky/", mode=0o1777),
        entry("modes/all", mode=0o7777),
        entry("modes/none", b"secret", mode=0),
        entry("modes/write-only", b"w", mode=0o200),
        entry("owners/user", uid=1000, gid=1001),
        entry("owners/17-bits", uid=65536, gid=65537),
        entry("owners/last", pax={"uid": "4294967294", "gid": "4294967294"}),
        entry("times/ns", mtime="1234567890.123456789"),
        entry("times/one-ns/", mtime="0.000000001"),
        entry("times/2262", mtime=2**33),
        entry("times/before-1970", mtime=-(2**31)),
        entry("times/before-1970-pax", mtime="-1.5"),
        entry("times/symlink", link="nowhere", mtime=7),
        entry("xattrs/several", xattrs={"user.a": b"1", "user.c": bytes(range(256)), "user.b": b""}),
        entry("xattrs/large", xattrs={"user.large": b"L" * 3000}),
        entry("xattrs/capability", mode=0o755, xattrs={"security.capability": CAPABILITY}),
        entry("xattrs/dir/", xattrs={"user.d": b"on a directory", "security.selinux": b"hidden\0"}),
        entry("links/dangling", link="/no/such/place"),
        entry("links/self", link="self"),
        entry("links/a", link="b"),
        entry("links/b", link="a"),
        entry("links/up", link="../../../../../etc"),
        entry("links/4095", link=LINK_4095),
        entry("links/bytes", link=b"\xff\n\\"),
        entry("devices/null", type=CHAR, mode=0o666, rdev=(1, 3)),
        entry("devices/large", type=CHAR, mode=0o600, rdev=(4095, 1_048_575)),
        entry("devices/sda", type=BLOCKDEV, mode=0o660, gid=6, rdev=(8, 0)),
        entry("devices/fifo", type=FIFO, mode=0o640, uid=5, gid=5),
        entry("hard/one", b"first group", mode=0o600),
        entry("hard/deep/two", type=HARDLINK, link="hard/one", mode=0o600),
        entry("three", type=HARDLINK, link="./hard/deep/two", mode=0o600),
        entry("hard/symlink", link="one"),
        entry("hard/deep/symlink", type=HARDLINK, link="hard/symlink", mode=0o777),
        entry("hard/fifo", type=FIFO),
        entry("hard/deep/fifo", type=HARDLINK, link="hard/fifo"),
        entry("etc/kept", b"from the base"),
        entry("etc/replaced", b"from the base", mode=0o644),
        entry("etc/removed", b"from the base"),
        *(entry(path, data) for path, data in FILES.items()),
        sparse_gnu("sparse/gnu", *SPARSE["sparse/gnu"]),
        sparse_pax_1_0("sparse/pax", *SPARSE["sparse/pax"]),
        sparse_pax_1_0("sparse/empty", *SPARSE["sparse/empty"]),
        *(entry(b"names/" + name, name) for name in ANY_BYTE_NAMES),
        entry(b"names/" + LONGEST_NAME, b"long"),
        entry(b"names/" + b"too-long" * 32, b"256 bytes: left out (rule T17)"),
        *(entry(f"many/{number:05}") for number in range(MANY)),
    ]
    upper = [
        entry("etc/.wh.removed"),
        entry("etc/replaced", b"from above", mode=0o600),
        entry("etc/added", b"new"),
        entry("implied/by/its/content", b"!"),
    ]
    if BUSYBOX.exists():
        upper += [
            entry("bin/busybox", BUSYBOX.read_bytes(), mode=0o755),
            *(entry(f"bin/{name}", link="busybox") for name in ("sh", "cat", "ls", "sha256sum", "readlink")),
        ]
    return [tarball(*base), tarball(*upper)]


def in_frames(data: bytes) -> bytes:
    """Compress into zstd frames of odd sizes, with skippable ones first, in between and last, and an empty one."""
    skippable = bytes.fromhex("502a4d18 05000000") + b"extra"
    out, at, sizes = [skippable], 0, (MIB, 700_001, 512, 2 * MIB + 3)
    while at < len(data):
        size = sizes[len(out) % len(sizes)]
        out.append(zstandard.ZstdCompressor(level=3).compress(data[at : at + size]))
        at += size
    out.insert(3, skippable + zstandard.ZstdCompressor().compress(b""))
    return b"".join(out) + skippable


def write_image(path: Path, tars: list[bytes], form: str) -> None:
    """Write the image as an OCI layout, its layers compressed as ``form`` says."""
    if form != "zstd-frames":
        layout.write_layout(path, tars, compression=form)
        return
    stored = [in_frames(tar) for tar in tars]

    def name_them(manifest: dict[str, Any]) -> None:
        manifest["layers"] = [
            {"mediaType": layout.LAYER_TYPES["zstd"], "digest": layout.sha256(data), "size": len(data)}
            for data in stored
        ]

    image = layout.make_image(tars, compression="plain", change_manifest=name_them)
    for digest in [layout.sha256(tar) for tar in tars]:
        del image.blobs[digest]
    image.blobs.update({layout.sha256(data): data for data in stored})
    layout.put_image(path, image)


class Served(NamedTuple):
    """A mount of the image, and what a walk over it saw."""

    mount: Mount
    seen: dict[str, Any]
    form: str

    @property
    def driver(self) -> str:
        """Who serves it."""
        return str(self.mount.record["driver"])


def _serve(tmp: Path, form: str, driver: str) -> Iterator[Served]:
    if reason := why_not(driver):
        pytest.skip(f"the {driver} driver: {reason}")
    write_image(tmp / "image", layers(), form)
    # Less memory than the data: spans are decoded more than once.
    # Under erofs everybody may look in, as into any mount of root's.
    options = ("--cache-memory", "4M", *(("-o", "allow_other") if driver == "fuse" else ()))
    with mounted(f"oci:{tmp}/image", tmp / "mnt", *options, driver=driver, cache=tmp / "cache") as mount:
        yield Served(mount, agent("walk", mount.path), form)
        assert mount.logged() == "", "a sound image makes the daemon complain"


@pytest.fixture(scope="module", params=[(driver, form) for driver in DRIVERS for form in FORMS], ids="-".join)
def every_form(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    driver, form = request.param
    yield from _serve(tmp_path_factory.mktemp(form), form, driver)


@pytest.fixture(scope="module", params=DRIVERS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from _serve(tmp_path_factory.mktemp("one"), "gzip", request.param)


# -- everything, in every form -------------------------------------------------------------------------------------


def test_every_name_attribute_and_byte_is_as_the_layers_say(every_form: Served) -> None:
    seen = every_form.seen
    wrong = {}
    for path, thing in EXPECTED.items():
        got = seen[path]
        expected = {
            "kind": thing.kind,
            "mode": thing.mode,
            "uid": thing.owner[0],
            "gid": thing.owner[1],
            "mtime_ns": thing.mtime_ns,
            "nlink": thing.nlink,
            "xattrs": {name: value.hex() for name, value in thing.xattrs.items()},
            **({} if thing.target is None else {"target": thing.target, "size": len(os.fsencode(thing.target))}),
            **({} if thing.rdev is None else {"rdev": thing.rdev}),
            **(
                {}
                if thing.data is None
                else {"sha256": hashlib.sha256(thing.data).hexdigest(), "size": len(thing.data)}
            ),
        }
        if differing := {name: (got.get(name), value) for name, value in expected.items() if got.get(name) != value}:
            wrong[path] = differing
    assert wrong == {}


def test_there_is_nothing_else(every_form: Served) -> None:
    seen = {path for path in every_form.seen if path != "bin" and not path.startswith("bin/")}
    assert seen == EXPECTED.keys() | DIRECTORIES.keys() | {f"many/{number:05}" for number in range(MANY)}


def test_reads_of_any_size_at_any_place_give_the_same_bytes(every_form: Served) -> None:
    for path in ("sizes/several-spans", "sizes/128K+1", "sizes/513", "sparse/gnu", "sparse/pax"):
        assert agent("reads_of_every_kind", every_form.mount.at(path)) == {
            "odd sizes": True,
            "backwards": True,
            "beyond the end": True,
            "across the end": True,
            "SEEK_END": True,
            "sendfile": True,
            "direct": True,
        }, path


def test_mappings_read_the_file_and_private_ones_can_be_written(every_form: Served) -> None:
    for path in ("sizes/several-spans", "sizes/511", "sparse/pax"):
        for how in ("shared", "private"):
            assert agent("mapped", every_form.mount.at(path), how) == every_form.seen[path]["sha256"]


def test_32_readers_at_once_read_what_one_reads(every_form: Served) -> None:
    paths = [path for path, thing in EXPECTED.items() if thing.data is not None and not path.startswith("names/")]
    expected = {every_form.mount.at(path): every_form.seen[path]["sha256"] for path in paths}
    done = agent("readers", list(expected), expected, 32, 1, limit=240)
    assert done == {"read": 32 * len(paths), "wrong": []}


# -- names ---------------------------------------------------------------------------------------------------------


def test_directories_count_their_links(served: Served) -> None:
    has_bin = "bin" in served.seen
    expected = {**DIRECTORIES, ".": DIRECTORIES["."] + has_bin}
    assert {path: served.seen[path]["nlink"] for path in DIRECTORIES} == expected


def test_hard_links_are_one_inode_and_nothing_else_is(served: Served) -> None:
    groups: dict[int, set[str]] = {}
    for path, thing in served.seen.items():
        groups.setdefault(thing["ino"], set()).add(path)
    assert sorted((group for group in groups.values() if len(group) > 1), key=sorted) == sorted(HARD_LINKS, key=sorted)


def test_a_directory_of_ten_thousand_lists_each_once_and_in_the_same_order(served: Served) -> None:
    first, second = agent("entries", served.mount.at("many")), agent("entries", served.mount.at("many"))
    assert first == second
    names = [name for name, _, _ in first]
    assert len(names) == MANY + 2
    assert set(names) == {".", "..", *(f"{number:05}" for number in range(MANY))}


def test_dot_and_dotdot_come_with_the_right_inode_numbers(served: Served) -> None:
    for path, parent in (("hard/deep", "hard"), ("hard", "."), ("many", ".")):
        found = {name: (ino, kind) for name, ino, kind in agent("entries", served.mount.at(path))}
        assert found["."] == (served.seen[path]["ino"], 4)
        assert found[".."] == (served.seen[parent]["ino"], 4)
    root = {name: ino for name, ino, _ in agent("entries", served.mount.path)}
    assert root["."] == served.seen["."]["ino"]


def test_entries_say_their_type_and_inode_number(served: Served) -> None:
    types = {"file": 8, "dir": 4, "symlink": 10, "char": 2, "block": 6, "fifo": 1}  # DT_* of readdir(3)
    for path in ("devices", "links", "modes", "hard/deep", "names"):
        for name, ino, kind in agent("entries", served.mount.at(path)):
            if name not in (".", ".."):
                thing = served.seen[f"{path}/{name}"]
                assert (ino, kind) == (thing["ino"], types[thing["kind"]]), name


def test_seekdir_goes_back_to_where_telldir_was_and_rewinddir_to_the_start(served: Served) -> None:
    assert agent("seek_everywhere", served.mount.at("many"), 97) == {
        "entries": MANY + 2,
        "positions": 104,
        "wrong": [],
        "rewound": True,
        "other": True,
    }
    assert agent("seek_everywhere", served.mount.at("names"), 1)["wrong"] == []


def test_names_that_do_not_exist_are_not_there_however_often_one_asks(served: Served) -> None:
    at = served.mount.at
    missing = [
        at("no"),
        at("many/10000"),
        at("many/"[:-1] + "x"),
        at("etc/removed"),
        at("dir/.wh.x"),
        at("no/such/path"),
    ]
    assert agent("errors", [["lstat", path] for path in missing] * 2) == ["ENOENT"] * 12
    assert agent("errors", [["lstat", at("x" * 256)], ["lstat", at("file/below")], ["stat", at("file") + "/"]]) == [
        "ENAMETOOLONG",
        "ENOTDIR",
        "ENOTDIR",
    ]


def test_symlinks_lead_where_they_say(served: Served) -> None:
    at = served.mount.at
    calls = [["stat", at(f"links/{name}")] for name in ("dangling", "self", "a", "4095")]
    assert agent("errors", calls) == ["ENOENT", "ELOOP", "ELOOP", "ENOENT"]
    assert agent("sha256", at("link")) == served.seen["file"]["sha256"]


def test_inode_numbers_are_the_same_in_every_mount(served: Served, tmp_path: Path) -> None:
    image = served.mount.record["reference"]
    cache = Path(served.mount.record["cache"])
    with mounted(image, tmp_path / "again", driver=served.mount.record["driver"], cache=cache) as again:
        seen = agent("walk", again.path, "names")
    assert {path: thing["ino"] for path, thing in seen.items()} == {
        path: thing["ino"] for path, thing in served.seen.items()
    }


# -- figures and permissions ---------------------------------------------------------------------------------------


def test_statfs_says_how_much_there_is_and_that_nothing_is_free(served: Served) -> None:
    said = agent("statfs", served.mount.path)
    inodes = {thing["ino"]: path for path, thing in served.seen.items() if thing["kind"] == "file"}
    holes = sum(size - sum(len(data) for _, data in segments) for segments, size in SPARSE.values())
    data = sum(served.seen[path]["size"] for path in inodes.values()) - holes
    total = said["f_blocks"] * said["f_frsize"]
    if served.driver == "fuse":
        assert data <= total < data + said["f_frsize"] * len(served.seen)
    else:  # EROFS counts the tree and the layers' tars, with everything that is not shown
        assert data <= total < 2 * data
    assert (said["f_bfree"], said["f_bavail"]) == (0, 0)
    if served.driver == "fuse":  # EROFS says that nobody knows how many files there could be (fs/erofs/super.c)
        assert (said["f_ffree"], said["f_favail"]) == (0, 0)
        assert said["f_files"] == len({thing["ino"] for thing in served.seen.values()})
    assert said["f_namemax"] == 255
    assert said["f_flag"] & (os.ST_RDONLY | os.ST_NOSUID | os.ST_NODEV) == os.ST_RDONLY | os.ST_NOSUID | os.ST_NODEV


def test_stat_asks_for_large_reads_and_counts_blocks(served: Served) -> None:
    # EROFS takes its block size, which is that of a tar.
    assert served.seen["sizes/several-spans"]["blksize"] == {"fuse": 128 << 10, "erofs": 512}[served.driver]
    for path in FILES:
        thing = served.seen[path]
        assert thing["blocks"] * 512 >= thing["size"] > thing["blocks"] * 512 - thing["blksize"] - 1


def test_access_answers_what_the_modes_say(served: Served) -> None:
    at = served.mount.at
    ask = [(at("file"), os.R_OK), (at("file"), os.W_OK), (at("file"), os.X_OK), (at("modes/setuid"), os.X_OK)]
    assert [agent("access", *one) for one in ask] == ["ok", "EROFS", "EACCES", "ok"]
    ask = [("modes/none", os.R_OK), ("modes/none", os.F_OK), ("modes/setuid", os.X_OK), ("no", os.F_OK)]
    said = [agent("as_user", NOBODY, served.mount.path, "access", list(one)) for one in ask]
    assert said == ["EACCES", "ok", "ok", "ENOENT"]


def test_the_kernel_checks_modes_for_those_who_are_not_root(served: Served) -> None:
    calls = [["open", path, os.O_RDONLY] for path in ("modes/none", "hard/one", "file")]
    assert agent("as_user", NOBODY, served.mount.path, "errors", [calls]) == ["EACCES", "EACCES", "ok"]


def test_devices_cannot_be_opened_on_a_mount_without_dev(served: Served) -> None:
    assert agent("errors", [["open", served.mount.at("devices/null"), os.O_RDONLY]]) == ["EACCES"]


def test_xattrs_that_are_not_there_and_buffers_that_are_too_small(served: Served) -> None:
    at = served.mount.at
    missing = [("file", "user.no"), ("dir", "user.no"), ("xattrs/dir", "security.selinux")]
    assert agent("errors", [["getxattr", at(path), name] for path, name in missing]) == [
        "ENODATA",
        "ENODATA",
        "ENODATA",
    ]
    done = run(["getfattr", "--absolute-names", "--dump", "--match=-", "--encoding=hex", at("xattrs/several")])
    values = [line for line in done.stdout.splitlines() if line.startswith("user.")]
    assert values == ["user.a=0x31", "user.b=0x", "user.c=0x" + bytes(range(256)).hex()] or values == [
        "user.a=0x31",
        "user.b",
        "user.c=0x" + bytes(range(256)).hex(),
    ]
    assert "cap_" in run(["getcap", at("xattrs/capability")]).stdout


# -- nothing can be written ----------------------------------------------------------------------------------------


def test_every_write_is_refused_as_on_a_read_only_file_system(served: Served) -> None:
    refused = agent("write_attempts", served.mount.path)
    assert {what: error for what, error in refused.items() if error != "EROFS"} == {}
    assert len(refused) == 26


def test_every_write_is_refused_after_a_remount_as_writable_too(served: Served, tmp_path: Path) -> None:
    record = served.mount.record
    with mounted(record["reference"], tmp_path / "rw", driver=record["driver"], cache=Path(record["cache"])) as mount:
        # The kernel allows it for FUSE, where every call then arrives at the daemon; EROFS stays read-only.
        assert agent("remount_writable", mount.path) == "ok"
        writable = agent("statfs", mount.path)["f_flag"] & os.ST_RDONLY == 0
        assert writable == (record["driver"] == "fuse")
        refused = agent("write_attempts", mount.path)
        assert {what: error for what, error in refused.items() if error != "EROFS"} == {}
        after = agent("walk", mount.path)
        assert after == served.seen
        assert "failed" not in mount.logged()


def test_syncing_what_cannot_change_says_what_the_kernel_makes_of_it(served: Served) -> None:
    said = {"fuse": "ok", "erofs": "EINVAL"}[served.driver]  # fs/sync.c: EROFS has no fsync
    assert agent("directory_syncs", served.mount.path) == [said, said, said]


# -- programs ------------------------------------------------------------------------------------------------------


needs_busybox = pytest.mark.skipif(not BUSYBOX.exists(), reason="Debian's package busybox-static is not installed")


@needs_busybox
def test_a_binary_runs_from_the_mount(served: Served) -> None:
    done = run([served.mount.at("bin/busybox"), "echo", "it", "runs"])
    assert (done.returncode, done.stdout) == (0, "it runs\n")


@needs_busybox
def test_a_chroot_into_the_mount_works(served: Served) -> None:
    script = "cat /link; readlink links/up; sha256sum < sizes/several-spans; echo x > /new; ls dir"
    status, out, err = agent("run_there", served.mount.path, ["/bin/sh", "-c", script])
    content = served.seen["sizes/several-spans"]["sha256"]
    assert out == f"content of file\n../../../../../etc\n{content}  -\n"
    assert "Read-only file system" in err
    assert status == 0


def _comparable(seen: dict[str, Any], *, links: bool = True) -> dict[str, Any]:
    """Leave out what a copy cannot have the same: inode numbers, sizes of directories, blocks."""
    kept = {}
    groups: dict[int, str] = {}
    for path, thing in sorted(seen.items()):
        few = {name: value for name, value in thing.items() if name not in ("ino", "blksize", "blocks")}
        if thing["kind"] == "dir":
            del few["size"], few["nlink"]
        elif links:
            few["same as"] = groups.setdefault(thing["ino"], path)
        kept[path] = few
    return kept


def test_rsync_copies_everything(served: Served, tmp_path: Path) -> None:
    done = run(["rsync", "-aHAX", "--specials", "--devices", f"{served.mount.path}/", f"{tmp_path}/copy/"], limit=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert _comparable(agent("walk", tmp_path / "copy")) == _comparable(served.seen)


def test_cp_copies_everything(served: Served, tmp_path: Path) -> None:
    done = run(["cp", "-a", str(served.mount.path), str(tmp_path / "copy")], limit=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert _comparable(agent("walk", tmp_path / "copy")) == _comparable(served.seen)


def test_tar_packs_everything(served: Served, tmp_path: Path) -> None:
    pack = f"tar --xattrs --xattrs-include='*' --numeric-owner --format=pax -C '{served.mount.path}' -cf - ."
    unpack = f"tar --xattrs --xattrs-include='*' --numeric-owner --same-owner -p -C '{tmp_path}/copy' -xf -"
    (tmp_path / "copy").mkdir()
    done = run(["bash", "-c", f"set -o pipefail; {pack} | {unpack}"], limit=120)
    assert done.returncode == 0, done.stderr
    copied, expected = _comparable(agent("walk", tmp_path / "copy")), _comparable(served.seen)
    for path in ("hard/fifo", "hard/deep/fifo"):  # GNU tar packs each name of a FIFO by itself
        for seen in (copied, expected):
            assert seen.pop(path)["kind"] == "fifo"
    assert copied == expected


def test_find_sees_every_name_once(served: Served, tmp_path: Path) -> None:
    done = run(["find", str(served.mount.path), "-mindepth", "1", "-fprintf", f"{tmp_path}/names", r"%P\0"], limit=60)
    names = [os.fsdecode(name) for name in (tmp_path / "names").read_bytes().split(b"\0")[:-1]]
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(names) == sorted(path for path in served.seen if path != ".")
    # `find -type` believes d_type, `-links` and `-samefile` ask: both agree with the walk.
    done = run(["find", str(served.mount.path), "-samefile", served.mount.at("three"), "-printf", r"%P\n"])
    assert set(done.stdout.split()) == {"hard/one", "hard/deep/two", "three"}


def test_grep_reads_the_whole_tree(served: Served) -> None:
    command = ["grep", "-r", "-l", "--devices=skip", "what follows the large ones", str(served.mount.path)]
    done = run(command, limit=60)
    assert done.stdout.splitlines() == [served.mount.at("sizes/after")]
    assert done.stderr == ""


def test_git_takes_a_mounted_tree_and_sees_no_change_in_it(served: Served, tmp_path: Path) -> None:
    def git(*words: str) -> subprocess.CompletedProcess[str]:
        env = {"GIT_DIR": f"{tmp_path}/git", "GIT_WORK_TREE": str(served.mount.path), "GIT_CONFIG_NOSYSTEM": "1"}
        done = run(["git", "-c", "safe.directory=*", "-c", "core.quotePath=false", *words], limit=120, env=env)
        assert done.returncode == 0, done.stderr
        return done

    run(["git", "init", "--quiet", "--bare", f"{tmp_path}/git"])
    git("config", "core.bare", "false")
    git("add", "--all", "--", "sizes", "etc", "links/dangling", "links/up", "hard/one", "many", "implied")
    assert len(git("ls-files").stdout.splitlines()) == len(FILES) + 3 + 3 + MANY + 1
    listed = git("status", "--porcelain", "--", "sizes", "etc", "many").stdout.splitlines()
    assert {line[:2] for line in listed} == {"A "}


def test_the_daemon_is_seen_by_its_file_system_type_and_source(served: Served) -> None:
    done = run(["findmnt", "--json", "--output", "TARGET,SOURCE,OPTIONS", str(served.mount.path)])
    assert shutil.which("findmnt"), "util-linux"
    (found,) = json.loads(done.stdout)["filesystems"]
    if served.driver == "fuse":
        assert found["source"] == served.mount.record["reference"]
    assert stat.S_IMODE(int(served.seen["."]["mode"], 8)) == 0o755
    assert {"ro", "nosuid", "nodev"} <= set(found["options"].split(","))


def test_an_image_without_any_xattr_can_be_copied_with_them(served: Served, tmp_path: Path) -> None:
    """The fuse driver tells the kernel not to ask for any; programs must take that for an answer."""
    layout.write_layout(
        tmp_path / "image", [tarball(entry("file", b"content"), entry("dir/"), entry("link", link="file"))]
    )
    with mounted(f"oci:{tmp_path}/image", tmp_path / "mnt", driver=served.driver, cache=tmp_path / "cache") as mount:
        for command in (["rsync", "-aHAX"], ["cp", "-a", "--no-target-directory"]):
            done = run([*command, f"{mount.path}/", str(tmp_path / command[0])])
            assert (done.returncode, done.stderr) == (0, "")
            assert _comparable(agent("walk", tmp_path / command[0])) == _comparable(agent("walk", mount.path))
