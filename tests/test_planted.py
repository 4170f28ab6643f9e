"""What was planted in the evidence image, and what each command says of it: the same truth everywhere.

The commands' own tests say what they do with all else; the views of a mount are in `tests.test_examined_mount`.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest

from tests.support.command import Run, runner
from tests.support.evidence_image import ODD_NAMES, SECRET, TOOL, TROJAN, write_evidence

Row = tuple[Any, ...]


@pytest.fixture(scope="module", params=["gzip", "zstd"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The image, and a cache for it that all tests of this module share."""
    where = tmp_path_factory.mktemp("planted")
    return write_evidence(where / "image", request.param), str(where / "cache")


class Asked:
    """Commands about one image, what they print picked."""

    def __init__(self, run: Run, ref: str) -> None:
        self.run = run
        self.ref = ref

    def about(self, path: str | bytes | None, fields: str, command: str, *words: str) -> list[Row]:
        """Give these fields of what ``COMMAND --json REF WORDS…`` prints about one path."""
        rows = [json.loads(line) for line in self.run(command, "--json", self.ref, *words).out.splitlines()]
        return [tuple(row.get(name) for name in fields.split()) for row in rows if row.get("path") == as_text(path)]

    def log(self, path: str | bytes) -> list[Row]:
        """Give every version of a path: layer, change, SHA-256, end, by which layer."""
        return self.about(path, "layer change sha256 end end_layer", "log", str(as_text(path)))

    def deleted(self, path: str, *words: str) -> list[Row]:
        """Give what ``deleted`` says of a path."""
        return self.about(path, "layer how end_layer recoverable sha256", "deleted", "--hash", *words)

    def differs(self, path: str, before: int, after: int) -> list[Row]:
        """Give how a path differs between two states of the image."""
        done = self.run("diff", "--json", f"{self.ref}#{before}", f"{self.ref}#{after}")
        rows = [json.loads(line) for line in done.out.splitlines()]
        return [(row["change"], row["changed"]) for row in rows if row["path"] == path]

    def events(self, path: str | bytes) -> list[Row]:
        """Give the events of a path: what, when, flags."""
        events = self.about(path, "timestamp_desc datetime flags", "timeline")
        return [(what, when[:19], flags) for what, when, flags in events]

    def audited(self, path: str | None) -> list[Row]:
        """Give what ``audit`` finds about a path."""
        return self.about(path, "layer rule visible", "audit")

    def hashed(self, path: str | bytes) -> list[Row]:
        """Give the layer and SHA-256 of every version of a path that ``hash`` knows."""
        return self.about(path, "layer sha256", "hash", "--layers", "all")

    def shown(self, path: str | bytes) -> list[str]:
        """Give the SHA-256 of what the image shows, by ``hash``."""
        return [digest for (digest,) in self.about(path, "sha256", "hash")]

    def found(self, path: str | bytes, scope: str) -> list[Row]:
        """Give the versions of a path that ``find`` finds."""
        rows = [json.loads(line) for line in self.run("find", "--json", scope, self.ref).out.splitlines()]
        return [(row["layer"], row["end"], row["end_layer"]) for row in rows if row["path"] == as_text(path)]

    def matched(self, pattern: str, *words: str) -> list[Row]:
        """Give the paths, layers and offsets where ``grep`` finds a pattern."""
        done = self.run("grep", "--json", *words, self.ref, pattern)
        rows = [json.loads(line) for line in done.out.splitlines()]
        return [(row["path"], row["layer"], row["layer_offset"]) for row in rows]

    def proven(self, path: str) -> Row:
        """Give what a receipt proves: layer and SHA-256."""
        receipt = json.loads(self.run("receipt", self.ref, path).out)
        return receipt["layer"]["number"], receipt["sha256"]


@pytest.fixture
def asked(
    written: tuple[str, str], capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> Asked:
    monkeypatch.setenv("OCIFS_CACHE_DIR", written[1])
    return Asked(runner(capfdbinary), written[0])


def as_text(path: str | bytes | None) -> str | None:
    return path.decode("utf-8", "surrogateescape") if isinstance(path, bytes) else path


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_the_deleted_secret(asked: Asked) -> None:
    path, digest = "/root/.ssh/id_rsa", sha(SECRET)
    assert asked.log(path) == [(2, "added", digest, "whiteout", 4)]
    assert asked.about(path, "layer data_offset end end_layer", "why", path) == [(2, 1024, "whiteout", 4)]
    assert asked.deleted(path) == [(2, "whiteout", 4, True, digest)]
    assert asked.about(path, "layer size cause by", "wasted", "-n", "0") == [(2, 81, "whiteout", 4)]
    assert [asked.differs(path, 1, 2), asked.differs(path, 3, 4)] == [[("A", [])], [("D", [])]]
    assert asked.events(path) == [
        ("Content Modification Time", "2024-11-07T17:20:00", ["later-than-layer"]),
        ("Deleted by Layer", "2023-11-18T00:00:00", []),
    ]
    assert asked.audited(path) == [(2, "late-time", False)]
    assert (asked.hashed(path), asked.shown(path)) == ([(2, digest)], [])
    assert (asked.found(path, "--deleted"), asked.found(path, "--merged")) == ([(2, "whiteout", 4)], [])
    assert asked.matched("BEGIN .* KEY", "--deleted") == asked.matched("BEGIN .* KEY", "--all") == [(path, 2, 1029)]
    assert asked.matched("BEGIN .* KEY") == []
    assert asked.proven(path) == (2, digest)


def test_the_replaced_binary(asked: Asked) -> None:
    path, good, evil = "/bin/tool", sha(TOOL), sha(TROJAN)
    assert asked.log(path) == [(1, "added", good, "replaced", 3), (3, "changed", evil, "visible", None)]
    assert asked.about(path, "layer data_offset end", "why", path) == [(3, 512, "visible")]
    assert (asked.deleted(path), asked.deleted(path, "--replaced")) == ([], [(1, "replaced", 3, True, good)])
    # Its data is seen still, by its other name.
    assert asked.about(path, "layer", "wasted", "-n", "0") == []
    assert asked.log("/bin/twin") == [(1, "added", good, "visible", None)]
    assert asked.differs(path, 2, 3) == [("C", ["content"])]
    assert asked.events(path) == [
        ("Content Modification Time", "2023-11-14T22:13:20", []),
        ("Content Modification Time", "2023-11-14T22:13:20", ["time-kept"]),
    ]
    assert sorted(asked.audited(path)) == [(1, "setuid", False), (3, "same-size-and-time", True), (3, "setuid", True)]
    assert (asked.hashed(path), asked.shown(path)) == ([(1, good), (3, evil)], [evil])
    assert asked.found(path, "--all") == [(1, "replaced", 3), (3, "visible", None)]
    assert asked.matched("echo evil") == [(path, 3, 522)]
    assert asked.matched("echo good") == [("/bin/twin", 1, 1034)]
    assert asked.proven(path) == (3, evil)


def test_the_directory_made_opaque(asked: Asked) -> None:
    path, digest = "/opt/app/data", sha(bytes(3000))
    assert asked.log(path) == [(1, "added", digest, "opaque", 4)]
    assert asked.deleted(path) == [(1, "opaque", 4, True, digest)]
    assert asked.about(path, "layer size cause by", "wasted", "-n", "0") == [(1, 3000, "opaque", 4)]
    assert [asked.differs(name, 3, 4) for name in (path, "/opt/app/new", "/opt/app")] == [[("D", [])], [("A", [])], []]
    assert [what for what, _, _ in asked.events(path)] == ["Content Modification Time", "Deleted by Layer"]
    assert (asked.hashed(path), asked.shown(path)) == ([(1, digest)], [])
    assert asked.found(path, "--deleted") == [(1, "opaque", 4)]
    assert asked.proven(path) == (1, digest)


def test_the_entry_that_comes_twice(asked: Asked) -> None:
    path, first, second = "/etc/motd", sha(b"first\n"), sha(b"second\n")
    assert asked.log(path) == [(3, "none", first, "overridden", 3), (3, "added", second, "visible", None)]
    assert asked.deleted(path) == [(3, "overridden", 3, True, first)]
    assert asked.about(path, "layer size cause by", "wasted", "-n", "0") == [(3, 6, "overridden", 3)]
    assert asked.audited(path) == [(3, "overridden-entry", False)]
    assert (asked.hashed(path), asked.shown(path)) == ([(3, first), (3, second)], [second])
    assert asked.found(path, "--deleted") == [(3, "overridden", 3)]
    assert asked.matched("^first|^second", "--all") == [(path, 3, 2048), (path, 3, 3072)]
    assert len(asked.events(path)) == 2
    assert asked.proven(path) == (3, second)


def test_the_second_tar_behind_the_end(asked: Asked) -> None:
    assert asked.audited(None) == [(5, "trailing-archive", False)]
    assert asked.about(None, "record layer size cause", "wasted", "-n", "0")[0] == ("path", 5, 2048, "slack")
    assert asked.matched("behind the end", "--all", "--slack") == [(None, 5, 7680)]
    assert asked.matched("behind the end", "--all") == []
    assert asked.found("/hidden/payload", "--all") == asked.hashed("/hidden/payload") == []
    assert asked.run("log", asked.ref, "/hidden/payload").status == 3


def test_the_whiteout_that_is_a_hard_link(asked: Asked) -> None:
    path, marker = "/var/log/old.log", "/var/log/.wh.old.log"
    assert asked.log(path) == [(1, "added", sha(b"old\n"), "whiteout", 4)]
    assert asked.deleted(path) == [(1, "whiteout", 4, True, sha(b"old\n"))]
    assert asked.differs(path, 3, 4) == [("D", [])]
    assert asked.audited(marker) == [(4, "odd-marker", False)]
    assert asked.found(marker, "--merged") == []
    # It is a marker, and not another name of the file that it links to.
    assert asked.log("/etc/passwd")[0][3:] == ("visible", None)
    assert asked.shown(marker) == []


def test_times_of_the_epoch_and_odd_names(asked: Asked) -> None:
    assert asked.events("/epoch") == [("Content Modification Time", "1970-01-01T00:00:00", [])]
    for name in ODD_NAMES:
        path = b"/" + name
        assert asked.log(path) == [(5, "added", sha(b"odd\n"), "visible", None)]
        assert asked.shown(path) == [sha(b"odd\n")]
        # What reads timelines takes UTF-8 only.
        written = path.decode("utf-8", "backslashreplace")
        assert asked.events(written) == [("Content Modification Time", "1970-01-01T00:00:00", [])]
        assert asked.found(path, "--merged") == [(5, "visible", None)]
        assert asked.proven(str(as_text(path))) == (5, sha(b"odd\n"))
        assert asked.about(path, "layer data_offset", "why", str(as_text(path)))[0][0] == 5


def test_all_of_it_is_what_its_digests_say(asked: Asked) -> None:
    done = asked.run("verify", "--json", asked.ref)
    assert done.status == 0
    assert [json.loads(line)["ok"] for line in done.out.splitlines()] == [True] * 6
