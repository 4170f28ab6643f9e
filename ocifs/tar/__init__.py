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

=========  ==============================================================================
`scanner`  `TarScanner`
`entry`    what comes out: entries, notices, damage, the summary
`header`   the header block: fields, types, numbers, checksum
`pax`      the records of PAX headers
`sparse`   the maps of sparse files, in three dialects
=========  ==============================================================================
"""

from ocifs.tar.entry import (
    EXTENSION_LIMIT,
    NOTICE_LIMIT,
    Damage,
    Entry,
    EntryType,
    Noticed,
    TarSummary,
    Trailing,
)
from ocifs.tar.header import BLOCK_SIZE, header_size
from ocifs.tar.scanner import TarScanner

__all__ = [
    "BLOCK_SIZE",
    "EXTENSION_LIMIT",
    "NOTICE_LIMIT",
    "Damage",
    "Entry",
    "EntryType",
    "Noticed",
    "TarScanner",
    "TarSummary",
    "Trailing",
    "header_size",
]
