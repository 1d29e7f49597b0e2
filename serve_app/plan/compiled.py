"""A step's cost as a short formula of the coefficients, for whoever asks thousands of times.

`ops` says once what a step computes, moves and sends, and how often each fixed cost is in it; what depends on the
coefficients is only how these are summed. Whoever changes `ops` so that this no longer holds is told by an assertion.
"""

import math
from dataclasses import dataclass

from serve_app.plan.ops import Op, Stage, Step
from serve_app.plan.system import Efficiency, System

FIXED = ("collective_us", "layer_us", "step_us", "row_us", "expert_us", "block_us")
_NONE = dict.fromkeys(FIXED, 0.0)
_ATTENTION = frozenset({"prompt attention", "decode attention"})
_SAME = 1e-6
_FREE = 1e15


@dataclass(frozen=True)
class Formula:
    """Of one step on one stage. Seconds at the peaks."""

    works: tuple[tuple[float, float], ...]  # (computing, memory)
    attention: tuple[tuple[float, float], ...]
    link_s: float
    counts: tuple[float, ...]  # of FIXED
    num_workers: int

    def seconds(self, system: System) -> float:
        eff = system.efficiency
        mfu, bandwidth = eff.mfu, eff.bandwidth
        total = sum(max(compute / mfu, memory / bandwidth) for compute, memory in self.works)
        mfu, bandwidth = eff.attention_mfu or mfu, eff.attention_bandwidth or bandwidth
        total += sum(max(compute / mfu, memory / bandwidth) for compute, memory in self.attention)
        total += self.link_s / eff.link
        fixed = (eff.collective_us, eff.layer_us, eff.step_us, eff.row_us, eff.expert_us, eff.block_us)
        total += sum(count * us for count, us in zip(self.counts, fixed, strict=True)) / 1e6
        return total * system.slowdown(self.num_workers)


def formula(stage: Stage, step: Step) -> Formula:
    """Of a step on a stage, for its system's peaks and links, whatever its coefficients are."""
    system = stage.system
    bare = _at(stage, Efficiency(mfu=1, bandwidth=1, link=1, kv_block=system.efficiency.kv_block, **_NONE))
    works: list[tuple[float, float]] = []
    attention: list[tuple[float, float]] = []
    computings, memories = (_bound_by(bare, step, memory_is_free=free) for free in (True, False))
    for op, computing, memory in zip(bare.ops(step), computings, memories, strict=True):
        if op.bound in ("compute", "memory"):
            (attention if op.name in _ATTENTION else works).append((computing.seconds, memory.seconds))
    found = Formula(
        tuple(works),
        tuple(attention),
        sum(op.seconds for op in bare.ops(step) if op.bound == "link"),
        tuple(_count(bare, step, name) for name in FIXED),
        min(stage.deployment.cell_gpus, system.gpus_per_node),
    )
    assert math.isclose(found.seconds(system), stage.seconds(step), rel_tol=_SAME), "`ops` costs what is not known here"
    return found


def _bound_by(bare: Stage, step: Step, *, memory_is_free: bool) -> list[Op]:
    """The operations where memory, or computing, is as good as free."""
    system = bare.system
    free = (
        {"memory_gb_s": system.memory_gb_s * _FREE}
        if memory_is_free
        else {"peak_tflops": {dtype: peak * _FREE for dtype, peak in system.peak_tflops.items()}}
    )
    return Stage(
        bare.spec, bare.precision, system.model_copy(update=free), bare.deployment, bare.index, bare.by_all_reduce
    ).ops(step)


def _at(stage: Stage, efficiency: Efficiency) -> Stage:
    system = stage.system.model_copy(update={"efficiency": efficiency, "contention": {}})
    return Stage(stage.spec, stage.precision, system, stage.deployment, stage.index, stage.by_all_reduce)


def _count(bare: Stage, step: Step, name: str) -> float:
    """How often a fixed cost is in a step: it is linear in them."""
    with_one = _at(bare, bare.system.efficiency.model_copy(update={name: 1e6}))
    return with_one.seconds(step) - bare.seconds(step)
