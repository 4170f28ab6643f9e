"""The files that EROFS is mounted from hold the bytes of the tree, of the layers' tars, and of what lies in no piece."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from ocifs.devices import DeviceFile, LayerFile, SyntheticFile, TreeFile, device_files
from ocifs.erofs import Image as ErofsImage
from ocifs.errors import DamagedError
from ocifs.image import ImageOptions, open_image
from ocifs.image_tree import ImageTree
from ocifs.rootfs import RootFS
from ocifs.spans import SpanReader
from ocifs.store import Store
from ocifs.tree import Extent, Kind
from tests.support.layout import write_layout
from tests.support.spanned import joined, layer
from tests.support.tarball import entry, sparse_pax_1_0, tarball
from tests.support.trees import content, directory, file, layer_bytes, node
from tests.support.viewed import viewed

LAYERS = [layer_bytes(1), layer_bytes(2, 10_000)]
SPARSE = {
    b"one": node(Kind.FILE, size=50_000, extents=(Extent(0, 1, 777, 5000), Extent(40_000, 2, 2566, 20))),
    b"two": node(Kind.FILE, size=700, extents=(Extent(100, 2, 1, 500),)),
}
TREE = directory({b"whole": file(20_000, 512), **SPARSE})


def read(device: DeviceFile, offset: int, size: int) -> bytes:
    async def reading() -> bytes:
        return bytes(await device.read(offset, size))

    return trio.run(reading)


def whole(device: DeviceFile, step: int) -> bytes:
    return b"".join(read(device, at, min(step, device.size - at)) for at in range(0, device.size, step))


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4096)


def devices_of(rootfs: RootFS, numbers: Sequence[int]) -> Sequence[DeviceFile]:
    image: Any = SimpleNamespace(tree=rootfs.tree, layers=[SimpleNamespace(number=number) for number in numbers])
    return device_files(image, rootfs.spans)


@pytest.mark.parametrize("step", [4096, 131_072, 1 << 20, 12_288])
def test_a_layers_file_is_its_tar_padded_to_whole_pages(step: int) -> None:
    for size in (1, 4095, 4096, 4097, 10_000, 300_000):
        index, data = layer(*[3000] * (size // 3000), *[size % 3000] * bool(size % 3000))
        device = LayerFile(SpanReader([data]), 1)
        assert device.size == -(-size // 4096) * 4096
        assert whole(device, step) == padded(index.data)


def test_an_empty_layer_is_an_empty_file() -> None:
    _, data = layer()
    device = LayerFile(SpanReader([data]), 1)
    assert (device.size, read(device, 0, 0)) == (0, b"")


def test_the_padding_reads_as_zeros() -> None:
    index, data = layer(4000, 1000)
    device = LayerFile(SpanReader([data]), 1)
    assert read(device, 4096, 4096) == index.data[4096:] + bytes(8192 - 5000)
    assert read(device, 5000, 3192) == bytes(3192)
    assert read(device, 8000, 100) == bytes(100)


def test_one_span_is_given_without_a_copy() -> None:
    index, data = layer(8192, 8192)
    device = LayerFile(SpanReader([data]), 1)

    async def reading() -> None:
        part = await device.read(4096, 4096)
        assert isinstance(part, memoryview)
        assert part == index.data[4096:8192]

    trio.run(reading)


def test_an_error_of_a_span_is_the_devices() -> None:
    index, data = layer(4096, 4096)
    index.failures[1] = [DamagedError("span 1 is bad")]
    device = LayerFile(SpanReader([data]), 1)
    with pytest.raises(DamagedError, match="span 1 is bad"):
        read(device, 0, 8192)
    assert read(device, 0, 8192) == index.data


@given(
    st.lists(st.integers(1, 5000), min_size=1, max_size=5),
    st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 2**40)), max_size=4),
)
def test_any_read_of_a_layers_file_is_that_slice_of_it(sizes: list[int], reads: list[tuple[int, int]]) -> None:
    index, data = layer(*sizes)
    device = LayerFile(SpanReader([data]), 1)
    expected = padded(index.data)
    for offset, size in reads:
        start = offset % device.size
        length = size % (device.size - start + 1)
        assert read(device, start, length) == expected[start : start + length]


def test_the_trees_file_is_its_erofs_image(tmp_path: Path) -> None:
    with viewed(TREE, LAYERS, tmp_path / "tree") as (rootfs, _):
        device = TreeFile(rootfs.tree)
        image = (tmp_path / "tree").read_bytes()[: rootfs.tree.image_size]
        assert 0 < len(image) < (tmp_path / "tree").stat().st_size
        for step in (4096, 131_072):
            assert whole(device, step) == padded(image)
        assert read(device, device.size - 4096, 4096) == padded(image)[-4096:]


def test_a_damaged_block_of_the_tree_is_not_served(tmp_path: Path) -> None:
    names = {b"%0200d" % number: file(0) for number in range(1000)}
    with viewed(directory({**names, b"sub": directory(dict(names))}), LAYERS, tmp_path / "tree") as (rootfs, _):
        end = rootfs.tree.image_size
        # Opening looks at the first 64 KiB; the damage is behind them.
        assert end > 128 << 10
    with (tmp_path / "tree").open("r+b") as out:
        out.seek(end - 100)
        out.write(b"\xff\xff")
    with ImageTree.open(tmp_path / "tree") as tree:
        device = TreeFile(tree)
        assert len(read(device, 0, 4096)) == 4096
        with pytest.raises(DamagedError, match="does not have its SHA-256"):
            read(device, device.size - 4096, 4096)


def test_through_the_devices_files_read_as_through_the_view(tmp_path: Path) -> None:
    """As the kernel does it: names and runs from the tree's file, data from the devices by number."""
    with viewed(TREE, LAYERS, tmp_path / "tree") as (rootfs, _):
        files = devices_of(rootfs, [1, 2])
        assert [type(device).__name__ for device in files] == ["TreeFile", "LayerFile", "LayerFile", "SyntheticFile"]
        assert all(device.size % 4096 == 0 for device in files)
        image = ErofsImage(whole(files[0], 4096))
        for name, made in (TREE.children or {}).items():
            nid = image.lookup(1, name)
            assert nid is not None
            pieces = [
                read(files[run.device], run.device_offset, run.length) if run.device else bytes(run.length)
                for run in image.extents(nid, 0, made.size)
            ]
            assert b"".join(pieces) == content(made, LAYERS), name
        blocks = [-(-len(data) // 512) * 512 for data in LAYERS]
        assert list(image.device_sizes[1:3]) == blocks
        assert files[3].size >= image.device_sizes[3]


@pytest.mark.parametrize("step", [4096, 8192, 131_072])
def test_the_synthetic_file_holds_what_lies_in_no_piece(tmp_path: Path, step: int) -> None:
    with viewed(TREE, LAYERS, tmp_path / "tree") as (rootfs, _):
        device = SyntheticFile(rootfs.tree, rootfs.spans)
        data = whole(device, step)
        assert len(data) == device.size == -(-rootfs.tree.metadata.synthetic_size // 4096) * 4096
        for piece in (LAYERS[0][777:5777], LAYERS[1][2566:2586], LAYERS[1][1:501]):
            assert piece in data
        for start in (0, 4090, 5001):
            assert read(device, start, 1000) == data[start : start + 1000]
        rest = bytearray(data)
        for piece in (LAYERS[0][777:5777], LAYERS[1][2566:2586], LAYERS[1][1:501]):
            at = data.index(piece)
            rest[at : at + len(piece)] = bytes(len(piece))
        assert not any(rest), "there are zeros between"


def test_without_sparse_files_there_is_no_synthetic_file(tmp_path: Path) -> None:
    with viewed(directory({b"whole": file(20_000, 512)}), LAYERS, tmp_path / "tree") as (rootfs, _):
        assert len(devices_of(rootfs, [1, 2])) == 3


@pytest.mark.parametrize("compression", ["plain", "gzip", "zstd"])
def test_of_a_real_image(tmp_path: Path, compression: str) -> None:
    tars = [
        tarball(entry("a", data=b"one\n" * 5000)),
        tarball(sparse_pax_1_0("s", [(100, b"data"), (70_000, b"more" * 500)], 100_000), entry("b", data=b"two\n")),
    ]
    write_layout(tmp_path / "image", tars, compression=compression)
    with Store(tmp_path / "cache") as store, open_image(f"oci:{tmp_path}/image", store, ImageOptions()) as image:
        spans = SpanReader([one.data for one in image.layers])
        tree, first, second, synthetic = device_files(image, spans)
        assert [whole(device, 8192) for device in (first, second)] == [padded(tar) for tar in tars]
        assert joined([memoryview(whole(tree, 4096))])[1024:1028] == b"\xe2\xe1\xf5\xe0"  # EROFS_SUPER_MAGIC_V1
        assert b"more" * 500 in whole(synthetic, 4096)
