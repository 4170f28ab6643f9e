"""What can go wrong, as exceptions that carry their exit status and their errno.

Every failure that bad input, a damaged image or the machine can cause is an `OcifsError`. Anything else that escapes is a
bug. The message is one sentence for a person: what, where, what to do. The CLI prints it and exits with ``exit_code``;
the FUSE adapter logs it and answers ``errno``. Both mappings exist once, at those two boundaries.

Not here: logging, formatting, retries.
"""

from __future__ import annotations

import errno as _errno
from typing import ClassVar


class OcifsError(Exception):
    """Root of all expected failures. ``exit_code`` is the process status, ``errno`` what a file operation answers."""

    exit_code: ClassVar[int] = 1
    errno: ClassVar[int] = _errno.EIO


class CheckFailedError(OcifsError):
    """A check or comparison that the user asked for did not hold (exit 1)."""

    exit_code = 1


class UsageError(OcifsError):
    """The words of a command or reference do not make sense (exit 2)."""

    exit_code = 2
    errno = _errno.EINVAL


class NotFoundError(OcifsError):
    """A path, tag, platform or blob does not exist; the message names what there is (exit 3)."""

    exit_code = 3
    errno = _errno.ENOENT


class DamagedError(OcifsError):
    """The image is damaged, or breaks a rule so that it is refused (exit 4)."""

    exit_code = 4


class CacheDamagedError(DamagedError):
    """A file of our own cache is damaged, not the image: whoever finds out discards it, and it is built again."""


class UnsupportedError(OcifsError):
    """The input is sound but of a kind ocifs does not handle: schema 1, encrypted or foreign layers, … (exit 5)."""

    exit_code = 5
    errno = _errno.ENOTSUP


class MachineError(OcifsError):
    """The machine or a permission lacks something: no FUSE device, cache not writable, disk full (exit 6)."""

    exit_code = 6


class BusyError(OcifsError):
    """Something is in use by somebody else: a mount point, a cache entry (exit 7)."""

    exit_code = 7
    errno = _errno.EBUSY


class StaleFormatError(OcifsError):
    """A file of our own cache has another format version; whoever opened it builds it again. Users never see it."""
