"""Text between two texts: the prompt that its model was trained on, or a refusal that says why."""

from __future__ import annotations

import json

import pytest

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


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/infill", {"input_prefix": "a", "input_suffix": "b"}, "no tokens for filling in text"),
        ("/v1/completions", {"prompt": "a", "suffix": "b"}, "no tokens for filling in text"),
        ("/v1/completions", {"prompt": [1], "suffix": "b"}, "a prompt that is a text"),
        ("/infill", {"input_prefix": 3}, "are texts"),
        ("/infill", {"input_extra": [{"filename": "a", "text": "b"}]}, "input_extra is not supported here"),
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
