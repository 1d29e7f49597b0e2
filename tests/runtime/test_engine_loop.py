"""Membership: the real engine loop over the real mesh, with the test in the place of the workers."""

import threading
from contextlib import ExitStack

import pytest

from serve_app.engine.core import EngineConfig, EngineCore
from serve_app.engine.plan import Plan, Submit
from serve_app.engine.request import Request
from serve_app.runtime.engine_loop import EngineLoop
from serve_app.runtime.mesh import Mesh
from serve_app.runtime.names import ENGINE
from serve_app.runtime.wire import Attach, Form, From, Hello, Join, Joined, Leave, Lost, Status, Stop

WAIT_S = 20.0


class Stand:
    """Workers by name, as the engine sees them."""

    def __init__(self):
        self._stack = ExitStack()

    def __enter__(self):
        self.engine = self._stack.enter_context(Mesh())
        self.core = EngineCore(EngineConfig(num_stages=2, max_context_tokens=100))
        self.thread = threading.Thread(target=EngineLoop(self.core, self.engine).run, daemon=True)
        self.thread.start()
        self.meshes = {}
        return self

    def __exit__(self, *exc):
        self.say("anyone", Stop())
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive()
        self._stack.close()

    def mesh(self, name):
        if name not in self.meshes:
            self.meshes[name] = self._stack.enter_context(Mesh())
            self.meshes[name].connect(ENGINE, self.engine.address)
        return self.meshes[name]

    def say(self, name, message):
        assert self.mesh(name).send(ENGINE, message)

    def hello(self, name):
        self.say(name, Hello(name, self.mesh(name).address, 100, 0.0, 0))

    def form(self, epoch, *names):
        seats = [(name, stage, 0, 0) for stage, name in enumerate(names)]
        self.say("keeper", Form(epoch, seats, "tcp://127.0.0.1:9", [[[[0]]] for _ in names]))

    def hear(self, name, kind):
        """The next message to a worker, which must be of this kind."""
        received = self.mesh(name).receive(WAIT_S)
        assert received is not None, f"{name} heard nothing"
        assert isinstance(received.message, kind), received.message
        return received.message

    def hear_status(self, wanted):
        while not wanted(status := self.hear("ingress", Status)):
            pass
        return status


@pytest.fixture
def stand():
    with Stand() as ready:
        yield ready


def test_a_worker_lost_between_joining_and_the_epoch_s_begin_is_replaced(stand):
    stand.hello("a")
    stand.hello("b")
    stand.form(1, "a", "b")
    assert stand.hear("a", Join).epoch == 1
    assert stand.hear("b", Join).epoch == 1
    stand.say("keeper", Joined(1, "a"))
    stand.say("keeper", Lost("a", "the test says so"))
    stand.say("keeper", Joined(1, "b"))
    assert stand.hear("b", Leave).epoch == 1
    stand.hello("a2")
    stand.form(2, "a2", "b")
    members = {member.name for member in stand.hear("b", Join).members}
    assert members == {"a2", "b"}
    stand.say("keeper", Joined(2, "a2"))
    stand.say("keeper", Joined(2, "b"))
    stand.say("ingress", Attach("ingress", stand.mesh("ingress").address))
    assert stand.hear_status(lambda status: status.ready).epoch == 2


def test_a_late_hello_does_not_call_anyone_twice(stand):
    stand.hello("a")
    stand.hello("b")
    stand.form(1, "a", "b")
    stand.hear("a", Join)
    stand.hear("b", Join)
    stand.hello("stranger")
    stand.say("a", Joined(1, "a"))
    stand.say("b", Joined(1, "b"))
    stand.say("ingress", Attach("ingress", stand.mesh("ingress").address))
    stand.hear_status(lambda status: status.ready)
    stand.say("ingress", From("ingress", Submit(Request("r", [1, 2, 3]))))
    assert stand.hear("a", Plan).epoch == stand.hear("b", Plan).epoch == 1


def test_an_ingress_hears_why_the_cell_is_not_ready(stand):
    stand.say("ingress", Attach("ingress", stand.mesh("ingress").address))
    stand.hello("a")
    stand.form(1, "a", "b")
    assert not stand.hear_status(lambda status: "1 of 2 workers" in status.reason).ready
