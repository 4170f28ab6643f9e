"""The two drivers: what each serves, mounts and unmounts around a FUSE session."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ocifs import kernel
from ocifs.devices import DeviceFile
from ocifs.driver.options import libfuse_options
from ocifs.driver.session import Keeper, Session, Statistics, detach_moved, in_thread, raise_readahead
from ocifs.mountinfo import MountEntry, mount_of
from ocifs.rootfs import RootFS
from ocifs.spans import SpanReader

if TYPE_CHECKING:
    from ocifs.fuse import Adapter, DeviceAdapter


def serve_fuse(
    trees: Sequence[RootFS],
    mountpoint: Path,
    options: Sequence[str],
    reference: str,
    keeper: Keeper,
    *,
    adapter: Adapter | None = None,
) -> None:
    """Serve ``trees`` at ``mountpoint`` until the mount ends. Ready is when a stat(2) was answered.

    ``adapter`` is one that shows more than the trees, whose data it reads as they do. Raises `MachineError` if mounting
    fails.
    """
    from ocifs.fuse import Adapter

    adapter, spans = adapter or Adapter(trees), [tree.spans for tree in trees]

    def prove() -> None:
        raise_readahead(os.stat(mountpoint).st_dev)

    async def begin() -> None:
        keeper.attached(session.device)
        await in_thread(prove)
        await in_thread(keeper.ready)

    async def end() -> None:
        pass  # pyfuse3 unmounts

    session = _session(adapter, spans, mountpoint, begin, end, keeper)
    session.run(libfuse_options(options, reference))


def serve_erofs(
    files: Sequence[DeviceFile],
    spans: Sequence[SpanReader],
    mountpoint: Path,
    private: Path,
    options: Sequence[str],
    keeper: Keeper,
) -> None:
    """Mount EROFS at ``mountpoint``, its files served by us at ``private``; serve until the mount ends.

    ``private`` is an empty directory of ours; it is in use only until EROFS is mounted. ``spans`` is what the files are
    read through. Raises `MachineError` if the kernel refuses.

    EROFS reads its backing files through the page cache, so that what was read is cached twice: 2.1 GB after `tar` of a
    tree of 0.9 GB. Its option ``directio`` halves that, but then what one file's readahead brought for the next file is
    decoded or asked for again: `tar` took 9.3 s instead of 7.8 cold and 4.9 instead of 2.2 warm, small files 300 µs
    instead of 180 (on a machine that others used, the same for both). The pages of the backing files are the first that the
    kernel takes back, as nobody reads them twice.
    """
    from ocifs.fuse import DeviceAdapter

    adapter = DeviceAdapter(files)
    ours: MountEntry | None = None

    def mount() -> None:
        nonlocal ours
        raise_readahead(session.device)
        names = [os.fsencode(private / str(number)) for number in range(len(files))]
        device = kernel.mount_erofs(
            names[0], names[1:], os.fsencode(mountpoint), attributes=options, attaching=keeper.attached
        )
        ours = mount_of(device)
        kernel.unmount(os.fsencode(private), flags=kernel.MNT_DETACH)
        raise_readahead(device)

    def unmount() -> None:
        # Whoever still uses the mount keeps it, but loses us: what the kernel has not cached cannot be read from then on.
        detach_moved(ours, session.fd)

    async def begin() -> None:
        await in_thread(mount)
        await in_thread(keeper.ready)

    async def end() -> None:
        await in_thread(unmount)

    session = _session(adapter, spans, private, begin, end, keeper)
    session.run({"ro", "nosuid", "nodev", "noexec", "subtype=ocifs-devices", "fsname=ocifs"})


def _session(
    adapter: Adapter | DeviceAdapter,
    spans: Sequence[SpanReader],
    place: Path,
    begin: Callable[[], Awaitable[None]],
    end: Callable[[], Awaitable[None]],
    keeper: Keeper,
) -> Session:
    """Make the session at ``place`` of an adapter whose data is read through ``spans``."""
    return Session(
        adapter,
        place,
        begin,
        end,
        decoding=lambda: any(reader.decoding() for reader in spans),
        statistics=lambda: _statistics(adapter, spans),
        asking=keeper.asking,
    )


def _statistics(adapter: Adapter | DeviceAdapter, spans: Sequence[SpanReader]) -> Statistics:
    """Count over all trees; a cache that they share counts once."""
    caches = {id(reader.cache): reader.cache for reader in spans}.values()
    return {
        "errors": adapter.errors,
        "requests": adapter.requests.total(),
        "lookups": adapter.requests["lookup"],
        "reads": adapter.requests["read"],
        "read_bytes": adapter.read_bytes,
        "span_hits": sum(reader.hits for reader in spans),
        "decoded_spans": sum(reader.decoded_spans for reader in spans),
        "decoded_ahead": sum(reader.ahead_spans for reader in spans),
        "decoded_bytes": sum(reader.decoded_bytes for reader in spans),
        "cached_bytes": sum(cache.size for cache in caches),
        "cache_limit_bytes": sum(cache.limit for cache in caches),
    }
