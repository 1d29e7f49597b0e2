"""What the in-process benchmark and that of a cell have in common: the config, and the requests of a workload."""

from collections.abc import Sequence

from serve_app.bench.measure import BenchError, Workload
from serve_app.config import OctavoConfig, parse_config
from serve_app.engine.request import Request, SamplingParams
from serve_app.model.spec import ModelSpec

WARM_UP = Workload(2, 16, 4)  # first touches are slow


def bench_config(
    model: str, layout: dict[str, int], threads: int, workloads: Sequence[Workload], kv_gib: float = 1.0
) -> OctavoConfig:
    """`threads` and `kv_gib`: of one worker. The context is just what the workloads need. No prefix is reused."""
    return parse_config(
        {
            "model": model,
            "layout": layout,
            "worker": {"num_threads": threads, "kv_gib": kv_gib},
            "scheduler": {
                "max_running": 1024,
                "max_context_tokens": max(map(_num_tokens, (WARM_UP, *workloads))),
                "prefix_cache": False,
            },
            "resilience": {"resume_s": 0.0},  # runs use the same names again
        }
    )


def check_context(spec: ModelSpec, workloads: Sequence[Workload]) -> None:
    """BenchError where a workload does not fit the model's context."""
    for workload in workloads:
        if _num_tokens(workload) > spec.max_positions:
            raise BenchError(
                f"{workload.prompt_tokens} prompt tokens and {workload.output_tokens} output tokens do not fit the"
                f" model's context of {spec.max_positions}"
            )


def requests_of(workload: Workload, vocab_size: int) -> list[Request]:
    sampling = SamplingParams(max_new_tokens=workload.output_tokens, temperature=0.0, ignore_eos=True)
    return [Request(f"bench-{i}", prompt, sampling) for i, prompt in enumerate(workload.prompts(vocab_size))]


def _num_tokens(workload: Workload) -> int:
    """Of one sequence."""
    return workload.prompt_tokens + workload.output_tokens
