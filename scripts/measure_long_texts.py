"""200 tokens of three texts at once, with trees, beside transformers' own `generate`, of all recurrent families.

The tiny random models of the tests in float32, streamed from disk; the drafter is a copy with noise on every weight, so
that some guesses are right. A text that differs is shown with the place and the gap between transformers' two likeliest
tokens there: what lies within rounding may go either way. Prints a markdown table.

    python scripts/measure_long_texts.py [FAMILY ...]
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import PreTrainedModel

import offload
from specexec.drafters.sibling import SiblingDrafter
from specexec.model.tree_lm import TreeLM
from specexec.sampling.params import SamplingParams
from tests.test_recurrent import FAMILIES, built
from tests.tiny import VOCABULARY
from tests.writing import greedy, prompt, write

TOKENS, LENGTHS, NOISE = 200, (1, 9, 30), 0.003


def main(families: list[str]) -> None:
    """One row for each family."""
    print("| model type | texts equal | tokens a sweep | first difference |\n|---|---|---|---|")
    for family in families:
        truth = built(family)
        prompts = [prompt(length, seed=length) for length in LENGTHS]
        expected = [greedy(truth, tokens, TOKENS) for tokens in prompts]
        with TemporaryDirectory() as folder:
            truth.save_pretrained(folder)
            target = TreeLM(offload.load(Path(folder), "disk"))
            each = [SamplingParams(temperature=0.0, max_tokens=TOKENS) for _ in prompts]
            texts = write(target, SiblingDrafter(TreeLM(_near(truth)), VOCABULARY), prompts, each, budget=24)
            stream = offload.stream_of(target.model)
            sweeps = stream.stats().layers_read / stream.layers
            stream.close()
        answers = [text.answer for text in texts]
        equal = sum(ours == theirs for ours, theirs in zip(answers, expected, strict=True))
        found = [_difference(truth, *of) for of in zip(prompts, answers, expected, strict=True)]
        told = "; ".join(one for one in found if one)
        print(f"| `{family}` | {equal} of {len(prompts)} | {TOKENS / sweeps:.2f} | {told} |", flush=True)


def _near(model: PreTrainedModel) -> PreTrainedModel:
    near = copy.deepcopy(model)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in near.parameters():
            parameter.add_(torch.randn_like(parameter) * NOISE)
    return near


def _difference(truth: PreTrainedModel, tokens: list[int], ours: list[int], theirs: list[int]) -> str:
    at = next((at for at, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), None)
    if at is None:
        return ""
    with torch.no_grad():
        logits_V = truth(torch.tensor([[*tokens, *theirs[:at]]])).logits[0, -1]
    first, second = logits_V.topk(2).values.tolist()
    return f"token {at} of the text of {len(tokens)}: {first:.3f} and {second:.3f}, {first - second:.1e} apart"


if __name__ == "__main__":
    main(sys.argv[1:] or list(FAMILIES))
