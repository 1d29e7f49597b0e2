"""The command `octavo simulate serve`: its options."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from serve_app.bench.serve.arrivals import Pattern

_RATE = """requests per second of all cells together, or with an x times the capacity, which is found first; given
several times, one run after another; default: 1x"""
_TRACE = """replay this file, as `octavo bench serve --record` writes it; with --rate stretched to that, with --pattern
only its lengths"""
_KILL = """a worker dies: t=30,cell=0,worker=5, and seconds of notice, form, load, refill where they are to be others
than planned; may be given several times"""

_Config = Annotated[Path | None, typer.Option(help="a Ray Serve config: model, layout and bounds of a cell")]
_Model = Annotated[str | None, typer.Option("--model", "--preset", help="a preset, a folder or a config.json")]
_Layout = Annotated[str | None, typer.Option(help="such as tp4,pp4,dp2,cells32; with --model")]
_Cells = Annotated[int | None, typer.Option(min=1, max=16_384, help="independent instances of the layout")]
_System = Annotated[str | None, typer.Option(help="hardware, a name or a YAML file: steps cost what is planned")]
_Precision = Annotated[str, typer.Option(help="such as bf16, fp8, or bf16,experts=fp8; with --system")]
_Pace = Annotated[Path | None, typer.Option(help="an engine's calibration: steps cost what was measured")]
_Cores = Annotated[int, typer.Option(min=0, help="that the workers of a measured cell share; 0: each has its own")]
_Rates = Annotated[list[str] | None, typer.Option(help=_RATE)]
_Pattern = Annotated[Pattern | None, typer.Option(help="of the arrivals; default: poisson")]
_Requests = Annotated[int, typer.Option(min=1, max=10_000_000, help="of each run, about")]
_Duration = Annotated[float | None, typer.Option(min=0.001, help="seconds; default: what so many requests take")]
_Isl = Annotated[str, typer.Option(help="tokens of prompts: 1024, 128:10240, or a histogram file")]
_Osl = Annotated[str, typer.Option(help="tokens of answers, the same way")]
_Trace = Annotated[Path | None, typer.Option(help=_TRACE)]
_Record = Annotated[Path | None, typer.Option(help="write the requests to this file, as --trace reads it")]
_Seed = Annotated[int, typer.Option(min=0, help="of arrivals, lengths and the router")]
_Objective = Annotated[float | None, typer.Option(min=0.001, help="seconds to the first token; default: 10, or config")]
_NoAdmission = Annotated[bool, typer.Option("--no-admission", help="let everybody in")]
_Chunk = Annotated[int, typer.Option(min=1, help="tokens of one step, at most; with --layout")]
_Running = Annotated[int | None, typer.Option(min=1, help="sequences of one replica; default: what is planned")]
_Retry = Annotated[bool, typer.Option("--retry", help="who is refused waits Retry-After and comes back")]
_HangUp = Annotated[float | None, typer.Option(min=0.001, help="seconds without a token until a client hangs up")]
_Capacity = Annotated[float | None, typer.Option(min=1e-6, help="requests per second; instead of finding it")]
_Kill = Annotated[list[str] | None, typer.Option(help=_KILL)]
_Routers = Annotated[int, typer.Option(min=0, help="each in front of its part of the cells; 0: 4 cells or more each")]
_Processes = Annotated[int | None, typer.Option(min=1, help="default: one for each CPU")]
_Plot = Annotated[Path | None, typer.Option(help="draw the figures to this PNG")]
_Compare = Annotated[Path | None, typer.Option(help="a report of bench serve or of this, drawn beside; with --plot")]
_Chrome = Annotated[Path | None, typer.Option(help="the pipeline of one cell in the last run, as a Chrome trace")]
_ChromeCell = Annotated[int | None, typer.Option(min=0, help="which one; default: the first that loses a worker, or 0")]
_Json = Annotated[bool, typer.Option("--json", help="print figures as JSON")]


def simulate_serving(
    config: _Config = None,
    model: _Model = None,
    layout: _Layout = None,
    cells: _Cells = None,
    system: _System = None,
    precision: _Precision = "bf16",
    pace: _Pace = None,
    cores: _Cores = 0,
    rate: _Rates = None,
    pattern: _Pattern = None,
    requests: _Requests = 2_000,
    duration: _Duration = None,
    isl: _Isl = "1024",
    osl: _Osl = "128",
    trace: _Trace = None,
    record: _Record = None,
    seed: _Seed = 0,
    ttft_s: _Objective = None,
    no_admission: _NoAdmission = False,
    chunk_tokens: _Chunk = 8192,
    max_running: _Running = None,
    retry: _Retry = False,
    hang_up_s: _HangUp = None,
    capacity: _Capacity = None,
    kill: _Kill = None,
    routers: _Routers = 0,
    processes: _Processes = None,
    plot: _Plot = None,
    compare: _Compare = None,
    chrome_trace: _Chrome = None,
    chrome_cell: _ChromeCell = None,
    json: _Json = False,
) -> None:
    """Load virtual cells that run the real engine, with steps that take what the planner says, or what was measured.

    Says what `octavo bench serve` says of a real server. The same options are the same run, whatever the machine.
    """
    from serve_app.bench.simulate.start import Options, start  # noqa: PLC0415 - for those who need all that

    options = Options(
        config=config,
        model=model,
        layout=layout,
        cells=cells,
        system=system,
        precision=precision,
        pace=pace,
        num_cores=cores,
        rates=rate,
        pattern=pattern,
        num_requests=requests,
        duration_s=duration,
        isl=isl,
        osl=osl,
        trace=trace,
        record=record,
        seed=seed,
        ttft_s=ttft_s,
        is_admitting=not no_admission,
        chunk_tokens=chunk_tokens,
        max_running=max_running,
        retry=retry,
        hang_up_s=hang_up_s,
        capacity_per_s=capacity,
        kills=kill,
        num_routers=routers,
        num_processes=processes,
        plot=plot,
        compare=compare,
        chrome_trace=chrome_trace,
        chrome_cell=chrome_cell,
        is_json=json,
    )
    raise typer.Exit(start(options, Console(stderr=True)))
