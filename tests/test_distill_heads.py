"""MTP layers and DFlash heads made here: what learns is what drafts, guesses what the target does, changes no text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from offload.checkpoint.headers import open_folder
from specexec.compose.head_folders import as_model, head_kind, tap_count, verifier_of
from specexec.distill.dflash import DFlashStudent, DrawnBlocks
from specexec.distill.head_folder import write_head
from specexec.distill.heads import HeadKind
from specexec.distill.mtp import MtpStudent
from specexec.distill.training import TrainingPlan, train
from specexec.drafters.heads import dflash, mtp_folder
from specexec.drafters.heads.blocks import BlockFiller
from specexec.drafters.heads.features import HeadFeatures, TextStates
from specexec.drafters.heads.filled import TargetSizes
from specexec.drafters.heads.head import HeadDrafter
from specexec.drafters.heads.lattice import LatticeDrafter
from specexec.drafters.protocol import Drafter
from specexec.drafters.ranking import Named, Ranking
from specexec.engine.decoder import Decoder
from specexec.errors import BadDrafter
from specexec.model.cache import KVCache
from specexec.model.tree_lm import Rows
from specexec.planning.best_first import BestFirst
from specexec.sampling.params import SamplingParams
from tests.distilled import CPU, Taught
from tests.eagle_models import HIDDEN, LAYERS, VOCABULARY
from tests.writing import prompt, sequence_of, texts_are_plain

KINDS: list[HeadKind] = ["mtp", "dflash"]
PLAN = TrainingPlan(epochs=4, rows=256, rate=1.5e-2)


@pytest.fixture(scope="module", params=KINDS)
def taught(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Taught]:
    found = Taught(tmp_path_factory.mktemp(request.param), request.param, PLAN)
    yield found
    found.target.close()


def drafter_of(taught: Taught, folder: Path) -> Drafter:
    """A folder as it drafts."""
    target, ranking = taught.target, Ranking(tau=0.01)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "model.safetensors")
    if taught.training.kind == "mtp":
        lm = mtp_folder.loaded(settings, tensors, target, "head")
        features = HeadFeatures(lm, TextStates(target, [LAYERS], range(VOCABULARY)))
        return HeadDrafter(lm, features, VOCABULARY, ranking)
    head = dflash.loaded(settings, tensors, TargetSizes.of(target), "head")
    named = Named(VOCABULARY, VOCABULARY, (), CPU, head.ids)
    return LatticeDrafter(BlockFiller(head, target), named, ranking, "dflash")


def test_it_learns_what_the_target_does(taught: Taught) -> None:
    """On texts that were held out; by chance 1 in 96 is right."""
    looks = [one.accepted for one in taught.course if one.accepted is not None]
    assert looks[0] < 0.2
    assert looks[-1] > 1.5
    assert taught.course[-1].loss < taught.course[1].loss / 2


def test_it_saves_sweeps_over_texts_that_it_has_not_seen(taught: Taught, tmp_path: Path) -> None:
    write_head(taught.training.student(), taught.training.kind, taught.recording, tmp_path)
    sampling, sweeps = SamplingParams(temperature=0.0, max_tokens=16), list[int]()
    for folder in (tmp_path, taught.folder):
        decoder = Decoder(taught.target, drafter_of(taught, folder), BestFirst(), 8)
        decoder.join(sequence_of(prompt(9, 71, VOCABULARY), sampling, vocabulary=VOCABULARY))
        sweeps.append(0)
        while decoder.live:
            decoder.step()
            sweeps[-1] += 1
    untaught, learned = sweeps
    assert learned < 12 < untaught


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_it_changes_no_text(temperature: float, taught: Taught) -> None:
    sampling = SamplingParams(temperature=temperature, seed=4, max_tokens=12)
    prompts = [prompt(length, length, VOCABULARY) for length in (9, 5)]
    texts_are_plain(taught.target, drafter_of(taught, taught.folder), prompts, sampling, VOCABULARY)


def test_its_folder_is_recognised_and_counted(taught: Taught) -> None:
    folder = open_folder(taught.folder)
    kind = {"mtp": "MTP", "dflash": "DFlash"}[taught.training.kind]
    assert (head_kind(folder), verifier_of(folder)) == (kind, "a/chain")
    assert tap_count(folder, HIDDEN) == (1 if kind == "MTP" else 3)
    layers = {name for name in as_model(folder).entries if name.startswith("layers.0.")}
    assert "layers.0.self_attn.q_proj.weight" in layers


def test_a_training_that_was_stopped_gives_the_same_head(taught: Taught, tmp_path: Path) -> None:
    plan = replace(PLAN, epochs=1)
    training = replace(taught.training, plan=plan)
    whole, parts = training.student(), training.student()
    list(train(whole, taught.texts, plan, tmp_path / "whole", CPU, half=False))
    begun = train(parts, taught.texts, plan, tmp_path / "parts", CPU, half=False)
    for _ in range(4):
        next(begun)
    begun.close()
    parts = training.student()
    rest = [one.step for one in train(parts, taught.texts, plan, tmp_path / "parts", CPU, half=False)]
    assert rest[0] == 4
    for name, one in whole.trained.items():
        assert torch.equal(one, parts.trained[name]), name


def test_what_drafts_computes_what_was_trained(taught: Taught) -> None:
    """Weights were rounded to bfloat16."""
    batch = taught.texts.batch(taught.texts.held_out[:1])
    text, target = batch.tokens_BR[0].tolist(), taught.target
    if isinstance(taught.student, MtpStudent):
        lm = mtp_folder.loaded(taught.settings, taught.tensors, target, "head")
        (hidden_RH,) = lm.forward([replace(Rows.text(KVCache(), text[1:]), features_RF=batch.last_BRH[0, :-1].float())])
        with torch.no_grad():
            step = next(iter(taught.student.unrolled(batch)))
        found, wanted = lm.head(hidden_RH)[step.asked.rows_BR[0]], step.logits_KD
    else:
        assert isinstance(taught.student, DFlashStudent)
        head, at, cache = dflash.loaded(taught.settings, taught.tensors, TargetSizes.of(target), "head"), 9, KVCache()
        head.dflash.read(cache, text[:at], batch.states_BRF[0, :at].float())
        found = head.dflash.fill(cache, text[at])[1:]
        with torch.no_grad():
            blocks = DrawnBlocks(torch.tensor([[at]]), torch.ones(1, 1, dtype=torch.bool))
            wanted, labelled_BAK = taught.student._filled(batch, blocks)
        assert labelled_BAK.all()
        wanted = wanted[0, 0]
    assert (found - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_mtp_folders_of_other_sizes_or_layers_are_refused_by_name(taught: Taught) -> None:
    if taught.training.kind != "mtp":
        return
    settings, tensors, target = taught.settings, taught.tensors, taught.target
    layer = settings["transformer_layer_config"]
    assert isinstance(layer, dict)
    for change, words in (
        ({"hidden_size": 64}, "with 64 hidden numbers, this one has 32"), ({"model_type": "qwen3_next"}, "qwen3_next")
    ):  # fmt: skip
        with pytest.raises(BadDrafter, match=words):
            mtp_folder.loaded(settings | {"transformer_layer_config": layer | change}, tensors, target, "head")
    with pytest.raises(BadDrafter, match="'strange' is a part that is not known"):
        mtp_folder.loaded(settings, tensors | {"strange": torch.zeros(1)}, target, "head")
