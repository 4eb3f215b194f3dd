"""An EAGLE-3 head (Li et al. 2025) that learns: the module that drafts, unrolled over several steps of its own.

B texts   R rows: all tokens but the first   H hidden size   F states side by side   D tokens that the head names
V vocabulary   K rows with a label
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from specexec.distill.batches import TextBatch
from specexec.distill.divergence import Loss
from specexec.distill.layers import SharedWithTarget, draw, layer_settings, reciprocal_size
from specexec.distill.recording import RecordedTarget, Recording
from specexec.distill.unrolled import STEPS, Asked, UnrolledStep, UnrolledStudent, attended, embedded, with_mlp
from specexec.drafters.heads.eagle import EagleHead, FirstLayer
from specexec.drafters.heads.eagle_fields import EagleFields


@dataclass
class Eagle3Student(UnrolledStudent):
    """A head in training, unrolled over so many steps."""

    head: EagleHead

    @classmethod
    def new(
        cls, target: RecordedTarget, taps: tuple[int, ...], shared: SharedWithTarget, seed: int, loss: Loss
    ) -> Eagle3Student:
        """One that has learned nothing; it begins with the target's norm and head, and never changes the latter."""
        layer = layer_settings(target)
        config = LlamaConfig.from_dict(layer)
        fields = EagleFields(
            3, layer, taps, None, target.layers, shared.names, norm_before_residual=True, norm_before_fc=True
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
            head = EagleHead(fields, model, frozenset({"lm_head.weight"}), len(taps) * target.hidden)
        draw(head, seed)
        with torch.no_grad():
            if shared.norm_H is not None:
                head.get_parameter("norm.weight").copy_(shared.norm_H)
            head.get_parameter("lm_head.weight").copy_(shared.out_DH)
        head.lm_head.weight.requires_grad_(False)
        return cls(head, LlamaRotaryEmbedding(config), shared, STEPS, loss)

    def settle(self, batch: TextBatch) -> None:
        """Scale what the head reads by what it is in these texts, so that no layer of the target drowns another."""
        with torch.no_grad():
            self.head.get_parameter("input_norm.weight").copy_(reciprocal_size(batch.states_BRF[batch.answer_BR]))

    def published(self) -> dict[str, Tensor]:
        """Its weights by the names that `speculators` gives them."""
        return dict(self.head.state_dict())

    def settings(self, recording: Recording) -> dict[str, object]:
        """What config.json says of it alone."""
        return {
            "architectures": ["Eagle3DraftModel"], "transformer_layer_config": layer_settings(recording.target),
            "eagle_aux_hidden_state_layer_ids": [*recording.taps], "draft_vocab_size": self.shared.names,
            "target_hidden_size": None, "norm_before_residual": True, "norm_before_fc": True, "fc_norm": False,
            "norm_output": False, "embed_requires_grad": False,
        }  # fmt: skip

    def unrolled(self, batch: TextBatch) -> Iterator[UnrolledStep]:
        """Step by step what it guesses."""
        head, layer = self.head, self.head.layers[0]
        assert isinstance(layer, FirstLayer)
        features_BRH = head.joined(batch.states_BRF[:, :-1])
        earlier = list[tuple[Tensor, Tensor]]()
        for number, asked in self.asked(batch):
            embedded_BRH = embedded(batch, number, self.shared.embeddings_VH).to(features_BRH.dtype)
            normed_BRH = layer.hidden_norm(features_BRH)
            both = torch.cat([layer.input_layernorm(embedded_BRH), normed_BRH], -1)
            residual_BRH = normed_BRH if layer.norm_before_residual else features_BRH
            found_BRH = residual_BRH + attended(layer.self_attn, self.rotary, both, earlier)
            features_BRH = with_mlp(layer, found_BRH, Asked.from_now(batch.answer_BR, number, self.steps))
            logits_KD = head.lm_head(head.norm(features_BRH[asked.rows_BR]))
            yield UnrolledStep(logits_KD, asked.labels(batch, self.shared.place_V), asked)
