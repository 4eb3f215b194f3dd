"""A model that sends each token through its layers several times streams with a layer for each turn (HRM Text)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import HrmTextConfig, HrmTextForCausalLM

import offload
from offload.packs.pack import pack, plan
from specexec.drafters.none import NoDrafter
from specexec.drafters.sibling import SiblingDrafter
from specexec.model.tree_lm import TreeLM
from specexec.sampling.params import SamplingParams
from tests.tiny import VOCABULARY
from tests.writing import greedy, prompt, write

PROMPTS = [prompt(length, seed=length, most=200) for length in (3, 30)]
STACKED, LOW, HIGH = 2, 2, 2
COUNT = 16


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    """A folder, and what transformers' own generate writes."""
    torch.manual_seed(0)
    config = HrmTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_hidden_layers=STACKED,
        H_cycles=HIGH,
        L_cycles=LOW,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = HrmTextForCausalLM(config).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.mul_(3)
    folder = tmp_path_factory.mktemp("hrm")
    model.save_pretrained(folder)
    return folder, [greedy(model, tokens, COUNT) for tokens in PROMPTS]


@pytest.mark.parametrize("tier", ["disk", "none"])
def test_texts_are_those_of_generate_with_trees_and_without(
    truth: tuple[Path, list[list[int]]], tier: offload.Offload
) -> None:
    folder, expected = truth
    target = TreeLM(offload.load(folder, tier))
    assert offload.stream_of(target.model).layers == STACKED * (LOW + 1) * HIGH
    sampling = SamplingParams(temperature=0.0, max_tokens=COUNT)
    perfect = SiblingDrafter(TreeLM(offload.load(folder, "none")), VOCABULARY)
    for drafter, budget in ((NoDrafter(), 0), (perfect, 24)):
        texts = write(target, drafter, PROMPTS, sampling, budget=budget)
        assert [text.answer for text in texts] == expected
    target.close()


def test_a_config_that_counts_the_layers_of_a_stack_means_the_same(
    truth: tuple[Path, list[list[int]]], tmp_path: Path
) -> None:
    folder, _ = truth
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["num_layers_per_stack"]
    (tmp_path / "config.json").write_text(json.dumps({**settings, "num_hidden_layers": STACKED}))
    for path in (folder, tmp_path):
        need = offload.need_of(offload.open_folder(path), 4, 64)
        loaded = offload.stream_of(offload.load(path, "disk", ctx=64)).placement.need
        assert (need.read_B, need.cache_B) == (loaded.read_B, loaded.cache_B)
        assert all(one <= planned for one, planned in zip(loaded.layers_B, need.layers_B, strict=True))
        assert len(need.layers_B) == STACKED * (LOW + 1) * HIGH


def test_a_pack_holds_each_turn_and_writes_the_same(truth: tuple[Path, list[list[int]]], tmp_path: Path) -> None:
    folder, expected = truth
    pack(plan(offload.open_folder(folder), "none"), tmp_path / "packed")
    target = TreeLM(offload.load(tmp_path / "packed", "disk"))
    sampling = SamplingParams(temperature=0.0, max_tokens=COUNT)
    assert [text.answer for text in write(target, NoDrafter(), PROMPTS, sampling, budget=0)] == expected
    target.close()
