"""Making a bundle, and ending it: everything that is mounted and written, in order, and all of it undone in reverse.

`make_bundle` leaves either a whole bundle or nothing. ``ocifs.json`` is written before the first mount and ``config.json``
last: whoever is killed in between leaves a directory that no runtime starts and that `end_bundle` can clear away.

`end_bundle` looks at what is mounted, never into it, because the daemon may be dead and its mount with it.

Not here: running containers (`ocifs.bundle.containers`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, Final

import msgspec

from ocifs import daemon, driver, kernel
from ocifs.bundle import overlayfs, state
from ocifs.bundle.base import Json
from ocifs.bundle.config import Wanted, make_config
from ocifs.bundle.patch import merge_patch
from ocifs.bundle.state import State
from ocifs.errors import BusyError, MachineError, NotFoundError, UnsupportedError, UsageError
from ocifs.image import Image, ImageOptions
from ocifs.mount import mount_image
from ocifs.mountinfo import mounted_at, mounts, roots
from ocifs.rootfs import RootFS, SymlinkLoopError, view
from ocifs.rules import MountPoint
from ocifs.spans import DEFAULT_CACHE
from ocifs.spec import ImageConfig, printable

_log = logging.getLogger(__name__)

CONFIG: Final = "config.json"

Opening = Callable[[ImageOptions], AbstractContextManager[Image]]
"""Opens the image with these options."""


class Plan(msgspec.Struct, frozen=True):
    """What kind of bundle to make."""

    reference: str
    """With an absolute path, for it is kept."""
    options: ImageOptions
    cache: Path
    wanted: Wanted
    patch: Any = msgspec.UNSET
    """A JSON merge patch for ``config.json``."""
    upper: Path | None = None
    """Where to keep changes: in its ``upper``, with ``work`` beside. None: in the bundle."""
    ephemeral: bool = False
    driver: str = "auto"
    cache_bytes: int = DEFAULT_CACHE
    overlay_options: tuple[str, ...] = ()


# -- making --------------------------------------------------------------------------------------------------------


def make_bundle(directory: Path, opening: Opening, plan: Plan) -> State:
    """Make ``directory`` (which is not there, or empty) a bundle of the image that ``opening`` opens.

    Raises `BusyError`, `UsageError`, `MachineError` or what opening and mounting raise; nothing is left then.
    """
    directory = Path(os.path.realpath(directory))  # as mountinfo will have it
    _check(directory, plan)
    with ExitStack() as opened:
        image = opened.enter_context(opening(plan.options))
        config = _config(image, plan)
        points = _missing(view(image), config)
        if points:
            plan = msgspec.structs.replace(plan, options=msgspec.structs.replace(plan.options, mount_points=points))
            opened.close()
            image = opened.enter_context(opening(plan.options))
        with ExitStack() as undo:
            made = _make(directory, image, plan, undo)
            _write_config(directory, config)
            undo.pop_all()
        return made


def _check(directory: Path, plan: Plan) -> None:
    """Refuse at once what cannot work."""
    if not plan.wanted.read_only and os.geteuid() != 0:
        message = "only root can put a writable layer over an image; say --read-only, or use 'ocifs run'"
        raise MachineError(message)
    if state.is_bundle(directory):
        message = (
            f"{directory} is a bundle already; end and remove it with 'ocifs unbundle --delete {directory}', or take "
            f"another directory (with '--upper {directory}' once that is ended, and what was changed in it is there again)"
        )
        raise BusyError(message)
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        names = []
    except NotADirectoryError:
        raise UsageError(f"{directory} is not a directory") from None
    except OSError as error:
        raise MachineError(f"cannot look into {directory}: {error.strerror}") from error
    if names:
        raise BusyError(f"{directory} is not empty ({len(names)} names); a bundle needs a directory of its own")
    daemon.check_machine()


def _make(directory: Path, image: Image, plan: Plan, undo: ExitStack) -> State:
    """Write and mount everything but ``config.json``; ``undo`` takes back what was done."""
    read_only = plan.wanted.read_only
    _make_directory(directory, undo, mode=0o700)
    with _ours_alone(directory):
        pass
    # As it will be mounted: `reserve` says what is wrong if that cannot be.
    used, _ = driver.choose(plan.driver, options=(), examining=plan.options.examine, runtime=daemon.runtime_dir())
    rootfs = directory / "rootfs"
    lower = rootfs if read_only else directory / "lower"
    changes = None if read_only else plan.upper or directory / ("memory" if plan.ephemeral else "")
    made = State(
        format=state.FORMAT,
        reference=plan.reference,
        options=plan.options,
        cache=str(plan.cache),
        manifest=str(image.resolved.image.manifest_digest or image.resolved.image.config_digest),
        layers=len(image.layers),
        driver=used,
        lower=str(lower),
        upper=str(changes / "upper") if changes else None,
        work=str(changes / "work") if changes else None,
        ephemeral=plan.ephemeral,
    )
    state.create(directory, made)
    undo.callback((directory / state.NAME).unlink, missing_ok=True)
    undo.callback((directory / CONFIG).unlink, missing_ok=True)
    _make_directory(rootfs, undo)
    if not read_only:
        _make_directory(lower, undo, mode=0o700)
    words = _mount_words(used) if read_only else ()
    # Before it is done: a signal may come when the mount is there and nothing has been said of it yet.
    undo.callback(_take_down, lower)
    mount_image(
        image,
        plan.cache,
        lower,
        reference=plan.reference,
        wanted=used,
        words=words,
        examining=plan.options.examine,
        cache_bytes=plan.cache_bytes,
    )
    if changes is not None:
        _add_changes(directory, changes, image, made, plan, undo)
    return made


@contextlib.contextmanager
def _ours_alone(directory: Path) -> Iterator[None]:
    """After the block nobody else can get into a directory: files of an image may make whoever runs them root.

    Raises `MachineError` before it if the directory is somebody else's, who could always get in.
    """
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise MachineError(f"cannot look into {directory}: {error.strerror}") from error
    try:
        owner = os.fstat(fd).st_uid
        if owner != os.geteuid():
            message = (
                f"{directory} belongs to the user with id {owner}, who could run from it what only containers are to run "
                "(set-user-ID files); name a directory of your own, or one that is not there yet"
            )
            raise MachineError(message)
        yield
        os.fchmod(fd, 0o700)
    finally:
        os.close(fd)


def _mount_words(used: str) -> Sequence[str]:
    """Mount options for a root file system: devices and set-user-ID files work, and every user of the container reads.

    Below an overlay none of them is needed: it asks with the rights of who mounted it, and has flags of its own.
    """
    if os.geteuid() != 0:
        return ()  # what else is there is not for an ordinary user to give
    return ("suid", "dev", "allow_other") if used == "fuse" else ("suid", "dev")


def _add_changes(directory: Path, changes: Path, image: Image, made: State, plan: Plan, undo: ExitStack) -> None:
    """Put the overlay on ``rootfs``, changes going to ``changes``."""
    upper, work = Path(made.upper or ""), Path(made.work or "")
    if plan.ephemeral:
        _make_directory(changes, undo, mode=0o700)
        undo.callback(_take_down, changes)
        overlayfs.mount_tmpfs(changes)
    elif plan.upper is not None:
        _check_kept(plan.upper, made, undo)
    if _make_directory(upper, undo):
        _copy_root(image, upper)
    if _make_directory(work, undo, mode=0o700):
        undo.callback(shutil.rmtree, work / "work", ignore_errors=True)  # overlayfs' own
    undo.callback(_take_down, directory / "rootfs")
    overlayfs.mount_overlay(
        directory / "rootfs", lower=Path(made.lower), upper=upper, work=work, more=plan.overlay_options
    )


_IMAGE_OF: Final = "image"
"""In a directory of changes: the manifest digest of the image that they are changes of."""
_DIGEST: Final = re.compile(rb"[a-z0-9]+:[0-9a-f]+\n?")


def _check_kept(place: Path, made: State, undo: ExitStack) -> None:
    """Prepare a directory that keeps changes: of this image, and of no other bundle at this moment."""
    _make_directory(place, undo, mode=0o700)
    with _ours_alone(place):
        kept = _image_of(place)
        if kept is None and (names := os.listdir(place)):
            raise BusyError(f"{place} is not empty ({len(names)} names) and holds no changes of a bundle")
        if kept not in (None, made.manifest):
            message = (
                f"{place} holds changes of another image, {kept}; over {made.manifest} they would mean something else"
            )
            raise UsageError(message)
        if other := overlayfs.overlay_with(place / "upper"):
            raise BusyError(f"the changes in {place} are in use by the bundle at {os.path.dirname(other)}")
    if kept is None:
        mark = place / _IMAGE_OF
        undo.callback(mark.unlink, missing_ok=True)
        state.write(mark, f"{made.manifest}\n".encode())


def _image_of(place: Path) -> str | None:
    """The digest of the image whose changes are kept in a directory; None if it holds none. An ended bundle holds some."""
    if state.is_bundle(place):
        return state.load(place).manifest
    try:
        with (place / _IMAGE_OF).open("rb") as file:
            kept = file.read(256)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise MachineError(f"cannot read {place / _IMAGE_OF}: {error.strerror}") from error
    return kept.decode().strip() if _DIGEST.fullmatch(kept) else None


def _copy_root(image: Image, upper: Path) -> None:
    """Give the upper directory what the image's root has: the overlay's root shows the upper one's attributes.

    In a user namespace there may be no such owner, and some attributes cannot be given: those the container lacks.
    """
    shown = view(image)
    root = shown.inode(shown.root)
    for name, value in shown.xattrs(shown.root).items():
        try:
            os.setxattr(upper, name, value)
        except OSError as error:
            _log.warning(
                "the container's root lacks the attribute %s: %s", printable(os.fsdecode(name)), error.strerror
            )
    try:
        os.chown(upper, root.uid, root.gid)
    except OSError as error:
        _log.warning("the container's root does not belong to %d:%d: %s", root.uid, root.gid, error.strerror)
    try:
        os.chmod(upper, root.mode & 0o7777)
        os.utime(upper, ns=(root.mtime_ns, root.mtime_ns))
    except OSError as error:
        raise MachineError(f"cannot prepare the upper directory {upper}: {error.strerror}") from error


def _make_directory(path: Path, undo: ExitStack, *, mode: int = 0o755) -> bool:
    """Make a directory unless it is there; says whether it was made."""
    try:
        path.mkdir(mode=mode)
    except FileExistsError:
        return False
    except OSError as error:
        raise MachineError(f"cannot make the directory {path}: {error.strerror}") from error
    undo.callback(_remove_directory, path)
    return True


def _remove_directory(path: Path) -> None:
    try:
        path.rmdir()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise MachineError(f"cannot remove {path}: {error.strerror}") from error


# -- config.json ---------------------------------------------------------------------------------------------------


def _config(image: Image, plan: Plan) -> Json:
    of_image = image.resolved.image.config
    config = make_config(of_image or _no_config(), view(image), plan.wanted)
    if plan.patch is msgspec.UNSET:
        return config
    try:
        patched = merge_patch(config, plan.patch)
    except RecursionError:
        raise UsageError("the patch for config.json is nested too deeply") from None
    if not isinstance(patched, dict):
        raise UsageError("the patch leaves no object of config.json: it must be a JSON object itself")
    return patched


def _no_config() -> ImageConfig:
    raise UnsupportedError("the image has no configuration, so nothing says what to run")


def _write_config(directory: Path, config: Json) -> None:
    state.write(directory / CONFIG, json.dumps(config, indent=2).encode() + b"\n")


def _missing(shown: RootFS, config: Json) -> tuple[MountPoint, ...]:
    """The mount points, and the working directory, that the runtime would have to make in a file system as shown.

    What is below another mount is made in that, or is its business.
    """
    above: list[str] = []
    found = []
    for point in _points(config):
        path = os.fsdecode(point.path).rstrip("/")
        if not any(path.startswith(f"{other}/") for other in above) and not _is_there(shown, point.path):
            found.append(point)
        above.append(path)
    return tuple(found)


def _points(config: Json) -> list[MountPoint]:
    """Where ``config.json`` mounts something, in order, and where its process works. It may have been patched."""
    try:
        points = [
            MountPoint(os.fsencode(mount["destination"]), not _is_file_bind(mount))
            for mount in config.get("mounts") or ()
        ]
        cwd = (config.get("process") or {}).get("cwd") or "/"
        return [*points, MountPoint(os.fsencode(cwd))]
    except (TypeError, KeyError, AttributeError, UnicodeEncodeError):
        raise UsageError("the patch makes mounts or process of config.json something that no runtime takes") from None


def _is_file_bind(mount: Json) -> bool:
    bound = mount.get("type") == "bind" or {"bind", "rbind"} & set(mount.get("options") or ())
    source = str(mount.get("source") or "")
    return bool(bound) and os.path.exists(source) and not os.path.isdir(source)


def _is_there(shown: RootFS, path: bytes) -> bool:
    try:
        shown.resolve(path)
    except (NotFoundError, SymlinkLoopError):
        return False
    return True


# -- ending --------------------------------------------------------------------------------------------------------


def end_bundle(directory: Path, *, delete: bool = False) -> None:
    """Unmount everything of the bundle in ``directory``; changes stay unless they are in memory, or ``delete`` is said.

    Deleting leaves changes that are kept outside of the bundle. Does what is left to do if a daemon was killed, if only
    half of a bundle was made, or if it has been ended already. Raises `NotFoundError` if there is no bundle, `BusyError`
    naming the processes if a container runs on it.
    """
    directory = Path(os.path.realpath(directory))
    state.load(directory)
    _check_free(directory / "rootfs")
    # Not by the paths in its state: the directory may have been renamed. The image comes last, for its daemon may not end.
    for place in (directory / "rootfs", directory / "memory", directory / "lower"):
        _take_down(place)
        _remove_directory(place)
    if delete:
        _delete(directory)


def _take_down(place: Path) -> None:
    """End what is mounted at ``place``, a dead mount too."""
    there = mounted_at(place)
    if there is None:
        return
    if there.fs_type in daemon.FS_TYPES.values():
        with contextlib.suppress(NotFoundError):  # it has gone meanwhile, or its record has
            daemon.unmount(place, advice="end them first")
        if mounted_at(place) is None:
            return
    try:
        kernel.umount2(os.fsencode(place), 0)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise BusyError(f"{place} is in use by {daemon.users_of(place)}; end them first") from None
        raise MachineError(f"cannot unmount {place}: {error.strerror}") from error


def _check_free(rootfs: Path) -> None:
    """Raise `BusyError` if a container has this root: it holds a copy of the mount, so the kernel would not mind."""
    there = mounted_at(rootfs)
    if there is None:
        return
    found = [pid for pid, device in roots() if device == there.device]
    if found:
        raise BusyError(f"a container runs on {rootfs}: {_named(found)}; end it first")


_NAMED: Final = 5


def _named(pids: Sequence[int]) -> str:
    names = []
    for pid in pids[:_NAMED]:
        with contextlib.suppress(OSError):
            names.append(f"{Path(f'/proc/{pid}/comm').read_text(errors='replace').strip()} (pid {pid})")
    more = f" and {len(pids) - _NAMED} more" if len(pids) > _NAMED else ""
    return ", ".join(names) + more


def _delete(directory: Path) -> None:
    """Remove a bundle that nothing is mounted in any more."""
    inside = os.fsencode(directory) + b"/"
    for entry in mounts():
        if entry.mountpoint.startswith(inside):
            message = f"{os.fsdecode(entry.mountpoint)} is still mounted, so {directory} is not deleted"
            raise BusyError(message)
    try:
        shutil.rmtree(directory)
    except OSError as error:
        raise MachineError(f"cannot delete {error.filename or directory}: {error.strerror}") from error
