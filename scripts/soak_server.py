"""Many clients at once for some minutes: whole answers, streams, slow readers, and clients that leave in the middle.

Every text is compared with the one that the same request got when it was alone. Prints what was asked, what came of it,
and the server's memory; ends with 1 if a text was wrong, a request got stuck or the server still writes at the end.

    python scripts/soak_server.py                        # the demo, 50 clients, 5 minutes
    python scripts/soak_server.py --clients 20 --seconds 60
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import psutil

QUESTIONS = ("How does specexec work?", "What is a drafter?", "What is offloading?", "List the days of the week.")
SEEDS = range(3)
STUCK_S = 90.0  # for one request, its place in the line included
HABITS = ("whole", "stream", "slow", "leaves")


def body(question: str, seed: int, stream: bool) -> dict[str, object]:
    asked = [{"role": "user", "content": question}]
    return {"messages": asked, "seed": seed, "temperature": 0.8, "max_tokens": 60, "stream": stream}


@contextmanager
def served() -> Iterator[tuple[str, psutil.Process]]:
    """A server of the demo in a process of its own: its address and the process."""
    command = [sys.executable, "-m", "specexec", "-q", "serve", "demo", "--port", "0", "--json", "--sse-keepalive", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())["base_url"], psutil.Process(process.pid)
        finally:
            process.terminate()


def streamed(http: httpx.Client, asked: dict[str, object], pause_s: float, most: int | None = None) -> str:
    """The text of a stream, read with pauses; with `most` the client leaves after so many pieces."""
    pieces: list[str] = []
    with http.stream("POST", "/chat/completions", json=asked) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise ValueError(event["error"])
            pieces += [choice["delta"].get("content") or "" for choice in event["choices"]]
            if most is not None and len(pieces) >= most:
                break
            time.sleep(pause_s)
    return "".join(pieces)


def whole(http: httpx.Client, asked: dict[str, object]) -> str:
    answer = http.post("/chat/completions", json=asked)
    answer.raise_for_status()
    return str(answer.json()["choices"][0]["message"]["content"])


def client(url: str, number: int, until_s: float, expected: dict[tuple[str, int], str], found: Counter[str]) -> None:
    """One client with its habit, until the time is over."""
    chance, habit = random.Random(number), HABITS[number % len(HABITS)]
    with httpx.Client(base_url=url, timeout=STUCK_S, trust_env=False) as http:
        while time.monotonic() < until_s:
            question, seed = chance.choice(QUESTIONS), chance.choice(SEEDS)
            asked, right = body(question, seed, habit != "whole"), expected[question, seed]
            try:
                if habit == "leaves":
                    ok = right.startswith(streamed(http, asked, 0, most=chance.randint(1, 4)))
                else:
                    ok = right == (whole(http, asked) if habit == "whole" else streamed(http, asked, habit == "slow"))
                found[f"{habit}: {'right' if ok else 'WRONG'}"] += 1
            except httpx.HTTPStatusError as refusal:
                found[f"refused {refusal.response.status_code}"] += 1
                time.sleep(chance.random())
            except httpx.TimeoutException:
                found["STUCK"] += 1
            except (httpx.HTTPError, ValueError) as fault:
                found[f"FAILED {fault}"] += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=300.0)
    options = parser.parse_args()
    found: Counter[str] = Counter()
    with served() as (url, process):
        with httpx.Client(base_url=url, timeout=STUCK_S, trust_env=False) as http:
            pairs = [(question, seed) for question in QUESTIONS for seed in SEEDS]
            expected = {pair: whole(http, body(*pair, stream=False)) for pair in pairs}
            before_B = process.memory_info().rss
            until_s = time.monotonic() + options.seconds
            threads = [
                threading.Thread(target=client, args=(url, number, until_s, expected, found))
                for number in range(options.clients)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            time.sleep(2)
            state = http.get(url.removesuffix("/v1") + "/health").json()
        after_B = process.memory_info().rss
    for what, times in sorted(found.items()):
        print(f"{times:>7}  {what}")
    print(f"at the end {state['running']} texts are written, {state['waiting']} wait")
    print(f"memory of the server: {before_B / 2**20:.0f} MiB before, {after_B / 2**20:.0f} MiB after")
    bad = sum(times for what, times in found.items() if what.split()[-1] in ("WRONG", "STUCK") or "FAILED" in what)
    return int(bool(bad or state["running"] or state["waiting"]))


if __name__ == "__main__":
    sys.exit(main())
