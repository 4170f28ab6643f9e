"""Tar headers in the PAX format (POSIX.1-2017, pax, "pax Interchange Format"): values in, bytes out.

A header is a plain ustar block wherever that can say everything; what it cannot say goes into a PAX header before it: a
name longer than 100 bytes or not ASCII, numbers beyond the octal fields, nanoseconds, extended attributes
(``SCHILY.xattr.``, as star, GNU tar and Go have them), holes (GNU's sparse format 1.0). Names that are not UTF-8 are
announced by ``hdrcharset=BINARY``, which is how the standard has it. Nothing depends on the day, the user or the machine:
the same values give the same bytes.

Not here: reading tars (`ocifs.tar`), deciding what is written.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from ocifs.tree import Kind

BLOCK: Final = 512
END: Final = bytes(2 * BLOCK)
"""Two zero blocks: the end of an archive."""

_HEADER: Final = struct.Struct("100s8s8s8s12s12s8sc100s6s2s32s32s8s8s155s12x")
_TYPES: Final = {
    Kind.FILE: b"0",
    Kind.SYMLINK: b"2",
    Kind.CHAR: b"3",
    Kind.BLOCK: b"4",
    Kind.DIR: b"5",
    Kind.FIFO: b"6",
}
_HARD_LINK: Final = b"1"
_NAME_MAX: Final = 100
_NOT_ASCII: Final = re.compile(rb"[^\x00-\x7f]")
_MAX_7: Final = 8**7 - 1
"""The largest number in seven octal digits: owners and device numbers."""
_MAX_11: Final = 8**11 - 1
"""The largest number in eleven octal digits: size (8 GiB − 1) and time (the year 2242)."""
_BILLION: Final = 10**9


class Member(msgspec.Struct, frozen=True):
    """One name in an archive. ``path`` has no leading slash; ``mtime_ns`` counts from the epoch."""

    path: bytes
    kind: Kind
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int = 0
    """Bytes of a FILE as its reader sees it, holes included."""
    target: bytes = b""
    """Of a SYMLINK."""
    rdev: tuple[int, int] = (0, 0)
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    hard_link: bytes | None = None
    """The path of an earlier member that this one is a further name of."""


def padding(size: int) -> bytes:
    """What follows ``size`` bytes of data: zeros up to the next block."""
    return bytes(-size % BLOCK)


def whole_blocks(runs: Iterable[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """The segments to store of a file of ``size`` bytes that has data at ``runs``, (file_offset, size) in order.

    All but the last have a multiple of 512 bytes, zeros of the hole behind included: GNU tar pads each segment to a
    block when it reads, all others take them as lying one behind the other, and so both read the same. A file that ends
    with a hole ends with an empty segment, without which GNU tar makes it too short.
    """
    segments: list[tuple[int, int]] = []
    for start, length in runs:
        first, stop = start, start + length
        if segments and first <= sum(segments[-1]):
            first, before = segments.pop()
            stop = max(stop, first + before)
        segments.append((first, min(stop + (first - stop) % BLOCK, size) - first))
    if not segments or sum(segments[-1]) < size:
        segments.append((size, 0))
    return segments


def header(member: Member, sparse: Sequence[tuple[int, int]] | None = None) -> bytes:
    """Everything that goes before a member's data.

    ``sparse`` are the (file_offset, size) of the data segments of a file with holes, as `whole_blocks` gives them; the data
    that follows is then those segments one behind the other.
    """
    records: list[tuple[bytes, bytes]] = []
    path, link, size, sparse_map = member.path, member.target, 0, b""
    typeflag = _TYPES[member.kind]
    if member.kind is Kind.DIR:
        path += b"/"
    if member.hard_link is not None:
        typeflag, link = _HARD_LINK, member.hard_link
    elif member.kind is Kind.FILE:
        size = member.size
        if sparse is not None:
            sparse_map = _sparse_map(sparse)
            size = len(sparse_map) + sum(length for _, length in sparse)
            records += [
                (b"GNU.sparse.major", b"1"),
                (b"GNU.sparse.minor", b"0"),
                (b"GNU.sparse.name", path),
                (b"GNU.sparse.realsize", b"%d" % member.size),
            ]
            head, slash, last = path.rpartition(b"/")
            path = head + slash + b"GNUSparseFile.0/" + last
    if not _fits(path):
        records.append((b"path", path))
    if not _fits(link):
        records.append((b"linkpath", link))
    for key, value, limit in ((b"uid", member.uid, _MAX_7), (b"gid", member.gid, _MAX_7), (b"size", size, _MAX_11)):
        if value > limit:
            records.append((key, b"%d" % value))
    seconds = max(0, member.mtime_ns // _BILLION)
    if member.mtime_ns % _BILLION or not 0 <= member.mtime_ns // _BILLION <= _MAX_11:
        records.append((b"mtime", _decimal_time(member.mtime_ns)))
    records += [(b"SCHILY.xattr." + name, value) for name, value in member.xattrs]
    owner, mode = (member.uid, member.gid), member.mode & 0o7777
    block = _block(path, typeflag, mode=mode, owner=owner, size=size, seconds=seconds, link=link, rdev=member.rdev)
    return _pax_header(records, path, seconds) + block + sparse_map


def _sparse_map(segments: Sequence[tuple[int, int]]) -> bytes:
    """GNU sparse format 1.0: the number of segments, then offset and size of each, in decimal lines, padded."""
    numbers = [len(segments), *(number for segment in segments for number in segment)]
    text = b"".join(b"%d\n" % number for number in numbers)
    return text + padding(len(text))


def _decimal_time(time_ns: int) -> bytes:
    """Seconds since the epoch as a PAX record has them: ``-1.500000000`` is a second and a half before it."""
    seconds, nanoseconds = divmod(abs(time_ns), _BILLION)
    sign = b"-" if time_ns < 0 else b""
    return sign + (b"%d.%09d" % (seconds, nanoseconds) if nanoseconds else b"%d" % seconds)


def _fits(name: bytes) -> bool:
    return len(name) <= _NAME_MAX and name.isascii()


def _pax_header(records: Iterable[tuple[bytes, bytes]], path: bytes, seconds: int) -> bytes:
    """An extended header with these records; nothing if there are none."""
    body = b"".join(_record(key, value) for key, value in records)
    if not body:
        return b""
    if not all(_is_utf8(value) for key, value in records if key in (b"path", b"linkpath", b"GNU.sparse.name")):
        body = _record(b"hdrcharset", b"BINARY") + body
    name = b"PaxHeaders/" + path.rstrip(b"/").rpartition(b"/")[2]
    start = _block(name, b"x", mode=0o644, owner=(0, 0), size=len(body), seconds=seconds)
    return start + body + padding(len(body))


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def _record(key: bytes, value: bytes) -> bytes:
    r"""``LENGTH KEY=VALUE\n``, where LENGTH counts its own digits too."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    if len(str(length)) > len(str(rest)):
        length += 1
    return b"%d %s=%s\n" % (length, key, value)


def _octal(value: int, digits: int) -> bytes:
    """Octal digits and a NUL; zero for what a PAX record says instead."""
    return b"%0*o\0" % (digits, value if value < 8**digits else 0)


def _block(
    name: bytes,
    typeflag: bytes,
    *,
    mode: int,
    owner: tuple[int, int],
    size: int,
    seconds: int,
    link: bytes = b"",
    rdev: tuple[int, int] = (0, 0),
) -> bytes:
    fields = (
        _ascii(name),
        _octal(mode, 7),
        _octal(owner[0], 7),
        _octal(owner[1], 7),
        _octal(size, 11),
        _octal(seconds, 11),
        b" " * 8,  # the checksum is taken with spaces in its place
        typeflag,
        _ascii(link),
        b"ustar\0",
        b"00",
        b"",
        b"",
        _octal(rdev[0], 7),
        _octal(rdev[1], 7),
        b"",
    )
    block = bytearray(_HEADER.pack(*fields))
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def _ascii(name: bytes) -> bytes:
    """A name for a field of 100 bytes; where it does not fit a PAX record has it whole."""
    return _NOT_ASCII.sub(b"_", name[:_NAME_MAX])
