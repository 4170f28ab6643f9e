"""What breaks under a container: the image's blob, the daemon, the disk that its changes are written to.

Not here: how bundles begin and end (`tests/test_bundle_lifecycle.py`), the same faults under a plain mount
(`tests/test_mount_faults.py`).
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from tests.support.containers import bundled, in_container, mounted_in, name_of, needs_containers, running, write_image
from tests.support.mounting import Process, agent, ocifs, record_of, run
from tests.support.tarball import entry

pytestmark = needs_containers

LARGE = hashlib.shake_256(b"bundle").hexdigest(4 << 20).encode()
SUM = hashlib.sha256(LARGE).hexdigest()
GONE = {"EIO", "ENOTCONN", "ECONNABORTED"}


@pytest.fixture
def image(tmp_path: Path) -> str:
    return write_image(tmp_path / "image", entry("srv/large", LARGE))


@pytest.fixture
def box(tmp_path: Path) -> Path:
    return tmp_path / "box"


def test_below_a_container_an_altered_blob_reads_eio_and_writes_go_on(
    image: str, box: Path, tmp_path: Path, driver: str
) -> None:
    with bundled(image, box, "--driver", driver):
        blob = max((tmp_path / "image/blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
        before = blob.read_bytes()
        blob.write_bytes(bytes(len(before)))
        assert agent("sha256", box / "rootfs/srv/large") == "EIO"
        # Nothing of it is copied up either, and what is new is not touched by it.
        assert agent("errors", [["open", str(box / "rootfs/srv/large"), os.O_RDWR]]) == ["EIO"]
        assert not (box / "upper/srv/large").exists()
        (tmp_path / "new").write_text("new\n")
        assert run(["cp", str(tmp_path / "new"), str(box / "rootfs/srv/new")]).returncode == 0
        blob.write_bytes(before)
        assert agent("sha256", box / "rootfs/srv/large") == SUM
        assert in_container(box, "cat /srv/new; rm /srv/large; ls /srv") == (0, "new\ngone\nkept\nnew\n", "")


def test_under_a_running_container_the_daemon_may_be_killed(image: str, box: Path, driver: str) -> None:
    """Reads fail at once, so that the container ends; what it wrote is kept, and the bundle can be ended."""
    script = "echo mine > /srv/mine; echo up; read x; cat /srv/large > /dev/null"
    with bundled(image, box, "--driver", driver, arguments=("/bin/sh", "-c", script)):
        record = record_of(box / "lower")
        assert record is not None
        daemon = Process(record["pid"])
        words = ["runc", "run", "--bundle", str(box), name_of(box)]
        with running(words, until="up") as container:
            daemon.signal(9)
            assert daemon.gone()
            daemon.close()
            container.communicate("\n", timeout=60)  # what it still can depends on what the kernel kept; it ends
        assert agent("sha256", box / "rootfs/srv/large") in GONE
        assert (box / "upper/srv/mine").read_text() == "mine\n"
        done = ocifs("unbundle", box)
        assert (done.returncode, done.stderr) == (0, "")
        assert mounted_in(box) == []
        assert (box / "upper/srv/mine").read_text() == "mine\n"


def test_a_full_disk_below_a_container_is_its_own_affair(image: str, box: Path, tmp_path: Path, driver: str) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    assert run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=0700", "ocifs-test", str(place)]).returncode == 0
    try:
        with bundled(image, box, "--driver", driver, "--upper", str(place / "box")):
            status, out, err = in_container(box, "echo x >> /srv/large || echo no copy; echo y > /new && cat /new")
            assert (status, out) == (0, "no copy\ny\n"), err
            assert "No space left on device" in err
            assert agent("sha256", box / "rootfs/srv/large") == SUM
            assert ocifs("diff-upper", box).stdout == "C /\nA /new\n"
            done = ocifs("unbundle", box)
            assert (done.returncode, done.stderr) == (0, "")
    finally:
        run(["umount", "--lazy", str(place)])
