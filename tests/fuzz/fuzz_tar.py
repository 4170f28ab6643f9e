"""Fuzzes `ocifs.tar.TarScanner` with damaged tars: ``python -m tests.fuzz.fuzz_tar --seconds 600``.

The property, `check`: whatever the bytes, the scanner raises nothing, ends, allocates no more than a small multiple of
what it was fed plus a constant, reports the same however the bytes are cut into chunks, and reports only entries that
keep what `ocifs.tar.Entry` promises. Cases are numbered: a failure names its number, and ``--first N --cases 1``
repeats it. Not here: what the right answer is; `tests/test_tar_rules.py` and `tests/test_tar.py` say that.
"""

from __future__ import annotations

import itertools
import random
import tracemalloc
from typing import TYPE_CHECKING, Final

from ocifs.tar import EXTENSION_LIMIT, EntryType, TarScanner, TarSummary
from tests.fuzz.cases import run_cases
from tests.support import tarball as t

if TYPE_CHECKING:
    from ocifs.tar import Entry

MEMORY_PER_BYTE: Final = 40
MEMORY_CONSTANT: Final = 8 * EXTENSION_LIMIT

_SEGMENTS: Final = [(0, b"ab"), (4096, b"c" * 700), (9000, b"d")]
_MANY: Final = [(1000 * number, b"x" * 10) for number in range(30)]
SEEDS: Final = (
    t.tarball(
        t.entry("usr/", mtime=1_700_000_000),
        t.entry("usr/file", b"x" * 700, uid=1000, gid=2**31, uname="root"),
        t.entry("usr/link", link="file"),
        t.entry("usr/hard", type=t.HARDLINK, link="usr/file", size=700),
        t.entry("dev/null", type=t.CHAR, rdev=(1, 3)),
        t.entry("dev/sda", type=t.BLOCKDEV, rdev=(8, 0)),
        t.entry("fifo", type=t.FIFO),
        t.entry("name", prefix="a/prefix"),
    ),
    t.tarball(
        t.entry("n" * 150, b"d", mtime=1.5, xattrs={"user.a": b"1\n2=\0"}, pax={"uid": "70000", "size": "1"}),
        t.entry("l", link="t" * 200, pax={"atime": "-1.25", "path": "", "comment": "c"}),
        t.pax_header({"path": "global", "comment": "none"}, type=t.PAX_GLOBAL),
        t.entry("after", b"abc"),
        end=1,
    ),
    t.tarball(
        t.entry("m" * 150, b"d" * 513, magic="gnu", mtime=-5, uid=2**40),
        t.entry("k", link="u" * 150, magic="gnu", raw={"prefix": b"00000000001\0" * 2}),
        t.entry("s" * 10, magic="star", prefix="deep"),
        t.entry("old", b"v7", magic="v7", type=t.OLD_FILE, checksum="signed"),
        t.entry("olddir/", magic="v7", type=t.OLD_FILE),
        t.entry("contiguous", b"7", type=t.CONTIGUOUS),
        t.entry("volume", type=b"V"),
        t.entry("listing", b"Yfile\0\0", type=b"D"),
    )
    + t.tarball(t.entry("second/archive")),
    t.tarball(t.sparse_pax_0_0("s00", _SEGMENTS, 10_000), t.sparse_pax_0_1("s01", _SEGMENTS, 10_000)),
    t.tarball(t.sparse_pax_1_0("s10", _SEGMENTS, 10_000), t.sparse_pax_1_0("many", _MANY, 40_000)),
    t.tarball(t.sparse_gnu("old", _SEGMENTS, 10_000), t.sparse_gnu("many", _MANY, 40_000)),
)
_NUMBERS: Final = (0, 1, 2, 511, 512, 513, EXTENSION_LIMIT, EXTENSION_LIMIT + 1, 2**31, 2**32, 2**33 - 1, 2**63 - 1)
_FLAGS: Final = b"\x000123456789ADEIKLMNSVXgx\xff"


def _field_value(rng: random.Random, size: int) -> bytes:
    """Make a field's bytes up: a number in some form, or junk."""
    number = rng.choice(_NUMBERS) * rng.choice((1, 1, 1, -1))
    return rng.choice(
        (
            t.octal(number, size),
            t.base256(number, size),
            b"%o" % abs(number),
            b" " * rng.randrange(size) + b"7" * rng.randrange(size),
            rng.randbytes(size),
            bytes(size),
            b"\xff" * size,
        )
    )[:size]


def _mutate_block(rng: random.Random, block: bytearray) -> None:
    """Change one field of a header, or one number or byte of anything else, and mostly correct the checksum."""
    header = block[257:262] == b"ustar" or block[148:156].strip(b" \0").isdigit()
    if header and rng.random() < 0.7:
        offset, size = t.FIELDS[rng.choice(tuple(t.FIELDS))]
        value = bytes([rng.choice(_FLAGS)]) if size == 1 else _field_value(rng, size)
        block[offset : offset + len(value)] = value
    elif digits := [at for at, byte in enumerate(block) if chr(byte).isdigit()]:
        block[rng.choice(digits)] = rng.choice(b"0123456789-+ ,\n=\0")
    else:
        block[rng.randrange(t.BLOCK)] ^= 1 << rng.randrange(8)
    if header and rng.random() < 0.9:
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)


def case(number: int) -> bytes:
    """Build the archive of case ``number``."""
    rng = random.Random(number)
    data = rng.choice(SEEDS)
    if rng.random() < 0.3:
        data += rng.choice(SEEDS)
    blocks = [bytearray(data[at : at + t.BLOCK]) for at in range(0, len(data), t.BLOCK)]
    for _ in range(rng.choice((0, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(blocks))
        match rng.randrange(8):
            case 0:
                del blocks[at]
            case 1:
                blocks.insert(at, bytearray(blocks[rng.randrange(len(blocks))]))
            case 2:
                blocks.insert(at, bytearray(t.BLOCK))
            case _:
                _mutate_block(rng, blocks[at])
        blocks = blocks or [bytearray(t.BLOCK)]
    data = b"".join(blocks)
    return data[: rng.randrange(len(data))] if rng.random() < 0.15 else data


def scan(archive: bytes, cuts: list[int]) -> tuple[list[Entry], TarSummary]:
    """Scan an archive fed in the pieces between ``cuts``."""
    scanner = TarScanner()
    edges = [0, *sorted(cuts), len(archive)]
    entries = [entry for a, b in itertools.pairwise(edges) for entry in scanner.feed(archive[a:b])]
    return entries, scanner.finish()


def check(archive: bytes, rng: random.Random) -> None:
    """Assert the property for one archive."""
    entries, summary = scan(archive, [])
    cuts = [rng.randrange(len(archive) + 1) for _ in range(rng.choice((1, 3, 40)))]
    assert scan(archive, cuts) == (entries, summary), "the chunks make a difference"
    assert summary.size == len(archive)
    assert 0 <= summary.end_offset <= summary.size
    end = 0
    for entry in entries:
        assert end <= entry.header_offset < entry.header_offset + t.BLOCK <= entry.data_offset <= summary.size
        assert 0 <= entry.uid < 2**32
        assert 0 <= entry.gid < 2**32
        assert 0 <= entry.mode < 2**12
        assert all(0 <= number < 2**63 for number in (entry.mtime_ns, entry.size, entry.stored_size))
        assert entry.size == 0 or entry.type is EntryType.FILE
        assert entry.sparse is not None or entry.size in {0, entry.stored_size}
        end = entry.data_offset + entry.stored_size
        file_end = -1
        for offset, length in entry.sparse or ():
            assert file_end < offset < offset + length <= entry.size
            file_end = offset + length
        assert entry.sparse is None or sum(length for _, length in entry.sparse) == entry.stored_size
    assert end <= summary.size or summary.damage is not None


def check_memory(archive: bytes) -> None:
    """Assert that scanning takes memory in proportion to the bytes fed, not to what they declare."""
    tracemalloc.start()
    try:
        scan(archive, [])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= MEMORY_PER_BYTE * len(archive) + MEMORY_CONSTANT, f"{peak} bytes for {len(archive)}"


def run_case(number: int) -> None:
    """Make a case and check it; its memory only now and then, as that takes long."""
    archive = case(number)
    check(archive, random.Random(number))
    if number % 20 == 0:
        check_memory(archive)


if __name__ == "__main__":
    run_cases(__doc__, run_case)
