"""SpecReason (Pan et al. 2025): the drafter writes a step of a thought, the target scores it while it checks it.

A step is a chain below the text that ends at a blank line. A question about it hangs below its end, as one more branch.
If the target's score is high enough, the step becomes text as it is; of any other step its longest exact prefix does,
so that with a threshold of infinity every text is exact. Knows no device and no file.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from specexec.drafters.cost import CostModel
from specexec.drafters.protocol import Ask, Drafter
from specexec.errors import BadMessages, BadOption
from specexec.lossy.asked import BEST
from specexec.planning.budget import Budget, FixedBudget
from specexec.sampling.processors import History
from specexec.sampling.verify import Acceptance, Opinion, walk
from specexec.sizes import MOST_NODES, drafted
from specexec.text.sequence import Sequence
from specexec.tree.growing import Growth
from specexec.tree.tree import TokenTree

if TYPE_CHECKING:
    from specexec.text.tokenizer import Encoding

LONGEST = 128  # tokens of a step; a longer one is scored in pieces
LEAST = 16  # tokens of a step that must fit beside the question
ASKED = (
    "Look at the last step of your answer so far. Is it correct, and does it lead to the solution? Ignore its style. "
    f"Give it a score from 0 (wrong) to {BEST} (right), as one digit and nothing else."
)
FORCED = "Score:"


@dataclass(frozen=True)
class ScoreQuestion:
    """Tokens that follow a step and ask for its score, and the token of each score from 0 on."""

    tokens: tuple[int, ...]
    digits: tuple[int, ...]

    @classmethod
    def of(cls, encoding: Encoding) -> ScoreQuestion:
        """As the model's chat template asks, where it has one. Raises BadOption where digits are no single tokens."""
        asked = [encoding.encode_rest(f"{_question(encoding)} {digit}") for digit in range(BEST + 1)]
        before = asked[0][:-1]
        digits = [each[-1] for each in asked]
        if len({*digits}) < len(digits) or any(each[:-1] != before for each in asked):
            raise BadOption("lossy steps need a tokenizer that has a token for each digit; this model's has not.")
        return cls(tuple(before), tuple(digits))

    def score(self, logits_V: Tensor) -> float:
        """The mean of the scores, each as likely as the target finds it among them; `logits_V` follow `tokens`."""
        return float(logits_V[list(self.digits)].softmax(-1) @ torch.arange(BEST + 1.0, device=logits_V.device))


def _question(encoding: Encoding) -> str:
    """What ends an answer and asks about it, up to the score."""
    try:
        one, other = (
            encoding.render(
                [
                    {"role": "user", "content": "Go on."},
                    {"role": "assistant", "content": said},
                    {"role": "user", "content": ASKED},
                ]
            )
            for said in ("Yes", "No")
        )
    except BadMessages:  # no template, or one that knows no dialogue
        return f"\n\n{ASKED}\n{FORCED}"
    same = takewhile(lambda pair: pair[0] == pair[1], zip(reversed(one), reversed(other), strict=False))
    return "".join(letter for letter, _ in same)[::-1] + FORCED


@dataclass(frozen=True)
class _Step:
    """The last node of a step, and of the question about it."""

    end: int
    asked: int


class Steps:
    """Plans steps instead of trees, and judges them: a planner, and the walk of its trees.

    `least`: the score of a step that is kept. `decode` makes text of tokens.
    """

    def __init__(self, least: float, question: ScoreQuestion, decode: Callable[[list[int]], str]) -> None:
        self.least, self.question = least, question
        self._decode = decode
        self._steps: WeakKeyDictionary[TokenTree, _Step] = WeakKeyDictionary()

    def grow(self, drafter: Drafter, live: Items[Sequence], budget: Budget, cost: CostModel) -> list[TokenTree]:
        """A step for every sequence, written by the drafter alone; all sequences go through a pass together."""
        for one in live:
            one.growth = Growth()
        most = {one: self._longest(one, drafter, _nodes(budget, one, len(live))) for one in live}
        open_, ended = [one for one in live if most[one] > 0], set[Sequence]()
        while open_:
            asks = [Ask(one, one.growth.tree, [len(one.growth.tree) - 1]) for one in open_]
            for ask, guess in zip(asks, drafter.guess(asks, 1), strict=True):
                ask.sequence.growth.add(ask.nodes, guess.tokens_NK[:, :1], guess.log_probs_NK[:, :1], -np.inf)
            went_on = [ask.sequence for ask in asks if len(ask.sequence.growth.tree) > len(ask.tree)]
            ended |= {one for one in went_on if self._ends(one) or len(one.growth.tree) == most[one]}
            open_ = [one for one in went_on if one not in ended]
        return [self._with_question(one, _nodes(budget, one, len(live)), one in ended) for one in live]

    def grow_on(
        self, drafter: Drafter, live: Items[Sequence], trees: Items[TokenTree], until: Callable[[], bool]
    ) -> None:
        """Nothing: where a step ends is not known yet."""

    def walk(self, opinion: Opinion, history: History) -> Acceptance:
        """A step that was found good enough, and what the target chooses behind it; else what `walk` accepts."""
        step = self._steps.pop(opinion.tree, None)
        if step is None or self.question.score(opinion.unconstrained(step.asked)) < self.least:
            return walk(opinion, history)
        return walk(opinion, history, opinion.tree.path(step.end))

    def _longest(self, one: Sequence, drafter: Drafter, nodes: int) -> int:
        """Tokens that a step may have: guesses that fit beside the question, and are worth it."""
        room = min(one.room - 1, drafter.context - len(one.tokens), drafted(nodes))
        beside = nodes - len(self.question.tokens)
        return min(LONGEST, room, beside if beside >= LEAST else nodes)

    def _ends(self, one: Sequence) -> bool:
        tokens = one.growth.tree.tokens
        return tokens[-1] in one.stop_tokens or "\n\n" in self._decode(tokens).lstrip()

    def _with_question(self, one: Sequence, nodes: int, ended: bool) -> TokenTree:
        """The step, and the question below it; what a grammar rules stays exact, and so does what is no whole step."""
        tree = one.growth.tree
        end = len(tree) - 1 - (len(tree) > 0 and tree.tokens[-1] in one.stop_tokens)  # the target itself ends a text
        asked = self.question.tokens
        if not ended or end < 0 or one.parse is not None or len(tree) + len(asked) > nodes:
            return tree
        below = [end, *range(len(tree), len(tree) + len(asked) - 1)]
        reach = [*tree.reach_N, *([tree.reach_N[end]] * len(asked))]
        whole = TokenTree.of([*tree.tokens, *asked], [*tree.parents, *below], reach)
        self._steps[whole] = _Step(end, len(whole) - 1)
        return whole


def _nodes(budget: Budget, one: Sequence, texts: int) -> int:
    """Guesses that one of so many texts may have in a sweep."""
    most = min(one.most_nodes, MOST_NODES // texts)
    return min(most, budget.nodes) if isinstance(budget, FixedBudget) else most
