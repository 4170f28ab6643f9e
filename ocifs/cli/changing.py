"""What a container changed: ``diff-upper`` lists it, ``commit`` makes an image of it.

Both read the upper directory of the overlay, not what is mounted: the container may run, or have ended long ago.

Not here: how any of it is done (`ocifs.changes`).
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar, cast

import click

from ocifs.cli import options as opt
from ocifs.cli import output
from ocifs.cli.listing import TYPE_NAMES
from ocifs.cli.options import Choice
from ocifs.cli.signals import unwound
from ocifs.errors import UsageError

if TYPE_CHECKING:
    from ocifs.bundle.state import State
    from ocifs.changes import Difference, Merged
    from ocifs.evidence import EvidenceLog
    from ocifs.image import Image
    from ocifs.rootfs import RootFS
    from ocifs.store import Store

_F = TypeVar("_F", bound=Callable[..., Any])

_EPOCH: Final = "SOURCE_DATE_EPOCH"
"""https://reproducible-builds.org/specs/source-date-epoch/"""


class Where(NamedTuple):
    """A bundle; or an upper directory, the image below it, and whose notes of overlayfs count there."""

    directory: str
    ref: str | None
    userxattr: bool


def _where(function: _F) -> _F:
    """Declare DIR, and the options for a DIR that is no bundle; the command gets them as a `Where`, its first argument."""

    @functools.wraps(function)
    def command(*args: Any, directory: str, ref: str | None, userxattr: bool, **kwargs: Any) -> Any:  # noqa: ANN401 (stands for every command's signature)
        return function(Where(directory, ref, userxattr), *args, **kwargs)

    decorated: Any = command
    for declare in (
        click.option(
            "--userxattr", is_flag=True, help="The overlay was mounted with userxattr, as it is without privileges."
        ),
        click.option(
            "--image", "ref", metavar="REF", help="DIR is the upper directory of an overlay above this image."
        ),
        click.argument("directory", metavar="DIR", type=click.Path()),
    ):
        decorated = declare(decorated)
    return cast("_F", decorated)


@contextlib.contextmanager
def _opened(choice: Choice, where: Where) -> Iterator[tuple[Image, Merged]]:
    """The image, and what is there of it and of the upper directory together."""
    from ocifs.changes import Merged, Namespace, Upper  # loads most of ocifs: only once a command runs

    with contextlib.ExitStack() as stack:
        if where.ref is None:
            upper, image, view = stack.enter_context(_opened_bundle(choice, Path(where.directory)))
        else:
            upper = where.directory
            image, view = stack.enter_context(opt.opened_view(choice, where.ref))
        namespace = Namespace.USER if where.userxattr else Namespace.TRUSTED
        yield image, Merged(stack.enter_context(Upper(os.fsencode(upper), namespace)), view)


@contextlib.contextmanager
def _opened_bundle(choice: Choice, directory: Path) -> Iterator[tuple[str, Image, RootFS]]:
    """A bundle's upper directory, and its image as it was when the bundle was made."""
    from ocifs.bundle import state as states
    from ocifs.image import ImageOptions
    from ocifs.rootfs import view
    from ocifs.spans import SpanCache
    from ocifs.store import Store

    if choice.image_options() != ImageOptions():
        raise UsageError("a bundle says itself which image it is of: options that choose one need --image")
    state = states.load(directory)
    if state.upper is None:
        raise UsageError(f"{directory} is read-only: nothing can have changed")
    with (
        Store(Path(state.cache)) as store,
        opt.opened_evidence(choice) as evidence,
        _same_image(state, store, evidence) as image,
    ):
        if choice.verbose:
            opt.show_warnings(image.warnings, choice)
        yield state.upper, image, view(image, SpanCache(choice.cache_bytes()))


def _same_image(state: State, store: Store, evidence: EvidenceLog | None) -> Image:
    """The image of a bundle: by its digest, or by its reference where no digest can be asked for.

    The reference may lead to another image by now, which would be indexed for nothing, or cannot be opened.
    """
    import msgspec

    from ocifs import reference
    from ocifs.errors import NotFoundError, OcifsError
    from ocifs.image import open_image

    # Mount points that the bundle's tree shows are of no layer, and a new layer is laid over layers.
    options = msgspec.structs.replace(state.options, mount_points=())
    parsed = reference.parse(state.reference)
    by_digest = f"{os.fsdecode(parsed.path)}@{state.manifest}" if parsed.path else state.reference
    if parsed.upto is not None:
        by_digest += f"#{parsed.upto}"
    for text, passed_over in ((by_digest, OcifsError), (state.reference, NotFoundError)):
        with contextlib.suppress(passed_over), opt.new_progress() as progress, contextlib.ExitStack() as undo:
            image = undo.enter_context(open_image(text, store, options, progress, evidence=evidence))
            found = image.resolved.image
            if str(found.manifest_digest or found.config_digest) == state.manifest:
                undo.pop_all()
                return image
    raise NotFoundError(
        f"{state.reference} is not the image of this bundle any more, and {state.manifest} is not there"
    )


# -- diff-upper ----------------------------------------------------------------------------------------------------


@click.command(
    "diff-upper",
    epilog=opt.examples(
        "ocifs diff-upper /run/bundles/app",
        "ocifs diff-upper -l /run/bundles/app",
        "ocifs diff-upper --json /run/bundles/app | jq -r 'select(.change == \"D\").path'",
        "ocifs diff-upper --image oci:images/app:1.2 /var/tmp/overlay/upper",
    ),
)
@click.option("-l", "long", is_flag=True, help="Say also what of it changed.")
@opt.json_lines_option
@_where
@opt.data_options
def diff_upper(choice: Choice, where: Where, *, long: bool, as_json: bool) -> None:
    """List what a container changed.

    A stands for added, C for changed, D for deleted. DIR is a bundle that 'ocifs bundle' made. Compared is with the image:
    a file that was written and is as it was is not listed. Of a deleted directory only the top is, and so of one that
    something else took the place of.
    """
    from ocifs.changes import differences

    terminal = output.to_terminal()
    with _opened(choice, where) as (_, merged):
        for found in differences(merged):
            if as_json:
                output.print_json(_json(found))
            else:
                name = output.shown(found.path, terminal=terminal)
                reasons = f"  ({', '.join(found.changed)})" if long and found.changed else ""
                output.print_line(f"{found.sign} {name}{reasons}")


def _json(found: Difference) -> dict[str, Any]:
    return {
        "change": str(found.sign),
        "path": output.decode(found.path),
        "type": "socket" if found.kind is None else TYPE_NAMES[found.kind],
        "changed": list(found.changed),
    }


# -- commit --------------------------------------------------------------------------------------------------------


@click.command(
    epilog=opt.examples(
        "ocifs commit /run/bundles/app oci:images/app:1.3",
        "ocifs commit -m 'add curl' --author 'Ada <ada@example.org>' /run/bundles/app oci:images/app:1.3",
        "ocifs commit --change 'CMD [\"/bin/app\", \"-v\"]' --change 'ENV MODE=test' /run/bundles/app oci:out:test",
        "SOURCE_DATE_EPOCH=1700000000 ocifs commit --compression zstd /run/bundles/app oci:out:app",
    )
)
@click.option("-m", "--message", metavar="TEXT", default="", help="What the new layer is, for the image's history.")
@click.option("-a", "--author", metavar="NAME", default="", help="Who made it.")
@click.option(
    "-c",
    "--change",
    "changes",
    metavar="INSTRUCTION",
    multiple=True,
    help="Change the configuration as in a Dockerfile: CMD, ENTRYPOINT, ENV, LABEL, USER, WORKDIR. Repeatable.",
)
@click.option(
    "--compression",
    metavar="gzip|zstd|none",
    default="gzip",
    help="How the new layer is compressed.  [default: gzip]",
)
@click.option(
    "--timestamp",
    metavar="SECONDS",
    envvar=_EPOCH,
    help=f"When the image was created; no file of the layer is younger.  [env: {_EPOCH}; default: now]",
)
@_where
@click.argument("target", metavar="oci:PATH:TAG")
@opt.data_options
def commit(
    choice: Choice,
    where: Where,
    target: str,
    *,
    message: str,
    author: str,
    changes: tuple[str, ...],
    compression: str,
    timestamp: str | None,
) -> None:
    """Make an image of what a container changed.

    It is the bundle's image and the changes as a layer more. DIR is a bundle that 'ocifs bundle' made. The OCI layout at
    PATH is made if it is not there; in one that is there the tag is replaced and all others stay. The same changes make
    the same layer, and with --timestamp the same image.
    """
    from ocifs import reference
    from ocifs.changes import PACKINGS, Destination, Recipe, parse_change
    from ocifs.changes import commit as write_image

    if compression not in PACKINGS:
        raise UsageError(f"--compression {compression!r} is none of {', '.join(PACKINGS)}")
    recipe = Recipe(
        message=message,
        author=author,
        changes=tuple(map(parse_change, changes)),
        packing=compression,
        timestamp=None if timestamp is None else _seconds(timestamp),
    )
    if choice.layer is not None:
        raise UsageError("--layer shows one layer alone; what a container changed is above all of them")
    destination = Destination.of(reference.parse(target, exists=lambda _: False))
    with unwound(), _opened(choice, where) as (image, merged):
        made = write_image(image, merged, destination, recipe, warn=_warn)
    output.print_line(str(made.manifest))


def _warn(path: bytes, reason: str) -> None:
    output.complain(f"warning: left out of the layer: /{output.decode(path)}: {reason}")


def _seconds(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > 11:  # noqa: PLR2004 (until the year 5138)
        raise UsageError(f"--timestamp {text!r} is no number of seconds since the epoch")
    return int(text)
