"""Several tokens in one pass, by masks behind the text: as their makers compute them, and the text is the target's."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad

import specexec
from offload.checkpoint.headers import open_folder
from offload.hub.names import demo_folder
from specexec.compose.head_folders import head_kind
from specexec.drafters.heads.eagle import Eagle, loaded
from specexec.drafters.heads.lattice import LatticeDrafter
from specexec.drafters.heads.masks import Masks
from specexec.drafters.heads.self_check import SelfCheck
from specexec.drafters.ranking import Named, Ranking
from specexec.engine.decoder import Decoder
from specexec.errors import BadDrafter
from specexec.model.cache import KVCache
from specexec.model.tree_lm import Rows, TreeLM
from specexec.planning.best_first import BestFirst
from specexec.sampling.params import SamplingParams
from tests.eagle_models import chain_target, demo_chain_target, knowing_head, settings_of
from tests.tiny import VOCABULARY, tiny
from tests.writing import prompt, sequence_of, texts_are_plain, write

RECORDED = Path(__file__).parent / "data" / "heads"
SAMPLINGS = [
    SamplingParams(temperature=0.0, max_tokens=16),
    SamplingParams(temperature=0.8, top_p=0.9, seed=1, max_tokens=16),
    SamplingParams(temperature=0.8, seed=2, max_tokens=16, repetition_penalty=1.3),
]
NAMES = ["greedy", "sampled", "penalised"]


def guesses_change_no_text(target: TreeLM, drafter: LatticeDrafter, sampling: SamplingParams, vocabulary: int) -> None:
    prompts = [prompt(length, length, vocabulary - 1) for length in (21, 5, 13)]
    texts_are_plain(target, drafter, prompts, sampling, vocabulary)
    assert drafter.calibrations, "it learns"


def pard(lm: TreeLM, places: int = 4, window: int | None = None, ranking: Ranking | None = None) -> LatticeDrafter:
    named = Named(lm.vocabulary, VOCABULARY, (), lm.device)
    return LatticeDrafter(Masks(lm, VOCABULARY - 1, places, window=window), named, ranking)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_rows_of_masks_are_what_transformers_computes(family: str, tmp_path: Path) -> None:
    """PARD: the text and three masks, causal, positions running on; what was kept of the text is the same later."""
    model, text = tiny(family, tmp_path), prompt(30, 3, VOCABULARY - 1)
    with torch.no_grad():
        wanted = [model(torch.tensor([[*text[:end], *[VOCABULARY - 1] * 3]])).logits[0, -4:] for end in (20, 30)]
    lm = TreeLM(model)
    masks = Masks(lm, VOCABULARY - 1, 4)
    sequence = sequence_of(text[:20], SAMPLINGS[0])
    for end, wanted_PV in zip((20, 30), wanted, strict=True):
        sequence.tokens[:] = text[:end]
        filled = masks.fill(sequence)
        assert filled is not None
        assert torch.allclose(filled.logits_PS, wanted_PV, atol=1e-4)
        cache = sequence.cache(lm)
        assert (len(cache), cache.parents) == (end - 1, [])
    lm.close()


@pytest.mark.parametrize("sampling", SAMPLINGS[1:], ids=NAMES[1:])
def test_pard_changes_no_text(sampling: SamplingParams, tmp_path: Path) -> None:
    target, lm = (TreeLM(tiny("llama", tmp_path / name)) for name in ("target", "draft"))
    for window in (None, 16):
        guesses_change_no_text(target, pard(lm, window=window), sampling, VOCABULARY)
    target.close()


def test_the_first_token_of_a_model_that_is_right_is_accepted(tmp_path: Path) -> None:
    """The target itself knows what follows its text; behind masks it knows nothing. One pass of it a sweep."""
    target = TreeLM(tiny("llama", tmp_path))
    lm = target.alike(target.model)
    decoder = Decoder(target, pard(lm, ranking=Ranking(tau=0.01)), BestFirst(), 8)
    decoder.join(sequence_of(prompt(9, 1, VOCABULARY), SAMPLINGS[1]))
    assert all(decoder.step()[0].burst.accepted >= 1 for _ in range(5))
    target.close()


class Case:
    """A target whose next token follows from its last, and P-EAGLE heads for it."""

    def __init__(self, folder: Path) -> None:
        self.model = chain_target(folder)
        self.target = TreeLM(self.model)

    def recorded(self) -> Eagle:
        folder = RECORDED / "peagle"
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return loaded(settings, load_file(folder / "model.safetensors"), self.target, "head")

    def knowing(self) -> Eagle:
        """It knows the next token; what its masks read is drawn."""
        own = knowing_head(self.model) | {"mask_hidden": torch.ones(1, 1, 96)}
        return loaded(settings_of([0, 1, 2]) | {"mask_token_id": 95}, own, self.target, "head")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("target"))


def test_p_eagles_logits_are_those_of_its_package(case: Case) -> None:
    """The last row of a text and three masks behind it."""
    eagle, wanted = case.recorded(), load_file(RECORDED / "peagle" / "reference.safetensors")
    assert (eagle.fields.kind, eagle.fields.places, eagle.fields.mask) == ("P-EAGLE", 4, 95)
    assert eagle.mask_F is not None
    text, states_RF = wanted["text"].tolist(), torch.cat([wanted["states"], eagle.mask_F.expand(3, -1)])
    part = replace(Rows.text(KVCache(), [*text[1:], *[95] * 3]), features_RF=eagle.head.joined(states_RF))
    (hidden_RH,) = eagle.lm.forward([part])
    assert (eagle.lm.head(hidden_RH[-4:]) - wanted["logits"]).abs().max() < 1e-5


@pytest.mark.parametrize("sampling", SAMPLINGS[1:], ids=NAMES[1:])
def test_p_eagle_changes_no_text(case: Case, sampling: SamplingParams) -> None:
    drafter = case.recorded().drafter(case.target, 96)
    assert isinstance(drafter, LatticeDrafter)
    guesses_change_no_text(case.target, drafter, sampling, 96)


def test_p_eagle_reads_the_targets_states_and_is_checked_by_them(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    """One that knows the next token is believed; its first guess of every sweep is taken."""
    eagle = case.knowing()
    drafter = eagle.drafter(case.target, 96, Ranking(tau=0.01), check=SelfCheck("own", eagle.fields.readings))
    decoder = Decoder(case.target, drafter, BestFirst(), 8)
    decoder.join(sequence_of(prompt(40, 1, 95), SAMPLINGS[1], vocabulary=96))
    decoder.step()  # reads the prompt
    assert all(decoder.step()[0].burst.accepted >= 1 for _ in range(4))
    assert not caplog.records
    refused = case.recorded()
    drafter = refused.drafter(case.target, 96, check=SelfCheck("odd", refused.fields.readings))
    write(case.target, drafter, [prompt(40, 1, 95)], SAMPLINGS[0], 24, vocabulary=96)
    assert "was not made for this model" in caplog.text


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target with the demo's tokens; heads for it, as `speculators` saves them, and a PARD model."""
    folder = tmp_path_factory.mktemp("folders")
    demo_chain_target(folder / "target")
    shutil.copytree(demo_folder("drafter"), folder / "pard")
    told = json.loads((folder / "pard" / "config.json").read_text(encoding="utf-8"))
    (folder / "pard" / "config.json").write_text(json.dumps(told | {"pard_token": 4095}))
    for name in ("dspark", "peagle"):
        shutil.copytree(RECORDED / name, folder / name)
        told = json.loads((folder / name / "config.json").read_text(encoding="utf-8"))
        told["transformer_layer_config"]["vocab_size"] = 4096
        (folder / name / "config.json").write_text(json.dumps(told))
        tensors = load_file(folder / name / "model.safetensors")
        save_file({key: _longer(key, one) for key, one in tensors.items()}, folder / name / "model.safetensors")
    return folder


def _longer(key: str, one: Tensor) -> Tensor:
    """Rows for 4096 tokens, not for 96."""
    if key not in ("t2d", "markov_head.markov_w1.weight", "embed_tokens.weight"):
        return one
    return pad(one, (0, 4000)) if one.dim() == 1 else pad(one, (0, 0, 0, 4000))


def test_folders_are_recognised(folders: Path) -> None:
    answers, asked = {}, replace(SAMPLINGS[1], max_tokens=10)
    for name in ("none", "dspark", "peagle", "pard"):
        drafter = name if name == "none" else str(folders / name)
        with specexec.load(str(folders / "target"), drafter=drafter, dtype="f32", budget=16, ctx=256) as llm:
            answers[name] = llm.generate("The with statement", asked).tokens
            assert not llm.drafter_failures
    assert len({*map(tuple, answers.values())}) == 1
    assert [head_kind(open_folder(folders / name)) for name in ("dspark", "peagle", "pard")] == [
        "DSpark", "P-EAGLE", None,
    ]  # fmt: skip


def test_what_pard_cannot_do_is_refused(folders: Path, tmp_path: Path) -> None:
    target, drafter = str(folders / "target"), str(folders / "pard")
    with pytest.raises(BadDrafter, match="several tokens at once"):
        specexec.load(target, drafter=drafter, ctx=256, draft_vocab=100)
    shutil.copytree(folders / "pard", tmp_path / "odd")
    told = json.loads((tmp_path / "odd" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "odd" / "config.json").write_text(json.dumps(told | {"pard_token": 5000}))
    with pytest.raises(BadDrafter, match="pard_token of odd is 5000, it has 4096 tokens"):
        specexec.load(target, drafter=str(tmp_path / "odd"), ctx=256)
