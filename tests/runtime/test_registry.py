"""What the router makes of what it is told: tables, windows of load, and when experts are worth moving."""

import msgspec
import pytest

from serve_app.engine.members import Formed
from serve_app.experts.layout import Layout, Seat
from serve_app.experts.placement import Slots
from serve_app.runtime.router import WINDOW_S, Registry
from serve_app.runtime.snapshot import CellView
from serve_app.runtime.wire import Report

LAYOUT = Layout(num_stages=2, num_replicas=2, num_shards=2)
STAGES = [range(2), range(2, 5)]
NUM_EXPERTS = 8
NODES = {seat: f"node{seat.replica}" for seat in LAYOUT.seats()}
EVEN = [(0, expert, 10) for expert in range(NUM_EXPERTS)]


def name_of(seat, generation=1):
    return f"w{seat.stage}.{seat.replica}.{seat.shard}#{generation}"


def form_of(registry, epoch=1, generation=1):
    seats = [(name_of(seat, generation), *seat) for seat in LAYOUT.seats()]
    return Formed(epoch, seats, registry.tables())


def report_of(seat, counts, generation=1, epoch=1, resident_bytes=7):
    return Report(epoch, name_of(seat, generation), resident_bytes, counts)


@pytest.fixture
def registry():
    registry = Registry(LAYOUT, STAGES, NUM_EXPERTS, Slots(8, 2))
    registry.record(form_of(registry))
    return registry


def workers_of(registry, now_s=0.0):
    """What is seen of each seat's worker."""
    for stage in registry.snapshot(now_s).stages:
        for worker in stage.workers:
            yield Seat(stage.stage, worker.replica, worker.shard), worker


def run(registry, counts, now_s=0.0):
    """Each pair's tokens are run, and reported, by its primary."""
    for seat, worker in workers_of(registry, now_s):
        ran = [(layer, expert, num) for layer, expert, num in counts if (layer, expert) in worker.primary]
        registry.add(report_of(seat, ran), now_s)


def skewed_for(registry):
    """All tokens of the first stage for what one worker is the primary of."""
    return [(*pair, 1000) for pair in dict(workers_of(registry))[Seat(0, 0, 0)].primary]


# -- placement ------------------------------------------------------------------------------------------------------


def test_a_seat_holds_what_the_tables_say(registry):
    registry.settle(NODES)
    held = registry.pairs()
    assert set(held) == set(LAYOUT.seats())
    for stage, table in enumerate(registry.tables()):
        for layer, ranks_by_expert in zip(STAGES[stage], table, strict=True):
            for expert, ranks in enumerate(ranks_by_expert):
                hosts = {
                    LAYOUT.group_rank(seat) for seat in held if seat.stage == stage and (layer, expert) in held[seat]
                }
                assert hosts == set(ranks)
    assert all(len(pairs) == len(set(pairs)) for pairs in held.values())


def test_tables_are_there_before_anything_is_known():
    registry = Registry(LAYOUT, STAGES, NUM_EXPERTS, None)
    assert [[len(layer) for layer in stage] for stage in registry.tables()] == [[8, 8], [8, 8, 8]]
    assert all(len(ranks) == 1 for stage in registry.tables() for layer in stage for ranks in layer)
    assert sum(len(pairs) for pairs in registry.pairs().values()) == 5 * NUM_EXPERTS


def test_slots_too_few_for_the_largest_stage_are_refused():
    with pytest.raises(ValueError, match="3 layers x 8 experts need 6 primary slots on each of 4 workers, there are 5"):
        Registry(LAYOUT, STAGES, NUM_EXPERTS, Slots(5, 0))


def test_the_first_placement_knows_the_nodes(registry):
    registry.settle(NODES)
    for table in registry.tables():
        for ranks in (ranks for layer in table for ranks in layer if len(ranks) > 1):
            assert {rank // LAYOUT.num_shards for rank in ranks} == {0, 1}  # ranks of a replica are on one node here


def test_an_even_load_moves_no_expert(registry):
    registry.settle(NODES)
    before = registry.tables()
    run(registry, [(layer, expert, 10 + expert % 2) for layer in range(5) for expert in range(NUM_EXPERTS)])
    registry.settle(NODES)
    assert registry.tables() == before


def test_workers_on_other_nodes_alone_move_no_expert(registry):
    registry.settle(NODES)
    before = registry.tables()
    registry.settle(dict.fromkeys(NODES, "node0"))
    assert registry.tables() == before


def test_a_skewed_load_moves_the_experts_of_its_stage_once(registry):
    registry.settle(NODES)
    before = registry.tables()
    run(registry, skewed_for(registry))
    view = registry.snapshot(1.0).stages[0]
    assert view.imbalance == 4.0
    assert view.offered_imbalance < 1.5
    registry.settle(NODES)
    after = registry.tables()
    assert after[0] != before[0]
    assert after[1] == before[1]
    registry.settle(NODES)
    assert registry.tables() == after


def test_an_offer_that_is_only_a_little_better_moves_no_expert(registry):
    registry.settle(NODES)
    before = registry.tables()
    counts = [(layer, e, 100) for layer in range(2) for e in range(NUM_EXPERTS)]
    run(registry, counts + [(layer, e, 10) for layer, e, _ in skewed_for(registry)])
    view = registry.snapshot(1.0).stages[0]
    assert 1 <= view.offered_imbalance < view.imbalance < 1.1, "there was nothing better to refuse"
    registry.settle(NODES)
    assert registry.tables() == before


# -- load -----------------------------------------------------------------------------------------------------------


def test_imbalance_is_of_tokens_that_were_run_not_of_the_table(registry):
    """Whoever ran them: a standby's tokens are the standby's."""
    for rank, seat in enumerate([Seat(0, 0, 0), Seat(0, 0, 1), Seat(0, 1, 0), Seat(0, 1, 1)]):
        registry.add(report_of(seat, [(0, 0, 100 if rank else 300)]), 0.0)
    stage = registry.snapshot(0.0).stages[0]
    assert [worker.tokens for worker in stage.workers] == [300, 100, 100, 100]
    assert stage.imbalance == 2.0


def tokens(registry, now_s):
    return sum(worker.tokens for _, worker in workers_of(registry, now_s))


def test_tokens_are_seen_for_one_whole_window_and_then_forgotten(registry):
    run(registry, EVEN, now_s=100.0)
    run(registry, EVEN, now_s=100.0 + WINDOW_S - 0.1)
    assert tokens(registry, 100.0 + WINDOW_S - 0.1) == 160
    assert tokens(registry, 100.0 + 2 * WINDOW_S - 0.1) == 160
    run(registry, EVEN, now_s=100.0 + 2 * WINDOW_S - 0.1)
    assert tokens(registry, 100.0 + 2 * WINDOW_S) == 80
    assert tokens(registry, 100.0 + 3 * WINDOW_S) == 0


def test_a_pause_leaves_nothing_to_see(registry):
    run(registry, EVEN, now_s=0.0)
    assert tokens(registry, 7 * WINDOW_S + 1) == 0
    run(registry, EVEN, now_s=7 * WINDOW_S + 1)
    assert tokens(registry, 7 * WINDOW_S + 1) == 80


@pytest.mark.parametrize("after_s", [0.0, 3.0, WINDOW_S - 1, WINDOW_S + 1, 2.5 * WINDOW_S, 9 * WINDOW_S + 2])
def test_the_view_says_how_long_it_counted(registry, after_s):
    """An even stream of tokens has the same rate at any time."""
    for second in range(int(after_s)):
        run(registry, EVEN, now_s=50.0 + second)
    view = registry.snapshot(50.0 + after_s)
    assert view.window_s <= min(after_s, 2 * WINDOW_S)
    num_seconds = sum(second >= after_s - view.window_s for second in range(int(after_s)))
    assert tokens(registry, 50.0 + after_s) == 80 * num_seconds


def test_workers_that_are_not_in_the_form_are_not_heard(registry):
    registry.settle(NODES)
    before = registry.tables()
    registry.add(report_of(Seat(0, 0, 0), skewed_for(registry), generation=9), 0.0)
    assert tokens(registry, 0.0) == 0
    registry.settle(NODES)
    assert registry.tables() == before
    unformed = Registry(LAYOUT, STAGES, NUM_EXPERTS, None)
    unformed.add(report_of(Seat(0, 0, 0), EVEN), 0.0)
    assert tokens(unformed, 0.0) == 0


def test_experts_that_there_are_not_are_not_counted(registry):
    registry.add(report_of(Seat(0, 0, 0), [(5, 0, 1), (-1, 0, 1), (0, 8, 1), (0, -1, 1), (0, 0, -1), (0, 0, 3)]), 0.0)
    assert tokens(registry, 0.0) == 3


def test_a_worker_that_left_is_forgotten_but_its_experts_load_is_not(registry):
    registry.settle(NODES)
    before = registry.tables()
    run(registry, skewed_for(registry))
    registry.record(form_of(registry, epoch=2, generation=2))
    assert tokens(registry, 0.0) == 0
    registry.record(form_of(registry, epoch=3, generation=1))
    assert tokens(registry, 0.0) == 0
    assert {worker.resident_bytes for _, worker in workers_of(registry)} == {0}
    registry.settle(NODES)
    assert registry.tables() != before


def test_an_older_form_changes_nothing(registry):
    registry.record(form_of(registry, epoch=3, generation=3))
    registry.record(form_of(registry, epoch=2, generation=2))
    view = registry.snapshot(0.0)
    assert view.epoch == 3
    assert view.stages[0].workers[0].name == "w0.0.0#3"


# -- the view -------------------------------------------------------------------------------------------------------


def test_the_view_is_whole_before_the_first_epoch():
    view = Registry(LAYOUT, STAGES, NUM_EXPERTS, None).snapshot(5.0)
    assert (view.epoch, view.window_s, view.primary_slots, view.standby_slots) == (0, 0.0, 6, 0)
    for stage in view.stages:
        assert (stage.imbalance, stage.offered_imbalance) == (1.0, 1.0)
        assert {(worker.name, worker.node, worker.resident_bytes) for worker in stage.workers} == {("", "", 0)}


def test_the_view_shows_who_sits_where_and_holds_what(registry):
    registry.settle(NODES)
    registry.record(form_of(registry))
    registry.add(report_of(Seat(1, 1, 0), [(2, 0, 5)], resident_bytes=123), 0.0)
    view = registry.snapshot(0.0)
    assert (view.epoch, view.tp, view.pp, view.dp) == (1, 2, 2, 2)
    assert (view.num_experts, view.primary_slots, view.standby_slots) == (8, 8, 2)
    assert [(stage.stage, stage.first_layer, stage.end_layer) for stage in view.stages] == [(0, 0, 2), (1, 2, 5)]
    for stage in view.stages:
        for rank, worker in enumerate(stage.workers):
            seat = Seat(stage.stage, worker.replica, worker.shard)
            assert LAYOUT.group_rank(seat) == rank
            assert (worker.name, worker.node) == (name_of(seat), NODES[seat])
            assert worker.primary + worker.standby == registry.pairs()[seat]
            assert len(worker.standby) == 2
    worker = view.stages[1].workers[2]
    assert (worker.resident_bytes, worker.tokens) == (123, 5)


def test_the_view_survives_being_sent(registry):
    registry.settle(NODES)
    view = registry.snapshot(1.0)
    assert msgspec.json.decode(msgspec.json.encode(view), type=CellView) == view
