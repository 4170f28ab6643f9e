"""Writes bbolt databases by hand, for tests of the reader: nested dictionaries in, a file's bytes out.

A dictionary is a bucket; its values are bytes or further dictionaries. Small buckets without buckets of their own are
put inside their parent's value, as bbolt does; larger ones get pages, with branches above as many leaves as they need.

Not here: anything about containerd but `containerd_database`, the buckets its images are in.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, Union

Content: TypeAlias = Mapping[bytes, Union[bytes, "Content"]]

MAGIC = 0xED0CDAED
BRANCH, LEAF, META, FREELIST = 1, 2, 4, 16


def fnv1a(data: bytes) -> int:
    """FNV-1a of 64 bits."""
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value


class Writer:
    """Lays out one database."""

    def __init__(self, page_size: int = 4096, order: str = "<", *, inline: bool = True) -> None:
        self.page_size = page_size
        self.order = order
        self.inline = inline
        self.pages: dict[int, bytes] = {}
        self.next = 3  # 0 and 1 are meta pages, 2 the freelist

    def write(self, root: Content, transaction: int = 2, tail: int = 0) -> bytes:
        """Give the file. ``tail`` more pages are counted and left empty."""
        number = self.bucket_pages(root)
        self.pages[2] = self.page(2, FREELIST, 0, b"")
        count = self.next + tail
        for page, written in ((0, transaction), (1, transaction - 1)):
            self.pages[page] = self.meta(page, number, count, written)
        size = self.page_size
        return b"".join(
            self.pages.get(page, bytes(size)) for page in range(count) if page in self.pages or not self.inside(page)
        )

    def inside(self, page: int) -> bool:
        """Whether a page is the overflow of one before it."""
        return any(start < page < start + len(data) // self.page_size for start, data in self.pages.items())

    def meta(self, page: int, root: int, count: int, transaction: int) -> bytes:
        """Write a meta page."""
        body = struct.pack(self.order + "IIIIQQQQQ", MAGIC, 2, self.page_size, 0, root, 0, 2, count, transaction)
        return self.page(page, META, 0, body + struct.pack(self.order + "Q", fnv1a(body)))

    def page(self, number: int, flags: int, count: int, body: bytes) -> bytes:
        """Write a page, with overflow where the body needs it."""
        total = 16 + len(body)
        pages = max(1, -(-total // self.page_size))
        header = struct.pack(self.order + "QHHI", number, flags, count, pages - 1)
        return (header + body).ljust(pages * self.page_size, b"\0")

    def put(self, flags: int, count: int, body: bytes) -> int:
        """Place a page; give its number."""
        number = self.next
        data = self.page(number, flags, count, body)
        self.pages[number] = data
        self.next += len(data) // self.page_size
        return number

    def leaf_body(self, items: Sequence[tuple[bytes, bytes, bool]]) -> bytes:
        """Write leaf elements and their data."""
        elements = b""
        data = b""
        for index, (key, value, is_bucket) in enumerate(items):
            pos = (len(items) - index) * 16 + len(data)
            elements += struct.pack(self.order + "IIII", int(is_bucket), pos, len(key), len(value))
            data += key + value
        return elements + data

    def branch_body(self, children: Sequence[tuple[bytes, int]]) -> bytes:
        """Write branch elements and their keys."""
        elements = b""
        data = b""
        for index, (key, page) in enumerate(children):
            pos = (len(children) - index) * 16 + len(data)
            elements += struct.pack(self.order + "IIQ", pos, len(key), page)
            data += key
        return elements + data

    def items(self, content: Content) -> list[tuple[bytes, bytes, bool]]:
        """Write the buckets below one, and give its elements in order."""
        found = []
        for key, value in sorted(content.items()):
            if isinstance(value, bytes):
                found.append((key, value, False))
            else:
                found.append((key, self.bucket_value(value), True))
        return found

    def bucket_value(self, content: Content) -> bytes:
        """Give the value under which a bucket is stored."""
        flat = not any(isinstance(value, Mapping) for value in content.values())
        if self.inline and flat:
            body = self.leaf_body(self.items(content))
            if len(body) < self.page_size // 4:
                page = struct.pack(self.order + "QHHI", 0, LEAF, len(content), 0) + body
                return struct.pack(self.order + "QQ", 0, 0) + page
        return struct.pack(self.order + "QQ", self.bucket_pages(content), 0)

    def bucket_pages(self, content: Content) -> int:
        """Write a bucket as pages; give its root page."""
        level: list[tuple[bytes, int]] = []
        batch: list[tuple[bytes, bytes, bool]] = []
        for item in self.items(content):
            batch.append(item)
            if len(self.leaf_body(batch)) + 16 > self.page_size and len(batch) > 1:
                level.append((batch[0][0], self.put(LEAF, len(batch) - 1, self.leaf_body(batch[:-1]))))
                batch = batch[-1:]
        level.append((batch[0][0] if batch else b"", self.put(LEAF, len(batch), self.leaf_body(batch))))
        fan_out = 8
        while len(level) > 1:
            groups = [level[start : start + fan_out] for start in range(0, len(level), fan_out)]
            level = [(group[0][0], self.put(BRANCH, len(group), self.branch_body(group))) for group in groups]
        return level[0][1]


def varint(number: int) -> bytes:
    """Write a number as Go's ``binary.PutVarint`` does."""
    value = number << 1 if number >= 0 else (~number << 1) | 1
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def containerd_database(images: Mapping[str, Mapping[str, tuple[str, str, int]]], **writer: Any) -> bytes:
    """Write a ``meta.db``: namespace → image name → (media type, digest, size)."""
    content: Content = {
        b"v1": {
            b"version": varint(3),
            **{
                namespace.encode(): {
                    b"images": {
                        name.encode(): {
                            b"createdat": bytes(15),
                            b"target": {
                                b"mediatype": media_type.encode(),
                                b"digest": digest.encode(),
                                b"size": varint(size),
                            },
                        }
                        for name, (media_type, digest, size) in of_namespace.items()
                    }
                }
                for namespace, of_namespace in images.items()
            },
        }
    }
    return Writer(**writer).write(content)
