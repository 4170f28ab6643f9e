"""The rows of the layer rules that are about reading tar headers, each by name with literal archives and expectations.

What becomes of the entries (paths, whiteouts, which xattrs are shown) is in the tests of `ocifs.overlay`.
"""

from __future__ import annotations

from typing import Literal

import pytest

from ocifs.tar import (
    EXTENSION_LIMIT,
    Damage,
    Entry,
    EntryType,
    Noticed,
    TarScanner,
    TarSummary,
    Trailing,
)
from tests.support import tarball as t
from tests.support.tarball import entry, tarball


def scan(layer: bytes) -> tuple[list[Entry], TarSummary]:
    scanner = TarScanner()
    entries = scanner.feed(layer)
    return entries, scanner.finish()


def sound(layer: bytes) -> list[Entry]:
    entries, summary = scan(layer)
    assert summary.damage is None
    return entries


def only(*entries: bytes) -> Entry:
    (found,) = sound(tarball(*entries))
    return found


def refused(layer: bytes) -> Damage:
    _, summary = scan(layer)
    assert summary.damage is not None
    return summary.damage


def notices(layer: bytes) -> tuple[Noticed, ...]:
    return scan(layer)[1].notices


# --- D1: dialects ----------------------------------------------------------------------------------------------------


def test_d1_ustar_header_is_read_in_full() -> None:
    found = only(
        entry("etc/hosts", b"abc", mode=0o640, uid=1000, gid=100, mtime=1_700_000_000, uname="user", gname="users")
    )
    assert found == Entry(
        path=b"etc/hosts",
        type=EntryType.FILE,
        typeflag=ord("0"),
        mode=0o640,
        uid=1000,
        gid=100,
        mtime_ns=1_700_000_000_000_000_000,
        size=3,
        header_offset=0,
        data_offset=512,
        stored_size=3,
        uname=b"user",
        gname=b"users",
    )


def test_d1_ustar_prefix_stands_before_the_name() -> None:
    assert only(entry("name", prefix="usr/share")).path == b"usr/share/name"


def test_d1_ustar_name_and_prefix_may_fill_their_fields_without_nul() -> None:
    found = only(entry("", raw={"name": b"n" * 100, "prefix": b"p" * 155}))
    assert found.path == b"p" * 155 + b"/" + b"n" * 100


def test_d1_v7_has_no_prefix_no_owner_names_and_no_device_numbers() -> None:
    junk = {"prefix": b"prefix", "uname": b"root", "devmajor": b"junk"}
    found = only(entry("old", b"x", type=t.OLD_FILE, magic="v7", raw=junk))
    assert (found.path, found.type, found.uname, found.rdev) == (b"old", EntryType.FILE, b"", (0, 0))


def test_d1_star_prefix_ends_before_its_times() -> None:
    times = {"prefix": b"deep".ljust(131, b"\0") + b"00000000001\0" * 2}
    assert only(entry("name", magic="star", raw=times)).path == b"deep/name"
    full = {"prefix": b"p" * 131 + b"00000000001\0" * 2}
    assert only(entry("name", magic="star", raw=full)).path == b"p" * 131 + b"/name"


def test_d1_gnu_times_are_not_a_prefix() -> None:
    assert only(entry("name", magic="gnu", raw={"prefix": b"14507653211\0" * 2})).path == b"name"


def test_d1_prefix_in_a_gnu_header_is_read_as_old_go_wrote_it() -> None:
    assert only(entry("name", magic="gnu", raw={"prefix": b"usr/lib"})).path == b"usr/lib/name"


@pytest.mark.parametrize("checksum", ["unsigned", "signed"])
def test_d1_checksum_of_signed_and_of_unsigned_bytes(checksum: Literal["signed", "unsigned"]) -> None:
    found = only(entry("na\xefve".encode("latin-1"), checksum=checksum))
    assert found.path == b"na\xefve"


def test_d1_checksum_over_65521_is_exact() -> None:
    """The checksum is found by Adler-32, which counts modulo 65521; two halves of a block never reach that."""
    name = b"\xff" * 100
    raw = {"name": name, "link": name, "prefix": b"\xff" * 155}
    assert sum(t.header("", raw=raw)) > 65521
    assert only(entry("", raw=raw)).path == b"\xff" * 155 + b"/" + name
    header = bytearray(t.header("", raw=raw))
    header[148:156] = b"%06o\0 " % (int(header[148:154], 8) - 65521)
    assert refused(bytes(header)).rule == "D6"


def test_d1_checksum_may_be_written_in_other_ways() -> None:
    block = t.header("a")
    number = int(block[148:154], 8)
    for field in (b"%07o\0" % number, b"%6o \0" % number, b"  %o\0\0" % number):
        assert only(entry("a", checksum=field.ljust(8, b"\0"))).path == b"a"


# --- D2: types and trailing slashes ----------------------------------------------------------------------------------


def test_d2_nul_type_with_trailing_slash_is_a_directory_without_data() -> None:
    found = sound(tarball(entry("dir/", type=t.OLD_FILE, magic="v7", size=512), entry("next")))
    assert [(e.path, e.type, e.size) for e in found] == [
        (b"dir/", EntryType.DIR, 0),
        (b"next", EntryType.FILE, 0),
    ]


def test_d2_nul_type_goes_by_the_long_name() -> None:
    assert only(t.gnu_long("d" * 120 + "/"), entry("d", type=t.OLD_FILE)).type is EntryType.DIR
    assert only(t.gnu_long("d" * 120), entry("d/", type=t.OLD_FILE)).type is EntryType.FILE


def test_d2_type_zero_with_trailing_slash_is_a_file() -> None:
    found = only(entry("file/", b"data", type=t.FILE))
    assert (found.path, found.type, found.size) == (b"file/", EntryType.FILE, 4)


def test_d2_contiguous_file_is_a_file() -> None:
    found = only(entry("file", b"data", type=t.CONTIGUOUS))
    assert (found.type, found.typeflag, found.size) == (EntryType.FILE, ord("7"), 4)


# --- D3: numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field", [b"0000644\0", b"000644 \0", b"   644 \0", b"644\0junk", b"644", b"\x00\x00644\0\0\0"]
)
def test_d3_octal_with_spaces_and_nuls_around(field: bytes) -> None:
    assert only(entry("a", mode=field)).mode == 0o644


def test_d3_empty_numbers_are_zero() -> None:
    found = only(entry("a", mode=bytes(8), uid=b" " * 8, mtime=bytes(12)))
    assert (found.mode, found.uid, found.mtime_ns) == (0, 0, 0)


@pytest.mark.parametrize(
    "field", [b"0000849\0", b"0x1f\0\0\0\0", b"-1\0\0\0\0\0\0", b"1 2\0\0\0\0\0", b"6_4\0\0\0\0\0"]
)
def test_d3_number_that_is_none_refuses_the_layer(field: bytes) -> None:
    damage = refused(tarball(entry("first"), entry("a", uid=field)))
    assert (damage.rule, damage.layer_offset) == ("D6", 512)


def test_d3_ids_up_to_32_bits_in_base_256() -> None:
    found = only(entry("a", uid=2**32 - 1, gid=2**31))
    assert (found.uid, found.gid) == (4_294_967_295, 2_147_483_648)


def test_d3_ids_from_pax() -> None:
    found = only(entry("a", uid=5, gid=6, pax={"uid": "4294967294", "gid": "70000"}))
    assert (found.uid, found.gid) == (4_294_967_294, 70_000)


def test_d3_ids_beyond_32_bits_are_cut_as_chown_cuts_them() -> None:
    layer = tarball(entry("a", uid=-2, pax={"gid": "4294967297"}))
    (found,) = sound(layer)
    assert (found.uid, found.gid) == (4_294_967_294, 1)
    (notice,) = notices(layer)
    assert (notice.rule, notice.path, notice.layer_offset) == ("D3", b"a", 0)


def test_d3_size_in_base_256_reaches_64_bits() -> None:
    entries, summary = scan(entry("huge", size=2**63 - 1))
    assert (entries[0].size, entries[0].stored_size) == (2**63 - 1, 2**63 - 1)
    assert summary.damage is not None
    assert summary.damage.rule == "D6"


def test_d3_size_beyond_64_bits_is_refused() -> None:
    assert refused(entry("huge", size=2**63)).rule == "D6"
    assert refused(entry("huge", pax={"size": "9223372036854775808"})).rule == "D6"


def test_d3_size_from_pax_tells_where_the_next_header_is() -> None:
    found = sound(tarball(entry("a", b"x" * 600, size=0, pax={"size": "600"}), entry("b")))
    assert [(e.path, e.size) for e in found] == [(b"a", 600), (b"b", 0)]
    assert found[1].header_offset == 512 * 5


def test_d3_negative_size_is_refused() -> None:
    assert refused(entry("a", size=-1)).rule == "D6"
    assert refused(entry("a", pax={"size": "-512"})).rule == "D6"


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        ("1700000000.123456789", 1_700_000_000_123_456_789),
        ("1700000000.5", 1_700_000_000_500_000_000),
        ("1.000000001", 1_000_000_001),
        ("1.", 1_000_000_000),
        ("+1", 1_000_000_000),
        ("1.1234567899", 1_123_456_789),
        ("9223372036.854775807", 2**63 - 1),
    ],
)
def test_d3_mtime_from_pax_with_nanoseconds(text: str, nanoseconds: int) -> None:
    assert only(entry("a", mtime=7, pax={"mtime": text})).mtime_ns == nanoseconds


@pytest.mark.parametrize("text", ["", "x", ".5", "1.x", "1.-5", "1e9", "1 ", "0x1", "99999999999999999999"])
def test_d3_malformed_time_in_pax_is_refused_and_an_empty_one_is_none(text: str) -> None:
    for key in ("mtime", "atime", "ctime"):
        layer = tarball(entry("a", mtime=7, pax={key: text}))
        if text:
            assert refused(layer).rule == "D6"
        else:
            assert sound(layer)[0].mtime_ns == 7_000_000_000


# --- D4: GNU long names ----------------------------------------------------------------------------------------------


def test_d4_long_name_and_long_link() -> None:
    found = only(entry("n" * 300, link="l" * 400, magic="gnu"))
    assert (found.path, found.link, found.header_offset) == (b"n" * 300, b"l" * 400, 0)
    assert found.data_offset == 512 * 5


def test_d4_last_long_name_wins() -> None:
    assert only(t.gnu_long("first"), t.gnu_long("last"), entry("short")).path == b"last"


def test_d4_long_name_is_cut_at_the_first_nul() -> None:
    assert only(t.gnu_long(b"name\0junk"), entry("short")).path == b"name"


def test_d4_long_name_without_nul_counts_whole() -> None:
    assert only(t.gnu_long("name", terminated=False), entry("short")).path == b"name"


def test_d4_empty_long_name_leaves_the_header_its_own() -> None:
    assert only(t.gnu_long("long"), t.gnu_long(""), entry("short")).path == b"short"


def test_d4_long_name_wins_over_a_pax_path_in_either_order() -> None:
    path = t.pax_header({"path": "pax"})
    assert only(t.gnu_long("gnu"), path, entry("short")).path == b"gnu"
    assert only(path, t.gnu_long("gnu"), entry("short")).path == b"gnu"


def test_d4_long_name_serves_one_entry_only() -> None:
    assert [e.path for e in sound(tarball(t.gnu_long("long"), entry("a"), entry("b")))] == [b"long", b"b"]


# --- D5: PAX ---------------------------------------------------------------------------------------------------------


def test_d5_last_of_several_pax_headers_counts_alone() -> None:
    first = t.pax_header({"path": "first", "uid": "7"})
    found = only(first, t.pax_header({"gid": "8"}), entry("name", uid=1, gid=2))
    assert (found.path, found.uid, found.gid) == (b"name", 1, 8)


def test_d5_empty_value_leaves_the_header_its_own() -> None:
    empty = {"path": "", "linkpath": "", "uid": "", "size": "", "mtime": "", "uname": ""}
    found = only(entry("name", link="target", uid=3, mtime=4, uname="me", pax=empty))
    assert (found.path, found.link, found.uid) == (b"name", b"target", 3)
    assert (found.mtime_ns, found.uname) == (4_000_000_000, b"me")


def test_d5_last_record_of_a_key_counts() -> None:
    assert only(entry("x", pax=[("path", "first"), ("path", "last")])).path == b"last"


def test_d5_pax_header_serves_one_entry_only() -> None:
    found = sound(tarball(entry("a", pax={"path": "A", "uid": "9"}), entry("b")))
    assert [(e.path, e.uid) for e in found] == [(b"A", 9), (b"b", 0)]
    found = sound(tarball(entry("a", pax={"uid": "9"}), t.gnu_long("long"), entry("b")))
    assert [(e.path, e.uid) for e in found] == [(b"a", 9), (b"long", 0)]


def test_d5_value_may_hold_equals_newline_and_any_byte() -> None:
    assert only(entry("x", pax={"path": b"a=b\nc \xff"})).path == b"a=b\nc \xff"


def test_d5_extension_header_with_no_entry_behind_it_is_noticed() -> None:
    for extension in (t.pax_header({"path": "x"}), t.gnu_long("x")):
        for layer in (tarball(entry("a"), extension), entry("a") + extension):
            assert [e.path for e in sound(layer)] == [b"a"]
            assert [(n.rule, n.layer_offset) for n in notices(layer)] == [("D5", 512)]


def test_d5_header_offset_is_that_of_the_first_extension_header() -> None:
    layer = tarball(entry("a"), t.pax_header({"uid": "1"}), t.gnu_long("long"), entry("b", b"data"))
    found = sound(layer)[1]
    assert (found.header_offset, found.data_offset, found.path, found.uid) == (512, 512 * 6, b"long", 1)


# --- D6: damage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["path", "linkpath", "uname", "gname"])
def test_d6_nul_in_a_pax_path_or_name(key: str) -> None:
    damage = refused(tarball(entry("first"), entry("x", pax={key: b"a\0b"})))
    assert (damage.rule, damage.layer_offset) == ("D6", 512)
    assert "layer offset 512" in damage.message


@pytest.mark.parametrize(
    "records",
    [
        b"no length",
        b"x path=a\n",
        b" path=a\n",
        b"-5 path=a\n",
        b"9999 path=a\n",
        b"9 path=a\n9 path=b",
        b"8 path=a\n",
        b"3 \n",
        b"5 a\n\n",
        b"5 =a\n",
        b"2 path=a\n",
        b"999999999999999999999999 path=a\n",
        b"9" * 5000 + b" path=a\n",
        b"12 SCHI\0LY=\n",
        b"11 path=a\n",
        bytes(512),
    ],
)
def test_d6_malformed_pax_record(records: bytes) -> None:
    damage = refused(tarball(entry("first"), t.pax_header(records), entry("x")))
    assert (damage.rule, damage.layer_offset) == ("D6", 512)


def test_d6_number_in_pax_that_is_none() -> None:
    for key in ("uid", "gid", "size", "mtime"):
        assert refused(tarball(entry("x", pax={key: "one"}))).rule == "D6"


def test_d6_bad_checksum_keeps_the_entries_before_it() -> None:
    entries, summary = scan(tarball(entry("good", b"x"), entry("bad", checksum="bad"), entry("lost")))
    assert [e.path for e in entries] == [b"good"]
    message = "the tar header at layer offset 1024 has a wrong checksum, or is none"
    assert summary.damage == Damage("D6", 1024, message)
    assert (summary.end_offset, summary.size, summary.trailing) == (1024, 512 * 6, None)


def test_d6_layer_that_is_no_tar() -> None:
    assert refused(b"\x28\xb5\x2f\xfd" + bytes(1000)) == Damage(
        "D6", 0, "the tar header at layer offset 0 has a wrong checksum, or is none"
    )


def test_d6_truncated_data_names_what_is_missing() -> None:
    entries, summary = scan(entry("file", b"x" * 1000)[: 512 + 400])
    assert [(e.path, e.size) for e in entries] == [(b"file", 1000)]
    assert summary.damage == Damage(
        "D6", 912, "the layer ends at layer offset 912, where 600 bytes of 'file' are missing"
    )


def test_d6_missing_padding_at_the_end_is_fine() -> None:
    entries, summary = scan(entry("file", b"x" * 1000)[: 512 + 1000])
    assert [e.path for e in entries] == [b"file"]
    assert (summary.damage, summary.end_offset) == (None, 1512)


@pytest.mark.parametrize("kept", [1, 511])
def test_d6_truncated_header(kept: int) -> None:
    damage = refused(entry("a") + entry("b")[:kept])
    assert damage == Damage("D6", 512 + kept, f"the layer ends at layer offset {512 + kept}, within a tar header")


@pytest.mark.parametrize("kept", [512, 520])
def test_d6_truncated_extension_header(kept: int) -> None:
    assert refused(t.pax_header({"path": "x" * 100})[:kept]) == Damage(
        "D6", kept, f"the layer ends at layer offset {kept}, within an extension header"
    )


@pytest.mark.parametrize("flag", [t.PAX, t.PAX_GLOBAL, t.GNU_LONG_NAME, t.GNU_LONG_LINK])
@pytest.mark.parametrize("size", [EXTENSION_LIMIT + 1, 2**33 - 1, 2**63 - 1])
def test_d6_extension_header_beyond_any_use_is_refused_at_once(flag: bytes, size: int) -> None:
    damage = refused(entry("a") + t.header("x", type=flag, size=size))
    assert (damage.rule, damage.layer_offset) == ("D6", 512)


def test_d6_extension_header_of_the_limit_is_read() -> None:
    value = b"v" * (EXTENSION_LIMIT - 100)
    record = t.pax_record("SCHILY.xattr.user.big", value)
    assert only(t.pax_header(record), entry("x")).xattrs == ((b"user.big", value),)
    name = b"n" * EXTENSION_LIMIT
    assert only(t.gnu_long(name, terminated=False), entry("x")).path == name


# --- D7: global headers ----------------------------------------------------------------------------------------------


def test_d7_global_header_is_recorded_and_changes_nothing() -> None:
    records = {"path": "global", "uid": "5", "SCHILY.xattr.user.a": "b"}
    layer = tarball(t.pax_header(records, type=t.PAX_GLOBAL, path="pax_global_header"), entry("a"))
    header, file = sound(layer)
    assert (header.path, header.type, header.typeflag) == (b"pax_global_header", EntryType.OTHER, ord("g"))
    assert (header.header_offset, header.data_offset, header.stored_size, header.size) == (0, 512, 48, 0)
    assert (file.path, file.uid, file.xattrs, file.header_offset) == (b"a", 0, (), 1024)
    assert [(n.rule, n.path, n.layer_offset) for n in notices(layer)] == [("D7", b"pax_global_header", 0)]


def test_d7_global_header_with_only_a_comment_is_not_worth_a_notice() -> None:
    assert notices(tarball(t.pax_header({"comment": "git commit"}, type=t.PAX_GLOBAL), entry("a"))) == ()


def test_d7_global_header_ends_the_extension_headers_before_it() -> None:
    layer = tarball(
        t.pax_header({"path": "pax"}), t.gnu_long("gnu"), t.pax_header({}, type=t.PAX_GLOBAL), entry("name", b"x")
    )
    header, file = sound(layer)
    assert (header.typeflag, header.header_offset, header.data_offset) == (ord("g"), 0, 512 * 5)
    assert (file.path, file.header_offset) == (b"name", 512 * 5)
    assert [n.rule for n in notices(layer)] == ["D5"]


def test_d7_malformed_global_header_is_refused() -> None:
    assert refused(tarball(t.pax_header(b"junk", type=t.PAX_GLOBAL), entry("a"))).rule == "D6"


# --- D8: sparse files and odd types ----------------------------------------------------------------------------------

SEGMENTS = [(0, b"ab"), (4096, b"c" * 700), (9000, b"d")]
SPARSE = ((0, 2), (4096, 700), (9000, 1))


def test_d8_pax_0_0_sparse_is_read_with_holes() -> None:
    found = sound(tarball(t.sparse_pax_0_0("dir/s", SEGMENTS, 10_000), entry("next")))
    assert [e.path for e in found] == [b"dir/s", b"next"]
    assert (found[0].size, found[0].stored_size, found[0].sparse) == (10_000, 703, SPARSE)
    assert found[0].data_offset == found[0].header_offset + 512 * 3


def test_d8_pax_0_1_sparse_is_read_with_holes() -> None:
    found = sound(tarball(t.sparse_pax_0_1("dir/s", SEGMENTS, 10_000), entry("next")))
    assert [e.path for e in found] == [b"dir/s", b"next"]
    assert (found[0].size, found[0].stored_size, found[0].sparse) == (10_000, 703, SPARSE)


def test_d8_pax_1_0_sparse_is_read_with_holes() -> None:
    layer = tarball(t.sparse_pax_1_0("dir/s", SEGMENTS, 10_000), entry("next"))
    found = sound(layer)
    assert [e.path for e in found] == [b"dir/s", b"next"]
    assert (found[0].size, found[0].stored_size, found[0].sparse) == (10_000, 703, SPARSE)
    assert found[0].data_offset == 512 * 4
    assert layer[found[0].data_offset :][:3] == b"abc"


def test_d8_pax_1_0_map_of_many_blocks() -> None:
    segments = [(1000 * number, b"x" * 10) for number in range(500)]
    found = sound(tarball(t.sparse_pax_1_0("s", segments, 500_000), entry("next")))
    assert found[0].sparse == tuple((1000 * number, 10) for number in range(500))
    assert found[1].path == b"next"


@pytest.mark.parametrize("count", [1, 4, 5, 25, 26, 60])
def test_d8_old_gnu_sparse_is_read_with_holes(count: int) -> None:
    segments = [(1000 * number, bytes([65 + number])) for number in range(count)]
    layer = tarball(t.sparse_gnu("s", segments, 100_000), entry("next"))
    found = sound(layer)
    assert [e.path for e in found] == [b"s", b"next"]
    assert (found[0].type, found[0].typeflag) == (EntryType.FILE, ord("S"))
    assert (found[0].size, found[0].stored_size) == (100_000, count)
    assert found[0].sparse == tuple((1000 * number, 1) for number in range(count))
    assert layer[found[0].data_offset :][:count] == bytes(range(65, 65 + count))


@pytest.mark.parametrize("minor", ["0", "1"])
def test_d8_pax_0_x_may_say_its_version(minor: str) -> None:
    records = {"GNU.sparse.major": "0", "GNU.sparse.minor": minor, "GNU.sparse.numblocks": "1"}
    found = only(entry("s", b"ab", pax=records | {"GNU.sparse.map": "5,2", "GNU.sparse.realsize": "9"}))
    assert (found.size, found.sparse) == (9, ((5, 2),))


def test_d8_segments_may_reach_the_end_of_the_file() -> None:
    assert only(t.sparse_gnu("s", [(0, b"a"), (98, b"bc")], 100)).sparse == ((0, 1), (98, 2))


def test_d8_sparse_map_of_an_odd_type_is_read_over() -> None:
    records = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "odd"}
    data = t.padded(b"1\n600\n3\n") + b"abc"
    odd, following = sound(
        tarball(entry("x", data, type=b"A", pax=records | {"GNU.sparse.size": "603"}), entry("next"))
    )
    assert (odd.path, odd.type, odd.size, odd.sparse) == (b"odd", EntryType.OTHER, 0, None)
    assert (odd.data_offset, odd.stored_size, following.path) == (512 * 4, 3, b"next")
    assert only(entry("x", b"d", type=b"A", pax={"GNU.sparse.map": "0,1", "GNU.sparse.numblocks": "1"})).size == 0


def test_d8_file_that_is_all_hole() -> None:
    for layer in (
        t.sparse_gnu("s", [(5000, b"")], 5000),
        t.sparse_pax_0_1("s", [(5000, b"")], 5000),
        t.sparse_pax_1_0("s", [], 5000),
    ):
        found = only(layer)
        assert (found.size, found.stored_size, found.sparse) == (5000, 0, ())


def test_d8_touching_segments_are_joined_and_empty_ones_vanish() -> None:
    found = only(t.sparse_pax_1_0("s", [(0, b"ab"), (2, b""), (2, b"cd"), (10, b"e"), (11, b"")], 20))
    assert (found.sparse, found.stored_size) == (((0, 4), (10, 1)), 5)


def test_d8_header_of_an_unknown_sparse_version_is_an_ordinary_file() -> None:
    found = only(entry("x", b"data", pax={"GNU.sparse.major": "2", "GNU.sparse.minor": "0", "GNU.sparse.size": "9"}))
    assert (found.size, found.sparse) == (4, None)


def _lying(kind: str, segment_map: list[tuple[int, int]], size: int, data: bytes) -> bytes:
    flat = [number for pair in segment_map for number in pair]
    records = {"GNU.sparse.size": str(size), "GNU.sparse.numblocks": str(len(segment_map))}
    if kind == "gnu":
        return t.sparse_gnu("s", [(0, data)], size, segment_map=segment_map)
    if kind == "0.1":
        return entry("s", data, pax=records | {"GNU.sparse.map": ",".join(map(str, flat))})
    lines = "".join(f"{number}\n" for number in [len(segment_map), *flat]).encode()
    return t.sparse_pax_1_0("s", [(0, data)], size, raw_map=lines)


@pytest.mark.parametrize("kind", ["gnu", "0.1", "1.0"])
@pytest.mark.parametrize(
    ("segment_map", "size"),
    [
        ([(0, 4), (2, 4)], 100),  # overlap
        ([(50, 4), (0, 4)], 100),  # out of order
        ([(50, 0), (0, 8)], 100),  # out of order, by an empty one
        ([(93, 8)], 100),  # beyond the file
        ([(0, 9)], 100),  # more than is stored
        ([(0, 7)], 100),  # less than is stored
        ([(0, 8)], -1),  # negative file
        ([(-1, 8)], 100),  # negative offset
        ([(0, 16), (16, -8)], 100),  # negative length
        ([(2**63 - 1, 8)], 2**63 - 1),  # beyond 64 bits
    ],
)
def test_d8_sparse_map_that_cannot_be_is_refused(kind: str, segment_map: list[tuple[int, int]], size: int) -> None:
    damage = refused(tarball(entry("a"), _lying(kind, segment_map, size, b"12345678")))
    assert (damage.rule, damage.layer_offset) == ("D8", 512)
    assert "'s'" in damage.message


@pytest.mark.parametrize(
    "lines", [b"x\n", b"-1\n", b"1\n0\n", b"1\n0\nx\n", b"\n", b"9999999999999999999\n", b"9223372036854775807\n"]
)
def test_d8_pax_1_0_map_that_is_no_map_is_refused(lines: bytes) -> None:
    assert refused(tarball(t.sparse_pax_1_0("s", [(0, b"data")], 100, raw_map=lines))).rule == "D8"


def test_d8_pax_1_0_map_without_end_is_refused_at_the_limit() -> None:
    lines = b"1" * (2 * EXTENSION_LIMIT)
    damage = refused(tarball(t.sparse_pax_1_0("s", [(0, b"data")], 100, raw_map=lines)))
    assert damage.rule == "D8"
    assert f"longer than {EXTENSION_LIMIT} bytes" in damage.message


def test_d8_old_gnu_map_without_end_is_refused_at_the_limit() -> None:
    header = t.header("s", type=t.GNU_SPARSE, magic="gnu", raw={"gnu_extended": b"\1", "gnu_realsize": t.octal(9, 12)})
    block = bytes(504) + b"\1" + bytes(7)
    damage = refused(header + block * (EXTENSION_LIMIT // 512 + 1))
    assert damage.rule == "D8"
    assert f"longer than {EXTENSION_LIMIT} bytes" in damage.message


def test_d8_sparse_map_cut_short_by_the_end_of_the_layer() -> None:
    segments = [(1000 * number, b"x") for number in range(100)]
    for sparse, kept in (
        (t.sparse_pax_1_0("s", segments, 100_000), 512 * 4),
        (t.sparse_gnu("s", segments, 10**6), 512),
    ):
        assert refused(sparse[:kept]) == Damage(
            "D6", kept, f"the layer ends at layer offset {kept}, within the sparse map of 's'"
        )


def test_d8_sparse_link_and_stars_sparse_header_are_refused() -> None:
    records = {"GNU.sparse.map": "0,1", "GNU.sparse.numblocks": "1", "GNU.sparse.size": "1"}
    assert refused(tarball(entry("x", link="y", pax=records))).rule == "D8"
    assert refused(tarball(entry("x", b"data", type=t.GNU_SPARSE, magic="star"))).rule == "D8"


def test_d8_numblocks_must_count_the_map() -> None:
    records = {"GNU.sparse.map": "0,1", "GNU.sparse.numblocks": "2", "GNU.sparse.size": "1"}
    assert refused(tarball(entry("x", b"d", pax=records))).rule == "D8"


@pytest.mark.parametrize("flag", [b"V", b"D", b"M", b"A", b"N", b"X", b"\xff"])
def test_d8_other_types_are_recorded_noticed_and_their_data_skipped(flag: bytes) -> None:
    layer = tarball(entry("odd", b"x" * 600, type=flag), entry("next"))
    odd, following = sound(layer)
    assert (odd.path, odd.type, odd.typeflag) == (b"odd", EntryType.OTHER, flag[0])
    assert (odd.size, odd.stored_size, odd.data_offset) == (0, 600, 512)
    assert (following.path, following.header_offset) == (b"next", 512 * 3)
    assert [(n.rule, n.path, n.layer_offset) for n in notices(layer)] == [("D8", b"odd", 0)]


# --- D9: times -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["-1", "-0.5", "-1.25", "-9223372036854775808"])
def test_d9_negative_mtime_is_zero(text: str) -> None:
    assert only(entry("a", pax={"mtime": text})).mtime_ns == 0


def test_d9_negative_mtime_in_base_256_is_zero() -> None:
    assert only(entry("a", mtime=-1)).mtime_ns == 0
    assert only(entry("a", mtime=b"\xff" * 12)).mtime_ns == 0


def test_d9_mtime_beyond_64_bits_of_nanoseconds_is_zero_with_a_notice() -> None:
    for layer in (tarball(entry("a", mtime=2**40)), tarball(entry("a", pax={"mtime": "9223372037"}))):
        assert sound(layer)[0].mtime_ns == 0
        assert [n.rule for n in notices(layer)] == ["D9"]


# --- D10: extended attributes ----------------------------------------------------------------------------------------


def test_d10_schily_xattrs_are_binary_and_in_order() -> None:
    xattrs = {
        "user.z": b"line\nline\n",
        "security.capability": bytes.fromhex("0000000201000000") + b"\0=\xff",
        "user.a": b"12 path=evil\n",
        "user.empty": b"",
    }
    assert only(entry("x", xattrs=xattrs)).xattrs == (
        (b"user.z", b"line\nline\n"),
        (b"security.capability", b"\0\0\0\2\1\0\0\0\0=\xff"),
        (b"user.a", b"12 path=evil\n"),
        (b"user.empty", b""),
    )


def test_d10_libarchive_xattrs_are_ignored() -> None:
    assert only(entry("x", pax={"LIBARCHIVE.xattr.user.a": "YQ", "RHT.security.selinux": "s"})).xattrs == ()


def test_d10_name_of_an_xattr_ends_at_the_first_equals_sign() -> None:
    assert only(entry("x", pax={"SCHILY.xattr.user.a": "b=c"})).xattrs == ((b"user.a", b"b=c"),)


# --- D11, W20: modes and devices -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("field", "mode"), [(0o4755, 0o4755), (0o2750, 0o2750), (0o1777, 0o1777), (0o100644, 0o644)])
def test_d11_setuid_setgid_and_sticky_are_kept(field: int, mode: int) -> None:
    assert only(entry("x", mode=field)).mode == mode


def test_d11_devices_and_fifos_are_kept() -> None:
    found = sound(
        tarball(
            entry("dev/null", type=t.CHAR, rdev=(1, 3)),
            entry("dev/sda", type=t.BLOCKDEV, rdev=(8, 0)),
            entry("big", type=t.CHAR, rdev=(4095, 1_048_575)),
            entry("fifo", type=t.FIFO, rdev=(9, 9)),
        )
    )
    assert [(e.type, e.rdev) for e in found] == [
        (EntryType.CHAR, (1, 3)),
        (EntryType.BLOCK, (8, 0)),
        (EntryType.CHAR, (4095, 1_048_575)),
        (EntryType.FIFO, (0, 0)),
    ]


def test_d11_device_numbers_are_cut_as_mknod_cuts_them() -> None:
    layer = tarball(entry("x", type=t.CHAR, rdev=(4096 + 5, 2**20 + 6)))
    assert sound(layer)[0].rdev == (5, 6)
    assert [n.rule for n in notices(layer)] == ["D11"]


def test_w20_char_device_0_0_is_told_from_others() -> None:
    found = sound(tarball(entry("gone", type=t.CHAR, rdev=(0, 0)), entry("b", type=t.BLOCKDEV, rdev=(0, 0))))
    assert [(e.type, e.rdev) for e in found] == [(EntryType.CHAR, (0, 0)), (EntryType.BLOCK, (0, 0))]


def test_w20_char_device_of_v7_has_no_numbers_and_is_0_0() -> None:
    assert only(entry("x", type=t.CHAR, magic="v7")).rdev == (0, 0)


# --- D12, D13, D14: the end ------------------------------------------------------------------------------------------


def test_d12_zero_byte_layer_is_fine() -> None:
    assert scan(b"") == ([], TarSummary(0, 0, None, (), None, 0))


def test_d12_no_end_blocks_is_fine() -> None:
    entries, summary = scan(entry("a", b"x"))
    assert [e.path for e in entries] == [b"a"]
    assert summary == TarSummary(1024, 1024, None, (), None, 1)


def test_d12_one_zero_block_at_the_end_is_fine() -> None:
    entries, summary = scan(tarball(entry("a"), end=1))
    assert [e.path for e in entries] == [b"a"]
    assert summary == TarSummary(1024, 512, None, (), None, 1)


def test_d12_two_zero_blocks_are_the_end() -> None:
    assert scan(tarball())[1] == TarSummary(1024, 0, None, (), None, 0)


def test_d13_one_zero_block_then_a_header_is_refused() -> None:
    entries, summary = scan(tarball(entry("a"), bytes(512), entry("b")))
    assert [e.path for e in entries] == [b"a"]
    assert summary.damage == Damage(
        "D13", 1024, "a block that is not zero follows a single zero block at layer offset 1024"
    )


def test_d13_one_zero_block_then_part_of_a_block_is_refused() -> None:
    assert refused(tarball(entry("a"), end=1) + b"\0").rule == "D6"


def test_d14_padding_behind_the_end() -> None:
    _, summary = scan(tarball(entry("a")) + bytes(10_240 - 1536))
    assert summary.trailing == Trailing(layer_offset=1536, size=8704, content_offset=None, tar_header=False)
    assert (summary.end_offset, summary.size, summary.damage) == (512, 10_240, None)


def test_d14_archive_behind_the_end_is_invisible_and_recorded() -> None:
    layer = tarball(entry("a"), end=5) + tarball(entry("hidden"))
    entries, summary = scan(layer)
    assert [e.path for e in entries] == [b"a"]
    assert summary.trailing == Trailing(layer_offset=1536, size=3072, content_offset=3072, tar_header=True)


def test_d14_junk_behind_the_end_is_recorded() -> None:
    _, summary = scan(tarball(entry("a")) + bytes(700) + b"junk")
    assert summary.trailing == Trailing(layer_offset=1536, size=704, content_offset=2048, tar_header=False)
    assert summary.damage is None


# --- H8, T12, T15, T16: links and names ------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", [t.HARDLINK, t.SYMLINK, t.CHAR, t.BLOCKDEV, t.DIR, t.FIFO])
@pytest.mark.parametrize("pax", [{}, {"size": "700"}])
def test_h8_size_of_a_link_is_ignored_and_so_is_that_of_all_that_has_no_data(flag: bytes, pax: dict[str, str]) -> None:
    found = sound(tarball(entry("x", type=flag, link="target", size=700, pax=pax), entry("next")))
    assert [e.path for e in found] == [b"x", b"next"]
    assert (found[0].size, found[0].stored_size) == (0, 0)
    assert found[0].link == (b"target" if flag in {t.HARDLINK, t.SYMLINK} else b"")


@pytest.mark.parametrize("path", [b"./a", b"/abs", b"a/../x", b"dir/", b"./", b"../x", b"a//b"])
def test_t12_paths_come_out_as_stored(path: bytes) -> None:
    assert only(entry(path, type=t.FILE)).path == path
    assert only(entry("x", type=t.FILE, pax={"path": path})).path == path


def test_t15_empty_name_comes_out_empty() -> None:
    assert [e.path for e in sound(tarball(entry("")))] == [b""]


@pytest.mark.parametrize("path", [b"back\\slash", b"new\nline", b"\xff\xfe", b"\x01\x7f", "ünï".encode(), b" ", b"a b"])
def test_t16_any_byte_but_nul_is_kept(path: bytes) -> None:
    assert only(entry(path)).path == path
    assert only(entry("x", pax={"path": path})).path == path
    assert only(t.gnu_long(path), entry("x")).path == path
    assert only(entry("x", link=path)).link == path
