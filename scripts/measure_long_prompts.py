"""Prompts of thousands of tokens, exact: text beside transformers' `generate`, memory beside the plan, time and bytes.

A small random Llama of a wide context in float32, or SmolLM2's shape with `--smollm2`, streamed from disk, that reads
each prompt in one stream of its weights. Every length runs in a process of its own (scripts/measure_memory.py), then
once more beside transformers' greedy `generate` of the same tokens, and once more with keys and values on the disk. A
plain read is a sweep over one token. Prints a markdown table.

    python scripts/measure_long_prompts.py [--smollm2] [LENGTH ...]
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import AutoModelForCausalLM

import offload
import specexec
from offload.hub.names import HERE
from tests.tiny import tiny
from tests.writing import greedy

LENGTHS, WRITTEN, WIDEST = (4096, 16384, 65536), 8, 1 << 17
SMALL = {
    "num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8,
    "num_key_value_heads": 2,
}  # fmt: skip
SMOLLM2 = {
    "num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
    "num_key_value_heads": 3,
}  # fmt: skip


def main(lengths: list[int], shape: dict[str, Any]) -> None:
    """One row for each length."""
    print("| tokens | text | peak ÷ plan | seconds | ÷ a plain read | --kv disk | transformers | bytes read ÷ layers |")
    print("|---|---|---|---|---|---|---|---|")
    with TemporaryDirectory() as name:
        folder = Path(name)
        tiny("llama", folder, vocab_size=4096, max_position_embeddings=WIDEST, eos_token_id=3, **shape)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(HERE / "demo" / "target" / file, folder)
        for length in lengths:
            print(_row(folder, length), flush=True)


def _row(folder: Path, length: int) -> str:
    script = Path(__file__).with_name("measure_memory.py")
    options = ["--ctx", str(length), "--tokens", str(WRITTEN), "--json"]
    ran = subprocess.run([sys.executable, str(script), str(folder), *options], stdout=subprocess.PIPE, check=True)
    memory = json.loads(ran.stdout.splitlines()[-1])
    sampling = specexec.SamplingParams(temperature=0.0, max_tokens=WRITTEN, ignore_eos=True)
    with specexec.load(str(folder), drafter="none", offload="disk", dtype="f32", ctx=length) as llm:
        tokens = (llm.encode("All that has ever been written fits into memory.") * length)[: length - WRITTEN - 1]
        bursts = list(llm.stream(tokens[:100], sampling))
        read_s = median(burst.sweep_s for burst in bursts[1:])
        started_s = time.perf_counter()
        ours = llm.generate(tokens, sampling)
        seconds = time.perf_counter() - started_s
        stream = offload.stream_of(llm._model)
        sweeps = ours.bytes_read / stream.bytes_per_sweep
    with specexec.load(str(folder), drafter="none", offload="disk", dtype="f32", ctx=length, kv="disk") as llm:
        assert "disk" in offload.stream_of(llm._model).placement.caches
        started_s = time.perf_counter()
        assert llm.generate(tokens, sampling).tokens == ours.tokens
        on_disk_s = time.perf_counter() - started_s
    truth = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    started_s = time.perf_counter()
    theirs = greedy(truth, tokens, WRITTEN)
    theirs_s = time.perf_counter() - started_s
    text = "equal" if list(ours.tokens) == theirs else f"differs: {list(ours.tokens)} {theirs}"
    ratio = memory["peak_B"] / memory["plan_B"]
    times = f"{seconds:.1f} | {seconds / (WRITTEN * read_s):.1f} | {on_disk_s:.1f} | {theirs_s:.1f}"
    return f"| {length:,} | {text} | {ratio:.3f} | {times} | {sweeps:.2f} for {WRITTEN} tokens |"


if __name__ == "__main__":
    given = [one for one in sys.argv[1:] if one != "--smollm2"]
    main([int(one) for one in given] or list(LENGTHS), SMOLLM2 if "--smollm2" in sys.argv else SMALL)
