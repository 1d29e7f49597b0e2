"""The command `octavo bench serve`: its options, and what they are checked for."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from serve_app.bench.measure import BenchError
from serve_app.bench.serve.arrivals import Pattern, parse_range
from serve_app.bench.serve.settings import Settings, parse_rate

if TYPE_CHECKING:
    from serve_app.bench.serve.report import Report


_RATE = """requests per second, or with an x times the capacity, which is measured first; given several times, one run
after another; default: 1x"""
_TRACE = """replay this file: JSON lines of at_s, prompt_tokens, output_tokens; with --rate stretched to that, with
--pattern only its lengths"""

_Url = Annotated[str, typer.Option(help="the server")]
_Rates = Annotated[list[str] | None, typer.Option(help=_RATE)]
_Pattern = Annotated[Pattern | None, typer.Option(help="of the arrivals; default: poisson")]
_Duration = Annotated[float, typer.Option(help="seconds in which requests arrive")]
_Trace = Annotated[Path | None, typer.Option(help=_TRACE)]
_Record = Annotated[Path | None, typer.Option(help="write the requests to this file, as --trace reads it")]
_Seed = Annotated[int, typer.Option(min=0, help="of arrivals and lengths")]
_Objective = Annotated[float, typer.Option(min=0.001, help="the objective: seconds to the first token")]
_Most = Annotated[int, typer.Option(min=1, max=1_000_000, help="of one run")]
_Lengths = Annotated[str, typer.Option(help="from:to, log-uniform")]
_Vocabulary = Annotated[str, typer.Option(help="token ids of prompts, from:to")]
_Retry = Annotated[bool, typer.Option("--retry", help="who is refused waits Retry-After and comes back")]
_Capacity = Annotated[float | None, typer.Option(min=1e-6, help="requests per second; instead of measuring it")]
_Streams = Annotated[int, typer.Option(min=1, max=4096, help="requests under way while the capacity is measured")]
_CapacityS = Annotated[float, typer.Option(min=0.1, max=3600.0, help="for which it is measured, once warm")]
_HangUpS = Annotated[float, typer.Option(min=0.1, max=3600.0, help="after which a client without a token hangs up")]
_DrainS = Annotated[float, typer.Option(min=0.0, max=3600.0, help="that the server has to come to rest before a run")]
_Key = Annotated[str | None, typer.Option(envvar="OCTAVO_API_KEY", help="the API key", show_envvar=True)]
_Plot = Annotated[Path | None, typer.Option(help="draw the figures to this PNG")]
_Compare = Annotated[Path | None, typer.Option(help="what --json printed once: drawn beside it; with --plot")]
_Yes = Annotated[bool, typer.Option("--yes", help="do not ask; only a server on another machine is asked about")]
_Json = Annotated[bool, typer.Option("--json", help="print figures as JSON")]


def load_test(
    url: _Url = "http://127.0.0.1:8000",
    rate: _Rates = None,
    pattern: _Pattern = None,
    duration: _Duration = 60.0,
    trace: _Trace = None,
    record: _Record = None,
    seed: _Seed = 0,
    ttft_s: _Objective = 10.0,
    max_requests: _Most = 20_000,
    prompt_tokens: _Lengths = "16:2000",
    output_tokens: _Lengths = "8:64",
    vocab: _Vocabulary = "1000:30000",
    retry: _Retry = False,
    capacity: _Capacity = None,
    capacity_streams: _Streams = 64,
    capacity_s: _CapacityS = 40.0,
    hang_up_s: _HangUpS = 60.0,
    drain_s: _DrainS = 120.0,
    key: _Key = None,
    plot: _Plot = None,
    compare: _Compare = None,
    yes: _Yes = False,
    json: _Json = False,
) -> None:
    """Load a server with requests that come at their time whatever it does, and see who got what in time.

    Ends with status 0, or 1 if a request failed that was not refused.
    """
    draw = _drawer(plot, compare)
    settings = Settings(
        url=url,
        rates=[parse_rate(text) for text in rate or ([] if trace and pattern is None else ["1x"])],
        pattern=pattern,
        duration_s=duration,
        trace=trace,
        record=record,
        seed=seed,
        ttft_s=ttft_s,
        max_requests=max_requests,
        prompt_tokens=parse_range(prompt_tokens, "--prompt-tokens"),
        output_tokens=parse_range(output_tokens, "--output-tokens"),
        vocabulary=parse_range(vocab, "--vocab"),
        retry=retry,
        capacity_per_s=capacity,
        capacity_streams=capacity_streams,
        capacity_s=capacity_s,
        hang_up_s=hang_up_s,
        drain_s=drain_s,
        key=key,
    )
    from serve_app.bench.serve.show import Paper, run_load_test  # an HTTP client, for those that need one

    paper = Paper(plot, compare, draw, is_json=json)
    raise typer.Exit(run_load_test(settings, paper, yes=yes, err=Console(stderr=True)))


def _drawer(plot: Path | None, compare: Path | None) -> "Callable[[Path, Report, Report | None, str], None] | None":
    """What draws; BenchError if it is not there, before minutes of measuring."""
    if compare and not plot:
        raise BenchError("--compare draws another run beside this one: say where, with --plot")
    if not plot:
        return None
    try:
        from serve_app.bench.serve.plot import draw
    except ImportError:
        raise BenchError("--plot needs matplotlib: pip install 'octavo[bench]'") from None
    return draw
