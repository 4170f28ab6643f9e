"""The rows W, T, H and D10 of the layer rules, one test each, named after the row; and the limits L1 to L5.

Where umoci agrees with the rule (and can tell: it has no warnings) a test takes `unpack`, which is once the merge and once
a real ``umoci raw unpack`` of the same layers: one literal expectation for both.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from ocifs.errors import DamagedError
from ocifs.overlay import LayerInput, Merge, MergeOptions, merge
from ocifs.overlay.upper import IMPLIED_MAX, WARNINGS_MAX
from ocifs.tar import Entry, EntryType
from ocifs.tree import Extent, Kind, Node, Origin
from tests.support.layout import write_layout
from tests.support.merging import at, layer, layer_input, look, look_at_directory, merged, rules
from tests.support.tarball import (
    BLOCKDEV,
    CHAR,
    DIR,
    FIFO,
    FILE,
    HARDLINK,
    SYMLINK,
    entry,
    sparse_pax_1_0,
    tarball,
)

if TYPE_CHECKING:
    from pathlib import Path

    from ocifs.overlay.upper import Upper

ZERO = (0, 0)


class Unpack(Protocol):
    def __call__(self, *layers: bytes) -> dict[str, str]: ...


@pytest.fixture(params=["ocifs", "umoci"])
def unpack(request: pytest.FixtureRequest, tmp_path: Path) -> Unpack:
    """What layers come to, by the merge and by umoci."""

    def by_ocifs(*layers: bytes) -> dict[str, str]:
        return look(merged(layers), layers)

    def by_umoci(*layers: bytes) -> dict[str, str]:
        write_layout(tmp_path / "image", layers, compression="plain")
        command = ["umoci", "raw", "unpack", "--image", f"{tmp_path}/image:latest", f"{tmp_path}/root"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return look_at_directory(tmp_path / "root")

    if request.param == "ocifs":
        return by_ocifs
    if shutil.which("umoci") is None:
        pytest.skip("umoci is not installed")
    if os.geteuid() != 0:
        pytest.skip("umoci needs root to give files their owners")
    return by_umoci


def plain(*layers: bytes, **options: bool) -> dict[str, str]:
    return look(merged(layers, **options), layers)


def refused(*layers: bytes, **options: bool) -> str:
    with pytest.raises(DamagedError) as caught:
        merged(layers, **options)
    return str(caught.value)


BASE = layer(entry("dir/", mode=0o750, mtime=7), entry("dir/old", b"o"), entry("dir/two", b"t"), entry("keep", b"k"))


# --- whiteouts ------------------------------------------------------------------------------------------------------


def test_w1_a_whiteout_hides_a_lower_file_or_tree_and_is_not_shown(unpack: Unpack) -> None:
    assert unpack(BASE, layer(entry(".wh.keep"), entry("dir/.wh.old"))) == {"dir": "dir 750", "dir/two": "file 't'"}


def test_w1_a_whiteout_hides_a_whole_tree(unpack: Unpack) -> None:
    assert unpack(BASE, layer(entry(".wh.dir"))) == {"keep": "file 'k'"}


def test_w1_a_whiteout_acts_on_all_layers_below_and_on_none_above(unpack: Unpack) -> None:
    layers = [layer(entry("f", b"1")), layer(entry("f", b"2")), layer(entry(".wh.f")), layer(entry("g", b"3"))]
    assert unpack(*layers) == {"g": "file '3'"}
    assert plain(*layers, layer(entry("f", b"4"))) == {"f": "file '4'", "g": "file '3'"}


@pytest.mark.parametrize(
    "marker",
    [
        entry(".wh.dir/"),
        entry(".wh.dir", type=HARDLINK, link="keep"),
        entry(".wh.dir", type=HARDLINK, link="nowhere"),
        entry(".wh.dir", link="keep"),
        entry(".wh.dir", b"with content"),
        entry(".wh.dir", type=FIFO),
        entry(".wh.dir", type=CHAR, rdev=(1, 3)),
    ],
    ids=["directory", "hardlink", "hardlink-to-nothing", "symlink", "content", "fifo", "device"],
)
def test_w2_a_marker_is_known_by_its_name_whatever_its_type(marker: bytes) -> None:
    tree = merged([BASE, layer(marker)])
    assert look(tree, [BASE]) == {"keep": "file 'k'"}
    assert rules(tree) == []


def test_w3_a_name_before_its_whiteout_in_one_layer_stays() -> None:
    assert plain(BASE, layer(entry("keep", b"new"), entry(".wh.keep")))["keep"] == "file 'new'"
    assert plain(layer(entry("a", b"1"), entry(".wh.a"))) == {"a": "file '1'"}


def test_w4_a_name_after_its_whiteout_in_one_layer_stays(unpack: Unpack) -> None:
    assert unpack(BASE, layer(entry(".wh.dir"), entry(".wh.keep"), entry("keep", b"new"))) == {"keep": "file 'new'"}


def test_w5_whiteout_then_directory_hides_lower_children(unpack: Unpack) -> None:
    upper = layer(entry(".wh.dir"), entry("dir/", mode=0o700))
    assert unpack(BASE, upper) == {"dir": "dir 700", "keep": "file 'k'"}


def test_w6_directory_then_whiteout_hides_lower_children() -> None:
    upper = layer(entry("dir/", mode=0o700), entry("dir/new", b"n"), entry(".wh.dir"))
    assert plain(BASE, upper) == {"dir": "dir 700", "dir/new": "file 'n'", "keep": "file 'k'"}


def test_w7_whiteout_then_a_file_below_it_implies_a_new_directory(unpack: Unpack) -> None:
    upper = layer(entry(".wh.dir"), entry("dir/new", b"n"))
    assert unpack(BASE, upper) == {"dir": "dir", "dir/new": "file 'n'", "keep": "file 'k'"}
    tree = merged([BASE, upper])
    assert at(tree, "dir").mtime_ns == 0
    assert at(tree, "dir").origin == Origin(2, -1)


@pytest.mark.parametrize(
    "markers",
    [
        (entry(".wh.dir"), entry("dir/.wh.old")),
        (entry("dir/.wh.old"), entry(".wh.dir")),
        (entry(".wh.dir"), entry("dir/.wh..wh..opq")),
        (entry("dir/sub/.wh.old"), entry("dir/sub/more/.wh.x"), entry(".wh.dir")),
        (entry(".wh.dir"), entry("dir/old", type=CHAR, rdev=ZERO)),
    ],
    ids=["outer-first", "inner-first", "opaque", "deep", "device"],
)
def test_w8_whiteouts_of_a_directory_and_of_something_in_it_leave_nothing(markers: tuple[bytes, ...]) -> None:
    assert plain(BASE, layer(*markers)) == {"keep": "file 'k'"}


def test_w8_umoci_leaves_nothing_either(unpack: Unpack) -> None:
    assert unpack(BASE, layer(entry(".wh.dir"), entry("dir/.wh.old"))) == {"keep": "file 'k'"}


def test_w8_a_directory_with_an_entry_or_anything_else_in_it_is_made() -> None:
    assert plain(BASE, layer(entry(".wh.dir"), entry("dir/.wh.old"), entry("dir/")))["dir"] == "dir"
    upper = layer(entry(".wh.dir"), entry("dir/sub/.wh.x"), entry("dir/new", b"n"))
    assert plain(BASE, upper) == {"dir": "dir", "dir/new": "file 'n'", "dir/sub": "dir", "keep": "file 'k'"}


def test_w9_a_whiteout_of_nothing_is_ignored(unpack: Unpack) -> None:
    upper = layer(entry(".wh.none"), entry("dir/.wh.none"))
    assert unpack(BASE, upper) == {"dir": "dir 750", "dir/old": "file 'o'", "dir/two": "file 't'", "keep": "file 'k'"}
    assert rules(merged([BASE, upper])) == []


def test_w10_a_whiteout_below_an_unknown_directory_implies_it() -> None:
    # As overlay mounts and vfs; umoci makes no directory for it.
    assert plain(layer(entry("keep")), layer(entry("nodir/.wh.none"))) == {"keep": "file ''", "nodir": "dir"}


@pytest.mark.parametrize("position", [0, 1, 2, 3])
def test_w11_an_opaque_marker_anywhere_hides_lower_children_and_keeps_its_layers(position: int) -> None:
    entries = [entry("dir/", mode=0o700), entry("dir/new", b"n"), entry("dir/sub/x", b"x")]
    entries.insert(position, entry("dir/.wh..wh..opq"))
    expected = {"dir": "dir 700", "dir/new": "file 'n'", "dir/sub": "dir", "dir/sub/x": "file 'x'", "keep": "file 'k'"}
    assert plain(BASE, layer(*entries)) == expected


def test_w11_an_opaque_marker_hides_lower_children(unpack: Unpack) -> None:
    upper = layer(entry("dir/", mode=0o700), entry("dir/.wh..wh..opq"), entry("dir/new", b"n"))
    assert unpack(BASE, upper) == {"dir": "dir 700", "dir/new": "file 'n'", "keep": "file 'k'"}


def test_w11_an_opaque_marker_reaches_the_children_of_directories_on_both_sides() -> None:
    base = layer(entry("d/sub/old", b"o"), entry("d/sub/", mode=0o700))
    assert plain(base, layer(entry("d/.wh..wh..opq"), entry("d/sub/new", b"n"))) == {
        "d": "dir",
        "d/sub": "dir",
        "d/sub/new": "file 'n'",
    }


def test_w12_an_opaque_marker_after_children_with_implied_parents_keeps_them(unpack: Unpack) -> None:
    upper = layer(entry("dir/sub/new", b"n"), entry("dir/.wh..wh..opq"))
    assert unpack(BASE, upper) == {
        "dir": "dir 750",
        "dir/sub": "dir",
        "dir/sub/new": "file 'n'",
        "keep": "file 'k'",
    }


def test_w13_an_opaque_marker_in_the_root_hides_everything_lower(unpack: Unpack) -> None:
    assert unpack(BASE, layer(entry(".wh..wh..opq"), entry("new", b"n"))) == {"new": "file 'n'"}


def test_w14_an_opaque_marker_without_an_entry_keeps_the_lower_attributes(unpack: Unpack) -> None:
    upper = layer(entry("dir/.wh..wh..opq"))
    assert unpack(BASE, upper) == {"dir": "dir 750", "keep": "file 'k'"}
    assert at(merged([BASE, upper]), "dir").mtime_ns == 7_000_000_000


@pytest.mark.parametrize("name", [".wh.", ".wh..", ".wh..."])
@pytest.mark.parametrize("directory", ["", "dir/"])
def test_w15_a_whiteout_that_names_nothing_is_refused(name: str, directory: str) -> None:
    upper = layer(entry("x"), entry(directory + name))
    assert refused(BASE, upper) == (
        f"layer 2 is refused by rule W15: entry '{directory}{name}' at layer offset 512: a whiteout that names nothing, "
        "its directory or the parent of that; --examine shows the image nevertheless"
    )
    tree = merged([BASE, upper], examine=True)
    assert sorted(look(tree, [BASE, upper])) == ["dir", "dir/old", "dir/two", "keep", "x"]
    assert rules(tree) == ["W15"]


def test_w15_does_not_make_the_directory_it_would_be_in() -> None:
    assert plain(layer(entry("new/.wh.")), examine=True) == {}


def test_w16_a_whiteout_in_the_base_layer_is_hidden_without_effect(unpack: Unpack) -> None:
    assert unpack(layer(entry("a", b"1"), entry(".wh.b"), entry("d/"), entry("d/.wh..wh..opq"))) == {
        "a": "file '1'",
        "d": "dir",
    }


def test_w17_a_component_like_a_whiteout_is_an_ordinary_directory() -> None:
    base = layer(entry("etc/passwd", b"p"))
    assert plain(base, layer(entry(".wh.etc/file", b"f"))) == {
        ".wh.etc": "dir",
        ".wh.etc/file": "file 'f'",
        "etc": "dir",
        "etc/passwd": "file 'p'",
    }


def test_w17_even_where_an_entry_of_that_name_acts_as_a_whiteout() -> None:
    base = layer(entry("etc/passwd", b"p"))
    upper = layer(entry(".wh.etc/", mode=0o700), entry(".wh.etc/file", b"f"))
    assert plain(base, upper) == {".wh.etc": "dir", ".wh.etc/file": "file 'f'"}


def test_w17_a_component_like_an_opaque_marker_is_an_ordinary_directory_too() -> None:
    assert sorted(plain(BASE, layer(entry(".wh..wh..opq/x")))) == [
        ".wh..wh..opq", ".wh..wh..opq/x", "dir", "dir/old", "dir/two", "keep",
    ]  # fmt: skip


def test_w18_aufs_files_at_the_root_are_hidden_and_links_to_its_plink_directory_resolve() -> None:
    upper = layer(
        entry(".wh..wh.aufs", b"a"),
        entry(".wh..wh.orph/"),
        entry(".wh..wh.plnk/"),
        entry(".wh..wh.plnk/12.34", b"shared"),
        entry("one", type=HARDLINK, link=".wh..wh.plnk/12.34"),
        entry("two", type=HARDLINK, link="/.wh..wh.plnk/12.34"),
        entry("early", type=HARDLINK, link=".wh..wh.plnk/56.78"),
        entry(".wh..wh.plnk/56.78", b"late"),
        entry(".wh..wh.plnk/90.12", type=HARDLINK, link="one"),
        entry("three", type=HARDLINK, link=".wh..wh.plnk/90.12"),
    )
    assert plain(layer(), upper) == {
        "early": "file 'late'",
        "one": "file 'shared' &1",
        "three": "file 'shared' &1",
        "two": "file 'shared' &1",
    }


def test_w18_aufs_whiteouts_hide_nothing_but_the_opaque_marker_of_the_root_does() -> None:
    assert "keep" in plain(BASE, layer(entry(".wh..wh.keep"), entry(".wh..wh.plnk/.wh.keep")))
    assert plain(BASE, layer(entry("./.wh..wh..opq"))) == {}


def test_w18_belongs_to_the_layer_that_has_it() -> None:
    first = layer(entry(".wh..wh.plnk/1", b"x"))
    assert "does not exist" in refused(first, layer(entry("y", type=HARDLINK, link=".wh..wh.plnk/1")))


def test_w19_aufs_names_below_a_directory_are_hidden() -> None:
    assert plain(BASE, layer(entry("dir/.wh..wh.old"), entry("sub/.wh..wh.x", b"x"))) == {
        "dir": "dir 750",
        "dir/old": "file 'o'",
        "dir/two": "file 't'",
        "keep": "file 'k'",
        "sub": "dir",
    }


def test_w20_a_character_device_0_0_is_a_whiteout() -> None:
    upper = layer(entry("keep", type=CHAR, rdev=ZERO), entry("dir", type=CHAR, rdev=ZERO))
    assert plain(BASE, upper) == {}
    assert plain(layer(entry("x", type=CHAR, rdev=ZERO))) == {}


def test_w20_an_option_shows_it() -> None:
    upper = layer(entry("keep", type=CHAR, rdev=ZERO))
    assert plain(BASE, upper, show_whiteout_devices=True)["keep"] == "char 0,0"


def test_w20_a_block_device_0_0_or_another_character_device_is_none() -> None:
    upper = layer(entry("keep", type=BLOCKDEV, rdev=ZERO), entry("null", type=CHAR, rdev=(1, 3)))
    assert plain(BASE, upper) == {
        "dir": "dir 750", "dir/old": "file 'o'", "dir/two": "file 't'", "keep": "block 0,0", "null": "char 1,3",
    }  # fmt: skip


def test_w20_a_hard_link_to_a_whiteout_device_is_one_for_overlayfs_links_its_own() -> None:
    upper = layer(entry("dir", type=CHAR, rdev=ZERO), entry("keep", type=HARDLINK, link="dir"))
    assert plain(BASE, upper) == {}


def test_w20_replaced_in_its_own_layer_it_hides_nothing_of_its_own() -> None:
    upper = layer(entry("dir", type=CHAR, rdev=ZERO), entry("dir/new", b"n"))
    assert plain(BASE, upper)["dir/old"] == "file 'o'"


@pytest.mark.parametrize("options", [{}, {"all_xattrs": True}])
def test_w21_overlay_xattrs_are_never_shown_and_have_no_effect(options: dict[str, bool]) -> None:
    xattrs = {"trusted.overlay.opaque": b"y", "user.overlay.whiteout": b"", "user.a": b"1"}
    tree = merged([BASE, layer(entry("dir/", xattrs=xattrs))], **options)
    assert at(tree, "dir").xattrs == ((b"user.a", b"1"),)
    assert set(at(tree, "dir").children or ()) == {b"old", b"two"}


# --- types, parents, paths ------------------------------------------------------------------------------------------


def test_t1_directory_over_directory_merges_children_and_takes_the_upper_attributes(unpack: Unpack) -> None:
    upper = layer(entry("dir/", mode=0o1777, uid=5, gid=6), entry("dir/two", b"new"), entry("dir/x", b"x"))
    assert unpack(BASE, upper) == {
        "dir": "dir 1777 5:6",
        "dir/old": "file 'o'",
        "dir/two": "file 'new'",
        "dir/x": "file 'x'",
        "keep": "file 'k'",
    }


def test_t1_all_attributes_and_xattrs_are_the_uppers() -> None:
    base = layer(entry("d/", xattrs={"user.old": b"1"}, mtime=5))
    tree = merged([base, layer(entry("d/", xattrs={"user.new": b"2"}, mtime=1.5))])
    assert at(tree, "d").xattrs == ((b"user.new", b"2"),)
    assert at(tree, "d").mtime_ns == 1_500_000_000
    assert at(tree, "d").origin == Origin(2, 0)


@pytest.mark.parametrize("upper_kind", ["file", "dir", "symlink"])
@pytest.mark.parametrize("lower_kind", ["file", "dir", "symlink"])
def test_t2_file_directory_symlink_over_each_other(unpack: Unpack, lower_kind: str, upper_kind: str) -> None:
    things = {
        "file": (layer(entry("x", b"1")), {"x": "file '1'"}),
        "dir": (layer(entry("x/", mode=0o700), entry("x/in", b"2")), {"x": "dir 700", "x/in": "file '2'"}),
        "symlink": (layer(entry("x", link="y")), {"x": "symlink -> y"}),
    }
    assert unpack(things[lower_kind][0], things[upper_kind][0]) == things[upper_kind][1]


def test_t3_a_file_that_later_is_a_parent_in_its_layer_becomes_a_directory() -> None:
    tar = layer(entry("foo", b"f"), entry("foo/x", b"x"))
    tree = merged([tar])
    assert look(tree, [tar]) == {"foo": "dir", "foo/x": "file 'x'"}
    assert rules(tree) == ["T3"]


def test_t3_a_filled_directory_that_later_is_a_file_loses_what_is_in_it(unpack: Unpack) -> None:
    tar = layer(entry("foo/x", b"x"), entry("foo", b"f"))
    assert unpack(tar) == {"foo": "file 'f'"}
    assert rules(merged([tar])) == ["T3"]


def test_t4_an_implied_directory_replaces_a_lower_file() -> None:
    # As overlay mounts, where the layer knows nothing of the file; umoci refuses.
    assert plain(layer(entry("foo", b"f", mode=0o600)), layer(entry("foo/x", b"x"))) == {
        "foo": "dir",
        "foo/x": "file 'x'",
    }


def test_t5_the_last_of_a_duplicate_path_wins(unpack: Unpack) -> None:
    tar = layer(entry("f", b"1", mode=0o600), entry("./f", b"22"), entry("s", link="a"), entry("s", b"file"))
    assert unpack(tar) == {"f": "file '22'", "s": "file 'file'"}
    assert rules(merged([tar])) == ["T5", "T5"]


def test_t5_duplicate_directories_merge_with_the_last_attributes(unpack: Unpack) -> None:
    tar = layer(entry("d/", mode=0o700), entry("d/a", b"a"), entry("d", type=DIR, mode=0o711), entry("d/b", b"b"))
    assert unpack(tar) == {"d": "dir 711", "d/a": "file 'a'", "d/b": "file 'b'"}
    tree = merged([layer(entry("d/", xattrs={"user.a": b"1"}), entry("d/", xattrs={"user.b": b"2"}))])
    assert at(tree, "d").xattrs == ((b"user.b", b"2"),)
    assert rules(tree) == ["T5"]


def test_t5_an_entry_for_a_directory_that_was_implied_before_is_no_duplicate(unpack: Unpack) -> None:
    tar = layer(entry("d/a", b"a"), entry("d/", mode=0o700))
    assert unpack(tar) == {"d": "dir 700", "d/a": "file 'a'"}
    assert rules(merged([tar])) == []


def test_t5_only_the_final_state_of_a_layer_meets_the_lower_one() -> None:
    upper = layer(entry("dir", b"file"), entry("dir/", mode=0o700))
    assert plain(BASE, upper)["dir/old"] == "file 'o'"


def test_t6_an_implied_parent_that_is_nowhere_else() -> None:
    tree = merged([layer(entry("a/b/c", b"x", uid=5, gid=5, mode=0o600, mtime=9))])
    for path in ("a", "a/b"):
        node = at(tree, path)
        assert (node.kind, node.mode, node.uid, node.gid, node.mtime_ns) == (Kind.DIR, 0o755, 0, 0, 0)
        assert node.origin == Origin(1, -1)


def test_t7_an_implied_parent_that_exists_in_a_lower_layer_keeps_its_attributes(unpack: Unpack) -> None:
    base = layer(entry("d/", mode=0o700, uid=3, gid=4, mtime=7))
    upper = layer(entry("d/new", b"n", mtime=99))
    assert unpack(base, upper) == {"d": "dir 700 3:4", "d/new": "file 'n'"}
    assert at(merged([base, upper]), "d").mtime_ns == 7_000_000_000
    assert at(merged([base, upper]), "d").origin == Origin(1, 0)


LINKED = layer(entry("b/", mode=0o700), entry("b/f", b"f"), entry("a", link="b"))


def test_t8_a_path_through_a_lower_symlink_makes_a_directory_in_its_place() -> None:
    assert plain(LINKED, layer(entry("a/new", b"n"))) == {
        "a": "dir",
        "a/new": "file 'n'",
        "b": "dir 700",
        "b/f": "file 'f'",
    }


def test_t8_an_option_follows_the_lower_symlink() -> None:
    expected = {"a": "symlink -> b", "b": "dir 700", "b/f": "file 'f'", "b/new": "file 'n'"}
    assert plain(LINKED, layer(entry("a/new", b"n")), follow_dirlinks=True) == expected
    chain = layer(entry("b/", mode=0o700), entry("b/f", b"f"), entry("a", link="/b/../x"), entry("x", link="./b/"))
    assert plain(chain, layer(entry("a/new", b"n")), follow_dirlinks=True)["b/new"] == "file 'n'"


@pytest.mark.parametrize("target", ["nowhere", "f", "a", "/a/b"])
def test_t8_the_option_follows_only_what_leads_to_a_directory(target: str) -> None:
    base = layer(entry("f", b"f"), entry("a", link=target))
    upper = layer(entry("a/new", b"n"))
    expected = {"a": "dir", "a/new": "file 'n'", "f": "file 'f'"}
    assert plain(base, upper, follow_dirlinks=True) == expected


def test_t8_the_option_does_not_follow_a_symlink_that_was_whited_out_before() -> None:
    for markers in ([entry(".wh.a")], [entry(".wh..wh..opq")], [entry("a", type=CHAR, rdev=ZERO)]):
        tree = plain(LINKED, layer(*markers, entry("a/new", b"n")), follow_dirlinks=True)
        assert (tree["a"], tree["a/new"]) == ("dir", "file 'n'")


def test_t8_the_option_stops_following_once_something_takes_or_hides_the_symlink() -> None:
    assert plain(LINKED, layer(entry("a/1", b"1"), entry(".wh.a"), entry("a/2", b"2")), follow_dirlinks=True) == {
        "a": "dir",
        "a/2": "file '2'",
        "b": "dir 700",
        "b/1": "file '1'",
        "b/f": "file 'f'",
    }
    tree = plain(LINKED, layer(entry("a/1", b"1"), entry("a/"), entry("a/2", b"2")), follow_dirlinks=True)
    assert sorted(tree) == ["a", "a/2", "b", "b/1", "b/f"]


def test_t9_an_entry_for_a_lower_symlink_makes_a_directory(unpack: Unpack) -> None:
    upper = layer(entry("a/", mode=0o711), entry("a/new", b"n"))
    expected = {"a": "dir 711", "a/new": "file 'n'", "b": "dir 700", "b/f": "file 'f'"}
    assert unpack(LINKED, upper) == expected
    assert plain(LINKED, upper, follow_dirlinks=True) == expected


def test_t10_a_symlink_of_the_same_layer_is_followed(unpack: Unpack) -> None:
    tar = layer(entry("b/"), entry("a", link="b"), entry("a/new", b"n"), entry("d/up", link="../.././../b/sub"),
                entry("d/up/x", b"x"), entry("abs", link="/b"), entry("abs/y", b"y"))  # fmt: skip
    assert unpack(tar) == {
        "a": "symlink -> b",
        "abs": "symlink -> /b",
        "b": "dir",
        "b/new": "file 'n'",
        "b/sub": "dir",
        "b/sub/x": "file 'x'",
        "b/y": "file 'y'",
        "d": "dir",
        "d/up": "symlink -> ../.././../b/sub",
    }


def test_t10_a_symlink_to_nothing_makes_the_directory_it_names(unpack: Unpack) -> None:
    assert unpack(layer(entry("a", link="b/c"), entry("a/new", b"n"))) == {
        "a": "symlink -> b/c",
        "b": "dir",
        "b/c": "dir",
        "b/c/new": "file 'n'",
    }


def test_t10_the_symlink_stops_being_followed_once_it_is_replaced() -> None:
    tar = layer(entry("a", link="b"), entry("a/1", b"1"), entry("a/"), entry("a/2", b"2"))
    assert plain(tar) == {"a": "dir", "a/2": "file '2'", "b": "dir", "b/1": "file '1'"}


@pytest.mark.parametrize("target", ["a", "b", "/b/../a"])
def test_l3_a_loop_of_symlinks_on_a_path_is_refused(target: str) -> None:
    tar = layer(entry("b", link="a"), entry("a", link=target), entry("a/x", b"x"))
    assert "refused by rule L3: entry 'a/x' at layer offset 1024: the symlinks on its path form a loop" in refused(tar)
    tree = merged([tar], examine=True)
    assert sorted(look(tree, [tar])) == ["a", "b"]
    assert rules(tree) == ["L3"]


def test_l3_a_chain_of_255_symlinks_is_followed_and_one_of_256_is_not() -> None:
    chain = [entry(f"s{n}", link=f"s{n + 1}") for n in range(256)]
    assert plain(layer(*chain, entry("s1/x", b"x")))["s256/x"] == "file 'x'"
    assert "rule L3" in refused(layer(*chain, entry("s0/x", b"x")))


def test_l3_following_symlinks_has_a_bound_for_a_whole_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ocifs.overlay.upper.FOLLOWED_MAX", 10)
    lower = layer(entry("r/f", b"f"))
    paths = [entry("s", link="./r")] + [entry(f"s/{number}/x") for number in range(6)]
    assert "rule L3: entry 's/5/x'" in refused(lower, layer(*paths))
    assert sorted(at(merged([layer(*paths)], examine=True), "r").children or ()) == [b"0", b"1", b"2", b"3", b"4"]
    links = [entry("s", link="./r")] + [hard(f"l{number}", "s/f") for number in range(6)]
    assert "rule H6: entry 'l5'" in refused(lower, layer(*links))


def test_t11_a_whiteout_through_a_lower_symlink_makes_a_directory_in_its_place() -> None:
    assert plain(LINKED, layer(entry("a/.wh.f"))) == {"a": "dir", "b": "dir 700", "b/f": "file 'f'"}


def test_t11_the_option_follows_the_lower_symlink() -> None:
    expected = {"a": "symlink -> b", "b": "dir 700"}
    assert plain(LINKED, layer(entry("a/.wh.f")), follow_dirlinks=True) == expected
    assert plain(LINKED, layer(entry("a/.wh..wh..opq")), follow_dirlinks=True) == expected


def test_t12_paths_are_normalised(unpack: Unpack) -> None:
    tar = layer(
        entry("./a", b"1"), entry("/b", b"2"), entry("x/../c", b"3"), entry(".//d///e/./", type=DIR), entry("d//e//f", b"4"),
        entry("g/", b"5", type=FILE),
    )  # fmt: skip
    assert unpack(tar) == {
        "a": "file '1'",
        "b": "file '2'",
        "c": "file '3'",
        "d": "dir",
        "d/e": "dir",
        "d/e/f": "file '4'",
        "g": "file '5'",
    }
    assert rules(merged([tar])) == []


@pytest.mark.parametrize("path", ["../x", "/../x", "a/../../x", "../../../x", "./../x"])
def test_t13_a_path_out_of_the_root_is_clamped(unpack: Unpack, path: str) -> None:
    tar = layer(entry(path, b"1"))
    assert unpack(tar) == {"x": "file '1'"}
    assert rules(merged([tar])) == ["T13"]


def test_t13_warns_about_each_entry() -> None:
    assert rules(merged([layer(entry("../d/x"), entry("../d/y"), entry("d/z"))])) == ["T13", "T13"]


@pytest.mark.parametrize("path", ["./", ".", "/", "a/.."])
def test_t14_an_entry_for_the_root_gives_it_attributes(path: str) -> None:
    xattrs = {"user.a": b"1"}
    tree = merged([BASE, layer(entry(path, type=DIR, mode=0o700, uid=3, gid=4, mtime=5, xattrs=xattrs))])
    root = tree.root
    assert (root.mode, root.uid, root.gid, root.mtime_ns, root.xattrs, root.origin) == (
        0o700, 3, 4, 5_000_000_000, ((b"user.a", b"1"),), Origin(2, 0),
    )  # fmt: skip
    assert sorted(root.children or ()) == [b"dir", b"keep"]


@pytest.mark.parametrize("layers", [[], [layer()], [BASE, BASE]])
def test_t14_a_root_without_an_entry(layers: list[bytes]) -> None:
    root = merged(layers).root
    assert (root.kind, root.mode, root.uid, root.gid, root.mtime_ns) == (Kind.DIR, 0o755, 0, 0, 0)
    assert root.origin == Origin(1, -1)


@pytest.mark.parametrize("kind", [FILE, SYMLINK, HARDLINK, CHAR, FIFO])
def test_t14_a_root_that_is_no_directory_is_refused(kind: bytes) -> None:
    tar = layer(entry("a", b"1"), entry("./.", type=kind, link="a" if kind in (SYMLINK, HARDLINK) else ""))
    assert "refused by rule T14: entry './.' at layer offset 1024" in refused(tar)
    tree = merged([tar], examine=True)
    assert look(tree, [tar]) == {"a": "file '1'"}
    assert rules(tree) == ["T14"]


def test_t15_an_empty_name_is_skipped() -> None:
    tar = layer(entry("", b"x"), entry("a", b"1"))
    tree = merged([tar])
    assert look(tree, [tar]) == {"a": "file '1'"}
    assert rules(tree) == ["T15"]


def test_t16_any_byte_but_nul_and_slash_is_kept(unpack: Unpack) -> None:
    names = [bytes([byte]) * 2 for byte in range(1, 256) if byte not in b"./"] + [
        b"back\\slash",
        b"new\nline",
        b"\xff\xfe",
    ]
    tar = layer(*(entry(name) for name in names), entry(b"\xff/\xfe", b"x"))
    expected = {os.fsdecode(name): "file ''" for name in names} | {os.fsdecode(b"\xff"): "dir"}
    assert unpack(tar) == expected | {os.fsdecode(b"\xff/\xfe"): "file 'x'"}


def test_t17_a_name_over_255_bytes_is_left_out() -> None:
    long, fits = "n" * 256, "f" * 255
    tar = layer(entry(long), entry(fits, b"1"), entry(f"{long}/x"), entry(f"d/{long}"), entry(f"d/{long}/y/"))
    tree = merged([tar])
    assert look(tree, [tar]) == {fits: "file '1'"}
    assert rules(tree) == ["T17"] * 4


def test_t17_a_hard_link_to_a_name_that_was_left_out_has_the_content() -> None:
    tar = layer(entry("n" * 256, b"data"), entry("l", type=HARDLINK, link="./" + "n" * 256))
    assert plain(tar) == {"l": "file 'data'"}


def test_t17_what_counts_for_a_whiteout_is_the_name_it_hides() -> None:
    upper = layer(entry(".wh." + "f" * 255), entry(".wh." + "f" * 256))
    tree = merged([layer(entry("f" * 255)), upper])
    assert look(tree, []) == {}
    assert rules(tree) == ["T17"]


def test_l1_a_path_over_4095_bytes_is_left_out() -> None:
    deep = "/".join(["d" * 127] * 31)  # 3,967 bytes
    tar = layer(entry(f"{deep}/{'f' * 127}", b"1"), entry(f"{deep}/{'f' * 128}"), entry("x/" * 3000, type=DIR))
    tree = merged([tar])
    assert [path for path in look(tree, [tar]) if not path.endswith("d")] == [f"{deep}/{'f' * 127}"]
    assert rules(tree) == ["L1", "L1"]


def test_l1_a_path_is_not_taken_apart_if_it_is_spelt_too_long() -> None:
    tar = layer(entry("./" * 40_000 + "x"), hard("l", "./" * 40_000 + "x"))
    tree = merged([tar], examine=True)
    assert look(tree, [tar]) == {"l": "file unreadable"}
    assert rules(tree) == ["L1", "H6"]
    assert len(tree.warnings[0].path) == 4095


def test_l1_symlinks_do_not_lead_deeper_either() -> None:
    deep = "x/" * 2000
    tar = layer(entry(deep), entry("s", link=deep), entry("s/" + "y/" * 40), entry("s/" + "z/" * 60))
    tree = merged([tar])
    assert rules(tree) == ["L1"]
    assert max(map(len, look(tree, [tar]))) <= 4095


def test_t18_any_number_of_layers() -> None:
    layers = [layer(entry(f"d/{number}"), entry("top", b"%d" % number)) for number in range(1, 601)]
    tree = merged(layers)
    assert len(at(tree, "d").children or ()) == 600
    assert look(tree, layers)["top"] == "file '600'"


# --- hard links -----------------------------------------------------------------------------------------------------


def hard(path: str, target: str, **header: Any) -> bytes:
    return entry(path, type=HARDLINK, link=target, **header)


@pytest.mark.parametrize(
    "target", ["d/f", "/d/f", "./d/f", "d/../d//f", "../d/f", "via/f", "abs/f", "up/f", "up/../d/f"]
)
def test_h1_a_target_is_resolved_inside_the_root(unpack: Unpack, target: str) -> None:
    tar = layer(entry("d/f", b"x"), entry("via", link="d"), entry("abs", link="/d"), entry("up", link="../../d"),
                hard("l", target))  # fmt: skip
    found = unpack(tar)
    assert (found["d/f"], found["l"]) == ("file 'x' &1", "file 'x' &1")
    assert rules(merged([tar])) == []


def test_h1_the_last_component_is_not_followed(unpack: Unpack) -> None:
    tar = layer(entry("f", b"x"), entry("s", link="f"), hard("l", "s"))
    assert unpack(tar) == {"f": "file 'x'", "l": "symlink -> f &1", "s": "symlink -> f &1"}


def test_h1_dot_dot_in_a_target_is_taken_as_text(unpack: Unpack) -> None:
    tar = layer(
        entry("x", link="d/e"), entry("d/e/"), entry("d/y/f", b"no"), entry("y/f", b"yes"), hard("l", "x/../y/f")
    )
    assert unpack(tar)["l"] == "file 'yes' &1"


def test_h1_a_link_to_a_device_or_fifo(unpack: Unpack) -> None:
    tar = layer(entry("null", type=CHAR, rdev=(1, 3)), entry("pipe", type=FIFO), hard("l", "null"), hard("m", "pipe"))
    assert unpack(tar) == {"l": "char 1,3 &1", "m": "fifo &2", "null": "char 1,3 &1", "pipe": "fifo &2"}


def test_h2_a_target_in_a_lower_layer_is_the_same_inode(unpack: Unpack) -> None:
    upper = layer(hard("dir/link", "keep"), hard("via", "dir/old"))
    assert unpack(BASE, upper) == {
        "dir": "dir 750",
        "dir/link": "file 'k' &1",
        "dir/old": "file 'o' &2",
        "dir/two": "file 't'",
        "keep": "file 'k' &1",
        "via": "file 'o' &2",
    }
    assert rules(merged([BASE, upper])) == ["H2", "H2"]


def test_h2_through_a_lower_symlink_and_an_upper_directory() -> None:
    base = layer(entry("real/f", b"f"), entry("s", link="real"))
    tree = merged([base, layer(entry("real/"), hard("l", "s/f"), hard("m", "real/f"))])
    assert at(tree, "l") is at(tree, "m") is at(tree, "real/f")
    assert rules(tree) == ["H2", "H2"]


@pytest.mark.parametrize(
    "marker",
    [".wh.keep", ".wh..wh..opq"],
)
@pytest.mark.parametrize("after", [False, True])
def test_h3_a_target_whited_out_in_this_layer_is_what_it_was_before(marker: str, after: bool) -> None:
    entries = [entry(marker), hard("new", "keep")]
    tree = merged([BASE, layer(*(entries[::-1] if after else entries))])
    assert look(tree, [BASE])["new"] == "file 'k'"
    assert "keep" not in look(tree, [BASE])
    assert rules(tree) == ["H3"]


def test_h3_below_a_whited_out_directory() -> None:
    tree = merged([BASE, layer(entry(".wh.dir"), hard("new", "dir/old"))])
    assert look(tree, [BASE]) == {"keep": "file 'k'", "new": "file 'o'"}
    assert rules(tree) == ["H3"]


def test_h4_a_link_keeps_the_version_it_was_made_of(unpack: Unpack) -> None:
    tar = layer(entry("f", b"v1"), hard("l", "f"), entry("f", b"v2"))
    assert unpack(tar) == {"f": "file 'v2'", "l": "file 'v1'"}


def test_h4_a_link_to_a_lower_file_that_its_layer_replaces_keeps_the_lower_one(unpack: Unpack) -> None:
    tree = unpack(BASE, layer(hard("l", "keep"), entry("keep", b"v2")))
    assert (tree["keep"], tree["l"]) == ("file 'v2'", "file 'k'")


def test_h5_a_target_later_in_the_layer_is_resolved_at_the_end() -> None:
    tar = layer(
        hard("a", "b"), hard("b", "c"), hard("d", "s/f"), entry("c", b"x"), entry("s", link="r"), entry("r/f", b"y")
    )
    tree = merged([tar])
    assert look(tree, [tar]) == {
        "a": "file 'x' &1",
        "b": "file 'x' &1",
        "c": "file 'x' &1",
        "d": "file 'y' &2",
        "r": "dir",
        "r/f": "file 'y' &2",
        "s": "symlink -> r",
    }
    assert rules(tree) == ["H5", "H5", "H5"]


def test_h5_a_link_that_is_replaced_while_it_waits_stays_replaced() -> None:
    tar = layer(hard("a", "later"), hard("b", "a"), entry("a", b"new"), entry("later", b"x"))
    assert plain(tar) == {"a": "file 'new'", "b": "file 'x' &1", "later": "file 'x' &1"}


def test_h5_a_path_through_a_waiting_link_waits_for_it() -> None:
    tar = layer(hard("m", "l/f"), hard("l", "s"), entry("s", link="d"), entry("d/f", b"x"))
    assert plain(tar) == {
        "d": "dir",
        "d/f": "file 'x' &1",
        "l": "symlink -> d &2",
        "m": "file 'x' &1",
        "s": "symlink -> d &2",
    }


def test_h5_a_long_chain_of_links_backwards() -> None:
    count = 3000
    tree = merged([layer(*(hard(f"l{n}", f"l{n + 1}") for n in range(count)), entry(f"l{count}", b"x"))])
    assert len({id(node) for node in (tree.root.children or {}).values()}) == 1


@pytest.mark.parametrize(
    ("link", "problem"),
    [
        (hard("l", "nowhere"), "its hard link target 'nowhere' does not exist"),
        (hard("l", "no/where"), "its hard link target 'no/where' does not exist"),
        (hard("l", "dir"), "its hard link target 'dir' is a directory"),
        (hard("l", ".."), "its hard link target '..' is a directory"),
        (hard("l", ""), "its hard link target '' is a directory"),
        (hard("l", "keep/x"), "its hard link target 'keep/x' does not exist"),
        (hard("l", "l"), "its hard link target 'l' does not exist"),
        (hard("l", "x" * 5000), "does not exist"),
    ],
)
def test_h6_a_missing_target_or_a_directory_is_refused_and_reads_eio_when_examined(link: bytes, problem: str) -> None:
    upper = layer(link)
    message = refused(BASE, upper)
    assert message.startswith("layer 2 is refused by rule H6: entry 'l' at layer offset 0: ")
    assert problem in message
    assert len(message) < 500
    tree = merged([BASE, upper], examine=True)
    assert look(tree, [BASE])["l"] == "file unreadable"
    assert rules(tree) == ["H6"]


def test_h6_a_circle_of_links_is_missing() -> None:
    tar = layer(hard("a", "b"), hard("b", "c"), hard("c", "b"))
    assert "rule H6" in refused(tar)
    assert plain(tar, examine=True) == {
        "a": "file unreadable &1",
        "b": "file unreadable &1",
        "c": "file unreadable &1",
    }


def test_h6_in_a_layer_shown_alone() -> None:
    tree = merge([layer_input(layer(hard("l", "keep", mode=0o600, uid=7)), 2)], MergeOptions(single_layer=True))
    assert look(tree, []) == {"l": "file 600 7:0 unreadable"}
    assert rules(tree) == ["H6"]


def test_h7_the_header_of_a_link_applies_to_the_shared_inode() -> None:
    tar = layer(
        entry("f", b"x", mode=0o600, mtime=5, xattrs={"user.a": b"1", "user.b": b"1"}),
        hard("l", "f", mode=0o4755, uid=1, gid=2, mtime=6),
        hard("m", "f", mode=0o640, uid=3, gid=4, mtime=7, xattrs={"user.b": b"2", "user.c": b"2"}),
    )
    tree = merged([tar])
    node = at(tree, "f")
    assert node is at(tree, "l") is at(tree, "m")
    assert (node.mode, node.uid, node.gid, node.mtime_ns) == (0o640, 3, 4, 7_000_000_000)
    assert node.xattrs == ((b"user.a", b"1"), (b"user.b", b"2"), (b"user.c", b"2"))
    assert node.origin == Origin(1, 0)


def test_h7_applies_to_a_lower_file_too_and_to_all_its_names() -> None:
    base = layer(entry("f", b"x"), hard("g", "f"))
    tree = merged([base, layer(entry(".wh.f"), hard("l", "f", mode=0o600))])
    assert look(tree, [base]) == {"g": "file 600 'x' &1", "l": "file 600 'x' &1"}


def test_h7_the_mode_of_a_symlink_is_0777_whatever_a_header_says() -> None:
    tree = merged([layer(entry("s", link="f", mode=0o600), hard("l", "s", mode=0o640, uid=5))])
    assert (at(tree, "s").mode, at(tree, "s").uid) == (0o777, 5)


def test_h7_the_last_header_in_the_stream_wins_also_for_a_link_that_waited() -> None:
    tree = merged([layer(hard("l", "f", mode=0o600, mtime=5), entry("f", b"x", mode=0o644, mtime=6))])
    assert (at(tree, "l").mode, at(tree, "l").mtime_ns) == (0o644, 6_000_000_000)
    # "d/f" is found at the end, when d leads there; the header of m is the later one.
    tar = layer(entry("f", mode=0o644), hard("l", "d/f", mode=0o600), hard("m", "f", mode=0o640), entry("d", link="."))
    assert at(merged([tar]), "l").mode == 0o640


def test_h8_the_size_of_a_link_is_ignored_for_no_data_follows(unpack: Unpack) -> None:
    tar = layer(entry("f", b"content"), hard("l", "f", size=7), entry("after", b"a"))
    assert unpack(tar) == {"after": "file 'a'", "f": "file 'content' &1", "l": "file 'content' &1"}


@pytest.mark.parametrize("gone", [entry(".wh.f"), entry(".wh.l")])
def test_h9_one_name_removed_leaves_the_other(unpack: Unpack, gone: bytes) -> None:
    found = unpack(layer(entry("f", b"x"), hard("l", "f")), layer(gone))
    assert list(found.values()) == ["file 'x'"]


def test_h9_one_name_replaced_leaves_the_other(unpack: Unpack) -> None:
    base = layer(entry("f", b"x"), hard("l", "f"), hard("m", "f"))
    assert unpack(base, layer(entry("f", b"new"))) == {"f": "file 'new'", "l": "file 'x' &1", "m": "file 'x' &1"}


# --- xattrs, data, devices ------------------------------------------------------------------------------------------

XATTRS = {
    "user.note": b"a\nb=\0\xff",
    "security.capability": b"\1\0\0\2",
    "security.selinux": b"system_u:object_r:bin_t:s0",
    "trusted.md5sum": b"m",
    "system.nfs4_acl": b"n",
    "system.posix_acl_access": b"p",
}


def test_d10_xattrs_are_filtered_and_binary() -> None:
    tree = merged([layer(entry("f", xattrs=XATTRS, pax={"LIBARCHIVE.xattr.user.x": "YQ=="}))])
    assert at(tree, "f").xattrs == ((b"security.capability", b"\1\0\0\2"), (b"user.note", b"a\nb=\0\xff"))


def test_d10_all_are_shown_when_asked_for_sorted_by_name() -> None:
    tree = merged([layer(entry("f", xattrs=XATTRS), entry("d/", xattrs=XATTRS))], all_xattrs=True)
    expected = tuple(sorted((name.encode(), value) for name, value in XATTRS.items()))
    assert at(tree, "f").xattrs == expected
    assert at(tree, "d").xattrs == expected


@pytest.mark.parametrize(
    "xattrs",
    [
        {"user." + "n" * 251: b""},
        {"user.big": bytes(65_536)},
        {"user.": b"x"},
        {f"user.{n}": bytes(60_000) for n in range(2)},
    ],
    ids=["name", "value", "nameless", "total"],
)
def test_l4_xattrs_that_no_file_system_can_hold_are_refused(xattrs: dict[str, bytes]) -> None:
    tar = layer(entry("f", b"x", xattrs={"user.a": b"1", **xattrs}))
    assert "refused by rule L4: entry 'f' at layer offset 0: no file system can hold its xattr" in refused(tar)
    tree = merged([tar], examine=True)
    assert at(tree, "f").xattrs[-1] == (b"user.a", b"1")
    assert rules(tree) == ["L4"]


def test_l4_does_not_matter_for_xattrs_that_are_not_shown() -> None:
    assert at(merged([layer(entry("f", xattrs={"trusted.x": bytes(70_000)}))]), "f").xattrs == ()


@pytest.mark.parametrize("target", ["", "t" * 4096])
def test_l2_a_symlink_target_that_no_file_system_can_hold_is_refused(target: str) -> None:
    tar = layer(entry("s", type=SYMLINK, link=target))
    assert (
        f"rule L2: entry 's' at layer offset 0: no file system can hold a symlink target of {len(target)} bytes"
        in refused(tar)
    )
    tree = merged([tar], examine=True)
    assert look(tree, [tar]) == {"s": "file 777 unreadable"}
    assert at(merged([layer(entry("s", link="t" * 4095))]), "s").target == b"t" * 4095


def test_l5_endless_implied_directories_are_refused_even_when_examined() -> None:
    depth = 2000

    def entries() -> list[Entry]:
        return [
            Entry(b"%d" % n + b"/x" * depth, EntryType.FILE, 0x30, 0o644, 0, 0, 0, 0, n * 512, n * 512 + 512, 0)
            for n in range(IMPLIED_MAX // depth + 2)
        ]

    with pytest.raises(DamagedError, match=r"rule L5.*over 1048576 directories that no entry names"):
        merge([LayerInput(1, entries())], MergeOptions(examine=True))


def test_l5_nor_can_many_layers_ask_for_more_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ocifs.overlay.upper.IMPLIED_ALL_MAX", 10)
    tars = [layer(entry(f"{number}/a/b/c/f")) for number in range(3)]
    assert "0/a/b/c/f" in look(merged(tars[:2]), tars)
    assert "layer 3 is refused by rule L5: entry '2/a/b/c/f'" in refused(*tars)
    with pytest.raises(DamagedError, match="with those below it the layer asks for over 10 directories"):
        merged(tars, examine=True)


def test_d8_a_sparse_file_has_an_extent_for_each_piece_and_an_empty_one_none() -> None:
    tar = layer(sparse_pax_1_0("s", [(0, b"ab"), (4096, b"cd")], 8192), entry("e"), entry("f", b"xyz"))
    tree = merged([tar])
    sparse = at(tree, "s")
    offset = tar.index(b"abcd")
    assert sparse.size == 8192
    assert sparse.extents == (Extent(0, 1, offset, 2), Extent(4096, 1, offset + 2, 2))
    assert at(tree, "e").extents == ()
    assert at(tree, "f").extents == (Extent(0, 1, tar.index(b"xyz"), 3),)


def test_d8_types_that_are_not_part_of_a_tree_are_skipped_with_a_warning() -> None:
    tar = layer(entry("label", type=b"V"), entry("new/listing", type=b"D"), entry("../.wh.keep", type=b"M"))
    tree = merged([BASE, tar])
    assert sorted(tree.root.children or ()) == [b"dir", b"keep"]
    assert rules(tree) == ["D8"] * 3


def test_d11_modes_devices_and_fifos_are_kept(unpack: Unpack) -> None:
    tar = layer(
        entry("suid", mode=0o6755, uid=1, gid=2),
        entry("tmp/", mode=0o1777),
        entry("sda", type=BLOCKDEV, rdev=(8, 300), mode=0o660),
        entry("tty", type=CHAR, rdev=(4, 1), mode=0o620),
        entry("pipe", type=FIFO, mode=0o600),
    )
    assert unpack(tar) == {
        "pipe": "fifo 600",
        "sda": "block 660 8,300",
        "suid": "file 6755 1:2 ''",
        "tmp": "dir 1777",
        "tty": "char 620 4,1",
    }


# --- damage, warnings, examination ----------------------------------------------------------------------------------


def test_d6_damage_refuses_the_layer_and_when_examined_what_comes_before_it_is_used() -> None:
    upper = tarball(entry("new", b"n"), entry("bad", checksum="bad"), entry("lost", b"l"))
    message = refused(BASE, upper)
    assert message.startswith("layer 2 is refused by rule D6 at layer offset 1024: ")
    tree = merged([BASE, upper], examine=True)
    assert sorted(tree.root.children or ()) == [b"dir", b"keep", b"new"]
    assert rules(tree) == ["D6"]


def test_notices_of_a_layer_are_warnings_of_the_tree() -> None:
    tree = merged([BASE, layer(entry("f", mtime=2**40))])
    assert [(warned.rule, warned.layer, warned.path) for warned in tree.warnings] == [("D9", 2, b"f")]


def test_warnings_are_bounded_and_counted() -> None:
    tree = merged([layer(*[entry("f")] * (WARNINGS_MAX + 6), entry("", b""))])
    assert rules(tree) == ["T5"] * WARNINGS_MAX + ["T15", "T5"]
    assert tree.warnings[-1].message == "5 more warnings of this rule in this layer are not listed"


def test_messages_are_printable() -> None:
    message = refused(layer(hard("a\x1b[31m\n\udcff", "b\n")))
    assert message.isprintable()
    assert r"entry 'a\x1b[31m\n\xff'" in message


def test_a_layer_shown_alone_shows_its_whiteouts_as_empty_files() -> None:
    upper = layer(
        entry("dir/", mode=0o700),
        entry("dir/.wh.old", b"content", mode=0o600, uid=5, mtime=9),
        entry("dir/.wh..wh..opq"),
        entry(".wh.gone", type=HARDLINK, link="nowhere"),
        entry("gone/.wh.deep"),
        entry("device", type=CHAR, rdev=ZERO),
        entry(".wh..wh.aufs"),
        entry("x/.wh."),
        entry(".wh.dir2/"),
        entry(".wh.dir2/file", b"f"),
    )
    tree = merge([layer_input(upper, 3)], MergeOptions(single_layer=True))
    assert look(tree, [b"", b"", upper]) == {
        ".wh.device": "file ''",
        ".wh.dir2": "dir",
        ".wh.dir2/file": "file 'f'",
        ".wh.gone": "file ''",
        "dir": "dir 700",
        "dir/.wh..wh..opq": "file ''",
        "dir/.wh.old": "file 600 5:0 ''",
        "gone": "dir",
        "gone/.wh.deep": "file ''",
    }
    marker = at(tree, "dir/.wh.old")
    assert (marker.origin, marker.mtime_ns, marker.extents) == (Origin(3, 1), 9_000_000_000, ())
    assert rules(tree) == ["W15"]
    assert tree.root.origin == Origin(3, -1)


def test_the_last_marker_of_a_name_is_the_one_shown() -> None:
    twice = [entry("d/z", type=CHAR, rdev=ZERO), hard("d/x", "d/z", mode=0o600), hard("d/x", "d/z", mode=0o640)]
    upper = layer(*twice, entry(".wh.y", mode=0o600), entry(".wh.y", mode=0o640))
    tree = merged([upper], single_layer=True)
    assert look(tree, [upper]) == {
        ".wh.y": "file 640 ''",
        "d": "dir",
        "d/.wh.x": "file 640 ''",
        "d/.wh.z": "file ''",
    }
    assert rules(tree) == ["T5", "T5"]


def test_a_layer_shown_alone_is_one_layer() -> None:
    with pytest.raises(ValueError, match="cannot be put on another"):
        merge([layer_input(BASE, 1), layer_input(BASE, 2)], MergeOptions(single_layer=True))


def test_a_merge_can_stop_after_any_layer_and_an_observer_hears_what_each_takes() -> None:
    heard: list[tuple[object, ...]] = []

    class Ear:
        def read(self, upper: Upper) -> None:
            heard.append(("read", upper.layer, [place and place[1] for place in upper.places or []]))

        def removed(self, layer: int, path: bytes, node: Node, by: Origin) -> None:
            heard.append(("removed", layer, path, node.origin, by.entry))

        def replaced(self, layer: int, path: bytes, old: Node, new: Node) -> None:
            heard.append(("replaced", layer, path, old.origin, new.origin, old.mode, new.mode))

    layers = [
        BASE,
        layer(entry("./"), entry("new"), entry("dir/.wh.old"), entry("keep", b"2"), entry("dir/.wh.none")),
        layer(entry("dir/", mode=0o711), entry("dir/.wh..wh..opq"), entry("dir/x")),
        layer(entry("dir/y/z"), entry(".wh.dir")),
    ]
    merging = Merge(observer=Ear())
    seen = []
    for number, tar in enumerate(layers, 1):
        merging.apply(layer_input(tar, number))
        seen.append(sorted(look(merging.tree, layers)))
    assert seen == [
        ["dir", "dir/old", "dir/two", "keep"],
        ["dir", "dir/two", "keep", "new"],
        ["dir", "dir/x", "keep", "new"],
        ["dir", "dir/y", "dir/y/z", "keep", "new"],
    ]
    assert [said[2] for said in heard if said[0] == "read"] == [
        [b"dir", b"old", b"two", b"keep"],
        [b"", b"new", b".wh.old", b"keep", b".wh.none"],
        [b"dir", b".wh..wh..opq", b"x"],
        [b"z", b".wh.dir"],
    ]
    assert [said for said in heard if said[0] != "read"] == [
        ("replaced", 2, b"", Origin(1, -1), Origin(2, 0), 0o755, 0o755),
        ("replaced", 2, b"keep", Origin(1, 3), Origin(2, 3), 0o644, 0o644),
        ("removed", 2, b"dir/old", Origin(1, 1), 2),
        ("replaced", 3, b"dir", Origin(1, 0), Origin(3, 0), 0o750, 0o711),
        ("removed", 3, b"dir/two", Origin(1, 2), 1),
        ("removed", 4, b"dir", Origin(3, 0), 1),
    ]
