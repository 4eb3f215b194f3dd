"""One server, several models: loaded when they are asked for, unloaded to make room, when idle, or when told to."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import ollama
import pytest

from cli.app import main
from offload.errors import NotEnoughRam
from tests.serving import LetterEngine, Served, serving


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
        server.until(lambda: server.worker.running == 1)
        assert said(server, "two") == "abc"
        long.join(10)
        assert told == [text]


def test_an_idle_model_leaves_and_comes_back() -> None:
    memory = Memory(9)
    with two_models(memory, idle_s=0.2) as server:
        server.until(lambda: memory.loaded == 0)
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
