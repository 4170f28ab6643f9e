"""What `ocifs.changes` makes of real overlays: every image read back is what the overlay showed, entry by entry."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ocifs.changes import Destination, Merged, Namespace, Recipe, Sign, Upper, commit, differences
from ocifs.image import ImageOptions, open_image
from ocifs.rootfs import view
from ocifs.store import Store
from ocifs.tree import Kind
from tests.support.layout import write_layout
from tests.support.mounted import Seen, look_here
from tests.support.overlaid import Act, Overlays
from tests.support.tarball import CHAR, FIFO, HARDLINK, entry, tarball

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ocifs.image import Image
    from ocifs.rootfs import RootFS

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a kernel overlay with whiteouts of its own needs root")

CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")

BASE = tarball(
    entry("./", mode=0o751, mtime=1_600_000_000),
    entry("a/", mtime=1_600_000_001, mode=0o750, uid=1000, gid=100),
    entry("a/b/", mtime=1_600_000_002),
    entry("a/b/file", b"deep\n", mtime=1_600_000_003),
    entry("a/file", b"in a\n" * 300, mtime=1_600_000_004, mode=0o4755),
    entry("a/hard", type=HARDLINK, link="a/file", mode=0o4755, mtime=1_600_000_004),
    entry("b/", mtime=1_600_000_005, mode=0o1777),
    entry("b/c/", mtime=1_600_000_006),
    entry("b/c/link", link="../../file"),
    entry("b/c/pipe", type=FIFO, mtime=1_600_000_007),
    entry("c/", mtime=1_600_000_008),
    entry("c/dev", type=CHAR, rdev=(1, 3), mtime=1_600_000_009),
    entry("file", b"at the top\n", mtime="1600000010.123456789", xattrs={"user.note": b"\0note"}),
    entry("caps", b"\x7fELF", mtime=1_600_000_011, xattrs={"security.capability": CAPABILITY}, mode=0o755),
    entry("link", link="a", mtime=1_600_000_012),
    entry("w" * 255, b"the longest name", mtime=1_600_000_013),
)


# -- one entry of a tree, however it was looked at -----------------------------------------------------------------


class Thing(NamedTuple):
    kind: int
    mode: int
    owner: tuple[int, int]
    mtime_ns: int
    rdev: tuple[int, int]
    target: bytes
    data: bytes
    xattrs: dict[bytes, bytes]
    names: tuple[bytes, ...]
    """All names of the inode."""


def of_seen(seen: dict[bytes, Seen]) -> dict[bytes, Thing]:
    names: dict[int, list[bytes]] = {}
    for path, found in seen.items():
        if not stat.S_ISDIR(found.mode):
            names.setdefault(found.ino, []).append(path)
    things: dict[bytes, Thing] = {}
    for path, found in seen.items():
        assert not isinstance(found.data, int), path
        things[path] = Thing(
            found.mode >> 12,
            found.mode & 0o7777,
            (found.uid, found.gid),
            found.mtime_ns,
            found.rdev if found.mode >> 12 in (Kind.CHAR, Kind.BLOCK) else (0, 0),
            found.target or b"",
            found.data or b"",
            {name: value for name, value in found.xattrs.items() if isinstance(value, bytes) and is_shown(name)},
            tuple(sorted(names.get(found.ino, ()))) if not stat.S_ISDIR(found.mode) else (path,),
        )
    return things


def is_shown(name: bytes) -> bool:
    return (name.startswith(b"user.") and not name.startswith(b"user.overlay.")) or name == b"security.capability"


def of_view(root: RootFS) -> dict[bytes, Thing]:
    names: dict[int, list[bytes]] = {}
    found: dict[bytes, int] = {}
    todo = [(b"", root.root)]
    while todo:
        path, ino = todo.pop()
        found[path] = ino
        names.setdefault(ino, []).append(path)
        if root.inode(ino).kind is Kind.DIR:
            todo += [(path + b"/" + name, nid) for name, nid, *_ in root.readdir(ino) if name not in (b".", b"..")]
    things: dict[bytes, Thing] = {}
    for path, ino in found.items():
        inode = root.inode(ino)
        things[path] = Thing(
            inode.kind,
            inode.mode & 0o7777,
            (inode.uid, inode.gid),
            inode.mtime_ns,
            inode.rdev,
            root.readlink(ino) if inode.kind is Kind.SYMLINK else b"",
            b"".join(map(bytes, root.pieces(ino))) if inode.kind is Kind.FILE else b"",
            root.xattrs(ino),
            tuple(sorted(names[ino])),
        )
    return things


# -- the image, its tree on disk, and overlays above it ------------------------------------------------------------


class Ground(NamedTuple):
    """An image that is open, the same unpacked, and a process that mounts overlays above that."""

    layout: Path
    image: Image
    view: RootFS
    lower: Path
    overlays: Overlays
    store: Store


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    place = tmp_path_factory.mktemp("ground")
    write_layout(place / "image", [BASE])
    lower = place / "lower"
    lower.mkdir()
    subprocess.run(["tar", "-x", "--xattrs", "--xattrs-include=*", "-p", "-C", lower], input=BASE, check=True)
    with (
        Store(place / "cache") as store,
        open_image(f"oci:{place / 'image'}", store, ImageOptions()) as image,
        Overlays() as overlays,
    ):
        yield Ground(place / "image", image, view(image), lower, overlays, store)


@contextlib.contextmanager
def committed(
    ground: Ground, place: Path, *, namespace: Namespace = Namespace.TRUSTED, **recipe: Any
) -> Iterator[tuple[RootFS, list[str]]]:
    """The image that the changes in ``place``/upper make, and what was warned about."""
    warned: list[str] = []
    with Upper(os.fsencode(place / "upper"), namespace) as upper:
        commit(
            ground.image,
            Merged(upper, ground.view),
            Destination(os.fsencode(place / "out"), "new"),
            Recipe(**recipe),
            warn=lambda path, reason: warned.append(f"{os.fsdecode(path)}: {reason}"),
        )
    with open_image(f"oci:{place / 'out'}:new", ground.store, ImageOptions()) as made:
        yield view(made), warned


def signs(ground: Ground, place: Path, *, namespace: Namespace = Namespace.TRUSTED) -> dict[bytes, Sign]:
    with Upper(os.fsencode(place / "upper"), namespace) as upper:
        return {found.path: found.sign for found in differences(Merged(upper, ground.view))}


def expected_signs(before: dict[bytes, Thing], after: dict[bytes, Thing]) -> dict[bytes, Sign]:
    """What a naive comparison of two whole trees says."""
    found: dict[bytes, Sign] = {}
    for path in before.keys() | after.keys():
        parent = path.rpartition(b"/")[0]
        if path not in before:
            found[path or b"/"] = Sign.ADDED
        elif path not in after:
            if parent in after and after[parent].kind == Kind.DIR:
                found[path or b"/"] = Sign.DELETED
        elif before[path]._replace(names=()) != after[path]._replace(names=()):
            found[path or b"/"] = Sign.CHANGED
    return found


def check(ground: Ground, place: Path, acts: list[Act], options: str = "", **recipe: Any) -> dict[bytes, Sign]:
    """Do ``acts`` on an overlay; what is committed and listed must be what the overlay showed."""
    namespace = Namespace.USER if options == "userxattr" else Namespace.TRUSTED
    shown = of_seen(ground.overlays.changed(ground.lower, place, acts, options=options))
    with committed(ground, place, namespace=namespace, **recipe) as (made, warned):
        assert of_view(made) == shown
    assert warned == []
    found = signs(ground, place, namespace=namespace)
    assert found == expected_signs(of_view(ground.view), shown)
    return found


# -- examples ------------------------------------------------------------------------------------------------------


def test_the_unpacked_tree_is_the_image(ground: Ground, tmp_path: Path) -> None:
    assert check(ground, tmp_path, []) == {}


def test_a_file_written_and_left_as_it_was_is_no_change(ground: Ground, tmp_path: Path) -> None:
    assert check(ground, tmp_path, [Act("touch", (b"file",))]) == {}
    assert (tmp_path / "upper" / "file").exists()


def test_every_way_to_change_a_tree(ground: Ground, tmp_path: Path) -> None:
    long = b"n" * 255
    acts = [
        Act("write", (b"new", b"new\n")),
        Act("link", (b"new", b"a/new")),
        Act("unlink", (b"a/b/file",)),
        Act("replace_tree", (b"b",)),
        Act("write", (b"b/c", b"a file where a directory was")),
        Act("unlink", (b"link",)),
        Act("mkdir", (b"link",)),
        Act("write", (b"link/x", b"")),
        Act("append", (b"a/hard", b"more")),
        Act("rename", (b"file", b"c/moved")),
        Act("chown", (b"c/dev", 4_000_000_000, 3_000_000)),
        Act("setxattr", (b"caps", b"user.more", b"\xff\n=")),
        Act("unlink", (b"w" * 255,)),
        Act("mkdir", (long,)),
        Act("write", (long + b"/" + long, b"long")),
        Act("symlink", (b"t" * 300, b"pointer")),
        Act("write", (b"raw\xff\n", b"no text")),
        Act("node", (b"block", stat.S_IFBLK | 0o640, os.makedev(259, 70_000))),
        Act("node", (b"pipe", stat.S_IFIFO | 0o600, 0)),
        Act("sparse", (b"holes", 1 << 20, 300_000)),
        Act("utime", (b"new", 1_700_000_000_987_654_321)),
    ]
    found = check(ground, tmp_path, acts)
    assert found[b"/b/c"] is Sign.CHANGED
    assert found[b"/a/b/file"] is Sign.DELETED
    assert found[b"/file"] is Sign.DELETED
    assert found[b"/c/moved"] is Sign.ADDED
    assert b"/a/file" not in found, "its other name was written, and overlayfs parts the two"


@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
def test_every_compression_is_read_back(ground: Ground, tmp_path: Path, compression: str) -> None:
    acts = [Act("write", (b"big", bytes(range(256)) * 4096)), Act("rmtree", (b"a",))]
    check(ground, tmp_path, acts, packing=compression)


def test_a_renamed_directory_is_written_out_whole(ground: Ground, tmp_path: Path) -> None:
    acts = [
        Act("rename", (b"a", b"moved")),
        Act("write", (b"moved/b/more", b"below what was moved")),
        Act("unlink", (b"moved/hard",)),
        Act("mkdir", (b"a",)),
        Act("rename", (b"b/c", b"a/b")),
    ]
    found = check(ground, tmp_path, acts, "redirect_dir=on")
    assert os.getxattr(tmp_path / "upper/moved", "trusted.overlay.redirect")
    assert found[b"/moved/b/file"] is Sign.ADDED
    assert found[b"/a/b/file"] is Sign.DELETED


def test_a_file_of_which_only_the_attributes_were_copied_up_has_its_data(ground: Ground, tmp_path: Path) -> None:
    acts = [Act("chmod", (b"a/file", 0o600)), Act("rename", (b"file", b"c/moved")), Act("chmod", (b"c/moved", 0o640))]
    check(ground, tmp_path, acts, "redirect_dir=on,metacopy=on")
    assert os.getxattr(tmp_path / "upper/a/file", "trusted.overlay.metacopy") is not None
    assert os.getxattr(tmp_path / "upper/c/moved", "trusted.overlay.redirect") == b"/file"


def test_an_overlay_mounted_as_users_mount_it(ground: Ground, tmp_path: Path) -> None:
    acts = [Act("replace_tree", (b"b",)), Act("unlink", (b"file",)), Act("write", (b"b/x", b"x"))]
    check(ground, tmp_path, acts, "userxattr")
    assert os.getxattr(tmp_path / "upper/b", "user.overlay.opaque") == b"y"


def test_changes_on_top_of_changes(ground: Ground, tmp_path: Path) -> None:
    ground.overlays.changed(ground.lower, tmp_path, [Act("rmtree", (b"a",)), Act("write", (b"x", b"1"))])
    check(ground, tmp_path, [Act("mkdir", (b"a",)), Act("unlink", (b"x",)), Act("write", (b"a/file", b"2"))])


def test_sockets_are_left_out_with_a_warning(ground: Ground, tmp_path: Path) -> None:
    shown = of_seen(ground.overlays.changed(ground.lower, tmp_path, [Act("listen", (b"listening",))]))
    with committed(ground, tmp_path) as (made, warned):
        assert of_view(made) == {path: thing for path, thing in shown.items() if path != b"/listening"}
    assert warned == ["listening: a layer cannot hold a socket"]
    assert signs(ground, tmp_path)[b"/listening"] is Sign.ADDED


@pytest.mark.skipif(shutil.which("umoci") is None, reason="umoci is not installed")
def test_umoci_unpacks_what_the_overlay_showed(ground: Ground, tmp_path: Path) -> None:
    acts = [
        Act("write", (b"new", b"new\n")),
        Act("link", (b"new", b"c/new")),
        Act("replace_tree", (b"b",)),
        Act("unlink", (b"w" * 255,)),
        Act("unlink", (b"link",)),
        Act("mkdir", (b"link",)),
        Act("write", (b"link/x", b"")),
        Act("unlink", (b"a/b/file",)),
        Act("sparse", (b"holes", 1 << 20, 300_000)),
        Act("write", (b"raw\xff\n", b"no text")),
        Act("utime", (b"new", -1_500_000_000)),
        Act("chown", (b"c/dev", 4_000_000_000, 3_000_000)),
        Act("setxattr", (b"caps", b"user.more", b"\xff\n=")),
    ]
    shown = of_seen(ground.overlays.changed(ground.lower, tmp_path, acts))
    with committed(ground, tmp_path) as (made, _):
        read = of_view(made)
    # The one thing that ocifs shows otherwise (rule D9).
    assert {path for path in shown if shown[path] != read[path]} == {b"/new", b"/c/new"}
    assert read[b"/new"].mtime_ns == 0
    subprocess.run(["umoci", "unpack", "--image", tmp_path / "out:new", tmp_path / "bundle"], check=True)
    assert of_seen(looked_at(tmp_path / "bundle/rootfs")) == shown


@pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo is not installed")
@pytest.mark.parametrize(
    ("packing", "form"), [("gzip", "docker-archive:{}/copied:app:1"), ("zstd", "oci:{}/copied:app")]
)
def test_skopeo_copies_it(ground: Ground, tmp_path: Path, packing: str, form: str) -> None:
    shown = of_seen(ground.overlays.changed(ground.lower, tmp_path, [Act("rmtree", (b"a",))]))
    with committed(ground, tmp_path, packing=packing):
        pass
    copy = ["skopeo", "copy", f"oci:{tmp_path}/out:new", form.format(tmp_path)]
    subprocess.run(copy, check=True, stdout=subprocess.DEVNULL)
    with open_image(f"{tmp_path}/copied", ground.store, ImageOptions()) as made:
        assert of_view(view(made)) == shown


def looked_at(root: Path) -> dict[bytes, Seen]:
    before = os.getcwd()
    try:
        return look_here(os.fsencode(root))
    finally:
        os.chdir(before)


# -- any changes ---------------------------------------------------------------------------------------------------

PARTS = st.sampled_from([b"a", b"b", b"c", b"file", b"hard", b"link", b"new", b"x\xff"])
THERE = [
    b"a",
    b"a/b",
    b"a/file",
    b"a/hard",
    b"b",
    b"b/c",
    b"b/c/link",
    b"c",
    b"c/dev",
    b"file",
    b"caps",
    b"new",
    b"c/new",
]
PATHS = st.sampled_from(THERE) | st.lists(PARTS, min_size=1, max_size=3).map(b"/".join)
DATA = st.sampled_from([b"", b"x", b"in a\n" * 300, b"y" * 5000])
TIMES = st.sampled_from([0, 1, 1_600_000_004 * 10**9, 2**33 * 10**9 + 7])


def act(function: str, *arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[Act]:
    return st.tuples(*arguments).map(lambda drawn: Act(function, drawn))


ACTS = st.one_of(
    act("write", PATHS, DATA),
    act("append", PATHS, DATA),
    act("touch", PATHS),
    act("sparse", PATHS, st.just(300_000), st.sampled_from([0, 100_000, 299_990])),
    act("mkdir", PATHS),
    act("rmdir", PATHS),
    act("rmtree", PATHS),
    act("replace_tree", PATHS),
    act("unlink", PATHS),
    act("rename", PATHS, PATHS),
    act("link", PATHS, PATHS),
    act("symlink", PATHS, PATHS),
    act("node", PATHS, st.sampled_from([stat.S_IFIFO | 0o600, stat.S_IFCHR | 0o666]), st.just(os.makedev(1, 5))),
    act("chmod", PATHS, st.integers(0, 0o7777)),
    act("chown", PATHS, st.integers(0, 2**32 - 2), st.integers(0, 2**32 - 2)),
    act("utime", PATHS, TIMES),
    act("setxattr", PATHS, st.sampled_from([b"user.a", b"user.b"]), st.binary(min_size=1, max_size=20)),
)


@settings(max_examples=150)
@given(
    acts=st.lists(ACTS, min_size=1, max_size=15),
    options=st.sampled_from(["", "", "redirect_dir=on", "redirect_dir=on,metacopy=on", "userxattr"]),
)
def test_whatever_is_changed_comes_back(ground: Ground, acts: list[Act], options: str) -> None:
    place = Path(tempfile.mkdtemp(dir=ground.lower.parent))
    try:
        check(ground, place, acts, options)
    finally:
        shutil.rmtree(place)
