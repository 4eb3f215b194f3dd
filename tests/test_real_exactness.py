"""On a real model, SmolLM2-135M-Instruct in float32: greedy text is transformers' own, sampled text depends on no mode.

The whole product of modes is compared by scripts/compare_real.py; here are the edges of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import specexec
from offload.hub.names import demo_folder
from offload.placement.placement import Offload
from specexec import Completion, SamplingParams
from specexec.engine.engine import Engine
from tests import real

ASKED = [
    json.loads(line)["prompt"]
    for line in (Path(__file__).parent.parent / "scripts" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
]
LENGTH = 24
SAMPLINGS = (
    SamplingParams(temperature=0.0, max_tokens=4),
    SamplingParams(temperature=0.7, seed=1, max_tokens=4),
    SamplingParams(temperature=1.2, seed=2, max_tokens=4, top_p=0.9),
    SamplingParams(temperature=1.2, seed=3, max_tokens=4, top_k=30, min_p=0.02),
    SamplingParams(
        temperature=0.7, seed=4, max_tokens=4, repetition_penalty=1.2, presence_penalty=0.4, frequency_penalty=0.3
    ),
)


def load(drafter: str, offload: Offload) -> Engine:
    return specexec.load(str(real.model()), drafter=drafter, offload=offload, dtype="f32", ctx=1024)


def asked(llm: Engine, prompts: list[str]) -> list[list[int]]:
    return [llm.encode([{"role": "user", "content": one}]) for one in prompts]


def written(llm: Engine, parallel: int) -> list[tuple[int, ...]]:
    found = {one.index: one for one in llm.generate_many(asked(llm, ASKED[:1]) * len(SAMPLINGS), SAMPLINGS, parallel)}
    return [one.tokens for _, one in sorted(found.items()) if isinstance(one, Completion)]


@pytest.fixture(scope="module")
def plain() -> list[tuple[int, ...]]:
    with load("none", "none") as llm:
        return written(llm, 1)


def test_greedy_is_what_transformers_generates() -> None:
    """Twelve questions through the chat template, 24 tokens each; scripts/compare_real.py asks more, and longer."""
    with load("none", "none") as llm:
        prompts = asked(llm, ASKED[:12])
        llm.budget = 0  # trees are compared below: here it is the many rows that would take the time
        sampling = [SamplingParams(temperature=0.0, max_tokens=LENGTH)] * len(prompts)
        texts = {one.index: one for one in llm.generate_many(prompts, sampling)}
    model = AutoModelForCausalLM.from_pretrained(real.model(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(real.model(), padding_side="left")
    padded = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
    generate: Callable[..., torch.Tensor] = getattr(model, "generate")  # noqa: B009 - its own annotations refuse it
    with torch.no_grad():
        whole = generate(**padded, max_new_tokens=LENGTH, do_sample=False)
    for index, tokens in enumerate(whole[:, padded["input_ids"].shape[1] :].tolist()):
        one = texts[index]
        assert isinstance(one, Completion)
        assert tokens[: len(one.tokens)] == list(one.tokens), ASKED[index]
        assert len(one.tokens) == LENGTH or one.tokens[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("drafter", "offload", "budget", "together"),
    [
        ("ngram", "ram", 8, 5),
        ("substitute", "none", "auto", 1),
        ("skip", "disk", 8, 5),
        (f"{demo_folder('drafter')}+ngram", "none", 8, 1),
        ("none", "disk", 0, 5),
    ],
    ids=["ngram", "substitute", "skip", "translated", "none"],
)
def test_no_mode_changes_a_sampled_text(
    plain: list[tuple[int, ...]],
    drafter: str,
    offload: Offload,
    budget: int,
    together: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("specexec.drafters.skip.TRIES", 1)
    monkeypatch.setattr("specexec.drafters.skip.ANSWER", 2)
    with load(drafter, offload) as llm:
        llm.budget = budget
        assert written(llm, together) == plain


def test_the_demo_with_a_real_drafter_writes_its_own_text() -> None:
    texts = []
    for drafter in ("none", str(real.model())):
        with specexec.load("demo", drafter=drafter, offload="none", dtype="f32", budget=8) as llm:
            texts.append(llm.generate(ASKED[0], SamplingParams(temperature=0.8, seed=1, max_tokens=8)).tokens)
    assert texts[0] == texts[1]
