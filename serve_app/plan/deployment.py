"""A layout and how often it stands there: cells x (TP x PP x DP), and the slots of its workers."""

from dataclasses import dataclass
from functools import cached_property

from serve_app.experts.layout import Layout, stage_layers
from serve_app.experts.placement import Slots
from serve_app.model.spec import ModelSpec


@dataclass(frozen=True)
class Deployment:
    """`cells` independent instances of one layout. The experts of a stage are spread over its TP x DP workers."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    cells: int = 1
    standby: int = 0  # slots of each worker beyond its primaries
    spares: int = 0  # warm workers of each cell without a seat, one GPU each

    def __post_init__(self) -> None:
        """Raises ValueError for a size below one, or a negative number of slots or spares."""
        for name in ("tp", "pp", "dp", "cells"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")
        for name in ("standby", "spares"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}.")

    @cached_property
    def layout(self) -> Layout:
        return Layout(self.pp, self.dp, self.tp)

    @property
    def ep(self) -> int:
        """Workers that the experts of a stage are spread over."""
        return self.tp * self.dp

    @property
    def cell_gpus(self) -> int:
        """With seats: without spares."""
        return self.tp * self.pp * self.dp

    @property
    def num_gpus(self) -> int:
        return self.cells * (self.cell_gpus + self.spares)

    @property
    def num_replicas(self) -> int:
        """Copies of the attention weights, in all cells."""
        return self.cells * self.dp

    def primary(self, spec: ModelSpec) -> int:
        """Expert slots that the fullest worker needs for its part of the stage."""
        layers = max(len(stage) for stage in stage_layers(spec.num_layers, self.pp))
        return -(-layers * spec.num_experts // self.ep)

    def slots(self, spec: ModelSpec) -> Slots:
        return Slots(self.primary(spec), self.standby)

    def __str__(self) -> str:
        name = f"TP{self.tp} PP{self.pp} DP{self.dp} EP{self.ep}"
        return name if self.cells == 1 else f"{self.cells} x ({name})"
