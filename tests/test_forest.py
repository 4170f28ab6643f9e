"""Requests to a mount with views below its root, answered without mounting."""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

pyfuse3 = pytest.importorskip("pyfuse3", reason="pyfuse3 is not installed")

from ocifs.errors import DamagedError
from ocifs.forest import Document, Folder, Forest, Joined
from ocifs.fuse import FOREVER
from ocifs.rootfs import RootFS
from tests.support.trees import directory, file, layer_bytes, node
from tests.support.viewed import viewed

LAYER = layer_bytes(1)
CTX: Any = SimpleNamespace(uid=0, gid=0, pid=1, umask=0)
TOKEN: Any = None


def answer(request: Awaitable[Any]) -> Any:
    async def awaiting() -> Any:
        return await request

    return trio.run(awaiting)


class Bytes:
    """A content in memory."""

    def __init__(self, data: bytes) -> None:
        self.size = len(data)
        self._data = data

    async def read(self, offset: int, size: int) -> bytes:
        return self._data[offset : offset + size]


class Colours:
    """A provenance that says a colour of everything."""

    def names(self, view: object, nid: int) -> list[bytes]:
        del view, nid
        return [b"user.ocifs.colour"]

    async def value(self, view: object, nid: int, name: bytes) -> bytes | None:
        del view, nid
        return b"red" if name == b"user.ocifs.colour" else None


class World:
    """A forest: ``report`` and ``broken`` are made once asked for, ``tree`` is opened once entered."""

    def __init__(self, image: RootFS, joined: RootFS, *, visible: bool) -> None:
        self.made: list[str] = []
        self.gate: trio.Event | None = None

        async def report() -> Bytes:
            self.made.append("report")
            if self.gate is not None:
                await self.gate.wait()
            return Bytes(b"twelve bytes")

        async def broken() -> Bytes:
            self.made.append("broken")
            raise DamagedError("it is broken")

        async def opened() -> RootFS:
            self.made.append("tree")
            return joined

        async def known() -> Bytes:
            return Bytes(b"raw")

        views = Folder(
            {
                b"report": Document(report),
                b"broken": Document(broken),
                b"raw": Document(known, size=3),
                b"more": Folder({b"tree": Joined(opened)}),
                b"own": Folder({b"tree": Joined(opened, private=True)}, private=True),
            }
        )
        self.forest = Forest(image, views, Colours(), visible=visible)

    def find(self, *names: bytes) -> Any:
        found = answer(self.forest.getattr(pyfuse3.ROOT_INODE, CTX))
        for name in names:
            found = answer(self.forest.lookup(found.st_ino, name, CTX))
        return found

    def listed(
        self, inode: int, monkeypatch: pytest.MonkeyPatch, *, room: int = 100
    ) -> dict[bytes, tuple[int, int, int]]:
        """Names in a directory with inode, size and how long their attributes are good, so many in a reply."""
        found: dict[bytes, tuple[int, int, int]] = {}
        position, left = 0, 0

        def reply(_: object, name: bytes, entry: Any, following: int) -> bool:
            nonlocal position, left
            if not left:
                return False
            left -= 1
            assert name not in found
            found[name] = (entry.st_ino, entry.st_size, entry.attr_timeout)
            position = following
            return True

        monkeypatch.setattr(pyfuse3, "readdir_reply", reply)
        handle = answer(self.forest.opendir(inode, CTX))
        before = -1
        while before != len(found):
            before, left = len(found), room
            answer(self.forest.readdir(handle, position, TOKEN))
        return found


@pytest.fixture
def visible() -> bool:
    return False


@pytest.fixture
def world(visible: bool, tmp_path: Path) -> Iterator[World]:
    own = directory({b"lies": file(1, 512)})
    image = directory(
        {
            b".ocifs": own,
            b"file": file(5000, 512, xattrs=((b"user.a", b"1"), (b"user.ocifs.colour", b"blue"))),
            b"dir": directory({b".ocifs": file(3, 512)}),
        }
    )
    joined = directory({b"inner": file(7, 1024), b"sub": directory({})}, mode=0o700)
    with viewed(image, [LAYER], tmp_path / "one") as (view, _), viewed(joined, [LAYER], tmp_path / "two") as (other, _):
        yield World(view, other, visible=visible)


@pytest.mark.parametrize("visible", [False, True], ids=["hidden", "listed"])
@pytest.mark.parametrize("room", [1, 100])
def test_the_root_lists_the_views_only_if_they_are_visible(
    world: World, monkeypatch: pytest.MonkeyPatch, *, room: int, visible: bool
) -> None:
    found = world.listed(pyfuse3.ROOT_INODE, monkeypatch, room=room)
    expected = {b".", b"..", b"dir", b"file"} | ({b".ocifs"} if visible else set())
    assert found.keys() == expected
    views = world.find(b".ocifs")
    assert (views.st_ino, oct(views.st_mode), views.st_uid, views.st_mtime_ns) == (1 << 40 | 1, "0o40555", 0, 0)
    assert found.get(b".ocifs", (views.st_ino,))[0] == views.st_ino
    assert world.listed(views.st_ino, monkeypatch, room=room).keys() == {
        *(b".", b"..", b"report", b"broken", b"raw", b"more", b"own")
    }
    assert world.made == []


def test_the_name_is_ours_in_the_root_only(world: World) -> None:
    assert world.find(b".ocifs", b"lies").st_ino == 0
    assert world.find(b"dir", b".ocifs").st_size == 3
    assert world.find(b".ocifs", b"nothing").st_ino == 0
    with pytest.raises(pyfuse3.FUSEError) as caught:
        world.find(b".ocifs", b"n" * 256)
    assert caught.value.errno == errno.ENAMETOOLONG


def test_a_tree_is_opened_when_it_is_entered_and_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    there = world.find(b".ocifs", b"more", b"tree")
    assert oct(there.st_mode) == "0o40555"
    assert answer(world.forest.getattr(there.st_ino, CTX)).st_ino == there.st_ino
    assert world.made == []
    inner = world.find(b".ocifs", b"more", b"tree", b"inner")
    assert (inner.st_ino >> 40, inner.st_size, world.made) == (2, 7, ["tree"])
    assert world.listed(there.st_ino, monkeypatch).keys() == {b".", b"..", b"inner", b"sub"}
    handle = answer(world.forest.open(inner.st_ino, 0, CTX)).fh
    assert bytes(answer(world.forest.read(handle, 0, 100))) == LAYER[1024:1031]
    assert world.made == ["tree"]


def test_what_is_private_is_for_who_mounted(world: World) -> None:
    for names in ((b"own",), (b"own", b"tree")):
        there = world.find(b".ocifs", *names)
        assert (oct(there.st_mode), there.st_uid, there.st_gid) == ("0o40500", os.geteuid(), os.getegid())
    assert oct(world.find(b".ocifs", b"more").st_mode) == "0o40555"


def test_a_report_is_made_when_its_size_is_asked_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    found = world.listed(world.find(b".ocifs").st_ino, monkeypatch)
    assert (found[b"report"][1:], found[b"raw"][1:]) == ((0, 0), (3, FOREVER))
    assert world.made == []
    there = answer(world.forest.getattr(found[b"report"][0], CTX))
    assert (there.st_size, there.attr_timeout, world.made) == (12, FOREVER, ["report"])
    assert world.find(b".ocifs", b"report").st_size == 12
    assert bytes(answer(world.forest.read(there.st_ino, 7, 100))) == b"bytes"
    assert bytes(answer(world.forest.read(there.st_ino, 12, 100))) == b""
    assert world.listed(world.find(b".ocifs").st_ino, monkeypatch)[b"report"][1:] == (12, FOREVER)
    assert world.made == ["report"]


def test_what_many_ask_for_at_once_is_made_once(world: World) -> None:
    async def many() -> list[int]:
        world.gate = trio.Event()
        sizes: list[int] = []

        async def one() -> None:
            entry = await world.forest.lookup(pyfuse3.InodeT(1 << 40 | 1), b"report", CTX)
            sizes.append(entry.st_size)

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(one)
            await trio.testing.wait_all_tasks_blocked()
            world.gate.set()
        return sizes

    assert trio.run(many) == [12] * 5
    assert world.made == ["report"]


def test_what_cannot_be_made_is_an_error_every_time_and_a_line_in_the_log(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        with pytest.raises(pyfuse3.FUSEError) as caught:
            world.find(b".ocifs", b"broken")
        assert caught.value.errno == errno.EIO
    assert world.made == ["broken", "broken"]
    assert world.forest.errors == 2
    assert [record.getMessage() for record in caplog.records] == [
        "lookup: it is broken",
        "lookup: it is broken (2 times)",
    ]


def test_attributes_of_where_things_come_from_are_ours(world: World) -> None:
    there = world.find(b"file").st_ino
    assert answer(world.forest.listxattr(there, CTX)) == [b"user.a", b"user.ocifs.colour"]
    values = [answer(world.forest.getxattr(there, name, CTX)) for name in (b"user.a", b"user.ocifs.colour")]
    assert values == [b"1", b"red"]
    for name in (b"user.ocifs.size", b"security.capability"):
        with pytest.raises(pyfuse3.FUSEError) as caught:
            answer(world.forest.getxattr(there, name, CTX))
        assert caught.value.errno == errno.ENODATA
    report = world.find(b".ocifs", b"raw").st_ino
    assert answer(world.forest.listxattr(report, CTX)) == [b"user.ocifs.colour"]


def test_an_image_of_one_file_is_not_confused_with_views(tmp_path: Path) -> None:
    with viewed(directory({b"tty": node(kind=file(0).kind)}), [LAYER], tmp_path / "one") as (view, _):
        world = World(view, view, visible=True)
        assert world.find(b"tty").st_size == 0
        assert world.find(b".ocifs", b"more", b"tree", b"tty").st_ino == 2 << 40 | world.find(b"tty").st_ino
