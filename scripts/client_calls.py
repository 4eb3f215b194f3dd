"""What clients written in Python call, each as its own documentation says. Runs in their environment, not in ours.

python client_calls.py CLIENT URL prints one line of JSON for each call: its name, and what was wrong, if anything.
`scripts/clients.py` starts it, against a server whose model answers these questions alone (see there).
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel

Calls: TypeAlias = dict[str, Callable[[], Any]]

MODEL = "agent"
HELLO, GREETING = "Say that again", "Hello there."
WEATHER, SUNNY, FORECAST = "The weather at night", "The sky is clear", "Take no umbrella."
FACTS, FORM = "List the data", "Fill in this form"


class City(BaseModel):
    """A city and how many live there."""

    name: Literal["Oslo", "Lima"]
    people: int


OSLO = City(name="Oslo", people=7)
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTION: dict[str, Any] = {"name": "get_weather", "description": "The weather in a city.", "parameters": PARAMETERS}
TOOL: dict[str, Any] = {"type": "function", "function": FUNCTION}
ASK_HELLO: list[Any] = [{"role": "user", "content": HELLO}]
ASK_WEATHER: list[Any] = [{"role": "user", "content": WEATHER}]
ASK_FACTS: list[Any] = [{"role": "user", "content": FACTS}]


def get_weather(city: str) -> str:
    """The weather in a city."""
    assert city == "Oslo", city
    return SUNNY


def same(got: object, expected: object) -> bool:
    assert got == expected, f"{got!r} instead of {expected!r}"
    return True


def chat_loop(create: Callable[..., Any]) -> str:
    """OpenAI's dialogue with one tool, through any function with the arguments of `chat.completions.create`."""
    talk = list(ASK_WEATHER)
    message = create(model=MODEL, messages=talk, tools=[TOOL]).choices[0].message
    (call,) = message.tool_calls
    talk.append(message.model_dump(exclude_none=True))
    result = get_weather(**json.loads(call.function.arguments))
    talk.append({"role": "tool", "tool_call_id": call.id, "content": result})
    return str(create(model=MODEL, messages=talk, tools=[TOOL]).choices[0].message.content)


def openai(url: str) -> Calls:
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    create: Any = client.chat.completions.create
    responses: Any = client.responses
    tool = {"type": "function", **FUNCTION, "strict": True}

    def stream() -> str:
        chunks = create(model=MODEL, messages=ASK_HELLO, stream=True, stream_options={"include_usage": True})
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)

    def responses_tools() -> str:
        first = responses.create(model=MODEL, input=WEATHER, tools=[tool])
        (call,) = [item for item in first.output if item.type == "function_call"]
        output = {"type": "function_call_output", "call_id": call.call_id,
                  "output": get_weather(**json.loads(call.arguments))}  # fmt: skip
        return str(
            responses.create(model=MODEL, input=[output], previous_response_id=first.id, tools=[tool]).output_text
        )

    def responses_stream() -> str:
        with responses.stream(model=MODEL, input=HELLO) as events:
            return str(events.get_final_response().output_text)

    return {
        "chat": lambda: same(create(model=MODEL, messages=ASK_HELLO).choices[0].message.content, GREETING),
        "chat, streamed": lambda: same(stream(), GREETING),
        "chat, tools": lambda: same(chat_loop(create), FORECAST),
        "chat, parse": lambda: same(
            client.chat.completions.parse(model=MODEL, messages=ASK_FACTS, response_format=City)
            .choices[0].message.parsed, OSLO),
        "responses": lambda: same(responses.create(model=MODEL, input=HELLO).output_text, GREETING),
        "responses, streamed": lambda: same(responses_stream(), GREETING),
        "responses, tools": lambda: same(responses_tools(), FORECAST),
        "responses, parse": lambda: same(
            responses.parse(model=MODEL, input=FACTS, text_format=City).output_parsed, OSLO),
        "models": lambda: same([model.id for model in client.models.list()], [MODEL]),
    }  # fmt: skip


def anthropic(url: str) -> Calls:
    from anthropic import Anthropic, beta_tool

    client = Anthropic(base_url=url, api_key="none", max_retries=0)
    create: Any = client.messages.create
    tool = {"name": "get_weather", "description": FUNCTION["description"], "input_schema": PARAMETERS}

    def text_of(message: Any) -> str:
        return "".join(block.text for block in message.content if block.type == "text")

    def stream() -> str:
        with client.messages.stream(model=MODEL, max_tokens=99, messages=ASK_HELLO) as events:
            return "".join(events.text_stream)

    def tools() -> str:
        asked: dict[str, Any] = {"model": MODEL, "max_tokens": 99, "tools": [tool]}
        talk = list(ASK_WEATHER)
        first = create(messages=talk, **asked)
        (call,) = [block for block in first.content if block.type == "tool_use"]
        result = {"type": "tool_result", "tool_use_id": call.id, "content": get_weather(**call.input)}
        talk += [{"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
        return text_of(create(messages=talk, **asked))

    def runner() -> str:
        runs: Any = client.beta.messages.tool_runner(
            model=MODEL, max_tokens=99, tools=[beta_tool(get_weather)], messages=ASK_WEATHER
        )
        return text_of(runs.until_done())

    return {
        "messages": lambda: same(text_of(create(model=MODEL, max_tokens=99, messages=ASK_HELLO)), GREETING),
        "messages, streamed": lambda: same(stream(), GREETING),
        "messages, tools": lambda: same(tools(), FORECAST),
        "tool runner": lambda: same(runner(), FORECAST),
        "messages, parse": lambda: same(
            client.messages.parse(model=MODEL, max_tokens=99, messages=ASK_FACTS, output_format=City)
            .parsed_output, OSLO),
        "count_tokens": lambda: client.messages.count_tokens(model=MODEL, messages=ASK_HELLO).input_tokens,
        "models": lambda: same([model.id for model in client.models.list()], [MODEL]),
    }  # fmt: skip


def ollama(url: str) -> Calls:
    from ollama import Client

    client = Client(host=url)
    chat: Any = client.chat

    def tools() -> str:
        talk = list(ASK_WEATHER)
        first = chat(model=MODEL, messages=talk, tools=[get_weather]).message
        (call,) = first.tool_calls
        result = get_weather(**call.function.arguments)
        talk += [first, {"role": "tool", "tool_name": call.function.name, "content": result}]
        return str(chat(model=MODEL, messages=talk, tools=[get_weather]).message.content)

    def stream() -> str:
        return "".join(part.message.content or "" for part in chat(model=MODEL, messages=ASK_HELLO, stream=True))

    return {
        "chat": lambda: same(chat(model=MODEL, messages=ASK_HELLO).message.content, GREETING),
        "chat, streamed": lambda: same(stream(), GREETING),
        "chat, tools": lambda: same(tools(), FORECAST),
        "chat, format": lambda: same(
            City.model_validate_json(
                chat(model=MODEL, messages=ASK_FACTS, format=City.model_json_schema()).message.content
            ), OSLO),
        "generate": lambda: same(client.generate(model=MODEL, prompt=HELLO).response, GREETING),
        "list, show": lambda: same([model.model for model in client.list().models], [MODEL]) and client.show(MODEL),
        "ps": lambda: same([model.model for model in client.ps().models], [MODEL]),
        "embed": lambda: same(len(client.embed(model=MODEL, input=["a", "b"]).embeddings), 2),
    }  # fmt: skip


def litellm(url: str) -> Calls:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    import litellm as package

    lite: Any = package
    at: dict[str, Any] = {"api_base": f"{url}/v1", "api_key": "none", "num_retries": 0}
    name = f"openai/{MODEL}"

    def create(**asked: Any) -> Any:
        return lite.completion(**{**asked, "model": name}, **at)

    def stream() -> str:
        chunks = create(messages=ASK_HELLO, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    def anthropic_chat() -> Any:
        asked = {"model": f"anthropic/{MODEL}", "messages": ASK_HELLO, "max_tokens": 99}
        return lite.completion(**asked, api_base=url, api_key="none").choices[0].message.content

    def anthropic_messages() -> str:
        asked = {"model": name, "messages": ASK_HELLO, "max_tokens": 99, "api_base": f"{url}/v1", "api_key": "none"}
        told = asyncio.run(lite.anthropic.messages.acreate(**asked))
        return "".join(block["text"] for block in told["content"] if block["type"] == "text")

    return {
        "chat": lambda: same(create(messages=ASK_HELLO).choices[0].message.content, GREETING),
        "chat, streamed": lambda: same(stream(), GREETING),
        "chat, tools": lambda: same(chat_loop(create), FORECAST),
        "chat, response_format": lambda: same(
            City.model_validate_json(create(messages=ASK_FACTS, response_format=City).choices[0].message.content),
            OSLO),
        "reasoning_content": lambda: same(
            create(messages=ASK_HELLO).choices[0].message.reasoning_content, "Short."),
        "responses": lambda: same(
            lite.responses(model=name, input=HELLO, **at).output[-1].content[0].text, GREETING),
        "anthropic/ chat": lambda: same(anthropic_chat(), GREETING),
        "anthropic messages over openai/": lambda: same(anthropic_messages(), GREETING),
        "hosted_vllm/ chat": lambda: same(
            lite.completion(model=f"hosted_vllm/{MODEL}", messages=ASK_HELLO, api_base=f"{url}/v1")
            .choices[0].message.content, GREETING),
        "ollama_chat/ chat": lambda: same(
            lite.completion(model=f"ollama_chat/{MODEL}", messages=ASK_HELLO, api_base=url)
            .choices[0].message.content, GREETING),
        "embedding": lambda: same(len(lite.embedding(model=name, input=["a"], **at).data), 1),
    }  # fmt: skip


def langchain_openai(url: str) -> Calls:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI

    def model(**more: Any) -> Any:
        return ChatOpenAI(model=MODEL, base_url=f"{url}/v1", api_key="none", max_retries=0, **more)  # type: ignore[arg-type,unused-ignore]

    def tools(**more: Any) -> str:
        weather = tool(get_weather)
        bound = model(**more).bind_tools([weather])
        talk: list[Any] = [HumanMessage(WEATHER)]
        talk.append(bound.invoke(talk))
        (call,) = talk[-1].tool_calls
        talk.append(ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"]))
        return str(bound.invoke(talk).text)

    def stream() -> str:
        return "".join(str(chunk.text) for chunk in model().stream(HELLO))

    return {
        "invoke": lambda: same(model().invoke(HELLO).content, GREETING),
        "stream": lambda: same(stream(), GREETING),
        "bind_tools": lambda: same(tools(), FORECAST),
        "with_structured_output": lambda: same(model().with_structured_output(City).invoke(FACTS), OSLO),
        "with_structured_output, function_calling": lambda: same(
            model().with_structured_output(City, method="function_calling").invoke(FORM), OSLO),
        "with_structured_output, json_mode": lambda: same(
            model().with_structured_output(City, method="json_mode").invoke(FACTS), OSLO),
        "responses": lambda: same(str(model(use_responses_api=True).invoke(HELLO).text), GREETING),
        "responses, bind_tools": lambda: same(tools(use_responses_api=True), FORECAST),
    }  # fmt: skip


def pydantic_ai(url: str) -> Calls:
    from anthropic import AsyncAnthropic
    from pydantic_ai import Agent, NativeOutput
    from pydantic_ai.models.anthropic import AnthropicModel
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.anthropic import AnthropicProvider
    from pydantic_ai.providers.openai import OpenAIProvider

    served = OpenAIProvider(base_url=f"{url}/v1", api_key="none")
    chat, responses = OpenAIChatModel(MODEL, provider=served), OpenAIResponsesModel(MODEL, provider=served)
    client = AsyncAnthropic(base_url=url, api_key="none", max_retries=0)
    claude = AnthropicModel(MODEL, provider=AnthropicProvider(anthropic_client=client))

    def run(model: Any, asked: str, **more: Any) -> Any:
        return Agent(model, **more).run_sync(asked).output

    async def stream() -> str:
        async with Agent(chat).run_stream(HELLO) as running:
            return str(await running.get_output())

    return {
        "run": lambda: same(run(chat, HELLO), GREETING),
        "run, streamed": lambda: same(asyncio.run(stream()), GREETING),
        "tools": lambda: same(run(chat, WEATHER, tools=[get_weather]), FORECAST),
        "output_type": lambda: same(run(chat, FORM, output_type=City), OSLO),
        "output_type, native": lambda: same(run(chat, FACTS, output_type=NativeOutput(City)), OSLO),
        "responses": lambda: same(run(responses, HELLO), GREETING),
        "responses, tools": lambda: same(run(responses, WEATHER, tools=[get_weather]), FORECAST),
        "responses, output_type": lambda: same(run(responses, FORM, output_type=City), OSLO),
        "anthropic": lambda: same(run(claude, HELLO), GREETING),
        "anthropic, tools": lambda: same(run(claude, WEATHER, tools=[get_weather]), FORECAST),
        "anthropic, output_type": lambda: same(run(claude, FORM, output_type=City), OSLO),
    }


def instructor(url: str) -> Calls:
    import instructor as package
    from openai import OpenAI

    def made(asked: str, mode: Any) -> Any:
        client: Any = package.from_openai(OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0), mode=mode)
        told = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": asked}], response_model=City, max_retries=0
        )
        assert isinstance(told, City)
        return City(**told.model_dump())  # instructor makes a class of its own below City

    modes: Any = package.Mode
    return {
        "TOOLS": lambda: same(made(FORM, modes.TOOLS), OSLO),
        "TOOLS_STRICT": lambda: same(made(FORM, modes.TOOLS_STRICT), OSLO),
        "JSON_SCHEMA": lambda: same(made(FACTS, modes.JSON_SCHEMA), OSLO),
        "JSON": lambda: same(made(FACTS, modes.JSON), OSLO),
    }


def openai_agents(url: str) -> Calls:
    from agents import Agent, OpenAIChatCompletionsModel, Runner, function_tool
    from agents import set_default_openai_client as set_client
    from agents import set_tracing_disabled as set_off
    from openai import AsyncOpenAI

    set_off(True)
    weather = function_tool(get_weather)

    def fresh() -> AsyncOpenAI:
        """A client for one event loop."""
        client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        set_client(client, use_for_tracing=False)
        return client

    def run(asked: str, chat: bool = False, **more: Any) -> Any:
        client = fresh()
        model: Any = OpenAIChatCompletionsModel(MODEL, client) if chat else MODEL
        return Runner.run_sync(Agent(name="clerk", model=model, **more), asked).final_output

    async def stream(asked: str, **more: Any) -> Any:
        fresh()
        running = Runner.run_streamed(Agent(name="clerk", model=MODEL, **more), asked)
        async for _ in running.stream_events():
            pass
        return running.final_output

    return {
        "run": lambda: same(run(HELLO), GREETING),
        "run, streamed": lambda: same(asyncio.run(stream(HELLO)), GREETING),
        "tools": lambda: same(run(WEATHER, tools=[weather]), FORECAST),
        "tools, streamed": lambda: same(asyncio.run(stream(WEATHER, tools=[weather])), FORECAST),
        "output_type": lambda: same(run(FACTS, output_type=City), OSLO),
        "chat completions": lambda: same(run(HELLO, chat=True), GREETING),
        "chat completions, tools": lambda: same(run(WEATHER, chat=True, tools=[weather]), FORECAST),
    }


def llm(url: str) -> Calls:
    folder = Path(tempfile.mkdtemp(prefix="llm-"))
    (folder / "extra-openai-models.yaml").write_text(
        f"- model_id: {MODEL}\n  model_name: {MODEL}\n  api_base: {url}/v1\n  supports_schema: true\n"
        "  supports_tools: true\n"
    )
    (folder / "tools.py").write_text(f"def get_weather(city: str) -> str:\n    return {SUNNY!r}\n")
    environment = {**os.environ, "LLM_USER_PATH": str(folder)}

    def say(*arguments: str) -> str:
        command = [str(Path(sys.executable).with_name("llm")), "-m", MODEL, "--key", "none", *arguments]
        told = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert told.returncode == 0, told.stderr
        return told.stdout.strip()

    schema = json.dumps(City.model_json_schema())
    return {
        "prompt": lambda: same(say(HELLO), GREETING),
        "prompt, not streamed": lambda: same(say("--no-stream", HELLO), GREETING),
        "--schema": lambda: same(City.model_validate_json(say("--schema", schema, FACTS)), OSLO),
        "--functions": lambda: same(say("--functions", str(folder / "tools.py"), WEATHER).splitlines()[-1], FORECAST),
    }


def lm_eval(url: str) -> Calls:
    from lm_eval.api.instance import Instance
    from lm_eval.models.api_models import JsonChatStr
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    def local(**more: Any) -> Any:
        return LocalCompletionsAPI(model=MODEL, base_url=f"{url}/v1/completions", max_retries=1, **more)

    def asked(kind: Any, *arguments: tuple[Any, ...]) -> list[Any]:
        return [Instance(kind, {}, one, at) for at, one in enumerate(arguments)]

    def likelihood(model: Any) -> None:
        pair = asked("loglikelihood", (f"{HELLO}:", " word"), (f"{HELLO}:", " people"))
        (one, _), (other, _) = model.loglikelihood(pair, disable_tqdm=True)
        assert max(one, other) < 0, (one, other)

    def chat() -> str:
        model: Any = LocalChatCompletion(model=MODEL, base_url=f"{url}/v1/chat/completions", max_retries=1)
        one = (JsonChatStr(json.dumps(ASK_HELLO)), {"until": ["\n\n\n"], "max_gen_toks": 32})
        return str(model.generate_until(asked("generate_until", one), disable_tqdm=True)[0])

    remote = {"tokenizer_backend": "remote"}
    return {
        "local-completions, loglikelihood": lambda: likelihood(local(tokenized_requests=True, **remote)),
        "local-completions, generate_until": lambda: local(tokenized_requests=False, **remote).generate_until(
            asked("generate_until", ("The list", {"until": ["\n\n\n"], "max_gen_toks": 8})), disable_tqdm=True
        ),
        "local-chat-completions, generate_until": lambda: same(chat(), GREETING),
    }


CLIENTS: dict[str, Callable[[str], Calls]] = {
    "openai": openai,
    "anthropic": anthropic,
    "ollama": ollama,
    "litellm": litellm,
    "langchain-openai": langchain_openai,
    "pydantic-ai": pydantic_ai,
    "instructor": instructor,
    "openai-agents": openai_agents,
    "llm": llm,
    "lm-eval": lm_eval,
}


def main(client: str, url: str) -> None:
    for name, call in CLIENTS[client](url).items():
        fault = ""
        try:
            call()
        except Exception as error:  # of any client: it is what the table says
            fault = f"{type(error).__name__}: {error}"
        print(json.dumps({"call": name, "fault": fault}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
