"""Ordered layers to one tree: every rule about whiteouts, types, parents and links lives here and nowhere else.

Pure: values in, values out. Not here: how a tar header is read (`ocifs.tar`), how a tree is written (`ocifs.erofs`).
The rows (W1, T5, H3, …) are those of `ocifs.rules`.

Theory
======

**A layer is a tree of its own first.** Its entries are applied in stream order to an empty tree, the *upper*; the
tree of all layers below, the *lower*, is only looked at. When the stream ends the upper is complete, and one walk over
it combines the two. No name of the lower changes before that. What follows from this alone:

- Whiteouts and opaque markers are not names in the upper but notes beside its directories. They are used only in the
  combination, so they act on the lower and never on their own layer, wherever in the stream they stand (W3 to W8, W11,
  W12, W16), and a hard link still finds what its own layer hides (H3).
- Only the final state of the upper meets the lower. A name that was a file and then a directory in one layer (T3, T5)
  is a directory there, and merges with a lower directory as any other does (T1).
- A lower symlink is no directory of the upper, so a path through it makes a directory that replaces it (T8, T9, T11);
  a symlink of the same layer is there and is followed, clamped at the root (T10). The option to follow lower ones asks
  where they led before the layer; a whiteout of such a symlink counts from its place in the stream, as when unpacking.
- A parent that no entry names is made *implied* (``origin.entry == -1``). It has attributes of its own only if the
  combination finds no lower directory to take them from (T6, T7, W7, W14).

**Combination.** Depth first, over directories that exist on both sides. Names hidden by a whiteout, or all if the
directory is opaque, leave the lower directory; then each upper name is put into it: a directory onto a directory is
visited in turn, anything else replaces what was there. An upper subtree without a counterpart moves as a whole. The
cost is that of the upper, however large the lower or the hidden part is. A device 0:0 (W20) stays an ordinary name
of the upper until its stream has ended (a hard link to it is another one: overlayfs itself links its whiteouts), then
becomes a note like the rest.

**W8.** An implied directory that holds nothing but markers, below a name which its own layer whites out, is not made.
Anywhere else it is (W10), also when an opaque marker hides its lower counterpart: overlay mounts show it.

**Hard links** bind when their entry is read (H4), to the upper as it is at that moment, else to the lower as it was
before the layer (H2, H3). Parents may be symlinks of either; the last component is not followed (H1). ``..`` in a target
is text, as in a path: Docker, Podman and umoci take it so, containerd asks the file system. A target not found then is
looked for again at the end of the stream (H5): a placeholder takes the name, so that what follows can replace it or link
to it, and is exchanged for the target at the end. Placeholders may wait for one another: they are settled depth first
with an explicit stack, each once, and a circle is a missing target (H6). Every link must find its target, also one that
was replaced later in the layer. Names share one `Node`, so the header of a link applies to all (H7): mode (not of a
symlink), owner, time, and its xattrs one by one; last in the stream wins, which for a link settled at the end means its
own place in the stream.

**Beyond the rows**, where they are silent and Linux sets a limit:

==  ==================================================================================================================
L1  a path longer than 4,095 bytes (65,536 as spelt) is left out with a warning, like a name over 255 (T17): no engine
    can make it
L2  a symlink target that is empty or over 4,095 bytes is refused, for engines fail; examined, it is a file that reads
    EIO
L3  over 255 symlinks on one path, or symlinks of over 4,194,304 components followed in one layer: on the way to a
    parent refused (examined: left out), on the way to the target of a hard link missing (H6)
L4  xattrs that are shown: a name over 255 bytes or with nothing behind its namespace, a value over 65,535 bytes, more
    than 65,536 bytes of names and values: refused, for engines fail; left out under examination
L5  over 1,048,576 implied directories in one layer, or four times as many in all layers together: refused always,
    because 4 KiB of tar can ask for 2,048 of them
==  ==================================================================================================================

The mode of a symlink is 0777 whatever its header says: Linux keeps no other.

Hostile input: no recursion; no step is repeated for an earlier entry (the cache of directories is dropped when a name
in it changes its kind, which costs no more than filling it did); a thousand warnings of one rule in one layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import msgspec

from ocifs.overlay.combination import combine
from ocifs.overlay.mount_points import add_mount_points
from ocifs.overlay.upper import Upper
from ocifs.rules import RULES_VERSION, MergeOptions
from ocifs.tree import Kind, Node, Origin, Tree

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ocifs.tar import Damage, Entry, Noticed

__all__ = ["RULES_VERSION", "LayerInput", "Merge", "MergeOptions", "Observer", "merge"]


class LayerInput(msgspec.Struct, frozen=True):
    """One layer to merge. ``entries`` is gone through once, in stream order."""

    number: int
    """From 1, the base."""
    entries: Iterable[Entry]
    damage: Damage | None = None
    """Where the tar breaks off: refused, or a warning under examination, where the entries before it are used."""
    notices: Iterable[Noticed] = ()


class Observer(Protocol):
    """Told what a layer takes from the lower tree, just before it happens: nodes still are as they were.

    ``path`` is the path in the tree, without a leading slash. A removed or replaced directory comes once, not once for
    everything in it. Not reported: names that are new, and attributes that a hard link gives to a lower file (H7).
    """

    def read(self, upper: Upper) -> None:
        """A layer was read, and will be put onto the lower tree next. ``upper.places`` are there."""

    def removed(self, layer: int, path: bytes, node: Node, by: Origin) -> None:
        """``node`` is hidden by the entry ``by``: a whiteout of its name, or the opaque marker of its directory."""

    def replaced(self, layer: int, path: bytes, old: Node, new: Node) -> None:
        """Where ``old`` is, ``new`` will be; of two directories ``old`` stays, with the attributes of ``new``."""


def merge(layers: Sequence[LayerInput], options: MergeOptions | None = None) -> Tree:
    """Merge ``layers``, the base first, and make the mount points that the options name.

    Raises `DamagedError` for what a rule refuses, unless examining.
    """
    merging = Merge(options)
    for layer in layers:
        merging.apply(layer)
    add_mount_points(merging.tree.root, merging.options.mount_points)
    return merging.tree


class Merge:
    """A merge that can stop after any layer: `apply` them in order, read `tree` whenever one is complete.

    The tree is the same object all the time and changes with each layer. A refused layer leaves it unusable.
    """

    def __init__(self, options: MergeOptions | None = None, observer: Observer | None = None) -> None:
        """Begin with an empty root. Without ``observer`` nothing is spent on one."""
        self.options = options or MergeOptions()
        self.tree = Tree(Node(Kind.DIR, Origin(1, -1), children={}))
        self._observer = observer
        self._applied = 0
        self._implied = 0

    def apply(self, layer: LayerInput) -> None:
        """Put ``layer`` on top. Raises `DamagedError` for what a rule refuses, unless examining."""
        if self._applied and self.options.single_layer:
            raise ValueError("a layer shown alone cannot be put on another")
        if not self._applied:
            self.tree.root.origin = Origin(layer.number, -1)
        self._applied += 1
        places = self._observer is not None
        upper = Upper(layer, self.tree, self.options, places=places, implied=self._implied)
        upper.read(layer)
        self._implied += upper.implied
        upper.finish()
        if self._observer is not None:
            self._observer.read(upper)
        combine(self.tree.root, upper, self._observer)
