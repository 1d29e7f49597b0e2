"""After any loss every expert has a home among the living, at the price of as few moves as can be."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.experts.placement import Placement, Slots, place, primaries_per_worker
from serve_app.experts.repair import repair


@st.composite
def losses(draw):
    """(placement, slots, living, arguments that may be left out): any sizes, room, nodes and load; anybody may die."""
    layers, num_experts = range(draw(st.integers(0, 9)), 10), draw(st.integers(1, 20))
    num_workers = draw(st.integers(1, 9))
    slots = Slots(
        primaries_per_worker(len(layers), num_experts, num_workers) + draw(st.integers(0, 2)), draw(st.integers(0, 6))
    )
    nodes = st.lists(st.sampled_from(["a", "b", "c", None]), min_size=num_workers, max_size=num_workers)
    pairs = st.tuples(st.sampled_from(layers), st.integers(0, num_experts - 1))
    known = {
        "nodes": draw(st.none() | nodes),
        "load": draw(st.none() | st.dictionaries(pairs, st.integers(0, 10**6), max_size=60)),
    }
    placement = place(layers, num_experts, num_workers, slots, **known)
    return placement, slots, draw(some_of(range(num_workers))), known


def some_of(ranks):
    return st.lists(st.sampled_from(sorted(ranks)), unique=True) if ranks else st.just([])


def after_any_loss(test):
    return settings(deadline=None)(given(losses())(test))


def homes(placement):
    return {(layer, e): ranks for layer in placement.layers for e, ranks in enumerate(placement.table(layer))}


def num_held(placement):
    return Counter(rank for ranks in homes(placement).values() for rank in ranks)


def check(before, repaired, living):
    """What holds after every loss."""
    after = homes(repaired.placement)
    assert after.keys() == homes(before).keys()
    for pair, ranks in after.items():
        left = [rank for rank in homes(before)[pair] if rank in living]
        assert set(ranks) <= set(living)
        assert len(set(ranks)) == len(ranks)
        assert bool(ranks) == bool(living)
        assert (pair in repaired.uncovered) == (not ranks)
        assert (pair in repaired.landed) == (not left and bool(living))
        assert ranks[:1] == tuple(left[:1] or [repaired.landed[pair]] if living else [])
        assert set(ranks) <= {*left, *ranks[:1]}
        assert (pair in repaired.promoted) == (bool(left) and left[0] != homes(before)[pair][0])


def check_room(repaired, slots, living):
    num_slots = slots.primary + slots.standby
    if living and len(living) * num_slots >= len(homes(repaired.placement)):
        assert max(num_held(repaired.placement).values()) <= num_slots


# -- what always holds ----------------------------------------------------------------------------------------------


@after_any_loss
def test_every_expert_is_hosted_by_the_living_and_only_the_lost_move(loss):
    placement, slots, living, known = loss
    repaired = repair(placement, living, slots, **known)
    check(placement, repaired, living)
    check_room(repaired, slots, living)


@settings(deadline=None)
@given(losses(), st.data())
def test_a_second_loss_is_repaired_as_the_first(loss, data):
    placement, slots, living, known = loss
    once = repair(placement, living, slots, **known)
    fewer = data.draw(some_of(living))
    twice = repair(once.placement, fewer, slots, **known)
    check(once.placement, twice, fewer)
    check_room(twice, slots, fewer)


@after_any_loss
def test_whoever_comes_back_takes_what_is_uncovered(loss):
    placement, slots, living, known = loss
    gone = repair(placement, [], slots, **known)
    assert gone.uncovered == list(homes(placement))
    back = repair(gone.placement, living, slots, **known)
    check(gone.placement, back, living)
    check_room(back, slots, living)


@after_any_loss
def test_what_is_repaired_stays_as_it_is(loss):
    placement, slots, living, known = loss
    once = repair(placement, living, slots, **known)
    again = repair(once.placement, living, slots, **known)
    assert again.placement == once.placement
    assert (again.promoted, again.landed) == ([], {})


@after_any_loss
def test_without_a_loss_nothing_changes(loss):
    placement, slots, _, known = loss
    repaired = repair(placement, range(placement.num_workers), slots, **known)
    assert (repaired.placement, repaired.landed) == (placement, {})


@after_any_loss
def test_the_same_loss_gets_the_same_repair(loss):
    placement, slots, living, known = loss
    again = known | {"load": known["load"] and dict(reversed(known["load"].items()))}
    assert repair(placement, living, slots, **known) == repair(placement, living[::-1], slots, **again)


@after_any_loss
def test_nobody_takes_more_beyond_the_slots_than_another(loss):
    placement, slots, living, known = loss
    held = num_held(repair(placement, living, slots, **known).placement)
    if living and max(held.values()) > slots.primary + slots.standby:
        assert max(held.values()) - min(held[rank] for rank in living) <= 1


# -- the reference layout -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", range(8))
@pytest.mark.parametrize(("num_layers", "num_experts"), [(1, 64), (4, 16)])
def test_two_slots_each_take_the_loss_of_one_of_eight(num_layers, num_experts, lost):
    slots = Slots(8, 2)
    placement = place(range(num_layers), num_experts, 8, slots)
    repaired = repair(placement, set(range(8)) - {lost}, slots)
    assert sum(num_held(repaired.placement).values()) == 7 * 10
    assert max(num_held(repaired.placement).values()) == 10
    assert len(repaired.promoted) + len(repaired.landed) == 8


def test_a_second_loss_goes_beyond_the_slots_by_as_little_as_can_be():
    slots = Slots(8, 2)
    placement = place(range(4), 16, 8, slots)
    once = repair(placement, set(range(1, 8)), slots)
    twice = repair(once.placement, set(range(2, 8)), slots)
    assert sorted(num_held(twice.placement).values()) == [10, 10, 11, 11, 11, 11]
    assert all(len(ranks) == 1 for ranks in homes(twice.placement).values())


# -- where the lost ones land ---------------------------------------------------------------------------------------


def test_each_layer_is_dealt_out_evenly():
    repaired = repair(place(range(4), 8, 4), [0, 1, 2], Slots(8, 4))
    for layer in range(4):
        primaries = Counter(ranks[0] for ranks in repaired.placement.table(layer))
        assert sorted(primaries.values()) == [2, 3, 3]
    assert sorted(num_held(repaired.placement).values()) == [10, 11, 11]


def test_a_heavy_expert_lands_on_whoever_does_least():
    load = {(0, 0): 10, (0, 1): 30, (0, 2): 20, (0, 3): 5, (0, 4): 4, (0, 5): 3, (0, 6): 2, (0, 7): 50}
    placement = place(range(1), 8, 4)  # rank 3 has 55 of the tokens, and 4 is lighter than 14, 33 and 22
    repaired = repair(placement, [0, 1, 2], Slots(2, 2), load=load)
    assert repaired.landed == {(0, 7): 0, (0, 3): 2}


def test_experts_without_tokens_do_not_all_land_on_one_worker():
    repaired = repair(place(range(1), 12, 4), [0, 1, 2], Slots(3, 3), load={(0, 0): 0.0})
    assert sorted(repaired.landed.values()) == [0, 1, 2]


def test_between_equals_it_is_a_node_that_lost_nobody():
    placement = place(range(1), 4, 4)
    assert repair(placement, [0, 1, 2], Slots(1, 1), nodes=["a", "a", "b", "a"]).landed == {(0, 3): 2}
    assert repair(placement, [0, 1, 2], Slots(1, 1), nodes=[None, "a", "b", None]).landed == {(0, 3): 0}


def test_a_free_slot_comes_before_that_of_a_standby():
    placement = Placement(range(1), 4, (((0, 1), (1, 0), (2,), (3,)),))
    load = {(0, 2): 1000}
    assert repair(placement, [0, 1, 2], Slots(1, 1), load=load).landed == {(0, 3): 2}


def test_the_standby_that_is_given_up_is_one_of_many_copies():
    full = Placement(range(1), 4, (((0, 1, 2), (1, 2), (2, 0), (3,), (0,), (1,)),))
    repaired = repair(full, [0, 1, 2], Slots(2, 1), load={(0, 4): 9, (0, 5): 9})
    assert repaired.placement.table(0) == ((0, 1), (1, 2), (2, 0), (2,), (0,), (1,))


def test_of_as_many_copies_it_is_the_one_of_few_tokens():
    full = Placement(range(1), 4, (((0, 2), (1, 2), (2,), (3,), (0,), (1,), (0,), (1,)),))
    repaired = repair(full, [0, 1, 2], Slots(2, 1), load={(0, 0): 5, (0, 1): 3, (0, 4): 9, (0, 5): 9})
    assert repaired.placement.table(0) == ((0, 2), (1,), (2,), (2,), (0,), (1,), (0,), (1,))


def test_nodes_are_named_for_every_worker_or_for_none():
    with pytest.raises(ValueError, match="1 nodes are named for 2 workers"):
        repair(place(range(1), 2, 2), [0], Slots(1, 1), nodes=["a"])
