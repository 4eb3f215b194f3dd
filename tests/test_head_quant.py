"""A head in four bits: the text is that of the model with the rounded head, with any drafter and placement."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, PreTrainedModel

import offload
import specexec
from cli.app import main
from offload.checkpoint.headers import open_folder
from offload.checkpoint.quantized.quantize import Quant, quantise
from offload.errors import UnsupportedModel
from offload.hub.names import demo_folder
from offload.machine.memory import Free
from offload.model.quantized_head import FewBitHead
from offload.packs.pack import pack, plan
from offload.placement import requirements as need
from offload.placement.placement import Offload
from offload.placement.quantized_sizes import work_of
from specexec import SamplingParams
from specexec.drafters.none import NoDrafter
from specexec.drafters.sibling import SiblingDrafter
from specexec.engine.decoder import Decoder
from specexec.model.chain_lm import ChainLM
from specexec.model.linears import row_tiles as tiles
from specexec.model.tree_lm import TreeLM
from specexec.planning.best_first import BestFirst
from specexec.sizes import CHUNK
from tests.tiny import VOCABULARY, logits_of, redraw, tiny
from tests.writing import greedy, prompt, sequence_of, write

CTX = 256


def rounded(weight_VH: torch.Tensor) -> torch.Tensor:
    """What bitsandbytes itself makes of a weight in NF4; as one row, see checkpoint/quantized/bitsandbytes_4bit.py."""
    return bnb.dequantize_4bit(*bnb.quantize_4bit(weight_VH.reshape(1, -1), quant_type="nf4")).view(weight_VH.shape)


def with_rounded_head(model: PreTrainedModel) -> PreTrainedModel:
    old = model.get_output_embeddings()
    new = nn.Linear(old.in_features, old.out_features, bias=old.bias is not None)
    new.weight.data, new.bias = rounded(old.weight.data), old.bias
    (path,) = (path for path, module in model.named_modules() if module is old)
    setattr(model, path, new)
    return model.requires_grad_(False)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads so small that they would be one piece come in several."""
    monkeypatch.setattr(need, "HEAD_PIECE_B", 1 << 14)


TIERS: tuple[Offload, ...] = ("none", "ram", "disk")
EACH = [("none", 0), ("sibling", 5), ("sibling", 64)]
ALL = [(tier, *way) for tier in TIERS for way in EACH]
SOME = [(tier, *way) for tier, way in zip(TIERS, EACH, strict=True)]


@pytest.mark.parametrize(
    ("family", "cases"), [("llama_tied", ALL), ("llama", SOME), ("gemma2", SOME), ("gpt_neox", SOME), ("mixtral", SOME)]
)
@pytest.mark.usefixtures("small_pieces")
def test_the_text_is_what_transformers_writes_with_that_head(
    family: str, cases: list[tuple[Offload, str, int]], tmp_path: Path
) -> None:
    expected = greedy(with_rounded_head(tiny(family, tmp_path)), prompt(12), 16)
    sampling = SamplingParams(temperature=0.0, max_tokens=16)
    sibling = SiblingDrafter(TreeLM(tiny(family, tmp_path / "again")), VOCABULARY)
    for tier, drafter, budget in cases:
        lm = TreeLM(offload.load(tmp_path, tier, head_quant="nf4"))
        (sequence,) = write(lm, sibling if drafter == "sibling" else NoDrafter(), [prompt(12)], sampling, budget)
        assert sequence.answer == expected, (tier, drafter, budget)
        lm.close()


def test_a_model_without_trees_writes_what_transformers_writes(tmp_path: Path) -> None:
    model = BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4))
    redraw(model, seed=0)
    model.eval().save_pretrained(tmp_path)
    lm = ChainLM(offload.load(tmp_path, "disk", head_quant="nf4"))
    decoder = Decoder(lm, NoDrafter(), BestFirst(), 0)
    sequence = sequence_of(prompt(12), SamplingParams(temperature=0.0, max_tokens=16), limit=128)
    decoder.join(sequence)
    while decoder.live:
        decoder.step()
    assert sequence.answer == greedy(with_rounded_head(model), prompt(12), 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(300, 64), (1000, 72), (256, 33), (4096, 192)])
@pytest.mark.usefixtures("small_pieces")
def test_pieces_are_the_rows_of_the_whole(shape: tuple[int, int], dtype: torch.dtype) -> None:
    linear = nn.Linear(shape[1], shape[0], bias=True, dtype=dtype).requires_grad_(False)
    head = FewBitHead(linear, torch.device("cpu"))
    assert len(list(head._dense())) > 1
    assert (head.weight.shape, head.weight.dtype) == (linear.weight.shape, dtype)
    assert torch.equal(torch.cat([dense.clone() for _, dense in head._dense()]), rounded(linear.weight))
    hidden_RH = torch.randn(17, shape[1], dtype=dtype)
    wanted = nn.functional.linear(hidden_RH.double(), rounded(linear.weight).double(), linear.bias.double())
    torch.testing.assert_close(head(hidden_RH).double(), wanted, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_logits_of_a_row_do_not_depend_on_other_rows(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(need, "HEAD_PIECE_B", 1 << 18)
    head = FewBitHead(nn.Linear(256, 4000, bias=False, dtype=dtype), torch.device("cpu"))
    assert len(list(head._dense())) > 4
    hidden_RH = torch.randn(CHUNK + 44, 256, dtype=dtype)
    all_RV = tiles.tiled(head, hidden_RH)
    for rows in (slice(0, 1), slice(3, 20), slice(100, 133), slice(7, 264), slice(299, 300)):
        assert torch.equal(tiles.tiled(head, hidden_RH[rows]), all_RV[rows]), rows


def test_one_seed_is_one_text_on_the_demo_and_not_that_of_the_whole_head() -> None:
    sampling = SamplingParams(temperature=0.9, top_p=0.95, seed=3, max_tokens=20)
    cases: list[tuple[Offload, str, int]] = [("none", "none", 0), ("disk", "sibling", 64), ("ram", "ngram", 7)]
    answers = []
    for tier, drafter, budget in cases:
        with specexec.load(
            "demo", drafter=drafter, offload=tier, dtype="f32", budget=budget, head_quant="nf4", ctx=CTX
        ) as llm:
            answers.append(llm.generate("The import statement", sampling).tokens)
            logits_V = llm.scores("The import statement", [], SamplingParams(temperature=0.0))
    assert answers == answers[:1] * 3
    with specexec.load("demo", drafter="none", dtype="f32", ctx=CTX) as llm:
        assert not torch.equal(llm.scores("The import statement", [], SamplingParams(temperature=0.0)), logits_V)


@pytest.mark.parametrize("family", ["llama", "llama_tied", "opt"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_headers_alone_tell_what_the_head_takes(
    family: str, dtype: str, on_gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if on_gpu:  # a CPU in the place of one
        monkeypatch.setattr("offload.model.load.free_memory", lambda *_: Free(1 << 30, 1 << 30))
    tiny(family, tmp_path)
    model = offload.load(tmp_path, "none", dtype=dtype, head_quant="nf4")
    head, placement = model.get_output_embeddings(), offload.stream_of(model).placement
    assert isinstance(head, FewBitHead)
    item_B = head._dtype.itemsize
    folder = open_folder(tmp_path)
    headers = offload.with_head(folder, offload.need_of(folder, item_B, 4096), "nf4", item_B)
    parts = ("head_B", "head_rows_B", "head_passing_B", "embeddings_B", "norms_B")
    assert [getattr(headers, part) for part in parts] == [getattr(placement.need, part) for part in parts]
    assert placement.need.head_B == sum(tensor.nbytes for tensor in head.parameters())
    assert max(dense.nbytes for _, dense in head._dense()) < placement.need.head_rows_B
    embeddings = model.get_input_embeddings()
    assert embeddings.weight.nbytes == placement.need.embeddings_B
    assert placement.embeddings_in_ram == on_gpu == bool(embeddings._forward_hooks)
    listed_B = placement.device_parts_B if on_gpu else placement.host_parts_B
    assert listed_B["head"] == placement.need.head_B
    assert listed_B["rows of the head dequantised"] == placement.need.head_rows_B


def test_a_head_that_passes_through_ram_is_counted_where_nothing_else_makes_room(tmp_path: Path) -> None:
    tiny("llama", tmp_path, vocab_size=1 << 16)
    placement = offload.stream_of(offload.load(tmp_path, "disk", head_quant="nf4")).placement
    dense_B = (1 << 16) * 64 * 4
    assert placement.host_parts_B["weights on their way"] == dense_B - placement.ring_B > 0
    assert placement.need.head_B * 7 < dense_B


def test_plan_counts_it_and_names_it_in_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny("llama", tmp_path / "m", vocab_size=1 << 16)
    plain: dict[str, Any] = {}
    small: dict[str, Any] = {}
    for found, options in ((plain, []), (small, ["--head-quant", "nf4"])):
        assert main(["plan", str(tmp_path / "m"), "--gpu", "8GiB", "--ctx", "512", "--json", *options]) == 0
        found.update(json.loads(capsys.readouterr().out))
    whole_B, few_B = (found["rows"][0]["vram_parts_B"]["head"] for found in (plain, small))
    assert whole_B == (1 << 16) * 64 * 4
    assert few_B == (1 << 16) * 64 * 9 // 16
    assert "rows of the head dequantised" in small["rows"][0]["vram_parts_B"]
    assert small["best"][-1].endswith(" --head-quant nf4 --ctx 512")
    assert "nf4" not in plain["best"][-1]


def test_a_head_that_has_few_bits_already_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    folder = Path(shutil.copytree(demo_folder("target"), tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"tie_word_embeddings": False, "quantization_config": {"quant_method": "bitsandbytes"}}
    (folder / "config.json").write_text(json.dumps(config))
    (shard,) = folder.glob("*.safetensors")
    tensors = load_file(shard)
    save_file(tensors | quantise(tensors["model.embed_tokens.weight"], "lm_head.weight", "int8"), shard)
    specexec.load(str(folder), drafter="none", ctx=CTX).close()
    for command in (["plan", str(folder)], ["chat", "-m", str(folder), "-d", "none", "-p", "x"]):
        assert main([*command, "--head-quant", "nf4"]) == 4
        said = capsys.readouterr().err
        assert "keeps its head in few bits already ('lm_head.weight')" in said
        assert "Try: leave --head-quant out" in said


def test_a_pack_takes_it_as_its_original_does(tmp_path: Path) -> None:
    pack(plan(open_folder(demo_folder("target")), "int8"), tmp_path / "packed")
    with specexec.load(str(tmp_path / "packed"), drafter="none", head_quant="nf4", ctx=CTX) as llm:
        assert llm.generate("Once", SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)).tokens
        assert isinstance(llm._model.get_output_embeddings(), FewBitHead)


def test_a_batch_is_not_continued_with_another_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.txt").write_text("one\ntwo\n")
    run = ["generate", str(tmp_path / "in.txt"), "-o", str(tmp_path / "out.jsonl"), "--seed", "1", "--max-tokens", "2"]
    assert main(run) == 0
    capsys.readouterr()
    assert main([*run, "--resume", "--head-quant", "nf4"]) != 0
    assert 'was made with --head-quant null, this run has "nf4"' in capsys.readouterr().err


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt_neox", "mixtral"])
@pytest.mark.parametrize("quant", ["none", "nf4"])
@pytest.mark.usefixtures("small_pieces")
def test_a_pack_keeps_the_head_in_four_bits_and_gives_the_same_logits(
    family: str, quant: Quant, tmp_path: Path
) -> None:
    """Bit for bit those of `--head-quant nf4` on a pack of the same layers whose head is whole."""
    tiny(family, tmp_path / "whole")
    folder = open_folder(tmp_path / "whole")
    pack(plan(folder, quant), tmp_path / "plain")
    pack(plan(folder, quant, head="nf4"), tmp_path / "few")
    tokens = torch.tensor([prompt(12)])
    for dtype in ("f32", "bf16") if family == "llama" else ("f32",):
        found = [
            offload.load(tmp_path / "plain", "disk", dtype=dtype, head_quant="nf4"),
            offload.load(tmp_path / "few", "disk", dtype=dtype),
        ]
        if dtype == "f32":  # stored like this; to fewer bits it is rounded before here, and after there
            assert torch.equal(*(logits_of(model, tokens) for model in found))
        heads = [model.get_output_embeddings() for model in found]
        assert all(isinstance(head, FewBitHead) for head in heads)
        needs = [offload.stream_of(model).placement.need for model in found]
        assert [needs[1].head_B, needs[1].head_rows_B] == [needs[0].head_B, needs[0].head_rows_B]
        assert (needs[1].head_passing_B, needs[1].embeddings_B) == (0, needs[0].embeddings_B)
        item_B = 4 if dtype == "f32" else 2
        work = work_of(open_folder(tmp_path / "few"), "none", item_B)
        asked = work_of(open_folder(tmp_path / "plain"), "none", item_B, "nf4")
        assert (work.weights_B, work.unpacked_B) == (asked.weights_B, asked.unpacked_B)
        told = offload.need_of(open_folder(tmp_path / "few"), item_B, 4096)
        parts = ("head_B", "head_rows_B", "head_passing_B", "embeddings_B")
        assert [getattr(told, part) for part in parts] == [getattr(needs[1], part) for part in parts]
        for model in found:
            offload.stream_of(model).close()
    wrote = sum(file.stat().st_size for file in (tmp_path / "few").glob("*.safetensors"))
    assert plan(folder, quant, head="nf4").size_B == pytest.approx(wrote, rel=0.1)


def test_a_pack_with_such_a_head_says_so_and_is_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "packed"
    wrote = ["pack", "demo", "--quant", "nf4", "--head-quant", "nf4", "--out", str(out), "-q"]
    assert main(wrote) == main(wrote) == 0, "finished ones are kept"
    capsys.readouterr()
    assert main(["models", "show", str(out), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["head"], shown["format"], shown["loads_in_transformers"]) == ("nf4", "nf4", False)
    assert main(["models", "show", str(out)]) == main(["models", "verify", str(out)]) == 0
    assert "no, its head is in four bits" in capsys.readouterr().out
    assert main(["plan", str(out), "--gpu", "1GiB", "--json"]) == 0
    assert "rows of the head dequantised" in json.loads(capsys.readouterr().out)["rows"][0]["vram_parts_B"]
    assert main([*wrote[:4], "--out", str(out)]) != 0, "another pack"
    assert "--head-quant nf4" in capsys.readouterr().err
    sampling = SamplingParams(max_tokens=12, temperature=0.8, seed=3, ignore_eos=True)
    with specexec.load(str(out), drafter=str(demo_folder("drafter")), verify=True, ctx=CTX, budget=8) as llm:
        drafted = llm.generate("The import", sampling).tokens
    with specexec.load(str(out), drafter="none", ctx=CTX, offload="disk") as llm:
        assert llm.generate("The import", sampling).tokens == drafted
    with pytest.raises(UnsupportedModel, match="few bits already"):
        specexec.load(str(out), drafter="none", head_quant="nf4", ctx=CTX)
    with pytest.raises(UnsupportedModel, match="few bits already"):
        plan(open_folder(out), "none", head="nf4")
    pack(plan(open_folder(out), "none"), tmp_path / "anew")  # as it is
    assert main(["models", "show", str(tmp_path / "anew"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["head"], shown["format"], shown["loads_in_transformers"]) == ("nf4", "nf4", False)
    with specexec.load(str(tmp_path / "anew"), drafter="none", ctx=CTX) as llm:
        assert llm.generate("The import", sampling).tokens == drafted
