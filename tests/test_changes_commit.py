"""``commit`` and ``diff-upper`` as commands: from every form of image, into layouts of every state."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ocifs.changes import layout as layout_module
from ocifs.changes import recipe
from ocifs.changes.layout import LayoutWriter
from ocifs.changes.recipe import Change, Instruction, parse_change, rfc3339
from ocifs.errors import UsageError
from tests.support import mounting
from tests.support.bolt import containerd_database
from tests.support.command import OCIFS, Run, runner
from tests.support.layout import (
    blob_path,
    make_image,
    put_image,
    write_dir,
    write_docker_archive,
    write_layout,
    write_oci_archive,
)
from tests.support.tarball import entry, tarball

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="trusted.* attributes are shown to root only")

ONE = tarball(entry("./"), entry("etc/"), entry("etc/conf", b"one\n"))
TWO = tarball(entry("etc/two", b"two\n"), entry("var/", mode=0o700))
GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"


@pytest.fixture
def run(capfdbinary: pytest.CaptureFixture[bytes]) -> Run:
    return runner(capfdbinary)


@pytest.fixture
def upper(tmp_path: Path) -> str:
    """An upper directory with one file in it, all of the epoch."""
    top = tmp_path / "upper"
    top.mkdir(mode=0o755)
    (top / "new").write_bytes(b"new\n")
    for path in (top / "new", top):
        os.utime(path, ns=(0, 0))
    return str(top)


def index(layout: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((layout / "index.json").read_bytes())
    return read


def tags(layout: Path) -> dict[str, str]:
    return {
        one["annotations"]["org.opencontainers.image.ref.name"]: one["digest"] for one in index(layout)["manifests"]
    }


def document(layout: Path, digest: str) -> Any:
    raw = blob_path(layout, digest).read_bytes()
    assert "sha256:" + hashlib.sha256(raw).hexdigest() == digest
    return json.loads(raw)


def made(layout: Path, tag: str = "new") -> tuple[Any, Any]:
    """Manifest and configuration of a tag; every blob is there, with its digest and its size."""
    (entry_,) = [one for one in index(layout)["manifests"] if one["annotations"] == {REF_NAME: tag}]
    manifest = document(layout, entry_["digest"])
    for described in (entry_, manifest["config"], *manifest["layers"]):
        raw = blob_path(layout, described["digest"]).read_bytes()
        algorithm, _, encoded = described["digest"].partition(":")
        assert (len(raw), hashlib.new(algorithm, raw).hexdigest()) == (described["size"], encoded)
    return manifest, document(layout, manifest["config"]["digest"])


REF_NAME = "org.opencontainers.image.ref.name"


def everything(path: Path) -> set[str]:
    return {str(one.relative_to(path)) for one in path.rglob("*")}


# -- documents -----------------------------------------------------------------------------------------------------


def test_the_new_image(run: Run, tmp_path: Path, upper: str) -> None:
    base = write_layout(tmp_path / "image", [ONE, TWO], compression=["gzip", "plain"])
    words = ["-m", "add new", "-a", "Ada", "--timestamp", "1700000000"]
    status, out, err = run("commit", *words, "--image", str(tmp_path / "image"), upper, f"oci:{tmp_path}/out:new")
    assert (status, err) == (0, "")
    manifest, config = made(tmp_path / "out")
    assert out.decode().strip() == tags(tmp_path / "out")["new"]
    assert manifest["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
    assert manifest["config"]["mediaType"] == "application/vnd.oci.image.config.v1+json"
    assert [one["digest"] for one in manifest["layers"]][:2] == base["layers"]
    assert [one["mediaType"] for one in manifest["layers"]] == [GZIP, GZIP.removesuffix("+gzip"), GZIP]
    assert config["rootfs"]["diff_ids"][:2] == base["diff_ids"]
    assert len(config["rootfs"]["diff_ids"]) == 3
    assert (config["created"], config["author"]) == ("2023-11-14T22:13:20Z", "Ada")
    assert config["history"][:2] == [{"created": "2024-05-01T12:00:00Z", "created_by": f"layer {n}"} for n in (1, 2)]
    assert config["history"][2:] == [
        {"created": "2023-11-14T22:13:20Z", "created_by": "ocifs commit", "author": "Ada", "comment": "add new"}
    ]
    assert config["config"] == {"Env": ["PATH=/usr/bin:/bin"], "Cmd": ["/bin/sh"]}
    assert config["architecture"] == "amd64"
    assert (tmp_path / "out/oci-layout").read_bytes() == b'{"imageLayoutVersion":"1.0.0"}'
    assert run("cat", f"oci:{tmp_path}/out:new", "/new", "/etc/two").out == b"new\ntwo\n"


def test_the_same_changes_make_the_same_image(run: Run, tmp_path: Path, upper: str, monkeypatch: Any) -> None:
    write_layout(tmp_path / "image", [ONE])
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    commits = [
        run("commit", "--image", str(tmp_path / "image"), upper, f"oci:{tmp_path}/{out}:new") for out in ("a", "b")
    ]
    assert commits[0] == commits[1]
    assert everything(tmp_path / "a") == everything(tmp_path / "b")
    assert made(tmp_path / "a")[1]["created"] == "2023-11-14T22:13:20Z"


def test_a_base_up_to_a_layer_keeps_the_history_up_to_it(run: Run, tmp_path: Path, upper: str) -> None:
    history = [{"created_by": "1"}, {"created_by": "env", "empty_layer": True}, {"created_by": "2"}]
    base = write_layout(tmp_path / "image", [ONE, TWO], config={"history": history})
    for number, kept in ((1, history[:2]), (2, history)):
        assert (
            run("commit", "--image", f"{tmp_path}/image#{number}", upper, f"oci:{tmp_path}/out:n{number}").status == 0
        )
        manifest, config = made(tmp_path / "out", f"n{number}")
        assert [one["digest"] for one in manifest["layers"][:-1]] == base["layers"][:number]
        assert config["rootfs"]["diff_ids"][:-1] == base["diff_ids"][:number]
        assert config["history"][:-1] == kept


def test_docker_types_become_oci_types_and_what_docker_noted_of_its_container_goes(
    run: Run, tmp_path: Path, upper: str
) -> None:
    def docker(manifest: dict[str, Any]) -> None:
        manifest["mediaType"] = "application/vnd.docker.distribution.manifest.v2+json"
        manifest["config"]["mediaType"] = "application/vnd.docker.container.image.v1+json"
        manifest["layers"][0]["mediaType"] = "application/vnd.docker.image.rootfs.diff.tar.gzip"
        manifest["annotations"] = {"org.opencontainers.image.created": "2020-01-01T00:00:00Z"}

    health = {"Cmd": ["/bin/sh"], "Healthcheck": {"Test": ["CMD", "true"]}, "OnBuild": ["RUN x"]}
    said = {"config": health, "container": "f00", "container_config": {"Cmd": ["x"]}, "docker_version": "20.10"}
    write_layout(tmp_path / "image", [ONE], change_manifest=docker, config=said)
    assert run("commit", "--image", str(tmp_path / "image"), upper, f"oci:{tmp_path}/out:new").status == 0
    manifest, config = made(tmp_path / "out")
    assert manifest["config"]["mediaType"] == "application/vnd.oci.image.config.v1+json"
    assert [one["mediaType"] for one in manifest["layers"]] == [GZIP, GZIP]
    assert "annotations" not in manifest
    assert config["config"] == health
    assert not {"container", "container_config", "docker_version"} & config.keys()


def test_annotations_of_layers_stay(run: Run, tmp_path: Path, upper: str) -> None:
    def annotate(manifest: dict[str, Any]) -> None:
        manifest["layers"][0]["annotations"] = {"x.toc": "sha256:1"}

    write_layout(tmp_path / "image", [ONE], change_manifest=annotate)
    assert run("commit", "--image", str(tmp_path / "image"), upper, f"oci:{tmp_path}/out:new").status == 0
    assert made(tmp_path / "out")[0]["layers"][0]["annotations"] == {"x.toc": "sha256:1"}


CONFIG = {"Env": ["PATH=/bin", "A=1"], "Cmd": ["old"], "Entrypoint": ["/e"], "WorkingDir": "/srv", "Labels": {"l": "1"}}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (['CMD ["a", "b c"]'], {"Cmd": ["a", "b c"]}),
        (["cmd echo $HOME"], {"Cmd": ["/bin/sh", "-c", "echo $HOME"]}),
        (["CMD []"], {"Cmd": []}),
        (['ENTRYPOINT ["/new"]'], {"Entrypoint": ["/new"], "Cmd": None}),
        (['CMD ["x"]', 'ENTRYPOINT ["/new"]'], {"Entrypoint": ["/new"], "Cmd": ["x"]}),
        (["ENV A=2 B='x y'"], {"Env": ["PATH=/bin", "A=2", "B=x y"]}),
        (["ENV C  three words"], {"Env": ["PATH=/bin", "A=1", "C=three words"]}),
        (["LABEL l=2", 'LABEL m="a b"'], {"Labels": {"l": "2", "m": "a b"}}),
        (["USER 1000:100"], {"User": "1000:100"}),
        (["WORKDIR /opt"], {"WorkingDir": "/opt"}),
        (["WORKDIR sub"], {"WorkingDir": "/srv/sub"}),
        (["WORKDIR ../a//b/"], {"WorkingDir": "/a/b"}),
        (["WORKDIR /../.."], {"WorkingDir": "/"}),
        (["WORKDIR //a"], {"WorkingDir": "/a"}),
    ],
)
def test_changes_of_the_configuration(
    run: Run, tmp_path: Path, upper: str, changes: list[str], expected: dict[str, Any]
) -> None:
    write_layout(tmp_path / "image", [ONE], config={"config": CONFIG})
    words = [word for change in changes for word in ("--change", change)]
    status, _, err = run("commit", *words, "--image", str(tmp_path / "image"), upper, f"oci:{tmp_path}/out:new")
    assert (status, err) == (0, "")
    wanted = {key: value for key, value in {**CONFIG, **expected}.items() if value is not None}
    assert made(tmp_path / "out")[1]["config"] == wanted


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("EXPOSE 80", "only CMD, ENTRYPOINT, ENV, LABEL, USER, WORKDIR can be changed"),
        ("", "only CMD"),
        ('CMD ["a", 1]', "is not a JSON list of strings"),
        ("ENV", "is not of the form NAME=VALUE"),
        ("ENV A", "is not of the form NAME=VALUE"),
        ("LABEL a", "is not of the form NAME=VALUE"),
        ("ENV =x", "is not of the form NAME=VALUE"),
        ("ENV A='x", "No closing quotation"),
        ("USER", "has no value"),
    ],
)
def test_changes_that_are_none(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_change(text)


def test_a_change_is_taken_apart() -> None:
    assert parse_change("ENV A=1 B=2") == Change(Instruction.ENV, ("A", "1", "B", "2"))


def test_times_have_the_digits_they_need() -> None:
    assert rfc3339(0) == "1970-01-01T00:00:00Z"
    assert rfc3339(1_500_000_000) == "1970-01-01T00:00:01.5Z"
    assert rfc3339(1) == "1970-01-01T00:00:00.000000001Z"


# -- where the base comes from -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["oci", "oci-archive", "docker-archive", "docker-archive.gz", "dir", "containerd"])
def test_every_form_of_image_can_be_the_base(run: Run, tmp_path: Path, upper: str, form: str) -> None:
    place = tmp_path / "image"
    if form == "oci":
        write_layout(place, [ONE, TWO], algorithm="sha512")
    elif form == "oci-archive":
        write_oci_archive(place, [ONE, TWO])
    elif form == "dir":
        write_dir(place, [ONE, TWO])
    elif form == "containerd":
        base = make_image([ONE, TWO])
        blobs, meta = place / "io.containerd.content.v1.content/blobs/sha256", place / "io.containerd.metadata.v1.bolt"
        blobs.mkdir(parents=True)
        meta.mkdir()
        for digest, data in base.blobs.items():
            (blobs / digest.removeprefix("sha256:")).write_bytes(data)
        named = (base.manifest["mediaType"], base.manifest_digest, len(base.manifest_raw))
        (meta / "meta.db").write_bytes(containerd_database({"default": {"app": named}}))
    else:
        style, outer = ("stored", "gzip") if form.endswith("gz") else ("skopeo", "plain")
        write_docker_archive(place, [make_image([ONE, TWO])], style=style, outer=outer)
    status, _, err = run("commit", "--image", str(place), upper, f"oci:{tmp_path}/out:new")
    assert (status, err) == (0, "")
    manifest, config = made(tmp_path / "out")
    assert len(manifest["layers"]) == len(config["rootfs"]["diff_ids"]) == 3
    plain = form == "docker-archive"  # whose layers are kept as they are stored
    assert [one["mediaType"] for one in manifest["layers"][:2]] == [GZIP.removesuffix("+gzip") if plain else GZIP] * 2
    assert run("cat", f"oci:{tmp_path}/out:new", "/new", "/etc/two", "/etc/conf").out == b"new\ntwo\none\n"


def test_blobs_of_another_layout_are_further_names_of_the_same_files(run: Run, tmp_path: Path, upper: str) -> None:
    base = write_layout(tmp_path / "image", [ONE])
    assert run("commit", "--image", str(tmp_path / "image"), upper, f"oci:{tmp_path}/out:new").status == 0
    files = [blob_path(tmp_path / layout, base["layers"][0]) for layout in ("image", "out")]
    assert files[0].samefile(files[1])


def test_blobs_are_copied_where_they_cannot_be_linked(
    run: Run, tmp_path: Path, upper: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", refused)
    base = write_layout(tmp_path / "image", [ONE])
    assert run("commit", "--image", str(tmp_path / "image"), upper, f"oci:{tmp_path}/out:new").status == 0
    made(tmp_path / "out")
    files = [blob_path(tmp_path / layout, base["layers"][0]) for layout in ("image", "out")]
    assert not files[0].samefile(files[1])


@pytest.mark.parametrize("linked", [True, False])
def test_a_blob_that_changed_since_it_was_indexed_is_not_taken(
    run: Run, tmp_path: Path, upper: str, monkeypatch: pytest.MonkeyPatch, *, linked: bool
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError

    if not linked:
        monkeypatch.setattr(os, "link", refused)
    base = write_layout(tmp_path / "image", [ONE])
    assert run("index", str(tmp_path / "image")).status == 0
    with blob_path(tmp_path / "image", base["layers"][0]).open("r+b") as blob:
        blob.seek(4)
        blob.write(b"\xff")
    status, _, err = run("commit", "--image", str(tmp_path / "image"), upper, f"oci:{tmp_path}/out:new")
    assert status == 4
    assert f"should have the digest {base['layers'][0]} and has sha256:" in err
    assert not (tmp_path / "out").exists()


# -- where it goes -------------------------------------------------------------------------------------------------


def test_into_the_layout_of_the_base_nothing_is_written_twice(run: Run, tmp_path: Path, upper: str) -> None:
    base = write_layout(tmp_path / "image", [ONE], tag="base")
    put_image(tmp_path / "image", make_image([TWO]), tag="other")
    before = everything(tmp_path / "image")
    stood = blob_path(tmp_path / "image", base["layers"][0]).stat()
    ref = f"oci:{tmp_path}/image"
    assert run("commit", "--image", f"{ref}:base", upper, f"{ref}:new").status == 0
    assert len(everything(tmp_path / "image") - before) == 3  # layer, configuration, manifest
    assert blob_path(tmp_path / "image", base["layers"][0]).stat() == stood
    assert list(tags(tmp_path / "image")) == ["base", "other", "new"]
    made(tmp_path / "image")


def test_a_tag_is_replaced_in_its_place_and_others_stay(run: Run, tmp_path: Path, upper: str) -> None:
    write_layout(tmp_path / "image", [ONE])
    out = tmp_path / "out"
    for tag in ("a", "new", "z"):
        put_image(out, make_image([TWO]), tag=tag)
    raw = index(out)
    raw["annotations"] = {"kept": "yes"}
    raw["manifests"][2]["annotations"]["io.containerd.image.name"] = "new"
    (out / "index.json").write_text(json.dumps(raw))
    status, digest, err = run("commit", "--image", str(tmp_path / "image"), upper, f"oci:{out}:new")
    assert (status, err) == (0, "")
    found = index(out)
    assert found["annotations"] == {"kept": "yes"}
    assert [one["annotations"] for one in found["manifests"]] == [{REF_NAME: "a"}, {REF_NAME: "new"}, {REF_NAME: "z"}]
    assert found["manifests"][1]["digest"] == digest.decode().strip()
    assert found["manifests"][::2] == [
        {**one, "annotations": {REF_NAME: one["annotations"][REF_NAME]}} for one in raw["manifests"][::2]
    ]


def test_the_new_image_may_take_the_tag_of_its_base(run: Run, tmp_path: Path, upper: str) -> None:
    write_layout(tmp_path / "image", [ONE], tag="app")
    ref = f"oci:{tmp_path}/image:app"
    assert run("commit", "--image", ref, upper, ref).status == 0
    assert len(made(tmp_path / "image", "app")[0]["layers"]) == 2
    assert run("commit", "--image", ref, upper, ref).status == 0
    assert len(made(tmp_path / "image", "app")[0]["layers"]) == 3


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("oci:{}/out", "say oci:PATH:TAG"),
        ("dir:{}/out", "say oci:PATH:TAG"),
        ("oci:{}/out:@0", "say oci:PATH:TAG"),
        ("oci:{}/out:a b", "is no tag"),
        ("oci:{}/out:-a", "is no tag"),
        ("oci:{}/out:new#1", "say oci:PATH:TAG"),
        ("oci:{}/full:new", "is neither an OCI layout nor an empty directory"),
        ("oci:{}/file:new", "is no directory, so no OCI layout can be there"),
    ],
)
def test_places_where_no_image_can_go(run: Run, tmp_path: Path, upper: str, target: str, says: str) -> None:
    write_layout(tmp_path / "image", [ONE])
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_bytes(b"")
    (tmp_path / "file").write_bytes(b"")
    before = everything(tmp_path)
    status, _, err = run("commit", "--image", str(tmp_path / "image"), upper, target.format(tmp_path))
    assert status == 2
    assert says in err
    assert everything(tmp_path) - before <= {"ocifs-cache"} | {
        name for name in everything(tmp_path) if name.startswith("ocifs-cache/")
    }


def test_a_failure_leaves_the_layout_as_it_was(run: Run, tmp_path: Path, upper: str) -> None:
    write_layout(tmp_path / "image", [ONE])
    (Path(upper) / ".wh.x").write_bytes(b"")
    put_image(tmp_path / "out", make_image([TWO]), tag="new")
    before = everything(tmp_path / "out"), (tmp_path / "out/index.json").read_bytes()
    for out in ("out", "fresh"):
        status, _, err = run("commit", "--image", str(tmp_path / "image"), upper, f"oci:{tmp_path}/{out}:new")
        assert status == 5
        assert err == (
            "ocifs: /.wh.x is called as the markers of layers are (.wh.), so no layer can carry it: rename or remove it\n"
        )
    assert (everything(tmp_path / "out"), (tmp_path / "out/index.json").read_bytes()) == before
    assert not (tmp_path / "fresh").exists()


def test_a_disk_that_is_full_is_said_and_nothing_is_left(run: Run, tmp_path: Path, upper: str) -> None:
    """As on a full disk, no file can grow any more: here beyond 50,000 bytes."""
    write_layout(tmp_path / "image", [ONE])
    (Path(upper) / "large").write_bytes(os.urandom(1 << 18))
    assert run("index", str(tmp_path / "image")).status == 0
    words = ["commit", "--image", str(tmp_path / "image"), upper, f"oci:{tmp_path}/out:new"]
    done = mounting.run(["prlimit", "--fsize=50000", *mounting.command(*words)])
    assert (done.returncode, done.stderr) == (6, f"ocifs: cannot write {tmp_path}/out: File too large\n")
    assert not (tmp_path / "out").exists()


def test_a_damaged_index_is_left_alone(run: Run, tmp_path: Path, upper: str) -> None:
    write_layout(tmp_path / "image", [ONE])
    (tmp_path / "out").mkdir()
    (tmp_path / "out/index.json").write_bytes(b'{"manifests": [1]}')
    status, _, err = run("commit", "--image", str(tmp_path / "image"), upper, f"oci:{tmp_path}/out:new")
    assert status == 4
    assert "is not as specified" in err
    assert everything(tmp_path / "out") == {"index.json"}


def test_documents_that_are_nested_as_deeply_as_can_just_be_read(
    run: Run, tmp_path: Path, upper: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What reads them first may have a little more room than what reads or writes them then."""
    write_layout(tmp_path / "image", [ONE])
    put_image(tmp_path / "out", make_image([TWO]), tag="other")
    before = (tmp_path / "out/index.json").read_bytes()
    for which, says in (("loads", "out/index.json is nested too deeply"), ("dumps", "is nested too deeply")):
        with monkeypatch.context() as patch:
            patch.setattr(layout_module if which == "loads" else recipe, "json", TooDeep(which))
            status, _, err = run("commit", "--image", str(tmp_path / "image"), upper, f"oci:{tmp_path}/out:new")
        assert (status, says in err) == (4, True)
    assert (tmp_path / "out/index.json").read_bytes() == before


class TooDeep:
    """json, but for one function."""

    def __init__(self, function: str) -> None:
        self._function = function

    def __getattr__(self, name: str) -> Any:
        if name == self._function:
            raise RecursionError
        return getattr(json, name)


def test_a_blob_of_the_wrong_size_is_replaced(run: Run, tmp_path: Path, upper: str) -> None:
    base = write_layout(tmp_path / "image", [ONE])
    cut = blob_path(tmp_path / "out", base["layers"][0])
    cut.parent.mkdir(parents=True)
    (tmp_path / "out/oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    cut.write_bytes(b"cut off")
    assert run("commit", "--image", str(tmp_path / "image"), upper, f"oci:{tmp_path}/out:new").status == 0
    made(tmp_path / "out")


def test_what_a_killed_commit_left_behind_is_removed(run: Run, tmp_path: Path, upper: str) -> None:
    """Killed at its last step, when every blob is written and nothing is published."""
    write_layout(tmp_path / "image", [ONE])
    out = tmp_path / "out"
    put_image(out, make_image([TWO]), tag="other")
    before = everything(out)
    die = "import os, signal\nfrom ocifs.changes.layout import LayoutWriter\n"
    die += "LayoutWriter.publish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)"
    words = ["commit", "--image", str(tmp_path / "image"), upper, f"oci:{out}:new"]
    assert mounting.run(mounting.patched(die, *words)).returncode == -signal.SIGKILL
    (left,) = {name for name in everything(out) - before if "/" not in name}
    assert left.startswith(".ocifs-commit-")
    assert tags(out).keys() == {"other"}
    held = out / ".ocifs-commit-of-another"
    held.mkdir()
    lock = os.open(held, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run(*words).status == 0
    finally:
        os.close(lock)
    assert {name for name in everything(out) if name.startswith(".")} == {".ocifs-commit-of-another"}
    assert tags(out).keys() == {"other", "new"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_ends_it_leaves_nothing(tmp_path: Path, upper: str, number: signal.Signals) -> None:
    """It comes when every blob is written and nothing is published."""
    write_layout(tmp_path / "image", [ONE])
    end = "import os\nfrom ocifs.changes.layout import LayoutWriter\n"
    end += f"LayoutWriter.publish = lambda *_: os.kill(os.getpid(), {number.value})"
    words = ["commit", "--image", str(tmp_path / "image"), upper, f"oci:{tmp_path}/out:new"]
    done = mounting.run(mounting.patched(end, *words))
    assert (done.returncode, done.stderr) == (128 + number, "")
    assert not (tmp_path / "out").exists()


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], object]) -> None:
    """Do ``act`` before the ``number``-th thing that publishing asks of the system."""
    publish, steps = LayoutWriter.publish, itertools.count(1)

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def doing(*words: Any, **more: Any) -> Any:
            if next(steps) == number:
                act()
            return function(*words, **more)

        return doing

    def publishing(*words: Any) -> None:
        with monkeypatch.context() as patch:
            for name in ("mkdir", "open", "replace", "fsync"):
                patch.setattr(os, name, counted(getattr(os, name)))
            publish(*words)

    monkeypatch.setattr(LayoutWriter, "publish", publishing)


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupted() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("act", [full, interrupted])
@pytest.mark.parametrize("fresh", [True, False])
def test_publishing_is_done_or_undone(
    run: Run, tmp_path: Path, upper: str, act: Callable[[], object], *, fresh: bool
) -> None:
    """Whatever step fails: what was there is there and nothing else, or the new image is."""
    write_layout(tmp_path / "image", [ONE])
    out = tmp_path / "out"
    if not fresh:
        put_image(out, make_image([TWO]), tag="other")
    before, undone = everything(out), 0
    for number in itertools.count(1):
        with pytest.MonkeyPatch.context() as patch:
            at_step(patch, number, act)
            status = run("commit", "--image", str(tmp_path / "image"), upper, f"oci:{out}:new").status
        if everything(out) == before:
            assert out.exists() is not fresh
            assert status in (6, 130)
            undone += 1
            continue
        made(out)
        assert {name.split("/")[0] for name in everything(out)} == {"blobs", "index.json", "oci-layout"}
        break
    assert undone > 10


@pytest.mark.parametrize("fresh", [True, False])
def test_publishing_is_killed_and_done_by_the_next(run: Run, tmp_path: Path, upper: str, *, fresh: bool) -> None:
    write_layout(tmp_path / "image", [ONE])
    for number in itertools.count(1):
        out = tmp_path / f"out{number}"
        if not fresh:
            put_image(out, make_image([TWO]), tag="other")
        words = ["commit", "--image", str(tmp_path / "image"), upper, f"oci:{out}:new"]
        child = os.fork()
        if child == 0:
            with pytest.MonkeyPatch.context() as patch:
                at_step(patch, number, lambda: os.kill(os.getpid(), signal.SIGKILL))
                os._exit(run(*words).status)
        _, status = os.waitpid(child, 0)
        if (out / "index.json").exists():
            assert tags(out).keys() in ({"other"}, {"other", "new"}, {"new"})
        assert run(*words).status == 0
        made(out)
        assert {name.split("/")[0] for name in everything(out)} == {"blobs", "index.json", "oci-layout"}
        if os.WIFEXITED(status):
            assert number > 10
            break


def test_a_blob_that_goes_before_publishing_is_missed(
    run: Run, tmp_path: Path, upper: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_layout(tmp_path / "image", [ONE], tag="base")
    at_step(monkeypatch, 1, blob_path(tmp_path / "image", base["layers"][0]).unlink)
    before = (tmp_path / "image/index.json").read_bytes()
    status, _, err = run("commit", "--image", f"oci:{tmp_path}/image:base", upper, f"oci:{tmp_path}/image:new")
    assert status == 7
    assert err.endswith(f"/{base['layers'][0].removeprefix('sha256:')} was removed meanwhile: try again\n")
    assert (tmp_path / "image/index.json").read_bytes() == before


def test_a_place_that_cannot_be_written_to_is_not_left_half_made(
    run: Run, tmp_path: Path, upper: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_layout(tmp_path / "image", [ONE])
    assert run("index", str(tmp_path / "image")).status == 0
    mkdir = os.mkdir

    def refused(path: Any, *words: Any, **more: Any) -> None:
        if b".ocifs-commit-" in os.fsencode(path):
            full()
        mkdir(path, *words, **more)

    monkeypatch.setattr(os, "mkdir", refused)
    status, _, err = run("commit", "--image", str(tmp_path / "image"), upper, f"oci:{tmp_path}/out:new")
    assert (status, err) == (6, f"ocifs: cannot write to {tmp_path}/out: No space left on device\n")
    assert not (tmp_path / "out").exists()


def test_two_commits_at_once_both_count(tmp_path: Path, upper: str) -> None:
    write_layout(tmp_path / "image", [ONE])
    words = [*OCIFS, "commit", "--image", str(tmp_path / "image"), upper]
    running = [
        subprocess.Popen([*words, f"oci:{tmp_path}/out:t{number}"], stdout=subprocess.DEVNULL) for number in range(4)
    ]
    assert [one.wait(timeout=60) for one in running] == [0, 0, 0, 0]
    assert sorted(tags(tmp_path / "out")) == ["t0", "t1", "t2", "t3"]
    assert everything(tmp_path / "out") == {
        name for name in everything(tmp_path / "out") if not name.startswith(".ocifs")
    }


# -- the words -----------------------------------------------------------------------------------------------------


def test_what_is_listed(run: Run, tmp_path: Path, upper: str) -> None:
    write_layout(tmp_path / "image", [ONE])
    etc = Path(upper) / "etc"
    etc.mkdir(mode=0o700)
    (Path(upper) / os.fsdecode(b"raw\xff")).write_bytes(b"")
    for path in (etc, Path(upper)):
        os.utime(path, ns=(0, 0))
    words = ["--image", str(tmp_path / "image"), upper]
    assert run("diff-upper", *words).out == b"C /etc\nA /new\nA /raw\xff\n"
    assert run("diff-upper", "-l", *words).out == b"C /etc  (mode)\nA /new\nA /raw\xff\n"
    found = [json.loads(line) for line in run("diff-upper", "--json", *words).out.splitlines()]
    assert found == [
        {"change": "C", "path": "/etc", "type": "dir", "changed": ["mode"]},
        {"change": "A", "path": "/new", "type": "file", "changed": []},
        {"change": "A", "path": "/raw\udcff", "type": "file", "changed": []},
    ]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--compression", "xz"], "--compression 'xz' is none of gzip, zstd, none"),
        (["--timestamp", "yesterday"], "--timestamp 'yesterday' is no number of seconds since the epoch"),
        (["--layer", "1"], "--layer shows one layer alone"),
    ],
)
def test_words_that_make_no_sense(run: Run, tmp_path: Path, upper: str, words: list[str], says: str) -> None:
    write_layout(tmp_path / "image", [ONE])
    status, _, err = run("commit", *words, "--image", str(tmp_path / "image"), upper, f"oci:{tmp_path}/out:new")
    assert status == 2
    assert says in err


def test_a_directory_that_is_no_bundle(run: Run, tmp_path: Path) -> None:
    status, _, err = run("diff-upper", str(tmp_path))
    assert status == 3
    assert "is no bundle of ocifs" in err


def test_warnings_name_what_was_left_out(run: Run, tmp_path: Path, upper: str) -> None:
    write_layout(tmp_path / "image", [ONE])
    os.setxattr(Path(upper) / "new", "user.empty", b"")
    status, _, err = run("commit", "--image", str(tmp_path / "image"), upper, f"oci:{tmp_path}/out:new")
    assert status == 0
    assert err == (
        "ocifs: warning: left out of the layer: /new: its attribute user.empty has no value, which a layer cannot say\n"
    )


def test_compressions_have_their_types(run: Run, tmp_path: Path, upper: str) -> None:
    write_layout(tmp_path / "image", [ONE])
    for name, suffix in (("gzip", "+gzip"), ("zstd", "+zstd"), ("none", "")):
        words = ["--compression", name, "--image", str(tmp_path / "image"), upper, f"oci:{tmp_path}/out:{name}"]
        assert run("commit", *words).status == 0
        assert made(tmp_path / "out", name)[0]["layers"][-1]["mediaType"] == GZIP.removesuffix("+gzip") + suffix
        assert run("cat", f"oci:{tmp_path}/out:{name}", "/new").out == b"new\n"
