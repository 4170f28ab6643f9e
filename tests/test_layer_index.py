"""Layer indexes: built in one pass from every kind of blob, decoded span by span, refused when anything is not as it was."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zlib
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from ocifs import layer_index
from ocifs.compression import Compression
from ocifs.errors import CacheDamagedError, DamagedError, MachineError, OcifsError, StaleFormatError, UnsupportedError
from ocifs.forked import run_forked
from ocifs.layer_index import Build, Built, Content, Expected, LayerIndex, Mismatch, child, load, passes
from ocifs.layer_index import format as format_module
from ocifs.layer_index.job import Job
from ocifs.spec import DiffID, Digest
from ocifs.tar import EntryType, TarScanner
from tests.fuzz import fuzz_decoders
from tests.support import tarball as t

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


class MemoryBlob:
    """Bytes with the interface of a source's blob; all reads go through Python."""

    def __init__(self, data: bytes, name: str = "blob") -> None:
        self.data = data
        self.name = name
        self.size = len(data)

    def read_at(self, offset: int, size: int, /) -> bytes:
        return self.data[offset : offset + size]

    def close(self) -> None:
        pass


class FileBlob:
    """A range of a file on disk."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        self.fd = os.open(path, os.O_RDONLY)
        self.name = path.name
        self.offset = offset
        self.size = os.fstat(self.fd).st_size - offset

    def read_at(self, offset: int, size: int, /) -> bytes:
        return os.pread(self.fd, size, self.offset + offset)

    def close(self) -> None:
        os.close(self.fd)


@dataclass(frozen=True)
class Indexed:
    built: Built
    index: LayerIndex
    index_bytes: bytes
    source: bytes
    """What spans are read from."""

    def read_at(self, offset: int, size: int) -> bytes:
        return self.source[offset : offset + size]

    def whole(self) -> bytes:
        return b"".join(self.index.decode(number, self.read_at) for number in range(len(self.index.spans)))


def indexed(
    data: bytes | MemoryBlob | FileBlob,
    expected: Expected | None = None,
    *,
    tolerant: bool = False,
    content: Content = Content.LAYER,
    progress: Callable[[int], None] | None = None,
) -> Indexed:
    blob = MemoryBlob(data) if isinstance(data, bytes) else data
    with contextlib.ExitStack() as stack:
        out, copy = (stack.enter_context(open(os.memfd_create(name), "w+b")) for name in ("index", "copy"))
        built = layer_index.build(
            blob, out=out, reframed=copy, expected=expected, tolerant=tolerant, content=content, progress=progress
        )
        index_bytes, copy_bytes = (os.pread(file.fileno(), 1 << 30, 0) for file in (out, copy))
    source = copy_bytes if built.reframed else blob.read_at(0, blob.size)
    return Indexed(built, load(MemoryBlob(index_bytes, "the index")), index_bytes, source)


def words(size: int, seed: int = 1) -> bytes:
    rng = random.Random(seed)
    vocabulary = [rng.randbytes(rng.randrange(2, 9)).hex().encode() for _ in range(3000)]
    return b" ".join(rng.choices(vocabulary, k=size // 5))[:size]


@cache
def layer() -> bytes:
    """About 9 MB of tar: many small files, some large ones, incompressible ones, links, attributes."""
    rng = random.Random(3)
    text = words(1 << 20)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:

        def add(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, **fields: object) -> None:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.mtime = kind, len(data), 1_700_000_000 + len(name)
            for field, value in fields.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data))

        add("dir", kind=tarfile.DIRTYPE, mode=0o1777)
        for number in range(1500):
            at = rng.randrange(len(text))
            add(f"dir/{number:05}", text[at : at + rng.randrange(4000)], uid=number, uname="root", gname="wheel")
        add("link", kind=tarfile.SYMTYPE, linkname="dir/00000")
        add("hard", kind=tarfile.LNKTYPE, linkname="dir/00001")
        add("null", kind=tarfile.CHRTYPE, devmajor=1, devminor=3)
        add("n" * 300, b"long", pax_headers={"SCHILY.xattr.user.a": "b", "SCHILY.xattr.user.c": "d" * 300})
        add("random", rng.randbytes(1_500_000))
        add("zeros", bytes(1_000_000))
        for number in range(2):
            add(f"text{number}", words(1 << 20, number + 10))
    return out.getvalue()


def gz(data: bytes, level: int = 6, strategy: int = zlib.Z_DEFAULT_STRATEGY) -> bytes:
    compressor = zlib.compressobj(level, zlib.DEFLATED, 31, 9, strategy)
    return compressor.compress(data) + compressor.flush()


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


def bgzf(data: bytes) -> bytes:
    """Members of 64 KiB that say their size in an extra field, and an empty one at the end (bgzip's format)."""
    out = b""
    for piece in [*pieces(data, 0xFF00), b""]:
        body = zlib.compressobj(6, zlib.DEFLATED, -15)
        raw = body.compress(piece) + body.flush()
        out += b"\x1f\x8b\x08\x04\0\0\0\0\0\xff\x06\0BC\x02\0" + struct.pack("<H", len(raw) + 25) + raw
        out += struct.pack("<II", zlib.crc32(piece), len(piece))
    return out


def estargz(data: bytes) -> bytes:
    """A member for each header and each file, as eStargz has it."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        cuts = sorted({0, len(data), *(at for info in tar for at in (info.offset, info.offset_data))})
    return b"".join(gz(data[first:second]) for first, second in itertools.pairwise(cuts)) + gz(b"")


def tool(*words: str) -> Callable[[bytes], bytes]:
    def run(data: bytes) -> bytes:
        if not shutil.which(words[0]):
            pytest.skip(f"{words[0]} is not installed")
        return subprocess.run(words, input=data, check=True, capture_output=True).stdout

    return run


def zst(data: bytes, **options: Any) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(data)


def zst_stream(data: bytes) -> bytes:
    compressor = zstandard.ZstdCompressor().compressobj()
    return compressor.compress(data) + compressor.flush()


SKIPPABLE = b"\x53\x2a\x4d\x18\x05\0\0\0hello"

IN_PLACE: dict[str, Callable[[bytes], bytes]] = {
    "plain": lambda data: data,
    "gzip by zlib": gz,
    "gzip -1": lambda data: gz(data, 1),
    "gzip -9": lambda data: gz(data, 9),
    "gzip stored": lambda data: gz(data, 0),
    "gzip huffman": lambda data: gz(data, 6, zlib.Z_HUFFMAN_ONLY),
    "gzip by gzip.py": gzip.compress,
    "GNU gzip": tool("gzip", "-c"),
    "pigz": tool("pigz", "-c"),
    "members": lambda data: b"".join(map(gz, pieces(data, 100_000))),
    "large members": lambda data: b"".join(map(gz, pieces(data, 3_000_000))),
    "empty members": lambda data: gz(b"") * 50 + gz(data) + gz(b"") * 50,
    "bgzf": bgzf,
    "estargz": estargz,
    "zstd frames": lambda data: b"".join(map(zst, pieces(data, 700_000))),
    "tiny zstd frames": lambda data: b"".join(map(zst, pieces(data, 20_000))),
    "unsized zstd frames": lambda data: b"".join(map(zst_stream, pieces(data, 500_000))),
    "zstd frames with checksums": lambda data: b"".join(
        zst(piece, write_checksum=True) for piece in pieces(data, 500_000)
    ),
    "skippable zstd frames": lambda data: SKIPPABLE.join([b"", *map(zst, pieces(data, 2_000_000)), b""]),
}
REFRAMED: dict[str, Callable[[bytes], bytes]] = {
    "gzip fixed": lambda data: gz(data, 6, zlib.Z_FIXED),
    "zstd": zst,
    "zstd with a checksum": lambda data: zst(data, write_checksum=True),
    "one zstd stream": zst_stream,
    "zstd --long": tool("zstd", "-c", "--long=27"),
}
ARCHIVES: dict[str, Callable[[bytes], bytes]] = {
    "xz": lambda data: lzma.compress(data, preset=0),
    "bzip2": lambda data: bz2.compress(data, 1),
}


@cache
def made(how: str) -> bytes:
    """The layer, compressed."""
    return {**IN_PLACE, **REFRAMED, **ARCHIVES}[how](layer())


def check_whole(one: Indexed, data: bytes) -> None:
    """Every byte of the layer comes out, span by span, and every byte of the source is in a span."""
    index = one.index
    assert one.whole() == data
    assert index.layer_size == len(data)
    assert index.diff_id == DiffID.of(data) == one.built.diff_id
    position = covered = 0
    for number, span in enumerate(index.spans):
        assert (span.layer_offset, index.spans.layer_range(number)) == (position, (position, span.size))
        assert index.spans.span_at(position) == index.spans.span_at(position + span.size - 1) == number
        assert covered - 1 <= span.blob_offset <= covered  # spans of gzip may share a byte
        position += span.size
        covered = span.blob_offset + span.blob_size
    assert (position, covered) == (len(data), len(one.source) == covered and covered)


@pytest.mark.parametrize("how", IN_PLACE)
def test_every_producer_in_place(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "GZIP_SPAN", 1 << 20)
    data = layer()
    stored = made(how)
    one = indexed(stored, Expected(len(stored), Digest.of(stored), DiffID.of(data)))
    assert not one.built.reframed
    assert one.index.digest == Digest.of(stored)
    assert one.index.data_size == one.index.stored_size == len(stored)
    assert len(one.index.spans) >= 3
    assert not one.index.mismatches
    check_whole(one, data)


@pytest.mark.parametrize("how", [*REFRAMED, *ARCHIVES])
def test_what_has_no_restart_points_is_reframed(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "MAX_SPAN", 4 << 20)
    data = layer()
    stored = made(how)
    content = Content.ARCHIVE if how in ARCHIVES else Content.LAYER
    one = indexed(stored, Expected(len(stored), Digest.of(stored), DiffID.of(data)), content=content)
    assert one.built.reframed
    assert (one.index.reframed, one.index.stored_size) == (True, len(stored))
    assert one.index.data_size == len(one.source)
    check_whole(one, data)


def test_sha512_digests_are_checked_and_kept() -> None:
    data = layer()
    stored = gz(data)
    expected = Expected(len(stored), Digest.of(stored, "sha512"), DiffID.of(data, "sha512"))
    one = indexed(stored, expected)
    assert (one.index.digest, one.index.diff_id) == (expected.digest, expected.diff_id)
    assert indexed(data, Expected(None, Digest.of(data, "sha512"), DiffID.of(data))).index.diff_id == DiffID.of(data)


@pytest.mark.parametrize("how", ["plain", "gzip by zlib", "members", "zstd frames"])
@pytest.mark.parametrize("offset", [0, 12345])
def test_a_file_and_a_range_of_a_file_are_read_alike(how: str, offset: int, tmp_path: Path) -> None:
    path = tmp_path / "blob"
    path.write_bytes(bytes(offset) + made(how))
    check_whole(indexed(FileBlob(path, offset)), layer())


@pytest.mark.parametrize(
    "stored", [b"", gz(b""), gz(b"") * 3, zst(b""), SKIPPABLE + zst(b""), bytes(1024), gz(bytes(1024))]
)
def test_d12_empty_layers(stored: bytes) -> None:
    one = indexed(stored)
    assert list(one.index.entries()) == []
    assert one.index.damage is None
    assert one.whole() == one.index.layer_size * b"\0"


# --- reading ----------------------------------------------------------------------------------------------------------


@cache
def sample() -> Indexed:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(passes, "GZIP_SPAN", 1 << 20)
        return indexed(made("gzip by zlib"))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 24), st.integers(0, 1 << 16))
def test_random_access_agrees_with_the_whole(offset: int, size: int) -> None:
    one, data = sample(), layer()
    offset %= len(data)
    number = one.index.spans.span_at(offset)
    first, length = one.index.spans.layer_range(number)
    decoder = one.index.begin(number, one.read_at)
    assert (decoder.left, decoder.held) == (length, one.index.spans[number].blob_size)
    assert decoder.read(offset - first) == data[first:offset]
    assert decoder.read(size) == data[offset : min(offset + size, first + length)]
    assert decoder.read(length) == data[min(offset + size, first + length) : first + length]
    assert decoder.left == 0


@pytest.mark.parametrize("how", ["plain", "gzip by zlib", "zstd frames", "one zstd stream"])
def test_any_flipped_bit_of_the_stored_bytes_is_damage(how: str) -> None:
    stored = {**IN_PLACE, **REFRAMED}[how](layer()[: 600 * 512])
    one = indexed(stored)
    rng = random.Random(4)
    for _ in range(150):
        at = rng.randrange(len(one.source))
        broken = bytearray(one.source)
        broken[at] ^= 1 << rng.randrange(8)
        flipped = bytes(broken)
        hit = 0
        for number, span in enumerate(one.index.spans):
            if span.blob_offset <= at < span.blob_offset + span.blob_size:
                with pytest.raises(DamagedError, match=f"span {number} .* at blob_offset {span.blob_offset}.*changed"):
                    one.index.decode(number, MemoryBlob(flipped).read_at)
                hit += 1
        assert hit >= 1


def test_only_spans_of_gzip_are_worth_decoding_partly() -> None:
    ways = ("plain", "gzip by zlib", "zstd frames", "one zstd stream")
    short = {how: {**IN_PLACE, **REFRAMED}[how](layer()[:51200]) for how in ways}
    short["re-framed gzip"] = gz(b"") * 70_000  # nowhere in 1.4 MB can a span begin
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(passes, "MAX_STORED", 1 << 20)
        indexes = {how: indexed(stored).index for how, stored in short.items()}
    assert [how for how, index in indexes.items() if index.partly] == ["gzip by zlib"]
    assert indexes["re-framed gzip"].reframed


def test_a_blob_that_became_shorter_is_damage() -> None:
    one = sample()
    last = len(one.index.spans) - 1
    with pytest.raises(DamagedError, match=rf"blob {one.index.digest} cannot be read in span {last} .*are left"):
        one.index.decode(last, MemoryBlob(one.source[:-1]).read_at)


def test_a_window_that_does_not_fit_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    # As if what found the windows had been wrong: the checksums of the index hold, the data would not.
    one = sample()
    index = load(MemoryBlob(one.index_bytes, "the index"))
    number = next(n for n, span in enumerate(index.spans) if span.window_size)
    monkeypatch.setattr(index, "window", lambda _number: bytes(32768))
    with pytest.raises(CacheDamagedError, match=r"decodes to other bytes|does not inflate"):
        index.decode(number, one.read_at)


@pytest.mark.parametrize(("at_header", "bit"), [(True, 0), (False, 5)])
def test_a_span_that_does_not_decode_is_the_indexs_fault(
    at_header: bool,
    bit: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The stored bytes are the indexed ones, so what was noted about them is wrong: where they begin, say."""
    one = sample()
    index = load(MemoryBlob(one.index_bytes, "the index"))
    number, span = next((n, span) for n, span in enumerate(index.spans) if span.window_size)
    wrong = span._replace(at_header=at_header, bit=bit if bit != span.bit else bit - 1)
    monkeypatch.setattr(type(index.spans), "__getitem__", lambda _self, _number: wrong)
    damaged: list[str] = []
    index.on_damage = lambda: damaged.append("told")
    message = (
        f"the layer index the index is damaged: what it says of span {number} ({span.blob_size} bytes "
        f"at blob_offset {span.blob_offset}) of blob {index.digest} does not fit: "
    )
    with pytest.raises(CacheDamagedError, match=re.escape(message)):
        index.decode(number, one.read_at)
    assert damaged == ["told"]


# --- entries ----------------------------------------------------------------------------------------------------------


def test_entries_come_in_stream_order_as_tarfile_reads_them() -> None:
    entries = list(sample().index.entries())
    with tarfile.open(fileobj=io.BytesIO(layer())) as tar:
        members = tar.getmembers()
    assert len(entries) == len(members) == sample().index.entry_count
    for entry, member in zip(entries, members, strict=True):
        assert entry.path.rstrip(b"/") == member.name.encode()
        assert (entry.mode, entry.uid, entry.gid) == (member.mode, member.uid, member.gid)
        assert entry.mtime_ns == member.mtime * 10**9
        assert (entry.header_offset, entry.size) == (member.offset, member.size if member.isreg() else 0)
        assert entry.data_offset == member.offset_data
        assert (entry.link, entry.uname) == (member.linkname.encode(), member.uname.encode())
        if member.ischr():
            assert (entry.type, entry.rdev) == (EntryType.CHAR, (1, 3))
    assert dict(next(entry.xattrs for entry in entries if entry.xattrs)) == {b"user.a": b"b", b"user.c": b"d" * 300}


def test_entries_from_anywhere() -> None:
    index = sample().index
    entries = list(index.entries())
    assert len(entries) > format_module.FRAME_ENTRIES
    for number in (0, 1, 1023, 1024, 1025, len(entries) - 1):
        assert list(index.entries(number)) == entries[number:]
        assert index.entry(number) == entries[number]
    assert list(index.entries(len(entries))) == []
    for number in (-1, len(entries)):
        with pytest.raises(IndexError):
            index.entry(number)


def test_everything_an_entry_holds_survives() -> None:
    tar = t.tarball(
        t.entry("a" * 5000, b"x" * 700, pax={"mtime": "9223372036.854775806"}, uid=2**32 - 1, gid=2**32 - 1, uname="ü"),
        t.sparse_pax_1_0("sparse", [(0, b"ab"), (4096, b"c" * 700)], 10_000),
        t.entry("x", xattrs={"user.a": bytes(range(256)), "user.big": b"v" * 60_000}),
        t.entry("dev", type=t.CHAR, rdev=(4095, 2**20 - 1)),
        t.entry("v", type=b"V"),
        t.entry("hard", type=t.HARDLINK, link="x"),
    )
    scanner = TarScanner()
    entries, summary = scanner.feed(tar), scanner.finish()
    one = indexed(gz(tar))
    assert list(one.index.entries()) == entries
    assert one.index.notices == summary.notices
    assert one.index.end_offset == summary.end_offset


def test_large_attributes_close_a_frame_early() -> None:
    tar = t.tarball(*(t.entry(f"f{number}", xattrs={"user.a": b"v" * 60_000}) for number in range(60)))
    one = indexed(tar)
    assert [len(dict(entry.xattrs)[b"user.a"]) for entry in one.index.entries()] == [60_000] * 60
    assert [one.index.entry(number).path for number in range(60)] == [b"f%d" % number for number in range(60)]


def test_d14_what_lies_behind_the_end_is_recorded() -> None:
    tar = t.tarball(t.entry("a")) + t.tarball(t.entry("second"))
    index = indexed(gz(tar)).index
    assert [entry.path for entry in index.entries()] == [b"a"]
    assert index.trailing is not None
    assert (index.end_offset, index.trailing.layer_offset, index.trailing.tar_header) == (512, 1536, True)


def test_damage_in_the_tar_is_recorded_not_raised() -> None:
    tar = bytearray(t.tarball(t.entry("a"), t.entry("b")))
    tar[512] ^= 1
    one = indexed(gz(bytes(tar)))
    assert [entry.path for entry in one.index.entries()] == [b"a"]
    assert one.index.damage is not None
    assert (one.index.damage.rule, one.index.damage.layer_offset) == ("D6", 512)
    assert one.built.damage == one.index.damage


# --- what is refused (C3, C4) -----------------------------------------------------------------------------------------

WRONG = "0" * 64


def test_c4_size_comes_first() -> None:
    stored = gz(layer()[:5120])
    expected = Expected(len(stored) + 1, Digest("sha256", WRONG), DiffID("sha256", WRONG))
    message = f"blob has the wrong size: expected {len(stored) + 1} bytes, found {len(stored)} bytes"
    with pytest.raises(DamagedError, match=message):
        indexed(stored, expected)


@pytest.mark.parametrize("how", ["plain", "gzip by zlib", "zstd frames", "one zstd stream"])
def test_c4_digest_comes_before_diff_id(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "MAX_SPAN", 4 << 20)
    data = layer()
    stored = made(how)
    digest, diff_id = Digest.of(stored), DiffID.of(data)
    wrong_digest, wrong_diff_id = Digest("sha256", WRONG), DiffID("sha256", WRONG)
    with pytest.raises(DamagedError, match=f"wrong digest: expected sha256:{WRONG}, found {digest}"):
        indexed(stored, Expected(len(stored), wrong_digest, wrong_diff_id))
    with pytest.raises(DamagedError, match=f"wrong diff ID: expected sha256:{WRONG}, found {diff_id}"):
        indexed(stored, Expected(len(stored), digest, wrong_diff_id))
    one = indexed(stored, Expected(len(stored) - 1, wrong_digest, wrong_diff_id), tolerant=True)
    assert (one.built.digest, one.built.diff_id) == (digest, diff_id)
    assert [mismatch.what for mismatch in one.index.mismatches] == ["size", "digest", "diff ID"]
    assert one.index.mismatches[1] == Mismatch(
        "digest", f"sha256:{WRONG}", str(digest), f"blob has the wrong digest: expected sha256:{WRONG}, found {digest}"
    )
    check_whole(one, data)


BROKEN: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "gzip cut": ("gzip by zlib", lambda blob: blob[: len(blob) // 2], r"the gzip data is cut off: it ends at blob_off"),
    "gzip without trailer": ("gzip by zlib", lambda blob: blob[:-8], r"the gzip data is cut off"),
    "gzip cut in the trailer": ("gzip by zlib", lambda blob: blob[:-1], r"the gzip data is cut off"),
    "gzip with a wrong CRC": ("gzip by zlib", lambda blob: flip(blob, len(blob) - 8), "incorrect data check"),
    "gzip with a wrong size": ("gzip by zlib", lambda blob: flip(blob, len(blob) - 1), "incorrect length check"),
    "gzip damaged": ("gzip by zlib", lambda blob: flip(blob, len(blob) // 2), "near blob_offset"),
    "gzip and a byte": ("gzip by zlib", lambda blob: blob + b"x", r"not gzip data at blob_offset \d+, behind the last"),
    "gzip and zeros": ("gzip by zlib", lambda blob: blob + bytes(512), r"not gzip data at blob_offset \d+, behind the"),
    "gzip and much junk": ("gzip by zlib", lambda blob: blob + b"junk" * 9999, "behind the last member"),
    "zstd cut": ("zstd", lambda blob: blob[:-5], r"ends within the frame that begins at blob_offset 0"),
    "zstd frames cut": ("zstd frames", lambda blob: blob[:-5], r"ends within the frame that begins at blob_"),
    "zstd and junk": ("zstd", lambda blob: blob + b"junk", r"4 bytes at blob_offset \d+ are not zstd data"),
    "zstd damaged": (
        "zstd with a checksum", lambda blob: flip(blob, len(blob) - 1), "does not decompress",
    ),
    "zstd frames damaged": (
        "zstd frames with checksums", lambda blob: flip(blob, len(blob) - 1), "does not decompress",
    ),
}  # fmt: skip


def flip(blob: bytes, at: int) -> bytes:
    return blob[:at] + bytes((blob[at] ^ 0x10,)) + blob[at + 1 :]


@pytest.mark.parametrize("how", BROKEN)
def test_c3_broken_data_is_refused_with_its_offset_and_examined_up_to_there(how: str) -> None:
    producer, damage, message = BROKEN[how]
    data = layer()
    stored = damage(made(producer))
    with pytest.raises(DamagedError, match=message):
        indexed(stored, Expected(len(stored), Digest.of(stored), DiffID.of(data)))
    # Damaged data usually has another digest than expected: then that is what is said first.
    intact = Digest.of(made(producer))
    with pytest.raises(
        DamagedError, match=rf"wrong digest: expected {intact}, found {Digest.of(stored)} \(.*{message}"
    ):
        indexed(stored, Expected(None, intact, DiffID.of(data)))
    one = indexed(stored, Expected(len(stored), Digest.of(stored), DiffID.of(data)), tolerant=True)
    assert [mismatch.what for mismatch in one.index.mismatches] == ["data"]
    assert one.index.digest == Digest.of(stored)
    got = one.whole()
    assert got[: len(data) // 3] == data[: len(data) // 3]
    assert one.index.entry_count > 400


@pytest.mark.parametrize("stored", [b"{}", b"hsqs" + bytes(5000), random.Random(5).randbytes(5000)])
def test_what_is_no_tar_is_unsupported(stored: bytes) -> None:
    with pytest.raises(UnsupportedError, match="is no layer: it is neither a tar nor compressed with gzip or zstd"):
        indexed(stored)
    with pytest.raises(DamagedError, match="wrong digest"):
        indexed(stored, Expected(None, Digest("sha256", WRONG)))


@pytest.mark.parametrize("how", ARCHIVES)
def test_layers_in_archive_formats_are_unsupported(how: str) -> None:
    with pytest.raises(UnsupportedError, match=f"is compressed with {how}; layers are plain tar, gzip or zstd"):
        indexed(ARCHIVES[how](layer()[:5120]))


def test_c5_unknown_digest_algorithms_are_named() -> None:
    with pytest.raises(UnsupportedError, match="blake3"):
        indexed(b"", Expected(None, Digest("blake3", WRONG)))


def memory_of_a_pass(stored: bytes) -> int:
    """Bytes by which a process grows at most that makes an index of ``stored``."""

    def kib(field: str) -> int:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) for line in status if line.startswith(field))

    def work() -> None:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as peak:
            peak.write("5")  # proc(5): the peak is what there is now
        before = kib("VmRSS")
        with open(os.memfd_create("out"), "w+b") as index, open(os.memfd_create("copy"), "w+b") as copy:
            passes.run(Job(MemoryBlob(stored), Expected(), index, copy, tolerant=False), lambda _: None)
        told.write(b"%d" % (1024 * (kib("VmHWM") - before)))
        told.flush()

    with open(os.memfd_create("told"), "w+b") as told:
        run_forked(work, "measures")
        return int(os.pread(told.fileno(), 100, 0))


def test_zstd_frames_are_not_held_for_their_number() -> None:
    skippable = b"\x50\x2a\x4d\x18" + bytes(4)
    assert memory_of_a_pass(zst(b"") + skippable * 1_000_000) < 60_000_000
    many = zst(layer()) + skippable * (len(layer()) // 8)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(passes, "_MAX_GROUPS", 12)
        assert not indexed(made("zstd frames")).built.reframed
        patched.setattr(passes, "_MAX_GROUPS", 3)
        check_whole(indexed(made("zstd frames")), layer())
        assert indexed(made("zstd frames")).built.reframed
        patched.setattr(passes, "MAX_STORED", 1 << 20)
        check_whole(indexed(many), layer())


def test_c3_zstd_cut_behind_a_frame_too_large_for_a_span_is_refused() -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(passes, "MAX_SPAN", 4 << 20)
        with pytest.raises(DamagedError, match="ends within the frame that begins at blob_offset"):
            indexed(made("zstd") + zst(b"more")[:-1])


def test_a_layer_that_inflates_a_thousandfold_takes_bounded_memory() -> None:
    size = 150_000_000
    stored = gz(bytes(size), 9)
    assert len(stored) * 900 < size
    assert memory_of_a_pass(stored) < 100_000_000
    one = indexed(stored)
    assert one.index.layer_size == size
    assert max(span.size for span in one.index.spans) <= passes.MAX_SPAN
    for number in (0, len(one.index.spans) - 1):
        assert not any(one.index.decode(number, one.read_at))


# --- the child process ------------------------------------------------------------------------------------------------


class _Fails(MemoryBlob):
    """A blob whose reading does something when a certain offset is reached."""

    def __init__(self, data: bytes, at: int, act: Callable[[], None]) -> None:
        super().__init__(data)
        self.at = at
        self.act = act

    def read_at(self, offset: int, size: int, /) -> bytes:
        if offset <= self.at < offset + size and size > 512:
            self.act()
        return super().read_at(offset, size)


def _kill_myself(number: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.kill(os.getpid(), number)


def _crashing_once(marker: Path) -> Callable[[], None]:
    """Ends the process that calls it as a crash does, the first time only."""

    def crash() -> None:
        if not marker.exists():
            marker.touch()
            _kill_myself(signal.SIGABRT)

    return crash


def test_a_killed_child_is_a_plain_error() -> None:
    blob = _Fails(made("gzip by zlib"), 1_000_000, lambda: _kill_myself(signal.SIGKILL))
    with pytest.raises(MachineError, match=r"the process that indexes blob was ended by signal 9 \(Killed\), perhaps"):
        indexed(blob)


def test_a_child_that_crashes_is_tried_again_the_slow_way(tmp_path: Path) -> None:
    one = indexed(_Fails(made("gzip by zlib"), 1_000_000, _crashing_once(tmp_path / "crashed")))
    assert one.built.reframed
    check_whole(one, layer())


def test_a_child_that_crashes_twice_is_an_error() -> None:
    with pytest.raises(MachineError, match="was ended by signal 11"):
        indexed(_Fails(made("gzip by zlib"), 1_000_000, lambda: _kill_myself(signal.SIGSEGV)))


def test_errors_of_the_source_pass_through() -> None:
    def fail() -> None:
        raise DamagedError("the disk says no")

    for how in ("gzip by zlib", "zstd", "plain"):
        with pytest.raises(DamagedError, match="the disk says no"):
            indexed(_Fails(made(how), 1_000_000, fail))


def test_a_blob_that_was_shorter_for_a_moment_is_not_tried_the_slow_way() -> None:
    class Wavering(MemoryBlob):
        cut = False

        def read_at(self, offset: int, size: int, /) -> bytes:
            if size > 512 and not self.cut:
                self.cut = True
                return super().read_at(offset, size)[:-1]
            return super().read_at(offset, size)

    with pytest.raises(DamagedError, match="blob became shorter while it was read: it ends at"):
        indexed(Wavering(gz(layer()[:51200])))


def test_a_bug_in_the_pass_is_raised_as_one() -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        indexed(_Fails(layer(), 1_000_000, fail))


def test_leaving_a_build_kills_its_child() -> None:
    with open(os.memfd_create("out"), "w+b") as out, open(os.memfd_create("copy"), "w+b") as copy:
        with Build(_Fails(made("gzip by zlib"), 1_000_000, signal.pause), out=out, reframed=copy) as one:
            assert one._child is not None
            pid = one._child.pid
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_child_dies_with_its_parent() -> None:
    reader, writer = os.pipe()
    parent = os.fork()
    if parent == 0:
        out = open(os.memfd_create("out"), "w+b")  # noqa: SIM115 - this process is about to be killed
        one = Build(_Fails(made("gzip by zlib"), 1_000_000, signal.pause), out=out)
        assert one._child is not None
        os.write(writer, b"%d" % one._child.pid)
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(writer)
    # The child has the pipe open as well: its end is the end of the pipe.
    assert int(os.read(reader, 100)) > 0
    assert os.read(reader, 100) == b""
    os.close(reader)
    os.waitpid(parent, 0)


def test_several_layers_at_once() -> None:
    layers = [layer()[: size * 512] for size in (100, 4000, 20)]
    with contextlib.ExitStack() as stack:
        builds = []
        for data in layers:
            out = stack.enter_context(open(os.memfd_create("out"), "w+b"))
            builds.append(stack.enter_context(Build(MemoryBlob(gz(data)), out=out)))
        for one in builds:
            while not one.step():
                pass
        results = {one.result().diff_id for one in builds}
    assert results == {DiffID.of(data) for data in layers}


def progress_of(blob: bytes | MemoryBlob) -> list[int]:
    """What a pass itself says about its progress, every 64 KiB."""
    blob = MemoryBlob(blob) if isinstance(blob, bytes) else blob
    told = [0]
    with contextlib.ExitStack() as stack:
        stack.enter_context(pytest.MonkeyPatch.context()).setattr(child, "_REPORT_EVERY", 1 << 16)
        out, copy = (stack.enter_context(open(os.memfd_create(name), "w+b")) for name in ("index", "copy"))
        one = stack.enter_context(Build(blob, out=out, reframed=copy))
        while not one.step():
            told.append(one.stored)
        told.append(one.stored)
        one.result()
        assert one.stored == blob.size
    return told


@pytest.mark.parametrize("how", ["plain", "gzip by zlib", "zstd frames", "one zstd stream"])
def test_progress_grows_to_the_stored_size(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "_CHUNK", 1 << 17)
    told = progress_of(made(how))
    assert told == sorted(told)
    assert len(made(how)) - (1 << 16) < told[-1] <= len(made(how))
    seen: list[int] = []
    indexed(made(how), progress=seen.append)
    assert seen[-1] == len(made(how))


def test_progress_begins_anew_with_a_second_pass(tmp_path: Path) -> None:
    broken = flip(made("gzip by zlib"), len(made("gzip by zlib")) - 8)
    tolerated: list[int] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(child, "_REPORT_EVERY", 1 << 16)
        indexed(broken, tolerant=True, progress=tolerated.append)
    crash = _crashing_once(tmp_path / "crashed")
    crashed = progress_of(_Fails(made("gzip by zlib"), len(made("gzip by zlib")) - 1000, crash))
    for told in (tolerated, crashed):
        falls = [at for at in range(1, len(told)) if told[at] < told[at - 1]]
        assert [told[at] < 1 << 21 for at in falls] == [True]
        assert told[falls[0] - 1] > len(broken) // 2
    assert 0 in crashed[1:], "a new child has done nothing yet"


def test_what_indexes_is_loaded_before_the_first_fork_and_only_then() -> None:
    program = (
        "import os, sys; from ocifs import layer_index\n"
        "class Blob: name = 'blob'; size = 0; read_at = staticmethod(lambda offset, size: b'')\n"
        "name = 'ocifs.layer_index.passes'; print(name in sys.modules)\n"
        "with open(os.memfd_create('out'), 'w+b') as out: layer_index.build(Blob, out=out)\n"
        "print(name in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout == "False\nTrue\n"


def test_a_full_disk_is_said_plainly() -> None:
    with open("/dev/full", "wb") as full, pytest.raises(MachineError):
        layer_index.build(MemoryBlob(layer()), out=full)


def test_a_file_that_may_not_grow_is_a_machine_error(tmp_path: Path) -> None:
    with open(tmp_path / "out", "w+b") as out, open(tmp_path / "copy", "w+b") as copy:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            with pytest.raises(MachineError, match="cannot write the index of blob: File too large"):
                layer_index.build(MemoryBlob(layer()), out=out)
            with pytest.raises(MachineError, match="cannot write the index of blob"):
                layer_index.build(MemoryBlob(made("one zstd stream")), out=out, reframed=copy)
            with pytest.raises(MachineError, match="cannot write the index of blob: File too large"):
                layer_index.build(MemoryBlob(made("gzip by zlib")), out=out)  # written in a lane
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, ignored)


def test_no_copy_allowed_is_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "MAX_SPAN", 4 << 20)
    with open(os.memfd_create("out"), "w+b") as out, pytest.raises(UnsupportedError, match="re-framed copy"):
        layer_index.build(MemoryBlob(made("one zstd stream")), out=out)


# --- the file ---------------------------------------------------------------------------------------------------------


def read_everything(index: LayerIndex, read_at: Callable[[int, int], bytes]) -> tuple[object, ...]:
    return (
        list(index.entries()),
        [bytes(index.decode(number, read_at)) for number in range(len(index.spans))],
        index.notices,
        (index.digest, index.diff_id, index.stored_size, index.layer_size, index.compression, index.reframed),
        (index.data_size, index.entry_count, index.end_offset, index.trailing, index.damage, index.mismatches),
    )


@cache
def small() -> Indexed:
    return indexed(
        gz(t.tarball(t.entry("a", b"x" * 5000), t.entry("../b", b"y"), t.entry("", b"z")) + t.tarball(t.entry("c")))
    )


def test_every_damaged_byte_of_an_index_is_found() -> None:
    one = small()
    truth = read_everything(one.index, one.read_at)
    for at in range(len(one.index_bytes)):
        for mask in (0x01, 0xFF):
            broken = bytearray(one.index_bytes)
            broken[at] ^= mask
            try:
                got = read_everything(load(MemoryBlob(bytes(broken), "the index")), one.read_at)
            except OcifsError as error:
                assert "the index" in str(error)
                continue
            assert got == truth, at


def test_every_cut_of_an_index_is_found() -> None:
    data = small().index_bytes
    for size in range(len(data)):
        with pytest.raises(OcifsError, match="the index"):
            load(MemoryBlob(data[:size], "the index"))
    with pytest.raises(DamagedError, match=f"it is {len(data) + 1} bytes, not {len(data)}; run 'ocifs cache clear'"):
        load(MemoryBlob(data + b"x", "the index"))


def test_another_format_version_is_stale() -> None:
    data = bytearray(small().index_bytes)
    data[8] += 1
    with pytest.raises(StaleFormatError, match=f"format version {layer_index.FORMAT_VERSION + 1}"):
        load(MemoryBlob(bytes(data), "the index"))


def test_a_second_implementation_can_read_it() -> None:
    """Reads an index with struct, json and hashlib alone, from the specification in the format's docstring."""
    one, data = small(), small().index_bytes
    magic, version, header_size, size = struct.unpack_from("<8sIIQ", data)
    assert (magic, version, header_size, size) == (b"ocifsLIX", 1, 248, len(data))
    assert hashlib.sha256(data[:216]).digest() == data[216:248]
    sections = []
    for number in range(4):
        offset, length, sha256 = struct.unpack_from("<QQ32s", data, 24 + 48 * number)
        sections.append(data[offset : offset + length])
        assert hashlib.sha256(sections[-1]).digest() == sha256
    meta = json.loads(sections[0])
    assert (meta["compression"], meta["entry_count"], meta["layer_size"]) == ("gzip", 3, one.index.layer_size)
    assert isinstance(json.loads(zstandard.decompress(sections[1])), list)
    first, offset, length, raw_size, sha256 = struct.unpack("<QQII32s", sections[2])
    raw = zstandard.decompress(data[offset : offset + length])
    assert (first, len(raw), sha256) == (0, raw_size, hashlib.sha256(data[offset : offset + length]).digest())
    assert struct.unpack_from("<I3I", raw) == (3, 1, 4, 0)
    assert raw[4 + 3 * 80 :].startswith(b"a")
    blob_offset, blob_size, layer_offset = struct.unpack_from("<QQQ", sections[3])
    assert (blob_offset, blob_size, layer_offset, len(sections[3])) == (0, len(one.source), 0, 112)
    assert sections[3][48:80] == hashlib.sha256(one.source).digest()
    assert sections[3][41] == 1


def test_memory_of_iterating_is_flat() -> None:
    peaks = []
    for count in (3_000, 12_000):
        index = indexed(b"".join(t.entry(f"{number:07}") for number in range(count))).index
        tracemalloc.start()
        try:
            assert sum(1 for _ in index.entries()) == count
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] < peaks[0] + 100_000


def test_compression_is_what_the_blob_is() -> None:
    assert sample().index.compression is Compression.GZIP
    assert small().index.compression is Compression.GZIP
    assert indexed(b"").index.compression is Compression.EMPTY
    assert sys.byteorder in {"little", "big"}


@pytest.mark.parametrize("number", range(24))
def test_a_moment_of_fuzzing(number: int) -> None:
    fuzz_decoders.check(number)
