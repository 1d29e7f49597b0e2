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
from serve_app.runtime.engine_loop import EngineLoop
from serve_app.runtime.names import ENGINE
from serve_app.runtime.router import Pair
from serve_app.runtime.settings import layout_of
from serve_app.runtime.wire import Form, Lost, Phase

log = logging.getLogger(__name__)

WATCH_S = 1.0  # how often the watcher looks whether it is to stop; a death wakes it at once
ANSWER_S = 30.0  # that the router may take for an answer
RESPAWN_S = (0.0, 1.0, 5.0, 30.0)  # pauses before the first, second, ... respawn of one seat in a row; then it is over


@dataclass
class _Worker:
    name: str
    seat: Seat
    actor: Any
    run: "ray.ObjectRef[None]"  # ends when the worker does, with the reason


class Cell:
    """Router and workers of one model instance. `run` keeps them alive; it lives in a thread of its own."""

    def __init__(
        self, config: OctavoConfig, spec: ModelSpec, network: Network, engine_address: str, loop: EngineLoop
    ) -> None:
        self._config = config
        self._spec = spec
        self._network = network
        self._loop = loop
        self._layout, self._stages = layout_of(config, spec)
        self._router: Any = None
        self._engine_address = engine_address
        self._mesh = network.mesh()  # only to speak
        self._mesh.connect(ENGINE, engine_address)
        self._workers: dict[Seat, _Worker] = {}
        self._num_deaths: dict[Seat, int] = {}  # in a row, without an epoch between them
        self._num_spawned = 0
        self._epoch = 0
        self._stopping = threading.Event()

    def run(self) -> None:
        """Form the cell, and form it anew whenever one of its workers has died, until `stop`."""
        try:
            while not self._stopping.is_set():
                self._form()
                self._watch()
        except OctavoError as error:
            self._give_up(cause_of(error))
        except Exception as error:
            if not self._stopping.is_set():
                log.exception("the cell's keeper failed")
                self._give_up(f"the cell could not be kept: {cause_of(error)}")

    def stop(self) -> None:
        """End the workers and the router. They do not outlive their engine yet."""
        self._stopping.set()
        for worker in list(self._workers.values()):
            ray.kill(worker.actor)
        if self._router is not None:
            ray.kill(self._router)

    def _form(self) -> None:
        """Fill the empty seats, and call all seats into a new epoch."""
        address, tables, pairs = self._ask_router()
        for seat in self._layout.seats():
            if seat not in self._workers and not self._stopping.is_set():
                self._workers[seat] = self._spawn(seat, pairs[seat])
        self._epoch += 1
        seats = [(worker.name, seat.stage, seat.replica) for seat, worker in self._workers.items()]
        form = Form(self._epoch, seats, address, tables)
        self._router.record.remote(form)
        self._mesh.send(ENGINE, form)

    def _ask_router(self) -> tuple[str, list[list[list[int]]], dict[Seat, list[Pair]]]:
        """Its address, the tables of all stages, and what each seat is to hold. A router that died is replaced."""
        for attempt in (1, 2):
            try:
                if self._router is None:
                    router: Any = ray.remote(RouterActor).options(num_cpus=0)
                    self._router = router.remote(self._layout, self._stages, self._spec.num_experts, self._network)
                return ray.get(
                    [self._router.address.remote(), self._router.tables.remote(), self._router.pairs.remote()],
                    timeout=ANSWER_S if attempt == 1 and self._epoch else self._config.worker.ready_timeout_s,
                )  # type: ignore[return-value]
            except ray.exceptions.RayError as error:
                log.warning("the router did not answer: %s", cause_of(error))
                self._router = None
        raise OctavoError(f"no router could be started within {self._config.worker.ready_timeout_s:.0f} s")

    def _spawn(self, seat: Seat, pairs: list[Pair]) -> _Worker:
        self._stopping.wait(RESPAWN_S[min(self._num_deaths.get(seat, 0), len(RESPAWN_S) - 1)])
        self._num_spawned += 1
        name = f"w{seat.stage}.{seat.replica}#{self._num_spawned}"
        wants = self._config.worker
        worker: Any = ray.remote(WorkerActor).options(num_cpus=wants.num_cpus, num_gpus=wants.num_gpus)
        actor = worker.remote()
        layers = self._stages[seat.stage]
        run = actor.run.remote(name, self._config, layers, pairs, self._network, self._engine_address)
        return _Worker(name, seat, actor, run)

    def _watch(self) -> None:
        """Wait for a death, and empty the seats of the dead. What takes too long to begin is ended first."""
        by_run = {worker.run: worker for worker in self._workers.values()}
        due_s = time.monotonic() + self._config.worker.ready_timeout_s
        while not self._stopping.is_set():
            ended, _ = ray.wait(list(by_run), num_returns=1, timeout=WATCH_S)
            if ended:
                self._bury([by_run[run] for run in ended])
                return
            if self._loop.epoch == self._epoch:
                self._num_deaths.clear()
            elif time.monotonic() > due_s:
                raise OctavoError(
                    f"the workers were not ready within {self._config.worker.ready_timeout_s:.0f} s"
                    f" (`worker.ready_timeout_s`): {self._loop.reason}"
                )

    def _bury(self, dead: list[_Worker]) -> None:
        for worker in dead:
            why = self._last_words(worker)
            log.warning("worker %s was lost: %s", worker.name, why)
            self._mesh.send(ENGINE, Lost(worker.name, why))
            del self._workers[worker.seat]
            self._num_deaths[worker.seat] = self._num_deaths.get(worker.seat, 0) + 1
            if self._num_deaths[worker.seat] > len(RESPAWN_S):
                raise OctavoError(f"a worker died {self._num_deaths[worker.seat]} times before it was ready: {why}")

    def _last_words(self, worker: _Worker) -> str:
        """Why a worker's call ended. An OctavoError goes up: a respawn would only meet it again."""
        try:
            ray.get(worker.run, timeout=ANSWER_S)
        except OctavoError:
            raise
        except ray.exceptions.RayError as error:
            return cause_of(error)
        return "it left"

    def _give_up(self, reason: str) -> None:
        log.error("%s", reason)
        self._mesh.send(ENGINE, Phase(reason))
        if not self._stopping.is_set():
            end_serve_run(reason)


def cause_of(error: BaseException) -> str:
    """One line: what a task's error was, without Ray's own account of where it passed."""
    if isinstance(error, ray.exceptions.RayTaskError) and error.cause is not None:
        error = error.cause
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
