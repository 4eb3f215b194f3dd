"""Log-probabilities are the model's own, with any drafter; a bias is that of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, SequenceBiasLogitsProcessor

import specexec
from specexec.engine.engine import Engine
from specexec.errors import BadSampling
from specexec.sampling.params import SamplingParams
from specexec.sampling.scores import constrained
from specexec.stats import Burst
from specexec.tree.tree import ROOT, TokenTree
from tests.tiny import VOCABULARY

PROMPT = "List the days of the week. What does"


@pytest.fixture(scope="module")
def engines() -> Iterator[list[Engine]]:
    found = [specexec.load("demo", drafter=drafter, budget=16, dtype="f32") for drafter in ("none", "sibling+ngram")]
    yield found
    for engine in found:
        engine.close()


def written(engine: Engine, sampling: SamplingParams, prompt: str = PROMPT) -> list[Burst]:
    return list(engine.stream(prompt, sampling))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logprobs_are_those_of_transformers_for_prompt_and_answer(engines: list[Engine], temperature: float) -> None:
    sampling = SamplingParams(temperature=temperature, seed=1, max_tokens=12, logprobs=3, prompt_logprobs=True)
    model = AutoModelForCausalLM.from_pretrained(engines[0].folders["target"], dtype=torch.float32)
    prompt = engines[0].encode(PROMPT)
    for engine in engines:
        bursts = written(engine, sampling)
        tokens = [token for burst in bursts for token in burst.tokens]
        told = [one for burst in bursts for one in (*burst.prompt_logprobs, *burst.logprobs)]
        assert [one.token for one in told] == [*prompt, *tokens][1:]
        assert [len(burst.prompt_logprobs) for burst in bursts] == [len(prompt) - 1, *(0 for _ in bursts[1:])]
        with torch.no_grad():
            expected = model(torch.tensor([[*prompt, *tokens]])).logits[0].log_softmax(-1)
        for one, log_probs_V in zip(told, expected, strict=False):
            assert one.logprob == pytest.approx(float(log_probs_V[one.token]), abs=1e-3)
            assert [value for _, value in one.top] == pytest.approx(log_probs_V.topk(3).values.tolist(), abs=1e-3)


def test_a_bias_penalty_or_grammar_does_not_change_what_the_model_believes(engines: list[Engine]) -> None:
    plain = written(engines[0], SamplingParams(temperature=0.0, max_tokens=1, logprobs=2))[0].logprobs[0]
    banned = SamplingParams(temperature=0.0, max_tokens=1, logprobs=2, logit_bias=((plain.token, -100.0),))
    (burst,) = written(engines[0], banned)
    assert burst.logprobs[0].token == plain.top[1][0]
    assert burst.logprobs[0].top == plain.top


def test_asking_for_logprobs_changes_no_text(engines: list[Engine]) -> None:
    sampling = SamplingParams(temperature=0.9, seed=4, max_tokens=20, top_p=0.9)
    for engine in engines:
        curious = replace(sampling, logprobs=0, prompt_logprobs=True)
        assert [engine.generate(PROMPT, curious).tokens] == [engine.generate(PROMPT, sampling).tokens]


def test_a_prompt_that_is_in_a_cache_is_read_again_when_its_logprobs_are_asked_for(engines: list[Engine]) -> None:
    caches: dict[object, object] = {}
    prompt = engines[1].encode(PROMPT)
    sampling = SamplingParams(temperature=0.0, max_tokens=2, logprobs=0, prompt_logprobs=True)
    first, second = (
        [one for burst in engines[1].stream(prompt, sampling, caches) for one in burst.prompt_logprobs]  # type: ignore[arg-type]
        for _ in range(2)
    )
    assert len(first) == len(second) == len(prompt) - 1


def test_a_bias_is_that_of_transformers() -> None:
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(0))
    theirs = SequenceBiasLogitsProcessor([[[5], 3.5], [[7], -100.0]])
    expected = theirs(torch.zeros(1, 1, dtype=torch.long), logits.clone())
    sampling = SamplingParams(logit_bias=((5, 3.5), (7, -100.0)))
    assert torch.equal(constrained(logits, sampling, None, TokenTree.empty(), [ROOT]), expected)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bias_is_the_same_for_every_drafter(engines: list[Engine], temperature: float) -> None:
    loved = engines[0].encode(" the")[0]
    sampling = SamplingParams(temperature=temperature, seed=2, max_tokens=24, logit_bias=((loved, 4.0), (3, -100.0)))
    texts = {engine.generate(PROMPT, sampling).tokens for engine in engines}
    assert len(texts) == 1
    assert texts != {engines[0].generate(PROMPT, replace(sampling, logit_bias=())).tokens}


def test_a_token_with_a_great_bias_is_all_there_is_and_a_banned_one_never_comes(engines: list[Engine]) -> None:
    only = SamplingParams(temperature=1.0, seed=2, max_tokens=6, logit_bias=((17, 100.0),))
    for engine in engines:
        assert engine.generate(PROMPT, only).tokens == (17,) * 6


@pytest.mark.parametrize("bias", [((0, 101.0),), ((0, -101.0),)])
def test_a_bias_out_of_range_is_refused(bias: tuple[tuple[int, float], ...]) -> None:
    with pytest.raises(BadSampling, match="logit_bias"):
        SamplingParams(logit_bias=bias)


@pytest.mark.parametrize("token", [-1, 10**6])
def test_a_bias_on_a_token_that_does_not_exist_is_refused(engines: list[Engine], token: int) -> None:
    with pytest.raises(BadSampling, match="this model has 0 to 4095"):
        engines[0].generate(PROMPT, SamplingParams(logit_bias=((token, 1.0),)))
