"""An inflated checkpoint computes what the small one computes, and looks on disk like a real one."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from offload.checkpoint.headers import open_folder
from offload.packs.pack import pack, plan

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "offload" / "demo" / "target"
PROMPT = "<|user|>How does specexec work?<|end|><|assistant|>A small drafter guesses"
# The demo has hidden 192, 5 layers, 6 heads of 32 on 3 kv heads, ff 512: each row grows something else.
SHAPES = {
    "nothing grows": (192, 5, 6, 3, 32, 512),
    "wider and deeper": (384, 7, 6, 3, 32, 640),
    "wider heads": (192, 5, 6, 3, 64, 512),
    "more heads per kv head": (192, 5, 12, 3, 32, 512),
    "a small 1b": (256, 6, 32, 8, 64, 1024),
    "heads as wide as a 70b's": (320, 5, 16, 4, 128, 768),
}
Inflate = Callable[..., Result]


@pytest.fixture
def inflate(monkeypatch: pytest.MonkeyPatch) -> Inflate:
    """The command, run in this process: importing torch again for every shape would take most of the time."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    command: click.Command = importlib.import_module("inflate").main
    return lambda *arguments: CliRunner().invoke(command, [str(each) for each in arguments])


def numbers(hidden: int, layers: int, heads: int, kv_heads: int, head_dim: int, ff: int) -> list[str]:
    """The options that ask for these sizes."""
    named = {"hidden": hidden, "layers": layers, "heads": heads, "kv-heads": kv_heads, "head-dim": head_dim, "ff": ff}
    return [part for name, value in named.items() for part in (f"--{name}", str(value))]


def logits_of(folder: Path) -> torch.Tensor:
    """Float32 logits at every position of the prompt."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits_1TV: torch.Tensor = model(**tokenizer(PROMPT, return_tensors="pt")).logits
    return logits_1TV


@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES.keys())
def test_logits_are_the_small_models(inflate: Inflate, tmp_path: Path, sizes: tuple[int, ...]) -> None:
    result = inflate(tmp_path / "big", *numbers(*sizes), "--dtype", "f32")
    assert result.exit_code == 0, result.output
    torch.testing.assert_close(logits_of(tmp_path / "big"), logits_of(DEMO), atol=1e-4, rtol=0)


def test_shards_and_index_are_closed(inflate: Inflate, tmp_path: Path) -> None:
    sizes = numbers(*SHAPES["a small 1b"])
    result = inflate(tmp_path / "one", *sizes, "--dtype", "bf16")
    assert result.exit_code == 0, result.output
    result = inflate(tmp_path / "many", *sizes, "--dtype", "bf16", "--shard-size", "3MB")
    assert result.exit_code == 0, result.output
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert [path.name for path in files] == sorted(set(index["weight_map"].values()))
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    stored: dict[str, str] = {}
    total_B = 0
    with safe_open(tmp_path / "one" / "model.safetensors", "pt") as one:
        for path in files:
            with safe_open(path, "pt") as shard:
                for name in shard.keys():  # noqa: SIM118  # not a dict: it has no iterator
                    tensor = shard.get_tensor(name)
                    assert torch.equal(tensor, one.get_tensor(name))
                    stored[name] = path.name
                    total_B += tensor.nbytes
        assert set(stored) == set(one.keys())
    assert stored == index["weight_map"]
    assert total_B == index["metadata"]["total_size"]


def test_the_label_and_the_tokenizer_travel_along(inflate: Inflate, tmp_path: Path) -> None:
    assert inflate(tmp_path / "big", *numbers(*SHAPES["wider heads"])).exit_code == 0
    config = json.loads((tmp_path / "big" / "config.json").read_text())
    assert "hidden 192" in config["inflated_from"]
    assert (tmp_path / "big" / "tokenizer.json").read_bytes() == (DEMO / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ((128, 5, 6, 3, 32, 512), "hidden 128 is below 192"),
        ((192, 5, 6, 3, 48, 512), "head dim 48 is no multiple of 32"),
        ((192, 5, 6, 6, 32, 512), "heads per kv head 1 is below 2"),
        ((192, 5, 8, 3, 32, 512), "heads 8 is no multiple of kv heads 3"),
        ((256, 5, 6, 3, 32, 512), "hidden 256 is no multiple of heads 6"),
    ],
)
def test_a_shape_without_room_is_refused(inflate: Inflate, tmp_path: Path, sizes: tuple[int, ...], reason: str) -> None:
    result = inflate(tmp_path / "big", *numbers(*sizes))
    assert result.exit_code == 1
    assert reason in result.output


def test_too_little_disk_is_refused_before_anything_is_written(
    inflate: Inflate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 2**20}))
    result = inflate(tmp_path / "big", *numbers(*SHAPES["wider heads"]))
    assert result.exit_code == 1
    assert "has 0.0 GiB free" in result.output
    assert not list((tmp_path / "big").iterdir())


def test_half_a_shape_is_refused(inflate: Inflate, tmp_path: Path) -> None:
    result = inflate(tmp_path / "big", "--hidden", "256")
    assert result.exit_code == 2
    assert "ff, head-dim, heads" in result.output


def test_a_written_folder_is_not_overwritten(inflate: Inflate, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    result = inflate(tmp_path, *numbers(*SHAPES["wider heads"]))
    assert result.exit_code == 1
    assert "is not empty" in result.output


def test_a_pack_is_that_of_the_checkpoint_without_its_detour(inflate: Inflate, tmp_path: Path) -> None:
    sizes = numbers(*SHAPES["a small 1b"])
    assert inflate(tmp_path / "dense", *sizes).exit_code == 0
    result = inflate(tmp_path / "direct", *sizes, "--quant", "nf4")
    assert result.exit_code == 0, result.output
    pack(plan(open_folder(tmp_path / "dense"), "nf4"), tmp_path / "detour")
    shards = sorted(file.name for file in (tmp_path / "detour").glob("*.safetensors"))
    assert len(shards) == 7
    assert all(
        (tmp_path / "direct" / name).read_bytes() == (tmp_path / "detour" / name).read_bytes() for name in shards
    )
    assert "inflated_from" in (tmp_path / "direct" / "config.json").read_text()
