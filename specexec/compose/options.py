"""Keywords of `load` that have few values, checked before anything is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import get_args

import torch

import offload as weights
from specexec.errors import BadOption
from specexec.planning.budget import check_budget

DTYPES = {"auto": None, "bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
NAMES: dict[str, Iterable[str]] = {
    "drafter_quant": get_args(weights.FewBits),
    "head_quant": get_args(weights.FourBits),
    "offload": get_args(weights.Offload),
    "planner": ("best", "reference", "beam", "sequoia"),
    "dtype": DTYPES,
}


def check_options(chosen: Mapping[str, object]) -> None:
    """Refuse by name what no engine can be made of; `chosen` are keywords of `load`. Raises BadOption."""
    for name in ("model", "drafter", "device"):
        _require(isinstance(chosen[name], str), name, chosen, "a name or path, as text")
    for name, allowed in NAMES.items():
        _require(chosen[name] in tuple(allowed), name, chosen, ", ".join(allowed))
    for name in ("ctx", "draft_vocab", "ram_B", "vram_B"):
        _require(chosen[name] is None or _above_0(chosen[name], Integral), name, chosen, "None, or 1 and more")
    _require(
        chosen["link_limit_Bps"] is None or _above_0(chosen["link_limit_Bps"], Real),
        "link_limit_Bps", chosen, "None, or above 0",
    )  # fmt: skip
    for name in ("exact", "offline", "verify", "trust_remote_code"):
        _require(isinstance(chosen[name], bool), name, chosen, "True or False")
    check_budget(chosen["budget"])
    _check_device(str(chosen["device"]))


def _check_device(name: str) -> None:
    if name in ("auto", "cpu"):
        return
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type != "cuda":
        raise BadOption(f"device is {name!r}; allowed: auto, cpu, cuda, cuda:0, cuda:1, …")
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise BadOption(
            f"device is {name!r}, but torch sees {torch.cuda.device_count()} GPUs here.", hint="device='cpu'."
        )


def _above_0(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and value > 0  # type: ignore[operator]  # a number


def _require(holds: bool, name: str, chosen: Mapping[str, object], allowed: str) -> None:
    if not holds:
        raise BadOption(f"{name} is {chosen[name]!r}; allowed: {allowed}.")
