"""Who may talk to the server: local names, known pages, holders of the key. And the command around it."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from cli.app import main
from cli.serve.command import _listen_on, short_name
from cli.serve.guard import Policy, is_loopback
from cli.shared.errors import PortTaken
from tests.command_line import CommandLine
from tests.fake_engine import FakeEngine
from tests.serving import LetterEngine, Served, serving

KEY = "a long secret"


@pytest.fixture(scope="module")
def locked() -> Iterator[Served]:
    with serving(LetterEngine, key=KEY, origins=("https://chat.example",)) as served:
        yield served


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    return CommandLine(capsys, monkeypatch, FakeEngine())


def get(server: Served, path: str, **headers: str) -> httpx.Response:
    with server.http as client:
        return client.get(path, headers=headers)


def test_only_the_key_opens(locked: Served) -> None:
    with locked.openai(KEY) as client:
        assert [model.id for model in client.models.list()] == ["letters"]
    with locked.openai("a wrong secret") as client, pytest.raises(openai.AuthenticationError) as refusal:
        client.models.list()
    assert refusal.value.code == "invalid_api_key"
    refused = get(locked, "/v1/models")
    assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
    assert KEY not in refused.text
    assert get(locked, "/metrics", Authorization=f"Basic {KEY}").status_code == 401


def test_a_monitor_needs_no_key(locked: Served) -> None:
    assert get(locked, "/health").status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", ""])
def test_a_foreign_name_for_this_machine_is_refused(locked: Served, host: str) -> None:
    refused = get(locked, "/health", Host=host)
    assert refused.status_code in (400, 403)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "[::1]:8000", "127.0.0.1:1"])
def test_every_local_name_is_served(locked: Served, host: str) -> None:
    assert get(locked, "/health", Host=host).status_code == 200


def test_a_foreign_page_is_refused_and_a_known_one_allowed(locked: Served) -> None:
    assert get(locked, "/health", Origin="https://evil.example").json()["error"]["code"] == "origin_not_allowed"
    assert get(locked, "/health", Origin="null").status_code == 403
    known = get(locked, "/health", Origin="https://chat.example")
    assert known.headers["access-control-allow-origin"] == "https://chat.example"
    assert get(locked, "/health", Origin=locked.url).status_code == 200
    with locked.http as client:
        flight = client.options("/v1/chat/completions", headers={"Origin": "https://chat.example"})
    assert (flight.status_code, "authorization" in flight.headers["access-control-allow-headers"]) == (204, True)


def test_huge_headers_are_refused(locked: Served) -> None:
    host, port = locked.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 200_000)
        assert connection.recv(100).startswith(b"HTTP/1.1 4")


def test_a_server_for_others_answers_to_any_name() -> None:
    assert Policy.of("0.0.0.0", "key", ()).hosts is None
    assert [is_loopback(host) for host in ("127.0.0.9", "::1", "localhost", "0.0.0.0", "192.168.1.2", "name")] == [
        True, True, True, False, False, False,
    ]  # fmt: skip


def test_other_machines_are_let_in_only_with_a_key(command: CommandLine) -> None:
    ran = command("serve", "--host", "0.0.0.0")
    assert (ran.code, "--api-key" in ran.err) == (2, True)


def test_a_taken_port_is_said_before_anything_loads(command: CommandLine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ran = command("serve", "--port", str(port))
    assert ran.code == 9
    assert ran.err == f"Error: cannot listen on 127.0.0.1:{port}: Address already in use.\n  Try: another --port\n"
    assert command.options is None


def test_a_missing_extra_names_the_command_that_brings_it(
    command: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cli.serve.command.find_spec", lambda name: None if name == "uvicorn" else object())
    ran = command("serve")
    assert ran.code == 2
    assert ran.err.startswith("Error: the server needs uvicorn, which is not installed.\n  Try: ")
    assert "pip install 'specexec[serve]'" in ran.err


def test_a_path_is_never_a_models_name(tmp_path: Path) -> None:
    assert short_name(str(tmp_path)) == tmp_path.name
    assert short_name("org/name") == "org/name"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_serves_until_a_signal_stops_it(number: int, code: int, tmp_path: Path) -> None:
    """It starts without the packages that transformers would import though nothing here asks for them."""
    log = (tmp_path / "log").open("w+")
    unused = "not {'hqq', 'scipy'} & {*sys.modules}"
    program = f"import sys; from cli.app import main; code = main(sys.argv[1:]); assert {unused}; sys.exit(code)"
    process = subprocess.Popen(
        [sys.executable, "-c", program, "serve", "--port", "0", "--budget", "4", "--json"],
        stdout=subprocess.PIPE, stderr=log, env={**os.environ, "SPECEXEC_API_KEY": KEY},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line, said = process.stdout.readline(), (tmp_path / "log").read_text()
        assert line, said
        url = json.loads(line)["base_url"]
        assert f"ready: {url} · " in said
        assert KEY not in said
        body = {"prompt": "List", "max_tokens": 3}
        with httpx.Client(trust_env=False, timeout=120) as client:
            answer = client.post(f"{url}/completions", json=body, headers={"Authorization": f"Bearer {KEY}"})
        assert answer.json()["usage"]["completion_tokens"] == 3
        process.send_signal(number)
        assert process.wait(20) == code
        assert "POST /v1/completions 1+3 tok" in (tmp_path / "log").read_text()
        kept = [Path(os.environ[f"XDG_{kind}_HOME"]).rglob("*.safetensors") for kind in ("STATE", "CACHE")]
        assert {file.parent.name for files in kept for file in files} == {"learned", "recall"}, (
            "the next run begins where this one ended"
        )
    finally:
        process.kill()
        process.communicate()
        log.close()


def test_a_unix_socket_is_for_its_owner_alone_and_goes_with_the_server(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))  # left behind by one that was killed
    listening = _listen_on(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(PortTaken, match="Address already in use"):
        _listen_on(path)
    with serving(LetterEngine, listening=listening) as served:
        transport = httpx.HTTPTransport(uds=str(path))
        with httpx.Client(transport=transport, base_url="http://localhost") as client:
            assert client.get("/v1/models").json()["data"][0]["id"] == "letters"
            assert client.get("/v1/models", headers={"Host": "evil.example"}).status_code == 403
        assert served.worker.state == "ok"


def test_a_model_that_cannot_be_loaded_ends_the_server_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", "0", "-m", "no-such-model", "--offline"]) == 3
    said = capsys.readouterr().err
    assert "Error: " in said
    assert "Traceback" not in said
