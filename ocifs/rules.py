"""The layer rules: what the merged tree of an image is, row by row.

The OCI image specification (``layer.md``) comes first. Where it is silent, ocifs shows what the overlay family shows
(containerd's overlayfs, Docker's overlay2, Podman's overlay: what containers really see), not what unpacking one layer
over the other leaves (umoci, vfs). On ordinary images they all agree; the rows are about the others. "≠" names engines
that do something else.

Warnings and refusals name their row, and every row has a test of its name: `test_w5_…` (``tests/test_architecture.py``
checks that). "Refused" means that the image or layer cannot be mounted; under examination (``--examine``, and when a layer
is shown alone) it becomes a warning.

W: whiteouts. T: types, parents, paths. H: hard links. D: tar dialects. C: compression, documents, sources. L: limits that
a hostile image meets first.

Not here: the rules' code. W, T and H live in `ocifs.overlay`, D in `ocifs.tar`, C in `ocifs.layer_index`, `ocifs.spec` and
`ocifs.sources`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import msgspec

RULES_VERSION: Final = 1
"""Part of the key of a kept tree: raise it whenever the same layers can come out differently."""

RULES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "W1": ".wh.NAME hides the lower NAME, file or whole directory; the marker itself is not shown",
        "W2": "a marker counts by its name alone: it may be a directory, a link, or have content",
        "W3": "NAME before .wh.NAME in one layer: this layer's NAME stays: whiteouts act on lower layers (≠ several)",
        "W4": ".wh.NAME before NAME in one layer: the same",
        "W5": ".wh.DIR, then DIR/: the new directory without its lower children (≠ overlay)",
        "W6": "DIR/, then .wh.DIR: the same (≠ overlay)",
        "W7": ".wh.DIR, then DIR/new without an entry for DIR: the same, DIR being implied",
        "W8": ".wh.DIR together with DIR/.wh.old: nothing is left",
        "W9": "a whiteout of a name that no lower layer has is ignored",
        "W10": "a whiteout in a directory that nothing else names makes that directory, implied (≠ umoci)",
        "W11": ".wh..wh..opq, wherever it stands in the stream, hides all lower children and none of this layer's",
        "W12": "the opaque marker after children whose parents were implied: the children stay",
        "W13": "an opaque marker in the root hides everything lower (≠ overlay)",
        "W14": "an opaque marker without an entry for its directory: the lower directory's attributes stay",
        "W15": ".wh. alone, .wh.. and .wh... name nothing that could be hidden: the layer is refused",
        "W16": "a whiteout in the base layer is not shown and hides nothing",
        "W17": "a directory component that begins with .wh. in a longer path is an ordinary implied directory",
        "W18": "AUFS' own names at the root (.wh..wh.*, but not the opaque marker) are not shown; links into them resolve",
        "W19": "AUFS' own names elsewhere are not shown",
        "W20": "a character device 0:0 is a whiteout, as in an overlay's upper directory; an option shows it instead",
        "W21": "xattrs of overlayfs itself (trusted.overlay.*, user.overlay.*) are ignored and never shown",
        "T1": "a directory over a directory: the children merge, all attributes and xattrs are the upper one's",
        "T2": "anything else over a name: what was there is gone with all below it",
        "T3": "a file, then something below it in the same layer: the last one wins, with a warning",
        "T4": "something below a lower file: an implied directory takes the file's place (≠ umoci)",
        "T5": "a path twice in one layer: the last one wins (directories merge), with a warning",
        "T6": "a parent that no layer names: 0755, owned by 0:0, time 0",
        "T7": "a parent that only lower layers name keeps the lower attributes, its time too",
        "T8": "a path through a lower symlink is not followed: a directory takes its place (≠ umoci); an option follows",
        "T9": "the same with an entry for the directory",
        "T10": "a path through a symlink of the same layer is followed, never beyond the root",
        "T11": "a whiteout through a lower symlink: as T8, and what the symlink led to stays",
        "T12": "./x, /x, a/../x and x/ are normalised",
        "T13": "../x stays inside the root, with a warning",
        "T14": "an entry for the root gives it attributes, else 0755, 0:0, time 0; one that is no directory is refused",
        "T15": "an entry without a name is skipped, with a warning",
        "T16": "any byte but NUL and / may be in a name and is kept",
        "T17": "a name of more than 255 bytes stays in the layer index and out of the tree, with a warning",
        "T18": "any number of layers works",
        "H1": "a link's target is found inside the root, through symlinked parents; its last component is not followed",
        "H2": "a target that only a lower layer has: linked, the same inode, with a warning (≠ overlay, which fails)",
        "H3": "a target that this layer hides: found as it was before the layer, with a warning",
        "H4": "a link made before its target is replaced in the same layer keeps the earlier one",
        "H5": "a target that comes later in the layer is found at its end, with a warning",
        "H6": "a target that does not exist or is a directory: refused; under examination an entry that cannot be read",
        "H7": "mode, owner, time and xattrs of a link's header apply to the shared inode, the last one wins (≠ umoci)",
        "H8": "a size in a link's header is ignored: no data follows",
        "H9": "when one of two names goes, the other stays, and links are counted anew",
        "D1": "v7, ustar, star, GNU and PAX headers are read alike, their checksums signed or not",
        "D2": "the old type NUL with a trailing slash is a directory; type 0 with one is a file",
        "D3": "numbers in octal, base-256 and PAX; ids of 32 bits, sizes of 63, times to the nanosecond",
        "D4": "GNU long names: the last one counts, cut at its first NUL",
        "D5": "of several PAX headers in a row the last counts; an empty value leaves the ustar field as it is",
        "D6": "a NUL in a PAX path, a malformed record, a wrong checksum, truncated data: refused, with the offset",
        "D7": "PAX global headers are ignored",
        "D8": "sparse files of all dialects have holes, in bounds; volume labels and the like are skipped",
        "D9": "a negative time is 0",
        "D10": "xattrs: user.* and security.capability are shown, others on request; EROFS' limits apply",
        "D11": "setuid, setgid, sticky, devices and fifos are kept",
        "D12": "an empty layer, one without end blocks, one with a single zero block at its end: fine",
        "D13": "a single zero block and then more: refused",
        "D14": "two zero blocks end the archive; what follows counts in the diff ID and is listed to examiners only",
        "C1": "content says what a layer's compression is; a media type that says otherwise gets a warning",
        "C2": "several gzip members, several zstd frames, skippable frames: fine",
        "C3": "junk after the last gzip member: refused",
        "C4": "size, then digest, then diff ID are all checked when a layer is indexed",
        "C5": "sha256 and sha512 are known; any other algorithm is named in the error",
        "C6": "data embedded in a descriptor is used once it has been checked",
        "C7": "layers: null, foreign files in a layout and unknown media types in an index do no harm",
        "C8": "a rootfs type other than layers, or a wrong number of diff IDs: refused",
        "C9": "the platform's first match is taken, never an attestation; no match is an error that lists them",
        "C10": "what is no root file system (charts, attestations) shows its blobs as files; an encrypted layer is refused",
        "C11": "docker-archives of all writers: linked layers, keys in any case, compressed, hybrids, several images",
        "C12": "no name given: the only image there is, else an error that lists the names",
        "L1": "a path of more than 4095 bytes (65536 as spelt) is left out, with a warning",
        "L2": "a symlink target that is empty or longer than 4095 bytes: refused; examined, a file that cannot be read",
        "L3": "more than 255 symlinks on one path, or too much following in one layer: refused; examined, left out",
        "L4": "xattrs beyond what the kernel or EROFS can hold: refused; examined, left out",
        "L5": "more than 2**20 implied directories in one layer, or 2**22 in all: refused, always",
    }
)
"""Row → what it says, one clause each."""


class MountPoint(msgspec.Struct, frozen=True):
    """A path that something will be mounted on: a directory, or else a file."""

    path: bytes
    directory: bool = True


class MergeOptions(msgspec.Struct, frozen=True):
    """What changes a tree; every field is part of the key of a kept tree."""

    examine: bool = False
    """Warn where a rule refuses."""
    show_whiteout_devices: bool = False
    """Show char devices 0:0 instead of taking them as whiteouts (W20)."""
    follow_dirlinks: bool = False
    """Follow a lower symlink that leads to a directory where a path goes through it (T8, T11), as unpacking would."""
    all_xattrs: bool = False
    """Show the xattrs that are hidden by default (D10); overlayfs' own stay hidden (W21)."""
    single_layer: bool = False
    """One layer alone: merged as examined, its whiteouts shown as empty files named ``.wh.*``."""
    mount_points: tuple[MountPoint, ...] = ()
    """Made where the image lacks them, as from no layer: a container's read-only root needs them."""
