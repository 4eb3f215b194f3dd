"""Where transformers' recurrent layers let us in: the plain functions that their modelling files call.

Each is replaced in its modelling module once, for the whole process, as our attention is registered once for it. A call
that does not come from one of our sweeps gets transformers' own function.   R rows   C channels   K taps
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from specexec.model.recurrent.delta_rule import delta_rows
from specexec.model.recurrent.mamba2 import mamba2_rows, step_sizes
from specexec.model.recurrent.packed import PackedStates

Function = Callable[..., Any]


class RecurrentSweep(Protocol):
    """What the keyword `sweep` of a forward must have."""

    @property
    def states(self) -> PackedStates: ...


@dataclass(frozen=True)
class _Visit:
    """A sweep at one layer: what stands in the place of `sweep` among the keywords of its mixer."""

    states: PackedStates
    layer: int


def let_in(model: nn.Module) -> set[int]:
    """Make sweeps reach the recurrent layers of a model; their numbers. Harmless when repeated."""
    found = set()
    for mixer in _mixers(model):
        if _enter not in mixer._forward_pre_hooks.values():
            mixer.register_forward_pre_hook(_enter, with_kwargs=True)
        module = sys.modules[type(mixer).__module__]
        for name, ours in SEAMS.items():
            own = getattr(module, name, None)
            if own is not None and not hasattr(own, "transformers_own"):
                setattr(module, name, _either(own, ours))
        found.add(int(mixer.layer_idx))  # type: ignore[arg-type]  # nn.Module declares every attribute a Tensor
    return found


def _mixers(model: nn.Module) -> Iterator[nn.Module]:
    """Modules that know their layer's number and have a causal convolution; streamed layers hide theirs."""
    for module in model.modules():
        inner = getattr(module, "inner", None)
        for one in inner.modules() if isinstance(inner, nn.Module) else [module]:
            if hasattr(one, "layer_idx") and any(isinstance(child, nn.Conv1d) for child in one.children()):
                yield one


def _enter(mixer: nn.Module, args: tuple[object, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    sweep: RecurrentSweep | None = kwargs.get("sweep")
    if sweep is None:
        return None
    return args, {**kwargs, "sweep": _Visit(sweep.states, int(mixer.layer_idx))}  # type: ignore[arg-type]  # see above


def _either(own: Function, ours: Function) -> Function:
    @functools.wraps(own)
    def called(*args: Any, sweep: _Visit | None = None, **kwargs: Any) -> Any:
        return own(*args, **kwargs) if sweep is None else ours(sweep, *args, **kwargs)

    called.transformers_own = own  # type: ignore[attr-defined]  # marks what is replaced already
    return called


def _convolve(
    visit: _Visit,
    inputs_1CR: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **_: object,
) -> Tensor:
    """`causal_conv1d_fn`: [1, C, R] in and out, an activation after it."""
    from transformers.activations import ACT2FN

    outputs_RC = visit.states.convolve(visit.layer, inputs_1CR[0].T, weight, bias)
    if activation is not None:
        outputs_RC = ACT2FN[activation](outputs_RC)
    return outputs_RC.T.unsqueeze(0).to(inputs_1CR.dtype)


def _delta_rule(
    visit: _Visit,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    g: Tensor,
    beta: Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    **_: object,
) -> tuple[Tensor, None]:
    """`torch_chunk_gated_delta_rule`: [1, R, heads, width] in and out."""
    rows = delta_rows(query[0], key[0], value[0], g[0], beta[0], use_qk_l2norm_in_kernel)
    read_HRV = visit.states.scan(visit.layer, rows)
    return read_HRV.transpose(0, 1).unsqueeze(0).to(query.dtype), None


def _mamba2(
    visit: _Visit,
    hidden: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    **_: object,
) -> Tensor:
    """`mamba2_chunk_scan` without final states: [1, R, heads, width] in and out, the latter in float32."""
    step_RH = step_sizes(dt[0], dt_bias, dt_softplus, dt_limit)
    read_HRP = visit.states.scan(visit.layer, mamba2_rows(hidden[0], step_RH, A, B[0], C[0]))
    return (read_HRP.transpose(0, 1) + D.unsqueeze(-1) * hidden[0].float()).unsqueeze(0).contiguous()


SEAMS: Mapping[str, Function] = {
    "causal_conv1d_fn": _convolve,
    "torch_chunk_gated_delta_rule": _delta_rule,
    "mamba2_chunk_scan": _mamba2,
}
"""Names of transformers' functions, and what is called instead of each within a sweep."""
