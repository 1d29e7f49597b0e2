"""Checks of alert thresholds: whether they fire when they should, and on what they are a share of."""

import math

from serve_app.plan.audit.facts import Check, Facts, UndeclaredError
from serve_app.plan.audit.readings import Judgement, judge, number
from serve_app.plan.routing import expert_imbalance

_TOKENS = (32, 128, 1024, 8192)


def memory_alert(facts: Facts) -> Judgement:
    right = facts.number("alerts.memory_gb") / facts.number("hardware.memory_gb")
    remark = "alerts.memory_gb / hardware.memory_gb"
    if facts.given("memory.total_gb"):
        times = facts.number("alerts.memory_gb") / facts.number("memory.total_gb")
        remark += f"; it is {times:.1f} times what is declared to be used: watch the KV pool, and drift from the plan"
    return judge(facts.number("alerts.memory_share"), right, "", remark=remark)


def throughput_alert(facts: Facts) -> Judgement:
    """A dead GPU should fire it."""
    gpus, rate = facts.count("hardware.gpus"), facts.number("performance.tokens_ms_gpu")
    alert = facts.number("alerts.tokens_ms_gpu")
    shown, computed = f"below {number(alert)} tokens/ms", f"{(gpus - 1) / gpus * rate:.1f} tokens/ms with one GPU lost"
    idle = (
        "and idle traffic always fires it: watch what is served of what is asked, and the GPUs alive of those planned"
    )
    if alert >= rate:
        return Judgement(shown, computed, "does not hold", "it fires with every GPU alive")
    if (gpus - 1) / gpus * rate < alert:
        return Judgement(shown, computed, "holds only if", f"every GPU is always full, {idle}")
    num = math.floor(gpus * (1 - alert / rate) + 1e-9) + 1
    return Judgement(shown, computed, "does not hold", f"{num} GPUs must die before it fires, {idle}")


def ttft_alert(facts: Facts) -> Judgement:
    """One objective, one threshold."""
    alert = facts.number("alerts.ttft_s")
    others = {
        name: facts.number(name) for name in ("alerts.ttft_target_s", "performance.ttft_limit_s") if facts.given(name)
    }
    if not others:
        raise UndeclaredError("performance.ttft_limit_s")
    shown, computed = f"above {number(alert)} s", ", ".join(f"{name} {number(value)}" for name, value in others.items())
    limit = others.get("performance.ttft_limit_s", alert)
    target = others.get("alerts.ttft_target_s", alert)
    if alert > limit:
        return Judgement(shown, computed, "does not hold", "it fires when the limit has been broken already")
    if target != alert:
        reading = (
            f"two targets: between {number(min(target, alert))} and {number(max(target, alert))} s one is broken and"
            f" the other is not; alert on how fast the errors allowed at {number(limit)} s are used up"
        )
        return Judgement(shown, computed, "does not hold", reading)
    return Judgement(shown, computed, "holds")


def expert_load_alert(facts: Facts) -> Judgement:
    share = facts.number("alerts.expert_load_share")
    shown = f"above {share:.0%} of capacity"
    if not facts.given("alerts.expert_capacity_tokens_s"):
        reading = "an expert has no capacity of its own: alert on the tokens of the busiest over their mean"
        return Judgement(shown, "no capacity is declared", "undefined", reading)
    capacity = facts.number("alerts.expert_capacity_tokens_s")
    return Judgement(shown, f"{number(share * capacity)} tokens/s", "holds")


def uniform_load(facts: Facts) -> Judgement:
    """Where experts lie is one thing, where tokens go another."""
    if not facts.declared.resilience.uniform_load:
        return Judgement("no", "no", "holds")
    ep = facts.count("layout.ep") if facts.given("layout.ep") else facts.deployment.ep
    if ep == 1:
        return Judgement("uniform", "1.0 x the mean", "holds")
    each = ", ".join(f"{expert_imbalance(ep, tokens):.2f} @{tokens:,}" for tokens in _TOKENS)
    reading = f"it is about where experts lie, not where tokens go: busiest of {ep} GPUs over the mean {each} tokens"
    return Judgement("uniform", f"{expert_imbalance(ep, _TOKENS[0]):.2f} x the mean", "holds only if", reading)


def gpu_utilization(facts: Facts) -> Judgement:
    least, most = sorted(facts.declared.alerts.gpu_utilization or (0.0, 1.0))
    mfu = facts.declared.hardware.mfu
    shown, computed = f"{least:.0%} to {most:.0%}", f"MFU {mfu:.0%}"
    if least <= mfu <= most:
        return Judgement(shown, computed, "holds")
    reading = "it is the share of time in which a kernel runs, another quantity: watch MFU and memory bandwidth"
    return Judgement(shown, computed, "holds only if", reading)


CHECKS = (
    Check("uniform load", "resilience.uniform_load", uniform_load),
    Check("GPU utilization", "alerts.gpu_utilization", gpu_utilization),
    Check("memory alert", "alerts.memory_share", memory_alert),
    Check("throughput alert", "alerts.tokens_ms_gpu", throughput_alert),
    Check("TTFT alert", "alerts.ttft_s", ttft_alert),
    Check("expert load alert", "alerts.expert_load_share", expert_load_alert),
)
