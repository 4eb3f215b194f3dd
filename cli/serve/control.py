"""`specexec ps` and `specexec stop`: which models a running server has loaded, and letting one go. Loads nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from http.client import HTTPException
from typing import TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

import click

from cli.shared.control_codes import echo
from cli.shared.errors import NoServer
from cli.shared.quantities import format_count
from cli.shared.verbosity import json_option, verbosity_options

Result = TypeVar("Result")

_ADDRESS = "http://127.0.0.1:8000"
_QUICK_S, _SLOW_S = 10.0, 600.0  # a model leaves once it has written what it writes


def server_options(command: Callable[..., Result]) -> Callable[..., Result]:
    """Where the server is, and its key."""
    for option in (
        click.option("--api-key", metavar="KEY", envvar="SPECEXEC_API_KEY", help="The server's key, if it has one."),
        click.option("--connect", metavar="URL", default=_ADDRESS, help="Address of the server."),
    ):
        command = option(command)
    return command


@click.command()
@server_options
@json_option()
@verbosity_options
def ps(connect: str, api_key: str | None, as_json: bool) -> None:
    """List the models of a running server: loaded or not, and what they do.

    \b
      specexec serve llama-70b qwen3-32b
      specexec ps
    """
    cards = _asked(connect, api_key, "/v1/models").get("data")
    if not isinstance(cards, list) or not all(_is_ours(card) for card in cards):
        raise NoServer(f"what answers at {connect} is no server of specexec.", hint="--connect URL")
    if as_json:
        echo(json.dumps(cards, ensure_ascii=False))
        return
    rows = [("MODEL", "STATE", "CONTEXT", "WRITING", "WAITING", "WHERE"), *map(_row, cards)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        echo("  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip())


@click.command()
@click.argument("name", metavar="MODEL")
@server_options
@json_option()
@verbosity_options
def stop(name: str, connect: str, api_key: str | None, as_json: bool) -> None:
    """Unload a model of a running server, once it has written what it writes; the next request loads it again."""
    told = _asked(connect, api_key, "/api/generate", {"model": name, "keep_alive": 0})
    echo(json.dumps(told, ensure_ascii=False) if as_json else f"{name} is unloaded")


def _is_ours(card: object) -> bool:
    return isinstance(card, dict) and card.get("owned_by") == "specexec"


def _row(card: dict[str, object]) -> tuple[str, ...]:
    meta, status = card.get("meta"), card["status"]
    assert isinstance(status, dict)
    state = str(status["value"])
    if not isinstance(meta, dict):
        return (str(card["id"]), state, "", "", "", "")
    counts = (str(meta.get("running", "")), str(meta.get("waiting", "")))
    return (str(card["id"]), state, format_count(int(meta["context"])), *counts, str(meta["placement"]))


def _asked(address: str, key: str | None, path: str, body: dict[str, object] | None = None) -> dict[str, object]:
    """What a server answers. Raises NoServer for one that cannot be reached or does not answer as ours does."""
    address = address if "://" in address else f"http://{address}"
    address = address.rstrip("/").removesuffix("/v1")
    try:
        known = urlsplit(address).scheme in ("http", "https")
    except ValueError as problem:
        raise click.UsageError(f"--connect {address}: {problem}.") from None
    if not known:
        raise click.UsageError(f"--connect {address}: an address that begins with http:// is needed.")
    headers = {"Content-Type": "application/json", **({"x-api-key": key} if key else {})}
    request = Request(f"{address}{path}", json.dumps(body).encode() if body else None, headers)
    # A proxy of the surroundings is for the internet; our servers are near.
    try:
        with build_opener(ProxyHandler({})).open(request, timeout=_SLOW_S if body else _QUICK_S) as answer:
            told = json.loads(answer.read())
    except HTTPError as refusal:
        with refusal:
            raise NoServer(f"the server at {address} refuses: {_reason(refusal)}") from None
    except (URLError, TimeoutError, OSError, HTTPException, ValueError) as problem:
        reason = problem.reason if isinstance(problem, URLError) else problem
        reason = (isinstance(reason, OSError) and reason.strerror) or reason
        raise NoServer(
            f"no server answers at {address}: {reason}.", hint="specexec serve in another terminal, or --connect URL"
        ) from None
    if not isinstance(told, dict):
        raise NoServer(f"what answers at {address} is no server of specexec.", hint="--connect URL")
    return told


def _reason(refusal: HTTPError) -> str:
    try:
        error = json.loads(refusal.read())["error"]
    except (ValueError, KeyError, TypeError):
        return f"{refusal.code} {refusal.reason}."
    return str(error["message"] if isinstance(error, dict) else error)
