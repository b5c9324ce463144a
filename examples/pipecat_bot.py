"""A voice bot on Pipecat whose model is Electron Gateway, to be tried in the terminal.

    pip install "pipecat-ai[openai]"
    ELECTRON_URL=ws://127.0.0.1:8080/v1/responses ELECTRON_API_KEY=… python pipecat_bot.py

Type what the caller says, a line at a time; what the bot would speak is printed. Ctrl-D hangs up.
"""

import asyncio
import os
import sys

from loguru import logger
from pipecat.adapters.llm.schemas.function_schema import FunctionSchema
from pipecat.frames import frames
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineWorker
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.aggregators.llm_response_universal import LLMContextAggregatorPair, LLMUserAggregatorParams
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
from pipecat.services.openai.responses.llm import OpenAIResponsesLLMService
from pipecat.turns.user_turn_strategies import ExternalUserTurnStrategies
from pipecat.workers.runner import WorkerRunner

URL = os.environ.get("ELECTRON_URL", "ws://127.0.0.1:8080/v1/responses")
# The address without "http" or "ws", since both are needed.
ADDRESS = URL.removeprefix("http").removeprefix("ws")
# The server prints one when it starts without keys of its own.
KEY = os.environ.get("ELECTRON_API_KEY") or "none"

# The second sentence is what turns the gateway's filler on: before a function is called, the caller hears "One moment,
# please." in their own language instead of silence.
INSTRUCTION = (
    "You are a friendly agent on the phone. Briefly acknowledge out loud before using any tool. "
    "Answer in one short sentence."
)

ORDERS = {"1234": "packed", "5678": "shipped"}


async def find_order(params):
    order_id = params.arguments["order_id"]
    await params.result_callback({"order": order_id, "state": ORDERS.get(order_id, "unknown")})


async def cancel_order(params):
    order_id = params.arguments["order_id"]
    if cancelled := ORDERS.get(order_id) == "packed":
        ORDERS[order_id] = f"cancelled ({params.arguments['reason']})"
    await params.result_callback({"order": order_id, "cancelled": cancelled})


# A maximum length in the schema is kept to, and keeps a small model from running on inside an argument.
ORDER_ID = {"type": "string", "description": "The number on the receipt.", "maxLength": 12}
REASON = {"type": "string", "enum": ["too late", "not needed", "other"]}
# A schema with a handler is registered with the service by itself.
TOOLS = [
    FunctionSchema("find_order", "Look up an order's state.", {"order_id": ORDER_ID}, ["order_id"], find_order),
    FunctionSchema(
        "cancel_order",
        "Cancel an order that is not shipped yet.",
        {"order_id": ORDER_ID, "reason": REASON},
        ["order_id", "reason"],
        cancel_order,
    ),
]


class Mouth(FrameProcessor):
    """Prints the words that text-to-speech would speak, as soon as they come."""

    def __init__(self):
        super().__init__()
        self.done = asyncio.Event()
        self._speaking = self._calling = False

    async def process_frame(self, frame, direction):
        await super().process_frame(frame, direction)
        if isinstance(frame, frames.LLMFullResponseStartFrame):
            self._calling = False
        elif isinstance(frame, frames.FunctionCallsStartedFrame):
            # The results will bring another response.
            self._calling = True
        elif isinstance(frame, frames.LLMTextFrame):
            print(frame.text if self._speaking else f"Bot: {frame.text.lstrip()}", end="", flush=True)
            self._speaking = True
        elif isinstance(frame, frames.LLMFullResponseEndFrame):
            if self._speaking:
                print(flush=True)
            self._speaking = False
            if not self._calling:
                self.done.set()
        await self.push_frame(frame, direction)


class Ear(FrameProcessor):
    """Takes lines that are typed for what speech-to-text has understood."""

    def __init__(self, mouth):
        super().__init__()
        self._mouth = mouth

    async def process_frame(self, frame, direction):
        await super().process_frame(frame, direction)
        await self.push_frame(frame, direction)
        if isinstance(frame, frames.StartFrame):
            self.create_task(self._listen())

    async def _listen(self):
        while line := await asyncio.to_thread(sys.stdin.readline):
            if words := line.strip():
                self._mouth.done.clear()
                # The first of these interrupts what the bot is saying; over a phone line it comes with the caller's
                # first syllable, and the gateway stops the turn at the next token.
                await self.push_frame(frames.ProposedUserStartedSpeakingFrame())
                await self.push_frame(frames.TranscriptionFrame(words, "caller", "", finalized=True))
                await self.push_frame(frames.ProposedUserStoppedSpeakingFrame())
                # Lines may come from a file, which would interrupt every answer.
                await self._mouth.done.wait()
        await self.push_frame(frames.EndWorkerFrame(), FrameDirection.UPSTREAM)


async def main():
    llm = OpenAIResponsesLLMService(
        api_key=KEY,
        ws_url=f"ws{ADDRESS}",
        # Where Pipecat asks outside of the conversation, for summaries of long ones.
        base_url=f"http{ADDRESS}".removesuffix("/responses"),
        settings=OpenAIResponsesLLMService.Settings(
            model="electron",
            system_instruction=INSTRUCTION,
            # The likeliest words; a phone line is no place for surprises.
            temperature=0,
            # To Pipecat an answer that reaches this is an error, so it is far above what a sentence takes.
            max_completion_tokens=160,
            # One call at a time is easier for a small model. There is no setting for it; this goes along as it is.
            extra={"parallel_tool_calls": False},
        ),
    )
    # The strategies are those for a speech-to-text service that finds the ends of turns itself, as `Ear` does.
    strategies = LLMUserAggregatorParams(user_turn_strategies=ExternalUserTurnStrategies())
    pair = LLMContextAggregatorPair(LLMContext(tools=TOOLS), user_params=strategies)
    mouth = Mouth()
    # For a phone line: transport.input(), stt instead of Ear; tts, transport.output() instead of Mouth.
    pipeline = Pipeline([Ear(mouth), pair.user(), llm, mouth, pair.assistant()])
    runner = WorkerRunner()
    await runner.add_workers(PipelineWorker(pipeline, enable_rtvi=False))
    await runner.run()


if __name__ == "__main__":
    logger.remove()
    logger.add(sys.stderr, level="WARNING")
    asyncio.run(main())
