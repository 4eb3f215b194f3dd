"""Text between two texts: the prompt that its model was trained on, or a refusal that says why."""

from __future__ import annotations

import json
import re

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from specexec.text.infill import BETWEEN, OtherText
from specexec.text.tokenizer import Encoding
from tests.serving import Served

BEFORE, AFTER = "def add(a, b):\n    return ", "\n\nprint(add(1, 2))"
SPELLED = f"<|fim_prefix|>{BEFORE}<|fim_suffix|>{AFTER}<|fim_middle|>"


def test_the_prompt_is_the_two_texts_with_the_models_own_marks(agent: Served) -> None:
    encoding = agent.worker.engine.encoding
    assert encoding.infill(BEFORE, AFTER) == agent.worker.engine.tokenizer(SPELLED)["input_ids"]
    spelled = encoding.infill("<|fim_middle|>", "")
    assert spelled is not None
    assert spelled.count(spelled[-1]) == 1  # a mark that the text itself spells is text


def test_a_suffix_and_infill_give_the_completion_of_that_prompt(agent: Served) -> None:
    common = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
    with agent.http as http:
        prompt = {"prompt": SPELLED, "allow_control_tokens": True}
        expected = http.post("/v1/completions", json={**common, **prompt}).json()
        given = {"prompt": BEFORE, "suffix": AFTER}
        told = http.post("/v1/completions", json={**common, **given}).json()
        assert told["choices"][0]["text"] == expected["choices"][0]["text"]
        assert told["usage"]["prompt_tokens"] == expected["usage"]["prompt_tokens"]
        prefixes = {"input_prefix": BEFORE[:5], "prompt": BEFORE[5:], "input_suffix": AFTER}
        asked = {**prefixes, "n_predict": 8, "temperature": 0, "ignore_eos": True}
        whole = http.post("/infill", json=asked).json()
        assert (whole["content"], whole["stop"]) == (told["choices"][0]["text"], True)
        assert (whole["stop_type"], whole["tokens_predicted"]) == ("limit", 8)
        lines = http.post("/infill", json={**asked, "stream": True}).text.splitlines()
    pieces = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    assert "".join(piece["content"] for piece in pieces) == whole["content"]
    assert [piece["stop"] for piece in pieces] == [*[False] * (len(pieces) - 1), True]


def test_other_texts_stand_before_as_llama_cpp_writes_them(agent: Served) -> None:
    """The last ones that fit; with the marks of files where the vocabulary has them."""
    encoding, tokenizer = agent.worker.engine.encoding, agent.worker.engine.tokenizer
    others = [OtherText("a.py", "A = 1\n"), OtherText("b.py", "B = 2\n")]
    files = "<|file_sep|>a.py\nA = 1\n<|file_sep|>b.py\nB = 2\n<|file_sep|>filename\n"
    # Part by part: a name's line break and the text after it are not one token.
    parts = [part for part in re.split(r"(<\|file_sep\|>[^\n]*\n)", files) if part]
    before = [token for part in ["<|repo_name|>myproject\n", *parts] for token in tokenizer(part)["input_ids"]]
    asked = encoding.infill(BEFORE, AFTER)
    assert asked is not None
    assert encoding.infill(BEFORE, AFTER, None, others, 999) == [*before, *asked]
    last = encoding.infill(BEFORE, AFTER, None, others[1:], 999)
    assert encoding.infill(BEFORE, AFTER, None, others, len(before) + len(asked) - 1) == last != asked
    assert encoding.infill(BEFORE, AFTER, None, others, len(asked)) == asked
    given = {"input_prefix": BEFORE, "input_suffix": AFTER, "n_predict": 1}
    extra = [{"filename": one.name, "text": one.text} for one in others]
    with agent.http as http:
        told = http.post("/infill", json={**given, "input_extra": extra}).json()
        assert told["tokens_evaluated"] == len(before) + len(asked)
        generated = {"prompt": BEFORE, "suffix": AFTER, "stream": False, "options": {"num_predict": 1}}
        assert http.post("/api/generate", json=generated).json()["prompt_eval_count"] == len(asked)


def test_where_there_are_no_marks_for_files_a_line_stands_between_them() -> None:
    letters = {chr(code): code for code in range(128)} | {"<|endoftext|>": 128}
    marks = {"<fim-prefix>": 129, "<fim-suffix>": 130, "<fim-middle>": 131}
    model = Tokenizer(WordLevel(letters | marks, unk_token="<|endoftext|>"))
    model.pre_tokenizer = Split("", "isolated")
    model.add_special_tokens(["<|endoftext|>", *marks])
    encoding = Encoding(PreTrainedTokenizerFast(tokenizer_object=model))
    text = [ord(letter) for letter in BETWEEN + "x"]
    assert encoding.infill("a", "b", None, [OtherText("n", "x")], 99) == [*text, 129, 97, 130, 98, 131]


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/infill", {"input_prefix": "a", "input_suffix": "b"}, "no tokens for filling in text"),
        ("/v1/completions", {"prompt": "a", "suffix": "b"}, "no tokens for filling in text"),
        ("/v1/completions", {"prompt": [1], "suffix": "b"}, "a prompt that is a text"),
        ("/infill", {"input_prefix": 3}, "are texts"),
        ("/infill", {"input_extra": [{"filename": "a"}]}, "input_extra.0: a text and a filename are needed"),
        ("/infill", {"input_extra": "a"}, "input_extra is a list"),
        ("/api/generate", {"prompt": "a", "suffix": "b"}, "no tokens for filling in text"),
        ("/api/generate", {"prompt": "a", "suffix": "b", "system": "c"}, "no place for images or a system prompt"),
        ("/infill", {"input_prefix": "a", "n_predict": "b"}, "n_predict"),
        ("/infill", {"input_prefix": "a", "n": 2}, "n is not supported here"),
    ],
)
def test_what_cannot_be_filled_in_is_refused_by_name(
    letters: Served, path: str, body: dict[str, object], said: str
) -> None:
    with letters.http as http:
        refused = http.post(path, json=body)
    assert refused.status_code == 400
    assert said in str(refused.json()["error"])
