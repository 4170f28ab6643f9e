"""Mount points that an image lacks: in the tree that was asked for, from no layer, and in no other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ocifs import image, overlay
from ocifs.errors import NotFoundError
from ocifs.image import ImageOptions
from ocifs.overlay import LayerInput, MergeOptions
from ocifs.rootfs import view as look
from ocifs.rules import MountPoint
from ocifs.store import Store
from ocifs.tree import Kind, Node, Origin, Tree
from tests.support import layout
from tests.support.merging import layer, layer_input, nodes
from tests.support.tarball import DIR, SYMLINK, entry, tarball

if TYPE_CHECKING:
    from pathlib import Path

BASE = (
    entry("etc/", type=DIR, mode=0o700),
    entry("etc/file", data=b"x"),
    entry("run/", type=DIR, mtime=7),
    entry("var/run", type=SYMLINK, link="/run"),
    entry("up", type=SYMLINK, link="../../../run"),
    entry("nowhere", type=SYMLINK, link="/not/there"),
    entry("loop", type=SYMLINK, link="loop"),
)


def paths(tree: Tree) -> dict[str, Node]:
    return {path.decode(): node for path, node in nodes(tree.root)}


def added(*points: MountPoint) -> dict[str, Node]:
    """What the points add to the tree of `BASE`."""
    inputs: list[LayerInput] = [layer_input(layer(*BASE))]
    before = paths(overlay.merge(inputs))
    after = paths(overlay.merge([layer_input(layer(*BASE))], MergeOptions(mount_points=points)))
    assert before.keys() <= after.keys()
    return {path: node for path, node in after.items() if path not in before}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (b"/proc", ["proc"]),
        (b"/sys/fs/cgroup", ["sys", "sys/fs", "sys/fs/cgroup"]),
        (b"/etc", []),
        (b"/", []),
        (b"//proc/./x/..", ["proc", "proc/x"]),
        (b"/../../proc", ["proc"]),
        (b"/var/run/lock", ["run/lock"]),
        (b"up/lock", ["run/lock"]),
        (b"/nowhere", ["not", "not/there"]),
        (b"/nowhere/x", ["not", "not/there", "not/there/x"]),
        (b"/etc/file", []),
        (b"/etc/file/x", []),
        (b"/loop/x", []),
        (b"/etc/" + b"n" * 256, []),
    ],
)
def test_a_path_that_is_missing_is_made(path: bytes, expected: list[str]) -> None:
    assert list(added(MountPoint(path))) == expected


def test_what_is_made_is_from_no_layer_and_plain() -> None:
    made = added(MountPoint(b"/dev/shm"), MountPoint(b"/etc/hosts", directory=False))
    assert {path: (node.kind, node.mode) for path, node in made.items()} == {
        "dev": (Kind.DIR, 0o755),
        "dev/shm": (Kind.DIR, 0o755),
        "etc/hosts": (Kind.FILE, 0o644),
    }
    for node in made.values():
        assert node.origin == Origin(0, -1)
        assert (node.uid, node.gid, node.mtime_ns, node.size, node.xattrs) == (0, 0, 0, 0, ())


def test_other_views_do_not_show_it(tmp_path: Path) -> None:
    layout.write_layout(tmp_path / "image", [tarball(*BASE)])
    store = Store(tmp_path / "cache")
    reference = f"oci:{tmp_path / 'image'}"
    points = (MountPoint(b"/proc"), MountPoint(b"/etc/hosts", directory=False))
    try:
        for _ in range(2):  # from the layers, then from the cache
            with image.open_image(reference, store, ImageOptions(mount_points=points)) as opened:
                shown = look(opened)
                for path, kind in ((b"/proc", Kind.DIR), (b"/etc/hosts", Kind.FILE)):
                    ino = shown.resolve(path)
                    assert shown.inode(ino).kind is kind
                    assert opened.tree.origin(ino) == Origin(0, -1)
                assert shown.read_blocking(shown.resolve(b"/etc/hosts"), 0, 1) == b""
                assert opened.tree.origin(shown.resolve(b"/etc")) == Origin(1, 0)
            with image.open_image(reference, store, ImageOptions()) as opened, pytest.raises(NotFoundError):
                look(opened).resolve(b"/proc")
    finally:
        store.close()
