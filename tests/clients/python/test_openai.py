"""The official OpenAI SDK for Python, unpatched."""

import asyncio
import json
import math
import re
import time
from typing import Annotated

import jsonschema
import openai
import pydantic
import pytest
from cases import CLOCK, HELLO, MODEL, TOOLS, VOICE_PROMPT, WEATHER, said, schema_of, tool


def ask(client, messages=HELLO, **options):
    options = {"max_tokens": 16, "temperature": 0, **options}
    return client.chat.completions.create(model=MODEL, messages=messages, **options)


def check_calls(calls, tools=TOOLS):
    """Every call names one of the tools and keeps to its schema."""
    assert calls
    assert len({call.id for call in calls}) == len(calls)
    for call in calls:
        assert call.id.startswith("call_") and call.type == "function"
        jsonschema.validate(json.loads(call.function.arguments), schema_of(call.function.name, tools))


# === Text ===


def test_an_answer(client):
    answer = ask(client)
    choice = answer.choices[0]
    assert answer.id.startswith("chatcmpl-") and answer.object == "chat.completion" and answer.model == MODEL
    assert len(answer.choices) == 1 and choice.index == 0
    assert choice.message.role == "assistant" and choice.message.content
    assert choice.message.tool_calls is None and choice.message.refusal is None and choice.logprobs is None
    assert choice.finish_reason in ("stop", "length")
    usage = answer.usage
    assert usage.prompt_tokens > 0 and 0 < usage.completion_tokens <= 16
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 <= usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens


def test_the_other_prefix_serves_the_same(server):
    with server.client(base_url=f"{server.url}/waves/v1") as client:
        assert ask(client, max_tokens=4).choices[0].message.content
        assert [model.id for model in client.models.list()] == [MODEL]


def test_a_stream_with_usage(client):
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    *body, last = chunks
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.object == "chat.completion.chunk" and chunk.model == MODEL for chunk in chunks)
    assert [chunk.choices[0].delta.role for chunk in body] == ["assistant"] + [None] * (len(body) - 1)
    assert [chunk.choices[0].finish_reason for chunk in body[:-1]] == [None] * (len(body) - 1)
    assert body[-1].choices[0].finish_reason in ("stop", "length")
    assert all(chunk.usage is None and "usage" in chunk.model_fields_set for chunk in body)
    assert last.choices == [] and last.usage.completion_tokens > 0
    assert "".join(chunk.choices[0].delta.content or "" for chunk in body)


def test_a_stream_without_usage_does_not_mention_it(client):
    chunks = list(ask(client, stream=True))
    assert all(chunk.choices and "usage" not in chunk.model_fields_set for chunk in chunks)


def test_a_stream_and_an_answer_say_the_same(client):
    whole = ask(client).choices[0].message.content
    parts = [chunk.choices[0].delta.content or "" for chunk in ask(client, stream=True)]
    assert "".join(parts) == whole


def test_content_in_parts_and_all_roles(client):
    parts = [{"type": "text", "text": "Say"}, {"type": "text", "text": " hello."}]
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": parts},
    ]
    assert ask(client, messages, max_tokens=8).choices[0].message.content
    whole = ask(client, [{"role": "user", "content": "Say hello."}], max_tokens=8)
    split = ask(client, [{"role": "user", "content": parts}], max_tokens=8)
    assert split.choices[0].message.content == whole.choices[0].message.content


# === Tools ===


def test_a_call_is_valid(client):
    answer = ask(client, said("How is the weather in Oslo?"), tools=TOOLS, tool_choice="required", max_tokens=128)
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls"
    assert message.content is None
    check_calls(message.tool_calls)


def test_a_streamed_call(client):
    stream = ask(
        client,
        said("How is the weather in Oslo?"),
        tools=TOOLS,
        tool_choice="required",
        max_tokens=128,
        stream=True,
    )
    begun, arguments, reasons = {}, {}, []
    for chunk in stream:
        reasons.append(chunk.choices[0].finish_reason)
        assert not chunk.choices[0].delta.content
        for delta in chunk.choices[0].delta.tool_calls or []:
            if delta.index not in begun:
                assert delta.id and delta.type == "function" and delta.function.name
                assert delta.function.arguments == ""
                assert delta.index == len(begun), "calls come one after the other"
                begun[delta.index] = delta
                arguments[delta.index] = ""
            else:
                assert delta.id is None and delta.type is None and delta.function.name is None
                assert delta.index == len(begun) - 1, "a call is complete before the next one begins"
                arguments[delta.index] += delta.function.arguments
    assert reasons[-1] == "tool_calls" and set(reasons[:-1]) == {None}
    for index, delta in begun.items():
        jsonschema.validate(json.loads(arguments[index]), schema_of(delta.function.name))


def test_a_named_tool_is_the_one_that_is_called(client):
    for name in ("get_weather", "get_time"):
        choice = {"type": "function", "function": {"name": name}}
        answer = ask(client, said("Hello!"), tools=TOOLS, tool_choice=choice, max_tokens=128)
        calls = answer.choices[0].message.tool_calls
        check_calls(calls)
        assert {call.function.name for call in calls} == {name}


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_without_parallel_calls_there_is_one(client, seed):
    answer = ask(
        client,
        said("The weather in Oslo, Paris and Lima, please, and the time."),
        tools=TOOLS,
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=1,
        seed=seed,
        max_tokens=64,
    )
    assert len(answer.choices[0].message.tool_calls) == 1
    check_calls(answer.choices[0].message.tool_calls)


def test_no_calls_when_they_are_ruled_out(client):
    answer = ask(client, said("How is the weather in Oslo?"), tools=TOOLS, tool_choice="none")
    assert answer.choices[0].message.tool_calls is None and answer.choices[0].message.content


def test_a_free_text_argument_ends_before_the_tokens_do(client):
    """However long the model would go on: a call that fits is valid JSON."""
    note = tool("take_note", {"text": {"type": "string"}})
    for seed in range(3):
        answer = ask(
            client,
            said("Write down a very long story about the sea."),
            tools=[note],
            tool_choice="required",
            parallel_tool_calls=False,
            temperature=1,
            seed=seed,
            max_tokens=56,
        )
        check_calls(answer.choices[0].message.tool_calls, [note])
        assert answer.choices[0].finish_reason == "tool_calls"


class Booking(pydantic.BaseModel):
    """Books a table."""

    people: Annotated[int, pydantic.Field(ge=1, le=9)]
    inside: bool


def test_a_tool_made_from_a_pydantic_model(client):
    answer = client.chat.completions.parse(
        model=MODEL,
        messages=said("A table for four, inside."),
        tools=[openai.pydantic_function_tool(Booking, name="book")],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=64,
        temperature=0,
    )
    assert isinstance(answer.choices[0].message.tool_calls[0].function.parsed_arguments, Booking)


# === The filler ===

LANGUAGES = [
    ("English", "How is the weather in Oslo today?", r"\b(let|moment|check|second|look|bear)\b"),
    ("German", "Wie wird denn das Wetter heute in Oslo?", r"\b(ich|einen|gerne|sofort|gleich|moment)\b"),
    ("Spanish", "¿Qué tiempo hace hoy en Lima, por favor?", r"\b(momento|segundo|lo|voy|permítame|claro)\b"),
    ("French", "Quel temps fait-il aujourd'hui à Paris ?", r"\b(je|un|instant|vous|moi|seconde)\b"),
    ("Hindi", "आज ओस्लो में मौसम कैसा है?", r"[\u0900-\u097f]"),
    ("Russian", "Какая сегодня погода в Осло?", r"[\u0400-\u04ff]"),
    ("Arabic", "كيف حال الطقس اليوم في باريس؟", r"[\u0600-\u06ff]"),
    ("Japanese", "今日のオスロの天気はどうですか。", r"[\u3040-\u30ff]"),
]


@pytest.mark.parametrize(("language", "text", "sign"), LANGUAGES, ids=[row[0] for row in LANGUAGES])
def test_a_voice_agent_speaks_before_it_calls(client, language, text, sign):
    stream = ask(
        client,
        said(text, VOICE_PROMPT),
        tools=TOOLS,
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=64,
        stream=True,
    )
    spoken, called, reason = "", False, None
    for chunk in stream:
        delta = chunk.choices[0].delta
        reason = chunk.choices[0].finish_reason
        assert not (called and delta.content), "all speech comes before the first call"
        spoken += delta.content or ""
        called = called or bool(delta.tool_calls)
    assert called and reason == "tool_calls"
    assert re.search(sign, spoken.lower()), spoken


def test_a_whole_answer_has_the_filler_too(client):
    answer = ask(client, said("Weather in Lima?", VOICE_PROMPT), tools=TOOLS, tool_choice="required", max_tokens=128)
    assert answer.choices[0].message.content
    check_calls(answer.choices[0].message.tool_calls)


def test_a_prompt_that_is_not_for_voice_gets_no_filler(client):
    messages = said("Weather in Lima?", "You are an assistant in a web chat. Use tools when they help.")
    answer = ask(client, messages, tools=TOOLS, tool_choice="required", max_tokens=128)
    assert answer.choices[0].message.content is None
    check_calls(answer.choices[0].message.tool_calls)


def test_a_round_trip_with_chained_calls(client):
    """Filler, call, result, another filler, another call, result, answer."""
    messages = said("How is the weather in Oslo, and what time is it?", VOICE_PROMPT)
    fillers = []
    for wanted, result in ((WEATHER, '{"sky": "clear"}'), (CLOCK, '{"time": "14:05"}')):
        choice = {"type": "function", "function": {"name": wanted["function"]["name"]}}
        answer = ask(client, messages, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, max_tokens=64)
        message = answer.choices[0].message
        check_calls(message.tool_calls)
        fillers.append(message.content)
        messages.append(message.model_dump(exclude_none=True))
        messages.append({"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": result})
    assert all(fillers) and len(set(fillers)) == 2, fillers
    answer = ask(client, messages, tools=TOOLS, tool_choice="none")
    assert answer.choices[0].message.content and answer.choices[0].message.tool_calls is None


def test_no_call_syntax_is_spoken(client):
    """Also when a conversation with calls in it goes on without tools."""
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
    messages = [
        *said("Weather in Oslo?"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": '{"sky":"clear"}'},
    ]
    for options in ({}, {"tools": TOOLS}, {"tools": TOOLS, "tool_choice": "none"}):
        content = ask(client, messages, max_tokens=60, **options).choices[0].message.content
        assert content is None or "<tool" not in content, content


# === The form of answers ===


def test_json_mode(client):
    messages = said('Reply with the JSON object {"ok": true} and nothing else.')
    answer = ask(client, messages, response_format={"type": "json_object"}, max_tokens=200)
    assert answer.choices[0].finish_reason == "stop"
    assert isinstance(json.loads(answer.choices[0].message.content), dict)


def test_an_answer_under_a_schema(client):
    schema = {
        "type": "object",
        "properties": {
            "sentiment": {"type": "string", "enum": ["good", "bad"]},
            "stars": {"type": "integer", "minimum": 1, "maximum": 5},
            "tags": {"type": "array", "items": {"enum": ["a", "b"], "type": "string"}, "maxItems": 2},
        },
        "required": ["sentiment", "stars", "tags"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "review", "strict": True, "schema": schema}}
    for seed in (1, 2):
        answer = ask(client, said("I loved it!"), response_format=form, temperature=1, seed=seed, max_tokens=80)
        assert answer.choices[0].finish_reason == "stop"
        jsonschema.validate(json.loads(answer.choices[0].message.content), schema)


def test_an_answer_parsed_into_a_pydantic_model(client):
    answer = client.chat.completions.parse(
        model=MODEL, messages=said("A table for four, inside."), response_format=Booking, max_tokens=64, temperature=0
    )
    assert isinstance(answer.choices[0].message.parsed, Booking)


def test_the_stream_helper(client):
    with client.chat.completions.stream(
        model=MODEL, messages=said("A table for four, inside."), response_format=Booking, max_tokens=64, temperature=0
    ) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        message = stream.get_final_completion().choices[0].message
    assert "".join(deltas) == message.content
    assert isinstance(message.parsed, Booking)


# === Sampling ===


def test_logprobs(client):
    answer = ask(client, logprobs=True, top_logprobs=5, max_tokens=6)
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == answer.usage.completion_tokens
    assert b"".join(bytes(token.bytes) for token in tokens).decode() == answer.choices[0].message.content
    for token in tokens:
        top = [entry.logprob for entry in token.top_logprobs]
        assert len(top) == 5 and top == sorted(top, reverse=True)
        assert all(logprob <= 0 for logprob in top)
        assert sum(map(math.exp, top)) <= 1.001
        # At temperature 0 the likeliest token is the one that is taken.
        assert token.token == token.top_logprobs[0].token
        assert math.isclose(token.logprob, top[0], abs_tol=1e-4)


def test_logprobs_without_alternatives_and_in_streams(client):
    tokens = ask(client, logprobs=True, max_tokens=3).choices[0].logprobs.content
    assert all(token.logprob <= 0 and token.top_logprobs == [] for token in tokens)
    chunks = list(ask(client, logprobs=True, top_logprobs=2, max_tokens=3, stream=True))
    streamed = [
        token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content
    ]
    assert [token.token for token in streamed] == [token.token for token in tokens]


def test_a_seed_repeats_the_answer(client):
    def draw(seed):
        return ask(client, said("Tell me something."), temperature=1, seed=seed, max_tokens=12).choices[0].message.content

    assert draw(7) == draw(7)
    assert len({draw(seed) for seed in (1, 2, 3)}) > 1


def test_logit_bias_bans_a_token(client):
    first = ask(client, logprobs=True, max_tokens=1).choices[0].message.content
    # Ids are the model's own. In every vocabulary of bytes, words stand behind the single letters.
    words = {str(token): -100 for token in range(1000, 49000)}
    biased = ask(client, logit_bias=words, max_tokens=1)
    assert biased.choices[0].message.content != first


def test_stop(client):
    messages = said("Count from one to ten in words.")
    plain = ask(client, messages, max_tokens=24).choices[0].message.content
    stop = plain.split()[2]
    for stops in (stop, [stop, "never said"]):
        answer = ask(client, messages, max_tokens=24, stop=stops)
        assert answer.choices[0].finish_reason == "stop"
        assert answer.choices[0].message.content == plain[: plain.index(stop)]


def test_the_token_limit(client):
    for limit in ({"max_tokens": 1}, {"max_tokens": 5}, {"max_tokens": openai.NOT_GIVEN, "max_completion_tokens": 5}):
        answer = ask(client, said("Tell me a long story."), **limit)
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == (limit.get("max_completion_tokens") or limit["max_tokens"])


# === Models ===


def test_models(server, client):
    assert [model.id for model in client.models.list()] == [MODEL]
    model = client.models.retrieve(MODEL)
    assert model.id == MODEL and model.object == "model" and model.owned_by and model.created > 0
    with server.client("elsewhere") as stranger:
        assert list(stranger.models.list()) == []
        with pytest.raises(openai.NotFoundError):
            stranger.models.retrieve(MODEL)


# === Errors ===


def check_error(error, status, kind, param=None, code=None):
    assert error.status_code == status
    assert (error.type, error.param, error.code) == (kind, param, code)
    assert error.body["message"]
    assert error.request_id and error.body["request_id"] == error.request_id


@pytest.mark.parametrize(
    ("param", "options"),
    [
        ("n", {"n": 2}),
        ("temperature", {"temperature": 2.5}),
        ("top_p", {"top_p": -0.1}),
        ("max_tokens", {"max_tokens": 0}),
        ("messages", {"messages": []}),
        ("messages[0].role", {"messages": [{"role": "robot", "content": "Hi."}]}),
        ("messages[0].content", {"messages": [{"role": "user"}]}),
        ("messages[0].content[0].type", {"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "data:,"}}]}]}),
        ("stop", {"stop": ["a", "b", "c", "d", "e"]}),
        ("top_logprobs", {"top_logprobs": 2}),
        ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
        ("logit_bias.x", {"logit_bias": {"x": 1}}),
        ("presence_penalty", {"presence_penalty": 3}),
        ("frequency_penalty", {"frequency_penalty": -3}),
        ("response_format.type", {"response_format": {"type": "xml"}}),
        ("tool_choice", {"tool_choice": "required"}),
        ("tool_choice.function.name", {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "no"}}}),
        ("prompt_logprobs", {"extra_body": {"prompt_logprobs": 1}}),
    ],
)
def test_a_bad_request_names_the_field(client, param, options):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **options)
    check_error(caught.value, 400, "invalid_request_error", param)
    details = caught.value.body["details"]
    assert all(detail["code"] and detail["message"] and detail["path"] for detail in details)
    assert param.split(".")[0].split("[")[0] in caught.value.message


def test_every_fault_is_told(client):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, temperature=9, top_p=9, n=9)
    assert {detail["path"][0] for detail in caught.value.body["details"]} == {"temperature", "top_p", "n"}


def test_an_unknown_model(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="gpt-none", messages=HELLO)
    check_error(caught.value, 400, "invalid_request_error", "model", "model_not_found")
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-none")
    check_error(caught.value, 404, "invalid_request_error")


def test_a_wrong_key(server):
    with server.client(api_key="wrong") as client, pytest.raises(openai.AuthenticationError) as caught:
        ask(client)
    check_error(caught.value, 401, "authentication_error", code="invalid_api_key")
    assert caught.value.response.headers["WWW-Authenticate"] == "Bearer"


def test_a_key_for_another_model(server):
    with server.client("elsewhere") as client, pytest.raises(openai.PermissionDeniedError) as caught:
        ask(client)
    check_error(caught.value, 403, "permission_error")


def test_an_unknown_route(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.embeddings.create(model=MODEL, input="Hi.")
    check_error(caught.value, 404, "invalid_request_error")


def test_a_wrong_method(client):
    with pytest.raises(openai.APIStatusError) as caught:
        client.models.delete(MODEL)
    check_error(caught.value, 405, "invalid_request_error")
    assert "GET" in caught.value.response.headers["Allow"]


def test_a_prompt_past_the_context(client):
    for param, options in (("messages", {"messages": said("word " * 9000)}), ("max_tokens", {"max_tokens": 1_000_000})):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, **options)
        check_error(caught.value, 400, "invalid_request_error", param, "context_length_exceeded")


def test_a_body_over_the_limit(client):
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, said("x" * (2 << 20)))
    check_error(caught.value, 413, "invalid_request_error")


def test_requests_per_minute(server):
    with server.client("hurried") as client:
        for _ in range(2):
            ask(client, max_tokens=1)
        # The bucket fills up while requests run, so a slow machine may get one more through.
        with pytest.raises(openai.RateLimitError) as caught:
            for _ in range(5):
                ask(client, max_tokens=1)
    check_error(caught.value, 429, "rate_limit_error")
    assert 1 <= int(caught.value.response.headers["Retry-After"]) <= 60


def test_requests_at_once(server):
    with server.client("single") as client:
        with ask(client, said("Tell me a long story."), max_tokens=400, stream=True) as stream:
            next(iter(stream))
            with pytest.raises(openai.RateLimitError) as caught:
                ask(client)
        check_error(caught.value, 429, "rate_limit_error")
        assert int(caught.value.response.headers["Retry-After"]) >= 1
        # The place is free again once the server has noticed; the SDK waits as Retry-After says.
        assert ask(client.with_options(max_retries=8), max_tokens=2).choices[0].message.content


# === Request ids ===


def test_every_response_has_a_request_id(server, client):
    answers = [client.chat.completions.with_raw_response.create(model=MODEL, messages=HELLO, max_tokens=1)]
    answers += [client.chat.completions.with_raw_response.create(model=MODEL, messages=HELLO, max_tokens=1, stream=True)]
    answers += [client.models.with_raw_response.list()]
    answers[1].http_response.read()
    ids = [answer.headers["X-Request-Id"] for answer in answers]
    assert all(ids) and len(set(ids)) == len(ids)
    assert ask(client, max_tokens=1)._request_id


def test_a_request_keeps_the_id_that_it_came_with(client):
    mine = {"X-Request-Id": "call-42/turn-7"}
    assert ask(client, max_tokens=1, extra_headers=mine)._request_id == "call-42/turn-7"
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, n=2, extra_headers=mine)
    assert caught.value.request_id == caught.value.body["request_id"] == "call-42/turn-7"


@pytest.mark.parametrize("bad", ["with a space", "x" * 129])
def test_an_id_that_fits_no_log_is_replaced(client, bad):
    kept = ask(client, max_tokens=1, extra_headers={"X-Request-Id": bad})._request_id
    assert kept and kept != bad


# === Cancelling, and many at once ===


def test_closing_a_stream_stops_the_generation(server, client):
    cancelled = server.metric('electron_turns_total{finish_reason="cancelled"}')
    tokens = server.metric("electron_completion_tokens_total")
    # The end of a turn is SmolLM2's token 2; with it banned, this answer goes on for minutes.
    stream = ask(client, said("Tell me a very long story."), max_tokens=4000, logit_bias={"2": -100}, stream=True)
    with stream:
        for _ in range(2):
            next(stream)
    assert ask(client.with_options(timeout=60), max_tokens=4).choices[0].message.content
    assert server.metric('electron_turns_total{finish_reason="cancelled"}') == cancelled + 1
    assert 0 < server.metric("electron_completion_tokens_total") - tokens < 1000


def test_giving_up_on_an_answer_stops_the_generation(server, client):
    with pytest.raises(openai.APITimeoutError):
        ask(
            client.with_options(timeout=2), said("Tell me a very long story."), max_tokens=4000, logit_bias={"2": -100}
        )
    assert ask(client.with_options(timeout=60), max_tokens=4).choices[0].message.content


def test_four_at_once(server):
    async def all_of_them():
        async with server.async_client() as client:
            texts = ["Say one.", "Say two.", "Say three.", "Say four."]
            asked = [
                client.chat.completions.create(model=MODEL, messages=said(text), max_tokens=6) for text in texts[:2]
            ]
            streamed = [
                client.chat.completions.create(model=MODEL, messages=said(text), max_tokens=6, stream=True)
                for text in texts[2:]
            ]

            async def read(stream):
                return "".join([chunk.choices[0].delta.content or "" async for chunk in await stream])

            async def take(answer):
                return (await answer).choices[0].message.content

            return await asyncio.gather(*map(take, asked), *map(read, streamed))

    assert all(asyncio.run(all_of_them()))


def test_nothing_is_left_running(server):
    """Whatever was asked before: soon after all is answered, nothing runs or waits."""
    end = time.monotonic() + 60
    while server.metric("electron_running"):
        assert time.monotonic() < end
    assert server.metric("electron_queue_length") == 0
