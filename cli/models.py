"""`specexec models`: the names that -m understands. Reads small files only; nothing is loaded or downloaded."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from difflib import get_close_matches

import click

from cli.verbosity import verbosity_options
from offload.errors import ModelNotFound
from offload.names import DEMO, aliases


@dataclass(frozen=True)
class Known:
    """A short name and the pair it stands for."""

    name: str
    target: str
    drafter: str
    note: str = ""


def known_models() -> list[Known]:
    """The built-in demo, then every alias in the order of its file."""
    demo = Known(DEMO, "built in", "built in", "a toy that shows the engine; needs no network")
    return [demo, *(Known(name, pair.target, pair.drafter or "none") for name, pair in aliases().items())]


@click.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@verbosity_options
@click.pass_context
def models(ctx: click.Context, as_json: bool) -> None:
    """List the names that -m understands."""
    if ctx.invoked_subcommand is None:
        _print_list(as_json)


@models.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@verbosity_options
def list_models(as_json: bool) -> None:
    """List the names that -m understands."""
    _print_list(as_json)


@models.command("show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@verbosity_options
def show_model(name: str, as_json: bool) -> None:
    """Show what one name stands for."""
    by_name = {model.name: model for model in known_models()}
    if name not in by_name:
        near = get_close_matches(name, by_name, n=2, cutoff=0.4)
        raise ModelNotFound(
            f"no model named {name!r}.",
            why="A folder or org/repo needs no name: give it to -m as it is.",
            hint=" or ".join(near) if near else "specexec models",
        )
    model = asdict(by_name[name])
    if as_json:
        click.echo(json.dumps(model, ensure_ascii=False))
    else:
        click.echo("\n".join(f"{key:<8} {value}" for key, value in model.items() if value))


def _print_list(as_json: bool) -> None:
    listed = known_models()
    if as_json:
        click.echo(json.dumps([asdict(model) for model in listed], ensure_ascii=False))
        return
    rows = [("NAME", "TARGET", "DRAFTER", ""), *((m.name, m.target, m.drafter, m.note) for m in listed)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
