r"""Lists of hashes in the formats that auditors' tools read, a line for each file.

hashdeep
    ``%%%% HASHDEEP-1.0``, a line that names the columns, comments with ``##``, then ``size,HASH,…,name``. The name is the
    rest of the line as it is; hashdeep itself cannot read back a name with a newline. Such a one is written with ``\n``
    (`unfit_for_hashdeep` tells), so that the rest of the list stays whole.
sha256sum
    As coreutils write and check it: ``HASH  name``; if the name has a backslash, newline or carriage return, these are
    ``\\``, ``\n`` and ``\r`` and the line begins with a backslash.
mtree
    The specification of mtree(8) with full paths, names in vis(3)'s octal form (``\ooo``). A name with ``*``, ``?`` or
    ``[`` is a pattern to mtree, so all special characters of patterns in it are preceded by a backslash, itself in octal.

Not here: the hashes (`ocifs.forensics.hashes`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from ocifs.tree import Kind

if TYPE_CHECKING:
    from collections.abc import Callable

    from ocifs.erofs import Inode

_TYPES: Final = {
    Kind.FILE: "file",
    Kind.DIR: "dir",
    Kind.SYMLINK: "link",
    Kind.CHAR: "char",
    Kind.BLOCK: "block",
    Kind.FIFO: "fifo",
}
_MAGIC: Final = frozenset(b"*?[")
_PATTERN: Final = _MAGIC | frozenset(b"]\\")
_LITERAL: Final = frozenset(range(0x21, 0x7F)) - _PATTERN - frozenset(b"#")


def hashdeep_header(algorithms: Sequence[str], comment: bytes) -> bytes:
    """Give the lines that a hashdeep list begins with; ``comment`` is one line that says what it is of."""
    columns = ",".join(("size", *algorithms, "filename"))
    return b"%%%%%%%% HASHDEEP-1.0\n%%%%%%%% %s\n## %s\n##\n" % (columns.encode(), comment.replace(b"\n", b"\\n"))


def hashdeep_line(name: bytes, size: int, digests: Mapping[str, str]) -> bytes:
    """Give a file's line."""
    return b"%d,%s,%s\n" % (size, ",".join(digests.values()).encode(), name.replace(b"\n", b"\\n"))


def unfit_for_hashdeep(name: bytes) -> bool:
    """Whether hashdeep would look for another name than this."""
    return b"\n" in name


def sha256sum_line(name: bytes, digests: Mapping[str, str]) -> bytes:
    """Give a file's line."""
    escaped = name.replace(b"\\", rb"\\").replace(b"\n", rb"\n").replace(b"\r", rb"\r")
    return b"%s%s  %s\n" % (b"" if escaped == name else b"\\", digests["sha256"].encode(), escaped)


MTREE_HEADER: Final = b"#mtree\n"


def mtree_line(path: bytes, found: Inode, readlink: Callable[[int], bytes], digests: Mapping[str, str]) -> bytes:
    """Give the line of anything in a tree; ``path`` is without a leading slash, empty for the root."""
    seconds, nanoseconds = divmod(found.mtime_ns, 10**9)
    words = [
        "./" + _pattern(path) if path else ".",
        f"type={_TYPES[found.kind]}",
        f"uid={found.uid}",
        f"gid={found.gid}",
        f"mode={found.mode & 0o7777:04o}",
        f"nlink={found.nlink}",
        f"time={seconds}.{nanoseconds:09}",
    ]
    if found.kind is Kind.FILE:
        words.append(f"size={found.size}")
        words += [f"{name}={value}" for name, value in digests.items()]
    elif found.kind is Kind.SYMLINK:
        words.append(f"link={vis(readlink(found.ino))}")
    elif found.kind in (Kind.CHAR, Kind.BLOCK):
        words.append(f"device=linux,{found.rdev[0]},{found.rdev[1]}")
    return " ".join(words).encode("ascii") + b"\n"


def vis(name: bytes) -> str:
    """Write a name as ``vis -o`` does."""
    return "".join(chr(byte) if byte in _LITERAL else f"\\{byte:03o}" for byte in name)


def _pattern(path: bytes) -> str:
    """Write a path so that mtree takes each name for itself only: fnmatch(3) sees those that have ``*``, ``?`` or ``[``."""
    return "/".join(
        "".join("\\134" * (byte in _PATTERN) + vis(bytes([byte])) for byte in name) if _MAGIC & set(name) else vis(name)
        for name in path.split(b"/")
    )
