"""Which commands there are, in the order in which help lists them, and where each one is.

A command's module is imported when the command is run, completed or asked for help, never to list it: the line of help
stands here. ``tests/test_cli.py`` holds both to be the same.
"""

from __future__ import annotations

import importlib
from typing import Any, Final, NamedTuple

import click


class Place(NamedTuple):
    """Where a command is defined, and what it does in a line."""

    module: str
    attribute: str
    summary: str


FAMILIES: Final[dict[str, dict[str, Place]]] = {
    "Mount": {
        "mount": Place("mounting", "mount", "Mount an image's file system on a directory."),
        "umount": Place("mounting", "umount", "Unmount, and wait until the daemon is gone."),
        "ps": Place("mounting", "ps", "List what is mounted."),
        "stat-mount": Place("mounting", "stat_mount", "Show what a mount's daemon has done."),
    },
    "Containers": {
        "run": Place("bundling", "run", "Run a container from an image in the foreground."),
        "bundle": Place("bundling", "bundle", "Make a directory that runc starts a container from."),
        "unbundle": Place("bundling", "unbundle", "End bundles."),
    },
    "Look inside, without mounting": {
        "ls": Place("listing", "ls", "List directories of an image."),
        "cat": Place("reading", "cat", "Write files of an image to standard output."),
        "stat": Place("listing", "stat", "Show everything about a name in an image."),
        "cp": Place("copying", "cp", "Copy a file or directory out of an image."),
        "export": Place("exporting", "export", "Write an image's file system as a tar archive."),
    },
    "Examine": {
        "inspect": Place("documents", "inspect", "Show manifest, platforms, configuration, layers, history."),
        "layers": Place("documents", "layers", "List an image's layers."),
        "blob": Place("reading", "blob", "Write a stored blob to standard output."),
        "log": Place("provenance", "log", "Show every version of a path."),
        "why": Place("provenance", "why", "Say which layer and step a path is from, and where it lies."),
        "annotate": Place("provenance", "annotate", "Say which layer each line of input is about."),
        "receipt": Place("provenance", "receipt", "Print a proof that a file is in the image, as JSON."),
        "verify": Place("verifying", "verify", "Check an image against its digests, byte by byte."),
        "deleted": Place("remains", "deleted", "List what was deleted, by what, and what is left of it."),
        "wasted": Place("remains", "wasted", "Add up the bytes in layers that no one sees."),
        "diff": Place("comparing", "diff", "List how two images differ."),
        "audit": Place("auditing", "audit", "List privileges, odd names and traces of tampering."),
        "find": Place("searching", "find", "Find names by the tests of GNU find, deleted ones too."),
        "grep": Place("searching", "grep", "Search files' data, deleted ones' too."),
        "timeline": Place("timelines", "timeline", "Print what happened when, for mactime, plaso or Timesketch."),
        "hash": Place("hashing", "hashes", "Hash every file of an image, and look hashes up in lists."),
        "evidence": Place("evidence", "evidence", "Check evidence logs."),
    },
    "Keep what a container changed": {
        "diff-upper": Place("changing", "diff_upper", "List what a container changed."),
        "commit": Place("changing", "commit", "Make an image of what a container changed."),
    },
    "Housekeeping": {
        "index": Place("documents", "index", "Index images now, so that mounting them is instant."),
        "cache": Place("caching", "cache", "Show and clean the cache."),
        "doctor": Place("machine", "doctor", "Say what this machine can do, and how to change it."),
        "completion": Place("shell", "completion", "Print a shell's completion script."),
        "install-helper": Place("fstab", "install_helper", "Let mount(8) and fstab mount images."),
        "mount-helper": Place("fstab", "mount_helper", "Be mount(8)'s helper for the type fuse.ocifs."),
    },
}
PLACES: Final = {name: place for family in FAMILIES.values() for name, place in family.items()}


class Ocifs(click.Group):
    """The top of the command line: knows names, loads what is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 (click's signature)
        """List the names, in the order of help."""
        return list(PLACES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 (as above)
        """Load one command."""
        place = PLACES.get(cmd_name)
        if place is None:
            return None
        command: click.Command = getattr(importlib.import_module(f"ocifs.cli.{place.module}"), place.attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Name the nearest commands if there is none of that name."""
        if args and args[0] not in PLACES and not args[0].startswith("-"):
            import difflib  # only on a mistake

            near = difflib.get_close_matches(args[0], PLACES, 3, 0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            ctx.fail(f"there is no command {args[0]!r}{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 (as above)
        """List the commands by family."""
        for family, places in FAMILIES.items():
            with formatter.section(family):
                formatter.write_dl([(name, place.summary) for name, place in places.items()])


def _version(ctx: click.Context, _: click.Parameter, value: bool) -> None:  # noqa: FBT001 (click's signature)
    if not value or ctx.resilient_parsing:
        return
    from importlib.metadata import PackageNotFoundError, version  # takes 20 ms

    try:
        click.echo(f"ocifs {version('ocifs-mount')}")
    except PackageNotFoundError:
        click.echo("ocifs, from a source tree that is not installed")
    ctx.exit()


CONTEXT: Final[dict[str, Any]] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(
    cls=Ocifs,
    context_settings=CONTEXT,
    no_args_is_help=False,
    subcommand_metavar="COMMAND …",
    epilog="""\b
A REF names an image on disk:
  DIR, FILE.tar                       whatever is there is recognised
  oci:DIR[:TAG]                       OCI image layout
  oci-archive:FILE[:TAG]              the same as a tar
  docker-archive:FILE[:NAME]          docker save
  dir:DIR                             skopeo's directory
  containerd:NAME                     containerd's store, offline
  …@sha256:HEX  …:@N  …#N             by digest; the Nth manifest; up to layer N

\b
Examples:
  ocifs mount oci:images/app:1.2 /mnt
  ocifs ls -l app.tar /etc
  ocifs cat oci:images/app:1.2 /etc/os-release
  ocifs umount /mnt

\b
Exit status: 0 fine, 1 a check failed, 2 usage, 3 not found, 4 image damaged or refused,
5 unsupported, 6 the machine or a permission lacks something, 7 busy.""",
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version and exit."
)
def ocifs() -> None:
    """Mount container images, and look inside them, as they lie on disk: nothing is unpacked."""
