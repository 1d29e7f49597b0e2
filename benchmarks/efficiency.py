"""What cutting a model costs: tokens per second of a cell of processes beside one process with as many threads.

    python -m benchmarks.efficiency [--model reference] [--rounds 4]

Each round runs the same 32 requests in one process with two threads, then in a cell of single-threaded workers; the
median of the rounds' ratios counts, the first round (new kernels, cold caches) does not. On a machine with two cores,
where nothing else runs: the bars are for that. Exits with 1 where a ratio is below its bar.
"""

import argparse
import statistics
import sys

from serve_app.bench.cell import CellBench
from serve_app.bench.local import LocalBench
from serve_app.bench.measure import Workload

WORKLOAD = Workload(batch=32, prompt_tokens=32, output_tokens=64)
STAGE_LAYERS = {"reference": [9, 7], "demo": [16, 14]}  # the head takes the time of two layers
BARS = (({"pp": 2}, 0.9), ({"pp": 2, "dp": 2}, 0.75))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="reference", choices=STAGE_LAYERS)
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    local = LocalBench(options.model, 2, [WORKLOAD])
    is_met = True
    for cut, bar in BARS:
        layout = cut | {"stage_layers": STAGE_LAYERS[options.model]}
        with CellBench(options.model, layout, 1, [WORKLOAD]) as cell:
            ratios = [ratio(local, cell) for _ in range(options.rounds)][1:]
        median = statistics.median(ratios)
        is_met = is_met and median >= bar
        print(
            f"{cut}: {median:.2f} of one process ({', '.join(f'{one:.2f}' for one in ratios)}), bar {bar}", flush=True
        )
    return 0 if is_met else 1


def ratio(local: LocalBench, cell: CellBench) -> float:
    one = local.run(WORKLOAD, lambda num_tokens: None).output_tokens_per_s
    return cell.run(WORKLOAD, lambda num_tokens: None).output_tokens_per_s / one


if __name__ == "__main__":
    sys.exit(main())
