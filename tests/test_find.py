"""find: GNU find on a mount finds the same, and what it cannot see is found by the same words."""

from __future__ import annotations

import json
import os
import shlex
import time
from typing import TYPE_CHECKING

import pytest

from ocifs.errors import UsageError
from ocifs.forensics.examination import open_examination
from ocifs.forensics.find import Surroundings, parse, search, visible
from ocifs.forensics.patterns import pattern
from ocifs.image import ImageOptions, open_image
from ocifs.rootfs import view
from ocifs.store import Store
from tests.support.command import Run, runner
from tests.support.evidence_image import BASE_TIME, ODD_NAMES, write_evidence
from tests.support.layout import write_layout
from tests.support.mounting import mounted, run
from tests.support.tarball import CHAR, FIFO, HARDLINK, entry, tarball

if TYPE_CHECKING:
    from pathlib import Path

DAY = 86400
NOW = int(time.time())


@pytest.fixture
def ocifs(capfdbinary: pytest.CaptureFixture[bytes]) -> Run:
    return runner(capfdbinary)


def tree() -> list[bytes]:
    """Two layers with something for every test."""
    base = tarball(
        entry("etc/passwd", b"root:x:0:0::/:/bin/sh\nada:x:1000:100::/:/bin/sh\n", mtime=BASE_TIME),
        entry("etc/group", b"root:x:0:\nusers:x:100:ada\n", mtime=BASE_TIME),
        entry("a/", mode=0o1777, uid=1000, gid=100, mtime=BASE_TIME),
        entry("a/empty", mtime=NOW - 10 * DAY - 60),
        entry("a/one", b"1", mode=0o4755, uid=1000, mtime=NOW - DAY - 60),
        entry("a/k", bytes(1024), mode=0o2750, gid=100, mtime=NOW - 60),
        entry("a/k1", bytes(1025), mode=0o600, mtime=NOW + DAY),
        entry("a/M", bytes((1 << 20) + 1), mtime=BASE_TIME + 0.5),
        entry("a/Upper[x]", b"u"),
        entry("a/hard", type=HARDLINK, link="a/one"),
        entry("a/soft", link="one"),
        entry("a/.hidden", b"h", mode=0o000),
        entry("a/b/c/deep", b"d", mtime=BASE_TIME),
        entry("a/b/void/", mode=0o700, mtime=BASE_TIME),
        entry("dev/null", type=CHAR, rdev=(1, 3), mode=0o666, mtime=BASE_TIME),
        entry("dev/fifo", type=FIFO, mtime=BASE_TIME),
        entry(b"odd/\xff", b"x"),
        entry("odd/tab\tbed", b"x"),
        entry("odd/ünï", b"x"),
        entry("odd/pi|pe", b"x", xattrs={"user.note": b"n"}),
        entry("gone/file", b"g"),
    )
    return [base, tarball(entry("gone/.wh.file"), entry("a/b/new", b"n", uid=7, mtime=BASE_TIME))]


EXPRESSIONS = """
-name *e*
-name [[:upper:]]*
-name [!a-z]*
-name [^a-z]*
-name Upper\\[x\\]
-name ?
-name odd/*
-name un\\i
-iname upper*
-path */b/*
-path *b*e*
-ipath */A/*
-regex .*/[a-z]
-iregex .*/UPPER.*
-lname on*
-type f
-type d,l
-type c
-type p -o -type s
-type f -size 1c
-type f -size +1k
-type f -size 2k
-type f -size -2k
-type f -size +2
-type f -size -1
-type f -size 2M
-type f -size 1024c -o -size 513w
-type f -empty
-empty
-perm 4755
-perm -4000
-perm /6000
-perm /u+s,g+s
-perm -u=r,g=r,o=r
-perm u=rwx,g=rxs
-perm -a+t
-perm 0
-perm -0
-perm a=rw
-mtime 1
-mtime +5
-mtime -1
-mmin -5
-newermt 2023-11-14T22:13:20Z
-newermt @1700000000.25
-user ada
-user 7
-group users
-uid +0
-uid 1000
-gid -1
-links 2
-links +2
-maxdepth 1
-mindepth 2 -maxdepth 2 -type d
-name b -prune -o -print
-name a -prune
! -type f
-not -name a ! -name b -type d
( -name k -o -name k1 ) -a -size 1k
-name k -o -name k1 -size 1k
-true -a ! -false -and -name one
-name one -or -name hard
-name one -print -print
"""


def test_gnu_find_finds_the_same_on_a_mount(tmp_path: Path, place: Path) -> None:
    write_layout(tmp_path / "image", tree())
    expressions = [line.split() for line in EXPRESSIONS.strip().splitlines()]
    # They know other names of users; and their paths begin with where they start.
    accounts = {"ada": "1000", "users": "100"}
    script = "".join(
        f"find . -regextype posix-extended {shlex.join(accounts.get(word, word) for word in words)} && echo ----\n"
        for words in expressions
    )
    with mounted(str(tmp_path / "image"), place):
        done = run(["sh", "-c", script], cwd=place, env={"LC_ALL": "C.UTF-8"})
    assert done.stderr == ""
    theirs = done.stdout.split("----\n")[:-1]
    options = ImageOptions(examine=True)
    around = Surroundings(time.time_ns(), lambda: {"ada": 1000}, lambda: {"users": 100})
    with (
        Store(tmp_path / "cache") as store,
        open_examination(str(tmp_path / "image"), store, options) as examination,
        open_image(str(tmp_path / "image"), store, options) as image,
    ):
        for words, found in zip(expressions, theirs, strict=True):
            ours = search(visible(examination.history, view(image)), parse(words, around))
            paths = ["/" + os.fsdecode(version.path) for version, actions in ours for _ in actions]
            expected = ["/" + path.removeprefix(".").removeprefix("/") for path in found.splitlines()]
            assert sorted(paths) == sorted(expected), words


def lines(ocifs: Run, *words: str) -> list[bytes]:
    done = ocifs("find", *words)
    assert (done.status, done.err) == (0, "")
    return done.out.splitlines()


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_what_was_deleted_is_found_by_the_same_words(ocifs: Run, tmp_path: Path, compression: str) -> None:
    ref = write_evidence(tmp_path / "image", compression)
    assert lines(ocifs, "--deleted", ref, "-type", "f") == [
        b"L01/bin/tool",
        b"L03/etc/motd",
        b"L01/opt/app/config",
        b"L01/opt/app/data",
        b"L02/root/.ssh/id_rsa",
        b"L02/tmp/build.log",
        b"L01/var/log/old.log",
    ]
    assert lines(ocifs, "--deleted", ref, "/root", "-perm", "600") == [b"L02/root/.ssh/id_rsa"]
    assert lines(ocifs, ref, "-name", "id_rsa") == []
    assert lines(ocifs, "--all", ref, "-name", "*tool") == [b"L01/bin/tool", b"L03/bin/tool"]
    assert lines(ocifs, "--all", ref, "-layer", "4", "-name", ".wh.*") == [
        b"L04/opt/app/.wh..wh..opq",
        b"L04/root/.ssh/.wh.id_rsa",
        b"L04/tmp/.wh.build.log",
        b"L04/var/log/.wh.old.log",
    ]
    assert lines(ocifs, ref, "-layer", "+3", "-type", "f", "-newermt", "@0") == [b"/opt/app/new"]
    names = ocifs("find", ref, "/odd", "-type", "f", "-print0").out.split(b"\0")[:-1]
    assert names == sorted(b"/" + name for name in ODD_NAMES)


def test_long_and_json_say_what_became_of_it(ocifs: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    ref = write_evidence(tmp_path / "image")
    words = ("--deleted", ref, "/root")
    line = b"-rw-------     0     0         81 2024-11-07 17:20 L02 L02/root/.ssh/id_rsa (deleted by layer 4)"
    assert lines(ocifs, "-l", *words) == lines(ocifs, *words, "-ls") == [line]
    assert lines(ocifs, "-l", ref, "/sh") == [b"lrwxrwxrwx     0     0          8 2023-11-14 22:13 L01 /sh -> bin/tool"]
    row = json.loads(ocifs("find", "--json", *words).out)
    assert (row["path"], row["layer"], row["end"], row["end_layer"]) == ("/root/.ssh/id_rsa", 2, "whiteout", 4)


def test_extended_attributes_are_tested_by_name(ocifs: Run, tmp_path: Path) -> None:
    write_layout(tmp_path / "image", tree())
    assert lines(ocifs, str(tmp_path / "image"), "-xattr", "user.*") == [b"/odd/pi|pe"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--deleted"], "there is no test '--deleted'; options stand before REF"),
        (["-exec", "rm"], "there is no test '-exec'; 'ocifs find --help' lists them"),
        (["-name"], "-name's argument is missing at the end of the expression"),
        (["(", "-true"], "a ) is missing"),
        (["-true", ")"], "')' is one too many"),
        (["-o", "-true"], "there is no test '-o'; 'ocifs find --help' lists them"),
        (["-size", "1X"], "-size '1X' is not a number, alone or with + or - before it"),
        (["-perm", "u?w"], "-perm 'u?w' is no mode such as 644, -4000, /u+s or u=rwx,g=rx"),
        (["-type", "x"], "-type 'x' is not one or several of f, d, l, c, b, p, s, with commas"),
        (["-newermt", "soon"], "-newermt 'soon' is no time such as 2024-03-01 or 2024-03-01T12:00:00Z"),
        (["-newermt", "@1e999"], "-newermt '@1e999' is no time such as 2024-03-01 or 2024-03-01T12:00:00Z"),
        (["-user", "nobody"], "-user 'nobody' is neither a number nor a name that the image has"),
        (["-links", "many"], "-links 'many' is not a number, alone or with + or - before it"),
        (["-maxdepth", "-1"], "-maxdepth '-1' is not a number"),
        (["!"] * 5000, "the expression is nested too deeply"),
    ],
)
def test_what_is_no_expression_is_refused_in_a_sentence(words: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(words, Surroundings(0))
    assert str(caught.value) == f"find: {message}"


@pytest.mark.parametrize(
    ("text", "matching", "other"),
    [
        ("[]x]", "]", "["),
        ("[a", "[a", "a"),
        ("[z-a]", "", "m"),
        ("a\\*", "a*", "ab"),
        ("[a-]", "-", "b"),
        ("[\\]]", "]", "\\"),
        ("[[:digit:]-]", "-", "x"),
        ("*\n*", "a\nb", "ab"),
        ("[&&~~||]", "~", "a"),
    ],
)
def test_patterns_that_are_easily_misread(text: str, matching: str, other: str) -> None:
    matches = pattern(text).fullmatch
    assert not matching or matches(matching)
    assert not matches(other)


def test_a_path_that_never_was_is_not_found(ocifs: Run, tmp_path: Path) -> None:
    ref = write_evidence(tmp_path / "image")
    done = ocifs("find", ref, "/etc/passw", "-type", "f")
    assert (done.status, done.out) == (3, b"")
    assert done.err.startswith("ocifs: no layer ever had '/etc/passw'")
    assert ocifs("find", "--all", ref, "-links", "1").status == 2
