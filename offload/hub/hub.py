"""The Hub and its local cache: what is here, what a download would bring, and its failures as messages.

Everything lands in the standard cache that all Hugging Face tools share. The Hub library is imported when asked for.
"""

import errno
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from offload.checkpoint.contents import GGUF_NOTE, INDEX, NUMBERED, SINGLE, find_pickled, find_weights
from offload.checkpoint.documents import OBJECTS, Json, json_object, read_json
from offload.checkpoint.headers import read_header, read_index
from offload.checkpoint.remote_code import code_files
from offload.errors import BadModelDir, CorruptShard, DiskFull, GatedRepo, ModelNotFound, OfflineMissing
from offload.units import size

# Weights as safetensors, configs and tokenizers of the top folder; never pickle, and code only where it is trusted.
WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]
CODE = ["*.py"]
UNWANTED = ["*/*", "consolidated*"]
VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")
PATIENCE_s = 10
MOST_JSON_B = 1 << 28


@dataclass(frozen=True)
class Download:
    """What one repository still has to send, decided without fetching a weight."""

    repo: str
    commit: str
    sizes_B: Mapping[str, int]
    missing: frozenset[str]

    @property
    def missing_B(self) -> int:
        """Bytes still to come."""
        return sum(self.sizes_B[name] for name in self.missing)

    def described(self, where: Path) -> str:
        """What is still to come, and the space that there is for it."""
        free_B = shutil.disk_usage(_existing(where)).free
        return f"{len(self.missing)} files of {self.repo}, {size(self.missing_B)}; {size(free_B)} are free"

    def refuse_full_disk(self, where: Path) -> None:
        """Better now than after 100 GB."""
        free_B = shutil.disk_usage(_existing(where)).free
        if self.missing_B > free_B:
            raise DiskFull(
                f"{self.repo} needs {size(self.missing_B)} more on the disk of {where}, {size(free_B)} are free.",
                hint="HF_HOME on another disk, or specexec models rm to make room.",
            )


def cache_folder() -> Path:
    """Where the Hub library keeps what it downloads."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def cached(repo: str, revision: str | None) -> Path | None:
    """The snapshot on this machine, complete or not."""
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


def cached_repos() -> list[str]:
    """The models in the cache by name, complete or not."""
    folders = sorted(cache_folder().glob("models--*--*")) if cache_folder().is_dir() else []
    return [folder.name.removeprefix("models--").replace("--", "/", 1) for folder in folders]


def models_of_heads() -> dict[str, str]:
    """Heads in the cache, by name: the model that each was made for, as the config.json of `speculators` names it."""
    found = dict[str, str]()
    for repo in cached_repos():
        folder = cache_folder() / f"models--{repo.replace('/', '--', 1)}" / "snapshots"
        for file in sorted(folder.glob("*/config.json")):
            try:
                given = read_json(file).get("speculators_config")
            except BadModelDir:
                continue  # damaged: no head that could be used
            verifier = given.get("verifier") if isinstance(given, dict) else None
            model = verifier.get("name_or_path") if isinstance(verifier, dict) else None
            if isinstance(model, str):
                found[repo] = model
    return found


def look_up(repo: str, revision: str | None, code: bool = False) -> Download:
    """Ask the Hub what a download would bring."""
    from huggingface_hub import HfApi, snapshot_download

    with explained(repo, revision):
        HfApi().model_info(repo, revision=revision)  # a dry run alone hides why it cannot be done
        files = snapshot_download(
            repo, revision=revision, allow_patterns=_wanted(code), ignore_patterns=UNWANTED, dry_run=True,
            tqdm_class=_bars(hidden=True),
        )  # fmt: skip
    sizes_B = {file.filename: file.file_size or 0 for file in files}
    missing = frozenset(file.filename for file in files if file.will_download)
    return Download(repo, files[0].commit_hash if files else "", sizes_B, missing)


def fetch(repo: str, commit: str, name: str, folder: Path) -> Path:
    """One file, into a folder of its own instead of the cache."""
    from huggingface_hub import hf_hub_download

    with explained(repo, commit):
        return Path(hf_hub_download(repo, name, revision=commit, local_dir=folder))


def remote_json(repo: str, revision: str | None, name: str) -> dict[str, Json]:
    """A JSON file of a repository; nothing of it stays here."""
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.utils._headers import build_hf_headers
    from huggingface_hub.utils._http import get_session, hf_raise_for_status

    with explained(repo, revision):
        url = hf_hub_url(repo, name, revision=revision, endpoint=HfApi().endpoint)
        headers = {**build_hf_headers(), "range": f"bytes=0-{MOST_JSON_B}"}
        answer = get_session().get(url, headers=headers, timeout=PATIENCE_s, follow_redirects=True)
        hf_raise_for_status(answer)
    return json_object(answer.content, f"{name} of {repo}")


def remote_header(repo: str, revision: str | None, name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of every tensor of a safetensors file that has not been downloaded."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import SafetensorsParsingError

    try:
        with explained(repo, revision):
            found = HfApi().parse_safetensors_file_metadata(repo, name, revision=revision)
    except SafetensorsParsingError as error:
        raise CorruptShard(f"{name} of {repo} is damaged on the Hub: {error}") from error
    return {tensor: (str(entry.dtype), tuple(entry.shape)) for tensor, entry in found.tensors.items()}


def download(repo: str, revision: str | None, code: bool = False) -> Path:
    """Fetch whatever is missing into the cache; Python files only for those who trust them."""
    from huggingface_hub import snapshot_download

    with explained(repo, revision):
        return Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=_wanted(code), ignore_patterns=UNWANTED,
                tqdm_class=_bars(hidden=None),
            )
        )  # fmt: skip


def _bars(hidden: bool | None) -> Any:
    """The Hub library's progress bars, `hidden` or, if that is None, on terminals only."""
    from huggingface_hub.utils.tqdm import tqdm

    class Bars(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "disable": hidden})

    return Bars


@contextmanager
def explained(repo: str, revision: str | None) -> Iterator[None]:
    """The Hub library's troubles as errors a person can act on."""
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # Whichever of the two its HTTP client makes of a network that is down.
    network_errors: tuple[type[Exception], ...] = (OSError, *client_errors())
    try:
        yield
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
    except network_errors as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(
                f"no space left while downloading {repo}.",
                "What has arrived is kept.",
                "the same command after freeing space (it continues), or HF_HOME on another disk.",
            ) from error
        raise _unreachable(repo, error) from error


def client_errors() -> tuple[type[Exception], ...]:
    """What the Hub library's HTTP client raises when no server answers; which client depends on its version."""
    return tuple(import_module(name).HTTPError for name in ("httpx", "httpx2") if find_spec(name))


def missing_files(path: Path, code: bool = False) -> list[str]:
    """What a model folder lacks of config, weights and, where it is trusted, code; empty when it is complete."""
    wanted = ["config.json"]
    if code and (path / "config.json").is_file():
        wanted += code_files(path)
    names = [file.name for file in path.iterdir() if file.is_file()] if path.is_dir() else []
    if GGUF_NOTE in names:
        return []
    weights = find_weights(names) or find_pickled(names)
    if weights is None:
        numbered = any(NUMBERED.fullmatch(name) for name in names)
        wanted.append(INDEX if numbered else SINGLE)
    elif weights.index is None:
        wanted += weights.files
    else:
        try:
            wanted += sorted({*read_index(path / weights.index).values()})
        except BadModelDir:
            wanted.append(weights.index)  # unreadable: as good as missing, a download repairs it
            names.remove(weights.index)
    return [file for file in wanted if file not in names]


def has_tokenizer(path: Path) -> bool:
    """Whether a folder holds a vocabulary; one whose download stopped early may not."""
    return any(list(path.glob(pattern)) for pattern in VOCABULARIES)


def drop_damaged(path: Path) -> list[str]:
    """Delete, blob and all, the files of a snapshot that cannot be what was published; their names."""
    dropped = []
    for file in sorted(path.iterdir()):
        try:
            if file.suffix == ".safetensors":
                read_header(file)
            elif file.name in OBJECTS:
                read_json(file)
        except (BadModelDir, CorruptShard):
            file.resolve().unlink(missing_ok=True)
            file.unlink(missing_ok=True)
            dropped.append(file.name)
    return dropped


def _wanted(code: bool) -> list[str]:
    return WANTED + (CODE if code else [])


def _unreachable(repo: str, error: Exception) -> OfflineMissing:
    first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
    return OfflineMissing(
        f"{repo} is not in the local cache and could not be downloaded.",
        first,
        "again with a network connection, or --model demo, which needs none.",
    )


def _existing(path: Path) -> Path:
    """The nearest folder above that is there already."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())
