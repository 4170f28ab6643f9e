"""``mount-helper``, ``install-helper``: what makes ``mount -t fuse.ocifs`` and lines of fstab work.

mount(8) runs ``/sbin/mount.fuse.ocifs SOURCE DIR [-sfnv] [-N NAMESPACE] [-o OPTIONS] [-t TYPE]`` (mount(8), "External
helpers"). It has taken out of the options what is for itself and for systemd (``noauto``, ``x-systemd.automount``), but not
all of it, and it has put ``rw`` in if nobody said ``ro``.
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Final

import click

from ocifs.cli import options as opt
from ocifs.cli import output
from ocifs.cli.options import Choice
from ocifs.errors import BusyError, MachineError, OcifsError, UsageError

_WHERE: Final = "/sbin/mount.fuse.ocifs"
_MARK: Final = "# Written by ocifs install-helper: what mount(8) runs for the type fuse.ocifs."

_NOT_OURS: Final = frozenset(
    {
        *("auto", "noauto", "user", "nouser", "users", "owner", "group", "fail", "nofail", "_netdev", "defaults"),
        *("relatime", "norelatime", "strictatime", "nostrictatime", "diratime", "nodiratime", "nolazytime"),
    }
)
"""Words for mount(8) itself, and such as say when to write access times, which an image never does."""
_SWITCHES: Final = ("examine", "show_whiteout_devices", "follow_dirlinks", "all_xattrs")
_VALUES: Final = ("platform", "namespace", "root", "cache_dir", "cache_memory")
_NUMBERS: Final = ("upto", "layer")
_OURS: Final = (*_SWITCHES, *(f"{name}=" for name in ("driver", *_VALUES, *_NUMBERS)))


_USAGE_STATUS: Final = 1
_FAILED_STATUS: Final = 32
"""Exit statuses as mount(8) has them."""


@click.command(
    "mount-helper",
    epilog=opt.examples(
        "ocifs mount-helper app.tar /mnt -o ro,layer=3",
        "mount -t fuse.ocifs -o ro,allow_other oci:/srv/images/app:1.2 /mnt",
        "mount -t fuse.ocifs -o ro,driver=erofs /srv/app.tar /mnt",
    ),
)
@click.option("-o", "groups", metavar="OPT[,OPT…]", multiple=True, help="Options of any mount, and ocifs mount's own.")
@click.option("-f", "--fake", is_flag=True, help="Check the words, mount nothing.")
@click.option("-s", "--sloppy", is_flag=True, help="Pass over options that are not known.")
@click.option("-n", "--no-mtab", is_flag=True, hidden=True)
@click.option("-N", "mount_namespace", metavar="NS", hidden=True)
@click.option("-t", "--type", "kind", metavar="TYPE", hidden=True)
@click.argument("source")
@click.argument("directory", metavar="DIR")
@opt.plain_options
def mount_helper(
    choice: Choice,
    source: str,
    directory: str,
    *,
    groups: tuple[str, ...],
    fake: bool,
    sloppy: bool,
    no_mtab: bool,  # noqa: ARG001 (there is no mtab any more)
    mount_namespace: str | None,  # noqa: ARG001 (mount(8) has entered it)
    kind: str | None,  # noqa: ARG001 (there is one)
) -> None:
    """Be mount(8)'s helper for the type fuse.ocifs.

    ocifs mount's options are options of the mount here: -o driver=erofs, layer=3, cache_dir=/srv/cache. The driver is
    fuse unless it is named, so that findmnt shows the source.
    """
    from ocifs.cli.mounting import mount_on

    try:
        driver, words, choice = _understood(split(groups), choice, sloppy=sloppy)
        if not fake:
            mount_on(choice, source, directory, driver=driver, words=words)
    except OcifsError as error:
        output.complain(str(error))
        status = _USAGE_STATUS if isinstance(error, UsageError) else _FAILED_STATUS
        raise click.exceptions.Exit(status) from error


def split(groups: tuple[str, ...]) -> list[str]:
    """Options one by one; a comma between double quotes is part of a value, as mount(8) has it."""
    words = [word for group in groups for word in re.findall(r'(?:[^,"]|"[^"]*"?)+', group)]
    return [word.replace('"', "") for word in words]


def _understood(options: list[str], choice: Choice, *, sloppy: bool) -> tuple[str, list[str], Choice]:
    """Give the driver, mount options and what else was chosen. Raises `UsageError` naming an option that is not known."""
    from ocifs.driver import DRIVERS, check_options

    driver, words, chosen = "fuse", [], dict[str, object]()
    for option in options:
        name, equals, value = option.partition("=")
        if option in _NOT_OURS or name == "comment" or name.lower().startswith("x-"):
            continue
        if option == "rw":
            # It stands there as well if nobody said anything, so it cannot be refused. mount(8) says the same of a disk.
            output.complain("warning: an image is write-protected, mounted read-only; say ro to say so")
        elif equals and name == "driver":
            if value not in DRIVERS:
                raise UsageError(f"the option {option!r} wants one of {', '.join(DRIVERS)}")
            driver = value
        elif name == "examine" and equals:
            chosen["examine"], chosen["views"] = True, value
        elif option in _SWITCHES:
            chosen[name] = True
        elif equals and name in _VALUES:
            chosen[name] = value
        elif equals and name in _NUMBERS:
            if not value.isdecimal():
                raise UsageError(f"the option {option!r} wants a number")
            chosen[name] = int(value)
        else:
            try:
                check_options([option], more=_OURS)
            except UsageError:
                if not sloppy or option == "remount":
                    raise
                continue
            words.append(option)
    choice = choice._replace(**chosen)  # type: ignore[arg-type]  # each name is a field, each value of its type
    choice.image_options()
    choice.cache_bytes()
    return driver, words, choice


@click.command("install-helper", epilog=opt.examples("ocifs install-helper", "ocifs install-helper --remove"))
@click.option("--remove", is_flag=True, help="Take it away again.")
@click.option("--force", is_flag=True, help="Replace what is there, whoever put it there.")
@click.argument("file", default=_WHERE, type=click.Path(dir_okay=False))
@opt.plain_options
def install_helper(choice: Choice, file: str, *, remove: bool, force: bool) -> None:  # noqa: ARG001 (-v has done what it does)
    """Write the program that mount(8) runs for the type fuse.ocifs: two lines that run this very ocifs.

    FILE is /sbin/mount.fuse.ocifs, where mount(8) looks. Run it again after ocifs has moved.
    """
    path = Path(file)
    # -P: mount(8) runs it wherever it was started itself, and nothing is to be loaded from there.
    script = f'#!/bin/sh\n{_MARK}\nexec {shlex.quote(sys.executable)} -P -m ocifs mount-helper "$@"\n'
    try:
        if path.exists() and not force and _MARK not in path.read_text(errors="replace"):
            raise BusyError(f"{file} was not written by ocifs; say --force to replace it")
        if remove:
            path.unlink(missing_ok=True)
            return
        new = path.with_name(path.name + ".new")
        new.write_text(script)
        new.chmod(0o755)
        new.rename(path)
    except OSError as error:
        raise MachineError(f"cannot write {file}: {error.strerror}") from error
    output.print_line(f"mount -t fuse.ocifs is served by {output.printable(file)}")
