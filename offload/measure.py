"""How fast disk, link and arithmetic are here, measured in about two seconds each. Torch only where it must compute.

Disks are read through the code that streams weights, so that what wins here wins there.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from offload.machine.files import PAGE_B, Files, Range, Reading
from offload.machine.speeds import Arithmetic, Contention, Disk
from offload.stream.store import Arena

if TYPE_CHECKING:
    import torch
    from torch import nn

    from offload.checkpoint.quantized.weight import Quantised

MiB = 1 << 20
SAMPLE_B = 512 * MiB
SPAN_B = 64 * MiB
READINGS = tuple(
    Reading(block_B * MiB, threads, direct) for direct in (True, False) for block_B in (1, 4, 16) for threads in (1, 4)
)
# Rows of a sweep: the fewest that are ever computed, a tree, a prompt.
PROBED_ROWS = (16, 128, 512)
# The linears of a layer of a 1B: each costs a little, whatever its size.
PROBED_WEIGHTS = ((2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (8192, 2048), (8192, 2048), (2048, 8192))
PROBED_EXPERTS = 4
# How often disk and arithmetic are measured alone and together.
TURNS = 7
# Plain reads go through the page cache and push out what others keep there; one reader leaves the disk idle while it
# waits for its turn on cores that compute: both have to be worth it.
WORTH = 1.15


@dataclass(frozen=True)
class Trial:
    """One way of reading, and the bytes per second it gave."""

    reading: Reading
    Bps: float


def probe_disk(file: Path, seconds: float = 2.0) -> Disk:
    """The best way to read files like this one; the leaders of a short round run a second one."""
    trials = [Trial(reading, _read_Bps(file, reading, seconds / 2 / len(READINGS))) for reading in READINGS]
    leaders = sorted(trials, key=lambda trial: -trial.Bps)[:4]
    leaders += [max(trials, key=_merit)]
    again = [Trial(trial.reading, _read_Bps(file, trial.reading, seconds / 10)) for trial in leaders]
    return choose(again)


def choose(trials: list[Trial]) -> Disk:
    """The fastest; direct, and by several threads, unless plain reads or a single thread are clearly faster."""
    best = max(trials, key=_merit)
    return Disk(best.Bps, best.reading)


def _merit(trial: Trial) -> float:
    reading = trial.reading
    return trial.Bps * (WORTH if reading.direct else 1) * (WORTH if reading.threads > 1 else 1)


def write_sample(folder: Path) -> Path:
    """A file of noise to read, where there is no large one; the caller removes it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f".specexec-probe-{os.getpid()}"
    noise = os.urandom(16 * MiB)  # what cannot be compressed, on any disk
    with file.open("wb") as out:
        for _ in range(SAMPLE_B // len(noise)):
            out.write(noise)
        os.fsync(out.fileno())
        os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return file


def probe_contention(file: Path, disk: Disk, dtype: str, seconds: float = 3.0) -> Disk:
    """The same disk, and what it and a CPU's arithmetic leave each other where both work at once.

    Alone and together take turns, for machines with other load: what counts is the median of the ratios.
    """
    once, turn_s = _Layers("cpu", dtype).over(PROBED_ROWS[0]), seconds / (3 * TURNS)
    compute, read = [], []
    with ThreadPoolExecutor(1) as pool:
        for _ in range(TURNS):
            alone_s, alone_Bps = _typical_s(once, turn_s), _read_Bps(file, disk.reading, turn_s)
            reading = pool.submit(_read_Bps, file, disk.reading, turn_s)
            compute.append(alone_s / _typical_s(once, turn_s))
            read.append(reading.result() / alone_Bps)
    return replace(disk, contention=Contention(min(1.0, median(compute)), min(1.0, median(read))))


def probe_arithmetic(device: str, dtype: str, seconds: float = 2.0) -> Arithmetic:
    """A decoder layer as of a 1B over few, some and many rows: linears, and norms and attention beside them.

    `dtype` int8: linears in integers, the rest in bfloat16.
    """
    layers = _Layers(device, dtype)
    curve = tuple(
        (rows, _typical_s(layers.over(rows), seconds / len(PROBED_ROWS)) / layers.weights) for rows in PROBED_ROWS
    )
    (_, few_s), *_, (many, many_s) = curve
    return Arithmetic(2 * many / many_s, layers.item_B / few_s, curve)


class _Layers:
    """Decoder layers to measure with."""

    def __init__(self, device: str, dtype: str) -> None:
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

        from offload.checkpoint.skeleton import DTYPES

        in_integers = dtype == "int8"
        self._device, self._kind = device, DTYPES["bf16" if in_integers else dtype]
        self._config = LlamaConfig(
            hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8
        )
        self._config._attn_implementation = "sdpa"
        # More than a cache holds: each multiplication has to fetch its weights.
        count = 1 if device == "cpu" else 4
        self._layers = [LlamaDecoderLayer(self._config, 0).to(device, self._kind) for _ in range(count)]
        self._rotary = LlamaRotaryEmbedding(self._config).to(device)
        self.weights = sum(tensor.numel() for layer in self._layers for tensor in layer.parameters())
        self.item_B = 1 if in_integers else self._kind.itemsize
        if in_integers:
            for layer in self._layers:
                _store_in_int8(layer)

    def over(self, rows: int) -> Callable[[], None]:
        """One sweep of so many rows over them."""
        import torch

        hidden = torch.randn(1, rows, self._config.hidden_size, device=self._device).to(self._kind)
        places = self._rotary(hidden, torch.arange(rows, device=self._device)[None])

        def once() -> None:
            with torch.inference_mode():
                for layer in self._layers:
                    layer(hidden, position_embeddings=places)
            _finish(self._device)

        return once


def _store_in_int8(layer: nn.Module) -> None:
    """Linears that compute in integers from here on."""
    from offload.checkpoint.quantized.arithmetic.row_codes import RowCodes
    from offload.checkpoint.quantized.quantize import quantise_int8

    for module in layer.modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() == 2:
            module._parameters["weight"] = RowCodes.of(*quantise_int8(weight.detach()), weight.dtype)  # type: ignore[assignment]


def probe_unpack(device: str, seconds: float = 1.0) -> dict[str, float]:
    """Bytes of 16-bit weights a second that come out of few bits by scheme, by the code that every layer goes through.

    What unpacking adds to the products with a layer's weights: these take longer too when the weights were written just
    before. NF4 only where bitsandbytes is installed.
    """
    import torch

    places_B = list(accumulate((2 * O * I for O, I in PROBED_WEIGHTS), initial=0))
    scratch = torch.zeros(places_B[-1], dtype=torch.uint8, device=device)
    dense = [
        scratch[start:stop].view(torch.bfloat16).view(shape)
        for shape, (start, stop) in zip(PROBED_WEIGHTS, pairwise(places_B), strict=True)
    ]
    rows = {I: torch.randn(PROBED_ROWS[0], I, dtype=torch.bfloat16, device=device) for _, I in PROBED_WEIGHTS}

    def multiply() -> None:
        for weight in dense:
            torch.nn.functional.linear(rows[weight.shape[1]], weight)
        _finish(device)

    speeds: dict[str, float] = {}
    schemes = _few_bits(device)
    for scheme, parts in schemes.items():
        alone_s = _typical_s(multiply, seconds / len(schemes) / 4)
        added_s = _typical_s(partial(_unpack, parts, dense, multiply), seconds / len(schemes)) - alone_s
        speeds[scheme] = scratch.nbytes / max(added_s, alone_s / 100)
    return speeds


def _few_bits(device: str) -> dict[str, list[tuple[Quantised, dict[str, torch.Tensor]]]]:
    """The weights of a layer in every scheme: parts of one large one."""
    import torch

    from offload.checkpoint.entry import Entry
    from offload.checkpoint.quantized import mxfp4
    from offload.checkpoint.quantized.quantize import BLOCK, NESTED_BLOCK, quantise
    from offload.checkpoint.quantized.weight import Quantised, Scheme

    name, most = "probe.weight", max(PROBED_WEIGHTS)
    noise = torch.randn(most).to(torch.bfloat16)
    codes, scales = (tensor.to(device) for tensor in quantise(noise, name, "int8").values())
    nf4, offset = dict[str, torch.Tensor](), 0.0
    if find_spec("bitsandbytes") is not None:
        made = quantise(noise, name, "nf4")
        offset = float(json.loads(bytes(made[f"{name}.quant_state.bitsandbytes__nf4"].tolist()))["nested_offset"])
        roles = {"codes": name} | {role: f"{name}.{role}" for role in ("absmax", "nested_absmax", "nested_quant_map")}
        nf4 = {role: made[key].to(device) for role, key in roles.items()}
    blocks = torch.randint(256, (noise.numel() // mxfp4.BLOCK, mxfp4.BLOCK // 2), dtype=torch.uint8, device=device)
    powers = torch.full(blocks.shape[:1], 127, dtype=torch.uint8, device=device)

    def weight(scheme: Scheme, shape: tuple[int, int]) -> tuple[Quantised, dict[str, torch.Tensor]]:
        (O, I), count = shape, shape[0] * shape[1]
        match scheme:
            case "int8":
                held = {"codes": codes.view(-1)[:count].view(shape), "scales": scales[:O]}
            case "mxfp4":
                groups = PROBED_EXPERTS, O // PROBED_EXPERTS, I // mxfp4.BLOCK
                held = {"codes": blocks[: count // mxfp4.BLOCK].view(*groups, -1)}
                held["scales"] = powers[: count // mxfp4.BLOCK].view(groups)
            case _:
                sizes = {"codes": count // 2, "absmax": count // BLOCK, "nested_absmax": count // BLOCK // NESTED_BLOCK}
                held = {role: tensor[: sizes.get(role)] for role, tensor in nf4.items()}
        entries = {role: Entry(role, Path(), 0, 0, "U8", ()) for role in held}
        return Quantised(name, scheme, shape, entries, "BF16", offsets=(offset,) if scheme == "nf4" else ()), held

    present: tuple[Scheme, ...] = ("nf4", "int8", "mxfp4") if nf4 else ("int8", "mxfp4")
    return {scheme: [weight(scheme, shape) for shape in PROBED_WEIGHTS] for scheme in present}


def _unpack(
    parts: Items[tuple[Quantised, Mapping[str, torch.Tensor]]], dense: Items[torch.Tensor], multiply: Callable[[], None]
) -> None:
    from offload.checkpoint.quantized.formats import dequantise

    for (weight, members), target in zip(parts, dense, strict=True):
        O, I = weight.shape
        stacked = weight.scheme == "mxfp4"
        dequantise(weight, members, target.view(PROBED_EXPERTS, I, O // PROBED_EXPERTS) if stacked else target)
    multiply()


def probe_link(device: str, seconds: float = 2.0) -> float:
    """Bytes per second of copies from pinned memory to the device."""
    import torch

    source = torch.empty(256 * MiB, dtype=torch.uint8).pin_memory()
    target = torch.empty(256 * MiB, dtype=torch.uint8, device=device)

    def copy() -> None:
        target.copy_(source, non_blocking=True)
        _finish(device)

    return source.nbytes / _typical_s(copy, seconds)


def _read_Bps(file: Path, reading: Reading, seconds: float) -> float:
    size_B = file.stat().st_size
    span_B = min(SPAN_B, size_B // PAGE_B * PAGE_B)
    arena = Arena(span_B)
    files = Files({file: size_B}, reading)
    offset = read_B = 0
    # Opening, threads and the first touch of memory happen once per model, not once per sweep.
    files.read([Range(file, 0, (arena.bytes,))], "probe")
    with file.open("rb") as cached:
        os.posix_fadvise(cached.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # what memory holds is not the disk's speed
    started_s = time.perf_counter()
    while (spent_s := time.perf_counter() - started_s) < seconds or not read_B:
        offset = offset + span_B if offset + 2 * span_B <= size_B else 0
        files.read([Range(file, offset, (arena.bytes,))], "probe")
        read_B += span_B
        spent_s = time.perf_counter() - started_s
    files.close()
    return read_B / spent_s


def _finish(device: str) -> None:
    """Wait for what was issued."""
    import torch

    if device != "cpu":
        torch.cuda.synchronize(device)


def _typical_s(work: Callable[[], None], seconds: float) -> float:
    """The median after a warm-up; other load on the machine is part of it."""
    work()
    times: list[float] = []
    started_s = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - started_s < seconds:
        at_s = time.perf_counter()
        work()
        times.append(time.perf_counter() - at_s)
    return median(times)
