"""A thousand flipped bits: none passes as good.

Each flip of a single bit of a blob is found by ``verify``, which says in which span; files that have data in that span are
refused when they are read, all others read as before. What is flipped where no file has data is reported as just that.

Under examination (``--examine``) an image is opened although it is damaged, so there are two cases. If its layers were
indexed while they were whole, the indexes still say what the bytes should be: what was changed is refused as always. If
they were not, what is there is all that is known: it can be read, and every layer that is not what the image says carries
a warning, gives no receipt, and is found by ``verify``.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from ocifs.errors import DamagedError
from ocifs.forensics.examination import Examination, open_examination
from ocifs.forensics.receipt import receipt
from ocifs.forensics.verify import Checked, verify
from ocifs.image import ImageOptions, Silent, open_layers, resolve
from ocifs.spans import SpanReader
from ocifs.store import Store
from ocifs.tree import Kind
from tests.support.layout import blob_path, write_layout
from tests.support.tarball import entry, tarball

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FLIPS = 1000

_noise = random.Random(1)
FILES = {
    1: {b"gzip/a": b"the first file\n" * 40, b"gzip/b": _noise.randbytes(700)},
    2: {b"zstd/a": b"the second file\n" * 40, b"zstd/b": _noise.randbytes(700)},
    3: {b"plain/a": b"a" * 100_000, b"plain/b": b"b" * 100_000},
}
"""Files by layer."""


@pytest.fixture
def written(tmp_path: Path) -> tuple[str, dict[str, Path], dict[str, int]]:
    """An image; its blobs by what they are, and which layer each is (0: none)."""
    tars = [tarball(*(entry(name, data) for name, data in FILES[number].items())) for number in (1, 2, 3)]
    tars[2] += bytes(200_000)  # a span with files, and one without
    digests = write_layout(tmp_path / "x", tars, compression=["gzip", "zstd", "plain"])
    names = {"manifest": digests["manifest"], "config": digests["config"], "gzip": digests["layers"][0],
             "zstd": digests["layers"][1], "plain": digests["layers"][2]}  # fmt: skip
    blobs = {name: blob_path(tmp_path / "x", digest) for name, digest in names.items()}
    return str(tmp_path / "x"), blobs, {"manifest": 0, "config": 0, "gzip": 1, "zstd": 2, "plain": 3}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path / "cache")
    yield opened
    opened.close()


def toggle(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def verified(ref: str, store: Store) -> dict[int, Checked]:
    """What `verify` says, by layer."""
    return {checked.layer: checked for checked in verify(ref, store, ImageOptions(), Silent())}


def refused(examination: Examination) -> set[bytes]:
    """Read every file anew: gives those that are refused. The others have the bytes that they had."""
    examination.spans = SpanReader([layer.data for layer in examination.layers])
    found = set()
    for files in FILES.values():
        for path, data in files.items():
            (version,) = examination.history.of(path)
            try:
                read = b"".join(examination.data(version))
            except DamagedError:
                found.add(path)
                continue
            assert read == data, path
    return found


def test_of_a_thousand_flipped_bits_none_passes_as_good(
    written: tuple[str, dict[str, Path], dict[str, int]], store: Store
) -> None:
    ref, blobs, layers = written
    drawn = random.Random(20240501)
    seen = {"found and refused": 0, "in no file": 0, "document": 0}
    with open_examination(ref, store, ImageOptions()) as examination:
        assert refused(examination) == set()
        assert all(not checked.findings for checked in verified(ref, store).values())
        for _ in range(FLIPS):
            name = drawn.choice(list(blobs))
            bit = drawn.randrange(8 * blobs[name].stat().st_size)
            toggle(blobs[name], bit)
            if layers[name]:
                seen[_check_layer(verified(ref, store), refused(examination), layers[name], bit // 8)] += 1
            else:
                _check_document(ref, store, blobs[name].name)
                seen["document"] += 1
            toggle(blobs[name], bit)
        assert refused(examination) == set()
    assert sum(seen.values()) == FLIPS
    assert min(seen.values()) > 50, seen


def _check_layer(found: dict[int, Checked], refused_files: set[bytes], layer: int, at: int) -> str:
    assert [number for number, checked in found.items() if checked.findings] == [layer]
    digest, *spans = found[layer].findings
    assert digest.what == "digest"
    assert {span.what for span in spans} == {"span"}
    for span in spans:
        assert span.blob_offset is not None
        assert span.blob_size is not None
        assert span.blob_offset <= at < span.blob_offset + span.blob_size
    assert {path for span in spans for path in span.entries} == refused_files
    if refused_files:
        return "found and refused"
    assert [span.entry_count for span in spans] == [0]
    return "in no file"


def _check_document(ref: str, store: Store, hexed: str) -> None:
    with pytest.raises(DamagedError, match=hexed):
        resolve(ref, ImageOptions(), store)
    found = verified(ref, store)[0]
    assert {finding.what for finding in found.findings} == {"document"}
    assert any(hexed in finding.message for finding in found.findings)


def test_what_was_never_seen_whole_is_refused_and_under_examination_never_passes_as_good(
    written: tuple[str, dict[str, Path], dict[str, int]], tmp_path: Path
) -> None:
    ref, blobs, layers = written
    drawn = random.Random(20240502)
    outcomes = set()
    for number in range(9):
        name = ("gzip", "zstd", "plain")[number % 3]
        bit = drawn.randrange(8 * min(2000, blobs[name].stat().st_size))
        toggle(blobs[name], bit)
        store = Store(tmp_path / f"cache-{number}")
        try:
            with pytest.raises(DamagedError):
                open_layers(resolve(ref, ImageOptions(), store), store, ImageOptions())
            outcomes.add(_examined(ref, store, layers[name]))
            assert [number for number, checked in verified(ref, store).items() if checked.findings] == [layers[name]]
        finally:
            store.close()
        toggle(blobs[name], bit)
    assert "opened with a warning" in outcomes


def _examined(ref: str, store: Store, layer: int) -> str:
    """Open what is damaged under examination: it warns, and proves nothing about that layer's files."""
    try:
        with open_examination(ref, store, ImageOptions()) as examination:
            assert [opened.number for opened in examination.layers if opened.warnings] == [layer]
            assert {warned.rule for warned in examination.layer(layer).warnings} == {"C4"}
            for version in examination.history:
                if version.kind == Kind.FILE and version.layer == layer and version.extents:
                    with pytest.raises(DamagedError):
                        receipt(examination, version)
            return "opened with a warning"
    except DamagedError:
        return "refused"


def test_an_image_indexed_while_it_was_whole_is_refused_under_examination_too(
    written: tuple[str, dict[str, Path], dict[str, int]], store: Store
) -> None:
    ref, blobs, _ = written
    with open_examination(ref, store, ImageOptions()) as examination:
        assert refused(examination) == set()
    toggle(blobs["gzip"], 8 * 40)
    with open_examination(ref, store, ImageOptions()) as examination:
        assert refused(examination) == {b"gzip/a", b"gzip/b"}
