"""Heads without layers guess what their authors' code guesses, and the text is the target's own."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

import specexec
from cli.app import commands
from offload.checkpoint.headers import open_folder
from offload.placement.requirements import cache_widths, need_of
from specexec.compose.head_folders import as_model, head_kind, verifier_of
from specexec.drafters.heads.filled import TargetSizes
from specexec.drafters.heads.lattice import LatticeDrafter
from specexec.drafters.heads.refusal import TargetShape
from specexec.drafters.heads.self_check import SelfCheck
from specexec.drafters.heads.shallow.drafter import Shallow, loaded
from specexec.drafters.heads.shallow.fields import MEDUSA, ShallowFields, counted_as
from specexec.drafters.none import NoDrafter
from specexec.drafters.ranking import Named, Ranking
from specexec.engine.decoder import Decoder
from specexec.errors import BadDrafter
from specexec.model.cache import KVCache
from specexec.model.tree_lm import Rows, TreeLM
from specexec.planning.best_first import BestFirst
from specexec.sampling.params import SamplingParams
from tests.eagle_models import RECORDED, chain_target, demo_chain_target, recorded
from tests.tiny import tiny
from tests.writing import prompt, sequence_of, texts_are_plain, write

VOCABULARY, HIDDEN, LAYERS = 96, 32, 4
SHAPE = TargetShape(LAYERS, HIDDEN, VOCABULARY)
PUBLISHED = ["medusa", "hydra", "hydra_prefix", "mlp_speculator", "mlp_speculator_tied", "redrafter", "redrafter_plain"]
SAMPLINGS = [
    SamplingParams(temperature=0.0, max_tokens=16),
    SamplingParams(temperature=0.8, top_p=0.9, seed=1, max_tokens=16),
]
Recorded = tuple[Shallow, dict[str, Tensor]]
PROMPTS = [prompt(length, length, VOCABULARY) for length in (21, 5)]


class Case:
    """A target whose next token follows from its last, and heads for it.

    Its embeddings are as long as its last norm makes them.
    """

    def __init__(self, folder: Path) -> None:
        self.model = chain_target(folder)
        table_VH = self.model.get_input_embeddings().weight
        assert isinstance(table_VH, Tensor)
        with torch.no_grad():
            table_VH.div_(table_VH.pow(2).mean(-1, keepdim=True).sqrt())
        self.target = TreeLM(self.model)

    def head(self, name: str) -> Shallow:
        return loaded(*recorded(name), self.target, name)

    def drafter(
        self, head: Shallow, ranking: Ranking | None = None, named: int = VOCABULARY, check: bool = False
    ) -> LatticeDrafter:
        names = Named(VOCABULARY, named, (), self.target.device)
        return head.drafter(self.target, names, ranking, SelfCheck("own", head.fields.readings) if check else None)


def knowing_hydra(model: PreTrainedModel, places: int = 3) -> tuple[dict[str, object], dict[str, Tensor]]:
    """Hands on the embedding of a path's last token, which is all that this target looks at."""
    head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert isinstance(head, Tensor)
    assert isinstance(table, Tensor)
    rows = head.detach() / table.detach().pow(2).mean(-1).sqrt().mean()
    tensors: dict[str, Tensor] = {}
    for place in range(places):
        shape = (HIDDEN, (place + 2) * HIDDEN)
        tensors |= {
            f"hydra_mlp.{place}.0.linear.weight": torch.zeros(shape),
            f"hydra_mlp.{place}.0.linear.bias": torch.zeros(HIDDEN),
            f"hydra_mlp.{place}.0.res_connection.weight": torch.eye(HIDDEN, shape[1]).roll(shape[1] - HIDDEN, 1),
            f"hydra_mlp.{place}.0.res_connection.bias": torch.zeros(HIDDEN),
            f"hydra_lm_head.{place}.weight": rows.clone(),
        }
    return {"hydra_num_heads": places, "grounded_heads": True}, tensors


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    case = Case(tmp_path_factory.mktemp("target"))
    yield case
    case.target.close()


@pytest.fixture
def reference(request: pytest.FixtureRequest, case: Case, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """A head and what its authors' code computed, over their embeddings where it reads some."""
    record = load_file(RECORDED / request.param / "reference.safetensors")
    if "table" in record:
        sizes = TargetSizes(HIDDEN, torch.device("cpu"), torch.float32, record["table"])
        monkeypatch.setattr(TargetSizes, "of", lambda _: sizes)
    return case.head(request.param), record


@pytest.mark.parametrize("reference", PUBLISHED[:5], indirect=True)
@torch.no_grad()
def test_it_guesses_what_its_authors_code_guesses(reference: Recorded) -> None:
    """Behind every place of a text, for each of the next places."""
    head, record = reference
    states_TH, text_T, logits_PTV = record["states"], record["text"], record["logits"]
    if head.front is not None:
        rows = replace(Rows.text(KVCache(), text_T.tolist()), features_RF=states_TH)
        (hidden_TH,) = head.front.forward([rows])
        states_TH = head.front.head(hidden_TH)
    count = len(text_T) - 1 - head.fields.places
    for place in range(head.fields.places):
        paths_TK = torch.stack([text_T[row + 1 : row + 2 + place] for row in range(count)])
        found_TV = head.network(states_TH[:count], paths_TK)
        assert torch.allclose(found_TV, logits_PTV[place, :count], atol=2e-5)
    assert logits_PTV.abs().max() > 1


@pytest.mark.parametrize("reference", PUBLISHED[5:], indirect=True)
@torch.no_grad()
def test_a_recurrent_head_gives_its_authors_probabilities(reference: Recorded) -> None:
    """Along each beam; they leave out all but the 50 best tokens."""
    head, record = reference
    for beam_K, log_probs_PV in zip(record["beams"], record["log_probs"], strict=True):
        for place in range(head.fields.places):
            found_V = head.network(record["states"], beam_K[None, : place + 1])[0]
            kept_V = log_probs_PV[place] > -1000
            assert int(kept_V.sum()) == 50
            assert torch.allclose(found_V[kept_V].log_softmax(-1), log_probs_PV[place][kept_V], atol=2e-5)


@pytest.mark.parametrize(
    ("name", "sampling"), zip(["medusa", "hydra_prefix", "redrafter"], [*SAMPLINGS, SAMPLINGS[0]], strict=True)
)
def test_the_text_is_that_of_plain_decoding(case: Case, name: str, sampling: SamplingParams) -> None:
    """With a target that has rows for more tokens than its tokenizer names, too."""
    drafter, short = case.drafter(case.head(name), named=VOCABULARY - 6), replace(sampling, max_tokens=8)
    texts_are_plain(case.target, drafter, PROMPTS, short, VOCABULARY, overlap=name == "hydra_prefix")
    assert drafter.calibrations, "it learns"


class Knowing:
    """Knows a text by the target's states along it."""

    def __init__(self, target: TreeLM, text: list[int], follows: bool) -> None:
        (self._states_TH,) = target.forward([Rows.text(KVCache(), text)])
        self._head, self.follows = target.head, follows

    def __call__(self, states_NH: Tensor, tokens_NK: Tensor) -> Tensor:
        at_N = torch.cdist(states_NH, self._states_TH).argmin(-1)
        return self._head(self._states_TH[at_N + tokens_NK.shape[1]])


@pytest.fixture(scope="module")
def attentive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TreeLM]:
    """A target of which no two states of a text are the same."""
    target = TreeLM(tiny("llama", tmp_path_factory.mktemp("attentive"), vocab_size=VOCABULARY, hidden_size=HIDDEN))
    yield target
    target.close()


@pytest.mark.parametrize(("sampling", "follows"), zip(SAMPLINGS, [True, False], strict=True))
def test_a_head_that_is_right_is_accepted_whole(attentive: TreeLM, sampling: SamplingParams, follows: bool) -> None:
    """At any temperature, because the noise of all places is known."""
    long = replace(sampling, max_tokens=30)
    (plain,) = write(attentive, NoDrafter(), PROMPTS[:1], long, vocabulary=VOCABULARY)
    head = Shallow(ShallowFields(MEDUSA, 4, HIDDEN, VOCABULARY), Knowing(attentive, plain.tokens, follows), "own")
    named = Named(VOCABULARY, VOCABULARY, (), attentive.device)
    decoder = Decoder(attentive, head.drafter(attentive, named, Ranking(tau=0.01)), BestFirst(), 4)
    decoder.join(sequence_of(PROMPTS[0], long, vocabulary=VOCABULARY))
    decoder.step()  # reads the prompt: there are no hidden states before
    assert [decoder.step()[0].burst.accepted for _ in range(4)] == [4, 4, 4, 4]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
def test_weights_that_are_right_pass_the_check_and_are_accepted(
    case: Case, sampling: SamplingParams, caplog: pytest.LogCaptureFixture
) -> None:
    head = loaded(*knowing_hydra(case.model), case.target, "own")
    decoder = Decoder(case.target, case.drafter(head, Ranking(tau=0.01), check=True), BestFirst(), 3)
    decoder.join(sequence_of(prompt(40, 1, VOCABULARY), sampling, vocabulary=VOCABULARY))
    decoder.step()
    assert [decoder.step()[0].burst.accepted for _ in range(3)] == [3, 3, 3]
    assert not caplog.records


@pytest.mark.parametrize("name", ["medusa", "hydra_prefix", "redrafter"])
def test_a_head_of_another_model_is_refused_by_its_guesses(
    case: Case, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Of the same sizes: it guesses no more, and the text is written without it."""
    drafter, tokens = case.drafter(case.head(name), check=True), [prompt(40, 1, VOCABULARY)]
    found, plain = (
        write(case.target, one, tokens, SAMPLINGS[0], 8, vocabulary=VOCABULARY) for one in (drafter, NoDrafter())
    )
    assert [one.answer for one in found] == [one.answer for one in plain]
    (said,) = [one.message for one in caplog.records if one.levelno == logging.WARNING]
    assert "was not made for this model" in said
    assert not drafter.calibrations


@torch.no_grad()
def test_medusa_as_vllm_spells_it_is_the_same(case: Case) -> None:
    settings, tensors = recorded("medusa")
    renamed = {}
    for name, one in tensors.items():
        place, block, *rest = name.split(".")
        new = f"blocks.{place}.layers.{block}.{rest[-1]}" if rest[0] == "linear" else f"lm_heads.{place}.weight"
        renamed[new] = one
    again = loaded({"model_type": "medusa", "num_heads": 3}, renamed, case.target, "vllm")
    state_1H, path_12 = torch.randn(1, HIDDEN), torch.zeros(1, 2)
    assert torch.equal(again.network(state_1H, path_12), case.head("medusa").network(state_1H, path_12))
    assert settings["medusa_num_heads"] == 2, "as it was published; the file has three"


@pytest.mark.parametrize(
    ("name", "settings", "shapes", "why"),
    [
        ("medusa", {}, {"0.2.weight": (99, HIDDEN)}, "for a model with 99 tokens, this one has 96"),
        ("hydra", {}, {"hydra_lm_head.0.weight": (VOCABULARY, 40)}, "with 40 hidden numbers, this one has 32"),
        ("hydra", {"hidden_state_offset": 9}, {}, "its hidden_state_offset is 9"),
        ("mlp_speculator", {}, {"speculator.proj.0.weight": (40, 64)}, "with 64 hidden numbers, this one has 32"),
        ("redrafter_plain", {"hidden_size": 64}, {}, "with 64 hidden numbers, this one has 32"),
        ("mlp_speculator_tied", {"n_predict": 10**9}, {}, "it guesses 1000000000 tokens, and at most 64 are read"),
        ("mlp_speculator_tied", {"n_predict": 0}, {}, "it guesses 0 tokens"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    name: str, settings: dict[str, object], shapes: dict[str, tuple[int, ...]], why: str
) -> None:
    """From headers alone, so `plan` says it too."""
    given, tensors = recorded(name)
    held = {key: tuple(one.shape) for key, one in tensors.items()}
    with pytest.raises(BadDrafter, match=why):
        ShallowFields.of(given | settings, held | shapes, SHAPE, "head")


def test_parts_that_are_missing_or_not_known_are_refused_by_name(case: Case) -> None:
    settings, tensors = recorded("medusa")
    with pytest.raises(BadDrafter, match="'token_map' is a part that is not known"):
        loaded(settings, tensors | {"token_map": torch.zeros(4)}, case.target, "head")
    with pytest.raises(BadDrafter, match=r"'residuals.1.0.linear.bias' is missing"):
        loaded(settings, {key: one for key, one in tensors.items() if key != "1.0.linear.bias"}, case.target, "head")
    far = tensors | {"999999999.2.weight": tensors["2.2.weight"]}
    with pytest.raises(BadDrafter, match=r"'out\.2\.weight' is missing"):
        loaded(settings, {key: one for key, one in far.items() if key != "2.2.weight"}, case.target, "head")
    counted = counted_as("Medusa", {key: tuple(one.shape) for key, one in far.items()})
    assert counted["num_hidden_layers"] == 4, "networks that are there, whatever their numbers"
    given, held = recorded("hydra")
    assert ShallowFields.of(given | {"hidden_state_offset": 1}, {key: tuple(one.shape) for key, one in held.items()},
                            SHAPE, "head").readings == ((LAYERS - 1,),)  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target that speaks the demo's tokens, and a head for it in one pickle."""
    folder = tmp_path_factory.mktemp("pair")
    model = demo_chain_target(folder / "target")
    settings, tensors = knowing_hydra(model)
    (folder / "head").mkdir()
    (folder / "head" / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    torch.save(tensors, folder / "head" / "hydra_lm_head.pt")
    return folder / "target", folder / "head"


def test_its_folder_is_recognised_planned_and_guesses(pair: tuple[Path, Path]) -> None:
    target, head = map(str, pair)
    assert head_kind(open_folder(pair[1])) == "Hydra"
    result = CliRunner().invoke(commands, ["plan", target, "-d", head, "--offline", "--ram", "8GiB", "--json"])
    assert result.exit_code == 0, result.output
    counted_B = json.loads(result.output)["rows"][0]["ram_parts_B"]["drafter"]
    assert counted_B > sum(one.nbytes for one in open_folder(pair[1]).entries.values())
    answers = {}
    for drafter in ("none", f"{head}+ngram"):
        with specexec.load(target, drafter=drafter, dtype="f32", offload="disk", budget=16, ctx=256) as llm:
            found = llm.generate("The with statement", replace(SAMPLINGS[1], max_tokens=24))
            answers[drafter] = found.tokens
            assert not llm.drafter_failures
            assert found.accepted or drafter == "none"
    assert len(set(map(tuple, answers.values()))) == 1


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_folders_are_recognised_and_their_memory_is_counted(name: str) -> None:
    folder = open_folder(RECORDED / name)
    kinds = {"hydra_prefix": "Hydra++", "mlp": "MLP speculator", "redrafter": "ReDrafter"}
    kind = next((kind for start, kind in kinds.items() if name.startswith(start)), name.capitalize())
    assert head_kind(folder) == kind
    assert verifier_of(folder) == ("org/model" if name == "medusa" else None)
    counted = as_model(folder)
    assert as_model(counted) == counted
    assert sum(cache_widths(counted.config)) == (32 if name == "hydra_prefix" else 0)
    assert need_of(counted, 2, 16).resident_B >= sum(one.nbytes for one in folder.entries.values())
