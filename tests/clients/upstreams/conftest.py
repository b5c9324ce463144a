"""Starts a llama.cpp server with the model that the gateway's own engine runs too, and a gateway in front of it."""

import hashlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass

import httpx
import openai
import pytest

READY_WITHIN = 120
STOPPED_WITHIN = 40
KEY = "key-of-the-tests"


@dataclass
class Gateway:
    """A running gateway."""

    url: str
    log: pathlib.Path

    def client(self):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=120)

    def async_client(self):
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=120)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def await_answer(url, process, log):
    until = time.monotonic() + READY_WITHIN
    while time.monotonic() < until:
        if process.poll() is not None:
            break
        try:
            if httpx.get(url, timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    pytest.exit(f"{url} did not answer\n{log.read_text(errors='replace')[-4000:]}", returncode=1)


def stop(process):
    process.send_signal(signal.SIGTERM)
    try:
        return process.wait(STOPPED_WITHIN)
    except subprocess.TimeoutExpired:
        process.kill()
        return None


@pytest.fixture(scope="session")
def program():
    program = os.environ.get("ELECTRON_GATEWAY_BIN")
    if not program:
        pytest.exit("set ELECTRON_GATEWAY_BIN to the path of the server's program", returncode=2)
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"
    return program


@pytest.fixture(scope="session")
def llama(program, tmp_path_factory):
    """The base URL of a llama.cpp server."""
    subprocess.run([program, "model", "pull", "--model", "smollm2"], stdout=subprocess.DEVNULL, check=True)
    listed = subprocess.run([program, "model", "list"], capture_output=True, text=True, check=True).stdout
    home = pathlib.Path(re.search(r"Models are kept in (.+?)\. A path", listed)[1])
    [gguf] = home.glob("smollm2/*.gguf")
    log = tmp_path_factory.mktemp("llama") / "log"
    port = free_port()
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(gguf), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--n_ctx", "2048", "--n_threads", "2", "--chat_format", "chatml-function-calling", "--model_alias", "small"]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}/v1"
    try:
        await_answer(f"{url}/models", process, log)
        yield url
    finally:
        stop(process)


@pytest.fixture(scope="session")
def gateway(program, llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gateway")
    port = free_port()
    config = folder / "config.toml"
    config.write_text(
        f"""
[server]
listen = "127.0.0.1:{port}"
[model]
source = ""
[models.llama]
urls = ["{llama}"]
model = "small"
first_token_timeout = "60s"
token_timeout = "60s"
stream_options = false
[[keys]]
name = "tests"
hash = "sha256:{hashlib.sha256(KEY.encode()).hexdigest()}"
"""
    )
    log = folder / "log"
    # No model in its own process, whatever is set for the other suites.
    env = {name: value for name, value in os.environ.items() if name != "ELECTRON_MODEL_SOURCE"}
    with log.open("wb") as out:
        command = [program, "serve", "--config", str(config)]
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env)
    url = f"http://127.0.0.1:{port}"
    code = None
    try:
        await_answer(f"{url}/health/ready", process, log)
        yield Gateway(url, log)
    finally:
        code = stop(process)
    if code != 0:
        pytest.fail(f"exit code {code}\n{log.read_text(errors='replace')[-4000:]}", pytrace=False)

