"""``config.json``: row by row as conversion.md says, on the base that ``runc spec`` writes, and beside umoci's."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from ocifs import image
from ocifs.bundle.base import base_spec, has_cgroup2, rootless
from ocifs.bundle.config import Bind, IdMap, Wanted, make_config
from ocifs.bundle.patch import merge_patch
from ocifs.bundle.users import UnknownUserError
from ocifs.errors import UnsupportedError
from ocifs.image import ImageOptions
from ocifs.rootfs import view as look
from ocifs.spec import ImageConfig, parse_config
from ocifs.store import Store
from tests.support import layout
from tests.support.tarball import DIR, SYMLINK, entry, tarball
from tests.support.trees import directory, file, symlink
from tests.support.viewed import viewed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ocifs.rootfs import RootFS

Json = dict[str, Any]

PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
TERM = "TERM=xterm"
PASSWD = b"root:x:0:0:root:/root:/bin/sh\nada:x:1000:100:Ada:/home/ada:/bin/sh\n"
GROUP = b"wheel:x:10:ada\nusers:x:100:\n"


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RootFS]:
    data = PASSWD.ljust(512, b"\n") + GROUP
    root = directory(
        {
            b"etc": directory({b"passwd": file(512, 0), b"group": file(len(GROUP), 512)}),
            b"data": directory({b"seed": file(1, 0)}, mode=0o1770, uid=1000, gid=100),
            b"empty": directory(mode=0o755, uid=7, gid=8),
            b"link": symlink(b"/../data"),
            b"file": file(1, 0),
        }
    )
    with viewed(root, [data.ljust(1024, b"\0")], tmp_path_factory.mktemp("tree") / "tree") as (rootfs, _):
        yield rootfs


def converted(view: RootFS, wanted: Wanted | None = None, *, top: Json | None = None, **config: Any) -> Json:
    """The configuration for an image whose ``config`` has these fields; ``top`` are those beside it."""
    document = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": []}, **(top or {})}
    return make_config(parse_config(json.dumps({**document, "config": config}).encode()), view, wanted or Wanted())


# -- verbatim fields -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of_image", "given", "expected"),
    [("", "", "/"), ("/srv/app", "", "/srv/app"), ("srv", "", "/srv"), ("/srv", "/opt/x", "/opt/x"), ("/a", "b", "/b")],
)
def test_working_dir_is_the_cwd(view: RootFS, of_image: str, given: str, expected: str) -> None:
    assert converted(view, Wanted(cwd=given), WorkingDir=of_image)["process"]["cwd"] == expected


@pytest.mark.parametrize(
    ("of_image", "given", "expected"),
    [
        ([], (), [PATH, TERM, "HOME=/root"]),
        (["FOO=bar"], (), [PATH, TERM, "FOO=bar", "HOME=/root"]),
        (["PATH=/bin", "A=b=c", "E="], (), [TERM, "PATH=/bin", "A=b=c", "E=", "HOME=/root"]),
        (["TERM=dumb", "HOME=/h"], (), [PATH, "TERM=dumb", "HOME=/h"]),
        (["HOME="], (), [PATH, TERM, "HOME="]),
        (["A=1", "A=2"], (), [PATH, TERM, "A=1", "A=2", "HOME=/root"]),
        (["A=1", "B=2", "A=3"], ("A=4", "C=5"), [PATH, TERM, "B=2", "A=4", "C=5", "HOME=/root"]),
        (["PATHS=x"], ("PATH=/p", "HOME=/g", "TERM=vt100"), ["PATHS=x", "PATH=/p", "HOME=/g", "TERM=vt100"]),
    ],
)
def test_env_is_kept_and_completed(
    view: RootFS, of_image: list[str], given: tuple[str, ...], expected: list[str]
) -> None:
    assert converted(view, Wanted(environment=given), Env=of_image)["process"]["env"] == expected


def test_home_is_the_users(view: RootFS) -> None:
    assert converted(view, User="ada")["process"]["env"][-1] == "HOME=/home/ada"
    assert converted(view, User="1000")["process"]["env"][-1] == "HOME=/home/ada"
    assert converted(view, User="77")["process"]["env"][-1] == "HOME=/"


@pytest.mark.parametrize(
    ("entrypoint", "cmd", "given", "expected"),
    [
        (None, None, (), ["sh"]),
        (None, ["c", "d"], (), ["c", "d"]),
        (["e", "f"], None, (), ["e", "f"]),
        (["e"], ["c"], (), ["e", "c"]),
        (["e"], ["c"], ("g", "h"), ["e", "g", "h"]),
        (None, ["c"], ("g",), ["g"]),
        ([], [], (), ["sh"]),
        (None, None, ("g",), ["g"]),
    ],
)
def test_entrypoint_and_cmd_are_the_args(
    view: RootFS, entrypoint: list[str] | None, cmd: list[str] | None, given: tuple[str, ...], expected: list[str]
) -> None:
    assert converted(view, Wanted(arguments=given), Entrypoint=entrypoint, Cmd=cmd)["process"]["args"] == expected


# -- user ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of_image", "given", "expected"),
    [
        ("", "", {"uid": 0, "gid": 0}),
        ("ada", "", {"uid": 1000, "gid": 100, "additionalGids": [10]}),
        ("1000", "", {"uid": 1000, "gid": 100}),
        ("ada:wheel", "", {"uid": 1000, "gid": 10}),
        ("3:4", "", {"uid": 3, "gid": 4}),
        ("ada", "0:0", {"uid": 0, "gid": 0}),
        ("nobody-knows", "ada:5", {"uid": 1000, "gid": 5}),
    ],
)
def test_user_is_looked_up_in_the_image(view: RootFS, of_image: str, given: str, expected: Json) -> None:
    assert converted(view, Wanted(user=given), User=of_image)["process"]["user"] == expected


def test_an_unknown_user_is_an_error(view: RootFS) -> None:
    with pytest.raises(UnknownUserError, match="the image has no user 'eve'"):
        converted(view, User="eve")


# -- annotations ---------------------------------------------------------------------------------------------------

OURS = "org.opencontainers.image."


@pytest.mark.parametrize(
    ("top", "config", "key", "expected"),
    [
        ({"os": "linux"}, {}, "os", "linux"),
        ({"architecture": "arm64"}, {}, "architecture", "arm64"),
        ({"variant": "v8"}, {}, "variant", "v8"),
        ({"os.version": "10.0"}, {}, "os.version", "10.0"),
        ({"os.features": ["a", "b"]}, {}, "os.features", "a,b"),
        ({"author": "Ada <ada@example.com>"}, {}, "author", "Ada <ada@example.com>"),
        ({"created": "2015-10-31T22:22:56.015925234Z"}, {}, "created", "2015-10-31T22:22:56.015925234Z"),
        ({}, {"StopSignal": "SIGRTMIN+3"}, "stopSignal", "SIGRTMIN+3"),
        ({}, {"ExposedPorts": {"80/tcp": {}, "53/udp": {}}}, "exposedPorts", "53/udp,80/tcp"),
    ],
)
def test_a_field_becomes_an_annotation_and_a_label_wins(
    view: RootFS, top: Json, config: Json, key: str, expected: str
) -> None:
    assert converted(view, top=top, **config)["annotations"][OURS + key] == expected
    labelled = converted(view, top=top, **config, Labels={OURS + key: "mine"})
    assert labelled["annotations"][OURS + key] == "mine"


def test_what_the_image_does_not_say_is_no_annotation(view: RootFS) -> None:
    assert converted(view)["annotations"] == {OURS + "os": "linux", OURS + "architecture": "amd64"}
    assert "annotations" not in converted(view, top={"os": None, "architecture": None})


def test_labels_are_annotations(view: RootFS) -> None:
    annotations = converted(view, Labels={"a": "b", "": "no name", "org.example/x": ""})["annotations"]
    assert {key: annotations[key] for key in ("a", "org.example/x")} == {"a": "b", "org.example/x": ""}
    assert "" not in annotations


@pytest.mark.parametrize(
    "label",
    [
        *("run.oci.handler", "run.oci.hooks.stdout", "org.systemd.property.ExecStart", "org.criu.config"),
        *("io.katacontainers.config.hypervisor.path", "dev.gvisor.flag.debug-log"),
    ],
)
def test_a_label_that_runtimes_obey_is_left_out_and_said_so(
    view: RootFS, label: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert label not in converted(view, Labels={label: "x"})["annotations"]
    assert f"the label {label} is no annotation" in caplog.text


def test_annotations_of_the_manifest_are_not_copied(tmp_path: Path) -> None:
    digests = layout.write_layout(
        tmp_path / "image", [tarball(entry("x"))], manifest_extra={"annotations": {"of": "manifest"}}
    )
    assert digests
    assert "of" not in of_layout(tmp_path, tmp_path / "image")["annotations"]


# -- mounts --------------------------------------------------------------------------------------------------------


def mounts(config: Json) -> list[Json]:
    """What is mounted beside the base's."""
    known = {mount["destination"] for mount in base_spec(cgroup2=False)["mounts"]}
    found: list[Json] = [mount for mount in config["mounts"] if mount["destination"] not in known]
    return found


def test_volumes_are_mounts_with_what_the_image_has_there(view: RootFS) -> None:
    found = mounts(converted(view, Volumes={"/new": {}, "/data": {}, "empty/": {}, "/link": {}, "/file": {}}))
    options = {mount["destination"]: mount["options"][3:] for mount in found}
    assert options == {
        "/data": ["mode=1770", "uid=1000", "gid=100", "tmpcopyup"],
        "/empty": ["mode=0755", "uid=7", "gid=8"],
        "/file": [],
        "/link": ["mode=1770", "uid=1000", "gid=100", "tmpcopyup"],
        "/new": [],
    }
    assert all(mount["options"][:3] == ["rw", "nosuid", "nodev"] for mount in found)
    assert {(mount["type"], mount["source"]) for mount in found} == {("tmpfs", "tmpfs")}


def test_volumes_are_inside_the_root_and_outer_ones_come_first(view: RootFS) -> None:
    volumes: Json = {"/a/b/../c": {}, "//a": {}, "/../../z": {}, "/": {}, ".": {}, "a/./": {}, "/proc": {}}
    assert [mount["destination"] for mount in mounts(converted(view, Volumes=volumes))] == ["/a", "/z", "/a/c"]


def test_what_is_bound_replaces_a_volume(view: RootFS) -> None:
    wanted = Wanted(binds=(Bind("/host/b", "/v/deep/er"), Bind("/host/v", "/v", read_only=True)))
    assert mounts(converted(view, wanted, Volumes={"/v": {}, "/v/deep": {}})) == [
        {"destination": "/v", "type": "bind", "source": "/host/v", "options": ["rbind", "rprivate", "ro"]},
        {"destination": "/v/deep", "type": "tmpfs", "source": "tmpfs", "options": ["rw", "nosuid", "nodev"]},
        {"destination": "/v/deep/er", "type": "bind", "source": "/host/b", "options": ["rbind", "rprivate", "rw"]},
    ]


# -- what is asked for ---------------------------------------------------------------------------------------------


def test_root_terminal_and_network_are_as_asked(view: RootFS) -> None:
    config = converted(view, Wanted(terminal=False, read_only=True, host_network=True))
    assert config["root"] == {"path": "rootfs", "readonly": True}
    assert config["process"]["terminal"] is False
    assert "network" not in {namespace["type"] for namespace in config["linux"]["namespaces"]}
    config = converted(view)
    assert config["root"]["readonly"] is False
    assert config["process"]["terminal"] is True
    assert "network" in {namespace["type"] for namespace in config["linux"]["namespaces"]}


def test_in_a_user_namespace_there_is_one_user(view: RootFS) -> None:
    wanted = Wanted(id_map=IdMap(1234, 567))
    config = converted(view, wanted, Volumes={"/data": {}})
    assert config["linux"]["uidMappings"] == [{"containerID": 0, "hostID": 1234, "size": 1}]
    assert config["linux"]["gidMappings"] == [{"containerID": 0, "hostID": 567, "size": 1}]
    assert config["mounts"][-1]["options"] == ["rw", "nosuid", "nodev", "mode=1770", "tmpcopyup"]
    with pytest.raises(UnsupportedError, match="would run as 1000:100, and in this user namespace there is only 0:0"):
        converted(view, wanted, User="ada")


# -- the base ------------------------------------------------------------------------------------------------------


def runc_spec(tmp_path: Path, *words: str, cgroup2: bool = False) -> Json:
    """What ``runc spec`` writes here, or where there are only control groups of version 2."""
    command = ["runc", "spec", "--bundle", str(tmp_path), *words]
    if cgroup2:
        script = 'umount --recursive /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup && exec "$@"'
        command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", *command]
    subprocess.run(command, check=True, timeout=60)
    spec: Json = json.loads((tmp_path / "config.json").read_bytes())
    return spec


def agrees(ours: Json, runcs: Json) -> None:
    """Compare what the module's docstring says is the same."""
    runcs["process"]["capabilities"].pop("ambient", None)
    assert runcs.pop("ociVersion").startswith("1.")
    assert ours.pop("ociVersion") == "1.0.2"
    assert set(runcs["linux"].pop("maskedPaths")) <= set(ours["linux"].pop("maskedPaths"))
    assert ours == runcs


needs_runc = pytest.mark.skipif(shutil.which("runc") is None, reason="runc is not installed")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@needs_runc
def test_the_base_is_what_runc_spec_writes(tmp_path: Path) -> None:
    agrees(base_spec(cgroup2=has_cgroup2()), runc_spec(tmp_path))


@needs_runc
@needs_root
def test_the_base_is_what_runc_spec_writes_with_cgroup_2(tmp_path: Path) -> None:
    agrees(base_spec(cgroup2=True), runc_spec(tmp_path, cgroup2=True))


@needs_runc
def test_the_base_without_root_is_what_runc_spec_rootless_writes(tmp_path: Path) -> None:
    ours = base_spec(cgroup2=has_cgroup2())
    rootless(ours, uid=os.geteuid(), gid=os.getegid())
    agrees(ours, runc_spec(tmp_path, "--rootless"))


# -- patches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("original", "patch", "result"),
    [  # RFC 7396, appendix A, in its order
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        (["a", "b"], ["c", "d"], ["c", "d"]),
        ({"a": "b"}, ["c"], ["c"]),
        ({"a": "foo"}, None, None),
        ({"a": "foo"}, "bar", "bar"),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)
def test_a_patch_merges_as_rfc_7396_says(original: Any, patch: Any, result: Any) -> None:
    before = json.dumps([original, patch])
    assert merge_patch(original, patch) == result
    assert json.dumps([original, patch]) == before


def test_the_example_of_rfc_7396_section_3() -> None:
    original = {
        "title": "Goodbye!",
        "author": {"givenName": "John", "familyName": "Doe"},
        "tags": ["example", "sample"],
        "content": "This will be unchanged",
    }
    patch = {"title": "Hello!", "phoneNumber": "+01-123-456-7890", "author": {"familyName": None}, "tags": ["example"]}
    assert merge_patch(original, patch) == {
        "title": "Hello!",
        "author": {"givenName": "John"},
        "tags": ["example"],
        "content": "This will be unchanged",
        "phoneNumber": "+01-123-456-7890",
    }


# -- umoci ---------------------------------------------------------------------------------------------------------

IMAGES: dict[str, Json] = {
    "bare": {},
    "shell": {"Cmd": ["/bin/sh"], "Env": ["PATH=/usr/bin:/bin"]},
    "server": {
        "Entrypoint": ["/entrypoint.sh"],
        "Cmd": ["serve", "--port=80"],
        "ExposedPorts": {"80/tcp": {}, "443/tcp": {}},
        "StopSignal": "SIGQUIT",
        "WorkingDir": "/srv",
    },
    "database": {"User": "ada", "Volumes": {"/var/lib/data": {}, "/data": {}}, "Env": ["PGDATA=/data"]},
    "numeric": {"User": "1000"},
    "numeric-pair": {"User": "1000:100", "WorkingDir": "/home/ada"},
    "named-pair": {"User": "ada:wheel"},
    "stranger": {"User": "4242:4243"},
    "labelled": {"Labels": {"a": "b", OURS + "os": "mine", OURS + "author": "somebody else"}},
    "own-home": {"User": "ada", "Env": ["HOME=/elsewhere", "TERM=dumb", "A=1", "B=x y=z"]},
}
FILES = (
    entry("etc/passwd", data=PASSWD),
    entry("etc/group", data=GROUP),
    entry("data/", type=DIR, mode=0o700, uid=1000),
    entry("run", type=SYMLINK, link="data"),
)


def of_layout(tmp_path: Path, path: Path, wanted: Wanted | None = None) -> Json:
    store = Store(tmp_path / "cache")
    try:
        with image.open_image(f"oci:{path}", store, ImageOptions()) as opened:
            config = opened.resolved.image.config
            assert isinstance(config, ImageConfig)
            return make_config(config, look(opened), wanted or Wanted())
    finally:
        store.close()


def same_as_umoci(ours: Json, umocis: Json) -> None:
    """Compare, taking out what the docstring of `ocifs.bundle.config` lists."""
    for config in (ours, umocis):
        for key in ("ociVersion", "hostname"):
            del config[key]
        for key in ("maskedPaths", "readonlyPaths"):
            del config["linux"][key]
        del config["process"]["capabilities"]
        config["root"].setdefault("readonly", False)
        config["process"]["env"] = sorted(line for line in config["process"]["env"] if not line.startswith("HOME="))
        config["mounts"].sort(key=lambda mount: str(mount["destination"]))
        for mount in mounts(config):
            assert mount["type"] == "tmpfs"
            del mount["options"], mount["source"]
        config["annotations"] = {key: value for key, value in config["annotations"].items() if value}
        user = config["process"]["user"]
        if user["uid"] != 1000 or user["gid"] != 100:
            assert "additionalGids" not in user
    assert ours == umocis


@pytest.mark.skipif(shutil.which("umoci") is None, reason="umoci is not installed")
@needs_root
@pytest.mark.parametrize("name", IMAGES)
def test_umoci_writes_the_same_but_for_what_is_listed(tmp_path: Path, name: str) -> None:
    top = {"author": "Ada"} if name == "server" else {}
    layout.write_layout(tmp_path / "image", [tarball(*FILES)], config={**top, "config": IMAGES[name]})
    subprocess.run(
        ["umoci", "unpack", "--image", f"{tmp_path / 'image'}:latest", tmp_path / "bundle"], check=True, timeout=60
    )
    umocis = json.loads((tmp_path / "bundle" / "config.json").read_bytes())
    ours = of_layout(tmp_path, tmp_path / "image")
    if name == "numeric":
        assert umocis["process"]["user"].pop("additionalGids") == [10]  # as listed: a number leaves none
    if name == "labelled":
        assert umocis["annotations"][OURS + "os"] == "linux"  # as listed: the label should win
        assert umocis["annotations"][OURS + "author"] == ""
        umocis["annotations"] |= {OURS + "os": "mine", OURS + "author": "somebody else"}
    if name == "own-home":
        assert "HOME=/home/ada" in umocis["process"]["env"]  # as listed: the image's own is changed
        assert "HOME=/elsewhere" in ours["process"]["env"]
    else:
        homes = [line for line in umocis["process"]["env"] if line.startswith("HOME=")]
        assert ours["process"]["env"][-1:] == (["HOME=/"] if name == "stranger" else homes)
    same_as_umoci(ours, umocis)
