"""`specexec ps` and `specexec stop`: which models a running server has loaded, and letting one go. Loads nothing."""

from __future__ import annotations

import json

import click

from cli.connect.models import cards_of
from cli.connect.server import ADDRESS, Server, server_options
from cli.shared.control_codes import echo
from cli.shared.quantities import format_count
from cli.shared.verbosity import json_option, verbosity_options
from cli.terminal.table import table


@click.command()
@server_options(ADDRESS)
@json_option()
@verbosity_options
def ps(connect: str, api_key: str | None, as_json: bool) -> None:
    """List the models of a running server: loaded or not, and what they do.

    \b
      specexec serve llama-70b qwen3-32b
      specexec ps
    """
    cards = cards_of(Server(connect, api_key))
    if as_json:
        echo(json.dumps(cards, ensure_ascii=False))
        return
    rows = [("MODEL", "STATE", "CONTEXT", "WRITING", "WAITING", "WHERE"), *map(_row, cards)]
    for line in table(rows):
        echo(line)


@click.command()
@click.argument("name", metavar="MODEL")
@server_options(ADDRESS)
@json_option()
@verbosity_options
def stop(name: str, connect: str, api_key: str | None, as_json: bool) -> None:
    """Unload a model of a running server, once it has written what it writes; the next request loads it again."""
    given = Server(connect, api_key).asked("/api/generate", {"model": name, "keep_alive": 0})
    echo(json.dumps(given, ensure_ascii=False) if as_json else f"{name} is unloaded")


def _row(card: dict[str, object]) -> tuple[str, ...]:
    meta, status = card.get("meta"), card["status"]
    assert isinstance(status, dict)
    state = str(status["value"])
    if not isinstance(meta, dict):
        return (str(card["id"]), state, "", "", "", "")
    counts = (str(meta.get("running", "")), str(meta.get("waiting", "")))
    return (str(card["id"]), state, format_count(int(meta["context"])), *counts, str(meta["placement"]))
