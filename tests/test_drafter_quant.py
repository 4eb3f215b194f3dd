"""A drafter in few bits takes what is planned and changes no token; where it would do nothing it is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import offload
import specexec
from offload.checkpoint.headers import open_folder
from offload.hub.names import demo_folder
from offload.machine.memory import Free
from offload.packs.pack import pack, plan
from offload.placement.quantized_sizes import FewBits, resident_B
from specexec import LoadProgress, SamplingParams
from specexec.drafters.few_bits import FourBit
from specexec.engine.engine import Engine
from specexec.errors import BadDrafter
from specexec.sizes import drafting_B, widths_of
from tests.tiny import tiny

CTX = 256


def copying(form: FewBits, progress: LoadProgress | None = None) -> Engine:
    """The demo, drafting for itself from the disk."""
    return specexec.load(
        drafter="substitute", drafter_quant=form, offload="disk", dtype="f32", ctx=CTX, budget=16, progress=progress
    )


def test_the_text_is_the_same_and_the_layers_are_small() -> None:
    sampling = SamplingParams(temperature=0.8, seed=4, max_tokens=24)
    with specexec.load(drafter="none", dtype="f32", ctx=CTX) as llm:
        plain = llm.generate("What is a tree?", sampling)
    with specexec.load(drafter="sibling", drafter_quant="nf4", budget=16, dtype="f32", ctx=CTX) as llm:
        small = llm.generate("What is a tree?", sampling)
        draft = llm._drafts["drafter"].model
        held = [module for module in draft.modules() if isinstance(module, FourBit)]
        rest = {id(tensor): tensor.nbytes for tensor in (*draft.parameters(), *draft.buffers())}
        beside_B = offload.stream_of(llm._model).placement.need.beside_B["drafter"]
    assert small.tokens == plain.tokens
    assert small.accepted > 0
    assert held
    held_B = sum(module._packed.nbytes + module._state.absmax.nbytes for module in held) + sum(rest.values())
    folder = open_folder(demo_folder("drafter"))
    planned_B = resident_B(folder, "nf4", 4, CTX) - 4 * CTX * sum(offload.cache_widths(folder.config))
    assert 0.5 * planned_B < held_B <= planned_B < beside_B


def test_the_layers_of_a_large_drafter_take_a_third(tmp_path: Path) -> None:
    tiny("llama", tmp_path, num_hidden_layers=24)
    folder = open_folder(tmp_path)
    layers_B = sum(offload.need_of(folder, 2, CTX).layers_B)
    whole_B, four_B, three_B, two_B = (resident_B(folder, form, 2, CTX) for form in ("none", "nf4", "hqq3", "hqq2"))
    assert whole_B - four_B > 0.55 * layers_B
    assert four_B - three_B == pytest.approx(0.8 / 16 * layers_B, abs=2)
    assert three_B - two_B == pytest.approx(1.2 / 16 * layers_B, abs=2)


def test_the_targets_own_copy_takes_the_form_that_was_asked_for() -> None:
    sampling = SamplingParams(temperature=0.8, seed=4, max_tokens=16)
    with specexec.load(drafter="none", dtype="f32", ctx=CTX) as llm:
        plain = llm.generate("What is a tree?", sampling)
    beside_B: dict[FewBits, int] = {}
    asked: dict[FewBits, str] = {"none": "substitute", "hqq3": "substitute-hqq3"}
    for form, name in asked.items():
        with copying(form) as llm:
            answer = llm.generate("What is a tree?", sampling)
            assert (answer.tokens, llm.drafter_name) == (plain.tokens, name)
            assert answer.accepted > 0
            beside_B[form] = offload.stream_of(llm._model).placement.need.beside_B["drafter"]
    assert beside_B["hqq3"] < beside_B["none"]


def test_how_many_layers_are_quantised_is_reported_while_it_is_done() -> None:
    done: list[tuple[int, int]] = []
    with copying("hqq2", progress=LoadProgress(quantised=lambda *so_far: done.append(so_far))) as llm:
        layers = offload.stream_of(llm._model).layers
    assert done == [(layer + 1, layers) for layer in range(layers)]


def test_hqqs_forms_ask_for_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specexec.compose.drafter_factory.find_spec", lambda name: None)
    with pytest.raises(BadDrafter, match="needs hqq, which is not installed") as problem, copying("hqq3"):
        pass
    assert "pip install 'specexec[hqq]'" in str(problem.value.hint)


@pytest.mark.parametrize("name", ["none", "ngram"])
def test_without_a_drafter_model_it_is_refused(name: str) -> None:
    with pytest.raises(BadDrafter, match="none drafts here"):
        specexec.load(drafter=name, drafter_quant="nf4")


def test_a_drafter_that_has_few_bits_already_is_refused(tmp_path: Path) -> None:
    pack(plan(open_folder(demo_folder("drafter")), "int8"), tmp_path / "packed")
    with pytest.raises(BadDrafter, match="is quantised already"):
        specexec.load(drafter=str(tmp_path / "packed"), drafter_quant="nf4")


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_the_embeddings_of_a_drafter_are_counted_where_they_are(
    family: str, quant: FewBits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU in the place of a GPU: a whole drafter that is not tied looks token ids up in RAM, as the target does."""
    for module in ("offload.model.load.free_memory", "offload.free_memory"):
        monkeypatch.setattr(module, lambda *_: Free(1 << 30, 1 << 30), raising=False)
    tiny(family, tmp_path, vocab_size=4096)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_folder("target") / file, tmp_path / file)
    with specexec.load("demo", drafter=str(tmp_path), drafter_quant=quant, dtype="f32", ctx=CTX, budget=4) as llm:
        draft = llm._drafts["drafter"].model
        embeddings = draft.get_input_embeddings()
        placement = offload.stream_of(llm._model).placement
        in_ram = quant == "none" and family == "llama"
        if quant == "none":  # for four bits it is loaded on the CPU, which the stand-in cannot tell from the GPU
            assert bool(embeddings._forward_hooks) == in_ram
        in_ram_B = 4096 * 64 * 4 * in_ram
        assert placement.host_parts_B.get("embeddings of the drafter", 0) == in_ram_B
        there_B = placement.device_parts_B["drafter"]
    held_B = sum(tensor.nbytes for tensor in draft.parameters()) - in_ram_B
    assert there_B >= held_B
    folder = open_folder(tmp_path)
    widths = widths_of(folder.config, 4, offload.cache_widths(folder.config))
    assert there_B + in_ram_B == resident_B(folder, quant, 4, CTX) + drafting_B(widths, CTX, 4), "and counted once"
