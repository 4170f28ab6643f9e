"""What breaks under a mount, or before it: an error where it is due, a sentence that names it, and never wrong bytes.

Not here: what an index pass makes of each kind of bad blob (`tests/test_layer_index.py`), how mounts end.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
import zstandard

from ocifs import image
from ocifs.image import ImageOptions
from ocifs.store import Kind, Store
from tests.support import layout
from tests.support.damage import flip
from tests.support.mounting import (
    LIMIT,
    Mount,
    agent,
    command,
    environment,
    force_away,
    mounted,
    ocifs,
    record_of,
    run,
)
from tests.support.tarball import entry, tarball

if TYPE_CHECKING:
    from collections.abc import Iterator

GONE = ("EIO", "ENOTCONN", "ECONNABORTED")
"""What a mount answers when it cannot, and when its daemon has ended."""
PIECE = 4096
SIZE = 20 << 20
"""More than a span may have: one zstd frame of it must be re-framed."""
LARGE = hashlib.shake_256(b"large").hexdigest(SIZE // 2).encode()
SMALL = b"a small file in front of the large one\n"


class Place(NamedTuple):
    """An image on disk, its one layer's blob, and a cache of its own."""

    reference: str
    blob: Path
    digest: str
    cache: Path
    mnt: Path

    def spans(self) -> list[tuple[int, int, int, int]]:
        """Give (layer_offset, size, blob_offset, blob_size) of each span."""
        with Store(self.cache) as store, image.open_image(self.reference, store, ImageOptions()) as opened:
            table = opened.layers[0].index.spans
            return [(s.layer_offset, s.size, s.blob_offset, s.blob_size) for s in (table[n] for n in range(len(table)))]


def place(tmp_path: Path, compression: str) -> Place:
    tar = tarball(entry("small", SMALL), entry("large", LARGE), entry("last", b"behind it"))
    digests = layout.write_layout(tmp_path / "image", [tar], compression=compression)
    blob = layout.blob_path(tmp_path / "image", digests["layers"][0])
    return Place(f"oci:{tmp_path}/image", blob, digests["layers"][0], tmp_path / "cache", tmp_path / "mnt")


FILE_AT = 512 + 512 + 512  # layer_offset of the large file's data: two headers, and one block of data
OFFSETS = list(range(0, SIZE, 64 << 10))
EXPECTED = [hashlib.sha256(LARGE[at : at + PIECE]).hexdigest() for at in OFFSETS]


def read_all(mount: Mount) -> list[str]:
    """Give what each piece of the large file reads as; ``ok`` if it is what it should be."""
    got = agent("pieces", mount.at("large"), OFFSETS, PIECE)
    return ["ok" if one == expected else one for one, expected in zip(got, EXPECTED, strict=True)]


def reads_of(spans: list[tuple[int, int, int, int]], bad: set[int], driver: str) -> list[str]:
    """Give what must come of reading each piece when some spans are bad: EIO if it touches one, else what is there.

    EROFS reads the layer's file through the page cache, so a piece touches every byte of the layer's pages it lies in.
    """
    unit = PIECE if driver == "erofs" else 1
    answers = []
    for at in OFFSETS:
        first = (FILE_AT + at) // unit * unit
        last = -(-(FILE_AT + at + PIECE) // unit) * unit
        touched = {n for n, (offset, size, _, _) in enumerate(spans) if offset < last and offset + size > first}
        answers.append("EIO" if touched & bad else "ok")
    return answers


# -- blobs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["gzip", "plain"])
def test_an_altered_blob_reads_eio_in_the_spans_it_is_in_and_nowhere_else(
    tmp_path: Path, driver: str, compression: str
) -> None:
    at = place(tmp_path, compression)
    spans = at.spans()
    assert len(spans) >= 3
    bad = len(spans) // 2
    _, _, blob_offset, blob_size = spans[bad]
    with mounted(at.reference, at.mnt, driver=driver, cache=at.cache) as mount:
        flip(at.blob, blob_offset + blob_size // 2)
        assert read_all(mount) == reads_of(spans, {bad}, driver)
        logged = mount.logged()
        assert at.digest in logged
        assert f"span {bad} " in logged
        assert f"blob_offset {blob_offset}" in logged
        assert agent("read", mount.at("small"), 0, 100) == SMALL.hex()
        assert agent("read", mount.at("last"), 0, 100) == b"behind it".hex()
        # A failure is not remembered: once the blob is as it was, so is the file.
        flip(at.blob, blob_offset + blob_size // 2)
        assert set(read_all(mount)) == {"ok"}


@pytest.mark.parametrize("compression", ["gzip", "plain"])
def test_a_truncated_blob_reads_eio_from_there_on(tmp_path: Path, driver: str, compression: str) -> None:
    at = place(tmp_path, compression)
    spans = at.spans()
    cut = len(spans) // 2
    _, _, blob_offset, blob_size = spans[cut]
    with mounted(at.reference, at.mnt, driver=driver, cache=at.cache) as mount:
        os.truncate(at.blob, blob_offset + blob_size // 2)
        assert read_all(mount) == reads_of(spans, set(range(cut, len(spans))), driver)
        assert f"span {cut} " in mount.logged()
        assert "are left" in mount.logged()


@pytest.mark.parametrize("form", ["oci-archive", "docker-archive"])
@pytest.mark.parametrize("fault", ["altered", "cut", "deleted"])
def test_of_an_archive_that_is_spoilt_nothing_wrong_is_read(tmp_path: Path, driver: str, form: str, fault: str) -> None:
    tar, archive = tarball(entry("small", SMALL), entry("large", LARGE)), tmp_path / "image.tar"
    if form == "oci-archive":
        layout.write_oci_archive(archive, [tar], compression="gzip")
    else:
        layout.write_docker_archive(archive, [layout.make_image([tar])])
    reference = f"{form}:{archive}"
    with mounted(reference, tmp_path / "mnt", driver=driver, cache=tmp_path / "cache") as mount:
        if fault == "altered":
            for at in range(0, archive.stat().st_size, 64 << 10):
                flip(archive, at)
        elif fault == "cut":
            os.truncate(archive, archive.stat().st_size // 2)
        else:
            archive.unlink()
        assert set(read_all(mount)) == {"altered": {"EIO"}, "cut": {"ok", "EIO"}, "deleted": {"ok"}}[fault]
        assert ("blob sha256:" in mount.logged()) == (fault != "deleted")


def test_a_deleted_or_replaced_blob_is_read_as_it_was(tmp_path: Path, driver: str) -> None:
    at = place(tmp_path, "gzip")
    with mounted(at.reference, at.mnt, driver=driver, cache=at.cache) as mount:
        other = at.blob.with_name("other")
        other.write_bytes(os.urandom(at.blob.stat().st_size))
        other.rename(at.blob)
        assert set(read_all(mount)) == {"ok"}
        at.blob.unlink()
        assert agent("sha256", mount.at("large")) == hashlib.sha256(LARGE).hexdigest()
        assert mount.logged() == ""


def test_a_blob_that_has_gone_is_named_at_the_next_mount(tmp_path: Path) -> None:
    at = place(tmp_path, "gzip")
    at.spans()
    at.blob.unlink()
    done = refused(at, at.cache)
    assert done.returncode in (3, 4)
    assert at.digest.removeprefix("sha256:") in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_blob_of_another_size_than_the_indexed_one_is_refused(tmp_path: Path) -> None:
    at = place(tmp_path, "gzip")
    at.spans()
    os.truncate(at.blob, at.blob.stat().st_size // 2)
    done = refused(at, at.cache)
    assert done.returncode == 4
    assert str(at.blob) in done.stderr or at.digest in done.stderr
    assert done.stderr.count("\n") == 1


# -- our own files -------------------------------------------------------------------------------------------------


def entries(cache: Path, kind: str) -> list[Path]:
    return sorted((cache / kind).iterdir())


@pytest.mark.parametrize(("kind", "where"), [("layers", 100), ("layers", 20), ("trees", -20), ("trees", -100)])
def test_a_cached_file_with_a_damaged_head_is_made_again_at_the_next_open(
    tmp_path: Path, kind: str, where: int
) -> None:
    at = place(tmp_path, "gzip")
    at.spans()
    (file,) = entries(at.cache, kind)
    before = file.read_bytes()
    flip(file, where % len(before))
    with mounted(at.reference, at.mnt, cache=at.cache) as mount:
        assert set(read_all(mount)) == {"ok"}
    (file,) = entries(at.cache, kind)
    assert file.read_bytes() == before


@pytest.mark.parametrize("kind", ["layers", "trees"])
def test_a_cached_file_that_was_cut_is_made_again_at_the_next_open(tmp_path: Path, kind: str) -> None:
    at = place(tmp_path, "gzip")
    at.spans()
    (file,) = entries(at.cache, kind)
    for size in (file.stat().st_size - 1, 100, 0):
        # Not in place: the file may be mapped. A cut one comes from a disk that lost its end.
        short = file.with_name("short")
        short.write_bytes(file.read_bytes()[:size])
        short.rename(file)
        with mounted(at.reference, at.mnt, cache=at.cache) as mount:
            assert agent("read", mount.at("small"), 0, 100) == SMALL.hex()


def test_an_index_altered_while_mounted_gives_eio_and_a_log_line_or_the_right_bytes(
    tmp_path: Path, driver: str
) -> None:
    at = place(tmp_path, "gzip")
    at.spans()
    (file,) = entries(at.cache, "layers")
    with mounted(at.reference, at.mnt, driver=driver, cache=at.cache) as mount:
        for offset in range(1024, file.stat().st_size, 256):
            flip(file, offset)
        assert set(read_all(mount)) <= {"ok", "EIO"}
        assert "EIO" in read_all(mount)
        assert re.search(r"the layer index \S+ is damaged", mount.logged())
        assert "ocifs cache clear" in mount.logged()


def test_a_tree_altered_while_mounted_gives_eio_and_a_log_line_or_what_is_right(tmp_path: Path, driver: str) -> None:
    count = 6000
    names = [f"dir{number % 7}/name-{number:05}" for number in range(count)]
    layout.write_layout(tmp_path / "image", [tarball(*(entry(name, mode=0o640) for name in names))])
    cache, reference = tmp_path / "cache", f"oci:{tmp_path}/image"
    with mounted(reference, tmp_path / "mnt", driver=driver, cache=cache) as mount:
        paths = [mount.at(name) for name in names]
        assert set(agent("errors", [["lstat", path] for path in paths])) == {"ok"}
    (file,) = entries(cache, "trees")
    assert file.stat().st_size > 5 * (64 << 10)
    with mounted(reference, tmp_path / "mnt", driver=driver, cache=cache) as mount:
        for offset in range(3 * (64 << 10), file.stat().st_size - 4096, 64 << 10):
            flip(file, offset)
        said = agent("errors", [["lstat", path] for path in paths])
        assert set(said) == {"ok", "EIO"}
        assert re.search(r"the image tree \S+ is damaged: block \d+ of 64 KiB", mount.logged())
        assert "ocifs cache clear" in mount.logged()
    # Damage that nobody saw at opening stays until it is cleared away.
    assert ocifs("cache", "clear", "--cache-dir", cache).returncode == 0
    with mounted(reference, tmp_path / "mnt", driver=driver, cache=cache) as mount:
        assert set(agent("errors", [["lstat", path] for path in paths])) == {"ok"}


def test_a_tree_cut_while_mounted_gives_errors_and_is_made_again_at_the_next_mount(tmp_path: Path, driver: str) -> None:
    """What the daemon has mapped is gone then, and the kernel may end it: an error, and never a wrong answer."""
    at = place(tmp_path, "gzip")
    at.spans()
    (file,) = entries(at.cache, "trees")
    whole = file.stat().st_size
    with mounted(at.reference, at.mnt, driver=driver, cache=at.cache, ended=True) as mount:
        os.truncate(file, 0)
        assert agent("read", mount.at("small"), 0, 100) in {SMALL.hex(), *GONE}
        assert set(agent("errors", [["lstat", mount.at(name)] for name in ("large", "last")])) <= {"ok", *GONE}
        done = ocifs("umount", mount.path)
        assert (done.returncode, done.stderr) == (0, "")
    with mounted(at.reference, at.mnt, driver=driver, cache=at.cache) as mount:
        assert set(read_all(mount)) == {"ok"}
    assert entries(at.cache, "trees")[0].stat().st_size == whole


def test_an_evicted_reframed_copy_is_made_again_at_the_next_mount(tmp_path: Path) -> None:
    at = place(tmp_path, "zstd")
    at.spans()
    (copy,) = entries(at.cache, "reframed")
    copy.unlink()
    with mounted(at.reference, at.mnt, cache=at.cache) as mount:
        assert agent("sha256", mount.at("large")) == hashlib.sha256(LARGE).hexdigest()
        assert entries(at.cache, "reframed") == [copy]


def test_a_reframed_copy_in_use_is_not_evicted(tmp_path: Path) -> None:
    at = place(tmp_path, "zstd")
    with mounted(at.reference, at.mnt, cache=at.cache) as mount:
        assert ocifs("cache", "clear", "--cache-dir", at.cache).returncode == 0
        assert (
            len(entries(at.cache, "reframed"))
            == len(entries(at.cache, "layers"))
            == len(entries(at.cache, "trees"))
            == 1
        )
        assert agent("sha256", mount.at("large")) == hashlib.sha256(LARGE).hexdigest()
    assert ocifs("cache", "clear", "--cache-dir", at.cache).returncode == 0
    assert entries(at.cache, "reframed") == []


def test_an_altered_reframed_copy_reads_eio(tmp_path: Path, driver: str) -> None:
    at = place(tmp_path, "zstd")
    spans = at.spans()
    (copy,) = entries(at.cache, "reframed")
    with mounted(at.reference, at.mnt, driver=driver, cache=at.cache) as mount:
        flip(copy, spans[2][2] + 100)
        assert read_all(mount) == reads_of(spans, {2}, driver)
        assert "the re-framed copy" in mount.logged()


# -- the disk ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path]:
    path.mkdir()
    done = run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "ocifs-test", str(path)])
    assert done.returncode == 0, done.stderr
    try:
        yield path
    finally:
        run(["umount", "--lazy", str(path)])


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
@pytest.mark.parametrize(("compression", "size"), [("zstd", "4m"), ("zstd", "16k"), ("gzip", "16k"), ("plain", "4k")])
def test_a_full_disk_while_indexing_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, compression: str, size: str
) -> None:
    at = place(tmp_path, compression)
    with small_disk(tmp_path / "disk", size) as disk:
        done = refused(at, disk / "cache")
        assert (done.returncode, done.stdout) == (6, "")
        assert "the disk is full" in done.stderr or "No space left" in done.stderr
        assert done.stderr.count("\n") == 1
        left = [path for path in (disk / "cache").rglob("*") if path.is_file()]
        assert [path for path in left if path.parent.name != "layers"] == []
    done = ocifs("ls", "--cache-dir", tmp_path / "elsewhere", at.reference)
    assert done.stdout.split() == ["large", "last", "small"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_where_the_log_lies_the_disk_may_be_full(tmp_path: Path, driver: str) -> None:
    """The mount goes on, and ends in order; another one that cannot be noted down is refused."""
    at = place(tmp_path, "gzip")
    spans = at.spans()
    with small_disk(tmp_path / "disk", "256k") as disk, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OCIFS_RUNTIME_DIR", str(disk / "run"))
        with mounted(at.reference, at.mnt, driver=driver, cache=at.cache) as mount:
            fill(disk / "filler")
            flip(at.blob, spans[2][2] + 100)
            assert read_all(mount) == reads_of(spans, {2}, driver)
            other = at._replace(mnt=tmp_path / "other")
            done = refused(other, at.cache)
            assert (done.returncode, done.stdout) == (6, "")
            assert "No space left on device" in done.stderr
            assert done.stderr.count("\n") == 1
            flip(at.blob, spans[2][2] + 100)
            assert set(read_all(mount)) == {"ok"}
            assert "Traceback" not in mount.logged()
        assert record_of(at.mnt) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
@pytest.mark.parametrize(("files", "lacking"), [(2, ".json"), (3, ".log"), (4, ".socket")])
def test_where_records_lie_there_may_be_no_room_for_files(tmp_path: Path, files: int, lacking: str) -> None:
    """The first two are the file system's root and the runtime directory."""
    at = place(tmp_path, "gzip")
    at.mnt.mkdir()
    with small_disk(tmp_path / "disk", f"256k,nr_inodes={files}") as disk:
        runtime = disk / "run"
        done = ocifs(
            "mount",
            "--driver",
            "fuse",
            "--cache-dir",
            at.cache,
            at.reference,
            at.mnt,
            env={"OCIFS_RUNTIME_DIR": str(runtime)},
        )
        assert (done.returncode, done.stdout) == (6, "")
        assert re.fullmatch(
            rf"ocifs: cannot keep a record in the runtime directory: {runtime}/\w+{lacking}: No space left on device\n",
            done.stderr,
        )
        assert not [path for path in runtime.iterdir() if path.suffix != ".log"]
    force_away(at.mnt)


def fill(path: Path) -> None:
    """Write until the disk is full."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass


def refused(at: Place, cache: Path) -> subprocess.CompletedProcess[str]:
    """Try to mount; take it away again should it work all the same."""
    at.mnt.mkdir(exist_ok=True)
    try:
        return ocifs("mount", "--cache-dir", cache, at.reference, at.mnt)
    finally:
        force_away(at.mnt)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    at = place(tmp_path, "gzip")
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere")):
        done = refused(at, bad)
        assert done.returncode == 6
        assert str(bad) in done.stderr
        assert "--cache-dir" in done.stderr
        assert done.stderr.count("\n") == 1


# -- killed, and two at once ---------------------------------------------------------------------------------------


def test_indexing_killed_at_any_moment_leaves_nothing_that_is_taken_for_whole(tmp_path: Path) -> None:
    at = place(tmp_path, "zstd")
    order = random.Random(7)
    for _ in range(12):
        process = subprocess.Popen(
            command("index", "--cache-dir", at.cache, at.reference),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment(),
            start_new_session=True,
        )
        held = os.pidfd_open(process.pid)
        select.select([held], [], [], order.uniform(0.1, 0.9))
        os.close(held)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(LIMIT)
        for index in (at.cache / "layers").iterdir() if (at.cache / "layers").exists() else ():
            assert index.stat().st_size > 0
    with mounted(at.reference, at.mnt, cache=at.cache) as mount:
        assert agent("sha256", mount.at("large")) == hashlib.sha256(LARGE).hexdigest()
    for leftover in (at.cache / "tmp").iterdir():  # young ones may belong to somebody: they are swept later
        os.utime(leftover, (0, 0))
    assert ocifs("cache", "info", "--cache-dir", at.cache).returncode == 0
    assert list((at.cache / "tmp").iterdir()) == []


def test_processes_that_index_shared_layers_in_different_order_all_succeed(tmp_path: Path) -> None:
    tars = [tarball(entry(f"file{number}", LARGE[: 3 << 20] + bytes([number]))) for number in range(4)]
    orders = [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1], [0, 1, 2, 3]]
    references = []
    for number, order in enumerate(orders):
        layout.write_layout(tmp_path / f"image{number}", [tars[layer] for layer in order], compression="zstd")
        references.append(f"oci:{tmp_path}/image{number}")
    processes = [
        subprocess.Popen(
            command("ls", "--cache-dir", tmp_path / "cache", reference),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        for reference in references
    ]
    for process in processes:
        out, err = process.communicate(timeout=LIMIT)
        assert (process.returncode, err) == (0, "")
        assert out.split() == [f"file{number}" for number in range(4)]
    assert len(entries(tmp_path / "cache", "layers")) == 4
    assert list((tmp_path / "cache" / "locks").iterdir()) == []
    assert list((tmp_path / "cache" / "tmp").iterdir()) == []


def test_one_indexes_while_another_waits(tmp_path: Path) -> None:
    """The second is started while the first is held up in the middle of its pass, and must not begin one of its own."""
    at = place(tmp_path, "gzip")
    Store(at.cache).close()
    with Store(at.cache) as store:
        lock = store.try_lock(Kind.LAYER, at.digest.replace(":", "-"))
        assert lock is not None
        waiting = subprocess.Popen(
            command("ls", "--cache-dir", at.cache, at.reference), stdout=subprocess.PIPE, text=True, env=environment()
        )
        held = os.pidfd_open(waiting.pid)
        assert not select.select([held], [], [], 2)[0], "it did not wait for who builds the index"
        assert entries(at.cache, "layers") == []
        os.close(held)
        lock.release()
        out, _ = waiting.communicate(timeout=LIMIT)
        assert out.split() == ["large", "last", "small"]


# -- made to hurt --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_a_layer_that_inflates_a_thousandfold_is_indexed_within_bounds(tmp_path: Path, compression: str) -> None:
    size = 1 << 30
    blob, digest = tmp_path / "blob", hashlib.sha256()
    packer = zstandard.ZstdCompressor(level=3).compressobj() if compression == "zstd" else zlib.compressobj(9, 8, 31)
    with blob.open("wb") as out:
        for piece in [entry("zeros", b"", size=size), *[bytes(1 << 20)] * (size >> 20), bytes(1024)]:
            digest.update(piece)
            out.write(packer.compress(piece))
        out.write(packer.flush())
    assert blob.stat().st_size * 900 < size
    stored = layout.sha256(blob.read_bytes())

    def name_it(manifest: dict[str, object]) -> None:
        kind = layout.LAYER_TYPES[compression]
        manifest["layers"] = [{"mediaType": kind, "digest": stored, "size": blob.stat().st_size}]

    made = layout.make_image(
        [b"small"],
        compression=compression,
        config={"rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest.hexdigest()}"]}},
        change_manifest=name_it,
    )
    layout.put_image(tmp_path / "image", made)
    shutil.copy(blob, layout.blob_path(tmp_path / "image", stored))
    script = (
        "import resource, subprocess, sys\n"
        "done = subprocess.run(sys.argv[1:])\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
        "sys.exit(done.returncode)\n"
    )
    done = run(
        [sys.executable, "-c", script, *command("index", "--cache-dir", tmp_path / "cache", f"oci:{tmp_path}/image")],
        limit=240,
    )
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.splitlines()[-1]) * 1024
    assert peak < 1200 << 20
    with mounted(f"oci:{tmp_path}/image", tmp_path / "mnt", "--cache-memory", "16M", cache=tmp_path / "cache") as mount:
        assert (
            agent("pieces", mount.at("zeros"), [0, size // 2, size - PIECE], PIECE)
            == [hashlib.sha256(bytes(PIECE)).hexdigest()] * 3
        )
        assert mount.process.memory() < 300 << 20
