"""The cell's keeper: starts the router and the workers, watches them, and fills the seats of those that die.

It tells the engine loop what it knows by messages, like everybody else: which seats make the next epoch, who was lost.
"""

import logging
import threading
import time
from dataclasses import dataclass
from typing import Any

import ray

from serve_app.cluster.driver import end_serve_run
from serve_app.cluster.node import Network
from serve_app.cluster.router import RouterActor
from serve_app.cluster.worker import WorkerActor
from serve_app.config import OctavoConfig
from serve_app.errors import OctavoError
from serve_app.experts.layout import Seat
from serve_app.model.spec import ModelSpec
from serve_app.runtime.names import ENGINE, ROUTER
from serve_app.runtime.settings import layout_of
from serve_app.runtime.wire import Form, Lost, Phase

log = logging.getLogger(__name__)

WATCH_S = 1.0  # how often the watcher looks whether it is to stop; a death wakes it at once
RESPAWN_S = (0.0, 1.0, 5.0, 30.0)  # pauses before the first, second, ... respawn of one seat in a row
STEADY_S = 60.0  # a worker that lived this long has its seat's pauses forgiven


@dataclass
class _Worker:
    name: str
    seat: Seat
    actor: Any
    run: "ray.ObjectRef[None]"  # ends when the worker does, with the reason
    begun_s: float


class Cell:
    """Router and workers of one model instance. `run` keeps them alive; it lives in a thread of its own."""

    def __init__(self, config: OctavoConfig, spec: ModelSpec, network: Network, engine_address: str) -> None:
        self._config = config
        self._network = network
        self._layout, self._stages = layout_of(config, spec)
        router: Any = ray.remote(RouterActor).options(num_cpus=0)
        self._router = router.remote(self._layout, self._stages, spec.num_experts, network)
        self._addresses = {ENGINE: engine_address}
        self._mesh = network.mesh()  # only to speak
        self._mesh.connect(ENGINE, engine_address)
        self._workers: dict[Seat, _Worker] = {}
        self._num_deaths: dict[Seat, int] = {}
        self._num_spawned = 0
        self._epoch = 0
        self._stopping = threading.Event()

    def run(self) -> None:
        """Form the cell, and form it anew whenever one of its workers has died, until `stop`."""
        try:
            self._addresses[ROUTER] = ray.get(
                self._router.address.remote(), timeout=self._config.worker.ready_timeout_s
            )
            while not self._stopping.is_set():
                self._form()
                self._watch()
        except OctavoError as error:
            self._give_up(str(error))
        except Exception as error:
            log.exception("the cell's keeper failed")
            self._give_up(f"the cell could not be kept: {error}")

    def stop(self) -> None:
        """End the workers and the router. They do not outlive their engine yet."""
        self._stopping.set()
        for worker in self._workers.values():
            ray.kill(worker.actor)
        ray.kill(self._router)

    def snapshot(self) -> Any:
        """The router's view: epoch, members, load. A reference to be awaited."""
        return self._router.snapshot.remote()

    def _form(self) -> None:
        """Fill the empty seats, and call all seats into a new epoch."""
        for seat in self._layout.seats():
            if seat not in self._workers:
                self._workers[seat] = self._spawn(seat)
        self._epoch += 1
        tables = ray.get(self._router.tables.remote())
        seats = [(worker.name, seat.stage, seat.replica) for seat, worker in self._workers.items()]
        form = Form(self._epoch, seats, tables)
        ray.get(self._router.record.remote(form))
        self._mesh.send(ENGINE, form)

    def _spawn(self, seat: Seat) -> _Worker:
        self._stopping.wait(RESPAWN_S[min(self._num_deaths.get(seat, 0), len(RESPAWN_S) - 1)])
        self._num_spawned += 1
        name = f"w{seat.stage}.{seat.replica}#{self._num_spawned}"
        wants = self._config.worker
        worker: Any = ray.remote(WorkerActor).options(num_cpus=wants.num_cpus, num_gpus=wants.num_gpus)
        actor = worker.remote()
        pairs = ray.get(self._router.pairs.remote(seat.stage, self._layout.group_rank(seat)))
        layers = self._stages[seat.stage]
        run = actor.run.remote(name, self._config, layers, pairs, self._network, self._addresses)
        return _Worker(name, seat, actor, run, time.monotonic())

    def _watch(self) -> None:
        """Wait for a death, and empty the seats of the dead."""
        by_run = {worker.run: worker for worker in self._workers.values()}
        while not self._stopping.is_set():
            ended, _ = ray.wait(list(by_run), num_returns=1, timeout=WATCH_S)
            if ended:
                self._bury([by_run[run] for run in ended])
                return

    def _bury(self, dead: list[_Worker]) -> None:
        for worker in dead:
            why = self._cause(worker)
            log.warning("worker %s was lost: %s", worker.name, why)
            self._mesh.send(ENGINE, Lost(worker.name, why))
            lived_s = time.monotonic() - worker.begun_s
            self._num_deaths[worker.seat] = 0 if lived_s > STEADY_S else self._num_deaths.get(worker.seat, 0) + 1
            del self._workers[worker.seat]

    def _cause(self, worker: _Worker) -> str:
        """Why a worker's call ended. An OctavoError goes up: a respawn would only meet it again."""
        try:
            ray.get(worker.run)
        except OctavoError:
            raise
        except ray.exceptions.RayError as error:
            return str(error).strip().splitlines()[0]
        return "it left"

    def _give_up(self, reason: str) -> None:
        log.error("%s", reason)
        self._mesh.send(ENGINE, Phase(reason))
        if not self._stopping.is_set():
            end_serve_run(reason)
