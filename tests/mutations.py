"""Files of every format, damaged at random: headers, settings and names.

What is accepted must add up. What is refused is refused in few words that name a field of the file, and reading it
takes no more memory than the files' size allows.
"""

from __future__ import annotations

import base64
import json
import math
import random
import re
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from offload.checkpoint.contents import ADAPTER, INDEX, MODELOPT, PICKLED_HEADS, SINGLE
from offload.checkpoint.documents import CONFIG
from offload.checkpoint.gguf.header import read_gguf
from offload.checkpoint.headers import ITEM_B, Folder, open_folder
from offload.checkpoint.lora import WEIGHTS, with_adapters
from offload.checkpoint.quantized.formats import dequantise
from offload.checkpoint.quantized.quantize import CONFIGS, Quant, quantise
from offload.checkpoint.quantized.stored import Folded, check_orders, fold
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
# Memory that reading headers may take: their bytes as they are read, what is made of them, and what is always there.
MOST_A_BYTE, SPARE_B = 4, 128 << 10
MOST_WORDS = 2000  # of a refusal, in characters
HEADER = re.compile(
    r"begins with b|version|tensor_count|metadata_kv_count|metadata field \d+|the name of tensor \d+|tensor '"
)
DAMAGE = re.compile(r"is damaged: (.+?) (is|has|claims|ends|lies) ", re.DOTALL)


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
    yield from _layouts(at, weight)
    for name in ("tied", "gpt_oss", "deepseek_v3", "qwen35", "qwen3next", "gemma4"):
        file = write_gguf(MODELS[name](at / f"dense_{name}"), at / f"{name}.gguf", Kind.Q8_0)
        yield f"gguf_{name}", Sample((file,), lambda file=file: open_folder(file))  # type: ignore[misc]


def _layouts(at: Path, weight: torch.Tensor) -> Iterator[tuple[str, Sample]]:
    """Files that say elsewhere what they are: an index, settings of ModelOpt, Mistral's own, and a pickle."""
    held = {f"{NAME}.weight": weight, "model.norm.weight": torch.ones(I)}
    for name in ("sharded", "own_settings", PICKLED_HEADS[0], "consolidated"):
        (at / name).mkdir()
    folder(at / "sharded", None, held)
    (at / "sharded" / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(held, SINGLE)}))
    folder(at / "own_settings", None, FORMATS["modelopt"][1](NAME, weight))
    told = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    (at / "own_settings" / MODELOPT).write_text(json.dumps(told))
    folder(at / PICKLED_HEADS[0], None, held)
    (at / PICKLED_HEADS[0] / SINGLE).unlink()
    torch.save(held, at / PICKLED_HEADS[0] / PICKLED_HEADS[0])
    attention = {f"layers.0.attention.{name}.weight": torch.ones(I, I) for name in ("wq", "wk", "wv", "wo")}
    ahead = {f"layers.0.feed_forward.w{number}.weight": torch.ones(I, I) for number in (1, 2, 3)}
    norms = {f"{name}.weight": torch.ones(I) for name in ("layers.0.attention_norm", "layers.0.ffn_norm", "norm")}
    ends = {f"{name}.weight": torch.ones(290, I) for name in ("tok_embeddings", "output")}
    save_file({**attention, **ahead, **norms, **ends}, at / "consolidated" / "consolidated.safetensors")
    params: dict[str, Any] = {"dim": I, "n_layers": 1, "head_dim": 16, "hidden_dim": I, "n_heads": 4, "n_kv_heads": 4}
    params |= {"norm_eps": 1e-5, "vocab_size": 290, "rope_theta": 1e4, "sliding_window": None}
    (at / "consolidated" / "params.json").write_text(json.dumps(params))
    words = [bytes([byte]) for byte in range(256)]
    listed = [{"rank": rank, "token_bytes": base64.b64encode(word).decode()} for rank, word in enumerate(words)]
    about = {"pattern": r"\s?\w+|.", "default_vocab_size": 286, "default_num_special_tokens": 30}
    (at / "consolidated" / "tekken.json").write_text(json.dumps({"config": about, "vocab": listed}))
    damaged = {
        "sharded": (SINGLE, INDEX),
        "own_settings": (SINGLE, MODELOPT),
        PICKLED_HEADS[0]: (PICKLED_HEADS[0],),
        "consolidated": ("consolidated.safetensors", "params.json", "tekken.json"),
    }
    for name, files in damaged.items():
        path = at / name
        yield name, Sample(tuple(path / file for file in files), lambda path=path: open_folder(path))  # type: ignore[misc]


def damaged(content: bytes, file: Path, chance: random.Random) -> bytes:
    """The content of a file with one to three faults in what describes it."""
    if file.suffix == ".gguf":
        start, end = 0, min(one.offset for one in read_gguf(file).tensors)
    elif file.suffix == ".safetensors":
        start, end = 8, 8 + int.from_bytes(content[:8], "little")
    else:
        start, end = 0, len(content)
    text = content[start:end]
    by_bytes = file.suffix in (".gguf", ".pt") or chance.random() < 0.15
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


def read_headers(sample: Sample) -> tuple[Folder, Folded]:
    """All that is computed from headers. Raises OffloadError for what is refused."""
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
    return found, folded


def read_sparingly(sample: Sample) -> tuple[Folder, Folded]:
    """The same in little memory; tables of the interpreter that grow meanwhile do not do so twice."""
    most_B = MOST_A_BYTE * sum(file.stat().st_size for file in sample.files) + SPARE_B
    for _ in range(2):
        refused: OffloadError | None = None
        before_B, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        try:
            found = read_headers(sample)
        except OffloadError as error:
            refused = error
        taken_B = tracemalloc.get_traced_memory()[1] - before_B
        if taken_B <= most_B:
            if refused is not None:
                raise refused
            return found
    raise AssertionError(f"headers took {taken_B} bytes, the most for these files is {most_B}")


def read_whole(sample: Sample) -> None:
    """From headers, in little memory, to the dense weights. Raises OffloadError for what is refused."""
    found, folded = read_sparingly(sample)
    size_B = sum(found.file_sizes.values())
    for weight in folded.quantised.values():
        count = math.prod(weight.shape)
        assert 0 < count <= MOST * size_B, f"{weight.name} becomes {weight.shape}"
        members = {role: load_entry(entry, DTYPES[entry.dtype]) for role, entry in weight.members.items()}
        dequantise(weight, members, torch.empty(weight.shape))


def names_a_field(told: str, good: bytes, bad: bytes, sample: Sample, file: Path) -> bool:
    """Whether a refusal names what is wrong: a setting that was changed, a tensor, or a field of a header.

    Of a document that is none any longer, and of a pickle, the file.
    """
    if file.suffix == ".gguf":
        header, damage = read_gguf(file), DAMAGE.search(told)
        keys = [*header.metadata, *(key.partition(".")[2] for key in header.metadata)]
        known = any(one in told for one in (*keys, *(tensor.name for tensor in header.tensors)) if one)
        return known or HEADER.search(told) is not None or (damage is not None and damage[1].encode() in bad)
    before, after = _document(good, file), _document(bad, file)
    if after is None:
        return file.name in told
    if "The header ends there" in told:
        return True
    tensors = {name for one in sample.files for name in _tensors(one)}
    if file.suffix == ".safetensors" and isinstance(after, dict):
        tensors |= after.keys()
    within = [name.removeprefix("base_model.model.").partition(".lora_")[0].split(".") for name in tensors]
    modules = {".".join(parts[:count]) for parts in within for count in range(3, len(parts) + 1)}
    named = {*_changed(before, after, ""), *modules}
    return any(f"'{one}'" in told for one in tensors) or any(len(one) > 1 and one in told for one in named)


def _document(content: bytes, file: Path) -> Any:
    if file.suffix == ".safetensors":
        content = content[8 : 8 + int.from_bytes(content[:8], "little")]
    with suppress(ValueError, RecursionError):
        return json.loads(content)
    return None


def _tensors(file: Path) -> Iterator[str]:
    return iter(_document(file.read_bytes(), file)) if file.suffix == ".safetensors" else iter(())


def _changed(before: Any, after: Any, key: str) -> Iterator[str]:
    """The keys of a document, at any depth, of which something else is said."""
    if not isinstance(before, dict) or not isinstance(after, dict):
        if before != after or type(before) is not type(after):
            yield key
        return
    for name in before.keys() | after.keys():
        if name in before and name in after:
            yield from _changed(before[name], after[name], name)
        else:
            yield from (str(name), key)


def run(at: Path, count: int, seed: int = 0, only: str | None = None) -> Iterator[tuple[str, Counter[str]]]:
    """Damage the samples, `count` times in all; what came of it, by format: `read`, an error's code, or a FAULT.

    The file behind a fault is kept in `at`.
    """
    found = {name: sample for name, sample in samples(at) if only in (None, name)}
    tracemalloc.start()
    try:
        for name, sample in found.items():
            chance, outcome = random.Random(f"{seed} {name}"), Counter[str]()
            read_whole(sample)
            for number in range(-(-count // len(found))):
                file = chance.choice(sample.files)
                good = file.read_bytes()
                bad = damaged(good, file, chance)
                told = _told(sample, file, good, bad)
                if told.startswith(FAULT) and told not in outcome:
                    (at / f"{name}-{seed}-{number}-{file.name}").write_bytes(bad)
                outcome[told] += 1
            yield name, outcome
    finally:
        tracemalloc.stop()


def _told(sample: Sample, file: Path, good: bytes, bad: bytes) -> str:
    file.write_bytes(bad)
    try:
        read_whole(sample)
        return "read"
    except OffloadError as error:
        text, code = str(error), error.code
    except Exception as error:
        return f"{FAULT} {error!r}"
    finally:
        file.write_bytes(good)
    if len(text) > MOST_WORDS:
        return f"{FAULT} {len(text)} characters: {text[:200]}"
    return code if names_a_field(text, good, bad, sample, file) else f"{FAULT} no field is named: {text[:300]}"
