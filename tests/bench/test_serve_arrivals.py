import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.bench.measure import BenchError
from serve_app.bench.serve.arrivals import (
    BURST_SHARE,
    Arrival,
    Pattern,
    Range,
    draw_arrivals,
    draw_lengths,
    mean_rate,
    parse_range,
    read_arrivals,
    stretch,
    write_arrivals,
)

MANY = 1_000_000
ONES = [(1, 1)]


def arrive(pattern, rate_per_s=50.0, duration_s=60.0, seed=0, most=MANY):
    """The moments of a run."""
    arrivals = draw_arrivals(pattern, rate_per_s, duration_s, itertools.cycle(ONES), seed, most)
    return [arrival.at_s for arrival in arrivals]


@given(
    st.sampled_from(Pattern),
    st.floats(0.1, 200.0),
    st.floats(0.5, 30.0),
    st.integers(0, 2**32),
)
def test_arrivals_are_in_order_and_within_the_run(pattern, rate_per_s, duration_s, seed):
    moments = arrive(pattern, rate_per_s, duration_s, seed)
    assert moments == sorted(moments)
    assert all(0 <= at_s < duration_s for at_s in moments)


@pytest.mark.parametrize("pattern", Pattern)
def test_every_pattern_has_the_mean_rate(pattern):
    for seed in range(20):
        num = len(arrive(pattern, seed=seed))
        assert abs(num - 3000) < 5 * math.sqrt(3000), f"seed {seed}"


@pytest.mark.parametrize("pattern", Pattern)
def test_the_same_seed_is_the_same_run(pattern):
    assert arrive(pattern, seed=7) == arrive(pattern, seed=7)
    if pattern is not Pattern.UNIFORM:
        assert arrive(pattern, seed=7) != arrive(pattern, seed=8)


def test_a_uniform_run_has_even_gaps():
    assert arrive(Pattern.UNIFORM, rate_per_s=4.0, duration_s=1.0) == [0.0, 0.25, 0.5, 0.75]


def test_gaps_of_poisson_arrivals_scatter_as_much_as_their_mean():
    moments = arrive(Pattern.POISSON, rate_per_s=100.0, duration_s=100.0)
    gaps = [b - a for a, b in itertools.pairwise(moments)]
    mean_s = sum(gaps) / len(gaps)
    deviation_s = math.sqrt(sum((gap_s - mean_s) ** 2 for gap_s in gaps) / len(gaps))
    assert 0.9 < deviation_s / mean_s < 1.1


def test_a_burst_is_over_in_the_first_part_of_each_cycle():
    moments = arrive(Pattern.BURST, duration_s=60.0)
    assert {int(at_s // 10) for at_s in moments} == set(range(6))
    assert all(at_s % 10 <= 10 * BURST_SHARE for at_s in moments)


def test_a_short_run_of_bursts_is_one_whole_cycle():
    moments = arrive(Pattern.BURST, rate_per_s=100.0, duration_s=3.0)
    assert max(moments) <= 3.0 * BURST_SHARE


def test_a_ramp_has_three_quarters_of_its_requests_in_its_second_half():
    moments = arrive(Pattern.RAMP)
    late = sum(at_s >= 30.0 for at_s in moments)
    assert 0.72 < late / len(moments) < 0.78


def test_no_run_has_more_than_the_most_requests():
    assert arrive(Pattern.POISSON, most=10) == arrive(Pattern.POISSON)[:10]


@given(st.integers(1, 3000), st.integers(0, 3000), st.integers(0, 2**32))
def test_lengths_stay_within_their_range(low, more, seed):
    drawn = itertools.islice(draw_lengths(Range(low, low + more), Range(low, low), seed), 100)
    for prompt, output in drawn:
        assert low <= prompt <= low + more
        assert output == low


def test_each_doubling_of_the_length_is_as_frequent():
    drawn = [prompt for prompt, _ in itertools.islice(draw_lengths(Range(16, 2047), Range(1, 1), 0), 7000)]
    by_doubling = [sum(16 * 2**i <= length < 32 * 2**i for length in drawn) for i in range(7)]
    assert all(850 < num < 1150 for num in by_doubling), by_doubling


def test_lengths_are_the_same_for_a_seed_whatever_the_rate():
    def lengths(rate_per_s):
        arrivals = draw_arrivals(Pattern.POISSON, rate_per_s, 5.0, draw_lengths(Range(1, 99), Range(1, 9), 3), 3, MANY)
        return [(arrival.prompt_tokens, arrival.output_tokens) for arrival in arrivals]

    few, many = lengths(5.0), lengths(50.0)
    assert many[: len(few)] == few


def test_a_written_trace_reads_as_it_was(tmp_path):
    path = tmp_path / "trace.jsonl"
    arrivals = draw_arrivals(Pattern.POISSON, 5.0, 5.0, draw_lengths(Range(1, 99), Range(1, 9), 3), 3, MANY)
    write_arrivals(path, arrivals)
    assert read_arrivals(path) == arrivals


def test_a_stretched_trace_has_the_rate_asked_for():
    trace = [Arrival(1.0, 5, 5), Arrival(4.0, 6, 6)]
    assert mean_rate(stretch(trace, 8.0)) == pytest.approx(8.0)
    assert stretch(trace, 8.0)[0].at_s == pytest.approx(1 / 16)
    assert mean_rate([Arrival(0.0, 1, 1)]) == 1.0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "has no requests"),
        (b'\n{"at_s": 1, "prompt_tokens": 5}', "line 2: .*output_tokens"),
        (b'{"at_s": -1, "prompt_tokens": 5, "output_tokens": 5}', "at_s is -1"),
        (b'{"at_s": 1e9, "prompt_tokens": 5, "output_tokens": 5}', "from the begin"),
        (b'{"at_s": 1, "prompt_tokens": 0, "output_tokens": 5}', "must be 1 or more"),
        (b'{"at_s": 1, "prompt_tokens": 5, "output_tokens": 5, "rate": 3}', "rate"),
        (b"\xff", "line 1"),
    ],
)
def test_a_trace_that_is_none_is_refused_with_its_line(tmp_path, content, words):
    path = tmp_path / "trace.jsonl"
    path.write_bytes(content)
    with pytest.raises(BenchError, match=words):
        read_arrivals(path)


def test_a_trace_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(BenchError, match="cannot be read"):
        read_arrivals(tmp_path / "nothing")


@pytest.mark.parametrize(("text", "expected"), [("16:2000", Range(16, 2000)), ("8", Range(8, 8))])
def test_a_range_is_two_numbers_or_one(text, expected):
    assert parse_range(text, "--prompt-tokens") == expected


@pytest.mark.parametrize("text", ["", "a:b", "0:5", "5:4", "1:2:3", "-1"])
def test_what_is_no_range_is_refused(text):
    with pytest.raises(BenchError, match="--prompt-tokens"):
        parse_range(text, "--prompt-tokens")
