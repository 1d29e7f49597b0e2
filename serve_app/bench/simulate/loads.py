"""What arrives in a simulated run, and which workers die in it."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from serve_app.bench.serve.arrivals import (
    Arrival,
    Pattern,
    draw_arrivals,
    lengths_of,
    mean_rate,
    read_arrivals,
    stretch,
)
from serve_app.bench.serve.arrivals import Lengths as Pairs
from serve_app.bench.serve.settings import Rate
from serve_app.bench.serve.verdict import Run
from serve_app.errors import PlanError
from serve_app.plan.workload import Lengths
from serve_app.sim.serving.ledger import Load
from serve_app.sim.serving.losses import Loss, Phases

_TIMES = {"t": "at_s", "notice": "notice_s", "form": "form_s", "load": "load_s", "refill": "refill_s"}


@dataclass(frozen=True)
class Loads:
    """Of all runs of a simulation. `trace`: requests to replay; without a pattern at their times, too."""

    pattern: Pattern | None
    num_requests: int
    duration_s: float | None  # None: as long as so many requests take
    isl: Lengths
    osl: Lengths
    seed: int
    trace: tuple[Arrival, ...] = ()

    @staticmethod
    def of(
        pattern: Pattern | None,
        num_requests: int,
        duration_s: float | None,
        isl: Lengths,
        osl: Lengths,
        seed: int,
        path: Path | None,
    ) -> "Loads":
        """`path`: of a trace file, whose lengths stand for `isl` and `osl`. Raises BenchError."""
        if path is None:
            return Loads(pattern, num_requests, duration_s, isl, osl, seed)
        trace = read_arrivals(path)
        prompts = Lengths.of([(arrival.prompt_tokens, 1.0) for arrival in trace])
        answers = Lengths.of([(arrival.output_tokens, 1.0) for arrival in trace])
        return Loads(pattern, num_requests, duration_s, prompts, answers, seed, tuple(trace))

    @property
    def pairs(self) -> Pairs:
        return lengths_of(self.trace) if self.trace else draw_pairs(self.isl, self.osl, self.seed)

    def plan(self, rate: Rate | None, capacity_per_s: float | None) -> tuple[Run, Sequence[Arrival]]:
        """One run at that rate; None: as the trace has it. PlanError if nothing arrives."""
        if rate is None:
            arrivals: Sequence[Arrival] = self.trace[: self.num_requests]
            return Run("trace", mean_rate(arrivals), "trace", arrivals[-1].at_s), arrivals
        per_s = rate.value * (capacity_per_s or 1.0) if rate.is_multiple else rate.value
        if self.trace and self.pattern is None:
            arrivals = stretch(self.trace[: self.num_requests], per_s)
            return Run(rate.text, per_s, "trace", arrivals[-1].at_s), arrivals
        # about so many fall into the time that they take
        pattern, duration_s = self.pattern or Pattern.POISSON, self.duration_s or self.num_requests / per_s
        most = self.num_requests if self.duration_s else 2 * self.num_requests + 100
        arrivals = draw_arrivals(pattern, per_s, duration_s, self.pairs, self.seed, most)
        if not arrivals:
            raise PlanError(f"no request arrives in {duration_s:g} s at {per_s:.3g} per second")
        return Run(rate.text, per_s, pattern, duration_s), arrivals


def draw_pairs(isl: Lengths, osl: Lengths, seed: int) -> Pairs:
    """Prompt and answer independently of each other, for ever. The same for a seed."""
    draw = random.Random(f"planned lengths {seed}")
    prompts, answers = (([tokens for tokens, _ in of.points], [weight for _, weight in of.points]) for of in (isl, osl))
    while True:
        yield from zip(draw.choices(*prompts, k=256), draw.choices(*answers, k=256), strict=True)


def to_load(arrivals: Sequence[Arrival]) -> Load:
    return Load.of((arrival.at_s, arrival.prompt_tokens, arrival.output_tokens) for arrival in arrivals)


def read_loss(text: str, phases: Phases, num_cells: int, num_workers: int) -> Loss:
    """`t=30,cell=0,worker=5`, and seconds of notice, form, load and refill where they are to be others than `phases`.

    PlanError names what is wrong.
    """
    given = {"cell": 0.0}
    for part in text.split(","):
        key, _, value = part.strip().partition("=")
        if key not in {*_TIMES, "cell", "worker"}:
            raise PlanError(f"--kill {text}: {key!r} is none of {', '.join(_TIMES)}, cell, worker")
        try:
            given[key] = float(value)
        except ValueError:
            raise PlanError(f"--kill {text}: {key} = {value!r} is no number") from None
        if not 0 <= given[key] < 1e9:
            raise PlanError(f"--kill {text}: {key} must be 0 or more")
    for key, most in (("t", 1e9), ("cell", num_cells), ("worker", num_workers)):
        if key not in given:
            raise PlanError(f"--kill {text}: {key} is missing, as in t=30,cell=0,worker=5")
        if given[key] >= most:
            raise PlanError(f"--kill {text}: {key} must be below {most:g}")
    seconds = {_TIMES[key]: value for key, value in given.items() if key in _TIMES and key != "t"}
    changed = Phases(**{name: seconds.get(name, getattr(phases, name)) for name in Phases.__struct_fields__})
    return Loss(given["t"], int(given["cell"]), int(given["worker"]), changed)
