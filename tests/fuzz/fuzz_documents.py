"""Fuzzes what the sources read: ``python -m tests.fuzz.fuzz_documents --seconds 600``.

The property, `check`: whatever is in documents, archives and containerd's database, listing, choosing and opening gives
values or an `OcifsError` of one line, and ends. Good images are written, then structures and bytes in them are changed:
a value in a document becomes another one (and the digests that lead to it are made to fit, so that the change is
believed), bytes of an archive or database become others. Cases are numbered: a failure names its number, and
``--first N --cases 1`` repeats it. Not here: tar headers (`tests.fuzz.fuzz_tar`), what the right answer is.
"""

from __future__ import annotations

import copy
import json
import os
import random
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any, Final

from ocifs.errors import OcifsError
from ocifs.reference import Selector, parse
from ocifs.sources import Source, open_source
from ocifs.spec import Digest, Platform
from tests.fuzz.cases import run_cases
from tests.support.bolt import containerd_database
from tests.support.layout import (
    OCI_INDEX,
    OCI_MANIFEST,
    REF_NAME,
    add_to_layout,
    archive_directory,
    make_image,
    sha256,
    write_docker_archive,
)

AMD64: Final = Platform("linux", "amd64")
_WORDS: Final = (
    "mediaType size digest data urls platform manifests layers config annotations schemaVersion os architecture rootfs "
    "diff_ids type history Env Cmd Labels subject fsLayers artifactType variant os.features Config Layers RepoTags"
)
WORDS: Final = _WORDS.split()
VALUES: Final[tuple[Any, ...]] = (
    None,
    True,
    0,
    -1,
    2**63 - 1,
    2**63,
    2**70,
    1.5,
    "",
    "\0",
    "../../etc/passwd",
    "\x1b[2J\n",
    "x" * 5000,
    [],
    {},
    [[]],
    [None],
    {"a": {}},
    OCI_INDEX,
    OCI_MANIFEST,
    "sha256:" + "a" * 64,
    "sha512:" + "b" * 128,
    "blake3:" + "c" * 64,
    "sha256:",
    "layers",
    "linux",
    "unknown",
    "application/vnd.oci.image.layer.v1.tar+gzip+encrypted",
    "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
    "application/vnd.docker.distribution.manifest.v1+json",
)


def places(document: Any) -> list[tuple[Any, Any]]:
    """List every (container, key) in a document."""
    found: list[tuple[Any, Any]] = []
    stack = [document]
    while stack:
        container = stack.pop()
        keys = list(container) if isinstance(container, dict) else range(len(container))
        for key in keys:
            found.append((container, key))
            if isinstance(container[key], dict | list):
                stack.append(container[key])
    return found


def change(rng: random.Random, document: Any) -> Any:
    """Change some values of a document, in a copy."""
    changed = copy.deepcopy(document)
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        found = places(changed)
        if not found:
            return rng.choice(VALUES)
        container, key = rng.choice(found)
        value = copy.deepcopy(rng.choice((*VALUES, container[key], rng.choice(found)[0])))
        match rng.randrange(5):
            case 0:
                del container[key]
            case 1 if isinstance(container, dict):
                container[rng.choice(WORDS)] = value
            case 2 if isinstance(container, list):
                container += [value] * rng.choice((1, 3, 200))
            case _:
                container[key] = value
    return changed if rng.random() < 0.98 else rng.choice(VALUES)


def dump(rng: random.Random, document: Any) -> bytes:
    """Write a document, sometimes not quite."""
    raw = json.dumps(document).encode()
    if rng.random() < 0.1:
        raw = damage(rng, raw)
    return raw if rng.random() > 0.005 else b'{"x":' * rng.choice((10, 100_000)) + raw


def damage(rng: random.Random, raw: bytes) -> bytes:
    """Change, cut or repeat some bytes."""
    changed = bytearray(raw)
    for _ in range(rng.choice((1, 1, 3, 10))):
        offset = rng.randrange(len(changed) or 1)
        noise = rng.choice((rng.randbytes(rng.choice((1, 4, 8))), b"\0" * 8, b"\xff" * 8, b"\x7f" * 4))
        changed[offset : offset + len(noise)] = noise
    return bytes(changed[: rng.randrange(len(changed))] if rng.random() < 0.1 else changed)


def write_case(rng: random.Random, directory: Path) -> str:
    """Write a changed image in some form; give its reference."""
    image = make_image([b"1" * 1000, b"2" * 600], compression=rng.choice(("plain", "gzip")))
    form = rng.choice(("oci", "oci-archive", "docker-archive", "containerd", "dir"))
    if form == "docker-archive":
        image.config_raw = dump(rng, change(rng, image.config))
        write_docker_archive(
            directory / "a.tar",
            [image, image],
            names=[["a:1"], None],
            style=rng.choice(("skopeo", "legacy", "hardlink")),
            change_manifest=lambda manifest: dump(rng, change(rng, manifest)),
        )
        spoil(rng, directory / "a.tar")
        return f"docker-archive:{directory}/a.tar"
    layout = directory if form != "containerd" else directory / "io.containerd.content.v1.content"
    config = dump(rng, change(rng, image.config))
    image.manifest["config"] |= {"digest": sha256(config), "size": len(config)}
    manifest = dump(rng, change(rng, image.manifest))
    platform = rng.choice(({"os": "linux", "architecture": "amd64"}, None))
    inner = {"mediaType": OCI_MANIFEST, "digest": sha256(manifest), "size": len(manifest), "platform": platform}
    index = dump(rng, change(rng, {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [inner, inner]}))
    outer = {"mediaType": OCI_INDEX, "digest": sha256(index), "size": len(index), "annotations": {REF_NAME: "v1"}}
    if form == "dir":
        for name, data in {
            "manifest.json": rng.choice((index, manifest)),
            f"{sha256(manifest)[7:]}.manifest.json": manifest,
            sha256(config)[7:]: config,
            **{digest[7:]: blob for digest, blob in image.blobs.items()},
        }.items():
            (directory / name).write_bytes(data)
        return f"{directory}" if rng.random() < 0.5 else f"dir:{directory}"
    add_to_layout(layout, [config, manifest, index, *image.layers], [rng.choice((inner, outer)), outer])
    if form == "containerd":
        meta = directory / "io.containerd.metadata.v1.bolt" / "meta.db"
        meta.parent.mkdir()
        entries = {f"name{number}": (OCI_INDEX, sha256(index), len(index)) for number in range(rng.choice((1, 30)))}
        meta.write_bytes(containerd_database({"default": entries}, page_size=1024))
        spoil(rng, meta)
        return f"{directory}"
    if rng.random() < 0.5:
        (layout / "index.json").write_bytes(dump(rng, change(rng, json.loads((layout / "index.json").read_bytes()))))
    if form == "oci":
        return f"oci:{directory}"
    archive_directory(directory / "a.tar", layout)
    spoil(rng, directory / "a.tar")
    return f"oci-archive:{directory}/a.tar"


def spoil(rng: random.Random, path: Path) -> None:
    """Damage a file's bytes in some of the cases."""
    if rng.random() < 0.5:
        path.write_bytes(damage(rng, path.read_bytes()))


def check(rng: random.Random, directory: Path) -> None:
    """Assert the property for one case."""
    text = write_case(rng, directory)
    try:
        with closing(open_source(parse(text), root=os.fsencode(directory))) as source:
            selectors = [Selector(), Selector(name="v1"), Selector(digest=Digest("sha256", "a" * 64))]
            selectors += [Selector(number=offered.number, digest=offered.digest) for offered in source.names()[:5]]
            for selector in selectors:
                for examine in (False, True):
                    try_image(source, selector, examine=examine)
    except OcifsError as error:
        assert str(error).isprintable(), repr(error)


def try_image(source: Source, selector: Selector, *, examine: bool) -> None:
    """Resolve one image, and open all of its layers."""
    try:
        image = source.resolve(selector, AMD64, examine=examine)
    except OcifsError as error:
        assert str(error).isprintable(), repr(error)
        return
    assert examine or image.artifact or image.config is not None
    assert [layer.number for layer in image.layers] == list(range(1, len(image.layers) + 1))
    for warned in image.warnings:
        assert warned.message.isprintable(), repr(warned)
    for layer in image.layers:
        try:
            with closing(layer.open()) as blob:
                assert len(blob.read_at(0, blob.size)) == blob.size
        except OcifsError as error:
            assert str(error).isprintable(), repr(error)


def run_case(number: int) -> None:
    """Make a case and check it, in a directory of its own; no file stays open."""
    open_files = len(os.listdir("/proc/self/fd"))
    with tempfile.TemporaryDirectory() as directory:
        check(random.Random(number), Path(directory))
    assert len(os.listdir("/proc/self/fd")) == open_files, "files stayed open"


if __name__ == "__main__":
    run_cases(__doc__, run_case)
