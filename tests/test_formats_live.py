"""Every form, written by a model behind its template's own prompt, and read sweep by sweep.

A tiny model writes for several families: a word of the question says for which. All share one small tokenizer, in
which the marks of all families are tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

import specexec
from specexec.engine.engine import Engine
from specexec.model.cache import KVCache
from specexec.sampling.grammar import Grammar
from specexec.sampling.params import SamplingParams
from specexec.text.formats import Format, Piece, Reader
from specexec.text.formats.probe import tools
from specexec.text.formats.table import CallForm, ChannelForm
from specexec.text.sequence import Sequence
from specexec.text.template_options import Wishes
from specexec.text.tokenizer import Encoding
from tests.test_formats_grammar import ASKED, Known, known
from tests.test_formats_table import NOT_ALIKE, READ
from tests.writer import Saying, save

THOUGHT, CONTENT = "I must look.", "Let me look."
WISHES = Wishes(tools=tools(ASKED))
FORMS = {form: template for template, form in reversed(READ.items())}
ONE_EACH = FORMS | {form: template for template, form in reversed(READ.items()) if template not in NOT_ALIKE}
OPENED = (  # templates whose prompt opens a thought, or closes one that it opened
    "llama_cpp/Qwen3.5-4B",
    "llama_cpp/Qwen-QwQ-32B",
    "llama_cpp/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
    "llama_cpp/GLM-4.7-Flash",
    "llama_cpp/deepseek-ai-DeepSeek-R1-Distill-Qwen-32B",
)
TEMPLATES = sorted({*ONE_EACH.values(), *OPENED})
# How models write calls where their template lays them out over several lines, writes Python that is none, or writes
# calls without the semicolon that it asks for.
AS_MODELS_DO = {
    "llama-3": "; ".join(json.dumps({"name": n, "parameters": a}, ensure_ascii=False) for n, a in ASKED),
    "granite-3": f"<|tool_call|>{json.dumps([{'name': n, 'arguments': a} for n, a in ASKED], ensure_ascii=False)}",
    "pythonic": "[get_weather(city='Zürich <b>', days=3), look_up(word='x y', exact=True)]",
}
GROUPS = 6  # each with a model of its own: what a model costs grows with all that it can say
EACH = pytest.mark.parametrize("template", TEMPLATES)


@dataclass(frozen=True)
class Family:
    """A template with its form, and how a thought, content and calls are written behind its prompt."""

    template: str
    encoding: Encoding
    form: Format
    thought: str
    content: str
    answer: tuple[int, ...]

    def prompt(self, word: str) -> tuple[int, ...]:
        return tuple(self.encoding.encode([{"role": "user", "content": f"Rain? {word}"}], WISHES))

    @property
    def calls(self) -> list[tuple[str, object]]:
        return [*ASKED[: 2 if self.form.parallel else 1]]


def written(template: str, content: str) -> Family:
    one = known(template, small=True)
    encoding, form, calls = one.encoding, one.form, calls_of(one)
    if isinstance(form.form, ChannelForm):
        thought, text = THOUGHT, in_messages(form.form, content, calls)
    else:
        opening, closing = form.thinks
        prompt = encoding.encode([{"role": "user", "content": "Rain?"}], WISHES)
        closed = encoding.raw(prompt).rstrip().endswith(closing or "\0")
        thought = THOUGHT if closing and not closed else ""
        content = content if isinstance(form.form, CallForm) and mark_of(form.form) else ""
        text = f"{content}\n{calls}" if content else calls
        if thought:
            text = f"{'' if form.reader(prompt).thinking else opening}{thought}{closing}\n\n{text}"
    answer = encoding.encode_rest(text if form.name == "harmony" else text + encoding.tokenizer.eos_token)
    return Family(template, encoding, form, thought, content, tuple(answer))


def calls_of(one: Known) -> str:
    """Calls as the template writes them in the history, without what comes before and after them."""
    form, shown = one.form, one.probe.answer(calls=len(ASKED) if one.form.parallel else 1)
    assert shown is not None
    text, ending = shown.answer, one.ending
    if form.parallel and form.name in AS_MODELS_DO:
        return AS_MODELS_DO[form.name]
    if isinstance(form.form, ChannelForm):
        return text.removesuffix(ending) if form.name == "muse" else text
    assert isinstance(form.form, CallForm)
    mark, closing = mark_of(form.form), form.form.around[1] or form.form.shape.end
    if closing:
        return text[text.find(mark) : text.rfind(closing) + len(closing)]
    return one.before_the_end(text)[text.find(mark) :]


def mark_of(form: CallForm) -> str:
    return form.around[0] or form.shape.begin


def in_messages(form: ChannelForm, content: str, calls: str) -> str:
    """The same as messages; content before calls is a message of its own."""
    channels = form.channels
    again = f"{channels.ends[0]}{channels.start}assistant"
    heads = {"harmony": ("<|channel|>analysis", "<|channel|>commentary"), "muse": (" to=self", " to=user")}[form.name]
    bodies = zip(heads, (THOUGHT, content), strict=True)
    return "".join(f"{head}{channels.message}{body}{again}" for head, body in bodies if body) + calls


@dataclass
class Answer:
    """What a model wrote, and what was read in it."""

    family: Family
    prompt: tuple[int, ...]
    required: bool
    tokens: list[int] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def whole(self) -> Piece:
        return sum(self.pieces, Piece())

    @property
    def calls(self) -> list[tuple[str, object]]:
        return called(self.whole)

    def cut_after(self, text: str) -> Piece:
        """What is read if the answer ends with the token that completes this text."""
        raw, form = self.family.encoding.raw, self.family.form
        size = next(size for size in range(len(self.tokens) + 1) if text in raw(self.tokens[:size]))
        return form.reader(self.prompt).read(self.tokens[:size], last=True)

    def sampling(self, engine: Engine) -> SamplingParams:
        return SamplingParams(temperature=0, max_tokens=len(self.family.answer), grammar=self._grammar(engine))

    def _grammar(self, engine: Engine) -> Grammar | None:
        if not self.required:
            return None
        form = self.family.form
        bound = form.grammar(WISHES.tools, "required", thought_open=form.reader(self.prompt).thinking)
        return engine.grammar(bound.text)


def called(piece: Piece) -> list[tuple[str, object]]:
    return [(call.name, json.loads(call.arguments)) for call in piece.calls]


@dataclass(frozen=True)
class Case:
    """Both answers behind one template's prompt: without a grammar, and with one that requires calls."""

    free: Answer
    required: Answer


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """What a template's model wrote."""

    # Answers of about one length end together: else many sweeps are made for one of them.
    ordered = sorted(TEMPLATES, key=lambda template: len(written(template, CONTENT).answer))
    size = -(-len(ordered) // GROUPS)

    @cache
    def group(first: int) -> dict[str, Case]:
        return answers_of(ordered[first : first + size], tmp_path_factory.mktemp("families") / "model")

    return lambda template: group(ordered.index(template) // size * size)[template]


def answers_of(templates: list[str], folder: Path) -> dict[str, Case]:
    """What one model writes for these templates; all in the same sweeps."""
    pairs = [(written(template, CONTENT), written(template, "")) for template in templates]
    tokenizer = pairs[0][0].encoding.tokenizer
    words = words_apart_from(pairs)
    sayings: list[Saying] = []
    cases: dict[str, Case] = {}
    for pair in pairs:
        answers = []
        for family in pair:
            word, token = next(words)
            prompt = family.prompt(word)
            assert token in prompt
            sayings.append(Saying(prompt[-8:], family.answer, token))
            answers.append(Answer(family, prompt, required=family is pair[1]))
        cases[pair[0].template] = Case(*answers)
    save(folder, tokenizer, len(tokenizer) + 99, sayings)
    with specexec.load(str(folder), drafter="none", dtype="f32", ctx=8192) as engine:
        read(engine, cases.values())
    return cases


def words_apart_from(pairs: list[tuple[Family, Family]]) -> Iterator[tuple[str, int]]:
    """Words of one token that occur in no prompt and no answer."""
    used = {token for pair in pairs for family in pair for token in (*family.prompt("x"), *family.answer)}
    encoding = pairs[0][0].encoding
    for token in sorted({*range(1000, 8000)} - used):
        word = encoding.spell(token).strip()
        if len(word) > 4 and word.isalpha() and encoding.encode_rest(f"? {word}")[1:] == [token]:
            yield word, token


def read(engine: Engine, cases: Iterable[Case]) -> None:
    """Every answer sweep by sweep, as the server does; both of a template one after the other in the same caches."""
    running: dict[Sequence, tuple[Reader, list[Answer], dict[object, KVCache]]] = {}

    def begin(answers: list[Answer], caches: dict[object, KVCache]) -> None:
        answer = answers[0]
        sequence = engine.join(list(answer.prompt), answer.sampling(engine), caches)
        running[sequence] = answer.family.form.reader(answer.prompt), answers, caches

    for case in cases:
        begin([case.free, case.required], {})
    while running:
        for step in engine.sweep():
            reader, answers, caches = running[step.sequence]
            answer, burst = answers[0], step.burst
            answer.finish_reason = burst.finish_reason
            tokens = burst.tokens[:-1] if burst.finish_reason == "stop" else burst.tokens
            answer.tokens += tokens
            answer.pieces.append(reader.read(tokens, burst.finish_reason is not None))
            if burst.finish_reason is not None:
                del running[step.sequence]
                if answers[1:]:
                    begin(answers[1:], caches)


@pytest.mark.parametrize("wish", ["free", "required"])
@EACH
def test_thought_content_and_calls_come_apart(cases: Callable[[str], Case], template: str, wish: str) -> None:
    answer = getattr(cases(template), wish)
    family = answer.family
    assert (answer.whole.reasoning, answer.whole.content) == (family.thought, family.content)
    assert answer.calls == family.calls
    assert answer.finish_reason == "stop"
    said = [piece for piece in answer.pieces if piece.reasoning or piece.content]
    assert len(said) >= 2 * bool(family.thought), "a thought comes as it is written"


@EACH
def test_a_thought_that_is_cut_is_a_thought(cases: Callable[[str], Case], template: str) -> None:
    answer = cases(template).free
    if answer.family.thought:
        assert answer.cut_after("I must") == Piece(reasoning="I must")
    else:
        assert not answer.whole.reasoning


@EACH
def test_a_call_that_is_cut_is_text_and_nothing_of_it_is_lost(cases: Callable[[str], Case], template: str) -> None:
    answer = cases(template).free
    piece = answer.cut_after("Zürich")
    assert (piece.reasoning, piece.calls) == (answer.family.thought, ())
    assert piece.content.startswith(answer.family.content)
    assert "get_weather" in piece.content
    assert piece.content.endswith("Zürich")
