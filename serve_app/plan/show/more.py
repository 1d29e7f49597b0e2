"""What is shown on request: the story of a GPU, the way from another layout, how it scales, the training view."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from rich.table import Table

from serve_app.plan.answer import Answer
from serve_app.plan.deployment import Deployment
from serve_app.plan.elastic import Transition
from serve_app.plan.estimate import Cost
from serve_app.plan.scaling import Choose, Row, columns, tables, widened
from serve_app.plan.show import words
from serve_app.plan.show.figures import budget, sizes
from serve_app.plan.show.tables import table
from serve_app.plan.story import Story, tell
from serve_app.plan.training import ADAM_BYTES, Training

Json = dict[str, Any]


# -- one GPU -----------------------------------------------------------------------------------------------------------


def story_table(told: Story) -> Table:
    return table(
        "What when",
        ("from", "what has happened", "capacity\nrequests/s", "share", "TTFT of\nnew requests"),
        [
            (
                words.duration(moment.at_s),
                f"{moment.name}: {moment.text}",
                words.digits(moment.capacity),
                words.percent(moment.capacity_share),
                "they wait" if moment.ttft_s is None else words.duration(moment.ttft_s),
            )
            for moment in told.moments
        ],
        left=2,
    )


def story_figures(told: Story) -> Json:
    seat = told.place.seat
    return {
        "gpu": told.place.gpu,
        "node": told.place.node,
        "cell": told.place.cell,
        "seat": None if seat is None else {"stage": seat.stage, "replica": seat.replica, "shard": seat.shard},
        "experts": [list(pair) for pair in told.experts],
        "stopped_gpus": list(told.stopped),
        "resting_gpus": list(told.resting),
        "moves": [
            {"layer": move.layer, "expert": move.expert, "way": move.way, "gpu": move.gpu} for move in told.moves
        ],
        "loaded_gb_by_gpu": {str(gpu): size / 1e9 for gpu, size in told.loaded_bytes.items()},
        "recovery": budget(told.budget),
        "moments": [
            {
                "at_s": moment.at_s,
                "name": moment.name,
                "capacity_requests_s": moment.capacity,
                "capacity_share": moment.capacity_share,
                "ttft_ms": None if moment.ttft_s is None else moment.ttft_s * 1e3,
            }
            for moment in told.moments
        ],
        "sentences": tell(told),
    }


# -- from another layout -----------------------------------------------------------------------------------------------


def transition_lines(before: Deployment, made: Transition, answer: Answer) -> Iterator[tuple[str, str]]:
    yield "from", f"{before} ({words.num(before.num_gpus, 'GPU')}) to {answer.deployment}"
    yield (
        "kept",
        f"{words.num(made.num_kept_replicas, 'replica')} with their KV; {words.num(made.num_kept_gpus, 'GPU')} have"
        f" weights already, {made.num_new_gpus} are new",
    )
    experts = words.num(made.moved_experts, "expert")
    yield (
        "moved",
        f"{experts} and all else: {words.amount(made.moved_bytes)}, {words.amount(made.busiest_bytes)} of them into the"
        " GPU that takes most",
    )
    yield (
        "takes",
        f"{words.duration(made.total_s)}: start {words.duration(made.start_s)}, load {words.duration(made.load_s)}"
        f" ({words.duration(made.over_links_s)} over links), form {words.duration(made.form_s)}, compute again"
        f" {words.duration(made.recompute_s)} for {words.digits(made.sequences)} sequences",
    )
    if (before.tp, before.pp) != (answer.deployment.tp, answer.deployment.pp) or before.dp != answer.deployment.dp:
        yield "today", f"Octavo begins a new cell where its layout changes: {words.duration(made.restart_s)}"
    yield (
        "capacity",
        f"{words.digits(made.before)} requests/s before, {words.digits(made.during)} meanwhile,"
        f" {words.digits(made.after)} after; objective {'kept' if made.keeps_objective else 'not kept'} meanwhile",
    )


def transition_figures(before: Deployment, made: Transition) -> Json:
    return {
        "from": sizes(before),
        "kept_replicas": made.num_kept_replicas,
        "kept_gpus": made.num_kept_gpus,
        "new_gpus": made.num_new_gpus,
        "moved_experts": made.moved_experts,
        "moved_gb": made.moved_bytes / 1e9,
        "busiest_gpu_gb": made.busiest_bytes / 1e9,
        "start_s": made.start_s,
        "load_s": made.load_s,
        "over_links_s": made.over_links_s,
        "form_s": made.form_s,
        "recompute_s": made.recompute_s,
        "total_s": made.total_s,
        "restart_s": made.restart_s,
        "sequences_computed_again": made.sequences,
        "capacity_before_requests_s": made.before,
        "capacity_during_requests_s": made.during,
        "capacity_after_requests_s": made.after,
        "keeps_objective": made.keeps_objective,
    }


# -- how it scales -----------------------------------------------------------------------------------------------------


def scaling(answer: Answer) -> dict[str, list[Row]]:
    return tables(answer.cost, answer.question.workload, _within_nodes(answer.question.across_nodes))


def _within_nodes(across_nodes: bool) -> Choose:
    """As `scaling.widened`, but with expert groups of a node at most, if they may not be larger."""

    def choose(cost: Cost, num_gpus: int) -> Deployment:
        found, per_node = widened(cost, num_gpus), cost.system.gpus_per_node
        if across_nodes or found.ep <= per_node:
            return found
        most = max(1, per_node // found.tp)
        dp = max(dp for dp in range(1, most + 1) if found.num_replicas % dp == 0)
        return replace(found, dp=dp, cells=found.num_replicas // dp)

    return choose


def scaling_tables(found: dict[str, list[Row]]) -> Iterator[Table]:
    for dimension, rows in found.items():
        yield table(
            f"Other numbers of {dimension}" if dimension != "dtype" else "Other dtypes",
            (
                dimension,
                "layout",
                "params\nB",
                "room for\nsequences",
                "memory\nGB",
                "output\ntokens/s",
                "a GPU",
                "TTFT\np99 ms",
                "TPOT\nms",
            ),
            [_scaled(row) for row in rows],
        )


def _scaled(row: Row) -> list[str]:
    head = [str(row.value), str(row.deployment or "-"), words.digits(row.num_params / 1e9) if row.num_params else "-"]
    if not row.fits or row.estimate is None:
        return [head[0], row.reason, *["-"] * 7]
    found = row.estimate
    return [
        *head,
        f"{found.max_sequences:,}",
        words.gb(found.footprint.total_bytes),
        words.digits(found.output_tokens_s),
        words.digits(found.output_tokens_s_gpu),
        words.digits(found.ttft_p99_s.value * 1e3),
        words.digits(found.tpot_s.value * 1e3),
    ]


def scaling_figures(found: dict[str, list[Row]]) -> Json:
    return {name: [dict(columns(row)) for row in rows] for name, rows in found.items()}


# -- training ----------------------------------------------------------------------------------------------------------


def training_lines(found: Training, answer: Answer) -> Iterator[tuple[str, str]]:
    """Kept apart from serving: nothing of it is in a plan's memory or time."""
    system, question = answer.question.system, answer.question
    verdict = "fits" if found.fits(system) else "does not fit"
    yield (
        "training",
        f"{question.model} on {answer.deployment}, {answer.sequences:,} sequences of {question.workload.isl.most:,}"
        " tokens a step; serving needs nothing of this",
    )
    yield (
        "memory",
        f"{words.gb(found.peak_bytes)} GB on the fullest GPU at the peak, {words.gb(found.steady_bytes)} between two"
        f" steps, beside the process: {verdict} in {system.memory_gb:g} GB",
    )
    yield (
        "",
        f"weights {words.gb(found.weights_bytes)}, gradients {words.gb(found.gradients_bytes)}, optimizer"
        f" {words.gb(found.optimizer_bytes)} ({ADAM_BYTES} bytes of a parameter), saved activations"
        f" {words.gb(found.saved_bytes)}, computed again {words.gb(found.again_bytes)}",
    )
    yield (
        "a step",
        f"{words.duration(found.step_s)}: compute {words.duration(found.compute_s)}, gradient sync"
        f" {words.duration(found.sync_s)} ({words.amount(found.sync_bytes)} from each GPU), update"
        f" {words.duration(found.update_s)}",
    )
    yield (
        "checkpoint",
        f"{words.amount(found.checkpoint_bytes)}, {words.duration(found.checkpoint_s)} to write; with one every hour a"
        f" failure costs {words.duration(found.rollback_s(3600))}",
    )


def training_figures(found: Training) -> Json:
    return {
        "params_b": found.params / 1e9,
        "weights_gb": found.weights_bytes / 1e9,
        "gradients_gb": found.gradients_bytes / 1e9,
        "optimizer_gb": found.optimizer_bytes / 1e9,
        "saved_activations_gb": found.saved_bytes / 1e9,
        "computed_again_gb": found.again_bytes / 1e9,
        "steady_gb": found.steady_bytes / 1e9,
        "peak_gb": found.peak_bytes / 1e9,
        "compute_s": found.compute_s,
        "sync_gb": found.sync_bytes / 1e9,
        "sync_s": found.sync_s,
        "update_s": found.update_s,
        "step_s": found.step_s,
        "checkpoint_gb": found.checkpoint_bytes / 1e9,
        "checkpoint_s": found.checkpoint_s,
    }
