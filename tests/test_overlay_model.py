"""The merge against a naive model of the same rules, on random small layers full of collisions."""

from __future__ import annotations

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from ocifs.errors import DamagedError
from ocifs.overlay import LayerInput, MergeOptions, merge
from ocifs.tree import Kind, Node
from tests.support.drawn_layers import LAYERS, Drawn, numbered
from tests.support.merging import nodes
from tests.support.naive_merge import RefusedError, Thing, naive_merge

OPTIONS = st.sampled_from(
    [MergeOptions(examine=True)] * 4
    + [MergeOptions(), MergeOptions(examine=True, follow_dirlinks=True), MergeOptions(single_layer=True)]
    + [MergeOptions(examine=True, show_whiteout_devices=True, all_xattrs=True)]
)
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
