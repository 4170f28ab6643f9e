"""``ocifs.json``: what a bundle is made of, so that it can be ended, deleted and compared by whoever comes later.

It is written before anything is mounted: what a killed ``ocifs bundle`` leaves is a bundle that can be ended.

Not here: making and ending bundles (`ocifs.bundle.lifecycle`).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Final

import msgspec

from ocifs.errors import BusyError, DamagedError, MachineError, NotFoundError, UnsupportedError
from ocifs.image import ImageOptions

FORMAT: Final = 1
NAME: Final = "ocifs.json"
_LIMIT: Final = 1 << 20


class State(msgspec.Struct, frozen=True):
    """A bundle, as `load` gives it where it is now.

    Paths are absolute; bytes that are no UTF-8 are surrogateescaped, as in mount records.
    """

    format: int
    reference: str
    """Of the image, with an absolute path."""
    options: ImageOptions
    """What it was opened with: together with ``reference`` they lead to the very tree that is mounted."""
    cache: str
    manifest: str
    """Digest of the manifest, or of the configuration where there is no manifest."""
    layers: int
    driver: str
    lower: str
    """Where the image is mounted: below ``rootfs`` if that is an overlay, else ``rootfs`` itself."""
    upper: str | None = None
    """The overlay's upper directory: what the container changed. None if it is read-only."""
    work: str | None = None
    ephemeral: bool = False
    """The changes are in memory, and gone when the bundle ends."""

    @property
    def read_only(self) -> bool:
        """Whether containers can change nothing."""
        return self.upper is None


def create(directory: Path, state: State) -> None:
    """Write the state of a new bundle in ``directory``, at once or not at all.

    Raises `BusyError` if somebody has made a bundle of it meanwhile.
    """
    path, new = directory / NAME, directory / f"{NAME}.{os.getpid()}"
    try:
        new.write_bytes(_encoded(state))
        os.link(new, path)  # unlike a renaming, this replaces nothing
    except FileExistsError:
        raise BusyError(f"{directory} has just been made a bundle by another ocifs") from None
    except OSError as error:
        raise MachineError(f"cannot write {path}: {error.strerror}") from error
    finally:
        new.unlink(missing_ok=True)


def write(path: Path, content: bytes) -> None:
    """Put a file in place at once or not at all. Raises `MachineError`."""
    new = path.with_name(path.name + ".new")
    try:
        new.write_bytes(content)
        new.rename(path)
    except OSError as error:
        raise MachineError(f"cannot write {path}: {error.strerror}") from error


def load(directory: Path) -> State:
    """Read the state of the bundle in ``directory``.

    Raises `NotFoundError` if it is none, `DamagedError` or `UnsupportedError` if its state cannot be read.
    """
    path = directory / NAME
    try:
        with path.open("rb") as file:
            raw = file.read(_LIMIT)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(f"{directory} is no bundle of ocifs: it has no {NAME}") from None
    except OSError as error:
        raise MachineError(f"cannot read {path}: {error.strerror}") from error
    try:
        read = json.loads(raw)
        if isinstance(read, dict) and read.get("format") != FORMAT:
            raise UnsupportedError(f"{path} has format {read.get('format')!r}; this ocifs knows {FORMAT}")
        return _moved(msgspec.convert(read, State), directory)
    except (ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise DamagedError(f"{path} is not what ocifs wrote: {error}") from None


def _moved(made: State, directory: Path) -> State:
    """The state with the paths that what is in the bundle has now: its directory may have been renamed since."""
    before, now = Path(made.lower).parent, Path(os.path.realpath(directory))

    def place(path: str) -> str:
        return str(now / Path(path).relative_to(before)) if Path(path).is_relative_to(before) else path

    return msgspec.structs.replace(
        made,
        lower=place(made.lower),
        upper=None if made.upper is None else place(made.upper),
        work=None if made.work is None else place(made.work),
    )


def _encoded(state: State) -> bytes:
    # Not msgspec's own encoder: a path may hold bytes that are no UTF-8, which only \\u escapes can carry.
    return json.dumps(msgspec.to_builtins(state), indent=2).encode() + b"\n"


def is_bundle(directory: Path) -> bool:
    """Whether there is a bundle of ocifs, whatever state it is in."""
    return os.path.lexists(directory / NAME)
