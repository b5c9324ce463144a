// The Responses API's WebSocket through the official OpenAI SDK for JavaScript, unpatched.

import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { ResponsesWS } from "openai/resources/responses/ws";
import { clientOf, start } from "./server.mjs";

const MODEL = "electron";
const CITIES = ["Oslo", "Paris", "Lima"];
const TOOLS = [
  {
    type: "function",
    name: "get_weather",
    description: "The weather in a city.",
    strict: true,
    parameters: {
      type: "object",
      properties: { city: { type: "string", enum: CITIES } },
      required: ["city"],
      additionalProperties: false,
    },
  },
];
const ENDS = ["response.completed", "response.incomplete", "response.failed"];
const LIMIT = { timeout: 180_000 };

let server;
let client;

before(async () => {
  server = await start();
  client = clientOf(server);
});

after(() => server?.stop());

/// One socket, and what is done with it.
class Talk {
  constructor(using = client) {
    this.socket = new ResponsesWS(using);
    this.told = this.socket.stream();
  }

  begin(options = {}) {
    const defaults = { model: MODEL, input: "Say hello.", max_output_tokens: 12, temperature: 0 };
    this.socket.send({ type: "response.create", ...defaults, ...options });
  }

  /// The next event, or the error that came in its place.
  async next() {
    for (;;) {
      const { value, done } = await this.told.next();
      assert.ok(!done && value.type !== "close", `the connection was closed: ${JSON.stringify(value)}`);
      if (value.type === "message") return value.message;
      if (value.type === "error") return value.error;
    }
  }

  /// All events up to one of these types.
  async until(...types) {
    const events = [];
    do {
      const event = await this.next();
      if (event instanceof Error) throw event;
      events.push(event);
    } while (!types.includes(events.at(-1).type));
    return events;
  }

  async turn(options) {
    this.begin(options);
    return checkStream(await this.until(...ENDS));
  }

  /// The error event that comes next.
  async failure() {
    const error = await this.next();
    assert.ok(error instanceof Error, JSON.stringify(error));
    assert.equal(error.error.type, "error");
    assert.equal(error.error.status, 400);
    assert.equal(error.error.error.type, "invalid_request_error");
    assert.ok(error.error.error.message);
    return error.error.error;
  }
}

function conversation(name, converse) {
  test(name, LIMIT, async () => {
    const talk = new Talk();
    try {
      await converse(talk);
    } finally {
      talk.socket.close();
    }
  });
}

/// The events of one response tell one story, which ends with the response that they made up. Gives that response.
function checkStream(events) {
  assert.deepEqual(
    events.map((event) => event.sequence_number),
    events.map((_, index) => index),
  );
  const last = events.at(-1);
  const { response } = last;
  assert.equal(last.type, `response.${response.status}`);
  // The model is small and may not know when to stop.
  if (response.status !== "completed") assert.equal(response.incomplete_details.reason, "max_output_tokens");
  const expected = response.output.flatMap((item) => {
    const deltas = events.filter((event) => event.item_id === item.id && event.type.endsWith(".delta"));
    const pieces = deltas.map((event) => event.delta).join("");
    assert.equal(pieces, item.type === "message" ? item.content[0].text : item.arguments);
    const middle =
      item.type === "message"
        ? ["content_part.added", ...deltas.map(() => "output_text.delta"), "output_text.done", "content_part.done"]
        : [...deltas.map(() => "function_call_arguments.delta"), "function_call_arguments.done"];
    return ["output_item.added", ...middle, "output_item.done"];
  });
  assert.deepEqual(
    events.map((event) => event.type.replace(/^response\./, "")),
    ["created", "in_progress", ...expected, response.status],
  );
  assert.equal(response.usage.total_tokens, response.usage.input_tokens + response.usage.output_tokens);
  return response;
}

function textOf(response) {
  const parts = response.output.filter((item) => item.type === "message").flatMap((item) => item.content);
  return parts.map((part) => part.text).join("");
}

conversation("a turn and a chain", async (talk) => {
  const first = await talk.turn({ input: "My name is Ada." });
  assert.ok(textOf(first));
  const second = await talk.turn({ input: "What is my name?", previous_response_id: first.id });
  assert.ok(textOf(second));
  assert.equal(second.previous_response_id, first.id);
  assert.ok(second.usage.input_tokens > first.usage.input_tokens + first.usage.output_tokens);
  const kept = await client.responses.retrieve(second.id);
  assert.equal(kept.output_text, textOf(second));
});

conversation("a call and its result", async (talk) => {
  const first = await talk.turn({
    input: "How is the weather in Oslo?",
    tools: TOOLS,
    tool_choice: "required",
    parallel_tool_calls: false,
    max_output_tokens: 64,
  });
  assert.equal(first.status, "completed");
  const [call] = first.output;
  assert.equal(first.output.length, 1);
  assert.equal(call.name, "get_weather");
  assert.ok(CITIES.includes(JSON.parse(call.arguments).city));
  const second = await talk.turn({
    input: [{ type: "function_call_output", call_id: call.call_id, output: '{"sky": "clear"}' }],
    previous_response_id: first.id,
  });
  assert.ok(textOf(second));
});

conversation("a cancelled turn ends at once", async (talk) => {
  talk.begin({ input: "Tell me a very long story about the sea.", max_output_tokens: 2000 });
  const [created] = await talk.until("response.output_text.delta");
  talk.socket.send({ type: "response.cancel", response_id: created.response.id });
  const last = (await talk.until(...ENDS)).at(-1);
  assert.equal(last.type, "response.incomplete");
  assert.equal(last.response.incomplete_details.reason, "cancelled");
  assert.ok(textOf(await talk.turn()));
});

conversation("errors are told and the connection goes on", async (talk) => {
  talk.begin({ previous_response_id: "resp_unknown" });
  const unknown = await talk.failure();
  assert.equal(unknown.code, "previous_response_not_found");
  assert.equal(unknown.param, "previous_response_id");
  talk.begin({ temperature: 9 });
  assert.equal((await talk.failure()).param, "temperature");
  talk.socket.sendRaw("{");
  await talk.failure();
  assert.ok(textOf(await talk.turn()));
});

test("a wrong key is refused before the upgrade", LIMIT, async () => {
  const talk = new Talk(clientOf(server, { apiKey: "wrong" }));
  const error = await talk.next();
  assert.ok(error instanceof Error);
  assert.match(error.message, /401/);
});
