"""What a ``config.json`` says before an image has its say: the runtime's own example, as ``runc spec`` writes it.

It is written out here because a bundle can be made where no runtime is. Differences from ``runc spec`` of 1.1 are those
that later ones have as well: no ambient capabilities (they would outlive a change to an ordinary user), and two more masked
paths. `rootless` changes it as ``runc spec --rootless`` does.

Not here: anything about an image (`ocifs.bundle.config`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypeAlias

from ocifs.mountinfo import mounted_at

Json: TypeAlias = dict[str, Any]
"""A JSON object; what is in it is for a runtime to check."""

VERSION: Final = "1.0.2"
"""Of the runtime specification that is written by; what is used of it is in 1.0.0 already."""

DEFAULTS: Final[Mapping[str, str]] = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "TERM": "xterm",
}
"""Variables for an image that does not set them."""

_CAPABILITIES: Final = ("CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE")
_MASKED: Final = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/sys/firmware",
    "/proc/scsi",
    "/sys/devices/virtual/powercap",
    "/sys/devices/virtual/tpm",
)
_READ_ONLY: Final = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
_NAMESPACES: Final = ("pid", "network", "ipc", "uts", "mount")


def has_cgroup2() -> bool:
    """Whether this machine has control groups of version 2 and nothing else."""
    there = mounted_at("/sys/fs/cgroup")
    return there is not None and there.fs_type == "cgroup2"


def base_spec(*, cgroup2: bool) -> Json:
    """Give a new configuration to change at will."""
    namespaces = (*_NAMESPACES, *(["cgroup"] if cgroup2 else []))
    return {
        "ociVersion": VERSION,
        "process": {
            "terminal": True,
            "user": {"uid": 0, "gid": 0},
            "args": ["sh"],
            "env": [f"{name}={value}" for name, value in DEFAULTS.items()],
            "cwd": "/",
            "capabilities": {kind: list(_CAPABILITIES) for kind in ("bounding", "effective", "permitted")},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": True,
        },
        "root": {"path": "rootfs", "readonly": True},
        "hostname": "runc",
        "mounts": [
            _mount("/proc", "proc", "proc"),
            _mount("/dev", "tmpfs", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
            _mount(
                "/dev/pts", "devpts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"
            ),
            _mount("/dev/shm", "tmpfs", "shm", "nosuid", "noexec", "nodev", "mode=1777", "size=65536k"),  # noqa: S108 (the container's)
            _mount("/dev/mqueue", "mqueue", "mqueue", "nosuid", "noexec", "nodev"),
            _mount("/sys", "sysfs", "sysfs", "nosuid", "noexec", "nodev", "ro"),
            _mount("/sys/fs/cgroup", "cgroup", "cgroup", "nosuid", "noexec", "nodev", "relatime", "ro"),
        ],
        "linux": {
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
            "namespaces": [{"type": kind} for kind in namespaces],
            "maskedPaths": list(_MASKED),
            "readonlyPaths": list(_READ_ONLY),
        },
    }


def rootless(spec: Json, *, uid: int, gid: int) -> None:
    """Make a configuration fit for an ordinary user: a user namespace in which that user is root and nobody else is.

    The network stays the host's, as ``runc spec --rootless`` has it.
    """
    linux = spec["linux"]
    share_network(spec)
    unprivileged(spec, ids=1)
    linux["uidMappings"] = [{"containerID": 0, "hostID": uid, "size": 1}]
    linux["gidMappings"] = [{"containerID": 0, "hostID": gid, "size": 1}]
    linux["namespaces"].append({"type": "user"})


def unprivileged(spec: Json, *, ids: int) -> None:
    """Leave out what root of a user namespace may not do, which has the ids from 0 on and so many of them.

    Limits of control groups may not be set, ids that are not there not be named in mount options, and sysfs, which belongs
    to a network, not be mounted in the host's: there the host's /sys is shown.
    """
    del spec["linux"]["resources"]
    own_network = {"type": "network"} in spec["linux"]["namespaces"]
    for number, mount in enumerate(spec["mounts"]):
        if mount["destination"] == "/sys" and not own_network:
            spec["mounts"][number] = _mount("/sys", "none", "/sys", "rbind", "nosuid", "noexec", "nodev", "ro")
        elif "options" in mount:
            mount["options"] = [word for word in mount["options"] if _id_in(word) < ids]


def _id_in(option: str) -> int:
    """The id that a mount option names; 0 if it names none."""
    name, _, value = option.partition("=")
    return int(value) if name in ("uid", "gid") else 0


def share_network(spec: Json) -> None:
    """Leave a container in the host's network."""
    namespaces = spec["linux"]["namespaces"]
    namespaces[:] = [namespace for namespace in namespaces if namespace["type"] != "network"]


def _mount(destination: str, kind: str, source: str, *options: str) -> Json:
    mount: Json = {"destination": destination, "type": kind, "source": source}
    if options:
        mount["options"] = list(options)
    return mount
