"""EAGLE heads guess: as the package that defines them computes it, in every spelling, and the text is the target's."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

import specexec
from cli.app import commands
from offload.checkpoint.headers import open_folder
from offload.errors import BadModelDir
from offload.hub import hub, names
from specexec.compose.drafter_factory import drafter_of
from specexec.compose.head_folders import as_model, fitting, head_kind, verifier_of
from specexec.drafters.cost import CostModel
from specexec.drafters.heads.eagle import Eagle, loaded
from specexec.drafters.heads.eagle_fields import EagleFields, own_name
from specexec.drafters.heads.features import HeadFeatures
from specexec.drafters.heads.head import HeadDrafter
from specexec.drafters.heads.refusal import TargetShape
from specexec.drafters.heads.self_check import SelfCheck
from specexec.drafters.none import NoDrafter
from specexec.drafters.protocol import Ask, Drafter
from specexec.drafters.ranking import Ranking
from specexec.drafters.registry import parse
from specexec.engine.decoder import Decoder
from specexec.errors import BadDrafter
from specexec.model.cache import KVCache
from specexec.model.taps import LAST
from specexec.model.tree_lm import Rows, TreeLM
from specexec.planning.best_first import BestFirst
from specexec.sampling.params import SamplingParams
from specexec.sizes import TRIED_ROWS
from specexec.tree.growing import Growth
from specexec.tree.tree import ROOT
from tests.eagle_models import (
    HIDDEN,
    LAYERS,
    OWN,
    RECORDED,
    VOCABULARY,
    chain_target,
    demo_chain_target,
    knowing_head,
    recorded,
    saved,
    settings_of,
)
from tests.writing import prompt, sequence_of, write

HEADS = ["eagle3", "eagle3_redhat", "eagle3_gptoss", "eagle3_1"]
SHAPE = TargetShape(LAYERS, HIDDEN, VOCABULARY)
SAMPLINGS = [
    SamplingParams(temperature=0.0, max_tokens=16),
    SamplingParams(temperature=0.8, top_p=0.9, seed=1, max_tokens=16),
    SamplingParams(temperature=0.8, seed=2, max_tokens=16, repetition_penalty=1.3),
]
PROMPTS = [prompt(length, length, VOCABULARY) for length in (41, 5, 33)]
Tensors = dict[str, Tensor]
Settings = dict[str, object]


class Case:
    """A target whose next token follows from its last, and a head that knows it nearly."""

    def __init__(self, folder: Path) -> None:
        self.model = chain_target(folder)
        self.target = TreeLM(self.model)
        kept = [*range(0, VOCABULARY, 2), *range(1, VOCABULARY, 4)]
        self.near = self.head(knowing_head(self.model, 0.03, sorted(kept)))

    def head(self, tensors: Tensors, settings: Settings | None = None) -> Eagle:
        return loaded(settings or settings_of([0, 1, 2]), tensors, self.target, "head")

    def drafter(self, eagle: Eagle, ranking: Ranking | None = None, check: bool = False) -> HeadDrafter:
        found = SelfCheck("own", eagle.fields.readings) if check else None
        drafter = eagle.drafter(self.target, VOCABULARY, ranking, check=found)
        assert isinstance(drafter, HeadDrafter)
        return drafter

    def rows(self, eagle: Eagle, text: list[int], states_RF: Tensor) -> Rows:
        return replace(Rows.text(KVCache(), text[1:]), features_RF=eagle.head.joined(states_RF))

    def states(self, text: list[int], taps: tuple[int, ...]) -> Tensor:
        """What the target makes of a text in one piece, at taps that are wanted anyway."""
        part = Rows.text(KVCache(), text)
        self.target.forward([part])
        return torch.cat([part.cache.tapped[tap] for tap in taps], -1)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    case = Case(tmp_path_factory.mktemp("target"))
    yield case
    case.target.close()


def as_published(settings: Settings, tensors: Tensors) -> tuple[Settings, Tensors]:
    return settings, tensors


def as_safeailab(settings: Settings, tensors: Tensors) -> tuple[Settings, Tensors]:
    """One flat config, and `midlayer`; ids as vLLM reads them."""
    layer = settings["transformer_layer_config"]
    assert isinstance(layer, dict)
    flat = {**{key: settings.get(key) for key in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")}}
    flat |= {**layer, "architectures": ["LlamaForCausalLM"], "draft_vocab_size": 40}
    flat["eagle_aux_hidden_state_layer_ids"] = [1, 2, 3]
    return flat, {name.replace("layers.0.", "midlayer."): one for name, one in tensors.items()}


def as_sglang(settings: Settings, tensors: Tensors) -> tuple[Settings, Tensors]:
    """Layers by their outputs, in fields that stand apart; every name below `model.`, and plain ids."""
    flat, _ = as_safeailab(settings, tensors)
    del flat["eagle_aux_hidden_state_layer_ids"]
    norms = {"norm_before_fc": flat.pop("norm_before_fc"), "use_aux_hidden_state": True}
    flat["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": [0, 1, 2], **norms}
    flat["architectures"] = ["LlamaForCausalLMEagle3"]
    renamed = {"layers.1.input_layernorm.weight": "layers.1.hidden_norm.weight"}
    own = {f"model.{renamed.get(name, name)}": one for name, one in tensors.items()}
    own["model.draft_id_to_target_id"] = own.pop("model.d2t") + torch.arange(40)
    return flat, own


@pytest.mark.parametrize("spelled", [as_published, as_safeailab, as_sglang])
@pytest.mark.parametrize("name", HEADS)
def test_its_logits_are_those_of_its_package(
    name: str, spelled: Callable[[Settings, Tensors], tuple[Settings, Tensors]], case: Case
) -> None:
    """The text's rows, their children, and theirs: three steps, in each of which a row attends to its own ancestors."""
    settings, tensors = spelled(*recorded(name))
    eagle = case.head(tensors, settings)
    assert eagle.fields.taps == (1, 2, 3)
    wanted, cache = load_file(RECORDED / name / "reference.safetensors"), KVCache()
    text, rows = wanted["text"].tolist(), len(wanted["states"])
    features_RH = eagle.head.joined(wanted["states"])
    parents = list(range(-1, rows - 1))
    for step in range(3):
        read, count = text[1 + step :], rows - step
        (found_RH,) = eagle.lm.forward([Rows(cache, read, parents, features_RF=features_RH)])
        assert (eagle.lm.head(found_RH) - wanted[f"logits_{step}"][:count]).abs().max() < 1e-5
        first = len(cache.parents) - count
        parents, features_RH = list(range(first, first + count - 1)), found_RH[: count - 1]


def test_its_head_names_the_tokens_that_t2d_marks(case: Case) -> None:
    settings, tensors = recorded("eagle3")
    ids = tensors["t2d"].nonzero().flatten()
    assert case.head(tensors, settings).ids == ids.tolist()
    plain = tensors | {"d2t": ids}
    assert case.head(plain, settings).ids == ids.tolist()
    del plain["t2d"], plain["d2t"]
    with pytest.raises(BadDrafter, match="names 40 of 96 tokens and has no d2t"):
        case.head(plain, settings)
    damaged = tensors["d2t"].clone()
    damaged[7] += 1
    for wrong in ({"d2t": damaged}, {"d2t": tensors["d2t"] + 40, "t2d": torch.zeros(0)}, {"d2t": tensors["d2t"] * 0}):
        with pytest.raises(BadDrafter, match="its d2t names tokens twice"):
            case.head(tensors | wrong, settings)


def test_the_first_eagle_is_what_its_paper_says(case: Case) -> None:
    """No package has it: transformers' own layer is asked, without our attention. Its children read its output."""
    drawn = torch.Generator().manual_seed(4)
    config = LlamaConfig(hidden_size=HIDDEN, intermediate_size=48, num_attention_heads=4, num_hidden_layers=1)
    config._attn_implementation = "eager"
    layer = LlamaDecoderLayer(config, 0).eval()
    layer.add_module("input_layernorm", nn.Identity())
    own = {f"layers.0.{name}": torch.randn(one.shape, generator=drawn) / 6 for name, one in layer.state_dict().items()}
    layer.load_state_dict({name.removeprefix("layers.0."): one for name, one in own.items()})
    own |= {"fc.weight": torch.randn(HIDDEN, 2 * HIDDEN, generator=drawn) / 8, "fc.bias": torch.ones(HIDDEN)}
    table = case.model.get_input_embeddings().weight
    assert isinstance(table, Tensor)
    settings: Settings = {"model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": HIDDEN}
    settings |= {"intermediate_size": 48, "num_attention_heads": 4, "architectures": ["LlamaForCausalLM"], "bias": True}
    eagle, text = case.head(own, settings), prompt(9, 1, VOCABULARY)
    assert (eagle.fields.kind, eagle.fields.readings) == ("EAGLE", ((LAST,), (LAYERS,)))
    states = torch.randn(8, HIDDEN, generator=drawn)
    with torch.no_grad():
        mixed = torch.cat([table[torch.tensor(text[1:])], states], -1) @ own["fc.weight"].T + own["fc.bias"]
        mask = torch.full((8, 8), float("-inf")).triu(1)[None, None]
        turned = LlamaRotaryEmbedding(config)(mixed[None], torch.arange(8)[None])
        wanted = layer(mixed[None], position_embeddings=turned, attention_mask=mask)[0]
    (found,) = eagle.lm.forward([replace(Rows.text(KVCache(), text[1:]), features_RF=states)])
    assert torch.allclose(found, wanted, atol=1e-5)
    assert torch.allclose(eagle.lm.head(found), case.target.head(wanted), atol=1e-4)


@pytest.mark.parametrize(
    ("sampling", "overlap"), [*zip(SAMPLINGS, [False, True, True], strict=True)], ids=["greedy", "sampled", "penalised"]
)
def test_the_text_is_that_of_plain_decoding(case: Case, sampling: SamplingParams, overlap: bool) -> None:
    """Three texts at once, by a head that names two tokens of three: the others are written all the same."""
    plain = write(case.target, NoDrafter(), PROMPTS, sampling, vocabulary=VOCABULARY)
    drafter = case.drafter(case.near, check=True)
    decoder = Decoder(case.target, drafter, BestFirst(), 24, overlap=overlap)
    sequences = [sequence_of(tokens, sampling, vocabulary=VOCABULARY) for tokens in PROMPTS]
    for sequence in sequences:
        decoder.join(sequence)
    accepted = 0
    while decoder.live:
        accepted += sum(step.burst.accepted for step in decoder.step())
    assert [one.answer for one in sequences] == [one.answer for one in plain]
    assert not decoder.guarded.failure
    assert accepted > 3
    assert case.near.ids is not None
    assert {token for one in plain for token in one.answer} - {*case.near.ids}


@pytest.mark.parametrize("sampling", SAMPLINGS[:2], ids=["greedy", "sampled"])
def test_a_head_that_is_right_is_accepted_whole(case: Case, sampling: SamplingParams) -> None:
    eagle = case.head(knowing_head(case.model))
    decoder = Decoder(case.target, case.drafter(eagle, Ranking(tau=0.01), check=True), BestFirst(), 5)
    decoder.join(sequence_of(PROMPTS[0], sampling, vocabulary=VOCABULARY))
    decoder.step()  # reads the prompt: there are no hidden states before
    assert [decoder.step()[0].burst.accepted for _ in range(2)] == [5, 5]


@pytest.mark.parametrize("overlap", [False, True])
def test_rows_of_the_text_are_those_of_a_fresh_head(case: Case, overlap: bool) -> None:
    """What was guessed was read from guesses; the text is read from what the target computed, as often as it moves."""
    eagle = case.near
    drafter = case.drafter(eagle)
    decoder = Decoder(case.target, drafter, BestFirst(), 24, overlap=overlap)
    sequence = sequence_of(PROMPTS[0], SAMPLINGS[0], vocabulary=VOCABULARY)
    decoder.join(sequence)
    assert sum(decoder.step()[0].burst.accepted for _ in range(6)) > 3, "or nothing is shown"
    sequence.growth = Growth()
    drafter.guess([Ask(sequence, sequence.growth.tree, [ROOT])], 4)
    cache, text = sequence.caches[eagle.lm], sequence.tokens
    fresh = case.rows(eagle, text, case.states(text[:-1], eagle.fields.taps))
    eagle.lm.forward([fresh])
    rows = len(text) - 1
    for found, wanted in (
        (cache.layers[0].keys_HRD, fresh.cache.layers[0].keys_HRD),
        (cache.layers[0].values_HRD, fresh.cache.layers[0].values_HRD),
    ):
        assert torch.allclose(found[:, :rows], wanted[:, :rows], atol=1e-4)
    assert cache.unread == 1, "the first token has no row"


def nested(ids: list[int]) -> Settings:
    """As ModelOpt writes it: layers by their outputs."""
    apart = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": ids, "use_aux_hidden_state": True}}
    return {key: one for key, one in settings_of(None).items() if "eagle_aux" not in key} | apart


def test_ids_of_the_other_convention_are_found_out(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    """Read as they are to be understood, this head is wrong; the first text that is long enough shows it."""
    eagle = case.head(knowing_head(case.model), nested([0, 1, 2]))
    assert eagle.fields.readings == ((1, 2, 3), (0, 1, 2))
    drafter = case.drafter(eagle, Ranking(tau=0.01), check=True)
    decoder = Decoder(case.target, drafter, BestFirst(), 5)
    (plain,) = write(case.target, NoDrafter(), PROMPTS[:1], SAMPLINGS[0], vocabulary=VOCABULARY)
    short, sequence = (sequence_of(PROMPTS[at], SAMPLINGS[0], vocabulary=VOCABULARY) for at in (1, 0))
    decoder.join(short)
    decoder.step()
    decoder.step()
    assert not caplog.records, "five tokens tell nothing"
    decoder.join(sequence)
    accepted = [sum(step.burst.accepted for step in decoder.step()) for _ in range(3)]
    assert accepted[-1] == 10
    (said,) = caplog.records
    assert "reads the states at [0, 1, 2], not at [1, 2, 3]" in said.message
    assert case.target.taps.of(1) == {0, 1, 2}, "nothing else is recorded any more"
    while decoder.live:
        decoder.step()
    assert sequence.answer == plain.answer


def test_a_head_that_is_right_is_not_corrected(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    drafter = case.drafter(case.near, check=True)
    write(case.target, drafter, PROMPTS[:1], SAMPLINGS[0], 24, vocabulary=VOCABULARY)
    assert not caplog.records
    assert isinstance(drafter._features, HeadFeatures)
    assert drafter._features._states._check is None


def test_a_head_of_another_model_is_refused_by_its_guesses(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    """Of the same sizes: it guesses no more, and the text is written without it."""
    drawn = torch.Generator().manual_seed(5)
    odd = {name: torch.randn(one.shape, generator=drawn) for name, one in knowing_head(case.model).items()}
    drafter = case.drafter(case.head(odd), check=True)
    (plain,) = write(case.target, NoDrafter(), PROMPTS[:1], SAMPLINGS[0], vocabulary=VOCABULARY)
    for _ in range(2):
        (found,) = write(case.target, drafter, PROMPTS[:1], SAMPLINGS[0], 24, vocabulary=VOCABULARY)
        assert found.answer == plain.answer
    (said,) = [one.message for one in caplog.records if one.levelno == logging.WARNING]
    assert "was not made for this model" in said
    assert "BadDrafter" not in said, "words for people"
    assert isinstance(drafter._features, HeadFeatures)
    assert not case.target.taps._wanted[drafter._features._states][0]


def test_a_text_that_goes_on_is_guessed_below_again(case: Case) -> None:
    drafter, short = case.drafter(case.near), replace(SAMPLINGS[0], max_tokens=8)
    (first,) = write(case.target, drafter, PROMPTS[:1], SAMPLINGS[0], 24, vocabulary=VOCABULARY)
    cut: dict[object, KVCache] = {lm: cache.prefix(18) for lm, cache in first.caches.items()}
    bare: dict[object, KVCache] = {case.target: cut[case.target].prefix(18)}
    for tokens, caches in (([*first.tokens, 5, 6], first.caches), ([*first.tokens[:20], 7, 8], bare)):
        (plain,) = write(case.target, NoDrafter(), [tokens], short, vocabulary=VOCABULARY)
        decoder = Decoder(case.target, drafter, BestFirst(), 24)
        again = sequence_of(tokens, short, vocabulary=VOCABULARY)
        again.caches.update(caches)
        decoder.join(again)
        while decoder.live:
            decoder.step()
        assert again.answer == plain.answer
        assert not decoder.guarded.failure


@pytest.mark.parametrize(
    ("change", "shapes", "why"),
    [
        ({"transformer_layer_config": OWN | {"model_type": "deepseek_v3"}}, {}, "layers are those of 'deepseek_v3'"),
        ({"transformer_layer_config": OWN | {"layer_types": ["sliding_attention"]}}, {}, "its layers have a window"),
        ({"transformer_layer_config": OWN | {"rope_scaling": {"type": "dynamic"}}}, {}, "longest position"),
        ({"transformer_layer_config": OWN | {"rope_parameters": {"partial_rotary_factor": 0.5}}}, {}, "a part of each"),
        ({"transformer_layer_config": OWN | {"rope_parameters": {"full_attention": {}}}}, {}, "from layer to layer"),
        ({"mask_token_id": 3}, {}, "its mask token is 3, and 'mask_hidden' is missing"),
        ({"mask_token_id": 99}, {"mask_hidden": (1, 1, 96)}, "its mask token is 99"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, {}, "has use_aux_hidden_state: False"),
        ({"eagle_aux_hidden_state_layer_ids": [0, 1]}, {}, r"are \[0, 1\], and its fc reads 3 layers"),
        ({"eagle_aux_hidden_state_layer_ids": [2, 20, 37]}, {}, r"layers \[2, 20, 37\], this model has 4"),
        ({"eagle_aux_hidden_state_layer_ids": None}, {}, "does not say which layers it reads, and there are 4"),
        ({}, {"fc.weight": (HIDDEN, 3 * 40)}, "for a model with 40 hidden numbers, this one has 32"),
        ({}, {"embed_tokens.weight": (99, HIDDEN)}, "for a model with 99 tokens, this one has 96"),
        ({}, {"embed_tokens.weight": (VOCABULARY, 40)}, "its embeddings have another hidden size than its layers"),
        ({}, {"lm_head.weight": (999, HIDDEN)}, "names 999 of 96 tokens"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    change: Settings, shapes: dict[str, tuple[int, ...]], why: str, case: Case
) -> None:
    """From headers alone, so `plan` says it too."""
    held = {name: tuple(one.shape) for name, one in knowing_head(case.model).items()}
    with pytest.raises(BadDrafter, match=why):
        EagleFields.of(settings_of([0, 1, 2]) | change, held | shapes, SHAPE, "head")


def test_a_head_without_rows_of_its_own_takes_its_targets(case: Case) -> None:
    """Embeddings and head: as they are the target's own in this one, it guesses the same."""
    tensors = knowing_head(case.model)
    bare = case.head(
        {name: one for name, one in tensors.items() if name not in ("embed_tokens.weight", "lm_head.weight")}
    )
    whole = case.head(tensors | {"lm_head.weight": case.model.lm_head.weight.detach()})
    text, states = prompt(9, 1, VOCABULARY), torch.zeros(8, 3 * HIDDEN)
    found, wanted = (one.lm.head(one.lm.forward([case.rows(one, text, states)])[0]) for one in (bare, whole))
    assert torch.equal(found, wanted)
    held = {name: tuple(one.shape) for name, one in tensors.items() if name != "lm_head.weight"}
    with pytest.raises(BadDrafter, match="has no lm_head, and its target's does not fit it"):
        EagleFields.of(settings_of([0, 1, 2]), held | {"d2t": (40,)}, SHAPE, "head")


def test_parts_that_are_not_known_are_refused_by_name(case: Case) -> None:
    tensors = knowing_head(case.model)
    with pytest.raises(BadDrafter, match=r"'layers.0.self_attn.q_a_proj.weight' is a part that is not known"):
        case.head(tensors | {"layers.0.self_attn.q_a_proj.weight": torch.zeros(2, 2)})
    for flag, part in (("norm_before_fc", "input_norm.weight"), ("use_aux_norm", "fc_norm.0.weight")):
        with pytest.raises(BadDrafter, match=f"'{part}' is missing"):
            case.head(tensors, settings_of([0, 1, 2]) | {flag: True})
    with pytest.raises(BadDrafter, match=r"'norm.weight' is missing"):
        case.head({name: one for name, one in tensors.items() if name != "norm.weight"})


def test_without_ids_the_three_layers_of_everyone_are_read() -> None:
    held = {"fc.weight": (8, 24), "layers.0.hidden_norm.weight": (8,), "layers.0.self_attn.q_proj.weight": (8, 16)}
    told: Settings = {"hidden_size": 8, "vocab_size": 50}
    assert EagleFields.of(told, held, TargetShape(32, 8, 50), "x").taps == (2, 16, 29)
    outputs = told | {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 15, 28]}}
    assert EagleFields.of(outputs, held, TargetShape(32, 8, 50), "x").taps == (2, 16, 29)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target that speaks the demo's tokens, and a head for it in a folder without a tokenizer."""
    folder = tmp_path_factory.mktemp("pair")
    model = demo_chain_target(folder / "target")
    tensors = knowing_head(model, kept=[*range(0, 4096, 2)])
    tensors = {name.replace("layers.0.", "midlayer."): one for name, one in tensors.items()}
    return folder / "target", saved(settings_of([0, 1, 2], 4096), tensors, folder / "head")


def test_a_folder_is_recognised_and_joined(pair: tuple[Path, Path]) -> None:
    target, head = map(str, pair)
    answers = {}
    for drafter in ("none", head, f"{head}+ngram"):
        with specexec.load(target, drafter=drafter, dtype="f32", offload="disk", budget=16, ctx=256) as llm:
            found = llm.generate("The with statement", replace(SAMPLINGS[1], max_tokens=12))
            answers[drafter] = found.tokens
            assert not llm.drafter_failures
            assert found.accepted or drafter == "none"
    assert len(set(answers.values())) == 1
    for option in ({"draft_vocab": 100}, {"drafter_quant": "nf4"}):
        with pytest.raises(BadDrafter, match=r"quantises|trims"):
            specexec.load(target, drafter=head, ctx=256, **option)


def test_its_folder_says_what_it_is_and_whose(pair: tuple[Path, Path]) -> None:
    folder = open_folder(pair[1])
    shown = CliRunner().invoke(commands, ["models", "show", str(pair[1])])
    assert "no: a head that drafts for org/model (EAGLE-3)" in shown.output
    refused = CliRunner().invoke(commands, ["plan", str(pair[1]), "--offline"], standalone_mode=False).exception
    assert isinstance(refused, BadModelDir)
    assert refused.hint == f"-m org/model -d {pair[1]}"
    assert (head_kind(folder), verifier_of(folder)) == ("EAGLE-3", "org/model")
    assert as_model(folder).entries.keys() == {own_name(name) for name in folder.entries} - {None}
    assert as_model(as_model(folder)) == as_model(folder)


def test_a_head_in_the_cache_is_paired_with_the_model_it_names(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "cache_folder", lambda: tmp_path)
    assert names.drafter_of("org/model") is None
    for repo, text in (("org--head", (pair[1] / "config.json").read_text()), ("org--other", "{}"), ("org--odd", "[")):
        folder = tmp_path / f"models--{repo}" / "snapshots" / "a1"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(text)
    assert names.drafter_of("org/model") == "org/head"
    assert names.drafter_of("org/head") is None
    alias = names.Alias("org/model", "org/small")
    monkeypatch.setattr(names, "aliases", lambda: {"short": alias})
    assert names.drafter_of("short") == "org/small", "what is written down comes first"
    monkeypatch.setattr(names, "aliases", lambda: {"bare": names.Alias("org/model")})
    assert names.drafter_of("bare") == "org/head"


def test_auto_goes_without_a_head_that_is_of_no_use(
    pair: tuple[Path, Path], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Found before loading, by sizes, and while it is made, by parts: asked for by name it is refused either way."""
    misfit = open_folder(saved(settings_of([0, 1, 9], 4096), load_file(pair[1] / "model.safetensors"), tmp_path))
    automatic, named = parse("auto", lambda _: True), parse("sibling+ngram", lambda _: True)
    target = open_folder(pair[0])
    assert fitting(automatic, target, [open_folder(pair[1])])
    assert not fitting(automatic, target, [misfit])
    assert "reads the states at layers [0, 1, 9], this model has 4" in caplog.records[0].message

    def odd() -> NoDrafter:
        raise BadDrafter("a part that is not known")

    makers: dict[str, Callable[[], Drafter]] = {"sibling": odd, "ngram": NoDrafter}
    choice, drafter = drafter_of(automatic, makers, CostModel())
    assert (choice.name, drafter.name) == ("ngram", "none")
    with pytest.raises(BadDrafter):
        fitting(named, target, [misfit])
    with pytest.raises(BadDrafter):
        drafter_of(named, makers, CostModel())


def test_plan_counts_head_states_and_the_check(pair: tuple[Path, Path]) -> None:
    parts = dict[str, dict[str, int]]()
    for drafter in ("none", str(pair[1])):
        options = ["-d", drafter, "--offline", "--ram", "8GiB", "--json"]
        result = CliRunner().invoke(commands, ["plan", str(pair[0]), *options])
        assert result.exit_code == 0, result.output
        parts[drafter] = json.loads(result.output)["rows"][0]["ram_parts_B"]
    own_B = sum(one.nbytes for name, one in open_folder(pair[1]).entries.items() if "embed" not in name)
    tried_B = TRIED_ROWS * (3 + 1) * HIDDEN * 4
    assert parts[str(pair[1])]["drafter"] > own_B + tried_B
    assert parts[str(pair[1])]["embeddings of the drafter"] == 4096 * HIDDEN * 4
    assert "drafter" not in parts["none"]
