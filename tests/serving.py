"""A real server on a free loopback port, in a thread, with an engine of letters or with any engine you give it."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, cast

import httpx
from openai import OpenAI

from cli.serve.application import application
from cli.serve.completions import Keepalive, ServerSettings
from cli.serve.guard import Policy
from cli.serve.metrics import Totals
from cli.serve.models import Hosted, Models
from cli.serve.running import Running
from cli.serve.worker import Worker
from specexec.engine.decoder import Step
from specexec.errors import BrokenLogits
from specexec.planning.memory_room import Room
from specexec.sampling.params import SamplingParams
from specexec.stats import Burst, Cost, FinishReason, Progress
from specexec.text.control_tokens import Rendered
from specexec.text.detokenizer import TextStream
from specexec.text.messages import read_messages
from specexec.tree.tree import TokenTree
from tests.waiting import until

PER_SWEEP = 3
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""Servers here speak plain HTTP; to read the system's certificates would take each client 30 ms."""


@dataclass(eq=False)
class Letters:
    """A text of the fake engine: the prompt, spelt back `PER_SWEEP` letters at a time, over and over if need be."""

    prompt: list[int]
    sampling: SamplingParams
    caches: dict[object, Any] = field(default_factory=dict)
    written: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    failure: None = None
    processed: int = 0
    forks: set[int] = field(default_factory=set)

    @property
    def tokens(self) -> list[int]:
        return self.prompt


class Letterbox:
    """The vocabulary of letters: every character is a token, none is special."""

    all_special_ids: tuple[int, ...] = ()

    def get_added_vocab(self) -> dict[str, int]:
        return {}

    def get_vocab(self) -> dict[str, int]:
        return {"a": 97}

    def __len__(self) -> int:
        return 0x10000


class LetterEngine:
    """Letters are tokens, a prompt ends itself by its own length, and a sweep lasts `sweep_s` unless it is stopped.

    It is its own encoding; of messages it reads the last one.
    """

    name, toy, drafter_name, placement, device, context, budget = "letters", True, "none", "nowhere", "cpu", 1000, 0
    architecture = "letters"
    template = "{{ messages }}"
    own_code = False
    compute, dtype, kv_quant = "float", "float32", None
    lossy: tuple[str, ...] = ()
    folders: ClassVar[dict[str, Path]] = {"target": Path(__file__).parent / "data"}
    adapters: Mapping[str, tuple[str, ...]] = MappingProxyType({"target": ()})
    drafter_failures: ClassVar[dict[str, str]] = {}
    images = None

    def __init__(self, sweep_s: float = 0.0) -> None:
        self.sweep_s = sweep_s
        self.tokenizer = Letterbox()
        self.vocabulary = 0x10000
        self.encoding = self
        self.room = Room(free_B=10**9, token_B=1)
        self.live: list[Letters] = []
        self.shared: list[int] = []  # texts in each sweep so far
        self.stops = 0
        self.broken = False
        self.closed = False
        self._stopping = threading.Event()

    def __enter__(self) -> LetterEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def encode(self, text: str, wishes: object = None) -> list[int]:
        return [ord(letter) for letter in text]

    encode_part = encode

    def infill(self, before: str, after: str, wishes: object, others: object, most: int) -> None:
        return None

    def in_vocabulary(self, tokens: list[int]) -> list[int]:
        return tokens

    def images_in(self, tokens: list[int]) -> tuple[()]:
        return ()

    def encode_rest(self, text: str | Rendered) -> list[int]:
        return self.encode(text.text if isinstance(text, Rendered) else text)

    def rendered(self, messages: list[dict[str, str]], wishes: object) -> Rendered:
        return Rendered(str(read_messages(messages)[-1]["content"]))

    def render(self, messages: list[dict[str, str]], wishes: object) -> str:
        return self.rendered(messages, wishes).text

    def stream(self, before: Sequence[int]) -> TextStream:
        return TextStream(self.decode)

    def template_for(self, wishes: object) -> str:
        return "{{ messages }}"

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(chr(token) for token in tokens)

    def spell(self, token: int) -> str:
        return chr(token)

    def filled(self, sampling: SamplingParams) -> SamplingParams:
        return sampling

    def progress(self) -> Progress:
        return Progress(1, 4, len(self.shared), 0)

    def join(self, prompt: list[int], sampling: SamplingParams, caches: dict[object, Any]) -> Letters:
        if not self.live:
            self._stopping.clear()
        self.live.append(Letters(prompt, sampling, caches))
        return self.live[-1]

    def leave(self, text: Letters) -> None:
        if text in self.live:
            self.live.remove(text)

    def stop(self) -> None:
        self.stops += 1
        self._stopping.set()

    def sweep(self, kept: list[int]) -> list[Step]:
        if self.broken:
            raise BrokenLogits("NaN at layer 3 of /secret/path")
        self.shared.append(len(self.live))
        stopped = self._stopping.wait(self.sweep_s)
        if stopped:
            self._stopping.clear()
        steps = [self._step(text, stopped) for text in self.live]
        self.live = [text for text in self.live if text.finish_reason is None]
        return steps

    def _step(self, text: Letters, stopped: bool) -> Step:
        at = len(text.written)
        length = min(len(text.prompt), text.sampling.max_tokens)
        new = [] if stopped else text.prompt[at : min(at + PER_SWEEP, length)]
        text.written += new
        if stopped:
            text.finish_reason = "interrupted"
        elif len(text.written) == length:
            text.finish_reason = "stop" if length == len(text.prompt) else "length"
        tree, path = TokenTree.of(new[:-1], range(-1, len(new) - 2)), tuple(range(len(new) - 1))
        burst = Burst(
            tuple(new), self.decode(new), text.finish_reason, tree, path, text.sampling.seed or 0, Cost(0.0, 0.1, 10)
        )
        return Step(cast(Any, text), burst)


@dataclass(frozen=True)
class Served:
    """A running server, as its tests and its clients see it."""

    url: str
    models: Models
    running: Running
    log: list[str]

    @property
    def worker(self) -> Worker:
        """Of the first model, once it is being loaded."""
        assert self.models.first.worker is not None
        return self.models.first.worker

    @property
    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120, trust_env=False, verify=NO_TLS)

    def openai(self, key: str = "none") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=120)

    def ask(self, text: str, **more: object) -> httpx.Response:
        """One chat completion."""
        body = {"messages": [{"role": "user", "content": text}], **more}
        with self.http as client:
            return client.post("/v1/chat/completions", json=body)


@contextmanager
def serving(
    open_engine: Callable[[], Any],
    *,
    parallel: int = 4,
    max_queue: int = 64,
    key: str | None = None,
    origins: tuple[str, ...] = (),
    hosts: tuple[str, ...] = (),
    keepalive_s: float = 5.0,
    keepalive: Keepalive = "comment",
    wait: bool = True,
    names: tuple[str, ...] = ("letters",),
    timeout_s: float | None = None,
    listening: socket.socket | None = None,
    others: Mapping[str, Callable[[], Any]] | None = None,
    most: int = 1,
    idle_s: float | None = None,
) -> Iterator[Served]:
    """A server for the length of the block; `wait` until its model is there. `others` are further models by name."""
    openers = [(names, open_engine), *(((name,), opened) for name, opened in (others or {}).items())]

    def made(opened: Callable[[], Any], totals: Totals) -> Worker:
        return Worker(lambda: models.load(opened), parallel=parallel, max_queue=max_queue, totals=totals)

    models = Models([Hosted(called, partial(made, opened)) for called, opened in openers], most, idle_s)
    log: list[str] = []
    settings = ServerSettings(models.names, keepalive_s, keepalive, log.append, timeout_s)
    listening = listening or socket.create_server(("127.0.0.1", 0), backlog=256)
    running = Running(application(models, settings, Policy.of("127.0.0.1", key, origins, hosts)), models, 5)
    thread = threading.Thread(target=running.run, args=([listening],), name="server")
    thread.start()
    address = listening.getsockname()
    served = Served(f"http://127.0.0.1:{address[1]}", models, running, log)
    try:
        until(lambda: running.started and (not wait or served.worker.state != "loading"))
        yield served
    finally:
        running.leave()
        models.begin_stopping()
        thread.join(60)
        models.close()
        listening.close()
        assert not thread.is_alive()
