"""Places to mount on that an image lacks: put into the merged tree because a read-only root cannot be given them later.

Paths are followed as a runtime follows them: through the image's links, never out of its root, and a link to nothing leads
to what is then made. Where something else is in the way nothing is made: the runtime says what is wrong better than we can.

Not here: which places a container needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ocifs.overlay.paths import NAME_MAX, components
from ocifs.overlay.upper import LINKS_MAX, children_of
from ocifs.tree import Kind, Node, Origin

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ocifs.rules import MountPoint

NO_LAYER = Origin(0, -1)
"""Where a node comes from that no layer has; layers count from 1."""


def add_mount_points(root: Node, points: Sequence[MountPoint]) -> None:
    """Make the points that the tree at ``root`` lacks, and the directories on the way; what is there stays as it is."""
    for point in points:
        _add(root, point)


def _add(root: Node, point: MountPoint) -> None:
    way, links = [root], 0
    todo = components(point.path)[::-1]
    while todo:
        name = todo.pop()
        if name == b"..":
            if len(way) > 1:
                way.pop()
            continue
        if way[-1].kind is not Kind.DIR or len(name) > NAME_MAX:
            return
        siblings = children_of(way[-1])
        node = siblings.get(name)
        if node is None:
            node = siblings[name] = _made(directory=point.directory or bool(todo))
        if node.kind is Kind.SYMLINK:
            links += 1
            if links > LINKS_MAX:
                return
            if node.target.startswith(b"/"):
                del way[1:]
            todo += components(node.target)[::-1]
        else:
            way.append(node)


def _made(*, directory: bool) -> Node:
    if directory:
        return Node(Kind.DIR, NO_LAYER, mode=0o755, children={})
    return Node(Kind.FILE, NO_LAYER, mode=0o644)
