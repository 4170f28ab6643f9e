"""Puts a layer's own tree onto the tree of the layers below it: where whiteouts act.

The theory is in `ocifs.overlay`. Not here: what a layer's entries make (`ocifs.overlay.upper`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ocifs.overlay.upper import IMPLIED, Upper, children_of
from ocifs.tree import Kind, Node, Origin

if TYPE_CHECKING:
    from ocifs.overlay import Observer


def combine(root: Node, upper: Upper, observer: Observer | None) -> None:
    """Change the tree at ``root`` to what it is with ``upper`` on top. Nodes of both are used in the result."""
    if upper.root.origin.entry != IMPLIED:
        _take_attributes(upper.layer, b"", root, upper.root, observer)
    stack = [(root, upper.root, b"")]
    while stack:
        below, above, path = stack.pop()
        _remove_hidden(upper, below, above, path, observer)
        names = children_of(below)
        for name, node in children_of(above).items():
            existing = names.get(name)
            if existing is None:
                names[name] = node
            elif node.kind is Kind.DIR and existing.kind is Kind.DIR:
                inner = path + name if observer is not None else b""
                if node.origin.entry != IMPLIED:
                    _take_attributes(upper.layer, inner, existing, node, observer)
                stack.append((existing, node, inner + b"/"))
            elif existing is not node:
                if observer is not None:
                    observer.replaced(upper.layer, path + name, existing, node)
                names[name] = node


def _remove_hidden(upper: Upper, below: Node, above: Node, path: bytes, observer: Observer | None) -> None:
    """Take what the markers of ``above`` hide from ``below`` (W1, W11)."""
    names = children_of(below)
    hidden = upper.whiteouts.get(above, {})
    opaque = upper.opaque.get(above)
    if opaque is not None:
        if observer is not None:
            for name, node in names.items():
                observer.removed(upper.layer, path + name, node, Origin(upper.layer, hidden.get(name, opaque).number))
        below.children = {}
        return
    for name, marker in hidden.items():
        if name in names:
            if observer is not None:
                observer.removed(upper.layer, path + name, names[name], Origin(upper.layer, marker.number))
            del names[name]


def _take_attributes(layer: int, path: bytes, below: Node, above: Node, observer: Observer | None) -> None:
    """Give a directory the attributes of the last layer that has an entry for it (T1)."""
    if observer is not None:
        observer.replaced(layer, path, below, above)
    below.origin, below.mode, below.uid, below.gid = above.origin, above.mode, above.uid, above.gid
    below.mtime_ns, below.xattrs = above.mtime_ns, above.xattrs
