"""``export``: the merged file system as a tar archive.

The archive is deterministic: parents before children, names in bytewise order, the first name of a file has its data and
the others are hard links to it. Holes stay holes (GNU sparse format 1.0), because an image may hold a file of an exabyte
that has no data at all. Memory is flat but for the paths of files with several names.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from typing import TYPE_CHECKING

import click

from ocifs import archive, members
from ocifs.cli import options as opt
from ocifs.cli import output
from ocifs.cli.options import Choice
from ocifs.errors import DamagedError, MachineError, UsageError
from ocifs.tree import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ocifs.rootfs import RootFS

    Write = Callable[[bytes | memoryview], object]


@click.command(
    epilog=opt.examples(
        "ocifs export oci:images/app:1.2 -o rootfs.tar",
        "ocifs export app.tar | tar -tv",
        "ocifs export --upto 1 app.tar | sha256sum",
    )
)
@click.option("-o", "--output", "target", metavar="FILE", type=click.Path(), help="Write to FILE, whole or not at all.")
@opt.ref_argument
@opt.data_options
def export(choice: Choice, ref: str, target: str | None) -> None:
    """Write an image's merged file system as a tar archive, to standard output unless -o is given.

    The format is PAX: owners, times to the nanosecond, hard links, devices, extended attributes and any byte in a name
    are kept, and files with holes stay small. The same image gives the same bytes.
    """
    if target is None and output.to_terminal():
        raise UsageError("an archive is not written to a terminal: redirect the output or say -o FILE")
    with opt.opened_view(choice, ref) as (_, view), contextlib.ExitStack() as stack:
        write = output.write if target is None else stack.enter_context(_written(target))
        left_out = write_archive(view, write)
    if left_out:
        raise click.exceptions.Exit(DamagedError.exit_code)


def write_archive(view: RootFS, write: Write) -> int:
    """Write the whole tree; give how many files were left out because their data is missing (rule H6)."""
    first_names: dict[int, bytes] = {}
    left_out = 0
    write(archive.header(members.member(view, b".", view.root)))
    # In any other order GNU tar would set a directory's time and then change it by extracting into it.
    for path, found in view.preorder():
        ino, is_file = found.ino, found.kind is Kind.FILE
        if is_file and view.tree.unreadable(ino):
            output.complain(f"left out {output.decode(path)}: no layer holds its data (rules D6, H6 and L2)")
            left_out += 1
            continue
        hard_link = None
        if found.nlink > 1 and found.kind is not Kind.DIR:
            hard_link = first_names.get(ino)
            if hard_link is None:
                first_names[ino] = path
        members.write(view, ino, members.member(view, path, ino, hard_link), write)
    write(archive.END)
    return left_out


@contextlib.contextmanager
def _written(target: str) -> Iterator[Write]:
    """A file that appears under its name when the block ends well. What is no regular file is written to directly."""
    directory, name = os.path.split(os.path.abspath(target))
    temporary = os.path.join(directory, f".{name[:200]}.{secrets.token_hex(6)}")
    direct = False
    with contextlib.suppress(OSError):
        direct = not stat.S_ISREG(os.stat(target).st_mode)
    flags = os.O_WRONLY | os.O_CLOEXEC | (0 if direct else os.O_CREAT | os.O_EXCL)
    try:
        fd = os.open(target if direct else temporary, flags, 0o666)
    except OSError as error:
        raise MachineError(f"cannot write {target}: {error.strerror}") from error
    done = False
    try:
        with os.fdopen(fd, "wb") as file:
            yield file.write
        if not direct:
            os.replace(temporary, target)
        done = True
    except OSError as error:
        raise MachineError(f"cannot write {target}: {error.strerror}") from error
    finally:
        if not done and not direct:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
