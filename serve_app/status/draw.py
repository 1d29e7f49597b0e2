"""The picture of a cell: what holds for all of it, the grid of its workers, and who holds which experts."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from serve_app.ingress.client import EngineStatus
from serve_app.runtime.snapshot import CellView
from serve_app.status.figures import count, memory, plain
from serve_app.status.grid import GAP, LABEL_WIDTH, Grid
from serve_app.status.heat import FULL_RATIO
from serve_app.status.holders import holders


def draw(url: str, health: EngineStatus, view: CellView, *, experts: bool = False) -> RenderableType:
    """All of it. No markup is read: what the server says is shown as it stands."""
    below = holders(view) if experts else _legend(view)
    return Group(_readiness(url, health), _layout(view), _traffic(health), "", Grid(view), "", below)


def _readiness(url: str, health: EngineStatus) -> Text:
    word, style = ("ready", "green") if health.ready else ("not ready", "yellow")
    if not health.live:
        word, style = "unreachable", "red"
    reason = f": {plain(health.reason)}" if health.reason and not health.ready else ""
    return Text.assemble(f"{url} is ", (word, f"bold {style}"), reason)


def _layout(view: CellView) -> Text:
    workers = [worker for stage in view.stages for worker in stage.workers if worker.name]
    num_seats = view.tp * view.pp * view.dp
    is_full = len(workers) == num_seats
    nodes = {worker.node for worker in workers if worker.node}
    return Text(" | ").join(
        (
            Text(f"epoch {view.epoch}" if view.epoch else "no epoch yet"),
            Text(f"TP {view.tp} x PP {view.pp} x DP {view.dp}"),
            Text(f"{len(workers):,} of {count(num_seats, 'worker')}", "" if is_full else "bold red"),
            Text(count(len(nodes), "node")),
            Text(f"{memory(sum(worker.resident_bytes for worker in workers))} resident"),
        )
    )


def _traffic(health: EngineStatus) -> Text:
    stats = health.stats
    if stats is None:
        return Text("nothing is known of its requests", "dim")
    pages = f"KV {stats.kv_usage:.0%} of {count(stats.num_pages, 'page')}"
    return Text(f"{count(stats.running, 'request')} running, {stats.waiting:,} waiting | {pages}")


def _legend(view: CellView) -> Table:
    table = Table.grid(padding=(0, GAP, 0, 0))
    bars = f"tokens of the last {view.window_s:.0f} s over the stage's mean (full: {FULL_RATIO:g}x), then memory"
    for name, meaning in (
        ("bars", bars),
        ("busiest", "the largest of these ratios in the stage"),
        ("offered", "the same, had the placement offered for the next epoch been in force"),
        ("experts", "octavo status --experts lists who holds which"),
    ):
        table.add_row(Text(f"{name:{LABEL_WIDTH}}", "dim"), Text(meaning, "dim"))
    return table
