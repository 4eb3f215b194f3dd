"""What drafters are made from: the maker of each (registry.py) is given one kit and takes what it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from specexec.drafters.cascade import Cascade
from specexec.drafters.few_bits import Form
from specexec.drafters.ranking import Ranking
from specexec.drafters.retrieval.memory import Memory
from specexec.model.chain_lm import ChainLM
from specexec.model.tree_lm import TreeLM
from specexec.text.token_bytes import Wording
from specexec.text.tokenizer import Encoding
from specexec.text.vocabularies import Nameable, nameable


@dataclass(frozen=True)
class DraftVocabulary:
    """What a drafter's ids mean: the same as the target's, but for `differing`, or what its own tokenizer says."""

    differing: frozenset[int] = frozenset()
    wordings: tuple[Wording, Wording] | None = None  # the target's and the drafter's own


@dataclass(frozen=True)
class Draft:
    """A model that drafts: what the engine and what people call it, and what its ids mean."""

    role: str
    name: str
    folder: Path
    lm: TreeLM
    vocabulary: DraftVocabulary


class ReadingOrder(Protocol):
    """How such layers read what they read (offload's)."""

    @property
    def hidden_first(self) -> bool: ...

    @property
    def before_norm(self) -> bool: ...


class BroughtLayers(Protocol):
    """Layers of one step that came with the target, and the settings of a model that ends in them (offload's)."""

    @property
    def layers(self) -> tuple[nn.Module, ...]: ...

    @property
    def config(self) -> PretrainedConfig: ...

    @property
    def layout(self) -> ReadingOrder: ...


class HeadSource(Protocol):
    """A head that lies in a folder of its own: what its config.json says, its name, and its tensors."""

    @property
    def settings(self) -> Mapping[str, object]: ...

    @property
    def name(self) -> str: ...

    def tensors(self) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True)
class DrafterKit:
    """Everything that some drafter is made from."""

    model: PreTrainedModel
    """The target as offload loaded it."""
    files_B: int
    """Of the target's weights."""
    target: TreeLM | ChainLM
    encoding: Encoding
    context: int
    """Tokens that prompt and answer may have together."""
    memory: Memory | None
    """What has been written before, where a drafter looks it up."""
    window: int | None
    """The last tokens of a text that a drafter with keys and values of its own sees at least."""
    draft_vocab: int | None
    """The most frequent tokens that a drafter model's head keeps."""
    form: Form
    """Number format of copies of the target's layers."""
    searches: MutableMapping[str, NDArray[np.generic]]
    """What earlier searches found; new ones are added."""
    mtp_layer: Callable[[], BroughtLayers]
    """Reads the layer that guesses further ahead."""
    on_quantised: Callable[[int, int], None]
    on_searched: Callable[[int, int], None]
    stop_tokens: frozenset[int] = frozenset()
    ranking: Ranking = field(default_factory=Ranking)
    """How a drafter model ranks the children of a node."""
    draft: Draft | None = None
    """The model that a maker of kind `model` is to draft with."""
    head: HeadSource | None = None
    """The head in the folder that was named instead of a model."""

    @property
    def names(self) -> Nameable:
        """What the target itself may name as a drafter."""
        return nameable(self.encoding.tokenizer, [self.target.vocabulary])

    @property
    def cascade(self) -> Cascade:
        """Guesses that a drafter model checks before the target does."""
        return Cascade(self.memory)
