"""What a deployment is expected to do: time to first token, time per output token, throughput, memory, with intervals.

The model of a replica: sequences go round its stages in as many microbatches as there are stages. Each step carries one
token of every sequence in it, and a share of the steps a chunk of somebody's prompt beside. Steps follow each other at
the pace of the slowest stage. Steady state: as many prompt tokens enter as answers that end make room for.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from serve_app.model.spec import ModelSpec
from serve_app.plan.counts import Precision
from serve_app.plan.deployment import Deployment
from serve_app.plan.footprint import Footprint, footprint, kv_gpu_token_bytes, max_kv_tokens
from serve_app.plan.ops import Op, Stage, Step
from serve_app.plan.system import Interval, System
from serve_app.plan.workload import Workload

NUM_BISECTIONS = 40


@dataclass(frozen=True)
class Span:
    """A prediction and where nine of ten measurements are expected."""

    value: float
    low: float
    high: float

    @staticmethod
    def of(value: float, interval: Interval) -> "Span":
        return Span(value, value * interval.low, value * interval.high)


@dataclass(frozen=True)
class Cost:
    """A model in a deployment on a system: prices of steps and prompts. Seconds."""

    spec: ModelSpec
    precision: Precision
    system: System
    deployment: Deployment
    by_all_reduce: bool = False

    @cached_property
    def stages(self) -> list[Stage]:
        return [
            Stage(self.spec, self.precision, self.system, self.deployment, index, self.by_all_reduce)
            for index in range(self.deployment.pp)
        ]

    @cached_property
    def _kinds(self) -> list[tuple[Stage, int]]:
        """Stages that differ in nothing but their place, once each, and how many there are."""
        kinds: dict[tuple[int, bool, bool], list[Stage]] = {}
        for stage in self.stages:
            kinds.setdefault((stage.num_layers, stage.is_last, stage.hops_inside), []).append(stage)
        return [(stages[0], len(stages)) for stages in kinds.values()]

    def interval_s(self, step: Step, num_peers: int | None = None) -> float:
        """From the end of one step to the end of the next: what the slowest stage takes."""
        return max(stage.seconds(step, num_peers=num_peers) for stage, _ in self._kinds)

    def latency_s(self, step: Step, num_peers: int | None = None) -> float:
        """Of one step through all stages."""
        return sum(num * stage.seconds(step, num_peers=num_peers) for stage, num in self._kinds)

    def breakdown(self, step: Step) -> list[Op]:
        """Operations of the step on its way through all stages, those of one name as one."""
        merged: dict[str, Op] = {}
        for stage, num in self._kinds:
            for op in stage.ops(step):
                old = merged.get(op.name, Op(op.name, 0.0, op.bound))
                merged[op.name] = replace(
                    old,
                    seconds=old.seconds + num * op.seconds,
                    flops=old.flops + num * op.flops,
                    memory_bytes=old.memory_bytes + num * op.memory_bytes,
                    link_bytes=old.link_bytes + num * op.link_bytes,
                )
        return list(merged.values())

    def prompt_s(self, num_tokens: float, chunk_tokens: int, beside: Step | None = None, cached: float = 0.0) -> float:
        """From a prompt's first step to its first token: its chunks follow each other through the stages.

        `beside`: answers that run in the same steps. `cached`: tokens of it that need not be computed.
        """
        todo = max(1.0, num_tokens - cached)
        num_chunks = math.ceil(todo / chunk_tokens)
        size = todo / num_chunks
        steps = [Step.prompt(size, cached + i * size, sampled=float(i == num_chunks - 1)) for i in range(num_chunks)]
        if beside is not None:
            steps = [step + beside for step in steps]
        return sum(self.interval_s(step) for step in steps[:-1]) + self.latency_s(steps[-1])

    def tpot_s(self, rows: float, context: float) -> float:
        """Between two tokens of a sequence, where each replica runs so many and no prompts come."""
        step = Step.decode(max(1.0, rows / self.deployment.pp), context)
        return max(self.deployment.pp * self.interval_s(step), self.latency_s(step))


@dataclass(frozen=True)
class Steady:
    """One replica in steady state; all others of its cell have the same load."""

    rows: float  # of answers, in each step
    rate: float  # requests/s
    busy: float  # share of the time in which prompts are computed
    wait_s: float  # until a prompt's first step
    prompt_s: float  # from there to its first token
    tpot_s: float

    @property
    def ttft_s(self) -> float:
        return self.wait_s + self.prompt_s

    @property
    def ttft_p99_s(self) -> float:
        """The wait falls off exponentially, for the share of requests that have to wait at all."""
        if self.busy <= 0.01 or self.wait_s == 0:
            return self.prompt_s
        return self.prompt_s + self.wait_s / self.busy * math.log(self.busy / 0.01)


@dataclass(frozen=True)
class Replica:
    """One replica under load. Prompts of the mean length stand for all, but their spread counts in the queue."""

    cost: Cost
    workload: Workload

    @cached_property
    def _cached(self) -> float:
        return self.workload.isl.mean * self.workload.prefix_share

    @cached_property
    def _num_chunks(self) -> int:
        return math.ceil((self.workload.isl.mean - self._cached) / self.workload.chunk_tokens)

    @cached_property
    def _chunk(self) -> Step:
        """The mean one of a prompt."""
        todo = self.workload.isl.mean - self._cached
        size = todo / self._num_chunks
        return Step.prompt(size, self._cached + (todo - size) / 2, sampled=1 / self._num_chunks)

    @cached_property
    def _variation(self) -> float:
        """Of arrivals and of prompts, as a queue feels it (Kingman, doi 10.1017/S0305004100036094)."""
        lengths = self.workload.isl
        return (self.workload.burstiness**2 + lengths.mean_square / lengths.mean**2 - 1) / 2

    @cached_property
    def most_rows(self) -> float:
        """Of a step, where every step carries a chunk."""
        return self.workload.osl.mean / self._num_chunks

    def steady(self, rows: float) -> Steady:
        """With so many rows of answers in each step, below `most_rows`. Below one: now and then a step has one."""
        pp, osl = self.cost.deployment.pp, self.workload.osl.mean
        beside = Step.decode(max(1.0, rows), self.workload.mean_tokens)
        mixed = self._chunk + beside
        plain_s, mixed_s = self.cost.interval_s(beside), self.cost.interval_s(mixed)
        busy_share = min(1.0, rows / osl * self._num_chunks)  # of the steps, that carry a chunk
        step_s = (1 - busy_share) * plain_s + busy_share * mixed_s
        rate = rows / osl / step_s
        service_s = self._num_chunks * mixed_s
        busy = min(rate * service_s, 1 - 1e-9)
        wait_s = self._variation * busy / (1 - busy) * service_s
        fill_s = self.cost.latency_s(mixed) - mixed_s
        tpot_s = max(pp * step_s, self.cost.latency_s(beside))
        return Steady(rows, rate, busy, wait_s, service_s + fill_s, tpot_s)

    def held(self, steady: Steady) -> float:
        """Sequences at a time: those that wait or are prefilled, and those that answer."""
        return steady.rate * (steady.ttft_s + (self.workload.osl.mean - 1) * steady.tpot_s)

    def at_concurrency(self, num_sequences: float) -> Steady:
        """The load at which it holds so many."""
        return self._last(lambda steady: self.held(steady) <= num_sequences)

    def at_rate(self, rate: float) -> Steady:
        """The load of so many requests/s; the most it can take where that is less."""
        return self._last(lambda steady: steady.rate <= rate)

    def at_most(self, num_sequences: float, ttft_s: float, tpot_s: float) -> Steady | None:
        """The highest load with no more sequences than these that keeps the objective; None: none does."""

        def keeps(steady: Steady) -> bool:
            return self.held(steady) <= num_sequences and steady.ttft_p99_s <= ttft_s and steady.tpot_s <= tpot_s

        found = self._last(keeps)
        return found if keeps(found) else None

    def _last(self, holds: Callable[[Steady], bool]) -> Steady:
        """The highest load for which a condition holds that holds below it too; next to none where it never does."""
        low, high = 0.0, self.most_rows
        best = self.steady(self.most_rows * 1e-6)
        for _ in range(NUM_BISECTIONS):
            middle = (low + high) / 2
            steady = self.steady(middle)
            if holds(steady):
                low, best = middle, steady
            else:
                high = middle
        return best


@dataclass(frozen=True)
class Estimate:
    """A deployment under a workload. All GPUs together, where nothing else is said."""

    deployment: Deployment
    footprint: Footprint
    kv_tokens: int  # that fit on one replica
    max_sequences: int  # of the workload's longest
    concurrency: float  # sequences at a time, those included that wait
    rate: float  # requests/s
    is_overloaded: bool  # more was asked for than it can take
    busy: float  # share of the time in which prompts are computed
    idle_ttft_s: float  # of the mean prompt, with nobody else there
    ttft_s: Span
    ttft_p99_s: Span
    tpot_s: Span
    output_tokens_s: float
    prompt_tokens_s: float
    capacity: float | None  # requests/s with the objective kept; None: not even one request keeps it

    @property
    def fits(self) -> bool:
        return self.max_sequences >= 1

    @property
    def output_tokens_s_gpu(self) -> float:
        return self.output_tokens_s / self.deployment.num_gpus


def estimate(cost: Cost, workload: Workload) -> Estimate:
    """What is expected of a deployment. One that does not hold a single sequence has `fits` False, and zeros."""
    deployment, num = cost.deployment, cost.deployment.num_replicas
    token_bytes = kv_gpu_token_bytes(cost.spec, cost.precision, deployment)
    sampled = max(1.0, (workload.concurrency or 1) / num / deployment.pp)
    held = footprint(
        cost.spec,
        cost.precision,
        cost.system,
        deployment,
        kv_tokens=0,
        chunk_tokens=workload.chunk_tokens,
        sampled=sampled,
    )
    kv_tokens = max_kv_tokens(cost.system, held, token_bytes)
    per_replica = kv_tokens // workload.most_tokens
    replica = Replica(cost, workload)
    if not per_replica:
        return _nothing(cost, held, kv_tokens)
    steady, extra_s, is_overloaded = _load(replica, workload, num, per_replica)
    objective = workload.objective
    best = replica.at_most(per_replica, objective.ttft_s or math.inf, (objective.tpot_ms or math.inf) / 1e3)
    concurrency = min(float(per_replica), replica.held(steady)) * num + extra_s * steady.rate * num
    system = cost.system
    return Estimate(
        deployment=deployment,
        footprint=replace(held, kv_bytes=min(concurrency / num, per_replica) * workload.most_tokens * token_bytes),
        kv_tokens=kv_tokens,
        max_sequences=per_replica * num,
        concurrency=concurrency,
        rate=steady.rate * num,
        is_overloaded=is_overloaded,
        busy=steady.busy,
        idle_ttft_s=cost.prompt_s(workload.isl.mean, workload.chunk_tokens),
        ttft_s=Span.of(steady.ttft_s + extra_s, system.ttft_interval),
        ttft_p99_s=Span.of(steady.ttft_p99_s + extra_s, system.ttft_interval),
        tpot_s=Span.of(steady.tpot_s, system.tpot_interval),
        output_tokens_s=steady.rate * num * workload.osl.mean,
        prompt_tokens_s=steady.rate * num * workload.isl.mean,
        capacity=None if best is None else best.rate * num,
    )


def _load(replica: Replica, workload: Workload, num: int, per_replica: int) -> tuple[Steady, float, bool]:
    """The steady state, seconds that a request waits for a place beside, and whether more was asked for than goes."""
    if workload.concurrency is not None:
        asked = workload.concurrency / num
        steady = replica.at_concurrency(min(asked, per_replica))
        return steady, max(0.0, asked - per_replica) / steady.rate, asked > per_replica
    assert workload.rate is not None
    most = replica.at_concurrency(per_replica)
    steady = replica.at_rate(min(workload.rate / num, most.rate))
    return steady, 0.0, workload.rate / num > most.rate * 1.001


def _nothing(cost: Cost, held: Footprint, kv_tokens: int) -> Estimate:
    none = Span(math.inf, math.inf, math.inf)
    return Estimate(
        cost.deployment, held, kv_tokens, 0, 0.0, 0.0, True, 0.0, math.inf, none, none, none, 0.0, 0.0, None
    )
