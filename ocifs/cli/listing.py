"""Names and their attributes: ``ls`` and ``stat``.

Owners are numbers, because that is what an image holds: names depend on which machine's or which image's passwd file one
asks. Times are local, in the form that ``ls --time-style=long-iso`` has, which does not depend on the day it is printed.
What is listed on a pipe is byte for byte what ``ls -ln --time-style=long-iso`` prints on a mount, but for its line
"total".

Not here: data (`reading`).
"""

from __future__ import annotations

import base64
import stat as _stat
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import click

from ocifs.cli import options as opt
from ocifs.cli import output
from ocifs.cli.options import Choice
from ocifs.errors import DamagedError, OcifsError
from ocifs.tree import Kind

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ocifs.erofs import Inode
    from ocifs.image import Image
    from ocifs.rootfs import RootFS

TYPE_NAMES: Final = {
    Kind.FILE: "file",
    Kind.DIR: "dir",
    Kind.SYMLINK: "symlink",
    Kind.CHAR: "char",
    Kind.BLOCK: "block",
    Kind.FIFO: "fifo",
}
"""What ``--json`` calls a type. Stable."""

_SPOKEN: Final = {
    Kind.FILE: "regular file",
    Kind.DIR: "directory",
    Kind.SYMLINK: "symbolic link",
    Kind.CHAR: "character device",
    Kind.BLOCK: "block device",
    Kind.FIFO: "fifo",
}
_DEVICES: Final = (Kind.CHAR, Kind.BLOCK)


# -- one entry as JSON ---------------------------------------------------------------------------------------------


def first_data(view: RootFS, ino: int, size: int) -> tuple[int, int] | None:
    """(layer, layer_offset) of a file's first data byte; None if it has none, or none that can be read."""
    if view.tree.unreadable(ino):
        return None
    for layer, layer_offset, _ in view.tree.extents(ino, 0, size):
        if layer:
            return layer, layer_offset
    return None


def entry_json(view: RootFS, path: bytes, ino: int) -> dict[str, Any]:
    """The stable fields of an entry; what does not apply is null."""
    found = view.inode(ino)
    origin = view.tree.origin(ino)
    data = first_data(view, ino, found.size) if found.kind is Kind.FILE else None
    return {
        "path": output.decode(path),
        "target": output.decode(view.readlink(ino)) if found.kind is Kind.SYMLINK else None,
        "type": TYPE_NAMES[found.kind],
        "mode": f"{found.mode & 0o7777:04o}",
        "uid": found.uid,
        "gid": found.gid,
        "size": found.size,
        "mtime_ns": found.mtime_ns,
        "nlink": found.nlink,
        "ino": found.ino,
        "rdev": list(found.rdev) if found.kind in _DEVICES else None,
        "xattrs": {
            output.decode(name): base64.b64encode(value).decode("ascii") for name, value in view.xattrs(ino).items()
        },
        "layer": origin.layer or None if origin else None,
        "layer_offset": data[1] if data else None,
    }


# -- ls ------------------------------------------------------------------------------------------------------------


class _Listed(NamedTuple):
    """A name to print: as it is shown, its whole path, its inode."""

    name: bytes
    path: bytes
    ino: int


class _Manner(NamedTuple):
    """How names are printed."""

    long: bool
    columns: bool
    terminal: bool


def _join(directory: bytes, name: bytes) -> bytes:
    return directory.rstrip(b"/") + b"/" + name


def children(view: RootFS, directory: int, path: bytes, *, dots: bool = False) -> list[_Listed]:
    """The entries of a directory by name; ``.`` and ``..`` only if asked for."""
    return [
        _Listed(name, _join(path, name), ino)
        for name, ino, *_ in view.readdir(directory)
        if dots or name not in (b".", b"..")
    ]


def walk(view: RootFS, directory: int, path: bytes, *, dots: bool = False) -> Iterator[tuple[bytes, list[_Listed]]]:
    """Every directory from this one down, parents first, with its entries. Links are not followed."""
    todo = [(path, directory)]
    while todo:
        where, ino = todo.pop()
        entries = children(view, ino, where, dots=dots)
        yield where, entries
        below = [
            (entry.path, entry.ino)
            for entry in entries
            if entry.name not in (b".", b"..") and view.inode(entry.ino).kind is Kind.DIR
        ]
        todo.extend(reversed(below))


def _print_entries(view: RootFS, entries: Sequence[_Listed], manner: _Manner) -> None:
    if manner.long:
        _print_long(view, entries, manner)
    elif manner.columns:
        _print_columns([output.shown(entry.name, terminal=True) for entry in entries])
    else:
        for entry in entries:
            output.print_line(output.shown(entry.name, terminal=manner.terminal))


def _print_columns(names: Sequence[str]) -> None:
    """Names in as many columns as the terminal has room for, read downwards."""
    import shutil  # only on a terminal

    if not names:
        return
    room = shutil.get_terminal_size().columns
    widths = [output.width(name) for name in names]
    for rows in range(1, len(names) + 1):
        columns = [range(start, min(start + rows, len(names))) for start in range(0, len(names), rows)]
        column_widths = [max(widths[number] for number in column) for column in columns]
        if sum(column_widths) + 2 * (len(columns) - 1) <= room or rows == len(names):
            for row in range(rows):
                line = ""
                for column, column_width in zip(columns, column_widths, strict=True):
                    if row < len(column):
                        number = column[row]
                        line += names[number] + " " * (column_width - widths[number] + 2)
                output.print_line(line.rstrip())
            return


def _print_long(view: RootFS, entries: Sequence[_Listed], manner: _Manner) -> None:
    inodes = [view.inode(entry.ino) for entry in entries]
    major = max((len(str(found.rdev[0])) for found in inodes if found.kind in _DEVICES), default=0)
    minor = max((len(str(found.rdev[1])) for found in inodes if found.kind in _DEVICES), default=0)
    sizes = max((len(str(found.size)) for found in inodes if found.kind not in _DEVICES), default=0)
    if major:
        sizes = max(sizes, major + len(", ") + minor)
    links, uids, gids = (
        (
            max((len(str(value)) for value in values), default=0)
            for values in zip(*((found.nlink, found.uid, found.gid) for found in inodes), strict=True)
        )
        if inodes
        else (0, 0, 0)
    )
    for entry, found in zip(entries, inodes, strict=True):
        if found.kind in _DEVICES:
            # GNU ls gives the major number what the widest column leaves.
            size = f"{found.rdev[0]:>{sizes - len(', ') - minor}}, {found.rdev[1]:>{minor}}"
        else:
            size = f"{found.size:>{sizes}}"
        output.print_line(
            f"{_mode_text(found)} {found.nlink:>{links}} {found.uid:>{uids}} {found.gid:>{gids}} {size} "
            f"{output.local_time(found.mtime_ns // 10**9)} {_long_name(view, entry, found, manner)}"
        )


def _mode_text(found: Inode) -> str:
    return _stat.filemode(found.kind << 12 | found.mode & 0o7777)


def _long_name(view: RootFS, entry: _Listed, found: Inode, manner: _Manner) -> str:
    name = output.shown(entry.name, terminal=manner.terminal)
    if found.kind is not Kind.SYMLINK:
        return name
    return f"{name} -> {output.shown(view.readlink(entry.ino), terminal=manner.terminal)}"


@click.command(
    epilog=opt.examples(
        "ocifs ls oci:images/app:1.2",
        "ocifs ls -l app.tar /etc /usr/bin/env",
        "ocifs ls -lR --layer 3 app.tar",
        "ocifs ls -R --json app.tar | jq -r 'select(.mode >= \"4000\") | .path'",
    )
)
@click.option("-l", "long", is_flag=True, help="Long: type and mode, links, owner, size, time, link target.")
@click.option("-R", "--recursive", is_flag=True, help="Directories below too.")
@click.option("-d", "--directory", "itself", is_flag=True, help="A directory itself, not what is in it.")
@click.option("-a", "--all", "dots", is_flag=True, help="The names . and .. too; all others are always shown.")
@click.option("-1", "one", is_flag=True, help="One name a line on a terminal too.")
@opt.json_lines_option
@opt.ref_argument
@click.argument("paths", metavar="[PATH…]", nargs=-1)
@opt.tree_options
def ls(
    choice: Choice,
    ref: str,
    paths: tuple[str, ...],
    *,
    long: bool,
    recursive: bool,
    itself: bool,
    dots: bool,
    one: bool,
    as_json: bool,
) -> None:
    """List directories of an image, sorted bytewise by name. PATH is / unless given, with or without leading slash.

    Owners are numbers. On a terminal, control characters in names are escaped; in a pipe names are as they are. A link
    given as PATH is followed if it leads to a directory, unless -l or -d is given. With --json, -R lists everything below
    PATH; fields are path, target, type, mode, uid, gid, size, mtime_ns, nlink, ino, rdev, xattrs, layer, layer_offset.
    """
    terminal = output.to_terminal()
    manner = _Manner(long, terminal and not one, terminal)
    wanted = [opt.inside(path) for path in paths] or [b"/"]
    with opt.opened_view(choice, ref) as (_, view):
        single: list[_Listed] = []
        directories: list[_Listed] = []
        failure: OcifsError | None = None
        for path in wanted:
            try:
                place = _place(view, path, itself=itself, follow=not (long or itself))
            except OcifsError as error:
                failure = _worse(failure, error, alone=len(wanted) == 1)
                continue
            (directories if view.inode(place.ino).kind is Kind.DIR and not itself else single).append(place)
        if as_json:
            _ls_json(view, single, directories, recursive=recursive, dots=dots)
        else:
            _ls_text(view, single, directories, manner, recursive=recursive, dots=dots, headed=len(wanted) > 1)
        if failure is not None:
            raise click.exceptions.Exit(failure.exit_code)


def _place(view: RootFS, path: bytes, *, itself: bool, follow: bool) -> _Listed:
    """What a PATH argument means. A link to something that is no directory, or to nothing, means itself, as for ls."""
    ino = opt.find(view, path, follow=False)
    if follow and view.inode(ino).kind is Kind.SYMLINK and not itself:
        try:
            there = view.resolve(path)
        except OcifsError:
            there = ino
        if view.inode(there).kind is Kind.DIR:
            ino = there
    return _Listed(path, path, ino)


def _worse(before: OcifsError | None, error: OcifsError, *, alone: bool) -> OcifsError:
    """Report one path's failure and go on with the others; alone it is simply raised. Keep the highest status."""
    if alone:
        raise error
    output.complain(str(error))
    return error if before is None or error.exit_code > before.exit_code else before


def _ls_json(
    view: RootFS, single: Sequence[_Listed], directories: Sequence[_Listed], *, recursive: bool, dots: bool
) -> None:
    for entry in single:
        output.print_json(entry_json(view, entry.path, entry.ino))
    for place in directories:
        if recursive:
            for _, entries in walk(view, place.ino, place.path):
                for entry in entries:
                    output.print_json(entry_json(view, entry.path, entry.ino))
        else:
            for entry in children(view, place.ino, place.path, dots=dots):
                output.print_json(entry_json(view, entry.path, entry.ino))


def _ls_text(
    view: RootFS,
    single: Sequence[_Listed],
    directories: Sequence[_Listed],
    manner: _Manner,
    *,
    recursive: bool,
    dots: bool,
    headed: bool,
) -> None:
    _print_entries(view, single, manner)
    first = not single
    for place in directories:
        listed = (
            walk(view, place.ino, place.path, dots=dots)
            if recursive
            else iter([(place.path, children(view, place.ino, place.path, dots=dots))])
        )
        for where, entries in listed:
            if headed or recursive:
                if not first:
                    output.print_line("")
                output.print_line(output.shown(where, terminal=manner.terminal) + ":")
            first = False
            _print_entries(view, entries, manner)


# -- stat ----------------------------------------------------------------------------------------------------------


@click.command(
    epilog=opt.examples(
        "ocifs stat oci:images/app:1.2 /usr/bin/env",
        "ocifs stat --json app.tar /etc/passwd | jq .layer",
    )
)
@click.option("-L", "--dereference", is_flag=True, help="Of a link, show what it leads to.")
@opt.json_lines_option
@opt.ref_argument
@click.argument("paths", metavar="PATH…", nargs=-1, required=True)
@opt.tree_options
def stat(choice: Choice, ref: str, paths: tuple[str, ...], *, dereference: bool, as_json: bool) -> None:
    """Show everything about a name in an image: attributes, extended attributes, which layer and entry made it.

    Links on the way to it are followed, the name itself is not unless -L is given.
    """
    terminal = output.to_terminal()
    with opt.opened_view(choice, ref) as (image, view):
        failure: OcifsError | None = None
        for path in map(opt.inside, paths):
            try:
                ino = opt.find(view, path, follow=dereference)
                if as_json:
                    output.print_json(entry_json(view, path, ino))
                else:
                    _print_stat(image, view, path, ino, terminal=terminal)
            except OcifsError as error:
                failure = _worse(failure, error, alone=len(paths) == 1)
        if failure is not None:
            raise click.exceptions.Exit(failure.exit_code)


def _print_stat(image: Image, view: RootFS, path: bytes, ino: int, *, terminal: bool) -> None:
    found = view.inode(ino)
    name = output.shown(path, terminal=terminal)
    if found.kind is Kind.SYMLINK:
        name += f" -> {output.shown(view.readlink(ino), terminal=terminal)}"
    lines = [
        ("File", name),
        ("Type", _SPOKEN[found.kind]),
        ("Size", str(found.size)),
        ("Mode", f"{found.mode & 0o7777:04o} {_mode_text(found)}"),
        ("Owner", f"{found.uid}:{found.gid}"),
        ("Modified", _precise_time(found.mtime_ns)),
        ("Links", str(found.nlink)),
        ("Inode", str(found.ino)),
    ]
    if found.kind in _DEVICES:
        lines.append(("Device", f"{found.rdev[0]}, {found.rdev[1]}"))
    origin = view.tree.origin(ino)
    if origin is not None and origin.layer:
        layer = next((layer for layer in image.layers if layer.number == origin.layer), None)
        digest = f" {layer.blob.digest or layer.index.digest}" if layer else ""
        entry = "implied by what is below it" if origin.entry < 0 else f"entry {origin.entry}"
        lines.append(("Layer", f"{origin.layer}{digest}, {entry}"))
    if found.kind is Kind.FILE:
        lines.append(("Data", _data_text(view, found)))
    for number, (key, value) in enumerate(view.xattrs(ino).items()):
        attribute = f"{output.shown(key, terminal=terminal)}={_value_text(value)}"
        lines.append(("" if number else "Attributes", attribute))
    for label, text in lines:
        output.print_line(f"{label + ':' if label else '':<12}{text}")


def _data_text(view: RootFS, found: Inode) -> str:
    if view.tree.unreadable(found.ino):
        return "missing: no layer holds it (rules D6, H6 and L2)"
    try:
        data = first_data(view, found.ino, found.size)
    except DamagedError as error:
        return str(error)
    return f"from layer offset {data[1]} of layer {data[0]}" if data else "none"


def _precise_time(mtime_ns: int) -> str:
    seconds, nanoseconds = divmod(mtime_ns, 10**9)
    text = output.local_time(seconds, form="%Y-%m-%d %H:%M:%S.NNN %z")
    return text.replace("NNN", f"{nanoseconds:09}")


def _value_text(value: bytes) -> str:
    """An attribute's value as getfattr shows it: text in quotes, anything else in hex."""
    try:
        text = value.decode("ascii")
    except UnicodeDecodeError:
        text = "\0"
    if text.isprintable():
        quoted = text.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{quoted}"'
    return f"0x{value.hex()}"
