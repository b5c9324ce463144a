"""OpenAI's Responses API through the official SDK for Python, unpatched: over HTTP and over its WebSocket."""

import contextlib
import json
import threading
from typing import Annotated

import jsonschema
import openai
import pydantic
import pytest
import websockets
from cases import FLAT_TOOLS, MODEL, VOICE_PROMPT, schema_of
from conftest import CONVERSED_WITHIN, check_shape, conversation

ENDS = ("response.completed", "response.incomplete", "response.failed")

DEFAULTS = {"model": MODEL, "input": "Say hello.", "max_output_tokens": 16, "temperature": 0}

WEATHER_CALL = {
    "input": "How is the weather in Oslo?",
    "tools": FLAT_TOOLS,
    "tool_choice": "required",
    "parallel_tool_calls": False,
    "max_output_tokens": 64,
}

LONG = {"input": "Tell me a very long story about the sea.", "max_output_tokens": 2000}


def ask(client, **options):
    return client.responses.create(**{**DEFAULTS, **options})


def user(text):
    return {"role": "user", "content": text}


def result_of(call, output='{"sky": "clear"}'):
    return {"type": "function_call_output", "call_id": call.call_id, "output": output}


def calls_of(response):
    return [item for item in response.output if item.type == "function_call"]


def check_response(response, limit=16):
    check_shape(response)
    assert response.id.startswith("resp_") and response.object == "response" and response.model == MODEL
    assert response.error is None
    assert response.created_at > 1_700_000_000
    # The model is small and may not know when to stop.
    if response.status == "incomplete":
        assert response.incomplete_details.reason == "max_output_tokens"
    else:
        assert response.status == "completed" and response.incomplete_details is None
    usage = response.usage
    assert usage.input_tokens > 0 and 0 < usage.output_tokens <= limit
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert 0 <= usage.input_tokens_details.cached_tokens < usage.input_tokens
    assert len({item.id for item in response.output}) == len(response.output)
    for item in response.output:
        assert item.status == response.status or item.status == "completed"


def check_calls(response):
    """Every call names one of the tools and keeps to its schema."""
    calls = calls_of(response)
    assert calls and len({call.call_id for call in calls}) == len(calls)
    for call in calls:
        assert call.call_id.startswith("call_")
        jsonschema.validate(json.loads(call.arguments), schema_of(call.name))
    return calls


def check_stream(events):
    """The events of one response tell one story, which ends with the response that they made up. Gives that response."""
    for event in events:
        check_shape(event)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    first, second, *body, last = events
    assert (first.type, second.type) == ("response.created", "response.in_progress")
    for event in (first, second):
        assert event.response.status == "in_progress" and event.response.output == []
        assert event.response.id == last.response.id
    assert last.type == f"response.{last.response.status}"

    kinds = iter([event.type.removeprefix("response.") for event in body] + [None])
    kind = next(kinds)
    told = iter(body)
    for index, item in enumerate(last.response.output):
        assert kind == "output_item.added"
        added = next(told)
        assert (added.output_index, added.item.id, added.item.type) == (index, item.id, item.type)
        kind = next(kinds)
        if item.type == "message":
            assert added.item.content == [] and len(item.content) == 1
            middle = ["content_part.added", "output_text.delta", "output_text.done", "content_part.done"]
        else:
            assert added.item.arguments == ""
            assert (added.item.call_id, added.item.name) == (item.call_id, item.name)
            middle = ["function_call_arguments.delta", "function_call_arguments.done"]
        pieces = ""
        for expected in middle:
            assert kind == expected
            while kind == expected:
                event = next(told)
                assert (event.item_id, event.output_index) == (item.id, index)
                if item.type == "message":
                    assert event.content_index == 0
                if expected.endswith("delta"):
                    assert event.delta
                    pieces += event.delta
                elif expected == "content_part.added":
                    assert event.part.type == "output_text" and event.part.text == ""
                elif expected == "content_part.done":
                    assert event.part.to_dict() == item.content[0].to_dict()
                elif expected == "output_text.done":
                    assert event.text == pieces == item.content[0].text
                else:
                    assert event.arguments == pieces == item.arguments
                kind = next(kinds)
                if not expected.endswith("delta"):
                    break
        assert kind == "output_item.done"
        done = next(told)
        assert (done.output_index, done.item.to_dict()) == (index, item.to_dict())
        kind = next(kinds)
    assert kind is None, f"{kind} belongs to no item"
    return last.response


def check_error(error, status, param=None, code=None):
    assert error.status_code == status
    assert (error.type, error.param, error.code) == ("invalid_request_error", param, code)
    assert error.body["message"]


# === Text over HTTP ===


def test_an_answer(client):
    response = ask(client)
    check_response(response)
    [message] = response.output
    assert message.type == "message" and message.role == "assistant"
    assert response.output_text == message.content[0].text != ""
    assert (response.previous_response_id, response.instructions) == (None, None)
    assert (response.temperature, response.max_output_tokens) == (0, 16)
    assert response.tools == [] and response.tool_choice == "auto" and response._request_id


def test_the_forms_of_input(client):
    text = ask(client).output_text
    assert ask(client, input=[user("Say hello.")]).output_text == text
    parts = [{"type": "input_text", "text": "Say"}, {"type": "input_text", "text": " hello."}]
    assert ask(client, input=[{"type": "message", "role": "user", "content": parts}]).output_text == text
    answer = {"type": "output_text", "text": "Hello.", "annotations": []}
    mixed = [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": "Be kind."},
        user("Hi."),
        {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "content": [answer]},
        user("Say hello."),
    ]
    response = ask(client, input=mixed, instructions="You are a phone agent.", metadata={"call": "42"})
    check_response(response)
    assert response.instructions == "You are a phone agent." and response.metadata == {"call": "42"}


def test_a_stream(client):
    response = check_stream(list(ask(client, stream=True)))
    check_response(response)
    assert response.output_text == ask(client).output_text


def test_an_answer_parsed_into_a_pydantic_model(client):
    response = client.responses.parse(
        **{**DEFAULTS, "input": "A table for four, inside.", "max_output_tokens": 64}, text_format=Booking
    )
    assert response.status == "completed" and isinstance(response.output_parsed, Booking)


# === Conversations over HTTP ===


def test_a_chain_is_the_conversation_so_far(client):
    first = ask(client, input="My name is Ada.", instructions="Answer in one short sentence.")
    second = ask(client, input="What is my name?", previous_response_id=first.id)
    check_response(second)
    assert second.previous_response_id == first.id != second.id
    assert second.instructions is None, "instructions belong to one request"
    whole = [user("My name is Ada."), {"role": "assistant", "content": first.output_text}, user("What is my name?")]
    assert second.usage.input_tokens == ask(client, input=whole, max_output_tokens=1).usage.input_tokens
    third = ask(client, input="And mine?", previous_response_id=second.id)
    assert third.usage.input_tokens > second.usage.input_tokens + second.usage.output_tokens
    assert third.usage.input_tokens_details.cached_tokens > second.usage.input_tokens


def test_a_conversation_forks(client):
    first = ask(client, input="My name is Ada.")
    left, right = (ask(client, input="What is my name?", previous_response_id=first.id) for _ in range(2))
    assert left.id != right.id and left.previous_response_id == right.previous_response_id == first.id
    assert left.usage.input_tokens == right.usage.input_tokens, "neither knows of the other"


def test_an_unknown_previous_response(client):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, previous_response_id="resp_unknown")
    check_error(caught.value, 400, "previous_response_id", "previous_response_not_found")


def test_a_response_is_kept_until_it_is_deleted(client):
    response = ask(client)
    kept = client.responses.retrieve(response.id)
    check_shape(kept)
    assert kept.to_dict() == response.to_dict()
    client.responses.delete(response.id)
    for gone in (client.responses.retrieve, client.responses.delete, client.responses.input_items.list):
        with pytest.raises(openai.NotFoundError):
            gone(response.id)
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, previous_response_id=response.id)
    check_error(caught.value, 400, "previous_response_id", "previous_response_not_found")


def test_what_is_not_to_be_stored_is_not(client):
    response = ask(client, store=False)
    check_response(response)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)


def test_responses_are_seen_with_the_key_that_made_them(server, client):
    response = ask(client)
    with server.client("single") as stranger:
        with pytest.raises(openai.NotFoundError):
            stranger.responses.retrieve(response.id)
        with pytest.raises(openai.BadRequestError) as caught:
            ask(stranger, previous_response_id=response.id)
        check_error(caught.value, 400, "previous_response_id", "previous_response_not_found")


def test_input_items(client):
    given = [user("Hi."), {"role": "assistant", "content": "Hello."}, user("Say hello.")]
    response = ask(client, input=given)
    page = client.responses.input_items.list(response.id, order="asc")
    items = page.data
    for item in items:
        check_shape(item)
    assert [item.role for item in items] == ["user", "assistant", "user"]
    assert [item.content[0].text for item in items] == ["Hi.", "Hello.", "Say hello."]
    assert [item.content[0].type for item in items] == ["input_text", "output_text", "input_text"]
    ids = [item.id for item in items]
    assert len(set(ids)) == 3 and page.has_more is False
    # The SDK asks for page after page.
    assert [item.id for item in client.responses.input_items.list(response.id, order="asc", limit=1)] == ids
    assert [item.id for item in client.responses.input_items.list(response.id)] == ids[::-1]


def test_what_is_over_cannot_be_cancelled(client):
    response = ask(client)
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.cancel(response.id)
    assert caught.value.type == "invalid_request_error" and caught.value.body["message"]
    with pytest.raises(openai.NotFoundError):
        client.responses.cancel("resp_unknown")
    assert client.responses.retrieve(response.id).status == response.status


# === Tools over HTTP ===


def test_a_call_and_its_result(client):
    first = ask(client, **WEATHER_CALL)
    check_response(first, limit=64)
    assert first.status == "completed" and first.tool_choice == "required"
    assert [tool.name for tool in first.tools] == ["get_weather", "get_time"]
    assert [item.type for item in first.output] == ["function_call"]
    [call] = check_calls(first)
    second = ask(client, input=[result_of(call)], previous_response_id=first.id)
    check_response(second)
    assert second.output_text and calls_of(second) == []
    items = client.responses.input_items.list(second.id, order="desc", limit=1).data
    check_shape(items[0])
    assert (items[0].type, items[0].call_id, items[0].output) == (
        "function_call_output",
        call.call_id,
        '{"sky": "clear"}',
    )


def test_what_was_put_out_can_be_put_in(client):
    """The loop of clients that keep the conversation themselves."""
    first = ask(client, **WEATHER_CALL, instructions=VOICE_PROMPT)
    [call] = check_calls(first)
    conversation = [user(WEATHER_CALL["input"]), *first.output, result_of(call)]
    second = ask(client, input=conversation, tools=FLAT_TOOLS, tool_choice="none")
    check_response(second)
    assert second.output_text
    third = ask(client, input=[*conversation, *second.output, user("Thank you.")])
    check_response(third)
    assert third.output_text


def test_a_streamed_call(client):
    response = check_stream(list(ask(client, **WEATHER_CALL, stream=True)))
    assert [item.type for item in response.output] == ["function_call"] and response.status == "completed"
    check_calls(response)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_voice_agent_speaks_before_it_calls(client, stream):
    options = {**WEATHER_CALL, "instructions": VOICE_PROMPT, "input": "Wie wird denn das Wetter heute in Oslo?"}
    response = check_stream(list(ask(client, **options, stream=True))) if stream else ask(client, **options)
    check_response(response, limit=64)
    assert [item.type for item in response.output] == ["message", "function_call"]
    assert response.output_text
    [call] = check_calls(response)
    answer = ask(client, input=[result_of(call)], previous_response_id=response.id, instructions=VOICE_PROMPT)
    assert answer.output_text


def test_the_choice_of_a_tool(client):
    for name in ("get_weather", "get_time"):
        choice = {"type": "function", "name": name}
        response = ask(client, **{**WEATHER_CALL, "input": "Hello!", "tool_choice": choice})
        assert [call.name for call in check_calls(response)] == [name]
    response = ask(client, **{**WEATHER_CALL, "tool_choice": "none", "max_output_tokens": 16})
    assert response.output_text and calls_of(response) == []


class Booking(pydantic.BaseModel):
    """Books a table."""

    people: Annotated[int, pydantic.Field(ge=1, le=9)]
    inside: bool


def test_the_stream_helper(client):
    with client.responses.stream(
        **{**DEFAULTS, "input": "A table for four, inside.", "max_output_tokens": 64},
        tools=[openai.pydantic_function_tool(Booking, name="book")],
        tool_choice="required",
        parallel_tool_calls=False,
    ) as stream:
        snapshots = [event.snapshot for event in stream if event.type == "response.function_call_arguments.delta"]
        [call] = stream.get_final_response().output
    assert snapshots[-1] == call.arguments
    assert isinstance(call.parsed_arguments, Booking)


# === Errors over HTTP ===

BAD = [
    ("temperature", {"temperature": 2.5}),
    ("max_output_tokens", {"max_output_tokens": 0}),
    ("input", {"input": [{"role": "robot", "content": "Hi."}]}),
    ("input", {"input": [{"type": "item_reference", "id": "msg_unknown"}]}),
    ("input", {"input": [{"type": "function_call_output", "call_id": "call_unknown", "output": "1"}]}),
    ("tools", {"tools": [{"type": "web_search"}]}),
    ("tool_choice", {"tool_choice": "required"}),
    ("background", {"background": True}),
    ("text", {"text": {"format": {"type": "xml"}}}),
]


@pytest.mark.parametrize(("param", "options"), BAD)
def test_a_bad_request_names_the_field(client, param, options):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **options)
    assert caught.value.type == "invalid_request_error" and caught.value.body["message"]
    assert caught.value.param.split(".")[0].split("[")[0] == param


def test_an_unknown_model(client):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, model="gpt-none")
    check_error(caught.value, 400, "model", "model_not_found")


def test_a_wrong_key(server):
    with server.client(api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
        ask(client)


# === The WebSocket ===


@contextlib.asynccontextmanager
async def connected(server, key="normal", **options):
    async with server.async_client(key, **options) as client, client.responses.connect() as connection:
        yield connection


async def begin(connection, **options):
    await connection.response.create(**{**DEFAULTS, **options})


async def rest(connection):
    """What is told until a response ends, or an error."""
    events = []
    while not events or events[-1].type not in (*ENDS, "error"):
        events.append(await connection.recv())
    return events


async def turn(connection, **options):
    await begin(connection, **options)
    return check_stream(await rest(connection))


async def failure(connection):
    """The error that comes next."""
    event = await connection.recv()
    check_shape(event)
    assert event.type == "error", event
    assert event.error.type == "invalid_request_error" and event.error.message
    assert 400 <= event.status < 500
    return event


@conversation
async def test_a_turn_and_a_chain(server):
    async with connected(server) as connection:
        first = await turn(connection, input="My name is Ada.")
        check_response(first)
        second = await turn(connection, input=[user("What is my name?")], previous_response_id=first.id)
        check_response(second)
        assert second.previous_response_id == first.id
        assert second.usage.input_tokens > first.usage.input_tokens + first.usage.output_tokens
        fork = await turn(connection, input=[user("What is my name?")], previous_response_id=first.id)
        assert fork.usage.input_tokens == second.usage.input_tokens


def test_a_turn_without_asyncio(client):
    with client.responses.connect() as connection:
        patience = threading.Timer(CONVERSED_WITHIN, connection.close)
        patience.start()
        try:
            connection.response.create(**DEFAULTS)
            events = []
            for event in connection:
                events.append(event)
                if event.type in ENDS:
                    break
        finally:
            patience.cancel()
    check_response(check_stream(events))


@conversation
async def test_a_call_and_its_result_on_the_socket(server):
    async with connected(server) as connection:
        first = await turn(connection, **WEATHER_CALL)
        [call] = check_calls(first)
        second = await turn(connection, input=[result_of(call)], previous_response_id=first.id)
        assert second.output_text and calls_of(second) == []


@conversation
async def test_a_voice_agent_speaks_before_it_calls_on_the_socket(server):
    async with connected(server) as connection:
        response = await turn(connection, **WEATHER_CALL, instructions=VOICE_PROMPT)
        assert [item.type for item in response.output] == ["message", "function_call"] and response.output_text
        check_calls(response)


@conversation
async def test_what_is_not_stored_lives_as_long_as_its_connection(server):
    async with connected(server) as connection:
        first = await turn(connection, input="My name is Ada.", store=False)
        second = await turn(connection, input="What is my name?", previous_response_id=first.id, store=False)
        assert second.usage.input_tokens > first.usage.input_tokens + first.usage.output_tokens


@conversation
async def test_a_conversation_outlives_its_connection(server):
    async with connected(server) as connection:
        first = await turn(connection, input="My name is Ada.")
    async with connected(server) as connection:
        second = await turn(connection, input="What is my name?", previous_response_id=first.id)
    assert second.usage.input_tokens > first.usage.input_tokens + first.usage.output_tokens
    async with server.async_client() as client:
        kept = await client.responses.retrieve(second.id)
        assert kept.output_text == second.output_text
        third = await client.responses.create(**{**DEFAULTS, "input": "Thanks."}, previous_response_id=second.id)
    check_response(third)


@conversation
async def test_a_warm_up_before_a_turn(server):
    told = "Greet the caller of the flower shop, whose name is Ada, and who has called on Tuesday about red tulips."
    async with connected(server) as connection:
        await begin(connection, instructions=told, input=[], generate=False)
        events = await rest(connection)
        for event in events:
            check_shape(event)
        kinds = [event.type for event in events if event.type != "response.in_progress"]
        assert kinds == ["response.created", "response.completed"]
        warm = events[-1].response
        assert warm.status == "completed" and warm.output == []
        response = await turn(connection, instructions=told, input="Hello?", previous_response_id=warm.id)
        check_response(response)
        assert response.usage.input_tokens_details.cached_tokens > 0


async def read_to_delta(connection):
    events = []
    while not events or events[-1].type != "response.output_text.delta":
        events.append(await connection.recv())
        assert events[-1].type not in (*ENDS, "error"), events[-1]
    return events


@conversation
async def test_a_cancelled_turn_ends_at_once(server):
    async with connected(server) as connection:
        await begin(connection, **LONG)
        events = await read_to_delta(connection)
        created = events[0].response
        # This SDK has no method for it, and sends what it is given.
        await connection.send({"type": "response.cancel", "response_id": created.id})
        events += await rest(connection)
        last = events[-1]
        assert (last.type, last.response.id, last.response.status) == ("response.incomplete", created.id, "incomplete")
        assert last.response.incomplete_details.reason == "cancelled"
        said = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        assert last.response.output_text == said, "what was sent is what is kept"
        assert last.response.usage.output_tokens < 1000
        check_response(await turn(connection))


@conversation
async def test_leaving_in_mid_answer_leaves_nothing_behind(server):
    async with connected(server) as connection:
        await begin(connection, **LONG)
        await read_to_delta(connection)
    async with connected(server) as connection:
        check_response(await turn(connection))


@conversation
async def test_a_second_turn_at_once_is_refused(server):
    async with connected(server) as connection:
        await begin(connection, **LONG)
        events = await read_to_delta(connection)
        await begin(connection)
        while events[-1].type != "error":
            events.append(await connection.recv())
            assert events[-1].type not in ENDS, events[-1]
        check_shape(events[-1])
        assert events[-1].error.message
        await connection.send({"type": "response.cancel", "response_id": events[0].response.id})
        last = (await rest(connection))[-1]
        assert (last.type, last.response.id) == ("response.incomplete", events[0].response.id)
        check_response(await turn(connection))


@conversation
async def test_bad_input_is_an_error_and_the_connection_goes_on(server):
    async with connected(server) as connection:
        await begin(connection, previous_response_id="resp_unknown")
        error = (await failure(connection)).error
        assert (error.code, error.param) == ("previous_response_not_found", "previous_response_id")
        for param, options in BAD[:3]:
            await begin(connection, **options)
            error = (await failure(connection)).error
            assert error.param.split(".")[0].split("[")[0] == param
        for unreadable in ("{", "[]", '"hello"', '{"type": "response.sing"}', "{}"):
            await connection.send_raw(unreadable)
            await failure(connection)
        check_response(await turn(connection))


@conversation
async def test_two_lanes(server):
    async with connected(server) as connection:
        lanes = {"left": [], "right": []}
        for lane in lanes:
            await begin(connection, input=f"Say {lane}.", stream_id=lane)
        while not all(events and events[-1].type in ENDS for events in lanes.values()):
            event = await connection.recv()
            assert event.type != "error", event
            lanes[event.stream_id].append(event)
        left, right = map(check_stream, lanes.values())
        check_response(left)
        check_response(right)
        # A lane is a way to send, not a conversation: the left one goes on in a third.
        await begin(connection, previous_response_id=left.id, stream_id="third")
        events = await rest(connection)
        assert {event.stream_id for event in events} == {"third"}
        assert check_stream(events).usage.input_tokens > left.usage.input_tokens
        await begin(connection, temperature=9, stream_id="right")
        assert (await failure(connection)).stream_id == "right"


@conversation
async def test_turns_of_one_lane_wait_for_each_other(server):
    async with connected(server) as connection:
        for text in ("Say one.", "Say two."):
            await begin(connection, input=text, stream_id="only")
        first, second = [check_stream(await rest(connection)) for _ in range(2)]
        assert first.id != second.id


@conversation
async def test_a_wrong_key_is_refused_before_the_upgrade(server):
    with pytest.raises(websockets.exceptions.InvalidStatus) as caught:
        async with connected(server, api_key="wrong"):
            pass
    response = caught.value.response
    assert response.status_code == 401
    assert json.loads(response.body)["error"]["code"] == "invalid_api_key"
