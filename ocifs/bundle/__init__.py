"""Bundles: directories that runc and its like start a container from, with an image's file system mounted in them.

================  =====================================================================================================
`users`           who ``User`` is: the image's own passwd and group, read through its tree
`base`            what ``config.json`` says before an image has its say
`config`          what an image makes of it
`patch`           what ``--config-patch`` makes of that
`overlayfs`       the writable layer
`state`           ``ocifs.json``: what a bundle is made of
`lifecycle`       making a bundle, whole or not at all, and ending it
`namespace`       a user namespace, for who is not root
`containers`      running one container in the foreground, and leaving nothing behind
================  =====================================================================================================

A bundle's directory is its owner's alone (mode 0700), because an image may have files that make whoever runs them root:

===================  ==================================================================================================
``config.json``      for the runtime; written last
``ocifs.json``       see `State`; written first
``rootfs``           the container's root: an overlay, or with ``--read-only`` the image itself
``lower``            the image, mounted below that overlay
``upper``, ``work``  the overlay's own: what containers changed. With ``--upper PLACE`` both are in PLACE, beside a file
                     ``image`` with the manifest digest of the image that they belong to; or PLACE is a bundle that has
                     been ended. PLACE is its owner's alone as well
``memory``           with ``--ephemeral`` a tmpfs, and ``upper`` and ``work`` in it
===================  ==================================================================================================

Mount points that the image lacks are in the tree that is mounted (`ocifs.overlay.mount_points`), so that a read-only root
works and the upper directory holds nothing but what containers changed.

How many file systems can lie above one another: two (`ocifs.bundle.overlayfs.STACKING_MAX`). A bundle's overlay is one.
Some kernels count EROFS as another: there a further overlay, as ``podman run --rootfs DIR:O`` or a container engine
inside the container makes it, is refused under the ``erofs`` driver and has room under ``fuse``.
"""

from __future__ import annotations

from ocifs.bundle.lifecycle import Plan, end_bundle, make_bundle
from ocifs.bundle.state import State, load

__all__ = ["Plan", "State", "end_bundle", "load", "make_bundle"]
