"""A layer unrolled over several steps of its own, as it drafts: what its rows attend to, and what they are asked.

In step s of a text the row of token t_{i+s} reads, in the place of the target's states, what the row before it gave in
step s - 1 (EAGLE-3's training-time test). It attends to the rows of step 0 up to its own place, and to its own earlier
steps. Tokens are those of the text. The loss of later steps counts DECAY as much each.

B texts   R rows: all tokens but the first   H hidden size   A heads that attend   W width of each
D tokens that the head names   V vocabulary   K rows with a label
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from specexec.distill.batches import TextBatch
from specexec.distill.divergence import Labels, Loss, divergence
from specexec.distill.layers import SharedWithTarget

DECAY = 0.8
STEPS = 3  # guesses in a row that a head learns to make


@dataclass(frozen=True)
class Asked:
    """Rows whose next token belongs to an answer, bool [B, R]; of the text's tokens which they read last, and which is
    said then, bool [B, R + 1] with as many true in the same order."""

    rows_BR: Tensor
    read: Tensor
    said: Tensor

    @classmethod
    def of(cls, answer_BR: Tensor, step: int) -> Asked:
        """Those of one step."""
        said = answer_BR.clone()
        said[:, : 2 + step] = False
        read = nn.functional.pad(said[:, 1:], (0, 1))
        return cls(nn.functional.pad(said[:, 2 + step :], (0, 1 + step)), read, said)

    @staticmethod
    def from_now(answer_BR: Tensor, step: int, steps: int) -> Tensor:
        """Rows that are asked in this step or a later one, bool [B, R]: no other needs more than keys and values."""
        return torch.stack([Asked.of(answer_BR, later).rows_BR for later in range(step, steps)]).any(0)

    def labels(self, batch: TextBatch, place_V: Tensor) -> Labels:
        """What the target found likeliest there."""
        return Labels.of(batch.top_ids_BRN[self.read], batch.top_log_probs_BRN[self.read], place_V)


class UnrolledStep(NamedTuple):
    """Logits [K, D] of the rows that have a label, the labels, and where they are."""

    logits_KD: Tensor
    labels: Labels
    asked: Asked


@dataclass
class UnrolledStudent(ABC):
    """A head in training, unrolled over so many steps; what asks for no gradient is not trained."""

    head: nn.Module
    rotary: nn.Module
    shared: SharedWithTarget
    steps: int
    loss_kind: Loss = "forward-kl"
    trained: dict[str, nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.trained = {name: one for name, one in self.head.named_parameters() if one.requires_grad}

    @abstractmethod
    def unrolled(self, batch: TextBatch) -> Iterator[UnrolledStep]:
        """Step by step what it guesses."""

    def asked(self, batch: TextBatch) -> Iterator[tuple[int, Asked]]:
        """The number of each step and its rows, for as long as there are any."""
        for number in range(self.steps):
            rows = Asked.of(batch.answer_BR, number)
            if not rows.rows_BR.any():
                return
            yield number, rows

    @property
    def guesses(self) -> int:
        """In a row, that it learned to make."""
        return self.steps

    @property
    def row_numbers(self) -> int:
        """Of each token: logits with their gradients, and some twenty vectors of the layer, in every step."""
        return self.steps * (4 * self.shared.names + 20 * self.shared.out_DH.shape[1])

    def to(self, device: torch.device) -> None:
        """Compute there from now on."""
        self.head.to(device)
        self.rotary.to(device)
        self.shared = self.shared.on(device)

    def loss(self, batch: TextBatch, step: int) -> Tensor:
        """Mean over the tokens of answers, of all steps of its own."""
        return loss_of(self.unrolled(batch), self.loss_kind)

    def accepted(self, batch: TextBatch) -> tuple[int, int]:
        """Guesses in a row that the text has too, each its best, over all places of answers; and those places."""
        return accepted_in(self.unrolled(batch), batch, self.shared.place_V)


def embedded(batch: TextBatch, step: int, embeddings_VH: Tensor) -> Tensor:
    """What the rows of a step read of tokens, [B, R, H]."""
    tokens_BR = nn.functional.pad(batch.tokens_BR[:, 1 + step :], (0, step))
    return nn.functional.embedding(tokens_BR, embeddings_VH)


def attended(attention: nn.Module, rotary: nn.Module, rows_BRF: Tensor, earlier: list[tuple[Tensor, Tensor]]) -> Tensor:
    """What the attention of a layer makes of the rows of one step; its keys and values are added to `earlier`."""
    count, rows, _ = rows_BRF.shape
    step, parts = len(earlier), attention._modules
    positions_R = torch.arange(1 + step, rows + 1 + step, device=rows_BRF.device)[None]
    cos, sin = rotary(rows_BRF, positions_R)

    def heads(name: str, norm: str = "") -> Tensor:
        made: Tensor = attention.get_submodule(name)(rows_BRF).view(count, rows, -1, cos.shape[-1])
        normed: Tensor = attention.get_submodule(norm)(made) if norm in parts else made
        return normed.transpose(1, 2)

    queries_BARW, keys_BARW = apply_rotary_pos_emb(heads("q_proj", "q_norm"), heads("k_proj", "k_norm"), cos, sin)
    groups = queries_BARW.shape[1] // keys_BARW.shape[1]
    keys_BARW, values_BARW = (one.repeat_interleave(groups, 1) for one in (keys_BARW, heads("v_proj")))
    earlier.append((keys_BARW, values_BARW))
    found: Tensor = attention.get_submodule("o_proj")(_mixed(queries_BARW, earlier).transpose(1, 2).flatten(2))
    return found


def with_mlp(layer: nn.Module, rows_BRH: Tensor, some_BR: Tensor) -> Tensor:
    """What flows out of a layer behind its attention, where that is wanted; the other rows stay as they are."""
    some_KH = rows_BRH[some_BR]
    added_KH: Tensor = layer.get_submodule("mlp")(layer.get_submodule("post_attention_layernorm")(some_KH))
    return rows_BRH.index_put((some_BR,), some_KH + added_KH)


def loss_of(steps: Iterable[UnrolledStep], kind: Loss) -> Tensor:
    """Mean over the tokens of answers, of all steps."""
    losses = [DECAY**number * divergence(step.logits_KD, step.labels, kind).mean() for number, step in enumerate(steps)]
    return torch.stack(losses).sum() / sum(DECAY**number for number in range(len(losses)))


@torch.no_grad()
def accepted_in(steps: Iterable[UnrolledStep], batch: TextBatch, place_V: Tensor) -> tuple[int, int]:
    """Guesses in a row that the text has too, each its best, over all places of answers; and those places."""
    right_BR, total, places = None, 0, 0
    for logits_KD, _, asked in steps:
        ids_K = place_V[batch.tokens_BR[asked.said]]
        hit_BR = torch.zeros(asked.rows_BR.shape, dtype=torch.bool, device=ids_K.device)
        hit_BR[asked.rows_BR] = logits_KD.argmax(-1) == ids_K
        places = places or len(ids_K)
        right_BR = hit_BR if right_BR is None else right_BR & hit_BR
        total += int(right_BR.sum())
    return total, places


def _mixed(queries_BARW: Tensor, steps: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Of the rows of the first step up to the own place, and of the own place in later ones."""
    (keys_BARW, values_BARW), *own = steps
    scale, rows = queries_BARW.shape[-1] ** -0.5, queries_BARW.shape[2]
    later_RR = torch.ones(rows, rows, dtype=torch.bool, device=queries_BARW.device).triu(1)
    scores = [(queries_BARW @ keys_BARW.transpose(-1, -2)).masked_fill(later_RR, float("-inf"))]
    scores += [(queries_BARW * keys).sum(-1, keepdim=True) for keys, _ in own]
    weights = (torch.cat(scores, -1) * scale).float().softmax(-1).to(values_BARW.dtype)
    found_BARW = weights[..., :rows] @ values_BARW
    for place, (_, values) in enumerate(own):
        found_BARW = found_BARW + weights[..., rows + place, None] * values
    return found_BARW
