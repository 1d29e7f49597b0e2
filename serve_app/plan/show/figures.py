"""A plan as JSON: hand-picked keys, each with its unit in its name. `docs/plan-json.md` describes them.

What there is not is null: an objective that nobody set, a state that cannot be. Shares are 0 to 1, sizes decimal.
"""

import math
from typing import Any

from serve_app.plan.answer import Answer
from serve_app.plan.deployment import Deployment
from serve_app.plan.estimate import Span
from serve_app.plan.ops import Op
from serve_app.plan.recovery import Budget
from serve_app.plan.search import Candidate
from serve_app.plan.show.lost import Loss, losses_told
from serve_app.plan.system import is_calibrated
from serve_app.plan.workload import Lengths

FORMAT = 1
Json = dict[str, Any]


def figures(answer: Answer) -> Json:
    """Everything that the terminal shows of a plan."""
    return {
        "format": FORMAT,
        "model": _model(answer),
        "system": _system(answer),
        "workload": _workload(answer),
        "layout": layout(answer.deployment, answer),
        "memory": _memory(answer),
        "bounds": _bounds(answer),
        "expected": _expected(answer.chosen),
        "misses": [str(miss) for miss in answer.chosen.misses],
        "losses": _losses(answer),
        "recovery": {"gpu": budget(answer.recovery), "process": budget(answer.restart)},
        "availability": _availability(answer),
        "admission": _admission(answer),
        "operations": {"prompt": _operations(answer.prompt_ops()), "decode": _operations(answer.decode_ops())},
        "better": None if answer.better is None else _better(answer, answer.better),
        "ranking": _ranking(answer),
        "pareto": [row(candidate) for candidate in answer.pareto],
        "rejected": _rejected(answer),
    }


def clean(value: Any) -> Any:
    """What JSON has no number for is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: clean(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [clean(inner) for inner in value]
    return value


# -- what was asked ----------------------------------------------------------------------------------------------------


def _model(answer: Answer) -> Json:
    question, params = answer.question, answer.params
    declared = question.declared_params_b
    return {
        "name": question.model,
        "family": question.spec.family,
        "layers": question.spec.num_layers,
        "experts_per_layer": question.spec.num_experts,
        "top_k": question.spec.top_k,
        "params_b": params.total / 1e9,
        "active_params_b": params.active / 1e9,
        "expert_params_b": params.experts / 1e9,
        "attention_params_b": params.attention / 1e9,
        "embedding_params_b": params.embedding / 1e9,
        "declared_params_b": declared,
        "declared_error_percent": None if declared is None else 100 * (params.total / 1e9 / declared - 1),
        "dtypes": {
            "weights": question.precision.weights,
            "experts": question.precision.experts,
            "kv": question.precision.kv,
            "compute": question.precision.compute,
        },
    }


def _system(answer: Answer) -> Json:
    system = answer.question.system
    return {
        "name": system.name,
        "source": system.source,
        "memory_gb": system.memory_gb,
        "memory_gb_s": system.memory_gb_s,
        "gpus_per_node": system.gpus_per_node,
        "peak_tflops": system.peak_flops(answer.question.precision.compute) / 1e12,
        "is_calibrated": is_calibrated(system),
        "ttft_interval": {"low": system.ttft_interval.low, "high": system.ttft_interval.high},
        "tpot_interval": {"low": system.tpot_interval.low, "high": system.tpot_interval.high},
    }


def _workload(answer: Answer) -> Json:
    workload = answer.question.workload
    objective = workload.objective
    return {
        "prompt_tokens": _lengths(workload.isl),
        "answer_tokens": _lengths(workload.osl),
        "concurrency": workload.concurrency,
        "rate_requests_s": workload.rate,
        "cached_prefix_share": workload.prefix_share,
        "burstiness": workload.burstiness,
        "chunk_tokens": workload.chunk_tokens,
        "objective": {
            "ttft_s": objective.ttft_s,
            "tpot_ms": objective.tpot_ms,
            "recovery_s": objective.recovery_s,
            "availability_share": objective.availability,
            "prefill_tokens_ms_gpu": objective.prefill_tokens_ms,
        },
        "assumed": dict(answer.question.assumed),
    }


def _lengths(of: Lengths) -> Json:
    return {"least": of.points[0][0], "mean": of.mean, "most": of.most}


def layout(deployment: Deployment, answer: Answer) -> Json:
    return sizes(deployment) | {
        "experts_per_gpu": deployment.primary(answer.question.spec),
        "notes": list(answer.chosen.notes) if deployment == answer.deployment else [],
    }


def sizes(deployment: Deployment) -> Json:
    return {
        "text": str(deployment),
        "tp": deployment.tp,
        "pp": deployment.pp,
        "dp": deployment.dp,
        "ep": deployment.ep,
        "cells": deployment.cells,
        "gpus": deployment.num_gpus,
        "cell_gpus": deployment.cell_gpus,
        "standby_slots_per_gpu": deployment.standby,
        "spares_per_cell": deployment.spares,
    }


# -- what is expected --------------------------------------------------------------------------------------------------


def _memory(answer: Answer) -> Json:
    """Of the fullest GPU."""
    held = answer.estimate.footprint
    return {
        "total_gb": held.total_bytes / 1e9,
        "of_gb": answer.question.system.memory_gb,
        "weights_gb": held.weights_bytes / 1e9,
        "experts_gb": held.experts_bytes / 1e9,
        "attention_gb": held.dense_bytes / 1e9,
        "vocabulary_gb": held.vocabulary_bytes / 1e9,
        "standby_gb": held.standby_bytes / 1e9,
        "kv_gb": held.kv_bytes / 1e9,
        "step_gb": held.step_bytes / 1e9,
        "process_gb": held.runtime_bytes / 1e9,
        "max_sequences": answer.estimate.max_sequences,
        "sequence_tokens": answer.question.workload.most_tokens,
    }


def _bounds(answer: Answer) -> Json:
    question, bounds = answer.question, answer.bounds
    longest, wanted = question.workload.isl.most, question.told_prefill_tokens_ms
    return {
        "prefill": [
            {"prompt_tokens": length, "tokens_ms_gpu": bounds.prefill_tokens_ms(length)}
            for length in question.told_lengths
        ],
        "required_prefill_tokens_ms_gpu": wanted,
        "required_holds_to_prompt_tokens": None if wanted is None else bounds.longest_prompt_at(wanted),
        "decode": [
            {
                "context_tokens": length,
                "sequences": answer.sequences,
                "tokens_ms_gpu": bounds.decode_tokens_ms(answer.sequences, length),
                "tpot_ms": bounds.decode_round_s(answer.sequences, length) * 1e3,
            }
            for length in question.told_lengths
        ],
        "prompt_tokens": longest,
        "ttft_alone_ms": bounds.alone_s(longest) * 1e3,
        "prompts_at_once": answer.sequences,
        "ttft_at_once_s": bounds.at_once_s(answer.sequences, longest),
    }


def _expected(candidate: Candidate) -> Json:
    found = candidate.estimate
    return {
        "sequences": found.concurrency,
        "rate_requests_s": found.rate,
        "output_tokens_s": found.output_tokens_s,
        "output_tokens_s_gpu": found.output_tokens_s_gpu,
        "prompt_tokens_s": found.prompt_tokens_s,
        "is_overloaded": found.is_overloaded,
        "busy_share": found.busy,
        "ttft_idle_ms": found.idle_ttft_s * 1e3,
        "ttft_ms": _span(found.ttft_s),
        "ttft_p99_ms": _span(found.ttft_p99_s),
        "tpot_ms": _span(found.tpot_s),
        "capacity_requests_s": found.capacity,
        "capacity_sequences": found.capacity_sequences,
    }


def _span(value: Span) -> Json:
    return {"value": value.value * 1e3, "low": value.low * 1e3, "high": value.high * 1e3}


# -- losses ------------------------------------------------------------------------------------------------------------


def _losses(answer: Answer) -> Json:
    found = answer.losses
    return {
        "worst_capacity_requests_s": found.worst_capacity,
        "standby_slots_needed_for_one_gpu": found.standby_needed,
        "experts_with_a_live_copy_share": found.coverage,
        "states": [_state(told) for told in losses_told(answer)],
    }


def _state(told: Loss) -> Json:
    state = told.state
    return {
        "kind": state.kind,
        "lost_gpus": list(state.gpus),
        "stopped_gpus_at_once": state.blast_gpus,
        "resting_gpus_after": state.blast_gpus_after,
        "slots_needed_per_gpu": told.slots_needed,
        "slots_present_per_gpu": told.slots_present,
        "fits_slots": state.fits_slots,
        "tokens_that_meet_a_lost_expert_share": state.hit_share,
        "capacity_share_at_once": state.share_at_once,
        "capacity_at_once_requests_s": state.capacity_at_once,
        "capacity_share_after": state.share,
        "capacity_after_requests_s": state.capacity,
        "serves_without_a_new_worker": state.is_survivable,
        "keeps_objective": state.keeps_objective,
        "ttft_ms": _span(state.degraded.ttft_s) if state.is_survivable else None,
        "ttft_p99_ms": _span(state.degraded.ttft_p99_s) if state.is_survivable else None,
        "ttft_at_once_s": state.at_once_s,
        "streams_go_on_after_s": {"first": told.budget.first_token_s, "last": told.budget.all_streams_s},
    }


def budget(spent: Budget) -> Json:
    return {
        "first_stream_s": spent.first_token_s,
        "all_streams_s": spent.all_streams_s,
        "whole_again_s": spent.whole_s,
        "waits_for_a_seat": spent.is_waiting,
        "phases": [{"name": phase.name, "s": phase.seconds} for phase in spent.failover],
        "restore_phases": [{"name": phase.name, "s": phase.seconds} for phase in spent.restore],
    }


def _availability(answer: Answer) -> Json:
    found, known = answer.availability, answer.question.system.recovery
    return {
        "kept_share": found.kept,
        "paused_share": found.paused,
        "degraded_share": found.degraded,
        "standing_share": found.standing,
        "failure_every_h": found.failure_h,
        "pause_s": found.pause_s,
        "mtbf_h": known.mtbf_h,
        "replace_h": known.replace_h,
        "spares_per_cell": answer.deployment.spares,
        "spares_needed_per_cell": answer.spares_needed,
    }


def _admission(answer: Answer) -> Json | None:
    """Of each cell; null without a TTFT objective."""
    if not answer.bound_tokens:
        return None
    return {
        "planned_prompt_tokens_by_replicas": {str(num): tokens for num, tokens in answer.budgets.items()},
        "bound_prompt_tokens_by_replicas": {str(num): tokens for num, tokens in answer.bound_tokens.items()},
    }


# -- operations, and other layouts -------------------------------------------------------------------------------------


def _operations(ops: list[Op]) -> list[Json]:
    total = sum(op.seconds for op in ops)
    return [
        {
            "name": op.name,
            "ms": op.seconds * 1e3,
            "share": op.seconds / total if total else 0.0,
            "bound": op.bound,
            "gflop": op.flops / 1e9,
            "memory_gb": op.memory_bytes / 1e9,
            "link_gb": op.link_bytes / 1e9,
        }
        for op in ops
    ]


def _better(answer: Answer, better: Candidate) -> Json:
    ours = answer.estimate.output_tokens_s_gpu
    ratio = better.estimate.output_tokens_s_gpu / ours if ours else math.inf
    return row(better) | {"output_tokens_s_gain_percent": 100 * (ratio - 1)}


def _ranking(answer: Answer) -> Json:
    question, other = answer.question, answer.first_by_other
    return {
        "by": question.rank,
        "candidates": [row(candidate) for candidate in answer.found.candidates[: question.top]],
        "num_candidates": len(answer.found.candidates),
        "nearest_miss": answer.found.nearest,
        "first_by_other_ranking": None if other is None else row(other),
    }


def row(candidate: Candidate) -> Json:
    """Of a table of layouts."""
    found, worst = candidate.estimate, candidate.worst_capacity
    return {
        "layout": sizes(candidate.deployment),
        "output_tokens_s": found.output_tokens_s,
        "output_tokens_s_gpu": found.output_tokens_s_gpu,
        "ttft_ms": found.ttft_s.value * 1e3,
        "ttft_p99_ms": found.ttft_p99_s.value * 1e3,
        "tpot_ms": found.tpot_s.value * 1e3,
        "memory_gb": found.footprint.total_bytes / 1e9,
        "max_sequences": found.max_sequences,
        "capacity_requests_s": found.capacity,
        "worst_capacity_requests_s": worst,
        "stopped_gpus_at_once": candidate.deployment.cell_gpus,
        "notes": list(candidate.notes),
        "misses": [str(miss) for miss in candidate.misses],
    }


def _rejected(answer: Answer) -> list[Json]:
    return [
        {"reason": reason, "num_layouts": len(names), "layouts": names}
        for reason, names in answer.rejected_by_reason.items()
    ]
