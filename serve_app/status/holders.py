"""Who holds which experts: a table for each stage, a row for each worker."""

from rich.console import Group
from rich.table import Table
from rich.text import Text

from serve_app.runtime.snapshot import CellView, StageView, WorkerView
from serve_app.status.figures import count, held, plain
from serve_app.status.grid import GAP

NODE_CHARS = 8  # of Ray's 56: enough to tell nodes apart


def holders(view: CellView) -> Group:
    """The primaries and the standbys of each worker, as layers and the experts held of them."""
    workers = [worker for stage in view.stages for worker in stage.workers]
    name_width = max((len(_who(worker)) for worker in workers), default=1)
    show_nodes = len({worker.node for worker in workers if worker.node}) > 1
    return Group(_legend(view), *(_table(stage, name_width, show_nodes) for stage in view.stages))


def _legend(view: CellView) -> Text:
    slots = f"{count(view.primary_slots, 'primary slot')} and {count(view.standby_slots, 'standby slot')} per worker"
    key = "L0-3:1,9 is experts 1 and 9 of each of the layers 0 to 3"
    return Text(f"{count(view.num_experts, 'expert')} per layer; {slots}\n{key}\n", "dim")


def _table(stage: StageView, name_width: int, show_nodes: bool) -> Table:
    table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="bold")
    table.add_column(f"stage {stage.stage}", min_width=name_width, no_wrap=True)
    if show_nodes:
        table.add_column("node", no_wrap=True)
    table.add_column("primary", overflow="fold")
    table.add_column("standby", overflow="fold")
    for worker in stage.workers:
        node = [plain(worker.node[:NODE_CHARS])] if show_nodes else []
        name = Text(_who(worker), "" if worker.name else "bold red")
        table.add_row(name, *map(Text, [*node, held(worker.primary) or "-", held(worker.standby) or "-"]))
    table.add_row()
    return table


def _who(worker: WorkerView) -> str:
    return plain(worker.name) or f"empty: r{worker.replica} s{worker.shard}"
