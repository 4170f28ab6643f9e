"""``config.json`` of a bundle: an image's configuration as the image specification's conversion.md turns it.

=============================  ========================================================================================
of the image                   in config.json
=============================  ========================================================================================
``WorkingDir``                 ``process.cwd``; one without a slash at its start counts from the root
``Env``                        ``process.env`` as it is, after PATH and TERM where it has none, before HOME likewise
``Entrypoint``, ``Cmd``        ``process.args``, one after the other; arguments that are given replace ``Cmd``
``User``                       ``process.user`` (`ocifs.bundle.users`)
``Labels``                     ``annotations``; they win over the implicit ones that follow
``os``, ``architecture``,      ``annotations`` org.opencontainers.image.os and so on; what the image does not say is
``variant``, ``os.version``,   not there. Features and ports are lists with commas
``os.features``, ``author``,
``created``, ``StopSignal``,
``ExposedPorts``
``Volumes``                    a tmpfs at each, with owner and mode of what the image has there; where that is a
                               directory with something in it, ``tmpcopyup`` has the runtime begin with a copy
annotations of manifests       nothing
=============================  ========================================================================================

Labels that make a runtime itself do something (`_UNSAFE`) are left out, and said so: an image must not choose what runs on
the host. So is one without a name, which the runtime specification does not allow (config.md, "Annotations").

Where ``umoci unpack`` writes something else (0.4.7; ``tests/test_bundle_config.py`` holds the two together)
    - its base is an older example: hostname ``umoci-default``, inheritable and ambient capabilities, fewer masked paths,
      ``/proc/asound`` read-only instead of masked, ociVersion 1.0.0;
    - it sets HOME even if the image has set it, which conversion.md says not to do, and none for an unknown number;
    - its implicit annotations win over labels; conversion.md has it the other way round;
    - it gives a user named by number the groups of its name; conversion.md says that a number or a group leaves none;
    - it knows neither ``variant`` nor ``os.version`` nor ``os.features``;
    - it writes empty annotations for what the image does not say;
    - its variables come in an order of its own;
    - its volumes come in any order, are ``noexec``, owned by root, and empty.

Not here: the base (`ocifs.bundle.base`), ``--config-patch`` (`ocifs.bundle.patch`), files.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

import msgspec

from ocifs.bundle.base import DEFAULTS, Json, base_spec, has_cgroup2, rootless, share_network, unprivileged
from ocifs.bundle.users import Account, find_account
from ocifs.erofs import Inode
from ocifs.errors import NotFoundError, UnsupportedError
from ocifs.rootfs import RootFS, SymlinkLoopError
from ocifs.spec import ImageConfig, printable
from ocifs.tree import Kind

_log = logging.getLogger(__name__)

_PREFIX: Final = "org.opencontainers.image."
_UNSAFE: Final = ("run.oci.", "org.systemd.property.", "org.criu.", "io.katacontainers.", "dev.gvisor.")
"""Annotations that crun, runc with systemd, CRIU, Kata and gVisor obey: handlers, files on the host, properties of units."""


class Bind(msgspec.Struct, frozen=True):
    """A file or directory of the host to be seen in the container. Absolute paths."""

    source: str
    destination: str
    read_only: bool = False


class IdMap(msgspec.Struct, frozen=True):
    """Whom root of a container is outside of its user namespace."""

    uid: int
    gid: int


class Wanted(msgspec.Struct, frozen=True):
    """What is asked for beside what the image says; an empty value leaves that to the image."""

    arguments: tuple[str, ...] = ()
    """Instead of ``Cmd``."""
    environment: tuple[str, ...] = ()
    """``NAME=value``, in place of the image's variables of these names."""
    cwd: str = ""
    user: str = ""
    binds: tuple[Bind, ...] = ()
    terminal: bool = True
    read_only: bool = False
    host_network: bool = False
    id_map: IdMap | None = None
    """For a container in a user namespace that the runtime makes."""
    ids: int = 0
    """For one in a user namespace that is there already: how many ids it has, from 0 on."""


def make_config(image: ImageConfig, view: RootFS, wanted: Wanted) -> Json:
    """Give the configuration for a container of an image; ``view`` shows the image's files.

    Raises `UnknownUserError` for a user that the image does not have, `UnsupportedError` for one that a user namespace
    with a single id cannot have.
    """
    account = find_account(view, wanted.user or image.config.user)
    spec = base_spec(cgroup2=has_cgroup2())
    process = spec["process"]
    process["terminal"] = wanted.terminal
    process["cwd"] = _from_root(wanted.cwd or image.config.working_dir)
    process["env"] = _environment(image.config.env, wanted.environment, account)
    process["args"] = _arguments(image, wanted) or process["args"]
    process["user"] = _user(account)
    spec["root"]["readonly"] = wanted.read_only
    annotations = _annotations(image)
    if annotations:
        spec["annotations"] = annotations
    if wanted.host_network:
        share_network(spec)
    taken = {mount["destination"] for mount in spec["mounts"]} | {bind.destination for bind in wanted.binds}
    volumes = [_volume(view, path) for path in _volumes(image.config.volumes) if path not in taken]
    # What is mounted inside of something else is mounted after it.
    spec["mounts"] += sorted([*volumes, *map(_bind, wanted.binds)], key=lambda mount: _depth(mount["destination"]))
    if wanted.id_map is not None:
        rootless(spec, uid=wanted.id_map.uid, gid=wanted.id_map.gid)
        _check_mapped(account, process["user"], 1)
    elif wanted.ids:
        unprivileged(spec, ids=wanted.ids)
        _check_mapped(account, process["user"], wanted.ids)
    return spec


# -- the process ---------------------------------------------------------------------------------------------------


def _arguments(image: ImageConfig, wanted: Wanted) -> list[str]:
    return [*(image.config.entrypoint or ()), *(wanted.arguments or image.config.cmd or ())]


def _environment(of_image: Sequence[str], given: Sequence[str], account: Account) -> list[str]:
    replaced = set(map(_name, given))
    said = [*(line for line in of_image if _name(line) not in replaced), *given]
    names = set(map(_name, said))
    before = [f"{name}={value}" for name, value in DEFAULTS.items() if name not in names]
    return [*before, *said, *([] if "HOME" in names else [f"HOME={account.home}"])]


def _name(line: str) -> str:
    return line.partition("=")[0]


def _user(account: Account) -> Json:
    user: Json = {"uid": account.uid, "gid": account.gid}
    if account.groups:
        user["additionalGids"] = list(account.groups)
    return user


def _check_mapped(account: Account, user: Json, ids: int) -> None:
    """Refuse a user who is not in a user namespace with so many ids; groups that are not go."""
    if max(account.uid, account.gid) >= ids:
        there = "0:0" if ids == 1 else f"0 to {ids - 1}"
        message = (
            f"the container would run as {account.uid}:{account.gid}, and in this user namespace there is only {there}; "
            "say -u 0, or become root"
        )
        raise UnsupportedError(message)
    groups = [group for group in user.pop("additionalGids", ()) if group < ids]
    if groups:
        user["additionalGids"] = groups


# -- annotations ---------------------------------------------------------------------------------------------------


def _annotations(image: ImageConfig) -> dict[str, str]:
    implicit = {
        "os": image.platform.os,
        "architecture": image.platform.architecture,
        "variant": image.platform.variant,
        "os.version": image.platform.os_version,
        "os.features": ",".join(image.platform.os_features),
        "author": image.author,
        "created": image.created,
        "stopSignal": image.config.stop_signal,
        "exposedPorts": ",".join(sorted(image.config.exposed_ports)),
    }
    said = {_PREFIX + name: value for name, value in implicit.items() if value}
    for name, value in image.config.labels.items():
        if name.startswith(_UNSAFE):
            _log.warning("the label %s is no annotation of the container: runtimes obey it", printable(name))
        elif name:
            said[name] = value
    return said


# -- mounts --------------------------------------------------------------------------------------------------------


def _volumes(paths: Sequence[str]) -> list[str]:
    """Where the image wants volumes: absolute, each once, in order."""
    found = sorted({_normal(path) for path in paths})
    if "/" in found:
        found.remove("/")
        _log.warning("the image declares a volume in place of its root, which is left out")
    return found


def _volume(view: RootFS, path: str) -> Json:
    options = ["rw", "nosuid", "nodev"]
    there = _directory(view, path)
    if there is not None:
        ino, inode = there
        options += [f"mode={inode.mode & 0o7777:04o}", f"uid={inode.uid}", f"gid={inode.gid}"]
        if any(entry.name not in (b".", b"..") for entry in view.readdir(ino)):
            options.append("tmpcopyup")
    return {"destination": path, "type": "tmpfs", "source": "tmpfs", "options": options}


def _directory(view: RootFS, path: str) -> tuple[int, Inode] | None:
    try:
        ino = view.resolve(path.encode("utf-8", "surrogateescape"))
    except (NotFoundError, SymlinkLoopError):
        return None
    inode = view.inode(ino)
    return (ino, inode) if inode.kind is Kind.DIR else None


def _bind(bind: Bind) -> Json:
    options = ["rbind", "rprivate", "ro" if bind.read_only else "rw"]
    return {"destination": bind.destination, "type": "bind", "source": bind.source, "options": options}


def _depth(path: str) -> int:
    return path.rstrip("/").count("/")


def _from_root(path: str) -> str:
    return path if path.startswith("/") else "/" + path


def _normal(path: str) -> str:
    """A path without empty parts and dots; ``..`` does not lead out of the root."""
    parts: list[str] = []
    for part in path.split("/"):
        if part == "..":
            del parts[-1:]
        elif part not in ("", "."):
            parts.append(part)
    return "/" + "/".join(parts)
