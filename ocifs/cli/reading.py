"""Data to standard output: ``cat`` of files in an image, ``blob`` of what an image is made of.

Memory is flat whatever the size: data goes out in pieces of a MiB, in the order in which it lies in its layer.

Not here: copying with attributes (`copying`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ocifs.cli import options as opt
from ocifs.cli import output
from ocifs.cli.options import Choice
from ocifs.errors import DamagedError, NotFoundError, OcifsError, UsageError
from ocifs.tree import Kind

if TYPE_CHECKING:
    from ocifs.rootfs import RootFS
    from ocifs.sources import LayerBlob, ResolvedImage
    from ocifs.spec import Digest


class NotAFileError(OcifsError):
    """Data was asked of something that has none: a directory, a device, a fifo (exit 2)."""

    exit_code = 2


@click.command(
    epilog=opt.examples(
        "ocifs cat oci:images/app:1.2 /etc/os-release",
        "ocifs cat app.tar etc/passwd etc/group",
        "ocifs cat --upto 2 app.tar /etc/token",
    )
)
@opt.ref_argument
@click.argument("paths", metavar="PATH…", nargs=-1, required=True)
@opt.data_options
def cat(choice: Choice, ref: str, paths: tuple[str, ...]) -> None:
    """Write files of an image to standard output, one after the other. Links are followed inside the image.

    A file that cannot be read is reported and the others are written all the same, as cat(1) does; the exit status is
    then the highest of all.
    """
    with opt.opened_view(choice, ref) as (_, view):
        opt.for_each(paths, lambda path: _write_file(view, opt.inside(path)))


def _write_file(view: RootFS, path: bytes) -> None:
    ino = opt.find(view, path)
    kind = view.inode(ino).kind
    if kind is not Kind.FILE:
        what = {Kind.DIR: "a directory", Kind.FIFO: "a fifo"}.get(kind, "a device")
        raise NotAFileError(f"{output.decode(path)} is {what}: only files have data to show")
    view.check_readable(ino)
    for data in view.pieces(ino):
        output.write(data)


# -- blob ----------------------------------------------------------------------------------------------------------


@click.command(
    epilog=opt.examples(
        "ocifs blob oci:images/app:1.2 manifest | jq .layers",
        "ocifs blob oci:images/app:1.2 config | jq .history",
        "ocifs blob app.tar 2 | tar -tzv",
        "ocifs blob oci:charts/app:1.0 sha256:9f86… > chart.tgz",
    )
)
@opt.ref_argument
@click.argument("which", metavar="manifest|config|N|DIGEST")
@opt.layer_options
def blob(choice: Choice, ref: str, which: str) -> None:
    """Write what an image is made of to standard output, as it is stored.

    That is its manifest, its configuration, layer N, or the blob with a digest that its manifest names; of artifacts too.

    Manifest and configuration are checked against their digests. A layer's or artifact's bytes are checked while they are
    written: a wrong digest shows in the exit status, 4, after the last byte.
    """
    from ocifs.image import Resolved, note_opened, open_source
    from ocifs.sources import stored_pieces

    if output.to_terminal() and which not in ("manifest", "config"):
        raise UsageError("a blob is not written to a terminal: redirect the output")
    options = choice.image_options()
    with (
        opt.opened_evidence(choice) as evidence,
        opt.store_if_needed(choice) as store,
        opt.new_progress() as progress,
        open_source(ref, options, store, progress) as (parsed, source),
    ):
        image = source.resolve(parsed.selector, options.platform, examine=options.examine)
        if choice.examine or choice.verbose:
            opt.show_warnings(image.warnings, choice)
        if evidence is not None:
            note_opened(evidence, Resolved(parsed, image), ())
        document = _document(image, which)
        if document is not None:
            if evidence is not None:
                digest = image.config_digest if document is image.config_raw else image.manifest_digest
                right = digest is not None and digest.matches(document)
                evidence.append("blob", which=which, digest=_text(digest), size=len(document), verified=right)
            output.write(document)
            return
        layer = _layer(image, which)
        stored = layer.open_stored()
        told = {"which": which, "layer": layer.number, "digest": _text(layer.digest), "size": stored.size}
        try:
            if evidence is not None:  # before the first byte: who reads may have enough long before the last
                evidence.append("blob", **told, verified=None)
            hasher = layer.digest.hasher() if layer.digest else None
            for data in stored_pieces(stored):
                if hasher:
                    hasher.update(data)
                output.write(data)
        finally:
            stored.close()
        right = hasher is not None and layer.digest is not None and hasher.hexdigest() == layer.digest.hex
        if evidence is not None:
            evidence.append("blob", **told, verified=right)
        if hasher and not right:
            message = f"{layer.digest}: the bytes of layer {layer.number} have another digest, {hasher.hexdigest()}"
            if not choice.examine:
                raise DamagedError(message)
            output.complain(f"warning: {message} (rule C4)")


def _text(digest: Digest | None) -> str | None:
    return None if digest is None else str(digest)


def _document(image: ResolvedImage, which: str) -> bytes | None:
    if which == "manifest" or which == str(image.manifest_digest):
        return image.manifest_raw
    if which == "config" or which == str(image.config_digest):
        return image.config_raw
    return None


def _layer(image: ResolvedImage, which: str) -> LayerBlob:
    """The layer with this number or digest; `NotFoundError` says what there is."""
    for layer in image.layers:
        if which in (str(layer.number), str(layer.digest), str(layer.diff_id)):
            return layer
    count = len(image.layers)
    raise NotFoundError(
        f"{which!r} is neither manifest, config, a layer from 1 to {count}, nor the digest of one: "
        "'ocifs inspect' lists them"
    )
