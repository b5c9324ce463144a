"""Many callers at once whose connections break, and a bot that answers as it likes. Nothing of it may be lost."""

import asyncio
import collections
import contextlib
import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import httpx
import websockets
from conftest import KEY
from talks import ENDS, LATER, PATIENCE, VOICE, calls_of, example, result, user

TIMEOUT = 3

AGENT = f"""
[agents.many]
instructions = "{VOICE}"
tool_choice = "find"
max_tool_rounds = 1
max_tokens = 128
temperature = 0.0
[[agents.many.tools]]
name = "find"
callback = {{ url = "URL", timeout = "{TIMEOUT}s" }}
"""

HEADERS = {"authorization": f"Bearer {KEY}"}
MODEL = "electron:many"
TEXT = "Find it."
# An answer of one token, where the API can ask for it.
SHORT = {"format": {"type": "json_schema", "name": "short", "schema": {"type": "integer", "enum": [1]}}}

AT_ONCE, POSTED = {"found": "at once"}, {"found": "later"}


# === the bot ===


@dataclass
class Record:
    """A call as the bot knows it."""

    way: str
    session: str
    posts: list = field(default_factory=list)
    asked: int = 1


class Moods:
    """Answers the gateway in one of several ways, drawn by chance."""

    WAYS = {"at once": 4, "later": 4, "first": 2, "twice": 3, "too late": 2, "drops": 2, "fails": 3}

    def __init__(self, gateway, seed):
        self.gateway = gateway
        self.random = random.Random(seed)
        self.lock = threading.Lock()
        self.calls = {}
        self.posting = ThreadPoolExecutor(32)

    def __call__(self, request):
        call = request.call
        with self.lock:
            if call["call_id"] in self.calls:
                self.calls[call["call_id"]].asked += 1
                return None
            [way] = self.random.choices(list(self.WAYS), self.WAYS.values())
            pause = self.random.uniform(0, 0.8)
            record = self.calls[call["call_id"]] = Record(way, call["session"])
        if way == "first":
            self.post(call, record, 0)
        elif way in ("later", "twice", "too late"):
            pause = {"later": pause, "twice": pause / 100, "too late": TIMEOUT + 0.5 + pause}[way]
            self.posting.submit(self.post, call, record, pause)
        return {
            "at once": result(AT_ONCE), "twice": result(AT_ONCE), "first": result(AT_ONCE),
            "later": LATER, "too late": LATER, "drops": None, "fails": (500, "text/plain", b""),
        }[way]  # fmt: skip

    def post(self, call, record, pause):
        time.sleep(pause)
        headers = {"authorization": f"Bearer {call['output_token']}"}
        answer = httpx.post(call["output_url"], headers=headers, json=POSTED, timeout=PATIENCE)
        record.posts.append(answer.status_code)

    def close(self):
        """Waits for all that is to be posted."""
        self.posting.shutdown()


# === the callers ===


@dataclass
class Seen:
    """What callers were told of calls."""

    wanted: int
    # By item: as it was announced, how often its end was told, and as what it ended.
    announced: dict = field(default_factory=dict)
    ends: collections.Counter = field(default_factory=collections.Counter)
    done: dict = field(default_factory=dict)
    sessions: set = field(default_factory=set)
    responses: set = field(default_factory=set)
    did: collections.Counter = field(default_factory=collections.Counter)

    def enough(self):
        return len(self.announced) >= self.wanted

    def note(self, event):
        kind, item = event["type"], event.get("item") or {}
        if kind == "response.output_item.added" and item["type"] == "mcp_call":
            self.announced[item["id"]] = item
        elif kind in ("response.mcp_call.completed", "response.mcp_call.failed"):
            self.ends[event["item_id"]] += 1
        elif kind == "response.output_item.done" and item["type"] == "mcp_call":
            self.done[item["id"]] = item
        elif kind == "response.created":
            self.responses.add(event["response"]["id"])


class Cut(Exception):
    """The caller's connection breaks."""


class Vanished(Exception):
    """It breaks, and the caller does not come back."""


class Caller:
    """Makes turns until there were enough. What it does in each is drawn by chance."""

    def __init__(self, gateway, seen, seed, most):
        self.gateway, self.seen = gateway, seen
        self.random = random.Random(seed)
        self.calls = self.random.randint(1, most)
        self.history = example(TEXT, *[{}] * self.calls, tool="find")

    def draw(self, *plans):
        plan = self.random.choice(plans)
        self.seen.did[f"{type(self).__name__.lower()}: {plan}"] += 1
        # The event after which it happens: in what is said first, in the arguments, while tools run, in the answer.
        return plan, self.random.randrange(1, 30)

    async def pause(self):
        await asyncio.sleep(self.random.uniform(0, 0.5))

    @contextlib.asynccontextmanager
    async def connected(self, path):
        async with websockets.connect(self.gateway.socket_url + path, additional_headers=HEADERS) as socket:
            yield socket


class Talker(Caller):
    """On the Realtime API. It comes back to its session, or does not."""

    def __init__(self, *args):
        super().__init__(*args)
        self.session = self.last = None
        self.ids = set()

    def path(self):
        if self.session is None:
            return f"/v1/realtime?model={MODEL}"
        return f"/v1/realtime?model={MODEL}&session_id={self.session}&last_event_id={self.last}"

    async def next(self, socket):
        event = json.loads(await socket.recv())
        if event["type"] == "session.created":
            resumed = self.session is not None
            self.session = event["session"]["id"]
            self.seen.sessions.add(self.session)
            if not resumed:
                self.last = event["event_id"]
            return event
        assert event["event_id"] not in self.ids, f"told twice: {event}"
        self.ids.add(event["event_id"])
        if event["type"] == "error":
            assert event["error"]["code"] == "response_cancel_not_active", event
        else:
            self.last = event["event_id"]
        self.seen.note(event)
        return event

    async def run(self):
        turn = None
        while turn is not None or not self.seen.enough():
            async with self.connected(self.path()) as socket:
                try:
                    await self.next(socket)
                    if self.history:
                        for item in self.history:
                            await self.send(socket, "conversation.item.create", item=item)
                        self.history = []
                    while turn is not None or not self.seen.enough():
                        turn = await self.turn(socket, turn)
                except Cut:
                    socket.transport.abort()
                    turn = "back"
                except Vanished:
                    socket.transport.abort()
                    return
            await self.pause()

    async def send(self, socket, kind, **more):
        await socket.send(json.dumps({"type": kind, **more}))

    async def turn(self, socket, turn):
        """A turn, or the rest of one that a cut went through."""
        plan, at = ("stay", 0) if turn == "back" else self.draw("stay", "cut", "cut", "cancel", "vanish")
        if turn is None:
            await self.send(socket, "conversation.item.create", item=user(TEXT))
            await self.send(socket, "response.create")
        spoke = False
        for count in range(10_000):
            event = await self.next(socket)
            if event["type"] == "response.done":
                return None
            called = event["type"] in ("response.mcp_call.completed", "response.mcp_call.failed")
            if plan in ("cut", "vanish") and count >= at:
                raise Vanished if plan == "vanish" else Cut
            # It interrupts while tools run, or else what the model says in the end.
            spoke |= called
            interrupts = event["type"] == "response.mcp_call.in_progress" if plan == "cancel" else (
                spoke and event["type"] == "response.output_text.delta"
            )  # fmt: skip
            if interrupts:
                await self.send(socket, "response.cancel")
                plan = "stay"
        raise AssertionError("a response without an end")


class Liner(Caller):
    """On the WebSocket of the Responses API. It goes on behind the last response that it knows to be over."""

    async def run(self):
        previous = None
        while not self.seen.enough():
            async with self.connected("/v1/responses") as socket:
                try:
                    while not self.seen.enough():
                        previous = await self.turn(socket, previous)
                except Cut:
                    socket.transport.abort()
            await self.pause()

    async def turn(self, socket, previous):
        plan, at = self.draw("stay", "cut", "cut", "cancel")
        given = [user(TEXT)] if previous else [*self.history, user(TEXT)]
        body = {"model": MODEL, "input": given, "previous_response_id": previous, "text": SHORT}
        await socket.send(json.dumps({"type": "response.create", **body}))
        for count in range(10_000):
            event = json.loads(await socket.recv())
            assert event["type"] != "error", event
            self.seen.note(event)
            if event["type"] in ENDS:
                return event["response"]["id"]
            if plan == "cut" and count >= at:
                raise Cut
            if plan == "cancel" and event["type"] == "response.mcp_call.in_progress":
                await socket.send(json.dumps({"type": "response.cancel"}))
        raise AssertionError("a response without an end")


class Asker(Caller):
    """On the Responses API over HTTP. Its session ends with its request."""

    async def run(self):
        async with httpx.AsyncClient(base_url=self.gateway.url, headers=HEADERS, timeout=None) as http:
            while not self.seen.enough():
                plan, at = self.draw("stay", "cut")
                body = {"model": MODEL, "input": [*self.history, user(TEXT)], "stream": True, "text": SHORT}
                async with http.stream("POST", "/v1/responses", json=body) as answer:
                    assert answer.status_code == 200
                    count = 0
                    async for row in answer.aiter_lines():
                        if row.startswith("data: "):
                            self.seen.note(json.loads(row.removeprefix("data: ")))
                            count += 1
                        if plan == "cut" and count > at:
                            break


async def crowd(gateway, wanted, seed, callers, most):
    """Lets so many callers talk at once until so many calls were made, at most so many of them in one turn."""
    seen = Seen(wanted)

    kinds = [(Talker, Liner, Talker, Liner, Talker, Asker)[n % 6] for n in range(callers)]
    await asyncio.gather(*(kind(gateway, seen, f"{seed}/{n}", most).run() for n, kind in enumerate(kinds)))
    return seen


def at_rest(gateway, seen):
    """All calls as they are kept, by item, once nothing runs any more."""
    kept = collections.defaultdict(list)
    with gateway.http() as http:
        end = time.monotonic() + PATIENCE
        for session in sorted(seen.sessions):
            while (about := http.get(f"/v1/sessions/{session}").json()).get("state", "idle") != "idle":
                assert time.monotonic() < end, about
                time.sleep(0.2)
            for call in calls_of(about.get("items", [])):
                kept[call["id"]].append(call)
        for response in sorted(seen.responses):
            answer = http.get(f"/v1/responses/{response}")
            if answer.status_code == 200:
                for call in calls_of(answer.json()["output"]):
                    kept[call["id"]].append(call)
    return kept
