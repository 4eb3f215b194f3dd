"""curl, as the README and a shell script use it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from tests.serving import LetterEngine, Served, serving

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
ASK = {"messages": [{"role": "user", "content": "abcdef"}]}


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with serving(LetterEngine, key="sesame", max_queue=0, parallel=1) as served:
        yield served


def curl(*arguments: str) -> str:
    ran = subprocess.run(
        ["curl", "--silent", "--show-error", "--noproxy", "*", *arguments], capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_the_models_are_listed(server: Served) -> None:
    listed = json.loads(curl("-H", "Authorization: Bearer sesame", f"{server.url}/v1/models"))
    assert [model["id"] for model in listed["data"]] == ["letters"]


def test_an_answer_and_its_stream(server: Served) -> None:
    asking = ("-H", "Authorization: Bearer sesame", "-H", "Content-Type: application/json")
    url = f"{server.url}/v1/chat/completions"
    whole = json.loads(curl(*asking, "-d", json.dumps(ASK), url))
    assert whole["choices"][0]["message"]["content"] == "abcdef"
    lines = curl("-N", *asking, "-d", json.dumps({**ASK, "stream": True}), url).splitlines()
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    assert "".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in events) == "abcdef"


def test_a_forgotten_header_is_named(server: Served) -> None:
    told = json.loads(curl("-H", "Authorization: Bearer sesame", "-d", "{}", f"{server.url}/v1/chat/completions"))
    assert "Content-Type: application/json" in told["error"]["message"]


def test_a_forgotten_key_is_named_and_the_exit_code_tells_a_script(server: Served) -> None:
    assert "Authorization: Bearer KEY" in json.loads(curl(f"{server.url}/v1/models"))["error"]["message"]
    failed = subprocess.run(["curl", "-sf", "--noproxy", "*", f"{server.url}/v1/models"], timeout=120)
    assert failed.returncode == 22
