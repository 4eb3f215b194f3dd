"""`specexec pull`: download models and their drafters into the cache that all Hugging Face tools share."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from cli.engine.imports import lean_imports
from cli.shared.control_codes import echo
from cli.shared.errors import INTERRUPTED
from cli.shared.help_sections import SectionedCommand
from cli.shared.quantities import format_bytes
from cli.shared.verbosity import Verbosity, json_option, start_logging, verbosity_options
from cli.terminal.screen import Screen, watched
from offload.errors import ModelNotFound
from offload.hub import hub, names
from offload.machine.folders import typed_path
from offload.placement.quantized_sizes import FORMATS
from specexec.drafters.registry import check_models, parse

if TYPE_CHECKING:
    from offload.checkpoint.quantized.quantize import Quant
    from offload.placement.quantized_sizes import FourBits


@dataclass(frozen=True)
class _Asked:
    """The options as they were given."""

    name: str
    revision: str | None
    drafter: str
    pack: Quant | None
    head_quant: FourBits
    out: Path | None
    trust_remote_code: bool
    dry_run: bool
    offline: bool


@dataclass(frozen=True)
class _Pulled:
    """What became of one repository, or would: `line` says it to people, the rest to programs.

    `files`, of `fetch_B` bytes, were not here; `folder` is None while there is none. Of a pack these are the originals
    that this run fetched, or a dry run would for a pack of which nothing is there.
    """

    line: str
    role: str
    repo: str
    commit: str
    folder: Path | None
    files: list[str]
    fetch_B: int
    pack: Mapping[str, object] | None = None

    @property
    def facts(self) -> dict[str, object]:
        """All but the line."""
        return {name: value for name, value in asdict(self).items() if name != "line"}


@click.command(cls=SectionedCommand)
@click.argument("name")
@click.option("--revision", metavar="REV", help="A branch, tag or commit instead of the newest.")
@click.option(
    "-d",
    "--drafter",
    metavar="NAME",
    default="auto",
    help="auto: the one paired with the model; none; names joined by +.",
)
@click.option("--pack", "quant", type=click.Choice(FORMATS), help="Pack while downloading, into --out.")
@click.option("--head-quant", type=click.Choice(["none", "nf4"]), default="none", help="Bits of the pack's head.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="The folder of the pack.")
@click.option("--trust-remote-code", is_flag=True, help="Bring Python files as well; with --pack, run them.")
@click.option("--dry-run", is_flag=True, help="Say what would be downloaded; download nothing.")
@click.option("--offline", is_flag=True, help="Only say whether everything is here.")
@json_option()
@verbosity_options
@click.pass_obj
def pull(
    verbosity: Verbosity,
    name: str,
    revision: str | None,
    drafter: str,
    quant: Quant | None,
    head_quant: FourBits,
    out: Path | None,
    trust_remote_code: bool,
    dry_run: bool,
    offline: bool,
    as_json: bool,
) -> int:
    """Download NAME (an alias or org/model) and its drafters; prints the folders. What is here is not fetched again.

    \b
      specexec pull llama-70b --dry-run
      specexec pull llama-8b
      specexec pull Qwen/Qwen3-32B --pack nf4 --out packs/qwen3-32b
    """
    if (quant is None) != (out is None):
        raise click.UsageError("--pack and --out go together: how, and where to.")
    if quant is None and head_quant != "none":
        raise click.UsageError("--head-quant is for packs: add --pack and --out.")
    asked = _Asked(name, revision, drafter, quant, head_quant, out, trust_remote_code, dry_run, offline)
    start_logging(verbosity)
    screen, began_s = Screen(quiet=verbosity.quiet), time.perf_counter()
    pulled: list[_Pulled] = []
    try:
        for one in _all_of(asked, screen):
            pulled.append(one)
            if not as_json:
                echo(one.line, folded=True)
    except KeyboardInterrupt:
        screen.tell("stopped; the same command fetches the rest.")
        return INTERRUPTED
    if as_json:
        report = {"asked": asdict(asked), "cache": hub.cache_folder(), "models": [one.facts for one in pulled]}
        report["seconds"] = round(time.perf_counter() - began_s, 3)
        echo(json.dumps(report, ensure_ascii=False, default=str))
    return 0


def _all_of(asked: _Asked, screen: Screen) -> Iterator[_Pulled]:
    """The model, then its drafters."""
    target = _on_the_hub(asked.name, asked.revision)
    choice = parse(asked.drafter, names.known)
    wanted = [names.drafter_of(asked.name) if model == names.PAIRED else model for model in choice.models]
    found = [name for name in wanted if name]
    check_models(choice, [Path(name) for name in found], asked.name)
    drafters = [_on_the_hub(name, None) for name in found if not _is_built_in_or_folder(name)]
    yield (_pull if asked.pack is None else _pack)("target", *target, asked, screen)
    for drafter in drafters:
        yield _pull("drafter", *drafter, asked, screen)


def _is_built_in_or_folder(name: str) -> bool:
    return name == names.DEMO or typed_path(name).exists()


def _on_the_hub(name: str, revision: str | None) -> tuple[str, str | None]:
    found = names.hub_name(name)
    if found is None:
        raise ModelNotFound(
            f"{name!r} is no name on the Hub.",
            "Folders and the built-in demo are here already; models of the Hub have names like org/name.",
            "specexec models",
        )
    return found[0], revision or found[1]


def _pull(role: str, repo: str, revision: str | None, asked: _Asked, screen: Screen) -> _Pulled:
    here = hub.cached(repo, revision)
    if here and not asked.offline:
        for name in hub.drop_damaged(here):
            screen.tell(f"{repo}: {name} is damaged and is fetched anew")
    whole = here is not None and not hub.missing_files(here, asked.trust_remote_code)
    if here and whole and (asked.offline or hub.has_tokenizer(here)):
        screen.say(f"{repo} is here already")
        return _Pulled(str(here), role, repo, here.name, here, [], 0)
    if asked.offline:
        _refuse(repo, revision, asked)
    missing = hub.look_up(repo, revision, asked.trust_remote_code)
    if here and whole and not missing.missing:
        screen.say(f"{repo} is here already")
        return _Pulled(str(here), role, repo, here.name, here, [], 0)
    _admit(repo, revision, asked, screen)
    files, fetch_B = sorted(missing.missing), missing.missing_B
    what = f"{len(files)} files of {repo}, {format_bytes(fetch_B)}"
    if asked.dry_run:
        line = f"would download {what}, to {hub.cache_folder()}"
        return _Pulled(line, role, repo, missing.commit, None, files, fetch_B)
    missing.refuse_full_disk(hub.cache_folder())
    screen.say(f"downloading {missing.described(hub.cache_folder())}")
    folder = hub.download(repo, revision, asked.trust_remote_code)
    return _Pulled(str(folder), role, repo, missing.commit, folder, files, fetch_B)


def _admit(repo: str, revision: str | None, asked: _Asked, screen: Screen) -> None:
    """Refuse before the download what no command could load, and say what runs without guesses only."""
    from cli.models.gate import check, only_plainly
    from offload.hub.headers_only import list_hub
    from specexec.compose.head_folders import head_in_words, verifier_of

    listed = list_hub(repo, revision)
    if words := head_in_words(listed):
        model = verifier_of(listed)
        use = f"-m {model} takes it where nothing else is paired" if model else f"use: -m MODEL -d {repo}"
        screen.tell(f"Note: {repo} is {words}; {use}")
        return
    check(listed, trees=False, trust_remote_code=asked.trust_remote_code)
    for note in (*listed.notes, only_plainly(listed, asked.trust_remote_code)):
        if note:
            screen.tell(f"Note: {repo}: {note}")


def _refuse(repo: str, revision: str | None, asked: _Asked) -> NoReturn:
    """Say what is missing of a model that is not all here."""
    name = repo if revision is None else f"{repo}@{revision}"
    names.resolve(name, offline=True, code=asked.trust_remote_code)
    raise AssertionError(f"{repo} was missing a moment ago")


def _pack(role: str, repo: str, revision: str | None, asked: _Asked, screen: Screen) -> _Pulled:
    assert asked.pack is not None
    assert asked.out is not None
    out, code = asked.out, asked.trust_remote_code
    here = hub.cached(repo, revision)
    if here and hub.missing_files(here, code):
        here = None
    if asked.offline and not here:
        _refuse(repo, revision, asked)
    with screen.status(lambda: f"reading the headers of {repo}…"):
        from offload.checkpoint.headers import open_folder

        with lean_imports():  # torch and transformers: seconds that --help need not pay
            from offload.packs import pack_while_downloading as arriving
            from offload.packs.pack import pack, plan
        if here:
            originals, commit = None, here.name
            wanted = plan(open_folder(here), asked.pack, code, asked.head_quant)
        else:
            originals = arriving.Arriving.begin(repo, revision, out, code)
            wanted, commit = originals.plan(asked.pack, out, code, asked.head_quant), originals.commit
    files, files_B = sorted(file.name for file in wanted.folder.file_sizes), sum(wanted.folder.file_sizes.values())
    what = f"{format_bytes(files_B)} of {repo} into {format_bytes(wanted.size_B)}"
    facts = {"size_B": wanted.size_B, "loads_in_transformers": wanted.loadable, "originals": files}
    came = _Pulled(str(out), role, repo, commit, out, [] if here else files, 0 if here else files_B, facts)
    if asked.dry_run:
        return replace(came, line=f"would {'pack' if here else 'download and pack'} {what}, to {out}", folder=None)
    from tqdm import tqdm

    hidden = True if screen.quiet else None  # None: shown on a terminal only
    with tqdm(total=wanted.read_B, unit="B", unit_scale=True, desc="pull", disable=hidden, leave=False) as bar:
        pack(wanted, out, advance=watched(bar, screen), originals=originals)
    screen.say(f"packed {what}")
    if originals is None:
        return came
    originals.forget()
    return replace(came, files=sorted({*originals.fetched}), fetch_B=originals.fetched_B)
