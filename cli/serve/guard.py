"""Access to the server: Host, Origin and key are checked before a body is read. Plain ASGI, no model."""

from __future__ import annotations

import hmac
import re
import secrets
from dataclasses import dataclass
from ipaddress import ip_address

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cli.openai.errors import ApiError
from cli.serve.refusals import NOTES, response_of

REQUEST_NAMES = ("x-request-id", "request-id")  # the headers where OpenAI's and Anthropic's clients look for it
_REQUEST_NAME = re.compile(r"[A-Za-z0-9._:-]{1,128}")
OPEN_PATHS = ("/health", "/")  # a monitor needs no key, and a page that asks for one must be seen first
# The last three are what containers call their host: no site can register `.internal`, so no foreign page has them.
_NAMES = {"localhost", "127.0.0.1", "::1"} | {
    f"{name}.internal" for name in ("host.docker", "gateway.docker", "host.containers")
}


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
    def of(bound_to: str, key: str | None, origins: tuple[str, ...], names: tuple[str, ...] = ()) -> Policy:
        """On a loopback address only local names and `names` are served, so that no page reaches us by DNS tricks."""
        known = frozenset(_name(name) for name in (*_NAMES, bound_to, *names))
        hosts = known if is_loopback(bound_to) else None
        return Policy(key, hosts, frozenset(origins))

    def check(self, headers: Headers, path: str, method: str) -> None:
        """Raises ApiError for a request that must not be answered."""
        host = headers.get("host", "")
        if self.hosts is not None and _name(host) not in self.hosts:
            raise ApiError(403, "host_not_allowed", "this server answers to local names only; see --allowed-host.")
        origin = headers.get("origin")
        if origin is not None and not self._known(origin, host):
            raise ApiError(403, "origin_not_allowed", "this page may not use the server; see --cors-origin.")
        if self.key is not None and path not in OPEN_PATHS and method != "OPTIONS" and not self._opens(headers):
            raise ApiError(401, "invalid_api_key", "a key is needed: Authorization: Bearer KEY, or x-api-key: KEY.")

    def cors(self, headers: Headers) -> dict[str, str]:
        """What a browser must read before a page of another origin may see the answer; nothing for other clients."""
        origin = headers.get("origin")
        if origin is None or not self._listed(origin):
            return {}
        asked = headers.get("access-control-request-headers", "authorization, content-type")
        private = {"access-control-allow-private-network": "true"}
        return {
            "access-control-allow-origin": origin,
            "access-control-allow-headers": asked,  # clients send many of their own, such as x-stainless-os
            "access-control-allow-methods": "GET, POST, DELETE",
            "access-control-expose-headers": ", ".join((NOTES, "retry-after", *REQUEST_NAMES)),
            "access-control-max-age": "600",
            "vary": "Origin, Access-Control-Request-Headers",
            **(private if "access-control-request-private-network" in headers else {}),
        }

    def _listed(self, origin: str) -> bool:
        return "*" in self.origins or origin in self.origins

    def _known(self, origin: str, host: str) -> bool:
        return self._listed(origin) or origin in (f"http://{host}", f"https://{host}")

    def _opens(self, headers: Headers) -> bool:
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = [headers.get("x-api-key", ""), bearer if scheme.lower() == "bearer" else ""]
        expected = (self.key or "").encode()
        return any(hmac.compare_digest(key.strip().encode(), expected) for key in given)


def _name(host: str) -> str:
    """The name in a Host header, without the port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    if host.count(":") > 1:
        return host.lower()  # an address of version 6 as one binds to it
    return host.partition(":")[0].lower()


def request_name(headers: Headers) -> str:
    """The name that a client gave its request, if it is one for a log, or a new one."""
    given = headers.get(REQUEST_NAMES[0], "")
    return given if _REQUEST_NAME.fullmatch(given) else f"req_{secrets.token_hex(12)}"


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
        name = request_name(headers)
        added = {**self._policy.cors(headers), **dict.fromkeys(REQUEST_NAMES, name)}

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                raw = message["headers"]
                message["headers"] = [
                    *raw,
                    *((name.encode(), value.encode("latin-1")) for name, value in added.items()),
                ]
            await send(message)

        try:
            self._policy.check(headers, scope["path"], scope["method"])
        except ApiError as refusal:
            await response_of(refusal, scope["path"])(scope, receive, with_headers)
            return
        if scope["method"] == "OPTIONS" and "origin" in headers:
            await Response(status_code=204)(scope, receive, with_headers)
            return
        await self._app(scope, receive, with_headers)
