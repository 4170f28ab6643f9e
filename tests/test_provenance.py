"""Where what is in an image comes from: ``log``, ``why`` with its shell lines, ``annotate``."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.command import Result, Run, runner
from tests.support.damage import flip
from tests.support.evidence_image import ODD_NAMES, SECRET, TOOL, TROJAN, write_evidence
from tests.support.layout import (
    archive_directory,
    blob_path,
    make_image,
    sha256,
    write_dir,
    write_docker_archive,
    write_layout,
)
from tests.support.tarball import HARDLINK, SYMLINK, entry, sparse_pax_1_0, tarball

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def run(capfdbinary: pytest.CaptureFixture[bytes]) -> Run:
    return runner(capfdbinary)


@pytest.fixture(scope="module", params=["gzip", "zstd"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The image to be examined, and a cache for it that all tests of this module share."""
    where = tmp_path_factory.mktemp("evidence")
    return write_evidence(where / "image", request.param), str(where / "cache")


@pytest.fixture
def ref(written: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("OCIFS_CACHE_DIR", written[1])
    return written[0]


def rows(result: Result) -> list[dict[str, Any]]:
    assert (result.status, result.err) == (0, "")
    return [json.loads(line) for line in result.out.splitlines()]


def one(result: Result) -> dict[str, Any]:
    (row,) = rows(result)
    return row


def picked(row: dict[str, Any], *names: str) -> tuple[Any, ...]:
    return tuple(row[name] for name in names)


# -- log -----------------------------------------------------------------------------------------------------------


def test_log_of_a_replaced_file_shows_both_of_the_same_size_and_time(run: Run, ref: str) -> None:
    old, new = rows(run("log", "--json", ref, "/bin/tool"))
    named = ("layer", "change", "size", "mtime_ns", "mode", "end", "end_layer", "created", "created_by")
    time = 1_700_000_000_000_000_000
    assert picked(old, *named) == (
        1, "added", 20, time, "4755", "replaced", 3, "2023-11-15T00:00:00Z", "ADD rootfs.tar / # base",
    )  # fmt: skip
    assert picked(new, *named) == (
        3, "changed", 20, time, "4755", "visible", None, "2023-11-17T00:00:00Z", "RUN update-tool",
    )  # fmt: skip
    assert (old["sha256"], new["sha256"]) == (sha256(TOOL)[7:], sha256(TROJAN)[7:])
    assert picked(old["ended_by"], "path", "layer", "created_by") == ("/bin/tool", 3, "RUN update-tool")
    assert new["ended_by"] is None


def test_log_finds_what_was_deleted_and_says_by_which_marker(run: Run, ref: str) -> None:
    status, out, err = run("log", ref, "root/.ssh/id_rsa")
    assert (status, err) == (0, "")
    assert out.decode() == (
        "/root/.ssh/id_rsa  layer 2  2023-11-16T00:00:00Z  COPY id_rsa /root/.ssh/id_rsa\n"
        f"    added:  -rw-------  0:0  {len(SECRET)} bytes  2024-11-07T17:20:00Z\n"
        f"    {sha256(SECRET)}\n"
        "    deleted by layer 4 (entry 0, /root/.ssh/.wh.id_rsa)\n"
        "    by 2023-11-18T00:00:00Z  RUN rm -rf /root/.ssh/id_rsa /tmp/build.log\n"
    )


@pytest.mark.parametrize(
    ("path", "end", "by"),
    [
        ("/opt/app/config", "opaque", "/opt/app/.wh..wh..opq"),
        ("/var/log/old.log", "whiteout", "/var/log/.wh.old.log"),
    ],
)
def test_log_finds_what_opaque_directories_and_odd_whiteouts_deleted(
    run: Run, ref: str, path: str, end: str, by: str
) -> None:
    row = one(run("log", "--json", ref, path))
    assert (*picked(row, "layer", "end", "end_layer"), row["ended_by"]["path"]) == (1, end, 4, by)


def test_log_finds_what_was_below_a_directory_that_was_deleted(run: Run, tmp_path: Path) -> None:
    write_layout(tmp_path / "x", [tarball(entry("a/"), entry("a/b/"), entry("a/b/c", b"c")), tarball(entry(".wh.a"))])
    row = one(run("log", "--json", str(tmp_path / "x"), "/a/b/c"))
    assert (row["end"], row["end_layer"], row["ended_by"]["path"]) == ("whiteout", 2, "/.wh.a")
    assert row["sha256"] == sha256(b"c")[7:]


def test_log_shows_an_entry_that_a_later_one_of_its_layer_took_the_place_of(run: Run, ref: str) -> None:
    first, second = rows(run("log", "--json", ref, "/etc/motd"))
    assert picked(first, "layer", "entry", "change", "end", "end_layer", "end_entry", "sha256") == (
        3, 2, "none", "overridden", 3, 3, sha256(b"first\n")[7:],
    )  # fmt: skip
    assert picked(second, "layer", "entry", "change", "end", "sha256") == (
        3, 3, "added", "visible", sha256(b"second\n")[7:],
    )  # fmt: skip


def test_log_shows_a_link_and_follows_it_only_if_told(run: Run, ref: str) -> None:
    assert picked(one(run("log", "--json", ref, "sh")), "type", "target", "sha256") == ("symlink", "bin/tool", None)
    assert [row["path"] for row in rows(run("log", "--json", "-L", ref, "sh"))] == ["/bin/tool", "/bin/tool"]


def test_log_without_hashes_reads_no_data(run: Run, ref: str) -> None:
    assert [row["sha256"] for row in rows(run("log", "--no-hash", "--json", ref, "bin/tool"))] == [None, None]


def test_a_path_that_never_was_names_the_nearest_that_was(run: Run, ref: str) -> None:
    assert run("log", ref, "/root/.ssh/id_rsb") == (
        3, b"", "ocifs: no layer ever had '/root/.ssh/id_rsb'; below '/root/.ssh' there was id_rsa, .wh.id_rsa\n",
    )  # fmt: skip
    status, _, err = run("why", ref, "/opt/app/deep/er")
    assert (status, err) == (3, "ocifs: no layer ever had '/opt/app/deep/er'; the nearest that one had is '/opt/app'\n")


def test_links_on_the_way_are_followed_also_deleted_ones(run: Run, tmp_path: Path) -> None:
    layers = [
        tarball(entry("usr/bin/x", b"x"), entry("bin", type=SYMLINK, link="/usr/bin"), entry("l", link="m"),
                entry("m", link="l")),
        tarball(entry(".wh.bin")),
    ]  # fmt: skip
    write_layout(tmp_path / "x", layers)
    assert one(run("log", "--json", str(tmp_path / "x"), "/bin/x"))["path"] == "/usr/bin/x"
    status, _, err = run("log", str(tmp_path / "x"), "/l/y")
    assert (status, err.startswith("ocifs: no layer ever had '/l/y'")) == (3, True)


def test_log_shows_a_version_that_cannot_be_read_and_ends_with_4(run: Run, tmp_path: Path) -> None:
    digests = write_layout(tmp_path / "x", [tarball(entry("a", b"a" * 600)), tarball(entry("a", b"b"))])
    assert run("index", str(tmp_path / "x")).status == 0
    flip(blob_path(tmp_path / "x", digests["layers"][0]), 30)
    status, out, _ = run("log", "--json", str(tmp_path / "x"), "a")
    broken, whole = map(json.loads, out.splitlines())
    assert status == 4
    assert broken["sha256"] is None
    assert "its bytes have changed since the index was built" in broken["problem"]
    assert whole["sha256"] == sha256(b"b")[7:]


# -- why: the shell line -------------------------------------------------------------------------------------------


def extracted(row: dict[str, Any]) -> bytes:
    """What the shell line writes. Nothing but sh and the machine's own tools take part."""
    done = subprocess.run(["sh", "-c", row["extract"]], capture_output=True, timeout=20, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout


def test_why_says_where_the_bytes_are_and_its_line_extracts_them(run: Run, ref: str) -> None:
    row = one(run("why", "--json", ref, "/root/.ssh/id_rsa"))
    assert picked(row, "layer", "header_offset", "data_offset", "size", "end", "end_layer", "created_by") == (
        2, 512, 1024, len(SECRET), "whiteout", 4, "COPY id_rsa /root/.ssh/id_rsa",
    )  # fmt: skip
    assert extracted(row) == SECRET
    image = json.loads(run("inspect", "--json", ref).out)
    assert picked(row, "digest", "diff_id") == picked(image["layers"][1], "digest", "diff_id")


def test_why_of_a_hard_link_says_whose_data_it_is(run: Run, ref: str) -> None:
    row = one(run("why", "--json", ref, "/bin/twin"))
    assert picked(row["data"], "path", "layer", "header_offset") == ("/bin/tool", 1, 512)
    assert row["data"]["extents"] == [{"file_offset": 0, "layer_offset": 1024, "size": 20}]
    assert extracted(row) == TOOL


def test_why_finds_whose_data_a_link_has_that_leads_through_a_symlink(run: Run, tmp_path: Path) -> None:
    layer = tarball(
        entry("d/"), entry("d/f", b"data"), entry("l", link="d"), entry("hard", type=HARDLINK, link="l/f"),
        entry("harder", type=HARDLINK, link="hard"),
    )  # fmt: skip
    write_layout(tmp_path / "x", [layer])
    found = rows(run("why", "--json", str(tmp_path / "x"), "hard", "harder"))
    assert [row["data"]["path"] for row in found] == ["/d/f", "/d/f"]
    assert [extracted(row) for row in found] == [b"data", b"data"]


def test_why_of_what_has_no_data(run: Run, ref: str) -> None:
    for path in ("/dev/null", "/sh", "/odd"):
        assert picked(one(run("why", "--json", ref, path)), "data", "extract") == (None, None)


def test_why_goes_on_after_a_path_that_is_not_there(run: Run, ref: str) -> None:
    status, out, err = run("why", "--json", ref, "/gone", "/epoch")
    assert (status, json.loads(out)["path"]) == (3, "/epoch")
    assert "no layer ever had '/gone'" in err


SPARSE_SIZE = 70_000
SPARSE = bytearray(SPARSE_SIZE)
SPARSE[4096:4200] = b"a" * 104
SPARSE[60_000:60_100] = b"z" * 100
FILES = {
    "plain file": b"some bytes\n" * 100,
    "it's": b"quoted\n",
    "empty": b"",
    "linked": b"some bytes\n" * 100,
    "sparse": bytes(SPARSE),
    "hole": bytes(5000),
}


def awkward_layers() -> list[bytes]:
    """Files that are not of one piece, and one with a name for another in a later layer."""
    return [
        tarball(
            entry("plain file", FILES["plain file"]),
            entry("it's", FILES["it's"]),
            entry("empty"),
            sparse_pax_1_0("sparse", [(4096, b"a" * 104), (60_000, b"z" * 100)], SPARSE_SIZE),
            sparse_pax_1_0("hole", [], 5000),
        ),
        tarball(entry("linked", type=HARDLINK, link="plain file")),
    ]


def layout(path: Path, compression: str) -> str:
    write_layout(path, awkward_layers(), compression=compression)
    return str(path)


def oci_archive(path: Path, compression: str) -> str:
    layout(path, compression)
    archive_directory(path.with_suffix(".tar"), path, prefix="./")
    return str(path.with_suffix(".tar"))


def docker_archive(path: Path, compression: str) -> str:
    made = make_image([awkward_layers()[0], *awkward_layers()], compression=compression)
    write_docker_archive(path, [made], style="stored" if compression != "plain" else "legacy")
    return f"docker-archive:{path}"


def skopeo_dir(path: Path, compression: str) -> str:
    write_dir(path, awkward_layers(), compression=compression)
    return str(path)


@pytest.mark.parametrize("compression", ["gzip", "zstd", "plain"])
@pytest.mark.parametrize("form", [layout, oci_archive, docker_archive, skopeo_dir])
def test_the_shell_line_extracts_exactly_the_bytes(
    run: Run, tmp_path: Path, form: Callable[[Path, str], str], compression: str
) -> None:
    ref = form(tmp_path / "it's an image", compression)
    found = {row["path"][1:]: extracted(row) for row in rows(run("why", "--json", ref, *FILES))}
    assert found == FILES


def test_there_is_no_line_for_what_no_standard_tool_finds(run: Run, tmp_path: Path) -> None:
    layout(tmp_path / "x", "gzip")
    archive_directory(tmp_path / "x.tar.gz", tmp_path / "x", compression="gzip")
    row = one(run("why", "--json", str(tmp_path / "x.tar.gz"), "plain file"))
    assert row["extract"] is None
    assert b"no line of standard tools" in run("why", str(tmp_path / "x.tar.gz"), "plain file").out


# -- annotate ------------------------------------------------------------------------------------------------------


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    def become_stdin(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    return become_stdin


def test_annotate_finds_paths_in_what_scanners_write(run: Run, ref: str, say: Callable[[bytes], None]) -> None:
    lines = [
        b"/bin/tool",
        b"./bin/tool",
        b"/bin/tool: Unix.Trojan.Evil-1 FOUND",
        b"etc/motd:1:second",
        b"rule_name /root/.ssh/id_rsa",
        b"/opt/app/config",
        b"/bin/nothing: OK",
        b"",
        b"Infected files: 1",
    ]
    say(b"\n".join(lines) + b"\n")
    status, out, err = run("annotate", ref)
    assert (status, err) == (0, "")
    trojan, unknown = b"3\tvisible\tRUN update-tool\t", b"-\tunknown\t-\t"
    said = [
        trojan, trojan, trojan, trojan,
        b"2\tdeleted by 4\tCOPY id_rsa /root/.ssh/id_rsa\t",
        b"1\tdeleted by 4\tADD rootfs.tar / # base\t",
        unknown, unknown, unknown,
    ]  # fmt: skip
    assert out.splitlines() == [before + line for before, line in zip(said, lines, strict=True)]


def test_annotate_takes_off_where_the_scanner_saw_the_image(run: Run, ref: str, say: Callable[[bytes], None]) -> None:
    say(b"/mnt/bin/tool: FOUND\n/bin/tool: FOUND\n/mntbin/tool\nbin /mnt/epoch\n/mnt\n")
    found = rows(run("annotate", "--json", "--prefix", "/mnt/", ref))
    assert [row["path"] for row in found] == ["/bin/tool", None, None, "/epoch", "/"]
    assert found[0]["line"] == "/mnt/bin/tool: FOUND"


def annotated(run: Run, ref: str, *words: str) -> list[tuple[Any, ...]]:
    found = rows(run("annotate", "--json", *words, ref))
    return [picked(row, "path", "layer", "end", "end_layer") for row in found]


def test_annotate_knows_what_the_views_of_a_mount_show(run: Run, ref: str, say: Callable[[bytes], None]) -> None:
    blob = one(run("why", "--json", ref, "/root/.ssh/id_rsa"))["digest"].removeprefix("sha256:")
    seen = {
        "deleted/bin/tool": ("/bin/tool", 1, "replaced", 3),
        "deleted/L03/bin/tool: evil FOUND": ("/bin/tool", 1, "replaced", 3),
        "deleted/L04/root/.ssh/id_rsa": ("/root/.ssh/id_rsa", 2, "whiteout", 4),
        "deleted/opt/app/data": ("/opt/app/data", 1, "opaque", 4),
        "deleted/bin": ("/bin", 1, "visible", None),
        "upto/02/bin/tool": ("/bin/tool", 1, "replaced", 3),
        "upto/03/bin/tool": ("/bin/tool", 3, "visible", None),
        "upto/04/root/.ssh/id_rsa": None,
        "layers/01-d99ac79e219b/bin/tool": ("/bin/tool", 1, "replaced", 3),
        "layers/03-36cdba9c184c/etc/motd:1:second": ("/etc/motd", 3, "visible", None),
        "layers/04-c620c0cddf5a/var/log/.wh.old.log": ("/var/log/.wh.old.log", 4, "left-out", None),
        "history/bin/tool/L01-added": ("/bin/tool", 1, "replaced", 3),
        "history/bin/tool/L03-changed": ("/bin/tool", 3, "visible", None),
        "history/etc/motd/L03-overridden": ("/etc/motd", 3, "overridden", 3),
        "history/etc/motd/L03-overridden~2": None,
        "history/opt/app/data/L04-deleted": ("/opt/app/data", 1, "opaque", 4),
        "slack/05/000000007168-trailing-tar: FOUND": (None, 5, "slack", None),
        "slack/06/000000007168-trailing-tar": None,
        "raw/tars/02.tar": (None, 2, "raw", None),
        f"raw/blobs/sha256/{blob}": (None, 2, "raw", None),
        "reports/audit.txt": None,
        "deleted": None,
    }
    expected = [found or (None, None, "unknown", None) for found in seen.values()]
    lines = b"".join(b"rule /mnt/.ocifs/%s\n" % name.encode() for name in seen)

    say(lines)
    assert annotated(run, ref, "--prefix", "/mnt") == expected
    say(b"".join(b"/mnt/.ocifs/%s\n" % name.encode() for name in seen if name.startswith("deleted/")))
    assert annotated(run, ref, "--prefix", "/mnt/.ocifs/deleted") == expected[:5]
    say(b"./.ocifs/deleted/bin/tool\n/.ocifs/deleted/bin/tool\nrule ./.ocifs/deleted/bin/tool\n")
    assert annotated(run, ref) == [expected[0]] * 3


def test_annotate_knows_what_find_and_grep_print(run: Run, ref: str, say: Callable[[bytes], None]) -> None:
    say(run("find", "--deleted", ref, "-type", "f").out)
    assert annotated(run, ref) == [
        ("/bin/tool", 1, "replaced", 3),
        ("/etc/motd", 3, "visible", None),
        ("/opt/app/config", 1, "opaque", 4),
        ("/opt/app/data", 1, "opaque", 4),
        ("/root/.ssh/id_rsa", 2, "whiteout", 4),
        ("/tmp/build.log", 2, "whiteout", 4),  # noqa: S108 (a path in the image)
        ("/var/log/old.log", 1, "whiteout", 4),
    ]
    say(run("grep", "--all", "--slack", ref, "evil|behind").out)
    assert annotated(run, ref) == [("/bin/tool", 3, "visible", None), (None, 5, "slack", None)]


def test_annotate_finds_names_below_here_in_the_middle_of_a_line(
    run: Run, ref: str, say: Callable[[bytes], None]
) -> None:
    say(b"evil ./bin/tool\n0123abcd  ./root/.ssh/id_rsa\nfoo.bar/bin/tool\n")
    assert annotated(run, ref) == [
        ("/bin/tool", 3, "visible", None),
        ("/root/.ssh/id_rsa", 2, "whiteout", 4),
        (None, None, "unknown", None),
    ]


def test_annotate_by_nul_takes_names_of_any_bytes(run: Run, ref: str, say: Callable[[bytes], None]) -> None:
    say(b"".join(name + b"\0" for name in ODD_NAMES))
    status, out, _ = run("annotate", "-0", ref)
    assert status == 0
    assert out == b"".join(b"5\tvisible\tCOPY odd /\t" + name + b"\0" for name in ODD_NAMES)


def test_annotate_takes_the_longest_path_there_is(run: Run, tmp_path: Path, say: Callable[[bytes], None]) -> None:
    write_layout(tmp_path / "x", [tarball(entry("a", b"1"), entry("a b", b"2"), entry("a b:c", b"3"))])
    say(b"/a b:c: FOUND\n/a b: FOUND\n/a bc\n")
    assert [row["path"] for row in rows(run("annotate", "--json", str(tmp_path / "x")))] == ["/a b:c", "/a b", "/a"]


def test_annotate_passes_on_a_line_without_end(run: Run, ref: str, say: Callable[[bytes], None]) -> None:
    say(b"x" * 3_000_000 + b"\n/epoch")
    out = run("annotate", ref).out
    assert out.count(b"x") == 3_000_000
    assert out.endswith(b"5\tvisible\tCOPY odd /\t/epoch\n")


def test_a_file_of_nothing_but_holes_is_hashed_only_up_to_a_size(run: Run, tmp_path: Path) -> None:
    layer = tarball(sparse_pax_1_0("huge", [(1 << 60, b"end")], (1 << 60) + 3))
    write_layout(tmp_path / "x", [layer])
    status, out, _ = run("log", str(tmp_path / "x"), "huge")
    assert (status, b"holes of more than 4 GiB" in out) == (4, True)
    assert run("receipt", str(tmp_path / "x"), "huge").status == 4
