"""What this machine is and has: its processor, memory and kernel, the versions of everything, peers installed.

Peers that cannot be had are no error: their columns have a dash and a note that says why.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from benchmark.processes import FailedError, run

PACKAGES = {
    "umoci": "umoci",
    "fuse-overlayfs": "fuse-overlayfs",
    "squashfuse_ll": "squashfuse",
    "mksquashfs": "squashfs-tools",
    "archivemount": "archivemount",
    "igzip": "isal",
    "runc": "runc",
}
"""Programs that take part, and the Debian packages that have them."""

RATARMOUNT = ("ratarmount==1.3.0", "rapidgzip>=0.14.3")
"""From PyPI, in an environment of their own; pinned, for what is compared with should be known."""


class Tools(NamedTuple):
    """Where the programs are, and what is lacking and why."""

    ocifs: Path
    python: Path
    """The interpreter ocifs is installed for."""
    peers: Path
    """The bin directory with ratarmount and rapidgzip."""
    missing: dict[str, str]


def say(text: str) -> None:
    """Tell a person how far it is, on standard error."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


# -- setting up ----------------------------------------------------------------------------------------------------


def prepare(checkout: Path, work: Path, *, install: bool = True) -> Tools:
    """Have everything there: ocifs in the checkout's own environment, peers from Debian and PyPI."""
    run(checkout / "scripts/set-up", limit=1200)
    missing: dict[str, str] = {}
    packages = sorted({package for program, package in PACKAGES.items() if not shutil.which(program)})
    if packages and install:
        with contextlib.suppress(FailedError):
            _install(packages)
    for program, package in PACKAGES.items():
        if not shutil.which(program):
            missing[program] = f"{program} is not installed (Debian's package {package} could not be installed)"
    peers = work / "peers"
    if install and not (peers / "whole").is_file():
        say("installing ratarmount and rapidgzip in an environment of their own")
        try:
            shutil.rmtree(peers, ignore_errors=True)
            run(shutil.which("python3") or sys.executable, "-m", "venv", peers)
            run(peers / "bin/pip", "install", "--quiet", "--disable-pip-version-check", *RATARMOUNT, limit=600)
            (peers / "whole").touch()
        except FailedError as error:
            missing["ratarmount"] = f"ratarmount could not be installed from PyPI: {error}"
    for program in ("ratarmount", "rapidgzip"):
        if not (peers / "bin" / program).exists():
            missing.setdefault(program, f"{program} is not installed")
    environment = checkout / ".venv/bin"
    return Tools(environment / "ocifs", environment / "python", peers / "bin", missing)


def _install(packages: list[str]) -> None:
    say(f"installing Debian packages: {' '.join(packages)}")
    quiet = {"DEBIAN_FRONTEND": "noninteractive"}
    with contextlib.suppress(FailedError):  # old lists can do
        run("apt-get", "-qq", "update", env=quiet, limit=300)
    for package in packages:  # one by one: one that is missing must not cost the others
        with contextlib.suppress(FailedError):
            run(
                "apt-get", "-qq", "-o", "DPkg::Lock::Timeout=120", "install", "--no-install-recommends", "--yes", package,
                env=quiet, limit=300,
            )  # fmt: skip


def compile_reader(source: Path, work: Path) -> Path:
    """Compile the reader of files. Raises FailedError if there is no compiler."""
    out = work / "reader"
    if not out.is_file() or out.stat().st_mtime < source.stat().st_mtime:
        run("gcc", "-O2", "-o", out, source)
    return out


# -- facts ---------------------------------------------------------------------------------------------------------


def _first(path: str, name: str, otherwise: str) -> str:
    """The value of the first line `NAME : VALUE` of a file in /proc or /etc."""
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        left, sign, right = line.replace("=", ":", 1).partition(":")
        if sign and left.strip() == name:
            return right.strip().strip('"')
    return otherwise


def _version(*words: str | Path) -> str:
    """The word with digits and dots of the first line a program prints about itself, or a question mark."""
    with contextlib.suppress(FailedError):
        for word in run(*words).output.decode(errors="replace").replace(",", " ").split():
            bare = word.lstrip("v")
            if bare[:1].isdigit() and "." in bare:
                return bare
    return "?"


def _debian(package: str) -> str:
    with contextlib.suppress(FailedError):
        return run("dpkg-query", "-W", "-f", "${Version}", package).output.decode()
    return "?"


def _python_versions(python: Path, packages: tuple[str, ...]) -> list[str]:
    code = (
        "import importlib.metadata as m, platform, sys\nprint('Python', platform.python_version())\n"
        "for name in sys.argv[1:]: print(name, m.version(name))"
    )
    with contextlib.suppress(FailedError):
        return run(python, "-c", code, *packages).output.decode().splitlines()
    return []


def facts(checkout: Path, tools: Tools, work: Path) -> dict[str, str]:
    """Machine, kernel, versions and date, in the order in which they are to be told."""
    memory = int(_first("/proc/meminfo", "MemTotal", "0 kB").split()[0]) / (1 << 20)
    cores = len(os.sched_getaffinity(0))
    processor = _first("/proc/cpuinfo", "model name", platform.machine())
    commit = "no commit"
    with contextlib.suppress(FailedError):
        commit = run("git", "-C", checkout, "describe", "--always", "--dirty").output.decode().strip()
    ours = [f"ocifs {_version(tools.ocifs, '--version')} ({commit})"]
    ours += _python_versions(tools.python, ("pyfuse3", "trio", "isal", "zstandard"))
    peers = [
        f"{package} {_debian(package)}"
        for package in (*PACKAGES.values(), "tar", "findutils")
        if _debian(package) != "?"
    ]
    peers += _python_versions(tools.peers / "python", ("ratarmount", "rapidgzip"))[1:]
    kind = "?"
    with contextlib.suppress(FailedError):
        kind = run("findmnt", "-n", "-o", "FSTYPE", "-T", work).output.decode().strip()
    return {
        "machine": f"{processor}, {cores} {'core' if cores == 1 else 'cores'}, {memory:.0f} GiB",
        "kernel": f"Linux {platform.release()}",
        "system": f"{_first('/etc/os-release', 'PRETTY_NAME', '?')}, data on {kind}",
        "ocifs": ", ".join(ours),
        "peers": ", ".join(peers),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
