"""The records of PAX headers: keys and values as text, numbers in decimal (POSIX.1-2017 pax(1), "pax Header Block").

Not here: what the keys mean for an entry (`ocifs.tar.scanner`), sparse maps in them (`ocifs.tar.sparse`).
"""

from __future__ import annotations

from typing import Final

from ocifs.tar.entry import shown
from ocifs.tar.header import INT64_MAX

NS: Final = 1_000_000_000
XATTR_PREFIX: Final = b"SCHILY.xattr."
_INT64_DIGITS: Final = len(str(INT64_MAX))
_NUL_FREE: Final = frozenset({b"path", b"linkpath", b"uname", b"gname"})
_SPARSE_PAIR: Final = (b"GNU.sparse.offset", b"GNU.sparse.numbytes")


def decimal(digits: bytes) -> int:
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
    if not -INT64_MAX - 1 <= value <= INT64_MAX:
        raise ValueError(digits)
    return value


def pax_time(text: bytes) -> int:
    """Read a PAX time as nanoseconds, further digits cut off; ValueError if malformed."""
    seconds, _, fraction = text.partition(b".")
    whole = decimal(seconds) * NS
    if not fraction:
        return whole
    if not fraction.isdigit():
        raise ValueError(text)
    part = int(fraction[:9].ljust(9, b"0"))
    return whole - part if seconds.startswith(b"-") else whole + part


def pax_records(body: bytes) -> dict[bytes, bytes]:
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
            end = position + decimal(body[position:space])
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
            raise ValueError(f"a NUL in record {shown(key)}")
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
