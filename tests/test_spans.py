"""Decoded spans: what the cache keeps, and how a reader finds, waits for, decodes and decodes ahead."""

from __future__ import annotations

import logging
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from ocifs.errors import DamagedError
from ocifs.spans import DEFAULT_CACHE, SLACK, DecodedSpan, SpanCache, SpanKey, SpanReader
from tests.support.spanned import SECONDS, FakeIndex, joined, layer


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        with trio.fail_after(SECONDS):
            await test()
            await trio.testing.wait_all_tasks_blocked()

    trio.run(bounded)


@contextmanager
def no_warnings_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.DEBUG):
        yield
    assert [record for record in caplog.records if record.levelno > logging.DEBUG] == []


# -- the cache -------------------------------------------------------------------------------------------------------


def kept(cache: SpanCache, key: SpanKey) -> bool:
    return cache.peek(key) is not None


def span_of(size: int, left: int = 0) -> DecodedSpan:
    """A span of which ``size`` bytes are decoded and ``left`` are not; until they are it takes 7 bytes more."""
    span = DecodedSpan()
    index, _ = layer(size + left)
    decoder: Any = index.begin(0, None)
    span.append(decoder.read(size), decoder)
    return span


def test_the_cache_is_bounded_in_bytes_and_the_least_recently_used_goes_first() -> None:
    cache = SpanCache(100)
    a, b, c, d = (SpanKey(1, number) for number in range(4))
    cache.put(a, first := span_of(40))
    cache.put(b, span_of(40))
    assert cache.size == 80
    assert cache.get(a) is first
    cache.put(c, span_of(40))  # b goes, since a was used after it
    assert (kept(cache, a), kept(cache, b), kept(cache, c), cache.size) == (True, False, True, 80)
    assert kept(cache, a)  # asking whether it is there is no use
    cache.put(d, span_of(60))
    assert (kept(cache, a), kept(cache, c), kept(cache, d), cache.size) == (False, True, True, 100)


def test_one_large_span_may_drive_out_several() -> None:
    cache = SpanCache(100)
    for number in range(10):
        cache.put(SpanKey(1, number), span_of(10))
    cache.put(SpanKey(2, 0), span_of(95))
    assert cache.size == 95
    assert [number for number in range(10) if kept(cache, SpanKey(1, number))] == []


def test_a_span_larger_than_the_cache_is_not_kept_and_drives_nothing_out() -> None:
    cache = SpanCache(100)
    cache.put(SpanKey(1, 0), span_of(50))
    cache.put(SpanKey(1, 1), span_of(101))
    assert (kept(cache, SpanKey(1, 0)), kept(cache, SpanKey(1, 1)), cache.size) == (True, False, 50)
    cache.put(SpanKey(1, 2), span_of(100))
    assert (kept(cache, SpanKey(1, 0)), kept(cache, SpanKey(1, 2)), cache.size) == (False, True, 100)


def test_a_span_under_way_takes_its_stored_bytes_too_and_may_grow() -> None:
    cache = SpanCache(100)
    span = DecodedSpan()
    index, _ = layer(80)
    decoder: Any = index.begin(0, None)
    span.append(decoder.read(50), decoder)
    cache.put(SpanKey(1, 0), span)
    cache.put(SpanKey(1, 1), span_of(40))
    assert cache.size == 50 + 7 + 40
    span.append(decoder.read(10), decoder)
    cache.put(SpanKey(1, 0), span)
    assert (kept(cache, SpanKey(1, 1)), cache.size) == (False, 67)
    span.append(decoder.read(20), decoder)
    cache.put(SpanKey(1, 0), span)
    assert (cache.size, span.size, span.decoder) == (80, 80, None)


def test_spans_of_different_layers_are_different() -> None:
    cache = SpanCache()
    cache.put(SpanKey(1, 0), one := span_of(3))
    cache.put(SpanKey(2, 0), two := span_of(3))
    assert (cache.get(SpanKey(1, 0)), cache.get(SpanKey(2, 0)), cache.get(SpanKey(2, 1))) == (one, two, None)
    cache.drop(SpanKey(1, 0))
    cache.drop(SpanKey(1, 0))
    assert (cache.get(SpanKey(1, 0)), cache.size) == (None, 3)
    assert cache.limit == DEFAULT_CACHE == 134_217_728


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 120), st.integers(0, 2), st.booleans()), max_size=60))
def test_the_cache_agrees_with_a_list(steps: list[tuple[int, int, int, bool]]) -> None:
    """The list holds (span, cost), the least recently used first; spans of which some is left cost 7 more."""
    cache, model = SpanCache(100), list[tuple[int, int]]()
    for span, size, left, reads in steps:
        old = dict(model).get(span)
        if reads:
            found = cache.get(SpanKey(1, span))
            assert (None if found is None else found.cost) == old
            if old is not None:
                model.remove((span, old))
                model.append((span, old))
            continue
        cache.put(SpanKey(1, span), span_of(size, left) if size + left else DecodedSpan())
        if old is not None:
            model.remove((span, old))
        if (cost := size + 7 * (left > 0)) <= 100:
            model.append((span, cost))
        while sum(kept for _, kept in model) > 100:
            model.pop(0)
        assert cache.size == sum(kept for _, kept in model)
        assert all(kept(cache, SpanKey(1, number)) == (number in dict(model)) for number in range(9))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 80), st.integers(0, 80))
def test_views_of_a_span_in_pieces_are_that_part_of_it(sizes: list[int], one: int, other: int) -> None:
    data = bytes(range(sum(sizes)))
    span = DecodedSpan()
    for size in sizes:
        span.append(data[span.size : span.size + size])
    start, stop = sorted((one % (len(data) + 1), other % (len(data) + 1)))
    assert joined(list(span.views(start, stop))) == data[start:stop]


# -- what a read gives -----------------------------------------------------------------------------------------------

SIZES = st.lists(st.integers(1, 50), min_size=1, max_size=8)
READS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 10**9), st.integers(0, 10**9)), max_size=12)


@given(SIZES, SIZES, READS, st.integers(0, 120), st.integers(1, 3), st.integers(0, 1))
def test_any_read_gives_that_slice_of_the_layer(
    first: list[int], second: list[int], reads: list[tuple[int, int, int]], limit: int, threads: int, together: int
) -> None:
    pairs = [layer(*first, number=1), layer(*second, number=2)]
    wanted = []
    for which, offset, size in reads:
        index = pairs[which][0]
        start = offset % (index.layer_size + 1)
        wanted.append((which + 1, start, size % (index.layer_size - start + 1)))
    expected = [pairs[number - 1][0].data[start : start + size] for number, start, size in wanted]
    blocking = SpanReader([data for _, data in pairs], SpanCache(limit), threads=threads)
    assert [joined(blocking.read_blocking(*read)) for read in wanted] == expected
    reader = SpanReader([data for _, data in pairs], SpanCache(limit), threads=threads)
    got: list[bytes] = [b""] * len(wanted)

    async def one(number: int) -> None:
        got[number] = joined(await reader.read(*wanted[number]))

    async def test() -> None:
        if together:
            async with trio.open_nursery() as nursery:
                for number in range(len(wanted)):
                    nursery.start_soon(one, number)
        else:
            for number in range(len(wanted)):
                await one(number)

    run(test)
    assert got == expected
    assert not reader.decoding()
    assert all(index.most <= threads for index, _ in pairs)


@pytest.mark.parametrize(("offset", "size", "beyond"), [(0, 31, 1), (30, 1, 1), (25, 10, 5), (100, 7, 7)])
def test_reading_beyond_the_layers_end_is_damage(offset: int, size: int, beyond: int) -> None:
    _, data = layer(10, 10, 10)
    reader = SpanReader([data])
    message = f"the image tree points {beyond} bytes beyond the end of layer 1"
    with pytest.raises(DamagedError) as caught:
        reader.read_blocking(1, offset, size)
    assert str(caught.value) == message

    async def test() -> None:
        with pytest.raises(DamagedError) as caught:
            await reader.read(1, offset, size)
        assert str(caught.value) == message

    run(test)


def test_a_span_in_the_cache_costs_no_copy_and_no_thread() -> None:
    index, data = layer(1000, 1000)
    reader = SpanReader([data])

    async def test() -> None:
        await reader.read(1, 100, 10)
        index.decoded.clear()
        [view] = await reader.read(1, 200, 50)
        assert (again := await reader.read(1, 300, 1))[0].obj is view.obj
        assert len(again) == 1
        assert view == index.data[200:250]
        assert index.decoded == []

    run(test)
    assert (reader.decoded_spans, reader.decoded_bytes) == (1, 1000)


def test_blocking_reads_share_the_cache_and_decode_whole_spans() -> None:
    index, data = layer(10, 10, 10)
    reader = SpanReader([data])
    assert joined(reader.read_blocking(1, 5, 10)) == index.data[5:15]
    assert joined(reader.read_blocking(1, 0, 20)) == index.data[:20]
    assert index.decoded == [(0, None), (1, None)]
    assert (reader.decoded_spans, reader.decoded_bytes) == (2, 20)


def test_a_walk_over_much_data_keeps_the_cache_within_its_bound() -> None:
    index, data = layer(*[1000] * 100)
    reader = SpanReader([data], SpanCache(5500))
    for span in range(100):
        assert joined(reader.read_blocking(1, span * 1000, 1000)) == index.data[span * 1000 : span * 1000 + 1000]
        assert reader.cache.size <= 5500
    assert reader.cache.size == 5000


def test_without_room_every_read_decodes() -> None:
    index, data = layer(1000)
    reader = SpanReader([data], SpanCache(0))
    for _ in range(2):
        assert joined(reader.read_blocking(1, 0, 10)) == index.data[:10]
    assert index.decoded == [(0, None)] * 2


# -- at most once at a time ------------------------------------------------------------------------------------------


def recording(reader: SpanReader) -> tuple[list[bytes], Callable[..., Awaitable[None]]]:
    """A list, and a function that reads from layer 1 and puts what it gets there."""
    got: list[bytes] = []

    async def read(start: int, size: int = 10) -> None:
        got.append(joined(await reader.read(1, start, size)))

    return got, read


def test_readers_of_one_span_wait_for_one_decode() -> None:
    index, data = layer(1000)
    index.held[0] = threading.Event()
    reader = SpanReader([data])
    got, read = recording(reader)

    async def test() -> None:
        async with trio.open_nursery() as nursery:
            for start in range(20):
                nursery.start_soon(read, start)
            await index.until_started()
            await trio.testing.wait_all_tasks_blocked()
            assert reader.decoding()
            assert got == []
            index.held[0].set()

    run(test)
    assert sorted(got) == sorted(index.data[start : start + 10] for start in range(20))
    assert index.decoded == [(0, None)]
    assert not reader.decoding()


def test_what_is_not_kept_is_given_to_those_who_waited() -> None:
    """A cache too small for anything: the second reader gets what the first decoded all the same."""
    index, data = layer(1000)
    index.held[0] = threading.Event()
    reader = SpanReader([data], SpanCache(10))
    got, read = recording(reader)

    async def test() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, 0, 1000)
            nursery.start_soon(read, 0, 1000)
            await trio.testing.wait_all_tasks_blocked()
            index.held[0].set()

    run(test)
    assert got == [index.data] * 2
    assert len(index.decoded) == 1


def test_an_error_is_shared_by_those_who_wait_and_not_remembered() -> None:
    index, data = layer(1000)
    index.held[0] = threading.Event()
    index.failures[0] = [DamagedError("span 0 is bad")]
    reader = SpanReader([data])
    told: list[str] = []

    async def read() -> None:
        with pytest.raises(DamagedError) as caught:
            await reader.read(1, 0, 10)
        told.append(str(caught.value))

    async def test() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(read)
            await index.until_started()
            await trio.testing.wait_all_tasks_blocked()
            index.held[0].set()
        assert told == ["span 0 is bad"] * 5
        assert len(index.decoded) == 1
        assert joined(await reader.read(1, 0, 10)) == index.data[:10]
        assert len(index.decoded) == 2

    run(test)


def test_what_nobody_foresaw_reaches_one_reader_and_the_others_try_themselves() -> None:
    index, data = layer(1000)
    index.held[0] = threading.Event()
    index.failures[0] = [ZeroDivisionError("a bug")]
    reader = SpanReader([data])
    seen: list[object] = []

    async def read() -> None:
        try:
            seen.append(joined(await reader.read(1, 0, 10)))
        except ZeroDivisionError as error:
            seen.append(str(error))

    async def test() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(read)
            await index.until_started()
            await trio.testing.wait_all_tasks_blocked()
            index.held[0].set()

    run(test)
    assert sorted(seen, key=str) == sorted(["a bug", index.data[:10], index.data[:10]], key=str)
    assert not reader.decoding()


def test_a_first_reader_that_is_cancelled_while_it_waits_for_a_thread_hangs_nobody() -> None:
    index, data = layer(1000, 1000, 1000)
    index.held[2] = threading.Event()
    reader = SpanReader([data], threads=1)
    got, read = recording(reader)

    async def test() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, 2000)  # has the only thread
            await index.until_started()
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as inner:
                    inner.start_soon(read, 0)  # is the first to want span 0, and waits for a thread
                    await trio.testing.wait_all_tasks_blocked()
                    nursery.start_soon(read, 5)  # waits for the one before
                    await trio.testing.wait_all_tasks_blocked()
                    scope.cancel()
            assert got == []
            await trio.testing.wait_all_tasks_blocked()
            index.held[2].set()

    run(test)
    assert sorted(got) == sorted([index.data[2000:2010], index.data[5:15]])
    assert [span for span, _ in index.decoded] == [2, 0]


def test_a_reader_that_is_cancelled_waits_for_no_thread_and_the_others_begin_anew() -> None:
    index, data = layer(LARGE)
    reader = SpanReader([data])
    got, read = recording(reader)
    hanging = threading.Event()

    async def test() -> None:
        async with trio.open_nursery() as nursery:
            await read(0)  # the span is decoded in part, and its decoder is what the thread below works with
            index.held[0] = hanging
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as inner:
                    inner.start_soon(read, LARGE - 10)
                    await index.until_started(2)
                    nursery.start_soon(read, LARGE - 20)
                    await trio.testing.wait_all_tasks_blocked()
                    del index.held[0]
                    scope.cancel()
            await index.until_started()
            await settle(reader)
            assert got == [index.data[:10], index.data[-20:-10]]
            hanging.set()
            while index.running:
                await trio.testing.wait_all_tasks_blocked(0.001)
            assert joined(await reader.read(1, 0, LARGE)) == index.data

    run(test)
    assert index.decoded == [(0, (0, 10 + SLACK)), (0, (10 + SLACK, LARGE)), (0, None)]
    assert (reader.cache.size, reader.decoded_spans, reader.decoded_bytes) == (LARGE, 2, 10 + SLACK + LARGE)


def test_a_thread_that_an_ended_loop_left_alone_takes_no_place_in_the_next() -> None:
    index, data = layer(100, 100)
    hanging = index.held[0] = threading.Event()
    reader = SpanReader([data], threads=1)

    async def given_up() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader.read, 1, 0, 10)
            await index.until_started()
            nursery.cancel_scope.cancel()

    async def read_on() -> None:
        await reader.read(1, 100, 10)

    run(given_up)
    try:
        run(read_on)
    finally:
        hanging.set()
    assert [span for span, _ in index.decoded][-1] == 1


def test_a_thread_that_was_left_alone_counts_until_it_ends() -> None:
    index, data = layer(100, 100)
    index.held[0] = threading.Event()
    reader = SpanReader([data], threads=1)
    got, read = recording(reader)

    async def test() -> None:
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as inner:
                    inner.start_soon(read, 0)
                    await index.until_started()
                    scope.cancel()
            nursery.start_soon(read, 100)
            await trio.testing.wait_all_tasks_blocked()
            assert [span for span, _ in index.decoded] == [0]
            index.held[0].set()

    run(test)
    assert got == [index.data[100:110]]
    assert (index.most, reader.cache.size) == (1, 100)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_at_most_so_many_spans_are_decoded_at_a_time(threads: int) -> None:
    index, data = layer(*[100] * 10)
    for number in range(10):
        index.held[number] = threading.Event()
    reader = SpanReader([data], threads=threads)
    got: dict[int, bytes] = {}

    async def read(number: int) -> None:
        got[number] = joined(await reader.read(1, number * 100, 100))

    async def test() -> None:
        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(read, number)
            await index.until_started(threads)
            await trio.testing.wait_all_tasks_blocked()
            assert index.running == threads
            for event in index.held.values():
                event.set()

    run(test)
    assert index.most == threads
    assert got == {number: index.data[number * 100 : number * 100 + 100] for number in range(10)}


# -- only as far as needed -------------------------------------------------------------------------------------------

LARGE = 4 * SLACK


def test_a_cold_span_is_decoded_as_far_as_needed_and_some() -> None:
    index, data = layer(LARGE, LARGE)
    reader = SpanReader([data])

    async def test() -> None:
        assert joined(await reader.read(1, 1000, 500)) == index.data[1000:1500]
        assert index.decoded == [(0, (0, 1500 + 262_144))]
        assert joined(await reader.read(1, 1500 + SLACK - 10, 10)) == index.data[1500 + SLACK - 10 : 1500 + SLACK]
        assert len(index.decoded) == 1, "the slack is there"
        assert joined(await reader.read(1, 1500 + SLACK - 10, 11)) == index.data[1500 + SLACK - 10 : 1501 + SLACK]
        assert index.decoded[1:] == [(0, (1500 + SLACK, 3000 + 2 * SLACK))], "twice as far, from where it stopped"
        assert joined(await reader.read(1, LARGE - 10, 10)) == index.data[LARGE - 10 : LARGE]
        assert index.decoded[2:] == [(0, (3000 + 2 * SLACK, LARGE))]
        assert joined(await reader.read(1, 0, LARGE)) == index.data[:LARGE]
        assert len(index.decoded) == 3

    run(test)
    assert (reader.decoded_spans, reader.decoded_bytes) == (1, LARGE)


def test_a_reader_far_behind_what_is_decoded_gets_that_and_some() -> None:
    index, data = layer(4 * LARGE)
    reader = SpanReader([data])

    async def test() -> None:
        await reader.read(1, 0, 10)
        await reader.read(1, 2 * LARGE, 10)

    run(test)
    assert index.decoded == [(0, (0, 10 + SLACK)), (0, (10 + SLACK, 2 * LARGE + 10 + SLACK))]


def test_after_a_failure_a_span_is_begun_anew() -> None:
    index, data = layer(LARGE)
    reader = SpanReader([data])

    async def test() -> None:
        await reader.read(1, 0, 10)
        index.failures[0] = [DamagedError("span 0 is bad")]
        with pytest.raises(DamagedError, match="span 0 is bad"):
            await reader.read(1, LARGE - 10, 10)
        assert joined(await reader.read(1, LARGE - 10, 10)) == index.data[-10:]

    run(test)
    assert index.decoded == [(0, (0, 10 + SLACK)), (0, (10 + SLACK, LARGE)), (0, None)]


def test_a_blocking_reader_decodes_again_what_is_there_only_in_part() -> None:
    index, data = layer(LARGE)
    reader = SpanReader([data])

    async def test() -> None:
        await reader.read(1, 0, 10)

    run(test)
    assert joined(reader.read_blocking(1, SLACK, 10)) == index.data[SLACK : SLACK + 10]
    assert len(index.decoded) == 1
    assert joined(reader.read_blocking(1, SLACK, 11)) == index.data[SLACK : SLACK + 11]
    assert index.decoded == [(0, (0, 10 + SLACK)), (0, None)]


def test_a_reader_near_the_end_decodes_the_whole_span() -> None:
    index, data = layer(LARGE)
    reader = SpanReader([data])

    async def test() -> None:
        await reader.read(1, LARGE - SLACK - 10, 10)
        assert index.decoded == [(0, None)]

    run(test)


def test_a_reader_that_needs_more_than_is_being_decoded_waits_and_then_gets_all() -> None:
    index, data = layer(LARGE)
    index.held[0] = threading.Event()
    reader = SpanReader([data])
    got, read = recording(reader)

    async def test() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, 0)
            await index.until_started()
            nursery.start_soon(read, LARGE - 10)
            await trio.testing.wait_all_tasks_blocked()
            index.held[0].set()

    run(test)
    assert got == [index.data[:10], index.data[-10:]]
    assert index.decoded == [(0, (0, 10 + SLACK)), (0, (10 + SLACK, LARGE))]


def test_a_decoder_that_gives_too_little_is_damage() -> None:
    index, data = layer(1000)
    index.short.add(0)
    reader = SpanReader([data])

    async def test() -> None:
        with pytest.raises(DamagedError) as caught:
            await reader.read(1, 0, 10)
        assert str(caught.value) == "span 0 of layer 1 decoded to 999 bytes; 1000 were expected"

    run(test)
    assert reader.cache.size == 0


def test_a_blocking_reader_of_a_decoder_that_gives_too_little_gets_damage() -> None:
    index, data = layer(1000)
    index.short.add(0)
    reader = SpanReader([data])
    with pytest.raises(DamagedError) as caught:
        reader.read_blocking(1, 990, 10)
    assert str(caught.value) == "span 0 of layer 1 decoded to 999 bytes; 1000 were expected"
    assert reader.cache.size == 0


def test_spans_that_are_not_worth_decoding_partly_are_decoded_whole() -> None:
    index, data = layer(LARGE, LARGE)
    index.partly = False
    reader = SpanReader([data])

    async def test() -> None:
        assert joined(await reader.read(1, 1000, 500)) == index.data[1000:1500]

    run(test)
    assert index.decoded == [(0, None)]
    assert reader.cache.size == LARGE


# -- ahead -----------------------------------------------------------------------------------------------------------


def spans_decoded(index: FakeIndex) -> list[int]:
    return sorted(span for span, _ in index.decoded)


async def settle(reader: SpanReader) -> None:
    """Let what is decoded ahead begin and end."""
    await trio.testing.wait_all_tasks_blocked()
    while reader.decoding():
        await trio.testing.wait_all_tasks_blocked(0.001)


def test_a_reader_that_runs_forward_finds_the_next_span_decoded(caplog: pytest.LogCaptureFixture) -> None:
    index, data = layer(*[100] * 6)
    reader = SpanReader([data])

    async def step(start: int, expected: list[int]) -> None:
        assert joined(await reader.read(1, start, 10)) == index.data[start : start + 10]
        await settle(reader)
        assert spans_decoded(index) == expected

    async def test() -> None:
        await step(0, [0])
        await step(50, [0])  # still the same span
        await step(100, [0, 1, 2])  # came from the one before: forward, so 2 is decoded ahead
        await step(150, [0, 1, 2])
        await step(200, [0, 1, 2, 3])
        await step(300, [0, 1, 2, 3, 4])
        await step(400, [0, 1, 2, 3, 4, 5])
        await step(500, [0, 1, 2, 3, 4, 5])  # nothing comes after the last

    with caplog.at_level(logging.DEBUG):
        run(test)
    assert index.decoded.count((2, None)) == 1
    assert [record.message for record in caplog.records] == []


@pytest.mark.parametrize("starts", [(500, 400, 300), (0, 200, 400), (300, 300, 300), (0, 300, 0, 500)])
def test_nothing_is_decoded_ahead_of_who_does_not_run_forward(starts: Sequence[int]) -> None:
    index, data = layer(*[100] * 6)
    reader = SpanReader([data])

    async def test() -> None:
        for start in starts:
            await reader.read(1, start, 10)
            await settle(reader)

    run(test)
    assert spans_decoded(index) == sorted({start // 100 for start in starts})


def test_running_forward_in_one_layer_says_nothing_of_another() -> None:
    one, first = layer(*[100] * 4, number=1)
    two, second = layer(*[100] * 4, number=2)
    reader = SpanReader([first, second])

    async def test() -> None:
        await reader.read(1, 0, 10)
        await reader.read(2, 100, 10)
        await settle(reader)

    run(test)
    assert (spans_decoded(one), spans_decoded(two)) == ([0], [1])


def test_one_thread_decodes_nothing_ahead() -> None:
    index, data = layer(*[100] * 4)
    reader = SpanReader([data], threads=1)

    async def test() -> None:
        await reader.read(1, 0, 10)
        await reader.read(1, 100, 10)
        await settle(reader)

    run(test)
    assert spans_decoded(index) == [0, 1]


def test_forward_readers_decode_whole_spans() -> None:
    index, data = layer(LARGE, LARGE, LARGE)
    reader = SpanReader([data])

    async def test() -> None:
        await reader.read(1, LARGE - 10, 10)
        await reader.read(1, LARGE, 10)
        await index.until_started(3)

    run(test)
    assert sorted(index.decoded[1:], key=str) == [(1, None), (2, None)]


def test_an_error_ahead_harms_nobody_and_the_reader_gets_its_own(caplog: pytest.LogCaptureFixture) -> None:
    index, data = layer(*[100] * 4)
    index.failures[2] = [DamagedError("span 2 is bad"), DamagedError("span 2 is bad"), ZeroDivisionError("a bug")]
    index.failures[3] = [ZeroDivisionError("a bug")]
    reader = SpanReader([data])

    async def test() -> None:
        await reader.read(1, 0, 10)
        assert joined(await reader.read(1, 100, 10)) == index.data[100:110]
        await settle(reader)
        assert spans_decoded(index) == [0, 1, 2]
        with pytest.raises(DamagedError, match="span 2 is bad"):
            await reader.read(1, 200, 10)
        await settle(reader)
        assert spans_decoded(index) == [0, 1, 2, 2, 3]
        assert joined(await reader.read(1, 300, 10)) == index.data[300:310]

    with no_warnings_logged(caplog):
        run(test)


def test_a_reader_waits_for_its_span_if_that_is_being_decoded_ahead() -> None:
    index, data = layer(*[100] * 4)
    index.held[2] = threading.Event()
    reader = SpanReader([data])
    got, read = recording(reader)

    async def test() -> None:
        await reader.read(1, 0, 10)
        await reader.read(1, 100, 10)
        await index.until_started(3)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, 200)
            await trio.testing.wait_all_tasks_blocked()
            assert got == []
            index.held[2].set()

    run(test)
    assert got == [index.data[200:210]]
    assert [span for span, _ in index.decoded].count(2) == 1


def test_one_read_over_two_spans_is_not_forward_until_its_reader_goes_on() -> None:
    index, data = layer(*[LARGE] * 6)
    reader = SpanReader([data])

    async def step(start: int, expected: list[tuple[int, tuple[int, int] | None]]) -> None:
        index.decoded.clear()
        assert joined(await reader.read(1, start, 20)) == index.data[start : start + 20]
        await settle(reader)
        assert sorted(index.decoded, key=str) == expected

    async def test() -> None:
        await step(LARGE - 10, [(0, None), (1, (0, 10 + SLACK))])
        await step(LARGE - 10, [])
        await step(LARGE + SLACK, [(1, (10 + SLACK, LARGE)), (2, None)])  # went on: the rest, and the next ahead
        await step(2 * LARGE - 10, [(3, None)])  # had come forward before
        await step(3 * LARGE - 10, [(4, None)])
        await step(LARGE - 10, [])
        await step(5 * LARGE - 10, [(5, (0, 10 + SLACK))])

    run(test)


def test_what_is_decoded_ahead_goes_on_from_where_it_stopped() -> None:
    index, data = layer(*[LARGE] * 4)
    reader = SpanReader([data])

    async def test() -> None:
        await reader.read(1, 2 * LARGE, 10)
        await reader.read(1, LARGE - 10, 10)
        await reader.read(1, LARGE, 10)
        await settle(reader)
        assert sorted(index.decoded[2:], key=str) == [(1, None), (2, (10 + SLACK, LARGE))]
        assert joined(await reader.read(1, 2 * LARGE, LARGE)) == index.data[2 * LARGE : 3 * LARGE]
        assert len([span for span, _ in index.decoded if span == 2]) == 2
        await settle(reader)

    run(test)
    assert (reader.decoded_spans, reader.ahead_spans) == (4, 1)  # the fourth is ahead of who read the third


@pytest.mark.parametrize(("threads", "most"), [(2, 1), (3, 2)])
def test_many_forward_readers_leave_a_thread_for_who_waits(threads: int, most: int) -> None:
    pairs = [layer(*[100] * 4, number=number) for number in range(1, 5)]
    for index, _ in pairs:
        index.held[2] = threading.Event()
    reader = SpanReader([data for _, data in pairs], threads=threads)
    other = pairs[3][0]

    async def test() -> None:
        for number in range(1, 5):
            await reader.read(number, 100, 10)  # so that what is ahead is all that is to be decoded next
            await reader.read(number, 0, 10)
        async with trio.open_nursery() as nursery:
            for number in range(1, 5):
                nursery.start_soon(reader.read, number, 100, 10)
            await trio.testing.wait_all_tasks_blocked()
            assert reader.ahead_spans == most
            assert joined(await reader.read(4, 300, 10)) == other.data[300:310]
            for index, _ in pairs:
                index.held[2].set()
        await settle(reader)

    run(test)


def test_nothing_is_decoded_ahead_while_all_threads_are_busy() -> None:
    one, first = layer(*[100] * 4, number=1)
    two, second = layer(*[100] * 4, number=2)
    two.held = {0: threading.Event(), 2: threading.Event()}
    reader = SpanReader([first, second])

    async def test() -> None:
        await reader.read(1, 100, 10)
        await reader.read(1, 0, 10)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader.read, 2, 0, 10)
            nursery.start_soon(reader.read, 2, 200, 10)
            await trio.testing.wait_all_tasks_blocked()
            await reader.read(1, 100, 10)
            await trio.testing.wait_all_tasks_blocked()
            assert reader.ahead_spans == 0
            for event in two.held.values():
                event.set()
        await reader.read(1, 150, 10)  # now there is a thread
        await settle(reader)

    run(test)
    assert spans_decoded(one) == [0, 1, 2]


def test_who_comes_for_a_thread_before_what_is_ahead_begins_gets_it() -> None:
    one, first = layer(*[100] * 4, number=1)
    two, second = layer(*[100] * 4, number=2)
    two.held = {0: threading.Event(), 2: threading.Event()}
    reader = SpanReader([first, second])

    async def test() -> None:
        await reader.read(1, 100, 10)
        await reader.read(1, 0, 10)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader.read, 2, 0, 10)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(forward_and_elsewhere)
            await trio.testing.wait_all_tasks_blocked()
            assert reader.ahead_spans == 0
            for event in two.held.values():
                event.set()

    async def forward_and_elsewhere() -> None:
        await reader.read(1, 100, 10)  # is in the cache, so the task that decodes ahead has not begun
        await reader.read(2, 200, 10)

    run(test)
    assert spans_decoded(one) == [0, 1]


def test_ending_the_loop_waits_for_nothing_that_is_decoded_ahead(caplog: pytest.LogCaptureFixture) -> None:
    index, data = layer(*[100] * 4)
    index.held[2] = threading.Event()
    reader = SpanReader([data])

    async def test() -> None:
        with trio.fail_after(SECONDS):
            await reader.read(1, 0, 10)
            await reader.read(1, 100, 10)
            await index.until_started(3)

    with no_warnings_logged(caplog):
        trio.run(test)
    assert not reader.decoding()
    assert index.running == 1
    index.held[2].set()
