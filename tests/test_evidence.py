"""The evidence log: what commands and mounts write into it, and that nothing in it can be altered unseen."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from ocifs.bundle.state import FORMAT, State, create
from ocifs.errors import BusyError, DamagedError, MachineError
from ocifs.evidence import FIRST, About, EvidenceLog, verify
from ocifs.image import ImageOptions
from ocifs.spans import SpanReader
from tests.support.command import Run, runner
from tests.support.evidence_image import evidence_image, write_evidence
from tests.support.mounting import agent, mounted
from tests.support.spanned import layer

if TYPE_CHECKING:
    from pathlib import Path

DIFF_ID = "sha256:" + "d" * 64
PASSWD = b"root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000::/:/bin/sh\n"


@pytest.fixture
def ocifs(capfdbinary: pytest.CaptureFixture[bytes]) -> Run:
    return runner(capfdbinary)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def told(path: Path, *fields: str) -> list[tuple[Any, ...]]:
    return [tuple(line.get(field) for field in fields) for line in lines(path)]


def test_each_line_holds_the_hash_of_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with EvidenceLog(path, About("2024-17", "M. Lang", "disk 3")) as log:
        log.append("opened", reference="oci:x")
        log.read(2, DIFF_ID, 512, 100)
    raw = path.read_bytes().splitlines()
    assert [line["previous"] for line in lines(path)] == [
        FIRST,
        hashlib.sha256(raw[0]).hexdigest(),
        hashlib.sha256(raw[1]).hexdigest(),
    ]
    assert told(path, "number", "case", "examiner", "item", "event") == [
        (1, "2024-17", "M. Lang", "disk 3", "opened"),
        (2, "2024-17", "M. Lang", "disk 3", "read"),
        (3, "2024-17", "M. Lang", "disk 3", "closed"),
    ]
    assert told(path, "layer", "layer_offset", "size", "verified")[1] == (2, 512, 100, True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert verify(path) == (3, hashlib.sha256(raw[2]).hexdigest(), ())


def test_a_log_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for _ in range(3):
        with EvidenceLog(path) as log:
            log.append("opened")
    assert told(path, "number", "event") == [(n, "opened" if n % 2 else "closed") for n in range(1, 7)]
    assert verify(path).problems == ()


def test_ranges_that_follow_upon_one_another_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with EvidenceLog(path) as log:
        for at in range(0, 400, 100):
            log.read(1, DIFF_ID, at, 100)
        log.read(1, DIFF_ID, 1000, 5)
        log.read(2, DIFF_ID, 1005, 5)
        log.read(2, DIFF_ID, 1010, 5, "span 3 cannot be read")
        log.read(2, DIFF_ID, 1015, 5)
    assert told(path, "layer", "layer_offset", "size", "verified", "problem")[:-1] == [
        (1, 0, 400, True, None),
        (1, 1000, 5, True, None),
        (2, 1005, 5, True, None),
        (2, 1010, 5, False, "span 3 cannot be read"),
        (2, 1015, 5, True, None),
    ]


ALTERATIONS: dict[str, tuple[Any, str]] = {
    "altered": (lambda raw: [raw[0], raw[1].replace(b'"size":100', b'"size":101'), *raw[2:]], "line 3 does not follow"),
    "left out": (lambda raw: [raw[0], *raw[2:]], "line 2 does not follow upon line 1"),
    "put in": (lambda raw: [*raw[:2], raw[1], *raw[2:]], "line 3 does not follow"),
    "exchanged": (lambda raw: [raw[1], raw[0], *raw[2:]], "line 1 does not follow"),
    "no JSON": (lambda raw: [raw[0], b"{", *raw[2:]], "line 2 is no line of an evidence log"),
    "cut off": (lambda raw: raw[:-1], "no line has the SHA-256"),
}


@pytest.mark.parametrize("how", ALTERATIONS)
def test_what_was_altered_is_found(how: str, tmp_path: Path, ocifs: Run) -> None:
    path = tmp_path / "log"
    with EvidenceLog(path) as log:
        log.append("opened", reference="oci:x")
        log.read(2, DIFF_ID, 512, 100)
        log.append("blob")
    head = verify(path).head
    assert ocifs("evidence", "verify", "--head", head, str(path)).status == 0
    alter, problem = ALTERATIONS[how]
    path.write_bytes(b"\n".join(alter(path.read_bytes().splitlines())) + b"\n")
    done = ocifs("evidence", "verify", "--head", head, str(path))
    assert done.status == 1
    assert problem in done.err


def test_a_line_that_is_left_out_is_said_once(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with EvidenceLog(path) as log:
        for number in range(6):
            log.append("opened", reference=f"oci:{number}")
    raw = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*raw[:2], *raw[3:]]))
    assert verify(path).problems == (
        "line 3 does not follow upon line 2 as it is now",
        "line 3 calls itself number 4 where 3 should follow",
    )


def test_the_same_ranges_of_layers_of_two_images_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with EvidenceLog(path) as log:
        log.read(1, "sha256:aa", 0, 5)
        log.read(1, "sha256:bb", 5, 5)
    assert told(path, "diff_id", "layer_offset", "size")[:-1] == [("sha256:aa", 0, 5), ("sha256:bb", 5, 5)]


def test_a_line_of_a_log_cut_in_the_middle_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with EvidenceLog(path):
        pass
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedError, match="does not end with a line"):
        EvidenceLog(path)
    assert verify(path).problems == ("line 1 has no end",)


def test_two_writers_at_once_are_refused(tmp_path: Path) -> None:
    with EvidenceLog(tmp_path / "log"), pytest.raises(BusyError, match="another process"):
        EvidenceLog(tmp_path / "log")


def test_a_log_that_cannot_be_written_stops_the_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    log = EvidenceLog(path)
    log.append("opened")
    whole = path.read_bytes()
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:10]))
    with pytest.raises(MachineError, match="cannot be written: No space left"):
        log.read(1, DIFF_ID, 0, 5, "bad")
    assert path.read_bytes() == whole
    monkeypatch.undo()
    log.close()
    assert verify(path).problems == ()


def full(_: int, __: bytes) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_was_read_before_the_disk_was_full_is_written_down_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log"
    with EvidenceLog(path) as log:
        log.read(1, DIFF_ID, 0, 5)
        monkeypatch.setattr(os, "write", full)
        for _ in range(2):
            with pytest.raises(MachineError, match="cannot be written: No space left"):
                log.read(1, DIFF_ID, 512, 5)
        monkeypatch.undo()
        log.read(1, DIFF_ID, 1024, 5)
    assert told(path, "event", "layer_offset") == [("read", 0), ("read", 1024), ("closed", None)]
    assert verify(path).problems == ()


def test_a_part_of_a_line_that_a_full_disk_left_is_taken_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    write = os.write
    with EvidenceLog(path) as log:
        log.append("opened")
        monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:10]))
        monkeypatch.setattr(os, "ftruncate", full)
        with pytest.raises(MachineError):
            log.append("blob")
        monkeypatch.undo()
    assert told(path, "event") == [("opened",), ("closed",)]
    assert verify(path).problems == ()


def test_a_line_whose_writing_was_interrupted_is_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    write = os.write

    def interrupted(fd: int, data: bytes) -> int:
        write(fd, data)
        raise KeyboardInterrupt

    with EvidenceLog(path) as log:
        monkeypatch.setattr(os, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            log.append("opened")
        monkeypatch.undo()
    assert told(path, "event") == [("opened",), ("closed",)]
    assert verify(path).problems == ()


def test_a_log_that_somebody_else_cuts_is_written_no_more(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = EvidenceLog(path)
    log.append("opened")
    path.write_bytes(b"")
    with pytest.raises(MachineError, match="somebody else has changed it"):
        log.append("blob")
    with pytest.raises(MachineError):
        log.close()
    assert path.read_bytes() == b""


def test_long_lines_are_written_read_and_gone_on_from(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for size in (70_000, 1_500_000):
        with EvidenceLog(path) as log:
            log.append("opened", warnings=["x" * size])
            log.leave()  # so that the long line is the last one
    with EvidenceLog(path):
        pass
    assert told(path, "number", "event") == [(1, "opened"), (2, "opened"), (3, "closed")]
    assert verify(path).problems == ()


def test_a_line_that_is_too_long_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    monkeypatch.setattr("ocifs.evidence._LONGEST", 1000)
    with EvidenceLog(path) as log, pytest.raises(MachineError, match=r"a line of [0-9]+ bytes is too long"):
        log.append("opened", warnings=["x" * 1000])
    assert told(path, "event") == [("closed",)]


@pytest.mark.parametrize("kind", ["fifo", "device", "directory"])
def test_a_log_is_a_regular_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "log"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/full")
    else:
        path.mkdir()
    with pytest.raises(MachineError, match=r"is no regular file|Is a directory"):
        EvidenceLog(path)


def test_empty_lines_at_the_end_are_not_gone_on_from(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with EvidenceLog(path):
        pass
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(DamagedError, match="does not end with a line"):
        EvidenceLog(path)
    assert verify(path).problems == ("line 2 is no line of an evidence log",)


def test_of_many_problems_some_are_described_and_all_counted(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"\n" * 1000)
    problems = verify(path).problems
    assert len(problems) == 101
    assert problems[-1] == "and 900 problems more"


def test_the_head_of_an_empty_log_and_one_in_capitals(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.touch()
    head = verify(path).head
    with EvidenceLog(path) as log:
        pass
    assert verify(path, head).problems == ()
    assert verify(path, log.head.upper()).problems == ()


def test_a_mount_that_nobody_reads_on_from_has_written_down_what_was_read(tmp_path: Path) -> None:
    path = tmp_path / "log"

    async def read_then_idle(log: EvidenceLog) -> list[tuple[Any, ...]]:
        reader = SpanReader([layer(10, 20)[1]], evidence=log)
        await reader.read(1, 0, 5)
        await reader.read(1, 5, 10)
        await trio.sleep(1.5)
        return told(path, "layer_offset", "size")

    with EvidenceLog(path) as log:
        clock = trio.testing.MockClock(autojump_threshold=0.01)
        assert trio.run(read_then_idle, log, clock=clock) == [(0, 15)]


def test_a_command_says_what_it_read(tmp_path: Path, ocifs: Run) -> None:
    reference, path = write_evidence(tmp_path / "image"), tmp_path / "log"
    words = ("--evidence-log", str(path), "--case", "7", "--examiner", "ml")
    assert ocifs("cat", *words, reference, "/etc/passwd").out == PASSWD
    assert ocifs("ls", *words, reference, "/").status == 0
    made = evidence_image()
    assert lines(path)[2]["diff_id"] == made.diff_ids[0]
    assert told(path, "event", "case", "examiner", "item", "layer", "size", "verified") == [
        ("began", "7", "ml", None, None, None, None),
        ("opened", "7", "ml", None, None, None, None),
        ("read", "7", "ml", None, 1, len(PASSWD), True),
        ("closed", "7", "ml", None, None, None, None),
        ("began", "7", "ml", None, None, None, None),
        ("opened", "7", "ml", None, None, None, None),
        ("closed", "7", "ml", None, None, None, None),
    ]
    opened = lines(path)[1]
    assert (opened["reference"], opened["manifest"]) == (reference, made.manifest_digest)
    assert [(layer["digest"], layer["diff_id"], layer["problems"]) for layer in opened["layers"]] == [
        (digest, diff_id, []) for digest, diff_id in zip(made.layer_digests, made.diff_ids, strict=True)
    ]
    assert made.tars[0][lines(path)[2]["layer_offset"] :].startswith(PASSWD)
    assert ocifs("evidence", "verify", str(path)).out.startswith(b"7 lines, head ")


def test_commands_that_read_no_data_and_blobs_are_logged_too(tmp_path: Path, ocifs: Run) -> None:
    reference, path = write_evidence(tmp_path / "image"), tmp_path / "log"
    for words in (("inspect", reference), ("layers", reference), ("blob", reference, "manifest"), ("index", reference)):
        assert ocifs(words[0], "--evidence-log", str(path), *words[1:]).status == 0
    assert [event for (event,) in told(path, "event")] == [
        *("began", "opened", "closed"),
        *("began", "opened", "closed"),
        *("began", "opened", "blob", "closed"),
        *("began", "opened", "closed"),
    ]
    assert verify(path).problems == ()


def test_a_blob_is_logged_before_its_first_byte_is_written(
    tmp_path: Path, ocifs: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, path = write_evidence(tmp_path / "image"), tmp_path / "log"
    assert ocifs("blob", "--evidence-log", str(path), reference, "2").status == 0
    digest = evidence_image().layer_digests[1]
    blobs = [line for line in told(path, "event", "layer", "digest", "verified") if line[0] == "blob"]
    assert blobs == [("blob", 2, digest, None), ("blob", 2, digest, True)]

    def gone(_: bytes) -> None:
        raise MachineError("nobody reads on")

    path.unlink()
    monkeypatch.setattr("ocifs.cli.output.write", gone)
    ocifs("blob", "--evidence-log", str(path), reference, "2")
    assert [event for (event,) in told(path, "event")] == ["began", "opened", "blob", "closed"]


def test_a_document_that_is_not_what_its_digest_says_is_not_called_verified(tmp_path: Path, ocifs: Run) -> None:
    reference, path = write_evidence(tmp_path / "image"), tmp_path / "log"
    blob = tmp_path / "image" / "blobs" / evidence_image().config_digest.replace(":", "/")
    words = ("blob", "--examine", "--evidence-log", str(path), reference, "config")
    assert ocifs(*words).status == 0
    blob.write_bytes(blob.read_bytes() + b" ")
    assert ocifs(*words).status == 0
    assert [verified for event, verified in told(path, "event", "verified") if event == "blob"] == [True, False]


def test_a_mount_goes_on_with_the_log_until_it_ends(tmp_path: Path, driver: str) -> None:
    reference, path = write_evidence(tmp_path / "image"), tmp_path / "log"
    words = ("--evidence-log", str(path), "--item", "image 1")
    with mounted(reference, tmp_path / "mnt", *words, driver=driver, cache=tmp_path / "cache") as mount:
        assert agent("read", mount.at("etc/passwd"), 0, 1000) == PASSWD.hex()
        with pytest.raises(BusyError):
            EvidenceLog(path)
    events = [event for (event,) in told(path, "event")]
    assert events[:3] == ["began", "opened", "mounted"]
    assert set(events[3:-1]) == {"read"}
    assert events[-1] == "closed"
    assert verify(path).problems == ()


def test_what_is_compared_with_a_bundle_is_logged(tmp_path: Path, ocifs: Run) -> None:
    reference, path = write_evidence(tmp_path / "image"), tmp_path / "log"
    bundle = tmp_path / "box"
    (bundle / "upper" / "etc").mkdir(parents=True)
    (bundle / "upper" / "etc" / "passwd").write_bytes(PASSWD)
    made = State(
        format=FORMAT,
        reference=reference,
        options=ImageOptions(),
        cache=str(tmp_path / "cache"),
        manifest=evidence_image().manifest_digest,
        layers=5,
        driver="fuse",
        lower=str(bundle / "lower"),
        upper=str(bundle / "upper"),
    )
    create(bundle, made)
    assert ocifs("diff-upper", "--evidence-log", str(path), str(bundle)).status == 0
    assert told(path, "event", "layer", "size") == [
        ("began", None, None),
        ("opened", None, None),
        ("read", 1, len(PASSWD)),
        ("closed", None, None),
    ]
