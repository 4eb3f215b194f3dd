"""The terminal picture of the README: a real session of the demo pair in tmux, its screen drawn by Rich as an SVG.

python scripts/terminal_picture.py            # writes docs/terminal.svg; needs tmux
"""

from __future__ import annotations

import io
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "terminal.svg"
COLUMNS, ROWS = 92, 26
TITLE = "a 3 million parameter toy at the pace of a 70B"
WAIT_S = 120.0


def main() -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        terminal = Terminal(home)
        try:
            terminal.type("specexec chat --offload disk --link-limit 4MB/s --budget 16")
            terminal.wait_for("/help")
            terminal.type("What is a drafter?")
            terminal.wait_for("guesses kept")
            terminal.type("/tree")
            terminal.wait_for("guessed · depth")
            terminal.type("How does specexec work?")
            screen = terminal.wait_for("sweep 3 ██████", "s left")
        finally:
            terminal.close()
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(screen.rstrip()), overflow="crop", no_wrap=True)
    PICTURE.write_text(console.export_svg(title=TITLE), encoding="utf-8")
    print(f"{PICTURE.relative_to(ROOT)}: {PICTURE.stat().st_size / 1000:.0f} kB")


class Terminal:
    """A shell in tmux without the settings of the user who runs this."""

    def __init__(self, home: str) -> None:
        places = dict.fromkeys(("HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME"), home)
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        shell = {
            **places,
            "PATH": path,
            "PYTHONPATH": str(ROOT),
            "PS1": "$ ",
            "LANG": "C.UTF-8",
            "TERM": "screen-256color",
        }
        words = [f"{name}={value}" for name, value in shell.items()]
        self._socket = ["tmux", "-L", f"picture-{os.getpid()}", "-f", "/dev/null"]
        command = shlex.join(["env", "-i", *words, "bash", "--norc", "--noprofile"])
        self._tmux("new-session", "-d", "-x", str(COLUMNS), "-y", str(ROWS), command)
        self.wait_for("$")

    def type(self, line: str) -> None:
        self._tmux("send-keys", "-l", line)
        self._tmux("send-keys", "Enter")

    def wait_for(self, *texts: str) -> str:
        """The first screen that has all of these."""
        end_s = time.monotonic() + WAIT_S
        while not all(text in Text.from_ansi(screen := self._screen()).plain for text in texts):
            if time.monotonic() > end_s:
                sys.exit(f"waited {WAIT_S:.0f} s for {texts}; the screen says:\n{Text.from_ansi(screen).plain}")
            time.sleep(0.05)
        return screen

    def _screen(self) -> str:
        return self._tmux("capture-pane", "-p", "-e")

    def close(self) -> None:
        self._tmux("kill-server")

    def _tmux(self, *arguments: str) -> str:
        return subprocess.run([*self._socket, *arguments], check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
