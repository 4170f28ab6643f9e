"""FUSE requests answered without mounting: types, errnos, timeouts, inode numbers."""

from __future__ import annotations

import errno
import inspect
import logging
import os
import stat
from collections.abc import Awaitable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

pyfuse3 = pytest.importorskip("pyfuse3", reason="pyfuse3 is not installed")

from ocifs import errors, fuse
from ocifs.errors import DamagedError, OcifsError
from ocifs.fuse import FOREVER, Adapter, DeviceAdapter
from ocifs.rootfs import NotADirectoryInImageError, NotReadableError, SymlinkLoopError
from ocifs.tree import Kind
from tests.support.spanned import FakeIndex
from tests.support.trees import directory, file, layer_bytes, node, symlink
from tests.support.viewed import viewed

LAYER = layer_bytes(1)
CTX: Any = SimpleNamespace(uid=0, gid=0, pid=1, umask=0)
TOKEN: Any = None
"""What pyfuse3 writes a listing into."""
SECOND = 1 << 40


def answer(request: Awaitable[Any]) -> Any:
    async def awaiting() -> Any:
        return await request

    return trio.run(awaiting)


def refusal(request: Awaitable[Any]) -> int:
    with pytest.raises(pyfuse3.FUSEError) as caught:
        answer(request)
    number: int = caught.value.errno
    return number


def tree(**extra: Any) -> Any:
    return directory(
        {
            b"file": file(5000, 512, mode=0o4751, uid=1000, gid=2**32 - 1, mtime_ns=1_700_000_000_123_456_789),
            b"link": symlink(b"\xff/target"),
            b"tty": node(Kind.CHAR, rdev=(4095, 1_048_575), mode=0o620),
            b"disk": node(Kind.BLOCK, rdev=(8, 1)),
            b"fifo": node(Kind.FIFO),
            b"gone": node(Kind.FILE, size=5, unreadable=True),
            b"dir": directory({b"inner": file(7, 1024)}),
            **{name.encode(): made for name, made in extra.items()},
        }
    )


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Adapter, list[FakeIndex]]]:
    made = tree(x=file(1, 512, xattrs=((b"user.a", b"\0\xff"), (b"user.b", b""))))
    with viewed(made, [LAYER], tmp_path / "tree") as (view, indexes):
        yield Adapter([view]), indexes


@pytest.fixture
def adapter(served: tuple[Adapter, list[FakeIndex]]) -> Adapter:
    return served[0]


def find(adapter: Adapter, *names: bytes, root: int = 1) -> int:
    for name in names:
        root = answer(adapter.lookup(root, name, CTX)).st_ino
    return root


# -- names and attributes --------------------------------------------------------------------------------------------


def test_a_name_is_answered_for_ever_with_all_its_attributes(adapter: Adapter) -> None:
    entry = answer(adapter.lookup(1, b"file", CTX))
    assert stat.filemode(entry.st_mode) == "-rwsr-x--x"
    assert (entry.st_uid, entry.st_gid, entry.st_size, entry.st_nlink) == (1000, 2**32 - 1, 5000, 1)
    assert (entry.st_blksize, entry.st_blocks, entry.st_rdev) == (131_072, 10, 0)
    assert {entry.st_mtime_ns, entry.st_ctime_ns, entry.st_atime_ns} == {1_700_000_000_123_456_789}
    assert (entry.generation, entry.entry_timeout, entry.attr_timeout) == (0, 10**9, 10**9)
    assert answer(adapter.getattr(entry.st_ino, CTX)).st_ino == entry.st_ino


@pytest.mark.parametrize(
    ("name", "mode", "rdev"),
    [
        (b"tty", stat.S_IFCHR | 0o620, os.makedev(4095, 1_048_575)),
        (b"disk", stat.S_IFBLK | 0o755, os.makedev(8, 1)),
        (b"fifo", stat.S_IFIFO | 0o755, 0),
        (b"link", stat.S_IFLNK | 0o777, 0),
        (b"dir", stat.S_IFDIR | 0o755, 0),
    ],
)
def test_every_kind_of_entry(adapter: Adapter, name: bytes, mode: int, rdev: int) -> None:
    entry = answer(adapter.lookup(1, name, CTX))
    assert (entry.st_mode, entry.st_rdev) == (mode, rdev)


def test_a_name_that_does_not_exist_is_inode_0_for_ever_and_no_error(adapter: Adapter) -> None:
    entry = answer(adapter.lookup(1, b"not", CTX))
    assert (entry.st_ino, entry.entry_timeout) == (0, FOREVER)
    assert adapter.errors == 0


def test_a_name_too_long_is_told_so(adapter: Adapter) -> None:
    assert refusal(adapter.lookup(1, b"n" * 256, CTX)) == errno.ENAMETOOLONG
    assert answer(adapter.lookup(1, b"n" * 255, CTX)).st_ino == 0


def test_dot_and_dotdot_can_be_looked_up(adapter: Adapter) -> None:
    inner = find(adapter, b"dir")
    assert adapter.supports_dot_lookup
    assert (find(adapter, b".", root=inner), find(adapter, b"..", root=inner)) == (inner, 1)


def test_links_read_as_stored(adapter: Adapter) -> None:
    assert answer(adapter.readlink(find(adapter, b"link"), CTX)) == b"\xff/target"


def test_attributes_are_reused_up_to_a_number_and_then_forgotten(
    adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fuse.ATTRIBUTES_KEPT == 65_536
    monkeypatch.setattr(fuse, "ATTRIBUTES_KEPT", 3)
    names = (b"file", b"link", b"tty")
    first = {name: answer(adapter.lookup(1, name, CTX)) for name in names}
    assert all(answer(adapter.lookup(1, name, CTX)) is first[name] for name in names)
    answer(adapter.lookup(1, b"disk", CTX))
    assert len(adapter._attributes) == 3
    assert answer(adapter.lookup(1, b"tty", CTX)) is first[b"tty"]
    again = answer(adapter.lookup(1, b"file", CTX))
    assert again is not first[b"file"]
    assert again.st_ino == first[b"file"].st_ino
    assert again.st_size == 5000


def listed(adapter: Adapter, monkeypatch: pytest.MonkeyPatch, inode: int, *, room: int) -> list[tuple[bytes, int]]:
    """List a directory by requests that take ``room`` entries each; (name, inode) in order."""
    found: list[tuple[bytes, int]] = []
    left = 0
    position = 0

    def reply(_token: object, name: bytes, entry: Any, following: int) -> bool:
        nonlocal left, position
        if not left:
            return False
        left -= 1
        found.append((name, entry.st_ino))
        position = following
        return True

    monkeypatch.setattr(pyfuse3, "readdir_reply", reply)
    handle = answer(adapter.opendir(inode, CTX))
    before = -1
    while before != len(found):
        before, left = len(found), room
        answer(adapter.readdir(handle, position, TOKEN))
    answer(adapter.releasedir(handle))
    return found


@pytest.mark.parametrize("room", [1, 2, 3, 100])
def test_a_directory_is_listed_whole_however_little_a_reply_holds(
    adapter: Adapter, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    found = listed(adapter, monkeypatch, 1, room=room)
    assert sorted(name for name, _ in found) == [
        *(b".", b"..", b"dir", b"disk", b"fifo", b"file", b"gone", b"link", b"tty", b"x")
    ]
    assert all(inode == find(adapter, name) for name, inode in found)


# -- data ------------------------------------------------------------------------------------------------------------


def test_files_open_for_reading_with_pages_kept(adapter: Adapter) -> None:
    inode = find(adapter, b"file")
    info = answer(adapter.open(inode, os.O_RDONLY | os.O_NOATIME | os.O_CLOEXEC, CTX))
    assert (info.fh, info.keep_cache, info.direct_io) == (inode, True, False)
    assert answer(adapter.read(info.fh, 100, 1000)) == LAYER[612:1612]
    assert answer(adapter.read(info.fh, 4990, 1000)) == LAYER[5502:5512]
    assert answer(adapter.read(info.fh, 5000, 1000)) == b""
    assert answer(adapter.release(info.fh)) is None


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC, os.O_WRONLY | os.O_APPEND])
def test_files_do_not_open_for_writing(adapter: Adapter, flags: int) -> None:
    assert refusal(adapter.open(find(adapter, b"file"), flags, CTX)) == errno.EROFS
    assert adapter.errors == 0


def test_what_no_layer_holds_does_not_open(adapter: Adapter, caplog: pytest.LogCaptureFixture) -> None:
    assert refusal(adapter.open(find(adapter, b"gone"), os.O_RDONLY, CTX)) == errno.EIO
    assert [record.message for record in caplog.records] == [
        "open: no layer holds the data of this file: its layer breaks off (D6), or it is a link to nothing (H6, L2)"
    ]
    assert adapter.errors == 1


@pytest.mark.parametrize(
    "operation",
    [
        *("create", "mknod", "mkdir", "unlink", "rmdir", "symlink", "rename", "link", "setattr", "write"),
        *("setxattr", "removexattr"),
    ],
)
def test_nothing_can_be_written(adapter: Adapter, operation: str) -> None:
    for one in (adapter, DeviceAdapter([])):
        assert refusal(getattr(one, operation)(1, b"name", 0)) == errno.EROFS


def test_access_denies_writing_and_nothing_else(adapter: Adapter) -> None:
    modes = (os.F_OK, os.R_OK, os.X_OK, os.R_OK | os.X_OK, os.W_OK, os.R_OK | os.W_OK)
    assert [answer(adapter.access(1, mode, CTX)) for mode in modes] == [True, True, True, True, False, False]


def test_what_the_kernel_need_not_ask_again(adapter: Adapter) -> None:
    assert refusal(adapter.flush(1)) == errno.ENOSYS
    assert answer(adapter.forget([(1, 1)])) is None
    assert adapter.enable_writeback_cache is False


def test_statfs_tells_what_there_is_and_that_nothing_is_free(adapter: Adapter) -> None:
    found = answer(adapter.statfs(CTX))
    assert (found.f_bfree, found.f_bavail, found.f_ffree, found.f_favail) == (0, 0, 0, 0)
    assert (found.f_files, found.f_namemax, found.f_frsize, found.f_bsize) == (10, 255, 512, 131_072)
    assert found.f_blocks == (5000 + 7 + 1 + 511) // 512


# -- xattrs ----------------------------------------------------------------------------------------------------------


def test_xattrs_are_given_and_missing_ones_are_missing(adapter: Adapter) -> None:
    inode = find(adapter, b"x")
    assert sorted(answer(adapter.listxattr(inode, CTX))) == [b"user.a", b"user.b"]
    assert answer(adapter.getxattr(inode, b"user.a", CTX)) == b"\0\xff"
    assert answer(adapter.getxattr(inode, b"user.b", CTX)) == b""
    assert refusal(adapter.getxattr(inode, b"user.c", CTX)) == errno.ENODATA
    assert refusal(adapter.getxattr(find(adapter, b"file"), b"user.a", CTX)) == errno.ENODATA
    assert list(answer(adapter.listxattr(find(adapter, b"file"), CTX))) == []


def test_without_any_xattr_the_kernel_is_told_to_stop_asking(tmp_path: Path) -> None:
    with viewed(tree(), [LAYER], tmp_path / "tree") as (view, _):
        adapter = Adapter([view])
        assert refusal(adapter.getxattr(1, b"user.a", CTX)) == errno.ENOSYS
        assert refusal(adapter.listxattr(1, CTX)) == errno.ENOSYS


# -- a forest --------------------------------------------------------------------------------------------------------


def test_the_inodes_of_further_trees_are_shifted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = directory({b"file": file(9, 1024, xattrs=((b"user.only", b"here"),)), b"to": symlink(b"there")})
    with (
        viewed(tree(), [LAYER], tmp_path / "one") as (first, _),
        viewed(other, [LAYER], tmp_path / "two") as (second, _),
    ):
        adapter = Adapter([first, second])
        root = answer(adapter.getattr(SECOND + 1, CTX))
        assert root.st_ino == SECOND + 1
        inode = find(adapter, b"file", root=SECOND + 1)
        expected = second.lookup(1, b"file")
        assert expected is not None
        assert inode == SECOND + expected
        assert answer(adapter.getattr(inode, CTX)).st_size == 9
        assert answer(adapter.getattr(find(adapter, b"file"), CTX)).st_size == 5000
        assert answer(adapter.read(answer(adapter.open(inode, os.O_RDONLY, CTX)).fh, 0, 100)) == LAYER[1024:1033]
        assert answer(adapter.readlink(find(adapter, b"to", root=SECOND + 1), CTX)) == b"there"
        assert find(adapter, b"..", root=SECOND + 1) == SECOND + 1
        assert answer(adapter.lookup(SECOND + 1, b"not", CTX)).st_ino == 0
        found = listed(adapter, monkeypatch, SECOND + 1, room=2)
        assert {name for name, _ in found} == {b".", b"..", b"file", b"to"}
        assert all(number > SECOND for _, number in found)
        # One tree has xattrs, so the kernel must go on asking about all.
        assert answer(adapter.getxattr(inode, b"user.only", CTX)) == b"here"
        assert refusal(adapter.getxattr(find(adapter, b"file"), b"user.only", CTX)) == errno.ENODATA


def test_the_first_trees_root_must_be_what_fuse_asks_for() -> None:
    wrong: Any = SimpleNamespace(root=36)
    with pytest.raises(ValueError, match="the root of an image tree is nid 36; FUSE wants 1"):
        Adapter([wrong])


# -- errors ----------------------------------------------------------------------------------------------------------

REQUESTS = {
    "lookup": (1, b"file", CTX),
    "getattr": (2, CTX),
    "readlink": (2, CTX),
    "readdir": (1, 0, None),
    "open": (2, os.O_RDONLY, CTX),
    "read": (2, 0, 10),
    "getxattr": (2, b"user.x", CTX),
    "listxattr": (2, CTX),
    "statfs": (CTX,),
}


class Failing:
    """A view that answers everything by raising ``error``."""

    root = 1

    def __init__(self, error: BaseException) -> None:
        self._error = error
        self._ready = False
        self.tree = self

    @property
    def metadata(self) -> Any:
        if not self._ready:
            self._ready = True
            return SimpleNamespace(any_xattr=True)
        raise self._error

    def _fail(self, *_: object) -> Any:
        raise self._error

    inode = lookup = readlink = readdir = xattrs = check_readable = _fail

    async def read(self, *_: object) -> Any:
        raise self._error


def failing(error: BaseException) -> Adapter:
    view: Any = Failing(error)
    return Adapter([view])


EXPECTED = {
    "OcifsError": errno.EIO,
    "CheckFailedError": errno.EIO,
    "UsageError": errno.EINVAL,
    "NotFoundError": errno.ENOENT,
    "DamagedError": errno.EIO,
    "CacheDamagedError": errno.EIO,
    "UnsupportedError": errno.ENOTSUP,
    "MachineError": errno.EIO,
    "BusyError": errno.EBUSY,
    "StaleFormatError": errno.EIO,
    "NotReadableError": errno.EIO,
    "SymlinkLoopError": errno.ELOOP,
    "NotADirectoryInImageError": errno.ENOTDIR,
}
KINDS: list[type[OcifsError]] = [
    *(value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, OcifsError)),
    *(NotReadableError, SymlinkLoopError, NotADirectoryInImageError),
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_expected_error_is_answered_with_its_errno_and_one_line(
    kind: type[OcifsError], caplog: pytest.LogCaptureFixture
) -> None:
    adapter = failing(kind("span 3 is bad"))
    assert refusal(adapter.read(2, 0, 10)) == EXPECTED[kind.__name__]
    [record] = caplog.records
    assert (record.levelno, record.message, record.exc_info) == (logging.ERROR, "read: span 3 is bad", None)
    assert adapter.errors == 1


@pytest.mark.parametrize("operation", REQUESTS)
def test_every_operation_survives_what_nobody_foresaw(operation: str, caplog: pytest.LogCaptureFixture) -> None:
    adapter = failing(ZeroDivisionError("a bug"))
    for count in (1, 2):
        caplog.clear()
        assert refusal(getattr(adapter, operation)(*REQUESTS[operation])) == errno.EIO
        [record] = caplog.records
        assert record.levelno == logging.ERROR
        assert record.message == f"{operation} failed in a way that was not foreseen"
        assert record.exc_info is not None
        assert record.exc_info[0] is ZeroDivisionError
        assert adapter.errors == count


@pytest.mark.parametrize("operation", REQUESTS)
@pytest.mark.parametrize(
    "error", [KeyError("?"), OSError(errno.ENOENT, "?"), MemoryError(), RecursionError(), StopIteration()], ids=repr
)
def test_whatever_the_bug_is_it_is_eio(operation: str, error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    adapter = failing(error)
    for _ in range(2):
        assert refusal(getattr(adapter, operation)(*REQUESTS[operation])) == errno.EIO
    assert len(caplog.records) == 2


@pytest.mark.parametrize("operation", REQUESTS)
def test_an_interrupt_is_no_failure_of_a_request(operation: str, caplog: pytest.LogCaptureFixture) -> None:
    adapter = failing(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        answer(getattr(adapter, operation)(*REQUESTS[operation]))
    assert caplog.records == []
    assert adapter.errors == 0


def test_every_operation_of_pyfuse3_is_answered_on_purpose() -> None:
    """What is left to pyfuse3 answers ENOSYS, which the kernel takes as "do not ask again" for these and for no other."""
    ours = {name for name, value in inspect.getmembers(Adapter, inspect.isfunction) if not name.startswith("_")}
    base = pyfuse3.Operations
    theirs = {name for name in vars(base) if not name.startswith("_") and callable(getattr(base, name))}
    left = {name for name in theirs if getattr(Adapter, name) is getattr(base, name)}
    assert left <= {"fsync", "fsyncdir", "init", "poll", "stacktrace"}
    assert theirs - left <= ours


@pytest.mark.parametrize("operation", REQUESTS)
def test_every_operation_turns_expected_errors_into_errnos(operation: str) -> None:
    assert refusal(getattr(failing(DamagedError("bad")), operation)(*REQUESTS[operation])) == errno.EIO


@pytest.mark.parametrize("inode", [SECOND + 1, 5 * SECOND + 1, 1 << 60])
def test_an_inode_of_no_tree_is_an_error_and_no_end(
    adapter: Adapter, inode: int, caplog: pytest.LogCaptureFixture
) -> None:
    assert refusal(adapter.getattr(inode, CTX)) == errno.EIO
    assert len(caplog.records) == 1


def test_being_cancelled_is_no_error(served: tuple[Adapter, list[FakeIndex]]) -> None:
    """pyfuse3 ends its workers so; an answer instead would keep them from ending."""
    adapter, _ = served
    inode = find(adapter, b"file")
    ended = []

    async def sleep(*_: object) -> bytes:
        await trio.sleep_forever()
        raise AssertionError

    view: Any = adapter._trees[0]
    view.read = sleep

    async def reading() -> None:
        try:
            await adapter.read(pyfuse3.FileHandleT(inode), 0, 10)
        except trio.Cancelled:
            ended.append(True)
            raise

    async def test() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reading)
            await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()

    trio.run(test)
    assert ended == [True]
    assert adapter.errors == 0


def test_a_fuse_error_passes_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    adapter = failing(pyfuse3.FUSEError(errno.EXDEV))
    assert refusal(adapter.read(2, 0, 10)) == errno.EXDEV
    assert caplog.records == []
    assert adapter.errors == 0


def test_one_bad_span_does_not_hinder_others(served: tuple[Adapter, list[FakeIndex]]) -> None:
    adapter, [index] = served
    index.failures[0] = [DamagedError("span 0 is bad")]
    inode = find(adapter, b"file")
    assert refusal(adapter.read(inode, 0, 10)) == errno.EIO
    assert answer(adapter.read(inode, 4000, 10)) == LAYER[4512:4522]
    assert answer(adapter.read(inode, 0, 10)) == LAYER[512:522]


# -- device files ----------------------------------------------------------------------------------------------------


class Device:
    size = 8192

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error

    async def read(self, offset: int, size: int) -> bytes:
        if self._error is not None:
            raise self._error
        assert offset + size <= self.size, "it is never asked for more than it has"
        return b"%d+%d" % (offset, size)


def test_device_files_are_called_by_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = DeviceAdapter([Device()] * 12)
    root = answer(adapter.getattr(1, CTX))
    assert (root.st_ino, stat.filemode(root.st_mode)) == (1, "drwx------")
    for number in (0, 9, 11):
        entry = answer(adapter.lookup(1, b"%d" % number, CTX))
        assert (entry.st_ino, entry.st_size, stat.filemode(entry.st_mode)) == (number + 2, 8192, "-r--------")
        assert (entry.st_uid, entry.entry_timeout, entry.attr_timeout) == (os.geteuid(), FOREVER, FOREVER)
    for name in (b"12", b"x", b"-1", b"", b"..", b"00", b"01"):
        assert refusal(adapter.lookup(1, name, CTX)) == errno.ENOENT
    found: list[tuple[bytes, int]] = []

    def reply(_token: object, name: bytes, entry: Any, following: int) -> bool:
        found.append((name, following))
        assert entry.st_ino == following + 1
        return len(found) < 5

    monkeypatch.setattr(pyfuse3, "readdir_reply", reply)
    answer(adapter.readdir(1, 8, TOKEN))
    assert found == [(b"8", 9), (b"9", 10), (b"10", 11), (b"11", 12)]


def test_device_files_are_read_within_their_size() -> None:
    adapter = DeviceAdapter([Device(), Device()])
    info = answer(adapter.open(3, os.O_RDONLY, CTX))
    assert info.keep_cache
    for offset, size, expected in ((0, 100, b"0+100"), (8000, 1000, b"8000+192"), (8192, 10, b""), (9000, 10, b"")):
        assert answer(adapter.read(3, offset, size)) == expected
    assert refusal(adapter.getxattr(3, b"user.x", CTX)) == errno.ENOSYS
    assert refusal(adapter.listxattr(3, CTX)) == errno.ENOSYS


@pytest.mark.parametrize("error", [DamagedError("span 3 is bad"), ZeroDivisionError("a bug")])
def test_a_device_that_fails_is_eio_and_never_zeros(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    adapter = DeviceAdapter([Device(error)])
    assert refusal(adapter.read(2, 0, 4096)) == errno.EIO
    assert (len(caplog.records), adapter.errors) == (1, 1)
