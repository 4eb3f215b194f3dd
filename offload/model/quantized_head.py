"""A head in four bits: logits from codes, some rows of the vocabulary dequantised at a time. Knows no file.

The same code whatever the number of rows that come along, so a row's logits do not depend on other rows. Scales stay
in float32 (no second quantisation): 4.5 bits a weight.   R rows   H hidden size   V vocabulary
"""

import json
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from offload.checkpoint.layout import Checkpoint
from offload.checkpoint.quantized.formats import dequantise
from offload.checkpoint.quantized.quantize import BLOCK, STATE_B, bitsandbytes
from offload.checkpoint.quantized.weight import Quantised
from offload.errors import UnsupportedModel
from offload.placement.requirements import head_rows

NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

# Weights that are rounded at a time.
ROUNDED = 1 << 20

Rounded = tuple[torch.Tensor, torch.Tensor]


class FewBitHead(nn.Module):
    """Replaces a linear head [V, H] whose weight was rounded to NF4; computes in the dtype of that weight.

    `rounded`: codes and scales of one that was rounded before; without them it is rounded now.
    """

    def __init__(self, linear: nn.Linear, device: torch.device, rounded: Rounded | None = None) -> None:
        super().__init__()
        weight_VH = linear.weight.detach()
        self.out_features, self.in_features = weight_VH.shape
        self._dtype = weight_VH.dtype
        codes, scales = rounded or _quantised(weight_VH, device)
        self.codes = nn.Parameter(codes.view(-1).to(device), requires_grad=False)
        self.scales = nn.Parameter(scales.to(device), requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().to(device), requires_grad=False)

    @property
    def weight(self) -> torch.Tensor:
        """Shape [V, H] and dtype of the dense weight, without numbers: some models ask their head for these."""
        return torch.empty(self.out_features, self.in_features, dtype=self._dtype, device="meta")

    def forward(self, hidden_RH: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] of hidden states [..., H]."""
        logits_RV = hidden_RH.new_empty((*hidden_RH.shape[:-1], self.out_features))
        for rows, dense in self._dense():
            bias = None if self.bias is None else self.bias[rows]
            logits_RV[..., rows] = nn.functional.linear(hidden_RH, dense, bias)
        return logits_RV

    def _dense(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Rows of the weight, one piece of memory for all of them: valid until the next ones."""
        V, H = self.out_features, self.in_features
        step = head_rows(V, H, self._dtype.itemsize)
        scratch = torch.empty(step, H, dtype=self._dtype, device=self.codes.device)
        for start in range(0, V, step):
            rows = slice(start, min(start + step, V))
            dense = scratch[: rows.stop - start]
            members = {
                "codes": self.codes[start * H // 2 : -(-rows.stop * H // 2)],
                "absmax": self.scales[start * H // BLOCK : -(-rows.stop * H // BLOCK)],
            }
            dequantise(Quantised("head", "nf4", tuple(dense.shape), {}, NAMES[self._dtype], BLOCK), members, dense)
            yield rows, dense


def quantise_head(model: PreTrainedModel, device: torch.device, rounded: Rounded | None = None) -> None:
    """Put a head in four bits in the place of the model's own; embeddings that were tied to it stay as they are."""
    path, head = linear_head(model)
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = FewBitHead(head, device, rounded)


def linear_head(model: PreTrainedModel) -> tuple[str, nn.Linear]:
    """Path and module of a head that can be rounded; others are refused."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.weight.dtype not in NAMES:
        raise UnsupportedModel(
            f"the head of {type(model).__name__} cannot be quantised: it is a {type(head).__name__}.",
            hint="leave --head-quant out.",
        )
    (path,) = (path for path, module in model.named_modules() if module is head)
    return path, head


def stored_as(checkpoint: Checkpoint, model: PreTrainedModel) -> tuple[str, str]:
    """The tensor on disk that the head is, and what it is called in a pack: embeddings that it was tied to stay."""
    name = f"{linear_head(model)[0]}.weight"
    blocks = {block.label: block for block in checkpoint.rest}
    tied = name not in blocks
    block = blocks[model.all_tied_weights_keys[name] if tied else name]
    if block.packed:
        raise UnsupportedModel(
            f"{checkpoint.path} keeps its head in few bits already: --head-quant has nothing to do.",
            hint="leave --head-quant out.",
        )
    (part,) = block.pieces[0].parts
    return part.entry.name, name if tied else part.entry.name


def head_on_disk(weight_VH: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
    """What a pack holds of a head in four bits: bitsandbytes' layout without its second quantisation."""
    codes, scales = _quantised(weight_VH, weight_VH.device)
    state = {"quant_type": "nf4", "blocksize": BLOCK, "shape": list(weight_VH.shape)}
    text = json.dumps(state | {"dtype": str(weight_VH.dtype).removeprefix("torch.")}).encode().ljust(STATE_B)
    return {
        name: codes.cpu()[:, None],
        f"{name}.absmax": scales.cpu(),
        f"{name}.quant_map": bitsandbytes().get_4bit_type("nf4", device="cpu"),
        f"{name}.quant_state.bitsandbytes__nf4": torch.tensor(list(text), dtype=torch.uint8),
    }


def _quantised(weight_VH: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, two to a byte, and scales of blocks, on the device; never more than a slice of the weight is there."""
    count = weight_VH.numel()
    codes = torch.empty(-(-count // 2), dtype=torch.uint8, device=device)
    scales = torch.empty(-(-count // BLOCK), device=device)
    pieces = (weight_VH.reshape(-1).split(ROUNDED), codes.split(ROUNDED // 2), scales.split(ROUNDED // BLOCK))
    for weight, few, absmax in zip(*pieces, strict=True):
        done, state = bitsandbytes().quantize_4bit(
            weight.to(device), blocksize=BLOCK, compress_statistics=False, quant_type="nf4"
        )
        few.copy_(done.view(-1))
        absmax.copy_(state.absmax)
    return codes, scales
