"""A whole simulation: the capacity where it is needed, then rate after rate."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from serve_app.bench.serve.arrivals import Arrival, write_arrivals
from serve_app.bench.serve.settings import Rate
from serve_app.bench.serve.verdict import Capacity, Run, RunFigures, with_ratios
from serve_app.bench.simulate.figures import SimulatedOutage, SimulatedReport, judge, outages_of
from serve_app.bench.simulate.loads import Loads, to_load
from serve_app.bench.simulate.subject import Subject
from serve_app.engine.request import Terms
from serve_app.errors import PlanError
from serve_app.sim.serving.ledger import Load
from serve_app.sim.serving.losses import Loss
from serve_app.sim.serving.many import Simulation, serve
from serve_app.sim.serving.router import Clients
from serve_app.sim.serving.spans import Span

MOST_FLOOD, WAVES = 4_000, 6  # requests by which the capacity is found; so many times what runs at a time

Say = Callable[[str], None]
Tell = Callable[[str, int, int], None]  # the run, requests done with, of how many


@dataclass(frozen=True)
class Orders:
    """What is asked for beside the subject and its loads."""

    rates: Sequence[Rate]  # empty: as the trace has it
    clients: Clients
    losses: tuple[Loss, ...]
    capacity_per_s: float | None  # None: as planned, or it is found, where it is needed
    num_routers: int
    num_processes: int
    traced_cell: int | None
    record: Path | None  # where the requests of the run are written


@dataclass
class Rehearsal:
    """What was found so far."""

    subject: Subject
    loads: Loads
    orders: Orders
    capacity: Capacity | None = None
    figures: list[RunFigures] = field(default_factory=list)
    outages: list[SimulatedOutage] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)  # of the last run
    replayed: int = 0
    num_steps: int = 0
    num_requests: int = 0

    def run(self, say: Say, tell: Tell) -> None:
        """All of it. Raises PlanError where a load cannot be made."""
        given = self.orders.capacity_per_s or self.subject.planned_per_s
        if given:
            self.capacity = Capacity(given)
        elif any(rate.is_multiple for rate in self.orders.rates):
            say("finding the capacity of one cell")
            self.capacity = find_capacity(self.subject, self.loads)
        capacity_per_s = None if self.capacity is None else self.capacity.requests_per_s
        rates: list[Rate | None] = [*self.orders.rates] or [None]
        for rate in rates:
            run, arrivals = self.loads.plan(rate, capacity_per_s)
            if self.orders.record:
                write_arrivals(self.orders.record, arrivals)
            self._run(run, arrivals, tell)

    def _run(self, run: Run, arrivals: Sequence[Arrival], tell: Tell) -> None:
        load = to_load(arrivals)
        tell(run.rate, 0, len(load))
        served = serve(self._simulation, load, self.orders.num_processes, lambda num: tell(run.rate, num, len(load)))
        self.figures.append(judge(run, load, served.ledger, self.subject.objective_s))
        self.outages += outages_of(run.rate, served.ledger)
        self.spans = served.spans
        self.replayed += served.ledger.replayed
        self.num_steps += served.ledger.num_steps
        self.num_requests += len(load)

    @property
    def _simulation(self) -> Simulation:
        orders, subject = self.orders, self.subject
        return Simulation(
            subject.setup,
            subject.deployment.cells,
            replace(orders.clients, terms=subject.terms),
            orders.losses,
            self.loads.seed,
            orders.num_routers,
            orders.traced_cell,
        )

    def report(self, *, interrupted: bool) -> SimulatedReport:
        runs = with_ratios(self.figures, self.capacity)
        deployment = self.subject.deployment
        return SimulatedReport(
            attainment=min((run.attainment for run in runs if run.attainment is not None), default=None),
            goodput_ratio=runs[-1].goodput_ratio if runs else None,
            refused=sum(run.refused for run in runs),
            errors=sum(run.errors for run in runs),
            retry_admitted=min((run.retry_admitted for run in runs if run.retry_admitted is not None), default=None),
            interrupted=interrupted,
            url=f"simulated {deployment} on {self.subject.system}",
            ttft_s=self.subject.objective_s,
            seed=self.loads.seed,
            capacity=self.capacity,
            runs=runs,
            system=self.subject.system,
            deployment=str(deployment),
            num_gpus=deployment.num_gpus,
            routers=self._simulation.routers,
            replayed=self.replayed,
            outages=self.outages,
        )


def find_capacity(subject: Subject, loads: Loads) -> Capacity:
    """What the cells serve while there are always more who wait, and none is refused: first tokens a second.

    One cell is flooded; what is counted is between its being full and the last one's first token. Unlike the capacity
    of a real server, which is within the objective, it is the most there is.
    """
    setup, cells = subject.without_admission, subject.deployment.cells
    full = setup.engine.max_running * setup.layout.num_replicas
    num = max(2 * full, min(WAVES * full, MOST_FLOOD))
    flood = Load.of((0.0, prompt, output) for prompt, output in islice(loads.pairs, num))
    simulation = Simulation(setup, clients=Clients(terms=Terms(is_accepted=True)), seed=loads.seed)
    first_s = sorted(at_s for at_s in serve(simulation, flood).ledger.first_s if not math.isnan(at_s))
    if len(first_s) <= full or first_s[-1] <= first_s[full - 1]:
        raise PlanError("the capacity cannot be found: no request gets a token")
    per_s = (len(first_s) - full) / (first_s[-1] - first_s[full - 1]) * cells
    return Capacity(per_s, per_s * loads.osl.mean, full * cells)
