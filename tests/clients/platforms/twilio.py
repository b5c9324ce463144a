"""Plays Twilio: the webhooks of a phone number, and the WebSocket of ConversationRelay.

Everything that the gateway sends is held against the reference: a frame or TwiML that Twilio refuses fails the test.
"""

import base64
import hashlib
import hmac
import itertools
import json
import re
import socket
import struct
import time
import xml.etree.ElementTree as xml
from dataclasses import dataclass

import httpx
import websockets
from conftest import KEY, TWILIO_TOKEN
from websockets.sync.client import connect

# The model shares two cores with others.
WITHIN = 90

ACCOUNT = "AC" + "5f" * 16
CALLER = "+4915112345678"
CALLED = "+4930901820"

LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*")
DIGITS = re.compile(r"[0-9*#wW]+")

# Attributes of <ConversationRelay> that Twilio documents and this gateway may need.
RELAY_ATTRIBUTES = {
    "url",
    "language",
    "interruptible",
    "dtmfDetection",
    "partialPrompts",
    "preemptible",
    "welcomeGreeting",
    "reportInputDuringAgentSpeech",
}


def is_handoff(value):
    return isinstance(value, str) and isinstance(json.loads(value), dict)


def is_text(value):
    return isinstance(value, str)


def is_flag(value):
    return isinstance(value, bool)


def is_language(value):
    return isinstance(value, str) and bool(LANGUAGE.fullmatch(value))


# What each frame has to have, and what it may have besides.
FRAMES = {
    "text": (
        {"token": is_text, "last": is_flag},
        {"lang": is_language, "interruptible": is_flag, "preemptible": is_flag},
    ),
    "sendDigits": ({"digits": lambda value: is_text(value) and bool(DIGITS.fullmatch(value))}, {}),
    "language": ({}, {"ttsLanguage": is_language, "transcriptionLanguage": is_language}),
    "end": ({}, {"handoffData": is_handoff}),
}

calls = itertools.count(1)


def check(text):
    """A frame that Twilio takes."""
    assert isinstance(text, str), "Twilio takes no binary frames"
    frame = json.loads(text)
    kind = frame.get("type")
    assert kind in FRAMES, f"Twilio knows no such frame: {text}"
    required, optional = FRAMES[kind]
    fields = {name: value for name, value in frame.items() if name != "type"}
    assert required.keys() <= fields.keys(), f"something is missing: {text}"
    for name, value in fields.items():
        fits = required.get(name) or optional.get(name)
        assert fits, f"there is no field {name}: {text}"
        assert fits(value), f"{name} has a value that Twilio refuses: {text}"
    return frame


def signature(url, form=(), token=TWILIO_TOKEN):
    """What Twilio puts into X-Twilio-Signature."""
    signed = url + "".join(name + value for name, value in sorted(dict(form).items()))
    return base64.b64encode(hmac.new(token.encode(), signed.encode(), hashlib.sha1).digest()).decode()


def post(url, form, **signed):
    """A webhook. `signed` may hold another `signature`, or None for none."""
    given = signed.get("signature", signature(url, form))
    return httpx.post(url, data=form, headers={"x-twilio-signature": given} if given else {}, timeout=WITHIN)


@dataclass
class Utterance:
    """What the caller hears in one piece, and how it came."""

    text: str
    tokens: list
    lang: str | None


def sentence(text):
    """The sentence that is being spoken when this much of an utterance was: Twilio tells of no other."""
    return re.split(r"(?<=[.!?:])\s+", text.strip())[-1]


class Call:
    """A phone call to an agent. Leaving its context hangs up."""

    def __init__(self, gateway, agent, parameters=None):
        self.gateway = gateway
        self.base = f"{gateway.url}/agents/{agent}/twilio"
        self.parameters = parameters or {}
        self.sid = f"CA{next(calls):032x}"
        self.socket = None
        self.frames = []
        # Tokens of the utterance that is not complete, and the last one that is.
        self.tokens = []
        self.heard = None
        # Frames that have come and were not looked at.
        self.waiting = []
        self.id = None
        self.over = False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if not self.over:
            self.hang_up()

    # --- webhooks ---

    def form(self, status="ringing", **fields):
        place = {"City": "MÜNCHEN", "State": "Bayern", "Zip": "", "Country": "DE"}
        return {
            "AccountSid": ACCOUNT,
            "ApiVersion": "2010-04-01",
            "CallSid": self.sid,
            "CallStatus": status,
            "CallToken": '{"parentCallInfoToken":"eyJhbGciOiJFUzI1NiJ9","identityHeaderTokens":[]}',
            "Called": CALLED,
            "Caller": CALLER,
            "Direction": "inbound",
            "From": CALLER,
            "StirVerstat": "TN-Validation-Passed-A",
            "To": CALLED,
            **{f"{who}{what}": value for who in ("From", "To", "Caller", "Called") for what, value in place.items()},
            **fields,
        }

    def twiml(self, response):
        """The verbs that Twilio is to execute."""
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].split(";")[0] in ("text/xml", "application/xml")
        root = xml.fromstring(response.content)
        assert root.tag == "Response" and not root.attrib
        return list(root)

    def ring(self):
        """The call comes in: the number's webhook says what to do."""
        return self.connecting(post(f"{self.base}/voice", self.form()))

    def connecting(self, response):
        """The address of the relay, from TwiML that connects the caller with an agent."""
        [connect] = self.twiml(response)
        assert connect.tag == "Connect" and connect.attrib == {"action": f"{self.base}/action"}
        [relay] = connect
        assert relay.tag == "ConversationRelay" and relay.attrib.keys() <= RELAY_ATTRIBUTES
        # Without them Twilio sends no keys and no words that are still being spoken.
        assert relay.attrib["dtmfDetection"] == relay.attrib["partialPrompts"] == "true"
        assert relay.attrib["interruptible"] == "any"
        url = relay.attrib["url"]
        assert url == f"{self.base.replace('http', 'ws', 1)}/relay"
        self.relay = relay.attrib
        return url

    def action(self, session_status, call_status="in-progress", **fields):
        """The WebSocket has ended. Gives the verbs that are to be executed."""
        form = self.form(
            call_status, SessionId="VX" + self.sid[2:], SessionStatus=session_status, SessionDuration="12", **fields
        )
        return self.twiml(post(f"{self.base}/action", form))

    # --- the WebSocket ---

    def open(self, url, **signed):
        given = signed.get("signature", signature(url))
        headers = {"x-twilio-signature": given} if given else {}
        self.socket = connect(
            url,
            additional_headers=headers,
            compression=None,
            # Nothing is left unread, so that a pong says what came before it.
            max_queue=None,
            ping_interval=None,
            open_timeout=WITHIN,
            proxy=None,
        )

    def send(self, kind, **fields):
        self.socket.send(json.dumps({"type": kind, **fields}))

    def setup(self, **fields):
        known = self.sessions()
        message = {
            "sessionId": "VX" + self.sid[2:],
            "accountSid": ACCOUNT,
            "parentCallSid": "",
            "callSid": self.sid,
            "from": CALLER,
            "to": CALLED,
            "forwardedFrom": "+4930901829",
            "callType": "PSTN",
            "callerName": "",
            "direction": "inbound",
            "callStatus": "RINGING",
            "customParameters": self.parameters,
        }
        self.send("setup", **{**message, **fields})
        self.on_the_way()
        self.id = self.id or next(iter(self.sessions() - known), None)

    def begin(self):
        """A call from the webhook on. The greeting is the next thing that is heard."""
        self.open(self.ring())
        self.setup()
        return self

    def say(self, words, lang="en-US", partials=True):
        """The caller speaks; what is understood grows."""
        spoken = words.split()
        for end in range(1, len(spoken)) if partials else ():
            self.send("prompt", voicePrompt=" ".join(spoken[:end]), lang=lang, last=False)
        self.send("prompt", voicePrompt=words, lang=lang, last=True)

    def press(self, keys):
        for key in keys:
            self.send("dtmf", digit=key)

    def on_the_way(self):
        """Takes what the gateway sent before it had read everything that was sent to it."""
        pong = self.socket.ping()
        assert pong.wait(WITHIN), f"no pong came, {self.story()}"
        frames = []
        while True:
            try:
                frames.append(check(self.socket.recv(timeout=0)))
            except TimeoutError:
                self.waiting += frames
                return

    def interrupt(self, heard, duration=460):
        """Twilio stops speaking, drops what it has, and tells what was heard of the sentence that it was in."""
        self.send("interrupt", utteranceUntilInterrupt=heard, durationUntilInterruptMs=duration)
        self.on_the_way()
        self.waiting, self.tokens = [], []

    def is_silent(self):
        """Whether nothing has come."""
        self.on_the_way()
        return not self.waiting

    def next(self):
        """The next frame."""
        if self.waiting:
            frame = self.waiting.pop(0)
        else:
            try:
                frame = check(self.socket.recv(timeout=WITHIN))
            except TimeoutError:
                raise AssertionError(f"nothing came for {WITHIN} s, {self.story()}") from None
            except websockets.ConnectionClosed as closed:
                raise AssertionError(f"closed with {closed.rcvd}, {self.story()}") from None
        assert not self.frames or self.frames[-1]["type"] != "end", f"something came after the end: {frame}"
        self.frames.append(frame)
        if frame["type"] != "text":
            assert not self.tokens, f"{frame} came within an utterance"
            return frame
        self.tokens.append(frame)
        assert frame["last"] or frame["token"][-1:].isspace(), f"speech would break off within a word: {self.tokens}"
        if frame["last"]:
            self.heard, self.tokens = self.complete(self.tokens), []
        return frame

    @staticmethod
    def complete(frames):
        tokens = [frame["token"] for frame in frames]
        langs = {frame.get("lang") for frame in frames}
        assert len(langs) == 1, f"one utterance in several languages: {frames}"
        spoken = Utterance("".join(tokens), tokens, langs.pop())
        assert spoken.text.strip(), "an utterance without words"
        return spoken

    def story(self):
        log = self.gateway.log.read_text(errors="replace")[-3000:]
        return f"after {self.frames[-12:]}\n{log}"

    @property
    def playing(self):
        """What has come of the utterance that is not complete."""
        return "".join(frame["token"] for frame in self.tokens)

    def hear(self, enough):
        """Listens until what has come of the present utterance is enough."""
        while not enough(self.playing):
            frame = self.next()
            assert frame["type"] == "text" and not frame["last"], f"it ended early: {self.tokens}"
        return self.playing

    def utterance(self):
        """The next utterance, once it is complete."""
        while True:
            frame = self.next()
            assert frame["type"] == "text", frame
            if frame["last"]:
                return self.heard

    def ended(self):
        """What the gateway hands over as it ends the session. Twilio closes the WebSocket then, and goes on."""
        frame = self.next()
        assert frame["type"] == "end", frame
        assert self.is_silent(), self.waiting
        self.socket.close()
        handoff = frame.get("handoffData", "")
        self.over = True
        return handoff, self.action("ended", HandoffData=handoff)

    def reconnect(self, url):
        """Goes on with the call on another WebSocket."""
        self.open(url)
        self.setup()

    def drop(self):
        """The connection breaks, without a goodbye. Gives the relay's address to go on with."""
        self.socket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close_socket()
        return self.broke()

    def broke(self):
        """Twilio has noticed. Gives the relay's address to go on with."""
        self.waiting, self.tokens = [], []
        form = self.form(
            "in-progress",
            SessionId="VX" + self.sid[2:],
            SessionStatus="failed",
            SessionDuration="12",
            ErrorCode="64105",
            ErrorMessage="WebSocket Ended",
        )
        return self.connecting(post(f"{self.base}/action", form))

    def hang_up(self):
        """The caller does. The answer is of no effect any more, but has to be TwiML."""
        self.over = True
        if self.socket is not None:
            self.socket.close()
            verbs = self.action("completed", "completed")
            assert [verb.tag for verb in verbs] == ["Hangup"]

    # --- what an operator sees ---

    def api(self, path):
        return httpx.get(f"{self.gateway.url}{path}", headers={"authorization": f"Bearer {KEY}"}, timeout=WITHIN)

    def sessions(self):
        """The ids of the phone calls that are going on."""
        listed = self.api("/v1/sessions?limit=1000").json()["data"]
        return {session["id"] for session in listed if session["dialect"] == "conversation_relay"}

    def session(self):
        response = self.api(f"/v1/sessions/{self.id}")
        assert response.status_code == 200, response.text
        return response.json()

    def history(self):
        """Who said what, and which calls were made."""
        told = []
        for item in self.session()["items"]:
            if item["type"] == "message":
                told.append((item["role"], "".join(part["text"] for part in item["content"])))
            else:
                assert item["type"] == "mcp_call", item
                told.append((item["name"], item["status"]))
        return told

    def calls(self):
        return [item for item in self.session()["items"] if item["type"] == "mcp_call"]


def until(test, what, within=WITHIN):
    """Asks until the answer is something, and gives it."""
    end = time.monotonic() + within
    while not (found := test()):
        assert time.monotonic() < end, f"{what} did not happen within {within} s"
        time.sleep(0.05)
    return found
