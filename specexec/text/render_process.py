"""A process that runs templates for `templates.py` and does nothing else: it may be ended at any moment.

Run by path, so that nothing of specexec is imported here; of transformers, only the modules that do it.
Requests and replies are lines of JSON.
"""

import importlib.util
import json
import resource
import signal
import sys
import types
from collections.abc import Callable
from functools import lru_cache
from typing import Any

PAGE_B = resource.getpagesize()
Render = Callable[[dict[str, Any]], str]


def main() -> None:
    sys.path[:] = json.loads(sys.argv[1])
    renders = {"chat": chat_renderer(), "plain": plain_renderer(), "response": response_reader()}
    memory_B = int(sys.argv[2])
    with open("/proc/self/statm") as file:
        taken_B = int(file.read().split()[0]) * PAGE_B
    resource.setrlimit(resource.RLIMIT_AS, (taken_B + memory_B, resource.getrlimit(resource.RLIMIT_AS)[1]))
    for line in sys.stdin.buffer:
        request = json.loads(line)
        answer = reply(renders[request["kind"]], request)
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


def chat_renderer() -> Render:
    """transformers' own function, without the rest of that package, which takes a second to import."""
    for name in ("torch", "PIL"):
        sys.modules[name] = None  # type: ignore[assignment]  # as if it were not installed
    spec = importlib.util.find_spec("transformers")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    (folder,) = spec.submodule_search_locations
    for name, path in (("transformers", folder), ("transformers.utils", f"{folder}/utils")):
        package = types.ModuleType(name)
        package.__path__ = [path]
        sys.modules[name] = package
    from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

    def render(request: dict[str, Any]) -> str:
        if request["messages"] is None:
            _compile_jinja_template(request["template"])
            return ""
        variables = {**request["variables"], "chat_template": request["template"]}
        return str(render_jinja_template([request["messages"]], **variables)[0][0])

    return render


def plain_renderer() -> Render:
    """What fills a text of the user's own; a variable that is not there is an error."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    compiled = lru_cache(SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True).from_string)
    return lambda request: compiled(request["template"]).render(request["variables"])


def response_reader() -> Render:
    """transformers' own parser of answers by response templates; its message comes out as JSON."""

    def read(request: dict[str, Any]) -> str:
        from transformers.utils.chat_parsing import parse_response

        return json.dumps(parse_response(response_template=json.loads(request["template"]), **request["variables"]))

    return read


def reply(render: Render, request: dict[str, Any]) -> dict[str, object]:
    """The text, or why there is none. The system ends this process when its time is over, also inside one call."""
    signal.setitimer(signal.ITIMER_PROF, request["seconds"])
    try:
        text = render(request)
        if len(text) > request["characters"]:
            return {"characters": len(text)}
        return {"text": text}
    except MemoryError:
        return {"memory": True}
    except Exception as problem:  # whatever a template can raise
        return {"refusal": str(problem) or type(problem).__name__}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    main()
