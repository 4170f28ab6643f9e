"""The history of an image: what became of every entry of every layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import event, given, settings
from hypothesis import strategies as st

from ocifs.history import Change, End
from ocifs.history.recorder import Recorder
from ocifs.overlay import LayerInput, Merge, MergeOptions, merge
from ocifs.tree import Kind, Origin
from tests.support.drawn_layers import LAYERS, Drawn, numbered
from tests.support.merging import nodes

if TYPE_CHECKING:
    from ocifs.history import Version
    from ocifs.tar import Entry


def recorded(layers: list[list[Entry]], options: MergeOptions) -> list[Version]:
    recorder = Recorder()
    merging = Merge(options, recorder)
    for number, layer in enumerate(layers, 1):
        recorder.begin(layer)
        merging.apply(LayerInput(number, layer))
    return recorder.finish()


def there(version: Version, layer: int) -> bool:
    """Whether a version is in the tree of the first ``layer`` layers."""
    shown = version.change in (Change.ADDED, Change.CHANGED)
    return shown and version.layer <= layer and (version.end is End.VISIBLE or version.end_layer > layer)


@settings(max_examples=400, deadline=None)
@given(LAYERS, st.sampled_from([MergeOptions(examine=True), MergeOptions(examine=True, follow_dirlinks=True)]))
def test_versions_are_what_the_trees_of_all_prefixes_show(drawn: list[list[Drawn]], options: MergeOptions) -> None:
    layers = [numbered(layer) for layer in drawn]
    versions = recorded(layers, options)
    entries = [(version.layer, version.entry) for version in versions if version.entry >= 0]
    assert entries == [(number, entry) for number, layer in enumerate(layers, 1) for entry in range(len(layer))]
    for count in range(1, len(layers) + 1):
        tree = merge([LayerInput(number, layers[number - 1]) for number in range(1, count + 1)], options)
        shown = {version.path: version for version in versions if there(version, count)}
        expected = {b"": tree.root, **dict(nodes(tree.root))}
        assert shown.keys() == expected.keys()
        for path, node in expected.items():
            version = shown[path]
            if not version.hard_link and node.origin.entry >= 0:
                assert Origin(version.layer, version.entry) == node.origin
            assert version.kind == node.kind
            last = max((v.layer for v in shown.values() if v.hard_link), default=0)
            if version.layer >= last and node.origin.entry >= 0:  # else a later link may have changed the inode (H7)
                assert (version.mode, version.uid, version.mtime_ns) == (node.mode, node.uid, node.mtime_ns)
                assert dict(node.xattrs).items() <= dict(version.xattrs).items()
            if node.kind is Kind.FILE:
                assert version.size == node.size
                assert version.extents == tuple((e.file_offset, e.layer, e.layer_offset, e.size) for e in node.extents)
    for version in versions:
        event(f"{version.change.name} {version.end.name}")
        if version.end in (End.WHITEOUT, End.OPAQUE, End.REPLACED):
            assert version.end_layer > version.layer
        if version.end is End.OVERRIDDEN:
            assert version.end_layer == version.layer
            assert version.end_entry == -1 or version.end_entry > version.entry
        if version.end in (End.WHITEOUT, End.OPAQUE):
            marker = next(v for v in versions if (v.layer, v.entry) == (version.end_layer, version.end_entry))
            assert marker.change is Change.MARKER
    for marker in versions:
        if marker.change is Change.MARKER:
            ended = [v for v in versions if v.end in (End.WHITEOUT, End.OPAQUE)
                     and (v.end_layer, v.end_entry) == (marker.layer, marker.entry)]  # fmt: skip
            assert marker.hides == len(ended)
