"""Models with recurrent layers verify trees: each node has what one plain forward over its own path has.

References are unmodified transformers models, forwards over whole paths without cache; and the recurrences
themselves, one token after the other in float64.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import offload
from cli.engine.prefix_chain import PrefixChain
from offload.checkpoint.documents import Json
from offload.checkpoint.headers import open_folder
from offload.packs.pack import pack, plan
from offload.placement.requirements import cache_widths, without_keys
from specexec.compose.drafter_makers import in_few_bits
from specexec.drafters.ngram import NgramDrafter
from specexec.drafters.none import NoDrafter
from specexec.drafters.sibling import SiblingDrafter
from specexec.drafters.skip import skipping
from specexec.drafters.substitute import substituting
from specexec.engine.decoder import Decoder
from specexec.errors import SweepCancelled
from specexec.model.cache import KVCache
from specexec.model.recurrent.channel_state import ChannelRows
from specexec.model.recurrent.delta_rule import channel_rows, delta_rows
from specexec.model.recurrent.linear_state import LinearRows
from specexec.model.recurrent.packed import branches_of, restored
from specexec.model.recurrent.scan import StateRows, scan
from specexec.model.recurrent.selective_state import SelectiveRows
from specexec.model.recurrent.sizes import recurrences_of
from specexec.model.sublayers import names_of
from specexec.model.submodel import layer_list_path, partial_config
from specexec.model.tree_lm import Rows, TreeLM, trunk_name
from specexec.planning.best_first import BestFirst
from specexec.sampling.params import SamplingParams
from specexec.sizes import SNAPSHOTS
from tests.tiny import BASE, VOCABULARY, Option, redraw
from tests.writing import greedy, last_rows, path_to, prompt, random_tree, sequence_of, write

MIXED: dict[str, Option] = {
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
LINEAR: dict[str, Option] = {
    **MIXED,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
}
SHORT: dict[str, Option] = {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}
EXPERTS: dict[str, Option] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
}
MAMBA: dict[str, Option] = {
    "num_hidden_layers": 3,
    "mamba_n_heads": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 12,
    "mamba_chunk_size": 16,
}
LATENT: dict[str, Option] = {
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
# By model_type: config class, and what differs from BASE.
FAMILIES: dict[str, tuple[str, dict[str, Option]]] = {
    "qwen3_next": ("Qwen3NextConfig", LINEAR | EXPERTS),
    "qwen3_5_text": ("Qwen3_5TextConfig", LINEAR),
    "qwen3_5_moe_text": ("Qwen3_5MoeTextConfig", LINEAR | EXPERTS),
    "olmo_hybrid": ("OlmoHybridConfig", LINEAR),
    "lfm2": ("Lfm2Config", SHORT),
    "lfm2_moe": ("Lfm2MoeConfig", SHORT | EXPERTS | {"num_dense_layers": 1}),
    "lfm3": ("Lfm3Config", {**SHORT, "layer_types": ["conv", "sliding_attention", "conv"], "sliding_window": 8}),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        MAMBA | MIXED | {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 48},
    ),
    "bamba": ("BambaConfig", {**MAMBA, "attn_layer_indices": [1]}),
    "falcon_h1": ("FalconH1Config", {**MAMBA, "mamba_d_ssm": 96, "mamba_rms_norm": True, "lm_head_multiplier": 0.5}),
    "nemotron_h": (
        "NemotronHConfig",
        {
            "layer_types": ["linear_attention", "full_attention", "moe", "linear_attention", "mlp"],
            "num_hidden_layers": 5,
            "mamba_num_heads": 8,
            "mamba_head_dim": 12,
            "n_groups": 2,
            "ssm_state_size": 12,
            "chunk_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "moe_shared_expert_intermediate_size": 48,
            "time_step_min": 0.2,  # published 0.001, of states that last longer
        },
    ),
    "zamba2": (
        "Zamba2Config",
        {
            "num_hidden_layers": 4,
            "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
            "head_dim": 32,
            "num_key_value_heads": 4,
            "n_mamba_heads": 8,
            "mamba_ngroups": 2,
            "mamba_d_state": 12,
            "chunk_size": 16,
            "use_mem_rope": True,
            "tie_word_embeddings": True,  # and blocks of attention with one another
            "use_shared_attention_adapter": True,
            "adapter_rank": 8,
            "time_step_min": 0.3,
        },
    ),
    "mamba2": (
        "Mamba2Config",
        {
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 16,
            "n_groups": 2,
            "state_size": 12,
            "chunk_size": 16,
            "time_step_limit": [0.2, 0.8],
        },
    ),
    "mamba": ("MambaConfig", {"num_hidden_layers": 2, "state_size": 6}),
    "falcon_mamba": ("FalconMambaConfig", {"num_hidden_layers": 2, "state_size": 6}),
    "jamba": (
        "JambaConfig",
        {
            "num_hidden_layers": 3,
            "attn_layer_period": 3,
            "attn_layer_offset": 1,
            "mamba_d_state": 6,
            "num_experts": 4,
        },
    ),
    "kimi_linear": (
        "KimiLinearConfig",
        MIXED
        | LATENT
        | {"num_local_experts": 4, "num_experts_per_tok": 2, "linear_head_dim": 16, "linear_num_heads": 2},
    ),
    "bailing_hybrid": (
        "BailingHybridConfig",
        MIXED | LATENT | {"num_local_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1},
    ),
    "deepseek_v4": (
        "DeepseekV4Config",
        {
            "num_hidden_layers": 4,
            "layer_types": [
                "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention",
                "compressed_sparse_attention",
            ],
            "compress_rates": {"compressed_sparse_attention": 3, "heavily_compressed_attention": 8},
            "sliding_window": 7,
            "head_dim": 16,
            "q_lora_rank": 16,
            "o_groups": 2,
            "o_lora_rank": 16,
            "index_n_heads": 16,  # all but one in 65,536 keys have a score: among equal ones any may be chosen
            "index_head_dim": 8,
            "index_topk": 5,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "hc_mult": 2,
            "num_hash_layers": 1,
        },
    ),
}  # fmt: skip
PREFIX = prompt(33)
NODES = 40
PARENTS, TOKENS = random_tree(NODES)
path_of = partial(path_to, PARENTS)
TYPICAL = ["olmo_hybrid", "lfm2", "falcon_h1", "kimi_linear", "mamba", "deepseek_v4"]  # one family for each recurrence
COLD = SamplingParams(temperature=0.0, max_tokens=32)


def built(family: str, **overrides: int) -> PreTrainedModel:
    """A model of its own for whoever asks."""
    return copy.deepcopy(built_once(family, **overrides))


@cache
def built_once(family: str, **overrides: int) -> PreTrainedModel:
    class_name, difference = FAMILIES[family]
    make: Callable[..., transformers.PreTrainedConfig] = getattr(transformers, class_name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = make(**(BASE | difference | overrides))
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    redraw(model, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):  # states that last: as drawn at first, they are gone after a token
                parameter.copy_(torch.linspace(-4, 0, parameter.numel()).view_as(parameter))
    return model.eval()


def path_states(model: PreTrainedModel, prefix: list[int]) -> Tensor:
    """[NODES, H]: the last hidden state of each node's own path."""
    trunk = getattr(model, model.base_model_prefix)
    texts = [[*prefix, *(TOKENS[one] for one in path_of(node))] for node in range(NODES)]
    return last_rows(lambda ids: trunk(ids, use_cache=False).last_hidden_state, texts)


def below(settled: int) -> list[int]:
    """Parents of a text of so many rows and of the tree at its end."""
    return [*range(-1, settled - 1), *(settled - 1 if parent < 0 else parent + settled for parent in PARENTS)]


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("family", ["nemotron_h", "mamba2"])
def test_steps_are_limited_while_a_prompt_is_read_and_what_was_written_is_read_again(
    family: str, tmp_path: Path
) -> None:
    """As transformers 5.23 limits them: in passes over many tokens, and not in the single steps of generate."""
    truth = built(family)
    lm, near = TreeLM(copy.deepcopy(truth)), SiblingDrafter(TreeLM(copy.deepcopy(truth)), VOCABULARY)
    first, count = prompt(20), SamplingParams(temperature=0.0, max_tokens=12)
    (sequence,) = write(lm, near, [first], [count], budget=12)
    assert sequence.answer == greedy(truth, first, 12)
    second, cache = [*first, *sequence.answer, *prompt(6, seed=5)], sequence.caches[lm]
    assert cache.stepwise
    assert len(cache) > len(first)
    PrefixChain(tmp_path).keep(cache, lambda _: True)
    from_disk = PrefixChain(tmp_path).load(second, lm.memory_of)
    assert from_disk is not None
    assert 0 < len(from_disk) <= len(first)
    for again in (from_disk, cache.prefix(len(cache))):
        other = sequence_of(second, count, limit=256)
        other.caches[lm] = again
        assert len(other.cache(lm)) <= len(first)
        decoder = Decoder(lm, near, BestFirst(), 12)
        decoder.join(other)
        while decoder.live:
            decoder.step()
        assert other.answer == greedy(truth, second, 12)
    # The control: limits decide what these models write.
    (whole_RH,) = lm.forward([Rows.text(KVCache(), second)])
    (stepped_RH,) = lm.forward([Rows.text(KVCache(prompt=len(first)), second)])
    assert torch.equal(whole_RH[: len(first)], stepped_RH[: len(first)])
    assert (whole_RH[-1] - stepped_RH[-1]).abs().max() > 1e-3


def test_every_node_has_the_hidden_state_of_its_own_path_and_takes_what_is_planned(family: str, tmp_path: Path) -> None:
    truth = built(family)
    truth.save_pretrained(tmp_path)
    lm = TreeLM(offload.load(tmp_path, "disk"))
    expected, end = path_states(truth, PREFIX), len(PREFIX)
    cache = KVCache()
    (hidden_RH,) = lm.forward([Rows(cache, [*PREFIX, *TOKENS], below(end), end)])
    torch.testing.assert_close(hidden_RH[end:], expected, atol=1e-4, rtol=1e-4)
    config = json.loads((tmp_path / "config.json").read_text())
    sizes = recurrences_of(config)
    assert {layer for layer, kept in enumerate(cache_widths(config)) if kept} == cache.layers.keys()
    assert {layer for layer, _ in cache.memories} == sizes.layers.keys()
    assert sum(memory.text.nbytes for memory in cache.memories.values()) == sizes.text_B(4)
    assert sum(memory.nodes.size_B for memory in cache.memories.values()) == NODES * sizes.node_B(4)
    (unsettled_RH,) = lm.forward([Rows(KVCache(), [*PREFIX, *TOKENS], below(end))])
    torch.testing.assert_close(unsettled_RH[end:], expected, atol=1e-4, rtol=1e-4)
    (chained_RH,) = lm.forward([Rows(KVCache(), [*PREFIX, *TOKENS], range(-1, end + NODES - 1), end)])
    assert (chained_RH[end:] - expected).abs().max() > 0.1  # the control: a tree that is read as a chain

    # Accept a path that leaves gaps; the same tree below it, in two pieces, the second below rows of the first.
    path = path_of(NODES - 1)
    cache.commit([*range(end), *(end + node for node in path)])
    longer = [*PREFIX, *(TOKENS[node] for node in path)]
    assert cache.tokens == longer
    pieces = [lm.forward([Rows(cache, TOKENS[part], PARENTS[part])])[0] for part in (slice(15), slice(15, NODES))]
    torch.testing.assert_close(torch.cat(pieces), path_states(truth, longer), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("published", "attending"),
    [
        ({"model_type": "qwen3_next", "full_attention_interval": 4}, {3, 7}),
        ({"model_type": "jamba"}, {4}),
        ({"model_type": "bamba", "attn_layer_indices": [2, 5]}, {2, 5}),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "ME*-M*E-"}, {2, 5}),
        ({"model_type": "kimi_linear", "linear_attn_config": {"kda_layers": [1, 2, 3, 5, 6, 7]}}, {3, 7}),
        ({"model_type": "llama"}, set(range(8))),
        ({"model_type": "qwen3_next", "full_attention_interval": 0}, set(range(8))),
        ({"model_type": "jamba", "attn_layer_period": 0, "attn_layer_offset": 0}, set(range(8))),
        ({"model_type": "bamba", "attn_layer_indices": [[2], 5]}, {5}),
        ({"model_type": "qwen3_next", "layer_types": [["linear_attention"]] * 8}, set(range(8))),
    ],
)
def test_layers_without_keys_are_found_as_configs_name_them(published: dict[str, Json], attending: set[int]) -> None:
    assert set(range(8)) - without_keys({"num_hidden_layers": 8, **published}) == attending


@pytest.mark.parametrize("family", TYPICAL)
def test_nodes_that_stay_below_a_committed_path_keep_their_states(family: str) -> None:
    truth = built(family)
    lm = TreeLM(copy.deepcopy(truth))
    expected, cache = path_states(truth, PREFIX), KVCache()
    first = [*range(16)]
    lm.forward([Rows(cache, [*PREFIX, *TOKENS[:16]], below(len(PREFIX))[: len(PREFIX) + 16], len(PREFIX))])
    path = max((path_of(node)[:1] for node in first), key=lambda top: sum(top[0] in path_of(node) for node in first))
    keep = [node for node in first if path[-1] in path_of(node)[:-1]]
    assert len(keep) > 2
    cache.commit([*range(len(PREFIX)), *(len(PREFIX) + node for node in path)], [len(PREFIX) + node for node in keep])
    new = {node: at for at, node in enumerate(keep)}
    later = [node for node in range(16, NODES) if path[-1] in path_of(node)]
    for node in later:
        new[node] = len(new)
    parents = [new.get(PARENTS[node], -1) for node in later]
    (hidden_RH,) = lm.forward([Rows(cache, [TOKENS[node] for node in later], parents)])
    torch.testing.assert_close(hidden_RH, expected[later], atol=1e-4, rtol=0)


def test_texts_with_trees_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    truth = built(family)
    truth.save_pretrained(tmp_path)
    target, near = TreeLM(offload.load(tmp_path, "disk")), copy.deepcopy(truth)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in near.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.003)
    prompts = [prompt(length, seed=length) for length in (1, 9, 30)]
    counts = [200 if family == TYPICAL[0] else 16, 16, 16]
    expected = [greedy(truth, tokens, count) for tokens, count in zip(prompts, counts, strict=True)]
    each = [SamplingParams(temperature=0.0, max_tokens=count) for count in counts]
    together = write(target, SiblingDrafter(TreeLM(near), VOCABULARY), prompts, each, budget=24)
    assert [sequence.answer for sequence in together] == expected
    stream = offload.stream_of(target.model)
    assert stream.stats().layers_read < stream.layers * counts[0] * 2 / 3  # guesses were accepted


@pytest.mark.parametrize("family", TYPICAL)
def test_a_long_prompt_in_pieces_equals_the_prompt_at_once(family: str, tmp_path: Path) -> None:
    truth = built(family)
    truth.save_pretrained(tmp_path)
    lm, tokens = TreeLM(offload.load(tmp_path, "disk")), prompt(300)
    company = [Rows.text(KVCache(), prompt(100, seed=2)), Rows.text(KVCache(), tokens)]
    hidden_RH = lm.forward(company)[1]
    trunk = getattr(truth, truth.base_model_prefix)
    with torch.no_grad():
        expected = trunk(torch.tensor([tokens]), use_cache=False).last_hidden_state[0]
    torch.testing.assert_close(hidden_RH, expected, atol=3e-4, rtol=0)


@pytest.fixture(scope="module", params=["qwen3_5_text", "kimi_linear", "mamba"])
def lm(request: pytest.FixtureRequest) -> TreeLM:
    return TreeLM(built(request.param))


def states(cache: KVCache) -> dict[object, Tensor]:
    return {key: memory.text.clone() for key, memory in cache.memories.items()}


def committed(lm: TreeLM, tokens: list[int], cache: KVCache | None = None) -> KVCache:
    cache = KVCache() if cache is None else cache
    new = tokens[len(cache) :]
    lm.forward([Rows.text(cache, new)])
    cache.commit(range(len(new)))
    return cache


def test_a_sweep_that_fails_leaves_the_states_as_they_were(lm: TreeLM) -> None:
    cache, cancelled = committed(lm, PREFIX), Event()
    before, end = states(cache), len(PREFIX)
    (expected,) = lm.forward([Rows(cache, [5, *TOKENS], below(1), 1)])
    cache.forget_nodes()
    halfway = lm.model.get_submodule(f"{trunk_name(lm.model)}.layers.0").register_forward_hook(
        lambda *_: cancelled.set()
    )
    with pytest.raises(SweepCancelled):
        lm.forward([Rows(cache, [9, 9, *TOKENS], below(2), 2)], cancelled)
    halfway.remove()
    assert (cache.tokens, cache.parents, cache.settled) == (PREFIX, [], 0)
    assert all(torch.equal(state, before[key]) for key, state in states(cache).items())
    (again,) = lm.forward([Rows(cache, [5, *TOKENS], below(1), 1)])
    assert torch.equal(again, expected)
    cache.commit([0])
    assert len(cache) == end + 1


def test_a_rewind_takes_the_last_snapshot_and_the_rest_is_read_again(lm: TreeLM) -> None:
    cache = committed(lm, prompt(60))
    answer = prompt(20, seed=3)
    for token in answer:
        committed(lm, [*cache.tokens, token], cache)
    cache.rewind(59)  # another answer to the same prompt: its last token is read again anyway
    assert 40 < len(cache) < 59
    kept = len(cache)
    committed(lm, prompt(60), cache)
    torch.testing.assert_close(states(cache), states(committed(lm, prompt(60))), atol=1e-4, rtol=0)
    cache.rewind(kept - 1)
    assert not len(cache)
    torch.testing.assert_close(states(committed(lm, prompt(60), cache)), states(committed(lm, prompt(60))))


def test_a_text_that_begins_alike_starts_from_a_snapshot(lm: TreeLM) -> None:
    donor = KVCache(forks={37})
    committed(lm, prompt(60), donor)
    assert (donor.reusable(60), donor.reusable(45), donor.reusable(20)) == (60, 37, 0)
    copied = donor.prefix(45)
    other = [*prompt(60)[:45], *prompt(10, seed=8)]
    assert copied.tokens == other[:37]
    torch.testing.assert_close(states(committed(lm, other, copied)), states(committed(lm, other)), atol=1e-4, rtol=0)
    assert donor.tokens == prompt(60)


def test_a_text_keeps_few_snapshots_and_gives_back_what_nodes_took(lm: TreeLM) -> None:
    cache = KVCache(forks=set(range(1, 100, 9)))
    committed(lm, prompt(100), cache)
    assert [one.length for one in cache.snapshots] == [73, 82, 91, 92][-SNAPSHOTS:]
    plain_B = cache.size_B
    lm.forward([Rows(cache, TOKENS, PARENTS)])
    cache.forget_nodes()
    assert cache.size_B > plain_B
    cache.give_back()
    assert cache.size_B <= plain_B


def test_a_session_goes_on_from_the_states_that_were_kept(lm: TreeLM, tmp_path: Path) -> None:
    cache, chain = committed(lm, prompt(60)), PrefixChain(tmp_path)
    chain.keep(cache, lambda _: True)
    assert chain.known([*prompt(60), 1]) == 60
    read = chain.load([*prompt(60), 1], lm.memory_of)
    assert read is not None
    assert [one.length for one in read.snapshots] == [one.length for one in cache.snapshots]
    (expected,), (found,) = (lm.forward([Rows(one, TOKENS, PARENTS)]) for one in (cache, read))
    assert torch.equal(found, expected)
    read.rewind(55)
    torch.testing.assert_close(states(committed(lm, prompt(60), read)), states(cache), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["mamba", "zamba2"])
def test_filters_and_rates_of_decay_stay_whole_in_few_bits(family: str, tmp_path: Path) -> None:
    truth = built(family)
    truth.save_pretrained(tmp_path / "whole")
    pack(plan(open_folder(tmp_path / "whole"), "int8"), tmp_path / "packed")
    kinds = {name: entry.dtype for name, entry in open_folder(tmp_path / "packed").entries.items()}
    assert {kinds[name] for name in kinds if "conv1d" in name or name.endswith("A_log")} == {"F32"}
    assert "I8" in kinds.values()
    target = TreeLM(offload.load(tmp_path / "packed", "disk"))
    copies = in_few_bits(target.model, [False] * len(target.kinds), target.device, "nf4", lambda *_: None)
    drafter = substituting(target, copies, VOCABULARY)
    each = SamplingParams(temperature=0.0, max_tokens=12)
    plain, drafted = (write(target, one, [prompt(9)], each, budget=8)[0].answer for one in (NoDrafter(), drafter))
    assert drafted == plain


def test_a_config_of_some_layers_names_the_kinds_of_those(family: str) -> None:
    config = built_once(family).config
    last = config.num_hidden_layers - 1
    kinds = getattr(config, "layer_types", None)
    assert getattr(partial_config(config, [last]), "layer_types", None) == (kinds and [kinds[last]])
    assert getattr(config, "layer_types", None) == kinds


@pytest.mark.parametrize("family", TYPICAL)
def test_a_family_drafts_for_itself_with_some_of_its_layers(family: str) -> None:
    truth = built(family)
    target, text = TreeLM(copy.deepcopy(truth)), prompt(9)
    layers = target.model.get_submodule(".".join(layer_list_path(target.model)))
    assert isinstance(layers, nn.ModuleList)
    expected = greedy(truth, text, 6)
    kept_LS = np.ones((len(layers), 2), bool)
    kept_LS[-1] = False
    if all(names_of(layer) for layer in layers):
        kept_LS[1] = True, False
        kept_LS[0] = False, True
    layer_of = {number: copy.deepcopy(layer) for number, layer in enumerate(layers)}.__getitem__
    drafter = skipping(target, layer_of, kept_LS, VOCABULARY)
    (sequence,) = write(target, drafter, [text], SamplingParams(temperature=0.0, max_tokens=6), budget=8)
    assert sequence.answer == expected


def test_a_text_that_repeats_itself_is_drafted_from_what_was_written(tmp_path: Path) -> None:
    truth = built("qwen3_5_text")
    phrase = prompt(12) * 3
    target = TreeLM(copy.deepcopy(truth))
    (ours,) = write(target, NgramDrafter(), [phrase], COLD)
    assert ours.answer == greedy(truth, phrase, 32)


def plain_rows(rows: StateRows) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Queries, keys, values, logarithms of decays and betas in float64, each head and channel with its own."""
    match rows:
        case LinearRows():
            group = len(rows.value_HRV) // len(rows.key_JRK)
            query, key = (x.double().repeat_interleave(group, 0) for x in (rows.query_JRK, rows.key_JRK))
            return query, key, rows.value_HRV.double(), rows.decay_HR.double()[..., None], rows.beta_HR
        case ChannelRows():
            query, key = rows.query_HRK.double(), rows.key_HRK.double()
            return query, key, rows.value_HRV.double(), rows.decay_HRK.double().log(), rows.beta_HR
        case SelectiveRows():
            decay = rows.step_RC.T.double()[..., None] * rows.rate_CS.double()[:, None]
            query, key = (x.double().expand(len(decay), -1, -1) for x in (rows.query_RS, rows.key_RS))
            return query, key, rows.written_RC.T.double()[..., None], decay, None
    raise AssertionError(rows)


def one_by_one(rows: StateRows, parents: list[int]) -> tuple[Tensor, list[Tensor]]:
    """What every row reads, and the state after it: the recurrence itself, in float64."""
    query, key, value, decay, beta = plain_rows(rows)
    found: list[Tensor] = []
    after: list[Tensor] = []
    for row, parent in enumerate(parents):
        empty = torch.zeros(len(key), key.shape[-1], value.shape[-1], dtype=torch.float64)
        state = (after[parent] if parent >= 0 else empty) * decay[:, row, :, None].exp()
        k, write = key[:, row, :, None], value[:, row]
        if beta is not None:
            write = (write - (k * state).sum(1)) * beta[:, row].double()[:, None]
        after.append(state + k * write[:, None])
        found.append((query[:, row, :, None] * after[-1]).sum(1))
    return torch.stack(found, 1), after


def drawn_rows(kind: str, count: int) -> StateRows:
    random = torch.Generator().manual_seed(count)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    fast = torch.logspace(-3, 2, 8)  # from channels that last to some that are gone within a token
    query, key, value, beta = drawn(count, 2, 8), drawn(count, 2, 8), drawn(count, 4, 5), drawn(count, 4).sigmoid()
    if kind == "Kimi delta":
        return channel_rows(query, key, value[:, :2], -drawn(count, 2, 8).exp() * fast, beta[:, :2], normalised=True)
    if kind == "Mamba-1":
        step, rates = drawn(count, 7).sigmoid(), -drawn(7, 8).exp() * fast
        return SelectiveRows(step, step * drawn(count, 7), drawn(count, 8), drawn(count, 8), rates)
    rows = delta_rows(query, key, value, -drawn(count, 4).exp(), beta, normalised=True)
    return rows if kind == "gated delta" else replace(rows, beta_HR=None)


@pytest.mark.parametrize(("settled", "count"), [(0, 1), (1, 1), (200, 200), (70, 700), (0, 300)])
@pytest.mark.parametrize("kind", ["gated delta", "Mamba-2", "Kimi delta", "Mamba-1"])
def test_the_rows_of_a_tree_read_what_the_recurrence_gives(settled: int, count: int, kind: str) -> None:
    rows = drawn_rows(kind, count)
    picks = np.random.default_rng(count).integers(0, 12, count).tolist()
    parents = [row - 1 if row <= settled else max(settled - 1, row - 1 - pick) for row, pick in enumerate(picks)]
    expected, after = one_by_one(rows, parents)
    tree = branches_of(np.array(parents), settled, (), torch.device("cpu"))
    memory = restored(rows.name, rows.empty())
    cuts = [0, count // 3, count // 2, count]
    found = torch.cat(
        [
            piece
            for first, last in pairwise(cuts)
            if first < last
            for piece in scan(memory, tree, first, rows.of(slice(first, last)))
        ],
        1,
    )
    found = found.permute(2, 1, 0) if kind == "Mamba-1" else found
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    path, node = [], count - 1
    while node >= settled:
        path.append(node - settled)
        node = parents[node]
    memory.commit(path[::-1], [])
    state = memory.text[0, ..., None] if kind == "Mamba-1" else memory.text
    torch.testing.assert_close(state.double(), after[-1], atol=1e-5, rtol=1e-5)
    assert math.isfinite(memory.text.sum().item())
