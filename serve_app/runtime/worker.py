"""The worker: one process that owns one accelerator, one shard of a stage's layers of one replica, and its experts.

It speaks only to the mesh. Everything it does is an answer to a message, and every message of another epoch is
dropped: what the engine ends by beginning a new epoch, a worker cannot finish afterwards.

It outlives its engine: as long as no new one calls, it keeps its weights and waits. After `orphan_s` without a sign of
life from any engine it ends itself.
"""

import logging
import os
import time
from collections.abc import Callable
from threading import Event, Thread

from torch import Tensor

from serve_app.engine.members import Beat, Deposed, Hello, Join, Joined, Leave, Member, Stop, Take
from serve_app.engine.plan import Plan, StepDone
from serve_app.errors import OctavoError
from serve_app.experts.layout import Seat
from serve_app.experts.placement import Pair
from serve_app.model.batch import Batch
from serve_app.model.sampling import sample
from serve_app.model.stage import Stage
from serve_app.model.timing import StepTimer
from serve_app.runtime.collective_shards import Backend, CollectiveShards, open_store
from serve_app.runtime.dispatch import MeshExperts
from serve_app.runtime.frames import read_tensor, tensor_frame, tensor_header
from serve_app.runtime.load import Loaded, resident_bytes
from serve_app.runtime.mesh import Mesh, host_of
from serve_app.runtime.mesh_shards import MeshShards
from serve_app.runtime.names import ENGINE, ROUTER
from serve_app.runtime.wire import (
    Adopt,
    ExpertCall,
    ExpertReply,
    Fetch,
    Hidden,
    Ping,
    Record,
    Report,
    ShardPart,
    Spans,
    Weight,
)

log = logging.getLogger(__name__)

BEAT_S = 0.25  # between two signs of life
FORMER = "former engine"
GREET_S = 1.0  # between two greetings of an engine that says nothing
IDLE_S = 1.0  # how long an idle worker sleeps in its inbox before it looks at the clock
REPORT_S = 1.0  # between two reports of expert load


class _EpochEndedError(Exception):
    """A Join arrived in the middle of a step: the step is abandoned."""


Load = Callable[[Seat, list[Pair]], Loaded]


class Worker:
    """The loop around a stage. `run` returns on `Stop`, or when it has been an orphan for too long."""

    def __init__(
        self,
        name: str,
        load: Load,
        mesh: Mesh,
        seat: Seat | None = None,
        pairs: list[Pair] | None = None,
        *,
        node: str = "",
        orphan_s: float = 60.0,
    ) -> None:
        """Loads what `seat` needs, `pairs` among it; without a seat it is a spare, and waits for one."""
        self.name = name
        self._mesh = mesh
        self._load = load
        self._node = node
        self._orphan_s = orphan_s
        self.seat = seat  # others read it
        self.is_orphan = False  # it ended because no engine was left
        self._is_loading = False
        self._epoch = 0
        self._num_stale = 0
        self._timer = StepTimer()
        self._experts: MeshExperts | None = None  # this and the next: of the epoch; None between epochs
        self._shards: MeshShards | CollectiveShards | None = None
        self._next: str | None = None  # the worker of the same shard in the next stage; None on the last
        self._plans: dict[int, Plan] = {}  # by the step that comes before them
        self._last_step = -1
        self._hidden: dict[int, Tensor] = {}
        self._askers: set[str] = set()  # who is not a member yet, and takes weights from here
        self._stopped = False
        self._is_met = False  # by the engine that it has greeted last
        self._greeted_s = self._reported_s = 0.0
        self._turned_s = self._heard_s = time.monotonic()
        self._ended = Event()
        self._loaded: Loaded | None = None
        self._store: tuple[object, str] = None, ""
        if seat is not None:
            self._settle(seat, pairs or [])

    def _settle(self, seat: Seat, pairs: list[Pair]) -> None:
        self._loaded = self._load(seat, pairs)
        self.seat = seat
        self._loaded.stage.timer = self._timer
        self._store = self._open_store()

    @property
    def _stage(self) -> Stage:
        assert self._loaded is not None, "a spare has no stage"
        return self._loaded.stage

    def run(self) -> None:
        """Say hello, then answer messages until told to stop."""
        self._turned_s = self._heard_s = time.monotonic()  # loading may have taken long
        Thread(target=self._beat, name="beat", daemon=True).start()
        try:
            self._greet()
            while not self._stopped:
                try:
                    self._advance()
                except _EpochEndedError:
                    log.debug("%s left off: epoch %d began", self.name, self._epoch)
        finally:
            self._ended.set()

    def _greet(self) -> None:
        self._is_met, self._greeted_s = False, time.monotonic()
        self._mesh.send(ENGINE, self._hello())

    def _hello(self) -> Hello:
        loaded = self._loaded
        return Hello(
            self.name,
            self._mesh.address,
            None if loaded is None else self.seat,
            loaded.stage.kv.num_pages if loaded else 0,
            loaded.load_s if loaded else 0.0,
            resident_bytes(),
            self._epoch,
            os.getpid(),
            self._node,
            self._store[1],
        )

    def _beat(self) -> None:
        """Signs of life, however long a step takes. A process that is stopped gives none."""
        while not self._ended.wait(BEAT_S):
            stuck_s = 0.0 if self._is_loading else time.monotonic() - self._turned_s
            self._mesh.send(ENGINE, Beat(self.name, stuck_s, self._num_stale))

    def _advance(self) -> None:
        plan = self._runnable()
        if plan is not None:
            self._execute(plan)
            self._pump(0)
        elif not self._pump(0) and not (self._loaded and self._loaded.pack_next()):
            self._pump(IDLE_S, "idle")
        self._report()
        if not self._is_met and time.monotonic() - self._greeted_s > GREET_S:
            self._greet()

    def _runnable(self) -> Plan | None:
        """The next plan, once its input is here. Steps of a replica pass through each stage in order."""
        plan = self._plans.get(self._last_step)
        if plan is None or not (self._stage.is_first or plan.step in self._hidden):
            return None
        self._last_step = plan.step
        return self._plans.pop(plan.after)

    def _execute(self, plan: Plan) -> None:
        """Run a step and hand its outcome on."""
        begun_s = time.perf_counter()
        self._step(plan)
        self._timer.span(f"step {plan.step}: {sum(len(part.tokens) for part in plan.slices)} tokens", begun_s)

    def _step(self, plan: Plan) -> None:
        batch = Batch.from_plan(plan, self._stage.page_tokens, self._stage.device)
        assert self._experts is not None
        output = self._stage.forward(batch, self._hidden.pop(plan.step, None), self._experts, self._shards)
        if self._next is not None:
            header = Hidden(plan.epoch, plan.step, *tensor_header(output))
            self._mesh.send(self._next, header, tensor_frame(output))
            return
        if self._stage.shard != 0:  # the logits are on shard 0
            return
        assert self._loaded is not None
        chosen = sample(output, [part.sample for part in plan.slices if part.sample], self._loaded.grammars)
        self._mesh.send(ENGINE, StepDone(plan.epoch, plan.replica, plan.step, *chosen))

    def _pump(self, timeout_s: float, why: str = "wait") -> bool:
        """Handle one incoming message; False if none comes in time."""
        begun_s = time.perf_counter()
        received = self._mesh.receive(timeout_s)
        self._turned_s = time.monotonic()
        if timeout_s:
            self._timer.span(why, begun_s)
        if received is None:
            self._check_orphaned()
            return False
        message, frame = received
        match message:
            case Plan() | Hidden() | ShardPart() | ExpertCall() | ExpertReply():
                self._take(message, frame)
            case Ping(router):
                self._heard_s, self._is_met = self._turned_s, True
                if router:
                    self._mesh.connect(ROUTER, router)
            case Join() | Leave() | Take() | Adopt() | Stop():
                self._obey(message)
            case Record(on):
                self._record(on)
            case Fetch(name, address):
                self._give(name, address)
            case _:
                log.warning("%s does not know what to do with %s", self.name, type(message).__name__)
        return True

    def _obey(self, message: Join | Leave | Take | Adopt | Stop) -> None:
        """The engine's word."""
        self._heard_s, self._is_met = self._turned_s, True
        match message:
            case Join():
                self._join(message)
            case Leave(epoch):
                self._leave(epoch)
            case Take(seat, pairs):
                self._take_seat(seat, pairs)
            case Adopt(address):
                self._adopt(address)
            case Stop():
                self._stopped = True
                raise _EpochEndedError

    def _check_orphaned(self) -> None:
        if self._turned_s - self._heard_s > self._orphan_s:
            log.warning("%s ends: no engine has been heard for %.0f s", self.name, self._orphan_s)
            self._stopped = self.is_orphan = True
            raise _EpochEndedError

    def _take(self, message: Plan | Hidden | ShardPart | ExpertCall | ExpertReply, frame: memoryview | None) -> None:
        """A part of a step of this epoch. What does not fit is dropped: it cannot have come from a member."""
        if self._experts is None or message.epoch != self._epoch:
            self._num_stale += 1
            log.debug("%s dropped a %s of epoch %d", self.name, type(message).__name__, message.epoch)
            return
        try:
            match message:
                case Plan():
                    if message.after >= self._last_step:  # else it has been run: the message came twice
                        self._plans[message.after] = message
                case Hidden() if message.step > self._last_step:
                    self._hidden[message.step] = read_tensor(message, frame, self._stage.device)
                case ShardPart():
                    if isinstance(self._shards, MeshShards):
                        self._shards.accept(message, frame)
                case ExpertCall():
                    begun_s = time.perf_counter()
                    self._experts.serve(message, frame)
                    self._timer.span(f"serve {message.sender}: layer {message.layer}", begun_s)
                case ExpertReply():
                    self._experts.accept(message, frame)
        except (ValueError, KeyError) as error:
            log.warning("%s dropped a %s that does not fit: %s", self.name, type(message).__name__, error)

    def _record(self, on: bool) -> None:
        spans = self._timer.take_spans()
        if on:
            self._timer.spans = []
        else:
            self._mesh.send(ROUTER, Spans(self.name, spans))

    def _give(self, name: str, address: str) -> None:
        """To a worker that finds no checkpoint on its disk."""
        asker = f"fetch {address}"
        self._askers.add(asker)
        self._mesh.connect(asker, address)
        try:
            tensor = None if self._loaded is None else self._loaded.weights.tensor(name)
        except (KeyError, OctavoError) as error:
            log.warning("%s cannot give %s: %s", self.name, name, error)
            tensor = None
        if tensor is None:
            self._mesh.send(asker, Weight(name))
        else:
            self._mesh.send(asker, Weight(name, *tensor_header(tensor)), tensor_frame(tensor))

    def _leave(self, epoch: int) -> None:
        """Wait for the next Join: steps with a lost member in them would wait in vain."""
        if epoch >= self._epoch and self._experts is not None:
            self._forget()
            raise _EpochEndedError

    def _forget(self) -> None:
        if isinstance(self._shards, CollectiveShards):
            self._shards.leave()
        self._experts = self._shards = None
        self._plans.clear()
        self._hidden.clear()
        self._last_step = -1

    def _adopt(self, address: str) -> None:
        """A new engine: what the old one began is its to end. That one may live still: it is told."""
        before = self._mesh.address_of(ENGINE)
        if before and before != address:
            self._mesh.connect(FORMER, before)
            self._mesh.send(FORMER, Deposed())
        self._mesh.connect(ENGINE, address)
        self._forget()
        self._greet()
        raise _EpochEndedError

    def _take_seat(self, seat: Seat, pairs: list[Pair]) -> None:
        if self._loaded is None:
            self._is_loading = True
            self._settle(seat, pairs)
            self._is_loading = False
        self._greet()

    def _join(self, message: Join) -> None:
        """Take a seat in a new epoch. What belonged to the old one is forgotten."""
        if message.epoch < self._epoch or self._loaded is None:
            return
        if message.epoch == self._epoch and self._experts:  # asked again: the answer was lost
            self._mesh.send(ENGINE, Joined(message.epoch, self.name))
            return
        own = next(member for member in message.members if member.name == self.name)
        self._connect(message)
        group = _group(message.members, own, self._stage.num_shards)
        tables = dict(zip(self._stage.layers, message.table, strict=True))
        self._epoch = message.epoch
        self._forget()
        begun_s = time.perf_counter()
        self._is_loading = True
        self._loaded.host_experts(_hosted(tables, group.index(self.name)))
        self._is_loading = False
        load_s = time.perf_counter() - begun_s
        self._next = _successor(message.members, own)
        self._experts = MeshExperts(
            self._mesh,
            self._loaded.host,
            epoch=message.epoch,
            name=self.name,
            group=group,
            tables=tables,
            pump=self._pump,
        )
        self._shards = self._shards_of(message.epoch, _peers(message.members, own), own.shard)
        self._mesh.send(ENGINE, Joined(message.epoch, self.name, load_s))
        raise _EpochEndedError

    def _connect(self, message: Join) -> None:
        """To the members of an epoch and nobody else."""
        self._mesh.keep({ENGINE, ROUTER, *self._askers, *(member.name for member in message.members)})
        self._mesh.connect(ROUTER, message.router)
        for member in message.members:
            if member.name != self.name:
                self._mesh.connect(member.name, member.address)

    @property
    def _uses_collectives(self) -> bool:
        return self._stage.device.type == "cuda" and self._stage.num_shards > 1

    def _open_store(self) -> tuple[object, str]:
        """Shard 0 keeps the store by which collectives find together."""
        if self._uses_collectives and self._stage.shard == 0:
            return open_store(host_of(self._mesh.address))
        return None, ""

    def _shards_of(self, epoch: int, peers: list[Member], index: int) -> MeshShards | CollectiveShards | None:
        if len(peers) < self._stage.num_shards:  # the replica is broken, and rests
            return None
        if self._uses_collectives:
            backend: Backend = "nccl" if self._stage.device.type == "cuda" else "gloo"
            return CollectiveShards(
                epoch=epoch, index=index, num=len(peers), store=peers[0].store, backend=backend, pump=self._pump
            )
        names = [peer.name for peer in peers]
        return MeshShards(self._mesh, epoch=epoch, peers=names, index=index, device=self._stage.device, pump=self._pump)

    def _report(self) -> None:
        now = time.monotonic()
        if self._experts and now - self._reported_s >= REPORT_S:
            self._reported_s = now
            self._mesh.send(ROUTER, Report(self._epoch, self.name, resident_bytes(), self._experts.take_loads()))


def _group(members: list[Member], own: Member, num_shards: int) -> list[str]:
    """Names of a stage's workers by rank in its expert group; "" where the seat is empty."""
    ranks = {m.replica * num_shards + m.shard: m.name for m in members if m.stage == own.stage}
    return [ranks.get(rank, "") for rank in range(max(ranks) + 1)]


def _peers(members: list[Member], own: Member) -> list[Member]:
    """The shards of this worker's replica and stage, in their order."""
    seated = [m for m in members if (m.stage, m.replica) == (own.stage, own.replica)]
    return sorted(seated, key=lambda m: m.shard)


def _successor(members: list[Member], own: Member) -> str | None:
    """Who takes this worker's hidden states: the same replica and shard in the next stage."""
    for m in members:
        if (m.stage, m.replica, m.shard) == (own.stage + 1, own.replica, own.shard):
            return m.name
    return None


def _hosted(tables: dict[int, list[list[int]]], rank: int) -> list[Pair]:
    return [(layer, expert) for layer, hosts in tables.items() for expert, ranks in enumerate(hosts) if rank in ranks]
