"""The simulator beside a real server under the same load: how far its times to the first token are from those measured.

    octavo serve deployments/config.yaml        (elsewhere; it keeps its calibration in the cache folder)
    octavo bench serve --rate 1.2 --duration 240 --seed 1 --record load.jsonl --json > real.json
    python -m benchmarks.simulated_serving real.json --trace load.jsonl --pace ~/.cache/octavo/calibration/....json

Each run of the report is simulated: the same requests at the same moments, the config that was served, steps that take
what its calibration measured. Without --trace, of one run, requests are drawn again from the report's seed, rates and
patterns. Exits with 1 where the median or the 99th percentile is further than 30 % from what was measured.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from serve_app.bench.measure import BenchError
from serve_app.bench.serve.arrivals import Arrival, Pattern, draw_arrivals, draw_lengths, parse_range, read_arrivals
from serve_app.bench.serve.report import Report, read_report
from serve_app.bench.serve.verdict import Run, RunFigures
from serve_app.bench.simulate.figures import judge
from serve_app.bench.simulate.loads import to_load
from serve_app.bench.simulate.subject import Subject, Wanted, find_subject
from serve_app.errors import OctavoError
from serve_app.plan.workload import Lengths
from serve_app.sim.serving.many import Simulation, serve
from serve_app.sim.serving.router import Clients

BAR = 0.3  # of what was measured


def main() -> int:
    options = _parse()
    try:
        report = read_report(options.report)
        subject = find_subject(_wanted(options))
        return compare(report, subject, options)
    except OctavoError as error:
        print(error, file=sys.stderr)
        return 2


def compare(report: Report, subject: Subject, options: argparse.Namespace) -> int:
    is_met = True
    print("rate    sent  let in: real, simulated   TTFT p50: real, simulated, ratio   p99: real, simulated, ratio")
    for real in report.runs:
        found = simulate(real, arrivals_of(real, report, options), subject, options.hang_up_s)
        halves = [ratio_of(real.ttft_p50_s, found.ttft_p50_s), ratio_of(real.ttft_p99_s, found.ttft_p99_s)]
        is_met = is_met and all(abs(ratio - 1) <= BAR for *_, ratio in halves)
        times = "   ".join(f"{one:8.2f} {other:8.2f} {ratio:6.2f}" for one, other, ratio in halves)
        print(f"{real.rate:6s} {real.sent:5d}  {real.admitted:6d} {found.admitted:6d}          {times}", flush=True)
    return 0 if is_met else 1


def simulate(real: RunFigures, arrivals: Sequence[Arrival], subject: Subject, hang_up_s: float) -> RunFigures:
    load = to_load(arrivals)
    simulation = Simulation(subject.setup, clients=Clients(hang_up_s=hang_up_s, terms=subject.terms))
    run = Run(real.rate, real.rate_per_s, real.pattern, real.arrivals_s)
    return judge(run, load, serve(simulation, load).ledger, subject.objective_s)


def arrivals_of(real: RunFigures, report: Report, options: argparse.Namespace) -> Sequence[Arrival]:
    """The requests of a run. BenchError where there are not as many as were sent."""
    if options.trace is not None:
        arrivals = read_arrivals(options.trace)
    else:
        prompt, output = (
            parse_range(getattr(options, name), f"--{name.replace('_', '-')}")
            for name in ("prompt_tokens", "output_tokens")
        )
        lengths = draw_lengths(prompt, output, report.seed)
        pattern = Pattern(real.pattern)
        arrivals = draw_arrivals(pattern, real.rate_per_s, real.arrivals_s, lengths, report.seed, 1_000_000)
    if len(arrivals) != real.sent:
        raise BenchError(f"{real.rate}: {real.sent} requests were sent, and {len(arrivals)} are known: give --trace")
    return arrivals


def ratio_of(real: float | None, simulated: float | None) -> tuple[float, float, float]:
    if not real or not simulated:
        raise BenchError("a run let nobody in: there is nothing to compare")
    return real, simulated, simulated / real


def _wanted(options: argparse.Namespace) -> Wanted:
    return Wanted(
        config=options.config,
        model=None,
        layout=None,
        cells=None,
        system=None,
        precision="bf16",
        pace=options.pace,
        num_cores=options.cores,
        isl=Lengths.fixed(1),
        osl=Lengths.fixed(1),
        ttft_s=None,
        is_admitting=not options.no_admission,
        chunk_tokens=1,
        max_running=None,
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path, help="of octavo bench serve --json")
    parser.add_argument("--pace", type=Path, required=True, help="the engine's calibration")
    parser.add_argument("--config", type=Path, default=Path("deployments/config.yaml"), help="that was served")
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1, help="that the workers shared")
    parser.add_argument("--trace", type=Path, help="the requests of the one run, as --record wrote them")
    parser.add_argument("--prompt-tokens", default="16:2000", help="as bench serve was told")
    parser.add_argument("--output-tokens", default="8:64", help="as bench serve was told")
    parser.add_argument("--hang-up-s", type=float, default=60.0, help="as bench serve was told")
    parser.add_argument("--no-admission", action="store_true", help="the server had slo.ttft_s: null")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
