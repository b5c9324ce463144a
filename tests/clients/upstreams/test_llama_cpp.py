"""Turns on a real llama.cpp server behind the gateway."""

import asyncio
import json

import openai
import pytest

VOICE = "You are a friendly phone agent. Briefly acknowledge out loud before using any tool, like 'Let me check that'."
TOOL = {
    "type": "function",
    "function": {
        "name": "find_order",
        "description": "Look up an order.",
        "parameters": {
            "type": "object",
            "properties": {"order_id": {"type": "string", "maxLength": 12}},
            "required": ["order_id"],
        },
    },
}
MUST = {"type": "function", "function": {"name": "find_order"}}


def messages(system="You are a helpful assistant.", text="What is the capital of France?"):
    return [{"role": "system", "content": system}, {"role": "user", "content": text}]


def test_text_whole_and_streamed(gateway):
    client = gateway.client()
    whole = client.chat.completions.create(model="llama", messages=messages(), temperature=0, max_tokens=24)
    said = whole.choices[0].message.content
    assert "Paris" in said
    # This server tells no usage in a stream, so that it is estimated for both.
    assert 3 <= whole.usage.completion_tokens <= 24 and whole.usage.prompt_tokens > 5
    stream = client.chat.completions.create(
        model="llama", messages=messages(), temperature=0, max_tokens=24, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert "".join(pieces) == said and len(pieces) > 3
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_a_call_is_streamed_behind_its_filler(gateway):
    stream = gateway.client().chat.completions.create(
        model="llama", messages=messages(VOICE, "Where is my order 1234?"), tools=[TOOL], tool_choice=MUST, temperature=0,
        max_tokens=60, stream=True,
    )  # fmt: skip
    said, arguments, names, order = "", "", [], []
    for chunk in stream:
        delta = chunk.choices[0].delta
        if delta.content:
            said += delta.content
            order.append("said")
        for call in delta.tool_calls or []:
            names += [call.function.name] if call.function.name else []
            arguments += call.function.arguments or ""
            order.append("called")
    assert said and names == ["find_order"] and order[0] == "said"
    assert isinstance(json.loads(arguments)["order_id"], str)


def test_a_call_without_a_voice_prompt_has_no_content(gateway):
    answer = gateway.client().chat.completions.create(
        model="llama", messages=messages(text="Where is my order 1234?"), tools=[TOOL], tool_choice=MUST, temperature=0,
        max_tokens=60,
    )  # fmt: skip
    message = answer.choices[0].message
    assert message.content is None and message.tool_calls[0].function.name == "find_order"
    assert answer.choices[0].finish_reason == "tool_calls"


def test_a_session_on_it_goes_on(gateway):
    async def converse():
        async with asyncio.timeout(120), gateway.async_client().responses.connect() as connection:

            async def turn(**fields):
                await connection.send({"type": "response.create", "model": "llama", "max_output_tokens": 24, **fields})
                async for event in connection:
                    assert event.type != "error", event
                    if event.type == "response.completed":
                        return event.response

            first = await turn(input="My name is Ada.", instructions="You are a helpful assistant.", temperature=0)
            second = await turn(input="What is my name?", previous_response_id=first.id, temperature=0)
            assert "Ada" in second.output_text

    asyncio.run(converse())


def test_what_it_refuses_is_an_error_of_the_caller(gateway):
    long = messages(text="word " * 4000)
    with pytest.raises(openai.BadRequestError) as refused:
        gateway.client().chat.completions.create(model="llama", messages=long, max_tokens=8)
    assert "context" in str(refused.value)


def test_a_caller_who_leaves_frees_the_server(gateway):
    client = gateway.client()
    stream = client.chat.completions.create(model="llama", messages=messages(text="Tell a long story."), max_tokens=1500, stream=True)
    next(iter(stream))
    stream.close()
    answer = client.chat.completions.create(model="llama", messages=messages(), temperature=0, max_tokens=8)
    assert answer.choices[0].message.content
