"""What is said about an image: ``inspect`` (documents only, no layer is read), ``layers`` and ``index`` (layer by layer).

Not here: names and data inside an image (`listing`, `reading`).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from ocifs.cli import options as opt
from ocifs.cli import output
from ocifs.cli.options import Choice

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ocifs.image import OpenLayer, Resolved
    from ocifs.sources import LayerBlob, ResolvedImage
    from ocifs.spec import History, ImageConfig
    from ocifs.tree import Warned

_MAX_COMMAND = 60
"""Characters of a build step in a table."""


# -- values --------------------------------------------------------------------------------------------------------


def _warning_json(warned: Warned) -> dict[str, Any]:
    return {
        "rule": warned.rule,
        "layer": warned.layer or None,
        "path": output.decode(warned.path) if warned.path else None,
        "message": warned.message,
    }


def _text(value: object) -> str | None:
    return None if value is None or value == "" else str(value)


def _layer_json(blob: LayerBlob, step: History | None) -> dict[str, Any]:
    """What the documents say about a layer."""
    return {
        "layer": blob.number,
        "digest": _text(blob.digest),
        "diff_id": _text(blob.diff_id),
        "media_type": blob.media_type or None,
        "size": blob.size,
        "annotations": dict(blob.descriptor.annotations) if blob.descriptor else {},
        "created": step.created or None if step else None,
        "created_by": step.created_by or None if step else None,
        "problem": None if blob.problem is None else str(blob.problem),
    }


def _inspected(image: ResolvedImage) -> dict[str, Any]:
    import msgspec  # loaded by what was called before

    from ocifs.spec import layer_steps

    steps = layer_steps(image.config, len(image.layers))
    return {
        "source": image.source,
        "name": image.name,
        "digest": _text(image.manifest_digest),
        "media_type": image.manifest.media_type if image.manifest else None,
        "artifact": image.artifact,
        "platform": str(image.config.platform) if image.config else None,
        "platforms": [
            {
                "platform": None if found.platform is None else str(found.platform),
                "digest": str(found.digest),
                "media_type": found.media_type,
                "size": found.size,
                "attestation": found.is_attestation,
                "chosen": found.digest == image.manifest_digest,
            }
            for found in image.platforms
        ],
        "manifest": msgspec.json.decode(image.manifest_raw),
        "config_digest": str(image.config_digest),
        "config": msgspec.json.decode(image.config_raw) if image.config else None,
        "layers": [_layer_json(blob, step) for blob, step in zip(image.layers, steps, strict=True)],
        "warnings": [_warning_json(warned) for warned in image.warnings],
    }


# -- inspect -------------------------------------------------------------------------------------------------------


def _fields(pairs: Iterable[tuple[str, str]]) -> None:
    for name, value in pairs:
        if value:
            output.print_line(f"{name + ':':<14}{output.printable(value)}")


def _many(name: str, values: Iterable[str]) -> None:
    for value in values:
        output.print_line(f"{name:<14}{output.printable(value)}")
        name = ""


def _words(words: Sequence[str] | None) -> str:
    import shlex

    return "" if words is None else shlex.join(words) or "(empty)"


def _print_config(config: ImageConfig) -> None:
    runtime = config.config
    _fields(
        [
            ("Created", f"{config.created}{', by ' + config.author if config.author else ''}"),
            ("Entrypoint", _words(runtime.entrypoint)),
            ("Command", _words(runtime.cmd)),
            ("User", runtime.user),
            ("Directory", runtime.working_dir),
            ("Ports", ", ".join(runtime.exposed_ports)),
            ("Volumes", ", ".join(runtime.volumes)),
            ("Stop signal", runtime.stop_signal),
        ]
    )
    _many("Environment:", runtime.env)
    _many("Labels:", (f"{name}={value}" for name, value in runtime.labels.items()))


def _print_image(image: ResolvedImage) -> None:
    _fields(
        [
            ("Source", image.source),
            ("Name", image.name or ""),
            ("Manifest", str(image.manifest_digest or "")),
            ("Media type", image.manifest.media_type if image.manifest else ""),
            ("Artifact", f"{image.artifact}: not a root file system" if image.artifact else ""),
            ("Platform", str(image.config.platform) if image.config else ""),
        ]
    )
    others = (
        f"{found.platform or 'unknown'}  {found.digest}"
        f"{'  (attestation)' if found.is_attestation else ''}"
        f"{'  (this one)' if found.digest == image.manifest_digest else ''}"
        for found in image.platforms
    )
    if len(image.platforms) > 1:
        _many("Platforms:", others)
    _fields([("Config", str(image.config_digest))])
    if image.config:
        _print_config(image.config)
    if image.manifest:
        _many("Annotations:", (f"{name}={value}" for name, value in image.manifest.annotations.items()))
    output.print_line("")
    from ocifs.spec import layer_steps

    steps = layer_steps(image.config, len(image.layers))
    output.print_table(
        ("LAYER", "SIZE", "DIGEST", "CREATED BY"),
        [
            (
                str(blob.number),
                output.human_size(blob.size),
                output.short(blob.digest or blob.diff_id),
                str(blob.problem) if blob.problem else _title(blob) or _shortened(step.created_by if step else ""),
            )
            for blob, step in zip(image.layers, steps, strict=True)
        ],
        right=(0, 1),
    )
    if image.config and image.config.history:
        output.print_line("")
        layer = 0
        rows = []
        for step in image.config.history:
            layer += not step.empty_layer
            number = "-" if step.empty_layer else str(layer)
            rows.append((number, step.created or "-", step.created_by or "-", step.comment))
        output.print_table(("LAYER", "CREATED", "STEP", "COMMENT"), rows, right=(0,))


def _title(blob: LayerBlob) -> str:
    """The file name of an artifact's blob, if it has one."""
    name = blob.descriptor.annotations.get("org.opencontainers.image.title", "") if blob.descriptor else ""
    return name and f"{name} ({blob.media_type})"


def _shortened(command: str) -> str:
    words = " ".join(command.split())
    return words if len(words) <= _MAX_COMMAND else words[: _MAX_COMMAND - 1] + "…"


@click.command(
    epilog=opt.examples(
        "ocifs inspect oci:images/app:1.2",
        "ocifs inspect --platform linux/arm64 app.tar",
        "ocifs inspect --json oci:images/app | jq .config.config.Env",
    )
)
@opt.json_option
@opt.ref_argument
@opt.layer_options
def inspect(choice: Choice, ref: str, *, as_json: bool) -> None:
    """Show what an image says about itself: manifest, platforms, configuration, layers with sizes, history.

    Reads documents only, no layer; artifacts that are no root file system are shown too. Warnings go to standard error.
    """
    from ocifs.image import note_opened, resolve

    with (
        opt.opened_evidence(choice) as evidence,
        opt.store_if_needed(choice) as store,
        opt.new_progress() as progress,
    ):
        resolved = resolve(ref, choice.image_options(), store, progress)
        if evidence is not None:
            note_opened(evidence, resolved, ())
    if as_json:
        output.print_document(_inspected(resolved.image))
    else:
        _print_image(resolved.image)
        opt.show_warnings(resolved.warnings, choice)


# -- layers --------------------------------------------------------------------------------------------------------


def _index_json(layer: OpenLayer) -> dict[str, Any]:
    """What the index says about a layer: found out by reading it."""
    index = layer.index
    return {
        "digest": _text(layer.blob.digest) or str(index.digest),
        "diff_id": str(index.diff_id),
        "compression": str(index.compression.value),
        "uncompressed_size": index.layer_size,
        "entries": index.entry_count,
        "spans": len(index.spans),
        "warnings": [
            {
                "rule": notice.rule,
                "path": output.decode(notice.path),
                "layer_offset": notice.layer_offset,
                "message": notice.message,
            }
            for notice in index.notices
        ],
        "damage": None if index.damage is None else index.damage.message,
        "mismatches": [warned.message for warned in layer.warnings],
        "trailing": None
        if index.trailing is None
        else {"layer_offset": index.trailing.layer_offset, "size": index.trailing.size},
    }


_UNREAD: dict[str, Any] = {
    "compression": None,
    "uncompressed_size": None,
    "entries": None,
    "spans": None,
    "warnings": [],
    "damage": None,
    "mismatches": [],
    "trailing": None,
}


def _layers_json(resolved: Resolved, opened: dict[int, OpenLayer]) -> list[dict[str, Any]]:
    image = resolved.image
    from ocifs.spec import layer_steps

    steps = layer_steps(image.config, len(image.layers))
    return [
        {**_layer_json(blob, step), **(_index_json(opened[blob.number]) if blob.number in opened else _UNREAD)}
        for blob, step in zip(image.layers, steps, strict=True)
    ]


def _cell(value: object) -> str:
    return "-" if value is None else str(value)


@click.command(
    epilog=opt.examples(
        "ocifs layers oci:images/app:1.2",
        "ocifs layers --examine damaged.tar",
        "ocifs layers --json oci:images/app | jq -r '[.layer, .digest] | @tsv'",
    )
)
@opt.json_lines_option
@opt.ref_argument
@opt.layer_options
def layers(choice: Choice, ref: str, *, as_json: bool) -> None:
    """List an image's layers, the base first: digest, diff ID, sizes, entries, warnings, and the step that wrote each.

    Layers that were never seen before are indexed. The layers of an artifact, which are no file systems, are listed as
    its documents describe them.
    """
    from ocifs.image import note_opened, open_layers, resolve

    options = choice.image_options()
    with opt.opened_evidence(choice) as evidence, opt.opened_store(choice) as store:
        opened: tuple[OpenLayer, ...] = ()
        try:
            with opt.new_progress() as progress:
                resolved = resolve(ref, options, store, progress)
                if resolved.image.artifact is None:
                    opened = open_layers(resolved, store, options, progress)
            if evidence is not None:
                note_opened(evidence, resolved, opened)
            rows = _layers_json(resolved, {layer.number: layer for layer in opened})
        finally:
            for layer in opened:
                layer.close()
    if as_json:
        for row in rows:
            output.print_json(row)
    else:
        _print_layers(rows)
    if choice.examine or choice.verbose:
        opt.show_warnings(resolved.warnings, choice)
        for row in rows:
            _show_layer_warnings(row)


def _print_layers(rows: Sequence[dict[str, Any]]) -> None:
    output.print_table(
        ("LAYER", "DIGEST", "DIFF ID", "MEDIA TYPE", "STORED", "TAR", "ENTRIES", "WARNINGS", "CREATED BY"),
        [
            (
                str(row["layer"]),
                output.short(row["digest"]),
                output.short(row["diff_id"]),
                _cell(row["media_type"]),
                output.human_size(row["size"]),
                "-" if row["uncompressed_size"] is None else output.human_size(row["uncompressed_size"]),
                _cell(row["entries"]),
                str(len(row["warnings"]) + len(row["mismatches"]) + (row["damage"] is not None)),
                row["problem"] or _shortened(row["created_by"] or ""),
            )
            for row in rows
        ],
        right=(0, 4, 5, 6, 7),
    )


def _show_layer_warnings(row: dict[str, Any]) -> None:
    where = f"warning: layer {row['layer']}: "
    for notice in row["warnings"]:
        output.complain(f"{where}{notice['path']}: {notice['message']} (rule {notice['rule']})")
    for message in (*row["mismatches"], *([row["damage"]] if row["damage"] else [])):
        output.complain(where + message)


# -- index ---------------------------------------------------------------------------------------------------------


class _Witness:
    """Passes progress on, and remembers which layers were read and for how long. An `ocifs.image.Progress`."""

    def __init__(self, inner: Any) -> None:  # noqa: ANN401 (a Progress; its module is loaded late)
        self._inner = inner
        self._began: dict[int, float] = {}
        self.took: dict[int, float] = {}
        self.merged: bool = False

    def begin(self, layer: int, label: str, size: int) -> None:
        self._began[layer] = time.monotonic()
        self._inner.begin(layer, label, size)

    def advance(self, layer: int, done: int) -> None:
        self._inner.advance(layer, done)

    def end(self, layer: int) -> None:
        if layer in self._began:
            self.took[layer] = time.monotonic() - self._began[layer]
        self._inner.end(layer)

    def merging(self, layers: int) -> None:
        self.merged = True
        self._inner.merging(layers)

    def waiting(self, what: str) -> None:
        self._inner.waiting(what)


@click.command(
    epilog=opt.examples(
        "ocifs index oci:images/app:1.2 base.tar",
        "ocifs index --examine evidence.tar",
    )
)
@opt.refs_argument
@opt.tree_options
def index(choice: Choice, refs: tuple[str, ...]) -> None:
    """Index images now, so that mounting and listing them later takes no time. Prints what was done for each layer.

    Of several images one that fails is reported, and the others are indexed all the same.
    """
    rows: list[tuple[str, ...]] = []
    try:
        opt.for_each(refs, lambda ref: rows.extend(_indexed(choice, ref)))
    finally:
        if rows:
            header = ("IMAGE", "LAYER", "INDEX", "STORED", "TAR", "RATIO", "ENTRIES", "SPANS", "SECONDS")
            output.print_table(header, rows, right=(1, 3, 4, 5, 6, 7, 8))


def _indexed(choice: Choice, ref: str) -> list[tuple[str, ...]]:
    from ocifs.image import open_image

    rows: list[tuple[str, ...]] = []
    with (
        opt.opened_evidence(choice) as evidence,
        opt.opened_store(choice) as store,
        opt.new_progress() as progress,
    ):
        witness = _Witness(progress)
        started = time.monotonic()
        with open_image(ref, store, choice.image_options(), witness, evidence=evidence) as image:
            took = time.monotonic() - started
            for layer in image.layers:
                found = layer.index
                seconds = witness.took.get(layer.number)
                rows.append(
                    (
                        ref,
                        str(layer.number),
                        "there already" if seconds is None else "built",
                        output.human_size(found.stored_size),
                        output.human_size(found.layer_size),
                        f"{found.layer_size / found.stored_size:.2f}" if found.stored_size else "-",
                        str(found.entry_count),
                        str(len(found.spans)),
                        "-" if seconds is None else f"{seconds:.2f}",
                    )
                )
            done = "built" if witness.merged else "there already"
            rows.append((ref, "tree", done, "-", "-", "-", str(image.tree.metadata.inode_count), "-", f"{took:.2f}"))
            warnings = image.warnings if choice.examine or choice.verbose else ()
        opt.show_warnings(warnings, choice)
    return rows
