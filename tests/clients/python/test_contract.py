"""The served contract, put to the test by schemathesis with generated requests."""

import copy
import json

import httpx
import jsonschema_rs
import pytest
import schemathesis
import yaml
from cases import CLOCK, MODEL, TOOLS, VOICE_PROMPT, WEATHER, said
from conftest import KEYS

CHAT = "/v1/chat/completions"

SETTINGS = {
    # The same examples in every run: what fails, fails again.
    "generation": {"max-examples": 15, "deterministic": True, "database": "none", "with-security-parameters": False},
    "phases": {"stateful": {"enabled": False}},
    "auth": {"openapi": {"key": {"bearer": KEYS["normal"]}}},
    "checks": {"positive_data_acceptance": {"expected-statuses": [200]}},
    "operations": [
        # Both prefixes have one handler, so that its fields need to be gone through only once.
        {"include-path": f"/waves{CHAT}", "phases": {"coverage": {"enabled": False}}},
        {
            "include-path-regex": "models/",
            "checks": {"positive_data_acceptance": {"expected-statuses": [200, 404]}},
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

    They would keep the generator from trying each field on its own; `repaired` keeps to them instead.
    """
    document = copy.deepcopy(contract.document)
    del document["components"]["schemas"]["ChatCompletionRequest"]["allOf"]
    return Contract(document)


@pytest.fixture(scope="session")
def generated(server, loose):
    config = schemathesis.Config.from_dict(SETTINGS)
    config.projects.default.update(base_url=server.url)
    return schemathesis.openapi.from_dict(loose.document, config=config)


schema = schemathesis.pytest.from_fixture("generated")


@schema.parametrize()
def test_every_route_keeps_the_contract(case, contract, loose):
    chat = case.operation.path.endswith(CHAT)
    if chat and isinstance(case.body, dict):
        valid = loose.validator("ChatCompletionRequest").is_valid(case.body)
        case.body = repaired(case.body) if valid else bounded(case.body)
    answer = case.call_and_validate(timeout=120)
    # Some cases try other methods.
    if chat and answer.request.method == "POST" and answer.status_code == 200:
        contract.validator("ChatCompletionRequest").validate(case.body)
        if answer.headers["content-type"] == ["text/event-stream"]:
            check_stream(contract, answer.text)


def check_stream(contract, text):
    *chunks, done, end = text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    for chunk in chunks:
        contract.validator("ChatCompletionChunk").validate(json.loads(chunk.removeprefix("data: ")))


# === Requests that end soon ===


def bounded(body):
    """A body that is meant to be refused; should it be served, then not for long."""
    body = dict(body)
    for field in ("max_tokens", "max_completion_tokens"):
        if isinstance(body.get(field), int) and body[field] > 0:
            body[field] = 1
    body.setdefault("max_tokens", 1)
    return body


def repaired(body):
    """A body that keeps to the rules which no schema can say, and asks for few tokens."""
    body = copy.deepcopy(body)
    body["model"] = MODEL
    # Long prompts take long; that 200 messages and 64 tools are allowed is tested elsewhere.
    body["messages"] = list(answered(body["messages"][:8]))
    body["tools"] = body.get("tools") and body["tools"][:8]
    for at, tool in enumerate(body["tools"] or []):
        tool["function"]["name"] = f"tool_{at}"
        if tool["function"].get("parameters"):
            tool["function"]["parameters"] = CLOCK["function"]["parameters"]
    choice = body.get("tool_choice")
    forced = choice == "required" or isinstance(choice, dict)
    if choice == "auto" or forced:
        body["tools"] = body.get("tools") or [CLOCK]
    if isinstance(choice, dict):
        choice["function"]["name"] = body["tools"][0]["function"]["name"]
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


# === The document itself ===


def test_its_examples_are_requests_that_it_allows(contract):
    content = contract.document["components"]["requestBodies"]["ChatCompletion"]["content"]["application/json"]
    for example in content["examples"].values():
        contract.validator("ChatCompletionRequest").validate(example["value"])


def test_its_example_answers_are_answers(contract):
    responses = contract.document["components"]["responses"]
    checked = 0
    for response in responses.values():
        for content in response["content"].values():
            given = [entry["value"] for entry in content.get("examples", {}).values()]
            given += [content["example"]] if "example" in content else []
            for example in given:
                contract.validator(content["schema"]).validate(example)
                checked += 1
    assert checked > 8


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
    answer = httpx.post(f"{server.url}{CHAT}", json=body, headers={"Authorization": f"Bearer {KEYS['normal']}"})
    assert answer.status_code == 400
    contract.validator("Error").validate(answer.json())


def test_a_stream_of_speech_and_calls_keeps_the_contract(server, contract):
    body = {
        "model": MODEL,
        "messages": said("How is the weather?", VOICE_PROMPT),
        "tools": TOOLS,
        "tool_choice": "required",
        "max_tokens": 64,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    answer = httpx.post(
        f"{server.url}{CHAT}", json=body, headers={"Authorization": f"Bearer {KEYS['normal']}"}, timeout=120
    )
    assert answer.status_code == 200
    check_stream(contract, answer.text)
