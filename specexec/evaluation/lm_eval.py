"""lm-evaluation-harness on an Engine (extra `eval`): every kind of request a task may make, many of them in a sweep.

    from lm_eval import simple_evaluate
    from specexec.lm_eval import SpecExecLM

    with specexec.load("demo") as llm:
        simple_evaluate(model=SpecExecLM(llm), tasks=["lambada_openai"])

Texts are cut into tokens as the harness's own HFLM does it, so that its figures can be compared with ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Items
from typing import Any

from jinja2 import TemplateError
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from specexec.engine.engine import Engine
from specexec.engine.request_types import Continuation, Failure, Likelihood, Request
from specexec.errors import BadMessages, BadSampling, ContextLengthExceeded, SweepCancelled
from specexec.sampling.params import SamplingParams, derived_seed

# What a task may say about sampling, and how we call it; the rest of `do_sample`, `until` and lengths is the harness's.
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
HARNESS = ("do_sample", "until", "max_gen_toks")
LONGEST_ANSWER = 256  # where a task does not say


class SpecExecLM(TemplateLM):
    """An engine as the harness sees a model. `seed` is that of tasks that sample; every request has one of its own."""

    def __init__(self, engine: Engine, seed: int = 0) -> None:
        super().__init__()
        self.engine = engine
        self.seed = seed
        self.tokenizer = engine.tokenizer

    # What it is

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def max_length(self) -> int:
        return self.engine.context

    @property
    def tokenizer_name(self) -> str:
        return self.engine.name.replace("/", "__")

    def get_model_info(self) -> dict[str, str]:
        """What goes into the `config` of the results."""
        return {"model": self.engine.name, "drafter": self.engine.drafter_name, "placement": self.engine.placement}

    # Text and tokens

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Token ids; a text that begins with the prefix token is not given another one."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.engine.encoding.spell(self.prefix_token_id))
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages as the text the model was trained on."""
        try:
            text = self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        except (TemplateError, ValueError) as problem:
            raise BadMessages(f"the model's chat template refuses a task's messages: {problem}") from problem
        return str(text)

    # What tasks ask for

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: object,
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is what T = 0 writes; contexts are cut from the left."""
        found: dict[int, tuple[float, bool]] = {}
        for index, likelihood in self._likelihoods([(asked[1], asked[2]) for asked in requests], disable_tqdm):
            found[index] = (likelihood.total, likelihood.greedy)
            if (name := requests[index][0]) is not None:
                self.cache_hook.add_partial("loglikelihood", name, found[index])
        return [found[index] for index in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, each in windows of the context's length where it is longer."""
        windows = [
            (index, make_disjoint_window(window))
            for index, request in enumerate(requests)
            for window in get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
        ]
        totals = [0.0] * len(requests)
        left = [sum(owner == index for owner, _ in windows) for index in range(len(requests))]
        for at, likelihood in self._likelihoods([window for _, window in windows], disable_tqdm):
            owner = windows[at][0]
            totals[owner] += likelihood.total
            left[owner] -= 1
            if not left[owner]:
                self.cache_hook.add_partial("loglikelihood_rolling", requests[owner].args, totals[owner])
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers, written side by side, as specexec writes them everywhere: drafted and exact."""
        asked = [self._request(index, *request.args) for index, request in enumerate(requests)]
        texts: dict[int, str] = {}
        with tqdm(total=len(requests), desc="answers", disable=disable_tqdm) as bar:
            for result in self.engine.batch(asked):
                if isinstance(result, Failure):
                    raise result.error
                if result.finish_reason == "interrupted":
                    raise SweepCancelled
                texts[result.index] = result.text
                self.cache_hook.add_partial("generate_until", requests[result.index].args, result.text)
                bar.update()
        return [texts[index] for index in range(len(requests))]

    # How

    def _likelihoods(
        self, pairs: Iterable[tuple[list[int], list[int]]], disable_tqdm: bool
    ) -> Iterator[tuple[int, Likelihood]]:
        asked = [self._fitted(*pair) for pair in pairs]
        with tqdm(total=len(asked), desc="likelihoods", disable=disable_tqdm) as bar:
            for found in self.engine.likelihoods(asked):
                yield found
                bar.update()

    def _fitted(self, context: list[int], tokens: list[int]) -> Continuation:
        """The last tokens that the context holds; the last one is never read."""
        room = self.max_length + 1 - len(tokens)
        if room < 1:
            raise ContextLengthExceeded(
                f"a task asks about {len(tokens):,} tokens at once, the context is {self.max_length:,}.",
                hint=f"--ctx {len(tokens)} if the model allows it.",
            )
        return Continuation(context[-room:], tokens)

    def _request(self, index: int, context: str, wishes: dict[str, Any]) -> Request:
        chosen = normalize_gen_kwargs(wishes, LONGEST_ANSWER)
        if unknown := [name for name in chosen if name not in (*SAMPLING, *HARNESS)]:
            raise BadSampling(f"a task asks for {unknown[0]!r}, which specexec does not have.")
        room = self.max_length - chosen["max_gen_toks"]
        if room < 1:
            raise ContextLengthExceeded(
                f"a task asks for answers of {chosen['max_gen_toks']:,} tokens, the context is {self.max_length:,}."
            )
        sampling = SamplingParams(
            **{name: chosen[name] for name in SAMPLING if chosen.get(name) is not None}
            | {
                "temperature": chosen.get("temperature", 0.0) if chosen["do_sample"] else 0.0,
                "max_tokens": chosen["max_gen_toks"],
                "stop": tuple(filter(None, _texts(chosen["until"]))),
                "seed": derived_seed(self.seed, index),
            }
        )
        prompt = self.tok_encode(context) or [self.prefix_token_id]
        return Request(index, prompt[-room:], sampling)


def _texts(until: str | Items[str] | None) -> Items[str]:
    return [until] if isinstance(until, str) else until or []
