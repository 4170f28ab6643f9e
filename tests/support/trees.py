"""Small trees to write as EROFS images, and a walk that says what an image holds.

Not here: how a tree comes out of layers (that is the merge's), images of containers (`tests.support.layout`).
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

from ocifs.erofs import Image
from ocifs.erofs.writer import Encoder
from ocifs.tree import Extent, Kind, Node, Origin

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

UUID = bytes(range(16))
LAYER_BLOCKS = 64
LAYER_SIZE = LAYER_BLOCKS * 512


def layer_bytes(number: int, size: int = LAYER_SIZE) -> bytes:
    """The uncompressed tar of a layer, of which no two blocks are alike."""
    return b"".join(f"layer {number} block {block:9}\n".encode().ljust(512, b"%c" % (33 + block % 90)) for block in
                    range(-(-size // 512)))[:size]  # fmt: skip


def node(kind: Kind, **fields: Any) -> Node:
    """A node of layer 1, entry 0."""
    return Node(kind, Origin(1, 0), **fields)


def directory(children: dict[bytes, Node] | None = None, **fields: Any) -> Node:
    return node(Kind.DIR, children=children or {}, **fields)


def file(size: int, layer_offset: int = 512, *, layer: int = 1, **fields: Any) -> Node:
    """A file whose data is one run."""
    extents = (Extent(0, layer, layer_offset, size),) if size else ()
    return node(Kind.FILE, **{"mode": 0o644, "size": size, "extents": extents, **fields})


def symlink(target: bytes, **fields: Any) -> Node:
    return node(Kind.SYMLINK, **{"mode": 0o777, "target": target, **fields})


def encoder(root: Node, layer_sizes: Sequence[int] = (LAYER_SIZE,)) -> Encoder:
    return Encoder(root, layers=[(f"{number:064x}", size) for number, size in enumerate(layer_sizes, 1)], uuid=UUID)


def encode(root: Node, layer_sizes: Sequence[int] = (LAYER_SIZE,)) -> bytes:
    out = io.BytesIO()
    encoder(root, layer_sizes).write(out)
    return out.getvalue()


def walk(root: Node) -> Iterator[tuple[bytes, Node, Node]]:
    """Every (path, node, parent) below a root, not recursive; the root as (b"", root, root)."""
    stack = [(b"", root, root)]
    while stack:
        path, here, parent = stack.pop()
        yield path, here, parent
        stack.extend((path + b"/" + name, child, here) for name, child in (here.children or {}).items())


def content(of: Node, layers: Sequence[bytes]) -> bytes:
    """What a file of the tree reads as."""
    data = bytearray(of.size)
    for extent in of.extents:
        data[extent.file_offset : extent.file_offset + extent.size] = layers[extent.layer - 1][
            extent.layer_offset : extent.layer_offset + extent.size
        ]
    return bytes(data)


def assert_same(
    image: Image, root: Node, read: Callable[[int, int], bytes], layers: Sequence[bytes]
) -> dict[bytes, int]:
    """That the image holds the tree: names, attributes, links, content (``read`` gives that of nid, size).

    Return the nid of each path.
    """
    links: dict[Node, int] = {}
    for _, here, _ in walk(root):
        links[here] = links.get(here, 0) + 1
    nid_of: dict[Node, int] = {root: 1}
    paths: dict[bytes, int] = {}
    for path, here, parent in walk(root):
        nid = nid_of[here]
        paths[path] = nid
        inode = image.inode(nid)
        subdirs = sum(child.kind is Kind.DIR for child in (here.children or {}).values())
        assert (inode.ino, inode.kind, inode.mode) == (nid, here.kind, here.kind << 12 | here.mode)
        assert (inode.uid, inode.gid, inode.mtime_ns) == (here.uid, here.gid, here.mtime_ns)
        assert inode.nlink == (2 + subdirs if here.kind is Kind.DIR else links[here])
        assert inode.rdev == (here.rdev if here.kind in {Kind.CHAR, Kind.BLOCK} else (0, 0))
        assert image.xattrs(nid) == dict(here.xattrs)
        if here.kind is Kind.DIR:
            expected = {b".": nid, b"..": nid_of[parent]}
            for name, child in (here.children or {}).items():
                found = image.lookup(nid, name)
                assert found is not None
                assert nid_of.setdefault(child, found) == found, "names of one file have one inode"
                expected[name] = found
            entries = list(image.readdir(nid))
            assert [entry.name for entry in entries] == sorted(expected)
            assert {entry.name: entry.nid for entry in entries} == expected
            assert all(image.inode(entry.nid).kind is entry.kind for entry in entries)
            assert image.lookup(nid, b"..") == nid_of[parent]
        elif here.kind is Kind.SYMLINK:
            assert image.readlink(nid) == here.target
            assert inode.size == len(here.target)
        elif here.kind is Kind.FILE:
            assert inode.size == here.size
            if not here.unreadable:
                assert read(nid, here.size) == content(here, layers)
    assert image.inode_count == len(nid_of) == len(set(nid_of.values()))
    return paths


def reader(image: Image, made: Encoder, layers: Sequence[bytes]) -> Callable[[int, int], bytes]:
    """Read files through the image's runs, the synthetic device assembled from the encoder's list."""
    synthetic = bytearray(made.synthetic_size)
    for extent in made.synthetic:
        synthetic[extent.synthetic_offset : extent.synthetic_offset + extent.size] = layers[extent.layer - 1][
            extent.layer_offset : extent.layer_offset + extent.size
        ]
    devices = [b"", *layers, bytes(synthetic)]

    def read(nid: int, size: int) -> bytes:
        pieces = [
            devices[device][start : start + length] if device else bytes(length)
            for device, start, length in image.extents(nid, 0, size)
        ]
        return b"".join(pieces)

    return read


# ---- any tree

NAMES = st.one_of(
    st.binary(min_size=1, max_size=5),
    st.binary(min_size=1, max_size=255),
    st.sampled_from([b"-", b"/".replace(b"/", b"0"), b"...", b".a", b"..a", b"\xff" * 255, b"a" * 254]),
).filter(lambda name: name not in {b".", b".."} and b"/" not in name and b"\0" not in name)  # fmt: skip
XATTR_NAMES = st.one_of(
    st.builds(
        bytes.__add__,
        st.sampled_from([b"user.", b"trusted.", b"security."]),
        st.binary(min_size=1, max_size=40).filter(lambda name: b"\0" not in name),
    ),
    st.sampled_from([b"security.capability", b"system.posix_acl_access", b"system.posix_acl_default"]),
)
XATTRS = st.dictionaries(XATTR_NAMES, st.one_of(st.binary(max_size=20), st.binary(max_size=600)), max_size=3).map(
    lambda found: tuple(sorted(found.items()))
)
ATTRIBUTES: dict[str, st.SearchStrategy[object]] = {
    "mode": st.integers(0, 0o7777),
    "uid": st.integers(0, 2**32 - 1),
    "gid": st.integers(0, 2**32 - 1),
    "mtime_ns": st.one_of(st.integers(0, 2**61), st.integers(0, 2**62 * 10**9)),
    "xattrs": st.one_of(st.just(()), XATTRS),
}


@st.composite
def files(draw: st.DrawFn, layer_count: int) -> Node:
    """A file whose data is one run, or several with holes between them, aligned or not."""
    fields = {name: draw(strategy) for name, strategy in ATTRIBUTES.items()}
    if draw(st.booleans()):
        size = draw(st.integers(0, 5000))
        return file(
            size, 512 * draw(st.integers(0, LAYER_BLOCKS - 10)), layer=draw(st.integers(1, layer_count)), **fields
        )
    extents: list[Extent] = []
    end = 0
    for _ in range(draw(st.integers(0, 4))):
        start = end + draw(st.one_of(st.just(0), st.integers(0, 9), st.integers(0, 20_000)))
        size = draw(st.integers(1, 3000))
        extents.append(Extent(start, draw(st.integers(1, layer_count)), draw(st.integers(0, LAYER_SIZE - size)), size))
        end = start + size
    size = end + draw(st.one_of(st.just(0), st.integers(0, 20_000)))
    return node(Kind.FILE, size=size, extents=tuple(extents), **fields)


@st.composite
def trees(draw: st.DrawFn, layer_count: int = 2) -> Node:
    """A directory with everything below it that a tree can have."""

    def others(kind: Kind) -> st.SearchStrategy[Node]:
        rdev = st.tuples(st.integers(0, 4095), st.integers(0, 2**20 - 1))
        target = st.one_of(st.binary(min_size=1, max_size=30), st.binary(min_size=400, max_size=4095))
        target = target.map(lambda drawn: drawn.replace(b"\0", b"0"))
        extra: dict[str, st.SearchStrategy[object]] = {}
        if kind is Kind.SYMLINK:
            extra["target"] = target
        elif kind is not Kind.FIFO:
            extra["rdev"] = rdev
        return st.builds(lambda **fields: node(kind, **fields), **ATTRIBUTES, **extra)

    leaves = st.one_of(
        files(layer_count), others(Kind.SYMLINK), others(Kind.CHAR), others(Kind.BLOCK), others(Kind.FIFO)
    )
    pool = draw(st.lists(leaves, min_size=0, max_size=8))
    below: list[Node] = []
    for _ in range(draw(st.integers(1, 4))):
        fields = {name: draw(strategy) for name, strategy in ATTRIBUTES.items()}
        names = draw(st.lists(NAMES, max_size=60, unique=True))
        children: dict[bytes, Node] = {}
        for name in names:
            if below and draw(st.integers(0, 9)) == 0:
                children[name] = below.pop()
            elif pool:
                children[name] = draw(st.sampled_from(pool))  # often the same twice: a hard link
            else:
                children[name] = directory()
        below.append(directory(children, **fields))
    root = below.pop()
    for number, rest in enumerate(below):
        assert root.children is not None
        root.children[b"rest-%d" % number] = rest
    return root
