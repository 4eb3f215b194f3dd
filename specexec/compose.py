"""The composition root: names, placement, target, drafter and loop become one Engine. Only here is offload known."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

import offload as weights
from specexec import attention
from specexec.architecture import can_branch, check_tree_support, longest_text
from specexec.budget import FIRST_NODES
from specexec.chain import ChainLM
from specexec.cost import CostModel
from specexec.defaults import stop_tokens
from specexec.drafters import Drafter
from specexec.drafters.auto import Auto, candidates, fastest
from specexec.drafters.choice import Choice, join, parse
from specexec.drafters.ngram import NgramDrafter
from specexec.drafters.sibling import SiblingDrafter
from specexec.drafters.skip import SAMPLE, SHARE, best_layers, preferred, skipping
from specexec.drafters.substitute import BITS, quantised, substituting
from specexec.drafters.translated import TranslatedDrafter
from specexec.drafters.trimmed import TrimmedHead
from specexec.drafters.union import Union
from specexec.encoding import Encoding, check_translatable, same_vocabulary
from specexec.engine import Engine, Parts
from specexec.errors import BadDrafter, ContextLengthExceeded
from specexec.lm import TreeLM
from specexec.memory import Memory
from specexec.partial import rebuilt
from specexec.planners import planner_of, ranking_of
from specexec.ranking import Ranking
from specexec.room import Room
from specexec.travel import Travel
from specexec.trial import lm_of
from specexec.workspace import Widths, drafting_B, guesses_B, node_B, nodes_of, noise_B, widths_of, workspace

log = logging.getLogger(__name__)

DEFAULT_CONTEXT = 8192
TOY_BUDGET = 32  # a pass of the toy is all overhead, so no guess would ever pay: it shows the engine instead
DTYPES = {"auto": None, "bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def load(
    model: str = "demo",
    *,
    drafter: str = "auto",
    draft_vocab: int | None = None,
    drafter_quant: weights.FourBits = "none",
    head_quant: weights.FourBits = "none",
    offload: weights.Offload = "auto",
    budget: int | Literal["auto"] = "auto",
    planner: str = "best",
    device: str = "auto",
    dtype: str = "auto",
    ctx: int | None = None,
    ram_B: int | None = None,
    vram_B: int | None = None,
    link_limit_Bps: float | None = None,
    exact: bool = False,
    offline: bool = False,
    verify: bool = False,
    trust_remote_code: bool = False,
    measured: Mapping[str, float] | None = None,
    told: Callable[[int, int], None] | None = None,
) -> Engine:
    """Find, place and load a target and its drafter.

    model: path, alias or hub name. drafter: auto, none, sources joined by + (sibling, substitute, skip, ngram), or a
    path or name in the sibling's place. draft_vocab: the sibling names only so many frequent tokens, and those of the
    text; None lets it name all. drafter_quant: the sibling's layers in four bits. head_quant: the target's head in four
    bits, which makes it another model. offload: auto, none, ram or disk. budget: guesses per sweep, or auto. planner:
    best, reference, beam, sequoia. dtype: auto (stored), bf16, f16, f32. ram_B, vram_B: ceilings in bytes.
    link_limit_Bps throttles the weight stream. verify: compare weights with their hashes first (packs, and what came
    from the Hub). trust_remote_code: run Python that the folders of both models bring; an architecture from there is
    tried on a few tokens first. exact: decide near-ties by the text alone (afresh.py); its bill is `Engine.afresh`.
    measured: tokens per second that drafters, by name, have made with this target here; auto takes the best of those
    that fit. told: hears layers read into memory, and of how many.
    Raises offload's errors for models and memory, UnsupportedArchitecture for targets that cannot verify trees,
    TokenizerMismatch for a drafter whose text cannot be carried over, ContextLengthExceeded for a ctx beyond what the
    model was made for, RemoteCode for code that is not trusted.
    """
    choice = parse(drafter)
    pair = weights.resolve(model, choice.pairing, offline=offline, code=trust_remote_code)
    folder = weights.open_folder(pair.target)  # whatever is wrong with the files is said before anything is built
    if verify:
        _verify(pair)
    design = weights.design(folder, trust_remote_code)
    config = design.config
    if choice.sources:  # without a drafter there is no tree, and any decoder streams
        check_tree_support(design.model_class, config)
    # Foreign code may turn out to keep its keys and values itself.
    branches = not design.own_code and can_branch(design.model_class, config)
    context = _context(ctx, longest_text(config))
    encoding = encoding_in(pair.target, trust_remote_code)
    theirs = None if pair.drafter is None else _other_wording(encoding, pair.drafter, trust_remote_code)
    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    given = weights.free_memory(where, ram_B, vram_B)
    if pair.toy and budget == "auto" and link_limit_Bps is None:
        budget = TOY_BUDGET
    asked = _Asked(offload, where, DTYPES[dtype], context, 0, branches, draft_vocab or 0, drafter_quant, head_quant)
    free_B = given.ram_B if given.vram_B is None else given.vram_B
    most_nodes = nodes_of("auto", asked.widths(folder), context, free_B)
    asked = replace(asked, nodes=most_nodes if budget == "auto" else budget)
    choice, reason = _picked(choice, pair, config, given, asked, measured or {})
    if draft_vocab:
        _check_trimming(choice, theirs)
    if drafter_quant != "none":
        _check_quantising(choice, pair)
    target = weights.load(
        pair.target,
        offload,
        where,
        DTYPES[dtype],
        ram_B=ram_B,
        vram_B=vram_B,
        link_limit_Bps=link_limit_Bps,
        ctx=context,
        guesses_B=asked.guesses_B(choice, pair),
        cache_moves=branches,
        beside_B=_beside_B(choice, pair, asked),
        head_quant=head_quant,
        told=told,
        trust_remote_code=trust_remote_code,
    )
    sibling = pair.drafter if "sibling" in choice.sources else None
    draft = None if sibling is None else _draft(sibling, asked, trust_remote_code)
    lm = lm_of(target, trees=bool(choice.sources), tried=design.own_code, travel=_travel(target, where))
    memory = Memory() if "ngram" in choice.sources or draft_vocab else None
    draft_lm = None if draft is None else TreeLM(draft)
    kit = _Kit(target, lm, encoding, ranking_of(planner), draft_lm, theirs, pair, memory, draft_vocab)
    cost = CostModel(share=weights.stream_of(target).share)
    return Engine(
        Parts(
            name=pair.name,
            toy=pair.toy,
            folders={"target": pair.target} | ({} if sibling is None else {"drafter": sibling}),
            encoding=encoding,
            model=target,
            stream=weights.stream_of(target),
            target=lm,
            draft=draft_lm if theirs is None else None,
            drafter=_watched(choice, join(choice, kit.makers, cost), cost),
            sources=choice.name,
            reason=reason,
            planner=planner_of(planner),
            budget=budget,
            cost=cost,
            context=context,
            room=replace(_room(given, target, choice, pair, asked), most=most_nodes),
            memory=memory,
            exact=exact,
            own_code=design.own_code,
        )
    )


def _verify(pair: weights.ModelPair) -> None:
    for folder in (pair.target, pair.drafter):
        if folder is not None and not weights.check_bytes(folder):
            log.warning("%s has no hashes to compare with: only sizes and headers were checked", folder)


@dataclass(frozen=True)
class _Kit:
    """Everything that some drafter is made from."""

    model: PreTrainedModel
    target: TreeLM | ChainLM
    encoding: Encoding
    ranking: Ranking
    draft: TreeLM | None
    theirs: Encoding | None
    pair: weights.ModelPair
    memory: Memory | None
    draft_vocab: int | None

    @property
    def makers(self) -> dict[str, Callable[[], Drafter]]:
        return {
            "sibling": self._sibling,
            "substitute": self._substitute,
            "skip": self._skip,
            "ngram": lambda: NgramDrafter(self.memory),
        }

    @property
    def _vocabulary(self) -> int:
        return len(self.encoding.tokenizer)

    def _sibling(self) -> Drafter:
        assert self.draft is not None
        assert self.pair.drafter is not None
        name = f"{self.pair.name} drafter" if self.pair.toy else self.pair.drafter.name
        if self.theirs is not None:
            return TranslatedDrafter(self.draft, self.encoding, self.theirs, name)
        trimmed = None
        if self.draft_vocab:
            ends = stop_tokens(self.model.generation_config, self.encoding.tokenizer.eos_token_id)
            trimmed = TrimmedHead(self.draft, self._vocabulary, self.draft_vocab, ends, self.memory)
        return SiblingDrafter(self.draft, self._vocabulary, self.ranking, name, trimmed)

    def _skip(self) -> SiblingDrafter:
        resident = [tier == "device" for tier in weights.stream_of(self.model).placement.tiers]
        kept = preferred(resident)
        assert isinstance(self.target, TreeLM)
        if all(resident):  # every set of layers is there already: look for a good one
            kept = best_layers(self.target, self._layers(range(len(resident))), kept, self.encoding.encode(SAMPLE))
        return skipping(self.model, self._layers(kept), self._vocabulary, self.ranking)

    def _substitute(self) -> SiblingDrafter:
        layers = self._layers(range(weights.stream_of(self.model).layers))
        made = {i: quantised(layer, self.target.device) for i, layer in layers.items()}
        return substituting(self.model, made, self._vocabulary, self.ranking)

    def _layers(self, wanted: Iterable[int]) -> dict[int, nn.Module]:
        return {i: weights.standing_layer(self.model, i) for i in wanted}


def _travel(target: PreTrainedModel, device: str) -> Travel | None:
    """Keys and values that the placement keeps in RAM."""
    caches = weights.stream_of(target).placement.caches
    layers = frozenset(layer for layer, tier in enumerate(caches) if tier == "ram")
    return Travel(layers, weights.carrier_for(torch.device(device))) if layers else None


def _room(given: weights.Free, target: PreTrainedModel, choice: Choice, pair: weights.ModelPair, asked: _Asked) -> Room:
    """What is left for texts: what the placement has set aside for one, and half of what nobody asked for."""
    plan = weights.stream_of(target).placement
    nodes, widths = asked.nodes if choice.sources else 0, asked.widths(weights.open_folder(pair.target))
    drafters = _drafters(choice, pair, asked)
    layers, travelling = len(plan.caches), plan.caches.count("ram")

    def side(one: Room, living: int, spare_B: int) -> Room:
        """A memory in which so many layers have their keys and values."""
        one = replace(one, token_B=-(-plan.need.cache_B * living // (plan.need.ctx * layers)))
        return replace(one, free_B=one.need_B(asked.context, nodes) + max(spare_B, 0) // 2)

    bare = Room(free_B=0, token_B=0, least=min(nodes, FIRST_NODES), rows=asked.context)
    computing = replace(
        bare,
        draft_B=sum(drafter.token_B for drafter in drafters),
        node_B=node_B(widths, drafters),
        text_B=noise_B(widths),
    )
    if given.vram_B is None or plan.device_B is None:
        return side(computing, layers, given.ram_B - plan.host_B)
    ram = side(bare, travelling, given.ram_B - plan.host_B) if travelling else None
    living = layers - travelling + min(2, travelling)  # two layers' worth is there at a time of those that travel
    return side(replace(computing, beside=ram), living, given.vram_B - plan.device_B)


def _beside_B(choice: Choice, pair: weights.ModelPair, asked: _Asked) -> dict[str, int]:
    """Memory beside the target and its text. Skipping in a resident one is free, but it is not placed yet."""
    target = weights.open_folder(pair.target)
    needed = workspace(asked.widths(target), asked.context, asked.nodes if choice.sources else 0)
    shares = {"skip": SHARE, "substitute": BITS / 16}
    drafter_B = sum(int(shares.get(source, 0) * sum(target.file_sizes.values())) for source in choice.sources)
    for drafter in _drafters(choice, pair, asked):
        drafter_B += drafter.token_B * asked.context + drafting_B(drafter, asked.context, asked.nodes)
    if "sibling" in choice.sources and pair.drafter is not None:
        folder = weights.open_folder(pair.drafter)
        drafter_B += weights.resident_B(folder, asked.drafter_quant, asked.item_B(folder), 0)
        drafter_B += 3 * asked.draft_vocab // 2 * asked.widths(folder).hidden * asked.item_B(folder)
    return {**needed, "drafter": drafter_B}


def _drafters(choice: Choice, pair: weights.ModelPair, asked: _Asked) -> list[Widths]:
    """Models that draft, with keys and values of their own."""
    target = asked.widths(weights.open_folder(pair.target))
    found = {"skip": replace(target, token_B=math.ceil(SHARE * target.token_B)), "substitute": target}
    if pair.drafter is not None:
        found["sibling"] = asked.widths(weights.open_folder(pair.drafter))
    return [found[source] for source in choice.sources if source in found]


@dataclass(frozen=True)
class _Asked:
    """How the target shall be placed."""

    offload: weights.Offload
    device: str
    dtype: torch.dtype | None
    context: int
    nodes: int
    branches: bool
    draft_vocab: int
    drafter_quant: weights.FourBits
    head_quant: weights.FourBits

    def guesses_B(self, choice: Choice, pair: weights.ModelPair) -> int:
        """Keys and values beyond those of the text."""
        return guesses_B(
            self.widths(weights.open_folder(pair.target)), self.context, self.nodes if choice.sources else 0
        )

    def item_B(self, folder: weights.Folder) -> int:
        return self.dtype.itemsize if self.dtype else weights.item_B(folder)

    def widths(self, folder: weights.Folder) -> Widths:
        item_B = self.item_B(folder)
        return widths_of(folder.config, item_B, weights.cache_B(folder.config, 1, item_B))


def _picked(
    choice: Choice,
    pair: weights.ModelPair,
    config: PretrainedConfig,
    free: weights.Free,
    asked: _Asked,
    measured: Mapping[str, float],
) -> tuple[Choice, str]:
    """What was asked for, as asked; or of what fits the drafter that `auto` takes, and why."""
    if "sibling" in choice.sources and pair.drafter is None and not choice.auto:
        raise BadDrafter(
            f"no drafter is paired with {pair.name!r}, or it is not on this machine yet.",
            hint="--drafter ngram, or the path or name of a smaller model of the same family.",
        )
    if not choice.auto:
        return choice, ""
    folder = weights.open_folder(pair.target)

    def slowest(choice: Choice) -> str | None:
        item_B = asked.item_B(folder)
        plain = weights.need_of(folder, item_B, asked.context, _beside_B(choice, pair, asked))
        need = replace(
            weights.with_head(folder, plain, asked.head_quant, item_B),
            guesses_B=asked.guesses_B(choice, pair),
            cache_moves=asked.branches,
        )
        try:
            return weights.place(need, free, asked.offload).offload
        except weights.OffloadError:
            return None

    experts = any(getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts"))
    # A CPU takes longer over a 4-bit copy than over the weights themselves: there it must have been measured first.
    copies = asked.device != "cpu" or "substitute+ngram" in measured
    found = candidates(pair.drafter is not None, slowest, copies and not experts and not weights.is_quantised(folder))
    return fastest(found, pair.drafter is not None, measured)


def _other_wording(ours: Encoding, drafter: Path, trust_remote_code: bool) -> Encoding | None:
    """The drafter's tokenizer if it is not the target's; None if ids mean the same in both."""
    theirs = encoding_in(drafter, trust_remote_code)
    if same_vocabulary(ours, theirs):
        return None
    check_translatable(theirs, drafter)
    log.warning(
        "drafter %s has another vocabulary: its guesses are carried over as text, and fewer will be accepted.", drafter
    )
    return theirs


def _draft(folder: Path, asked: _Asked, trust_remote_code: bool) -> PreTrainedModel:
    """A model that drafts, whole where the target computes; for four bits a layer at a time comes through RAM."""
    whole = asked.drafter_quant == "none"
    model = weights.load(
        folder,
        "none" if whole else "disk",
        asked.device if whole else "cpu",
        asked.dtype,
        ctx=asked.context,
        trust_remote_code=trust_remote_code,
    )
    if whole:
        return model
    stream, device = weights.stream_of(model), torch.device(asked.device)
    model.set_attn_implementation(attention.NAME)  # layers taken out go on as the whole did
    layers = {i: quantised(weights.standing_layer(model, i), device) for i in range(stream.layers)}
    stream.close()
    few_bits = rebuilt(model, layers)
    nn.Module.to(few_bits, device)
    return few_bits


def _check_quantising(choice: Choice, pair: weights.ModelPair) -> None:
    if "sibling" not in choice.sources or pair.drafter is None:
        raise BadDrafter(
            "--drafter-quant quantises a drafter model, and none drafts here.",
            hint=f"Leave it out, or --drafter with a model. Now: {choice.name}.",
        )
    if weights.is_quantised(weights.open_folder(pair.drafter)):
        raise BadDrafter(
            f"{pair.drafter} is quantised already; --drafter-quant has nothing to do.", hint="Leave it out."
        )


def _check_trimming(choice: Choice, theirs: Encoding | None) -> None:
    if "sibling" not in choice.sources:
        raise BadDrafter(
            "--draft-vocab trims the head of a drafter model, and none drafts here.",
            hint=f"Leave it out, or --drafter with a model. Now: {choice.name}.",
        )
    if theirs is not None:
        raise BadDrafter(
            "--draft-vocab cannot trim a drafter with another vocabulary: its guesses are carried over as text.",
            hint="Leave it out.",
        )


def _watched(choice: Choice, drafter: Drafter, cost: CostModel) -> Drafter:
    """Under `auto` a model in a union may rest where it is not worth its time."""
    return Auto(drafter, cost) if choice.auto and isinstance(drafter, Union) else drafter


def encoding_of(model: str, *, offline: bool = False, trust_remote_code: bool = False) -> Encoding:
    """The tokenizer of a model that need not be loaded."""
    folder = weights.resolve(model, "none", offline=offline, code=trust_remote_code).target
    return encoding_in(folder, trust_remote_code)


def encoding_in(folder: Path, trust_remote_code: bool = False) -> Encoding:
    """The tokenizer of a model folder. Raises RemoteCode where it needs code that is not trusted."""
    with weights.running_code(folder, trust_remote_code):
        return Encoding.of(folder, trust_remote_code)


def context_of(folder: Path, ctx: int | None, trust_remote_code: bool = False) -> int:
    """Tokens that prompt and answer may have together, as `load` decides it, at most what the model was made for."""
    config = weights.design(weights.open_folder(folder), trust_remote_code).config
    return min(ctx or DEFAULT_CONTEXT, longest_text(config))


def _context(asked: int | None, longest: int) -> int:
    if asked is not None and asked > longest:
        raise ContextLengthExceeded(f"--ctx {asked:,} is more than the {longest:,} tokens the model was made for.")
    return asked or min(DEFAULT_CONTEXT, longest)
