"""Shell completion: ``completion`` prints the script, and the words that are offered are found here.

click's own protocol does the talking: the script calls ocifs with ``_OCIFS_COMPLETE`` set.
"""

from __future__ import annotations

import contextlib
import os
from typing import Final

import click
from click.shell_completion import CompletionItem, get_completion_class

from ocifs.cli import options as opt
from ocifs.cli import output
from ocifs.errors import OcifsError

_VARIABLE: Final = "_OCIFS_COMPLETE"
_WITH_PATH: Final = ("oci:", "oci-archive:", "docker-archive:", "dir:")


@click.command(
    epilog=opt.examples(
        'eval "$(ocifs completion bash)"         # in ~/.bashrc',
        'eval "$(ocifs completion zsh)"          # in ~/.zshrc',
        "ocifs completion fish > ~/.config/fish/completions/ocifs.fish",
    )
)
@click.argument("shell", metavar="bash|zsh|fish", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that makes a shell complete ocifs commands, options, references and mount points."""
    from ocifs.cli.commands import ocifs  # commands loads this module

    found = get_completion_class(shell)
    if found is None:  # click without one of its three shells
        raise click.UsageError(f"no completion for {shell}")
    script = found(ocifs, {}, "ocifs", _VARIABLE)
    # Not source(): for bash that runs bash to look at its version, and complains on the script's own output.
    output.print_line((script.source_template % script.source_vars()).strip())


def complete_reference(incomplete: str) -> list[CompletionItem]:
    """What a reference can go on with: a scheme, a path behind it, a tag of the layout at that path."""
    scheme = next((word for word in _WITH_PATH if incomplete.startswith(word)), "")
    rest = incomplete.removeprefix(scheme)
    if not scheme:
        words = [word for word in (*_WITH_PATH, "containerd:") if incomplete and word.startswith(incomplete)]
        return [*(CompletionItem(word) for word in words), CompletionItem(incomplete, type="file")]
    path, colon, tag = rest.partition(":")
    if colon:
        return [CompletionItem(f"{scheme}{path}:{name}") for name in _tags(scheme + path) if name.startswith(tag)]
    head, name = os.path.split(path)
    found = []
    with contextlib.suppress(OSError):
        for entry in sorted(os.scandir(head or "."), key=lambda entry: entry.name):
            if entry.name.startswith(name) and (name or not entry.name.startswith(".")):
                slash = "/" if entry.is_dir() else ""
                found.append(CompletionItem(scheme + os.path.join(head, entry.name) + slash))
    return found


def _tags(reference: str) -> list[str]:
    """Names of the images at a place; nothing if it cannot be read."""
    from ocifs.image import ImageOptions, open_source

    with contextlib.suppress(OcifsError), open_source(reference, ImageOptions(), None) as (_, source):
        return [name for offered in source.names() for name in offered.names]
    return []


def complete_mountpoint(incomplete: str) -> list[CompletionItem]:
    """The directories that something of ocifs is mounted on."""
    from ocifs.daemon import records

    with contextlib.suppress(OcifsError):
        mountpoints = [one.record.mountpoint for one in records()]
        return [CompletionItem(name) for name in mountpoints if name.startswith(incomplete)]
    return []
