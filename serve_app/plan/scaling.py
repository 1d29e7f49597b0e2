"""How a plan scales: one size varied at a time from a base, the others as they were. Rows of data, each an estimate.

More GPUs first make the replicas of a cell more, as long as each layer has an expert for every worker; with one expert
per layer and worker a cell is as large as it can be (16 experts x PP 4: 64 GPUs), and from there on there are more
cells. The best layout for each size is the search's to find: `by_gpus` takes it as `choose`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from serve_app.errors import PlanError
from serve_app.plan.counts import Precision, count_params
from serve_app.plan.deployment import Deployment
from serve_app.plan.estimate import Cost, Estimate, estimate
from serve_app.plan.footprint import footprint
from serve_app.plan.workload import Lengths, Workload

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
EXPERTS = (256, 512)  # of all layers
CONCURRENCY = (1, 8, 32, 64, 128, 256)
PROMPTS = (128, 1024, 10_240, 20_480)
DTYPES = ("bf16", "fp8")

Choose = Callable[[Cost, int], Deployment]  # ValueError where there is none for so many GPUs


@dataclass(frozen=True)
class Row:
    """One size. Either an estimate, or why there is none."""

    dimension: str
    value: int | str
    deployment: Deployment | None
    num_params: int
    estimate: Estimate | None
    reason: str = ""

    @property
    def fits(self) -> bool:
        return self.estimate is not None and self.estimate.fits


def most_gpus(num_experts: int, pp: int) -> int:
    """Of one cell: with one expert of each layer on each worker. More could only copy experts, or cut them."""
    return num_experts * pp


def widened(cost: Cost, num_gpus: int) -> Deployment:
    """The deployment of a cost on so many GPUs: with other numbers of replicas and cells, spares left out.

    Fewer GPUs than a replica has take stages out. ValueError where it does not come out even.
    """
    base = cost.deployment
    pp = min(base.pp, num_gpus // base.tp)
    if not pp or num_gpus % (base.tp * pp):
        raise ValueError(f"{num_gpus} GPUs do not divide into replicas of TP {base.tp} x PP {max(1, pp)}.")
    num_replicas = num_gpus // (base.tp * pp)
    most = max(1, cost.spec.num_experts // base.tp)  # replicas of a cell
    dp = max(dp for dp in range(1, min(most, num_replicas) + 1) if num_replicas % dp == 0)
    return replace(base, pp=pp, dp=dp, cells=num_replicas // dp, spares=0)


def by_gpus(
    cost: Cost, workload: Workload, sizes: Sequence[int] = GPUS, choose: Choose = widened, *, with_load: bool = True
) -> list[Row]:
    """`with_load`: concurrency or rate grow with the GPUs, so that each has as much to do as in the base."""
    rows = []
    for num in sizes:
        load = _times(workload, num / cost.deployment.num_gpus) if with_load else workload
        try:
            deployment = choose(cost, num)
        except (ValueError, PlanError) as error:
            rows.append(Row("GPUs", num, None, count_params(cost.spec).total, None, str(error)))
            continue
        rows.append(_row("GPUs", num, replace(cost, deployment=deployment), load))
    return rows


def by_experts(cost: Cost, workload: Workload, totals: Sequence[int] = EXPERTS) -> list[Row]:
    """`totals`: experts of all layers together, as in «512 experts»: 32 in each of 16 layers."""
    rows = []
    for total in totals:
        per_layer, rest = divmod(total, cost.spec.num_layers)
        if rest or per_layer < max(2, cost.spec.top_k):
            reason = f"{total} experts do not divide over {cost.spec.num_layers} layers, top-{cost.spec.top_k}."
            rows.append(Row("experts", total, None, 0, None, reason))
            continue
        rows.append(_row("experts", total, replace(cost, spec=replace(cost.spec, num_experts=per_layer)), workload))
    return rows


def by_concurrency(cost: Cost, workload: Workload, numbers: Sequence[int] = CONCURRENCY) -> list[Row]:
    """Sequences at a time, over all GPUs."""
    return [_row("sequences", num, cost, replace(workload, concurrency=num, rate=None)) for num in numbers]


def by_prompt(cost: Cost, workload: Workload, lengths: Sequence[int] = PROMPTS) -> list[Row]:
    return [_row("prompt tokens", num, cost, replace(workload, isl=Lengths.fixed(num))) for num in lengths]


def by_dtype(cost: Cost, workload: Workload, dtypes: Sequence[str] = DTYPES) -> list[Row]:
    """Weights, experts and KV; products too where the hardware has them, and else as they were."""
    return [_row("dtype", dtype, _in_dtype(cost, dtype), workload) for dtype in dtypes]


def tables(cost: Cost, workload: Workload, choose: Choose = widened) -> dict[str, list[Row]]:
    """All of them, by what is varied."""
    return {
        "GPUs": by_gpus(cost, workload, choose=choose),
        "experts": by_experts(cost, workload),
        "sequences": by_concurrency(cost, workload),
        "prompt tokens": by_prompt(cost, workload),
        "dtype": by_dtype(cost, workload),
    }


def least_gpus(cost: Cost, workload: Workload) -> int | None:
    """The fewest GPUs that hold the model and one sequence of the workload, as stages. None: not even one a layer."""
    for pp in range(1, cost.spec.num_layers + 1):
        held = footprint(
            cost.spec,
            cost.precision,
            cost.system,
            Deployment(pp=pp),
            kv_tokens=workload.most_tokens,
            chunk_tokens=workload.chunk_tokens,
        )
        if held.total_bytes <= cost.system.memory_share * cost.system.memory_gb * 1e9:
            return pp
    return None


def columns(row: Row) -> Iterator[tuple[str, float | int | str | None]]:
    """What a table shows of it, and JSON: plain values, None where there are none."""
    of = row.estimate if row.fits else None
    yield row.dimension, row.value
    yield "layout", None if row.deployment is None else str(row.deployment)
    yield "params", row.num_params
    yield "max_sequences", 0 if of is None else of.max_sequences
    yield "memory_gb", None if of is None else of.footprint.total_bytes / 1e9
    yield "output_tokens_s", None if of is None else of.output_tokens_s
    yield "output_tokens_s_gpu", None if of is None else of.output_tokens_s_gpu
    yield "ttft_s", None if of is None else of.ttft_s.value
    yield "ttft_p99_s", None if of is None else of.ttft_p99_s.value
    yield "tpot_s", None if of is None else of.tpot_s.value
    yield "reason", row.reason


def _row(dimension: str, value: int | str, cost: Cost, workload: Workload) -> Row:
    deployment, num_params = cost.deployment, count_params(cost.spec).total
    if workload.isl.most + workload.osl.most > cost.spec.max_positions:
        reason = f"the model reads {cost.spec.max_positions} tokens at most."
        return Row(dimension, value, deployment, num_params, None, reason)
    found = estimate(cost, workload)
    reason = "" if found.fits else f"{deployment} does not hold a sequence of {workload.most_tokens} tokens."
    if not reason and deployment.cell_gpus > (most := most_gpus(cost.spec.num_experts, deployment.pp)):
        reason = f"a cell of more than {most} GPUs has workers without an expert."
    return Row(dimension, value, deployment, num_params, found, reason)


def _times(workload: Workload, factor: float) -> Workload:
    if workload.rate is not None:
        return replace(workload, rate=workload.rate * factor)
    assert workload.concurrency is not None
    return replace(workload, concurrency=max(1, round(workload.concurrency * factor)))


def _in_dtype(cost: Cost, dtype: str) -> Cost:
    try:
        cost.system.peak_flops(dtype)
        compute = dtype
    except ValueError:
        compute = cost.precision.compute
    return replace(cost, precision=Precision(dtype, dtype, dtype, compute))
