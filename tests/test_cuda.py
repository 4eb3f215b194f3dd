"""The same promises on a GPU: copies on a stream of their own change nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import offload
import specexec
from offload.placement.placement import Offload
from specexec import SamplingParams
from tests.tiny import tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

TIERS: list[Offload] = ["none", "ram", "disk"]
GOLDEN = json.loads((Path(__file__).parents[1] / "offload" / "demo" / "golden.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "gpt_oss"])
def test_streamed_logits_equal_resident_ones_bit_for_bit(family: str, tmp_path: Path) -> None:
    tiny(family, tmp_path)
    tokens = torch.arange(2, 40, device="cuda")[None]
    models = [offload.load(tmp_path, tier, device="cuda", dtype="bfloat16") for tier in TIERS]
    with torch.no_grad():
        first, *others = [[model(tokens).logits for _ in range(3)] for model in models]
    assert all(torch.equal(logits, first[0]) for other in (first, *others) for logits in other)


@pytest.mark.parametrize("tier", TIERS)
def test_golden_prompts_are_answered_word_for_word(tier: Offload) -> None:
    with specexec.load("demo", drafter="sibling", offload=tier, device="cuda", dtype="f32", budget=64) as llm:
        for golden in GOLDEN[:6]:
            answer = llm.generate([{"role": "user", "content": golden["prompt"]}], SamplingParams(max_tokens=120))
            assert answer.text == golden["answer"]


def test_one_seed_is_one_text_whatever_the_tree_and_the_tier() -> None:
    sampling = SamplingParams(temperature=0.9, top_p=0.95, seed=3, max_tokens=40)
    cases: list[tuple[Offload, str, int]] = [
        ("none", "none", 0),
        ("none", "sibling", 64),
        ("ram", "sibling", 7),
        ("disk", "sibling", 64),
    ]
    texts = set()
    for tier, drafter, budget in cases:
        with specexec.load("demo", drafter=drafter, offload=tier, device="cuda", dtype="f32", budget=budget) as llm:
            texts.add(llm.generate("The import statement", sampling).text)
    assert len(texts) == 1
