"""The real demo in a real terminal: Ctrl-C during a slow sweep, editing, and what ends up on the screen."""

from __future__ import annotations

import os
import re
import stat
import sys
import time
from pathlib import Path

import pexpect

REAL = "import sys; from cli.app import main; sys.exit(main())"
FAKE = (
    "import cli.engine.open; from tests.fake_engine import FakeEngine; "
    "cli.engine.open.open_engine = lambda *_, **__: FakeEngine();"
)
# 4 MB a sweep at this speed: ten seconds for each, slow enough to be interrupted in the middle on a busy machine.
# Two guesses at most: a larger tree would hold the whole answer, and there would be no second sweep to interrupt.
SLOW = ["--offload", "disk", "--link-limit", "400kB/s", "--budget", "2"]
PROMPT = "›"
SWEEP_S = 10
CTRL_C, CTRL_D, ALT_ENTER = "\x03", "\x04", "\x1b\r"


def terminal(program: str, *arguments: str, state: Path, **more: str) -> pexpect.spawn[str]:
    # The terminal behind pexpect cannot tell where its cursor is; the editor must not wait for that.
    ours = {"TERM": "xterm", "XDG_STATE_HOME": str(state), "OMP_NUM_THREADS": "1", "PROMPT_TOOLKIT_NO_CPR": "1"}
    return pexpect.spawn(
        sys.executable, ["-c", program, *arguments], env={**os.environ, **ours, **more}, encoding="utf-8",
        timeout=60, dimensions=(24, 100), cwd=Path(__file__).parents[1],
    )  # fmt: skip


def leave(child: pexpect.spawn[str]) -> None:
    """Ctrl-D at the prompt ends the program well."""
    child.send(CTRL_D)
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_ctrl_c_stops_a_slow_sweep_and_keeps_the_partial_answer(tmp_path: Path) -> None:
    chat = terminal(REAL, "chat", *SLOW, state=tmp_path)
    chat.expect_exact("starting demo…")
    chat.expect_exact("/help")
    chat.expect_exact(PROMPT)
    chat.send("What is a tree?\r")
    asked_s = time.monotonic()
    chat.expect_exact("sweep 1 ░")
    assert time.monotonic() - asked_s < SWEEP_S / 2, "the first status comes at once"
    chat.expect_exact("A tree")
    chat.expect(r"sweep 2 \S+ layer")
    pressed_s = time.monotonic()
    chat.send(CTRL_C)
    chat.expect_exact(["stopping…", "stopped after"])  # a layer that ends at once leaves no time to say the first
    chat.expect(r"\d+ tokens; the partial answer is kept")
    chat.expect_exact("link limited to 400 kB/s")
    chat.expect_exact(PROMPT)
    assert time.monotonic() - pressed_s < SWEEP_S / 2, "no sweep is waited for"
    saved = tmp_path / "talk.jsonl"
    chat.send(f"/save {saved}\r")
    chat.expect_exact("2 messages")
    assert '"content": "A tree' in saved.read_text()
    leave(chat)


def test_ctrl_c_at_the_prompt_clears_the_line_and_ctrl_d_leaves(tmp_path: Path) -> None:
    chat = terminal(FAKE + REAL, "chat", state=tmp_path)
    chat.expect_exact("/help")
    chat.expect_exact(PROMPT)
    chat.send("half a thou")
    chat.send(CTRL_C)
    chat.expect_exact("(Ctrl-D or /exit to leave)")
    chat.send("/set\r")
    chat.expect_exact("which setting?")
    leave(chat)
    history = tmp_path / "specexec" / "chat_history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert "/set" in history.read_text()


def test_alt_enter_and_a_paste_begin_new_lines_and_enter_sends(tmp_path: Path) -> None:
    child = terminal(FAKE + REAL, "chat", "--no-history", state=tmp_path)
    child.expect_exact("/help")
    child.expect_exact(PROMPT)
    child.send(f"What is{ALT_ENTER}a")
    child.send("\x1b[200~ sweep\n?\x1b[201~")
    child.send("\r")
    child.expect_exact("tok/s")
    saved = tmp_path / "talk.jsonl"
    child.send(f"/save {saved}\r")
    child.expect_exact("2 messages")
    assert '"What is\\na sweep\\n?"' in saved.read_text()
    leave(child)
    assert not (tmp_path / "specexec").exists()


def test_no_color_means_no_colour_anywhere(tmp_path: Path) -> None:
    child = terminal(FAKE + REAL, "chat", "-p", "hello", state=tmp_path, NO_COLOR="1")
    child.expect(pexpect.EOF)
    assert "echo: hello" in re.sub(r"\x1b.*?[A-Za-z78]", "", child.before or "").replace("\r", "")
    assert not re.search(r"\x1b\[[\d;]*m", child.before or "")


def test_a_dumb_terminal_gets_plain_text(tmp_path: Path) -> None:
    child = terminal(FAKE + REAL, "chat", state=tmp_path, TERM="dumb")
    child.expect_exact(f"{PROMPT} ")
    child.send("hello\n")
    child.expect_exact("echo: hello")
    child.expect_exact(f"{PROMPT} ")
    assert "\x1b" not in (child.before or "")
    leave(child)


def test_what_a_model_writes_is_never_obeyed_by_the_terminal(tmp_path: Path) -> None:
    child = terminal(FAKE + REAL, "chat", "-q", "-p", "\x1b[31mred", state=tmp_path)
    child.expect(pexpect.EOF)
    assert "␛[31mred" in (child.before or "")


THINKING = (
    "import tests.fake_engine as fake; fake.FakeConversation.cue = '<|assistant|><think>\\n'; "
    "fake.FakeConversation.thinks = ('<think>', '</think>');"
)


def test_thoughts_are_dim_and_can_be_hidden(tmp_path: Path) -> None:
    shown = terminal(THINKING + FAKE + REAL, "chat", "-p", "hm</think>\n\nYes.", state=tmp_path)
    shown.expect(pexpect.EOF)
    assert "\x1b[2mecho: hm\x1b[0m\r\n" in (shown.before or "")
    assert re.search(r"thought for \d+ tokens, .*Yes\.\r\n", shown.before or "", re.DOTALL)
    assert "</think>" not in (shown.before or "")
    hidden = terminal(
        THINKING + FAKE + REAL, "chat", "--hide-thinking", "-p", "hm</think>\n\nYes.", state=tmp_path, NO_COLOR="1"
    )
    hidden.expect(pexpect.EOF)
    assert "echo: hm" not in (hidden.before or "")
    assert "Yes.\r\n" in (hidden.before or "")
    assert "thought for " in (hidden.before or "")
