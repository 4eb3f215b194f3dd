"""`specexec pull`: bring models and their drafters to this machine, into the cache that all tools share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from cli.errors import INTERRUPTED
from cli.quantities import format_bytes
from cli.screen import Screen, watched
from cli.verbosity import Verbosity, start_logging, verbosity_options
from offload import hub, names
from offload.errors import ModelNotFound

if TYPE_CHECKING:
    from offload.formats import FourBits
    from offload.quant import Quant


@click.command()
@click.argument("name")
@click.option("--revision", metavar="REV", help="A branch, tag or commit instead of the newest.")
@click.option(
    "-d", "--drafter", metavar="NAME", default="auto", help="auto: the one paired with the model; none; or a name."
)
@click.option("--pack", "quant", type=click.Choice(["none", "int8", "nf4"]), help="Pack while downloading, into --out.")
@click.option("--head-quant", type=click.Choice(["none", "nf4"]), default="none", help="Bits of the pack's head.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="The folder of the pack.")
@click.option("--trust-remote-code", is_flag=True, help="Bring Python files as well; with --pack, run them.")
@click.option("--dry-run", is_flag=True, help="Say what would be downloaded; download nothing.")
@click.option("--offline", is_flag=True, help="Only say whether everything is here.")
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
) -> int:
    """Download NAME (an alias or org/model) and its drafter; prints the folders. What is here is not fetched again.

    \b
      specexec pull llama-70b --dry-run
      specexec pull llama-8b
      specexec pull Qwen/Qwen3-32B --pack nf4 --out packs/qwen3-32b
    """
    if (quant is None) != (out is None):
        raise click.UsageError("--pack and --out go together: how, and where to.")
    if quant is None and head_quant != "none":
        raise click.UsageError("--head-quant is for packs: add --pack and --out.")
    screen = Screen(quiet=verbosity.quiet)
    start_logging(verbosity)
    target = _on_the_hub(name, revision)
    other = names.drafter_of(name) if drafter == "auto" else None if drafter == "none" else drafter
    wanted = [target] if quant is None else []
    wanted += [_on_the_hub(other, None)] if other and other != names.DEMO else []
    try:
        if quant is not None and out is not None:
            _pack(
                target, quant, head_quant, out, screen, verbosity,
                dry_run=dry_run, offline=offline, code=trust_remote_code,
            )  # fmt: skip
        for repo, commit in wanted:
            _pull(repo, commit, screen, dry_run=dry_run, offline=offline, code=trust_remote_code)
    except KeyboardInterrupt:
        screen.tell("stopped; the same command fetches the rest.")
        return INTERRUPTED
    return 0


def _on_the_hub(name: str, revision: str | None) -> tuple[str, str | None]:
    found = names.hub_name(name)
    if found is None:
        raise ModelNotFound(
            f"{name!r} is no name on the Hub.",
            "Folders and the built-in demo are here already; models of the Hub have names like org/name.",
            "specexec models",
        )
    return found[0], revision or found[1]


def _pull(repo: str, revision: str | None, screen: Screen, *, dry_run: bool, offline: bool, code: bool) -> None:
    here = hub.cached(repo, revision)
    if here and not hub.missing_files(here, code):
        screen.say(f"{repo} is here already")
        click.echo(str(here))
        return
    if offline:
        _refuse(repo, revision, code)
    missing = hub.look_up(repo, revision, code)
    what = f"{len(missing.missing)} files of {repo}, {format_bytes(missing.missing_B)}"
    if dry_run:
        click.echo(f"would download {what}, to {hub.cache_folder()}")
        return
    missing.refuse_full_disk(hub.cache_folder())
    screen.say(f"downloading {what}")
    click.echo(str(hub.download(repo, revision, code)))


def _refuse(repo: str, revision: str | None, code: bool) -> NoReturn:
    """Say what is missing of a model that is not all here."""
    names.resolve(repo if revision is None else f"{repo}@{revision}", "none", offline=True, code=code)
    raise AssertionError(f"{repo} was missing a moment ago")


def _pack(
    target: tuple[str, str | None],
    quant: Quant,
    head: FourBits,
    out: Path,
    screen: Screen,
    verbosity: Verbosity,
    *,
    dry_run: bool,
    offline: bool,
    code: bool,
) -> None:
    here = hub.cached(*target)
    if here and hub.missing_files(here, code):
        here = None
    if offline and not here:
        _refuse(*target, code)
    with screen.status(lambda: f"reading the headers of {target[0]}…"):
        from offload import arriving  # torch and transformers: seconds that --help need not pay
        from offload.pack import pack, plan
        from offload.shards import open_folder

        if here:
            originals, wanted = None, plan(open_folder(here), quant, code, head)
        else:
            originals = arriving.Arriving.begin(*target, out, code)
            wanted = originals.plan(quant, out, code, head)
    what = f"{format_bytes(sum(wanted.folder.file_sizes.values()))} of {target[0]} into {format_bytes(wanted.size_B)}"
    if dry_run:
        click.echo(f"would {'pack' if here else 'download and pack'} {what}, to {out}")
        return
    from tqdm import tqdm

    hidden = True if verbosity.quiet else None  # None: shown on a terminal only
    with tqdm(total=wanted.read_B, unit="B", unit_scale=True, desc="pull", disable=hidden, leave=False) as bar:
        pack(wanted, out, advance=watched(bar, screen), originals=originals)
    if originals:
        originals.forget()
    screen.say(f"packed {what}")
    click.echo(str(out))
