"""An MCP server to test against.

    python mcp_server.py PORT [--json] [--stateless]

Serves http://127.0.0.1:PORT/mcp and prints "ready" as soon as it does. With --json it answers with JSON instead of
event streams, with --stateless it keeps no sessions.
"""

import argparse
import asyncio

import uvicorn
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from pydantic import BaseModel

server = MCPServer("tests", log_level="CRITICAL")
given_up = 0


class Weather(BaseModel):
    city: str
    degrees: float


@server.tool()
def add(a: int, b: int) -> str:
    """Adds two numbers."""
    return str(a + b)


@server.tool()
async def slow(seconds: float) -> str:
    """Answers after a while."""
    global given_up
    try:
        await asyncio.sleep(seconds)
    except asyncio.CancelledError:
        given_up += 1
        raise
    return f"waited {seconds} s"


@server.tool()
def cancellations() -> str:
    """How many calls of slow were given up."""
    return str(given_up)


@server.tool()
def fails() -> str:
    """Always fails."""
    raise ToolError("the kitchen is closed")


@server.tool()
def big() -> str:
    """Says far too much."""
    return "x" * (10 << 20)


@server.tool()
async def wait() -> str:
    """Never answers. Prints that it was called, and that it was given up."""
    print("waiting", flush=True)
    try:
        await asyncio.Event().wait()
    finally:
        print("given up", flush=True)


@server.tool()
def authorization(context: Context) -> str:
    """Whom the request is from."""
    return (context.headers or {}).get("authorization", "nobody")


@server.tool()
def weather(city: str) -> Weather:
    """The weather in a city."""
    return Weather(city=city, degrees=21.5)


@server.tool()
async def learn(name: str, context: Context) -> str:
    """Adds a tool of this name, and says that the tools changed."""
    server.add_tool(lambda: f"{name} was learned", name=name, description="Learned.")
    await context.session.send_tool_list_changed()
    return "learned"


class Announced(uvicorn.Server):
    async def startup(self, sockets=None):
        await super().startup(sockets)
        print("ready", flush=True)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser()
    arguments.add_argument("port", type=int)
    arguments.add_argument("--json", action="store_true")
    arguments.add_argument("--stateless", action="store_true")
    options = arguments.parse_args()
    app = server.streamable_http_app(json_response=options.json, stateless_http=options.stateless)
    Announced(uvicorn.Config(app, host="127.0.0.1", port=options.port, log_level="critical")).run()
