"""Deployments that lose GPUs: what the tests of losses, recovery, availability and stories begin with."""

from dataclasses import replace

from hypothesis import strategies as st

from serve_app.plan.deployment import Deployment
from serve_app.plan.estimate import Cost, Estimate, estimate
from serve_app.plan.system import Recovery
from serve_app.plan.workload import Lengths, Objective, Workload
from tests.plan.cases import FP16, R10B, R10B_TOP2, REFERENCE

OBJECTIVE = Objective(ttft_s=10.0, recovery_s=30.0)
WORKLOAD = Workload(Lengths.fixed(10240), Lengths.fixed(128), objective=OBJECTIVE)  # 128 sequences at a time


def case(
    deployment: Deployment, *, top_k: int = 1, workload: Workload = WORKLOAD, **recovery: float
) -> tuple[Cost, Workload, Estimate]:
    """What `losses` takes, for the document's model on its hardware."""
    system = REFERENCE.model_copy(update={"recovery": Recovery(**recovery)})
    cost = Cost(R10B if top_k == 1 else R10B_TOP2, FP16, system, deployment)
    return cost, workload, estimate(cost, workload)


def spared(deployment: Deployment, spares: int) -> Deployment:
    return replace(deployment, spares=spares)


@st.composite
def deployments(draw: st.DrawFn) -> Deployment:
    """All that R10B can be laid out in on a few GPUs."""
    return Deployment(
        tp=draw(st.sampled_from([1, 2, 4])),
        pp=draw(st.sampled_from([1, 2, 3, 4])),
        dp=draw(st.integers(1, 3)),
        cells=draw(st.integers(1, 3)),
        standby=draw(st.integers(0, 4)),
    )
