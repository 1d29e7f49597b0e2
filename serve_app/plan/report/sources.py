"""Where each number comes from: a data sheet, a measurement, a default that says so, or a guess."""

from collections.abc import Iterator

from pydantic import BaseModel

from serve_app.plan.answer import Answer
from serve_app.plan.report.figures import number
from serve_app.plan.report.markup import Html, items, section, table, tag
from serve_app.plan.system import Efficiency, Recovery, System, is_calibrated

_UNITS = {
    "memory_gb": "GB",
    "memory_gb_s": "GB/s",
    "gpus_per_node": "GPUs",
    "intra_gb_s": "GB/s",
    "inter_gb_s": "GB/s",
    "load_gb_s": "GB/s",
    "disk_gb_s": "GB/s",
    "runtime_gb": "GB",
    "memory_share": "",
}
_SAYS = {"memory_gb": "memory of one GPU", "gpus_per_node": "GPUs of a node"}


def sources(answer: Answer) -> Html:
    system = answer.question.system
    return section(
        "sources",
        "Assumptions and sources",
        items(_assumptions(answer)),
        tag("h3", f"System {system.name}"),
        table("The hardware", ["number", "value", "what it is", "from"], _hardware(system), numbers=[1]),
        table(
            "Shares of it that software gets",
            ["number", "value", "what it is", "from"],
            _part(system.efficiency, system),
        ),
        table("Phases of a recovery", ["number", "value", "what it is", "from"], _part(system.recovery, system)),
    )


def _assumptions(answer: Answer) -> Iterator[str]:
    system, workload = answer.question.system, answer.question.workload
    yield "Steady state: requests come and go at the same pace, and all replicas of a cell have the same load."
    yield (
        f"Each operation takes as long as its bound allows, times the shares below. A step carries at most"
        f" {workload.chunk_tokens:,} prompt tokens."
    )
    ttft, tpot = system.ttft_interval, system.tpot_interval
    told = (
        f"{number(ttft.low)} to {number(ttft.high)} times the prediction for TTFT, {number(tpot.low)} to"
        f" {number(tpot.high)} times for the time between tokens"
    )
    if is_calibrated(system):
        yield f"Intervals were measured on this system: nine of ten measurements lay at {told}."
    else:
        yield f"Intervals are a guess, since nobody has calibrated this system: {told}."
        yield "`octavo calibrate` measures them."
    yield (
        f"GPUs fail one by one, each every {number(system.recovery.mtbf_h)} hours; that a node takes all its GPUs along"
        " is told among the losses, but is not in the availability."
    )
    yield "No GPU has run a failover yet: its phases are medians of cells on CPUs, and what says that it is a guess."


def _hardware(system: System) -> Iterator[list[str]]:
    for dtype, peak in system.peak_tflops.items():
        yield [f"peak {dtype}", f"{number(peak)} TFLOP/s", "products, dense", system.source]
    for name, unit in _UNITS.items():
        field = type(system).model_fields[name]
        value = f"{number(getattr(system, name))} {unit}".strip()
        says = field.description or _SAYS[name]
        yield [name, value, says, _origin(system, name, system.source)]


def _part(part: Efficiency | Recovery, system: System) -> Iterator[list[str]]:
    for name, field in type(part).model_fields.items():
        value = getattr(part, name)
        shown = "as its default" if value is None else number(value)
        yield [name, shown, field.description or "", _origin(part, name, system.source)]


def _origin(part: BaseModel, name: str, source: str) -> str:
    return source if name in part.model_fields_set else "default"
