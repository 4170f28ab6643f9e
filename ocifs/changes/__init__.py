"""What a container changed: the upper directory of a kernel overlay above an image, read, listed, and made a layer.

=============  ========================================================================================================
`upper`        an upper directory, name by name: attributes, and what overlayfs has noted there for itself
`merged`       upper directory and image side by side: every name that is there, gone or brought along, in archive order
`differences`  that as a list of what was added, changed and deleted
`layer`        that as a layer: tar bytes, compressed, with both digests
`recipe`       the configuration and manifest of the new image
`layout`       an OCI layout that is written to so that nobody ever sees half of anything
`commit`       all of it in order
=============  ========================================================================================================

Who is asked what is there. The overlay itself is not: it may be unmounted by now. What it would show follows from the
upper directory and the image (`merged`), as overlayfs computes it: Documentation/filesystems/overlayfs.rst and
fs/overlayfs/namei.c of the kernel.

What a layer of it says is what every engine reads (OCI image specification, layer.md): ``.wh.NAME`` for a name that is
gone, ``.wh..wh..opq`` for a directory of which nothing lower is left.

Not here: where a bundle keeps its upper directory (`ocifs.bundle`), reading layers (`ocifs.overlay`).
"""

from __future__ import annotations

from ocifs.changes.commit import Committed, commit
from ocifs.changes.differences import Difference, Sign, differences
from ocifs.changes.layer import PACKINGS, Packing
from ocifs.changes.layout import Destination
from ocifs.changes.merged import Merged
from ocifs.changes.recipe import Recipe, parse_change
from ocifs.changes.upper import Namespace, Upper

__all__ = [
    "PACKINGS",
    "Committed",
    "Destination",
    "Difference",
    "Merged",
    "Namespace",
    "Packing",
    "Recipe",
    "Sign",
    "Upper",
    "commit",
    "differences",
    "parse_change",
]
