"""A calibration as tables, as JSON, and as the YAML that `octavo plan --system` reads."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import yaml
from rich.box import SIMPLE
from rich.table import Table

from serve_app.bench.calibrate.remote import Mended
from serve_app.bench.calibrate.run import Calibrated, Served
from serve_app.bench.measure import BenchError
from serve_app.plan.fit import Coefficient, Fitted
from serve_app.plan.system import Interval, System


def as_yaml(system: System) -> str:
    """All fields that were not left at their default, in the order that the system has them."""
    content = system.model_dump(exclude_defaults=True)
    content["efficiency"] = system.efficiency.model_dump(exclude_none=True)
    return yaml.safe_dump(content, sort_keys=False, width=120)


def write(system: System, path: Path) -> None:
    """BenchError where it cannot be written."""
    try:
        path.write_text(as_yaml(system))
    except OSError as error:
        raise BenchError(f"{path} cannot be written: {error.strerror}") from None


def tables(found: Calibrated) -> Iterator[Table]:
    yield _peaks(found)
    yield _coefficients(found)
    if found.served:
        yield _served(found.served)


def _peaks(found: Calibrated) -> Table:
    machine = found.machine
    table = _table("", "measured", title=f"{machine.name}: one worker, threads: {machine.num_threads}")
    for dtype, peak in machine.peak_tflops.items():
        table.add_row(f"products in {dtype}, TFLOP/s", f"{peak:.4g}")
    table.add_row("memory, GB/s", f"{machine.memory_gb_s:.3g}")
    table.add_row("mesh, GB/s", f"{machine.mesh_gb_s:.3g}")
    table.add_row("workers that have a core", str(machine.num_workers))
    return table


def _coefficients(found: Calibrated) -> Table:
    title = (
        f"coefficients, of {len(found.observations)} observed steps; half of them are off by less than"
        f" {100 * found.fitted.typical_error:.0f} %"
    )
    return _of_fit(found.fitted, found.system, title)


def _of_fit(fitted: Fitted, system: System, title: str) -> Table:
    table = _table("", "value", "90 % between", title=title)
    for one in fitted.coefficients:
        table.add_row(one.name, f"{one.value:.4g}", between(one))
    for name in ("ttft_interval", "tpot_interval"):
        interval: Interval = getattr(system, name)
        table.add_row(f"{name}, measured over predicted", "", f"{interval.low:.2f} to {interval.high:.2f}")
    return table


def between(one: Coefficient) -> str:
    return f"{one.low:.3g} to {one.high:.3g}" if one.is_determined else "not determined: kept"


def _served(served: list[Served]) -> Table:
    title = "requests under load: estimated, rehearsed in virtual time, and measured; milliseconds"
    headings = ("layout", "at a time", "prompt", "answer", "TTFT", "rehearsed", "measured")
    table = _table(*headings, "TPOT", "rehearsed", "measured", title=title)
    for one in served:
        load, rehearsed = one.seen.load, one.rehearsed or one.seen
        counts = (load.concurrency, load.prompt_tokens, load.output_tokens)
        times_s = (one.ttft_s, rehearsed.ttft_s, one.seen.ttft_s, one.tpot_s, rehearsed.tpot_s, one.seen.tpot_s)
        table.add_row(str(one.case.deployment), *map(str, counts), *(f"{1e3 * time_s:.1f}" for time_s in times_s))
    return table


def mended_tables(found: Mended) -> Iterator[Table]:
    table = _table(
        "", "steps", "observed / predicted", "90 % between", "inside", "", title="the steps that were served"
    )
    for name, one in (("the system as it was", found.before), ("mended", found.after)):
        spread = f"{one.low:.2f} to {one.high:.2f}"
        table.add_row(name, str(one.num), f"{one.ratio:.2f}", spread, f"{100 * one.share_inside:.0f} %", one.verdict)
    yield table
    yield _of_fit(found.fitted, found.system, "coefficients")


def mended_data(found: Mended) -> dict[str, Any]:
    return {
        "before": found.before,
        "after": found.after,
        "system": found.system.model_dump(),
        "coefficients": found.fitted.coefficients,
    }


def _table(*headings: str, title: str) -> Table:
    table = Table(*headings, title=title, title_justify="left", box=SIMPLE)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def as_data(found: Calibrated) -> dict[str, Any]:
    """All of it as plain values."""
    return {
        "machine": found.machine,
        "others_cores": found.others,
        "system": found.system.model_dump(),
        "coefficients": found.fitted.coefficients,
        "typical_error": found.fitted.typical_error,
        "steps": [
            {
                "layout": str(o.case.deployment),
                "kind": o.kind,
                "prompt_tokens": o.step.prompt_tokens,
                "decode_rows": o.step.decode_rows,
                "pairs": o.step.pairs + o.step.decode_kv,
                "seconds": o.seconds,
                "ratio": ratio,
            }
            for o, ratio in zip(found.observations, found.fitted.ratios, strict=True)
        ],
        "requests": [
            {
                "layout": str(one.case.deployment),
                "load": one.seen.load,
                "estimated": {"ttft_s": one.ttft_s, "tpot_s": one.tpot_s},
                "rehearsed": one.rehearsed,
                "measured": msgspec.structs.replace(one.seen, observed=[]),
            }
            for one in found.served
        ],
    }
