"""From the options of `octavo simulate serve` to a run."""

import importlib.util
import math
import os
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from serve_app.bench.measure import BenchError
from serve_app.bench.serve.arrivals import Pattern
from serve_app.bench.serve.settings import check_writable, parse_rate
from serve_app.bench.simulate.loads import Loads, read_loss
from serve_app.bench.simulate.run import Orders, Rehearsal
from serve_app.bench.simulate.show import Paper, run_rehearsal
from serve_app.bench.simulate.subject import Subject, Wanted, find_subject
from serve_app.errors import PlanError
from serve_app.plan.inputs import read_lengths
from serve_app.sim.serving.losses import Loss
from serve_app.sim.serving.router import Clients

MAX_RETRIES = 3  # as the clients of `octavo bench serve`


@dataclass(frozen=True)
class Options:
    """As they were given; `command` tells what they mean."""

    config: Path | None
    model: str | None
    layout: str | None
    cells: int | None
    system: str | None
    precision: str
    pace: Path | None
    num_cores: int
    rates: list[str] | None
    pattern: Pattern | None
    num_requests: int
    duration_s: float | None
    isl: str
    osl: str
    trace: Path | None
    record: Path | None
    seed: int
    ttft_s: float | None
    is_admitting: bool
    chunk_tokens: int
    max_running: int | None
    retry: bool
    hang_up_s: float | None
    capacity_per_s: float | None
    kills: list[str] | None
    num_routers: int
    num_processes: int | None
    plot: Path | None
    compare: Path | None
    chrome_trace: Path | None
    chrome_cell: int | None
    is_json: bool


def start(options: Options, err: Console) -> int:
    """Run it; the exit status. Raises OctavoError for what cannot be run, before anything is."""
    _check_files(options)
    isl, osl = read_lengths(options.isl, name="--isl"), read_lengths(options.osl, name="--osl")
    loads = Loads.of(options.pattern, options.num_requests, options.duration_s, isl, osl, options.seed, options.trace)
    subject = find_subject(_wanted(options, loads))
    deployment = subject.deployment
    losses = tuple(
        read_loss(text, subject.phases, deployment.cells, deployment.cell_gpus) for text in options.kills or []
    )
    orders = _orders(options, losses, _traced_cell(options, subject, losses))
    paper = Paper(options.plot, options.compare, options.chrome_trace, options.is_json)
    return run_rehearsal(Rehearsal(subject, loads, orders), paper, err)


def _check_files(options: Options) -> None:
    """What can be known before minutes of reckoning."""
    for path, option in (
        (options.record, "--record"),
        (options.plot, "--plot"),
        (options.chrome_trace, "--chrome-trace"),
    ):
        if path:
            check_writable(path, option)
    if options.record and len(options.rates or []) > 1:
        raise BenchError("--record writes the requests of one run: give one --rate with it")
    if options.compare and not options.plot:
        raise BenchError("--compare draws another run beside this one: say where, with --plot")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        raise BenchError("--plot needs matplotlib: pip install 'octavo[bench]'")


def _wanted(options: Options, loads: Loads) -> Wanted:
    return Wanted(
        config=options.config,
        model=options.model,
        layout=options.layout,
        cells=options.cells,
        system=options.system,
        precision=options.precision,
        pace=options.pace,
        num_cores=options.num_cores,
        isl=loads.isl,
        osl=loads.osl,
        ttft_s=options.ttft_s,
        is_admitting=options.is_admitting,
        chunk_tokens=options.chunk_tokens,
        max_running=options.max_running,
    )


def _orders(options: Options, losses: tuple[Loss, ...], traced_cell: int | None) -> Orders:
    is_replayed = options.trace is not None and options.pattern is None
    return Orders(
        rates=[parse_rate(text) for text in options.rates or ([] if is_replayed else ["1x"])],
        clients=Clients(MAX_RETRIES if options.retry else 0, options.hang_up_s or math.inf),
        losses=losses,
        capacity_per_s=options.capacity_per_s,
        num_routers=options.num_routers,
        num_processes=options.num_processes or os.cpu_count() or 1,
        traced_cell=traced_cell,
        record=options.record,
    )


def _traced_cell(options: Options, subject: Subject, losses: tuple[Loss, ...]) -> int | None:
    if options.chrome_trace is None:
        return None
    cell = options.chrome_cell
    if cell is None:
        cell = losses[0].cell if losses else 0
    if cell >= subject.deployment.cells:
        raise PlanError(f"--chrome-cell {cell}: there are {subject.deployment.cells} cells")
    return cell
