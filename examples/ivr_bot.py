"""A bot between a media server and Electron Gateway, to be tried in the terminal.

    electron-gateway serve --config examples/phone_agent.toml
    ELECTRON_URL=http://127.0.0.1:8080/agents/shop/v1 ELECTRON_API_KEY=… python ivr_bot.py

Type what the caller says, a line at a time; each line that is printed is a sentence to speak. Ctrl-D hangs up.

With FreeSWITCH, Asterisk or jambonz the lines come from speech-to-text, and what is printed goes to text-to-speech,
which begins with the first sentence while the rest is still being made. To let a caller interrupt, `close()` what
`hear` gives: the gateway stops at the next token, and the conversation keeps what was given out to be spoken.

The bot runs the tools, in two ways:

- For a tool with a callback the gateway POSTs the call to it, and streams on what the model makes of the result. That
  is `tool_bot.py`, here in the same process.
- A call of a tool without one is the end of an answer. The bot runs it and asks again with the result. Tools that the
  bot brings along itself are among these, such as hanging up, which only the media server can do.

TOOL_SECRET is the callbacks' secret and TOOL_PORT their port, if not 9000. ELECTRON_TIMEOUT is for how many seconds the
gateway may be silent, if not 20; it should be longer than the callbacks' timeout.
"""

import http.client
import json
import os
import re
import sys
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit

from tool_bot import TOOLS, ToolBot

URL = urlsplit(os.environ.get("ELECTRON_URL", "http://127.0.0.1:8080/agents/shop/v1"))
# The server prints one when it starts without keys of its own.
KEY = os.environ.get("ELECTRON_API_KEY") or "none"
TIMEOUT_SECONDS = float(os.environ.get("ELECTRON_TIMEOUT", "20"))
TOOL_PORT = int(os.environ.get("TOOL_PORT", "9000"))

GREETING = "Hello, this is Corner Books. How can I help you?"
APOLOGY = "I'm sorry, I could not get that. Could you say it again?"
FAREWELL = "Thank you for calling. Goodbye!"

# Most times in a row that the model may call the bot's tools before it has to answer.
MOST_ROUNDS = 3
# The gateway takes 200; fewer are read faster.
MOST_MESSAGES = 40

HANG_UP = {
    "type": "function",
    "function": {
        "name": "hang_up",
        "description": "Ends the call, after the caller has said goodbye.",
        "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
    },
}

# The end of a sentence: its mark and a space, or a mark that needs none.
END_OF_SENTENCE = re.compile(r"[.!?…][\"')]*\s+|[。！？]")
# A piece of several words that ends like a sentence is one: a phrase that the gateway says before a tool runs. It has
# to be spoken now, not when the next word comes. A model's pieces are single words or less.
PHRASE = re.compile(r"\s\S*[.!?…。！？]$")


class Trouble(Exception):
    """There is no answer, or not all of it. The text is for the operator."""


def stream(messages: list[dict], options: dict) -> Iterator[dict]:
    """The pieces of an answer as they come, each the choice of a chunk of OpenAI's Chat Completions."""
    connect = http.client.HTTPSConnection if URL.scheme == "https" else http.client.HTTPConnection
    connection = connect(URL.hostname, URL.port, timeout=TIMEOUT_SECONDS)
    # One call at a time is easier for a small model.
    body = {"model": "electron", "messages": messages, "tools": [HANG_UP], "parallel_tool_calls": False, "stream": True}
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    try:
        connection.request("POST", f"{URL.path.rstrip('/')}/chat/completions", json.dumps(body | options), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise Trouble(f"the gateway refused: {response.status} {response.read(2000).decode()}")
        while line := response.readline():
            data = line.decode().strip().removeprefix("data: ")
            if data == "[DONE]":
                return
            chunk = json.loads(data or "{}")
            if error := chunk.get("error"):
                raise Trouble(f"the answer broke off: {error['message']}")
            yield from chunk.get("choices", [])
        raise Trouble("the gateway closed the connection in the middle of an answer")
    except TimeoutError as error:
        raise Trouble(f"the gateway was silent for {TIMEOUT_SECONDS:g} s; see ELECTRON_TIMEOUT") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Trouble(f"{URL.geturl()} does not answer: {error!r}. Is the gateway running?") from error
    finally:
        connection.close()


class Call:
    """A call. The bot keeps the conversation: the gateway remembers nothing from one request to the next."""

    def __init__(self):
        self.over = False
        self._messages = [{"role": "assistant", "content": GREETING}]

    def hear(self, words: str) -> Iterator[str]:
        """What to speak in answer to the caller's words, a sentence at a time."""
        self._messages.append({"role": "user", "content": words})
        for round_ in range(MOST_ROUNDS + 1):
            # In the last round the model has to say what it knows.
            options = {"tool_choice": "none"} if round_ == MOST_ROUNDS else {}
            answer, spoken, whole = {"role": "assistant", "content": ""}, [], False
            try:
                for sentence in self._answer(answer, options):
                    spoken.append(sentence)
                    yield sentence
                whole = True
            except Trouble as trouble:
                # The call outlives a turn that goes wrong.
                print(f"[{trouble}]", file=sys.stderr, flush=True)
                spoken.append(APOLOGY)
                yield APOLOGY
            finally:
                # Of an answer that broke off, or was interrupted, the caller heard a part.
                self._messages.append(answer if whole else {"role": "assistant", "content": " ".join(spoken)})
            calls = answer.get("tool_calls", [])
            for call in calls:
                self._messages.append({"role": "tool", "tool_call_id": call["id"], "content": self._run(call)})
            if self.over:
                yield FAREWELL
            if self.over or not calls:
                return

    def _answer(self, answer: dict, options: dict) -> Iterator[str]:
        """The sentences of one answer. `answer` becomes its message, with the calls that it ends with."""
        rest, calls = "", {}
        for choice in stream(self._recent(), options):
            delta = choice["delta"]
            text = delta.get("content") or ""
            answer["content"] += text
            rest += text
            while end := END_OF_SENTENCE.search(rest):
                yield rest[: end.end()].strip()
                rest = rest[end.end() :]
            if PHRASE.search(text):
                yield rest.strip()
                rest = ""
            for piece in delta.get("tool_calls") or []:
                new = {"id": piece.get("id"), "type": "function", "function": {"name": "", "arguments": ""}}
                function = calls.setdefault(piece["index"], new)["function"]
                for key, value in piece["function"].items():
                    function[key] += value
            if calls and choice["finish_reason"] == "length":
                raise Trouble("max_tokens ended the answer inside of a call; raise it")
        if rest.strip():
            yield rest.strip()
        if calls:
            answer["tool_calls"] = list(calls.values())

    def _recent(self) -> list[dict]:
        """The latest messages, from one of the caller's on, so that no result stands there without its call."""
        recent = self._messages[-MOST_MESSAGES:]
        first = next((i for i, message in enumerate(recent) if message["role"] == "user"), 0)
        return recent if len(recent) == len(self._messages) else recent[first:]

    def _run(self, call: dict) -> str:
        """Runs a tool that has no callback. What goes wrong is told to the model, which can put it into words."""
        name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"] or "{}")
        print(f"[{name} {arguments}]", file=sys.stderr, flush=True)
        if name == "hang_up":
            self.over = True
            result = {"status": "the call ends"}
        elif tool := TOOLS.get(name):
            result = tool(arguments)
        else:
            result = {"error": f"There is no tool {name}."}
        return json.dumps(result)


def speak(sentence: str) -> None:
    """Text-to-speech would be here."""
    print(" ".join(sentence.split()), flush=True)


def main() -> None:
    try:
        tools = ToolBot(TOOL_PORT, os.environ.get("TOOL_SECRET", ""))
    except OSError as error:
        sys.exit(f"Port {TOOL_PORT} cannot be used: {error}. Is tool_bot.py running? This does its work; end it.")
    threading.Thread(target=tools.serve_forever, daemon=True).start()
    call = Call()
    speak(GREETING)
    try:
        for line in sys.stdin:
            if words := line.strip():
                for sentence in call.hear(words):
                    speak(sentence)
            if call.over:
                break
    except KeyboardInterrupt:
        pass
    finally:
        tools.shutdown()
        tools.server_close()


if __name__ == "__main__":
    main()
