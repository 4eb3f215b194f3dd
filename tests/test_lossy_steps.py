"""Steps that the drafter writes and the target scores: what is kept is what the rule says, and nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest
import torch
from transformers import PreTrainedModel

import specexec
from specexec.compose.load_options import LoadOptions
from specexec.drafters.sibling import SiblingDrafter
from specexec.engine.decoder import Decoder
from specexec.errors import BadDrafter, BadOption
from specexec.lossy import steps
from specexec.lossy.asked import Lossy
from specexec.lossy.steps import ScoreQuestion, Steps
from specexec.model.tree_lm import TreeLM
from specexec.sampling.noise import Noise
from specexec.sampling.params import SamplingParams
from specexec.text.detokenizer import TextStream
from specexec.text.sequence import start
from tests.tiny import VOCABULARY, tiny
from tests.writing import prompt

WRITTEN = 16
STOP = 77
QUESTION = ScoreQuestion(tokens=(9, 8, 7, 6), digits=tuple(range(100, 110)))
PROMPTS = [prompt(5), prompt(9, seed=1)]
SAMPLINGS = [
    SamplingParams(temperature=0.0, max_tokens=WRITTEN),
    SamplingParams(temperature=1.0, seed=3, max_tokens=WRITTEN),
]


def spelled(tokens: list[int]) -> str:
    """Every eighth token ends a step."""
    return "".join("\n\n" if token % 8 == 0 else "x" for token in tokens)


class Pair:
    """A target, a drafter that agrees now and then, and both as transformers has them."""

    def __init__(self, folder: Path) -> None:
        self.target = TreeLM(tiny("llama", folder / "target", num_hidden_layers=2))
        self.truth: PreTrainedModel = tiny("llama", folder / "target", num_hidden_layers=2)
        drafting = tiny("llama", folder / "drafter", num_hidden_layers=2)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(1)
            for parameter in drafting.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.08)
        self.drafting = copy.deepcopy(drafting)
        self.draft = TreeLM(drafting)

    def score(self, text: list[int]) -> float:
        """Computed without caches, trees and noise."""
        with torch.no_grad():
            logits_V = self.truth(torch.tensor([[*text, *QUESTION.tokens]])).logits[0, -1]
        chances = logits_V[list(QUESTION.digits)].softmax(-1).tolist()
        return sum(score * chance for score, chance in enumerate(chances))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    made = Pair(tmp_path_factory.mktemp("pair"))
    yield made
    made.target.close()
    made.draft.close()


def choices(model: PreTrainedModel, text: list[int], first: int, sampling: SamplingParams) -> list[int]:
    """What the model chooses for each place of the text from `first` on, and for the one behind it."""
    with torch.no_grad():
        logits_NV = model(torch.tensor([text])).logits[0, first - 1 :]
    noise_NV = Noise(sampling.seed or 0, VOCABULARY).rows(range(first, len(text) + 1))
    chosen: list[int] = (logits_NV + (sampling.temperature or 0.0) * noise_NV).argmax(-1).tolist()
    return chosen


def by_the_rule(
    pair: Pair, prompt: list[int], sampling: SamplingParams, least: float, scores: list[float] | None = None
) -> tuple[list[int], list[int]]:
    """The text, step by step, each token from a forward over all before it; and what the target disagreed with."""
    text, replaced, whole = [*prompt], list[int](), len(prompt) + WRITTEN
    while len(text) < whole and text[-1] != STOP:
        step: list[int] = []
        while len(step) < min(steps.LONGEST, whole - len(text) - 1):
            step += choices(pair.drafting, [*text, *step], len(text) + len(step), sampling)
            if step[-1] == STOP or "\n\n" in spelled(step).lstrip():
                break
        own = choices(pair.truth, [*text, *step], len(text), sampling)
        judged = len(step) - (step[-1:] == [STOP])
        taken = 0
        score = pair.score([*text, *step[:judged]]) if judged else -1.0
        if scores is not None and judged:
            scores.append(score)
        if score >= least:
            taken = judged
            wrong = sum(one != other for one, other in zip(own[:judged], step, strict=False))
            replaced += [wrong] if wrong else []
        while taken < len(step) and own[taken] == step[taken]:
            taken += 1
        text += [*step[:taken], own[taken]]
        if STOP in text[len(prompt) :]:
            text = text[: text.index(STOP, len(prompt)) + 1]
    return text[len(prompt) :], replaced


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
def test_a_step_is_kept_if_its_score_says_so(
    pair: Pair, sampling: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "LONGEST", 6)
    scores: list[float] = []
    for tokens in PROMPTS:
        by_the_rule(pair, tokens, sampling, 0.0, scores)
    middle, kept = median(scores), dict[float, int]()
    for least in (0.0, middle, float("inf")):
        planner = Steps(least, QUESTION, spelled)
        decoder = Decoder(pair.target, SiblingDrafter(pair.draft, VOCABULARY), planner, "auto", walk=planner.walk)
        texts = [
            start(
                tokens, sampling, Noise(sampling.seed or 0, VOCABULARY), TextStream(spelled, ()), frozenset({STOP}), 512
            )
            for tokens in PROMPTS
        ]
        for text in texts:
            decoder.join(text)
        replaced: dict[object, list[int]] = {text: [] for text in texts}
        while decoder.live:
            for step in decoder.step():
                replaced[step.sequence] += [step.burst.replaced] if step.burst.replaced else []
        assert not decoder.guarded.failure
        expected = [by_the_rule(pair, tokens, sampling, least) for tokens in PROMPTS]
        assert [(text.answer, replaced[text]) for text in texts] == expected
        kept[least] = sum(map(len, replaced.values()))
    assert kept[0.0] > kept[middle] > kept[float("inf")] == 0, "the thresholds make a difference"


def test_infinity_writes_exactly_the_exact_text() -> None:
    ask = [{"role": "user", "content": "How does specexec work?"}]
    sampling = SamplingParams(temperature=0.9, seed=5, max_tokens=40)
    with specexec.load("demo", drafter="none", dtype="f32") as plain:
        expected = plain.generate(ask, sampling)
    with specexec.load("demo", dtype="f32", lossy=("steps=inf",)) as llm:
        found = llm.generate(ask, sampling)
        assert (found.tokens, found.replaced, llm.lossy) == (expected.tokens, (), ("steps=inf",))
        assert found.sweeps < len(found.tokens) / 3, "its steps are guesses all the same"
        assert llm.sources == "sibling"
        question = llm._decoder.planner.question  # type: ignore[attr-defined]  # Steps
        spelled = str(llm.tokenizer.decode(list(question.tokens)))
        assert spelled.startswith("<|end|>")
        assert spelled.endswith("<|assistant|>Score: ")
        assert [llm.decode([digit]) for digit in question.digits] == [*"0123456789"]


@pytest.mark.parametrize("drafter", ["none", "ngram", "mtp", "sibling+ngram"])
def test_what_cannot_write_alone_is_refused(drafter: str) -> None:
    with pytest.raises(BadDrafter, match=r"lets one model write, which .* is not"):
        specexec.load("demo", drafter=drafter, lossy=("steps=7",))


def test_a_budget_without_room_for_the_question_is_refused() -> None:
    with pytest.raises(BadOption, match=r"lossy steps need \d+ guesses in a sweep.*the budget is 8"):
        specexec.load("demo", budget=8, lossy=("steps=7",))


@pytest.mark.parametrize(
    "typed", ["steps", "steps=", "steps=10", "steps=-1", "steps=nan", "prompt=1", "prompt=0", "x=1"]
)
def test_only_what_has_a_meaning_can_be_asked_for(typed: str) -> None:
    with pytest.raises(BadOption, match=r"lossy is .*allowed: steps=N"):
        LoadOptions(lossy=(typed,))


def test_nothing_is_asked_for_twice_or_beside_exact() -> None:
    with pytest.raises(BadOption, match="each once"):
        LoadOptions(lossy=("steps=7", "steps=8"))
    with pytest.raises(BadOption, match="exact texts are wanted, and lossy ones"):
        LoadOptions(lossy=("steps=7",), exact=True)
    with pytest.raises(BadOption, match="a tuple of texts"):
        LoadOptions(lossy="steps=7")  # type: ignore[arg-type]  # that is the point
    assert Lossy.of(["prompt=0.25", "steps=7.0"]).labels == ("steps=7", "prompt=0.25")
    assert LoadOptions().lossy == ()
