"""An image made to be examined: five layers with one of everything that examiners look for.

========  =========================================================================================================
layer     what it does
========  =========================================================================================================
1         the base: ``etc/passwd``, ``bin/tool`` (setuid root), ``opt/app/`` with two files, ``var/log/old.log``,
          ``bin/twin`` (a hard link to ``bin/tool``)
2         adds the secret ``root/.ssh/id_rsa`` and ``tmp/build.log``, both at a time later than the layer's creation
3         replaces ``bin/tool`` by a file of the same size and time, with other bytes; a duplicate entry:
          ``etc/motd`` twice, the first one unseen; ``etc/`` gets another mode
4         whiteouts of ``root/.ssh/id_rsa`` and ``tmp/build.log``; makes ``opt/app`` opaque and puts a new file into it; a
          whiteout that is a hard link (``var/log/.wh.old.log`` → ``etc/passwd``)
5         epoch-0 times, names that hurt line-based formats; behind its end a second tar with ``hidden/payload``
========  =========================================================================================================

Not here: what any command should say of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tests.support.layout import Image, Json, make_image, put_image
from tests.support.tarball import CHAR, DIR, HARDLINK, SYMLINK, entry, tarball

if TYPE_CHECKING:
    from pathlib import Path

SECRET: Final = b"-----BEGIN OPENSSH PRIVATE KEY-----\nnot really\n-----END OPENSSH PRIVATE KEY-----\n"
TOOL: Final = b"#!/bin/sh\necho good\n"
TROJAN: Final = b"#!/bin/sh\necho evil\n"
BASE_TIME: Final = 1_700_000_000
"""2023-11-14T22:13:20Z: the time of all that has no other."""
CREATED: Final = tuple(f"2023-11-1{day}T00:00:00Z" for day in range(5, 10))
"""When each layer was made, by the configuration's history: later than `BASE_TIME`."""
LATE: Final = 1_731_000_000
"""2024-11-07T17:20:00Z: later than any layer."""
STEPS: Final = (
    "ADD rootfs.tar / # base",
    "COPY id_rsa /root/.ssh/id_rsa",
    "RUN update-tool",
    "RUN rm -rf /root/.ssh/id_rsa /tmp/build.log",
    "COPY odd /",
)
"""What made each layer; between the fourth and the fifth step there is one that made none."""
ODD_NAMES: Final = (b"odd/pipe|bar", b"odd/per%cent", b"odd/new\nline", b"odd/b\xffd")


def _file(path: str | bytes, data: bytes, *, mode: int = 0o644, mtime: int = BASE_TIME) -> bytes:
    return entry(path, data, mode=mode, mtime=mtime)


def layer_tars() -> list[bytes]:
    """The five layers, uncompressed."""
    return [
        tarball(
            entry("bin/", mtime=BASE_TIME),
            _file("bin/tool", TOOL, mode=0o4755),
            entry("bin/twin", type=HARDLINK, link="bin/tool", mode=0o4755, mtime=BASE_TIME),
            entry("dev/", mtime=BASE_TIME),
            entry("dev/null", type=CHAR, mode=0o666, rdev=(1, 3), mtime=BASE_TIME),
            entry("etc/", mtime=BASE_TIME),
            _file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000::/:/bin/sh\n"),
            entry("opt/app/", mtime=BASE_TIME),
            _file("opt/app/config", b"one\n"),
            _file("opt/app/data", bytes(3000)),
            entry("sh", type=SYMLINK, link="bin/tool", mtime=BASE_TIME),
            entry("tmp/", type=DIR, mode=0o1777, mtime=BASE_TIME),
            _file("var/log/old.log", b"old\n"),
        ),
        tarball(
            entry("root/.ssh/", type=DIR, mode=0o700, mtime=BASE_TIME),
            _file("root/.ssh/id_rsa", SECRET, mode=0o600, mtime=LATE),
            _file("tmp/build.log", b"built\n", mtime=LATE),
        ),
        tarball(
            entry("bin/tool", data=TROJAN, mode=0o4755, mtime=BASE_TIME),
            entry("etc/", type=DIR, mode=0o711, mtime=BASE_TIME),
            _file("etc/motd", b"first\n"),
            _file("etc/motd", b"second\n"),
        ),
        tarball(
            _file("root/.ssh/.wh.id_rsa", b""),
            _file("tmp/.wh.build.log", b""),
            entry("opt/app/", mtime=BASE_TIME),
            _file("opt/app/.wh..wh..opq", b""),
            _file("opt/app/new", b"new\n"),
            entry("var/log/.wh.old.log", type=HARDLINK, link="etc/passwd", mtime=BASE_TIME),
        ),
        tarball(
            _file("epoch", b"0\n", mtime=0),
            entry("odd/", mtime=0),
            *(_file(name, b"odd\n", mtime=0) for name in ODD_NAMES),
        )
        + bytes(512)
        + tarball(_file("hidden/payload", b"behind the end\n")),
    ]


def evidence_image(compression: str = "gzip") -> Image:
    """The image with its documents."""
    history: list[Json] = [
        {"created": created, "created_by": step} for created, step in zip(CREATED, STEPS, strict=True)
    ]
    history.insert(4, {"created": CREATED[3], "created_by": "ENV A=b", "empty_layer": True})
    return make_image(layer_tars(), compression=compression, config={"history": history, "created": CREATED[4]})


def write_evidence(path: Path, compression: str = "gzip") -> str:
    """Write the image as an OCI layout below ``path``; gives its reference."""
    put_image(path, evidence_image(compression))
    return f"oci:{path}:latest"
