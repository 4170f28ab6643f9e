"""Other programs that start something on a mount or a bundle, each as README.md says; those that are installed."""

from __future__ import annotations

import shutil
import tempfile
from typing import TYPE_CHECKING

import pytest

from tests.support.containers import bundled, needs_containers, write_image
from tests.support.mounting import Mount, mounted, run
from tests.support.tarball import DIR, SYMLINK, entry

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = needs_containers

SCRIPT = ["/bin/sh", "-c", "cat /etc/motd; echo mine > /etc/motd; cat /etc/motd"]
WRITTEN = "from the image\nmine\n"


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")


@pytest.fixture
def image(tmp_path: Path) -> str:
    directories = [
        entry(f"{name}/", type=DIR) for name in ("proc", "dev", "sys", "run", "tmp", "var", "usr", "usr/lib")
    ]
    more = (entry("etc/os-release", b"ID=test\n"), entry("etc/localtime", b""), entry("etc/resolv.conf", b""))
    return write_image(tmp_path / "image", *directories, *more, entry("lib", type=SYMLINK, link="usr/lib"))


@pytest.fixture
def mount(image: str, tmp_path: Path, driver: str) -> Iterator[Mount]:
    options = "suid,dev,allow_other" if driver == "fuse" else "suid,dev"
    with mounted(image, tmp_path / "mnt", "-o", options, driver=driver) as one:
        yield one


@needs("bwrap")
def test_bubblewrap_binds_a_mount(mount: Mount) -> None:
    done = run(["bwrap", "--ro-bind", str(mount.path), "/", "--proc", "/proc", "--dev", "/dev", *SCRIPT])
    assert done.stdout == "from the image\nfrom the image\n"
    assert "Read-only file system" in done.stderr


@needs("systemd-nspawn")
def test_nspawn_has_an_overlay_of_its_own(mount: Mount) -> None:
    words = ["systemd-nspawn", "-q", "-D", str(mount.path), "--volatile=overlay", "--register=no", "--keep-unit"]
    done = run([*words, *SCRIPT])
    assert (done.returncode, done.stdout) == (0, WRITTEN)


def podman(rootfs: str) -> tuple[int, str, str]:
    with tempfile.TemporaryDirectory() as place:  # podman takes no path over 50 characters for what it runs
        try:
            done = run(
                ["podman", "--root", f"{place}/root", "--runroot", f"{place}/run", "--cgroup-manager", "cgroupfs",
                 "--runtime", "runc", "run", "--rm", "--network", "none", "--ulimit", "nofile=1024:1024",
                 "--ulimit", "nproc=1024:1024", "--rootfs", rootfs, *SCRIPT]
            )  # fmt: skip
            return done.returncode, done.stdout, done.stderr
        finally:
            run(["umount", f"{place}/root/overlay"])


@needs("podman")
def test_podman_has_an_overlay_of_its_own(mount: Mount) -> None:
    assert podman(f"{mount.path}:O") == (0, WRITTEN, "")


@needs("podman")
def test_podman_writes_to_a_bundle(image: str, tmp_path: Path, driver: str) -> None:
    with bundled(image, tmp_path / "box", "--driver", driver):
        assert podman(str(tmp_path / "box" / "rootfs")) == (0, WRITTEN, "")
        assert (tmp_path / "box/upper/etc/motd").read_text() == "mine\n"


@needs("podman")
def test_podman_has_an_overlay_above_a_bundles(image: str, tmp_path: Path) -> None:
    with bundled(image, tmp_path / "box", "--driver", "fuse"):
        assert podman(f"{tmp_path / 'box' / 'rootfs'}:O") == (0, WRITTEN, "")
        assert not (tmp_path / "box/upper/etc").exists()
