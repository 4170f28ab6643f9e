"""The programs in scripts/: the sample is reproducible, the comparison sees every kind of difference, set-up is careful."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = Path(__file__).resolve().parent
SCRIPTS = HERE.parent / "scripts"
SAMPLE = HERE / "sample"

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="makes devices and owners, which only root can")


def run(*words: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    environment = None if env is None else {**os.environ, **env}
    return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment, check=False)


def blob(layout: Path, digest: str) -> bytes:
    return (layout / "blobs" / digest.replace(":", "/")).read_bytes()


def manifests(layout: Path) -> dict[str, dict[str, Any]]:
    """The manifests of both platforms, by architecture."""
    (top,) = json.loads((layout / "index.json").read_text())["manifests"]
    platforms = json.loads(blob(layout, top["digest"]))["manifests"]
    return {found["platform"]["architecture"]: json.loads(blob(layout, found["digest"])) for found in platforms}


# --------------------------------------------------------------------------------------------------------- the scripts


def programs() -> list[Path]:
    return [path for path in sorted(SCRIPTS.iterdir()) if path.is_file()] + [HERE.parent / ".ci/run"]


@pytest.mark.parametrize("script", programs(), ids=lambda path: path.name)
def test_a_script_is_executable_and_says_what_runs_it(script: Path) -> None:
    assert script.stat().st_mode & stat.S_IXUSR
    assert script.read_text().splitlines()[0] in {"#!/bin/sh", "#!/usr/bin/env python3"}


@pytest.mark.parametrize("script", programs(), ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    if not script.read_text().startswith("#!/bin/sh"):
        return
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    result = run("shellcheck", "--severity=style", script)
    assert result.stdout == ""
    assert result.returncode == 0


# ---------------------------------------------------------------------------------------------------------- the sample


def test_the_sample_is_made_again_byte_for_byte(tmp_path: Path) -> None:
    for out in (tmp_path / "one", tmp_path / "two"):
        assert run(sys.executable, SCRIPTS / "make-sample", out).returncode == 0
    contents = [
        {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        for out in (tmp_path / "one", tmp_path / "two", SAMPLE)
    ]
    assert contents[0] == contents[1]
    if "ng" not in zlib.ZLIB_RUNTIME_VERSION:  # zlib-ng compresses to other bytes that mean the same
        assert contents[0] == contents[2]


def test_the_kept_sample_holds_what_the_script_says_whatever_the_compressor(tmp_path: Path) -> None:
    assert run(sys.executable, SCRIPTS / "make-sample", tmp_path / "new").returncode == 0
    kept, new = manifests(SAMPLE), manifests(tmp_path / "new")
    assert list(kept) == list(new) == ["amd64", "arm64"]
    for architecture, manifest in kept.items():
        config = blob(SAMPLE, manifest["config"]["digest"])
        assert config == blob(tmp_path / "new", new[architecture]["config"]["digest"])
        raw = [blob(SAMPLE, layer["digest"]) for layer in manifest["layers"]]
        tars = [zlib.decompress(data, 31) if data[:2] == b"\x1f\x8b" else data for data in raw]
        diff_ids = [f"sha256:{hashlib.sha256(tar).hexdigest()}" for tar in tars]
        assert json.loads(config)["rootfs"]["diff_ids"] == diff_ids


def test_make_sample_leaves_a_directory_alone_that_is_no_layout(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("")
    result = run(sys.executable, SCRIPTS / "make-sample", tmp_path)
    assert result.returncode == 1
    assert result.stderr == f"make-sample: {tmp_path} is there and is no image layout; give another name.\n"
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize("architecture", ["amd64", "arm64"])
def test_the_samples_program_is_a_static_executable_that_greets(architecture: str, tmp_path: Path) -> None:
    layer = zlib.decompress(blob(SAMPLE, manifests(SAMPLE)[architecture]["layers"][1]["digest"]), 31)
    start = layer.index(b"\x7fELF")
    size = int.from_bytes(layer[start + 96 : start + 104], "little")  # p_filesz of the only segment
    program = tmp_path / "hello"
    program.write_bytes(layer[start : start + size])
    program.chmod(0o755)
    if architecture == {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine):
        assert run(program).stdout == "Hello from a file system that was never unpacked.\n"
    assert program.read_bytes().endswith(b"Hello from a file system that was never unpacked.\n")


# ------------------------------------------------------------------------------------------------------ the comparison


def build(root: Path) -> None:
    """A small tree with one of everything an unprivileged person can make."""
    root.mkdir()
    (root / "dir").mkdir()
    (root / "dir/file").write_bytes(b"content")
    (root / "other").write_bytes(b"content")
    os.link(root / "other", root / "dir/linked")
    (root / "link").symlink_to("dir/file")
    os.mkfifo(root / "fifo", 0o600)
    os.setxattr(root / "dir/file", "user.note", b"one\0two")
    for path in [*root.rglob("*"), root]:
        os.utime(path, ns=(0, 1_700_000_000_123_456_789), follow_symlinks=False)


def rewrite(path: Path, data: bytes) -> None:
    """Change a file's content and nothing else."""
    before = path.stat().st_mtime_ns
    path.write_bytes(data)
    os.utime(path, ns=(0, before))


def unlink_and_copy(path: Path) -> None:
    """Replace one of two names of a file by a copy that is equal in all but that."""
    copy = path.with_name("copy")
    parent = path.parent.stat().st_mtime_ns
    shutil.copy2(path, copy)
    copy.rename(path)
    os.utime(path.parent, ns=(0, parent))


def retarget(path: Path) -> None:
    parent, own = path.parent.stat().st_mtime_ns, path.lstat().st_mtime_ns
    path.unlink()
    path.symlink_to("dir/fils")
    os.utime(path, ns=(0, own), follow_symlinks=False)
    os.utime(path.parent, ns=(0, parent))


def add(path: Path) -> None:
    parent = path.parent.stat().st_mtime_ns
    path.touch()
    os.utime(path.parent, ns=(0, parent))


def remove(path: Path) -> None:
    parent = path.parent.stat().st_mtime_ns
    path.unlink()
    os.utime(path.parent, ns=(0, parent))


def to_directory(path: Path) -> None:
    parent = path.parent.stat().st_mtime_ns
    path.unlink()
    path.mkdir()
    os.utime(path.parent, ns=(0, parent))


CHANGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "nothing": (lambda _: None, []),
    "mode": (lambda root: (root / "dir/file").chmod(0o4644), ["dir/file: mode: 0644 (first) != 4644 (second)"]),
    "mode of a directory": (lambda root: (root / "dir").chmod(0o1777), ["dir: mode: 0755 (first) != 1777 (second)"]),
    "mode of the root": (lambda root: root.chmod(0o700), [".: mode: 0755 (first) != 0700 (second)"]),
    "one nanosecond": (
        lambda root: os.utime(root / "dir", ns=(0, 1_700_000_000_123_456_790)),
        ["dir: mtime: 1700000000.123456789 (first) != 1700000000.123456790 (second)"],
    ),
    "time of a symlink": (
        lambda root: os.utime(root / "link", ns=(0, 5), follow_symlinks=False),
        ["link: mtime: 1700000000.123456789 (first) != 0.000000005 (second)"],
    ),
    "content": (
        lambda root: rewrite(root / "dir/file", b"cOntent"),
        [
            (
                f"dir/file: content: sha256:{hashlib.sha256(b'content').hexdigest()} (first)"
                f" != sha256:{hashlib.sha256(b'cOntent').hexdigest()} (second)"
            ),
        ],
    ),
    "size": (lambda root: rewrite(root / "dir/file", b"conten"), ["dir/file: size: 7 (first) != 6 (second)"]),
    "missing": (lambda root: remove(root / "fifo"), ["fifo: name: fifo (first) != missing (second)"]),
    "one more": (lambda root: add(root / "new"), ["new: name: missing (first) != file (second)"]),
    "target": (lambda root: retarget(root / "link"), ["link: target: dir/file (first) != dir/fils (second)"]),
    "xattr value": (
        lambda root: os.setxattr(root / "dir/file", "user.note", b"one\0twO"),
        ["dir/file: xattr user.note: 0x6f6e650074776f (first) != 0x6f6e650074774f (second)"],
    ),
    "xattr gone": (
        lambda root: os.removexattr(root / "dir/file", "user.note"),
        ["dir/file: xattr user.note: 0x6f6e650074776f (first) != missing (second)"],
    ),
    "xattr more": (
        lambda root: os.setxattr(root / "dir", "user.more", b""),
        ["dir: xattr user.more: missing (first) != 0x (second)"],
    ),
    "hard link": (
        lambda root: unlink_and_copy(root / "other"),
        [
            "dir/linked: links: dir/linked = other (first) != dir/linked (second)",
            "other: links: dir/linked = other (first) != other (second)",
        ],
    ),
    "type": (lambda root: to_directory(root / "fifo"), ["fifo: type: fifo (first) != directory (second)"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_compare_sees(change: str, tmp_path: Path) -> None:
    mutate, expected = CHANGES[change]
    build(tmp_path / "a")
    build(tmp_path / "b")
    mutate(tmp_path / "b")
    result = run(sys.executable, SCRIPTS / "compare", tmp_path / "a", tmp_path / "b")
    entries = 8 if change == "one more" else 7
    noun = "difference" if len(expected) == 1 else "differences"
    assert result.stdout.splitlines() == [*expected, f"{entries} entries compared, {len(expected)} {noun}"]
    assert result.returncode == (1 if expected else 0)
    assert result.stderr == ""


@needs_root
def test_compare_sees_owners_and_device_numbers(tmp_path: Path) -> None:
    for name, owner, device in (("a", (0, 0), (1, 3)), ("b", (0, 7), (1, 5))):
        root = tmp_path / name
        root.mkdir()
        (root / "file").touch()
        os.chown(root / "file", *owner)
        os.mknod(root / "null", stat.S_IFCHR | 0o600, os.makedev(*device))
        for path in (root / "file", root / "null", root):
            os.utime(path, (0, 0))
    result = run(sys.executable, SCRIPTS / "compare", tmp_path / "a", tmp_path / "b")
    assert result.stdout.splitlines() == [
        "file: owner: 0:0 (first) != 0:7 (second)",
        "null: device: 1:3 (first) != 1:5 (second)",
        "3 entries compared, 2 differences",
    ]


def test_compare_writes_an_odd_name_on_one_line(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/a/x\ny\xff"))).touch()
    for name in ("a", "b"):
        os.utime(tmp_path / name, (0, 0))
    result = run(sys.executable, SCRIPTS / "compare", tmp_path / "a", tmp_path / "b")
    assert result.stdout.splitlines()[0] == "x\\ny\\xff: name: file (first) != missing (second)"


def test_compare_refuses_what_is_no_directory(tmp_path: Path) -> None:
    result = run(sys.executable, SCRIPTS / "compare", tmp_path, tmp_path / "none")
    assert result.returncode == 2
    assert result.stderr == f"compare: {tmp_path / 'none'} is no directory.\n"


@needs_root
def test_compare_image_finds_the_sample_as_umoci_unpacks_it() -> None:
    result = run(sys.executable, SCRIPTS / "compare", f"oci:{SAMPLE}:latest")
    assert result.stdout.splitlines()[-1:] == ["36 entries compared, 0 differences"], result.stderr
    assert result.returncode == 0


# ---------------------------------------------------------------------------------------------------------- the set-up


def checkout(path: Path) -> Path:
    """A copy of what scripts/ocifs looks at, with a set-up that only says that it was called."""
    (path / "scripts").mkdir(parents=True)
    shutil.copy2(SCRIPTS / "ocifs", path / "scripts/ocifs")
    (path / "pyproject.toml").write_text("")
    setup = path / "scripts/set-up"
    setup.write_text(
        "#!/bin/sh\n"
        'here=$(cd "${0%/*}/.." && pwd -P)\n'
        "echo set-up on standard output\n"
        'mkdir -p "$here/.venv/bin"\n'
        f'ln -sf {sys.executable} "$here/.venv/bin/python"\n'
        'printf "#!/bin/sh\\necho ran \\"\\$@\\"; cat\\n" >"$here/.venv/bin/ocifs"; chmod +x "$here/.venv/bin/ocifs"\n'
        f'printf "%s\\n" "$here" {sys.executable} "run $FUSE" >"$here/.venv/stamp"\n'
    )
    setup.chmod(0o755)
    os.utime(path / "pyproject.toml", (1, 1))
    return path


def start(script: Path | str, *words: str, fuse: str = "fuse", cwd: Path | None = None) -> tuple[str, str]:
    result = subprocess.run(
        (script, *words),
        input="data",
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "FUSE": fuse},
        check=True,
    )
    return result.stdout, result.stderr


def test_ocifs_sets_up_once_and_leaves_standard_input_and_output_to_the_command(tmp_path: Path) -> None:
    here = checkout(tmp_path / "with space")
    assert start(here / "scripts/ocifs", "cat", "a b") == ("ran cat a b\ndata", "set-up on standard output\n")
    assert start(here / "scripts/ocifs", "cat", "a b") == ("ran cat a b\ndata", "")


def test_ocifs_runs_from_anywhere_and_through_symlinks(tmp_path: Path) -> None:
    here = checkout(tmp_path / "checkout")
    start(here / "scripts/ocifs")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/ocifs").symlink_to("../checkout/scripts/ocifs")
    (tmp_path / "again").symlink_to(tmp_path / "bin/ocifs")
    assert start(tmp_path / "again", "ls", cwd=Path("/")) == ("ran ls\ndata", "")
    assert start("./ocifs", "ls", cwd=tmp_path / "bin") == ("ran ls\ndata", "")
    assert start("scripts/ocifs", "ls", cwd=here) == ("ran ls\ndata", "")


@pytest.mark.parametrize("what", ["stamp gone", "pyproject changed", "moved", "interpreter changed"])
def test_ocifs_sets_up_again_when(what: str, tmp_path: Path) -> None:
    here = checkout(tmp_path / "checkout")
    start(here / "scripts/ocifs")
    if what == "stamp gone":
        (here / ".venv/stamp").unlink()
    elif what == "pyproject changed":
        (here / "pyproject.toml").touch()
        os.utime(here / ".venv/stamp", (1, 1))
    elif what == "moved":
        here = here.rename(tmp_path / "elsewhere")
    else:
        (here / ".venv/bin/python").unlink()
        (here / ".venv/bin/python").symlink_to("/bin/sh")
    assert start(here / "scripts/ocifs")[1] == "set-up on standard output\n"
    assert start(here / "scripts/ocifs")[1] == ""


def test_ocifs_without_fuse_looks_for_it_again_only_to_mount(tmp_path: Path) -> None:
    here = checkout(tmp_path / "checkout")
    start(here / "scripts/ocifs", fuse="")
    assert start(here / "scripts/ocifs", "ls", "x", fuse="")[1] == ""
    assert start(here / "scripts/ocifs", "-v", "mount", "x", fuse="")[1] == "set-up on standard output\n"


def test_ocifs_does_not_run_after_a_failed_set_up(tmp_path: Path) -> None:
    here = checkout(tmp_path / "checkout")
    (here / "scripts/set-up").write_text("#!/bin/sh\necho 'ocifs: no.' >&2\nexit 6\n")
    result = run(here / "scripts/ocifs", "ls")
    assert (result.returncode, result.stdout, result.stderr) == (6, "", "ocifs: no.\n")


def path_without(tmp_path: Path, *hidden: str) -> str:
    """A PATH with the usual commands but some."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for place in ("/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin"):
        for found in Path(place).iterdir() if Path(place).is_dir() else ():
            name = found.name
            if not any(re.fullmatch(pattern, name) for pattern in hidden) and not (folder / name).is_symlink():
                (folder / name).symlink_to(found)
    return str(folder)


def set_up(tmp_path: Path, path: str) -> subprocess.CompletedProcess[str]:
    here = tmp_path / "checkout"
    (here / "scripts").mkdir(parents=True)
    shutil.copy2(SCRIPTS / "set-up", here / "scripts/set-up")
    (here / "pyproject.toml").write_text("")
    return run(here / "scripts/set-up", env={"PATH": path})


def test_set_up_names_an_old_python_and_what_it_needs(tmp_path: Path) -> None:
    path = path_without(tmp_path, r"python.*")
    old = Path(path) / "python3"
    # An interpreter that answers as 3.9 would: nothing to the question for 3.11, its version to the other.
    old.write_text("#!/bin/sh\ncase $2 in *platform*) echo 3.9.2 ;; esac\n")
    old.chmod(0o755)
    result = set_up(tmp_path, path)
    assert result.returncode == 6
    assert result.stdout == ""
    assert result.stderr == (
        "ocifs: ocifs needs Python 3.11 or newer, and python3 here is 3.9.2; "
        "Debian 12, Ubuntu 24.04 and Fedora 37, and all later ones, have a newer one.\n"
    )


def test_set_up_without_apt_names_what_is_needed(tmp_path: Path) -> None:
    result = set_up(tmp_path, path_without(tmp_path, r"python.*", "apt-get"))
    assert result.returncode == 6
    assert result.stderr == (
        "ocifs: ocifs needs Python 3.11 or newer, and this machine has no apt-get to install it with; "
        "install by its own means what Debian calls: python3 python3-venv "
        "python3-dev fuse3 libfuse3-dev pkg-config gcc libc6-dev\n"
    )


def test_the_readme_has_the_script_that_checks_receipts_whole() -> None:
    script = (SCRIPTS / "check-receipt").read_text(encoding="utf-8")
    assert f"```python\n{script}```\n" in (HERE.parent / "README.md").read_text(encoding="utf-8")
