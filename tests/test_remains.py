"""What layers hold and the image does not show: deleted, wasted."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.command import Run, runner
from tests.support.damage import flip
from tests.support.evidence_image import SECRET, TOOL, evidence_image, write_evidence
from tests.support.layout import blob_path, write_layout
from tests.support.tarball import CHAR, DIR, HARDLINK, SYMLINK, entry, tarball

if TYPE_CHECKING:
    from pathlib import Path

BUILD_LOG = "/tmp/build.log"  # noqa: S108 (a path of the image)


@pytest.fixture
def run(capfdbinary: pytest.CaptureFixture[bytes]) -> Run:
    return runner(capfdbinary)


@pytest.fixture(params=["gzip", "zstd"])
def evidence(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return write_evidence(tmp_path / "evidence", request.param)


def json_lines(out: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def removed(run: Run, *words: str) -> list[tuple[object, ...]]:
    """What ``deleted`` lists: how, layer, removed by, size, path."""
    result = run("deleted", "--json", *words)
    assert (result.status, result.err) == (0, "")
    rows = json_lines(result.out)
    assert all((row["by"] or {"layer": None})["layer"] == row["end_layer"] for row in rows)
    return [(row["how"], row["layer"], row["end_layer"], row["size"], row["path"]) for row in rows]


# -- deleted -------------------------------------------------------------------------------------------------------


def test_deleted_lists_what_each_way_of_removing_removed(run: Run, evidence: str) -> None:
    assert removed(run, evidence) == [
        ("overridden", 3, 3, 6, "/etc/motd"),
        ("opaque", 1, 4, 4, "/opt/app/config"),
        ("opaque", 1, 4, 3000, "/opt/app/data"),
        ("whiteout", 2, 4, 81, "/root/.ssh/id_rsa"),
        ("whiteout", 2, 4, 6, BUILD_LOG),
        ("whiteout", 1, 4, 4, "/var/log/old.log"),
    ]


def test_deleted_lists_what_was_replaced_when_asked(run: Run, evidence: str) -> None:
    # The directory /etc, which only got another mode, is not listed.
    assert set(removed(run, "--replaced", evidence)) - set(removed(run, evidence)) == {
        ("replaced", 1, 3, 20, "/bin/tool")
    }


def test_deleted_names_layer_and_step_and_hashes_what_is_there(run: Run, evidence: str) -> None:
    rows = {row["path"]: row for row in json_lines(run("deleted", "--json", "--hash", "--replaced", evidence).out)}
    secret = rows["/root/.ssh/id_rsa"]
    assert secret["sha256"] == hashlib.sha256(SECRET).hexdigest()
    assert rows["/bin/tool"]["sha256"] == hashlib.sha256(TOOL).hexdigest()
    assert rows["/opt/app/data"]["sha256"] == hashlib.sha256(bytes(3000)).hexdigest()
    assert (secret["recoverable"], secret["path_visible"], secret["mode"]) == (True, False, "0600")
    assert rows["/etc/motd"]["path_visible"] is True
    by = secret["by"]
    assert (by["layer"], by["created"]) == (4, "2023-11-18T00:00:00Z")
    assert by["created_by"] == "RUN rm -rf /root/.ssh/id_rsa /tmp/build.log"
    assert by["diff_id"] == evidence_image().diff_ids[3]


def test_deleted_is_a_table_with_a_summary_by_layer(run: Run, evidence: str) -> None:
    status, out, err = run("deleted", evidence)
    assert (status, err) == (0, "")
    assert out.decode() == (
        "HOW         LAYER     BY            SIZE  DATA     PATH\n"
        "overridden      3      3               6  yes      /etc/motd\n"
        "opaque          1      4               4  yes      /opt/app/config\n"
        "opaque          1      4            3000  yes      /opt/app/data\n"
        "whiteout        2      4              81  yes      /root/.ssh/id_rsa\n"
        "whiteout        2      4               6  yes      /tmp/build.log\n"
        "whiteout        1      4               4  yes      /var/log/old.log\n"
        "\n"
        " BY  ENTRIES  FILES  BYTES  STEP\n"
        "  3        1      1      6  RUN update-tool\n"
        "  4        5      5   3095  RUN rm -rf /root/.ssh/id_rsa /tmp/build.log\n"
        "all        6      6   3101\n"
    )


def test_deleted_up_to_a_layer_knows_nothing_of_later_ones(run: Run, evidence: str) -> None:
    assert removed(run, evidence + "#2") == []
    assert run("deleted", evidence + "#2").out.endswith(b"\n\nnothing was deleted\n")


def test_deleted_lists_everything_below_a_removed_directory(run: Run, tmp_path: Path) -> None:
    below = tarball(
        entry("a/", type=DIR), entry("a/b/", type=DIR), entry("a/b/one", b"1"), entry("a/link", link="b"),
        entry("c/", type=DIR), entry("c/two", b"22"), entry("d/", type=DIR), entry("d/three", b"333"),
    )  # fmt: skip
    above = tarball(entry(".wh.a"), entry("c", b"a file now"), entry(".wh.d"), entry("d/", type=DIR))
    write_layout(tmp_path / "image", [below, above])
    image = str(tmp_path / "image")
    assert removed(run, image) == [
        ("whiteout", 1, 2, None, "/a"),
        ("whiteout", 1, 2, None, "/a/b"),
        ("whiteout", 1, 2, 1, "/a/b/one"),
        ("whiteout", 1, 2, None, "/a/link"),
        ("replaced", 1, 2, 2, "/c/two"),
        ("whiteout", 1, 2, None, "/d"),
        ("whiteout", 1, 2, 3, "/d/three"),
    ]
    assert ("replaced", 1, 2, None, "/c") in removed(run, "--replaced", image)
    lines = run("deleted", image).out.decode().splitlines()
    assert lines[2] == "whiteout        1      2               -  -        /a/b/"
    assert lines[4] == "whiteout        1      2               -  -        /a/link -> b"


def test_deleted_lists_entries_that_a_rule_leaves_out(run: Run, tmp_path: Path) -> None:
    write_layout(tmp_path / "image", [tarball(entry("n" * 300, b"long"), entry(".wh..wh.plnk/7", b"aufs"), entry("x"))])
    assert removed(run, str(tmp_path / "image")) == [
        ("left-out", 1, None, 4, "/.wh..wh.plnk/7"),
        ("left-out", 1, None, 4, "/" + "n" * 300),
    ]


def test_deleted_data_that_its_layer_breaks_off_before_is_lost(run: Run, tmp_path: Path) -> None:
    cut = (entry("kept", b"k") + entry("cut", bytes(2000)))[:-1024]
    write_layout(tmp_path / "image", [cut, tarball(entry(".wh.kept"), entry(".wh.cut"))])
    status, out, err = run("deleted", "--hash", str(tmp_path / "image"))
    assert (status, err) == (0, "")
    rows = out.decode().splitlines()
    assert rows[1].split() == ["whiteout", "1", "2", "2000", "lost", "-", "/cut"]
    assert rows[2].split()[4:] == ["yes", hashlib.sha256(b"k").hexdigest(), "/kept"]


def test_deleted_says_which_data_cannot_be_read_and_goes_on(run: Run, tmp_path: Path) -> None:
    layers = [tarball(entry("a", b"good")), tarball(entry("b", b"bad")), tarball(entry(".wh.a"), entry(".wh.b"))]
    digests = write_layout(tmp_path / "image", layers)
    assert run("index", str(tmp_path / "image")).status == 0
    flip(blob_path(tmp_path / "image", digests["layers"][1]), 30)
    status, out, err = run("deleted", "--hash", str(tmp_path / "image"))
    assert status == 4
    rows = [line.split() for line in out.decode().splitlines()[1:3]]
    assert rows[0][4:] == ["yes", hashlib.sha256(b"good").hexdigest(), "/a"]
    assert rows[1][4:] == ["damaged", "-", "/b"]
    assert "its bytes have changed since the index was built" in err


# -- wasted --------------------------------------------------------------------------------------------------------


def test_wasted_adds_up_by_path_layer_and_cause(run: Run, evidence: str) -> None:
    status, out, err = run("wasted", "--json", evidence)
    assert (status, err) == (0, "")
    *rows, total = json_lines(out)
    paths = [
        (row["size"], row["layer"], row["cause"], row["by"], row["path"]) for row in rows if row["record"] == "path"
    ]
    assert paths == [
        (3000, 1, "opaque", 4, "/opt/app/data"),
        (2048, 5, "slack", None, None),
        (81, 2, "whiteout", 4, "/root/.ssh/id_rsa"),
        (6, 3, "overridden", 3, "/etc/motd"),
        (6, 2, "whiteout", 4, BUILD_LOG),
        (4, 1, "opaque", 4, "/opt/app/config"),
        (4, 1, "whiteout", 4, "/var/log/old.log"),
    ]
    layers = [(row["layer"], row["stored"], row["wasted"], row["files"]) for row in rows if row["record"] == "layer"]
    # Of layer 1 the tool is seen: under its other name /bin/twin.
    assert layers == [(1, 3085, 3008, 3), (2, 87, 87, 2), (3, 33, 6, 1), (4, 4, 0, 0), (5, 2066, 2048, 0)]
    assert total == {
        "record": "total",
        "stored": 5275,
        "wasted": 5149,
        "efficiency": 126 / 5275,
        "causes": {"whiteout": 91, "opaque": 3004, "replaced": 0, "overridden": 6, "left-out": 0, "slack": 2048},
    }


def test_wasted_names_the_largest_only(run: Run, evidence: str) -> None:
    rows = json_lines(run("wasted", "--json", "-n", "1", evidence).out)
    assert [row["path"] for row in rows if row["record"] == "path"] == ["/opt/app/data"]
    assert rows[-1]["wasted"] == 5149
    everything = json_lines(run("wasted", "--json", "-n", "0", evidence).out)
    assert len([row for row in everything if row["record"] == "path"]) == 7


def test_wasted_as_text(run: Run, evidence: str) -> None:
    assert run("wasted", "-n", "2", evidence).out.decode() == (
        "          SIZE  LAYER  CAUSE          BY  PATH\n"
        "          3000      1  opaque          4  /opt/app/data\n"
        "          2048      5  slack           -  (behind the end of the archive)\n"
        "\n"
        "LAYER   STORED   WASTED  FILES  STEP\n"
        "    1  3.0 KiB  2.9 KiB      3  ADD rootfs.tar / # base\n"
        "    2     87 B     87 B      2  COPY id_rsa /root/.ssh/id_rsa\n"
        "    3     33 B      6 B      1  RUN update-tool\n"
        "    4      4 B      0 B      0  RUN rm -rf /root/.ssh/id_rsa /tmp/build.log\n"
        "    5  2.0 KiB  2.0 KiB      0  COPY odd /\n"
        "\n"
        "Wasted:      5.0 KiB of 5.2 KiB\n"
        "Causes:      whiteout 91 B, opaque 2.9 KiB, overridden 6 B, slack 2.0 KiB\n"
        "Efficiency:  2.39 %\n"
    )


def efficiency(run: Run, tmp_path: Path, *layers: bytes) -> tuple[int, int]:
    write_layout(tmp_path / "image", layers)
    total = json_lines(run("wasted", "--json", str(tmp_path / "image")).out)[-1]
    return total["stored"] - total["wasted"], total["stored"]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([tarball()], (0, 0)),
        ([tarball(entry("a", b"12345"))], (5, 5)),
        ([tarball(entry("a", b"12345")), tarball(entry("a", b"123"))], (3, 8)),
        ([tarball(entry("a", b"12345")), tarball(entry(".wh.a"))], (0, 5)),
        # A further name has no data, also where it is all that is left, in this layer or a later one.
        ([tarball(entry("a", b"123"), entry("b", type=HARDLINK, link="a"))], (3, 3)),
        ([tarball(entry("a", b"123"), entry("b", type=HARDLINK, link="a")), tarball(entry(".wh.a"))], (3, 3)),
        ([tarball(entry("a", b"123")), tarball(entry("b", type=HARDLINK, link="a"), entry(".wh.a"))], (3, 3)),
        ([tarball(entry("a", b"123"), entry("b", type=HARDLINK, link="a")),
          tarball(entry(".wh.a"), entry(".wh.b"))], (0, 3)),
        # What goes with its directory, by a whiteout, a marker or a file in its place.
        ([tarball(entry("d/a", b"123")), tarball(entry(".wh.d"))], (0, 3)),
        ([tarball(entry("d/a", b"123")), tarball(entry("d/.wh..wh..opq"), entry("d/b", b"4"))], (1, 4)),
        ([tarball(entry("d/a", b"123")), tarball(entry("d", b"4"))], (1, 4)),
        # Content of a whiteout, an entry that another one overrides, a sparse file's data without its holes.
        ([tarball(entry("a")), tarball(entry(".wh.a", b"hidden"))], (0, 6)),
        ([tarball(entry("a", b"1"), entry("a", b"22"))], (2, 3)),
        ([tarball(entry("c", type=CHAR, rdev=(1, 3)), entry("s", type=SYMLINK, link="c"))], (0, 0)),
        # Zeros behind the end are padding; anything else is slack up to the last byte.
        ([tarball(entry("a", b"1")) + bytes(5120)], (1, 1)),
        ([tarball(entry("a", b"1")) + bytes(512) + b"x" + bytes(511)], (1, 513)),
    ],
)  # fmt: skip
def test_efficiency_is_what_is_seen_of_what_is_stored(
    run: Run, tmp_path: Path, layers: list[bytes], expected: tuple[int, int]
) -> None:
    assert efficiency(run, tmp_path, *layers) == expected
