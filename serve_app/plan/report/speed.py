"""By what layouts are compared: output tokens/s of a GPU or, where a rate is asked for, what it could take of it."""

from dataclasses import dataclass

from serve_app.plan.search import Candidate
from serve_app.plan.workload import Workload


@dataclass(frozen=True)
class Speed:
    """`unit`: as it stands behind a number."""

    unit: str
    by_capacity: bool

    def of(self, candidate: Candidate) -> float:
        found = candidate.estimate
        if self.by_capacity:
            return (found.capacity or 0.0) / found.deployment.num_gpus
        return found.output_tokens_s_gpu


def speed(workload: Workload) -> Speed:
    if workload.rate is not None:
        return Speed("requests/s per GPU at most", by_capacity=True)
    return Speed("output tokens/s per GPU", by_capacity=False)
