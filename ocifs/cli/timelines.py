"""``timeline``: what happened when, for mactime, plaso and Timesketch.

Not here: any event (`ocifs.forensics.timeline`), any format (`ocifs.forensics.bodyfile`, `ocifs.forensics.timesketch`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ocifs.cli import options as opt
from ocifs.cli import output
from ocifs.cli.examining import opened_examination
from ocifs.cli.options import Choice

if TYPE_CHECKING:
    from ocifs.forensics.examination import Examination


@click.command(
    epilog=opt.examples(
        "ocifs timeline oci:images/app:1.2 > app.body; mactime -b app.body -y -d 2024-01-01",
        "ocifs timeline --format body-ext app.tar > app.body; log2timeline.py --parsers bodyfile app.body",
        "ocifs timeline --format jsonl app.tar | jq 'select(.flags != [])'",
    )
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["body", "body-ext", "jsonl", "csv"]),
    default="body",
    help="body for mactime, body-ext for plaso, jsonl or csv for Timesketch.  [default: body]",
)
@click.option("--json", "as_json", is_flag=True, help="The same as --format jsonl.")
@opt.ref_argument
@opt.examination_options
def timeline(choice: Choice, ref: str, *, form: str, as_json: bool) -> None:
    """Print what happened when, for mactime, plaso or Timesketch.

    Events are layers that were made, the time of every version, and deletions. A version's is at its own time, which whoever
    built the layer chose; the others when the image's history says that the layer was made. Flags mark times later than that
    (later-than-layer) and content that changed while the time stayed (time-kept). Events are by path: mactime, plaso and
    Timesketch sort them by time.

    In a bodyfile m is a version's time, b when its layer was made, c a deletion; mactime shows what is not known at the
    epoch, which a date on its command line leaves out.
    """
    with opened_examination(choice, ref) as examination:
        if as_json or form == "jsonl":
            _print_rows(examination)
        elif form == "csv":
            _print_csv(examination)
        else:
            _print_body(examination, extended=form == "body-ext")


def _print_body(examination: Examination, *, extended: bool) -> None:
    from ocifs.forensics import bodyfile
    from ocifs.forensics.timeline import created_ns, events

    created = [created_ns(step) for step in examination.steps]
    for event in events(examination):
        step = examination.step(event.layer)
        label = f"[layer {event.layer}] {step.created_by if step else ''}"
        output.write(bodyfile.line(event, created[event.layer - 1], label, extended=extended))


def _print_rows(examination: Examination) -> None:
    from ocifs.forensics.timeline import events
    from ocifs.forensics.timesketch import row

    for event in events(examination):
        output.print_json(row(event, examination))


def _print_csv(examination: Examination) -> None:
    import csv
    import io

    from ocifs.forensics.timeline import events
    from ocifs.forensics.timesketch import COLUMNS, row

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for event in events(examination):
        writer.writerow([_cell(value) for value in row(event, examination).values()])
        output.write(output.encode(text.getvalue()))
        text.seek(0)
        text.truncate()


def _cell(value: Any) -> Any:  # noqa: ANN401 (whatever a row holds)
    """A field for a CSV: control characters escaped, for readers that go line by line, and terminals; lists as words."""
    if isinstance(value, list):
        return " ".join(value)
    return output.printable(value.replace("\\", "\\\\")) if isinstance(value, str) else value
