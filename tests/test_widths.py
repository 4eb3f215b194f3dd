"""Three widths, equal and unequal in every order: entries of the tokenizer, rows of the target, rows of the drafter.

The text is always that of plain decoding, and what no tokenizer knows is never drafted.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import specexec
from offload.hub.names import demo_folder
from specexec import Completion, SamplingParams
from specexec.engine.engine import Engine
from specexec.sampling.grammar import regex
from specexec.stats import Burst
from specexec.text.vocabularies import Nameable, nameable
from tests import real
from tests.tiny import tiny

ENTRIES = 4096  # of the demo's tokenizer, which these models share
PADDED = 4160
PROMPTS = ["leaves fall"]
SAMPLINGS = {
    "greedy": SamplingParams(temperature=0.0),
    "filtered": SamplingParams(temperature=0.8, seed=2, top_p=0.9, top_k=50, min_p=0.01),
    "penalised": SamplingParams(
        temperature=0.9, seed=3, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.4
    ),
    "a padded id": SamplingParams(
        temperature=0.8,
        seed=5,
        logit_bias=((PADDED - 3, 11.0), (5, 2.0)),
        repetition_penalty=1.3,
        frequency_penalty=0.3,
    ),
    "greedy, a padded id": SamplingParams(temperature=0.0, logit_bias=((PADDED - 3, 100.0),)),
}
LENGTH = 8


def model(folder: Path, rows: int) -> Path:
    """A tiny model with the demo's tokenizer and so many rows; those with other rows compute nearly the same."""
    made = tiny("llama", folder, vocab_size=PADDED, num_hidden_layers=2)
    with torch.random.fork_rng():
        torch.manual_seed(rows)
        made.resize_token_embeddings(rows, mean_resizing=False)
    made.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_folder("target") / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    return {rows: model(tmp_path_factory.mktemp(str(rows)), rows) for rows in (3000, ENTRIES, 4100, PADDED, 4224)}


def load(target: Path, drafter: str, **options: object) -> Engine:
    return specexec.load(str(target), drafter=drafter, offload="none", dtype="f32", budget=8, **options)  # type: ignore[arg-type]


def written(llm: Engine, name: str) -> list[Burst]:
    asked = SAMPLINGS[name]
    most = {**asked.__dict__, "max_tokens": LENGTH, "logprobs": 2}
    return [burst for prompt in PROMPTS for burst in llm.stream(prompt, SamplingParams(**most))]


@pytest.fixture(scope="module")
def plain(folders: dict[int, Path]) -> dict[tuple[int, str], list[int]]:
    """What each target writes alone."""
    found = {}
    for rows in (ENTRIES, PADDED):
        with load(folders[rows], "none") as llm:
            for name in SAMPLINGS:
                if rows == PADDED or "padded" not in name:
                    found[rows, name] = [token for burst in written(llm, name) for token in burst.tokens]
    return found


PAIRS = [
    (PADDED, "3000"), (PADDED, "4096"), (PADDED, "4100+ngram"), (PADDED, "4160"), (PADDED, "4224"),
    (ENTRIES, "3000"), (ENTRIES, "4224"), (PADDED, "skip+ngram"), (PADDED, "substitute"),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "drafter"), PAIRS, ids=lambda value: str(value))
def test_the_text_is_that_of_plain_decoding(
    folders: dict[int, Path],
    plain: dict[tuple[int, str], list[int]],
    rows: int,
    drafter: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("specexec.drafters.skip.TRIES", 4)
    named = "+".join(str(folders[int(part)]) if part.isdigit() else part for part in drafter.split("+"))
    with load(folders[rows], named) as llm:
        accepted = 0
        for name in SAMPLINGS:
            if (rows, name) in plain:
                bursts = written(llm, name)
                assert [token for burst in bursts for token in burst.tokens] == plain[rows, name], name
                assert all(max(burst.tree.tokens_N.tolist(), default=0) < ENTRIES for burst in bursts)
                assert sum(len(burst.logprobs) for burst in bursts) == len(plain[rows, name])
                accepted += sum(burst.accepted for burst in bursts)
    if "4160" in drafter:
        assert accepted > LENGTH, "a drafter that is the target itself is believed"


def test_a_padded_id_was_really_written(plain: dict[tuple[int, str], list[int]]) -> None:
    """Else the tests above would show nothing."""
    assert PADDED - 3 in plain[PADDED, "a padded id"]
    assert set(plain[PADDED, "greedy, a padded id"]) == {PADDED - 3}


@pytest.mark.parametrize("drafter", ["3000", "4224"])
def test_a_grammar_and_a_trimmed_head_change_nothing(folders: dict[int, Path], drafter: str) -> None:
    def answers(llm: Engine) -> list[tuple[int, ...]]:
        grammar = llm.grammar(regex("(harbour|leaves) [a-z0-9 ]+"))
        return [
            llm.generate("say", SamplingParams(temperature=t, seed=6, max_tokens=LENGTH, grammar=grammar)).tokens
            for t in (0.0, 1.0)
        ]

    with load(folders[PADDED], "none") as llm:
        expected = answers(llm)
    for trimmed in (None, 200):
        with load(folders[PADDED], str(folders[int(drafter)]), draft_vocab=trimmed) as llm:
            assert answers(llm) == expected


def test_a_batch_of_unequal_wishes_is_written_as_each_alone(
    folders: dict[int, Path], plain: dict[tuple[int, str], list[int]]
) -> None:
    each = [SamplingParams(**{**asked.__dict__, "max_tokens": LENGTH}) for asked in SAMPLINGS.values()]
    with load(folders[PADDED], f"{folders[3000]}+ngram", draft_vocab=1000) as llm:
        results = {one.index: one for one in llm.generate_many([PROMPTS[0]] * len(each), each)}
    for index, name in enumerate(SAMPLINGS):
        one = results[index]
        assert isinstance(one, Completion)
        assert list(one.tokens) == plain[PADDED, name][: len(one.tokens)]


@pytest.mark.parametrize("rows", [151_700])
def test_qwen3s_rows_and_entries(tmp_path_factory: pytest.TempPathFactory, rows: int) -> None:
    """151,669 entries, 151,936 rows, and drafters with fewer and more."""
    folder = tmp_path_factory.mktemp("qwen3")
    for name, count in (("target", 151_936), ("drafter", rows)):
        tiny("llama", folder / name, vocab_size=count, hidden_size=32, head_dim=8, num_hidden_layers=1)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(real.tokenizer("qwen3") / file, folder / name / file)
    asked = [
        SamplingParams(temperature=0.8, seed=1, max_tokens=4, repetition_penalty=1.3),
        SamplingParams(temperature=0.8, seed=2, max_tokens=4, logit_bias=((151_930, 100.0),)),
    ]
    texts = []
    for drafter in ("none", str(folder / "drafter")):
        with load(folder / "target", drafter) as llm:
            texts.append([llm.generate("你好 <|im_end|>", one).tokens for one in asked])
    assert texts[0] == texts[1]
    assert texts[0][1] == (151_930,) * 4


def test_what_may_be_named(tmp_path: Path) -> None:
    """Below the rows of both and the tokenizer's end, no gaps, none that another model calls otherwise."""
    tokenizer = json.loads((demo_folder("target") / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    gap = max(vocabulary.values()) - 1
    del vocabulary[next(text for text, token in vocabulary.items() if token == gap)]
    tokenizer["model"]["merges"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    from transformers import PreTrainedTokenizerFast

    gapped = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert nameable(gapped, [5000, 4160]) == Nameable(ENTRIES, frozenset({gap}))
    assert nameable(gapped, [5000, 3000], never=[7]) == Nameable(3000, frozenset({7}))
