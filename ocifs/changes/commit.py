"""A new image: one that is there, and a layer of what changed above it.

Not here: how any part of it is made; see the package's docstring.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from ocifs.changes import recipe as recipes
from ocifs.changes.layer import PACKINGS, LayerSink, LayerWriter
from ocifs.changes.layout import LayoutWriter
from ocifs.errors import UnsupportedError
from ocifs.spec import MediaType

if TYPE_CHECKING:
    from collections.abc import Callable

    from ocifs.changes.layer import Written
    from ocifs.changes.layout import Destination
    from ocifs.changes.merged import Merged
    from ocifs.changes.recipe import Recipe
    from ocifs.image import Image
    from ocifs.sources import LayerBlob
    from ocifs.spec import DiffID, Digest


class Committed(NamedTuple):
    """An image that was written."""

    manifest: Digest
    config: Digest
    layer: Written


def commit(
    image: Image, merged: Merged, destination: Destination, recipe: Recipe, *, warn: Callable[[bytes, str], object]
) -> Committed:
    """Write ``image`` and a layer of what ``merged`` says to ``destination``.

    ``warn`` is told path and reason of everything that a layer cannot hold. What is refused, and every failure, leaves the
    destination as it was.
    """
    blobs = [layer.blob for layer in image.layers]
    diff_ids = [_diff_id(blob) for blob in blobs]
    packing = PACKINGS[recipe.packing]
    now_ns = time.time_ns() if recipe.timestamp is None else recipe.timestamp * 10**9
    with LayoutWriter(destination.path) as layout:
        with layout.new_blob() as new:
            sink = LayerSink(new.write, packing)
            latest = None if recipe.timestamp is None else now_ns
            LayerWriter(merged, sink.write, warn=warn, latest=latest).write()
            written = sink.finish()
            new.name(written.digest)
        layers = [_added(layout, blob) for blob in blobs]
        layers.append(recipes.Layer(packing.media_type, written.digest, written.size))
        config = recipes.new_config(
            image.resolved.image.config_raw,
            recipe,
            diff_ids=diff_ids,
            added=written.diff_id,
            created=recipes.rfc3339(now_ns),
            upto=len(blobs),
        )
        config_digest = layout.add_bytes(config)
        manifest = recipes.new_manifest(config, config_digest, layers)
        manifest_digest = layout.add_bytes(manifest)
        layout.publish(destination.tag, recipes.descriptor(MediaType.OCI_MANIFEST, manifest_digest, len(manifest)))
    return Committed(manifest_digest, config_digest, written)


def _diff_id(blob: LayerBlob) -> DiffID:
    if blob.diff_id is None:
        raise UnsupportedError(f"the image does not say the diff ID of its layer {blob.number}, so none can be added")
    return blob.diff_id


def _added(layout: LayoutWriter, blob: LayerBlob) -> recipes.Layer:
    media_type, digest, size = layout.add_layer(blob)
    annotations = dict(blob.descriptor.annotations) if blob.descriptor is not None else {}
    return recipes.Layer(media_type, digest, size, annotations)
