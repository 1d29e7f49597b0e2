"""The real engine loop over the real mesh, with the test in the place of workers, keeper and ingress replicas."""

import queue
import threading
from contextlib import ExitStack

import pytest

from serve_app.engine.cell import CellCore
from serve_app.engine.core import EngineConfig, EngineCore
from serve_app.engine.members import Beat, Enroll, Formed, Hello, Join, Joined, Kill, Leave, Lost, Spawn, Stop
from serve_app.engine.membership import Membership, MembershipConfig
from serve_app.engine.plan import Cancel, Plan, StepDone, Submit
from serve_app.engine.request import Request
from serve_app.experts.layout import Layout, Seat
from serve_app.experts.placement import Slots
from serve_app.runtime import engine_loop
from serve_app.runtime.engine_loop import EngineLoop
from serve_app.runtime.mesh import Mesh
from serve_app.runtime.names import ENGINE
from serve_app.runtime.wire import Attach, From, Phase, Ping, Status, Tokens

WAIT_S = 20.0
NEVER_S = 1000.0
A, B = Seat(0, 0, 0), Seat(1, 0, 0)  # the seats of a pipeline of two


class Stand:
    """Workers, ingress replicas and keeper by name, as the engine sees them. A name that ends in a digit sits on
    the seat of that without it: "a2" succeeds "a".
    """

    def __init__(self, hung_s=NEVER_S, resume_s=NEVER_S, stages=2):
        self._stack = ExitStack()
        self.layout = Layout(stages, 1, 1)
        layers = [range(i, i + 1) for i in range(stages)]
        members = Membership(self.layout, layers, Slots(1, 0), MembershipConfig(hung_s=hung_s))
        config = EngineConfig(num_stages=stages, max_context_tokens=100, keep_s=NEVER_S)
        self.cell = CellCore(EngineCore(config), members)
        self.orders = queue.SimpleQueue()
        self.resume_s = resume_s

    def __enter__(self):
        self.engine = self._stack.enter_context(Mesh())
        self.loop = EngineLoop(self.cell, self.engine, self.orders.put, self.resume_s)
        self.thread = threading.Thread(target=self.loop.run, daemon=True)
        self.thread.start()
        self.meshes = {}
        self.calls = {}  # the last Join of each
        return self

    def __exit__(self, *exc):
        self.say(Stop())
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive()
        self._stack.close()

    def mesh(self, name):
        if name not in self.meshes:
            self.meshes[name] = self._stack.enter_context(Mesh())
        return self.meshes[name]

    def say(self, message):
        """All words to the engine go one way, so that they come in this order."""
        mesh = self.mesh("keeper")
        mesh.connect(ENGINE, self.engine.address)
        assert mesh.send(ENGINE, message)

    def enroll(self, found=()):
        self.say(Enroll([[[[0]]] for _ in range(self.layout.num_stages)], "tcp://127.0.0.1:9", list(found)))

    def hello(self, name, epoch=0):
        self.say(Hello(name, self.mesh(name).address, A if name[0] == "a" else B, 100, 0.0, 0, epoch))

    def attach(self, name):
        self.say(Attach(name, self.mesh(name).address))

    def start(self, *names):
        """The first epoch has begun."""
        self.enroll()
        for name in names:
            self.hello(name)
        for name in names:
            self.say(Joined(self.hear(name, Join).epoch, name))
        assert self.ordered(Formed).epoch == 1

    def hear(self, name, kind):
        """The next message to somebody, which must be of this kind. What is said once a second counts for nothing."""
        while (received := self.mesh(name).receive(WAIT_S)) is not None:
            message = received.message
            if self.calls.get(name) == message:  # on a slow machine who has not answered is asked again
                continue
            if isinstance(message, Join):
                self.calls[name] = message
            if isinstance(message, kind):
                return message
            assert isinstance(message, Ping | Status), message
        raise AssertionError(f"{name} heard nothing")

    def hear_status(self, wanted, name="ingress"):
        while not wanted(status := self.hear(name, Status)):
            self.attach(name)
        return status

    def ordered(self, kind):
        """The next order of this kind to the keeper."""
        while not isinstance(order := self.orders.get(timeout=WAIT_S), kind):
            pass
        return order

    def step(self, worker, token):
        """The last stage's answer to the next plan."""
        plan = self.hear(worker, Plan)
        self.say(StepDone(plan.epoch, plan.replica, plan.step, [token], [0.0]))

    def submit(self, ingress, emitted=()):
        self.say(From(ingress, Submit(Request("r", [1, 2, 3], emitted=list(emitted)))))


@pytest.fixture
def stand():
    with Stand() as ready:
        yield ready


# -- membership --------------------------------------------------------------------------------------------------------


def test_whoever_is_missing_is_ordered_and_a_whole_cell_is_recorded(stand):
    stand.enroll()
    assert [stand.ordered(Spawn).seat for _ in (A, B)] == [A, B]
    stand.hello("a")
    stand.hello("b")
    members = {member.name: member.address for member in stand.hear("a", Join).members}
    assert members == {name: stand.mesh(name).address for name in ("a", "b")}
    for name in ("a", "b"):
        stand.say(Joined(1, name))
    assert stand.ordered(Formed).seats == [("a", *A), ("b", *B)]
    stand.attach("ingress")
    assert stand.hear_status(lambda status: status.ready).epoch == 1


def test_a_worker_lost_between_joining_and_the_epoch_s_begin_is_replaced(stand):
    stand.enroll()
    stand.hello("a")
    stand.hello("b")
    assert stand.hear("a", Join).epoch == stand.hear("b", Join).epoch == 1
    stand.say(Joined(1, "a"))
    stand.say(Lost("a", "the test says so", A))
    stand.say(Joined(1, "b"))
    assert stand.hear("b", Leave).epoch == 1
    assert [stand.ordered(Spawn).seat for _ in range(3)] == [A, B, A]
    stand.hello("a2")
    assert {member.name for member in stand.hear("b", Join).members} == {"a2", "b"}
    stand.say(Joined(2, "a2"))
    stand.say(Joined(2, "b"))
    assert stand.ordered(Formed).epoch == 2, "the first epoch never began"
    stand.attach("ingress")
    assert stand.hear_status(lambda status: status.ready).epoch == 2


def test_a_late_or_repeated_hello_calls_nobody_twice(stand):
    stand.enroll()
    stand.hello("a")
    stand.hello("b")
    stand.hear("a", Join)
    stand.hear("b", Join)
    stand.hello("a")
    stand.hello("a2")  # another for the same seat
    assert stand.hear("a2", Stop)
    assert stand.ordered(Kill).name == "a2"
    stand.say(Joined(1, "a"))
    stand.say(Joined(1, "b"))
    stand.hello("b")
    stand.submit("ingress")
    assert stand.hear("a", Plan).epoch == stand.hear("b", Plan).epoch == 1


def test_an_ingress_hears_why_the_cell_is_not_ready(stand):
    stand.attach("ingress")
    stand.enroll()
    stand.hello("a")
    assert not stand.hear_status(lambda status: "1 of 2 workers have loaded" in status.reason).ready
    stand.say(Phase("the cluster lacks 1 CPU"))
    assert not stand.hear_status(lambda status: "lacks 1 CPU" in status.reason).ready
    stand.hello("b")
    for name in ("a", "b"):
        stand.say(Joined(stand.hear(name, Join).epoch, name))
    assert stand.hear_status(lambda status: status.ready).reason == ""
    stand.say(Lost("b", "the test says so", B))
    status = stand.hear_status(lambda status: not status.ready)
    assert status.reason == "worker b was lost: the test says so; no replica is whole before seat 1.0.0 is filled"
    assert status.cell.phase == "waiting"
    assert [event.kind for event in stand.loop.history] == ["epoch", "lost"]


def test_a_silent_worker_is_killed_and_told_to_stop_when_it_comes_back():
    with Stand(hung_s=0.5, stages=1) as stand:
        stand.enroll()
        stand.hello("a")
        stand.hear("a", Join)
        assert stand.ordered(Kill).name == "a"
        assert stand.ordered(Spawn).seat == A
        stand.hear("a", Stop)
        stand.say(Joined(1, "a"))
        stand.say(Beat("a", 0.0))
        stand.hear("a", Stop)
        assert stand.loop.epoch == 0, "it committed nothing"


def test_a_fresh_engine_adopts_the_workers_that_are_left_in_an_epoch_behind_theirs(stand):
    stand.enroll(found=[A, B])
    stand.hello("a", epoch=7)
    stand.hello("b", epoch=6)
    epoch = stand.hear("a", Join).epoch
    assert epoch > 7
    assert stand.hear("b", Join).epoch == epoch
    for name in ("a", "b"):
        stand.say(Joined(epoch, name))
    assert stand.orders.get(timeout=WAIT_S).epoch == epoch, "nobody is spawned before: all are there"
    stand.submit("ingress")
    assert stand.hear("a", Plan).epoch == epoch


# -- requests ----------------------------------------------------------------------------------------------------------


def fall_silent(stand, name, monkeypatch):
    """An ingress replica gives no sign of life, while another one does, until the engine holds it for dead."""
    monkeypatch.setattr(engine_loop, "INGRESS_SILENT_S", 1.0)
    monkeypatch.setattr(engine_loop, "STATUS_S", 0.1)
    stand.attach("other")
    stand.hear_status(lambda _: name not in [view.name for view in stand.loop.processes()], "other")
    monkeypatch.undo()


def test_the_requests_of_an_ingress_that_falls_silent_wait_for_another(stand, monkeypatch):
    stand.start("a", "b")
    stand.attach("first")
    stand.submit("first")
    stand.step("a", token=50)
    assert stand.hear("first", Tokens).emissions[0].tokens == [50]
    fall_silent(stand, "first", monkeypatch)
    for token in (51, 52):
        stand.step("a", token)
    stand.submit("other", emitted=[50])
    emissions = stand.hear("other", Tokens).emissions
    assert [(e.rid, e.first, e.tokens) for e in emissions] == [("r", 1, [51, 52])]
    stand.step("a", token=53)
    assert stand.hear("other", Tokens).emissions[0].tokens == [53]
    assert stand.cell.core.stats().replayed_total == 0


def test_nobody_s_requests_are_ended_after_a_while(monkeypatch):
    with Stand(resume_s=0.2) as stand:
        stand.start("a", "b")
        stand.attach("first")
        stand.submit("first")
        stand.hear("a", Plan)
        fall_silent(stand, "first", monkeypatch)
        ended = stand.hear_status(lambda status: status.stats.finished_total, "other")
        assert ended.stats.finished_total == {"abort": 1}


def test_a_cancellation_counts_only_from_whoever_asked_last(stand):
    stand.start("a", "b")
    for name in ("first", "second"):
        stand.attach(name)
        stand.submit(name)
    stand.say(From("first", Cancel("r")))
    stand.step("a", token=50)
    (emission,) = stand.hear("second", Tokens).emissions
    assert (emission.tokens, emission.finish) == ([50], None)
    stand.say(From("second", Cancel("r")))
    (emission,) = stand.hear("second", Tokens).emissions
    assert emission.finish == "abort"
