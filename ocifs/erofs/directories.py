"""Directories between the writer's two passes, and paths for what it has to say.

Not here: where anything is placed (`ocifs.erofs.writer`).
"""

from __future__ import annotations

from typing import NoReturn

from ocifs.erofs.layout import BLOCK_SIZE, DIRENT_SIZE, NAME_MAX
from ocifs.errors import DamagedError, UnsupportedError
from ocifs.tree import Node


class Directory:
    """A directory between the passes: its entries in order, where its blocks begin, where they are."""

    __slots__ = (
        "blocks",
        "breaks",
        "name",
        "names",
        "new_children",
        "nid",
        "node",
        "parent",
        "size",
        "start",
        "subdirs",
        "tail",
    )

    def __init__(self, node: Node, parent: Directory | None, name: bytes) -> None:
        self.node = node
        self.parent = parent
        self.name = name
        self.nid = 0
        self.new_children = 0
        self.subdirs = 0
        self.start = 0
        children = node.children or {}
        self.names = sorted([*children, b".", b".."])
        lengths = list(map(len, self.names))
        joined = b"".join(self.names)
        if (
            max(lengths) > NAME_MAX
            or not min(lengths)
            or len(children) + 2 != len(set(self.names))
            or (b"/" in joined or b"\0" in joined)
        ):
            raise ValueError(
                f"a name must be 1 to {NAME_MAX} bytes without / and NUL, and not . or ..: below {self.path()!r}"
            )
        self.breaks = [0]
        used = DIRENT_SIZE * len(lengths) + sum(lengths)
        if used > BLOCK_SIZE:
            used = 0
            for index, length in enumerate(lengths):
                used += DIRENT_SIZE + length
                if used > BLOCK_SIZE:
                    self.breaks.append(index)
                    used = DIRENT_SIZE + length
        self.blocks = len(self.breaks)
        self.size = (self.blocks - 1) * BLOCK_SIZE + used
        self.tail = used if used < BLOCK_SIZE else 0
        """Bytes of the last block that go behind the inode; 0 if they go to a block like the others."""

    def path(self) -> bytes:
        """The directory's path within the tree, for messages."""
        parts: list[bytes] = []
        directory: Directory | None = self
        while directory is not None and directory.parent is not None:
            parts.append(directory.name)
            directory = directory.parent
        return b"/" + b"/".join(reversed(parts))


def refuse(directory: Directory, name: bytes, why: str) -> NoReturn:
    """Say that the format cannot hold what is below ``directory`` by this name."""
    raise UnsupportedError(
        f"{join(directory, name).decode(errors='backslashreplace')} cannot be kept in the image tree: {why}"
    )


def damaged(directory: Directory, name: bytes, why: str) -> NoReturn:
    """Say that what is below ``directory`` by this name cannot be right."""
    raise DamagedError(f"{join(directory, name).decode(errors='backslashreplace')} is damaged: {why}")


def join(directory: Directory, name: bytes) -> bytes:
    """The path of a name below ``directory``."""
    return directory.path().rstrip(b"/") + b"/" + name


def place_tail(directory: Directory, position: int, header: int) -> int:
    """Where a directory's inode goes so that its tail, ``header`` bytes behind it, lies within one block.

    Takes the first place from ``position`` on that does; if none does, the tail becomes a block (``tail`` is set to 0).
    """
    offset = (position + header) % BLOCK_SIZE
    if offset + directory.tail > BLOCK_SIZE:
        shift = BLOCK_SIZE - offset + 31 & ~31  # the inode moves by whole slots
        offset = (position + shift + header) % BLOCK_SIZE
        if offset + directory.tail > BLOCK_SIZE:
            directory.tail = 0
        else:
            position += shift
    return position
