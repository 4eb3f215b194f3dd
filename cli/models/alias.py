"""`specexec alias`: short names for models, each with its drafter. Written to the user's settings; loads nothing."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from cli.about.config import changed
from cli.shared.control_codes import echo
from cli.shared.settings import ALIASES
from cli.shared.verbosity import json_option, verbosity_options
from offload.errors import ModelNotFound
from offload.hub import names
from offload.machine.folders import typed_path


@click.group()
@verbosity_options
def alias() -> None:
    """List, set or remove short names of models.

    \b
      specexec alias set mine org/model --drafter org/small-model
      specexec chat -m mine
    """


@alias.command("list")
@json_option()
@verbosity_options
def list_aliases(as_json: bool) -> None:
    """List all short names; your own win over those of the package."""
    known = names.aliases()
    if as_json:
        echo(json.dumps({name: asdict(pair) for name, pair in known.items()}))
        return
    own = names.user_aliases()
    for name, pair in known.items():
        drafter = f" with {pair.drafter}" if pair.drafter else ""
        echo(f"{name} = {pair.target}{drafter}{f'  # {names.user_file()}' if name in own else ''}", folded=True)


@alias.command("set")
@click.argument("name")
@click.argument("target")
@click.option("-d", "--drafter", metavar="NAME", help="The smaller model that drafts for it.")
@verbosity_options
def set_alias(name: str, target: str, drafter: str | None) -> None:
    """Let NAME mean TARGET: a folder, org/repo or org/repo@revision."""
    if name == names.DEMO or "/" in name or name.startswith((".", "~")):
        raise click.BadParameter(f"{name!r} already means something: the demo, a folder or a repository.")
    target, drafter = _lasting(target), _lasting(drafter) if drafter else None
    row = {"target": target} | ({"drafter": drafter} if drafter else {})
    with changed(names.user_file()) as document:
        document.setdefault(ALIASES, {})[name] = row
    echo(f"{name} = {target}{f' with {drafter}' if drafter else ''}  # {names.user_file()}", err=True)


def _lasting(name: str) -> str:
    """What means the same from any folder: an absolute path, or org/repo."""
    path = typed_path(name)
    if path.exists():
        return str(path.absolute())
    if names.HUB_NAME.fullmatch(name) and not name.startswith("."):
        return name
    raise click.BadParameter(f"{name!r} is neither a folder or GGUF file here nor org/repo.")


@alias.command("rm")
@click.argument("name")
@verbosity_options
def remove_alias(name: str) -> None:
    """Forget one of your own short names."""
    if name not in names.user_aliases():
        raise ModelNotFound(f"{name!r} is no short name of yours.", hint="specexec alias list")
    with changed(names.user_file()) as document:
        del document[ALIASES][name]
    echo(f"removed {name}", err=True)
