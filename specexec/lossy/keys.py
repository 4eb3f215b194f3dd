"""SpecKV (Galim et al. 2025): the drafter's attention chooses what the target keeps of the keys and values of a prompt.

The target reads the whole prompt, and guesses nothing meanwhile. Then only a part of its rows stays, the same in every
layer and each at its own position; what is written sees no others. The paper lets the target's own attention choose,
for each of its heads; here it is the drafter's, so that it is the same wherever the target's keys and values lie.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Items
from dataclasses import dataclass

from specexec.errors import UnsupportedArchitecture
from specexec.lossy.prompts import LOOKING, counted, looked_at, most_wanted
from specexec.model.architecture import LayerKind
from specexec.model.tree_lm import TreeLM
from specexec.text.sequence import Sequence

AHEAD = 32  # tokens that the drafter writes behind a prompt, and that look at it too


@dataclass(frozen=True)
class KeptKeys:
    """A `share` of the rows of long prompts stays, what `drafter` looks at; those of `always`, control tokens, and the
    `last` ones stay in any case.
    """

    share: float
    drafter: TreeLM
    always: Collection[int]
    last: int

    def check(self, tokens: Items[int]) -> None:
        """Raises ContextLengthExceeded for a prompt that the drafter cannot choose from."""
        counted(self.share, tokens, self.drafter)

    def of(self, sequence: Sequence) -> list[int]:
        """Which tokens of the prompt keep their rows, ascending; empty: all. The drafter has read it then."""
        tokens = sequence.tokens[: sequence.prompt_length]
        count = max(counted(self.share, tokens, self.drafter), min(self.last, len(tokens)))
        if count == len(tokens) or sequence.images is not None or sequence.sampling.prompt_logprobs:
            return []
        wanted_R = looked_at(self.drafter, tokens, AHEAD, self.always, sequence.cache(self.drafter))
        kept = most_wanted(wanted_R, tokens, count, self.always, self.last)
        return kept if len(kept) < len(tokens) else []


def last_rows(kinds: Items[LayerKind]) -> int:
    """How many last rows of a prompt have to stay: what layers with a window see, which are then left as they are.

    Raises UnsupportedArchitecture for layers that find keys by their places, and where no layer sees a whole prompt.
    """
    if any(kind.index or kind.compressed for kind in kinds):
        raise UnsupportedArchitecture(
            "--lossy kv=X leaves out keys and values, and layers of this model find them by their places: they attend "
            "to chosen keys, or to whole blocks.",
            hint="leave it out, or --lossy prompt=X.",
        )
    if not any(kind.attends and kind.window is None and kind.chunk is None for kind in kinds):
        raise UnsupportedArchitecture(
            "--lossy kv=X leaves out keys and values of a long prompt, and no layer of this model sees all of one.",
            hint="leave it out.",
        )
    return max(LOOKING, *(size or 0 for kind in kinds for size in (kind.window, kind.chunk)))
