"""Looking into an image without mounting it: ls, stat, cat, blob, inspect, layers, index, cache, doctor."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import OCIFS, SAMPLE, Run, runner
from tests.support.damage import flip
from tests.support.layout import blob_path, write_layout
from tests.support.tarball import CHAR, FIFO, HARDLINK, entry, tarball


@pytest.fixture(autouse=True)
def _utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()


@pytest.fixture
def run(capfdbinary: pytest.CaptureFixture[bytes]) -> Run:
    return runner(capfdbinary)


@pytest.fixture
def odd(tmp_path: Path) -> str:
    """An image of two layers with names and kinds that are not of every day."""
    base = tarball(
        entry("./", mode=0o755),
        entry("dir/", mode=0o1777, uid=7, gid=70000, mtime=1_700_000_000.5),
        entry("dir/newline\nname", b"n"),
        entry(b"dir/raw\xff", b"raw"),
        entry("dir/empty"),
        entry("dir/tty", type=CHAR, rdev=(4, 64), mode=0o620),
        entry("dir/mem", type=CHAR, rdev=(1, 1), mode=0o640),
        entry("dir/pipe", type=FIFO),
        entry("dir/file", b"x" * 1000, mode=0o6755, xattrs={"user.a": b"\x00\xff", "user.b": b"text"}),
        entry(
            "dir/same", type=HARDLINK, link="dir/file", mode=0o6755, xattrs={"user.a": b"\x00\xff", "user.b": b"text"}
        ),
        entry("to-dir", link="dir"),
        entry("to-file", link="/dir/file"),
        entry("to-nothing", link="../../gone"),
        entry("loop", link="loop"),
    )
    upper = tarball(
        entry("later/"), entry("later/deep/", mode=0o700), entry("later/deep/end", b"end\n", mtime=1_700_000_000)
    )
    write_layout(tmp_path / "odd", [base, upper])
    return str(tmp_path / "odd")


def json_lines(out: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


# -- ls ------------------------------------------------------------------------------------------------------------


def test_ls_lists_the_root_one_name_a_line(run: Run) -> None:
    assert run("ls", SAMPLE) == (0, b"bin\ndev\netc\nhome\nroot\nsrv\ntmp\nusr\nvar\n", "")


def test_ls_takes_paths_with_and_without_a_slash(run: Run) -> None:
    expected = (0, b"almanac.conf\n", "")
    for path in ("etc/almanac", "/etc/almanac", "//etc//almanac/", "/etc/../etc/./almanac"):
        assert run("ls", SAMPLE, path) == expected


def test_ls_long_is_what_ls_of_a_mount_shows(run: Run) -> None:
    status, out, err = run("ls", "-l", SAMPLE, "/srv/almanac")
    assert (status, err) == (0, "")
    assert out.decode() == (
        "-rw-r--r-- 1    0   0      26 2024-03-02 09:00 café.txt\n"
        "-rw-r--r-- 1    0   0 2097152 2024-03-02 09:00 index.db\n"
        "prw--w---- 1    0   0       0 2024-03-02 09:00 requests\n"
        "-rw-r--r-- 2 1000 100    4096 2024-03-02 09:00 table.bin\n"
        "-rw-r--r-- 2 1000 100    4096 2024-03-02 09:00 table.latest\n"
    )


def test_ls_long_shows_devices_setuid_links_and_raw_names(run: Run, odd: str) -> None:
    status, out, _ = run("ls", "-l", odd, "dir")
    assert status == 0
    assert out == (
        b"-rw-r--r-- 1 0 0     0 1970-01-01 00:00 empty\n"
        b"-rwsr-sr-x 2 0 0  1000 1970-01-01 00:00 file\n"
        b"crw-r----- 1 0 0 1,  1 1970-01-01 00:00 mem\n"
        b"-rw-r--r-- 1 0 0     1 1970-01-01 00:00 newline\nname\n"
        b"prw-r--r-- 1 0 0     0 1970-01-01 00:00 pipe\n"
        b"-rw-r--r-- 1 0 0     3 1970-01-01 00:00 raw\xff\n"
        b"-rwsr-sr-x 2 0 0  1000 1970-01-01 00:00 same\n"
        b"crw--w---- 1 0 0 4, 64 1970-01-01 00:00 tty\n"
    )


def test_ls_long_agrees_with_gnu_ls_on_the_same_tree(run: Run, odd: str, tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("owners and devices can be made by root only")
    assert run("cp", odd, "/", str(tmp_path / "copy")).status == 0
    for where in ("dir", "later"):
        words = ["ls", "-lnA", "--time-style=long-iso", "--quoting-style=literal", str(tmp_path / "copy" / where)]
        environment = {**os.environ, "LC_ALL": "C", "TZ": "UTC"}
        theirs = subprocess.run(words, env=environment, stdout=subprocess.PIPE, check=True).stdout
        ours = run("ls", "-l", odd, where).out
        # A directory's size is its file system's affair.
        strip = [line.split() for line in theirs.splitlines()[1:]], [line.split() for line in ours.splitlines()]
        for line in (*strip[0], *strip[1]):
            if line[0].startswith(b"d"):
                del line[4]
        assert strip[0] == strip[1]
        if where == "dir":
            assert theirs.partition(b"\n")[2] == ours


def test_ls_of_a_link_lists_the_directory_behind_it_but_not_with_l(run: Run, odd: str) -> None:
    assert run("ls", odd, "to-dir").out.startswith(b"empty\nfile\n")
    assert run("ls", "-l", odd, "to-dir").out == b"lrwxrwxrwx 1 0 0 3 1970-01-01 00:00 /to-dir -> dir\n"
    assert run("ls", "-l", odd, "to-dir/").out.startswith(b"-rw-r--r-- 1 0 0     0 1970-01-01 00:00 empty\n")


@pytest.mark.parametrize("name", ["to-file", "to-nothing", "loop"])
def test_ls_of_a_link_to_no_directory_lists_the_link(run: Run, odd: str, name: str) -> None:
    assert run("ls", odd, name) == (0, f"/{name}\n".encode(), "")


def test_ls_of_several_paths_puts_files_first_and_heads_directories(run: Run) -> None:
    assert run("ls", SAMPLE, "etc/almanac", "etc/motd", "home").out == (
        b"/etc/motd\n\n/etc/almanac:\nalmanac.conf\n\n/home:\nada\n"
    )


def test_ls_recursive_goes_down_parents_first(run: Run) -> None:
    assert run("ls", "-R", SAMPLE, "/home", "/usr/share").out == (
        b"/home:\nada\n\n/home/ada:\nnotes.txt\n\n/usr/share:\nthemes\n\n/usr/share/themes:\nsolar.conf\n"
    )


def test_ls_shows_dot_files_always_and_dots_when_asked(run: Run) -> None:
    assert run("ls", "--layer", "3", SAMPLE, "/etc/almanac").out == b".wh.token\n"
    assert run("ls", "-a", SAMPLE, "home").out == b".\n..\nada\n"
    assert run("ls", "-d", SAMPLE, "home").out == b"/home\n"


def test_ls_of_a_layer_and_of_the_first_layers(run: Run) -> None:
    assert run("ls", "--upto", "2", SAMPLE, "/etc/almanac").out == b"almanac.conf\ntoken\n"
    assert run("ls", f"oci:{SAMPLE}:latest#2", "/etc/almanac").out == b"almanac.conf\ntoken\n"
    assert run("ls", "--layer", "3", SAMPLE, "/usr/share").out == b".wh.doc\nthemes\n"


def test_ls_json_has_the_stable_fields(run: Run) -> None:
    status, out, err = run("ls", "--json", SAMPLE, "/usr/bin")
    assert (status, err) == (0, "")
    entries = json_lines(out)
    assert [one["path"] for one in entries] == ["/usr/bin/become", "/usr/bin/hello", "/usr/bin/listen"]
    listen = entries[2]
    assert isinstance(listen.pop("ino"), int)
    offset = listen.pop("layer_offset")
    assert listen == {
        "path": "/usr/bin/listen",
        "target": None,
        "type": "file",
        "mode": "0755",
        "uid": 0,
        "gid": 0,
        "size": 200,
        "mtime_ns": 1709370000000000000,
        "nlink": 1,
        "rdev": None,
        "xattrs": {"security.capability": "AQAAAgAEAAAAAAAAAAAAAAAAAAA="},
        "layer": 2,
    }
    tar = run("blob", SAMPLE, "2").out
    data = subprocess.run(["gzip", "-dc"], input=tar, stdout=subprocess.PIPE, check=True).stdout
    assert data[offset : offset + 4] == b"\x7fELF"


def test_ls_json_names_survive_a_round_trip_through_ascii(run: Run, odd: str) -> None:
    out = run("ls", "--json", odd, "/dir").out
    assert out.isascii()
    names = [os.fsencode(one["path"]) for one in json_lines(out)]
    assert b"/dir/raw\xff" in names
    assert b"/dir/newline\nname" in names
    assert b"raw\\udcff" in out


def test_ls_json_of_every_type(run: Run, odd: str) -> None:
    found = {one["path"]: one for one in json_lines(run("ls", "-R", "--json", odd).out)}
    assert {path: one["type"] for path, one in found.items() if path in ("/dir", "/dir/tty", "/dir/pipe", "/loop")} == {
        "/dir": "dir",
        "/dir/tty": "char",
        "/dir/pipe": "fifo",
        "/loop": "symlink",
    }
    assert found["/dir/tty"]["rdev"] == [4, 64]
    assert found["/to-nothing"]["target"] == "../../gone"
    assert found["/dir"]["mode"] == "1777"
    assert (found["/dir"]["uid"], found["/dir"]["gid"], found["/dir"]["mtime_ns"]) == (
        7,
        70000,
        1_700_000_000_500_000_000,
    )
    assert found["/dir/file"]["nlink"] == 2
    assert found["/dir/file"]["ino"] == found["/dir/same"]["ino"]
    assert found["/dir/file"]["xattrs"] == {"user.a": "AP8=", "user.b": "dGV4dA=="}
    assert found["/dir/empty"]["layer_offset"] is None
    assert (found["/dir"]["layer"], found["/later/deep/end"]["layer"]) == (1, 2)
    assert found["/dir/tty"]["mode"] == "0620"
    assert len(found) == 16


def test_ls_escapes_names_on_a_terminal_only(run: Run, odd: str) -> None:
    script = f"{' '.join(OCIFS)} ls -1 {odd} dir | cat; exec {' '.join(OCIFS)} ls -1 {odd} dir"
    assert run("index", odd).status == 0
    shown = subprocess.run(["script", "-qec", script, "/dev/null"], capture_output=True, check=True).stdout
    piped, terminal = shown.replace(b"\r\n", b"\n").split(b"tty\n")[:2]
    assert b"newline\nname\n" in piped
    assert b"newline\\nname\npipe\nraw\\xff\n" in terminal


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/etc/paswd", "/etc/paswd does not exist in the image; /etc has passwd"),
        ("/etc/none/at/all", "/etc/none/at/all does not exist in the image; the nearest that exists is /etc"),
        ("/etc/motd/x", "/etc/motd/x goes on below something that is not a directory; /etc/motd is not a directory"),
    ],
)
def test_a_path_that_does_not_exist_is_told_with_what_there_is(run: Run, path: str, message: str) -> None:
    assert run("ls", SAMPLE, path) == (3, b"", f"ocifs: {message}\n")


def test_one_of_several_paths_that_fails_does_not_hide_the_others(run: Run) -> None:
    status, out, err = run("ls", SAMPLE, "/nope", "/home")
    assert (status, out) == (3, b"/home:\nada\n")
    assert err == "ocifs: /nope does not exist in the image\n"


# -- references ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ([SAMPLE + "x"], 3, "no such file or directory"),
        ([f"oci:{SAMPLE}:none"], 3, "has no image 'none': it has latest"),
        (["--platform", "linux/s390x", SAMPLE], 3, "it has linux/amd64, linux/arm64/v8"),
        (["--upto", "4", SAMPLE], 2, "it has 3, counted from 1"),
        (["--layer", "0", SAMPLE], 2, "the image has 3, counted from 1"),
        (["/dev/null"], None, "/dev/null"),
    ],
)
def test_what_cannot_be_opened_is_told_with_what_there_is(
    run: Run, words: list[str], status: int | None, message: str
) -> None:
    found, out, err = run("ls", *words)
    assert out == b""
    assert found == status or (status is None and found in (3, 4, 5))
    assert err.startswith("ocifs: ")
    assert message in err


def test_a_cache_that_cannot_be_used_is_named(run: Run) -> None:
    status, _, err = run("ls", "--cache-dir", "/proc/nothing", SAMPLE)
    assert status == 6
    assert err.startswith("ocifs: cannot create the cache directory /proc/nothing: ")


def test_the_cache_is_where_the_option_says_or_the_environment(run: Run, tmp_path: Path) -> None:
    assert run("index", "--cache-dir", str(tmp_path / "one"), SAMPLE).status == 0
    assert len(list((tmp_path / "one/layers").iterdir())) == 3
    assert run("index", SAMPLE).status == 0
    assert len(list(Path(os.environ["OCIFS_CACHE_DIR"], "layers").iterdir())) == 3
    assert stat.S_IMODE((tmp_path / "one").stat().st_mode) == 0o700


# -- stat ----------------------------------------------------------------------------------------------------------


def test_stat_shows_everything_about_a_name(run: Run, odd: str) -> None:
    status, out, err = run("stat", odd, "dir/file")
    assert (status, err) == (0, "")
    lines = dict(line.split(":", 1) for line in out.decode().splitlines() if not line.startswith(" "))
    values = {key: value.strip() for key, value in lines.items()}
    assert values.pop("Layer").endswith(", entry 8")
    assert values.pop("Data").startswith("from layer offset ")
    assert values.pop("Inode").isdigit()
    assert values == {
        "File": "/dir/file",
        "Type": "regular file",
        "Size": "1000",
        "Mode": "6755 -rwsr-sr-x",
        "Owner": "0:0",
        "Modified": "1970-01-01 00:00:00.000000000 +0000",
        "Links": "2",
        "Attributes": "user.a=0x00ff",
    }
    assert out.decode().splitlines()[-1] == '            user.b="text"'


def test_stat_follows_the_last_link_only_when_asked(run: Run) -> None:
    (link,) = json_lines(run("stat", "--json", SAMPLE, "/bin").out)
    assert (link["path"], link["type"], link["target"]) == ("/bin", "symlink", "usr/bin")
    (there,) = json_lines(run("stat", "-L", "--json", SAMPLE, "/bin").out)
    assert (there["path"], there["type"], there["target"]) == ("/bin", "dir", None)
    (through,) = json_lines(run("stat", "--json", SAMPLE, "/bin/hello").out)
    assert through["type"] == "file"


def test_stat_of_the_root_and_of_a_device(run: Run) -> None:
    root, null = json_lines(run("stat", "--json", SAMPLE, "/", "dev/null").out)
    assert (root["path"], root["type"], root["layer"]) == ("/", "dir", 1)
    assert (null["type"], null["rdev"], null["size"]) == ("char", [1, 3], 0)


def test_stat_says_of_what_a_name_is_made_even_of_a_time_with_nanoseconds(run: Run) -> None:
    (audit,) = json_lines(run("stat", "--json", SAMPLE, "/var/log/audit.log").out)
    assert audit["mtime_ns"] == 1709456400123456789
    assert "2024-03-03 09:00:00.123456789 +0000" in run("stat", SAMPLE, "/var/log/audit.log").out.decode()


# -- cat -----------------------------------------------------------------------------------------------------------


def test_cat_writes_files_one_after_the_other(run: Run) -> None:
    status, out, err = run("cat", SAMPLE, "/etc/motd", "var/log/audit.log")
    assert (status, out, err) == (0, b"Welcome to the merged view of three layers.\ntoken removed\n", "")


def test_cat_shows_what_a_lower_layer_had(run: Run) -> None:
    assert run("cat", "--upto", "2", SAMPLE, "/etc/almanac/token").out == b"correct-horse-battery-staple\n"
    assert run("cat", SAMPLE, "/etc/almanac/token").status == 3


def test_cat_follows_links_inside_the_image_only(run: Run, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("of the host")
    layer = tarball(
        entry("up", link="../../../../etc/motd"),
        entry("out", link=str(secret)),
        entry("etc/motd", b"of the image"),
        entry("loop", link="loop"),
    )
    write_layout(tmp_path / "image", [layer])
    image = str(tmp_path / "image")
    assert run("cat", image, "up").out == b"of the image"
    status, out, err = run("cat", image, "out")
    assert (status, out) == (3, b"")
    assert "does not exist in the image" in err
    assert run("cat", image, "loop").status == 3


def test_cat_of_a_sparse_file_gives_its_zeros(run: Run) -> None:
    out = run("cat", SAMPLE, "/srv/almanac/index.db").out
    assert len(out) == 2 << 20
    assert out.startswith(b"head of the index\n\0\0")
    assert out[(1 << 20) - 512 :].startswith(b"tail of the index\n\0\0")
    assert out.count(0) == (2 << 20) - 36


def test_cat_of_a_large_file_is_flat_in_memory(run: Run, tmp_path: Path) -> None:
    size = 200 << 20
    write_layout(tmp_path / "image", [tarball(entry("zeros", bytes(size)))])
    assert run("index", str(tmp_path / "image")).status == 0
    # Not ru_maxrss: that starts with what the process had that started us.
    program = (
        "import sys; from ocifs.cli import main; status = main(sys.argv[1:]); "
        "peak = [line for line in open('/proc/self/status') if line.startswith('VmHWM')][0].split()[1]; "
        "print(peak, file=sys.stderr); sys.exit(status)"
    )
    words = ["cat", "--cache-memory", "8M", str(tmp_path / "image"), "zeros"]
    with (tmp_path / "out").open("wb") as out:
        done = subprocess.run([sys.executable, "-c", program, *words], stdout=out, stderr=subprocess.PIPE, check=True)
    assert (tmp_path / "out").stat().st_size == size
    assert int(done.stderr) * 1024 < size // 2


@pytest.mark.parametrize(
    ("path", "what"), [("/etc", "a directory"), ("/dev/null", "a device"), ("srv/almanac/requests", "a fifo")]
)
def test_cat_of_what_has_no_data_says_what_it_is(run: Run, path: str, what: str) -> None:
    status, out, err = run("cat", SAMPLE, path)
    assert (status, out) == (2, b"")
    assert err == f"ocifs: /{path.lstrip('/')} is {what}: only files have data to show\n"


def test_cat_goes_on_behind_a_failure_and_ends_with_the_worst(run: Run) -> None:
    status, out, err = run("cat", SAMPLE, "/etc/motd", "/nope", "/etc", "/etc/group")
    assert (status, out) == (3, b"Welcome to the merged view of three layers.\nroot:x:0:\nusers:x:100:\nada:x:1000:\n")
    assert err.count("\n") == 2


def test_cat_never_gives_wrong_bytes_of_a_blob_that_changed(run: Run, tmp_path: Path) -> None:
    digests = write_layout(tmp_path / "image", [tarball(entry("file", os.urandom(100_000)))])
    image = str(tmp_path / "image")
    assert run("index", image).status == 0
    flip(blob_path(tmp_path / "image", digests["layers"][0]), 50_000)
    status, out, err = run("cat", image, "file")
    assert (status, out) == (4, b"")
    assert err.startswith("ocifs: ")


# -- blob ----------------------------------------------------------------------------------------------------------


def test_blob_gives_documents_and_layers_as_they_are_stored(run: Run) -> None:
    inspected = json.loads(run("inspect", "--json", SAMPLE).out)
    for which, digest in (
        ("manifest", inspected["digest"]),
        ("config", inspected["config_digest"]),
        ("2", inspected["layers"][1]["digest"]),
        (inspected["layers"][2]["digest"], inspected["layers"][2]["digest"]),
    ):
        status, out, err = run("blob", SAMPLE, which)
        assert (status, err) == (0, "")
        assert "sha256:" + hashlib.sha256(out).hexdigest() == digest


def test_blob_that_is_none_is_not_found(run: Run) -> None:
    status, _, err = run("blob", SAMPLE, "4")
    assert status == 3
    assert "a layer from 1 to 3" in err


def test_blob_with_a_wrong_digest_shows_in_the_status_and_can_be_examined(run: Run, tmp_path: Path) -> None:
    digests = write_layout(tmp_path / "image", [tarball(entry("f", b"data"))])
    blob = blob_path(tmp_path / "image", digests["layers"][0])
    flip(blob, -1)
    status, out, err = run("blob", str(tmp_path / "image"), "1")
    assert (status, out) == (4, blob.read_bytes())
    assert "another digest" in err
    status, out, err = run("blob", "--examine", str(tmp_path / "image"), "1")
    assert (status, out) == (0, blob.read_bytes())
    assert "warning" in err


# -- inspect, layers, index ----------------------------------------------------------------------------------------


def test_inspect_tells_what_the_documents_say_and_reads_no_layer(run: Run) -> None:
    status, out, err = run("inspect", SAMPLE)
    assert (status, err) == (0, "")
    text = out.decode()
    for line in (
        f"Source:       OCI layout {SAMPLE}",
        "Name:         latest",
        "Platform:     linux/amd64",
        "Command:      /usr/bin/hello",
        "User:         ada",
        "Directory:    /srv/almanac",
        "Environment:  PATH=/usr/bin",
        "              ALMANAC_LANGUAGE=en",
        "Labels:       org.opencontainers.image.title=The ocifs sample image",
    ):
        assert line in text.splitlines()
    assert not Path(os.environ["OCIFS_CACHE_DIR"]).exists()


def test_inspect_json_has_documents_and_layers(run: Run) -> None:
    found = json.loads(run("inspect", "--json", "--platform", "linux/arm64", SAMPLE).out)
    assert found["platform"] == "linux/arm64/v8"
    assert [one["platform"] for one in found["platforms"]] == ["linux/amd64", "linux/arm64/v8"]
    assert [one["chosen"] for one in found["platforms"]] == [False, True]
    assert found["config"]["config"]["Cmd"] == ["/usr/bin/hello"]
    assert found["manifest"]["layers"][0]["digest"] == found["layers"][0]["digest"]
    assert [one["layer"] for one in found["layers"]] == [1, 2, 3]
    assert [one["created_by"] for one in found["layers"]][:2] == ["ADD base /", "COPY almanac /"]
    assert found["artifact"] is None
    assert found["warnings"] == []


def artifact(tmp_path: Path) -> str:
    """A Helm chart as registries keep it: a manifest whose configuration and layer are no file system's."""

    def change(manifest: dict[str, Any]) -> None:
        manifest["config"]["mediaType"] = "application/vnd.cncf.helm.config.v1+json"
        manifest["layers"][0]["mediaType"] = "application/vnd.cncf.helm.chart.content.v1.tar+gzip"
        manifest["layers"][0]["annotations"] = {"org.opencontainers.image.title": "chart.tgz"}

    write_layout(tmp_path / "chart", [tarball(entry("Chart.yaml", b"name: x\n"))], change_manifest=change)
    return str(tmp_path / "chart")


def test_an_artifact_is_shown_and_listed_and_its_blobs_can_be_read(run: Run, tmp_path: Path) -> None:
    chart = artifact(tmp_path)
    status, out, err = run("inspect", chart)
    assert (status, err) == (0, "")
    assert "not a root file system" in out.decode()
    assert "chart.tgz (application/vnd.cncf.helm.chart.content.v1.tar+gzip)" in out.decode()
    (layer,) = json_lines(run("layers", "--json", chart).out)
    assert layer["media_type"] == "application/vnd.cncf.helm.chart.content.v1.tar+gzip"
    assert layer["annotations"] == {"org.opencontainers.image.title": "chart.tgz"}
    assert layer["entries"] is None
    listed = subprocess.run(
        ["tar", "-tz"], input=run("blob", chart, "1").out, stdout=subprocess.PIPE, check=True
    ).stdout
    assert listed == b"Chart.yaml\n"
    assert run("ls", chart) == (0, b"chart.tgz\n", "")


def test_layers_tells_what_is_in_each(run: Run) -> None:
    status, out, err = run("layers", "--json", SAMPLE)
    assert (status, err) == (0, "")
    rows = json_lines(out)
    assert [(row["layer"], row["compression"], row["uncompressed_size"], row["entries"]) for row in rows] == [
        (1, "gzip", 30720, 28),
        (2, "gzip", 30720, 16),
        (3, "plain", 10240, 13),
    ]
    assert [row["media_type"].rpartition(".")[2] for row in rows] == ["tar+gzip", "tar+gzip", "tar"]
    assert rows[2]["digest"] == rows[2]["diff_id"]
    assert all(row["warnings"] == [] and row["damage"] is None and row["problem"] is None for row in rows)


def test_layers_prints_a_table(run: Run) -> None:
    lines = run("layers", SAMPLE).out.decode().splitlines()
    assert lines[0].split() == [
        "LAYER",
        "DIGEST",
        "DIFF",
        "ID",
        "MEDIA",
        "TYPE",
        "STORED",
        "TAR",
        "ENTRIES",
        "WARNINGS",
        "CREATED",
        "BY",
    ]
    assert [line.split()[0] for line in lines[1:]] == ["1", "2", "3"]
    assert lines[1].endswith("28         0  ADD base /")


def test_layers_shows_warnings_only_to_who_examines(run: Run, tmp_path: Path) -> None:
    write_layout(tmp_path / "image", [tarball(entry("v", type=b"V", data=b""), entry("f", b"x"))])
    image = str(tmp_path / "image")
    assert run("layers", image).err == ""
    status, _, err = run("layers", "--examine", image)
    assert status == 0
    assert "rule D8" in err
    assert json_lines(run("layers", "--json", image).out)[0]["warnings"][0]["rule"] == "D8"


def test_examination_warns_where_others_refuse(run: Run, tmp_path: Path) -> None:
    layer = tarball(entry("good", b"x"), entry("bad", type=HARDLINK, link="missing"))
    write_layout(tmp_path / "image", [layer])
    image = str(tmp_path / "image")
    status, out, err = run("ls", image)
    assert (status, out) == (4, b"")
    assert "H6" in err or "missing" in err
    status, out, err = run("ls", "--examine", image)
    assert (status, out) == (0, b"bad\ngood\n")
    assert "(rule H6)" in err
    status, out, _ = run("cat", "--examine", image, "good", "bad")
    assert (status, out) == (4, b"x")


def test_index_says_what_it_built_and_what_was_there(run: Run) -> None:
    first = run("index", SAMPLE).out.decode().splitlines()
    assert first[0].split()[:3] == ["IMAGE", "LAYER", "INDEX"]
    assert [line.split()[1:3] for line in first[1:]] == [
        ["1", "built"],
        ["2", "built"],
        ["3", "built"],
        ["tree", "built"],
    ]
    again = run("index", SAMPLE).out.decode().splitlines()
    assert [" ".join(line.split()[2:4]) for line in again[1:]] == ["there already"] * 4


def test_index_of_several_images_tells_of_those_that_it_could_index(run: Run, tmp_path: Path) -> None:
    missing = f"oci:{tmp_path}/missing"
    status, out, err = run("index", missing, SAMPLE)
    assert (status, err) == (3, f"ocifs: {tmp_path}/missing: No such file or directory\n")
    assert [line.split()[:3] for line in out.decode().splitlines()[1:]] == [
        [SAMPLE, "1", "built"],
        [SAMPLE, "2", "built"],
        [SAMPLE, "3", "built"],
        [SAMPLE, "tree", "built"],
    ]
    assert run("index", missing)[:2] == (3, b"")


def test_index_shares_layers_between_images(run: Run) -> None:
    assert run("index", SAMPLE).status == 0
    other = run("index", "--platform", "linux/arm64", SAMPLE).out.decode().splitlines()
    assert [line.split()[2] for line in other[1:]] == ["there", "built", "there", "built"]


# -- cache ---------------------------------------------------------------------------------------------------------


def test_cache_info_ls_gc_and_clear(run: Run) -> None:
    assert run("index", SAMPLE).status == 0
    info = json.loads(run("cache", "info", "--json").out)
    assert info["path"] == os.environ["OCIFS_CACHE_DIR"]
    assert {name: kind["entries"] for name, kind in info["kinds"].items()} == {
        "layers": 3,
        "trees": 1,
        "reframed": 0,
        "histories": 0,
        "archives": 0,
    }
    listed = json_lines(run("cache", "ls", "--json").out)
    assert sorted(one["kind"] for one in listed) == ["layers", "layers", "layers", "trees"]
    assert sum(one["size"] for one in listed) == info["bytes"]
    assert not any(one["in_use"] for one in listed)
    assert run("cache", "gc", "--max-size", "1G").out == b"removed 0 entries, 0 B\n"
    assert run("cache", "clear").out.startswith(b"removed 4 entries, ")
    assert json.loads(run("cache", "info", "--json").out)["bytes"] == 0
    assert run("ls", SAMPLE, "/home").out == b"ada\n"


def test_looking_at_a_cache_does_not_make_it(run: Run, tmp_path: Path) -> None:
    where = tmp_path / "not" / "there"
    info = json.loads(run("cache", "info", "--json", "--cache-dir", str(where)).out)
    assert (info["path"], info["bytes"]) == (str(where), 0)
    assert info["free"] > 0
    assert run("cache", "ls", "--json", "--cache-dir", str(where)) == (0, b"", "")
    assert not where.parent.exists()


def test_what_reads_documents_needs_no_cache(run: Run, tmp_path: Path) -> None:
    no_cache = ("--cache-dir", "/proc/nothing")
    assert json.loads(run("inspect", "--json", *no_cache, SAMPLE).out)["source"] == f"OCI layout {SAMPLE}"
    assert run("blob", *no_cache, SAMPLE, "manifest").out == run("blob", SAMPLE, "manifest").out
    archive = tmp_path / "image.tar.gz"
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(SAMPLE, "")
    assert run("inspect", str(archive)).status == 0
    status, out, err = run("inspect", *no_cache, str(archive))
    assert (status, out) == (6, b"")
    assert "choose another place with --cache-dir" in err


def test_cache_tables_are_for_people(run: Run) -> None:
    assert run("index", SAMPLE).status == 0
    info = run("cache", "info").out.decode()
    assert f"Path:   {os.environ['OCIFS_CACHE_DIR']}\n" in info
    assert "layer indexes" in info
    assert len(run("cache", "ls").out.splitlines()) == 5


# -- doctor --------------------------------------------------------------------------------------------------------


def test_doctor_finds_what_reading_needs(run: Run) -> None:
    status, out, err = run("doctor", "--json")
    assert (status, err) == (0, "")
    found = {one["name"]: one for one in json_lines(out)}
    needed = {name for name, one in found.items() if one["needed"]}
    assert needed == {"Python", "click", "isal", "msgspec", "rich", "zstandard", "cache"}
    assert all(found[name]["ok"] for name in needed)
    assert {"pyfuse3", "/dev/fuse", "fusermount3", "EROFS from a file", "overlayfs", "privileges"} <= set(found)
    assert all(one["advice"] for one in found.values() if not one["ok"])


def test_doctor_says_what_to_do_about_a_cache_that_cannot_be_used(run: Run) -> None:
    status, out, _ = run("doctor", "--cache-dir", "/proc/nothing")
    assert status == 6
    assert b"choose another place with --cache-dir or OCIFS_CACHE_DIR" in out


def test_index_examines_a_damaged_image_and_warns(tmp_path: Path) -> None:
    digests = write_layout(tmp_path / "image", [tarball(entry("file", b"x"))], compression="plain", tag="it")
    flip(blob_path(tmp_path / "image", digests["layers"][0]), 512)
    words = ["index", "--examine", "--cache-dir", str(tmp_path / "cache"), f"oci:{tmp_path}/image:it"]
    done = subprocess.run(
        [sys.executable, "-m", "ocifs", *words], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "has the wrong digest: expected sha256:" in done.stderr
    assert "tree  built" in done.stdout
