"""What SECURITY.md says: that each of its sentences has a test, and those tests that have no better place.

Each is about a border: who is on the other side of it gets nothing.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from ocifs.daemon import runtime_dir
from ocifs.errors import MachineError
from tests.support.containers import bundled, in_container, needs_containers, ocifs_run, running, write_image
from tests.support.mounting import ROOT, mounted, records, run
from tests.support.ordinary_user import UID, needs_user_namespaces, ordinary_user
from tests.support.tarball import DIR, entry

SENTENCES = [
    sentence
    for section in re.split(r"\n## ", (ROOT / "SECURITY.md").read_text())[2:]
    for sentence in section.split("\n- ")[1:]
]


@pytest.mark.parametrize("sentence", SENTENCES, ids=lambda sentence: "_".join(sentence.split()[:6]))
def test_a_sentence_has_its_tests(sentence: str) -> None:
    named = re.findall(r"`(test_\w+)::(test_\w+)`", sentence)
    assert named
    for module, function in named:
        assert f"\ndef {function}(" in (ROOT / "tests" / f"{module}.py").read_text()


# -- a hostile image -----------------------------------------------------------------------------------------------

OTHER = ["setpriv", "--reuid", "4242", "--regid", "4242", "--clear-groups"]


@needs_containers
@pytest.mark.parametrize(("options", "says"), [("", "4242\n"), ("suid", "0\n")])
def test_a_set_user_id_file_gives_no_rights_on_a_mount_for_looking(
    tmp_path: Path, driver: str, options: str, says: str
) -> None:
    # Not busybox, which gives up what it was given.
    image = write_image(tmp_path / "image", entry("id", Path("/usr/bin/id").read_bytes(), mode=0o4755))
    words = ",".join(filter(None, (options, "allow_other" if driver == "fuse" else "noatime")))
    with mounted(image, tmp_path / "mnt", "-o", words, driver=driver) as mount:
        # From inside: the way there is for us alone.
        done = run(["sh", "-c", 'cd "$1" && shift && exec "$@"', "sh", str(mount.path), *OTHER, "./id", "-u"])
    assert (done.returncode, done.stdout) == (0, says)


@needs_containers
@pytest.mark.parametrize("options", [[], ["--read-only"], ["--ephemeral"]])
def test_what_containers_run_on_is_for_nobody_else(tmp_path: Path, options: list[str]) -> None:
    image, box = write_image(tmp_path / "image"), tmp_path / "box"
    script = 'cd "$1/.." && shift && exec "$@"'
    with bundled(image, box, *options):
        done = run(["sh", "-c", script, "sh", str(box), *OTHER, "cat", "box/rootfs/etc/motd", "box/config.json"])
        assert done.stdout == ""
        assert done.stderr.count("Permission denied") == 2
    with running([*ocifs_run(image), "/bin/sh", "-c", "echo up; cat"], until="up") as container:
        (record,) = [one for one in records() if f"/containers/ocifs-{container.pid}-" in one["mountpoint"]]
        place = Path(record["mountpoint"]).parents[1]
        assert {path.stat().st_mode & 0o777 for path in (place, *list(place.parents)[:2])} == {0o700}


# -- a hostile user ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o755, 0o701])
def test_a_runtime_directory_that_is_not_ours_alone_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    place = tmp_path / "run"
    monkeypatch.setenv("OCIFS_RUNTIME_DIR", str(place))
    assert runtime_dir() == place
    assert place.stat().st_mode & 0o777 == 0o700
    place.chmod(mode)
    with pytest.raises(MachineError, match=r"is none of yours alone \(mode 0700\); remove it or set XDG_RUNTIME_DIR"):
        runtime_dir()
    place.chmod(0o700)
    monkeypatch.setattr("os.geteuid", lambda: os.getuid() + 1)
    with pytest.raises(MachineError, match="is none of yours alone"):
        runtime_dir()
    place.rename(tmp_path / "elsewhere")
    place.symlink_to("elsewhere")
    monkeypatch.undo()
    monkeypatch.setenv("OCIFS_RUNTIME_DIR", str(place))
    with pytest.raises(MachineError, match="is none of yours alone"):
        runtime_dir()


# -- a hostile process in a container ------------------------------------------------------------------------------


@needs_containers
@pytest.mark.parametrize("options", [[], ["--read-only"], ["--net", "host"]])
def test_a_container_has_few_rights_and_sees_nothing_of_the_daemon(tmp_path: Path, options: list[str]) -> None:
    image = write_image(tmp_path / "image")
    script = (
        "echo up; read place; while read name value; do case $name in CapEff:|CapBnd:|CapAmb:|NoNewPrivs:) echo $value;;"
        "esac; done < /proc/self/status; echo /proc/[0-9]*; ls -d $place /run/ocifs /var/cache/ocifs 2>/dev/null; echo end"
    )
    with running([*ocifs_run(*options, image), "/bin/sh", "-c", script], until="up") as container:
        (record,) = [one for one in records() if f"/containers/ocifs-{container.pid}-" in one["mountpoint"]]
        out = container.communicate(f"{Path(record['log']).parent}\n")[0]
    # CAP_AUDIT_WRITE, CAP_NET_BIND_SERVICE, CAP_KILL
    assert out == "0000000020000420\n0000000020000420\n0000000000000000\n1\n/proc/1\nend\n"


@needs_containers
def test_a_container_cannot_change_its_image(tmp_path: Path, driver: str) -> None:
    image, box = write_image(tmp_path / "image"), tmp_path / "box"
    script = (
        "echo changed > /etc/motd; rm -r /srv /home /etc/passwd; mv /etc/group /g; ln /bin/busybox /b; cat /etc/motd"
    )
    before = {path: path.read_bytes() for path in (tmp_path / "image").rglob("*") if path.is_file()}
    with bundled(image, box, "--driver", driver):
        assert in_container(box, script) == (0, "changed\n", "")
        seen = run(["sh", "-c", 'cat "$1/etc/motd" && ls "$1"', "sh", str(box / "lower")]).stdout
        assert seen == "from the image\nbin\ndev\netc\nhome\nproc\nroot\nsrv\nsys\n"
    assert {path: path.read_bytes() for path in (tmp_path / "image").rglob("*") if path.is_file()} == before


@needs_containers
@needs_user_namespaces
@pytest.mark.parametrize("subordinate", [False, True])
def test_root_of_a_users_container_is_that_user(*, subordinate: bool) -> None:
    with ordinary_user(subordinate=subordinate) as user:
        image = write_image(user.home / "image", entry("mine/", type=DIR))
        script = "touch /mine/made; mkdir /mine/theirs/x; cat /mine/secret"
        (user.home / "shown").mkdir()
        (user.home / "shown").chmod(0o777)
        (user.home / "shown" / "secret").write_text("root's")
        (user.home / "shown" / "secret").chmod(0o600)
        (user.home / "shown" / "theirs").mkdir(mode=0o755)
        words = ocifs_run("-v", f"{user.home}/shown:/mine", image)
        done = run([*user.words, *words, "/bin/sh", "-c", script])
        assert (done.stdout, done.stderr.count("Permission denied")) == ("", 2)
        assert (user.home / "shown" / "made").stat().st_uid == UID
