"""``evidence``: checking a log that ``--evidence-log`` wrote.

Not here: the log (`ocifs.evidence`), the options that ask for one (`options`).
"""

from __future__ import annotations

from pathlib import Path

import click

from ocifs.cli import options as opt
from ocifs.cli import output
from ocifs.cli.options import Choice
from ocifs.errors import CheckFailedError


@click.group(
    no_args_is_help=False,
    subcommand_metavar="COMMAND …",
    context_settings={"max_content_width": 100},
    epilog=opt.examples(
        "ocifs cat --evidence-log case.jsonl --case 2024-17 --examiner ML app.tar /etc/passwd",
        "ocifs evidence verify case.jsonl",
    ),
)
def evidence() -> None:
    """Check evidence logs.

    A log says what was opened and read, each line bound to the one before. Commands and mounts write one with
    --evidence-log FILE. Each line holds the SHA-256 of the line before; the last line's is the log's head: who has noted
    it can tell later that nothing was cut off.
    """


@evidence.command(
    epilog=opt.examples("ocifs evidence verify case.jsonl", "ocifs evidence verify --head 3f2a… case.jsonl")
)
@click.option("--head", metavar="SHA256", help="What the head was when it was noted: it must be that of some line.")
@opt.json_option
@click.argument("file", metavar="FILE", type=click.Path(dir_okay=False))
@opt.plain_options
def verify(choice: Choice, file: str, *, head: str | None, as_json: bool) -> None:  # noqa: ARG001 (-v has done what it does)
    """Check that no line of an evidence log was altered, left out or put in. Exit status 1 if one was."""
    from ocifs.evidence import verify as check

    found = check(Path(file), head)
    if as_json:
        output.print_document(found._asdict())
    else:
        for problem in found.problems:
            output.complain(problem)
        output.print_line(f"{found.lines} lines, head {found.head}")
    if found.problems:
        raise CheckFailedError(f"{file} is not as it was written")
