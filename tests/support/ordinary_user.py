"""Runs commands as somebody who is not root, with a /dev/fuse that is for everybody, as most machines have it.

What has to differ from this machine for that lies in a mount namespace that ends with the command: the device, who the
user is, and a way to the interpreter and the checkout should they lie where only root may look.

Not here: user namespaces; those are what is tested.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.support.mounting import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

UID = 1234


def _has_user_namespaces() -> bool:
    done = subprocess.run(["unshare", "-Urm", "true"], capture_output=True, check=False)
    return done.returncode == 0


needs_user_namespaces = pytest.mark.skipif(not _has_user_namespaces(), reason="this kernel has no user namespaces")


class User(NamedTuple):
    """An ordinary user: the words that run a command as them, and a directory that is theirs."""

    words: list[str]
    home: Path


@contextmanager
def ordinary_user(*, subordinate: bool = False) -> Iterator[User]:
    """Have a user for the length of the block; with ``subordinate`` ids in /etc/subuid and /etc/subgid."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        place.chmod(0o755)
        (place / "home").mkdir(mode=0o755)
        script = ["set -e", f"cd {shlex.quote(name)}", f"chown {UID}:{UID} home"]
        script += ["[ -e fuse ] || mknod fuse c 10 229", "chmod 666 fuse", "mount --bind fuse /dev/fuse"]
        files = {
            "passwd": Path("/etc/passwd").read_text() + f"tess:x:{UID}:{UID}::{name}/home:/bin/sh\n",
            "group": Path("/etc/group").read_text() + f"tess:x:{UID}:\n",
            "subuid": "tess:200000:65536\n" if subordinate else "",
            "subgid": "tess:200000:65536\n" if subordinate else "",
        }
        for file, content in files.items():
            (place / file).write_text(content)
            script.append(f"[ ! -e /etc/{file} ] || mount --bind {file} /etc/{file}")
        script += _ways(place)
        environment = f'HOME={name}/home XDG_RUNTIME_DIR={name}/home XDG_CACHE_HOME= OCIFS_CACHE_DIR= PATH="$PATH"'
        script.append(f'exec setpriv --reuid {UID} --regid {UID} --clear-groups env {environment} "$@"')
        words = ["unshare", "--mount", "--propagation", "private", "sh", "-c", "\n".join(script), "sh"]
        yield User([*words, "env", "-u", "OCIFS_CACHE_DIR"], place / "home")


def _ways(place: Path) -> Iterator[str]:
    """Commands that show the interpreter and the checkout where only root could get to them."""
    hidden: dict[Path, list[Path]] = {}
    for path in {Path(sys.base_prefix).resolve(), Path(sys.prefix).resolve(), ROOT}:
        for above in reversed(path.parents):
            if not above.stat().st_mode & 0o001:
                hidden.setdefault(above, []).append(path)
                break
    for number, (above, paths) in enumerate(hidden.items()):
        shown = place / f"way{number}"
        for path in paths:
            inside = shlex.quote(str(shown / path.relative_to(above)))
            yield f"mkdir -p {inside} && mount --bind {shlex.quote(str(path))} {inside}"
        yield f"mount --rbind {shlex.quote(str(shown))} {shlex.quote(str(above))}"
