"""The image tree as an EROFS image: writing one from a `tree.Tree`, reading one in place.

EROFS is a read-only file system of the Linux kernel with a published format. ocifs keeps merged trees in it because the
kernel can then mount them, and because it can be read where it lies: an inode is found by arithmetic, a name by binary
search, so opening costs the same for ten files as for a million, and nothing is held in memory.

Which of the format's many shapes we use (sources: the kernel's ``Documentation/filesystems/erofs.rst``,
``fs/erofs/erofs_fs.h`` and the checks in ``super.c``, ``inode.c``, ``dir.c``, ``namei.c``, ``xattr.c``, ``data.c``):

* Blocks of 512 bytes (Linux ≥ 6.4), because file data in a tar starts at multiples of 512. So a file's content needs no
  copy: its *chunk index* names a device and a block number, device *i* being layer *i*'s uncompressed tar. The kernel
  reads whole blocks: a tar that ends within one must be served with zeros behind it, up to the device's size.
  The alternative, blocks of 4 KiB and devices in which every file is moved to the next multiple, was measured with an
  image of such blocks that the same daemon served: `tar` of the tree, cached, took 0.77 s instead of 0.88, small files 5.8
  µs instead of 5 (st_blksize, 512 or 4096, is what stdio takes as its buffer, but few programs that read much use stdio).
  That does not pay for a table to be searched at every read, and for two ways to say where data lies.
* Extended inodes of 64 bytes (times to the nanosecond, 32-bit owners, 64-bit sizes). An inode's number is its *nid*: its
  position in units of 32 bytes from the start of the metadata area. The root has nid 1.
* A file whose data is one run that starts at a multiple of 512 is one chunk. Any other file with data or holes is cut in
  chunks of equal size; chunks without data are holes, the others lie on one more device, the *synthetic device*, numbered
  layers + 1, which exists only as a list of `SyntheticExtent`: what is in no extent reads as zeros.
* Directories hold ``.`` and ``..`` as ordinary entries, sorted bytewise with the others. Extended attributes lie behind
  their inode, none are shared. Inodes of one directory's children are neighbours, in the order of their names.

Not here: where layers are and how their bytes are had, what surrounds the EROFS image in the kept file
(`ocifs.image_tree`), any decision about what the tree is (`ocifs.overlay`). No file is opened. Writing is
`ocifs.erofs.writer`, which this package does not import: a mount whose tree is kept starts without it.
"""

from __future__ import annotations

from ocifs.erofs.layout import BLOCK_SIZE, ROOT_NID
from ocifs.erofs.reader import DirectoryEntry, Image, Inode, Run

__all__ = [
    "BLOCK_SIZE",
    "ROOT_NID",
    "DirectoryEntry",
    "Image",
    "Inode",
    "Run",
]
