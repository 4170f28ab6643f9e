"""The bbolt reader: against databases written by hand, and hostile ones."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ocifs.errors import DamagedError, OcifsError, UnsupportedError
from ocifs.sources.bbolt import Bucket, Database
from tests.support.bolt import BRANCH, LEAF, Content, Writer


def database(raw: bytes) -> Database:
    return Database(lambda offset, size: raw[offset : offset + size], len(raw))


def everything(bucket: Bucket) -> Content:
    found: dict[bytes, Any] = dict(bucket.items())
    for key, inner in bucket.buckets():
        found[key] = everything(inner)
    return found


SMALL: Content = {b"a": {b"x": b"1", b"y": b"", b"deep": {b"": b"2", b"z": {b"k": b"v"}}}, b"b": {}, b"c": b"value"}


@pytest.mark.parametrize("page_size", [1024, 4096, 16384, 65536])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("inline", [True, False])
def test_nested_buckets_come_out_as_they_went_in(page_size: int, order: str, inline: bool) -> None:
    assert everything(database(Writer(page_size, order, inline=inline).write(SMALL)).root) == SMALL


def test_many_keys_over_branches_come_in_order() -> None:
    content: Content = {b"big": {b"key %05d" % number: b"value %d" % number for number in range(3000)}}
    big = database(Writer(1024).write(content)).root.bucket(b"big")
    assert big is not None
    assert list(big.items()) == [(b"key %05d" % number, b"value %d" % number) for number in range(3000)]


def test_a_value_longer_than_a_page_overflows() -> None:
    content: Content = {b"b": {b"long": b"x" * 10_000, b"next": b"y"}}
    assert everything(database(Writer(1024).write(content)).root) == content


def test_buckets_and_values_are_found_by_key() -> None:
    root = database(Writer().write(SMALL)).root
    inner = root.bucket(b"a", b"deep", b"z")
    assert inner is not None
    assert inner.get(b"k") == b"v"
    assert inner.get(b"l") is None
    assert root.bucket(b"a", b"missing", b"z") is None
    assert root.bucket(b"c") is None
    assert root.get(b"a") is None


def test_the_valid_meta_page_of_the_newest_transaction_counts() -> None:
    raw = bytearray(Writer().write({b"a": {b"k": b"v"}}, transaction=6))
    raw[16 + 20] ^= 1  # the first meta page no longer has its checksum
    assert everything(database(bytes(raw)).root) == {b"a": {b"k": b"v"}}
    newer = Writer()
    newer.next = 10
    other = newer.bucket_pages({b"new": b"er"})
    raw = bytearray(Writer().write({b"a": {b"k": b"v"}}, transaction=6, tail=20))
    for number, page in newer.pages.items():
        raw[number * 4096 : (number + 1) * 4096] = page
    raw[4096:8192] = newer.meta(1, other, 20, 7)
    assert everything(database(bytes(raw)).root) == {b"new": b"er"}


def test_a_later_transaction_is_noticed() -> None:
    raw = bytearray(Writer().write({b"a": {b"k": b"v"}}, transaction=6))
    opened = Database(lambda offset, size: bytes(raw[offset : offset + size]), len(raw))
    assert opened.is_current()
    raw[4096:8192] = Writer().meta(1, 3, 20, 7)
    assert not opened.is_current()


@pytest.mark.parametrize("raw", [b"", b"\0" * 65536, b"SQLite format 3\0" * 4096, Writer().write(SMALL)[:60]])
def test_what_is_no_database_is_damaged(raw: bytes) -> None:
    with pytest.raises(DamagedError, match="no bbolt database"):
        database(raw)


def test_another_version_is_unsupported() -> None:
    raw = bytearray(Writer().write(SMALL))
    raw[20:24] = struct.pack("<I", 9)
    with pytest.raises(UnsupportedError, match="bbolt format 9"):
        database(bytes(raw))


def hostile(change: dict[int, bytes], pages: int = 12, root: int = 3) -> Bucket:
    """Make a database out of given pages."""
    writer = Writer()
    raw = bytearray(pages * 4096)
    for number, page in {0: writer.meta(0, root, pages, 2), 1: writer.meta(1, root, pages, 1), **change}.items():
        raw[number * 4096 : number * 4096 + len(page)] = page
    return database(bytes(raw)).root


def branch_to(number: int, *children: int) -> bytes:
    writer = Writer()
    return writer.page(
        number, BRANCH, len(children), writer.branch_body([(b"k%d" % child, child) for child in children])
    )


def header(number: int, flags: int, count: int, overflow: int) -> bytes:
    return struct.pack("<QHHI", number, flags, count, overflow)


@pytest.mark.parametrize(
    ("pages", "message"),
    [
        ({3: branch_to(3, 3)}, "page 3 is reached twice"),
        ({3: branch_to(3, 4), 4: branch_to(4, 3)}, "page 3 is reached twice"),
        ({3: branch_to(3, 4, 4), 4: header(4, LEAF, 0, 0)}, "page 4 is reached twice"),
        ({3: branch_to(3, 0)}, "page 0 is outside"),
        ({3: branch_to(3, 12)}, "page 12 is outside"),
        ({3: branch_to(3, 2**64 - 1)}, "is outside"),
        ({3: header(4, LEAF, 0, 0)}, "says that it is page 4"),
        ({3: header(3, 0x40, 0, 0)}, "neither branch nor leaf"),
        ({3: header(3, LEAF, 65535, 0)}, "65535 elements"),
        ({3: header(3, LEAF, 0, 2**32 - 1)}, "says that it has"),
        ({3: header(3, LEAF, 1, 0) + struct.pack("<IIII", 0, 2**32 - 1, 2**32 - 1, 2**32 - 1)}, "not its own"),
        ({3: header(3, LEAF, 1, 0) + struct.pack("<IIII", 0, 0, 4, 4)}, "not its own"),
        (
            {3: header(3, LEAF, 2, 0) + struct.pack("<IIIIIIII", 0, 32, 0, 4000, 0, 16, 0, 4000)},
            "not its own",
        ),
    ],
)
def test_pages_that_lie_are_damaged(pages: dict[int, bytes], message: str) -> None:
    with pytest.raises(DamagedError, match=message):
        list(hostile(pages).items())


def test_a_bucket_without_a_header_is_damaged() -> None:
    writer = Writer()
    with pytest.raises(DamagedError, match="header has 3 bytes"):
        list(hostile({3: writer.page(3, LEAF, 1, writer.leaf_body([(b"k", b"abc", True)]))}).buckets())


def test_pages_shared_by_many_buckets_are_damaged_before_they_are_a_bomb() -> None:
    writer = Writer()
    shared = struct.pack("<QQ", 4, 0)
    top = writer.page(3, LEAF, 80, writer.leaf_body([(b"%03d" % number, shared, True) for number in range(80)]))
    bottom = writer.page(4, LEAF, 1, writer.leaf_body([(b"k", b"v" * 3000, False)]))
    root = hostile({3: top, 4: bottom}, pages=5)
    with pytest.raises(DamagedError, match="share their pages"):
        for _, bucket in root.buckets():
            list(bucket.items())


def test_a_deep_tree_is_damaged() -> None:
    with pytest.raises(DamagedError, match="pages deep"):
        list(hostile({number: branch_to(number, number + 1) for number in range(3, 99)}, pages=100).items())


keys = st.binary(max_size=20)
contents = st.recursive(
    st.dictionaries(keys, st.binary(max_size=300), max_size=8),
    lambda inner: st.dictionaries(keys, st.one_of(st.binary(max_size=30), inner), max_size=8),
    max_leaves=12,
)


@given(contents, st.booleans())
def test_any_content_is_read_back(content: Content, inline: bool) -> None:
    assert everything(database(Writer(1024, inline=inline).write(content)).root) == content


_GOOD = Writer(1024).write({**SMALL, b"big": {b"key %05d" % number: b"value %d" % number for number in range(200)}})


@settings(max_examples=500)
@given(st.lists(st.tuples(st.integers(2048, len(_GOOD) - 8), st.binary(min_size=1, max_size=8)), max_size=6), st.data())
def test_any_damage_is_an_ocifs_error(changes: list[tuple[int, bytes]], data: st.DataObject) -> None:
    raw = bytearray(_GOOD)
    for offset, noise in changes:
        raw[offset : offset + len(noise)] = noise
    if data.draw(st.booleans()):
        del raw[data.draw(st.integers(0, len(raw))) :]
    try:
        everything(database(bytes(raw)).root)
    except OcifsError as error:
        assert "\n" not in str(error)
