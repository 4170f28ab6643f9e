"""Fuzzes the readers of image trees with damaged ones: ``python -m tests.fuzz.fuzz_erofs --seconds 600``.

The property, `check`: whatever the bytes, `ocifs.erofs.Image` and `ocifs.image_tree.ImageTree` raise `DamagedError` and
nothing else (a changed format version aside), end, allocate no more than a small multiple of the file, and return no
name, run or piece that breaks its promises. The damage is sealed with right checksums, or nothing behind them would be
reached. Cases are numbered: a failure names its number, and ``--first N --cases 1`` repeats it.
Not here: what sound images read as; `tests/test_erofs.py` and `tests/test_image_tree.py` say that.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import mmap
import random
import struct
import tracemalloc
from typing import Final

from ocifs import image_tree
from ocifs.erofs import Image
from ocifs.erofs.layout import crc32c
from ocifs.errors import DamagedError, StaleFormatError
from ocifs.image_tree import ImageTree
from ocifs.tree import Extent, Kind, Node, Tree, Warned
from tests.fuzz.cases import run_cases
from tests.support.trees import LAYER_SIZE, directory, file, node, symlink

MEMORY_PER_BYTE: Final = 100
MEMORY_CONSTANT: Final = 1 << 20
NAMES: Final = (b".", b"..", b"file", b"x", b"", b"\xff" * 255, b"22")
_NUMBERS: Final = (
    0,
    1,
    2,
    11,
    12,
    31,
    32,
    255,
    256,
    511,
    512,
    2**15,
    2**16 - 1,
    2**31,
    2**32 - 2,
    2**32 - 1,
    2**63,
    2**64 - 1,
)


def _rich() -> Node:
    xattrs = ((b"security.capability", b"1234"), (b"user.x", b"y" * 700))
    extents = (Extent(9000, 1, 700, 3000), Extent(20_000, 2, 1, 7))
    inner = {b"%d" % number: file(number, 512, xattrs=xattrs if number % 5 == 0 else ()) for number in range(60)}
    return directory(
        {
            b"file": file(1000),
            b"sparse": node(Kind.FILE, size=30_000, extents=extents),
            b"d": directory(inner, xattrs=xattrs),
            b"link": symlink(b"x" * 30),
            b"long": symlink(b"y" * 900),
            b"unreadable": node(Kind.FILE, size=3, unreadable=True),
            b"x": node(Kind.CHAR, rdev=(1, 3)),
        }
    )


def _written(root: Node, warnings: list[Warned]) -> bytes:
    out = io.BytesIO()
    layers = [("aa" * 32, LAYER_SIZE), ("bb" * 32, LAYER_SIZE)]
    image_tree.write(Tree(root, warnings), out, layers=layers, rules_version=1, key="k")
    return out.getvalue()


SEEDS: Final = (
    _written(directory(), []),
    _written(_rich(), [Warned("T3", 1, b"/file", "a message"), Warned("H6", 2, b"/unreadable", "another")]),
    _written(directory({(b"%d" % number).ljust(1 + number % 255, b"n"): file(0) for number in range(300)}), []),
)


def reseal(raw: bytearray) -> bytes:
    """Make all checksums right, as only a mistaken writer would."""
    raw[1028:1032] = bytes(4)
    raw[1028:1032] = struct.pack("<I", crc32c(raw[1024:1536]))
    start, size = struct.unpack_from("<QQ", raw, len(raw) - 160 + 96)
    if start <= len(raw) - 160:
        hashed = b"".join(hashlib.sha256(raw[at : min(at + 65_536, start)]).digest() for at in range(0, start, 65_536))
        if start + size == len(raw) - 160 and len(hashed) == size:
            raw[start : start + size] = hashed
        raw[-48:-16] = hashlib.sha256(raw[start:-160] + raw[-160:-48] + raw[-16:]).digest()
    return bytes(raw)


def case(number: int) -> bytes:
    """Build the damaged file of case ``number``."""
    rng = random.Random(number)
    raw = bytearray(rng.choice(SEEDS))
    image_size = struct.unpack_from("<Q", raw, len(raw) - 152)[0]
    areas = (
        (1024, 1440),
        (1536, image_size),
        (1536, image_size),
        (image_size, len(raw) - 160),
        (len(raw) - 160, len(raw) - 48),
    )
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        low, high = rng.choice(areas)
        size = rng.choice((1, 2, 4, 8))
        at = rng.randrange(low, high - size)
        if rng.random() < 0.7:
            at -= at % size
        if rng.random() < 0.5:
            value = (rng.choice(_NUMBERS) % (1 << 8 * size)).to_bytes(size, "little")
        elif rng.random() < 0.5:
            value = rng.randbytes(size)
        else:
            near = int.from_bytes(raw[at : at + size], "little") + rng.choice((-32, -1, 1, 32, 512))
            value = (near % (1 << 8 * size)).to_bytes(size, "little")
        raw[at : at + size] = value
    return reseal(raw)


def use_image(image: Image, *, limit: int = 400) -> list[int]:
    """Call every method on whatever can be reached from the root, and on some nids that cannot; return those used."""
    seen: set[int] = set()
    todo = [1, 0, 2, 77, 1 << 58, (1 << 64) - 1]
    while todo and len(seen) < limit:
        nid = todo.pop()
        if nid in seen:
            continue
        seen.add(nid)
        for call in (image.inode, image.xattrs, image.readlink):
            with contextlib.suppress(DamagedError):
                call(nid)
        for name in NAMES:
            with contextlib.suppress(DamagedError):
                assert image.lookup(nid, name) is None or name
        with contextlib.suppress(DamagedError):
            for device, start, length in itertools.islice(image.extents(nid, 3, 1 << 40), 1000):
                assert length > 0
                assert (device, start) == (0, 0) or 0 <= start <= start + length <= image.device_sizes[device]
        with contextlib.suppress(DamagedError):
            position = 0
            for entry in image.readdir(nid):
                assert 0 < len(entry.name) <= 255
                assert position < entry.next_position
                position = entry.next_position
                todo.append(entry.nid)
        with contextlib.suppress(DamagedError):
            next(image.readdir(nid, 700), None)
    return sorted(seen)


def use_tree(tree: ImageTree) -> None:
    """The same for what is beside the image."""
    nids = use_image(tree.image)
    with contextlib.suppress(DamagedError):
        tree.warnings()
    with contextlib.suppress(DamagedError):
        tree.verify_all()
    layers = len(tree.metadata.layers)
    for nid in nids[:: max(1, len(nids) // 30)]:
        with contextlib.suppress(DamagedError):
            tree.origin(nid)
        with contextlib.suppress(DamagedError):
            tree.unreadable(nid)
        with contextlib.suppress(DamagedError):
            for layer, start, size in itertools.islice(tree.extents(nid, 0, 1 << 40), 1000):
                assert 0 <= layer <= layers
                assert start >= 0
                assert size > 0
    with contextlib.suppress(DamagedError):
        assert sum(piece.size for piece in tree.synthetic(0, 10_000)) == 10_000
    with contextlib.suppress(DamagedError):
        tree.read_range(0, 1 << 40)


def check(raw: bytes) -> None:
    """Assert the property for one file."""
    with contextlib.suppress(DamagedError):
        use_image(Image(raw))
    mapped = mmap.mmap(-1, len(raw))
    mapped[:] = raw
    try:
        with contextlib.suppress(DamagedError, StaleFormatError):
            use_tree(ImageTree(mapped, "case"))
    finally:
        mapped.close()


def check_memory(raw: bytes) -> None:
    """Assert that reading takes memory in proportion to the file, not to what it declares."""
    tracemalloc.start()
    try:
        check(raw)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= MEMORY_PER_BYTE * len(raw) + MEMORY_CONSTANT, f"{peak} bytes for {len(raw)}"


def run_case(number: int) -> None:
    """Make a case and check it; its memory only now and then, as that takes long."""
    raw = case(number)
    check(raw)
    if number % 20 == 0:
        check_memory(raw)


if __name__ == "__main__":
    run_cases(__doc__, run_case)
