"""What a person sees: the real demo in tmux, which draws, wraps and scrolls as terminals do. Skipped where tmux is not.

pexpect (test_cli_terminal.py) sees every byte; here is what is left of them on the screen.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")

ROOT = Path(__file__).parents[1]
REAL = "import sys; from cli.app import main; sys.exit(main())"
# An answer in Markdown, a word at a time, that the demo could not write.
MARKDOWN = """
import time, cli.engine.open
from tests.fake_engine import FakeEngine
TEXT = "x\\n\\n# Steps\\n\\n1. **First**\\n2. second, broken on so narrow a screen\\n\\n```py\\nx = 1\\n```\\nDone."
class Engine(FakeEngine):
    def stream(self, prompt, sampling, written=()):
        for burst in super().stream([{"role": "user", "content": TEXT}], sampling):
            time.sleep(0.05)
            yield burst
cli.engine.open.open_engine = lambda _, **__: Engine(sweep_s=0.02)
"""
SLOW = ("--offload", "disk", "--link-limit", "3MB/s", "--budget", "2", "--no-history")
WAIT_S = 90.0


class Screen:
    """One tmux server with one window."""

    def __init__(self, program: str, *arguments: str, home: Path, columns: int = 80, **more: str) -> None:
        self._tmux_with = ["tmux", "-L", f"test-{os.getpid()}-{home.name}", "-f", "/dev/null"]
        places = {f"XDG_{kind}_HOME": str(home / kind) for kind in ("DATA", "CONFIG", "STATE", "CACHE")}
        ours = {**places, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PS1": "$ ", **more}
        words = ["env", *(f"{name}={value}" for name, value in ours.items()), "bash", "--norc", "--noprofile", "-i"]
        self._tmux("new-session", "-d", "-x", str(columns), "-y", "24", shlex.join(words))
        self.wait_for("$")
        self.type(shlex.join([sys.executable, "-c", program, *arguments]))

    def type(self, line: str) -> None:
        self._tmux("send-keys", "-l", line)
        self.press("Enter")

    def press(self, *keys: str) -> None:
        self._tmux("send-keys", *keys)

    def paste(self, text: str) -> None:
        """As a terminal with bracketed paste does."""
        self._tmux("set-buffer", text)
        self._tmux("paste-buffer", "-p", "-r")

    def resize(self, columns: int) -> None:
        self._tmux("resize-window", "-x", str(columns), "-y", "24")

    def wait_for(self, text: str) -> str:
        """Everything on the screen and above it, once `text` is there."""
        end_s = time.monotonic() + WAIT_S
        while text not in " ".join((seen := self.text()).split()):
            assert time.monotonic() < end_s, f"waited for {text!r}; the screen says:\n{seen}"
            time.sleep(0.05)
        return seen

    def leave(self) -> None:
        """Ctrl-D, and wait for the shell: what is typed while a program ends is lost with it."""
        self.press("C-d")
        self.at_the_shell()

    def at_the_shell(self) -> None:
        """Wait until the program has ended."""
        end_s = time.monotonic() + WAIT_S
        while not self.text().endswith("$"):
            assert time.monotonic() < end_s, f"still not left; the screen says:\n{self.text()}"
            time.sleep(0.05)

    def text(self) -> str:
        return self._tmux("capture-pane", "-p", "-J", "-S", "-200").rstrip()

    def close(self) -> None:
        self._tmux("kill-server")

    def _tmux(self, *arguments: str) -> str:
        return subprocess.run([*self._tmux_with, *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def screen(tmp_path: Path) -> Iterator[Callable[..., Screen]]:
    opened: list[Screen] = []

    def open_screen(program: str, *arguments: str, **more: object) -> Screen:
        opened.append(Screen(program, *arguments, home=tmp_path, **more))  # type: ignore[arg-type]  # Screen checks
        return opened[-1]

    yield open_screen
    for one in opened:
        one.close()


def stands_once(chat: Screen) -> bool:
    """Whether the finished answer is there once, and nothing of what was drawn before it."""
    text = " ".join(chat.wait_for("guesses kept").split())
    days = "The days of the week are Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday."
    return text.count(days) == text.count("The days of") == 1 and "░" not in text


def test_a_terminal_of_another_width_is_repainted(tmp_path: Path) -> None:
    # What is on its way to the terminal while that takes its new width may leave a line behind: not every time.
    assert any(repainted(tmp_path / str(attempt)) for attempt in range(3))


def repainted(home: Path) -> bool:
    """Whether nothing is left behind where the width changes in the middle of an answer."""
    chat = Screen(REAL, "chat", *SLOW, "--no-save", "-t", "0", home=home)
    try:
        chat.wait_for("/help")
        chat.type("List the days of the week.")
        chat.wait_for("tok/sweep")
        chat.resize(50)
        time.sleep(0.5)
        chat.resize(90)
        return stands_once(chat)
    finally:
        chat.close()


def test_live_lines_vanish_and_the_answer_stays_once(screen: Callable[..., Screen]) -> None:
    chat = screen(REAL, "chat", *SLOW, "--no-save", "-t", "0")
    chat.wait_for("/help")
    chat.type("List the days of the week.")
    seen = chat.wait_for("tok/sweep")
    assert "layer " in seen
    assert "context " in seen
    chat.wait_for("Wednesday")
    chat.press("C-z")
    chat.wait_for("Stopped")
    chat.type("echo in the $((40+2)) shell")
    assert "layer " not in chat.wait_for("in the 42 shell"), "no live line is left in the way"
    chat.type("fg")
    assert stands_once(chat), "what was repainted has left nothing behind"
    chat.leave()
    chat.type("echo code $?")
    chat.wait_for("code 0")


def test_ctrl_c_at_three_moments_and_a_conversation_taken_up_again(screen: Callable[..., Screen]) -> None:
    chat = screen(REAL, "chat", *SLOW)
    chat.wait_for("/help")
    chat.type("never answered")
    chat.wait_for("reading the prompt")
    chat.press("C-c")  # before the first token
    chat.wait_for("stopped before the first token")
    chat.type("List the days of the week.")
    chat.wait_for("The days")
    chat.press("C-c")  # in the middle of an answer
    chat.wait_for("the partial answer is kept")
    chat.press("C-c")  # at the prompt, where it only clears the line
    seen = chat.wait_for("(Ctrl-D or /exit to leave)")
    assert "Traceback" not in seen
    assert "Exception" not in seen
    chat.press("C-d")
    chat.wait_for("tokens with it")
    chat.type("echo code $?")
    chat.wait_for("code 0")
    chat.type(shlex.join([sys.executable, "-c", REAL, "chat", "-c", *SLOW]))
    assert "2 messages; " in chat.wait_for("tokens need not be read again"), (
        "the question without an answer is none of them"
    )
    chat.wait_for("› ")
    chat.type("/continue")
    text = " ".join(chat.wait_for("link limited").split())
    chat.press("C-c")
    assert "nothing to continue" not in text


def test_a_second_ctrl_c_waits_for_no_layer_and_a_third_leaves_with_130(screen: Callable[..., Screen]) -> None:
    slow = ("--offload", "disk", "--link-limit", "5kB/s", "--budget", "2", "--no-history")  # minutes for each layer
    chat = screen(REAL, "chat", *slow)
    chat.wait_for("/help")
    chat.type("never answered")
    chat.wait_for("reading the prompt")
    time.sleep(0.5)
    chat.press("C-c")
    chat.wait_for("stopping… (layer 0/")
    chat.press("C-c")
    chat.wait_for("stopped before the first token")
    time.sleep(2.5)
    chat.press("C-c")  # long after: at an empty prompt it only clears the line
    chat.wait_for("(Ctrl-D or /exit to leave)")
    chat.type("asked again")
    chat.wait_for("asked again reading the prompt")
    time.sleep(0.5)
    chat.press("C-c")
    chat.wait_for("stopping… (layer 0/")
    for _ in range(2):
        chat.press("C-c")
        time.sleep(0.4)
    chat.at_the_shell()
    chat.type("echo code $?")
    chat.wait_for("code 130")


def test_escape_stops_an_answer_and_is_an_ordinary_key_before_and_after(screen: Callable[..., Screen]) -> None:
    chat = screen(REAL, "chat", *SLOW, "--no-save")
    chat.wait_for("/help")
    chat.press("x", "Escape", "BSpace")  # at the prompt it sends no signal
    chat.type("/set seed 1")
    chat.wait_for("seed = 1")
    chat.type("List the days of the week.")
    chat.wait_for("The days")
    chat.press("Up")  # begins with the same byte
    chat.wait_for("Sunday")
    chat.type("List the months of the year.")
    chat.wait_for("The months")
    chat.press("Escape")
    chat.wait_for("the partial answer is kept")
    chat.leave()
    chat.type("stty -a | tr ';' '\\n' | grep quit")
    chat.wait_for("quit = ^\\")
    chat.type("echo left with $?")
    chat.wait_for("left with 0")


def test_a_paste_is_one_message_and_markdown_is_drawn(screen: Callable[..., Screen], tmp_path: Path) -> None:
    chat = screen(MARKDOWN + REAL, "chat", "--no-save", "--no-history", columns=40, NO_COLOR="1")
    chat.wait_for("›")  # not before: a paste is marked as one only for a program that asks for it
    chat.paste("pasted line one\nline two\n")
    chat.press("M-Enter")
    chat.type("typed")
    chat.wait_for("Done.")
    seen = chat.wait_for("guesses kept")
    saved = tmp_path / "talk.jsonl"
    chat.type(f"/save {saved}")
    chat.wait_for("2 messages")
    assert '"pasted line one\\nline two\\n\\ntyped"' in saved.read_text()
    lines = [line.rstrip() for line in seen.splitlines()]
    for once in ("echo: x", "Steps", " 1 First", " 2 second, broken on so narrow a screen", "```py", "x = 1", "Done."):
        assert lines.count(once) == 1, once
