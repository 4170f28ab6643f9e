"""The file in which a merged image is kept: an EROFS image, and behind it what EROFS has no place for.

This docstring is the specification of format version 1. Integers are little-endian, offsets count from the start of the
file, u16/u32/u64 are unsigned and i32 is signed.

===============  ======================================================================================================
part             content
===============  ======================================================================================================
image            an EROFS image as `ocifs.erofs` describes it, from offset 0. Its superblock tells its size.
origins          one record of 12 bytes for each inode, by rising nid: u32 nid, u16 layer, u16 0, i32 entry. ``layer`` (from
                 1) and ``entry`` (from 0) are the tar entry that made the inode; −1: no entry names it.
synthetic        what the synthetic device (number: layers + 1) is made of: records of 32 bytes by rising offset, disjoint:
                 u64 synthetic_offset, u64 layer_offset, u64 size, u32 layer, u32 0. ``size`` bytes at
                 ``synthetic_offset`` are those at ``layer_offset`` of the layer's uncompressed tar; between them are zeros.
unreadable       the nids of files that must answer EIO when opened, as rising u32.
warnings         JSON: an array of [rule, layer, path, message]; layer 0 means the image; path is base64.
metadata         JSON: an object with the fields of `Metadata`.
hashes           for each 64 KiB of all of the above (the last may be shorter) its SHA-256, 32 bytes.
footer           `_FOOTER`, 160 bytes, see below.
===============  ======================================================================================================

Parts follow one another in this order, each but the hashes starting at a multiple of 8 with zeros before it where needed
(the hashes start where the metadata ends). The footer is: u64 size of the file, u64 size of the image, then offset and
size (u64 each) of origins, synthetic, unreadable, warnings, metadata and hashes, 32 bytes SHA-256 of the hashes followed by
the footer without this field, then what keeps its place in every version: u32 format version, u32 size of the footer, and
the magic ``ocifTREE``.

What is checked when. Opening reads the footer and checks the file's size against it and the checksum over footer and
hashes (0.05 % of the file). Every block of 64 KiB is compared with its hash when something in it is first used, once for
each `ImageTree`; afterwards a look at one byte tells that it is good. So a flipped bit anywhere in the file comes out as
`DamagedError`, with file and block in its message, and never as a wrong answer; reading on is possible elsewhere. The file
must not be changed or truncated while it is open (a truncated mapping is SIGBUS): who keeps it replaces it as a whole.

Not here: where such files are kept and what their names are (`ocifs.store`), when they are made (`ocifs.image`), what
serves them (`ocifs.rootfs`), the bytes of the EROFS image (`ocifs.erofs`).
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, BinaryIO, Final, NamedTuple, NoReturn, Self

import msgspec

from ocifs.erofs import Image
from ocifs.errors import CacheDamagedError, MachineError, StaleFormatError, UnsupportedError
from ocifs.tree import Origin, Tree, Warned

if TYPE_CHECKING:
    from ocifs.erofs.writer import Encoder

FORMAT_VERSION: Final = 1
"""Raised whenever the meaning of any byte changes, those of the EROFS image included."""

_MAGIC: Final = b"ocifTREE"
_CHECK_BITS: Final = 16
_CHECK_SIZE: Final = 1 << _CHECK_BITS
"""Bytes that one hash covers: 64 KiB."""
_SHA256_SIZE: Final = 32
_ORIGIN: Final = struct.Struct("<IHHi")
_SYNTHETIC: Final = struct.Struct("<QQQII")
_NID: Final = struct.Struct("<I")
_OFFSET: Final = struct.Struct("<Q")
_FOOTER: Final = struct.Struct("<14Q32sII8s")
_TAIL: Final = struct.Struct("<II8s")
"""The end of the footer in every version: format version, size of the footer, magic."""
_SUM_AT: Final = 14 * 8
"""Where in the footer its checksum is."""
_MAX_NID: Final = (1 << 32) - 1
_BATCH: Final = 4096


class LayerRecord(msgspec.Struct, frozen=True):
    """A layer as the tree knows it: ``tag`` names it (the hex of its digest), ``size`` is its uncompressed size in bytes."""

    tag: str
    size: int


class Metadata(msgspec.Struct, frozen=True):
    """What is true of the tree as a whole.

    ``rules_version`` is that of the layer rules and ``key`` the store's key that the tree was made for. ``data_size`` is
    the bytes of content that its files have, each inode once and holes not counted; ``synthetic_size`` is 0 if there is no
    synthetic device. If not ``any_xattr``, no inode has an extended attribute.
    """

    format_version: int
    rules_version: int
    key: str
    layers: tuple[LayerRecord, ...]
    inode_count: int
    data_size: int
    longest_name: int
    any_xattr: bool
    synthetic_size: int


class Summary(NamedTuple):
    """What `write` wrote: the file's size, the image's, and the tree's metadata."""

    file_size: int
    image_size: int
    metadata: Metadata


class Piece(NamedTuple):
    """``size`` bytes of a file: at ``layer_offset`` of the uncompressed tar of ``layer``, or zeros if ``layer`` is 0."""

    layer: int
    layer_offset: int
    size: int


# ---- writing


def write(tree: Tree, out: BinaryIO, *, layers: Sequence[tuple[str, int]], rules_version: int, key: str) -> Summary:
    """Write the file of a merged tree to ``out``, front to back, without seeking.

    ``layers`` are (tag, uncompressed size in bytes) in order. Extended attributes that an EROFS image cannot hold are left
    out with a warning (rule D10). The same arguments make the same bytes. Raises what `Encoder` raises, before anything is
    written, and `OSError` from ``out``.
    """
    seed = msgspec.json.encode([key, rules_version, FORMAT_VERSION, [tag for tag, _ in layers]])
    uuid = bytearray(hashlib.sha256(b"ocifs image tree" + seed).digest()[:16])
    uuid[6] = uuid[6] & 0x0F | 0x80  # RFC 9562: version 8, made as its maker likes
    uuid[8] = uuid[8] & 0x3F | 0x80
    from ocifs.erofs.writer import Encoder  # noqa: PLC0415 (see `ocifs.erofs`)

    encoder = Encoder(tree.root, layers=layers, uuid=bytes(uuid))
    last_nid = next(reversed(encoder.placed.values()))
    if last_nid > _MAX_NID:
        raise UnsupportedError(f"the image tree would have {encoder.size} bytes; it can have 128 GiB")
    metadata = Metadata(
        format_version=FORMAT_VERSION,
        rules_version=rules_version,
        key=key,
        layers=tuple(LayerRecord(tag, size) for tag, size in layers),
        inode_count=encoder.inode_count,
        data_size=encoder.data_size,
        longest_name=encoder.longest_name,
        any_xattr=encoder.any_xattr,
        synthetic_size=encoder.synthetic_size,
    )
    warnings = [*tree.warnings, *(Warned("D10", left.layer, left.path, left.message) for left in encoder.left_out)]
    summed = _SummedWriter(out)
    encoder.write(summed)  # type: ignore[arg-type]  # it has the one method that is used
    places: list[int] = []
    for pieces in (
        _origins(encoder),
        (_SYNTHETIC.pack(s.synthetic_offset, s.layer_offset, s.size, s.layer, 0) for s in encoder.synthetic),
        (_NID.pack(nid) for node, nid in encoder.placed.items() if node.unreadable),
        [msgspec.json.encode([(w.rule, w.layer, w.path, _printable(w.message)) for w in warnings])],
        [msgspec.json.encode(metadata)],
    ):
        summed.write(bytes(-summed.position % 8))
        start = summed.position
        for piece in pieces:
            summed.write(piece)
        places += (start, summed.position - start)
    hashes = summed.finish()
    places += (summed.position, len(hashes))
    file_size = summed.position + len(hashes) + _FOOTER.size
    fields = struct.pack("<14Q", file_size, encoder.size, *places)
    tail = _TAIL.pack(FORMAT_VERSION, _FOOTER.size, _MAGIC)
    out.write(hashes + fields + hashlib.sha256(hashes + fields + tail).digest() + tail)
    return Summary(file_size, encoder.size, metadata)


def _origins(encoder: Encoder) -> Iterator[bytes]:
    items = iter(encoder.placed.items())
    while batch := list(islice(items, _BATCH)):
        fields: list[int] = []
        for node, nid in batch:
            origin = node.origin
            fields += (nid, origin.layer, 0, origin.entry)
        yield struct.pack("<" + "IHHi" * len(batch), *fields)


def _printable(text: str) -> str:
    """The text without lone surrogates, which JSON cannot hold."""
    return text.encode("utf-8", "backslashreplace").decode()


class _SummedWriter:
    """Passes bytes on, keeping the SHA-256 of each 64 KiB of them."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._digests: list[bytes] = []
        self._current = hashlib.sha256()
        self.position = 0

    def write(self, data: bytes | bytearray) -> int:
        view = memoryview(data)
        while view:
            room = _CHECK_SIZE - self.position % _CHECK_SIZE
            piece = view[:room]
            self._current.update(piece)
            self.position += len(piece)
            if len(piece) == room:
                self._digests.append(self._current.digest())
                self._current = hashlib.sha256()
            view = view[room:]
        self._out.write(data)
        return len(data)

    def finish(self) -> bytes:
        """All hashes, that of an unfinished block included."""
        if self.position % _CHECK_SIZE:
            self._digests.append(self._current.digest())
        return b"".join(self._digests)


# ---- reading


class ImageTree:
    """An image tree's file, mapped read-only. Use `open`.

    ``image`` reads the EROFS image within; what it returns is verified. All methods are safe to call from several threads.
    """

    def __init__(self, mapped: mmap.mmap, name: str) -> None:
        """See `open`; ``name`` is for messages."""
        self.on_damage: Callable[[], None] | None = None
        """Called when damage is found after the file was opened, before the error is raised."""
        self._map = mapped
        self._name = name
        if len(mapped) < _FOOTER.size:
            self._damaged(f"its {len(mapped)} bytes have no room for a footer")
        version, footer_size, magic = _TAIL.unpack_from(mapped, len(mapped) - _TAIL.size)
        if magic != _MAGIC:
            self._damaged("it does not end with a footer")
        if version != FORMAT_VERSION:
            raise StaleFormatError(
                f"the image tree {name} has format version {version}, this is {FORMAT_VERSION}: it must be made anew"
            )
        footer_at = len(mapped) - _FOOTER.size
        (file_size, image_size, *places, checksum, _, _, _) = _FOOTER.unpack_from(mapped, footer_at)
        hashes_at, hashes_size = places[-2:]
        if file_size != len(mapped) or footer_size != _FOOTER.size or hashes_at + hashes_size != footer_at:
            self._damaged(f"it has {len(mapped)} bytes, its footer speaks of {file_size}")
        footer = mapped[footer_at:]
        self._hashes = mapped[hashes_at:footer_at]
        if hashlib.sha256(self._hashes + footer[:_SUM_AT] + footer[_SUM_AT + _SHA256_SIZE :]).digest() != checksum:
            self._damaged("the checksum of its footer and hashes is wrong")
        # What follows is as it was written, unless the writer or this reader has a mistake: checked all the same.
        self._sections = tuple(zip(places[:-2:2], places[1:-2:2], strict=True))
        self._end = hashes_at
        self._blocks = -(-hashes_at // _CHECK_SIZE)
        if (
            hashes_size != self._blocks * _SHA256_SIZE
            or image_size > hashes_at
            or any(start + size > hashes_at for start, size in self._sections)
        ):
            self._damaged("its footer contradicts itself")
        self.image_size: int = image_size
        """Bytes of the EROFS image, from the start of the file."""
        self.file_size: int = file_size
        self._unverified = bytearray(b"\1") * self._blocks
        self._unchecked = bytearray(b"\1") * self._blocks
        self._origins, self._synthetic, self._unreadable, self._warnings, metadata = self._sections
        try:
            self.metadata: Metadata = msgspec.json.decode(self._section(metadata), type=Metadata)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            self._damaged(f"its metadata are not what they should be: {error}")
        self.image: Image = Image(mapped, name=f"the image tree {name}", unchecked=self._unchecked, check=self._check)
        """The EROFS image. Its runs name devices; `extents` here names layers."""
        self._synthetic_device = len(self.metadata.layers) + 1
        if self.image.size != image_size or self._origins[1] != self.image.inode_count * _ORIGIN.size:
            self._damaged("its footer and its image contradict one another")

    @classmethod
    def open(cls, file: int | str | bytes | os.PathLike[str], *, name: str = "") -> Self:
        """Map the image tree in ``file``: a path, or a descriptor open for reading, which is not kept.

        Raises `StaleFormatError` if another version of ocifs wrote it (make it anew), `DamagedError` if it is not whole,
        `MachineError` if it cannot be opened.
        """
        shown = name or (f"descriptor {file}" if isinstance(file, int) else os.fsdecode(file))
        try:
            descriptor = file if isinstance(file, int) else os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if not os.fstat(descriptor).st_size:
                    raise CacheDamagedError(f"the image tree {shown} is damaged: it is empty")
                mapped = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
            finally:
                if not isinstance(file, int):
                    os.close(descriptor)
        except OSError as error:
            raise MachineError(f"cannot open the image tree {shown}: {error.strerror}") from error
        try:
            return cls(mapped, shown)
        except BaseException:
            mapped.close()
            raise

    def close(self) -> None:
        """End the mapping. Nothing else may be called afterwards."""
        self._map.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _damaged(self, what: str) -> NoReturn:
        if self.on_damage is not None:
            self.on_damage()
        raise CacheDamagedError(
            f"the image tree {self._name} is damaged: {what}; run 'ocifs cache clear' to have it built again"
        )

    # ---- verification

    def _verify(self, block: int) -> None:
        """Compare one block with its hash, unless that was done. Two threads may both do it; that does no harm."""
        if not self._unverified[block]:
            return
        start = block << _CHECK_BITS
        digest = hashlib.sha256(self._map[start : min(start + _CHECK_SIZE, self._end)]).digest()
        if digest != self._hashes[block * _SHA256_SIZE : (block + 1) * _SHA256_SIZE]:
            self._damaged(f"block {block} of 64 KiB, at offset {start}, does not have its SHA-256")
        self._unverified[block] = 0

    def _check(self, block: int) -> None:
        """What `Image` asks for: that a block and the one behind it are good."""
        self._verify(block)
        if block + 1 < self._blocks:
            self._verify(block + 1)
        self._unchecked[block] = 0

    def _verified(self, offset: int, size: int) -> bytes:
        """Bytes of any part, verified."""
        for block in range(offset >> _CHECK_BITS, (offset + size - 1 >> _CHECK_BITS) + 1 if size else 0):
            self._verify(block)
        return self._map[offset : offset + size]

    def _section(self, place: tuple[int, int]) -> bytes:
        return self._verified(*place)

    def verify_all(self) -> None:
        """Compare every block with its hash, those that were compared before too. Raises `DamagedError`."""
        for block in range(self._blocks):
            self._unverified[block] = 1
            self._verify(block)

    def read_range(self, offset: int, size: int) -> bytes:
        """Verified bytes of the EROFS image, as the kernel reads them; short only at its end."""
        return self._verified(offset, max(0, min(size, self.image_size - offset)))

    # ---- what EROFS has no place for

    def origin(self, nid: int) -> Origin | None:
        """The tar entry that made an inode, or None if the tree has no such inode."""
        start, size = self._origins
        index = self._search(start, _ORIGIN.size, size // _ORIGIN.size, _NID, nid)
        if index < 0:
            return None
        found, layer, _, entry = _ORIGIN.unpack(self._verified(start + index * _ORIGIN.size, _ORIGIN.size))
        return Origin(layer, entry) if found == nid else None

    def unreadable(self, nid: int) -> bool:
        """Whether opening this file must answer EIO (rule H6)."""
        start, size = self._unreadable
        if not size:
            return False
        index = self._search(start, _NID.size, size // _NID.size, _NID, nid)
        return index >= 0 and _NID.unpack(self._verified(start + index * _NID.size, _NID.size))[0] == nid

    def warnings(self) -> list[Warned]:
        """What was noticed while the tree was merged and written, in that order."""
        try:
            stored = msgspec.json.decode(self._section(self._warnings), type=list[tuple[str, int, bytes, str]])
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            self._damaged(f"its warnings are not what they should be: {error}")
        return [Warned(*warning) for warning in stored]

    def extents(self, nid: int, file_offset: int, size: int) -> Iterator[Piece]:
        """Where ``size`` bytes of a file from ``file_offset`` are, in order and cut at the file's end.

        They are pieces of layers and zeros between them. Raises `DamagedError`, as for a file that is `unreadable`.
        """
        synthetic = self._synthetic_device
        for run in self.image.extents(nid, file_offset, size):
            if run.device == synthetic:
                yield from self.synthetic(run.device_offset, run.length)
            else:
                yield Piece(*run)

    def synthetic(self, offset: int, size: int) -> Iterator[Piece]:
        """What ``size`` bytes of the synthetic device from ``offset`` are made of, in order."""
        start, section_size = self._synthetic
        count = section_size // _SYNTHETIC.size
        index = max(0, self._search(start, _SYNTHETIC.size, count, _OFFSET, offset))
        end = offset + size
        while offset < end:
            first = end
            if index < count:
                record = self._verified(start + index * _SYNTHETIC.size, _SYNTHETIC.size)
                first, layer_offset, length, layer, _ = _SYNTHETIC.unpack(record)
                if first <= offset:
                    step = min(end, first + length) - offset
                    if step > 0:
                        if not 0 < layer < self._synthetic_device:
                            self._damaged(f"the synthetic device takes data from layer {layer}")
                        yield Piece(layer, layer_offset + offset - first, step)
                        offset += step
                    index += 1
                    continue
            step = min(first, end) - offset
            yield Piece(0, 0, step)
            offset += step

    def _search(self, start: int, stride: int, count: int, key: struct.Struct, wanted: int) -> int:
        """The number of the last record whose first field is not above ``wanted``; −1 if all are."""
        low, high = -1, count - 1
        while low < high:
            middle = low + high + 1 >> 1
            if key.unpack(self._verified(start + middle * stride, key.size))[0] > wanted:
                high = middle - 1
            else:
                low = middle
        return low
