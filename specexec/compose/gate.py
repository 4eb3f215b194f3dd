"""Whether a model can run here, from its config and headers: one answer for every command. Builds and loads nothing."""

from __future__ import annotations

import offload as weights
from specexec.compose.head_folders import refuse_as_model
from specexec.model.architecture import check_any_support, check_tree_support, context_for, longest_text


def admit(
    folder: weights.Folder, *, trees: bool, ctx: int | None = None, trust_remote_code: bool = False
) -> weights.Design:
    """The design of a model that can be loaded, with `trees` of guesses or without, its files here or not yet.

    Raises what loading would raise: BadModelDir, UnsupportedArchitecture, RemoteCode, ContextLengthExceeded.
    """
    if folder.here:
        weights.check_documents(folder.path)
    refuse_as_model(folder)
    weights.refuse_unknown(folder)
    design = weights.design(folder, trust_remote_code)
    check_any_support(design.config)
    if trees:
        check_tree_support(design.model_class, design.config)
    context_for(ctx, longest_text(design.config))
    return design
