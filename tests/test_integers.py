"""Computing in integers: what the book says, the same bits in any company, and another model that is always named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import PreTrainedModel

import offload
from cli.batch.command import _configuration
from cli.engine.model_identity import identities_of
from cli.shared.options import EngineOptions
from offload.checkpoint.headers import open_folder
from offload.checkpoint.quantized.arithmetic import row_codes
from offload.checkpoint.quantized.arithmetic.row_codes import RowCodes
from offload.checkpoint.quantized.quantize import Quant, quantise_int8
from offload.errors import UnsupportedModel
from offload.hub.names import demo_folder
from offload.machine import integer_loops, integer_products
from offload.packs.pack import pack, plan
from offload.placement.placement import Offload
from offload.placement.quantized_sizes import need_in, work_of
from offload.placement.requirements import need_of
from specexec.compose.load_options import LoadOptions
from specexec.model.cache import KVCache
from specexec.model.tree_lm import Rows, TreeLM
from specexec.sampling.params import SamplingParams
from tests.tiny import tiny
from tests.writing import drafters, greedy, prompt, write

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TIERS: tuple[Offload, ...] = ("none", "ram", "disk")
WAYS = (integer_products.by_kernel, integer_products.by_floats)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_the_book(rows: torch.Tensor, weight: RowCodes, bias: torch.Tensor | None) -> torch.Tensor:
    """The documented arithmetic: integers made in float32, exact products in float64, scales at the end."""
    peaks = rows.float().abs().amax(-1, keepdim=True).clamp(min=1e-30)
    whole = (rows.float() * (127 * 128 / peaks)).round()
    products = whole.double() @ weight.codes_OI[:].double().t()
    found = products * (peaks.double() / (127 * 128)) * (weight.scales_O.double() / 127)
    return found if bias is None else found + bias.double()


@settings(max_examples=40)
@given(
    R=st.integers(1, 40),
    I=st.sampled_from([1, 7, 64, 1000, 1025, 2100]),
    O=st.integers(1, 40),
    extreme=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_both_ways_give_the_exact_product(R: int, I: int, O: int, extreme: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, codes = (
        torch.tensor([-128, 127])[torch.randint(2, (count, I), generator=generator)].to(torch.int8)
        if extreme
        else torch.randint(-128, 128, (count, I), dtype=torch.int8, generator=generator)
        for count in (R, O)
    )
    expected = rows.long() @ codes.long().t()
    assert torch.equal(integer_products.by_floats(rows, codes).long(), expected)
    assert torch.equal(integer_products.product(rows, codes).long(), expected)


def test_a_kernel_that_cuts_off_sums_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def saturating(rows: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        pairs = rows.int()[:, None].unflatten(-1, (-1, 2)) * codes.int().unflatten(-1, (-1, 2))
        return pairs.sum(-1).clamp(-(2**15), 2**15 - 1).sum(-1, dtype=torch.int32)

    def missing(rows: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    for kernel in (saturating, missing):
        monkeypatch.setattr(integer_products, "by_kernel", kernel)
        assert not integer_products.kernel_pays.__wrapped__("cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(48, 64), (33, 100), (700, 1500)])
def test_a_linear_is_what_the_book_says(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = RowCodes.of(*quantise_int8(noise(*shape)), dtype)
    rows, bias = noise(2, 9, shape[1], seed=1).to(dtype), noise(shape[0], seed=2).to(dtype)
    rows[0, 0] = 0
    for one in (None, bias):
        found, expected = nn.functional.linear(rows, weight, one), by_the_book(rows, weight, one)
        assert (found.shape, found.dtype) == (expected.shape, dtype)
        torch.testing.assert_close(found.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    dense = rows.double() @ weight.dense().double().t()
    assert (found.double() - bias.double() - dense).abs().max() < 0.01 * dense.abs().max()


@settings(max_examples=25)
@given(
    count=st.integers(1, 300),
    at=st.floats(0, 1, exclude_max=True),
    dtype=st.sampled_from(DTYPES),
    shape=st.sampled_from([(64, 64), (96, 130), (520, 520)]),
    threads=st.sampled_from([1, 3]),
)
def test_a_row_has_the_same_bits_in_any_company(
    count: int, at: float, dtype: torch.dtype, shape: tuple[int, int], threads: int
) -> None:
    weight = RowCodes.of(*quantise_int8(noise(*shape)), dtype)
    rows, bias = (noise(count, shape[1], seed=count) * 3).to(dtype), noise(shape[0], seed=2).to(dtype)
    one = int(at * count)
    alone = nn.functional.linear(rows[one : one + 1].clone(), weight, bias)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        among = nn.functional.linear(rows, weight, bias)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(among[one : one + 1], alone)


@pytest.mark.parametrize("inference", [False, True])
def test_rows_that_change_between_two_linears_are_read_again(inference: bool) -> None:
    first, second = (RowCodes.of(*quantise_int8(noise(8, 16, seed=seed)), torch.float32) for seed in (1, 2))
    with torch.inference_mode(inference):
        rows = noise(3, 16)
        nn.functional.linear(rows, first)
        rows.mul_(-2)
        assert torch.equal(nn.functional.linear(rows, second), nn.functional.linear(rows.clone(), second))


def test_a_row_that_is_no_number_stays_none_and_spoils_no_other() -> None:
    weight, rows = RowCodes.of(*quantise_int8(noise(48, 64)), torch.float32), noise(5, 64)
    expected = nn.functional.linear(rows.clone(), weight)
    rows[2, 7] = torch.nan
    found = nn.functional.linear(rows, weight)
    assert found[2].isnan().all()
    assert torch.equal(found[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])


def test_every_other_function_sees_its_numbers() -> None:
    codes, scales = quantise_int8(noise(6, 8))
    weight = RowCodes.of(codes, scales, torch.float32)
    expected = codes.float() * scales[:, None] / 127
    assert (weight.shape, weight.dtype, type(weight.clone())) == ((6, 8), torch.float32, torch.Tensor)
    torch.testing.assert_close(weight.clone(), expected)
    torch.testing.assert_close(torch.ones(2, 8) @ weight.t(), torch.ones(2, 8) @ expected.t())


@pytest.fixture
def packed(pack_of: Callable[[str, Quant], Path]) -> Callable[[str], Path]:
    """The int8 pack of a tiny model; the model itself lies beside it as `whole`."""
    return lambda family: pack_of(family, "int8")


def target(folder: Path, tier: Offload = "none", dtype: torch.dtype | None = None) -> TreeLM:
    model = offload.load(folder, tier, dtype=dtype, compute="int8")
    return TreeLM(model, tiled=not offload.stream_of(model).in_integers)


def logits(lm: TreeLM, tokens: list[int]) -> torch.Tensor:
    (hidden,) = lm.forward([Rows(KVCache(), tokens, range(-1, len(tokens) - 1))])
    return lm.head(hidden)


# Windows let attention begin elsewhere among many texts than in one alone: another order of its sums, in float32.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_sweep_of_any_number_of_rows_gives_the_same_logits(
    family: str, dtype: torch.dtype, packed: Callable[[str], Path]
) -> None:
    lm = target(packed(family), dtype=dtype)
    texts = [prompt(9, seed) for seed in range(64)]
    caches = [KVCache() for _ in texts]
    lm.forward([Rows(cache, text, range(-1, 8)) for cache, text in zip(caches, texts, strict=True)])
    for cache in caches:
        cache.commit(range(9))

    def next_logits(count: int) -> torch.Tensor:
        found = lm.head(torch.cat(lm.forward([Rows(cache, [7], [-1]) for cache in caches[:count]])))
        for cache in caches:
            cache.forget_nodes()
        return found

    together = next_logits(64)
    for rows in (1, 3, 16):
        assert torch.equal(next_logits(rows), together[:rows]), rows
    lm.close()


def test_only_the_rows_of_the_sweep_are_computed(packed: Callable[[str], Path]) -> None:
    lm = target(packed("llama"))
    seen: list[int] = []
    lm.model.get_input_embeddings().register_forward_hook(lambda _, asked, __: seen.append(asked[0].numel()))
    logits(lm, prompt(5))
    assert seen == [5]
    lm.close()


def test_whichever_way_the_machine_takes_the_logits_are_the_same(
    packed: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = target(packed("llama"))
    found = [logits(lm, prompt(30))]
    monkeypatch.setattr(row_codes, "most_rows_of_loops", lambda _: 0)
    for way in WAYS:
        monkeypatch.setattr(row_codes, "product", way)
        found.append(logits(lm, prompt(30)))
    assert all(torch.equal(one, found[0]) for one in found)
    lm.close()


@settings(max_examples=30)
@given(
    R=st.sampled_from([1, 3, 4, 5, 21]),
    I=st.sampled_from([1, 100, 1024, 1056, 2100]),
    O=st.integers(8, 40),
    extreme=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_compiled_loops_round_the_exact_sums_once(R: int, I: int, O: int, extreme: bool, seed: int) -> None:
    if not integer_loops.there():
        pytest.skip("for x86 with AVX2")
    generator = torch.Generator().manual_seed(seed)
    rows = noise(R, I, seed=seed)
    codes = torch.randint(-128, 128, (O, I), dtype=torch.int8, generator=generator)
    if extreme:
        rows, codes = rows.sign(), torch.full_like(codes, -128)
    peaks = rows.abs().amax(1).clamp(min=1e-30)
    exact = (rows * (16256 / peaks[:, None])).round().double() @ codes.double().t()
    found, scales = torch.empty(R, O), noise(O, seed=1)
    whole, peaks_found = integer_loops.whole_numbers(rows, 16256, 1e-30)
    fill = integer_loops.filling(whole, codes, peaks_found, scales, found)
    for first, end in ((0, 3), (3, O)):
        fill(first, end)
    assert torch.equal(peaks_found, peaks)
    assert torch.equal(found, exact.float() * peaks[:, None] * scales)


def in_integers(model: PreTrainedModel) -> PreTrainedModel:
    """transformers' own model, whose layers' linears do by hand what the documents say."""
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            weight = RowCodes.of(*quantise_int8(module.weight.detach()), torch.float32)
            module.forward = lambda rows, w=weight, b=module.bias: by_the_book(rows, w, b).float()  # type: ignore
    return model


@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral"])
def test_every_text_is_what_transformers_writes_with_such_linears(
    family: str, packed: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = packed(family)
    ways = drafters(family, tmp_path)
    if family == "mixtral":  # its experts are dequantised: no truth by hand, but one text
        expected = write(target(folder), ways["none"], [prompt(12)], SamplingParams(temperature=0.0, max_tokens=16))
        wanted = expected[0].answer
    else:
        wanted = greedy(in_integers(tiny(family, tmp_path / "whole")), prompt(12), 16)
    for tier, name, budget in zip(TIERS, ("none", "sibling", "perfect"), (0, 7, 64), strict=True):
        lm = target(folder, tier)
        sampling = SamplingParams(temperature=0.0, max_tokens=16)
        (sequence,) = write(lm, ways[name], [prompt(12)], sampling, budget)
        assert sequence.answer == wanted, (tier, name)
        lm.close()


def test_what_cannot_compute_in_integers_is_refused(packed: Callable[[str], Path], tmp_path: Path) -> None:
    whole = packed("llama").with_name("whole")
    pack(plan(open_folder(whole), "nf4"), tmp_path / "nf4")
    for folder in (whole, tmp_path / "nf4"):
        with pytest.raises(UnsupportedModel, match="no linears in int8") as refusal:
            offload.load(folder, compute="int8")
        assert "--quant int8" in str(refusal.value.hint)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_plan_counts_what_is_taken(family: str, packed: Callable[[str], Path]) -> None:
    folder = packed(family)
    listed, whole = open_folder(folder), open_folder(folder.with_name("whole"))
    stream = offload.stream_of(offload.load(folder, compute="int8", ctx=100))
    assert need_of(listed, 4, 100, compute="int8") == stream.placement.need
    assert (stream.placement.need.dense_B == 0) == stream.in_integers == (family == "llama")
    assert need_in(whole, "int8", 4, 100, compute="int8").dense_B == stream.placement.need.dense_B
    work, before = work_of(listed, "none", 4, compute="int8"), work_of(listed, "none", 4)
    assert work.whole_numbers > 0
    assert work.weights_B + 4 * work.whole_numbers == before.weights_B
    assert sum(work.unpacked_B.values()) + 4 * work.whole_numbers == before.unpacked_B["int8"]
    routers = 4 * 4 * 64 if family == "mixtral" else 0  # headers do not tell them from linears
    assert work_of(whole, "int8", 4, compute="int8").whole_numbers == work.whole_numbers + routers


def test_a_batch_is_not_continued_in_another_arithmetic() -> None:
    batch: Any = SimpleNamespace(chat=True, system=None, template=None, format="own", dedupe=False, think="auto")
    batch.on_too_long = "error"
    found = {
        compute: _configuration(batch, EngineOptions(load=LoadOptions(compute=compute)), SamplingParams(), "")
        for compute in ("float", "int8")
    }
    assert found["int8"] == found["float"] | {"--compute": "int8"}


def test_keys_and_values_of_another_arithmetic_are_not_taken() -> None:
    shared = {
        "folders": {"target": demo_folder("target")},
        "models": {"target": SimpleNamespace(model=SimpleNamespace(dtype=torch.float32))},
        "device": "cpu", "kv_quant": None, "adapters": {},
    }  # fmt: skip
    engines: list[Any] = [SimpleNamespace(compute=one, **shared) for one in ("float", "int8")]
    float_, int8 = (identities_of(one)["target"] for one in engines)
    assert float_.digest != int8.digest
