"""The composition root: names, placement, target, drafter and loop become one Engine. Only here is offload known."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal

import torch
from transformers import PreTrainedModel

import offload as weights
from specexec.compose.context import context_of, encoding_in, encoding_of, stops_of
from specexec.compose.drafter_factory import (
    Kit,
    check_quantising,
    check_trimming,
    drafts_of,
    join,
    picked,
    vocabulary_of,
    watched,
)
from specexec.compose.gate import admit
from specexec.compose.memory_plan import Asked, beside_B, beside_ram_B, drafters_of
from specexec.compose.options import DTYPES, check_options
from specexec.drafters.cost import CostModel
from specexec.drafters.registry import PAIRED, Choice, check_models, parse
from specexec.drafters.retrieval.memory import Memory
from specexec.drafters.skip import Searches
from specexec.engine.engine import Engine
from specexec.engine.parts import Parts
from specexec.model.architecture import can_branch, context_for, longest_text
from specexec.model.cache_in_ram import Travel
from specexec.model.remote_code_check import lm_of
from specexec.planning.baselines import planner_of, ranking_of
from specexec.planning.budget import FIRST_NODES
from specexec.planning.memory_room import Room
from specexec.sampling.model_defaults import Defaults, defaults_of
from specexec.sizes import node_B, nodes_of, noise_B
from specexec.text.tokenizer import Encoding

__all__ = ["context_of", "encoding_in", "encoding_of", "load", "stops_of"]

log = logging.getLogger(__name__)

TOY_BUDGET = 32  # a pass of the toy is all overhead, so no guess would ever pay: it shows the engine instead


def load(
    model: str = "demo",
    *,
    drafter: str = "auto",
    draft_vocab: int | None = None,
    drafter_quant: weights.FewBits = "none",
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
    searches: Searches | None = None,
    rounded: Callable[[int, int], None] = lambda done, layers: None,
) -> Engine:
    """Find, place and load a target and its drafters.

    model: path, alias or hub name. drafter: auto, none, or sources joined by +: sibling (the paired model), paths and
    names of other models, substitute, skip, ngram. draft_vocab: models that share the target's vocabulary name only so
    many frequent tokens, and those of the text; None lets them name all. drafter_quant: the layers of drafter models,
    and what substitute copies of the target's, in few bits (hqq's need `specexec[hqq]`). head_quant: the target's head
    in four bits, which makes it another model. offload: auto, none, ram or disk. budget: guesses per sweep, or auto.
    planner: best, reference, beam, sequoia. dtype: auto (stored), bf16, f16, f32. ram_B, vram_B: ceilings in bytes.
    link_limit_Bps throttles the weight stream. verify: compare weights with their hashes first (packs, and what came
    from the Hub). trust_remote_code: run Python that the folders of all models bring; an architecture from there is
    tried on a few tokens first. exact: decide near-ties by the text alone ; their bill is `Engine.exact_ties`.
    measured: tokens per second that drafters, by name, have made with this target here; auto takes the best of those
    that fit. told: hears layers read into memory, and of how many. searches: what earlier loads found out by trying;
    what this one has to find out (skip: which sublayers) is added. rounded: hears layers quantised to draft, and of how
    many.
    Raises offload's errors for models and memory, UnsupportedArchitecture for targets that cannot verify trees,
    TokenizerMismatch for a drafter whose text cannot be carried over, ContextLengthExceeded for a ctx beyond what the
    model was made for, RemoteCode for code that is not trusted, BadOption for values that a keyword cannot have.
    """
    check_options(locals())
    weights.check_system()
    choice = parse(drafter, weights.known)
    if not offline and not trust_remote_code:
        _admit_before_download(model, choice, ctx)
    pair = weights.resolve(model, choice.models, offline=offline, code=trust_remote_code)
    check_models(choice, pair.drafters, pair.name)
    folder = weights.open_folder(pair.target)  # whatever is wrong with the files is said before anything is built
    for note in folder.notes:
        log.warning("%s: %s", folder.path, note)
    if verify:
        _verify(pair)
    # Without a drafter there is no tree, and any decoder streams.
    design = admit(folder, trees=bool(choice.sources), ctx=ctx, trust_remote_code=trust_remote_code)
    config = design.config
    # Foreign code may turn out to keep its keys and values itself.
    branches = not design.own_code and can_branch(design.model_class, config)
    context = context_for(ctx, longest_text(config))
    encoding = encoding_in(pair.target, trust_remote_code)
    vocabularies = [vocabulary_of(path, encoding, trust_remote_code) for path in pair.drafters]
    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    given = weights.free_memory(where, ram_B, vram_B)
    if pair.toy and budget == "auto" and link_limit_Bps is None:
        budget = TOY_BUDGET
    asked = Asked(offload, where, DTYPES[dtype], context, 0, branches, draft_vocab or 0, drafter_quant, head_quant)
    free_B = given.ram_B if given.vram_B is None else given.vram_B
    most_nodes = nodes_of("auto", asked.widths(folder), context, free_B)
    asked = replace(asked, nodes=most_nodes if budget == "auto" else budget)
    choice, reason = picked(choice, pair, config, given, asked, measured or {})
    if draft_vocab:
        check_trimming(choice, vocabularies, draft_vocab, len(encoding.tokenizer))
    if drafter_quant != "none":
        check_quantising(choice, pair, drafter_quant)
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
        beside_B=beside_B(choice, pair, asked),
        beside_ram_B=beside_ram_B(choice, pair, asked),
        head_quant=head_quant,
        told=told,
        trust_remote_code=trust_remote_code,
    )
    defaults = _defaults(target, encoding)
    drafts = drafts_of(choice, pair, vocabularies, asked, trust_remote_code, rounded)
    lm = lm_of(
        target, trees=bool(choice.sources), tried=design.own_code, travel=_travel(target, where), share=weights.share
    )
    memory = Memory() if "ngram" in choice.sources or draft_vocab else None
    searches = searches or Searches()
    kit = Kit(
        target,
        lm,
        encoding,
        ranking_of(planner),
        drafts,
        pair,
        memory,
        draft_vocab,
        searches,
        rounded,
        asked.copy,
        context,
        defaults.stop_tokens,
    )
    cost = CostModel(share=weights.stream_of(target).share)
    return Engine(
        Parts(
            name=pair.name,
            toy=pair.toy,
            folders={"target": pair.target} | {one.role: one.folder for one in drafts.values()},
            encoding=encoding,
            defaults=defaults,
            model=target,
            stream=weights.stream_of(target),
            target=lm,
            drafts={one.role: one.lm for one in drafts.values() if one.vocabulary.wordings is None},
            drafter=watched(choice, join(choice, kit.makers, cost), cost),
            sources=choice.name,
            reason=reason,
            planner=planner_of(planner, choice.sources),
            budget=budget,
            cost=cost,
            context=context,
            room=replace(_room(given, target, choice, pair, asked), most=most_nodes),
            memory=memory,
            exact=exact,
            own_code=design.own_code,
        )
    )


def _admit_before_download(model: str, choice: Choice, ctx: int | None) -> None:
    """Whoever cannot run is refused before hundreds of gigabytes have come."""
    if not weights.is_here(model):
        admit(weights.list_model(model), trees=bool(choice.sources), ctx=ctx)
    for name in choice.models:
        if name != PAIRED and not weights.is_here(name):  # the paired one is never downloaded
            admit(weights.list_model(name), trees=True)


def _verify(pair: weights.ModelPair) -> None:
    for folder in (pair.target, *pair.drafters):
        if not weights.check_bytes(folder):
            log.warning("%s has no hashes to compare with: only sizes and headers were checked", folder)


def _defaults(target: PreTrainedModel, encoding: Encoding) -> Defaults:
    """What the model's generation_config.json wishes; what of it is not heeded is said here, once."""
    wish = target.generation_config
    from_config = None if wish is not None and wish.eos_token_id is not None else target.config.eos_token_id
    found = defaults_of(wish, from_config, encoding.tokenizer.eos_token_id, rows=int(target.config.vocab_size))
    for line in found.unheeded:
        log.warning("%s", line)
    return found


def _travel(target: PreTrainedModel, device: str) -> Travel | None:
    """Keys and values that the placement keeps in RAM."""
    caches = weights.stream_of(target).placement.caches
    layers = frozenset(layer for layer, tier in enumerate(caches) if tier == "ram")
    return Travel(layers, weights.carrier_for(torch.device(device))) if layers else None


def _room(given: weights.Free, target: PreTrainedModel, choice: Choice, pair: weights.ModelPair, asked: Asked) -> Room:
    """What is left for texts: what the placement has set aside for one, and half of what nobody asked for."""
    plan = weights.stream_of(target).placement
    nodes, widths = asked.nodes if choice.sources else 0, asked.widths(weights.open_folder(pair.target))
    drafters = drafters_of(choice, pair, asked)
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
