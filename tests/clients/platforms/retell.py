"""A simulated Retell: the side of Retell's servers in a call with a custom LLM.

It follows https://docs.retellai.com/api-references/llm-websocket. What the caller says and how much of the agent's
words they hear is decided by the test; what the gateway may send, and when, is checked here:

- `config` comes first, and every frame has the documented fields with the documented types.
- A response ends once, with `content_complete`, and nothing of it follows.
- Once the gateway has read a newer request, nothing comes for an older one. That it has read it is known by the echo of
  a `ping_pong` that was sent right behind the request.
- The result of a call comes once, behind its invocation.
"""

import json
import socket
import threading
import time
import uuid
from dataclasses import dataclass, field

import websockets
from websockets.sync.client import connect

WITHIN = 90
BEAT = 2.0
SECONDS_PER_WORD = 0.35

# By `response_type`: fields that have to be there, and fields that may be.
SHAPES = {
    "config": ({"config": dict}, {}),
    "ping_pong": ({"timestamp": int}, {}),
    "response": (
        {"response_id": int, "content": str, "content_complete": bool},
        {"no_interruption_allowed": bool, "end_call": bool, "transfer_number": str},
    ),
    "tool_call_invocation": ({"tool_call_id": str, "name": str, "arguments": str}, {}),
    "tool_call_result": ({"tool_call_id": str, "content": str}, {}),
}
CONFIG = ({"auto_reconnect": bool, "call_details": bool}, {"transcript_with_tool_calls": bool})


def check_fields(given, needed, allowed):
    fields = needed | allowed
    assert needed.keys() <= given.keys() <= fields.keys(), f"the fields are not those of the documentation: {given}"
    for name, value in given.items():
        assert type(value) is fields[name], f"{name} has to be of the type {fields[name].__name__}: {given}"


def check_frame(message):
    """A frame as Retell reads it."""
    assert isinstance(message, str), "all frames are text"
    frame = json.loads(message)
    needed, allowed = SHAPES[frame["response_type"]]
    check_fields(frame, {"response_type": str} | needed, allowed)
    if frame["response_type"] == "config":
        check_fields(frame["config"], *CONFIG)
    if frame["response_type"] == "tool_call_invocation":
        assert isinstance(json.loads(frame["arguments"]), dict), frame
    return frame


@dataclass
class Response:
    """What was sent in answer to one request. `at` are the places of its frames in `Retell.frames`."""

    id: int
    pieces: list = field(default_factory=list)
    at: list = field(default_factory=list)
    complete: bool = False
    end_call: bool = False
    transfer_number: str | None = None

    @property
    def text(self):
        return "".join(self.pieces)

    @property
    def words(self):
        return self.text.split()


@dataclass
class ToolCall:
    """A call as Retell's log shows it."""

    id: str
    name: str
    arguments: dict
    invoked_at: int
    result: str | None = None
    settled_at: int | None = None


class Retell:
    """One call. Leaving the `with` block hangs up, and fails where the gateway did not keep to the protocol."""

    def __init__(self, gateway, agent, secret=None, call_id=None, headers=None):
        self.call_id = call_id or f"call_{uuid.uuid4().hex}"
        middle = f"/{secret}" if secret else ""
        self.url = f"{gateway.socket_url}/agents/{agent}/retell{middle}/llm-websocket/{self.call_id}"
        self.headers = headers
        self.transcript = []
        self.responses = {}
        self.calls = {}
        self.closed = None
        self._news = threading.Condition()
        self._sending = threading.Lock()
        self._faults = []
        self.last_id = 0
        self._void_below = 0
        self.seconds = 0.0
        self._last_timestamp = 0
        self._connect()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.hang_up()
        if kind is None:
            self._check()

    # --- the connection ---

    def _connect(self):
        # A new connection knows nothing of what was asked on the one before.
        self.frames = []
        self._pings = {}
        self._echoes = []
        self.closed = None
        self.socket = connect(self.url, proxy=None, additional_headers=self.headers, max_size=None)
        self._over = threading.Event()
        threading.Thread(target=self._read, args=(self.socket, self._over), daemon=True).start()
        self.wait(lambda: self.frames, "the config event")
        threading.Thread(target=self._beat, args=(self.socket, self._over), daemon=True).start()

    def _read(self, connection, over):
        try:
            for message in connection:
                with self._news:
                    if over.is_set():
                        return
                    try:
                        self._take(check_frame(message))
                    except Exception as fault:
                        self._faults.append(f"{fault!r} by {message[:500]!r}")
                    self._news.notify_all()
        except websockets.ConnectionClosed:
            pass
        with self._news:
            if not over.is_set():
                over.set()
                self.closed = (connection.close_code, connection.close_reason)
            self._news.notify_all()

    def _beat(self, connection, over):
        """Keeps the connection alive, as `auto_reconnect` asks for."""
        while not over.wait(BEAT):
            try:
                self._ping(connection)
            except websockets.ConnectionClosed:
                return

    def _take(self, frame):
        kind = frame["response_type"]
        assert (kind == "config") == (not self.frames), "config is the first frame, and comes once"
        if kind == "ping_pong":
            stamp = frame["timestamp"]
            assert stamp in self._pings and stamp not in self._echoes, "a ping_pong that was not sent, or was answered"
            self._echoes.append(stamp)
            self._void_below = max(self._void_below, self._pings[stamp])
            return
        at = len(self.frames)
        self.frames.append(frame)
        if kind == "response":
            self._take_words(frame, at)
        if kind == "tool_call_invocation":
            assert frame["tool_call_id"] not in self.calls, "a call is invoked once"
            call = ToolCall(frame["tool_call_id"], frame["name"], json.loads(frame["arguments"]), at)
            self.calls[call.id] = call
        if kind == "tool_call_result":
            call = self.calls[frame["tool_call_id"]]
            assert call.result is None, "a call has one result"
            call.result, call.settled_at = frame["content"], at

    def _take_words(self, frame, at):
        number = frame["response_id"]
        assert number >= self._void_below, f"the response {number} is void since {self._void_below} was asked for"
        assert number <= self.last_id, f"nobody asked for the response {number}"
        response = self.responses.setdefault(number, Response(number))
        assert not response.complete, f"the response {number} was complete"
        response.pieces.append(frame["content"])
        response.at.append(at)
        response.complete = frame["content_complete"]
        last = {"end_call", "transfer_number"} & {name for name in frame if frame[name]}
        assert response.complete or not last, "the call goes on until all is said"
        response.end_call = frame.get("end_call", False)
        response.transfer_number = frame.get("transfer_number")

    def _check(self):
        with self._news:
            assert not self._faults, "\n".join(self._faults)

    def wait(self, done, what):
        """Waits for something to be true, which is looked at whenever a frame came. Gives it."""
        end = time.monotonic() + WITHIN
        with self._news:
            while True:
                assert not self._faults, "\n".join(self._faults)
                if found := done():
                    return found
                left = end - time.monotonic()
                assert self.closed is None, f"closed with {self.closed} while waiting for {what}"
                assert left > 0, f"waited in vain for {what}; there are {self.frames[-5:]}"
                self._news.wait(left)

    def wait_closed(self):
        """The code and the reason with which the gateway closes the connection."""
        end = time.monotonic() + WITHIN
        with self._news:
            while self.closed is None:
                left = end - time.monotonic()
                assert left > 0, "the connection is not closed"
                self._news.wait(left)
            return self.closed

    def send(self, **event):
        with self._sending:
            self.socket.send(json.dumps(event))

    def raw(self, message):
        """Sends a frame that Retell never would."""
        with self._sending:
            self.socket.send(message)

    def drop(self):
        """The network is gone: nothing more is read, and nobody says goodbye."""
        self._over.set()
        self.socket.socket.shutdown(socket.SHUT_RDWR)

    def reconnect(self, **details):
        """What Retell does when the connection is lost and `auto_reconnect` is on."""
        self._over.set()
        self._connect()
        self.call_details(**details)

    def hang_up(self):
        if not self._over.is_set():
            self._over.set()
            self.socket.close()

    # --- events ---

    def _ping(self, connection):
        with self._sending:
            return self._ping_behind(connection)

    def _ping_behind(self, connection):
        stamp = max(self._last_timestamp + 1, time.time_ns() // 1_000_000)
        self._last_timestamp = stamp
        with self._news:
            self._pings[stamp] = self.last_id
        connection.send(json.dumps({"interaction_type": "ping_pong", "timestamp": stamp}))
        return stamp

    def ping(self):
        """Waits for the echo. Then all that was sent before was read."""
        stamp = self._ping(self.socket)
        self.wait(lambda: stamp in self._echoes, "the echo of a ping_pong")

    def call_details(self, **details):
        call = {
            "call_id": self.call_id,
            "call_type": "phone_call",
            "agent_id": "agent_of_the_tests",
            "agent_version": 0,
            "call_status": "ongoing",
            "from_number": "+12137771234",
            "to_number": "+12137771235",
            "direction": "inbound",
            "metadata": {},
            "retell_llm_dynamic_variables": {},
            "start_timestamp": time.time_ns() // 1_000_000,
            "opt_out_sensitive_data_storage": False,
        }
        self.send(interaction_type="call_details", call=call | details)

    def begins(self, **details):
        """Tells who calls. Gives the greeting, which the caller hears to its end."""
        self.call_details(**details)
        greeting = self.finished(0)
        if greeting.text:
            self.hears(greeting)
        return greeting

    def utterance(self, role, content):
        words = []
        for word in content.split():
            words.append({"word": word, "start": round(self.seconds, 3), "end": round(self.seconds + 0.3, 3)})
            self.seconds += SECONDS_PER_WORD
        return {"role": role, "content": content, "words": words}

    def update(self, turntaking=None):
        event = {"interaction_type": "update_only", "transcript": self.transcript}
        self.send(**event, **({"turntaking": turntaking} if turntaking else {}))

    def speaks(self, text, live=True, turn_ends=True):
        """The caller says something. While they do, the transcript of it grows; `live` tells of that."""
        self.transcript.append(None)
        self._grows(text, live)
        if turn_ends:
            self.update("agent_turn")

    def speaks_on(self, text, live=False):
        """The caller had not finished: what was transcribed last is longer now. They heard nothing meanwhile."""
        assert self.transcript[-1]["role"] == "user"
        self._grows(text, live)

    def _grows(self, text, live):
        words = text.split()
        for end in range(2, len(words), 2) if live else ():
            self.transcript[-1] = self.utterance("user", " ".join(words[:end]))
            self.update("user_turn" if end == 2 else None)
        self.transcript[-1] = self.utterance("user", text)

    def hears(self, response, words=None, wording=str):
        """So many words of a response were played; all of them by default. `wording` is how they are written down."""
        played = response.words[:words]
        if played:
            text = wording(" ".join(played))
            self.transcript.append(self.utterance("agent", text))
            return text
        return ""

    def hears_else(self, text):
        """The caller heard words of the agent that are not those of any response."""
        self.transcript.append(self.utterance("agent", text))

    def asks(self, kind="response_required"):
        """Asks for words. Gives the response, which is empty yet."""
        with self._sending:
            with self._news:
                self.last_id += 1
                response = self.responses[self.last_id] = Response(self.last_id)
            self.socket.send(
                json.dumps({"interaction_type": kind, "response_id": response.id, "transcript": self.transcript})
            )
            self._ping_behind(self.socket)
        return response

    def reminds(self):
        return self.asks("reminder_required")

    def finished(self, response):
        """Waits for a response, given itself or by its id, to be complete."""
        number = response if isinstance(response, int) else response.id
        return self.wait(
            lambda: number in self.responses and self.responses[number].complete and self.responses[number],
            f"the end of the response {number}",
        )

    def answers(self, text, **options):
        """The caller says something and hears the answer to its end."""
        self.speaks(text, **options)
        response = self.finished(self.asks())
        self.hears(response)
        return response

    def said(self, response, words=1):
        """Waits until so many words of a response were sent."""
        self.wait(lambda: len(response.words) >= words, f"{words} words of the response {response.id}")

    def invoked(self, count=1):
        """Waits until so many calls were made. Gives the last one."""
        self.wait(lambda: len(self.calls) >= count, f"{count} calls")
        return list(self.calls.values())[count - 1]

    def settled(self, call):
        """Waits until a call has its result."""
        self.wait(lambda: call.result is not None, f"the result of {call.id}")
        return call
