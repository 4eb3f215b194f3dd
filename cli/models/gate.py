"""Whether a model can run, checked by every command that is given one: the same refusals in the same words.

For usual models config.json is enough; about others transformers itself is asked, which takes seconds.
"""

from __future__ import annotations

from offload.checkpoint.documents import check_documents
from offload.checkpoint.headers import Folder
from offload.checkpoint.quantized.stored import refuse_unknown
from offload.hub.headers_only import list_model
from offload.hub.names import is_here
from specexec.errors import UnsupportedArchitecture
from specexec.model.architecture import context_for, is_usual


def check(folder: Folder, *, trees: bool, ctx: int | None = None, trust_remote_code: bool = False) -> None:
    """Raise what loading the model would raise, with `trees` of guesses or without."""
    if is_usual(folder.config):
        if folder.here:
            check_documents(folder.path)
        refuse_unknown(folder)
        longest = folder.config.get("max_position_embeddings")
        context_for(ctx, longest if isinstance(longest, int) else 2**31 - 1)
    elif folder.here or not trust_remote_code:  # code that is trusted cannot be asked before it is here
        from specexec.compose.gate import admit

        admit(folder, trees=trees, ctx=ctx, trust_remote_code=trust_remote_code)


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
