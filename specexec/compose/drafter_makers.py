"""Makers of the drafters that are models: the registry names them, and a kit says what they are made from."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from functools import partial

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

import offload as weights
from specexec.drafters.few_bits import Form, quantised
from specexec.drafters.heads.lattice import LatticeDrafter
from specexec.drafters.heads.masks import Masks
from specexec.drafters.kit import Draft, DrafterKit
from specexec.drafters.protocol import Drafter
from specexec.drafters.ranking import Named
from specexec.drafters.sibling import SiblingDrafter
from specexec.drafters.skip import QUESTIONS, Terms, best_sublayers, skipping
from specexec.drafters.substitute import substituting
from specexec.drafters.translated import TranslatedDrafter
from specexec.drafters.trimmed_head import TrimmedHead
from specexec.errors import BadDrafter
from specexec.model.sublayers import names_of, sizes_of
from specexec.model.tree_lm import TreeLM
from specexec.sizes import PARD_PLACES, SKIP_SHARE
from specexec.text.tokenizer import Encoding
from specexec.text.vocabularies import Nameable, nameable


def from_model(kit: DrafterKit) -> Drafter:
    """A model of its own, whose ids may mean something else."""
    draft = kit.draft
    assert draft is not None
    if draft.vocabulary.wordings is not None:
        return TranslatedDrafter(draft.lm, *draft.vocabulary.wordings, draft.name, kit.window)
    ids = nameable(kit.encoding.tokenizer, [kit.target.vocabulary, draft.lm.vocabulary], draft.vocabulary.differing)
    mask = getattr(draft.lm.model.config, "pard_token", None)
    if mask is not None:
        return _masked(kit, draft, mask, ids)
    trimmed = None
    if kit.draft_vocab:
        trimmed = TrimmedHead(draft.lm, ids.rows, kit.draft_vocab, kit.stop_tokens, kit.memory, ids.never)
    return SiblingDrafter(
        draft.lm, ids.rows, kit.ranking, draft.name, trimmed, kit.cascade, ids.never, window=kit.window
    )


def _masked(kit: DrafterKit, draft: Draft, mask: object, ids: Nameable) -> Drafter:
    """A model that was trained to guess several tokens in one pass (PARD)."""
    lm = draft.lm
    if not isinstance(mask, int) or not 0 <= mask < lm.vocabulary:
        raise BadDrafter(
            f"the pard_token of {draft.name} is {mask!r}, it has {lm.vocabulary} tokens.", hint="another drafter model."
        )
    if kit.draft_vocab:
        raise BadDrafter(
            f"--draft-vocab trims no model that guesses several tokens at once ({draft.name}).", hint="Leave it out."
        )
    masks = Masks(lm, mask, PARD_PLACES, window=kit.window)
    return LatticeDrafter(masks, Named(lm.vocabulary, ids.rows, ids.never, lm.device), kit.ranking, draft.name)


def from_sublayers(kit: DrafterKit) -> Drafter:
    """Some of the target's own attentions and MLPs: the set that was found, or is searched for now."""
    assert isinstance(kit.target, TreeLM)
    layers = [weights.skeleton_layer(kit.model, i) for i in range(weights.stream_of(kit.model).layers)]
    size_LS = sizes_of(layers)
    resident_L = np.array([weights.is_resident(kit.model, i) for i in range(len(layers))])
    terms = Terms(
        copy_LS=np.where(resident_L[:, None], 0, size_LS),
        size_LS=size_LS,
        head_B=sum(weight.nbytes for weight in kit.model.get_output_embeddings().parameters()),
        most_B=int(SKIP_SHARE * kit.files_B),
        whole=any(names_of(layer) is None for layer in layers),
        rows=kit.context,
    )
    name = f"{kit.model.config.to_json_string()} {kit.files_B}"
    asked = questions(kit.encoding)
    kept_LS = best_sublayers(kit.target, terms, asked, name, kit.searches, kit.on_searched)
    layer_of, ids = partial(weights.resident_layer, kit.model), kit.names
    return skipping(kit.target, layer_of, kept_LS, ids.rows, kit.ranking, kit.cascade, ids.never, kit.window)


def from_few_bits(kit: DrafterKit) -> Drafter:
    """The target's own layers, those that stream as copies in few bits."""
    assert isinstance(kit.target, TreeLM)
    resident_L = [weights.is_resident(kit.model, i) for i in range(weights.stream_of(kit.model).layers)]
    # Where nothing streams, copies are there to be read faster.
    shared_L = resident_L if not all(resident_L) else [False] * len(resident_L)
    made = in_few_bits(kit.model, shared_L, kit.target.device, kit.form, kit.on_quantised)
    name = "substitute" if kit.form == "nf4" else f"substitute-{kit.form}"
    ids = kit.names
    return substituting(kit.target, made, ids.rows, kit.ranking, kit.cascade, name, ids.never, kit.window)


def in_few_bits(
    model: PreTrainedModel,
    shared_L: Items[bool],
    device: torch.device,
    form: Form,
    on_quantised: Callable[[int, int], None],
) -> dict[int, nn.Module]:
    """The layers of a model to draft with: those that are not shared quantised, one at a time."""
    made: dict[int, nn.Module] = {}
    for i, shared in enumerate(shared_L):
        one = weights.resident_layer(model, i)  # dense until it has been quantised
        made[i] = one if shared else quantised(one, device, form)
        on_quantised(i + 1, len(shared_L))
    return made


def questions(encoding: Encoding) -> list[list[int]]:
    """What a model is asked so that it writes something typical of it: through its chat template if it has one."""
    chat = encoding.template is not None
    return [encoding.encode([{"role": "user", "content": one}] if chat else one) for one in QUESTIONS]
