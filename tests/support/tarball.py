r"""Builds tar bytes with total control over every header field, for tests that need archives no sane tool writes.

Everything is a pure function from values to bytes, and an archive is concatenation::

    layer = tarball(
        entry("etc/", type=DIR, mode=0o755),
        entry("etc/passwd", data=b"root:x:0:0\n", uid=1000, mtime=1.5),
        entry("etc/.wh.shadow"),
        entry("bin/sh", type=SYMLINK, link="dash"),
        entry("x", data=b"v", xattrs={"user.note": b"a\nb=\0"}),
    )

`entry` writes what it is told: a value that the plain header cannot hold goes into a PAX record only where that is
asked for or there is no other way (see there). `header` is one 512-byte block, with ``raw`` to overwrite any field
after the fact; the checksum is computed last unless it is given.

Not here: reading tars, compressing them, writing images (`tests.support.layout`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Sequence

BLOCK: Final = 512

FILE: Final = b"0"
OLD_FILE: Final = b"\0"
HARDLINK: Final = b"1"
SYMLINK: Final = b"2"
CHAR: Final = b"3"
BLOCKDEV: Final = b"4"
DIR: Final = b"5"
FIFO: Final = b"6"
CONTIGUOUS: Final = b"7"
GNU_LONG_LINK: Final = b"K"
GNU_LONG_NAME: Final = b"L"
GNU_SPARSE: Final = b"S"
PAX: Final = b"x"
PAX_GLOBAL: Final = b"g"

MAGIC: Final[dict[str, bytes]] = {
    "v7": b"\0\0\0\0\0\0\0\0",
    "ustar": b"ustar\x0000",
    "gnu": b"ustar  \0",
    "star": b"ustar\x0000",  # star writes ustar's magic and version, and "tar\0" in the last four bytes of the block
}

FIELDS: Final[dict[str, tuple[int, int]]] = {  # name -> (offset, size) within the header block
    "name": (0, 100),
    "mode": (100, 8),
    "uid": (108, 8),
    "gid": (116, 8),
    "size": (124, 12),
    "mtime": (136, 12),
    "checksum": (148, 8),
    "type": (156, 1),
    "link": (157, 100),
    "magic": (257, 8),
    "uname": (265, 32),
    "gname": (297, 32),
    "devmajor": (329, 8),
    "devminor": (337, 8),
    "prefix": (345, 155),
    "star_prefix": (345, 131),
    "star_atime": (476, 12),
    "star_ctime": (488, 12),
    "star_trailer": (508, 4),
    "gnu_sparse": (386, 96),
    "gnu_extended": (482, 1),
    "gnu_realsize": (483, 12),
}

Text: TypeAlias = "str | bytes"
Number: TypeAlias = "int | bytes"
"""An integer is written as octal, or base-256 where octal does not fit; bytes are written as they are."""

Records: TypeAlias = "Mapping[str, Text] | Sequence[tuple[Text, Text]]"
"""PAX records in order; pairs where a key comes twice."""


def encode(text: Text) -> bytes:
    """Text as a path's bytes: ``str`` as UTF-8 with surrogateescape, ``bytes`` as they are."""
    return text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")


def octal(value: int, size: int) -> bytes:
    """``value`` as zero-padded octal with a final NUL in ``size`` bytes; base-256 if it is negative or too large."""
    digits = b"%0*o" % (size - 1, value) if value >= 0 else b""
    return digits + b"\0" if 0 < len(digits) < size else base256(value, size)


def base256(value: int, size: int) -> bytes:
    """``value`` in GNU's binary form: big-endian two's complement with the top bit set."""
    encoded = (value & ((1 << 8 * size) - 1)).to_bytes(size, "big")
    return bytes([encoded[0] | 0x80]) + encoded[1:]


def header(
    path: Text = b"",
    *,
    type: bytes = FILE,
    mode: Number = 0o644,
    uid: Number = 0,
    gid: Number = 0,
    size: Number = 0,
    mtime: Number = 0,
    link: Text = b"",
    magic: str | bytes = "ustar",
    uname: Text = b"",
    gname: Text = b"",
    rdev: tuple[Number, Number] = (0, 0),
    prefix: Text = b"",
    checksum: Literal["unsigned", "signed", "bad"] | bytes = "unsigned",
    raw: Mapping[str, bytes] | None = None,
) -> bytes:
    """One header block.

    ``magic`` is a key of `MAGIC` or eight raw bytes. Names longer than their field are cut. ``raw`` (a key of `FIELDS`
    -> bytes) overwrites fields at the end, before the checksum is taken. ``checksum`` may be eight raw bytes.
    """
    block = bytearray(BLOCK)

    def put(field: str, value: bytes) -> None:
        offset, length = FIELDS[field]
        block[offset : offset + length] = value[:length].ljust(length, b"\0")

    def put_number(field: str, value: Number) -> None:
        put(field, value if isinstance(value, bytes) else octal(value, FIELDS[field][1]))

    put("name", encode(path))
    for field, value in (("mode", mode), ("uid", uid), ("gid", gid), ("size", size), ("mtime", mtime)):
        put_number(field, value)
    put("type", type)
    put("link", encode(link))
    put("magic", MAGIC[magic] if isinstance(magic, str) else magic)
    if magic != "v7":
        put("uname", encode(uname))
        put("gname", encode(gname))
        put_number("devmajor", rdev[0])
        put_number("devminor", rdev[1])
        put("prefix", encode(prefix))
    if magic == "star":
        put("star_trailer", b"tar\0")
    for field, value in (raw or {}).items():
        put(field, value)
    if isinstance(checksum, bytes):
        put("checksum", checksum)
    else:
        put("checksum", b" " * 8)
        total = sum(block)
        if checksum == "signed":
            total = sum(byte - 256 if byte > 127 else byte for byte in block)
        elif checksum == "bad":
            total += 1
        put("checksum", b"%06o\0 " % total)
    return bytes(block)


def padded(data: bytes) -> bytes:
    """Fill ``data`` up with NULs to a multiple of 512 bytes."""
    return data + bytes(-len(data) % BLOCK)


def pax_record(key: Text, value: Text) -> bytes:
    r"""One record of a PAX header: ``LENGTH KEY=VALUE\n``, where LENGTH counts itself."""
    body = b" " + encode(key) + b"=" + encode(value) + b"\n"
    length = len(body)
    while length != len(body) + len(str(length)):
        length = len(body) + len(str(length))
    return str(length).encode() + body


def _pairs(records: Records) -> list[tuple[Text, Text]]:
    return list(records.items() if isinstance(records, Mapping) else records)


def pax_header(
    records: Records | bytes,
    *,
    type: bytes = PAX,
    path: Text = b"PaxHeaders/x",
    magic: str | bytes = "ustar",
) -> bytes:
    """Write a PAX header with its records (``bytes``: the records' raw bytes), as `x` or, with ``type``, `g`."""
    body = records if isinstance(records, bytes) else b"".join(pax_record(*pair) for pair in _pairs(records))
    return header(path, type=type, size=len(body), magic=magic) + padded(body)


def gnu_long(name: Text, *, type: bytes = GNU_LONG_NAME, terminated: bool = True) -> bytes:
    """Write a GNU long name (`L`) or, with ``type``, long link (`K`) header for the entry that follows."""
    body = encode(name) + (b"\0" if terminated else b"")
    return header(b"././@LongLink", type=type, size=len(body), magic="gnu") + padded(body)


def entry(
    path: Text,
    data: bytes = b"",
    *,
    type: bytes | None = None,
    mode: Number | None = None,
    uid: Number = 0,
    gid: Number = 0,
    size: Number | None = None,
    mtime: float | bytes | str = 0,
    link: Text = b"",
    magic: str | bytes = "ustar",
    uname: Text = b"",
    gname: Text = b"",
    rdev: tuple[Number, Number] = (0, 0),
    prefix: Text = b"",
    pax: Records = (),
    xattrs: Mapping[str, bytes] | None = None,
    checksum: Literal["unsigned", "signed", "bad"] | bytes = "unsigned",
    raw: Mapping[str, bytes] | None = None,
) -> bytes:
    """Write a whole entry: a PAX header where one is needed, the header, the data and its padding.

    Without ``type`` a path that ends in ``/`` is a directory, a path with ``link`` a symlink, all else a file; without
    ``mode`` a directory gets 0755, a symlink 0777, all else 0644. ``size`` overrides what the size field says; the data
    is written whatever it says. A path or link over 100 bytes goes to a PAX record unless ``magic`` is ``"gnu"`` or
    ``"v7"``: then to L and K headers. A ``mtime`` with a fraction, or given as ``str``, goes to a PAX record too.
    """
    path, link = encode(path), encode(link)
    if type is None:
        type = DIR if path.endswith(b"/") else SYMLINK if link else FILE
    if mode is None:
        mode = {DIR: 0o755, SYMLINK: 0o777}.get(type, 0o644)
    records: list[tuple[Text, Text]] = []
    extensions = b""
    gnu = magic in {"gnu", "v7"}
    for key, long_type, value in (("linkpath", GNU_LONG_LINK, link), ("path", GNU_LONG_NAME, path)):
        if len(value) > FIELDS["name"][1]:
            if gnu:
                extensions += gnu_long(value, type=long_type)
            else:
                records.append((key, value))
    seconds: Number
    if isinstance(mtime, str) or (isinstance(mtime, float) and not mtime.is_integer()):
        records.append(("mtime", mtime if isinstance(mtime, str) else repr(mtime)))
        seconds = 0
    else:
        seconds = mtime if isinstance(mtime, bytes) else int(mtime)
    records += [("SCHILY.xattr." + name, value) for name, value in (xattrs or {}).items()]
    records += _pairs(pax)
    if records:
        extensions = pax_header(records, magic="ustar") + extensions
    block = header(
        path,
        type=type,
        mode=mode,
        uid=uid,
        gid=gid,
        size=len(data) if size is None else size,
        mtime=seconds,
        link=link,
        magic=magic,
        uname=uname,
        gname=gname,
        rdev=rdev,
        prefix=prefix,
        checksum=checksum,
        raw=raw,
    )
    return extensions + block + padded(data)


def tarball(*entries: bytes, end: int = 2) -> bytes:
    """Put the entries one behind the other, then ``end`` zero blocks."""
    return b"".join(entries) + bytes(BLOCK * end)


Segments: TypeAlias = "Sequence[tuple[int, bytes]]"
"""Data of a sparse file: (file_offset, bytes), in order."""


def sparse_pax_0_0(path: Text, segments: Segments, size: int) -> bytes:
    """Write a sparse file in PAX format 0.0: pairs of GNU.sparse.offset and GNU.sparse.numbytes records."""
    records: list[tuple[Text, Text]] = [
        ("GNU.sparse.size", str(size)),
        ("GNU.sparse.numblocks", str(len(segments))),
    ]
    for offset, data in segments:
        records += [("GNU.sparse.offset", str(offset)), ("GNU.sparse.numbytes", str(len(data)))]
    return entry(path, b"".join(data for _, data in segments), pax=records)


def sparse_pax_0_1(path: Text, segments: Segments, size: int) -> bytes:
    """Write a sparse file in PAX format 0.1: the map as one GNU.sparse.map record, the name in GNU.sparse.name."""
    records: list[tuple[Text, Text]] = [
        ("GNU.sparse.size", str(size)),
        ("GNU.sparse.numblocks", str(len(segments))),
        ("GNU.sparse.name", path),
        ("GNU.sparse.map", ",".join(f"{offset},{len(data)}" for offset, data in segments)),
    ]
    return entry(b"GNUSparseFile.0/x", b"".join(data for _, data in segments), pax=records)


def sparse_pax_1_0(path: Text, segments: Segments, size: int, *, raw_map: bytes | None = None) -> bytes:
    """Write a sparse file in PAX format 1.0: the map as decimal lines in front of the data, padded to a block."""
    numbers = [len(segments)]
    for offset, data in segments:
        numbers += [offset, len(data)]
    lines = "".join(f"{number}\n" for number in numbers).encode() if raw_map is None else raw_map
    records: list[tuple[Text, Text]] = [
        ("GNU.sparse.major", "1"),
        ("GNU.sparse.minor", "0"),
        ("GNU.sparse.name", path),
        ("GNU.sparse.realsize", str(size)),
    ]
    return entry(b"GNUSparseFile.0/x", padded(lines) + b"".join(data for _, data in segments), pax=records)


def sparse_gnu(
    path: Text, segments: Segments, size: int, *, segment_map: Sequence[tuple[int, int]] | None = None
) -> bytes:
    """Write a sparse file in GNU's old format: type `S`, four segments in the header, 21 in each extension block.

    ``segment_map`` overrides the (offset, length) pairs that are written, to lie about the data.
    """
    pairs = [(offset, len(data)) for offset, data in segments] if segment_map is None else list(segment_map)
    data = b"".join(data for _, data in segments)

    def packed(some: Sequence[tuple[int, int]]) -> bytes:
        return b"".join(octal(offset, 12) + octal(length, 12) for offset, length in some)

    raw = {
        "gnu_sparse": packed(pairs[:4]),
        "gnu_extended": b"\1" if len(pairs) > 4 else b"\0",
        "gnu_realsize": octal(size, 12),
    }
    blocks = header(path, type=GNU_SPARSE, size=len(data), magic="gnu", raw=raw)
    rest = pairs[4:]
    while rest:
        block, rest = rest[:21], rest[21:]
        blocks += packed(block).ljust(504, b"\0") + (b"\1" if rest else b"\0") + bytes(7)
    return blocks + padded(data)
