"""Who may talk to the server: Host, Origin and key are checked before anything is read. Plain ASGI, no model."""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from ipaddress import ip_address

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cli.openai.errors import ApiError
from cli.serve.refusals import response_of

OPEN_PATHS = ("/health", "/")  # a monitor needs no key, and a page that asks for one must be seen first
_NAMES = {"localhost", "127.0.0.1", "::1"}


def is_loopback(host: str) -> bool:
    """Whether an address reaches this machine only."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True)
class Policy:
    """`hosts` None accepts any name: the server is meant to be reached from elsewhere, and a key protects it."""

    key: str | None
    hosts: frozenset[str] | None
    origins: frozenset[str]

    @staticmethod
    def of(bound_to: str, key: str | None, origins: tuple[str, ...]) -> Policy:
        """On a loopback address only local names are served, so that no foreign page can reach us by DNS tricks."""
        hosts = frozenset(_NAMES | {bound_to.strip("[]")}) if is_loopback(bound_to) else None
        return Policy(key, hosts, frozenset(origins))

    def check(self, headers: Headers, path: str, method: str) -> None:
        """Raises ApiError for a request that must not be answered."""
        host = headers.get("host", "")
        if self.hosts is not None and _name(host) not in self.hosts:
            raise ApiError(403, "host_not_allowed", "this server answers to local names only.")
        origin = headers.get("origin")
        if origin is not None and not self._known(origin, host):
            raise ApiError(403, "origin_not_allowed", "this page may not use the server; see --cors-origin.")
        if self.key is not None and path not in OPEN_PATHS and method != "OPTIONS" and not self._opens(headers):
            raise ApiError(401, "invalid_api_key", "a key is needed: Authorization: Bearer KEY.")

    def _known(self, origin: str, host: str) -> bool:
        return "*" in self.origins or origin in self.origins or origin in (f"http://{host}", f"https://{host}")

    def _opens(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        expected = (self.key or "").encode()
        return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), expected)


def _name(host: str) -> str:
    """The name in a Host header, without the port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


class Guard:
    """Refuses what the policy forbids and adds the few headers that browsers need."""

    def __init__(self, app: ASGIApp, policy: Policy) -> None:
        self._app = app
        self._policy = policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        try:
            self._policy.check(headers, scope["path"], scope["method"])
        except ApiError as refusal:
            await response_of(refusal)(scope, receive, send)
            return
        allowed = _cors(origin) if origin is not None and self._policy.origins else {}
        if scope["method"] == "OPTIONS" and origin is not None:
            await Response(status_code=204, headers=allowed)(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                raw = message["headers"]
                message["headers"] = [*raw, *((name.encode(), value.encode()) for name, value in allowed.items())]
            await send(message)

        await self._app(scope, receive, with_headers)


def _cors(origin: str) -> dict[str, str]:
    return {
        "access-control-allow-origin": origin,
        "access-control-allow-headers": "authorization, content-type",
        "access-control-allow-methods": "GET, POST",
        "vary": "Origin",
    }
