"""HTTP to a running server: JSON there and back, and the events of an answer. Knows no conversation and no item."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from email.message import Message as Headers
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import TypeAlias, TypeVar
from urllib.parse import urlsplit

import click

from cli.shared.errors import NoServer, ServerRefusal
from cli.shared.options import LOADING, was_chosen
from offload.machine.folders import typed_path

Result = TypeVar("Result")
Json = dict[str, object]
Refusal: TypeAlias = NoServer | ServerRefusal

ADDRESS = "http://127.0.0.1:8000"
NOTES = "X-Specexec-Notes"  # what a request asked for and does not get
_QUICK_S, _SLOW_S = 10.0, 600.0  # an answer may wait for a model to be loaded, or for one to finish what it writes
_HINT = "specexec serve in another terminal, or --connect URL"


def server_options(default: str | None) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Where the server is, and its key. Without a `default` there need not be one."""

    def decorated(command: Callable[..., Result]) -> Callable[..., Result]:
        says = "The server's" if default else "Let the server there answer, which specexec serve has started: its"
        says = f"{says} address, or Unix socket."
        address = click.option("--connect", metavar="URL", default=default, help=says)
        key = click.option(
            "--api-key", metavar="KEY", envvar="SPECEXEC_API_KEY", help="The server's key, if it has one."
        )
        return key(address(command))

    return decorated


def say_without_effect(tell: Callable[[str], None]) -> None:
    """Name the options of this command line, and of the environment, that decide about loading: a server has loaded."""
    options = click.get_current_context().command.params
    given = [one for one in options if one.name in LOADING and was_chosen(str(one.name))]
    names = [next(name for name in one.opts if name.startswith("--")) for one in given]
    if names:
        tell(f"Note: without effect, for a server loads its models itself: {', '.join(names)}")


class _UnixConnection(HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Server:
    """One server by its address, which may end in /v1, or by its socket: a path, or unix:PATH.

    Raises click.UsageError for what is no address.
    """

    def __init__(self, address: str, key: str | None = None) -> None:
        self._socket = _socket_in(address)
        if self._socket is not None:
            self.address, self._key, self._parts = f"unix:{self._socket}", key, urlsplit("http://localhost")
            return
        address = address if "://" in address else f"http://{address}"
        self.address = address.rstrip("/").removesuffix("/v1")
        self._key = key
        try:
            self._parts = urlsplit(self.address)
            self._place = (self._parts.hostname or "", self._parts.port)
        except ValueError as problem:
            raise click.UsageError(f"--connect {address}: {problem}.") from None
        if self._parts.scheme not in ("http", "https") or not self._place[0]:
            raise click.UsageError(f"--connect {address}: an address that begins with http:// is needed.")

    def asked(self, path: str, body: Mapping[str, object] | None = None) -> Json:
        """The JSON object that it answers with. Raises NoServer, ServerRefusal."""
        with self._talking():
            connection = self._connection(_SLOW_S if body else _QUICK_S)
            try:
                with self._answer(connection, path, body) as response:
                    stated = json.loads(response.read())
            finally:
                connection.close()
        if not isinstance(stated, dict):
            raise self.foreign
        return stated

    def events(self, path: str, body: Mapping[str, object]) -> Events:
        """The answer to a request that asks for a stream; nothing is sent before the first event is asked for."""
        return Events(self, path, body)

    @property
    def foreign(self) -> NoServer:
        """Something answers there that does not speak as we do."""
        return NoServer(f"what answers at {self.address} is no server of specexec.", hint="--connect URL")

    def _connection(self, timeout_s: float) -> HTTPConnection:
        if self._socket is not None:
            return _UnixConnection(self._socket, timeout_s)
        # No proxy of the surroundings: it is for the internet, and our servers are near.
        kind = HTTPSConnection if self._parts.scheme == "https" else HTTPConnection
        return kind(*self._place, timeout=timeout_s)

    def _answer(self, connection: HTTPConnection, path: str, body: Mapping[str, object] | None) -> HTTPResponse:
        """The beginning of a response. Raises ServerRefusal for one that is an error."""
        headers = {"Content-Type": "application/json", **({"x-api-key": self._key} if self._key else {})}
        sent = None if body is None else json.dumps(body).encode()
        connection.request("GET" if sent is None else "POST", f"{self._parts.path}{path}", sent, headers)
        response = connection.getresponse()
        if response.status >= 400:
            with response:
                raise self._refusal(response.status, response.read(), response.headers, response.reason)
        return response

    def _refusal(self, status: int, body: bytes, headers: Headers, reason: str) -> Refusal:
        try:
            error = json.loads(body)["error"]
        except (ValueError, KeyError, TypeError, RecursionError):
            error = f"{status} {reason}."
        waited = headers.get("Retry-After", "")
        return self.refusal(error, status, int(waited) if waited.isdecimal() else None)

    def refusal(self, error: object, status: int = 500, retry_s: int | None = None) -> Refusal:
        """An error in the words of OpenAI's protocol or of Ollama's; NoServer for a server that is about to leave."""
        message, code = (error.get("message"), error.get("code")) if isinstance(error, dict) else (error, None)
        if code == "server_stopping":
            return NoServer(f"the server at {self.address} stops.", hint=_HINT)
        hint = "--api-key KEY, or SPECEXEC_API_KEY" if status == 401 else None
        return ServerRefusal(f"the server at {self.address} refuses: {message}", str(code), retry_s, hint)

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """What goes wrong on the way, as NoServer."""
        try:
            yield
        except (TimeoutError, OSError, HTTPException, ValueError) as problem:
            reason = (isinstance(problem, OSError) and problem.strerror) or problem or type(problem).__name__
            raise NoServer(f"no server answers at {self.address}: {reason}.", hint=_HINT) from None


class Events:
    """The events of one answer, in order, until the server has said that it was the last.

    `notes` is what the server left out of the request, known with the first event. After `stop`, which is safe in a
    signal handler and in any thread, there are no more: the server notices, and writes no further.
    """

    def __init__(self, server: Server, path: str, body: Mapping[str, object]) -> None:
        self.notes = ""
        self.stopped = False
        self._server, self._path, self._body = server, path, body
        self._socket: socket.socket | None = None

    def stop(self) -> None:
        """Hang up."""
        self.stopped = True
        if self._socket is not None:
            with suppress(OSError):  # closed already
                self._socket.shutdown(socket.SHUT_RDWR)

    def __iter__(self) -> Iterator[Json]:
        connection = self._server._connection(_SLOW_S)
        try:
            yield from self._read(connection)
        except NoServer:
            if not self.stopped:
                raise
        finally:
            self._socket = None
            connection.close()

    def _read(self, connection: HTTPConnection) -> Iterator[Json]:
        with self._server._talking():
            connection.connect()
            self._socket = connection.sock
            if self.stopped:
                return
            response = self._server._answer(connection, self._path, self._body)
        self.notes = response.headers.get(NOTES) or ""
        with response:
            while True:
                with self._server._talking():
                    line = _next_line(response)
                    event = json.loads(line[6:]) if line.startswith(b"data: {") else None
                if line.startswith(b"data: [DONE]"):
                    return
                if not line:
                    raise NoServer(f"the server at {self._server.address} broke off in the middle of an answer.")
                if event is not None:
                    if "error" in event:
                        raise self._server.refusal(event["error"])
                    yield event


def _socket_in(address: str) -> str | None:
    """The path of a Unix socket, if that is meant."""
    if address.startswith("unix:"):
        return str(typed_path(address.removeprefix("unix:").removeprefix("//")))
    path = typed_path(address)
    return str(path) if "://" not in address and path.is_socket() else None


def _next_line(response: HTTPResponse) -> bytes:
    """Empty where no more comes, for whatever reason."""
    try:
        return response.readline()
    except (OSError, HTTPException):
        return b""
