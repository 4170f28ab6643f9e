"""Rows, contenders and aims as tables, and what becomes of samples: medians, ratios, text, Markdown, JSON.

Nothing is measured here and nothing is run: samples in, values out. A figure is the median of its samples; a ratio is the
quotient of two such medians of one run. A contender that could not do a workload, or that did less than the others, has no
figure but a note that says why.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

FORMAT = 1
"""Version of the JSON document."""


class Contender(NamedTuple):
    """Somebody who takes part: the name in options and JSON, the title, who it is.

    Those who take part in few workloads share the last column.
    """

    key: str
    title: str
    about: str
    column: bool = True


CONTENDERS = (
    Contender("ocifs-erofs", "ocifs erofs", "ocifs mount --driver erofs"),
    Contender("ocifs-fuse", "ocifs fuse", "ocifs mount --driver fuse"),
    Contender("overlayfs", "overlayfs", "the kernel's overlayfs over the unpacked layers, on this machine's disk"),
    Contender("squashfs", "squashfs", "the kernel's squashfs (zstd) of the merged tree"),
    Contender("fuse-overlayfs", "fuse-overlayfs", "fuse-overlayfs over the unpacked layers"),
    Contender("squashfuse", "squashfuse_ll", "squashfuse_ll on the same squashfs"),
    Contender("ratarmount", "ratarmount", "ratarmount's union of the gzip-compressed layers, indexed"),
    Contender("archivemount", "archivemount", "archivemount on one tar.gz of the merged tree", column=False),
    Contender("umoci", "umoci unpack", "umoci unpack of the gzip-compressed image", column=False),
    Contender("rapidgzip", "rapidgzip", "rapidgzip -P 2 -dc of the same layers, to nowhere", column=False),
    Contender("zlib", "zlib", "zlib (Python's) decompressing the same layers, to nowhere, one thread", column=False),
    Contender("igzip", "igzip", "igzip -dc of the same layers, to nowhere", column=False),
    Contender("tmpfs", "tmpfs", "the same files on tmpfs: what the reader itself costs", column=False),
)
TITLES = {contender.key: contender.title for contender in CONTENDERS}


class Row(NamedTuple):
    """A line of the table: which workload and state it comes from, what it says, the unit of its values."""

    key: str
    title: str
    unit: str


def _states(key: str, title: str, unit: str) -> tuple[Row, ...]:
    return tuple(Row(f"{key}.{state}", f"{title}, {state}", unit) for state in ("cold", "warm"))


ROWS = (
    *_states("first", "never seen → first file read", "s"),
    *_states("mounted", "indexed → mounted: reference image", "s"),
    *_states("mounted-1k", "indexed → mounted: 1,000 entries, 100 layers", "s"),
    *_states("mounted-1m", "indexed → mounted: 1,000,000 entries, 100 layers", "s"),
    *_states("find", "`find -ls` of the tree", "s"),
    *_states("tar", "`tar` of the tree to a pipe", "s"),
    *_states("small", "open+read+close, each small file", "µs"),
    *_states("large", "one large file in order", "MB/s"),
    *_states("random-p50", "random 4 KiB read, p50", "µs"),
    *_states("random-p99", "random 4 KiB read, p99", "µs"),
    *_states("readers", "8 readers at once, the whole tree", "s"),
    Row("runc.new", "runc + `import numpy`: never seen, unpacking or indexing included", "s"),
    Row("runc.indexed", "runc + `import numpy`: indexed, cold, mounting included", "s"),
    Row("runc.cold", "runc + `import numpy`: mounted, cold", "s"),
    Row("runc.warm", "runc + `import numpy`: mounted, warm", "s"),
    *_states("decode", "every span decoded, two at a time", "s"),
    Row("new-1k", "never seen → mounted: 1,000 entries, 100 layers", "s"),
    Row("new-10k", "never seen → mounted: 10,000 entries in one directory", "s"),
    Row("new-1m", "never seen → mounted: 1,000,000 entries, 100 layers", "s"),
    *_states("find-10k", "`find -ls` of 10,000 entries in one directory", "s"),
    *_states("find-1m", "`find -ls` of 1,000,000 entries", "s"),
    Row("memory-1m", "daemon memory after that (RssAnon)", "MB"),
    Row("memory.find", "daemon memory after `find` (RssAnon)", "MB"),
    Row("memory.tar", "daemon memory after `tar`", "MB"),
    Row("memory.small", "daemon memory after small files", "MB"),
    Row("memory.random", "daemon memory after random reads", "MB"),
    Row("memory.readers", "daemon memory after 8 readers", "MB"),
    Row("idle.cpu", "CPU used by an idle mount in a minute", "ms"),
    Row("idle.switches", "wake-ups of an idle mount in a minute", ""),
    Row("size.index", "kept on disk, of the blobs' size", "%"),
)
ROW = {row.key: row for row in ROWS}


class Aim(NamedTuple):
    """What a figure should reach: at most `limit` times another figure, or at most `limit` itself if there is no other."""

    row: str
    contender: str
    limit: float
    other_contender: str = ""
    other_row: str = ""

    @property
    def other(self) -> tuple[str, str]:
        """Row and contender of the other figure."""
        return self.other_row or self.row, self.other_contender or self.contender

    @property
    def is_ratio(self) -> bool:
        """Whether it is about a ratio."""
        return bool(self.other_row or self.other_contender)


MEMORY_AIM = 80 + 134.2
"""MB: 80 and the default bound of the cache of decoded data, 128 MiB."""

AIMS = (
    *(Aim(f"first.{state}", "ocifs-erofs", 0.08, "umoci") for state in ("cold", "warm")),
    *(Aim(f"first.{state}", "ocifs-erofs", 0.4, "ratarmount") for state in ("cold", "warm")),
    *(Aim(f"first.{state}", "ocifs-erofs", 1.3, "rapidgzip") for state in ("cold", "warm")),
    Aim("mounted.warm", "ocifs-erofs", 0.3),
    Aim("mounted.warm", "ocifs-fuse", 0.3),
    Aim("mounted-1m.warm", "ocifs-erofs", 0.3),
    Aim("mounted-1m.warm", "ocifs-erofs", 1.2, other_row="mounted-1k.warm"),
    Aim("mounted-1m.warm", "ocifs-fuse", 1.2, other_row="mounted-1k.warm"),
    Aim("find.cold", "ocifs-erofs", 0.8, "overlayfs"),
    Aim("find.warm", "ocifs-erofs", 1.0, "overlayfs"),
    Aim("tar.cold", "ocifs-erofs", 0.8, "overlayfs"),
    Aim("tar.warm", "ocifs-erofs", 0.9, "overlayfs"),
    Aim("small.cold", "ocifs-erofs", 2.5, "overlayfs"),
    Aim("small.warm", "ocifs-erofs", 0.7, "overlayfs"),
    Aim("find.cold", "ocifs-fuse", 0.4, "fuse-overlayfs"),
    Aim("find.cold", "ocifs-fuse", 0.4, "squashfuse"),
    Aim("small.cold", "ocifs-fuse", 0.9, "fuse-overlayfs"),
    Aim("small.cold", "ocifs-fuse", 0.9, "squashfuse"),
    Aim("tar.cold", "ocifs-fuse", 0.6, "fuse-overlayfs"),
    Aim("tar.cold", "ocifs-fuse", 0.4, "ratarmount"),
    Aim("random-p99.cold", "ocifs-erofs", 0.5, "ratarmount"),
    Aim("random-p99.cold", "ocifs-fuse", 0.5, "ratarmount"),
    Aim("decode.warm", "ocifs-erofs", 1.15, "igzip"),
    Aim("runc.indexed", "ocifs-erofs", 2.0, "overlayfs"),
    Aim("runc.cold", "ocifs-erofs", 2.0, "overlayfs"),
    Aim("memory-1m", "ocifs-erofs", MEMORY_AIM),
    Aim("memory-1m", "ocifs-fuse", MEMORY_AIM),
    Aim("idle.cpu", "ocifs-erofs", 0.0),
    Aim("idle.cpu", "ocifs-fuse", 0.0),
)


class Book:
    """Everything a run has seen: samples by row and contender, notes by the same, remarks about the run as a whole."""

    def __init__(self, facts: Mapping[str, str] | None = None) -> None:
        """Begin with the facts about machine and versions, in the order in which they are to be told."""
        self.facts: dict[str, str] = dict(facts or {})
        self.samples: dict[tuple[str, str], list[float]] = {}
        self.notes: dict[tuple[str, str], str] = {}
        self.remarks: list[str] = []

    def add(self, row: str, contender: str, value: float) -> None:
        """Note a sample, in the row's unit."""
        self.samples.setdefault((row, contender), []).append(value)

    def note(self, row: str, contender: str, reason: str) -> None:
        """Say something about one figure, or why there is none; the first reason stands."""
        self.notes.setdefault((row, contender), reason)

    def remark(self, text: str) -> None:
        """Say something about the run; once."""
        if text not in self.remarks:
            self.remarks.append(text)

    def median(self, row: str, contender: str) -> float | None:
        """The figure, or None if there is none."""
        samples = self.samples.get((row, contender))
        return statistics.median(samples) if samples else None

    def contenders(self) -> list[Contender]:
        """Those who have a figure or a note anywhere, in the order of the columns."""
        seen = {contender for _, contender in (*self.samples, *self.notes)}
        return [contender for contender in CONTENDERS if contender.key in seen]

    def rows(self) -> list[Row]:
        """The rows that have a figure or a note, in the table's order."""
        seen = {row for row, _ in (*self.samples, *self.notes)}
        return [row for row in ROWS if row.key in seen]


class Verdict(NamedTuple):
    """What became of an aim: the value (a ratio or a figure), and whether it is reached; None: not measured."""

    aim: Aim
    value: float | None
    reached: bool | None


def judge(book: Book, aim: Aim) -> Verdict:
    """Compare a run with an aim."""
    value = book.median(aim.row, aim.contender)
    if value is not None and aim.is_ratio:
        other = book.median(*aim.other)
        # A rate is better when higher, and none of the aims is about one.
        value = value / other if other else None
    return Verdict(aim, value, None if value is None else value <= aim.limit)


# -- words and figures ---------------------------------------------------------------------------------------------


def percentile(values: Iterable[float], part: float) -> float:
    """The smallest value that at least `part` (0 to 1) of the values do not exceed: the nearest rank, no interpolation."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("no percentile of nothing")
    rank = -int(-part * len(ordered) // 1)  # rounded up
    return ordered[max(rank, 1) - 1]


def figure(value: float, unit: str) -> str:
    """A value in a few characters: three significant digits, as many thousands as it takes."""
    if unit == "µs" and abs(value) >= 10_000:  # noqa: PLR2004 (from here on milliseconds say as much)
        value, unit = value / 1000, "ms"
    if value == 0:
        text = "0"
    elif abs(value) >= 100:  # noqa: PLR2004 (three digits before the point)
        text = f"{value:,.0f}"
    else:
        text = f"{value:.3g}"
    return f"{text} {unit}".rstrip()


def aim_words(aim: Aim) -> tuple[str, str]:
    """What an aim is about, and against what: two cells of a table."""
    what = f"{ROW[aim.row].title}: {TITLES[aim.contender]}"
    if not aim.is_ratio:
        return what, ""
    row, contender = aim.other
    against = TITLES[contender] if row == aim.row else ROW[row].title
    return what, against


def limit_words(aim: Aim) -> str:
    """The aim's limit: a bare ratio, or a figure with its unit."""
    text = f"{aim.limit:g}" if aim.is_ratio else figure(aim.limit, ROW[aim.row].unit)
    return text if aim.limit == 0 else f"≤ {text}"


class Table(NamedTuple):
    """A table as cells, the first line its heading; the columns numbered in `words` hold words, the others figures."""

    lines: list[list[str]]
    words: frozenset[int]


def figures_table(book: Book, marks: dict[str, int]) -> Table:
    """Medians by row and contender. `marks` gets each note's number, in order of appearance."""
    contenders = [contender for contender in book.contenders() if contender.column]
    others = [contender for contender in book.contenders() if not contender.column]

    def cell(row: Row, contender: Contender) -> str:
        value = book.median(row.key, contender.key)
        note = book.notes.get((row.key, contender.key))
        text = figure(value, row.unit) if value is not None else "—" if note else ""
        return f"{text} [{marks.setdefault(note, len(marks) + 1)}]" if note else text

    lines = [["", *(contender.title for contender in contenders), *(["others"] if others else [])]]
    for row in book.rows():
        line = [row.title, *(cell(row, contender) for contender in contenders)]
        if others:
            rest = ((contender.title, cell(row, contender)) for contender in others)
            line.append("; ".join(f"{title}: {text}" for title, text in rest if text))
        lines.append(line)
    words = {0, len(contenders) + 1} if others else {0}
    return Table(lines, frozenset(words))


def aims_table(book: Book, aims: Sequence[Aim] = AIMS) -> Table:
    """Each aim that was measured: workload, against, what came out, aim, reached or not."""
    lines = [["workload", "against", "is", "aim", ""]]
    for verdict in (judge(book, aim) for aim in aims):
        if verdict.value is None:
            continue
        what, against = aim_words(verdict.aim)
        value = f"{verdict.value:.2f}" if verdict.aim.is_ratio else figure(verdict.value, ROW[verdict.aim.row].unit)
        lines.append([what, against, value, limit_words(verdict.aim), "reached" if verdict.reached else "missed"])
    return Table(lines, frozenset({0, 1}))


# -- forms ---------------------------------------------------------------------------------------------------------


def text_table(table: Table) -> str:
    """A table for a terminal."""
    widths = [max(map(len, column)) for column in zip(*table.lines, strict=True)]
    out = []
    for number, line in enumerate(table.lines):
        cells = [
            cell.ljust(width) if column in table.words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        out.append("  ".join(cells).rstrip())
        if number == 0:
            out.append("  ".join("─" * width for width in widths))
    return "\n".join(out)


def markdown_table(table: Table) -> str:
    """A table for a README."""
    head, *lines = table.lines
    rule = ["---" if column in table.words else "---:" for column in range(len(head))]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in (head, rule, *lines)
    )


def _notes(book: Book, marks: Mapping[str, int]) -> list[str]:
    return [f"[{number}] {note}" for note, number in marks.items()] + book.remarks


def text(book: Book) -> str:
    """The whole report for a terminal."""
    marks: dict[str, int] = {}
    parts = ["\n".join(f"{name + ':':<12} {fact}" for name, fact in book.facts.items())]
    parts.append(text_table(figures_table(book, marks)))
    aims = aims_table(book)
    if len(aims.lines) > 1:
        parts.append(text_table(aims))
    parts.append("\n".join(_notes(book, marks)))
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown(book: Book) -> str:
    """The whole report for a README or a note."""
    marks: dict[str, int] = {}
    figures, aims = markdown_table(figures_table(book, marks)), aims_table(book)
    parts = [figures]
    if len(aims.lines) > 1:
        parts.append(markdown_table(aims))
    parts.append("\n".join(f"- {line}" for line in _notes(book, marks)))
    parts.append("\n".join(f"- {name}: {fact}" for name, fact in book.facts.items()))
    return "\n\n".join(part for part in parts if part) + "\n"


def to_json(book: Book) -> str:
    """Everything, samples included, for programs and for `--from`."""
    results: list[dict[str, Any]] = [
        {
            "row": row,
            "contender": contender,
            "unit": ROW[row].unit,
            "median": statistics.median(samples),
            "samples": samples,
        }
        for (row, contender), samples in book.samples.items()
    ]
    aims = [
        {
            "row": verdict.aim.row,
            "contender": verdict.aim.contender,
            "against": list(verdict.aim.other) if verdict.aim.is_ratio else None,
            "value": verdict.value,
            "aim": verdict.aim.limit,
            "reached": verdict.reached,
        }
        for verdict in (judge(book, aim) for aim in AIMS)
        if verdict.value is not None
    ]
    document = {
        "format": FORMAT,
        "facts": book.facts,
        "results": results,
        "aims": aims,
        "notes": [{"row": row, "contender": key, "note": note} for (row, key), note in book.notes.items()],
        "remarks": book.remarks,
    }
    return json.dumps(document, ensure_ascii=False, indent=1) + "\n"


def from_json(raw: str) -> Book:
    """What `to_json` wrote. Raises ValueError for anything else."""
    document = json.loads(raw)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"not a benchmark of format {FORMAT}")
    book = Book(document["facts"])
    for result in document["results"]:
        if result["row"] not in ROW or result["contender"] not in TITLES:
            raise ValueError(f"unknown row or contender: {result['row']}, {result['contender']}")
        book.samples[result["row"], result["contender"]] = [float(value) for value in result["samples"]]
    for note in document["notes"]:
        book.note(note["row"], note["contender"], note["note"])
    book.remarks = list(document["remarks"])
    return book
