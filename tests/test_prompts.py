"""Prompts are those of transformers' own apply_chat_template, byte for byte, on every real template."""

import json
from functools import cache
from typing import Any

import pytest
from transformers import AutoTokenizer

from specexec.errors import BadMessages, BadText
from specexec.text.messages import read_messages
from specexec.text.template_options import Wishes
from specexec.text.tokenizer import Encoding
from tests import real

WEATHER: dict[str, object] = {
    "type": "function",
    "function": {
        "parameters": {  # keys in an order of the client's own
            "required": ["city"],
            "properties": {
                "unit": {"enum": ["C", "F"], "type": "string", "description": "Of the answer."},
                "city": {"type": "string", "description": "Its name."},
            },
            "type": "object",
        },
        "description": "Says what the weather is like. é",
        "name": "weather",
    },
}
ARGUMENTS = {"unit": "C", "city": "Oslo é", "days": 2}
HELLO = {"role": "user", "content": "Hello! Wie geht's?\n\n  Ça va?  "}
ANSWER = {"role": "assistant", "content": "Fine.", "reasoning_content": "They greet me."}
RESULT = {"role": "tool", "tool_call_id": "call00001", "content": "Rain, 7 °C."}
THANKS = {"role": "user", "content": "Thanks."}


def call(arguments: object, **others: object) -> dict[str, object]:
    function = {"name": "weather", "arguments": arguments}
    return {
        "role": "assistant",
        **others,
        "tool_calls": [{"id": "call00001", "type": "function", "function": function}],
    }


@cache
def one() -> Encoding:
    return Encoding(AutoTokenizer.from_pretrained(str(real.model())))


def encoding(template: str) -> Encoding:
    one().tokenizer.chat_template = template
    return one()


def theirs(template: str, messages: list[Any], **how: Any) -> str | None:
    """What transformers makes of messages in its own documented shape; None if the template refuses them."""
    how.setdefault("add_generation_prompt", True)
    try:
        return str(
            encoding(template).tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **how)
        )
    except Exception:
        return None


def ours(template: str, messages: list[Any], wishes: Wishes | None = None) -> str | None:
    try:
        return encoding(template).render(messages, wishes)
    except BadMessages:
        return None


def each(compare: Any) -> None:
    """Compare on every template, and name those that differ."""
    differing = [name for name, template in real.templates().items() if not compare(template)]
    assert not differing


@pytest.mark.parametrize(
    "messages", [[HELLO], [{"role": "system", "content": "Be brief."}, HELLO, ANSWER, THANKS]], ids=["one", "four"]
)
@pytest.mark.parametrize("tools", [(), (WEATHER,)], ids=["bare", "tools"])
def test_every_template_makes_the_prompt_that_transformers_makes(messages: list[Any], tools: tuple[Any, ...]) -> None:
    variables = {"enable_thinking": False, "documents": [{"title": "One", "text": "Two."}]}
    wishes = Wishes(tools=tools, variables=variables)
    each(lambda it: ours(it, messages, wishes) == theirs(it, messages, tools=list(tools) or None, **variables))


def test_calls_reach_every_template_in_the_shape_it_reads() -> None:
    text = json.dumps(ARGUMENTS, ensure_ascii=False)

    def compare(template: str) -> bool:
        found = ours(template, [HELLO, call(text, content=None), RESULT, THANKS], Wishes(tools=(WEATHER,)))
        shapes = [
            theirs(template, [HELLO, call(arguments, content=""), RESULT, THANKS], tools=[WEATHER])
            for arguments in (ARGUMENTS, text)
        ]
        fitting = [shown for shown in shapes if shown is not None and "{'unit': 'C'" not in shown]
        return found == (fitting[0] if fitting else None)

    each(compare)


def test_an_object_and_its_json_text_are_the_same_arguments() -> None:
    wishes = Wishes(tools=(WEATHER,))

    def compare(template: str) -> bool:
        prompts = {
            ours(template, [HELLO, call(arguments, content=""), RESULT], wishes)
            for arguments in (ARGUMENTS, json.dumps(ARGUMENTS, ensure_ascii=False))
        }
        empty: list[object] = [{}, "", None]
        nothing = {ours(template, [HELLO, call(arguments), RESULT], wishes) for arguments in empty}
        return len(prompts) == 1 and len(nothing) == 1

    each(compare)


def test_arguments_that_are_no_json_cost_no_template_its_prompt() -> None:
    def compare(template: str) -> bool:
        good = ours(template, [HELLO, call("{}"), RESULT], Wishes(tools=(WEATHER,)))
        bad = ours(template, [HELLO, call("Oslo, please"), RESULT], Wishes(tools=(WEATHER,)))
        return (good is None) == (bad is None)

    each(compare)


def test_ids_of_other_servers_are_taken_by_templates_that_want_nine_letters() -> None:
    messages = [HELLO, call("{}"), RESULT, THANKS]
    foreign = json.loads(json.dumps(messages).replace("call00001", "call_A-much_longer_id"))

    def compare(template: str) -> bool:
        return (ours(template, messages) is None) == (ours(template, foreign) is None)

    each(compare)


def test_a_developer_speaks_where_the_template_knows_the_role_and_as_system_where_not() -> None:
    messages = [{"role": "developer", "content": "Answer in French."}, HELLO]
    system = [{**messages[0], "role": "system"}, HELLO]

    def compare(template: str) -> bool:
        verbatim = theirs(template, messages)
        shown = verbatim is not None and "Answer in French." in verbatim
        return ours(template, messages) == (verbatim if shown else theirs(template, system))

    each(compare)


def test_an_answer_to_continue_ends_the_prompt() -> None:
    messages = [HELLO, {"role": "assistant", "content": "I am fine, and"}]

    def compare(template: str) -> bool:
        expected = theirs(template, messages, add_generation_prompt=False, continue_final_message=True)
        return ours(template, messages, Wishes(ends_in="message")) == expected

    each(compare)


def test_content_in_parts_is_their_text() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert read_messages([{"role": "user", "content": parts}]) == [{"role": "user", "content": "one two"}]


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ("hi", "messages.0: not an object"),
        ({"content": "hi"}, "messages.0.role: "),
        ({"role": "user"}, "messages.0.content: it is missing"),
        ({"role": "user", "content": 3}, "messages.0.content: neither text nor parts"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages.0.content: .*'image_url'"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "messages.0.tool_calls: .* name"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 3}}]}, "the arguments of a call"),
        ({"role": "assistant", "function_call": {"name": "f"}}, "messages.0.function_call: "),
    ],
)
def test_what_cannot_be_read_is_refused_by_place(message: object, problem: str) -> None:
    with pytest.raises(BadMessages, match=problem):
        read_messages([message])


def test_half_a_character_is_refused_wherever_it_is() -> None:
    with pytest.raises(BadText, match=r"messages\.0\.tool_calls"):
        read_messages([call({"city": "\ud800"})])


def test_a_tool_that_is_but_a_name_is_offered_by_every_template_that_takes_an_empty_one() -> None:
    nothing = {"description": "", "parameters": {"type": "object", "properties": {}}}
    whole: Any = {"type": "function", "function": {"name": "now", **nothing}}
    bare: Any = {"type": "function", "function": {"name": "now"}}

    def compare(template: str) -> bool:
        shown = ours(template, [HELLO], Wishes(tools=(bare,)))
        exact = theirs(template, [HELLO], tools=[bare])
        return shown == (exact if exact is not None else theirs(template, [HELLO], tools=[whole]))

    each(compare)
