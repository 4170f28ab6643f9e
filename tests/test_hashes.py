"""Hashes of an image's files: the lists as hashdeep, sha256sum and mtree read them on a mount, and lists of known files."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from ocifs.forensics.hash_lists import sha256sum_line, vis
from tests.support.command import Run, runner
from tests.support.damage import flip
from tests.support.evidence_image import SECRET, TOOL, TROJAN, write_evidence
from tests.support.layout import blob_path, write_layout
from tests.support.mounting import mounted, run
from tests.support.tarball import FIFO, HARDLINK, entry, sparse_pax_1_0, tarball


@pytest.fixture
def ocifs(capfdbinary: pytest.CaptureFixture[bytes]) -> Run:
    return runner(capfdbinary)


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def weak(algorithm: str, data: bytes) -> str:
    return hashlib.new(algorithm, data, usedforsecurity=False).hexdigest()


def rows(ocifs: Run, *words: str) -> list[dict[str, Any]]:
    done = ocifs("hash", "--json", *words)
    assert done.status == 0, done.err
    return [json.loads(line) for line in done.out.splitlines()]


def test_auditors_tools_find_nothing_amiss_on_a_mount(ocifs: Run, tmp_path: Path, place: Path) -> None:
    ref = write_evidence(tmp_path / "image")
    for form in ("hashdeep", "sha256sum", "mtree"):
        done = ocifs("hash", "--format", form, ref)
        assert done.status == 0
        (tmp_path / form).write_bytes(done.out)
    with mounted(ref, place):
        # hashdeep knows no way to write a newline in a name; it finds that file, under another name.
        audit = run(["hashdeep", "-r", "-l", "-o", "f", "-a", "-vv", "-k", tmp_path / "hashdeep", "."], cwd=place)
        assert "Files matched: 9\n" in audit.stdout
        assert "New files found: 0\n" in audit.stdout
        assert "./odd/new\\nline: Known file not used\n" in audit.stdout
        sums = run(["sha256sum", "-c", tmp_path / "sha256sum"], cwd=place)
        assert (sums.returncode, sums.stdout.count(": OK\n"), sums.stderr) == (0, 10, "")
        tree = run(["mtree", "-f", tmp_path / "mtree", "-p", place])
        assert (tree.returncode, tree.stdout, tree.stderr) == (0, "", "")


def test_auditors_tools_find_what_is_amiss(ocifs: Run, tmp_path: Path, place: Path) -> None:
    layer = tarball(entry("a", b"one\n", mtime=1), entry("d/", mtime=1), entry("d/b", b"two\n", mtime=1))
    write_layout(tmp_path / "image", [layer])
    for form in ("hashdeep", "sha256sum", "mtree"):
        listed = ocifs("hash", "--format", form, str(tmp_path / "image")).out
        (tmp_path / form).write_bytes(listed)
        (tmp_path / f"{form}.wrong").write_bytes(listed.replace(sha(b"two\n").encode(), sha(b"TWO\n").encode()))
    hashdeep = ["hashdeep", "-r", "-l", "-o", "f", "-a", "-vv", "-k"]
    with mounted(str(tmp_path / "image"), place):
        assert "hashdeep: Audit passed\n" in run([*hashdeep, tmp_path / "hashdeep", "."], cwd=place).stdout
        assert "./d/b: No match\n" in run([*hashdeep, tmp_path / "hashdeep.wrong", "."], cwd=place).stdout
        sums = run(["sha256sum", "-c", tmp_path / "sha256sum.wrong"], cwd=place)
        assert sums.stdout == "./a: OK\n./d/b: FAILED\n"
        tree = run(["mtree", "-f", tmp_path / "mtree.wrong", "-p", place])
        assert (tree.returncode, tree.stdout.split()[:2]) == (2, ["d/b:", "sha256"])


def test_mtree_reads_names_that_are_patterns_and_every_kind_of_thing(ocifs: Run, tmp_path: Path, place: Path) -> None:
    write_layout(
        tmp_path / "image",
        [
            tarball(
                *(
                    entry(name, b"", mtime=1.5)
                    for name in ("x*", "xy", "x[y]", "x?", "x#y", "x y", "x\\y", "x=y", "é", "d*/x\\y", "d*/*\\")
                ),
                entry("fifo", type=FIFO, mtime=2),
                entry("to", link="a b\\\n#"),
                entry("xy2", type=HARDLINK, link="xy"),
            )
        ],
    )
    done = ocifs("hash", "--format", "mtree", str(tmp_path / "image"))
    lines = done.out.decode().splitlines()
    assert lines[:3] == [
        "#mtree",
        ". type=dir uid=0 gid=0 mode=0755 nlink=3 time=0.000000000",
        "./d\\134\\052 type=dir uid=0 gid=0 mode=0755 nlink=2 time=0.000000000",
    ]
    assert "./fifo type=fifo uid=0 gid=0 mode=0644 nlink=1 time=2.000000000" in lines
    assert "./to type=link uid=0 gid=0 mode=0777 nlink=1 time=0.000000000 link=a\\040b\\134\\012\\043" in lines
    assert f"./x\\134\\052 type=file uid=0 gid=0 mode=0644 nlink=1 time=1.500000000 size=0 sha256={sha(b'')}" in lines
    (tmp_path / "spec").write_bytes(done.out)
    with mounted(str(tmp_path / "image"), place):
        tree = run(["mtree", "-f", tmp_path / "spec", "-p", place])
        assert (tree.returncode, tree.stdout, tree.stderr) == (0, "", "")


def test_every_version_in_every_layer_is_hashed(ocifs: Run, tmp_path: Path) -> None:
    for compression in ("gzip", "zstd"):
        ref = write_evidence(tmp_path / compression, compression)
        found = {
            (row["path"], row["layer"], row["entry"]): row["sha256"] for row in rows(ocifs, "--layers", "all", ref)
        }
        assert found["/root/.ssh/id_rsa", 2, 1] == sha(SECRET)
        assert found["/bin/tool", 1, 1] == found["/bin/twin", 1, 2] == sha(TOOL)
        assert found["/bin/tool", 3, 0] == sha(TROJAN)
        assert found["/etc/motd", 3, 2] == sha(b"first\n")
        assert found["/etc/motd", 3, 3] == sha(b"second\n")
        assert found["/opt/app/data", 1, 9] == sha(bytes(3000))
        listed = ocifs("hash", "--layers", "all", "--format", "sha256sum", ref).out
        assert sha(SECRET).encode() + b"  ./L02/root/.ssh/id_rsa\n" in listed
        assert sha(SECRET).encode() not in ocifs("hash", "--format", "sha256sum", ref).out


def test_files_over_many_spans_with_holes_and_none_at_all(ocifs: Run, tmp_path: Path) -> None:
    large = b"".join(hashlib.sha256(b"%d" % number).digest() for number in range(160_000))
    sparse = sparse_pax_1_0("sparse", [(4096, b"in the middle"), (1 << 20, b"later")], (1 << 20) + 9000)
    content = bytes(4096) + b"in the middle"
    content += bytes((1 << 20) - len(content)) + b"later"
    content += bytes((1 << 20) + 9000 - len(content))
    layer = tarball(
        entry("before", b"b"), entry("large", large), sparse, entry("empty", b""), entry("end", b"e" * 4_500_000)
    )
    expected = {
        "/before": sha(b"b"),
        "/empty": sha(b""),
        "/end": sha(b"e" * 4_500_000),
        "/large": sha(large),
        "/sparse": sha(content),
    }
    for compression in ("gzip", "zstd", "plain"):
        ref = str(tmp_path / compression)
        write_layout(tmp_path / compression, [layer], compression=compression)
        assert {row["path"]: row["sha256"] for row in rows(ocifs, ref)} == expected
        assert {row["path"]: row["sha256"] for row in rows(ocifs, "--layers", "all", ref)} == expected


def test_an_exabyte_of_holes_is_refused_and_the_rest_hashed(ocifs: Run, tmp_path: Path) -> None:
    write_layout(tmp_path / "image", [tarball(sparse_pax_1_0("hole", [(0, b"x")], 1 << 60), entry("ok", b"ok"))])
    done = ocifs("hash", "--format", "sha256sum", str(tmp_path / "image"))
    assert (done.status, done.out) == (4, f"{sha(b'ok')}  ./ok\n".encode())
    assert done.err == "ocifs: not hashed: hole: it has holes of more than 4 GiB together, which are not hashed\n"


def test_damaged_data_costs_only_the_files_in_its_span(ocifs: Run, tmp_path: Path) -> None:
    noise = [hashlib.sha256(b"%d" % number).digest() * 120_000 for number in range(4)]
    image = write_layout(
        tmp_path / "image",
        [tarball(*(entry(f"f{number}", data) for number, data in enumerate(noise)))],
        compression="plain",
    )
    ref = str(tmp_path / "image")
    assert ocifs("hash", ref).status == 0
    blob = blob_path(tmp_path / "image", image["layers"][0])
    flip(blob, 512 + 100)
    done = ocifs("hash", "--format", "sha256sum", ref)
    assert done.status == 4
    assert b"./f0\n" not in done.out
    assert f"{sha(noise[3])}  ./f3\n".encode() in done.out
    assert "ocifs: not hashed: f0: " in done.err


# -- lists of known files ------------------------------------------------------------------------------------------


def known(ocifs: Run, ref: str, path: Path, *words: str) -> set[str]:
    return {row["path"] for row in rows(ocifs, "--known", str(path), *words, ref)}


def test_known_files_are_filtered_by_any_list_of_hashes(ocifs: Run, tmp_path: Path) -> None:
    ref = write_evidence(tmp_path / "image")
    lists = {
        "plain": f"# good ones\n\n{sha(TROJAN)}\n{sha(b'nobody')}\n",
        "upper": f"{sha(TROJAN).upper()}\r\n",
        "sha256sum": f"{sha(TROJAN)}  /bin/x\n\\{sha(b'z')} *a\\\\b\n",
        "bsd": f"SHA256 (a (b) c) = {sha(TROJAN)}\n",
        "md5": f"{weak('md5', TROJAN)}\n",
        "sha1": f"{weak('sha1', TROJAN)}\n",
        "hashdeep": "%%%% HASHDEEP-1.0\n%%%% size,md5,sha256,filename\n## x\n##\n"
        f"20,{weak('md5', TROJAN)},{sha(TROJAN)},/a,b\n",
    }
    for name, text in lists.items():
        path = tmp_path / name
        path.write_text(text, encoding="ascii", newline="")
        assert known(ocifs, ref, path, "--matched") == {"/bin/tool"}, name
        unknown = known(ocifs, ref, path, "--unmatched")
        assert "/bin/tool" not in unknown, name
        assert "/bin/twin" in unknown, name
    assert known(ocifs, ref, tmp_path / "plain", "--layers", "all", "--matched") == {"/bin/tool"}


def test_a_list_of_known_files_may_come_out_of_a_pipe(ocifs: Run, tmp_path: Path) -> None:
    ref = write_evidence(tmp_path / "image")
    reading, writing = os.pipe()
    os.write(writing, f"# {'-' * 5000}\n{sha(TROJAN)}\n{sha(TOOL)}\n".encode())
    os.close(writing)
    assert known(ocifs, ref, Path(f"/dev/fd/{reading}"), "--matched") == {"/bin/tool", "/bin/twin"}
    os.close(reading)


def test_its_own_output_is_a_list_of_known_files(ocifs: Run, tmp_path: Path) -> None:
    ref = write_evidence(tmp_path / "image")
    for form in ("hashdeep", "sha256sum"):
        (tmp_path / form).write_bytes(ocifs("hash", "--format", form, f"{ref}#1").out)
        new = known(ocifs, ref, tmp_path / form, "--unmatched", "--layers", "all")
        assert {"/bin/tool", "/root/.ssh/id_rsa", "/opt/app/new"} <= new
        assert "/bin/twin" not in new


def reference_data_set(path: Path, *, minimal: bool, hashes: list[bytes]) -> None:
    """Write a database with the tables that the NSRL's have, in their minimal and in their full form."""
    rows = [(*(weak(name, data).upper() for name in ("sha256", "sha1", "md5")), "f", 1, 7) for data in hashes]
    with sqlite3.connect(path) as database:
        if minimal:
            database.execute(
                "CREATE TABLE FILE (sha256 VARCHAR NOT NULL, sha1 VARCHAR NOT NULL, md5 VARCHAR NOT NULL, file_name VARCHAR"
                " NOT NULL, file_size INTEGER NOT NULL, package_id INTEGER NOT NULL,"
                " PRIMARY KEY (sha256, sha1, md5, file_name, file_size, package_id))"
            )
            database.executemany("INSERT INTO FILE VALUES (?, ?, ?, ?, ?, ?)", rows)
        else:
            database.execute("CREATE TABLE METADATA (sha256, sha1, md5, file_name, bytes, object_id)")
            database.executemany("INSERT INTO METADATA VALUES (?, ?, ?, ?, ?, ?)", rows)
            database.execute("CREATE VIEW FILE AS SELECT UPPER(sha256) AS sha256, sha1, md5, file_name FROM METADATA")
    database.close()


@pytest.mark.parametrize("minimal", [True, False])
def test_known_files_are_looked_up_in_a_reference_data_set(ocifs: Run, tmp_path: Path, minimal: bool) -> None:
    ref = write_evidence(tmp_path / "image")
    path = tmp_path / "RDS 100%.db"
    reference_data_set(path, minimal=minimal, hashes=[TROJAN, b"other"])
    assert known(ocifs, ref, path, "--matched") == {"/bin/tool"}
    assert "/bin/tool" not in known(ocifs, ref, path)


def test_what_is_no_list_is_refused_in_a_sentence(ocifs: Run, tmp_path: Path) -> None:
    ref = write_evidence(tmp_path / "image")
    (tmp_path / "text").write_text("hello\n", encoding="ascii")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "mixed").write_text(f"{sha(b'')}\n{'0' * 32}\n", encoding="ascii")
    with sqlite3.connect(tmp_path / "db") as database:
        database.execute("CREATE TABLE other (x)")
    database.close()
    (tmp_path / "torn").write_bytes((tmp_path / "db").read_bytes()[:700])
    said = {
        name: ocifs("hash", "--known", str(tmp_path / name), ref)
        for name in ("text", "empty", "mixed", "db", "torn", "none")
    }
    assert {name: result.status for name, result in said.items()} == {
        "text": 2,
        "empty": 2,
        "mixed": 2,
        "db": 2,
        "torn": 2,
        "none": 3,
    }
    assert said["text"].err.endswith("text begins with no MD5, SHA-1 or SHA-256\n")
    assert said["mixed"].err.endswith("mixed has a hash of another kind than sha256\n")
    assert all(result.err.count("\n") == 1 and not result.out for result in said.values())
    assert ocifs("hash", "--format", "mtree", "--layers", "all", ref).status == 2
    assert ocifs("hash", "--algorithms", "crc32", ref).status == 2


def test_how_names_are_escaped() -> None:
    digests = {"sha256": "00"}
    assert sha256sum_line(b"plain", digests) == b"00  plain\n"
    assert sha256sum_line(b"a\\b\nc\rd\xff", digests) == b"\\00  a\\\\b\\nc\\rd\xff\n"
    assert vis(b"a b#\n\xff\\*[") == "a\\040b\\043\\012\\377\\134\\052\\133"
