"""The contracts between images at rest and everything that reads them.

A *source* is a place that holds images: a layout directory, an archive, containerd's store. All of them answer the same
three questions (`Source`), and what they answer is made of the same values: `Offered`, `ResolvedImage`, `LayerBlob`.
The seam for bytes is `Blob`: random access, nothing else.

Nothing here or in the sources ever writes, creates, locks or renames anything where the images are.

Not here: how any source is laid out (the modules beside this one), decompression, caching.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec

from ocifs.spec import printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from ocifs.errors import OcifsError
    from ocifs.reference import Selector
    from ocifs.spec import Descriptor, DiffID, Digest, ImageConfig, Index, Manifest, Platform
    from ocifs.tree import Warned


class FileRange(NamedTuple):
    """Where stored bytes lie in an open file: ``size`` bytes from ``offset`` of descriptor ``fd``.

    The descriptor belongs to the blob and is valid until the blob is closed.
    """

    fd: int
    offset: int
    size: int


class Blob(Protocol):
    """Random access to stored bytes. Several threads may call `read_at` at once; one calls `close`, at the end."""

    @property
    def name(self) -> str:
        """For messages: the file's path, and the member inside an archive."""

    @property
    def size(self) -> int:
        """How many bytes there are."""

    def read_at(self, offset: int, size: int, /) -> bytes:
        """Give ``size`` bytes from ``offset``: fewer only at the end, none behind it. DamagedError if reading fails."""

    def file_range(self) -> FileRange | None:
        """Say where the bytes lie in a file on disk; None if they do not lie in one piece of one file."""

    def identity(self) -> str | None:
        """Say what tells these bytes, as they are now, from all others without reading them; None if nothing does."""

    def close(self) -> None:
        """Let go of the file. Further calls do nothing."""


class LayerBlob(msgspec.Struct, frozen=True, eq=False):
    """One layer as its source knows it. Holds no open file: `open` gives a blob that the caller closes.

    ``digest`` is of the stored bytes; None in a docker-archive, which does not say. ``diff_id`` is None only where the
    configuration does not give one: artifacts, and damaged images under examination, where either is also None if it
    is of an algorithm that cannot be computed (rule C5). ``size`` is what the descriptor
    says, or what is stored where there is no descriptor.
    """

    number: int
    """From 1, the base."""
    digest: Digest | None
    diff_id: DiffID | None
    media_type: str
    """Empty where the source does not say. The content decides anyway (rule C1)."""
    size: int
    descriptor: Descriptor | None
    problem: OcifsError | None
    """Why this layer cannot be part of a root file system: missing, encrypted, foreign, wrong size; or None."""
    opener: Callable[[], Blob]

    def open(self) -> Blob:
        """Open the layer as part of a root file system: raises ``problem`` if there is one."""
        if self.problem is not None:
            raise self.problem
        return self.opener()

    def open_stored(self) -> Blob:
        """Open the stored bytes whatever they are, to show or copy them; NotFoundError if there are none."""
        return self.opener()


class Offered(msgspec.Struct, frozen=True):
    """One image or artifact that a source lists, for `inspect` and for the message when a choice is needed."""

    number: int
    """Position among what the source lists, from 0: what ``:@N`` selects."""
    names: tuple[str, ...]
    """Every name that selects it: tags, image names; may be empty."""
    digest: Digest | None
    """Of the manifest or index; of the configuration in a docker-archive."""
    media_type: str
    size: int
    platform: Platform | None
    """As its descriptor says; None if it does not, or for an index of several."""
    artifact_type: str = ""

    def __str__(self) -> str:
        """Give name or number, platform and digest, for a message."""
        words = [printable(", ".join(self.names)) or f":@{self.number}"]
        if self.platform is not None:
            words.append(str(self.platform))
        if self.digest is not None:
            words.append(str(self.digest))
        return " ".join(words)


class ResolvedImage(msgspec.Struct, frozen=True, eq=False):
    """One image, chosen and verified: documents as read, and layers ready to be opened.

    For an artifact ``artifact`` says what it is (`ocifs.spec.artifact_kind`), ``config`` may be None, and its layers
    can be read as blobs but never mounted (rule C10).
    """

    source: str
    """Where it came from, as a phrase for messages: ``OCI layout /path``."""
    name: str | None
    """The tag or image name by which it was found."""
    index: Index | None
    """The outermost index it was chosen from; None if a manifest was named directly."""
    platforms: tuple[Descriptor, ...]
    """Every manifest below that index, attestations included, in order: what there was to choose from."""
    manifest: Manifest | None
    """None in a docker-archive, which has no manifest in this sense."""
    manifest_raw: bytes
    """As stored; in a docker-archive its manifest.json."""
    manifest_digest: Digest | None
    config: ImageConfig | None
    config_raw: bytes
    config_digest: Digest
    layers: tuple[LayerBlob, ...]
    artifact: str | None
    warnings: tuple[Warned, ...]


class Source(Protocol):
    """A place that holds images. Opened by `ocifs.sources.open_source`, closed by whoever opened it.

    Layers can be opened, and blobs that were opened can be read, after `close`.
    """

    @property
    def description(self) -> str:
        """What this is and where, as a phrase for messages: ``OCI layout /path``."""

    def names(self) -> tuple[Offered, ...]:
        """List what there is, in the source's order."""

    def resolve(self, selector: Selector, platform: Platform | None = None, *, examine: bool = False) -> ResolvedImage:
        """Choose one image and verify its documents: size first, then digest, then content.

        ``platform`` None means this machine's. Under ``examine`` what does not agree (sizes, digests, rule C8)
        becomes a warning where the image can still be read. NotFoundError names what there is.
        """

    def close(self) -> None:
        """Let go of what the source holds open."""
