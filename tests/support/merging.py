"""Merge layers made of tar bytes, and say in plain words what came out; the same for a directory on disk.

`look` gives path → description, for instance ``{"bin": "dir", "bin/sh": "symlink -> dash", "x": "file 600 5:5 'text'"}``:
the kind, the mode unless it is the usual one (755, 644), the owner unless it is root, then what it holds. Times are left
out, for an engine that unpacks gives implied directories the time of day. Names of one inode carry ``&`` and a number.

Not here: building the bytes (`tests.support.tarball`), a second opinion on the merge (`tests.support.naive_merge`).
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ocifs.overlay import LayerInput, MergeOptions, merge
from ocifs.tar import TarScanner
from ocifs.tree import Kind, Node, Tree
from tests.support.tarball import tarball

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

USUAL_MODES = {"dir": 0o755, "symlink": 0o777}


def layer(*entries: bytes) -> bytes:
    """Give the tar of a layer."""
    return tarball(*entries)


def layer_input(tar: bytes, number: int = 1) -> LayerInput:
    """Scan a layer."""
    scanner = TarScanner()
    entries = scanner.feed(tar)
    summary = scanner.finish()
    return LayerInput(number, entries, summary.damage, summary.notices)


def merged(layers: Sequence[bytes], **options: Any) -> Tree:
    """Merge tars, the base first."""
    inputs = [layer_input(tar, number) for number, tar in enumerate(layers, 1)]
    return merge(inputs, MergeOptions(**options))


@dataclass
class Seen:
    """What a path is, whoever made it."""

    kind: str
    mode: int
    owner: tuple[int, int]
    holds: str
    inode: object

    def words(self, groups: dict[object, str]) -> str:
        """Describe it."""
        words = [self.kind]
        if self.mode != USUAL_MODES.get(self.kind, 0o644):
            words.append(f"{self.mode:o}")
        if self.owner != (0, 0):
            words.append("{}:{}".format(*self.owner))
        return " ".join(filter(None, [*words, self.holds, groups.get(self.inode, "")]))


def described(seen: Iterable[tuple[str, Seen]]) -> dict[str, str]:
    """Path → description, sorted; names of one inode get the same ``&1``, ``&2``, …"""
    found = dict(sorted(seen))
    names: dict[object, int] = {}
    for thing in found.values():
        names[thing.inode] = names.get(thing.inode, 0) + 1
    groups: dict[object, str] = {}
    for thing in found.values():
        if names[thing.inode] > 1 and thing.inode not in groups:
            groups[thing.inode] = f"&{len(groups) + 1}"
    return {path: thing.words(groups) for path, thing in found.items()}


def text(path: bytes) -> str:
    return os.fsdecode(path)


def nodes(root: Node) -> Iterator[tuple[bytes, Node]]:
    """Every path below a root with its node; the root is ``b""``."""
    stack = [(b"", root)]
    while stack:
        path, node = stack.pop()
        yield path, node
        stack += [(path + b"/" + name if path else name, child) for name, child in (node.children or {}).items()]


def content(node: Node, layers: Sequence[bytes]) -> bytes:
    """What a file reads as."""
    data = bytearray(node.size)
    for extent in node.extents:
        piece = layers[extent.layer - 1][extent.layer_offset : extent.layer_offset + extent.size]
        data[extent.file_offset : extent.file_offset + extent.size] = piece
    return bytes(data)


def look(tree: Tree, layers: Sequence[bytes]) -> dict[str, str]:
    """Describe a merged tree, without its root."""
    return described((text(path), _seen_node(node, layers)) for path, node in nodes(tree.root) if path)


def _seen_node(node: Node, layers: Sequence[bytes]) -> Seen:
    kind, holds = node.kind.name.lower(), ""
    if node.kind is Kind.FILE:
        holds = "unreadable" if node.unreadable else repr(content(node, layers).decode("latin-1"))
    elif node.kind is Kind.SYMLINK:
        holds = f"-> {text(node.target)}"
    elif node.kind in (Kind.CHAR, Kind.BLOCK):
        holds = "{},{}".format(*node.rdev)
    return Seen(kind, node.mode, (node.uid, node.gid), holds, id(node))


def look_at_directory(root: Path) -> dict[str, str]:
    """Describe a directory on disk, without itself."""
    seen = []
    for here, directories, files in os.walk(root):
        for name in directories + files:
            path = os.path.join(here, name)
            seen.append((os.path.relpath(path, root), _seen_file(path)))
    return described(seen)


def _seen_file(path: str) -> Seen:
    status = os.lstat(path)
    kind, holds = Kind(stat.S_IFMT(status.st_mode) >> 12).name.lower(), ""
    if kind == "file":
        with open(path, "rb") as file:
            holds = repr(file.read().decode("latin-1"))
    elif kind == "symlink":
        holds = f"-> {os.readlink(path)}"
    elif kind in {"char", "block"}:
        holds = f"{os.major(status.st_rdev)},{os.minor(status.st_rdev)}"
    inode = (status.st_dev, status.st_ino)
    return Seen(kind, stat.S_IMODE(status.st_mode), (status.st_uid, status.st_gid), holds, inode)


def rules(tree: Tree) -> list[str]:
    """The rules that were warned about, in order."""
    return [warned.rule for warned in tree.warnings]


def at(tree: Tree, path: str) -> Node:
    """Give the node of a path."""
    node = tree.root
    for name in path.encode("utf-8", "surrogateescape").split(b"/"):
        assert node.children is not None, path
        node = node.children[name]
    return node
