"""A whole cell in one process: the real engine loop, workers and router, each in a thread, over the real mesh."""

import gc
import threading
import uuid
from contextlib import ExitStack

from serve_app.engine.core import EngineCore
from serve_app.engine.plan import Cancel, Submit
from serve_app.runtime.engine_loop import EngineLoop
from serve_app.runtime.load import load
from serve_app.runtime.mesh import Mesh
from serve_app.runtime.names import ENGINE
from serve_app.runtime.router import Registry
from serve_app.runtime.settings import engine_config, layout_of, slots_of
from serve_app.runtime.wire import Attach, Form, From, Lost, Status, Stop, Tokens
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
        self.core = EngineCore(engine_config(config, spec, config.layout.pp))
        self.epoch = 0
        self.names = {}
        self.workers = {}
        self.threads = []
        self._stack = ExitStack()

    def __enter__(self):
        self.engine_mesh = self._stack.enter_context(Mesh())
        self.router_mesh = self._stack.enter_context(Mesh())
        self.mesh = self._stack.enter_context(Mesh())
        self.mesh.connect(ENGINE, self.engine_mesh.address)
        self._start(EngineLoop(self.core, self.engine_mesh).run)
        for seat in self.layout.seats():
            self.spawn(seat)
        self.form()
        self.beat()
        return self

    def __exit__(self, *exc):
        self.mesh.send(ENGINE, Stop())
        for name in self.workers:
            self.mesh.send(name, Stop())
        for thread in self.threads:
            thread.join(WAIT_S)
            assert not thread.is_alive()
        self._stack.close()
        self.workers.clear()
        gc.collect()  # a worker and its dispatcher know each other, and between them they hold a model

    def spawn(self, seat):
        name = f"w{seat.stage}.{seat.replica}.{seat.shard}-{uuid.uuid4().hex[:4]}"
        pairs = self.registry.pairs()[seat]
        loaded = load(self.weights, self.config, self.stages[seat.stage], seat.shard, pairs)
        mesh = self._stack.enter_context(Mesh())
        mesh.connect(ENGINE, self.engine_mesh.address)
        self.mesh.connect(name, mesh.address)
        self.names[seat] = name
        self.workers[name] = self._worker(name, loaded, mesh)
        self._start(self.workers[name].run)

    def lose(self, seat):
        """The worker of a seat leaves without a word; the watcher notices."""
        self.mesh.send(self.names[seat], Stop())
        self.mesh.send(ENGINE, Lost(self.names[seat], "the test ended it"))

    def form(self):
        self.epoch += 1
        seats = [(name, *seat) for seat, name in self.names.items()]
        form = Form(self.epoch, seats, self.router_mesh.address, self.registry.tables())
        self.registry.record(form)
        self.mesh.send(ENGINE, form)

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

    def collect(self, num_finished):
        """Tokens and finish reasons by rid, once so many requests have finished."""
        tokens, finishes = {}, {}
        for emission in self.emissions():
            have = tokens.setdefault(emission.rid, [])
            assert emission.first == len(have), "tokens were doubled or lost"
            have.extend(emission.tokens)
            if emission.finish:
                finishes[emission.rid] = emission.finish
                if len(finishes) == num_finished:
                    return tokens, finishes
        raise AssertionError

    def idle_stats(self):
        """The engine's next word about itself that shows nothing running."""
        for message in self.messages():
            if isinstance(message, Status) and not (message.stats.running or message.stats.waiting):
                return message.stats
        raise AssertionError

    def _start(self, run):
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        self.threads.append(thread)


def collect_local(engine, requests):
    tokens, finishes = {}, {}
    for emission in engine.generate(requests):
        tokens.setdefault(emission.rid, []).extend(emission.tokens)
        if emission.finish:
            finishes[emission.rid] = emission.finish
    return tokens, finishes
