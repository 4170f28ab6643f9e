"""``doctor``: what this machine can and cannot do, what each thing is for, and how to change it.

Nothing is changed but that the cache and runtime directories are made if they are not there, which any other command
would do too. The exit status is 0 unless something is missing that plain reading (``ls``, ``cat``, ``export``, …) needs:
what only mounting, containers or comparisons need is reported, and that is all.

Not here: repairs.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import click
import msgspec

from ocifs.cli import options as opt
from ocifs.cli import output
from ocifs.cli.options import Choice
from ocifs.errors import MachineError, OcifsError

_PYTHON: Final = (3, 11)
_CAP_SYS_ADMIN: Final = 21
"""include/uapi/linux/capability.h"""

_READING: Final = {
    "click": "the command line",
    "isal": "gzip layers",
    "msgspec": "reading documents",
    "rich": "progress bars",
    "zstandard": "reading zstd layers",
}
_MOUNTING: Final = {"pyfuse3": "mounting", "trio": "mounting"}
_TOOLS: Final = {
    "runc": "running containers from a mount",
    "crun": "the same",
    "umoci": "comparing with what it unpacks",
    "skopeo": "fetching images, and comparing",
}


class Finding(msgspec.Struct, frozen=True):
    """One capability. ``needed`` says that plain reading needs it; ``advice`` is empty if ``ok``."""

    name: str
    ok: bool
    purpose: str
    detail: str
    advice: str = ""
    needed: bool = False


def _there(name: str, purpose: str, detail: str, *, needed: bool = False) -> Finding:
    return Finding(name, ok=True, purpose=purpose, detail=detail, needed=needed)


def _lacking(name: str, purpose: str, detail: str, advice: str, *, needed: bool = False) -> Finding:
    return Finding(name, ok=False, purpose=purpose, detail=detail, advice=advice, needed=needed)


@click.command(epilog=opt.examples("ocifs doctor", "ocifs doctor --json | jq -r 'select(.ok | not) | .advice'"))
@opt.json_lines_option
@opt.cache_options
def doctor(choice: Choice, *, as_json: bool) -> None:
    """Say what this machine can do, what each thing is needed for, and what to do about what is missing.

    The exit status is 0 if images can be listed and read, whether or not they can be mounted, and 6 otherwise.
    """
    findings = list(examine(choice))
    if as_json:
        for finding in findings:
            output.print_json({name: getattr(finding, name) for name in finding.__struct_fields__})
    else:
        rows = [
            ("ok" if finding.ok else "missing", finding.name, finding.detail, finding.purpose) for finding in findings
        ]
        output.print_table(("", "WHAT", "FOUND", "FOR"), rows)
        missing = [finding for finding in findings if not finding.ok and finding.advice]
        if missing:
            output.print_line("")
        for finding in missing:
            output.print_line(output.printable(f"{finding.name}: {finding.advice}"))
    if not all(finding.ok for finding in findings if finding.needed):
        raise click.exceptions.Exit(MachineError.exit_code)


def examine(choice: Choice) -> Iterator[Finding]:
    """Look at everything, what plain reading needs first. Never raises: what cannot be looked at is missing."""
    yield _python()
    for name, purpose in _READING.items():
        yield _package(name, purpose, needed=True)
    yield _cache(choice)
    for name, purpose in _MOUNTING.items():
        yield _package(name, purpose, needed=False)
    yield from (_fuse_device(), _fusermount(), _allow_other(), _runtime(), _privileges())
    yield from (_kernel(), _erofs(), _default_driver(), _overlay())
    for name, purpose in _TOOLS.items():
        yield _tool(name, purpose)


def _python() -> Finding:
    ok = sys.version_info[:2] >= _PYTHON
    advice = "" if ok else f"install Python {_PYTHON[0]}.{_PYTHON[1]} or newer"
    return Finding("Python", ok, "everything", platform.python_version(), advice, needed=True)


def _package(name: str, purpose: str, *, needed: bool) -> Finding:
    from importlib import import_module
    from importlib.metadata import PackageNotFoundError, version

    try:
        import_module(name)
    except ImportError as error:
        what = "'ocifs-mount[fuse]', after the packages fuse3, libfuse3-dev, pkg-config and gcc"
        extra = what if name == "pyfuse3" else name
        return _lacking(name, purpose, str(error), f"pip install {extra}", needed=needed)
    try:
        found = version(name)
    except PackageNotFoundError:
        found = "of unknown version"
    return _there(name, purpose, found, needed=needed)


def _cache(choice: Choice) -> Finding:
    from ocifs.store import Kind

    name, purpose = "cache", "keeping indexes"
    try:
        with opt.opened_store(choice) as store:
            size = sum(entry.size for entry in store.entries())
            path = store.path
            with store.new(Kind.LAYER) as new:
                new.file.write(b"written, and removed again")
    except OcifsError as error:
        return _lacking(name, purpose, "unusable", str(error), needed=True)
    from ocifs.mountinfo import file_system_of

    disk = os.statvfs(path)
    free = output.human_size(disk.f_bavail * disk.f_frsize)
    detail = f"{path} ({file_system_of(path)}), {output.human_size(size)} used, {free} free"
    return _there(name, purpose, detail, needed=True)


def _fuse_device() -> Finding:
    name, purpose = "/dev/fuse", "mounting"
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        advice = "modprobe fuse; in a container: start it with --device /dev/fuse --cap-add SYS_ADMIN"
        return _lacking(name, purpose, "not there", advice)
    except OSError as error:
        advice = "become root, or ask for permission on /dev/fuse; in a container: start it with --device /dev/fuse"
        return _lacking(name, purpose, str(error.strerror), advice)
    return _there(name, purpose, "can be opened")


def _fusermount() -> Finding:
    found = shutil.which("fusermount3")
    advice = "" if found else "install the package fuse3"
    return Finding("fusermount3", found is not None, "mounting without root", found or "not there", advice)


def _allow_other() -> Finding:
    from ocifs.driver import others_allowed

    name, purpose = "user_allow_other", "-o allow_other without root"
    if others_allowed():
        return _there(name, purpose, "set in /etc/fuse.conf")
    advice = "as root, add a line user_allow_other to /etc/fuse.conf"
    return _lacking(name, purpose, "not set in /etc/fuse.conf", advice)


def _runtime() -> Finding:
    from ocifs.daemon import runtime_dir

    name, purpose = "runtime directory", "mounting"
    try:
        return _there(name, purpose, str(runtime_dir()))
    except OcifsError as error:
        return _lacking(name, purpose, "unusable", str(error))


def _privileges() -> Finding:
    capabilities = 0
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("CapEff:"):
                capabilities = int(line.split()[1], 16)
    ok = os.geteuid() == 0 and bool(capabilities >> _CAP_SYS_ADMIN & 1)
    who = "root" if os.geteuid() == 0 else f"user {os.geteuid()}"
    detail = f"{who}, {'with' if capabilities >> _CAP_SYS_ADMIN & 1 else 'without'} CAP_SYS_ADMIN"
    advice = "" if ok else "run as root; in a container: start it with --cap-add SYS_ADMIN"
    return Finding("privileges", ok, "mounting without fusermount3, and with the kernel's EROFS", detail, advice)


# -- the kernel ----------------------------------------------------------------------------------------------------


def _release() -> tuple[int, int]:
    """The kernel's version: (6, 12) of ``6.12.9-cloud``."""
    numbers = platform.release().replace("-", ".").split(".")
    try:
        return int(numbers[0]), int(numbers[1])
    except (IndexError, ValueError):
        return 0, 0


def _kernel() -> Finding:
    return Finding("kernel", platform.system() == "Linux", "mounting", f"{platform.system()} {platform.release()}")


def _has_file_system(name: str) -> str:
    """How the kernel has a file system: ``built in or loaded``, ``a module``; empty if it has not."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/filesystems").read_text(encoding="ascii").splitlines()
        if name in (line.split()[-1] for line in lines if line.split()):
            return "built in or loaded"
    for index in ("modules.dep", "modules.builtin"):
        with contextlib.suppress(OSError):
            listed = Path("/lib/modules", platform.release(), index).read_text(encoding="utf-8", errors="replace")
            if any(f"/{name}.ko" in line.partition(":")[0] for line in listed.splitlines()):
                return "a module"
    return ""


def _erofs() -> Finding:
    from ocifs.driver import EROFS_SINCE  # only doctor asks

    name, purpose = "EROFS from a file", "mounting with the kernel's own driver"
    how, release = _has_file_system("erofs"), _release()
    wanted = ".".join(map(str, EROFS_SINCE))
    if release < EROFS_SINCE:
        return _lacking(name, purpose, f"Linux {platform.release()}", f"needs Linux {wanted} or newer")
    if not how:
        advice = "needs a kernel with CONFIG_EROFS_FS; modprobe erofs if it is a module"
        return _lacking(name, purpose, "the kernel has no EROFS", advice)
    setting = _kernel_setting("CONFIG_EROFS_FS_BACKED_BY_FILE")
    if setting == "n":
        return _lacking(name, purpose, "switched off", "needs CONFIG_EROFS_FS_BACKED_BY_FILE")
    if os.geteuid() != 0:
        return _lacking(name, purpose, how, "run as root")
    return _erofs_tried(name, purpose, how)


def _erofs_tried(name: str, purpose: str, how: str) -> Finding:
    """Say what happened when it was tried on this kernel, once per boot: a failing device must not read as zeros."""
    from ocifs.daemon import runtime_dir
    from ocifs.driver import erofs_verdict

    try:
        verdict = erofs_verdict(runtime_dir())
    except OcifsError as error:
        return _lacking(name, purpose, "could not be tried", str(error))
    if not verdict.works:
        advice = f"mounting falls back to the fuse driver: {verdict.reason}"
        return _lacking(name, purpose, f"{how}, but of no use", advice)
    return _there(name, purpose, f"{how}, and answers errors as it should")


def _default_driver() -> Finding:
    from ocifs import daemon, driver

    name, purpose = "driver", "mounting, unless --driver says otherwise"
    try:
        daemon.check_machine()
        used, reason = driver.choose("auto", options=(), examining=False, runtime=daemon.runtime_dir())
    except OcifsError as error:
        return _lacking(name, purpose, "none", str(error))
    return _there(name, purpose, f"{used}: {reason}" if reason else used)


def _kernel_setting(name: str) -> str:
    """``y``, ``m`` or ``n`` as the kernel was configured; empty if it does not say."""
    import gzip  # only here

    readers: dict[Path, Callable[[Path], bytes]] = {
        Path("/proc/config.gz"): lambda path: gzip.decompress(path.read_bytes()),
        Path(f"/boot/config-{platform.release()}"): Path.read_bytes,
    }
    for path, read in readers.items():
        with contextlib.suppress(OSError, EOFError):
            lines = read(path).decode("ascii", "replace").splitlines()
            value = next((line.partition("=")[2] for line in lines if line.startswith(name + "=")), "n")
            return value if value in ("y", "m") else "n"
    return ""


def _overlay() -> Finding:
    how = _has_file_system("overlay")
    advice = "" if how else "needs a kernel with CONFIG_OVERLAY_FS; modprobe overlay if it is a module"
    return Finding("overlayfs", bool(how), "a writable layer above a mount", how or "the kernel has none", advice)


def _tool(name: str, purpose: str) -> Finding:
    found = shutil.which(name)
    return Finding(name, found is not None, purpose, found or "not there", "" if found else f"optional: install {name}")
