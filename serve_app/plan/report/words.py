"""What was asked for, in words."""

from serve_app.plan.deployment import Deployment
from serve_app.plan.report.figures import number, percent, plural, time
from serve_app.plan.workload import Lengths, Objective, Workload


def asked(workload: Workload) -> str:
    """Without a full stop."""
    load = (
        f"{number(workload.rate)} requests/s"
        if workload.rate is not None
        else f"{number(workload.concurrency or 0)} sequences at a time"
    )
    cached = f" ({percent(workload.prefix_share)} of each found in the cache)" if workload.prefix_share else ""
    return f"prompts of {lengths(workload.isl)} tokens{cached}, answers of {lengths(workload.osl)} tokens, {load}"


def lengths(found: Lengths) -> str:
    least, most = found.points[0][0], found.most
    return number(most) if least == most else f"{number(least)} to {number(most)} (mean {number(round(found.mean))})"


def promised(objective: Objective) -> str:
    """Empty where nothing is."""
    parts = []
    if objective.ttft_s is not None:
        parts.append(f"the first token within {time(objective.ttft_s)} for 99 of 100 requests")
    if objective.tpot_ms is not None:
        parts.append(f"at most {number(objective.tpot_ms)} ms between tokens")
    if objective.recovery_s is not None:
        parts.append(f"no stream standing still for longer than {time(objective.recovery_s)}")
    if objective.prefill_tokens_ms is not None:
        parts.append(f"{number(objective.prefill_tokens_ms)} prompt tokens/ms on a GPU")
    if objective.availability is not None:
        parts.append(f"all this for {100 * objective.availability:g} % of the time")
    return ", ".join(parts)


def layout(deployment: Deployment) -> str:
    """With what its name leaves out."""
    extra = f"{plural(deployment.standby, 'standby slot')} a GPU" if deployment.standby else "no standby slots"
    spares = f", {plural(deployment.spares, 'spare')} a cell" if deployment.spares else ""
    return f"{deployment} with {extra}{spares}"
