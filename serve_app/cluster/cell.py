"""The cell's keeper: reserves resources, starts the router and the workers, and fills the seats of those that die.

It tells the engine loop what it knows by messages, like everybody else: which seats make the next epoch, who was lost,
and what is missing as long as the cluster has no place for all workers.
"""

import logging
import threading
import time
from dataclasses import dataclass
from typing import Any

import ray

from serve_app.cluster.driver import end_serve_run
from serve_app.cluster.groups import Groups, Places
from serve_app.cluster.node import Network
from serve_app.cluster.router import RouterActor
from serve_app.cluster.worker import WorkerActor
from serve_app.config import OctavoConfig
from serve_app.errors import OctavoError
from serve_app.experts.layout import Seat
from serve_app.experts.placement import Pair
from serve_app.model.spec import ModelSpec
from serve_app.runtime.engine_loop import EngineLoop
from serve_app.runtime.names import ENGINE
from serve_app.runtime.settings import layout_of, slots_of
from serve_app.runtime.wire import Form, Lost, Phase, StageTable

log = logging.getLogger(__name__)

WATCH_S = 1.0  # how often the keeper looks around while all is well; a death wakes it at once
FORM_S = 0.25  # and while seats are empty
ANSWER_S = 30.0  # that the router may take for an answer
RESPAWN_S = (0.0, 1.0, 5.0, 30.0)  # pauses before the first, second, ... respawn of one seat in a row; then it is over
SAY_AFTER_S = 1.0  # that resources are missing: Ray takes a moment, and counts what it is giving us as taken
LOG_AFTER_S = 5.0
LOG_EVERY_S = 30.0


@dataclass
class _Worker:
    name: str
    seat: Seat
    actor: Any
    run: "ray.ObjectRef[None]"  # ends when the worker does, with the reason


@dataclass
class _Wait:
    """For resources."""

    began_s: float
    log_s: float = LOG_AFTER_S  # when, in the wait, it is next worth a line in the log
    said: str = ""


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
        self._slots = slots_of(config, spec)
        self._groups = Groups(self._layout, config.worker)
        self._wait: _Wait | None = None
        self._router: Any = None
        self._engine_address = engine_address
        self._mesh = network.mesh()  # only to speak
        self._mesh.connect(ENGINE, engine_address)
        self._workers: dict[Seat, _Worker] = {}
        self._num_deaths: dict[Seat, int] = {}  # in a row, without an epoch between them
        self._respawn_s: dict[Seat, float] = {}  # not before this time
        self._num_spawned = 0
        self._epoch = 0
        self._due_s: float | None = None  # of the epoch that is formed; None while seats are empty
        self._stopping = threading.Event()

    @property
    def router(self) -> Any:
        """The router's actor handle; None before there is one."""
        return self._router

    def run(self) -> None:
        """Form the cell, and form it anew whenever one of its workers has died, until `stop`."""
        try:
            while not self._stopping.is_set():
                self._advance()
                self._bury(self._await_deaths())
        except OctavoError as error:
            self._give_up(cause_of(error))
        except Exception as error:
            if not self._stopping.is_set():
                log.exception("the cell's keeper failed")
                self._give_up(f"the cell could not be kept: {cause_of(error)}")

    def stop(self) -> None:
        """End the workers and the router, and give their resources back. They do not outlive their engine yet."""
        self._stopping.set()
        for worker in list(self._workers.values()):
            ray.kill(worker.actor)
        if self._router is not None:
            ray.kill(self._router)
        self._groups.remove()

    def _advance(self) -> None:
        if self._due_s is not None:
            self._check_begun(self._due_s)
            return
        places = self._groups.look()
        if places.are_complete:
            self._wait = None
            self._fill(places)
        else:
            self._say_what_is_missing(places)

    # -- resources ------------------------------------------------------------------------------------------------

    def _say_what_is_missing(self, places: Places) -> None:
        """To the engine loop, and with it at `/readyz`, each second; now and then in the log; at last as an error."""
        now = time.monotonic()
        if self._wait is None:
            self._wait = _Wait(now)
        waited_s = now - self._wait.began_s
        if waited_s < SAY_AFTER_S:
            return
        sentence = places.shortage(waited_s)
        if sentence != self._wait.said:
            self._wait.said = sentence
            self._mesh.send(ENGINE, Phase(sentence))
        if waited_s > self._config.worker.ready_timeout_s:
            raise self._late(sentence)
        if waited_s >= self._wait.log_s:
            self._wait.log_s += LOG_EVERY_S
            log.warning("%s", sentence)

    def _late(self, reason: str) -> OctavoError:
        limit_s = self._config.worker.ready_timeout_s
        return OctavoError(f"the workers were not ready within {limit_s:g} s (`worker.ready_timeout_s`): {reason}")

    # -- an epoch -------------------------------------------------------------------------------------------------

    def _fill(self, places: Places) -> None:
        """Fill the empty seats whose pause is over; when none is left, call all seats into a new epoch."""
        now = time.monotonic()
        empty = [seat for seat in self._layout.seats() if seat not in self._workers]
        due = [seat for seat in empty if self._respawn_s.get(seat, now) <= now]
        if not due:
            return
        address, (tables, pairs) = self._ask_router(places.nodes)
        for seat in due:
            self._workers[seat] = self._spawn(seat, pairs[seat])
        if due == empty:
            self._form(address, tables)

    def _form(self, address: str, tables: list[StageTable]) -> None:
        self._epoch += 1
        self._due_s = time.monotonic() + self._config.worker.ready_timeout_s
        form = Form(self._epoch, [(self._workers[seat].name, *seat) for seat in self._layout.seats()], address, tables)
        self._router.record.remote(form)
        self._mesh.send(ENGINE, form)

    def _ask_router(self, nodes: dict[Seat, str]) -> tuple[str, tuple[list[StageTable], dict[Seat, list[Pair]]]]:
        """Its address, the tables of all stages, and what each seat is to hold. A router that died is replaced."""
        for attempt in (1, 2):
            try:
                if self._router is None:
                    self._router = self._start_router()
                return ray.get(
                    [self._router.address.remote(), self._router.settle.remote(nodes)],
                    timeout=ANSWER_S if attempt == 1 and self._epoch else self._config.worker.ready_timeout_s,
                )  # type: ignore[return-value]
            except ray.exceptions.RayError as error:
                log.warning("the router did not answer: %s", cause_of(error))
                self._router = None
        raise OctavoError(f"no router could be started within {self._config.worker.ready_timeout_s:g} s")

    def _start_router(self) -> Any:
        actor: Any = ray.remote(RouterActor).options(num_cpus=0)
        return actor.remote(self._layout, self._stages, self._spec.num_experts, self._slots, self._network)

    def _spawn(self, seat: Seat, pairs: list[Pair]) -> _Worker:
        """Does not wait: Ray starts them side by side."""
        self._num_spawned += 1
        name = f"w{seat.stage}.{seat.replica}.{seat.shard}#{self._num_spawned}"
        wants = self._config.worker
        worker: Any = ray.remote(WorkerActor).options(
            num_cpus=wants.num_cpus, num_gpus=wants.num_gpus, scheduling_strategy=self._groups.bundle(seat)
        )
        actor = worker.remote()
        layers = self._stages[seat.stage]
        run = actor.run.remote(name, self._config, seat, layers, pairs, self._network, self._engine_address)
        return _Worker(name, seat, actor, run)

    def _check_begun(self, due_s: float) -> None:
        """The epoch that is formed begins in time, or the cell is over. With its beginning, deaths are forgiven."""
        if self._loop.epoch == self._epoch:
            self._num_deaths.clear()
        elif time.monotonic() > due_s:
            raise self._late(self._loop.reason)

    # -- deaths ---------------------------------------------------------------------------------------------------

    def _await_deaths(self) -> list[_Worker]:
        """The workers whose call has ended, as soon as there is one."""
        by_run = {worker.run: worker for worker in self._workers.values()}
        limit_s = FORM_S if self._due_s is None else WATCH_S
        if not by_run:
            self._stopping.wait(limit_s)
            return []
        ended, running = ray.wait(list(by_run), num_returns=1, timeout=limit_s)
        if ended and running:  # a node may have taken several along
            ended += ray.wait(running, num_returns=len(running), timeout=0)[0]
        return [by_run[run] for run in ended]

    def _bury(self, dead: list[_Worker]) -> None:
        """Empty the seats of the dead."""
        for worker in dead if not self._stopping.is_set() else ():
            why = self._last_words(worker)
            log.warning("worker %s was lost: %s", worker.name, why)
            self._mesh.send(ENGINE, Lost(worker.name, why))
            ray.kill(worker.actor)  # it may only be out of reach, and would keep its place
            del self._workers[worker.seat]
            self._due_s = None
            self._pause(worker.seat, why)

    def _pause(self, seat: Seat, why: str) -> None:
        """Before the seat is filled again: the longer, the more often its workers died."""
        num_deaths = self._num_deaths[seat] = self._num_deaths.get(seat, 0) + 1
        if num_deaths > len(RESPAWN_S):
            raise OctavoError(f"a worker died {num_deaths} times before it was ready: {why}")
        self._respawn_s[seat] = time.monotonic() + RESPAWN_S[num_deaths - 1]

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
        self._groups.remove()
        if not self._stopping.is_set():
            end_serve_run(reason)


def cause_of(error: BaseException) -> str:
    """One line: what a task's error was, without Ray's own account of where it passed."""
    if isinstance(error, ray.exceptions.RayTaskError) and error.cause is not None:
        error = error.cause
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
