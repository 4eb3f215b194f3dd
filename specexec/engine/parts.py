"""What an engine is made of. Names and shapes only: compose fills them in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from transformers import PreTrainedModel

from specexec.drafters.cost import CostModel
from specexec.drafters.protocol import Drafter
from specexec.drafters.retrieval.memory import Memory
from specexec.engine.step_accounting import Meter
from specexec.model.chain_lm import ChainLM
from specexec.model.tree_lm import TreeLM
from specexec.planning.best_first import Planner
from specexec.planning.memory_room import Room
from specexec.sampling.model_defaults import Defaults
from specexec.sampling.processors import History
from specexec.sampling.verify import Acceptance, Opinion
from specexec.text.sequence import Sequence
from specexec.text.tokenizer import Encoding


class Placed(Protocol):
    """Where weights live (offload's Placement)."""

    @property
    def summary(self) -> str: ...


class Weights(Protocol):
    """The target's weights as they stream (offload's ModelStream)."""

    @property
    def placement(self) -> Placed: ...

    @property
    def layers(self) -> int: ...

    @property
    def bytes_per_sweep(self) -> int: ...

    def stats(self) -> Meter: ...

    def unwaited(self) -> AbstractContextManager[None]: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Parts:
    """What an engine is made of. `folders` says where target and drafters came from, by role; `drafts` are those of the
    drafters that speak the target's token ids. `sources` is how --drafter would name who guesses, and `reason` why
    `auto` took them; it is empty where they were asked for. `own_code`: the target is computed by code from its folder.
    `compute`: how its linears in int8 multiply. `kv_quant`: bits of its keys and values, None as computed. `adapters`:
    what was added to weights, FOLDER or FOLDER:scale, by role. `lossy`: what was asked for that changes texts, as it is
    typed, `walk` what of a tree becomes text, `shorten` what of a prompt is read, and `thin` which tokens of it keep
    their keys and values (none named: all).
    """

    name: str
    toy: bool
    folders: Mapping[str, Path]
    encoding: Encoding
    defaults: Defaults
    model: PreTrainedModel
    stream: Weights
    target: TreeLM | ChainLM
    drafts: Mapping[str, TreeLM]
    drafter: Drafter
    planner: Planner
    sources: str
    reason: str
    budget: int | Literal["auto"]
    cost: CostModel
    context: int
    room: Room
    memory: Memory | None
    exact: bool
    own_code: bool
    compute: str
    kv_quant: int | None
    adapters: Mapping[str, tuple[str, ...]]
    lossy: tuple[str, ...]
    walk: Callable[[Opinion, History], Acceptance]
    shorten: Callable[[list[int]], list[int]]
    thin: Callable[[Sequence], list[int]]
