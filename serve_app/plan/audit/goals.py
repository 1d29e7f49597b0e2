"""Checks of what the same layout is said to go on to."""

import math
from dataclasses import replace

from serve_app.model.spec import ModelSpec
from serve_app.plan.audit.facts import Check, Facts
from serve_app.plan.audit.readings import Judgement, Verdict, gb, number
from serve_app.plan.counts import DTYPE_BYTES, count_params, expert_params


def linear_scaling(facts: Facts) -> Judgement:
    """One copy of the experts: no more GPUs than have one of each layer."""
    goal, layout = facts.count("goals.linear_to_gpus"), facts.deployment
    most = facts.num_experts * layout.pp
    shown, computed = f"to {goal} GPUs", f"EP ends at {most} GPUs, one expert of each layer on each"
    if goal > most:
        reading = f"beyond {most} it takes further cells, or experts that are cut"
        return Judgement(shown, computed, "does not hold", reading)
    reading = f"load grows as GPUs do, and links cost no more; beyond {most} it takes further cells"
    return Judgement(shown, computed, "holds only if", reading)


def _fits(facts: Facts, spec: ModelSpec, batch: int, sequence: int) -> tuple[Verdict, str]:
    """Whether a GPU has the memory, and what it holds then."""
    held = facts.held(spec, batch, sequence)
    room = facts.system.memory_share * facts.system.memory_gb * 1e9
    text = f"{gb(held.total_bytes)} of {gb(room)} (experts {gb(held.experts_bytes)}, KV {gb(held.kv_bytes)})"
    return ("holds" if held.total_bytes <= room else "does not hold"), text


def more_experts(facts: Facts) -> Judgement:
    goal, layers = facts.count("goals.experts"), facts.count("model.layers")
    if goal % layers:
        return Judgement(
            str(goal), f"{goal / layers:g} per layer", "does not hold", f"{layers} layers do not divide it"
        )
    spec = replace(facts.working.spec, num_experts=goal // layers)
    verdict, text = _fits(facts, spec, facts.batch, facts.longest)
    total = count_params(spec)
    reading = (
        f"{goal // layers} per layer, {facts.deployment.primary(spec)} on a GPU: a model of {total.experts / 1e9:.1f} B"
    )
    return Judgement(f"{goal} experts", text, verdict, reading)


def larger_batch(facts: Facts) -> Judgement:
    goal = facts.count("goals.batch")
    verdict, text = _fits(facts, facts.working.spec, goal, facts.longest)
    return Judgement(f"{goal} sequences", text, verdict, f"of {facts.longest:,} tokens each")


def larger_model(facts: Facts) -> Judgement:
    """Memory is not what asks for many GPUs."""
    goal = facts.number("goals.params_b")
    weights = goal * 1e9 * facts.value_bytes
    system = facts.system
    least = math.ceil(weights / (system.memory_share * system.memory_gb - system.runtime_gb) / 1e9)
    shown = f"{number(goal)} B"
    gpus = facts.count("goals.params_gpus") if facts.given("goals.params_gpus") else facts.count("hardware.gpus")
    shown += f" with {gpus} GPUs"
    computed = f"{gb(weights)}: at least {least} GPU{'s' if least > 1 else ''}"
    if gpus >= least:
        return Judgement(shown, computed, "holds", "no limit of memory: rate and KV decide")
    return Judgement(shown, computed, "does not hold", "the weights alone do not fit")


def longer_sequence(facts: Facts) -> Judgement:
    goal = facts.count("goals.sequence")
    verdict, text = _fits(facts, facts.working.spec, facts.batch, goal)
    rates = [facts.bounds(spec).prefill_tokens_ms(goal) for spec in facts.specs]
    reading = f"{' / '.join(f'{rate:.1f}' for rate in rates)} tokens/ms of a GPU"
    if facts.declared.goals.sequence_by_checkpointing:
        reading = f"no gradient checkpointing is needed, that is training; {reading}"
    asked = "performance.required_tokens_ms_gpu"
    if verdict == "holds" and facts.given(asked) and facts.number(asked) > min(rates) * 1.01:
        verdict, reading = "holds only if", f"{number(facts.number(asked))} tokens/ms is not asked of it: {reading}"
    return Judgement(f"{goal:,} tokens", text, verdict, reading)


def smaller_dtype(facts: Facts) -> Judgement:
    """Memory follows from the dtype; a rate takes hardware that computes in it."""
    goal = facts.declared.goals.dtype
    assert goal is not None
    size = expert_params(facts.working.spec) * facts.deployment.primary(facts.working.spec)
    computed = f"experts {gb(size * DTYPE_BYTES[goal])} instead of {gb(size * facts.value_bytes)}"
    has_units = goal in ("fp8", "int8") and facts.given("hardware.tflops_8_bit")
    if has_units or DTYPE_BYTES[goal] == facts.value_bytes:
        return Judgement(goal, computed, "holds")
    reading = f"memory in any case; a rate only on hardware that computes in {goal}, and its TFLOP/s are not declared"
    return Judgement(goal, computed, "holds only if", reading)


CHECKS = (
    Check("linear scaling", "goals.linear_to_gpus", linear_scaling),
    Check("more experts", "goals.experts", more_experts),
    Check("larger batch", "goals.batch", larger_batch),
    Check("larger model", "goals.params_b", larger_model),
    Check("longer sequences", "goals.sequence", longer_sequence),
    Check("smaller dtype", "goals.dtype", smaller_dtype),
)
