"""What was changed in a bundle, committed, mounted again and compared: for generated trees, and for the image itself."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

from tests.soak.setting import compared, started
from tests.support import layout
from tests.support.mounting import mounted, ocifs, run
from tests.support.tarball import CHAR, DIR, HARDLINK, SYMLINK, entry, tarball

if TYPE_CHECKING:
    from pathlib import Path

    from tests.soak.setting import Setting

MOUNT_POINTS = ("proc", "dev", "sys")
"""What a bundle needs: were they not in the image, the bundle would show them and the layer not have them."""
CHANGES = 200
"""What is done to each generated tree; to the image ten times as much."""


def generate(path: Path, seed: int) -> str:
    """Write an image of a random tree in three layers, the upper ones with whiteouts; gives its reference."""
    order = random.Random(seed)
    directories = [f"d{number}/" for number in range(4)]
    files: list[str] = []
    layers = []
    for layer in range(3):
        entries = [entry(f"{name}/", type=DIR) for name in MOUNT_POINTS] + [
            entry(name, type=DIR) for name in directories
        ]
        for number in range(order.randrange(40, 120)):
            name = f"{order.choice(directories)}{layer}-{number}"
            match order.choice(["file", "file", "file", "directory", "link", "device", "gone"]):
                case "file":
                    data = order.randbytes(order.choice([0, 1, 511, 4096, 70_000]))
                    fields: dict[str, Any] = {"mode": order.randrange(0o1000), "uid": order.choice([0, 1000, 70_000])}
                    fields["mtime"] = order.randrange(2**31)
                    attributes = {"user.a": b"value"} if order.random() < 0.2 else {}
                    entries.append(entry(name, data, xattrs=attributes, **fields))
                    files.append(name)
                    if order.random() < 0.2:
                        entries.append(entry(f"{name} again", type=HARDLINK, link=name, **fields))
                case "directory":
                    directories.append(name + "/")
                    entries.append(entry(name + "/", type=DIR, mode=order.choice([0o755, 0o2775, 0o1777, 0o700])))
                case "link":
                    entries.append(entry(name, type=SYMLINK, link=order.choice(["/d0", "nowhere", "../x"])))
                case "device":
                    entries.append(entry(name, type=CHAR, rdev=(1, 3)))
                case "gone" if files and layer:
                    folder, _, last = files.pop(0).rpartition("/")
                    entries.append(entry(f"{folder}/.wh.{last}"))
                case _:
                    pass
        layers.append(tarball(*entries))
    layout.write_layout(path, layers, compression="gzip")
    return f"oci:{path}"


def round_trip(setting: Setting, driver: str, reference: str, seed: int, changes: int) -> int:
    """Change a bundle at random, commit, and compare what the new image shows, and umoci makes of it, with the bundle.

    Gives the number of changes that were made.
    """
    with setting.place("committed") as target:
        upper = target / "upper"
        with setting.over_the_image(driver, reference, upper) as box:
            with started("change", str(box / "rootfs"), str(seed), str(changes)) as churn:
                made, _ = churn.communicate(timeout=600)
            assert made.strip().isdecimal(), "what changes the tree has failed"
            assert int(made) > changes / 2, f"seed {seed}: only {made.strip()} of {changes} changes could be made"
            done = ocifs("unbundle", box)
            assert done.returncode == 0, done.stderr
        # Mounted afresh: over FUSE an overlay remembers of files that it copied up by which name it first knew them.
        with setting.over_the_image(driver, reference, upper) as box:
            commit(setting, driver, box, target, f"seed {seed}")
    return int(made)


def commit(setting: Setting, driver: str, box: Path, target: Path, which: str) -> None:
    """Commit a bundle, twice the same; what the new image shows, and umoci makes of it, must be what the bundle shows."""
    for tag in ("new", "again"):
        done = ocifs("commit", "--cache-dir", setting.cache, box, f"oci:{target}/image:{tag}", limit=600)
        assert done.returncode == 0, done.stderr
    assert _added(target / "image", 0) == _added(target / "image", 1), f"{which}: two commits made two layers"
    words = ("--all-xattrs", "-o", "dev,suid")
    with mounted(f"oci:{target}/image:new", target / "mnt", *words, driver=driver, cache=setting.cache):
        differences = compared(target / "mnt", box / "rootfs")
    assert not differences, f"{which}: the committed image differs from the bundle: {differences[:5]}"
    done = run(["umoci", "unpack", "--image", f"{target}/image:new", f"{target}/unpacked"], limit=900)
    assert done.returncode == 0, done.stderr
    differences = compared(target / "unpacked/rootfs", box / "rootfs")
    assert not differences, f"{which}: what umoci makes of it differs from the bundle: {differences[:5]}"


def _added(image: Path, number: int) -> str:
    """The digest of the uppermost layer of an image in a layout."""
    index = json.loads((image / "index.json").read_bytes())
    manifest = json.loads(layout.blob_path(image, index["manifests"][number]["digest"]).read_bytes())
    return str(manifest["layers"][-1]["digest"])


def commits(setting: Setting, driver: str) -> str:
    """Change bundles of generated trees and of the image at random, commit them, and mount and unpack what came of it."""
    with setting.place("generated") as place:
        images = [generate(place / str(seed), seed) for seed in range(setting.trees)]
        made = [round_trip(setting, driver, image, seed, CHANGES) for seed, image in enumerate(images)]
    made.append(round_trip(setting, driver, setting.reference, 0, 10 * CHANGES))
    return (
        f"{setting.trees} generated trees and the image, {sum(made)} changes: "
        "each committed image shows what its bundle showed, mounted and unpacked by umoci"
    )
