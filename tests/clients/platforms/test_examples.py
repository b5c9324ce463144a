"""The examples for telephony, run as a newcomer runs them: the configuration, the bots, and what Vapi sends."""

import contextlib
import datetime
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading

import httpx
import pytest
import standardwebhooks
from conftest import KEY, WEBHOOK_SECRET, free_port, start, stop

EXAMPLES = pathlib.Path(__file__).parents[3] / "examples"
CONFIG = (EXAMPLES / "phone_agent.toml").read_text()

# Far more than the slowest of them takes beside other work.
WITHIN = 120

ACCOUNTS = {
    "TWILIO_AUTH_TOKEN": "token-of-the-account",
    "RETELL_SECRET": "secret-segment-of-retell",
    "TOOL_SECRET": WEBHOOK_SECRET,
    "TOOL_AUTHORIZATION": "Bearer of-the-tools",
}


def environment(**variables):
    """As it is, without the variables that the examples know."""
    known = [*ACCOUNTS, "ELECTRON_URL", "ELECTRON_API_KEY", "ELECTRON_TIMEOUT", "TOOL_PORT"]
    kept = {name: value for name, value in os.environ.items() if name not in known}
    return {**kept, "PYTHONDONTWRITEBYTECODE": "1", **variables}


def run(program, *, lines=(), **variables):
    """Runs an example to its end with these lines for its input."""
    return subprocess.run(
        [sys.executable, EXAMPLES / program],
        input="".join(f"{line}\n" for line in lines),
        env=environment(NO_PROXY="127.0.0.1", **variables),
        capture_output=True,
        text=True,
        timeout=WITHIN,
    )


# === The configuration ===


def check(folder, text, **variables):
    config = folder / "phone_agent.toml"
    config.write_text(text)
    command = [os.environ["ELECTRON_GATEWAY_BIN"], "check", "--config", config]
    return subprocess.run(command, env=environment(**variables), capture_output=True, text=True, timeout=WITHIN)


def with_accounts():
    """The configuration with everything in it that is commented out."""
    return re.sub(r"^# (\[.*\]|\w+ = .*)$", r"\1", CONFIG, flags=re.MULTILINE)


def test_the_configuration_needs_no_account(tmp_path):
    checked = check(tmp_path, CONFIG)
    assert checked.returncode == 0, checked.stderr
    assert "the agent `shop`" in checked.stdout


def test_the_configuration_is_right_with_all_accounts(tmp_path):
    checked = check(tmp_path, with_accounts(), **ACCOUNTS)
    assert checked.returncode == 0, checked.stderr
    for setting in ('public_url = "https://voice.example.com"', 'auth_token = "(hidden)"', 'secret = "(hidden)"'):
        assert setting in checked.stdout
    assert not any(secret in checked.stdout for secret in ACCOUNTS.values())


@pytest.mark.parametrize("missing", ACCOUNTS)
def test_a_secret_that_is_missing_is_named(tmp_path, missing):
    given = {name: value for name, value in ACCOUNTS.items() if name != missing}
    checked = check(tmp_path, with_accounts(), **given)
    assert checked.returncode == 1
    assert f"the environment variable {missing} is not set" in checked.stderr


# === The bot for tools ===


class Tools:
    """A running `tool_bot.py`."""

    def __init__(self, port=0, secret=WEBHOOK_SECRET):
        self.process = subprocess.Popen(
            [sys.executable, EXAMPLES / "tool_bot.py", str(port)],
            env=environment(TOOL_SECRET=secret, NO_PROXY="127.0.0.1"),
            stderr=subprocess.PIPE,
            text=True,
            # Whoever runs the tests in the background may have them ignore Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.log = [self.process.stderr.readline()]
        self.url = self.log[0].split()[-1]
        assert self.url.startswith("http://127.0.0.1:"), self.log
        self.reader = threading.Thread(target=lambda: self.log.extend(self.process.stderr), daemon=True)
        self.reader.start()

    def call(self, name, arguments, message_id="call_1", secret=WEBHOOK_SECRET, age=0, output_url=""):
        """Sends a call as the gateway does."""
        call = {
            "session": "sess_1",
            "call_id": message_id,
            "name": name,
            "arguments": arguments,
            "agent": "shop",
            "caller": {},
            "output_url": output_url,
            "output_token": "token-of-the-call",
        }
        body = json.dumps(call)
        sent = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(seconds=age)
        headers = {
            "content-type": "application/json",
            "webhook-id": message_id,
            "webhook-timestamp": str(int(sent.timestamp())),
            "webhook-signature": standardwebhooks.Webhook(secret).sign(message_id, sent, body),
        }
        return httpx.post(self.url, content=body, headers=headers)

    def stop(self):
        """As Ctrl-C does."""
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(WITHIN) == 0
        self.reader.join(WITHIN)
        text = "".join(self.log)
        assert text.endswith("Stopped.\n")
        assert "Traceback" not in text, text


@contextlib.contextmanager
def running_tools(**options):
    tools = Tools(**options)
    try:
        yield tools
        tools.stop()
    finally:
        tools.process.kill()
        tools.process.wait()


@pytest.fixture(scope="module")
def tools():
    with running_tools() as tools:
        yield tools


def test_a_tool_answers_at_once(tools):
    answer = tools.call("order_status", {"order_id": "1234"}, "call_packed")
    assert (answer.status_code, answer.json()) == (200, {"state": "packed"})
    answer = tools.call("order_status", {"order_id": "0000"}, "call_none")
    assert (answer.status_code, answer.json()) == (200, {"error": "There is no such order."})


def test_a_slow_tool_answers_later_and_only_once(tools, bot):
    sent = threading.Event()

    def taken(_):
        sent.set()
        return 200, "application/json", b"{}"

    bot.answers["/late"] = taken
    for _ in range(2):
        arguments = {"day": "monday", "part_of_day": "morning"}
        assert tools.call("book_callback", arguments, "call_slow", output_url=f"{bot.url}/late").status_code == 202
    assert sent.wait(WITHIN)
    # A second one would have been under way at the same time; this call is answered after it.
    assert tools.call("order_status", {"order_id": "1234"}, "call_after").status_code == 200
    [result] = bot.asked("/late")
    assert result.call == {"booked": "monday morning"}
    assert result.headers["authorization"] == "Bearer token-of-the-call"
    assert result.headers["content-type"] == "application/json"


@pytest.mark.parametrize("wrong", [{"secret": "whsec_" + "B" * 32}, {"age": 600}], ids=["secret", "time"])
def test_a_call_of_somebody_else_is_refused(tools, wrong):
    answer = tools.call("order_status", {"order_id": "1234"}, "call_strange", **wrong)
    assert answer.status_code == 401
    assert "TOOL_SECRET" in answer.json()["error"]


@pytest.mark.parametrize("signature", [None, "v1,AAAA", "v1", "nonsense", "v1,=,"])
def test_a_call_without_a_right_signature_is_refused(tools, signature):
    headers = {"webhook-id": "call_unsigned", "webhook-timestamp": "0"}
    if signature:
        headers["webhook-signature"] = signature
    assert httpx.post(tools.url, json={"name": "order_status"}, headers=headers).status_code == 401


def test_what_is_no_call_is_refused(tools):
    answer = tools.call("pay_order", {})
    assert (answer.status_code, "pay_order" in answer.text) == (404, True)
    assert tools.call("order_status", "not an object").status_code == 404
    assert httpx.post(tools.url, content=b"x" * 100_000).status_code == 413


def test_an_unsigned_call_is_taken_without_a_secret():
    with running_tools(secret="") as tools:
        call = {"name": "order_status", "arguments": {"order_id": "5678"}}
        answer = httpx.post(tools.url, json=call, headers={"webhook-id": "call_1"})
        assert (answer.status_code, answer.json()) == (200, {"state": "shipped"})
        for body in (b"[]", b"nonsense", b"\xff"):
            assert httpx.post(tools.url, content=body, headers={"webhook-id": "call_2"}).status_code == 400
        assert httpx.post(tools.url, json=call).status_code == 400


def test_a_port_that_is_taken_is_told(tools):
    port = httpx.URL(tools.url).port
    done = subprocess.run(
        [sys.executable, EXAMPLES / "tool_bot.py", str(port)], capture_output=True, text=True, timeout=WITHIN
    )
    assert done.returncode == 1
    assert f"Port {port} cannot be used" in done.stderr
    assert "Traceback" not in done.stderr


# === With the gateway ===


def agent(name, port, tool_choice):
    """The agent of the example under another name, with tools at this port, made to call this one."""
    text = CONFIG[CONFIG.index("# === the agent ===") :]
    changes = [
        ("agents.shop", f"agents.{name}"),
        ("127.0.0.1:9000", f"127.0.0.1:{port}"),
        ('tool_choice = "auto"', f'tool_choice = "{tool_choice}"'),
        ("max_tool_rounds = 4", "max_tool_rounds = 1"),
        ("max_tokens = 120", "max_tokens = 64"),
        ("temperature = 0.3", "temperature = 0.0"),
        ('# secret = "env:TOOL_SECRET"', f'secret = "{WEBHOOK_SECRET}"'),
    ]
    for old, new in changes:
        assert old in text, f"the example has no {old} any more"
        text = text.replace(old, new)
    return text


INSTRUCTIONS = """
instructions = "You are a friendly phone agent. Briefly acknowledge out loud before using any tool."
max_tokens = 64
temperature = 0.0
"""

OWN_TOOLS = f"""
[agents.own_tools]
tool_choice = "order_status"
{INSTRUCTIONS}
[[agents.own_tools.tools]]
name = "order_status"
parameters = {{ type = "object", required = ["order_id"], properties.order_id.enum = ["1234"] }}

[agents.leaving]
tool_choice = "required"
{INSTRUCTIONS}
"""


@pytest.fixture(scope="module")
def ivr_port():
    return free_port()


@pytest.fixture(scope="module")
def gateway(tmp_path_factory, tools, ivr_port):
    port = httpx.URL(tools.url).port
    agents = [
        agent("shop", port, "order_status"),
        agent("slow", port, "book_callback"),
        agent("ivr", ivr_port, "order_status"),
        OWN_TOOLS,
    ]
    networks = '[tools]\nallow_networks = ["127.0.0.1"]\n'
    gateway = start(tmp_path_factory.mktemp("examples"), "\n".join(agents), networks)
    yield gateway
    stop(gateway)


def called(gateway, name):
    return gateway.metric("electron_tool_seconds_count", agent=name, kind="http", result="ok")


def test_vapi_is_answered(gateway):
    before = called(gateway, "shop")
    url = f"{gateway.url}/agents/shop/v1"
    done = run("vapi_call.py", lines=["Where is my order 1234?"], ELECTRON_URL=url, ELECTRON_API_KEY=KEY)
    assert done.returncode == 0, done.stderr
    greeting, answer = done.stdout.split("\n", 1)
    assert greeting == "Hello, this is Corner Books. How can I help you?"
    assert answer.strip()
    assert called(gateway, "shop") > before


def test_vapi_runs_its_own_tools(gateway):
    url = f"{gateway.url}/agents/leaving/v1"
    done = run("vapi_call.py", lines=["Goodbye!", "Hello?"], ELECTRON_URL=url, ELECTRON_API_KEY=KEY)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("[Vapi runs endCall]\n")


def test_vapi_is_told_what_is_wrong(gateway):
    url = f"{gateway.url}/agents/shop/v1"
    refused = run("vapi_call.py", lines=["Hello!"], ELECTRON_URL=url, ELECTRON_API_KEY="wrong")
    assert refused.returncode == 1
    assert "The gateway refused: 401" in refused.stderr
    missing = run("vapi_call.py", lines=["Hello!"], ELECTRON_URL=f"http://127.0.0.1:{free_port()}/v1")
    assert missing.returncode == 1
    assert "cannot be reached" in missing.stderr


def test_a_late_result_reaches_the_caller(gateway, tools):
    before = len(tools.log)
    body = {"model": "electron", "messages": [{"role": "user", "content": "Please call me on Monday morning."}]}
    with gateway.http() as http:
        answer = http.post("/agents/slow/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert called(gateway, "slow") >= 1
    asked = [line for line in tools.log[before:] if line.startswith("book_callback")]
    assert asked and all(": 202 " in line for line in asked), asked


def ivr(gateway, name, lines, **variables):
    """What the bot speaks, and what it logs."""
    usual = {
        "ELECTRON_URL": f"{gateway.url}/agents/{name}/v1",
        "ELECTRON_API_KEY": KEY,
        "TOOL_PORT": "0",
        "TOOL_SECRET": WEBHOOK_SECRET,
    }
    done = run("ivr_bot.py", lines=lines, **usual | variables)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout.splitlines(), done.stderr.splitlines()


GREETING = "Hello, this is Corner Books. How can I help you?"
APOLOGY = "I'm sorry, I could not get that. Could you say it again?"
FAREWELL = "Thank you for calling. Goodbye!"


def test_the_ivr_bot_speaks_and_answers_callbacks(gateway, ivr_port):
    spoken, logged = ivr(gateway, "ivr", ["Where is my order 1234?", "And 5678?"], TOOL_PORT=str(ivr_port))
    assert spoken[0] == GREETING
    # To each at least the phrase before the tool runs.
    assert len(spoken) >= 3, spoken
    assert all(spoken) and APOLOGY not in spoken
    assert len([line for line in logged if line.startswith("order_status {") and ": 200 " in line]) == 2, logged


def test_the_ivr_bot_runs_tools_without_a_callback(gateway):
    spoken, logged = ivr(gateway, "own_tools", ["Where is my order 1234?"])
    # The agent has to call in each round, up to the last that the bot allows.
    assert logged == ["[order_status {'order_id': '1234'}]"] * 3
    assert len(spoken) >= 4, spoken
    assert APOLOGY not in spoken


def test_the_ivr_bot_hangs_up(gateway):
    spoken, logged = ivr(gateway, "leaving", ["Goodbye!", "Hello?"])
    assert logged == ["[hang_up {}]"]
    assert spoken[-1] == FAREWELL


def test_the_ivr_bot_outlives_a_wrong_key(gateway):
    spoken, logged = ivr(gateway, "ivr", ["Hello?", "Hello?"], ELECTRON_API_KEY="wrong")
    assert spoken == [GREETING, APOLOGY, APOLOGY]
    assert "the gateway refused: 401" in logged[0]


# === A gateway that fails ===


def test_the_ivr_bot_outlives_a_gateway_that_is_gone():
    done = run("ivr_bot.py", lines=["Hello?"], ELECTRON_URL=f"http://127.0.0.1:{free_port()}/v1", TOOL_PORT="0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [GREETING, APOLOGY]
    assert "Is the gateway running?" in done.stderr


def test_the_ivr_bot_outlives_a_gateway_that_is_silent():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        done = run("ivr_bot.py", lines=["Hello?"], ELECTRON_URL=url, TOOL_PORT="0", ELECTRON_TIMEOUT="0.2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [GREETING, APOLOGY]
    assert "silent for 0.2 s; see ELECTRON_TIMEOUT" in done.stderr


def chunk(content=None, reason=None, **delta):
    if content is not None:
        delta["content"] = content
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}


def stream(*chunks, end=""):
    """An answer of these chunks."""
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + end
    return lambda request: (200, "text/event-stream", body.encode())


CUT_CALL = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "hang_up", "arguments": "{"}}


@pytest.mark.parametrize(
    ("last", "why"),
    [
        (chunk(" It wi"), "closed the connection in the middle of an answer"),
        ({"error": {"message": "the model is gone"}}, "the answer broke off: the model is gone"),
        (chunk(reason="length", tool_calls=[CUT_CALL]), "raise it"),
    ],
    ids=["closed", "error", "cut"],
)
def test_the_ivr_bot_keeps_what_was_heard_of_a_broken_answer(bot, last, why):
    path = f"/broken/{why[:6].replace(' ', '_')}/v1"
    bot.answers[f"{path}/chat/completions"] = stream(chunk("It costs 3.50"), chunk(" euros. "), last)
    done = run("ivr_bot.py", lines=["Price?", "Sorry?"], ELECTRON_URL=f"{bot.url}{path}", TOOL_PORT="0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [GREETING, *["It costs 3.50 euros.", APOLOGY] * 2]
    assert why in done.stderr
    asked = bot.asked(f"{path}/chat/completions")[-1].call
    assert asked["messages"] == [
        {"role": "assistant", "content": GREETING},
        {"role": "user", "content": "Price?"},
        {"role": "assistant", "content": f"It costs 3.50 euros. {APOLOGY}"},
        {"role": "user", "content": "Sorry?"},
    ]


def test_the_ivr_bot_asks_with_the_latest_messages(bot):
    url = f"{bot.url}/long/v1"
    bot.answers["/long/v1/chat/completions"] = stream(chunk("Yes."), chunk(reason="stop"), end="data: [DONE]\n\n")
    done = run("ivr_bot.py", lines=range(50), ELECTRON_URL=url, TOOL_PORT="0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [GREETING, *["Yes."] * 50]
    messages = bot.asked("/long/v1/chat/completions")[-1].call["messages"]
    assert 30 <= len(messages) <= 40
    assert messages[0]["role"] == "user"
    assert messages[-1] == {"role": "user", "content": "49"}
