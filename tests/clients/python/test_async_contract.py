"""Every event of the two WebSocket protocols, sent and received, held against the served contract."""

import contextlib
import json
import re

import httpx
import pytest
import websockets
import yaml
from cases import FLAT_TOOLS, MODEL, VOICE_PROMPT
from conftest import KEYS, conversation
from contract import Contracts

ENDS = ("response.completed", "response.incomplete", "response.failed")

# A model that runs in this process does not fail at will.
UNSEEN = {("responses", "response.failed")}

LONG = "Tell me a very long story about the sea."

CALLING = {"tools": FLAT_TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "max_output_tokens": 64}


class Protocols:
    """The contract, and which of its events were seen."""

    def __init__(self, documents):
        self.contracts = Contracts(documents)
        self.document = documents["asyncapi.yaml"]
        # By channel, and by what the server does.
        self.listed = {}
        for operation in self.document["operations"].values():
            channel = operation["channel"]["$ref"].rpartition("/")[2]
            kinds = {message["$ref"].rpartition("/")[2] for message in operation["messages"]}
            self.listed[channel, operation["action"]] = kinds
        self.seen = set()
        self.tests = set()

    def channel(self, path):
        channels = self.document["channels"].items()
        return next(name for name, channel in channels if channel["address"] == path)

    def check(self, channel, action, event):
        kind = event["type"]
        assert kind in self.listed[channel, action], f"the contract does not list {kind}"
        self.contracts.check(event, f"asyncapi.yaml#/channels/{channel}/messages/{kind}/payload")
        self.seen.add((channel, kind))


class Line:
    """A connection."""

    def __init__(self, connection, protocols, channel):
        self.connection = connection
        self.protocols = protocols
        self.channel = channel

    async def send(self, kind, **fields):
        event = {"type": kind, **fields}
        self.protocols.check(self.channel, "receive", event)
        await self.connection.send(json.dumps(event))

    async def send_wrong(self, event):
        """Sends what neither the contract nor the server allows. Gives the error."""
        with pytest.raises(AssertionError):
            self.protocols.check(self.channel, "receive", event)
        await self.connection.send(json.dumps(event))
        return await self.error()

    async def next(self, kind=None):
        frame = await self.connection.recv()
        assert isinstance(frame, str)
        event = json.loads(frame)
        self.protocols.check(self.channel, "send", event)
        assert kind in (None, event["type"]), event
        return event

    async def until(self, *kinds):
        """The events up to one of these kinds."""
        events = [await self.next()]
        while events[-1]["type"] not in kinds:
            assert events[-1]["type"] != "error", events[-1]
            events.append(await self.next())
        return events

    async def error(self, code=None):
        error = (await self.next("error"))["error"]
        assert code is None or error["code"] == code, error
        return error

    async def is_closed(self, code):
        """It is closed with this code, of which the contract says what it means."""
        with pytest.raises(websockets.ConnectionClosed) as caught:
            while True:
                await self.next()
        assert caught.value.rcvd.code == code
        assert f"| {code} |" in self.protocols.document["info"]["description"]

    # --- Responses ---

    async def create(self, given, **fields):
        await self.send("response.create", **{"model": MODEL, "input": given, "max_output_tokens": 16, **fields})

    async def turn(self, given, **fields):
        """Asks for a response. Gives it."""
        await self.create(given, **fields)
        return (await self.until(*ENDS))[-1]["response"]

    # --- Realtime ---

    async def say(self, text, **fields):
        await self.add({"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}, **fields)

    async def add(self, item, **fields):
        await self.send("conversation.item.create", item=item, **fields)
        await self.next("conversation.item.added")
        await self.next("conversation.item.done")

    async def set(self, **settings):
        await self.send("session.update", session=settings)
        return (await self.next("session.updated"))["session"]

    async def answer(self, **settings):
        await self.send("response.create", response=settings)
        return (await self.until("response.done"))[-1]["response"]


@pytest.fixture(scope="session")
def protocols(server):
    documents = {}
    for name in ("openapi.yaml", "asyncapi.yaml"):
        answer = httpx.get(f"{server.url}/{name}")
        assert answer.status_code == 200, f"{name} is not served"
        documents[name] = yaml.safe_load(answer.text)
    return Protocols(documents)


@pytest.fixture(autouse=True)
def noted(request, protocols):
    protocols.tests.add(request.function.__name__)


@pytest.fixture
def connect(server, protocols):
    """Opens a connection."""

    @contextlib.asynccontextmanager
    async def open_line(path, query="", key="normal"):
        url = f"{server.url.replace('http:', 'ws:')}{path}{query}"
        headers = {"Authorization": f"Bearer {KEYS[key]}"}
        async with websockets.connect(url, additional_headers=headers) as connection:
            assert connection.response.headers["X-Request-Id"]
            yield Line(connection, protocols, protocols.channel(path))

    return open_line


@pytest.fixture
def responses(connect):
    return lambda **options: connect("/v1/responses", **options)


@pytest.fixture
def realtime(connect):
    @contextlib.asynccontextmanager
    async def open_session(query="", **settings):
        async with connect("/v1/realtime", query) as line:
            line.session = await line.next("session.created")
            if not query:
                await line.set(**{"max_output_tokens": 16, **settings})
            yield line

    return open_session


def said(events):
    return "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")


def forced(name):
    return {"tool_choice": {"type": "function", "name": name}, "parallel_tool_calls": False, "max_output_tokens": 64}


def mcp_server(server, label="bot", path="/mcp", **fields):
    return {"type": "mcp", "server_label": label, "server_url": server.bot + path, **fields}


def callback(server):
    parameters = {"type": "object", "properties": {}, "additionalProperties": False}
    return {"type": "function", "name": "ask", "parameters": parameters, "callback": {"url": f"{server.bot}/callback"}}


def letters(text):
    return "".join(letter for letter in text if letter.isalnum())


def outputs_of(response):
    calls = [item for item in response["output"] if item["type"] == "function_call"]
    assert calls
    return [{"type": "function_call_output", "call_id": call["call_id"], "output": "Rain."} for call in calls]


def context_length(error):
    assert error["code"] == "context_length_exceeded"
    return int(re.search(r"\d+", error["message"])[0])


def exchange(words):
    return [{"role": "user", "content": words}, {"role": "assistant", "content": "Yes."}]


# === Responses ===


@pytest.mark.parametrize("path", ["/v1/responses", "/waves/v1/responses"])
@conversation
async def test_a_turn_and_one_that_continues_it(connect, path):
    async with connect(path, f"?model={MODEL}") as line:
        first = await line.turn("Say hello.", store=False)
        items = [{"role": "user", "content": [{"type": "input_text", "text": "Again."}]}]
        again = await line.turn(items, previous_response_id=first["id"], metadata={"turn": "2"}, model=None)
        assert again["previous_response_id"] == first["id"]


@conversation
async def test_a_call_and_its_output(responses):
    async with responses() as line:
        first = await line.turn("How is the weather in Oslo?", instructions=VOICE_PROMPT, **CALLING)
        assert [item["type"] for item in first["output"]] == ["message", "function_call"]
        second = await line.turn(outputs_of(first), previous_response_id=first["id"], stream_id="other")
        assert second["output"][0]["type"] == "message"


@conversation
async def test_settings_of_many_kinds(responses):
    form = {"type": "json_schema", "name": "a", "schema": {"type": "object", "properties": {"ok": {"type": "boolean"}}}}
    async with responses() as line:
        include = ["message.output_text.logprobs"]
        await line.turn("Say hello.", include=include, top_logprobs=2, temperature=0.5, parallel_tool_calls=True)
        await line.turn("Is it late?", text={"format": form}, truncation="disabled", top_p=0.5, seed=1)
        await line.turn("Say hello.", tools=FLAT_TOOLS, tool_choice="none")
        warm = await line.turn([], instructions="You are a phone agent.", generate=False)
        assert warm["output"] == []


@conversation
async def test_a_cancelled_response_keeps_what_was_heard(responses):
    async with responses() as line:
        await line.create(LONG, max_output_tokens=2000)
        events = await line.until("response.output_text.delta")
        response = events[0]["response"]["id"]
        heard = events[-1]["delta"]
        await line.send("response.cancel", response_id=response, heard=heard)
        ended = (await line.until(*ENDS))[-1]["response"]
        assert ended["incomplete_details"] == {"reason": "cancelled"}
        truncated = await line.next("response.truncated")
        assert letters(truncated["item"]["content"][0]["text"]) == letters(heard)
        await line.turn("Go on.", previous_response_id=response)


@conversation
async def test_a_response_is_truncated_when_it_is_over(responses):
    async with responses() as line:
        response = await line.turn("Say hello.", stream_id="lane")
        await line.send("response.truncate", response_id=response["id"], text="", stream_id="lane")
        truncated = await line.next("response.truncated")
        assert (truncated["stream_id"], truncated["item"]["content"][0]["text"]) == ("lane", "")
        # What is over needs no cancelling, and gets no answer but what was heard.
        response = await line.turn("Say hello.", stream_id="lane")
        await line.send("response.cancel", response_id=response["id"], heard="")
        await line.next("response.truncated")
        await line.send("response.cancel", response_id=response["id"])
        await line.create("Say hello.")
        await line.next("response.created")
        await line.until(*ENDS)


@conversation
async def test_lanes(responses):
    async with responses() as line:
        for lane in ("left", "left", "right"):
            await line.create("Say hello.", stream_id=lane, max_output_tokens=4)
        ended = []
        while len(ended) < 3:
            ended.append((await line.until(*ENDS))[-1]["stream_id"])
        assert sorted(ended) == ["left", "left", "right"]
        await line.create(LONG, max_output_tokens=2000)
        await line.until("response.output_text.delta")
        await line.create("Say hello.")
        events = [await line.next()]
        while events[-1]["type"] != "error":
            events.append(await line.next())
        assert events[-1]["code"] == "conversation_already_has_active_response"
        await line.send("response.cancel")
        await line.until("response.incomplete")


@conversation
async def test_one_request_too_many(responses):
    async with responses(key="single") as line:
        await line.create(LONG, max_output_tokens=2000, stream_id="left")
        await line.until("response.created")
        await line.create("Say hello.", stream_id="right")
        event = await line.next()
        while event["type"] != "error":
            event = await line.next()
        assert (event["status"], event["stream_id"]) == (429, "right")
        assert int(event["error"]["headers"]["retry-after"]) >= 1
        await line.send("response.cancel", stream_id="left")
        await line.until("response.incomplete")


@conversation
async def test_what_is_refused(responses):
    async with responses() as line:
        await line.create("Say hello.", previous_response_id="resp_unknown")
        await line.error("previous_response_not_found")
        await line.send_wrong({"type": "response.create", "model": MODEL, "temperature": 9, "stream_id": "lane"})
        await line.send_wrong({"type": "response.create", "model": MODEL, "input": [{"role": "robot", "content": ""}]})
        await line.send_wrong({"type": "response.create", "model": MODEL, "tool_choice": "required"})
        await line.send_wrong({"type": "response.truncate", "text": ""})
        await line.send_wrong({"type": "response.sing"})
        for frame in ("{", b"{}"):
            await line.connection.send(frame)
            await line.error()
        await line.send("response.truncate", response_id="resp_unknown", text="")
        await line.error()
        await line.send("response.steer", previous_response_id="resp_unknown", input="Faster.", stream_id="lane")
        await line.next("response.steer.failed")


@conversation
async def test_tools_that_the_server_runs(server, responses):
    async with responses() as line:
        free = mcp_server(server, require_approval="never")
        for name, status in (("clock", "completed"), ("broken", "failed")):
            response = await line.turn("What time is it?", tools=[free, callback(server)], **forced(name))
            # The model may call again by itself.
            call, *_ = [item for item in response["output"] if item["type"] == "mcp_call"]
            assert (call["status"], call["server_label"]) == (status, "bot")
            assert (call["error"] is None) == (status == "completed")
        response = await line.turn("What time is it?", tools=[free, callback(server)], **forced("ask"))
        call, *_ = [item for item in response["output"] if item["type"] == "mcp_call"]
        assert (json.loads(call["output"]), call["server_label"]) == ({"time": "14:05"}, "callbacks")
        response = await line.turn("Say hello.", tools=[mcp_server(server, "gone", "/gone")], max_output_tokens=4)
        assert response["output"][0]["error"]


@conversation
async def test_a_call_that_has_to_be_approved(server, responses):
    async with responses() as line:
        tools = [mcp_server(server)]
        asked = await line.turn("What time is it?", tools=tools, **forced("clock"))
        request = asked["output"][-1]
        assert request["type"] == "mcp_approval_request"
        for approve in (False, True):
            word = {"type": "mcp_approval_response", "approval_request_id": request["id"], "approve": approve}
            response = await line.turn([word], tools=tools, previous_response_id=asked["id"])
            calls = [item for item in response["output"] if item["type"] == "mcp_call"]
            assert [call["approval_request_id"] for call in calls] == [request["id"]] * approve


@conversation
async def test_old_exchanges_make_room(responses):
    async with responses() as line:
        await line.create("Hi.", max_output_tokens=1_000_000)
        context = context_length(await line.error())
        items = [*exchange("red " * 100), {"role": "user", "content": "Say hello."}]
        await line.create(items, max_output_tokens=context - 100, stream_id="lane")
        events = await line.until("conversation.trimmed")
        assert len(events[-1]["item_ids"]) == 2
        await line.send("response.cancel", stream_id="lane")
        await line.until(*ENDS)


# === Realtime ===


@conversation
async def test_a_session(realtime):
    async with realtime() as line:
        await line.set(instructions="Be brief.", tools=FLAT_TOOLS, tool_choice="none", metadata={"a": "b"})
        await line.say("Say hello.", event_id="mine")
        response = await line.answer(max_output_tokens=8, tools=[])
        [item] = response["output"]
        await line.send("conversation.item.retrieve", item_id=item["id"])
        assert (await line.next("conversation.item.retrieved"))["item"] == item
        await line.send("conversation.item.delete", item_id=item["id"])
        await line.next("conversation.item.deleted")
        await line.add({"role": "system", "content": "Be kind."}, previous_item_id="root")
        await line.add({"role": "assistant", "content": "One.", "phase": "commentary", "id": "item_mine"})
        await line.send("response.create")
        await line.until("response.done")


@conversation
async def test_a_call_in_a_session(realtime):
    async with realtime(instructions=VOICE_PROMPT, **CALLING) as line:
        await line.say("How is the weather in Oslo?")
        response = await line.answer()
        assert [item["type"] for item in response["output"]] == ["message", "function_call"]
        await line.send("response.create", event_id="early")
        assert (await line.error("missing_function_call_outputs"))["event_id"] == "early"
        for output in outputs_of(response):
            await line.add(output)
        await line.answer(tool_choice="none", max_output_tokens=16)


@conversation
async def test_tools_that_the_server_runs_in_a_session(server, realtime):
    async with realtime() as line:
        free = mcp_server(server, require_approval="never")
        for tools, end in (([free, callback(server)], "completed"), ([mcp_server(server, "gone", "/gone")], "failed")):
            await line.send("session.update", session={"tools": tools})
            await line.until(f"mcp_list_tools.{end}")
            await line.next("conversation.item.done")
        await line.say("What time is it?")
        for name, status in (("clock", "completed"), ("broken", "failed"), ("ask", "completed")):
            response = await line.answer(tools=[free, callback(server)], **forced(name))
            # The model may call again by itself.
            call, *_ = [item for item in response["output"] if item["type"] == "mcp_call"]
            assert (call["name"], call["status"]) == (name, status)


@conversation
async def test_what_the_caller_heard(realtime):
    async with realtime() as line:
        await line.say(LONG)
        await line.send("input_transcript.partial", text="Tell me")
        await line.send("response.create", response={"max_output_tokens": 2000})
        heard = (await line.until("response.output_text.delta"))[-1]["delta"]
        await line.send("response.cancel", heard=heard)
        response = (await line.until("response.done"))[-1]["response"]
        assert response["status"] == "cancelled"
        truncated = await line.next("conversation.item.truncated")
        assert letters(truncated["text"]) == letters(heard)
        for how in ({"audio_end_ms": 10, "content_index": 0}, {"text": ""}):
            await line.send("conversation.item.truncate", item_id=response["output"][0]["id"], **how)
            assert (await line.next("conversation.item.truncated"))["text"] == ""
        await line.send("response.cancel", event_id="late")
        assert (await line.error("response_cancel_not_active"))["event_id"] == "late"


@conversation
async def test_a_response_beside_the_conversation(realtime):
    async with realtime() as line:
        await line.say("My name is Ada.")
        await line.send("conversation.item.create", item={"id": "mine", "role": "user", "content": "Say hello."})
        await line.until("conversation.item.done")
        given = [{"type": "item_reference", "id": "mine"}, {"role": "user", "content": "Now."}]
        response = await line.answer(conversation="none", input=given, metadata={"purpose": "test"})
        assert response["conversation_id"] is None


@conversation
async def test_what_a_session_refuses(realtime):
    async with realtime() as line:
        for event in (
            {"type": "session.update", "session": {"voice": "alloy"}},
            {"type": "session.update", "session": {"output_modalities": ["audio"]}},
            {"type": "session.update"},
            {"type": "conversation.item.create", "item": {"type": "item_reference", "id": "mine"}},
            {"type": "conversation.item.truncate", "item_id": "mine"},
            {"type": "response.create", "response": {"max_output_tokens": 0}},
            {"type": "input_audio_buffer.commit"},
            {"type": "session.sing"},
        ):
            error = await line.send_wrong({**event, "event_id": "wrong"})
            assert error["event_id"] == "wrong"
        await line.connection.send("{")
        assert (await line.error())["event_id"] is None
        await line.send("conversation.item.delete", item_id="unknown")
        await line.error()


@conversation
async def test_old_exchanges_of_a_session_make_room(realtime):
    async with realtime() as line:
        for item in exchange("red " * 100):
            await line.add(item)
        await line.say("Say hello.")
        await line.send("response.create", response={"max_output_tokens": 1_000_000})
        context = context_length(await line.error())
        await line.send("response.create", response={"max_output_tokens": context - 100})
        assert len((await line.until("conversation.trimmed"))[-1]["item_ids"]) == 2
        await line.send("response.cancel")
        await line.until("response.done")


@conversation
async def test_a_session_goes_on_after_its_connection(realtime):
    async with realtime() as line:
        session = line.session["session"]["id"]
        assert "resumed" not in line.session
        await line.say("Say hello.")
        await line.send("response.create")
        seen = await line.until("response.output_text.delta")
        line.connection.transport.abort()
    async with realtime(f"?session_id={session}&last_event_id={seen[-1]['event_id']}") as line:
        assert (line.session["resumed"], line.session["events_lost"]) == (True, False)
        seen += await line.until("response.done")
        [item] = seen[-1]["response"]["output"]
        assert said(seen) == item["content"][0]["text"]
        async with realtime(f"?session_id={session}") as other:
            await line.is_closed(4409)
            await other.say("Thanks.")


# === The beginning and the end of a connection ===


@pytest.mark.parametrize(
    ("query", "key", "status"),
    [
        ("?model=unknown", "normal", 400),
        ("?last_event_id=event_1_0", "normal", 400),
        ("?session_id=sess_unknown", "normal", 404),
        ("", "elsewhere", 403),
    ],
)
@conversation
async def test_what_is_refused_before_the_upgrade(connect, protocols, query, key, status):
    with pytest.raises(websockets.InvalidStatus) as caught:
        async with connect("/v1/realtime", query, key):
            pass
    refused = caught.value.response
    assert refused.status_code == status
    protocols.contracts.check(json.loads(refused.body), "openapi.yaml#/components/schemas/Error")


@conversation
async def test_a_session_that_is_deleted(server, realtime):
    async with realtime() as line:
        url = f"{server.url}/v1/sessions/{line.session['session']['id']}"
        async with httpx.AsyncClient(headers={"Authorization": f"Bearer {KEYS['normal']}"}) as client:
            assert (await client.delete(url)).status_code == 200
        await line.is_closed(1000)


@conversation
async def test_a_connection_whose_session_is_deleted(server, responses):
    async with responses() as line, httpx.AsyncClient(
        base_url=server.url, headers={"Authorization": f"Bearer {KEYS['normal']}"}
    ) as client:
        response = await line.turn("Say hello.", max_output_tokens=4)
        sessions = (await client.get("/v1/sessions")).json()["data"]
        session = [one["id"] for one in sessions if one["dialect"] == "responses" and one["connected"]][-1]
        assert (await client.delete(f"/v1/sessions/{session}")).status_code == 200
        await line.turn("Again.", previous_response_id=response["id"], max_output_tokens=4)


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/realtime"])
@conversation
async def test_what_closes_a_connection(connect, path):
    async with connect(path) as line:
        # A frame of a kind that does not exist.
        line.connection.transport.write(b"\x83\x80\0\0\0\0")
        await line.is_closed(1002)
    async with connect(path) as line:
        await line.connection.send(b"\xff", text=True)
        await line.is_closed(1007)
    async with connect(path) as line:
        await line.connection.send(" " * (256 * 1024 + 1))
        await line.is_closed(1009)


# === The document itself ===


def kind_of(event):
    """Each platform has a field of its own for it."""
    return next(event[field] for field in ("type", "interaction_type", "response_type") if field in event)


def test_its_examples_are_events(protocols):
    checked = 0
    for (channel, action), kinds in protocols.listed.items():
        messages = protocols.document["channels"][channel]["messages"]
        for kind in kinds:
            for example in messages[kind].get("examples", []):
                assert kind_of(example["payload"]) == messages[kind]["name"]
                protocols.contracts.check(
                    example["payload"], f"asyncapi.yaml#/channels/{channel}/messages/{kind}/payload"
                )
                checked += 1
    assert checked > 30


def test_every_message_is_listed_once(protocols):
    for name, channel in protocols.document["channels"].items():
        sent, received = protocols.listed[name, "send"], protocols.listed[name, "receive"]
        assert not sent & received
        assert sent | received == set(channel["messages"])


def test_every_event_was_seen(protocols):
    """In the tests above, so that nothing is listed that does not exist."""
    others = {name for name in globals() if name.startswith("test_")} - {"test_every_event_was_seen"}
    if not others <= protocols.tests:
        pytest.skip("needs the other tests of this file")
    for (channel, _), kinds in protocols.listed.items():
        # Others have the same events, or are for the suite `platforms`.
        if channel in ("responses", "realtime"):
            assert {kind for kind in kinds if (channel, kind) not in protocols.seen | UNSEEN} == set()
