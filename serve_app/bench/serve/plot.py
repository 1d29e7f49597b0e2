"""A load test as a picture: what was promised, what was kept, what was refused; another test's beside it."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from serve_app.bench.measure import BenchError
from serve_app.bench.serve.report import Report
from serve_app.bench.serve.verdict import RunFigures

SIZE_INCHES = (13.0, 11.0)
DPI = 110
_OURS, _OTHERS = "-", "--"  # lines
_GOODPUT, _ATTAINMENT, _REFUSED = "tab:blue", "tab:green", "tab:red"
_MIN_TTFT_S = 1e-3  # left of this the axis has nothing to tell


def draw(path: Path, report: Report, other: Report | None, other_name: str = "") -> None:
    """Write a PNG. `other` is drawn dashed, and called `other_name`. BenchError if it cannot be written."""
    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    cdf, kept, goodput, refused, timeline, ttfts = figure.subplots(3, 2).flat
    reports = [(report, _OURS)] + ([(other, _OTHERS)] if other else [])
    for each, line in reports:
        _draw_cdf(cdf, each, line)
        _draw_rates(kept, each, line, [run.attainment for run in each.runs], _ATTAINMENT)
        _draw_rates(goodput, each, line, [run.goodput_per_s for run in each.runs], _GOODPUT)
        _draw_rates(refused, each, line, [run.refused / run.sent for run in each.runs], _REFUSED)
    _finish_cdf(cdf, report.ttft_s)
    _finish_rates(kept, report.runs, "requests let in that met the objective", is_share=True)
    _finish_rates(goodput, report.runs, "goodput, requests per second", is_share=False)
    _finish_rates(refused, report.runs, "requests refused", is_share=True)
    _draw_timeline(timeline, report.runs[-1])
    _draw_ttfts(ttfts, reports)
    figure.suptitle(_title(report, other_name))
    try:
        figure.savefig(path, dpi=DPI, format="png")
    except OSError as error:
        raise BenchError(f"{path} cannot be written: {error.strerror}") from None


def _title(report: Report, other_name: str) -> str:
    capacity = f", capacity {report.capacity.requests_per_s:.3g} requests/s" if report.capacity else ""
    beside = f"; dashed: {other_name}" if other_name else ""
    return _plain(f"{report.url}: first token promised within {report.ttft_s:g} s{capacity}{beside}")


def _plain(text: str) -> str:
    """Matplotlib takes what stands between two dollar signs for a formula."""
    return text.replace("$", r"\$")


def _draw_cdf(axes: Axes, report: Report, line: str) -> None:
    """Who got no token is in it with the time that they waited."""
    for index, run in enumerate(report.runs):
        waits = sorted(max(_MIN_TTFT_S, wait_s) for _, wait_s in run.ttfts)
        shares = [(i + 1) / len(waits) for i in range(len(waits))]
        axes.step(waits, shares, line, where="post", color=f"C{index % 10}", label=_plain(_label(run, line)))


def _label(run: RunFigures, line: str) -> str:
    return run.rate if line == _OURS else f"{run.rate}, dashed"


def _finish_cdf(axes: Axes, objective_s: float) -> None:
    axes.axvline(objective_s, color="black", linewidth=1, linestyle=":")
    axes.set(xscale="log", xlabel="seconds to the first token", ylabel="share of the requests let in", ylim=(0, 1.02))
    axes.yaxis.set_major_formatter(ticker.PercentFormatter(1.0))
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)


def _draw_rates(axes: Axes, report: Report, line: str, values: Sequence[float | None], color: str) -> None:
    points = [(run.rate_per_s, value) for run, value in zip(report.runs, values, strict=True) if value is not None]
    axes.plot([x for x, _ in sorted(points)], [y for _, y in sorted(points)], line, marker="o", color=color)


def _finish_rates(axes: Axes, runs: Sequence[RunFigures], title: str, *, is_share: bool) -> None:
    axes.set(xscale="log", xlabel="requests sent per second", ylabel=title)
    axes.set_ylim(0, 1.02 if is_share else None)
    axes.set_xticks([run.rate_per_s for run in runs], [_plain(f"{run.rate}\n{run.rate_per_s:.3g}") for run in runs])
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    if is_share:
        axes.yaxis.set_major_formatter(ticker.PercentFormatter(1.0))
    axes.grid(alpha=0.3)


def _draw_timeline(axes: Axes, run: RunFigures) -> None:
    """The last run, by the second."""
    line = run.timeline
    for counts, label, color in (
        (line.sent, "sent", "tab:gray"),
        (line.let_in, "let in", _ATTAINMENT),
        (line.refused, "refused", _REFUSED),
    ):
        axes.plot(range(len(counts)), counts, drawstyle="steps-post", label=label, color=color)
    axes.set(xlabel=_plain(f"seconds since the begin of {run.rate}"), ylabel="requests in a second", ylim=(0, None))
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)


def _draw_ttfts(axes: Axes, reports: Sequence[tuple[Report, str]]) -> None:
    """Of the last run, and the other's: a dot for each request that was let in."""
    for report, line in reports:
        run = report.runs[-1]
        color, marker = (_GOODPUT, ".") if line == _OURS else ("tab:orange", "x")
        axes.scatter(
            [sent_s for sent_s, _ in run.ttfts],
            [max(_MIN_TTFT_S, wait_s) for _, wait_s in run.ttfts],
            s=14,
            marker=marker,
            color=color,
            label=_plain(run.rate if line == _OURS else f"{run.rate}, the other"),
        )
    axes.axhline(reports[0][0].ttft_s, color="black", linewidth=1, linestyle=":")
    axes.set(yscale="log", xlabel="sent, seconds since the begin", ylabel="seconds to the first token")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
