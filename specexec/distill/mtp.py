"""An MTP layer (DeepSeek-V3) that learns: the layer that drafts, unrolled over several steps of its own.

It reads what flows out of the target's last layer, and names every token.
B texts   R rows: all tokens but the first   H hidden size   V vocabulary   K rows with a label
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from specexec.distill.batches import TextBatch
from specexec.distill.divergence import Loss
from specexec.distill.layers import SharedWithTarget, draw, layer_settings, reciprocal_size
from specexec.distill.recording import RecordedTarget, Recording
from specexec.distill.unrolled import STEPS, Asked, UnrolledStep, UnrolledStudent, attended, embedded, with_mlp
from specexec.drafters.heads.mtp_fields import PUBLISHED, START
from specexec.drafters.heads.mtp_folder import MtpHead


@dataclass
class MtpStudent(UnrolledStudent):
    """A layer in training, unrolled over so many steps."""

    head: MtpHead

    @classmethod
    def new(cls, target: RecordedTarget, shared: SharedWithTarget, seed: int, loss: Loss) -> MtpStudent:
        """One that has learned nothing; its last norm begins as the target's."""
        config = Qwen3Config.from_dict(layer_settings(target, "qwen3"))
        with torch.device("meta"):
            head = MtpHead(AutoModelForCausalLM.from_config(config))
        draw(head, seed)
        if shared.norm_H is not None:
            with torch.no_grad():
                head.get_parameter("layers.0.final_layernorm.weight").copy_(shared.norm_H)
        return cls(head, Qwen3RotaryEmbedding(config), shared, STEPS, loss)

    def settle(self, batch: TextBatch) -> None:
        """Scale what it reads by what that is in these texts, so that no number drowns another."""
        with torch.no_grad():
            norm = self.head.get_parameter("layers.0.hidden_layernorm.weight")
            norm.copy_(reciprocal_size(batch.last_BRH[batch.answer_BR]))

    def published(self) -> dict[str, Tensor]:
        """Its weights by the names that `speculators` gives them."""
        return {PUBLISHED + name.removeprefix(START): one for name, one in self.head.state_dict().items()}

    def settings(self, recording: Recording) -> dict[str, object]:
        """What config.json says of it alone."""
        layer = layer_settings(recording.target, "qwen3")
        return {
            "architectures": ["MTPDraftModel"], "transformer_layer_config": layer, "num_nextn_predict_layers": 1
        }  # fmt: skip

    def unrolled(self, batch: TextBatch) -> Iterator[UnrolledStep]:
        """Step by step what it guesses."""
        head, layer = self.head, self.head.layers[0]
        hidden_BRH = batch.last_BRH[:, :-1].to(head.get_parameter("layers.0.input_proj.weight").dtype)
        earlier = list[tuple[Tensor, Tensor]]()
        for number, asked in self.asked(batch):
            embedded_BRH = embedded(batch, number, self.shared.embeddings_VH).to(hidden_BRH.dtype)
            mixed_BRH = head.mixed(embedded_BRH, hidden_BRH)
            normed_BRH = layer.get_submodule("input_layernorm")(mixed_BRH)
            mixed_BRH = mixed_BRH + attended(layer.get_submodule("self_attn"), self.rotary, normed_BRH, earlier)
            mixed_BRH = with_mlp(layer, mixed_BRH, Asked.from_now(batch.answer_BR, number, self.steps))
            hidden_BRH = layer.get_submodule("final_layernorm")(mixed_BRH)
            logits_KD = linear(hidden_BRH[asked.rows_BR], self.shared.out_DH)
            yield UnrolledStep(logits_KD, asked.labels(batch, self.shared.place_V), asked)
