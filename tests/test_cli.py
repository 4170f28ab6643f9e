"""The command line as a whole: how it ends, what it says, what it loads. What each command does is in test_cli_*.py."""

from __future__ import annotations

import errno
import gc
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import pytest

from ocifs import errors
from ocifs.cli import main, output
from ocifs.cli import options as opt
from ocifs.cli.commands import FAMILIES, PLACES, ocifs
from tests.support.command import OCIFS, SAMPLE, Run, runner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def run(capfdbinary: pytest.CaptureFixture[bytes]) -> Run:
    return runner(capfdbinary)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Make `ocifs ps` fail with an exception of the test's choice."""

    def fail_with(error: BaseException) -> None:
        @click.command()
        @opt.plain_options
        def ps(_: opt.Choice) -> None:
            raise error

        monkeypatch.setattr("ocifs.cli.mounting.ps", ps)

    return fail_with


# -- how it ends ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.CheckFailedError, 1),
        (errors.UsageError, 2),
        (errors.NotFoundError, 3),
        (errors.DamagedError, 4),
        (errors.UnsupportedError, 5),
        (errors.MachineError, 6),
        (errors.BusyError, 7),
    ],
)
def test_an_expected_failure_is_one_sentence_and_its_status(
    run: Run, failing: Callable[[BaseException], None], error: type[errors.OcifsError], status: int
) -> None:
    failing(error("what went wrong"))
    assert run("ps") == (status, b"", "ocifs: what went wrong\n")


def test_every_error_class_has_a_status_that_help_explains() -> None:
    statuses = {error.exit_code for error in errors.OcifsError.__subclasses__()}
    assert statuses == {1, 2, 3, 4, 5, 6, 7}
    assert all(f"{status} " in (ocifs.epilog or "").partition("Exit status:")[2] for status in statuses)


def test_a_hostile_message_cannot_reach_the_terminal(run: Run, failing: Callable[[BaseException], None]) -> None:
    failing(errors.NotFoundError("no \x1b[31mred\n\u202e\udcff name"))
    assert run("ps").err == "ocifs: no \\x1b[31mred\\n\\u202e\\xff name\n"


def test_a_bug_is_one_line_that_asks_for_a_report(run: Run, failing: Callable[[BaseException], None]) -> None:
    failing(RuntimeError("impossible"))
    status, out, err = run("ps")
    assert (status, out) == (70, b"")
    assert err == (
        "ocifs: this is a bug, please report it with the command you ran and what it prints with -v: "
        "RuntimeError: impossible\n"
    )


def test_a_bug_shows_its_traceback_only_with_v(run: Run, failing: Callable[[BaseException], None]) -> None:
    failing(RuntimeError("impossible"))
    err = run("ps", "-v").err
    assert "Traceback (most recent call last)" in err
    assert err.splitlines()[-1].startswith("ocifs: this is a bug")


@pytest.mark.parametrize("words", [["umount", "mnt"], ["unbundle", "box"]])
def test_a_working_directory_that_is_gone_gets_a_sentence(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    message = "ocifs: the working directory is gone; change to one that is there, or give absolute paths\n"
    assert run(*words) == (3, b"", message)


def test_ctrl_c_ends_with_130_and_no_word(run: Run, failing: Callable[[BaseException], None]) -> None:
    failing(KeyboardInterrupt())
    assert run("ps") == (130, b"", "")
    wrapped = RuntimeError("Error calling __set_name__")
    wrapped.__cause__ = KeyboardInterrupt()
    failing(wrapped)
    assert run("ps") == (130, b"", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ls"], "missing argument 'REF'; see 'ocifs ls --help'"),
        (["ls", "--frob"], "no such option '--frob'"),
        (["cache"], "missing command; see 'ocifs cache --help'"),
        (["cache", "frob"], "no such command 'frob'"),
        ([], "missing command; see 'ocifs --help'"),
        (["mont"], "there is no command 'mont'; did you mean mount or umount or stat-mount?; see 'ocifs --help'"),
        (["mount", "--driver", "loop", "x", "/mnt"], "'--driver'"),
        (["ls", "--upto", "two", "x"], "'--upto'"),
        (["ls", "--layer", "1", "--upto", "2", SAMPLE], "--layer shows one layer alone"),
        (["ls", "--platform", "amd64", SAMPLE], "'amd64' is not a platform such as linux/amd64"),
        (["cat", "--cache-memory", "lots", SAMPLE, "/etc/motd"], "--cache-memory 'lots' is not a size such as 64M"),
        (["cache", "gc", "--max-size", "-1"], "--max-size '-1' is not a size such as 64M"),
        (["ls", "--cache-dir", "", SAMPLE], "the cache directory is empty"),
        (["ls", SAMPLE, "/a\0b"], "holds a NUL character"),
        (["mount", SAMPLE, ""], "the name of a directory is empty"),
        (["umount", ""], "the name of a directory is empty"),
        (["stat-mount", ""], "the name of a directory is empty"),
        (["bundle", SAMPLE, ""], "the name of a directory is empty"),
        (["bundle", "--upper", "", SAMPLE, "box"], "the name of a directory is empty"),
        (["unbundle", ""], "the name of a directory is empty"),
    ],
)
def test_wrong_words_end_with_2_and_one_line(run: Run, words: list[str], message: str) -> None:
    status, out, err = run(*words)
    assert (status, out) == (2, b"")
    assert err.startswith("ocifs: ")
    assert message.lower() in err.lower()
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "extra"),
    [(["ls", SAMPLE], {}), (["--help"], {}), (["ls", "--help"], {}), ([], {"_OCIFS_COMPLETE": "bash_source"})],
    ids=["output", "help", "help of a command", "completion"],
)
def test_output_that_cannot_be_written_is_a_failure_of_the_machine(words: list[str], extra: dict[str, str]) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*OCIFS, *words], stdout=full, stderr=subprocess.PIPE, env={**os.environ, **extra}, check=False
        )
    assert done.returncode == 6
    assert done.stderr == f"ocifs: cannot write to standard output: {os.strerror(errno.ENOSPC)}\n".encode()


def test_closed_output_is_a_failure_of_the_machine() -> None:
    done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *OCIFS, "ls", SAMPLE], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (
        6,
        b"ocifs: standard output is closed, so there is nowhere to write to\n",
    )


@pytest.mark.parametrize("words", [["ls", "-lR"], ["export"], ["ls", "-R", "--json"]])
def test_a_reader_that_goes_away_ends_it_as_it_ends_cat(words: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*OCIFS, *words, SAMPLE], stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, b"")


# -- what it says --------------------------------------------------------------------------------------------------


def every_command() -> Iterator[tuple[list[str], click.Command]]:
    context = click.Context(ocifs)
    for name in ocifs.list_commands(context):
        command = ocifs.get_command(context, name)
        assert command is not None
        yield [name], command
        if isinstance(command, click.Group):
            for sub in command.list_commands(context):
                found = command.get_command(context, sub)
                assert found is not None
                yield [name, sub], found


def test_the_commands_of_issue_2_are_all_there() -> None:
    assert {" ".join(path) for path, _ in every_command()} >= {
        *("mount", "umount", "ps", "ls", "cat", "stat", "cp", "export", "inspect", "layers", "index", "doctor"),
        *("cache info", "cache ls", "cache gc", "cache clear", "completion"),
    }


@pytest.mark.parametrize(
    ("path", "command"), list(every_command()), ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_help_of_every_command_shows_examples_that_it_understands(
    run: Run, path: list[str], command: click.Command
) -> None:
    status, out, err = run(*path, "--help")
    assert (status, err) == (0, "")
    text = out.decode()
    assert "Examples:\n    ocifs " in text or "Examples:\n    eval" in text
    for line in text.partition("Examples:\n")[2].splitlines():
        words = line.split("#")[0].split("|")[0].split(">")[0].split()
        if words[: 1 + len(path)] == ["ocifs", *path] and not isinstance(command, click.Group):
            command.make_context("x", words[1 + len(path) :], resilient_parsing=True)


def test_the_line_of_help_is_the_same_in_the_table_and_in_the_command() -> None:
    for name, place in PLACES.items():
        assert place.summary.endswith("."), name
        assert len(place.summary) <= 60, name
    assert [name for places in FAMILIES.values() for name in places] == list(PLACES)


def test_options_that_show_a_tree_are_on_every_command_that_shows_one() -> None:
    wanted = {"upto", "layer", "examine", "show_whiteout_devices", "follow_dirlinks", "all_xattrs"}
    wanted |= {"platform", "namespace", "root", "cache_dir", "verbose"}
    names = {path[0]: {param.name for param in command.params} for path, command in every_command() if len(path) == 1}
    for name in ("mount", "ls", "cat", "stat", "cp", "export", "index"):
        assert wanted <= names[name], name
    for name in ("mount", "ls", "stat", "inspect", "layers", "ps", "doctor"):
        assert "as_json" in names[name] or name == "mount"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(run: Run, shell: str) -> None:
    status, out, err = run("completion", shell)
    assert (status, err) == (0, "")
    assert f"_OCIFS_COMPLETE={shell}_complete".encode() in out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ocifs", "um"], ["plain,umount"]),
        (["ocifs", "cache", "c"], ["plain,clear"]),
        (["ocifs", "ls", "--show"], ["plain,--show-whiteout-devices"]),
        (["ocifs", "ls", f"oci:{SAMPLE}:"], [f"plain,oci:{SAMPLE}:latest"]),
        (["ocifs", "ls", f"oci:{SAMPLE}"[:-2]], [f"plain,oci:{SAMPLE}/"]),
        (["ocifs", "mount", "--driver", ""], ["plain,auto", "plain,erofs", "plain,fuse"]),
    ],
)
def test_completion_offers_what_can_follow(words: list[str], expected: list[str]) -> None:
    environment = {
        **os.environ,
        "_OCIFS_COMPLETE": "bash_complete",
        "COMP_WORDS": "\n".join(words),
        "COMP_CWORD": str(len(words) - 1),
    }
    program = "import sys; sys.argv[0] = 'ocifs'; from ocifs.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.splitlines() == expected


# -- what it loads -------------------------------------------------------------------------------------------------


def loaded_by(*words: str) -> set[str]:
    """The modules that a command has loaded when it is done."""
    program = (
        "import sys\nfrom ocifs.cli import main\n"
        f"status = main({list(words)!r})\n"
        "print(*sys.modules, file=sys.stderr)\nsys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


@pytest.mark.parametrize(
    "words",
    [["ls", SAMPLE], ["cat", SAMPLE, "/etc/motd"], ["stat", SAMPLE, "/"], ["inspect", SAMPLE], ["layers", SAMPLE]],
)
def test_reading_loads_neither_fuse_nor_an_event_loop_nor_rich(words: list[str], run: Run) -> None:
    assert run("index", SAMPLE).status == 0
    assert not loaded_by(*words) & {"rich", "trio", "pyfuse3", "ocifs.daemon", "ocifs.fuse", "asyncio"}


def test_help_loads_nothing_of_ocifs_but_the_table_of_commands() -> None:
    loaded = {name for name in loaded_by("--help") if name.startswith("ocifs")}
    assert loaded == {"ocifs", "ocifs.errors", "ocifs.cli", "ocifs.cli.commands", "ocifs.cli.output"}


def test_a_process_of_ocifs_ends_without_looking_for_cycles() -> None:
    program = (
        "import atexit, gc, sys\n"
        "atexit.register(lambda: print(len(gc.get_objects()) < 100 < gc.get_freeze_count(), file=sys.stderr))\n"
        "from ocifs.cli import main\n"
        "sys.argv = ['ocifs', '--help']\nsys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == "True\n"


# -- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("4096", 4096), ("64M", 64 << 20), ("1GiB", 1 << 30), ("1.5k", 1536), ("2 TB", 2 << 40), ("10b", 10)],
)
def test_sizes(text: str, size: int) -> None:
    assert opt.parse_size(text, "--x") == size


@pytest.mark.parametrize("text", ["", "M", "1X", "-1", "1e9", "99999999T", "1 2", "\u0661"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(errors.UsageError):
        opt.parse_size(text, "--x")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1048575, "1.0 MiB"),
        (325_058_560, "310.0 MiB"),
        (2**63, "8.0 EiB"),
    ],
)
def test_human_sizes(size: int, text: str) -> None:
    assert output.human_size(size) == text


def test_names_are_escaped_for_a_terminal_and_only_there() -> None:
    name = b"a\\b\n\xff\x1b \xe2\x80\xae\xc3\xa9"
    assert output.shown(name, terminal=True) == "a\\\\b\\n\\xff\\x1b \\u202eé"
    assert output.encode(output.shown(name, terminal=False)) == name


def test_a_time_that_no_calendar_has_is_shown_as_seconds() -> None:
    assert output.local_time(1e18) == "@1000000000000000000"


def test_main_gives_the_status_back_without_ending_the_process(capfd: Any) -> None:
    collecting = gc.get_threshold()
    assert main(["--help"]) == 0
    assert capfd.readouterr().out.startswith("Usage: ocifs ")
    assert gc.get_threshold() == collecting
