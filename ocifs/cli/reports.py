"""The files below ``.ocifs/reports`` of an examined mount: what commands print of the image, each in a file of its name.

A report is nothing but a command and its options. It runs in a process of its own, is given the image that is mounted
(`ocifs.cli.examining.given`), and prints into the file.

Not here: when a report is made, and where (`ocifs.forensics.workshop`).
"""

from __future__ import annotations

import io
import sys
from functools import partial
from typing import TYPE_CHECKING, BinaryIO, Final

import click

if TYPE_CHECKING:
    from ocifs.forensics.examination import Examination
    from ocifs.forensics.workshop import Report

REPORTS: Final = {
    "deleted.txt": ("deleted",),
    "deleted.jsonl": ("deleted", "--json"),
    "wasted.txt": ("wasted", "-n", "0"),
    "wasted.jsonl": ("wasted", "-n", "0", "--json"),
}
"""The commands, by the name of the file. Each opens its image with `ocifs.cli.examining.opened_examination`."""


def reports(ref: str) -> dict[str, Report]:
    """Give what writes each report of the image that is mounted as ``ref``."""
    return {name: partial(_write, (*words, ref)) for name, words in REPORTS.items()}


def _write(words: tuple[str, ...], examination: Examination, file: BinaryIO) -> None:
    """Run a command, its output into a file. This process is for nothing else, so its standard output may be replaced."""
    from ocifs.cli.commands import ocifs
    from ocifs.cli.examining import given

    sys.stdout = io.TextIOWrapper(file, write_through=True)
    with given(examination):
        try:
            with ocifs.make_context("ocifs", list(words)) as context:
                ocifs.invoke(context)
        except click.exceptions.Exit:
            pass  # a check that failed is said in the report
    sys.stdout.flush()
    sys.stdout.detach()
