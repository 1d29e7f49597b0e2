"""What a deployment is expected to do: time to first token, time per output token, throughput, memory, with intervals.

The model of a replica: sequences go round its stages in as many microbatches as there are stages. Each step carries one
token of every sequence in it, and a share of the steps a chunk of somebody's prompt beside. Steps follow each other at
the pace of the slowest stage. Steady state: as many prompt tokens enter as answers that end make room for. Where that
is more than one chunk in each step, steps carry several, up to the tokens that a step may have.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from serve_app.engine.scheduler import MIN_CHUNK_TOKENS
from serve_app.model.spec import ModelSpec
from serve_app.plan.counts import Precision
from serve_app.plan.crossing import crossing
from serve_app.plan.deployment import Deployment
from serve_app.plan.footprint import Footprint, footprint, kv_gpu_token_bytes, max_kv_tokens
from serve_app.plan.ops import Op, Stage, Step
from serve_app.plan.system import Interval, System
from serve_app.plan.workload import Workload

LOWEST, HIGHEST = -25.0, 20.0  # loads that are looked at: log(load / (most - load))
CLOSE = 1e-5  # how near to a limit is at the limit, relatively


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
    ideal_pipeline: bool = False  # no bubbles, and prompts are cut by the step's limit only: how others count

    @cached_property
    def stages(self) -> list[Stage]:
        return [
            Stage(self.spec, self.precision, self.system, self.deployment, index, self.by_all_reduce)
            for index in range(self.deployment.pp)
        ]

    @cached_property
    def kinds(self) -> list[tuple[Stage, int]]:
        """Stages that differ in nothing but their place, once each, and how many there are."""
        kinds: dict[tuple[int, bool, bool], list[Stage]] = {}
        for stage in self.stages:
            kinds.setdefault((stage.num_layers, stage.is_last, stage.hops_inside), []).append(stage)
        return [(stages[0], len(stages)) for stages in kinds.values()]

    def pace_s(self, step: Step, num_peers: float | None = None) -> tuple[float, float]:
        """(from the end of one step to the end of the next, of one step through all stages)."""
        interval_s, latency_s = 0.0, 0.0
        for stage, num in self.kinds:
            seconds = stage.seconds(step, num_peers=num_peers)
            interval_s = max(interval_s, seconds)
            latency_s += num * seconds
        return interval_s, latency_s

    def interval_s(self, step: Step, num_peers: float | None = None) -> float:
        """From the end of one step to the end of the next: what the slowest stage takes."""
        return self.pace_s(step, num_peers)[0]

    def latency_s(self, step: Step, num_peers: float | None = None) -> float:
        """Of one step through all stages."""
        return self.pace_s(step, num_peers)[1]

    def breakdown(self, step: Step) -> list[Op]:
        """Operations of the step on its way through all stages, those of one name as one."""
        merged: dict[str, Op] = {}
        for stage, num in self.kinds:
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

    def prompt_s(
        self,
        num_tokens: float,
        chunk_tokens: int,
        beside: Step | None = None,
        cached: float = 0.0,
        num_peers: float | None = None,
    ) -> float:
        """From a prompt's first step to its first token: its chunks follow each other through the stages.

        `beside`: answers that run in the same steps. `cached`: tokens of it that need not be computed. `num_peers`:
        replicas of the cell that run such a prompt at the same time; default: all.
        """
        todo = max(1.0, num_tokens - cached)
        num_chunks = self.num_chunks(num_tokens, chunk_tokens, cached)
        size = todo / num_chunks
        steps = [Step.prompt(size, cached + i * size, sampled=float(i == num_chunks - 1)) for i in range(num_chunks)]
        if beside is not None:
            steps = [step + beside for step in steps]
        before_s = sum(self.interval_s(step, num_peers) for step in steps[:-1])
        return before_s + self.latency_s(steps[-1], num_peers)

    def num_chunks(self, num_tokens: float, chunk_tokens: int, cached: float = 0.0) -> int:
        """Steps that a prompt takes by itself. The scheduler cuts it into one for each stage, for all to work on it."""
        size = float(chunk_tokens)
        if self.deployment.pp > 1 and not self.ideal_pipeline:
            size = min(size, max(MIN_CHUNK_TOKENS, num_tokens / self.deployment.pp))
        return math.ceil(max(1.0, num_tokens - cached) / size)

    def tpot_s(self, rows: float, context: float) -> float:
        """Between two tokens of a sequence, where each replica runs so many and no prompts come."""
        step = Step.decode(max(1.0, rows / self.deployment.pp), context)
        return max(self.deployment.pp * self.interval_s(step), self.latency_s(step))


@dataclass(frozen=True)
class Steady:
    """One replica in steady state; all others of its cell have the same load."""

    rows: float  # of answers, in each step
    rate: float  # requests/s
    busy: float  # share of the prompt tokens that it could compute beside these answers
    queue_s: float  # until the prompts before it are computed
    align_s: float  # until the step that runs has ended
    prompt_s: float  # from a prompt's first step to its first token
    long_prompt_s: float  # the same of a prompt that is longer than 99 of 100
    tpot_s: float

    @property
    def wait_s(self) -> float:
        """Until a prompt's first step."""
        return self.queue_s + self.align_s

    @property
    def ttft_s(self) -> float:
        return self.wait_s + self.prompt_s

    @property
    def ttft_p99_s(self) -> float:
        """The wait in the queue falls off exponentially, for the share of requests that have to wait at all; a step
        that runs has all of its time before it at worst."""
        tail = math.log(self.busy / 0.01) / self.busy if self.busy > 0.01 else 0.0
        return self.long_prompt_s + 2 * self.align_s + self.queue_s * max(1.0, tail)


@dataclass(frozen=True)
class Replica:
    """One replica under load. Prompts of the mean work stand for all, but their spread counts in the queue."""

    cost: Cost
    workload: Workload

    @cached_property
    def _num_chunks(self) -> float:
        """Of a prompt, in the mean: steps that it takes by itself."""
        return sum(weight * num for _, _, num, weight in self._prompts)

    @cached_property
    def _prompts(self) -> list[tuple[float, float, int, float]]:
        """(tokens found in the cache, tokens to compute, chunks, weight)."""
        share, chunk = self.workload.prefix_share, self.workload.chunk_tokens
        return [
            (share * num, max(1.0, num * (1 - share)), self.cost.num_chunks(num, chunk, share * num), weight)
            for num, weight in self.workload.isl.points
        ]

    @cached_property
    def _prompt(self) -> Step:
        """All chunks of one prompt, in the mean: long ones attend to more than to their share."""
        total = Step()
        for cached, todo, num, weight in self._prompts:
            read = num * cached + todo * (num + 1) / 2
            total += Step(todo, todo * (cached + todo / 2), read, sampled=1.0).times(weight)
        return total

    @cached_property
    def _variation(self) -> float:
        """Of arrivals and of prompts, as a queue feels it (Kingman, doi 10.1017/S0305004100036094)."""
        lengths = self.workload.isl
        return (self.workload.burstiness**2 + lengths.mean_square / lengths.mean**2 - 1) / 2

    @cached_property
    def _most_prompts(self) -> float:
        """Of a step: as many as have room in it."""
        return self.workload.chunk_tokens / self._prompt.prompt_tokens

    @cached_property
    def _stretch(self) -> float:
        """A prompt that is longer than 99 of 100, over the mean one."""
        return max(1.0, self.workload.isl.quantile(0.99) / self.workload.isl.mean)

    @property
    def idle_ttft_s(self) -> float:
        """Of the mean prompt, with nobody else in the cell."""
        lengths, share = self.workload.isl, self.workload.prefix_share
        return self.cost.prompt_s(lengths.mean, self.workload.chunk_tokens, cached=share * lengths.mean, num_peers=1)

    def steady(self, prompts: float, num_sequences: float = math.inf) -> Steady:
        """With so many prompts that begin in each step, in the mean; few of the steps carry one where that is little.

        All replicas of a cell are taken to be in step, except where few of them have anything to do: an answer meets
        as many peers as have one, and a prompt as many as are at theirs. `num_sequences`: of the replica, each of
        which is followed by the next; none waits for itself. Default: without limit, each comes whenever it comes.
        """
        pp, dp = self.cost.deployment.pp, self.cost.deployment.dp
        rows = prompts * (self.workload.osl.mean - 1)
        num_steps = min(self._num_chunks, max(1.0, 1 / prompts))  # that a prompt takes
        mixed_share = min(1.0, prompts * self._num_chunks)  # of the steps, that carry prompts
        beside = Step.decode(max(1.0, rows), self.workload.mean_tokens)
        mixed = self._prompt.times(max(prompts, 1 / self._num_chunks)) + beside
        plain_s, _ = self.cost.pace_s(beside, 1 + (dp - 1) * min(1.0, rows))
        mixed_s, _ = self.cost.pace_s(mixed)
        step_s = (1 - mixed_share) * plain_s + mixed_share * mixed_s + self._bubble_s(prompts, plain_s, mixed_s)
        rate = prompts / step_s
        full_s, _ = self.cost.pace_s(self._prompt.times(self._most_prompts) + beside)
        service_s = full_s / self._most_prompts
        busy = min(rate * service_s, 1 - 1e-9)
        own_s, own_latency_s = self.cost.pace_s(mixed, 1 + (dp - 1) * busy)
        # who comes while a step runs that has nothing to do with him waits for half of it
        strange_s = (1 - mixed_share) * plain_s**2 + max(0.0, 1 - 1 / (prompts * self._num_chunks)) * mixed_s**2
        return Steady(
            rows=rows,
            rate=rate,
            busy=busy,
            queue_s=_others(num_sequences) * self._variation * busy / (1 - busy) * service_s,
            align_s=min(1.0, rows) * strange_s / step_s / 2,
            prompt_s=num_steps * own_s + own_latency_s - own_s,
            long_prompt_s=self._stretch * num_steps * own_s + own_latency_s - own_s,
            tpot_s=pp * (plain_s + _others(num_sequences * dp) * (step_s - plain_s)),
        )

    def _bubble_s(self, prompts: float, plain_s: float, mixed_s: float) -> float:
        """Of a step in the mean, that stages stand idle because steps take unequally long.

        As many steps as there are stages are under way. Those behind the last long one are held up by it in each stage,
        so that the next of their sequences come round at its pace: a long step's surplus, for all stages but one, each
        time that steps with prompts come to an end. At random arrivals of n prompts of c chunks in each step that is
        n exp(-n c) times where they share steps as they like; the nearer to full steps are, the longer prompts stay.
        """
        if self.cost.ideal_pipeline:
            return 0.0
        full = prompts / self._most_prompts
        num_ends = 0.0 if full >= 1 else prompts * math.exp(-prompts * self._num_chunks / (1 - full))
        return num_ends * (self.cost.deployment.pp - 1) * max(0.0, mixed_s - plain_s)

    def held(self, steady: Steady) -> float:
        """Sequences at a time: those that wait or are prefilled, and those that answer."""
        return steady.rate * (steady.ttft_s + (self.workload.osl.mean - 1) * steady.tpot_s)

    def at_concurrency(self, num_sequences: float) -> Steady:
        """The load at which it holds so many, each followed by the next: who comes sees a queue of the others only
        (Reiser and Lavenberg, doi 10.1145/322186.322195, as Schweitzer approximates it)."""
        return self._last(lambda steady: math.log(self.held(steady) / num_sequences), num_sequences)

    def at_rate(self, rate: float) -> Steady:
        """The load of so many requests/s; the most it can take where that is less."""
        return self._last(lambda steady: math.log(steady.rate / rate))

    def at_most(self, num_sequences: float, ttft_s: float = math.inf, tpot_s: float = math.inf) -> Steady | None:
        """The highest load with no more sequences than these that keeps the objective; None: none does."""

        def excess(steady: Steady) -> float:
            """By how much the worst of three is above what it may be, as a logarithm."""
            ratios = (self.held(steady) / num_sequences, steady.ttft_p99_s / ttft_s, steady.tpot_s / tpot_s)
            return math.log(max(ratios))

        found = self._last(excess)
        return found if excess(found) <= CLOSE else None

    def _last(self, excess: Callable[[Steady], float], num_sequences: float = math.inf) -> Steady:
        """The highest load whose excess, which grows with the load, is not above zero; next to none where it always is.

        Loads are looked for on a scale on which sequences grow evenly, next to none and next to the most alike.
        """

        def at(place: float) -> Steady:
            return self.steady(self._most_prompts / (1 + math.exp(-place)), num_sequences)

        return at(crossing(lambda place: excess(at(place)), LOWEST, HIGHEST, close=CLOSE))


def _others(num_sequences: float) -> float:
    """Share of so many that are not the one who looks."""
    return max(0.0, 1 - 1 / num_sequences)


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
    capacity_sequences: float | None = None  # that are there at a time at this rate

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
        idle_ttft_s=replica.idle_ttft_s,
        ttft_s=Span.of(steady.ttft_s + extra_s, system.ttft_interval),
        ttft_p99_s=Span.of(steady.ttft_p99_s + extra_s, system.ttft_interval),
        tpot_s=Span.of(steady.tpot_s, system.tpot_interval),
        output_tokens_s=steady.rate * num * workload.osl.mean,
        prompt_tokens_s=steady.rate * num * workload.isl.mean,
        capacity=None if best is None else best.rate * num,
        capacity_sequences=None if best is None else replica.held(best) * num,
    )


def _load(replica: Replica, workload: Workload, num: int, per_replica: int) -> tuple[Steady, float, bool]:
    """The steady state, seconds that a request waits for a place beside, and whether more was asked for than goes."""
    if workload.concurrency is not None:
        asked = workload.concurrency / num
        steady = replica.at_concurrency(min(asked, per_replica))
        return steady, max(0.0, asked - per_replica) / steady.rate, asked > per_replica
    assert workload.rate is not None
    most = replica.at_most(per_replica)
    assert most is not None, "next to no load holds next to no sequence"
    steady = replica.at_rate(min(workload.rate / num, most.rate))
    return steady, 0.0, workload.rate / num > most.rate * 1.001


def _nothing(cost: Cost, held: Footprint, kv_tokens: int) -> Estimate:
    none = Span(math.inf, math.inf, math.inf)
    return Estimate(
        cost.deployment, held, kv_tokens, 0, 0.0, 0.0, True, 0.0, math.inf, none, none, none, 0.0, 0.0, None
    )
