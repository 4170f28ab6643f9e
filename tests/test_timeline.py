"""Timelines: what mactime makes of the bodyfile, what plaso's rules make of it, and the rows for Timesketch."""

from __future__ import annotations

import csv
import io
import json
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from ocifs.forensics.bodyfile import escaped
from ocifs.forensics.timeline import created_ns
from ocifs.spec import History
from tests.support.command import Run, runner
from tests.support.evidence_image import write_evidence
from tests.support.layout import write_layout
from tests.support.mounting import run
from tests.support.tarball import entry, tarball

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def ocifs(capfdbinary: pytest.CaptureFixture[bytes]) -> Run:
    return runner(capfdbinary)


def written(ocifs: Run, *words: str) -> bytes:
    done = ocifs("timeline", *words)
    assert (done.status, done.err) == (0, "")
    return done.out


class Row(NamedTuple):
    """What mactime printed: when, size, which of its times, LAYER-ENTRY, name."""

    when: str
    size: str
    which: str
    mode: str
    meta: str
    name: str


def mactime(body: bytes, path: Path) -> list[Row]:
    path.write_bytes(body)
    done = run(["mactime", "-b", path, "-y", "-d"], env={"TZ": "UTC"})
    assert done.returncode == 0
    assert done.stderr == ""
    return [
        Row(row[0], row[1], row[2], row[3], row[6], row[7]) for row in list(csv.reader(io.StringIO(done.stdout)))[1:]
    ]


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_mactime_reads_the_bodyfile_whole(ocifs: Run, tmp_path: Path, compression: str) -> None:
    body = written(ocifs, write_evidence(tmp_path / "image", compression))
    rows = mactime(body, tmp_path / "body")
    lines = [line.split(b"|") for line in body.splitlines()]
    assert len(lines) == 42
    assert {len(line) for line in lines} == {11}
    # Each line comes out once for its own time, once for its layer's, and once for what is not known, at the epoch.
    assert len({(row.meta, row.name) for row in rows}) == 42
    modified = {(row.meta, row.name): (row.when, row.size, row.mode) for row in rows if "m" in row.which}
    then = "2023-11-14T22:13:20Z"
    assert modified["1-1", "/bin/tool (layer 1 entry 1, replaced by layer 3)"] == (then, "20", "r/rrwsr-xr-x")
    assert modified["3-0", "/bin/tool (time kept)"] == (then, "20", "r/rrwsr-xr-x")
    assert modified["3-2", "/etc/motd (layer 3 entry 2, overridden)"] == (then, "6", "r/rrw-r--r--")
    assert modified["3-3", "/etc/motd"] == (then, "7", "r/rrw-r--r--")
    assert modified["1-10", "/sh -> bin/tool"] == (then, "0", "l/lrwxrwxrwx")
    assert modified["5-0", "/epoch"] == ("0000-00-00T00:00:00Z", "2", "r/rrw-r--r--")
    key = "/root/.ssh/id_rsa (later than layer, layer 2 entry 1, deleted by layer 4)"
    assert modified["2-1", key] == ("2024-11-07T17:20:00Z", "81", "r/rrw-------")
    assert {row.name for row in rows if row.meta.startswith("5-")} == {
        "/epoch",
        "/odd",
        "/odd/pipe|bar",
        "/odd/per%cent",
        "/odd/new\\x0aline",
        "/odd/b\udcffd",
    }
    born = [row for row in rows if "b" in row.which and not row.when.startswith("0000")]
    assert [(row.when, row.name) for row in born if "-" not in row.meta] == [
        ("2023-11-15T00:00:00Z", "[layer 1] ADD rootfs.tar / # base"),
        ("2023-11-16T00:00:00Z", "[layer 2] COPY id_rsa /root/.ssh/id_rsa"),
        ("2023-11-17T00:00:00Z", "[layer 3] RUN update-tool"),
        ("2023-11-18T00:00:00Z", "[layer 4] RUN rm -rf /root/.ssh/id_rsa /tmp/build.log"),
        ("2023-11-19T00:00:00Z", "[layer 5] COPY odd /"),
    ]
    changed = {(row.when, row.name) for row in rows if "c" in row.which and not row.when.startswith("0000")}
    assert changed == {
        ("2023-11-18T00:00:00Z", f"/{path} (deleted by layer 4)")
        for path in ("opt/app/config", "opt/app/data", "root/.ssh/id_rsa", "tmp/build.log", "var/log/old.log")
    }


HURTING = (
    b"pipe|pipe",
    b"per%cent",
    b"%41",
    b"%7C",
    b"new\nline",
    b"\n",
    b"cr\r",
    b"esc\x1b[31m",
    b"back\\slash",
    b"raw\xff\x80",
    b"c1\xc2\x85",
    "ünï".encode(),
    b"#comment",
    b" lead",
    b'quo"te,',
    b"to -> fro",
)


def test_mactime_reads_every_name_and_files_from_the_epoch_in_an_image_without_history(
    ocifs: Run, tmp_path: Path
) -> None:
    write_layout(tmp_path / "image", [tarball(*(entry(name, b"x") for name in HURTING))], config={"history": []})
    rows = mactime(written(ocifs, str(tmp_path / "image")), tmp_path / "body")
    assert sorted(row.name for row in rows) == sorted(
        "/" + name.replace(b"\\", b"\\\\").decode("utf-8", "surrogateescape").translate(CONTROL) for name in HURTING
    )
    assert {(row.when, row.which) for row in rows} == {("0000-00-00T00:00:00Z", "macb")}


CONTROL = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))}


def as_plaso_reads(line: str) -> dict[str, Any]:
    """A line by the rules of plaso's bodyfile parser: ten fields from the end, the name unescaped, numbers checked."""
    md5, rest = line.split("|", 1)
    assert md5 == "0"
    name, inode, mode, *numbers = rest.rsplit("|", 9)
    assert not re.search(r"[\x00-\x1f\x7f-\x9f]", name), "unescaped control characters"
    name = re.sub(r"\\x([01][0-9a-f]|7f|[89][0-9a-f])", lambda match: chr(int(match[1], 16)), name)
    name = name.replace("\\|", "|").replace("\\\\", "\\")
    target = ""
    if mode.startswith("l") and " -> " in name:
        name, _, target = name.rpartition(" -> ")
    uid, gid, size = (int(number, 10) for number in numbers[:3])
    times = dict(zip(("atime", "mtime", "ctime", "crtime"), map(float, numbers[3:]), strict=True))
    return {"name": name, "target": target, "inode": int(inode.partition("-")[0]), "mode": mode, "uid": uid, "gid": gid,
            "size": size, **{key: value for key, value in times.items() if value}}  # fmt: skip


def test_plaso_reads_both_bodyfiles(ocifs: Run, tmp_path: Path) -> None:
    ref = write_evidence(tmp_path / "image")
    for form in ("body", "body-ext"):
        text = written(ocifs, "--format", form, ref).decode("utf-8")
        found = [as_plaso_reads(line) for line in text.splitlines()]
        assert len(found) == 42
        tool = next(row for row in found if row["name"] == "/bin/tool (time kept)")
        assert tool == {
            "name": "/bin/tool (time kept)",
            "target": "",
            "inode": 3,
            "mode": "-rwsr-xr-x" if form == "body-ext" else "r/rrwsr-xr-x",
            "uid": 0,
            "gid": 0,
            "size": 20,
            "mtime": 1_700_000_000.0,
            "crtime": 1_700_179_200.0,
        }
        assert ("/sh", "bin/tool") in [(row["name"], row["target"]) for row in found]
        assert "/odd/new\nline" in [row["name"] for row in found]


def test_the_extended_bodyfile_keeps_names_and_fractions_of_seconds(ocifs: Run, tmp_path: Path) -> None:
    write_layout(
        tmp_path / "image", [tarball(*(entry(name, b"x", mtime=1.25) for name in HURTING))], config={"history": []}
    )
    text = written(ocifs, "--format", "body-ext", str(tmp_path / "image")).decode("utf-8")
    found = [as_plaso_reads(line) for line in text.splitlines()]
    kept = {"/" + name.decode("utf-8", "backslashreplace").replace("\\x80", "\x80") for name in HURTING}
    assert {row["name"] for row in found} == kept
    assert {row["mtime"] for row in found} == {1.25}
    assert "|1-0|-rw-r--r--|0|0|1|0|1.250000000|0|0\n" in text


def test_names_are_escaped_as_each_reader_undoes_it() -> None:
    assert escaped(b"a|b%c\\d\ne\xff\xc2\x85\xc3\xa9", extended=False) == "a%7Cb%25c\\\\d\\x0ae%FF\\x85é"
    assert escaped(b"a|b%c\\d\ne\xff\xc2\x85\xc3\xa9", extended=True) == "a\\|b%c\\\\d\\x0ae\\xff\\x85é"


def test_timesketch_gets_rows_with_what_it_demands(ocifs: Run, tmp_path: Path) -> None:
    ref = write_evidence(tmp_path / "image")
    rows = [json.loads(line) for line in written(ocifs, "--format", "jsonl", ref).splitlines()]
    assert written(ocifs, "--json", ref) == written(ocifs, "--format", "jsonl", ref)
    assert len(rows) == 42
    assert all(row["message"] and row["datetime"] and row["timestamp_desc"] for row in rows)
    secret = [row for row in rows if row["path"] == "/root/.ssh/id_rsa"]
    assert [(row["datetime"], row["timestamp_desc"], row["layer"], row["flags"]) for row in secret] == [
        ("2024-11-07T17:20:00.000000+00:00", "Content Modification Time", 2, ["later-than-layer"]),
        ("2023-11-18T00:00:00.000000+00:00", "Deleted by Layer", 4, []),
    ]
    assert secret[0]["timestamp"] == 1_731_000_000_000_000
    assert secret[0]["created_by"] == "COPY id_rsa /root/.ssh/id_rsa"
    assert [row["path"] for row in rows if row["flags"] == ["time-kept"]] == ["/bin/tool"]
    assert "/odd/new\nline" in [row["path"] for row in rows]
    assert "/odd/b\\xffd" in [row["path"] for row in rows]
    table = list(csv.DictReader(io.StringIO(written(ocifs, "--format", "csv", ref).decode("utf-8"))))
    assert [row["datetime"] for row in table] == [row["datetime"] for row in rows]
    assert [list(row) for row in table[:1]] == [list(rows[0])]
    assert "/odd/new\\nline" in [row["path"] for row in table]
    assert next(row for row in table if row["path"] == "/bin/tool" and row["layer"] == "3")["flags"] == "time-kept"


def test_content_is_compared_only_where_nothing_else_tells(ocifs: Run, tmp_path: Path) -> None:
    base = [entry(name, b"same size", mtime=7) for name in ("same", "other", "shorter", "newer", "touched")]
    upper = [
        entry("same", b"same size", mtime=7, mode=0o600),
        entry("other", b"SAME SIZE", mtime=7),
        entry("shorter", b"same", mtime=7),
        entry("newer", b"SAME SIZE", mtime=8),
        entry("touched", b"same size", mtime=8),
    ]
    write_layout(tmp_path / "image", [tarball(*base), tarball(*upper)])
    rows = [json.loads(line) for line in written(ocifs, "--json", str(tmp_path / "image")).splitlines()]
    assert [(row["path"], row["layer"]) for row in rows if row["flags"]] == [("/other", 2), ("/shorter", 2)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1970-01-01T00:00:01Z", 10**9),
        ("2023-11-15T01:00:00.123456789+01:00", 1_700_006_400_123_456_000),
        ("1970-01-01T00:00:00Z", None),
        ("0001-01-01T00:00:00Z", None),
        ("2023-11-15T00:00:00", None),
        ("yesterday", None),
        ("", None),
    ],
)
def test_when_a_step_was_made(text: str, expected: int | None) -> None:
    assert created_ns(History(created=text)) == expected
    assert created_ns(None) is None
