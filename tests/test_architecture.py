"""The rooms of ocifs/__init__.py are a rule: who may import whom is read from that table and checked here.

The table's rows stand from the ground up. A room (a module or package directly below ``ocifs``) imports from rows above
its own in the table, from itself, and within its row only what ``WITHIN_A_ROW`` lists. Imports inside functions and those
for the type checker count as well: what a module must not know, it must not know there either.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

import ocifs
from ocifs.rules import RULES

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = Path(ocifs.__file__).parent

WITHIN_A_ROW = {
    ("reference", "errors"): "errors are everybody's ground",
    ("spec", "errors"): "the same",
    ("reference", "spec"): "a reference can name a digest",
    ("image", "layer_data"): "an image opens the layers it is made of",
    ("changes", "members"): "what a rename brought along is written as export writes it",
    ("mount", "daemon"): "a mount is served by it",
    ("mount", "examined"): "it is what an examined mount serves",
}
"""Pairs (importer, imported) of one row, each with its reason."""

MOUNTING = frozenset({"pyfuse3", "trio"})
"""What only a mount needs: a command that lists, reads or copies works where these cannot even be imported."""
MOUNTING_ROOMS = frozenset({"bundle", "daemon", "driver", "examined", "forest", "fuse", "mount"})

DRAWERS = frozenset({"utils", "util", "common", "helpers", "helper", "constants", "misc"})
"""Names that say nothing about what is inside."""


class Import(NamedTuple):
    """One imported module: its full dotted name, where it stands, whether it runs when the module is imported."""

    name: str
    line: int
    at_once: bool


def table() -> dict[str, int]:
    """The room's row, counted from the ground, by the room's name; read from the package's docstring."""
    found: dict[str, int] = {}
    rows = [line for line in (ocifs.__doc__ or "").splitlines() if re.match(r"\w+ +``", line)]
    for number, row in enumerate(rows):
        rooms = row.split("  ", 1)[1].strip().split("  ", 1)[0]
        for room in re.findall(r"``(\w+)``", rooms):
            assert room not in found, f"{room} stands in two rows"
            found[room] = number
    return found


ROWS = table()
MODULES = sorted(PACKAGE.rglob("*.py"))


def dotted(path: Path) -> str:
    parts = ["ocifs", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(name: str) -> str:
    """The room of a dotted name below ocifs; empty for the package itself. ``python -m ocifs`` is the CLI's other door."""
    parts = name.split(".")
    room = parts[1] if len(parts) > 1 else ""
    return "cli" if room == "__main__" else room


def imports(source: str, module: str, *, is_package: bool) -> Iterator[Import]:
    """Every module that a source text imports, relative ones resolved; ``from ocifs import x`` names ``ocifs.x``."""
    tree = ast.parse(source)
    later: set[ast.AST] = set()
    for node in ast.walk(tree):
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if lazy or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            later.update(ast.walk(node))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, node not in later)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")[: None if is_package and node.level == 1 else -(node.level - is_package)]
                base = ".".join([*above, *([node.module] if node.module else [])])
            if base == "ocifs":
                for alias in node.names:
                    yield Import(f"ocifs.{alias.name}", node.lineno, node not in later)
            else:
                yield Import(base, node.lineno, node not in later)


def imports_of(path: Path) -> list[Import]:
    return list(imports(path.read_text(encoding="utf-8"), dotted(path), is_package=path.stem == "__init__"))


def forbidden(room: str, imported: str) -> str:
    """Why a room must not import another one; empty if it may."""
    if imported not in ROWS:
        return f"{imported!r} is in no row of the table"
    if imported == room or ROWS[imported] < ROWS[room] or (room, imported) in WITHIN_A_ROW:
        return ""
    where = "its own row" if ROWS[imported] == ROWS[room] else "a later row"
    return f"{imported!r} stands in {where}"


def test_the_table_is_read() -> None:
    rooms = ["errors", "tar", "layer_index", "overlay", "sources", "image", "rootfs", "fuse", "cli"]
    assert sorted(rooms, key=ROWS.__getitem__) == rooms
    assert len({ROWS[room] for room in rooms}) == len(rooms)
    assert ROWS["errors"] == 0
    assert ROWS["daemon"] < ROWS["cli"] == max(ROWS.values())


def test_every_room_is_in_the_table_and_every_row_exists() -> None:
    rooms = {room_of(dotted(path)) for path in MODULES} - {""}
    assert rooms == set(ROWS)


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_a_module_imports_only_from_rows_above_its_own(path: Path) -> None:
    room = room_of(dotted(path))
    names = [found for found in imports_of(path) if found.name.split(".")[0] == "ocifs" and room_of(found.name)]
    if not room:
        assert not names, "the package itself imports nothing"
        return
    wrong = [
        f"{path.relative_to(PACKAGE.parent)}:{found.line}: {reason}"
        for found in names
        if (reason := forbidden(room, room_of(found.name)))
    ]
    assert not wrong, "\n".join(wrong)


def test_each_exception_within_a_row_is_one_and_is_used() -> None:
    assert [pair for pair in WITHIN_A_ROW if ROWS[pair[0]] != ROWS[pair[1]]] == []
    used = {(room_of(dotted(path)), room_of(found.name)) for path in MODULES for found in imports_of(path)}
    assert set(WITHIN_A_ROW) <= used


@pytest.mark.parametrize("path", [path for path in MODULES if room_of(dotted(path)) == "cli"], ids=dotted)
def test_commands_import_what_mounts_only_inside_functions(path: Path) -> None:
    wrong = [
        f"{path.relative_to(PACKAGE.parent)}:{found.line}: {found.name}"
        for found in imports_of(path)
        if found.at_once and (found.name.split(".")[0] in MOUNTING or room_of(found.name) in MOUNTING_ROOMS)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_formats_open_no_file_and_log_nothing(path: Path) -> None:
    if ROWS.get(room_of(dotted(path))) != ROWS["tar"]:
        return
    text = path.read_text(encoding="utf-8")
    modules = {found.name.split(".")[0] for found in imports_of(path) if found.at_once}
    assert not modules & {"os", "pathlib", "logging", "subprocess", "threading", "tempfile", "socket"}
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    assert not [node.lineno for node in calls if isinstance(node.func, ast.Name) and node.func.id in {"open", "print"}]


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_every_module_says_what_it_is(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring
    assert docstring[0].isalpha() or docstring[0] in "`'\""


def test_there_is_no_drawer_for_odds_and_ends() -> None:
    names = {part for path in MODULES for part in dotted(path).split(".")}
    assert not names & DRAWERS


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import ocifs.tar", ["ocifs.tar"]),
        ("from ocifs import tar, errors", ["ocifs.tar", "ocifs.errors"]),
        ("from ocifs.compression.gzip import x", ["ocifs.compression.gzip"]),
        ("from . import base", ["ocifs.sources"]),
        ("from .base import x", ["ocifs.sources.base"]),
        ("from ..store import x", ["ocifs.store"]),
        ("def f():\n    import trio", ["trio"]),
    ],
)
def test_the_reader_of_imports_sees_every_form(source: str, expected: list[str]) -> None:
    assert [found.name for found in imports(source, "ocifs.sources.layout", is_package=False)] == expected
    assert [found.name for found in imports(source, "ocifs.sources", is_package=True)] == expected


def test_the_reader_of_imports_tells_lazy_ones_apart() -> None:
    source = "import a\nif TYPE_CHECKING:\n    import b\ndef f():\n    import c\nclass D:\n    import d\n"
    assert [found.name for found in imports(source, "ocifs.x", is_package=False) if found.at_once] == ["a", "d"]


@pytest.mark.parametrize(
    ("room", "imported", "reason"),
    [
        ("rootfs", "tar", ""),
        ("image", "layer_data", ""),
        ("tar", "tar", ""),
        ("layer_data", "image", "'image' stands in its own row"),
        ("tar", "overlay", "'overlay' stands in a later row"),
        ("tar", "erofs", "'erofs' stands in its own row"),
        ("cli", "utils", "'utils' is in no row of the table"),
    ],
)
def test_what_the_rule_forbids(room: str, imported: str, reason: str) -> None:
    assert forbidden(room, imported) == reason


def test_every_layer_rule_has_a_test_of_its_name() -> None:
    names = {
        match.lower()
        for path in Path(__file__).parent.glob("test_*.py")
        for match in re.findall(r"def test_([a-z]+[0-9]+)_", path.read_text(encoding="utf-8"))
    }
    assert [rule for rule in RULES if rule.lower() not in names] == []


def test_every_rule_that_the_code_names_is_listed() -> None:
    named = {
        rule
        for path in MODULES
        for rule in re.findall(r"\b(?:rule |\"|\()([WTHDCL][0-9]{1,2})\b", path.read_text(encoding="utf-8"))
    }
    assert sorted(named - set(RULES)) == []
