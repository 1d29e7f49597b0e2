"""What replaying one stage would save, against adding the sequences again: both bring back the KV that a worker lost.

    python -m benchmarks.stage_replay [--model demo] [--rounds 3]

Added again, the sequences go through the whole pipeline (here: two processes of one thread each). Replayed, only the
stage that was lost runs, from the hidden states kept at its boundary: the same plans, one stage in one process of one
thread; the slower of the two stages counts. Keeping the hidden states, and bringing them to the new worker, is left
out: the saving is an upper bound. Prints seconds, and the bytes that would have to be kept. Where nothing else runs.
"""

import argparse
import statistics
import time
from collections.abc import Iterator

import torch

from serve_app.bench.cell import CellBench
from serve_app.bench.measure import Workload
from serve_app.bench.settings import bench_config, requests_of
from serve_app.engine.core import EngineCore
from serve_app.engine.plan import Begin, Plan, Run, StepDone, Submit
from serve_app.fetch.hub import resolve
from serve_app.fetch.progress import silent
from serve_app.model.batch import Batch
from serve_app.model.checkpoint import Checkpoint
from serve_app.model.moe import LocalExperts
from serve_app.runtime.load import Loaded, load
from serve_app.runtime.settings import engine_config, layout_of

LAYOUT = {"pp": 2, "dp": 1, "tp": 1}
WORKLOADS = [Workload(1, 512, 2), Workload(16, 48, 2)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with CellBench(options.model, LAYOUT, 1, WORKLOADS) as cell:
        added_s = [median_of(options.rounds, lambda w=w: added_again_s(cell, w)) for w in WORKLOADS]
    config = bench_config(options.model, LAYOUT, 1, WORKLOADS)
    weights = Checkpoint.open(resolve(options.model, silent, fetch=False))
    _, stages = layout_of(config, weights.spec)
    replayed_s = [0.0] * len(WORKLOADS)
    for layers in stages:
        pairs = [(layer, expert) for layer in layers for expert in range(weights.spec.num_experts)]
        loaded = load(weights, config, layers, 0, pairs)
        for i, workload in enumerate(WORKLOADS):
            plans = list(plans_of(workload, weights, config))
            alone_s = median_of(options.rounds, lambda plans=plans, loaded=loaded: alone_of(loaded, plans))
            replayed_s[i] = max(replayed_s[i], alone_s)
        del loaded
    for workload, added, replayed in zip(WORKLOADS, added_s, replayed_s, strict=True):
        kept_mb = workload.batch * workload.prompt_tokens * weights.spec.hidden_size * 4 / 1e6
        print(
            f"{workload.batch} x {workload.prompt_tokens}: added again {added:.2f} s, the slowest stage alone"
            f" {replayed:.2f} s, saved {1 - replayed / added:.0%}; {kept_mb:.1f} MB of hidden states"
        )


def median_of(num_rounds: int, measure) -> float:  # type: ignore[no-untyped-def]
    """The first round, of cold caches and new kernels, does not count."""
    return statistics.median([measure() for _ in range(num_rounds + 1)][1:])


def added_again_s(cell: CellBench, workload: Workload) -> float:
    """Until the last of the sequences has its next token."""
    return cell.run(workload, lambda num_tokens: None).ttft_p99_s


def plans_of(workload: Workload, weights: Checkpoint, config) -> Iterator[Plan]:  # type: ignore[no-untyped-def]
    """The prefill steps, as the engine makes them."""
    core = EngineCore(engine_config(config, weights.spec, LAYOUT["pp"]))
    commands = core.on(Begin(1, 1, 100_000), 0.0)
    for request in requests_of(workload, weights.spec.vocab_size):
        commands += core.on(Submit(request), 0.0)
    while commands:
        runs = [command.plan for command in commands if isinstance(command, Run)]
        commands = []
        for plan in runs:
            if sum(len(part.tokens) for part in plan.slices) > len(plan.slices):  # else it only decodes
                yield plan
            num_sampled = sum(part.sample is not None for part in plan.slices)
            commands += core.on(StepDone(1, 0, plan.step, [1] * num_sampled, [0.0] * num_sampled), 0.0)


def alone_of(loaded: Loaded, plans: list[Plan]) -> float:
    """One stage runs all plans, one after the other."""
    stage, experts = loaded.stage, LocalExperts(loaded.host)
    num_pages = stage.kv.num_pages
    begun_s = time.perf_counter()
    for plan in plans:
        slices = [
            type(part)(part.start, part.tokens, [page % num_pages for page in part.pages], part.sample)
            for part in plan.slices
        ]
        batch = Batch.from_plan(Plan(1, 0, plan.step, slices), stage.page_tokens, stage.device)
        hidden = None if stage.is_first else torch.randn(len(batch.positions), stage.spec.hidden_size)
        stage.forward(batch, hidden, experts)
    return time.perf_counter() - begun_s


if __name__ == "__main__":
    main()
