"""Many cells, on several processes: so many routers, each with cells and clients of its own.

Requests go to the routers in turn. What comes out depends on their number, not on that of the processes.
"""

import signal
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context

from serve_app.experts.layout import cut
from serve_app.sim.serving.cell import CellSetup
from serve_app.sim.serving.ledger import Ledger, Load
from serve_app.sim.serving.losses import Loss
from serve_app.sim.serving.router import Clients, Router
from serve_app.sim.serving.spans import Span, Spans

MOST_ROUTERS = 16
CELLS_OF_A_ROUTER = 4  # at least, where there are so many: fewer make the choice between two a poor one


@dataclass(frozen=True)
class Simulation:
    """Everything that a run follows from, beside its load."""

    setup: CellSetup
    num_cells: int = 1
    clients: Clients = field(default_factory=Clients)
    losses: tuple[Loss, ...] = ()
    seed: int = 0
    num_routers: int = 0  # 0: as many as make sense
    traced_cell: int | None = None
    most_spans: int = 100_000

    @property
    def routers(self) -> int:
        most = max(1, min(MOST_ROUTERS, self.num_cells // CELLS_OF_A_ROUTER))
        return min(self.num_routers, self.num_cells) or most


@dataclass
class Served:
    """What became of a load."""

    ledger: Ledger
    spans: list[Span] = field(default_factory=list)


def serve(
    simulation: Simulation, load: Load, num_processes: int = 1, tell: Callable[[int], None] = lambda _: None
) -> Served:
    """Run all of it. `tell`: how many requests are done with, now and then.

    Left early, it ends its processes once their present routers are done.
    """
    num = simulation.routers
    parts = [load.part(start, num) for start in range(num)]
    whole, num_done = Served(Ledger(len(load))), 0
    for number, served in _run_all(simulation, parts, num_processes):
        whole.ledger.merge(served.ledger, number, num)
        whole.spans += served.spans
        num_done += len(parts[number])
        tell(num_done)
    return whole


def _run_all(
    simulation: Simulation, parts: list[Load], num_processes: int
) -> Generator[tuple[int, Served], None, None]:
    if num_processes == 1 or len(parts) == 1:
        yield from ((number, run_router(simulation, number, part)) for number, part in enumerate(parts))
        return
    pool = ProcessPoolExecutor(min(num_processes, len(parts)), get_context("spawn"), _ignore_interrupts)
    try:
        numbers = {pool.submit(run_router, simulation, number, part): number for number, part in enumerate(parts)}
        for future in as_completed(numbers):
            yield numbers[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def run_router(simulation: Simulation, number: int, load: Load) -> Served:
    """The part of one router. `load`: its own requests."""
    cells = cut(simulation.num_cells, simulation.routers, number)
    spans = Spans(simulation.most_spans)
    traced = {} if simulation.traced_cell is None else {simulation.traced_cell: spans}
    router = Router(cells, simulation.setup, simulation.clients, simulation.seed, simulation.losses, traced)
    return Served(router.run(load), spans.spans)


def _ignore_interrupts() -> None:
    """Ctrl-C reaches all processes of a terminal; the first one ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
