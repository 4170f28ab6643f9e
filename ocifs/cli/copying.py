"""``cp``: out of an image onto disk. Where to is decided here, `unpack` does it."""

from __future__ import annotations

import os

import click

from ocifs.cli import options as opt
from ocifs.cli import output
from ocifs.cli.options import Choice
from ocifs.errors import DamagedError, MachineError, NotFoundError, UsageError


@click.command(
    epilog=opt.examples(
        "ocifs cp oci:images/app:1.2 /etc/passwd .",
        "ocifs cp app.tar /usr/share/doc /tmp/doc",
        "ocifs cp --layer 2 app.tar /etc/token /tmp/token",
        "ocifs cp oci:images/app:1.2 / rootfs",
    )
)
@click.option("-L", "--follow-link", is_flag=True, help="If PATH is a link, copy what it leads to.")
@click.option("--force", is_flag=True, help="Replace a file or link that is there; a directory never is.")
@opt.ref_argument
@click.argument("path", metavar="PATH")
@click.argument("dest", metavar="DEST", type=click.Path())
@opt.data_options
def cp(choice: Choice, ref: str, path: str, dest: str, *, follow_link: bool, force: bool) -> None:
    """Copy a file, a link or a whole directory out of an image.

    DEST is a directory to copy into, or a new name. Modes, times, hard links, holes and extended attributes are kept; as
    root also owners, setuid bits and devices. The copy appears as a whole or not at all, and nothing that is there is
    replaced unless --force is given. Nothing in the image can lead outside of DEST.
    """
    from ocifs.cli.unpack import Unpacker  # only this command loads ctypes

    source = opt.inside(path)
    with opt.opened_view(choice, ref) as (_, view):
        ino = opt.find(view, source, follow=follow_link)
        privileged = os.geteuid() == 0
        unpacker = Unpacker(view, privileged=privileged, report=output.complain)
        folder, name = _destination(dest, source)
        try:
            parent = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise NotFoundError(f"there is no directory {os.fsdecode(folder)} to copy into") from None
        except OSError as error:
            raise MachineError(f"cannot copy into {os.fsdecode(folder)}: {error.strerror}") from error
        try:
            unpacker.copy(ino, parent, name, replace=force)
        finally:
            os.close(parent)
    if unpacker.lost_xattrs:
        many = f"{unpacker.lost_xattrs} extended attribute{'s' if unpacker.lost_xattrs > 1 else ''}"
        output.complain(f"warning: {many} could not be set here")
    if unpacker.left_out:
        raise click.exceptions.Exit(DamagedError.exit_code if unpacker.damaged else MachineError.exit_code)


def _destination(dest: str, source: bytes) -> tuple[bytes, bytes]:
    """The directory to open and the name to make in it. DEST is the user's word: links in it are followed."""
    from ocifs.cli.unpack import check_name

    target = os.fsencode(dest)
    if not target:
        raise UsageError("the destination is empty")
    last = source.rstrip(b"/").rpartition(b"/")[2]
    if os.path.isdir(target):
        if last in (b"", b".", b".."):
            shown = os.fsdecode(target)
            raise UsageError(
                f"{shown} exists, and {output.decode(source)} has no name to have in it: name one that is new"
            )
        return target, last
    head, name = os.path.split(target.rstrip(b"/"))
    return head or b".", check_name(name)
