"""A model's config and headers without its weights: from its folder, or from the Hub before any download. No torch."""

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from offload.checkpoint.contents import ADAPTER, MODELOPT, find_weights, instead
from offload.checkpoint.documents import CONFIG
from offload.checkpoint.entry import Entry
from offload.checkpoint.headers import Folder, checked, no_tensors, open_folder, weight_map_in, with_modelopt
from offload.checkpoint.headers import item_B as bytes_of
from offload.errors import ModelNotFound, OfflineMissing
from offload.hub.hub import PATIENCE_s, explained, remote_header, remote_json
from offload.hub.names import DEMO, HUB_NAME, PAIRED, aliases, demo_folder, drafter_of, resolve

FLOAT_B = {"float32": 4, "float16": 2, "bfloat16": 2}
AT_ONCE = 8  # headers on their way
NAMES = {4: "f32", 2: "bf16"}


def list_model(name: str, *, offline: bool = False) -> Folder:
    """The headers of a model that `resolve` would find; for one that is not here, what the Hub says of it."""
    try:
        return open_folder(resolve(name, offline=True).target)
    except OfflineMissing:
        if offline:
            raise
    known = aliases().get(name)
    hub = HUB_NAME.fullmatch(known.target if known else name)
    assert hub is not None, "only names of the Hub can be missing for being offline"
    return list_hub(hub["repo"], hub["revision"])


def list_drafters(name: str, drafters: tuple[str, ...], *, offline: bool = False) -> list[Folder]:
    """The headers of those who draft for a model, as `resolve` takes them; a paired one not to be seen is left out."""
    named = [_list_paired(name, offline) if one == PAIRED else _list_named(one, offline) for one in drafters]
    return [folder for folder in named if folder]


def _list_named(name: str, offline: bool) -> Folder:
    return open_folder(demo_folder("drafter")) if name == DEMO else list_model(name, offline=offline)


def _list_paired(name: str, offline: bool) -> Folder | None:
    drafter = drafter_of(name)
    if name != DEMO and drafter is None:
        return None
    try:
        here = resolve(name, (PAIRED,), offline=True).drafters if name == DEMO or offline else ()
        if here:
            return open_folder(here[0])
        return None if drafter is None else list_model(drafter, offline=offline)
    except (OfflineMissing, ModelNotFound):
        return None  # a model without a drafter can still be planned


def item_B(folder: Folder) -> int:
    """Bytes of a number the model computes with, as its config says."""
    wanted = folder.config.get("dtype", folder.config.get("torch_dtype"))
    if isinstance(wanted, str) and wanted in FLOAT_B:
        return FLOAT_B[wanted]
    return 4 if {entry.dtype for entry in folder.entries.values()} == {"F32"} else 2


def list_hub(repo: str, revision: str | None) -> Folder:
    """What the Hub says of a repository, whatever is here; nothing of it stays here."""
    from huggingface_hub import HfApi

    with explained(repo, revision):
        listed = HfApi().model_info(repo, revision=revision, timeout=PATIENCE_s)  # says at once why the rest would fail
    names = [sibling.rfilename for sibling in listed.siblings or () if "/" not in sibling.rfilename]
    weights = find_weights(names)
    if weights is None or CONFIG not in names:
        documents = {ADAPTER: remote_json(repo, revision, ADAPTER)} if ADAPTER in names else {}
        raise instead(repo, names, documents)
    config = remote_json(repo, revision, CONFIG)
    if MODELOPT in names:
        config = with_modelopt(config, remote_json(repo, revision, MODELOPT))
    index = weights.index
    placed = weight_map_in(remote_json(repo, revision, index), f"{index} of {repo}") if index else None
    files = sorted({*placed.values()}) if placed else weights.files
    with ThreadPoolExecutor(AT_ONCE) as pool:
        headers = pool.map(lambda file: remote_header(repo, revision, file), files)
        entries = {
            name: Entry(name, Path(file), 0, math.prod(shape) * bytes_of(dtype, name), dtype, shape)
            for file, header in zip(files, headers, strict=True)
            for name, (dtype, shape) in header.items()
            if placed is None or placed.get(name) == file
        }
    if not entries:
        raise no_tensors(f"{files[0]} of {repo}")
    notes = (weights.note,) if weights.note else ()
    return checked(Folder(Path(repo), config, entries, {Path(file): 0 for file in files}, notes, here=False))
