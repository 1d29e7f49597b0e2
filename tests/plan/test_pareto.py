"""The front is what nothing beats."""

from hypothesis import given
from hypothesis import strategies as st

from serve_app.plan.pareto import front

points = st.integers(1, 4).flatmap(lambda num_axes: st.lists(st.tuples(*[st.integers(0, 5)] * num_axes), max_size=40))


def dominates(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return one != other and all(mine <= its for mine, its in zip(one, other, strict=True))


@given(points)
def test_a_point_is_on_the_front_just_where_no_other_is_nowhere_worse_and_somewhere_better(given_points) -> None:
    beaten_by_none = [
        index for index, point in enumerate(given_points) if not any(dominates(other, point) for other in given_points)
    ]
    assert front(given_points) == beaten_by_none


def test_equals_stay_together() -> None:
    assert front([(1, 2), (1, 2), (2, 2)]) == [0, 1]


def test_of_nothing_there_is_no_front() -> None:
    assert front([]) == []
