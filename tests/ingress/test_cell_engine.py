"""What the ingress makes of a cell whose engine comes and goes: when it refuses, and what its health pages say."""

import warnings
from types import SimpleNamespace

import pytest

from serve_app.engine.core import EngineConfig, EngineCore
from serve_app.engine.request import Emission, Request
from serve_app.ingress.client import EngineUnavailableError
from serve_app.ingress.faults import TakenOverError
from serve_app.runtime import client as runtime
from serve_app.runtime.wire import Status

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # ray.serve's own, when it is imported
    from serve_app.ingress.deployment import HOLD_S, CellEngine, IngressService

pytestmark = pytest.mark.anyio

STATS = EngineCore(EngineConfig(num_stages=1, max_context_tokens=10)).stats()
LOST = "the engine's connection was closed"


class Client:
    """An `EngineClient` as far as `CellEngine` can see."""

    def __init__(self, status=None, why="", away_s=0.0, failure=None):
        self.epoch = status.epoch if status else 0
        self.is_alive = True
        self._status = status
        self._absence = (why, away_s)
        self._failure = failure

    def latest(self):
        return self._status, self._absence[1]

    def absence(self):
        return self._absence

    async def submit(self, request):
        if self._failure:
            raise self._failure
        yield Emission(request.rid, 0, [5], [], 0, "stop")


def status(*, ready=True, reason="", epoch=1):
    return Status(ready, reason, epoch, STATS)


async def ask(client):
    said = await CellEngine(client, 4, None).status()
    return said.live, said.ready, said.reason


async def collect(client):
    return [emission async for emission in CellEngine(client, 4, None).submit(Request("r", [1]))]


async def test_the_engine_s_own_word_counts_while_it_is_there():
    assert await ask(Client(status())) == (True, True, "")
    assert await ask(Client(status(reason="a worker was lost"))) == (True, True, "a worker was lost")
    assert await ask(Client(status(ready=False, reason="starting"))) == (True, False, "starting")


async def test_while_it_is_replaced_new_traffic_is_welcome_for_a_while():
    for away_s, welcome in ((0.0, True), (HOLD_S - 1, True), (HOLD_S, False)):
        live, ready, reason = await ask(Client(status(), LOST, away_s))
        assert (live, ready) == (False, welcome)
        assert reason == f"the engine is being replaced, for {away_s:.0f} s now: {LOST}"


async def test_one_that_was_not_ready_does_not_become_so_by_going():
    assert (await ask(Client(status(ready=False), LOST, 1.0)))[:2] == (False, False)


async def test_before_the_first_epoch_requests_are_refused_with_the_reason():
    never, starting = Client(why="the engine has not been heard yet"), Client(status(epoch=0, reason="2 of 4 loaded"))
    with pytest.raises(EngineUnavailableError, match="not been heard yet"):
        await collect(never)
    with pytest.raises(EngineUnavailableError, match="2 of 4 loaded"):
        await collect(starting)


async def test_later_they_are_taken_whatever_becomes_of_the_engine():
    for client in (Client(status()), Client(status(ready=False)), Client(status(), LOST, 30.0)):
        assert [emission.tokens for emission in await collect(client)] == [[5]]


async def test_why_a_stream_ended_is_said_in_the_ingress_s_words():
    with pytest.raises(EngineUnavailableError, match="no engine for 61 s"):
        await collect(Client(status(), failure=runtime.ConnectionLostError("no engine for 61 s")))
    with pytest.raises(TakenOverError, match="newer"):
        await collect(Client(status(), failure=runtime.TakenOverError("newer")))


def test_an_ingress_is_healthy_without_an_engine_but_not_without_its_connection():
    service = SimpleNamespace(_client=Client(status(), LOST, 100.0), _is_stranded=False)
    IngressService.check_health(service)
    service._is_stranded = True
    with pytest.raises(RuntimeError, match="another key"):
        IngressService.check_health(service)
    service._is_stranded = False
    service._client.is_alive = False
    with pytest.raises(RuntimeError, match="has ended"):
        IngressService.check_health(service)
