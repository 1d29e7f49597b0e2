"""A deployment that has lost GPUs: who stops, where the experts go, what is left to serve with, and how well.

A replica that is left is taken to serve what it did before. Its experts are on fewer workers, but fewer replicas ask
for them: for one shard that is exactly the same, with more shards it serves somewhat more than is said here.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from serve_app.experts.layout import Seat
from serve_app.plan.bounds import Bounds
from serve_app.plan.counts import expert_params
from serve_app.plan.estimate import Cost, Estimate, estimate
from serve_app.plan.homes import Homes
from serve_app.plan.workload import Objective, Workload

Kind = Literal["spare", "gpu", "two of a replica", "two replicas", "two cells", "node"]


@dataclass(frozen=True)
class CellLoss:
    """What one cell is left with."""

    cell: int
    seats: tuple[Seat, ...]  # lost
    homes: tuple[Homes, ...]  # of each stage that lost a worker
    hit_share: float  # of tokens one of whose experts has its primary on a lost worker

    @property
    def num_broken(self) -> int:
        """Replicas."""
        return len({seat.replica for seat in self.seats})

    @property
    def num_homeless(self) -> int:
        return sum(stage.num_homeless for stage in self.homes)

    def num_serving(self, dp: int) -> int:
        """Replicas that serve once the experts have homes. 0: the cell waits for workers, and nothing moves in it."""
        return 0 if self.num_homeless else dp - self.num_broken

    def seats_needed(self, dp: int) -> int:
        """Seats that must be filled before the cell serves: those of its least broken replica, if it is only that."""
        if self.num_serving(dp):
            return 0
        if self.num_homeless:
            return len(self.seats)
        return min(sum(seat.replica == replica for seat in self.seats) for replica in range(dp))


@dataclass(frozen=True)
class State:
    """A deployment after a loss, until the seats are filled again. All cells together, where nothing else is said."""

    kind: Kind
    gpus: tuple[int, ...]  # lost
    cells: tuple[CellLoss, ...]  # that lost a worker
    cost: Cost
    workload: Workload
    healthy: Estimate

    # -- who stops --------------------------------------------------------------------------------------------------

    @property
    def num_replicas(self) -> int:
        """That serve once the experts have homes."""
        deployment = self.cost.deployment
        left = sum(cell.num_serving(deployment.dp) for cell in self.cells)
        return (deployment.cells - len(self.cells)) * deployment.dp + left

    @property
    def share_at_once(self) -> float:
        """Of the replicas, while epochs form."""
        return 1.0 - len(self.cells) / self.cost.deployment.cells

    @property
    def share(self) -> float:
        """Of the replicas, from then on."""
        return self.num_replicas / self.cost.deployment.num_replicas

    @property
    def is_survivable(self) -> bool:
        """Something serves without any new worker."""
        return self.num_replicas > 0

    @property
    def blast_gpus(self) -> int:
        """That stand still at once, the lost ones included."""
        return len(self.cells) * self.cost.deployment.cell_gpus

    @property
    def blast_gpus_after(self) -> int:
        """That serve no replica until the seats are filled: those of broken replicas, or of cells that wait."""
        deployment = self.cost.deployment
        broken = sum(deployment.dp - cell.num_serving(deployment.dp) for cell in self.cells)
        return broken * deployment.tp * deployment.pp

    # -- experts ----------------------------------------------------------------------------------------------------

    @cached_property
    def homes(self) -> tuple[Homes, ...]:
        return tuple(stage for cell in self.cells for stage in cell.homes)

    @property
    def fits_slots(self) -> bool:
        return not any(stage.num_beyond for stage in self.homes)

    @property
    def hit_share(self) -> float:
        """Of tokens of a hit cell that meet an expert whose primary is lost; of the worst cell."""
        return max((cell.hit_share for cell in self.cells), default=0.0)

    @cached_property
    def mended(self) -> tuple[Homes, ...]:
        """Of the cells that go on: in the others nothing moves."""
        dp = self.cost.deployment.dp
        return tuple(stage for cell in self.cells if cell.num_serving(dp) for stage in cell.homes)

    @property
    def landed_bytes(self) -> float:
        """That survivors load, all together."""
        return sum(stage.num_landed for stage in self.mended) * self._expert_bytes

    @property
    def worker_bytes(self) -> float:
        """Of these, what the one loads that takes most."""
        return max((stage.most_landed for stage in self.mended), default=0) * self._expert_bytes

    @property
    def _beyond_bytes(self) -> float:
        """Of experts beyond the slots, on the fullest survivor."""
        return max((stage.most_beyond for stage in self.mended), default=0) * self._expert_bytes

    @property
    def _expert_bytes(self) -> float:
        return expert_params(self.cost.spec) * self.cost.precision.expert_bytes

    # -- what is left to serve with ---------------------------------------------------------------------------------

    @property
    def capacity_at_once(self) -> float:
        """Requests/s with the objective kept, while epochs form: cells that stand still serve nothing."""
        return (self.healthy.capacity or 0.0) * self.share_at_once

    @property
    def capacity(self) -> float:
        """The same from then on, until the seats are filled again."""
        healthy, deployment = self.healthy.capacity or 0.0, self.cost.deployment
        if not self._beyond_bytes:
            return healthy * self.share
        whole = (deployment.cells - len(self.cells)) * deployment.dp
        crowded = self.degraded.capacity or 0.0
        return healthy * whole / deployment.num_replicas + crowded * (1 - whole / self.num_replicas)

    @cached_property
    def degraded(self) -> Estimate:
        """The same load on the replicas that are left. Where experts are beyond the slots, all are taken to have as
        little room for KV as the fullest."""
        if not self.is_survivable:
            raise ValueError(f"after the loss of {self.kind} nothing serves, so that there is nothing to estimate.")
        share = self.share
        found = estimate(self._crowded, _scaled(self.workload, 1 / share))
        return replace(
            found,
            max_sequences=round(found.max_sequences * share),
            concurrency=found.concurrency * share,
            rate=found.rate * share,
            output_tokens_s=found.output_tokens_s * share,
            prompt_tokens_s=found.prompt_tokens_s * share,
            capacity=None if found.capacity is None else found.capacity * share,
        )

    @property
    def _crowded(self) -> Cost:
        """With less memory, by the experts beyond the slots."""
        if not self._beyond_bytes:
            return self.cost
        system = self.cost.system
        left_gb = system.memory_gb - self._beyond_bytes / system.memory_share / 1e9
        return replace(self.cost, system=system.model_copy(update={"memory_gb": left_gb}))

    @property
    def keeps_objective(self) -> bool:
        """At the same load, once the experts have homes."""
        if not self.is_survivable:
            return False
        if self.workload.rate is not None and self.healthy.capacity is not None:
            return self.workload.rate <= self.capacity * (1 + 1e-6)
        return keeps(self.degraded, self.workload.objective)

    @property
    def at_once_s(self) -> float | None:
        """Until the last has its first token, where the workload's sequences come all together: a bound from the
        hardware, with the pipeline's fill as when all replicas serve. None: it has a rate, or nothing serves."""
        if self.workload.concurrency is None or not self.is_survivable:
            return None
        cost = self.cost
        bounds = Bounds(cost.spec, cost.precision, cost.system, cost.deployment)
        return bounds.at_once_s(self.workload.concurrency, self.workload.isl.mean) / self.share


def keeps(found: Estimate, objective: Objective) -> bool:
    """Whether the slowest of a hundred requests keeps it, and nobody waits without end."""
    if not found.fits or found.is_overloaded:
        return False
    is_soon = objective.ttft_s is None or found.ttft_p99_s.value <= objective.ttft_s
    return is_soon and (objective.tpot_ms is None or found.tpot_s.value * 1e3 <= objective.tpot_ms)


def _scaled(workload: Workload, factor: float) -> Workload:
    """The load that falls on what would be a whole deployment."""
    if workload.rate is not None:
        return replace(workload, rate=workload.rate * factor)
    assert workload.concurrency is not None
    return replace(workload, concurrency=math.ceil(workload.concurrency * factor - 1e-9))
