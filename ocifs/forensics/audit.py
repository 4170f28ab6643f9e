"""What an examiner wants to see first of an image: privileges, devices, deceiving names, traces of tampering.

A *finding* is one thing about one version of one path (or about a layer, or the image), by a *rule*. `RULES` has them all
with a severity each; their names are stable. Rules of the form ``rule-T17`` are warnings by that row of `ocifs.rules`,
which images, indexes and the merge give; rows T3 and T5 are left out, since what they are about are the overridden entries
that have rules here.

A finding is no verdict: a setuid ``su`` is how a system works. What the severities mean: HIGH, hardly ever meant well or a
proof of damage; MEDIUM, to be looked at in every image; LOW, odd; INFO, worth knowing.

Versions that the image does not show are audited as well, for what was deleted is still in a layer. Markers are, as far as
they hide nothing or hold data. Owners are compared with the ``/etc/passwd`` and ``/etc/group`` that the image shows; if it
has none, nobody is unknown. Content is compared (`SAME_SIZE_AND_TIME`) by reading both files, so an image whose layers
copy files to change their owner only is read as far as those go; nothing else reads data but another archive's headers.

Not here: how findings are shown; bytes in headers and padding (`ocifs.forensics.slack`).
"""

from __future__ import annotations

import datetime
import enum
import itertools
from collections.abc import Iterable, Iterator
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import msgspec

from ocifs.errors import DamagedError
from ocifs.forensics.capabilities import XATTR, capability_text
from ocifs.forensics.digests import BATCH, digests
from ocifs.forensics.names import oddities
from ocifs.forensics.slack import RegionKind, behind_the_end
from ocifs.forensics.timeline import created_ns
from ocifs.history import Change, End
from ocifs.tree import Kind

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ocifs.forensics.examination import Examination
    from ocifs.history import Version
    from ocifs.tree import Warned


class Severity(enum.IntEnum):
    """How much a finding matters. The names are stable."""

    INFO = 0
    LOW = 1
    MEDIUM = 2
    HIGH = 3


class Rule(msgspec.Struct, frozen=True):
    """One rule of the audit."""

    severity: Severity
    meaning: str


_I, _L, _M, _H = Severity

RULES: Final[Mapping[str, Rule]] = MappingProxyType(
    {
        "setuid": Rule(_M, "a file that runs as its owner"),
        "setuid-writable": Rule(_H, "a setuid or setgid file that others than its owner can write"),
        "setgid": Rule(_M, "a file that runs as its group"),
        "setgid-directory": Rule(_I, "a directory whose new files get its group"),
        "capability": Rule(_M, "a file that runs with capabilities"),
        "malformed-capability": Rule(_M, "a security.capability that the kernel does not take"),
        "world-writable-file": Rule(_M, "a file or fifo that everybody can write"),
        "world-writable-directory": Rule(_M, "a directory, not sticky, in which everybody can replace what is there"),
        "device": Rule(_H, "a device node that is none of those that every container has"),
        "standard-device": Rule(_I, "a device node that every container has"),
        "unknown-user": Rule(_L, "an owner that /etc/passwd does not have"),
        "unknown-group": Rule(_L, "a group that /etc/group does not have"),
        "overlay-attribute": Rule(_M, "an attribute that overlayfs would obey if it came into an upper directory"),
        "hidden-name": Rule(_M, "a name of dots and spaces alone"),
        "padded-name": Rule(_L, "a name that begins or ends with a space"),
        "control-character": Rule(_M, "a name that a terminal may obey"),
        "turned-name": Rule(_H, "a name that is shown in another order than it is written"),
        "invisible-character": Rule(_M, "a name that looks like another one"),
        "non-utf8-name": Rule(_L, "a name that is not UTF-8"),
        "overridden-entry": Rule(_M, "an entry that a later one of the same layer overrides, so that nobody sees it"),
        "repeated-directory": Rule(_I, "a directory that comes twice in a layer"),
        "ineffective-whiteout": Rule(_L, "a whiteout of a name that no lower layer has"),
        "ineffective-opaque": Rule(_I, "an opaque marker where lower layers have nothing to hide"),
        "odd-marker": Rule(_M, "a whiteout that is no empty file"),
        "same-size-and-time": Rule(_H, "a file with other content but the size and time of the version before"),
        "late-time": Rule(_L, "a time later than its layer was made"),
        "trailing-archive": Rule(_H, "another archive behind the end of a layer's"),
        "trailing-data": Rule(_M, "data behind the end of a layer's archive"),
        "trailing-estargz": Rule(_I, "a table of contents of eStargz behind the end of a layer's archive"),
        "unreadable": Rule(_H, "a file whose data is not there, or cannot be read"),
    }
)
"""Every rule by its name, but for those of warnings."""

SAME_SIZE_AND_TIME: Final = "same-size-and-time"

_WARNINGS: Final[Mapping[str, Severity]] = {
    **dict.fromkeys(("C3", "C4", "D6", "D13", "T13"), _H),
    **dict.fromkeys(("C5", "C8", "D3", "D10", "D11", "H6", "L1", "L2", "L3", "L4", "T14", "T15", "T17", "W15"), _M),
    **dict.fromkeys(("C2", "D5", "D7", "H2", "H5"), _I),
}
"""Severity of the warnings by a row of `ocifs.rules`; of all others LOW."""
_OWN: Final = frozenset({"T3", "T5"})
"""Rows whose warnings are about what has rules here."""

_STANDARD_DEVICES: Final = frozenset({(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2)})
"""null, zero, full, random, urandom, tty, console, ptmx: what the OCI runtime specification has every runtime supply, and
console."""
_DEVICES: Final = (Kind.CHAR, Kind.BLOCK)
_OVERLAY: Final = (b"trusted.overlay.", b"user.overlay.")
_SPECIAL: Final = 0o6002
"""setuid, setgid, written by others."""
_STICKY: Final = 0o1000
_WRITABLE: Final = 0o022
_MAX_ACCOUNTS: Final = 4 << 20
"""Bytes of the largest passwd or group file that is read."""


class Finding(msgspec.Struct, frozen=True, gc=False):
    """One thing about a version of a path; about a layer if ``path`` is None, about the image if ``layer`` is 0, too."""

    severity: Severity
    rule: str
    path: bytes | None
    """Without a leading slash."""
    layer: int
    entry: int
    """From 0; -1 if it is about none, or it is not known about which."""
    visible: bool
    """Whether the image shows what it is about."""
    message: str


def audit(examination: Examination, warnings: Iterable[Warned]) -> Iterator[Finding]:
    """Give every finding: of image and layers, then by path, but those by `SAME_SIZE_AND_TIME` as soon as they are sure.

    ``warnings`` are those of the image opened under examination (`ocifs.image.Image.warnings`).
    """
    yield from _warned(examination, warnings)
    for layer in examination.layers:
        yield from _trailing(examination, layer.number)
    auditor = _Auditor(examination)
    candidates: list[tuple[Version, Version]] = []
    for _, versions in examination.history.paths():
        yield from _of_name(versions)
        by_entry = {(version.layer, version.entry): version for version in versions} if len(versions) > 1 else {}
        for version in versions:
            yield from auditor.findings(version, by_entry)
        if len(versions) > 1:
            candidates += _unchanged_outside(versions)
            if len(candidates) >= BATCH:
                yield from _changed_inside(examination, candidates)
                candidates = []
    yield from _changed_inside(examination, candidates)


def _finding(rule: str, version: Version, message: str) -> Finding:
    visible = version.end is End.VISIBLE
    return Finding(RULES[rule].severity, rule, version.path, version.layer, version.entry, visible, message)


# -- image and layers ----------------------------------------------------------------------------------------------


def _warned(examination: Examination, warnings: Iterable[Warned]) -> Iterator[Finding]:
    for warned in warnings:
        if warned.rule in _OWN:
            continue
        path = b"/".join(part for part in warned.path.split(b"/") if part not in (b"", b".")) if warned.path else None
        visible = path is not None and any(
            version.layer == warned.layer and version.end is End.VISIBLE for version in examination.history.of(path)
        )
        rule = f"rule-{warned.rule}" if warned.rule else "rule-none"
        yield Finding(_WARNINGS.get(warned.rule, _L), rule, path, warned.layer, -1, visible, warned.message)


_TRAILING: Final = {
    RegionKind.TRAILING_TAR: "trailing-archive",
    RegionKind.TRAILING_DATA: "trailing-data",
    RegionKind.ESTARGZ_TOC: "trailing-estargz",
}


def _trailing(examination: Examination, layer: int) -> Iterator[Finding]:
    try:
        for region in behind_the_end(examination, layer):
            rule = _TRAILING.get(region.kind)
            if rule is not None:
                where = f"{region.size} bytes at layer offset {region.layer_offset}: {region.note}"
                first = f", the first of them {region.path.decode(errors='backslashreplace')}" if region.path else ""
                yield _of_layer(rule, layer, where + first)
    except DamagedError as error:
        yield _of_layer("unreadable", layer, str(error))


def _of_layer(rule: str, layer: int, message: str) -> Finding:
    return Finding(RULES[rule].severity, rule, None, layer, -1, visible=False, message=message)


# -- one version ---------------------------------------------------------------------------------------------------


def _of_name(versions: list[Version]) -> Iterator[Finding]:
    """Give what is odd about a path's name, once for all its versions."""
    if versions[0].change is Change.MARKER:
        return
    odd = oddities(versions[0].path.rpartition(b"/")[2])
    if odd:
        shown = next((version for version in versions if version.end is End.VISIBLE), versions[-1])
        for rule, message in odd:
            yield _finding(rule, shown, message)


class _Auditor:
    """Looks at one version after the other."""

    def __init__(self, examination: Examination) -> None:
        self._users = _accounts(examination, b"etc/passwd")
        self._groups = _accounts(examination, b"etc/group")
        self._made = [created_ns(step) for step in examination.steps]

    def findings(self, version: Version, by_entry: Mapping[tuple[int, int], Version]) -> Iterator[Finding]:
        """Give what is to say about a version; ``by_entry`` are all of its path by layer and entry, if there are others."""
        if version.change is Change.MARKER:
            yield from _of_marker(version)
            return
        if version.entry < 0:
            return
        if version.end is End.OVERRIDDEN:
            yield _overridden(version, by_entry.get((version.layer, version.end_entry)))
        if version.unreadable:
            yield _finding("unreadable", version, "its data is not there: its layer breaks off, or it links to nothing")
        if version.mode & _SPECIAL:
            yield from _of_mode(version)
        if version.kind in _DEVICES:
            yield _of_device(version)
        if version.xattrs:
            yield from _of_attributes(version)
        if self._users is not None and version.uid not in self._users:
            yield _finding("unknown-user", version, f"user {version.uid} is not in /etc/passwd")
        if self._groups is not None and version.gid not in self._groups:
            yield _finding("unknown-group", version, f"group {version.gid} is not in /etc/group")
        made = self._made[version.layer - 1]
        if made is not None and version.mtime_ns > made + _cut_off(made):
            message = f"its time, {_time(version.mtime_ns)}, is later than its layer's, {_time(made)}"
            yield _finding("late-time", version, message)


def _accounts(examination: Examination, path: bytes) -> frozenset[int] | None:
    """Give the numbers in the third field of passwd(5) or group(5); None if there is no such file to read."""
    shown = next((version for version in examination.history.of(path) if version.end is End.VISIBLE), None)
    if shown is None or shown.kind != Kind.FILE or shown.unreadable or shown.size > _MAX_ACCOUNTS:
        return None
    try:
        lines = b"".join(examination.data(shown)).split(b"\n")
    except DamagedError:
        return None
    numbers = (fields[2] for line in lines if len(fields := line.split(b":", 3)) > 3)  # noqa: PLR2004 (there is a fourth)
    return frozenset(int(number) for number in numbers if number.isdigit() and len(number) <= 10) | {0}  # noqa: PLR2004 (digits of 2**32)


def _of_marker(version: Version) -> Iterator[Finding]:
    if version.end is End.OVERRIDDEN:
        yield _finding("overridden-entry", version, f"the whiteout comes again as entry {version.end_entry}")
    elif not version.hides:
        opaque = version.path.rpartition(b"/")[2] == b".wh..wh..opq"
        rule = "ineffective-opaque" if opaque else "ineffective-whiteout"
        what = "in its directory" if opaque else "under that name"
        yield _finding(rule, version, f"no lower layer has anything {what} to hide")
    what = _odd_marker(version)
    if what:
        yield _finding("odd-marker", version, f"the marker {what}")


def _odd_marker(version: Version) -> str:
    """Say what a marker is that is no empty file, and no device 0:0 either (rule W2); empty for all others."""
    if version.hard_link:
        return f"is a hard link to {version.target.decode(errors='backslashreplace')}"
    if version.kind == Kind.FILE:
        return f"holds {version.size} bytes, at layer offset {version.extents[0][2]}" if version.extents else ""
    if version.kind == Kind.CHAR and version.rdev == (0, 0):
        return ""
    return f"is of type {version.typeflag:#04x}"


def _overridden(version: Version, by: Version | None) -> Finding:
    if version.end_entry < 0:
        return _finding("overridden-entry", version, "a later entry of its layer makes a directory of its path")
    again = by is not None and by.kind == version.kind == Kind.DIR
    what = "comes again as" if by is not None else "is below what is overridden by"
    rule = "repeated-directory" if again else "overridden-entry"
    return _finding(rule, version, f"it {what} entry {version.end_entry}")


def _of_mode(version: Version) -> Iterator[Finding]:
    mode, text = version.mode, f"mode {version.mode:04o}, owner {version.uid}:{version.gid}"
    if version.kind == Kind.FILE:
        if mode & 0o4000:
            yield _finding("setuid", version, text)
        if mode & 0o2000:
            yield _finding("setgid", version, text)
        if mode & 0o6000 and mode & _WRITABLE:
            yield _finding("setuid-writable", version, text)
    elif version.kind == Kind.DIR and mode & 0o2000:
        yield _finding("setgid-directory", version, text)
    if mode & 0o002:
        if version.kind in (Kind.FILE, Kind.FIFO):
            yield _finding("world-writable-file", version, text)
        elif version.kind == Kind.DIR and not mode & _STICKY:
            yield _finding("world-writable-directory", version, text)


def _of_device(version: Version) -> Finding:
    standard = version.kind == Kind.CHAR and version.rdev in _STANDARD_DEVICES
    kind = "character" if version.kind == Kind.CHAR else "block"
    message = f"{kind} device {version.rdev[0]}:{version.rdev[1]}, mode {version.mode:04o}"
    return _finding("standard-device" if standard else "device", version, message)


def _of_attributes(version: Version) -> Iterator[Finding]:
    for name, value in version.xattrs:
        if name == XATTR:
            try:
                yield _finding("capability", version, capability_text(value))
            except ValueError as error:
                yield _finding("malformed-capability", version, str(error))
        elif name.startswith(_OVERLAY):
            yield _finding("overlay-attribute", version, name.decode(errors="backslashreplace"))


def _cut_off(made: int) -> int:
    """Give the nanoseconds by which the time of a layer may have been later: many builders cut it to the second."""
    return 10**9 - 1 if made % 10**9 == 0 else 999


def _time(time_ns: int) -> str:
    seconds, nanoseconds = divmod(time_ns, 10**9)
    fraction = f".{nanoseconds:09}" if nanoseconds else ""
    try:
        return datetime.datetime.fromtimestamp(seconds, tz=datetime.UTC).strftime(f"%Y-%m-%dT%H:%M:%S{fraction}Z")
    except (ValueError, OverflowError, OSError):
        return f"@{seconds}{fraction}"


# -- two versions --------------------------------------------------------------------------------------------------


def _unchanged_outside(versions: list[Version]) -> list[tuple[Version, Version]]:
    """Give the files that follow upon one of the same size and time, and may have other content."""
    files = [
        version
        for version in versions
        if version.kind == Kind.FILE and version.change in (Change.ADDED, Change.CHANGED)
    ]
    return [
        (before, after)
        for before, after in itertools.pairwise(files)
        if (before.size, before.mtime_ns) == (after.size, after.mtime_ns)
        and before.extents != after.extents
        and not before.unreadable
        and not after.unreadable
    ]


def _changed_inside(examination: Examination, pairs: list[tuple[Version, Version]]) -> Iterator[Finding]:
    """Read the files, and say which have other content."""
    found = digests(examination, [version for pair in pairs for version in pair])
    for (before, after), one, other in zip(pairs, found[::2], found[1::2], strict=True):
        for version, digest in ((before, one), (after, other)):
            if isinstance(digest, DamagedError):
                yield _finding("unreadable", version, str(digest))
        if isinstance(one, bytes) and isinstance(other, bytes) and one != other:
            same = f"the same size, {after.size}, and time, {_time(after.mtime_ns)}"
            yield _finding(SAME_SIZE_AND_TIME, after, f"other content than in layer {before.layer}, and {same}")
