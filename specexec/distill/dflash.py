"""A DFlash head (z-lab) that learns: blocks of masks behind drawn places of the texts, filled in one pass.

Behind token t_a a block reads the target's states of t_0 … t_{a-1}, and itself; its place k guesses t_{a+k}, and counts
exp((1 - k) / GAMMA) as much as the first.
B texts   R tokens   A blocks of each   K places of a block   F states side by side   H hidden size   L their labels
N heads that attend   W width of each   D tokens that the head names
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, scaled_dot_product_attention
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding, apply_rotary_pos_emb

from specexec.distill.batches import TextBatch
from specexec.distill.divergence import Labels, Loss, divergence
from specexec.distill.layers import SharedWithTarget, draw, layer_settings
from specexec.distill.recording import RecordedTarget, Recording
from specexec.drafters.heads.dflash import DFlash
from specexec.drafters.heads.dflash_fields import DFlashFields

LAYERS, BLOCK, GAMMA = 3, 8, 4.0
LOOKED_AT = 4  # every so many places of held-out texts a block is filled
LIVE = 34  # numbers of each row and layer that wait for the way back, in hidden sizes


class DrawnBlocks(NamedTuple):
    """Places behind which blocks lie, int64 [B, A], and whether there is one, bool [B, A]."""

    anchors_BA: Tensor
    are_BA: Tensor


@dataclass
class DFlashStudent:
    """A head in training. `seed` and the step draw the places of its blocks."""

    head: DFlash
    shared: SharedWithTarget
    seed: int
    loss_kind: Loss = "forward-kl"
    trained: dict[str, nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.trained = dict(self.head.named_parameters())

    @classmethod
    def new(
        cls, target: RecordedTarget, taps: tuple[int, ...], shared: SharedWithTarget, mask: int, seed: int, loss: Loss
    ) -> DFlashStudent:
        """One that has learned nothing; its last norm begins as the target's. `mask`: no token of texts."""
        layer = layer_settings(target, "qwen3", LAYERS)
        config = Qwen3Config.from_dict(layer)
        fields = DFlashFields("DFlash", layer, BLOCK, mask, taps)
        with torch.device("meta"):
            head = DFlash(fields, config, target.hidden, shared.embeddings_VH)
        draw(head, seed)
        head.add_module("_rotary", Qwen3RotaryEmbedding(config))
        if shared.norm_H is not None:
            with torch.no_grad():
                head.norm.weight.copy_(shared.norm_H)
        return cls(head, shared, seed, loss)

    @property
    def guesses(self) -> int:
        """In a row, that it learned to make."""
        return self.head.fields.places

    @property
    def row_numbers(self) -> int:
        """Of each token, and of the place of a block that comes with it."""
        return 4 * self.shared.names + 2 * LAYERS * LIVE * self.shared.out_DH.shape[1]

    def to(self, device: torch.device) -> None:
        """Compute there from now on."""
        self.head.to(device)
        self.shared = self.shared.on(device)

    def settle(self, batch: TextBatch) -> None:
        """Scale what the head reads by what it is in these texts, so that no layer of the target drowns another."""
        states_KF = batch.states_BRF[batch.answer_BR].float()
        with torch.no_grad():
            self.head.fc.weight.mul_(states_KF.square().mean(0).sqrt().clamp(min=1e-3).reciprocal())

    def published(self) -> dict[str, Tensor]:
        """Its weights by the names that `speculators` gives them."""
        own = dict(self.head.state_dict())
        return own | ({} if self.shared.names == len(self.shared.place_V) else {"lm_head.weight": self.shared.out_DH})

    def settings(self, recording: Recording) -> dict[str, object]:
        """What config.json says of it alone."""
        return {
            "architectures": ["DFlashDraftModel"],
            "transformer_layer_config": layer_settings(recording.target, "qwen3", LAYERS),
            "aux_hidden_state_layer_ids": [*recording.taps], "block_size": BLOCK,
            "mask_token_id": self.head.fields.mask, "draft_vocab_size": self.shared.names, "target_hidden_size": None,
            "sample_from_anchor": False, "sliding_window_non_causal": False,
        }  # fmt: skip

    def loss(self, batch: TextBatch, step: int) -> Tensor:
        """Mean over the places of drawn blocks, earlier ones more."""
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * step)
        drawn_BR = torch.rand(batch.tokens_BR.shape, generator=generator).to(batch.tokens_BR.device)
        blocks = _chosen(batch, drawn_BR, -(-batch.tokens_BR.shape[1] // BLOCK))
        hidden_BAKH, labelled_BAK = self._filled(batch, blocks)
        at_BAK = self._places(blocks)
        before_L = (at_BAK - 1)[labelled_BAK]
        text_L = _texts(labelled_BAK)
        labels = Labels.of(
            batch.top_ids_BRN[text_L, before_L], batch.top_log_probs_BRN[text_L, before_L], self.shared.place_V
        )
        far_L = divergence(self._logits(hidden_BAKH[labelled_BAK]), labels, self.loss_kind)
        weights_K = (-torch.arange(BLOCK - 1, device=far_L.device) / GAMMA).exp()
        weights_L = weights_K.expand(labelled_BAK.shape)[labelled_BAK]
        return (far_L * weights_L).sum() / weights_L.sum()

    @torch.no_grad()
    def accepted(self, batch: TextBatch) -> tuple[int, int]:
        """Guesses in a row that the text has too, each its best, over places of answers; and those places."""
        rows = batch.tokens_BR.shape[1]
        places_R = torch.arange(rows, device=batch.tokens_BR.device)
        looked_BR = (places_R % LOOKED_AT == 0).float() - places_R / rows
        blocks = _chosen(batch, looked_BR.expand(batch.tokens_BR.shape), -(-rows // LOOKED_AT))
        hidden_BAKH, labelled_BAK = self._filled(batch, blocks)
        at_L = self._places(blocks)[labelled_BAK]
        said_L = self.shared.place_V[batch.tokens_BR[_texts(labelled_BAK), at_L]]
        hit_BAK = torch.zeros_like(labelled_BAK)
        hit_BAK[labelled_BAK] = self._logits(hidden_BAKH[labelled_BAK]).argmax(-1) == said_L
        return int(hit_BAK.long().cumprod(-1).sum()), int(blocks.are_BA.sum())

    def _places(self, blocks: DrawnBlocks) -> Tensor:
        """Of the tokens that are guessed, [B, A, K]."""
        return blocks.anchors_BA[..., None] + torch.arange(1, BLOCK, device=blocks.anchors_BA.device)

    def _logits(self, hidden_LH: Tensor) -> Tensor:
        return linear(hidden_LH, self.shared.out_DH)

    def _filled(self, batch: TextBatch, blocks: DrawnBlocks) -> tuple[Tensor, Tensor]:
        """Hidden states of the places that guess, [B, A, K, H]; which have a token of an answer to guess."""
        head, table_VH = self.head, self.shared.embeddings_VH
        count, rows = batch.tokens_BR.shape
        anchors_BA, many = blocks.anchors_BA, blocks.anchors_BA.shape[1]
        c_BRH = head.hidden_norm(head.fc(batch.states_BRF.to(head.fc.weight.dtype)))
        ids_BAK = torch.full((count, many, BLOCK), head.fields.mask, device=anchors_BA.device)
        ids_BAK[..., 0] = batch.tokens_BR.gather(1, anchors_BA)
        x_BQH = embedding(ids_BAK.flatten(1), table_VH).to(c_BRH.dtype)
        within_K = torch.arange(BLOCK, device=anchors_BA.device)
        own_BQ = (anchors_BA[..., None] + within_K).flatten(1)
        of_text = torch.arange(rows, device=anchors_BA.device).expand(count, -1)
        turned = head._rotary(x_BQH, torch.cat([of_text, own_BQ], 1))
        sees_BQR = of_text[:, None] < anchors_BA.repeat_interleave(BLOCK, 1)[..., None]
        block_Q = torch.arange(many, device=anchors_BA.device).repeat_interleave(BLOCK)
        sees_QQ = (block_Q[:, None] == block_Q).expand(count, -1, -1)
        sees = torch.cat([sees_BQR, sees_QQ], -1)[:, None]
        for layer in head.layers:
            part = layer.get_submodule
            normed_BQH = part("input_layernorm")(x_BQH)
            x_BQH = x_BQH + _attended(part("self_attn").get_submodule, normed_BQH, c_BRH, turned, sees)
            x_BQH = x_BQH + part("mlp")(part("post_attention_layernorm")(x_BQH))
        out_BAKH = head.norm(x_BQH).unflatten(1, (many, BLOCK))[:, :, 1:]
        at_BAK = self._places(blocks)
        inside_BAK = (at_BAK < rows) & blocks.are_BA[..., None]
        answered_BAK = batch.answer_BR.gather(1, at_BAK.clamp(max=rows - 1).flatten(1)).view(at_BAK.shape)
        return out_BAKH, inside_BAK & answered_BAK


def _attended(
    part: Callable[[str], nn.Module], own_BQH: Tensor, c_BRH: Tensor, turned: tuple[Tensor, Tensor], sees: Tensor
) -> Tensor:
    """What rows of blocks find in the text and in their own blocks."""
    cos, sin = turned
    width, text = cos.shape[-1], c_BRH.shape[1]

    def heads(name: str, rows: Tensor) -> Tensor:
        made: Tensor = part(name)(rows)
        return made.unflatten(-1, (-1, width))

    rows = torch.cat([c_BRH, own_BQH], 1)
    keys_BNRW = part("k_norm")(heads("k_proj", rows)).transpose(1, 2)
    queries_BNQW = part("q_norm")(heads("q_proj", own_BQH)).transpose(1, 2)
    keys_BNRW, _ = apply_rotary_pos_emb(keys_BNRW, keys_BNRW, cos, sin)
    queries_BNQW, _ = apply_rotary_pos_emb(queries_BNQW, queries_BNQW, cos[:, text:], sin[:, text:])
    values_BNRW = heads("v_proj", rows).transpose(1, 2)
    found_BNQW = scaled_dot_product_attention(queries_BNQW, keys_BNRW, values_BNRW, sees, enable_gqa=True)
    found: Tensor = part("o_proj")(found_BNQW.transpose(1, 2).flatten(2))
    return found


def _chosen(batch: TextBatch, wanted_BR: Tensor, most: int) -> DrawnBlocks:
    """The most wanted places whose next token belongs to an answer, and which have a token before them."""
    may_BR = batch.answer_BR.roll(-1, 1)
    may_BR[:, -1] = False
    may_BR[:, 0] = False
    found = wanted_BR.masked_fill(~may_BR, -2.0).topk(min(most, wanted_BR.shape[1]), 1)
    return DrawnBlocks(found.indices, found.values > -1.0)


def _texts(labelled_BAK: Tensor) -> Tensor:
    """To which text each label belongs, [L]."""
    count = len(labelled_BAK)
    return torch.arange(count, device=labelled_BAK.device)[:, None, None].expand(labelled_BAK.shape)[labelled_BAK]
