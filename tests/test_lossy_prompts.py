"""Long prompts of which a part is read: what the drafter looks at, as transformers' own attention says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import specexec
from offload.hub.names import demo_folder
from specexec.compose.load_options import LoadOptions
from specexec.errors import BadDrafter, ContextLengthExceeded
from specexec.lossy import prompts
from specexec.lossy.prompts import FIRST, LOOKING, NEIGHBOURS, ShortPrompts, looked_at
from specexec.model.tree_lm import TreeLM
from specexec.sampling.params import SamplingParams
from tests.tiny import tiny
from tests.writing import prompt

LONG = 600
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


def eager(family: str, folder: Path) -> PreTrainedModel:
    model = tiny(family, folder, max_position_embeddings=2048)
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_it_looks_where_transformers_attends(family: str, tmp_path: Path) -> None:
    tokens, truth = prompt(LONG), eager(family, tmp_path / "truth")
    with torch.no_grad():
        attended = truth(torch.tensor([tokens]), output_attentions=True).attentions
    full = attended[1::2] if family == "gemma3_text" else attended  # its other layers see a window
    whole_R = torch.stack([layer_BHQR[0, :, -LOOKING:].mean(1).amax(0) for layer_BHQR in full]).amax(0)
    expected_R = [max(whole_R[max(at - NEIGHBOURS, 0) : at + NEIGHBOURS + 1].tolist()) for at in range(LONG)]
    lm = TreeLM(tiny(family, tmp_path / "lm", max_position_embeddings=2048))
    torch.testing.assert_close(looked_at(lm, tokens), torch.tensor(expected_R), rtol=1e-4, atol=1e-6)
    lm.close()


def test_what_is_looked_at_stays_in_its_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "WHOLE", 200)
    lm, tokens = TreeLM(tiny("llama", tmp_path, max_position_embeddings=LONG)), list(range(LONG // 2)) * 2
    tokens = [token % 250 for token in tokens]
    control = 300 % 250
    short = ShortPrompts(0.5, lm, {control})
    kept = short.of(tokens)
    assert len(kept) == LONG // 2
    assert kept[:FIRST] == tokens[:FIRST]
    assert kept[-LOOKING:] == tokens[-LOOKING:]
    assert kept.count(control) == tokens.count(control)
    rest = iter(tokens)
    assert all(token in rest for token in kept), "nothing is moved"
    assert len(replace(short, share=0.1).of(tokens)) == 200, "never less than a sweep takes anyway"
    assert short.of(tokens[:200]) == tokens[:200]
    with pytest.raises(ContextLengthExceeded, match="the drafter that is to choose among them reads 600"):
        short.of([*tokens, 1])
    lm.close()


def test_the_text_is_that_of_the_tokens_that_were_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "WHOLE", 128)
    tokens = prompt(400)
    with specexec.load("demo", dtype="f32", lossy=("prompt=0.4",)) as llm:
        found = llm.generate(tokens, GREEDY)
        assert (found.unread, found.prompt_tokens) == (240, 400)
        control = {*llm.tokenizer.all_special_ids}
        kept = ShortPrompts(0.4, llm.models["drafter"], control).of(tokens)
        short = llm.generate(tokens[:100], GREEDY)
        assert short.unread == 0
        assert llm.lossy == ("prompt=0.4",)
    with specexec.load("demo", dtype="f32", drafter="none") as exact:
        assert exact.generate(kept, GREEDY).tokens == found.tokens
        assert exact.generate(tokens[:100], GREEDY).tokens == short.tokens


@pytest.mark.parametrize("drafter", ["none", "ngram", "substitute"])
def test_without_a_model_that_looks_it_is_refused(drafter: str) -> None:
    with pytest.raises(BadDrafter, match="lets a drafter model look at prompts, and none drafts here"):
        specexec.load("demo", drafter=drafter, lossy=("prompt=0.4",))


def test_a_window_hides_what_it_looks_at() -> None:
    assert demo_folder("drafter").exists()
    with pytest.raises(BadDrafter, match="--draft-window hides"):
        specexec.load("demo", LoadOptions(draft_window=64, lossy=("prompt=0.4",)))
