"""A prompt becomes a text to write: its tokens, what the model wishes where nobody did, its noise; or a refusal."""

from __future__ import annotations

from functools import cached_property

from specexec import sequence as sequences
from specexec.cache import KVCache
from specexec.chain import ChainLM
from specexec.conversation import Prompt
from specexec.defaults import Defaults
from specexec.encoding import Encoding
from specexec.errors import BadSampling, ContextLengthExceeded, EmptyPrompt
from specexec.grammar import Grammar, Grammars
from specexec.lm import TreeLM
from specexec.noise import Noise
from specexec.sampling import SamplingParams
from specexec.sequence import Sequence


class Intake:
    """Begins texts for one target, of at most `context` tokens."""

    def __init__(self, encoding: Encoding, target: TreeLM | ChainLM, defaults: Defaults, context: int) -> None:
        self.context = context
        self._encoding, self._target, self._defaults = encoding, target, defaults

    def sequence(
        self, prompt: Prompt, sampling: SamplingParams, caches: dict[object, KVCache] | None = None
    ) -> Sequence:
        """A text that nothing has been written of; `caches` as of `Engine.stream`.

        Raises EmptyPrompt, ContextLengthExceeded, BadSampling.
        """
        tokens = self._encoding.encode(prompt)
        if not tokens:
            raise EmptyPrompt("the prompt is empty.")
        if len(tokens) >= self.context:
            raise ContextLengthExceeded(
                f"the prompt has {len(tokens):,} tokens, the context is {self.context:,}.",
                hint=f"--ctx {len(tokens) + sampling.max_tokens} if the model allows it, or a shorter prompt.",
            )
        beyond = [token for token, _ in sampling.logit_bias if not 0 <= token < self._target.vocabulary]
        if beyond:
            raise BadSampling(f"logit_bias names token {beyond[0]}; this model has 0 to {self._target.vocabulary - 1}.")
        asked = self.filled(sampling)
        noise = Noise(asked.seed or 0, self._target.vocabulary, self._target.device)
        return sequences.start(
            tokens, asked, noise, self._encoding.decode, self._defaults.stop_tokens, self.context, caches
        )

    def filled(self, sampling: SamplingParams | None) -> SamplingParams:
        """With the model's own wishes where nothing was asked for."""
        return self._defaults.filled(sampling or SamplingParams())

    def grammar(self, text: str) -> Grammar:
        """Read what `grammar.json_schema` or `grammar.regex` made, or Lark, for SamplingParams.grammar.

        Safe from any thread. Raises BadGrammar.
        """
        return self._grammars.grammar(text)

    @cached_property
    def _grammars(self) -> Grammars:
        return Grammars(self._encoding.tokenizer, self._target.vocabulary, self._defaults.stop_tokens)
