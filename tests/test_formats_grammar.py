"""The grammar of every form takes the calls that its own template writes, and gives back what was asked for."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from transformers import PreTrainedTokenizerFast

from specexec.sampling.grammar import Grammars, Parse
from specexec.text.formats import Format, format_of
from specexec.text.formats.probe import Asked, Probe, tools
from specexec.text.template_options import Wishes
from specexec.text.tokenizer import Encoding
from tests.families import family
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


def written(template: str, **shown: object) -> Written:
    encoding = family(template)
    form = format_of(encoding, Wishes(tools=tools(ASKED)))
    probe = Probe(encoding, Wishes(), ASKED)
    answer = probe.answer(**shown)  # type: ignore[arg-type]
    assert answer is not None
    text, ending = answer.answer, probe.ending()
    size = next(at for at in range(len(text) + 1) if text[at:] in ending and text[at : at + 1] in ("", "<", "[", "\n"))
    ids = encoding.encode_rest(text[:size].rstrip("\n"))
    size = next((at for at, token in enumerate(ids) if token in form.control_tokens), len(ids))
    return Written(form, encoding, encoding.encode_rest(answer.prompt), ids[:size])


def parse(answer: Written, choice: str, offered: tuple[dict[str, object], ...] = ()) -> Parse:
    """The beginning of an answer under the grammar of its form."""
    thinking = answer.form.reader(answer.prompt).thinking
    bound = answer.form.grammar(offered or tools(ASKED), choice, thought_open=thinking)
    assert not bound.notes
    return grammars(answer.encoding).grammar(bound.text).start()


ROWS = 210_000  # more than any of the tokenizers has
MADE: dict[int, Grammars] = {}  # copies of one tokenizer share its Rust side, and making one takes a second


def grammars(encoding: Encoding) -> Grammars:
    tokenizer = encoding.tokenizer
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    key = id(tokenizer.backend_tokenizer)
    if key not in MADE:
        MADE[key] = Grammars(tokenizer, ROWS, [tokenizer.eos_token_id])
    return MADE[key]


ONE_EACH = {form: template for template, form in reversed(READ.items()) if template not in NOT_ALIKE}


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_a_grammar_takes_what_the_template_of_its_form_writes(choice: str) -> None:
    wrong = {}
    for form, template in ONE_EACH.items():
        if form in OTHER_LAYOUT:
            continue
        count = 1 if form.endswith(" once") or form == "muse" else len(ASKED)
        answer = written(template, calls=count)
        followed = parse(answer, choice)
        taken = 0
        while taken < len(answer.ids) and bool(followed.allowed([()], ROWS)[0, answer.ids[taken]]):
            followed.advance(answer.ids[taken : taken + 1])
            taken += 1
        piece = answer.form.reader(answer.prompt).read(answer.ids[:taken], last=True)
        ended = bool(followed.allowed([()], ROWS)[0, answer.encoding.tokenizer.eos_token_id])
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
            bound = answer.form.grammar(tools(ASKED), "auto", schema=TRIP, thought_open=thinking)
            followed = grammars(answer.encoding).grammar(bound.text).start()
            ids = answer.encoding.encode_rest(answer.encoding.raw(answer.ids).rstrip(" "))
            ids.append(answer.encoding.tokenizer.eos_token_id)
            for taken, token in enumerate(ids):
                if not bool(followed.allowed([()], ROWS)[0, token]):
                    found[said] = answer.encoding.raw(ids[taken:])
                    break
                followed.advance([token])
        if set(found) != {"text"}:
            wrong[form] = found
    assert not wrong, "\n".join(map(str, wrong.items()))
