"""What an examiner wants to see first: ``audit``.

Not here: what is looked for (`ocifs.forensics.audit`).
"""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING, Final

import click

from ocifs.cli import options as opt
from ocifs.cli import output
from ocifs.cli.examining import opened_examination
from ocifs.cli.options import Choice
from ocifs.errors import CheckFailedError

if TYPE_CHECKING:
    from ocifs.forensics.audit import Finding, Severity
    from ocifs.tree import Warned

_CLASSES: Final = ("info", "low", "medium", "high")
"""The names of `ocifs.forensics.audit.Severity`, in lower case, by their values."""


@click.command(
    epilog=opt.examples(
        "ocifs audit oci:images/app:1.2",
        "ocifs audit --fail-on high app.tar",
        "ocifs audit --min info --json app.tar | jq -r 'select(.rule == \"setuid\").path'",
    )
)
@click.option(
    "--min", "least", type=click.Choice(_CLASSES), default="low", show_default=True, help="Leave out what matters less."
)
@click.option("--fail-on", "failing", type=click.Choice(_CLASSES), help="Exit with 1 if there is this or worse.")
@opt.json_lines_option
@opt.ref_argument
@opt.examination_options
def audit(choice: Choice, ref: str, *, least: str, failing: str | None, as_json: bool) -> None:
    """List privileges, odd names and traces of tampering.

    In all versions of all paths, SEEN saying whether the image shows it: setuid and capabilities, what everybody can write,
    device nodes, owners that /etc/passwd does not have, names that deceive, entries that others override, whiteouts of
    nothing, data behind an archive's end, other content with the same size and time, times later than the layer's, and
    every warning of indexes and merge, as rule-ROW. Names of rules are stable.

    Fields of --json are severity, rule, path (null for what is about a layer or the image), layer (null for the image),
    entry, visible, message. Findings are no failure unless --fail-on is given.
    """
    from ocifs.forensics.audit import audit as findings

    limit = _CLASSES.index(least)
    counts: collections.Counter[tuple[Severity, str]] = collections.Counter()
    worst = -1
    hidden = 0
    warnings = _warnings(choice, ref)
    with opened_examination(choice, ref) as examination:
        if not as_json:
            output.print_line(f"{'CLASS':<6}  {'RULE':<24}  LAYER  SEEN  PATH: MESSAGE")
        for finding in findings(examination, warnings):
            worst = max(worst, finding.severity)
            if finding.severity < limit:
                hidden += 1
                continue
            if as_json:
                _print_json(finding)
            else:
                counts[finding.severity, finding.rule] += 1
                _print(finding)
    if not as_json:
        _print_counts(counts, hidden)
    if failing is not None and worst >= _CLASSES.index(failing):
        raise CheckFailedError(f"the audit found something of class {_CLASSES[worst]}")


def _warnings(choice: Choice, ref: str) -> tuple[Warned, ...]:
    """What documents, indexes and the merge warn of."""
    import msgspec

    options = msgspec.structs.replace(choice.image_options(), examine=True)
    with opt.opened_image(choice, ref, options=options) as image:
        return image.warnings


def _print(finding: Finding) -> None:
    terminal = output.to_terminal()
    path = "" if finding.path is None else output.shown(b"/" + finding.path, terminal=terminal) + ": "
    seen = "-" if finding.path is None else "yes" if finding.visible else "no"
    output.print_line(
        f"{_CLASSES[finding.severity]:<6}  {finding.rule:<24}  {finding.layer or '-':>5}  {seen:<4}  "
        f"{path}{output.printable(finding.message)}"
    )


def _print_json(finding: Finding) -> None:
    output.print_json(
        {
            "severity": _CLASSES[finding.severity],
            "rule": finding.rule,
            "path": None if finding.path is None else "/" + output.decode(finding.path),
            "layer": finding.layer or None,
            "entry": finding.entry if finding.entry >= 0 else None,
            "visible": finding.visible,
            "message": finding.message,
        }
    )


def _print_counts(counts: collections.Counter[tuple[Severity, str]], hidden: int) -> None:
    """Write how often each rule was found, the worst first, after an empty line."""
    from ocifs.forensics.audit import RULES

    output.print_line("")
    rows = [
        (_CLASSES[severity], rule, str(count), RULES[rule].meaning if rule in RULES else "a warning by that rule")
        for (severity, rule), count in sorted(counts.items(), key=lambda item: (-item[0][0], item[0][1]))
    ]
    if rows:
        output.print_table(("CLASS", "RULE", "COUNT", "MEANING"), rows, right=(2,))
    else:
        output.print_line("nothing was found")
    if hidden:
        output.print_line(f"{hidden} more of a lower class; --min info shows all")
