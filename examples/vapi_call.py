"""Vapi with an agent of Electron Gateway as its custom LLM, and a call from the terminal that sends what Vapi sends.

    electron-gateway serve --config examples/phone_agent.toml
    ELECTRON_URL=http://127.0.0.1:8080/agents/shop/v1 ELECTRON_API_KEY=… python vapi_call.py

Type what the caller says, a line at a time; what Vapi would speak is printed as it comes. Ctrl-D hangs up.

In Vapi, the assistant's model is

    {"provider": "custom-llm", "url": "https://voice.example.com/agents/shop/v1", "model": "electron"}

where the address names the agent; with `https://voice.example.com/v1` the model does: "electron:shop". A key that
`electron-gateway key create vapi` has made goes to Vapi's credentials: {"provider": "custom-llm", "apiKey": "…"}.

Then Vapi POSTs to `/chat/completions` below that address, the whole conversation each time:

- The agent's instructions come first, and the assistant's system message after them. Leave the latter out, or let it
  say what only this assistant needs.
- Vapi speaks its own `firstMessage`, not the agent's greeting, and hangs up and transfers by its own tools: they come
  with the request, and the gateway gives the model's calls of them back.
- The agent's tools run in the gateway while the answer is streamed. The caller hears a phrase first, and what the tool
  brought after it. Vapi is told of neither call nor result, so a later turn knows what was said of it.
- `temperature` and `max_tokens` are the assistant's. Without settings Vapi sends 0 and 250.
- `metadata` is the assistant's, and brings the variables of the agent's templates: up to 16, each a text of up to 512
  characters. Others are refused; with `"metadataSendMode": "off"` none are sent.
"""

import json
import os
import sys
import time
import urllib.error
import urllib.request
import uuid

URL = os.environ.get("ELECTRON_URL", "http://127.0.0.1:8080/agents/shop/v1")
# The server prints one when it starts without keys of its own.
KEY = os.environ.get("ELECTRON_API_KEY") or "none"

# Vapi gives up when nothing has come for so long.
TIMEOUT_SECONDS = 20

END_CALL = {
    "type": "function",
    "function": {
        "name": "endCall",
        "description": "Use this function to end the call.",
        "parameters": {"type": "object", "properties": {}},
    },
}
# What Vapi tells of a call beside what OpenAI's API has.
CUSTOMER = {"number": "+12125550187", "name": "Mia Chen"}
PHONE_NUMBER = {"id": str(uuid.uuid4()), "provider": "twilio", "number": "+12125550100", "name": "Shop"}
CALL = {
    "id": str(uuid.uuid4()),
    "orgId": str(uuid.uuid4()),
    "type": "inboundPhoneCall",
    "status": "in-progress",
    "assistantId": str(uuid.uuid4()),
    "phoneNumberId": PHONE_NUMBER["id"],
    "phoneCallProvider": "twilio",
    "phoneCallTransport": "pstn",
    "createdAt": time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime()),
    "customer": CUSTOMER,
}
METADATA = {"shop": "Corner Books", "caller_name": CUSTOMER["name"]}


def ask(messages: list[dict]) -> tuple[str, list[str]]:
    """Prints the answer as it comes; gives it back, with the names of Vapi's tools that were called."""
    body = {
        "model": "electron",
        "messages": messages,
        "temperature": 0,
        "max_tokens": 250,
        "stream": True,
        "tools": [END_CALL],
        "call": CALL,
        "phoneNumber": PHONE_NUMBER,
        "customer": CUSTOMER,
        "metadata": METADATA,
        "timestamp": int(time.time() * 1000),
    }
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    request = urllib.request.Request(f"{URL.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers)
    said, called = "", []
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
        for line in response:
            data = line.decode().strip().removeprefix("data: ")
            if data == "[DONE]":
                break
            chunk = json.loads(data or "{}")
            if error := chunk.get("error"):
                sys.exit(f"\nThe answer broke off: {error['message']}")
            for choice in chunk.get("choices", []):
                text = choice["delta"].get("content") or ""
                said += text
                print(text, end="", flush=True)
                # A call comes in pieces, of which the first has its name.
                calls = [call["function"] for call in choice["delta"].get("tool_calls") or []]
                called += [call["name"] for call in calls if "name" in call]
        else:
            sys.exit("\nThe gateway closed the connection in the middle of an answer.")
    print()
    return said, called


def main() -> None:
    first = "Hello, this is Corner Books. How can I help you?"
    print(first)
    messages = [{"role": "assistant", "content": first}]
    for line in sys.stdin:
        if not (words := line.strip()):
            continue
        messages.append({"role": "user", "content": words})
        try:
            said, called = ask(messages)
        except urllib.error.HTTPError as error:
            sys.exit(f"The gateway refused: {error.code} {error.read(2000).decode()}")
        except OSError as error:
            sys.exit(f"{URL} cannot be reached: {error}. Is the gateway running, and ELECTRON_URL right?")
        messages.append({"role": "assistant", "content": said})
        if called:
            # Vapi runs its tools itself; this one ends the call.
            print(f"[Vapi runs {', '.join(called)}]")
            break


if __name__ == "__main__":
    main()
