"""From the options of `octavo plan` to a question: what a preset's case fills in, what is assumed, what contradicts."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from serve_app.errors import PlanError
from serve_app.plan.counts import Precision
from serve_app.plan.files import shown, unknown
from serve_app.plan.inputs import choose_model, list_models, read_model, read_precision, read_system, read_workload
from serve_app.plan.presets import find_preset
from serve_app.plan.question import CASES, Case, Question, fill_layout
from serve_app.plan.system import System
from serve_app.plan.workload import Objective, Workload

RANKS = ("healthy", "worst")
MOST_SPARES = 64

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Options:
    """As they are given; None: not at all."""

    model: str | None = None
    preset: str | None = None
    system: str | None = None
    total_gpus: int | None = None
    target_request_rate: float | None = None
    target_concurrency: int | None = None
    isl: str | None = None
    osl: str | None = None
    prefix: float | None = None
    concurrency: int | None = None
    rate: float | None = None
    burstiness: float | None = None
    chunk_tokens: int | None = None
    ttft_s: float | None = None
    tpot_ms: float | None = None
    recovery_s: float | None = None
    availability: float | None = None
    prefill_tokens_ms: float | None = None
    is_strict: bool = False
    rank: str = "healthy"
    top: int = 5
    layout: str | None = None
    standby: int | None = None
    spares: int | None = None
    dtype: str = "bf16"
    top_k: int | None = None
    across_nodes: bool = False


def ask(options: Options, find_model: Callable[[str], str] = str) -> Question:
    """The question that the options put. `find_model`: from what a user calls a model that is no preset to its folder.

    Raises PlanError with one sentence that names the option.
    """
    _check(options)
    name, case = _named(options)
    if options.system is None:
        raise PlanError("no system is given: --system names one of `octavo plan --list`, or a YAML file")
    spec = read_model(name if find_preset(name) else find_model(name), top_k=options.top_k)
    system = read_system(options.system)
    layout, says_standby = None, True
    if (text := _layout(options, case)) is not None:
        standby = options.standby if options.layout or case is None else _first(options.standby, case.standby)
        layout, says_standby = fill_layout(text, spec, system.gpus_per_node, standby=standby, spares=options.spares)
    return Question(
        model=name,
        spec=spec,
        precision=_precision(options.dtype, system),
        system=system,
        workload=_workload(options, case),
        num_gpus=_gpus(options, layout.num_gpus if layout else None),
        layout=layout,
        standby=options.standby,
        spares=layout.spares if layout else options.spares or 0,
        strict=options.is_strict,
        rank=options.rank,
        top=options.top,
        lengths=case.lengths if case and options.isl is None else (),
        declared_params_b=case.declared_params_b if case else None,
        told_prefill_tokens_ms=options.prefill_tokens_ms or (case.prefill_tokens_ms if case else None),
        across_nodes=options.across_nodes,
        layout_says_standby=says_standby,
        assumed=tuple(_assumed(options, case)),
    )


def _precision(text: str, system: System) -> Precision:
    try:
        return read_precision(text, system)
    except PlanError as error:
        raise PlanError(f"--dtype: {error}") from None


def _named(options: Options) -> tuple[str, Case | None]:
    """The model, and the case of the preset that it is."""
    name = choose_model(options.model, options.preset)
    preset = find_preset(name)
    if preset is None and options.preset is not None:
        known = [one.name for one in list_models()]
        raise unknown("--preset", name, known, files="meant to be a file, which --model takes")
    return (name, None) if preset is None else (preset.name, CASES.get(preset.name))


def _layout(options: Options, case: Case | None) -> str | None:
    """The case's only where nobody says how many GPUs there are."""
    if options.layout is not None or case is None or _num_gpus(options) is not None:
        return options.layout
    return case.layout


# -- how many GPUs, and under which load -------------------------------------------------------------------------------


def _num_gpus(options: Options) -> object:
    """Whichever option says how many GPUs there are; None: no option does."""
    return _first(options.total_gpus, options.target_request_rate, options.target_concurrency)


def _gpus(options: Options, of_layout: int | None) -> int | None:
    """None: as few as carry the target."""
    if options.target_request_rate is not None or options.target_concurrency is not None:
        if options.layout is not None:
            raise PlanError(
                "--layout says how many GPUs there are, and a target looks for how many: leave one of them out, or say"
                " the load as --rate or --concurrency"
            )
        if options.spares:
            raise PlanError("--spares goes with --total-gpus or --layout: a target looks for GPUs with a seat")
        return None
    found = options.total_gpus if options.total_gpus is not None else of_layout
    if found is None:
        raise PlanError(
            "it is not said how many GPUs there are: --total-gpus says it, and --target-request-rate or"
            " --target-concurrency looks for the fewest that carry a load"
        )
    return found


def _workload(options: Options, case: Case | None) -> Workload:
    rate = _first(options.rate, options.target_request_rate)
    concurrency = _first(options.concurrency, options.target_concurrency)
    if rate is None and concurrency is None and case:
        concurrency = case.concurrency
    try:
        return read_workload(
            options.isl or (case.isl if case else "1024"),
            options.osl or (case.osl if case else "128"),
            concurrency=concurrency,
            rate=rate,
            prefix_share=options.prefix or 0.0,
            burstiness=_first(options.burstiness, 1.0) or 0.0,
            chunk_tokens=_first(options.chunk_tokens, 8192) or 0,
            objective=Objective(
                ttft_s=_first(options.ttft_s, case.ttft_s if case else None),
                tpot_ms=options.tpot_ms,
                recovery_s=options.recovery_s,
                availability=options.availability,
                prefill_tokens_ms=options.prefill_tokens_ms,
            ),
        )
    except OverflowError:
        raise PlanError("--isl or --osl is too large to reckon with") from None


def _first(*values: _Value | None) -> _Value | None:
    return next((value for value in values if value is not None), None)


def _assumed(options: Options, case: Case | None) -> list[tuple[str, str]]:
    """What nobody has said, and counts."""
    found = []
    if options.isl is None:
        found.append(("--isl", case.isl if case else "1024"))
    if options.osl is None:
        found.append(("--osl", case.osl if case else "128"))
    if all(
        value is None
        for value in (options.rate, options.concurrency, options.target_request_rate, options.target_concurrency)
    ):
        found.append(("--concurrency", str(case.concurrency if case else 128)))
    if case and options.ttft_s is None:
        found.append(("--ttft", f"{case.ttft_s:g}"))
    if options.layout is None and (text := _layout(options, case)) is not None:
        found.append(("--layout", text))
    return found


# -- what can be seen to be wrong without any model --------------------------------------------------------------------


def _check(options: Options) -> None:
    _check_numbers(options)
    _check_pairs(options)
    if options.rank not in RANKS:
        raise PlanError(f"--rank {shown(options.rank)} is neither {' nor '.join(RANKS)}")
    if (share := options.prefix) is not None and not 0 <= share < 1:
        raise PlanError(f"--prefix is a share of a prompt's tokens, at least 0 and below 1, not {share:g}")
    if (share := options.availability) is not None and not 0 < share < 1:
        raise PlanError(f"--availability is a share of the time between 0 and 1, such as 0.999, not {share:g}")
    if (num := options.standby) is not None and not 0 <= num <= 10_000:
        raise PlanError(f"--standby must be 0 to 10,000 slots, not {num}")
    if (num := options.spares) is not None and not 0 <= num <= MOST_SPARES:
        raise PlanError(f"--spares must be 0 to {MOST_SPARES} of each cell, not {num}")
    if options.is_strict and not _has_objective(options):
        raise PlanError(
            "--strict-sla leaves out what misses an objective, and none is given: say --ttft, --tpot, --recovery,"
            " --availability or --prefill-rate"
        )


def _check_numbers(options: Options) -> None:
    for option, value in (
        ("--target-request-rate", options.target_request_rate),
        ("--target-concurrency", options.target_concurrency),
        ("--concurrency", options.concurrency),
        ("--rate", options.rate),
        ("--burstiness", options.burstiness),
        ("--chunk-tokens", options.chunk_tokens),
        ("--ttft", options.ttft_s),
        ("--tpot", options.tpot_ms),
        ("--recovery", options.recovery_s),
        ("--prefill-rate", options.prefill_tokens_ms),
        ("--top-k", options.top_k),
    ):
        if value is not None and not 0 < value < math.inf:
            raise PlanError(f"{option} must be above 0, not {value}")
        if value is not None and value > 1e9:
            raise PlanError(f"{option} {value:g} is beyond 1e9")
    if options.burstiness is not None and options.burstiness > 1000:
        raise PlanError(f"--burstiness {options.burstiness:g} is beyond 1000; 1 is a Poisson process")


def _check_pairs(options: Options) -> None:
    """Options that say the same thing."""
    loads = {
        "--concurrency": options.concurrency,
        "--rate": options.rate,
        "--target-concurrency": options.target_concurrency,
        "--target-request-rate": options.target_request_rate,
    }
    gpus = {
        "--total-gpus": options.total_gpus,
        "--target-request-rate": options.target_request_rate,
        "--target-concurrency": options.target_concurrency,
    }
    for what, group in (("the load", loads), ("the number of GPUs", gpus)):
        said = [option for option, value in group.items() if value is not None]
        if len(said) > 1:
            raise PlanError(f"{said[0]} and {said[1]} both say {what}: give one of them")


def _has_objective(options: Options) -> bool:
    """A preset's case may have one as well."""
    objectives = (
        options.ttft_s,
        options.tpot_ms,
        options.recovery_s,
        options.availability,
        options.prefill_tokens_ms,
    )
    return any(value is not None for value in objectives) or (options.preset or options.model) in CASES
