"""Whether this kernel's EROFS answers errors when a device fails: tried with a tiny image.

Some kernels fill the page with zeros instead and keep it: wrong bytes for everyone.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import select
import signal
from pathlib import Path
from typing import NamedTuple, NoReturn

import msgspec

from ocifs import kernel
from ocifs.driver.options import ALWAYS
from ocifs.driver.serving import serve_erofs
from ocifs.driver.session import Keeper
from ocifs.errors import MachineError, OcifsError
from ocifs.forked import ends_with
from ocifs.tree import Extent, Kind, Node, Origin


class Verdict(msgspec.Struct, frozen=True):
    """Whether the ``erofs`` driver can be used on this machine, and if not, why not and what to do."""

    works: bool
    reason: str = ""
    lasting: bool = True
    """Whether it will be so until the next boot; not if the probe itself could not run."""


_GOOD = b"ocifs probe. " * 315 + b"\n"
"""What the first half of the probe's file holds: 4096 bytes."""
_PROBE_TIME = 20.0
"""Seconds after which a probe that hangs counts as failed."""


def probe(runtime: Path) -> Verdict:
    """Mount a tiny image whose device fails in its second half, and see what the kernel makes of that.

    The session runs in a process of its own, and the file is read by this one.
    """
    import tempfile  # 2 ms, once a boot; most mounts know what an earlier one saw

    try:
        place = Path(tempfile.mkdtemp(prefix="probe.", dir=runtime))
    except OSError as error:
        return Verdict(works=False, reason=f"the probe has no place to run: {error}", lasting=False)
    try:
        (place / "private").mkdir(mode=0o700)
        (place / "mnt").mkdir(mode=0o700)
        return _probe_at(place)
    except OSError as error:
        return Verdict(works=False, reason=f"the probe could not run: {error}", lasting=False)
    finally:
        _remove(place)


def _remove(place: Path) -> None:
    for name in ("mnt", "private", ""):
        with contextlib.suppress(OSError):
            (place / name).rmdir()


def _probe_at(place: Path) -> Verdict:
    told, tell = os.pipe2(os.O_CLOEXEC)
    # Forked, not started anew: a new interpreter would look for its modules where whoever called us likes.
    parent, child = os.getpid(), os.fork()
    if child == 0:
        _serve_probe(place, tell, parent)
    os.close(tell)
    ended = os.pidfd_open(child)
    try:
        with os.fdopen(told, "rb") as pipe:
            if not select.select([pipe], [], [], _PROBE_TIME)[0]:
                return Verdict(works=False, reason="the probe's mount did not answer", lasting=False)
            answer = pipe.readline().decode(errors="backslashreplace").strip()
        if answer != "ready":
            return Verdict(works=False, reason=answer or "the probe ended without a word", lasting=False)
        return _probe_read(place / "mnt" / "file")
    finally:
        for name in ("mnt", "private"):
            with contextlib.suppress(OcifsError):
                kernel.unmount(os.fsencode(place / name), flags=kernel.MNT_DETACH)
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(ended, signal.SIGTERM)
        if not select.select([ended], [], [], _PROBE_TIME)[0]:
            signal.pidfd_send_signal(ended, signal.SIGKILL)
        os.close(ended)
        os.waitpid(child, 0)


def _probe_read(path: Path) -> Verdict:
    fd = os.open(path, os.O_RDONLY)
    try:
        if os.pread(fd, len(_GOOD), 0) != _GOOD:
            return Verdict(works=False, reason="the kernel's EROFS read wrong bytes from a good device")
        try:
            got = os.pread(fd, len(_GOOD), len(_GOOD))
        except OSError as error:
            if error.errno == errno.EIO:
                return Verdict(works=True)
            return Verdict(works=False, reason=f"a failing device was answered with {error.strerror}")
        kind = "zeros" if not any(got) else "something"
        return Verdict(
            works=False, reason=f"this kernel's EROFS makes {kind} of data that cannot be read, instead of an error"
        )
    finally:
        os.close(fd)


class _Bytes(NamedTuple):
    """A device file of known bytes; beyond them it fails."""

    data: bytes
    size: int

    async def read(self, offset: int, size: int) -> bytes:
        if offset + size > len(self.data):
            message = "the probe's device fails here, as it should"
            raise MachineError(message)
        return self.data[offset : offset + size]


def _serve_probe(place: Path, tell: int, parent: int) -> NoReturn:
    """Be the probe's session, in a process of its own, which ends with whoever probes and cleans up if that was killed."""
    try:
        if ends_with(parent, signal.SIGTERM):
            _serve_file(place, tell)
    finally:
        if os.getppid() != parent:
            _remove(place)
        # What is above on the stack is the parent's.
        os._exit(0)


def _serve_file(place: Path, tell: int) -> None:
    """Mount a file of two pages, the second of which cannot be read, and serve it until a signal comes."""

    def ready() -> None:
        os.write(tell, b"ready\n")

    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    logging.disable()  # that the device fails is as it should be
    try:
        files = [_Bytes(tree := _probe_tree(), len(tree)), _Bytes(_GOOD, 2 * len(_GOOD))]
        serve_erofs(files, (), place / "mnt", place / "private", ALWAYS, Keeper(lambda _: None, ready))
    except OcifsError as error:
        os.write(tell, f"{error}\n".encode(errors="backslashreplace"))


def _probe_tree() -> bytes:
    from ocifs.erofs.writer import Encoder  # as above: 1 ms

    origin, size = Origin(1, 0), 2 * len(_GOOD)
    file = Node(Kind.FILE, origin, mode=0o444, size=size, extents=(Extent(0, 1, 0, size),))
    out = io.BytesIO()
    Encoder(Node(Kind.DIR, origin, children={b"file": file}), layers=[("probe", size)], uuid=bytes(16)).write(out)
    tree = out.getvalue()
    return tree + bytes(-len(tree) % 4096)
