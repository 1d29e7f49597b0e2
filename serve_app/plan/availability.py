"""What share of the time the objective is kept, from how often GPUs fail and how long until they are replaced.

GPUs fail one by one, independently, and each is out until it is replaced. Then each is out for a share r / (m + r) of
the time, m being the hours between its failures and r those until it is replaced, whatever their distributions (an
alternating renewal process; Barlow and Proschan, Mathematical Theory of Reliability, 1965). The number that is out of
those of a cell is binomial; for many GPUs that is Palm's theorem, the ground of the arithmetic of spares (Sherbrooke,
doi 10.1287/opre.16.1.122). Seats of a cell are empty where more GPUs are out than it has spares.

Pauses, while a cell fails over, come at the rate of failures and do not last long; that none is going on has the
probability of no event in a Poisson process. A pause of one cell counts as one of all: what is counted is the time in
which everybody's objective is kept. Streams of a cell that waits for a GPU wait with it, but the time counts as kept
where new requests find other cells that keep the objective. More than two empty seats count as not kept.
That a node takes all its GPUs along at once is not in it.
"""

import math
from dataclasses import dataclass, replace

from serve_app.plan.degraded import Kind, keeps
from serve_app.plan.estimate import Estimate
from serve_app.plan.loss import Losses
from serve_app.plan.recovery import budget
from serve_app.plan.seats import num_seats
from serve_app.plan.workload import Workload

MONTH_H = 730.5
MAX_SPARES = 8  # of a cell, that are tried


@dataclass(frozen=True)
class Availability:
    """Shares of the time, which sum to one, and the pace of failures."""

    kept: float  # everybody's objective
    paused: float  # a cell fails over
    degraded: float  # seats are empty, and what is left serves without keeping the objective
    standing: float  # seats are empty, and nothing serves; or more are empty than is looked at
    failure_h: float  # hours from one failure of any GPU to the next
    pause_s: float  # of a failure of a GPU with a seat: until the objective is kept again

    @property
    def lost_h_month(self) -> dict[str, float]:
        """Hours of a month in which it is not kept, by cause."""
        shares = {"paused": self.paused, "degraded": self.degraded, "standing": self.standing}
        return {cause: share * MONTH_H for cause, share in shares.items()}


def availability(found: Losses, workload: Workload, healthy: Estimate) -> Availability:
    """Of the deployment whose losses these are."""
    return _Model(found, keeps(healthy, workload.objective)).of(found.gpu.cost.deployment.spares)


def spares_needed(found: Losses, workload: Workload, healthy: Estimate, target: float) -> int | None:
    """The least number of spares of each cell with which the objective is kept for `target` of the time (0..1).

    None where MAX_SPARES are not enough: pauses alone take more, or the objective is not kept with all GPUs.
    """
    model = _Model(found, keeps(healthy, workload.objective))
    return next((spares for spares in range(MAX_SPARES + 1) if model.of(spares).kept >= target), None)


# -- how often ------------------------------------------------------------------------------------------------------


def num_out(num_gpus: int, share_out: float, num: int) -> float:
    """Probability that exactly `num` of so many GPUs are out."""
    return math.comb(num_gpus, num) * share_out**num * (1 - share_out) ** (num_gpus - num)


def empty_seats(cell_gpus: int, spares: int, share_out: float) -> tuple[float, float, float]:
    """Probabilities that none, one, two of a cell's seats are empty. `cell_gpus`: with seats, spares come on top."""
    num = cell_gpus + spares
    none = math.fsum(num_out(num, share_out, k) for k in range(spares + 1))
    return min(1.0, none), num_out(num, share_out, spares + 1), num_out(num, share_out, spares + 2)


class _Model:
    """What a deployment bears does not depend on its spares; how often it must does."""

    def __init__(self, found: Losses, is_kept: bool) -> None:
        """`is_kept`: the objective, with all GPUs."""
        self._one, self._cost, self._is_kept = found.gpu, found.gpu.cost, is_kept
        self._bears_one = is_kept and found.gpu.keeps_objective
        self._twos = [
            (state, self._bears_one and state.keeps_objective)
            for kind in ("two of a replica", "two replicas", "two cells")
            if (state := found.state(kind)) is not None
        ]

    def of(self, spares: int) -> Availability:
        deployment, known = self._cost.deployment, self._cost.system.recovery
        failure_h = known.mtbf_h / (num_seats(deployment) + deployment.cells * spares)
        if not self._is_kept:
            return Availability(0.0, 0.0, 1.0, 0.0, failure_h, 0.0)
        kept, degraded = self._shares(spares)
        pause_s = self._pause_s(spares)
        going_on = math.exp(-num_seats(deployment) / known.mtbf_h * pause_s / 3600)
        return Availability(
            kept=kept * going_on,
            paused=kept * (1 - going_on),
            degraded=degraded,
            standing=max(0.0, 1.0 - kept - degraded),
            failure_h=failure_h,
            pause_s=pause_s,
        )

    def _shares(self, spares: int) -> tuple[float, float]:
        """Of the time: in which what is left keeps the objective; in which it serves and does not."""
        deployment, known = self._cost.deployment, self._cost.system.recovery
        share_out = known.replace_h / (known.mtbf_h + known.replace_h)
        none, one, two = empty_seats(deployment.cell_gpus, spares, share_out)
        kept, degraded = none**deployment.cells, 0.0
        states = [(self._one, self._bears_one, deployment.cells * one * none ** (deployment.cells - 1))]
        for state, is_borne in self._twos:
            states.append((state, is_borne, self._share_of_two(state.kind, none, one, two)))
        for state, is_borne, share in states:
            kept += share * is_borne
            degraded += share * (state.is_survivable and not is_borne)
        return min(1.0, kept), degraded

    def _share_of_two(self, kind: Kind, none: float, one: float, two: float) -> float:
        """Of the time in which two seats are empty in this way. Two stages of a replica count as one stage."""
        deployment = self._cost.deployment
        if kind == "two cells":
            return math.comb(deployment.cells, 2) * one**2 * none ** (deployment.cells - 2)
        same = (deployment.tp * deployment.pp - 1) / (deployment.cell_gpus - 1)
        share = same if kind == "two of a replica" else 1.0 - same
        return deployment.cells * two * none ** (deployment.cells - 1) * share

    def _pause_s(self, spares: int) -> float:
        """Of the loss of one GPU: until the objective is kept, as soon as there is somebody to keep it.

        Where what is left does not keep it, until the seat is filled: by a spare, or by a worker that is started where
        a GPU is free. The time until one is free counts as that of an empty seat.
        """
        spared = replace(self._cost, deployment=replace(self._cost.deployment, spares=spares))
        found = budget(replace(self._one, cost=spared), "gpu" if spares else "process")
        return found.all_streams_s if self._bears_one else found.whole_s
