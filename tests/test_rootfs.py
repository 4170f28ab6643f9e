"""The view of an image: where paths lead, and how its data is decoded, shared, bounded and given up.

The first half looks at a real tree; the second gives the span reader layers that decode when the test says so. No event
loop but trio's own is involved, and nothing is mounted.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import pytest
import trio
import trio.testing

from ocifs import image
from ocifs.errors import DamagedError, NotFoundError, OcifsError
from ocifs.image import ImageOptions
from ocifs.layer_data import LayerData, SpanSlice
from ocifs.rootfs import NotADirectoryInImageError, NotReadableError, RootFS, SymlinkLoopError, view
from ocifs.spans import SpanCache, SpanKey, SpanReader
from ocifs.store import Store
from tests.support import layout
from tests.support.tarball import HARDLINK, entry, sparse_gnu, tarball

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TREE = tarball(
    entry("etc/passwd", b"root"),
    entry("etc/link", link="passwd"),
    entry("etc/absolute", link="/etc/passwd"),
    entry("etc/up", link="../../../../../../etc/passwd"),
    entry("dir/"),
    entry("dir/sub/"),
    entry("to-dir", link="dir"),
    entry("to-root", link="/"),
    entry("dir/out", link="../.."),
    entry("dangling", link="nowhere/at/all"),
    entry("self", link="self"),
    entry("a", link="b"),
    entry("b", link="/a"),
    *(entry(f"chain/{number:02}", link=f"{number + 1:02}") for number in range(41)),
    entry("chain/41", b"the end"),
    entry("slash", link="etc/passwd/"),
    sparse_gnu("sparse", [(1000, b"data"), (700_000, b"more")], 1_000_000),
    entry("large", bytes(range(256)) * 4096),
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RootFS]:
    path = tmp_path_factory.mktemp("rootfs")
    layout.write_layout(path / "image", [TREE], compression="plain")
    with Store(path / "cache") as store, image.open_image(f"oci:{path}/image", store, ImageOptions()) as opened:
        yield view(opened)


def read(tree: RootFS, path: bytes) -> bytes:
    ino = tree.resolve(path)
    return bytes(tree.read_blocking(ino, 0, tree.inode(ino).size))


# -- paths ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "same"),
    [
        (b"/", b""),
        (b"", b"/"),
        (b"//etc//passwd", b"etc/passwd"),
        (b"etc/./passwd", b"etc/passwd"),
        (b"etc/../etc/passwd", b"etc/passwd"),
        (b"..", b"/"),
        (b"/../../etc/passwd", b"etc/passwd"),
        (b"etc/link", b"etc/passwd"),
        (b"etc/absolute", b"etc/passwd"),
        (b"etc/up", b"etc/passwd"),
        (b"to-dir", b"dir"),
        (b"to-dir/", b"dir"),
        (b"to-dir/sub", b"dir/sub"),
        (b"to-dir/..", b"/"),
        (b"dir/out/etc/passwd", b"etc/passwd"),
        (b"to-root/to-root/dir", b"dir"),
        (b"dir/", b"dir"),
        (b"dir/.", b"dir"),
    ],
)
def test_paths_lead_where_they_would_in_a_chroot(tree: RootFS, path: bytes, same: bytes) -> None:
    assert tree.resolve(path) == tree.resolve(same)


@pytest.mark.parametrize(
    ("path", "error"),
    [
        (b"none", NotFoundError),
        (b"none/", NotFoundError),
        (b"etc/none/passwd", NotFoundError),
        (b"dangling", NotFoundError),
        (b"etc/passwd/", NotADirectoryInImageError),
        (b"etc/passwd/.", NotADirectoryInImageError),
        (b"etc/passwd/..", NotADirectoryInImageError),
        (b"etc/passwd/x", NotADirectoryInImageError),
        (b"etc/link/", NotADirectoryInImageError),
        (b"slash", NotADirectoryInImageError),
        (b"self", SymlinkLoopError),
        (b"a", SymlinkLoopError),
        (b"b/x", SymlinkLoopError),
        (b"x" * 300, NotFoundError),
        (b"nul\0", NotFoundError),
    ],
)
def test_paths_that_lead_nowhere_say_so(tree: RootFS, path: bytes, error: type[OcifsError]) -> None:
    with pytest.raises(error) as raised:
        tree.resolve(path)
    assert type(raised.value) is error
    assert raised.value.exit_code == 3
    assert path.split(b"\0")[0].decode()[:20] in str(raised.value)


def test_forty_links_are_followed_and_not_one_more(tree: RootFS) -> None:
    assert read(tree, b"chain/01") == b"the end"
    with pytest.raises(SymlinkLoopError):
        tree.resolve(b"chain/00")


@pytest.mark.parametrize(
    ("path", "target"), [(b"etc/link", b"passwd"), (b"self", b"self"), (b"dangling", b"nowhere/at/all")]
)
def test_the_last_link_is_not_followed_if_not_asked(tree: RootFS, path: bytes, target: bytes) -> None:
    assert tree.readlink(tree.resolve(path, follow=False)) == target


def test_a_trailing_slash_follows_the_last_link_all_the_same(tree: RootFS) -> None:
    assert tree.resolve(b"to-dir/", follow=False) == tree.resolve(b"dir")


# -- data of files -------------------------------------------------------------------------------------------------


def test_reading_stops_at_the_end_and_holes_are_zeros(tree: RootFS) -> None:
    expected = bytearray(1_000_000)
    expected[1000:1004], expected[700_000:700_004] = b"data", b"more"
    ino = tree.resolve(b"sparse")
    assert bytes(tree.read_blocking(ino, 0, 2_000_000)) == expected
    assert bytes(tree.read_blocking(ino, 998, 8)) == b"\0\0data\0\0"
    assert bytes(tree.read_blocking(ino, 999_999, 8)) == b"\0"
    assert bytes(tree.read_blocking(ino, 1_000_000, 8)) == b""
    assert bytes(tree.read_blocking(ino, 1 << 60, 8)) == b""
    assert bytes(tree.read_blocking(ino, 5, 0)) == b""


def test_reading_with_and_without_an_event_loop_gives_the_same(tree: RootFS) -> None:
    ino = tree.resolve(b"large")
    for offset, size in ((0, 1 << 20), (1, 1), (262_140, 10), (1_048_570, 100), (2 << 20, 5)):
        assert bytes(trio.run(tree.read, ino, offset, size)) == (bytes(range(256)) * 4096)[offset : offset + size]
        assert bytes(tree.read_blocking(ino, offset, size)) == (bytes(range(256)) * 4096)[offset : offset + size]


def test_h6_a_link_without_a_target_cannot_be_opened(tmp_path: Path) -> None:
    layout.write_layout(tmp_path / "image", [tarball(entry("link", type=HARDLINK, link="gone"))])
    with Store(tmp_path / "cache") as store:
        options = ImageOptions(examine=True)
        with image.open_image(f"oci:{tmp_path}/image", store, options) as opened:
            tree = view(opened)
            with pytest.raises(NotReadableError, match="H6"):
                tree.check_readable(tree.resolve(b"link"))
            tree.check_readable(tree.root)


# -- spans ---------------------------------------------------------------------------------------------------------


class Range(NamedTuple):
    layer_offset: int
    size: int


SPAN = 1000


@dataclass
class Spans:
    count: int

    def __len__(self) -> int:
        return self.count

    def layer_range(self, number: int) -> Range:
        return Range(number * SPAN, SPAN)


@dataclass
class Index:
    spans: Spans


@dataclass
class Layer:
    """A layer whose spans are 1000 bytes of their number, decoded only while ``gate`` is open."""

    number: int = 1
    count: int = 10
    gate: threading.Event = field(default_factory=threading.Event)
    started: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    decoded: list[int] = field(default_factory=list)
    fail: list[Exception] = field(default_factory=list)
    """What the next decodes raise."""

    def __post_init__(self) -> None:
        self.index = Index(Spans(self.count))
        self.gate.set()

    def slices(self, layer_offset: int, size: int) -> Iterator[SpanSlice]:
        stop = min(layer_offset + size, self.count * SPAN)
        while layer_offset < stop:
            span, start = divmod(layer_offset, SPAN)
            end = min(SPAN, start + stop - layer_offset)
            yield SpanSlice(span, start, end)
            layer_offset += end - start

    def decode(self, span: int, need: int | None = None) -> bytes:
        self.decoded.append(span)
        self.started.release()
        assert self.gate.wait(30), "the test forgot the gate"
        if self.fail:
            raise self.fail.pop(0)
        return bytes([span]) * (SPAN if need is None else min(need, SPAN))


def reader(layer: Layer, limit: int = 1 << 20, threads: int = 2) -> SpanReader:
    return SpanReader([cast("LayerData", layer)], SpanCache(limit), threads=threads)


async def settled(spans: SpanReader) -> None:
    """Wait until nothing is being decoded, ahead of a reader included."""
    await trio.testing.wait_all_tasks_blocked()
    for flight in list(spans._flights.values()):
        await flight.landed.wait()


async def gathered(count: int, spans: SpanReader, offset: int, size: int) -> list[bytes | Exception]:
    """Read the same bytes from ``count`` tasks at once."""
    answers: list[bytes | Exception] = []

    async def one() -> None:
        try:
            answers.append(b"".join(await spans.read(1, offset, size)))
        except Exception as error:  # noqa: BLE001  (handed to the test)
            answers.append(error)

    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(one)
        await trio.testing.wait_all_tasks_blocked()
        for layer in spans.layers.values():
            cast("Layer", layer).gate.set()
    return answers


def test_many_readers_of_one_cold_span_decode_it_once() -> None:
    layer = Layer()
    layer.gate.clear()
    spans = reader(layer)
    assert trio.run(gathered, 32, spans, 3100, 50) == [b"\x03" * 50] * 32
    assert layer.decoded.count(3) == 1
    assert not spans.decoding()


def test_what_is_cached_is_not_decoded_again() -> None:
    layer = Layer()
    spans = reader(layer)
    for _ in range(3):
        assert trio.run(gathered, 2, spans, 5000, 1000) == [b"\x05" * 1000] * 2
    assert layer.decoded == [5]
    assert spans.decoded_spans == 1


def test_an_answer_of_one_span_is_a_view_of_it() -> None:
    layer = Layer()
    spans = reader(layer)

    async def twice() -> list[Any]:
        return [(await spans.read(1, 5000, 100))[0].obj, (await spans.read(1, 5100, 100))[0].obj]

    first, second = trio.run(twice)
    assert first is second


def test_a_read_across_spans_joins_them() -> None:
    layer = Layer()
    assert b"".join(trio.run(reader(layer).read, 1, 1990, 1020)) == b"\x01" * 10 + b"\x02" * 1000 + b"\x03" * 10
    assert b"".join(reader(layer).read_blocking(1, 1990, 1020)) == b"\x01" * 10 + b"\x02" * 1000 + b"\x03" * 10


def test_an_error_is_shared_by_those_who_wait_and_not_remembered() -> None:
    layer = Layer(fail=[DamagedError("span 3 is bad")])
    layer.gate.clear()
    spans = reader(layer)
    answers = trio.run(gathered, 8, spans, 3100, 50)
    assert [str(one) for one in answers] == ["span 3 is bad"] * 8
    assert layer.decoded == [3]
    assert trio.run(gathered, 1, spans, 3100, 50) == [b"\x03" * 50]


def test_a_failure_that_nobody_foresaw_is_not_shared() -> None:
    """Who waited tries for himself: such a failure may be the reader's own, as running out of memory is."""
    layer = Layer(fail=[MemoryError()])
    layer.gate.clear()
    answers = trio.run(gathered, 8, reader(layer), 3100, 50)
    assert sorted(type(one).__name__ for one in answers) == ["MemoryError", *["bytes"] * 7]
    assert layer.decoded == [3, 3]


def test_the_first_reader_being_cancelled_does_not_harm_the_others() -> None:
    layer = Layer()
    layer.gate.clear()
    spans = reader(layer, threads=1)

    async def main() -> tuple[bytes, bool]:
        got: list[bytes] = []
        cancelled = trio.CancelScope()

        async def first() -> None:
            with cancelled:
                await spans.read(1, 3000, 10)

        async def second() -> None:
            got.append(b"".join(await spans.read(1, 3000, 10)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(spans.read, 1, 0, 10)  # takes the only thread: the next one waits for it
            await trio.to_thread.run_sync(layer.started.acquire)
            nursery.start_soon(first)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(second)
            await trio.testing.wait_all_tasks_blocked()
            cancelled.cancel()
            await trio.testing.wait_all_tasks_blocked()
            layer.gate.set()
        return got[0], cancelled.cancelled_caught

    assert trio.run(main) == (b"\x03" * 10, True)
    assert layer.decoded == [0, 3]


def test_a_reader_that_runs_forward_finds_the_next_span_decoded() -> None:
    layer = Layer(count=4)

    async def main() -> list[int]:
        spans = reader(layer)
        for span in range(4):
            assert b"".join(await spans.read(1, span * SPAN, SPAN)) == bytes([span]) * SPAN
            await settled(spans)
        return layer.decoded

    assert trio.run(main) == [0, 1, 2, 3]


def test_a_failure_ahead_is_told_only_to_who_reads_there() -> None:
    layer = Layer(count=4)

    async def main() -> None:
        spans = reader(layer)
        await spans.read(1, 0, SPAN)
        layer.fail = []
        await spans.read(1, SPAN, 10)
        await settled(spans)
        layer.fail = [DamagedError("span 3 is bad")]
        await spans.read(1, 2 * SPAN, 10)
        await settled(spans)
        assert layer.decoded == [0, 1, 2, 3]
        assert b"".join(await spans.read(1, 3 * SPAN, 10)) == b"\x03" * 10

    trio.run(main)


def test_no_more_threads_decode_than_allowed() -> None:
    layer = Layer(count=50)
    layer.gate.clear()
    spans = reader(layer, threads=3)

    async def main() -> int:
        async with trio.open_nursery() as nursery:
            for span in range(0, 50, 7):
                nursery.start_soon(spans.read, 1, span * SPAN, 10)
            await trio.testing.wait_all_tasks_blocked()
            for _ in range(3):
                await trio.to_thread.run_sync(layer.started.acquire)
            at_once = len(layer.decoded)
            layer.gate.set()
        return at_once

    assert trio.run(main) == 3
    assert sorted(set(layer.decoded) & set(range(0, 50, 7))) == list(range(0, 50, 7))


def test_a_tree_that_points_beyond_its_layer_is_damaged() -> None:
    spans = reader(Layer(count=2))
    with pytest.raises(DamagedError, match="500 bytes beyond the end of layer 1"):
        spans.read_blocking(1, 1500, 1000)
    with pytest.raises(DamagedError, match="500 bytes beyond the end of layer 1"):
        trio.run(spans.read, 1, 1500, 1000)


# -- the cache -----------------------------------------------------------------------------------------------------


def test_the_cache_is_bounded_in_bytes_and_forgets_what_was_used_longest_ago() -> None:
    cache = SpanCache(3000)
    for number in range(3):
        cache.put(SpanKey(1, number), bytes(1000))
    assert cache.get(SpanKey(1, 0)) == bytes(1000)
    cache.put(SpanKey(1, 3), bytes(999))
    assert SpanKey(1, 1) not in cache
    assert [SpanKey(1, number) in cache for number in (0, 2, 3)] == [True, True, True]
    assert cache.size == 2999


def test_a_span_larger_than_the_cache_is_handed_out_and_not_kept() -> None:
    cache = SpanCache(100)
    cache.put(SpanKey(1, 0), bytes(60))
    cache.put(SpanKey(1, 1), bytes(101))
    assert (cache.size, SpanKey(1, 0) in cache, SpanKey(1, 1) in cache) == (60, True, False)
    layer = Layer()
    spans = reader(layer, limit=0)
    for _ in range(2):
        assert b"".join(spans.read_blocking(1, 3000, 10)) == b"\x03" * 10
    assert layer.decoded == [3, 3]


def test_a_longer_piece_of_a_span_replaces_a_shorter_one_and_not_the_other_way_round() -> None:
    cache = SpanCache(3000)
    key = SpanKey(1, 0)
    for size, kept in ((10, 10), (500, 500), (20, 500), (1000, 1000)):
        cache.put(key, bytes(size))
        found = cache.get(key)
        assert found is not None
        assert (len(found), cache.size) == (kept, kept)


def test_a_walk_over_much_data_keeps_the_cache_within_its_bound() -> None:
    layer = Layer(count=100)
    spans = reader(layer, limit=5500)
    for span in range(100):
        spans.read_blocking(1, span * SPAN, SPAN)
        assert spans.cache.size <= 5500
    assert spans.cache.size == 5000
