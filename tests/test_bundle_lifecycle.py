"""Bundles with real mounts and real containers: what is made, what is kept, and that nothing is left when it ends."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from ocifs.bundle.lifecycle import end_bundle
from ocifs.bundle.overlayfs import mount_overlay
from ocifs.bundle.state import load
from ocifs.errors import DamagedError, MachineError, NotFoundError, UnsupportedError
from tests.support.containers import (
    bundled,
    clear_away,
    config_of,
    in_container,
    mounted_in,
    name_of,
    needs_containers,
    runc,
    running,
    write_image,
)
from tests.support.mounting import Process, command, ocifs, patched, record_of, run
from tests.support.tarball import DIR, HARDLINK, entry

pytestmark = needs_containers


@pytest.fixture
def image(tmp_path: Path) -> str:
    return write_image(tmp_path / "image", root_mode=0o711)


@pytest.fixture
def box(tmp_path: Path) -> Path:
    return tmp_path / "box"


def gone(box: Path) -> bool:
    """Whether nothing is left of a bundle."""
    return not box.exists() and not mounted_in(box) and record_of(box / "lower") is None


# -- what is made --------------------------------------------------------------------------------------------------


def test_a_container_starts_and_writes_to_a_layer_of_its_own(image: str, box: Path, driver: str) -> None:
    with bundled(image, box, "--driver", driver):
        assert mounted_in(box) == ["lower", "rootfs"]
        assert (load(box).driver, load(box).read_only) == (driver, False)
        assert box.stat().st_mode & 0o777 == 0o700
        script = "cat /etc/motd; echo mine > /etc/motd; rm /srv/gone; mkdir /srv/new; mv /srv/kept /srv/new; ls -l /srv"
        status, out, err = in_container(box, script)
        assert (status, err) == (0, "")
        assert out.startswith("from the image\n")
        assert sorted(path.name for path in (box / "upper").iterdir()) == ["etc", "srv"]
        assert (box / "upper/etc/motd").read_text() == "mine\n"
        assert os.stat(box / "upper/srv/gone").st_rdev == 0
        assert ocifs("unbundle", box).returncode == 0
        assert not mounted_in(box)
        assert sorted(path.name for path in box.iterdir()) == ["config.json", "ocifs.json", "upper", "work"]
        assert (box / "upper/srv/new/kept").read_text() == "kept\n"
        assert ocifs("unbundle", box).returncode == 0  # there is nothing left to do
        assert ocifs("unbundle", "--delete", box).returncode == 0
        assert gone(box)


def test_a_read_only_root_without_mount_points_starts(image: str, box: Path, driver: str) -> None:
    with bundled(image, box, "--driver", driver, "--read-only", "-w", "/not/there", "-u", "ada"):
        assert mounted_in(box) == ["rootfs"]
        assert load(box).read_only
        script = "pwd; id -u; cat /etc/motd; ls -d /dev /not /proc /sys /proc/self/exe; echo x > /etc/motd"
        status, out, err = in_container(box, script)
        shown = ["/dev", "/not", "/proc", "/proc/self/exe", "/sys"]
        assert out.splitlines() == ["/not/there", "1000", "from the image", *shown]
        assert "Read-only file system" in err
        assert status == 1
        listed = ocifs("ls", image)
        assert listed.stdout.split() == ["bin", "etc", "home", "root", "srv"]
        assert ocifs("unbundle", "--delete", box).returncode == 0
        assert gone(box)


def test_a_read_only_root_has_devices_and_set_user_id_files(image: str, box: Path, driver: str) -> None:
    with bundled(image, box, "--driver", driver, "--read-only"):
        flags = run(["findmnt", "-n", "-o", "VFS-OPTIONS", str(box / "rootfs")]).stdout.strip().split(",")
        assert "ro" in flags
        assert not {"nosuid", "nodev"} & set(flags)


def test_the_lower_mount_of_an_overlay_has_neither(image: str, box: Path, driver: str) -> None:
    with bundled(image, box, "--driver", driver):
        flags = run(["findmnt", "-n", "-o", "VFS-OPTIONS", str(box / "lower")]).stdout.strip().split(",")
        assert {"ro", "nosuid", "nodev"} <= set(flags)


def test_others_of_the_container_read_what_only_root_has_mounted(image: str, box: Path, driver: str) -> None:
    with bundled(image, box, "--driver", driver, "-u", "1000:1000"):
        assert in_container(box, "cat /etc/motd; touch /home/ada/x && ls /home/ada") == (0, "from the image\nx\n", "")


def test_the_root_itself_is_as_in_the_image(image: str, box: Path) -> None:
    with bundled(image, box):
        assert in_container(box, "stat -c %a /") == (0, "711\n", "")


def test_ephemeral_changes_are_in_memory(image: str, box: Path) -> None:
    with bundled(image, box, "--ephemeral"):
        assert mounted_in(box) == ["lower", "memory", "rootfs"]
        assert load(box).ephemeral
        assert in_container(box, "echo x > /x; cat /x") == (0, "x\n", "")
        assert (box / "memory/upper/x").read_text() == "x\n"
        assert ocifs("unbundle", box).returncode == 0
        assert sorted(path.name for path in box.iterdir()) == ["config.json", "ocifs.json"]


def test_changes_kept_elsewhere_are_there_again(image: str, tmp_path: Path) -> None:
    place, first, second = tmp_path / "place", tmp_path / "first", tmp_path / "second"
    with bundled(image, first, "--upper", str(place)):
        assert load(first).upper == str(place / "upper")
        assert in_container(first, "echo kept > /x") == (0, "", "")
        other = ocifs("bundle", "--upper", place, image, second)
        assert other.returncode == 7
        assert other.stderr == f"ocifs: the changes in {place} are in use by the bundle at {first}\n"
        assert gone(second)
        assert ocifs("unbundle", "--delete", first).returncode == 0
    with bundled(image, second, "--upper", str(place)):
        assert in_container(second, "cat /x") == (0, "kept\n", "")
    assert (place / "upper/x").read_text() == "kept\n"


def test_changes_of_an_ended_bundle_are_there_again(image: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    with bundled(image, first):
        assert in_container(first, "echo kept > /x") == (0, "", "")
        other = ocifs("bundle", "--upper", first, image, second)
        assert other.stderr == f"ocifs: the changes in {first} are in use by the bundle at {first}\n"
        assert ocifs("unbundle", first).returncode == 0
    with bundled(image, second, "--upper", str(first)):
        assert in_container(second, "cat /x; echo more > /y") == (0, "kept\n", "")
    assert (first / "upper/y").read_text() == "more\n"


def test_nobody_else_gets_to_what_containers_write(image: str, box: Path, tmp_path: Path) -> None:
    """A set-user-ID file that a container makes lies in the upper directory, where its mode means what it says."""
    place = tmp_path / "place"
    place.mkdir(mode=0o755)
    with bundled(image, box, "--upper", str(place)):
        assert [path.stat().st_mode & 0o777 for path in (box, place)] == [0o700, 0o700]


@pytest.mark.parametrize("which", ["box", "place"])
def test_a_directory_of_somebody_else_is_refused(image: str, box: Path, tmp_path: Path, which: str) -> None:
    place, theirs = tmp_path / "place", tmp_path / which
    theirs.mkdir(mode=0o755)
    os.chown(theirs, 1234, 1234)
    done = ocifs("bundle", "--upper", place, image, box)
    assert done.returncode == 6
    assert done.stderr.startswith(f"ocifs: {theirs} belongs to the user with id 1234, who could run from it what only")
    assert (theirs.stat().st_mode & 0o777, list(theirs.iterdir())) == (0o755, [])


@pytest.mark.parametrize("content", [None, b"\xff\xfe", b"a kernel\n" * 100, b"sha256:"])
def test_a_directory_with_something_else_is_left_as_it_is(
    image: str, box: Path, tmp_path: Path, content: bytes | None
) -> None:
    place = tmp_path / "place"
    place.mkdir(mode=0o755)
    (place / "other" if content is None else place / "image").write_bytes(content or b"")
    done = ocifs("bundle", "--upper", place, image, box)
    message = f"ocifs: {place} is not empty (1 names) and holds no changes of a bundle\n"
    assert (done.returncode, done.stderr) == (7, message)
    assert (place.stat().st_mode & 0o777, len(list(place.iterdir()))) == (0o755, 1)
    assert gone(box)


def test_changes_of_another_image_are_refused(image: str, box: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    with bundled(image, box, "--upper", str(place)):
        digest = load(box).manifest
        assert ocifs("unbundle", "--delete", box).returncode == 0
    other = write_image(tmp_path / "other", entry("more", b"x"))
    done = ocifs("bundle", "--upper", place, other, box)
    assert done.returncode == 2
    assert f"{place} holds changes of another image, {digest}; over sha256:" in done.stderr
    assert gone(box)


def test_volumes_begin_with_what_the_image_has_there(tmp_path: Path, box: Path) -> None:
    more = (
        entry("data/", type=DIR, mode=0o1770, uid=1000, gid=10),
        entry("data/seed", b"seed\n", uid=1000),
        entry("empty/", type=DIR, mode=0o750, uid=1000),
    )
    image = write_image(tmp_path / "image", *more, User="ada", Volumes={"/data": {}, "/empty": {}, "/new/one": {}})
    with bundled(image, box):
        script = "cat /data/seed; touch /data/x /empty/y; stat -c '%n %a %u %g' /data /empty /new/one"
        expected = "seed\n/data 1770 1000 10\n/empty 750 1000 0\n/new/one 1777 0 0\n"
        status, out, err = in_container(box, script)
        assert (status, out.replace("/new/one 755", "/new/one 1777"), err) == (0, expected, "")
        assert list((box / "upper").iterdir()) == []


def test_arguments_and_options_are_in_the_configuration(image: str, box: Path, tmp_path: Path) -> None:
    (tmp_path / "host").mkdir()
    (tmp_path / "host" / "file").write_text("of the host\n")
    options = ("-e", "A=b", "-u", "ada", "-w", "/srv", "-v", f"{tmp_path}/host:/mnt/host:ro")
    arguments = ("/bin/sh", "-c", "env; pwd; id -G; cat /mnt/host/file; touch /mnt/host/x")
    with bundled(image, box, *options, arguments=arguments):
        done = runc(box)
        said = {"PATH=/bin", "HOME=/home/ada", "TERM=xterm", "A=b", "/srv", "1000 10", "of the host"}
        assert said <= set(done.stdout.splitlines())
        assert "Read-only file system" in done.stderr


def test_a_patch_has_the_last_word(image: str, box: Path, tmp_path: Path) -> None:
    patch = tmp_path / "patch"
    patch.write_text(json.dumps({"hostname": "box", "process": {"terminal": None, "args": ["/bin/cat", "/etc/motd"]}}))
    with bundled(image, box):
        pass
    assert ocifs("unbundle", "--delete", box).returncode == 0
    try:
        assert ocifs("bundle", "--config-patch", patch, image, box).returncode == 0
        assert config_of(box)["hostname"] == "box"
        assert runc(box).stdout == "from the image\n"
    finally:
        clear_away(box)


def test_rootless_is_for_a_user_namespace(image: str, box: Path) -> None:
    with bundled(image, box, "--rootless"):
        assert {"type": "user"} in config_of(box)["linux"]["namespaces"]
        assert in_container(box, "id -u; cat /etc/motd; echo x > /x; cat /x") == (0, "0\nfrom the image\nx\n", "")


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "the patch leaves no object of config.json"),
        ('{"mounts": [1]}', "the patch makes mounts or process of config.json something that no runtime takes"),
        ('{"mounts": [{"destination": 5}]}', "the patch makes mounts or process of config.json something"),
        ('{"process": 7}', "the patch makes mounts or process of config.json something"),
    ],
)
def test_a_patch_that_makes_no_sense_is_refused(
    image: str, box: Path, tmp_path: Path, patch: str, message: str
) -> None:
    (tmp_path / "patch").write_text(patch)
    done = ocifs("bundle", "--config-patch", tmp_path / "patch", image, box)
    assert done.returncode == 2
    assert message in done.stderr
    assert gone(box)


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["-e", "A"], 2, "-e 'A' is not NAME=VALUE"),
        (["-e", "=b"], 2, "-e '=b' is not NAME=VALUE"),
        (["-v", "/etc"], 2, "-v '/etc' is not HOST:CTR or HOST:CTR:ro, CTR beginning with a slash"),
        (["-v", "/etc:x"], 2, "-v '/etc:x' is not HOST:CTR"),
        (["-v", "/etc:/x:rx"], 2, "-v '/etc:/x:rx' is not HOST:CTR"),
        (["-v", "/no/such:/x"], 3, "-v '/no/such:/x': there is no /no/such on this machine"),
        (["-u", "eve"], 3, "the image has no user 'eve': /etc/passwd does not list it"),
        (["--read-only", "--ephemeral"], 2, "--read-only, --ephemeral and --upper exclude one another"),
        (["-v", "/etc:/"], 2, "-v '/etc:/' would hide the image: CTR is a directory below its root"),
        (["-v", "/etc://x/.."], 2, "-v '/etc://x/..' would hide the image"),
        (["--config-patch", "/no/such"], 3, "there is no patch /no/such"),
        (["--config-patch", "/"], 6, "cannot read the patch /: Is a directory"),
        (["--config-patch", "-"], 2, "the patch on standard input is not JSON: Expecting value"),
        (["-e", "A=\udcff"], 2, "config.json can hold UTF-8 only"),
        (["--rootless", "-u", "ada"], 5, "would run as 1000:1000, and in this user namespace there is only 0:0"),
    ],
)
def test_a_wrong_option_gets_a_sentence_and_leaves_nothing(
    image: str, box: Path, words: list[str], status: int, message: str
) -> None:
    done = ocifs("bundle", *words, image, box)
    assert done.returncode == status
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert gone(box)


def test_a_directory_in_use_is_refused(image: str, box: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    done = ocifs("bundle", image, tmp_path / "full")
    assert (done.returncode, "is not empty (1 names); a bundle needs a directory of its own" in done.stderr) == (
        7,
        True,
    )
    done = ocifs("bundle", image, tmp_path / "full" / "x")
    assert (done.returncode, "x is not a directory" in done.stderr) == (2, True)
    with bundled(image, box):
        done = ocifs("bundle", image, box)
        assert done.returncode == 7
        assert f"{box} is a bundle already; end and remove it with 'ocifs unbundle --delete {box}', or" in done.stderr
        assert mounted_in(box) == ["lower", "rootfs"]


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, NotFoundError, "is no bundle of ocifs: it has no ocifs.json"),
        ("{", DamagedError, "is not what ocifs wrote"),
        ('{"format": 2}', UnsupportedError, "has format 2; this ocifs knows 1"),
        ('{"format": 1}', DamagedError, "is not what ocifs wrote: Object missing required field"),
        ("[" * 100_000, DamagedError, "is not what ocifs wrote"),
    ],
)
def test_what_is_no_bundle_is_not_ended(box: Path, content: str | None, error: type[Exception], message: str) -> None:
    box.mkdir()
    if content is not None:
        (box / "ocifs.json").write_text(content)
    with pytest.raises(error, match=message):
        end_bundle(box, delete=True)
    assert box.exists()


# -- failures ------------------------------------------------------------------------------------------------------

STEPS = {
    "mount": "ocifs.bundle.lifecycle.mount_image",
    "tmpfs": "ocifs.bundle.overlayfs.mount_tmpfs",
    "root": "ocifs.bundle.lifecycle._copy_root",
    "overlay": "ocifs.bundle.overlayfs.mount_overlay",
    "config": "ocifs.bundle.lifecycle._write_config",
}


def failing(step: str, how: str) -> str:
    """Code after which a step of making a bundle does ``how`` instead."""
    module, _, name = STEPS[step].rpartition(".")
    imported = ".".join(module.split(".")[:3])
    return (
        "import os, signal\nfrom ocifs.errors import MachineError\n"
        f"import {imported}\ndef instead(*_, **__):\n    {how}\n{module}.{name} = instead"
    )


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    ("how", "status"),
    [
        ("raise MachineError('it does not work')", 6),
        ("os.kill(os.getpid(), signal.SIGTERM)", 143),
        ("os.kill(os.getpid(), signal.SIGINT)", 130),
    ],
    ids=["error", "SIGTERM", "SIGINT"],
)
def test_a_bundle_that_fails_leaves_nothing(image: str, box: Path, step: str, how: str, status: int) -> None:
    done = run(patched(failing(step, how), "bundle", "--ephemeral", image, box))
    try:
        assert done.returncode == status
        assert gone(box)
    finally:
        clear_away(box)


def test_of_two_that_make_a_bundle_of_one_directory_the_first_does(image: str, box: Path) -> None:
    """The second has found it empty, and must not take down with itself what the first has made."""
    code = (
        "import subprocess, ocifs.bundle.lifecycle as one\nplain = one._make\n"
        f"def second(*words):\n    subprocess.run({command('bundle', image, box)!r}, check=True)\n    return plain(*words)\n"
        "one._make = second"
    )
    try:
        done = run(patched(code, "bundle", image, box))
        assert (done.returncode, done.stderr) == (7, f"ocifs: {box} has just been made a bundle by another ocifs\n")
        assert sorted(path.name for path in box.iterdir()) == [
            *("config.json", "lower", "ocifs.json", "rootfs", "upper", "work")
        ]
        assert ocifs("unbundle", "--delete", box).returncode == 0
    finally:
        clear_away(box)


@pytest.mark.parametrize("step", STEPS)
def test_a_bundle_that_was_killed_can_be_cleared_away(image: str, box: Path, step: str) -> None:
    done = run(patched(failing(step, "os.kill(os.getpid(), signal.SIGKILL)"), "bundle", "--ephemeral", image, box))
    try:
        assert done.returncode == -signal.SIGKILL
        assert not (box / "config.json").exists()
        assert ocifs("unbundle", "--delete", box).returncode == 0
        assert gone(box)
    finally:
        clear_away(box)


def test_an_empty_directory_that_was_there_stays(image: str, box: Path) -> None:
    box.mkdir()
    assert run(patched(failing("overlay", "raise MachineError('no')"), "bundle", image, box)).returncode == 6
    assert list(box.iterdir()) == []


def test_a_bundle_whose_daemon_was_killed_is_ended(image: str, box: Path, driver: str) -> None:
    with bundled(image, box, "--driver", driver):
        record = record_of(box / "lower")
        assert record is not None
        daemon = Process(record["pid"])
        daemon.signal(signal.SIGKILL)
        assert daemon.gone()
        daemon.close()
        done = ocifs("unbundle", "--delete", box)
        assert (done.returncode, done.stderr) == (0, "")
        assert gone(box)


def test_a_bundle_is_not_ended_under_a_container(image: str, box: Path, driver: str) -> None:
    with bundled(image, box, "--driver", driver, arguments=("/bin/sh", "-c", "echo up; exec cat")):
        words = ["runc", "run", "--bundle", str(box), name_of(box)]
        with running(words, until="up") as container:
            done = ocifs("unbundle", "--delete", box)
            assert done.returncode == 7
            assert f"a container runs on {box}/rootfs: cat (pid " in done.stderr
            assert mounted_in(box) == ["lower", "rootfs"]
            assert container.communicate("still there\n", timeout=30)[0] == "still there\n"
            assert container.returncode == 0
        assert ocifs("unbundle", "--delete", box).returncode == 0
        assert gone(box)


@pytest.mark.parametrize("options", [[], ["--read-only"]])
def test_a_bundle_is_not_ended_under_a_shell_in_it(image: str, box: Path, options: list[str]) -> None:
    with (
        bundled(image, box, *options),
        running(["sh", "-c", "echo up; read x"], until="up", cwd=box / "rootfs") as shell,
    ):
        done = ocifs("unbundle", box)
        assert done.returncode == 7
        assert f"{box}/rootfs is in use by sh (pid {shell.pid}); end them first" in done.stderr


def test_writes_of_every_kind_work_and_nothing_is_stale(tmp_path: Path, box: Path, driver: str) -> None:
    """While a container has files open, the kernel forgets what it knows of the image, again and again."""
    tree = [entry(f"srv/tree/{name}", name.encode()) for name in ("a", "b")]
    image = write_image(tmp_path / "image", *tree, entry("srv/other", type=HARDLINK, link="srv/kept", mode=0o644))
    rounds = (
        "exec 3< /srv/kept; echo up; read x; cat /srv/tree/a; echo; "
        "read x; echo more >> /srv/other; cat /srv/kept /srv/other; "  # a hard link parts when it is written
        "read x; mv /srv/tree /srv/moved; ls /srv/moved; ls /srv; "  # a directory is copied instead of renamed
        "read x; rm -r /srv/moved; mkdir /srv/tree; ls -A /srv/tree; "  # an opaque directory
        "read x; ln /etc/motd /etc/same; echo mine > /etc/same; cat /etc/motd; cat <&3; "
        "read x; rm /srv/gone; echo again > /srv/gone; cat /srv/gone"
    )
    with bundled(image, box, "--driver", driver, arguments=("/bin/sh", "-c", rounds)):
        words = ["runc", "run", "--bundle", str(box), name_of(box)]
        with running(words, until="up") as container:
            assert container.stdin is not None
            for _ in range(6):
                Path("/proc/sys/vm/drop_caches").write_text("2")
                container.stdin.write("\n")
                container.stdin.flush()
            out, err = container.communicate(timeout=60)
        assert (container.returncode, err) == (0, "")
        assert out == "a\nkept\nkept\nmore\na\nb\ngone\nkept\nmoved\nother\nmine\nkept\nagain\n"


# -- overlays ------------------------------------------------------------------------------------------------------


def test_an_upper_directory_where_it_cannot_be_gets_a_sentence(image: str, tmp_path: Path) -> None:
    with bundled(image, tmp_path / "outer"):
        place = tmp_path / "outer/rootfs/place"
        done = ocifs("bundle", "--upper", place, image, tmp_path / "inner")
        assert done.returncode == 6
        assert f"{place}/upper is on overlay, which cannot keep changes; say --upper with a place on" in done.stderr
        assert gone(tmp_path / "inner")
        assert not place.exists()


def test_an_overlay_too_many_gets_a_sentence(image: str, box: Path, tmp_path: Path, driver: str) -> None:
    """The third file system that reads another one is refused; on a kernel that counts EROFS already the second."""
    above = [tmp_path / name for name in ("second", "third")]
    lower, refused = box / "rootfs", []
    with bundled(image, box, "--driver", driver):
        try:
            for place in above:
                for name in ("upper", "work", "target"):
                    (place / name).mkdir(parents=True)
                try:
                    mount_overlay(place / "target", lower=lower, upper=place / "upper", work=place / "work")
                except MachineError as error:
                    refused.append(str(error))
                lower = place / "target"
        finally:
            for place in reversed(above):
                run(["umount", str(place / "target")])
    assert refused
    assert len(refused) == 1 or driver == "erofs"
    assert "the kernel stacks 2 file systems at most, and" in refused[0]
    assert "--driver fuse needs one level less" in refused[0]


def test_a_bundle_behind_a_link_is_where_the_link_leads(image: str, tmp_path: Path, driver: str) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with bundled(image, tmp_path / "link" / "box", "--driver", driver):
        assert load(tmp_path / "link" / "box").lower == str(tmp_path / "real/box/lower")
        assert ocifs("unbundle", "--delete", tmp_path / "link" / "box").returncode == 0
        assert gone(tmp_path / "real" / "box")


def test_a_bundle_that_was_moved_is_ended_where_it_is(image: str, box: Path, tmp_path: Path, driver: str) -> None:
    moved = tmp_path / "moved"
    with bundled(image, box, "--driver", driver):
        box.rename(moved)
        try:
            assert in_container(moved, "cat /etc/motd") == (0, "from the image\n", "")
            assert ocifs("unbundle", "--delete", moved).returncode == 0
            assert gone(moved)
        finally:
            clear_away(moved)


@pytest.mark.parametrize("name", ["a,b", "a:b", "a\\b", "a b", "a\nb", "ä", "a=b'\""])
def test_any_name_of_a_bundle_works(image: str, tmp_path: Path, name: str) -> None:
    with bundled(image, tmp_path / name):
        assert in_container(tmp_path / name, "cat /etc/motd; echo x > /x") == (0, "from the image\n", "")
        assert (tmp_path / name / "upper/x").exists()
        assert ocifs("unbundle", "--delete", tmp_path / name).returncode == 0
        assert gone(tmp_path / name)
