"""The evidence log: what commands and mounts write into it, and that nothing in it can be altered unseen."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from typing import TYPE_CHECKING, Any

import pytest

from ocifs.errors import BusyError, DamagedError, MachineError
from ocifs.evidence import FIRST, About, EvidenceLog, verify
from tests.support.command import Run, runner
from tests.support.evidence_image import evidence_image, write_evidence
from tests.support.mounting import agent, mounted

if TYPE_CHECKING:
    from pathlib import Path

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
        log.read(2, 512, 100)
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
            log.read(1, at, 100)
        log.read(1, 1000, 5)
        log.read(2, 1005, 5)
        log.read(2, 1010, 5, "span 3 cannot be read")
        log.read(2, 1015, 5)
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
        log.read(2, 512, 100)
        log.append("blob")
    head = verify(path).head
    assert ocifs("evidence", "verify", "--head", head, str(path)).status == 0
    alter, problem = ALTERATIONS[how]
    path.write_bytes(b"\n".join(alter(path.read_bytes().splitlines())) + b"\n")
    done = ocifs("evidence", "verify", "--head", head, str(path))
    assert done.status == 1
    assert problem in done.err


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
        log.read(1, 0, 5, "bad")
    assert path.read_bytes() == whole
    monkeypatch.undo()
    log.close()
    assert verify(path).problems == ()


def test_a_command_says_what_it_read(tmp_path: Path, ocifs: Run) -> None:
    reference, path = write_evidence(tmp_path / "image"), tmp_path / "log"
    words = ("--evidence-log", str(path), "--case", "7", "--examiner", "ml")
    assert ocifs("cat", *words, reference, "/etc/passwd").out == PASSWD
    assert ocifs("ls", *words, reference, "/").status == 0
    made = evidence_image()
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
