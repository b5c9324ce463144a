"""Calls that Retell makes: it knows what was said and heard, the gateway knows what was called."""

import contextlib
import json
import re
import threading

import httpx
import pytest
import websockets
from conftest import RETELL_SECRET, start, stop
from retell import WITHIN, Retell
from websockets.sync.client import connect

PROXY = "127.0.0.1/32"
RETELLS_ADDRESS = "100.20.5.228"

ORDER = "Where is my order 1234?"
STORY = "Tell me a long story about a lighthouse and a storm."


def tool(agent, url, name="order_status", **callback):
    settings = "".join(f"{key} = {json.dumps(value)}\n" for key, value in ({"url": url} | callback).items())
    return (
        f'[[agents.{agent}.tools]]\nname = "{name}"\ndescription = "Tells how far an order is."\n'
        'parameters = { type = "object", properties = { order_id = { type = "string", maxLength = 12 } }, '
        'required = ["order_id"], additionalProperties = false }\n'
        f"[agents.{agent}.tools.callback]\n{settings}"
    )


def agents(bot):
    """The agents of these tests. The model calls nothing of its own accord, so most of them have to call."""
    common = "max_tool_rounds = 1\ntemperature = 0.0\n"
    phone = "You are a friendly phone agent of {{ shop }}. Answer in one or two sentences."
    forced = f'[agents.{{0}}]\ninstructions = "{phone}"\ntool_choice = "order_status"\n{common}'
    greeted = (
        'greeting = "Hello {{ customer_name }}, this is {{ shop }}. How can I help you?"\n'
        'variables = { shop = "Flowers", customer_name = "there" }\n'
    )
    clerk = f'[agents.clerk]\ninstructions = "You are {{{{ kind }}}}."\ntool_choice = "order_status"\n{common}'
    control = f'instructions = "{phone}"\n{common}max_tokens = 40\n'
    stubborn = tool("stubborn", f"{bot.url}/slow", timeout="80s").replace(
        "[agents.stubborn.tools.callback]", 'on_interrupt = "finish"\n[agents.stubborn.tools.callback]'
    )
    return "\n".join(
        [
            forced.format("shop") + greeted + "max_tokens = 40\n" + tool("shop", f"{bot.url}/order_status"),
            # Speaks for so long that it can be interrupted.
            forced.format("chatty") + greeted + "max_tokens = 60\n" + tool("chatty", f"{bot.url}/order_status"),
            f'[agents.talker]\ninstructions = "{phone}"\n{common}{greeted}max_tokens = 60\n',
            f'[agents.brief]\ninstructions = "{phone}"\n{common}{greeted}max_tokens = 8\n',
            f'[agents.silent]\ninstructions = "{phone}"\n{common}max_tokens = 8\n',
            clerk + "max_tokens = 40\n" + tool("clerk", f"{bot.url}/order_status"),
            forced.format("slow") + greeted + "max_tokens = 40\n" + tool("slow", f"{bot.url}/slow", timeout="80s"),
            forced.format("stubborn") + greeted + "max_tokens = 40\n" + stubborn,
            *(
                forced.format(name) + "max_tokens = 40\n" + tool(name, f"{bot.url}/{name}", timeout="1s")
                for name in ("broken", "late", "dead")
            ),
            "[agents.leaver]\n"
            + control
            + 'tool_choice = "end_call"\ncontrols = ["end_call"]\n'
            + 'greeting = "Thank you for calling Flowers."\nfarewell = "Thank you for calling. Goodbye!"\n',
            "[agents.mover]\n"
            + control
            + 'tool_choice = "transfer_call"\ncontrols = ["transfer_call"]\n'
            + 'transfer_to = { "the front desk" = "+15551234567" }\n',
        ]
    )


@pytest.fixture(scope="module")
def gateway(bot, tmp_path_factory):
    running = start(
        tmp_path_factory.mktemp("retell"),
        agents(bot),
        # A small context keeps prompts short, a short queue is full soon.
        settings='[tools]\nallow_networks = ["127.0.0.1/32"]\n[model]\ncontext = 1024\nqueue = 3',
        server=f'trusted_proxies = ["{PROXY}"]',
        retell=f'allow_addresses = ["{RETELLS_ADDRESS}/32"]',
    )
    yield running
    stop(running)


def ring(gateway, agent, **options):
    return Retell(gateway, agent, RETELL_SECRET, **options)


# === What is known of a call ===


def sessions(gateway):
    with gateway.http() as http:
        return http.get("/v1/sessions?limit=1000").raise_for_status().json()["data"]


def session(gateway):
    """The session of the call that began last."""
    [*_, newest] = [known["id"] for known in sessions(gateway) if known["dialect"] == "retell"]
    with gateway.http() as http:
        return http.get(f"/v1/sessions/{newest}").raise_for_status().json()


def row(item):
    if item["type"] == "message":
        role = {"assistant": "agent"}.get(item["role"], item["role"])
        return (role, "".join(part["text"] for part in item["content"]).strip())
    assert item["type"] == "mcp_call", item
    why = (item["error"] or {}).get("message")
    return ("call", item["call_id"], item["output"] or why or item["status"])


def history(gateway):
    """What was said and called, in order: (role, words) and ("call", id, result)."""
    rows = [row(item) for item in session(gateway)["items"]]
    return [(kind, *rest) for kind, *rest in rows if rest[0]]


def talk(rows):
    """The words of a history as a transcript has them: what the agent says in one go is one utterance."""
    told = []
    for role, text in (row for row in rows if row[0] in ("agent", "user")):
        if told and told[-1][0] == role == "agent":
            text = f"{told.pop()[1]} {text}"
        told.append((role, " ".join(text.split())))
    return told


def transcript(retell):
    return talk([(utterance["role"], utterance["content"]) for utterance in retell.transcript])


def loosely(text):
    """As a transcript of speech may write it."""
    return re.sub(r"[^\w\s']", "", text).lower()


def plain(rows):
    return [(role, "".join(c for c in text.lower() if c.isalnum())) for role, text in rows]


def calls(rows):
    return [(call, result) for kind, call, result in (row for row in rows if row[0] == "call")]


def around(response, call):
    """What was said before a call was made, and what after it had its result."""
    pieces = list(zip(response.at, response.pieces, strict=True))
    before = "".join(piece for at, piece in pieces if at < call.invoked_at)
    after = "".join(piece for at, piece in pieces if at > call.settled_at)
    return before.strip(), after.strip()


# === A call ===


def test_a_call_from_the_greeting_to_the_end(gateway, bot):
    with ring(gateway, "shop") as retell:
        assert retell.frames[0]["config"] == {"auto_reconnect": True, "call_details": True}
        greeting = retell.begins(
            retell_llm_dynamic_variables={"customer_name": "Ada"}, metadata={"account": "A-17"}, from_number="+4930123"
        )
        assert greeting.text == "Hello Ada, this is Flowers. How can I help you?"

        answer = retell.answers(ORDER)
        [call] = retell.calls.values()
        assert call.name == "order_status" and call.arguments.keys() == {"order_id"}
        assert json.loads(call.result) == {"status": "shipped"}
        filler, said = around(answer, call)
        assert filler and said, "the caller hears something before the tool runs, and an answer afterwards"
        assert not answer.end_call and answer.transfer_number is None

        asked = bot.asked("/order_status")[-1].call
        assert asked["call_id"] == call.id and asked["arguments"] == call.arguments and asked["agent"] == "shop"
        caller = {"account": "A-17", "customer_name": "Ada", "caller": "+4930123", "called": "+12137771235"}
        assert asked["caller"].items() >= (caller | {"call_id": retell.call_id, "direction": "inbound"}).items()
        assert asked["session"] == session(gateway)["id"]

        retell.answers("Thank you, and when will it be here?")
        rows = history(gateway)
        assert talk(rows) == transcript(retell)
        assert [call for call, _ in calls(rows)] == list(retell.calls)
        kinds = "".join(kind[0] for kind, *_ in rows)
        assert re.fullmatch("auaca+uaca+", kinds), rows


def test_a_caller_speaks_first_when_the_agent_has_no_greeting(gateway):
    with ring(gateway, "silent") as retell:
        assert retell.begins().text == "" and history(gateway) == []
        answer = retell.answers("Hello?")
        assert answer.text.strip()
        assert talk(history(gateway)) == transcript(retell)


@pytest.mark.parametrize("kind, speaks", [("a friendly phone agent of a flower shop", True), ("a clerk", False)])
def test_the_instructions_know_the_variables_of_the_call(gateway, kind, speaks):
    with ring(gateway, "clerk") as retell:
        retell.begins(retell_llm_dynamic_variables={"kind": kind})
        answer = retell.answers(ORDER)
        filler, _ = around(answer, retell.invoked())
        # Only an agent that speaks on the phone fills the silence.
        assert bool(filler) == speaks


def test_pings_are_answered(gateway):
    with ring(gateway, "silent") as retell:
        retell.ping()
        retell.begins()
        for _ in range(3):
            retell.ping()


def test_words_of_a_caller_who_still_speaks_are_read_ahead(gateway):
    with ring(gateway, "brief") as retell:
        retell.begins()
        retell.answers("Do you sell roses?")
        cached = gateway.metric("electron_cached_tokens_total")
        before = session(gateway)["usage"]["cached_tokens"]
        frames = len(retell.frames)
        text = "And would you also sell me seven white tulips with a red ribbon for the birthday of my old friend?"
        retell.speaks(text)
        retell.ping()
        assert len(retell.frames) == frames, "nothing is said while the caller speaks"
        retell.finished(retell.asks())
        assert gateway.metric("electron_cached_tokens_total") > cached
        assert session(gateway)["usage"]["cached_tokens"] > before
        assert [text for role, text in history(gateway) if role == "user"] == ["Do you sell roses?", text]


def test_two_calls_know_nothing_of_each_other(gateway):
    with ring(gateway, "brief") as one, ring(gateway, "shop") as two:
        one.begins(retell_llm_dynamic_variables={"customer_name": "Ada"})
        assert "Grace" in two.begins(retell_llm_dynamic_variables={"customer_name": "Grace"}).text
        one.speaks("Do you sell roses?")
        two.speaks(ORDER)
        first, second = one.asks(), two.asks()
        two.hears(two.finished(second))
        one.finished(first)
        assert not one.calls and len(two.calls) == 1
        assert talk(history(gateway)) == transcript(two)


def test_a_caller_who_could_not_be_answered_is_not_forgotten(gateway):
    with contextlib.ExitStack() as stack:
        talker, *waiting, refused = [
            stack.enter_context(ring(gateway, agent)) for agent in ["talker", "brief", "brief", "brief", "brief"]
        ]
        for retell in (talker, *waiting, refused):
            retell.begins()
        talker.speaks(STORY)
        talker.said(talker.asks())
        for retell in waiting:
            retell.speaks("Do you sell roses?", live=False)
            retell.asks()
            retell.ping()
        # Every place in the queue is taken now.
        sorry = refused.answers("My name is Ada.", live=False)
        assert sorry.text.strip(), "the caller is told that something went wrong"
        talker.drop()
        for retell in waiting:
            retell.finished(1)
        refused.answers("What is my name?")
        assert talk(history(gateway)) == transcript(refused)


def test_an_operator_ends_a_call(gateway):
    with ring(gateway, "silent") as retell:
        retell.begins()
        with gateway.http() as http:
            http.delete(f"/v1/sessions/{session(gateway)['id']}").raise_for_status()
        # To Retell this means that the agent hangs up.
        assert retell.wait_closed()[0] == 1000


# === What was heard ===


def test_a_barge_in_in_mid_answer(gateway):
    with ring(gateway, "chatty") as retell:
        retell.begins()
        retell.speaks(ORDER)
        first = retell.asks()
        call = retell.settled(retell.invoked())
        filler = len(first.words)
        retell.said(first, filler + 4)
        retell.hears(first, filler + 2)
        retell.speaks("Wait, I meant another one.")
        second = retell.finished(retell.asks())
        assert not first.complete, "the caller interrupted it"
        rows = history(gateway)
        other = retell.invoked(2)
        assert calls(rows) == [(call.id, call.result), (other.id, other.result)]
        retell.hears(second)
        assert talk(rows) == transcript(retell)
        kinds = "".join(kind[0] for kind, *_ in rows)
        assert re.fullmatch("auacauaca+", kinds), rows


@pytest.mark.parametrize("words", [0, 2, None])
def test_a_barge_in_in_the_filler(gateway, words):
    with ring(gateway, "shop") as retell:
        retell.begins()
        retell.speaks(ORDER)
        first = retell.asks()
        call = retell.settled(retell.invoked())
        filler = around(first, call)[0].split()
        retell.said(first, len(filler) + 2)
        retell.hears(first, len(filler) if words is None else words)
        retell.speaks("Wait, I meant another one.")
        second = retell.asks()
        retell.invoked(2)
        retell.said(second)
        [greeting, asked, *heard, again, filler] = talk(history(gateway))[: 4 + (words != 0)]
        assert [greeting, asked, *heard, again] == transcript(retell), "of the answer nothing was heard"
        assert calls(history(gateway))[0] == (call.id, call.result), "a result stays though it was not told"
        assert filler[0] == "agent"


def test_words_that_begin_alike(gateway):
    with ring(gateway, "leaver") as retell:
        retell.call_details()
        heard = retell.hears(retell.finished(0), 4)
        reminder = retell.finished(retell.reminds())
        assert loosely(reminder.text).startswith(loosely(heard))
        # The caller speaks before they hear anything of the reminder.
        retell.answers("Oh, hello.")
        assert talk(history(gateway)) == transcript(retell)


def test_utterances_that_turn_out_to_be_one(gateway):
    with ring(gateway, "brief") as retell:
        retell.begins()
        retell.speaks("My name is", live=False)
        retell.speaks("Ada.", live=False)
        response = retell.finished(retell.asks())
        retell.transcript.pop()
        retell.speaks_on("My name is Ada.")
        retell.hears(response)
        retell.answers("What is my name?", live=False)
        assert talk(history(gateway)) == transcript(retell)


@pytest.mark.parametrize("words", [0, 3])
def test_a_caller_speaks_over_the_greeting(gateway, words):
    with ring(gateway, "brief") as retell:
        retell.call_details()
        greeting = retell.finished(0)
        retell.hears(greeting, words)
        retell.answers("Hi, do you sell roses?")
        assert talk(history(gateway)) == transcript(retell)


def test_a_transcript_writes_words_in_its_own_way(gateway):
    with ring(gateway, "chatty") as retell:
        retell.call_details()
        retell.hears(retell.finished(0), wording=loosely)
        texts = [retell.finished(0).text]
        for turn, question in enumerate([ORDER, "and what about the other one", "OK. Could you say that again?"]):
            retell.speaks(question)
            response = retell.asks()
            retell.settled(retell.invoked(turn + 1))
            if turn == 1:
                # Only this one is interrupted.
                retell.said(response, len(response.words) + 3)
                retell.hears(response, len(response.words) - 1, wording=loosely)
                texts.append(None)
            else:
                retell.hears(retell.finished(response), wording=str.upper if turn else loosely)
                texts.append(" ".join(response.text.split()))
        retell.speaks("Bye.")
        retell.asks()
        retell.invoked(4)
        rows = history(gateway)
        told = talk(rows)[: len(retell.transcript)]
        assert plain(told) == plain(transcript(retell))
        # What was heard to its end stays as it was said.
        said = [text for role, text in told if role == "agent"]
        assert all(text is None or text == kept for text, kept in zip(texts, said, strict=True))
        assert calls(rows)[:3] == [(call.id, call.result) for call in list(retell.calls.values())[:3]]


def test_a_caller_goes_on_after_a_pause(gateway):
    with ring(gateway, "talker") as retell:
        retell.begins()
        retell.speaks("Tell me a story about", live=False)
        first = retell.asks()
        retell.said(first, 2)
        retell.speaks_on("Tell me a story about a lighthouse", live=True)
        second = retell.asks()
        retell.said(second, 2)
        retell.speaks_on("Tell me a story about a lighthouse and a storm.")
        third = retell.finished(retell.asks())
        assert not first.complete and not second.complete
        rows = history(gateway)
        words = [text for role, text in rows if role == "user"]
        assert words == ["Tell me a story about a lighthouse and a storm."]
        retell.hears(third)
        assert talk(rows) == transcript(retell), "what was begun before was not heard"


def test_a_caller_says_a_word_while_the_agent_speaks(gateway):
    with ring(gateway, "talker") as retell:
        retell.begins()
        retell.speaks(STORY)
        response = retell.finished(retell.asks())
        words = response.words
        retell.hears_else(" ".join(words[:5]))
        retell.speaks("Uh-huh.")
        retell.hears_else(" ".join(words[5:9]))
        retell.hears_else(" ".join(words[9:11]))
        retell.speaks("And then?")
        retell.hears(retell.finished(retell.asks()))
        assert talk(history(gateway)) == transcript(retell)


def test_an_utterance_that_the_gateway_never_said(gateway):
    with ring(gateway, "chatty") as retell:
        retell.begins()
        retell.speaks(ORDER)
        retell.finished(retell.asks())
        retell.hears_else("This call may be recorded, by the way.")
        retell.speaks("Fine.")
        second = retell.asks()
        retell.invoked(2)
        rows = history(gateway)
        told = talk(rows)
        assert told[: len(retell.transcript)] == transcript(retell)
        assert calls(rows)[0][0] == retell.invoked().id
        retell.finished(second)


def test_a_caller_who_is_silent_is_reminded(gateway):
    with ring(gateway, "talker") as retell:
        retell.begins()
        greeted = retell.finished(retell.reminds())
        assert greeted.text.strip()
        retell.hears(greeted)
        retell.answers("Do you sell roses?")
        reminder = retell.finished(retell.reminds())
        assert reminder.text.strip()
        retell.hears(reminder, 3)
        rows = history(gateway)
        assert [text for role, text in rows if role == "user"] == ["Do you sell roses?"]
        retell.answers("Yes, I am here.")
        assert talk(history(gateway)) == transcript(retell)


# === Tools ===


@contextlib.contextmanager
def held(bot, path):
    """Holds the first call of a path. Gives what is set when it has arrived, and what releases it."""
    arrived, release = threading.Event(), threading.Event()
    first = threading.Lock()

    def answer(_):
        if first.acquire(blocking=False):
            arrived.set()
            release.wait(80)
            return 200, "application/json", b'{"status": "held"}'
        return 200, "application/json", b'{"status": "at once"}'

    bot.answers[path] = answer
    try:
        yield arrived, release
    finally:
        release.set()
        del bot.answers[path]


def test_a_caller_interrupts_while_a_tool_runs(gateway, bot):
    with held(bot, "/slow") as (arrived, _), ring(gateway, "slow") as retell:
        retell.begins()
        retell.speaks(ORDER)
        first = retell.asks()
        call = retell.invoked()
        assert arrived.wait(WITHIN), "the tool was not asked"
        retell.hears(first)
        retell.speaks("No, I meant the order 99.")
        second = retell.asks()
        assert "cancelled" in retell.settled(call).result
        retell.finished(second)
        other = retell.invoked(2)
        assert json.loads(other.result) == {"status": "at once"} and all(around(second, other))
        assert not first.complete
        retell.hears(second)
        rows = history(gateway)
        assert talk(rows) == transcript(retell)
        [(cancelled, why), answered] = calls(rows)
        assert cancelled == call.id and "cancelled" in why and answered == (other.id, other.result)
        assert re.fullmatch("auacuaca+", "".join(kind[0] for kind, *_ in rows)), rows


def test_a_tool_that_may_not_be_stopped_finishes(gateway, bot):
    with held(bot, "/slow") as (_, release), ring(gateway, "stubborn") as retell:
        retell.begins()
        retell.speaks(ORDER)
        first = retell.asks()
        call = retell.invoked()
        retell.hears(first)
        retell.speaks("No, I meant the order 99.")
        second = retell.finished(retell.asks())
        other = retell.invoked(2)
        assert call.result is None and json.loads(other.result) == {"status": "at once"}
        [(running, outcome), answered] = calls(history(gateway))
        assert running == call.id and not outcome.startswith("{") and answered == (other.id, other.result)
        release.set()
        assert json.loads(retell.settled(call).result) == {"status": "held"}
        assert not first.complete
        retell.hears(second)
        rows = history(gateway)
        assert calls(rows) == [(call.id, call.result), (other.id, other.result)]
        retell.answers("And what about the first one?")
        assert talk(history(gateway)) == transcript(retell)
        assert len(bot.asked("/slow")) >= 3, "it was not asked again"


@pytest.mark.parametrize("agent", ["broken", "late", "dead"])
def test_a_tool_that_fails_is_told_in_words(gateway, bot, agent):
    release = threading.Event()
    answers = {
        "broken": lambda _: (500, "text/plain", b"Traceback: the database is gone"),
        "late": lambda _: release.wait(80) and None,
        "dead": lambda _: None,
    }
    bot.answers[f"/{agent}"] = answers[agent]
    try:
        with ring(gateway, agent) as retell:
            retell.begins()
            answer = retell.answers(ORDER)
            call = retell.settled(retell.invoked())
            assert "error" in call.result and "Traceback" not in call.result
            assert all(around(answer, call)), "the caller is told something before and afterwards"
            [(known, why)] = calls(history(gateway))
            assert known == call.id and why in json.loads(call.result)["error"]
            assert talk(history(gateway)) == transcript(retell)
    finally:
        release.set()


def test_the_agent_hangs_up(gateway):
    with ring(gateway, "leaver") as retell:
        retell.begins()
        answer = retell.answers("Thank you, bye.")
        assert answer.end_call and answer.transfer_number is None
        assert " ".join(answer.words) == "Thank you for calling. Goodbye!"
        assert retell.invoked().name == "end_call"
        assert retell.frames[answer.at[-1]]["content_complete"] is True
        assert retell.invoked().invoked_at < answer.at[-1] == len(retell.frames) - 1


def test_a_caller_who_interrupts_the_goodbye_is_not_cut_off(gateway):
    with ring(gateway, "leaver") as retell:
        retell.begins()
        answer = retell.answers("Thank you, bye.")
        assert answer.end_call
        # They spoke before all was said, so Retell did not hang up.
        retell.transcript.pop()
        retell.hears(answer, 1)
        retell.answers("Oh, one more thing.")
        assert talk(history(gateway)) == transcript(retell)


def test_the_agent_hands_the_caller_over(gateway):
    with ring(gateway, "mover") as retell:
        retell.begins()
        answer = retell.answers("I want to talk to a person.")
        assert answer.transfer_number == "+15551234567" and not answer.end_call
        assert answer.text.strip(), "the caller hears what happens"
        call = retell.invoked()
        assert call.name == "transfer_call" and call.arguments["to"] == "the front desk"
        assert call.invoked_at < answer.at[-1] == len(retell.frames) - 1


# === Connections ===


def test_a_lost_connection_in_mid_answer(gateway):
    with ring(gateway, "chatty") as retell:
        retell.begins()
        retell.answers(ORDER)
        known = session(gateway)["id"]
        retell.speaks("And the other one?")
        lost = retell.asks()
        retell.settled(retell.invoked(2))
        filler = len(lost.words)
        retell.said(lost, filler + 3)
        retell.hears(lost, filler + 2)
        retell.drop()
        # No second greeting; the simulator does not take one.
        retell.reconnect()
        retell.speaks("Are you still there?")
        answer = retell.asks()
        third = retell.settled(retell.invoked(3))
        assert all(around(retell.finished(answer), third))
        retell.hears(answer)
        assert session(gateway)["id"] == known
        rows = history(gateway)
        assert talk(rows) == transcript(retell)
        assert calls(rows) == [(call.id, call.result) for call in retell.calls.values()]


def test_a_connection_that_was_lost_between_turns(gateway):
    with ring(gateway, "shop") as retell:
        retell.begins()
        retell.answers(ORDER)
        count = len(sessions(gateway))
        retell.drop()
        retell.reconnect()
        retell.ping()
        assert [frame["response_type"] for frame in retell.frames] == ["config"], "nothing is said once more"
        retell.answers("And the other one?")
        assert len(sessions(gateway)) == count
        rows = history(gateway)
        assert talk(rows) == transcript(retell)
        assert calls(rows) == [(call.id, call.result) for call in retell.calls.values()]


def test_a_tool_answers_while_the_connection_is_lost(gateway, bot):
    with held(bot, "/slow") as (_, release), ring(gateway, "stubborn") as retell:
        retell.begins()
        retell.speaks(ORDER)
        lost = retell.asks()
        call = retell.invoked()
        retell.hears(lost)
        retell.drop()
        release.set()
        retell.reconnect()
        retell.speaks("Are you still there?")
        answer = retell.asks()
        retell.invoked(2)
        retell.hears(retell.finished(answer))
        rows = history(gateway)
        assert talk(rows) == transcript(retell)
        assert calls(rows)[0] == (call.id, '{"status":"held"}')


def test_a_new_connection_takes_the_call_over(gateway):
    with ring(gateway, "brief") as old:
        old.begins()
        old.answers("Do you sell roses?")
        with ring(gateway, "brief", call_id=old.call_id) as new:
            new.transcript = old.transcript
            new.call_details()
            assert old.wait_closed()[0] == 4409
            new.answers("Are you still there?")
            assert talk(history(gateway)) == transcript(new)
            assert 0 not in new.responses, "the caller was greeted already"


# === Who may connect ===


def refusal(gateway, path, headers=None):
    with pytest.raises(websockets.InvalidStatus) as refused:
        connect(f"{gateway.socket_url}{path}", proxy=None, additional_headers=headers)
    body = json.loads(refused.value.response.body)
    assert body["error"]["message"] and RETELL_SECRET not in json.dumps(body)
    return refused.value.response.status_code


def test_only_retell_may_connect(gateway):
    shop = "/agents/shop/retell"
    assert refusal(gateway, f"{shop}/wrong-secret-of-retell/llm-websocket/call_1") == 403
    assert refusal(gateway, f"{shop}/{RETELL_SECRET[:-1]}/llm-websocket/call_1") == 403
    assert refusal(gateway, f"{shop}/llm-websocket/call_1") == 403
    for forwarded in ("203.0.113.9", f"{RETELLS_ADDRESS}, 203.0.113.9", "nonsense"):
        assert refusal(gateway, f"{shop}/llm-websocket/call_1", {"x-forwarded-for": forwarded}) == 403
    # Without the secret nobody learns which agents there are.
    assert refusal(gateway, "/agents/nobody/retell/wrong-secret-of-retell/llm-websocket/call_1") == 403
    assert refusal(gateway, f"/agents/nobody/retell/{RETELL_SECRET}/llm-websocket/call_1") == 404
    assert refusal(gateway, f"{shop}/{RETELL_SECRET}/llm-websocket/{'x' * 129}") == 400
    plain = httpx.get(f"{gateway.url}{shop}/{RETELL_SECRET}/llm-websocket/call_1")
    assert plain.status_code == 426
    assert RETELL_SECRET not in gateway.log.read_text(errors="replace"), "secrets stay out of the log"


def test_an_address_of_retells_may_connect_without_the_secret(gateway):
    with Retell(gateway, "shop", headers={"x-forwarded-for": f"10.0.0.1, {RETELLS_ADDRESS}"}) as retell:
        assert retell.begins().text.startswith("Hello there")


# === What Retell never sends ===


def nested(depth):
    return "[" * depth + "]" * depth


def test_frames_that_make_no_sense_do_not_end_a_call(gateway):
    wrong = [None, True, -1, 1.5, "x", [], {}, [[]], [None], {"a": {}}]
    with ring(gateway, "brief") as retell:
        # Before anything is known of the call.
        retell.update()
        retell.raw(b"\x00\xff")
        retell.raw("not JSON")
        retell.begins()
        for message in (b"", b"{}", "", "{", "null", "5", '"x"', "[]", "{}", nested(100), nested(100_000), "\x00"):
            retell.raw(message)
        retell.raw('{"interaction_type": "update_only", "transcript": ' + nested(120) + "}")
        for value in wrong:
            retell.send(interaction_type=value)
            retell.send(interaction_type=value, response_id=1, transcript=[])
            retell.send(interaction_type="update_only", transcript=value)
            retell.send(interaction_type="update_only", transcript=[value], turntaking=value)
            retell.send(interaction_type="update_only", transcript=[{"role": value, "content": value, "words": value}])
            retell.send(interaction_type="update_only", transcript=[{"role": "user", "content": value}])
            retell.send(interaction_type="call_details", call=value)
        for value in (None, True, "1", 1.5, -1, -(2**63), 2**63, 10**40, [1], {"id": 1}):
            retell.send(interaction_type="response_required", response_id=value, transcript=retell.transcript)
            retell.send(interaction_type="reminder_required", response_id=value, transcript=retell.transcript)
        retell.send(interaction_type="response_required", transcript=retell.transcript)
        retell.ping()
        assert [frame["response_type"] for frame in retell.frames] == ["config", "response"]
        retell.answers("Do you sell roses?")
        assert talk(history(gateway)) == transcript(retell)


def test_transcripts_that_make_no_sense_are_answered(gateway):
    with ring(gateway, "brief") as retell:
        retell.begins()
        known = list(retell.transcript)
        odd = [None, "x", {}, [], [None], [[]], [5], [{"role": 5, "content": "x"}], [{"role": "user", "content": 5}]]
        for value in odd:
            retell.transcript = value
            retell.asks()
        retell.transcript = known
        retell.answers("Do you sell roses?")
        [*_, user, agent] = talk(history(gateway))
        assert [user, agent] == transcript(retell)[1:]


@pytest.mark.parametrize(
    "call",
    [
        None,
        "x",
        [],
        {},
        {"metadata": [1], "retell_llm_dynamic_variables": "x", "from_number": 5, "to_number": {}, "direction": None},
        {"metadata": {"customer_name": {"a": [None] * 1000}, "shop": None, "": 1}, "call_id": "another"},
        {"retell_llm_dynamic_variables": {"customer_name": "{{ shop }}{% for %}\u2028" + "x" * 100_000}},
        {"retell_llm_dynamic_variables": {f"name_{n}": "x" for n in range(5_000)}},
    ],
)
def test_details_that_make_no_sense_begin_a_call(gateway, call):
    with ring(gateway, "brief") as retell:
        retell.send(interaction_type="call_details", call=call)
        assert retell.finished(0).text.startswith("Hello ")
        retell.call_details()
        retell.ping()
        assert len(retell.frames) == 2, "a call begins once"


def test_a_request_before_the_details_of_the_call(gateway):
    with ring(gateway, "brief") as retell:
        retell.speaks("Do you sell roses?", live=False, turn_ends=False)
        response = retell.finished(retell.asks())
        assert response.text.strip()
        retell.hears(response)
        retell.call_details()
        retell.answers("And tulips?")
        assert talk(history(gateway)) == transcript(retell)


def test_a_huge_response_id(gateway):
    with ring(gateway, "brief") as retell:
        retell.begins()
        retell.last_id = 2**53
        retell.answers("Do you sell roses?")
        retell.answers("And tulips?")
        assert talk(history(gateway)) == transcript(retell)


def test_a_transcript_of_five_thousand_utterances(gateway):
    with ring(gateway, "brief") as retell:
        retell.begins()
        for n in range(2_500):
            retell.transcript += [{"role": "agent", "content": "Yes."}, {"role": "user", "content": f"No {n}."}]
        response = retell.finished(retell.asks())
        assert response.text.strip()
        retell.hears(response)
        for question in ("Do you sell roses?", "And tulips?"):
            retell.answers(question, live=False)
        assert talk(history(gateway))[-5:] == transcript(retell)[-5:]


def test_a_call_of_an_hour(gateway):
    """Every frame holds the words of the whole call, with their times."""
    with ring(gateway, "brief") as retell:
        retell.begins()
        turn = 0
        while retell.seconds < 3600:
            turn += 1
            for role in ("user", "agent"):
                text = f"This is what the {role} said in turn {turn}, and it was neither short nor very long."
                retell.transcript.append(retell.utterance(role, " ".join([text] * 3)))
        retell.answers("Do you sell roses?", live=False)
        assert talk(history(gateway))[-2:] == transcript(retell)[-2:]
