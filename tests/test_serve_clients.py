"""What real clients send besides the plain request: browsers, containers, and habits from other servers."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

import specexec
from tests.serving import LetterEngine, Served, serving

PAGE = "https://chat.example"
KEY = "a long secret"
STAINLESS = "authorization,content-type,x-stainless-arch,x-stainless-lang,x-stainless-os,x-stainless-retry-count"


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with serving(LetterEngine, key=KEY, origins=(PAGE,), hosts=("gpu.lan", "NAS")) as served:
        yield served


def ask(server: Served, **more: object) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": "abcdef"}], **more}
    with server.http as client:
        return client.post("/v1/chat/completions", json=body, headers={"x-api-key": KEY})


def test_a_browser_may_send_the_headers_that_its_client_library_adds(server: Served) -> None:
    wanted = {
        "Origin": PAGE,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": STAINLESS,
        "Access-Control-Request-Private-Network": "true",
    }
    with server.http as client:
        flight = client.options("/v1/chat/completions", headers=wanted)
        refused = client.options("/v1/chat/completions", headers={**wanted, "Origin": "https://evil.example"})
    assert flight.status_code == 204
    assert set(STAINLESS.split(",")) <= set(flight.headers["access-control-allow-headers"].replace(" ", "").split(","))
    assert "POST" in flight.headers["access-control-allow-methods"]
    assert flight.headers["access-control-allow-private-network"] == "true"
    assert (refused.status_code, "access-control-allow-origin" in refused.headers) == (403, False)


def test_a_page_can_read_why_it_was_refused(server: Served) -> None:
    with server.http as client:
        refused = client.get("/v1/models", headers={"Origin": PAGE})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, PAGE)


@pytest.mark.parametrize("host", ["host.docker.internal:8000", "host.containers.internal", "gpu.lan:80", "nas"])
def test_a_container_and_a_name_that_was_allowed_reach_it(server: Served, host: str) -> None:
    with server.http as client:
        assert client.get("/health", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [({"x-api-key": KEY}, 200), ({"x-api-key": "wrong"}, 401), ({"x-api-key": ""}, 401),
     ({"x-api-key": KEY, "Authorization": "Bearer none"}, 200)],
)  # fmt: skip
def test_a_key_may_come_as_x_api_key(server: Served, headers: dict[str, str], status: int) -> None:
    with server.http as client:
        assert client.get("/v1/models", headers=headers).status_code == status


@pytest.mark.parametrize(
    "more",
    [{"max_tokens": -1}, {"max_completion_tokens": -1}, {"n_predict": -1}, {"max_tokens": 6.0}, {"top_k": -1},
     {"seed": -1}, {"repeat_penalty": 1.1}, {"n": 1.0}],
)  # fmt: skip
def test_the_conventions_of_other_servers_clients_are_understood(server: Served, more: dict[str, object]) -> None:
    answer = ask(server, **more)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == "abcdef"


def test_a_body_whose_type_a_client_does_not_name_is_read_as_json(server: Served) -> None:
    body = b'{"messages": [{"role": "user", "content": "abcdef"}]}'
    with server.http as client:
        bare = client.post("/v1/chat/completions", content=body, headers={"x-api-key": KEY})
        form = {"x-api-key": KEY, "content-type": "text/plain"}
        refused = client.post("/v1/chat/completions", content=body, headers=form)
    assert (bare.status_code, refused.status_code) == (200, 415)


def test_a_length_under_another_servers_name_is_kept(server: Served) -> None:
    assert ask(server, n_predict=2).json()["choices"][0]["message"]["content"] == "ab"


@pytest.mark.parametrize("length", [0, -2, 1.5])
def test_other_lengths_are_refused_by_name(server: Served, length: float) -> None:
    refused = ask(server, max_tokens=length)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_tokens")


def test_the_seed_of_every_choice_survives_javascript_and_gives_its_text_again() -> None:
    with serving(lambda: specexec.load("demo", drafter="none", dtype="f32")) as server:
        asked = {"max_tokens": 8, "temperature": 1.5}
        many = server.ask("Hello", n=4, seed=5, **asked).json()["choices"]
        assert len({choice["message"]["content"] for choice in many}) > 1
        for choice in many:
            assert choice["seed"] == int(float(choice["seed"])) < 2**53
            (again,) = server.ask("Hello", seed=choice["seed"], **asked).json()["choices"]
            assert (again["seed"], again["message"]) == (choice["seed"], choice["message"])


def test_a_wish_to_think_without_a_variable_for_it_is_reported(server: Served) -> None:
    assert "the wish to think has no effect" in ask(server, reasoning_effort="high").headers["x-specexec-notes"]
    refused = ask(server, reasoning_effort="enormous")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "reasoning_effort")
