"""The target's choices along a tree, and the walk along the nodes it agrees with. Knows no drafter.

The walk asks the target for its own choice at the end of the text, follows it into the tree while a child carries it,
and stops at the first choice not guessed: that token is emitted too. Any tree gives the same text (SpecExec, 2024).
M = N + 1 rows: the end of the text, then the nodes   H hidden size   V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from specexec.errors import BadSampling, BrokenLogits, SpecexecError
from specexec.sampling.noise import Noise
from specexec.sampling.params import SamplingParams
from specexec.sampling.processors import History, processed
from specexec.sampling.scores import at_an_edge, compared, constrained, with_noise
from specexec.sizes import HEAD_ROWS
from specexec.tree.tree import ROOT, TokenTree

if TYPE_CHECKING:
    from specexec.sampling.grammar import Parse

# Of a node, its scores, how new logits become scores, and whether filters decide by less than so much: what counts.
Settle: TypeAlias = Callable[[int, Tensor, Callable[[Tensor], Tensor], Callable[[float], bool]], Tensor]


@dataclass(frozen=True)
class Acceptance:
    """One walk: the accepted nodes from the text down, and their tokens plus the target's last, unguessed choice.

    `failure` says why there is no choice after the last token, if that is where the walk ended. `replaced` are the
    places of tokens that the target would not have chosen: none, unless the walk was told to take them.
    """

    path: tuple[int, ...]
    tokens: tuple[int, ...]
    failure: SpecexecError | None = None
    replaced: tuple[int, ...] = ()


def check_finite(best: Tensor) -> None:
    """Raise BrokenLogits unless the maxima of N rows, [N], are finite. A damaged weight shows here at the latest: the
    argmax over NaN would silently become text."""
    if not bool(torch.isfinite(best).all()):
        raise BrokenLogits(
            "the target's logits are not finite (NaN or infinity).",
            why="A damaged weight file or a dtype with too small a range does this.",
            hint="--dtype bf16 or f32, or download the model again.",
        )


class Opinion:
    """The target's choices at every node of one tree, given its final hidden states [M, H].

    `position` is that of the first token to choose, `parse` says what a grammar allows from there on. `settle`, where
    it is given, has the last word about a node's scores (exact_ties.py).
    `head` makes logits of hidden states, [R, H] → [R, V] float32; `logits_MV` are those of all rows, where they exist
    already: else they exist only for the rows a walk visits. Raises BrokenLogits where they are not finite.
    """

    def __init__(
        self,
        head: Callable[[Tensor], Tensor],
        hidden_MH: Tensor,
        tree: TokenTree,
        position: int,
        sampling: SamplingParams,
        noise: Noise,
        parse: Parse | None = None,
        settle: Settle | None = None,
        logits_MV: Tensor | None = None,
    ) -> None:
        assert len(hidden_MH) == len(tree) + 1
        self.tree = tree
        self._head = head
        self._hidden_MH = hidden_MH
        self._logits_MV = logits_MV
        self._positions = [position, *(position + 1 + tree.depth_N).tolist()]
        self._sampling = sampling
        self._noise = noise
        self._parse = parse
        self._settle = settle
        self._logits_V: dict[int, Tensor] = {}
        self.choices_M = self._unfiltered_choices()

    def _unfiltered_choices(self) -> list[int]:
        """argmax(logits + T * G) at every row, before penalties and filters: also what calibration learns from."""
        choices: list[int] = []
        for start in range(0, len(self._hidden_MH), HEAD_ROWS):
            rows = range(start, min(start + HEAD_ROWS, len(self._hidden_MH)))
            positions = self._positions[rows.start : rows.stop]
            scores_NV = with_noise(self._logits_of(rows), self._temperature, self._noise, positions)
            best = scores_NV.max(-1)
            check_finite(best.values)
            choices += best.indices.tolist()
        return choices

    def _logits_of(self, rows: Items[int]) -> Tensor:
        """The one place where a bias and a grammar enter: everything that is chosen is chosen from these, [N, V]."""
        which = slice(rows.start, rows.stop) if isinstance(rows, range) else list(rows)
        logits_NV = self._head(self._hidden_MH[which]) if self._logits_MV is None else self._logits_MV[which]
        return constrained(logits_NV, self._sampling, self._parse, self.tree, [row - 1 for row in rows])

    @property
    def penalised(self) -> bool:
        """Whether a choice depends on the tokens above it by more than the model's logits."""
        return self._sampling.penalised

    @property
    def _temperature(self) -> float:
        return self._sampling.temperature or 0.0

    def logits(self, node: int) -> Tensor:
        """The target's constrained logits after `node` (ROOT = after the text), [V] float32."""
        if node not in self._logits_V:
            # The walk will most likely go on where the unfiltered choices lead: one head call for all of them.
            rows = [node + 1]
            while (child := self.tree.child(rows[-1] - 1, self.choices_M[rows[-1]])) is not None:
                rows.append(child + 1)
            for row, logits_V in zip(rows, self._logits_of(rows), strict=True):
                self._logits_V[row - 1] = logits_V
        return self._logits_V[node]

    def unconstrained(self, node: int) -> Tensor:
        """The target's logits after `node` before any bias or grammar, [V] float32."""
        row = slice(node + 1, node + 2)
        return (self._head(self._hidden_MH[row]) if self._logits_MV is None else self._logits_MV[row])[0]

    def choice(self, node: int, history: History) -> int:
        """The target's own next token after `node`. Raises BadSampling where none is allowed."""
        as_it_is = not (self._sampling.penalised or (self._sampling.filtered and self._temperature))
        if as_it_is and self._settle is None:
            return self.choices_M[node + 1]
        scores_V = self._scores(node, self.logits(node), history)
        if self._settle is not None:
            scores_V = self._settle(
                node,
                scores_V,
                lambda raw_V: self._scores(node, self._allowed(node, raw_V), history),
                lambda unit: self._at_an_edge(node, history, unit),
            )
        best = int(scores_V.argmax())
        if scores_V[best] == float("-inf"):
            raise BadSampling(
                "no token may come next: what was asked for or generation_config.json forbids all of them.",
                hint="fewer of a grammar, suppressed tokens, bad words, min_tokens and no_repeat_ngram_size together.",
            )
        return best

    def _scores(self, node: int, logits_V: Tensor, history: History) -> Tensor:
        return compared(logits_V, self._sampling, history, self._noise, self._positions[node + 1])

    def _at_an_edge(self, node: int, history: History, unit: float) -> bool:
        (logits_V,) = processed(self.logits(node)[None], [history])
        return at_an_edge(logits_V, self._sampling, self._noise, self._positions[node + 1], unit)

    def _allowed(self, node: int, logits_V: Tensor) -> Tensor:
        return constrained(logits_V[None], self._sampling, self._parse, self.tree, [node])[0]


def walk(opinion: Opinion, history: History, taken: Items[int] = ()) -> Acceptance:
    """Follow the target's choices down the tree; `history` is that of the text above it, read only under penalties.
    Whatever it chooses, the text goes through the nodes `taken` first: there are none, unless it may be another one.

    Algorithm 1 of SpecExec (arXiv 2406.02532) with noise that depends on the position alone: what is emitted is what
    the target would have chosen one token at a time. Where no token may come next the walk ends with that failure.

    Tokens 2 and 0 are guessed to follow the text, 1 to follow 2. Here hidden states are the logits already:

    >>> from specexec.sampling.processors import JudgedText, Processors
    >>> tree = TokenTree.of(tokens=[2, 0, 1], parents=[ROOT, ROOT, 0])
    >>> hidden_MH = torch.tensor([
    ...     [0.0, 1.0, 3.0, 2.0],  # after the text: 2, which is node 0
    ...     [0.0, 4.0, 1.0, 2.0],  # after node 0: 1, which is node 2
    ...     [9.0, 0.0, 0.0, 0.0],  # after node 1, where the text does not come
    ...     [0.0, 1.0, 2.0, 5.0],  # after node 2: 3, which was not guessed
    ... ])
    >>> greedy = SamplingParams(temperature=0.0)
    >>> opinion = Opinion(lambda rows: rows, hidden_MH, tree, 7, greedy, Noise(0, 4))
    >>> walk(opinion, Processors(greedy, JudgedText((1,), 4)).history([]))
    Acceptance(path=(0, 2), tokens=(2, 1, 3), failure=None, replaced=())
    """
    path: list[int] = []
    tokens: list[int] = []
    replaced: list[int] = []
    node: int | None = ROOT
    while node is not None:
        try:
            token = opinion.choice(node, history)
        except BadSampling as failure:
            return Acceptance(tuple(path), tuple(tokens), failure, tuple(replaced))
        if len(path) < len(taken) and (given := opinion.tree.tokens[taken[len(path)]]) != token:
            replaced.append(len(path))
            token = given
        tokens.append(token)
        if opinion.penalised:
            history = history.after([token])
        node = opinion.tree.child(node, token)
        if node is not None:
            path.append(node)
    return Acceptance(tuple(path), tuple(tokens), replaced=tuple(replaced))
