"""The composition root: names, placement, target, drafter and loop become one Engine. Only here is offload known."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial

import torch
from transformers import PreTrainedModel

import offload as weights
from specexec.compose.auto_choice import picked
from specexec.compose.context import context_of, encoding_in, encoding_of, stops_of
from specexec.compose.drafter_factory import (
    adapted,
    check_adapting,
    check_device,
    check_quantising,
    check_trimming,
    check_window,
    drafter_of,
    drafts_of,
    heads_of,
    makers,
    vocabulary_of,
)
from specexec.compose.dtypes import DTYPES
from specexec.compose.earlier_runs import EarlierRuns
from specexec.compose.gate import admit
from specexec.compose.head_folders import fitting, head_kind
from specexec.compose.load_options import LoadOptions
from specexec.compose.lossy_modes import able, of_prompts, steps_of
from specexec.compose.memory_plan import LoadRequest, drafting, memory_plan, room_for_texts
from specexec.compose.progress import LoadProgress
from specexec.drafters.cost import CostModel
from specexec.drafters.kit import DrafterKit
from specexec.drafters.registry import PAIRED, DrafterChoice, check_models, parse
from specexec.drafters.retrieval.memory import Memory
from specexec.engine.engine import Engine
from specexec.engine.parts import Parts
from specexec.errors import BadOption, UnsupportedArchitecture
from specexec.lossy.asked import Lossy
from specexec.model.architecture import context_for, longest_text, only_plainly
from specexec.model.cache_in_ram import Travel
from specexec.model.chain_lm import ChainLM
from specexec.model.image_rows import Images
from specexec.model.remote_code_check import is_tried, lm_of
from specexec.model.tree_lm import TreeLM
from specexec.planning.baselines import NAMES, planner_of, ranking_of
from specexec.sampling.model_defaults import Defaults, defaults_of
from specexec.sampling.verify import walk
from specexec.text.tokenizer import Encoding

__all__ = ["context_of", "encoding_in", "encoding_of", "load", "stops_of"]

log = logging.getLogger(__name__)


def load(
    model: str = "demo",
    options: LoadOptions | None = None,
    *,
    progress: LoadProgress | None = None,
    earlier: EarlierRuns | None = None,
    **fields: object,
) -> Engine:
    """Find, place and load a model and its drafter; close the engine, or use it in a `with`, to free what it takes.

    model: `demo`, a folder, an alias or a Hub name. options: how it is loaded; each field of LoadOptions may also be
    given as a keyword, which then wins. progress: called while layers are read, quantised and searched. earlier: what
    earlier runs found out.
    Raises offload's errors for models and memory, UnsupportedArchitecture for targets that cannot verify trees,
    TokenizerMismatch for a drafter whose text cannot be carried over, ContextLengthExceeded for a ctx beyond what the
    model was made for, RemoteCode for code that is not trusted, BadOption for values that a field cannot have.
    """
    chosen = replace(options or LoadOptions(), **fields)  # type: ignore[arg-type]  # LoadOptions checks them
    return assemble(model, chosen, progress or LoadProgress(), earlier or EarlierRuns())


def assemble(
    model: str, options: LoadOptions, progress: LoadProgress, earlier: EarlierRuns, planner: str = "best"
) -> Engine:
    """As `load`; `planner` is one of planning/baselines.py, for `bench` to compare."""
    _check(model, options, planner)
    lossy = Lossy.of(options.lossy)
    choice = able(parse(options.drafter, weights.known), lossy, options.draft_window)
    pair = _resolved(model, choice, options)
    # Whatever is wrong with its files is said before anything is built.
    folder = weights.with_adapters(weights.open_folder(pair.target), options.lora)
    if not fitting(choice, folder, [*map(weights.open_folder, pair.drafters)]):
        pair = replace(pair, drafters=())
    design = _admitted(folder, pair, choice, options)
    encoding = encoding_in(pair.target, options.trust_remote_code)
    models = [path for path in pair.drafters if not head_kind(weights.open_folder(path))]
    vocabularies = {path: vocabulary_of(path, encoding, options.trust_remote_code) for path in models}
    device = _device(options)
    free = weights.free_memory(device, options.ram_B, options.vram_B)
    request = _request(folder, pair, design, options, free)
    choice, reason = picked(request, choice, free, earlier.speeds)
    check_trimming(choice, [*vocabularies.values()], options.draft_vocab, len(encoding.tokenizer))
    check_window(choice, options.draft_window)
    check_device(choice, request.drafters, options.drafter_device)
    check_quantising(choice, request.drafters, options.drafter_quant)
    check_adapting(choice, request.drafters, options.drafter_lora)
    target = _target(request, choice, device, progress)
    defaults = _defaults(target, encoding)
    beside = device if options.drafter_device == "auto" else options.drafter_device
    drafts = drafts_of(choice, pair, vocabularies, request, beside, progress)
    stream = weights.stream_of(target)
    lm = lm_of(
        target,
        trees=choice.required,
        tried=not is_tried(folder.architecture, design.own_code),
        travel=_travel(stream.placement, device),
        share=weights.share,
        tiled=not stream.in_integers,
        images=_images(folder, encoding, device, options),
    )
    if options.kv_quant is not None:
        _keep_in(lm, options.kv_quant)
    if isinstance(lm, ChainLM):
        encoding.refuse_images("Images need a model that verifies trees; this one decodes plainly.")
    if choice.sources and isinstance(lm, ChainLM):
        choice, reason = choice.instead(), "plain decoding: the model's own code cannot verify trees"
        drafts = {}
    memory = Memory() if "ngram" in choice.sources or options.draft_vocab else None
    kit = _kit(request, target, lm, encoding, memory, progress, earlier)
    kit = replace(kit, ranking=ranking_of(planner), stop_tokens=defaults.stop_tokens)
    apart = bool(drafting(request, choice, in_ram=True)) and not drafting(request, choice)
    cost = CostModel(share=stream.share, apart=apart)
    choice, drafter = drafter_of(choice, makers(choice, kit, drafts, heads_of(choice, request)), cost)
    steps = steps_of(lossy, encoding, drafter, request.budget)
    prompts = of_prompts(lossy, encoding, lm, drafts.values())
    return Engine(
        Parts(
            name=pair.name,
            toy=pair.toy,
            folders={"target": pair.target} | {one.role: one.folder for one in drafts.values()},
            encoding=encoding,
            defaults=defaults,
            model=target,
            stream=stream,
            target=lm,
            drafts={one.role: one.lm for one in drafts.values() if one.vocabulary.wordings is None},
            drafter=drafter,
            sources=choice.name,
            reason=reason,
            planner=steps or planner_of(planner, choice.sources),
            walk=steps.walk if steps else walk,
            lossy=lossy.labels,
            shorten=prompts.shorten,
            thin=prompts.thin,
            budget=request.budget,
            cost=cost,
            context=request.context,
            room=room_for_texts(stream.placement, free, request, choice),
            memory=memory,
            exact=options.exact,
            own_code=design.own_code,
            compute=options.compute,
            kv_quant=options.kv_quant,
            adapters={"target": options.lora} | {one.role: options.drafter_lora for one in drafts.values()},
        )
    )


def _check(model: str, options: LoadOptions, planner: str) -> None:
    """What can be refused before anything is read."""
    if not isinstance(model, str):
        raise BadOption(f"model is {model!r}; allowed: a name or path, as text.")
    if planner not in NAMES:
        raise BadOption(f"planner is {planner!r}; allowed: {', '.join(NAMES)}.")
    _, colon, index = options.device.partition(":")
    if colon and int(index) >= torch.cuda.device_count():
        raise BadOption(
            f"device is {options.device!r}, but torch sees {torch.cuda.device_count()} GPUs here.", hint="device='cpu'."
        )
    weights.check_system()


def _resolved(model: str, choice: DrafterChoice, options: LoadOptions) -> weights.ModelPair:
    """The folders of all models, downloaded if they have to be and can run."""
    if not options.offline and not options.trust_remote_code:
        _admit_before_download(model, choice, options.ctx)
    pair = weights.resolve(model, choice.models, offline=options.offline, code=options.trust_remote_code)
    check_models(choice, pair.drafters, pair.name)
    return pair


def _admit_before_download(model: str, choice: DrafterChoice, ctx: int | None) -> None:
    """Refuse what cannot run before hundreds of gigabytes have come."""
    if not weights.is_here(model):
        admit(weights.list_model(model), trees=choice.required, ctx=ctx)
    for name in choice.models:
        if name != PAIRED and not weights.is_here(name):  # the paired one is never downloaded
            listed = weights.list_model(name)
            if not head_kind(listed):
                admit(listed, trees=True)


def _admitted(
    folder: weights.Folder, pair: weights.ModelPair, choice: DrafterChoice, options: LoadOptions
) -> weights.Design:
    """The target's design, if it can run."""
    for note in folder.notes:
        log.warning("%s: %s", folder.path, note)
    if options.verify:
        _verify(pair)
    # Without a drafter there is no tree, and any decoder streams.
    return admit(folder, trees=choice.required, ctx=options.ctx, trust_remote_code=options.trust_remote_code)


def _verify(pair: weights.ModelPair) -> None:
    for folder in (pair.target, *pair.drafters):
        if not weights.check_bytes(folder):
            log.warning("%s has no hashes to compare with: only sizes and headers were checked", folder)


def _device(options: LoadOptions) -> str:
    if options.device != "auto":
        return options.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _request(
    folder: weights.Folder, pair: weights.ModelPair, design: weights.Design, options: LoadOptions, free: weights.Free
) -> LoadRequest:
    """What the memory plan asks; code that was not tried may turn out to keep its keys and values itself."""
    plainly = only_plainly(design.model_class, design.config)
    return LoadRequest.of(
        folder,
        tuple(adapted(weights.open_folder(path), options.drafter_lora) for path in pair.drafters),
        options,
        context_for(options.ctx, longest_text(design.config)),
        free,
        branches=is_tried(folder.architecture, design.own_code) and not plainly,
        plainly=plainly,
        toy=pair.toy and Lossy.of(options.lossy).steps is None,  # its budget has no room for steps
    )


def _target(request: LoadRequest, choice: DrafterChoice, device: str, progress: LoadProgress) -> PreTrainedModel:
    """The target, placed in what the memory plan leaves to it."""
    options, beside = request.options, memory_plan(request, choice)
    return weights.load(
        request.target.path,
        options.offload,
        device,
        DTYPES[options.dtype],
        ram_B=options.ram_B,
        vram_B=options.vram_B,
        link_limit_Bps=options.link_limit_Bps,
        ctx=request.context,
        guesses_B=beside.guesses_B,
        states_B=beside.states_B,
        cache_moves=request.branches,
        cache_stays=beside.cache_stays,
        beside_B=beside.beside_B,
        beside_ram_B=beside.beside_ram_B,
        head_quant=options.head_quant,
        compute=options.compute,
        kv_quant=options.kv_quant,
        kv=options.kv,
        adapters=options.lora,
        on_layer_read=progress.read,
        trust_remote_code=options.trust_remote_code,
    )


def _keep_in(lm: TreeLM | ChainLM, kv_quant: weights.KVQuant) -> None:
    """Keys and values in few bits, where they are ours to keep."""
    if isinstance(lm, ChainLM):
        raise UnsupportedArchitecture(
            "--kv-quant needs a model that verifies trees: this one's own code keeps its keys and values.",
            hint="leave --kv-quant out.",
        )
    lm.keep_in(kv_quant)


def _images(folder: weights.Folder, encoding: Encoding, device: str, options: LoadOptions) -> Images | None:
    """The images that its prompts may hold, with the tower that they go through."""
    if folder.wrapper is None or encoding.images is None:
        return None
    try:
        tower = weights.open_tower(folder.path, device, DTYPES[options.dtype])
    except weights.OffloadError as problem:
        encoding.refuse_images(f"Its tower cannot be used: {problem.what}")
        return None
    images = encoding.images.images
    images.tower = tower
    return images


def _kit(
    request: LoadRequest,
    target: PreTrainedModel,
    lm: TreeLM | ChainLM,
    encoding: Encoding,
    memory: Memory | None,
    progress: LoadProgress,
    earlier: EarlierRuns,
) -> DrafterKit:
    """What the makers of drafters are given."""
    return DrafterKit(
        model=target,
        files_B=sum(request.target.file_sizes.values()),
        target=lm,
        encoding=encoding,
        context=request.context,
        memory=memory,
        window=request.options.draft_window,
        draft_vocab=request.options.draft_vocab,
        form=request.copy,
        searches=earlier.searches,
        mtp_layer=partial(
            weights.load_mtp_layer,
            request.target,
            lm.device,
            target.dtype,
            request.options.trust_remote_code,
        ),
        on_quantised=progress.quantised,
        on_searched=progress.searched,
    )


def _defaults(target: PreTrainedModel, encoding: Encoding) -> Defaults:
    """What the model's generation_config.json asks for; what of it is ignored is logged here, once."""
    wish = target.generation_config
    from_config = (
        None if wish is not None and wish.eos_token_id is not None else getattr(target.config, "eos_token_id", None)
    )
    found = defaults_of(wish, from_config, encoding.tokenizer.eos_token_id, rows=int(target.config.vocab_size))
    for line in found.ignored:
        log.warning("%s", line)
    return found


def _travel(placement: weights.Placement, device: str) -> Travel | None:
    """Keys and values that the placement keeps in RAM or on disk, and in RAM states too."""
    layers = frozenset(layer for layer, tier in enumerate(placement.caches) if tier != "device")
    on_disk = "disk" in placement.caches
    carrier = weights.carrier_for(torch.device(device), on_disk)
    return Travel(layers, carrier, with_states=not on_disk) if layers else None
