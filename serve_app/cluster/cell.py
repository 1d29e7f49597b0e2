"""The cell's keeper: reserves resources, starts the router and the workers, and watches that they live.

It decides nothing about the membership: the engine loop orders (spawn, kill), and hears by messages, like everybody
else, who was lost and what is missing as long as the cluster has no place for all workers. Workers and router outlive
the engine; a keeper begins by adopting those that an earlier engine has left.
"""

import logging
import queue
import time
from dataclasses import dataclass, replace
from typing import Any

import ray

from serve_app.cluster.driver import end_serve_run
from serve_app.cluster.groups import Groups, Places
from serve_app.cluster.kin import ASK_S, ROUTER_NAME, Kin, Names
from serve_app.cluster.node import Network
from serve_app.cluster.router import RouterActor
from serve_app.cluster.worker import Adopted, WorkerActor
from serve_app.config import OctavoConfig
from serve_app.engine.members import Enroll, Formed, Kill, Lost, Spawn, StageTable
from serve_app.errors import OctavoError
from serve_app.experts.layout import Seat
from serve_app.model.spec import ModelSpec
from serve_app.runtime.engine_loop import EngineLoop, Order
from serve_app.runtime.names import ENGINE
from serve_app.runtime.settings import layout_of, slots_of
from serve_app.runtime.wire import Phase

log = logging.getLogger(__name__)

LOOK_S = 0.25  # how often the keeper looks for places while somebody waits for one
WATCH_S = 1.0  # and otherwise; orders and deaths wake it at once
END_S = 2.0  # that workers may take to say whose they are before they are ended
PROBE_S = 5.0  # between two questions to the router, and for an answer: one that hangs is replaced
ANSWER_S = 30.0  # that a new router may take for an answer
RESPAWN_S = (0.0, 1.0, 5.0, 30.0)  # pauses before the first, second, ... respawn of one seat in a row
SAY_AFTER_S = 1.0  # that resources are missing: Ray takes a moment, and counts what it is giving us as taken
LOG_AFTER_S = 5.0
LOG_EVERY_S = 30.0


@dataclass
class _Worker:
    name: str
    seat: Seat | None
    place: Seat
    actor: Any
    run: "ray.ObjectRef[None]"  # ends when the worker does, with the reason
    late_s: float  # when it should have said Hello


@dataclass
class _Wanted:
    """A worker that is to be started as soon as there is a place for it."""

    order: Spawn
    due_s: float


@dataclass
class _Wait:
    """For resources."""

    began_s: float
    log_s: float = LOG_AFTER_S  # when, in the wait, it is next worth a line in the log
    said: str = ""


@dataclass
class _Ended:
    """An actor's call has ended: it is dead."""

    name: str
    actor: Any


class _Stopping:
    """To the keeper's own thread."""


class Cell:
    """Router and workers of one model instance. `run` keeps them alive; it lives in a thread of its own."""

    def __init__(self, app: str, config: OctavoConfig, spec: ModelSpec, network: Network, engine_address: str) -> None:
        """`app`: what tells this cell's actors from another's in the same cluster."""
        self._config = config
        self._spec = spec
        self._network = network
        self._names = Names(app, config)
        self._layout, self._stages = layout_of(config, spec)
        self._slots = slots_of(config, spec)
        self._groups = Groups(self._names, self._layout, config.worker, config.resilience.spares)
        self._nodes: dict[Seat, str] = {}
        self._wait: _Wait | None = None
        self._router: Any = None
        self._tables: list[StageTable] = []
        self._formed: Formed | None = None
        self._generation = 0  # engines before this one
        self._engine_address = engine_address
        self._mesh = network.mesh()  # only to speak
        self._mesh.connect(ENGINE, engine_address)
        self._workers: dict[str, _Worker] = {}
        self._wanted: list[_Wanted] = []
        self._num_deaths: dict[Seat | None, int] = {}  # in a row, without an epoch between them
        self._inbox: queue.SimpleQueue[Order | _Ended | _Stopping] = queue.SimpleQueue()
        self._stopping = False
        self._late_s = 0.0
        self._probe: Any = None  # a question to the router
        self._probed_s = 0.0

    @property
    def router(self) -> Any:
        """The router's actor handle; None before there is one."""
        return self._router

    def order(self, order: Order) -> None:
        """What the engine loop wants. Does not wait."""
        self._inbox.put(order)

    def run(self, loop: EngineLoop) -> None:
        """Bring the cell to life, and keep it alive until `stop`."""
        self._loop = loop
        try:
            self._begin()
            while not self._stopping:
                self._go_on()
        except OctavoError as error:
            self._give_up(cause_of(error))
        except Exception as error:
            if not self._stopping:
                log.exception("the cell's keeper failed")
                self._give_up(f"the cell could not be kept: {cause_of(error)}")

    def _go_on(self) -> None:
        """A cell that serves is not ended by what its keeper meets: Ray's head may be away, a router may not start."""
        try:
            self._advance()
        except (OctavoError, ray.exceptions.RayError) as error:
            if not self._epoch:
                raise
            log.warning("the cell's keeper tries again: %s", cause_of(error))
            time.sleep(LOOK_S)

    def stop(self) -> None:
        """End the workers and the router, and give their resources back: unless they have another engine by now."""
        self._stopping = True
        self._inbox.put(_Stopping())
        asked = {kin.actor.is_of.remote(self._engine_address): kin for kin in self._names.living_workers()}
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=END_S) if asked else ([], [])
        if any(_of_another(ref) for ref in answered):
            return
        for kin in asked.values():
            ray.kill(kin.actor)
        if (router := self._names.router()) is not None:
            ray.kill(router)
        self._groups.remove()

    # -- at the beginning -----------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Adopt who is there; the engine loop orders the others. A router is there before anybody else."""
        found = self._adopt(self._names.living_workers())
        self._late_s = time.monotonic() + self._config.worker.ready_timeout_s
        while not found and not self._stopping:
            places = self._look()
            if places.are_complete:
                break
            self._say_what_is_missing(places)
            time.sleep(LOOK_S)
        self._end_strangers()
        self._look()
        self._enroll(found)

    def _end_strangers(self) -> None:
        """What another config of this application has left."""
        for actor in self._names.strangers():
            ray.kill(actor)
        self._groups.remove_strangers()

    def _adopt(self, kin: list[Kin]) -> list[Kin]:
        """Those who answer, and were started for the same config, are ours; the others are ended."""
        asked = {worker.actor.adopt.remote(self._engine_address, self._config): worker for worker in kin}
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ASK_S) if asked else ([], [])
        ours = []
        for ref, worker in asked.items():
            answer = _answer(ref) if ref in answered else None
            if answer is not None:
                ours.append(replace(worker, seat=answer.seat, is_loaded=answer.is_loaded))
                self._generation = max(self._generation, answer.generation)
                self._watch(worker.name, answer.seat, worker.place, worker.actor, None)
            else:
                log.warning("worker %s of an earlier engine is ended: it does not answer", worker.name)
                ray.kill(worker.actor)
        return ours

    def _enroll(self, found: list[Kin]) -> None:
        address, self._tables = self._ask_router()
        seats = [worker.seat for worker in found if worker.seat is not None and worker.is_loaded]
        loading = [worker.seat for worker in found if worker.seat is not None and not worker.is_loaded]
        num_spares = sum(worker.seat is None for worker in found)
        self._mesh.send(ENGINE, Enroll(self._tables, address, seats, loading, num_spares, self._generation))

    def _ask_router(self) -> tuple[str, list[StageTable]]:
        """Its address, and the placement at full strength. A router that died, or hangs, is replaced."""
        for attempt in (1, 2):
            try:
                if self._router is None:
                    self._router = self._names.router() or self._start_router()
                    self._watch_router()
                limit_s = ASK_S if attempt == 1 and self._epoch else ANSWER_S
                refs = [self._router.address.remote(), self._router.settle.remote(self._nodes)]
                return ray.get(refs, timeout=limit_s)  # type: ignore[return-value]
            except ray.exceptions.RayError as error:
                log.warning("the router did not answer: %s", cause_of(error))
                self._end(self._router)
                self._router = None
        raise OctavoError(f"no router could be started within {ANSWER_S:g} s")

    def _start_router(self) -> Any:
        actor: Any = ray.remote(RouterActor).options(
            num_cpus=0, name=self._names.actor(ROUTER_NAME), lifetime="detached", get_if_exists=True
        )
        seed = (self._tables, self._formed) if self._tables else None
        orphan_s = self._config.resilience.orphan_s
        return actor.remote(
            self._layout, self._stages, self._spec.num_experts, self._slots, self._network, orphan_s, seed
        )

    def _watch_router(self) -> None:
        router = self._router
        router.wait.remote().future().add_done_callback(lambda _: self._inbox.put(_Ended(ROUTER_NAME, router)))

    def _end(self, actor: Any) -> None:
        if actor is not None:
            ray.kill(actor)

    @property
    def _epoch(self) -> int:
        return self._loop.epoch

    # -- what happens ---------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        try:
            event = self._inbox.get(timeout=LOOK_S if self._wanted else WATCH_S)
        except queue.Empty:
            event = None
        match event:
            case Spawn():
                self._want(event)
            case Kill(name, why):
                self._kill(name, why)
            case Formed():
                self._record(event)
            case _Ended(name, actor):
                self._bury(name, actor)
        if self._wanted and not self._stopping:
            self._fill()
        self._check_late()
        self._probe_router()

    def _probe_router(self) -> None:
        """A router that is frozen stops nothing either, but nobody would balance experts any more."""
        now = time.monotonic()
        if self._router is None or now - self._probed_s < PROBE_S:
            return
        if self._probe is not None and not ray.wait([self._probe], timeout=0)[0]:
            log.warning("the router has not answered for %.0f s: it is killed", now - self._probed_s)
            ray.kill(self._router)
            self._probe = None
        else:
            self._probe = self._router.address.remote()
        self._probed_s = now

    def _want(self, order: Spawn) -> None:
        num_deaths = min(self._num_deaths.get(order.seat, 0), len(RESPAWN_S))
        pause_s = RESPAWN_S[num_deaths - 1] if num_deaths else 0.0
        self._wanted.append(_Wanted(order, time.monotonic() + pause_s))

    def _record(self, formed: Formed) -> None:
        """An epoch has begun: the deaths before it are forgiven."""
        self._formed = formed
        self._num_deaths.pop(None, None)
        for name, *seat in formed.seats:
            self._num_deaths.pop(Seat(*seat), None)
            if name in self._workers:
                self._workers[name].seat = Seat(*seat)  # a spare has taken it
        if self._router is not None:
            self._router.record.remote(formed)

    def _kill(self, name: str, why: str) -> None:
        if name == ROUTER_NAME:  # its end is noticed as any other's
            log.warning("the router is killed: %s", why)
            self._end(self._router)
            return
        log.warning("worker %s is killed: %s", name, why)
        worker = self._workers.get(name)
        if worker is not None:
            ray.kill(worker.actor)

    # -- workers --------------------------------------------------------------------------------------------------

    def _look(self) -> Places:
        places = self._groups.look()
        self._nodes = places.nodes
        return places

    def _fill(self) -> None:
        """Start those that are due and have a place."""
        now = time.monotonic()
        if not any(wanted.due_s <= now for wanted in self._wanted):
            return
        places = self._look()
        num_wanted = len(self._wanted)
        for wanted in [wanted for wanted in self._wanted if wanted.due_s <= now]:
            place = self._place_for(wanted.order.seat)
            if place is not None:
                self._wanted.remove(wanted)
                self._spawn(wanted, place)
        if self._epoch and len(self._wanted) < num_wanted:  # others come, elsewhere perhaps: a new placement is due
            self._enroll([])
        if any(wanted.due_s <= now for wanted in self._wanted):
            self._say_what_is_missing(places)
        else:
            self._wait = None

    def _place_for(self, seat: Seat | None) -> Seat | None:
        """A free one: the seat's own, or a spare's. A spare may have that of a seat whose worker lives elsewhere."""
        taken = {worker.place for worker in self._workers.values()}
        spares = self._groups.spare_places()
        filled = [worker.seat for worker in self._workers.values() if worker.seat is not None]
        for place in [*spares, *filled] if seat is None else [seat, *spares]:
            if place in self._nodes and place not in taken:
                return place
        return None

    def _spawn(self, wanted: _Wanted, place: Seat) -> None:
        """Does not wait: Ray starts them side by side."""
        name = self._names.new_worker(wanted.order.seat, place)
        wants = self._config.worker
        worker: Any = ray.remote(WorkerActor).options(
            name=self._names.actor(name),
            lifetime="detached",
            num_cpus=wants.num_cpus,
            num_gpus=wants.num_gpus,
            scheduling_strategy=self._groups.bundle(place),
        )
        actor = worker.remote()
        run = actor.run.remote(
            name,
            self._config,
            wanted.order.seat,
            self._stages,
            wanted.order.pairs,
            wanted.order.in_haste,
            self._network,
            self._engine_address,
            self._groups.name(place),
            self._spec,
            self._loop.addresses(),
            self._generation,
        )
        self._watch(name, wanted.order.seat, place, actor, run)

    def _watch(self, name: str, seat: Seat | None, place: Seat, actor: Any, run: Any) -> None:
        run = actor.wait.remote() if run is None else run
        late_s = time.monotonic() + self._config.worker.ready_timeout_s
        self._workers[name] = _Worker(name, seat, place, actor, run, late_s)
        run.future().add_done_callback(lambda _: self._ended(name))

    def _ended(self, name: str) -> None:
        """Called by Ray's own thread, the moment it knows: the engine loop hears of it without a detour."""
        worker = self._workers.get(name)
        if worker is not None and not self._stopping:
            self._inbox.put(_Ended(name, worker.actor))
            self._mesh.send(ENGINE, Lost(name, "its process ended", worker.seat))

    def _bury(self, name: str, actor: Any) -> None:
        """Take the dead off the list. An OctavoError goes up: a respawn would only meet it again."""
        if self._stopping:
            return
        if name == ROUTER_NAME and actor is not self._router:
            return
        if name == ROUTER_NAME:
            self._loop.note("router", "the router was lost: nothing waits for it, another is started", self._epoch)
            self._router = self._probe = None
            self._enroll([])
            return
        worker = self._workers.pop(name)
        why = self._last_words(worker)
        log.info("worker %s was lost: %s", name, why)
        ray.kill(worker.actor)  # it may only be out of reach, and would keep its place
        num_deaths = self._num_deaths[worker.seat] = self._num_deaths.get(worker.seat, 0) + 1
        if num_deaths > len(RESPAWN_S) and not self._epoch:
            raise OctavoError(f"a worker died {num_deaths} times before it was ready: {why}")

    def _last_words(self, worker: _Worker) -> str:
        """Why a worker's call ended."""
        try:
            ray.get(worker.run, timeout=ANSWER_S)
        except OctavoError as error:
            if not self._epoch:
                raise
            return str(error)  # the cell has served: others go on, and this one may do better next time
        except ray.exceptions.RayError as error:
            return cause_of(error)
        return "it left"

    def _check_late(self) -> None:
        """A worker that has not said Hello in time is dead; a cell whose first epoch does not begin is over."""
        now = time.monotonic()
        if not self._epoch and now > self._late_s:
            raise self._late(self._loop.reason)
        late = [worker for worker in self._workers.values() if worker.late_s < now]
        known = self._loop.names() if late else set()
        for worker in late:
            worker.late_s = float("inf")
            if worker.name not in known:
                self._kill(worker.name, f"it was not ready within {self._config.worker.ready_timeout_s:g} s")

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
        if waited_s > self._config.worker.ready_timeout_s and not self._epoch:
            raise self._late(sentence)
        if waited_s >= self._wait.log_s:
            self._wait.log_s += LOG_EVERY_S
            log.warning("%s", sentence)

    def _late(self, reason: str) -> OctavoError:
        limit_s = self._config.worker.ready_timeout_s
        return OctavoError(f"the workers were not ready within {limit_s:g} s (`worker.ready_timeout_s`): {reason}")

    def _give_up(self, reason: str) -> None:
        log.error("%s", reason)
        self._mesh.send(ENGINE, Phase(reason))
        for worker in list(self._workers.values()):
            ray.kill(worker.actor)
        self._groups.remove()
        if not self._stopping:
            end_serve_run(reason)


def _answer(ref: Any) -> Adopted | None:
    """None also of who died over it."""
    try:
        answer: Adopted | None = ray.get(ref)
    except ray.exceptions.RayError:
        return None
    return answer


def _of_another(ref: Any) -> bool:
    """What a worker answers; one that died, or has not begun, is of nobody else."""
    try:
        return ray.get(ref) is False
    except (ray.exceptions.RayError, AttributeError):
        return False


def cause_of(error: BaseException) -> str:
    """One line: what a task's error was, without Ray's own account of where it passed."""
    if isinstance(error, ray.exceptions.RayTaskError) and error.cause is not None:
        error = error.cause
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
