"""What the recurrence costs of one linear attention layer of Qwen3.6-27B's shape, with a tree of guesses below a text.

    python scripts/measure_recurrent.py [NODES ...]

One layer with random weights, in bf16: the time of the whole layer over the rows of a sweep, and that of convolution
and gated delta rule in it; and the bytes that it keeps of the text and of each node. The best of three runs.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3_5TextConfig

from specexec.model.cache import KVCache
from specexec.model.recurrent.packed import PackedStates
from specexec.model.tree_lm import Rows, TreeLM

TEXT = 64
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
    "layer_types": ["linear_attention"],
    "num_hidden_layers": 1,
    "vocab_size": 256,
}


class Watch:
    """Seconds spent in the recurrences of a sweep."""

    def __init__(self) -> None:
        self.seconds = 0.0
        for name in ("convolve", "scan"):
            setattr(PackedStates, name, self._timed(getattr(PackedStates, name)))

    def _timed(self, own):  # type: ignore[no-untyped-def]
        def timed(*args, **kwargs):  # type: ignore[no-untyped-def]
            began = time.perf_counter()
            try:
                return own(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began

        return timed


def main() -> None:
    sizes = [int(size) for size in sys.argv[1:]] or [64, 256, 1024]
    model = AutoModelForCausalLM.from_config(Qwen3_5TextConfig(**SHAPE), dtype=torch.bfloat16).eval()
    lm, watch, random = TreeLM(model), Watch(), np.random.default_rng(0)
    layer = model.get_submodule("model.layers.0")
    spent = [0.0, 0.0]
    layer.register_forward_pre_hook(lambda *_: spent.__setitem__(0, time.perf_counter()))
    layer.register_forward_hook(lambda *_: spent.__setitem__(1, spent[1] + time.perf_counter() - spent[0]))
    cache = KVCache()
    lm.forward([Rows.text(cache, random.integers(0, 256, TEXT).tolist())])
    cache.commit(range(TEXT))
    text_B = sum(memory.text.nbytes for memory in cache.memories.values())
    print(f"{text_B:,} bytes of the text")
    print("nodes  layer s  recurrence s  share  bytes a node")
    for nodes in sizes:
        # Depths of a grown tree: a node hangs below one of the last 30.
        parents = [0, *(max(0, node - 1 - int(random.integers(0, 30))) for node in range(1, nodes + 1))]
        rows = Rows(cache, random.integers(0, 256, nodes + 1).tolist(), [-1, *parents[1:]], 1)
        best = (float("inf"), 0.0)
        for _ in range(3):
            spent[1] = watch.seconds = 0.0
            lm.forward([rows])
            cache.forget_nodes()
            best = min(best, (spent[1], watch.seconds))
        node_B = sum(memory.nodes.size_B for memory in cache.memories.values()) // nodes
        print(f"{nodes:5}  {best[0]:7.3f}  {best[1]:12.3f}  {best[1] / best[0]:5.1%}  {node_B:12,}")


if __name__ == "__main__":
    main()
