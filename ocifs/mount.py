"""Mounting an image on a directory: what lies between an opened image and the daemon that serves it.

There are two steps, because what can fail at once (options, machine, mount point) comes before what takes long (opening
an image may index it)::

    with reserve(directory, words=["noexec"]) as place:
        with open_image(...) as image:
            record = place.mount(image, store.path, reference="oci:app:1.2")

Whatever happens inside the block, a place that no daemon serves is free again at its end. `mount_image` is both steps for
an image that is open already.

A daemon is forked, so whoever calls this has no second thread.

Not here: the life of the daemon (`ocifs.daemon`), what a driver does (`ocifs.driver`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from ocifs import daemon, driver
from ocifs.daemon import Claim, Record
from ocifs.devices import device_files
from ocifs.driver import Keeper
from ocifs.evidence import EvidenceLog
from ocifs.image import Image
from ocifs.rootfs import view
from ocifs.spans import DEFAULT_CACHE, SpanCache, SpanReader

if TYPE_CHECKING:
    from ocifs.examined import Examined

_log = logging.getLogger(__name__)


class Place:
    """A directory that is ours to mount on, and the driver that will. Made by `reserve`; a context manager."""

    def __init__(self, mountpoint: Path, used: str, options: tuple[str, ...], claim: Claim) -> None:
        """Take what `reserve` found out."""
        self.mountpoint = mountpoint
        """Its real path."""
        self.driver = used
        """``fuse`` or ``erofs``."""
        self.options = options
        """Mount options in force."""
        self._claim = claim

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._claim.release()

    def mount(
        self,
        image: Image,
        cache: Path,
        *,
        reference: str,
        cache_bytes: int = DEFAULT_CACHE,
        foreground: bool = False,
        examined: Examined | None = None,
    ) -> Record:
        """Mount ``image`` here and give the record of the mount, as ``ocifs ps`` lists it.

        Returns once the mount answers, while a daemon serves it; in the foreground when the mount has ended. The daemon
        has its own copies of the image's files: the caller may close ``image``. ``cache`` is the directory of the store
        that the image was opened from and ``reference`` what people are shown. ``cache_bytes`` bounds the decoded data
        that the daemon keeps. ``examined`` says what an image under examination shows beside its tree, with the fuse driver.
        Raises `MachineError` if the mount does not come about.
        """
        record = Record(
            mountpoint=str(self.mountpoint),
            reference=reference,
            driver=self.driver,
            pid=0,
            started_ns=daemon.now_ns(),
            layers=len(image.layers),
            manifest=str(image.resolved.image.manifest_digest or image.resolved.image.config_digest),
            cache=str(cache),
            log=str(self._claim.log),
        )
        with ExitStack() as stack:
            serve = self._serving(image, cache, reference, SpanCache(cache_bytes), examined, stack)
            return self._run(serve, record, image, foreground=foreground)

    def _serving(
        self,
        image: Image,
        cache: Path,
        reference: str,
        decoded: SpanCache,
        examined: Examined | None,
        stack: ExitStack,
    ) -> Callable[[Keeper], None]:
        """Give what the daemon does; what it needs is open until ``stack`` is closed."""
        if self.driver == "erofs":
            spans = SpanReader([layer.data for layer in image.layers], decoded, evidence=image.evidence)
            files, private = device_files(image, spans), daemon.private_place(self._claim)
            return partial(driver.serve_erofs, files, [spans], self.mountpoint, private, self.options)
        shown = view(image, decoded)
        serve_fuse = partial(driver.serve_fuse, [shown], self.mountpoint, self.options, reference)
        if examined is None:
            return serve_fuse
        from ocifs import examined as examining  # noqa: PLC0415 (most mounts have no use for it)

        def let_go() -> None:
            self._claim.hand_over()
            if image.evidence is not None:
                image.evidence.leave()

        blobs = stack.enter_context(examining.opened_blobs(image))
        return partial(
            examining.serve,
            image=image,
            cache=cache,
            examined=examined,
            view=shown,
            blobs=blobs,
            serve_fuse=serve_fuse,
            let_go=let_go,
        )

    def _run(self, serve: Callable[[Keeper], None], record: Record, image: Image, *, foreground: bool) -> Record:
        run = daemon.run_foreground if foreground else daemon.run_background
        if image.evidence is None:
            return run(serve, record, self._claim)
        image.evidence.append("mounted", mountpoint=os.fsencode(self.mountpoint).decode(errors="backslashreplace"))
        try:
            return run(partial(_with_evidence, serve, image.evidence), record, self._claim)
        finally:
            if not foreground:
                image.evidence.leave()  # it is the daemon's now


def _with_evidence(serve: Callable[[Keeper], None], evidence: EvidenceLog, keeper: Keeper) -> None:
    """Serve, and close the evidence log when the mount has ended."""
    with evidence:
        serve(keeper)


def reserve(directory: Path, *, wanted: str = "auto", words: Sequence[str] = (), examining: bool = False) -> Place:
    """Check everything that can be checked without an image, choose a driver, and claim ``directory``.

    ``wanted`` is a driver's name or ``auto``, ``words`` are mount options as mount(8)'s ``-o`` has them, ``examining``
    says that the image will be shown as only the ``fuse`` driver can. Raises `UsageError`, `MachineError`,
    `NotFoundError` or, if the place is taken or not empty, `BusyError`.
    """
    options = driver.check_options(words)
    driver.check_allowed(options)
    daemon.check_machine()
    mountpoint = daemon.prepare_mountpoint(directory, nonempty="nonempty" in options)
    used, reason = driver.choose(wanted, options=options, examining=examining, runtime=daemon.runtime_dir())
    if wanted == "auto" and used == "fuse":
        _log.info("using the fuse driver: %s", reason)
    return Place(mountpoint, used, options, Claim(mountpoint))


def mount_image(
    image: Image,
    cache: Path,
    directory: Path,
    *,
    reference: str,
    wanted: str = "auto",
    words: Sequence[str] = (),
    examining: bool = False,
    cache_bytes: int = DEFAULT_CACHE,
) -> Record:
    """Mount an open image on ``directory`` in the background: `reserve` and `Place.mount` at once."""
    with reserve(directory, wanted=wanted, words=words, examining=examining) as place:
        return place.mount(image, cache, reference=reference, cache_bytes=cache_bytes)
