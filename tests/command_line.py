"""Runs one command line the way a shell would, with a fake engine behind it."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from cli.app import main
from cli.engine.open import open_engine
from cli.shared.options import EngineOptions
from cli.shared.template_options import set_template
from specexec.engine.engine import Engine
from tests.fake_engine import FakeEngine


def stays_open(patch: pytest.MonkeyPatch, engine: Engine) -> None:
    """From now on commands get this engine, as their options of the template want it, and leave it open."""

    def opened(options: EngineOptions, **_: object) -> Engine:
        set_template(engine.encoding, options.template_vars, options.allow_control_tokens)
        return engine

    patch.setattr(engine, "close", lambda: None)
    patch.setattr("cli.engine.open.open_engine", opened)


@dataclass(frozen=True)
class Ran:
    """What came of it."""

    code: int
    out: str
    err: str


@dataclass
class CommandLine:
    """Call it with arguments. `engine` is what the command gets; `options` is what it asked for."""

    capture: pytest.CaptureFixture[str]
    patch: pytest.MonkeyPatch
    engine: FakeEngine
    options: EngineOptions | None = None

    def __call__(self, *arguments: str, stdin: str = "") -> Ran:
        self.patch.setattr("sys.stdin", io.StringIO(stdin))
        self.patch.setattr("cli.engine.open.open_engine", self._open)
        self.capture.readouterr()
        code = main(list(arguments))
        out, err = self.capture.readouterr()
        return Ran(code, out, err)

    def load_what_is_asked(self) -> None:
        """From now on the real engine instead of the fake one."""
        self.patch.setattr(self, "_open", open_engine)

    def fail_with(self, raising: Callable[[], None]) -> None:
        """Let loading fail."""
        self.patch.setattr(self, "_open", lambda options, **_: raising())

    def _open(self, options: EngineOptions, **_: object) -> FakeEngine:
        self.options = options
        return self.engine
