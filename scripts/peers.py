"""Others who run a model from its disk, each behind one call that takes one sweep and says how long it took.

The page cache of whatever they read is dropped before every sweep. Both take dense checkpoints. AirLLM runs in a
process of its own, because it wants an environment of its own, and keeps a second copy of the weights while it lives:

    python -m venv /tmp/airllm && /tmp/airllm/bin/pip install airllm
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Protocol

import torch
from timing import drop_cache, timed
from transformers import AutoModelForCausalLM, PreTrainedModel

import offload

# Reads a number of tokens, answers with the seconds of one sweep over them.
AIRLLM = """
import os, sys, time
answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # what it prints is for people
import torch
from pathlib import Path
from airllm import AutoModel
folder, scrap, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
model = AutoModel.from_pretrained(folder, device="cpu", layer_shards_saving_path=scrap)
for line in sys.stdin:
    for file in Path(scrap).rglob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    tokens = (torch.arange(int(line)) % 100)[None]
    started_s = time.perf_counter()
    with torch.no_grad():
        model(tokens, use_cache=False)
    print(time.perf_counter() - started_s, file=answers)
"""


class Peer(Protocol):
    """A program to compare with."""

    name: str

    def sweep_s(self, tokens: torch.Tensor) -> float:
        """Seconds of one sweep with a cold page cache."""

    def close(self) -> None:
        """Let go of processes and files."""


class Accelerate:
    """transformers with a device_map that keeps the same parts in memory and every layer on disk."""

    name = "accelerate, to disk"

    def __init__(self, folder: Path, model: PreTrainedModel, scrap: Path) -> None:
        layers = next(name for name, module in model.named_modules() if name.endswith("layers"))
        base = layers.rpartition(".")[0]
        places = {name: "cpu" for name, _ in model.named_children() if name != base}
        inside = model.get_submodule(base)
        places |= {f"{base}.{name}": "cpu" for name, _ in inside.named_children() if name != "layers"}
        places |= {f"{layers}.{index}": "disk" for index in range(offload.stream_of(model).layers)}
        self._folders = (folder, scrap)
        self._model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=model.dtype, device_map=places, offload_folder=scrap, local_files_only=True
        )

    def sweep_s(self, tokens: torch.Tensor) -> float:
        drop_cache(file for folder in self._folders for file in folder.iterdir() if file.is_file())
        return timed(lambda: self._model(tokens, use_cache=False))

    def close(self) -> None:
        """Nothing runs."""


class AirLLM:
    """AirLLM in a Python where it is installed."""

    name = "AirLLM, to disk"

    def __init__(self, python: Path, folder: Path, scrap: Path) -> None:
        command = [str(python), "-c", AIRLLM, str(folder), str(scrap), str(torch.get_num_threads())]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    def sweep_s(self, tokens: torch.Tensor) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{tokens.shape[1]}\n")
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"AirLLM ended with {self._process.wait()}; what it said is above")
        return float(answer)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
