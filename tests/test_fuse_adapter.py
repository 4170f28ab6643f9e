"""FUSE's questions to the view's answers, asked directly: no mount, and a view that fails as the test says.

What the kernel makes of the answers is `tests/test_mount_conformance.py`'s.
"""

from __future__ import annotations

import errno
import inspect
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
import trio

pyfuse3 = pytest.importorskip("pyfuse3", reason="without FUSE there is nothing to adapt to")

from ocifs import image  # noqa: E402
from ocifs.erofs import DirectoryEntry, Inode  # noqa: E402
from ocifs.errors import DamagedError, MachineError, NotFoundError, OcifsError, UnsupportedError  # noqa: E402
from ocifs.fuse import FOREVER, TREE_SHIFT, Adapter  # noqa: E402
from ocifs.image import ImageOptions  # noqa: E402
from ocifs.rootfs import NotReadableError, RootFS, view  # noqa: E402
from ocifs.store import Store  # noqa: E402
from tests.support import layout  # noqa: E402
from tests.support.tarball import CHAR, entry, tarball  # noqa: E402

if TYPE_CHECKING:
    from pathlib import Path

CTX = cast("Any", None)


class FailingView:
    """A view whose every method raises."""

    root = 1

    def __init__(self, error: BaseException, *, any_xattr: bool = True) -> None:
        self.error = error
        self.tree = SimpleNamespace(
            metadata=SimpleNamespace(any_xattr=any_xattr, data_size=1000, inode_count=3),
        )

    def _fail(self, *_: object) -> Any:
        raise self.error

    inode = lookup = readlink = xattrs = check_readable = _fail

    def readdir(self, *_: object) -> Iterator[DirectoryEntry]:
        yield from self._fail()  # as the real one: it fails when the first entry is asked for

    async def read(self, *_: object) -> bytes:
        raise self.error


def adapter(*views: object) -> Adapter:
    return Adapter(cast("list[RootFS]", list(views)))


CALLS: dict[str, tuple[Any, ...]] = {
    "lookup": (1, b"name", CTX),
    "getattr": (1, CTX),
    "readlink": (1, CTX),
    "readdir": (1, 0, CTX),
    "open": (1, os.O_RDONLY, CTX),
    "read": (1, 0, 4096),
    "getxattr": (1, b"user.x", CTX),
    "listxattr": (1, CTX),
}


def asked(of: Adapter, name: str, *arguments: Any) -> int:
    """Give the errno that a call is answered with."""
    with pytest.raises(pyfuse3.FUSEError) as raised:
        trio.run(getattr(of, name), *arguments)
    return int(raised.value.errno)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("error", "number"),
    [
        (DamagedError("bad"), errno.EIO),
        (MachineError("bad"), errno.EIO),
        (NotFoundError("bad"), errno.ENOENT),
        (UnsupportedError("bad"), errno.ENOTSUP),
        (NotReadableError("bad"), errno.EIO),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_expected_failure_is_answered_with_its_errno_and_logged_in_a_line(
    call: str, error: OcifsError, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    of = adapter(FailingView(error))
    assert asked(of, call, *CALLS[call]) == number
    assert of.errors == 1
    (record,) = caplog.records
    assert record.getMessage() == f"{call}: bad"
    assert record.exc_info is None


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "error", [ValueError("?"), KeyError("?"), OSError(errno.ENOENT, "?"), MemoryError(), RecursionError()], ids=repr
)
def test_a_failure_that_nobody_foresaw_is_eio_with_a_traceback_in_the_log(
    call: str, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    of = adapter(FailingView(error))
    assert asked(of, call, *CALLS[call]) == errno.EIO
    (record,) = caplog.records
    assert record.exc_info
    assert asked(of, call, *CALLS[call]) == errno.EIO  # and the next request is answered as the first was


@pytest.mark.parametrize("call", CALLS)
def test_being_cancelled_is_no_failure(call: str, caplog: pytest.LogCaptureFixture) -> None:
    """Trio ends tasks by an exception that is none of ours to catch."""

    class WaitingView(FailingView):
        async def read(self, *_: object) -> bytes:
            await trio.sleep_forever()
            raise AssertionError

    async def main() -> bool:
        with trio.CancelScope() as scope:
            scope.cancel()
            await adapter(WaitingView(ValueError())).read(cast("Any", 1), 0, 10)
        return scope.cancelled_caught

    assert trio.run(main)
    with pytest.raises(KeyboardInterrupt):
        trio.run(getattr(adapter(FailingView(KeyboardInterrupt())), call), *CALLS[call])
    assert caplog.records == []


def test_an_inode_of_a_tree_that_is_not_there_is_eio() -> None:
    assert asked(adapter(FailingView(ValueError())), "getattr", 5 << TREE_SHIFT, CTX) == errno.EIO


def test_every_operation_that_writes_is_refused() -> None:
    of = adapter(FailingView(ValueError()))
    for name in (
        "create",
        "mknod",
        "mkdir",
        "unlink",
        "rmdir",
        "symlink",
        "rename",
        "link",
        "setattr",
        "write",
        "setxattr",
    ):
        assert asked(of, name, *[None] * 3) == errno.EROFS
    assert asked(of, "removexattr", 1, b"user.x", CTX) == errno.EROFS
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC, os.O_WRONLY | os.O_APPEND):
        assert asked(of, "open", 1, flags, CTX) == errno.EROFS
    assert trio.run(of.access, 1, os.W_OK, CTX) is False
    assert trio.run(of.access, 1, os.R_OK | os.X_OK, CTX) is True


def test_every_operation_of_pyfuse3_is_answered_on_purpose() -> None:
    """What is left to pyfuse3 answers ENOSYS, which the kernel takes as "do not ask again" for these and for no other."""
    ours = {name for name, value in inspect.getmembers(Adapter, inspect.isfunction) if not name.startswith("_")}
    base = pyfuse3.Operations
    theirs = {name for name in vars(base) if not name.startswith("_") and callable(getattr(base, name))}
    left = {name for name in theirs if getattr(Adapter, name) is getattr(base, name)}
    assert left <= {"fsync", "fsyncdir", "init", "poll", "stacktrace"}
    assert theirs - left <= ours


def test_without_any_xattr_the_kernel_is_told_not_to_ask() -> None:
    of = adapter(FailingView(ValueError(), any_xattr=False))
    assert asked(of, "getxattr", 1, b"user.x", CTX) == errno.ENOSYS
    assert asked(of, "listxattr", 1, CTX) == errno.ENOSYS


def test_flush_is_asked_once() -> None:
    assert asked(adapter(FailingView(ValueError())), "flush", 1) == errno.ENOSYS


def test_names_longer_than_statfs_says_are_too_long() -> None:
    of = adapter(FailingView(DamagedError("looked")))
    assert asked(of, "lookup", 1, b"x" * 256, CTX) == errno.ENAMETOOLONG
    assert asked(of, "lookup", 1, b"x" * 255, CTX) == errno.EIO


# -- a real tree ---------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[RootFS]:
    tar = tarball(
        entry("file", b"content", mode=0o640, uid=5, gid=6, mtime="1.5", xattrs={"user.x": b"\0"}),
        entry("null", type=CHAR, rdev=(1, 3)),
        entry("link", link="file"),
    )
    layout.write_layout(tmp_path / "image", [tar])
    with Store(tmp_path / "cache") as store, image.open_image(f"oci:{tmp_path}/image", store, ImageOptions()) as opened:
        yield view(opened)


def test_attributes_are_those_of_the_tree_and_may_be_kept_for_ever(tree: RootFS) -> None:
    of = Adapter([tree])
    found = trio.run(of.lookup, 1, b"file", CTX)
    assert (found.st_mode, found.st_uid, found.st_gid, found.st_size) == (0o100640, 5, 6, 7)
    assert (found.st_mtime_ns, found.st_ctime_ns, found.st_atime_ns) == (1_500_000_000,) * 3
    assert (found.entry_timeout, found.attr_timeout, found.generation) == (FOREVER, FOREVER, 0)
    assert trio.run(of.getattr, found.st_ino, CTX) is found
    assert trio.run(of.lookup, 1, b"null", CTX).st_rdev == os.makedev(1, 3)
    assert trio.run(of.readlink, trio.run(of.lookup, 1, b"link", CTX).st_ino, CTX) == b"file"
    assert trio.run(of.getxattr, found.st_ino, b"user.x", CTX) == b"\0"
    assert asked(of, "getxattr", found.st_ino, b"user.y", CTX) == errno.ENODATA
    assert bytes(trio.run(of.read, found.st_ino, 2, 100)) == b"ntent"


def test_a_missing_name_is_an_answer_that_may_be_kept(tree: RootFS) -> None:
    found = trio.run(Adapter([tree]).lookup, 1, b"none", CTX)
    assert (found.st_ino, found.entry_timeout) == (0, FOREVER)


def test_a_forest_keeps_its_trees_apart(tree: RootFS) -> None:
    of = Adapter([tree, tree])
    second = trio.run(of.lookup, 1 << TREE_SHIFT | 1, b"file", CTX)
    first = trio.run(of.lookup, 1, b"file", CTX)
    assert second.st_ino == 1 << TREE_SHIFT | first.st_ino
    assert bytes(trio.run(of.read, second.st_ino, 0, 100)) == b"content"


def test_opened_files_keep_their_pages(tree: RootFS) -> None:
    of = Adapter([tree])
    ino = trio.run(of.lookup, 1, b"file", CTX).st_ino
    opened = trio.run(of.open, ino, os.O_RDONLY, CTX)
    assert (opened.fh, opened.keep_cache, opened.direct_io) == (ino, True, False)


def test_attributes_are_kept_up_to_a_bound(tree: RootFS, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ocifs.fuse.ATTRIBUTES_KEPT", 2)
    of = Adapter([tree])
    for name in (b"file", b"null", b"link", b"file"):
        assert isinstance(tree.inode(trio.run(of.lookup, 1, name, CTX).st_ino), Inode)
    assert len(of._attributes) == 2
