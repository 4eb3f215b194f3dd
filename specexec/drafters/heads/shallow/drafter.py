"""Heads without layers as drafters: the last state of a text, once for each sweep, and paths of guesses behind it.

What does not depend on the path is a lattice of its own; what does is added to one that knows nothing.
N rows   H hidden size   K tokens of a path   P places   S tokens that are named
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from specexec.drafters.heads.features import HeadFeatures, TextStates
from specexec.drafters.heads.filled import TargetSizes, fill
from specexec.drafters.heads.following import Kept, Path
from specexec.drafters.heads.lattice import Filled, LatticeDrafter
from specexec.drafters.heads.masks import MaskFeatures, Masks
from specexec.drafters.heads.refusal import TargetShape, unread
from specexec.drafters.heads.self_check import SelfCheck
from specexec.drafters.heads.shallow.fields import HYDRA, HYDRA_PREFIX, MEDUSA, MLP, REDRAFTER, ShallowFields, own_names
from specexec.drafters.heads.shallow.hydra import Hydra
from specexec.drafters.heads.shallow.medusa import Medusa
from specexec.drafters.heads.shallow.mlp_speculator import MlpSpeculator
from specexec.drafters.heads.shallow.prefix import layer_in_front
from specexec.drafters.heads.shallow.redrafter import ReDrafter
from specexec.drafters.kit import DrafterKit
from specexec.drafters.protocol import Drafter
from specexec.drafters.ranking import Named, Ranking
from specexec.model.tree_lm import TreeLM
from specexec.sizes import CANDIDATES, HEAD_ROWS
from specexec.text.sequence import Sequence

NETWORKS: Mapping[str, type[Medusa | Hydra | MlpSpeculator | ReDrafter]] = {
    MEDUSA: Medusa, HYDRA: Hydra, HYDRA_PREFIX: Hydra, MLP: MlpSpeculator, REDRAFTER: ReDrafter
}  # fmt: skip


class Network(Protocol):
    """What guesses behind paths of tokens that follow a state of the target."""

    @property
    def follows(self) -> bool:
        """Whether it matters which tokens they are."""
        ...

    def __call__(self, states_NH: Tensor, tokens_NK: Tensor) -> Tensor:
        """Logits [N, S] behind paths of K tokens, the first of which the target chose."""
        ...


@dataclass(frozen=True)
class Behind:
    """Guesses behind paths (following.py), by a network and the state that they follow."""

    network: Network
    most: int = CANDIDATES

    @torch.no_grad()
    def logits(self, logits_S: Tensor, hidden_BH: Tensor, row: int, paths: Items[Path], kept: Kept) -> Tensor:
        tokens_NK = torch.tensor(paths, device=hidden_BH.device)
        found_NS = self.network(hidden_BH[-1].expand(len(paths), -1), tokens_NK)
        return logits_S + found_NS[:, : len(logits_S)].to(logits_S)


class LastState:
    """The lattice behind a text by the target's last hidden state, or by what the layer `front` makes of it."""

    def __init__(
        self,
        fields: ShallowFields,
        network: Network,
        target: TreeLM,
        check: SelfCheck | None = None,
        front: TreeLM | None = None,
        window: int | None = None,
    ) -> None:
        self.context = target.context
        self._fields, self._network = fields, network
        self._states = TextStates(target, fields.readings[0], range(fields.vocabulary), check=check)
        self._front: Masks | None = None
        if front is not None:
            features = HeadFeatures(front, self._states, partial(_behind_rows, front, network))
            self._front = Masks(front, 0, 1, MaskFeatures(features), window)

    @torch.no_grad()
    def fill(self, sequence: Sequence) -> Filled | None:
        """None where the target has not read the text, or the head is of another model."""
        state_1H = self._last(sequence)
        if state_1H is None:
            return None
        if self._network.follows:
            shape = self._fields.places, self._fields.vocabulary
            return Filled(state_1H.new_zeros(shape, dtype=torch.float32), state_1H)
        paths = (torch.zeros(1, place + 1) for place in range(self._fields.places))
        return Filled(torch.cat([self._network(state_1H, path_1K).float() for path_1K in paths]), state_1H)

    def _last(self, sequence: Sequence) -> Tensor | None:
        """The state that guesses follow, [1, H]."""
        if self._front is not None:
            filled = self._front.fill(sequence)
            return None if filled is None else filled.logits_PS.to(filled.hidden_BH.dtype)
        if self._states.refused or not self._states.ready(sequence):
            return None
        self._states.settle(sequence, self._guessed)
        end = len(sequence.tokens) - 1
        return self._states.between(sequence, end - 1, end)

    def _guessed(self, states_RH: Tensor, tokens: Items[int]) -> Iterator[Tensor]:
        read_R1 = torch.tensor(tokens, device=states_RH.device)[:, None]
        for few_RH, few_R1 in zip(states_RH.split(HEAD_ROWS), read_R1.split(HEAD_ROWS), strict=True):
            yield self._network(few_RH, few_R1)


def _behind_rows(front: TreeLM, network: Network, hidden_RH: Tensor, read_R: Tensor) -> Tensor:
    """What a network guesses behind rows of the layer in front of it, and the token of each."""
    return network(front.head(hidden_RH).to(hidden_RH.dtype), read_R[:, None])


@dataclass(frozen=True)
class Shallow:
    """A head that is loaded; `front` is the layer of Hydra++."""

    fields: ShallowFields
    network: Network
    name: str
    front: TreeLM | None = None

    def drafter(
        self,
        target: TreeLM,
        named: Named,
        ranking: Ranking | None = None,
        check: SelfCheck | None = None,
        window: int | None = None,
    ) -> LatticeDrafter:
        """It guesses for its target; one that is not checked reads what it is published with."""
        filler = LastState(self.fields, self.network, target, check, self.front, window)
        following = Behind(self.network) if self.network.follows else None
        return LatticeDrafter(filler, named, ranking, self.name, following)


def loaded(settings: Mapping[str, object], tensors: Mapping[str, Tensor], target: TreeLM, name: str) -> Shallow:
    """The head for this target.

    `tensors` under published names. Raises BadDrafter, by name, where it has other parts than these or other shapes.
    """
    sizes = TargetSizes.of(target)
    shape = TargetShape(int(target.model.config.num_hidden_layers), sizes.hidden, len(sizes.embeddings_VH))
    fields = ShallowFields.of(settings, {key: tuple(one.shape) for key, one in tensors.items()}, shape, name)
    own = {own: tensors[key] for key, own in own_names(fields.kind, tensors, fields.tied).items()}
    with torch.device("meta"):
        network = NETWORKS[fields.kind](fields, own, sizes)
    if isinstance(network, Hydra) and fields.kind == HYDRA_PREFIX:
        return Shallow(fields, network, name, layer_in_front(target, network, own, name))
    fill(network, own, sizes, partial(unread, fields.kind, name))
    return Shallow(fields, network, name)


def make(kit: DrafterKit) -> Drafter:
    """A head from a folder of its own, for this target."""
    assert isinstance(kit.target, TreeLM)
    assert kit.head is not None
    target, ids, found = kit.target, kit.names, kit.head
    head = loaded(found.settings, found.tensors(), target, found.name)
    named = Named(head.fields.vocabulary, ids.rows, ids.never, target.device)
    return head.drafter(target, named, kit.ranking, SelfCheck(found.name, head.fields.readings), kit.window)
