"""What a planner is asked: a model, a system, a workload, and how many GPUs, or what they must carry."""

import re
from dataclasses import dataclass, field, replace

from serve_app.errors import PlanError
from serve_app.model.spec import ModelSpec
from serve_app.plan.counts import Precision
from serve_app.plan.deployment import Deployment
from serve_app.plan.legal import least_standby, why_not
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
    told_prefill_tokens_ms: float | None = None  # of a GPU: up to which prompts it is reached is told, and no more
    across_nodes: bool = False  # whether expert groups may be larger than a node
    layout_says_standby: bool = True
    assumed: tuple[tuple[str, str], ...] = ()  # options that nobody said, and what they were taken to be

    def __post_init__(self) -> None:
        """Raises PlanError naming what is missing or contradicts."""
        if self.num_gpus is not None and not 1 <= self.num_gpus <= MAX_GPUS:
            raise PlanError(f"--total-gpus must be 1 to {MAX_GPUS}, not {self.num_gpus}")
        if self.top < 1:
            raise PlanError(f"--top-n must be at least 1, not {self.top}")
        if self.layout is not None and self.num_gpus is not None and self.layout.num_gpus != self.num_gpus:
            raise PlanError(_does_not_match(self.layout, self.num_gpus))

    @property
    def told_lengths(self) -> tuple[int, ...]:
        """The shortest and the longest prompt asked for, if not told otherwise."""
        points = self.workload.isl.points
        return self.lengths or tuple(dict.fromkeys((points[0][0], points[-1][0])))


def _does_not_match(layout: Deployment, num_gpus: int) -> str:
    num_cells, rest = divmod(num_gpus * layout.cells, layout.num_gpus)
    hint = f": cells{num_cells} in it would take them all" if num_cells and not rest else ""
    return f"--layout takes {layout.num_gpus} GPUs, but --total-gpus is {num_gpus}{hint}"


@dataclass(frozen=True)
class Case:
    """What a preset is asked about by default: where a document describes a whole deployment."""

    num_gpus: int
    layout: str
    standby: int
    isl: str
    osl: str
    concurrency: int
    ttft_s: float
    prefill_tokens_ms: float
    declared_params_b: float
    lengths: tuple[int, ...] = field(default=())


_FOUNDING = Case(32, "tp4,pp4,dp2", 2, "10240", "128", 128, 10.0, 100.0, 10.0, (128, 10_240, 20_480))

# The founding document's model in its two readings: see docs/planning.md.
CASES = {"reference-10b": _FOUNDING, "reference-small": replace(_FOUNDING, declared_params_b=0.436)}

_PARTS = ("tp", "pp", "dp", "cells", "standby", "spares")


def read_layout(text: str, *, option: str = "--layout") -> Deployment:
    """`tp4,pp4,dp2`, with `cells3`, `standby2` and `spares1` where wanted, in any order. Raises PlanError."""
    return _deployment(text, _sizes(text, option), option)


def fill_layout(
    text: str,
    spec: ModelSpec,
    gpus_per_node: int,
    *,
    standby: int | None = None,
    spares: int | None = None,
    option: str = "--layout",
) -> tuple[Deployment, bool]:
    """The same with what other options say, and whether anybody has said its standby slots: if not, they are the fewest
    that take the loss of one worker of a stage. Raises PlanError where two options contradict."""
    sizes = _sizes(text, option)
    for name, value in (("standby", standby), ("spares", spares)):
        if value is not None and sizes.setdefault(name, value) != value:
            raise PlanError(f"{option} says {name}{sizes[name]}, but --{name} is {value}")
    found = _deployment(text, sizes, option)
    if "standby" in sizes or why_not(spec, found, gpus_per_node, across_nodes=True) is not None:
        return found, True
    return replace(found, standby=least_standby(spec, found)), False


def _sizes(text: str, option: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for part in re.split(r"[,\s]+", text.strip().lower()):
        match = re.fullmatch(r"([a-z]+)=?(\d{1,6})", part)
        if not match or (name := match.group(1)) not in _PARTS:
            known = ", ".join(f"{key}N" for key in _PARTS)
            raise PlanError(f"{option} {text!r}: {part!r} is none of {known}, such as tp4,pp2,dp2")
        if name in sizes:
            raise PlanError(f"{option} {text!r} says {name} twice")
        sizes[name] = int(match.group(2))
    return sizes


def _deployment(text: str, sizes: dict[str, int], option: str) -> Deployment:
    try:
        found = Deployment(**sizes)
    except ValueError as error:
        raise PlanError(f"{option} {text!r}: {str(error).rstrip('.')}") from None
    if found.num_gpus > MAX_GPUS:
        raise PlanError(f"{option} {text!r} takes {found.num_gpus:,} GPUs; at most {MAX_GPUS:,} are planned for")
    return found
