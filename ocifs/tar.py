"""Reads the tar stream of a layer: bytes are pushed in, entries come out.

What it is: the reading half of the tar format in all the dialects that layers use (v7, ustar, star, GNU, PAX, sparse
files), without input or output. `TarScanner.feed` takes the uncompressed layer in consecutive chunks of any size and
returns the entries whose headers it has seen; `TarScanner.finish` says how the stream ended.

What it is not: it opens nothing, decompresses nothing, writes no tar, and decides nothing about paths. Paths, link
targets and extended attributes come out byte for byte as stored; whiteouts, normalisation and what is shown are
`ocifs.overlay`'s. It does not refuse a layer either: damage is a value in the summary, and the merge refuses or warns.

Whose truth. The engines that fill people's containers (containerd, Docker, Podman, umoci) read layers with Go's
archive/tar, so where tar readers disagree this one does what that does, also in what it refuses; the differences that
matter, because two readers that disagree about where an entry ends see different files:

* Links, directories, devices and fifos have no data, whatever their size field says (rule H8). All other types,
  unknown ones too, have as many bytes as the size says, in a PAX header or else in the entry's own.
* A PAX header applies to the next entry and replaces an earlier one; a GNU long name stands beside it and wins over its
  path. A global header ends both: nothing before it reaches the entry after it.
* A header may be followed by the end of the data in place of its padding, and extension headers by no entry at all.
* Numbers are octal digits between spaces and NULs, or base-256 in 63 bits and a sign; anything else is damage.

Differences, each because the rules ask for it: sparse maps are checked when they are read and not when the file is
(so the layer is refused, not the read); identifiers, device numbers and times that the kernel or containerd would cut
are cut here, with a notice.

Bounds. What describes an entry beside its header block (PAX records, a long name, a sparse map) is kept in memory until
the entry is complete, so each is bounded by `EXTENSION_LIMIT`, as in Go and libarchive. Data is skipped by adding
numbers. The notices are bounded by `NOTICE_LIMIT`. So the memory follows the bytes fed (a chunk's entries, and up to
twenty times the bytes of one such description while it is taken apart), never what a header declares; and the time is
linear in the bytes fed.

Concurrency: a scanner belongs to one thread at a time.
"""

from __future__ import annotations

import enum
import struct
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Final
from zlib import adler32

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

BLOCK_SIZE: Final = 512
EXTENSION_LIMIT: Final = 1 << 20
"""Bytes of one PAX header, long name or sparse map: archive/tar's maxSpecialFileSize, and libarchive's limit."""
NOTICE_LIMIT: Final = 10_000
"""Notices kept per layer: enough for a person, and bounded for a layer of nothing but curiosities."""


class EntryType(enum.IntEnum):
    """What a tar entry says it is. OTHER is kept in the index, never in the tree."""

    FILE = 0
    HARDLINK = 1
    SYMLINK = 2
    CHAR = 3
    BLOCK = 4
    DIR = 5
    FIFO = 6
    OTHER = 7


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One entry of a layer's tar stream, decoded but not interpreted: ``path`` and ``link`` are as stored.

    Offsets are layer offsets: bytes from the start of the uncompressed tar. ``header_offset`` is the first block that
    belongs to the entry (its first extension header, if it has any); ``data_offset`` its first data byte;
    ``stored_size`` the data bytes in the archive without padding (behind a PAX 1.0 sparse map).

    The last entry of a truncated layer is reported like all others: its data reaches beyond `TarSummary.size`.
    """

    path: bytes
    type: EntryType
    typeflag: int
    """The raw type byte, so that OTHER can be told apart."""
    mode: int
    """Permission bits, 12 of them (setuid, setgid, sticky and rwxrwxrwx)."""
    uid: int
    """0 to 2**32 - 1."""
    gid: int
    """0 to 2**32 - 1."""
    mtime_ns: int
    """Nanoseconds since the epoch, 0 to 2**63 - 1; 0 where the header has a negative time (rule D9)."""
    size: int
    """Size of the file a reader sees, holes included; 0 for anything that is not FILE. Below 2**63."""
    header_offset: int
    data_offset: int
    stored_size: int
    """Below 2**63; 0 for types that have no data."""
    link: bytes = b""
    """Target of a SYMLINK or HARDLINK."""
    rdev: tuple[int, int] = (0, 0)
    """(major, minor) of CHAR and BLOCK, in Linux's 12 and 20 bits."""
    uname: bytes = b""
    gname: bytes = b""
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    """Every SCHILY.xattr, in stream order; which of them are shown is the merge's decision (rule D10)."""
    sparse: tuple[tuple[int, int], ...] | None = None
    """(file_offset, length) of data segments, stored one behind the other from ``data_offset``; None: not sparse.

    Sorted, not empty, not touching (the map's own segments that touch are joined), within ``size``, and together
    exactly ``stored_size`` bytes.
    """


class Noticed(msgspec.Struct, frozen=True, gc=False):
    """A warning about one layer's stream: the rule, the path concerned, the layer offset of the header."""

    rule: str
    path: bytes
    layer_offset: int
    message: str


class Damage(msgspec.Struct, frozen=True, gc=False):
    """Why the scanner could not go on: the rule broken, the layer offset where, and one sentence that names both.

    For truncated data ``layer_offset`` is where the data ends; for all else where the offending header or block is.
    """

    rule: str
    layer_offset: int
    message: str


class Trailing(msgspec.Struct, frozen=True, gc=False):
    """What lies behind the two zero blocks that end an archive (rule D14)."""

    layer_offset: int
    """The first byte behind the second zero block."""
    size: int
    """Bytes from there to the end of the layer, at least 1."""
    content_offset: int | None
    """Layer offset of the first 512-byte block that is not all zero; None: nothing but zeros, as tar's padding."""
    tar_header: bool
    """Whether the block at ``content_offset`` is a tar header: another archive begins there."""


class TarSummary(msgspec.Struct, frozen=True, gc=False):
    """How a layer's stream ended."""

    size: int
    """Bytes fed, which is the size of the uncompressed layer."""
    end_offset: int
    """Layer offset where entries end: the first zero block, the end of the data, or the damage."""
    trailing: Trailing | None
    """None: nothing behind the two zero blocks, or the archive does not end in two zero blocks."""
    notices: tuple[Noticed, ...]
    damage: Damage | None
    entry_count: int


class _RefusedError(Exception):
    """The stream breaks a rule; caught in `TarScanner.feed`, where it becomes a `Damage`."""

    def __init__(self, message: str, rule: str, layer_offset: int) -> None:
        super().__init__(message)
        self.damage = Damage(rule, layer_offset, message)


# The header block: name, mode, uid, gid, size, mtime, checksum, type, link name, magic, version, user and group name,
# device numbers, prefix; POSIX.1-2017 pax(1), "ustar Interchange Format". The last 12 bytes are nobody's but star's.
_HEADER: Final = struct.Struct("100s 8s 8s 8s 12s 12s 8s B 100s 6s 2s 32s 32s 8s 8s 155s 12x")
_ZEROS: Final = bytes(1 << 16)
_ZERO_BLOCK: Final = bytes(BLOCK_SIZE)
_INT64_MAX: Final = (1 << 63) - 1
_INT64_DIGITS: Final = len(str(_INT64_MAX))
_UINT32_MAX: Final = (1 << 32) - 1
_ASCII_MAX: Final = 0x7F
_NS: Final = 1_000_000_000
_SHOWN_LIMIT: Final = 200  # bytes of a path in a message

_TYPES: Final[dict[int, EntryType]] = {
    0: EntryType.FILE,
    ord("0"): EntryType.FILE,
    ord("1"): EntryType.HARDLINK,
    ord("2"): EntryType.SYMLINK,
    ord("3"): EntryType.CHAR,
    ord("4"): EntryType.BLOCK,
    ord("5"): EntryType.DIR,
    ord("6"): EntryType.FIFO,
    ord("7"): EntryType.FILE,  # a file that a contiguous file system should lay out in one piece
    ord("S"): EntryType.FILE,  # GNU's old sparse file
}
_SPARSE_FLAG: Final = ord("S")
_PAX_FLAG: Final = ord("x")
_GLOBAL_FLAG: Final = ord("g")
_LONG_NAME_FLAG: Final = ord("L")
_LONG_LINK_FLAG: Final = ord("K")
_EXTENSIONS: Final = frozenset({_PAX_FLAG, _GLOBAL_FLAG, _LONG_NAME_FLAG, _LONG_LINK_FLAG})
_KNOWN_OTHERS: Final = {
    ord("D"): "a GNU directory listing",
    ord("M"): "the continuation of a file of another volume",
    ord("V"): "a GNU volume label",
}

_XATTR_PREFIX: Final = b"SCHILY.xattr."
_NUL_FREE: Final = frozenset({b"path", b"linkpath", b"uname", b"gname"})
_SPARSE_PAIR: Final = (b"GNU.sparse.offset", b"GNU.sparse.numbytes")


def _shown(path: bytes) -> str:
    """``path`` for a message: quoted, printable and of bounded length."""
    text = repr(path[:_SHOWN_LIMIT].decode("utf-8", "backslashreplace"))
    return text if len(path) <= _SHOWN_LIMIT else text + "…"


def _text(field: bytes) -> bytes:
    """Cut a text field at its first NUL."""
    return field.partition(b"\0")[0]


_cached_text = lru_cache(maxsize=1024)(_text)  # user and group names: few, and worth sharing among a million entries


def _octal(field: bytes) -> int:
    """Read an octal field: digits, spaces and NULs around them; empty is 0. ValueError if it is anything else."""
    digits = _text(field.strip(b" \0"))
    if not digits:
        return 0
    if digits.strip(b"01234567"):  # anything else, at the ends or between, remains
        raise ValueError(field)
    return int(digits, 8)


@lru_cache(maxsize=8192)
def _number(field: bytes) -> int:
    """Read a numeric field: octal, or GNU's base-256 (top bit set, next bit the sign, big-endian two's complement).

    ValueError if it is neither, or does not fit a signed 64-bit integer. Cached, for a layer's modes, owners and times
    are few and decoding one costs ten times as much as looking it up.
    """
    if not field[0] & 0x80:
        return _octal(field)
    bits = 8 * len(field) - 1
    value = int.from_bytes(field, "big") & ((1 << bits) - 1)
    if field[0] & 0x40:
        value -= 1 << bits
    if not -_INT64_MAX - 1 <= value <= _INT64_MAX:
        raise ValueError(field)
    return value


def header_size(block: bytes) -> int:
    """Read the size field of a header block that `TarScanner` has accepted. ValueError: it is no number."""
    return _number(block[124:136])


# The checksum of a header is the sum of its 512 bytes with the eight checksum bytes taken as spaces. Summing in Python
# costs 3 µs, a third of what an entry may cost at all. But Adler-32's low half is 1 plus the sum of the bytes modulo
# 65521, and 256 bytes add up to at most 65280: so two Adler sums give the exact sum of all bytes.
@lru_cache(maxsize=8192)
def _expected_sum(field: bytes) -> int:
    """Compute what the low halves of both Adler sums add up to if ``field`` is right. ValueError: it is not octal."""
    return _octal(field) - 8 * ord(" ") + sum(field) + 2


def _checksum_holds(view: memoryview, position: int, field: bytes) -> bool:
    """Whether the checksum ``field`` of the header at ``position`` is the sum of unsigned or of signed bytes."""
    total = (adler32(view[position : position + 256]) & 0xFFFF) + (
        adler32(view[position + 256 : position + BLOCK_SIZE]) & 0xFFFF
    )
    try:
        expected = _expected_sum(field)
    except ValueError:
        return False
    if total == expected:
        return True
    # Signed: each byte over 127 counts 256 less, but not those of the checksum field, which count as spaces.
    block = bytes(view[position : position + BLOCK_SIZE])
    high = sum(byte > _ASCII_MAX for byte in block) - sum(byte > _ASCII_MAX for byte in field)
    return total - 256 * high == expected


def _is_header(block: bytes) -> bool:
    """Whether bytes are a tar header, going by the checksum."""
    return len(block) == BLOCK_SIZE and _checksum_holds(memoryview(block), 0, block[148:156])


def _decimal(digits: bytes) -> int:
    """Read a decimal integer of PAX, with or without a sign, within 64 bits signed; else ValueError."""
    if len(digits) < _INT64_DIGITS and digits.isdigit():
        return int(digits)
    unsigned = digits[1:] if digits[:1] in {b"+", b"-"} else digits
    if not unsigned.isdigit():
        raise ValueError(digits)
    unsigned = unsigned.lstrip(b"0") or b"0"
    if len(unsigned) > _INT64_DIGITS:  # out of range anyway, and a long one would take quadratic time
        raise ValueError(digits)
    value = -int(unsigned) if digits[:1] == b"-" else int(unsigned)
    if not -_INT64_MAX - 1 <= value <= _INT64_MAX:
        raise ValueError(digits)
    return value


def _pax_time(text: bytes) -> int:
    """Read a PAX time as nanoseconds, further digits cut off; ValueError if malformed."""
    seconds, _, fraction = text.partition(b".")
    whole = _decimal(seconds) * _NS
    if not fraction:
        return whole
    if not fraction.isdigit():
        raise ValueError(text)
    part = int(fraction[:9].ljust(9, b"0"))
    return whole - part if seconds.startswith(b"-") else whole + part


def _pax_records(body: bytes) -> dict[bytes, bytes]:
    r"""Read the records of a PAX header, ``LENGTH KEY=VALUE\n`` each; a key's last value counts. ValueError: malformed.

    The pairs of sparse format 0.0, which come as the same two keys again and again, become the one list of 0.1.
    """
    records: dict[bytes, bytes] = {}
    pairs: list[bytes] = []
    position = 0
    while position < len(body):
        space = body.find(b" ", position)
        if space < 0:
            raise ValueError("a record without a length")
        try:
            end = position + _decimal(body[position:space])
        except ValueError:
            raise ValueError("a record whose length is no number") from None
        if not space + 1 < end <= len(body):
            raise ValueError("a record that is longer than the header, or shorter than its own length")
        if body[end - 1 : end] != b"\n":
            raise ValueError("a record that does not end in a newline")
        key, equals, value = body[space + 1 : end - 1].partition(b"=")
        if not equals or not key:
            raise ValueError("a record without a key")
        if b"\0" in (value if key in _NUL_FREE else key):
            raise ValueError(f"a NUL in record {_shown(key)}")
        if key in _SPARSE_PAIR:
            if key != _SPARSE_PAIR[len(pairs) % 2] or b"," in value:
                raise ValueError("sparse offsets and lengths that do not alternate")
            pairs.append(value)
        else:
            records[key] = value
        position = end
    if pairs:
        records[b"GNU.sparse.map"] = b",".join(pairs)
    return records


def _segments(numbers: Iterable[int], size: int, stored_size: int) -> tuple[tuple[int, int], ...]:
    """Check a sparse map given as flat numbers (offset, length, …); ValueError says what is wrong with it.

    Empty segments vanish and touching ones are joined, so that each costs the sender at least a byte of data.
    """
    segments: list[tuple[int, int]] = []
    total = end = 0
    if size < 0:
        raise ValueError("a negative file size")
    iterator = iter(numbers)
    for offset, length in zip(iterator, iterator, strict=True):
        if offset < 0 or length < 0:
            raise ValueError("a negative offset or length")
        if offset < end:
            raise ValueError("segments that overlap or are out of order")
        if offset + length > size:
            raise ValueError(f"a segment up to {offset + length} in a file of {size} bytes")
        if length:
            if segments and offset == end:
                start, before = segments[-1]
                segments[-1] = (start, before + length)
            else:
                segments.append((offset, length))
            total += length
        end = offset + length
    if total != stored_size:
        raise ValueError(f"segments of {total} bytes, but {stored_size} bytes of data")
    return tuple(segments)


class _Draft:
    """A sparse file whose map is being collected: the entry but for data offset and segments, and the map so far."""

    __slots__ = ("entry", "left", "newlines", "newlines_wanted", "numbers", "text")

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.left = entry.stored_size  # stored bytes behind the map, as far as it has come
        self.numbers: list[int] = []  # old GNU: offset, length, …
        self.text = bytearray()  # PAX 1.0: the number of segments, then offsets and lengths, a line each
        self.newlines = 0
        self.newlines_wanted = 0  # 0: the first line has not come


class TarScanner:
    """A push parser for one layer's tar stream.

    Inside, the scanner is always waiting for a piece of known size (``_want``) that a method (``_then``) will take, or
    passing over bytes that nobody wants (``_skip``). A piece that lies within a chunk is read in place.
    """

    __slots__ = (
        "_base",
        "_carry",
        "_damage",
        "_end_offset",
        "_ended",
        "_entries",
        "_entry_count",
        "_finished",
        "_long_link",
        "_long_name",
        "_nested",
        "_nested_offset",
        "_notice_count",
        "_notices",
        "_pending_offset",
        "_records",
        "_skip",
        "_slack",
        "_subject",
        "_then",
        "_want",
        "_within",
        "_zero_seen",
    )

    def __init__(self) -> None:
        """Start at the first byte of a layer."""
        self._base = 0  # layer offset of the chunk being fed
        self._carry = bytearray()  # the beginning of a piece that straddles chunks
        self._want = BLOCK_SIZE
        self._then: Callable[[memoryview, int, int], None] = self._header
        self._within = ""  # what the piece belongs to, where the data must not end; empty: a header, which may not come
        self._skip = 0  # bytes to pass over before the next piece
        self._slack = 0  # how many of those are padding, which may be missing at the end of the data
        self._subject = b""  # the path whose data is being passed over
        self._entries: list[Entry] = []
        self._entry_count = 0
        # Extension headers that wait for their entry.
        self._pending_offset: int | None = None
        self._records: dict[bytes, bytes] = {}
        self._long_name = b""
        self._long_link = b""
        # The end.
        self._zero_seen = False
        self._ended = False
        self._end_offset = 0
        self._nested: bytearray | None = None  # the first block behind the end that is not zero, as far as it has come
        self._nested_offset = 0
        self._damage: Damage | None = None
        self._notices: list[Noticed] = []
        self._notice_count = 0
        self._finished = False

    # --- what callers use -------------------------------------------------------------------------------------------

    def feed(self, data: bytes | memoryview) -> list[Entry]:
        """Take the next bytes of the layer; return the entries whose headers were completed by them, in stream order.

        ``data`` may be of any size, and is not kept. Nothing in it makes this fail: see `TarSummary.damage`.
        """
        if self._finished:
            raise ValueError("the scanner has been told that the data is over")
        view = memoryview(data)
        if view.format != "B" or view.ndim != 1:
            view = view.cast("B")
        size = len(view)
        entries = self._entries = []
        if self._ended:
            self._behind(view, 0)
        elif self._damage is None:
            try:
                position = self._scan(view, size)
            except _RefusedError as refused:
                self._damage = refused.damage
                self._end_offset = refused.damage.layer_offset
                self._forget()
            else:
                self._behind(view, position)  # nothing is left unless the archive has ended
        self._base += size
        self._entry_count += len(entries)
        self._entries = []
        return entries

    @property
    def passable(self) -> int:
        """How many of the next bytes mean nothing to the scanner; a reader that can seek may `pass_over` so many."""
        if self._ended:
            return 0
        return _INT64_MAX if self._damage is not None else self._skip

    def pass_over(self, size: int) -> None:
        """Count ``size`` bytes, at most `passable`, as fed. They must exist: nobody else finds truncation then."""
        if not 0 <= size <= self.passable:
            raise ValueError(f"{size} bytes are not all passable")
        if self._damage is None:
            self._skip -= size
        self._base += size

    def finish(self) -> TarSummary:
        """Say that the data is over. May be called again, to the same effect."""
        if not self._finished:
            self._finished = True
            if self._damage is None and not self._ended:
                self._conclude()
            self._forget()
        trailing = None
        behind = self._end_offset + 2 * BLOCK_SIZE
        if self._ended and self._base > behind:
            trailing = Trailing(
                layer_offset=behind,
                size=self._base - behind,
                content_offset=None if self._nested is None else self._nested_offset,
                tar_header=self._nested is not None and _is_header(bytes(self._nested)),
            )
        notices = list(self._notices)
        if self._notice_count > NOTICE_LIMIT:
            more = self._notice_count - NOTICE_LIMIT
            notices.append(Noticed("", b"", self._end_offset, f"{more} further notices are not kept"))
        return TarSummary(self._base, self._end_offset, trailing, tuple(notices), self._damage, self._entry_count)

    # --- the machine ------------------------------------------------------------------------------------------------

    def _scan(self, view: memoryview, size: int) -> int:
        """Consume a chunk; return the position in it behind the end of the archive, or its size."""
        position = 0
        base = self._base
        while position < size and not self._ended:
            if self._skip:
                step = min(self._skip, size - position)
                self._skip -= step
                position += step
            elif not self._carry and size - position >= self._want:
                at, position = position, position + self._want
                self._then(view, at, base + at)
            else:
                step = min(self._want - len(self._carry), size - position)
                self._carry += view[position : position + step]
                position += step
                if len(self._carry) == self._want:
                    piece, self._carry = memoryview(bytes(self._carry)), bytearray()
                    self._then(piece, 0, base + position - len(piece))
        return position

    def _await(self, size: int, then: Callable[[memoryview, int, int], None], within: str) -> None:
        """Wait for a piece of ``size`` bytes; ``then`` is given a view, the position in it, and the layer offset."""
        self._want = size
        self._then = then
        self._within = within

    def _await_header(self) -> None:
        self._await(BLOCK_SIZE, self._header, "")

    def _pass(self, subject: bytes, size: int) -> None:
        """Pass over ``size`` bytes of ``subject``'s data and their padding, up to the next header."""
        self._slack = -size % BLOCK_SIZE
        self._skip = size + self._slack
        self._subject = subject

    def _forget(self) -> None:
        """Let go of everything that was kept for entries to come."""
        self._carry = bytearray()
        self._records = {}
        self._long_name = self._long_link = b""
        self._pending_offset = None

    def _notice(self, rule: str, path: bytes, layer_offset: int, message: str) -> None:
        self._notice_count += 1
        if self._notice_count <= NOTICE_LIMIT:
            self._notices.append(Noticed(rule, path, layer_offset, message))

    # --- headers ----------------------------------------------------------------------------------------------------

    def _header(self, view: memoryview, position: int, offset: int) -> None:  # noqa: C901, PLR0912, PLR0915
        # One long function: a million calls, and each further call would cost as much as three of its lines.
        (
            name_field,
            mode_field,
            uid_field,
            gid_field,
            size_field,
            mtime_field,
            checksum_field,
            typeflag,
            link_field,
            magic,
            version,
            uname_field,
            gname_field,
            major_field,
            minor_field,
            prefix,
        ) = _HEADER.unpack_from(view, position)
        if not name_field[0] and bytes(view[position : position + BLOCK_SIZE]) == _ZERO_BLOCK:
            self._zero(offset)
            return
        if self._zero_seen:
            msg = f"a block that is not zero follows a single zero block at layer offset {offset}"
            raise _RefusedError(msg, "D13", offset)
        if not _checksum_holds(view, position, checksum_field):
            msg = f"the tar header at layer offset {offset} has a wrong checksum, or is none"
            raise _RefusedError(msg, "D6", offset)

        path = name_field.partition(b"\0")[0]
        uname = gname = b""
        major = minor = 0
        try:
            mode = _number(mode_field)
            uid = _number(uid_field)
            gid = _number(gid_field)
            size = _number(size_field)
            mtime_ns = _number(mtime_field) * _NS
            if magic == b"ustar\0":
                if (
                    bytes(view[position + 508 : position + BLOCK_SIZE]) == b"tar\0"
                ):  # star: a shorter prefix, then two times
                    _number(bytes(view[position + 476 : position + 488]))
                    _number(bytes(view[position + 488 : position + 500]))
                    prefix = prefix[:131]
            elif magic == b"ustar " and version == b" \0":
                # GNU has two times where ustar has its prefix. Go before 1.8 wrote a prefix there nevertheless.
                prefix = b"" if not prefix[0] and not prefix[12] else self._gnu_prefix(prefix)
            else:
                magic = prefix = b""
            if magic:
                uname = _cached_text(uname_field)
                gname = _cached_text(gname_field)
                major = _number(major_field)
                minor = _number(minor_field)
                if prefix and prefix[0]:
                    path = prefix.partition(b"\0")[0] + b"/" + path
        except ValueError as error:
            msg = f"the tar header at layer offset {offset} has a field that is no number: {_shown(error.args[0])}"
            raise _RefusedError(msg, "D6", offset) from None

        kind = _TYPES.get(typeflag)
        has_data = kind is None or kind is EntryType.FILE
        if size < 0 and has_data:
            raise self._negative_size(path, size, offset)
        if typeflag in _EXTENSIONS:
            self._begin_extension(path, typeflag, size, offset, (mode, uid, gid, mtime_ns))
            return

        header_offset = offset
        link = b""
        xattrs: tuple[tuple[bytes, bytes], ...] = ()
        records: dict[bytes, bytes] | None = None
        if kind is EntryType.SYMLINK or kind is EntryType.HARDLINK:
            link = link_field.partition(b"\0")[0]
        if self._pending_offset is not None:
            header_offset = self._pending_offset
            records = self._records
            if records:
                try:
                    path = records.get(b"path") or path
                    if link_value := records.get(b"linkpath"):
                        link = link_value
                    uname = records.get(b"uname") or uname
                    gname = records.get(b"gname") or gname
                    if value := records.get(b"uid"):
                        uid = _decimal(value)
                    if value := records.get(b"gid"):
                        gid = _decimal(value)
                    if value := records.get(b"size"):
                        size = _decimal(value)
                    if value := records.get(b"mtime"):
                        mtime_ns = _pax_time(value)
                    for key in (b"atime", b"ctime"):  # not kept, but a layer with a malformed one is refused
                        if value := records.get(key):
                            _pax_time(value)
                except ValueError as error:
                    bad = _shown(error.args[0])
                    msg = f"the PAX header at layer offset {header_offset} has a value that is no number: {bad}"
                    raise _RefusedError(msg, "D6", header_offset) from None
                xattrs = tuple(
                    (key[len(_XATTR_PREFIX) :], value)
                    for key, value in records.items()
                    if key.startswith(_XATTR_PREFIX)
                )
            path = self._long_name or path
            link = self._long_link or link
            if kind is not EntryType.SYMLINK and kind is not EntryType.HARDLINK:
                link = b""
            self._pending_offset = None
            self._records = {}
            self._long_name = self._long_link = b""
        if typeflag == 0 and path.endswith(b"/"):  # rule D2
            kind = EntryType.DIR
            has_data = False
        if size < 0 and has_data:
            raise self._negative_size(path, size, header_offset)

        # What chown(2) and mknod(2) would make of numbers they cannot hold, and containerd of such a time.
        if not 0 <= uid <= _UINT32_MAX or not 0 <= gid <= _UINT32_MAX:
            self._notice("D3", path, header_offset, f"owner {uid}:{gid} is cut to 32 bits")
            uid &= _UINT32_MAX
            gid &= _UINT32_MAX
        if not 0 <= mtime_ns <= _INT64_MAX:
            if mtime_ns > 0:
                self._notice("D9", path, header_offset, f"the time {mtime_ns // _NS} s is out of range, and taken as 0")
            mtime_ns = 0
        rdev = (0, 0)
        if kind is EntryType.CHAR or kind is EntryType.BLOCK:
            rdev = (major & 0xFFF, minor & 0xFFFFF)
            if rdev != (major, minor):
                self._notice("D11", path, header_offset, f"device {major}:{minor} is cut to {rdev[0]}:{rdev[1]}")
        if kind is None:
            known = _KNOWN_OTHERS.get(typeflag, f"an entry of unknown type {chr(typeflag)!r}")
            self._notice("D8", path, header_offset, f"{known}, which is not part of the tree")
            kind = EntryType.OTHER

        stored_size = size if has_data else 0
        entry = Entry(
            path,
            kind,
            typeflag,
            mode & 0o7777,
            uid,
            gid,
            mtime_ns,
            size if kind is EntryType.FILE else 0,
            header_offset,
            offset + BLOCK_SIZE,
            stored_size,
            link,
            rdev,
            uname,
            gname,
            xattrs,
        )
        if typeflag == _SPARSE_FLAG:
            self._begin_gnu_sparse(entry, view[position : position + BLOCK_SIZE], gnu=magic == b"ustar ")
        elif not records or not self._begin_pax_sparse(entry, records):
            self._entries.append(entry)
            if stored_size:
                self._pass(path, stored_size)

    def _gnu_prefix(self, field: bytes) -> bytes:
        """Take the prefix in place of GNU's access and change time, if those are not times."""
        try:
            for time in (field[:12], field[12:24]):
                if time[0]:
                    _number(time)
        except ValueError:
            prefix = _text(field)
            return prefix if prefix.isascii() else b""
        return b""

    def _negative_size(self, path: bytes, size: int, offset: int) -> _RefusedError:
        msg = f"the tar header of {_shown(path)} at layer offset {offset} has the negative size {size}"
        return _RefusedError(msg, "D6", offset)

    def _zero(self, offset: int) -> None:
        """Take a zero block: the first one may be the end, the second is."""
        if self._zero_seen:
            self._ended = True
            return
        self._zero_seen = True
        self._end_offset = offset
        self._drop_pending()

    def _drop_pending(self) -> None:
        """Forget extension headers that no entry follows."""
        if self._pending_offset is not None:
            offset = self._pending_offset
            self._notice("D5", b"", offset, f"the extension header at layer offset {offset} has no entry behind it")
            self._forget()

    # --- extension headers ------------------------------------------------------------------------------------------

    def _begin_extension(
        self, path: bytes, typeflag: int, size: int, offset: int, attributes: tuple[int, int, int, int]
    ) -> None:
        """Collect the body of a PAX header, a global one, or a GNU long name."""
        if size > EXTENSION_LIMIT:
            msg = (
                f"the extension header at layer offset {offset} declares {size} bytes, "
                f"more than the {EXTENSION_LIMIT} that any reader takes"
            )
            raise _RefusedError(msg, "D6", offset)
        if self._pending_offset is None:
            self._pending_offset = offset
        take: Callable[[bytes, int], None]
        if typeflag == _PAX_FLAG:
            take = self._take_records
        elif typeflag == _LONG_NAME_FLAG:
            take = self._take_long_name
        elif typeflag == _LONG_LINK_FLAG:
            take = self._take_long_link
        else:
            take = partial(self._take_global, path, attributes)
        if size:
            self._await(size, partial(self._extension_body, take), "an extension header")
        else:
            take(b"", offset)

    def _extension_body(self, take: Callable[[bytes, int], None], view: memoryview, position: int, offset: int) -> None:
        size = self._want
        self._skip = self._slack = -size % BLOCK_SIZE
        self._await_header()
        take(bytes(view[position : position + size]), offset - BLOCK_SIZE)

    def _take_long_name(self, body: bytes, _offset: int) -> None:
        self._long_name = _text(body)

    def _take_long_link(self, body: bytes, _offset: int) -> None:
        self._long_link = _text(body)

    def _take_records(self, body: bytes, offset: int) -> None:
        try:
            self._records = _pax_records(body)
        except ValueError as error:
            msg = f"the PAX header at layer offset {offset} is malformed: {error}"
            raise _RefusedError(msg, "D6", offset) from None

    def _take_global(self, path: bytes, attributes: tuple[int, int, int, int], body: bytes, offset: int) -> None:
        """Report a global header as an entry; it ends what extension headers came before it, and changes nothing."""
        header_offset = offset if self._pending_offset is None else self._pending_offset
        self._take_records(body, offset)
        if header_offset != offset:
            msg = f"the extension headers before the global one at layer offset {offset} have no effect"
            self._notice("D5", path, header_offset, msg)
        if ignored := [key for key in self._records if key != b"comment"]:
            msg = f"a global header whose attributes are ignored: {', '.join(map(_shown, ignored[:8]))}"
            self._notice("D7", path, header_offset, msg)
        self._forget()
        mode, uid, gid, mtime_ns = attributes
        self._entries.append(
            Entry(
                path,
                EntryType.OTHER,
                _GLOBAL_FLAG,
                mode & 0o7777,
                uid & _UINT32_MAX,
                gid & _UINT32_MAX,
                mtime_ns if 0 <= mtime_ns <= _INT64_MAX else 0,
                0,
                header_offset,
                offset + BLOCK_SIZE,
                len(body),
            )
        )

    # --- sparse files -----------------------------------------------------------------------------------------------

    def _emit_sparse(self, draft: _Draft, data_offset: int, numbers: Iterable[int]) -> None:
        """Report the sparse file whose map is complete, and pass over its data."""
        entry = draft.entry
        try:
            segments = _segments(numbers, entry.size, draft.left)
        except ValueError as error:
            raise self._bad_sparse(entry, str(error)) from None
        entry = msgspec.structs.replace(entry, data_offset=data_offset, stored_size=draft.left, sparse=segments)
        if entry.type is not EntryType.FILE:
            entry = msgspec.structs.replace(entry, size=0, sparse=None)
        self._entries.append(entry)
        self._pass(entry.path, draft.left)
        self._await_header()

    def _bad_sparse(self, entry: Entry, what: str) -> _RefusedError:
        offset = entry.header_offset
        msg = f"the sparse map of {_shown(entry.path)} at layer offset {offset} is impossible: {what}"
        return _RefusedError(msg, "D8", offset)

    def _begin_gnu_sparse(self, entry: Entry, block: memoryview, *, gnu: bool) -> None:
        """Read the four segments in an old GNU sparse header, and the file's size."""
        if not gnu:  # star has another layout under the same type; archive/tar refuses it too
            raise self._bad_sparse(entry, "the header is not GNU's")
        try:
            size = _number(bytes(block[483:495]))
        except ValueError:
            raise self._bad_sparse(entry, "its size is no number") from None
        draft = _Draft(msgspec.structs.replace(entry, size=size))
        self._gnu_segments(draft, bytes(block[386:483]), entry.data_offset)

    def _gnu_segments(self, draft: _Draft, array: bytes, behind: int) -> None:
        """Take pairs of 12-byte numbers and the flag behind them, which says that a further block follows."""
        try:
            for at in range(0, len(array) - 1, 24):
                if not array[at]:
                    break
                draft.numbers += (_number(array[at : at + 12]), _number(array[at + 12 : at + 24]))
        except ValueError:
            raise self._bad_sparse(draft.entry, "a number that is none") from None
        if not array[-1]:
            self._emit_sparse(draft, behind, draft.numbers)
            return
        if behind - draft.entry.data_offset >= EXTENSION_LIMIT:
            raise self._bad_sparse(draft.entry, f"it is longer than {EXTENSION_LIMIT} bytes")
        within = f"the sparse map of {_shown(draft.entry.path)}"
        self._await(BLOCK_SIZE, partial(self._gnu_sparse_block, draft), within)

    def _gnu_sparse_block(self, draft: _Draft, view: memoryview, position: int, offset: int) -> None:
        self._gnu_segments(draft, bytes(view[position : position + 505]), offset + BLOCK_SIZE)

    def _begin_pax_sparse(self, entry: Entry, records: dict[bytes, bytes]) -> bool:
        """Read what PAX records say about a sparse file; False if they say nothing, or speak of an unknown version."""
        version = records.get(b"GNU.sparse.major", b""), records.get(b"GNU.sparse.minor", b"")
        segment_map = records.get(b"GNU.sparse.map", b"")
        if version == (b"", b""):  # formats 0.0 and 0.1 began without version records
            if not segment_map:
                return False
        elif version not in {(b"0", b"0"), (b"0", b"1"), (b"1", b"0")}:
            return False
        if entry.type is not EntryType.FILE and entry.type is not EntryType.OTHER:
            raise self._bad_sparse(entry, "it is no file")
        size = entry.stored_size
        count = 0
        try:
            if value := records.get(b"GNU.sparse.size") or records.get(b"GNU.sparse.realsize"):
                size = _decimal(value)
            if version != (b"1", b"0"):
                count = _decimal(records.get(b"GNU.sparse.numblocks", b""))
        except ValueError:
            raise self._bad_sparse(entry, "its size or its number of segments is no number") from None
        path = records.get(b"GNU.sparse.name") or entry.path
        draft = _Draft(msgspec.structs.replace(entry, path=path, size=size))
        if version == (b"1", b"0"):
            self._await_map(draft)
            return True
        texts = segment_map.split(b",") if segment_map else []
        if len(texts) != 2 * count:
            raise self._bad_sparse(draft.entry, f"{len(texts)} numbers for {count} segments")
        self._emit_sparse(draft, entry.data_offset, self._numbers(draft, texts))
        return True

    def _numbers(self, draft: _Draft, texts: Iterable[bytes]) -> list[int]:
        try:
            return [_decimal(text) for text in texts]
        except ValueError:
            raise self._bad_sparse(draft.entry, "a number that is none") from None

    def _await_map(self, draft: _Draft) -> None:
        """Wait for the next block of a PAX 1.0 map, which takes whole blocks of the file's stored bytes."""
        if draft.left < BLOCK_SIZE:
            raise self._bad_sparse(draft.entry, "it does not end within the file's data")
        if len(draft.text) + BLOCK_SIZE > EXTENSION_LIMIT:
            raise self._bad_sparse(draft.entry, f"it is longer than {EXTENSION_LIMIT} bytes")
        within = f"the sparse map of {_shown(draft.entry.path)}"
        self._await(BLOCK_SIZE, partial(self._map_block, draft), within)

    def _map_block(self, draft: _Draft, view: memoryview, position: int, offset: int) -> None:
        block = bytes(view[position : position + BLOCK_SIZE])
        draft.text += block
        draft.left -= BLOCK_SIZE
        draft.newlines += block.count(b"\n")
        if draft.newlines and not draft.newlines_wanted:
            (count,) = self._numbers(draft, [bytes(draft.text[: draft.text.index(b"\n")])])
            if count < 0:
                raise self._bad_sparse(draft.entry, "a negative number of segments")
            draft.newlines_wanted = 1 + 2 * count
        if not draft.newlines_wanted or draft.newlines < draft.newlines_wanted:
            self._await_map(draft)
            return
        lines = bytes(draft.text).split(b"\n", draft.newlines_wanted)[1 : draft.newlines_wanted]
        self._emit_sparse(draft, offset + BLOCK_SIZE, self._numbers(draft, lines))

    # --- the end ----------------------------------------------------------------------------------------------------

    def _behind(self, view: memoryview, position: int) -> None:
        """Look at bytes behind the end: find the first block that is not zero, and keep it."""
        size = len(view)
        while self._nested is None and position < size:
            piece = bytes(view[position : position + len(_ZEROS)])
            if piece == _ZEROS[: len(piece)]:
                position += len(piece)
                continue
            position += len(piece) - len(piece.lstrip(b"\0"))
            zeros = (self._base + position) % BLOCK_SIZE
            self._nested_offset = self._base + position - zeros
            self._nested = bytearray(zeros)
        if self._nested is not None and len(self._nested) < BLOCK_SIZE:
            self._nested += view[position : position + BLOCK_SIZE - len(self._nested)]

    def _conclude(self) -> None:
        """Judge a stream that ends without two zero blocks."""
        end = self._base
        if self._skip > self._slack:
            missing = self._skip - self._slack
            msg = f"the layer ends at layer offset {end}, where {missing} bytes of {_shown(self._subject)} are missing"
            self._damage = Damage("D6", end, msg)
        elif self._within or self._carry:
            within = self._within or "a tar header"
            self._damage = Damage("D6", end, f"the layer ends at layer offset {end}, within {within}")
        elif self._zero_seen:
            return
        self._end_offset = end
        if self._damage is None:
            self._drop_pending()
