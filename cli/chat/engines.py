"""What answers a conversation: an engine here, or a server that has the model loaded; and where the two differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, TypeAlias

from cli.connect.engine import ServedEngine
from cli.connect.models import loaded_model
from cli.connect.server import Server
from cli.engine.open import introduction
from cli.shared.options import EngineOptions
from cli.shared.thinking import Think, ask_to_think
from cli.shared.verbosity import Verbosity, start_logging
from cli.terminal.screen import Screen

if TYPE_CHECKING:
    from specexec.engine.engine import Engine

ChatEngine: TypeAlias = "Engine | ServedEngine"
OpenEngine: TypeAlias = Callable[[EngineOptions], "AbstractContextManager[ChatEngine]"]


def engines_of(server: Server, named: bool, screen: Screen, verbosity: Verbosity) -> OpenEngine:
    """Models of a server; one that it does not have is refused if it was `named`, else the first one answers."""

    @contextmanager
    def opened(options: EngineOptions) -> Iterator[ServedEngine]:
        start_logging(verbosity, screen.tell)
        engine = ServedEngine(loaded_model(server, options.model, named, screen), options)
        screen.say(engine.model.introduction)
        yield engine

    return opened


def introduced(engine: ChatEngine) -> list[str]:
    """Which model answers, who drafts, and where the weights are."""
    return [engine.model.introduction] if isinstance(engine, ServedEngine) else introduction(engine)


def planned(engine: ChatEngine) -> list[str]:
    """Where the weights live, and the folders that they came from if those are here."""
    return [engine.placement, *([] if isinstance(engine, ServedEngine) else map(str, engine.folders.values()))]


def template_of(engine: ChatEngine) -> str | None:
    """The chat template as the model brings it."""
    return engine.template if isinstance(engine, ServedEngine) else engine.encoding.template


def set_thinking(engine: ChatEngine, level: Think, tell: Callable[[str], None]) -> None:
    """How much is thought from now on; a server says with its next answer where that does nothing."""
    if isinstance(engine, ServedEngine):
        engine.think = level
        if level != "auto":
            tell(f"think {level}")
    else:
        ask_to_think(engine, level, tell)
