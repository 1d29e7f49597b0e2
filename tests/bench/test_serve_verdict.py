import msgspec
import pytest

from serve_app.bench.measure import BenchError
from serve_app.bench.serve.arrivals import Arrival
from serve_app.bench.serve.plot import draw
from serve_app.bench.serve.record import Record, Try
from serve_app.bench.serve.report import read_report, remarks, report_of, tables, to_json
from serve_app.bench.serve.verdict import Capacity, Run, capacity_of, judge, with_ratios

OBJECTIVE_S = 2.0
RUN = Run("3x", 3.0, "poisson", 10.0)


def served(sent_s, token_s, output_tokens=None, at_s=None, tries=()):
    """Let in, and ended with its last token."""
    arrival = Arrival(sent_s if at_s is None else at_s, 16, output_tokens or len(token_s))
    tried = [*tries, Try(sent_s, token_s[0], 200)]
    return Record(arrival, tried, list(token_s), token_s[-1])


def refusal(sent_s, answered_s, reason="ttft"):
    return Try(sent_s, answered_s, 429, retry_after_s=1.0, reason=reason)


def refused(*tries):
    return Record(Arrival(tries[0].sent_s, 16, 4), list(tries), ended_s=tries[-1].answered_s)


def failed(sent_s, ended_s, token_s=()):
    return Record(Arrival(sent_s, 16, 4), [Try(sent_s)], list(token_s), ended_s, error="it broke")


def judged(*records, run=RUN):
    return judge(run, records, OBJECTIVE_S)


def test_attainment_is_of_those_let_in():
    figures = judged(served(0, [1, 2]), served(1, [3.5, 4]), refused(refusal(2, 2.01)))
    assert (figures.sent, figures.admitted, figures.refused, figures.errors) == (3, 2, 1, 0)
    assert figures.attainment == 0.5


def test_the_objective_itself_is_in_time():
    assert judged(served(0, [2.0, 3.0])).attainment == 1.0


def test_who_failed_after_being_let_in_is_a_miss():
    """Also one whose first token was in time."""
    figures = judged(served(0, [1, 2]), failed(0, 5), failed(0, 5, [1]))
    assert (figures.admitted, figures.errors) == (3, 2)
    assert figures.attainment == pytest.approx(1 / 3)
    assert figures.first_errors == ["it broke"]


def test_who_gave_up_is_a_miss_and_no_error_and_counts_with_the_time_waited():
    gone = Record(Arrival(1, 16, 4), [Try(1.0)], ended_s=61.0, gave_up=True)
    figures = judged(served(0, [1, 2]), gone)
    assert (figures.attainment, figures.errors, figures.gave_up) == (0.5, 0, 1)
    assert figures.ttft_p99_s == 60.0


def test_nobody_let_in_is_no_attainment():
    figures = judged(refused(refusal(0, 0.01)))
    assert figures.attainment is None
    assert figures.goodput_per_s == 0.0


def test_goodput_counts_those_in_time_over_the_span_of_arrivals():
    figures = judged(served(0, [1, 2, 3]), served(1, [9, 10]), failed(2, 3))
    assert figures.goodput_per_s == 1 / 10
    assert figures.goodput_tokens_per_s == 3 / 10


def test_goodput_is_over_a_longer_span_where_the_good_took_longer():
    assert judged(served(9, [10, 20])).goodput_per_s == 1 / 20


def test_what_was_served_in_vain_afterwards_does_not_stretch_the_span():
    assert judged(served(0, [1, 2]), served(9, [90, 100])).goodput_per_s == 1 / 10


def test_times_count_from_the_try_that_was_let_in():
    figures = judged(served(5, [6, 7, 9], at_s=0, tries=[refusal(0, 0.5), refusal(2, 2.25)]))
    assert (figures.ttft_p50_s, figures.e2e_p99_s) == (1, 4)
    assert (figures.itl_p50_s, figures.itl_p99_s) == (1, 2)
    assert (figures.refusals, figures.refusal_p50_s, figures.refusal_p99_s) == (2, 0.25, 0.5)
    assert (figures.sent, figures.refused, figures.reasons) == (1, 0, {"ttft": 2})


def test_the_generators_lateness_is_of_first_tries():
    figures = judged(served(1.25, [2], at_s=1.0), served(9, [10], at_s=2.0, tries=[refusal(2.5, 3)]))
    assert figures.lateness_max_s == 0.5


def test_a_retry_is_true_if_the_first_one_is_let_in():
    figures = judged(
        served(5, [6], tries=[refusal(0, 0)]),
        served(5, [6], tries=[refusal(0, 0), refusal(2, 2)]),
        refused(refusal(0, 0), refusal(1, 1)),
        refused(refusal(0, 0)),
        served(0, [1]),
    )
    assert figures.retried == 3
    assert figures.retry_admitted == pytest.approx(1 / 3)


def test_who_is_under_way_is_neither_let_in_nor_refused():
    figures = judged(served(0, [1]), Record(Arrival(1, 16, 4), [Try(1.0)]))
    assert (figures.sent, figures.admitted, figures.unfinished, figures.attainment) == (2, 1, 1, 1.0)


def test_the_timeline_counts_tries_by_the_second():
    line = judged(served(2.5, [3], tries=[refusal(0.1, 0.2)]), served(0.9, [1])).timeline
    assert (line.sent, line.let_in, line.refused) == ([2, 0, 1], [1, 0, 1], [1, 0, 0])


def test_ratios_are_to_the_best_run():
    runs = with_ratios([judged(served(0, [1])), judged(served(0, [1]), served(0, [2]))], Capacity(9.0))
    assert [run.goodput_ratio for run in runs] == [0.5, 1.0]


@pytest.mark.parametrize(("capacity", "expected"), [(Capacity(0.2), 0.5), (None, None)])
def test_the_ratio_of_one_run_is_to_the_capacity(capacity, expected):
    (run,) = with_ratios([judged(served(0, [1]))], capacity)
    assert run.goodput_ratio == expected


def test_capacity_is_what_ends_in_time_within_the_window():
    records = [served(0, [1, 4]), served(0, [1, 6, 7]), served(0, [5, 6]), refused(refusal(5, 6)), served(9, [10, 11])]
    capacity = capacity_of(records, 5.0, 10.0, OBJECTIVE_S, 2)
    assert capacity == Capacity(1 / 5, 3 / 5, 2, 5.0, attainment=0.5)


@pytest.fixture
def report():
    worst = judged(served(0, [1, 2]), served(1, [9, 10]), failed(0, 1), refused(refusal(2, 2.01)))
    nobody = judged(refused(refusal(0, 0.01), refusal(1.5, 1.6)), run=Run("10x", 10.0, "poisson", 10.0))
    runs = with_ratios([judged(served(0, [1, 2])), worst, nobody], Capacity(1.0))
    return report_of(runs, Capacity(1.0), "http://[somewhere]$1$", OBJECTIVE_S, 0, interrupted=False)


def test_a_report_begins_with_the_worst_attainment_and_all_refusals_and_errors(report):
    assert report.attainment == pytest.approx(1 / 3)
    assert (report.refused, report.errors, report.goodput_ratio) == (2, 1, 0.0)
    decoded = msgspec.json.decode(to_json(report))
    assert decoded["attainment"] == report.attainment
    assert [run["rate"] for run in decoded["runs"]] == ["3x", "3x", "10x"]


def test_a_printed_report_can_be_read_again(report, tmp_path):
    path = tmp_path / "report.json"
    path.write_text(to_json(report))
    assert read_report(path) == report


@pytest.mark.parametrize("content", [b"{}", b"\xff", b"[]"])
def test_what_is_no_report_is_refused(tmp_path, content):
    path = tmp_path / "report.json"
    path.write_bytes(content)
    with pytest.raises(BenchError, match="no report"):
        read_report(path)


def test_a_report_of_no_run_cannot_be_drawn_beside(tmp_path, report):
    path = tmp_path / "report.json"
    path.write_text(to_json(msgspec.structs.replace(report, runs=[])))
    with pytest.raises(BenchError, match="no run"):
        read_report(path)


def test_tables_have_a_row_for_each_run_and_remarks_tell_of_errors(report):
    assert [table.row_count for table in tables(report)] == [3, 3]
    assert "3x: error: it broke" in remarks(report)


@pytest.mark.parametrize("beside", [False, True])
def test_a_plot_is_a_png_also_where_nobody_was_let_in(report, tmp_path, beside):
    path = tmp_path / "plot.png"
    draw(path, report, report if beside else None, "beside $" if beside else "")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_plot_that_cannot_be_written_is_one_sentence(report, tmp_path):
    with pytest.raises(BenchError, match="cannot be written"):
        draw(tmp_path / "nowhere" / "plot.png", report, None)
