"""Bytes of a layer that belong to no entry that anybody sees."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from ocifs.forensics.slack import Region, RegionKind, regions
from ocifs.tar import TarScanner
from tests.support.evidence_image import layer_tars
from tests.support.examined import examined
from tests.support.tarball import (
    HARDLINK,
    PAX_GLOBAL,
    SYMLINK,
    entry,
    gnu_long,
    header,
    padded,
    pax_header,
    sparse_gnu,
    sparse_pax_1_0,
    tarball,
)

if TYPE_CHECKING:
    from pathlib import Path

    from ocifs.tar import Entry, TarSummary


def found(tmp_path: Path, *layers: bytes) -> list[Region]:
    """The regions of the last layer."""
    with examined(tmp_path, *layers) as examination:
        return list(regions(examination, len(layers)))


def seen(tmp_path: Path, *layers: bytes) -> list[tuple[str, int, bytes]]:
    """The same as kind, layer offset and the bytes there."""
    return [(str(r.kind), r.layer_offset, layers[-1][r.layer_offset :][: r.size]) for r in found(tmp_path, *layers)]


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_the_evidence_image(tmp_path: Path, compression: str) -> None:
    with examined(tmp_path, *layer_tars(), compression=compression) as examination:
        for padding in (True, False):
            assert [list(regions(examination, layer, padding=padding)) for layer in range(1, 6)] == [
                [],
                [],
                [
                    Region(
                        RegionKind.OVERRIDDEN,
                        2048,
                        6,
                        "data of entry 2, which entry 3 of this layer overrides",
                        b"etc/motd",
                    )
                ],
                [],
                [Region(RegionKind.TRAILING_TAR, 7168, 2048, "another archive of 1 entry", b"hidden/payload")],
            ]


def test_what_fills_a_files_last_block(tmp_path: Path) -> None:
    layer = tarball(header("a", size=3) + b"abc\0\0hidden".ljust(512, b"\0"), entry("b", b"b"))
    assert seen(tmp_path, layer) == [("data-padding", 517, b"hidden")]


def test_what_a_header_has_behind_its_fields(tmp_path: Path) -> None:
    layer = tarball(
        entry("ustar", raw={"name": b"ustar\0N", "gname": b"g\0G", "mode": b"644\0x"}),
        entry("v7", magic="v7", raw={"uname": b"V7"}),
        entry("gnu", magic="gnu", raw={"gnu_sparse": b"GNU"}),
        entry("nolink", raw={"link": b"L"}),
        entry("link", type=SYMLINK, link="to", raw={"link": b"to\0T"}),
        entry("star", magic="star"),
    )
    assert seen(tmp_path, layer) == [
        ("header-padding", 6, b"N"),
        ("header-padding", 104, b"x"),
        ("header-padding", 299, b"G"),
        ("header-padding", 512 + 265, b"V7"),
        ("header-padding", 1024 + 386, b"GNU"),
        ("header-padding", 1536 + 157, b"L"),
        ("header-padding", 2048 + 160, b"T"),
    ]


def test_what_lies_behind_extension_headers_and_maps(tmp_path: Path) -> None:
    pax = pax_header({"mtime": "1.5"})
    long = gnu_long("n" * 101)
    layer = tarball(
        pax[:-3] + b"PAX" + entry("pax"),
        long[: 512 + 102] + b"LONG".ljust(410, b"\0") + entry("long"),
        sparse_pax_1_0("sparse", [(0, b"data")], 10, raw_map=b"1\n0\n4\nMAP\n"),
        sparse_gnu("old", [(at, b"x") for at in range(0, 10, 2)], 10).replace(bytes(7) + b"xxxxx", b"\0OLD!\0\0xxxxx"),
    )
    assert [(kind, data) for kind, _, data in seen(tmp_path, layer)] == [
        ("header-padding", b"PAX"),
        ("header-padding", b"LONG"),
        ("header-padding", b"MAP\n"),
        ("header-padding", b"OLD!"),
    ]


class Bytes:
    """A layer's bytes as spans are read."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def read_blocking(self, layer: int, offset: int, size: int) -> list[bytes]:
        assert layer == 1
        return [self._data[offset : offset + size]]


def test_whatever_is_written_where_there_was_nothing_is_an_entrys_or_reported() -> None:
    layer = tarball(
        entry("pax", b"data", mtime=1.5),
        *(entry(magic, b"data", magic=magic, uname="ada") for magic in ("ustar", "star", "v7", "gnu")),
        gnu_long("n" * 101) + entry("long", b"data", magic="gnu"),
        sparse_pax_1_0("sparse", [(0, b"data")], 10),
        sparse_gnu("old", [(at, b"x") for at in range(0, 10, 2)], 10),
        end=4,
    )

    def scanned(data: bytes) -> tuple[list[Entry], TarSummary]:
        scanner = TarScanner()
        return scanner.feed(data), scanner.finish()

    before, _ = scanned(layer)
    found = 0
    # Not where a text of a header ends or could begin: those of an extension header count as seen, though nobody shows them.
    fields = (265, 297, 345)
    zeros = [at for at in range(len(layer)) if layer[at - 1 : at + 1] == b"\0\0" and at % 512 not in fields]
    for at in range(0, len(zeros), 7):
        changed = bytearray(layer)
        changed[zeros[at]] = ord("A")
        start = zeros[at] - zeros[at] % 512
        if layer[start + 257 : start + 262] == b"ustar" or layer[start : start + 3] == b"v7\0":
            changed[start + 148 : start + 156] = b" " * 8
            changed[start + 148 : start + 156] = b"%06o\0 " % sum(changed[start : start + 512])
        entries, summary = scanned(bytes(changed))
        if entries != before or summary.damage is not None:
            continue
        index = SimpleNamespace(
            entries=lambda entries=entries: iter(entries),
            layer_size=len(layer),
            end_offset=summary.end_offset,
            damage=None,
            trailing=summary.trailing,
        )
        examination: Any = SimpleNamespace(
            history=(), spans=Bytes(bytes(changed)), layer=lambda _, index=index: SimpleNamespace(index=index)
        )
        reported = list(regions(examination, 1))
        assert len(reported) == 1, zeros[at]
        assert reported[0].layer_offset <= zeros[at] < reported[0].layer_offset + reported[0].size
        found += 1
    assert found > len(zeros) // 7 * 0.9


def test_ordinary_archives_of_all_dialects_have_none(tmp_path: Path) -> None:
    everything = [
        entry(f"{magic}/{name}", b"data", magic=magic, uname="root", gname="root", uid=1 << 31, mtime=1.5)
        for magic in ("v7", "ustar", "gnu", "star")
        for name in ("short", "long" * 60)
    ]
    assert found(tmp_path, tarball(*everything, sparse_pax_1_0("s", [(5, b"x")], 10), end=20)) == []


def test_data_that_no_tree_ever_had(tmp_path: Path) -> None:
    layer = tarball(
        pax_header({"comment": "c0ffee"}, type=PAX_GLOBAL),
        entry("kept", b"kept"),
        entry("link", type=HARDLINK, link="kept"),
        entry("kept", b"new"),
        entry("dir", b"a file"),
        entry("dir/below", b"takes its place"),
        entry(".wh.gone", b"in a whiteout"),
        entry("label", b"odd", type=b"Q"),
    )
    below = tarball(entry("gone", b"x"))
    assert seen(tmp_path, below, layer) == [
        ("global-header", 512, b"18 comment=c0ffee\n"),
        ("overridden", 4096, b"a file"),
        ("marker-data", 6144, b"in a whiteout"),
        ("left-out", 7168, b"odd"),
    ]


def test_an_extension_header_without_an_entry(tmp_path: Path) -> None:
    layer = tarball(entry("a"), pax_header({"path": "b"}))
    regions = found(tmp_path, layer)
    assert [(region.kind.value, region.layer_offset) for region in regions] == [("orphan-header", 512)]
    assert b"9 path=b\n" in layer[512 : 512 + regions[0].size]


def test_what_is_behind_the_end(tmp_path: Path) -> None:
    index = tarball(entry("stargz.index.json", b'{"version":1}'))
    for name, behind, expected in (
        ("zeros", bytes(9000), []),
        ("text", bytes(700) + b"text", [("trailing-data", 2048 + 512)]),
        ("toc", index, [("estargz-toc", 2048)]),
        ("not only a toc", index + tarball(entry("x")), [("trailing-tar", 2048)]),
        ("toc and more", tarball(entry("stargz.index.json"), entry("x")), [("trailing-tar", 2048)]),
        ("broken", header("x", size=10**9), [("trailing-tar", 2048)]),
    ):
        layer = tarball(entry("a", b"a")) + behind
        regions = found(tmp_path / name, layer)
        assert [(region.kind.value, region.layer_offset) for region in regions] == expected, name
        assert all(region.layer_offset + region.size == len(layer) for region in regions), name
        assert [region.kind.benign for region in regions] == [name == "toc"] * len(regions)


def test_a_layer_that_breaks_off_and_one_that_breaks_a_rule(tmp_path: Path) -> None:
    cut = entry("a", b"a") + header("b", size=1000) + b"part"
    assert seen(tmp_path / "1", cut) == [("cut-off", 1536, b"part")]
    broken = entry("a", b"a") + padded(b"no header") + b"behind"
    assert seen(tmp_path / "2", broken) == [("unparsed", 1024, padded(b"no header") + b"behind")]
