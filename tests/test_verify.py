"""``verify``: what is not what its digests say is found, and said where; and files against a list of hashes."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from ocifs.compression import Compression
from tests.support.command import Run, runner
from tests.support.damage import flip
from tests.support.evidence_image import TOOL, TROJAN, write_evidence
from tests.support.layout import blob_path, make_image, sha256, write_docker_archive, write_layout
from tests.support.tarball import SYMLINK, entry, tarball

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def run(capfdbinary: pytest.CaptureFixture[bytes]) -> Run:
    return runner(capfdbinary)


def verified(run: Run, ref: str, *words: str, status: int = 0) -> list[dict[str, Any]]:
    found, out, err = run("verify", "--json", *words, ref)
    assert found == status, err
    return [json.loads(line) for line in out.splitlines()]


def findings(rows: list[dict[str, Any]]) -> list[tuple[int | None, str, str]]:
    return [(row["layer"], finding["what"], finding["message"]) for row in rows for finding in row["findings"]]


@pytest.mark.parametrize("compression", ["gzip", "zstd", "plain"])
def test_a_whole_image_is_whole_with_and_without_an_index(run: Run, tmp_path: Path, compression: str) -> None:
    ref = write_evidence(tmp_path / "x", compression)
    for indexed in (False, True):
        rows = verified(run, ref)
        assert [(row["what"], row["layer"], row["ok"], row["findings"]) for row in rows] == [
            ("documents", None, True, []),
            *(("layer", number, True, []) for number in range(1, 6)),
        ]
        assert [row["index_checked"] for row in rows[1:]] == [indexed] * 5
        assert [row["uncompressed_size"] for row in rows[1:]] == [12800, 3584, 4608, 4608, 9216]
        assert run("index", ref).status == 0


def big_layer() -> bytes:
    """A plain layer of several spans of 256 KiB: two files, and behind the end zeros that are nobody's."""
    return tarball(entry("first", b"1" * 200_000), entry("second", b"2" * 300_000)) + bytes(400_000)


def test_damage_is_located_in_blob_layer_and_files(run: Run, tmp_path: Path) -> None:
    digests = write_layout(tmp_path / "x", [tarball(entry("a")), big_layer()], compression="plain")
    blob = blob_path(tmp_path / "x", digests["layers"][1])
    assert run("index", str(tmp_path / "x")).status == 0
    for at in (300_000, 700_000):
        flip(blob, at)
    rows = verified(run, str(tmp_path / "x"), status=1)
    assert [row["ok"] for row in rows] == [True, True, False]
    digest, span, slack = rows[2]["findings"]
    assert (digest["what"], digest["message"]) == (
        "digest",
        f"{blob} has the wrong digest: expected {digests['layers'][1]}, found {sha256(blob.read_bytes())}",
    )
    named = ("what", "blob_offset", "blob_size", "layer_offset", "layer_size", "entry_count", "entries")
    assert [span[name] for name in named] == ["span", 262144, 262144, 262144, 262144, 1, ["second"]]
    assert [slack[name] for name in named] == ["span", 524288, 262144, 524288, 262144, 0, []]
    text = run("verify", str(tmp_path / "x")).out.decode()
    assert "(layer offset 262144, 262144 bytes) has data of second\n" in text
    assert "(layer offset 524288, 262144 bytes) no file has data there\n" in text


def test_without_an_index_damage_is_found_all_the_same(run: Run, tmp_path: Path) -> None:
    for compression in ("gzip", "zstd", "plain"):
        where = tmp_path / compression
        digests = write_layout(where, [tarball(entry("a", b"some data" * 99))], compression=compression)
        flip(blob_path(where, digests["layers"][0]), 20)
        found = findings(verified(run, str(where), status=1))
        assert found[0][:2] == (1, "digest")
        assert found[1][1] in {"data", "diff-id"}


def test_a_wrong_size_is_found_also_where_the_rest_is_right(run: Run, tmp_path: Path) -> None:
    digests = write_layout(tmp_path / "x", [tarball(entry("a", b"x" * 5000))])
    blob = blob_path(tmp_path / "x", digests["layers"][0])
    whole = blob.read_bytes()
    assert run("index", str(tmp_path / "x")).status == 0
    for data, kinds in ((whole + b"\0", ["size", "digest"]), (whole[:-1], ["size", "digest", "span"])):
        blob.write_bytes(data)
        found = findings(verified(run, str(tmp_path / "x"), status=1))
        assert [what for _, what, _ in found] == kinds
        assert f"expected {len(whole)} bytes, found {len(data)}" in found[0][2]


def test_a_missing_layer_does_not_hide_the_others(run: Run, tmp_path: Path) -> None:
    digests = write_layout(tmp_path / "x", [tarball(entry("a")), tarball(entry("b"))])
    blob_path(tmp_path / "x", digests["layers"][0]).unlink()
    rows = verified(run, str(tmp_path / "x"), status=1)
    assert [(row["layer"], row["ok"]) for row in rows] == [(None, True), (1, False), (2, True)]
    assert rows[1]["findings"][0]["what"] == "missing"


def test_a_config_that_was_changed_is_found(run: Run, tmp_path: Path) -> None:
    digests = write_layout(tmp_path / "x", [tarball(entry("a"))])
    config = blob_path(tmp_path / "x", digests["config"])
    config.write_bytes(config.read_bytes().replace(b"layer 1", b"layer 9"))
    found = findings(verified(run, str(tmp_path / "x"), status=1))
    assert [(layer, what) for layer, what, _ in found] == [(None, "document")]
    assert digests["config"] in found[0][2]


def test_a_manifest_that_no_longer_parses_is_a_finding(run: Run, tmp_path: Path) -> None:
    digests = write_layout(tmp_path / "x", [tarball(entry("a"))])
    manifest = blob_path(tmp_path / "x", digests["manifest"])
    manifest.write_bytes(b"[" + manifest.read_bytes()[1:])
    found = findings(verified(run, str(tmp_path / "x"), status=1))
    assert [what for _, what, _ in found] == ["document"]


def test_a_wrong_diff_id_is_found(run: Run, tmp_path: Path) -> None:
    def lie(config: dict[str, Any]) -> None:
        config["rootfs"]["diff_ids"][0] = sha256(b"something else")

    write_layout(tmp_path / "x", [tarball(entry("a"))], change_config=lie)
    found = findings(verified(run, str(tmp_path / "x"), status=1))
    assert [what for _, what, _ in found] == ["diff-id"]
    assert sha256(b"something else") in found[0][2]


def test_a_docker_archive_is_checked_against_its_diff_ids(run: Run, tmp_path: Path) -> None:
    archive = tmp_path / "x.tar"
    write_docker_archive(archive, [make_image([tarball(entry("a", b"findme" * 50))])])
    assert [row["ok"] for row in verified(run, str(archive))] == [True, True]
    assert run("index", str(archive)).status == 0
    assert [row["index_checked"] for row in verified(run, str(archive))] == [None, True]
    flip(archive, archive.read_bytes().index(b"findme"))
    assert [what for _, what, _ in findings(verified(run, str(archive), status=1))] == ["diff-id"]


def test_an_index_that_disagrees_with_its_blob_is_found_and_taken_away(run: Run, tmp_path: Path) -> None:
    """The index of one image is put in the place of the other's, changed so that it claims to be of that blob."""
    digests = write_layout(tmp_path / "x", [tarball(entry("a", b"good" * 100))], compression="plain")
    other = write_layout(tmp_path / "y", [tarball(entry("a", b"evil" * 100))], compression="plain")
    for name in "xy":
        assert run("index", str(tmp_path / name)).status == 0
    (cache,) = tmp_path.glob("ocifs-cache/layers/*" + digests["layers"][0][7:])
    (evil,) = tmp_path.glob("ocifs-cache/layers/*" + other["layers"][0][7:])
    raw = evil.read_bytes()
    cache.write_bytes(forged(raw, other["layers"][0], digests["layers"][0]))
    found = findings(verified(run, str(tmp_path / "x"), status=1))
    assert [what for _, what, _ in found] == ["cache"]
    assert "the cached index disagrees with the layer" in found[0][2]
    assert verified(run, str(tmp_path / "x"))[1]["index_checked"] is False


def forged(index: bytes, digest: str, other: str) -> bytes:
    """A layer index that says it is of another plain blob, all its checksums right."""
    meta_offset, meta_size = (int.from_bytes(index[at : at + 8], "little") for at in (24, 32))
    meta = index[meta_offset : meta_offset + meta_size].replace(digest.encode(), other.encode())
    head = index[:40] + hashlib.sha256(meta).digest() + index[72:216]
    body = index[248:meta_offset] + meta + index[meta_offset + meta_size :]
    return head + hashlib.sha256(head).digest() + body


def test_a_damaged_copy_in_the_cache_is_found_and_taken_away(run: Run, tmp_path: Path) -> None:
    import zstandard  # noqa: PLC0415 (only here)

    data = tarball(entry("a", b"x" * (18 << 20)))  # one frame too large to be a span: a re-framed copy is made
    image = make_image([data], compression="plain")
    frame = zstandard.ZstdCompressor(level=1).compress(data)
    digests = write_layout(tmp_path / "x", [data], compression="zstd")
    assert (image.diff_ids, len(frame) > 0) == (digests["diff_ids"], True)
    assert run("index", str(tmp_path / "x")).status == 0
    (copy,) = tmp_path.glob("ocifs-cache/reframed/*")
    assert all(row["ok"] for row in verified(run, str(tmp_path / "x")))
    flip(copy, 100)
    found = findings(verified(run, str(tmp_path / "x"), status=1))
    assert [what for _, what, _ in found] == ["cache"]
    assert list(tmp_path.glob("ocifs-cache/reframed/*")) == []


def test_something_that_is_no_layer_is_a_finding(run: Run, tmp_path: Path) -> None:
    write_layout(tmp_path / "x", [b"this is no tar at all"], compression="plain")
    found = findings(verified(run, str(tmp_path / "x"), status=1))
    assert [what for _, what, _ in found] == ["data"]
    assert f"({Compression.UNKNOWN.value})" in found[0][2]


def test_of_an_artifact_the_stored_bytes_are_checked(run: Run, tmp_path: Path) -> None:
    def become_artifact(manifest: dict[str, Any]) -> None:
        manifest["artifactType"] = "application/vnd.example.notes"
        manifest["config"]["mediaType"] = "application/vnd.oci.empty.v1+json"
        manifest["layers"][0]["mediaType"] = "text/plain"

    digests = write_layout(tmp_path / "x", [b"just a note"], compression="plain", change_manifest=become_artifact)
    assert [row["ok"] for row in verified(run, str(tmp_path / "x"))] == [True, True]
    flip(blob_path(tmp_path / "x", digests["layers"][0]), 5)
    found = findings(verified(run, str(tmp_path / "x"), status=1))
    assert [(layer, what) for layer, what, _ in found] == [(1, "digest")]


def test_what_was_verified_is_in_the_evidence_log(run: Run, tmp_path: Path) -> None:
    digests = write_layout(tmp_path / "x", [tarball(entry("a")), tarball(entry("b"))], compression="plain")
    flip(blob_path(tmp_path / "x", digests["layers"][1]), 5)
    log = tmp_path / "log"
    verified(run, str(tmp_path / "x"), "--evidence-log", str(log), status=1)
    blobs = [line for line in map(json.loads, log.read_text().splitlines()) if line["event"] == "blob"]
    assert [(line["which"], line["digest"], line["verified"]) for line in blobs] == [
        ("documents", digests["manifest"], True),
        ("1", digests["layers"][0], True),
        ("2", digests["layers"][1], False),
    ]


# -- the baseline --------------------------------------------------------------------------------------------------


@pytest.fixture
def listed(tmp_path: Path) -> str:
    layers = [
        tarball(
            entry("bin/tool", TOOL),
            entry("empty"),
            entry(b"new\nline\\", b"odd\n"),
            entry("bin/gone", b"gone\n"),
            entry("etc/passwd", b"root\n"),
            entry("sh", type=SYMLINK, link="bin/tool"),
        ),
        tarball(entry("bin/.wh.gone")),
    ]
    write_layout(tmp_path / "x", layers)
    return str(tmp_path / "x")


def unpacked(run: Run, ref: str, where: Path) -> None:
    assert run("cp", ref, "/", str(where)).status == 0


@pytest.mark.parametrize("words", [["sha256sum"], ["md5sum"], ["sha1sum", "--tag"], ["hashdeep", "-l"]])
def test_a_list_that_the_tools_made_of_the_unpacked_image_fits(
    run: Run, tmp_path: Path, listed: str, words: list[str]
) -> None:
    if shutil.which(words[0]) is None:
        pytest.skip(f"{words[0]} is not installed")
    where = tmp_path / "tree"
    unpacked(run, listed, where)
    names = ["./bin/tool", "./empty", "./new\nline\\", "./sh"]
    if words[0] == "hashdeep":
        names.remove("./new\nline\\")  # it has no way to write such a name
    done = subprocess.run([*words, *names], cwd=where, capture_output=True, timeout=20, check=True)
    (tmp_path / "list").write_bytes(done.stdout)
    row = verified(run, listed, "--baseline", str(tmp_path / "list"))[-1]
    assert (row["what"], row["ok"], row["files_ok"], row["files_unlisted"]) == (
        "baseline", True, len(names), 4 - len(names) + 1,
    )  # fmt: skip


def test_what_differs_from_the_list_is_wrong_and_said_why(run: Run, tmp_path: Path, listed: str) -> None:
    digest = hashlib.sha256(TROJAN).hexdigest()
    lines = [f"{digest}  /mnt/{name}" for name in ("bin/tool", "bin/gone", "bin", "nowhere", "sh")]
    lines.append(f"{hashlib.sha256(b'').hexdigest()} */mnt/empty")
    (tmp_path / "list").write_text("\n".join(lines) + "\n")
    row = verified(run, listed, "--baseline", str(tmp_path / "list"), "--prefix", "/mnt", status=1)[-1]
    assert sorted(finding["message"] for finding in row["findings"]) == [
        "'/bin' is not a file",
        "'/bin/gone' is not in the image: layer 2 deleted it",
        f"'/bin/tool' has another hash: expected sha256:{digest}, found {sha256(TOOL)}",
        "'/nowhere' is not in the image",
        f"'/sh' has another hash: expected sha256:{digest}, found {sha256(TOOL)}",
    ]
    assert (row["files_ok"], row["files_unlisted"]) == (1, 2)


@pytest.mark.parametrize(
    "text",
    [
        "not a hash  file\n",
        "",
        "# nothing\n",
        f"{'0' * 64}  a\n{'0' * 32}  b\n",
        "%%%% HASHDEEP-1.0\n%%%% size,md5,filename\n3,xyz,./a\n",
        f"{'0' * 63}g  a\n",
    ],
)
def test_a_list_that_is_none_is_refused(run: Run, tmp_path: Path, listed: str, text: str) -> None:
    (tmp_path / "list").write_text(text)
    status, out, err = run("verify", "--baseline", str(tmp_path / "list"), listed)
    assert (status, out) == (2, b""), err
    assert str(tmp_path / "list") in err


def test_paths_of_the_list_lie_below_the_prefix(run: Run, tmp_path: Path, listed: str) -> None:
    (tmp_path / "list").write_text(f"{'0' * 64}  /mntx/a\n")
    status, _, err = run("verify", "--baseline", str(tmp_path / "list"), "--prefix", "/mnt/", listed)
    assert (status, "does not begin with '/mnt'" in err) == (2, True)
    assert run("verify", "--prefix", "/mnt/", listed).status == 2
    assert run("verify", "--baseline", str(tmp_path / "none"), listed).status == 3
