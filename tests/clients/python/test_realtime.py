"""OpenAI's Realtime API, text in and text out, through the official SDK for Python, unpatched."""

import base64
import contextlib
import json
import time

import jsonschema
import openai
import pytest
import websockets
from cases import FLAT_TOOLS, MODEL, VOICE_PROMPT, schema_of
from conftest import KEYS, check_shape, conversation

SETTINGS = {"type": "realtime", "output_modalities": ["text"], "max_output_tokens": 16}

CALLING = {"tools": FLAT_TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "max_output_tokens": 64}

LONG = {"max_output_tokens": 2000}


class Talk:
    """A connection, and all that was heard on it."""

    def __init__(self, connection):
        self.connection = connection
        self.heard = []

    async def next(self):
        """The next event. Limits may be told at any time."""
        event = None
        while event is None or event.type == "rate_limits.updated":
            event = await self.connection.recv()
            check_shape(event)
            self.heard.append(event)
        return event

    async def until(self, kind):
        """The events up to one of this kind."""
        events = []
        while not events or events[-1].type != kind:
            events.append(await self.next())
            assert kind == "error" or events[-1].type != "error", events[-1]
        return events

    async def failure(self, cause=None):
        """The error that comes next, which names the event that caused it."""
        error = (await self.until("error"))[-1].error
        assert error.type == "invalid_request_error" and error.message
        if cause is not None:
            assert error.event_id == cause
        return error

    async def set(self, **settings):
        await self.connection.session.update(session={"type": "realtime", **settings})
        return (await self.until("session.updated"))[-1].session

    async def add(self, item, **options):
        """Adds an item. Gives it as the server sees it."""
        await self.connection.conversation.item.create(item=item, **options)
        [added, done] = await self.until("conversation.item.done")
        assert added.type == "conversation.item.added" and added.item.id == done.item.id
        assert added.previous_item_id == done.previous_item_id
        return done

    async def say(self, text, **options):
        return await self.add(user(text), **options)

    async def begin(self, **options):
        await self.connection.response.create(response=options)

    async def answer(self, **options):
        await self.begin(**options)
        return check_story(await self.until("response.done"))

    async def retrieve(self, item_id):
        await self.connection.conversation.item.retrieve(item_id=item_id)
        return (await self.until("conversation.item.retrieved"))[-1].item


@contextlib.asynccontextmanager
async def session(server, settings=SETTINGS, **options):
    """A session with these settings."""
    async with server.async_client(**options) as client, client.realtime.connect(model=MODEL) as connection:
        talk = Talk(connection)
        created = await talk.next()
        assert created.type == "session.created"
        if settings:
            await talk.set(**settings)
        yield talk
        ids = [event.event_id for event in talk.heard]
        assert all(ids) and len(set(ids)) == len(ids)


def user(text):
    return {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}


def result_of(call, output='{"sky": "clear"}'):
    return {"type": "function_call_output", "call_id": call.call_id, "output": output}


def text_of(response):
    return "".join(part.text for item in response.output if item.type == "message" for part in item.content)


def calls_of(response):
    return [item for item in response.output if item.type == "function_call"]


def check_calls(response):
    calls = calls_of(response)
    assert calls and len({call.call_id for call in calls}) == len(calls)
    for call in calls:
        jsonschema.validate(json.loads(call.arguments), schema_of(call.name))
    return calls


def check_story(events):
    """The events of one response tell one story, which ends with the response that they made up. Gives that response."""
    last = events[-1]
    response = last.response
    assert events[0].type == "response.created" and last.type == "response.done"
    assert events[0].response.id == response.id and events[0].response.status == "in_progress"
    assert response.object == "realtime.response" and response.output_modalities == ["text"]
    if response.status == "incomplete":
        assert response.status_details.reason == "max_output_tokens"
    else:
        assert response.status == "completed"
    usage = response.usage
    assert usage.input_tokens > 0 and usage.output_tokens > 0
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert 0 <= usage.input_token_details.cached_tokens < usage.input_tokens

    told = [event for event in events[1:-1] if event.type.startswith("response.")]
    assert all(event.response_id == response.id for event in told)
    for index, item in enumerate(response.output):
        mine = [event for event in told if event.output_index == index]
        assert mine == told[: len(mine)], "one item is told after the other"
        told = told[len(mine) :]
        kinds = [event.type.removeprefix("response.") for event in mine]
        pieces = [event.delta for event in mine if event.type.endswith(".delta")]
        added, done = mine[0], mine[-1]
        assert added.item.id == item.id and done.item.to_dict() == item.to_dict()
        assert all(event.item_id == item.id for event in mine[1:-1])
        if item.type == "message":
            begin, delta = ["content_part.added"], "output_text.delta"
            finish = ["output_text.done", "content_part.done"]
            assert item.role == "assistant" and [part.type for part in item.content] == ["output_text"]
            assert mine[1].part.type == mine[-2].part.type == "text"
            assert "".join(pieces) == mine[-3].text == mine[-2].part.text == item.content[0].text
        else:
            begin, delta, finish = [], "function_call_arguments.delta", ["function_call_arguments.done"]
            assert all(event.call_id == item.call_id for event in mine[1:-1])
            assert "".join(pieces) == mine[-2].arguments == item.arguments and mine[-2].name == item.name
        assert kinds == ["output_item.added", *begin, *[delta] * len(pieces), *finish, "output_item.done"]
    assert told == [], "all belongs to the items of the response"
    return response


# === The session ===


@conversation
async def test_a_session_begins_and_is_set(server):
    async with session(server, settings=None) as talk:
        created = talk.heard[0].session
        assert created.type == "realtime" and created.id and created.model == MODEL
        assert created.output_modalities == ["text"] and created.tools == []
        updated = await talk.set(instructions="Be brief.", max_output_tokens=20, tools=FLAT_TOOLS)
        assert (updated.id, updated.model) == (created.id, MODEL)
        assert (updated.instructions, updated.max_output_tokens) == ("Be brief.", 20)
        assert [tool.name for tool in updated.tools] == ["get_weather", "get_time"]
        # What is not given stays; what is empty is cleared.
        updated = await talk.set(tools=[])
        assert (updated.instructions, updated.max_output_tokens, updated.tools) == ("Be brief.", 20, [])


@conversation
async def test_a_setting_that_is_not_served_changes_nothing(server):
    async with session(server) as talk:
        for wrong in ({"output_modalities": ["audio"]}, {"max_output_tokens": 0}, {"tools": [{"type": "mcp"}]}):
            settings = {"type": "realtime", "instructions": "Not this.", **wrong}
            await talk.connection.session.update(session=settings, event_id="event_wrong")
            await talk.failure("event_wrong")
        updated = await talk.set()
        assert not updated.instructions and updated.output_modalities == ["text"]
        assert updated.max_output_tokens == SETTINGS["max_output_tokens"]


# === Text ===


@conversation
async def test_a_turn(server):
    async with session(server) as talk:
        asked = await talk.say("Say hello.")
        assert asked.item.role == "user" and asked.item.content[0].text == "Say hello."
        assert asked.item.status == "completed" and asked.previous_item_id is None
        await talk.begin()
        events = await talk.until("response.done")
        response = check_story(events)
        assert text_of(response) and response.conversation_id
        # The answer becomes part of the conversation.
        [item] = response.output
        added, done = (e for e in events if e.type in ("conversation.item.added", "conversation.item.done"))
        assert (added.type, done.type) == ("conversation.item.added", "conversation.item.done")
        assert added.item.id == done.item.id == item.id
        assert added.previous_item_id == done.previous_item_id == asked.item.id
        assert (await talk.retrieve(item.id)).to_dict() == item.to_dict()


@conversation
async def test_a_conversation_goes_on(server):
    async with session(server, {**SETTINGS, "instructions": "You are a friendly phone agent."}) as talk:
        await talk.say("My name is Ada.")
        first = await talk.answer()
        await talk.say("What is my name?")
        second = await talk.answer()
        assert text_of(second) and first.id != second.id
        assert second.usage.input_tokens > first.usage.input_tokens + first.usage.output_tokens
        assert second.usage.input_token_details.cached_tokens > 0
        # Settings of one answer are of that answer alone.
        third = await talk.answer(max_output_tokens=1, instructions="Say bye.", metadata={"topic": "bye"})
        assert third.usage.output_tokens == 1 and third.metadata == {"topic": "bye"}
        assert (await talk.set()).instructions == "You are a friendly phone agent."


@conversation
async def test_an_answer_beside_the_conversation(server):
    async with session(server) as talk:
        await talk.say("My name is Ada, and I would like to book a table for four people tomorrow.")
        inside = await talk.answer()
        await talk.begin(conversation="none", input=[user("Say hello.")], metadata={"topic": "hello"})
        events = await talk.until("response.done")
        beside = check_story(events)
        assert text_of(beside) and beside.metadata == {"topic": "hello"} and beside.conversation_id is None
        assert not any(event.type.startswith("conversation.") for event in events)
        assert beside.usage.input_tokens < inside.usage.input_tokens, "it knows its own input only"
        assert (await talk.say("Thanks.")).previous_item_id == inside.output[-1].id


# === Items ===


@conversation
async def test_items_are_put_where_they_belong(server):
    async with session(server) as talk:
        second = await talk.say("Two.")
        mine = await talk.add({"id": "item_mine", **user("Three.")})
        assert mine.item.id == "item_mine" and mine.previous_item_id == second.item.id
        system = {"type": "message", "role": "system", "content": [{"type": "input_text", "text": "Zero."}]}
        first = await talk.add(system, previous_item_id="root")
        assert first.item.role == "system" and first.previous_item_id is None
        answer = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "One."}]}
        between = await talk.add(answer, previous_item_id=first.item.id)
        assert between.item.role == "assistant" and between.previous_item_id == first.item.id
        assert (await talk.say("Four.")).previous_item_id == "item_mine"
        assert (await talk.retrieve("item_mine")).content[0].text == "Three."
        assert text_of(await talk.answer())


@conversation
async def test_an_item_is_deleted(server):
    async with session(server) as talk:
        item = (await talk.say("Forget this.")).item
        await talk.connection.conversation.item.delete(item_id=item.id)
        assert (await talk.until("conversation.item.deleted"))[-1].item_id == item.id
        items = talk.connection.conversation.item
        await items.retrieve(item_id=item.id, event_id="event_retrieve")
        await talk.failure("event_retrieve")
        await items.delete(item_id=item.id, event_id="event_delete")
        await talk.failure("event_delete")
        await items.create(item=user("Hi."), previous_item_id=item.id, event_id="event_create")
        await talk.failure("event_create")
        assert (await talk.say("Say hello.")).previous_item_id is None
        assert text_of(await talk.answer())


@conversation
async def test_an_answer_that_was_not_heard_is_truncated(server):
    async with session(server) as talk:
        asked = await talk.say("Tell me a story.")
        [item] = (await talk.answer()).output
        items = talk.connection.conversation.item
        await items.truncate(item_id=item.id, content_index=0, audio_end_ms=0)
        told = (await talk.until("conversation.item.truncated"))[-1]
        assert (told.item_id, told.content_index, told.audio_end_ms) == (item.id, 0, 0)
        left = (await talk.retrieve(item.id)).content
        assert not "".join(part.text or "" for part in left)
        await items.truncate(item_id=asked.item.id, content_index=0, audio_end_ms=0, event_id="event_user")
        await talk.failure("event_user")
        await talk.say("Say hello.")
        assert text_of(await talk.answer())


# === Tools ===


@conversation
async def test_a_call_and_its_result(server):
    async with session(server, {**SETTINGS, **CALLING}) as talk:
        await talk.say("How is the weather in Oslo?")
        first = await talk.answer()
        assert first.status == "completed" and [item.type for item in first.output] == ["function_call"]
        [call] = check_calls(first)
        await talk.connection.response.create(event_id="event_early")
        assert call.call_id in (await talk.failure("event_early")).message, "the call has no output yet"
        output = (await talk.add(result_of(call))).item
        assert (output.type, output.call_id, output.output) == ("function_call_output", call.call_id, '{"sky": "clear"}')
        second = await talk.answer(tool_choice="none", max_output_tokens=16)
        assert text_of(second) and calls_of(second) == []


@conversation
async def test_an_output_of_no_call(server):
    async with session(server) as talk:
        item = {"type": "function_call_output", "call_id": "call_unknown", "output": "1"}
        await talk.connection.conversation.item.create(item=item, event_id="event_output")
        await talk.failure("event_output")


@conversation
async def test_a_voice_agent_speaks_before_it_calls(server):
    async with session(server, {**SETTINGS, **CALLING, "instructions": VOICE_PROMPT}) as talk:
        await talk.say("Wie wird denn das Wetter heute in Oslo?")
        response = await talk.answer()
        assert [item.type for item in response.output] == ["message", "function_call"]
        assert text_of(response)
        [call] = check_calls(response)
        await talk.add(result_of(call))
        assert text_of(await talk.answer(tool_choice="none", max_output_tokens=16))


@conversation
async def test_a_named_tool_is_the_one_that_is_called(server):
    async with session(server, {**SETTINGS, **CALLING}) as talk:
        await talk.say("Hello!")
        response = await talk.answer(tool_choice={"type": "function", "name": "get_time"})
        assert [call.name for call in check_calls(response)] == ["get_time"]


# === Cancelling ===


@conversation
async def test_a_cancelled_answer(server):
    async with session(server, {**SETTINGS, **LONG}) as talk:
        await talk.say("Tell me a very long story about the sea.")
        await talk.begin()
        events = await talk.until("response.output_text.delta")
        await talk.connection.response.cancel()
        events += await talk.until("response.done")
        response = events[-1].response
        assert response.status == "cancelled" and response.id == events[0].response.id
        assert response.status_details.type == "cancelled"
        assert response.status_details.reason == "client_cancelled"
        said = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        assert text_of(response) == said, "what was sent is what is kept"
        [item] = response.output
        assert item.status == "incomplete" and (await talk.retrieve(item.id)).content[0].text == said
        await talk.say("Say hello.")
        assert text_of(await talk.answer(max_output_tokens=16))


@conversation
async def test_nothing_to_cancel(server):
    async with session(server) as talk:
        await talk.connection.response.cancel(event_id="event_cancel")
        await talk.failure("event_cancel")
        await talk.say("Say hello.")
        assert text_of(await talk.answer())


@conversation
async def test_leaving_in_mid_answer_leaves_nothing_behind(server):
    async with session(server, {**SETTINGS, **LONG}) as talk:
        await talk.say("Tell me a very long story about the sea.")
        await talk.begin()
        await talk.until("response.output_text.delta")
    async with session(server) as talk:
        await talk.say("Say hello.")
        assert text_of(await talk.answer())


# === Errors ===


@conversation
async def test_audio_is_not_served_and_the_session_goes_on(server):
    async with session(server) as talk:
        audio = base64.b64encode(b"\0" * 320).decode()
        await talk.connection.input_audio_buffer.append(audio=audio, event_id="event_append")
        assert "audio" in (await talk.failure("event_append")).message.lower()
        await talk.connection.input_audio_buffer.commit(event_id="event_commit")
        await talk.failure("event_commit")
        spoken = {"type": "message", "role": "user", "content": [{"type": "input_audio", "audio": audio}]}
        await talk.connection.conversation.item.create(item=spoken, event_id="event_spoken")
        assert "audio" in (await talk.failure("event_spoken")).message.lower()
        await talk.connection.response.create(response={"output_modalities": ["audio"]}, event_id="event_create")
        assert "audio" in (await talk.failure("event_create")).message.lower()
        await talk.say("Say hello.")
        assert text_of(await talk.answer())


@conversation
async def test_bad_input_is_an_error_and_the_session_goes_on(server):
    async with session(server) as talk:
        for unreadable in ("{", "[]", "{}", '{"type": "response.sing"}'):
            await talk.connection.send_raw(unreadable)
            await talk.failure()
        await talk.connection.send_raw('{"type": "conversation.item.create", "event_id": "event_mine"}')
        await talk.failure("event_mine")
        await talk.say("Say hello.")
        assert text_of(await talk.answer())


@conversation
async def test_a_wrong_key_is_refused_before_the_upgrade(server):
    with pytest.raises(websockets.exceptions.InvalidStatus) as caught:
        async with session(server, api_key="wrong"):
            pass
    assert caught.value.response.status_code == 401


# === Keys for browsers ===


@pytest.fixture(scope="module")
def secret(client):
    secret = client.realtime.client_secrets.create(
        session={**SETTINGS, "instructions": "You are a friendly phone agent."},
        expires_after={"anchor": "created_at", "seconds": 600},
    )
    check_shape(secret)
    return secret


def test_a_client_secret(secret):
    assert secret.value and secret.value not in KEYS.values()
    assert 0 < secret.expires_at - time.time() <= 660
    assert secret.session.type == "realtime" and secret.session.object == "realtime.session"
    assert secret.session.instructions == "You are a friendly phone agent."
    assert secret.session.output_modalities == ["text"]


def test_a_client_secret_without_wishes(client):
    secret = client.realtime.client_secrets.create()
    check_shape(secret)
    assert secret.value and secret.expires_at > time.time() and secret.session.model == MODEL


def test_a_client_secret_for_audio_is_refused(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.realtime.client_secrets.create(session={"type": "realtime", "output_modalities": ["audio"]})
    assert "audio" in caught.value.message.lower()


def test_a_client_secret_makes_no_other(server, secret):
    with server.client(api_key=secret.value) as stranger, pytest.raises(openai.APIStatusError) as caught:
        stranger.realtime.client_secrets.create()
    assert caught.value.status_code in (401, 403)


@conversation
async def test_a_client_secret_opens_its_session(server, secret):
    async with session(server, settings=None, api_key=secret.value) as talk:
        assert talk.heard[0].session.instructions == "You are a friendly phone agent."
        await talk.say("Say hello.")
        assert text_of(await talk.answer())


def knock(server, key):
    """What a browser does, which can set no header."""
    url = server.url.replace("http:", "ws:")
    protocols = ["realtime", f"openai-insecure-api-key.{key}"]
    return websockets.connect(f"{url}/v1/realtime?model={MODEL}", subprotocols=protocols)


@conversation
async def test_a_client_secret_among_the_subprotocols(server, secret):
    async with knock(server, secret.value) as connection:
        assert connection.subprotocol == "realtime", "browsers insist on one of those that they offered"
        created = json.loads(await connection.recv())
        assert created["type"] == "session.created"
        assert created["session"]["instructions"] == "You are a friendly phone agent."
        await connection.send(json.dumps({"type": "conversation.item.create", "item": user("Say hello.")}))
        await connection.send(json.dumps({"type": "response.create"}))
        kinds = []
        while "response.done" not in kinds:
            kinds.append(json.loads(await connection.recv())["type"])
        assert "response.output_text.delta" in kinds and "error" not in kinds


@conversation
async def test_a_wrong_secret_among_the_subprotocols(server):
    with pytest.raises(websockets.exceptions.InvalidStatus) as caught:
        async with knock(server, "ek_wrong"):
            pass
    assert caught.value.response.status_code == 401
