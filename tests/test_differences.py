"""How two images differ: diff."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.command import Run, runner
from tests.support.damage import flip
from tests.support.evidence_image import TOOL, TROJAN, write_evidence
from tests.support.layout import blob_path, write_layout
from tests.support.tarball import CHAR, DIR, FIFO, SYMLINK, entry, tarball

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def run(capfdbinary: pytest.CaptureFixture[bytes]) -> Run:
    return runner(capfdbinary)


@pytest.fixture(params=["gzip", "zstd"])
def evidence(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return write_evidence(tmp_path / "evidence", request.param)


def compared(run: Run, tmp_path: Path, before: list[bytes], after: list[bytes], *words: str) -> tuple[int, list[str]]:
    """Status and lines of ``diff`` for two lists of entries, each an image of one layer."""
    for name, entries in (("before", before), ("after", after)):
        write_layout(tmp_path / name, [tarball(*entries)])
    status, out, err = run("diff", *words, str(tmp_path / "before"), str(tmp_path / "after"))
    assert err == ""
    return status, out.decode(errors="surrogateescape").splitlines()


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (1, ["A /root", "A /root/.ssh", "A /root/.ssh/id_rsa", "A /tmp/build.log"]),
        (2, ["C /bin/tool  (content)", "C /etc  (mode)", "A /etc/motd"]),
        (
            3,
            [
                *("D /opt/app/config", "D /opt/app/data", "A /opt/app/new"),
                *("D /root/.ssh/id_rsa", "D /tmp/build.log", "D /var/log/old.log"),
            ],
        ),
    ],
)
def test_diff_of_two_layers_of_an_image(run: Run, evidence: str, layer: int, expected: list[str]) -> None:
    status, out, err = run("diff", f"{evidence}#{layer}", f"{evidence}#{layer + 1}")
    assert (status, out.decode().splitlines(), err) == (1, expected, "")


def test_diff_of_the_same_image_in_two_compressions_is_nothing(run: Run, tmp_path: Path) -> None:
    one, other = (write_evidence(tmp_path / kind, kind) for kind in ("gzip", "zstd"))
    assert run("index", one, other).status == 0
    for kind in ("gzip", "zstd"):  # both lie at the same place of the same tars, so no data is read
        for blob in (tmp_path / kind / "blobs/sha256").iterdir():
            if not blob.read_bytes().startswith(b"{"):
                flip(blob, 40)
    assert run("diff", one, other) == (0, b"", "")
    assert run("diff", "--content", one, other) == (0, b"", "")


def test_diff_shows_the_lines_of_a_changed_text(run: Run, evidence: str) -> None:
    status, out, _ = run("diff", "--content", evidence + "#2", evidence + "#3")
    assert status == 1
    assert out.decode() == (
        "C /bin/tool  (content)\n"
        "--- a/bin/tool\n"
        "+++ b/bin/tool\n"
        "@@ -1,2 +1,2 @@\n"
        " #!/bin/sh\n"
        "-echo good\n"
        "+echo evil\n"
        "C /etc  (mode)\n"
        "A /etc/motd\n"
        "--- /dev/null\n"
        "+++ b/etc/motd\n"
        "@@ -0,0 +1 @@\n"
        "+second\n"
    )


def test_patch_makes_one_tree_of_the_other(run: Run, evidence: str, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "bin").mkdir(parents=True)
    (tree / "bin/tool").write_bytes(TOOL)
    lines = run("diff", "--content", evidence + "#2", evidence + "#3").out
    subprocess.run(["patch", "-p1", "-s"], cwd=tree, input=lines, check=True)
    assert (tree / "bin/tool").read_bytes() == TROJAN
    assert (tree / "etc/motd").read_bytes() == b"second\n"


def test_diff_as_json_has_both_sides(run: Run, evidence: str) -> None:
    status, out, _ = run("diff", "--json", "--content", evidence + "#2", evidence + "#3")
    tool, etc, motd = (json.loads(line) for line in out.splitlines())
    assert status == 1
    assert (tool["change"], tool["path"], tool["changed"], tool["problems"]) == ("C", "/bin/tool", ["content"], [])
    assert (tool["before"]["layer"], tool["after"]["layer"]) == (1, 3)
    assert tool["before"]["sha256"] == hashlib.sha256(TOOL).hexdigest()
    assert tool["after"]["sha256"] == hashlib.sha256(TROJAN).hexdigest()
    assert tool["patch"].endswith("-echo good\n+echo evil\n")
    assert (etc["before"]["mode"], etc["after"]["mode"], etc["patch"]) == ("0755", "0711", None)
    assert (motd["before"], motd["change"], motd["changed"]) == (None, "A", [])


_PLAIN: dict[str, Any] = {"mode": 0o644, "uid": 1, "gid": 2, "mtime": 5, "xattrs": {"user.a": "1"}}


@pytest.mark.parametrize(
    ("after", "line"),
    [
        (entry("x", b"data", **_PLAIN), None),
        (entry("x", b"DATA", **_PLAIN), "C /x  (content)"),
        (entry("x", b"longer", **_PLAIN), "C /x  (content)"),
        (entry("x", b"data", **{**_PLAIN, "mode": 0o4644}), "C /x  (mode)"),
        (entry("x", b"data", **{**_PLAIN, "uid": 3}), "C /x  (owner)"),
        (entry("x", b"data", **{**_PLAIN, "gid": 3}), "C /x  (owner)"),
        (entry("x", b"data", **{**_PLAIN, "mtime": 5.000000001}), "C /x  (mtime)"),
        (entry("x", b"data", **{**_PLAIN, "xattrs": {"user.a": "2"}}), "C /x  (xattrs)"),
        (entry("x", b"d", **{**_PLAIN, "mode": 0o600, "mtime": 6}), "C /x  (content, mode, mtime)"),
        (entry("x", type=FIFO, **_PLAIN), "C /x  (type)"),
    ],
)
def test_diff_says_what_of_a_file_changed(run: Run, tmp_path: Path, after: bytes, line: str | None) -> None:
    # What stands before it in the second image moves the file, so that its content has to be read.
    status, lines = compared(run, tmp_path, [entry("x", b"data", **_PLAIN)], [entry("a", bytes(600)), after])
    assert (status, lines) == (1, ["A /a", line] if line else ["A /a"])


def test_diff_of_links_and_devices(run: Run, tmp_path: Path) -> None:
    before = [entry("l", type=SYMLINK, link="a"), entry("n", type=CHAR, rdev=(1, 3)), entry("same", link="x")]
    after = [entry("l", type=SYMLINK, link="b"), entry("n", type=CHAR, rdev=(1, 5)), entry("same", link="x")]
    assert compared(run, tmp_path, before, after) == (1, ["C /l  (target)", "C /n  (device)"])


def test_diff_lists_names_in_the_order_of_a_walk(run: Run, tmp_path: Path) -> None:
    names = ["a", "a/x", "a/x/y", "a-b", "a.b", "b\udcff"]
    made = [entry(name + "/", type=DIR) for name in names]
    assert compared(run, tmp_path, [], made) == (1, [f"A /{name}" for name in names])
    assert compared(run, tmp_path / "back", made, []) == (1, [f"D /{name}" for name in names])
    # Half of the names each: a directory that only its content names is as one with the usual attributes.
    assert compared(run, tmp_path / "mixed", made[::2], made[1::2]) == (
        1,
        ["D /a/x/y", "A /a-b", "D /a.b", "A /b\udcff"],
    )


def test_diff_ignores_what_it_is_told_to(run: Run, tmp_path: Path) -> None:
    before, after = [entry("x", b"1", mtime=1, uid=1)], [entry("x", b"2", mtime=2, uid=2)]
    assert compared(run, tmp_path, before, after)[1] == ["C /x  (content, owner, mtime)"]
    assert compared(run, tmp_path / "2", before, after, "--ignore", "mtime,owner")[1] == ["C /x  (content)"]
    assert compared(run, tmp_path / "3", before, after, "--ignore", "mtime,owner,content") == (0, [])
    status, _, err = run("diff", "--ignore", "time", "a", "b")
    assert (status, err.partition(" is none of ")[0]) == (2, "ocifs: --ignore 'time'")


def test_diff_of_binaries_gives_sizes_and_hashes(run: Run, tmp_path: Path) -> None:
    status, lines = compared(
        run,
        tmp_path,
        [entry("x", b"a\0b"), entry("t", b"text\n")],
        [entry("x", b"a\0bc"), entry("t/", type=DIR)],
        "--content",
    )
    one, other = (hashlib.sha256(data).hexdigest() for data in (b"a\0b", b"a\0bc"))
    assert status == 1
    assert lines == [
        *("C /t  (type)", "--- a/t", "+++ /dev/null", "@@ -1 +0,0 @@", "-text"),
        "C /x  (content)",
        f"Binary files a/x and b/x differ: 3 bytes sha256:{one}, 4 bytes sha256:{other}",
    ]


def test_diff_takes_a_large_file_for_binary(run: Run, tmp_path: Path) -> None:
    large = b"line\n" * (1 << 18)
    _, lines = compared(run, tmp_path, [entry("x", large)], [entry("x/", type=DIR)], "--content")
    assert lines[1] == (
        f"Binary files a/x and /dev/null differ: 1310720 bytes sha256:{hashlib.sha256(large).hexdigest()}, no file"
    )


def test_diff_names_data_that_cannot_be_compared(run: Run, tmp_path: Path) -> None:
    digests = write_layout(tmp_path / "before", [tarball(entry("x", b"1")), tarball(entry("y", b"2"))])
    write_layout(tmp_path / "after", [tarball(entry("x", b"1"), entry("y", b"3"))])
    images = str(tmp_path / "before"), str(tmp_path / "after")
    assert run("index", *images).status == 0
    flip(blob_path(tmp_path / "before", digests["layers"][1]), 30)
    status, out, err = run("diff", "--content", *images)
    assert (status, out) == (4, b"C /y  (content)\n")
    assert err.count("its bytes have changed since the index was built") == 1


def test_diff_keeps_every_byte_of_names(run: Run, tmp_path: Path) -> None:
    write_layout(tmp_path / "before", [tarball()])
    write_layout(tmp_path / "after", [tarball(entry(b"b\xff\n|", b"odd\n"))])
    images = str(tmp_path / "before"), str(tmp_path / "after")
    assert run("diff", "--content", *images).out == (
        b'A /b\xff\n|\n--- /dev/null\n+++ "b/b\\377\\012|"\n@@ -0,0 +1 @@\n+odd\n'
    )
    (row,) = (json.loads(line) for line in run("diff", "--json", *images).out.splitlines())
    assert os.fsencode(row["path"]) == b"/b\xff\n|"


def test_diff_notes_both_images_in_one_evidence_log(run: Run, evidence: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert run("diff", "--evidence-log", str(log), evidence + "#2", evidence + "#3").status == 1
    events = [json.loads(line) for line in log.read_bytes().splitlines()]
    assert [event["event"] for event in events].count("opened") == 2
    assert run("evidence", "verify", str(log)).status == 0
