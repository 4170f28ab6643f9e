"""The push parser: bytes in, entries out.

Not here: the parts that headers are made of (`ocifs.tar.header`, `ocifs.tar.pax`, `ocifs.tar.sparse`).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from ocifs.tar.entry import (
    EXTENSION_LIMIT,
    NOTICE_LIMIT,
    Damage,
    Entry,
    EntryType,
    Noticed,
    RefusedError,
    TarSummary,
    Trailing,
    shown,
)
from ocifs.tar.header import (
    BLOCK_SIZE,
    EXTENSIONS,
    GLOBAL_FLAG,
    HEADER,
    INT64_MAX,
    KNOWN_OTHERS,
    LONG_LINK_FLAG,
    LONG_NAME_FLAG,
    PAX_FLAG,
    SPARSE_FLAG,
    TYPES,
    UINT32_MAX,
    ZERO_BLOCK,
    cached_until_nul,
    checksum_holds,
    is_header,
    number,
    until_nul,
)
from ocifs.tar.pax import NS, XATTR_PREFIX, decimal, pax_records, pax_time
from ocifs.tar.sparse import SparseMap, gnu_map, pax_map

if TYPE_CHECKING:
    from collections.abc import Callable

_ZEROS: Final = bytes(1 << 16)


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
            except RefusedError as refused:
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
        return INT64_MAX if self._damage is not None else self._skip

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
                tar_header=self._nested is not None and is_header(bytes(self._nested)),
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

    def _header(self, view: memoryview, position: int, offset: int) -> None:  # noqa: C901, PLR0912, PLR0915 (each further call costs)
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
        ) = HEADER.unpack_from(view, position)
        if not name_field[0] and bytes(view[position : position + BLOCK_SIZE]) == ZERO_BLOCK:
            self._zero(offset)
            return
        if self._zero_seen:
            msg = f"a block that is not zero follows a single zero block at layer offset {offset}"
            raise RefusedError(msg, "D13", offset)
        if not checksum_holds(view, position, checksum_field):
            msg = f"the tar header at layer offset {offset} has a wrong checksum, or is none"
            raise RefusedError(msg, "D6", offset)

        path = name_field.partition(b"\0")[0]
        uname = gname = b""
        major = minor = 0
        try:
            mode = number(mode_field)
            uid = number(uid_field)
            gid = number(gid_field)
            size = number(size_field)
            mtime_ns = number(mtime_field) * NS
            if magic == b"ustar\0":
                if (
                    bytes(view[position + 508 : position + BLOCK_SIZE]) == b"tar\0"
                ):  # star: a shorter prefix, then two times
                    number(bytes(view[position + 476 : position + 488]))
                    number(bytes(view[position + 488 : position + 500]))
                    prefix = prefix[:131]
            elif magic == b"ustar " and version == b" \0":
                # GNU has two times where ustar has its prefix. Go before 1.8 wrote a prefix there nevertheless.
                prefix = b"" if not prefix[0] and not prefix[12] else self._gnu_prefix(prefix)
            else:
                magic = prefix = b""
            if magic:
                uname = cached_until_nul(uname_field)
                gname = cached_until_nul(gname_field)
                major = number(major_field)
                minor = number(minor_field)
                if prefix and prefix[0]:
                    path = prefix.partition(b"\0")[0] + b"/" + path
        except ValueError as error:
            msg = f"the tar header at layer offset {offset} has a field that is no number: {shown(error.args[0])}"
            raise RefusedError(msg, "D6", offset) from None

        kind = TYPES.get(typeflag)
        has_data = kind is None or kind is EntryType.FILE
        if size < 0 and has_data:
            raise self._negative_size(path, size, offset)
        if typeflag in EXTENSIONS:
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
                        uid = decimal(value)
                    if value := records.get(b"gid"):
                        gid = decimal(value)
                    if value := records.get(b"size"):
                        size = decimal(value)
                    if value := records.get(b"mtime"):
                        mtime_ns = pax_time(value)
                    for key in (b"atime", b"ctime"):  # not kept, but a layer with a malformed one is refused
                        if value := records.get(key):
                            pax_time(value)
                except ValueError as error:
                    bad = shown(error.args[0])
                    msg = f"the PAX header at layer offset {header_offset} has a value that is no number: {bad}"
                    raise RefusedError(msg, "D6", header_offset) from None
                xattrs = tuple(
                    (key[len(XATTR_PREFIX) :], value) for key, value in records.items() if key.startswith(XATTR_PREFIX)
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
        if not 0 <= uid <= UINT32_MAX or not 0 <= gid <= UINT32_MAX:
            self._notice("D3", path, header_offset, f"owner {uid}:{gid} is cut to 32 bits")
            uid &= UINT32_MAX
            gid &= UINT32_MAX
        if not 0 <= mtime_ns <= INT64_MAX:
            if mtime_ns > 0:
                self._notice("D9", path, header_offset, f"the time {mtime_ns // NS} s is out of range, and taken as 0")
            mtime_ns = 0
        rdev = (0, 0)
        if kind is EntryType.CHAR or kind is EntryType.BLOCK:
            rdev = (major & 0xFFF, minor & 0xFFFFF)
            if rdev != (major, minor):
                self._notice("D11", path, header_offset, f"device {major}:{minor} is cut to {rdev[0]}:{rdev[1]}")
        if kind is None:
            known = KNOWN_OTHERS.get(typeflag, f"an entry of unknown type {chr(typeflag)!r}")
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
        found: Entry | SparseMap | None = None
        if typeflag == SPARSE_FLAG:
            found = gnu_map(entry, bytes(view[position : position + BLOCK_SIZE]), gnu=magic == b"ustar ")
        elif records:
            found = pax_map(entry, records)
        if found is not None:
            self._go_on_with(found)
        else:
            self._entries.append(entry)
            if stored_size:
                self._pass(path, stored_size)

    def _gnu_prefix(self, field: bytes) -> bytes:
        """Take the prefix in place of GNU's access and change time, if those are not times."""
        try:
            for time in (field[:12], field[12:24]):
                if time[0]:
                    number(time)
        except ValueError:
            prefix = until_nul(field)
            return prefix if prefix.isascii() else b""
        return b""

    def _negative_size(self, path: bytes, size: int, offset: int) -> RefusedError:
        msg = f"the tar header of {shown(path)} at layer offset {offset} has the negative size {size}"
        return RefusedError(msg, "D6", offset)

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
            raise RefusedError(msg, "D6", offset)
        if self._pending_offset is None:
            self._pending_offset = offset
        take: Callable[[bytes, int], None]
        if typeflag == PAX_FLAG:
            take = self._take_records
        elif typeflag == LONG_NAME_FLAG:
            take = self._take_long_name
        elif typeflag == LONG_LINK_FLAG:
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
        self._long_name = until_nul(body)

    def _take_long_link(self, body: bytes, _offset: int) -> None:
        self._long_link = until_nul(body)

    def _take_records(self, body: bytes, offset: int) -> None:
        try:
            self._records = pax_records(body)
        except ValueError as error:
            msg = f"the PAX header at layer offset {offset} is malformed: {error}"
            raise RefusedError(msg, "D6", offset) from None

    def _take_global(self, path: bytes, attributes: tuple[int, int, int, int], body: bytes, offset: int) -> None:
        """Report a global header as an entry; it ends what extension headers came before it, and changes nothing."""
        header_offset = offset if self._pending_offset is None else self._pending_offset
        self._take_records(body, offset)
        if header_offset != offset:
            msg = f"the extension headers before the global one at layer offset {offset} have no effect"
            self._notice("D5", path, header_offset, msg)
        if ignored := [key for key in self._records if key != b"comment"]:
            msg = f"a global header whose attributes are ignored: {', '.join(map(shown, ignored[:8]))}"
            self._notice("D7", path, header_offset, msg)
        self._forget()
        mode, uid, gid, mtime_ns = attributes
        self._entries.append(
            Entry(
                path,
                EntryType.OTHER,
                GLOBAL_FLAG,
                mode & 0o7777,
                uid & UINT32_MAX,
                gid & UINT32_MAX,
                mtime_ns if 0 <= mtime_ns <= INT64_MAX else 0,
                0,
                header_offset,
                offset + BLOCK_SIZE,
                len(body),
            )
        )

    # --- sparse files -----------------------------------------------------------------------------------------------

    def _go_on_with(self, found: Entry | SparseMap) -> None:
        """Report a sparse file whose map is complete, and pass over its data; else wait for the next block of the map."""
        if isinstance(found, Entry):
            self._entries.append(found)
            self._pass(found.path, found.stored_size)
            self._await_header()
        else:
            self._await(BLOCK_SIZE, partial(self._sparse_block, found), f"the sparse map of {shown(found.path)}")

    def _sparse_block(self, found: SparseMap, view: memoryview, position: int, _offset: int) -> None:
        self._go_on_with(found.take(bytes(view[position : position + BLOCK_SIZE])) or found)

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
            msg = f"the layer ends at layer offset {end}, where {missing} bytes of {shown(self._subject)} are missing"
            self._damage = Damage("D6", end, msg)
        elif self._within or self._carry:
            within = self._within or "a tar header"
            self._damage = Damage("D6", end, f"the layer ends at layer offset {end}, within {within}")
        elif self._zero_seen:
            return
        self._end_offset = end
        if self._damage is None:
            self._drop_pending()
