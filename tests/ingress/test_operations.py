"""What an operator orders happens once, can be followed to its end, and does not cross with another order."""

import asyncio

import msgspec
import pytest

from serve_app.engine.request import Request, SamplingParams, Terms
from serve_app.ingress.door import Limits
from serve_app.ingress.faults import AbortedError
from serve_app.ingress.guard import Protection
from serve_app.ingress.keys import make_key
from serve_app.runtime.operations import (
    MAX_OPERATIONS,
    TIMEOUT_S,
    Drain,
    Facts,
    Operation,
    OperationRequest,
    Operations,
    Say,
    Strike,
)
from tests.ingress.conftest import open_world
from tests.ingress.test_disconnect import soon
from tests.ingress.test_keys import bearer

PATH = "/admin/operations"
WHOLE = Facts(0, ["w0", "w1", "w2", "w3"], 4, 4, "tcp://1", "whole", "")
DRAIN, RESUME, DRILL = (OperationRequest(kind) for kind in ("drain", "resume", "drill"))


def but(facts=WHOLE, **changes):
    return msgspec.structs.replace(facts, **changes)


class Desk:
    """Operations, and a clock."""

    def __init__(self):
        self.all = Operations()
        self.now_s = 100.0
        self.num_ids = 0

    def begin(self, asked, **changes):
        self.num_ids += 1
        return self.all.begin(msgspec.structs.replace(asked, **changes), f"op{self.num_ids}", self.now_s)

    def look(self, facts=WHOLE, after_s=1.0):
        """What is to be done, without what is only told."""
        self.now_s += after_s
        return [act for act in self.all.observe(facts, self.now_s) if not isinstance(act, Say)]

    def newest(self):
        return self.all.all()[-1]


@pytest.fixture
def desk():
    return Desk()


# -- drain and resume -------------------------------------------------------------------------------------------------


def test_a_drain_is_done_when_nothing_runs_or_waits(desk):
    assert desk.begin(DRAIN).outcome == "new"
    assert (desk.newest().phase, desk.all.is_draining) == ("pending", False)
    assert desk.look(but(open_requests=3)) == [Drain(True)]
    operation = desk.newest()
    assert (operation.phase, operation.effective_workers, operation.pending_workers) == ("running", 4, 0)
    assert operation.detail == "3 requests are running or waiting"
    assert desk.look(but(open_requests=1)) == []
    assert desk.newest().phase == "running"
    desk.look(but(open_requests=0))
    operation = desk.newest()
    assert (operation.phase, operation.effective_workers, operation.pending_workers) == ("done", 0, 0)
    assert (operation.started_unix_s, operation.ended_unix_s) == (100.0, 103.0)
    assert desk.all.is_draining, "until it is resumed"
    assert desk.begin(RESUME).outcome == "new"
    assert desk.look() == [Drain(False)]
    desk.look()
    operation = desk.newest()
    assert (operation.phase, operation.effective_workers, operation.pending_workers) == ("done", 4, 4)
    assert not desk.all.is_draining


def test_an_empty_cell_is_not_called_drained_before_it_was_told(desk):
    desk.begin(DRAIN)
    assert desk.look() == [Drain(True)]
    assert desk.newest().phase == "running", "a request may have come in until now"


def test_a_drain_that_waits_can_be_undone(desk):
    desk.begin(DRAIN, id="d")
    desk.look(but(open_requests=1))
    assert desk.begin(RESUME).outcome == "new"
    drain = desk.all.get("d")
    assert (drain.phase, drain.error) == ("failed", "a resume was ordered before it was done")
    assert desk.look() == [Drain(False)]


def test_a_drain_that_takes_too_long_says_what_it_waited_for_and_stays(desk):
    desk.begin(DRAIN)
    desk.look(but(open_requests=2))
    desk.look(but(open_requests=2), after_s=TIMEOUT_S["drain"])
    assert desk.newest().phase == "failed"
    assert desk.newest().error == "not done within 3600 s: 2 requests are running or waiting"
    assert desk.all.is_draining


# -- drill ------------------------------------------------------------------------------------------------------------


def test_a_drill_kills_one_worker_by_its_seed_and_ends_when_the_cell_is_whole(desk):
    desk.begin(DRILL, seed=7)
    (strike,) = desk.look()
    victim = strike.name
    assert strike == Strike("worker", victim)
    assert victim in WHOLE.workers
    assert desk.newest().target == victim
    assert desk.look() == []
    assert (desk.newest().phase, desk.newest().detail) == ("running", f"the end of {victim}"), "whole, but it lives"
    others = [name for name in WHOLE.workers if name != victim]
    desk.look(but(workers=others, num_serving=3, phase="degraded", reason="a seat is being refilled"))
    assert (desk.newest().effective_workers, desk.newest().pending_workers) == (3, 4)
    assert desk.newest().detail == "a seat is being refilled"
    desk.look(but(workers=[*others, "w9"]))
    assert (desk.newest().phase, desk.newest().error) == ("done", "")
    again = Desk()
    again.begin(DRILL, seed=7)
    assert again.look() == [strike], "the same seed strikes the same"
    struck = set()
    for seed in range(40):
        one = Desk()
        one.begin(DRILL, seed=seed)
        struck |= {act.name for act in one.look()}
    assert struck == set(WHOLE.workers)


def test_a_drill_of_the_router_ends_with_its_successor(desk):
    desk.begin(DRILL, role="router")
    assert desk.look() == [Strike("router", "")]
    for router, phase in (("tcp://1", "running"), ("", "running"), ("tcp://2", "done")):
        desk.look(but(router=router))
        assert desk.newest().phase == phase


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        (but(phase="degraded", reason="w2 was lost"), "the cell is not whole: w2 was lost"),
        (but(workers=[]), "there is nobody to kill"),
    ],
)
def test_a_drill_does_not_strike_a_cell_that_is_hurt(desk, facts, why):
    desk.begin(DRILL)
    assert desk.look(facts) == []
    assert (desk.newest().phase, desk.newest().error) == ("failed", why)
    assert desk.begin(DRILL).outcome == "new", "it stands in nobody's way"


def test_a_drill_after_which_the_cell_does_not_come_back_fails(desk):
    desk.begin(DRILL, timeout_s=30.0)
    desk.look()
    desk.look(but(workers=[], phase="waiting", reason="no replica is whole"), after_s=31.0)
    assert desk.newest().error == "not done within 30 s: no replica is whole"


# -- the same, and another --------------------------------------------------------------------------------------------


def test_the_same_order_twice_is_one_operation(desk):
    first = desk.begin(DRAIN, id="mine")
    assert desk.begin(DRAIN, id="mine") == type(first)("same", first.operation)
    assert desk.begin(DRAIN).outcome == "same", "without an id too, while it is active"
    assert desk.look(but(open_requests=1)) == [Drain(True)]
    desk.look()
    ended = desk.begin(DRAIN, id="mine")
    assert (ended.outcome, ended.operation.phase) == ("same", "done"), "with an id, for as long as it is known"
    assert len(desk.all.all()) == 1
    assert desk.begin(DRAIN).outcome == "new", "without one, an ended order is none any more"


@pytest.mark.parametrize(
    ("active", "other"),
    [
        (DRILL, DRAIN),
        (DRILL, RESUME),
        (DRAIN, DRILL),
        (DRILL, OperationRequest("drill", seed=1)),
        (DRILL, OperationRequest("drill", id="theirs")),
        (OperationRequest("drain", id="mine"), OperationRequest("drain", id="theirs")),
    ],
)
def test_an_order_that_conflicts_names_the_one_that_is_active(desk, active, other):
    begun = desk.begin(active)
    desk.look(but(open_requests=1))
    conflict = desk.begin(other)
    assert conflict.outcome == "conflict"
    assert conflict.operation.id == begun.operation.id
    assert len(desk.all.all()) == 1
    assert desk.look(but(open_requests=1)) == []


def test_an_id_is_of_one_order_even_when_that_has_ended(desk):
    desk.begin(RESUME, id="x")
    desk.look()
    desk.look()
    conflict = desk.begin(DRAIN, id="x")
    assert (conflict.outcome, conflict.operation.kind) == ("conflict", "resume")


def test_only_so_many_are_remembered(desk):
    for _ in range(MAX_OPERATIONS + 20):
        desk.begin(RESUME)
        desk.look()
        desk.look()
    assert len(desk.all.all()) == MAX_OPERATIONS
    assert desk.all.all()[0].id == "op21"
    assert desk.look() == []


def test_what_comes_of_an_order_is_told(desk):
    desk.begin(DRILL, id="d", seed=7)
    acts = desk.all.observe(WHOLE, 101.0)
    victim = acts[0].name
    assert acts[1] == Say(f"drill d of {victim} has begun")
    assert desk.all.observe(but(workers=[]), 102.0) == [Say(f"drill d of {victim} is done")]
    desk.begin(DRILL, id="e")
    assert desk.all.observe(but(workers=[]), 103.0) == [Say("drill e has failed: there is nobody to kill")]


# -- over HTTP --------------------------------------------------------------------------------------------------------


async def order(world, **fields):
    answer = await world.client.post(PATH, json=fields)
    return answer.status_code, answer.json()


@pytest.mark.anyio
async def test_a_drained_server_finishes_what_it_has_and_takes_nothing_new(world):
    world.engine.hold_after = 1
    running = asyncio.ensure_future(world.post({"text": "Rome", "sampling_params": {"max_new_tokens": 8}}))
    await soon(world.engine.submitted.wait())
    status, operation = await order(world, kind="drain", id="d1")
    assert (status, operation["id"], operation["phase"]) == (202, "d1", "pending")
    world.engine.look()
    refused = await world.post({"text": "Norway"})
    assert (refused.status_code, refused.headers["x-llm-d-request-dropped-reason"]) == (503, "draining")
    ready = await world.client.get("/readyz")
    assert (ready.status_code, ready.json()["reason"]) == (503, "draining")
    assert (await order(world, kind="drain", id="d1"))[0] == 200
    assert (await world.client.get(f"{PATH}/d1")).json()["phase"] == "running"
    world.engine.hold_after = None
    world.engine.running.set()
    assert (await soon(running)).status_code == 200
    world.engine.look()
    assert (await world.client.get(f"{PATH}/d1")).json()["phase"] == "done"
    assert (await order(world, kind="resume"))[0] == 202
    world.engine.look()
    assert (await world.post({"text": "Norway"})).status_code == 200
    assert (await world.client.get("/readyz")).status_code == 200
    listed = msgspec.convert((await world.client.get(PATH)).json()["operations"], list[Operation])
    assert [operation.kind for operation in listed] == ["drain", "resume"]


@pytest.mark.anyio
async def test_a_conflict_is_409_and_names_the_other(world):
    await order(world, kind="drill", id="first", role="router")
    world.engine.look()
    assert world.engine.struck == [("router", "")]
    status, answer = await order(world, kind="drain")
    assert status == 409
    assert answer["error"]["message"] == "drill first is running"
    assert answer["operation"]["id"] == "first"
    status, answer = await order(world, kind="drill", id="first", role="worker")
    assert (status, answer["operation"]["role"]) == (409, "router")


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "kind"),
        ({"kind": "explode"}, "explode"),
        ({"kind": "drain", "seed": 1}, "seed: only of a drill"),
        ({"kind": "drain", "role": "worker"}, "role: only of a drill"),
        ({"kind": "drill", "role": "engine"}, "engine"),
        ({"kind": "drill", "seed": -1}, "seed: a 64-bit"),
        ({"kind": "drill", "seed": 2**70}, "seed"),
        ({"kind": "drain", "timeout_s": -1}, "timeout_s: 0 to"),
        ({"kind": "drain", "id": "a/b"}, "id: up to"),
        ({"kind": "drain", "id": "x" * 65}, "id: up to"),
        ({"kind": "drain", "id": "é"}, "id: up to"),
        ({"kind": "drain", "force": True}, "force: unknown field"),
    ],
)
async def test_an_order_that_cannot_be_meant_is_400(world, fields, words):
    status, answer = await order(world, **fields)
    assert (status, answer["error"]["code"]) == (400, 400)
    assert words in answer["error"]["message"]
    assert await world.engine.operations() == []


@pytest.mark.anyio
async def test_what_is_not_known_is_404_and_an_engine_that_is_not_there_503(tokenizer, monkeypatch):
    async with open_world(tokenizer, Limits(max_placement_wait_s=0.01, max_status_wait_s=0.01)) as world:
        assert (await world.client.get(f"{PATH}/none")).status_code == 404
        world.engine.broken = "the engine is gone"
        for answer in (
            await world.client.get(PATH),
            await world.client.get(f"{PATH}/x"),
            await world.client.post(PATH, json={"kind": "drain"}),
            await world.client.post("/abort_request", json={"rid": "x"}),
        ):
            assert (answer.status_code, answer.json()["error"]["message"]) == (503, "the engine is gone")
        monkeypatch.setattr(world.engine, "operations", asyncio.Event().wait)
        answer = await world.client.get(PATH)
        assert answer.json()["error"]["message"] == "the engine has not answered within 0.01 s"


@pytest.mark.anyio
async def test_openapi_describes_the_orders(world):
    document = (await world.client.get("/openapi.json")).json()
    paths = document["paths"]
    post = paths[PATH]["post"]
    assert {"200", "202", "400", "401", "403", "409", "413", "503"} <= set(post["responses"])
    body = post["requestBody"]["content"]["application/json"]
    assert body["schema"] == {"$ref": "#/components/schemas/OperationRequest"}
    schema = document["components"]["schemas"]["OperationRequest"]
    assert set(schema["properties"]) == set(OperationRequest.__struct_fields__)
    for example in body["examples"].values():
        msgspec.convert(example["value"], OperationRequest).completed()
    assert "404" in paths[f"{PATH}/{{name}}"]["get"]["responses"]
    assert "requestBody" in paths["/abort_request"]["post"]


# -- abort ------------------------------------------------------------------------------------------------------------


def submit(world, rid, name, tenant=""):
    """A request that runs until somebody ends it; the task raises what ends it."""

    async def read():
        request = Request(rid, [5, 6, 7], SamplingParams(max_new_tokens=400), name=name, terms=Terms(tenant=tenant))
        async for _ in world.engine.submit(request):
            pass

    return asyncio.ensure_future(read())


async def abort(world, headers=None, **fields):
    return (await world.client.post("/abort_request", json=fields, headers=headers)).status_code


async def held(world, *requests):
    """Requests that do not get on."""
    world.engine.running.clear()
    tasks = [submit(world, *request) for request in requests]
    while len(world.engine.requests) < len(tasks):
        world.engine.submitted.clear()
        await soon(world.engine.submitted.wait())
    return tasks


@pytest.mark.anyio
async def test_a_request_is_ended_by_its_name_and_its_pages_are_free(world):
    first, second = await held(world, ("r1", "mine"), ("r2", "other"))
    assert await abort(world, rid="nobody's") == 200, "as SGLang answers"
    assert await abort(world, rid="mine") == 200
    with pytest.raises(AbortedError):
        await soon(first)
    assert not second.done()
    assert await abort(world, abort_all=True) == 200
    with pytest.raises(AbortedError):
        await soon(second)
    world.engine.running.set()
    await world.post({"text": "Rome", "sampling_params": {"max_new_tokens": 2}})
    world.engine.assert_idle()


@pytest.mark.anyio
async def test_no_name_is_not_all_names(world):
    (task,) = await held(world, ("r1", "mine"))
    for fields in ({}, {"rid": ""}, {"rid": None}, {"abort_all": False}, {"rid": 5}, {"rids": ["mine"]}):
        assert await abort(world, **fields) == 400
    assert not task.done()
    await abort(world, abort_all=True)
    with pytest.raises(AbortedError):
        await soon(task)


@pytest.mark.anyio
async def test_a_tenant_ends_only_its_own(tokenizer, tmp_path):
    file = tmp_path / "keys.toml"
    alice, bob, root = (
        bearer(make_key(file, name, role)) for name, role in (("a", "user"), ("b", "user"), ("r", "admin"))
    )
    async with open_world(tokenizer, protection=Protection(file)) as world:
        hers, his, third = await held(world, ("r1", "job", "a"), ("r2", "job", "b"), ("r3", "last", "a"))
        assert await abort(world, bob, rid="last") == 200
        assert await abort(world, bob, abort_all=True) == 403
        assert await abort(world, rid="job") == 401
        assert not (hers.done() or his.done() or third.done())
        assert await abort(world, alice, rid="job") == 200
        with pytest.raises(AbortedError):
            await soon(hers)
        assert not his.done()
        assert await abort(world, root, rid="last") == 200, "an admin ends anybody's"
        with pytest.raises(AbortedError):
            await soon(third)
        assert await abort(world, root, abort_all=True) == 200
        with pytest.raises(AbortedError):
            await soon(his)
