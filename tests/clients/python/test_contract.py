"""The served contract, put to the test by schemathesis with generated requests."""

import copy
import json

import httpx
import jsonschema_rs
import pytest
import schemathesis
import websockets.sync.client
import yaml
from cases import CLOCK, FLAT_TOOLS, MODEL, TOOLS, VOICE_PROMPT, WEATHER, flat, said
from conftest import KEYS
from contract import Contracts

CHAT = "/v1/chat/completions"
RESPONSES = "/v1/responses"
SECRETS = "/v1/realtime/client_secrets"

AUTHORIZED = {"Authorization": f"Bearer {KEYS['normal']}"}

SETTINGS = {
    # The same examples in every run: what fails, fails again.
    "generation": {"max-examples": 15, "deterministic": True, "database": "none", "with-security-parameters": False},
    "phases": {"stateful": {"enabled": False}},
    "auth": {"openapi": {"key": {"bearer": KEYS["normal"]}}},
    "checks": {"positive_data_acceptance": {"expected-statuses": [200]}},
    "operations": [
        # Both prefixes have one handler, so that its fields need to be gone through only once.
        {"include-path-regex": "^/waves", "phases": {"coverage": {"enabled": False}}},
        # There is no agent here, and nobody who signs for a platform. What follows is for the suite `platforms`.
        {
            "include-path-regex": "^/agents/",
            "phases": {"coverage": {"enabled": False}},
            "checks": {
                "positive_data_acceptance": {"expected-statuses": [403, 404]},
                "negative_data_rejection": {"expected-statuses": [400, 401, 403, 404, 405]},
            },
        },
        {
            "include-path-regex": "{id}",
            "checks": {"positive_data_acceptance": {"expected-statuses": [200, 404]}},
        },
        # These requests ask for no upgrade. What follows one is the part of test_async_contract.py.
        {
            "include-operation-id-regex": "^connect",
            "checks": {
                "positive_data_acceptance": {"expected-statuses": [426]},
                "negative_data_rejection": {"expected-statuses": [401, 405, 426]},
            },
        },
    ],
}


class Contract:
    """The document, and the validators of its schemas."""

    def __init__(self, document):
        self.document = document
        self.validators = {}

    def validator(self, schema):
        """Of a schema by its name, or as it stands in the document."""
        if isinstance(schema, str):
            schema = {"$ref": f"#/components/schemas/{schema}"}
        key = json.dumps(schema)
        if key not in self.validators:
            whole = {**schema, "components": self.document["components"]}
            self.validators[key] = jsonschema_rs.Draft202012Validator(whole)
        return self.validators[key]


@pytest.fixture(scope="session")
def contract(server):
    answer = httpx.get(f"{server.url}/openapi.yaml")
    assert answer.status_code == 200
    return Contract(yaml.safe_load(answer.text))


@pytest.fixture(scope="session")
def loose(contract):
    """The contract without the rules between fields.

    They would keep the generator from trying each field on its own; `REPAIRS` keep to them instead.
    """
    document = copy.deepcopy(contract.document)
    for name in ("ChatCompletionRequest", "ResponseFields"):
        del document["components"]["schemas"][name]["allOf"]
    return Contract(document)


@pytest.fixture(scope="session")
def generated(server, loose):
    config = schemathesis.Config.from_dict(SETTINGS)
    config.projects.default.update(base_url=server.url)
    return schemathesis.openapi.from_dict(loose.document, config=config)


schema = schemathesis.pytest.from_fixture("generated")


@pytest.fixture(scope="session")
def closed(contract):
    """The contract, which allows no field that it does not list."""
    return Contracts({"openapi.yaml": contract.document})


@pytest.fixture(scope="session")
def kept(server):
    """What can be looked up, by the beginning of its path: a response, and a session for as long as it is open."""
    body = {"model": MODEL, "input": said("Say hello."), "max_output_tokens": 2}
    response = ask(server, "POST", RESPONSES, json=body).json()
    url = f"{server.url.replace('http:', 'ws:')}/v1/realtime"
    with websockets.sync.client.connect(url, additional_headers=AUTHORIZED) as session:
        created = json.loads(session.recv(10))
        yield {f"{RESPONSES}/": response["id"], "/v1/sessions/": created["session"]["id"]}


@schema.parametrize()
def test_every_route_keeps_the_contract(case, contract, loose, closed, kept):
    path = case.operation.path.removeprefix("/waves")
    asks = path in REPAIRS and case.operation.method.upper() == "POST"
    name, repaired = REPAIRS.get(path, (None, None))
    if asks and isinstance(case.body, dict):
        valid = loose.validator(name).is_valid(case.body)
        case.body = repaired(case.body) if valid else bounded(case.body)
    if case.operation.method.upper() == "GET":
        for beginning, known in kept.items():
            if path.startswith(beginning):
                case.path_parameters["id"] = known
                # It would have to be one of the items.
                case.query.pop("after", None)
    answer = case.call_and_validate(timeout=120)
    # Some cases try other methods.
    if asks and answer.request.method == "POST" and answer.status_code == 200:
        contract.validator(name).validate(case.body)
        if answer.headers["content-type"] == ["text/event-stream"]:
            check = check_stream if path == CHAT else check_events
            check(closed, answer.text)


def check_stream(closed, text):
    *chunks, done, end = text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    for chunk in chunks:
        closed.check(json.loads(chunk.removeprefix("data: ")), "openapi.yaml#/components/schemas/ChatCompletionChunk")


def check_events(closed, text):
    *events, end = text.split("\n\n")
    assert end == ""
    events = [event.split("\n") for event in events]
    for number, (kind, data) in enumerate(events):
        event = json.loads(data.removeprefix("data: "))
        assert (event["type"], event["sequence_number"]) == (kind.removeprefix("event: "), number)
        closed.check(event, "openapi.yaml#/components/schemas/ResponseEvent")
    assert events[-1][0] in ("event: response.completed", "event: response.incomplete")


# === Requests that end soon ===


def bounded(body):
    """A body that is meant to be refused; should it be served, then not for long."""
    body = dict(body)
    for field in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        if isinstance(body.get(field), int) and body[field] > 0:
            body[field] = 1
    body.setdefault("max_tokens", 1)
    body.setdefault("max_output_tokens", 1)
    return body


def repair_tools(body, default, inner=lambda tool: tool):
    """Gives tools names of their own and a schema that can be used. Says whether one of them has to be called."""
    # Long prompts take long; that 64 tools are allowed is tested elsewhere.
    # Callbacks and MCP servers are for the operator to allow, and generated ones are not.
    body["tools"] = body.get("tools") and [tool for tool in body["tools"] if tool["type"] == "function"][:8]
    for at, tool in enumerate(body["tools"] or []):
        tool.pop("callback", None)
        inner(tool)["name"] = f"tool_{at}"
        if inner(tool).get("parameters"):
            inner(tool)["parameters"] = CLOCK["function"]["parameters"]
    choice = body.get("tool_choice")
    forced = choice == "required" or isinstance(choice, dict)
    if choice == "auto" or forced:
        body["tools"] = body.get("tools") or [copy.deepcopy(default)]
    if isinstance(choice, dict):
        inner(choice)["name"] = inner(body["tools"][0])["name"]
    return forced


def repaired_chat(body):
    """A body that keeps to the rules which no schema can say, and asks for few tokens."""
    body = copy.deepcopy(body)
    body["model"] = MODEL
    body["messages"] = list(answered(body["messages"][:8]))
    forced = repair_tools(body, CLOCK, lambda tool: tool["function"])
    if body.get("top_logprobs") is not None:
        body["logprobs"] = True
    named = (body.get("response_format") or {}).get("json_schema")
    if named and named.get("schema"):
        named["schema"] = WEATHER["function"]["parameters"]
    body.pop("max_completion_tokens", None)
    body["max_tokens"] = 24 if forced else 2
    return body


def answered(messages):
    """The messages with tool results that answer a call."""
    calls = []
    for message in messages:
        if message["role"] == "assistant":
            calls += [call["id"] for call in message.get("tool_calls") or []]
        if message["role"] == "tool":
            if not calls:
                continue
            message = {**message, "tool_call_id": calls[-1]}
        yield message
    if all(message["role"] == "tool" for message in messages):
        yield {"role": "user", "content": "Hi."}


def repaired_response(body):
    body = copy.deepcopy(body)
    body["model"] = MODEL
    # That one can be continued is tested elsewhere.
    body.pop("previous_response_id", None)
    if isinstance(body.get("input"), list):
        body["input"] = list(consistent(body["input"][:8]))
    forced = repair_tools(body, flat(CLOCK))
    form = (body.get("text") or {}).get("format") or {}
    if "schema" in form:
        form["schema"] = WEATHER["function"]["parameters"]
    repair_bytes(body)
    body["max_output_tokens"] = 24 if forced else 2
    return body


def repaired_secret(body):
    body = copy.deepcopy(body)
    session = body.get("session")
    if session:
        session.pop("model", None)
        repair_tools(session, flat(CLOCK))
        repair_bytes(session)
    return body


def consistent(items):
    """The items with ids of their own, and with outputs that answer a call."""
    calls = []
    for at, item in enumerate(items):
        item = {**item, "id": f"item_{at}"}
        if item.get("type") in ("function_call", "mcp_call"):
            item["call_id"] = f"call_{at}"
        if item.get("type") == "function_call":
            calls.append(item["call_id"])
        if item.get("type") == "mcp_approval_response":
            # There is no call that would wait for it.
            continue
        if item.get("type") == "function_call_output":
            if not calls:
                continue
            item["call_id"] = calls.pop()
        yield item


def repair_bytes(body):
    """A schema counts letters where the server counts bytes."""
    if body.get("metadata"):
        body["metadata"] = {f"name_{at}": "value" for at in range(len(body["metadata"]))}
    if body.get("stream_id"):
        body["stream_id"] = "lane"


REPAIRS = {
    CHAT: ("ChatCompletionRequest", repaired_chat),
    RESPONSES: ("ResponseRequest", repaired_response),
    SECRETS: ("ClientSecretRequest", repaired_secret),
}


# === The document itself ===


def test_its_examples_are_requests_that_it_allows(contract):
    checked = 0
    for body in contract.document["components"]["requestBodies"].values():
        content = body["content"]["application/json"]
        for example in content["examples"].values():
            contract.validator(content["schema"]).validate(example["value"])
            checked += 1
    assert checked > 8


def test_its_example_answers_are_answers(contract):
    responses = contract.document["components"]["responses"]
    checked = 0
    for response in responses.values():
        for content in response.get("content", {}).values():
            given = [entry["value"] for entry in content.get("examples", {}).values()]
            given += [content["example"]] if "example" in content else []
            for example in given:
                contract.validator(content["schema"]).validate(example)
                checked += 1
    assert checked > 16


RULES = {
    "alternatives without logprobs": {"top_logprobs": 2},
    "a choice without tools": {"tool_choice": "auto"},
    "a call of none": {"tools": [], "tool_choice": "required"},
    "a call of one of none": {"tools": [], "tool_choice": {"type": "function", "function": {"name": "get_time"}}},
    "an assistant who says nothing": {"messages": [{"role": "assistant", "content": None, "tool_calls": []}]},
}


@pytest.mark.parametrize("fields", RULES.values(), ids=RULES)
def test_the_rules_between_fields(server, contract, fields):
    body = {"model": MODEL, "messages": said("Hi."), "max_tokens": 1, **fields}
    assert not contract.validator("ChatCompletionRequest").is_valid(body)
    answer = ask(server, "POST", CHAT, json=body)
    assert answer.status_code == 400
    contract.validator("Error").validate(answer.json())


# === Stories ===


def ask(server, method, path, key=KEYS["normal"], **options):
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.request(method, server.url + path, headers=headers, timeout=120, **options)


@pytest.fixture
def told(server, closed):
    """Asks, and gives what is answered, which the contract allows at this route with this status."""

    def tell(status, method, route, *ids, **options):
        answer = ask(server, method, route.format(*ids), **options)
        assert answer.status_code == status, answer.text
        closed.check(answer.json(), schema_of_answer(closed, route.replace("{}", "{id}"), method, status))
        return answer.json()

    return tell


def schema_of_answer(closed, path, method, status):
    path = path.partition("?")[0]
    answer = closed.documents["openapi.yaml"]["paths"][path][method.lower()]["responses"][str(status)]
    return f"openapi.yaml{answer['$ref']}/content/application~1json/schema"


def test_a_stream_of_speech_and_calls_keeps_the_contract(server, closed):
    body = {
        "model": MODEL,
        "messages": said("How is the weather?", VOICE_PROMPT),
        "tools": TOOLS,
        "tool_choice": "required",
        "max_tokens": 64,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    answer = ask(server, "POST", CHAT, json=body)
    assert answer.status_code == 200
    check_stream(closed, answer.text)


CALLING = {
    "model": MODEL,
    "instructions": VOICE_PROMPT,
    "input": "How is the weather?",
    "tools": FLAT_TOOLS,
    "tool_choice": "required",
    "max_output_tokens": 64,
}


def test_streamed_responses_keep_the_contract(server, closed):
    for body in (
        {**CALLING, "stream": True},
        {"model": MODEL, "input": "Say hello.", "max_output_tokens": 4, "stream": True, "top_logprobs": 2},
    ):
        answer = ask(server, "POST", RESPONSES, json=body)
        assert answer.status_code == 200
        check_events(closed, answer.text)


@pytest.mark.parametrize("prefix", ["", "/waves"])
def test_the_life_of_a_response(told, prefix):
    created = told(200, "POST", f"{prefix}/v1/responses", json=CALLING)
    known = f"{prefix}/v1/responses/{{}}"
    assert told(200, "GET", known, created["id"]) == created
    told(400, "GET", f"{known}?stream=true", created["id"])
    [item] = told(200, "GET", f"{known}/input_items", created["id"])["data"]
    assert item["content"] == [{"type": "input_text", "text": CALLING["input"]}]
    told(400, "GET", f"{known}/input_items?after=msg_unknown", created["id"])
    assert told(400, "POST", f"{known}/cancel", created["id"])["error"]["code"] == "response_cancel_not_active"
    outputs = [
        {"type": "function_call_output", "call_id": item["call_id"], "output": "Rain."}
        for item in created["output"]
        if item["type"] == "function_call"
    ]
    going_on = {"model": MODEL, "max_output_tokens": 2, "previous_response_id": created["id"]}
    second = told(200, "POST", f"{prefix}/v1/responses", json={**going_on, "input": outputs})
    assert second["previous_response_id"] == created["id"]
    assert len(told(200, "GET", f"{known}/input_items?order=asc", second["id"])["data"]) == len(outputs)
    told(200, "DELETE", known, created["id"])
    for method, end in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")):
        told(404, method, known + end, created["id"])
    gone = told(400, "POST", f"{prefix}/v1/responses", json=going_on)
    assert gone["error"]["code"] == "previous_response_not_found"


def test_a_response_that_is_stopped(server, told, closed):
    body = {"model": MODEL, "input": "Tell me a long story.", "max_output_tokens": 2000, "stream": True}
    events = []
    with httpx.stream("POST", server.url + RESPONSES, headers=AUTHORIZED, json=body, timeout=120) as answer:
        for line in answer.iter_lines():
            if not line.startswith("data: "):
                continue
            events.append(json.loads(line.removeprefix("data: ")))
            closed.check(events[-1], "openapi.yaml#/components/schemas/ResponseEvent")
            if len(events) == 5:
                running = told(200, "GET", f"{RESPONSES}/{{}}", events[0]["response"]["id"])
                assert running["status"] == "in_progress"
                going_on = {"model": MODEL, "previous_response_id": running["id"]}
                early = told(400, "POST", RESPONSES, json=going_on)
                assert early["error"]["code"] == "response_not_completed"
                stopped = told(200, "POST", f"{RESPONSES}/{{}}/cancel", running["id"])
    assert events[-1]["response"] == stopped
    assert stopped["incomplete_details"] == {"reason": "cancelled"}


def test_the_life_of_a_session(told, kept):
    session = kept["/v1/sessions/"]
    sessions = told(200, "GET", "/v1/sessions")
    assert session in [one["id"] for one in sessions["data"]]
    assert told(200, "GET", f"/v1/sessions?limit=1&after={session}")["data"] == []
    told(400, "GET", "/v1/sessions?limit=0")
    assert told(200, "GET", "/v1/sessions/{}", session)["items"] == []
    told(404, "GET", "/v1/sessions/{}", "sess_unknown")
    told(404, "DELETE", "/v1/sessions/{}", "sess_unknown")


def test_a_client_secret_opens_sessions_and_nothing_else(server, told):
    secret = told(200, "POST", SECRETS, json={"session": {"instructions": "Be brief."}})["value"]
    told(400, "POST", SECRETS, json={"expires_after": {"seconds": 1}})
    for method, route in (
        ("POST", SECRETS),
        ("POST", RESPONSES),
        ("GET", RESPONSES),
        ("GET", "/v1/sessions"),
        ("GET", "/v1/models"),
    ):
        told(403, method, route, key=secret)
    told(426, "GET", "/v1/realtime", key=secret)


def test_what_is_no_websocket(told):
    for route in (RESPONSES, f"/waves{RESPONSES}", "/v1/realtime"):
        told(426, "GET", route)
        told(401, "GET", route, key="wrong")
