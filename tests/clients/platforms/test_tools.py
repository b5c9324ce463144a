"""Tools that are callbacks: the gateway calls a bot, in every dialect, and one outcome comes of each call."""

import asyncio
import collections
import json
import os
import pathlib
import subprocess
import sys
import threading
import time

import crowd
import httpx
import openai
import pytest
from conftest import KEY, WEBHOOK_SECRET, Bot, free_port, start, stop
from standardwebhooks import Webhook, WebhookVerificationError
from talks import (
    BRIEF,
    HOST,
    LATER,
    ORDER_STATUS,
    PATIENCE,
    VOICE,
    Held,
    agent,
    ask,
    ask_in_talk,
    ask_on_line,
    calls_of,
    chat,
    check_outcome,
    conversation,
    example,
    line,
    only_call,
    result,
    sdk,
    talk,
    user,
    words_of,
)

ASKED = "Where is my order A?"
SHIPPED = {"status": "shipped"}

DIALECTS = {
    "chat": chat,
    "streamed chat": lambda *args, **options: chat(*args, stream=True, **options),
    "responses": ask,
    "streamed responses": lambda *args, **options: ask(*args, stream=True, **options),
    "responses over WebSocket": ask_on_line,
    "realtime": ask_in_talk,
}

# Nothing listens there while the tests run.
CLOSED = free_port()


@pytest.fixture(scope="module")
def other_bot():
    """Whoever is sent on to it was led astray."""
    bot = Bot()
    yield bot
    bot.close()


@pytest.fixture(scope="module")
def gateway(bot, tmp_path_factory):
    agents = [
        HOST,
        # Its calls take as long as a busy machine needs, and nothing is said meanwhile.
        agent("desk", f"{bot.url}/desk", ', timeout = "90s"', still_waiting_after="0s"),
        agent("pair", f"{bot.url}/pair", max_tokens=96, parallel_tool_calls=True),
        agent("hasty", f"{bot.url}/hasty", ', timeout = "2s"'),
        agent("again", f"{bot.url}/again", ", idempotent = true"),
        agent("closed", f"http://127.0.0.1:{CLOSED}/closed", ', timeout = "2s"'),
        agent("nowhere", "http://no-such-host.invalid/nowhere", ', timeout = "2s"'),
    ]
    settings = (
        f'[tools]\nallow_networks = ["127.0.0.1/32"]\nallow_urls = ["{bot.url}/", "http://10.9.8.7/", '
        '"http://169.254.169.254/", "http://[::1]:8080/"]\n'
    )
    gateway = start(tmp_path_factory.mktemp("gateway"), "\n".join(agents), settings)
    yield gateway
    stop(gateway)


@pytest.fixture(autouse=True)
def at_rest(bot):
    """The bot knows of nothing, and answers as it does when it is not told otherwise."""
    bot.requests.clear()
    bot.answers.clear()


def verified(request, secret=WEBHOOK_SECRET):
    """What is in a message, after Standard Webhooks' own library has verified it."""
    return Webhook(secret).verify(request.body, request.headers)


def items_of(gateway, session):
    with gateway.http() as http:
        answer = http.get(f"/v1/sessions/{session}")
        assert answer.status_code == 200, answer.text
        return answer.json()["items"]


def seconds_count(gateway, **labels):
    return gateway.metric("electron_tool_seconds_count", kind="http", **labels)


# === what the bot is sent ===


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_call_is_signed_and_says_what_is_called(gateway, bot, dialect):
    # The agent is chosen by the model's name, or by the path.
    by_path = dialect in ("streamed chat", "responses", "realtime")
    said = DIALECTS[dialect](gateway, "desk", ASKED, by_path, phone="+15551234567")
    [request] = bot.asked("/desk")
    call = verified(request)
    assert call == request.call
    assert set(call) == {
        "session", "call_id", "name", "arguments", "agent", "caller", "output_url", "output_token",
    }  # fmt: skip
    assert (call["name"], call["agent"], call["caller"]) == ("order_status", "desk", {"phone": "+15551234567"})
    assert call["arguments"] in ({"order": "A"}, {"order": "B"})
    assert call["session"].startswith("sess_") and call["call_id"].startswith("call_")
    assert call["output_url"] == f"{gateway.url}/v1/sessions/{call['session']}/tool_calls/{call['call_id']}/output"
    assert len(call["output_token"]) >= 32
    assert request.headers["webhook-id"] == call["call_id"]
    assert request.headers["content-type"] == "application/json"
    assert request.headers["user-agent"].startswith("electron-gateway/")
    for changed in (request.body.replace(b"desk", b"disk"), request.body + b" ", b"{}"):
        with pytest.raises(WebhookVerificationError):
            Webhook(WEBHOOK_SECRET).verify(changed, request.headers)
    for name in ("webhook-id", "webhook-timestamp"):
        with pytest.raises(WebhookVerificationError):
            Webhook(WEBHOOK_SECRET).verify(request.body, {**request.headers, name: "1700000000"})
    if isinstance(said, str):
        assert said.strip()
        return
    done = only_call(said)
    check_outcome(done)
    assert (done["name"], json.loads(done["arguments"])) == ("order_status", call["arguments"])
    assert done["server_label"] == "callbacks" and json.loads(done["output"]) == SHIPPED
    assert words_of(said)


def test_calls_of_one_turn_run_at_once(gateway, bot):
    meeting = threading.Barrier(2)

    def answer(request):
        # Neither is answered before both are there.
        meeting.wait(PATIENCE)
        return result({"order": request.call["arguments"]["order"]})

    bot.answers["/pair"] = answer
    client, model = sdk(gateway, "pair")
    with client:
        asked = "Where are my orders A and B?"
        given = [*example(asked, {"order": "A"}, {"order": "B"}, words="Both are shipped."), user(asked)]
        items = client.responses.create(model=model, input=given).to_dict()["output"]
    calls = calls_of(items)
    if len(calls) < 2:
        pytest.skip("here the model called once only")
    requests = bot.asked("/pair")
    assert len(calls) == len(requests) == len({request.call["output_token"] for request in requests})
    assert {call["call_id"] for call in calls} == {request.headers["webhook-id"] for request in requests}
    for call in calls:
        check_outcome(call)
        assert json.loads(call["output"]) == {"order": json.loads(call["arguments"])["order"]}


# === results that come later ===


class Waiting:
    """A call of a Realtime session, which waits for a result that the bot has promised."""

    def __init__(self, gateway, request):
        self.gateway = gateway
        self.call = request.call
        self.session = self.call["session"]
        self.path = f"/v1/sessions/{self.session}/tool_calls/{self.call['call_id']}/output"

    async def post(self, status, body=SHIPPED, key=None, path=None, kind="application/json"):
        """Sends a result, which is answered with this status. Without being taken it changes nothing."""
        key = self.call["output_token"] if key is None else key
        headers = {"content-type": kind, **({"authorization": f"Bearer {key}"} if key else {})}
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        before = await self.items()
        async with httpx.AsyncClient(base_url=self.gateway.url, timeout=PATIENCE) as http:
            answer = await http.post(path or self.path, headers=headers, content=content)
        assert answer.status_code == status, answer.text
        if status == 200:
            assert answer.json()["accepted"] is True and answer.json()["call_id"] == self.call["call_id"]
            return
        assert answer.json()["error"]["message"]
        assert await self.items() == before

    async def items(self):
        return await asyncio.to_thread(items_of, self.gateway, self.session)


async def wait_for_later(gateway, bot, talked, path="/desk"):
    """Lets the model call, and the bot promise a result."""
    held = bot.answers.setdefault(path, Held())
    await talked.ask(ASKED)
    await talked.until("response.mcp_call.in_progress")
    request, answer = await held.next()
    answer.set_result(LATER)
    verified(request)
    return Waiting(gateway, request)


@conversation
async def test_a_result_comes_later_and_counts_once(gateway, bot):
    async with talk(gateway, "desk") as talked, talk(gateway, "desk") as stranger:
        waiting = await wait_for_later(gateway, bot, talked)
        other = await wait_for_later(gateway, bot, stranger)
        refused = gateway.metric("electron_tool_results_refused_total")
        # Who has no right to it.
        await waiting.post(401, key="")
        for wrong in ("out_wrong", "no-such-key", other.call["output_token"], waiting.call["output_token"] + "x"):
            await waiting.post(401, key=wrong)
        # What is elsewhere.
        forged = waiting.path.replace(waiting.session, "sess_forged")
        for key in (None, KEY):
            await waiting.post(404, key=key, path=forged)
        mixed = f"/v1/sessions/{waiting.session}/tool_calls/{other.call['call_id']}/output"
        await waiting.post(401, path=mixed)
        await waiting.post(401, path=mixed, key=other.call["output_token"])
        await waiting.post(404, path=mixed, key=KEY)
        # What is no result.
        await waiting.post(413, body=b'"' + b"x" * (64 << 10) + b'"')
        await waiting.post(413, body=b"x" * (2 << 20), kind="text/plain")
        await waiting.post(400, body=b"\xff\xfe", kind="text/plain")
        await waiting.post(400, body=b'{"status": "ship')
        await waiting.post(400, body=b"")
        assert gateway.metric("electron_tool_results_refused_total") == refused + 15
        [running] = calls_of(await waiting.items())
        assert (running["status"], running["output"], running["error"]) == ("calling", None, None)
        # The first one counts.
        await waiting.post(200, {"status": "late"})
        response = (await talked.until("response.done"))[-1].response.to_dict()
        call = only_call(response["output"])
        check_outcome(call)
        assert json.loads(call["output"]) == {"status": "late"} and words_of(response["output"])
        for key in (None, KEY):
            await waiting.post(409, {"status": "later still"}, key=key)
        await waiting.post(401, key="out_wrong")
        [kept] = calls_of(await waiting.items())
        assert json.loads(kept["output"]) == {"status": "late"}
        # The session's key will do, too, and plain text.
        await other.post(200, b" shipped yesterday\n", key=KEY, kind="text/plain; charset=utf-8")
        response = (await stranger.until("response.done"))[-1].response.to_dict()
        assert only_call(response["output"])["output"] == "shipped yesterday"
        await other.post(409)


@conversation
async def test_a_result_may_come_before_the_answer(gateway, bot):
    bot.answers["/desk"] = held = Held()
    async with talk(gateway, "desk") as talked:
        await talked.ask(ASKED)
        request, answer = await held.next()
        waiting = Waiting(gateway, request)
        await waiting.post(200, {"status": "first"})
        answer.set_result(result({"status": "second"}))
        response = (await talked.until("response.done"))[-1].response.to_dict()
        assert json.loads(only_call(response["output"])["output"]) == {"status": "first"}
        await waiting.post(409)


@conversation
async def test_a_result_that_is_late_is_refused(gateway, bot):
    before = seconds_count(gateway, agent="hasty", result="timeout")
    async with talk(gateway, "hasty") as talked:
        waiting = await wait_for_later(gateway, bot, talked, "/hasty")
        response = (await talked.until("response.done"))[-1].response.to_dict()
        check_outcome(only_call(response["output"]))
        assert only_call(response["output"])["status"] == "failed" and words_of(response["output"])
        await waiting.post(409)
        await waiting.post(409, key=KEY)
        await waiting.post(401, key="out_wrong")
    assert seconds_count(gateway, agent="hasty", result="timeout") == before + 1


@conversation
async def test_a_result_for_a_session_that_has_ended_is_refused(gateway, bot):
    async with talk(gateway, "desk") as talked:
        waiting = await wait_for_later(gateway, bot, talked)
        with gateway.http() as http:
            assert http.delete(f"/v1/sessions/{waiting.session}").status_code == 200
            for key in (waiting.call["output_token"], KEY):
                headers = {"authorization": f"Bearer {key}"}
                assert http.post(waiting.path, headers=headers, json=SHIPPED).status_code == 404


# === tools that clients declare ===


def declared(url, **callback):
    return {"type": "function", **ORDER_STATUS, "callback": {"url": url, **callback}}


CHOICE = {"type": "function", "name": "order_status"}


def check_declared(bot, items, agent, caller):
    assert not [item for item in items if item["type"] == "function_call"], "the gateway runs it, not the client"
    # Without an agent nothing keeps the model from calling again.
    calls, requests = calls_of(items), bot.asked("/declared")
    assert words_of(items) and 1 <= len(calls) == len(requests) and (agent is None or len(calls) == 1)
    for call, request in zip(calls, requests, strict=True):
        check_outcome(call)
        assert (call["server_label"], json.loads(call["output"])) == ("callbacks", SHIPPED)
        told = verified(request)
        assert (told["agent"], told["caller"], told["arguments"]) == (agent, caller, json.loads(call["arguments"]))
        assert request.headers["x-shop"] == "berlin"


def own_tool(bot):
    return declared(f"{bot.url}/declared", secret=WEBHOOK_SECRET, headers={"x-shop": "berlin"}, timeout=30)


@conversation
async def test_a_tool_declared_over_a_responses_websocket(gateway, bot):
    async with line(gateway) as asked:
        response = await asked.answer(
            ASKED, instructions=VOICE, tools=[own_tool(bot)], tool_choice=CHOICE, metadata={"shop": "1"}, **BRIEF
        )
    check_declared(bot, response["output"], None, {"shop": "1"})
    # What was declared is told, its secrets are not.
    assert response["tools"][0]["callback"]["url"] == f"{bot.url}/declared"
    assert WEBHOOK_SECRET not in json.dumps(response) and "berlin" not in json.dumps(response)


@conversation
async def test_a_tool_declared_over_realtime(gateway, bot):
    async with talk(gateway, "host", shop="1") as talked:
        session = await talked.set(
            instructions=VOICE, tools=[own_tool(bot)], tool_choice=CHOICE, metadata={"shop": "1"}, **BRIEF
        )
        assert WEBHOOK_SECRET not in json.dumps(session.to_dict())
        response = await talked.answer(ASKED)
        check_declared(bot, response["output"], "host", {"shop": "1"})
        kept = items_of(gateway, session.id)
        assert calls_of(kept) == calls_of(response["output"])


# A name that is not on the list, another port, another path, an address inside, secrets that are none.
NOT_TO_BE_ASKED = {
    "not on the list": ("https://bot.example.com/tools", {}),
    "another port": ("http://127.0.0.1:1/declared", {}),
    "private": ("http://10.9.8.7/declared", {}),
    "metadata of a cloud": ("http://169.254.169.254/latest/meta-data/", {}),
    "IPv6 loopback": ("http://[::1]:8080/declared", {}),
    "with a password": ("http://a:b@127.0.0.1/declared", {}),
    "no URL": ("declared", {}),
    "a secret that is none": (None, {"secret": "whsec_short"}),
    "a header of the gateway's": (None, {"headers": {"webhook-id": "mine"}}),
    "an endless timeout": (None, {"timeout": 100000}),
}


@pytest.mark.parametrize("case", NOT_TO_BE_ASKED)
def test_a_tool_that_may_not_be_declared(gateway, bot, case):
    url, more = NOT_TO_BE_ASKED[case]
    tool = declared(url or f"{bot.url}/declared", **more)
    client, model = sdk(gateway)
    with client, pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model=model, input=ASKED, tools=[tool])
    assert caught.value.param.startswith("tools[0].callback") and caught.value.body["message"]

    @conversation
    async def over_sockets():
        async with line(gateway) as asked:
            await asked.ask(ASKED, tools=[tool])
            error = (await asked.until("error"))[-1]
            assert error.to_dict()["status"] == 400 and error.param.startswith("tools[0].callback")
        async with talk(gateway) as talked:
            await talked.connection.session.update(session={"type": "realtime", "tools": [tool]})
            error = (await talked.until("error"))[-1].error
            assert error.param.startswith("session.tools[0].callback")
            assert (await talked.set()).tools == []

    over_sockets()
    assert bot.requests == []


# === faults ===


def hang(request):
    threading.Event().wait(4)


def huge(request):
    return 200, "text/plain", b"x" * (10 << 20)


def redirect(status, to):
    return lambda request: (status, "text/plain", b"", [("location", to)])


METADATA = "http://169.254.169.254/latest/meta-data/"

# The agent; what its bot does; the results of the call and of its attempts; how often the bot is asked, where known.
FAULTS = {
    "hangs": ("hasty", hang, "timeout", {"timeout": 1}, 1),
    "closes": ("desk", lambda _: None, "protocol", {"protocol": 1}, 1),
    "fails": ("desk", lambda _: (500, "text/plain", b"stack trace"), "status", {"status": 1}, 1),
    "sends half of its JSON": ("desk", lambda _: (200, "application/json", b'{"a": '), "invalid", {"invalid": 1}, 1),
    "sends no text": ("desk", lambda _: (200, "text/plain", b"\xff\xfe\x00"), "invalid", {"invalid": 1}, 1),
    "sends 10 MiB": ("desk", huge, "too_large", {"too_large": 1}, 1),
    "sends on to a cloud's metadata": ("desk", redirect(302, METADATA), "status", {"status": 1}, 1),
    "is always busy": ("hasty", lambda _: (503, "text/plain", b""), "status", None, None),
    "asks for too much patience": (
        "hasty", lambda _: (429, "text/plain", b"", [("retry-after", "3600")]), "status", {"status": 1}, 1,
    ),
    "is not there": ("closed", None, "refused", None, 0),
    "has a name that is none": ("nowhere", None, "refused", None, 0),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bot_that(gateway, bot, fault):
    agent, answer, outcome, attempts, asked = FAULTS[fault]
    if answer:
        bot.answers[f"/{agent}"] = answer
    labels = {"agent": agent, "result": outcome}
    before = seconds_count(gateway), seconds_count(gateway, **labels)
    tried = {name: gateway.metric("electron_tool_attempts_total", result=name) for name in attempts or {outcome: 1}}
    with gateway.http() as http:
        answered = http.post("/v1/responses", json={"model": f"electron:{agent}", "input": ASKED})
    assert answered.status_code == 200, answered.text
    items = answered.json()["output"]
    call = only_call(items)
    check_outcome(call)
    assert call["status"] == "failed" and words_of(items), "the caller is told in words"
    for hidden in ("127.0.0.1", "169.254", "no-such-host", "stack trace", bot.url):
        assert hidden not in json.dumps(call), "what the model reads holds no address"
    assert (seconds_count(gateway), seconds_count(gateway, **labels)) == (before[0] + 1, before[1] + 1)
    for name, count in tried.items():
        more = gateway.metric("electron_tool_attempts_total", result=name) - count
        assert more == attempts[name] if attempts else more >= 2
    if asked is not None:
        assert len(bot.asked(f"/{agent}")) == asked
    assert len({verified(request)["call_id"] for request in bot.requests}) <= 1
    lines = [line for line in gateway.log.read_text().splitlines() if call["call_id"] in line]
    assert [line for line in lines if "tool failed" in line and f'result="{outcome}"' in line], lines
    assert [line for line in lines if "an attempt to call a tool failed" in line], lines


@pytest.mark.parametrize("status", [302, 307])
def test_a_redirect_is_not_followed(gateway, bot, other_bot, status):
    bot.answers["/desk"] = redirect(status, f"{other_bot.url}/desk")
    call = only_call(ask_unchecked(gateway, "desk"))
    assert call["status"] == "failed" and len(bot.asked("/desk")) == 1
    assert other_bot.requests == []


def ask_unchecked(gateway, agent):
    with gateway.http() as http:
        answer = http.post("/v1/responses", json={"model": f"electron:{agent}", "input": ASKED})
    assert answer.status_code == 200, answer.text
    return answer.json()["output"]


def first(*answers):
    """Answers with each of these once, and then well."""
    left = list(answers)
    return lambda request: left.pop(0) if left else result(SHIPPED)


def check_attempts(requests, count):
    """Attempts are the same message, each signed anew."""
    assert len(requests) == count
    assert len({request.body for request in requests}) == 1
    assert len({request.headers["webhook-id"] for request in requests}) == 1
    times = [int(request.headers["webhook-timestamp"]) for request in requests]
    assert times == sorted(times)
    for request in requests:
        verified(request)


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_bot_is_asked_again_when_it_wants_to_be(gateway, bot, status):
    bot.answers["/desk"] = first((status, "text/plain", b"", [("retry-after", "1")]), (status, "text/plain", b""))
    call = only_call(ask_unchecked(gateway, "desk"))
    assert call["status"] == "completed" and json.loads(call["output"]) == SHIPPED
    requests = bot.asked("/desk")
    check_attempts(requests, 3)
    assert requests[1].at - requests[0].at >= 1, "it was told not to ask earlier"


@pytest.mark.parametrize("answer", [(502, "text/plain", b""), (504, "text/plain", b""), None])
def test_what_may_have_been_done_is_done_again_only_where_that_does_no_harm(gateway, bot, answer):
    for path in ("/desk", "/again"):
        bot.answers[path] = first(answer)
    call = only_call(ask_unchecked(gateway, "again"))
    assert call["status"] == "completed" and json.loads(call["output"]) == SHIPPED
    check_attempts(bot.asked("/again"), 2)
    call = only_call(ask_unchecked(gateway, "desk"))
    assert call["status"] == "failed"
    check_attempts(bot.asked("/desk"), 1)


# === addresses ===


def test_a_name_that_leads_inside_is_not_asked(bot, tmp_path):
    """Where only public networks are allowed, a name may well be one of an address inside."""
    port = bot.url.rpartition(":")[2]
    settings = f'[tools]\nallow_urls = ["{bot.url}/"]\n'
    gateway = start(tmp_path, agent("inside", f"http://localhost:{port}/inside"), settings)
    try:
        items = ask_unchecked(gateway, "inside")
        call = only_call(items)
        check_outcome(call)
        assert call["status"] == "failed" and words_of(items)
        assert seconds_count(gateway, agent="inside", result="forbidden") == 1
        assert gateway.metric("electron_tool_attempts_total", result="forbidden") == 1
        lines = [line for line in gateway.log.read_text().splitlines() if call["call_id"] in line]
        assert [line for line in lines if "tool failed" in line and 'result="forbidden"' in line]
        # A client may name it, but not reach it.
        client, model = sdk(gateway)
        with client, pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(model=model, input=ASKED, tools=[declared(f"{bot.url}/inside")])
        assert caught.value.param.startswith("tools[0].callback")
    finally:
        stop(gateway)
    assert bot.requests == []


def test_an_agent_may_not_name_an_address_inside(bot, tmp_path):
    config = tmp_path / "config.toml"
    config.write_text(agent("inside", f"{bot.url}/inside"))
    command = [os.environ["ELECTRON_GATEWAY_BIN"], "check", "--config", str(config)]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert checked.returncode != 0 and "agents.inside.tools[0].callback" in checked.stderr


NAMESPACES = ["unshare", "--mount", "--net"]


def test_a_name_that_turns_inside_is_not_asked(tmp_path):
    """A name that leads outside when it is first resolved and inside the next time, with a real resolver."""
    try:
        allowed = subprocess.run([*NAMESPACES, "true"], capture_output=True, timeout=PATIENCE).returncode == 0
    except FileNotFoundError:
        allowed = False
    if not allowed:
        pytest.skip("namespaces of one's own are not permitted here")
    helper = pathlib.Path(__file__).with_name("rebinding.py")
    command = [*NAMESPACES, sys.executable, str(helper), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode == 77:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert [call["status"] for call in seen["calls"]] == ["completed", "failed", "failed"]
    assert seen["outside"] == 1 and seen["inside"] == 0
    # Nothing is looked up and then looked up again.
    assert seen["resolved"] == ["outside", "inside", "inside"]
    assert seen["forbidden"] == 2


# === nothing is lost ===


def check_record(record, call):
    """What became of a call is what the bot was told of it."""
    assert record.asked == 1
    cancelled = call["status"] == "failed" and "cancelled" in json.dumps(call["error"])
    output = json.loads(call["output"]) if call["output"] else None
    assert all(status in (200, 404, 409) for status in record.posts), record
    if 200 in record.posts:
        # It was said to be taken.
        assert record.way in ("later", "first", "twice") and output == crowd.POSTED, (record, call)
    elif record.way in ("at once", "twice", "first"):
        assert cancelled or output == crowd.AT_ONCE, (record, call)
    else:
        assert call["status"] == "failed", (record, call)


def test_nothing_is_lost(bot, tmp_path):
    long = os.environ.get("ELECTRON_LONG") == "1"
    wanted, seed, callers, most = (200, 1, 24, 5) if long else (40, 2, 20, 2)
    began = time.monotonic()
    # Nobody's session may end before it was looked into.
    settings = '[session]\nresume_window = "1h"\n[tools]\nallow_networks = ["127.0.0.1/32"]\n'
    gateway = start(tmp_path, crowd.AGENT.replace("URL", f"{bot.url}/many"), settings)
    try:
        moods = bot.answers["/many"] = crowd.Moods(gateway, seed)

        async def talk_all():
            async with asyncio.timeout(900 if long else 400):
                return await crowd.crowd(gateway, wanted, seed, callers, most)

        seen = asyncio.run(talk_all())
        moods.close()
        seen.sessions.update(record.session for record in moods.calls.values())
        kept = crowd.at_rest(gateway, seen)
        counted = seconds_count(gateway, agent="many")
    finally:
        stop(gateway)
    assert set(seen.announced) <= set(kept), "every call that was announced is kept somewhere"
    calls = {}
    for item, versions in kept.items():
        # Realtime and Responses write an error in two ways.
        [outcome] = {(call["status"], call["output"], call["error"] is None) for call in versions}
        calls[item] = versions[0]
        assert item not in seen.done or outcome == (
            seen.done[item]["status"], seen.done[item]["output"], seen.done[item]["error"] is None,
        )  # fmt: skip
        assert seen.ends[item] <= 1, "one outcome is told"
    ran = {call["call_id"]: call for call in calls.values() if call["status"] != "incomplete"}
    for call in calls.values():
        if call["status"] == "incomplete":
            # The caller was gone before its arguments were complete.
            assert call["call_id"] not in moods.calls and call["output"] is call["error"] is None
        else:
            check_outcome(call)
    assert set(moods.calls) <= set(ran), "what the bot was asked is known"
    for call_id, record in moods.calls.items():
        check_record(record, ran[call_id])
    figures = {
        "calls": len(calls), "ran": len(ran), "asked": len(moods.calls), "counted": counted,
        "outcomes": collections.Counter(call["status"] for call in calls.values()),
        "moods": collections.Counter(record.way for record in moods.calls.values()),
        "posts": collections.Counter(status for record in moods.calls.values() for status in record.posts),
        "callers": seen.did, "sessions": len(seen.sessions), "seconds": round(time.monotonic() - began),
    }  # fmt: skip
    print(json.dumps(figures))
    assert len(calls) >= wanted and counted == len(ran), figures
