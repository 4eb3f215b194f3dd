"""The delta rule as transformers' modelling code asks for it: gated (Qwen3-Next, Qwen3.5, OLMo hybrid), and Kimi's.

R rows   J heads of keys   H heads of values   K width of keys   V width of values
"""

from __future__ import annotations

import torch
from torch import Tensor

from specexec.model.recurrent.channel_state import ChannelRows
from specexec.model.recurrent.linear_state import LinearRows

EPSILON = 1e-6  # as in transformers and in flash-linear-attention


def delta_rows(
    query_RJK: Tensor, key_RJK: Tensor, value_RHV: Tensor, decay_RH: Tensor, beta_RH: Tensor, normalised: bool
) -> LinearRows:
    """Rows of one text. Queries and keys get the length 1 where `normalised`; queries are divided by sqrt(K)."""
    query_JRK, key_JRK = _asked(query_RJK, key_RJK, normalised)
    return LinearRows(query_JRK, key_JRK, value_RHV.transpose(0, 1).float(), decay_RH.T.float(), beta_RH.T.float())


def channel_rows(
    query_RHK: Tensor, key_RHK: Tensor, value_RHV: Tensor, decay_RHK: Tensor, beta_RH: Tensor, normalised: bool
) -> ChannelRows:
    """The same where each channel of the keys has its own decay, of which the logarithm is given."""
    query_HRK, key_HRK = _asked(query_RHK, key_RHK, normalised)
    value_HRV, decay_HRK = (rows.transpose(0, 1).float() for rows in (value_RHV, decay_RHK))
    return ChannelRows(query_HRK, key_HRK, value_HRV, decay_HRK.exp(), beta_RH.T.float())


def _asked(query_RJK: Tensor, key_RJK: Tensor, normalised: bool) -> tuple[Tensor, Tensor]:
    query_JRK, key_JRK = (rows.transpose(0, 1).float() for rows in (query_RJK, key_RJK))
    if normalised:
        query_JRK, key_JRK = _of_length_one(query_JRK), _of_length_one(key_JRK)
    return query_JRK * query_JRK.shape[-1] ** -0.5, key_JRK


def _of_length_one(rows_JRK: Tensor) -> Tensor:
    return rows_JRK * torch.rsqrt(rows_JRK.square().sum(-1, keepdim=True) + EPSILON)
