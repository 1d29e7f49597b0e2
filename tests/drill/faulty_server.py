"""A server that streams as an ingress does, and breaks connections as a dying one does."""

import asyncio
import json


class FaultyServer:
    """Answers every request with the tokens 0, 1, 2, ... Use as a context. `script`: how each connection goes, in turn.

    A number: so many events, then the connection breaks. "503": refused. A list of bytes: sent as it is. None, and
    whatever comes behind the script: it goes well.
    """

    def __init__(self, *script):
        self._script = list(script)
        self.seen = []  # (Last-Event-ID or None, body) of each connection

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *exc):
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[1:-2]
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in head)}
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        last_id = headers.get("last-event-id")
        self.seen.append((last_id, body))
        how = self._script.pop(0) if self._script else None
        if how == "503":
            writer.write(b"HTTP/1.1 503 Busy\r\ncontent-length: 4\r\n\r\nbusy")
        elif isinstance(how, bytes):
            writer.write(how)
        else:
            await self._stream(writer, body, int(last_id or 0), how)
        await writer.drain()
        writer.close()

    async def _stream(self, writer, body, first, num_events):
        """An event for each token, whose id is how many there are."""
        num_tokens = body["sampling_params"]["max_new_tokens"]
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        for num in range(first + 1, num_tokens + 1):
            if num - first - 1 == num_events:
                return
            finish = {"type": "length", "length": num} if num == num_tokens else None
            _chunk(writer, num, {"output_ids": list(range(num)), "meta_info": {"finish_reason": finish}})
        writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")


def _chunk(writer, event_id, event):
    data = f"id: {event_id}\ndata: {json.dumps(event)}\n\n".encode()
    writer.write(b"%x\r\n%s\r\n" % (len(data), data))
