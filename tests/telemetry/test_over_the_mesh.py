"""The ledger over real sockets: the engine's own loop, and two ingress replicas' own clients."""

import asyncio
import threading
from contextlib import asynccontextmanager

import pytest

from serve_app.engine.cell import CellCore
from serve_app.engine.core import EngineConfig, EngineCore
from serve_app.engine.members import Stop
from serve_app.engine.membership import Membership, MembershipConfig
from serve_app.engine.plan import Begin, Submit
from serve_app.engine.request import Request
from serve_app.engine.slo import SloConfig
from serve_app.experts.layout import Layout
from serve_app.experts.placement import Slots
from serve_app.runtime import client as client_module
from serve_app.runtime import engine_loop as engine_loop_module
from serve_app.runtime import tallies
from serve_app.runtime.calibration import Calibration
from serve_app.runtime.client import EngineClient
from serve_app.runtime.engine_loop import EngineLoop
from serve_app.runtime.mesh import Mesh
from serve_app.runtime.names import ENGINE

pytestmark = pytest.mark.anyio

WAIT_S = 20.0


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture(autouse=True)
def haste(monkeypatch):
    """Limits of time that are not the test's subject: out of its way."""
    monkeypatch.setattr(client_module, "PAUSE_S", 0.01)
    monkeypatch.setattr(client_module, "BEAT_S", 0.05)
    monkeypatch.setattr(client_module, "SILENT_S", 1000.0)
    monkeypatch.setattr(engine_loop_module, "TICK_S", 0.01)
    monkeypatch.setattr(engine_loop_module, "STATUS_S", 0.05)
    monkeypatch.setattr(tallies, "SETTLE_S", 0.0)
    monkeypatch.setattr(tallies, "TELL_S", 0.0)
    monkeypatch.setattr(tallies, "PULL_S", WAIT_S)


class Engine:
    """One that computes nothing, but has admitted a prompt of so many tokens."""

    def __init__(self, num_prompt_tokens, is_calibrating=False):
        members = Membership(Layout(1, 1, 1), [range(1)], Slots(1, 0), MembershipConfig())
        core = EngineCore(EngineConfig(num_stages=1, max_context_tokens=100, slo=SloConfig(ttft_s=10.0)))
        core.on(Begin(epoch=0, num_replicas=1, num_pages=100), 0.0)
        core.on(Submit(Request("r", [5] * num_prompt_tokens)), 0.0)
        self.mesh = Mesh()
        calibration = Calibration(core, 10, num_replicas=1) if is_calibrating else None
        loop = EngineLoop(CellCore(core, members), self.mesh, lambda _: None, calibration=calibration)
        self._thread = threading.Thread(target=loop.run, daemon=True)
        self._thread.start()

    def die(self):
        self.mesh.send(ENGINE, Stop())
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()
        self.mesh.close()


class World:
    def __init__(self):
        self.engine = None
        self.clients = {}

    async def where(self):
        if self.engine is None:
            raise RuntimeError("there is no engine")
        return self.engine.mesh.address

    def join(self, name):
        client = self.clients[name] = EngineClient(Mesh(), self.where, name)
        return client.book

    def replace_engine(self, num_prompt_tokens, **options):
        if self.engine:
            self.engine.die()
        self.engine = Engine(num_prompt_tokens, **options)

    async def linked(self):
        """All replicas have found the present engine."""
        address = self.engine.mesh.address
        await until(
            lambda: all(
                client.absence() == ("", 0.0) and client._address == address for client in self.clients.values()
            )
        )

    def close(self):
        for client in self.clients.values():
            client.close()
        if self.engine:
            self.engine.die()


async def until(holds):
    async with asyncio.timeout(WAIT_S):
        while not holds():  # noqa: ASYNC110 -- what it waits for has no event
            await asyncio.sleep(0.005)


@asynccontextmanager
async def open_world():
    world = World()
    try:
        yield world
    finally:
        world.close()


async def scrape(book):
    await book.refresh()
    return book.totals()


async def test_every_replica_shows_the_same_after_replicas_and_engines_have_died():
    async with open_world() as world:
        world.replace_engine(num_prompt_tokens=30)
        a, b = world.join("a"), world.join("b")
        await world.linked()
        a.row["x"], b.row["x"] = 3.0, 4.0
        assert (await scrape(a))["x"] >= 3
        await scrape(b)
        assert (await scrape(a))["x"] == (await scrape(b))["x"] == 7
        assert (await scrape(a))["vllm:prompt_tokens"] == 30
        world.clients.pop("a").close()
        world.replace_engine(num_prompt_tokens=12)
        await world.linked()
        c = world.join("c")
        await world.linked()
        for book in (b, c):
            seen = await scrape(book)
            assert (seen["x"], seen["vllm:prompt_tokens"]) == (7, 42)


async def test_what_one_counts_the_others_learn_without_being_asked():
    async with open_world() as world:
        world.replace_engine(num_prompt_tokens=5)
        a, b = world.join("a"), world.join("b")
        await world.linked()
        a.row["x"] = 3.0
        await until(lambda: (b.totals() or {}).get("x") == 3)


async def test_what_a_calibration_counts_is_never_told():
    """The ledger only grows: what was told once would stay, although the engine forgets it."""
    async with open_world() as world:
        world.replace_engine(num_prompt_tokens=30, is_calibrating=True)
        book = world.join("a")
        await world.linked()
        book.row["x"] = 3.0
        seen = await scrape(book)
        assert seen["x"] == 3
        assert "vllm:prompt_tokens" not in seen
