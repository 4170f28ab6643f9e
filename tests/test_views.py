"""The trees below ``.ocifs``: what was deleted, every version of every path."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import event, given, settings

from ocifs.forensics.views import deleted, history, number, open_view, slack_of
from ocifs.history import Change, End, History
from ocifs.history.file import write
from ocifs.history.recorder import Recorder
from ocifs.overlay import LayerInput, Merge, MergeOptions
from ocifs.rootfs import RootFS
from ocifs.store import Kind as Stored
from ocifs.store import Store
from ocifs.tree import Kind, Node, Origin
from tests.support.drawn_layers import LAYERS, Drawn, numbered
from tests.support.evidence_image import LATE, SECRET, TOOL, TROJAN, layer_tars
from tests.support.examined import Memory, examined
from tests.support.merging import content, nodes
from tests.support.tarball import CHAR, HARDLINK, SYMLINK, entry, tarball

if TYPE_CHECKING:
    from pathlib import Path

    from ocifs.history import Version
    from ocifs.tree import Tree


def shown(tree: Tree, layers: tuple[bytes, ...]) -> dict[str, bytes | str | None]:
    """Every path of a tree: a file's data, a link's target, None for a directory."""

    def of(node: Node) -> bytes | str | None:
        if node.kind is Kind.DIR:
            return None
        return node.target.decode() if node.kind is Kind.SYMLINK else content(node, layers)

    return {path.decode(errors="backslashreplace"): of(node) for path, node in nodes(tree.root) if path}


def test_what_was_deleted_from_the_evidence_image(tmp_path: Path) -> None:
    layers = tuple(layer_tars())
    with examined(tmp_path, *layers) as examination:
        tree = deleted(examination)
    assert shown(tree, layers) == {
        "L03": None,
        "L03/bin": None,
        "L03/bin/tool": TOOL,
        "L04": None,
        "L04/opt": None,
        "L04/opt/app": None,
        "L04/opt/app/config": b"one\n",
        "L04/opt/app/data": bytes(3000),
        "L04/root": None,
        "L04/root/.ssh": None,
        "L04/root/.ssh/id_rsa": SECRET,
        "L04/tmp": None,
        "L04/tmp/build.log": b"built\n",
        "L04/var": None,
        "L04/var/log": None,
        "L04/var/log/old.log": b"old\n",
        "bin": None,
        "bin/tool": TOOL,
        "opt": None,
        "opt/app": None,
        "opt/app/config": b"one\n",
        "opt/app/data": bytes(3000),
        "root": None,
        "root/.ssh": None,
        "root/.ssh/id_rsa": SECRET,
        "tmp": None,
        "tmp/build.log": b"built\n",
        "var": None,
        "var/log": None,
        "var/log/old.log": b"old\n",
    }
    by_path = dict(nodes(tree.root))
    secret = by_path[b"root/.ssh/id_rsa"]
    assert (secret.mode, secret.mtime_ns, secret.origin) == (0o600, LATE * 10**9, Origin(2, 1))
    assert (by_path[b"root/.ssh"].mode, by_path[b"tmp"].mode, by_path[b"L04"].mode) == (0o700, 0o1777, 0o555)


def test_every_version_of_the_evidence_image(tmp_path: Path) -> None:
    layers = tuple(layer_tars())
    with examined(tmp_path, *layers) as examination:
        tree = history(examination)
    files = {path: data for path, data in shown(tree, layers).items() if data is not None}
    assert files == {
        "bin/tool/L01-added": TOOL,
        "bin/tool/L03-changed": TROJAN,
        "bin/twin/L01-added": TOOL,
        "dev/null/L01-added": b"",
        "epoch/L05-added": b"0\n",
        "etc/motd/L03-added": b"second\n",
        "etc/motd/L03-overridden": b"first\n",
        "etc/passwd/L01-added": b"root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000::/:/bin/sh\n",
        "odd/b\\xffd/L05-added": b"odd\n",
        "odd/new\nline/L05-added": b"odd\n",
        "odd/per%cent/L05-added": b"odd\n",
        "odd/pipe|bar/L05-added": b"odd\n",
        "opt/app/config/L01-added": b"one\n",
        "opt/app/config/L04-deleted": b"",
        "opt/app/data/L01-added": bytes(3000),
        "opt/app/data/L04-deleted": b"",
        "opt/app/new/L04-added": b"new\n",
        "root/.ssh/id_rsa/L02-added": SECRET,
        "root/.ssh/id_rsa/L04-deleted": b"",
        "sh/L01-added": "bin/tool",
        "tmp/build.log/L02-added": b"built\n",
        "tmp/build.log/L04-deleted": b"",
        "var/log/old.log/L01-added": b"old\n",
        "var/log/old.log/L04-deleted": b"",
    }
    by_path = dict(nodes(tree.root))
    modes = [by_path[b"etc/" + name].mode for name in (b"L01-added", b"L03-changed")]
    assert modes == [0o755, 0o711]
    assert by_path[b"bin/tool/L03-changed"].mode == 0o4755
    assert by_path[b"dev/null/L01-added"].rdev == (1, 3)
    assert by_path[b"opt/app/L04-changed"].kind is Kind.DIR
    assert by_path[b"root/.ssh/id_rsa/L04-deleted"].mtime_ns == 1_700_000_000 * 10**9


def test_a_directory_that_became_a_file_that_was_deleted(tmp_path: Path) -> None:
    layers = (
        tarball(entry("a/", mode=0o750), entry("a/b", b"b"), entry("a/c/d", b"d")),
        tarball(entry("a", b"file")),
        tarball(entry(".wh.a")),
        tarball(entry("a", type=SYMLINK, link="elsewhere")),
        tarball(entry("a/", mode=0o700), entry("a~L05", b"real")),
        tarball(entry(".wh.a~L05")),
    )
    with examined(tmp_path, *layers) as examination:
        tree, versions = deleted(examination), history(examination)
    assert shown(tree, layers) == {
        "L02": None,
        "L02/a": None,
        "L02/a/b": b"b",
        "L02/a/c": None,
        "L02/a/c/d": b"d",
        "L03": None,
        "L03/a": b"file",
        "L05": None,
        "L05/a": "elsewhere",
        "L06": None,
        "L06/a~L05": b"real",
        "a": None,
        "a/b": b"b",
        "a/c": None,
        "a/c/d": b"d",
        "a~L05": b"real",
        "a~L05~": "elsewhere",
    }
    assert dict(nodes(tree.root))[b"a"].mode == 0o750
    a = {path: data for path, data in shown(versions, layers).items() if path.startswith("a/L")}
    assert a == {
        "a/L01-added": None,
        "a/L02-changed": b"file",
        "a/L03-deleted": b"",
        "a/L04-added": "elsewhere",
        "a/L05-changed": None,
    }


def test_names_that_look_like_ours(tmp_path: Path) -> None:
    layers = (
        tarball(entry("L02/x", b"x"), entry("dir/L01-added", b"mine"), entry("dir/L01-added~", b"mine too")),
        tarball(entry(".wh.L02")),
    )
    with examined(tmp_path, *layers) as examination:
        tree, versions = deleted(examination), history(examination)
    assert shown(tree, layers) == {"L02": None, "L02/L02": None, "L02/L02/x": b"x"}
    found = shown(versions, layers)
    assert {path for path in found if path.startswith("dir/")} == {
        "dir/L01-added",
        "dir/L01-added/L01-added",
        "dir/L01-added~",
        "dir/L01-added~/L01-added",
        "dir/L01-added~~",
    }
    assert found["dir/L01-added/L01-added"] == b"mine"
    assert found["dir/L01-added~~"] is None


def test_directories_are_not_deleted_by_getting_other_attributes(tmp_path: Path) -> None:
    layers = (tarball(entry("d/", mode=0o755), entry("d/f", b"1")), tarball(entry("d/", mode=0o700)))
    with examined(tmp_path, *layers) as examination:
        assert shown(deleted(examination), layers) == {}


def test_more_overridden_entries_than_one_and_what_was_below_one(tmp_path: Path) -> None:
    layers = (
        tarball(
            *(entry("f", data) for data in (b"1", b"2", b"3")),
            entry("d/x", b"lost"),
            entry("d", b"file"),
            entry("h", type=HARDLINK, link="f"),
            entry("n", type=CHAR, rdev=(1, 3), xattrs={"user.a": b"1", "trusted.b": b"2", "user.overlay.c": b"3"}),
        ),
    )
    with examined(tmp_path, *layers) as examination:
        tree, everything = history(examination), history(examination, all_xattrs=True)
    files = {path: data for path, data in shown(tree, layers).items() if data is not None}
    assert files == {
        "d/L01-added": b"file",
        "d/x/L01-overridden": b"lost",
        "f/L01-added": b"3",
        "f/L01-overridden": b"1",
        "f/L01-overridden~2": b"2",
        "h/L01-added": b"3",
        "n/L01-added": b"",
    }
    assert dict(nodes(tree.root))[b"n/L01-added"].xattrs == ((b"user.a", b"1"),)
    assert dict(nodes(everything.root))[b"n/L01-added"].xattrs == ((b"trusted.b", b"2"), (b"user.a", b"1"))


def of_versions(layers: int, versions: list[Version]) -> Any:
    """What views use of an examination."""
    out = io.BytesIO()
    write(list(versions), out, key="")
    return SimpleNamespace(
        history=History(Memory(out.getvalue())),
        layers=[SimpleNamespace(number=at) for at in range(1, layers + 1)],
    )


@settings(max_examples=200, deadline=None)
@given(LAYERS)
def test_nothing_gets_lost(drawn: list[list[Drawn]]) -> None:
    layers = [numbered(layer) for layer in drawn]
    recorder = Recorder()
    merging = Merge(MergeOptions(examine=True), recorder)
    for at, layer in enumerate(layers, 1):
        recorder.begin(layer)
        merging.apply(LayerInput(at, layer))
    versions = list(recorder.finish())
    examination = of_versions(len(layers), versions)

    there = dict(nodes(deleted(examination).root))
    latest: dict[bytes, Version] = {}
    for version in versions:
        if version.change in (Change.ADDED, Change.CHANGED) and version.end in (End.WHITEOUT, End.OPAQUE, End.REPLACED):
            event(version.end.name)
            if version.kind != Kind.DIR:
                found = there[b"L%02d/" % version.end_layer + version.path]
                assert (found.origin, found.kind) == (Origin(version.layer, version.entry), version.kind)
                latest[version.path] = max(latest.get(version.path, version), version, key=lambda one: one.end_layer)
    of_latest = {
        node.origin: path for path, node in there.items() if node.kind is not Kind.DIR and not path.startswith(b"L0")
    }
    for path, version in latest.items():
        if not any(one.path == path and one.kind == Kind.DIR and one.end_layer > version.end_layer for one in versions):
            assert of_latest[Origin(version.layer, version.entry)].startswith(path)

    everything = dict(nodes(history(examination).root))
    for version in versions:
        if version.change in (Change.ADDED, Change.CHANGED):
            how = b"added" if version.change is Change.ADDED else b"changed"
            found = everything[version.path + b"/" * bool(version.path) + b"L%02d-" % version.layer + how]
            assert (found.origin, found.kind) == (Origin(version.layer, version.entry), version.kind)


def test_numbers_of_layers_sort() -> None:
    assert [number(1, 5), number(10, 99), number(7, 100), number(127, 127)] == ["01", "10", "007", "127"]


def test_slack_is_files_named_after_what_they_are(tmp_path: Path) -> None:
    toc = tarball(entry("stargz.index.json", b"{}"))
    layers = (tarball(entry("a", b"1"), entry("a", b"2")) + toc,)
    with examined(tmp_path, *layers) as examination:
        assert shown(slack_of(examination, 1), layers) == {
            "000000000512-overridden": b"1",
            "000000003072-estargz-toc.benign": toc,
        }


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_trees_are_kept_and_read(tmp_path: Path, compression: str) -> None:
    with (
        examined(tmp_path, *layer_tars(), compression=compression) as examination,
        Store(tmp_path / "cache") as store,
    ):
        before = {one.key for one in store.entries() if one.kind is Stored.TREE}
        for _ in range(2):
            tree, file = open_view(examination, "deleted", store)
            with file, tree:
                view = RootFS(tree, examination.spans)
                found = view.resolve(b"/root/.ssh/id_rsa")
                assert view.read_blocking(found, 0, 1000) == SECRET
        after = {one.key for one in store.entries() if one.kind is Stored.TREE}
    assert (before, len(after)) == (set(), 1)
