"""The history of an image: what became of every entry of every layer."""

from __future__ import annotations

import io
import tracemalloc
from typing import TYPE_CHECKING

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from ocifs.history import Change, End, History, Version
from ocifs.history.file import FRAME_SIZE, write
from ocifs.history.recorder import Recorder
from ocifs.history.version import sort_key
from ocifs.overlay import LayerInput, Merge, MergeOptions, merge
from ocifs.tar import EntryType
from ocifs.tree import Kind, Origin
from tests.support.drawn_layers import LAYERS, Drawn, numbered
from tests.support.examined import Memory
from tests.support.merging import nodes

if TYPE_CHECKING:
    from ocifs.tar import Entry


def recorded(layers: list[list[Entry]], options: MergeOptions) -> list[Version]:
    recorder = Recorder()
    merging = Merge(options, recorder)
    for number, layer in enumerate(layers, 1):
        recorder.begin(layer)
        merging.apply(LayerInput(number, layer))
    return sorted(recorder.finish(), key=lambda version: (version.layer, version.entry < 0, version.entry))


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
            last = max((v.layer for v in versions if v.hard_link and v.layer <= count), default=0)
            if (
                version.layer >= last and node.origin.entry >= 0
            ):  # else a later link, overridden or not, may have changed the inode (H7)
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


NAMES = st.text("a!-0.\x01\xff", min_size=1, max_size=4).map(lambda text: text.encode("latin-1"))
PATHS = st.lists(NAMES, min_size=1, max_size=3).map(b"/".join)


def a_version(path: bytes, layer: int, entry: int, *xattrs: tuple[bytes, bytes]) -> Version:
    return Version(path, layer, entry, Change.ADDED, Kind.FILE, 48, 0o644, 0, 0, 0, 0, 512 * entry, xattrs=xattrs)


def kept(versions: list[Version]) -> History:
    out = io.BytesIO()
    write(sorted(versions, key=lambda one: (sort_key(one.path), one.layer, one.entry)), out, key="key")
    return History(Memory(out.getvalue()))


@given(st.lists(st.tuples(PATHS, st.integers(1, 3)), max_size=30))
def test_what_was_written_is_found_by_path_by_directory_and_by_entry(drawn: list[tuple[bytes, int]]) -> None:
    counts = {1: 0, 2: 0, 3: 0}
    versions = []
    for path, layer in drawn:
        versions.append(a_version(path, layer, counts[layer]))
        counts[layer] += 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ocifs.history.file.FRAME_VERSIONS", 3)
        history = kept(versions)
    found = list(history)
    assert (len(history), len(found)) == (len(versions), len(versions))
    assert [[v.path.split(b"/"), v.layer, v.entry] for v in found] == sorted(
        [v.path.split(b"/"), v.layer, v.entry] for v in versions
    )
    for version in versions:
        assert history.by_entry(version.layer, version.entry) == version
        assert history.of(version.path) == [v for v in found if v.path == version.path]
        below = version.path + b"/"
        assert list(history.below(version.path)) == [
            v for v in found if v.path == version.path or v.path.startswith(below)
        ]
    assert list(history.below(b"")) == found
    for path in (b"", b"nothing", b"\xff\xff\xff\xff\xff"):
        assert history.of(path) == []


def test_frames_are_bounded_whatever_versions_hold() -> None:
    versions = [a_version(b"%04d" % n, 1, n, (b"user.x", b"%d" % n * 10_000)) for n in range(300)]
    versions.append(a_version(b"large", 1, 300, (b"user.x", bytes(3 << 20))))
    history = kept(versions)
    assert list(history) == versions
    assert [history.by_entry(1, n).path for n in (0, 25, 299, 300)] == [b"0000", b"0025", b"0299", b"large"]
    frames = history._tables.frames
    assert len(frames) > 300 * 10_000 // FRAME_SIZE
    assert [frame.first for frame in frames][-1] == b"large"


def test_an_image_without_layers_has_an_empty_history() -> None:
    assert list(Recorder().finish()) == []
    history = kept([])
    assert (len(history), list(history), history.of(b"a"), list(history.below(b""))) == (0, [], [], [])


def test_memory_follows_the_number_of_versions_not_the_length_of_paths() -> None:
    names = [b"%d/" % number + b"d/" * 2000 + b"f" for number in range(4)]
    entries = numbered([(name, (EntryType.FILE, (0, 0)), b"", (0o644, 0, 0, ())) for name in names])
    recorder = Recorder()
    tracemalloc.start()
    try:
        merging = Merge(MergeOptions(examine=True), recorder)
        recorder.begin(entries)
        merging.apply(LayerInput(1, entries))
        count = 0
        longest = b""
        for version in recorder.finish():
            count += 1
            longest = max(longest, version.path, key=len)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (count, longest) == (4 * 2002 + 1, names[0])
    assert peak < 1500 * count  # the paths alone are 2,000 bytes each
