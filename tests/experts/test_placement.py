from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.experts.placement import Slots, place, primaries_per_worker

stages = st.builds(lambda start, num: range(start, start + num), st.integers(0, 40), st.integers(1, 6))


@st.composite
def stages_to_place(draw):
    """Arguments of `place`: any sizes, room, load and nodes; the load lacks some pairs."""
    layers, num_experts, num_workers = draw(stages), draw(st.integers(1, 20)), draw(st.integers(1, 9))
    needed = primaries_per_worker(len(layers), num_experts, num_workers)
    pairs = st.tuples(st.sampled_from(layers), st.integers(0, num_experts - 1))
    tokens = st.integers(0, 5) | st.integers(0, 10**6)
    return {
        "layers": layers,
        "num_experts": num_experts,
        "num_workers": num_workers,
        "slots": Slots(needed + draw(st.integers(0, 2)), draw(st.integers(0, 6))),
        "load": draw(st.none() | st.dictionaries(pairs, tokens, max_size=60)),
        "nodes": draw(
            st.none() | st.lists(st.sampled_from(["a", "b", "c", None]), min_size=9).map(lambda n: n[:num_workers])
        ),
    }


def of_any_stage(test):
    return settings(deadline=None)(given(stages_to_place())(test))


def spread(ranks, num_workers):
    counts = Counter(ranks)
    return max(counts[rank] for rank in range(num_workers)) - min(counts[rank] for rank in range(num_workers))


def homes(placement):
    return {(layer, e): ranks for layer in placement.layers for e, ranks in enumerate(placement.table(layer))}


def primaries(placement, layer):
    return [ranks[0] for ranks in placement.table(layer)]


# -- primaries ------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(stages, st.integers(1, 80), st.integers(1, 12))
def test_without_load_the_experts_are_dealt_out_in_turn(layers, num_experts, num_workers):
    placement = place(layers, num_experts, num_workers)
    dealt = [ranks for layer in layers for ranks in placement.table(layer)]
    assert dealt == [(i % num_workers,) for i in range(len(layers) * num_experts)]


@of_any_stage
def test_each_expert_has_one_primary_and_their_numbers_are_even(stage):
    placement, num_workers = place(**stage), stage["num_workers"]
    for layer in stage["layers"]:
        assert len(placement.table(layer)) == stage["num_experts"]
        assert set(primaries(placement, layer)) <= set(range(num_workers))
        assert spread(primaries(placement, layer), num_workers) <= 1
    assert spread([rank for layer in stage["layers"] for rank in primaries(placement, layer)], num_workers) <= 1
    held = [pair for rank in range(num_workers) for pair in placement.held(rank)]
    assert sorted(held) == sorted(homes(placement))


def test_what_does_not_divide_falls_on_another_worker_in_the_next_layer():
    placement = place(range(3), 4, 3)
    assert [Counter(primaries(placement, layer)).most_common(1)[0][0] for layer in range(3)] == [0, 1, 2]


def test_the_heaviest_experts_of_a_layer_are_on_different_workers():
    """Dealt out in turn, each worker would hold two experts of the same weight."""
    load = {(layer, expert): 100 if expert % 4 == 0 else 1 for layer in range(3) for expert in range(8)}
    placement = place(range(3), 8, 4, load=load)
    for layer in range(3):
        assert primaries(placement, layer)[0] != primaries(placement, layer)[4]
    assert place(range(3), 8, 4).imbalance(load) == 200 / 51.5


def test_the_lightest_experts_even_out_what_the_heavier_ones_left():
    load = {(0, expert): tokens for expert, tokens in enumerate((1, 10, 9, 2))}
    assert place(range(1), 4, 2, load=load).loads(load) == [11, 11]


def test_what_is_uneven_in_one_layer_is_made_up_for_in_the_next():
    load = {(layer, expert): tokens for layer in range(2) for expert, tokens in enumerate((90, 10))}
    assert place(range(2), 2, 2).loads(load) == [180, 20]
    assert place(range(2), 2, 2, load=load).loads(load) == [100, 100]


# -- slots ----------------------------------------------------------------------------------------------------------


@of_any_stage
def test_no_worker_is_over_its_slots_and_no_standby_slot_is_left_empty(stage):
    placement = place(**stage)
    num_pairs = len(homes(placement))
    for rank in range(stage["num_workers"]):
        assert len(placement.held(rank)) <= stage["slots"].primary
        room = min(stage["slots"].standby, num_pairs - len(placement.held(rank)))
        assert len(placement.standbys(rank)) == room


@of_any_stage
def test_two_copies_are_never_on_one_worker(stage):
    for ranks in homes(place(**stage)).values():
        assert len(set(ranks)) == len(ranks)


@of_any_stage
def test_two_copies_are_on_one_node_only_where_no_other_node_had_a_slot(stage):
    placement = place(**stage)
    nodes = [node or rank for rank, node in enumerate(stage["nodes"] or [None] * stage["num_workers"])]
    for ranks in homes(placement).values():
        taken = {nodes[rank] for rank in ranks}
        if len(taken) < len(ranks):
            elsewhere = [rank for rank in range(stage["num_workers"]) if nodes[rank] not in taken]
            assert all(len(placement.standbys(rank)) == stage["slots"].standby for rank in elsewhere)


def test_standbys_are_on_the_other_of_two_nodes():
    nodes = ["a"] * 4 + ["b"] * 4
    placement = place(range(4), 16, 8, Slots(8, 8), nodes=nodes)
    assert all(nodes[primary] != nodes[standby] for primary, standby in homes(placement).values())


def test_without_load_a_loss_of_any_worker_hurts_equally_little():
    placement = place(range(4), 16, 8, Slots(8, 2))
    covered = [pair for rank in range(8) for pair in placement.standbys(rank)]
    assert len(set(covered)) == 16
    assert Counter(homes(placement)[pair][0] for pair in covered) == dict.fromkeys(range(8), 2)
    assert Counter(layer for layer, _ in covered) == dict.fromkeys(range(4), 4)


def test_the_hottest_experts_get_the_standbys():
    hot = {(0, 3), (1, 5), (2, 0), (3, 15)}
    load = {(layer, e): 1000 if (layer, e) in hot else 10 for layer in range(4) for e in range(16)}
    placement = place(range(4), 16, 8, Slots(8, 1), load)
    assert {pair for rank in range(8) for pair in placement.standbys(rank)} == hot
    assert all(len(homes(placement)[pair]) == 3 for pair in hot)


def test_whom_a_standby_relieves_has_room_for_another():
    """The first expert's worker, relieved of half, is the least loaded one when the second's turn comes."""
    load = {(0, expert): tokens for expert, tokens in enumerate((100, 60, 55, 10))}
    first, second, *_ = place(range(1), 4, 4, Slots(1, 1), load).table(0)
    assert first[0] == second[1]


@pytest.mark.parametrize("num_experts", [16, 32])
def test_the_reference_stage_fills_its_slots_exactly(num_experts):
    load = {
        (layer, e): 1000 // (1 + (e * 7 + layer * 3) % num_experts) for layer in range(4) for e in range(num_experts)
    }
    slots = Slots(num_experts // 2, 2)
    for known in (None, load):
        placement = place(range(4), num_experts, 8, slots, known, ["a"] * 4 + ["b"] * 4)
        assert [len(placement.held(rank)) for rank in range(8)] == [num_experts // 2] * 8
        assert [len(placement.standbys(rank)) for rank in range(8)] == [2] * 8
    assert placement.imbalance(load) < 1.2 < place(range(4), num_experts, 8, slots).imbalance(load)


# -- load -----------------------------------------------------------------------------------------------------------


@of_any_stage
def test_to_know_the_load_never_makes_it_less_even(stage):
    load = stage["load"] or {}
    assert place(**stage).imbalance(load) <= place(**stage | {"load": None}).imbalance(load)


def test_a_greedy_choice_that_turns_out_worse_than_none_is_not_taken():
    """Heaviest first, 9 + 6 + 5 meet 8 + 7 + 1."""
    load = {(0, expert): tokens for expert, tokens in enumerate((5, 1, 6, 8, 7, 9))}
    assert place(range(1), 6, 2, load=load).loads(load) == [18, 18]


@of_any_stage
def test_no_tokens_are_lost_between_the_copies(stage):
    load = stage["load"] or {}
    placement = place(**stage)
    assert sum(placement.loads(load)) == pytest.approx(sum(load.values()))
    assert placement.imbalance(load) >= 0.999


def test_where_there_is_no_load_it_is_even():
    assert place(range(4), 16, 8).imbalance({}) == 1.0


def test_the_copies_of_an_expert_share_its_tokens():
    placement = place(range(1), 2, 2, Slots(1, 1))
    assert placement.table(0) == ((0, 1), (1, 0))
    assert placement.loads({(0, 0): 30, (0, 1): 10}) == [20, 20]


@of_any_stage
def test_the_same_stage_gets_the_same_placement(stage):
    again = stage | {"load": stage["load"] and dict(reversed(stage["load"].items()))}
    assert place(**stage) == place(**again)


def test_the_load_of_other_stages_is_passed_over():
    assert place(range(4), 8, 2, load={(9, 0): 5.0, (0, 8): 7.0}) == place(range(4), 8, 2)


# -- what cannot be placed ------------------------------------------------------------------------------------------


def test_another_stages_layer_has_no_table():
    with pytest.raises(ValueError, match="7"):
        place(range(4), 8, 2).table(7)


@pytest.mark.parametrize(("num_layers", "num_experts", "num_workers"), [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_no_layers_no_experts_or_no_workers_is_refused(num_layers, num_experts, num_workers):
    with pytest.raises(ValueError, match="num_experts"):
        place(range(num_layers), num_experts, num_workers)


@pytest.mark.parametrize(("primary", "standby"), [(0, 0), (1, -1)])
def test_slots_below_nothing_are_refused(primary, standby):
    with pytest.raises(ValueError, match="slots must be at least"):
        Slots(primary, standby)


def test_too_few_slots_are_refused_with_the_number_that_is_needed():
    with pytest.raises(
        ValueError, match="4 layers x 16 experts need 8 primary slots on each of 8 workers, there are 7"
    ):
        place(range(4), 16, 8, Slots(7, 20))


def test_nodes_are_named_for_every_worker_or_for_none():
    with pytest.raises(ValueError, match="1 nodes are named for 2 workers"):
        place(range(1), 2, 2, nodes=["a"])
