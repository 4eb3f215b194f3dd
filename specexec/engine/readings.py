"""Texts as the target reads them: hidden states inside it, and what it finds likeliest behind every token.

R rows of one text   H hidden size   V vocabulary   N likeliest tokens
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from specexec.engine.together import in_sweeps
from specexec.model.cache import KVCache
from specexec.model.tree_lm import Rows, TreeLM, trunk_name
from specexec.sampling.verify import check_finite
from specexec.sizes import HEAD_ROWS


@dataclass(frozen=True)
class TextReading:
    """One text as it was read, a row for each of its tokens; in RAM.

    `states`: what flows into the layers that were asked for, [R, H] by layer in the model's dtype; as many layers as
    the model has is what the last one made, before the last norm.
    `top_ids_RN` (int64) and `top_log_probs_RN` (float32): the likeliest tokens after each one and the natural logarithm
    of their probabilities at temperature 1, the likeliest first.
    """

    states: Mapping[int, Tensor]
    top_ids_RN: Tensor
    top_log_probs_RN: Tensor


class TextReader:
    """Reads texts with one target; as long as it exists, sweeps record the states at `layers`.

    Raises UnsupportedArchitecture where there is no such layer.
    """

    def __init__(self, target: TreeLM, layers: Items[int], top: int) -> None:
        self._target, self._layers, self._top = target, layers, min(top, target.vocabulary)
        target.taps.want(self, layers)

    def read(self, texts: Items[list[int]], fits: Callable[[list[int]], bool]) -> Iterator[TextReading]:
        """Each text, as sweeps end. `fits` says whether texts of so many tokens each go into one sweep."""
        for together in in_sweeps(texts, fits):
            parts = [Rows.text(KVCache(), text) for text in together]
            for part, hidden_RH in zip(parts, self._target.forward(parts), strict=True):
                states = {layer: part.cache.tapped[layer].cpu() for layer in self._layers}
                yield TextReading(states, *self._likeliest(hidden_RH))

    @torch.no_grad()
    def _likeliest(self, hidden_RH: Tensor) -> tuple[Tensor, Tensor]:
        ids, log_probs = list[Tensor](), list[Tensor]()
        for rows_RH in hidden_RH.split(HEAD_ROWS):
            best = self._target.head(rows_RH).log_softmax(-1).topk(self._top, -1)
            check_finite(best.values)
            ids.append(best.indices.cpu())
            log_probs.append(best.values.cpu())
        return torch.cat(ids), torch.cat(log_probs)


def shared_tensors(target: TreeLM) -> dict[str, Tensor]:
    """What a head shares with its target or begins as, in RAM, under published names.

    `embed_tokens.weight` [V, H], the last norm's `norm.weight` [H], and `lm_head.weight` [V, H] where that is dense and
    not the embeddings.
    """
    embeddings, head = target.model.get_input_embeddings(), target.model.get_output_embeddings()
    norm = dict(target.model.get_submodule(trunk_name(target.model)).named_children()).get("norm")
    parts: dict[str, nn.Module | None] = {"embed_tokens": embeddings, "norm": norm}
    if isinstance(head, nn.Linear) and head.weight.is_floating_point() and head.weight is not embeddings.weight:
        parts["lm_head"] = head
    weights = {f"{name}.weight": getattr(part, "weight", None) for name, part in parts.items()}
    return {name: one.detach().cpu() for name, one in weights.items() if isinstance(one, Tensor)}
