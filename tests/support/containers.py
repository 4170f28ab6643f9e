"""Images that containers can be started from, and bundles for the length of a test.

Programs come from one static busybox, so that an image is a file and some links. Bundles and containers are made and
looked at by other processes, and `bundled` takes down what a failed test has left, as `tests.support.mounting` does.

Not here: what a container should see.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ocifs.mountinfo import mounts
from tests.support import layout
from tests.support.mounting import ROOT, Process, command, force_away, in_mountinfo, ocifs, record_of, run
from tests.support.tarball import DIR, SYMLINK, entry, tarball

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

BUSYBOX = Path("/bin/busybox")
APPLETS = ("sh", "cat", "echo", "ls", "id", "env", "pwd", "ln", "mv", "rm", "mkdir", "sleep", "stat", "tty", "touch")
PASSWD = b"root:x:0:0:root:/root:/bin/sh\nada:x:1000:1000:Ada:/home/ada:/bin/sh\n"
GROUP = b"root:x:0:\nada:x:1000:\nwheel:x:10:ada\n"


def _why_not() -> str:
    if os.geteuid() != 0:
        return "containers need root here"
    if not BUSYBOX.exists():
        return "Debian's package busybox-static is not installed"
    return "" if shutil.which("runc") else "runc is not installed"


needs_containers = pytest.mark.skipif(bool(_why_not()), reason=_why_not() or "fine")


def write_image(path: Path, *more: bytes, root_mode: int = 0o755, **config: Any) -> str:
    """Write an OCI layout with an image of busybox and ``more`` entries; no /proc, /dev or /sys. Gives its reference."""
    layer = tarball(
        entry("./", type=DIR, mode=root_mode),
        entry("bin/busybox", BUSYBOX.read_bytes(), mode=0o755),
        *(entry(f"bin/{name}", type=SYMLINK, link="busybox") for name in APPLETS),
        entry("etc/passwd", PASSWD),
        entry("etc/group", GROUP),
        entry("etc/motd", b"from the image\n"),
        entry("srv/kept", b"kept\n"),
        entry("srv/gone", b"gone\n"),
        entry("home/ada/", type=DIR, uid=1000, gid=1000),
        entry("root/", type=DIR, mode=0o700),
        *more,
    )
    layout.write_layout(path, [layer], config={"config": {"Env": ["PATH=/bin"], "Cmd": ["/bin/sh"], **config}})
    return f"oci:{path}"


# -- bundles -------------------------------------------------------------------------------------------------------


@contextmanager
def bundled(reference: str, directory: Path, *options: str, arguments: Sequence[str] = ()) -> Iterator[Path]:
    """Make a bundle for the length of the block, and by default without a terminal, for tests have none."""
    patch = directory.with_name(directory.name + ".patch")
    patch.write_text(json.dumps({"process": {"terminal": False}}))
    try:
        done = ocifs("bundle", f"--config-patch={patch}", *options, reference, directory, *arguments)
        assert done.returncode == 0, done.stderr
        assert done.stdout == ""
        yield directory
    finally:
        clear_away(directory)


def clear_away(directory: Path) -> None:
    """Take down whatever is mounted in a bundle's directory, by force. Says nothing."""
    record = record_of(directory / "lower") or record_of(directory / "rootfs")
    daemon = None
    if record is not None:
        with contextlib.suppress(ProcessLookupError):
            daemon = Process(record["pid"])
    for name in ("rootfs", "lower", "memory"):
        for _ in range(3):
            if in_mountinfo(directory / name):
                run(["umount", "--lazy", "--no-canonicalize", str(directory / name)], limit=10)
    force_away(directory / "lower", daemon)


def mounted_in(directory: Path) -> list[str]:
    """What is mounted below a directory, by name."""
    inside = (os.fsdecode(entry.mountpoint) for entry in mounts())
    return sorted(os.path.relpath(place, directory) for place in inside if place.startswith(f"{directory}/"))


def config_of(directory: Path) -> dict[str, Any]:
    """The bundle's config.json."""
    config: dict[str, Any] = json.loads((directory / "config.json").read_bytes())
    return config


# -- containers ----------------------------------------------------------------------------------------------------


def name_of(directory: Path) -> str:
    """A container's name that no other test has."""
    return f"test-{os.getpid()}-{hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]}"


def runc(directory: Path, *, limit: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Run the bundle's container to its end; what runc itself has to say counts only if it fails."""
    log = directory.with_name(directory.name + ".log")
    log.unlink(missing_ok=True)
    try:
        words = ["runc", "--log", str(log), "run", "--bundle", str(directory), name_of(directory)]
        done = run(words, limit=limit)
        if done.returncode and log.exists():
            done.stderr += log.read_text()
        return done
    finally:
        run(["runc", "delete", "--force", name_of(directory)])


def in_container(directory: Path, script: str) -> tuple[int, str, str]:
    """Run a shell script in the bundle's container: status, what it said, its complaints."""
    config = config_of(directory)
    config["process"]["args"] = ["/bin/sh", "-c", script]
    (directory / "config.json").write_text(json.dumps(config))
    done = runc(directory)
    return done.returncode, done.stdout, done.stderr


@contextmanager
def running(words: Sequence[str], until: str, **more: Any) -> Iterator[subprocess.Popen[str]]:
    """Start a process and wait until it writes the line ``until``; it is ended with the block if it still runs."""
    process = subprocess.Popen(
        words,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        **more,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if line != until + "\n":
            process.kill()
            raise AssertionError(f"{line!r}: {process.communicate()[1]}")
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()
        process.communicate()


def ocifs_run(*words: str) -> list[str]:
    """The words that run a container."""
    return command("run", *words)
