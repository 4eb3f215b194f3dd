"""One server, several models: loaded when they are asked for, unloaded to make room, when idle, or when told to."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import ollama
import pytest

from cli.app import main
from cli.openai.errors import ApiError
from cli.serve.metrics import Totals
from cli.serve.models import Hosted, Models
from cli.serve.worker import State, Ticket, Worker
from offload.errors import NotEnoughRam
from specexec.sampling.params import SamplingParams
from tests.serving import LetterEngine, Letters, Served, serving
from tests.waiting import until


class Memory:
    """Engines of letters, of which `most` can be loaded at once."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.opened: list[LetterEngine] = []
        self.refused = 0

    @property
    def loaded(self) -> int:
        return sum(not engine.closed for engine in self.opened)

    def open(self) -> LetterEngine:
        if self.loaded >= self.most:
            self.refused += 1
            raise NotEnoughRam("too large")
        self.opened.append(LetterEngine(sweep_s=0.01))
        return self.opened[-1]


@contextmanager
def two_models(memory: Memory, most: int = 1, idle_s: float | None = None) -> Iterator[Served]:
    with serving(memory.open, names=("one",), others={"two": memory.open}, most=most, idle_s=idle_s) as server:
        yield server


def said(server: Served, model: str, text: str = "abc") -> str:
    answer = server.ask(text, model=model)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == model
    return str(answer.json()["choices"][0]["message"]["content"])


def states(server: Served) -> dict[str, str]:
    with server.http as http:
        return {card["id"]: card["status"]["value"] for card in http.get("/v1/models").json()["data"]}


def test_a_model_is_loaded_when_it_is_asked_for_and_makes_room_for_the_next() -> None:
    memory = Memory(most=9)
    with two_models(memory) as server:
        assert states(server) == {"one": "loaded", "two": "unloaded"}
        assert (said(server, "two"), states(server)) == ("abc", {"one": "unloaded", "two": "loaded"})
        assert (said(server, "one"), states(server)) == ("abc", {"one": "loaded", "two": "unloaded"})
        assert (len(memory.opened), memory.loaded) == (3, 1)
        unknown = server.ask("abc", model="three")
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
        with server.http as http:
            assert "specexec_requests_total 2" in http.get("/metrics").text
    assert memory.loaded == 0


@pytest.mark.parametrize(("memory", "loaded"), [(Memory(9), 2), (Memory(1), 1)])
def test_two_models_stay_only_where_memory_holds_both(memory: Memory, loaded: int) -> None:
    with two_models(memory, most=2) as server:
        assert (said(server, "two"), memory.loaded) == ("abc", loaded)
        assert memory.refused == 2 - loaded


def test_a_model_that_cannot_be_loaded_costs_itself_alone() -> None:
    """Nothing is left to unload, so the refusal stands; the next request tries again."""
    memory = Memory(9)
    with two_models(memory) as server:
        memory.most = 0
        refused = server.ask("abc", model="two")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "model_unavailable")
        memory.most = 1
        assert (said(server, "two"), said(server, "one")) == ("abc", "abc")


def test_what_is_being_written_is_finished_before_its_model_leaves() -> None:
    memory = Memory(9)
    with two_models(memory) as server:
        text = "x" * 90
        told: list[str] = []
        long = threading.Thread(target=lambda: told.append(said(server, "one", text)))
        long.start()
        until(lambda: server.worker.running == 1)
        assert said(server, "two") == "abc"
        long.join(60)
        assert told == [text]


def test_a_name_that_is_not_known_loads_nothing() -> None:
    memory = Memory(most=9)
    with two_models(memory) as server:
        assert said(server, "two") == "abc"
        for path in ("/v1/chat/completions", "/v1/messages", "/v1/responses", "/api/chat", "/tokenize"):
            with server.http as http:
                assert (
                    http.post(path, json={"model": "three", "messages": [{"role": "user", "content": "a"}]}).status_code
                    == 404
                )
        assert (states(server), len(memory.opened)) == ({"one": "unloaded", "two": "loaded"}, 2)


async def _asked(models: Models) -> State:
    async with asyncio.timeout(60), models.using("one") as worker:
        return worker.state


def test_a_model_whose_turn_to_load_has_not_come_can_be_stopped() -> None:
    """The request waits for the load, the stop for the request; so the stop must not keep the load from beginning."""
    turn = threading.Event()

    def made(totals: Totals) -> Worker:
        def opened() -> Any:
            turn.wait(60)
            return models.load(LetterEngine)  # type: ignore[arg-type]  # an engine of letters

        return Worker(opened, parallel=1, max_queue=1, totals=totals)

    models = Models([Hosted(("one",), made)])
    found: list[State] = []
    asking = threading.Thread(target=lambda: found.append(asyncio.run(_asked(models))), daemon=True)
    asking.start()
    until(lambda: models.first.held)
    stopping = threading.Thread(target=models.unload, args=(models.first,), daemon=True)
    stopping.start()
    time.sleep(0.1)
    turn.set()
    asking.join(60)
    stopping.join(60)
    assert (found, stopping.is_alive(), models.first.state) == (["ok"], False, "unloaded")


def test_a_server_that_stops_loads_nothing_and_keeps_no_request() -> None:
    models = Models([Hosted(("one",), lambda totals: pytest.fail("it must not be loaded"))])
    models.begin_stopping()
    with pytest.raises(ApiError, match="stopping"):
        asyncio.run(_asked(models))


def test_a_text_on_its_way_from_the_line_into_a_sweep_keeps_its_model() -> None:
    class Slow(LetterEngine):
        joining, go = threading.Event(), threading.Event()

        def join(self, prompt: list[int], sampling: SamplingParams, caches: dict[object, Any]) -> Letters:
            self.joining.set()
            self.go.wait(60)
            return super().join(prompt, sampling, caches)

    opened: Any = partial(Slow, 10.0)
    hosted = Hosted(("one",), lambda totals: Worker(opened, parallel=1, max_queue=1))
    worker = hosted.worker = hosted.make(hosted.totals)
    worker.start()
    worker.submit([Ticket([97], (), SamplingParams(max_tokens=1), lambda told: None)])
    assert Slow.joining.wait(60)
    seen: list[bool] = []
    looking = threading.Thread(target=lambda: seen.append(hosted.busy))
    looking.start()
    time.sleep(0.1)
    Slow.go.set()
    looking.join(60)
    worker.close()
    assert seen == [True]


def test_an_idle_model_leaves_and_comes_back() -> None:
    memory = Memory(9)
    with two_models(memory, idle_s=0.2) as server:
        until(lambda: memory.loaded == 0)
        with server.http as http:
            assert http.get("/health").status_code == 200
        assert said(server, "one") == "abc"


def test_ollamas_client_lists_loads_and_stops_models() -> None:
    memory = Memory(9)
    with two_models(memory, most=2) as server, ollama.Client(host=server.url, trust_env=False) as client:
        assert [model.model for model in client.ps().models] == ["one"]
        assert client.generate("two").done_reason == "load"
        assert [model.model for model in client.ps().models] == ["one", "two"]
        assert client.generate("one:latest", keep_alive=0).done_reason == "unload"
        assert [model.model for model in client.ps().models] == ["two"]
        with pytest.raises(ollama.ResponseError, match="three"):
            client.generate("three", keep_alive=0)


def test_ps_and_stop_speak_with_a_running_server(capsys: pytest.CaptureFixture[str]) -> None:
    memory = Memory(9)
    with two_models(memory) as server:
        assert main(["ps", "--connect", f"{server.url}/v1"]) == 0
        head, one, two = capsys.readouterr().out.splitlines()
        assert (head.split()[:2], one.split()[:2]) == (["MODEL", "STATE"], ["one", "loaded"])
        assert two.split() == ["two", "unloaded"]
        assert main(["stop", "one", "--connect", server.url]) == 0
        assert (capsys.readouterr().out, memory.loaded) == ("one is unloaded\n", 0)
        assert main(["stop", "three", "--connect", server.url]) == 6
        assert "no model 'three' here" in capsys.readouterr().err
    assert main(["ps", "--connect", server.url]) == 6
    assert "no server answers" in capsys.readouterr().err


@pytest.mark.parametrize("body", [{}, {"data": None}, {"data": [{"id": "x", "meta": {"n_vocab": 7}}]}, []])
def test_ps_knows_a_server_of_another_program(body: object, capsys: pytest.CaptureFixture[str]) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Other) as other:
        answering = threading.Thread(target=other.handle_request)
        answering.start()
        assert main(["ps", "--connect", f"127.0.0.1:{other.server_port}"]) == 6
        answering.join(60)
    assert "no server of specexec" in capsys.readouterr().err


def test_an_address_that_is_none_is_refused_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ps", "--connect", "http://[::1"]) == 2
    assert "--connect http://[::1: Invalid IPv6 URL" in capsys.readouterr().err


def test_clients_learn_that_a_model_sees() -> None:
    class Seeing(LetterEngine):
        images: Any = "something"

    for engine, sees in ((LetterEngine, False), (Seeing, True)):
        with serving(engine) as server, server.http as http:
            assert http.get("/props").json()["modalities"]["vision"] is sees
            able = http.post("/api/show", json={"model": "letters"}).json()["capabilities"]
            assert ("vision" in able) is sees
