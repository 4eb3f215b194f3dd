"""A tiny Qwen 3 behind the server that works as coding agents do: it thinks, calls a tool, two at once, and ends.

What it writes depends on the last word that it was given, by its user or by a tool.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import specexec
from tests.families import small_writer
from tests.serving import Served, serving

THOUGHT = "I must look."
_CALL = '<tool_call>\n{{"name": "read_file", "arguments": {{"path": "{}"}}}}\n</tool_call>'
TASK, EMPTY, MISSING = "Please fix this error", "The file is empty", "No such file: missing"
_ANSWERS = {
    TASK: f"<think>\n{THOUGHT}\n</think>\n\nLet me look.\n{_CALL.format('a.txt')}",
    EMPTY: f"<think>\nOdd.\n</think>\n\n{_CALL.format('a.txt')}\n{_CALL.format('b.txt')}",
    MISSING: "<think>\nWell.\n</think>\n\nThere was no bug at all.",
}
PARAMETERS: dict[str, object] = {
    "type": "object",
    "properties": {"path": {"type": "string"}},
    "required": ["path"],
    "additionalProperties": False,
}


@contextmanager
def agent_server(folder: Path) -> Iterator[Served]:
    """The server of this model, called `agent`, for the length of the block."""
    asked: dict[str, list[dict[str, object]]] = {text: [{"role": "user", "content": text}] for text in _ANSWERS}
    answers = [(asked[text], f"{answer}<|im_end|>") for text, answer in _ANSWERS.items()]
    small_writer(folder, "llama_cpp/Qwen-Qwen3-0.6B", answers)
    with serving(lambda: specexec.load(str(folder), drafter="none", dtype="f32"), names=("agent",)) as served:
        yield served
