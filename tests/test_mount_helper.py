"""mount(8) and fstab: real mount commands with the helper in place, in a mount namespace that has it in /sbin.

Not here: what a mount is like (`test_mount_conformance`).
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ocifs.cli.fstab import split
from tests.support.command import OCIFS, SAMPLE
from tests.support.mounting import LIMIT, environment, records, run, why_not

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mount(8) of file systems needs root")

MOTD = "Welcome to the merged view of three layers.\n"


@pytest.fixture
def helper(tmp_path: Path) -> Path:
    """The helper, installed in a directory of its own."""
    path = tmp_path / "sbin" / "mount.fuse.ocifs"
    path.parent.mkdir()
    done = run([*OCIFS, "install-helper", path])
    assert (done.returncode, done.stderr) == (0, "")
    return path


def in_a_namespace(helper: Path, script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a shell script where /sbin has the helper; whatever it mounts ends with it."""
    sbin = os.path.realpath("/sbin")
    layers = f"lowerdir={helper.parent}:{sbin}"
    prepared = f"mount -t overlay -o {shlex.quote(layers)} overlay {sbin} || exit 99\n{script}"
    words = ["unshare", "--mount", "--propagation", "private", "sh", "-c", prepared, "sh", *arguments]
    return run(words, limit=LIMIT)


LOOK = 'findmnt -nro SOURCE,FSTYPE,OPTIONS "$1" && cat "$1/etc/motd" && umount "$1"'


def test_mount_with_a_type_mounts_and_findmnt_shows_source_and_options(helper: Path, place: Path) -> None:
    script = f'mount -t fuse.ocifs -o ro,noexec,allow_other "$2" "$1" && {LOOK}'
    done = in_a_namespace(helper, script, place, f"oci:{SAMPLE}:latest")
    assert (done.returncode, done.stderr) == (0, "")
    shown, _, content = done.stdout.partition("\n")
    source, kind, options = shown.split()
    assert (source, kind) == (f"oci:{SAMPLE}:latest", "fuse.ocifs")
    assert {"ro", "noexec", "nosuid", "nodev", "allow_other"} <= set(options.split(","))
    assert content == MOTD
    assert records() == [] or str(place) not in [one["mountpoint"] for one in records()]


def test_a_line_of_fstab_is_mounted_by_its_directory_alone(helper: Path, place: Path, tmp_path: Path) -> None:
    options = "ro,noauto,nofail,_netdev,user,x-systemd.automount,x-systemd.idle-timeout=60,cache_dir=" + str(
        tmp_path / "own cache"
    ).replace(" ", "\\040")
    fstab = tmp_path / "fstab"
    fstab.write_text(f"oci:{SAMPLE}:latest {place} fuse.ocifs {options} 0 0\n")
    script = f'mount -T "$2" -a && ! mountpoint -q "$1" && mount -T "$2" "$1" && {LOOK}'
    done = in_a_namespace(helper, script, place, fstab)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(MOTD)
    assert (tmp_path / "own cache" / "layers").is_dir()


AUTOMOUNT = """
import fcntl, os, struct, subprocess, sys
how, place, *mount = sys.argv[1:]
told, tell = os.pipe()
os.set_inheritable(tell, True)
# Whoever serves autofs, and its group, sees what lies below.
serving = os.getpgrp() if how == "looked at" else subprocess.Popen(["sleep", "100"], start_new_session=True).pid
options = f"fd={tell},pgrp={serving},minproto=5,maxproto=5,direct"
subprocess.run(["mount", "-t", "autofs", "-o", options, "systemd-1", place], check=True, close_fds=False)
os.close(tell)
if how == "by hand":
    status = subprocess.run([*mount, place]).returncode
    os.kill(serving, 9)
    sys.exit(status or subprocess.run(["cat", f"{place}/etc/motd"]).returncode)
root = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
reader = subprocess.Popen(["cat", f"{place}/etc/motd"], start_new_session=True)
token = struct.unpack_from("=iiI", os.read(told, 4096))[2]
status = subprocess.run([*mount, place]).returncode
fcntl.ioctl(root, 0x9361 if status else 0x9360, token)
sys.exit(reader.wait() or status)
"""
"""What systemd.automount(5) does (Documentation/filesystems/autofs.rst of the kernel, linux/auto_fs.h): somebody looks into
the directory and waits until the mount command has ended. Or somebody runs that before anybody has looked."""


@pytest.mark.skipif(
    "\tautofs\n" not in Path("/proc/filesystems").read_text("ascii"), reason="this kernel has no autofs"
)
@pytest.mark.parametrize("how", ["looked at", "by hand"])
def test_an_automount_is_mounted(helper: Path, place: Path, driver: str, how: str) -> None:
    mount = f'"$2" -c "$3" "{how}" "$1" mount -t fuse.ocifs -o ro,driver={driver} "$4"'
    done = in_a_namespace(helper, f'{mount}; umount "$1"; umount "$1"', place, sys.executable, AUTOMOUNT, SAMPLE)
    assert (done.returncode, done.stdout, done.stderr) == (0, MOTD, "")


@pytest.mark.skipif(why_not("erofs") != "", reason=why_not("erofs"))
def test_the_kernels_driver_is_used_when_it_is_named(helper: Path, place: Path) -> None:
    script = f'mount -t fuse.ocifs -o ro,driver=erofs "$2" "$1" && {LOOK}'
    done = in_a_namespace(helper, script, place, SAMPLE)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split()[1] == "erofs"


def test_options_of_the_view_are_options_of_the_mount(helper: Path, place: Path) -> None:
    script = 'mount -t fuse.ocifs -o ro,layer=3,cache_memory=1M "$2" "$1" && ls "$1/usr/share" -A && umount "$1"'
    done = in_a_namespace(helper, script, place, SAMPLE)
    assert (done.returncode, done.stdout.split()) == (0, [".wh.doc", "themes"])
    script = 'mount -t fuse.ocifs -o ro,examine=visible "$2" "$1" && ls -d "$1/".o* && umount "$1"'
    done = in_a_namespace(helper, script, place, SAMPLE)
    assert (done.returncode, done.stdout) == (0, f"{place}/.ocifs\n")


@pytest.mark.parametrize(
    ("options", "status", "says"),
    [
        ("ro,frobnicate", 1, "'frobnicate' is not known"),
        ("ro,frob=1,noexec", 1, "'frob=1' is not known"),
        ("ro,examine=all", 1, "--examine=all is not known"),
        ("ro,layer=three", 1, "'layer=three' wants a number"),
        ("ro,layer=1,upto=2", 1, "give one of them"),
        ("ro,layers=3", 1, "exec, follow_dirlinks, layer=, namespace=, noatime,"),
        ("ro,driver=loop", 1, "'driver=loop' wants one of auto, erofs, fuse"),
        ("ro,driver=erofs,allow_other", 1, "the option allow_other is FUSE's"),
        ("ro,remount", 1, "'remount' makes no sense"),
        ("ro,sync", 1, "'sync' makes no sense"),
    ],
)
def test_what_cannot_be_is_refused_by_name(helper: Path, place: Path, options: str, status: int, says: str) -> None:
    done = in_a_namespace(
        helper,
        'mount.fuse.ocifs "$2" "$1" -o "$3"; s=$?; mountpoint -q "$1" && exit 98; exit $s',
        place,
        SAMPLE,
        options,
    )
    assert (done.returncode, done.stdout) == (status, "")
    assert says in done.stderr
    assert done.stderr.startswith("ocifs: ")
    assert done.stderr.count("\n") == 1


def test_mount_gives_the_status_and_the_words_of_a_refusal(helper: Path, place: Path) -> None:
    done = in_a_namespace(helper, 'mount -t fuse.ocifs -o ro,frobnicate "$2" "$1"', place, SAMPLE)
    assert done.returncode == 1
    assert "'frobnicate' is not known" in done.stderr
    done = in_a_namespace(helper, 'mount -t fuse.ocifs -o ro "$2" "$1"', place, f"oci:{SAMPLE}:nope")
    assert done.returncode == 32
    assert "has no image 'nope'" in done.stderr


def test_sloppy_passes_over_what_is_not_known(helper: Path, place: Path) -> None:
    done = in_a_namespace(helper, f'mount -s -t fuse.ocifs -o ro,frobnicate "$2" "$1" && {LOOK}', place, SAMPLE)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("options", [["-o", "rw"], []], ids=["rw", "nothing"])
def test_without_ro_it_is_mounted_read_only_with_a_warning_as_a_write_protected_disk_is(
    helper: Path, place: Path, options: list[str]
) -> None:
    script = 'd=$1; shift; mount -t fuse.ocifs "$@" "$d" && findmnt -nro OPTIONS "$d" && umount "$d"'
    done = in_a_namespace(helper, script, place, *options, SAMPLE)
    assert done.returncode == 0
    assert "ro" in done.stdout.strip().split(",")
    assert "write-protected, mounted read-only" in done.stderr


def test_a_fake_mount_mounts_nothing_but_looks_at_the_words(helper: Path, place: Path) -> None:
    done = in_a_namespace(helper, 'mount -f -t fuse.ocifs -o ro "$2" "$1" && ! mountpoint -q "$1"', place, SAMPLE)
    assert (done.returncode, done.stderr) == (0, "")
    assert in_a_namespace(helper, 'mount -f -t fuse.ocifs -o x "$2" "$1"', place, SAMPLE).returncode == 1


def test_the_helper_is_found_to_be_ours_before_it_is_replaced_or_removed(tmp_path: Path) -> None:
    path = tmp_path / "mount.fuse.ocifs"
    path.write_text("#!/bin/sh\n")
    for words in ([], ["--remove"]):
        done = run([*OCIFS, "install-helper", *words, path])
        assert (done.returncode, path.read_text()) == (7, "#!/bin/sh\n")
        assert "--force" in done.stderr
    assert run([*OCIFS, "install-helper", "--force", path]).returncode == 0
    assert os.access(path, os.X_OK)
    assert run([*OCIFS, "install-helper", path]).returncode == 0
    assert run([*OCIFS, "install-helper", "--remove", path]).returncode == 0
    assert list(tmp_path.iterdir()) == []
    assert run([*OCIFS, "install-helper", "--remove", path]).returncode == 0
    assert run([*OCIFS, "install-helper", tmp_path / "missing" / "x"]).returncode == 6


def test_the_helper_loads_nothing_from_where_mount_is_run(helper: Path, tmp_path: Path) -> None:
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    for name in ("click", "ocifs", "re", "dataclasses"):
        (hostile / f"{name}.py").write_text(f"open({str(tmp_path / 'run')!r}, 'a').write({name!r})\n")
    subprocess.run([helper, "--help"], cwd=hostile, env=environment(), stdout=subprocess.DEVNULL, check=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        (("ro,noexec", "suid"), ["ro", "noexec", "suid"]),
        (("rw,noexec,,nofail,",), ["rw", "noexec", "nofail"]),
        (('cache_dir="/a,b",ro',), ["cache_dir=/a,b", "ro"]),
        (('a="b',), ["a=b"]),
        ((), []),
        (("",), []),
    ],
)
def test_options_are_taken_apart_as_mount_puts_them_together(groups: tuple[str, ...], expected: list[str]) -> None:
    assert split(groups) == expected
