"""Who a container runs as: what ``User`` means in the image's own ``/etc/passwd`` and ``/etc/group``.

The rules are those of the image specification (config.md, ``User``; conversion.md, ``Config.User``):

- A number is taken as it is, whether or not the files know it; a name must be in them.
- Without a group the user's own from passwd counts; 0 if passwd does not know the user.
- Supplementary groups come from the group file, and only for a user given by name and without a group.
- An empty part counts as not given, as runc and Docker take it; without a user it is user 0.

The files are read through the image's tree, so every link on the way is followed inside the image and nowhere else. They
are somebody else's: what is no entry is passed over, and only the first `LIMIT` bytes of a file count. An image without
these files, or with something else in their place, is an image without users.

Not here: what is done with the answer (`ocifs.bundle.config`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

import msgspec

from ocifs.errors import DamagedError, NotFoundError
from ocifs.rootfs import NotReadableError, RootFS, SymlinkLoopError
from ocifs.tree import Kind

LIMIT: Final = 4 << 20
"""Bytes of a passwd or group file that are read: 4 MiB, some 50,000 users."""
GROUPS_MAX: Final = 65_536
"""Supplementary groups of one process: NGROUPS_MAX of linux/limits.h."""
ID_MAX: Final = 2**32 - 2
"""2³² − 1 is what the kernel takes for no id at all."""

PASSWD: Final = b"/etc/passwd"
GROUP: Final = b"/etc/group"

_LINE: Final = re.compile(rb"[^\n]+")
_NUMBER: Final = re.compile(rb"[0-9]{1,20}")


class UnknownUserError(NotFoundError):
    """No user or group can be meant by that."""


class Account(msgspec.Struct, frozen=True):
    """A user as a process has it. ``home`` is ``/`` where passwd does not say."""

    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()
    """Supplementary groups, each once, in the order of the group file."""
    home: str = "/"


def find_account(view: RootFS, user: str) -> Account:
    """Look ``user`` up, written as in an image's configuration: ``ada``, ``1000``, ``ada:users``, ``1000:100``, empty.

    Raises `UnknownUserError` for a name that the image does not have and for a number that is no id, `DamagedError` for a
    user in too many groups, and if the files' data is damaged.
    """
    name, _, group = user.encode("utf-8", "surrogateescape").partition(b":")
    return account_in(_content(view, PASSWD), _content(view, GROUP), name, group)


def account_in(passwd: bytes, groups: bytes, user: bytes, group: bytes) -> Account:
    """Do the same in the two files' bytes; ``user`` and ``group`` are empty if they are not given."""
    number = _id(user or b"0", "user")
    known = _user(passwd, user, number)
    if known is None and number is None:
        raise UnknownUserError(f"the image has no user {_shown(user)}: {PASSWD.decode()} does not list it")
    found = known or Account(uid=number or 0)
    if group:
        return msgspec.structs.replace(found, gid=_group(groups, group))
    if number is None:
        return msgspec.structs.replace(found, groups=_memberships(groups, user))
    return found


# -- the files -----------------------------------------------------------------------------------------------------


def _content(view: RootFS, path: bytes) -> bytes:
    """What counts of a file; nothing if there is no such file in the image."""
    try:
        ino = view.resolve(path)
        if view.inode(ino).kind is not Kind.FILE:
            return b""
        view.check_readable(ino)
    except (NotFoundError, SymlinkLoopError, NotReadableError):
        return b""
    return bytes(view.read_blocking(ino, 0, min(LIMIT, view.inode(ino).size)))


def _entries(content: bytes, needed: int) -> Iterator[list[bytes]]:
    """The lines with at least so many fields, as lists of seven: what a line lacks at its end is empty."""
    for line in _LINE.finditer(content):
        entry = line[0].split(b":", 6)
        if len(entry) >= needed:
            yield entry + [b""] * (7 - len(entry))


def _user(passwd: bytes, name: bytes, number: int | None) -> Account | None:
    """The first entry with this number, or with this name if there is no number. passwd(5) says what the fields are."""
    for entry in _entries(passwd, 4):
        uid, gid = _listed_id(entry[2]), _listed_id(entry[3])
        if uid is None or gid is None:
            continue
        if uid == number if number is not None else entry[0] == name:
            return Account(uid=uid, gid=gid, home=_home(entry[5]))
    return None


def _home(field: bytes) -> str:
    """A home directory that can be an environment variable's value in JSON."""
    try:
        text = field.decode()
    except UnicodeDecodeError:
        return "/"
    return text if text.startswith("/") and "\0" not in text else "/"


def _group(groups: bytes, group: bytes) -> int:
    number = _id(group, "group")
    if number is not None:
        return number
    for entry in _entries(groups, 3):
        gid = _listed_id(entry[2])
        if entry[0] == group and gid is not None:
            return gid
    raise UnknownUserError(f"the image has no group {_shown(group)}: {GROUP.decode()} does not list it")


def _memberships(groups: bytes, user: bytes) -> tuple[int, ...]:
    """Numbers of the groups that list a user as a member; group(5) says what the fields are."""
    found: dict[int, None] = {}
    for entry in _entries(groups, 4):
        gid = _listed_id(entry[2])
        # Most lines are told apart without taking their members apart, of which a hostile one has a million.
        if gid is not None and user in entry[3] and user in entry[3].strip().split(b","):
            found[gid] = None
            if len(found) > GROUPS_MAX:
                raise DamagedError(f"user {_shown(user)} of the image is in more than {GROUPS_MAX} groups")
    return tuple(found)


def _id(text: bytes, what: str) -> int | None:
    """An id given as a number; None if it is a name."""
    if not text.isdigit():
        return None
    number = _listed_id(text)
    if number is None:
        raise UnknownUserError(f"{_shown(text)} is no {what} id: ids go from 0 to {ID_MAX}")
    return number


def _listed_id(field: bytes) -> int | None:
    """An id as the files write it; None if it is none."""
    if not _NUMBER.fullmatch(field):
        return None
    number = int(field)
    return number if number <= ID_MAX else None


def _shown(name: bytes) -> str:
    return repr(name[:100].decode("utf-8", "backslashreplace"))
