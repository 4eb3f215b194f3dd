"""From what a person types to folders on this machine: the built-in pair, a path, an alias, a Hub name.

Knows no torch and no transformers; the Hub library is imported only when a Hub name is asked for.
"""

import difflib
import errno
import json
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from offload.errors import DiskFull, GatedRepo, ModelNotFound, OfflineMissing
from offload.shards import INDEX, SINGLE

HERE = Path(__file__).parent
DEMO = "demo"
HUB_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
# Weights as safetensors, configs and tokenizers of the top folder; never pickle, never code.
WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]
UNWANTED = ["*/*", "consolidated*"]


@dataclass(frozen=True)
class Alias:
    """A short name: the Hub names of a model and of the sibling that drafts for it."""

    target: str
    drafter: str | None = None


@dataclass(frozen=True)
class ModelPair:
    """A model's folder, its drafter's folder if there is one, and the name it was asked by."""

    name: str
    target: Path
    drafter: Path | None
    toy: bool = False


def aliases() -> dict[str, Alias]:
    """Every short name that comes with the package."""
    table = tomllib.loads((HERE / "aliases.toml").read_text(encoding="utf-8"))
    return {name: Alias(row["target"], row.get("drafter")) for name, row in table.items()}


def resolve(name: str, drafter: str = "auto", *, offline: bool = False) -> ModelPair:
    """The folders behind a name; downloads what is missing unless `offline`.

    `drafter` is "none", "auto" (the paired sibling if it is here already, never a download), or a name of its own.
    """
    target = _locate(name, offline)
    if drafter == "none":
        small = None
    elif drafter == "auto":
        small = _sibling(name)
    else:
        small = demo_folder("drafter") if drafter == DEMO else _locate(drafter, offline)
    return ModelPair(name, target, small, toy=name == DEMO)


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


def _locate(name: str, offline: bool) -> Path:
    if name == DEMO:
        return demo_folder("target")
    path = Path(name).expanduser()
    if path.exists() or name.startswith((".", "/", "~")):
        if not path.exists():
            raise ModelNotFound(f"there is no folder {name}.", hint="check the path.")
        return path
    known = aliases().get(name)
    hub = HUB_NAME.fullmatch(known.target if known else name)
    if hub is None:
        near = difflib.get_close_matches(name, [DEMO, *aliases()], n=3, cutoff=0.5)
        raise ModelNotFound(
            f"no model named '{name}'.",
            "Not an alias and not a folder; models of the Hub have names like org/name.",
            " or ".join(near or [DEMO, *list(aliases())[:2]]) + "  (see: specexec models)",
        )
    return _from_hub(hub["repo"], hub["revision"], offline)


def _sibling(name: str) -> Path | None:
    """The drafter paired with a model, if all of it is on this machine."""
    if name == DEMO:
        return demo_folder("drafter")
    for alias, pair in aliases().items():
        if name in (alias, pair.target) and pair.drafter:
            found = _cached(pair.drafter, None)
            return found if found and not missing_files(found) else None
    return None


def _cached(repo: str, revision: str | None) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                repo, revision=revision, local_files_only=True, allow_patterns=WANTED, ignore_patterns=UNWANTED
            )
        )
    except LocalEntryNotFoundError as error:
        # A snapshot that stopped in the middle is named by the error; nothing at all is not.
        partial = getattr(error, "snapshot_path", None)
        return Path(partial) if partial else None


def _from_hub(repo: str, revision: str | None, offline: bool) -> Path:
    found = _cached(repo, revision)
    if found and not missing_files(found):
        return found
    if not offline:
        return _download(repo, revision)
    from huggingface_hub.constants import HF_HUB_CACHE

    lacking = missing_files(found) if found else []
    more = f" (and {len(lacking) - 1} more)" if len(lacking) > 1 else ""
    raise OfflineMissing(
        f"{repo} is not in the local cache ({HF_HUB_CACHE}) and --offline is set.",
        f"Missing: {lacking[0]}{more}." if lacking else None,
        "the same command without --offline.",
    )


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    except GatedRepoError as error:  # before its parent RepositoryNotFoundError
        raise GatedRepo(
            f"{repo} is gated and your account has no access yet.",
            f"Accept the licence at https://huggingface.co/{repo}, then log in: hf auth login (or set HF_TOKEN).",
            "the command again afterwards.",
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelNotFound(
            f"no model named '{repo}'.",
            f"Not a folder, and huggingface.co has no repository '{repo}' (or it is private).",
        ) from error
    except RevisionNotFoundError as error:
        raise ModelNotFound(f"{repo} has no revision '{revision}'.") from error
    except OSError as error:  # every network failure of the Hub library is one
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(
                f"no space left while downloading {repo}.",
                "What has arrived is kept.",
                "the same command after freeing space (it continues), or HF_HOME on another disk.",
            ) from error
        raise _unreachable(repo, error) from error


def _unreachable(repo: str, error: Exception) -> OfflineMissing:
    first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
    return OfflineMissing(
        f"{repo} is not in the local cache and could not be downloaded.",
        first,
        "again with a network connection, or --model demo, which needs none.",
    )


def missing_files(path: Path) -> list[str]:
    """What a model folder lacks of config and weights; empty when it is complete."""
    wanted = ["config.json"]
    if (path / INDEX).is_file():
        try:
            wanted += sorted({str(file) for file in json.loads((path / INDEX).read_text())["weight_map"].values()})
        except (ValueError, KeyError, AttributeError):
            wanted.append(INDEX)  # unreadable: as good as missing, a download repairs it
            return [file for file in wanted if file == INDEX or not (path / file).is_file()]
    else:
        wanted.append(SINGLE)
    return [file for file in wanted if not (path / file).is_file()]
