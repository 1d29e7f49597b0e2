"""The ingress's side, over the real mesh: the test is the engine, and dies as engines do."""

import asyncio
import queue
import random
import sys
import threading
import time
from asyncio.subprocess import PIPE
from contextlib import asynccontextmanager, suppress
from types import SimpleNamespace

import msgspec
import pytest

from serve_app.engine.core import EngineConfig, EngineCore
from serve_app.engine.plan import Cancel, Submit
from serve_app.engine.request import Emission, Request, SamplingParams
from serve_app.runtime import client as client_module
from serve_app.runtime.client import ConnectionLostError, EngineClient, TakenOverError
from serve_app.runtime.mesh import Mesh
from serve_app.runtime.wire import Attach, From, Status, Tokens

pytestmark = pytest.mark.anyio

WAIT_S = 20.0
STATS = EngineCore(EngineConfig(num_stages=1, max_context_tokens=10)).stats()
ANSWER = list(range(100, 150))


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture(autouse=True)
def haste(monkeypatch):
    """Limits of time that are not the test's subject: out of its way."""
    monkeypatch.setattr(client_module, "BEAT_S", 0.05)
    monkeypatch.setattr(client_module, "PAUSE_S", 0.01)
    monkeypatch.setattr(client_module, "SILENT_S", 1000.0)
    monkeypatch.setattr(client_module, "GIVE_UP_S", 1000.0)


class Engine:
    """A mesh that answers each Attach, and hands what is asked of it to the test."""

    def __init__(self, epoch=1):
        self.mesh = Mesh()
        self.address = self.mesh.address
        self.epoch = epoch
        self.attached = []
        self.asked = queue.Queue()  # Submit and Cancel, as they come
        self.is_mute = False
        self._dead = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        while not self._dead.is_set():
            received = self.mesh.receive(0.02)
            match received and received.message:
                case Attach() as attach:
                    self.attached.append(attach)
                    self.mesh.connect(attach.name, attach.address)
                    if not self.is_mute:
                        self.mesh.send(attach.name, Status(True, "", self.epoch, STATS))
                case From(_, event):
                    self.asked.put(event)

    async def next(self, kind=Submit):
        event = await asyncio.to_thread(self.asked.get, timeout=WAIT_S)
        assert isinstance(event, kind), event
        return event.request if kind is Submit else event.rid

    def emit(self, rid, first, tokens, finish=None, logprobs=(), num_cached=0):
        emission = Emission(rid, first, list(tokens), list(logprobs), num_cached, finish)
        assert self.mesh.send("ingress", Tokens([emission]))

    def die(self):
        if not self._dead.is_set():
            self._dead.set()
            self._thread.join(WAIT_S)
            self.mesh.close()


class World:
    def __init__(self):
        self.engines = []
        self.answers = []  # what `endpoint` does before it says where the newest engine is: addresses, errors, "hang"
        self.num_endpoint_calls = 0
        self.client = EngineClient(Mesh(), self.endpoint, "ingress", pid=7, node="here")

    async def endpoint(self):
        self.num_endpoint_calls += 1
        answer = self.answers.pop(0) if self.answers else None
        if isinstance(answer, Exception):
            raise answer
        if answer == "hang":
            await asyncio.Event().wait()
        if answer is None and not self.engines:
            raise RuntimeError("there is no engine")
        return answer or self.engines[-1].address

    def engine(self, **options):
        self.engines.append(Engine(**options))
        return self.engines[-1]

    def die(self):
        self.engines.pop().die()

    async def until(self, holds):
        async with asyncio.timeout(WAIT_S):
            while not holds():  # noqa: ASYNC110 -- what it waits for has no event
                await asyncio.sleep(0.005)

    async def found(self):
        await self.until(lambda: self.client.absence() == ("", 0.0))

    async def lost(self):
        await self.until(lambda: self.client.absence()[0])


@asynccontextmanager
async def open_world():
    world = World()
    try:
        yield world
    finally:
        world.client.close()
        for engine in world.engines:
            engine.die()


@pytest.fixture
async def world():
    async with open_world() as world:
        yield world


@pytest.fixture
async def engine(world):
    engine = world.engine()
    await world.found()
    return engine


class Reader:
    """Reads a request's stream to its end, in a task of its own."""

    def __init__(self, client, request):
        self.emissions = []
        self.tokens = []
        self._news = asyncio.Event()
        self.task = asyncio.ensure_future(self._read(client.submit(request)))

    async def _read(self, stream):
        async for emission in stream:
            assert emission.first == len(self.tokens)
            self.emissions.append(emission)
            self.tokens += emission.tokens
            self._news.set()

    async def reach(self, num_tokens):
        async with asyncio.timeout(WAIT_S):
            while len(self.tokens) < num_tokens:
                self._news.clear()
                await self._news.wait()

    async def end(self):
        await asyncio.wait_for(self.task, WAIT_S)
        return self.tokens


def request(rid="r"):
    return Request(rid, [1, 2, 3], SamplingParams(max_new_tokens=50))


# -- an engine that lives -----------------------------------------------------------------------------------------


async def test_tokens_come_as_they_are_made(world, engine):
    reader = Reader(world.client, request())
    asked = await engine.next()
    assert msgspec.structs.replace(asked, terms=request().terms) == request()
    assert not asked.terms.is_accepted and asked.terms.waited_s >= 0
    engine.emit("r", 0, [5, 6], logprobs=[-0.1, -0.2], num_cached=2)
    engine.emit("r", 2, [7], "stop", logprobs=[-0.3], num_cached=2)
    assert await reader.end() == [5, 6, 7]
    assert [logprob for emission in reader.emissions for logprob in emission.logprobs] == [-0.1, -0.2, -0.3]
    assert engine.asked.empty()


async def test_the_engine_is_told_who_attaches(world, engine):
    attach = engine.attached[0]
    assert (attach.name, attach.pid, attach.node) == ("ingress", 7, "here")
    status, age_s = world.client.latest()
    assert (status.ready, status.epoch) == (True, 1)
    assert age_s < WAIT_S


async def test_whoever_goes_early_cancels(world, engine):
    stream = world.client.submit(request())
    first = asyncio.ensure_future(anext(stream))
    await engine.next()
    engine.emit("r", 0, [5])
    await first
    await stream.aclose()
    assert await engine.next(Cancel) == "r"


async def test_what_comes_twice_or_late_is_passed_on_once_and_in_order(world, engine):
    reader = Reader(world.client, request())
    await engine.next()
    for first, last in ((0, 3), (0, 3), (1, 5), (2, 4), (0, 6), (6, 7), (3, 6)):
        engine.emit("r", first, ANSWER[first:last], logprobs=[-float(i) for i in range(first, last)])
    engine.emit("r", 7, ANSWER[7:8], "length", logprobs=[-7.0])
    engine.emit("r", 7, ANSWER[7:8], "length", logprobs=[-7.0])
    assert await reader.end() == ANSWER[:8]
    assert [logprob for emission in reader.emissions for logprob in emission.logprobs] == [-float(i) for i in range(8)]
    assert engine.asked.empty()


async def test_what_was_lost_is_asked_for_once(world, engine):
    reader = Reader(world.client, request())
    await engine.next()
    engine.emit("r", 0, ANSWER[:2])
    for first in (3, 4, 5):
        engine.emit("r", first, ANSWER[first : first + 1])
    again = await engine.next()
    assert (again.rid, again.prompt, again.emitted) == ("r", [1, 2, 3], ANSWER[:2])
    engine.emit("r", 2, ANSWER[2:6])
    engine.emit("r", 7, ANSWER[7:8])  # lost again
    assert (await engine.next()).emitted == ANSWER[:6]
    engine.emit("r", 6, ANSWER[6:8], "length")
    assert await reader.end() == ANSWER[:8]
    assert engine.asked.empty()


async def test_an_end_that_was_lost_is_asked_for_after_a_while(world, engine, monkeypatch):
    reader = Reader(world.client, request())
    await engine.next()
    engine.emit("r", 0, ANSWER[:2])
    await reader.reach(2)
    monkeypatch.setattr(client_module, "QUIET_S", 0.05)
    assert (await engine.next()).emitted == ANSWER[:2]
    engine.emit("r", 2, [9], "stop")
    assert await reader.end() == [*ANSWER[:2], 9]


async def test_the_end_of_a_request_of_the_past_ends_no_other(world, engine):
    reader = Reader(world.client, request())
    await engine.next()
    engine.emit("r", 0, [], "abort")  # of one that was cancelled just before, under the same name
    assert (await engine.next()).emitted == []
    engine.emit("r", 0, ANSWER[:2], "stop")
    assert await reader.end() == ANSWER[:2]


@pytest.mark.parametrize("seed", range(5))
async def test_whatever_happens_to_messages_the_stream_is_the_answer(world, engine, seed):
    chance = random.Random(seed)
    reader = Reader(world.client, request())
    await engine.next()
    pieces = [(i, i + chance.randint(1, 5)) for i in range(len(ANSWER))]
    chance.shuffle(pieces)
    for first, last in pieces:
        engine.emit("r", first, ANSWER[first:last])
        with suppress(queue.Empty):
            known = len(engine.asked.get_nowait().request.emitted)
            engine.emit("r", known, ANSWER[known : known + chance.randint(0, 8)])
    engine.emit("r", 0, ANSWER, "length")
    assert await reader.end() == ANSWER


async def test_the_newer_of_two_readers_of_one_request_gets_it(world, engine):
    older = Reader(world.client, request())
    await engine.next()
    engine.emit("r", 0, ANSWER[:2])
    await older.reach(2)
    newer = Reader(world.client, request())
    with pytest.raises(TakenOverError, match="taken over by a newer connection"):
        await older.end()
    assert (await engine.next()).emitted == []
    engine.emit("r", 0, ANSWER[:4], "stop")
    assert await newer.end() == ANSWER[:4]
    assert engine.asked.empty()  # the older one did not cancel it


# -- an engine that dies ------------------------------------------------------------------------------------------


async def test_a_stream_goes_on_with_an_engine_at_another_address(world, engine):
    reader, done = Reader(world.client, request()), Reader(world.client, request("done"))
    assert {(await engine.next()).rid, (await engine.next()).rid} == {"r", "done"}
    engine.emit("done", 0, [1], "stop")
    engine.emit("r", 0, ANSWER[:3], num_cached=2)
    await done.end()
    await reader.reach(3)
    world.die()
    await world.lost()
    reborn = world.engine(epoch=0)
    again = await reborn.next()
    assert (again.rid, again.prompt, again.emitted) == ("r", [1, 2, 3], ANSWER[:3])
    reborn.emit("r", 0, ANSWER[:2])  # whatever it repeats is known
    reborn.emit("r", 1, ANSWER[1:5])
    reborn.emit("r", 5, [9], "stop")
    assert await reader.end() == [*ANSWER[:5], 9]
    assert reborn.asked.empty()
    assert world.client.epoch == 1  # the cell has been there before


async def test_addresses_of_the_dead_errors_and_silence_are_asked_past(world, engine, monkeypatch):
    monkeypatch.setattr(client_module, "ENDPOINT_S", 0.05)
    monkeypatch.setattr(client_module, "LINK_S", 0.05)
    reader = Reader(world.client, request())
    await engine.next()
    dead = engine.address
    world.answers = [dead, RuntimeError("the replica died"), "hang", dead, "tcp://127.0.0.1:9"]
    world.die()
    reborn = world.engine()
    assert (await reborn.next()).rid == "r"
    assert world.answers == []
    reborn.emit("r", 0, ANSWER[:1], "stop")
    assert await reader.end() == ANSWER[:1]


async def test_requests_that_come_while_there_is_no_engine_are_held(world, engine):
    world.die()
    await world.lost()
    readers = [Reader(world.client, request(rid)) for rid in ("a", "b", "c")]
    await asyncio.sleep(0)  # they have asked
    readers[1].task.cancel()
    await asyncio.gather(readers[1].task, return_exceptions=True)
    reborn = world.engine()
    assert [(await reborn.next()).rid, (await reborn.next()).rid] == ["a", "c"]
    for rid in ("a", "c"):
        reborn.emit(rid, 0, [5], "stop")
    assert [await readers[0].end(), await readers[2].end()] == [[5], [5]]
    assert reborn.asked.empty()  # nobody cancelled "b" there: it never came


async def test_not_without_limit(world, monkeypatch):
    monkeypatch.setattr(client_module, "HELD_LIMIT", 1)
    held = Reader(world.client, request())
    await asyncio.sleep(0)
    with pytest.raises(ConnectionLostError, match="not been heard yet, and 1 requests wait"):
        await Reader(world.client, request("more")).end()
    held.task.cancel()


async def test_without_an_engine_for_long_all_fail_and_later_all_is_well(world, engine, monkeypatch):
    live = Reader(world.client, request())
    await engine.next()
    world.die()
    await world.lost()
    held = Reader(world.client, request("held"))
    await asyncio.sleep(0)
    monkeypatch.setattr(client_module, "GIVE_UP_S", 0.05)
    for reader in (live, held):
        with pytest.raises(ConnectionLostError, match=r"no engine for \d s: the engine's connection was closed"):
            await reader.end()
    with pytest.raises(ConnectionLostError, match="no engine"):
        await Reader(world.client, request()).end()
    reborn = world.engine()
    await world.found()
    late = Reader(world.client, request())
    assert (await reborn.next()).rid == "r"
    reborn.emit("r", 0, [5], "stop")
    assert await late.end() == [5]


async def test_an_engine_that_says_nothing_is_looked_for(world, engine, monkeypatch):
    reader = Reader(world.client, request())
    await engine.next()
    engine.is_mute = True
    monkeypatch.setattr(client_module, "SILENT_S", 0.2)
    await world.lost()
    why, _ = world.client.absence()
    assert why.startswith("the engine has been silent for ")
    reborn = world.engine()
    assert (await reborn.next()).rid == "r"
    engine.emit("r", 0, ANSWER[:2])  # the old one was only slow: its tokens are the same
    await reader.reach(2)
    reborn.emit("r", 0, ANSWER[:3], "stop")
    assert await reader.end() == ANSWER[:3]


async def test_an_ingress_that_was_paused_asks_for_everything_again(world, engine, monkeypatch):
    reader = Reader(world.client, request())
    await engine.next()
    monkeypatch.setattr(client_module, "SILENT_S", 0.3)
    time.sleep(1.0)  # noqa: ASYNC251 -- the pause
    assert (await engine.next()).rid == "r"
    engine.emit("r", 0, ANSWER[:1], "stop")
    assert await reader.end() == ANSWER[:1]


ENGINE = """
import sys
from tests.runtime.test_client import Engine
print(Engine().address, flush=True)
sys.stdin.read()
"""


async def test_a_killed_process_is_noticed_without_waiting(world):
    """SILENT_S is out of the way here: the closed socket alone says it."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", ENGINE, stdin=PIPE, stdout=PIPE)
    address = (await process.stdout.readline()).decode().strip()
    world.engines.append(SimpleNamespace(address=address, die=lambda: None))
    await world.found()
    process.kill()
    await world.lost()
    assert world.client.absence()[0] == "the engine's connection was closed"
    process.stdin.close()
    await process.wait()


async def test_close_leaves_nothing_behind():
    async with open_world() as world:
        world.engine()
        await world.found()
        assert world.client.is_alive
        world.client.close()
        await asyncio.sleep(0)
        assert not world.client.is_alive
        world.client.close()
    for thread in threading.enumerate():
        if thread.name in {"engine-client", "mesh-watch"}:
            thread.join(WAIT_S)
            assert not thread.is_alive()
