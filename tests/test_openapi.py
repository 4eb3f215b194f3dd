"""/openapi.json is true: it names every route, its schemas are those that read bodies, and refusals look as it says.

scripts/fuzz_server.py asks all that it allows and forbids.
"""

from __future__ import annotations

from typing import Any

import pytest

from cli.serve.application import application
from cli.serve.completions import ServerSettings
from cli.serve.guard import Policy
from cli.serve.openapi import OPERATIONS
from tests.serving import Served


@pytest.fixture(scope="module")
def told(letters: Served) -> dict[str, Any]:
    with letters.http as http:
        found: dict[str, Any] = http.get("/openapi.json").json()
    return found


def test_every_route_is_in_the_document_and_nothing_else(letters: Served, told: dict[str, Any]) -> None:
    settings = ServerSettings(("letters",), 5.0, "comment", print)
    app: Any = application(letters.models, settings, Policy.of("127.0.0.1", None, (), ()))
    routes = {
        (method.lower(), route.path.replace(":path", ""))
        for route in app._app.routes
        for method in route.methods - {"HEAD"}
    }
    assert routes == {(one.method, one.path) for one in OPERATIONS}
    assert routes == {(method, path) for path, methods in told["paths"].items() for method in methods}


def test_every_reference_leads_to_a_schema(told: dict[str, Any]) -> None:
    def references(value: object) -> list[str]:
        if isinstance(value, list):
            return [found for one in value for found in references(one)]
        if isinstance(value, dict):
            own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
            return own + [found for one in value.values() for found in references(one)]
        return []

    names = {found.removeprefix("#/components/schemas/") for found in references(told)}
    assert len(names) > 20
    assert names <= told["components"]["schemas"].keys()
    assert told["components"]["schemas"]["ChatRequest"]["properties"]["model"] == {"enum": ["letters", None]}


def test_a_wrong_method_says_which_are_right(letters: Served) -> None:
    with letters.http as http:
        for path, right in (("/v1/chat/completions", {"POST"}), ("/v1/models", {"GET", "HEAD"})):
            refused = http.request("PUT", path)
            assert (refused.status_code, set(refused.headers["allow"].split(", "))) == (405, right)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/detokenize", {"model": {}, "tokens": []}),
        ("/tokenize", {"model": 3, "content": "x"}),
        ("/api/chat", {"model": "letters", "think": "loudly"}),
        ("/api/generate", {"model": "letters", "prompt": 0}),
        ("/api/show", {"model": "letters", "name": {}}),
        ("/v1/completions", {"prompt": "x", "stream_options": {"include_usage": 1}}),
    ],
)
def test_a_body_that_its_schema_forbids_is_refused(letters: Served, path: str, body: dict[str, object]) -> None:
    """Found by schemathesis."""
    with letters.http as http:
        assert http.post(path, json=body).status_code == 400
        assert http.post("/api/show", json={"model": "letters", "name": "other"}).status_code == 404
