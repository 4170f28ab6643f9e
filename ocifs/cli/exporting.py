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

from ocifs.cli import archive, output
from ocifs.cli import options as opt
from ocifs.cli.listing import walk
from ocifs.cli.options import Choice
from ocifs.cli.reading import pieces
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
    root = view.inode(view.root)
    write(archive.header(archive.Member(b".", Kind.DIR, root.mode, root.uid, root.gid, root.mtime_ns, xattrs=_xattrs(view, root.ino))))
    for _, entries in _preorder(view):
        for path, ino in entries:
            found = view.inode(ino)
            hard_link = first_names.get(ino) if found.kind is not Kind.DIR else None
            if found.kind is Kind.FILE and view.tree.unreadable(ino):
                output.complain(f"left out {output.decode(path)}: it is a hard link to a file that no layer holds (rule H6)")
                left_out += 1
                continue
            if found.nlink > 1 and hard_link is None and found.kind is not Kind.DIR:
                first_names[ino] = path
            member = archive.Member(
                path,
                found.kind,
                found.mode,
                found.uid,
                found.gid,
                found.mtime_ns,
                size=found.size if found.kind is Kind.FILE else 0,
                target=view.readlink(ino) if found.kind is Kind.SYMLINK else b"",
                rdev=found.rdev,
                xattrs=_xattrs(view, ino),
                hard_link=hard_link,
            )
            if found.kind is Kind.FILE and hard_link is None:
                _write_file(view, ino, member, write)
            else:
                write(archive.header(member))
    write(archive.END)
    return left_out


def _preorder(view: RootFS) -> Iterator[tuple[bytes, list[tuple[bytes, int]]]]:
    """Directories from the root down, each with the paths below it as an archive has them: without a leading slash."""
    for where, entries in walk(view, view.root, b"/"):
        yield where, [(entry.path[1:], entry.ino) for entry in entries]


def _xattrs(view: RootFS, ino: int) -> tuple[tuple[bytes, bytes], ...]:
    return tuple(view.xattrs(ino).items())


def _write_file(view: RootFS, ino: int, member: archive.Member, write: Write) -> None:
    """A file with its data: whole, or its segments if it has holes."""
    segments: list[tuple[int, int]] = []
    offset, holes = 0, False
    for piece in view.tree.extents(ino, 0, member.size):
        if not piece.layer:
            holes = True
        elif segments and sum(segments[-1]) == offset:
            segments[-1] = (segments[-1][0], segments[-1][1] + piece.size)
        else:
            segments.append((offset, piece.size))
        offset += piece.size
    write(archive.header(member, segments if holes else None))
    stored = 0
    for start, size in segments:
        for data in pieces(view, ino, start=start, size=size):
            write(data)
            stored += len(data)
    write(archive.padding(stored))


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
