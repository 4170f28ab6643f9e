"""What an examiner wants to see first: audit, with what it knows of capabilities and of names."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from ocifs.forensics.audit import RULES
from ocifs.forensics.capabilities import NAMES, capability_text
from ocifs.forensics.names import oddities
from tests.support.command import Run, runner
from tests.support.damage import flip
from tests.support.evidence_image import write_evidence
from tests.support.layout import blob_path, write_layout
from tests.support.tarball import BLOCKDEV, CHAR, DIR, FIFO, HARDLINK, SYMLINK, entry, tarball

if TYPE_CHECKING:
    from pathlib import Path

PING = bytes.fromhex("0100000200200000000000000000000000000000")
"""cap_net_raw=ep, as a file of Debian's iputils-ping has it."""


@pytest.fixture
def run(capfdbinary: pytest.CaptureFixture[bytes]) -> Run:
    return runner(capfdbinary)


@pytest.fixture(params=["gzip", "zstd"])
def evidence(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return write_evidence(tmp_path / "evidence", request.param)


def found(run: Run, *words: str) -> list[dict[str, Any]]:
    result = run("audit", "--json", *words)
    assert (result.status, result.err) == (0, "")
    return [json.loads(line) for line in result.out.splitlines()]


def short(rows: list[dict[str, Any]]) -> list[tuple[object, ...]]:
    return [(row["severity"], row["rule"], row["path"], row["layer"], row["visible"]) for row in rows]


def test_audit_of_the_evidence(run: Run, evidence: str) -> None:
    assert short(found(run, "--min", "info", evidence)) == [
        ("high", "trailing-archive", None, 5, False),
        ("medium", "setuid", "/bin/tool", 1, False),
        ("medium", "setuid", "/bin/tool", 3, True),
        ("medium", "setuid", "/bin/twin", 1, True),
        ("info", "standard-device", "/dev/null", 1, True),
        ("medium", "overridden-entry", "/etc/motd", 3, False),
        ("low", "non-utf8-name", "/odd/b\udcffd", 5, True),
        ("medium", "control-character", "/odd/new\nline", 5, True),
        ("low", "late-time", "/root/.ssh/id_rsa", 2, False),
        ("low", "late-time", "/tmp/build.log", 2, False),  # noqa: S108 (a path of the image)
        ("medium", "odd-marker", "/var/log/.wh.old.log", 4, False),
        ("high", "same-size-and-time", "/bin/tool", 3, True),
    ]


def test_audit_says_what_it_found(run: Run, evidence: str) -> None:
    rows = {(row["rule"], row["path"]): row for row in found(run, evidence)}
    assert rows["trailing-archive", None]["message"] == (
        "2048 bytes at layer offset 7168: another archive of 1 entry, the first of them hidden/payload"
    )
    assert rows["late-time", "/root/.ssh/id_rsa"]["message"] == (
        "its time, 2024-11-07T17:20:00Z, is later than its layer's, 2023-11-16T00:00:00Z"
    )
    trojan = rows["same-size-and-time", "/bin/tool"]
    assert trojan["entry"] == 0
    assert trojan["message"] == ("other content than in layer 1, and the same size, 20, and time, 2023-11-14T22:13:20Z")
    assert rows["overridden-entry", "/etc/motd"]["message"] == "it comes again as entry 3"


def test_audit_is_a_list_with_a_summary_by_rule(run: Run, evidence: str) -> None:
    status, out, err = run("audit", "--min", "high", evidence + "#4")
    assert (status, err) == (0, "")
    assert out.decode() == (
        "CLASS   RULE                      LAYER  SEEN  PATH: MESSAGE\n"
        "high    same-size-and-time            3  yes   /bin/tool: other content than in layer 1, and the same size, 20, "
        "and time, 2023-11-14T22:13:20Z\n"
        "\n"
        "CLASS  RULE                COUNT  MEANING\n"
        "high   same-size-and-time      1  a file with other content but the size and time of the version before\n"
        "8 more of a lower class; --min info shows all\n"
    )


def test_audit_fails_on_a_class_only_when_asked(run: Run, evidence: str) -> None:
    assert run("audit", evidence).status == 0
    status, out, err = run("audit", "--fail-on", "high", "--min", "high", evidence)
    assert (status, err) == (1, "ocifs: the audit found something of class high\n")
    assert out
    assert run("audit", "--fail-on", "high", evidence + "#2").status == 0
    assert run("audit", "--fail-on", "medium", evidence + "#2").status == 1


# -- one rule at a time --------------------------------------------------------------------------------------------

PASSWD = entry("etc/passwd", b"root:x:0:0::/:/bin/sh\nada:x:1000:100::/:\n") + entry("etc/group", b"users:x:100:\n")
X = {"security.capability": PING}

CASES: dict[str, tuple[list[list[bytes]], list[tuple[object, ...]]]] = {
    "setuid": ([[entry("a", mode=0o4755), entry("d/", mode=0o4755)]], [("/a", 1, True)]),
    "setgid": ([[entry("a", mode=0o2755)]], [("/a", 1, True)]),
    "setuid-writable": ([[entry("a", mode=0o4775), entry("b", mode=0o2757), entry("c", mode=0o4755)]],
                        [("/a", 1, True), ("/b", 1, True)]),
    "setgid-directory": ([[entry("a/", mode=0o2775)]], [("/a", 1, True)]),
    "capability": ([[entry("a", xattrs=X), entry("b", type=HARDLINK, link="a", xattrs=X)], [entry("a")]],
                   [("/a", 1, False), ("/b", 1, True)]),
    "malformed-capability": ([[entry("a", xattrs={"security.capability": PING[:-1]})]], [("/a", 1, True)]),
    "world-writable-file": ([[entry("a", mode=0o666), entry("b", mode=0o622, type=FIFO), entry("c", link="a")]],
                            [("/a", 1, True), ("/b", 1, True)]),
    "world-writable-directory": ([[entry("a/", mode=0o777), entry("b/", mode=0o1777)]], [("/a", 1, True)]),
    "device": ([[entry("mem", type=CHAR, rdev=(1, 1)), entry("sda", type=BLOCKDEV, rdev=(1, 3)),
                 entry("null", type=CHAR, rdev=(1, 3))]], [("/mem", 1, True), ("/sda", 1, True)]),
    "standard-device": ([[entry("tty", type=CHAR, rdev=(5, 0))], [entry("tty", type=CHAR, rdev=(0, 0))]],
                        [("/tty", 1, False)]),
    "unknown-user": ([[entry("a", uid=1), PASSWD, entry("b", uid=1000)]], [("/a", 1, True)]),
    "unknown-group": ([[entry("a", gid=7), PASSWD, entry("b", gid=100)]], [("/a", 1, True)]),
    "overlay-attribute": ([[entry("a/", xattrs={"trusted.overlay.opaque": b"y"})]], [("/a", 1, True)]),
    "hidden-name": ([[entry("a/.../x"), entry(".. "), entry("....x"), entry(" ")]],
                    [("/ ", 1, True), ("/.. ", 1, True), ("/a/...", 1, True)]),
    "padded-name": ([[entry("ls "), entry(" ls"), entry("l s")]], [("/ ls", 1, True), ("/ls ", 1, True)]),
    "control-character": ([[entry("a\x1b[2J"), entry("b\x7f"), entry("c\u0085")]],
                          [("/a\x1b[2J", 1, True), ("/b\x7f", 1, True), ("/c\u0085", 1, True)]),
    "turned-name": ([[entry("a\u202egpj.exe")], [entry(".wh.a\u202egpj.exe")]], [("/a\u202egpj.exe", 1, False)]),
    "invisible-character": ([[entry("l\u200bs"), entry("caf\u00e9")]], [("/l\u200bs", 1, True)]),
    "non-utf8-name": ([[entry(b"a\xe9")]], [("/a\udce9", 1, True)]),
    "overridden-entry": ([[entry("a", b"1"), entry("a", b"2"), entry("f"), entry("f/x")]],
                         [("/a", 1, False), ("/f", 1, False)]),
    "repeated-directory": ([[entry("a/"), entry("a/", mode=0o700)]], [("/a", 1, False)]),
    "ineffective-whiteout": ([[entry(".wh.x"), entry("a")], [entry(".wh.a"), entry(".wh.b")]],
                             [("/.wh.b", 2, False), ("/.wh.x", 1, False)]),
    "ineffective-opaque": ([[entry("a/x")], [entry("a/.wh..wh..opq"), entry("b/.wh..wh..opq")]],
                           [("/b/.wh..wh..opq", 2, False)]),
    "odd-marker": ([[entry("a"), entry("b"), entry("c"), entry("d"), entry("e")],
                    [entry(".wh.a", b"data"), entry(".wh.b", type=SYMLINK, link="a"), entry(".wh.c", type=DIR),
                     entry(".wh.d"), entry("e", type=CHAR, rdev=(0, 0))]],
                   [("/.wh.a", 2, False), ("/.wh.b", 2, False), ("/.wh.c", 2, False)]),
    "same-size-and-time": ([[entry("a", b"1", mtime=5), entry("b", b"1", mtime=5), entry("c", b"1", mtime=5)],
                            [entry("a", b"2", mtime=5), entry("b", b"1", mtime=5), entry("c", b"2", mtime=6)],
                            [entry(".wh.a")], [entry("a", b"3", mtime=5)]], [("/a", 2, False), ("/a", 4, True)]),
    "late-time": ([[entry("a", mtime=1_714_564_800.5), entry("b", mtime=1_714_564_801)]], [("/b", 1, True)]),
    "trailing-archive": ([[entry("a"), bytes(1024), entry("b")]], [(None, 1, False)]),
    "trailing-data": ([[entry("a"), bytes(1024), b"x" * 512]], [(None, 1, False)]),
    "trailing-estargz": ([[entry("a"), bytes(1024), entry("stargz.index.json", b"{}")]], [(None, 1, False)]),
    "unreadable": ([[entry("a", type=HARDLINK, link="nothing")]], [("/a", 1, True)]),
}  # fmt: skip


@pytest.mark.parametrize("rule", CASES)
def test_rule(run: Run, tmp_path: Path, rule: str) -> None:
    layers, expected = CASES[rule]
    write_layout(tmp_path / "image", [tarball(*entries) for entries in layers])
    rows = [row for row in found(run, "--min", "info", str(tmp_path / "image")) if row["rule"] == rule]
    assert [(row["path"], row["layer"], row["visible"]) for row in rows] == expected
    assert {row["severity"] for row in rows} == {RULES[rule].severity.name.lower()}


def test_every_rule_has_a_case() -> None:
    assert CASES.keys() == RULES.keys()


def test_nobody_is_unknown_where_no_accounts_are(run: Run, tmp_path: Path) -> None:
    write_layout(tmp_path / "image", [tarball(entry("a", uid=77, gid=77), PASSWD), tarball(entry(".wh.etc"))])
    assert found(run, str(tmp_path / "image")) == []


def test_a_layers_time_that_is_not_cut_to_the_second_counts_in_full(run: Run, tmp_path: Path) -> None:
    history = {"history": [{"created": "2024-05-01T12:00:00.25Z", "created_by": "x"}]}
    layer = tarball(entry("a", mtime=1_714_564_800.25), entry("b", mtime=1_714_564_800.5))
    write_layout(tmp_path / "image", [layer], config=history)
    (row,) = found(run, str(tmp_path / "image"))
    assert row["message"] == (
        "its time, 2024-05-01T12:00:00.500000000Z, is later than its layer's, 2024-05-01T12:00:00.250000000Z"
    )


@pytest.mark.parametrize("created", ["", "soon", "1970-01-01T00:00:00Z", "99999-01-01T00:00:00Z"])
def test_no_time_is_late_for_a_layer_without_one(run: Run, tmp_path: Path, created: str) -> None:
    history = {"history": [{"created": created, "created_by": "x"}]}
    write_layout(tmp_path / "image", [tarball(entry("a", mtime=2_000_000_000))], config=history)
    assert found(run, str(tmp_path / "image")) == []


def test_warnings_of_the_layer_rules_are_findings(run: Run, tmp_path: Path) -> None:
    layer = tarball(
        entry("../../up"), entry("n" * 300), entry("a", b"1"), entry("a", b"2"), entry("./b", type=HARDLINK, link="c")
    )
    write_layout(tmp_path / "image", [layer])
    assert short(found(run, str(tmp_path / "image"))) == [
        ("high", "rule-T13", "/../../up", 1, False),
        ("medium", "rule-T17", "/" + "n" * 300, 1, False),
        ("medium", "rule-H6", "/b", 1, True),
        ("medium", "overridden-entry", "/a", 1, False),
        ("high", "unreadable", "/b", 1, True),
    ]


def test_what_is_not_what_the_image_says_is_a_finding(run: Run, tmp_path: Path) -> None:
    digests = write_layout(tmp_path / "image", [tarball(entry("a", b"one"))], compression="plain")
    flip(blob_path(tmp_path / "image", digests["layers"][0]), 512)
    rows = found(run, str(tmp_path / "image"))
    assert {(row["severity"], row["rule"], row["path"], row["layer"]) for row in rows} == {("high", "rule-C4", None, 1)}


def test_data_that_cannot_be_read_is_a_finding(run: Run, tmp_path: Path) -> None:
    digests = write_layout(
        tmp_path / "image",
        [tarball(entry("a", b"1", mtime=5)), tarball(entry("a", b"2", mtime=5))],
        compression="plain",
    )
    assert run("index", str(tmp_path / "image")).status == 0
    flip(blob_path(tmp_path / "image", digests["layers"][0]), 512)
    (row,) = found(run, str(tmp_path / "image"))
    assert (row["rule"], row["path"], row["layer"], row["visible"]) == ("unreadable", "/a", 1, False)
    assert "its bytes have changed since the index was built" in row["message"]


# -- capabilities --------------------------------------------------------------------------------------------------


def vfs_cap_data(
    revision: int, permitted: int, inheritable: int = 0, *, effective: bool = True, root: int = 0
) -> bytes:
    words = [permitted & 0xFFFFFFFF, inheritable & 0xFFFFFFFF, permitted >> 32, inheritable >> 32]
    kept = words[: 2 if revision == 1 else 4] + ([root] if revision == 3 else [])
    return struct.pack(f"<{1 + len(kept)}I", revision << 24 | effective, *kept)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (PING, "cap_net_raw=ep"),
        (vfs_cap_data(1, 1 << 10), "cap_net_bind_service=ep"),
        (vfs_cap_data(2, 1 << 39, effective=False), "cap_bpf=p"),
        (vfs_cap_data(2, 1 << 13, 1 << 21, effective=False), "cap_sys_admin=i cap_net_raw+p"),
        (vfs_cap_data(2, (1 << 41) - 1), "=ep"),
        (vfs_cap_data(2, (1 << 41) - 2), "=ep cap_chown-ep"),
        (vfs_cap_data(2, 1 << 50), "50=ep"),
        (vfs_cap_data(3, 1 << 13, root=1000), "cap_net_raw=ep [rootid=1000]"),
        (vfs_cap_data(3, 1 << 13), "cap_net_raw=ep"),
        (vfs_cap_data(2, 0), "="),
    ],
)
def test_capabilities_in_getcaps_words(value: bytes, text: str) -> None:
    assert capability_text(value) == text


@pytest.mark.parametrize(
    "value", [b"", b"\0\0\0", PING + b"\0", vfs_cap_data(3, 1)[:-4], b"\0\0\0\4" + bytes(16), bytes(20)]
)
def test_what_the_kernel_does_not_take_for_capabilities(value: bytes) -> None:
    with pytest.raises(ValueError, match=r"few|revision"):
        capability_text(value)


def test_getcap_says_the_same(tmp_path: Path) -> None:
    if os.geteuid() or not shutil.which("setcap"):
        pytest.skip("capabilities can be set by root with setcap only")
    file = tmp_path / "file"
    file.touch()
    most = ",".join(NAMES[:30])
    for words in ("cap_kill=eip", f"{most}=ep", "all=ip cap_chown-i cap_kill-ip", "cap_net_raw+p cap_sys_admin+i"):
        try:
            subprocess.run(["setcap", words, str(file)], check=True, stderr=subprocess.PIPE)
        except subprocess.CalledProcessError:
            pytest.skip("this file system keeps no capabilities")
        theirs = subprocess.run(["getcap", str(file)], check=True, stdout=subprocess.PIPE, text=True).stdout
        assert theirs == f"{file} {capability_text(os.getxattr(file, 'security.capability'))}\n"


# -- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [b"a", b".bashrc", b"a b", b"[", b"...x", b"-", b"~", "café".encode(), "日本".encode(), b""]
)
def test_names_of_every_day_are_not_odd(name: bytes) -> None:
    assert oddities(name) == []


def test_a_name_can_be_odd_in_several_ways() -> None:
    assert oddities(b"\xff\x07 ") == [
        ("non-utf8-name", "the name is not UTF-8: byte 0xff at 0"),
        ("padded-name", "the name ends with a space"),
        ("control-character", "the name has control characters: U+0007"),
    ]
    assert oddities("\u2024\u2024\u00a0".encode()) == [("hidden-name", "the name is nothing but U+2024, U+00A0")]
