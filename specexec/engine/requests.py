"""A prompt becomes a text to write: its tokens, defaults of the model where the user set none, noise; or a refusal."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from dataclasses import replace
from functools import cached_property

from specexec.engine.request_types import Request
from specexec.errors import BadMessages, BadSampling, ContextLengthExceeded, EmptyPrompt, UnknownToken
from specexec.model.cache import KVCache
from specexec.model.chain_lm import ChainLM
from specexec.model.image_rows import Images, is_row, without_rows
from specexec.model.tree_lm import TreeLM
from specexec.sampling.grammar import Grammar, Grammars
from specexec.sampling.model_defaults import Defaults
from specexec.sampling.noise import Noise
from specexec.sampling.params import SamplingParams
from specexec.text import sequence as sequences
from specexec.text.messages import Prompt
from specexec.text.sequence import Sequence
from specexec.text.template_options import Wishes
from specexec.text.tokenizer import Encoding


def check_ids(tokens: Iterable[int], rows: int, where: str) -> None:
    """Raises UnknownToken for an id that an embedding of so many rows does not have."""
    beyond = next((token for token in tokens if not 0 <= token < rows), None)
    if beyond is not None:
        raise UnknownToken(
            f"{where} holds token {beyond}; this model has 0 to {rows - 1}.",
            hint="ids of this model's own tokenizer (encode, or /tokenize of the server), or text.",
        )


def check_sampling(sampling: SamplingParams, rows: int) -> None:
    """Raises BadSampling for a field that names an id which an embedding of so many rows does not have."""
    for name, tokens in sampling.token_ids.items():
        beyond = next((token for token in tokens if not 0 <= token < rows), None)
        if beyond is not None:
            raise BadSampling(f"{name} names token {beyond}; this model has 0 to {rows - 1}.")


class Intake:
    """Begins texts for one target, of at most `context` tokens. `shorten` says what of a prompt is read."""

    def __init__(
        self,
        encoding: Encoding,
        target: TreeLM | ChainLM,
        defaults: Defaults,
        context: int,
        shorten: Callable[[list[int]], list[int]] = list,
    ) -> None:
        self.context, self._shorten = context, shorten
        self._encoding, self._target, self._defaults = encoding, target, defaults

    def requested(self, request: Request) -> Sequence:
        """The text of a request, without what is already written of it."""
        sampling = request.sampling
        if request.grammar is not None:
            sampling = replace(sampling, grammar=self.grammar(request.grammar))
        return self.sequence(request.prompt, sampling, wishes=request.wishes, written=request.written)

    def sequence(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        caches: dict[object, KVCache] | None = None,
        wishes: Wishes | None = None,
        written: Items[int] = (),
    ) -> Sequence:
        """A text that nothing has been written of; `caches` as of `Engine.stream`, `wishes` for the chat template.

        `written` is the beginning of its answer: checked, not taken.

        Raises EmptyPrompt, UnknownToken, ContextLengthExceeded, BadSampling.
        """
        tokens = self._encoding.encode(prompt, wishes)
        images = self._images_in(tokens)
        if not tokens:
            raise EmptyPrompt("the prompt is empty.")
        self._check_made(tokens if images is None else without_rows(tokens))
        check_ids(written, self._target.vocabulary, "the beginning of the answer")
        if len(tokens) >= self.context:
            raise ContextLengthExceeded(
                f"the prompt has {len(tokens):,} tokens, the context is {self.context:,}.",
                hint=f"--ctx {len(tokens) + sampling.max_tokens} if the model allows it, or a shorter prompt.",
            )
        check_sampling(sampling, self._target.vocabulary)
        asked, whole = self.filled(sampling), tokens
        if images is None and not sampling.prompt_logprobs:  # which are asked for every token
            tokens = self._shorten(tokens)
        noise = Noise(asked.seed or 0, self._target.vocabulary, self._target.device)
        words = tokens if images is None else images.as_words(tokens)
        text = self._encoding.stream(words, asked.stop or ())
        begun = sequences.start(tokens, asked, noise, text, self._defaults.stop_tokens, self.context, caches, images)
        begun.unread = len(whole) - len(tokens)
        return begun

    def _images_in(self, tokens: Items[int]) -> Images | None:
        """What rows of images among the tokens mean; None if there are none. Raises BadMessages for what is gone."""
        if not any(map(is_row, tokens)):
            return None
        if not isinstance(self._target, TreeLM) or self._target.images is None:
            raise UnknownToken("the prompt holds rows of images, which this model does not read.")
        if self._target.images.among(tokens) is None:
            raise BadMessages(
                "the prompt holds rows of an image that is not here any more.", hint="the messages again."
            )
        return self._target.images

    def _check_made(self, tokens: Items[int]) -> None:
        try:
            check_ids(tokens, self._target.vocabulary, "the prompt")
        except UnknownToken as problem:
            size = len(self._encoding.tokenizer)
            if size > self._target.vocabulary:
                problem.why = f"its tokenizer has {size:,} entries, more than the model has rows."
            raise

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
