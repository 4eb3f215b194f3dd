"""Chat templates are other people's programs: rendered in a process of their own, with limits of time and memory."""

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

from specexec.errors import BadMessages
from specexec.text.messages import Message

SECONDS = 5.0  # of a processor's time; templates of real models take milliseconds
AGAIN = 0.1  # of that, for a template that has not ended once: many questions about it shall not take minutes
LONGEST_S = 60.0  # on the clock, for a machine that has no processor to spare
MEMORY_B = 512 * 1024 * 1024
MOST_CHARACTERS = 16 * 1024 * 1024


def render(template: str, messages: Items[Message], others: Mapping[str, object]) -> str:
    """What transformers' apply_chat_template makes of messages; `others` are what it tells a template besides them.

    Safe from any thread. Raises BadMessages.
    """
    try:
        request = {
            "messages": messages,
            "others": {**others, "chat_template": template},
            "seconds": SECONDS * (AGAIN if template in _process().endless else 1),
            "characters": MOST_CHARACTERS,
        }
        line = json.dumps(request).encode()
    except (TypeError, ValueError, RecursionError) as problem:
        raise BadMessages(f"what the chat template is told is not JSON: {problem}") from problem
    reply = _process().ask(line, template)
    if "text" in reply:
        return str(reply["text"])
    if "refusal" in reply:
        raise BadMessages(f"the model's chat template refuses these messages: {reply['refusal']}")
    if "characters" in reply:
        raise BadMessages(
            f"the model's chat template made {reply['characters']:,} characters; {MOST_CHARACTERS:,} are allowed."
        )
    raise BadMessages(f"the model's chat template took more than {MEMORY_B >> 20} MiB of memory.")


class _Process:
    """Started with the first question, and anew after one that ended it. It ends with us, for its input does."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: subprocess.Popen[bytes] | None = None
        self.endless: set[str] = set()
        atexit.register(self.close)

    def ask(self, line: bytes, template: str) -> dict[str, object]:
        """Raises BadMessages if it does not live to answer."""
        with self._lock:
            running = self._running = self._running or _start()
            assert running.stdin is not None
            assert running.stdout is not None
            answer = said = b""
            try:
                running.stdin.write(line + b"\n")
                running.stdin.flush()
                if select.select([running.stdout], [], [], LONGEST_S)[0]:
                    answer = running.stdout.readline()
            except BrokenPipeError:
                pass  # it has ended: said below
            finally:  # also when we are interrupted: the next question must not get this one's answer
                if not answer.endswith(b"\n"):
                    self._running = None
                    running.kill()
                    _, said = running.communicate()
            if answer:
                reply: dict[str, object] = json.loads(answer)
                return reply
            if said:
                raise BadMessages(f"chat templates cannot be rendered: {said.decode(errors='replace').strip()[-300:]}")
            self.endless.add(template)
            raise BadMessages(f"the model's chat template did not end within {SECONDS:g} s.")

    def close(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.kill()
            running.communicate()


@cache
def _process() -> _Process:
    return _Process()


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
