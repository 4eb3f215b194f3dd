"""Whether a model can run, checked by every command that is given one: the same refusals in the same words.

For usual models config.json is enough; about others transformers itself is asked, which takes seconds.
"""

from __future__ import annotations

from pathlib import Path

from cli.engine.imports import lean_imports
from offload.checkpoint.documents import AGAIN, check_documents, templates_in
from offload.checkpoint.headers import Folder
from offload.checkpoint.quantized.stored import refuse_unknown
from offload.checkpoint.roles import LAYER
from offload.errors import BadModelDir
from offload.hub.headers_only import list_model
from offload.hub.names import is_here
from specexec.compose.head_folders import refuse_as_model
from specexec.errors import UnsupportedArchitecture
from specexec.model.architecture import can_branch, context_for, is_usual
from specexec.text.templates import damage


def check(folder: Folder, *, trees: bool, ctx: int | None = None, trust_remote_code: bool = False) -> bool:
    """Whether the model verifies trees, as far as is known before it is tried.

    Raises what loading would raise, with trees or without.
    """
    if folder.here:
        check_documents(folder.path)
        _check_templates(folder.path)
    refuse_as_model(folder)
    if folder.wrapper is None and is_usual(folder.config):
        refuse_unknown(folder)
        _refuse_foreign(folder)
        longest = folder.config.get("max_position_embeddings")
        context_for(ctx, longest if isinstance(longest, int) else 2**31 - 1)
        return True
    if not folder.here and trust_remote_code:  # code that is trusted cannot be asked before it is here
        return True
    with lean_imports():
        from specexec.compose.gate import admit
        from specexec.model.remote_code_check import is_tried
    design = admit(folder, trees=trees, ctx=ctx, trust_remote_code=trust_remote_code)
    tried = is_tried(folder.architecture, design.own_code)
    return tried and can_branch(design.model_class, design.config)


def _check_templates(path: Path) -> None:
    """Raise BadModelDir for a chat template of the folder that no conversation could be rendered with."""
    for template in templates_in(path):
        if why := damage(template):
            raise BadModelDir(f"the chat template of {path} is damaged: {why}.", None, AGAIN)


def _refuse_foreign(folder: Folder) -> None:
    if not any(LAYER.search(name) for name in folder.entries):
        file = next(iter(folder.file_sizes))
        raise BadModelDir(
            f"{file} holds nothing of a {folder.model_type} model: no tensor is part of a layer.",
            f"It has {len(folder.entries)} tensors, such as '{next(iter(folder.entries))}'.",
            "download config.json and the weights from the same revision.",
        )


def check_name(name: str, *, offline: bool, trust_remote_code: bool) -> None:
    """The same before a download, for a model that is not here; without trees, since it may be used so."""
    if offline or is_here(name):
        return
    check(list_model(name), trees=False, trust_remote_code=trust_remote_code)


def only_plainly(folder: Folder, trust_remote_code: bool = False) -> str | None:
    """Why a model that passes runs without guesses only; None for one that verifies trees."""
    try:
        check(folder, trees=True, trust_remote_code=trust_remote_code)
    except UnsupportedArchitecture as refusal:
        return f"{refusal.what} Try: {refusal.hint}"
    return None
