from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.experts.placement import place

stages = st.builds(lambda start, num: range(start, start + num), st.integers(0, 40), st.integers(1, 8))


def spread(ranks, num_workers):
    counts = Counter(ranks)
    return max(counts[rank] for rank in range(num_workers)) - min(counts[rank] for rank in range(num_workers))


@given(stages, st.integers(1, 80), st.integers(1, 12))
def test_each_expert_has_one_primary_and_the_load_is_even(layers, num_experts, num_workers):
    placement = place(layers, num_experts, num_workers)
    for layer in layers:
        table = placement.table(layer)
        assert len(table) == num_experts
        assert set(table) <= set(range(num_workers))
        assert spread(table, num_workers) <= 1
    assert spread([rank for layer in layers for rank in placement.table(layer)], num_workers) <= 1


def test_the_same_sizes_give_the_same_placement():
    assert place(range(4, 8), 16, 3) == place(range(4, 8), 16, 3)


def test_what_does_not_divide_falls_on_another_worker_in_the_next_layer():
    placement = place(range(3), 4, 3)
    assert [Counter(placement.table(layer)).most_common(1)[0][0] for layer in range(3)] == [0, 1, 2]


def test_another_stages_layer_has_no_table():
    with pytest.raises(ValueError, match="7"):
        place(range(4), 8, 2).table(7)


@pytest.mark.parametrize(("num_experts", "num_workers"), [(0, 1), (1, 0)])
def test_no_experts_or_no_workers_is_refused(num_experts, num_workers):
    with pytest.raises(ValueError, match="num_experts"):
        place(range(1), num_experts, num_workers)
