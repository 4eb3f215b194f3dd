"""Templates are programs, often other people's: rendered in processes of their own, with limits of time and memory."""

from __future__ import annotations

import atexit
import json
import select
import subprocess
import sys
import threading
from collections.abc import Mapping
from collections.abc import Sequence as Items
from functools import cache
from pathlib import Path
from typing import Literal

from specexec.errors import BadMessages
from specexec.text.messages import Message

SECONDS = 5.0  # of a processor's time; templates of real models take milliseconds
AGAIN = 0.1  # of that, for a template that has not ended once: many questions about it shall not take minutes
LONGEST_S = 60.0  # on the clock, for a machine that has no processor to spare
MEMORY_B = 512 * 1024 * 1024
MOST_CHARACTERS = 16 * 1024 * 1024
PROCESSES = 4  # at most; more than one, so that a template that does not end delays no other


class TemplateFailed(Exception):
    """There is no text; says what the template did, as in "the template {…}". `reason` is what it raised, if so."""

    def __init__(self, what: str, reason: str | None = None) -> None:
        super().__init__(what)
        self.reason = reason


def render(template: str, messages: Items[Message], others: Mapping[str, object]) -> str:
    """What transformers' apply_chat_template makes of messages; `others` are the template's further variables.

    Safe from any thread. Raises BadMessages.
    """
    try:
        return _rendered("chat", template, others, messages)
    except TemplateFailed as problem:
        what = f"refuses these messages: {problem.reason}" if problem.reason else problem
        raise BadMessages(f"the model's chat template {what}") from problem


def damage(template: str) -> str | None:
    """Why a chat template cannot even be read, if so; reading computes its constants, so it has the same limits."""
    try:
        _rendered("chat", template, {}, None)
    except TemplateFailed as problem:
        return problem.reason or f"it {problem}".removesuffix(".")
    return None


def fill(template: str, fields: Mapping[str, object]) -> str:
    """A user's own text with its fields filled in. Raises TemplateFailed."""
    return _rendered("plain", template, fields, None)


def parsed(template: str, text: str, tools: Items[Mapping[str, object]]) -> Mapping[str, object]:
    """The message that transformers makes of an answer by a response template (JSON). Raises TemplateFailed."""
    variables = {"text": text, "prefix": "", "tools": list(tools)}
    message: Mapping[str, object] = json.loads(_rendered("response", template, variables, None))
    return message


def _rendered(
    kind: Literal["chat", "plain", "response"],
    template: str,
    variables: Mapping[str, object],
    messages: Items[Message] | None,
) -> str:
    seconds = SECONDS * (AGAIN if template in _processes().endless else 1)
    request = {
        "kind": kind,
        "template": template,
        "messages": messages,
        "variables": variables,
        "seconds": seconds,
        "characters": MOST_CHARACTERS,
    }
    try:
        line = json.dumps(request).encode()
    except (TypeError, ValueError, RecursionError) as problem:
        raise TemplateFailed(f"takes only values that JSON can hold: {problem}") from problem
    reply = _processes().ask(line)
    if reply is None:
        _processes().endless.add(template)
        raise TemplateFailed(f"did not end within {seconds:g} s.")
    if "text" in reply:
        return str(reply["text"])
    if "refusal" in reply:
        raise TemplateFailed(f"failed: {reply['refusal']}", str(reply["refusal"]))
    if "characters" in reply:
        raise TemplateFailed(f"made {reply['characters']:,} characters; {MOST_CHARACTERS:,} are allowed.")
    raise TemplateFailed(f"took more than {MEMORY_B >> 20} MiB of memory.")


class _Processes:
    """Each answers one question at a time. They are started when no idle one is left, and end with us, by their input.

    `endless` are the templates that ended one.
    """

    def __init__(self) -> None:
        self.endless: set[str] = set()
        self.running: set[subprocess.Popen[bytes]] = set()
        self._idle: list[subprocess.Popen[bytes]] = []
        self._places = threading.Semaphore(PROCESSES)
        atexit.register(self.close)

    def ask(self, line: bytes) -> dict[str, object] | None:
        """None if the template did not end. Raises TemplateFailed where nothing can be rendered at all."""
        with self._places:
            asked = self._one()
            assert asked.stdin is not None
            assert asked.stdout is not None
            answer = said = b""
            try:
                asked.stdin.write(line + b"\n")
                asked.stdin.flush()
                if select.select([asked.stdout], [], [], LONGEST_S)[0]:
                    answer = asked.stdout.readline()
            except BrokenPipeError:
                pass  # it has ended: said below
            finally:  # also when we are interrupted: the next question must not get this one's answer
                if answer.endswith(b"\n"):
                    self._idle.append(asked)
                else:
                    said = self._end(asked)
        if answer:
            reply: dict[str, object] = json.loads(answer)
            return reply
        if said:
            raise TemplateFailed(f"cannot be rendered here: {said.decode(errors='replace').strip()[-300:]}")
        return None

    def close(self) -> None:
        """End them all; a rendering that is waited for counts as one that did not end."""
        while self._idle:
            self._end(self._idle.pop())
        for process in list(self.running):
            process.kill()

    def _one(self) -> subprocess.Popen[bytes]:
        try:
            return self._idle.pop()
        except IndexError:
            started = _start()
            self.running.add(started)
            return started

    def _end(self, process: subprocess.Popen[bytes]) -> bytes:
        self.running.discard(process)
        process.kill()
        return process.communicate()[1]


@cache
def _processes() -> _Processes:
    return _Processes()


def _start() -> subprocess.Popen[bytes]:
    program = Path(__file__).with_name("render_process.py")
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-I", str(program), json.dumps(sys.path), str(MEMORY_B)],
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        process_group=0,  # Ctrl-C in a terminal is not meant for it
    )
