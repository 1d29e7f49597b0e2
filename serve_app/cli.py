"""The command `octavo`."""

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from serve_app import __version__
from serve_app.bench.serve.command import load_test
from serve_app.bench.simulate.command import simulate_serving
from serve_app.config import octavo_args, parse_config
from serve_app.errors import OctavoError
from serve_app.keys_cli import key_app
from serve_app.plan_cli import audit, plan

if TYPE_CHECKING:
    from serve_app.model.tokenizer import Tokenizer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Serve Mixture-of-Experts language models on a Ray cluster.",
)
bench_app = typer.Typer(invoke_without_command=True)
bench_app.command("serve")(load_test)
app.add_typer(bench_app, name="bench")
simulate_app = typer.Typer(invoke_without_command=True)
simulate_app.command("serve")(simulate_serving)
app.add_typer(simulate_app, name="simulate")
app.add_typer(key_app, name="key")
app.command()(plan)
app.command()(audit)
err = Console(stderr=True)

SERVE_ENVIRONMENT = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_LOG_TO_STDERR": "0",  # the terminal is for what we say; Serve's own log is in its files
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",  # of 30: Ctrl-C should not take half a minute
}
DEFAULT_BATCHES = (1, 8, 32, 64)
DEFAULT_CONFIG = Path("deployments/config.yaml")

Model = Annotated[str, typer.Option(help="`demo`, `reference` (random weights), a folder, or a Hugging Face hub id")]


class Role(StrEnum):
    """What a drill can strike: `drill.targets` tells what that is."""

    WORKER = "worker"
    ROUTER = "router"
    ENGINE = "engine"
    INGRESS = "ingress"
    NODE = "node"


def main() -> None:
    """The entry point: what a user can mend ends with one sentence and the error's status."""
    try:
        app()
    except OctavoError as error:
        err.print(f"[red]octavo:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(error.status)


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


@app.command()
def fetch(
    model: Annotated[str, typer.Argument(help="`demo`, `reference`, or a Hugging Face hub id")] = "demo",
    verify: Annotated[
        bool, typer.Option("--verify", help="read every byte of the demo or the reference model that is there")
    ] = False,
) -> None:
    """Get a model ready to serve; does nothing when it is already there."""
    from serve_app.fetch.hub import resolve
    from serve_app.fetch.progress import progress_bar

    with progress_bar() as report:
        folder = resolve(model, report, verify=verify)
    print(folder)


@app.command()
def serve(
    config: Annotated[Path, typer.Argument(help="a Ray Serve config file")] = DEFAULT_CONFIG,
) -> None:
    """Check a config, then hand over to `serve run`, with Serve's HAProxy on. Ctrl-C ends it."""
    from serve_app.ingress.keys import check_keys
    from serve_app.runtime.settings import check

    for args in octavo_args(config):
        parsed = parse_config(args)
        check(parsed)
        check_keys(parsed.security.keys_file)
    environment = SERVE_ENVIRONMENT | os.environ
    command = Path(sys.executable).parent / "serve"
    os.execve(command, [str(command), "run", str(config)], environment)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="what to answer")],
    model: Model = "demo",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, max=100.0, help="0 is greedy")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1, help="of the sampling")] = 0,
    raw: Annotated[bool, typer.Option(help="continue the text as it stands, without the chat template")] = False,
    threads: Annotated[int, typer.Option(min=1, help="threads that compute")] = os.cpu_count() or 1,
) -> None:
    """Answer one prompt in this process, without a cluster, streaming to the terminal."""
    from serve_app.engine.request import Request, SamplingParams
    from serve_app.fetch.hub import resolve
    from serve_app.fetch.progress import silent
    from serve_app.model.tokenizer import Detokenizer, Tokenizer
    from serve_app.runtime.settings import check

    config = parse_config({"model": model, "worker": {"num_threads": threads}})
    spec = check(config)
    folder = resolve(model, silent, fetch=False)
    tokenizer = Tokenizer.load(folder)
    tokens = _prompt_tokens(tokenizer, prompt, raw)
    if not 0 < len(tokens) < spec.max_positions:
        raise OctavoError(f"the prompt is {len(tokens)} tokens; it must be 1 to {spec.max_positions - 1}")
    context = {"max_context_tokens": len(tokens) + max_new_tokens}  # there may be no room for a whole one's KV
    config = parse_config({"model": model, "worker": {"num_threads": threads}, "scheduler": context})
    with err.status("loading"):
        from serve_app.model.checkpoint import Checkpoint
        from serve_app.runtime.local import LocalEngine  # torch: seconds that a refused prompt need not wait

        engine = LocalEngine.load(Checkpoint.open(folder), config)
    sampling = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    text = Detokenizer(tokenizer, skip_special_tokens=True)
    for emission in engine.generate([Request("cli", tokens, sampling)]):
        print(text.push(emission.tokens), end="", flush=True)
    print(text.finish())


def _prompt_tokens(tokenizer: "Tokenizer", prompt: str, raw: bool) -> list[int]:
    try:
        return tokenizer.encode(prompt) if raw else tokenizer.encode_chat([{"role": "user", "content": prompt}])
    except UnicodeError:
        raise OctavoError("the prompt is not valid UTF-8") from None
    except ValueError as error:
        raise OctavoError(f"{error} (--raw sends the prompt as it stands)") from None


@bench_app.callback()
def bench(
    context: typer.Context,
    model: Model = "demo",
    url: Annotated[str | None, typer.Option(help="measure this server instead of an engine in this process")] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="requests at a time; may be given several times")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="per request, in the runs by batch")] = 32,
    output_tokens: Annotated[int, typer.Option(min=2, help="per request, in the runs by batch")] = 128,
    prefill_tokens: Annotated[
        int, typer.Option(min=0, help="one more run: one prompt this long; 0 leaves it out")
    ] = 1024,
    threads: Annotated[
        int | None, typer.Option(min=1, help="threads that compute, of each worker; default: the CPUs' share")
    ] = None,
    tp: Annotated[int, typer.Option(min=1, help="shards; with tp, pp or dp above 1 each worker is a process")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="pipeline stages")] = 1,
    dp: Annotated[int, typer.Option(min=1, help="replicas")] = 1,
    stage_layers: Annotated[str | None, typer.Option(help="layers of each stage, such as 9,7; default: even")] = None,
    trace: Annotated[
        Path | None, typer.Option(help="record the first run once more, to this file: a Chrome trace")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="print figures as JSON")] = False,
) -> None:
    """Tokens per second, time to first token, and time between tokens. With `serve`: load for a server."""
    if context.invoked_subcommand:
        return _refuse_options(context)
    from serve_app.bench.measure import Workload
    from serve_app.bench.report import Target, run_all

    workloads = [Workload(size, prompt_tokens, output_tokens) for size in batch or DEFAULT_BATCHES]
    if prefill_tokens:
        workloads.append(Workload(1, prefill_tokens, 2))
    layout: dict[str, Any] = {"tp": tp, "pp": pp, "dp": dp} if tp * pp * dp > 1 else {}
    if stage_layers is not None:
        layout["stage_layers"] = stage_layers.split(",")
    threads = threads or max(1, (os.cpu_count() or 1) // (tp * pp * dp))
    return run_all(Target(model, url, layout, threads), workloads, trace=trace, as_json=json, console=err)


def _refuse_options(context: typer.Context) -> None:
    """`octavo bench --url A serve` would measure another server than A. OctavoError if there are any."""
    for name in context.params:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = "--" + name.replace("_", "-")
            raise OctavoError(
                f"{option} is for `octavo {context.info_name}` alone: options of serve come after that word"
            )


@app.command()
def drill(
    url: Annotated[str, typer.Option(help="the server")] = "http://127.0.0.1:8000",
    kill: Annotated[
        list[Role] | None, typer.Option(help="what to kill; may be given several times; default: worker")
    ] = None,
    freeze: Annotated[bool, typer.Option("--freeze", help="stop the processes instead (SIGSTOP)")] = False,
    thaw_after: Annotated[
        float | None, typer.Option(min=0.0, help="seconds; with --freeze; default: at the end of the drill")
    ] = None,
    count: Annotated[int, typer.Option(min=1, max=10_000, help="strikes in each role")] = 1,
    every: Annotated[float, typer.Option(min=0.0, help="seconds from strike to strike, at least")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="of the requests, the moments and the victims")] = 0,
    streams: Annotated[int, typer.Option(min=1, max=1024, help="at a time")] = 16,
    tokens: Annotated[int, typer.Option(min=2, max=100_000, help="of an answer, at most")] = 48,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
    json: Annotated[bool, typer.Option("--json", help="print what was found as JSON")] = False,
) -> None:
    """Kill processes of a running cell under load, and see whether any stream noticed.

    The same requests run undisturbed first, then again and again under kills:
    each stream must end, with the same tokens. Run it on a machine of the
    cell's Ray cluster. Times of notice compare this cluster's clocks.

    Ends with status 0 if no stream failed or differs and the cell was whole
    again after each strike.
    """
    from serve_app.drill.drill import Settings
    from serve_app.drill.show import run_drill

    roles = dict.fromkeys(kill or [Role.WORKER])
    settings = Settings(url, [role.value for role in roles], freeze, thaw_after, count, every, seed, streams, tokens)
    raise typer.Exit(run_drill(settings, yes=yes, as_json=json, console=err))


@simulate_app.callback()
def simulate(
    context: typer.Context,
    seeds: Annotated[int, typer.Option(min=1, help="how many runs, each with faults of its own")] = 2000,
    first_seed: Annotated[int, typer.Option(min=0, help="of the first run")] = 0,
    trace: Annotated[bool, typer.Option("--trace", help="print each event, one run after another")] = False,
    json: Annotated[bool, typer.Option("--json", help="print totals and failures as JSON")] = False,
) -> None:
    """Run the engine in virtual cells, with a virtual clock, under seeded faults.

    Workers and engines die, freeze and come back, messages are late, doubled
    or lost; each stream must still be that of an undisturbed run, and each
    cell whole again at the end. The same seed is the same run.

    With `serve`: a load test of the engine in virtual time.

    Ends with status 0 if all of it held.
    """
    if context.invoked_subcommand:
        return _refuse_options(context)
    from serve_app.sim.show import run_simulation, trace_seeds

    if trace and json:
        raise OctavoError("--trace prints events, not figures: leave --json out")
    runs = range(first_seed, first_seed + seeds)
    raise typer.Exit(trace_seeds(runs, err) if trace else run_simulation(runs, as_json=json, console=err))


@app.command()
def calibrate(
    model: Annotated[
        list[str] | None, typer.Option(help="as for `octavo serve`; may be given several times; default: demo")
    ] = None,
    seconds: Annotated[float, typer.Option(min=1.0, help="of measuring; loading comes on top")] = 60.0,
    threads: Annotated[int, typer.Option(min=1, help="threads that compute, of each worker")] = 1,
    url: Annotated[str | None, typer.Option(help="mend --system by what this running cell has observed")] = None,
    system: Annotated[str | None, typer.Option(help="with --url: the system, as for `octavo plan`")] = None,
    out: Annotated[Path | None, typer.Option(help="write the system to this file: YAML for `octavo plan`")] = None,
    json: Annotated[bool, typer.Option("--json", help="print all that was found as JSON")] = False,
) -> None:
    """Measure this machine, and fit the planner's cost model to it.

    Steps in one process, then cells of worker processes under load. Nothing
    else should run meanwhile. Coefficients and predictions come with intervals.
    """
    from serve_app.bench.calibrate.command import run_calibration, run_mending

    if url is not None:
        return run_mending(url, model[0] if model else None, system, out=out, as_json=json, console=err)
    if system is not None:
        raise OctavoError("--system is what --url mends: without it this machine is measured afresh")
    return run_calibration(model or ["demo"], seconds=seconds, threads=threads, out=out, as_json=json, console=err)


@app.command()
def status(
    url: Annotated[str, typer.Option(help="the server")] = "http://127.0.0.1:8000",
    watch: Annotated[bool, typer.Option("--watch", help="redraw each second until Ctrl-C")] = False,
    experts: Annotated[bool, typer.Option("--experts", help="list who holds which experts")] = False,
    json: Annotated[bool, typer.Option("--json", help="print what the server says, as JSON")] = False,
) -> None:
    """Draw a running cell: its workers, their load and memory, who holds which experts.

    Ends with status 0 if there is a cell to show, ready or not: ask /readyz
    for that. Ends with one sentence and status 1 if there is none: no server,
    another server, or one whose router does not answer. A watch goes on.
    """
    from serve_app.status import show

    if json and (watch or experts):
        raise OctavoError("--json prints all that the server says, once: leave --watch and --experts out")
    if json:
        show.show_json(url)
    elif watch:
        show.watch(url, experts=experts)
    else:
        show.show(url, experts=experts)
