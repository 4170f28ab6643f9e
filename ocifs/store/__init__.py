"""Our own cache on disk: layer indexes, re-framed copies, image trees; atomic, locked, bounded.

What it is: a directory of immutable files, each named by kind and key. A file appears under its name only when it is
whole (written elsewhere, then renamed), so a process killed at any moment leaves nothing that could be mistaken for an
entry; what it leaves in ``tmp`` is removed by the next one that opens the store.

What it is not: it does not know what is in its files. Every format kept here carries its own version and checksums and is
checked by its reader when used; a reader that finds an entry stale or damaged asks for it to be built again.

Layout, below the cache directory (mode 0700)::

    layers/KEY      layer indexes           (`ocifs.layer_index`)
    reframed/KEY    re-framed copies        (`ocifs.layer_index`): as large as a layer, the first to be evicted
    trees/KEY       image trees             (`ocifs.image_tree`)
    histories/KEY   images' histories       (`ocifs.history`)
    archives/KEY    what a compressed outer archive hashed to, by file identity (`ocifs.image`)
    locks/KIND.KEY  taken exclusively by the one process that builds an entry
    tmp/            files being written, each locked by its writer

Locks are flock(2) locks: they vanish with their process. An entry in use is locked shared by whoever has it open, and
`gc` and `clear` take only what they can lock exclusively. A reader that loses the race (opened, not yet locked, unlinked)
still holds a whole file: entries are never changed in place.

Such a lock belongs to the open file, which a child forked meanwhile has open, too. So an exclusive lock is never given up
by closing alone, which would leave it with every index pass that happens to run, but by unlocking.

What is swept
    Opening the store removes from ``tmp`` and ``locks`` what killed processes left: files that nobody has locked.
    A process that added entries looks at the total once, when it has opened what it wanted or closes the store: what
    exceeds `DEFAULT_LIMIT` (or the environment's ``OCIFS_CACHE_SIZE``) is evicted, re-framed copies first and least
    recently used first (`Store.keep_bounded`). What is in use never is, so the limit can be exceeded by that.

Trust: whoever can write this directory decides what root's kernel mounts. So a cache that belongs to somebody else, or
that group or others can write, is refused, and so is somebody else's symbolic link to one. Everything is reached through
the directory's descriptor, not its path.

===========  =====================================================================================
`directory`  `Store`: the directory, what is in it, what is swept and evicted
`entries`    its files: one that is read, one that is written, and the right to build one
===========  =====================================================================================
"""

from ocifs.store.directory import DEFAULT_LIMIT, Freed, Listed, Store, default_path, size_limit
from ocifs.store.entries import BuildLock, Kind, NewFile, StoredFile

__all__ = [
    "DEFAULT_LIMIT",
    "BuildLock",
    "Freed",
    "Kind",
    "Listed",
    "NewFile",
    "Store",
    "StoredFile",
    "default_path",
    "size_limit",
]
