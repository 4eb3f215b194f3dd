"""Filters and penalties against transformers' own processors, and a brute-force OpenAI penalty."""

from collections import Counter

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specexec.errors import BadSampling
from specexec.sampling.filters import restrict
from specexec.sampling.noise import Noise
from specexec.sampling.params import SamplingParams
from specexec.sampling.processors import History, JudgedText, Processors, processed
from specexec.sampling.scores import with_noise

LOGITS = torch.randn(40, 300, generator=torch.Generator().manual_seed(0)) * 3
PROMPT, ANSWER = [3, 5, 5, 250], [7, 7, 9, 3]


def history_of(sampling: SamplingParams, answer: list[int]) -> History:
    return Processors(sampling, JudgedText(tuple(PROMPT), LOGITS.shape[-1])).history(answer)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(0, 0.9, 0.0), (5, 1.0, 0.0), (40, 0.8, 0.05), (0, 1.0, 0.1)])
def test_allowed_tokens_are_those_of_transformers(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    sampling = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    theirs = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    theirs += [TopKLogitsWarper(top_k)] if top_k else []
    theirs += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    theirs += [MinPLogitsWarper(min_p)] if min_p else []
    expected = theirs(torch.LongTensor(40, 1), torch.FloatTensor(LOGITS.clone()))
    assert torch.equal(torch.isinf(restrict(LOGITS, sampling)), torch.isinf(expected))


def test_repetition_penalty_is_that_of_transformers() -> None:
    ids = torch.tensor([PROMPT + ANSWER])
    expected = RepetitionPenaltyLogitsProcessor(1.3)(ids, LOGITS[:1].clone())[0]
    (ours,) = processed(LOGITS[:1], [history_of(SamplingParams(repetition_penalty=1.3), ANSWER)])
    assert torch.equal(ours, expected)


def test_presence_and_frequency_count_the_answer_only() -> None:
    sampling = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    expected = LOGITS[0].clone()
    for token, count in Counter(ANSWER).items():
        expected[token] -= 0.5 + 0.25 * count
    assert torch.equal(processed(LOGITS[:1], [history_of(sampling, ANSWER)])[0], expected)


def test_a_history_grows_along_a_path() -> None:
    sampling = SamplingParams(presence_penalty=0.5)
    assert history_of(sampling, ANSWER[:2]).after(ANSWER[2:]) == history_of(sampling, ANSWER)


def test_zero_temperature_is_the_same_rule_without_noise() -> None:
    noise = Noise(1, 300)
    assert torch.equal(with_noise(LOGITS[:2], 0.0, noise, [4, 5]), LOGITS[:2])
    warm = with_noise(LOGITS[:2], 0.5, noise, [4, 5])
    assert torch.equal(warm, LOGITS[:2] + 0.5 * torch.stack([noise.row(4), noise.row(5)]))


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -2}, {"min_p": 2.0}, {"max_tokens": -1}, {"stop": ("",)}]
)
def test_values_out_of_range_are_refused_by_name(wrong: dict[str, float]) -> None:
    with pytest.raises(BadSampling, match=next(iter(wrong))):
        SamplingParams(**wrong)  # type: ignore[arg-type]  # one of several fields
