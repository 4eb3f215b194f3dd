"""Weights in other packages' formats become what the packages themselves make of them (scripts/record_formats.py)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.quantised_files import dense, folder

RECORDED = sorted((Path(__file__).parent / "recorded").glob("*.safetensors"))


@pytest.mark.parametrize("file", RECORDED, ids=lambda file: file.stem)
def test_a_weight_is_what_its_package_makes_of_it(file: Path, tmp_path: Path) -> None:
    with safe_open(file, "pt") as opened:
        config = json.loads(opened.metadata()["config"])
    tensors = load_file(file)
    expected = tensors.pop("expected")
    folder(tmp_path, config, tensors)
    (found,) = dense(tmp_path, expected.dtype).values()
    assert torch.equal(found, expected)
    if config["quant_method"] == "MLX":  # rounds twice
        return
    (wide,) = dense(tmp_path, torch.float32).values()
    assert torch.equal(wide.to(expected.dtype), expected)  # rounded once
