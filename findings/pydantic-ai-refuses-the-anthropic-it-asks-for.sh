#!/usr/bin/env bash
# pydantic-ai-slim 2.38.0 with the anthropic package that its own extra brings (2.14.0): AnthropicModel raises
# "TypeError: Cannot instantiate typing.Union" before a request leaves, whatever the server.
#
# BetaMessageParam was a class in anthropic 0.x and is a Union in 2.14.0; pydantic-ai calls it. pip finds no conflict.
#
# Seen with pydantic-ai-slim[anthropic] 2.38.0 and anthropic 2.14.0 on Python 3.11.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "pydantic-ai-slim[anthropic]==2.38.0" anthropic==2.14.0
"$folder/venv/bin/pip" check >/dev/null
"$folder/venv/bin/python" - <<'PY'
from anthropic import AsyncAnthropic
from pydantic_ai import Agent
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.providers.anthropic import AnthropicProvider

provider = AnthropicProvider(anthropic_client=AsyncAnthropic(base_url="http://127.0.0.1:1", api_key="none", max_retries=0))
try:
    Agent(AnthropicModel("m", provider=provider)).run_sync("hi")
except TypeError as error:
    print("TypeError:", error)
    assert "Union" in str(error)
else:
    raise SystemExit("it was asked")
PY
