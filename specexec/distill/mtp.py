"""An MTP layer (DeepSeek-V3) that learns: the layer that drafts, unrolled over several steps of its own.

It reads what flows out of the target's last layer, and names every token.
B texts   R rows: all tokens but the first   H hidden size   V vocabulary   K rows with a label
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from specexec.distill.batches import TextBatch
from specexec.distill.divergence import Loss
from specexec.distill.layers import SharedWithTarget, draw, layer_settings, reciprocal_size
from specexec.distill.recording import RecordedTarget, Recording
from specexec.distill.unrolled import STEPS, Asked, UnrolledStep, accepted_in, attended, embedded, loss_of
from specexec.drafters.heads.mtp_fields import PUBLISHED, START
from specexec.drafters.heads.mtp_folder import MtpHead


@dataclass
class MtpStudent:
    """A layer in training, unrolled over so many steps."""

    head: MtpHead
    rotary: nn.Module
    shared: SharedWithTarget
    steps: int
    loss_kind: Loss = "forward-kl"
    trained: dict[str, nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.trained = dict(self.head.named_parameters())

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

    def loss(self, batch: TextBatch, step: int) -> Tensor:
        """Mean over the tokens of answers, of all steps of its own."""
        return loss_of(self.unrolled(batch), self.loss_kind)

    def accepted(self, batch: TextBatch) -> tuple[int, int]:
        """Guesses in a row that the text has too, each its best, over all places of answers; and those places."""
        return accepted_in(self.unrolled(batch), batch, self.shared.place_V)

    def unrolled(self, batch: TextBatch) -> Iterator[UnrolledStep]:
        """Step by step what it guesses."""
        head, layer = self.head, self.head.layers[0]
        hidden_BRH = batch.last_BRH[:, :-1].to(head.get_parameter("layers.0.input_proj.weight").dtype)
        earlier = list[tuple[Tensor, Tensor]]()
        for number in range(self.steps):
            asked = Asked.of(batch.answer_BR, number)
            if not asked.rows_BR.any():
                return
            embedded_BRH = embedded(batch, number, self.shared.embeddings_VH).to(hidden_BRH.dtype)
            mixed_BRH = head.mixed(embedded_BRH, hidden_BRH)
            normed_BRH = layer.get_submodule("input_layernorm")(mixed_BRH)
            mixed_BRH = mixed_BRH + attended(layer.get_submodule("self_attn"), self.rotary, normed_BRH, earlier)
            mixed_BRH = mixed_BRH + layer.get_submodule("mlp")(
                layer.get_submodule("post_attention_layernorm")(mixed_BRH)
            )
            hidden_BRH = layer.get_submodule("final_layernorm")(mixed_BRH)
            logits_KD = linear(hidden_BRH[asked.rows_BR], self.shared.out_DH)
            yield UnrolledStep(logits_KD, asked.labels(batch, self.shared.place_V), asked)
