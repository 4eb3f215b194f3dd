"""Keys and values in 8 or 4 bits (`--kv-quant`): one text for every drafter, budget, placement and batch.

The reference is transformers' own model and generate, whose attention rounds keys and values by a plain loop.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

import offload
import specexec
from cli.engine.model_identity import identities_of
from cli.engine.open import introduction
from cli.engine.prefix_store import PrefixStore
from specexec.compose.load_options import LoadOptions
from specexec.drafters.none import NoDrafter
from specexec.drafters.sibling import SiblingDrafter
from specexec.engine.engine import Engine
from specexec.errors import BadOption, UnsupportedArchitecture
from specexec.model.cache import KVCache
from specexec.model.cache_in_ram import Travel
from specexec.model.kept_rows import FewBitRows, KVQuant, WholeRows
from specexec.model.tree_lm import Rows, TreeLM
from specexec.sampling.params import SamplingParams
from tests.pictured import picture, seeing, shown
from tests.serving import serving
from tests.test_architectures import NODES, TOKENS, committed, path_of, tree_logits
from tests.test_cache_in_ram import Late
from tests.test_recurrent import built
from tests.tiny import LAYERS, VOCABULARY, tiny
from tests.writing import drafters, greedy, prompt, write

BITS: tuple[KVQuant, ...] = (8, 4)
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


@cache
def hadamard(size: int) -> np.ndarray:
    """Entry (i, j) is 1 or -1 by the parity of the bits that i and j share."""
    return np.array([[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]) / size**0.5


def rounded(rows: Tensor, bits: int) -> Tensor:
    """Each row of each head in `bits` bits and back, number by number."""
    out = rows.numpy().astype(np.float32).copy()
    for row in out.reshape(-1, out.shape[-1]):
        row[:] = rounded_row(row.tobytes(), bits)
    return torch.from_numpy(out)


@cache
def rounded_row(numbers: bytes, bits: int) -> np.ndarray:
    """Once for each row: transformers' attention sees every row of the text again at each token."""
    row = np.frombuffer(numbers, np.float32)
    D = len(row)
    size = next(size for size in (64, 32, 16, 8, 4, 2) if D % size == 0)
    turn = np.kron(np.eye(D // size), hadamard(size)).astype(np.float32)
    turned = turn @ row
    for start in range(0, D, 64):
        block = turned[start : start + 64]
        low = np.float32(np.float16(block.min()))
        step = np.float32(np.float16((block.max() - low) / (2**bits - 1)))
        for i, number in enumerate(block):
            code = min(max(round(float((number - low) / step)), 0), 2**bits - 1) if step else 0
            block[i] = code * step + low
    return turn @ turned


@pytest.fixture
def rounding() -> Iterator[Callable[[PreTrainedModel, int], PreTrainedModel]]:
    """Makes transformers' own attention of a model see rounded keys and values."""

    def made(model: PreTrainedModel, bits: int) -> PreTrainedModel:
        own = import_module(type(model).__module__).eager_attention_forward

        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **more: object
        ) -> tuple[Tensor, Tensor | None]:
            found: tuple[Tensor, Tensor | None] = own(
                module, query, rounded(key, bits), rounded(value, bits), mask, **more
            )
            return found

        AttentionInterface.register("rounding", attend)
        AttentionMaskInterface.register("rounding", eager_mask)
        model.set_attn_implementation("rounding")
        return model

    yield made
    for known in (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping):
        known.pop("rounding", None)


def lm_in(family: str, folder: Path, bits: KVQuant, travel: Travel | None = None) -> TreeLM:
    lm = TreeLM(tiny(family, folder), travel=travel)
    lm.keep_in(bits)
    return lm


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("D", [16, 64, 96, 128, 192])
def test_a_row_is_read_as_a_plain_loop_rounds_it(bits: KVQuant, D: int) -> None:
    kept, rows = FewBitRows(bits), torch.randn(2, 3, D, generator=torch.Generator().manual_seed(D)) * 3
    held = kept.keep(rows)
    assert held.dtype == torch.uint8
    assert held.shape[-1] == D * bits // 8 + 4 * -(-D // 64)
    found = kept.plain(held).float()
    torch.testing.assert_close(found, rounded(rows, bits), atol=1e-5, rtol=0)
    assert (found - rows).abs().max() < rows.abs().max() * (0.02 if bits == 8 else 0.3)


@pytest.mark.parametrize("bits", BITS)
def test_a_row_has_the_same_bytes_in_any_company(bits: KVQuant) -> None:
    rows = torch.randn(2, 300, 96).to(torch.bfloat16)
    whole = FewBitRows(bits).keep(rows)
    assert all(torch.equal(FewBitRows(bits).keep(rows[:, [row]])[:, 0], whole[:, row]) for row in (0, 7, 299))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-6, 1e4, 1e30])
def test_no_size_of_numbers_becomes_nan(bits: KVQuant, scale: float) -> None:
    rows = torch.randn(1, 2, 64) * scale
    assert FewBitRows(bits).plain(FewBitRows(bits).keep(rows)).isfinite().all()


FAMILIES = ["llama", "mistral", "gpt_oss", "deepseek_v3"]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers_with_keys_and_values_rounded_so(
    family: str, tmp_path: Path, rounding: Callable[[PreTrainedModel, int], PreTrainedModel]
) -> None:
    text = prompt(40)
    (found, whole), model = (few_and_whole(family, tmp_path, text)), tiny(family, tmp_path / "truth")
    with torch.no_grad():
        truth = rounding(model, 4)(torch.tensor([text]), use_cache=False).logits[0]
    # transformers sums in float32: here and there a number lies at the edge of two codes.
    assert (found - truth).abs().median() < 0.1 * (whole - truth).abs().median()


def few_and_whole(family: str, folder: Path, text: list[int]) -> tuple[Tensor, Tensor]:
    lm = lm_in(family, folder / "m", 4)
    (few,) = lm.forward([Rows.text(KVCache(), text)])
    with lm.keeping_whole():
        (whole,) = lm.forward([Rows.text(KVCache(), text)])
    return lm.head(few), lm.head(whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_is_the_same_whatever_guesses_and_wherever_its_keys_are(family: str, tmp_path: Path) -> None:
    prompts = [prompt(5), prompt(40, 2), prompt(270, 3)]
    few, away = lm_in(family, tmp_path / "m", 4), lm_in(family, tmp_path / "m", 4, Travel(frozenset([0, 1, 3]), Late()))
    guessing = drafters(family, tmp_path)
    plain = [sequence.answer for one in prompts for sequence in write(few, guessing["none"], [one], GREEDY)]
    for target, name, budget in ((few, "sibling", 64), (few, "blind", 7), (away, "sibling", 64)):
        written = write(target, guessing[name], prompts, GREEDY, budget)
        assert [sequence.answer for sequence in written] == plain, name


def test_nodes_of_a_tree_have_the_logits_of_their_paths_bit_for_bit(tmp_path: Path) -> None:
    text = prompt(21)
    lm = TreeLM(tiny("llama", tmp_path / "m", head_dim=96))
    lm.keep_in(8)
    found = tree_logits(lm, committed(lm, text))
    for node in (5, 17, NODES - 1):
        path = [*text, *(TOKENS[one] for one in path_of(node))]
        (hidden,) = lm.forward([Rows(committed(lm, path[:-3]), path[-3:], [-1, 0, 1])])
        assert torch.equal(lm.head(hidden)[-1], found[node])


@pytest.mark.parametrize("bits", BITS)
def test_a_rewound_text_and_its_copies_go_on_bit_for_bit_as_if_read_anew(bits: KVQuant, tmp_path: Path) -> None:
    text = prompt(60)
    lm = lm_in("qwen3", tmp_path / "m", bits)
    cache = KVCache()
    lm.forward([Rows(cache, text, [-1, *range(29), 9, *range(30, 59)])])  # two branches after the tenth
    cache.commit([*range(10), *range(30, 40)], keep=[40, 41])
    assert cache.size_B == LAYERS * 2 * 2 * 256 * (16 * bits // 8 + 4)
    branch = cache.prefix(18)
    cache.rewind(12)
    anew = [committed(lm, one.tokens) for one in (cache, branch)]
    for one, other in zip((cache, branch), anew, strict=True):
        for layer in range(LAYERS):
            assert all(torch.equal(*rows) for rows in one.layers[layer].runs(other.layers[layer], 0, len(one)))
    ends = lm.forward([Rows(one, text[:5], range(-1, 4)) for one in (cache, branch, *anew)])
    assert all(torch.equal(*both) for both in zip(ends[:2], ends[2:], strict=True))


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "deepseek_v3", "gpt_oss"])
def test_a_plan_counts_the_bytes_that_a_cache_then_holds(model_type: str, tmp_path: Path) -> None:
    tiny(model_type, tmp_path / "m")
    for bits in BITS:
        model = offload.load(tmp_path / "m", "none", ctx=256, kv_quant=bits)
        need, config = offload.stream_of(model).placement.need, offload.open_folder(tmp_path / "m").config
        lm = TreeLM(model)
        lm.keep_in(bits)
        assert need.cache_B == sum(offload.cache_rows_B(config, bits)) * 256 == committed(lm, prompt(256)).size_B


def test_it_is_named_wherever_a_text_or_its_keys_are_kept(tmp_path: Path) -> None:
    bits: KVQuant | None
    digests = set()
    for bits in (None, 8):
        with specexec.load("demo", drafter="none", kv_quant=bits) as llm:
            llm.prefixes = PrefixStore.of(llm, tmp_path)
            text = llm.encode("What is a tree? What is a drafter, and what is offloading? " * 3)
            assert llm.prefixes.known(text) == 0
            llm.generate(text, GREEDY)
            assert (f"KV in {bits} bits" in " · ".join(introduction(llm))) == (bits is not None)
            digests.add(identities_of(llm)["target"].digest)
            found: dict[object, KVCache] = {}
            llm.prefixes.fill([*text, *llm.generate(text, GREEDY).tokens], found)
            (cache,) = found.values()
            assert cache.layers[0].keys_HRD.dtype == (torch.uint8 if bits else torch.bfloat16)
    assert len(digests) == 2


@pytest.mark.parametrize("value", [3, 8.0, "8", True, 16])
def test_other_numbers_of_bits_are_refused(value: object) -> None:
    with pytest.raises(BadOption, match=r"kv_quant is .*None, 8 or 4"):
        LoadOptions(kv_quant=value)  # type: ignore[arg-type]  # that is the point


def test_keys_are_whole_again_where_that_is_asked_for(tmp_path: Path) -> None:
    lm, whole, text = lm_in("llama", tmp_path / "m", 4), TreeLM(tiny("llama", tmp_path / "m")), prompt(30)
    with lm.keeping_whole():
        (found,) = lm.forward([Rows.text(KVCache(), text)])
    (expected,), (few,) = (one.forward([Rows.text(KVCache(), text)]) for one in (whole, lm))
    assert torch.equal(found, expected)
    assert not torch.equal(few, expected)
    assert torch.equal(WholeRows().plain(found), found)


def test_layers_beside_a_recurrence_keep_few_bits_too(tmp_path: Path) -> None:
    truth = built("qwen3_5_text")
    truth.save_pretrained(tmp_path)
    prompts = [prompt(9), prompt(30, 2)]
    asked, whole = [SamplingParams(temperature=0.0, max_tokens=12)] * 2, [greedy(truth, one, 12) for one in prompts]
    near = SiblingDrafter(TreeLM(truth), VOCABULARY)
    bits: KVQuant | None
    texts: dict[int | None, list[list[int]]] = {}
    for bits in (None, 4):
        lm = TreeLM(offload.load(tmp_path, "disk", ctx=256, kv_quant=bits))
        if bits:
            lm.keep_in(bits)
        plain, drafted = (
            [sequence.answer for sequence in write(lm, one, prompts, asked, budget=12)] for one in (NoDrafter(), near)
        )
        assert drafted == plain
        texts[bits] = plain
    assert texts[None] == whole
    assert texts[4] != texts[None]  # it does round


def test_rows_of_an_image_keep_few_bits_and_the_server_answers_from_them(tmp_path: Path) -> None:
    seeing("gemma3", tmp_path)
    sampling = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
    messages = [shown("What is ", picture(1), "?")]
    bits: KVQuant | None
    texts: dict[int | None, str] = {}
    for bits in (None, 4):
        with specexec.load(str(tmp_path), drafter="none", offload="disk", kv_quant=bits) as engine:
            texts[bits] = "".join(burst.text for burst in engine.stream(messages, sampling))
    assert texts[4] != texts[None]

    def opened() -> Engine:
        return specexec.load(str(tmp_path), drafter="ngram", offload="disk", budget=8, kv_quant=4)

    url = f"data:image/png;base64,{base64.b64encode(picture(1)).decode()}"
    content = [{"type": "text", "text": "What is "}, {"type": "image_url", "image_url": {"url": url}},
               {"type": "text", "text": "?"}]  # fmt: skip
    body = {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 10, "ignore_eos": True}
    with serving(opened) as served, served.http as client:
        answer = client.post("/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"] == texts[4]


def test_heads_of_odd_size_are_refused() -> None:
    with pytest.raises(UnsupportedArchitecture, match="heads of 15 numbers"):
        FewBitRows(4).keep(torch.zeros(1, 1, 15))
