"""Checks of what is said about losses, and of what belongs to training only."""

import math

from serve_app.experts.placement import primaries_per_worker
from serve_app.plan.audit.facts import Check, Facts
from serve_app.plan.audit.readings import Judgement, Verdict, gb, judge, number
from serve_app.plan.counts import attention_params, expert_params

_MOST_LOST = 4


# -- training only --------------------------------------------------------------------------------------------------


def _training_only(shown: str, instead: str) -> Judgement:
    return Judgement(shown, "nothing", "not applicable in serving", instead)


def gradient_sync(facts: Facts) -> Judgement:
    shown = f"every {facts.count('training.gradient_sync_steps')} steps"
    return _training_only(shown, "training: no gradients in serving, replicas exchange nothing but experts' rows")


def stage_checkpoint(facts: Facts) -> Judgement:
    shown = f"every {facts.count('training.checkpoint_layers')} layers"
    return _training_only(shown, f"training: a request is its tokens, and they are all that is kept; {_again(facts)}")


def rollback(facts: Facts) -> Judgement:
    if not facts.declared.training.rollback:
        return Judgement("no", "no", "holds")
    return _training_only("to the last checkpoint", f"training: nothing is rolled back in serving; {_again(facts)}")


def _again(facts: Facts) -> str:
    alone = [facts.bounds(spec).alone_s(facts.longest) for spec in facts.specs]
    times = " / ".join(f"{seconds:.2f}" for seconds in alone)
    return f"computing {facts.longest:,} tokens again takes {times} s"


# -- a GPU is gone --------------------------------------------------------------------------------------------------


def _slots_needed(facts: Facts, num_lost: int) -> int:
    return primaries_per_worker(facts.stage_layers, facts.num_experts, facts.deployment.ep - num_lost)


def standby_experts(facts: Facts) -> Judgement:
    """As free slots: the survivors of a stage must have room for all its experts."""
    layout, standby = facts.deployment, facts.count("layout.standby_experts_per_gpu")
    primary = _slots_needed(facts, 0)
    if layout.ep == 1:
        reading = "a stage is one GPU, and nobody is there to take its experts"
        return Judgement(str(standby), "another GPU", "does not hold" if standby else "holds", reading)
    lost = range(1, min(_MOST_LOST, layout.ep - 1) + 1)
    needs = {num: _slots_needed(facts, num) for num in lost}
    survived = max((num for num, slots in needs.items() if slots <= primary + standby), default=0)
    each = ", ".join(f"{num} lost: {slots}" for num, slots in needs.items())
    copies = min(1.0, standby * layout.ep / facts.stage_experts)
    size = facts.value_bytes * expert_params(facts.working.spec)
    reading = (
        f"as free slots, {primary} + {standby} of a GPU, needed with {each}; as copies, {standby} cover"
        f" {copies:.0%} of the experts, all take {primary} ({gb((primary - standby) * size)} more)"
        if standby < primary
        else f"as free slots or as copies of all experts; needed with {each}"
    )
    verdict: Verdict = "holds" if survived else "does not hold"
    return Judgement(f"{standby} more", f"{needs[1] - primary} more for one lost GPU", verdict, reading)


def _lost_bytes(facts: Facts) -> float:
    """What a GPU had that others must load: its experts, and its share of the stage's attention."""
    spec, size = facts.working.spec, facts.value_bytes
    attention = facts.stage_layers * attention_params(spec) / facts.deployment.tp
    return size * (_slots_needed(facts, 0) * expert_params(spec) + attention)


def recovery(facts: Facts) -> Judgement:
    """Notice, form and load, and a new worker; the phases' times are the planner's defaults."""
    declared, phases = facts.number("resilience.recovery_s"), facts.system.recovery
    load_s = _lost_bytes(facts) / (facts.system.load_gb_s * 1e9)
    again_s = max(facts.bounds(spec).alone_s(facts.longest) for spec in facts.specs)
    form_s = phases.form_s + (phases.collective_s if facts.deployment.tp > 1 else 0.0)
    short_s = phases.notice_s + form_s + load_s + again_s
    shown, computed = f"{number(declared)} s", f"{short_s:.2f} s; {short_s + phases.respawn_s:.1f} s with a new worker"
    reading = (
        f"notice {phases.notice_s:g} + form {form_s:g} + load {gb(_lost_bytes(facts))} {load_s:.2f}"
        f" + compute again {again_s:.2f} (+ a new worker {phases.respawn_s:g}) s; the bytes are the least of it"
    )
    if declared >= short_s + phases.respawn_s:
        return Judgement(shown, computed, "holds", reading)
    if declared >= short_s:
        return Judgement(shown, computed, "holds only if", f"others take over and no worker is awaited: {reading}")
    return Judgement(shown, computed, "does not hold", reading)


def redundancy(facts: Facts) -> Judgement:
    """Whether each expert is there twice."""
    if not facts.declared.resilience.redundancy_within_group:
        return Judgement("no", "no", "holds")
    layout = facts.deployment
    primary, standby = _slots_needed(facts, 0), facts.count("layout.standby_experts_per_gpu")
    ep = facts.count("layout.ep") if facts.given("layout.ep") else layout.ep
    copies = layout.ep // ep + standby * layout.ep / facts.stage_experts
    shown, computed = "every expert twice", f"{copies:.2f} copies, if standby slots are filled"
    if copies >= 2 and layout.ep > 1:
        return Judgement(shown, computed, "holds", "in standby slots" if ep == layout.ep else "each stage has copies")
    lost = -(-facts.num_experts // layout.ep)
    hit = ", ".join(f"{_share_hit(facts, lost, top_k):.0%} of tokens (top-{top_k})" for top_k in facts.top_ks)
    reading = (
        f"one GPU lost takes {lost} of {facts.num_experts} experts in {facts.stage_layers} layers: {hit} come to a"
        f" missing one, so that all {layout.cell_gpus} GPUs wait until they are re-homed; it takes {primary} standby"
        " experts per GPU"
    )
    return Judgement(shown, computed, "does not hold", reading)


def _share_hit(facts: Facts, lost: int, top_k: int) -> float:
    """Share of tokens that come to one of `lost` experts in any layer of a stage, routed uniformly."""
    num = facts.num_experts
    missed = math.comb(num - lost, top_k) / math.comb(num, top_k)
    return 1.0 - float(missed) ** facts.stage_layers


def capacity_after_loss(facts: Facts) -> Judgement:
    """One GPU breaks its TP group, that its stage, and that its replica."""
    layout = facts.deployment
    right = (layout.dp - 1) / layout.dp
    reading = (
        f"one GPU stops its replica of {layout.tp * layout.pp}: {right:.0%} of throughput until it is seated again"
    )
    if layout.dp > 1:
        half = [
            seconds / right for seconds in (facts.bounds(s).at_once_s(facts.batch, facts.longest) for s in facts.specs)
        ]
        reading += f", and {' / '.join(f'{s:.2f}' for s in half)} s for all at once"
    if not facts.given("resilience.capacity_after_loss"):
        return Judgement("nothing", f"{right:.0%}", "missing", reading)
    declared = facts.number("resilience.capacity_after_loss")
    if declared <= right:
        return Judgement(f"{declared:.0%}", f"{right:.0%}", "holds", reading)
    if declared == 1.0 or right == 0.0:
        return Judgement(f"{declared:.0%}", f"{right:.0%}", "does not hold", reading)
    return judge(declared, right, "", none=reading)


CHECKS = (
    Check("gradient synchronization", "training.gradient_sync_steps", gradient_sync),
    Check("stage checkpoints", "training.checkpoint_layers", stage_checkpoint),
    Check("rollback", "training.rollback", rollback),
    Check("standby experts", "layout.standby_experts_per_gpu", standby_experts),
    Check("recovery time", "resilience.recovery_s", recovery),
    Check("expert redundancy", "resilience.redundancy_within_group", redundancy),
    Check("capacity after a loss", "resilience.capacity_after_loss", capacity_after_loss, speaks_up=True),
)
