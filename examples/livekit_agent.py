"""A voice agent on LiveKit Agents whose model is Electron Gateway, to be tried in the terminal.

    pip install livekit-agents livekit-plugins-openai
    ELECTRON_URL=ws://127.0.0.1:8080/v1/responses ELECTRON_API_KEY=… python livekit_agent.py

Type what the caller says, a line at a time; what the agent would speak is printed. Ctrl-D hangs up.
"""

import asyncio
import os
import sys
from typing import Annotated, Literal

from livekit.agents import Agent, AgentSession, APIError, function_tool, utils
from livekit.agents.voice.io import TextOutput
from livekit.plugins import openai
from pydantic import Field

URL = os.environ.get("ELECTRON_URL", "ws://127.0.0.1:8080/v1/responses")
# The server prints one when it starts without keys of its own.
KEY = os.environ.get("ELECTRON_API_KEY") or "none"

ORDERS = {"1234": "packed", "5678": "shipped"}

# A maximum length in the schema is kept to, and keeps a small model from running on inside an argument.
OrderId = Annotated[str, Field(description="The number on the receipt.", max_length=12)]


class OrderDesk(Agent):
    def __init__(self):
        super().__init__(
            # The second sentence is what turns the gateway's filler on: before a tool is called, the caller hears
            # "One moment, please." in their own language instead of silence.
            instructions="You are a friendly agent on the phone. Briefly acknowledge out loud before using any tool. "
            "Answer in one short sentence."
        )

    @function_tool
    async def find_order(self, order_id: OrderId) -> str:
        """Look up the state of an order."""
        state = ORDERS.get(order_id)
        return f"Order {order_id} is {state}." if state else f"There is no order {order_id}."

    @function_tool
    async def cancel_order(self, order_id: OrderId, reason: Literal["too late", "not needed", "other"]) -> str:
        """Cancel an order that is not shipped yet."""
        if ORDERS.get(order_id) != "packed":
            return f"Order {order_id} cannot be cancelled."
        ORDERS[order_id] = f"cancelled ({reason})"
        return f"Order {order_id} is cancelled."


class Terminal(TextOutput):
    """Prints what the agent says, as soon as it says it."""

    def __init__(self):
        super().__init__(label="terminal", next_in_chain=None)
        self._speaking = False

    async def capture_text(self, text: str) -> None:
        print(text if self._speaking else f"Agent: {text.lstrip()}", end="", flush=True)
        self._speaking = True

    def flush(self) -> None:
        if self._speaking:
            print(flush=True)
        self._speaking = False


async def main():
    model = openai.responses.LLM(
        model="electron",
        # The whole address with its path, unlike the base URL of OpenAI's SDKs. It may begin with http as well.
        base_url=URL,
        api_key=KEY,
        # The likeliest words; a phone line is no place for surprises.
        temperature=0,
        # One call at a time is easier for a small model, and a caller hears of each result.
        parallel_tool_calls=False,
        # To LiveKit an answer that reaches this is an error, so it is far above what a sentence takes.
        max_output_tokens=160,
    )
    # In a job of LiveKit's worker, `http_context.open()` is not needed: the worker has one.
    async with utils.http_context.open(), model:
        # For a phone line, speech comes in here: AgentSession(stt=…, tts=…, vad=…, llm=model), in an entry point that
        # `cli.run_app(server)` runs, with `await session.start(agent=OrderDesk(), room=ctx.room)`.
        session = AgentSession(llm=model, vad=None, turn_handling={"turn_detection": None})
        session.output.transcription = terminal = Terminal()
        await session.start(agent=OrderDesk(), record=False)
        try:
            while line := await asyncio.to_thread(sys.stdin.readline):
                if not (words := line.strip()):
                    continue
                try:
                    # Comes back when the agent has nothing more to say: after the tools that it called, too.
                    await session.run(user_input=words)
                except APIError as error:
                    # A call outlives a turn that goes wrong; a real agent would say that it did not understand.
                    terminal.flush()
                    print(f"({error.message})", file=sys.stderr)
        finally:
            await session.aclose()


if __name__ == "__main__":
    asyncio.run(main())
