"""Tools of MCP servers, made with the official package, as clients of every dialect see them through the gateway."""

import json
import pathlib
import queue
import subprocess
import sys
import threading

import openai
import pytest
from conftest import free_port, start, stop
from talks import (
    BRIEF,
    HOST,
    PATIENCE,
    VOICE,
    calls_of,
    chat,
    check_outcome,
    check_shape,
    check_story,
    conversation,
    line,
    only_call,
    sdk,
    talk,
    user,
    words_of,
)

ASKED = "What is 2 plus 3?"
PROGRAM = pathlib.Path(__file__).with_name("mcp_server.py")
# The arguments of `add` are numbers of any length.
SUM = {**BRIEF, "max_output_tokens": 64}
# Nothing listens there while the tests run.
CLOSED = free_port()


class Mcp:
    """An MCP server, which can be killed and started again."""

    def __init__(self, *options, port=None):
        self.port = port or free_port()
        self.options = options
        self.url = f"http://127.0.0.1:{self.port}/mcp"
        self.start()

    def start(self):
        command = [sys.executable, str(PROGRAM), str(self.port), *self.options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.said = queue.Queue()
        threading.Thread(target=self.listen, args=(self.process.stdout, self.said), daemon=True).start()
        self.expect("ready")

    def listen(self, output, said):
        for row in output:
            said.put(row.strip())

    def expect(self, row):
        assert self.said.get(timeout=PATIENCE) == row

    def kill(self):
        self.process.kill()
        self.process.wait(PATIENCE)


@pytest.fixture(scope="module")
def shop():
    server = Mcp()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def plain():
    server = Mcp("--json", "--stateless")
    yield server
    server.kill()


@pytest.fixture(scope="module")
def address():
    """Where a server is that tests kill."""
    return free_port()


@pytest.fixture
def frail(address):
    server = Mcp(port=address)
    yield server
    server.kill()


@pytest.fixture(scope="module")
def gateway(shop, plain, address, tmp_path_factory):
    def agent(name, url, more=""):
        return (
            f'[agents.{name}]\ninstructions = "{VOICE}"\ntool_choice = "required"\nmax_tool_rounds = 1\n'
            f"temperature = 0.0\nmax_tokens = 64\nparallel_tool_calls = false\n"
            f'[[agents.{name}.mcp]]\nlabel = "shop"\nurl = "{url}"\nallowed_tools = ["add"]\n{more}'
        )

    agents = [
        HOST,
        agent("desk", shop.url),
        agent("lost", f"http://127.0.0.1:{CLOSED}/mcp"),
        agent("careful", shop.url, 'approval = "always"\n'),
    ]
    local = [f"http://127.0.0.1:{port}/mcp" for port in (shop.port, plain.port, address, CLOSED)]
    settings = f'[tools]\nallow_networks = ["127.0.0.1/32"]\nallow_urls = {json.dumps([*local, "http://10.9.8.7/"])}\n'
    gateway = start(tmp_path_factory.mktemp("gateway"), "\n".join(agents), settings)
    yield gateway
    stop(gateway)


def mcp(server, **more):
    """A server as a client names it."""
    url = server if isinstance(server, str) else server.url
    tool = {"type": "mcp", "server_label": "shop", "server_url": url, "require_approval": "never", **more}
    return {key: value for key, value in tool.items() if value is not None}


def force(name):
    return {"type": "function", "name": name}


def counted(gateway, **labels):
    return gateway.metric("electron_tool_seconds_count", kind="mcp", **labels)


def kinds(items):
    """What a response is made of, without the words on the way to a call."""
    return [item["type"] for item in items if item.get("phase") != "commentary"]


def listing_of(items):
    [listing] = [item for item in items if item["type"] == "mcp_list_tools"]
    return listing


def check_sum(items, label="shop", name="add"):
    """A sum that the model asked for, rightly added up, and words after it."""
    call = only_call(items)
    check_outcome(call)
    assert (call["status"], call["server_label"], call["name"]) == ("completed", label, name)
    numbers = json.loads(call["arguments"])
    assert call["output"] == str(numbers["a"] + numbers["b"])
    assert words_of(items)
    return call


# === listing and calling ===


def check_listing(listing, *names):
    assert [tool["name"] for tool in listing["tools"]] == list(names) and listing["server_label"] == "shop"
    assert not listing.get("error")
    for tool in listing["tools"]:
        assert tool["description"] and tool["input_schema"]["type"] == "object"


def test_a_call_over_http(gateway, shop):
    before = counted(gateway, agent="host", result="ok")
    client, model = sdk(gateway, "host")
    with client:
        tools = [mcp(shop, allowed_tools=["add", "fails"], authorization="secret-of-the-shop")]
        response = client.responses.create(model=model, input=ASKED, tools=tools, tool_choice=force("add"), **SUM)
    check_shape(response)
    items = response.to_dict()["output"]
    check_sum(items)
    assert counted(gateway, agent="host", result="ok") == before + 1
    assert kinds(items) == ["mcp_list_tools", "mcp_call", "message"]
    check_listing(items[0], "add", "fails")
    # The server is told as it was named, without its secrets.
    [tool] = response.tools
    assert (tool.type, tool.server_label, tool.server_url) == ("mcp", "shop", shop.url)
    assert "secret-of-the-shop" not in response.to_json()
    assert "secret-of-the-shop" not in gateway.log.read_text()


def test_a_streamed_call_over_http(gateway, plain):
    # This one answers with JSON, and keeps no sessions.
    client, model = sdk(gateway, "host")
    with client:
        tools = [mcp(plain, allowed_tools={"tool_names": ["add"]})]
        options = {"model": model, "input": ASKED, "tools": tools, "tool_choice": force("add"), **SUM}
        items = check_story(list(client.responses.create(stream=True, **options)))
    assert kinds(items) == ["mcp_list_tools", "mcp_call", "message"]
    check_listing(items[0], "add")
    check_sum(items)


def test_a_tool_is_chosen_by_its_server(gateway, shop):
    client, model = sdk(gateway, "host")
    with client:
        choice = {"type": "mcp", "server_label": "shop", "name": "add"}
        response = client.responses.create(model=model, input=ASKED, tools=[mcp(shop)], tool_choice=choice, **SUM)
    check_sum(check_shape(response).to_dict()["output"])


@conversation
async def test_calls_over_a_responses_websocket(gateway, shop):
    async with line(gateway, "host") as asked:
        options = {"tools": [mcp(shop, allowed_tools=["add"])], "tool_choice": force("add"), **SUM}
        first = await asked.answer(ASKED, **options)
        assert kinds(first["output"]) == ["mcp_list_tools", "mcp_call", "message"]
        call = check_sum(first["output"])
        # What was listed is known.
        second = await asked.answer("And 4 plus 5?", previous_response_id=first["id"], **options)
        assert kinds(second["output"]) == ["mcp_call", "message"]
        assert check_sum(second["output"])["id"] != call["id"]
        # A client may send what it got again, in place of the response's id.
        again = [user(ASKED), *first["output"], user("And 4 plus 5?")]
        third = await asked.answer(again, **options)
        check_sum(third["output"])


@conversation
async def test_calls_over_realtime(gateway, shop):
    async with talk(gateway, "host") as talked:
        settings = {"tools": [mcp(shop, allowed_tools=["add"])], "tool_choice": force("add"), **SUM}
        await talked.set(**settings)
        *listing, done = await talked.until("conversation.item.done")
        assert [event.type for event in listing] == [
            "conversation.item.added", "mcp_list_tools.in_progress", "mcp_list_tools.completed",
        ]  # fmt: skip
        assert {event.item_id for event in listing[1:]} == {listing[0].item.id} == {done.item.id}
        check_listing(done.item.to_dict(), "add")
        await talked.ask(ASKED)
        events = await talked.until("response.done")
        items = events[-1].response.to_dict()["output"]
        call = check_sum(items)
        told = [event for event in events if (event.to_dict().get("item_id") or item_of(event)) == call["id"]]
        named = [event.type for event in told]
        pieces = named.count("response.mcp_call_arguments.delta")
        assert named == [
            "response.output_item.added", "conversation.item.added",
            *["response.mcp_call_arguments.delta"] * pieces, "response.mcp_call_arguments.done",
            "response.mcp_call.in_progress", "response.mcp_call.completed",
            "response.output_item.done", "conversation.item.done",
        ]  # fmt: skip
        assert "".join(event.delta for event in told[2 : 2 + pieces]) == call["arguments"]
        with gateway.http() as http:
            kept = http.get(f"/v1/sessions/{talked.session.id}").json()
        assert kept["state"] == "idle" and calls_of(kept["items"]) == [call]
        check_listing(listing_of(kept["items"]), "add")


def item_of(event):
    item = event.to_dict().get("item")
    return item and item.get("id")


# === what tools do ===


@conversation
async def test_what_comes_of_tools(gateway, shop):
    async with line(gateway, "host") as asked:

        async def call(tool, **more):
            options = {"tools": [mcp(shop, **more)], "tool_choice": force(tool), **SUM}
            items = (await asked.answer(ASKED, **options))["output"]
            check_outcome(only_call(items))
            assert words_of(items)
            return only_call(items)

        done = await call("authorization", authorization="secret-of-the-shop")
        assert (done["status"], done["output"]) == ("completed", "Bearer secret-of-the-shop")
        done = await call("weather")
        assert json.loads(done["output"])["degrees"] == 21.5


@pytest.mark.parametrize("tool, outcome, told", [("fails", "tool", "the kitchen is closed"), ("big", "too_large", "")])
@conversation
async def test_a_tool_that_fails(gateway, shop, tool, outcome, told):
    before = counted(gateway, result=outcome)
    async with line(gateway, "host") as asked:
        options = {"tools": [mcp(shop)], "tool_choice": force(tool), **SUM}
        items = (await asked.answer(ASKED, **options))["output"]
    call = only_call(items)
    check_outcome(call)
    assert call["status"] == "failed" and told in json.dumps(call["error"]) and words_of(items)
    assert counted(gateway, result=outcome) == before + 1
    lines = [row for row in gateway.log.read_text().splitlines() if call["call_id"] in row]
    assert [row for row in lines if "tool failed" in row and f'result="{outcome}"' in row], lines


@conversation
async def test_two_servers_with_the_same_tools(gateway, shop, plain):
    async with line(gateway, "host") as asked:
        servers = {"one": shop, "two": plain}
        tools = [mcp(server, server_label=label, allowed_tools=["add"]) for label, server in servers.items()]
        first = (await asked.answer(ASKED, tools=tools, tool_choice=force("add"), **SUM))["output"]
        assert {item["server_label"] for item in first if item["type"] == "mcp_list_tools"} == {"one", "two"}
        check_sum(first, "one")
        second = (await asked.answer(ASKED, tools=tools, tool_choice=force("two_add"), **SUM))["output"]
        check_sum(second, "two", "two_add")


@conversation
async def test_a_call_that_is_interrupted_is_given_up(gateway, frail):
    async with talk(gateway, "host") as talked:
        await talked.set(tools=[mcp(frail, allowed_tools=["wait"])], tool_choice=force("wait"), **SUM)
        await talked.ask(ASKED)
        await talked.until("response.mcp_call.in_progress")
        frail.expect("waiting")
        await talked.connection.response.cancel()
        response = (await talked.until("response.done"))[-1].response.to_dict()
        frail.expect("given up")
        assert response["status"] == "cancelled" and only_call(response["output"])["status"] == "failed"


# === approval ===


def request_of(items):
    [request] = [item for item in items if item["type"] == "mcp_approval_request"]
    assert (request["name"], request["server_label"]) == ("add", "shop")
    assert set(json.loads(request["arguments"])) == {"a", "b"}
    assert kinds(items)[-1] == "mcp_approval_request" and not calls_of(items)
    return request


def approval(request, approve):
    return {"type": "mcp_approval_response", "approval_request_id": request["id"], "approve": approve}


def check_approved(items, request):
    call = check_sum(items)
    assert call["approval_request_id"] == request["id"] != call["id"] and call["arguments"] == request["arguments"]


# Without a word on it every call has to be approved.
@pytest.mark.parametrize("required", [None, {"always": {"tool_names": ["add"]}}], ids=["unsaid", "listed"])
def test_calls_that_need_approval(gateway, shop, required):
    client, model = sdk(gateway, "host")
    with client:
        tools = [mcp(shop, require_approval=required)]
        response = client.responses.create(model=model, input=ASKED, tools=tools, tool_choice=force("add"), **SUM)
    request_of(check_shape(response).to_dict()["output"])


def test_a_call_is_approved_over_http_once(gateway, shop):
    client, model = sdk(gateway, "host")
    with client:
        options = {"model": model, "tools": [mcp(shop, require_approval="always")], **SUM}
        first = check_shape(client.responses.create(input=ASKED, tool_choice=force("add"), **options))
        request = request_of(first.to_dict()["output"])
        options["tool_choice"] = "none"
        given = {"previous_response_id": first.id, "input": [approval(request, True)]}
        second = check_shape(client.responses.create(**given, **options))
        check_approved(second.to_dict()["output"], request)
        for unknown in ({"id": "mcpr_unknown"}, {"id": second.output[-1].id}):
            with pytest.raises(openai.BadRequestError) as caught:
                client.responses.create(previous_response_id=first.id, input=[approval(unknown, True)], **options)
            assert caught.value.param.startswith("input")
        # It was approved, and is done: it is not done again.
        with pytest.raises(openai.BadRequestError):
            client.responses.create(previous_response_id=second.id, input=[approval(request, True)], **options)


def test_calls_that_need_no_approval(gateway, shop):
    client, model = sdk(gateway, "host")
    with client:
        tools = [mcp(shop, require_approval={"never": {"tool_names": ["add"]}})]
        response = client.responses.create(model=model, input=ASKED, tools=tools, tool_choice=force("add"), **SUM)
    check_sum(response.to_dict()["output"])


@pytest.mark.parametrize("approve", [True, False])
@conversation
async def test_a_person_decides_over_a_responses_websocket(gateway, shop, approve):
    before = counted(gateway)
    async with line(gateway, "host") as asked:
        options = {"tools": [mcp(shop, require_approval="always")], **SUM}
        first = await asked.answer(ASKED, tool_choice=force("add"), **options)
        request = request_of(first["output"])
        assert counted(gateway) == before
        given = {"previous_response_id": first["id"], "tool_choice": "none"}
        second = await asked.answer([approval(request, approve)], **given, **options)
        if approve:
            check_approved(second["output"], request)
        else:
            assert not calls_of(second["output"]) and words_of(second["output"])
    assert counted(gateway) == before + approve


@pytest.mark.parametrize("approve", [True, False])
@conversation
async def test_a_person_decides_over_realtime(gateway, shop, approve):
    before = counted(gateway)
    async with talk(gateway, "host") as talked:
        await talked.set(tools=[mcp(shop, require_approval="always", allowed_tools=["add"])], **SUM)
        request = request_of((await talked.answer(ASKED, tool_choice=force("add")))["output"])
        assert counted(gateway) == before
        await talked.add({"id": "mcpa_1", **approval(request, approve)})
        await talked.connection.response.create(response={"tool_choice": "none"})
        second = (await talked.until("response.done"))[-1].response.to_dict()
        if approve:
            check_approved(second["output"], request)
        else:
            assert not calls_of(second["output"]) and words_of(second["output"])
    assert counted(gateway) == before + approve


@conversation
async def test_a_call_that_nobody_approves_is_given_up(gateway, shop):
    before = counted(gateway)
    async with line(gateway, "host") as asked:
        options = {"tools": [mcp(shop, require_approval="always")], **SUM}
        first = await asked.answer(ASKED, tool_choice=force("add"), **options)
        request_of(first["output"])
        second = await asked.answer("Never mind.", previous_response_id=first["id"], tool_choice="none", **options)
        assert kinds(second["output"]) == ["message"] and words_of(second["output"])
    assert counted(gateway) == before


# === servers that are not there ===


def check_failed_listing(items):
    listing = listing_of(items)
    assert listing["tools"] == [] and listing["server_label"] == "shop"
    assert kinds(items) == ["mcp_list_tools", "message"] and words_of(items)


@pytest.mark.parametrize("choice", ["auto", "required", force("add")], ids=["auto", "required", "named"])
@conversation
async def test_a_server_that_is_down(gateway, choice):
    async with line(gateway, "host") as asked:
        options = {"tools": [mcp(f"http://127.0.0.1:{CLOSED}/mcp")], **SUM}
        response = await asked.answer("Hello there.", tool_choice=choice, **options)
        assert "response.mcp_list_tools.failed" in [event.type for event in asked.heard]
        check_failed_listing(response["output"])
        error = listing_of(response["output"])["error"]
        assert error and "127.0.0.1" not in error


@conversation
async def test_a_server_that_is_down_for_realtime(gateway):
    async with talk(gateway, "host") as talked:
        await talked.set(tools=[mcp(f"http://127.0.0.1:{CLOSED}/mcp")], **SUM)
        *listing, done = await talked.until("conversation.item.done")
        assert [event.type for event in listing] == [
            "conversation.item.added", "mcp_list_tools.in_progress", "mcp_list_tools.failed",
        ]  # fmt: skip
        assert done.item.tools == []
        response = await talked.answer("Hello there.", tool_choice="auto")
        assert not calls_of(response["output"]) and words_of(response["output"])


@conversation
async def test_a_server_that_dies_and_comes_back(gateway, frail):
    async with talk(gateway, "host") as talked:
        tools = [mcp(frail, allowed_tools=["wait", "add"])]
        await talked.set(tools=tools, tool_choice=force("wait"), **SUM)
        await talked.ask(ASKED)
        await talked.until("response.mcp_call.in_progress")
        frail.expect("waiting")
        frail.kill()
        response = (await talked.until("response.done"))[-1].response.to_dict()
        call = only_call(response["output"])
        check_outcome(call)
        assert call["status"] == "failed" and words_of(response["output"])
        # While it is down.
        response = await talked.answer(ASKED, tool_choice=force("add"))
        assert only_call(response["output"])["status"] == "failed" and words_of(response["output"])
        frail.start()
        response = await talked.answer(ASKED, tool_choice=force("add"))
        check_sum(response["output"])
        with gateway.http() as http:
            kept = http.get(f"/v1/sessions/{talked.session.id}").json()["items"]
        assert [call["status"] for call in calls_of(kept)] == ["failed", "failed", "completed"]


@conversation
async def test_a_server_that_is_started_anew_is_called_all_the_same(gateway, frail):
    async with line(gateway, "host") as asked:
        options = {"tools": [mcp(frail, allowed_tools=["add"])], "tool_choice": force("add"), **SUM}
        first = await asked.answer(ASKED, **options)
        check_sum(first["output"])
        frail.kill()
        frail.start()
        # It does not know the gateway any more, which no client notices.
        check_sum((await asked.answer(ASKED, previous_response_id=first["id"], **options))["output"])


# === servers that may not be named ===

NOT_TO_BE_ASKED = ["https://mcp.example.com/mcp", "http://127.0.0.1:1/mcp", "http://10.9.8.7/mcp", "mcp", None]


@pytest.mark.parametrize("url", NOT_TO_BE_ASKED)
def test_a_server_that_may_not_be_named(gateway, url):
    tool = {"type": "mcp", "server_label": "shop", "server_url": url, "require_approval": "never"}
    client, model = sdk(gateway, "host")
    with client, pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model=model, input=ASKED, tools=[tool])
    assert caught.value.param == "tools[0].server_url" and caught.value.body["message"]

    @conversation
    async def over_sockets():
        async with line(gateway, "host") as asked:
            await asked.ask(ASKED, tools=[tool])
            assert (await asked.until("error"))[-1].param == "tools[0].server_url"
        async with talk(gateway, "host") as talked:
            await talked.connection.session.update(session={"type": "realtime", "tools": [tool]})
            assert (await talked.until("error"))[-1].error.param == "session.tools[0].server_url"

    over_sockets()


# === agents ===


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("by_path", [False, True], ids=["by model", "by path"])
def test_an_agent_with_a_server(gateway, stream, by_path):
    before = counted(gateway, agent="desk", result="ok")
    assert chat(gateway, "desk", ASKED, by_path, stream).strip()
    assert counted(gateway, agent="desk", result="ok") == before + 1


def test_an_agent_whose_server_is_down(gateway):
    assert chat(gateway, "lost", "Hello there.").strip()
    assert counted(gateway, agent="lost") == 0


def test_an_agent_whose_calls_have_to_be_approved(gateway):
    # Over Chat Completions nobody can, so the tool is not offered.
    assert chat(gateway, "careful", "Hello there.").strip()
    client, model = sdk(gateway, "careful")
    with client:
        first = check_shape(client.responses.create(model=model, input=ASKED)).to_dict()
        request = request_of(first["output"])
        given = {"previous_response_id": first["id"], "input": [approval(request, True)], "tool_choice": "none"}
        check_approved(client.responses.create(model=model, **given).to_dict()["output"], request)
    assert counted(gateway, agent="careful") == 1
