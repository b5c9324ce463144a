"""Starts the gateway with agents, and the bot that their tools call back."""

import hashlib
import http.server
import json
import os
import pathlib
import signal
import socket
import subprocess
import threading
import time
from dataclasses import dataclass, field

import httpx
import pytest

READY_WITHIN = 240
STOPPED_WITHIN = 40

KEY = "key-of-the-platform-tests"
TWILIO_TOKEN = "token-of-the-twilio-account"
RETELL_SECRET = "secret-segment-of-retell"
WEBHOOK_SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


@dataclass
class Request:
    """What the bot was asked."""

    path: str
    headers: dict
    body: bytes
    at: float = field(default_factory=time.monotonic)

    @property
    def call(self):
        return json.loads(self.body)


class Bot:
    """Executes tools. `answers` maps a path to a function of the Request that gives (status, content type, body)."""

    def __init__(self, address=("127.0.0.1", 0)):
        self.requests = []
        self.answers = {}
        bot = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                length = int(self.headers.get("content-length", 0))
                request = Request(self.path, {k.lower(): v for k, v in self.headers.items()}, self.rfile.read(length))
                bot.requests.append(request)
                answer = bot.answers.get(self.path, lambda _: (200, "application/json", b'{"status": "shipped"}'))
                given = answer(request)
                if given is None:
                    # As a bot that dies: the connection ends without an answer.
                    self.close_connection = True
                    return
                status, kind, body = given[:3]
                self.send_response(status)
                self.send_header("content-type", kind)
                for name, value in given[3] if len(given) > 3 else ():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                try:
                    self.wfile.write(body)
                except OSError:
                    self.close_connection = True

            do_GET = do_POST

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(address, Handler)
        self.server.daemon_threads = True
        self.url = "http://{}:{}".format(*self.server.server_address)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def asked(self, path):
        return [request for request in self.requests if request.path == path]

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@dataclass
class Gateway:
    """A running gateway."""

    url: str
    log: pathlib.Path
    config: pathlib.Path
    process: subprocess.Popen

    @property
    def socket_url(self):
        return self.url.replace("http", "ws", 1)

    def http(self, **options):
        headers = {"authorization": f"Bearer {KEY}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=120, **options)

    def metric(self, name, **labels):
        """The sum of a metric's values with these labels."""
        total = 0.0
        for row in httpx.get(f"{self.url}/metrics").text.splitlines():
            series, _, value = row.rpartition(" ")
            if series.split("{")[0] == name and all(f'{k}="{v}"' in series for k, v in labels.items()):
                total += float(value)
        return total


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(folder, agents, settings="", server="", retell=""):
    """Starts a gateway with these agents (TOML) and further settings (TOML), such as the section [tools].

    `server` and `retell` are further lines of the sections of these names.
    """
    program = os.environ.get("ELECTRON_GATEWAY_BIN")
    if not program:
        pytest.exit("set ELECTRON_GATEWAY_BIN to the path of the server's program", returncode=2)
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"
    port = free_port()
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    config = folder / "config.toml"
    config.write_text(
        f'[server]\nlisten = "127.0.0.1:{port}"\n{server}\n'
        f'[twilio]\nauth_token = "{TWILIO_TOKEN}"\n[retell]\nsecret = "{RETELL_SECRET}"\n{retell}\n'
        f'[[keys]]\nname = "tests"\nhash = "sha256:{digest}"\n{settings}\n{agents}\n'
    )
    log = folder / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [program, "serve", "--config", str(config)], stdout=out, stderr=subprocess.STDOUT
        )
    gateway = Gateway(f"http://127.0.0.1:{port}", log, config, process)
    end = time.monotonic() + READY_WITHIN
    while time.monotonic() < end:
        try:
            if httpx.get(f"{gateway.url}/health/ready").status_code == 200:
                return gateway
        except httpx.TransportError:
            pass
        try:
            code = process.wait(0.2)
        except subprocess.TimeoutExpired:
            continue
        pytest.exit(f"the gateway ended with {code}\n{log.read_text(errors='replace')[-4000:]}", returncode=1)
    process.kill()
    pytest.exit("the gateway was not ready in time", returncode=1)


def stop(gateway):
    """Ends a gateway, which has to end well."""
    gateway.process.send_signal(signal.SIGTERM)
    try:
        code = gateway.process.wait(STOPPED_WITHIN)
    except subprocess.TimeoutExpired:
        gateway.process.kill()
        code = f"none within {STOPPED_WITHIN} s"
    text = gateway.log.read_text(errors="replace")
    assert code == 0, f"exit code {code}\n{text[-4000:]}"
    panics = [line for line in text.splitlines() if "panicked" in line]
    assert not panics, "\n".join(panics)


@pytest.fixture(scope="module")
def bot():
    bot = Bot()
    yield bot
    bot.close()
