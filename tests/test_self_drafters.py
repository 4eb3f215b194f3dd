"""The target as its own drafter: fewer layers, or all of them in few bits. Exact, and as good as its parts allow."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import offload
import specexec
import specexec.drafters.few_bits as few_bits_of
from offload.checkpoint.quantized.quantize import Quant
from offload.model import load as models
from offload.packs.pack import pack, plan
from offload.placement.placement import Tier
from offload.placement.solver import place
from specexec.drafters.few_bits import Form, FourBit, Grouped, quantised
from specexec.drafters.protocol import Drafter
from specexec.drafters.ranking import Ranking
from specexec.drafters.sibling import SiblingDrafter
from specexec.drafters.skip import skipping, spread
from specexec.drafters.substitute import substituting
from specexec.engine.decoder import Decoder
from specexec.errors import UnsupportedArchitecture
from specexec.model.sublayers import Kept
from specexec.model.submodel import layer_list_path
from specexec.model.tree_lm import TreeLM
from specexec.planning.best_first import BestFirst
from specexec.sampling.params import SamplingParams
from tests.tiny import LAYERS, VOCABULARY, tiny
from tests.writing import greedy, plain_texts, prompt, samplings, sequence_of, write
from tests.zoo import tiny_of

LENGTH = 24
PROMPT = prompt(21)
SURE = Ranking(tau=0.01)
SAMPLINGS = samplings(LENGTH)
FORMS: tuple[Form, ...] = get_args(Form)
FAMILIES = ["llama", "llama_tied", "gemma3_text", "opt", "gpt_neox", "qwen3"]


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    found = model.get_submodule(".".join(layer_list_path(model)))
    assert isinstance(found, nn.ModuleList)
    return found


def few_bits(model: PreTrainedModel, form: Form = "nf4") -> dict[int, nn.Module]:
    return {i: quantised(copy.deepcopy(layer), torch.device("cpu"), form) for i, layer in enumerate(layers_of(model))}


def whole(layers: Iterable[int]) -> Kept:
    """Both sublayers of these."""
    kept_LS = np.zeros((LAYERS, 2), bool)
    kept_LS[list(layers)] = True
    return kept_LS


class Case:
    """A target whose weights four bits can say exactly, so that its substitute is perfect."""

    def __init__(self, folder: Path, family: str = "llama") -> None:
        model = tiny(family, folder / "target")
        for module in layers_of(model).modules():
            if isinstance(module, nn.Linear):
                module.weight.data = FourBit(module, torch.device("cpu")).weight.clone()
        self.layers = dict(enumerate(copy.deepcopy(layers_of(model))))
        self.quantised: dict[str, dict[int, nn.Module]] = {form: few_bits(model, form) for form in FORMS}
        self.target = TreeLM(model)

    def drafter(self, name: str, ranking: Ranking | None = None) -> Drafter:
        if name in FORMS:
            return substituting(self.target, self.quantised[name], VOCABULARY, ranking)
        kept = range(LAYERS) if name == "all" else spread(LAYERS, 2)
        return skipping(self.target, self.layers.__getitem__, whole(kept), VOCABULARY, ranking)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    case = Case(tmp_path_factory.mktemp("case"))
    yield case
    case.target.close()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("sampling", samplings(12), ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", ["skip", *FORMS])
def test_the_text_is_that_of_plain_decoding(case: Case, name: str, sampling: SamplingParams, overlap: bool) -> None:
    (sequence,) = write(case.target, case.drafter(name), [PROMPT], sampling, 16, overlap=overlap)
    assert [sequence.answer] == plain_texts(case.target, [PROMPT], sampling)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", ["all", "nf4"])
def test_a_perfect_copy_is_accepted_whole(case: Case, name: str, sampling: SamplingParams) -> None:
    decoder = Decoder(case.target, case.drafter(name, SURE), BestFirst(), 7)
    decoder.join(sequence_of(PROMPT, sampling))
    for _ in range(3):
        (step,) = decoder.step()
        assert step.burst.accepted == 7


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_skip_and_be_substituted(family: str, tmp_path: Path) -> None:
    model = tiny(family, tmp_path / "target")
    plain_layers = dict(enumerate(copy.deepcopy(layers_of(model))))
    small = few_bits(model)
    target = TreeLM(model)
    for drafter in (
        skipping(target, plain_layers.__getitem__, whole((0, 1, 3)), VOCABULARY),
        substituting(target, small, VOCABULARY),
    ):
        (sequence,) = write(target, drafter, [PROMPT], SAMPLINGS[0], 8)
        assert [sequence.answer] == plain_texts(target, [PROMPT], SAMPLINGS[0])


@pytest.mark.parametrize("family", ["llama4_text", "deepseek_v32"])
def test_what_a_config_says_of_each_layer_goes_with_those_that_are_kept(family: str, tmp_path: Path) -> None:
    model = tiny_of(family, tmp_path)
    expected = greedy(model, PROMPT, 20)
    plain_layers = dict(enumerate(copy.deepcopy(layers_of(model))))
    target = TreeLM(model)
    drafter = skipping(target, plain_layers.__getitem__, whole((0, 1, 3)), VOCABULARY)
    (sequence,) = write(target, drafter, [PROMPT], SamplingParams(temperature=0.0, max_tokens=20), 8)
    assert sequence.answer == expected


def test_layers_that_take_over_what_others_chose_are_not_skipped(tmp_path: Path) -> None:
    model = tiny_of("glm_moe_dsa", tmp_path)
    plain_layers = dict(enumerate(copy.deepcopy(layers_of(model))))
    with pytest.raises(UnsupportedArchitecture, match="some depend on what others have found"):
        skipping(TreeLM(model), plain_layers.__getitem__, whole((0, 1, 3)), VOCABULARY)


def test_drafting_leaves_the_targets_cache_alone(case: Case) -> None:
    sequence = sequence_of(PROMPT, SAMPLINGS[0])
    decoder = Decoder(case.target, case.drafter("skip"), BestFirst(), 8)
    decoder.join(sequence)
    decoder.step()
    cache = sequence.cache(case.target)
    assert cache.tokens == sequence.tokens[:-1]
    assert sorted(cache.layers) == list(range(LAYERS))


@pytest.mark.parametrize("width", [256, 96])
def test_four_bits_are_close_and_take_little_room(width: int) -> None:
    linear = nn.Linear(width, 128, bias=True)
    small = FourBit(linear, torch.device("cpu"))
    rows = torch.randn(16, width)
    error = (small(rows) - linear(rows)).norm() / linear(rows).norm()
    assert error < 0.12
    assert small._packed.nbytes == 128 * width // 2
    halved = FourBit(linear.to(torch.bfloat16), torch.device("cpu"))
    assert (halved(rows.bfloat16()).float() - small(rows)).norm() / small(rows).norm() < 0.05


@pytest.mark.parametrize("width", [256, 96])
@pytest.mark.parametrize(("bits", "apart", "codes_B"), [(4, 0.1, 1 / 2), (3, 0.2, 4 / 10), (2, 0.45, 1 / 4)])
def test_the_fewer_the_bits_the_smaller_and_the_further_away(
    width: int, bits: int, apart: float, codes_B: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(few_bits_of, "PART_ON_CPU", 50 * width)  # three parts, the last one short
    linear = nn.Linear(width, 128, bias=True).to(torch.bfloat16).float()  # the same codes in both number formats
    small = Grouped(linear, torch.device("cpu"), bits)
    rows = torch.randn(16, width)
    error = (small(rows) - linear(rows)).norm() / linear(rows).norm()
    assert apart / 3 < error < apart
    groups = 128 * -(-width // 64)
    whole_B = groups * 64 * codes_B
    assert whole_B <= sum(codes.nbytes for codes, _ in small._parts) <= 1.1 * whole_B
    assert sum(meta[name].nbytes for _, meta in small._parts for name in ("scale", "zero")) == 4 * groups
    halved = Grouped(linear.to(torch.bfloat16), torch.device("cpu"), bits)
    assert halved(rows.bfloat16()).dtype == torch.bfloat16
    assert (halved(rows.bfloat16()).float() - small(rows)).norm() / small(rows).norm() < 0.05


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_fused_experts_are_refused_by_name(family: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedArchitecture, match="experts"):
        few_bits(tiny(family, tmp_path / "target"))


@pytest.mark.parametrize("tier", ["none", "ram", "disk"])
def test_a_resident_layer_computes_what_the_streamed_one_does(tier: offload.Offload, tmp_path: Path) -> None:
    tiny("llama", tmp_path / "model")
    model = offload.load(tmp_path / "model", tier)
    reference = layers_of(tiny("llama", tmp_path / "again"))
    try:
        for index in (2, 0):
            layer = offload.resident_layer(model, index)
            for name, parameter in reference[index].named_parameters():
                assert torch.equal(layer.get_parameter(name), parameter)
    finally:
        offload.stream_of(model).close()


def test_layers_that_stay_are_shared_and_only_streamed_ones_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    tiers: tuple[Tier, ...] = ("device", "disk", "device", "disk", "disk")
    monkeypatch.setattr(models, "place", lambda *asked: replace(place(*asked), tiers=tiers, ring=3))
    with specexec.load("demo", drafter="substitute", offload="disk", dtype="f32", budget=8) as llm:
        assert [offload.is_resident(llm._model, i) for i in range(5)] == [tier == "device" for tier in tiers]
        drafter = llm._decoder.drafter
        assert isinstance(drafter, SiblingDrafter)
        assert isinstance(drafter.lm, TreeLM)
        copied = [
            sum(isinstance(module, FourBit) for module in layer.modules()) for layer in layers_of(drafter.lm.model)
        ]
        assert copied == [0, 7, 0, 7, 7]
        for shared in (0, 2):
            ours, theirs = (
                {tensor.data_ptr() for tensor in layer.parameters()}
                for layer in (layers_of(drafter.lm.model)[shared], offload.resident_layer(llm._model, shared))
            )
            assert ours == theirs
        asked = ("How does specexec work?", SamplingParams(temperature=0.0, max_tokens=16))
        guessed = llm.generate(*asked)
        llm.budget = 0
        assert llm.generate(*asked).tokens == guessed.tokens


@pytest.mark.parametrize(
    ("form", "few"),
    [("none", "nf4"), ("int8", "nf4"), ("nf4", "nf4"), ("none", "hqq4"), ("none", "hqq3"), ("none", "hqq2")],
)
def test_a_copy_takes_the_memory_that_was_counted_whatever_the_target_is_stored_in(
    form: Quant, few: Form, tmp_path: Path
) -> None:
    tiny("llama", tmp_path / "model", hidden_size=128, intermediate_size=256)
    folder = tmp_path / "model"
    if form != "none":
        pack(plan(offload.open_folder(folder), form), tmp_path / "pack")
        folder = tmp_path / "pack"
    counted_B, _ = offload.copy_B(offload.open_folder(folder), few, 4)
    model = offload.load(folder, "disk", dtype="f32")
    made = [quantised(offload.resident_layer(model, i), torch.device("cpu"), few) for i in range(LAYERS)]
    modules = [module for layer in made for module in layer.modules()]
    packed_B = sum(one._packed.nbytes + one._state.absmax.nbytes for one in modules if isinstance(one, FourBit))
    for codes, meta in [part for one in modules if isinstance(one, Grouped) for part in one._parts]:
        packed_B += codes.nbytes + meta["scale"].nbytes + meta["zero"].nbytes
    packed_B += sum(tensor.nbytes for layer in made for tensor in layer.parameters())
    # Three bits go ten to a word: of small matrices many words are not full.
    assert counted_B <= packed_B <= counted_B * (1.03 if few == "hqq3" else 1)
    offload.stream_of(model).close()
