"""What ``docker save`` writes and ``docker load`` reads: a tar with ``manifest.json`` (moby's image spec v1.2).

``manifest.json`` lists images: the name of the configuration, the tags, and the layers from the base up as names of
members, which may be links to each other and may be compressed. Nothing says a layer's stored digest; the diff IDs in
the configuration are what it is checked against. Many tools write this form, and not all keep its letter: keys come in
any case (Jib), ``RepoTags`` may be null, layers may be named for any digest or none (rule C11).

Docker 25 and later write an OCI layout and this beside each other; the layout is read by `ocifs.sources.layout`.

Not here: reading the tar (`ocifs.sources.archive`).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import msgspec

from ocifs.errors import DamagedError, NotFoundError, OcifsError, UnsupportedError, UsageError
from ocifs.sources.archive import ArchiveFolder, normal_name
from ocifs.sources.base import Blob, LayerBlob, Offered, ResolvedImage
from ocifs.sources.blob import shown
from ocifs.sources.names import same_name
from ocifs.sources.resolve import Warnings, listed, read_document, within
from ocifs.spec import DiffID, Digest, ImageConfig, MediaType, Platform, parse_config

if TYPE_CHECKING:
    from collections.abc import Callable

    from ocifs.reference import Selector

MANIFEST_FILE: Final = b"manifest.json"
OLD_FILE: Final = b"repositories"

_HEX_NAME: Final = re.compile(rb"(?:.*/)?(?:sha256:)?([0-9a-f]{64})(?:\.json)?")
_BLOB_NAME: Final = re.compile(rb"blobs/sha256/[0-9a-f]{64}")


class _Saved(msgspec.Struct, frozen=True):
    """One image of manifest.json."""

    number: int
    config: bytes
    names: tuple[str, ...]
    layers: tuple[bytes, ...]


class DockerArchiveSource:
    """A docker-archive. Reads ``manifest.json`` once, when it is made."""

    def __init__(self, folder: ArchiveFolder) -> None:
        """Read the archive in ``folder``."""
        self._folder = folder
        self.description = f"docker-archive {folder.name}"
        if MANIFEST_FILE not in folder and OLD_FILE in folder:
            raise UnsupportedError(
                f"{self.description} has no manifest.json: it is of the form before Docker 1.10 (2016); "
                "load it into Docker and save it again"
            )
        with within("docker-archive"):
            blob = folder.open(MANIFEST_FILE)
        with within(blob.name):
            self._manifest_raw = read_document(blob, "the document")
            self._images = _parse_manifest(self._manifest_raw)

    def names(self) -> tuple[Offered, ...]:
        """See `Source.names`. The digest is the configuration's, which is Docker's image ID."""
        return tuple(self._offered(image) for image in self._images)

    def _offered(self, image: _Saved) -> Offered:
        digest: Digest | None = None
        platform: Platform | None = None
        size = 0
        try:
            raw = self._read_config(image)
            digest = Digest.of(raw)
            size = len(raw)
            platform = parse_config(raw).platform
        except OcifsError:
            pass  # what is wrong with it is said when it is chosen
        return Offered(image.number, image.names, digest, MediaType.DOCKER_CONFIG, size, platform)

    def _read_config(self, image: _Saved) -> bytes:
        with within("configuration"):
            blob = self._folder.open(image.config)
            return read_document(blob, blob.name)

    def resolve(self, selector: Selector, platform: Platform | None = None, *, examine: bool = False) -> ResolvedImage:
        """See `Source.resolve`."""
        wanted = platform or Platform.host()
        image = self._choose(selector, wanted)
        warnings = Warnings(examine=examine)
        raw = self._read_config(image)
        digest = Digest.of(raw)
        config: ImageConfig | None = None
        with within(f"{self.description}, configuration {shown(image.config)}"):
            self._check_name(image.config, digest, warnings)
            try:
                config = parse_config(raw)
            except DamagedError as error:
                warnings.refuse("C4", error)
            if config is not None:
                warnings.check_config(config, len(image.layers), wanted)
        diff_ids = config.diff_ids if config is not None else ()
        layers = tuple(
            self._layer(number, name, diff_ids[number - 1] if number <= len(diff_ids) else None, warnings)
            for number, name in enumerate(image.layers, 1)
        )
        return ResolvedImage(
            source=self.description,
            name=selector.name or next(iter(image.names), None),
            index=None,
            platforms=(),
            manifest=None,
            manifest_raw=self._manifest_raw,
            manifest_digest=None,
            config=config,
            config_raw=raw,
            config_digest=digest,
            layers=layers,
            artifact=None,
            warnings=warnings.noted,
        )

    @staticmethod
    def _check_name(name: bytes, digest: Digest, warnings: Warnings) -> None:
        """Compare the configuration's name with its content, where the name is a digest.

        ``docker load`` does not: it computes the image ID anew, and hand-edited archives load. So a wrong name is a
        warning, but not where the name is the path of a blob.
        """
        match = _HEX_NAME.fullmatch(name)
        if match is None or match[1].decode() == digest.hex:
            return
        error = DamagedError(f"configuration {shown(name)} has another digest than its name, {digest}")
        if _BLOB_NAME.fullmatch(name):
            warnings.refuse("C4", error)
        else:
            warnings.warn("C4", str(error))

    def _choose(self, selector: Selector, wanted: Platform) -> _Saved:
        images = self._images
        if selector.number is not None:
            if selector.number >= len(images):
                raise NotFoundError(
                    f"{self.description} has no image @{selector.number}: it has {len(images)}, counted from 0"
                )
            images = images[selector.number : selector.number + 1]
        if selector.name is not None:
            named = [image for image in images if selector.name in image.names]
            named = named or [image for image in images if any(same_name(selector.name, name) for name in image.names)]
            if not named:
                there = listed([name for image in images for name in image.names])
                there = f"it has {there}" if there else f"it has {len(images)} without a name"
                raise NotFoundError(f"{self.description} has no image {selector.name!r}: {there}")
            images = tuple(named)
        if selector.digest is not None:
            by_id = [image for image in images if self._offered(image).digest == selector.digest]
            if not by_id:
                there = listed([str(self._offered(image).digest) for image in images]) or "nothing"
                raise NotFoundError(f"{self.description} has no image with the ID {selector.digest}: it has {there}")
            images = tuple(by_id[:1])
        if not images:
            raise NotFoundError(f"{self.description} holds no image")
        if len(images) > 1:
            images = self._of_platform(images, wanted)
        if len(images) > 1 and len({(image.config, image.layers) for image in images}) > 1:
            choices = listed([str(self._offered(image)) for image in images])
            raise UsageError(
                f"{self.description} holds {len(images)} images, choose one by its name or @digest: {choices}"
            )
        return images[0]

    def _of_platform(self, images: tuple[_Saved, ...], wanted: Platform) -> tuple[_Saved, ...]:
        """Narrow several images of one name, one for each platform, to the one for ``wanted``."""
        if len({image.names for image in images}) > 1 or not images[0].names:
            return images
        platforms = [self._offered(image).platform for image in images]
        ranks = [None if platform is None else platform.rank_for(wanted) for platform in platforms]
        best = min((rank for rank in ranks if rank is not None), default=None)
        fitting = tuple(image for image, rank in zip(images, ranks, strict=True) if rank is not None and rank == best)
        return fitting or images

    def _layer(self, number: int, name: bytes, diff_id: DiffID | None, warnings: Warnings) -> LayerBlob:
        problem: OcifsError | None = None
        size = 0
        try:
            size = self._folder.size_of(name)
            diff_id = warnings.usable(diff_id, number)
        except OcifsError as error:
            problem = type(error)(f"layer {number}: {error}")
        return LayerBlob(
            number=number,
            digest=None,
            diff_id=diff_id,
            media_type="",
            size=size,
            descriptor=None,
            problem=problem,
            opener=self._opener(name),
        )

    def _opener(self, name: bytes) -> Callable[[], Blob]:
        return lambda: self._folder.open(name)

    def close(self) -> None:
        """See `Source.close`."""
        self._folder.close()


def _parse_manifest(raw: bytes) -> tuple[_Saved, ...]:
    try:
        document = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise DamagedError("the document is not JSON") from None
    if not isinstance(document, list):
        raise DamagedError("the document is not a list of images")
    return tuple(_parse_image(number, entry) for number, entry in enumerate(document))


def _parse_image(number: int, entry: Any) -> _Saved:  # noqa: ANN401 — JSON as it comes
    where = f"image @{number}"
    if not isinstance(entry, dict):
        raise DamagedError(f"{where} is not an object")
    fields = {key.lower(): value for key, value in entry.items()}
    layers = [_member(name, f"{where}: Layers") for name in _list_of(fields.get("layers"), f"{where}: Layers")]
    names = _list_of(fields.get("repotags"), f"{where}: RepoTags")
    if not all(isinstance(name, str) for name in names):
        raise DamagedError(f"{where}: RepoTags holds something that is not text")
    return _Saved(number, _member(fields.get("config"), f"{where}: Config"), tuple(names), tuple(layers))


def _list_of(value: Any, where: str) -> list[Any]:  # noqa: ANN401 — JSON as it comes
    if value is None:
        return []
    if not isinstance(value, list):
        raise DamagedError(f"{where} is not a list")
    return value


def _member(value: Any, where: str) -> bytes:  # noqa: ANN401 — JSON as it comes
    """Give the member's name that a document gives as ``value``."""
    name = normal_name(value.encode(errors="replace")) if isinstance(value, str) else None
    if name is None:
        raise DamagedError(f"{where} does not name a member of the archive")
    return name
