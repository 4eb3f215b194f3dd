"""A drafter with another tokenizer works, as text: the target's text is untouched, and what it guesses is accepted."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence as Items
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import specexec
from offload.hub.names import demo_folder
from specexec import SamplingParams
from specexec.compose.load import encoding_of
from specexec.drafters.translated import TokenWording as Worded
from specexec.drafters.translated import TranslatedDrafter, _Reading
from specexec.model.tree_lm import TreeLM
from specexec.text.token_bytes import Wording
from tests import real
from tests.tiny import tiny
from tests.writing import sequence_of

PROMPTS = ("The with statement", "Why do leaves fall? – naïve 🌱")
SAMPLINGS = (
    SamplingParams(temperature=0.0, max_tokens=20),
    SamplingParams(temperature=0.9, top_p=0.95, seed=2, max_tokens=20),
)


def permuted(folder: Path) -> Path:
    """The demo drafter with every id renamed: the same strings, the same function."""
    shutil.copytree(demo_folder("drafter"), folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    new = torch.arange(len(vocabulary))
    new[4:] = 4 + torch.randperm(len(vocabulary) - 4, generator=torch.Generator().manual_seed(0))
    tokenizer["model"]["vocab"] = {text: int(new[token]) for text, token in vocabulary.items()}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if "embed" in name or "lm_head" in name]:
        weights[name] = torch.empty_like(weights[name]).index_copy_(0, new, weights[name])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def shorter(folder: Path) -> Path:
    """The demo drafter with few merges: it cuts the same text into many more pieces than the target."""
    permuted(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:600]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def written(drafter: str) -> tuple[list[tuple[int, ...]], int]:
    """All texts, and the sweeps they took."""
    with specexec.load("demo", drafter=drafter, offload="none", dtype="f32", budget=24) as llm:
        answers = [llm.generate(prompt, sampling) for prompt in PROMPTS for sampling in SAMPLINGS]
    return [one.tokens for one in answers], sum(one.sweeps for one in answers)


@pytest.fixture(scope="module")
def plain() -> list[tuple[int, ...]]:
    return written("none")[0]


def test_renamed_ids_cost_next_to_nothing(
    plain: list[tuple[int, ...]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, sweeps = written("sibling")
    with caplog.at_level(logging.WARNING):
        texts, translated = written(str(permuted(tmp_path / "renamed")))
    assert texts == plain
    assert translated <= 1.3 * sweeps
    assert "has another vocabulary: its guesses are carried over as text" in caplog.text


def test_other_pieces_are_still_accepted(plain: list[tuple[int, ...]], tmp_path: Path) -> None:
    texts, sweeps = written(f"{shorter(tmp_path / 'shorter')}+ngram")
    assert texts == plain
    assert sweeps < sum(map(len, plain)), "something was accepted"


class Letters:
    """A tokenizer of letters, or of pairs of them."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._known: list[bytes] = []

    begin: tuple[int, ...] = ()
    end: int | None = None
    lead = b""

    def cut(self, text: bytes) -> list[int]:
        pieces = [text[at : at + self._size] for at in range(0, len(text), self._size)]
        self._known += [piece for piece in dict.fromkeys(pieces) if piece not in self._known]
        return [self._known.index(piece) for piece in pieces]

    def spelled(self, tokens: Items[int]) -> bytes:
        return b"".join(self._known[token] for token in tokens)


def test_a_longer_piece_of_theirs_promises_our_later_tokens(tmp_path: Path) -> None:
    """Theirs is "ab"; ours are "a" and "b": after "a" the promise of "b" stands, with the share that led there."""
    ours: Worded = Letters(1)
    theirs: Worded = Letters(2)
    a, b, c = ours.cut(b"abc")
    ab, ac = theirs.cut(b"abac")
    drafter = TranslatedDrafter(TreeLM(tiny("llama", tmp_path)), ours, theirs, "pairs")
    reading = _Reading(best={(9,): ([ab, ac], [0.6, 0.3])})
    assert dict(drafter._chances(reading, (), (9,))) == {a: pytest.approx(0.9)}
    assert dict(drafter._chances(reading, (a,), (7,))) == {b: pytest.approx(2 / 3), c: pytest.approx(1 / 3)}


def test_a_piece_that_begins_our_tokens_stands_for_those_seen(tmp_path: Path) -> None:
    ours: Worded = Letters(2)
    theirs: Worded = Letters(1)
    (ab, ac) = ours.cut(b"abac")
    (a,) = theirs.cut(b"a")
    drafter = TranslatedDrafter(TreeLM(tiny("llama", tmp_path)), ours, theirs, "letters")
    sequence = sequence_of([ab], SAMPLINGS[0])
    drafter._readings[sequence] = _Reading(length=1, best={(9,): ([a], [0.8])})
    sequence.tokens += [ac, ac, ac]
    drafter.observe(sequence, sequence.growth.tree, [ac], None)
    chances = drafter._chances(drafter._readings[sequence], (), (9,))
    assert chances[ac] == pytest.approx(0.8 * 3 / 4)


def test_text_goes_there_and_back() -> None:
    wording = Wording(encoding_of("demo").tokenizer)
    text = "<|user|>One  two\n\tthree é →".encode()
    assert wording.spelled(wording.cut(text)) == text


@pytest.mark.parametrize(("ours", "theirs"), [("qwen3", "llama2"), ("llama2", "qwen3")])
def test_real_tokenizers_of_either_kind_beside_each_other(tmp_path: Path, ours: str, theirs: str) -> None:
    """Random models as sure as can be, so that chances are too small for a number."""
    rows = {"qwen3": 151_936, "llama2": 32_000}
    for name, tokenizer in (("target", ours), ("drafter", theirs)):
        model = tiny(
            "llama", tmp_path / name, vocab_size=rows[tokenizer], hidden_size=32, head_dim=8, num_hidden_layers=1
        )
        if name == "drafter":
            model.get_output_embeddings().weight.data *= 100
            model.save_pretrained(tmp_path / name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(real.tokenizer(tokenizer) / file, tmp_path / name / file)
    texts = []
    for drafter in ("none", str(tmp_path / "drafter")):
        with specexec.load(str(tmp_path / "target"), drafter=drafter, offload="none", dtype="f32", budget=8) as llm:
            asked = SamplingParams(temperature=0.9, seed=1, max_tokens=6, repetition_penalty=1.2)
            texts.append(llm.generate("  Two blanks, 你好 🌱", asked).tokens)
    assert texts[0] == texts[1]
