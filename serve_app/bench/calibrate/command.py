"""The command: calibrate, show, write."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from serve_app.bench.calibrate.remote import mend
from serve_app.bench.calibrate.run import calibrate
from serve_app.bench.calibrate.show import as_data, mended_data, mended_tables, tables, write
from serve_app.bench.measure import BenchError
from serve_app.plan.system import System
from serve_app.plan.systems import read_system

QUIET_CORES = 0.1  # that others may use before it is said


def run_calibration(
    models: list[str], *, seconds: float, threads: int, out: Path | None, as_json: bool, console: Console
) -> None:
    """Print what was found to stdout, and write the system to `out`. OctavoError where nothing can be measured."""
    _check(out)
    with console.status("calibrating") as status:
        found = calibrate(models, threads, seconds, status.update)
    if found.others > QUIET_CORES:
        console.print(
            f"[yellow]other processes kept {found.others:.1f} cores busy meanwhile: they were measured too[/yellow]"
        )
    _tell(found.system, as_data(found), tables(found), out, as_json=as_json, console=console)


def run_mending(
    url: str, model: str | None, system: str | None, *, out: Path | None, as_json: bool, console: Console
) -> None:
    """The same of a running cell's steps, which mend a system that is known."""
    _check(out)
    if system is None:
        raise BenchError("--url mends a system by what a cell has observed: name the system with --system")
    found = mend(url, read_system(system), model)
    _tell(found.system, mended_data(found), mended_tables(found), out, as_json=as_json, console=console)


def _check(out: Path | None) -> None:
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise BenchError(f"the system cannot be written: {out} is a folder, or in none that there is")


def _tell(
    system: System, data: dict[str, Any], shown: Iterable[Table], out: Path | None, *, as_json: bool, console: Console
) -> None:
    if as_json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(data)).decode() + "\n")
    else:
        for table in shown:
            Console().print(table)
    if out is not None:
        write(system, out)
        console.print(f"written: {out}; `octavo plan --system {out}` reads it", highlight=False, soft_wrap=True)
