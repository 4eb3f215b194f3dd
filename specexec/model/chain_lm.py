"""Plain decoding for models that cannot verify trees: one token a sweep, through transformers' own cache.

Takes the place of a TreeLM whose drafter is `none`. ALiBi models stream this way, and those whose recurrent layers
are not among recurrent/.
"""

from __future__ import annotations

import inspect
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from specexec.errors import SweepCancelled
from specexec.model.architecture import longest_text
from specexec.model.cache import KVCache
from specexec.model.tree_lm import Rows, Sweep, head_alone, trunk_name


@dataclass(frozen=True)
class _State:
    """What transformers keeps of the first `length` tokens of a text."""

    kept: Cache | None
    length: int


class ChainLM:
    """Sweeps over chains only; the sequence's KVCache keeps the tokens, transformers keeps everything else."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        # The head is where the computation is; token ids may be looked up elsewhere.
        self.device = next(model.get_output_embeddings().parameters()).device
        self.vocabulary: int = int(model.config.vocab_size)
        self.context: int = longest_text(model.config)
        self._trunk: nn.Module = model.get_submodule(trunk_name(model))
        self._head = head_alone(model)
        self._states: WeakKeyDictionary[KVCache, _State] = WeakKeyDictionary()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sweep")
        taken = inspect.signature(self._trunk.forward).parameters
        # Some count positions from zero again where there is a state and nothing said (Bamba).
        self._counts = "position_ids" in taken
        # Models without attention have another name for what they keep of a text (Mamba); some keep nothing (GPT).
        self._kept_as = next((name for name in ("past_key_values", "cache_params") if name in taken), "")

    def begin(self, parts: list[Rows]) -> Sweep:
        """Start a sweep over the new rows of each sequence."""
        cancelled = threading.Event()
        return Sweep(self._worker.submit(self.forward, parts, cancelled), cancelled)

    def forward(self, parts: list[Rows], cancelled: threading.Event | None = None) -> list[Tensor]:
        """Hidden states [R, H] of each part's rows, one sequence after the other."""
        return [self._continue(part, cancelled or threading.Event()) for part in parts]

    @torch.no_grad()
    def _continue(self, part: Rows, cancelled: threading.Event) -> Tensor:
        assert list(part.parents) == list(range(-1, len(part.tokens) - 1)), "only chains: the drafter must be `none`"
        if cancelled.is_set():
            raise SweepCancelled
        # The state is taken away for the time of the sweep: if that fails, the next one starts from the text.
        state = self._states.pop(part.cache, None)
        done = len(part.cache)
        if state is None or state.length != done or self._crosses_rope_switch(done, len(part.tokens)):
            state, done = _State(None, 0), 0  # the model makes a cache of its own kind
        tokens = [*part.cache.tokens[done:], *part.tokens]
        input_ids = torch.tensor([tokens], device=self.device)
        at = {"position_ids": torch.arange(done, done + len(tokens), device=self.device)[None]} if self._counts else {}
        kept = {self._kept_as: state.kept, "use_cache": True} if self._kept_as else {}
        output = self._trunk(input_ids=input_ids, **kept, **at)
        if self._kept_as:
            self._states[part.cache] = _State(getattr(output, self._kept_as), done + len(tokens))
        part.cache.node_tokens.extend(part.tokens)
        part.cache.parents.extend(part.parents)
        hidden_RH: Tensor = output.last_hidden_state[0, -len(part.tokens) :]
        return hidden_RH

    def _crosses_rope_switch(self, done: int, new: int) -> bool:
        """longrope changes its frequencies once; keys from before must be made again, as transformers does."""
        rope = getattr(self.model.config, "rope_parameters", None) or {}
        switch = rope.get("original_max_position_embeddings") if rope.get("rope_type") == "longrope" else None
        return switch is not None and done <= switch < done + new

    @torch.no_grad()
    def head(self, hidden_RH: Tensor) -> Tensor:
        """Logits [R, V] in float32, by the model's own head code."""
        logits_RV: Tensor = self._head(inputs_embeds=hidden_RH.unsqueeze(0)).logits[0].float()
        return logits_RV

    def close(self) -> None:
        """Let the worker thread go."""
        self._worker.shutdown(wait=False, cancel_futures=True)
