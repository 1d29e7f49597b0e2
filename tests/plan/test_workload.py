"""Lengths are distributions, and a workload says one thing only."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.plan.workload import NUM_POINTS, Lengths, Workload

POINTS = st.lists(st.tuples(st.integers(1, 10**6), st.floats(0, 1e6, allow_nan=False)), min_size=1, max_size=40).filter(
    lambda points: sum(weight for _, weight in points) > 1e-3
)
SHARES = st.floats(0, 1)


@given(points=POINTS)
def test_weights_sum_to_one_over_growing_lengths(points: list[tuple[int, float]]):
    lengths = Lengths.of(points)
    tokens = [length for length, _ in lengths.points]
    assert sum(weight for _, weight in lengths.points) == pytest.approx(1)
    assert tokens == sorted(set(tokens))
    assert set(tokens) == {length for length, _ in points}


@given(points=POINTS, factor=st.floats(1e-3, 1e3))
def test_only_the_ratios_of_weights_count(points: list[tuple[int, float]], factor: float):
    lengths, scaled = Lengths.of(points), Lengths.of([(tokens, weight * factor) for tokens, weight in points])
    assert scaled.mean == pytest.approx(lengths.mean)
    assert Lengths.of(lengths.points).mean == pytest.approx(lengths.mean)


@given(points=POINTS)
def test_the_mean_lies_among_the_lengths_and_its_square_below_that_of_the_squares(points: list[tuple[int, float]]):
    lengths = Lengths.of(points)
    least = lengths.points[0][0]
    assert least * (1 - 1e-9) <= lengths.mean <= lengths.most * (1 + 1e-9)
    assert lengths.mean**2 <= lengths.mean_square * (1 + 1e-9)


@given(points=POINTS, low=SHARES, high=SHARES)
def test_quantiles_grow_with_their_share_and_are_lengths(points: list[tuple[int, float]], low: float, high: float):
    lengths = Lengths.of(points)
    low, high = sorted((low, high))
    assert lengths.quantile(low) <= lengths.quantile(high)
    assert lengths.quantile(low) in {tokens for tokens, _ in lengths.points}
    assert lengths.quantile(0) == lengths.points[0][0]


@given(points=POINTS, share=st.floats(0.001, 0.999))
def test_a_quantile_is_the_least_length_that_so_many_do_not_exceed(points: list[tuple[int, float]], share: float):
    lengths = Lengths.of(points)
    found = lengths.quantile(share)
    up_to = sum(weight for tokens, weight in lengths.points if tokens <= found)
    below = sum(weight for tokens, weight in lengths.points if tokens < found)
    assert below - 1e-9 < share <= up_to + 1e-9


@given(tokens=st.integers(1, 10**6), share=SHARES)
def test_one_length_is_all_of_its_figures(tokens: int, share: float):
    lengths = Lengths.fixed(tokens)
    assert lengths.quantile(share) == lengths.most == lengths.mean == tokens
    assert lengths.mean_square == tokens**2


@given(least=st.integers(1, 10**5), width=st.integers(0, 10**5))
def test_a_range_has_its_middle_for_mean_and_the_spread_of_a_uniform_one(least: int, width: int):
    lengths = Lengths.uniform(least, least + width)
    middle = least + width / 2
    assert lengths.mean == pytest.approx(middle, abs=0.51)
    assert least <= lengths.points[0][0]
    assert lengths.most <= least + width
    assert len(lengths.points) <= NUM_POINTS
    if width > 1000:  # narrower ones are mostly rounding
        variance = lengths.mean_square - lengths.mean**2
        assert variance == pytest.approx(width**2 / 12 * (1 - 1 / NUM_POINTS**2), rel=0.02)


@pytest.mark.parametrize("points", [[], [(5, 0.0)], [(0, 1.0)], [(-1, 1.0)], [(5, -1.0), (6, 3.0)]])
def test_what_is_no_distribution_is_refused(points: list[tuple[int, float]]):
    with pytest.raises(ValueError, match="lengths"):
        Lengths.of(points)


def test_a_range_does_not_end_before_it_begins():
    with pytest.raises(ValueError, match=r"end \(5\) before it begins \(6\)"):
        Lengths.uniform(6, 5)


def test_a_workload_has_a_rate_or_a_number_of_sequences():
    isl, osl = Lengths.fixed(100), Lengths.fixed(20)
    assert Workload(isl, osl).concurrency == 128
    assert Workload(isl, osl, concurrency=None, rate=2.0).rate == 2.0
    for concurrency, rate in ((None, None), (1, 1.0)):
        with pytest.raises(ValueError, match="either a concurrency or a rate"):
            Workload(isl, osl, concurrency=concurrency, rate=rate)


@pytest.mark.parametrize(
    ("name", "value"),
    [("concurrency", 0), ("burstiness", 0.0), ("chunk_tokens", -1), ("prefix_share", 1.0), ("prefix_share", -0.1)],
)
def test_a_number_out_of_its_range_is_refused_by_its_name(name: str, value: float):
    with pytest.raises(ValueError, match=name):
        Workload(Lengths.fixed(1), Lengths.fixed(1), **{name: value})


def test_a_sequence_is_half_answered_on_average():
    workload = Workload(Lengths.fixed(100), Lengths.of([(10, 1), (30, 1)]))
    assert workload.mean_tokens == 110
    assert workload.most_tokens == 130
