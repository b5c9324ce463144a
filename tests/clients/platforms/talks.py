"""Turns of agents in every dialect that the official SDK speaks, and what a client learns of them."""

import asyncio
import contextlib
import functools
import json
import queue
import uuid
from concurrent.futures import Future

import openai
import pydantic
from conftest import KEY, WEBHOOK_SECRET

PATIENCE = 90
TALKED_WITHIN = 180

VOICE = "You are a friendly phone agent of a shop."
ENDS = ("response.completed", "response.incomplete", "response.failed")

ORDER_STATUS = {
    "name": "order_status",
    "description": "Tells where an order is.",
    "parameters": {
        "type": "object",
        "properties": {"order": {"enum": ["A", "B"]}},
        "required": ["order"],
        "additionalProperties": False,
    },
}

# Enough for a call. What the model says in the end may be cut off.
BRIEF = {"max_output_tokens": 34, "temperature": 0, "parallel_tool_calls": False}


def conversation(test):
    """Runs a test that is a coroutine. WebSocket clients wait for ever, so this is the limit of their patience."""

    @functools.wraps(test)
    def run(*args, **options):
        async def converse():
            async with asyncio.timeout(TALKED_WITHIN):
                await test(*args, **options)

        asyncio.run(converse())

    return run


def check_shape(received):
    """The SDK builds whatever comes, and puts None where a field is missing. This checks it against its types."""
    try:
        type(received).model_validate(received.to_dict(warnings=False))
    except pydantic.ValidationError as error:
        faults = {fault["loc"]: fault for fault in error.errors()}
        # Of a union every variant is listed, most of which the value was never meant to be.
        others = {loc[:-1] for loc in faults if loc[-1] in ("type", "role") and faults[loc]["type"] == "literal_error"}
        told = [loc for loc in faults if not any(loc[:n] in others for n in range(1, len(loc)))]
        rows = [f"{'.'.join(map(str, loc))}: {faults[loc]['msg']}" for loc in told or faults]
        raise AssertionError("\n".join([f"no {type(received).__name__}:", *rows])) from None
    return received


# === agents ===


# Lets clients bring tools, and has the model say a word after one call.
HOST = f'[agents.host]\ninstructions = "{VOICE}"\nmax_tool_rounds = 1\n'


def agent(name, url, callback="", **settings):
    """The settings of an agent that has to ask for an order's status, at this URL, before it may say a word."""
    chosen = {"max_tokens": 34, "parallel_tool_calls": False, **settings}
    more = "".join(f"{key} = {json.dumps(value)}\n" for key, value in chosen.items())
    schema = "{ type = 'object', properties = { order = { enum = ['A', 'B'] } }, "
    return (
        f'[agents.{name}]\ninstructions = "{VOICE}"\ntool_choice = "order_status"\nmax_tool_rounds = 1\n'
        f"temperature = 0.0\n{more}"
        f'[[agents.{name}.tools]]\nname = "order_status"\ndescription = "Tells where an order is."\n'
        f"parameters = {schema}required = ['order'], additionalProperties = false }}\n"
        f'callback = {{ url = "{url}", secret = "{WEBHOOK_SECRET}"{callback} }}\n'
    )


def user(text):
    return {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}


def example(text, *calls, tool="order_status", words="Shipped."):
    """An exchange in which these calls were made at once. The small model does as it did before."""
    called = [
        {"type": "function_call", "call_id": f"call_{uuid.uuid4().hex}", "name": tool, "arguments": json.dumps(call)}
        for call in calls
    ]
    answered = [{"type": "function_call_output", "call_id": call["call_id"], "output": "shipped"} for call in called]
    said = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": words}]}
    return [user(text), *called, *answered, said]


class Held:
    """An answer of the bot that the test gives, while the gateway waits for it."""

    def __init__(self):
        self.asked = queue.Queue()

    def __call__(self, request):
        answer = Future()
        self.asked.put((request, answer))
        return answer.result(PATIENCE)

    async def next(self):
        """The next request, and where its answer goes."""
        return await asyncio.to_thread(self.asked.get, timeout=PATIENCE)


def result(value, status=200):
    return status, "application/json", json.dumps(value).encode()


LATER = (202, "application/json", b"")


# === what a client learns ===


def calls_of(items):
    return [item for item in items if item["type"] == "mcp_call"]


def words_of(items):
    """What was said behind the last call."""
    last = max((at for at, item in enumerate(items) if item["type"] == "mcp_call"), default=-1)
    said = [item for item in items[last + 1 :] if item["type"] == "message" and item.get("phase") != "commentary"]
    return " ".join(part["text"] for item in said for part in item["content"]).strip()


def only_call(items):
    [call] = calls_of(items)
    return call


def check_outcome(call):
    """One outcome: a result, or why there is none."""
    assert call["status"] in ("completed", "failed"), call
    assert (call["output"] is None) != (call["error"] is None), call
    assert (call["status"] == "failed") == (call["error"] is not None), call


# === clients ===


def sdk(gateway, agent=None, by_path=False, asynchronous=False):
    """The SDK's client, with the model that it asks for."""
    base = f"{gateway.url}/agents/{agent}/v1" if by_path else f"{gateway.url}/v1"
    make = openai.AsyncOpenAI if asynchronous else openai.OpenAI
    client = make(base_url=base, api_key=KEY, max_retries=0, timeout=PATIENCE)
    return client, f"electron:{agent}" if agent and not by_path else "electron"


def chat(gateway, agent, text, by_path=False, stream=False, **metadata):
    """What is said in a turn over Chat Completions. Of the agent's own calls it tells nothing."""
    client, model = sdk(gateway, agent, by_path)
    options = {"model": model, "messages": [{"role": "user", "content": text}], "metadata": metadata}
    with client:
        if stream:
            chunks = [check_shape(chunk) for chunk in client.chat.completions.create(stream=True, **options)]
            deltas = [chunk.choices[0].delta for chunk in chunks]
            assert not any(delta.tool_calls for delta in deltas)
            assert chunks[-1].choices[0].finish_reason in ("stop", "length")
            return "".join(delta.content or "" for delta in deltas)
        choice = check_shape(client.chat.completions.create(**options)).choices[0]
    assert choice.finish_reason in ("stop", "length") and not choice.message.tool_calls
    return choice.message.content


def ask(gateway, agent, text, by_path=False, stream=False, **metadata):
    """The items of a turn over Responses."""
    client, model = sdk(gateway, agent, by_path)
    with client:
        options = {"model": model, "input": text, "metadata": metadata}
        if stream:
            return check_story(list(client.responses.create(stream=True, **options)))
        response = check_shape(client.responses.create(**options))
    return response.to_dict()["output"]


class Line:
    """A WebSocket connection of the Responses API, and all that was heard on it."""

    def __init__(self, connection, model):
        self.connection = connection
        self.model = model
        self.heard = []

    async def ask(self, text=None, **options):
        """Begins a response."""
        given = {} if text is None else {"input": text}
        await self.connection.response.create(model=self.model, **given, **options)

    async def next(self):
        event = check_shape(await self.connection.recv())
        self.heard.append(event)
        return event

    async def until(self, *kinds):
        """The events up to one of these kinds."""
        events = []
        while not events or events[-1].type not in kinds:
            events.append(await self.next())
            assert "error" in kinds or events[-1].type != "error", events[-1]
        return events

    async def answer(self, text=None, **options):
        """The response, as a dictionary."""
        await self.ask(text, **options)
        events = await self.until(*ENDS)
        check_story(events)
        return events[-1].response.to_dict()


@contextlib.asynccontextmanager
async def line(gateway, agent=None, by_path=False):
    client, model = sdk(gateway, agent, by_path, asynchronous=True)
    async with client, client.responses.connect() as connection:
        yield Line(connection, model)


class Talk:
    """A connection of the Realtime API, and all that was heard on it."""

    def __init__(self, connection):
        self.connection = connection
        self.heard = []
        self.session = None

    async def next(self):
        event = check_shape(await self.connection.recv())
        self.heard.append(event)
        return event

    async def until(self, *kinds):
        """The events up to one of these kinds."""
        events = []
        while not events or events[-1].type not in kinds:
            events.append(await self.next())
            assert "error" in kinds or events[-1].type != "error", events[-1]
        return events

    async def set(self, **settings):
        await self.connection.session.update(session={"type": "realtime", **settings})
        return (await self.until("session.updated"))[-1].session

    async def add(self, *items):
        for item in items:
            await self.connection.conversation.item.create(item=item)
            await self.until("conversation.item.done")

    async def ask(self, text, **options):
        """Says something and begins a response."""
        await self.add(user(text))
        await self.connection.response.create(response=options)

    async def answer(self, text, **options):
        """The response, as a dictionary."""
        await self.ask(text, **options)
        return (await self.until("response.done"))[-1].response.to_dict()


@contextlib.asynccontextmanager
async def talk(gateway, agent=None, by_path=False, **query):
    client, model = sdk(gateway, agent, by_path, asynchronous=True)
    async with client, client.realtime.connect(model=model, extra_query=query) as connection:
        talk = Talk(connection)
        talk.session = (await talk.until("session.created"))[-1].session
        yield talk


def ask_on_line(gateway, agent, text, by_path=False, **metadata):
    """The items of a turn over the Responses API's WebSocket."""

    async def converse():
        async with asyncio.timeout(TALKED_WITHIN), line(gateway, agent, by_path) as asked:
            return (await asked.answer(text, metadata=metadata))["output"]

    return asyncio.run(converse())


def ask_in_talk(gateway, agent, text, by_path=False, **query):
    """The items of a turn over the Realtime API."""

    async def converse():
        async with asyncio.timeout(TALKED_WITHIN), talk(gateway, agent, by_path, **query) as talked:
            return (await talked.answer(text))["output"]

    return asyncio.run(converse())


# === stories ===


def check_story(events):
    """The events of one response tell one story, which ends with the response that they made up. Gives its items."""
    for event in events:
        check_shape(event)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    first, second, *body, last = events
    assert (first.type, second.type) == ("response.created", "response.in_progress")
    assert last.type == f"response.{last.response.status}", last
    items = last.response.to_dict()["output"]
    for index, item in enumerate(items):
        mine = [event for event in body if event.output_index == index]
        kinds = [event.type.removeprefix("response.") for event in mine]
        assert (kinds[0], kinds[-1]) == ("output_item.added", "output_item.done"), kinds
        assert mine[-1].item.to_dict() == item and mine[0].item.id == item["id"]
        assert all(event.item_id == item["id"] for event in mine[1:-1])
        check_middle(item, [(event.type.removeprefix("response."), event.to_dict()) for event in mine[1:-1]])
    assert sum(event.output_index < len(items) for event in body) == len(body), "all belongs to the response's items"
    return items


def check_middle(item, told):
    """The events between an item's beginning and its end."""
    kinds = [kind for kind, _ in told]
    pieces = "".join(event["delta"] for kind, event in told if kind.endswith(".delta"))
    if item["type"] == "mcp_call":
        expected = ["mcp_call_arguments.delta"] * kinds.count("mcp_call_arguments.delta")
        if item["status"] != "incomplete":
            end = {"completed": "mcp_call.completed", "failed": "mcp_call.failed"}[item["status"]]
            expected += ["mcp_call_arguments.done", "mcp_call.in_progress", end]
            assert pieces == item["arguments"] == told[-3][1]["arguments"]
        assert kinds == expected
    elif item["type"] == "mcp_list_tools":
        end = "failed" if item.get("error") else "completed"
        assert kinds == ["mcp_list_tools.in_progress", f"mcp_list_tools.{end}"]
    elif item["type"] == "mcp_approval_request":
        assert kinds == []
    elif item["type"] == "message":
        assert pieces == item["content"][0]["text"]
