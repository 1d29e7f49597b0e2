"""What the loss of a GPU, of two, of a node costs a deployment: the worst of each kind.

At once every cell that lost a worker stands still, while its next epoch forms: all its workers, since a stage's experts
are spread over all replicas. Then its broken replicas rest until their seats are filled again; their other workers hold
experts. A cell without a whole replica, or with an expert that nobody can hold, waits for new workers.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from serve_app.experts.layout import Seat
from serve_app.plan.counts import expert_params
from serve_app.plan.degraded import CellLoss, Kind, State
from serve_app.plan.estimate import Cost, Estimate
from serve_app.plan.footprint import kv_gpu_token_bytes
from serve_app.plan.homes import Group, group, hit_share, homes, longest_stage, slots_needed, worst_one, worst_two
from serve_app.plan.seats import Place, gpu_of, group_nodes, num_seats, place_of
from serve_app.plan.workload import Workload

EXACT_PAIRS = 64  # experts of a group whose placement is made: it takes 1 ms for these, and grows with the square


@dataclass(frozen=True)
class Losses:
    """The states that a deployment can be in after the loss of a GPU, of two, of a node. The worst of each kind."""

    states: tuple[State, ...]
    coverage: float  # share of the longest stage's experts that have a live standby
    standby_needed: int | None  # slots on each worker, for one lost in a stage; None: nobody would be left to hold them

    def state(self, kind: Kind) -> State | None:
        return next((state for state in self.states if state.kind == kind), None)

    @property
    def gpu(self) -> State:
        """One GPU is lost: N-1."""
        found = self.state("gpu")
        assert found is not None
        return found

    @property
    def two(self) -> list[State]:
        """Two GPUs are lost, in each of the ways there are: N-2."""
        return [state for state in self.states if state.kind in ("two of a replica", "two replicas", "two cells")]

    @property
    def worst_two(self) -> State | None:
        """None: there is only one GPU."""
        return min(self.two, key=lambda state: (state.capacity, state.capacity_at_once), default=None)

    @property
    def worst_capacity(self) -> float:
        """Requests/s after the loss of one GPU, while it is being repaired."""
        return self.gpu.capacity_at_once

    @property
    def degraded_capacity(self) -> float:
        """Requests/s after the loss of one GPU, until its seat is filled again."""
        return self.gpu.capacity

    @property
    def worst_survivable(self) -> State | None:
        """Of all states in which something serves without any new worker, the one that is left with least."""
        able = [state for state in self.states if state.is_survivable]
        return min(able, key=lambda state: (state.capacity, state.capacity_at_once), default=None)

    @property
    def blast_gpus(self) -> int:
        """That stand still after the loss of one GPU, until its experts have homes."""
        return self.gpu.blast_gpus

    @property
    def blast_gpus_after(self) -> int:
        """That serve no replica from then on, until its seat is filled again."""
        return self.gpu.blast_gpus_after


def losses(cost: Cost, workload: Workload, healthy: Estimate, *, exact_pairs: int = EXACT_PAIRS) -> Losses:
    """`healthy`: the deployment's estimate under the workload. `exact_pairs`: groups of up to so many experts, and
    workers, have their placement made and repaired; for others live copies are counted as means."""
    case = _Case(cost, workload, healthy, exact_pairs)
    of = group(cost.spec, cost.deployment, case.longest)
    needed = None
    if cost.deployment.ep > 1:
        needed = max(0, slots_needed(of.num_pairs, of.num_workers, 1) - of.slots.primary)
    return Losses(tuple(case.states()), of.coverage, needed)


def after(cost: Cost, workload: Workload, healthy: Estimate, gpus: Sequence[int], kind: Kind = "gpu") -> State:
    """The state after the loss of these very GPUs. Raises PlanError for one that there is not."""
    return _Case(cost, workload, healthy, math.inf).state(kind, gpus)


# -- which GPUs -----------------------------------------------------------------------------------------------------


class _Case:
    """One deployment under one workload."""

    def __init__(self, cost: Cost, workload: Workload, healthy: Estimate, exact_pairs: float) -> None:
        self.cost, self.workload, self.healthy, self.exact_pairs = cost, workload, healthy, exact_pairs
        self.deployment = cost.deployment
        self.longest = longest_stage(cost.spec, cost.deployment)
        self._groups: dict[tuple[int, int], Group] = {}

    def states(self) -> Iterator[State]:
        if self.deployment.spares:
            yield self.state("spare", [num_seats(self.deployment)])
        one = self._in_longest(worst_one(self._group(0, self.longest), self.exact_pairs))
        yield self.state("gpu", one)
        for kind, gpus in self._twos(one[0]):
            yield self.state(kind, gpus)
        node = self._worst_node()
        if node is not None:
            yield node

    def _twos(self, one: int) -> Iterator[tuple[Kind, list[int]]]:
        deployment, of = self.deployment, self._group(0, self.longest)
        shards = worst_two(of, deployment.tp, self.exact_pairs, same_replica=True)
        if shards is not None:
            yield "two of a replica", self._in_longest(shards)
        elif deployment.pp > 1:
            other = 1 if self.longest == 0 else 0
            yield "two of a replica", [one, one + (other - self.longest) * deployment.ep]
        replicas = worst_two(of, deployment.tp, self.exact_pairs, same_replica=False)
        if replicas is not None:
            yield "two replicas", self._in_longest(replicas)
        if deployment.cells > 1:
            yield "two cells", [one, one + deployment.cell_gpus]

    def _in_longest(self, ranks: frozenset[int]) -> list[int]:
        first = gpu_of(self.deployment, 0, Seat(self.longest, 0, 0))
        return sorted(first + rank for rank in ranks)

    def _worst_node(self) -> State | None:
        """Nodes that cut the cells alike are looked at once. None where a node is a single GPU."""
        per_node, total = self.cost.system.gpus_per_node, num_seats(self.deployment)
        if min(per_node, total) < 2:
            return None
        period = min(total, math.lcm(per_node, self.deployment.cell_gpus))
        nodes = [
            [place_of(self.deployment, per_node, gpu) for gpu in range(start, min(start + per_node, total))]
            for start in range(0, period, per_node)
        ]
        worst = min(nodes, key=self._what_is_left)
        return self.state("node", [place.gpu for place in worst])

    def _what_is_left(self, places: Sequence[Place]) -> tuple[int, int, int]:
        """Least is worst: replicas that go on to serve, cells that lose nobody, and the fullest group's room."""
        broken: dict[int, set[int]] = defaultdict(set)
        ranks: dict[tuple[int, int], int] = defaultdict(int)
        for place in places:
            assert place.seat is not None
            broken[place.cell].add(place.seat.replica)
            ranks[place.cell, place.seat.stage] += 1
        room = {key: self._room(*key, num_lost) for key, num_lost in ranks.items()}
        stuck = {cell for (cell, _), left in room.items() if left < 0}
        gone = sum(self.deployment.dp if cell in stuck else len(replicas) for cell, replicas in broken.items())
        return -gone, -len(broken), min(room.values())

    def _room(self, cell: int, stage: int, num_lost: int) -> int:
        """Experts that each survivor of a group can still hold once all have homes; below 0 where not all can."""
        of = self._group(cell, stage)
        if num_lost == of.num_workers:
            return -of.num_pairs
        most = of.slots.primary + of.slots.standby + self.room_beyond
        return most - slots_needed(of.num_pairs, of.num_workers, num_lost)

    # -- what becomes of it -----------------------------------------------------------------------------------------

    def state(self, kind: Kind, gpus: Sequence[int]) -> State:
        by_cell: dict[int, list[Seat]] = defaultdict(list)
        for gpu in gpus:
            place = place_of(self.deployment, self.cost.system.gpus_per_node, gpu)
            if place.seat is not None:
                by_cell[place.cell].append(place.seat)
        cells = tuple(self._cell(cell, tuple(seats)) for cell, seats in by_cell.items())
        return State(kind, tuple(gpus), cells, self.cost, self.workload, self.healthy)

    def _cell(self, cell: int, seats: tuple[Seat, ...]) -> CellLoss:
        by_stage: dict[int, set[int]] = defaultdict(set)
        for seat in seats:
            by_stage[seat.stage].add(self.deployment.layout.group_rank(seat))
        found, missed = [], 1.0
        for stage, ranks in by_stage.items():
            of, lost = self._group(cell, stage), frozenset(ranks)
            found.append(homes(of, lost, self.room_beyond, self.exact_pairs))
            missed *= 1.0 - hit_share(of, lost, self.cost.spec.top_k)
        return CellLoss(cell, seats, tuple(found), 1.0 - missed)

    def _group(self, cell: int, stage: int) -> Group:
        if (cell, stage) not in self._groups:
            nodes = group_nodes(self.deployment, self.cost.system.gpus_per_node, cell, stage)
            self._groups[cell, stage] = group(self.cost.spec, self.deployment, stage, nodes)
        return self._groups[cell, stage]

    @cached_property
    def room_beyond(self) -> int:
        """Experts that fit on a GPU beside all else and the KV of one sequence, the longest."""
        cost, system = self.cost, self.cost.system
        kv = self.workload.most_tokens * kv_gpu_token_bytes(cost.spec, cost.precision, self.deployment)
        free = system.memory_share * system.memory_gb * 1e9 - self.healthy.footprint.fixed_bytes - kv
        return max(0, math.floor(free / (expert_params(cost.spec) * cost.precision.expert_bytes)))
