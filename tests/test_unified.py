"""Unified diffs of texts as bytes."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ocifs.forensics import unified
from ocifs.forensics.unified import header_name, unified_diff

if TYPE_CHECKING:
    from pathlib import Path

TEXTS = st.lists(st.sampled_from([b"a\n", b"b\n", b"c\r\n", b"\n", b"d"]), max_size=25).map(b"".join)


def diff(before: bytes, after: bytes) -> bytes:
    return b"".join(unified_diff(before, after, b"a/x", b"b/x"))


def applied(before: bytes, patch: bytes) -> bytes:
    """What a patch makes of a text, by the format's definition: every line that stays or goes must be there."""
    old = [line + b"\n" for line in before.split(b"\n")]
    old[-1] = old[-1][:-1]
    out: list[bytes] = []
    at = 0
    for line in patch.replace(b"\n\\ No newline at end of file\n", b"\0\n").split(b"\n")[2:-1]:
        if line.startswith(b"@@"):
            start, _, count = line.split()[1][1:].partition(b",")
            first = int(start) - (count != b"0")
            out += old[at:first]
            at = first
            continue
        sign, text = line[:1], line[1:-1] if line.endswith(b"\0") else line[1:] + b"\n"
        if sign != b"+":
            assert old[at] == text
            at += 1
        if sign != b"-":
            out.append(text)
    return b"".join(out + old[at:])


@given(TEXTS, TEXTS)
def test_a_diff_makes_one_text_of_the_other(before: bytes, after: bytes) -> None:
    assert applied(before, diff(before, after)) == after


@given(TEXTS, TEXTS)
def test_a_diff_that_was_given_up_is_as_right(before: bytes, after: bytes) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(unified, "_WORK", 3)
        assert applied(before, diff(before, after)) == after


def test_a_diff_is_what_gnu_diff_writes(tmp_path: Path) -> None:
    before = b"".join(b"line %d\n" % number for number in range(40))
    after = before.replace(b"line 3\n", b"line three\n").replace(b"line 20\n", b"").replace(b"line 22\n", b"22\nand\n")
    after = after.replace(b"line 39\n", b"line 39")
    (tmp_path / "before").write_bytes(before)
    (tmp_path / "after").write_bytes(after)
    words = ["diff", "-u", "--label", "a/x", "--label", "b/x", "before", "after"]
    theirs = subprocess.run(words, cwd=tmp_path, stdout=subprocess.PIPE, check=False).stdout
    assert diff(before, after) == theirs
    assert theirs.count(b"@@ -") == 3


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (b"", b"", b""),
        (b"same", b"same", b""),
        (b"", b"new\n", b"--- a/x\n+++ b/x\n@@ -0,0 +1 @@\n+new\n"),
        (b"a\nb\n", b"", b"--- a/x\n+++ b/x\n@@ -1,2 +0,0 @@\n-a\n-b\n"),
        (b"a", b"a\n", b"--- a/x\n+++ b/x\n@@ -1 +1 @@\n-a\n\\ No newline at end of file\n+a\n"),
        (b"a\rb\n", b"a\n", b"--- a/x\n+++ b/x\n@@ -1 +1 @@\n-a\rb\n+a\n"),
    ],
)
def test_small_diffs(before: bytes, after: bytes, expected: bytes) -> None:
    assert diff(before, after) == expected


def test_the_shortest_list_of_changes_is_found() -> None:
    before, after = (b"".join(b"%c\n" % letter for letter in word) for word in (b"ABCABBA", b"CBABAC"))
    lines = diff(before, after).splitlines()[2:]
    assert sum(line[:1] in (b"+", b"-") for line in lines) == 5  # the example of Myers' paper


def test_names_are_quoted_where_they_have_to_be() -> None:
    assert header_name(b"a/etc/motd") == b"a/etc/motd"
    assert header_name(b"a/with space") == b"a/with space\t"
    assert header_name(b'a/"q\\\n\xff') == b'"a/\\"q\\\\\\012\\377"'


def test_patch_reads_names_and_texts_as_they_are_written(tmp_path: Path) -> None:
    name = b"odd name\xc3\xa9"
    before, after = b"one\ntwo", b"one\n2\nthree\n"
    (tmp_path / name.decode()).write_bytes(before)
    lines = b"".join(unified_diff(before, after, b"a/" + name, b"b/" + name))
    subprocess.run(["patch", "-p1", "-s"], cwd=tmp_path, input=lines, check=True)
    assert (tmp_path / name.decode()).read_bytes() == after
