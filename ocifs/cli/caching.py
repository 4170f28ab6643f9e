"""``cache``: what ocifs keeps on disk, and how to make it smaller.

Not here: what is in the files (`ocifs.store` says which kinds there are).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

import click

from ocifs.cli import options as opt
from ocifs.cli import output
from ocifs.cli.options import Choice

if TYPE_CHECKING:
    from ocifs.store import Freed, Listed

_MEANING: Final = {
    "layers": "layer indexes",
    "trees": "image trees",
    "histories": "images' histories",
    "reframed": "re-framed copies",
    "archives": "compressed archives seen",
}


@click.group(
    no_args_is_help=False,
    subcommand_metavar="COMMAND …",
    context_settings={"max_content_width": 100},
    epilog=opt.examples("ocifs cache info", "ocifs cache gc --max-size 2G", "ocifs cache clear"),
)
def cache() -> None:
    """Show and clean the cache: the indexes of layers and the merged trees of images.

    Nothing in it is needed: what is removed is built again when it is asked for. What is in use is never removed.
    """


@cache.command(epilog=opt.examples("ocifs cache info", "ocifs cache info --json | jq .bytes"))
@opt.json_option
@opt.cache_options
def info(choice: Choice, *, as_json: bool) -> None:
    """Show where the cache is and how much is in it, by kind."""
    found = _summary(choice)
    if as_json:
        output.print_document(found)
        return
    output.print_line(f"{'Path:':<8}{output.printable(found['path'])}")
    output.print_line(f"{'Size:':<8}{output.human_size(found['bytes'])}")
    output.print_line(f"{'Free:':<8}{output.human_size(found['free'])}")
    output.print_line("")
    output.print_table(
        ("KIND", "ENTRIES", "IN USE", "SIZE", "WHAT"),
        [
            (name, str(kind["entries"]), str(kind["in_use"]), output.human_size(kind["bytes"]), _MEANING.get(name, ""))
            for name, kind in found["kinds"].items()
        ],
        right=(1, 2, 3),
    )


def _entries(choice: Choice) -> list[Listed]:
    """What is in the cache; one that is not there is not made for that."""
    try:
        os.lstat(choice.cache_path())
    except FileNotFoundError:
        return []
    except OSError:
        pass  # opening it says what is wrong
    with opt.opened_store(choice) as store:
        return list(store.entries())


def _summary(choice: Choice) -> dict[str, Any]:
    from ocifs.store import Kind

    kinds = {kind.value: {"entries": 0, "in_use": 0, "bytes": 0} for kind in Kind}
    for entry in _entries(choice):
        kind = kinds[entry.kind.value]
        kind["entries"] += 1
        kind["in_use"] += entry.in_use
        kind["bytes"] += entry.size
    path = choice.cache_path()
    there = next(place for place in (path, *path.parents) if os.path.exists(place))
    disk = os.statvfs(there)
    return {
        "path": str(path),
        "bytes": sum(kind["bytes"] for kind in kinds.values()),
        "free": disk.f_bavail * disk.f_frsize,
        "kinds": kinds,
    }


@cache.command("ls", epilog=opt.examples("ocifs cache ls", "ocifs cache ls --json | jq -r 'select(.in_use) | .key'"))
@opt.json_lines_option
@opt.cache_options
def ls(choice: Choice, *, as_json: bool) -> None:
    """List what is in the cache, in the order in which `gc` would remove it."""
    entries = _entries(choice)
    if as_json:
        for entry in entries:
            output.print_json(
                {
                    "kind": entry.kind.value,
                    "key": entry.key,
                    "size": entry.size,
                    "used": entry.used,
                    "in_use": entry.in_use,
                }
            )
        return
    output.print_table(
        ("KIND", "SIZE", "LAST USED", "", "KEY"),
        [
            (
                entry.kind.value,
                output.human_size(entry.size),
                output.local_time(entry.used),
                "in use" if entry.in_use else "",
                entry.key,
            )
            for entry in entries
        ],
        right=(1,),
    )


@cache.command(epilog=opt.examples("ocifs cache gc", "ocifs cache gc --max-size 500M"))
@click.option("--max-size", metavar="SIZE", help="Leave at most this much, as 500M or 2GiB.  [default: 20GiB]")
@opt.cache_options
def gc(choice: Choice, max_size: str | None) -> None:
    """Remove what was not used for longest, until the cache is no larger than --max-size."""
    from ocifs.store import DEFAULT_LIMIT

    limit = DEFAULT_LIMIT if max_size is None else opt.parse_size(max_size, "--max-size")
    with opt.opened_store(choice) as store:
        _report(store.gc(limit))


@cache.command(epilog=opt.examples("ocifs cache clear"))
@opt.cache_options
def clear(choice: Choice) -> None:
    """Remove everything that is not in use."""
    with opt.opened_store(choice) as store:
        _report(store.clear())


def _report(freed: Freed) -> None:
    kept = f"; {freed.kept_in_use} in use, kept" if freed.kept_in_use else ""
    entries = "1 entry" if freed.entries == 1 else f"{freed.entries} entries"
    output.print_line(f"removed {entries}, {output.human_size(freed.size)}{kept}")
