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
    options = {"model": "llama", "messages": messages(), "temperature": 0, "max_tokens": 24}
    # This server's answer to a prompt differs once it has the prompt in its cache, and not from then on.
    client.chat.completions.create(**options)
    whole = client.chat.completions.create(**options)
    said = whole.choices[0].message.content
    assert "Paris" in said
    # It tells no usage in a stream, so that it is estimated for both.
    assert 3 <= whole.usage.completion_tokens <= 24 and whole.usage.prompt_tokens > 5
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
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
                    if event.type in ("response.completed", "response.incomplete"):
                        return event.response

            first = await turn(input="My name is Ada.", instructions="You are a helpful assistant.", temperature=0)
            second = await turn(input="What is my name?", previous_response_id=first.id, temperature=0)
            assert first.output_text and second.output_text
            # A quarter of the prompt's bytes, where the server tells no tokens.
            assert second.usage.input_tokens > first.usage.input_tokens + len(first.output_text) // 4

    asyncio.run(converse())


def test_a_prompt_that_is_too_long_for_it(gateway):
    """In a stream this server then ends with 200 and nothing."""
    client = gateway.client()
    with pytest.raises(openai.InternalServerError) as failed:
        client.chat.completions.create(model="llama", messages=messages(text="word " * 4000), max_tokens=8)
    assert failed.value.status_code == 502 and "before it was complete" in str(failed.value)
    answer = client.chat.completions.create(model="llama", messages=messages(), temperature=0, max_tokens=8)
    assert answer.choices[0].message.content


def test_a_caller_who_leaves_frees_the_server(gateway):
    client = gateway.client()
    stream = client.chat.completions.create(model="llama", messages=messages(text="Tell a long story."), max_tokens=1500, stream=True)
    next(iter(stream))
    stream.close()
    answer = client.chat.completions.create(model="llama", messages=messages(), temperature=0, max_tokens=8)
    assert answer.choices[0].message.content
