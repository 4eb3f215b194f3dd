"""`specexec models`: the names that -m understands and what is on this machine. Reads headers; nothing is loaded."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import click

from cli.models.gate import check, only_plainly
from cli.shared.control_codes import echo
from cli.shared.errors import EXIT_CODES, REFUSALS
from cli.shared.quantities import format_bytes
from cli.shared.verbosity import Command, json_option, verbosity_options
from cli.terminal.table import table
from offload.checkpoint.documents import check_documents
from offload.checkpoint.headers import Folder, open_folder
from offload.checkpoint.quantized.formats import foreign
from offload.errors import ModelNotFound, OffloadError, UnsupportedModel
from offload.hub import cleanup as leftovers
from offload.hub import hub, names
from offload.hub import local_models as local
from offload.hub.other_apps import AppModel, models_of_apps
from offload.machine.folders import typed_path
from specexec.compose.head_folders import as_model, head_in_words


def _common_options(command: Command) -> Command:
    """What every command here takes."""
    return json_option()(verbosity_options(command))


@dataclass(frozen=True)
class Known:
    """A name, the pair it means, and its folder if it is on this machine."""

    name: str
    target: str
    drafter: str
    path: Path | None
    note: str = ""

    @property
    def facts(self) -> dict[str, object]:
        """Everything, for people and programs alike."""
        facts: dict[str, object] = {"name": self.name, "target": self.target, "drafter": self.drafter}
        facts |= {"note": self.note} if self.note else {}
        if self.path is None:
            return facts | {"local": False}
        try:
            check_documents(self.path)
            here = local.describe(self.path)
        except UnsupportedModel as refusal:
            return facts | {"local": True, "path": str(self.path), "refused": refusal.what}
        except OffloadError as damage:
            return facts | {"local": True, "path": str(self.path), "damaged": damage.what}
        return facts | {
            "local": True,
            "path": str(here.path),
            "architecture": here.architecture,
            "layers": here.layers,
            "size_B": here.size_B,
            "format": here.format,
            "bits_per_weight": here.bits_per_weight,
            "pack": here.pack,
            "loads_in_transformers": here.loads_in_transformers,
            "head": here.head,
            "notes": "; ".join(here.notes),
        }


def known_models() -> list[Known]:
    """The built-in demo, every alias in the order of its file, what else is in the cache, and other programs' files."""
    found = [_demo()]
    for name, pair in names.aliases().items():
        found.append(Known(name, pair.target, pair.drafter or "none", _here(name)))
    taken = {model.path.resolve() for model in found if model.path}
    paths = {repo: hub.cached(repo, None) for repo in hub.cached_repos()}
    others = {repo: path for repo, path in paths.items() if path and not hub.missing_files(path)}
    found += [
        Known(r, r, names.drafter_of(r) or "none", path) for r, path in others.items() if path.resolve() not in taken
    ]
    return found + [Known(str(one.file), f"{one.app}: {one.name}", "none", one.file) for one in _of_apps()]


def _of_apps() -> list[AppModel]:
    ollama = os.environ.get("OLLAMA_MODELS")
    return models_of_apps(Path.home(), Path(ollama) if ollama else None)


@click.group(invoke_without_command=True)
@_common_options
@click.pass_context
def models(ctx: click.Context, as_json: bool) -> None:
    """List the names that -m understands, and what is on this machine."""
    if ctx.invoked_subcommand is None:
        _print_list(as_json)


@models.command("list")
@_common_options
def list_models(as_json: bool) -> None:
    """List the names that -m understands, and what is on this machine."""
    _print_list(as_json)


@models.command("show")
@click.argument("name")
@_common_options
def show_model(name: str, as_json: bool) -> None:
    """Show what one name or folder means."""
    known = _find(name)
    facts = known.facts
    if known.path is not None:
        folder = open_folder(known.path)  # raises what is wrong with it
        check_documents(known.path)
        head = head_in_words(folder)
        facts["runs"] = f"no: {head}" if head else _runs(folder)
        if head:
            facts["layers"] = as_model(folder).config.get("num_hidden_layers", facts["layers"])
            del facts["loads_in_transformers"], facts["head"]
    if as_json:
        echo(json.dumps(facts, ensure_ascii=False))
        return
    words = {True: "yes", False: "no"}
    shown = {key: words[value] if isinstance(value, bool) else value for key, value in facts.items()}
    if "size_B" in facts:
        shown["size"] = format_bytes(int(str(shown.pop("size_B"))))
    if not facts["local"]:
        shown["local"] = f"no; specexec pull {name}"
    if facts.get("loads_in_transformers") is False:
        what = "its experts are in a layout of specexec's own"
        if facts["head"] == "nf4":
            what = "its head is in four bits"
        elif why := foreign(str(facts["format"]).split("+")):
            what = why
        shown["loads_in_transformers"] = f"no, {what}"
    width = max(map(len, shown))
    echo("\n".join(f"{key:<{width}} {value}" for key, value in shown.items() if value != ""), folded=True)


def _runs(folder: Folder) -> str:
    """What `chat` would say of it: yes, or the reason why not."""
    try:
        check(folder, trees=False)
    except REFUSALS as refusal:
        return f"no: {refusal.what}"
    why = only_plainly(folder)
    return "yes" if why is None else f"without guesses only: {why}"


@models.command("path")
@click.argument("name")
@_common_options
def show_path(name: str, as_json: bool) -> None:
    """Print the folder of a model that is on this machine."""
    path = names.resolve(name, offline=True).target
    echo(json.dumps({"name": name, "path": str(path)}) if as_json else path)


@models.command("verify")
@click.argument("name")
@_common_options
def verify_model(name: str, as_json: bool) -> int:
    """Read every weight of a model and compare it with its hash (packs, and what was pulled from the Hub)."""
    path = names.resolve(name, offline=True).target
    damaged = local.damaged_files(path)
    by_hash = local.hashed(path)
    if as_json:
        echo(json.dumps({"name": name, "path": str(path), "by_hash": by_hash, "damaged": damaged}))
        return EXIT_CODES["corrupt_shard"] if damaged else 0
    if damaged:
        raise local.damaged_error(path, damaged)
    checked = "every hash is right" if by_hash else "sizes and headers are right; there are no hashes to compare"
    echo(f"{name}: {checked}", folded=True)
    return 0


@models.command("rm")
@click.argument("chosen", metavar="NAME...", nargs=-1, required=True)
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@_common_options
def remove_models(chosen: tuple[str, ...], yes: bool, as_json: bool) -> None:
    """Delete models that were pulled, and packs. Folders of your own are left alone."""
    paths = {name: names.resolve(name, offline=True).target for name in chosen}
    if not yes:
        if not sys.stdin.isatty():
            raise click.UsageError("There is no terminal to confirm at; say --yes to delete.")
        for name, path in paths.items():
            echo(f"{name}: {format_bytes(local.describe(path).size_B)} in {path}", err=True)
        click.confirm("Delete?", abort=True, err=True)
    freed = {name: local.remove(path) for name, path in paths.items()}
    if as_json:
        echo(json.dumps({"freed_B": freed}))
        return
    for name, freed_B in freed.items():
        echo(f"{name}: {format_bytes(freed_B)} set free", err=True)


@models.command("prune")
@click.argument(
    "folders", metavar="[FOLDER]...", nargs=-1, type=click.Path(exists=True, file_okay=False, path_type=Path)
)
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@_common_options
def prune_models(folders: tuple[Path, ...], yes: bool, dry_run: bool, as_json: bool) -> None:
    """Delete what interrupted downloads and packs left behind, and old revisions.

    Looked at are the Hub's cache, and packs that are or lie in the FOLDERs. Old is a revision that no branch, tag or
    alias names. What is being written, and files of your own, are left alone.
    """
    found = leftovers.find_leftovers(folders)
    if not as_json:
        for one in found:
            echo(f"{format_bytes(one.size_B):>10}  {one.why:<20}  {one.path}", folded=True)
    if found and not dry_run and not yes:
        if not sys.stdin.isatty():
            raise click.UsageError("There is no terminal to confirm at; say --yes to delete, or --dry-run.")
        click.confirm("Delete?", abort=True, err=True)
    freed_B = 0 if dry_run else leftovers.clear(found)
    if as_json:
        rows = [{"path": str(one.path), "size_B": one.size_B, "why": one.why} for one in found]
        echo(json.dumps({"found": rows, "dry_run": dry_run, "freed_B": freed_B}, ensure_ascii=False))
    elif not dry_run:
        echo(f"{format_bytes(freed_B)} set free" if found else "nothing to delete", err=True)


def _demo() -> Known:
    return Known(
        names.DEMO, "built in", "built in", names.demo_folder("target"), "a toy that shows the engine; needs no network"
    )


def _here(name: str) -> Path | None:
    """The folder behind a name, if all of it is on this machine."""
    try:
        path = names.resolve(name, offline=True).target
    except OffloadError:
        return None
    return None if hub.missing_files(path) else path


def _find(name: str) -> Known:
    aliases = names.aliases()
    if name == names.DEMO:
        return _demo()
    if name in aliases:
        return Known(name, aliases[name].target, aliases[name].drafter or "none", _here(name))
    path = typed_path(name)
    if path.exists():
        of_apps = (one for one in _of_apps() if one.file.resolve() == path.resolve())
        target = next((f"{one.app}: {one.name}" for one in of_apps), str(path))
        return Known(name, target, "none", path)
    if names.hub_name(name):
        return Known(name, name, names.drafter_of(name) or "none", _here(name))
    near = get_close_matches(name, [names.DEMO, *aliases], n=2, cutoff=0.4)
    raise ModelNotFound(
        f"no model named {name!r}.",
        why="Not an alias and not a folder; models of the Hub have names like org/name.",
        hint=" or ".join(near) if near else "specexec models",
    )


def _print_list(as_json: bool) -> None:
    listed = [model.facts for model in known_models()]
    if as_json:
        echo(json.dumps(listed, ensure_ascii=False))
        return
    rows = [("NAME", "TARGET", "SIZE", "FORMAT", "DRAFTER")]
    for facts in listed:
        size = format_bytes(int(str(facts["size_B"]))) if "size_B" in facts else "-"
        form = next((word for word in ("damaged", "refused") if word in facts), str(facts.get("format", "-")))
        rows.append((str(facts["name"]), str(facts["target"]), size, form, str(facts["drafter"])))
    for line in table(rows):
        echo(line)
