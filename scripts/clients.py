"""Try the server with the clients people use, and write the table of docs/clients.md: client, call, works or not.

The clients are installed by pip and npm into a folder of their own (~/.cache/specexec-clients, or what SPECEXEC_CLIENTS
names), never here. A tiny model answers: it thinks, says hello, calls a tool, writes JSON, so that every answer is
known beforehand. What clients of one language call is in client_calls.py and client_calls.mjs.

    python scripts/clients.py                        # install what is missing, run all, write the table
    python scripts/clients.py pydantic-ai ollama     # only these; the rows of others stay as they are
    python scripts/clients.py --serve                # only the server, until Ctrl-C
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import client_calls as asked

import specexec
from tests.families import small_writer
from tests.serving import Served, serving

ROOT = Path(__file__).parent.parent
FOLDER = Path(os.environ.get("SPECEXEC_CLIENTS") or Path.home() / ".cache" / "specexec-clients")
PAGE = ROOT / "docs" / "clients.md"
BEGIN, END = "<!-- table: scripts/clients.py -->\n", "<!-- end -->\n"
PYTHON = {
    **{name: name for name in ("openai", "anthropic", "ollama", "litellm", "langchain-openai", "instructor", "llm")},
    "pydantic-ai": "pydantic-ai-slim[openai,anthropic]",
    "openai-agents": "openai-agents",
    "lm-eval": "lm-eval[api]",
}
NODE = ("openai", "@ai-sdk/openai", "@ai-sdk/anthropic", "@ai-sdk/openai-compatible", "ollama")
NODE_TOO = ("ai", "zod")  # what those are used with
CLIENT_S = 240  # for all calls of one client


@dataclass(frozen=True)
class Client:
    """One package of one language, and the version that is installed."""

    language: str
    name: str
    version: str


def install() -> list[Client]:
    """All clients that can be had, installed once."""
    python = FOLDER / "python" / "bin" / "python"
    if not python.exists():
        venv.create(FOLDER / "python", with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PYTHON.values()], check=True)
    listed = subprocess.run([python, "-m", "pip", "list", "--format=json"], check=True, capture_output=True).stdout
    versions = {package["name"].lower().replace("_", "-"): package["version"] for package in json.loads(listed)}
    found = [Client("Python", name, versions[re.sub(r"\[.*", "", package)]) for name, package in PYTHON.items()]
    if shutil.which("npm") is None:
        print("npm is not here: clients for Node are not tried", file=sys.stderr)
        return found
    modules = FOLDER / "node"
    if not (modules / "node_modules").exists():
        modules.mkdir(parents=True, exist_ok=True)
        wanted = ["npm", "install", "--no-audit", "--no-fund", "--silent", *NODE, *NODE_TOO]
        subprocess.run(wanted, cwd=modules, check=True)
    for name in NODE:
        told = json.loads((modules / "node_modules" / name / "package.json").read_text(encoding="utf-8"))
        found.append(Client("Node", name, told["version"]))
    return found


@contextmanager
def server() -> Iterator[Served]:
    """The model that knows these answers, served as `agent`."""
    call = '<tool_call>\n{{"name": "{}", "arguments": {}}}\n</tool_call>'
    oslo = asked.OSLO.model_dump_json().replace(":", ": ").replace(",", ", ")
    answers = {
        asked.HELLO: asked.GREETING,
        asked.WEATHER: call.format("get_weather", '{"city": "Oslo"}'),
        asked.SUNNY: asked.FORECAST,
        asked.FACTS: oslo,
        asked.FORM: call.format("final_result", oslo),
    }
    said: list[tuple[list[dict[str, object]], str]] = [
        ([{"role": "user", "content": text}], f"<think>\nShort.\n</think>\n\n{answer}<|im_end|>")
        for text, answer in answers.items()
    ]
    with tempfile.TemporaryDirectory() as folder:
        small_writer(Path(folder), "llama_cpp/Qwen-Qwen3-0.6B", said)
        with serving(lambda: specexec.load(folder, drafter="none", dtype="f32"), names=(asked.MODEL,)) as served:
            yield served


@dataclass(frozen=True)
class Tried:
    """One call; `fault` is empty where it worked."""

    client: Client
    call: str
    fault: str


def run(client: Client, url: str) -> Iterator[Tried]:
    """Every call of one client, in a process with its own packages."""
    if client.language == "Python":
        command = [str(FOLDER / "python" / "bin" / "python"), str(ROOT / "scripts" / "client_calls.py")]
    else:  # Node looks for packages beside the file
        command = ["node", str(shutil.copy(ROOT / "scripts" / "client_calls.mjs", FOLDER / "node"))]
    with tempfile.TemporaryDirectory() as home:
        away = {**os.environ, "HOME": home, "NO_PROXY": "127.0.0.1"}
        try:
            told = subprocess.run(
                [*command, client.name, url], capture_output=True, text=True, env=away, timeout=CLIENT_S
            )
        except subprocess.TimeoutExpired:
            yield Tried(client, "all", f"did not end within {CLIENT_S} s")
            return
    lines = [json.loads(line) for line in told.stdout.splitlines() if line.startswith('{"call"')]
    yield from (Tried(client, line["call"], line["fault"]) for line in lines)
    if told.returncode:
        yield Tried(client, "all", f"ended with {told.returncode}: {told.stderr[-500:]}")


def row(client: Client, tried: list[Tried]) -> str:
    """One line of the table."""
    works, fails = (
        ", ".join(f"`{one.call}`" for one in tried if bool(one.fault) == failed) or "–" for failed in (False, True)
    )
    return f"| {client.name} ({client.language}) | {client.version} | {works} | {fails} |\n"


def table(before: str, rows: Sequence[str]) -> str:
    """The rows, and those of other clients that were there before."""
    new = {line.split(" | ")[0]: line for line in rows}
    old = {line.split(" | ")[0]: line for line in before.splitlines(keepends=True) if line.startswith("| ")}
    head = "| client | version | works | does not |\n"
    kept = {**old, **new}
    kept.pop(head.split(" | ")[0], None)
    lines = [kept[name] for name in sorted(kept, key=str.lower)]
    works, fails = (sum(line.split(" | ")[place].count("`") // 2 for line in lines) for place in (2, 3))
    return f"{head}|---|---|---|---|\n{''.join(lines)}\n{works} of {works + fails} calls work.\n"


def main(arguments: list[str]) -> None:
    with server() as served:
        if arguments == ["--serve"]:
            print(served.url, flush=True)
            while True:
                time.sleep(3600)
        clients = [client for client in install() if not arguments or client.name in arguments]
        tried: list[Tried] = []
        for client in clients:
            for one in run(client, served.url):
                print(f"{'fails' if one.fault else 'works'}  {client.name}  {one.call}  {one.fault[:600]}", flush=True)
                tried.append(one)
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    old, _, after = rest.partition(END)
    rows = [row(client, [one for one in tried if one.client == client]) for client in clients]
    PAGE.write_text(f"{before}{BEGIN}{table(old, rows)}{END}{after}", encoding="utf-8")
    sys.exit(any(one.fault for one in tried))


if __name__ == "__main__":
    main(sys.argv[1:])
