"""``find`` and ``grep``: names and data, of what is visible, what was deleted, and everything that ever was.

Not here: expressions (`ocifs.forensics.find`), searching data (`ocifs.forensics.grep`).
"""

from __future__ import annotations

import contextlib
import stat
import time
from typing import TYPE_CHECKING, Any, Final

import click

from ocifs.cli import options as opt
from ocifs.cli import output
from ocifs.cli.examining import opened_examination, version_json
from ocifs.cli.options import Choice
from ocifs.errors import DamagedError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ocifs.forensics.examination import Examination
    from ocifs.forensics.grep import Match, Names
    from ocifs.forensics.sweep import Stream
    from ocifs.history import Version
    from ocifs.rootfs import RootFS

_ENDED: Final = {1: "deleted", 2: "deleted", 3: "replaced", 4: "overridden", 5: "left out"}
_MAX_ACCOUNTS: Final = 16 << 20
"""Bytes of the image's passwd or group file that are looked at."""


def _scope_options(function: Any) -> Any:  # noqa: ANN401 (decorates any command)
    merged = click.option(
        "--merged", "scope", flag_value="merged", default="merged", help="What is visible.  [default]"
    )
    deleted = click.option("--deleted", "scope", flag_value="deleted", help="What was deleted, replaced or overridden.")
    every = click.option("--all", "scope", flag_value="all", help="Every version in every layer.")
    return merged(deleted(every(function)))


def _shown(version: Version, scope: str) -> bytes:
    """The path; where there are several versions of one, as in .ocifs/deleted of a mount: with its layer before it."""
    return b"/" + version.path if scope == "merged" else b"L%02d/%s" % (version.layer, version.path)


# -- find ----------------------------------------------------------------------------------------------------------


@click.command(
    context_settings={"allow_interspersed_args": False},
    epilog=opt.examples(
        "ocifs find app.tar /usr -type f -perm /6000",
        "ocifs find --deleted app.tar -name 'id_*' -o -name '*.pem'",
        "ocifs find --all --long app.tar -layer 3 ! -type d",
        "ocifs find --json app.tar -newermt 2024-03-01 -size +1M | jq -r .path",
    ),
)
@_scope_options
@click.option("-l", "--long", is_flag=True, help="Long: mode, owner, size, time, layer, name, how it ended.")
@opt.json_lines_option
@opt.ref_argument
@click.argument("words", metavar="[PATH…] [EXPRESSION]", nargs=-1, type=click.UNPROCESSED)
@opt.examination_options
def find(choice: Choice, ref: str, words: tuple[str, ...], *, scope: str, long: bool, as_json: bool) -> None:
    """Find names by the tests of GNU find, deleted ones too.

    Options stand before REF, the expression behind it. Tests: -name -iname -path -ipath -lname (patterns), -regex -iregex
    (Python's), -type -size -empty -perm -links -uid -gid -user -group (names by the image's passwd and group), -mtime -mmin
    -newermt, -xattr PATTERN, -layer N; -maxdepth -mindepth -prune -quit -true -false; ! -a -o ( ), actions -print -print0
    -ls. N may be +N or -N. Nothing is executed or deleted.

    With --deleted and --all names are LNN/PATH, the layer first.
    """
    from ocifs.forensics import find as finding

    split = next((at for at, word in enumerate(words) if word[:1] == "-" or word in ("(", "!", ")")), len(words))
    with contextlib.ExitStack() as stack:
        examination = stack.enter_context(opened_examination(choice, ref))
        around = finding.Surroundings(
            time.time_ns(),
            lambda: _accounts(examination, b"etc/passwd"),
            lambda: _accounts(examination, b"etc/group"),
            chosen := finding.Scope(scope),
        )
        expression = finding.parse(words[split:], around)
        tree = stack.enter_context(_opened_tree(choice, ref)) if chosen is finding.Scope.MERGED else None
        for start in _starts(examination, words[:split]):
            history = examination.history
            candidates = (
                finding.visible(history, tree, start)
                if tree is not None
                else ((version, 0) for version in finding.versions(history, chosen, start))
            )
            for version, actions in finding.search(candidates, expression, start):
                for action in actions:
                    if as_json:
                        output.print_json(version_json(version))
                    elif action == "-print0":
                        output.write(_shown(version, scope) + b"\0")
                    else:
                        _print_found(version, scope, long=long or action == "-ls")


def _starts(examination: Examination, paths: Sequence[str]) -> list[bytes]:
    from ocifs.forensics import provenance

    return [provenance.find(examination.history, opt.inside(path))[0].path for path in paths] or [b""]


def _print_found(version: Version, scope: str, *, long: bool) -> None:
    terminal = output.to_terminal()
    name = output.shown(_shown(version, scope), terminal=terminal)
    if not long:
        output.print_line(name)
        return
    from ocifs.forensics.find import size_of

    mode = stat.filemode(version.kind << 12 | version.mode)
    when = output.local_time(version.mtime_ns // 10**9)
    if version.target and not version.hard_link:
        name += f" -> {output.shown(version.target, terminal=terminal)}"
    if version.end in _ENDED:
        name += f" ({_ENDED[version.end]}{f' by layer {version.end_layer}' if version.end_layer else ''})"
    output.print_line(
        f"{mode} {version.uid:>5} {version.gid:>5} {size_of(version):>10} {when} L{version.layer:02} {name}"
    )


def _accounts(examination: Examination, path: bytes) -> dict[str, int]:
    """The names in the image's passwd or group file; none if it has no such file or it cannot be read."""
    from ocifs.forensics.find import Scope, within

    found: dict[str, int] = {}
    for version in examination.history.of(path):
        if within(version, Scope.MERGED) and not version.unreadable:
            data = b"".join(examination.data(version, 0, _MAX_ACCOUNTS))
            for line in data.split(b"\n"):
                fields = line.split(b":")
                if len(fields) > 2 and fields[2].isdigit():  # noqa: PLR2004 (name, password, number)
                    found.setdefault(output.decode(fields[0]), int(fields[2][:10]))
    return found


@contextlib.contextmanager
def _opened_tree(choice: Choice, ref: str) -> Iterator[RootFS]:
    """The merged tree besides the history: it knows what hard links share."""
    import msgspec

    from ocifs.image import open_image
    from ocifs.rootfs import view

    options = msgspec.structs.replace(choice.image_options(), examine=True)
    with opt.opened_store(choice) as store, open_image(ref, store, options) as image:
        yield view(image)


# -- grep ----------------------------------------------------------------------------------------------------------


@click.command(
    epilog=opt.examples(
        "ocifs grep app.tar 'BEGIN [A-Z ]*PRIVATE KEY'",
        "ocifs grep --all --json app.tar 'AKIA[0-9A-Z]{16}' | jq -r '[.path, .layer, .layer_offset]'",
        "ocifs grep -F -c app.tar localhost",
        "ocifs grep --slack --all app.tar 'password'",
    )
)
@_scope_options
@click.option("--slack", is_flag=True, help="Bytes that are no file's data, too: headers, padding, behind the end.")
@click.option("-F", "--fixed-strings", "fixed", is_flag=True, help="PATTERN is a text, no expression.")
@click.option("-i", "--ignore-case", is_flag=True, help="ASCII letters match in either case.")
@click.option("-l", "--files-with-matches", "names_only", is_flag=True, help="Names of files only.")
@click.option("-c", "--count", is_flag=True, help="How many lines match, of each file that has one.")
@click.option("-o", "--only-matching", "only", is_flag=True, help="What matches, not the whole line.")
@click.option("-a", "--text", is_flag=True, help="Show lines of binary files, too.")
@opt.json_lines_option
@opt.ref_argument
@click.argument("pattern")
@opt.examination_options
def grep(choice: Choice, ref: str, pattern: str, *, scope: str, slack: bool, as_json: bool, **how: bool) -> None:
    r"""Search files' data, deleted ones' too.

    PATTERN is an expression of Python's re for bytes: text in UTF-8, any byte as \xNN; ^ and $ are the ends of lines. Each
    byte is decoded and searched once, under all its names, and matches come as data lies in the layers. Lines that are
    longer than 1 MiB may be cut there, and holes are not searched. A binary file (a NUL in its first 32 KiB) is only said to
    match, on standard error, unless -a, -o or --json is given. Slack is LNN@OFFSET, as in the layer's uncompressed tar.

    Fields of --json, for each match, are path, entry and offset in the file (all null for slack), layer, data_layer and
    layer_offset (where that is), size, match, line (null in binary files), binary. Exit status: 0 if something matches, 1 if
    nothing does; any failure has its own, as of every command.
    """
    from ocifs.forensics import find as finding
    from ocifs.forensics import grep as grepping

    compiled = _compiled(pattern, fixed=how["fixed"], ignore_case=how["ignore_case"])
    chosen = finding.Scope(scope)
    with opened_examination(choice, ref) as examination:
        names = grepping.Names(examination, lambda version: finding.within(version, chosen))
        told = _Told(names, scope, how, as_json=as_json)
        failed = False
        for stream, error in grepping.grep(examination, compiled, names, told.match, slack=slack):
            told.end()
            failed = True
            for name in told.names(stream):
                output.complain(f"not searched to its end: {output.decode(name)}: {error}")
        told.end()
    if failed:
        raise click.exceptions.Exit(DamagedError.exit_code)
    if not told.found:
        raise click.exceptions.Exit(1)


def _compiled(pattern: str, *, fixed: bool, ignore_case: bool) -> Any:  # noqa: ANN401 (re.Pattern[bytes]; re is not loaded yet)
    import re

    text = output.encode(pattern)
    try:
        return re.compile(re.escape(text) if fixed else text, re.MULTILINE | (re.IGNORECASE if ignore_case else 0))
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(f"the pattern {pattern!r} is no regular expression: {error}") from None


class _Told:
    """What was found, on its way out."""

    def __init__(self, names: Names, scope: str, how: dict[str, bool], *, as_json: bool) -> None:
        self._names = names
        self._scope = scope
        self._how = how
        self._json = as_json
        self._terminal = output.to_terminal()
        self.found = False
        self._stream: Stream | None = None
        self._shown: list[bytes] = []
        self._versions: list[Version] = []
        self._line_offset = -1
        self._lines = 0

    def names(self, stream: Stream) -> list[bytes]:
        """What a stream is called."""
        if stream.entry < 0:
            return [b"L%02d@%d" % (stream.layer, stream.layer_offset)]
        return [_shown(version, self._scope) for version in self._names.of(stream)]

    def match(self, stream: Stream, match: Match) -> bool:
        """Tell of a match; whether more of the stream is wanted."""
        self.found = True
        if stream is not self._stream:
            self.end()
            self._stream, self._shown = stream, self.names(stream)
            self._versions = self._names.of(stream) if stream.entry >= 0 else []
            self._line_offset, self._lines = -1, 0
        if self._json:
            self._print_json(stream, match)
            return True
        again = match.line_offset == self._line_offset
        self._line_offset = match.line_offset
        self._lines += not again
        if self._how["names_only"]:
            self._print(b"")
            return False
        if self._how["count"]:
            return True
        slack = stream.entry < 0
        if slack:
            self._shown = [b"L%02d@%d" % (stream.layer, match.layer_offset)]
        if match.binary and not (self._how["text"] or self._how["only"] or slack):
            for name in self._shown:
                output.complain(f"{output.decode(name)}: binary file matches")
            return False
        if self._how["only"] or slack:
            self._print(b":" + match.text)
        elif not again:
            self._print(b":" + match.line)
        return True

    def end(self) -> None:
        """The stream is through."""
        if self._how["count"] and self._stream is not None and not self._json:
            self._print(b":%d" % self._lines)
        self._stream = None

    def _print(self, what: bytes) -> None:
        for name in self._shown:
            output.print_line(output.shown(name + what, terminal=self._terminal))

    def _print_json(self, stream: Stream, match: Match) -> None:
        versions: list[Version | None] = [*self._versions]
        for version in versions or [None]:
            output.print_json(
                {
                    "path": "/" + output.decode(version.path) if version else None,
                    "layer": version.layer if version else stream.layer,
                    "entry": version.entry if version else None,
                    "offset": match.file_offset if version else None,
                    "data_layer": stream.layer,
                    "layer_offset": match.layer_offset,
                    "size": len(match.text),
                    "match": output.decode(match.text),
                    "line": output.decode(match.line) if stream.entry >= 0 and not match.binary else None,
                    "binary": match.binary,
                }
            )
