"""Bundles whose containers changed something: listed, committed, and mounted again as an image."""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.containers import bundled, in_container, needs_containers, write_image
from tests.support.layout import make_image, put_image
from tests.support.mounting import agent, mounted, ocifs, run
from tests.support.tarball import entry, tarball

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = needs_containers

SCRIPT = """
echo mine > /etc/motd; rm /srv/gone; mkdir -p /srv/new/deep; mv /srv/kept /srv/new/deep; ln /srv/new/deep/kept /root/same
rm -r /home/ada; mkdir /home/ada; ln -s /etc/motd /home/ada/link; touch /bin/new
echo more >> /etc/group; touch /etc/odd\\ name
"""

CHANGED = """\
C /bin  (mtime)
A /bin/new
C /etc  (mtime)
C /etc/group  (mtime, content)
C /etc/motd  (mtime, content)
A /etc/odd name
C /home  (mtime)
C /home/ada  (owner, mtime)
A /home/ada/link
C /root  (mtime)
A /root/same
C /srv  (mtime)
D /srv/gone
D /srv/kept
A /srv/new
A /srv/new/deep
A /srv/new/deep/kept
"""


def seen(root: Path) -> dict[str, Any]:
    """What is there, as another process sees it; without what file systems have each for themselves."""
    found = agent("walk", root)
    own = {"ino", "blksize", "blocks"}
    directories = {"nlink", "size"}
    return {
        path: {
            key: value
            for key, value in one.items()
            if key not in own | (directories if one["kind"] == "dir" else set())
        }
        for path, one in found.items()
    }


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_what_a_container_changed_is_an_image(tmp_path: Path, driver: str, compression: str) -> None:
    image, box = write_image(tmp_path / "image", root_mode=0o711), tmp_path / "box"
    with bundled(image, box, "--driver", driver):
        assert in_container(box, SCRIPT)[0] == 0
        listed = ocifs("diff-upper", "-l", box)
        assert (listed.returncode, listed.stderr, listed.stdout) == (0, "", CHANGED)
        done = ocifs("commit", "--compression", compression, box, f"oci:{tmp_path}/out:new")
        assert (done.returncode, done.stderr) == (0, "")
        shown = seen(box / "rootfs")
        # Mount points that the bundle shows are of no layer.
        only_mount_points = shown.keys() - seen_image(tmp_path, f"oci:{tmp_path}/out:new", driver, shown).keys()
        assert only_mount_points == {path for path in shown if path.split("/")[0] in {"proc", "dev", "sys"}}


def seen_image(tmp_path: Path, reference: str, driver: str, shown: dict[str, Any]) -> dict[str, Any]:
    """What a mount of the image shows; all of it is as in ``shown``."""
    with mounted(reference, tmp_path / "again", "--all-xattrs", driver=driver) as mount:
        found = seen(mount.path)
    assert {path: shown[path] for path in found} == found
    return found


def test_a_bundle_that_has_ended_can_be_committed_after_its_tag_has_moved(tmp_path: Path) -> None:
    image, box = write_image(tmp_path / "image"), tmp_path / "box"
    with bundled(f"{image}:latest", box):
        assert in_container(box, "echo one > /one")[0] == 0
        assert ocifs("unbundle", box).returncode == 0
        for _ in range(2):  # the second time the tag is the committed image
            done = ocifs("commit", "--timestamp", "1700000000", box, f"{image}:latest")
            assert (done.returncode, done.stderr) == (0, "")
            manifest = json.loads(ocifs("blob", f"{image}:latest", "manifest").stdout)
            assert len(manifest["layers"]) == 2
        put_image(tmp_path / "image", make_image([tarball(entry("other"))]), tag="other")
        assert ocifs("diff-upper", box).stdout == "C /\nA /one\n"
        assert ocifs("cat", f"{image}:latest", "/one").stdout == "one\n"


def test_a_bundle_that_was_renamed_is_read_where_it_is_now(tmp_path: Path) -> None:
    """Also when another has its old place."""
    image, box, elsewhere = write_image(tmp_path / "image"), tmp_path / "box", tmp_path / "elsewhere"
    with bundled(image, box):
        assert in_container(box, "echo one > /one")[0] == 0
        assert ocifs("unbundle", box).returncode == 0
    box.rename(elsewhere)
    with bundled(image, box):
        assert in_container(box, "echo two > /two")[0] == 0
        (tmp_path / "link").symlink_to(elsewhere)
        assert ocifs("diff-upper", tmp_path / "link").stdout == "C /\nA /one\n"
        assert ocifs("diff-upper", box).stdout == "C /\nA /two\n"


def test_a_bundle_is_read_whatever_its_tag_leads_to_now(tmp_path: Path) -> None:
    """Here to an image that cannot be opened."""
    image, box = write_image(tmp_path / "image"), tmp_path / "box"
    with bundled(f"{image}:latest", box):
        assert in_container(box, "echo one > /one")[0] == 0
        assert ocifs("unbundle", box).returncode == 0
        put_image(tmp_path / "image", make_image([b"no tar, and longer than a block" * 50]))
        index = json.loads((tmp_path / "image/index.json").read_bytes())
        del index["manifests"][0]["annotations"]
        (tmp_path / "image/index.json").write_text(json.dumps(index))
        assert ocifs("ls", f"{image}:latest").returncode == 4
        done = ocifs("diff-upper", box)
        assert (done.returncode, done.stderr, done.stdout) == (0, "", "C /\nA /one\n")


def test_a_bundle_whose_image_is_gone_says_so(tmp_path: Path) -> None:
    image, box = write_image(tmp_path / "image"), tmp_path / "box"
    with bundled(image, box):
        assert ocifs("unbundle", box).returncode == 0
        (tmp_path / "image").rename(tmp_path / "elsewhere")
        put_image(tmp_path / "image", make_image([tarball(entry("other"))]))
        done = ocifs("diff-upper", box)
        assert done.returncode == 3
        assert "is not the image of this bundle any more, and sha256:" in done.stderr


def test_a_bundle_says_itself_which_image_it_is_of(tmp_path: Path) -> None:
    done = ocifs("diff-upper", "--upto", "1", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "options that choose one need --image" in done.stderr


def test_a_read_only_bundle_has_no_changes(tmp_path: Path) -> None:
    image, box = write_image(tmp_path / "image"), tmp_path / "box"
    with bundled(image, box, "--read-only"):
        done = ocifs("diff-upper", box)
        assert (done.returncode, done.stderr) == (2, f"ocifs: {box} is read-only: nothing can have changed\n")


def test_changes_kept_elsewhere_and_in_memory(tmp_path: Path) -> None:
    image = write_image(tmp_path / "image")
    for name, options in (("kept", ("--upper", str(tmp_path / "place"))), ("memory", ("--ephemeral",))):
        with bundled(image, tmp_path / name, *options):
            assert in_container(tmp_path / name, "echo one > /root/one")[0] == 0
            assert ocifs("diff-upper", tmp_path / name).stdout == "C /root\nA /root/one\n"


@pytest.mark.skipif(shutil.which("umoci") is None, reason="umoci is not installed")
def test_umoci_makes_the_same_of_it(tmp_path: Path) -> None:
    image, box = write_image(tmp_path / "image"), tmp_path / "box"
    with bundled(image, box):
        assert in_container(box, SCRIPT)[0] == 0
        assert ocifs("commit", box, f"oci:{tmp_path}/out:new").returncode == 0
        assert run(["umoci", "unpack", "--image", f"{tmp_path}/out:new", tmp_path / "unpacked"]).returncode == 0
        shown, found = seen(box / "rootfs"), seen(tmp_path / "unpacked/rootfs")
        assert {path: shown[path] for path in found} == found
        assert os.path.samestat(
            *((tmp_path / "unpacked/rootfs" / path).stat() for path in ("root/same", "srv/new/deep/kept"))
        )
