"""A streamed model computes, bit for bit, what transformers computes with the same checkpoint."""

import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import offload
from offload.checkpoint.headers import open_folder
from offload.checkpoint.layout import lay_out
from offload.checkpoint.skeleton import build
from offload.checkpoint.tensors import ALIGN_B
from tests.tiny import FAMILIES, LAYERS, greedy, logits_of, tiny

MODES: tuple[offload.Offload, ...] = ("none", "ram", "disk")
PROMPT = torch.arange(2, 32)[None]


def reference(path: Path, dtype: torch.dtype = torch.float32, **options: str) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options)
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    return logits_of(model, PROMPT)


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_equals_resident_equals_transformers(family: str, tmp_path: Path) -> None:
    tiny(family, tmp_path)
    theirs = reference(tmp_path)
    for tier in MODES:
        ours = offload.load(tmp_path, tier)
        assert torch.equal(logits(ours), logits(theirs)), tier
        assert torch.equal(greedy(ours, PROMPT, 8), greedy(theirs, PROMPT, 8)), tier
        offload.stream_of(ours).close()


@pytest.mark.parametrize("layers", [1, 3])
def test_one_layer_and_layers_of_unequal_size_stream_like_any(layers: int, tmp_path: Path) -> None:
    # The first layer of a deepseek is dense, the others are experts; the ring holds the largest.
    tiny("deepseek_v3", tmp_path, num_hidden_layers=layers, first_k_dense_replace=1, intermediate_size=512)
    expected = logits(reference(tmp_path))
    for tier in MODES:
        ours = offload.load(tmp_path, tier)
        need = offload.stream_of(ours).placement.need
        assert len(set(need.layers_B)) == min(layers, 2)
        for _ in range(3):
            assert torch.equal(logits(ours), expected), tier
        offload.stream_of(ours).close()


@pytest.mark.parametrize("family", ["llama_tied", "phi3", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_shards_and_conversions_change_nothing(family: str, tmp_path: Path) -> None:
    tiny(family, tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 4
    for dtype in (torch.bfloat16, torch.float16):
        theirs, ours = reference(tmp_path, dtype), offload.load(tmp_path, "disk", dtype=dtype)
        assert torch.equal(logits(ours), logits(theirs)), dtype
        offload.stream_of(ours).close()


def test_conversion_in_slices_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny("mixtral", tmp_path)
    monkeypatch.setattr("offload.stream.store.SCRATCH_B", 1000)
    monkeypatch.setattr("offload.checkpoint.block.SCRATCH_B", 1000)
    ours = offload.load(tmp_path, "disk", dtype="bf16")
    assert torch.equal(logits(ours), logits(reference(tmp_path, torch.bfloat16)))


def test_hidden_states_and_attentions_are_recorded(tmp_path: Path) -> None:
    tiny("llama", tmp_path)
    theirs, ours = reference(tmp_path, attn_implementation="eager"), offload.load(tmp_path, "disk")
    ours.set_attn_implementation("eager")
    with torch.no_grad():
        expected = theirs(PROMPT, output_hidden_states=True, output_attentions=True)
        found = ours(PROMPT, output_hidden_states=True, output_attentions=True)
    assert len(found.hidden_states) == LAYERS + 1
    assert len(found.attentions) == LAYERS
    pairs = zip(found.hidden_states + found.attentions, expected.hidden_states + expected.attentions, strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_default_dtype_is_the_checkpoints_own(tmp_path: Path) -> None:
    tiny("llama", tmp_path)
    reference(tmp_path, torch.bfloat16).save_pretrained(tmp_path)
    assert offload.load(tmp_path, "disk").dtype == torch.bfloat16
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({key: config[key] for key in config if key != "dtype"}))
    assert offload.load(tmp_path, "disk").dtype == torch.bfloat16


def test_tied_weights_share_memory_unless_both_are_stored(tmp_path: Path) -> None:
    """Of two that are stored each stays its own, as in transformers."""
    expected = logits(tiny("llama_tied", tmp_path))
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    embedding = stored.pop("model.embed_tokens.weight")
    for names in (["lm_head.weight"], ["lm_head.weight", "model.embed_tokens.weight"]):
        save_file(stored | {name: embedding.clone() for name in names}, file, metadata={"format": "pt"})
        model = offload.load(tmp_path, "disk")
        assert torch.equal(logits(model), expected)
        head, embeddings = (model.get_parameter(name) for name in ("lm_head.weight", "model.embed_tokens.weight"))
        assert (head is embeddings) == (len(names) == 1)


def test_generation_settings_come_with_the_model(tmp_path: Path) -> None:
    tiny("llama", tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    model = offload.load(tmp_path, "disk")
    assert model.generation_config is not None
    assert model.generation_config.eos_token_id == [7, 9]


@pytest.mark.parametrize("in_place", [False, True])
def test_every_streamed_tensor_is_aligned_as_its_device_wants_it(in_place: bool, tmp_path: Path) -> None:
    tiny("qwen3_moe", tmp_path, intermediate_size=99, moe_intermediate_size=13)
    folder = open_folder(tmp_path)
    skeleton = build(folder, None)
    checkpoint = lay_out(folder, skeleton, in_place=in_place)
    offsets = [piece.offset for block in checkpoint.layers for piece in block.pieces]
    assert len(checkpoint.layers) == LAYERS
    assert all(offset % (4 if in_place else ALIGN_B) == 0 for offset in offsets)


def test_layers_hold_nothing_outside_their_turn(tmp_path: Path) -> None:
    tiny("llama", tmp_path)
    model = offload.load(tmp_path, "disk")
    logits(model)
    layer = model.model.layers[0]
    assert layer.self_attn.q_proj.weight.is_meta
    assert not any(parameter.is_meta or parameter.requires_grad for parameter in model.parameters())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = set(file.keys())
    assert set(model.state_dict()) == {name for name in stored if ".layers." not in name}


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_layers_in_chunks_visit_the_weights_once(family: str, tmp_path: Path) -> None:
    tiny(family, tmp_path)
    model = offload.load(tmp_path, "disk")
    layers = model.model.layers
    rows = torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(40)[None]
    with torch.no_grad():
        angles = model.model.rotary_emb(rows, positions)
        # One row sees only itself under a cache-less call of one row: chunks of one are forty separate texts.
        layers[0].chunk_rows = 1
        before = offload.stream_of(model).stats().layers_read
        chunked = layers[0](rows, attention_mask=None, position_ids=positions, position_embeddings=angles)
        visits = offload.stream_of(model).stats().layers_read - before
        layers[0].chunk_rows = None
        alone = [
            layers[0](
                rows[:, i : i + 1],
                attention_mask=None,
                position_ids=positions[:, i : i + 1],
                position_embeddings=tuple(angle[:, i : i + 1] for angle in angles),
            )
            for i in range(40)
        ]
    assert visits == 1
    assert torch.equal(chunked, torch.cat(alone, dim=1))


def test_no_chunk_is_kept_beside_the_rows_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny("llama", tmp_path)
    model = offload.load(tmp_path, "disk")
    layer = model.model.layers[0]
    layer.chunk_rows, kept = 4, list[weakref.ref[torch.Tensor]]()
    run = layer.inner.forward

    def watched(hidden: torch.Tensor, **kwargs: object) -> torch.Tensor:
        assert not any(chunk() is not None for chunk in kept[:-1])
        assert hidden.stride(0) == hidden[0].numel(), "else torch copies the weight of every linear (torch 2.13)"
        chunk: torch.Tensor = run(hidden, **kwargs)
        kept.append(weakref.ref(chunk))
        return chunk

    monkeypatch.setattr(layer.inner, "forward", watched)
    rows, positions = torch.randn(1, 40, 64), torch.arange(40)[None]
    with torch.no_grad():
        angles = model.model.rotary_emb(rows, positions)
        layer(rows, attention_mask=None, position_ids=positions, position_embeddings=angles)
    assert len(kept) == 10


def test_chunks_leave_masked_and_batched_calls_whole(tmp_path: Path) -> None:
    tiny("llama", tmp_path)
    model, theirs = offload.load(tmp_path, "disk"), reference(tmp_path)
    for layer in model.model.layers:
        layer.chunk_rows = 4
    batch = torch.cat([PROMPT, PROMPT + 32])
    assert torch.equal(logits_of(model, batch), logits_of(theirs, batch))


def test_closed_stream_says_so(tmp_path: Path) -> None:
    tiny("llama", tmp_path)
    model = offload.load(tmp_path, "disk")
    offload.stream_of(model).close()
    offload.stream_of(model).close()
    with pytest.raises(offload.ReadFailed, match="was closed"):
        logits(model)
