"""From one deployment of a model to another, after a loss or to grow: what must be moved, how long it takes.

GPUs that are there keep their seats as far as both layouts have them, whole replicas first; what else there is, and
what is new, takes the other seats in order. Experts are placed as a cell places them before it has seen any load.
So it is where a worker's place is taken by another one. Where the layout changes, Octavo begins a new cell today, which
takes `restart_s`; the rest says what there is to move.
"""

import math
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

from serve_app.errors import PlanError
from serve_app.experts.layout import Seat
from serve_app.plan.counts import expert_params
from serve_app.plan.deployment import Deployment
from serve_app.plan.estimate import Cost, Estimate, estimate
from serve_app.plan.holdings import Holdings, Home, Kind, lacking_bytes
from serve_app.plan.ops import Step
from serve_app.plan.seats import gpu_of, num_seats
from serve_app.plan.workload import Workload


@dataclass(frozen=True)
class StageMove:
    """Of one stage of the new deployment, all cells together."""

    stage: int
    experts: int  # (layer, expert) on a GPU that did not hold it, standby copies among them
    expert_bytes: float
    dense_bytes: float  # attention, gates, shared experts, norms, embedding, head


@dataclass(frozen=True)
class Transition:
    """What it takes to get from one deployment to the other."""

    stages: tuple[StageMove, ...]
    busiest_bytes: float  # into one GPU
    num_kept_gpus: int
    num_new_gpus: int  # that had no seat and no weights
    num_kept_replicas: int  # whose seats are all the same GPUs as before: they keep their KV, and serve on
    load_s: float  # the busiest GPU from its host's memory, or a new node from its disk
    over_links_s: float  # the same from the memory of other GPUs
    start_s: float  # of the processes of new workers
    form_s: float  # until the new membership works
    restart_s: float  # of a new cell instead, in which every process starts and loads all that it holds
    sequences: float  # whose KV is gone
    recompute_s: float
    before: float  # requests/s with the objective kept
    during: float
    after: float
    keeps_objective: bool  # for what is asked, while it lasts

    @property
    def moved_experts(self) -> int:
        return sum(stage.experts for stage in self.stages)

    @property
    def moved_bytes(self) -> float:
        return sum(stage.expert_bytes + stage.dense_bytes for stage in self.stages)

    @property
    def total_s(self) -> float:
        """Until everything is as planned. As long as replicas are kept, they serve meanwhile."""
        return self.start_s + self.load_s + self.form_s + self.recompute_s


def transition(cost_a: Cost, cost_b: Cost, workload: Workload, lost: Collection[int] = ()) -> Transition:
    """From the deployment of `cost_a`, whose GPUs `lost` are gone, to that of `cost_b`. O(GPUs x experts).

    PlanError where the models differ, or a lost GPU is none of A's.
    """
    if cost_a.spec != cost_b.spec or cost_a.precision != cost_b.precision:
        raise PlanError("both deployments must be of one model, in one precision.")
    if strangers := [gpu for gpu in lost if not 0 <= gpu < cost_a.deployment.num_gpus]:
        raise PlanError(f"there is no GPU {strangers[0]}: the deployment has {cost_a.deployment.num_gpus}, from 0.")
    change = _Change(cost_a, cost_b, frozenset(lost))
    loads = [change.load(home) for home in change.seats]
    is_same = not any(load.num_bytes for load in loads)
    sequences, recompute_s = _recompute(change, workload)
    before, after = estimate(cost_a, workload), estimate(cost_b, workload)
    during = _during(change, before, after)
    system = cost_b.system
    made = Transition(
        stages=tuple(_by_stage(change, loads)),
        busiest_bytes=max(load.num_bytes for load in loads),
        num_kept_gpus=len(change.seats) - len(change.new),
        num_new_gpus=len(change.new),
        num_kept_replicas=len(change.kept),
        load_s=_load_s(change, loads),
        over_links_s=_over_links_s(change, loads),
        start_s=system.recovery.respawn_s if any(gpu >= cost_a.deployment.num_gpus for gpu in change.new) else 0.0,
        form_s=0.0 if is_same and not lost else system.recovery.form_s,
        restart_s=_restart_s(change),
        sequences=sequences,
        recompute_s=recompute_s,
        before=before.capacity or 0.0,
        during=during,
        after=after.capacity or 0.0,
        keeps_objective=False,
    )
    return replace(made, keeps_objective=_keeps(made, before, after, workload))


@dataclass(frozen=True)
class _Load:
    """What one GPU of the new deployment must take in."""

    gpu: int
    stage: int
    experts: int
    expert_bytes: float
    dense_bytes: float

    @property
    def num_bytes(self) -> float:
        return self.expert_bytes + self.dense_bytes


@dataclass(frozen=True)
class _Change:
    cost_a: Cost
    cost_b: Cost
    lost: frozenset[int]
    _pairs: dict[tuple[Kind, Kind | None], int] = field(default_factory=dict)
    _dense: dict[tuple[Seat, Seat | None], float] = field(default_factory=dict)

    @cached_property
    def holds_a(self) -> Holdings:
        return Holdings(self.cost_a)

    @cached_property
    def holds_b(self) -> Holdings:
        return Holdings(self.cost_b)

    @property
    def a(self) -> Deployment:
        return self.cost_a.deployment

    @property
    def b(self) -> Deployment:
        return self.cost_b.deployment

    @cached_property
    def seats(self) -> dict[Home, int]:
        """Seat of the new deployment -> its GPU. Numbers from A's `num_gpus` on are of GPUs that A did not have."""
        taken = _keep_seats(self) if (self.a.tp, self.a.pp) == (self.b.tp, self.b.pp) else {}
        used = set(taken.values())
        free = deque(gpu for gpu in range(self.a.num_gpus) if gpu not in self.lost and gpu not in used)
        next_new = self.a.num_gpus
        seats = {}
        for home in _homes(self.b):
            if home in taken:
                seats[home] = taken[home]
            elif free:
                seats[home] = free.popleft()
            else:
                seats[home], next_new = next_new, next_new + 1
        return seats

    @cached_property
    def new(self) -> list[int]:
        """GPUs without weights: spares of A, and those that it did not have."""
        return [gpu for gpu in self.seats.values() if gpu >= num_seats(self.a)]

    @cached_property
    def before(self) -> dict[int, Home]:
        """GPU -> its seat in A."""
        return {gpu_of(self.a, *home): home for home in _homes(self.a)}

    @cached_property
    def kept(self) -> list[tuple[int, int]]:
        """(Cell, replica) of B whose KV stays: one replica of A, seat by seat."""
        if (self.a.tp, self.a.pp) != (self.b.tp, self.b.pp):
            return []
        return [home for home in _replicas(self.b) if self._was(home) is not None]

    def _was(self, home: tuple[int, int]) -> tuple[int, int] | None:
        """The replica of A that this one of B is; None: of GPUs that were not one, or sat otherwise."""
        cell, replica = home
        found = set()
        for seat in _seats_of(self.b, replica):
            was = self.before.get(self.seats[cell, seat])
            if was is None or (was[1].stage, was[1].shard) != (seat.stage, seat.shard):
                return None
            found.add((was[0], was[1].replica))
        return found.pop() if len(found) == 1 else None

    def load(self, home: Home) -> _Load:
        """What the GPU in a seat of B lacks."""
        spec, precision = self.cost_b.spec, self.cost_b.precision
        gpu, seat = self.seats[home], home[1]
        was = self.before.get(gpu)
        num = self._num_new_pairs(self.holds_b.kind(home), None if was is None else self.holds_a.kind(was))
        dense = self._dense_bytes(seat._replace(replica=0), None if was is None else was[1]._replace(replica=0))
        return _Load(gpu, seat.stage, num, num * expert_params(spec) * precision.expert_bytes, dense)

    def whole_bytes(self, home: Home) -> float:
        """All that the GPU in a seat of B holds."""
        num = self._num_new_pairs(self.holds_b.kind(home), None)
        dense = self._dense_bytes(home[1]._replace(replica=0), None)
        return num * expert_params(self.cost_b.spec) * self.cost_b.precision.expert_bytes + dense

    def _num_new_pairs(self, needed: Kind, had: Kind | None) -> int:
        """(Layer, expert) pairs that a GPU is to hold and does not."""
        if (needed, had) not in self._pairs:
            pairs = self.holds_b.pairs(needed)
            self._pairs[needed, had] = len(pairs) if had is None else len(pairs - self.holds_a.pairs(had))
        return self._pairs[needed, had]

    def _dense_bytes(self, seat: Seat, was: Seat | None) -> float:
        if (seat, was) not in self._dense:
            had = None if was is None else self.holds_a.dense(was)
            needed = self.holds_b.dense(seat)
            self._dense[seat, was] = lacking_bytes(self.cost_b.spec, self.cost_b.precision, needed, had)
        return self._dense[seat, was]


# -- seats ----------------------------------------------------------------------------------------------------------


def _homes(deployment: Deployment) -> Iterator[Home]:
    seats = deployment.layout.seats()
    return ((cell, seat) for cell in range(deployment.cells) for seat in seats)


def _replicas(deployment: Deployment) -> Iterator[tuple[int, int]]:
    return ((cell, replica) for cell in range(deployment.cells) for replica in range(deployment.dp))


def _seats_of(deployment: Deployment, replica: int) -> Iterator[Seat]:
    return (Seat(stage, replica, shard) for stage in range(deployment.pp) for shard in range(deployment.tp))


def _keep_seats(change: _Change) -> dict[Home, int]:
    """Replicas of A go on as replicas of B: those of the same cell first, whole ones before broken ones.

    They keep their number as far as B has it: their GPUs' experts depend on it.
    """
    alive = {home: _alive(change, home) for home in _replicas(change.a)}
    left = {home: seats for home, seats in alive.items() if seats}
    chosen: dict[tuple[int, int], tuple[int, int]] = {}
    for cell in range(min(change.a.cells, change.b.cells)):
        own = sorted((home for home in left if home[0] == cell), key=lambda home: (-len(left[home]), home))
        chosen |= {home: home for home in own[: change.b.dp] if home[1] < change.b.dp}
        holes = deque((cell, replica) for replica in range(change.b.dp) if (cell, replica) not in chosen)
        for home in own[: change.b.dp]:
            if home[1] >= change.b.dp:
                chosen[holes.popleft()] = home
    others = set(left) - set(chosen.values())
    rest = deque(sorted(others, key=lambda home: (-len(left[home]), home)))
    for home in _replicas(change.b):
        if home not in chosen and rest:
            chosen[home] = rest.popleft()
    return {
        (cell, Seat(seat.stage, replica, seat.shard)): gpu
        for (cell, replica), was in chosen.items()
        for seat, gpu in left[was].items()
    }


def _alive(change: _Change, home: tuple[int, int]) -> dict[Seat, int]:
    gpus = {seat: gpu_of(change.a, home[0], seat) for seat in _seats_of(change.a, home[1])}
    return {seat: gpu for seat, gpu in gpus.items() if gpu not in change.lost}


# -- seconds --------------------------------------------------------------------------------------------------------


def _by_stage(change: _Change, loads: list[_Load]) -> Iterator[StageMove]:
    for stage in range(change.b.pp):
        own = [load for load in loads if load.stage == stage]
        yield StageMove(
            stage,
            sum(load.experts for load in own),
            sum(load.expert_bytes for load in own),
            sum(load.dense_bytes for load in own),
        )


def _load_s(change: _Change, loads: list[_Load]) -> float:
    """Hosts that were there have the checkpoint in their memory. Those that were not read it from their disk."""
    system = change.cost_b.system
    known = range(-(-change.a.num_gpus // system.gpus_per_node))
    from_disk: dict[int, float] = {}
    for load in loads:
        if (node := load.gpu // system.gpus_per_node) not in known:
            from_disk[node] = from_disk.get(node, 0.0) + load.num_bytes
    disk_s = max(from_disk.values(), default=0.0) / (system.disk_gb_s * 1e9)
    return max(disk_s, max(load.num_bytes for load in loads) / (system.load_gb_s * 1e9))


def _restart_s(change: _Change) -> float:
    system = change.cost_b.system
    most = max(change.whole_bytes(home) for home in change.seats)
    return system.recovery.respawn_s + most / (system.load_gb_s * 1e9) + system.recovery.form_s


def _over_links_s(change: _Change, loads: list[_Load]) -> float:
    """Where a cell spans nodes, what a GPU lacks is taken to come from another one's node."""
    system = change.cost_b.system
    spans = max(change.a.cell_gpus, change.b.cell_gpus) > system.gpus_per_node
    rate = (system.inter_gb_s if spans else system.intra_gb_s) * 1e9 * system.efficiency.link
    return max(load.num_bytes for load in loads) / rate


def _recompute(change: _Change, workload: Workload) -> tuple[float, float]:
    """(Sequences whose KV is gone, seconds until the replicas of B have computed it again.)"""
    running = estimate(change.cost_a, workload).concurrency
    num = running / change.a.num_replicas * (change.a.num_replicas - len(change.kept))
    if num <= 0:
        return 0.0, 0.0
    tokens = workload.mean_tokens
    num_chunks = math.ceil(tokens / workload.chunk_tokens)
    size = tokens / num_chunks
    chunk = Step.prompt(size, (tokens - size) / 2, sampled=1 / num_chunks)
    fill_s = change.cost_b.latency_s(chunk) - change.cost_b.interval_s(chunk)
    rounds = math.ceil(num / change.b.num_replicas)
    return num, rounds * num_chunks * change.cost_b.interval_s(chunk) + fill_s


def _during(change: _Change, before: Estimate, after: Estimate) -> float:
    """Requests/s of what stays, and no more than either deployment takes."""
    share = len(change.kept) / change.a.num_replicas
    return min((before.capacity or 0.0) * share, after.capacity or 0.0)


def _keeps(made: Transition, before: Estimate, after: Estimate, workload: Workload) -> bool:
    """What stays takes all that is asked, or it is over before anybody is late who comes when it begins."""
    asked = workload.rate if workload.rate is not None else min(before.rate, after.rate)
    if made.during >= asked * (1 - 1e-6):
        return True
    ttft_s = workload.objective.ttft_s
    return ttft_s is not None and made.after >= asked and made.total_s + after.ttft_p99_s.value <= ttft_s
