"""The zero of a growing function, however it grows."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.plan.crossing import crossing


@pytest.mark.parametrize(
    "curve", [lambda x: x, math.sinh, math.atan, lambda x: x**3, lambda x: math.exp(x) - 1], ids=str
)
@given(zero=st.floats(-9, 9))
def test_it_is_found_within_what_was_asked(curve, zero: float) -> None:
    assert abs(curve(crossing(lambda x: curve(x - zero), -10, 10, close=1e-6) - zero)) <= 1e-6


def test_it_takes_few_looks() -> None:
    looks: list[float] = []

    def value(x: float) -> float:
        looks.append(x)
        return math.log(math.exp(x) + 1e-3 * math.exp(3 * x)) - 1.0

    crossing(value, -25, 20, close=1e-5)
    assert len(looks) <= 12


def test_where_there_is_none_it_is_the_nearer_end() -> None:
    assert crossing(lambda x: x + 100, -1, 1) == -1
    assert crossing(lambda x: x - 100, -1, 1) == 1


@given(st.floats(-9, 9))
def test_a_jump_is_found_where_it_is(place: float) -> None:
    assert crossing(lambda x: 1.0 if x > place else -1.0, -10, 10) == pytest.approx(place, abs=1e-9)
