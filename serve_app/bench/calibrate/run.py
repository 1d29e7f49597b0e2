"""Measure, then fit: the machine's peaks, steps of one worker, then cells under load, within a budget of seconds."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from serve_app.bench.calibrate.machine import Machine, measure, others_at_work
from serve_app.bench.calibrate.rehearsal import rehearse
from serve_app.bench.calibrate.steady import Load, Seen, SteadyCell
from serve_app.bench.calibrate.steps import StepBench
from serve_app.bench.measure import BenchError
from serve_app.engine.pace import MAX_STALL, Observed, Work
from serve_app.model.cpu import pick_dtype
from serve_app.model.spec import ModelSpec
from serve_app.model.tiles import KV_BLOCK_TOKENS
from serve_app.plan.closed_loop import step_of
from serve_app.plan.counts import Precision
from serve_app.plan.deployment import Deployment
from serve_app.plan.estimate import estimate
from serve_app.plan.fit import Case, Fitted, Observation, fit, interval_of, rounded
from serve_app.plan.system import Efficiency, Interval, System
from serve_app.plan.workload import Lengths, Workload

MACHINE_SHARE, STEPS_SHARE = 0.1, 0.25  # of the budget; the rest is for cells
LAYOUTS = (Deployment(), Deployment(pp=2), Deployment(dp=2))
LOADS = (Load(4, 240, 10), Load(20, 40, 16), Load(1, 160, 12), Load(2, 500, 8))  # the first two keep two workers busy
STEP_TOKENS = 512  # of a bench cell's step, at most
MAX_POINTS = 10  # that the observed steps of one load become
BUSY = 2  # requests for each worker, at least, that keep all at work
MIN_RUN, MAX_RUNS = 6, 3  # steps of a run, runs of one load
TRIMMED = 0.1  # of them, at either end
CELL_WEIGHT = 2.0  # an observation that is the mean of many, beside a single step's

Say = Callable[[str], None]


@dataclass
class Served:
    """A load on a cell: what was predicted, once there is a prediction, and what was measured."""

    case: Case
    seen: Seen
    ttft_s: float = 0.0  # as `octavo plan` estimates it
    tpot_s: float = 0.0
    rehearsed: Seen | None = None  # as the engine has it in virtual time

    def observations(self) -> Iterator[Observation]:
        """Of its steps. Where requests are too few to keep all workers busy, nothing is told."""
        num_workers = self.case.num_workers
        if num_workers == 1 or self.seen.load.concurrency >= BUSY * num_workers:
            yield from observations_of(self.case, self.seen.observed)

    @property
    def ttft_ratio(self) -> float:
        return self.seen.ttft_s / self.ttft_s

    @property
    def tpot_ratio(self) -> float:
        return self.seen.tpot_s / self.tpot_s


@dataclass
class Calibrated:
    machine: Machine
    fitted: Fitted
    system: System
    observations: list[Observation]
    served: list[Served] = field(default_factory=list)
    others: float = 0.0  # cores that were busy with something else, in the mean of a few looks


def calibrate(
    models: Sequence[str], num_threads: int, seconds: float, say: Say, layouts: Sequence[Deployment] = LAYOUTS
) -> Calibrated:
    """On the CPU, or on the GPU where there is one and one was asked for. Loading comes on top of `seconds`.

    OctavoError where a model cannot be loaded, or a worker dies.
    """
    device = torch.device("cpu")
    say("peaks of this machine")
    looks = [others_at_work()]
    machine = measure(device, num_threads, max(1.0, seconds * MACHINE_SHARE))
    system, precision = bare_system(machine), precision_of(device)
    observations: list[Observation] = []
    served: list[Served] = []
    layouts = [layout for layout in layouts if layout.cell_gpus <= machine.num_workers]
    num_loads = sum(len(_loads(layout)) for layout in layouts)
    load_s = seconds * (1 - MACHINE_SHARE - STEPS_SHARE) / (len(models) * num_loads)
    for model in models:
        say(f"{model}: steps in this process")
        spec, alone = steps_of(model, num_threads, precision, seconds * STEPS_SHARE / len(models))
        observations += alone
        for layout in layouts:
            looks.append(others_at_work())
            say(f"{model}: a cell of {layout}")
            seen = cell_of(model, Case(spec, precision, layout), num_threads, _loads(layout), load_s)
            observations += [o for one in seen for o in observations_of(one.case, one.seen.observed)]
            served += seen
    say("fitting")
    found = conclude(machine, system, observations, served)
    found.others = sum(looks) / len(looks)
    return found


def _loads(layout: Deployment) -> Sequence[Load]:
    """Where several work, those that keep all of them busy."""
    return LOADS if layout.cell_gpus == 1 else [load for load in LOADS if load.concurrency >= BUSY * layout.cell_gpus]


def conclude(machine: Machine, system: System, observations: list[Observation], served: list[Served]) -> Calibrated:
    """Coefficients of the steps; intervals of steps and of whole requests."""
    fitted = fit(system, observations)
    found = rounded(fitted.system)
    predict(found, served)
    ttft = [one.ttft_ratio for one in served]
    tpot = [one.tpot_ratio for one in served]
    intervals = {
        "ttft_interval": _interval(found.ttft_interval, observations, fitted, ttft, of_prompts=True),
        "tpot_interval": _interval(found.tpot_interval, observations, fitted, tpot, of_prompts=False),
    }
    found = found.model_copy(update=intervals)
    return Calibrated(machine, fitted, found, observations, served)


def _interval(
    known: Interval, observations: Sequence[Observation], fitted: Fitted, requests: list[float], *, of_prompts: bool
) -> Interval:
    """Requests are what is promised; where they were few, their steps count beside them."""
    steps = [
        ratio
        for o, ratio in zip(observations, fitted.ratios, strict=True)
        if o.has_prompt == of_prompts and o.kind != "alone"
    ]
    return interval_of([*requests, *steps], num_fitted=len(fitted.coefficients)) or known


def bare_system(machine: Machine) -> System:
    """What was measured of the machine alone; the rest is a default, and says so."""
    digits = {dtype: float(f"{peak:.4g}") for dtype, peak in machine.peak_tflops.items()}
    rate = float(f"{machine.mesh_gb_s:.3g}")
    return System(
        name="this-machine",
        source=f"octavo calibrate, {machine.name}, threads of a worker: {machine.num_threads}. Measured: peak_tflops,"
        " memory_gb_s, intra_gb_s, efficiency, contention, intervals. inter_gb_s is that of the loopback, as no other"
        " node was there; load, disk and recovery are defaults.",
        kind="cpu" if machine.kind == "cpu" else "gpu",
        peak_tflops=digits,
        memory_gb=round(machine.memory_gb, 2),
        memory_gb_s=float(f"{machine.memory_gb_s:.4g}"),
        gpus_per_node=machine.num_workers,
        intra_gb_s=rate,
        inter_gb_s=rate,
        efficiency=Efficiency(kv_block=float(KV_BLOCK_TOKENS)),
    )


def precision_of(device: torch.device) -> Precision:
    name = "bf16" if pick_dtype(device) == torch.bfloat16 else "fp32"
    return Precision(name, name, name, name)


def steps_of(model: str, num_threads: int, precision: Precision, seconds: float) -> tuple[ModelSpec, list[Observation]]:
    bench = StepBench(model, num_threads)
    case = Case(bench.spec, precision, Deployment())
    return bench.spec, list(bench.observe(case, seconds))


def cell_of(model: str, case: Case, num_threads: int, loads: Sequence[Load], seconds: float) -> list[Served]:
    """A cell of this layout under each load for about `seconds`."""
    layout = {"tp": case.deployment.tp, "pp": case.deployment.pp, "dp": case.deployment.dp}
    fitting = [load for load in loads if load.prompt_tokens + load.output_tokens <= case.spec.max_positions]
    if not fitting:
        raise BenchError(f"no load fits the model's context of {case.spec.max_positions} tokens")
    with SteadyCell(model, layout, num_threads, fitting) as cell:
        return [Served(case, cell.steady(load, seconds)) for load in fitting]


def predict(system: System, served: Sequence[Served]) -> None:
    """What the planner says of each load."""
    for one in served:
        told = estimate(one.case.cost(system), workload_of(one.seen.load))
        one.ttft_s, one.tpot_s = told.ttft_s.value, told.tpot_s.value
        one.rehearsed = rehearse(one.case, system, one.seen.load)


def workload_of(load: Load) -> Workload:
    return Workload(
        Lengths.fixed(load.prompt_tokens),
        Lengths.fixed(load.output_tokens),
        concurrency=load.concurrency,
        chunk_tokens=STEP_TOKENS,
    )


def observations_of(case: Case, observed: Sequence[Observed]) -> Iterator[Observation]:
    """The steps of one load, few enough to fit: those about alike are one, with their mean work and time.

    In a pipeline a step's interval is its own only behind steps like it. Replicas that work for each other slow each
    other down by what the other one happens to do: of them only whole runs of steps are told.
    """
    kept = _without_stalls(observed)
    if case.deployment.dp > 1:
        yield from _runs(case, kept)
        return
    own = [o for i, o in enumerate(kept) if _follows_its_like(kept, i, case.deployment.pp)]
    groups = sorted(_by_size(own).values(), key=len, reverse=True)
    for group in groups[:MAX_POINTS]:
        cut = int(len(group) * TRIMMED)
        inner = sorted(group, key=lambda o: o.seconds)[cut : len(group) - cut]
        work = Work(*(sum(parts) / len(inner) for parts in zip(*map(_parts, inner), strict=True)))
        yield Observation(case, step_of(work), sum(o.seconds for o in inner) / len(inner), weight=CELL_WEIGHT)


def _follows_its_like(observed: Sequence[Observed], index: int, num_stages: int) -> bool:
    """As many as are under way with it."""
    if index < num_stages - 1:
        return False
    return len({_size(o) for o in observed[index - num_stages + 1 : index + 1]}) == 1


def _runs(case: Case, observed: Sequence[Observed]) -> Iterator[Observation]:
    size = max(MIN_RUN, -(-len(observed) // MAX_RUNS))
    for begin in range(0, len(observed) - MIN_RUN + 1, size):
        run = observed[begin : begin + size]
        first, *others = [step_of(o.work) for o in run]
        yield Observation(case, first, sum(o.seconds for o in run), weight=CELL_WEIGHT, others=tuple(others))


def _without_stalls(observed: Sequence[Observed]) -> list[Observed]:
    """Those that took many times what others of their size did are left out."""
    middle_s = {size: sorted(o.seconds for o in of)[len(of) // 2] for size, of in _by_size(observed).items()}
    return [o for o in observed if o.seconds <= MAX_STALL * middle_s[_size(o)]]


def _by_size(observed: Sequence[Observed]) -> dict[tuple[int, int], list[Observed]]:
    groups: dict[tuple[int, int], list[Observed]] = {}
    for o in observed:
        groups.setdefault(_size(o), []).append(o)
    return groups


def _parts(observed: Observed) -> tuple[float, float, float]:
    work = observed.work
    return work.prompt_tokens, work.decode_rows, work.attended_kpairs


def _size(observed: Observed) -> tuple[int, int]:
    """Steps of one size: prompt tokens and rows to a factor of the square root of two."""
    prompt, rows = round(observed.work.prompt_tokens), round(observed.work.decode_rows)
    return (prompt**2).bit_length(), (rows**2).bit_length()
