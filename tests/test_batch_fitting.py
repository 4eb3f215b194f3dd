"""Prompts longer than the context: cut from the left so that the answer has room, and only as far as is needed."""

from __future__ import annotations

import pytest

from cli.batch.input.fitting import fitted
from cli.batch.input.items import Item, Prompt
from offload.hub.names import demo_folder
from specexec.sampling.params import SamplingParams
from specexec.text.tokenizer import Encoding
from tests import real

TARGET = demo_folder("target")
CONTEXT, ANSWER = 64, 16
ENCODING = Encoding.of(TARGET)
LONG = " ".join(f"word{number}" for number in range(60))


def cut(prompt: Prompt, **wishes: object) -> Prompt:
    (item,) = fitted([Item("i", prompt, wishes)], ENCODING, CONTEXT, SamplingParams(max_tokens=ANSWER), "left").items
    return item.prompt


def length(prompt: Prompt) -> int:
    return len(ENCODING.encode(prompt))


def says(role: str, content: str) -> dict[str, object]:
    return {"role": role, "content": content}


def test_the_end_of_a_text_stays_and_the_answer_has_room() -> None:
    shorter = cut(LONG)
    assert isinstance(shorter, str)
    assert LONG.endswith(shorter)
    assert CONTEXT - ANSWER - 4 <= length(shorter) <= CONTEXT - ANSWER
    assert length(cut(LONG, max_tokens=40)) <= CONTEXT - 40
    assert length(cut(LONG, max_tokens=4000)) == 1


def test_what_fits_is_left_as_it_is() -> None:
    assert cut("short") == "short"
    middling = " ".join(LONG.split()[:20])
    assert CONTEXT - ANSWER < length(middling) < CONTEXT, "its answer ends early, as ever"
    assert cut(middling) == middling


def test_the_oldest_of_a_dialogue_goes_first_and_instructions_stay() -> None:
    said = [says("system", "Be brief."), says("user", LONG), says("assistant", "Yes."), says("user", "And now?")]
    shorter = cut(said)
    assert isinstance(shorter, list)
    shorter = [one for one in shorter if isinstance(one, dict)]
    assert length(shorter) <= CONTEXT - ANSWER
    assert [one["role"] for one in shorter] == [one["role"] for one in said]
    assert shorter[0] == said[0]
    assert shorter[2:] == said[2:]
    assert LONG.endswith(str(shorter[1]["content"]))


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("name", ["qwen3", "llama2", "mistral_nemo"])
def test_control_tokens_that_a_long_prompt_spells_are_neither_lost_nor_obeyed_when_it_is_cut(
    name: str, allowed: bool
) -> None:
    encoding = Encoding.of(real.tokenizer(name))
    encoding.control_tokens = allowed
    spelled = {"qwen3": "<|im_end|>", "llama2": "</s>", "mistral_nemo": "[INST]"}[name]
    long = f"{LONG} 😀{spelled} what is {spelled} for?"
    prompts: list[Prompt] = [long, [says("user", long)]]
    for prompt in prompts if encoding.template is not None else prompts[:1]:  # Llama 2's has none of its own
        (item,) = fitted([Item("i", prompt, {})], encoding, CONTEXT, SamplingParams(max_tokens=ANSWER), "left").items
        (shorter,) = item.prompts
        text = shorter if isinstance(shorter, str) else str(shorter[0]["content"])  # type: ignore[index]
        assert text != long
        assert text.endswith(f"{spelled} what is {spelled} for?")
        assert CONTEXT - ANSWER - 10 <= len(encoding.encode(shorter)) <= CONTEXT - ANSWER


@pytest.mark.parametrize(
    "said", [[says("system", LONG), says("user", "hi")], [says("user", "short"), says("user", LONG), says("user", "")]]
)
def test_what_cannot_be_cut_stays_an_error(said: list[dict[str, object]]) -> None:
    assert cut(said) == said


def test_the_context_is_the_one_that_load_takes() -> None:
    import specexec
    from specexec.compose.load import context_of

    for ctx in (None, 96):
        with specexec.load("demo", ctx=ctx) as llm:
            assert llm.context == context_of(TARGET, ctx)


def test_leaving_out_counts_and_bad_items_are_kept() -> None:
    items = [Item("a", "short"), Item("b", LONG), Item("c", LONG)]
    found = fitted(items, ENCODING, CONTEXT, SamplingParams(), "skip")
    assert ([item.id for item in found.items], found.cut, found.skipped) == (["a"], 0, 2)
