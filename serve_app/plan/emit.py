"""A plan as a Ray Serve config, as `serve run` and `octavo serve` take it. The same plan is the same bytes.

It is the config of one cell: Octavo spreads no requests over several cells yet, so a plan of more says so in its head.
"""

import math
import re
from collections.abc import Mapping
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from pathlib import Path
from typing import Any

import yaml

from serve_app.config import IMPORT_PATH, OctavoConfig, parse_config
from serve_app.errors import PlanError
from serve_app.experts.layout import stage_layers
from serve_app.plan.counts import Precision
from serve_app.plan.emit_head import head
from serve_app.plan.estimate import Cost, Estimate
from serve_app.plan.footprint import kv_gpu_token_bytes
from serve_app.plan.room import Room, room
from serve_app.plan.workload import Workload

PAGE_TOKENS = 32  # `scheduler.page_tokens`
MESSAGE_BYTES = 2**30  # of one part of a message: `runtime.wire.MAX_PART_BYTES`, which is not ours to import
ITEM_BYTES = 4  # of a value in it
GPU_WORKER_CPUS, CPU_WORKER_CPUS = 1, 0.05  # reserved with Ray; workers on CPUs are to fit wherever they are
LEAST_QUEUED = 1024  # requests, as where nothing was planned
DIGITS = 4  # of `worker.kv_gib`

_SERVED = {"bf16": "bfloat16", "fp16": "bfloat16", "fp32": "float32"}  # what the engine computes in


def emit(
    cost: Cost, workload: Workload, estimate: Estimate, tokens_by_replicas: Mapping[int, int], *, model: str
) -> str:
    """The YAML text. `tokens_by_replicas`: of `admission.budgets`; it is not read without a TTFT objective.

    `model`: as the key `model` of the config takes it. PlanError where the plan cannot be served as it is: a dtype that
    Octavo does not compute in, steps too large for a message, an objective that a long prompt alone misses.
    """
    args = arguments(cost, workload, estimate, tokens_by_replicas, model=model)
    config = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": 8000},
        "logging_config": {"log_level": "WARNING"},
        "applications": [{"name": "octavo", "route_prefix": "/", "import_path": IMPORT_PATH, "args": args}],
    }
    above = "".join(f"# {line}".rstrip() + "\n" for line in head(cost, workload, estimate, args))
    return above + yaml.dump(config, Dumper=_Indented, sort_keys=False, width=120, allow_unicode=True)


def arguments(
    cost: Cost, workload: Workload, estimate: Estimate, tokens_by_replicas: Mapping[int, int], *, model: str
) -> dict[str, Any]:
    """The application's `args`. Raises as `emit` does."""
    if not estimate.fits:
        raise PlanError(f"{cost.deployment} holds not even one sequence: there is nothing to write.")
    _check_step(cost, workload)
    places, gpus = room(cost, workload), cost.system.kind == "gpu"
    kv_gib, kv_tokens = _kv(cost, workload, places)
    layout = cost.deployment
    args: dict[str, Any] = {
        "model": model,
        "dtype": _dtype(cost.precision),
        "device": "cuda" if gpus else "cpu",
        "network": "auto",
        "num_ingress": 1,
        "layout": {"tp": layout.tp, "pp": layout.pp, "dp": layout.dp, **_uneven(cost)},
        "worker": {
            "num_threads": 1,
            "num_cpus": GPU_WORKER_CPUS if gpus else CPU_WORKER_CPUS,
            "num_gpus": 1 if gpus else 0,
            "primary_slots": layout.primary(cost.spec),
            "standby_slots": layout.standby,
            "kv_gib": kv_gib,
        },
        "scheduler": {
            "page_tokens": PAGE_TOKENS,
            "max_running": places.max_running,
            "max_step_tokens": workload.chunk_tokens,
            "max_context_tokens": min(cost.spec.max_positions, kv_tokens),
        },
        "limits": _limits(workload, tokens_by_replicas, layout.dp),
        "slo": _slo(workload),
        "resilience": {"spares": layout.spares},
    }
    args["num_ingress"] = _num_ingress(args)
    if not args["limits"]:
        del args["limits"]
    parse_config(args)
    return args


def file_name(cost: Cost, model: str) -> str:
    """Such as demo-laptop-tp1-pp2-dp1.yaml: what is served, on what, and how it is laid out."""
    layout = cost.deployment
    words = [
        model.rstrip("/").rsplit("/", 1)[-1],
        cost.system.name,
        f"tp{layout.tp}",
        f"pp{layout.pp}",
        f"dp{layout.dp}",
    ]
    return re.sub(r"[^a-z0-9.]+", "-", "-".join(words).lower()).strip("-.") + ".yaml"


def write(folder: Path, name: str, text: str) -> Path:
    """The file `name` in a folder, which is made where there is none. A file that says the same already is left alone.

    PlanError where one says something else, or none can be written.
    """
    path = folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(text, encoding="utf-8", newline="\n")
        elif path.read_bytes() != text.encode():
            raise PlanError(f"{path} is there already and says something else: move it away, or name another folder.")
    except OSError as error:
        raise PlanError(f"{path} cannot be written: {error.strerror}.") from None
    return path


class _Indented(yaml.SafeDumper):
    """Lists stand further in than their key, as in the configs that are written by hand."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:
        return True


# -- args -----------------------------------------------------------------------------------------------------------


def _check_step(cost: Cost, workload: Workload) -> None:
    rows = cost.spec.top_k if cost.deployment.ep > 1 else 1
    most = MESSAGE_BYTES // (rows * cost.spec.hidden_size * ITEM_BYTES)
    if workload.chunk_tokens > most:
        raise PlanError(
            f"steps of {workload.chunk_tokens} prompt tokens are too large for a message: plan with at most {most}."
        )


def _dtype(precision: Precision) -> str:
    """All classes of tensors are served in one."""
    dtypes = {_SERVED.get(name, name) for name in (precision.weights, precision.experts, precision.kv)}
    if len(dtypes) > 1 or not dtypes <= set(_SERVED.values()):
        raise PlanError(
            f"weights in {precision.weights}, experts in {precision.experts} and KV in {precision.kv} can be planned,"
            " and not be served yet: plan with all in bf16 or all in fp32 to write a config."
        )
    return dtypes.pop()


def _uneven(cost: Cost) -> dict[str, list[int]]:
    """Layers by stage, where they are not the same everywhere."""
    counts = [len(stage) for stage in stage_layers(cost.spec.num_layers, cost.deployment.pp)]
    return {"stage_layers": counts} if len(set(counts)) > 1 else {}


def _kv(cost: Cost, workload: Workload, places: Room) -> tuple[float, int]:
    """(GiB on the fullest worker, tokens in it.) All that fit on a GPU; on a CPU no more than can be in use."""
    token_bytes = kv_gpu_token_bytes(cost.spec, cost.precision, cost.deployment)
    wanted = max(places.max_running * workload.most_tokens, cost.spec.max_positions) + PAGE_TOKENS
    if cost.system.kind == "cpu" and wanted < places.kv_tokens:
        kv_gib = _rounded(wanted * token_bytes / 2**30, ROUND_CEILING)
    else:
        kv_gib = _rounded(places.kv_tokens * token_bytes / 2**30, ROUND_FLOOR)
    return kv_gib, int(int(kv_gib * 2**30) // (PAGE_TOKENS * token_bytes)) * PAGE_TOKENS


def _rounded(value: float, rounding: str) -> float:
    exact = Decimal(value)
    return float(exact.quantize(Decimal(1).scaleb(exact.adjusted() - DIGITS + 1), rounding))


def _limits(workload: Workload, tokens_by_replicas: Mapping[int, int], num_replicas: int) -> dict[str, Any]:
    """A prompt is let into an idle cell as far as these go, however long: of that the time decides."""
    if workload.objective.ttft_s is None:
        return {}
    if set(tokens_by_replicas) != set(range(1, num_replicas + 1)):
        raise ValueError(f"budgets for 1 to {num_replicas} replicas are needed, not for {sorted(tokens_by_replicas)}.")
    if not tokens_by_replicas[num_replicas]:
        raise PlanError(
            f"no prompt may wait: beside answers that run, one of {workload.isl.most} tokens takes longer than the"
            f" objective of {workload.objective.ttft_s:g} s for the first token allows: raise it."
        )
    most = {num: max(tokens, workload.isl.most) for num, tokens in sorted(tokens_by_replicas.items())}
    all_tokens = most.pop(num_replicas)
    limits: dict[str, Any] = {
        "max_queued": max(LEAST_QUEUED, math.ceil(all_tokens / workload.isl.mean)),
        "max_queued_tokens": all_tokens,
    }
    return limits | ({"queued_tokens_by_replicas": most} if most else {})


def _slo(workload: Workload) -> dict[str, float | None]:
    objective = workload.objective
    ttft_s = None if objective.ttft_s is None else float(objective.ttft_s)
    slo: dict[str, float | None] = {"ttft_s": ttft_s}
    return slo if objective.tpot_ms is None else slo | {"itl_ms": float(objective.tpot_ms)}


def _num_ingress(args: Mapping[str, Any]) -> int:
    """As many as have room for all who are answered or wait: each has so many connections."""
    limits = OctavoConfig().limits
    num_open = args["layout"]["dp"] * args["scheduler"]["max_running"]
    num_open += args["limits"].get("max_queued", limits.max_queued)
    return -int(-num_open // limits.max_connections)
