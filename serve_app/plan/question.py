"""What a planner is asked: a model, a system, a workload, and how many GPUs, or what they must carry."""

import re
from dataclasses import dataclass, field, replace

from serve_app.errors import PlanError
from serve_app.model.spec import ModelSpec
from serve_app.plan.counts import Precision
from serve_app.plan.deployment import Deployment
from serve_app.plan.system import System
from serve_app.plan.workload import Workload

MAX_GPUS = 16_384


@dataclass(frozen=True)
class Question:
    """`num_gpus` None: as few as carry the workload. `layout`: one that is to be told about beside the best."""

    model: str  # as it was named
    spec: ModelSpec
    precision: Precision
    system: System
    workload: Workload
    num_gpus: int | None
    layout: Deployment | None = None
    standby: int | None = None  # None: the fewest slots that take the loss of one worker of a stage
    spares: int = 0
    strict: bool = False
    rank: str = "healthy"
    top: int = 5
    lengths: tuple[int, ...] = ()  # prompt lengths to tell the bounds for
    declared_params_b: float | None = None

    def __post_init__(self) -> None:
        """Raises PlanError naming what is missing or contradicts."""
        if self.num_gpus is not None and not 1 <= self.num_gpus <= MAX_GPUS:
            raise PlanError(f"--total-gpus must be 1 to {MAX_GPUS}, not {self.num_gpus}")
        if self.top < 1:
            raise PlanError(f"--top-n must be at least 1, not {self.top}")
        if self.layout is not None and self.num_gpus is not None and self.layout.num_gpus != self.num_gpus:
            raise PlanError(f"--layout takes {self.layout.num_gpus} GPUs, but --total-gpus is {self.num_gpus}")

    @property
    def told_lengths(self) -> tuple[int, ...]:
        """The shortest and the longest prompt asked for, if not told otherwise."""
        points = self.workload.isl.points
        return self.lengths or tuple(dict.fromkeys((points[0][0], points[-1][0])))


@dataclass(frozen=True)
class Case:
    """What a preset is asked about by default: where a document describes a whole deployment."""

    num_gpus: int
    layout: str
    isl: str
    osl: str
    concurrency: int
    ttft_s: float
    prefill_tokens_ms: float
    declared_params_b: float
    lengths: tuple[int, ...] = field(default=())


_FOUNDING = Case(32, "tp4,pp4,dp2,standby2", "10240", "128", 128, 10.0, 100.0, 10.0, (128, 10_240, 20_480))

# The founding document's model in its two readings: see docs/planning.md.
CASES = {"reference-10b": _FOUNDING, "reference-small": replace(_FOUNDING, declared_params_b=0.436)}

_PARTS = {"tp": "tp", "pp": "pp", "dp": "dp", "cells": "cells", "standby": "standby", "spares": "spares"}


def read_layout(text: str) -> Deployment:
    """`tp4,pp4,dp2`, with `cells3`, `standby2` and `spares1` where wanted, in any order. Raises PlanError."""
    sizes: dict[str, int] = {}
    for part in re.split(r"[,\s]+", text.strip().lower()):
        match = re.fullmatch(r"([a-z]+)=?(\d{1,6})", part)
        name = match and _PARTS.get(match.group(1))
        if not match or name is None:
            raise PlanError(f"--layout {text!r}: {part!r} is none of {', '.join(f'{key}N' for key in _PARTS)}")
        if name in sizes:
            raise PlanError(f"--layout {text!r} says {name} twice")
        sizes[name] = int(match.group(2))
    try:
        return Deployment(**sizes)
    except ValueError as error:
        raise PlanError(f"--layout {text!r}: {error}") from None
