"""OpenAI's Agents SDK, unpatched, over its WebSocket to the Responses API.

It takes an answer that the token limit cut off for a failure, so all answers here are ones that find their end: calls,
and texts under a schema.
"""

import contextlib
from typing import Literal

import agents
import pydantic
import pytest
from cases import MODEL, VOICE_PROMPT
from conftest import KEYS, conversation


@pytest.fixture(autouse=True)
def no_traces():
    # They would go to OpenAI.
    agents.set_tracing_disabled(True)


class Report(pydantic.BaseModel):
    sky: Literal["clear", "cloudy"]
    city: Literal["Oslo", "Paris", "Lima"]


class Desk:
    """An agent that asks for the weather once, and then reports it."""

    def __init__(self, instructions="Report the weather."):
        self.asked = []

        async def unasked(context, agent):
            return not self.asked

        @agents.function_tool(is_enabled=unasked)
        def get_weather(city: Literal["Oslo", "Paris", "Lima"]) -> str:
            """Tells how the sky looks over a city."""
            self.asked.append(city)
            return f"The sky over {city} is clear."

        settings = agents.ModelSettings(
            tool_choice="required", parallel_tool_calls=False, temperature=0, max_tokens=96
        )
        self.agent = agents.Agent(
            name="Desk",
            instructions=instructions,
            model=MODEL,
            model_settings=settings,
            tools=[get_weather],
            output_type=Report,
        )


@contextlib.asynccontextmanager
async def connected(server, key=KEYS["normal"]):
    async with agents.responses_websocket_session(api_key=key, base_url=f"{server.url}/v1") as session:
        yield session


def kinds(items):
    return [item.type for item in items]


@conversation
async def test_two_turns_with_a_tool(server):
    desk = Desk()
    async with connected(server) as session:
        first = await session.run(desk.agent, "How is the weather in Oslo?", max_turns=3)
        assert len(desk.asked) == 1 and isinstance(first.final_output, Report)
        assert kinds(first.new_items) == ["tool_call_item", "tool_call_output_item", "message_output_item"]
        desk.asked.clear()
        # The SDK sends the conversation again, with the items that it got.
        history = [*first.to_input_list(), {"role": "user", "content": "And in Lima?"}]
        second = await session.run(desk.agent, history, max_turns=3)
        assert len(desk.asked) == 1 and isinstance(second.final_output, Report)
        usage = second.context_wrapper.usage
        assert usage.requests == 2 and usage.input_tokens > first.context_wrapper.usage.input_tokens


@conversation
async def test_two_turns_that_the_server_remembers(server):
    desk = Desk()
    async with connected(server) as session:
        first = await session.run(
            desk.agent, "How is the weather in Oslo?", max_turns=3, auto_previous_response_id=True
        )
        assert len(desk.asked) == 1 and isinstance(first.final_output, Report)
        call, answer = first.raw_responses
        assert call.response_id != answer.response_id == first.last_response_id
        desk.asked.clear()
        second = await session.run(
            desk.agent, "And in Lima?", max_turns=3, previous_response_id=first.last_response_id
        )
        assert len(desk.asked) == 1 and isinstance(second.final_output, Report)
        used = [result.raw_responses[0].usage.input_tokens for result in (first, second)]
        assert used[1] > used[0], "the second turn knows of the first"


@conversation
async def test_a_streamed_turn_of_a_voice_agent(server):
    desk = Desk(VOICE_PROMPT)
    async with connected(server) as session:
        run = session.run_streamed(desk.agent, "How is the weather in Oslo?", max_turns=3)
        spoken, made = "", []
        async for event in run.stream_events():
            if event.type == "run_item_stream_event":
                made.append(event.item.type)
            elif event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
                spoken += "" if desk.asked else event.data.delta
        assert spoken, "there is something to hear before the tool runs"
        assert len(desk.asked) == 1 and isinstance(run.final_output, Report)
        assert "tool_call_item" in made and "tool_call_output_item" in made
        said = [item["content"][0]["text"] for item in run.to_input_list() if item.get("type") == "message"]
        assert spoken in said, "those words are part of the conversation"


@conversation
async def test_an_error_ends_a_run_and_the_next_one_works(server):
    desk = Desk()
    async with connected(server) as session:
        with pytest.raises(RuntimeError, match="previous_response_not_found"):
            await session.run(desk.agent, "Hello?", previous_response_id="resp_unknown")
        result = await session.run(desk.agent, "How is the weather in Paris?", max_turns=3)
        assert isinstance(result.final_output, Report)


@conversation
async def test_the_same_over_http(server):
    desk = Desk()
    async with server.async_client() as client:
        desk.agent.model = agents.OpenAIResponsesModel(model=MODEL, openai_client=client)
        result = await agents.Runner.run(desk.agent, "How is the weather in Oslo?", max_turns=3)
    assert len(desk.asked) == 1 and isinstance(result.final_output, Report)
