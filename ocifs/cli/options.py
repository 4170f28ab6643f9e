"""The options that commands share, and opening an image as they say.

Options are read into one value, `Choice`, which commands get as their first argument. Words are checked where they are
used, so that a wrong one is refused in the same words whatever command it was given to.

Not here: what any command does with an image.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar, cast

import click

from ocifs.cli.output import complain, decode
from ocifs.errors import NotFoundError, OcifsError, UsageError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from ocifs.cli.progress import Progress
    from ocifs.evidence import EvidenceLog
    from ocifs.image import Image, ImageOptions
    from ocifs.rootfs import RootFS
    from ocifs.store import Store
    from ocifs.tree import Warned

_F = TypeVar("_F", bound=Callable[..., Any])

_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?) *(?:([kmgt])(?:i?b)?|b)?", re.IGNORECASE | re.ASCII)
_MAX_SIZE: Final = 1 << 60
_MAX_WARNINGS: Final = 50
"""Warnings shown without -vv: an image may have thousands of the same kind."""


class Choice(NamedTuple):
    """What the shared options say. Those that a command does not have keep their defaults."""

    cache_dir: str | None = None
    verbose: int = 0
    platform: str | None = None
    namespace: str = "default"
    root: str | None = None
    upto: int | None = None
    layer: int | None = None
    examine: bool = False
    views: str | None = None
    """What ``--examine=`` of a mount says, words with commas between them."""
    show_whiteout_devices: bool = False
    follow_dirlinks: bool = False
    all_xattrs: bool = False
    unpack: bool = False
    cache_memory: str | None = None
    evidence_log: str | None = None
    case: str | None = None
    examiner: str | None = None
    item: str | None = None

    def image_options(self) -> ImageOptions:
        """What the image room is to be told. Raises `UsageError` for a platform that is none."""
        from ocifs.image import ImageOptions  # loads most of ocifs: only once a command runs
        from ocifs.spec import Platform

        if self.layer is not None and self.upto is not None:
            raise UsageError("--layer shows one layer alone and --upto the first ones together: give one of them")
        return ImageOptions(
            platform=None if self.platform is None else Platform.parse(self.platform),
            upto=self.upto,
            layer=self.layer,
            examine=self.examine,
            show_whiteout_devices=self.show_whiteout_devices,
            follow_dirlinks=self.follow_dirlinks,
            all_xattrs=self.all_xattrs,
            unpack=self.unpack,
            namespace=self.namespace,
            containerd_root=self.root,
        )

    def cache_path(self) -> Path:
        """Where the cache is, or will be."""
        from ocifs.store import default_path

        if self.cache_dir == "":
            raise UsageError("the cache directory is empty: check --cache-dir and OCIFS_CACHE_DIR")
        return default_path() if self.cache_dir is None else Path(self.cache_dir).absolute()

    def store(self) -> Store:
        """Open the cache. The caller closes it."""
        from ocifs.store import Store

        return Store(self.cache_path())

    def cache_bytes(self) -> int:
        """Bytes of decoded data to keep in memory."""
        from ocifs.spans import DEFAULT_CACHE

        return DEFAULT_CACHE if self.cache_memory is None else parse_size(self.cache_memory, "--cache-memory")


# -- declaring them ------------------------------------------------------------------------------------------------


def _be_verbose(_: click.Context, __: click.Parameter, value: int) -> int:
    if value:
        import logging

        logging.basicConfig(format="ocifs: %(message)s")
        logging.getLogger("ocifs").setLevel(logging.DEBUG if value > 1 else logging.INFO)
    return value


_VERBOSE: Final = (
    click.option("-v", "--verbose", count=True, callback=_be_verbose, help="Say more; twice: even more."),
)
_VERBOSE_LONG: Final = (
    click.option("--verbose", count=True, callback=_be_verbose, help="Say more; twice: even more."),
)
_CACHE_DIR: Final = (
    click.option(
        "--cache-dir",
        metavar="DIR",
        envvar="OCIFS_CACHE_DIR",
        type=click.Path(),
        help="Where indexes are kept.  [env: OCIFS_CACHE_DIR; default: /var/cache/ocifs for root, else below ~/.cache]",
    ),
)
_CACHE: Final = (*_CACHE_DIR, *_VERBOSE)
_SOURCE: Final = (
    click.option(
        "--platform", metavar="OS/ARCH[/VARIANT]", help="Which image of several to take.  [default: this machine's]"
    ),
    click.option("--namespace", metavar="NAME", default="default", help="containerd: namespace.  [default: default]"),
    click.option(
        "--root",
        metavar="DIR",
        type=click.Path(),
        help="containerd: its root directory.  [default: /var/lib/containerd]",
    ),
)
_EVIDENCE: Final = (
    click.option(
        "--evidence-log",
        metavar="FILE",
        type=click.Path(dir_okay=False),
        help="Append what is opened and every range that is read to FILE, as chained JSON lines.",
    ),
    click.option("--case", metavar="TEXT", envvar="OCIFS_CASE", help="Evidence log: the case.  [env: OCIFS_CASE]"),
    click.option(
        "--examiner", metavar="TEXT", envvar="OCIFS_EXAMINER", help="Evidence log: the examiner.  [env: OCIFS_EXAMINER]"
    ),
    click.option("--item", metavar="TEXT", envvar="OCIFS_ITEM", help="Evidence log: the item.  [env: OCIFS_ITEM]"),
)
_EXAMINE: Final = (
    click.option("--examine", is_flag=True, help="Warn about what breaks a rule or a digest instead of refusing it."),
)
_UPTO: Final = (click.option("--upto", metavar="N", type=int, help="Only the first N layers."),)
_DIRLINKS: Final = (
    click.option("--follow-dirlinks", is_flag=True, help="Follow a lower layer's link to a directory, as umoci does."),
)
_TREE: Final = (
    *_UPTO,
    click.option("--layer", metavar="N", type=int, help="Layer N alone, its whiteouts as empty files .wh.*."),
    click.option("--show-whiteout-devices", is_flag=True, help="Show character devices 0:0 instead of obeying them."),
    *_DIRLINKS,
    click.option("--unpack", is_flag=True, help="Of an artifact (a chart, a package), show tars as directories."),
    click.option("--all-xattrs", is_flag=True, help="Show attributes that are usually hidden, as security.selinux."),
)
_MEMORY: Final = (
    click.option(
        "--cache-memory", metavar="SIZE", help="Decoded data to keep in memory, as 64M or 1GiB.  [default: 128MiB]"
    ),
)
DRIVERS: Final = ("auto", "erofs", "fuse")
"""As `ocifs.driver.DRIVERS`, which takes long to import."""

_NAMES: Final = frozenset(Choice._fields)


def _sign_warnings() -> None:
    """Let what is logged without ``-v`` begin as every other line on standard error does."""
    import logging

    if logging.lastResort is not None:
        logging.lastResort.setFormatter(logging.Formatter("ocifs: %(message)s"))


def _declared(groups: Sequence[Sequence[Callable[[_F], _F]]]) -> Callable[[_F], _F]:
    """Declare options on a command and hand them to it as a `Choice`, its first argument."""

    def decorate(function: _F) -> _F:
        @functools.wraps(function)
        def command(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 (stands for every command's signature)
            chosen = {name: kwargs.pop(name) for name in _NAMES & kwargs.keys()}
            _sign_warnings()
            return function(Choice(**chosen), *args, **kwargs)

        decorated: Any = command
        for option in reversed([option for group in groups for option in group]):
            decorated = option(decorated)
        return cast("_F", decorated)

    return decorate


def plain_options(function: _F) -> _F:
    """The option of commands that need neither image nor cache."""
    return _declared((_VERBOSE,))(function)


def cache_options(function: _F) -> _F:
    """Options of every command that uses the cache."""
    return _declared((_CACHE,))(function)


def document_options(function: _F) -> _F:
    """Options of commands that read an image's documents."""
    return _declared((_SOURCE, _EVIDENCE, _CACHE))(function)


def layer_options(function: _F) -> _F:
    """Options of commands that look at layers one by one."""
    return _declared((_SOURCE, _EVIDENCE, _EXAMINE, _CACHE))(function)


def tree_options(function: _F) -> _F:
    """Options of commands that look at names and attributes."""
    return _declared((_SOURCE, _EVIDENCE, _TREE, _EXAMINE, _CACHE))(function)


def data_options(function: _F) -> _F:
    """Options of commands that read files' data."""
    return _declared((_SOURCE, _EVIDENCE, _TREE, _EXAMINE, _MEMORY, _CACHE))(function)


def examination_options(function: _F) -> _F:
    """Options of commands that look at every layer of an image: they examine anyhow."""
    return _declared((_SOURCE, _EVIDENCE, _UPTO, _DIRLINKS, _MEMORY, _CACHE))(function)


def container_options(function: _F) -> _F:
    """Options of commands that make containers; there -v is a volume."""
    return _declared((_SOURCE, _EVIDENCE, _UPTO, _MEMORY, _CACHE_DIR, _VERBOSE_LONG))(function)


def json_option(function: _F) -> _F:
    """Declare --json of a command that has one thing to say."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")(function)


def json_lines_option(function: _F) -> _F:
    """Declare --json of a command that lists things."""
    return click.option("--json", "as_json", is_flag=True, help="Print a JSON object a line.")(function)


def examples(*lines: str) -> str:
    """The epilogue of a command's help."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def parse_size(text: str, option: str) -> int:
    """Read ``64M``, ``1GiB``, ``4096``: K, M, G and T are binary whether or not ``iB`` follows."""
    match = _SIZE.fullmatch(text.strip())
    size = float(match[1]) * 1024 ** (" kmgt".index((match[2] or " ").lower())) if match else -1.0
    if not 0 <= size <= _MAX_SIZE:
        raise UsageError(f"{option} {text!r} is not a size such as 64M, 1GiB or 4096")
    return int(size)


def _complete_ref(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from ocifs.cli.shell import complete_reference  # only a shell asks

    return complete_reference(incomplete)


def ref_argument(function: _F) -> _F:
    """Declare the argument REF."""
    return click.argument("ref", metavar="REF", shell_complete=_complete_ref)(function)


def refs_argument(function: _F) -> _F:
    """Declare the argument REF…, at least one."""
    return click.argument("refs", metavar="REF…", nargs=-1, required=True, shell_complete=_complete_ref)(function)


def place(directory: str) -> Path:
    """A directory named on the command line. An empty name is a mistake, and not the working directory."""
    if not directory:
        raise UsageError("the name of a directory is empty")
    return Path(directory)


# -- opening -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened_store(choice: Choice) -> Iterator[Store]:
    """The cache, open for the length of the block."""
    store = choice.store()
    try:
        yield store
    finally:
        store.close()


@contextlib.contextmanager
def store_if_needed(choice: Choice) -> Iterator[Callable[[], Store]]:
    """A function that opens the cache when it is first called, for the length of the block."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def opened() -> Store:
            return stack.enter_context(opened_store(choice))

        yield opened


_given: ContextVar[Image | None] = ContextVar("given", default=None)


@contextlib.contextmanager
def given_image(image: Image) -> Iterator[None]:
    """Have `opened_image` in the block give an image that is open already, whatever it is told to open."""
    token = _given.set(image)
    try:
        yield
    finally:
        _given.reset(token)


@contextlib.contextmanager
def opened_image(
    choice: Choice, ref: str, *, store: Store | None = None, options: ImageOptions | None = None
) -> Iterator[Image]:
    """The image and its tree, built if need be (with a bar on a terminal), open for the length of the block.

    ``options`` are used instead of those that ``choice`` says.
    """
    open_already = _given.get()
    if open_already is not None:
        yield open_already
        return
    from ocifs.cli.progress import showing
    from ocifs.image import open_image

    options = options or choice.image_options()
    with contextlib.ExitStack() as stack:
        if store is None:
            store = stack.enter_context(opened_store(choice))
        evidence = stack.enter_context(opened_evidence(choice))
        with showing() as progress:
            image = stack.enter_context(open_image(ref, store, options, progress, evidence=evidence))
        if choice.examine or choice.verbose:
            show_warnings(image.warnings, choice)
        yield image


@contextlib.contextmanager
def opened_evidence(choice: Choice) -> Iterator[EvidenceLog | None]:
    """The evidence log, if one is wanted, open for the length of the block: its first line says which command this is."""
    if choice.evidence_log is None:
        yield None
        return
    import sys

    from ocifs.evidence import About, EvidenceLog

    with EvidenceLog(Path(choice.evidence_log), About(choice.case, choice.examiner, choice.item)) as evidence:
        words = [word.encode(errors="surrogateescape").decode(errors="backslashreplace") for word in sys.argv]
        evidence.append("began", command=words, host=os.uname().nodename, uid=os.getuid(), pid=os.getpid())
        yield evidence


@contextlib.contextmanager
def opened_view(choice: Choice, ref: str) -> Iterator[tuple[Image, RootFS]]:
    """The image and the view of it that paths are looked up in."""
    from ocifs.rootfs import view
    from ocifs.spans import SpanCache

    cache = SpanCache(choice.cache_bytes())
    with opened_image(choice, ref) as image:
        yield image, view(image, cache=cache)


def new_progress() -> contextlib.AbstractContextManager[Progress]:
    """See `ocifs.cli.progress.showing`."""
    from ocifs.cli.progress import showing

    return showing()


def warning_text(warned: Warned) -> str:
    """A warning as a line: where, about what, which rule."""
    where = f"layer {warned.layer}: " if warned.layer else ""
    path = f"{decode(warned.path)}: " if warned.path else ""
    return f"warning: {where}{path}{warned.message} (rule {warned.rule})"


def show_warnings(warnings: Sequence[Warned], choice: Choice) -> None:
    """Write warnings to standard error, one line each; after `_MAX_WARNINGS` only how many more, unless -vv."""
    limit = len(warnings) if choice.verbose > 1 else _MAX_WARNINGS
    for warned in warnings[:limit]:
        complain(warning_text(warned))
    if len(warnings) > limit:
        complain(f"warning: and {len(warnings) - limit} more; -vv shows them all")


def for_each(names: Sequence[str], act: Callable[[str], None]) -> None:
    """Do the same for every name: with several, one that fails is reported and the others are done all the same.

    The exit status is then the highest of all.
    """
    if len(names) == 1:
        act(names[0])
        return
    worst = 0
    for name in names:
        try:
            act(name)
        except OcifsError as error:
            complain(str(error))
            worst = max(worst, error.exit_code)
    if worst:
        raise click.exceptions.Exit(worst)


# -- paths inside an image -----------------------------------------------------------------------------------------


def inside(path: str) -> bytes:
    """A path inside the image as the user gave it: from the root, with or without the slash."""
    if "\0" in path:
        raise UsageError(f"the path {path!r} holds a NUL character")
    try:
        raw = os.fsencode(path)
    except UnicodeEncodeError:
        raise UsageError(f"the path {path!r} holds characters that no file name can have") from None
    return b"/" + raw.lstrip(b"/")


def find(view: RootFS, path: bytes, *, follow: bool = True) -> int:
    """The inode of a path; `NotFoundError` names what there is instead."""
    try:
        return view.resolve(path, follow=follow)
    except NotFoundError as error:
        hint = _nearest(view, path)
        raise type(error)(f"{error}{hint}") from None


def _nearest(view: RootFS, path: bytes) -> str:
    """Say how far a path leads, and what there has a similar name."""
    from ocifs.tree import Kind

    parts = [part for part in path.split(b"/") if part]
    for count in range(len(parts) - 1, -1, -1):
        parent = b"/" + b"/".join(parts[:count])
        try:
            ino = view.resolve(parent)
        except OcifsError:
            continue
        if view.inode(ino).kind is not Kind.DIR:
            return f"; {decode(parent)} is not a directory"
        import difflib  # only on a mistake
        from itertools import islice

        # Enough to find a slip of the finger, and not slow in a directory with a million names.
        names = [decode(name) for name, *_ in islice(view.readdir(ino), 5000)]
        near = difflib.get_close_matches(decode(parts[count]), [n for n in names if n not in (".", "..")], 3, 0.6)
        if near:
            return f"; {decode(parent)} has {', '.join(near)}"
        return f"; the nearest that exists is {decode(parent)}" if count < len(parts) - 1 else ""
    return ""
