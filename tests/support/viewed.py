"""Views of trees in memory: a `RootFS` on a real image tree file, its layers as in `tests.support.spanned`.

Not here: trees (`tests.support.trees`), images with documents (`tests.support.layout`).
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from ocifs import image_tree
from ocifs.image_tree import ImageTree
from ocifs.rootfs import RootFS
from ocifs.spans import SpanCache, SpanReader
from ocifs.tree import Tree
from tests.support.spanned import FakeIndex, layer_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from ocifs.tree import Node


def cut(size: int, span: int) -> list[int]:
    """Sizes of spans of ``span`` bytes that make ``size`` together; the last is smaller."""
    return [min(span, size - start) for start in range(0, size, span)]


@contextmanager
def viewed(
    root: Node, layers: Sequence[bytes], file: Path, *, span: int = 3000, cache: SpanCache | None = None
) -> Iterator[tuple[RootFS, list[FakeIndex]]]:
    """Write ``root`` as an image tree to ``file`` and look at it; with the layers' indexes, to make them fail."""
    with file.open("wb") as out:
        sizes = [(f"{number:064x}", len(data)) for number, data in enumerate(layers, 1)]
        image_tree.write(Tree(root), out, layers=sizes, rules_version=1, key="test")
    pairs = [layer_of(data, cut(len(data), span), number=number) for number, data in enumerate(layers, 1)]
    with ImageTree.open(file) as tree:
        yield RootFS(tree, SpanReader([data for _, data in pairs], cache)), [index for index, _ in pairs]
