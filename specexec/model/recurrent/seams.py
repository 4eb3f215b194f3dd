"""Where transformers' recurrent layers let us in: the plain functions that their modelling files call.

Each is replaced in its modelling module once, for the whole process, as our attention is registered once for it. A call
that does not come from one of our sweeps gets transformers' own function. Which sweep it comes from the calling thread
knows (`sweeping`), since many layers hand none of their keywords on to those functions.
R rows   C channels   K taps   S numbers of a channel
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from specexec.model.module_types import every_module
from specexec.model.recurrent.delta_rule import channel_rows, delta_rows
from specexec.model.recurrent.linear_state import LinearRows
from specexec.model.recurrent.mamba2 import limited, mamba2_rows, step_sizes
from specexec.model.recurrent.packed import PackedStates
from specexec.model.recurrent.scan import StateRows
from specexec.model.recurrent.selective_state import SelectiveRows
from specexec.sizes import CHUNK

Function = Callable[..., Any]


@dataclass(frozen=True)
class _Visit:
    """A sweep at one layer."""

    states: PackedStates
    layer: int


_SWEEP: ContextVar[PackedStates | None] = ContextVar("sweep", default=None)
_VISIT: ContextVar[_Visit | None] = ContextVar("visit", default=None)


@contextmanager
def sweeping(states: PackedStates) -> Iterator[None]:
    """Until this is left recurrent layers that this thread runs are at work for the texts of these states."""
    token = _SWEEP.set(states)
    try:
        yield
    finally:
        _SWEEP.reset(token)


def sweep_here() -> PackedStates | None:
    """The states of the sweep that this thread is at work for; None outside of one."""
    return _SWEEP.get()


def let_in(model: nn.Module) -> set[int]:
    """Make sweeps reach the recurrent layers of a model; their numbers. Harmless when repeated."""
    found = set()
    _number_shared(model)
    for mixer in _mixers(model):
        if _enter not in mixer._forward_pre_hooks.values():
            mixer.register_forward_pre_hook(_enter)
            mixer.register_forward_hook(_leave, always_call=True)
        code = sys.modules[type(mixer).__module__]
        for name, ours in SEAMS.items():
            own = getattr(code, name, None)
            if own is not None and not hasattr(own, "transformers_own"):
                setattr(code, name, _either(own, ours))
        found.add(int(mixer.layer_idx))  # type: ignore[arg-type]  # nn.Module declares every attribute a Tensor
    return found


def _number_shared(model: nn.Module) -> None:
    """Attention whose weights several layers share does not know its layer (Zamba2)."""
    for module in every_module(model):
        attention, decoder = (module._modules.get(name) for name in ("shared_transformer", "mamba_decoder"))
        if attention is not None and decoder is not None:
            attention.get_submodule("self_attn").layer_idx = decoder.layer_idx


def _mixers(model: nn.Module) -> Iterator[nn.Module]:
    """Modules that know their layer's number and have a causal convolution."""
    for module in every_module(model):
        if hasattr(module, "layer_idx") and any(isinstance(child, nn.Conv1d) for child in module.children()):
            yield module


def _enter(mixer: nn.Module, _: object) -> None:
    states = _SWEEP.get()
    _VISIT.set(None if states is None else _Visit(states, int(mixer.layer_idx)))  # type: ignore[arg-type]  # see above


def _leave(*_: object) -> None:
    _VISIT.set(None)


def _either(own: Function, ours: Function) -> Function:
    @functools.wraps(own)
    def called(*args: Any, **kwargs: Any) -> Any:
        visit = _VISIT.get()
        return own(*args, **kwargs) if visit is None else ours(visit, *args, **kwargs)

    called.transformers_own = own  # type: ignore[attr-defined]  # marks what is replaced already
    return called


def _pieces(rows: int, at_once: int = CHUNK) -> list[slice]:
    """Rows that are there in float32 at a time."""
    return [slice(first, first + at_once) for first in range(0, rows, at_once)]


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
    rows_of: Callable[..., StateRows],
    at_once: int,
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
    """`torch_chunk_gated_delta_rule` and `chunk_kimi_delta_attention`: [1, R, heads, width] in and out."""
    read_RHV = torch.empty_like(value[0])
    for here in _pieces(len(read_RHV), at_once):
        given = (query[0, here], key[0, here], value[0, here], g[0, here], beta[0, here])
        read_RHV[here] = visit.states.scan(visit.layer, rows_of(*given, use_qk_l2norm_in_kernel)).transpose(0, 1)
    return read_RHV.unsqueeze(0), None


def _mamba1(
    visit: _Visit,
    hidden_1CR: Tensor,
    step_1CR: Tensor,
    A: Tensor,
    B_1SR: Tensor,
    C_1SR: Tensor,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    **_: object,
) -> Tensor:
    """`mamba_selective_scan` without the last state: [1, C, R] in and out, the latter in float32."""
    outputs_CR = torch.empty_like(hidden_1CR[0], dtype=torch.float32)
    for here in _pieces(outputs_CR.shape[1]):
        step_RC = step_sizes(step_1CR[0, :, here].T, delta_bias, delta_softplus).float()
        input_RC = hidden_1CR[0, :, here].T.float()
        key_RS, query_RS = B_1SR[0, :, here].T.float(), C_1SR[0, :, here].T.float()
        rows = SelectiveRows(step_RC, step_RC * input_RC, key_RS, query_RS, A.float())
        read_RC = visit.states.scan(visit.layer, rows)[0].addcmul_(D, input_RC)
        outputs_CR[:, here] = read_RC.mul_(silu(z[0, :, here].T)).T
    return outputs_CR.unsqueeze(0)


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
    step_RH = step_sizes(dt[0], dt_bias, dt_softplus)
    step_RH = limited(step_RH, dt_limit, visit.states.read(visit.layer, LinearRows.name, len(step_RH)))
    read_HRP = visit.states.scan(visit.layer, mamba2_rows(hidden[0], step_RH, A, B[0], C[0]))
    return (read_HRP.transpose(0, 1) + D.unsqueeze(-1) * hidden[0].float()).unsqueeze(0).contiguous()


SEAMS: Mapping[str, Function] = {
    "causal_conv1d_fn": _convolve,
    "torch_chunk_gated_delta_rule": functools.partial(_delta_rule, delta_rows, sys.maxsize),
    "chunk_kimi_delta_attention": functools.partial(_delta_rule, channel_rows, CHUNK),
    "mamba_selective_scan": _mamba1,
    "mamba2_chunk_scan": _mamba2,
}
"""Names of transformers' functions, and what is called instead of each within a sweep."""
