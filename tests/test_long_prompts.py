"""Prompts of up to 65,536 tokens: transformers' own text, one stream of the weights, memory within the plan.

Layers with a window, so that it takes seconds; scripts/measure_long_prompts.py does the same with layers that see all.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import offload
import specexec
from offload.hub.names import HERE
from offload.placement.placement import KVHome
from specexec import SamplingParams
from tests.tiny import tiny

WRITTEN = 6
GREEDY = SamplingParams(temperature=0.0, max_tokens=WRITTEN, ignore_eos=True)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    tiny(
        "mistral", folder, vocab_size=4096, max_position_embeddings=1 << 17, num_hidden_layers=2, hidden_size=16,
        intermediate_size=32, num_attention_heads=1, num_key_value_heads=1, head_dim=8, sliding_window=256,
    )  # fmt: skip
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(HERE / "demo" / "target" / file, folder)
    return folder


def memory_B(name: str) -> int:
    """What the system says of this process, such as VmRSS."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


@pytest.mark.parametrize(("length", "kv"), [(65536, "ram"), (16384, "disk")])
def test_a_long_prompt_is_read_once_within_the_plan(
    length: int, kv: KVHome, wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECEXEC_HOME", str(tmp_path))
    generator = torch.Generator().manual_seed(length)
    prompt = torch.randint(4, 4000, (length - WRITTEN - 1,), generator=generator).tolist()
    with specexec.load(str(wide), drafter="none", offload="disk", dtype="f32", ctx=length, kv=kv) as llm:
        llm.generate(prompt[:300], GREEDY)  # what only the first sweep takes
        before_B = memory_B("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        ours = llm.generate(prompt, GREEDY)
        taken_B, stream = memory_B("VmHWM") - before_B, offload.stream_of(llm._model)
        assert ours.bytes_read / stream.bytes_per_sweep < WRITTEN + 1, "one stream for the prompt, one for each token"
        assert taken_B < stream.placement.host_B
        on_disk_B = stream.placement.cache_disk_B
        assert (on_disk_B > 0) == (kv == "disk")
    truth = AutoModelForCausalLM.from_pretrained(wide, dtype=torch.float32)
    generate: Callable[..., torch.Tensor] = getattr(truth, "generate")  # noqa: B009  # its annotations are not strict
    ends = {"do_sample": False, "max_new_tokens": WRITTEN, "eos_token_id": None, "prefill_chunk_size": 1024}
    assert list(ours.tokens) == generate(torch.tensor([prompt]), **ends)[0, len(prompt) :].tolist()
