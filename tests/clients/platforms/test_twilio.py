"""Calls over Twilio ConversationRelay, from the webhook to the end, with the bot that runs the tools."""

import contextlib
import json
import signal
import threading

import httpx
import pytest
import websockets
from conftest import KEY, start, stop
from twilio import CALLED, CALLER, WITHIN, Call, post, sentence, signature, until

VOICE = (
    "You are a friendly phone agent of a flower shop. You help callers with their orders. Answer in one or two short "
    "sentences."
)
STORY = "You are a friendly phone agent who tells callers long stories about the sea."
FAREWELL = "Thank you for calling Flowers, and goodbye!"
LONG_FAREWELL = " ".join(["We thank you very much for your call."] * 7)
BILLING = "+493090182100"
FORMER = "+493090182111"
QUESTION = "Where is my order 1234?"
STORY_PLEASE = "Please tell me a long story about an old sailor and his ship."


def toml(name, path=None, bot=None, callback=None, tool=None, tables="", **settings):
    """An agent, with the tool `order_status` where there is a path for it."""
    settings = {"temperature": 0.0, "max_tokens": 40, "max_tool_rounds": 1, "instructions": VOICE, **settings}
    if path:
        settings.setdefault("tool_choice", "order_status")
        settings.setdefault("parallel_tool_calls", False)
    rows = [f"[agents.{name}]", *(f"{key} = {json.dumps(value)}" for key, value in settings.items()), tables]
    if path:
        callback = {"url": f"{bot.url}{path}", **(callback or {})}
        rows += [
            f"[[agents.{name}.tools]]",
            'name = "order_status"',
            'description = "Looks an order up by its number."',
            'parameters = {type = "object", required = ["order_id"], additionalProperties = false, properties = '
            '{order_id = {type = "string", minLength = 1, maxLength = 12}}}',
            *(f"{key} = {json.dumps(value)}" for key, value in (tool or {}).items()),
            f"[agents.{name}.tools.callback]",
            *(f"{key} = {json.dumps(value)}" for key, value in callback.items()),
        ]
    return "\n".join(rows) + "\n"


def keypad(dtmf):
    return {"instructions": VOICE, "max_tokens": 8, "tables": f"dtmf = {dtmf}"}


def agents(bot):
    desk = f'controls = ["transfer_call", "end_call"]\ntransfer_to = {{billing = "{BILLING}"}}'
    patient = {"callback": {"timeout": "300s"}, "still_waiting_after": "0s"}
    return "\n".join(
        [
            toml(
                "shop",
                "/shop",
                bot,
                greeting="Hello {{ customer }}, this is {{ agent }}. How can I help you today?",
                language="en-US",
            ),
            toml("cancelling", "/cancelling", bot, tool={"on_interrupt": "cancel"}, **patient),
            # With a seed the phrase is always the same, one that this model does not echo.
            toml("quick", "/quick", bot, seed=2, **patient),
            toml("finishing", "/finishing", bot, tool={"on_interrupt": "finish"}, **patient),
            toml("slow", "/slow", bot, tool={"on_interrupt": "finish"}, **{**patient, "still_waiting_after": "1s"}),
            toml("failing", "/failing", bot),
            toml("hasty", "/hasty", bot, callback={"timeout": "1s"}),
            toml("storyteller", instructions=STORY, max_tokens=110),
            toml("hash", **keypad('{timeout = "60s"}')),
            toml("pause", **keypad('{timeout = "1s"}')),
            toml("most", **keypad('{timeout = "60s", max_digits = 4, finish_on = ""}')),
            toml("desk", tool_choice="transfer_call", tables=desk),
            toml("clerk", tool_choice="end_call", farewell=FAREWELL, tables=desk),
            toml("presser", tool_choice="send_digits", tables='controls = ["send_digits"]'),
            toml("polyglot", tool_choice="set_language", tables='controls = ["set_language"]', language="en-US"),
            toml("talkative", tool_choice="end_call", farewell=LONG_FAREWELL, tables=desk),
            toml("bell", greeting="Hello, this is the bell. Who is there?", max_tokens=8),
            # The last one, since it is changed.
            toml("changing", "/changing", bot, greeting="Good morning from the old shop.", language="en-US"),
        ]
    )


@pytest.fixture(scope="module")
def gateway(tmp_path_factory, bot):
    folder = tmp_path_factory.mktemp("twilio")
    gateway = start(folder, agents(bot), '[tools]\nallow_networks = ["127.0.0.1/32"]')
    yield gateway
    stop(gateway)


class Gate:
    """A tool of the bot's. Its first calls wait until the gate opens; later ones are answered at once."""

    def __init__(self, bot, path, answer=(200, "application/json", b'{"status": "shipped", "by": "bicycle"}'), held=1):
        self.bot, self.path, self.answer, self.held = bot, path, answer, held
        self.before = len(bot.asked(path))
        self.opened = threading.Event()

    def __enter__(self):
        self.bot.answers[self.path] = self.run
        return self

    def __exit__(self, *_):
        self.open()
        del self.bot.answers[self.path]

    def run(self, _):
        if len(self.asked()) <= self.held:
            self.opened.wait(WITHIN * 2)
        return self.answer

    def open(self):
        self.opened.set()

    def asked(self):
        return self.bot.asked(self.path)[self.before :]

    def runs(self):
        """Waits for a call. Gives what was sent."""
        return until(self.asked, "a call of the tool")[-1].call


def roles(history):
    return [who for who, _ in history]


def nobody_calls(gateway):
    return not Call(gateway, "shop").sessions()


# === A call ===


def test_a_call(gateway, bot):
    with Gate(bot, "/shop") as tool, Call(gateway, "shop", {"customer": "Ada", "tier": "gold"}) as call:
        call.begin()
        assert call.relay["language"] == "en-US"
        greeting = call.utterance()
        assert greeting.text == "Hello Ada, this is shop. How can I help you today?" and greeting.lang == "en-US"

        call.say(QUESTION)
        filler = call.utterance()
        assert filler.lang == "en-US"
        # They have heard it to its end, and the tool has not answered.
        asked = tool.runs()
        assert call.history()[-1] == ("order_status", "calling")
        assert asked["agent"] == "shop" and asked["name"] == "order_status" and asked["session"] == call.id
        assert asked["arguments"].keys() == {"order_id"} and 1 <= len(asked["arguments"]["order_id"]) <= 12
        assert asked["caller"] == {
            "customer": "Ada",
            "tier": "gold",
            "caller": CALLER,
            "called": CALLED,
            "forwarded_from": "+4930901829",
            "direction": "inbound",
            "call_id": call.sid,
        }
        assert call.is_silent()
        tool.open()
        answer = call.utterance()
        assert answer.text.strip() != filler.text.strip() and answer.lang == "en-US"
        assert len(answer.tokens) > 1, "it was streamed"

        [user] = [text for who, text in call.history() if who == "user"]
        assert user == QUESTION, "words that were still being spoken are no turn of their own"
        spoken = [text for who, text in call.history() if who == "assistant"]
        assert [text.strip() for text in spoken] == [u.text.strip() for u in (greeting, filler, answer)]
        assert call.is_silent()
    assert nobody_calls(gateway)


def test_a_caller_who_speaks_another_language(gateway, bot):
    with Gate(bot, "/cancelling", held=0), Call(gateway, "cancelling") as call:
        call.begin()
        call.say("Wo ist meine Bestellung 1234? Können Sie mir bitte sagen, wann sie kommt?", lang="de-DE")
        filler, answer = call.utterance(), call.utterance()
        assert filler.lang == answer.lang == "de-DE"


# === Barge-in ===


def test_a_caller_interrupts_the_greeting(gateway):
    with Call(gateway, "bell") as call:
        call.begin()
        assert call.utterance().text == "Hello, this is the bell. Who is there?"
        call.interrupt("Hello, this is")
        call.say("It is me.")
        assert call.utterance().text
        assert call.history()[:2] == [("assistant", "Hello, this is"), ("user", "It is me.")]


@pytest.mark.parametrize("duration", [1850, "1850"])
def test_a_caller_interrupts_an_answer(gateway, duration):
    with Call(gateway, "storyteller") as call:
        call.begin()
        call.say(STORY_PLEASE)
        text = call.hear(lambda text: len(text.split()) >= 12)
        heard = " ".join(text.split()[:7])
        assert text.startswith(heard)
        call.interrupt(heard, duration)
        assert call.session()["state"] == "idle", "the model does not go on for nobody"
        assert call.is_silent()
        assert call.history() == [("user", STORY_PLEASE), ("assistant", heard)]

        call.say("Stop. What is your name?")
        answer = call.utterance()
        assert call.history() == [
            ("user", STORY_PLEASE),
            ("assistant", heard),
            ("user", "Stop. What is your name?"),
            ("assistant", answer.text),
        ]


def test_a_caller_interrupts_a_later_sentence(gateway):
    with Call(gateway, "storyteller") as call:
        call.begin()
        call.say(STORY_PLEASE)

        def second(text):
            return sentence(text) != text.strip() and len(sentence(text).split()) >= 8

        text = call.hear(second)
        part = " ".join(sentence(text).split()[:5])
        heard = text[: text.rindex(part) + len(part)]
        call.interrupt(part)
        assert call.is_silent()
        assert call.history() == [("user", STORY_PLEASE), ("assistant", heard)]
        assert call.session()["items"][-1]["status"] == "incomplete"


def test_a_caller_interrupts_what_had_been_sent_to_its_end(gateway):
    with Call(gateway, "hash") as call:
        call.begin()
        call.say("Hello, who are you?")
        answer = call.utterance()
        heard = " ".join(answer.text.split()[:2])
        call.interrupt(heard)
        call.say("Never mind.")
        call.utterance()
        assert call.history()[:2] == [("user", "Hello, who are you?"), ("assistant", heard)]


def test_a_caller_interrupts_the_filler_when_all_had_been_sent(gateway, bot):
    with Gate(bot, "/quick", held=0), Call(gateway, "quick") as call:
        call.begin()
        call.say(QUESTION)
        filler = call.utterance()
        answer = call.utterance()
        heard = " ".join(filler.text.split()[:2])
        assert not answer.text.startswith(heard), "otherwise nobody could tell"
        call.interrupt(heard)
        history = call.history()
        assert history[1] == ("assistant", heard) and history[-1] == ("assistant", "")
        assert ("order_status", "completed") in history, "what was done was done"


@pytest.mark.parametrize("agent", ["cancelling", "finishing"])
def test_a_caller_interrupts_while_a_tool_runs(gateway, bot, agent):
    with Gate(bot, f"/{agent}") as tool, Call(gateway, agent) as call:
        call.begin()
        call.say(QUESTION)
        filler = call.utterance()
        tool.runs()
        heard = filler.text.split()[0]
        call.interrupt(heard)
        assert call.is_silent()
        [first] = call.calls()
        if agent == "cancelling":
            assert first["status"] == "failed" and "cancelled" in first["error"]["message"] and first["output"] is None
        else:
            assert first["status"] not in ("completed", "failed") and first["output"] is first["error"] is None

        call.say("Sorry, I meant order 5678.")
        assert call.utterance().text
        assert call.utterance().text
        first, second = call.calls()
        assert second["status"] == "completed" and "bicycle" in second["output"]
        history = call.history()
        assert roles(history) == [*["user", "assistant", "order_status"] * 2, "assistant"]
        # A mark behind the last word belongs to it.
        assert history[1][1].rstrip(",.!?") == heard.rstrip(",.!?")

        tool.open()
        if agent == "finishing":
            until(lambda: call.calls()[0]["status"] == "completed", "the outcome")
            assert "bicycle" in call.calls()[0]["output"]
        else:
            assert first["status"] == "failed"
        assert call.is_silent(), "nobody waits for it any more"


def test_a_caller_speaks_while_a_tool_runs(gateway, bot):
    # Nothing is being spoken, so Twilio tells of no interruption.
    with Gate(bot, "/cancelling") as tool, Call(gateway, "cancelling") as call:
        call.begin()
        call.say(QUESTION)
        filler = call.utterance()
        tool.runs()
        call.say("Sorry, I meant order 5678.")
        second, answer = call.utterance(), call.utterance()
        assert [status for who, status in call.history() if who == "order_status"] == ["failed", "completed"]
        spoken = [text.strip() for who, text in call.history() if who == "assistant"]
        assert spoken == [filler.text.strip(), second.text.strip(), answer.text.strip()], "they heard it all"


def test_a_caller_who_corrects_themselves_at_once(gateway, bot):
    with Gate(bot, "/cancelling", held=0), Call(gateway, "cancelling") as call:
        call.begin()
        said = [f"No, sorry, my order is {number}." for number in range(1230, 1240)]
        for words in said:
            call.say(words, partials=False)
        call.on_the_way()
        until(lambda: call.session()["state"] == "idle", "the answer")
        history = call.history()
        assert [text for who, text in history if who == "user"] == said
        spoken = [text.strip() for who, text in history if who == "assistant"]
        heard = []
        while heard[-2:] != spoken[-2:]:
            heard.append(call.utterance().text.strip())
        assert call.is_silent(), "nothing follows what is said to their last words"
        # What was begun for earlier words ended where it was cut off, so that no answer goes on with it.
        begun = [text for text in spoken[:-2] if text]
        assert all(any(text.startswith(cut) for text in begun) for cut in heard[:-2]), (heard, spoken)


# === Keys ===


@pytest.mark.parametrize(
    ("agent", "keys", "turn"),
    [("hash", "4711#", "4711"), ("pause", "4711", "4711"), ("most", "47#*", "47#*")],
)
def test_keys_are_one_turn(gateway, agent, keys, turn):
    with Call(gateway, agent) as call:
        call.begin()
        if agent == "hash":
            # There is nothing to end.
            call.press("#")
        call.press(keys)
        assert call.utterance().text
        assert roles(call.history()) == ["user", "assistant"] and call.history()[0] == ("user", turn)
        # What comes later is a turn of its own.
        call.press(keys)
        assert call.utterance().text
        assert [text for who, text in call.history() if who == "user"] == [turn, turn]


def test_keys_before_words_come_before_them(gateway):
    with Call(gateway, "hash") as call:
        call.begin()
        call.press("12")
        call.say("Sorry, wrong keys. Who are you?")
        assert call.utterance().text
        # What was pressed before the caller spoke waits no more, to be a turn that interrupts the answer.
        call.press("#")
        assert call.is_silent()
        assert "Who are you?" in [text for who, text in call.history() if who == "user"][-1]


def test_an_agent_presses_keys(gateway):
    with Call(gateway, "presser") as call:
        call.begin()
        call.say("Press 1 for the sales team.")
        assert call.utterance().text
        assert call.next()["type"] == "sendDigits"
        assert call.utterance().text


def test_an_agent_changes_the_language(gateway):
    with Call(gateway, "polyglot") as call:
        call.begin()
        call.say("Can we speak Spanish, please?")
        assert call.utterance().lang == "en-US"
        frame = call.next()
        assert frame["type"] == "language" and frame["ttsLanguage"] == frame["transcriptionLanguage"]
        assert call.utterance().lang == frame["ttsLanguage"]


# === The end ===


def test_a_caller_is_transferred(gateway):
    with Call(gateway, "desk") as call:
        call.begin()
        call.say("I want to talk to somebody about my bill.")
        assert call.utterance().text, "they are told"
        handoff, verbs = call.ended()
        handoff = json.loads(handoff)
        assert (handoff["reason"], handoff["transfer_to"], handoff["number"]) == ("transfer_call", "billing", BILLING)
        [dial] = verbs
        assert dial.tag == "Dial" and dial.text == BILLING and not list(dial)
    assert nobody_calls(gateway)


@pytest.mark.parametrize(
    "handoff",
    [
        json.dumps({"reason": "transfer_call", "transfer_to": "billing", "number": "+18095550100"}),
        json.dumps({"number": 5}),
        json.dumps([BILLING]),
        "billing",
        "",
    ],
)
def test_a_number_that_is_not_the_agents_is_not_dialled(gateway, handoff):
    [verb] = Call(gateway, "desk").action("ended", HandoffData=handoff)
    assert verb.tag == "Hangup" and not verb.attrib and not list(verb)


def test_an_agent_ends_the_call(gateway):
    with Call(gateway, "clerk") as call:
        call.begin()
        call.say("That was all, thank you. Goodbye!")
        assert call.utterance().text == FAREWELL
        handoff, [verb] = call.ended()
        assert json.loads(handoff)["reason"] == "end_call" and verb.tag == "Hangup"
    assert nobody_calls(gateway)


def test_a_caller_who_has_something_else_to_say(gateway):
    with Call(gateway, "clerk") as call:
        call.begin()
        call.say("Goodbye!")
        assert call.utterance().text == FAREWELL
        call.say("Wait, goodbye to your colleague as well!")
        # The first goodbye does not end the call in the middle of the second.
        assert call.utterance().text == FAREWELL
        call.ended()


def test_a_caller_hangs_up(gateway, bot):
    with Gate(bot, "/cancelling"), Call(gateway, "cancelling") as call:
        call.begin()
        call.say(QUESTION)
        call.utterance()
        assert call.sessions() == {call.id}
        call.hang_up()
        assert call.id not in call.sessions()
        assert call.api(f"/v1/sessions/{call.id}").status_code == 404


# === A connection that breaks ===


def test_a_connection_breaks_in_an_answer(gateway):
    with Call(gateway, "storyteller") as call:
        call.begin()
        call.say(STORY_PLEASE)
        before = call.hear(lambda text: len(text.split()) >= 5)
        call.reconnect(call.drop())
        assert call.sessions() == {call.id}
        after = call.utterance().text
        [question, answer] = call.history()
        assert question == ("user", STORY_PLEASE)
        assert answer[1].startswith(before.rstrip())
        assert after.strip() == answer[1].strip(), "the sentence that broke off begins again"


def test_a_connection_is_replaced_in_an_answer(gateway):
    with Call(gateway, "storyteller") as call:
        call.begin()
        call.say(STORY_PLEASE)
        before = call.hear(lambda text: len(text.split()) >= 5)
        old, url = call.socket, call.broke()
        call.reconnect(url)
        with contextlib.suppress(websockets.ConnectionClosed):
            while True:
                before += json.loads(old.recv(timeout=WITHIN))["token"]
        # What was on its way when the connection broke was not heard, so the sentence begins again.
        after = call.utterance().text
        _, answer = call.history()[-1]
        assert answer.startswith(before)
        assert after.strip() == answer.strip()


def test_a_connection_breaks_while_a_tool_runs(gateway, bot):
    with Gate(bot, "/shop") as tool, Call(gateway, "shop", {"customer": "Ada"}) as call:
        call.begin()
        call.utterance()
        call.say(QUESTION)
        call.utterance()
        call.reconnect(call.drop())
        assert call.is_silent(), "no second greeting"
        assert call.sessions() == {call.id}
        tool.open()
        answer = call.utterance()
        history = call.history()
        assert roles(history) == ["assistant", "user", "assistant", "order_status", "assistant"]
        assert history[-2] == ("order_status", "completed") and history[-1][1].strip() == answer.text.strip()

        call.say("Thank you.")
        assert call.utterance().text and call.utterance().text
        assert call.sessions() == {call.id}


def test_a_connection_breaks_unnoticed(gateway, bot):
    # Twilio has given it up, but nothing told the gateway so.
    with Gate(bot, "/shop") as tool, Call(gateway, "shop", {"customer": "Ada"}) as call:
        call.begin()
        call.utterance()
        call.say(QUESTION)
        call.utterance()
        old = call.socket
        call.reconnect(call.broke())
        tool.open()
        answer = call.utterance()
        assert call.history()[-1] == ("assistant", answer.text)
        with pytest.raises(websockets.ConnectionClosed):
            old.recv(timeout=WITHIN)


def test_a_caller_speaks_first_after_a_connection_broke(gateway, bot):
    with Gate(bot, "/cancelling") as tool, Call(gateway, "cancelling") as call:
        call.begin()
        call.say(QUESTION)
        call.utterance()
        tool.runs()
        call.reconnect(call.drop())
        again = "Are you still there? I meant order 5678."
        call.say(again)
        filler, answer = call.utterance(), call.utterance()
        history = call.history()
        assert [text for who, text in history if who == "user"] == [QUESTION, again]
        assert [status for who, status in history if who == "order_status"] == ["failed", "completed"]
        assert [text.strip() for who, text in history if who == "assistant"][-2:] == [
            filler.text.strip(),
            answer.text.strip(),
        ]


def test_a_connection_breaks_during_the_goodbye(gateway):
    with Call(gateway, "talkative") as call:
        call.begin()
        call.say("That was all, thank you. Goodbye!")
        assert call.utterance().text == LONG_FAREWELL
        until(lambda: call.history()[-1] == ("end_call", "completed"), "the call's end")
        assert call.is_silent(), "the goodbye is still being spoken"
        call.reconnect(call.drop())
        handoff, [verb] = call.ended()
        assert json.loads(handoff)["reason"] == "end_call" and verb.tag == "Hangup"


def test_a_call_that_ends_while_the_connection_is_broken(gateway, bot):
    with Gate(bot, "/cancelling"), Call(gateway, "cancelling") as call:
        call.begin()
        call.say(QUESTION)
        call.utterance()
        call.drop()
        [verb] = call.action("failed", "completed", ErrorCode="64105")
        assert verb.tag == "Hangup"
        assert call.id not in call.sessions()
        call.over = True


# === Slow and failing tools ===


def test_a_caller_who_waits_is_told_so(gateway, bot):
    with Gate(bot, "/slow") as tool, Call(gateway, "slow") as call:
        call.begin()
        call.say(QUESTION)
        heard = [call.utterance() for _ in range(3)]
        tool.open()
        # One more may have been on its way.
        while call.history()[-1][0] != "assistant" or call.session()["state"] != "idle" or not call.is_silent():
            heard.append(call.utterance())
        texts = [u.text.strip() for u in heard]
        assert all(one != next for one, next in zip(texts, texts[1:], strict=False)), texts
        items = call.session()["items"]
        spoken = [item for item in items if item["type"] == "message" and item["role"] == "assistant"]
        assert [item["content"][0]["text"].strip() for item in spoken] == texts
        phases = [item.get("phase") for item in spoken]
        assert phases == ["commentary"] * (len(heard) - 1) + [None], "nothing of it comes after the answer began"


def test_a_caller_who_speaks_is_not_told_to_wait(gateway, bot):
    with Gate(bot, "/slow", held=2) as tool, Call(gateway, "slow") as call, Call(gateway, "slow") as other:
        call.begin()
        call.say(QUESTION)
        call.utterance()
        waiting = call.utterance()
        call.interrupt(" ".join(waiting.text.split()[:2]))
        # Another caller is told twice in the time in which this one would have been.
        other.begin()
        other.say(QUESTION)
        for _ in range(3):
            other.utterance()
        assert call.is_silent()
        tool.open()
        assert other.utterance().text
        until(lambda: call.calls()[0]["status"] == "completed", "the outcome")
        assert call.is_silent()


@pytest.mark.parametrize("agent", ["failing", "hasty"])
def test_a_tool_that_fails(gateway, bot, agent):
    failure = (500, "text/plain", b"Traceback: the secret of the database is hush")
    with Gate(bot, f"/{agent}", failure) as tool, Call(gateway, agent) as call:
        call.begin()
        call.say(QUESTION)
        filler = call.utterance()
        if agent == "failing":
            tool.open()
        answer = call.utterance()
        assert answer.text.strip() != filler.text.strip()
        [made] = call.calls()
        assert made["status"] == "failed" and made["error"] and "hush" not in json.dumps(call.session())
        assert len(tool.asked()) == 1, "it may have acted upon it"
        assert call.history()[-1] == ("assistant", answer.text)


# === Who may call ===


ROUTES = ["voice", "action"]


@pytest.mark.parametrize("route", ROUTES)
def test_a_webhook_that_twilio_did_not_sign(gateway, route):
    call = Call(gateway, "shop")
    url = f"{call.base}/{route}"
    form = call.form(SessionStatus="failed", HandoffData="{}")
    changed = {**form, "CallSid": "CA" + "0" * 32}
    more = {**form, "Digits": "1"}
    for given in (
        None,
        "",
        "?",
        signature(url),
        signature(url, form, token="another"),
        signature(url, form, token=KEY),
        signature(url + "/", form),
        signature(url.replace("http", "https"), form),
        signature(f"{call.base}/{'action' if route == 'voice' else 'voice'}", form),
        signature(url, changed),
        signature(url, more),
        signature(url, form).lower(),
        signature(url, form)[:-1],
    ):
        response = post(url, form, signature=given)
        assert response.status_code == 403, given
        assert "Response" not in response.text and signature(url, form) not in response.text
    assert post(url, form).status_code == 200
    # The query is part of what is signed.
    assert post(f"{url}?tenant=a%20b&x=1", form).status_code == 200
    assert post(f"{url}?tenant=a%20b&x=1", form, signature=signature(url, form)).status_code == 403
    assert nobody_calls(gateway)


def test_a_connection_that_twilio_did_not_sign(gateway):
    call = Call(gateway, "shop")
    url = call.ring()
    for given in (
        None,
        "?",
        signature(url, token="another"),
        signature(url.replace("ws", "http", 1)),
        signature(url.replace("ws", "wss", 1)),
        signature(f"{url}?"),
        signature(url.replace("shop", "bell")),
    ):
        with pytest.raises(websockets.InvalidStatus) as refused:
            call.open(url, signature=given)
        assert refused.value.response.status_code == 403, given
    assert nobody_calls(gateway)


def test_an_agent_that_there_is_not(gateway):
    for name in ("nobody", "shop%2Ftwilio", "Shop"):
        call = Call(gateway, name)
        for route in ROUTES:
            assert post(f"{call.base}/{route}", call.form(SessionStatus="completed")).status_code == 404
        with pytest.raises(websockets.InvalidStatus) as refused:
            call.open(f"{call.base.replace('http', 'ws', 1)}/relay")
        assert refused.value.response.status_code == 404
    # Who is not Twilio does not learn which there are.
    call = Call(gateway, "nobody")
    assert post(f"{call.base}/voice", call.form(), signature="?").status_code == 403


def test_a_form_that_is_none(gateway):
    url = f"{gateway.url}/agents/shop/twilio/voice"
    headers = {"x-twilio-signature": signature(url), "content-type": "application/x-www-form-urlencoded"}
    assert httpx.post(url, content=b"", headers=headers).status_code == 200
    for body in (b"\xff\xfe%zz=%", b"a" * 1000, b"CallSid=%00&&&"):
        assert httpx.post(url, content=body, headers=headers).status_code == 403
    assert httpx.post(url, content=b"a=" + b"b" * (2 << 20), headers=headers).status_code == 413


# === Frames that Twilio does not send ===


JUNK = [None, True, 0, -1.5e308, 1 << 70, "", "\0", [], {}, [[]], {"a": []}, "x" * 20_000]
FIELDS = {
    "setup": ["sessionId", "callSid", "from", "customParameters"],
    "prompt": ["voicePrompt", "lang", "last"],
    "interrupt": ["utteranceUntilInterrupt", "durationUntilInterruptMs"],
    "dtmf": ["digit"],
    "error": ["description"],
}


def test_frames_that_make_no_sense_do_not_end_a_call(gateway):
    with Call(gateway, "hash") as call:
        call.begin()
        call.say("Hello.")
        call.utterance()
        before = call.history()
        for kind, fields in FIELDS.items():
            call.send(kind)
            for field in fields:
                for value in JUNK:
                    if (kind, field) not in (("prompt", "voicePrompt"), ("interrupt", "utteranceUntilInterrupt")):
                        call.send(kind, **{field: value})
                    elif not isinstance(value, str):
                        call.send(kind, **{field: value})
        for text in (
            "",
            "hello",
            "{",
            '{"type": "prompt", "voicePrompt": "\\ud800"}',
            "[" * 100_000,
            '{"a":' * 10_000 + "1" + "}" * 10_000,
            "5",
            "null",
            '"setup"',
            "[]",
            "{}",
            '{"type": 5}',
            '{"type": null}',
            '{"type": "text", "token": "Hello", "last": true}',
            '{"type": "end"}',
            '{"type": "info", "name": "tokensPlayed", "value": "Hello"}',
        ):
            call.socket.send(text)
        call.socket.send(b"\x00\x01\x02")
        call.socket.send(b'{"type": "prompt", "voicePrompt": "I am binary.", "last": true}')
        # A second setup, of another call.
        call.send("setup", callSid="CA" + "f" * 32, customParameters={})
        call.setup()
        assert call.is_silent(), call.waiting
        assert call.sessions() == {call.id}
        assert [text for who, text in call.history() if who == "user"] == ["Hello."]
        assert call.history()[0] == before[0]

        call.say("Are you there?")
        answer = call.utterance()
        assert call.history()[-2:] == [("user", "Are you there?"), ("assistant", answer.text)]


def test_an_interruption_that_does_not_tell_what_was_heard(gateway):
    with Call(gateway, "hash") as call:
        call.begin()
        call.say("Hello.")
        answer = call.utterance()
        call.send("interrupt", durationUntilInterruptMs=100)
        call.send("interrupt", utteranceUntilInterrupt=None)
        call.send("interrupt", utteranceUntilInterrupt=5)
        assert call.is_silent()
        assert call.history() == [("user", "Hello."), ("assistant", answer.text)], "nobody said that it was not heard"


def test_frames_before_the_setup_do_not_begin_a_call(gateway):
    with Call(gateway, "bell") as call:
        call.open(call.ring())
        call.say("Hello?")
        call.press("1#")
        call.send("interrupt", utteranceUntilInterrupt="Hello", durationUntilInterruptMs=5)
        call.send("error", description="none")
        call.socket.send("{")
        assert call.is_silent() and call.sessions() == set()
        call.setup()
        assert call.utterance().text == "Hello, this is the bell. Who is there?"
        assert roles(call.history()) == ["assistant"]


@pytest.mark.parametrize("sid", [None, "", 5, [], "x" * 10_000])
def test_a_setup_without_a_call_is_none(gateway, sid):
    with Call(gateway, "bell") as call:
        call.open(call.ring())
        call.send("setup", callSid=sid, customParameters={})
        with pytest.raises(websockets.ConnectionClosed) as closed:
            call.socket.recv(timeout=WITHIN)
        assert closed.value.rcvd.code == 1011
        assert call.sessions() == set()


def test_a_setup_with_parameters_of_all_kinds(gateway):
    with Call(gateway, "shop", {"customer": "{{ agent }}\n{% raw %}", "b": 5, "c": [1], "d": None}) as call:
        call.begin()
        assert call.utterance().text == "Hello {{ agent }} {% raw %}, this is shop. How can I help you today?"
    with Call(gateway, "shop") as call:
        call.open(call.ring())
        call.setup(customParameters="none", callerName=5, to=None, forwardedFrom=[], direction={})
        assert call.utterance().text == "Hello , this is shop. How can I help you today?"


def test_a_frame_that_is_too_large_breaks_the_connection_and_not_the_call(gateway):
    with Call(gateway, "bell") as call:
        call.begin()
        call.utterance()
        call.send("prompt", voicePrompt="x" * (300 << 10), lang="en-US", last=True)
        with pytest.raises(websockets.ConnectionClosed) as closed:
            call.socket.recv(timeout=WITHIN)
        assert closed.value.rcvd.code == 1009
        call.reconnect(call.broke())
        call.say("Are you there?")
        assert call.utterance().text
        assert roles(call.history()) == ["assistant", "user", "assistant"]


# === Agents that change ===


class Changing:
    """The agent `changing`, as its file says."""

    def __init__(self, gateway, bot):
        self.gateway, self.bot = gateway, bot
        config = gateway.config.read_text()
        self.rest, self.name, self.text = config.partition("[agents.changing]")

    def write(self, text):
        self.gateway.config.write_text(self.rest + text)
        self.gateway.process.send_signal(signal.SIGHUP)

    def become(self, language, path="/changing", **settings):
        """Another definition, once it holds."""
        text = toml("changing", path, self.bot, language=language, **settings)
        self.write(text)
        until(lambda: self.language() == language, "the new definition")
        return text

    def refuse(self, text, told):
        """A definition that cannot be used."""
        size = self.gateway.log.stat().st_size
        self.write(text)
        until(lambda: told in self.gateway.log.read_bytes()[size:], "the refusal")

    def go(self):
        """No definition at all."""
        self.write("")
        until(lambda: self.language() is None, "the new definition")

    def language(self):
        """What tells the definitions from each other."""
        call = Call(self.gateway, "changing")
        if post(f"{call.base}/voice", call.form()).status_code == 404:
            return None
        call.ring()
        return call.relay["language"]

    def restore(self):
        self.write(self.name + self.text)
        until(lambda: self.language() == "en-US", "the first definition")


@pytest.fixture
def changing(gateway, bot):
    changing = Changing(gateway, bot)
    yield changing
    changing.restore()


def test_an_agent_changes_while_it_talks(gateway, bot, changing):
    with Gate(bot, "/changing", held=0) as before, Gate(bot, "/changed", held=0) as after:
        with Call(gateway, "changing") as old, Call(gateway, "changing") as new:
            old.begin()
            assert old.utterance().text == "Good morning from the old shop."
            changing.become("en-GB", "/changed", greeting="Good evening!", instructions="Report.")

            # The call that is going on is as it began: a phone agent, who speaks before the tool that it had.
            old.say(QUESTION)
            filler, answer = old.utterance(), old.utterance()
            assert filler.lang == answer.lang == "en-US"
            assert len(before.asked()) == 1 and not after.asked()
            old.reconnect(old.drop())
            assert old.is_silent(), "neither the old greeting nor the new one"

            new.begin()
            assert new.utterance().text == "Good evening!"
            new.say(QUESTION)
            assert new.utterance().lang == "en-GB"
            assert roles(new.history()) == ["assistant", "user", "order_status", "assistant"]
            assert len(before.asked()) == len(after.asked()) == 1

            old.say("Thank you.")
            assert old.utterance().text and old.utterance().text
            assert len(before.asked()) == 2


def test_a_definition_that_is_wrong_changes_nothing(gateway, changing):
    good = changing.become("en-GB", greeting="Good evening!")
    for text, told in (
        (good + "\n[agents.broken\n", b"its agents stay as they were"),
        (good.replace("evening", "night").replace("= 0.0", "= 9.0"), b"the agent stays as it was"),
        (good.replace("evening", "night").replace("= 40", "= 0"), b"the agent stays as it was"),
    ):
        changing.refuse(text, told)
        with Call(gateway, "changing") as call:
            call.begin()
            assert call.utterance().text == "Good evening!"


def test_an_agent_goes_while_it_talks(gateway, bot, changing):
    with Gate(bot, "/changing", held=0), Call(gateway, "changing") as call:
        call.begin()
        call.utterance()
        changing.go()
        call.say(QUESTION)
        assert call.utterance().text and call.utterance().text
        call.reconnect(call.drop())
        call.say("Thank you.")
        assert call.utterance().text and call.utterance().text
    assert nobody_calls(gateway)


def test_a_caller_is_transferred_to_whom_the_agent_knew(gateway, changing):
    def desk(number):
        return f'controls = ["transfer_call"]\ntransfer_to = {{billing = "{number}"}}'

    changing.become("en-AU", None, tool_choice="transfer_call", tables=desk(FORMER))
    with Call(gateway, "changing") as call:
        call.begin()
        changing.become("en-NZ", None, tool_choice="transfer_call", tables=desk(BILLING))
        call.say("I want to talk to somebody about my bill.")
        call.utterance()
        _, [verb] = call.ended()
        assert verb.tag == "Dial" and verb.text == FORMER
