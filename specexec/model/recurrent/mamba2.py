"""Mamba-2 as transformers' modelling code asks for it (Nemotron-H, Granite 4, Bamba, Falcon-H1, Zamba2).

R rows   H heads   P width of a head   G groups of heads that share B and C   N width of B and C
"""

from __future__ import annotations

from torch import Tensor, where
from torch.nn.functional import softplus

from specexec.model.recurrent.linear_state import LinearRows


def step_sizes(step_RH: Tensor, bias_H: Tensor | None, soft: bool) -> Tensor:
    """Delta: the projected step sizes with their bias, made positive."""
    if bias_H is not None:
        step_RH = step_RH + bias_H.to(step_RH.dtype)
    return softplus(step_RH) if soft else step_RH


def limited(step_RH: Tensor, limit: tuple[float, float], read_R: Tensor) -> Tensor:
    """Those of rows that are read as a prompt within limits."""
    return where(read_R.unsqueeze(-1), step_RH.clamp(*limit), step_RH)


def mamba2_rows(input_RHP: Tensor, step_RH: Tensor, rate_H: Tensor, key_RGN: Tensor, query_RGN: Tensor) -> LinearRows:
    """Rows of one text: a state decays by e^{Delta A} and takes B (Delta x)^T; C reads it."""
    query_GRN, key_GRN, input_HRP = (rows.transpose(0, 1).float() for rows in (query_RGN, key_RGN, input_RHP))
    step_HR = step_RH.T.float()
    return LinearRows(query_GRN, key_GRN, input_HRP * step_HR.unsqueeze(-1), step_HR * rate_H.float().unsqueeze(-1))
