"""What `scripts/bench` makes of samples: medians, ratios, aims, tables, JSON, the picture. Nothing is measured here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

HERE = Path(__file__).resolve().parent
BENCH = HERE.parent / "scripts" / "bench"

if TYPE_CHECKING:
    from benchmark import contenders, images, picture, processes, report, workloads
else:
    sys.path.insert(0, str(BENCH.parent))  # as the program finds them
    from benchmark import contenders, images, picture, processes, report, workloads


def book(*samples: tuple[str, str, list[float]]) -> report.Book:
    made = report.Book({"machine": "a <fast> one", "kernel": "Linux 6.18", "date": "2026-01-02"})
    for row, contender, values in samples:
        for value in values:
            made.add(row, contender, value)
    return made


# ------------------------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize(("samples", "median"), [([3.0], 3.0), ([5.0, 1.0, 3.0], 3.0), ([4.0, 1.0, 2.0, 100.0], 3.0)])
def test_a_figure_is_the_median_of_its_samples(samples: list[float], median: float) -> None:
    assert book(("find.cold", "overlayfs", samples)).median("find.cold", "overlayfs") == median


def test_what_was_not_measured_has_no_figure() -> None:
    assert book().median("find.cold", "overlayfs") is None


@pytest.mark.parametrize(("part", "value"), [(0.5, 50), (0.99, 99), (1.0, 100), (0.0, 1), (0.001, 1), (0.501, 51)])
def test_a_percentile_is_the_nearest_rank(part: float, value: float) -> None:
    assert report.percentile(range(100, 0, -1), part) == value


def test_a_percentile_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing"):
        report.percentile([], 0.5)


@pytest.mark.parametrize(
    ("value", "unit", "words"),
    [
        (0, "ms", "0 ms"),
        (0.01234, "s", "0.0123 s"),
        (2.999, "s", "3 s"),
        (99.94, "µs", "99.9 µs"),
        (9999.0, "µs", "9,999 µs"),
        (12345.6, "µs", "12.3 ms"),
        (1234567.0, "MB/s", "1,234,567 MB/s"),
        (12, "", "12"),
    ],
)
def test_figures_have_three_digits(value: float, unit: str, words: str) -> None:
    assert report.figure(value, unit) == words


# ---------------------------------------------------------------------------------------------------------------- aims


def test_a_ratio_is_the_quotient_of_two_medians() -> None:
    made = book(("find.cold", "ocifs-erofs", [0.3, 0.1, 0.2]), ("find.cold", "overlayfs", [0.4, 9.0, 0.1]))
    aim = report.Aim("find.cold", "ocifs-erofs", 0.8, "overlayfs")
    assert report.judge(made, aim) == report.Verdict(aim, 0.5, reached=True)


def test_an_aim_just_met_is_reached_and_one_just_missed_is_not() -> None:
    aim = report.Aim("find.cold", "ocifs-erofs", 0.5, "overlayfs")
    for ours, reached in ((1.0, True), (1.001, False)):
        made = book(("find.cold", "ocifs-erofs", [ours]), ("find.cold", "overlayfs", [2.0]))
        assert report.judge(made, aim).reached is reached


def test_an_aim_may_be_against_another_row_of_the_same_contender() -> None:
    aim = report.Aim("mounted-1m.warm", "ocifs-fuse", 1.2, other_row="mounted-1k.warm")
    made = book(("mounted-1m.warm", "ocifs-fuse", [0.3]), ("mounted-1k.warm", "ocifs-fuse", [0.2]))
    verdict = report.judge(made, aim)
    assert verdict.value == pytest.approx(1.5)
    assert verdict.reached is False
    assert report.aim_words(aim) == (
        "indexed → mounted: 1,000,000 entries, 100 layers, warm: ocifs fuse",
        "indexed → mounted: 1,000 entries, 100 layers, warm",
    )


def test_an_aim_may_be_a_figure_of_its_own() -> None:
    aim = report.Aim("idle.cpu", "ocifs-fuse", 0.0)
    assert report.judge(book(("idle.cpu", "ocifs-fuse", [0.0])), aim).reached is True
    assert report.judge(book(("idle.cpu", "ocifs-fuse", [0.2])), aim).reached is False


def test_an_aim_without_both_figures_is_left_open() -> None:
    aim = report.Aim("find.cold", "ocifs-erofs", 0.8, "overlayfs")
    for made in (book(), book(("find.cold", "ocifs-erofs", [1.0])), book(("find.cold", "overlayfs", [1.0]))):
        assert report.judge(made, aim) == report.Verdict(aim, None, None)


def test_every_aim_is_about_rows_and_contenders_there_are() -> None:
    for aim in report.AIMS:
        row, contender = aim.other
        assert {aim.row, row} <= set(report.ROW)
        assert {aim.contender, contender} <= set(report.TITLES)


# -------------------------------------------------------------------------------------------------------------- tables


EXAMPLE = (
    ("find.cold", "ocifs-erofs", [0.25]),
    ("find.cold", "overlayfs", [0.5]),
    ("idle.cpu", "ocifs-erofs", [0.0]),
)


def test_the_text_has_facts_figures_aims_and_notes() -> None:
    made = book(*EXAMPLE, ("find.cold", "tmpfs", [0.01234]))
    made.note("find.cold", "archivemount", "was stopped after 60 s")
    made.remark("said once")
    made.remark("said once")
    assert report.text(made) == (
        "machine:     a <fast> one\n"
        "kernel:      Linux 6.18\n"
        "date:        2026-01-02\n"
        "\n"
        "                                       ocifs erofs  overlayfs  others\n"
        "─────────────────────────────────────  ───────────  ─────────  ────────────────────────────────────\n"
        "`find -ls` of the tree, cold                0.25 s      0.5 s  archivemount: — [1]; tmpfs: 0.0123 s\n"
        "CPU used by an idle mount in a minute         0 ms\n"
        "\n"
        "workload                                            against      is    aim\n"
        "──────────────────────────────────────────────────  ─────────  ────  ─────  ───────\n"
        "`find -ls` of the tree, cold: ocifs erofs           overlayfs  0.50  ≤ 0.8  reached\n"
        "CPU used by an idle mount in a minute: ocifs erofs             0 ms   0 ms  reached\n"
        "\n"
        "[1] was stopped after 60 s\n"
        "said once\n"
    )


def test_markdown_has_the_same_tables() -> None:
    made = book(*EXAMPLE)
    made.note("find.cold", "overlayfs", "odd")
    lines = report.markdown(made).splitlines()
    assert lines[:4] == [
        "|  | ocifs erofs | overlayfs |",
        "| --- | ---: | ---: |",
        "| `find -ls` of the tree, cold | 0.25 s | 0.5 s [1] |",
        "| CPU used by an idle mount in a minute | 0 ms |  |",
    ]
    assert "| `find -ls` of the tree, cold: ocifs erofs | overlayfs | 0.50 | ≤ 0.8 | reached |" in lines
    assert "- [1] odd" in lines
    assert lines[-1] == "- date: 2026-01-02"


def test_rows_and_columns_stand_in_the_tables_order_whatever_came_first() -> None:
    made = book(("tar.cold", "overlayfs", [1]), ("first.cold", "umoci", [1]), ("find.cold", "ocifs-fuse", [1]))
    assert [row.key for row in made.rows()] == ["first.cold", "find.cold", "tar.cold"]
    assert [contender.key for contender in made.contenders()] == ["ocifs-fuse", "overlayfs", "umoci"]


def test_the_same_note_has_one_number() -> None:
    made = book()
    for row in ("find.cold", "find.warm"):
        made.note(row, "squashfuse", "not installed")
    assert report.text(made).count("not installed") == 1
    assert report.text(made).count("— [1]") == 2


def test_no_row_or_contender_has_the_key_of_another() -> None:
    assert len(report.ROW) == len(report.ROWS)
    assert len(report.TITLES) == len(report.CONTENDERS)


# ---------------------------------------------------------------------------------------------------------------- JSON


def test_json_keeps_everything_and_can_be_read_again() -> None:
    made = book(("find.cold", "ocifs-erofs", [0.3, 0.1, 0.2]), ("find.cold", "overlayfs", [0.4]))
    made.note("find.cold", "squashfs", "this kernel has no squashfs")
    made.remark("said")
    raw = report.to_json(made)
    document = json.loads(raw)
    assert document["results"][0] == {
        "row": "find.cold",
        "contender": "ocifs-erofs",
        "unit": "s",
        "median": 0.2,
        "samples": [0.3, 0.1, 0.2],
    }
    assert document["aims"] == [
        {
            "row": "find.cold",
            "contender": "ocifs-erofs",
            "against": ["find.cold", "overlayfs"],
            "value": 0.5,
            "aim": 0.8,
            "reached": True,
        }
    ]
    again = report.from_json(raw)
    assert report.to_json(again) == raw
    assert report.text(again) == report.text(made)


@pytest.mark.parametrize(
    "raw", ["[]", '{"format": 0}', "{", '{"format":1,"facts":{},"results":[{"row":"x","contender":"y"}]}']
)
def test_json_of_another_kind_is_refused(raw: str) -> None:
    with pytest.raises(ValueError, match=r"format|unknown|Expecting"):
        report.from_json(raw)


# ------------------------------------------------------------------------------------------------------------- picture

SVG = "{http://www.w3.org/2000/svg}"


def test_the_picture_has_a_bar_for_each_figure_to_scale() -> None:
    made = book(*EXAMPLE, ("tar.cold", "ocifs-fuse", [4.0]), ("tar.warm", "ocifs-fuse", [1.0]))
    root = ET.fromstring(picture.draw(made))  # noqa: S314 (our own)
    bars = {
        rect.get("class"): float(rect.get("width") or 0)
        for rect in root.iter(f"{SVG}rect")
        if rect.get("class") in {"ours", "other"}
    }
    assert len([rect for rect in root.iter(f"{SVG}rect") if rect.get("class") != "ground"]) == 3
    words = [element.text for element in root.iter(f"{SVG}text")]
    assert {"find -ls, cold", "0.25 s", "0.5 s", "4 s", "overlayfs", "a <fast> one, Linux 6.18, 2026-01-02"} <= set(
        words
    )
    assert "1 s" not in words
    panel = {rect.get("y"): rect for rect in root.iter(f"{SVG}rect")}
    assert bars["other"] == pytest.approx(
        max(float(rect.get("width") or 0) for rect in panel.values() if rect.get("class") == "other")
    )


def test_the_longest_bar_fills_its_panel_and_half_the_value_is_half_as_long() -> None:
    made = book(("find.cold", "ocifs-erofs", [1.0]), ("find.cold", "overlayfs", [2.0]))
    root = ET.fromstring(picture.draw(made))  # noqa: S314 (our own)
    ours, other = (float(rect.get("width") or 0) for rect in root.iter(f"{SVG}rect") if rect.get("class") != "ground")
    assert ours * 2 == pytest.approx(other, abs=0.2)


def test_the_picture_needs_nothing_from_elsewhere() -> None:
    drawn = picture.draw(book(*EXAMPLE))
    assert drawn.count("http") == 1  # the name space
    assert "prefers-color-scheme: dark" in drawn
    assert "url(" not in drawn


def test_a_picture_of_nothing_is_still_one() -> None:
    assert ET.fromstring(picture.draw(book())).tag == f"{SVG}svg"  # noqa: S314 (our own)


# ------------------------------------------------------------------------------------------------------- what is chosen


def found(path: str, size: int, *, sparse: bool = False, linked: bool = False) -> images.Found:
    return images.Found(path.encode(), size, sparse, linked)


def test_files_are_chosen_by_size_and_the_same_every_time() -> None:
    files = [
        found("a/empty", 0),
        found("b/small", 1),
        found("c/limit", 64 << 10),
        found("d/over", (64 << 10) + 1),
        found("e/big", 1 << 20),
        found("f/bigger", 3 << 20),
        found("g/holes", 9 << 20, sparse=True),
        found("h/names", 9 << 20, linked=True),
    ]
    chosen = images.choose(8, files, 100)
    assert chosen.small == [b"b/small", b"c/limit"]
    assert chosen.large == b"f/bigger"
    assert len(chosen.files) == 6
    assert {place.path for place in chosen.random} == {b"e/big", b"f/bigger"}
    assert all(place.offset % 4096 == 0 for place in chosen.random)
    assert all(place.offset <= (3 << 20) - 4096 for place in chosen.random)
    assert len(chosen.random) == 100
    assert images.choose(8, files, 100) == chosen


def test_walking_counts_every_name_and_the_root(tmp_path: Path) -> None:
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir/file").write_bytes(b"x" * 5)
    (tmp_path / "link").symlink_to("dir")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "another").write_bytes(b"")
    os.link(tmp_path / "another", tmp_path / "other")
    assert images.walk(tmp_path) == (
        7,
        [found("another", 0, linked=True), found("dir/file", 5), found("other", 0, linked=True)],
    )


def test_what_is_made_once_is_whole_or_not_there(tmp_path: Path) -> None:
    def fails(half: Path) -> None:
        half.mkdir()
        raise processes.FailedError("half way")

    with pytest.raises(processes.FailedError):
        images.once(tmp_path / "thing", fails, "making")
    assert not (tmp_path / "thing").exists()
    images.once(tmp_path / "thing", lambda half: half.mkdir(), "making")
    assert images.once(tmp_path / "thing", fails, "making").is_dir()


# ----------------------------------------------------------------------------------------------------- rounds and rules


def never(_: Path) -> NoReturn:
    raise AssertionError


def mounter(superset: str = "") -> contenders.Mounter:
    return contenders.Mounter("ratarmount", never, superset=superset)


def test_slow_contenders_sit_out_where_there_is_little_time() -> None:
    one = mounter()._replace(slow_in=frozenset({"tar"}))
    assert [one.sits_out(name, thorough=False) for name in ("tar", "find")] == [True, False]
    assert not one.sits_out("tar", thorough=True)
    few = mounter()._replace(only_in=frozenset({"find"}))
    assert [few.sits_out(name, thorough=True) for name in ("tar", "find")] == [True, False]
    assert few.sits_out("find", thorough=False)


def test_who_delivers_less_or_more_than_there_is_has_no_figure() -> None:
    workloads.compare("names", 10, 10, mounter())
    workloads.compare("bytes", 999.5, 1000, mounter(), tolerance=0.001)
    workloads.compare("names", 11, 10, mounter("shows more"))
    for got, who in ((9, mounter()), (11, mounter()), (9, mounter("shows more"))):
        with pytest.raises(workloads.WrongError, match="where 10 were"):
            workloads.compare("names", got, 10, who)


def setting(
    made: report.Book, number: int, *, until: float = float("inf"), only: frozenset[str] = frozenset()
) -> workloads.Setting:
    effort = workloads.Effort(rounds=number, limit=1, idle=0, reads=0, until=until, wide=False, thorough=False)
    unused: dict[str, Any] = dict.fromkeys(("checkout", "work", "tools", "images", "contents", "mounters", "reader"))
    return workloads.Setting(**unused, only=only, effort=effort, book=made)


def turns(played: list[str], *names: str) -> list[workloads.Turn]:
    return [workloads.Turn(name, partial(played.append, name), ("find.cold",)) for name in names]


def test_contenders_take_turns_and_the_order_moves_on() -> None:
    played: list[str] = []
    workloads.rounds(setting(book(), 3), "x", turns(played, "ocifs-fuse", "overlayfs"))
    assert played == ["ocifs-fuse", "overlayfs", "overlayfs", "ocifs-fuse", "ocifs-fuse", "overlayfs"]


def test_who_fails_is_excused_once_and_not_asked_again() -> None:
    made, played = book(), []

    def fails() -> None:
        played.append("squashfuse")
        raise processes.FailedError("squashfuse_ll ended with status 1")

    workloads.rounds(
        setting(made, 2), "x", [workloads.Turn("squashfuse", fails, ("find.cold",)), *turns(played, "overlayfs")]
    )
    assert played == ["squashfuse", "overlayfs", "overlayfs"]
    assert made.notes == {("find.cold", "squashfuse"): "squashfuse_ll ended with status 1"}


def test_who_did_other_work_loses_the_figures_it_has() -> None:
    made = book(("find.cold", "squashfuse", [0.001]))

    def cheats() -> None:
        raise workloads.WrongError("delivered 3 names where 10 were to be had")

    workloads.rounds(setting(made, 1), "x", [workloads.Turn("squashfuse", cheats, ("find.cold",))])
    assert made.median("find.cold", "squashfuse") is None
    assert made.notes == {("find.cold", "squashfuse"): "delivered 3 names where 10 were to be had"}


def test_a_peer_that_is_missing_has_a_note_that_says_so() -> None:
    made = book()
    turn = workloads.Turn("squashfuse", lambda: None, ("find.cold", "find.warm"), "squashfuse_ll is not installed")
    workloads.rounds(setting(made, 1), "x", [turn])
    assert set(made.notes) == {("find.cold", "squashfuse"), ("find.warm", "squashfuse")}


def test_when_the_time_is_over_nothing_begins() -> None:
    made = book()
    played: list[str] = []
    workloads.rounds(setting(made, 1, until=time.monotonic() - 1), "x", turns(played, "overlayfs"))
    assert played == []
    assert made.notes == {("find.cold", "overlayfs"): "the time given was over"}


def test_only_those_who_were_asked_for_take_part() -> None:
    played: list[str] = []
    workloads.rounds(setting(book(), 1, only=frozenset({"overlayfs"})), "x", turns(played, "ocifs-fuse", "overlayfs"))
    assert played == ["overlayfs"]


# ------------------------------------------------------------------------------------------------------------ processes


def test_a_command_gives_its_output_and_takes_its_input() -> None:
    assert processes.run("cat", feed=b"words").output == b"words"


def test_a_command_that_fails_says_what_it_said() -> None:
    with pytest.raises(processes.FailedError, match=r"^sh ended with status 3: oh no$"):
        processes.run("sh", "-c", "echo oh no >&2; exit 3")


def test_a_command_that_is_not_there_is_a_failure_like_any_other() -> None:
    with pytest.raises(processes.FailedError, match="no-such-program is not installed"):
        processes.run("no-such-program")


def test_a_command_is_stopped_with_its_children_when_its_time_is_over(tmp_path: Path) -> None:
    script = f"sleep 600 & echo $! > {tmp_path}/child; wait"
    with pytest.raises(processes.FailedError, match="was stopped after 1 s"):
        processes.run("sh", "-c", script, limit=1)
    child = Path("/proc", (tmp_path / "child").read_text().strip(), "stat")
    # Dead, or dead and not yet waited for by whoever inherited it.
    assert not child.exists() or child.read_text().rpartition(") ")[2].startswith("Z")


def test_bytes_through_a_pipe_are_counted() -> None:
    assert processes.piped("head", "-c", "3000000", "/dev/zero").size == 3_000_000
    with pytest.raises(processes.FailedError, match="status 2"):
        processes.piped("sh", "-c", "exit 2")


def test_what_a_process_used_is_told_between_two_moments() -> None:
    before = processes.used(os.getpid())
    sum(range(200_000))
    cpu, switches = processes.used(os.getpid()).since(before)
    assert cpu > 0
    assert switches >= 0
    assert processes.Used(5.0, {"7": 4, "9": 3}).since(processes.Used(3.0, {"7": 1, "8": 100})) == (2.0, 6)


def test_several_commands_run_so_many_at_a_time(tmp_path: Path) -> None:
    processes.several([("touch", tmp_path / str(number)) for number in range(5)], 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2", "3", "4"]
    with pytest.raises(processes.FailedError):
        processes.several([("true",), ("false",)], 2)


# ---------------------------------------------------------------------------------------------------------- the program


def bench(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run((sys.executable, BENCH, *words), capture_output=True, text=True, check=False)


def test_list_names_every_workload() -> None:
    listed = bench("--list")
    assert listed.returncode == 0
    assert [line.split()[0] for line in listed.stdout.split("\n\n")[0].splitlines()] == [*workloads.WORKLOADS]


def test_a_run_can_be_shown_again_in_every_form(tmp_path: Path) -> None:
    made = book(*EXAMPLE)
    (tmp_path / "run.json").write_text(report.to_json(made), encoding="utf-8")
    shown = bench(
        "--from", tmp_path / "run.json", "--svg", tmp_path / "run.svg", "--markdown", tmp_path / "run.md",
        "--json", tmp_path / "again.json",
    )  # fmt: skip
    assert shown.stdout == report.text(made)
    assert (tmp_path / "run.svg").read_text(encoding="utf-8") == picture.draw(made)
    assert (tmp_path / "run.md").read_text(encoding="utf-8") == report.markdown(made)
    assert (tmp_path / "again.json").read_text(encoding="utf-8") == report.to_json(made)


def test_a_workload_that_is_not_there_is_wrong_usage() -> None:
    assert bench("--only", "nothing").returncode == 2


# ----------------------------------------------------------------------------------------------------------- the reader


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reader") / "reader"
    subprocess.run(("gcc", "-Wall", "-Wextra", "-Werror", "-o", out, BENCH.parent / "benchmark/reader.c"), check=True)
    return out


def read(reader: Path, place: Path, words: list[str], feed: bytes) -> tuple[int, int, list[int]]:
    _, size, check, *each = map(int, processes.run(reader, *words, feed=feed, cwd=place).output.split())
    return size, check, each


def test_the_reader_reads_every_byte_however_many_read(reader: Path, tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / str(number)).write_bytes(bytes([number]) * (number * 20_000))
    feed = b"".join(b"%d\0" % number for number in range(20))
    for processes_at_once in ("1", "3", "8"):
        assert read(reader, tmp_path, ["files", processes_at_once], feed)[0] == 190 * 20_000


def test_the_reader_sees_other_bytes(reader: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"one way  ")
    before = read(reader, tmp_path, ["files", "1"], b"file\0")
    file.write_bytes(b"another  ")
    assert read(reader, tmp_path, ["files", "1"], b"file\0")[1] != before[1]


def test_random_reads_are_timed_each(reader: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(10_000))
    size, _, each = read(reader, tmp_path, ["random"], b"file\0000\0file\0008192\0file\0004096\0")
    assert size == 4096 + (10_000 - 8192) + 4096
    assert len(each) == 3


def test_a_file_that_cannot_be_read_is_a_failure(reader: Path, tmp_path: Path) -> None:
    for words in (["files", "1"], ["files", "2"]):
        with pytest.raises(processes.FailedError, match="No such file"):
            read(reader, tmp_path, words, b"none\0")
