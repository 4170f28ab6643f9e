"""Extended attributes as they lie behind an inode.

Not here: which attributes a tree has.
"""

from __future__ import annotations

from ocifs.erofs.layout import NAME_MAX, XATTR_ENTRY, XATTR_HEADER_SIZE, XATTR_PREFIXES, XATTR_WHOLE_NAMES


def xattr_body(xattrs: tuple[tuple[bytes, bytes], ...]) -> tuple[bytes, list[str]]:
    """Header and entries of inline attributes (empty if none can be held), and what is wrong with those left out."""
    entries: list[bytes] = []
    problems: list[str] = []
    room = 4 * (0xFFFF - 1)  # i_xattr_icount: 16 bits, the header counting one
    for name, value in xattrs:
        index, suffix = _split_name(name)
        shown = name.decode(errors="backslashreplace")
        entry = b""
        if not index or len(name) > NAME_MAX or b"\0" in name:
            problems.append(f"the extended attribute {shown} has a name that Linux does not know")
        elif len(value) > 0xFFFF:
            problems.append(f"the extended attribute {shown} has a value of {len(value)} bytes, more than 65535")
        else:
            entry = XATTR_ENTRY.pack(len(suffix), index, len(value)) + suffix + value
            entry += bytes(-len(entry) % 4)
            if len(entry) > room:
                problems.append(f"the extended attribute {shown} does not fit, the others take all 256 KiB there are")
                entry = b""
        room -= len(entry)
        entries.append(entry)
    body = b"".join(entries)
    return (bytes(XATTR_HEADER_SIZE) + body if body else b""), problems


def _split_name(name: bytes) -> tuple[int, bytes]:
    """Prefix index and rest of an attribute's name; index 0 if EROFS has no prefix for it."""
    for index, prefix in XATTR_PREFIXES:
        if index in XATTR_WHOLE_NAMES:
            if name == prefix:
                return index, b""
        elif name.startswith(prefix) and len(name) > len(prefix):
            return index, name[len(prefix) :]
    return 0, b""
