"""Reading upper directories that were made by hand, and the layers written from them, byte for byte."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import stat
import subprocess
import sys
import tarfile
import zlib
from typing import TYPE_CHECKING, Any

import pytest
import zstandard

from ocifs.changes import PACKINGS, Difference, Merged, Namespace, Sign, Upper, differences, upper
from ocifs.changes.layer import LayerSink, LayerWriter
from ocifs.changes.upper import ChangedWhileReadError
from ocifs.errors import MachineError, NotFoundError, OcifsError, UnsupportedError
from ocifs.image import ImageOptions, open_image
from ocifs.rootfs import view
from ocifs.store import Store
from ocifs.tar import EntryType, TarScanner
from ocifs.tree import Kind
from tests.support.layout import write_layout
from tests.support.mounting import environment
from tests.support.tarball import HARDLINK, entry, sparse_pax_1_0, tarball

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from ocifs.rootfs import RootFS
    from ocifs.tar import Entry

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="whiteouts and trusted.* attributes can be made by root only")

T = 1_600_000_000
T_NS = T * 10**9

BASE = tarball(
    entry("./", mtime=T),
    entry("etc/", mtime=T),
    entry("etc/conf", b"one\n", mtime=T),
    entry("etc/hosts", b"localhost\n", mtime=T),
    entry("etc/same", type=HARDLINK, link="etc/hosts", mtime=T),
    entry("lib/", mtime=T),
    entry("lib/deep/", mtime=T),
    entry("lib/deep/x", b"x" * 1000, mtime=T),
    entry("run", link="etc", mtime=T),
    entry("var/", mtime=T),
    sparse_pax_1_0("var/holes", [(1 << 20, b"data")], 1 << 40),
)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RootFS]:
    place = tmp_path_factory.mktemp("image")
    write_layout(place / "image", [BASE])
    with Store(place / "cache") as store, open_image(f"oci:{place / 'image'}", store, ImageOptions()) as opened:
        yield view(opened)


class Top:
    """An upper directory in the making. Everything in it is as old as the image."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()

    def _settle(self, path: Path, mode: int | None) -> Path:
        if mode is not None:
            path.chmod(mode)
        for one in (path, *path.parents[: len(path.relative_to(self.path).parts)]):
            os.utime(one, ns=(T_NS, T_NS), follow_symlinks=False)
        return path

    def file(self, name: str | bytes, data: bytes = b"", mode: int = 0o644) -> Path:
        path = self.path / os.fsdecode(name)
        path.write_bytes(data)
        return self._settle(path, mode)

    def directory(self, name: str, mode: int = 0o755) -> Path:
        (self.path / name).mkdir()
        return self._settle(self.path / name, mode)

    def whiteout(self, name: str) -> Path:
        os.mknod(self.path / name, stat.S_IFCHR, 0)
        return self._settle(self.path / name, None)

    def note(self, name: str, key: str, value: bytes) -> None:
        os.setxattr(self.path / name, key, value, follow_symlinks=False)


@pytest.fixture
def top(tmp_path: Path) -> Top:
    return Top(tmp_path / "upper")


@contextlib.contextmanager
def merged(top: Top, image: RootFS, namespace: Namespace = Namespace.TRUSTED) -> Iterator[Merged]:
    with Upper(os.fsencode(top.path), namespace) as opened:
        yield Merged(opened, image)


def layer(top: Top, image: RootFS, **options: Any) -> tuple[bytes, list[str]]:
    """The layer's tar, and what was warned about."""
    out = bytearray()
    warned: list[str] = []
    with merged(top, image, options.pop("namespace", Namespace.TRUSTED)) as both:
        LayerWriter(
            both, out.extend, warn=lambda path, why: warned.append(f"{os.fsdecode(path)}: {why}"), **options
        ).write()
    return bytes(out), warned


def entries(tar: bytes) -> list[Entry]:
    scanner = TarScanner()
    found = scanner.feed(tar)
    assert scanner.finish().damage is None
    return found


def names(tar: bytes) -> list[bytes]:
    return [found.path for found in entries(tar)]


def changed(top: Top, image: RootFS, namespace: Namespace = Namespace.TRUSTED) -> list[Difference]:
    with merged(top, image, namespace) as both:
        return list(differences(both))


def lines(top: Top, image: RootFS, namespace: Namespace = Namespace.TRUSTED) -> list[str]:
    return [f"{one.sign} {os.fsdecode(one.path)}" for one in changed(top, image, namespace)]


# -- what overlayfs notes ------------------------------------------------------------------------------------------


def test_a_whiteout_device_takes_a_name_away(top: Top, image: RootFS) -> None:
    top.directory("etc")
    top.whiteout("etc/conf")
    assert lines(top, image) == ["D /etc/conf"]
    assert names(layer(top, image)[0]) == [b"./", b"etc/", b"etc/.wh.conf"]


def test_a_whiteout_of_nothing_says_nothing(top: Top, image: RootFS) -> None:
    top.whiteout("none")
    assert lines(top, image) == []
    assert names(layer(top, image)[0]) == [b"./"]


def test_an_opaque_directory_hides_all_that_is_lower(top: Top, image: RootFS) -> None:
    top.directory("etc")
    top.file("etc/conf", b"two\n")
    top.note("etc", "trusted.overlay.opaque", b"y")
    assert lines(top, image) == ["C /etc/conf", "D /etc/hosts", "D /etc/same"]
    assert names(layer(top, image)[0]) == [b"./", b"etc/", b"etc/.wh..wh..opq", b"etc/conf"]


def test_an_opaque_directory_where_the_image_has_none_needs_no_marker(top: Top, image: RootFS) -> None:
    top.directory("new")
    top.note("new", "trusted.overlay.opaque", b"y")
    top.directory("run")
    top.note("run", "trusted.overlay.opaque", b"y")
    assert names(layer(top, image)[0]) == [b"./", b"new/", b"run/"]
    assert lines(top, image) == ["A /new", "C /run"]


def test_below_an_opaque_directory_nothing_is_marked_again(top: Top, image: RootFS) -> None:
    top.directory("lib")
    top.note("lib", "trusted.overlay.opaque", b"y")
    top.directory("lib/deep")
    top.note("lib/deep", "trusted.overlay.opaque", b"y")
    assert names(layer(top, image)[0]) == [b"./", b"lib/", b"lib/.wh..wh..opq", b"lib/deep/"]
    assert lines(top, image) == ["D /lib/deep/x"]


@pytest.mark.parametrize("marked", [True, False])
def test_an_empty_file_with_a_note_is_a_whiteout(top: Top, image: RootFS, *, marked: bool) -> None:
    top.directory("etc")
    for name, data in (("etc/conf", b""), ("etc/hosts", b""), ("etc/same", b"x")):
        top.file(name, data)
    for name in ("etc/conf", "etc/same"):
        top.note(name, "trusted.overlay.whiteout", b"y")
    if marked:
        top.note("etc", "trusted.overlay.opaque", b"x")
    assert lines(top, image) == ["D /etc/conf", "C /etc/hosts", "C /etc/same"]
    assert names(layer(top, image)[0]) == [b"./", b"etc/", b"etc/.wh.conf", b"etc/hosts", b"etc/same"]


def test_the_root_is_never_opaque(top: Top, image: RootFS) -> None:
    top.directory("etc")
    top.note(".", "trusted.overlay.opaque", b"y")
    assert lines(top, image) == []
    assert names(layer(top, image)[0]) == [b"./", b"etc/"]


def test_notes_of_the_other_namespace_are_somebody_elses_words(top: Top, image: RootFS) -> None:
    top.directory("etc")
    top.note("etc", "user.overlay.opaque", b"y")
    assert lines(top, image) == []
    assert lines(top, image, Namespace.USER) == ["D /etc/conf", "D /etc/hosts", "D /etc/same"]
    tar, warned = layer(top, image)
    assert names(tar) == [b"./", b"etc/"]
    assert warned == ["etc: its attribute user.overlay.opaque is overlayfs's to every reader"]


def test_no_note_of_overlayfs_gets_into_a_layer(top: Top, image: RootFS) -> None:
    top.directory("etc")
    for key in ("origin", "impure", "uuid", "upper", "protattr"):
        top.note("etc", f"trusted.overlay.{key}", b"y")
    top.note("etc", "trusted.overlay.overlay.opaque", b"y")
    top.note("etc", "trusted.mine", b"kept")
    top.note("etc", "user.mine", b"\0=\n")
    tar, warned = layer(top, image)
    assert entries(tar)[1].xattrs == ((b"trusted.mine", b"kept"), (b"user.mine", b"\0=\n"))
    assert warned == ["etc: its attribute trusted.overlay.overlay.opaque is overlayfs's to every reader"]


def test_a_redirect_from_the_root_and_one_beside(top: Top, image: RootFS) -> None:
    top.directory("moved")
    top.note("moved", "trusted.overlay.redirect", b"/lib")
    top.directory("moved/flat")
    top.note("moved/flat", "trusted.overlay.redirect", b"deep")
    top.whiteout("lib")
    top.whiteout("moved/deep")
    assert lines(top, image) == ["D /lib", "A /moved", "A /moved/flat", "A /moved/flat/x"]
    tar = layer(top, image)[0]
    assert names(tar) == [b"./", b".wh.lib", b"moved/", b"moved/flat/", b"moved/flat/x"]
    assert tar[entries(tar)[-1].data_offset :][:1001] == b"x" * 1000 + b"\0"


def test_a_redirect_below_an_opaque_directory_counts(top: Top, image: RootFS) -> None:
    top.directory("etc")
    top.note("etc", "trusted.overlay.opaque", b"y")
    top.directory("etc/lib")
    top.note("etc/lib", "trusted.overlay.redirect", b"/lib/deep")
    assert names(layer(top, image)[0]) == [b"./", b"etc/", b"etc/.wh..wh..opq", b"etc/lib/", b"etc/lib/x"]


def test_a_directory_renamed_over_another_hides_it(top: Top, image: RootFS) -> None:
    top.directory("etc")
    top.note("etc", "trusted.overlay.redirect", b"/lib")
    top.whiteout("lib")
    assert names(layer(top, image)[0]) == [b"./", b"etc/", b"etc/.wh..wh..opq", b"etc/deep/", b"etc/deep/x", b".wh.lib"]
    found = ["D /etc/conf", "A /etc/deep", "A /etc/deep/x", "D /etc/hosts", "D /etc/same", "D /lib"]
    assert lines(top, image) == found


@pytest.mark.parametrize("redirect", [b"/gone", b"gone", b"/run/conf", b"../etc", b"/", b"/lib/deep/x"])
def test_a_redirect_that_leads_nowhere_is_refused(top: Top, image: RootFS, redirect: bytes) -> None:
    top.directory("moved")
    top.note("moved", "trusted.overlay.redirect", redirect)
    if redirect == b"/lib/deep/x":  # a file: overlayfs merges directories only
        assert lines(top, image) == ["A /moved"]
        return
    with pytest.raises(
        UnsupportedError, match=r"^/moved was renamed from .* \(redirect_dir=on\), which this image does"
    ):
        lines(top, image)


def test_metacopy_takes_data_from_the_image(top: Top, image: RootFS) -> None:
    top.directory("etc")
    top.file("etc/conf", bytes(4), mode=0o600)
    top.note("etc/conf", "trusted.overlay.metacopy", b"")
    tar = layer(top, image)[0]
    found = entries(tar)[-1]
    assert (found.path, found.mode, tar[found.data_offset :][:4]) == (b"etc/conf", 0o600, b"one\n")
    assert [(one.path, one.changed) for one in changed(top, image)] == [(b"/etc/conf", ("mode",))]


def test_metacopy_without_its_data_is_refused(top: Top, image: RootFS) -> None:
    top.file("new", bytes(4))
    top.note("new", "trusted.overlay.metacopy", b"")
    with pytest.raises(
        UnsupportedError, match=r"^/new has its attributes in the upper directory and its data in another"
    ):
        layer(top, image)


@pytest.mark.parametrize("note", [b"U+0", b"U+1", b"L+0", b"?"])
@pytest.mark.parametrize("kind", ["file", "symlink"])
def test_index_on_is_refused_where_names_below_show_the_same(top: Top, image: RootFS, kind: str, note: bytes) -> None:
    top.directory("etc")
    if kind == "file":
        top.file("etc/hosts", b"changed\n")
    else:
        (top.path / "etc/hosts").symlink_to("conf")
    top.note("etc/hosts", "trusted.overlay.nlink", note)
    with pytest.raises(
        UnsupportedError, match=r"^/etc/hosts has further names .*index=on.*replace it by a copy of itself"
    ):
        layer(top, image)


def test_index_on_is_read_where_all_names_are_above(top: Top, image: RootFS) -> None:
    top.directory("etc")
    top.file("etc/hosts", b"changed\n")
    top.note("etc/hosts", "trusted.overlay.nlink", b"U-1")
    assert lines(top, image) == ["C /etc/hosts"]


def test_without_privileges_notes_are_not_overlooked(top: Top, image: RootFS, monkeypatch: pytest.MonkeyPatch) -> None:
    top.directory("etc")
    monkeypatch.setattr(upper, "_sees_trusted", lambda: False)
    with pytest.raises(MachineError, match="can be seen by root only"):
        lines(top, image)
    assert lines(top, image, Namespace.USER) == []


def test_who_sees_trusted_attributes() -> None:
    ask = [sys.executable, "-c", "from ocifs.changes import upper; print(upper._sees_trusted())"]
    said = [
        subprocess.run([*before, *ask], env=environment(), capture_output=True, check=True).stdout
        for before in ([], ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--reuid=65534"], ["unshare", "-Ur"])
    ]
    assert said == [b"True\n", b"False\n", b"False\n"]


def test_there_is_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"there is no upper directory .*/none"):
        Upper(os.fsencode(tmp_path / "none"), Namespace.TRUSTED)


# -- what is listed ------------------------------------------------------------------------------------------------


def test_what_changed_is_told(top: Top, image: RootFS) -> None:
    top.directory("etc", mode=0o700)
    top.file("etc/conf", b"ONE\n")
    same = top.file("etc/hosts", b"localhost\n")
    os.chown(same, 5, 6)
    os.setxattr(same, "user.a", b"1")
    os.utime(same, ns=(1, 1))
    top.directory("etc/same")
    (top.path / "run").symlink_to("lib")
    os.utime(top.path / "run", ns=(T_NS, T_NS), follow_symlinks=False)
    os.utime(top.path / "etc", ns=(T_NS, T_NS))
    os.utime(top.path, ns=(T_NS, T_NS))
    assert changed(top, image) == [
        Difference(Sign.CHANGED, b"/etc", Kind.DIR, ("mode",)),
        Difference(Sign.CHANGED, b"/etc/conf", Kind.FILE, ("content",)),
        Difference(Sign.CHANGED, b"/etc/hosts", Kind.FILE, ("owner", "mtime", "xattrs")),
        Difference(Sign.CHANGED, b"/etc/same", Kind.DIR, ("type",)),
        Difference(Sign.CHANGED, b"/run", Kind.SYMLINK, ("target",)),
    ]


@pytest.mark.parametrize(("at", "same"), [((1 << 20) + 1, True), (1 << 19, False), ((1 << 40) - 2, False)])
def test_holes_of_any_size_are_compared(top: Top, image: RootFS, at: int, *, same: bool) -> None:
    """A tebibyte, which is data at one place in the image; a byte more is written at ``at``."""
    top.directory("var")
    path = top.file("var/holes")
    with path.open("r+b") as file:
        file.truncate(1 << 40)
        file.seek(1 << 20)
        file.write(b"data")
        file.seek(1 << 30)
        file.write(bytes(5000))
        file.seek(at)
        file.write(b"a")
    os.utime(path, ns=(0, 0))
    assert [one.changed for one in changed(top, image)] == ([] if same else [("content",)])


def test_labels_of_this_machine_are_no_change(top: Top, image: RootFS) -> None:
    top.directory("etc")
    top.note("etc", "security.selinux", b"system_u:object_r:container_file_t:s0\0")
    assert lines(top, image) == []
    assert entries(layer(top, image)[0])[1].xattrs == ()


# -- the bytes -----------------------------------------------------------------------------------------------------


def test_the_bytes_of_a_layer(top: Top, image: RootFS) -> None:
    top.directory("etc")
    top.whiteout("etc/conf")
    top.file("etc/a", b"data")
    top.file("b", b"first", mode=0o600)
    os.link(top.path / "b", top.path / "c")
    os.utime(top.path, ns=(T_NS, T_NS))
    tar, warned = layer(top, image)
    assert warned == []

    def block(name: bytes, typeflag: bytes, mode: int, *, size: int = 0, mtime: int = T, link: bytes = b"") -> bytes:
        text = b"%s%07o\0%07o\0%07o\0%011o\0%011o\0" % (name.ljust(100, b"\0"), mode, 0, 0, size, mtime)
        rest = link.ljust(100, b"\0") + b"ustar\x0000" + bytes(64) + b"%07o\0%07o\0" % (0, 0) + bytes(167)
        total = sum(text) + sum(b" " * 8) + sum(typeflag) + sum(rest)
        return text + b"%06o\0 " % total + typeflag + rest

    assert tar == b"".join(
        [
            block(b"./", b"5", stat.S_IMODE(top.path.stat().st_mode)),
            block(b"b", b"0", 0o600, size=5) + b"first".ljust(512, b"\0"),
            block(b"c", b"1", 0o600, link=b"b"),
            block(b"etc/", b"5", 0o755),
            block(b"etc/a", b"0", 0o644, size=4) + b"data".ljust(512, b"\0"),
            block(b"etc/.wh.conf", b"0", 0, mtime=0),
            bytes(1024),
        ]
    )


def test_odd_names_owners_and_times_are_in_pax_headers(top: Top, image: RootFS) -> None:
    top.file(b"raw\xff\n", b"x")
    top.file("n" * 255, b"y")
    odd = top.file("odd", b"z", mode=0o6755)
    os.chown(odd, 2**32 - 2, 8**7)
    odd.chmod(0o6755)
    os.utime(odd, ns=(-1_500_000_001, -1_500_000_001))
    with tarfile.open(fileobj=io.BytesIO(layer(top, image)[0])) as read:
        found = {member.name: member for member in read}
    assert {"n" * 255, "odd", os.fsdecode(b"raw\xff\n")} < found.keys()
    assert (found["odd"].uid, found["odd"].gid, found["odd"].mode) == (2**32 - 2, 8**7, 0o6755)
    assert found["odd"].pax_headers["mtime"] == "-1.500000001"


MIB = 1 << 20


@pytest.mark.parametrize(
    ("size", "at", "segments"),
    [
        (3 * MIB, MIB, ((MIB, MIB),)),
        (3 * MIB, 2 * MIB - 1, ((MIB, MIB),)),
        (3 * MIB + 5, 0, ((0, MIB), (3 * MIB, 5))),
        (2 * MIB - 1, 3, None),
        (MIB - 1, None, None),
        (0, None, None),
    ],
)
def test_a_mebibyte_of_zeros_is_a_hole(
    top: Top, image: RootFS, size: int, at: int | None, segments: tuple[tuple[int, int], ...] | None
) -> None:
    """Wherever the file system has any: in one of the two files it has none at all."""
    data = bytearray(size)
    if at is not None:
        data[at] = 1
    top.file("full", bytes(data))
    with top.file("holes").open("wb") as file:
        file.truncate(size)
        if at is not None:
            file.seek(at)
            file.write(b"\1")
    tar = layer(top, image)[0]
    assert [(one.size, one.sparse) for one in entries(tar)[1:]] == [(size, segments)] * 2
    with tarfile.open(fileobj=io.BytesIO(tar)) as read:
        for name in ("full", "holes"):
            found = read.extractfile(name)
            assert found is not None
            assert found.read() == data


def test_a_file_of_a_gibibyte_without_data(top: Top, image: RootFS) -> None:
    with top.file("empty").open("wb") as file:
        file.truncate(1 << 30)
    found = entries(layer(top, image)[0])[-1]
    assert (found.size, found.stored_size, found.sparse) == (1 << 30, 0, ())


def test_what_was_allocated_makes_the_same_layer_once_it_was_read(top: Top, image: RootFS) -> None:
    """What is in the page cache counts as data to lseek(2)."""
    path = top.file("f")
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, 4 * MIB)
        file.write(b"data")
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before = layer(top, image)[0]
    path.read_bytes()
    assert layer(top, image)[0] == before


def test_a_file_of_more_holes_than_a_map_may_list(top: Top, image: RootFS, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ocifs.changes.layer._MAX_SEGMENTS", 4)
    with top.file("f").open("wb") as file:
        for number in (1, 3, 5, 11, 20, 33):
            file.seek(number * MIB + number)
            file.write(b"x")
        file.truncate(50 * MIB)
    tar = layer(top, image)[0]
    found = entries(tar)[-1]
    assert found.sparse == ((0, 6 * MIB), (10 * MIB, 2 * MIB), (20 * MIB, 2 * MIB), (32 * MIB, 2 * MIB))
    with tarfile.open(fileobj=io.BytesIO(tar)) as read:
        data = read.extractfile("f")
        assert data is not None
        assert data.read() == (top.path / "f").read_bytes()


def test_no_file_is_younger_than_the_timestamp(top: Top, image: RootFS) -> None:
    top.file("old", b"")
    os.utime(top.file("young", b""), ns=(T_NS + 7, T_NS + 7))
    os.utime(top.path, ns=(T_NS + 8, T_NS + 8))
    tar = layer(top, image, latest=T_NS - 5)[0]
    assert [one.mtime_ns for one in entries(tar)] == [T_NS - 5] * 3
    assert [one.mtime_ns for one in entries(layer(top, image, latest=T_NS + 7)[0])] == [T_NS + 7, T_NS, T_NS + 7]


def test_the_same_changes_make_the_same_bytes(tmp_path: Path, image: RootFS) -> None:
    tars = []
    for name, order in (("one", "abcdef"), ("other", "fdbeca")):
        made = Top(tmp_path / name)
        for letter in order:
            made.file(letter, letter.encode() * 100)
        tars.append(layer(made, image)[0])
    assert tars[0] == tars[1]
    for packing in PACKINGS.values():
        written = set()
        for tar in tars:
            out: list[bytes] = []
            sink = LayerSink(out.append, packing)
            for start in range(0, len(tar), 1000):
                sink.write(tar[start : start + 1000])
            found = sink.finish()
            written.add(found)
            assert found.diff_id.hex == hashlib.sha256(tar).hexdigest()
            assert found.digest.hex == hashlib.sha256(b"".join(out)).hexdigest()
            assert found.size == len(b"".join(out))
        assert len(written) == 1


def test_packings_are_what_they_are_called() -> None:
    data = bytes(range(256)) * 10_000  # 2.4 MiB: three frames
    packed = {}
    for name, packing in PACKINGS.items():
        out: list[bytes] = []
        sink = LayerSink(out.append, packing)
        sink.write(data)
        sink.finish()
        packed[name] = b"".join(out)
    assert packed["none"] == data
    assert zlib.decompress(packed["gzip"], 31) == data
    assert packed["gzip"][:8] == b"\x1f\x8b\x08\0\0\0\0\0"  # no name, no time
    assert zstandard.ZstdDecompressor().stream_reader(packed["zstd"], read_across_frames=True).read() == data
    assert packed["zstd"].count(b"\x28\xb5\x2f\xfd") == 3


# -- what a layer cannot say ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [".wh.x", ".wh.", ".wh..wh..opq", "etc/.wh.conf"])
def test_a_name_that_means_something_in_layers_is_refused(top: Top, image: RootFS, name: str) -> None:
    top.directory("etc")
    top.file(name)
    with pytest.raises(UnsupportedError, match=rf"^/{name} is called as the markers of layers are"):
        layer(top, image)
    assert f"A /{name}" in lines(top, image)


def test_an_attribute_with_an_equals_sign_is_refused(top: Top, image: RootFS) -> None:
    os.setxattr(top.file("f"), "user.a=b", b"1")
    with pytest.raises(UnsupportedError, match=r"^/f has an attribute with = in its name, user.a=b, which no layer"):
        layer(top, image)


def test_an_attribute_without_a_value_is_left_out_with_a_warning(top: Top, image: RootFS) -> None:
    os.setxattr(top.file("f"), "user.a", b"")
    tar, warned = layer(top, image)
    assert entries(tar)[-1].xattrs == ()
    assert warned == ["f: its attribute user.a has no value, which a layer cannot say"]


def test_more_attributes_than_ocifs_reads_are_refused(top: Top, image: RootFS, monkeypatch: pytest.MonkeyPatch) -> None:
    path = os.fsencode(top.file("f"))
    getxattr, listxattr = os.getxattr, os.listxattr
    values = {"user.a": bytes(40_000), "user.b": bytes(65_536 - 40_000 - 2 * len("user.a"))}

    def listed(name: Any, **more: Any) -> list[str]:
        return [*values] if os.path.samefile(name, path) else listxattr(name, **more)

    def got(name: Any, key: Any, **more: Any) -> bytes:
        return values[os.fsdecode(key)] + b"x" if os.fsdecode(key) in values else getxattr(name, key, **more)

    monkeypatch.setattr(os, "listxattr", listed)
    monkeypatch.setattr(os, "getxattr", got)
    with pytest.raises(UnsupportedError, match=r"^/f has more than 65536 bytes of attributes"):
        layer(top, image)


# -- changes meanwhile ---------------------------------------------------------------------------------------------


def during(monkeypatch: pytest.MonkeyPatch, act: Any) -> None:
    """Do ``act`` once, right after the first data was read."""
    pread = os.pread
    todo = [act]

    def reading(fd: int, size: int, offset: int) -> bytes:
        data = pread(fd, size, offset)
        if todo and data:
            todo.pop()()
        return data

    monkeypatch.setattr(os, "pread", reading)


def test_a_file_that_grows_while_it_is_read_is_refused(
    top: Top, image: RootFS, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = top.file("f", b"x" * 100)
    during(monkeypatch, lambda: os.truncate(path, 101))
    with pytest.raises(
        ChangedWhileReadError, match=r"/upper/f changed while it was read: pause or stop what runs there"
    ):
        layer(top, image)


def test_a_file_that_shrinks_while_it_is_read_is_refused(
    top: Top, image: RootFS, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = top.file("f", b"x" * (3 << 20))
    during(monkeypatch, lambda: os.truncate(path, 5))
    with pytest.raises(ChangedWhileReadError, match="/upper/f changed"):
        layer(top, image)


def test_a_name_that_comes_while_its_directory_is_read_is_refused(
    top: Top, image: RootFS, monkeypatch: pytest.MonkeyPatch
) -> None:
    top.directory("etc")
    top.file("etc/f", b"x")
    during(monkeypatch, lambda: top.file("etc/late"))
    with pytest.raises(ChangedWhileReadError, match=r"/upper/etc changed"):
        layer(top, image)


def test_a_name_that_goes_while_its_directory_is_read_is_refused(
    top: Top, image: RootFS, monkeypatch: pytest.MonkeyPatch
) -> None:
    top.file("a", b"x")
    late = top.file("b", b"x")
    during(monkeypatch, late.unlink)
    with pytest.raises(ChangedWhileReadError, match=r"/upper/b changed"):
        layer(top, image)


def write_to(path: Path) -> None:
    path.write_bytes(b"changed")


def give_attribute(path: Path) -> None:
    before = path.lstat().st_ctime_ns
    while path.lstat().st_ctime_ns == before:  # the clock of many file systems ticks only each few milliseconds
        os.setxattr(path, "trusted.a", b"1", follow_symlinks=False)


def give_owner(path: Path) -> None:
    os.chown(path, 7, 7, follow_symlinks=False)


@pytest.mark.parametrize("act", [write_to, give_attribute, give_owner])
@pytest.mark.parametrize("kind", ["file", "directory", "symlink"])
def test_what_changes_when_it_has_been_read_already_is_refused(
    top: Top, image: RootFS, monkeypatch: pytest.MonkeyPatch, act: Callable[[Path], None], kind: str
) -> None:
    """A layer of the old one, and of what is written next, would be of no moment."""
    path = top.directory("a") / "seen"
    if kind == "symlink":
        path.symlink_to(top.file("a file"))
    elif kind == "directory":
        path = top.directory("a/seen") if act is not write_to else top.directory("a/seen") / "new"
    else:
        path.touch()
    top.file("b", b"read later")
    during(monkeypatch, lambda: act(path))
    changed = "a file" if kind == "symlink" and act is write_to else "a/seen"
    with pytest.raises(ChangedWhileReadError, match=rf"/upper/{changed} changed while it was read"):
        layer(top, image)


def test_nothing_is_opened_that_is_not_known_to_be_a_file(
    top: Top, image: RootFS, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a look and the opening somebody puts a FIFO in the file's place; it could be a device."""
    path, opened, kinds = top.file("f", b"x"), os.open, []

    def opening(name: Any, flags: int, *arguments: Any, **more: Any) -> int:
        if name == b"f":
            path.unlink()
            os.mkfifo(path)
        fd = opened(name, flags, *arguments, **more)
        if not flags & os.O_PATH:
            kinds.append(stat.S_IFMT(os.fstat(fd).st_mode))
        return fd

    monkeypatch.setattr(os, "open", opening)
    with pytest.raises(ChangedWhileReadError, match="/upper/f changed"):
        layer(top, image)
    assert stat.S_IFIFO not in kinds


def test_a_link_does_not_lead_out(top: Top, image: RootFS, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Between a look and the opening somebody puts a link in the file's place."""
    (tmp_path / "secret").write_bytes(b"secret")
    path = top.file("f", b"x")
    opened = os.open

    def opening(name: Any, *arguments: Any, **more: Any) -> int:
        if name == b"f":
            path.unlink()
            path.symlink_to(tmp_path / "secret")
        return opened(name, *arguments, **more)

    monkeypatch.setattr(os, "open", opening)
    with pytest.raises(ChangedWhileReadError):
        layer(top, image)


@pytest.mark.parametrize("more", [0, 1, 3000])
def test_paths_are_as_long_as_readers_take_them(top: Top, image: RootFS, more: int) -> None:
    """4,095 bytes, below the root of the image; what is deeper is refused before it costs much."""
    fd = os.open(top.path, os.O_RDONLY)
    for name in [b"d" * 15] * 255 + [b"d" * (15 + more)] if more < 2 else [b"d" * 15] * more:
        os.mkdir(name, dir_fd=fd)
        below = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    try:
        if more:
            for reading in (layer, lines):
                with pytest.raises(UnsupportedError, match=r"^'/ddd.*…' is longer than 4095 bytes, which no reader"):
                    reading(top, image)
            return
        found = entries(layer(top, image)[0])
        assert (len(found), found[-1].type, len(found[-1].path.rstrip(b"/"))) == (257, EntryType.DIR, 4095)
    finally:
        subprocess.run(["rm", "-rf", top.path], check=True)


def test_every_error_is_a_sentence() -> None:
    assert issubclass(ChangedWhileReadError, OcifsError)
    assert ChangedWhileReadError("x").exit_code == 7
