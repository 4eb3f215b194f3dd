"""Who guesses: picked among what fits, checked, loaded and made."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

import offload as weights
from specexec.compose.context import encoding_in
from specexec.compose.memory_plan import Asked, beside_B, beside_ram_B
from specexec.drafters.auto import Auto, candidates, fastest
from specexec.drafters.cascade import Cascade
from specexec.drafters.cost import CostModel
from specexec.drafters.few_bits import Form, quantised
from specexec.drafters.ngram import NgramDrafter
from specexec.drafters.none import NoDrafter
from specexec.drafters.protocol import Drafter
from specexec.drafters.ranking import Ranking
from specexec.drafters.registry import Choice
from specexec.drafters.retrieval.memory import Memory
from specexec.drafters.sibling import SiblingDrafter
from specexec.drafters.skip import QUESTIONS, SHARE, Searches, Terms, best_sublayers, skipping
from specexec.drafters.substitute import substituting
from specexec.drafters.translated import TranslatedDrafter
from specexec.drafters.trimmed_head import TrimmedHead
from specexec.drafters.union import Union
from specexec.errors import BadDrafter
from specexec.model import attention
from specexec.model.chain_lm import ChainLM
from specexec.model.sublayers import names_of, sizes_of
from specexec.model.submodel import rebuilt
from specexec.model.tree_lm import TreeLM
from specexec.text.token_bytes import Wording, wording_of
from specexec.text.tokenizer import Encoding
from specexec.text.vocabularies import Nameable, differing_ids, nameable

log = logging.getLogger(__name__)

Told = Callable[[int, int], None]  # how many are done, and of how many


def picked(
    choice: Choice,
    pair: weights.ModelPair,
    config: PretrainedConfig,
    free: weights.Free,
    asked: Asked,
    measured: Mapping[str, float],
) -> tuple[Choice, str]:
    """What was asked for, as asked; or of what fits the drafter that `auto` takes, and why."""
    if not choice.auto:
        return choice, ""
    folder = weights.open_folder(pair.target)
    item_B = asked.item_B(folder)

    def slowest(choice: Choice) -> str | None:
        plain = weights.need_of(folder, item_B, asked.context, beside_B(choice, pair, asked))
        need = replace(
            weights.with_head(folder, plain, asked.head_quant, item_B),
            guesses_B=asked.guesses_B(choice, pair),
            cache_moves=asked.branches,
            beside_ram_B=beside_ram_B(choice, pair, asked),
        )
        try:
            return weights.place(need, free, asked.offload).offload
        except weights.OffloadError:
            return None

    experts = any(getattr(config, name, None) for name in weights.EXPERTS)
    # A CPU takes longer over a 4-bit copy than over the weights themselves: there it must have been measured first.
    copies = not experts and (asked.device != "cpu" or "substitute+ngram" in measured)
    if copies:  # and what streams in few bits already gains nothing by one
        streamed_B = sum(weights.need_of(folder, item_B, asked.context).read_B)
        copies = 4 * weights.copy_B(folder, asked.copy, item_B)[0] <= 3 * streamed_B
    paired = bool(pair.drafters)
    return fastest(candidates(paired, slowest, copies), paired, measured)


def check_quantising(choice: Choice, pair: weights.ModelPair, form: weights.FewBits) -> None:
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
    if all(weights.is_quantised(weights.open_folder(path)) for path in pair.drafters):
        are = "are" if len(pair.drafters) > 1 else "is"
        raise BadDrafter(
            f"{' and '.join(map(str, pair.drafters))} {are} quantised already; --drafter-quant has nothing to do.",
            hint="Leave it out.",
        )


def check_trimming(choice: Choice, vocabularies: Items[DraftVocabulary], left: int, vocabulary: int) -> None:
    if not choice.models:
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


@dataclass(frozen=True)
class DraftVocabulary:
    """What a drafter's ids mean: the same as the target's, but for `differing`, or what its own tokenizer says."""

    differing: frozenset[int] = frozenset()
    wordings: tuple[Wording, Wording] | None = None  # the target's and the drafter's own


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


def in_few_bits(
    model: PreTrainedModel, shared_L: Items[bool], device: torch.device, form: Form, rounded: Told
) -> dict[int, nn.Module]:
    """The layers of a model to draft with: those that are not shared quantised, one at a time."""
    made: dict[int, nn.Module] = {}
    for i, shared in enumerate(shared_L):
        one = weights.standing_layer(model, i)  # dense until it has been quantised
        made[i] = one if shared else quantised(one, device, form)
        rounded(i + 1, len(shared_L))
    return made


def draft_model(folder: Path, asked: Asked, trust_remote_code: bool, rounded: Told) -> PreTrainedModel:
    """A model that drafts, whole where the target computes; for few bits a layer at a time comes through RAM."""
    form = asked.bits(weights.open_folder(folder))
    opened = partial(weights.load, folder, dtype=asked.dtype, ctx=asked.context, trust_remote_code=trust_remote_code)
    if form == "none":
        return opened("none", asked.device)
    model = opened("disk", "cpu")
    stream, device = weights.stream_of(model), torch.device(asked.device)
    model.set_attn_implementation(attention.NAME)  # layers taken out go on as the whole did
    layers = in_few_bits(model, [False] * stream.layers, device, form, rounded)
    stream.close()
    few_bits = rebuilt(model, layers)
    nn.Module.to(few_bits, device)
    return few_bits


def questions(encoding: Encoding) -> list[list[int]]:
    """What a model is asked so that it writes something typical of it: through its chat template if it has one."""
    chat = encoding.template is not None
    return [encoding.encode([{"role": "user", "content": one}] if chat else one) for one in QUESTIONS]


@dataclass(frozen=True)
class Draft:
    """A model that drafts: what the engine and what people call it, and what its ids mean."""

    role: str
    name: str
    folder: Path
    lm: TreeLM
    vocabulary: DraftVocabulary


def drafts_of(
    choice: Choice,
    pair: weights.ModelPair,
    vocabularies: Items[DraftVocabulary],
    asked: Asked,
    trust_remote_code: bool,
    rounded: Told,
) -> dict[str, Draft]:
    """The models that draft, loaded, by their names in `choice`."""
    called = [weights.called(path) for path in pair.drafters]
    found: dict[str, Draft] = {}
    for model, path, name, vocabulary in zip(choice.models, pair.drafters, called, vocabularies, strict=False):
        role = f"drafter-{len(found) + 1}" if found else "drafter"
        lm = TreeLM(draft_model(path, asked, trust_remote_code, rounded), share=weights.share, lenient=True)
        found[model] = Draft(role, name if called.count(name) == 1 else str(path), path, lm, vocabulary)
    return found


@dataclass(frozen=True)
class Kit:
    """Everything that some drafter is made from."""

    model: PreTrainedModel
    target: TreeLM | ChainLM
    encoding: Encoding
    ranking: Ranking
    drafts: Mapping[str, Draft]
    pair: weights.ModelPair
    memory: Memory | None
    draft_vocab: int | None
    searches: Searches
    rounded: Told
    copy: Form
    context: int
    stop_tokens: frozenset[int]

    @property
    def makers(self) -> dict[str, Callable[[], Drafter]]:
        return {
            **{model: partial(self._sibling, draft) for model, draft in self.drafts.items()},
            "substitute": self._substitute,
            "skip": self._skip,
            "ngram": lambda: NgramDrafter(self.memory, self._own.rows),
        }

    @property
    def _own(self) -> Nameable:
        """What the target itself may name as a drafter."""
        return nameable(self.encoding.tokenizer, [self.target.vocabulary])

    @property
    def _cascade(self) -> Cascade:
        return Cascade(self.memory)

    def _sibling(self, draft: Draft) -> Drafter:
        if draft.vocabulary.wordings is not None:
            return TranslatedDrafter(draft.lm, *draft.vocabulary.wordings, draft.name)
        trimmed = None
        ids = nameable(
            self.encoding.tokenizer, [self.target.vocabulary, draft.lm.vocabulary], draft.vocabulary.differing
        )
        if self.draft_vocab:
            trimmed = TrimmedHead(draft.lm, ids.rows, self.draft_vocab, self.stop_tokens, self.memory, ids.never)
        return SiblingDrafter(draft.lm, ids.rows, self.ranking, draft.name, trimmed, self._cascade, ids.never)

    def _skip(self) -> SiblingDrafter:
        assert isinstance(self.target, TreeLM)
        layers = [weights.skeleton_layer(self.model, i) for i in range(weights.stream_of(self.model).layers)]
        size_LS = sizes_of(layers)
        stands_L = np.array([weights.stands(self.model, i) for i in range(len(layers))])
        files_B = sum(weights.open_folder(self.pair.target).file_sizes.values())
        terms = Terms(
            copy_LS=np.where(stands_L[:, None], 0, size_LS),
            size_LS=size_LS,
            head_B=sum(weight.nbytes for weight in self.model.get_output_embeddings().parameters()),
            most_B=int(SHARE * files_B),
            whole=any(names_of(layer) is None for layer in layers),
            rows=self.context,
        )
        name = f"{self.model.config.to_json_string()} {files_B}"
        kept_LS = best_sublayers(self.target, terms, questions(self.encoding), self.searches, name)
        layer_of = partial(weights.standing_layer, self.model)
        ids = self._own
        return skipping(self.target, layer_of, kept_LS, ids.rows, self.ranking, self._cascade, ids.never)

    def _substitute(self) -> SiblingDrafter:
        assert isinstance(self.target, TreeLM)
        stands_L = [weights.stands(self.model, i) for i in range(weights.stream_of(self.model).layers)]
        shared_L = stands_L if not all(stands_L) else [False] * len(stands_L)  # nothing streams: copies read less
        made = in_few_bits(self.model, shared_L, self.target.device, self.copy, self.rounded)
        name = "substitute" if self.copy == "nf4" else f"substitute-{self.copy}"
        ids = self._own
        return substituting(self.target, made, ids.rows, self.ranking, self._cascade, name, ids.never)


def join(choice: Choice, makers: Mapping[str, Callable[[], Drafter]], cost: CostModel) -> Drafter:
    """The drafter that was chosen; each source is made by its maker, several share the tree by what they cost."""
    members = [makers[source]() for source in choice.sources]
    if not members:
        return NoDrafter()
    return members[0] if len(members) == 1 else Union(members, cost)


def watched(choice: Choice, drafter: Drafter, cost: CostModel) -> Drafter:
    """Under `auto` a model in a union may rest where it is not worth its time."""
    return Auto(drafter, cost) if choice.auto and isinstance(drafter, Union) else drafter
