"""The gated delta rule as transformers' modelling code asks for it (Qwen3-Next, Qwen3.5, OLMo hybrid).

R rows   J heads of keys   H heads of values   K width of keys   V width of values
"""

from __future__ import annotations

import torch
from torch import Tensor

from specexec.model.recurrent.linear_state import LinearRows

EPSILON = 1e-6  # as in transformers and in flash-linear-attention


def delta_rows(
    query_RJK: Tensor, key_RJK: Tensor, value_RHV: Tensor, decay_RH: Tensor, beta_RH: Tensor, normalised: bool
) -> LinearRows:
    """Rows of one text. Queries and keys get the length 1 where `normalised`; queries are divided by sqrt(K)."""
    query_JRK, key_JRK, value_HRV = (rows.transpose(0, 1).float() for rows in (query_RJK, key_RJK, value_RHV))
    if normalised:
        query_JRK, key_JRK = _of_length_one(query_JRK), _of_length_one(key_JRK)
    query_JRK = query_JRK * query_JRK.shape[-1] ** -0.5
    return LinearRows(query_JRK, key_JRK, value_HRV, decay_RH.T.float(), beta_RH.T.float())


def _of_length_one(rows_JRK: Tensor) -> Tensor:
    return rows_JRK * torch.rsqrt(rows_JRK.square().sum(-1, keepdim=True) + EPSILON)
