"""A bot whose name leads outside first and inside afterwards. Runs a gateway in namespaces of its own:

    unshare --mount --net python rebinding.py FOLDER

Prints what was seen. Exits with 77 where the namespaces cannot be set up.
"""

import json
import pathlib
import socket
import struct
import subprocess
import sys
import threading

import conftest
from talks import agent, only_call

NAME = "bot.example.com"
OUTSIDE = "93.184.215.14"
INSIDE = "127.0.0.1"


def set_up(folder):
    """An address of the world outside that is here, and a resolver."""
    resolver = folder / "resolv.conf"
    resolver.write_text("nameserver 127.0.0.1\noptions timeout:5 attempts:2\n")
    for command in (
        ["ip", "link", "set", "lo", "up"],
        ["ip", "address", "add", f"{OUTSIDE}/32", "dev", "lo"],
        ["mount", "--make-rprivate", "/"],
        ["mount", "--bind", str(resolver), "/etc/resolv.conf"],
    ):
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"{' '.join(command)}: {getattr(error, 'stderr', '') or error}", file=sys.stderr)
            sys.exit(77)


class Dns:
    """Answers the first question for an address with the one outside, and all others with the one inside."""

    def __init__(self):
        self.resolved = []
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 53))
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            question, peer = self.socket.recvfrom(512)
            end = question.index(b"\0", 12) + 5
            labels, kind = question[12 : end - 5], question[end - 4 : end - 2]
            name = b".".join(labels[at + 1 : at + 1 + labels[at]] for at in offsets(labels)).decode().lower()
            answer = b""
            if name == NAME and kind == b"\0\1":
                self.resolved.append("inside" if self.resolved else "outside")
                address = INSIDE if self.resolved[-1] == "inside" else OUTSIDE
                answer = b"\xc0\x0c\0\1\0\1" + struct.pack("!IH", 0, 4) + socket.inet_aton(address)
            header = question[:2] + b"\x81\x80\0\1" + struct.pack("!H", bool(answer)) + b"\0\0\0\0"
            self.socket.sendto(header + question[12:end] + answer, peer)


def offsets(labels):
    at = 0
    while at < len(labels):
        yield at
        at += 1 + labels[at]


def main(folder):
    set_up(folder)
    dns = Dns()
    port = conftest.free_port()
    bots = {address: conftest.Bot((address, port)) for address in (OUTSIDE, INSIDE)}
    # The next call finds no connection that it could use.
    closing = [("connection", "close")]
    bots[OUTSIDE].answers["/tools"] = lambda _: (200, "application/json", b'{"status": "shipped"}', closing)
    gateway = conftest.start(folder, agent("desk", f"http://{NAME}:{port}/tools"))
    try:
        calls = []
        with gateway.http() as http:
            for _ in range(3):
                body = {"model": "electron:desk", "input": "Where is my order A?"}
                calls.append(only_call(http.post("/v1/responses", json=body).json()["output"]))
        seen = {
            "calls": calls,
            "outside": len(bots[OUTSIDE].requests),
            "inside": len(bots[INSIDE].requests),
            "resolved": dns.resolved,
            "forbidden": gateway.metric("electron_tool_attempts_total", result="forbidden"),
        }
    finally:
        conftest.stop(gateway)
    print(json.dumps(seen))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
