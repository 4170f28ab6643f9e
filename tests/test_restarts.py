"""Restart points of gzip data: they are where they are said to be, and decoding from them needs nothing else."""

from __future__ import annotations

import gzip
import random
import struct
import zlib
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from isal import isal_zlib

from ocifs.compression import restarts
from ocifs.compression.gzip import MAX_WINDOW, SpanInflater, inflate_span
from ocifs.errors import DamagedError
from tests.support import deflate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ocifs.compression.restarts import Restart


@cache
def text() -> bytes:
    """4 MB that compress to a third."""
    rng = random.Random(7)
    words = [rng.randbytes(rng.randrange(2, 9)).hex().encode() for _ in range(5000)]
    return b" ".join(rng.choices(words, k=400_000))[:4_000_000]


@cache
def noise() -> bytes:
    """3 MB that do not compress."""
    return random.Random(8).randbytes(3_000_000)


@cache
def mixed() -> bytes:
    """Text, noise and zeros in turn."""
    pieces = []
    for at in range(0, 2_000_000, 100_000):
        pieces += [text()[at : at + 100_000], noise()[at : at + 70_000], bytes(50_000)]
    return b"".join(pieces)


def member(data: bytes, level: int = 6, strategy: int = zlib.Z_DEFAULT_STRATEGY, memory: int = 8) -> bytes:
    compressor = zlib.compressobj(level, zlib.DEFLATED, 31, memory, strategy)
    return compressor.compress(data) + compressor.flush()


def flushed(data: bytes) -> bytes:
    """With an empty stored block behind every 128 KiB, as pigz has it."""
    compressor = zlib.compressobj(6, zlib.DEFLATED, 31)
    pieces = [
        compressor.compress(data[at : at + 131_072]) + compressor.flush(zlib.Z_SYNC_FLUSH)
        for at in range(0, len(data), 131_072)
    ]
    return b"".join(pieces) + compressor.flush()


def walked(stored: bytes, span: int = 1 << 19) -> tuple[bytes, list[tuple[int, Restart]]]:
    """Give what the walk decoded, and the restart points with their offsets in it."""
    out = bytearray()
    points: list[tuple[int, Restart]] = []
    for data, restart in restarts.walk(lambda offset, size: stored[offset : offset + size], len(stored), span):
        assert data
        if restart is not None:
            points.append((len(out), restart))
        out += data
    return bytes(out), points


WRITERS: dict[str, tuple[Callable[[bytes], bytes], Callable[[], bytes]]] = {
    "zlib": (member, text),
    "zlib -1": (lambda data: member(data, 1), text),
    "zlib -9, small blocks": (lambda data: member(data, 9, memory=1), text),
    "huffman only": (lambda data: member(data, 6, zlib.Z_HUFFMAN_ONLY), text),
    "isal": (lambda data: isal_zlib.compress(data, 2, wbits=31), text),
    "sync flushes": (flushed, text),
    "stored": (lambda data: member(data, 0), text),
    "noise": (member, noise),
    "mixed": (member, mixed),
    "mixed, small blocks": (lambda data: member(data, memory=1), mixed),
    "members": (lambda data: b"".join(member(data[at : at + 70_000]) for at in range(0, len(data), 70_000)), mixed),
    "tiny members": (lambda data: b"".join(member(data[at : at + 700]) for at in range(0, len(data), 700)), text),
    "members and stored": (lambda data: member(data[:999_999]) + member(data[999_999:], 0), text),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_points_are_found_and_lead_on_to_the_next(writer: str) -> None:
    write, source = WRITERS[writer]
    data = source()
    stored = write(data)
    out, points = walked(stored)
    assert out == data
    assert len(points) >= len(data) // (1 << 20)
    assert points[0] == (0, restarts.Restart(0, 0, at_header=True, window=b""))
    assert all(second - first >= 1 << 19 for (first, _), (second, _) in pairwise(points))
    behind = restarts.Restart(len(stored), 0, at_header=True, window=b"")
    for (at, point), (end, following) in pairwise([*points, (len(data), behind)]):
        assert point.window == (b"" if point.at_header else data[:at][-MAX_WINDOW:])
        stop = following.blob_offset + (following.bit > 0)
        for inflate in (zlib.decompressobj, isal_zlib.decompressobj):
            got = inflate_span(
                stored[point.blob_offset : stop],
                bit=point.bit,
                window=point.window,
                size=end - at,
                at_header=point.at_header,
                inflate=inflate,
            )
            assert got == data[at:end]


def test_blocks_start_at_every_bit() -> None:
    bits: set[int] = set()
    for level in range(9, 0, -1):
        bits |= {point.bit for _, point in walked(member(text(), level), 1 << 14)[1]}
        if bits == set(range(8)):
            return
    pytest.fail(f"only bits {bits}")


def test_stored_blocks_are_entered_on_their_byte() -> None:
    stored = member(noise(), 0)
    _, points = walked(stored)
    assert len(points) >= 4
    for at, point in points[1:]:
        # A block of stored data: type 0, then on whole bytes its length and that's complement (RFC 1951, section 3.2.4).
        head = int.from_bytes(stored[point.blob_offset : point.blob_offset + 2], "little") >> point.bit
        length_at = point.blob_offset + (point.bit + 10) // 8
        length, again = struct.unpack_from("<HH", stored, length_at)
        assert (head & 6, again) == (0, length ^ 0xFFFF)
        assert stored[length_at + 4 :].startswith(noise()[at : at + length])


@pytest.mark.parametrize(
    "stored",
    [member(text(), 6, zlib.Z_FIXED), isal_zlib.compress(text(), 0, wbits=31)],
    ids=["fixed codes", "one block"],
)
def test_a_stream_without_visible_blocks_has_one_point(stored: bytes) -> None:
    out, points = walked(stored)
    assert out == text()
    assert [at for at, _ in points] == [0]


@pytest.mark.parametrize("level", [1, 6, 9])
def test_runs_have_points_too(level: int) -> None:
    # In a run many places give the same output for a long time.
    data = text()[:100_000] + bytes(40_000_000) + b"\xff" * 40_000_000 + text()[:100_000]
    stored = member(data, level)
    out, points = walked(stored, 4 << 20)
    assert out == data
    for (at, point), (end, _) in pairwise([*points, (len(data), points[0][1])]):
        assert end - at < 16 << 20
        rest = stored[point.blob_offset :]
        got = inflate_span(rest, bit=point.bit, window=point.window, size=end - at, at_header=point.at_header)
        assert got == data[at:end]


# -- what the proof stands on ----------------------------------------------------------------------------------------

STREAMS: dict[str, Callable[[], bytes]] = {
    "zlib": lambda: member(text()[:300_000])[10:-8],
    "fixed": lambda: member(text()[:40_000], 6, zlib.Z_FIXED)[10:-8],
    "stored": lambda: member(noise()[:200_000])[10:-8],
    "mixed": lambda: member(mixed()[:600_000], memory=1)[10:-8],
    "sync flushes": lambda: flushed(text()[:300_000])[10:-8],
    "isal": lambda: isal_zlib.compress(text()[:300_000], 2, wbits=-15),
}


@pytest.mark.parametrize("stream", STREAMS)
def test_output_is_never_late_and_no_block_is_left_out(stream: str) -> None:
    raw = STREAMS[stream]()
    blocks, whole = deflate.blocks(raw)
    decompressor = isal_zlib.decompressobj(wbits=-15)
    fed = given = 0
    for block in blocks:
        # With the bytes up to a block's first bit all that lies before it comes out.
        end = (block.bit_offset + 7) // 8
        for at in range(fed, end):
            given += len(decompressor.decompress(raw[at : at + 1]))
        fed = end
        assert given >= block.offset
        if block.offset < len(whole):
            start = max(0, block.bit_offset // 8 - 40)
            assert block.bit_offset - 8 * start in restarts._possible(
                raw[start:], block.bit_offset - 8 * start, whole[block.offset]
            )


_CHAIN = (*range(1, 15), 15, 15)
"""Lengths of sixteen codes that are complete."""
LONGEST = (
    dict(zip((*b"abcdefghijklm", 256, 283, 284), _CHAIN, strict=True)),
    dict(zip((*range(14), 28, 29), _CHAIN, strict=True)),
)
"""Codes by which a match takes 48 bits."""


def longest_matches() -> bytes:
    rng = random.Random(3)
    writer = deflate.BlockWriter(*LONGEST)
    for _ in range(30_000):
        writer.literal(0x61)
    for _ in range(1000):
        for _ in range(30):
            writer.literal(rng.choice(b"abcdefghijklm"))
        writer.match(rng.choice((283, 284)), rng.randrange(31), rng.choice((0, 1, 28, 29)), 0)
    return writer.end()


def seemingly_stored() -> bytes:
    """Literals that come out as they went in, what may be stored headers, and where such blocks would end a long match."""
    # All literals but one take 8 bits. Codes are packed from their highest bit, so only palindromes are their own code.
    writer = deflate.BlockWriter(
        {**dict.fromkeys(range(255), 8), 284: 10, 285: 10, 256: 11, 257: 11, 258: 11, 259: 11},
        dict(zip((*range(14), 28, 29), _CHAIN, strict=True)),
    )
    length = 0x1818
    for _ in range(30_000):
        writer.literal(0x3C)
    for _ in range(10):
        while writer.bits % 8:
            writer.match(257, 0, 1, 0)  # of 13 bits
        for byte in length.to_bytes(2, "little") + (length ^ 0xFFFF).to_bytes(2, "little"):
            writer.literal(byte)
        for _ in range(length):
            writer.literal(0x3C)
        writer.match(284, 30, 29, 5000)
    return writer.end()


def test_the_longest_symbol_is_silent_for_less_than_six_bytes() -> None:
    raw = longest_matches()
    start = 250  # behind the header, which is as silent
    decompressor = isal_zlib.decompressobj(wbits=-15)
    assert decompressor.decompress(raw[:start])
    silent = [not decompressor.decompress(raw[at : at + 1]) for at in range(start, len(raw) - 2)]
    runs = "".join(" x"[each] for each in silent).split()
    assert max(map(len, runs)) == restarts._MAX_SYMBOL - 1


SILENT: dict[str, Callable[[], bytes]] = {
    "zlib": lambda: member(text()[:150_000], memory=1)[10:-8],
    "stored": STREAMS["stored"],
    "mixed": lambda: member(mixed()[90_000:240_000], memory=1)[10:-8],
    "sync flushes": lambda: flushed(text()[:150_000])[10:-8],
    "runs": lambda: member(text()[:50_000] + bytes(2_000_000) + text()[:50_000], 1)[10:-8],
    "longest matches": longest_matches,
    "seemingly stored": seemingly_stored,
}


@pytest.mark.parametrize("stream", SILENT)
def test_where_it_falls_silent_a_block_has_ended(stream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = SILENT[stream]()
    blocks, whole = deflate.blocks(raw)
    begins = [80 + block.bit_offset for block in blocks]
    seen = []

    def proven(_self: object, silence: restarts._Silence, _data: bytes, *, ends: bool) -> None:
        del ends
        seen.append(silence)

    monkeypatch.setattr(restarts._Walk, "_proven", proven)
    monkeypatch.setattr(restarts, "_PROOF", 1)
    monkeypatch.setattr(restarts, "_TRIES", 1 << 20)
    stored = member(b"")[:10] + raw + struct.pack("<II", zlib.crc32(whole), len(whole))
    for chunk in (1 << 18, 5003):  # chunks' ends cut pieces short
        monkeypatch.setattr(restarts, "_CHUNK", chunk)
        assert walked(stored, 1)[0] == whole
        for silence in seen:
            assert any(8 * silence.spoke <= begin <= 8 * silence.fell + 15 for begin in begins)
    assert bool(seen) == (stream not in {"longest matches", "seemingly stored"})


def test_what_a_step_has_left_in_the_decompressor_is_not_taken_for_the_next_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A chunk ends within a block's header; the last step of it decodes to more than comes out at once.
    monkeypatch.setattr(restarts, "_MAX_PIECE", 40_000)
    header = 100
    last = deflate.BlockWriter({**dict.fromkeys(range(128), 8), 256: 1}, {0: 1, 1: 1})
    for number in range(70_000):
        last.literal(number % 128)
    size = (1 << 18) - 10 - header
    data = random.Random(5).randbytes(size - 5 * -(-size // 65_540))
    raw = b"".join(
        b"\0" + struct.pack("<HH", len(part), len(part) ^ 0xFFFF) + part
        for part in (data[at : at + 65_535] for at in range(0, len(data), 65_535))
    )
    assert len(raw) == size
    whole = data + bytes(number % 128 for number in range(70_000))
    seen = []

    def proven(_self: object, silence: restarts._Silence, _data: bytes, *, ends: bool) -> None:
        del ends
        seen.append(silence)

    monkeypatch.setattr(restarts._Walk, "_proven", proven)
    stored = member(b"")[:10] + raw + last.end() + struct.pack("<II", zlib.crc32(whole), len(whole))
    for span in range(150_000, 260_000, 10_000):
        assert walked(stored, span)[0] == whole
    assert seen
    for silence in seen:
        assert silence.spoke <= 10 + size <= silence.fell + 1


@pytest.mark.parametrize("level", [1, 6, 0])
def test_a_member_may_end_in_what_a_step_has_left(level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = text()[:138_231]
    stored = member(data, level) + member(b"second")
    for most in (*range(len(data) - 40, len(data) + 3), len(data) // 2, len(data) // 3):
        monkeypatch.setattr(restarts, "_MAX_PIECE", most)
        assert walked(stored, 1 << 30)[0] == data + b"second"


def test_two_places_that_fit_are_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = restarts._possible

    def one_more(stored: bytes | memoryview, last: int, first: int) -> list[int]:
        return sorted({*honest(stored, last, first), 3})

    monkeypatch.setattr(restarts, "_possible", one_more)
    fits = restarts._leads_to
    monkeypatch.setattr(
        restarts,
        "_leads_to",
        lambda data, stored, bit, window, *, ends: bit == 3 or fits(data, stored, bit, window, ends=ends),
    )
    out, points = walked(member(text()))
    assert out == text()
    assert [at for at, _ in points] == [0]


def test_a_place_that_does_not_fit_to_the_end_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    class Inflater(SpanInflater):
        def read(self, size: int) -> bytes:
            data = super().read(size)
            return data if size <= 64 else data[:-1] + bytes((data[-1] ^ 1,))

    monkeypatch.setattr(restarts, "SpanInflater", Inflater)
    out, points = walked(member(text()))
    assert out == text()
    assert [at for at, _ in points] == [0]


@pytest.mark.parametrize("span", [1, 3, 1 << 19])
def test_a_walk_over_cut_data_ends(span: int) -> None:
    stored = member(text()[:3000])
    for size in range(1, len(stored)):
        with pytest.raises(DamagedError):
            walked(stored[:size], span)


def test_empty_members_are_no_points() -> None:
    stored = member(b"") * 3 + member(text()) + member(b"") * 3
    out, points = walked(stored, 1)
    assert out == text()
    assert points[0] == (0, restarts.Restart(0, 0, at_header=True, window=b""))
    assert all(at < len(text()) for at, _ in points)
    assert walked(member(b"")) == (b"", [])


def test_long_member_headers_are_read() -> None:
    header = b"\x1f\x8b\x08\x0c\0\0\0\0\0\xff" + (60_000).to_bytes(2, "little") + bytes(60_000) + b"n" * 500_000 + b"\0"
    assert walked(header + member(text())[10:])[0] == text()


def test_bytes_are_read_once_in_order() -> None:
    stored = member(mixed()) + member(b"x")
    ranges: list[tuple[int, int]] = []

    def read_at(offset: int, size: int) -> bytes:
        ranges.append((offset, offset + size))
        return stored[offset : offset + size]

    assert b"".join(data for data, _ in restarts.walk(read_at, len(stored), 1 << 20)) == mixed() + b"x"
    end = 0
    for start, stop in ranges:
        assert start <= end <= stop
        end = stop
    assert end == len(stored)
    assert sum(stop - start for start, stop in ranges) < len(stored) * 1.01


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "cut in the data": lambda stored: stored[: len(stored) // 2],
    "cut in the trailer": lambda stored: stored[:-3],
    "no trailer": lambda stored: stored[:-8],
    "wrong checksum": lambda stored: stored[:-8] + b"\1\2\3\4" + stored[-4:],
    "wrong size": lambda stored: stored[:-4] + b"\1\2\3\4",
    "junk behind": lambda stored: stored + b"x",
    "zeros behind": lambda stored: stored + bytes(512),
    "half a header behind": lambda stored: stored + b"\x1f\x8b\x08\0",
    "an empty member with a checksum": lambda stored: stored + member(b"")[:-8] + b"\1\0\0\0\0\0\0\0",
    "a flipped bit": lambda stored: stored[:50_000] + bytes((stored[50_000] ^ 16,)) + stored[50_001:],
}


@pytest.mark.parametrize("how", BROKEN)
def test_c3_what_is_not_gzip_to_its_end_is_damage(how: str) -> None:
    stored = BROKEN[how](member(text()))
    with pytest.raises(DamagedError):
        walked(stored)
    with pytest.raises((OSError, EOFError, zlib.error)):
        if how == "zeros behind":  # gzip(1) and gzip.py take padding for nothing; rule C3 does not
            raise OSError
        gzip.decompress(stored)


def test_a_bomb_comes_in_bounded_pieces() -> None:
    stored = member(bytes(200_000_000), 9)
    sizes = [len(data) for data, _ in restarts.walk(lambda at, size: stored[at : at + size], len(stored), 1 << 22)]
    assert sum(sizes) == 200_000_000
    assert max(sizes) <= 16 << 20


def _parts(rng: random.Random) -> Iterator[bytes]:
    for _ in range(rng.randrange(1, 8)):
        size = rng.choice((0, 1, 500, 40_000, 200_000))
        at = rng.randrange(1_000_000)
        yield rng.choice((text()[at : at + size], noise()[at : at + size], bytes(size), b"ab" * (size // 2)))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 32))
def test_any_stream_is_walked_right(seed: int) -> None:
    rng = random.Random(seed)
    stored, data = b"", b""
    for _ in range(rng.randrange(1, 4)):
        compressor = zlib.compressobj(rng.choice((0, 1, 6)), zlib.DEFLATED, 31, rng.choice((1, 8, 9)), rng.randrange(4))
        for part in _parts(rng):
            stored += compressor.compress(part)
            stored += compressor.flush(
                rng.choice((zlib.Z_NO_FLUSH, zlib.Z_SYNC_FLUSH, zlib.Z_FULL_FLUSH, zlib.Z_BLOCK))
            )
            data += part
        stored += compressor.flush()
    out, points = walked(stored, rng.choice((1, 20_000, 100_000)))
    assert out == data
    for at, point in points:
        size = len(data) - at
        rest = stored[point.blob_offset :]
        got = inflate_span(rest, bit=point.bit, window=point.window, size=size, at_header=point.at_header)
        assert got == data[at:]
