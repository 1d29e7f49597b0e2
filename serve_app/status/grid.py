"""The grid: a column for each stage, a row for each (replica, shard), in it each worker's load and memory."""

from collections.abc import Sequence
from itertools import product

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from serve_app.runtime.snapshot import CellView, StageView, WorkerView
from serve_app.status.figures import layers, memory, short, times
from serve_app.status.heat import heat_bar, style_of

GAP = 2  # between two columns
LABEL_WIDTH = 7  # "busiest"
FIGURES_WIDTH = 11  # " 1.42x 1.2G"
MIN_BAR_WIDTH, MAX_BAR_WIDTH = 4, 20


class Grid:
    """As many stages side by side as the width has room for, the others below them."""

    def __init__(self, view: CellView) -> None:
        self._view = view

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        num_stages = len(self._view.stages)
        room = options.max_width - LABEL_WIDTH
        num_fitting = max(1, room // (GAP + MIN_BAR_WIDTH + FIGURES_WIDTH))
        num_blocks = -(-num_stages // num_fitting)
        num_beside = -(-num_stages // num_blocks)
        bar_width = max(1, min(room // num_beside - GAP - FIGURES_WIDTH, MAX_BAR_WIDTH))
        for first in range(0, num_stages, num_beside):
            if first:
                yield ""
            yield self._block(self._view.stages[first : first + num_beside], bar_width, options.ascii_only)

    def _block(self, stages: Sequence[StageView], bar_width: int, ascii_only: bool) -> Table:
        table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="bold")
        table.add_column(min_width=LABEL_WIDTH, no_wrap=True)
        for stage in stages:
            header = f"stage {stage.stage}\n{layers(stage.first_layer, stage.end_layer)}"
            table.add_column(header, width=bar_width + FIGURES_WIDTH, no_wrap=True)
        columns = [_column(stage, bar_width, ascii_only) for stage in stages]
        for seat in product(range(self._view.dp), range(self._view.tp)):
            cells = [column.get(seat) or _empty() for column in columns]
            table.add_row("r{} s{}".format(*seat), *cells)
        for name, cells in _summary(stages).items():
            table.add_row(Text(name, style="bold"), *cells)
        return table


def _column(stage: StageView, bar_width: int, ascii_only: bool) -> dict[tuple[int, int], Text]:
    """The cells of a stage by (replica, shard)."""
    mean = sum(worker.tokens for worker in stage.workers) / max(1, len(stage.workers))
    return {(worker.replica, worker.shard): _cell(worker, mean, bar_width, ascii_only) for worker in stage.workers}


def _cell(worker: WorkerView, mean: float, bar_width: int, ascii_only: bool) -> Text:
    if not worker.name:
        return _empty()
    ratio = worker.tokens / mean if mean else 0.0
    load = (f" {times(ratio):>5}", style_of(ratio)) if mean else ("  idle", "dim")
    bar = heat_bar(ratio, bar_width, ascii_only=ascii_only)
    return Text.assemble(bar, load, f" {memory(worker.resident_bytes):>4}")


def _empty() -> Text:
    return Text("empty seat", style="bold red")


def _summary(stages: Sequence[StageView]) -> dict[str, list[Text]]:
    """The rows under the workers: what the stage ran, its imbalance, and that of the offered placement."""
    sums = [sum(worker.tokens for worker in stage.workers) for stage in stages]
    return {
        "tokens": [Text(short(num_tokens)) for num_tokens in sums],
        "busiest": [_imbalance(stage.imbalance, any_load=sums[i] > 0) for i, stage in enumerate(stages)],
        "offered": [_imbalance(stage.offered_imbalance, any_load=sums[i] > 0) for i, stage in enumerate(stages)],
    }


def _imbalance(ratio: float, *, any_load: bool) -> Text:
    return Text(times(ratio), style_of(ratio)) if any_load else Text("-")
