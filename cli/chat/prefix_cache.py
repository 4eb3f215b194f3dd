"""`specexec cache`: keys and values of texts that are kept on disk, how many there are and may be. Loads nothing."""

from __future__ import annotations

import json
import time
from dataclasses import asdict

import click

from cli.engine.prefix_store import clear as remove_all
from cli.engine.prefix_store import everything, limit_B, prefixes_folder, set_limit
from cli.shared.control_codes import echo
from cli.shared.options import SIZE
from cli.shared.quantities import format_bytes
from cli.shared.verbosity import json_option, verbosity_options
from cli.terminal.table import table

JSON = json_option()


@click.group()
@verbosity_options
def cache() -> None:
    """Show, bound or clear the prefix cache: keys and values of texts, kept so that no beginning is read twice.

    \b
      specexec cache list
      specexec cache limit 40GiB
    """


@cache.command("list")
@JSON
@verbosity_options
def list_models(as_json: bool) -> None:
    """List what is kept of each model, the latest first."""
    found = everything(prefixes_folder())
    if as_json:
        for one in found:
            echo(json.dumps({**asdict(one), "folder": str(one.folder)}, ensure_ascii=False))
        return
    rows = [[_date(one.used_s), format_bytes(one.size_B), one.model, one.how] for one in found]
    echo("\n".join(table([("USED", "SIZE", "MODEL", "AS"), *rows])) if rows else "the prefix cache is empty")


@cache.command("size")
@JSON
@verbosity_options
def size(as_json: bool) -> None:
    """Say how much is kept, and how much may be."""
    folder = prefixes_folder()
    taken_B, most_B = sum(one.size_B for one in everything(folder)), limit_B(folder)
    if as_json:
        echo(json.dumps({"folder": str(folder), "size_B": taken_B, "limit_B": most_B}))
    else:
        echo(f"{format_bytes(taken_B)} of at most {format_bytes(most_B)}, in {folder}")


@cache.command("limit")
@click.argument("most", metavar="SIZE", type=SIZE)
@verbosity_options
def limit(most: int) -> None:
    """Let the prefix cache take at most SIZE, such as 40GiB; what was used longest ago leaves first."""
    set_limit(prefixes_folder(), most)
    echo(f"at most {format_bytes(most)}", err=True)


@cache.command("clear")
@verbosity_options
def clear() -> None:
    """Remove all of it. No text changes: beginnings are read again."""
    folder = prefixes_folder()
    taken_B = sum(one.size_B for one in everything(folder))
    remove_all(folder)
    echo(f"removed {format_bytes(taken_B)}", err=True)


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
