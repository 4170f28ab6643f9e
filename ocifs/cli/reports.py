"""The files below ``.ocifs/reports`` of an examined mount: what commands print of the image, each in a file of its name.

A report is nothing but a command and its options. It runs in a process of its own, is given the image that is mounted
(`ocifs.cli.examining.given`, `ocifs.cli.options.given_image`), and prints into the file.

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
    from ocifs.image import Image

REPORTS: Final = {
    "audit.txt": ("audit",),
    "audit.jsonl": ("audit", "--json"),
    "deleted.txt": ("deleted",),
    "deleted.jsonl": ("deleted", "--json"),
    "hashdeep.txt": ("hash",),
    "mtree.txt": ("hash", "--format", "mtree"),
    "sha256sum.txt": ("hash", "--format", "sha256sum"),
    "timeline.body": ("timeline",),
    "timeline.csv": ("timeline", "--format", "csv"),
    "timeline.jsonl": ("timeline", "--json"),
    "wasted.txt": ("wasted", "-n", "0"),
    "wasted.jsonl": ("wasted", "-n", "0", "--json"),
}
"""The commands, by the name of the file. Each opens its image with `ocifs.cli.examining.opened_examination`, or with
`ocifs.cli.options.opened_image`."""


def reports(ref: str) -> dict[str, Report]:
    """Give what writes each report of the image that is mounted as ``ref``."""
    return {name: partial(_write, (*words, ref)) for name, words in REPORTS.items()}


def _write(words: tuple[str, ...], image: Image, examination: Examination, file: BinaryIO) -> None:
    """Run a command, its output into a file. This process is for nothing else, so its standard output may be replaced."""
    from ocifs.cli.commands import ocifs
    from ocifs.cli.examining import given
    from ocifs.cli.options import given_image

    sys.stdout = io.TextIOWrapper(file, write_through=True)
    with given_image(image), given(examination):
        try:
            with ocifs.make_context("ocifs", list(words)) as context:
                ocifs.invoke(context)
        except click.exceptions.Exit:
            pass  # a check that failed is said in the report
    sys.stdout.flush()
    sys.stdout.detach()
