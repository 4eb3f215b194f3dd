"""The grammar of every form takes the calls that its own template writes, and gives back what was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
from transformers import PreTrainedTokenizerFast

from specexec.sampling.grammar import Grammars, Parse
from specexec.text.formats import Format, format_of
from specexec.text.formats.probe import Asked, Probe, tools
from specexec.text.formats.rules import Whole
from specexec.text.template_options import Wishes
from specexec.text.tokenizer import Encoding
from tests.families import OWN, family, small_family
from tests.test_formats_table import NOT_ALIKE, READ

ASKED: Asked = (("get_weather", {"city": "Zürich <b>", "days": 3}), ("look_up", {"word": "x y", "exact": True}))
# Templates that lay their JSON out over several lines, or write Python that is none, where models do not.
# Kimi K3's own end cannot be told from what its template writes after every answer.
OTHER_LAYOUT = {"kimi-k3", "granite-3", "phi-4-mini", "pythonic"}


@dataclass(frozen=True)
class Written:
    """One form, and the ids of an answer that its template wrote."""

    form: Format
    encoding: Encoding
    prompt: list[int]
    ids: list[int]


@dataclass(frozen=True)
class Known:
    """A template with its form, what shows how it writes, and what it writes at the end of an answer."""

    encoding: Encoding
    form: Format
    probe: Probe
    ending: str

    def before_the_end(self, text: str) -> str:
        """An answer without what comes after every answer."""
        places = range(len(text) + 1)
        ends = ("", "<", "[", "\n")
        size = next(at for at in places if text[at:] in self.ending and text[at : at + 1] in ends)
        return text[:size].rstrip("\n")


@cache
def known(template: str, small: bool) -> Known:
    """Found out once for all tests, in the small tokenizer of all templates or in a tokenizer as large as real ones."""
    encoding = (small_family if small else family)(template)
    probe = Probe(encoding, Wishes(), ASKED)
    return Known(encoding, format_of(encoding, Wishes(tools=tools(ASKED))), probe, probe.ending())


def written(template: str, **shown: object) -> Written:
    """With the tokenizer of its own model where there is one, else a small one: masks of large ones take long."""
    one = known(template, template not in OWN)
    answer = one.probe.answer(**shown)  # type: ignore[arg-type]
    assert answer is not None
    ids = one.encoding.encode_rest(one.before_the_end(answer.answer))
    size = next((at for at, token in enumerate(ids) if token in one.form.control_tokens), len(ids))
    return Written(one.form, one.encoding, one.encoding.encode_rest(answer.prompt), ids[:size])


def parse(answer: Written, choice: str, offered: tuple[dict[str, object], ...] = ()) -> Parse:
    """The beginning of an answer under the grammar of its form."""
    thinking = answer.form.reader(answer.prompt).thinking
    bound = answer.form.grammar(offered or tools(ASKED), choice, thought_open=thinking)
    assert not bound.notes
    return grammars(answer.encoding).grammar(bound.text).start()


MADE: dict[int, Grammars] = {}  # copies of one tokenizer share its Rust side, and making one takes a second


def grammars(encoding: Encoding) -> Grammars:
    tokenizer = encoding.tokenizer
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    key = id(tokenizer.backend_tokenizer)
    if key not in MADE:
        MADE[key] = Grammars(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    return MADE[key]


def allows(followed: Parse, encoding: Encoding, token: int) -> bool:
    """May it come next?"""
    return bool(followed.allowed([()], len(encoding.tokenizer))[0, token])


ONE_EACH = {form: template for template, form in reversed(READ.items()) if template not in NOT_ALIKE}


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_a_grammar_takes_what_the_template_of_its_form_writes(choice: str) -> None:
    wrong = {}
    for form, template in ONE_EACH.items():
        if form in OTHER_LAYOUT:
            continue
        count = 1 if form.endswith(" once") else len(ASKED)
        answer = written(template, calls=count)
        followed = parse(answer, choice)
        taken = 0
        while taken < len(answer.ids) and allows(followed, answer.encoding, answer.ids[taken]):
            followed.advance(answer.ids[taken : taken + 1])
            taken += 1
        piece = answer.form.reader(answer.prompt).read(answer.ids[:taken], last=True)
        ended = allows(followed, answer.encoding, answer.encoding.tokenizer.eos_token_id)
        if len(piece.calls) != count or not ended:
            wrong[form] = answer.encoding.raw(answer.ids[:taken]), answer.encoding.raw(answer.ids[taken:])
    assert not wrong, "\n".join(map(str, wrong.items()))


TRIP = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}


def test_with_a_schema_an_answer_is_calls_or_json_of_it() -> None:
    """Where calls may come and text may have but one shape; other text is never begun, calls are as without."""
    wrong = {}
    for form, template in ONE_EACH.items():
        if form in OTHER_LAYOUT:
            continue
        found = {}
        for said, shown in (
            ("call", {"calls": 1}),
            ("json", {"content": '{"city": "Oslo"}'}),
            ("text", {"content": "Hi."}),
        ):
            answer = written(template, **shown)
            thinking = answer.form.reader(answer.prompt).thinking
            bound = answer.form.grammar(tools(ASKED), "auto", whole=Whole(TRIP), thought_open=thinking)
            followed = grammars(answer.encoding).grammar(bound.text).start()
            ids = answer.encoding.encode_rest(answer.encoding.raw(answer.ids).rstrip(" "))
            ids.append(answer.encoding.tokenizer.eos_token_id)
            for taken, token in enumerate(ids):
                if not allows(followed, answer.encoding, token):
                    found[said] = answer.encoding.raw(ids[taken:])
                    break
                followed.advance([token])
        if set(found) != {"text"}:
            wrong[form] = found
    assert not wrong, "\n".join(map(str, wrong.items()))


def taken(encoding: Encoding, bound: str, answer: str) -> str:
    """As much of an answer, and of the end after it (¶), as a grammar takes."""
    followed = grammars(encoding).grammar(bound).start()
    ids = [*encoding.encode_rest(answer), encoding.tokenizer.eos_token_id]
    for at, token in enumerate(ids):
        if not allows(followed, encoding, token):
            return encoding.raw(ids[:at])
        followed.advance([token])
    return answer + "¶"


AGAIN = "<|end|><|start|>assistant"
ONE_THOUGHT = {  # what opens a thought, the rest of it, what begins the answer after that, and what a second thought
    "llama_cpp/Qwen-Qwen3-0.6B": ("<think>", "\nHm.\n</think>\n\n", "", "<think>"),
    "llama_cpp/openai-gpt-oss-120b": (
        "<|channel|>analysis<|message|>",
        f"Hm.{AGAIN}<|channel|>",
        "final<|message|>",
        "analysis<|message|>",
    ),
    "llama_cpp/muse-glimmer": (
        " to=self<|message|>",
        "Hm.<|eom|><|start|>assistant to=",
        "user<|message|>",
        "self<|message|>",
    ),
}
WHOLES = {
    '{"city": "Oslo"}': Whole(TRIP),
    "a/b": Whole(regex=r"a\/b|a/c"),
    "yes": Whole(regex="yes|no"),
    "x\ny": Whole(regex="x\ny"),
}


@pytest.mark.parametrize("template", ONE_THOUGHT)
def test_before_text_of_one_shape_there_is_one_thought_at_most(template: str) -> None:
    """So an answer that ends in a thought without end is reasoning only."""
    one = known(template, template not in OWN)
    encoding, form = one.encoding, one.form
    opened, rest, head, second = ONE_THOUGHT[template]
    for text, whole in WHOLES.items():
        free = form.grammar((), "auto", whole=whole).text
        inside = form.grammar((), "auto", whole=whole, thought_open=True).text
        for bound, thought in ((free, opened + rest), (inside, rest)):
            assert taken(encoding, bound, f"{thought}{head}{text}") == f"{thought}{head}{text}¶"
            assert taken(encoding, bound, f"{thought}{head}{text}?") == f"{thought}{head}{text}"
            assert taken(encoding, bound, thought + second) != thought + second
    endless = opened + "Hm. " * 50
    assert taken(encoding, free, endless) == endless
    prompt = encoding.encode([{"role": "user", "content": "hi"}])
    piece = form.reader(prompt).read(encoding.encode_rest(endless), last=True)
    assert (piece.content, piece.reasoning.strip(), piece.calls) == ("", ("Hm. " * 50).strip(), ())
