"""Where the time of a step goes: operations by share, and what bounds each."""

from collections import Counter
from collections.abc import Sequence

from serve_app.plan.answer import Answer
from serve_app.plan.ops import Op
from serve_app.plan.report.figures import number, percent, plural, time
from serve_app.plan.report.markup import Html, bar, section, table, tag


def operations(answer: Answer) -> Html:
    workload, deployment = answer.question.workload, answer.deployment
    rows = answer.estimate.concurrency / deployment.num_replicas / deployment.pp
    tokens = number(round(workload.mean_tokens))
    return section(
        "operations",
        "Operations",
        tag(
            "p",
            f"On the way through all {plural(deployment.pp, 'stage')}, as the busiest GPU of each takes. The bound is"
            " what an operation waits for: products (compute), memory, a link, or what it takes however small it is"
            " (fixed).",
        ),
        _table(f"Prefill: a prompt of {number(round(workload.isl.mean))} tokens, alone", answer.prompt_ops()),
        _table(
            f"Decode: a step of {number(round(max(1.0, rows), 1))} answers at {tokens} tokens each", answer.decode_ops()
        ),
    )


def _table(caption: str, ops: Sequence[Op]) -> Html:
    """Longest first."""
    total_s = sum(op.seconds for op in ops) or 1.0
    by_bound: Counter[str] = Counter()
    rows = []
    for op in sorted(ops, key=lambda op: -op.seconds):
        share = op.seconds / total_s
        by_bound[op.bound] += op.seconds  # type: ignore[assignment]
        rows.append([op.name, op.bound, bar(0.0, share, f"bound-{op.bound}"), percent(share), time_of(op.seconds)])
    bounds = ", ".join(f"{bound} {percent(seconds / total_s)}" for bound, seconds in by_bound.most_common())
    made = table(caption, ["operation", "bound", "share", "", "time"], rows, numbers=[3, 4])
    return tag("div", made, tag("p", f"{time_of(total_s)} together: {bounds}.", class_="note"), class_="ops")


def time_of(value_s: float) -> str:
    """Down to microseconds."""
    return f"{value_s * 1e6:.3g} µs" if value_s < 1e-3 else f"{value_s * 1e3:.3g} ms" if value_s < 1 else time(value_s)
