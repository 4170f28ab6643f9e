"""Containers of ordinary users: in a user namespace where the kernel allows, and a clear sentence where not."""

from __future__ import annotations

import shlex
import shutil
from typing import TYPE_CHECKING

import pytest

from tests.support.containers import needs_containers, ocifs_run, running, write_image
from tests.support.mounting import command, patched, run
from tests.support.ordinary_user import UID, User, needs_user_namespaces, ordinary_user
from tests.support.tarball import DIR, entry

if TYPE_CHECKING:
    from collections.abc import Iterator


pytestmark = [needs_containers, needs_user_namespaces]


@pytest.fixture
def user() -> Iterator[User]:
    with ordinary_user() as one:
        yield one


def image_of(user: User) -> str:
    return write_image(user.home / "image", entry("srv/of-ada", b"hers\n", uid=1000, gid=1000))


def left_of(user: User) -> list[str]:
    """What is left of containers in the user's runtime directory."""
    return sorted(path.name for path in (user.home / "ocifs" / "containers").iterdir())


def test_a_user_runs_a_container_as_its_root(user: User) -> None:
    script = (
        "id -u; cat /etc/motd; echo mine > /etc/motd; cat /etc/motd; rm -r /root; mkdir /root; ls -a /root;"
        "stat -c '%n %u' /etc/passwd /srv/of-ada; exit 3"
    )
    done = run([*user.words, *ocifs_run(image_of(user)), "/bin/sh", "-c", script])
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout == "0\nfrom the image\nmine\n.\n..\n/etc/passwd 0\n/srv/of-ada 65534\n"
    assert left_of(user) == []


@pytest.mark.parametrize("options", [("--read-only",), ("--net", "host"), ("--net", "host", "--read-only")])
def test_a_user_has_the_options_of_root(user: User, options: tuple[str, ...]) -> None:
    words = ["/bin/sh", "-c", "id -u; ls -d /sys/class /proc/self"]
    done = run([*user.words, *ocifs_run(*options, image_of(user)), *words])
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n/proc/self\n/sys/class\n", "")


def test_a_user_who_is_not_mapped_gets_a_sentence(user: User) -> None:
    done = run([*user.words, *ocifs_run("-u", "ada", image_of(user)), "id"])
    assert done.returncode == 5
    assert done.stderr == (
        "ocifs: the container would run as 1000:1000, and in this user namespace there is only 0:0; "
        "say -u 0, or become root\n"
    )
    assert left_of(user) == []


@pytest.mark.skipif(shutil.which("newuidmap") is None, reason="newuidmap is not installed (package uidmap)")
def test_with_subordinate_ids_the_image_has_its_owners() -> None:
    with ordinary_user(subordinate=True) as user:
        script = "id -u; id -G; stat -c '%n %u' /srv/of-ada; echo x > /home/ada/x; stat -c %u /home/ada/x"
        done = run([*user.words, *ocifs_run("-u", "ada", image_of(user)), "/bin/sh", "-c", script])
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == "1000\n1000 10\n/srv/of-ada 1000\n1000\n"
        done = run([*user.words, *ocifs_run("-u", "70000", image_of(user)), "id"])
        assert (done.returncode, "there is only 0 to 65536" in done.stderr) == (5, True)


def test_what_a_killed_ocifs_has_left_is_cleared_away_by_the_next(user: User) -> None:
    image = image_of(user)
    script = "echo up; exec sleep 1000"
    with running([*user.words, *ocifs_run(image), "/bin/sh", "-c", script], until="up") as container:
        container.kill()
        container.wait(60)
        assert len(left_of(user)) == 1
        done = run([*user.words, *ocifs_run(image), "echo", "again"])
        assert (done.returncode, done.stdout) == (0, "again\n")
        assert left_of(user) == []
        done = run([*user.words, *command("ps")])
        assert done.stdout.count("\n") == 1, "a daemon goes on"


def test_without_user_namespaces_there_is_a_sentence(user: User) -> None:
    code = (
        "import ctypes, ocifs.bundle.namespace as n\n"
        "class Refusing:\n"
        "    def unshare(self, flags):\n        ctypes.set_errno(1)\n        return -1\n"
        "n._libc = Refusing()"
    )
    done = run([*user.words, *patched(code, "run", image_of(user))])
    assert done.returncode == 6
    assert done.stderr.startswith(
        "ocifs: an ordinary user gets no user namespace here (Operation not permitted); become"
    )
    assert done.stderr.count("\n") == 1


def test_a_user_makes_read_only_bundles(user: User) -> None:
    image, box = image_of(user), user.home / "box"
    done = run([*user.words, *command("bundle", image, box)])
    assert done.returncode == 6
    assert "only root can put a writable layer over an image; say --read-only, or use 'ocifs run'" in done.stderr
    assert not box.exists()


def test_such_a_bundle_runs_in_a_namespace_of_the_runtimes_own(user: User) -> None:
    image, box = image_of(user), user.home / "box"
    (user.home / "patch").write_text('{"process": {"terminal": false}}')
    make = [
        *command("bundle", "--read-only", "--config-patch", user.home / "patch", image, box),
        "/bin/sh",
        "-c",
        "id -u",
    ]
    start = ["runc", "--root", str(user.home / "runc"), "run", "--bundle", str(box), "test-of-a-user"]
    end = command("unbundle", "--delete", box)
    script = " && ".join(shlex.join(words) for words in (make, start, end))  # all in one mount namespace
    done = run([*user.words, "sh", "-c", script])
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")
    assert not box.exists()


def test_the_user_is_an_ordinary_one(user: User) -> None:
    assert run([*user.words, "id", "-u"]).stdout == f"{UID}\n"


def test_a_root_of_nobody_who_is_there_works(user: User) -> None:
    image = write_image(user.home / "other", entry("./", type=DIR, mode=0o755, uid=1000, gid=1000))
    done = run([*user.words, *ocifs_run(image), "/bin/sh", "-c", "touch /x && stat -c '%u %g' /x"])
    assert (done.returncode, done.stdout) == (0, "0 0\n")
    assert done.stderr == "ocifs: the container's root does not belong to 1000:1000: Invalid argument\n"


def test_a_root_of_another_mode_works(user: User) -> None:
    image = write_image(user.home / "other", entry("data/", type=DIR, mode=0o1777), root_mode=0o711)
    done = run([*user.words, *ocifs_run(image), "/bin/sh", "-c", "touch /data/x && stat -c %a /"])
    assert (done.returncode, done.stdout, done.stderr) == (0, "711\n", "")
