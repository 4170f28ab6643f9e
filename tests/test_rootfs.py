"""The view of an image: paths are resolved inside it and never outside, and files read as what the layers hold."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from ocifs import image
from ocifs.errors import DamagedError, NotFoundError, OcifsError
from ocifs.image import ImageOptions
from ocifs.rootfs import (
    SYMLINK_LIMIT,
    NotADirectoryInImageError,
    NotReadableError,
    RootFS,
    SymlinkLoopError,
)
from ocifs.rootfs import view as look
from ocifs.store import Store
from ocifs.tree import Extent, Kind, Node
from tests.support import layout
from tests.support.spanned import FakeIndex
from tests.support.tarball import HARDLINK, entry, sparse_gnu, tarball
from tests.support.trees import LAYER_SIZE, content, directory, file, files, layer_bytes, node, symlink
from tests.support.viewed import viewed

LAYERS = [layer_bytes(1), layer_bytes(2)]


def chain(count: int) -> dict[bytes, Node]:
    """``link1`` → ``link2`` → … → ``etc``, ``count`` links from ``link1`` on."""
    names = [b"link%d" % number for number in range(1, count + 1)]
    return {name: symlink(target) for name, target in zip(names, [*names[1:], b"etc"], strict=True)}


HARD = file(9, 4096)
ROOT = directory(
    {
        b"etc": directory(
            {
                b"passwd": file(100, 512),
                b"deep": directory(
                    {b"er": file(1, 1024), b"down": symlink(b"/etc/passwd"), b"up": symlink(b"../passwd")}
                ),
            }
        ),
        b"hard": HARD,
        b"linked": HARD,
        b"pipe": node(Kind.FIFO),
        b"absolute": symlink(b"/etc/passwd"),
        b"relative": symlink(b"etc/passwd"),
        b"outside": symlink(b"../../../../etc/passwd"),
        b"far": symlink(b"/../../etc//./deep/../passwd"),
        b"to-etc": symlink(b"etc"),
        b"to-etc-slash": symlink(b"etc/"),
        b"to-file-slash": symlink(b"hard/"),
        b"to-root": symlink(b"/"),
        b"nowhere": symlink(b"not/there"),
        b"self": symlink(b"self"),
        b"one": symlink(b"other"),
        b"other": symlink(b"one"),
        b"gone": node(Kind.FILE, size=5, unreadable=True),
        b"\xff\n\\": file(7, 1536),
        **chain(SYMLINK_LIMIT + 1),
    }
)


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RootFS]:
    with viewed(ROOT, LAYERS, tmp_path_factory.mktemp("tree") / "tree") as (rootfs, _):
        yield rootfs


def ino(view: RootFS, *names: bytes) -> int:
    """The inode of a path without links, found step by step."""
    here = view.root
    for name in names:
        found = view.lookup(here, name)
        assert found is not None
        here = found
    return here


PASSWD = (b"etc", b"passwd")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (b"", ()),
        (b"/", ()),
        (b"//", ()),
        (b".", ()),
        (b"..", ()),
        (b"/../..", ()),
        (b"/etc/passwd", PASSWD),
        (b"etc/passwd", PASSWD),
        (b"//etc/.//passwd", PASSWD),
        (b"../../etc/passwd", PASSWD),
        (b"etc/../etc/deep/../passwd", PASSWD),
        (b"etc/", (b"etc",)),
        (b"etc/.", (b"etc",)),
        (b"etc/..", ()),
        (b"absolute", PASSWD),
        (b"relative", PASSWD),
        (b"outside", PASSWD),
        (b"far", PASSWD),
        (b"to-etc/passwd", PASSWD),
        (b"to-etc-slash/passwd", PASSWD),
        (b"to-etc/deep/er", (b"etc", b"deep", b"er")),
        (b"to-etc/..", ()),
        (b"etc/deep/down", PASSWD),
        (b"etc/deep/up", PASSWD),
        (b"to-etc/deep/up", PASSWD),
        (b"to-root/etc/passwd", PASSWD),
        (b"to-root/to-root/absolute", PASSWD),
        (b"linked", (b"hard",)),
        (b"pipe", (b"pipe",)),
        (b"\xff\n\\", (b"\xff\n\\",)),
        (b"link2", (b"etc",)),  # 40 links
        (b"link2/passwd", PASSWD),
    ],
)
def test_a_path_leads_to(view: RootFS, path: bytes, expected: tuple[bytes, ...]) -> None:
    assert view.resolve(path) == ino(view, *expected)


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        (b"not", NotFoundError, "not does not exist in the image"),
        (b"etc/not/there", NotFoundError, "etc/not/there does not exist in the image"),
        (b"nowhere", NotFoundError, "nowhere does not exist in the image"),
        (b"\xff", NotFoundError, "\\xff does not exist in the image"),
        (b"etc/" + b"n" * 300, NotFoundError, "etc/" + "n" * 300 + " does not exist in the image"),
        (b"nul\0", NotFoundError, "nul\0 does not exist in the image"),
        (b"hard/", NotADirectoryInImageError, "hard/ is not a directory"),
        (b"hard/.", NotADirectoryInImageError, "hard/. is not a directory"),
        (b"hard/..", NotADirectoryInImageError, "hard/.. goes on below something that is not a directory"),
        (b"hard/x", NotADirectoryInImageError, "hard/x goes on below something that is not a directory"),
        (b"absolute/", NotADirectoryInImageError, "absolute/ is not a directory"),
        (b"absolute/x", NotADirectoryInImageError, "absolute/x goes on below something that is not a directory"),
        (b"to-file-slash", NotADirectoryInImageError, "to-file-slash is not a directory"),
        (b"pipe/x", NotADirectoryInImageError, "pipe/x goes on below something that is not a directory"),
        (b"self", SymlinkLoopError, "self leads through too many symbolic links"),
        (b"one", SymlinkLoopError, "one leads through too many symbolic links"),
        (b"self/x", SymlinkLoopError, "self/x leads through too many symbolic links"),
        (b"link1", SymlinkLoopError, "link1 leads through too many symbolic links"),  # 41 links
        (b"link2/../to-etc", SymlinkLoopError, "link2/../to-etc leads through too many symbolic links"),
    ],
)
def test_a_path_leads_nowhere(view: RootFS, path: bytes, error: type[OcifsError], message: str) -> None:
    with pytest.raises(OcifsError) as caught:
        view.resolve(path)
    assert type(caught.value) is error
    assert str(caught.value) == message


def test_errors_of_paths_are_those_of_system_calls() -> None:
    assert (NotFoundError("").errno, NotADirectoryInImageError("").errno) == (errno.ENOENT, errno.ENOTDIR)
    assert (SymlinkLoopError("").errno, NotReadableError("").errno) == (errno.ELOOP, errno.EIO)
    kinds = (NotFoundError, NotADirectoryInImageError, SymlinkLoopError, NotReadableError)
    assert [kind.exit_code for kind in kinds] == [3, 3, 3, 4]


@pytest.mark.parametrize("name", [b"absolute", b"self", b"nowhere", b"to-etc", b"link1"])
def test_the_last_link_is_not_followed_unless_asked(view: RootFS, name: bytes) -> None:
    found = view.resolve(name, follow=False)
    assert found == ino(view, name)
    assert view.inode(found).kind is Kind.SYMLINK
    assert view.resolve(b"to-root/./" + name, follow=False) == found


def test_a_trailing_slash_follows_all_the_same(view: RootFS) -> None:
    assert view.resolve(b"to-etc/", follow=False) == ino(view, b"etc")
    assert view.resolve(b"to-etc/deep", follow=False) == ino(view, b"etc", b"deep")
    with pytest.raises(SymlinkLoopError):
        view.resolve(b"self/", follow=False)
    with pytest.raises(NotFoundError):
        view.resolve(b"nowhere/", follow=False)


# -- listing ---------------------------------------------------------------------------------------------------------


def test_listing_goes_on_from_any_position(view: RootFS) -> None:
    entries = list(view.readdir(view.root))
    assert {found.name for found in entries} == {b".", b"..", *(ROOT.children or ())}
    assert len(entries) == len({found.name for found in entries})
    for number, found in enumerate(entries):
        assert list(view.readdir(view.root, found.next_position)) == entries[number + 1 :]
        assert view.lookup(view.root, found.name) == found.nid
        assert view.inode(found.nid).kind is found.kind
    assert len({found.next_position for found in entries}) == len(entries)
    assert list(view.readdir(view.root, 0)) == entries


def test_links_and_attributes_are_as_stored(view: RootFS) -> None:
    assert view.readlink(ino(view, b"outside")) == b"../../../../etc/passwd"
    assert view.inode(ino(view, b"hard")).nlink == 2
    assert view.lookup(view.root, b"not") is None
    assert view.lookup(view.root, b"..") == view.root


# -- data ------------------------------------------------------------------------------------------------------------

FILES: dict[bytes, Node] = {
    b"empty": file(0),
    b"whole": file(20_000, 512),
    b"upper": file(5, 1024, layer=2),
    b"hole": node(Kind.FILE, size=30_000),
    b"sparse": node(
        Kind.FILE,
        size=50_000,
        extents=(Extent(0, 1, 512, 100), Extent(4096, 2, 777, 6000), Extent(40_000, 1, 9000, 10)),
    ),
    b"pieces": node(Kind.FILE, size=3000, extents=(Extent(0, 1, 600, 1000), Extent(1000, 2, 600, 2000))),
}


def read_both(view: RootFS, inode: int, offset: int, size: int) -> bytes:
    """Read with and without an event loop, which must agree."""

    blocking = bytes(view.read_blocking(inode, offset, size))

    async def read() -> bytes:
        return bytes(await view.read(inode, offset, size))

    assert trio.run(read) == blocking
    return blocking


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RootFS]:
    with viewed(directory(FILES), LAYERS, tmp_path_factory.mktemp("tree") / "tree") as (rootfs, _):
        yield rootfs


@pytest.mark.parametrize("name", FILES)
def test_a_file_reads_as_its_extents_say_with_zeros_between(data: RootFS, name: bytes) -> None:
    whole = content(FILES[name], LAYERS)
    size = len(whole)
    inode = ino(data, name)
    assert data.inode(inode).size == size
    edges = sorted({0, 1, 99, 100, 101, 999, 1000, 4095, 4096, 4097, 10_095, 10_096, 40_005, size // 2, size - 1, size})
    for start in (edge for edge in edges if 0 <= edge <= size):
        for length in (0, 1, 2, 511, 512, 4096, size, size + 100_000):
            assert read_both(data, inode, start, length) == whole[start : start + length], (start, length)


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_read_beyond_the_end(data: RootFS, name: bytes) -> None:
    size = len(content(FILES[name], LAYERS))
    for beyond in (0, 1, 4096, 1 << 40, (1 << 63) - 1 - size):
        assert read_both(data, ino(data, name), size + beyond, 100) == b""


def test_a_piece_of_one_span_is_given_without_a_copy(data: RootFS) -> None:
    data.read_blocking(ino(data, b"whole"), 0, 100)
    part = data.read_blocking(ino(data, b"whole"), 10, 100)
    assert isinstance(part, memoryview)
    assert part == LAYERS[0][522:622]


def test_what_no_layer_holds_is_not_readable(view: RootFS) -> None:
    gone = ino(view, b"gone")
    assert view.inode(gone).size == 5
    with pytest.raises(NotReadableError) as caught:
        view.check_readable(gone)
    assert str(caught.value) == (
        "no layer holds the data of this file: its layer breaks off (D6), or it is a link to nothing (H6, L2)"
    )
    with pytest.raises(DamagedError):
        view.read_blocking(gone, 0, 5)
    with pytest.raises(DamagedError):
        read_both(view, gone, 0, 5)
    view.check_readable(ino(view, b"hard"))


def test_an_error_of_a_span_is_the_reads(tmp_path: Path) -> None:
    with viewed(directory({b"f": file(9000, 512)}), LAYERS, tmp_path / "tree") as (rootfs, [one, _]):
        one.failures[1] = [DamagedError("span 1 is bad")]
        inode = ino(rootfs, b"f")
        assert bytes(rootfs.read_blocking(inode, 0, 2000)) == LAYERS[0][512:2512]
        with pytest.raises(DamagedError, match="span 1 is bad"):
            rootfs.read_blocking(inode, 2000, 2000)
        assert bytes(rootfs.read_blocking(inode, 2000, 2000)) == LAYERS[0][2512:4512]


def decoded(indexes: list[FakeIndex]) -> list[list[int]]:
    return [sorted({span for span, _ in index.decoded}) for index in indexes]


def test_only_the_spans_that_are_needed_are_decoded(tmp_path: Path) -> None:
    with viewed(directory(FILES), LAYERS, tmp_path / "tree") as (rootfs, indexes):
        rootfs.read_blocking(ino(rootfs, b"hole"), 0, 30_000)
        rootfs.read_blocking(ino(rootfs, b"sparse"), 10_200, 29_000)
        assert decoded(indexes) == [[], []]
        rootfs.read_blocking(ino(rootfs, b"sparse"), 4096, 1)
        assert decoded(indexes) == [[], [0]]
        rootfs.read_blocking(ino(rootfs, b"whole"), 6000, 10)
        assert decoded(indexes) == [[2], [0]]


@given(
    files(2), st.lists(st.tuples(st.integers(0, 90_000), st.integers(0, 90_000)), max_size=4), st.integers(300, 9000)
)
def test_any_read_of_any_file_is_that_slice_of_it(made: Node, reads: list[tuple[int, int]], span: int) -> None:
    whole = content(made, LAYERS)
    with (
        tempfile.TemporaryDirectory() as place,
        viewed(directory({b"f": made}), LAYERS, Path(place) / "tree", span=span) as (rootfs, _),
    ):
        inode = ino(rootfs, b"f")
        assert bytes(rootfs.read_blocking(inode, 0, len(whole))) == whole
        for offset, size in reads:
            assert read_both(rootfs, inode, offset, size) == whole[offset : offset + size]


def test_layers_are_as_large_as_the_tests_say() -> None:
    assert [len(data) for data in LAYERS] == [LAYER_SIZE] * 2 == [32_768] * 2


# -- a real image ----------------------------------------------------------------------------------------------------


def test_through_a_real_image_links_lead_and_sparse_files_read(tmp_path: Path) -> None:
    tar = tarball(
        entry("etc/passwd", b"root"),
        entry("up", link="../../../../../../etc/passwd"),
        sparse_gnu("sparse", [(1000, b"data"), (700_000, b"more")], 1_000_000),
        entry("large", bytes(range(256)) * 4096),
    )
    layout.write_layout(tmp_path / "image", [tar])
    expected = bytearray(1_000_000)
    expected[1000:1004], expected[700_000:700_004] = b"data", b"more"
    with (
        Store(tmp_path / "cache") as store,
        image.open_image(f"oci:{tmp_path}/image", store, ImageOptions()) as opened,
    ):
        view = look(opened)
        assert read_both(view, view.resolve(b"up"), 0, 9) == b"root"
        sparse, large = view.resolve(b"sparse"), view.resolve(b"large")
        for offset, size in ((0, 2_000_000), (998, 8), (999_999, 8), (1_000_000, 8), (1 << 60, 8), (5, 0)):
            assert read_both(view, sparse, offset, size) == bytes(expected[offset : offset + size])
        for offset, size in ((0, 1 << 20), (1, 1), (262_140, 10), (1_048_570, 100), (2 << 20, 5)):
            assert read_both(view, large, offset, size) == (bytes(range(256)) * 4096)[offset : offset + size]


def test_h6_a_link_without_a_target_cannot_be_opened(tmp_path: Path) -> None:
    layout.write_layout(tmp_path / "image", [tarball(entry("link", type=HARDLINK, link="gone"))])
    with (
        Store(tmp_path / "cache") as store,
        image.open_image(f"oci:{tmp_path}/image", store, ImageOptions(examine=True)) as opened,
    ):
        view = look(opened)
        with pytest.raises(NotReadableError, match="H6"):
            view.check_readable(view.resolve(b"link"))
        view.check_readable(view.root)
