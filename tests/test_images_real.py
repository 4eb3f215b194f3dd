"""Images with the tokenizers and the chat templates of published models, through every door a user has.

The models are tiny and random, the vocabularies as long as those that were published (tests/real_pictured.py). What is
written is compared with transformers' processor, its chat template, and generate of the whole model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import specexec
from specexec.engine.engine import Engine
from specexec.model.cache import KVCache
from specexec.model.tree_lm import Rows, TreeLM
from specexec.sampling.params import SamplingParams
from tests.command_line import CommandLine
from tests.pictured import PICTURES, logits, picture, shown, written
from tests.real_pictured import inputs_of, processor_of, really_seeing
from tests.serving import serving

MOST = 6
GREEDY = SamplingParams(temperature=0.0, max_tokens=MOST, ignore_eos=True)
OPTIONS = "-t", "0", "-n", str(MOST), "--ignore-eos"
ONE, OTHER = map(picture, PICTURES)
QUESTION = "Qué es <img> 图?"
FAMILIES = ["qwen3_5"]  # scripts/images.py --published tries all of PUBLISHED


@dataclass(frozen=True)
class Model:
    """A checkpoint, streamed, and transformers' own model and processor of it."""

    folder: Path
    truth: PreTrainedModel
    processor: Any
    engine: Engine

    def inputs(self, *content: bytes | str) -> dict[str, Any]:
        return inputs_of(self.processor, [{"role": "user", "content": content}])

    def answer(self, *content: bytes | str) -> str:
        """What a user is to read."""
        return str(self.engine.tokenizer.decode(written(self.truth, self.inputs(*content), MOST)))


@contextmanager
def model_of(family: str, folder: Path) -> Iterator[Model]:
    """A model of one of PUBLISHED."""
    truth = really_seeing(family, folder)
    with specexec.load(str(folder), drafter="ngram", offload="disk", budget=8) as engine:
        yield Model(folder, truth, processor_of(family, folder), engine)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with model_of(request.param, tmp_path_factory.mktemp(request.param)) as made:
        yield made


def test_prompts_and_answers_are_those_of_the_whole_model(model: Model) -> None:
    lm = model.engine._target
    assert isinstance(lm, TreeLM)
    asked: list[list[bytes | str]] = [[ONE, "What is it?"], ["Is ", OTHER, QUESTION, ONE]]
    for content in asked:
        ours, theirs = model.engine.encode([shown(*content)]), model.inputs(*content)
        assert model.engine.encoding.in_vocabulary(ours) == theirs["input_ids"][0].tolist()
        assert list(model.engine.generate([shown(*content)], GREEDY).tokens) == written(model.truth, theirs, MOST)
        (hidden_RH,) = lm.forward([Rows.text(KVCache(), ours)])
        of_last_V = lm.head(hidden_RH[-1:])[0]  # tied random models repeat a token whatever they see
        torch.testing.assert_close(of_last_V, logits(model.truth, theirs)[-1].float(), atol=2e-3, rtol=2e-3)


def test_every_door_shows_the_same_image(
    model: Model, real: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = model.answer(ONE, QUESTION)
    (tmp_path / "one.png").write_bytes(ONE)
    monkeypatch.setattr(Engine, "close", lambda _: None)
    monkeypatch.setattr(real, "_open", lambda *_, **__: model.engine)
    said = real("chat", "-m", str(model.folder), "-i", "one.png", "-p", QUESTION, "--json", *OPTIONS)
    assert said.code == 0, said.err
    assert _all_of(json.loads(said.out)) == expected
    part = {"type": "image_url", "image_url": {"url": "one.png"}}
    line = {"messages": [{"role": "user", "content": [part, {"type": "text", "text": QUESTION}]}]}
    (tmp_path / "in.jsonl").write_text(json.dumps(line), encoding="utf-8")
    said = real("generate", "in.jsonl", "-o", "out.jsonl", "-m", str(model.folder), *OPTIONS)
    assert said.code == 0, said.err
    assert _all_of(json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8"))) == expected
    with serving(lambda: model.engine, names=("m",)) as served, served.http as client:
        body = {"messages": [shown(ONE, QUESTION)], "temperature": 0, "max_tokens": MOST, "ignore_eos": True}
        answer = client.post("/v1/chat/completions", json=body).json()
    assert _all_of(answer["choices"][0]["message"]) == expected


def _all_of(said: Mapping[str, Any]) -> str:
    """Qwen 3.5's template opens a thought, which in so few tokens does not end."""
    return str(said.get("reasoning") or "") + str(said.get("text") or said.get("content") or "")
