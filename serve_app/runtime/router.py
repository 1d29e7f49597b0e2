"""The router's own state: where every expert lives, how much work each one has had, and who is in the cell.

Bytes never pass through here. The tables it makes are on every worker; a router that dies stops nothing.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from serve_app.engine.members import Formed, StageTable
from serve_app.experts.layout import Layout, Seat
from serve_app.experts.placement import Pair, Placement, Slots, max_over_mean, place, primaries_per_worker
from serve_app.runtime.snapshot import CellView, StageView, WorkerView
from serve_app.runtime.wire import Report

WINDOW_S = 10.0  # tokens are counted over the running window and the one before it
MOVE_RATIO = 0.9  # experts move for an imbalance below this share of the present one: moving costs loading


@dataclass
class _Window:
    """Tokens run through experts, from `start_s` on."""

    start_s: float
    by_pair: Counter[Pair] = field(default_factory=Counter)
    by_name: Counter[str] = field(default_factory=Counter)


class Registry:
    """Placement, load and membership of one cell. Times are seconds on any one clock. Not safe between threads."""

    def __init__(self, layout: Layout, stages: list[range], num_experts: int, slots: Slots | None) -> None:
        """`slots`: None is just enough primary slots, no standbys. ValueError where they are too few."""
        self._layout = layout
        self._stages = stages
        self._num_experts = num_experts
        self._slots = slots or Slots(
            primaries_per_worker(max(map(len, stages)), num_experts, layout.group_size), standby=0
        )
        self._nodes: dict[Seat, str] | None = None  # before the first `settle`
        self._placements = [self._offer(stage, {}) for stage in range(len(stages))]  # at full strength
        self._present = self._placements  # of the newest epoch: the homes of the living
        self._form: Formed | None = None
        self._resident_bytes: dict[str, int] = {}  # by name
        self._running: _Window | None = None
        self._before: _Window | None = None  # the last complete one

    # -- placement ----------------------------------------------------------------------------------------------------

    def settle(self, nodes: dict[Seat, str]) -> None:
        """Decide the placement of the next epoch, from the present load and the node of each seat (where known).

        A stage keeps its placement unless another one is more even by more than a tenth. The first call has nothing
        to keep: no worker has loaded its experts yet.
        """
        is_first = self._nodes is None
        self._nodes = dict(nodes)
        load = self._load()
        for stage, placement in enumerate(self._placements):
            offered = self._offer(stage, load)
            if is_first or offered.imbalance(load) < placement.imbalance(load) * MOVE_RATIO:
                self._placements[stage] = offered

    def seed(self, tables: list[StageTable]) -> None:
        """Go on from the placement that another router had decided: its workers have these experts."""
        self._placements = self._present = self._placements_of(tables)
        self._nodes = {}

    def _placements_of(self, tables: list[StageTable]) -> list[Placement]:
        return [
            Placement(layers, self._layout.group_size, tuple(tuple(map(tuple, layer)) for layer in table))
            for layers, table in zip(self._stages, tables, strict=True)
        ]

    def tables(self) -> list[StageTable]:
        """For each stage, for each of its layers: the ranks that host each expert, the primary first."""
        return [[[list(ranks) for ranks in table] for table in placement.hosts] for placement in self._placements]

    def pairs(self) -> dict[Seat, list[Pair]]:
        """The (layer, expert) pairs that the worker of each seat is to hold: its primaries, then its standbys."""
        return {seat: self._held(seat) for seat in self._layout.seats()}

    def _held(self, seat: Seat) -> list[Pair]:
        placement, rank = self._placements[seat.stage], self._layout.group_rank(seat)
        return placement.held(rank) + placement.standbys(rank)

    def _offer(self, stage: int, load: Mapping[Pair, float]) -> Placement:
        """What would be placed now, if nothing had to be moved for it."""
        nodes = [(self._nodes or {}).get(seat) for seat in self._group(stage)]
        size = self._layout.group_size
        return place(self._stages[stage], self._num_experts, size, self._slots, load, nodes)

    def _group(self, stage: int) -> list[Seat]:
        """The seats of a stage by rank."""
        seats = [seat for seat in self._layout.seats() if seat.stage == stage]
        return sorted(seats, key=self._layout.group_rank)

    # -- membership and load ------------------------------------------------------------------------------------------

    def record(self, form: Formed) -> None:
        """Remember the membership of the newest epoch, and forget those who are not in it. Older forms are passed over.

        What the experts of the forgotten ran still counts as the load of these experts.
        """
        if self._form is not None and form.epoch < self._form.epoch:
            return
        self._form = form
        self._present = self._placements_of(form.tables)
        names = set(self._names().values())
        self._resident_bytes = {name: size for name, size in self._resident_bytes.items() if name in names}
        for window in self._windows():
            window.by_name = Counter({name: num for name, num in window.by_name.items() if name in names})

    def add(self, report: Report, now_s: float) -> None:
        """Count what a worker ran. Names that are not in the recorded form, and unknown experts, are passed over."""
        window = self._window(now_s)
        if report.name not in self._names().values():
            return
        self._resident_bytes[report.name] = report.resident_bytes
        for layer, expert, num_tokens in report.counts:
            if 0 <= layer < self._stages[-1].stop and 0 <= expert < self._num_experts and num_tokens > 0:
                window.by_pair[layer, expert] += num_tokens
                window.by_name[report.name] += num_tokens

    def _names(self) -> dict[Seat, str]:
        if self._form is None:
            return {}
        return {Seat(stage, replica, shard): name for name, stage, replica, shard in self._form.seats}

    def _window(self, now_s: float) -> _Window:
        """The running window. The one that has run out becomes the last complete one."""
        if self._running is None:
            self._running = _Window(now_s)
        num_passed = (now_s - self._running.start_s) // WINDOW_S
        if num_passed >= 1:
            start_s = self._running.start_s + num_passed * WINDOW_S
            self._before = self._running if num_passed == 1 else _Window(start_s - WINDOW_S)
            self._running = _Window(start_s)
        return self._running

    def _windows(self) -> list[_Window]:
        return [window for window in (self._before, self._running) if window is not None]

    def _load(self) -> Counter[Pair]:
        return sum((window.by_pair for window in self._windows()), Counter())

    # -- the view -----------------------------------------------------------------------------------------------------

    def snapshot(self, now_s: float) -> CellView:
        """All of it, as others see it."""
        self._window(now_s)
        load = self._load()
        return CellView(
            epoch=self._form.epoch if self._form else 0,
            tp=self._layout.num_shards,
            pp=self._layout.num_stages,
            dp=self._layout.num_replicas,
            num_experts=self._num_experts,
            primary_slots=self._slots.primary,
            standby_slots=self._slots.standby,
            window_s=now_s - self._windows()[0].start_s,
            stages=[self._stage_view(stage, load) for stage in range(len(self._stages))],
        )

    def _stage_view(self, stage: int, load: Counter[Pair]) -> StageView:
        layers, workers = self._stages[stage], [self._worker_view(seat) for seat in self._group(stage)]
        return StageView(
            stage=stage,
            first_layer=layers.start,
            end_layer=layers.stop,
            imbalance=max_over_mean([worker.tokens for worker in workers]),
            offered_imbalance=self._offer(stage, load).imbalance(load),
            workers=workers,
        )

    def _worker_view(self, seat: Seat) -> WorkerView:
        placement, rank = self._present[seat.stage], self._layout.group_rank(seat)
        name = self._names().get(seat, "")
        return WorkerView(
            name=name,
            replica=seat.replica,
            shard=seat.shard,
            node=(self._nodes or {}).get(seat, ""),
            resident_bytes=self._resident_bytes.get(name, 0),
            tokens=sum(window.by_name[name] for window in self._windows()),
            primary=placement.held(rank),
            standby=placement.standbys(rank),
        )
