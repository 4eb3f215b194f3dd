"""Weights in the order of a CPU's 16-bit kernels, against the same model with plain ones."""

from pathlib import Path

import pytest
import torch
from torch import nn

import offload
from offload.model.layer import streamed_layers
from offload.model.reordered import Reordered, pays
from offload.packs.pack import pack, plan
from tests.tiny import tiny

pytestmark = pytest.mark.skipif(not pays(torch.device("cpu"), torch.bfloat16), reason="no bf16 kernels here")


@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral"])
@torch.no_grad()
def test_results_are_those_of_plain_weights(family: str, tmp_path: Path) -> None:
    tiny(family, tmp_path / "model")
    plain, reordered = (
        offload.load(tmp_path / "model", "none", dtype=torch.bfloat16, reorder=reorder) for reorder in (False, True)
    )
    ids = torch.randint(256, (1, 48))
    torch.testing.assert_close(reordered(ids).logits, plain(ids).logits, atol=0, rtol=0)
    linears = [
        one for layer in streamed_layers(reordered) for one in layer.inner.modules() if isinstance(one, nn.Linear)
    ]
    assert linears
    assert all(type(one) is Reordered for one in linears)


def test_what_is_not_all_there_in_16_bits_stays_plain(tmp_path: Path) -> None:
    folder, few = tmp_path / "model", tmp_path / "few"
    tiny("llama", folder)
    pack(plan(offload.open_folder(folder), "nf4"), few)
    models = [
        offload.load(folder, "disk", dtype=torch.bfloat16, reorder=True),
        offload.load(folder, "none", dtype=torch.float32, reorder=True),
        offload.load(few, "none", dtype=torch.bfloat16, reorder=True),
    ]
    for model in models:
        assert not any(isinstance(one, Reordered) for layer in streamed_layers(model) for one in layer.inner.modules())
        assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
