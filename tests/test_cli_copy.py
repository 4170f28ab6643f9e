"""Out of an image: cp writes files and trees, export writes a tar. Checked against GNU tar, tarfile and our own scanner."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest

from ocifs import archive
from ocifs.cli.unpack import remove_tree
from ocifs.tar import EntryType, TarScanner
from ocifs.tree import Kind
from tests.support.command import OCIFS, SAMPLE, Run, runner
from tests.support.damage import flip
from tests.support.layout import blob_path, write_layout
from tests.support.tarball import CHAR, FIFO, HARDLINK, entry, sparse_pax_0_1, tarball

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="owners and devices can be made by root only")


@pytest.fixture
def run(capfdbinary: pytest.CaptureFixture[bytes]) -> Run:
    return runner(capfdbinary)


def image(tmp_path: Path, *layers: bytes) -> str:
    write_layout(tmp_path / "image", layers)
    return str(tmp_path / "image")


CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")
"""cap_net_bind_service=ep, as struct vfs_cap_data has it (linux/capability.h)."""

NOTES = {"user.bin": b"\0\n=\xff", "user.text": b"text"}

ODD = tarball(
    entry("./", mode=0o751, uid=5, gid=6, mtime=1_600_000_000),
    entry("d/", mode=0o2711, uid=1000, gid=100, mtime=1_700_000_001.25),
    entry("d/" + "long" * 50, b"long name"),
    entry(b"d/raw\xff\n", b"raw name", mtime=1_700_000_002),
    entry("d/é", b"utf-8"),
    entry("d/suid", b"#!", mode=0o4755, uid=3_000_000, gid=2_999_999),
    entry("d/hard", type=HARDLINK, link="d/suid", mode=0o4755, uid=3_000_000, gid=2_999_999),
    entry("d/link", link="../" + "x" * 150),
    entry("d/dev", type=CHAR, rdev=(4, 300), mode=0o600),
    entry("d/pipe", type=FIFO, mode=0o640),
    entry(
        "d/caps", b"\x7fELF", xattrs={"security.capability": bytes.fromhex("0100000200040000000000000000000000000000")}
    ),
    entry(
        "d/noted",
        b"x",
        xattrs={"user.bin": b"\0\n=\xff", "user.text": b"text"},
        mode=0o400,
        mtime="1700000003.123456789",
    ),
    sparse_pax_0_1("d/sparse", [(0, b"head"), (1 << 20, b"tail" * 300), ((1 << 20) + 1300, b"more")], 3 << 20),
    sparse_pax_0_1("d/hole", [], 5 << 20),
    entry("z", b"after"),
)


def snapshot(top: Path) -> dict[bytes, tuple[object, ...]]:
    """Everything about a tree on disk that a copy should keep."""
    found: dict[bytes, tuple[object, ...]] = {}
    groups: dict[int, bytes] = {}
    for where, directories, files in os.walk(os.fsencode(top)):
        for name in [b".", *directories, *files] if where == os.fsencode(top) else [*directories, *files]:
            path = os.path.normpath(os.path.join(where, name))
            status = os.lstat(path)
            relative = os.path.relpath(path, os.fsencode(top))
            content: bytes | None = None
            if stat.S_ISREG(status.st_mode):
                content = Path(os.fsdecode(path)).read_bytes()
            elif stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            keys = sorted(os.listxattr(path, follow_symlinks=False))
            xattrs = tuple((key, os.getxattr(path, key, follow_symlinks=False)) for key in keys)
            first = groups.setdefault(status.st_ino, relative) if not stat.S_ISDIR(status.st_mode) else relative
            found[relative] = (
                *(status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, status.st_rdev),
                *(content, xattrs, first),
            )
    return found


# -- cp ------------------------------------------------------------------------------------------------------------


def test_cp_copies_a_file_into_a_directory_or_to_a_name(run: Run, tmp_path: Path) -> None:
    assert run("cp", SAMPLE, "/etc/motd", str(tmp_path)) == (0, b"", "")
    assert run("cp", SAMPLE, "etc/motd", str(tmp_path / "other")) == (0, b"", "")
    for name in ("motd", "other"):
        path = tmp_path / name
        assert path.read_bytes() == b"Welcome to the merged view of three layers.\n"
        assert (stat.S_IMODE(path.stat().st_mode), path.stat().st_mtime_ns) == (0o644, 1709456400 * 10**9)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "ocifs-cache") == ["motd", "other"]


def test_cp_copies_a_whole_tree_with_its_hard_links_and_times(run: Run, tmp_path: Path) -> None:
    assert run("cp", SAMPLE, "/srv/almanac", str(tmp_path / "copy")).status == 0
    copy = tmp_path / "copy"
    assert sorted(os.listdir(copy)) == ["café.txt", "index.db", "requests", "table.bin", "table.latest"]
    assert copy.stat().st_mtime_ns == 1709370000 * 10**9
    assert (copy / "table.bin").samefile(copy / "table.latest")
    assert (copy / "table.bin").stat().st_nlink == 2
    assert stat.S_ISFIFO((copy / "requests").stat().st_mode)
    assert os.getxattr(copy / "table.bin", "user.checksum").startswith(b"9302fe60")


def test_cp_keeps_holes(run: Run, tmp_path: Path) -> None:
    assert run("cp", SAMPLE, "/srv/almanac/index.db", str(tmp_path / "index")).status == 0
    status = (tmp_path / "index").stat()
    assert status.st_size == 2 << 20
    assert status.st_blocks * 512 < 64 << 10


@root_only
def test_cp_as_root_keeps_owners_setuid_devices_and_capabilities(run: Run, tmp_path: Path) -> None:
    where = image(tmp_path, ODD)
    assert run("cp", where, "/", str(tmp_path / "copy")) == (0, b"", "")
    found = snapshot(tmp_path / "copy")
    assert found[b"."][:4] == (0o40751, 5, 6, 1_600_000_000 * 10**9)
    assert found[b"d"][:4] == (0o42711, 1000, 100, 1_700_000_001_250_000_000)
    assert found[b"d/suid"][:3] == (0o104755, 3_000_000, 2_999_999)
    assert found[b"d/hard"][-1] == found[b"d/suid"][-1]
    assert (found[b"d/dev"][0], found[b"d/dev"][4]) == (0o20600, os.makedev(4, 300))
    assert found[b"d/noted"][3] == 1_700_000_003_123_456_789
    assert found[b"d/noted"][6] == tuple(NOTES.items())
    assert os.getxattr(tmp_path / "copy/d/caps", "security.capability")[4:6] == b"\0\x04"
    assert found[b"d/raw\xff\n"][5] == b"raw name"
    assert found[b"d/sparse"][5] == (b"head".ljust(1 << 20, b"\0") + b"tail" * 300).ljust(
        (1 << 20) + 1300, b"\0"
    ) + b"more".ljust((2 << 20) - 1300, b"\0")


def test_cp_without_privileges_drops_setuid_and_says_what_it_left_out(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.geteuid", lambda: 12345)
    monkeypatch.setattr("os.mknod", refuse)
    monkeypatch.setattr("ocifs.store.Store._refuse_foreign", lambda *_: None)
    where = image(tmp_path, ODD)
    status, out, err = run("cp", where, "/d", str(tmp_path / "copy"))
    assert (status, out) == (6, b"")
    assert err == "ocifs: left out copy/dev: making a device needs root\n"
    assert stat.S_IMODE((tmp_path / "copy/suid").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "copy").stat().st_mode) == 0o711
    assert (tmp_path / "copy/suid").stat().st_uid == os.stat(tmp_path).st_uid


def test_cp_of_a_link_copies_the_link_unless_told_to_follow(run: Run, tmp_path: Path) -> None:
    assert run("cp", SAMPLE, "/bin", str(tmp_path / "link")).status == 0
    assert (tmp_path / "link").readlink() == Path("usr/bin")
    assert run("cp", "-L", SAMPLE, "/bin", str(tmp_path / "followed")).status == 0
    assert sorted(os.listdir(tmp_path / "followed")) == ["become", "hello", "listen"]


def test_cp_replaces_nothing_unless_forced_and_never_a_directory(run: Run, tmp_path: Path) -> None:
    there = tmp_path / "motd"
    there.write_text("mine")
    status, _, err = run("cp", SAMPLE, "/etc/motd", str(tmp_path))
    assert (status, err) == (7, "ocifs: motd exists already; say --force to replace it\n")
    assert there.read_text() == "mine"
    assert run("cp", "--force", SAMPLE, "/etc/motd", str(tmp_path)).status == 0
    assert there.read_text().startswith("Welcome")
    (tmp_path / "etc").mkdir()
    status, _, err = run("cp", "--force", SAMPLE, "/etc", str(tmp_path))
    assert status == 7
    assert "directories are never replaced" in err
    status, _, err = run("cp", "--force", SAMPLE, "/etc", str(there))
    assert status == 7
    assert sorted(os.listdir(tmp_path)) == ["etc", "motd", "ocifs-cache"]


def test_cp_replaces_a_link_itself_and_not_what_it_points_to(run: Run, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "motd").symlink_to(victim)
    assert run("cp", SAMPLE, "/etc/motd", str(tmp_path / "motd")).status == 7
    assert run("cp", "--force", SAMPLE, "/etc/motd", str(tmp_path / "motd")).status == 0
    assert victim.read_text() == "precious"
    assert not (tmp_path / "motd").is_symlink()


def test_cp_never_writes_through_a_link_of_the_image(run: Run, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    layers = [
        tarball(entry("evil", link=str(outside)), entry("up", link="..")),
        tarball(entry("evil/file", b"x"), entry("up/file", b"x")),
    ]
    assert run("cp", image(tmp_path, *layers), "/", str(tmp_path / "copy")).status == 0
    assert list(outside.iterdir()) == []
    assert (tmp_path / "copy/evil/file").read_bytes() == b"x"
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize(
    ("path", "dest", "status", "message"),
    [
        ("/", ".", 2, "has no name to have in it"),
        ("/etc/..", ".", 2, "has no name to have in it"),
        ("/etc/motd", "no/such/dir/x", 3, "there is no directory"),
        ("/etc/motd", "", 2, "the destination is empty"),
        ("/etc/nope", "x", 3, "does not exist in the image"),
        ("/etc/motd", "file/x", 6, "cannot copy into"),
    ],
)
def test_cp_refuses_what_cannot_be_meant(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, dest: str, status: int, message: str
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    found, out, err = run("cp", SAMPLE, path, dest)
    assert (found, out) == (status, b"")
    assert message in err


def test_cp_that_fails_leaves_nothing_behind(run: Run, tmp_path: Path) -> None:
    digests = write_layout(tmp_path / "image", [tarball(entry("d/a", b"fine"), entry("d/b", os.urandom(300_000)))])
    where = str(tmp_path / "image")
    assert run("index", where).status == 0
    flip(blob_path(tmp_path / "image", digests["layers"][0]), 150_000)
    (tmp_path / "into").mkdir()
    assert run("cp", where, "/d", str(tmp_path / "into")).status == 4
    assert list((tmp_path / "into").iterdir()) == []


def test_cp_copies_trees_deeper_than_there_are_descriptors_and_removes_them_again(run: Run, tmp_path: Path) -> None:
    depth = 2000  # names, of 2 bytes each: within PATH_MAX
    where = image(tmp_path, tarball(entry("d/" * depth + "leaf", b"deep")))
    (tmp_path / "into").mkdir()
    try:
        assert run("cp", where, "/d", str(tmp_path / "into")) == (0, b"", "")
        fd = os.open(tmp_path / "into", os.O_RDONLY)
        for _ in range(depth):
            below = os.open("d", os.O_RDONLY | os.O_NOFOLLOW, dir_fd=fd)
            os.close(fd)
            fd = below
        assert os.listdir(fd) == ["leaf"]
        os.close(fd)
    finally:
        parent = os.open(tmp_path, os.O_RDONLY)
        remove_tree(parent, b"into")
        os.close(parent)
    assert not (tmp_path / "into").exists()


# -- export --------------------------------------------------------------------------------------------------------


@root_only
def test_export_unpacked_by_gnu_tar_is_what_cp_makes(run: Run, tmp_path: Path) -> None:
    where = image(tmp_path, ODD)
    assert run("cp", where, "/", str(tmp_path / "copy")).status == 0
    assert run("export", where, "-o", str(tmp_path / "out.tar")) == (0, b"", "")
    (tmp_path / "unpacked").mkdir()
    gnu_tar = ["tar", "--xattrs", "--xattrs-include=*", "--numeric-owner", "-xpf", str(tmp_path / "out.tar")]
    done = subprocess.run(gnu_tar, cwd=tmp_path / "unpacked", capture_output=True, check=True)
    # The one thing GNU tar does not know; it goes on.
    assert {line for line in done.stderr.decode().splitlines() if "hdrcharset" not in line} == set()
    assert snapshot(tmp_path / "unpacked") == snapshot(tmp_path / "copy")


def test_export_of_the_sample_lists_as_expected(run: Run) -> None:
    status, out, err = run("export", SAMPLE)
    assert (status, err) == (0, "")
    with tarfile.open(fileobj=io.BytesIO(out)) as tar:
        members = {member.name: member for member in tar}
        assert list(members)[:5] == [".", "bin", "dev", "dev/null", "etc"]
        assert (members["dev/null"].devmajor, members["dev/null"].devminor) == (1, 3)
        latest = members["srv/almanac/table.latest"]
        assert (latest.islnk(), latest.linkname) == (True, "srv/almanac/table.bin")
        assert members["var/log/audit.log"].pax_headers["mtime"] == "1709456400.123456789"
        index = tar.extractfile("srv/almanac/index.db")
        assert index is not None
        content = index.read()
    assert content == b"head of the index\n".ljust((1 << 20) - 512, b"\0") + b"tail of the index\n".ljust(
        (1 << 20) + 512, b"\0"
    )
    assert len(out) < 64 << 10


def test_export_is_deterministic_and_the_same_to_a_file(run: Run, tmp_path: Path) -> None:
    first = run("export", SAMPLE).out
    assert run("export", "-o", str(tmp_path / "a.tar"), SAMPLE).status == 0
    assert (tmp_path / "a.tar").read_bytes() == first
    assert run("export", "--cache-dir", str(tmp_path / "other"), SAMPLE).out == first


def test_an_exported_image_read_by_ocifs_is_exported_the_same(run: Run, tmp_path: Path) -> None:
    first = run("export", image(tmp_path, ODD)).out
    write_layout(tmp_path / "again", [first])
    assert run("export", str(tmp_path / "again")).out == first


def test_export_of_a_hole_of_an_exbibyte_is_small(run: Run, tmp_path: Path) -> None:
    size = 1 << 60
    where = image(tmp_path, tarball(sparse_pax_0_1("vast", [(0, b"x")], size)))
    status, out, err = run("export", where)
    if status == 5:  # more than the image tree can hold: refused, not stretched
        assert out == b""
        return
    assert (status, err) == (0, "")
    assert len(out) < 10_000


def test_export_to_a_terminal_is_refused(run: Run) -> None:
    assert run("index", SAMPLE).status == 0
    done = subprocess.run(
        ["script", "-qec", f"{' '.join(OCIFS)} export {SAMPLE}", "/dev/null"], capture_output=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout.startswith(b"ocifs: an archive is not written to a terminal: redirect the output or say -o FILE")


def test_export_that_fails_leaves_the_old_file_and_nothing_else(run: Run, tmp_path: Path) -> None:
    digests = write_layout(tmp_path / "image", [tarball(entry("b", os.urandom(300_000)))])
    where = str(tmp_path / "image")
    assert run("index", where).status == 0
    flip(blob_path(tmp_path / "image", digests["layers"][0]), 150_000)
    (tmp_path / "into").mkdir()
    (tmp_path / "into/out.tar").write_text("old")
    assert run("export", where, "-o", str(tmp_path / "into/out.tar")).status == 4
    assert [(path.name, path.read_text()) for path in (tmp_path / "into").iterdir()] == [("out.tar", "old")]


def test_export_writes_to_what_is_no_file_directly(run: Run) -> None:
    assert run("export", SAMPLE, "-o", "/dev/null") == (0, b"", "")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    status, _, err = run("export", SAMPLE, "-o", "/dev/full")
    assert status == 6
    assert err == "ocifs: cannot write /dev/full: No space left on device\n"


# -- tar headers ---------------------------------------------------------------------------------------------------


MEMBERS = [
    archive.Member(b"plain", Kind.FILE, 0o644, 0, 0, 0, size=3),
    archive.Member(b"n" * 100, Kind.FILE, 0o644, 8**7 - 1, 8**7 - 1, (8**11 - 1) * 10**9),
    archive.Member(b"n" * 101, Kind.FILE, 0o7777, 8**7, 2**32 - 1, 8**11 * 10**9),
    archive.Member("é/ü".encode(), Kind.SYMLINK, 0o777, 0, 0, 1, target="→".encode()),
    archive.Member(b"raw\xff\n=", Kind.SYMLINK, 0o777, 0, 0, 999_999_999, target=b"\xfe" * 300),
    archive.Member(b"d" * 3000, Kind.DIR, 0o1777, 1, 2, 3 * 10**9),
    archive.Member(b"c", Kind.CHAR, 0o600, 0, 0, 0, rdev=(4095, 1048575)),
    archive.Member(b"b", Kind.BLOCK, 0o600, 0, 0, 0, rdev=(8, 1)),
    archive.Member(b"p", Kind.FIFO, 0o600, 0, 0, 0),
    archive.Member(b"h", Kind.FILE, 0o600, 0, 0, 0, size=3, hard_link=b"plain"),
    archive.Member(b"x", Kind.FILE, 0o600, 0, 0, 0, xattrs=((b"user.a", b"\0\n=9 x"), (b"user.b", b""))),
]


@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: f"{len(member.path)}{member.path[:8]!r}")
def test_what_a_header_says_is_what_the_scanner_reads(member: archive.Member) -> None:
    raw = archive.header(member)
    data = b"abc" if member.size and member.hard_link is None else b""
    scanner = TarScanner()
    entries = scanner.feed(raw + data + archive.padding(len(data)) + archive.END)
    summary = scanner.finish()
    assert summary.damage is None
    assert not summary.notices
    (found,) = entries
    kinds = {
        Kind.FILE: EntryType.FILE,
        Kind.SYMLINK: EntryType.SYMLINK,
        Kind.DIR: EntryType.DIR,
        Kind.CHAR: EntryType.CHAR,
        Kind.BLOCK: EntryType.BLOCK,
        Kind.FIFO: EntryType.FIFO,
    }
    expected_type = EntryType.HARDLINK if member.hard_link is not None else kinds[member.kind]
    assert found.path == member.path + (b"/" if member.kind is Kind.DIR else b"")
    assert (found.type, found.mode, found.uid, found.gid) == (expected_type, member.mode, member.uid, member.gid)
    assert (found.mtime_ns, found.size, found.rdev) == (member.mtime_ns, len(data), member.rdev)
    assert found.link == (member.hard_link or member.target)
    # An empty value takes an attribute away (rule D5's cousin): writers leave such records out, readers drop them.
    assert [pair for pair in found.xattrs if pair[1]] == [pair for pair in member.xattrs if pair[1]]


@pytest.mark.parametrize(
    ("mtime_ns", "record"),
    [
        (-1, b"mtime=-0.000000001"),
        (-1_500_000_000, b"mtime=-1.500000000"),
        (-2_000_000_000, b"mtime=-2"),
        (1_500_000_000, b"mtime=1.500000000"),
    ],
)
def test_times_before_the_epoch_and_between_seconds_are_decimal_records(mtime_ns: int, record: bytes) -> None:
    raw = archive.header(archive.Member(b"f", Kind.FILE, 0o644, 0, 0, mtime_ns))
    assert record + b"\n" in raw
    with tarfile.open(fileobj=io.BytesIO(raw + archive.END)) as read:
        assert read.getmember("f").mtime == pytest.approx(mtime_ns / 10**9, abs=1e-9)


@pytest.mark.parametrize("member", MEMBERS[:10], ids=lambda member: f"{len(member.path)}{member.path[:8]!r}")
def test_what_a_header_says_is_what_tarfile_reads(member: archive.Member) -> None:
    data = b"abc" if member.size and member.hard_link is None else b""
    raw = archive.header(member) + data + archive.padding(len(data)) + archive.END
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        (found,) = tar.getmembers()
    assert os.fsencode(found.name) == member.path
    assert os.fsencode(found.linkname) == (member.hard_link or member.target)
    assert (found.mode, found.uid, found.gid) == (member.mode, member.uid, member.gid)


@pytest.mark.parametrize(
    ("runs", "size", "segments"),
    [
        ([], 100, [(100, 0)]),
        ([(0, 18), (1048064, 18)], 2 << 20, [(0, 512), (1048064, 512), (2 << 20, 0)]),
        ([(5000, 3)], 5003, [(5000, 3)]),
        ([(0, 600), (1000, 24), (1030, 5)], 5000, [(0, 1024), (1030, 512), (5000, 0)]),
        ([(0, 600), (700, 500)], 1300, [(0, 1300)]),
    ],
)
def test_sparse_segments_are_whole_blocks_but_for_the_last(
    runs: list[tuple[int, int]], size: int, segments: list[tuple[int, int]]
) -> None:
    assert archive.whole_blocks(runs, size) == segments
