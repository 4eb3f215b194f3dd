"""From a typed name to folders on this machine: the built-in pair, a path, an alias, a Hub name.

Knows no torch and no transformers; the Hub library is imported only when a Hub name is asked for.
"""

import difflib
import logging
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from offload.checkpoint.gguf.model import documents_folder, is_gguf, source_files
from offload.errors import BadModelDir, ModelNotFound, OfflineMissing
from offload.hub.hub import cache_folder, cached, download, look_up, missing_files, models_of_heads
from offload.machine.folders import folder_of, typed_path

log = logging.getLogger(__name__)
HERE = Path(__file__).parent.parent
DEMO = "demo"
PAIRED = "sibling"  # the drafter that a model is paired with, whatever it is called
HUB_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class Alias:
    """A short name: the Hub names of a model and of the sibling that drafts for it."""

    target: str
    drafter: str | None = None


@dataclass(frozen=True)
class ModelPair:
    """A model's folder, those of the drafters it was asked with, and the name it was asked by."""

    name: str
    target: Path
    drafters: tuple[Path, ...] = ()
    toy: bool = False


def user_file() -> Path:
    """The user's settings; short names are written there as [alias.NAME] and win over those of the package."""
    return folder_of("config") / "config.toml"


def aliases() -> dict[str, Alias]:
    """Every short name: those that come with the package, then those of the user's file."""
    return own_aliases(HERE / "aliases.toml") | user_aliases()


def user_aliases() -> dict[str, Alias]:
    """The short names of the user's file alone."""
    return own_aliases(user_file()) if user_file().is_file() else {}


def own_aliases(file: Path) -> dict[str, Alias]:
    """The [alias.NAME] tables of one file. Raises BadModelDir for those that name no target."""
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8-sig")).get("alias", {})
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise BadModelDir(f"{file} cannot be read: {error}.", hint="correct it, or remove it.") from error
    if not isinstance(table, dict):
        raise BadModelDir(f"{file}: alias must be a table.", hint='[alias.NAME] and, below it, target = "org/model".')
    for name, row in table.items():
        texts = isinstance(row, dict) and all(isinstance(value, str) for value in row.values())
        if not texts or not {"target"} <= set(row) <= {"target", "drafter"}:
            raise BadModelDir(
                f"{file}: [alias.{name}] must have a target and may have a drafter, both as text.",
                hint=f'[alias.{name}] and, below it, target = "org/model" or a folder.',
            )
    return {name: Alias(row["target"], row.get("drafter")) for name, row in table.items()}


def hub_name(name: str) -> tuple[str, str | None] | None:
    """Repository and revision that a name or an alias means on the Hub; None for folders and unknown names."""
    known = aliases().get(name)
    hub = HUB_NAME.fullmatch(known.target if known else name)
    return (hub["repo"], hub["revision"]) if hub else None


def known(name: str) -> bool:
    """Whether a folder or a short name is called so."""
    return name in (DEMO, *aliases()) or typed_path(name).exists()


def resolve(name: str, drafters: tuple[str, ...] = (), *, offline: bool = False, code: bool = False) -> ModelPair:
    """The folders of a name; downloads what is missing unless `offline`, Python files only if `code`.

    Raises ModelNotFound, GatedRepo, OfflineMissing, BadModelDir, DiskFull.

    `drafters` have names of their own, or are PAIRED: that one is left out unless it is here already, never downloaded.
    """
    target = _locate(name, offline, code)
    found = [_sibling(name) if one == PAIRED else _drafter(one, offline, code) for one in drafters]
    return ModelPair(name, target, tuple(path for path in found if path), toy=name == DEMO)


def is_here(name: str) -> bool:
    """Whether all of a model is on this machine; only one of the Hub can be elsewhere."""
    try:
        resolve(name, offline=True)
    except OfflineMissing:
        return False
    return True


def demo_folder(role: str) -> Path:
    """The folder of the built-in pair's `target` or `drafter`."""
    path = HERE / "demo" / role
    if not (path / "config.json").is_file():
        raise ModelNotFound(
            f"the built-in demo {role} is not part of this installation.",
            f"{path} is missing.",
            "install the package again, or run scripts/build_demo.py in a checkout.",
        )
    return path


def _drafter(name: str, offline: bool, code: bool) -> Path:
    return demo_folder("drafter") if name == DEMO else _locate(name, offline, code)


def _locate(name: str, offline: bool, code: bool = False) -> Path:
    if name == DEMO:
        return demo_folder("target")
    path = typed_path(name)
    if path.exists() or name.startswith((".", "/", "~")):
        if not path.exists():
            raise ModelNotFound(f"there is no folder {name}.", hint="check the path.")
        return documents_folder(path)
    known = aliases().get(name)
    if known and known.target.startswith((".", "/", "~")):
        return _locate(known.target, offline, code)
    hub = hub_name(name)
    if hub is None and known:
        raise ModelNotFound(
            f"'{name}' is short for '{known.target}', which is neither a path nor org/name.",
            hint=f"specexec alias set {name} FOLDER, or org/name.",
        )
    if hub is None:
        near = difflib.get_close_matches(name, [DEMO, *aliases()], n=3, cutoff=0.5)
        raise ModelNotFound(
            f"no model named '{name}'.",
            "Not an alias and not a folder; models of the Hub have names like org/name.",
            " or ".join(near or [DEMO, *list(aliases())[:2]]) + "  (see: specexec models)",
        )
    return _from_hub(*hub, offline, code)


def called(folder: Path) -> str:
    """What people call a model's folder: its repository, if it lies in the Hub's cache, where folders are numbers."""
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
    if files := source_files(folder):
        return files[0].stem if is_gguf(files[0]) else files[0].parent.name
    return f"{DEMO} {folder.name}" if folder.parent == HERE / "demo" else folder.name


def drafter_of(name: str) -> str | None:
    """The name of the drafter paired with a model, on this machine or not; else of a head here that was made for it."""
    rows = aliases().items()
    paired = next((pair.drafter for alias, pair in rows if name in (alias, pair.target) and pair.drafter), None)
    if paired or (hub := hub_name(name)) is None or typed_path(name).exists():
        return paired
    return next((head for head, model in models_of_heads().items() if model == hub[0]), None)


def _sibling(name: str) -> Path | None:
    """The drafter paired with a model, if all of it is on this machine."""
    if name == DEMO:
        return demo_folder("drafter")
    drafter = drafter_of(name)
    if drafter is None:
        return None
    if drafter.startswith((".", "/", "~")):
        return _locate(drafter, offline=True)
    hub = hub_name(drafter)
    found = cached(*hub) if hub else None
    return found if found and not missing_files(found) else None


def _from_hub(repo: str, revision: str | None, offline: bool, code: bool) -> Path:
    found = cached(repo, revision)
    if found and not missing_files(found, code):
        return found
    if not offline:
        wanted = look_up(repo, revision, code)
        wanted.refuse_full_disk(cache_folder())
        log.warning("downloading %s", wanted.described(cache_folder()))
        return download(repo, revision, code)
    lacking = missing_files(found, code) if found else []
    more = f" (and {len(lacking) - 1} more)" if len(lacking) > 1 else ""
    raise OfflineMissing(
        f"{repo} is not in the local cache ({cache_folder()}), and nothing is downloaded now.",
        f"Missing: {lacking[0]}{more}." if lacking else None,
        f"specexec pull {repo}{f'@{revision}' if revision else ''}, or the same command without --offline.",
    )
