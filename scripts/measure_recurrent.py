"""What recurrences cost of a sweep of Qwen3.6-27B's shape, with a tree of guesses below a text.

    python scripts/measure_recurrent.py [NODES ...]

One layer of linear attention and one of full attention with random weights, in bf16: seconds of the processor in each
over the rows of a sweep, and in the convolution and the gated delta rule of the first. Of the model's layers three in
four are of the first kind; embeddings and head are left out. The best of five sweeps each. Then the bytes that a layer
keeps of the text and of each node.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3_5TextConfig

from offload.machine.heap import suit
from specexec.model.cache import KVCache
from specexec.model.recurrent.packed import PackedStates
from specexec.model.tree_lm import Rows, TreeLM

TEXT, RUNS = 64, 5
SHAPE: dict[str, Any] = {
    "hidden_size": 5120,
    "intermediate_size": 17408,
    "num_attention_heads": 24,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 48,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "layer_types": ["linear_attention", "full_attention"],
    "num_hidden_layers": 2,
    "vocab_size": 256,
}


class Watch:
    """Seconds of this process's processors, all threads together, spent in some calls."""

    def __init__(self) -> None:
        self.began, self.seconds = 0.0, 0.0

    def start(self, *_: object) -> None:
        self.began = time.process_time()

    def stop(self, *_: object) -> None:
        self.seconds += time.process_time() - self.began

    def over(self, layer: nn.Module) -> Watch:
        layer.register_forward_pre_hook(self.start)
        layer.register_forward_hook(self.stop)
        return self

    def around(self, own):  # type: ignore[no-untyped-def]
        def timed(*args, **kwargs):  # type: ignore[no-untyped-def]
            self.start()
            try:
                return own(*args, **kwargs)
            finally:
                self.stop()

        return timed


def main() -> None:
    sizes = [int(size) for size in sys.argv[1:]] or [64, 256, 1024]
    model = AutoModelForCausalLM.from_config(Qwen3_5TextConfig(**SHAPE), dtype=torch.bfloat16).eval()
    lm, random = TreeLM(model), np.random.default_rng(0)
    layers = [Watch().over(model.get_submodule(f"model.layers.{layer}")) for layer in range(2)]
    recurrence = Watch()
    for name in ("convolve", "scan"):
        setattr(PackedStates, name, recurrence.around(getattr(PackedStates, name)))
    cache = KVCache()
    lm.forward([Rows.text(cache, random.integers(0, 256, TEXT).tolist())])
    cache.commit(range(TEXT))
    text_B = sum(memory.text.nbytes for memory in cache.memories.values())
    print(f"{text_B:,} bytes of the text")
    print("nodes  linear s  full s  recurrences s  of their layer  of a sweep  bytes a node")
    for nodes in sizes:
        suit(nodes + 1)  # as streamed layers have it
        # Depths of a grown tree: a node hangs below one of the last 30.
        parents = [0, *(max(0, node - 1 - int(random.integers(0, 30))) for node in range(1, nodes + 1))]
        rows = Rows(cache, random.integers(0, 256, nodes + 1).tolist(), [-1, *parents[1:]], 1)
        best = [float("inf")] * 3
        for _ in range(RUNS):
            watches = (*layers, recurrence)
            for watch in watches:
                watch.seconds = 0.0
            lm.forward([rows])
            cache.forget_nodes()
            best = [min(least, watch.seconds) for least, watch in zip(best, watches, strict=True)]
        linear_s, full_s, own_s = best
        node_B = sum(memory.nodes.size_B for memory in cache.memories.values()) // nodes
        shares = f"{own_s / linear_s:14.1%}  {3 * own_s / (3 * linear_s + full_s):10.1%}"
        print(f"{nodes:5}  {linear_s:8.3f}  {full_s:6.3f}  {own_s:13.4f}  {shares}  {node_B:12,}")


if __name__ == "__main__":
    main()
