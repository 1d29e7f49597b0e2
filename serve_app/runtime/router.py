"""The router's own state: where every expert lives, how much work each one has had, and who is in the cell.

Bytes never pass through here. The tables it makes are on every worker; a router that dies stops nothing.
"""

from collections import Counter

from serve_app.experts.layout import Layout, Seat
from serve_app.experts.placement import Placement, place
from serve_app.runtime.wire import ExpertLoad, Form

Pair = tuple[int, int]  # (layer, expert)


class Registry:
    """Placement, load and membership of one cell."""

    def __init__(self, layout: Layout, stages: list[range], num_experts: int) -> None:
        self._layout = layout
        self._stages = stages
        self._num_experts = num_experts
        self._placements: list[Placement] = [place(layers, num_experts, layout.group_size) for layers in stages]
        self._loads: Counter[Pair] = Counter()
        self._form: Form | None = None

    def tables(self) -> list[list[list[int]]]:
        """For each stage, for each of its layers: the rank that hosts each expert."""
        return [
            [list(placement.table(layer)) for layer in layers]
            for layers, placement in zip(self._stages, self._placements, strict=True)
        ]

    def pairs(self) -> dict[Seat, list[Pair]]:
        """The (layer, expert) pairs that the worker of each seat is to hold."""
        tables = self.tables()
        return {seat: self._held(seat, tables[seat.stage]) for seat in self._layout.seats()}

    def _held(self, seat: Seat, table: list[list[int]]) -> list[Pair]:
        rank = self._layout.group_rank(seat)
        return [
            (layer, expert)
            for layer, ranks in zip(self._stages[seat.stage], table, strict=True)
            for expert, host in enumerate(ranks)
            if host == rank
        ]

    def record(self, form: Form) -> None:
        """Remember the membership of the newest epoch."""
        self._form = form

    def add(self, load: ExpertLoad) -> None:
        for layer, expert, count in load.counts:
            self._loads[layer, expert] += count

    def snapshot(self) -> dict[str, object]:
        """Epoch, members, and per stage the tokens run and their imbalance (max over mean of the workers)."""
        return {
            "epoch": self._form.epoch if self._form else 0,
            "members": [list(seat) for seat in self._form.seats] if self._form else [],
            "stages": [self._stage(stage) for stage in range(len(self._stages))],
        }

    def _stage(self, stage: int) -> dict[str, object]:
        per_worker: Counter[int] = Counter()
        for layer, ranks in zip(self._stages[stage], self.tables()[stage], strict=True):
            for expert, rank in enumerate(ranks):
                per_worker[rank] += self._loads[layer, expert]
        total = per_worker.total()
        imbalance = max(per_worker.values()) * len(per_worker) / total if total else 1.0
        return {"tokens": [per_worker[rank] for rank in sorted(per_worker)], "imbalance": round(imbalance, 3)}
