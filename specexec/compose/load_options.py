"""How a model is loaded: every choice there is, documented and checked in one place. Knows no torch.

The command line makes its options from here (cli/shared/options.py). A new choice is one field below, what it may be
in `_check`, the step of `load` that obeys it, and one click option.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Literal, TypeAlias

from specexec.errors import BadOption
from specexec.lossy.asked import Lossy
from specexec.sizes import check_budget

if TYPE_CHECKING:
    from offload import Compute, FewBits, FourBits, KVHome, KVQuant, Offload

# Fields that have few values.
ALLOWED: dict[str, tuple[str, ...]] = {
    "drafter_device": ("auto", "cpu"),
    "drafter_quant": ("none", "nf4", "hqq4", "hqq3", "hqq2"),
    "head_quant": ("none", "nf4"),
    "compute": ("float", "int8"),
    "offload": ("auto", "none", "ram", "disk"),
    "kv": ("ram", "disk", "auto"),
    "dtype": ("auto", "bf16", "f16", "f32"),
}
DraftsOn: TypeAlias = Literal["auto", "cpu"]
KV_QUANT: tuple[KVQuant, ...] = (8, 4)
DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


@dataclass(frozen=True)
class LoadOptions:
    """Everything that `load` can be asked for beside the model. Raises BadOption for what a field cannot be."""

    drafter: str = "auto"
    """Names joined by `+` (specexec/drafters/registry.py); a path or another name is a model that drafts."""
    lora: tuple[str, ...] = ()
    """LoRA adapters of the target, each a folder or FOLDER:scale, added to its weights in this order
    (offload/checkpoint/lora.py); that makes it another model."""
    drafter_lora: tuple[str, ...] = ()
    """The same of the drafter models."""
    draft_vocab: int | None = None
    """The most frequent tokens of a drafter model's head that are kept, for its speed; None keeps all."""
    draft_window: int | None = None
    """The last tokens of a text that what drafts with keys and values of its own sees at least, beside the first few;
    None: all. Bounds its memory and its time where texts are long."""
    drafter_quant: FewBits = "none"
    """Number format of the layers that draft: drafter models quantised while they are read, or `substitute`'s copies
    of the target's (nf4 where this is none). The formats named hqq need `specexec[hqq]`."""
    drafter_device: DraftsOn = "auto"
    """Where drafter models compute: with the target, or on the CPU beside a GPU, which has its memory for the target
    then, and guesses ahead during whole sweeps (DuoDecoding). Heads compute with the target."""
    head_quant: FourBits = "none"
    """The target's head in four bits, which makes it another model."""
    compute: Compute = "float"
    """How linears of the target that are stored in int8 multiply: dequantised, or in integers with activations of 15
    bits (offload/checkpoint/quantized/arithmetic/row_codes.py), which makes it another model."""
    kv_quant: KVQuant | None = None
    """Bits of the target's keys and values (specexec/model/kept_rows.py): 8 or 4, which makes it another model; None
    keeps them as they are computed. Drafters keep theirs whole."""
    kv: KVHome = "ram"
    """The slowest place for keys and values of the target: RAM, or the disk (`auto`: if nothing else fits)."""
    offload: Offload = "auto"
    """Where the weights live between sweeps."""
    budget: int | Literal["auto"] = "auto"
    """Guesses that one sweep checks; `auto`: as many as pay."""
    device: str = "auto"
    """Where the model computes: cpu, cuda or cuda:N."""
    dtype: str = "auto"
    """Number format to compute with; `auto` is the one that the model is stored in."""
    ctx: int | None = None
    """Tokens that prompt and answer may have together; None: what the model was made for, at most 8192."""
    ram_B: int | None = None
    """Use at most these bytes of RAM."""
    vram_B: int | None = None
    """Use at most these bytes of GPU memory."""
    link_limit_Bps: float | None = None
    """Slow the weight stream down to these bytes per second."""
    lossy: tuple[str, ...] = ()
    """What may change the texts (specexec/lossy): `steps=N` keeps steps of the drafter that the target scores N,
    `prompt=X` reads that share of long prompts, `kv=X` keeps that share of their keys and values. `Engine.lossy` names
    it."""
    exact: bool = False
    """Decide near-ties by the text alone (specexec/model/exact_ties.py); `Engine.exact_ties` counts what that took."""
    offline: bool = False
    """Use only what is on this machine already."""
    verify: bool = False
    """Compare weights with their hashes first (packs, and what came from the Hub)."""
    trust_remote_code: bool = False
    """Run Python that the folders of all models bring; an architecture from there is tried on a few tokens first."""

    def __post_init__(self) -> None:
        check_budget(self.budget)
        for name, holds, allowed in self._checks():
            if not holds:
                raise BadOption(f"{name} is {getattr(self, name)!r}; allowed: {allowed}.")
        if Lossy.of(self.lossy).labels and self.exact:
            raise BadOption("exact texts are wanted, and lossy ones.", hint="one of --exact and --lossy.")

    def _checks(self) -> Iterator[tuple[str, bool, str]]:
        """Each field, whether it holds, and what it may be."""
        yield "drafter", isinstance(self.drafter, str), "a name or path, as text"
        for name in ("lora", "drafter_lora"):
            yield name, _texts(getattr(self, name)), "a tuple of folders, as text"
        yield "lossy", _texts(self.lossy), "a tuple of texts"
        for name, allowed in ALLOWED.items():
            yield name, getattr(self, name) in allowed, ", ".join(allowed)
        bits = self.kv_quant is None or (type(self.kv_quant) is int and self.kv_quant in KV_QUANT)
        yield "kv_quant", bits, "None, 8 or 4"
        for name in ("ctx", "draft_vocab", "draft_window", "ram_B", "vram_B"):
            yield name, _none_or_above_0(getattr(self, name), Integral), "None, or 1 and more"
        yield "link_limit_Bps", _none_or_above_0(self.link_limit_Bps, Real), "None, or above 0"
        for name in ("exact", "offline", "verify", "trust_remote_code"):
            yield name, isinstance(getattr(self, name), bool), "True or False"
        named = isinstance(self.device, str) and DEVICE.fullmatch(self.device) is not None
        yield "device", named, "auto, cpu, cuda, cuda:0, cuda:1, …"


def _texts(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(one, str) for one in value)


def _none_or_above_0(value: object, kind: type) -> bool:
    if value is None:
        return True
    return isinstance(value, kind) and not isinstance(value, bool) and value > 0  # type: ignore[operator]  # a number
