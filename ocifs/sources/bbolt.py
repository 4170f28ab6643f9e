"""Reads bbolt databases (containerd's ``meta.db``): pages in, keys and values out.

Read-only, and pure: it is given a function that reads.

The format (go.etcd.io/bbolt: ``page.go``, ``bucket.go``, ``db.go``; it has no other specification). A database is a
file of pages, numbered from 0, of the size of a memory page where it was made; numbers are in that machine's byte
order. A page begins with ``id u64, flags u16, count u16, overflow u32`` and runs on over the next ``overflow`` pages.
Behind the header:

* meta (pages 0 and 1, written in turn): ``magic u32, version u32, page size u32, flags u32, root page u64, sequence
  u64, freelist page u64, page count u64, transaction u64, checksum u64`` — FNV-1a 64 of what is before it. The valid
  one with the higher transaction is the database. Pages are never changed in place while a meta page leads to them, so what
  is reached from one meta page is one moment, until a later transaction reuses its pages: see `Database.is_current`.
* branch: ``count`` elements ``pos u32, key size u32, page u64``: the key, ``pos`` bytes from its own element, is the
  smallest one on that page.
* leaf: ``count`` elements ``flags u32, pos u32, key size u32, value size u32``: value behind key. Flag 1: the value is
  a bucket, ``root page u64, sequence u64``; with root page 0 a leaf or branch page of its own follows inside the value.

Keys are sorted by their bytes. Every bucket is such a tree, and buckets nest.

Hostile databases: a page number, count, offset or size that points anywhere wrong is a `DamagedError`, and so are
elements that overlap. A walk visits no page twice, so loops end; nothing longer than `MAX_PAGE_RUN` is read, and all
that is read together is bounded by a small multiple of the file, so that pages cannot be shared into a bomb.

Not here: what containerd keeps in which bucket (`ocifs.sources.containerd`), writing, locking.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from ocifs.errors import DamagedError, UnsupportedError

ReadAt = Callable[[int, int], bytes]
"""Give ``size`` bytes from ``offset``, fewer only at the end of the file."""

MAX_PAGE_RUN: Final = 16 * 1024 * 1024
"""Bytes of the longest page with its overflow that is read: 16 MiB. containerd's values are a few hundred bytes."""

_MAGIC: Final = 0xED0CDAED
_VERSION: Final = 2
_PAGE_SIZES: Final = tuple(512 << shift for shift in range(8))  # 512 bytes to 64 KiB, the largest memory page of Linux
_HEADER_SIZE: Final = 16
_META_SIZE: Final = 64
_ELEMENT_SIZE: Final = 16
_BUCKET_SIZE: Final = 16
_BRANCH: Final = 0x01
_LEAF: Final = 0x02
_META: Final = 0x04
_IS_BUCKET: Final = 0x01
_READ_FACTOR: Final = 16  # times the file's size; a listing reads each page once, and the top ones a few times
_MAX_DEPTH: Final = 64  # of a tree: with two children a page, 2^64 pages


class _Meta(NamedTuple):
    order: str
    page_size: int
    root: int
    page_count: int
    transaction: int


class _Element(NamedTuple):
    """One element of a leaf. ``value`` is a slice that is made when asked for."""

    key: bytes
    is_bucket: bool
    value: bytes


def _fnv1a(data: bytes) -> int:
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value


class Bucket:
    """A sorted map from keys to values and further buckets."""

    def __init__(self, database: Database, root: int, inline: bytes | None) -> None:
        """Use `Database.root` and `bucket` instead."""
        self._database = database
        self._root = root
        self._inline = inline

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """Give every key with its value, in order; buckets are left out."""
        for element in self._elements():
            if not element.is_bucket:
                yield element.key, element.value

    def buckets(self) -> Iterator[tuple[bytes, Bucket]]:
        """Give every key with its bucket, in order."""
        for element in self._elements():
            if element.is_bucket:
                yield element.key, self._database.open_bucket(element.value)

    def bucket(self, *path: bytes) -> Bucket | None:
        """Descend into nested buckets by their keys; None if one is not there."""
        bucket = self
        for key in path:
            inner = next((found for name, found in bucket.buckets() if name == key), None)
            if inner is None:
                return None
            bucket = inner
        return bucket

    def get(self, key: bytes) -> bytes | None:
        """Give the value of ``key``; None if there is none or it is a bucket."""
        return next((value for name, value in self.items() if name == key), None)

    def _elements(self) -> Iterator[_Element]:
        if self._inline is not None:
            yield from self._database.page_elements(self._inline, None, set(), 0)
        else:
            yield from self._database.tree_elements(self._root, set(), 0)


class Database:
    """One moment of a database: the newest transaction that was complete when this was made."""

    def __init__(self, read_at: ReadAt, size: int) -> None:
        """Read the meta pages of a database of ``size`` bytes; DamagedError if it is none."""
        self._read_at = read_at
        self._size = size
        self._budget = _READ_FACTOR * size
        self._meta = self._newest()

    def _newest(self) -> _Meta:
        metas = [meta for offset in (0, *_PAGE_SIZES) if (meta := self._read_meta(offset)) is not None]
        if not metas:
            raise DamagedError("this is no bbolt database, or both of its meta pages are damaged")
        return max(metas, key=lambda meta: meta.transaction)

    def _read_meta(self, offset: int) -> _Meta | None:
        """Read the meta page at ``offset``; None if there is no valid one. Page 1 is at one page size."""
        raw = self._read_at(offset, _HEADER_SIZE + _META_SIZE)
        if len(raw) < _HEADER_SIZE + _META_SIZE:
            return None
        body = raw[_HEADER_SIZE:]
        for order in ("<", ">") if sys.byteorder == "little" else (">", "<"):
            magic, version, page_size, _, root, _, _, page_count, transaction, checksum = struct.unpack(
                order + "IIIIQQQQQQ", body
            )
            if magic != _MAGIC:
                continue
            if version != _VERSION:
                raise UnsupportedError(f"bbolt format {version} is not supported, only {_VERSION}")
            if page_size in _PAGE_SIZES and offset in {0, page_size} and _fnv1a(body[:-8]) == checksum:
                return _Meta(order, page_size, root, page_count, transaction)
        return None

    def is_current(self) -> bool:
        """Whether no transaction was completed since; if so, everything read in between belongs together.

        A database that somebody writes to may reuse the pages of this moment two transactions later.
        """
        return self._newest() == self._meta

    @property
    def root(self) -> Bucket:
        """The bucket of all buckets."""
        return Bucket(self, self._meta.root, None)

    def open_bucket(self, value: bytes) -> Bucket:
        """Make a bucket of a leaf's value."""
        if len(value) < _BUCKET_SIZE:
            raise DamagedError(f"a bucket's header has {len(value)} bytes instead of {_BUCKET_SIZE}")
        (root,) = struct.unpack_from(self._meta.order + "Q", value)
        return Bucket(self, root, value[_BUCKET_SIZE:] if root == 0 else None)

    def tree_elements(self, number: int, visited: set[int], depth: int) -> Iterator[_Element]:
        """Walk the tree below page ``number`` in the order of its keys."""
        if number in visited:
            raise DamagedError(f"page {number} is reached twice")
        if depth > _MAX_DEPTH:
            raise DamagedError(f"page {number} lies more than {_MAX_DEPTH} pages deep")
        visited.add(number)
        yield from self.page_elements(self._read_page(number), number, visited, depth)

    def page_elements(self, page: bytes, number: int | None, visited: set[int], depth: int) -> Iterator[_Element]:
        """Give the elements of a page, descending from branches. ``number`` None: the page is inside a value."""
        where = "a bucket inside a value" if number is None else f"page {number}"
        order = self._meta.order
        if len(page) < _HEADER_SIZE:
            raise DamagedError(f"{where} has {len(page)} bytes, less than its header")
        _, flags, count, _ = struct.unpack_from(order + "QHHI", page)
        if _HEADER_SIZE + count * _ELEMENT_SIZE > len(page):
            raise DamagedError(f"{where} has {count} elements, which are not all in it")
        starts = range(_HEADER_SIZE, _HEADER_SIZE + count * _ELEMENT_SIZE, _ELEMENT_SIZE)
        if flags & _LEAF:
            free = starts.stop
            for start in starts:
                kind, pos, key_size, value_size = struct.unpack_from(order + "IIII", page, start)
                key_end = start + pos + key_size
                if start + pos < free or key_end + value_size > len(page):
                    raise DamagedError(f"{where} has an element whose {key_size}+{value_size} bytes are not its own")
                free = key_end + value_size
                yield _Element(
                    page[start + pos : key_end], bool(kind & _IS_BUCKET), page[key_end : key_end + value_size]
                )
        elif flags & _BRANCH:
            for start in starts:
                (child,) = struct.unpack_from(order + "Q", page, start + 8)
                yield from self.tree_elements(child, visited, depth + 1)
        else:
            raise DamagedError(f"{where} has the flags {flags:#x}, neither branch nor leaf")

    def _read_page(self, number: int) -> bytes:
        page_size = self._meta.page_size
        if not 2 <= number < self._meta.page_count or (number + 1) * page_size > self._size:  # noqa: PLR2004 — 0 and 1 are meta pages
            raise DamagedError(f"page {number} is outside the database")
        offset = number * page_size
        page = self._read_at(offset, page_size)
        if len(page) < page_size:
            raise DamagedError(f"page {number} ends after {len(page)} bytes")
        own_number, _, _, overflow = struct.unpack_from(self._meta.order + "QHHI", page)
        if own_number != number:
            raise DamagedError(f"page {number} says that it is page {own_number}")
        size = (1 + overflow) * page_size
        if size > MAX_PAGE_RUN or offset + size > self._size:
            raise DamagedError(f"page {number} says that it has {size} bytes")
        self._budget -= size
        if self._budget < 0:
            raise DamagedError(f"page {number}: many buckets share their pages, which bbolt never writes")
        return page if overflow == 0 else self._read_at(offset, size)
