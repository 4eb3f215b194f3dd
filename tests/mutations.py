"""Files of every format, damaged at random: headers, settings and names. What is accepted must add up."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from offload.checkpoint.contents import ADAPTER, SINGLE
from offload.checkpoint.documents import CONFIG
from offload.checkpoint.gguf.header import read_gguf
from offload.checkpoint.headers import ITEM_B, Folder, open_folder
from offload.checkpoint.lora import WEIGHTS, with_adapters
from offload.checkpoint.quantized.formats import dequantise
from offload.checkpoint.quantized.quantize import CONFIGS, Quant, quantise
from offload.checkpoint.quantized.stored import check_orders, fold
from offload.checkpoint.tensors import DTYPES, load_entry
from offload.errors import OffloadError
from offload.placement.requirements import need_of
from tests.adapters import adapter
from tests.gguf_files import Kind, write_gguf
from tests.quantised_files import Stored, folder
from tests.test_gguf_architectures import MODELS
from tests.test_quantised_formats import FORMATS

O, I = 32, 64
NAME = "model.layers.0.self_attn.q_proj"
VALUES: tuple[Any, ...] = (
    None,
    0,
    -1,
    1,
    3,
    7,
    1 << 40,
    1 << 63,
    -2.5,
    1e300,
    "",
    "x",
    "F16",
    "../x",
    True,
    [],
    {},
    [-1],
)
FAULT = "fault:"
MOST = 16  # a weight may become so many times as large as its file


@dataclass(frozen=True)
class Sample:
    """One format's files, of which `files` are damaged, and what reads them: from headers to dense weights."""

    files: tuple[Path, ...]
    read: Callable[[], Folder]


def samples(at: Path) -> Iterator[tuple[str, Sample]]:
    """A few weights in every format, by its name; the files lie below `at`."""
    chance = torch.Generator().manual_seed(0)
    weight = torch.randn(O, I, generator=chance)
    made: dict[str, tuple[Any, Stored]] = {"plain": (None, {f"{NAME}.weight": weight})}
    for name, (config, store) in FORMATS.items():
        made[name] = config, store(NAME, weight)
    quants: tuple[Quant, ...] = ("int8", "int4", "nf4")
    for quant in quants:
        made[quant] = CONFIGS.get(quant, {"quant_method": "specexec"}), quantise(weight, f"{NAME}.weight", quant)
    blocks = {f"{NAME}.weight": weight.to(torch.float8_e4m3fn), f"{NAME}.weight_scale_inv": torch.ones(2, 2)}
    made["fp8"] = {"quant_method": "fp8", "weight_block_size": [16, 32]}, blocks
    codes = torch.randint(256, (2, O, I // 32, 16), generator=chance).to(torch.uint8)
    made["mxfp4"] = {"quant_method": "mxfp4"}, {"x_blocks": codes, "x_scales": codes[..., 0]}
    for name, (config, tensors) in made.items():
        path = at / name
        path.mkdir(parents=True)
        folder(path, config, {**tensors, "model.norm.weight": torch.ones(I)})
        yield name, Sample((path / SINGLE, path / CONFIG), lambda path=path: open_folder(path))  # type: ignore[misc]
    adapter(at / "lora", {NAME: (O, I)}, config={"rank_pattern": {"k_proj": 3}})
    base, files = open_folder(at / "plain"), (at / "lora" / WEIGHTS, at / "lora" / ADAPTER)
    yield "lora", Sample(files, lambda: with_adapters(base, [str(at / "lora")]))
    for name in ("tied", "gpt_oss", "deepseek_v3", "qwen35", "qwen3next", "gemma4"):
        file = write_gguf(MODELS[name](at / f"dense_{name}"), at / f"{name}.gguf", Kind.Q8_0)
        yield f"gguf_{name}", Sample((file,), lambda file=file: open_folder(file))  # type: ignore[misc]


def damaged(content: bytes, file: Path, chance: random.Random) -> bytes:
    """The content of a file with one to three faults in what describes it."""
    if file.suffix == ".gguf":
        start, end = 0, min(one.offset for one in read_gguf(file).tensors)
    elif file.suffix == ".safetensors":
        start, end = 8, 8 + int.from_bytes(content[:8], "little")
    else:
        start, end = 0, len(content)
    text = content[start:end]
    by_bytes = file.suffix == ".gguf" or chance.random() < 0.15
    for _ in range(chance.randint(1, 3)):
        text = _bytes(text, chance) if by_bytes else _json(text, chance, header=start == 8)
    if start == 8:
        length = len(text) if chance.random() < 0.95 else chance.choice((0, 7, len(text) + 9, 1 << 40, (1 << 64) - 1))
        return length.to_bytes(8, "little") + text + content[end:]
    whole = text + content[end:]
    return whole if chance.random() < 0.95 else whole[: chance.randrange(len(whole))]


def _bytes(text: bytes, chance: random.Random) -> bytes:
    place, width = chance.randrange(len(text) + 1), chance.choice((1, 1, 4, 8))
    small = chance.randrange(999).to_bytes(8, "little")
    new = chance.choice((chance.randbytes(width), b"\xff" * width, b"\0" * width, small))
    return text[:place] + new[:width] + text[place + chance.choice((width, width, width, 0)) :]


def _json(text: bytes, chance: random.Random, header: bool) -> bytes:
    try:
        document = json.loads(text)
    except ValueError:
        return text
    entries = [name for name in document if name != "__metadata__"] if isinstance(document, dict) else []
    if header and entries and chance.random() < 0.7:
        _entry(document, entries, chance)
    else:
        _node(document, chance)
    return json.dumps(document).encode()


def _entry(document: dict[str, Any], entries: list[str], chance: random.Random) -> None:
    """A header that still describes all bytes, and says something else of them."""
    name, other = chance.choice(entries), chance.choice(entries)
    one = document[name]
    kind = chance.randrange(4)
    if kind == 0:
        document[name], document[other] = document[other], one
    elif kind == 1:
        new = chance.choice((name + "_x", name.rpartition("_")[0], other + ".weight", name.replace("0", "7"), "x"))
        document[new] = document.pop(name)
    elif isinstance(one, dict) and isinstance(one.get("shape"), list) and str(one.get("dtype")) in ITEM_B:
        try:
            nbytes = int(math.prod(one["shape"]) * ITEM_B[one["dtype"]])
        except (TypeError, ValueError, OverflowError):
            return
        dtype = chance.choice([dtype for dtype, size in ITEM_B.items() if nbytes % size == 0] or ["U8"])
        count = nbytes // ITEM_B[dtype] if kind == 2 else nbytes // ITEM_B[one["dtype"]]
        rows = chance.choice([rows for rows in (1, 2, 3, 8, 32, 64) if count % rows == 0])
        one["dtype"] = dtype if kind == 2 else one["dtype"]
        one["shape"] = chance.choice(([rows, count // rows], [count], [1, rows, count // rows], [count // rows, rows]))


def _node(document: Any, chance: random.Random) -> None:
    """Any value of a document changed, any key gone or called otherwise."""
    places = [(document, key) for key in (document if isinstance(document, dict) else range(len(document)))]
    for holder, key in places:
        value = holder[key]
        if isinstance(value, dict | list):
            places += [(value, inner) for inner in (value if isinstance(value, dict) else range(len(value)))]
    if not places:
        return
    holder, key = chance.choice(places)
    kind = chance.randrange(4)
    if kind == 0 and isinstance(holder, dict):
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[str(key)[::-1]] = holder.pop(key)
    elif kind == 2 and isinstance(holder[key], int):
        holder[key] = chance.choice((holder[key] + 1, holder[key] - 1, 2 * holder[key], holder[key] // 2))
    else:
        holder[key] = chance.choice(VALUES)


def read_whole(sample: Sample) -> None:
    """All that is computed from headers, then the dense weights. Raises OffloadError for what is refused."""
    found = sample.read()
    with suppress(OffloadError):
        fold(replace(found, here=False))
    size_B = sum(found.file_sizes.values())
    for entry in found.entries.values():
        assert entry.offset + entry.nbytes <= size_B, f"{entry.name} ends behind the files"
    folded = fold(found)
    check_orders(folded)
    need = need_of(found, 2, 64)
    assert max(need.layers_B) <= MOST * size_B + (1 << 20), "more bytes are planned than the files hold"
    for weight in folded.quantised.values():
        count = math.prod(weight.shape)
        assert 0 < count <= MOST * size_B, f"{weight.name} becomes {weight.shape}"
        members = {role: load_entry(entry, DTYPES[entry.dtype]) for role, entry in weight.members.items()}
        dequantise(weight, members, torch.empty(weight.shape))


def run(at: Path, count: int, seed: int = 0, only: str | None = None) -> Iterator[tuple[str, Counter[str]]]:
    """Damage the samples, `count` times in all; what came of it, by format: `read`, an error's code, or a FAULT.

    The file behind a fault is kept in `at`.
    """
    found = {name: sample for name, sample in samples(at) if only in (None, name)}
    for name, sample in found.items():
        chance, outcome = random.Random(f"{seed} {name}"), Counter[str]()
        read_whole(sample)
        for number in range(-(-count // len(found))):
            file = chance.choice(sample.files)
            good = file.read_bytes()
            bad = damaged(good, file, chance)
            file.write_bytes(bad)
            try:
                read_whole(sample)
                told = "read"
            except OffloadError as error:
                told = error.code
            except Exception as error:
                told = f"{FAULT} {error!r}"
                if told not in outcome:
                    (at / f"{name}-{seed}-{number}-{file.name}").write_bytes(bad)
            finally:
                file.write_bytes(good)
            outcome[told] += 1
        yield name, outcome
