import pytest

from serve_app.bench.measure import BenchError, Trace, Workload, figures, quantile


@pytest.mark.parametrize(
    ("values", "q", "expected"),
    [
        ([2, 1], 0.5, 1),
        ([3, 1, 2], 0.5, 2),
        (range(1, 101), 0.99, 99),
        (range(1, 102), 0.99, 100),
        ([7], 0.99, 7),
        ([1, 2], 0.0, 1),
        ([1, 2], 1.0, 2),
    ],
)
def test_a_quantile_is_the_smallest_value_that_covers_its_share(values, q, expected):
    assert quantile(values, q) == expected


def test_figures_count_from_the_first_send_to_the_last_token():
    traces = [Trace(10.0, [11.0, 12.0, 14.0]), Trace(10.5, [12.0, 13.0, 14.0])]
    row = figures(Workload(2, prompt_tokens=8, output_tokens=3), traces)
    assert (row.ttft_p50_s, row.ttft_p99_s) == (1.0, 1.5)
    assert (row.itl_p50_s, row.itl_p99_s) == (1.0, 2.0)
    assert row.output_tokens_per_s == 6 / 4
    assert row.prompt_tokens_per_s == 16 / 2  # until the last request's first token
    assert row.decode_tokens_per_s == 3 / 2  # the tokens after it, of all requests


def test_one_token_each_has_no_decode_rate_and_no_gaps():
    row = figures(Workload(1, 4, 1), [Trace(0.0, [2.0])])
    assert (row.decode_tokens_per_s, row.itl_p50_s, row.itl_p99_s) == (0.0, 0.0, 0.0)


def test_a_request_without_a_token_is_no_measurement():
    with pytest.raises(BenchError, match="without a token"):
        figures(Workload(2, 4, 1), [Trace(0.0, [1.0]), Trace(0.0)])


def test_the_same_workload_has_the_same_prompts():
    assert Workload(3, 16, 4).prompts(1000) == Workload(3, 16, 4).prompts(1000)


def test_runs_of_another_seed_or_batch_share_no_prompt():
    runs = [Workload(1, 16, 4), Workload(8, 16, 4), Workload(8, 16, 4, seed=1)]
    prompts = [tuple(prompt) for run in runs for prompt in run.prompts(1000)]
    assert len(set(prompts)) == 17
