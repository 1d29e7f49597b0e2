"""The engine's own thread: one inbox in, one CellCore, one outbox per worker and ingress replica.

The core decides; this loop only carries messages to it and its commands away. It drains the inbox before it sends
tokens, so that what one step emits leaves as one message per ingress replica.
"""

import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable

import msgspec

from serve_app.config import OctavoConfig
from serve_app.engine.cell import CellCommand, CellCore, CellEvent
from serve_app.engine.core import EngineCore
from serve_app.engine.members import (
    Beat,
    Deposed,
    Enroll,
    Formed,
    Hello,
    Joined,
    Kill,
    Lost,
    Note,
    Parted,
    Spawn,
    Stop,
    Tell,
    Tick,
)
from serve_app.engine.membership import Membership
from serve_app.engine.pace import Pace
from serve_app.engine.plan import Abort, Arrivals, Cancel, Emit, Refuse, Run, StepDone, Submit
from serve_app.engine.request import Emission, Refusal, Request
from serve_app.model.spec import ModelSpec
from serve_app.runtime.calibration import Calibration
from serve_app.runtime.mesh import Mesh
from serve_app.runtime.names import ENGINE, ROUTER
from serve_app.runtime.operate import Operator
from serve_app.runtime.operations import Act, Drain, Say, Strike
from serve_app.runtime.settings import engine_config, layout_of, membership_config, slots_of
from serve_app.runtime.snapshot import EventView, ProcessView
from serve_app.runtime.tallies import EngineTallies
from serve_app.runtime.wire import (
    Aborted,
    Attach,
    From,
    Message,
    Moved,
    Phase,
    Ping,
    Record,
    Refused,
    Status,
    Tally,
    Tokens,
)
from serve_app.telemetry.ledger import Row
from serve_app.telemetry.names import engine_row

log = logging.getLogger(__name__)

TICK_S = 0.1  # how often what is due by time is looked at
STATUS_S = 1.0  # between two status messages to an ingress replica, and two signs of life to a worker
INGRESS_SILENT_S = 10.0  # after this long without a word from an ingress replica it is held for dead
DRAIN_LIMIT = 1_000  # messages handled before tokens are sent, however many more wait
MAX_EVENTS = 1_000  # of the cell's history

Order = Spawn | Kill | Formed  # what the cell's keeper is to do


def cell_core(config: OctavoConfig, spec: ModelSpec) -> CellCore:
    """The core of a cell of this config. It measures its own work by this process's clock."""
    layout, stages = layout_of(config, spec)
    members = Membership(layout, stages, slots_of(config, spec), membership_config(config), time.perf_counter)
    settings = engine_config(config, spec, layout.num_stages)
    core = EngineCore(msgspec.structs.replace(settings, keep_s=config.resilience.resume_s))
    return CellCore(core, members, config.resilience.step_limit_s)


class EngineLoop:
    """Runs until a `Stop` arrives. All state is touched by the thread in `run` only, but for what says otherwise."""

    def __init__(
        self,
        cell: CellCore,
        mesh: Mesh,
        order: Callable[[Order], None],
        resume_s: float = 30.0,
        calibration: Calibration | None = None,
    ) -> None:
        """`order`: tells the keeper what to do; must not wait. `resume_s`: how long streams are kept without reader.

        `calibration`: learns the cell's pace before it is ready.
        """
        self._calibration = calibration
        self._cell = cell
        self._mesh = mesh
        mesh.connect(ENGINE, mesh.address)  # what is seen in other threads is told to this one
        self._order = order
        self._resume_s = resume_s
        self._owners: dict[str, str] = {}  # rid -> ingress replica
        self._orphans: dict[str, float] = {}  # rid -> until when it waits for another ingress replica
        self._ingresses: dict[str, Attach] = {}
        self._heard_s: dict[str, float] = {}  # ingress replica -> when it was last heard
        self._arrivals: list[Request] = []
        self._is_aborting = False
        self._outbox: defaultdict[str, list[Emission]] = defaultdict(list)
        self._tallies = EngineTallies(mesh.send, self._row)
        self._router = ""  # its address
        self._obstacle = ""  # what the keeper waits for
        self._told: tuple[bool, str] = (False, "")
        self._told_s = self._ticked_s = 0.0
        self._stopped = False
        self.history: deque[EventView] = deque(maxlen=MAX_EVENTS)  # other threads read it
        self.operator = Operator()  # other threads order by it

    def run(self) -> None:
        while not self._stopped:
            self._drain()
            self._flush()
            self._tick()

    @property
    def epoch(self) -> int:
        """The newest that began; the cell's keeper reads it from its own thread."""
        return self._cell.members.epoch

    @property
    def reason(self) -> str:
        """What the cell waits for, in words. Other threads read it."""
        return self._told[1]

    def names(self) -> set[str]:
        """Of the living workers that have said Hello. Other threads ask."""
        return set(self._cell.members.states())

    def paces(self) -> dict[int, Pace]:
        """What steps take, by number of replicas. Other threads ask."""
        return self._cell.core.paces.known()

    def addresses(self) -> list[str]:
        """Of the living workers' inboxes. Other threads ask."""
        return [hello.address for hello, _ in self._cell.members.states().values()]

    def processes(self) -> list[ProcessView]:
        """Workers and ingress replicas. Other threads ask: a snapshot of what changes seldom."""
        views = [
            ProcessView("spare" if state == "spare" else "worker", name, hello.pid, hello.node, state)
            for name, (hello, state) in self._cell.members.states().items()
        ]
        views += [ProcessView("ingress", a.name, a.pid, a.node, "live") for a in list(self._ingresses.values())]
        return views

    def _drain(self) -> None:
        received = self._mesh.receive(TICK_S)
        for _ in range(DRAIN_LIMIT):
            if received is None:
                break
            self._handle(received.message)
            received = self._mesh.receive(0)
        else:
            if received is not None:
                self._handle(received.message)
        self._let_in()

    def _flush(self) -> None:
        for name, emissions in self._outbox.items():
            self._mesh.send(name, Tokens(emissions))
        self._outbox.clear()

    def _handle(self, message: Message) -> None:
        if not isinstance(message, From):
            self._let_in()
        match message:
            case StepDone():
                self._obey(self._cell.on(message, time.monotonic()))
            case Enroll() | Hello() | Joined() | Beat() | Parted() | Lost():
                self._change(message)
            case From(name, event):
                self._enter(name, event)
            case Attach():
                self._attach(message)
            case Tally():
                self._tallies.on(message)
            case Phase(reason):
                self._obstacle = reason
                self._tell()
            case Record():
                for worker in self._cell.members.names:
                    self._mesh.send(worker, message)
            case Stop():
                self._stop()
            case Deposed():
                log.warning("the workers have another engine: this one ends")
                self._stopped = True
            case _:
                log.warning("the engine does not know what to do with %s", type(message).__name__)

    def _change(self, message: Enroll | Hello | Joined | Beat | Parted | Lost) -> None:
        """Of the membership."""
        match message:
            case Enroll(_, router):
                self._router = router
                self._mesh.connect(ROUTER, router)
            case Hello(name, address):
                self._meet(name, address)
        self._on(message)
        if isinstance(message, Lost):
            self._mesh.disconnect(message.name)

    def _meet(self, name: str, address: str) -> None:
        """Connect, so that the end of the connection tells of the worker's end: sooner than anything else does."""

        def see_link(_: str, is_up: bool) -> None:
            if not is_up:
                self._mesh.send(ENGINE, Parted(name))

        self._mesh.watch(name, see_link)
        self._mesh.connect(name, address)

    def _on(self, event: CellEvent) -> None:
        """What may change the membership, and with it the cell's word about itself."""
        self._obey(self._cell.on(event, time.monotonic()))
        if self._told != self._word():
            self._tell()

    def _obey(self, commands: list[CellCommand]) -> None:
        for command in commands:
            match command:
                case Run(plan):
                    for name in self._cell.members.workers_of(plan.replica):
                        self._mesh.send(name, plan)
                case Emit(emission):
                    self._emit(emission)
                case Refuse(refusal):
                    self._refuse(refusal)
                case Tell(name, address, message):
                    self._mesh.connect(name, address)
                    self._mesh.send(name, message)
                case Spawn() | Formed() | Kill():
                    self._order(command)
                case Note(kind, epoch, text, seconds):
                    self.note(kind, text, epoch, seconds)

    def note(self, kind: str, text: str, epoch: int = 0, seconds: dict[str, float] | None = None) -> None:
        """Write a line of the cell's history."""
        log.log(logging.WARNING if kind == "lost" else logging.INFO, "%s: %s", kind, text)
        self.history.append(EventView(time.time(), kind, epoch, text, seconds or {}))

    # -- requests -----------------------------------------------------------------------------------------------

    def _enter(self, name: str, event: Submit | Cancel | Abort) -> None:
        """A request belongs to the ingress replica that asked for it last; a cancellation counts from there only."""
        if isinstance(event, Abort):
            self._let_in()
            self._is_aborting = True
            self._on(event)
            self._is_aborting = False
            return
        if isinstance(event, Submit):
            before = self._owners.get(event.request.rid, name)
            if before != name:
                self._mesh.send(before, Moved(event.request.rid))
            self._owners[event.request.rid] = name
            self._orphans.pop(event.request.rid, None)
            self._arrivals.append(event.request)
            return
        if self._owners.get(event.rid) == name:
            self._let_in()
            self._on(event)

    def _let_in(self) -> None:
        """All that have arrived, before anything else happens: they enter the next step together."""
        if self._arrivals:
            arrivals, self._arrivals = self._arrivals, []
            self._on(Arrivals(arrivals))

    def _refuse(self, refusal: Refusal) -> None:
        owner = self._owners.pop(refusal.rid, None)
        self._orphans.pop(refusal.rid, None)
        if owner:
            self._mesh.send(owner, Refused(refusal))

    def _emit(self, emission: Emission) -> None:
        if self._calibration is not None and self._calibration.is_running:
            self._calibration.take(emission)
        owner = self._owners.get(emission.rid)
        if emission.finish:
            self._owners.pop(emission.rid, None)
            self._orphans.pop(emission.rid, None)
        if owner and self._is_aborting:
            self._mesh.send(owner, Aborted(emission.rid))
        elif owner:
            self._outbox[owner].append(emission)

    # -- ingress replicas -----------------------------------------------------------------------------------------

    def _attach(self, attach: Attach) -> None:
        known = attach.name in self._heard_s
        self._heard_s[attach.name] = time.monotonic()
        if not known:
            self._ingresses[attach.name] = attach
            self._mesh.connect(attach.name, attach.address)
            self._mesh.send(attach.name, self._status())

    def _tick(self) -> None:
        now = time.monotonic()
        if now - self._ticked_s < TICK_S:
            return
        self._ticked_s = now
        self._on(Tick())
        self._calibrate(now)
        for act in self.operator.look(self._cell, self._router):
            self._operate(act)
        if now - self._told_s < STATUS_S:
            return
        self._tell()
        for name in (ROUTER, *self._cell.members.names) if self._router else self._cell.members.names:
            self._mesh.send(name, Ping(self._router))
        for name in [name for name, heard_s in self._heard_s.items() if now - heard_s > INGRESS_SILENT_S]:
            self._detach(name, now)
        for rid in [rid for rid, until_s in self._orphans.items() if until_s < now]:
            del self._orphans[rid]
            self._on(Cancel(rid))

    def _calibrate(self, now: float) -> None:
        if self._calibration is None or self._calibration.is_over or not self._cell.members.is_ready:
            return
        self._calibration.look(self._on, now)
        if self._told != self._word():
            self._tell()

    def _row(self) -> Row:
        """What is counted, for the metrics. A calibration counts for nothing: its counts are going to be forgotten."""
        if self._is_calibrating:
            return {}
        return engine_row(self._cell.core.stats(), self._cell.members.stats())

    @property
    def _is_calibrating(self) -> bool:
        return self._calibration is not None and not self._calibration.is_over

    def _operate(self, act: Act) -> None:
        match act:
            case Drain(on):
                self._cell.core.admission.draining = on
                self._tell()
            case Strike(role, name):
                self._order(Kill(name or ROUTER, f"a drill struck the {role}"))
            case Say(text):
                self.note("operation", text, self.epoch)

    def _detach(self, name: str, now: float) -> None:
        """Its clients may come back by another one, for a while."""
        log.warning("ingress %s has been silent for %.0f s", name, INGRESS_SILENT_S)
        del self._heard_s[name]
        del self._ingresses[name]
        self._tallies.leave(name)
        self._mesh.disconnect(name)
        for rid in [rid for rid, owner in self._owners.items() if owner == name]:
            del self._owners[rid]
            self._orphans[rid] = now + self._resume_s

    def _tell(self) -> None:
        self._told_s = time.monotonic()
        self._told = self._word()
        status = self._status()
        for name in self._heard_s:
            self._mesh.send(name, status)
        self._tallies.tell()

    def _word(self) -> tuple[bool, str]:
        """Whether new traffic is welcome, and what is awaited or missing."""
        members = self._cell.members
        reason = members.reason
        if members.is_ready and self._is_calibrating:
            return False, "calibrating: the cell measures what its steps take"
        if self._cell.core.admission.draining:
            return False, "draining: new requests are refused until the cell is resumed"
        if members.is_ready:
            self._obstacle = "" if not reason else self._obstacle
        return members.is_ready, self._obstacle or reason

    def _status(self) -> Status:
        ready, reason = self._told
        return Status(ready, reason, self.epoch, self._cell.core.stats(), self._cell.members.stats())

    def _stop(self) -> None:
        for name in self._cell.members.names:
            self._mesh.send(name, Stop())
        self._flush()
        self._stopped = True
