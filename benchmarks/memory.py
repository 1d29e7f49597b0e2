"""Memory of each worker of a cell, measured and as the cost model has it (`serve_app.plan.memory`).

    python -m benchmarks.memory [--layout 1x1x1 1x2x2 ...] [--workload prompt batch] [--tolerance 0.15]

Two workloads on the reference model, each on a cell of processes of its own: one prompt of 20,480 tokens, and a batch
of 256 short sequences. What is compared is the peak of the resident memory (VmHWM) between the moment when the workers
are ready and the end of the workload: after it less is held. The KV pool is not much larger than the workloads need, so
that nothing is small beside it. On the small machine a prompt takes minutes. Exits with 1 where a worker is off by
more than the tolerance.
"""

import argparse
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from serve_app.bench.cell import CellBench
from serve_app.bench.measure import Workload
from serve_app.bench.settings import bench_config
from serve_app.config import OctavoConfig
from serve_app.experts.layout import Seat
from serve_app.model.cpu import pick_dtype
from serve_app.model.spec import ModelSpec
from serve_app.plan.memory import WorkerMemory, worker_memory
from serve_app.runtime.settings import check, layout_of, slots_of

MODEL = "reference"
KV_GIB = 0.8  # of all workers of a replica: 26,214 tokens
LAYOUTS = ["1x1x1", "1x2x1", "1x2x2", "2x2x1", "4x4x2"]  # TP x PP x DP
WORKLOADS = {"prompt": Workload(1, 20_480, 8), "batch": Workload(256, 32, 16)}
MIB = 2**20


class Row(NamedTuple):
    """The peak of one worker, and what was said of it."""

    worker: str
    peak_bytes: int
    predicted: WorkerMemory

    @property
    def ratio(self) -> float:
        return self.peak_bytes / self.predicted.total_bytes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", nargs="+", default=LAYOUTS)
    parser.add_argument("--workload", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument("--tolerance", type=float, default=0.15)
    options = parser.parse_args()
    is_met = True
    print("MiB: peak measured, predicted, their ratio; and what the prediction is made of")
    for layout in options.layout:
        for name in options.workload:
            for row in rows(layout, WORKLOADS[name]):
                is_met = is_met and abs(row.ratio - 1) <= options.tolerance
                print(line(layout, name, row), flush=True)
    return 0 if is_met else 1


def rows(layout_text: str, workload: Workload) -> Iterator[Row]:
    tp, pp, dp = (int(size) for size in layout_text.split("x"))
    layout, threads = {"tp": tp, "pp": pp, "dp": dp}, max(1, len(os.sched_getaffinity(0)) // (tp * pp * dp))
    config = bench_config(MODEL, layout, threads, [workload], KV_GIB / (tp * pp))
    peaks = run(config, workload)
    spec = check(config)
    for seat in layout_of(config, spec)[0].seats():
        name = f"w{seat.stage}.{seat.replica}.{seat.shard}"
        yield Row(name, peaks[name], predict(config, spec, seat, workload))


def run(config: OctavoConfig, workload: Workload) -> dict[str, int]:
    """Peaks in bytes, by worker."""
    layout, worker = config.layout.model_dump(include={"tp", "pp", "dp"}), config.worker
    with CellBench(MODEL, layout, worker.num_threads, [workload], worker.kv_gib) as cell:
        folders = {process.name: Path(f"/proc/{process.pid}") for process in multiprocessing.active_children()}
        for folder in folders.values():
            (folder / "clear_refs").write_text("5")  # the peak begins anew
        begun_s = time.perf_counter()
        cell.run(workload, lambda num_tokens: None)
        print(f"{layout}, {workload}: {time.perf_counter() - begun_s:.0f} s", file=sys.stderr, flush=True)
        return {name: peak_bytes(folder) for name, folder in folders.items()}


def peak_bytes(folder: Path) -> int:
    found = re.search(r"^VmHWM:\s+(\d+) kB$", (folder / "status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def predict(config: OctavoConfig, spec: ModelSpec, seat: Seat, workload: Workload) -> WorkerMemory:
    layout, stages = layout_of(config, spec)
    return worker_memory(
        spec,
        layout,
        stages,
        seat,
        slots_of(config, spec),
        page_tokens=config.scheduler.page_tokens,
        kv_gib=config.worker.kv_gib,
        dtype_bytes=pick_dtype(torch.device("cpu"), config.dtype).itemsize,
        max_step_tokens=config.scheduler.max_step_tokens,
        max_running=-(-workload.batch // layout.num_replicas),
    )


def line(layout: str, name: str, row: Row) -> str:
    parts = ", ".join(f"{part.removesuffix('_bytes')} {size / MIB:.0f}" for part, size in asdict(row.predicted).items())
    figures = f"{row.peak_bytes / MIB:6.0f} {row.predicted.total_bytes / MIB:6.0f} {row.ratio:5.2f}"
    return f"{layout} {name:6} {row.worker} {figures}  ({parts})"


if __name__ == "__main__":
    sys.exit(main())
