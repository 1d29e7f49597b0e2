"""Predicted against measured on this machine: throughput and time to first token of cells under a steady load.

    python -m benchmarks.planner_measured [--system this-machine.yaml] [--threads 1] [--seconds 60] [--json]

Calibrates first (`octavo calibrate --model demo --model reference`), or takes a system that it wrote. Then cells of
worker processes, without Ray, run loads that the calibration has not seen. Layouts are TP x PP x DP; those that ask for
more workers of so many threads than the machine has cores are left out. Nothing else should run meanwhile.

There are two predictions of each case: the planner's estimate (`octavo plan`), a formula of means, and a rehearsal, the
real engine in virtual time with the same cost model. Exits with 1 where one of either is off by more than 25 %, or
fewer than nine of ten measurements lie in its interval.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from serve_app.bench.calibrate.machine import num_cpus
from serve_app.bench.calibrate.run import LAYOUTS, LOADS, Served, calibrate, cell_of, precision_of, predict
from serve_app.bench.calibrate.steady import Load
from serve_app.config import parse_config
from serve_app.plan.deployment import Deployment
from serve_app.plan.estimate import Span
from serve_app.plan.fit import Case
from serve_app.plan.system import System
from serve_app.plan.systems import read_system
from serve_app.runtime.settings import check

MODELS = ("demo", "reference")
FRESH = (Load(1, 256, 32), Load(4, 128, 48), Load(12, 64, 40), Load(3, 400, 20))
BAR, INSIDE_BAR = 0.25, 0.9
CASE_S = 8.0  # of measuring, each load


@dataclass(frozen=True)
class Row:
    """One figure of one case, by one of the predictions. Tokens/s, or seconds."""

    model: str
    layout: str
    load: str
    figure: str
    by: str
    predicted: float
    low: float
    high: float
    measured: float

    @property
    def ratio(self) -> float:
        return self.measured / self.predicted

    @property
    def is_inside(self) -> bool:
        return self.low <= self.measured <= self.high

    @property
    def is_near(self) -> bool:
        return abs(self.predicted / self.measured - 1) <= BAR


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", help="a YAML file of `octavo calibrate`; default: calibrate first")
    parser.add_argument("--threads", type=int, default=1, help="of each worker; must be the calibration's")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the calibration")
    parser.add_argument("--model", nargs="+", default=MODELS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    system = (
        read_system(options.system)
        if options.system
        else calibrate(options.model, options.threads, options.seconds, _say).system
    )
    rows = []
    for row in measure(options.model, system, options.threads):
        rows.append(row)
        _say(line(row))
    if options.json:
        print(json.dumps({"system": system.model_dump(), "rows": [asdict(row) for row in rows]}, indent=2))
    return 0 if verdict(rows) else 1


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure(models: Sequence[str], system: System, num_threads: int) -> Iterator[Row]:
    assert not set(FRESH) & set(LOADS), "the calibration must not have seen a load"
    precision = precision_of(torch.device("cpu"))
    for model in models:
        spec = check(parse_config({"model": model}))
        for layout in LAYOUTS:
            if layout.cell_gpus * num_threads <= num_cpus():
                for served in cell_of(model, Case(spec, precision, layout), num_threads, FRESH, CASE_S):
                    yield from rows_of(model, served, system)


def rows_of(model: str, served: Served, system: System) -> Iterator[Row]:
    """Both figures by both predictions."""
    predict(system, [served])
    seen, rehearsed = served.seen, served.rehearsed
    assert rehearsed is not None, "it has just been rehearsed"
    for by, ttft_s, tpot_s in (
        ("estimate", served.ttft_s, served.tpot_s),
        ("rehearsal", rehearsed.ttft_s, rehearsed.tpot_s),
    ):
        ttft, tpot = Span.of(ttft_s, system.ttft_interval), Span.of(tpot_s, system.tpot_interval)
        pairs = {"tokens/s": (throughput(ttft, tpot, seen.load), seen.output_tokens_s), "TTFT s": (ttft, seen.ttft_s)}
        for figure, (span, measured) in pairs.items():
            layout = short(served.case.deployment)
            yield Row(model, layout, words(seen.load), figure, by, span.value, span.low, span.high, measured)


def throughput(ttft: Span, tpot: Span, load: Load) -> Span:
    """Tokens/s of so many requests at a time: each takes its first token's time, and that of the others."""

    def rate(ttft_s: float, tpot_s: float) -> float:
        return load.concurrency * load.output_tokens / (ttft_s + (load.output_tokens - 1) * tpot_s)

    return Span(rate(ttft.value, tpot.value), rate(ttft.high, tpot.high), rate(ttft.low, tpot.low))


def short(layout: Deployment) -> str:
    return f"{layout.tp}x{layout.pp}x{layout.dp}"


def words(load: Load) -> str:
    return f"{load.concurrency} x {load.prompt_tokens} + {load.output_tokens}"


def line(row: Row) -> str:
    interval = f"{row.low:8.3f} to {row.high:8.3f}"
    mark = ("inside" if row.is_inside else "OUTSIDE") + ("" if row.is_near else ", off")
    return (
        f"{row.model:10} {row.layout:6} {row.load:14} {row.figure:9} {row.by:9} {row.predicted:8.3f} ({interval})"
        f" measured {row.measured:8.3f} ratio {row.ratio:5.2f} {mark}"
    )


def verdict(rows: Sequence[Row]) -> bool:
    is_met = True
    for by in ("estimate", "rehearsal"):
        own = [row for row in rows if row.by == by]
        num_inside, num_near = sum(row.is_inside for row in own), sum(row.is_near for row in own)
        _say(f"{by}: {num_near} of {len(own)} within {BAR:.0%}; {num_inside} of {len(own)} inside the interval")
        is_met = is_met and num_inside >= INSIDE_BAR * len(own) and num_near == len(own)
    return is_met


if __name__ == "__main__":
    sys.exit(main())
