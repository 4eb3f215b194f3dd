"""What a trunk is given where a sweep holds rows of images: embeddings instead of ids, and what a family adds to them.

R packed rows, those that fill the last tile included   H hidden size   A axes of positions
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specexec.model.architecture import LayerKind
from specexec.model.image_rows import ImageRun, Images


def seeing(kinds: Items[LayerKind], images: Images | None) -> list[LayerKind]:
    """The kinds of a model's layers once it is given images."""
    together = "no" if images is None else images.sight.together
    return [
        replace(kind, together=together == "all" or (together == "window" and kind.window is not None))
        for kind in kinds
    ]


def inputs_of(
    trunk: nn.Module, images: Images, runs: Items[ImageRun], given: Mapping[str, Tensor], grid_AR: Tensor | None
) -> dict[str, Any]:
    """Keyword arguments of the trunk, in place of those of a sweep without images.

    `given` are its input_ids and position_ids, int64 [1, R]; `runs` are places among the packed rows, and `grid_AR`
    positions of those that are no filling.
    """
    ids_1R, positions_1R = given["input_ids"], given["position_ids"]
    R = ids_1R.shape[1]
    changed: dict[str, Any] = {}
    if grid_AR is not None:
        filling = grid_AR[:, -1:].expand(len(grid_AR), R - grid_AR.shape[1])
        on_grid_A1R = torch.cat([grid_AR, filling], dim=1).unsqueeze(1)
        alone = images.sight.beside  # the others take positions of the text before those of the axes
        changed["position_ids"] = on_grid_A1R if alone else torch.cat([positions_1R.unsqueeze(0), on_grid_A1R])
    if not runs:
        return changed
    config = cast(PreTrainedModel, trunk).config
    ids_1R = ids_1R.clone()
    is_image_R = torch.zeros(R, dtype=torch.bool, device=ids_1R.device)
    for run in runs:
        is_image_R[run.start : run.stop] = True
    padding: int | None = getattr(config, "pad_token_id", None)
    ids_1R[0, is_image_R] = padding or 0
    embeds_1RH: Tensor = cast(PreTrainedModel, trunk).get_input_embeddings()(ids_1R)
    seen = [(images.seen(run.number), slice(run.row, run.row + run.stop - run.start)) for run in runs]
    embeds_1RH[0, is_image_R] = torch.cat([one.rows_RH[rows] for one, rows in seen]).to(embeds_1RH)
    changed |= {"input_ids": None, "inputs_embeds": embeds_1RH}
    if deeper := len(seen[0][0].deeper):
        changed["visual_pos_masks"] = is_image_R.unsqueeze(0)
        changed["deepstack_visual_embeds"] = [
            torch.cat([one.deeper[layer][rows] for one, rows in seen]) for layer in range(deeper)
        ]
    if images.sight.by_layer and getattr(config, "hidden_size_per_layer_input", None):
        changed["per_layer_inputs"] = cast(Any, trunk).get_per_layer_inputs(ids_1R, embeds_1RH)
    return changed
