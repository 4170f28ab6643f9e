"""Random small layers full of collisions, for Hypothesis: markers, odd spellings, links to whatever there is.

Not here: what they should merge to (`tests.support.naive_merge`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import strategies as st

from ocifs.tar import Entry, EntryType

if TYPE_CHECKING:
    from collections.abc import Iterable

PLAIN = [b"a", b"b", b"c", b"a/b", b"a/c", b"b/a", b"b/c", b"c/a", b"a/b/c", b"b/a/c", b"c/b/a"]
MARKERS = [
    *(b".wh.a", b".wh.b", b".wh.c", b"a/.wh.b", b"b/.wh.a", b"a/b/.wh.c", b"a/c/.wh.a"),
    *(b".wh..wh..opq", b"a/.wh..wh..opq", b"b/.wh..wh..opq", b"a/b/.wh..wh..opq"),
]
ODD = [
    *(
        b"./a",
        b"/b/",
        b"a//b/.",
        b"c/../a/b",
        b"../a",
        b"a/../../b/c",
        b".",
        b"./",
        b"",
        b".wh.",
        b"a/.wh..",
        b"b/.wh...",
    ),
    *(b".wh.a/b", b"a/.wh.b/c", b".wh..wh..opq/a"),
    *(b".wh..wh.aufs", b".wh..wh.plnk/1", b".wh..wh.plnk/2", b"a/.wh..wh.b"),
]
PATHS = st.sampled_from(PLAIN * 8 + MARKERS * 2 + ODD)
TARGETS = st.sampled_from(
    PLAIN * 4
    + [b"/a", b"./b", b"../c", b"..", b".", b"/", b"a/../b", b"b/../../c/a", b"a/b/..", b"c/nowhere", b".wh..wh.plnk/1"]
    + [b"/.wh..wh.plnk/2"]
)
SORTS = st.sampled_from(
    [(EntryType.FILE, (0, 0))] * 5
    + [(EntryType.DIR, (0, 0))] * 4
    + [(EntryType.HARDLINK, (0, 0))] * 6
    + [(EntryType.SYMLINK, (0, 0))] * 4
    + [(EntryType.CHAR, (0, 0)), (EntryType.CHAR, (1, 3)), (EntryType.FIFO, (0, 0)), (EntryType.OTHER, (0, 0))]
)
XATTRS = [
    (),
    ((b"user.x", b"1"),),
    ((b"user.y", b"2"), (b"user.x", b"3"), (b"user.y", b"4"), (b"trusted.z", b"5"), (b"user.overlay.o", b"")),
]
HEADERS = st.sampled_from([(mode, uid, size, xattrs) for mode, uid, size in [(0o644, 0, 1), (0o755, 1, 0), (0o4711, 2, 7)]
                           for xattrs in XATTRS])  # fmt: skip
LAYERS = st.lists(st.lists(st.tuples(PATHS, SORTS, TARGETS, HEADERS), max_size=8), min_size=1, max_size=4)
Drawn = tuple[bytes, tuple[EntryType, tuple[int, int]], bytes, tuple[int, int, int, tuple[tuple[bytes, bytes], ...]]]


def numbered(layer: Iterable[Drawn]) -> list[Entry]:
    """Make entries, each with offsets and a time of its own, so that its data can be told from all others."""
    return [
        Entry(
            path=path,
            type=kind,
            typeflag=0x30 + kind,
            mode=mode,
            uid=uid,
            gid=uid,
            mtime_ns=number,
            size=size if kind == EntryType.FILE else 0,
            header_offset=1024 * number,
            data_offset=1024 * number + 512,
            stored_size=size if kind == EntryType.FILE else 0,
            link=target if kind in (EntryType.HARDLINK, EntryType.SYMLINK) else b"",
            rdev=rdev,
            xattrs=xattrs,
        )
        for number, (path, (kind, rdev), target, (mode, uid, size, xattrs)) in enumerate(layer)
    ]
