"""The fewest GPUs that carry a load with its objective kept."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from serve_app.errors import PlanError
from serve_app.model.spec import ModelSpec
from serve_app.plan.counts import Precision
from serve_app.plan.deployment import Deployment
from serve_app.plan.legal import Rejected, divisors, is_power_of_two, least_standby, why_not
from serve_app.plan.search import (
    NUM_PLACES,
    Candidate,
    FindLosses,
    Found,
    Miss,
    Rank,
    Search,
    check_possible,
    default_losses,
    search,
)
from serve_app.plan.system import System
from serve_app.plan.workload import Workload

MOST_GPUS = 1024
MOST_CELL_GPUS = 256
REPLICAS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # of a cell
TRIES = 6  # numbers of cells that are looked at, each nearer than the one before


def least_gpus(
    spec: ModelSpec,
    precision: Precision,
    system: System,
    workload: Workload,
    *,
    limit: int = MOST_GPUS,
    standby: int | None = None,
    rank: Rank = "healthy",
    losses: FindLosses | None = None,
    checks: Sequence[Callable[[Candidate], Sequence[Miss]]] = (),
    num_places: int = NUM_PLACES,
    across_nodes: bool = False,
) -> Found:
    """Of each kind of cell as many as carry the workload's rate or concurrency with the objective kept, all sequences
    in a place of their own: fewest GPUs first. With rank `worst`, in the worst state after the loss of one GPU too.

    Cells share nothing, so that what one of them takes tells how many are needed. Raises PlanError where no deployment
    of up to `limit` GPUs carries it; the message says what the nearest does.
    """
    check_possible(spec, precision, system, workload)
    losses = default_losses(rank, losses)
    of = Search(spec, precision, system, workload, standby, True, rank, losses, checks, num_places)
    deployments, rejected = [], []
    for cell in _cells(spec, system, limit, across_nodes):
        slots = least_standby(spec, cell) if standby is None else standby
        enough = _enough(of, replace(cell, standby=slots), limit)
        if isinstance(enough, Rejected):
            rejected.append(enough)
        else:
            deployments.append(enough.deployment)
    found = of.of(deployments, rejected)
    if not found.candidates:
        nearest = search(
            spec, precision, system, workload, limit, standby=standby, checks=checks, across_nodes=across_nodes
        ).nearest
        raise PlanError(f"up to {limit} GPUs do not carry this load. {nearest or ''}".rstrip(" ."))
    return replace(found, candidates=sorted(found.candidates, key=lambda one: one.deployment.num_gpus), nearest=None)


def _cells(spec: ModelSpec, system: System, limit: int, across_nodes: bool) -> Iterator[Deployment]:
    """One cell of each kind that is legal."""
    stages = sorted({*divisors(spec.num_layers), *filter(is_power_of_two, range(1, spec.num_layers + 1))})
    for tp in divisors(system.gpus_per_node):
        for pp in stages:
            for dp in REPLICAS:
                cell = Deployment(tp, pp, dp)
                if cell.cell_gpus > min(limit, MOST_CELL_GPUS):
                    continue
                if not why_not(spec, cell, system.gpus_per_node, across_nodes=across_nodes):
                    yield cell


def _enough(of: Search, cell: Deployment, limit: int) -> Candidate | Rejected:
    """The fewest of these cells, or why there is no such number up to the limit."""
    num = 1
    for _ in range(TRIES):
        found = of.candidate(replace(cell, cells=num))
        if isinstance(found, Rejected):
            return found
        share = _share(of, found)
        if share >= 1:
            return found
        if not found.estimate.capacity:
            return Rejected(cell, "It does not keep the objective for a single request.")
        num = max(num + 1, math.ceil(num / share * (1 - 1e-4)) if share > 0 else 0)
        if num * cell.cell_gpus > limit:
            return Rejected(cell, f"{limit} GPUs of such cells do not carry the load with the objective kept.")
    return Rejected(cell, f"No number of cells was found in {TRIES} tries.")


def _share(of: Search, found: Candidate) -> float:
    """Of the load, that it carries with the objective kept."""
    one, workload = found.estimate, of.workload
    if not one.capacity or one.capacity_sequences is None:
        return 0.0
    share = one.capacity / workload.rate if workload.rate else one.capacity_sequences / (workload.concurrency or 1)
    if of.rank == "worst" and of.losses is not None:
        share *= of.losses(found.cost, workload, one).worst_capacity / one.capacity
    return min(1.0, share) if not found.misses else min(share, 1 - 1e-6)
