"""What the gateway's tools ask: a callback, and an MCP server that keeps no sessions."""

import contextlib
import http.server
import json
import threading

CLOCK = {"name": "clock", "description": "Tells the time.", "inputSchema": {"type": "object", "properties": {}}}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.path == "/mcp":
            self.answer_mcp(json.loads(body))
        elif self.path == "/callback":
            self.answer(200, {"time": "14:05"})
        else:
            self.answer(500)

    def do_GET(self):
        self.answer(405)

    do_DELETE = do_GET

    def answer_mcp(self, message):
        if "id" not in message:
            return self.answer(202)
        result = {}
        if message["method"] == "initialize":
            version = message["params"]["protocolVersion"]
            about = {"name": "bot", "version": "1"}
            result = {"protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": about}
        elif message["method"] == "tools/list":
            result = {"tools": [CLOCK, {**CLOCK, "name": "broken"}]}
        elif message["method"] == "tools/call":
            content = [{"type": "text", "text": "14:05"}]
            result = {"content": content, "isError": message["params"]["name"] == "broken"}
        self.answer(200, {"jsonrpc": "2.0", "id": message["id"], "result": result})

    def answer(self, status, value=None):
        body = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def running():
    """Gives its URL."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
