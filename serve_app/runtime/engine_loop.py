"""The engine's own thread: one inbox in, one EngineCore, one outbox per worker and ingress replica.

The core decides; this loop only carries messages to it and its commands away. It drains the inbox before it sends
tokens, so that what one step emits leaves as one message per ingress replica.
"""

import logging
import time
from collections import defaultdict

from serve_app.engine.core import EngineCore
from serve_app.engine.plan import Begin, Cancel, Command, Emit, Run, StepDone, Submit
from serve_app.engine.request import Emission
from serve_app.experts.layout import Seat
from serve_app.runtime.mesh import Mesh
from serve_app.runtime.wire import (
    Attach,
    Form,
    From,
    Hello,
    Join,
    Joined,
    Leave,
    Lost,
    Member,
    Message,
    Phase,
    Record,
    Status,
    Stop,
    Tokens,
)

log = logging.getLogger(__name__)

STATUS_S = 1.0  # between two status messages to an ingress replica
STEP_LIMIT_S = 120.0  # after this long without an end of a step, new traffic is not welcome
INGRESS_SILENT_S = 10.0  # after this long without a word from an ingress replica its requests are cancelled
DRAIN_LIMIT = 1_000  # messages handled before tokens are sent, however many more wait


class EngineLoop:
    """Runs until a `Stop` arrives. All state is touched by the thread in `run` only."""

    def __init__(self, core: EngineCore, mesh: Mesh) -> None:
        self._core = core
        self._mesh = mesh
        self._hellos: dict[str, Hello] = {}
        self._form: Form | None = None  # the newest whose members all live
        self._awaited: set[str] = set()  # its workers that were called and have not joined
        self.epoch = 0  # the newest that began; the cell's keeper reads it from its own thread
        self._sent_s: dict[tuple[int, int], float] = {}  # (replica, step) in flight -> when it was sent
        self._seats: dict[Seat, str] = {}
        self._owners: dict[str, str] = {}  # rid -> ingress replica
        self._heard_s: dict[str, float] = {}  # ingress replica -> when it was last heard
        self._outbox: defaultdict[str, list[Emission]] = defaultdict(list)
        self._ready = False
        self.reason = "starting"  # read by the keeper too
        self._told_s = 0.0
        self._stopped = False

    def run(self) -> None:
        while not self._stopped:
            self._drain()
            for name, emissions in self._outbox.items():
                self._mesh.send(name, Tokens(emissions))
            self._outbox.clear()
            self._tick()

    def _drain(self) -> None:
        received = self._mesh.receive(STATUS_S)
        for _ in range(DRAIN_LIMIT):
            if received is None:
                return
            self._handle(received.message)
            received = self._mesh.receive(0)
        if received is not None:
            self._handle(received.message)

    def _handle(self, message: Message) -> None:
        match message:
            case StepDone():
                self._sent_s.pop((message.replica, message.step), None)
                self._on(message)
            case From(name, event):
                self._enter(name, event)
            case Attach(name, address):
                self._attach(name, address)
            case Hello():
                self._hellos[message.name] = message
                self._call()
            case Form():
                self._form = message
                self._awaited.clear()
                self._call()
            case Joined(epoch, name) if self._form and epoch == self._form.epoch:
                self._joined(name)
            case Lost(name, why):
                self._lose(name, why)
            case Phase(reason):
                self._not_ready(reason)
            case Record():
                for worker in self._seats.values():
                    self._mesh.send(worker, message)
            case Stop():
                self._stop()
            case _:
                log.warning("the engine does not know what to do with %s", type(message).__name__)

    # -- requests -----------------------------------------------------------------------------------------------

    def _enter(self, name: str, event: Submit | Cancel) -> None:
        if isinstance(event, Submit):
            self._owners[event.request.rid] = name
        self._on(event)

    def _on(self, event: Begin | Submit | Cancel | StepDone) -> None:
        self._obey(self._core.on(event, time.monotonic()))

    def _obey(self, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case Run(plan):
                    self._sent_s[plan.replica, plan.step] = time.monotonic()
                    for name in self._workers_of(plan.replica):
                        self._mesh.send(name, plan)
                case Emit(emission):
                    owner = self._owners.get(emission.rid)
                    if emission.finish:
                        self._owners.pop(emission.rid, None)
                    if owner:
                        self._outbox[owner].append(emission)

    def _workers_of(self, replica: int) -> list[str]:
        return [name for seat, name in self._seats.items() if seat.replica == replica]

    # -- ingress replicas -----------------------------------------------------------------------------------------

    def _attach(self, name: str, address: str) -> None:
        known = name in self._heard_s
        self._heard_s[name] = time.monotonic()
        if not known:
            self._mesh.connect(name, address)
            self._mesh.send(name, self._status())

    def _tick(self) -> None:
        now = time.monotonic()
        if now - self._told_s < STATUS_S:
            return
        oldest_s = min(self._sent_s.values(), default=now)
        if self._ready and now - oldest_s > STEP_LIMIT_S:
            self._not_ready(f"a step has been under way for {now - oldest_s:.0f} s: a worker hangs")
        self._tell()
        for name in [name for name, heard_s in self._heard_s.items() if now - heard_s > INGRESS_SILENT_S]:
            self._detach(name)

    def _detach(self, name: str) -> None:
        log.warning("ingress %s has been silent for %.0f s: its requests are cancelled", name, INGRESS_SILENT_S)
        del self._heard_s[name]
        self._mesh.disconnect(name)
        for rid in [rid for rid, owner in self._owners.items() if owner == name]:
            del self._owners[rid]
            self._on(Cancel(rid))

    def _tell(self) -> None:
        self._told_s = time.monotonic()
        status = self._status()
        for name in self._heard_s:
            self._mesh.send(name, status)

    def _status(self) -> Status:
        return Status(self._ready, self.reason, self.epoch, self._core.stats())

    # -- membership -----------------------------------------------------------------------------------------------

    def _call(self) -> None:
        """Call the workers of the newest form into its epoch, once all of them have said hello."""
        form = self._form
        if form is None or form.epoch == self.epoch or self._awaited:
            return
        missing = [name for name, *_ in form.seats if name not in self._hellos]
        if missing:
            self._not_ready(f"{len(form.seats) - len(missing)} of {len(form.seats)} workers have loaded")
            return
        members = [self._member(*seat) for seat in form.seats]
        self._awaited = {member.name for member in members}
        self._await_joined(form)
        for member in members:
            self._mesh.connect(member.name, member.address)
            self._mesh.send(member.name, Join(form.epoch, members, form.tables[member.stage], form.router))

    def _await_joined(self, form: Form) -> None:
        missing = ", ".join(sorted(self._awaited)[:3]) + (", ..." if len(self._awaited) > 3 else "")
        self._not_ready(
            f"{len(self._awaited)} of {len(form.seats)} workers have yet to join epoch {form.epoch}: {missing}"
        )

    def _member(self, name: str, stage: int, replica: int, shard: int) -> Member:
        hello = self._hellos[name]
        return Member(name, hello.address, stage, replica, shard, hello.store)

    def _joined(self, name: str) -> None:
        form = self._form
        self._awaited.discard(name)
        if form is None or form.epoch == self.epoch:
            return
        if self._awaited:
            self._await_joined(form)
            return
        self._seats = {Seat(*seat): worker for worker, *seat in form.seats}
        num_pages = min(self._hellos[worker].num_pages for worker in self._seats.values())
        num_replicas = 1 + max(seat.replica for seat in self._seats)
        self.epoch = form.epoch
        self._sent_s.clear()
        self._ready, self.reason = True, "ready"
        self._on(Begin(self.epoch, num_replicas, num_pages))
        self._tell()
        log.info("%s", self._account(num_pages))

    def _lose(self, name: str, why: str) -> None:
        """A worker is gone: its epoch is over, and the survivors wait for the keeper's next form."""
        self._hellos.pop(name, None)
        self._mesh.disconnect(name)
        if self._form and any(name == member for member, *_ in self._form.seats):
            for survivor in [member for member, *_ in self._form.seats if member in self._hellos]:
                self._mesh.send(survivor, Leave(self._form.epoch))
            self._form = None
            self._awaited.clear()
        self._sent_s.clear()
        self._not_ready(f"worker {name} was lost: {why}")

    def _account(self, num_pages: int) -> str:
        hellos = [self._hellos[name] for name in self._seats.values()]
        return (
            f"ready: epoch {self.epoch} began with {len(hellos)} workers, {num_pages} KV pages per replica;"
            f" the slowest loaded in {max(hello.load_s for hello in hellos):.1f} s,"
            f" together they hold {sum(hello.resident_bytes for hello in hellos) / 2**30:.1f} GiB"
        )

    def _not_ready(self, reason: str) -> None:
        self._ready, self.reason = False, reason
        self._tell()

    def _stop(self) -> None:
        for name in self._seats.values():
            self._mesh.send(name, Stop())
        self._stopped = True
