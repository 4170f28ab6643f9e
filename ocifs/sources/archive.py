"""The members of an uncompressed tar as files: an oci-archive or docker-archive read where it lies.

One pass from header to header, seeking over the data, lists the members; from then on each is a range of the archive.
`ocifs.tar` reads the headers, so an outer archive means here what a layer would mean. Of several members of one name
the last counts, as it would after unpacking. Links between members are followed by name within the list, so no link
leads out of the archive.

Not here: decompression of an outer archive, what the members mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from ocifs.errors import DamagedError, NotFoundError, UnsupportedError
from ocifs.sources.blob import MemberBlob, SharedBlob, shown
from ocifs.tar import BLOCK_SIZE, Entry, EntryType, TarScanner

if TYPE_CHECKING:
    from collections.abc import Callable

    from ocifs.sources.base import Blob

MAX_MEMBERS: Final = 1_000_000
"""Members that are listed. An image has a few per layer; this many would take some 300 MB."""

_MAX_NAME: Final = 4096
"""Bytes of the longest member name that is kept: PATH_MAX. No image has such members."""

_MAX_LINKS: Final = 40  # followed from one name, as the kernel does (MAXSYMLINKS)
_ZERO_BLOCK: Final = bytes(BLOCK_SIZE)


class _Member(msgspec.Struct, frozen=True, gc=False):
    type: EntryType
    offset: int
    size: int
    link: bytes
    sparse: bool


def normal_name(name: bytes) -> bytes | None:
    """Give a member's name without ``./``, doubled and trailing slashes; None if it has ``..`` or is no name."""
    parts = [part for part in name.split(b"/") if part not in {b"", b"."}]
    return b"/".join(parts) if parts and b".." not in parts and len(name) <= _MAX_NAME else None


def _link_target(member_name: bytes, member: _Member) -> bytes | None:
    """Give the name a link leads to; None if that is outside the archive."""
    if member.type is EntryType.HARDLINK:
        return normal_name(member.link)
    parts = [] if member.link.startswith(b"/") else member_name.split(b"/")[:-1]
    for part in member.link.split(b"/"):
        if part == b"..":
            if not parts:
                return None
            parts.pop()
        elif part not in {b"", b"."}:
            parts.append(part)
    return b"/".join(parts) or None


class ArchiveFolder:
    """A tar archive as a `Folder`. Takes over the blob, which closes with the folder or its last open member."""

    def __init__(self, blob: Blob, reopen: Callable[[], Blob]) -> None:
        """List the members of the tar in ``blob``; DamagedError if it is damaged.

        ``reopen`` gives the blob again, for members that are opened after `close`.
        """
        self.name = blob.name
        self._size = blob.size
        self._reopen = reopen
        self._shared: SharedBlob | None = SharedBlob(blob)
        try:
            self._members = _list_members(blob)
        except BaseException:
            self.close()
            raise

    def __contains__(self, name: bytes) -> bool:
        """Whether there is a member of this name, of any type."""
        return name in self._members

    def names(self) -> list[bytes]:
        """Give the names of all members, in order."""
        return list(self._members)

    def _find(self, name: bytes) -> _Member:
        where = f"{self.name}: {shown(name)}"
        target: bytes | None = name
        for _ in range(_MAX_LINKS):
            member = None if target is None else self._members.get(target)
            if member is None or target is None:
                what = "no such member" if target == name else f"a link to {shown(target or b'..')}, which is not there"
                raise NotFoundError(f"{where}: {what}")
            if member.type not in {EntryType.SYMLINK, EntryType.HARDLINK}:
                break
            target = _link_target(target, member)
        else:
            raise DamagedError(f"{where}: more than {_MAX_LINKS} links one behind the other")
        if member.type is not EntryType.FILE:
            raise DamagedError(f"{where} is a {member.type.name.lower()}, where a regular file belongs")
        if member.sparse:
            raise UnsupportedError(f"{where} is stored as a sparse file, which cannot be read in place")
        return member

    def size_of(self, name: bytes) -> int:
        """See `Folder.size_of`."""
        return self._find(name).size

    def open(self, name: bytes) -> Blob:
        """See `Folder.open`."""
        member = self._find(name)
        where = f"{self.name}: {shown(name)}"
        if self._shared is not None:
            return MemberBlob(self._shared, where, member.offset, member.size)
        again = SharedBlob(self._reopen())
        try:
            if again.blob.size != self._size:
                raise DamagedError(f"{self.name} had {self._size} bytes when it was listed and has {again.blob.size}")
            return MemberBlob(again, where, member.offset, member.size)
        finally:
            again.release()  # the member is its user now

    def close(self) -> None:
        """See `Folder.close`."""
        shared, self._shared = self._shared, None
        if shared is not None:
            shared.release()


def _list_members(blob: Blob) -> dict[bytes, _Member]:
    """Read the headers, seeking over everything else, up to the two zero blocks that end the archive."""
    members: dict[bytes, _Member] = {}
    scanner = TarScanner()
    offset = 0
    count = 0
    block = b""
    while offset < blob.size:
        passed = min(scanner.passable, blob.size - offset)
        if passed:
            scanner.pass_over(passed)
            offset += passed
            continue
        before, block = block, blob.read_at(offset, BLOCK_SIZE)
        if not block:
            raise DamagedError(f"{blob.name}: ends at offset {offset} instead of {blob.size}")
        for entry in scanner.feed(block):
            count += 1
            _add(members, entry)
        offset += len(block)
        if block == before == _ZERO_BLOCK:
            break
        if count > MAX_MEMBERS:
            raise UnsupportedError(f"{blob.name}: the archive has more than {MAX_MEMBERS} members")
    damage = scanner.finish().damage
    if damage is not None and count == 0:
        raise DamagedError(f"{blob.name} is no tar archive")
    if damage is not None:
        raise DamagedError(f"{blob.name}: the archive is damaged or cut off at offset {damage.layer_offset}")
    return members


def _add(members: dict[bytes, _Member], entry: Entry) -> None:
    name = normal_name(entry.path)
    if name is not None and entry.type is not EntryType.OTHER:
        members.pop(name, None)
        members[name] = _Member(
            entry.type, entry.data_offset, entry.stored_size, entry.link[: _MAX_NAME + 1], entry.sparse is not None
        )
