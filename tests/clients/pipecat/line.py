"""A telephone line that can be cut or slow: passes bytes on to a server, and back, until it is told otherwise."""

import asyncio
import contextlib
from urllib.parse import urlsplit


class Line:
    """Use as `async with Line(url) as line`; `line.port` leads to the server of `url`."""

    def __init__(self, url):
        self._to = urlsplit(url)
        self._calls = set()
        # While it is held: what the server has said, and to whom.
        self._kept = None
        self._heard = asyncio.Condition()
        # How many connections were made through it.
        self.connections = 0

    async def __aenter__(self):
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._listener.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_):
        self._listener.close()
        await self.cut()

    async def cut(self):
        """Drops what is connected, in both directions and without a goodbye. New connections are served again."""
        calls = list(self._calls)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)

    def hold(self):
        """Keeps what the server says from here on to itself."""
        self._kept = []

    async def holds(self, text):
        """Waits until that is among what is kept. Only connections without compression show their text."""
        async with self._heard:
            await self._heard.wait_for(lambda: text.encode() in b"".join(data for _, data in self._kept))

    def release(self):
        """Passes on what was kept, and whatever comes."""
        for writer, data in self._kept:
            writer.write(data)
        self._kept = None

    def _accept(self, reader, writer):
        self.connections += 1
        call = asyncio.create_task(self._serve(reader, writer))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)

    async def _serve(self, reader, writer):
        writers = [writer]
        try:
            server_reader, server_writer = await asyncio.open_connection(self._to.hostname, self._to.port)
            writers.append(server_writer)
            await asyncio.gather(self._forth(reader, server_writer), self._back(server_reader, writer))
        finally:
            for end in writers:
                end.transport.abort()

    async def _forth(self, reader, writer):
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
            # This side has said all; the other side may still speak.
            writer.write_eof()

    async def _back(self, reader, writer):
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                async with self._heard:
                    if self._kept is None:
                        writer.write(data)
                    else:
                        self._kept.append((writer, data))
                        self._heard.notify_all()
                await writer.drain()
            writer.write_eof()
