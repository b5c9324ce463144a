"""LiveKit's `openai.responses.LLM`, unpatched: only the URL and the key are ours."""

import asyncio
import contextlib
import json
import os
import pathlib
import subprocess
import sys
from typing import Literal

import pytest
from line import Line
from livekit.agents import (
    Agent,
    AgentSession,
    APIConnectionError,
    APIConnectOptions,
    APIStatusError,
    function_tool,
    utils,
)
from livekit.agents.llm import ChatContext, ToolContext, execute_function_call
from livekit.plugins import openai

MODEL = "electron"
WITHIN = 120

VOICE_PROMPT = "You are a friendly phone agent. Briefly acknowledge out loud before using any tool."

# One try, so that no error hides behind a second one.
ONCE = APIConnectOptions(max_retry=0, timeout=30)


@function_tool
async def find_order(order_id: Literal["1234", "5678"]) -> str:
    """Look up the state of an order."""
    return f"Order {order_id} is shipped."


@function_tool
async def cancel_order(order_id: Literal["1234", "5678"], refund: bool) -> str:
    """Cancel an order."""
    return f"Order {order_id} is cancelled."


TOOLS = [find_order, cancel_order]


def numbers(at_least, at_most):
    """An answer whose length the model cannot choose.

    To LiveKit an answer that is cut by the limit of tokens is an error, and a small model may never end by itself.
    """
    listed = {"type": "array", "items": {"type": "integer", "enum": [1, 2, 3]}}
    schema = {
        "type": "object",
        "properties": {"numbers": {**listed, "minItems": at_least, "maxItems": at_most}},
        "required": ["numbers"],
        "additionalProperties": False,
    }
    return {"text": {"format": {"type": "json_schema", "name": "numbers", "strict": True, "schema": schema}}}


SHORT, LONG, ENDLESS = numbers(1, 2), numbers(30, 30), numbers(300, 300)


class Call:
    """A call: its history, and a model that answers it."""

    def __init__(self, llm, instruction="Be brief."):
        self.llm = llm
        self.history = ChatContext.empty()
        self.history.add_message(role="system", content=instruction)
        self.errors = []
        llm.on("error", self.errors.append)

    def says(self, words):
        self.history.add_message(role="user", content=words)

    def ask(self, options=ONCE, tools=None, **rest):
        """A stream of the answer. `rest` goes to `chat`, or else into the request as it is."""
        known = {name: rest.pop(name) for name in ("tool_choice", "parallel_tool_calls") if name in rest}
        return self.llm.chat(chat_ctx=self.history, tools=tools, conn_options=options, extra_kwargs=rest, **known)

    async def answer(self, **rest):
        """The whole answer, which becomes part of the history as it does in an agent's session."""
        answer = await self.ask(**rest).collect()
        if answer.text:
            self.history.add_message(role="assistant", content=answer.text)
        for wanted in answer.tool_calls:
            done = await execute_function_call(wanted, ToolContext(TOOLS))
            assert done.raw_exception is None, "the arguments fit the function"
            self.history.insert([done.fnc_call, done.fnc_call_out])
        return answer


def model(port, key, path="/v1/responses", **options):
    return openai.responses.LLM(
        model=MODEL, api_key=key, base_url=f"http://127.0.0.1:{port}{path}", temperature=0, **options
    )


def play(scene, server):
    """Runs a scene on a line to the server, in bounded time."""

    async def run():
        async with asyncio.timeout(WITHIN), Line(server.url) as line, utils.http_context.open():
            await scene(line)

    asyncio.run(run())


def check_numbers(text, at_least):
    assert len(json.loads(text)["numbers"]) >= at_least


# === Turns ===


def test_words_of_its_own(server, key):
    async def scene(line):
        async with model(line.port, key, max_output_tokens=40) as llm:
            call = Call(llm)
            call.says("Say hello.")
            words = ""
            try:
                async with call.ask() as stream:
                    async for chunk in stream:
                        words += chunk.delta.content or "" if chunk.delta else ""
            except APIStatusError as error:
                # The model may or may not have come to an end within the limit.
                assert "max_output_tokens" in error.message
            assert words.strip()

    play(scene, server)


def test_turns_go_on_over_one_connection(server, key):
    async def scene(line):
        async with model(line.port, key) as llm:
            llm.prewarm()
            call = Call(llm)
            usage = []
            for words in ("Some numbers, please.", "And more.", "Again."):
                call.says(words)
                answer = await call.answer(**SHORT)
                check_numbers(answer.text, 1)
                usage.append(answer.usage)
            assert line.connections == 1
            assert usage[0].prompt_tokens > 0 and usage[0].completion_tokens > 0
            for before, after in zip(usage, usage[1:], strict=False):
                assert after.prompt_tokens > before.prompt_tokens
                assert 0 < after.prompt_cached_tokens < after.prompt_tokens
                assert after.total_tokens == after.prompt_tokens + after.completion_tokens

    play(scene, server)


def test_what_has_been_said_counts_once(server, key):
    """LiveKit tells the server what the server said, after the id of the response in which it said it."""

    async def scene(line):
        async with model(line.port, key) as llm, model(line.port, key) as stranger:
            call = Call(llm, VOICE_PROMPT)
            call.says("Where is my order 1234?")
            assert (await call.answer(tools=TOOLS, tool_choice="required")).tool_calls
            await call.answer(tools=TOOLS, tool_choice="none", **SHORT)
            call.says("Some numbers, please.")
            going_on = call.ask(tools=TOOLS, tool_choice="none", **SHORT)
            anew = Call(stranger)
            anew.history = call.history
            anew = anew.ask(tools=TOOLS, tool_choice="none", **SHORT)
            going_on, anew = [(await stream.collect()).usage for stream in (going_on, anew)]
            assert going_on.prompt_tokens == anew.prompt_tokens

    play(scene, server)


def test_a_prompt_that_changes(server, key):
    """The whole conversation is told anew."""

    async def scene(line):
        async with model(line.port, key) as llm:
            call = Call(llm)
            for prompt in ("Be brief.", "Be polite."):
                call.history.items[0].content = [prompt]
                call.says("Some numbers, please.")
                check_numbers((await call.answer(**SHORT)).text, 1)
            assert line.connections == 1
            assert call.errors == []

    play(scene, server)


def test_two_at_once(server, key):
    async def scene(line):
        async with model(line.port, key) as llm:
            calls = [Call(llm), Call(llm)]
            for call in calls:
                call.says("Some numbers, please.")
            for answer in await asyncio.gather(*(call.answer(**SHORT) for call in calls)):
                check_numbers(answer.text, 1)
            calls[0].says("And more.")
            check_numbers((await calls[0].answer(**SHORT)).text, 1)

    play(scene, server)


# === Tools ===


@pytest.mark.parametrize("transport", ["websocket", "http"])
def test_a_tool(server, key, transport):
    """Filler, call, result, answer."""

    async def scene(line):
        websocket = transport == "websocket"
        path = "/v1/responses" if websocket else "/v1"
        async with model(line.port, key, path, use_websocket=websocket, parallel_tool_calls=False) as llm:
            call = Call(llm, VOICE_PROMPT)
            # The same words twice would be the same prompt twice, which is not served from the prefix cache.
            call.says(f"Where is my order 1234, by {transport}?")
            asked = await call.answer(tools=TOOLS, tool_choice="required")
            assert asked.text and "{" not in asked.text
            assert len(asked.tool_calls) == 1
            assert call.history.items[-1].type == "function_call_output"
            answer = await call.answer(tools=TOOLS, tool_choice="none", **SHORT)
            check_numbers(answer.text, 1)
            assert not answer.tool_calls
            assert answer.usage.prompt_cached_tokens > 0
            call.says("Thank you.")
            check_numbers((await call.answer(tools=TOOLS, tool_choice="none", **SHORT)).text, 1)
            assert call.errors == []
            assert not websocket or line.connections == 1

    play(scene, server)


def test_a_named_tool_is_the_one_that_is_called(server, key):
    async def scene(line):
        async with model(line.port, key) as llm:
            for tool in TOOLS:
                call = Call(llm)
                call.says("Hello!")
                choice = {"type": "function", "function": {"name": tool.info.name}}
                answer = await call.answer(tools=TOOLS, tool_choice=choice, parallel_tool_calls=False)
                assert [wanted.name for wanted in answer.tool_calls] == [tool.info.name]
                assert not answer.text

    play(scene, server)


def test_words_that_came_out_differently(server, key):
    """With speech that tells what it spoke, LiveKit's history holds that, which need not be what was written."""

    async def scene(line):
        async with model(line.port, key, parallel_tool_calls=False) as llm:
            call = Call(llm, VOICE_PROMPT)
            call.says("Where is my order 1234?")
            asked = await call.ask(tools=TOOLS, tool_choice="required").collect()
            done = await execute_function_call(asked.tool_calls[0], ToolContext(TOOLS))
            call.history.add_message(role="assistant", content="Hm, hm.")
            call.history.insert([done.fnc_call, done.fnc_call_out])
            check_numbers((await call.answer(tools=TOOLS, tool_choice="none", **SHORT)).text, 1)
            call.says("Thank you.")
            check_numbers((await call.answer(tools=TOOLS, tool_choice="none", **SHORT)).text, 1)

    play(scene, server)


def test_an_agents_session(server, key):
    """The whole machinery of LiveKit, with text in and out."""

    async def scene(line):
        async with model(line.port, key, max_output_tokens=80, parallel_tool_calls=False) as llm:
            errors = []
            session = AgentSession(llm=llm, vad=None, turn_handling={"turn_detection": None})
            session.on("error", lambda event: errors.append(event.error.error))
            await session.start(Agent(instructions=VOICE_PROMPT, tools=TOOLS), record=False)
            for words, choice in (("Where is my order 1234?", "required"), ("Thank you.", "none")):
                # Its answers are the model's own words, which may be cut.
                with contextlib.suppress(APIStatusError):
                    await session.generate_reply(user_input=words, tool_choice=choice)
            await session.aclose()
            assert all("max_output_tokens" in error.message for error in errors)
            items = [item for item in session.history.items if not item.type.startswith("agent_")]
            kinds = [item.role if item.type == "message" else item.type for item in items]
            assert kinds[:4] == ["user", "assistant", "function_call", "function_call_output"]
            assert kinds.count("user") == 2 and kinds[-1] == "assistant"
            assert not any(item.is_error for item in items if item.type == "function_call_output")

    play(scene, server)


# === Interruptions, and lines that drop ===


def test_an_interruption(server, key):
    """LiveKit leaves the connection as it is, and closes it when the next turn starts."""

    async def scene(line):
        cancelled = server.metric('electron_turns_total{finish_reason="cancelled"}')
        async with model(line.port, key) as llm:
            call = Call(llm)
            call.says("Some numbers, please.")
            await call.answer(**SHORT)
            call.says("Say numbers until I stop you.")
            heard = ""
            async with call.ask(**ENDLESS) as stream:
                async for chunk in stream:
                    heard += chunk.delta.content or "" if chunk.delta else ""
                    if len(heard) > 12:
                        break
            call.history.add_message(role="assistant", content=heard, interrupted=True)
            call.says("Stop. Now only a few.")
            check_numbers((await call.answer(**SHORT)).text, 1)
            assert line.connections == 2
            assert call.errors == []
            assert server.metric('electron_turns_total{finish_reason="cancelled"}') == cancelled + 1

    play(scene, server)


def test_less_was_heard_than_was_said(server, key):
    """The caller interrupts while an answer is spoken that has long been written: the history holds its beginning."""

    async def scene(line):
        async with model(line.port, key) as llm, model(line.port, key) as stranger:
            call = Call(llm)
            call.says("Many numbers, please.")
            answer = await call.ask(**LONG).collect()
            call.history.add_message(role="assistant", content=answer.text[:20], interrupted=True)
            call.says("Stop. Now only a few.")
            going_on = call.ask(**SHORT)
            anew = Call(stranger)
            anew.history = call.history
            anew = anew.ask(**SHORT)
            going_on, anew = [(await stream.collect()).usage for stream in (going_on, anew)]
            assert going_on.prompt_tokens == anew.prompt_tokens, "what was not heard is not in the conversation"

    play(scene, server)


def test_a_connection_that_drops_between_turns(server, key):
    """LiveKit goes on from the last response all the same, over another connection."""

    async def scene(line):
        async with model(line.port, key) as llm:
            call = Call(llm)
            for count in (1, 2, 3):
                # Words of their own: what another call has said to the letter is not served from the prefix cache.
                call.says(f"Some numbers in spite of the noise, part {count}, please.")
                answer = await call.answer(**SHORT)
                check_numbers(answer.text, 1)
                assert line.connections == count
                assert count == 1 or answer.usage.prompt_cached_tokens > 0
                await line.cut()
            assert call.errors == []

    play(scene, server)


def test_a_connection_that_drops_in_mid_answer(server, key):
    async def scene(line):
        async with model(line.port, key) as llm:
            call = Call(llm)
            call.says("Some numbers, please.")
            await call.answer(**SHORT)
            call.says("Many numbers, please.")
            heard = ""
            async with call.ask(APIConnectOptions(max_retry=1), **LONG) as stream:
                async for chunk in stream:
                    whole = heard.endswith("}")
                    heard += chunk.delta.content or "" if chunk.delta else ""
                    if line.connections == 1 and len(heard) > 12:
                        await line.cut()
            # LiveKit asks once more, so that the beginning is heard twice.
            assert whole
            check_numbers(heard[heard.rindex("{") :], 30)
            assert line.connections == 2
            assert [error.recoverable for error in call.errors] == [True]

    play(scene, server)


# === Errors ===


def test_a_response_that_the_server_does_not_know(server, key):
    """LiveKit does not ask again by itself, so the message is all that its user gets."""

    async def scene(line):
        async with model(line.port, key) as llm:
            call = Call(llm)
            call.says("Some numbers, please.")
            with pytest.raises(APIStatusError) as caught:
                await call.answer(previous_response_id="resp_of_another_server", **SHORT)
            assert "resp_of_another_server" in caught.value.message
            assert [error.recoverable for error in call.errors] == [False]
            check_numbers((await call.answer(**SHORT)).text, 1)

    play(scene, server)


def test_a_bad_request_names_the_field(server, key):
    async def scene(line):
        async with model(line.port, key) as llm:
            call = Call(llm)
            call.says("Some numbers, please.")
            with pytest.raises(APIStatusError) as caught:
                await call.answer(top_p=9)
            assert "top_p" in caught.value.message

    play(scene, server)


def test_a_wrong_key(server):
    async def scene(line):
        async with model(line.port, "wrong") as llm:
            call = Call(llm)
            call.says("Hello?")
            with pytest.raises(APIConnectionError):
                await call.answer()

    play(scene, server)


# === The example ===


def test_the_example(server, key):
    program = pathlib.Path(__file__).parents[3] / "examples" / "livekit_agent.py"
    url = server.url.replace("http", "ws") + "/v1/responses"
    done = subprocess.run(
        [sys.executable, program],
        input="Hello!\nWhere is my order 1234?\n",
        env={**os.environ, "ELECTRON_URL": url, "ELECTRON_API_KEY": key},
        capture_output=True,
        text=True,
        timeout=2 * WITHIN,
    )
    assert done.returncode == 0, done.stderr
    assert len([line for line in done.stdout.splitlines() if line.removeprefix("Agent: ") not in (line, "")]) >= 2
