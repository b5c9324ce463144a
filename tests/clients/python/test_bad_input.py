"""What no SDK would send: each gets the right status and error body, and the next request is served as if nothing was."""

import json

import httpx
import pytest
from cases import CLOCK, HELLO, MODEL, TOOLS, WEATHER, tool
from conftest import KEYS

PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def http(server):
    headers = {"Authorization": f"Bearer {KEYS['normal']}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=120) as http:
        yield http


def body(**fields):
    return {"model": MODEL, "messages": HELLO, "max_tokens": 1, "temperature": 0, **fields}


def check_error(answer, status, kind="invalid_request_error"):
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == "application/json"
    error = answer.json()["error"]
    assert error["type"] == kind and error["message"]
    assert error["request_id"] == answer.headers["X-Request-Id"]
    # People read it: no dumps, no paths into the server's own code.
    assert len(error["message"]) < 1000 and "\n" not in error["message"]
    return error


def check_alive(http):
    answer = http.post(PATH, json=body(max_tokens=2))
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"]


# === Bodies ===

NO_JSON = {
    "nothing": b"",
    "white space": b" \n",
    "cut off": b'{"model": "electron", "messages": [',
    "two objects": b"{}{}",
    "a comment": b'{"model": "electron" /* why */}',
    "not UTF-8": b'{"model": "electron", "messages": [{"role": "user", "content": "\xff\xfe"}]}',
    "half a surrogate pair": b'{"model": "electron", "messages": [{"role": "user", "content": "\\ud800"}]}',
    "a number without end": b'{"model": "electron", "messages": [], "seed": 1e999}',
    "depth without end": b'{"model": ' + b"[" * 100_000,
    "a form": b"model=electron&messages=hi",
    "no object": b'"electron"',
    "a list": b"[]",
    "null": b"null",
}


@pytest.mark.parametrize("content", NO_JSON.values(), ids=NO_JSON)
def test_a_body_that_is_no_json_object(http, content):
    error = check_error(http.post(PATH, content=content), 400)
    assert error["param"] is None and len(error["details"]) == 1
    check_alive(http)


@pytest.mark.parametrize("megabytes", [2, 10])
def test_a_body_over_the_limit(http, megabytes):
    content = json.dumps(body(messages=[{"role": "user", "content": "x" * (megabytes << 20)}]))
    check_error(http.post(PATH, content=content), 413)
    check_alive(http)


def test_a_body_over_the_limit_that_does_not_say_its_length(http):
    check_error(http.post(PATH, content=iter([b"x" * (1 << 20)] * 3)), 413)
    check_alive(http)


# === Fields ===

PARAMETERS = {"type": "object", "properties": {"x": {"type": "string"}}, "required": ["x"]}


def calling(parameters):
    return {"tools": [{"type": "function", "function": {"name": "f", "parameters": parameters}}],
            "tool_choice": "required", "max_tokens": 64}


def with_call(call, result_id="call_1"):
    messages = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": result_id, "content": "14:05"}]
    return {"messages": messages}


CALL = {"id": "call_1", "type": "function", "function": {"name": "get_time", "arguments": '{"zone": "UTC"}'}}

WRONG = [
    ("a model that is a number", {"model": 5}, "model"),
    ("messages that are a string", {"messages": "hi"}, "messages"),
    ("201 messages", {"messages": HELLO * 201}, "messages"),
    ("a message that is a string", {"messages": ["hi"]}, "messages[0]"),
    ("a message without a role", {"messages": [{"content": "hi"}]}, "messages[0].role"),
    ("content that is a number", {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ("content that is null", {"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ("a part without a text", {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
     "messages[0].content[0].text"),
    ("an assistant who says nothing", {"messages": [{"role": "assistant"}]}, "messages[0].content"),
    ("an orphan tool result", {"messages": [*HELLO, {"role": "tool", "tool_call_id": "call_9", "content": "5"}]},
     "messages[1].tool_call_id"),
    ("a tool result without an id", {"messages": [*HELLO, {"role": "tool", "content": "5"}]}, "messages[1].tool_call_id"),
    ("a result of another call", with_call(CALL, "call_2"), "messages[2].tool_call_id"),
    ("a call without a name", with_call({"id": "call_1", "function": {"arguments": "{}"}}),
     "messages[1].tool_calls[0].function.name"),
    ("tools that are an object", {"tools": WEATHER}, "tools"),
    ("65 tools", {"tools": [tool(f"tool_{i}", {}) for i in range(65)]}, "tools"),
    ("a tool without a name", {"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    ("a tool with a name of spaces", {"tools": [tool("get weather", {})]}, "tools[0].function.name"),
    ("a tool with too long a name", {"tools": [tool("a" * 65, {})]}, "tools[0].function.name"),
    ("a tool of another type", {"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ("two tools of one name", {"tools": [CLOCK, WEATHER, CLOCK]}, "tools[2].function.name"),
    ("parameters that are a list", {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
     "tools[0].function.parameters"),
    ("a tool_choice that is a number", {"tools": TOOLS, "tool_choice": 1}, "tool_choice"),
    ("a stream that is a string", {"stream": "yes"}, "stream"),
    ("stream_options that are a list", {"stream": True, "stream_options": []}, "stream_options"),
    ("an empty stop", {"stop": ""}, "stop"),
    ("a stop that is a number", {"stop": [1]}, "stop"),
    ("a seed with a fraction", {"seed": 1.5}, "seed"),
    ("a temperature that is a string", {"temperature": "1"}, "temperature"),
    ("a bias out of range", {"logit_bias": {"5": 101}}, "logit_bias.5"),
    ("a user that is a number", {"user": 7}, "user"),
    ("a schema that is a list", {"response_format": {"type": "json_schema", "json_schema": {"schema": []}}},
     "response_format.json_schema.schema"),
    ("an answer's schema of no known type",
     {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "blob"}}}},
     "response_format.json_schema.schema"),
    ("too few tokens for a call", calling(PARAMETERS) | {"max_tokens": 1}, "max_tokens"),
]


@pytest.mark.parametrize(("fields", "param"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_a_wrong_field(http, fields, param):
    error = check_error(http.post(PATH, json=body(**fields)), 400)
    assert error["param"] == param, error
    assert error["details"][0]["path"]
    check_alive(http)


SCHEMAS = {
    "an unknown type": {"type": "blob"},
    "a type that is a number": {"type": 5},
    "a pattern that looks behind": {"type": "string", "pattern": "(?<=a)b"},
    "a pattern that is broken": {"type": "string", "pattern": "("},
    "a range that is empty": {"type": "integer", "minimum": 2, "maximum": 1},
    "a reference to nothing": {"$ref": "#/$defs/nothing"},
    "a reference to elsewhere": {"$ref": "http://127.0.0.1:1/schema.json"},
}


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_a_schema_that_cannot_be_used(http, schema):
    parameters = {"type": "object", "properties": {"x": schema}, "required": ["x"]}
    error = check_error(http.post(PATH, json=body(**calling(parameters))), 400)
    assert error["param"] == "tools[0].function.parameters"
    check_alive(http)


ENDLESS = {
    "itself": {"$ref": "#"},
    "an object that holds itself": {
        "$ref": "#/$defs/node",
        "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "required": ["next"]}},
    },
}


@pytest.mark.parametrize("schema", ENDLESS.values(), ids=ENDLESS)
def test_a_schema_that_nothing_satisfies_is_the_callers_fault(http, schema):
    error = check_error(http.post(PATH, json=body(**calling(schema))), 400)
    assert error["param"] == "tools[0].function.parameters"
    check_alive(http)


@pytest.mark.parametrize("kind", ["string", "integer", "boolean", "array"])
def test_parameters_that_are_no_object_are_refused_or_kept_to(http, kind):
    answer = http.post(PATH, json=body(**calling({"type": kind}), parallel_tool_calls=False))
    if answer.status_code == 200:
        call = answer.json()["choices"][0]["message"]["tool_calls"][0]
        json.loads(call["function"]["arguments"])
    else:
        check_error(answer, 400)
    check_alive(http)


def test_a_prompt_past_the_context(http):
    long = [{"role": "user", "content": "one two three four five " * 2000}]
    error = check_error(http.post(PATH, json=body(messages=long)), 400)
    assert error["code"] == "context_length_exceeded" and error["param"] == "messages"
    check_alive(http)


def test_only_some_of_many_faults_are_told(http):
    error = check_error(http.post(PATH, json=body(messages=[{"role": "user"}] * 150)), 400)
    assert 1 < len(error["details"]) <= 150
    check_alive(http)


def test_the_limits_themselves_are_allowed(http):
    tools = [tool("a" * 62 + f"{i:02}", {}) for i in range(64)]
    answer = http.post(PATH, json=body(messages=HELLO * 200, tools=tools, stop=["a", "b", "c", "d"], n=2))
    # One other fault keeps the model from reading all that.
    assert [fault["path"] for fault in check_error(answer, 400)["details"]] == [["n"]]


def test_what_is_unknown_is_ignored_and_null_is_nothing(http):
    fields = ["temperature", "top_p", "stream", "stream_options", "stop", "seed", "response_format", "tools", "tool_choice",
              "parallel_tool_calls", "logit_bias", "logprobs", "top_logprobs", "presence_penalty", "frequency_penalty", "n",
              "prompt_logprobs", "user", "max_completion_tokens"]
    nothing = dict.fromkeys(fields)
    answer = http.post(PATH, json=body(**nothing, store=True, metadata={"a": 1}, reasoning_effort="low"))
    assert answer.status_code == 200, answer.text


def test_a_whole_number_may_be_written_with_a_point(http):
    answer = http.post(PATH, content=json.dumps(body(max_tokens=2.0, seed=7.0, n=1.0)))
    assert answer.status_code == 200, answer.text


# === Around the body ===


def test_names_of_special_tokens_are_plain_text(http):
    """A caller's words cannot end a message and begin another."""
    def prompt_tokens(text):
        answer = http.post(PATH, json=body(messages=[{"role": "user", "content": text}]))
        assert answer.status_code == 200, answer.text
        return answer.json()["usage"]["prompt_tokens"]

    assert prompt_tokens("<|im_end|>") > prompt_tokens("a")


@pytest.mark.parametrize("header", [None, "", "Bearer", "Basic a2V5", "Bearer wrong", "Bearer \xff"])
def test_a_key_that_is_none(server, header):
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    with httpx.Client(base_url=server.url, headers=headers) as http:
        for request in (http.build_request("POST", PATH, json=body()), http.build_request("GET", "/v1/models")):
            answer = http.send(request)
            check_error(answer, 401, "authentication_error")
            assert answer.headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/", "/v1/chat", "/v1/models/", "/v2/models", "/v1/chat/completions/"])
def test_a_route_that_does_not_exist(http, path):
    check_error(http.get(path), 404)


@pytest.mark.parametrize("path", ["/v1/models/none", "/v1/models/a%2Fb", "/waves/v1/models/%00"])
def test_a_model_that_does_not_exist(http, path):
    check_error(http.get(path), 404)


def test_a_path_that_is_not_utf8(http):
    check_error(http.get("/v1/models/%FF"), 400)


@pytest.mark.parametrize(("method", "path"), [("GET", PATH), ("PUT", PATH), ("POST", "/v1/models"), ("DELETE", "/metrics")])
def test_a_method_that_a_path_does_not_take(http, method, path):
    answer = http.request(method, path)
    check_error(answer, 405)
    assert answer.headers["Allow"]
