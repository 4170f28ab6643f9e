"""grep over an image: what grep itself says on a mount, what was deleted, and what is no file's data."""

from __future__ import annotations

import json
import random
import re
from typing import TYPE_CHECKING, Any

import pytest

from ocifs.forensics import grep as grepping
from ocifs.forensics.examination import open_examination
from ocifs.image import ImageOptions
from ocifs.store import Store
from tests.support.command import Run, runner
from tests.support.damage import flip
from tests.support.evidence_image import write_evidence
from tests.support.layout import blob_path, write_layout
from tests.support.mounting import mounted, run
from tests.support.tarball import HARDLINK, entry, sparse_pax_1_0, tarball

if TYPE_CHECKING:
    from pathlib import Path

    from ocifs.forensics.grep import Match
    from ocifs.forensics.sweep import Stream


@pytest.fixture
def ocifs(capfdbinary: pytest.CaptureFixture[bytes]) -> Run:
    return runner(capfdbinary)


def lines(ocifs: Run, *words: str) -> list[bytes]:
    done = ocifs("grep", *words)
    assert (done.status, done.err) == (0 if done.out else 1, "")
    return done.out.splitlines()


def rows(ocifs: Run, *words: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines(ocifs, "--json", *words)]


def test_grep_says_the_same_on_a_mount(ocifs: Run, tmp_path: Path, place: Path) -> None:
    chance = random.Random(7)
    text = b"\n".join(bytes(chance.choices(b"abcde ", k=chance.randrange(60))) for _ in range(3000))
    layer = tarball(
        entry("text", text + b"\nlast without a newline cab"),
        entry("link", type=HARDLINK, link="text"),
        entry("empty"),
        entry("blank", b"\n\n\ncab\n\n"),
        entry("binary", b"a\0b cab\ncab\n"),
        entry("high", b"\xff\xfecab\n"),
    )
    write_layout(tmp_path / "image", [layer])
    ref = str(tmp_path / "image")
    asked = [
        ["cab"],
        ["-i", "CAB"],
        ["-c", "cab"],
        ["-l", "cab"],
        ["-o", "-a", "c[ab]*"],
        ["-a", "cab"],
        ["-F", "a b"],
        ["-c", "^$"],
        ["^"],
        ["e$"],
        ["-c", "d"],
    ]
    with mounted(ref, place):
        for words in asked:
            theirs = run(
                ["grep", "-r", *(["-E"] if "-F" not in words else []), *words, "."],
                cwd=place,
                env={"LC_ALL": "C"},
                encoding="latin-1",
            )
            ours = ocifs("grep", *words[:-1], ref, words[-1])
            # grep -c also counts files that have none.
            assert sorted(ours.out.decode("latin-1").splitlines()) == sorted(
                line
                for line in theirs.stdout.replace("./", "/").splitlines()
                if "-c" not in words or not line.endswith(":0")
            ), words
            assert ours.err.replace("ocifs: /", "grep: ./") == theirs.stderr, words


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_what_was_deleted_and_what_is_no_file_is_searched(ocifs: Run, tmp_path: Path, compression: str) -> None:
    ref = write_evidence(tmp_path / "image", compression)
    assert lines(ocifs, ref, "PRIVATE KEY") == []
    assert lines(ocifs, "-o", "--deleted", ref, "BEGIN .* KEY") == [b"L02/root/.ssh/id_rsa:BEGIN OPENSSH PRIVATE KEY"]
    assert lines(ocifs, "--all", ref, "good|evil|first|second") == [
        b"L01/bin/tool:echo good",
        b"L01/bin/twin:echo good",
        b"L03/bin/tool:echo evil",
        b"L03/etc/motd:first",
        b"L03/etc/motd:second",
    ]
    assert lines(ocifs, ref, "good|evil") == [b"/bin/twin:echo good", b"/bin/tool:echo evil"]
    assert rows(ocifs, "--all", ref, "not really") == [
        {
            "path": "/root/.ssh/id_rsa",
            "layer": 2,
            "entry": 1,
            "offset": 36,
            "data_layer": 2,
            "layer_offset": 1060,
            "size": 10,
            "match": "not really",
            "line": "not really",
            "binary": False,
        }
    ]
    hidden = rows(ocifs, "--slack", ref, "hidden/payload|behind the end")
    assert [(row["path"], row["offset"], row["layer"], row["layer_offset"], row["match"]) for row in hidden] == [
        (None, None, 5, 7168, "hidden/payload"),
        (None, None, 5, 7680, "behind the end"),
    ]
    assert lines(ocifs, "--slack", ref, "behind ...") == [b"L05@7680:behind the"]


def test_matches_over_spans_are_found_where_they_are(tmp_path: Path) -> None:
    """Every needle of a file of many spans, at its offsets, whatever lies on a span's edge."""
    chance = random.Random(3)
    parts, offsets, at = [], [], 0
    for number in range(6000):
        noise = chance.randbytes(chance.randrange(3000)).replace(b"needle", b"")
        line = b"needle %d" % number
        parts += [noise, line, b"\n" if number % 3 else b""]
        offsets.append(at + len(noise))
        at += sum(map(len, parts[-3:]))
    content = b"".join(parts)
    write_layout(tmp_path / "image", [tarball(entry("a", b"x"), entry("big", content))])
    found: list[tuple[int, int, bytes]] = []

    def sink(_: Stream, match: Match) -> bool:
        found.append((match.file_offset, match.layer_offset, match.text))
        return True

    with Store(tmp_path / "cache") as store, open_examination(str(tmp_path / "image"), store, ImageOptions()) as image:
        names = grepping.Names(image, lambda version: version.path == b"big")
        assert list(grepping.grep(image, re.compile(b"needle [0-9]+"), names, sink)) == []
        assert len(image.layer(1).index.spans) > 1
    expected = [match.span() for match in re.finditer(b"needle [0-9]+", content)]
    assert [(offset, len(text)) for offset, _, text in found] == [(start, stop - start) for start, stop in expected]
    assert [offset for offset, _, _ in found] == offsets
    assert {layer_offset - offset for offset, layer_offset, _ in found} == {2048 - 512}


def test_a_line_without_end_is_cut_and_memory_stays_flat(ocifs: Run, tmp_path: Path) -> None:
    long = b"x" * 5_000_000 + b"needle" + b"y" * 5_000_000
    write_layout(tmp_path / "image", [tarball(entry("long", long), entry("other", b"needle\n"))])
    ref = str(tmp_path / "image")
    assert [(row["path"], row["offset"]) for row in rows(ocifs, ref, "needle")] == [("/long", 5_000_000), ("/other", 0)]
    shown = lines(ocifs, ref, "needle")
    assert len(shown) == 2
    assert len(shown[0]) == len("/long:") + grepping.MAX_LINE
    assert b"needle" in shown[0]
    assert lines(ocifs, "-c", ref, "needle") == [b"/long:1", b"/other:1"]


def test_holes_are_passed_over(ocifs: Run, tmp_path: Path) -> None:
    sparse = sparse_pax_1_0("sparse", [(0, b"one needle"), (1 << 50, b"two needle\n")], (1 << 60))
    write_layout(tmp_path / "image", [tarball(sparse)])
    found = rows(ocifs, str(tmp_path / "image"), "needle|\\x00")
    assert [(row["offset"], row["match"]) for row in found] == [(4, "needle"), ((1 << 50) + 4, "needle")]
    assert found[1]["layer_offset"] - found[0]["layer_offset"] == 10


def test_damage_is_said_and_the_rest_searched(ocifs: Run, tmp_path: Path) -> None:
    image = write_layout(
        tmp_path / "image",
        [tarball(entry("a", b"needle" + bytes(9_000_000)), entry("b", b"needle\n"))],
        compression="plain",
    )
    ref = str(tmp_path / "image")
    assert lines(ocifs, "-l", ref, "needle") == [b"/a", b"/b"]
    flip(blob_path(tmp_path / "image", image["layers"][0]), 5_000_000)
    done = ocifs("grep", "-l", ref, "needle")
    assert (done.status, done.out.splitlines()[-1]) == (4, b"/b")
    assert done.err.startswith("ocifs: not searched to its end: /a: ")


def test_what_is_no_pattern_is_refused(ocifs: Run, tmp_path: Path) -> None:
    ref = write_evidence(tmp_path / "image")
    for pattern in ("(", "a{2,1}", "[b-a]", "(?P<n"):
        done = ocifs("grep", ref, pattern)
        assert (done.status, done.out) == (2, b"")
        assert done.err.startswith(f"ocifs: the pattern {pattern!r} is no regular expression: ")
    assert ocifs("grep", "-F", ref, "(").status == 1
