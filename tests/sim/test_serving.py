"""Serving in virtual time: nothing is lost, nothing overlaps, and what comes out is what the costs say."""

import itertools
import math
import random
from collections import defaultdict

import pytest

from serve_app.engine.bounds import EngineConfig
from serve_app.engine.pace import work_of as pace_work
from serve_app.engine.plan import Slice
from serve_app.engine.request import Request, SamplingParams
from serve_app.engine.sequence import Sequence
from serve_app.engine.slo import SloConfig
from serve_app.experts.layout import Layout
from serve_app.sim.serving.cell import Cell, CellSetup
from serve_app.sim.serving.costs import PacedCosts, StepWork, rehearse, work_of
from serve_app.sim.serving.ledger import Gaps, Load, Outcome
from serve_app.sim.serving.losses import Loss, Phases
from serve_app.sim.serving.many import Simulation, serve
from serve_app.sim.serving.router import Clients
from tests.engine.virtual import HIDDEN

TTFT_S = 10.0
TWO_BY_TWO = Layout(2, 2)
PHASES = Phases(notice_s=0.25, form_s=0.5, load_s=0.75, refill_s=20.0)


def setup_of(layout=TWO_BY_TWO, ttft_s=TTFT_S, num_pages=2_000, num_cores=0, **bounds):
    engine = EngineConfig(
        **{
            "num_stages": layout.num_stages,
            "max_context_tokens": 4_096,
            "max_running": 32,
            "max_step_tokens": 512,
            "prefix_cache": False,
            "slo": SloConfig() if ttft_s is None else SloConfig(ttft_s=ttft_s, target_s=0.85 * ttft_s),
            **bounds,
        }
    )
    costs = PacedCosts(HIDDEN, layout.num_stages, layout.num_replicas, num_cores)
    return CellSetup(engine, layout, num_pages, costs, tuple(rehearse(costs, layout.num_replicas, 512, 16)))


def load_of(num, rate, seed=1, prompt=(16, 2_000), answer=(4, 64)):
    draw, at_s, asks = random.Random(seed), 0.0, []
    for _ in range(num):
        at_s += draw.expovariate(rate)
        tokens = int(math.exp(draw.uniform(*map(math.log, prompt))))
        asks.append((at_s, tokens, draw.randint(*answer)))
    return Load.of(asks)


def ttfts(ledger):
    return [
        first_s - asked_s
        for first_s, asked_s, outcome in zip(ledger.first_s, ledger.asked_s, ledger.outcome, strict=True)
        if outcome == Outcome.ENDED
    ]


def columns(ledger):
    return [list(getattr(ledger, name)) for name in ("asked_s", "last_s", "num_tokens", "num_tries", "outcome")]


def ends_well(ledger, load):
    """Every request is refused, or answered with as many tokens as were asked for."""
    for number, outcome in enumerate(ledger.outcome):
        if outcome == Outcome.ENDED:
            assert ledger.num_tokens[number] == load.output_tokens[number]
            assert ledger.asked_s[number] < ledger.first_s[number] <= ledger.last_s[number]
        else:
            assert (outcome, ledger.num_tokens[number]) == (Outcome.REFUSED, 0)
    return True


def flood_rate(setup, seed=9):
    """Requests a second that one cell serves where there are always more."""
    load = load_of(300, 1e3, seed)
    ledger = serve(Simulation(setup), load).ledger
    assert ends_well(ledger, load)
    return len(load) / max(ledger.first_s)


# -- the same again, nothing lost -------------------------------------------------------------------------------------


def test_the_same_seed_is_the_same_run_on_any_number_of_processes():
    load = load_of(64, 8.0, answer=(2, 12))
    losses = (Loss(3.0, 1, 2, PHASES), Loss(4.0, 6, 0, PHASES))
    runs = [
        serve(Simulation(setup_of(), 8, losses=losses, seed=seed), load, num_processes=num).ledger
        for seed, num in ((5, 1), (5, 2), (6, 1))
    ]
    one, again, other = map(columns, runs)
    assert repr(one) == repr(again)
    assert repr(one) != repr(other), "the seed decides which cells are asked"
    assert runs[0].gaps.counts == runs[1].gaps.counts
    assert runs[0].outages == runs[1].outages


@pytest.mark.parametrize("retries", [0, 3])
@pytest.mark.parametrize("num_pages", [140, 2_000], ids=["few pages", "many pages"])
@pytest.mark.parametrize("num_cores", [0, 2])
def test_every_request_ends_with_its_tokens_or_is_refused(retries, num_pages, num_cores):
    setup = setup_of(num_pages=num_pages, num_cores=num_cores, ttft_s=2.5)
    load = load_of(80, 12.0, answer=(2, 24))
    simulation = Simulation(setup, 2, Clients(retries), (Loss(2.0, 0, 1, PHASES), Loss(2.3, 1, 3, PHASES)), seed=2)
    ledger = serve(simulation, load).ledger
    assert ends_well(ledger, load)
    assert ledger.reasons, "else the load was no test"
    num_answered = ledger.outcome.count(Outcome.ENDED)
    assert ledger.reasons.total() == ledger.refused.total() == sum(ledger.num_tries) - num_answered
    assert ledger.sent.total() == sum(ledger.num_tries)
    assert 1 <= max(ledger.num_tries) <= 1 + retries


def test_who_comes_back_as_told_is_let_in():
    load = load_of(200, 15.0, answer=(4, 24))
    ledger = serve(Simulation(setup_of(), clients=Clients(3)), load).ledger
    came_back = [i for i, num in enumerate(ledger.num_tries) if num > 1]
    at_once = sum(ledger.num_tries[i] == 2 and ledger.outcome[i] == Outcome.ENDED for i in came_back)
    assert len(came_back) > 20
    assert at_once >= 0.9 * len(came_back)


def test_who_hangs_up_has_no_token_and_leaves_nothing_behind():
    load = load_of(100, 50.0)
    ledger = serve(Simulation(setup_of(ttft_s=None), clients=Clients(hang_up_s=3.0)), load).ledger
    gone = [i for i, outcome in enumerate(ledger.outcome) if outcome == Outcome.GAVE_UP]
    assert 10 < len(gone) < 90
    for i in gone:
        assert ledger.ended_s[i] - ledger.asked_s[i] == pytest.approx(3.0)
        assert not ledger.num_tokens[i]
    assert max(ttfts(ledger)) <= 3.0


# -- what the costs say -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_stages", [1, 2, 4])
@pytest.mark.parametrize("num_tokens", [40, 500, 2_000])
def test_an_idle_cell_takes_what_its_costs_say(num_stages, num_tokens):
    """Chunks follow each other through the stages: those before the last at its pace, that one through all stages."""
    setup = setup_of(Layout(num_stages, 1))
    ledger = serve(Simulation(setup), Load.of([(0.0, num_tokens, 5)])).ledger
    chunk = min(512, num_tokens if num_stages == 1 else max(128, -(-num_tokens // num_stages)))
    spans = [range(start, min(num_tokens, start + chunk)) for start in range(0, num_tokens, chunk)]
    works = [
        StepWork(len(span), len(span) * (span.start + len(span) / 2), span.stop, sampled=int(span.stop == num_tokens))
        for span in spans
    ]
    seconds = [setup.costs.stage_s(0, work, 1) for work in works]
    at_pace = sum(seconds[:-1]) + num_stages * seconds[-1]
    assert ledger.first_s[0] == pytest.approx(at_pace, abs=max(seconds) * num_stages)
    row_s = setup.costs.stage_s(0, StepWork(decode_rows=1, decode_kv=num_tokens + 2, sampled=1), 1)
    assert (ledger.last_s[0] - ledger.first_s[0]) / 4 == pytest.approx(num_stages * row_s, rel=0.02)


def test_workers_of_one_machine_slow_each_other_down_and_no_others():
    """Two replicas with one core for each of four workers, or two for all: alone a pipeline is no slower."""
    load = Load.of([(0.0, 400, 60), (0.0, 401, 60)])
    own, shared = (serve(Simulation(setup_of(num_cores=num, ttft_s=None)), load).ledger for num in (4, 2))
    assert max(shared.ended_s) == pytest.approx(max(own.ended_s) / 2, rel=0.05), "the pace is that of all at work"
    lone = Load.of([(0.0, 100, 60)])
    own, shared = (serve(Simulation(setup_of(num_cores=num, ttft_s=None)), lone).ledger for num in (4, 1))
    assert shared.ended_s[0] == pytest.approx(own.ended_s[0] / 4, rel=0.01), "one of four at work, on a quarter of it"


@pytest.mark.parametrize("num_cores", [0, 2])
def test_a_stage_never_has_two_steps_and_no_step_two_stages(num_cores):
    layout = Layout(3, 2)
    load = load_of(40, 8.0)
    simulation = Simulation(
        setup_of(layout, num_cores=num_cores), losses=(Loss(2.0, 0, 4, PHASES),), traced_cell=0, most_spans=10**6
    )
    served = serve(simulation, load)
    rows = defaultdict(list)
    for span in served.spans:
        rows[span.row].append((span.begin_s, span.end_s))
    assert len(rows) == 1 + layout.num_stages * layout.num_replicas, "a row for each worker, one for the cell"
    assert len(served.spans) > 3 * served.ledger.num_steps * 0.9
    for spans in rows.values():
        for (_, end_s), (begin_s, _) in itertools.pairwise(sorted(spans)):
            assert end_s <= begin_s + 1e-9
    pauses = rows.pop("cell 0")
    assert len(pauses) == 2
    for begin_s, end_s in pauses:
        assert not any(a < end_s - 1e-9 and begin_s < b - 1e-9 for spans in rows.values() for a, b in spans)


@pytest.mark.parametrize("num_cores", [0, 1, 3])
def test_it_is_the_same_however_a_cell_is_moved_along(num_cores):
    def tokens(step_s):
        heard = []
        cell = Cell(0, setup_of(num_cores=num_cores), lambda emission, now_s: heard.append((emission.rid, now_s)))
        for i in range(3):
            cell.submit(Request(str(i), [i, *[5] * 300], SamplingParams(max_new_tokens=9 + 4 * i, ignore_eos=True)))
        for step in range(400):
            cell.advance(step * step_s)
        cell.advance()
        return [rid for rid, _ in heard], [now_s for _, now_s in heard]

    (names, at_once), (others, in_steps) = tokens(1e-9), tokens(0.01)
    assert names == others
    assert in_steps == pytest.approx(at_once)


# -- the promise ------------------------------------------------------------------------------------------------------


def test_at_thrice_the_capacity_who_is_let_in_is_in_time_and_without_admission_nobody_is():
    rate = flood_rate(setup_of(ttft_s=None))
    load = load_of(500, 3 * rate)
    ledger = serve(Simulation(setup_of()), load).ledger
    assert ends_well(ledger, load)
    waits = ttfts(ledger)
    assert len(waits) > 100
    assert sum(wait_s <= TTFT_S for wait_s in waits) >= 0.99 * len(waits)
    worst = []
    for num in (100, 200, 400):
        load = load_of(num, 3 * rate)
        ledger = serve(Simulation(setup_of(ttft_s=None)), load).ledger
        assert ends_well(ledger, load)
        assert not ledger.reasons
        worst.append(max(ttfts(ledger)))
    assert worst[1] > 1.5 * worst[0] and worst[2] > 1.5 * worst[1], f"it grows with the number of requests: {worst}"


def test_of_two_cells_the_one_with_fewer_requests_is_asked():
    """With a router that took one at random the busiest of eight would have far more than the mean."""
    load = Load.of((0.0, 100, 50) for _ in range(160))
    simulation = Simulation(setup_of(ttft_s=None), 8, num_routers=1)
    ended = serve(simulation, load).ledger.ended_s
    one_cell = serve(Simulation(setup_of(ttft_s=None)), load.part(0, 8)).ledger.ended_s
    assert max(ended) <= 1.25 * max(one_cell)


# -- losses -----------------------------------------------------------------------------------------------------------


def killed(at_s, *workers, layout=TWO_BY_TWO, phases=PHASES, load=None, ttft_s=None):
    load = load or load_of(40, 4.0)
    losses = tuple(Loss(at_s + 0.01 * i, 0, worker, phases) for i, worker in enumerate(workers))
    simulation = Simulation(setup_of(layout, ttft_s=ttft_s), losses=losses, traced_cell=0)
    served = serve(simulation, load)
    assert ends_well(served.ledger, load)
    return served


@pytest.mark.parametrize("worker", range(4))
def test_a_killed_worker_changes_no_token_and_pauses_its_cell_as_long_as_told(worker):
    load = load_of(40, 4.0)
    served, calm = killed(4.0, worker, load=load), killed(4.0, load=load)
    assert served.ledger.num_tokens == calm.ledger.num_tokens == load.output_tokens
    (outage,) = served.ledger.outages
    assert outage.replica == Layout(2, 2).seats()[worker].replica
    assert outage.began_s - outage.died_s == pytest.approx(PHASES.pause_s)
    assert outage.whole_s - outage.died_s == pytest.approx(0.25 + 20.0 + 0.5)
    assert outage.began_s < outage.token_s < outage.began_s + 2.0
    assert not any(4.0 < span.end_s < 4.0 + PHASES.pause_s for span in served.spans if span.row != "cell 0")
    assert served.ledger.replayed > 0
    assert max(served.ledger.ended_s) > max(calm.ledger.ended_s)
    resting = [s for s in served.spans if f"replica {outage.replica} " in s.row and 5.5 < s.end_s < outage.whole_s]
    assert not resting, "its replica rests until its seat is filled"


def test_a_second_death_in_the_pause_lengthens_it_and_a_cell_without_a_replica_waits_for_a_seat():
    served = killed(4.0, 0, 1)  # of both replicas
    began = {outage.began_s for outage in served.ledger.outages}
    assert len(began) == 1
    assert began.pop() == pytest.approx(4.01 + 0.25 + 20.0 + 0.5), "the second seat is filled while the first forms"
    assert served.ledger.replayed > 0, "no replica has what it had, though none rested in an epoch"
    alone = killed(4.0, 1, layout=Layout(2, 1))
    (outage,) = alone.ledger.outages
    assert outage.began_s == outage.whole_s == pytest.approx(4.0 + 0.25 + 20.0 + 0.5)


def test_a_death_while_another_seat_is_being_filled_takes_its_whole_pause():
    phases = Phases(notice_s=0.25, form_s=0.5, load_s=0.75, refill_s=5.0)
    load = load_of(40, 4.0)
    losses = (Loss(4.0, 0, 0, phases), Loss(9.2, 0, 1, phases))  # the first seat is filled at 9.25 s
    ledger = serve(Simulation(setup_of(ttft_s=None), losses=losses), load).ledger
    assert ends_well(ledger, load)
    first, second = ledger.outages
    assert first.whole_s == second.began_s == pytest.approx(9.2 + phases.pause_s)


def test_who_comes_in_a_pause_is_computed_after_it():
    (outage,) = (served := killed(4.0, 1, load=Load.of([(4.5, 100, 3)]))).ledger.outages
    assert 4.5 < outage.began_s <= min(span.begin_s for span in served.spans if span.row != "cell 0")


def test_a_worker_of_an_idle_cell_may_die_unnoticed():
    served = killed(1e6, 2, load=Load.of([(0.0, 10, 2)]))
    (outage,) = served.ledger.outages
    assert math.isnan(outage.token_s)
    assert outage.whole_s > outage.began_s > 1e6


# -- parts ------------------------------------------------------------------------------------------------------------


def test_times_between_tokens_are_counted_within_a_hundredth():
    draw, gaps = random.Random(3), Gaps()
    values = sorted(draw.lognormvariate(-3, 2) for _ in range(2_000))
    for value in values:
        gaps.add(value)
    for share in (0.01, 0.5, 0.9, 0.99, 1.0):
        exact = values[max(0, math.ceil(share * len(values)) - 1)]
        assert gaps.quantile(share) == pytest.approx(exact, rel=0.0051)
    assert Gaps().quantile(0.5) is None


def test_the_work_of_a_step_is_that_of_its_slices():
    sample = Sequence(Request("r", [1]), 0, (), 99).sample()
    slices = [Slice(0, [5] * 100, [], None), Slice(100, [5] * 50, [], sample), Slice(700, [5], [], sample)]
    work = work_of(slices)
    assert work == StepWork(150, 100 * 50 + 50 * 125, 100 + 150, 1, 701, 2)
    seen, told = pace_work(slices), work.pace_work
    assert (told.prompt_tokens, told.decode_rows) == (seen.prompt_tokens, seen.decode_rows)
    assert told.attended_kpairs == pytest.approx(seen.attended_kpairs, rel=0.01)
