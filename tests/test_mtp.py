"""The layer that came with a target guesses: as its publishers compute it, and the text is the target's own."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.modeling_layers import MtpModel

import offload
import specexec
from cli.app import commands
from offload.checkpoint.headers import open_folder
from offload.checkpoint.quantized.quantize import Quant
from offload.hub.names import demo_folder
from offload.model.mtp_layer import load_mtp_layer
from offload.packs.pack import pack, plan
from specexec.compose.head_folders import head_kind
from specexec.drafters.heads.features import HeadFeatures, TextStates
from specexec.drafters.heads.head import HeadDrafter
from specexec.drafters.heads.mtp import mtp_lm
from specexec.drafters.none import NoDrafter
from specexec.drafters.protocol import Ask
from specexec.drafters.ranking import Ranking
from specexec.engine.decoder import Decoder
from specexec.errors import BadDrafter
from specexec.model.cache import KVCache
from specexec.model.taps import LAST
from specexec.model.tree_lm import Rows, TreeLM
from specexec.planning.best_first import BestFirst
from specexec.sampling.params import SamplingParams
from specexec.tree.growing import Growth
from specexec.tree.tree import ROOT
from tests.mtp_models import SIZES, Family, as_transformers_loads, chain_model, random_model
from tests.tiny import LAYERS
from tests.writing import plain_texts, prompt, sequence_of, write
from tests.zoo import tiny_of

RECORDED = Path(__file__).parent / "data" / "heads" / "mtp"
VOCABULARY = int(str(SIZES["vocab_size"]))
SAMPLINGS = [
    SamplingParams(temperature=0.0, max_tokens=16),
    SamplingParams(temperature=0.8, top_p=0.9, seed=1, max_tokens=16),
]
PROMPTS = [prompt(length, length, VOCABULARY) for length in (21, 5, 13)]
FAMILIES: list[Family] = ["glm", "qwen"]


class Case:
    """A target that was loaded from its folder, and its layer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.target = TreeLM(offload.load(folder, "none", dtype="f32"))
        brought = load_mtp_layer(open_folder(folder), torch.device("cpu"), torch.float32)
        self.lm = mtp_lm(self.target, brought)

    def drafter(self, ranking: Ranking | None = None) -> HeadDrafter:
        features = HeadFeatures(self.lm, TextStates(self.target, [LAST], range(VOCABULARY)))
        return HeadDrafter(self.lm, features, VOCABULARY, ranking)

    def rows(self, text: list[int], hidden_RH: Tensor) -> Rows:
        """What the layer reads of a text that goes on with its last token."""
        return replace(Rows.text(KVCache(), text[1:]), features_RF=hidden_RH)


@pytest.fixture(scope="module")
def glm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp("glm")
    chain_model("glm", folder)
    case = Case(folder)
    yield case
    case.target.close()


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp(request.param)
    chain_model(request.param, folder, 0.05)
    case = Case(folder)
    yield case
    case.target.close()


def test_its_logits_are_those_that_transformers_computed() -> None:
    case, recorded = Case(RECORDED), load_file(RECORDED / "reference.safetensors")
    text = [*recorded["text"][0].tolist(), int(recorded["next"])]
    (hidden_RH,) = case.target.forward([Rows.text(KVCache(), text[:-1])])
    assert torch.allclose(hidden_RH, recorded["hidden"][0], atol=1e-5)
    (own_RH,) = case.lm.forward([case.rows(text, hidden_RH)])
    assert torch.allclose(case.lm.head(own_RH[-1:]), recorded["mtp_logits"][0], atol=1e-5)


def test_qwens_layer_is_what_its_config_says(tmp_path: Path) -> None:
    """transformers 5.23 does not load it: its own layer class is asked, without our attention and our loader."""
    model = random_model("qwen", tmp_path)
    case, text = Case(tmp_path), prompt(17, 3, VOCABULARY)
    stored = {name: one for name, one in load_file(tmp_path / "model.safetensors").items() if name.startswith("mtp.")}
    trunk, alone = model.model, copy.deepcopy(model)
    norm, layer = type(trunk.norm), alone.model.layers[-1]
    own = {name.removeprefix("mtp.layers.0."): one for name, one in stored.items() if "layers" in name}
    experts = [
        torch.stack([own.pop(f"mlp.experts.{e}.{part}_proj.weight") for e in range(4)]) for part in ("gate", "up")
    ]
    own["mlp.experts.gate_up_proj"] = torch.cat(experts, 1)
    own["mlp.experts.down_proj"] = torch.stack([own.pop(f"mlp.experts.{e}.down_proj.weight") for e in range(4)])
    layer.load_state_dict(own)

    def normed(name: str, rows: Tensor) -> Tensor:
        one = norm(rows.shape[-1], eps=model.config.rms_norm_eps)
        one.weight.data = stored[f"mtp.{name}.weight"]
        found: Tensor = one(rows)
        return found

    with torch.no_grad():
        hidden = trunk(torch.tensor([text[:-1]])).last_hidden_state
        embedded = normed("pre_fc_norm_embedding", trunk.embed_tokens(torch.tensor([text[1:]])))
        mixed = torch.cat([embedded, normed("pre_fc_norm_hidden", hidden)], -1) @ stored["mtp.fc.weight"].T
        mask = torch.full((len(text) - 1,) * 2, float("-inf")).triu(1)[None, None]
        positions = torch.arange(len(text) - 1)[None]
        out = layer(mixed, position_embeddings=trunk.rotary_emb(mixed, positions), attention_mask=mask)
        wanted = model.lm_head(normed("norm", out))[0]
    (own_RH,) = case.lm.forward([case.rows(text, hidden[0])])
    assert torch.allclose(case.lm.head(own_RH), wanted, atol=1e-4)


def test_it_guesses_what_transformers_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """`generate(use_mtp=True)`: every first guess of its layer is ours, and so is the text."""
    model, drafted, ours = as_transformers_loads(RECORDED), list[int](), MtpModel.forward

    def forward(self: MtpModel, *args: object, **kwargs: object) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = ours(self, *args, **kwargs)  # type: ignore[arg-type]  # handed on
        drafted.append(int(found[0][0, 0]))
        return found

    monkeypatch.setattr(MtpModel, "forward", forward)
    start = torch.tensor([prompt(9, 2, VOCABULARY)])
    # transformers' own annotations do not let strict mode call it.
    generate: Callable[..., Tensor] = getattr(model, "generate")  # noqa: B009
    with torch.no_grad():
        text = generate(start, use_mtp=True, max_new_tokens=12, do_sample=False)[0].tolist()
    assert len(drafted) > 5
    case = Case(RECORDED)
    (hidden_RH,) = case.target.forward([Rows.text(KVCache(), text)])
    assert case.target.head(hidden_RH[8:-1]).argmax(-1).tolist() == text[9:], "plain decoding's"
    (own_RH,) = case.lm.forward([case.rows(text, hidden_RH[:-1])])
    guesses = case.lm.head(own_RH).argmax(-1).tolist()
    first, taken = 10, []  # it has guessed below a text of so many tokens
    for guess in drafted:
        taken.append(guess == guesses[first - 2])
        first += 2 if first < len(text) and text[first] == guess else 1
        if first > len(text):
            break
    assert all(taken)


@pytest.mark.parametrize(
    ("sampling", "overlap"), [*zip(SAMPLINGS, [False, True], strict=True)], ids=["greedy", "sampled"]
)
def test_the_text_is_that_of_plain_decoding(case: Case, sampling: SamplingParams, overlap: bool) -> None:
    drafted = write(case.target, case.drafter(), PROMPTS, sampling, 24, overlap=overlap, vocabulary=VOCABULARY)
    assert [one.answer for one in drafted] == plain_texts(case.target, PROMPTS, sampling, VOCABULARY)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_that_is_right_is_accepted_whole(family: Family, sampling: SamplingParams, tmp_path: Path) -> None:
    chain_model(family, tmp_path, 0.0)
    case = Case(tmp_path)
    decoder = Decoder(case.target, case.drafter(Ranking(tau=0.01)), BestFirst(), 5)
    decoder.join(sequence_of(PROMPTS[0], sampling, vocabulary=VOCABULARY))
    decoder.step()  # reads the prompt: there are no hidden states before
    for _ in range(2):
        (step,) = decoder.step()
        assert step.burst.accepted == 5


@pytest.mark.parametrize("overlap", [False, True])
def test_rows_of_the_text_are_those_of_a_fresh_head(glm: Case, overlap: bool) -> None:
    """What was guessed was read from guesses; the text is read from what the target computed, as often as it moves."""
    case, drafter = glm, glm.drafter()
    decoder = Decoder(case.target, drafter, BestFirst(), 24, overlap=overlap)
    sequence = sequence_of(PROMPTS[0], SAMPLINGS[0], vocabulary=VOCABULARY)
    decoder.join(sequence)
    accepted = sum(decoder.step()[0].burst.accepted for _ in range(4))
    assert accepted > 3, "or nothing is shown"
    sequence.growth = Growth()
    drafter.guess([Ask(sequence, sequence.growth.tree, [ROOT])], 4)
    cache, text = sequence.caches[case.lm], sequence.tokens
    (hidden_RH,) = case.target.forward([Rows.text(KVCache(), text[:-1])])
    fresh = case.rows(text, hidden_RH)
    case.lm.forward([fresh])
    (number,) = fresh.cache.layers
    rows = len(text) - 1
    for found, wanted in (
        (cache.layers[number].keys_HRD, fresh.cache.layers[number].keys_HRD),
        (cache.layers[number].values_HRD, fresh.cache.layers[number].values_HRD),
    ):
        assert torch.allclose(found[:, :rows], wanted[:, :rows], atol=1e-4)
    assert cache.unread == 1, "the first token has no row"


def test_a_text_that_goes_on_is_guessed_below_again(glm: Case) -> None:
    """Another turn of the same dialogue, an earlier beginning of it, and a copy of the beginning for another text."""
    case, drafter, short = glm, glm.drafter(), replace(SAMPLINGS[0], max_tokens=8)
    (first,) = write(case.target, drafter, PROMPTS[:1], SAMPLINGS[0], 24, vocabulary=VOCABULARY)
    cut: dict[object, KVCache] = {lm: cache.prefix(18) for lm, cache in first.caches.items()}
    bare: dict[object, KVCache] = {case.target: cut[case.target].prefix(18)}
    for tokens, caches in (
        ([*first.tokens, 5, 6], first.caches),
        (first.tokens[:30], first.caches),
        ([*first.tokens[:20], 7, 8], cut),
        ([*first.tokens[:20], 7, 8], bare),
    ):
        (plain,) = write(case.target, NoDrafter(), [tokens], short, vocabulary=VOCABULARY)
        decoder = Decoder(case.target, drafter, BestFirst(), 24)
        again = sequence_of(tokens, short, vocabulary=VOCABULARY)
        again.caches.update(caches)
        decoder.join(again)
        accepted = 0
        while decoder.live:
            accepted += decoder.step()[0].burst.accepted
        assert again.answer == plain.answer
        assert accepted > 2
        assert not decoder.guarded.failure


def test_a_model_that_sees_brings_it_too(tmp_path: Path) -> None:
    """Qwen3.5: layers below `model.language_model.`, their own beside them below `mtp.`; none of it is left out."""
    tiny_of("qwen3_5", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    last = f"model.language_model.layers.{LAYERS - 1}."
    own = {
        f"mtp.layers.0.{name.removeprefix(last)}": one.clone() for name, one in tensors.items() if name.startswith(last)
    }
    hidden = tensors["model.language_model.norm.weight"].shape[0]
    own["mtp.fc.weight"] = torch.randn(hidden, 2 * hidden, generator=torch.Generator().manual_seed(1))
    own |= {
        f"mtp.{name}.weight": torch.zeros(hidden) for name in ("norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding")
    }
    save_file(tensors | own, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert open_folder(tmp_path).mtp.keys() == own.keys()
    case = Case(tmp_path)
    layer = load_mtp_layer(open_folder(tmp_path), torch.device("cpu"), torch.float32).layers[0]
    assert torch.equal(layer.state_dict()["eh_proj.weight"], own["mtp.fc.weight"])
    text = prompt(9, most=240)
    (hidden_RH,) = case.target.forward([Rows.text(KVCache(), text)])
    (own_RH,) = case.lm.forward([case.rows([*text, 3], hidden_RH)])
    assert case.lm.head(own_RH).isfinite().all()
    pack(plan(open_folder(tmp_path), "none"), tmp_path / "packed")
    assert open_folder(tmp_path / "packed").mtp.keys() == own.keys()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that speaks the demo's tokens, with its layer."""
    folder = tmp_path_factory.mktemp("models") / "with"
    chain_model("glm", folder, 0.1, vocab_size=4096)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_folder("target") / file, folder / file)
    return folder


@pytest.fixture(scope="module")
def without(folder: Path) -> Path:
    """The same, converted by something that drops what it does not know."""
    bare = folder.with_name("without")
    shutil.copytree(folder, bare)
    kept = {name: one for name, one in load_file(folder / "model.safetensors").items() if ".layers.2." not in name}
    save_file(kept, bare / "model.safetensors", metadata={"format": "pt"})
    return bare


@pytest.mark.parametrize(("quant", "off"), [("none", 0.0), ("int8", 0.01), ("nf4", 0.2)])
def test_packs_keep_it(quant: Quant, off: float, tmp_path: Path) -> None:
    """Every matrix that a layer of the model has in few bits; norms, router and what joins its inputs as they are."""
    pack(plan(open_folder(RECORDED), quant), tmp_path / "packed")
    before, after = (
        load_mtp_layer(open_folder(one), torch.device("cpu"), torch.float32).layers[0].state_dict()
        for one in (RECORDED, tmp_path / "packed")
    )
    for name, weight in before.items():
        whole = weight.dim() < 2 or "eh_proj" in name or "mlp.gate." in name
        assert (after[name] - weight).abs().max() <= (0 if whole else off * weight.abs().max()), name
    held = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in after.values()}
    assert sum(held.values()) <= sum(one.nbytes for one in after.values()) + 64 * 40, "the codes are gone"


def test_an_engine_drafts_with_it_out_of_a_pack(folder: Path, tmp_path: Path) -> None:
    packed, sampling = tmp_path / "packed", SamplingParams(temperature=0.8, seed=2, max_tokens=16)
    pack(plan(open_folder(folder), "nf4"), packed)
    answers = {}
    for drafter in ("none", "mtp", "mtp+ngram"):
        with specexec.load(str(packed), drafter=drafter, dtype="f32", offload="disk", budget=16, ctx=256) as llm:
            found = llm.generate("The with statement", sampling)
            answers[drafter] = found.tokens
            assert llm.drafter_name == drafter
            assert not llm.drafter_failures
            assert drafter != "mtp" or found.accepted
    assert len(set(answers.values())) == 1


def test_auto_takes_it_where_no_model_is_paired(folder: Path, without: Path) -> None:
    with specexec.load(str(folder), dtype="f32", offload="none", ctx=256) as llm:
        assert llm.drafter_name == "mtp+ngram"
        assert "came with it" in llm.reason
    with specexec.load(str(without), dtype="f32", offload="none", ctx=256) as llm:
        assert llm.drafter_name == "ngram"


def test_a_target_without_it_is_refused_by_name(without: Path) -> None:
    with pytest.raises(BadDrafter, match="its files hold no such layer") as refused:
        specexec.load(str(without), drafter="mtp", ctx=256)
    assert "--drafter ngram" in str(refused.value.hint)
    found = CliRunner().invoke(commands, ["plan", str(without), "-d", "mtp", "--offline"], standalone_mode=False)
    assert isinstance(found.exception, BadDrafter)


def test_plan_counts_it(folder: Path) -> None:
    parts = {}
    for drafter in ("none", "mtp"):
        found = CliRunner().invoke(commands, ["plan", str(folder), "-d", drafter, "--offline", "--ram", "8GiB"])
        assert found.exit_code == 0, found.output
        parts[drafter] = [line for line in found.output.splitlines() if "RAM: " in line]
    assert "drafter" in parts["mtp"][0]
    assert "drafter" not in parts["none"][0]
    layer = load_mtp_layer(open_folder(folder), torch.device("cpu"), torch.float32).layers[0]
    held_B = sum(one.nbytes for one in layer.state_dict().values())
    assert held_B <= offload.mtp_B(open_folder(folder), 4) <= held_B + 64 * 40


@pytest.mark.parametrize(
    ("config", "tensor", "kind"),
    [
        ({"speculators_model_type": "peagle"}, "fc.weight", "speculators: peagle"),
        ({"speculators_model_type": "xpress"}, "fc.weight", "speculators: xpress"),
        ({"architectures": ["LlamaForCausalLMEagle3"]}, "fc.weight", "EAGLE in other parts"),
        ({"architectures": ["LlamaForCausalLM"]}, "midlayer.hidden_norm.weight", "EAGLE in other parts"),
        ({"model_type": "muse_glimmer_assistant"}, "pre_projection.weight", "assistant"),
    ],
)
def test_a_folder_that_holds_a_head_is_refused_by_name(
    config: dict[str, object], tensor: str, kind: str, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 1} | config))
    save_file({tensor: torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    assert head_kind(open_folder(tmp_path)) == kind
    assert head_kind(open_folder(folder)) is None
    with pytest.raises(BadDrafter, match="is a head for another model"):
        specexec.load(str(folder), drafter=str(tmp_path), ctx=256)
