"""The head of an emitted config: what was planned, from what, and what is expected of it. Comments, line by line."""

from collections.abc import Iterator, Mapping
from typing import Any

from serve_app.plan.counts import count_params
from serve_app.plan.estimate import Cost, Estimate, Span
from serve_app.plan.footprint import kv_gpu_token_bytes
from serve_app.plan.room import held
from serve_app.plan.system import is_calibrated
from serve_app.plan.workload import Lengths, Workload


def head(cost: Cost, workload: Workload, estimate: Estimate, args: Mapping[str, Any]) -> Iterator[str]:
    """Lines without their `#`. `args`: what is emitted. Figures are of one cell, if nothing else is said."""
    num_cells, layout, name = cost.deployment.cells, cost.deployment, args["model"]
    spares = f", and {layout.spares} for spares" if layout.spares else ""
    yield _plain(f"{name} on {layout.cell_gpus} x {cost.system.name}{spares}. Written by `octavo plan`.")
    yield ""
    for word, text in _facts(cost, workload, estimate, args):
        yield f"  {word:<10} {_plain(text)}"
    yield ""
    if num_cells > 1:
        yield f"This is one cell of {num_cells} that are planned, for {layout.num_gpus} workers in all. Nothing here"
        yield "spreads requests over cells yet: start this file on a Ray cluster for each, behind a load balancer."
    yield "Start it with `octavo serve` and this file. Every key of `args` is described in docs/config.md."


def _plain(text: str) -> str:
    """On one line, and without what a YAML file must not have."""
    return "".join(letter for letter in " ".join(text.split()) if letter.isprintable())


def _facts(cost: Cost, workload: Workload, estimate: Estimate, args: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    params, system, cells = count_params(cost.spec), cost.system, cost.deployment.cells
    yield "model", (f"{params.total / 1e9:.3f} B parameters, {params.active / 1e9:.3f} B active; {args['dtype']}")
    layout = cost.deployment
    yield "layout", f"TP {layout.tp} x PP {layout.pp} x DP {layout.dp}, EP {layout.ep}"
    yield "hardware", f"{system.name}: {system.memory_gb:g} GB, {system.memory_gb_s:g} GB/s ({system.source})"
    yield "workload", (f"prompts of {_lengths(workload.isl)}, answers of {_lengths(workload.osl)}, {_load(workload)}")
    yield "objective", _objective(workload)
    yield (
        "expected",
        (
            f"{estimate.output_tokens_s / cells:,.0f} output tokens/s, {estimate.rate / cells:.3g} requests/s"
            f" with {estimate.concurrency / cells:.0f} sequences at a time"
        ),
    )
    yield "", f"first token {_span(estimate.ttft_s)}, 99 of 100 within {_span(estimate.ttft_p99_s)}"
    yield "", f"then a token every {_span(estimate.tpot_s)}"
    if estimate.capacity is not None:
        yield "", f"at most {estimate.capacity / cells:.3g} requests/s with the objective kept"
    if not is_calibrated(system):
        yield "", "(intervals of public runs of other engines: this hardware has not been calibrated)"
    yield "memory", _memory(cost, workload, args)
    if (limits := args.get("limits")) is not None:
        after = limits.get("queued_tokens_by_replicas")
        less = f"; {max(after.values()):,} after the loss of a replica" if after else ""
        yield "admission", f"{limits['max_queued_tokens']:,} prompt tokens may wait{less}"


def _lengths(lengths: Lengths) -> str:
    least, most = lengths.points[0][0], lengths.most
    return f"{most:,} tokens" if least == most else f"{least:,} to {most:,} tokens ({lengths.mean:,.0f} in the mean)"


def _load(workload: Workload) -> str:
    if workload.rate is not None:
        return f"{workload.rate:g} requests/s over all cells"
    return f"{workload.concurrency} at a time over all cells"


def _objective(workload: Workload) -> str:
    objective, parts = workload.objective, []
    if objective.ttft_s is not None:
        parts.append(f"the first token within {objective.ttft_s:g} s")
    if objective.tpot_ms is not None:
        parts.append(f"the next within {objective.tpot_ms:g} ms")
    return ", ".join(parts) or "none: everybody is let in"


def _span(span: Span) -> str:
    scale, unit = (1.0, "s") if span.value >= 1 else (1e3, "ms")
    low, value, high = (_number(scale * seconds) for seconds in (span.low, span.value, span.high))
    return f"{value} {unit} ({low} to {high})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _memory(cost: Cost, workload: Workload, args: Mapping[str, Any]) -> str:
    """Of the fullest GPU, its KV pool as large as the config has it."""
    pool = args["worker"]["kv_gib"] * 2**30
    token_bytes = kv_gpu_token_bytes(cost.spec, cost.precision, cost.deployment)
    sampled = args["scheduler"]["max_running"] / cost.deployment.pp
    full = held(cost, workload, sampled, kv_tokens=pool / token_bytes)
    return (
        f"{full.total_bytes / 1e9:.2f} of {cost.system.memory_gb:g} GB: weights {full.weights_bytes / 1e9:.2f},"
        f" standby {full.standby_bytes / 1e9:.2f}, KV {full.kv_bytes / 1e9:.2f}, a step {full.step_bytes / 1e9:.2f},"
        f" the process {full.runtime_bytes / 1e9:.2f}"
    )
