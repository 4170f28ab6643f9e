"""``hash``: the hashes of an image's files, as lists that auditors' tools read, and against lists of known files.

Not here: any hash (`ocifs.forensics.hashes`), any format (`ocifs.forensics.hash_lists`), whole blobs ('ocifs verify').
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from ocifs.cli import options as opt
from ocifs.cli import output
from ocifs.cli.examining import opened_examination
from ocifs.cli.options import Choice
from ocifs.errors import DamagedError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from ocifs.erofs import Inode
    from ocifs.evidence import EvidenceLog
    from ocifs.forensics.hashes import Digests, File
    from ocifs.forensics.known import KnownList
    from ocifs.image import OpenLayer
    from ocifs.rootfs import RootFS


class _Hashable(NamedTuple):
    """What is to be hashed."""

    layers: Sequence[OpenLayer]
    files: Callable[[], Iterable[File]]
    """Gives them anew each time, in the order of the list."""
    view: RootFS | None
    """The merged tree, unless all versions are hashed."""
    evidence: EvidenceLog | None


@click.command(
    name="hash",
    epilog=opt.examples(
        "ocifs hash oci:images/app:1.2 > app.hashdeep; cd /mnt/app && hashdeep -r -l -o f -a -k ~/app.hashdeep .",
        "ocifs hash --format sha256sum app.tar > sums; cd /mnt/app && sha256sum -c ~/sums",
        "ocifs hash --format mtree app.tar > spec; mtree -f spec -p /mnt/app",
        "ocifs hash --known RDS_modern_minimal.db --unmatched --layers all app.tar",
    ),
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["hashdeep", "sha256sum", "mtree"]),
    default="hashdeep",
    help="Which tool is to read it.  [default: hashdeep]",
)
@click.option(
    "--algorithms",
    metavar="NAMES",
    default="sha256",
    help="hashdeep and --json: md5, sha1, sha256 or several, with commas.  [default: sha256]",
)
@click.option(
    "--layers",
    "which",
    type=click.Choice(["merged", "all"]),
    default="merged",
    help="The files that are visible, or every version in every layer, as LNN/PATH.  [default: merged]",
)
@click.option("--prefix", metavar="TEXT", default="./", help="What stands before each path.  [default: ./]")
@click.option(
    "--known",
    "known_path",
    metavar="FILE",
    type=click.Path(),
    help="A list of known files: of hashdeep, sha256sum, plain hashes, or an NSRL RDS 3 database.",
)
@click.option("--matched/--unmatched", default=False, help="With --known: files in the list, or not.  [default: not]")
@opt.json_lines_option
@opt.ref_argument
@opt.examination_options
def hashes(
    choice: Choice,
    ref: str,
    *,
    form: str,
    algorithms: str,
    which: str,
    prefix: str,
    known_path: str | None,
    matched: bool,
    as_json: bool,
) -> None:
    """Hash every file of an image, and look hashes up in lists.

    Each byte is decoded and hashed once; hard links are listed under each name. With --layers all, versions that a later
    layer deleted or replaced and entries that no tree ever had are hashed as well. Memory holds 40 bytes for each file, with
    --known about 150.

    Fields of --json are path, layer, entry, size, one for each algorithm, and known (null without --known); layer is the one
    that holds the data, with --layers all the one whose entry it is.
    """
    from ocifs.forensics.hashes import ALGORITHMS, Digests

    wanted = {"sha256"} if form != "hashdeep" and not as_json else set(algorithms.split(","))
    if not wanted <= set(ALGORITHMS):
        raise UsageError(f"--algorithms {algorithms!r} is not one or several of {', '.join(ALGORITHMS)}, with commas")
    if form == "mtree" and not as_json and (which == "all" or known_path is not None):
        raise UsageError("an mtree specification is of the whole merged tree: leave out --layers all and --known")
    with contextlib.ExitStack() as stack:
        known: KnownList | None = None
        if known_path is not None:
            from ocifs.forensics.known import opened_list

            known = stack.enter_context(opened_list(known_path))
        what = stack.enter_context(_opened(choice, ref, which))
        digests = Digests([*wanted, known.algorithm] if known else [*wanted])
        digests.calculate(what.layers, (file.content for file in what.files()), what.evidence)
        listed = _Listed(digests, wanted, output.encode(prefix), matched=matched)
        if known is not None:
            listed.look_up(known, what.files())
        if as_json:
            listed.print_json(what.files())
        elif form == "mtree" and what.view is not None:
            listed.print_mtree(what.view, what.files())
        else:
            listed.print_lines(what.files(), form, output.encode(ref))
    if listed.failed:
        raise click.exceptions.Exit(DamagedError.exit_code)


@contextlib.contextmanager
def _opened(choice: Choice, ref: str, which: str) -> Iterator[_Hashable]:
    from ocifs.forensics.hashes import all_files, merged_files

    if which == "all":
        with opened_examination(choice, ref) as examination:
            history = examination.history
            yield _Hashable(examination.layers, lambda: all_files(history), None, examination.evidence)
        return
    import msgspec

    from ocifs.rootfs import view

    options = msgspec.structs.replace(choice.image_options(), examine=True)
    with opt.opened_image(choice, ref, options=options) as image:
        seen = view(image)
        yield _Hashable(image.layers, lambda: merged_files(seen), seen, image.evidence)


class _Listed:
    """Files with their hashes, on their way out."""

    def __init__(self, digests: Digests, wanted: set[str], prefix: bytes, *, matched: bool) -> None:
        self._digests = digests
        self._wanted = wanted
        self._prefix = prefix
        self._matched = matched
        self._known: set[str] | None = None
        self._algorithm = ""
        self.failed = 0

    def look_up(self, known: KnownList, files: Iterable[File]) -> None:
        """Find out which files are in the list."""
        ours = set()
        for file in files:
            with contextlib.suppress(DamagedError):
                hashes = self._digests.split(self._digests.get(file.content))
                ours.add(bytes.fromhex(hashes[known.algorithm]))
        self._algorithm = known.algorithm
        self._known = {digest.hex() for digest in known.among(ours)}

    def print_json(self, files: Iterable[File]) -> None:
        for file, hashes, known in self._hashed(files):
            version = file.version
            row: dict[str, Any] = {
                "path": "/" + output.decode(file.path),
                "layer": version.layer if version else file.content.layer or None,
                "entry": version.entry if version else None,
                "size": file.content.size,
                **hashes,
                "known": known,
            }
            output.print_json(row)

    def print_lines(self, files: Iterable[File], form: str, ref: bytes) -> None:
        from ocifs.forensics import hash_lists

        unfit = 0
        if form == "hashdeep":
            algorithms = [name for name in self._digests.algorithms if name in self._wanted]
            output.write(hash_lists.hashdeep_header(algorithms, b"ocifs hash " + ref))
        for file, hashes, _ in self._hashed(files):
            name = self._prefix + _name(file)
            if form == "hashdeep":
                unfit += hash_lists.unfit_for_hashdeep(name)
                output.write(hash_lists.hashdeep_line(name, file.content.size, hashes))
            else:
                output.write(hash_lists.sha256sum_line(name, hashes))
        if unfit:
            names = "1 name has" if unfit == 1 else f"{unfit} names have"
            output.complain(
                f"warning: {names} a newline, written as \\n: hashdeep cannot read that back, and its audit fails there;"
                " sha256sum and mtree can"
            )

    def print_mtree(self, view: RootFS, files: Iterable[File]) -> None:
        from ocifs.forensics import hash_lists

        def write(path: bytes, found: Inode, hashes: dict[str, str]) -> None:
            output.write(hash_lists.mtree_line(path, found, view.readlink, hashes))

        from ocifs.tree import Kind

        output.write(hash_lists.MTREE_HEADER)
        write(b"", view.inode(view.root), {})
        # The tree and its files come in the same order; a file whose data is missing has no hash to compare.
        hashed = iter(self._each(files))
        for path, found in view.preorder():
            write(path, found, next(hashed)[1] if found.kind is Kind.FILE else {})

    def _hashed(self, files: Iterable[File]) -> Iterator[tuple[File, dict[str, str], bool | None]]:
        """Give the files that are to be listed, with their hashes and whether they are known."""
        for file, hashes in self._each(files):
            known = None if self._known is None else hashes.get(self._algorithm) in self._known
            if hashes and (known is None or known is self._matched):
                yield file, {name: value for name, value in hashes.items() if name in self._wanted}, known

    def _each(self, files: Iterable[File]) -> Iterator[tuple[File, dict[str, str]]]:
        for file in files:
            try:
                yield file, self._digests.split(self._digests.get(file.content))
            except DamagedError as error:
                output.complain(f"not hashed: {output.decode(_name(file))}: {error}")
                self.failed += 1
                yield file, {}


def _name(file: File) -> bytes:
    """The path; of one version of several with its layer before it."""
    return file.path if file.version is None else b"L%02d/%s" % (file.version.layer, file.path)
