"""From a list of descriptors and a store of blobs to one verified image.

A source that has OCI-shaped documents implements the minimum, `BlobStore` and its list of `Top` descriptors; the rest
is computed here once: names, digests and positions (rule C12), nested indexes and platforms (rule C9), embedded data
(rule C6), sizes and digests before anything is believed (rule C4), and what may become a warning under examination.

A nested index that is missing is passed over while something else matches: stores often hold only the platform that
somebody pulled. Each document is read at most once, and an index met inside itself is an error, so the walk ends.

Not here: where the blobs are.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

import msgspec

from ocifs.errors import DamagedError, NotFoundError, OcifsError, UnsupportedError, UsageError
from ocifs.sources.base import Blob, LayerBlob, Offered, ResolvedImage
from ocifs.sources.blob import BytesBlob
from ocifs.sources.names import same_name
from ocifs.spec import (
    DOCUMENT_TYPES,
    INDEX_TYPES,
    MAX_DOCUMENT_SIZE,
    Descriptor,
    DiffID,
    Digest,
    ImageConfig,
    Index,
    Manifest,
    Platform,
    artifact_kind,
    parse_config,
    parse_document,
    printable,
)
from ocifs.tree import Warned

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ocifs.reference import Selector

_MAX_DEPTH: Final = 16
"""Indexes inside indexes that are followed. The spec gives no limit; nobody nests more than two."""

_MAX_LISTED: Final = 20
"""Names in a message."""

_MAX_PROBED: Final = 64
"""Manifests that are read to find the only image among artifacts."""


_D = TypeVar("_D", Digest, DiffID)


class BlobStore(Protocol):
    """The minimum: blobs by digest."""

    @property
    def description(self) -> str:
        """See `Source.description`."""

    def size_of(self, digest: Digest) -> int:
        """Bytes stored under ``digest``; NotFoundError, naming digest and place, if there are none."""

    def open_digest(self, digest: Digest) -> Blob:
        """Open what is stored under ``digest``; errors as `size_of`."""


class Top(msgspec.Struct, frozen=True):
    """One descriptor that a source lists, and the names that select it."""

    names: tuple[str, ...]
    descriptor: Descriptor


def offered(tops: Sequence[Top]) -> tuple[Offered, ...]:
    """Give the list of what there is, as `Source.names` has it."""
    return tuple(
        Offered(
            number,
            top.names,
            top.descriptor.digest,
            top.descriptor.media_type,
            top.descriptor.size,
            top.descriptor.platform,
            top.descriptor.artifact_type,
        )
        for number, top in enumerate(tops)
    )


def listed(words: Sequence[str]) -> str:
    """Put words into a message, not too many."""
    unique = list(dict.fromkeys(words))
    more = f" and {len(unique) - _MAX_LISTED} more" if len(unique) > _MAX_LISTED else ""
    return ", ".join(printable(word) for word in unique[:_MAX_LISTED]) + more


@contextmanager
def within(what: str) -> Iterator[None]:
    """Say in front of an error's sentence what it is about."""
    try:
        yield
    except OcifsError as error:
        raise type(error)(f"{what}: {error}") from None


def read_document(blob: Blob, what: str) -> bytes:
    """Read a whole document, however large it claims to be never more than `MAX_DOCUMENT_SIZE`; closes the blob."""
    try:
        if blob.size > MAX_DOCUMENT_SIZE:
            raise DamagedError(f"{what} has {blob.size} bytes; more than {MAX_DOCUMENT_SIZE} are never read")
        return blob.read_at(0, blob.size)
    finally:
        blob.close()


class Warnings:
    """What is noted while an image is resolved, and whether what is wrong is refused or noted."""

    def __init__(self, *, examine: bool) -> None:
        """Under ``examine`` warn where an image can still be read."""
        self.examine = examine
        self._noted: dict[Warned, None] = {}

    @property
    def noted(self) -> tuple[Warned, ...]:
        """Everything, once, in order."""
        return tuple(self._noted)

    def warn(self, rule: str, message: str, layer: int = 0) -> None:
        """Note a warning."""
        self._noted[Warned(rule, layer, b"", message)] = None

    def refuse(self, rule: str, error: OcifsError, layer: int = 0) -> None:
        """Raise ``error``, or under examination note it."""
        if not self.examine:
            raise error
        self.warn(rule, str(error), layer)

    def usable(self, digest: _D | None, layer: int) -> _D | None:
        """Refuse a digest that cannot be computed; under examination do without it (rule C5)."""
        try:
            if digest is not None:
                digest.hasher()
        except UnsupportedError as error:
            self.refuse("C5", error, layer)
            return None
        return digest

    def check_config(self, config: ImageConfig, layer_count: int, wanted: Platform) -> None:
        """Apply rule C8 and, for an image that was not chosen by platform, C9."""
        problem = config.rootfs_problem(layer_count)
        if problem is not None:
            self.refuse("C8", problem)
        if config.platform.is_known and config.platform.rank_for(wanted) is None:
            self.warn("C9", f"the image is for {config.platform}; {wanted} was asked for")


def _is_called(top: Top, name: str) -> bool:
    """Whether ``name`` is a shorter or longer spelling of an image name; tags have only one spelling."""
    return any(same_name(name, other) for other in top.names if "/" in other or ":" in other)


class Resolver:
    """One resolution: reads documents, collects warnings. Used once, by one thread."""

    def __init__(self, store: BlobStore, *, examine: bool) -> None:
        """Read from ``store``; under ``examine`` warn where an image can still be read."""
        self._store = store
        self.warnings = Warnings(examine=examine)
        self._documents: dict[Digest, tuple[bytes, Manifest | Index]] = {}
        self._missing: list[str] = []

    # -- documents ----------------------------------------------------------------------------------------------------

    def read(self, descriptor: Descriptor, what: str) -> bytes:
        """Give a document's bytes, verified: embedded ones if there are any, else the blob's."""
        if descriptor.data is not None:
            try:
                descriptor.embedded()
            except OcifsError as error:
                self.warnings.refuse("C6", type(error)(f"{what} {error}"))
            else:
                return descriptor.data
        if descriptor.size > MAX_DOCUMENT_SIZE:
            raise DamagedError(
                f"{what} {descriptor.digest} has {descriptor.size} bytes by its descriptor; "
                f"more than {MAX_DOCUMENT_SIZE} are never read"
            )
        blob = self._store.open_digest(descriptor.digest)
        where = blob.name
        if blob.size > MAX_DOCUMENT_SIZE and not self.warnings.examine:
            blob.close()
            raise DamagedError(
                f"{what} {descriptor.digest}: {where} has {blob.size} bytes, its descriptor says {descriptor.size}"
            )
        data = read_document(blob, f"{what} {where}")
        try:
            descriptor.check(data, where)
        except OcifsError as error:
            self.warnings.refuse("C5" if isinstance(error, UnsupportedError) else "C4", type(error)(f"{what} {error}"))
        return data

    def document(self, descriptor: Descriptor) -> tuple[bytes, Manifest | Index]:
        """Read a manifest or an index."""
        known = self._documents.get(descriptor.digest)
        if known is None:
            what = "index" if descriptor.media_type in INDEX_TYPES else "manifest"
            raw = self.read(descriptor, what)
            with within(f"{what} {descriptor.digest}"):
                known = raw, parse_document(raw, descriptor.media_type or None)
            self._documents[descriptor.digest] = known
        return known

    def _leaves(
        self, descriptors: Sequence[Descriptor], trail: tuple[Digest, ...], seen: set[Digest]
    ) -> Iterator[Descriptor]:
        """Walk nested indexes depth first, in order, each once. One manifest may be listed for several platforms."""
        for descriptor in descriptors:
            digest = descriptor.digest
            if digest in trail:
                raise DamagedError(f"index {digest} contains itself")
            if descriptor.media_type in DOCUMENT_TYPES - INDEX_TYPES:
                yield descriptor
                continue
            if digest in seen or descriptor.media_type not in {*INDEX_TYPES, ""}:
                continue  # an unknown media type is nobody's image (rule C7)
            seen.add(digest)
            try:
                _, document = self.document(descriptor)
            except NotFoundError as error:
                self._missing.append(str(error))
                continue
            if not isinstance(document, Index):
                yield descriptor
            elif len(trail) >= _MAX_DEPTH:
                raise DamagedError(f"index {digest} lies more than {_MAX_DEPTH} indexes deep")
            else:
                yield from self._leaves(document.manifests, (*trail, digest), seen)

    # -- choosing -----------------------------------------------------------------------------------------------------

    def image(self, tops: Sequence[Top], selector: Selector, wanted: Platform | None) -> ResolvedImage:
        """Choose one image of ``tops`` and verify it: see `Source.resolve`."""
        wanted = wanted or Platform.host()
        named = self._narrow(tops, selector)
        if selector.digest is not None:
            name, chosen = self._by_digest(named, selector, selector.digest)
        else:
            name, chosen = self._only(named, selector, wanted)
        outermost: Index | None = None
        platforms: tuple[Descriptor, ...] = ()
        raw, document = self.document(chosen)
        if isinstance(document, Index):
            outermost = document
            platforms = tuple(self._leaves(document.manifests, (chosen.digest,), {chosen.digest}))
            chosen = self._by_platform(platforms, wanted, f"index {chosen.digest}")
            raw, document = self.document(chosen)
        if isinstance(document, Index):
            raise DamagedError(f"manifest {chosen.digest} is an index, though its descriptor says otherwise")
        return self._resolved(name, outermost, platforms, chosen, raw, document, wanted)

    def _narrow(self, tops: Sequence[Top], selector: Selector) -> Sequence[Top]:
        where = self._store.description
        if selector.number is not None:
            if selector.number >= len(tops):
                raise NotFoundError(f"{where} has no manifest @{selector.number}: it has {len(tops)}, counted from 0")
            tops = tops[selector.number : selector.number + 1]
        if selector.name is not None:
            named = [top for top in tops if selector.name in top.names]
            named = named or [top for top in tops if _is_called(top, selector.name)]
            if not named:
                there = listed([name for top in tops for name in top.names])
                there = f"it has {there}" if there else f"it has {len(tops)} without a name" if tops else "it is empty"
                raise NotFoundError(f"{where} has no image {selector.name!r}: {there}")
            tops = named
        return tops

    @staticmethod
    def _called(top: Top, selector: Selector) -> str | None:
        return selector.name or next(iter(top.names), None)

    def _by_digest(self, tops: Sequence[Top], selector: Selector, digest: Digest) -> tuple[str | None, Descriptor]:
        for top in tops:
            if top.descriptor.digest == digest:
                return self._called(top, selector), top.descriptor
        for top in tops:
            for descriptor in self._all_below(top.descriptor):
                if descriptor.digest == digest:
                    return self._called(top, selector), descriptor
        if selector.name is None and selector.number is None:
            try:
                size = self._store.size_of(digest)
            except NotFoundError as error:
                there = listed([str(top.descriptor.digest) for top in tops]) or "nothing"
                raise NotFoundError(f"{error}; listed there: {there}") from None
            return None, Descriptor("", digest, size)
        raise NotFoundError(f"{self._store.description} has no {digest} below {selector.name or f'@{selector.number}'}")

    def _all_below(self, descriptor: Descriptor) -> Iterator[Descriptor]:
        """Every descriptor below an index, indexes included, as far as they can be read."""
        queue = [descriptor]
        seen: set[Digest] = set()
        while queue:
            descriptor = queue.pop(0)
            if descriptor.digest in seen:
                continue
            seen.add(descriptor.digest)
            yield descriptor
            if descriptor.media_type in INDEX_TYPES:
                try:
                    _, document = self.document(descriptor)
                except NotFoundError:
                    continue
                if isinstance(document, Index):
                    queue += document.manifests

    def _only(self, tops: Sequence[Top], selector: Selector, wanted: Platform) -> tuple[str | None, Descriptor]:
        """Find the one image there is (rule C12)."""
        where = self._store.description
        if not tops:
            raise NotFoundError(f"{where} holds no image")
        distinct = {top.descriptor.digest: top for top in reversed(tops)}
        if len(distinct) > 1:
            images = {
                digest: top
                for digest, top in distinct.items()
                if not top.descriptor.is_attestation
                and not top.descriptor.artifact_type
                and top.descriptor.media_type in {*DOCUMENT_TYPES, ""}
            }
            distinct = images or distinct
        if 1 < len(distinct) <= _MAX_PROBED:
            images = {digest: top for digest, top in distinct.items() if not self._is_artifact(top.descriptor)}
            distinct = images or distinct
        if len(distinct) == 1:
            top = next(iter(distinct.values()))
            return self._called(top, selector), top.descriptor
        remaining = [top for top in tops if distinct.get(top.descriptor.digest) is top]
        common = set(remaining[0].names).intersection(*(top.names for top in remaining))
        nameless = not any(top.names for top in remaining)
        if (common or nameless) and all(top.descriptor.platform is not None for top in remaining):
            # Some tools list the platforms of one image side by side instead of in an index of their own.
            chosen = self._by_platform([top.descriptor for top in remaining], wanted, where)
            return selector.name or next(iter(sorted(common)), None), chosen
        choices = listed([str(entry) for entry in offered(tops) if distinct.get(tops[entry.number].descriptor.digest)])
        raise UsageError(f"{where} holds {len(remaining)} images, choose one by its name or @digest: {choices}")

    def _is_artifact(self, descriptor: Descriptor) -> bool:
        if descriptor.media_type in INDEX_TYPES:
            return False
        try:
            _, document = self.document(descriptor)
        except OcifsError:
            return False
        return isinstance(document, Manifest) and artifact_kind(document) is not None

    def _by_platform(self, leaves: Sequence[Descriptor], wanted: Platform, where: str) -> Descriptor:
        """Choose the first manifest that fits best (rule C9)."""
        best: tuple[int, Descriptor] | None = None
        silent: list[Descriptor] = []
        there: list[str] = []
        for leaf in leaves:
            if leaf.is_attestation:
                continue
            platform = leaf.platform or self._config_platform(leaf)
            if platform is None:
                continue
            if not platform.is_known:
                silent.append(leaf)
                continue
            there.append(str(platform))
            rank = platform.rank_for(wanted)
            if rank is not None and (best is None or rank < best[0]):
                best = rank, leaf
        if best is not None:
            return best[1]
        if len(silent) == 1 and not there:
            self.warnings.warn("C9", f"{where} does not say for which platform its image is; {wanted} was asked for")
            return silent[0]
        names = f"it has {listed(there)}" if there else "it lists no image"
        missing = f"; {self._missing[0]}" if self._missing else ""
        raise NotFoundError(f"{where} has nothing for platform {wanted}: {names}{missing}")

    def _config_platform(self, leaf: Descriptor) -> Platform | None:
        """Ask an image's configuration for the platform that its descriptor leaves out; None if it is no image."""
        try:
            _, document = self.document(leaf)
            if not isinstance(document, Manifest) or artifact_kind(document) is not None:
                return None
            return parse_config(self.read(document.config, "config")).platform
        except NotFoundError as error:
            self._missing.append(str(error))
            return None

    # -- the image ----------------------------------------------------------------------------------------------------

    def _resolved(  # noqa: PLR0917 — the parts of one result
        self,
        name: str | None,
        index: Index | None,
        platforms: tuple[Descriptor, ...],
        chosen: Descriptor,
        raw: bytes,
        manifest: Manifest,
        wanted: Platform,
    ) -> ResolvedImage:
        artifact = artifact_kind(manifest)
        config: ImageConfig | None = None
        config_raw = b""
        try:
            config_raw = self.read(manifest.config, "config")
            if artifact is None:
                with within(f"config {manifest.config.digest}"):
                    config = parse_config(config_raw)
        except OcifsError as error:
            if artifact is None and not self.warnings.examine:
                raise
            self.warnings.warn("C10" if artifact else "C4", str(error))
        if config is not None:
            self.warnings.check_config(config, len(manifest.layers), wanted)
        diff_ids = config.diff_ids if config is not None else ()
        layers = tuple(
            self._layer(number, descriptor, diff_ids[number - 1] if number <= len(diff_ids) else None)
            for number, descriptor in enumerate(manifest.layers, 1)
        )
        return ResolvedImage(
            source=self._store.description,
            name=name,
            index=index,
            platforms=platforms,
            manifest=manifest,
            manifest_raw=raw,
            manifest_digest=chosen.digest,
            config=config,
            config_raw=config_raw,
            config_digest=manifest.config.digest,
            layers=layers,
            artifact=artifact,
            warnings=self.warnings.noted,
        )

    def _layer(self, number: int, descriptor: Descriptor, diff_id: DiffID | None) -> LayerBlob:
        problem: OcifsError | None = descriptor.layer_problem()
        data: bytes | None = None
        digest: Digest | None = descriptor.digest
        try:
            if problem is None:
                digest = self.warnings.usable(digest, number)
                diff_id = self.warnings.usable(diff_id, number)
            data = self._embedded(number, descriptor) if digest is not None else None
            if data is None:
                self._check_size(number, descriptor)
        except OcifsError as error:
            data = None
            problem = problem or error
        else:
            if self.warnings.examine and descriptor.is_foreign and not descriptor.is_encrypted and problem is not None:
                self.warnings.warn("C10", f"{problem}; it is here, and is read", number)
                problem = None
        return LayerBlob(
            number=number,
            digest=digest,
            diff_id=diff_id,
            media_type=descriptor.media_type,
            size=descriptor.size,
            descriptor=descriptor,
            problem=problem,
            opener=self._opener(descriptor.digest, data),
        )

    def _embedded(self, number: int, descriptor: Descriptor) -> bytes | None:
        """Give a layer that is embedded in its manifest; under examination, not if it is wrong (rule C6)."""
        try:
            return descriptor.embedded()
        except DamagedError as error:
            self.warnings.refuse("C6", DamagedError(f"layer {number} {error}"), number)
            return None

    def _check_size(self, number: int, descriptor: Descriptor) -> None:
        with within(f"layer {number}"):
            stored = self._store.size_of(descriptor.digest)
            if stored != descriptor.size:
                error = DamagedError(
                    f"{descriptor.digest} has {stored} bytes in {self._store.description}, "
                    f"its descriptor says {descriptor.size}"
                )
                self.warnings.refuse("C4", error, number)

    def _opener(self, digest: Digest, data: bytes | None) -> Callable[[], Blob]:
        store = self._store
        if data is not None:
            return lambda: BytesBlob(f"{digest} embedded in a manifest of {store.description}", data)
        return lambda: store.open_digest(digest)
