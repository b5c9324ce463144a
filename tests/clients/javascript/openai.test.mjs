// The official OpenAI SDK for JavaScript, unpatched.

import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import OpenAI from "openai";
import { clientOf, start } from "./server.mjs";

const MODEL = "electron";
const VOICE_PROMPT =
  "You are a friendly phone agent. Briefly acknowledge out loud before using any tool, like 'Let me check that' or " +
  "'One moment'.";
const CITIES = ["Oslo", "Paris", "Lima"];
const TOOLS = [
  {
    type: "function",
    function: {
      name: "get_weather",
      description: "The weather in a city.",
      parameters: {
        type: "object",
        properties: { city: { type: "string", enum: CITIES } },
        required: ["city"],
        additionalProperties: false,
      },
    },
  },
];

let server;
let client;

before(async () => {
  server = await start();
  client = clientOf(server);
});

after(() => server?.stop());

function said(text, system) {
  const user = { role: "user", content: text };
  return system ? [{ role: "system", content: system }, user] : [user];
}

function ask(options = {}, using = client, more = {}) {
  const defaults = { model: MODEL, messages: said("Say hello."), max_tokens: 12, temperature: 0 };
  return using.chat.completions.create({ ...defaults, ...options }, more);
}

async function collect(stream) {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  return chunks;
}

function checkCall(call) {
  assert.match(call.id, /^call_/);
  assert.equal(call.type, "function");
  assert.equal(call.function.name, "get_weather");
  const given = JSON.parse(call.function.arguments);
  assert.deepEqual(Object.keys(given), ["city"]);
  assert.ok(CITIES.includes(given.city));
}

// === Text ===

test("an answer", async () => {
  const answer = await ask();
  const [choice] = answer.choices;
  assert.match(answer.id, /^chatcmpl-/);
  assert.equal(answer.object, "chat.completion");
  assert.equal(choice.message.role, "assistant");
  assert.ok(choice.message.content);
  assert.equal(choice.message.tool_calls, undefined);
  assert.ok(["stop", "length"].includes(choice.finish_reason));
  assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
  assert.ok(answer._request_id);
});

test("a stream with usage", async () => {
  const chunks = await collect(await ask({ stream: true, stream_options: { include_usage: true } }));
  const last = chunks.pop();
  assert.deepEqual(
    chunks.map((chunk) => chunk.choices[0].delta.role),
    ["assistant", ...chunks.slice(1).map(() => undefined)],
  );
  assert.ok(chunks.slice(0, -1).every((chunk) => chunk.choices[0].finish_reason === null));
  assert.ok(["stop", "length"].includes(chunks.at(-1).choices[0].finish_reason));
  assert.ok(chunks.every((chunk) => chunk.usage === null));
  assert.deepEqual(last.choices, []);
  assert.ok(last.usage.completion_tokens > 0);
  assert.ok(chunks.some((chunk) => chunk.choices[0].delta.content));
});

test("the stream helper", async () => {
  const runner = client.chat.completions.stream({
    model: MODEL,
    messages: said("Say hello."),
    max_tokens: 12,
    temperature: 0,
    stream_options: { include_usage: true },
  });
  let text = "";
  runner.on("content", (delta) => (text += delta));
  const whole = await runner.finalChatCompletion();
  assert.ok(text);
  assert.equal(whole.choices[0].message.content, text);
  assert.ok((await runner.totalUsage()).total_tokens > 0);
});

test("models", async () => {
  const names = [];
  for await (const model of client.models.list()) names.push(model.id);
  assert.ok(names.includes(MODEL));
  assert.equal((await client.models.retrieve(MODEL)).object, "model");
});

test("JSON mode", async () => {
  const answer = await ask({
    messages: said('Reply with the JSON object {"ok": true} and nothing else.'),
    response_format: { type: "json_object" },
    max_tokens: 200,
  });
  assert.equal(answer.choices[0].finish_reason, "stop");
  assert.equal(typeof JSON.parse(answer.choices[0].message.content), "object");
});

test("an answer under a schema", async () => {
  const schema = {
    type: "object",
    properties: { friendly: { type: "boolean" } },
    required: ["friendly"],
    additionalProperties: false,
  };
  const answer = await ask({
    messages: said("Is this friendly? Have a lovely day!"),
    response_format: { type: "json_schema", json_schema: { name: "verdict", strict: true, schema } },
    max_tokens: 40,
  });
  const parsed = JSON.parse(answer.choices[0].message.content);
  assert.deepEqual(Object.keys(parsed), ["friendly"]);
  assert.equal(typeof parsed.friendly, "boolean");
});

// === Tools and the filler ===

const CALLING = { tools: TOOLS, tool_choice: "required", parallel_tool_calls: false, max_tokens: 64 };

test("a call without speech", async () => {
  const answer = await ask({ ...CALLING, messages: said("How is the weather in Oslo?") });
  const { message, finish_reason } = answer.choices[0];
  assert.equal(finish_reason, "tool_calls");
  assert.equal(message.content, null);
  assert.equal(message.tool_calls.length, 1);
  checkCall(message.tool_calls[0]);
});

test("a voice agent speaks before it calls, and answers with the result", async () => {
  const messages = said("Wie wird denn das Wetter heute in Oslo?", VOICE_PROMPT);
  const chunks = await collect(await ask({ ...CALLING, messages, stream: true }));
  const deltas = chunks.map((chunk) => chunk.choices[0].delta);
  const firstCall = deltas.findIndex((delta) => delta.tool_calls);
  assert.ok(firstCall > 0);
  const speech = deltas.slice(0, firstCall).map((delta) => delta.content ?? "").join("");
  assert.match(speech, /\b(ich|einen|gerne|sofort|gleich|moment)\b/i);
  const calls = deltas.slice(firstCall);
  assert.ok(calls.every((delta) => !delta.content));
  const [begun, ...rest] = calls.flatMap((delta) => delta.tool_calls ?? []);
  assert.equal(begun.function.arguments, "");
  assert.ok(rest.every((call) => call.index === 0 && call.id === undefined && call.function.name === undefined));
  const call = {
    id: begun.id,
    type: begun.type,
    function: { name: begun.function.name, arguments: rest.map((call) => call.function.arguments).join("") },
  };
  checkCall(call);
  assert.equal(chunks.at(-1).choices[0].finish_reason, "tool_calls");

  messages.push({ role: "assistant", content: speech, tool_calls: [call] });
  messages.push({ role: "tool", tool_call_id: call.id, content: '{"sky": "klar"}' });
  const answer = await ask({ messages, tools: TOOLS, tool_choice: "none" });
  assert.ok(answer.choices[0].message.content);
});

test("the stream helper puts a call together", async () => {
  const runner = client.chat.completions.stream({
    model: MODEL,
    messages: said("How is the weather in Lima?", VOICE_PROMPT),
    temperature: 0,
    ...CALLING,
  });
  const { message, finish_reason } = (await runner.finalChatCompletion()).choices[0];
  assert.equal(finish_reason, "tool_calls");
  assert.ok(message.content);
  checkCall(message.tool_calls[0]);
});

test("the SDK runs a tool and gets the answer", async () => {
  const asked = [];
  const get_weather = {
    ...TOOLS[0].function,
    parse: JSON.parse,
    function: ({ city }) => {
      asked.push(city);
      return `It is sunny in ${city}.`;
    },
  };
  const runner = client.chat.completions.runTools(
    {
      model: MODEL,
      messages: said("How is the weather in Paris?", VOICE_PROMPT),
      tools: [{ type: "function", function: get_weather }],
      // The runner ends after a call that it was told to make, so this is one round.
      tool_choice: { type: "function", function: { name: "get_weather" } },
      parallel_tool_calls: false,
      max_tokens: 64,
      temperature: 0,
    },
    { maxChatCompletions: 1 },
  );
  await runner.done();
  assert.equal(asked.length, 1);
  assert.ok(CITIES.includes(asked[0]));
  assert.equal(runner.messages.at(-1).role, "tool");
});

// === Errors ===

async function failure(promise, kind, status, type) {
  const error = await promise.then(
    () => assert.fail("it was answered"),
    (error) => error,
  );
  assert.ok(error instanceof kind, `${error}`);
  assert.equal(error.status, status);
  assert.equal(error.type, type);
  assert.ok(error.requestID);
  assert.equal(error.error.request_id, error.requestID);
  return error;
}

test("a bad request names the field", async () => {
  const error = await failure(ask({ n: 2 }), OpenAI.BadRequestError, 400, "invalid_request_error");
  assert.equal(error.param, "n");
  assert.deepEqual(error.error.details[0].path, ["n"]);
});

test("an unknown model", async () => {
  const error = await failure(ask({ model: "none" }), OpenAI.BadRequestError, 400, "invalid_request_error");
  assert.equal(error.code, "model_not_found");
  await failure(client.models.retrieve("none"), OpenAI.NotFoundError, 404, "invalid_request_error");
});

test("a prompt past the context", async () => {
  const messages = said("word ".repeat(9000));
  const error = await failure(ask({ messages }), OpenAI.BadRequestError, 400, "invalid_request_error");
  assert.equal(error.code, "context_length_exceeded");
});

test("a body over the limit", async () => {
  await failure(ask({ messages: said("x".repeat(2 << 20)) }), OpenAI.APIError, 413, "invalid_request_error");
});

test("a wrong key", async () => {
  const stranger = clientOf(server, { apiKey: "wrong" });
  const error = await failure(ask({}, stranger), OpenAI.AuthenticationError, 401, "authentication_error");
  assert.equal(error.code, "invalid_api_key");
});

test("a key for another model", async (t) => {
  if (!server.keys.elsewhere) return t.diagnostic("only our own server has such a key");
  const stranger = clientOf(server, { apiKey: server.keys.elsewhere });
  await failure(ask({}, stranger), OpenAI.PermissionDeniedError, 403, "permission_error");
});

test("an unknown route", async () => {
  const embeddings = client.embeddings.create({ model: MODEL, input: "Hi." });
  await failure(embeddings, OpenAI.NotFoundError, 404, "invalid_request_error");
});

test("a request keeps the id that it came with", async () => {
  const answer = await ask({ max_tokens: 2 }, client, { headers: { "X-Request-Id": "call-42" } });
  assert.equal(answer._request_id, "call-42");
});

// === Cancelling, and many at once ===

test("aborting a stream stops the generation", async () => {
  // The end of a turn is SmolLM2's token 2; with it banned, this answer goes on for minutes.
  const stream = await ask({
    messages: said("Tell me a very long story."),
    max_tokens: 4000,
    logit_bias: { 2: -100 },
    stream: true,
  });
  let seen = 0;
  for await (const chunk of stream) {
    assert.equal(chunk.object, "chat.completion.chunk");
    if (++seen === 2) stream.controller.abort();
  }
  assert.equal(seen, 2);
  const next = await ask({ max_tokens: 4 }, client, { timeout: 60_000 });
  assert.ok(next.choices[0].message.content);
});

test("four at once", async () => {
  const texts = ["one", "two", "three", "four"];
  const answers = await Promise.all(texts.map((text) => ask({ messages: said(`Say ${text}.`), max_tokens: 6 })));
  assert.ok(answers.every((answer) => answer.choices[0].message.content));
});
