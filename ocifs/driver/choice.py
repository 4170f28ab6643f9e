"""Which driver is used: what was asked for, what the options need, and whether the kernel's EROFS can be trusted.

What a probe saw is kept until the next boot.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from ocifs.driver.options import FUSE_ONLY
from ocifs.driver.probing import Verdict, probe
from ocifs.errors import MachineError, OcifsError, UsageError

EROFS_SINCE = (6, 12)
"""The first Linux whose EROFS takes plain files as source and devices (fs/erofs/Kconfig: EROFS_FS_BACKED_BY_FILE)."""


class _Probed(msgspec.Struct, frozen=True):
    boot: str
    release: str
    verdict: Verdict


def erofs_verdict(runtime: Path) -> Verdict:
    """Tell whether the ``erofs`` driver works here, probing once per boot; what came out is kept in ``runtime``."""
    if os.geteuid() != 0:
        return Verdict(works=False, reason="only root can mount EROFS")
    release = os.uname().release
    numbers = tuple(int(word) for word in release.split("-")[0].split(".")[:2] if word.isdigit())
    if numbers < EROFS_SINCE:
        return Verdict(
            works=False, reason=f"Linux {release} mounts EROFS from block devices only; 6.12 or newer takes files"
        )
    kept = runtime / "erofs-probe.json"
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        seen = msgspec.json.decode(kept.read_bytes(), type=_Probed)
        if (seen.boot, seen.release) == (boot, release):
            return seen.verdict
    verdict = probe(runtime)
    if not verdict.lasting:
        return verdict
    with contextlib.suppress(OSError):  # a full disk: it will be probed again
        new = kept.with_suffix(f".{os.getpid()}.new")
        new.write_bytes(msgspec.json.encode(_Probed(boot, release, verdict)))
        new.rename(kept)
    return verdict


DRIVERS = ("auto", "erofs", "fuse")
"""What ``--driver`` takes."""


def choose(wanted: str, *, options: Sequence[str], examining: bool, runtime: Path) -> tuple[str, str]:
    """Give the driver to use, and why it is not ``erofs`` where that was possible: ``("fuse", "only root can …")``.

    Raises `UsageError` or `MachineError` if ``erofs`` was asked for by name and cannot be.
    """
    if wanted == "fuse":
        return "fuse", "it was asked for"
    only = sorted(FUSE_ONLY.intersection(options))
    wrong: type[OcifsError]
    if examining:
        wrong, reason = UsageError, "examination shows what only the fuse driver can"
    elif only:
        wrong, reason = (
            UsageError,
            f"the option {only[0]} is FUSE's: under erofs a mount is everyone's, as any other is",
        )
    else:
        verdict = erofs_verdict(runtime)
        if verdict.works:
            return "erofs", ""
        wrong, reason = MachineError, verdict.reason
    if wanted == "erofs":
        message = f"the erofs driver cannot be used: {reason}"
        raise wrong(message)
    return "fuse", reason
