"""Promises of float32 on a CPU: a row has the same bits alone and among hundreds."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import offload
from offload.model.quantized_head import quantise_head
from specexec.model.attention import Style, attend_block
from specexec.model.cache import KVCache
from specexec.model.linears import any_rows
from specexec.model.tree_lm import Rows, TreeLM
from specexec.sizes import KEY_BLOCK
from tests.tiny import tiny

CPU = torch.device("cpu")
# Inputs and outputs of SmolLM2, Qwen3, Llama 3 and of a head.
SHAPES = [(576, 192), (1536, 576), (896, 4864), (2048, 512), (8192, 1024), (640, 8192)]
COUNTS = (16, 32, 48, 64, 96, 128, 240)


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"], autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def cancelling(inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    """Rows and weights whose exact products are all zero: what a kernel finds is its rounding, in its own order."""
    random = torch.Generator().manual_seed(inputs)
    order = torch.randperm(inputs, generator=random)
    rows, weights = (torch.randn(count, inputs // 2, generator=random) for count in (256, outputs))
    return torch.cat([rows, -rows], 1)[:, order], torch.cat([weights, weights], 1)[:, order]


def test_a_row_has_the_same_bits_among_any_number_of_rows() -> None:
    for inputs, outputs in SHAPES:
        rows_RI, weight_OI = cancelling(inputs, outputs)
        with any_rows.linears(CPU, torch.float32):
            all_RO = nn.functional.linear(rows_RI, weight_OI)
            assert all_RO.count_nonzero() > all_RO.numel() // 2, "else nothing was rounded"
            for count in COUNTS:
                at = slice(256 - count, None)
                assert torch.equal(nn.functional.linear(rows_RI[at], weight_OI), all_RO[at]), (inputs, outputs, count)


def test_fewer_rows_need_no_filling() -> None:
    rows_RI, weight_OI = cancelling(1536, 576)
    bias_O = torch.randn(576)
    for weight in (weight_OI, weight_OI.t().contiguous().t()):
        all_RO = any_rows.linear(rows_RI, weight, bias_O)
        for rows in (slice(0, 0), slice(0, 1), slice(7, 20), slice(200, 201), slice(100, 231)):
            assert torch.equal(any_rows.linear(rows_RI[rows], weight, bias_O), all_RO[rows]), rows
        assert torch.equal(any_rows.linear(rows_RI.view(2, 4, 32, -1), weight, bias_O).view(256, -1), all_RO)


@pytest.mark.parametrize(("heads", "key_heads", "keys"), [(9, 3, 200), (8, 8, 391), (32, 8, 900), (4, 4, 1500)])
@pytest.mark.parametrize("sinks", [False, True], ids=["no sinks", "sinks"])
def test_attention_of_a_row_has_the_same_bits_whatever_it_does_not_see(
    heads: int, key_heads: int, keys: int, sinks: bool
) -> None:
    random = torch.Generator().manual_seed(keys)
    query, key, value = (torch.randn(n, rows, 64, generator=random) for n, rows in
                         ((heads, 80), (key_heads, keys + 200), (key_heads, keys + 200)))  # fmt: skip
    style = Style(0.125, sinks_H=torch.randn(heads, generator=random) if sinks else None)

    def found(rows: int, first: int, beyond: int) -> Tensor:
        """Every row sees the keys 37 … `keys` - 1; others from `first` on, and `beyond` more, are there."""

        def hidden(start: int, stop: int) -> Tensor:
            at_K = torch.arange(start, stop)
            return ((at_K < 37) | (at_K >= keys)).expand(rows, -1)

        return attend_block(query[:, :rows], key, value, range(first, keys + beyond), hidden, style)

    all_HQD = found(80, 0, 0)
    cuts = ((1, 0, 0), (1, 37, 64), (2, 0, 1), (5, 20, 3), (16, 37, 64), (64, 0, 200), (80, 30, 90))
    for rows, first, beyond in cuts:
        assert torch.equal(found(rows, first, beyond), all_HQD[:, :rows]), (rows, first, beyond)


@pytest.mark.parametrize("keys", [2, 5, 11, KEY_BLOCK + 1, KEY_BLOCK + 7])
def test_attention_to_a_few_keys_has_the_same_bits_beside_more_of_them(keys: int) -> None:
    random = torch.Generator().manual_seed(keys)
    query, key, value = (
        torch.randn(n, rows, 64, generator=random) for n, rows in ((8, 80), (2, keys + 100), (2, keys + 100))
    )

    def found(rows: int, beyond: int) -> Tensor:
        """Every row sees the first `keys` keys; `beyond` more are there."""

        def hidden(start: int, stop: int) -> Tensor | None:
            return (torch.arange(start, stop) >= keys).expand(rows, -1) if stop > keys else None

        return attend_block(query[:, :rows], key, value, range(keys + beyond), hidden, Style(0.125))

    alone = found(1, 0)
    for rows, beyond in ((1, 7), (3, 24), (20, 0), (80, 100)):
        assert torch.equal(found(rows, beyond)[:, :1], alone), (rows, beyond)


def test_a_product_is_the_true_one() -> None:
    torch.manual_seed(0)
    rows_RI, weight_OI, bias_O = (torch.randn(*size) for size in ((40, 700), (96, 700), (96,)))
    true_RO = nn.functional.linear(rows_RI.double(), weight_OI.double(), bias_O.double())
    found_RO = any_rows.linear(rows_RI, weight_OI, bias_O)
    assert ((found_RO.double() - true_RO).abs() <= 1e-5 * true_RO.abs() + 1e-4).all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with enough inputs to each linear for kernels to differ."""
    made = tmp_path_factory.mktemp("wide")
    tiny("llama", made, hidden_size=768, intermediate_size=1536, num_hidden_layers=2)
    return made


def outputs(lm: TreeLM, count: int) -> tuple[Tensor, Tensor]:
    """Hidden states and logits of the first nodes below a text, one branch each."""
    cache = KVCache()
    lm.forward([Rows.text(cache, range(1, 40))])
    cache.commit(range(39))
    (hidden_RH,) = lm.forward([Rows(cache, [5 + node % 200 for node in range(count)], [-1] * count)])
    return hidden_RH, lm.head(hidden_RH)


@pytest.mark.parametrize("kind", ["llama", "head in four bits"])
def test_a_guess_has_the_same_bits_alone_and_in_a_large_tree(kind: str, folder: Path) -> None:
    model = offload.load(folder, "none", dtype=torch.float32)
    if kind == "head in four bits":
        pytest.importorskip("bitsandbytes")
        quantise_head(model, CPU)
    lm = TreeLM(model)
    many = outputs(lm, 150)
    for count in (1, 5, 16, 40, 70):
        for some, all_R in zip(outputs(lm, count), many, strict=True):
            assert torch.equal(some, all_R[:count]), count
    lm.close()


@torch.no_grad()
def test_linears_of_gpt2_compute_so_too() -> None:
    rows_RI, weight_OI = cancelling(1536, 576)
    linear = Conv1D(576, 1536)
    linear.weight, linear.bias = nn.Parameter(weight_OI.t().contiguous()), nn.Parameter(torch.randn(576))
    linear.__class__ = any_rows.CLASSES[Conv1D]
    all_RO = linear(rows_RI)
    torch.testing.assert_close(all_RO, nn.functional.linear(rows_RI, weight_OI, linear.bias), rtol=0.01, atol=1e-3)
    assert torch.equal(linear(rows_RI[:5]), all_RO[:5])


@pytest.mark.parametrize("bias_O", [torch.arange(32.0)[::2], torch.ones(1).expand(16)], ids=["every other", "one"])
def test_a_bias_may_have_any_strides(bias_O: Tensor) -> None:
    rows_RI, weight_OI = torch.randn(5, 8), torch.randn(16, 8)
    torch.testing.assert_close(
        any_rows.linear(rows_RI, weight_OI, bias_O), nn.functional.linear(rows_RI, weight_OI, bias_O)
    )


def test_few_numbers_of_rows_are_ever_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, inner = set[int](), any_rows._inner

    def counted(rows: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        compiled.add(rows.shape[:-1].numel())
        return inner(rows, weight_OI, bias_O)

    monkeypatch.setattr(any_rows, "_inner", counted)
    rows_RI, weight_OI = torch.randn(600, 32), torch.randn(16, 32)
    for count in range(600):
        found_RO = any_rows.linear(rows_RI[:count], weight_OI)
        torch.testing.assert_close(found_RO, rows_RI[:count] @ weight_OI.t())
    assert compiled == {*range(any_rows.LEAST, any_rows.FEW + 1), *any_rows.MANY}
