"""What the engine costs the host: microseconds of one `EngineCore.on(StepDone)`, the next plan included.

Usage: python benchmarks/engine_host_cost.py [--prompt-tokens 512] [--stages 1] [--steps 200]
"""

import argparse
import statistics
import time

from serve_app.engine.core import EngineConfig, EngineCore
from serve_app.engine.plan import Begin, Command, Plan, Run, StepDone, Submit
from serve_app.engine.request import Request, SamplingParams


def plans_of(commands: list[Command]) -> list[Plan]:
    return [command.plan for command in commands if isinstance(command, Run)]


def answer(plan: Plan) -> StepDone:
    num_tokens = sum(part.sample is not None for part in plan.slices)
    return StepDone(plan.epoch, plan.replica, plan.step, [7] * num_tokens, [0.0] * num_tokens)


def full_engine(
    num_sequences: int, prompt_tokens: int, num_stages: int, num_steps: int
) -> tuple[EngineCore, list[Plan]]:
    """An engine with `num_sequences` decoding sequences, and its plans in flight."""
    max_context_tokens = prompt_tokens + num_stages * num_steps + 1000
    config = EngineConfig(
        num_stages=num_stages,
        max_context_tokens=max_context_tokens,
        max_running=num_sequences,
        max_step_tokens=prompt_tokens * num_sequences,
    )
    core = EngineCore(config)
    core.on(Begin(0, 1, num_sequences * (max_context_tokens // config.page_tokens + 2)), 0.0)
    plans: list[Plan] = []
    params = SamplingParams(max_new_tokens=max_context_tokens, ignore_eos=True)
    for i in range(num_sequences):
        plans += plans_of(core.on(Submit(Request(f"r{i}", [i] * prompt_tokens, params)), 0.0))
    for _ in range(4 * num_stages):
        plans += plans_of(core.on(answer(plans.pop(0)), 0.0))
    assert core.stats().running == num_sequences
    return core, plans


def cost_us(num_sequences: int, prompt_tokens: int, num_stages: int, num_steps: int) -> list[float]:
    core, plans = full_engine(num_sequences, prompt_tokens, num_stages, num_steps)
    costs = []
    for _ in range(num_steps):
        done = answer(plans.pop(0))
        start = time.perf_counter()
        commands = core.on(done, 0.0)
        costs.append((time.perf_counter() - start) * 1e6)
        plans += plans_of(commands)
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--stages", type=int, default=1)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    print(f"{args.prompt_tokens} prompt tokens, {args.stages} stages: microseconds per step")
    print(f"{'sequences':>10} {'p50':>8} {'p99':>8} {'per sequence':>13}")
    for num_sequences in (1, 64, 256):
        costs = sorted(cost_us(num_sequences, args.prompt_tokens, args.stages, args.steps))
        p50, p99 = statistics.median(costs), costs[int(len(costs) * 0.99)]
        print(f"{num_sequences:>10} {p50:>8.0f} {p99:>8.0f} {p50 * args.stages / num_sequences:>13.2f}")


if __name__ == "__main__":
    main()
