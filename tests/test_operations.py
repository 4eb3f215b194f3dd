"""How many of torch's operations one layer of a pass takes, counted beside transformers' own step with a cache."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import offload
from specexec.model.cache import KVCache
from specexec.model.linears import float32_linears
from specexec.model.quick_layers import quicken
from specexec.model.tree_lm import Rows, TreeLM
from tests.tiny import tiny

LAYERS = (2, 4)
TEXT = range(1, 41)
# Beyond transformers' own: a tile is cut to its rows and filled up again, keys and values are read as they lie in their
# cache, scores and sums are those of float32, and what a row does not see is masked. In float32 linears take fewer
# operations than torch's own. A drafter does none of this: it sums in its own dtype, in layers of our own.
MORE = {
    ("target", torch.float32, 1): 10,
    ("target", torch.float32, 5): 10,
    ("target", torch.bfloat16, 1): 35,
    ("target", torch.bfloat16, 5): 37,
    ("drafter", torch.bfloat16, 5): -5,
}


class Operations(TorchDispatchMode):
    """Counts what torch is asked for, views included."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # as torch has it
        self.count += 1
        return func(*args, **(kwargs or {}))


def counted(work: Callable[[], object]) -> int:
    """The operations of some work that was done before: what is made once is there."""
    work()
    with Operations() as found, torch.no_grad():
        work()
    return found.count


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same model with few layers and with more."""
    made = [tmp_path_factory.mktemp("operations") / str(layers) for layers in LAYERS]
    for folder, layers in zip(made, LAYERS, strict=True):
        tiny("llama", folder, num_hidden_layers=layers)
    return made


def ours(folder: Path, role: str, dtype: torch.dtype, rows: int) -> int:
    """A pass over so many rows, a fork among them, below a text."""
    model, drafts = offload.load(folder, "none", dtype=dtype), role == "drafter"
    if drafts:
        quicken(model)
    lm, cache = TreeLM(model, drafts=drafts), KVCache()
    lm.forward([Rows.text(cache, TEXT)])
    cache.commit(range(len(TEXT)))

    def sweep() -> None:
        lm.forward([Rows(cache, [7] * rows, [-1, *[0] * (rows - 1)])])
        cache.forget_nodes()

    return counted(sweep)


def theirs(folder: Path, dtype: torch.dtype) -> int:
    """One token below the same text."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().model
    with torch.no_grad():
        past = model(torch.tensor([[*TEXT]]), use_cache=True).past_key_values

    def step() -> None:
        with torch.no_grad():
            model(torch.tensor([[7]]), past_key_values=past, use_cache=True)
        past.crop(-1)

    return counted(step)


@pytest.mark.parametrize(("role", "dtype", "rows"), MORE)
def test_a_layer_takes_few_operations_more_than_transformers_own_step(
    role: str, dtype: torch.dtype, rows: int, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(float32_linears, "pays", lambda *_: False)  # else a CPU without 16-bit arithmetic widens
    few, many = ((ours(folder, role, dtype, rows), theirs(folder, dtype)) for folder in folders)
    mine, own = ((more - less) / (LAYERS[1] - LAYERS[0]) for less, more in zip(few, many, strict=True))
    assert own > 50, "else nothing was counted"
    assert mine - own <= MORE[role, dtype, rows]
