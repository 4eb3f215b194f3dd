// What clients written for Node call, each as its own documentation says. Runs where npm has installed them.
// node client_calls.mjs CLIENT URL prints one line of JSON for each call: its name, and what was wrong, if anything.

import assert from "node:assert/strict";

const [client, url] = process.argv.slice(2);
const MODEL = "agent";
const HELLO = "Say that again", GREETING = "Hello there.";
const WEATHER = "The weather at night", SUNNY = "The sky is clear", FORECAST = "Take no umbrella.";
const FACTS = "List the data", OSLO = { name: "Oslo", people: 7 };
const PARAMETERS = {
  type: "object",
  properties: { city: { type: "string" } },
  required: ["city"],
  additionalProperties: false,
};
const FUNCTION = { name: "get_weather", description: "The weather in a city.", parameters: PARAMETERS };
const HELLO_TALK = [{ role: "user", content: HELLO }];

async function joined(parts, textOf) {
  let text = "";
  for await (const part of parts) text += textOf(part) ?? "";
  return text;
}

async function openai() {
  const { default: OpenAI } = await import("openai");
  const { zodResponseFormat, zodTextFormat } = await import("openai/helpers/zod");
  const { z } = await import("zod");
  const City = z.object({ name: z.enum(["Oslo", "Lima"]), people: z.number().int() });
  const open = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
  return {
    "chat": async () => {
      const told = await open.chat.completions.create({ model: MODEL, messages: HELLO_TALK });
      assert.equal(told.choices[0].message.content, GREETING);
    },
    "chat, streamed": async () => {
      const stream = await open.chat.completions.create({ model: MODEL, messages: HELLO_TALK, stream: true });
      assert.equal(await joined(stream, (chunk) => chunk.choices[0]?.delta?.content), GREETING);
    },
    "chat, runTools": async () => {
      const get_weather = { ...FUNCTION, parse: JSON.parse, function: ({ city }) => (city === "Oslo" ? SUNNY : "?") };
      const runner = open.chat.completions.runTools({
        model: MODEL,
        messages: [{ role: "user", content: WEATHER }],
        tools: [{ type: "function", function: get_weather }],
      });
      assert.equal(await runner.finalContent(), FORECAST);
    },
    "chat, parse": async () => {
      const told = await open.chat.completions.parse({
        model: MODEL,
        messages: [{ role: "user", content: FACTS }],
        response_format: zodResponseFormat(City, "city"),
      });
      assert.deepEqual(told.choices[0].message.parsed, OSLO);
    },
    "responses": async () => {
      const told = await open.responses.create({ model: MODEL, input: HELLO });
      assert.equal(told.output_text, GREETING);
    },
    "responses, streamed": async () => {
      const told = await open.responses.stream({ model: MODEL, input: HELLO }).finalResponse();
      assert.equal(told.output_text, GREETING);
    },
    "responses, tools": async () => {
      const tools = [{ type: "function", ...FUNCTION, strict: true }];
      const first = await open.responses.create({ model: MODEL, input: WEATHER, tools });
      const [call] = first.output.filter((item) => item.type === "function_call");
      assert.deepEqual(JSON.parse(call.arguments), { city: "Oslo" });
      const input = [{ type: "function_call_output", call_id: call.call_id, output: SUNNY }];
      const last = await open.responses.create({ model: MODEL, input, tools, previous_response_id: first.id });
      assert.equal(last.output_text, FORECAST);
    },
    "responses, parse": async () => {
      const text = { format: zodTextFormat(City, "city") };
      const told = await open.responses.parse({ model: MODEL, input: FACTS, text });
      assert.deepEqual(told.output_parsed, OSLO);
    },
    "models": async () => assert.deepEqual((await open.models.list()).data.map((model) => model.id), [MODEL]),
    "embeddings": async () => {
      const told = await open.embeddings.create({ model: MODEL, input: ["a", "b"] });
      assert.ok(told.data.length === 2 && told.data[0].embedding.length > 8);
    },
  };
}

/** The calls of Vercel's SDK, the same for every provider. */
async function vercel(model) {
  const { generateText, generateObject, streamText, jsonSchema, stepCountIs, tool } = await import("ai");
  const { z } = await import("zod");
  const City = z.object({ name: z.enum(["Oslo", "Lima"]), people: z.number().int() });
  const asked = { model, maxRetries: 0 };
  const get_weather = tool({
    description: FUNCTION.description,
    inputSchema: jsonSchema(PARAMETERS),
    execute: async ({ city }) => (city === "Oslo" ? SUNNY : "?"),
  });
  const tooled = { ...asked, tools: { get_weather }, stopWhen: stepCountIs(4), prompt: WEATHER };
  return {
    "generateText": async () => assert.equal((await generateText({ ...asked, prompt: HELLO })).text, GREETING),
    "streamText": async () => {
      let fault;
      const stream = streamText({ ...asked, prompt: HELLO, onError: ({ error }) => { fault = error; } });
      const text = await joined(stream.textStream, (part) => part);
      if (fault) throw fault;
      assert.equal(text, GREETING);
    },
    "reasoning": async () => {
      const providerOptions = { openai: { reasoningSummary: "auto", forceReasoning: true } };
      const told = await generateText({ ...asked, prompt: HELLO, providerOptions });
      assert.equal(told.reasoningText?.trim(), "Short.");
    },
    "generateText, tools": async () => assert.equal((await generateText(tooled)).text, FORECAST),
    "streamText, tools": async () => {
      let fault;
      const stream = streamText({ ...tooled, onError: ({ error }) => { fault = error; } });
      const text = await stream.text.catch((error) => { throw fault ?? error; });
      assert.equal(text, FORECAST);
    },
    "generateObject": async () => {
      assert.deepEqual((await generateObject({ ...asked, schema: City, prompt: FACTS })).object, OSLO);
    },
  };
}

const CLIENTS = {
  "openai": openai,
  "@ai-sdk/openai": async () => {
    const { createOpenAI } = await import("@ai-sdk/openai");
    return vercel(createOpenAI({ baseURL: `${url}/v1`, apiKey: "none" })(MODEL));
  },
  "@ai-sdk/anthropic": async () => {
    const { createAnthropic } = await import("@ai-sdk/anthropic");
    return vercel(createAnthropic({ baseURL: `${url}/v1`, apiKey: "none" })(MODEL));
  },
  "@ai-sdk/openai-compatible": async () => {
    const { createOpenAICompatible } = await import("@ai-sdk/openai-compatible");
    const provider = createOpenAICompatible({ name: "specexec", baseURL: `${url}/v1`, supportsStructuredOutputs: true });
    return vercel(provider(MODEL));
  },
  "ollama": async () => {
    const { Ollama } = await import("ollama");
    const host = new Ollama({ host: url });
    return {
      "chat": async () => {
        assert.equal((await host.chat({ model: MODEL, messages: HELLO_TALK })).message.content, GREETING);
      },
      "chat, streamed": async () => {
        const parts = await host.chat({ model: MODEL, messages: HELLO_TALK, stream: true });
        assert.equal(await joined(parts, (part) => part.message.content), GREETING);
      },
      "list": async () => assert.equal((await host.list()).models[0].model, MODEL),
    };
  },
};

for (const [call, run] of Object.entries(await CLIENTS[client]())) {
  let fault = "";
  try {
    await run();
  } catch (error) {
    const answer = error.responseBody ?? error.cause?.responseBody ?? "";
    fault = `${error.name}: ${error.message} ${answer}`.trim();
  }
  console.log(JSON.stringify({ call, fault }));
}
