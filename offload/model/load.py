"""A transformers causal LM whose decoder layers stream. The modelling code stays transformers' own.

`load` builds a skeleton without weights, decides where the layers live, puts the rest into memory and wraps every
element of the layer list. Knows no tree, token or sampler.
"""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from offload.checkpoint.block import Block
from offload.checkpoint.headers import open_folder
from offload.checkpoint.layout import Checkpoint, lay_out
from offload.checkpoint.lora import with_adapters
from offload.checkpoint.quantized.weight import Quantised
from offload.checkpoint.roles import PARTS, part_of
from offload.checkpoint.skeleton import Skeleton, build, settings_of
from offload.errors import UnsupportedModel
from offload.machine.files import Reading
from offload.machine.finalizers import close_when_collected
from offload.machine.heap import give_back
from offload.machine.host_rows import check_room
from offload.machine.identity import machine
from offload.machine.integer_products import way
from offload.machine.memory import Free, free_memory
from offload.machine.out_of_memory import refusal
from offload.machine.speeds import disk_key, load_speeds, reading_for
from offload.machine.system import check_system
from offload.model.layer import StreamedLayer, streamed_layers
from offload.model.model_stream import ModelStream
from offload.model.quantized_head import Rounded, quantise_head
from offload.model.reordered import pays, reordering
from offload.placement.placement import KVHome, Need, Offload, Placement
from offload.placement.quantized_sizes import FourBits, with_head
from offload.placement.requirements import (
    Compute,
    KVQuant,
    cache_widths,
    passing_B,
    scratch_B,
    shared_caches,
    stored_head,
    with_cache,
)
from offload.placement.solver import place
from offload.stream.dequantized import DenseLayers
from offload.stream.open import open_stream
from offload.stream.products import with_products
from offload.stream.protocol import Stream
from offload.stream.store import Arena, DiskStore
from offload.units import size

log = logging.getLogger(__name__)


def load(
    path: str | Path,
    offload: Offload = "auto",
    device: str = "cpu",
    dtype: str | torch.dtype | None = None,
    *,
    ram_B: int | None = None,
    vram_B: int | None = None,
    link_limit_Bps: float | None = None,
    ctx: int = 4096,
    guesses_B: int = 0,
    states_B: Mapping[int, int] | None = None,
    cache_moves: bool = False,
    cache_stays: Collection[int] = (),
    beside_B: Mapping[str, int] | None = None,
    beside_ram_B: Mapping[str, int] | None = None,
    head_quant: FourBits = "none",
    compute: Compute = "float",
    kv_quant: KVQuant | None = None,
    kv: KVHome = "ram",
    adapters: Sequence[str] = (),
    reorder: bool = False,
    on_layer_read: Callable[[int, int], None] | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A transformers model that computes exactly what the checkpoint says, in the memory that it was given (bytes).

    Raises NotEnoughRam, NotEnoughVram, BadModelDir, CorruptShard, UnsupportedModel, RemoteCode, NoGpu, ReadFailed.

    `head_quant` nf4 makes it another model: its head rounded to four bits, a copy where embeddings are tied to it. So
    does `compute` int8: linears of the layers that are stored in int8 by rows round their inputs to 15 bits and compute
    in integers. Refused with UnsupportedModel where there are none.
    `kv_quant`: the caller keeps keys and values in so many bits. `kv`: the slowest place that they may have, if they
    can move; refused with DiskFull where the disk has no room for a full context.
    `reorder`: a model that nothing else takes layers of and that stays in memory keeps its weights in the order in
    which this CPU multiplies them quickest, if there is such an order.
    `adapters` are LoRA adapters of peft, FOLDER or FOLDER:scale (offload/checkpoint/lora.py), added in this order.
    `beside_B` is what the caller will need beside it where it computes (drafter, trees), by what it is for,
    `beside_ram_B` what it keeps in RAM wherever that is, `guesses_B` keys and values beyond `ctx` tokens, and
    `states_B` what recurrent layers keep, by number. `ram_B` and `vram_B` replace what is measured. `cache_moves`: the
    caller keeps the keys and values of each layer where the placement's `caches` say, so that they may live in RAM or
    on disk, and states in RAM with them; those of the layers `cache_stays` may not.
    `on_layer_read` is called with the number of resident layers read so far and the number of all of them.
    `trust_remote_code` lets transformers run Python that lies in the folder.
    """
    check_system()
    give_back()
    folder = with_adapters(open_folder(Path(path)), adapters)
    skeleton = build(folder, dtype, trust_remote_code)
    on_cpu = torch.device(device).type == "cpu"
    checkpoint = lay_out(folder, skeleton, in_place=on_cpu, in_integers=compute == "int8")
    if compute == "int8":
        _check_integers(checkpoint, torch.device(device))
    reading = reading_for(folder.weights_at)
    need = with_head(folder, _need(checkpoint, skeleton, ctx, reading), head_quant, skeleton.dtype.itemsize)
    need = with_cache(need, settings_of(skeleton.model.config), kv_quant)
    need = replace(need, guesses_B=guesses_B, cache_moves=cache_moves, cache_stays=need.cache_stays.union(cache_stays))
    need = replace(need, states_B=states_B or {}, beside_B=beside_B or {}, beside_ram_B=beside_ram_B or {})
    placement = place(need, _with_speeds(free_memory(device, ram_B, vram_B), folder.weights_at), offload, kv)
    check_room(placement.cache_disk_B)
    log.info("%s", placement.summary)
    with ExitStack() as undo, _memory_for(placement):
        disk = DiskStore(checkpoint, reading)
        undo.callback(disk.close)
        _fill_rest(skeleton, checkpoint, disk, torch.device(device), placement.embeddings_in_ram, head_quant)
        as_stored = not any(block.packed or block.sums for block in checkpoint.layers)
        opened = partial(open_stream, checkpoint, disk, placement, torch.device(device), link_limit_Bps, on_layer_read)
        stays = as_stored and {*placement.tiers} == {"device"}
        reorder = reorder and stays and pays(torch.device(device), skeleton.dtype)
        stream: Stream = opened(reordering(skeleton.layer_list)) if reorder else opened()
        undo.callback(stream.close)
        travelling = (block for layer, block in enumerate(checkpoint.layers) if layer not in placement.in_place)
        if any(block.packed for block in checkpoint.layers) or any(block.sums for block in travelling):
            stream = DenseLayers(stream, checkpoint, torch.device(device), placement.in_place)
        undo.pop_all()
    layers = skeleton.layer_list
    source = ModelStream(placement, stream, in_integers=checkpoint.in_integers == "all")
    for index, layer in enumerate(layers):
        layers[index] = StreamedLayer(layer, index, source)
    close_when_collected(skeleton.model, stream.close)
    return skeleton.model


def _check_integers(checkpoint: Checkpoint, device: torch.device) -> None:
    """Refuse a checkpoint that has nothing to compute with in integers; say what computes how."""
    if checkpoint.in_integers == "none":
        raise UnsupportedModel(
            f"{checkpoint.path} has no linears in int8 or int4, so nothing of it can compute in integers.",
            hint="specexec pack MODEL --quant int8 (or int4) and load the pack, or leave --compute out.",
        )
    but = "" if checkpoint.in_integers == "all" else "; experts and what is stored whole do not"
    log.info("linears of the layers compute in integers, %s%s", way(device.type), but)


@contextmanager
def _memory_for(placement: Placement) -> Iterator[None]:
    """Memory that is refused although it was free when the plan was made, as an error that names the plan."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        gpu = "" if placement.device_B is None else f" and {size(placement.device_B)} of GPU memory"
        plan = f"while loading; the plan was {size(placement.host_B)} of RAM{gpu}"
        # Another program took it meanwhile, or a limit (ulimit, container) allows less than is free.
        if scarce := refusal(error, plan, "--ram or --vram with a smaller budget, or --offload disk."):
            raise scarce from error
        raise


def stream_of(model: PreTrainedModel) -> ModelStream:
    """The stream behind a model that `load` returned."""
    layers = streamed_layers(model)
    assert layers, "this model was not loaded by offload.load"
    return layers[0].source


def _with_speeds(free: Free, folder: Path) -> Free:
    """What `doctor` measured on this machine decides what is worth moving; else what is assumed."""
    speeds = load_speeds()
    if free.vram_B is not None and speeds.link_Bps:
        now = machine("cuda")
        if changed := speeds.changed("cuda", now):
            log.info("the speed of the link is assumed: it was measured with %s", "; ".join(changed))
        speeds = speeds.valid_under("cuda", now)
    disk = speeds.disks.get(disk_key(folder))
    return replace(free, disk_Bps=disk.Bps if disk else free.disk_Bps, link_Bps=speeds.link_Bps or free.link_Bps)


def _need(checkpoint: Checkpoint, skeleton: Skeleton, ctx: int, reading: Reading) -> Need:
    """The exact need of a checkpoint that has been laid out."""
    rest = dict.fromkeys(PARTS, 0)
    for block in checkpoint.rest:
        rest[part_of(block.label)] += block.kept_B
    settings = settings_of(skeleton.model.config)
    widths = cache_widths(settings)
    need = Need(
        layers_B=tuple(block.size_B for block in checkpoint.layers),
        read_B=tuple(block.read_B for block in checkpoint.layers),
        embeddings_B=rest["embeddings"],
        norms_B=rest["norms"],
        head_B=rest["head"],
        cache_B=sum(widths) * ctx * skeleton.dtype.itemsize,
        cache_widths=widths,
        cache_stays=shared_caches(settings),
        lookups_B=rest["lookups"],
        ctx=ctx,
        scratch_B=scratch_B(checkpoint.scratch_B, reading),
        dense_B=checkpoint.dense_B,
        passing_B=passing_B(
            (shape for block in checkpoint.layers for shape in _passing(block)),
            (weight.tables_B for block in checkpoint.layers for item in block.packed for _, weight in item.sources),
        ),
    )
    few = next((weight for block in checkpoint.rest if (weight := _stored_head(block))), None)
    return need if few is None else stored_head(need, (few.shape[0], few.shape[1]), skeleton.dtype.itemsize)


def _passing(block: Block) -> Iterator[tuple[int, ...]]:
    """The shapes of what is dequantised or changed when its layer's turn comes."""
    for item in block.packed:
        yield from (weight.shape for _, weight in item.sources)
    shapes = {piece.name: piece.shape for piece in block.pieces}
    for one in block.sums:
        yield from ((shapes[b][0], shapes[a][1]) for b, a, _ in one.products)


def _stored_head(block: Block) -> Quantised | None:
    """A head that a pack keeps in four bits, and that stays so."""
    weights = [weight for item in block.packed for _, weight in item.sources]
    stays = len(weights) == 1 and weights[0].stays and not block.sums
    return weights[0] if part_of(block.label) == "head" and stays else None


def _fill_rest(
    skeleton: Skeleton,
    checkpoint: Checkpoint,
    disk: DiskStore,
    device: torch.device,
    embeddings_in_ram: bool,
    head_quant: FourBits,
) -> None:
    """Embeddings, norms and head into memory, where they stay; tied weights share theirs."""
    model = skeleton.model
    stored: set[str] = set()
    in_ram: set[nn.Module] = set()
    rounded: Rounded | None = None
    for block in checkpoint.rest:
        arena = Arena(block.size_B)
        disk.read_block(block, arena)
        if few := _stored_head(block):
            found = block.views(arena.flat)
            rounded = found[few.members["codes"].name], found[few.members["absmax"].name]
            stored.add(block.label)
            continue
        part = part_of(block.label)
        stays = (embeddings_in_ram and part == "embeddings") or (device.type != "cpu" and part == "lookups")
        dense = block.dense(block.views(arena.flat), Arena(block.dense_B).flat)
        for name, tensor in with_products(block, dense).items():
            on_the_way = head_quant != "none" and part == "head"  # its codes go on
            _assign(model, name, tensor if stays or on_the_way else tensor.to(device))
            stored.add(name)
            if stays:
                in_ram.add(model.get_submodule(name.rpartition(".")[0]))
    # Where both of a pair are stored each is what it says, as it was counted: the head never follows into RAM.
    # Layers that share tensors borrow them one by one.
    for target, source in [*model.all_tied_weights_keys.items()]:
        if {target, source} <= stored or target.startswith(f"{skeleton.layers}."):
            del model.all_tied_weights_keys[target]
    missing = {name for name in model.all_tied_weights_keys if name not in stored}
    missing |= {name for name in model.all_tied_weights_keys.values() if name not in stored}
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    if rounded or head_quant != "none":
        quantise_head(model, device, rounded)
    model.requires_grad_(False)
    for embedding in in_ram:
        _look_up_in_ram(embedding, device)
    for path, module in model.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer if module in in_ram else buffer.to(device)
        inside = f"{path}.".startswith(f"{skeleton.layers}.")
        bare = [key for key, tensor in module._parameters.items() if tensor is not None and tensor.is_meta]
        assert inside or not bare, f"{path} has no weights for {bare}"


def _look_up_in_ram(embedding: nn.Module, device: torch.device) -> None:
    """Token ids come to the matrix, and only their rows go to the device."""
    embedding.register_forward_pre_hook(lambda _, asked: tuple(ids.cpu() for ids in asked))
    embedding.register_forward_hook(lambda _, __, rows: rows.to(device))


def _assign(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    if key in module._parameters:
        module._parameters[key] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[key] = tensor
