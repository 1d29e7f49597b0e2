"""What steps cost in virtual time: a function of what they compute, which whoever sets a simulation up provides."""

from collections.abc import Iterable
from typing import Protocol

import msgspec

from serve_app.engine.pace import Costs, Observed, Work, dot
from serve_app.engine.plan import Slice


class StepWork(msgspec.Struct, frozen=True):
    """What one step computes, summed over its slices. A slice of one token is a row of an answer, whatever it ends."""

    prompt_tokens: int = 0
    pairs: float = 0.0  # (token of a prompt, token that it attends to)
    prompt_kv: int = 0  # tokens whose keys and values are read for prompts
    decode_rows: int = 0
    decode_kv: int = 0  # the same for answers
    sampled: int = 0  # rows that go through the head

    @property
    def pace_work(self) -> Work:
        """The same as the engine's pace counts it."""
        return Work(self.prompt_tokens, self.decode_rows, (self.pairs + self.decode_kv) / 1e3)


class StepCosts(Protocol):
    """Prices of steps. Must be a function of its arguments: the same simulation is the same again."""

    @property
    def num_stages(self) -> int: ...

    def stage_s(self, stage: int, work: StepWork, num_busy: int) -> float:
        """Seconds of a step on one stage, while so many replicas of the cell are at work, its own among them."""

    def slowdown(self, num_at_work: int) -> float:
        """How many times longer all that is under way takes, while so many (replica, stage) are at work."""


class PacedCosts(msgspec.Struct, frozen=True):
    """Of measured paces: seconds between the ends of steps while the whole cell is at work. All stages are alike.

    `num_cores`: that all workers of the cell share, each of which keeps one busy; 0: each has its own. Where fewer
    workers than all are at work, they slow each other down less than they did when the pace was measured.
    """

    costs: Costs
    num_stages: int
    num_replicas: int
    num_cores: int = 0

    def stage_s(self, stage: int, work: StepWork, num_busy: int) -> float:
        return dot(self.costs, work.pace_work.row)

    def slowdown(self, num_at_work: int) -> float:
        if not self.num_cores:
            return 1.0
        most = max(1.0, self.num_stages * self.num_replicas / self.num_cores)
        return max(1.0, num_at_work / self.num_cores) / most


def work_of(slices: Iterable[Slice]) -> StepWork:
    prompt_tokens = prompt_kv = rows = decode_kv = sampled = 0
    pairs = 0.0
    for part in slices:
        num_tokens, start = len(part.tokens), part.start
        sampled += part.sample is not None
        if num_tokens == 1:
            rows += 1
            decode_kv += start + 1
        else:
            prompt_tokens += num_tokens
            pairs += num_tokens * (start + num_tokens / 2)
            prompt_kv += start + num_tokens
    return StepWork(prompt_tokens, pairs, prompt_kv, rows, decode_kv, sampled)


def rehearse(costs: StepCosts, num_replicas: int, max_step_tokens: int, max_rows: int) -> list[Observed]:
    """What a calibration of the whole cell would have seen: the slowest stage's time, for steps of many kinds."""
    slower = costs.slowdown(num_replicas * costs.num_stages)
    found = []
    for num_tokens in sorted({0, 1, *(max(2, max_step_tokens // part) for part in (64, 16, 4, 2, 1))}):
        for rows in sorted({0, 1, max(1, max_rows // 8), max(1, max_rows // 2), max_rows}):
            if rows >= max_step_tokens or not num_tokens + rows or num_tokens == 1:
                continue
            context = max(1, max_step_tokens // 2)
            prompt = min(num_tokens, max_step_tokens - rows)
            work = StepWork(prompt, prompt**2 / 2, prompt, rows, rows * context, rows + (prompt > 0))
            seconds = max(costs.stage_s(stage, work, num_replicas) for stage in range(costs.num_stages))
            found.append(Observed(work.pace_work, slower * seconds))
    return found
