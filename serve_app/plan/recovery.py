"""How long a deployment takes to come back from a loss, phase by phase, from bandwidths and what was measured.

    notice    until the loss is known
    refill    only where no replica is whole: until somebody has the seat
    form      the epoch without the lost, or with the new
    load      experts without a live copy, by the survivors that they landed on
    step      the step in flight is run again: whole replicas emit tokens. Or, in a cell that waited, a first prompt
    re-add    what the broken replicas had is computed again from its tokens: all streams flow

and, while that goes on, `restore`: until every seat is filled again.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from serve_app.plan.degraded import State
from serve_app.plan.estimate import Cost, Estimate
from serve_app.plan.ops import Step
from serve_app.plan.workload import Objective, Workload

# process: it died, its GPU is well. hung: it lives and says nothing. gpu: hardware, that must be replaced.
Cause = Literal["process", "hung", "gpu"]


@dataclass(frozen=True)
class Phase:
    name: str
    seconds: float
    loaded_bytes: float = 0.0  # by the GPU that loads most


@dataclass(frozen=True)
class Budget:
    """Seconds from the loss. What `failover` and `restore` begin with, notice, is the same time."""

    cause: Cause
    failover: tuple[Phase, ...]  # until all streams flow again
    restore: tuple[Phase, ...]  # until every seat is filled again
    is_waiting: bool  # nobody of the hit cells serves before a seat is filled
    uses_spares: bool

    @property
    def first_token_s(self) -> float:
        """Until the first stream of the hit cells flows again: of a whole replica, where there is one."""
        return sum(phase.seconds for phase in self.failover if phase.name != "re-add")

    @property
    def all_streams_s(self) -> float:
        """Until the last stream flows again."""
        return sum(phase.seconds for phase in self.failover)

    @property
    def whole_s(self) -> float:
        """Until the capacity is what it was."""
        return max(self.all_streams_s, sum(phase.seconds for phase in self.restore))

    def seconds(self, name: str) -> float:
        """Of the failover's phase of this name; 0 where it has none."""
        return sum(phase.seconds for phase in self.failover if phase.name == name)

    def keeps(self, objective: Objective) -> bool:
        """Whether all streams flow again in the time that they may take."""
        return objective.recovery_s is None or self.all_streams_s <= objective.recovery_s


def budget(state: State, cause: Cause = "gpu", *, from_disk: bool = False) -> Budget:
    """Of a loss that is understood, for a state of `loss.losses`. `from_disk`: the hosts do not have the checkpoint in
    memory. Where a GPU is broken and there is no spare, its replacement is waited for."""
    return _Recovery(state, cause, from_disk).budget()


class _Recovery:
    def __init__(self, state: State, cause: Cause, from_disk: bool) -> None:
        self.state, self.cause, self.from_disk = state, cause, from_disk
        self.cost: Cost = state.cost
        self.workload: Workload = state.workload
        self.healthy: Estimate = state.healthy
        self.system, self.deployment = state.cost.system, state.cost.deployment
        self.known = self.system.recovery

    def budget(self) -> Budget:
        dp = self.deployment.dp
        needed = max((cell.seats_needed(dp) for cell in self.state.cells), default=0)
        lost = max((len(cell.seats) for cell in self.state.cells), default=0)
        if not lost:
            return Budget(self.cause, (), (), is_waiting=False, uses_spares=False)
        failover = self._waiting(needed, lost) if needed else self._serving()
        return Budget(
            self.cause,
            tuple(phase for phase in failover if phase.seconds or phase.loaded_bytes),
            (self._notice(), *self._refill(lost, is_serving=not needed), self._form()),
            is_waiting=needed > 0,
            uses_spares=self.deployment.spares > 0,
        )

    def _serving(self) -> Iterator[Phase]:
        """A replica is whole in every cell that is hit."""
        yield self._notice()
        yield self._form()
        yield self._load()
        yield Phase("step", self._step_s())
        yield Phase("re-add", max(self._readd_s(cell.num_broken) for cell in self.state.cells))

    def _waiting(self, num_needed: int, num_lost: int) -> Iterator[Phase]:
        """All of the cell's streams are computed again: by all replicas, or by the first that is whole."""
        yield self._notice()
        yield from self._refill(num_needed, is_serving=False)
        yield self._form()
        first_s, each = self._prompt_s(0.0), self._sequences()
        yield Phase("step", first_s)
        num = each if num_needed == num_lost else each * self.deployment.dp
        yield Phase("re-add", max(0.0, self._all_prompts_s(num, 0.0) - first_s))

    # -- phases -----------------------------------------------------------------------------------------------------

    def _notice(self) -> Phase:
        return Phase("notice", self.known.hung_s if self.cause == "hung" else self.known.notice_s)

    def _form(self) -> Phase:
        collective = self.known.collective_s if self.system.kind == "gpu" and self.deployment.tp > 1 else 0.0
        return Phase("form", self.known.form_s + collective)

    def _load(self) -> Phase:
        """The survivors of a node load at the same time: from its host's memory each at its own rate, from disk
        together at the node's."""
        most = self.state.worker_bytes
        if not self.from_disk:
            return Phase("load", most / (self.system.load_gb_s * 1e9), most)
        on_node = min(self.system.gpus_per_node, self.deployment.ep)
        return Phase("load", min(self.state.landed_bytes, most * on_node) / (self.system.disk_gb_s * 1e9), most)

    def _refill(self, num_seats: int, *, is_serving: bool) -> Iterator[Phase]:
        """Until the last of so many seats of a cell has a worker that has loaded. A spare's process runs already."""
        weights = self.healthy.footprint.weights_bytes
        seconds = weights / (self.system.load_gb_s * 1e9)
        if self.from_disk:
            seconds = weights * min(num_seats, self.system.gpus_per_node) / (self.system.disk_gb_s * 1e9)
        if num_seats > self.deployment.spares:
            if self.cause == "gpu":
                yield Phase("replace", self.known.replace_h * 3600)
            yield Phase("respawn", self.known.respawn_serving_s if is_serving else self.known.respawn_s)
        yield Phase("load weights", seconds, weights)

    def _step_s(self) -> float:
        rows = max(1.0, self._sequences() / self.deployment.pp)
        return self.cost.latency_s(Step.decode(rows, self.workload.mean_tokens))

    # -- what is computed again -------------------------------------------------------------------------------------

    def _sequences(self) -> float:
        """Of one replica, at the moment of the loss; those that wait for a place have nothing to lose."""
        return max(1.0, min(self.healthy.concurrency, self.healthy.max_sequences) / self.deployment.num_replicas)

    def _readd_s(self, num_broken: int) -> float:
        """The streams of broken replicas, on their siblings, who have in their caches what all prompts begin with."""
        siblings = self.deployment.dp - num_broken
        cached = self.workload.isl.mean * self.workload.prefix_share
        return self._all_prompts_s(max(1.0, self._sequences() * num_broken / siblings), cached)

    def _all_prompts_s(self, num_sequences: float, cached: float) -> float:
        """So many sequences on one replica, one after the other, in chunks."""
        todo = self.workload.mean_tokens - cached
        num_chunks = math.ceil(todo / self.workload.chunk_tokens)
        size = todo / num_chunks
        middle = Step.prompt(size, cached + (todo - size) / 2, sampled=1 / num_chunks)
        return (num_sequences - 1) * num_chunks * self.cost.interval_s(middle) + self._prompt_s(cached)

    def _prompt_s(self, cached: float) -> float:
        return self.cost.prompt_s(self.workload.mean_tokens, self.workload.chunk_tokens, cached=cached)
