"""What an engine has learned of its steps, for those who ask from other threads."""

from collections.abc import Mapping

from serve_app.config import OctavoConfig
from serve_app.engine.pace import Pace
from serve_app.runtime.snapshot import PaceView, ReplicasPace


def pace_of(config: OctavoConfig, paces: Mapping[int, Pace]) -> PaceView:
    """`paces` by number of replicas."""
    layout = config.layout
    found = [ReplicasPace(num, list(pace.costs or ()), pace.observed) for num, pace in paces.items()]
    return PaceView(config.model, layout.tp, layout.pp, layout.dp, config.scheduler.max_step_tokens, found)
