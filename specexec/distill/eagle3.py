"""An EAGLE-3 head (Li et al. 2025) that learns: the module that drafts, unrolled over several steps of its own.

In step s of a text the row of token t_{i+s} reads, in the place of the target's states, what the row before it gave in
step s - 1, as it will when it drafts (training-time test). It attends to the rows of step 0 up to its own place, and to
its own earlier steps. Tokens are those of the text. The loss of later steps counts DECAY as much each.

B texts   R rows: all tokens but the first   H hidden size   F states side by side   D tokens that the head names
V vocabulary   A heads that attend   W width of each   K rows with a label
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from specexec.distill.batches import TextBatch
from specexec.distill.divergence import Labels, Loss, divergence
from specexec.distill.recording import RecordedTarget
from specexec.drafters.heads.eagle import EagleHead, FirstLayer
from specexec.drafters.heads.eagle_fields import EagleFields

DECAY = 0.8


def layer_settings(target: RecordedTarget) -> dict[str, object]:
    """config.json of a model of the head's one layer: Llama's, as wide as the target whatever that is made of."""
    width = 128 if target.hidden >= 2048 else min(64, target.hidden // 2)
    heads = max(target.hidden // width, 1)
    shared = next(one for one in (4, 3, 2, 1) if heads % one == 0)
    return {
        "model_type": "llama", "hidden_size": target.hidden, "intermediate_size": -(-target.hidden * 8 // 3 // 64) * 64,
        "num_hidden_layers": 1, "num_attention_heads": heads, "num_key_value_heads": heads // shared, "head_dim": width,
        "vocab_size": target.vocabulary, "max_position_embeddings": target.context, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "hidden_act": "silu",
        "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False, "bos_token_id": None,
        "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip


@dataclass
class Eagle3Student:
    """A head in training. `embeddings_VH` are the target's, `place_V` the head's row of each token, -1 for none."""

    head: EagleHead
    rotary: nn.Module
    embeddings_VH: Tensor
    place_V: Tensor
    steps: int
    loss_kind: Loss = "forward-kl"
    trained: dict[str, nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.trained = {name: one for name, one in self.head.named_parameters() if one.requires_grad}

    @classmethod
    def new(
        cls, target: RecordedTarget, taps: tuple[int, ...], shared: Mapping[str, Tensor], ids: Tensor, steps: int,
        seed: int, loss: Loss = "forward-kl",
    ) -> Eagle3Student:  # fmt: skip
        """One that has learned nothing, for the tokens `ids` (int64 [D], ascending); it begins with the target's norm
        and head, where `shared` has them, and never changes the latter."""
        layer = layer_settings(target)
        config = LlamaConfig.from_dict(layer)
        fields = EagleFields(
            3, layer, taps, None, target.layers, len(ids), norm_before_residual=True, norm_before_fc=True
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
            head = EagleHead(fields, model, frozenset({"lm_head.weight"}), len(taps) * target.hidden)
        head.to_empty(device="cpu").float()
        drawn = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for one in head.parameters():
                one.fill_(1.0) if one.dim() == 1 else one.normal_(0.0, one.shape[1] ** -0.5, generator=drawn)
            if "norm.weight" in shared:
                head.get_parameter("norm.weight").copy_(shared["norm.weight"])
            rows_VH = shared.get("lm_head.weight", shared["embed_tokens.weight"])
            head.get_parameter("lm_head.weight").copy_(rows_VH[ids])
        head.lm_head.weight.requires_grad_(False)
        place_V = torch.full((target.vocabulary,), -1)
        place_V[ids] = torch.arange(len(ids))
        return cls(head, LlamaRotaryEmbedding(config), shared["embed_tokens.weight"], place_V, steps, loss)

    @property
    def names(self) -> int:
        """Tokens that it can name."""
        return len(self.head.lm_head.weight)

    def to(self, device: torch.device) -> None:
        """Compute there from now on."""
        self.head.to(device)
        self.rotary.to(device)
        self.embeddings_VH, self.place_V = self.embeddings_VH.to(device), self.place_V.to(device)

    def settle(self, batch: TextBatch) -> None:
        """Scale what the head reads by what it is in these texts, so that no layer of the target drowns another."""
        states_KF = batch.states_BRF[batch.answer_BR].float()
        normed_KF = states_KF * states_KF.square().mean(-1, keepdim=True).rsqrt()
        with torch.no_grad():
            self.head.get_parameter("input_norm.weight").copy_(
                normed_KF.square().mean(0).sqrt().clamp(min=1e-3).reciprocal()
            )

    def loss(self, batch: TextBatch) -> Tensor:
        """Mean over the tokens of answers, of all steps."""
        losses = [
            DECAY**step * divergence(logits_KD, labels, self.loss_kind).mean()
            for step, (logits_KD, labels, _) in enumerate(self._steps(batch))
        ]
        return torch.stack(losses).sum() / sum(DECAY**step for step in range(len(losses)))

    @torch.no_grad()
    def accepted(self, batch: TextBatch) -> tuple[int, int]:
        """Guesses in a row that the text has too, each its best, over all places of answers; and those places."""
        right_BR, total, places = None, 0, 0
        for logits_KD, _, at in self._steps(batch):
            ids_K = self.place_V[batch.tokens_BR[at.said]]
            hit_BR = torch.zeros(at.rows_BR.shape, dtype=torch.bool, device=ids_K.device)
            hit_BR[at.rows_BR] = logits_KD.argmax(-1) == ids_K
            places = places or len(ids_K)
            right_BR = hit_BR if right_BR is None else right_BR & hit_BR
            total += int(right_BR.sum())
        return total, places

    def _steps(self, batch: TextBatch) -> Iterator[tuple[Tensor, Labels, _Asked]]:
        """Step by step the logits of the rows that have a label, the labels, and where they are."""
        head, layer = self.head, self.head.layers[0]
        assert isinstance(layer, FirstLayer)
        features_BRH = head.joined(batch.states_BRF[:, :-1])
        earlier = list[tuple[Tensor, Tensor]]()
        for step in range(self.steps):
            at = _Asked.of(batch.answer_BR, step)
            if not at.rows_BR.any():
                return
            tokens_BR = nn.functional.pad(batch.tokens_BR[:, 1 + step :], (0, step))
            embedded_BRH = nn.functional.embedding(tokens_BR, self.embeddings_VH).to(features_BRH.dtype)
            features_BRH = self._layer(layer, embedded_BRH, features_BRH, step, earlier)
            logits_KD = head.lm_head(head.norm(features_BRH[at.rows_BR]))
            yield logits_KD, Labels.of(batch.top_ids_BRN[at.read], batch.top_log_probs_BRN[at.read], self.place_V), at

    def _layer(
        self,
        layer: FirstLayer,
        embedded_BRH: Tensor,
        features_BRH: Tensor,
        step: int,
        earlier: list[tuple[Tensor, Tensor]],
    ) -> Tensor:
        """What the head's layer makes of one step; its keys and values are added to those of `earlier` ones."""
        normed_BRH, own = layer.hidden_norm(features_BRH), layer.self_attn
        both = torch.cat([layer.input_layernorm(embedded_BRH), normed_BRH], -1)
        count, rows, _ = both.shape

        positions_R = torch.arange(1 + step, rows + 1 + step, device=both.device)[None]
        cos, sin = self.rotary(both, positions_R)

        def heads(name: str) -> Tensor:
            made: Tensor = own.get_submodule(name)(both)
            return made.view(count, rows, -1, cos.shape[-1]).transpose(1, 2)

        queries_BARW, keys_BARW = apply_rotary_pos_emb(heads("q_proj"), heads("k_proj"), cos, sin)
        groups = queries_BARW.shape[1] // keys_BARW.shape[1]
        keys_BARW, values_BARW = (one.repeat_interleave(groups, 1) for one in (keys_BARW, heads("v_proj")))
        earlier.append((keys_BARW, values_BARW))
        found_BARW = _attended(queries_BARW, earlier)
        found_BRH = own.get_submodule("o_proj")(found_BARW.transpose(1, 2).flatten(2))
        features_BRH = (normed_BRH if layer.norm_before_residual else features_BRH) + found_BRH
        mixed: Tensor = features_BRH + layer.mlp(layer.post_attention_layernorm(features_BRH))
        return mixed


@dataclass(frozen=True)
class _Asked:
    """Rows whose next token belongs to an answer, bool [B, R]; of the text's tokens which they read last, and which is
    said then, bool [B, R + 1] with as many true in the same order."""

    rows_BR: Tensor
    read: Tensor
    said: Tensor

    @classmethod
    def of(cls, answer_BR: Tensor, step: int) -> _Asked:
        said = answer_BR.clone()
        said[:, : 2 + step] = False
        read = nn.functional.pad(said[:, 1:], (0, 1))
        return cls(nn.functional.pad(said[:, 2 + step :], (0, 1 + step)), read, said)


def _attended(queries_BARW: Tensor, steps: list[tuple[Tensor, Tensor]]) -> Tensor:
    """To the rows of the first step up to the own place, and to the own place in later ones."""
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
