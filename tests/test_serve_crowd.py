"""Many clients at once: sweeps are shared, no client waits for a slow reader, and one that leaves is let go."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import httpx
import pytest
import torch

import specexec
from cli.serve.cache_pool import IdleCaches
from cli.serve.completions import Keepalive
from specexec.engine.engine import Engine
from specexec.model.cache import KVCache, LayerKV
from specexec.planning.memory_room import Room
from specexec.sampling.params import SamplingParams, derived_seed
from specexec.text.control_tokens import Rendered
from tests.held import started_since
from tests.serving import LetterEngine, Served, serving
from tests.waiting import until

CLIENTS = 50
HEAD = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def raw_request(server: Served, text: str, **more: object) -> socket.socket:
    """A client that may do anything a client can do wrong."""
    body = json.dumps({"messages": [{"role": "user", "content": text}], **more})
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=120)
    connection.sendall(f"{HEAD}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    return connection


def test_fifty_clients_get_their_own_text_in_shared_sweeps() -> None:
    engine = LetterEngine(sweep_s=0.03)
    with serving(lambda: engine, parallel=8) as server, ThreadPoolExecutor(CLIENTS) as clients:
        texts = [f"client {number} wants this " * 2 for number in range(CLIENTS)]

        def ask(number: int) -> str:
            if number % 2:
                return str(server.ask(texts[number]).json()["choices"][0]["message"]["content"])
            with server.openai() as client:
                stream = client.chat.completions.create(
                    model="letters", messages=[{"role": "user", "content": texts[number]}], stream=True
                )
                return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

        assert list(clients.map(ask, range(CLIENTS))) == texts
    assert max(engine.shared) == 8
    assert len(engine.shared) < sum(engine.shared) / 2


def test_who_waits_joins_the_next_sweep_of_the_running_ones() -> None:
    engine = LetterEngine(sweep_s=0.1)
    with serving(lambda: engine) as server, ThreadPoolExecutor(2) as clients:
        long = clients.submit(server.ask, "x" * 900)
        until(lambda: len(engine.shared) > 1)
        assert server.ask("abc").status_code == 200
        assert not long.done()
        engine.sweep_s = 0
        assert long.result().status_code == 200
    assert 2 in engine.shared


def test_no_more_texts_share_a_sweep_than_memory_holds() -> None:
    engine = LetterEngine(sweep_s=0.02)
    engine.room = Room(free_B=2 * Room(0, 1).need_B(1000), token_B=1)
    with serving(lambda: engine, parallel=8) as server, ThreadPoolExecutor(6) as clients:
        answers = list(clients.map(lambda number: server.ask(f"text {number} " * 4), range(6)))
    assert all(answer.status_code == 200 for answer in answers)
    assert max(engine.shared) == 2


def test_a_full_line_is_refused_with_a_time_to_come_back() -> None:
    engine = LetterEngine(sweep_s=0.2)
    with serving(lambda: engine, parallel=1, max_queue=1) as server, ThreadPoolExecutor(2) as clients:
        first = clients.submit(server.ask, "x" * 900)
        until(lambda: server.worker.running == 1)
        second = clients.submit(server.ask, "abc")
        until(lambda: server.worker.waiting == 1)
        refused = server.ask("x")
        engine.sweep_s = 0
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        assert (first.result().status_code, second.result().status_code) == (200, 200)


def test_the_last_client_to_leave_ends_the_sweep() -> None:
    engine = LetterEngine(sweep_s=120)
    with serving(lambda: engine) as server:
        connection = raw_request(server, "abc", stream=True)
        until(lambda: len(engine.shared) == 1)
        connection.close()
        until(lambda: engine.stops == 1 and server.worker.running == 0)
        assert server.worker.totals.requests_cancelled_total == 1
        until(lambda: any("client left" in line for line in server.log))
        engine.sweep_s = 0
        assert server.ask("abc").json()["choices"][0]["message"]["content"] == "abc"


def test_a_real_sweep_is_cut_short_when_no_text_needs_it() -> None:
    def throttled() -> Engine:  # five layers of about a megabyte, half a minute for all of them
        return specexec.load("demo", drafter="none", offload="disk", link_limit_Bps=200_000)

    with serving(throttled, keepalive_s=0.2) as server:
        connection = raw_request(server, "What are you?", stream=True)
        seen = b""
        while b": sweep 1, layer" not in seen:
            seen += connection.recv(1000)
        connection.close()
        until(lambda: server.worker.running == 0)
        assert server.worker.engine.progress().layer < 4
        assert server.worker.totals.generated_tokens_total == 0


def test_a_client_without_a_stream_may_leave_too() -> None:
    engine = LetterEngine(sweep_s=120)
    with serving(lambda: engine) as server:
        connection = raw_request(server, "abc", n=3)
        until(lambda: len(engine.shared) == 1)
        connection.close()
        until(lambda: engine.stops == 1 and server.worker.running == 0)


def test_one_client_that_leaves_does_not_disturb_the_others() -> None:
    engine = LetterEngine(sweep_s=0.1)
    with serving(lambda: engine) as server, ThreadPoolExecutor(1) as clients:
        staying = clients.submit(server.ask, "x" * 480)
        leaving = raw_request(server, "y" * 900, stream=True)
        until(lambda: 2 in engine.shared)
        leaving.close()
        until(lambda: server.worker.totals.requests_cancelled_total == 1)
        engine.sweep_s = 0
        assert staying.result().json()["choices"][0]["message"]["content"] == "x" * 480
        assert engine.stops == 0


def test_a_slow_reader_delays_no_other() -> None:
    with serving(LetterEngine) as server:
        slow = [raw_request(server, "z" * 990, stream=True) for _ in range(3)]
        assert server.ask("quick").json()["choices"][0]["message"]["content"] == "quick", "none of them reads before"
        until(lambda: server.worker.running == 0)
        for connection in slow:
            seen = b""
            while b"[DONE]" not in seen:
                seen += connection.recv(1000)
            connection.close()


@pytest.mark.parametrize("mode", ["comment", "empty-delta"])
def test_a_silent_sweep_shows_signs_of_life(mode: Keepalive) -> None:
    engine = LetterEngine(sweep_s=0.5)
    with serving(
        lambda: engine, keepalive_s=0.1, keepalive="comment" if mode == "comment" else "empty-delta"
    ) as server:
        text = server.ask("abc", stream=True).text
    signs = [line for line in text.splitlines() if line.startswith(":") or '"delta":{"content":""}' in line]
    assert len(signs) >= 3
    assert signs[0] == ": sweep 1, layer 1/4" if mode == "comment" else signs[0].startswith("data: ")


def test_a_watcher_sees_the_tree_and_the_sweep() -> None:
    engine = LetterEngine(sweep_s=0.5)
    with serving(lambda: engine) as server:
        lines = server.ask("abcd", stream=True, watch=True).text.splitlines()
    seen = [json.loads(line[6:]).get("specexec") for line in lines if line.startswith("data: {")]
    bursts = [one["burst"] for one in seen if one and "burst" in one]
    assert bursts[0]["words"] == ["a", "b"]
    assert bursts[0]["parents"] == [-1, 0]
    assert (bursts[0]["path"], bursts[0]["own"]) == ([0, 1], ["c"])
    assert any(one and one.get("progress") == {"layer": 1, "layers": 4, "sweep": 1, "bytes_read": 0} for one in seen)


def test_an_error_in_a_sweep_reaches_its_clients_without_paths_and_the_server_goes_on() -> None:
    engine = LetterEngine()
    with serving(lambda: engine) as server:
        engine.broken = True
        failed = server.ask("abc")
        assert (failed.status_code, failed.json()["error"]["code"]) == (500, "broken_logits")
        assert "secret" not in failed.text
        streamed = server.ask("abc", stream=True)
        assert (streamed.status_code, '"code":"broken_logits"' in streamed.text) == (200, True)
        assert "[DONE]" not in streamed.text
        engine.broken = False
        assert server.ask("abc").status_code == 200


def test_stopping_tells_every_client_why() -> None:
    engine = LetterEngine(sweep_s=0.1)
    with serving(lambda: engine) as server, ThreadPoolExecutor(2) as clients:
        whole = clients.submit(server.ask, "x" * 900)
        streamed = clients.submit(server.ask, "y" * 900, stream=True)
        until(lambda: server.worker.running == 2)
        engine.sweep_s = 120
        server.running.handle_exit(2, None)
        assert whole.result(60).json()["error"]["code"] == "server_stopping"
        assert '"code":"server_stopping"' in streamed.result(60).text
    assert engine.closed


def test_a_text_that_goes_on_from_another_computes_only_what_is_new() -> None:
    with specexec.load("demo", budget=8) as engine, serving(lambda: engine) as server:
        question = {"role": "user", "content": "What are you?"}
        body: dict[str, object] = {"messages": [question], "max_tokens": 24, "temperature": 0}
        with server.http as client:
            first = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
            body["messages"] = [question, first, question]
            second = client.post("/v1/chat/completions", json=body).json()
        assert server.worker.totals.prompt_tokens_reused_total > 20
        fresh = engine.generate([question, first, question], SamplingParams(temperature=0, max_tokens=24))
        assert second["choices"][0]["message"]["content"] == fresh.text


@pytest.fixture(scope="module")
def demo() -> Iterator[Served]:
    with serving(lambda: specexec.load("demo", budget=8), parallel=8) as served:
        yield served


def test_the_text_depends_on_the_seed_and_not_on_other_requests(demo: Served) -> None:
    def ask(seed: int) -> httpx.Response:
        with demo.http as client:
            body = {"prompt": "The list", "seed": seed % 5, "temperature": 1, "max_tokens": 12, "n": 1 + seed % 2}
            return client.post("/v1/completions", json=body)

    with ThreadPoolExecutor(20) as clients:
        answers = [answer.json()["choices"] for answer in clients.map(ask, range(20))]
    with specexec.load("demo", drafter="none") as plain:

        @cache
        def alone(seed: int) -> str:
            return plain.generate("The list", SamplingParams(temperature=1, seed=seed, max_tokens=12)).text

        for number, choices in enumerate(answers):
            for index, choice in enumerate(choices):
                seed = number % 5 if index == 0 else derived_seed(number % 5, "choice", index) % 2**53
                assert choice["text"] == alone(seed)


def test_threads_end_with_the_server() -> None:
    before = {*threading.enumerate()}
    with serving(LetterEngine) as server:
        server.ask("abc")
    until(lambda: not started_since(before))


def test_a_request_that_takes_too_long_is_ended_and_lets_the_engine_go() -> None:
    with serving(lambda: LetterEngine(sweep_s=0.2), timeout_s=3.0) as served:
        late = served.ask("a" * 400)
        assert late.status_code == 504
        assert late.json()["error"]["code"] == "request_timeout"
        assert "not finished within 3 s" in late.json()["error"]["message"]
        events = served.ask("a" * 400, stream=True).text.split("data: ")
        assert '"content":"a' in events[2], "what was written in time has arrived"
        assert '"request_timeout"' in events[-1]
        until(lambda: served.worker.running == 0)
        assert served.ask("ok").status_code == 200


def test_a_model_may_have_several_names() -> None:
    with serving(LetterEngine, names=("letters", "abc")) as served:
        assert [model.id for model in served.openai().models.list()] == ["letters", "abc"]
        assert served.openai().models.retrieve("abc").id == "abc"
        assert served.ask("hi", model="abc").json()["model"] == "abc"
        assert served.ask("hi").json()["model"] == "letters"
        assert served.ask("hi", model="other").status_code == 404


def test_a_request_that_takes_long_to_prepare_holds_up_no_other() -> None:
    inside, go_on = threading.Event(), threading.Event()

    class Slow(LetterEngine):
        def encode_rest(self, text: str | Rendered) -> list[int]:
            if text == Rendered("slow"):
                inside.set()
                assert go_on.wait(60)
            return super().encode_rest(text)

    with serving(Slow) as server, ThreadPoolExecutor() as pool:
        slow = pool.submit(server.ask, "slow")
        assert inside.wait(60)
        assert server.ask("short").json()["choices"][0]["message"]["content"] == "short"
        assert not slow.done()
        go_on.set()
        assert slow.result().json()["choices"][0]["message"]["content"] == "slow"


def held(tokens: list[int]) -> KVCache:
    """A cache of one layer in which a token's row is its number."""
    rows_HRD = torch.arange(len(tokens), dtype=torch.float32)[None, :, None]
    return KVCache({0: LayerKV(rows_HRD, rows_HRD)}, tokens)


def test_a_beginning_is_copied_from_a_text_that_is_being_written_or_worth_more() -> None:
    pool, live, long = IdleCaches(8), held([*range(100), 7]), held([*range(200, 500)])
    pool.put({"model": long})
    taken = pool.take([*range(100), 9, 9], live=[{"model": live}])
    assert (taken.shared, taken.by_model["model"].tokens, len(live)) == (100, [*range(100)], 101)
    copied = taken.by_model["model"].layers[0].keys_HRD
    assert copied.data_ptr() != live.layers[0].keys_HRD.data_ptr()
    taken = pool.take([*range(200, 300), 9], live=[])
    assert (taken.shared, pool.lengths) == (100, [300]), "what is long stays for whoever goes on with it"
    taken = pool.take([*range(200, 450), 9], live=[])
    assert (taken.by_model["model"], pool.lengths) == (long, [])
    assert pool.take([1, 2, 3], live=[{"model": live}]) == ({}, 0)


def test_of_texts_that_come_together_one_reads_what_they_share() -> None:
    with specexec.load("demo", budget=8) as engine, serving(lambda: engine) as server:
        body = {"prompt": "The day is long. " * 120, "max_tokens": 4, "temperature": 0, "n": 3}
        with server.http as client:
            answers = client.post("/v1/completions", json=body).json()
        prompt = answers["usage"]["prompt_tokens"]
        assert prompt > 300
        assert len({choice["text"] for choice in answers["choices"]}) == 1
        assert server.worker.totals.prompt_tokens_reused_total >= 2 * (prompt - 1)
