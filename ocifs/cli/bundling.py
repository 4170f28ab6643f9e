"""``bundle``, ``unbundle``, ``run``: containers that start from an image where it lies.

What a container is made of is for `ocifs.bundle` to know; here are the words for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click
import msgspec

from ocifs.cli import options as opt
from ocifs.cli.options import Choice
from ocifs.cli.signals import unwound
from ocifs.errors import MachineError, NotFoundError, UsageError

if TYPE_CHECKING:
    from ocifs.bundle.config import Bind, IdMap, Wanted
    from ocifs.bundle.lifecycle import Plan
    from ocifs.image import Image, ImageOptions

_F = TypeVar("_F", bound=Callable[..., Any])

_PATCH_LIMIT: Final = 4 << 20
_AFTER_REF: Final[dict[str, Any]] = {"allow_interspersed_args": False}
"""What comes behind REF is the container's, whatever it looks like."""


class Asked(msgspec.Struct, frozen=True):
    """The options that both commands have."""

    env: tuple[str, ...]
    volume: tuple[str, ...]
    workdir: str
    user: str
    config_patch: str | None
    driver: str


def _asking(function: _F) -> _F:
    """Declare them; the command gets them as keywords."""
    for option in reversed(
        (
            click.option("-e", "--env", metavar="K=V", multiple=True, help="Set an environment variable."),
            click.option(
                "-v",
                "--volume",
                metavar="HOST:CTR[:ro]",
                multiple=True,
                help="Show a directory or file of this machine in the container.",
            ),
            click.option("-w", "--workdir", metavar="DIR", default="", help="Begin there.  [default: the image's]"),
            click.option(
                "-u", "--user", metavar="USER[:GROUP]", default="", help="Run as that user.  [default: the image's]"
            ),
            click.option(
                "--config-patch",
                metavar="FILE",
                type=click.Path(),
                help="Change config.json by a JSON merge patch (RFC 7396); - is standard input.",
            ),
            click.option(
                "--driver",
                type=click.Choice(opt.DRIVERS),
                default="auto",
                help="Who walks the image's tree; see 'ocifs mount --help'.  [default: auto]",
            ),
        )
    ):
        function = option(function)
    return function


@click.command(
    context_settings=_AFTER_REF,
    epilog=opt.examples(
        "ocifs bundle oci:images/app:1.2 /run/bundles/app && runc run --bundle /run/bundles/app app",
        "ocifs bundle --read-only -e MODE=test oci:images/app:1.2 box /bin/app --verbose",
        "ocifs bundle --upper /var/lib/app-changes -u 0 app.tar box",
        "ocifs unbundle --delete box",
    ),
)
@_asking
@click.option("--read-only", is_flag=True, help="No writable layer: the root file system is the image itself.")
@click.option("--ephemeral", is_flag=True, help="Keep changes in memory, until the bundle ends.")
@click.option(
    "--upper",
    metavar="PLACE",
    type=click.Path(),
    help="Keep changes in this directory, or go on with those in it; an ended bundle will do.  [default: in DIR]",
)
@click.option("--rootless", is_flag=True, help="For a container in a user namespace, as 'runc spec --rootless'.")
@opt.ref_argument
@click.argument("directory", metavar="DIR", type=click.Path())
@click.argument("arguments", metavar="[CMD…]", nargs=-1, type=click.UNPROCESSED)
@opt.container_options
def bundle(
    choice: Choice,
    ref: str,
    directory: str,
    arguments: tuple[str, ...],
    *,
    read_only: bool,
    ephemeral: bool,
    upper: str | None,
    rootless: bool,
    **asked: Any,  # noqa: ANN401 (the fields of Asked)
) -> None:
    """Make a directory that runc and its like start a container from: config.json, and rootfs with the image mounted.

    config.json says what the image's configuration says, and CMD in place of its command. What a container writes is kept
    in DIR/upper, in a layer of its own above the image. DIR is made, for you alone; 'ocifs unbundle DIR' ends it.
    """
    from ocifs.bundle.lifecycle import make_bundle  # only what mounts loads FUSE

    if sum((read_only, ephemeral, upper is not None)) > 1:
        raise UsageError("--read-only, --ephemeral and --upper exclude one another: give one of them")
    id_map = _id_map() if rootless or os.geteuid() != 0 else None
    with opt.opened_store(choice) as store, unwound():
        plan = _plan(choice, ref, arguments, Asked(**asked), store.path, read_only=read_only, id_map=id_map)
        plan = msgspec.structs.replace(plan, upper=_absolute(upper), ephemeral=ephemeral)

        def opening(options: ImageOptions) -> contextlib.AbstractContextManager[Image]:
            return opt.opened_image(choice, ref, store=store, options=options)

        make_bundle(opt.place(directory), opening, plan)


@click.command(epilog=opt.examples("ocifs unbundle box", "ocifs unbundle --delete /run/bundles/*"))
@click.option("--delete", is_flag=True, help="Remove DIR and the changes in it; those in a PLACE of --upper stay.")
@click.argument("directories", metavar="DIR…", nargs=-1, required=True, type=click.Path())
@opt.plain_options
def unbundle(choice: Choice, directories: tuple[str, ...], *, delete: bool) -> None:  # noqa: ARG001 (-v has done what it does)
    """End bundles: nothing stays mounted. What containers changed stays, unless it was kept in memory."""
    from ocifs.bundle.lifecycle import end_bundle

    opt.for_each(directories, lambda directory: end_bundle(opt.place(directory), delete=delete))


@click.command(
    context_settings=_AFTER_REF,
    epilog=opt.examples(
        "ocifs run oci:images/app:1.2",
        "ocifs run oci:images/python:3.12 python3 -c 'print(6 * 7)'",
        'ocifs run --net host -v "$PWD":/src -w /src oci:images/gcc:13 make -j4',
    ),
)
@_asking
@click.option(
    "--net",
    type=click.Choice(("none", "host")),
    default="none",
    help="Network: none, or this machine's with its resolv.conf and hosts.  [default: none]",
)
@click.option("--read-only", is_flag=True, help="No writable layer.")
@click.option("--runtime", type=click.Choice(("runc", "crun")), help="Who starts it.  [default: runc if it is there]")
@click.option("--rm", is_flag=True, expose_value=False, help="Leave nothing behind. It never does; said by habit.")
@opt.ref_argument
@click.argument("arguments", metavar="[CMD…]", nargs=-1, type=click.UNPROCESSED)
@opt.container_options
def run(
    choice: Choice,
    ref: str,
    arguments: tuple[str, ...],
    *,
    net: str,
    read_only: bool,
    runtime: str | None,
    **asked: Any,  # noqa: ANN401 (the fields of Asked)
) -> None:
    """Run a container from an image in the foreground; the exit status is the container's.

    CMD replaces the image's command, its entrypoint stays. What the container changes is kept in memory and gone at the
    end, with everything else that was made for it. On a terminal the container gets one of its own. ^C and SIGTERM go to
    the container; a second one ends it by force.
    """
    from ocifs.bundle.containers import find_runtime, run_container

    found = find_runtime(runtime)
    ids = 0
    if os.geteuid() != 0:
        choice, ids = _in_a_namespace(choice)
    with opt.opened_store(choice) as store, unwound():
        plan = _plan(
            choice,
            ref,
            arguments,
            Asked(**asked),
            store.path,
            read_only=read_only,
            terminal=os.isatty(0) and os.isatty(1),
            host_network=net == "host",
            ids=ids,
        )
        if net == "host":
            plan = _with_names_of_host(plan)
        plan = msgspec.structs.replace(plan, ephemeral=not read_only)
        if ids:  # where EROFS cannot be mounted, and overlayfs keeps its notes in attributes that anybody may write
            driver = "fuse" if plan.driver == "auto" else plan.driver
            plan = msgspec.structs.replace(plan, driver=driver, overlay_options=("userxattr",))

        def opening(options: ImageOptions) -> contextlib.AbstractContextManager[Image]:
            return opt.opened_image(choice, ref, store=store, options=options)

        status = run_container(opening, plan, found)
    raise click.exceptions.Exit(status)


def _in_a_namespace(choice: Choice) -> tuple[Choice, int]:
    """Become root of a user namespace, without forgetting whose cache and runtime directory are ours."""
    from ocifs.bundle.namespace import enter
    from ocifs.daemon.records import RUNTIME_VARIABLE, runtime_dir
    from ocifs.store import default_path

    choice = choice._replace(cache_dir=choice.cache_dir or str(default_path()))
    os.environ[RUNTIME_VARIABLE] = str(runtime_dir())
    return choice, enter()


def _with_names_of_host(plan: Plan) -> Plan:
    """Let a container in the host's network find names as the host does, unless it is told otherwise."""
    from ocifs.bundle.config import Bind

    bound = {bind.destination for bind in plan.wanted.binds}
    more = [
        Bind(os.path.realpath(path), path, read_only=True)
        for path in ("/etc/resolv.conf", "/etc/hosts")
        if path not in bound and os.path.isfile(path)
    ]
    wanted = msgspec.structs.replace(plan.wanted, binds=(*plan.wanted.binds, *more))
    return msgspec.structs.replace(plan, wanted=wanted)


# -- from words to a plan ------------------------------------------------------------------------------------------


def _plan(
    choice: Choice,
    ref: str,
    arguments: tuple[str, ...],
    asked: Asked,
    cache: Path,
    **more: Any,  # noqa: ANN401 (further fields of Wanted)
) -> Plan:
    from ocifs.bundle.config import Wanted
    from ocifs.bundle.lifecycle import Plan
    from ocifs.reference import parse

    options = msgspec.structs.replace(choice.image_options(), rootfs_only=True)
    if options.containerd_root is not None:
        options = msgspec.structs.replace(options, containerd_root=os.path.abspath(options.containerd_root))
    wanted = Wanted(
        arguments=arguments,
        environment=tuple(map(_variable, asked.env)),
        cwd=asked.workdir,
        user=asked.user,
        binds=tuple(map(_bind, asked.volume)),
        **more,
    )
    _check_text(wanted)
    return Plan(
        reference=parse(ref).absolute(),
        options=options,
        cache=cache,
        wanted=wanted,
        patch=_patch(asked.config_patch),
        driver=asked.driver,
        cache_bytes=choice.cache_bytes(),
    )


def _variable(word: str) -> str:
    if word.startswith("=") or "=" not in word:
        raise UsageError(f"-e {word!r} is not NAME=VALUE")
    return word


def _bind(word: str) -> Bind:
    from ocifs.bundle.config import Bind

    source, *rest = word.split(":")
    destination = rest[0] if rest else ""
    if not source or not destination.startswith("/") or rest[1:] not in ([], ["ro"], ["rw"]):
        raise UsageError(f"-v {word!r} is not HOST:CTR or HOST:CTR:ro, CTR beginning with a slash")
    if not os.path.lexists(source):
        raise NotFoundError(f"-v {word!r}: there is no {source} on this machine")
    destination = "/" + os.path.normpath(destination).lstrip("/")  # two slashes at the start would stay two
    if destination == "/":
        raise UsageError(f"-v {word!r} would hide the image: CTR is a directory below its root")
    return Bind(os.path.abspath(source), destination, read_only=rest[1:] == ["ro"])


def _check_text(wanted: Wanted) -> None:
    """Refuse what a JSON file cannot hold: bytes that are no UTF-8, which only Python has a way to keep."""
    try:
        json.dumps(msgspec.to_builtins(wanted), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UsageError("config.json can hold UTF-8 only: one of the options or arguments is something else") from None


def _patch(name: str | None) -> Any:  # noqa: ANN401 (JSON)
    if name is None:
        return msgspec.UNSET
    try:
        with contextlib.ExitStack() as stack:
            file = sys.stdin.buffer if name == "-" else stack.enter_context(open(name, "rb"))
            raw = file.read(_PATCH_LIMIT)
        return json.loads(raw)
    except FileNotFoundError:
        raise NotFoundError(f"there is no patch {name}") from None
    except OSError as error:
        raise MachineError(f"cannot read the patch {name}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        where = "on standard input" if name == "-" else name
        raise UsageError(f"the patch {where} is not JSON: {error}") from None


def _id_map() -> IdMap:
    from ocifs.bundle.config import IdMap

    return IdMap(os.geteuid(), os.getegid())


def _absolute(path: str | None) -> Path | None:
    return None if path is None else Path(os.path.realpath(opt.place(path)))
