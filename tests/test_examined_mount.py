"""Mounts under examination: views below ``.ocifs``, attributes that say where things come from, what is left afterwards.

One mount for each compression is looked at from many sides; others only for what ends or damages one.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from ocifs.cli.reports import REPORTS
from ocifs.store import Kind, Store
from tests.support.command import runner
from tests.support.damage import flip
from tests.support.evidence_image import SECRET, STEPS, TOOL, TROJAN, evidence_image, write_evidence
from tests.support.layout import Image, blob_path, put_image
from tests.support.mounting import Mount, Process, mounted, ocifs, run
from tests.support.ordinary_user import ordinary_user

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(
    not os.path.exists("/dev/fuse") or os.geteuid() != 0, reason="mounting needs /dev/fuse, and root for these tests"
)


class Seen(NamedTuple):
    """A mounted evidence image."""

    mount: Mount
    image: Image
    layout: Path
    cache: Path

    def shell(self, script: str) -> str:
        """Give what a shell script prints, whose working directory is outside and whose ``$M`` is the mount point."""
        done = run(["sh", "-c", script], cwd="/", env={"M": str(self.mount.path), "LC_ALL": "C"})
        assert done.returncode == 0, done.stderr
        return done.stdout

    def tree(self, path: str) -> list[str]:
        """Give what find(1) prints of a directory: type, mode, size and path of everything in it."""
        found = self.shell(f'cd "$M/{path}"; find . -mindepth 1 -printf "%y %m %s %P\\n"; cd /').splitlines()
        sizes = [re.sub(r"^d (\d+) \d+", r"d \1 -", line) for line in found]
        return sorted(sizes, key=lambda line: line.split(" ", 3)[3])

    def attributes(self, path: str) -> dict[str, str]:
        """Give what getfattr(1) dumps of a path, without what the names have in common."""
        lines = self.shell(f'getfattr --absolute-names -d "$M/{path}"').splitlines()[1:]
        pairs = (line.split("=", 1) for line in lines if line)
        return {name.removeprefix("user.ocifs."): value.strip('"') for name, value in pairs}


@pytest.fixture(scope="module", params=["gzip", "zstd"])
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    place = tmp_path_factory.mktemp("examined")
    image = evidence_image(request.param)
    put_image(place / "image", image)
    with mounted(f"oci:{place}/image:latest", place / "mnt", "--examine", cache=place / "cache") as mount:
        yield Seen(mount, image, place / "image", place / "cache")


def test_evidence_is_mounted_so_that_nothing_of_it_can_act(seen: Seen) -> None:
    (line,) = (line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f" {seen.mount.path} " in line)
    assert set(line.split()[5].split(",")) >= {"ro", "nosuid", "nodev", "noexec"}
    assert seen.mount.record["driver"] == "fuse"


def test_the_views_are_in_no_listing_but_there(seen: Seen) -> None:
    assert seen.shell('ls -A "$M"').split() == [
        *("bin", "dev", "epoch", "etc", "odd", "opt", "root", "sh", "tmp", "var")
    ]
    assert ".ocifs" not in seen.shell('find "$M" -maxdepth 1')
    assert seen.shell('ls -A "$M/.ocifs"').split() == [
        *("deleted", "history", "layers", "raw", "reports", "slack", "upto")
    ]
    assert seen.shell('stat -c "%A %u %g %Y" "$M/.ocifs"') == "dr-xr-xr-x 0 0 0\n"
    assert seen.shell('cd "$M/.ocifs"; stat -c "%a %n" *; cd /').splitlines() == [
        *("555 deleted", "500 history", "555 layers", "500 raw", "500 reports", "500 slack", "555 upto")
    ]


def test_a_layer_alone(seen: Seen) -> None:
    names = [f"{number:02}-{digest[7:19]}" for number, digest in enumerate(seen.image.layer_digests, 1)]
    assert seen.shell('ls "$M/.ocifs/layers"').split() == names
    assert seen.tree(f".ocifs/layers/{names[3]}") == [
        "d 755 - opt",
        "d 755 - opt/app",
        "f 644 0 opt/app/.wh..wh..opq",
        "f 644 4 opt/app/new",
        "d 755 - root",
        "d 755 - root/.ssh",
        "f 644 0 root/.ssh/.wh.id_rsa",
        "d 755 - tmp",
        "f 644 0 tmp/.wh.build.log",
        "d 755 - var",
        "d 755 - var/log",
        "f 644 0 var/log/.wh.old.log",
    ]


def test_the_image_as_its_first_layers_make_it(seen: Seen) -> None:
    assert seen.shell('cat "$M/.ocifs/upto/03/root/.ssh/id_rsa"').encode() == SECRET
    assert seen.shell('cat "$M/.ocifs/upto/02/bin/tool" "$M/.ocifs/upto/03/bin/tool"').encode() == TOOL + TROJAN
    assert seen.shell('diff -r "$M/.ocifs/upto/03" "$M/.ocifs/upto/04" | sed "s|$M/.ocifs/||g"; true') == (
        "Only in upto/03/opt/app: config\n"
        "Only in upto/03/opt/app: data\n"
        "Only in upto/04/opt/app: new\n"
        "Only in upto/03/root/.ssh: id_rsa\n"
        "Only in upto/03/tmp: build.log\n"
        "Only in upto/03/var/log: old.log\n"
    )
    assert seen.shell('diff -r --no-dereference "$M" "$M/.ocifs/upto/05" && echo same') == "same\n"


def test_what_was_deleted_can_be_read(seen: Seen) -> None:
    assert seen.shell('cat "$M/.ocifs/deleted/root/.ssh/id_rsa"').encode() == SECRET
    assert seen.shell('cat "$M/.ocifs/deleted/L03/bin/tool"').encode() == TOOL
    assert [line for line in seen.tree(".ocifs/deleted/L04") if not line.startswith("d")] == [
        "f 644 4 opt/app/config",
        "f 644 3000 opt/app/data",
        "f 600 81 root/.ssh/id_rsa",
        "f 644 6 tmp/build.log",
        "f 644 4 var/log/old.log",
    ]


def test_every_version_of_a_path(seen: Seen) -> None:
    assert seen.tree(".ocifs/history/bin/tool") == ["f 4755 20 L01-added", "f 4755 20 L03-changed"]
    assert seen.shell('cd "$M/.ocifs/history/bin/tool" && cat *; cd /').encode() == TOOL + TROJAN
    assert seen.tree(".ocifs/history/root/.ssh") == [
        "d 700 - L02-added",
        "d 555 - id_rsa",
        "f 600 81 id_rsa/L02-added",
        "f 444 0 id_rsa/L04-deleted",
    ]
    assert seen.tree(".ocifs/history/etc/motd") == ["f 644 7 L03-added", "f 644 6 L03-overridden"]


def test_blobs_and_tars_are_what_their_digests_say(seen: Seen) -> None:
    blobs = sorted(digest[7:] for digest in seen.image.blobs)
    assert len(blobs) == 7
    assert seen.shell('cd "$M/.ocifs/raw/blobs/sha256" && sha256sum *; cd /').splitlines() == [
        f"{digest}  {digest}" for digest in blobs
    ]
    assert seen.shell('cd "$M/.ocifs/raw/tars" && sha256sum *; cd /').splitlines() == [
        f"{diff_id[7:]}  {number:02}.tar" for number, diff_id in enumerate(seen.image.diff_ids, 1)
    ]
    assert seen.tree(".ocifs/raw/tars")[4] == "f 444 9216 05.tar"


def test_bytes_that_belong_to_no_file(seen: Seen) -> None:
    assert seen.tree(".ocifs/slack") == [
        "d 555 - 01",
        "d 555 - 02",
        "d 555 - 03",
        "f 444 6 03/000000002048-overridden",
        "d 555 - 04",
        "d 555 - 05",
        "f 444 2048 05/000000007168-trailing-tar",
    ]
    assert seen.shell('cat "$M/.ocifs/slack/03/"*') == "first\n"
    assert seen.shell('tar -xOf "$M/.ocifs/slack/05/000000007168-trailing-tar" hidden/payload') == "behind the end\n"


def test_reports_have_their_size_and_say_what_commands_say(seen: Seen) -> None:
    size = int(seen.shell('stat -c %s "$M/.ocifs/reports/deleted.jsonl"'))
    text = seen.shell('cat "$M/.ocifs/reports/deleted.jsonl"')
    assert len(text) == size
    paths = [json.loads(line)["path"] for line in text.splitlines()]
    assert paths == [
        "/etc/motd",
        "/opt/app/config",
        "/opt/app/data",
        "/root/.ssh/id_rsa",
        "/tmp/build.log",  # noqa: S108 (a path of the image)
        "/var/log/old.log",
    ]


def test_every_report_is_what_its_command_prints(seen: Seen, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    command = runner(capfdbinary)
    for name, words in REPORTS.items():
        said = command(*words, "--cache-dir", str(seen.cache), f"oci:{seen.layout}:latest")
        assert said.status == 0, name
        report = run(["cat", seen.mount.at(f".ocifs/reports/{name}")]).stdout
        assert report.encode("utf-8", "surrogateescape") == said.out, name


def test_a_scanner_finds_what_nobody_sees_and_annotate_says_whose_it_is(
    seen: Seen, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = tmp_path / "rules.yar"
    rules.write_text(
        'rule key { strings: $a = "OPENSSH PRIVATE KEY" condition: $a }\n'
        'rule tool { strings: $a = "echo good" $b = "echo evil" condition: any of them }\n'
        'rule behind { strings: $a = "behind the end" condition: $a }\n'
    )
    found = "".join(
        run(["yara", "-r", str(rules), seen.mount.at(f".ocifs/{view}")]).stdout
        for view in ("deleted", "slack", "upto/03")
    )
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(found.encode())))
    said = runner(capfdbinary)(
        *("annotate", "--cache-dir", str(seen.cache), "--prefix", str(seen.mount.path)), f"oci:{seen.layout}:latest"
    )
    assert (said.status, said.err) == (0, "")
    assert sorted(said.out.decode().replace(f"{seen.mount.path}/.ocifs/", "").splitlines()) == [
        f"1\treplaced by 3\t{STEPS[0]}\ttool deleted/L03/bin/tool",
        f"1\treplaced by 3\t{STEPS[0]}\ttool deleted/bin/tool",
        f"1\tvisible\t{STEPS[0]}\ttool upto/03/bin/twin",
        f"1\tvisible\t{STEPS[0]}\ttool upto/03/sh",
        f"2\tdeleted by 4\t{STEPS[1]}\tkey deleted/L04/root/.ssh/id_rsa",
        f"2\tdeleted by 4\t{STEPS[1]}\tkey deleted/root/.ssh/id_rsa",
        f"2\tdeleted by 4\t{STEPS[1]}\tkey upto/03/root/.ssh/id_rsa",
        f"3\tvisible\t{STEPS[2]}\ttool upto/03/bin/tool",
        f"5\tslack\t{STEPS[4]}\tbehind slack/05/000000007168-trailing-tar",
    ]


def test_auditors_tools_agree_with_the_reports(seen: Seen) -> None:
    # hashdeep cannot read a name with a newline back: the one that it misses.
    audit = 'cd "$M" && hashdeep -r -l -o f -a -v -k .ocifs/reports/hashdeep.txt . | grep -v " 0$"; cd /'
    assert [" ".join(line.split()) for line in seen.shell(audit).splitlines()] == [
        "hashdeep: Audit failed",
        "Files matched: 9",
        "Files moved: 1",
        "Known files not found: 1",
    ]
    assert seen.shell('cd "$M" && sha256sum -c --quiet .ocifs/reports/sha256sum.txt && cd / && echo right') == "right\n"
    assert seen.shell('mtree -f "$M/.ocifs/reports/mtree.txt" -p "$M" && echo right') == "right\n"
    rows = seen.shell('mactime -y -z UTC -d -b "$M/.ocifs/reports/timeline.body" 2023-11-18..2023-11-19')
    assert "/root/.ssh/id_rsa (deleted by layer 4)" in rows


def test_everything_says_where_it_comes_from(seen: Seen) -> None:
    def layer(number: int) -> dict[str, str]:
        return {
            "layer": f"{number} {seen.image.layer_digests[number - 1]}",
            "diff_id": seen.image.diff_ids[number - 1],
            "created_by": STEPS[number - 1],
            "verified": "yes",
        }

    tool = {**layer(3), "header_offset": "0", "data_offset": "512", "versions": "2"}
    assert seen.attributes("bin/tool") == tool
    assert seen.attributes(".ocifs/history/bin/tool/L03-changed") == tool
    first = {**layer(1), "header_offset": "512", "data_offset": "1024", "versions": "2"}
    assert seen.attributes(".ocifs/deleted/bin/tool") == first
    assert seen.attributes("bin/twin") == {**first, "versions": "2"}
    assert seen.attributes("etc") == {**layer(3), "header_offset": "1024", "versions": "2"}
    assert seen.attributes("etc/motd") == {**layer(3), "header_offset": "2560", "data_offset": "3072", "versions": "2"}
    assert seen.attributes("var") == layer(1)
    deletion = {**layer(4), "header_offset": "0", "versions": "0"}
    assert seen.attributes(".ocifs/history/root/.ssh/id_rsa/L04-deleted") == deletion
    assert seen.attributes(".ocifs/raw/tars/02.tar") == layer(2)
    assert seen.attributes(f".ocifs/raw/blobs/sha256/{seen.image.layer_digests[4][7:]}") == layer(5)
    assert seen.attributes(".ocifs/slack/03/000000002048-overridden") == {**layer(3), "data_offset": "2048"}
    assert seen.attributes(".ocifs/deleted") == {}
    assert seen.shell('getfattr -h -d "$M/sh"') == ""


def test_a_files_hash_is_there_for_who_asks(seen: Seen) -> None:
    assert "sha256" not in seen.attributes("bin/tool")
    asked = "getfattr --absolute-names --only-values -n user.ocifs.sha256"
    shown = seen.shell(f'{asked} "$M/bin/tool"; echo; sha256sum "$M/bin/tool"')
    hashed, summed = shown.splitlines()
    assert hashed == summed.split()[0]


def test_tools_that_copy_attributes_carry_them_along(seen: Seen, tmp_path: Path) -> None:
    there = {**os.environ, "OUT": str(tmp_path)}
    done = run(
        ["sh", "-c", 'rsync -aX "$M/.ocifs/deleted/L04/" "$OUT/rsync" && cp -a "$M/.ocifs/deleted/L04" "$OUT/cp"'],
        cwd="/",
        env={**there, "M": str(seen.mount.path)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    for copy in ("rsync", "cp"):
        secret = tmp_path / copy / "root/.ssh/id_rsa"
        assert (secret.read_bytes(), oct(secret.stat().st_mode)) == (SECRET, "0o100600")
        assert os.getxattr(secret, "user.ocifs.created_by") == b"COPY id_rsa /root/.ssh/id_rsa"
        assert os.getxattr(secret, "user.ocifs.layer").decode() == f"2 {seen.image.layer_digests[1]}"


# --- mounts of their own ------------------------------------------------------------------------------------------------


def kept(cache: Path) -> dict[Kind, int]:
    """How many trees and histories a cache has."""
    with Store(cache) as store:
        kinds = [entry.kind for entry in store.entries()]
    return {kind: kinds.count(kind) for kind in (Kind.TREE, Kind.HISTORY)}


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_trees_are_made_when_they_are_entered_and_nothing_is_left_of_a_mount(tmp_path: Path) -> None:
    image = evidence_image()
    put_image(tmp_path / "image", image)
    cache, log = tmp_path / "cache", tmp_path / "evidence.jsonl"
    words = ("--examine=visible,sha256", "--evidence-log", str(log))
    with mounted(f"oci:{tmp_path}/image", tmp_path / "mnt", *words, cache=cache, ended=True) as mount:
        at = Seen(mount, image, tmp_path / "image", cache)
        assert ".ocifs" in at.shell('ls -A "$M"').split()
        at.shell('ls -l "$M/.ocifs" "$M/.ocifs/layers" "$M/.ocifs/upto" "$M/.ocifs/slack" "$M/.ocifs/raw/tars"')
        assert kept(cache) == {Kind.TREE: 1, Kind.HISTORY: 0}
        at.shell('ls "$M/.ocifs/upto/03"')
        assert kept(cache) == {Kind.TREE: 2, Kind.HISTORY: 0}
        at.shell('ls "$M/.ocifs/deleted"')
        assert kept(cache) == {Kind.TREE: 3, Kind.HISTORY: 1}
        hashed = at.attributes("epoch")["sha256"]
        assert hashed == "9a271f2a916b0b6ee6cecb2426f0b3206ef074578be55d9bc94f6f3fe3ab86aa"
        assert at.shell('grep -c . "$M/.ocifs/reports/sha256sum.txt"') == "10\n"
        at.shell(f'cat "$M/.ocifs/raw/blobs/sha256/{image.config_digest[7:]}"')
        (workshop,) = children(mount.pid)
        assert ocifs("umount", str(mount.path)).returncode == 0
        assert not Path(f"/proc/{workshop}").exists()
        assert not mount.log.exists()
    assert os.listdir(tmp_path / "mnt") == []
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["view"] for line in lines if line["event"] == "view"] == [
        *("upto 3", "deleted", "versions", "report sha256sum.txt")
    ]
    assert [line["digest"] for line in lines if line["event"] == "blob"] == [image.config_digest]
    assert lines[-1]["event"] == "closed"
    assert (os.listdir(cache / "tmp"), os.listdir(cache / "locks")) == ([], [])


def test_an_ordinary_user_sees_what_the_images_modes_let_them_and_all_versions(tmp_path: Path) -> None:
    with ordinary_user() as user:
        write_evidence(user.home / "image")
        script = """
            cd "$1" && mkdir mnt && "$2" -m ocifs mount --examine oci:image mnt && cd mnt/.ocifs || exit
            cat deleted/tmp/build.log slack/03/* && cat deleted/etc/nothing upto/02/root/.ssh/id_rsa
            wc -c raw/tars/05.tar && ls reports | wc -l && ls -ld history && ls history/root/.ssh/id_rsa
            cd "$1" && "$2" -m ocifs umount mnt
        """
        done = run([*user.words, "sh", "-c", script, "sh", str(user.home), sys.executable], cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert (done.returncode, lines[:4]) == (0, ["built", "first", "9216 raw/tars/05.tar", "12"])
    assert lines[4].split()[:4] == ["dr-x------", "1", "tess", "tess"]
    assert lines[5:] == ["L02-added", "L04-deleted"]
    assert "root/.ssh/id_rsa: Permission denied" in done.stderr


def test_whoever_makes_views_dies_with_a_daemon_that_is_killed(tmp_path: Path) -> None:
    put_image(tmp_path / "image", evidence_image())
    with mounted(f"oci:{tmp_path}/image", tmp_path / "mnt", "--examine", ended=True) as mount:
        (workshop,) = children(mount.pid)
        watched = Process(workshop)
        os.kill(mount.pid, signal.SIGKILL)
        assert mount.process.gone()
        assert watched.gone()
        watched.close()


def test_damaged_layers_show_no_wrong_bytes(tmp_path: Path) -> None:
    image = evidence_image()
    put_image(tmp_path / "image", image)
    blob_path(tmp_path / "image", image.layer_digests[3]).write_bytes(image.layers[1])
    with mounted(f"oci:{tmp_path}/image", tmp_path / "mnt", "--examine") as mount:
        at = Seen(mount, image, tmp_path / "image", tmp_path)
        # Layer 4 is another one than the image says: shown, and said of each of its files.
        assert at.attributes("root/.ssh/id_rsa")["verified"].startswith("no: ")
        assert at.attributes("bin/tool")["verified"] == "yes"
        assert at.shell('cat "$M/.ocifs/history/root/.ssh/id_rsa/L04-changed"').encode() == SECRET
        # Layer 3 is changed while it is mounted.
        blob = blob_path(tmp_path / "image", image.layer_digests[2])
        flip(blob, blob.stat().st_size // 2)
        for path in ("slack/03/.", "raw/tars/03.tar", "history/bin/tool/L03-changed"):
            done = run(["cat", mount.at(f".ocifs/{path}")])
            assert "Input/output error" in done.stderr, path
        lines = [line for line in mount.logged().splitlines() if "slack 3" in line]
        assert len(lines) == 1
        assert re.search(r"the view 'slack 3' cannot be made: .* cannot be read in span 0", lines[0])
        assert at.shell('cat "$M/.ocifs/history/bin/tool/L01-added"').encode() == TOOL
        assert at.shell('ls "$M/.ocifs/slack/05"') == "000000007168-trailing-tar\n"
        assert not at.shell(f'sha256sum < "$M/.ocifs/raw/blobs/sha256/{blob.name}"').startswith(blob.name)


def test_a_layer_alone_is_examined_without_views(tmp_path: Path) -> None:
    put_image(tmp_path / "image", evidence_image())
    place = tmp_path / "mnt"
    place.mkdir()
    words = ("--examine", "--layer", "2", "--cache-dir", str(tmp_path / "cache"))
    done = ocifs("mount", *words, f"oci:{tmp_path}/image", str(place))
    try:
        said = "a mount of a layer alone has no .ocifs, nor attributes that say where things come from\n"
        assert (done.returncode, done.stderr) == (0, f"ocifs: warning: {said}")
        assert sorted(os.listdir(place)) == ["root", "tmp"]
    finally:
        ocifs("umount", str(place))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--examine=everything"], "ocifs: --examine=everything is not known; there are visible and sha256\n"),
        (
            ["--examine", "-o", "suid"],
            "ocifs: the option 'suid' makes no sense with --examine: evidence is mounted nosuid, nodev and noexec\n",
        ),
        (
            ["--examine", "--driver", "erofs"],
            "ocifs: the erofs driver cannot be used: examination shows what only the fuse driver can\n",
        ),
    ],
)
def test_words_that_make_no_sense(
    tmp_path: Path, words: list[str], message: str, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    status, _, said = runner(capfdbinary)("mount", *words, "oci:nowhere", str(tmp_path))
    assert (status, said) == (2, message)


def test_mounts_that_are_not_examined_have_no_views(tmp_path: Path) -> None:
    put_image(tmp_path / "image", evidence_image())
    with mounted(f"oci:{tmp_path}/image", tmp_path / "mnt") as mount:
        done = run(["ls", mount.at(".ocifs")])
        assert "No such file or directory" in done.stderr
        assert children(mount.pid) == []
        assert "Operation not supported" in run(["getfattr", "-d", mount.at("epoch")]).stderr
