"""The deployments of a number of GPUs, best first: with what each keeps and misses.

Everything that is legal is estimated; nothing is pruned before. What a loss leaves of a deployment takes longer to work
out, so that this is done for the first places only: see `_by_worst`.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol

from serve_app.errors import PlanError
from serve_app.model.spec import ModelSpec
from serve_app.plan import pareto
from serve_app.plan.bounds import Bounds
from serve_app.plan.counts import Precision
from serve_app.plan.deployment import Deployment
from serve_app.plan.estimate import Cost, Estimate, estimate
from serve_app.plan.footprint import kv_gpu_token_bytes
from serve_app.plan.legal import Rejected, legal, notes
from serve_app.plan.system import System
from serve_app.plan.workload import Workload

Rank = Literal["healthy", "worst"]
NUM_PLACES = 10  # for which losses are worked out
SLACK = 1e-4  # relative; what rounding may put beyond a limit
SAME = 0.01  # relative; no roofline is right to a percent, so nothing within it is called better


class HasWorst(Protocol):
    """What losses leave of a deployment: `plan.loss.Losses`."""

    @property
    def worst_capacity(self) -> float:
        """Requests/s with the objective kept in the worst state after the loss of one GPU."""


FindLosses = Callable[[Cost, Workload, Estimate], HasWorst]


class Miss(NamedTuple):
    """An objective that is not kept."""

    name: str
    value: float
    limit: float
    unit: str

    @property
    def factor(self) -> float:
        """How many times too much, or too little: above 1."""
        large, small = max(self.value, self.limit), min(self.value, self.limit)
        return large / small if small > 0 else math.inf

    def __str__(self) -> str:
        return f"{self.name} {self.value:.4g} {self.unit} instead of {self.limit:.4g} {self.unit}"


@dataclass(frozen=True)
class Candidate:
    """A deployment that fits, and what is expected of it."""

    cost: Cost
    estimate: Estimate
    notes: tuple[str, ...] = ()
    misses: tuple[Miss, ...] = ()
    losses: HasWorst | None = None  # None: not worked out

    @property
    def deployment(self) -> Deployment:
        return self.estimate.deployment

    @property
    def worst_capacity(self) -> float | None:
        """Requests/s in the worst state after the loss of one GPU; None: not worked out."""
        return None if self.losses is None else self.losses.worst_capacity

    @property
    def worst_miss(self) -> float:
        """How many times too much or too little the worst objective is; 1 where all are kept."""
        return max((miss.factor for miss in self.misses), default=1.0)


@dataclass(frozen=True)
class Found:
    """What a search came to."""

    candidates: list[Candidate]  # best first; those that miss the objective behind those that keep it
    rejected: list[Rejected]
    pareto: list[Candidate]  # none other is better in throughput per GPU, TTFT, TPOT, GPUs and blast radius
    nearest: str | None  # where none keeps the objective: the nearest miss and what would have to change

    @property
    def best(self) -> Candidate | None:
        return self.candidates[0] if self.candidates else None


@dataclass(frozen=True)
class Search:
    """What all candidates have in common. `checks`: further objectives, each says what a candidate misses."""

    spec: ModelSpec
    precision: Precision
    system: System
    workload: Workload
    standby: int | None = None
    strict: bool = False
    rank: Rank = "healthy"
    losses: FindLosses | None = None
    checks: Sequence[Callable[[Candidate], Sequence[Miss]]] = ()
    num_places: int = NUM_PLACES

    def of(self, deployments: Iterable[Deployment], rejected: Iterable[Rejected]) -> Found:
        """Estimate, refuse what does not fit or, if `strict`, misses the objective, and rank the others."""
        refused = list(rejected)
        fitting = []
        for deployment in deployments:
            found = self.candidate(deployment)
            if isinstance(found, Rejected):
                refused.append(found)
            else:
                fitting.append(found)
        front = [fitting[index] for index in pareto.front([_axes(candidate) for candidate in fitting])]
        nearest = None if any(not found.misses for found in fitting) else self._nearest(fitting, refused)
        if self.strict:
            refused += [Rejected(found.deployment, _missing(found)) for found in fitting if found.misses]
            fitting = [found for found in fitting if not found.misses]
            front = [found for found in front if not found.misses]
        return Found(self.ranked(fitting), refused, front, nearest)

    def candidate(self, deployment: Deployment) -> Candidate | Rejected:
        """Where the slots that a loss takes do not fit and nobody asked for them: without."""
        cost = Cost(self.spec, self.precision, self.system, deployment)
        found = estimate(cost, self.workload)
        remarks = notes(self.spec, deployment, self.system.gpus_per_node)
        if not found.fits and self.standby is None and deployment.standby:
            remarks.append(f"no room for the {deployment.standby} standby slots that the loss of a worker takes")
            cost = replace(cost, deployment=replace(deployment, standby=0))
            found = estimate(cost, self.workload)
        if not found.fits:
            return Rejected(deployment, _too_large(cost, found, self.workload))
        if self.workload.concurrency is not None and found.is_overloaded:
            remarks.append(
                f"room for {found.max_sequences:,} of {self.workload.concurrency:,} sequences, the others wait"
            )
        bare = Candidate(cost, found, tuple(remarks))
        misses = [*self._misses(cost, found), *(miss for check in self.checks for miss in check(bare))]
        return replace(bare, misses=tuple(misses))

    def _misses(self, cost: Cost, found: Estimate) -> Iterator[Miss]:
        objective, rate = self.workload.objective, self.workload.rate
        for name, value, limit, unit in (
            ("TTFT p99", found.ttft_p99_s.value, objective.ttft_s, "s"),
            ("TPOT", found.tpot_s.value * 1e3, objective.tpot_ms, "ms"),
        ):
            if limit is not None and value > limit * (1 + SLACK):
                yield Miss(name, value, limit, unit)
        if found.is_overloaded and rate is not None:
            yield Miss("throughput", found.rate, rate, "requests/s")
        if (wanted := objective.prefill_tokens_ms) is not None:
            bounds = Bounds(self.spec, self.precision, self.system, cost.deployment)
            reached = bounds.prefill_tokens_ms(self.workload.isl.mean)
            if reached < wanted * (1 - SLACK):
                yield Miss("prefill", reached, wanted, "tokens/ms on a GPU")

    # -- ranking ----------------------------------------------------------------------------------------------------

    def ranked(self, candidates: list[Candidate]) -> list[Candidate]:
        """Best first: those that miss the objective behind those that keep it."""
        keeping = sorted((one for one in candidates if not one.misses), key=lambda one: -self._healthy(one.estimate))
        missing = sorted((one for one in candidates if one.misses), key=lambda one: one.worst_miss)
        ranked = [*self._in_bands(keeping), *missing]
        if self.rank == "worst":
            return self._by_worst(ranked)
        return [self._with_losses(found) for found in ranked[: self.num_places]] + ranked[self.num_places :]

    def _in_bands(self, fastest_first: list[Candidate]) -> Iterator[Candidate]:
        """Those that this model cannot tell apart are ordered by what a loss stops, and then by the wait."""
        rest = fastest_first
        while rest:
            limit = self._healthy(rest[0].estimate) * (1 - SAME)
            band = [one for one in rest if self._healthy(one.estimate) >= limit]
            yield from sorted(band, key=lambda one: (one.deployment.cell_gpus, one.estimate.ttft_s.value))
            rest = rest[len(band) :]

    def _healthy(self, found: Estimate) -> float:
        """Output tokens/s of a GPU; with a rate, the requests/s of a GPU that it could take."""
        if self.workload.rate is None:
            return found.output_tokens_s_gpu
        return (found.capacity or 0.0) / found.deployment.num_gpus

    def _by_worst(self, ranked: list[Candidate]) -> list[Candidate]:
        """By capacity per GPU in the worst state after a loss, which is never above the healthy one.

        So candidates are looked at by their healthy capacity, and no more of them once the first `num_places` are above
        the healthy capacity of all the others: those follow behind as they were.
        """
        found: list[Candidate] = []
        others = sorted(ranked, key=lambda one: (bool(one.misses), -_capacity_gpu(one.estimate)))
        while others:
            best = sorted(found, key=_worst_key)[: self.num_places]
            bound = bool(others[0].misses), -_capacity_gpu(others[0].estimate)
            if len(best) == self.num_places and _worst_key(best[-1])[:2] < bound:
                break
            found.append(self._with_losses(others.pop(0)))
        return sorted(found, key=_worst_key) + others

    def _with_losses(self, found: Candidate) -> Candidate:
        if self.losses is None or found.losses is not None:
            return found
        return replace(found, losses=self.losses(found.cost, self.workload, found.estimate))

    # -- where none will do -------------------------------------------------------------------------------------------

    def _nearest(self, candidates: list[Candidate], refused: list[Rejected]) -> str:
        if not candidates:
            return _nothing_fits(refused)
        able = [found for found in candidates if found.estimate.capacity and _only_load(found)]
        if able:
            best = max(able, key=lambda found: _capacity_gpu(found.estimate))
            return self._nearest_load(best)
        best = min(candidates, key=lambda found: found.worst_miss)
        misses = " and ".join(map(str, best.misses))
        return (
            f"No layout keeps the objective at any load: the nearest, {best.deployment}, has {misses}; the objective"
            " would have to allow that, the lengths be shorter, or the hardware faster."
        )

    def _nearest_load(self, best: Candidate) -> str:
        found, misses = best.estimate, " and ".join(map(str, best.misses))
        assert found.capacity is not None and found.capacity_sequences is not None
        at_a_time = math.floor(found.capacity_sequences)
        asked = self.workload.rate or self.workload.concurrency or 0
        taken = found.capacity if self.workload.rate is not None else found.capacity_sequences
        num = math.ceil(found.deployment.num_gpus * asked / taken)
        return (
            f"No layout keeps the objective under this load: the nearest, {best.deployment}, has {misses}; it keeps it"
            f" up to {found.capacity:.4g} requests/s ({at_a_time:,} sequences at a time), so that the load takes about"
            f" {num:,} GPUs."
        )


def search(
    spec: ModelSpec,
    precision: Precision,
    system: System,
    workload: Workload,
    num_gpus: int,
    *,
    standby: int | None = None,
    spares: int = 0,
    strict: bool = False,
    rank: Rank = "healthy",
    losses: FindLosses | None = None,
    checks: Sequence[Callable[[Candidate], Sequence[Miss]]] = (),
    num_places: int = NUM_PLACES,
    across_nodes: bool = False,
) -> Found:
    """All deployments of `num_gpus`, ranked.

    `standby`: slots beyond the primaries; None: the fewest that survive the loss of one worker of a stage. `spares`:
    warm workers of each cell. `strict`: what misses the objective is left out. `rank`: by output tokens/s per GPU (with
    a rate, by capacity), or by the capacity in the worst state after the loss of one GPU. `losses`: what a loss leaves;
    for rank `worst` the default is `plan.loss.losses`. `checks`: further objectives. `num_places`: candidates that have
    their losses worked out, the first of the ranking. `across_nodes`: expert groups may be larger than a node. Raises
    PlanError where the numbers allow no deployment at all.
    """
    check_possible(spec, precision, system, workload)
    if num_gpus < 1:
        raise PlanError(f"the number of GPUs must be at least 1, not {num_gpus}")
    deployments, rejected = legal(
        spec,
        num_gpus,
        gpus_per_node=system.gpus_per_node,
        standby=standby,
        spares=spares,
        across_nodes=across_nodes,
    )
    if not deployments:
        why = rejected[0].reason if rejected else f"{spares} spares of each cell leave none for its seats."
        raise PlanError(f"{num_gpus} GPUs allow no layout: {why}")
    found = Search(
        spec, precision, system, workload, standby, strict, rank, default_losses(rank, losses), checks, num_places
    )
    return found.of(deployments, rejected)


def default_losses(rank: Rank, losses: FindLosses | None) -> FindLosses | None:
    """Those that a ranking needs."""
    if losses is not None or rank == "healthy":
        return losses
    from serve_app.plan.loss import losses as all_losses  # noqa: PLC0415  # only where it is asked for

    return all_losses


def check_possible(spec: ModelSpec, precision: Precision, system: System, workload: Workload) -> None:
    """PlanError for what makes every deployment impossible."""
    if workload.most_tokens > spec.max_positions:
        raise PlanError(
            f"isl {workload.isl.most} and osl {workload.osl.most} make {workload.most_tokens} tokens, more than the"
            f" {spec.max_positions} positions of the model"
        )
    try:
        system.peak_flops(precision.compute)
    except ValueError as error:
        raise PlanError(str(error).rstrip(".")) from None


def _axes(found: Candidate) -> tuple[float, ...]:
    """Of the Pareto front: less is better."""
    one, deployment = found.estimate, found.deployment
    speed, ttft_s, tpot_s = one.output_tokens_s_gpu, one.ttft_s.value, one.tpot_s.value
    return -speed, ttft_s, tpot_s, deployment.num_gpus, deployment.cell_gpus


def _capacity_gpu(found: Estimate) -> float:
    return (found.capacity or 0.0) / found.deployment.num_gpus


def _worst_key(found: Candidate) -> tuple[bool, float, float, int]:
    """Least is best."""
    worst = (found.worst_capacity or 0.0) / found.deployment.num_gpus
    return bool(found.misses), -worst, -_capacity_gpu(found.estimate), found.deployment.cell_gpus


def _only_load(found: Candidate) -> bool:
    """Whether all that it misses it would keep under less load."""
    return all(miss.name in ("TTFT p99", "TPOT", "throughput") for miss in found.misses)


def _missing(found: Candidate) -> str:
    return "It misses the objective: " + " and ".join(map(str, found.misses)) + "."


def _too_large(cost: Cost, found: Estimate, workload: Workload) -> str:
    """What one sequence would need, the largest parts first."""
    held, system = found.footprint, cost.system
    kv = workload.most_tokens * kv_gpu_token_bytes(cost.spec, cost.precision, cost.deployment)
    parts = {
        "expert weights": held.experts_bytes,
        "standby slots": held.standby_bytes,
        "other weights": held.dense_bytes + held.vocabulary_bytes,
        "KV of one sequence": kv,
        "a step": held.step_bytes,
        "the process": held.runtime_bytes,
    }
    largest = sorted(parts.items(), key=lambda part: -part[1])[:3]
    named = ", ".join(f"{name} {size / 1e9:.3g} GB" for name, size in largest)
    room = system.memory_share * system.memory_gb
    return f"It does not fit: a GPU needs {(held.fixed_bytes + kv) / 1e9:.3g} GB of {room:.3g} GB; {named}."


def _nothing_fits(refused: Sequence[Rejected]) -> str:
    """The largest cells have the smallest parts on each GPU."""
    if not refused:
        return "No layout is possible."
    tried = [one for one in refused if one.reason.startswith("It does not fit")] or refused
    nearest = max(tried, key=lambda one: (one.deployment.cell_gpus, one.deployment.tp))
    return (
        f"No layout fits, not even {nearest.deployment}: {nearest.reason} It takes more GPUs, ones with more memory, or"
        " tensors of fewer bits."
    )
