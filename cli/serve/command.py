"""`specexec serve`: options in, a listening socket out. What needs the extra is imported when the server starts."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections import Counter
from contextlib import closing, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from cli.engine.facts import facts_of
from cli.engine.open import introduction, open_engine, remembering
from cli.shared.control_codes import echo
from cli.shared.errors import INTERRUPTED, MissingExtra, PortTaken, explain
from cli.shared.help_sections import SectionedCommand
from cli.shared.options import (
    EngineOptions,
    RealNumber,
    WholeNumber,
    models_argument,
    prefix_cache_option,
    several_engine_options,
)
from cli.shared.presets import preset_option
from cli.shared.template_options import template_options
from cli.shared.thinking import Think, ask_to_think, think_option
from cli.shared.verbosity import Verbosity, json_option, start_logging, verbosity_options
from cli.terminal.screen import Screen
from offload.machine.folders import typed_path
from specexec.compose.progress import LoadProgress

if TYPE_CHECKING:
    from specexec.engine.engine import Engine

NEEDED = ("starlette", "uvicorn", "sse_starlette", "pydantic")
SHUTDOWN_S = 10


@click.command(cls=SectionedCommand)
@models_argument
@preset_option
@click.option("--host", default="127.0.0.1", help="Address to listen on.")
@click.option("--port", type=WholeNumber(0, 65535), default=8000, help="Port to listen on; 0 takes a free one.")
@click.option("--uds", type=click.Path(path_type=Path), help="Listen on this Unix socket, yours alone, instead.")
@click.option("--api-key", metavar="KEY", envvar="SPECEXEC_API_KEY", help="Ask clients for this key.")
@click.option("--cors-origin", multiple=True, metavar="URL", help="A web page that may use the server; repeatable.")
@click.option("--allowed-host", multiple=True, metavar="NAME", help="Another name this machine goes by; repeatable.")
@click.option(
    "--served-name",
    "--served-model-name",
    multiple=True,
    metavar="NAME",
    help="A name for clients; repeatable.  [its own]",
)
@click.option("--loaded", type=WholeNumber(1), default=1, metavar="N", help="Models in memory at once.")
@click.option(
    "--idle-unload", type=RealNumber(0.1), metavar="SECONDS", help="Unload a model that has nothing to do for so long."
)
@click.option("--parallel", type=WholeNumber(1), default=4, metavar="N", help="Texts that share one sweep.")
@click.option("--max-queue", type=WholeNumber(0), default=64, metavar="N", help="Texts that may wait; more get 503.")
@click.option(
    "--request-timeout",
    type=RealNumber(0.1),
    metavar="SECONDS",
    help="End requests that take longer.",
)
@click.option(
    "--sse-keepalive",
    type=RealNumber(0.1),
    default=5.0,
    metavar="SECONDS",
    help="Sign of life in a silent stream.",
)
@click.option(
    "--sse-keepalive-mode",
    type=click.Choice(["comment", "empty-delta"]),
    default="comment",
    help="For clients that do not count comments as life.",
)
@think_option
@template_options
@prefix_cache_option
@several_engine_options
@json_option("Print one line of JSON when the server is ready.")
@verbosity_options
@click.pass_obj
def serve(
    verbosity: Verbosity,
    host: str,
    port: int,
    uds: Path | None,
    api_key: str | None,
    cors_origin: tuple[str, ...],
    allowed_host: tuple[str, ...],
    served_name: tuple[str, ...],
    loaded: int,
    idle_unload: float | None,
    parallel: int,
    max_queue: int,
    request_timeout: float | None,
    sse_keepalive: float,
    sse_keepalive_mode: Literal["comment", "empty-delta"],
    think: Think,
    engine_options: tuple[EngineOptions, ...],
    as_json: bool,
) -> int:
    """Answer OpenAI's, Anthropic's and Ollama's APIs for MODELs; a chat page is at /.

    Without a MODEL it is the built-in demo. The first one is loaded at once, any other when a request names it.

    \b
      specexec serve
      specexec serve -m llama-70b --offload ram --port 8080
      specexec serve llama-70b qwen3-32b --idle-unload 600
      curl http://127.0.0.1:8000/v1/models
    """
    _check_extra()
    from cli.serve.application import application
    from cli.serve.completions import ServerSettings
    from cli.serve.guard import Policy, is_loopback
    from cli.serve.metrics import Totals
    from cli.serve.models import Hosted, Models
    from cli.serve.running import Running
    from cli.serve.worker import Worker

    if uds is None and not is_loopback(host) and not api_key:
        raise click.UsageError(f"--host {host} lets other machines in; set --api-key or SPECEXEC_API_KEY.")
    screen = Screen(quiet=verbosity.quiet)
    start_logging(verbosity)
    names = _names(engine_options, served_name)
    every_name = tuple(name for some in names for name in some)
    with closing(_listen(host, port) if uds is None else _listen_on(uds)) as listening:
        url = _url(listening)
        began = False

        def ready(engine: Engine) -> None:
            nonlocal began
            for line in introduction(engine):
                screen.say(line)
            if began:
                return
            began = True
            key = "set" if api_key else "none, only this machine"
            where = f"chat page {url}/" if uds is None else f"specexec chat --connect {uds}"
            what = "model" if len(names) == 1 else "models"
            screen.say(f"ready: {url}/v1 · {what} {', '.join(every_name)} · key {key} · {where}")
            if as_json:
                facts = {
                    "base_url": f"{'http://localhost' if uds else url}/v1", "socket": uds,
                    "models": every_name, "api_key": bool(api_key), "cors_origins": cors_origin,
                    "allowed_hosts": allowed_host, "loaded": loaded, "idle_unload_s": idle_unload,
                    "parallel": parallel, "max_queue": max_queue, "request_timeout_s": request_timeout,
                    "sse_keepalive_s": sse_keepalive, "sse_keepalive_mode": sse_keepalive_mode, "think": think,
                    "engine": facts_of(engine, engine_options[0]),
                }  # fmt: skip
                echo(json.dumps(facts, ensure_ascii=False, default=str))

        def failed(options: EngineOptions, worker: Worker) -> None:
            assert worker.failure is not None
            screen.say(f"{options.model} could not be loaded: {explain(worker.failure)}")

        def worker_of(options: EngineOptions, totals: Totals) -> Worker:
            def opened() -> Engine:
                engine = open_engine(options, progress=LoadProgress(read=worker.layers_are_read))
                return _warm(engine, think, screen)

            worker = Worker(
                lambda: models.load(opened),
                parallel=parallel,
                max_queue=max_queue,
                remembering=lambda engine: remembering(engine, options),
                totals=totals,
            )
            worker.on_ready = ready
            worker.on_failure = lambda: failed(options, worker)
            return worker

        models = Models(
            [Hosted(some, partial(worker_of, options)) for some, options in zip(names, engine_options, strict=True)],
            loaded,
            idle_unload,
        )
        server_settings = ServerSettings(every_name, sse_keepalive, sse_keepalive_mode, _Log(screen), request_timeout)
        policy = Policy.of("localhost" if uds else host, api_key, cors_origin, allowed_host)
        app = application(models, server_settings, policy)
        screen.say(f"loading {engine_options[0].model}… (listening on {url})")
        try:
            Running(app, models, SHUTDOWN_S).run(sockets=[listening])
        except KeyboardInterrupt:
            screen.say("stopped")
            return INTERRUPTED
        finally:
            models.close()
            if uds is not None:
                uds.unlink(missing_ok=True)
    if models.failure is not None:
        raise models.failure
    return 0


def _names(models: tuple[EngineOptions, ...], served: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The names of each model for clients."""
    if served and len(models) > 1:
        raise click.UsageError("--served-name is for one model; name several with `specexec alias set`.")
    names = [served or (short_name(one.model),) for one in models]
    doubled = [name for (name,), count in Counter(names).items() if count > 1] if not served else []
    if doubled:
        raise click.UsageError(f"two models are called {doubled[0]!r}; name them with `specexec alias set`.")
    return names


def _warm(engine: Engine, think: Think, screen: Screen) -> Engine:
    """How much to think where a request does not say; and what the first request with tools would have to make, and
    all others would wait for: seconds of one processor.
    """
    from specexec.errors import BadGrammar
    from specexec.sampling.grammar import json_schema
    from specexec.text.formats import format_of

    ask_to_think(engine, think, screen.say)
    format_of(engine.encoding)
    with suppress(BadGrammar):  # a tokenizer that no grammar can be made for: said to those who ask for one
        engine.grammar(json_schema({}))
    return engine


def short_name(model: str) -> str:
    """A name for clients: never a path, which is private."""
    path = typed_path(model)
    return path.resolve().name.removesuffix(".gguf") if path.exists() else model


def _check_extra() -> None:
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise MissingExtra(
            f"the server needs {', '.join(missing)}, which is not installed.",
            hint=f"{Path(sys.executable).name} -m pip install 'specexec[serve]'",
        )


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host.strip("[]"), port), family=family, backlog=2048)
    except OSError as problem:
        raise PortTaken(
            f"cannot listen on {host}:{port}: {os.strerror(problem.errno or 0)}.", hint="another --port"
        ) from None


def _listen_on(path: Path) -> socket.socket:
    """A Unix socket for its owner alone. One without a server behind it is taken over."""
    listening = socket.socket(socket.AF_UNIX)
    try:
        if path.is_socket() and not _answers(path):
            path.unlink()
        before = os.umask(0o177)
        try:
            listening.bind(str(path))
        finally:
            os.umask(before)
        listening.listen(2048)
    except OSError as problem:
        listening.close()
        raise PortTaken(f"cannot listen on {path}: {os.strerror(problem.errno or 0)}.", hint="another --uds") from None
    return listening


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as asking:
        return asking.connect_ex(str(path)) == 0


def _url(listening: socket.socket) -> str:
    if listening.family == socket.AF_UNIX:
        return f"unix:{listening.getsockname()}:"
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class _Log:
    """Access log lines on stderr, with the time; control characters in a path are shown, not obeyed."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen

    def __call__(self, line: str) -> None:
        readable = "".join(character if character.isprintable() else "�" for character in line)
        self._screen.say(f"{time.strftime('%H:%M:%S')} {readable}")
