"""The planner's cost model as prices of the simulator's steps.

A stage's seconds grow linearly with the tokens that answers attend to, so they are taken apart: what a step takes
without those is remembered by all else that it depends on, and most steps of a run are alike in that.
"""

from serve_app.plan.estimate import Cost
from serve_app.plan.ops import Stage, Step
from serve_app.sim.serving.costs import StepWork

MOST_KEPT = 1 << 16
FAR_TOKENS = 1e9

_Rest = tuple[int, int, float, int, int, int, int]  # kind of stage, and all of a step but `decode_kv`


class PlanCosts:
    """Of a deployment's cells; see `StepCosts`. Workers slow each other down in it as if all were at work."""

    def __init__(self, cost: Cost) -> None:
        self._cost = cost
        self._stages: list[Stage] = []  # those that differ in more than their place
        self._kinds = [self._kind(stage) for stage in cost.stages]
        self._token_s = [_token_s(stage) for stage in self._stages]
        self._known: dict[_Rest, float] = {}

    def _kind(self, stage: Stage) -> int:
        traits = [(other.num_layers, other.is_last, other.hops_inside) for other in self._stages]
        if (own := (stage.num_layers, stage.is_last, stage.hops_inside)) in traits:
            return traits.index(own)
        self._stages.append(stage)
        return len(traits)

    @property
    def num_stages(self) -> int:
        return len(self._kinds)

    def stage_s(self, stage: int, work: StepWork, num_busy: int) -> float:
        """As if each busy replica ran one like it at the same time."""
        kind = self._kinds[stage]
        rest = (kind, work.prompt_tokens, work.pairs, work.prompt_kv, work.decode_rows, work.sampled, num_busy)
        rest_s = self._known.get(rest)
        if rest_s is None:
            rest_s = self._rest_s(kind, work, num_busy)
            if len(self._known) < MOST_KEPT:
                self._known[rest] = rest_s
        return rest_s + self._token_s[kind] * work.decode_kv

    def _rest_s(self, kind: int, work: StepWork, num_busy: int) -> float:
        """Of a step but for what its answers attend to."""
        step = Step(work.prompt_tokens, work.pairs, work.prompt_kv, work.decode_rows, work.decode_kv, work.sampled)
        return self._stages[kind].seconds(step, num_peers=num_busy) - self._token_s[kind] * work.decode_kv

    def slowdown(self, num_at_work: int) -> float:
        system, layout = self._cost.system, self._cost.deployment
        if not system.contention:
            return 1.0
        here, most = num_at_work * layout.tp, layout.cell_gpus
        return system.slowdown(min(here, system.gpus_per_node)) / system.slowdown(min(most, system.gpus_per_node))


def _token_s(stage: Stage) -> float:
    """Of a token that an answer attends to."""
    one, two = (stage.seconds(Step(decode_rows=1, decode_kv=times * FAR_TOKENS), num_peers=1) for times in (1, 2))
    return (two - one) / FAR_TOKENS
