"""Operations, ordered from another thread, carried out by the real engine loop."""

import time

import pytest

from serve_app.engine.members import Enroll, Join, Joined, Kill, Lost, Spawn
from serve_app.engine.plan import Plan, Submit
from serve_app.engine.request import Request
from serve_app.runtime.names import ROUTER
from serve_app.runtime.operations import OperationRequest
from serve_app.runtime.wire import From, Refused, Tokens
from tests.runtime.test_engine_loop import WAIT_S, A, B, Stand


@pytest.fixture
def stand():
    with Stand() as ready:
        ready.start("a", "b")
        ready.attach("ingress")
        yield ready


def order(stand, kind, **fields):
    begun = stand.loop.operator.begin(OperationRequest(kind, **fields))
    assert begun.outcome == "new"
    return begun.operation.id


def reached(stand, name, phase):
    """The operation, as soon as it is there."""
    until_s = time.monotonic() + WAIT_S
    while time.monotonic() < until_s:
        (operation,) = [known for known in stand.loop.operator.all() if known.id == name]
        if operation.phase == phase:
            return operation
        stand.attach("ingress")
        time.sleep(0.01)
    raise AssertionError(operation)


def submit(stand, rid):
    stand.say(From("ingress", Submit(Request(rid, [1, 2, 3]))))


def test_a_drained_cell_refuses_what_is_new_and_goes_on_with_what_it_has(stand):
    submit(stand, "old")
    plan = stand.hear("a", Plan)
    name = order(stand, "drain")
    assert reached(stand, name, "running").effective_workers == 2
    status = stand.hear_status(lambda status: not status.ready)
    assert status.reason == "draining: new requests are refused until the cell is resumed"
    submit(stand, "new")
    refusal = stand.hear("ingress", Refused).refusal
    assert (refusal.rid, refusal.reason) == ("new", "draining")
    assert refusal.retry_after_s > 0
    assert plan.epoch == 1
    stand.say(From("ingress", Submit(Request("old", [1, 2, 3], emitted=[]))))  # who is in stays in
    stand.loop.operator.begin(OperationRequest("drain"))
    assert reached(stand, name, "running").detail == "1 requests are running or waiting"


def test_an_empty_cell_is_drained_at_once_and_resumed(stand):
    drained = reached(stand, order(stand, "drain"), "done")
    assert (drained.effective_workers, drained.pending_workers) == (0, 0)
    stand.hear_status(lambda status: not status.ready)
    resumed = reached(stand, order(stand, "resume"), "done")
    assert (resumed.effective_workers, resumed.pending_workers) == (2, 2)
    stand.hear_status(lambda status: status.ready)
    submit(stand, "r")
    stand.step("a", token=50)
    assert stand.hear("ingress", Tokens).emissions[0].tokens == [50]
    told = [event.text for event in stand.loop.history if event.kind == "operation"]
    assert [text.split()[0] for text in told] == ["drain", "drain", "resume", "resume"]


def test_a_drill_of_a_worker_ends_when_the_cell_is_whole_again(stand):
    name = order(stand, "drill", seed=3)
    victim = stand.ordered(Kill).name
    running = reached(stand, name, "running")
    assert running.target == victim
    other, seat = ("b", A) if victim == "a" else ("a", B)
    stand.say(Lost(victim, "its process ended", seat))
    assert stand.ordered(Spawn).seat == seat
    stand.hello(f"{victim}2")
    for worker in (other, f"{victim}2"):
        join = stand.hear(worker, Join) if worker != other else _last_join(stand, worker)
        stand.say(Joined(join.epoch, worker))
    done = reached(stand, name, "done")
    assert (done.error, done.effective_workers) == ("", 2)


def _last_join(stand, worker):
    """Of one who was told to leave an epoch first."""
    while True:
        message = stand.mesh(worker).receive(WAIT_S).message
        if isinstance(message, Join) and message.epoch > 1:
            return message


def test_a_drill_of_the_router_ends_when_another_is_there(stand):
    name = order(stand, "drill", role="router")
    assert stand.ordered(Kill).name == ROUTER
    assert reached(stand, name, "running").target == "tcp://127.0.0.1:9"
    stand.say(Enroll([[[[0]]] for _ in range(2)], "tcp://127.0.0.1:8", []))
    assert reached(stand, name, "done").error == ""
