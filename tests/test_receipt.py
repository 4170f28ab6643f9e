"""Receipts, and the script of thirty lines that checks them without ocifs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.command import Run, runner
from tests.support.damage import flip
from tests.support.evidence_image import SECRET, TOOL, write_evidence
from tests.support.layout import blob_path, make_image, sha256, write_docker_archive, write_layout
from tests.support.tarball import HARDLINK, entry, sparse_pax_1_0, tarball

if TYPE_CHECKING:
    from collections.abc import Callable

CHECK = Path(__file__).resolve().parent.parent / "scripts" / "check-receipt"


@pytest.fixture
def run(capfdbinary: pytest.CaptureFixture[bytes]) -> Run:
    return runner(capfdbinary)


def made(run: Run, ref: str, path: str) -> dict[str, Any]:
    status, out, err = run("receipt", ref, path)
    assert (status, err) == (0, "")
    document: dict[str, Any] = json.loads(out)
    return document


def checked(tmp_path: Path, receipt: dict[str, Any], blob: Path) -> tuple[int, list[str]]:
    """Run the script as a user does, a zstd layer through zstd. Gives its status and its lines."""
    file = tmp_path / "the receipt"
    file.write_text(json.dumps(receipt))
    words = [sys.executable, "-I", str(CHECK), str(file)]
    if blob.read_bytes()[:4] == b"\x28\xb5\x2f\xfd":
        tar = subprocess.run(["zstd", "-dcq", str(blob)], capture_output=True, timeout=20, check=False).stdout
        done = subprocess.run([*words, "-"], input=tar, capture_output=True, timeout=20, check=False)
    else:
        done = subprocess.run([*words, str(blob)], capture_output=True, timeout=20, check=False)
    assert b"Traceback" not in done.stderr, done.stderr
    return done.returncode, (done.stdout + done.stderr).decode().splitlines()


def blob_of(layout: Path, receipt: dict[str, Any]) -> Path:
    return blob_path(layout, receipt["layer"]["digest"])


def test_the_script_has_at_most_thirty_lines_and_needs_only_the_standard_library() -> None:
    assert len(CHECK.read_text().splitlines()) <= 30
    imported = next(line for line in CHECK.read_text().splitlines() if line.startswith("import "))
    assert set(imported.removeprefix("import ").split(", ")) <= sys.stdlib_module_names


@pytest.mark.parametrize("compression", ["gzip", "zstd", "plain"])
def test_a_receipt_holds_for_the_blob_and_not_for_one_that_was_changed(
    run: Run, tmp_path: Path, compression: str
) -> None:
    receipt = made(run, write_evidence(tmp_path / "x", compression), "/root/.ssh/id_rsa")
    assert (receipt["path"], receipt["size"], receipt["sha256"]) == (
        "/root/.ssh/id_rsa", len(SECRET), sha256(SECRET)[7:],
    )  # fmt: skip
    assert receipt["headers"] == [
        {"header_offset": 512, "data_offset": 1024, "name": "root/.ssh/id_rsa", "hard_link_to": None}
    ]
    assert receipt["extents"] == [{"file_offset": 0, "layer_offset": 1024, "size": len(SECRET)}]
    blob = blob_of(tmp_path / "x", receipt)
    status, lines = checked(tmp_path, receipt, blob)
    assert (status, lines[-1]) == (0, f"ok: 'data of root/.ssh/id_rsa {sha256(SECRET)}'")
    assert len(lines) == (10 if compression == "zstd" else 11)
    assert all(line.startswith("ok: ") for line in lines)
    if compression != "zstd":  # what zstd says of it is zstd's
        flip(blob, 40)
        status, lines = checked(tmp_path, receipt, blob)
        assert (status, lines[-1]) == (1, f"WRONG: 'blob {receipt['layer']['digest']}'")


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda receipt: receipt.update(sha256="0" * 64), "data of bin/tool"),
        (lambda receipt: receipt.update(size=21), "20 bytes"),
        (lambda receipt: receipt["headers"][0].update(name="bin/other"), "entry bin/other"),
        (lambda receipt: receipt["headers"][0].update(data_offset=0), "entry bin/twin"),
        (lambda receipt: receipt["headers"][0].update(hard_link_to="bin/sh"), "is what it should be"),
        (lambda receipt: receipt["layer"].update(number=2), "names the layer"),
        (lambda receipt: receipt["layer"].update(diff_id=sha256(b"")), "names the diff ID"),
        (lambda receipt: receipt["config"].update(digest=sha256(b"")), "names the config"),
        (lambda receipt: receipt["config"].update(raw="e30K"), "config sha256:"),
        (lambda receipt: receipt["manifest"].update(raw="e30K"), "manifest sha256:"),
    ],
)
def test_a_receipt_that_was_changed_does_not_hold(
    run: Run, tmp_path: Path, change: Callable[[dict[str, Any]], Any], wrong: str
) -> None:
    receipt = made(run, write_evidence(tmp_path / "x"), "/bin/twin")
    assert [header["name"] for header in receipt["headers"]] == ["bin/twin", "bin/tool"]
    assert receipt["sha256"] == sha256(TOOL)[7:]
    blob = blob_of(tmp_path / "x", receipt)
    change(receipt)
    status, lines = checked(tmp_path, receipt, blob)
    assert (status, lines[-1].startswith("WRONG: "), wrong in lines[-1]) == (1, True, True), lines


def test_receipts_of_files_with_holes_odd_names_and_names_in_another_layer(run: Run, tmp_path: Path) -> None:
    long = "d/" * 80 + "end"
    layers = [
        tarball(
            sparse_pax_1_0("sparse", [(4096, b"a" * 104), (60_000, b"z" * 100)], 70_000),
            entry(b"odd\n\xff|", b"odd\n"),
            entry(long, b"long\n"),
            entry("./dotted", b"dotted\n"),
            entry("empty"),
        ),
        tarball(entry("later", type=HARDLINK, link="dotted")),
    ]
    digests = write_layout(tmp_path / "x", layers)
    blob = blob_path(tmp_path / "x", digests["layers"][0])
    receipt: dict[str, Any] = {}
    for path in ("sparse", "odd\n\udcff|", long, "dotted", "empty", "later"):
        receipt = made(run, str(tmp_path / "x"), path)
        status, lines = checked(tmp_path, receipt, blob)
        assert status == 0, (path, lines)
    assert [header["name"] for header in receipt["headers"]] == ["./dotted"]
    assert (receipt["path"], receipt["layer"]["number"]) == ("/later", 1)


def test_a_receipt_of_a_docker_archive_begins_at_the_image_id(run: Run, tmp_path: Path) -> None:
    image = make_image([tarball(entry("a", b"a\n"))])
    write_docker_archive(tmp_path / "x.tar", [image])
    receipt = made(run, str(tmp_path / "x.tar"), "a")
    assert (receipt["manifest"], receipt["layer"]["digest"]) == (None, None)
    assert receipt["config"]["digest"] == image.config_digest
    (tmp_path / "layer.tar").write_bytes(image.tars[0])
    assert checked(tmp_path, receipt, tmp_path / "layer.tar")[0] == 0


def test_there_is_no_receipt_of_what_is_no_file(run: Run, tmp_path: Path) -> None:
    ref = write_evidence(tmp_path / "x")
    assert run("receipt", ref, "/bin") == (2, b"", "ocifs: '/bin' is not a file: receipts are of files\n")
    assert run("receipt", ref, "/sh").status == 2
    assert made(run, ref, "/bin/twin")["path"] == "/bin/twin"


def wrong_layer(path: Path) -> str:
    """An image whose first layer is another one of the same size than its manifest names."""
    tar = tarball(entry("a", b"good"))
    digests = write_layout(path, [tar], compression="plain")
    blob_path(path, digests["layers"][0]).write_bytes(tarball(entry("a", b"evil")))
    return "is not what the image says"


def wrong_config(path: Path) -> str:
    digests = write_layout(path, [tarball(entry("a", b"good"))])
    config = blob_path(path, digests["config"])
    config.write_bytes(config.read_bytes().replace(b"layer 1", b"layer 7"))
    return "configuration is not what its digest says"


@pytest.mark.parametrize("damage", [wrong_layer, wrong_config])
def test_there_is_no_receipt_from_an_image_that_is_not_what_its_digests_say(
    run: Run, tmp_path: Path, damage: Callable[[Path], str]
) -> None:
    message = damage(tmp_path / "x")
    status, out, err = run("receipt", str(tmp_path / "x"), "a")
    assert (status, out) == (4, b"")
    assert message in err
