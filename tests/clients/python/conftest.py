"""Starts the server that the tests talk to, ends it, and makes clients for it."""

import asyncio
import functools
import hashlib
import os
import pathlib
import signal
import socket
import subprocess
import time
from dataclasses import dataclass

import bot
import httpx
import openai
import pydantic
import pytest

READY_WITHIN = 240
STOPPED_WITHIN = 40
CONVERSED_WITHIN = 180

KEYS = {
    "normal": "key-without-limits",
    "hurried": "key-of-two-requests-a-minute",
    "single": "key-of-one-request-at-once",
    "elsewhere": "key-for-another-model",
}
LIMITS = {
    "hurried": "requests_per_minute = 2",
    "single": "concurrency = 1",
    "elsewhere": 'models = ["other"]',
}


def conversation(test):
    """Runs a test that is a coroutine. WebSocket clients wait for ever, so this is the limit of their patience."""

    @functools.wraps(test)
    def run(*args, **options):
        async def converse():
            async with asyncio.timeout(CONVERSED_WITHIN):
                await test(*args, **options)

        asyncio.run(converse())

    return run


def check_shape(received):
    """The SDKs build whatever comes, and put None where a field is missing. This checks it against their types."""
    try:
        type(received).model_validate(received.to_dict(warnings=False))
    except pydantic.ValidationError as error:
        faults = {fault["loc"]: fault for fault in error.errors()}
        # Of a union every variant is listed, most of which the value was never meant to be.
        others = {loc[:-1] for loc in faults if loc[-1] in ("type", "role") and faults[loc]["type"] == "literal_error"}
        told = [loc for loc in faults if not any(loc[:n] in others for n in range(1, len(loc)))]
        rows = [f"{'.'.join(map(str, loc))}: {faults[loc]['msg']}" for loc in told or faults]
        raise AssertionError("\n".join([f"no {type(received).__name__}:", *rows])) from None


@dataclass
class Server:
    """A running server."""

    url: str
    log: pathlib.Path
    bot: str

    def client(self, key="normal", **options):
        """The official SDK, which does not hide errors behind retries here."""
        return openai.OpenAI(**self.options(key, **options))

    def async_client(self, key="normal", **options):
        return openai.AsyncOpenAI(**self.options(key, **options))

    def options(self, key, **options):
        return {"base_url": f"{self.url}/v1", "api_key": KEYS[key], "max_retries": 0, "timeout": 120, **options}

    def metric(self, line):
        """A value of the metrics page, 0 when it is not there yet."""
        for row in httpx.get(f"{self.url}/metrics").text.splitlines():
            name, _, value = row.rpartition(" ")
            if name == line:
                return float(value)
        return 0.0


@pytest.fixture(scope="session")
def bot_url():
    with bot.running() as url:
        yield url


@pytest.fixture(scope="session")
def server(tmp_path_factory, bot_url):
    program = os.environ.get("ELECTRON_GATEWAY_BIN")
    if not program:
        pytest.exit("set ELECTRON_GATEWAY_BIN to the path of the server's program", returncode=2)
    # Proxies are for the world outside.
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = folder / "config.toml"
    config.write_text(configuration(port, bot_url))
    log = folder / "log"
    command = [program, "serve", "--config", str(config)]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    server = Server(f"http://127.0.0.1:{port}", log, bot_url)
    try:
        await_ready(server, process)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(STOPPED_WITHIN)
        except subprocess.TimeoutExpired:
            process.kill()
            code = f"none within {STOPPED_WITHIN} s"
    if code != 0:
        pytest.fail(f"exit code {code}\n{tail(log)}", pytrace=False)
    panics = [line for line in log.read_text(errors="replace").splitlines() if "panicked" in line]
    if panics:
        pytest.fail("\n".join(panics), pytrace=False)


def configuration(port, bot_url):
    parts = [f'[server]\nlisten = "127.0.0.1:{port}"\n']
    parts.append(f'[tools]\nallow_urls = ["{bot_url}/"]\nallow_networks = ["127.0.0.1/32"]\n')
    for name, key in KEYS.items():
        digest = hashlib.sha256(key.encode()).hexdigest()
        parts.append(f'[[keys]]\nname = "{name}"\nhash = "sha256:{digest}"\n{LIMITS.get(name, "")}\n')
    return "\n".join(parts)


def await_ready(server, process):
    end = time.monotonic() + READY_WITHIN
    while time.monotonic() < end:
        try:
            if httpx.get(f"{server.url}/health/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        try:
            code = process.wait(0.2)
        except subprocess.TimeoutExpired:
            continue
        pytest.exit(f"the server ended with {code} before it was ready\n{tail(server.log)}", returncode=1)
    pytest.exit(f"the server was not ready within {READY_WITHIN} s\n{tail(server.log)}", returncode=1)


def tail(log):
    return log.read_text(errors="replace")[-4000:]


@pytest.fixture(scope="session")
def client(server):
    with server.client() as client:
        yield client
