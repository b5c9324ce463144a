"""Pipecat's `OpenAIResponsesLLMService`, unpatched: only the URL and the key are ours."""

import asyncio
import json
import os
import pathlib
import subprocess
import sys

import pytest
from line import Line
from loguru import logger
from pipecat.adapters.llm.schemas.function_schema import FunctionSchema
from pipecat.adapters.llm.schemas.tools_schema import ToolsSchema
from pipecat.frames.frames import (
    EndFrame,
    LLMTextFrame,
    LLMUpdateSettingsFrame,
    MetricsFrame,
    ProposedUserStartedSpeakingFrame,
    ProposedUserStoppedSpeakingFrame,
    TranscriptionFrame,
)
from pipecat.metrics.metrics import LLMUsageMetricsData
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineParams, PipelineWorker
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.aggregators.llm_response_universal import LLMContextAggregatorPair, LLMUserAggregatorParams
from pipecat.processors.frame_processor import FrameProcessor
from pipecat.services.openai.responses.llm import OpenAIResponsesHttpLLMService, OpenAIResponsesLLMService
from pipecat.turns.user_turn_strategies import ExternalUserTurnStrategies
from pipecat.utils.errors import ErrorCategory
from pipecat.workers.runner import WorkerRunner

MODEL = "electron"
WITHIN = 120

VOICE_PROMPT = "You are a friendly phone agent. Briefly acknowledge out loud before using any tool."

FIND_ORDER = FunctionSchema(
    name="find_order",
    description="Look up the state of an order.",
    properties={"order_id": {"type": "string", "enum": ["1234", "5678"]}},
    required=["order_id"],
)


def numbers(at_least, at_most):
    """An answer whose length the model cannot choose.

    To Pipecat an answer that is cut by the limit of tokens is an error, and a small model may never end by itself.
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


class Ear(FrameProcessor):
    """Stands where text-to-speech would, and keeps what it hears."""

    def __init__(self):
        super().__init__()
        self.heard = []
        self.usage = []
        self._changed = asyncio.Condition()

    async def process_frame(self, frame, direction):
        await super().process_frame(frame, direction)
        if isinstance(frame, LLMTextFrame):
            async with self._changed:
                self.heard.append(frame.text)
                self._changed.notify_all()
        if isinstance(frame, MetricsFrame):
            self.usage += [data.value for data in frame.data if isinstance(data, LLMUsageMetricsData)]
        await self.push_frame(frame, direction)

    async def until(self, enough):
        """Waits until what has been heard is enough."""
        async with self._changed:
            await self._changed.wait_for(lambda: enough(self.heard))


class Call:
    """A call: the caller's words in, turns of the bot out."""

    def __init__(self, llm, tools=()):
        self.llm = llm
        self.context = LLMContext(tools=ToolsSchema(standard_tools=list(tools)))
        self.ear = Ear()
        self.turns = asyncio.Queue()
        self.errors = []
        pair = LLMContextAggregatorPair(
            self.context, user_params=LLMUserAggregatorParams(user_turn_strategies=ExternalUserTurnStrategies())
        )
        self.worker = PipelineWorker(
            Pipeline([pair.user(), llm, self.ear, pair.assistant()]),
            params=PipelineParams(enable_metrics=True, enable_usage_metrics=True),
            enable_rtvi=False,
            cancel_on_idle_timeout=False,
        )

        # Of the service alone; the worker warns of every error that is told to it.
        self.warnings = []
        self.started = asyncio.Event()

        @self.worker.event_handler("on_pipeline_started")
        async def _(*_):
            self.started.set()

        self._said = asyncio.Queue()

        @pair.user().event_handler("on_user_turn_message_added")
        async def _(_, message):
            await self._said.put(message)

        @pair.assistant().event_handler("on_assistant_turn_stopped")
        async def _(_, message):
            await self.turns.put(message)

        self.failed = asyncio.Event()

        @llm.event_handler("on_error")
        async def _(_, error):
            self.errors.append(error)
            self.failed.set()

        self._settled = asyncio.Event()

        @llm.event_handler("on_after_process_frame")
        async def _(_, frame):
            if isinstance(frame, LLMUpdateSettingsFrame):
                self._settled.set()

    async def __aenter__(self):
        self._sink = logger.add(self.warnings.append, level="WARNING", filter="pipecat.services")
        self._runner = WorkerRunner(handle_sigint=False)
        await self._runner.add_workers(self.worker)
        self._running = asyncio.create_task(self._runner.run())
        return self

    async def __aexit__(self, kind, *_):
        if kind is None:
            await self.worker.queue_frame(EndFrame())
        else:
            await self.worker.cancel()
        await self._running
        logger.remove(self._sink)

    async def says(self, words, **extra):
        """The caller says something, as a service for speech-to-text tells it: that interrupts what the bot was saying.

        Comes back once the words are in the history and the turn is on its way. `extra` is as in `set`.
        """
        await self.worker.queue_frame(ProposedUserStartedSpeakingFrame())
        if extra:
            await self.set(**extra)
        await self.worker.queue_frame(TranscriptionFrame(words, "caller", "", finalized=True))
        await self.worker.queue_frame(ProposedUserStoppedSpeakingFrame())
        await self._said.get()

    async def set(self, **extra):
        """Changes what is sent with every turn from here on, once the one that runs is over."""
        self._settled.clear()
        settings = type(self.llm).Settings(extra=extra)
        await self.worker.queue_frame(LLMUpdateSettingsFrame(delta=settings))
        await self._settled.wait()

    async def turn(self):
        """What the bot says next."""
        return await self.turns.get()

    async def whole_turn(self):
        """What the bot says next to the end; what was cut off comes as a turn, too."""
        while not (text := (await self.turn()).content).endswith("}"):
            assert self.errors == []
        return text

    def messages(self, role):
        return [message for message in self.context.get_messages() if message["role"] == role]


def service(port, key, kind=OpenAIResponsesLLMService, instruction="Be brief.", limit=None, **extra):
    settings = kind.Settings(model=MODEL, system_instruction=instruction, temperature=0, extra=extra)
    if limit is not None:
        settings.max_completion_tokens = limit
    http = {"base_url": f"http://127.0.0.1:{port}/v1"}
    ws = {"ws_url": f"ws://127.0.0.1:{port}/v1/responses"} if kind is OpenAIResponsesLLMService else {}
    return kind(api_key=key, settings=settings, **http, **ws)


def play(scene, server):
    """Runs a scene on a line to the server, in bounded time."""

    async def run():
        async with asyncio.timeout(WITHIN), Line(server.url) as line:
            await scene(line)

    asyncio.run(run())


def check_numbers(text, at_least):
    assert len(json.loads(text)["numbers"]) >= at_least


# === Turns ===


def test_words_of_its_own(server, key):
    async def scene(line):
        async with Call(service(line.port, key, limit=40)) as call:
            await call.says("Say hello.")
            turn = await call.turn()
            assert turn.content.strip()
            assert turn.content == "".join(call.ear.heard).strip()
            # The model may or may not have come to an end within the limit.
            assert all("max_output_tokens" in error.error for error in call.errors)

    play(scene, server)


def test_turns_go_on_over_one_connection(server, key):
    async def scene(line):
        async with Call(service(line.port, key, **SHORT)) as call:
            for count, text in enumerate(["Some numbers, please.", "And more.", "Again."], start=1):
                await call.says(text)
                check_numbers((await call.turn()).content, 1)
                assert len(call.messages("user")) == len(call.messages("assistant")) == count
            assert line.connections == 1
            assert call.errors == []
            first, *later = call.ear.usage
            assert first.prompt_tokens > 0 and first.completion_tokens > 0
            for before, after in zip(call.ear.usage, later, strict=False):
                assert after.prompt_tokens > before.prompt_tokens
                assert 0 < after.cache_read_input_tokens < after.prompt_tokens

    play(scene, server)


def test_an_answer_past_the_limit_is_spoken_and_the_call_goes_on(server, key):
    async def scene(line):
        async with Call(service(line.port, key, limit=8, **LONG)) as call:
            await call.says("Many numbers, please.")
            assert (await call.turn()).content
            assert [error.error for error in call.errors] == ["LLM response error: max_output_tokens"]
            await call.says("Fewer, please.", **SHORT, max_output_tokens=40)
            check_numbers((await call.turn()).content, 1)
            assert line.connections == 1 and len(call.errors) == 1

    play(scene, server)


def test_a_one_off_question_beside_the_call(server, key):
    """What Pipecat does for summaries: over HTTP, whole, at the base URL."""

    async def scene(line):
        async with Call(service(line.port, key, **SHORT)) as call:
            aside = LLMContext([{"role": "user", "content": "Some numbers, please."}])
            check_numbers(await call.llm.run_inference(aside, max_tokens=40), 1)
            schema = SHORT["text"]["format"]["schema"]
            check_numbers(await call.llm.run_inference(aside, max_tokens=40, response_schema=schema), 1)

    play(scene, server)


# === Calls of functions ===


@pytest.mark.parametrize(
    ("kind", "question"),
    [
        (OpenAIResponsesLLMService, "Where is my order 1234?"),
        (OpenAIResponsesHttpLLMService, "My order is 1234. Where is it?"),
    ],
)
def test_a_function(server, key, kind, question):
    """Filler, call, result, answer.

    Each asks in words of its own: a prompt that is in the prefix cache to its last token is not served from there, and
    with the same filler the answers' prompts would be the same.
    """

    async def scene(line):
        asked = []
        llm = service(line.port, key, kind, VOICE_PROMPT, tool_choice="required", parallel_tool_calls=False)
        call = Call(llm, [FIND_ORDER])

        async def find_order(params):
            asked.append(dict(params.arguments))
            # Pipecat asks the model again once it has the result; that answer is to be spoken.
            await call.set(tool_choice="none", **SHORT)
            await params.result_callback({"state": "shipped"})

        llm.register_function("find_order", find_order)
        async with call:
            await call.says(question)
            filler = await call.turn()
            assert filler.content and "{" not in filler.content
            check_numbers((await call.turn()).content, 1)
            assert len(asked) == 1 and asked[0]["order_id"] in ("1234", "5678")
            assert call.errors == []
            (called,) = [m["tool_calls"][0] for m in call.messages("assistant") if "tool_calls" in m]
            (result,) = call.messages("tool")
            assert result["tool_call_id"] == called["id"] and json.loads(result["content"]) == {"state": "shipped"}
            # The answer builds on the turn that called, so that much of its prompt has been read before.
            assert call.ear.usage[1].cache_read_input_tokens > 0

            await call.says("Thank you.")
            check_numbers((await call.turn()).content, 1)
            assert call.errors == []

    play(scene, server)


def test_two_functions_at_once(server, key):
    """Both results are back before the model is asked again."""

    async def scene(line):
        results = []
        tools = [
            FunctionSchema("left", "Look left.", {"far": {"type": "boolean"}}, ["far"]),
            FunctionSchema("right", "Look right.", {"far": {"type": "boolean"}}, ["far"]),
        ]
        llm = service(line.port, key, tool_choice="required")
        call = Call(llm, tools)

        async def look(params):
            assert isinstance(params.arguments["far"], bool)
            await call.set(tool_choice="none", **SHORT)
            results.append(params.function_name)
            await params.result_callback({"seen": params.function_name})

        for name in ("left", "right"):
            llm.register_function(name, look)
        async with call:
            await call.says("Look left and right.")
            text = ""
            while "{" not in text:
                text = (await call.turn()).content
            check_numbers(text, 1)
            # Whether it looks once or twice is the model's choice.
            assert results and len(call.messages("tool")) == len(results)
            assert call.errors == []

    play(scene, server)


# === Interruptions ===


def test_an_interruption(server, key):
    async def scene(line):
        cancelled = server.metric('electron_turns_total{finish_reason="cancelled"}')
        async with Call(service(line.port, key, **ENDLESS)) as call:
            await call.says("Say numbers until I stop you.")
            await call.ear.until(lambda heard: len(heard) >= 4)
            await call.says("Stop. Now only a few.", **SHORT)
            turn = await call.turn()
            assert turn.content
            assert "".join(call.ear.heard).startswith(turn.content), "the history holds what was streamed, no more"
            with pytest.raises(json.JSONDecodeError):
                json.loads(turn.content)

            check_numbers((await call.turn()).content, 1)
            assert [message["role"] for message in call.context.get_messages()] == ["user", "assistant"] * 2
            assert call.messages("assistant")[0]["content"] == turn.content
            # The service has waited for the end of what it cancelled, and went on over the same connection.
            assert line.connections == 1
            assert call.errors == [] and call.warnings == []
            assert server.metric('electron_turns_total{finish_reason="cancelled"}') == cancelled + 1

    play(scene, server)


def test_an_interruption_before_the_first_word(server, key):
    """The service does not yet know what to cancel. It does so as soon as it knows, in the turn after."""

    async def scene(line):
        async with Call(service(line.port, key, **ENDLESS)) as call:
            await call.started.wait()
            line.hold()
            await call.says("Say numbers until I stop you.")
            await line.holds("response.created")
            await call.says("No, only a few.", **SHORT)
            line.release()
            check_numbers(await call.whole_turn(), 1)
            assert len(call.messages("user")) == 2
            assert line.connections == 1
            assert call.errors == [] and call.warnings == []

    play(scene, server)


def test_an_interruption_that_comes_too_late(server, key):
    """What the service cancels is over. An error would be taken for the answer to the next turn."""

    async def scene(line):
        async with Call(service(line.port, key, **numbers(150, 150))) as call:
            await call.says("Many numbers, please.")
            await call.ear.until(lambda heard: len(heard) >= 3)
            line.hold()
            await line.holds("response.completed")
            await call.says("No, only a few.", **SHORT)
            line.release()
            check_numbers(await call.whole_turn(), 1)
            await call.says("And again.")
            check_numbers((await call.turn()).content, 1)
            assert line.connections == 1
            assert call.errors == [] and call.warnings == []

    play(scene, server)


# === A line that drops ===


def test_a_connection_that_drops_between_turns(server, key):
    async def scene(line):
        async with Call(service(line.port, key, **SHORT)) as call:
            for count in (1, 2, 3):
                await call.says("Some numbers, please.")
                check_numbers((await call.turn()).content, 1)
                assert line.connections == count
                await line.cut()
            assert len(call.messages("assistant")) == 3
            assert call.errors == []

    play(scene, server)


def test_a_connection_that_drops_in_mid_answer(server, key):
    async def scene(line):
        async with Call(service(line.port, key, **LONG)) as call:
            await call.says("Many numbers, please.")
            await call.ear.until(lambda heard: len(heard) >= 3)
            await line.cut()
            turn = await call.turn()
            # Pipecat asks once more, so that the beginning is heard twice.
            check_numbers(turn.content[turn.content.rindex("{") :], 30)
            await call.says("And again.")
            check_numbers((await call.turn()).content, 30)
            assert line.connections == 2
            assert call.errors == []

    play(scene, server)


def test_a_wrong_key(server):
    async def scene(line):
        async with Call(service(line.port, "wrong")) as call:
            await call.says("Hello?")
            await call.failed.wait()
            assert call.errors[0].category == ErrorCategory.AUTHENTICATION
            assert not call.llm.is_usable
            assert call.ear.heard == []

    play(scene, server)


# === The example ===


def test_the_example(server, key):
    program = pathlib.Path(__file__).parents[3] / "examples" / "pipecat_bot.py"
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
    assert len([line for line in done.stdout.splitlines() if line.removeprefix("Bot: ") not in (line, "")]) >= 2
