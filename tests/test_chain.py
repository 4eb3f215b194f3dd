"""What cannot verify trees is refused by name for trees, and still streams with plain decoding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    LlamaConfig,
    OpenAIGPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
)

import offload
from specexec.drafters.none import NoDrafter
from specexec.engine.decoder import Decoder
from specexec.errors import UnsupportedArchitecture
from specexec.model.architecture import check_tree_support
from specexec.model.chain_lm import ChainLM
from specexec.planning.best_first import BestFirst
from specexec.sampling.params import SamplingParams
from tests.tiny import VOCABULARY, redraw
from tests.writing import greedy, prompt, sequence_of

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 24,
}


def shaped(make: Callable[..., PretrainedConfig], **more: object) -> PretrainedConfig:
    return make(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, eos_token_id=None, **more)


def attending(make: Callable[..., PretrainedConfig], **more: object) -> PretrainedConfig:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return shaped(make, intermediate_size=64, max_position_embeddings=128, pad_token_id=0, **heads, **more)


CANNOT_BRANCH: dict[str, PretrainedConfig] = {
    "bloom": BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=2, eos_token_id=None),
    "openai-gpt": OpenAIGPTConfig(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2),  # keeps nothing of a text
    "longrope": attending(Phi3Config, rope_parameters=LONGROPE),
    "dynamic": attending(LlamaConfig, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
}


def built(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CANNOT_BRANCH[name], dtype=torch.float32)
    redraw(model, seed=0)
    return model.eval()


@pytest.mark.parametrize("name", CANNOT_BRANCH)
def test_what_cannot_branch_is_refused_by_name_before_weights_are_read(name: str) -> None:
    config = CANNOT_BRANCH[name]
    with torch.device("meta"):
        model_class = type(AutoModelForCausalLM.from_config(config))
    with pytest.raises(UnsupportedArchitecture, match=config.model_type) as refusal:
        check_tree_support(model_class, config)
    assert "--drafter none" in str(refusal.value.hint)


@pytest.mark.parametrize("name", CANNOT_BRANCH)
def test_it_still_streams_with_plain_decoding(name: str, tmp_path: Path) -> None:
    model = built(name)
    model.save_pretrained(tmp_path)
    target = ChainLM(offload.load(tmp_path, "disk"))
    decoder = Decoder(target, NoDrafter(), BestFirst(), 64)
    prompts = [prompt(length, seed=length) for length in (1, 9, 20)]
    sequences = [sequence_of(tokens, SamplingParams(temperature=0.0, max_tokens=12), limit=128) for tokens in prompts]
    for sequence in sequences:
        decoder.join(sequence)
    while decoder.live:
        decoder.step()
    assert [sequence.answer for sequence in sequences] == [greedy(model, tokens, 12) for tokens in prompts]


def test_a_rewound_chain_starts_from_its_text(tmp_path: Path) -> None:
    model = built("bloom")
    model.save_pretrained(tmp_path)
    target = ChainLM(offload.load(tmp_path, "none"))
    first = sequence_of(prompt(12), SamplingParams(temperature=0.0, max_tokens=6), limit=128)
    again = sequence_of([*prompt(12)[:7], 3, 4], SamplingParams(temperature=0.0, max_tokens=6), limit=128)
    again.caches = first.caches
    decoder = Decoder(target, NoDrafter(), BestFirst(), 0)
    for sequence in (first, again):
        decoder.join(sequence)
        while decoder.live:
            decoder.step()
    assert again.answer == greedy(model, again.tokens[: again.prompt_length], 6)
