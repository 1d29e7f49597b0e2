"""What strangers do to a port: broken HTTP, headers that never end, half-closed streams, crowds that say nothing.

Each function takes (host, port) of any server of ours, whatever stands before it.
"""

import asyncio
import json
import resource
from contextlib import asynccontextmanager

import httpx

PATIENCE_S = 60.0  # how long what must come is waited for; never how long it usually takes
WAVE = 50  # connections opened at a time: a backlog is short
SPARE_FILES = 400  # that a process needs besides

BODY = json.dumps({"text": "Rome", "sampling_params": {"max_new_tokens": 4}}).encode()
POST = b"POST /generate HTTP/1.1\r\nhost: octavo\r\ncontent-type: application/json\r\n"

BROKEN = {
    "noise": bytes(range(256)) * 4,
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64,
    "no words": b"\r\n\r\n\r\n\r\n",
    "HTTP/0.9": b"GET /livez\r\n",
    "HTTP/9.9": b"GET /livez HTTP/9.9\r\nhost: octavo\r\n\r\n",
    "no method": b"/livez HTTP/1.1\r\nhost: octavo\r\n\r\n",
    "no path": b"GET  HTTP/1.1\r\nhost: octavo\r\n\r\n",
    "a path of 1 MB": b"GET /" + b"a" * (1 << 20) + b" HTTP/1.1\r\nhost: octavo\r\n\r\n",
    "a header of 1 MB": b"GET /livez HTTP/1.1\r\nhost: octavo\r\nx: " + b"a" * (1 << 20) + b"\r\n\r\n",
    "a thousand headers": b"GET /livez HTTP/1.1\r\nhost: octavo\r\n" + b"x: y\r\n" * 1000 + b"\r\n",
    "a header without a colon": b"GET /livez HTTP/1.1\r\nhost octavo\r\n\r\n",
    "a header with a zero byte": b"GET /livez HTTP/1.1\r\nhost: oct\x00avo\r\n\r\n",
    "a name with a space": b"GET /livez HTTP/1.1\r\nhost : octavo\r\n\r\n",
    "bare line feeds": b"GET /livez HTTP/1.1\nhost: octavo\n\n",
    "a negative length": POST + b"content-length: -5\r\n\r\n" + BODY,
    "a length that is no number": POST + b"content-length: many\r\n\r\n" + BODY,
    "a length over 64 bits": POST + b"content-length: 99999999999999999999999\r\n\r\n" + BODY,
    "two lengths": POST + b"content-length: 5\r\ncontent-length: 50\r\n\r\n" + BODY,
    "length and chunks": POST + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "a chunk size that is none": POST + b"transfer-encoding: chunked\r\n\r\nzz\r\nhello\r\n0\r\n\r\n",
    "a chunk of 2^64 bytes": POST + b"transfer-encoding: chunked\r\n\r\nffffffffffffffffff\r\nhello",
    "an encoding of its own": POST + b"transfer-encoding: sausage\r\n\r\n" + BODY,
    "noise behind a request": b"GET /livez HTTP/1.1\r\nhost: octavo\r\n\r\n\x00\x01\x02\x03 what?\r\n\r\n",
    "a body that is no JSON": POST + b"content-length: 9\r\n\r\n\xff\xfe\x00\x00{{{[[",
}


async def assert_served(host, port):
    """An ordinary client gets what it asks for."""
    async with httpx.AsyncClient(base_url=f"http://{host}:{port}", timeout=PATIENCE_S) as client:
        assert (await client.get("/livez")).status_code == 200
        answer = await client.post("/generate", content=BODY)
        assert answer.status_code == 200, answer.text
        assert answer.json()["meta_info"]["completion_tokens"] >= 1


@asynccontextmanager
async def a_stream_beside(host, port, num_tokens=64):
    """A stream that begins before and is read to its end after whatever is done in between: it misses nothing."""
    body = {
        "text": "Rome",
        "stream": True,
        "sampling_params": {"max_new_tokens": num_tokens, "ignore_eos": True, "temperature": 0},
    }
    async with (
        httpx.AsyncClient(base_url=f"http://{host}:{port}", timeout=PATIENCE_S) as client,
        client.stream("POST", "/generate", json=body) as answer,
    ):
        assert answer.status_code == 200
        yield
        events = [line.removeprefix("data: ") async for line in answer.aiter_lines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    counts = [json.loads(event)["meta_info"]["completion_tokens"] for event in events[:-1]]
    assert counts == sorted(set(counts))
    assert counts[-1] == num_tokens


async def send_broken(host, port, name):
    """Send one of BROKEN and take what comes. Returns the status of the first answer; None where there was none."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(BROKEN[name])
        await writer.drain()
        writer.write_eof()  # nothing more comes: who waits for the rest need not
        answer = await asyncio.wait_for(reader.read(), PATIENCE_S)
    except OSError:  # it did not want to read on: reset, or closed before our half was
        answer = b""
    finally:
        await _close([writer])
    return int(answer.split()[1]) if answer.startswith(b"HTTP/") else None


@asynccontextmanager
async def slow_headers(host, port, count):
    """So many clients that send their headers a few bytes at a time and never end them."""
    async with _connections(host, port, count) as writers:
        for piece in (b"POST /generate HTTP/1.1\r\n", b"host: octavo\r\n", b"x-a: b", b"c", b"d\r\n", b"x-e:"):
            for writer in writers:
                writer.write(piece)
            await asyncio.gather(*(writer.drain() for writer in writers))
        yield


@asynccontextmanager
async def idle_connections(host, port, count):
    """So many clients that connect and say nothing; fewer where this process may not open as many. Yields the count."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = min(count, (soft - SPARE_FILES) // 2)  # both ends may be ours
    async with _connections(host, port, count):
        yield count


async def half_close(host, port, sent):
    """Send this, close our half of the connection, and read to the end of the other half, if there is one."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(sent)
        writer.write_eof()
        return await asyncio.wait_for(reader.read(), PATIENCE_S)
    except ConnectionError:
        return b""
    finally:
        await _close([writer])


HALVES = {
    "nothing": b"",
    "half a header": b"POST /generate HTTP/1.1\r\nhost: oc",
    "half a body": POST + b"content-length: 1000\r\n\r\n" + BODY,
    "half a chunk": POST + b"transfer-encoding: chunked\r\n\r\n40\r\n" + BODY[:10],
    "a whole request": POST + b"content-length: %d\r\n\r\n" % len(BODY) + BODY,
}


@asynccontextmanager
async def _connections(host, port, count):
    writers = []
    try:
        while len(writers) < count:
            wave = min(WAVE, count - len(writers))
            opened = await asyncio.gather(*(asyncio.open_connection(host, port) for _ in range(wave)))
            writers += [writer for _, writer in opened]
        yield writers
    finally:
        await _close(writers)


async def _close(writers):
    for writer in writers:
        writer.transport.abort()
    await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)
