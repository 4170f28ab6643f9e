"""``mount``, ``umount``, ``ps``, ``stat-mount``.

`ocifs.mount` and `ocifs.daemon` do the work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click
import msgspec

from ocifs.cli import options as opt
from ocifs.cli import output
from ocifs.cli.options import Choice
from ocifs.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from click.shell_completion import CompletionItem

    from ocifs.daemon import Listed
    from ocifs.examined import Examined
    from ocifs.image import Image, ImageOptions

_COLUMNS: Final = {
    "requests": "REQUESTS",
    "read_bytes": "READ",
    "decoded_bytes": "DECODED",
    "decoded_spans": "SPANS",
    "span_hits": "HITS",
    "errors": "ERRORS",
}
"""What of statistics a line has room for. Spans are verified when they are decoded."""


def _complete_mountpoint(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from ocifs.cli.shell import complete_mountpoint  # only a shell asks

    return complete_mountpoint(incomplete)


class _Mount(click.Command):
    """The command, whose flag --examine may be followed by words: ``--examine=visible``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take what follows the flag for an option of its own: click would take the next argument for it."""
        end = args.index("--") if "--" in args else len(args)
        spelt: list[str] = []
        for word in args[:end]:
            flag, equals, value = word.partition("=")
            spelt += [flag, f"--views={value}"] if flag == "--examine" and equals else [word]
        return super().parse_args(ctx, spelt + args[end:])


@click.command(
    cls=_Mount,
    epilog=opt.examples(
        "ocifs mount oci:images/app:1.2 /mnt",
        "ocifs mount -o allow_other,noexec app.tar /mnt",
        "ocifs mount --examine=visible evidence.tar /mnt",
        "ocifs mount --layer 3 oci:images/app:1.2 /mnt",
        "ocifs mount --foreground -v containerd:docker.io/library/redis:7 /mnt",
    ),
)
@click.option(
    "--driver",
    type=click.Choice(opt.DRIVERS),
    default="auto",
    help="Who walks the tree: fuse, this program, works everywhere; erofs, the kernel, is faster, needs root and Linux "
    "6.12, and shows the mount to all users; auto, erofs where it works and nothing asks for fuse.  [default: auto]",
)
@click.option("-f", "--foreground", is_flag=True, help="Serve in this process, until the mount ends.")
@click.option("-o", "fuse_words", metavar="OPT[,OPT…]", multiple=True, help="Mount options, as allow_other or noexec.")
@click.option("--views", hidden=True)
@opt.ref_argument
@click.argument("directory", metavar="DIR", type=click.Path(file_okay=False))
@opt.data_options
def mount(
    choice: Choice, ref: str, directory: str, *, driver: str, foreground: bool, fuse_words: tuple[str, ...]
) -> None:
    """Mount an image's file system on a directory, read-only, and return when it answers.

    A daemon goes on serving it in the background until it is unmounted. Layers that were never seen before are indexed
    first; after that a mount takes no longer than starting ocifs.

    As root the mount is, like any other, there for every user of the machine; with --driver fuse it is for root alone,
    unless -o allow_other is given. --examine, --layer and options that only FUSE knows (allow_other, allow_root,
    auto_unmount, default_permissions) are served by fuse; -v says why.

    With --examine the mount is evidence: nosuid, nodev and noexec, every object says where it comes from (getfattr -d), and
    a directory .ocifs in its root, which no listing shows, has each layer alone (layers), the image as its first layers
    make it (upto), what was deleted (deleted), every version of every path (history), blobs and tars (raw), bytes that
    belong to no file (slack), and reports. --examine=visible lists it; --examine=sha256 has getfattr -d show, and so read,
    every file's SHA-256; both: --examine=visible,sha256.
    """
    words = [word for group in fuse_words for word in group.split(",") if word]
    mount_on(choice, ref, directory, driver=driver, words=words, foreground=foreground)


def mount_on(
    choice: Choice, ref: str, directory: str, *, driver: str, words: Sequence[str], foreground: bool = False
) -> None:
    """Mount as the options say. Wrong words are refused before anything else is done."""
    wanted = choice.image_options()
    cache_bytes = choice.cache_bytes()
    from ocifs.driver import evidence_options
    from ocifs.mount import reserve  # only what mounts loads FUSE

    examining = wanted.examine or wanted.layer is not None
    if wanted.examine:
        words = evidence_options(words)
        _views(choice)
    with (
        reserve(opt.place(directory), wanted=driver, words=words, examining=examining) as place,
        opt.opened_store(choice) as store,
        opt.opened_image(choice, ref, store=store) as image,
    ):
        examined = _examined(choice, wanted, ref, image)
        place.mount(image, store.path, reference=ref, cache_bytes=cache_bytes, foreground=foreground, examined=examined)


def _examined(choice: Choice, options: ImageOptions, ref: str, image: Image) -> Examined | None:
    """What the mount shows beside the image: nothing unless it is examined, nor where there are no views."""
    if not options.examine:
        return None
    artifact = image.resolved.image.artifact is not None
    if artifact or options.layer is not None:
        what = "an artifact" if artifact else "a layer alone"
        output.complain(f"warning: a mount of {what} has no .ocifs, nor attributes that say where things come from")
        return None
    from ocifs.cli.reports import reports
    from ocifs.examined import Examined

    views = _views(choice)
    return Examined(options, reports(ref), visible="visible" in views, list_hashes="sha256" in views)


def _views(choice: Choice) -> set[str]:
    """The words behind --examine=. Raises `UsageError` for one that is not known."""
    words = set() if choice.views is None else set(choice.views.split(","))
    if unknown := words - {"visible", "sha256"}:
        raise UsageError(f"--examine={min(unknown)} is not known; there are visible and sha256")
    return words


@click.command(epilog=opt.examples("ocifs umount /mnt", "ocifs umount --lazy /mnt/a /mnt/b"))
@click.option("-l", "--lazy", is_flag=True, help="Take it out of sight now, even if it is in use; do not wait.")
@click.option("--dead", is_flag=True, help="Only clean up after a daemon that was killed; leave alone what is served.")
@click.argument("directories", metavar="DIR…", nargs=-1, required=True, shell_complete=_complete_mountpoint)
@opt.plain_options
def umount(choice: Choice, directories: tuple[str, ...], *, lazy: bool, dead: bool) -> None:  # noqa: ARG001 (-v has done what it does)
    """Unmount what ocifs mounted, and return when its daemon is gone. Cleans up after a daemon that was killed."""
    from ocifs import daemon

    def end(directory: str) -> None:
        if dead:
            daemon.clean_up(opt.place(directory))
        else:
            daemon.unmount(opt.place(directory), lazy=lazy)

    opt.for_each(directories, end)


@click.command(epilog=opt.examples("ocifs ps", "ocifs ps --statistics", "ocifs ps --json | jq -r .mountpoint"))
@click.option("-s", "--statistics", is_flag=True, help="Ask each daemon what it has done so far.")
@opt.json_lines_option
@opt.plain_options
def ps(choice: Choice, *, statistics: bool, as_json: bool) -> None:  # noqa: ARG001 (-v has done what it does)
    """List what is mounted by this user, oldest first.

    STATE is live; detached: unmounted lazily, or to be seen in another mount namespace only, and served on for whoever
    still uses it; or dead: its daemon was killed, and 'ocifs umount' or the next mount there cleans up.
    """
    from ocifs import daemon

    listed = daemon.records()
    if as_json:
        for one in listed:
            asked = {"statistics": daemon.statistics_of(one)} if statistics else {}
            output.print_json({**msgspec.structs.asdict(one.record), "state": one.state.value, **asked})
    elif statistics:
        _print_statistics(listed)
    else:
        _print_listed(listed)


def _print_listed(listed: Sequence[Listed]) -> None:
    output.print_table(
        ("MOUNT POINT", "IMAGE", "DRIVER", "LAYERS", "PID", "STATE", "SINCE"),
        [
            (
                record.mountpoint,
                record.reference,
                record.driver,
                str(record.layers),
                str(record.pid),
                state.value,
                output.local_time(record.started_ns / 10**9),
            )
            for record, state in listed
        ],
        right=(3, 4),
    )


def _print_statistics(listed: Sequence[Listed]) -> None:
    """What each has done; nothing of those that do not answer."""
    from ocifs import daemon

    rows = []
    for one in listed:
        done = daemon.statistics_of(one) or {}
        told = [
            "" if value is None else output.human_size(value) if name.endswith("bytes") else str(value)
            for name, value in ((name, done.get(name)) for name in _COLUMNS)
        ]
        rows.append((one.record.mountpoint, one.state.value, *told))
    header = ("MOUNT POINT", "STATE", *_COLUMNS.values())
    output.print_table(header, rows, right=range(2, len(header)))


@click.command("stat-mount", epilog=opt.examples("ocifs stat-mount /mnt", "ocifs stat-mount --json /mnt | jq .errors"))
@opt.json_option
@click.argument("directory", metavar="DIR", shell_complete=_complete_mountpoint)
@opt.plain_options
def stat_mount(choice: Choice, directory: str, *, as_json: bool) -> None:  # noqa: ARG001 (-v has done what it does)
    """Show what the daemon of a mount has done so far.

    SIGUSR1 makes the daemon write the same into its log.
    """
    from ocifs import daemon

    record, statistics = daemon.statistics_at(opt.place(directory))
    if as_json:
        output.print_json(statistics)
        return
    shown = {"mount point": record.mountpoint, "image": record.reference, "driver": record.driver, "pid": record.pid}
    for name, value in {**shown, **statistics}.items():
        size = f" ({output.human_size(value)})" if name.endswith("bytes") and isinstance(value, int) else ""
        output.print_line(output.printable(f"{name.replace('_', ' ') + ':':<20}{value}{size}"))
