"""generation_config.json on the real small model: greedy text is that of transformers' own `generate`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

import specexec
from specexec import SamplingParams
from specexec.engine.engine import Engine
from specexec.sampling.model_defaults import defaults_of
from tests import real

LENGTH = 12
WISHES: list[dict[str, object]] = [
    {},
    {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3},
    {"min_new_tokens": LENGTH, "encoder_no_repeat_ngram_size": 2, "begin_suppress_tokens": [504, 1]},
]


@pytest.fixture(scope="module")
def smol() -> Iterator[Engine]:
    with specexec.load(str(real.model()), drafter="ngram", budget=8, dtype="f32", ctx=256) as engine:
        yield engine


def test_the_real_model_follows_its_wishes_as_generate_does(smol: Engine) -> None:
    model = AutoModelForCausalLM.from_pretrained(real.model(), dtype=torch.float32)
    prompt = smol.encode([{"role": "user", "content": "What is 2 + 2? Answer with one word, then say it again."}])
    texts = []
    for wishes in WISHES:
        config = GenerationConfig.from_dict({"max_new_tokens": LENGTH, "do_sample": False, **wishes})
        tokens = model.generate(torch.tensor([prompt]), generation_config=config)  # type: ignore[misc]
        assert isinstance(tokens, Tensor)
        texts.append(tokens[0, len(prompt) :].tolist())
        wanted = defaults_of(GenerationConfig.from_dict(wishes)).filled(SamplingParams(max_tokens=LENGTH))
        assert list(smol.generate(prompt, wanted).tokens) == texts[-1]
    assert texts[1] != texts[0] != texts[2]
