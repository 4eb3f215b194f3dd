"""Promises of 16-bit arithmetic in float32: rounded once, for any batch of rows, and quick CPUs are left alone."""

import copy
import platform
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations import moe

import offload
from specexec.model.cache import KVCache
from specexec.model.linears import float32_linears as widened
from specexec.model.linears.any_rows import linears
from specexec.model.linears.float32_linears import Share, Widened, in_turn
from specexec.model.linears.row_tiles import RowTiles
from specexec.model.tree_lm import Rows, TreeLM
from tests.tiny import tiny

NARROW = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def blocks_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widened, "STEP", 24)
    monkeypatch.setattr(widened, "BLOCK", 0)


@pytest.fixture(params=[(1, in_turn), (2, in_turn), (2, offload.share)], ids=["one", "two", "pool"])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Share]:
    """One thread, torch's own two, and a pool of two; every product in blocks."""
    monkeypatch.setattr(widened, "SMALL", 0)
    before, (threads, share) = torch.get_num_threads(), request.param
    torch.set_num_threads(threads)
    yield share
    torch.set_num_threads(before)


def operands(rows: int, dtype: torch.dtype, outputs: int = 200, inputs: int = 136) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(rows)
    return tuple(torch.randn(*size).to(dtype) for size in ((rows, inputs), (outputs, inputs), (outputs,)))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("rows", [1, 16, 100])
def test_a_product_is_the_true_one_rounded_once(rows: int, dtype: torch.dtype, how: Share) -> None:
    rows_RI, weight_OI, bias_O = operands(rows, dtype)
    true_RO = nn.functional.linear(rows_RI.double(), weight_OI.double(), bias_O.double())
    step = torch.finfo(dtype).eps  # rounding moves a number by at most half of it
    with Widened(how):
        found_RO = nn.functional.linear(rows_RI, weight_OI, bias_O)
    assert found_RO.dtype == dtype
    assert found_RO.is_contiguous()
    assert ((found_RO.double() - true_RO).abs() <= 0.5 * step * true_RO.abs() + 1e-5).all()


def test_rows_and_weights_may_have_any_shape_and_strides() -> None:
    rows_RI, weight_OI, bias_O = operands(24, torch.bfloat16)
    with Widened():
        plain_RO = nn.functional.linear(rows_RI, weight_OI, bias_O)
        turned = nn.functional.linear(rows_RI, weight_OI.t().contiguous().t(), bias=bias_O)
        stacked = nn.functional.linear(rows_RI.view(2, 3, 4, -1), weight_OI, bias_O)
        strided = nn.functional.linear(rows_RI.repeat_interleave(2, dim=1)[:, ::2], weight_OI, bias_O)
        none = nn.functional.linear(rows_RI[:0], weight_OI, bias_O)
    assert torch.equal(turned, plain_RO)
    assert torch.equal(stacked, plain_RO.view(2, 3, 4, -1))
    assert torch.equal(strided, plain_RO)
    assert none.shape == (0, 200)


@pytest.mark.parametrize("dtype", NARROW)
def test_a_row_does_not_depend_on_other_rows(dtype: torch.dtype, how: Share) -> None:
    rows_RI, weight_OI, bias_O = operands(256, dtype, 512, 640)
    with Widened(how), RowTiles():
        all_RO = nn.functional.linear(rows_RI, weight_OI, bias_O)
        for rows in (slice(0, 1), slice(3, 20), slice(100, 164), slice(7, 250)):
            assert torch.equal(nn.functional.linear(rows_RI[rows], weight_OI, bias_O), all_RO[rows]), rows


@pytest.mark.parametrize("kernel", [True, False], ids=["torch's", "transformers'"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_get_their_rows_and_the_others_are_not_touched(
    dtype: torch.dtype, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not every torch has a kernel of its own, or one for weights at any address.
    monkeypatch.setattr(moe, "_can_use_grouped_mm", lambda *_: kernel)
    torch.manual_seed(0)
    rows_RI, weight_EOI = torch.randn(20, 640).to(dtype), torch.randn(5, 512, 640).to(dtype)
    ends_E = torch.tensor([7, 7, 8, 20, 20], dtype=torch.int32)
    true_RO = moe._grouped_mm(rows_RI, weight_EOI.transpose(-2, -1), offs=ends_E)
    weight_EOI[[1, 4]] = float("nan")
    with Widened(), RowTiles():
        found_RO = moe._grouped_mm(rows_RI, weight_EOI.transpose(-2, -1), offs=ends_E)
        few_RO = moe._grouped_mm(rows_RI[:8], weight_EOI.transpose(-2, -1), offs=ends_E.clamp(max=8))
    torch.testing.assert_close(found_RO, true_RO, rtol=1e-2, atol=1e-1)
    assert torch.equal(few_RO, found_RO[:8])
    with RowTiles():
        weight_EIO, one_E = weight_EOI.transpose(-2, -1), ends_E.clamp(max=1)
        together_RO = moe._grouped_mm(rows_RI, weight_EIO, offs=ends_E)
        for row in range(7):
            assert torch.equal(moe._grouped_mm(rows_RI[row : row + 1], weight_EIO, offs=one_E)[0], together_RO[row])


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt", "mixtral", "gpt_oss"])
def test_a_tree_of_a_16_bit_model_is_the_true_one_and_the_same_alone(
    family: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(widened, "pays", lambda device, dtype: dtype == torch.bfloat16)
    called: list[torch.dtype] = []
    real = widened.linear

    def watched(rows: Tensor, weight_OI: Tensor, bias: Tensor | None = None, **how: Share) -> Tensor:
        called.append(weight_OI.dtype)
        return real(rows, weight_OI, bias, **how)

    monkeypatch.setattr(widened, "linear", watched)
    model = tiny(family, tmp_path_factory.mktemp(family))
    exact = logits(TreeLM(copy.deepcopy(model)), 24)
    assert not called
    narrow = TreeLM(nn.Module.to(copy.deepcopy(model), torch.bfloat16))
    many, one = logits(narrow, 24), logits(narrow, 1)
    assert set(called) == {torch.bfloat16}
    assert (many - exact).abs().median() < 0.02  # a router's near-tie may send a row elsewhere
    assert torch.equal(many[:1], one)


def logits(lm: TreeLM, count: int) -> Tensor:
    """Of the first nodes that follow nothing, one branch each."""
    cache = KVCache()
    (hidden_RH,) = lm.forward([Rows(cache, list(range(5, 5 + count)), [-1] * count)])
    return lm.head(hidden_RH)


def test_it_is_for_cpus_without_the_instructions_only(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False})
    assert isinstance(linears(cpu, torch.bfloat16), Widened)
    assert isinstance(linears(cpu, torch.float16), Widened)
    assert not isinstance(linears(cpu, torch.float32), Widened)
    assert not isinstance(linears(torch.device("meta"), torch.bfloat16), Widened)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert not isinstance(linears(cpu, torch.bfloat16), Widened)
    assert isinstance(linears(cpu, torch.float16), Widened)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert not isinstance(linears(cpu, torch.float16), Widened)


def test_an_older_torch_that_does_not_know_its_cpu_computes_in_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    monkeypatch.delattr(torch, "_grouped_mm")
    assert not isinstance(linears(torch.device("cpu"), torch.bfloat16), Widened)
    rows_RI, weight_OI, bias_O = operands(3, torch.float32)
    with RowTiles():
        found_RO = nn.functional.linear(rows_RI, weight_OI, bias_O).relu()
    torch.testing.assert_close(found_RO, nn.functional.linear(rows_RI, weight_OI, bias_O).relu())
