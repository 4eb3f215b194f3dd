"""What `plan` promises is what `load` asks for, to the byte, whatever was set."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest

import offload
import specexec
from cli.models.outlook import row_of
from offload import Free, OffloadError, need_of, open_folder, place, with_head
from offload.checkpoint import headers
from offload.hub.names import demo_folder, user_file
from offload.machine.speeds import Arithmetic
from offload.placement.forecast import Ceilings
from offload.placement.placement import Need, Placement
from offload.placement.quantized_sizes import work_of
from offload.units import GiB
from specexec.compose import drafter_factory, load
from specexec.compose.load_options import ALLOWED, LoadOptions
from specexec.compose.memory_plan import LoadRequest
from specexec.drafters.registry import check_models, parse
from specexec.errors import BadDrafter
from specexec.model.architecture import context_for

SETTINGS = 200
SIZES = {  # hidden, layers, heads, heads of keys and values, width of the MLP, tied
    "70b": (8192, 80, 64, 8, 28672, False),
    "8b": (4096, 32, 32, 8, 14336, False),
    "1b": (2048, 16, 32, 8, 8192, True),
}
CEILINGS = Ceilings(1e9, 1e10, Arithmetic(1e12, 1e10), {})


class Reached(Exception):
    """Loading has decided everything and would read weights now."""


def headers_only(folder: Path, size: str) -> Path:
    """A Llama of a real shape whose weights are a hole in the file."""
    hidden, layers, heads, kv_heads, ff, tied = SIZES[size]
    kv = kv_heads * hidden // heads
    shapes = {"model.embed_tokens.weight": [128256, hidden], "model.norm.weight": [hidden]}
    shapes |= {} if tied else {"lm_head.weight": [128256, hidden]}
    each = {
        "input_layernorm": [hidden], "post_attention_layernorm": [hidden],
        "self_attn.q_proj": [hidden, hidden], "self_attn.k_proj": [kv, hidden], "self_attn.v_proj": [kv, hidden],
        "self_attn.o_proj": [hidden, hidden], "mlp.gate_proj": [ff, hidden], "mlp.up_proj": [ff, hidden],
        "mlp.down_proj": [hidden, ff],
    }  # fmt: skip
    shapes |= {f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in each.items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden, "dtype": "bfloat16",
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "intermediate_size": ff, "vocab_size": 128256, "max_position_embeddings": 131072, "tie_word_embeddings": tied,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_folder("target") / name, folder / name)
    return folder


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Three sizes; the middle one goes by a name and is paired with the smallest."""
    monkeypatch.setenv("SPECEXEC_HOME", str(tmp_path / "home"))
    found = {size: headers_only(tmp_path / size, size) for size in SIZES}
    user_file().parent.mkdir(parents=True)
    pair = (f'target = "{found["8b"]}"', f'drafter = "{found["1b"]}"')
    user_file().write_text("[alias.paired]\n" + "\n".join(pair) + "\n")
    return found


def setting(chance: Random, models: dict[str, Path]) -> tuple[str, LoadOptions, Free]:
    """A model, how to load it, and the memory that is free."""
    small, middle = str(models["1b"]), str(models["8b"])
    model = chance.choice(["paired", str(models["70b"]), middle, small])
    drafter = chance.choice(
        ["none", "auto", "auto", "ngram", small, f"{small}+ngram", f"{small}+{middle}+ngram"]
        + (["sibling", "sibling+ngram"] if model == "paired" else [])
    )
    drafts = bool({"none", "auto", "ngram"}.isdisjoint({drafter}))
    on_gpu = chance.random() < 0.6
    options = LoadOptions(
        drafter=drafter,
        draft_vocab=chance.choice([None, 1000, 4000]) if drafts else None,
        draft_window=chance.choice([None, 256, 4096]) if drafts else None,
        drafter_device=chance.choice(ALLOWED["drafter_device"]) if drafts else "auto",  # type: ignore[arg-type]
        drafter_quant=chance.choice(["none", "nf4", "hqq4"]) if drafts else "none",
        head_quant=chance.choice(ALLOWED["head_quant"]),  # type: ignore[arg-type]  # of the few that it may be
        offload=chance.choice(ALLOWED["offload"]),  # type: ignore[arg-type]
        budget=chance.choice(["auto", 0, 1, 32, 500, 4096]),
        device="cuda" if on_gpu else "cpu",
        dtype=chance.choice(ALLOWED["dtype"]),
        ctx=chance.choice([None, 1, 512, 4096, 131072]),
    )
    ram_B, vram_B = (int(chance.uniform(least, 256) * GiB) for least in (4, 2))
    margin_B = chance.choice([0, GiB])
    free = Free(ram_B, vram_B // 3 if on_gpu else None, ram_margin_B=margin_B, vram_margin_B=margin_B)
    return model, options, free


def promised(model: str, options: LoadOptions, free: Free) -> tuple[Need, Placement | OffloadError]:
    """As `plan` goes about it."""
    choice = parse(options.drafter, offload.known)
    folder = offload.list_model(model, offline=True)
    drafters = offload.resolve(model, choice.models, offline=True).drafters
    check_models(choice, drafters, model)
    context = context_for(options.ctx, 131072)
    request = LoadRequest.of(folder, tuple(map(open_folder, drafters)), options, context, free)
    row = row_of(request, choice, free, CEILINGS, work_of(folder, "none", request.item_B(folder)))
    found = row.placement or row.refusal
    assert found is not None
    return row.need, found


def asked_for(
    model: str, options: LoadOptions, free: Free, monkeypatch: pytest.MonkeyPatch
) -> tuple[Need, Placement | OffloadError]:
    """What `load` hands to offload, placed as offload places it."""
    handed: dict[str, Any] = {}

    def reached(path: Path, mode: offload.Offload, device: str, dtype: object, **rest: object) -> None:
        handed.update(rest, path=path, mode=mode, dtype=dtype)
        raise Reached

    monkeypatch.setattr(offload, "free_memory", lambda *_: free, raising=False)
    monkeypatch.setattr(offload, "load", reached, raising=False)
    with pytest.raises(Reached):
        specexec.load(model, replace(options, offline=True))
    folder = open_folder(handed["path"])
    item_B = handed["dtype"].itemsize if handed["dtype"] else offload.item_B(folder)
    need = with_head(folder, need_of(folder, item_B, handed["ctx"]), handed["head_quant"], item_B)
    given = {name: handed[name] for name in ("beside_B", "beside_ram_B", "guesses_B", "cache_moves")}
    need = replace(need, **given)
    try:
        return need, place(need, replace(free, disk_Bps=CEILINGS.disk_Bps, link_Bps=CEILINGS.link_Bps), handed["mode"])
    except OffloadError as refusal:
        return need, refusal


def test_plan_promises_what_load_asks_for_to_the_byte(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    chance, placed = Random(21), 0
    monkeypatch.setattr(load, "encoding_in", cache(load.encoding_in))
    monkeypatch.setattr(headers, "read_header", cache(headers.read_header))
    monkeypatch.setattr(drafter_factory, "encoding_in", load.encoding_in)
    for number in range(SETTINGS):
        model, options, free = setting(chance, models)
        (plan_need, plan_found), (load_need, load_found) = (
            promised(model, options, free),
            asked_for(model, options, free, monkeypatch),
        )
        assert plan_need == load_need, (number, options)
        if isinstance(plan_found, Placement):
            assert isinstance(load_found, Placement), (number, load_found)
            assert plan_found == load_found, (number, options)
            assert plan_found.host_parts_B == load_found.host_parts_B
            assert plan_found.device_parts_B == load_found.device_parts_B
            placed += 1
        else:
            assert str(plan_found) == str(load_found), (number, options)
    assert 0.3 * SETTINGS < placed < 0.95 * SETTINGS, "some fit, some do not"


def test_a_drafter_on_the_cpu_takes_ram_and_none_of_the_gpu(models: dict[str, Path]) -> None:
    options = LoadOptions(drafter=str(models["1b"]), ctx=4096, budget=32, device="cuda")
    model, free = str(models["8b"]), Free(64 * GiB, 8 * GiB)
    apart, placed = promised(model, replace(options, drafter_device="cpu"), free)
    all_there, _ = promised(model, replace(options, device="cpu"), replace(free, vram_B=None))
    assert apart.beside_B["drafter"] == 0
    assert apart.beside_ram_B["drafter"] == all_there.beside_B["drafter"]
    assert isinstance(placed, Placement)
    assert placed.host_parts_B["drafter"] == apart.beside_ram_B["drafter"]
    assert "drafter" not in placed.device_parts_B


def test_a_device_for_a_drafter_that_is_none_is_refused() -> None:
    with pytest.raises(BadDrafter, match="--drafter-device"):
        specexec.load(drafter="ngram", drafter_device="cpu")
