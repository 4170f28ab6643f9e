"""The merge against a naive model of the same rules, on random small layers full of collisions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from ocifs.errors import DamagedError
from ocifs.overlay import LayerInput, MergeOptions, merge
from ocifs.tar import Entry, EntryType
from ocifs.tree import Kind, Node
from tests.support.merging import nodes
from tests.support.naive_merge import RefusedError, Thing, naive_merge

if TYPE_CHECKING:
    from collections.abc import Iterable

PLAIN = [b"a", b"b", b"c", b"a/b", b"a/c", b"b/a", b"b/c", b"c/a", b"a/b/c", b"b/a/c", b"c/b/a"]
MARKERS = [
    *(b".wh.a", b".wh.b", b".wh.c", b"a/.wh.b", b"b/.wh.a", b"a/b/.wh.c", b"a/c/.wh.a"),
    *(b".wh..wh..opq", b"a/.wh..wh..opq", b"b/.wh..wh..opq", b"a/b/.wh..wh..opq"),
]
ODD = [
    *(
        b"./a",
        b"/b/",
        b"a//b/.",
        b"c/../a/b",
        b"../a",
        b"a/../../b/c",
        b".",
        b"./",
        b"",
        b".wh.",
        b"a/.wh..",
        b"b/.wh...",
    ),
    *(b".wh.a/b", b"a/.wh.b/c", b".wh..wh..opq/a"),
    *(b".wh..wh.aufs", b".wh..wh.plnk/1", b".wh..wh.plnk/2", b"a/.wh..wh.b"),
]
PATHS = st.sampled_from(PLAIN * 8 + MARKERS * 2 + ODD)
TARGETS = st.sampled_from(
    PLAIN * 4
    + [b"/a", b"./b", b"../c", b"..", b".", b"/", b"a/../b", b"b/../../c/a", b"a/b/..", b"c/nowhere", b".wh..wh.plnk/1"]
    + [b"/.wh..wh.plnk/2"]
)
SORTS = st.sampled_from(
    [(EntryType.FILE, (0, 0))] * 5
    + [(EntryType.DIR, (0, 0))] * 4
    + [(EntryType.HARDLINK, (0, 0))] * 6
    + [(EntryType.SYMLINK, (0, 0))] * 4
    + [(EntryType.CHAR, (0, 0)), (EntryType.CHAR, (1, 3)), (EntryType.FIFO, (0, 0)), (EntryType.OTHER, (0, 0))]
)
XATTRS = [
    (),
    ((b"user.x", b"1"),),
    ((b"user.y", b"2"), (b"user.x", b"3"), (b"user.y", b"4"), (b"trusted.z", b"5"), (b"user.overlay.o", b"")),
]
HEADERS = st.sampled_from([(mode, uid, size, xattrs) for mode, uid, size in [(0o644, 0, 1), (0o755, 1, 0), (0o4711, 2, 7)]
                           for xattrs in XATTRS])  # fmt: skip
LAYERS = st.lists(st.lists(st.tuples(PATHS, SORTS, TARGETS, HEADERS), max_size=8), min_size=1, max_size=4)
OPTIONS = st.sampled_from(
    [MergeOptions(examine=True)] * 4
    + [MergeOptions(), MergeOptions(examine=True, follow_dirlinks=True), MergeOptions(single_layer=True)]
    + [MergeOptions(examine=True, show_whiteout_devices=True, all_xattrs=True)]
)
Drawn = tuple[bytes, tuple[EntryType, tuple[int, int]], bytes, tuple[int, int, int, tuple[tuple[bytes, bytes], ...]]]


def numbered(layer: Iterable[Drawn]) -> list[Entry]:
    """Make entries, each with offsets and a time of its own, so that its data can be told from all others."""
    return [
        Entry(
            path=path,
            type=kind,
            typeflag=0x30 + kind,
            mode=mode,
            uid=uid,
            gid=uid,
            mtime_ns=number,
            size=size if kind == EntryType.FILE else 0,
            header_offset=1024 * number,
            data_offset=1024 * number + 512,
            stored_size=size if kind == EntryType.FILE else 0,
            link=target if kind in (EntryType.HARDLINK, EntryType.SYMLINK) else b"",
            rdev=rdev,
            xattrs=xattrs,
        )
        for number, (path, (kind, rdev), target, (mode, uid, size, xattrs)) in enumerate(layer)
    ]


Words = tuple[object, ...]


def words_of_node(node: Node) -> Words:
    extents = tuple((extent.layer, extent.layer_offset, extent.size) for extent in node.extents)
    return (
        node.kind.name, (node.origin.layer, node.origin.entry), node.mode, node.uid, node.gid, node.mtime_ns, node.xattrs,
        extents, node.target, node.rdev, node.unreadable,
    )  # fmt: skip


def words_of_thing(thing: Thing) -> Words:
    extents = (thing.data,) if thing.data is not None else ()
    return (
        Kind[thing.kind.name].name, thing.origin, thing.mode, thing.uid, thing.gid, thing.mtime_ns,
        tuple(sorted(thing.xattrs.items())), extents, thing.target, thing.rdev, thing.unreadable,
    )  # fmt: skip


def link_groups(inodes: dict[bytes, int]) -> set[frozenset[bytes]]:
    groups: dict[int, set[bytes]] = {}
    for path, inode in inodes.items():
        groups.setdefault(inode, set()).add(path)
    return {frozenset(group) for group in groups.values()}


def check(drawn: list[list[Drawn]], options: MergeOptions) -> list[str]:
    """Merge in both ways and compare; gives what happened: the rules that warned or refused."""
    layers = [(number, numbered(layer)) for number, layer in enumerate(drawn[:1] if options.single_layer else drawn, 1)]
    inputs = [LayerInput(number, iter(layer)) for number, layer in layers]
    try:
        view, warnings = naive_merge(layers, options)
    except RefusedError as refusal:
        with pytest.raises(DamagedError, match=f"rule {refusal}:"):
            merge(inputs, options)
        return [f"refused by {refusal}"]
    tree = merge(inputs, options)
    got = dict(nodes(tree.root))
    expected = {b"/".join(path): thing for path, thing in view.items()}
    assert {path: words_of_node(node) for path, node in got.items()} == {
        path: words_of_thing(thing) for path, thing in expected.items()
    }
    assert link_groups({path: id(node) for path, node in got.items()}) == link_groups(
        {path: id(thing) for path, thing in expected.items()}
    )
    assert sorted((warned.rule, warned.layer, warned.path) for warned in tree.warnings) == sorted(warnings)
    return [rule for rule, _, _ in warnings]


@settings(max_examples=400, deadline=None)
@given(LAYERS, OPTIONS)
def test_the_merge_agrees_with_the_naive_model(layers: list[list[Drawn]], options: MergeOptions) -> None:
    for rule in check(layers, options):
        event(rule)
