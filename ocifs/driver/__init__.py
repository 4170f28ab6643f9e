"""How an image reaches the kernel: the ``fuse`` driver, the ``erofs`` driver, and which of them can work here.

``fuse``
    One FUSE session at the mount point; every name, attribute and byte is asked of this process (`ocifs.fuse.Adapter`).
    Works everywhere, without root too, and can show what only ocifs knows (examination).

``erofs`` (root, Linux ≥ 6.12)
    The kernel's EROFS reads the image tree itself, so names, attributes, links and xattrs cost no round trip; FUSE is
    asked only for data, in large pieces. Its files come from a FUSE session at a private place (`ocifs.fuse.DeviceAdapter`),
    which is detached as soon as EROFS has them open. What remains is one mount, and unmounting it ends everything: EROFS
    closes its files, with the last of them the detached FUSE mount goes, and the kernel ends our session.

Which of them
    EROFS must be trusted to answer EIO when a device fails. Some kernels fill the page with zeros instead and keep it:
    wrong bytes for everyone. So `auto` takes ``erofs`` only after `probe` has seen a failing device answered with EIO on
    this very kernel; what it saw is kept until the next boot.

Concurrency contract
    One thread runs trio and pyfuse3. Everything that makes the kernel ask us something in return (mounting EROFS, stat of
    the mount point, unmounting) runs in a worker thread, or we would wait for ourselves.
    pyfuse3 reads the FUSE descriptor with the GIL held; `session.Waits` says what follows from that.

=========  ================================================================
`serving`  the two drivers
`session`  what both do: a FUSE session, its signals, its traps
`options`  mount options
`choice`   which driver
`probing`  what this kernel's EROFS makes of a device that fails
=========  ================================================================
"""

from ocifs.driver.choice import DRIVERS, EROFS_SINCE, choose, erofs_verdict
from ocifs.driver.options import check_allowed, check_options, evidence_options, others_allowed
from ocifs.driver.probing import Verdict, probe
from ocifs.driver.serving import serve_erofs, serve_fuse
from ocifs.driver.session import Keeper, Statistics

__all__ = [
    "DRIVERS",
    "EROFS_SINCE",
    "Keeper",
    "Statistics",
    "Verdict",
    "check_allowed",
    "check_options",
    "choose",
    "erofs_verdict",
    "evidence_options",
    "others_allowed",
    "probe",
    "serve_erofs",
    "serve_fuse",
]
