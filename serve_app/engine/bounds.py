"""What bounds the engine, and what it counts."""

from dataclasses import dataclass

import msgspec

from serve_app.engine.slo import SloConfig


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What bounds the engine. Raises ValueError for a bound below one."""

    num_stages: int  # as many steps are in flight per replica
    max_context_tokens: int  # prompt + emitted
    page_tokens: int = 32
    max_running: int = 64  # sequences per replica
    max_step_tokens: int = 1024  # of one step, prefill and decode together
    eos_token_ids: tuple[int, ...] = ()
    prefix_cache: bool = True
    slo: SloConfig = SloConfig()
    keep_s: float = 0.0  # how long the tokens of an ended request are kept for whoever lost its stream

    def __post_init__(self) -> None:
        for name in ("num_stages", "max_context_tokens", "page_tokens", "max_running", "max_step_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")


@dataclass(slots=True)
class Totals:
    """Counts over the engine's life, all replicas and epochs together."""

    num_steps: int = 0
    num_preemptions: int = 0
    num_replayed: int = 0  # running requests that were added again because their replica or engine was lost
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    length_ratio: float = 1.0  # of answers to what was asked for at most, learned
