r"""find(1)'s expressions over the versions of an image: what is visible, what was deleted, or everything that ever was.

An expression means what it means to GNU find, but for these:

* What is looked at are versions (`ocifs.history.Version`), by path and layer; `Scope` says which. Paths begin with ``/``.
* ``-regex`` and ``-iregex`` are Python's regular expressions and match the whole path.
* ``-user`` and ``-group`` know the names in the image's own ``/etc/passwd`` and ``/etc/group``, and numbers.
* A directory's size is 0, a symlink's the length of its target. A directory is empty if the scope has nothing in it.
* New are ``-layer N`` and ``-xattr PATTERN`` (a name of an extended attribute). There is no ``-exec`` nor its like.

What is visible has the attributes of the tree, those of an inode that hard links share among them (rule H7); other versions
have those of their entries.

Patterns are those of fnmatch(3) in a UTF-8 locale, where ``*`` and ``?`` match a slash and a leading dot, too.

Not here: patterns (`ocifs.forensics.patterns`), how anything is printed.
"""

from __future__ import annotations

import datetime
import enum
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import msgspec

from ocifs.errors import UsageError
from ocifs.forensics.patterns import pattern
from ocifs.history import Change, End
from ocifs.tree import Kind

if TYPE_CHECKING:
    from ocifs.history import History, Version
    from ocifs.rootfs import RootFS


class Scope(enum.StrEnum):
    """Which versions are looked at."""

    MERGED = "merged"
    """What the image shows."""
    DELETED = "deleted"
    """What it does not show: deleted, replaced, overridden within a layer."""
    ALL = "all"
    """Both, and markers and what the layer rules leave out."""


@dataclass(slots=True)
class Found:
    """A version on its way through an expression."""

    version: Version
    path: str
    """With a leading slash; undecodable bytes as lone surrogates."""
    depth: int
    """Below the starting point."""
    empty: bool
    """Whether the scope has nothing below it."""
    links: int
    """How many names it has; 0 of what is not visible."""
    actions: list[str] = field(default_factory=list)
    """``-print``, ``-print0``, ``-ls``, as often as the expression says so."""
    prune: bool = False
    quit: bool = False

    @property
    def name(self) -> str:
        """The last component; of the root the slash."""
        return self.path.rpartition("/")[2] or "/"


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What an expression needs to know besides."""

    now_ns: int
    users: Callable[[], Mapping[str, int]] = dict
    groups: Callable[[], Mapping[str, int]] = dict
    scope: Scope = Scope.MERGED


Test = Callable[[Found], bool]


@dataclass(frozen=True, slots=True)
class Expression:
    """A parsed expression."""

    test: Test
    acts: bool
    """Whether it says what is to be done; else everything that it holds for is printed."""
    mindepth: int
    maxdepth: int | None


def visible(history: History, view: RootFS, start: bytes = b"") -> Iterator[tuple[Version, int]]:
    """Give what a merged tree shows at and below ``start``, by path, with the attributes that it shows and the links."""
    above: list[tuple[bytes, int]] = []
    for version in versions(history, Scope.MERGED, start):
        parent, _, name = version.path.rpartition(b"/")
        while above and (above[-1][0] != parent or not version.path):
            above.pop()
        directory = above[-1][1] if above else view.resolve(b"/" + parent, follow=False)
        ino = view.lookup(directory, name) if name else view.root
        if ino is None:
            continue
        found = view.inode(ino)
        if found.kind is Kind.DIR:
            above.append((version.path, ino))
        elif found.nlink > 1:
            version = msgspec.structs.replace(  # noqa: PLW2901 (the same, as it is shown)
                version,
                mode=found.mode & 0o7777,
                uid=found.uid,
                gid=found.gid,
                mtime_ns=found.mtime_ns,
                xattrs=tuple(view.xattrs(ino).items()),
            )
        yield version, found.nlink


def versions(history: History, scope: Scope, start: bytes = b"") -> Iterator[Version]:
    """Give the versions of a scope at and below ``start``, by path and layer."""
    return (version for version in history.below(start) if within(version, scope))


def search(
    candidates: Iterable[tuple[Version, int]], expression: Expression, start: bytes = b""
) -> Iterator[tuple[Version, list[str]]]:
    """Give those of the candidates (versions by path and layer, and their links) to do something with, and what to do."""
    base = start.count(b"/") + 1 if start else 0
    pruned: bytes | None = None
    for version, links, empty in _with_empty(candidates):
        if pruned is not None and version.path.startswith(pruned):
            continue
        depth = (version.path.count(b"/") + 1 if version.path else 0) - base
        if depth < expression.mindepth or (expression.maxdepth is not None and depth > expression.maxdepth):
            continue
        found = Found(version, "/" + version.path.decode("utf-8", "surrogateescape"), depth, empty, links)
        holds = expression.test(found)
        if holds and not expression.acts:
            found.actions.append("-print")
        if found.actions:
            yield version, found.actions
        if found.quit:
            return
        if found.prune and version.kind == Kind.DIR:
            pruned = version.path + b"/" if version.path else b""


def within(version: Version, scope: Scope) -> bool:
    """Say whether a scope has a version."""
    if scope is Scope.ALL:
        return True
    if version.change is Change.MARKER or version.end is End.LEFT_OUT:
        return False
    return (version.end is End.VISIBLE) == (scope is Scope.MERGED)


def _with_empty(candidates: Iterable[tuple[Version, int]]) -> Iterator[tuple[Version, int, bool]]:
    """Say of each version whether nothing is below its path; what is comes right behind all versions of the path."""
    waiting: list[tuple[Version, int]] = []
    for version, links in candidates:
        if waiting and waiting[0][0].path != version.path:
            path = waiting[0][0].path
            below = version.path.startswith(path + b"/") if path else True
            yield from ((*one, not below) for one in waiting)
            waiting = []
        waiting.append((version, links))
    yield from ((*one, True) for one in waiting)


# -- parsing -------------------------------------------------------------------------------------------------------


def parse(words: Sequence[str], around: Surroundings) -> Expression:
    """Read an expression; none is one that always holds. Raises `UsageError`."""
    parser = _Parser(words, around)
    test = parser.expression() if words else _always
    if parser.left:
        raise UsageError(f"find: {parser.left[0]!r} is one too many")
    return Expression(test, parser.acts, parser.mindepth, parser.maxdepth)


def _always(_: Found) -> bool:
    return True


class _Parser:
    """Recursive descent over the words: ``-o`` binds weakest, then ``-a`` or nothing, then ``!``."""

    def __init__(self, words: Sequence[str], around: Surroundings) -> None:
        self.left = list(words)
        self.acts = False
        self.mindepth = 0
        self.maxdepth: int | None = None
        self._around = around
        self._depth = 0

    def expression(self) -> Test:
        tests = [self._conjunction()]
        while self.left and self.left[0] in ("-o", "-or"):
            self.left.pop(0)
            tests.append(self._conjunction())
        return tests[0] if len(tests) == 1 else lambda found: any(test(found) for test in tests)

    def _conjunction(self) -> Test:
        tests = [self._negation()]
        while self.left and self.left[0] not in ("-o", "-or", ")"):
            if self.left[0] in ("-a", "-and"):
                self.left.pop(0)
            tests.append(self._negation())
        return tests[0] if len(tests) == 1 else lambda found: all(test(found) for test in tests)

    def _negation(self) -> Test:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise UsageError("find: the expression is nested too deeply")
        try:
            word = self._next("a test")
            if word in ("!", "-not"):
                test = self._negation()
                return lambda found: not test(found)
            if word == "(":
                test = self.expression()
                if not self.left or self.left.pop(0) != ")":
                    raise UsageError("find: a ) is missing")
                return test
            return self._primary(word)
        finally:
            self._depth -= 1

    def _next(self, what: str) -> str:
        if not self.left:
            raise UsageError(f"find: {what} is missing at the end of the expression")
        return self.left.pop(0)

    def _primary(self, word: str) -> Test:
        if word in _ACTIONS:
            self.acts = True
            return _action(word)
        if word in _PLAIN:
            return _PLAIN[word]
        if word in ("-mindepth", "-maxdepth"):
            depth = self._next(f"{word}'s number")
            if not re.fullmatch(r"[0-9]{1,9}", depth):
                raise UsageError(f"find: {word} {depth!r} is not a number")
            setattr(self, word[1:], int(depth))
            return _always
        make = _TESTS.get(word)
        if make is None:
            what = "options stand before REF" if word.startswith("--") else "'ocifs find --help' lists them"
            raise UsageError(f"find: there is no test {word!r}; {what}")
        return make(self._next(f"{word}'s argument"), self._around)


_MAX_DEPTH: Final = 100
_ACTIONS: Final = frozenset({"-print", "-print0", "-ls"})


def _action(word: str) -> Test:
    def act(found: Found) -> bool:
        found.actions.append(word)
        return True

    return act


def _prune(found: Found) -> bool:
    found.prune = True
    return True


def _quit(found: Found) -> bool:
    found.quit = True
    return True


def _is_empty(found: Found) -> bool:
    kind = found.version.kind
    return found.empty if kind == Kind.DIR else kind == Kind.FILE and not found.version.size


_PLAIN: Final[Mapping[str, Test]] = {
    "-empty": _is_empty,
    "-false": lambda _: False,
    "-prune": _prune,
    "-quit": _quit,
    "-true": _always,
}


# -- tests with an argument ----------------------------------------------------------------------------------------


def _glob(of: Callable[[Found], str], *, ignore_case: bool = False) -> _Make:
    def make(argument: str, _: Surroundings) -> Test:
        matches = pattern(argument, ignore_case=ignore_case).fullmatch
        return lambda found: matches(of(found)) is not None

    return make


def _regex(flags: int) -> _Make:
    def make(argument: str, _: Surroundings) -> Test:
        try:
            matches = re.compile(argument, re.DOTALL | flags).fullmatch
        except re.error as error:
            raise UsageError(f"find: -regex {argument!r} is no regular expression: {error}") from None
        return lambda found: matches(found.path) is not None

    return make


def _link_name(argument: str, _: Surroundings) -> Test:
    matches = pattern(argument).fullmatch
    return lambda found: found.version.kind == Kind.SYMLINK and matches(_text(found.version.target)) is not None


def _xattr(argument: str, _: Surroundings) -> Test:
    matches = pattern(argument).fullmatch
    return lambda found: any(matches(_text(name)) for name, _ in found.version.xattrs)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


_LETTERS: Final = {
    "f": Kind.FILE,
    "d": Kind.DIR,
    "l": Kind.SYMLINK,
    "c": Kind.CHAR,
    "b": Kind.BLOCK,
    "p": Kind.FIFO,
}


def _type(argument: str, _: Surroundings) -> Test:
    letters = argument.split(",")
    if not set(letters) <= {*_LETTERS, "s"}:
        raise UsageError(f"find: -type {argument!r} is not one or several of f, d, l, c, b, p, s, with commas")
    kinds = {_LETTERS[letter] for letter in letters if letter in _LETTERS}
    return lambda found: found.version.kind in kinds


def _number(argument: str, test: str) -> Callable[[int], bool]:
    """``N``, ``+N`` for more, ``-N`` for less."""
    match = re.fullmatch(r"([+-]?)([0-9]{1,19})", argument)
    if not match:
        raise UsageError(f"find: {test} {argument!r} is not a number, alone or with + or - before it")
    number = int(match[2])
    if match[1] == "+":
        return lambda value: value > number
    return (lambda value: value < number) if match[1] else (lambda value: value == number)


def _counted(test: str, of: Callable[[Found], int]) -> _Make:
    def make(argument: str, _: Surroundings) -> Test:
        holds = _number(argument, test)
        return lambda found: holds(of(found))

    return make


_UNITS: Final = {"b": 512, "c": 1, "w": 2, "k": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def _size(argument: str, _: Surroundings) -> Test:
    unit = _UNITS.get(argument[-1:], 0)
    holds = _number(argument[:-1] if unit else argument, "-size")
    unit = unit or 512
    return lambda found: holds(-(-size_of(found.version) // unit))


def size_of(version: Version) -> int:
    """Give a version's size as ``-size`` means it."""
    if version.kind == Kind.SYMLINK:
        return len(version.target)
    return version.size if version.kind == Kind.FILE else 0


def _age(test: str, unit_ns: int) -> _Make:
    def make(argument: str, around: Surroundings) -> Test:
        holds = _number(argument, test)
        return lambda found: holds((around.now_ns - found.version.mtime_ns) // unit_ns)

    return make


def _newer(argument: str, _: Surroundings) -> Test:
    """ISO 8601, in this machine's zone unless it says another; or seconds since the epoch behind an ``@``."""
    try:
        if argument.startswith("@"):
            since = int(float(argument[1:]) * 10**9)
        else:
            when = datetime.datetime.fromisoformat(argument)
            since = round(when.timestamp() * 10**6) * 1000
    except (ValueError, OverflowError, OSError):
        raise UsageError(f"find: -newermt {argument!r} is no time such as 2024-03-01 or 2024-03-01T12:00:00Z") from None
    return lambda found: found.version.mtime_ns > since


def _owner(test: str, of: Callable[[Found], int], names: Callable[[Surroundings], Mapping[str, int]]) -> _Make:
    def make(argument: str, around: Surroundings) -> Test:
        known = {} if argument.isdecimal() else names(around)
        if not argument.isdecimal() and argument not in known:
            raise UsageError(f"find: {test} {argument!r} is neither a number nor a name that the image has")
        number = known[argument] if argument in known else int(argument)
        return lambda found: of(found) == number

    return make


def _links(argument: str, around: Surroundings) -> Test:
    holds = _number(argument, "-links")
    if around.scope is not Scope.MERGED:
        raise UsageError("find: -links has a meaning in the merged tree only")
    return lambda found: holds(found.links)


def _perm(argument: str, _: Surroundings) -> Test:
    how = argument[:1] if argument[:1] in ("-", "/") else ""
    bits = _mode(argument[len(how) :], argument)
    if how == "-":
        return lambda found: found.version.mode & bits == bits
    if how == "/":
        return lambda found: not bits or found.version.mode & bits != 0
    return lambda found: found.version.mode == bits


_WHO: Final = {"u": 0o4700, "g": 0o2070, "o": 0o1007, "a": 0o7777}
_WHAT: Final = {"r": 0o444, "w": 0o222, "x": 0o111, "s": 0o6000, "t": 0o1000}


def _mode(text: str, argument: str) -> int:
    """Octal, or chmod(1)'s symbols applied to no permission at all."""
    if re.fullmatch(r"[0-7]{1,4}", text):
        return int(text, 8)
    bits = 0
    for clause in text.split(","):
        match = re.fullmatch(r"([ugoa]*)([+=-])([rwxst]*)", clause)
        if not match:
            raise UsageError(f"find: -perm {argument!r} is no mode such as 644, -4000, /u+s or u=rwx,g=rx")
        who = _or(_WHO[letter] for letter in match[1] or "a")
        what = who & _or(_WHAT[letter] for letter in match[3])
        # t belongs to no one in particular.
        what |= 0o1000 if "t" in match[3] else 0
        bits = {"+": bits | what, "-": bits & ~what, "=": bits & ~who | what}[match[2]]
    return bits


def _or(values: Iterable[int]) -> int:
    bits = 0
    for value in values:
        bits |= value
    return bits


_Make = Callable[[str, Surroundings], Test]

_DAY: Final = 86400 * 10**9
_TESTS: Final[Mapping[str, _Make]] = {
    "-gid": _counted("-gid", lambda found: found.version.gid),
    "-group": _owner("-group", lambda found: found.version.gid, lambda around: around.groups()),
    "-iname": _glob(lambda found: found.name, ignore_case=True),
    "-ipath": _glob(lambda found: found.path, ignore_case=True),
    "-iregex": _regex(re.IGNORECASE),
    "-layer": _counted("-layer", lambda found: found.version.layer),
    "-links": _links,
    "-lname": _link_name,
    "-mmin": _age("-mmin", 60 * 10**9),
    "-mtime": _age("-mtime", _DAY),
    "-name": _glob(lambda found: found.name),
    "-newermt": _newer,
    "-path": _glob(lambda found: found.path),
    "-perm": _perm,
    "-regex": _regex(0),
    "-size": _size,
    "-type": _type,
    "-uid": _counted("-uid", lambda found: found.version.uid),
    "-user": _owner("-user", lambda found: found.version.uid, lambda around: around.users()),
    "-wholename": _glob(lambda found: found.path),
    "-xattr": _xattr,
}
