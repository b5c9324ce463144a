"""A bot that runs the tools of the agent in `phone_agent.toml`: the gateway POSTs each call to it.

    pip install standardwebhooks
    TOOL_SECRET=whsec_… python tool_bot.py [PORT]

TOOL_SECRET is the `secret` of the tools' callbacks; without it, signatures are not looked at. The port is 9000 unless
another is named. Ctrl-C ends the bot.

A call is answered with 200 and its result, or with 202 and the result later, at the call's `output_url`. What goes
wrong for the caller, such as an unknown order, is a result too, which the model puts into words. Other errors have a
status.
"""

import http.server
import json
import os
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable

LARGEST_CALL = 64 * 1024
MOST_JOBS = 16
MOST_ANSWERS = 1000
DELIVERIES = 4

ORDERS = {"1234": "packed", "5678": "shipped"}


def order_status(arguments: dict) -> dict:
    """Known at once."""
    state = ORDERS.get(arguments.get("order_id"))
    return {"state": state} if state else {"error": "There is no such order."}


def book_callback(arguments: dict) -> dict:
    """Takes longer than the gateway should hold a connection open."""
    time.sleep(5)
    return {"booked": f"{arguments.get('day')} {arguments.get('part_of_day')}"}


TOOLS: dict[str, Callable[[dict], dict]] = {"order_status": order_status, "book_callback": book_callback}
SLOW = {"book_callback"}


def verifier(secret: str) -> Callable[[bytes, dict], bool]:
    """What tells whether the holder of the secret sent a message, in the last five minutes."""
    if not secret:
        return lambda body, headers: True
    from standardwebhooks import Webhook
    from standardwebhooks.webhooks import WebhookVerificationError

    webhook = Webhook(secret)

    def is_genuine(body: bytes, headers: dict) -> bool:
        try:
            webhook.verify(body, headers, json_parse=False)
        except (WebhookVerificationError, ValueError):
            return False
        return True

    return is_genuine


class ToolBot(http.server.ThreadingHTTPServer):
    """Answers calls on a port of this machine. Port 0 is any free one."""

    def __init__(self, port: int, secret: str):
        super().__init__(("127.0.0.1", port), Handler)
        self.is_genuine = verifier(secret)
        self._answers: dict[str, tuple[int, dict]] = {}
        self._lock = threading.Lock()
        self._jobs = threading.BoundedSemaphore(MOST_JOBS)

    def answer(self, message_id: str, call: dict) -> tuple[int, dict]:
        """Status and body for a call. A message that comes again is not acted upon again."""
        name, arguments = call.get("name"), call.get("arguments")
        if name not in TOOLS or not isinstance(arguments, dict):
            return 404, {"error": f"There is no tool {name!r} here that takes these arguments."}
        with self._lock:
            if message_id not in self._answers:
                if name not in SLOW:
                    answer = 200, TOOLS[name](arguments)
                elif self._jobs.acquire(blocking=False):
                    threading.Thread(target=self._deliver, args=[call], daemon=True).start()
                    answer = 202, {}
                else:
                    # The gateway tries again, so this is not remembered.
                    return 503, {"error": "Too many calls are under way."}
                if len(self._answers) >= MOST_ANSWERS:
                    del self._answers[next(iter(self._answers))]
                self._answers[message_id] = answer
            return self._answers[message_id]

    def _deliver(self, call: dict) -> None:
        """Runs a slow tool and sends its result."""
        try:
            result = json.dumps(TOOLS[call["name"]](call["arguments"])).encode()
            headers = {"authorization": f"Bearer {call['output_token']}", "content-type": "application/json"}
            request = urllib.request.Request(call["output_url"], result, headers)
            for attempt in range(1, DELIVERIES + 1):
                try:
                    urllib.request.urlopen(request, timeout=10).close()
                    return
                except urllib.error.HTTPError as error:
                    # The call may be over: the caller has hung up, or it took too long.
                    log(f"{call['name']}: the result was refused, {error.code} {error.read(500).decode()}")
                    return
                except OSError as error:
                    log(f"{call['name']}: the result did not arrive, attempt {attempt} of {DELIVERIES}: {error}")
                    time.sleep(attempt)
        finally:
            self._jobs.release()


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection of the gateway."""

    protocol_version = "HTTP/1.1"
    timeout = 30
    server: ToolBot

    def do_POST(self) -> None:
        length = self.headers.get("content-length", "")
        if not length.isdecimal() or int(length) > LARGEST_CALL:
            self.close_connection = True
            return self._reply(413, {"error": f"A call has a Content-Length of up to {LARGEST_CALL} bytes."})
        body = self.rfile.read(int(length))
        if not self.server.is_genuine(body, dict(self.headers)):
            error = "The signature is wrong or old: compare the callback's secret with TOOL_SECRET, and the clocks."
            return self._reply(401, {"error": error})
        try:
            message_id, call = self.headers["webhook-id"], json.loads(body)
            if not message_id or not isinstance(call, dict):
                raise ValueError("a webhook-id and a JSON object are expected")
        except ValueError as error:
            return self._reply(400, {"error": f"This is no call: {error}."})
        self._reply(*self.server.answer(message_id, call), f"{call.get('name')} {call.get('arguments')}")

    def _reply(self, status: int, body: dict, about: str = "a request") -> None:
        text = json.dumps(body).encode()
        log(f"{about}: {status} {text.decode()}")
        try:
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)
        except OSError:
            # The gateway did not wait: the caller interrupted, or it took too long.
            self.close_connection = True

    def log_message(self, *_) -> None:
        """Replies are logged with what they are about."""


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    port, secret = int(sys.argv[1]) if len(sys.argv) > 1 else 9000, os.environ.get("TOOL_SECRET", "")
    try:
        bot = ToolBot(port, secret)
    except OSError as error:
        sys.exit(f"Port {port} cannot be used: {error}. Name another: python tool_bot.py PORT")
    with bot:
        log(f"Tools are run at http://127.0.0.1:{bot.server_address[1]}/tools")
        if not secret:
            log("TOOL_SECRET is not set: whoever reaches this port may call.")
        try:
            bot.serve_forever()
        except KeyboardInterrupt:
            log("Stopped.")


if __name__ == "__main__":
    main()
