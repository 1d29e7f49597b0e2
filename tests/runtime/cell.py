"""A whole cell in one process: the real engine loop, workers and router, each in a thread, over the real mesh."""

import gc
import queue
import threading
import uuid
from contextlib import ExitStack

from serve_app.engine.members import Enroll, Formed, Kill, Lost, Spawn, Stop
from serve_app.engine.plan import Cancel, Submit
from serve_app.experts.layout import Seat
from serve_app.runtime.engine_loop import EngineLoop, cell_core
from serve_app.runtime.load import load
from serve_app.runtime.mesh import Mesh
from serve_app.runtime.names import ENGINE, ROUTER
from serve_app.runtime.router import Registry
from serve_app.runtime.settings import layout_of, slots_of
from serve_app.runtime.wire import Attach, From, Status, Tokens
from serve_app.runtime.worker import Worker

WAIT_S = 60.0


class ThreadedCell:
    """Use as a context. `self.mesh` is an ingress replica's place in the mesh."""

    def __init__(self, weights, config, registry=None, worker=Worker):
        self._worker = worker
        self.config, self.weights = config, weights
        spec = weights.spec
        self.layout, self.stages = layout_of(config, spec)
        self.registry = registry or Registry(self.layout, self.stages, spec.num_experts, slots_of(config, spec))
        self.cell = cell_core(config, spec)
        self.core = self.cell.core
        self.names = {}
        self.orders = queue.SimpleQueue()
        self.held = threading.Event()  # while it is cleared nobody is started
        self.held.set()
        self.killed = []
        self.workers = {}
        self.runs = {}  # name -> the thread of a worker
        self.threads = []
        self._stack = ExitStack()

    def __enter__(self):
        self.engine_mesh = self._stack.enter_context(Mesh())
        self.router_mesh = self._stack.enter_context(Mesh())
        self.mesh = self._stack.enter_context(Mesh())
        self.mesh.connect(ENGINE, self.engine_mesh.address)
        self.loop = EngineLoop(self.cell, self.engine_mesh, self.orders.put)
        self._start(self.loop.run)
        self._keeper = self._start(self._keep)
        self.mesh.connect(ROUTER, self.router_mesh.address)
        self.mesh.send(ENGINE, Enroll(self.registry.tables(), self.router_mesh.address))
        self.beat()
        return self

    def _keep(self):
        """Does what the engine orders."""
        while (order := self.orders.get()) is not None:
            match order:
                case Spawn(seat, pairs, in_haste):
                    self.held.wait(WAIT_S)
                    self.spawn(seat, pairs, in_haste)
                case Formed():
                    self.registry.record(order)
                    self.names.update({Seat(*seat): name for name, *seat in order.seats})  # a spare may have taken one
                case Kill(name):
                    self.killed.append(name)

    def __exit__(self, *exc):
        self.held.set()
        self.orders.put(None)
        self._keeper.join(WAIT_S)  # whoever it starts after the others were told to stop would wait for ever
        self.mesh.send(ENGINE, Stop())
        for name in self.workers:
            self.mesh.send(name, Stop())
        for thread in self.threads:
            thread.join(WAIT_S)
            assert not thread.is_alive()
        self._stack.close()
        self.workers.clear()
        gc.collect()  # a worker and its dispatcher know each other, and between them they hold a model

    def spawn(self, seat, pairs, in_haste=False):
        """Start a worker, or, without a seat, a spare."""
        name = f"{'spare' if seat is None else 'w' + '.'.join(map(str, seat))}-{uuid.uuid4().hex[:4]}"
        mesh = self._stack.enter_context(Mesh())
        mesh.connect(ENGINE, self.engine_mesh.address)
        self.mesh.connect(name, mesh.address)
        self.names[seat] = name

        def load_seat(seat, pairs):
            stage = self.stages[seat.stage]
            return load(self.weights, self.config, stage, seat.shard, pairs, pack=not in_haste)

        self.workers[name] = self._worker(name, load_seat, mesh, seat, pairs)
        self.runs[name] = self._start(self.workers[name].run)

    def lose(self, seat):
        """The worker of a seat leaves without a word; the watcher notices."""
        name = self.names.pop(seat)
        self.mesh.send(name, Stop())
        self.mesh.send(ENGINE, Lost(name, "the test ended it", seat))

    def beat(self):
        """A sign of life, as an ingress replica gives one a second."""
        self.mesh.send(ENGINE, Attach("test", self.mesh.address))

    def submit(self, request):
        self.mesh.send(ENGINE, From("test", Submit(request)))

    def cancel(self, rid):
        self.mesh.send(ENGINE, From("test", Cancel(rid)))

    def messages(self):
        """What the engine tells this ingress, for ever."""
        while True:
            self.beat()
            received = self.mesh.receive(WAIT_S)
            assert received is not None, "the engine fell silent"
            yield received.message

    def emissions(self):
        for message in self.messages():
            if isinstance(message, Tokens):
                yield from message.emissions

    def collect(self, num_finished, meanwhile=None):
        """Tokens and finish reasons by rid, once so many requests have finished.

        `meanwhile`: called with the number of emissions so far, before each.
        """
        tokens, finishes = {}, {}
        for num, emission in enumerate(self.emissions()):
            if meanwhile is not None:
                meanwhile(num)
            have = tokens.setdefault(emission.rid, [])
            assert emission.first == len(have), "tokens were doubled or lost"
            have.extend(emission.tokens)
            if emission.finish:
                finishes[emission.rid] = emission.finish
                if len(finishes) == num_finished:
                    return tokens, finishes
        raise AssertionError

    def status(self, wanted):
        """The engine's next word about itself that is as `wanted`."""
        for message in self.messages():
            if isinstance(message, Status) and wanted(message):
                return message
        raise AssertionError

    def idle_stats(self):
        """The engine's next word about itself that shows nothing running."""
        return self.status(lambda status: not (status.stats.running or status.stats.waiting)).stats

    def _start(self, run):
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        self.threads.append(thread)
        return thread


def collect_local(engine, requests):
    tokens, finishes = {}, {}
    for emission in engine.generate(requests):
        tokens.setdefault(emission.rid, []).extend(emission.tokens)
        if emission.finish:
            finishes[emission.rid] = emission.finish
    return tokens, finishes
