"""From names to a drafter: what was chosen is checked, its models are loaded, and the registry's makers are called."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name

import torch
from torch import nn
from transformers import PreTrainedModel

import offload as weights
from specexec.compose.context import encoding_in
from specexec.compose.drafter_makers import in_few_bits
from specexec.compose.dtypes import DTYPES
from specexec.compose.head_folders import head_kind
from specexec.compose.memory_plan import LoadRequest
from specexec.compose.progress import LoadProgress
from specexec.drafters.auto import Auto
from specexec.drafters.cost import CostModel
from specexec.drafters.kit import Draft, DrafterKit, DraftVocabulary
from specexec.drafters.none import NoDrafter
from specexec.drafters.protocol import Drafter
from specexec.drafters.registry import HEADS, DrafterChoice, source_of
from specexec.drafters.union import Union
from specexec.errors import BadDrafter
from specexec.model import attention
from specexec.model.quick_layers import quicken
from specexec.model.submodel import rebuilt
from specexec.model.tree_lm import TreeLM
from specexec.text.token_bytes import wording_of
from specexec.text.tokenizer import Encoding
from specexec.text.vocabularies import differing_ids

log = logging.getLogger(__name__)


def check_quantising(choice: DrafterChoice, folders: Items[weights.Folder], form: weights.FewBits) -> None:
    """Raises BadDrafter where --drafter-quant has nothing to quantise, or needs a package that is missing."""
    if form == "none":
        return
    if form.startswith("hqq") and find_spec("hqq") is None:
        raise BadDrafter(
            f"--drafter-quant {form} needs hqq, which is not installed.",
            hint=f"{Path(sys.executable).name} -m pip install 'specexec[hqq]', or --drafter-quant nf4.",
        )
    if "substitute" in choice.sources:
        return
    if not choice.models:
        raise BadDrafter(
            "--drafter-quant quantises a drafter model, and none drafts here.",
            hint=f"Leave it out, or --drafter with a model or substitute. Now: {choice.name}.",
        )
    if all(map(head_kind, folders)):
        raise BadDrafter(
            "--drafter-quant quantises a drafter model, and only heads draft here.",
            hint=f"Leave it out. Now: {choice.name}.",
        )
    if all(map(weights.is_quantised, folders)):
        are = "are" if len(folders) > 1 else "is"
        paths = " and ".join(str(folder.called) for folder in folders)
        raise BadDrafter(
            f"{paths} {are} quantised already; --drafter-quant has nothing to do.",
            hint="Leave it out.",
        )


def check_adapting(choice: DrafterChoice, folders: Items[weights.Folder], adapters: Items[str]) -> None:
    """Raises BadDrafter where --drafter-lora has no drafter model to change."""
    if adapters and (not choice.models or all(map(head_kind, folders))):
        raise BadDrafter(
            "--drafter-lora changes a drafter model, and none drafts here.",
            hint=f"Leave it out, or --drafter with a model. Now: {choice.name}.",
        )


def adapted(folder: weights.Folder, adapters: Iterable[str]) -> weights.Folder:
    """A drafter's folder with the changes of adapters; heads have none."""
    return folder if head_kind(folder) else weights.with_adapters(folder, adapters)


def check_trimming(
    choice: DrafterChoice, vocabularies: Items[DraftVocabulary], left: int | None, vocabulary: int
) -> None:
    """Raises BadDrafter where --draft-vocab has no head to trim, or nothing to leave out.

    `vocabularies` are those of drafter models; heads have none.
    """
    if left is None:
        return
    if not choice.models or not vocabularies:
        raise BadDrafter(
            "--draft-vocab trims the head of a drafter model, and none drafts here.",
            hint=f"Leave it out, or --drafter with a model. Now: {choice.name}.",
        )
    if all(one.wordings is not None for one in vocabularies):
        raise BadDrafter(
            "--draft-vocab cannot trim a drafter with another vocabulary: its guesses are carried over as text.",
            hint="Leave it out.",
        )
    if left >= vocabulary:
        raise BadDrafter(
            f"--draft-vocab {left} leaves nothing out: there are {vocabulary} tokens.",
            hint=f"Leave it out, or a quarter of them: --draft-vocab {vocabulary // 4}.",
        )


def check_window(choice: DrafterChoice, window: int | None) -> None:
    """Raises BadDrafter where --draft-window has no keys and values to bound."""
    if window is not None and not (choice.models or choice.heads or choice.copies):
        raise BadDrafter(
            "--draft-window bounds what a drafter model or a head sees of the text, and none drafts here.",
            hint=f"Leave it out, or --drafter with a model, a head or substitute. Now: {choice.name}.",
        )


def check_device(choice: DrafterChoice, folders: Items[weights.Folder], device: str) -> None:
    """Raises BadDrafter where --drafter-device has no drafter model to move."""
    if device != "auto" and (not choice.models or all(map(head_kind, folders))):
        raise BadDrafter(
            "--drafter-device says where a drafter model computes, and none drafts here.",
            "Heads, and layers of the model itself, compute where the model does.",
            f"Leave it out, or --drafter with a model. Now: {choice.name}.",
        )


def vocabulary_of(drafter: Path, ours: Encoding, trust_remote_code: bool) -> DraftVocabulary:
    """Raises TokenizerMismatch for a drafter whose text cannot be carried over."""
    theirs = encoding_in(drafter, trust_remote_code)
    differing = differing_ids(ours.tokenizer, theirs.tokenizer)
    if differing is not None:
        return DraftVocabulary(differing)
    other = f"drafter {drafter} does not share the model's vocabulary, and"
    wordings = (
        wording_of(ours.tokenizer, f"{other} the model's tokenizer"),
        wording_of(theirs.tokenizer, f"{other} its tokenizer"),
    )
    log.warning(
        "drafter %s has another vocabulary: its guesses are carried over as text, and fewer will be accepted.", drafter
    )
    return DraftVocabulary(wordings=wordings)


@dataclass(frozen=True)
class FolderHead:
    """A head in a folder of its own: its config.json, what people call it, and its tensors once they are needed."""

    folder: weights.Folder
    name: str

    @property
    def maker(self) -> str:
        """What makes a drafter of it."""
        return HEADS[str(head_kind(self.folder))]

    @property
    def settings(self) -> Mapping[str, object]:
        """Its config.json."""
        return self.folder.config

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of them, as they are stored."""
        return weights.read_tensors(self.folder)


def heads_of(choice: DrafterChoice, request: LoadRequest) -> dict[str, FolderHead]:
    """The heads among the models of a choice, by their names there."""
    named = zip(choice.models, request.drafters, strict=False)
    return {name: FolderHead(one, weights.called(one.path)) for name, one in named if head_kind(one)}


def drafts_of(
    choice: DrafterChoice,
    pair: weights.ModelPair,
    vocabularies: Mapping[Path, DraftVocabulary],
    request: LoadRequest,
    device: str,
    progress: LoadProgress,
) -> dict[str, Draft]:
    """The models that draft, loaded, by their names in `choice`."""
    called = [weights.called(path) for path in pair.drafters]
    found: dict[str, Draft] = {}
    for model, path, name in zip(choice.models, pair.drafters, called, strict=False):
        if path not in vocabularies:  # a head
            continue
        role = f"drafter-{len(found) + 1}" if found else "drafter"
        drafting = draft_model(path, request, device, progress)
        quicken(drafting)
        lm = TreeLM(drafting, share=weights.share, drafts=True)
        found[model] = Draft(role, name if called.count(name) == 1 else str(path), path, lm, vocabularies[path])
    return found


def draft_model(folder: Path, request: LoadRequest, device: str, progress: LoadProgress) -> PreTrainedModel:
    """A model that drafts, whole where the target computes; for few bits a layer at a time comes through RAM."""
    form, options = request.bits(weights.open_folder(folder)), request.options
    opened = partial(
        weights.load,
        folder,
        dtype=DTYPES[options.dtype],
        ctx=request.context,
        adapters=options.drafter_lora,
        trust_remote_code=options.trust_remote_code,
    )
    if form == "none":
        return opened("none", device, reorder=True)
    model = opened("disk", "cpu")
    stream, place = weights.stream_of(model), torch.device(device)
    model.set_attn_implementation(attention.NAME)  # layers taken out go on as the whole did
    layers = in_few_bits(model, [False] * stream.layers, place, form, progress.quantised)
    stream.close()
    few_bits = rebuilt(model, layers)
    nn.Module.to(few_bits, place)
    return few_bits


def makers(
    choice: DrafterChoice, kit: DrafterKit, drafts: Mapping[str, Draft], heads: Mapping[str, FolderHead]
) -> dict[str, Callable[[], Drafter]]:
    """How each source of the choice is made."""
    return {
        name: partial(_maker(name, heads.get(name)), replace(kit, draft=drafts.get(name), head=heads.get(name)))
        for name in choice.sources
    }


def _maker(name: str, head: FolderHead | None) -> Callable[[DrafterKit], Drafter]:
    make: Callable[[DrafterKit], Drafter] = resolve_name(head.maker if head else source_of(name).maker)
    return make


def drafter_of(
    choice: DrafterChoice, makers: Mapping[str, Callable[[], Drafter]], cost: CostModel
) -> tuple[DrafterChoice, Drafter]:
    """The drafter of a choice; under `auto` one without models where a head turns out to be of no use."""
    try:
        return choice, watched(choice, join(choice, makers, cost), cost)
    except BadDrafter as refusal:
        if not choice.auto:
            raise
        log.warning("%s", refusal.what)
        bare = choice.instead(*(name for name in choice.sources if name not in choice.models))
        return bare, watched(bare, join(bare, makers, cost), cost)


def join(choice: DrafterChoice, makers: Mapping[str, Callable[[], Drafter]], cost: CostModel) -> Drafter:
    """The drafter that was chosen; each source is made by its maker, several share the tree by what they cost."""
    members = [makers[source]() for source in choice.sources]
    if not members:
        return NoDrafter()
    return members[0] if len(members) == 1 else Union(members, cost)


def watched(choice: DrafterChoice, drafter: Drafter, cost: CostModel) -> Drafter:
    """Under `auto` a model in a union may rest where it is not worth its time."""
    return Auto(drafter, cost) if choice.auto and isinstance(drafter, Union) else drafter
