"""The tar scanner against other readers and writers, and its behaviour as a push parser.

The rules it follows have literal tests in `tests/test_tar_rules.py`.
"""

from __future__ import annotations

import io
import itertools
import os
import random
import shutil
import subprocess
import tarfile
from decimal import Decimal
from typing import TYPE_CHECKING

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ocifs.tar import NOTICE_LIMIT, EntryType, TarScanner
from tests.fuzz import fuzz_tar
from tests.support import tarball as t
from tests.support.tarball import entry, tarball

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ocifs.tar import Entry

TARFILE_TYPES = {
    tarfile.REGTYPE: EntryType.FILE,
    tarfile.AREGTYPE: EntryType.FILE,
    tarfile.CONTTYPE: EntryType.FILE,
    tarfile.GNUTYPE_SPARSE: EntryType.FILE,
    tarfile.LNKTYPE: EntryType.HARDLINK,
    tarfile.SYMTYPE: EntryType.SYMLINK,
    tarfile.CHRTYPE: EntryType.CHAR,
    tarfile.BLKTYPE: EntryType.BLOCK,
    tarfile.DIRTYPE: EntryType.DIR,
    tarfile.FIFOTYPE: EntryType.FIFO,
}


def entries_of(layer: bytes, chunk: int = 1 << 20) -> list[Entry]:
    scanner = TarScanner()
    found = [e for at in range(0, len(layer), chunk) for e in scanner.feed(layer[at : at + chunk])]
    summary = scanner.finish()
    assert summary.damage is None
    assert summary.entry_count == len(found)
    return found


def content(layer: bytes, found: Entry) -> bytes:
    """The file as a reader sees it, holes filled with NULs."""
    stored = layer[found.data_offset : found.data_offset + found.stored_size]
    if found.sparse is None:
        return stored
    data = bytearray(found.size)
    for offset, length in found.sparse:
        data[offset : offset + length], stored = stored[:length], stored[length:]
    return bytes(data)


def assert_as_tarfile_reads(layer: bytes) -> None:
    """Compare each entry with what Python's tarfile says, which is an independent reader."""
    found = entries_of(layer)
    with tarfile.open(fileobj=io.BytesIO(layer), encoding="utf-8", errors="surrogateescape") as archive:
        members = archive.getmembers()
        assert [e.path.rstrip(b"/") for e in found] == [os.fsencode(m.name) for m in members]
        for e, m in zip(found, members, strict=True):
            assert e.type == TARFILE_TYPES[m.type]
            assert (e.mode, e.uid, e.gid) == (m.mode & 0o7777, m.uid, m.gid)
            assert (e.uname, e.gname) == (os.fsencode(m.uname), os.fsencode(m.gname))
            assert e.mtime_ns == int(Decimal(m.pax_headers.get("mtime", int(m.mtime))) * 10**9)
            if m.isreg():
                file = archive.extractfile(m)
                assert file is not None
                assert content(layer, e) == file.read()
            if m.islnk() or m.issym():
                assert e.link == os.fsencode(m.linkname)
            if m.ischr() or m.isblk():
                assert e.rdev == (m.devmajor, m.devminor)


def members() -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Members of every kind, some of which no dialect but PAX can hold, and GNU's by its extensions."""

    def member(name: str, kind: bytes, data: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
        info = tarfile.TarInfo(name)
        info.type = kind
        info.size = len(data)
        info.mtime = 1_700_000_000
        for key, value in fields.items():
            setattr(info, key, value)
        return info, data

    yield member("usr", tarfile.DIRTYPE, mode=0o1755)
    yield member("usr/file", tarfile.REGTYPE, b"x" * 513, mode=0o4711, uid=1000, gid=100, uname="me", gname="us")
    yield member("usr/empty", tarfile.REGTYPE)
    yield member("usr/old", tarfile.AREGTYPE, b"old")
    yield member("usr/contiguous", tarfile.CONTTYPE, b"7" * 1024)
    yield member("usr/link", tarfile.SYMTYPE, linkname="file")
    yield member("usr/hard", tarfile.LNKTYPE, linkname="usr/file")
    yield member("dev/null", tarfile.CHRTYPE, devmajor=1, devminor=3)
    yield member("dev/sda", tarfile.BLKTYPE, devmajor=8, devminor=1)
    yield member("fifo", tarfile.FIFOTYPE)
    yield member("d/" * 60 + "n", tarfile.REGTYPE, b"prefix")


def beyond_ustar() -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Members that need an extension."""
    for name, link in (("n" * 255, ""), ("d" * 300 + "/n", ""), ("link", "t" * 300), ("ünï" * 50, "ö" * 200)):
        info = tarfile.TarInfo(name)
        info.type, info.linkname = (tarfile.SYMTYPE, link) if link else (tarfile.REGTYPE, "")
        info.uid, info.gid = 2**31, 2**32 - 1
        yield info, b""


@pytest.mark.parametrize("dialect", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_d1_archives_written_by_tarfile_read_as_tarfile_reads_them(dialect: int) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=dialect) as archive:
        for info, data in members():
            archive.addfile(info, io.BytesIO(data))
        if dialect != tarfile.USTAR_FORMAT:
            for info, data in beyond_ustar():
                archive.addfile(info, io.BytesIO(data))
        if dialect == tarfile.PAX_FORMAT:
            info = tarfile.TarInfo("precise")
            info.mtime = 1_700_000_000.25
            info.pax_headers = {"SCHILY.xattr.user.a": "b"}
            archive.addfile(info)
    assert_as_tarfile_reads(buffer.getvalue())


# Not seeds 1 and 2: tarfile applies global headers, keeps negative times, and reads odd types and prefixes otherwise.
@pytest.mark.parametrize("seed", [0, 3, 4, 5])
def test_d1_hand_made_archives_read_as_tarfile_reads_them(seed: int) -> None:
    assert_as_tarfile_reads(fuzz_tar.SEEDS[seed])


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Make a directory with what an ordinary user can make, for real tar programs to pack."""
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "file").write_bytes(b"content\n" * 100)
    (root / "file").chmod(0o640)
    (root / "sub" / ("n" * 90)).write_bytes(b"")
    (root / "sub" / "link").symlink_to("../file")
    (root / "sub" / "hard").hardlink_to(root / "file")
    os.mkfifo(root / "fifo")
    with (root / "sparse").open("wb") as file:
        for number in range(40):
            file.seek(number * 100_000)
            file.write(b"%d" % number)
        file.truncate(5_000_000)
    for path in (root / "file", root / "sub", root / "sparse"):
        os.utime(path, ns=(0, 1_700_000_000_123_456_789))
    return root


def compare_with_directory(layer: bytes, root: Path, *, precise: bool) -> dict[bytes, Entry]:
    """Compare the entries of an archive of ``root`` with the files themselves."""
    found = {os.path.normpath(e.path): e for e in entries_of(layer)}
    expected = {b"."} | {os.fsencode(path.relative_to(root)) for path in root.rglob("*")}
    assert set(found) == expected
    for path, e in found.items():
        file = root / os.fsdecode(path)
        status = file.lstat()
        assert e.mode == status.st_mode & 0o7777
        assert (e.uid, e.gid) == (status.st_uid, status.st_gid)
        assert e.mtime_ns == (status.st_mtime_ns if precise else status.st_mtime_ns // 10**9 * 10**9)
        if e.type is EntryType.FILE:
            assert content(layer, e) == file.read_bytes()
        if e.type is EntryType.SYMLINK:
            assert os.fsdecode(e.link) == str(file.readlink())
        if e.type is EntryType.HARDLINK:
            assert file.samefile(root / os.fsdecode(os.path.normpath(e.link)))
    assert [path for path, e in found.items() if e.type is EntryType.FIFO] == [b"fifo"] * (root / "fifo").exists()
    assert {found[b"file"].type, found[b"sub/hard"].type} == {EntryType.FILE, EntryType.HARDLINK}
    return found


def pack(*command: str) -> bytes:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout


@pytest.mark.parametrize("dialect", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_d1_archives_written_by_gnu_tar_hold_the_directory(directory: Path, dialect: str) -> None:
    if dialect == "v7":
        (directory / "fifo").unlink()  # v7 has no fifos
    layer = pack("tar", f"--format={dialect}", "-C", str(directory), "-cf", "-", ".")
    compare_with_directory(layer, directory, precise=dialect == "posix")


@pytest.mark.parametrize(
    "options",
    [
        ["--format=gnu"],
        ["--format=posix", "--sparse-version=0.0"],
        ["--format=posix", "--sparse-version=0.1"],
        ["--format=posix", "--sparse-version=1.0"],
    ],
)
def test_d8_sparse_files_written_by_gnu_tar_hold_the_directory(directory: Path, options: list[str]) -> None:
    # How tar looks for holes is told, for not every file system reports them.
    layer = pack("tar", "--sparse", "--hole-detection=raw", *options, "-C", str(directory), "-cf", "-", ".")
    found = compare_with_directory(layer, directory, precise="--format=posix" in options)
    sparse = found[b"sparse"]
    assert sparse.size == 5_000_000
    assert sparse.stored_size < 50_000
    assert sparse.sparse is not None
    assert len(sparse.sparse) == 40


@pytest.mark.skipif(shutil.which("bsdtar") is None, reason="bsdtar (libarchive-tools) is not installed")
@pytest.mark.parametrize("dialect", ["v7", "ustar", "gnutar", "pax"])
def test_d1_archives_written_by_bsdtar_hold_the_directory(directory: Path, dialect: str) -> None:
    if dialect == "v7":
        (directory / "fifo").unlink()
    layer = pack("bsdtar", f"--format={dialect}", "-C", str(directory), "-cf", "-", ".")
    compare_with_directory(layer, directory, precise=dialect == "pax")


# --- pushing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(len(fuzz_tar.SEEDS)))
@pytest.mark.parametrize("chunk", [1, 7, 511, 512, 513])
def test_size_of_the_chunks_makes_no_difference(seed: int, chunk: int) -> None:
    layer = fuzz_tar.SEEDS[seed] + b"behind"
    assert fuzz_tar.scan(layer, list(range(0, len(layer), chunk))) == fuzz_tar.scan(layer, [])


@given(st.integers(0, 10**9), st.lists(st.floats(0, 1), max_size=20))
def test_chunks_make_no_difference_to_damaged_archives(number: int, cuts: list[float]) -> None:
    archive = fuzz_tar.case(number)
    assert fuzz_tar.scan(archive, [int(cut * len(archive)) for cut in cuts]) == fuzz_tar.scan(archive, [])


def test_entry_comes_with_the_chunk_that_completes_its_header() -> None:
    layer = tarball(entry("a", b"x" * 512), t.gnu_long("long"), entry("b"))
    scanner = TarScanner()
    came = [[e.path for e in scanner.feed(layer[at : at + 512])] for at in range(0, len(layer), 512)]
    assert came == [[b"a"], [], [], [], [b"long"], [], []]


def test_any_buffer_of_bytes_is_taken() -> None:
    layer = tarball(entry("a", b"data"))
    for data in (layer, memoryview(layer), memoryview(bytearray(layer)), memoryview(layer).cast("I")):
        scanner = TarScanner()
        assert [e.path for e in scanner.feed(data)] == [b"a"]
        assert scanner.finish().damage is None


def test_entries_do_not_hang_on_to_the_buffer() -> None:
    buffer = bytearray(tarball(entry("a", b"data", xattrs={"user.a": b"v"})))
    scanner = TarScanner()
    (found,) = scanner.feed(memoryview(buffer))
    buffer[:] = bytes(len(buffer))
    buffer.clear()  # would raise BufferError if a view of it were alive
    assert (found.path, found.xattrs) == (b"a", ((b"user.a", b"v"),))


def test_data_can_be_passed_over_by_a_reader_that_seeks() -> None:
    layer = tarball(entry("a", b"x" * 100_000), entry("b", b"y" * 1000)) + bytes(512)
    scanner = TarScanner()
    found, position, fed = [], 0, 0
    while position < len(layer):
        if scanner.passable:
            step = min(scanner.passable, len(layer) - position)
            scanner.pass_over(step)
        else:
            step = 512
            found += scanner.feed(layer[position : position + step])
            fed += step
        position += step
    assert (found, scanner.finish()) == fuzz_tar.scan(layer, [])
    assert fed == 512 * 5


def test_only_passable_bytes_can_be_passed_over() -> None:
    scanner = TarScanner()
    with pytest.raises(ValueError, match="1 bytes are not all passable"):
        scanner.pass_over(1)
    scanner.feed(b"\xff" * 512)
    scanner.pass_over(10**15)
    summary = scanner.finish()
    assert (summary.size, summary.end_offset) == (10**15 + 512, 0)


def test_finish_may_be_called_again_and_feed_may_not() -> None:
    scanner = TarScanner()
    scanner.feed(entry("a", b"data")[:600])
    assert scanner.finish() == scanner.finish()
    with pytest.raises(ValueError, match="the data is over"):
        scanner.feed(b"")


# --- bounds ----------------------------------------------------------------------------------------------------------


def test_notices_are_bounded_and_the_rest_is_counted() -> None:
    scanner = TarScanner()
    assert len(scanner.feed(entry("x", type=b"V") * (NOTICE_LIMIT + 7))) == NOTICE_LIMIT + 7
    notices = scanner.finish().notices
    assert len(notices) == NOTICE_LIMIT + 1
    assert notices[-1].message == "7 further notices are not kept"


def test_message_about_a_monstrous_name_is_short() -> None:
    scanner = TarScanner()
    scanner.feed(t.gnu_long(b"\x1b]0;evil\x07" * 50_000) + entry("x", b"data")[:513])
    damage = scanner.finish().damage
    assert damage is not None
    assert len(damage.message) < 1500
    assert damage.message.isprintable()
    assert damage.message.endswith("'… are missing")


@pytest.mark.parametrize(
    "archive",
    [
        *fuzz_tar.SEEDS,
        t.header("x", type=t.PAX, size=2**63 - 1),
        t.header("L", type=t.GNU_LONG_NAME, size=2**33 - 1),
        t.header("file", size=2**63 - 1) * 100,
        t.header("s", type=t.GNU_SPARSE, magic="gnu", raw={"gnu_realsize": t.octal(2**62, 12), "gnu_extended": b"\1"}),
        t.sparse_pax_1_0("s", [(0, b"x")], 2**62, raw_map=b"4611686018427387903\n0\n1\n"),
        entry("s", pax={"GNU.sparse.map": "0,1", "GNU.sparse.numblocks": "4611686018427387903"}),
    ],
)
def test_memory_follows_what_is_fed_and_not_what_is_declared(archive: bytes) -> None:
    fuzz_tar.check_memory(archive)


def test_damaged_archives_raise_nothing_and_keep_the_promises_of_an_entry() -> None:
    for number in range(3000):
        fuzz_tar.check(fuzz_tar.case(number), random.Random(number))


@given(st.binary(max_size=3000), st.integers(0, 4))
def test_bytes_of_no_archive_raise_nothing(junk: bytes, blocks: int) -> None:
    fuzz_tar.check(bytes(512 * blocks) + junk, random.Random(0))
    fuzz_tar.check(t.pax_header(junk) + entry("x"), random.Random(0))
    fuzz_tar.check(t.sparse_pax_1_0("s", [(0, b"x")], 9, raw_map=junk) + entry("x"), random.Random(0))


# --- checksums and generated archives --------------------------------------------------------------------------------


@given(st.binary(min_size=511, max_size=511), st.booleans(), st.integers(-1, 1))
def test_d1_checksum_agrees_with_adding_up(block: bytes, signed: bool, wrong: int) -> None:
    # Behind the end the checksum alone decides what is a header, so that the rest of the block may be anything.
    block = b"\1" + block
    summed = block[:148] + b" " * 8 + block[156:]
    sums = sum(summed), sum(byte - 256 if byte > 127 else byte for byte in summed)
    declared = sums[signed] + wrong
    assume(declared >= 0)
    scanner = TarScanner()
    scanner.feed(bytes(1024) + block[:148] + b"%06o\0 " % declared + block[156:])
    trailing = scanner.finish().trailing
    assert trailing is not None
    assert trailing.tar_header is (declared in sums)


name = st.binary(min_size=1, max_size=300).map(lambda text: text.replace(b"\0", b"/"))


@given(
    st.lists(
        st.tuples(
            name,
            st.binary(max_size=1100),
            st.integers(0, 2**32 - 1),
            st.integers(0, 0o7777),
            st.dictionaries(st.text("abc.", min_size=1), st.binary(max_size=50), max_size=3),
            st.sampled_from(["ustar", "gnu", "star"]),
        ),
        max_size=6,
    )
)
def test_what_the_builder_writes_comes_back(
    files: list[tuple[bytes, bytes, int, int, dict[str, bytes], str]],
) -> None:
    layer = tarball(
        *(
            entry(path, data, type=t.FILE, uid=uid, mode=mode, xattrs=xattrs, magic=magic)
            for path, data, uid, mode, xattrs, magic in files
        )
    )
    found = entries_of(layer, chunk=700)
    assert [
        (e.path, content(layer, e), e.uid, e.mode, {key.decode(): value for key, value in e.xattrs}) for e in found
    ] == [(path, data, uid, mode, xattrs) for path, data, uid, mode, xattrs, _ in files]
    assert all(a.data_offset + a.stored_size <= b.header_offset for a, b in itertools.pairwise(found))
