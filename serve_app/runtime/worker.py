"""The worker: one process that owns one accelerator, one shard of a stage's layers of one replica, and its experts.

It speaks only to the mesh. Everything it does is an answer to a message, and every message of another epoch is
dropped: what the engine ends by beginning a new epoch, a worker cannot finish afterwards.
"""

import logging
import time
from collections import deque

from torch import Tensor

from serve_app.engine.plan import Plan, StepDone
from serve_app.experts.placement import Pair
from serve_app.model.batch import Batch
from serve_app.model.sampling import sample
from serve_app.model.timing import StepTimer
from serve_app.runtime.collective_shards import Backend, CollectiveShards, open_store
from serve_app.runtime.dispatch import MeshExperts
from serve_app.runtime.frames import read_tensor, tensor_frame, tensor_header
from serve_app.runtime.load import Loaded, resident_bytes
from serve_app.runtime.mesh import Mesh, host_of
from serve_app.runtime.mesh_shards import MeshShards
from serve_app.runtime.names import ENGINE, ROUTER
from serve_app.runtime.wire import (
    ExpertCall,
    ExpertReply,
    Hello,
    Hidden,
    Join,
    Joined,
    Leave,
    Member,
    Record,
    Report,
    ShardPart,
    Spans,
    Stop,
)

log = logging.getLogger(__name__)

IDLE_S = 1.0  # how long an idle worker sleeps in its inbox before it looks at the clock
REPORT_S = 1.0  # between two reports of expert load


class _EpochEndedError(Exception):
    """A Join arrived in the middle of a step: the step is abandoned."""


class Worker:
    """The loop around a stage. `run` returns on `Stop`."""

    def __init__(self, name: str, loaded: Loaded, mesh: Mesh) -> None:
        self.name = name
        self._mesh = mesh
        self._loaded = loaded
        self._stage = loaded.stage
        self._timer = loaded.stage.timer = StepTimer()
        self._epoch = 0
        self._experts: MeshExperts | None = None  # this and the next: of the epoch; None between epochs
        self._shards: MeshShards | CollectiveShards | None = None
        self._store, store = self._open_store()
        self._next: str | None = None  # the worker of the same shard in the next stage; None on the last
        self._plans: deque[Plan] = deque()
        self._hidden: dict[int, Tensor] = {}
        self._stopped = False
        self._reported_s = 0.0
        self._hello = Hello(name, mesh.address, self._stage.kv.num_pages, loaded.load_s, resident_bytes(), store)

    def run(self) -> None:
        """Say hello, then answer messages until told to stop."""
        self._mesh.send(ENGINE, self._hello)
        while not self._stopped:
            try:
                self._advance()
            except _EpochEndedError:
                log.debug("%s left off: epoch %d began", self.name, self._epoch)

    def _advance(self) -> None:
        plan = self._runnable()
        if plan is None:
            self._pump(IDLE_S, "idle")
        else:
            self._execute(plan)
            self._pump(0)
        self._report()

    def _runnable(self) -> Plan | None:
        """The oldest plan, once its input is here. Steps of a replica pass through each stage in order."""
        if not self._plans:
            return None
        plan = self._plans[0]
        if self._stage.is_first or plan.step in self._hidden:
            return self._plans.popleft()
        return None

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
        tokens, logprobs = sample(output, [part.sample for part in plan.slices if part.sample])
        self._mesh.send(ENGINE, StepDone(plan.epoch, plan.replica, plan.step, tokens, logprobs))

    def _pump(self, timeout_s: float, why: str = "wait") -> bool:
        """Handle one incoming message; False if none comes in time."""
        begun_s = time.perf_counter()
        received = self._mesh.receive(timeout_s)
        if timeout_s:
            self._timer.span(why, begun_s)
        if received is None:
            return False
        message, frame = received
        match message:
            case Join():
                self._join(message)
            case Stop():
                self._stopped = True
                raise _EpochEndedError
            case Leave(epoch):
                self._leave(epoch)
            case Record(on):
                self._record(on)
            case Plan() | Hidden() | ShardPart() | ExpertCall() | ExpertReply() if self._is_stale(message.epoch):
                log.debug("%s dropped a %s of epoch %d", self.name, type(message).__name__, message.epoch)
            case Plan() | Hidden() | ShardPart() | ExpertCall() | ExpertReply():
                self._take(message, frame)
            case _:
                log.warning("%s does not know what to do with %s", self.name, type(message).__name__)
        return True

    def _take(self, message: Plan | Hidden | ShardPart | ExpertCall | ExpertReply, frame: memoryview | None) -> None:
        """A part of a step of this epoch. What does not fit is dropped: it cannot have come from a member."""
        assert self._experts is not None
        assert self._shards is not None
        try:
            match message:
                case Plan():
                    self._plans.append(message)
                case Hidden():
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

    def _is_stale(self, epoch: int) -> bool:
        return self._experts is None or epoch != self._epoch

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

    def _join(self, message: Join) -> None:
        """Take a seat in a new epoch. What belonged to the old one is forgotten."""
        if message.epoch < self._epoch:
            return
        if message.epoch == self._epoch and self._experts:  # asked again: the answer was lost
            self._mesh.send(ENGINE, Joined(message.epoch, self.name))
            return
        own = next(member for member in message.members if member.name == self.name)
        self._mesh.keep({ENGINE, ROUTER, *(member.name for member in message.members)})
        self._mesh.connect(ROUTER, message.router)
        for member in message.members:
            if member.name != self.name:
                self._mesh.connect(member.name, member.address)
        group = _group(message.members, own.stage)
        tables = dict(zip(self._stage.layers, message.table, strict=True))
        self._loaded.host_experts(_hosted(tables, group.index(self.name)))
        self._next = _successor(message.members, own)
        self._epoch = message.epoch
        self._forget()
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
        self._mesh.send(ENGINE, Joined(message.epoch, self.name))
        raise _EpochEndedError

    @property
    def _uses_collectives(self) -> bool:
        return self._stage.device.type == "cuda" and self._stage.num_shards > 1

    def _open_store(self) -> tuple[object, str]:
        """Shard 0 keeps the store by which collectives find together."""
        if self._uses_collectives and self._stage.shard == 0:
            return open_store(host_of(self._mesh.address))
        return None, ""

    def _shards_of(self, epoch: int, peers: list[Member], index: int) -> MeshShards | CollectiveShards:
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


def _group(members: list[Member], stage: int) -> list[str]:
    """Names of a stage's workers in rank order: by replica, then shard."""
    return [m.name for m in sorted(members, key=lambda m: (m.replica, m.shard)) if m.stage == stage]


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
