"""How well the planner's cost model ranks and predicts: against 5,221 measured serving runs of other engines.

    python -m benchmarks.planner_accuracy [--cache FOLDER] [--every 1] [--json FILE]

The runs are those that the wheel `aiconfigurator-core` 0.12.0 ships; it is downloaded once (82 MB). What cannot be
asked of our planner is counted first, with the reason. The coefficients that predict a model are fitted to the runs of
other models only: on the same engine, and, as for an engine that nobody has measured, on the other engines.
Exits with 1 where an order is below its bar.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import ranking, roofline, silicon
from benchmarks.ranking import Errors, Order
from benchmarks.roofline import Fold, Prediction
from benchmarks.silicon import Row

SEED = 6
NUM_FITTED = 300  # rows of each fit
NUM_RANDOM_PAIRS = 20_000
BARS = {"TTFT": 0.93, "TPOT": 0.97}
WAYS = {
    "same_engine": "fitted to other models on the engine",
    "other_engines": "fitted to other models on other engines",
    "shipped": "default coefficients",
}
MEASURES: dict[str, Callable[[Row | Prediction], float]] = {
    "TTFT": lambda one: one.ttft_s,
    "TPOT": lambda one: one.tpot_s,
}


def _engine(row: Row) -> tuple[Hashable, ...]:
    """And the checkpoint that it serves."""
    return row.model, row.dense_dtype, row.expert_dtype, row.system, row.backend, row.version


def _layout(row: Row) -> tuple[Hashable, ...]:
    return *_engine(row), row.tp, row.dp, row.moe_ep


# What the two rows of a pair have in common. The first is what a planner is asked: its candidates share the rest.
PAIRS: dict[str, Callable[[Row], Hashable]] = {
    "checkpoint, engine version, GPU, lengths": lambda row: (*_engine(row), row.isl, row.osl),
    "the same and concurrency: layouts only": lambda row: (*_engine(row), row.isl, row.osl, row.concurrency),
    "model, engine of any version, GPU, lengths": lambda row: (row.model, row.system, row.backend, row.isl, row.osl),
    "engine of any version": lambda row: row.backend,
}
# AIConfigurator 0.12.0 with its newest database, run once on 183 random rows of H100 and H200: not our rows one by one.
PEER = {"TTFT": (0.426, 0.386, 0.83, -0.29, 206, 0.89), "TPOT": (0.260, 0.150, 0.61, 0.045, 205, 0.97)}


@dataclass(frozen=True)
class Told:
    """A row, and what was said of it in each of WAYS."""

    row: Row
    said: dict[str, Prediction]

    @property
    def fits(self) -> bool:
        return all(one.fits for one in self.said.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "octavo-planner-accuracy")
    parser.add_argument("--every", type=int, default=1, help="predict each so manieth row only")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows, left_out = silicon.read_rows(silicon.fetch(options.cache))
    print(f"{len(rows) + sum(left_out.values()):,} rows, {len(rows):,} of them asked about. Left out:")
    for why, num in left_out.most_common():
        print(f"  {num:5,}  {why}")
    told = [one for fold in roofline.folds(rows) for one in tell(fold, options.every)]
    found = [one for one in told if one.fits]
    print(f"{len(told) - len(found)} rows more are left out: predicted not to fit into memory, though they ran.")
    report = {"errors": show_errors(found), "order": show_orders(found)}
    show_ceiling(found)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))
    return 0 if show_verdict(found) else 1


def tell(fold: Fold, every: int = 1) -> list[Told]:
    same = roofline.fit(roofline.balanced(fold.same_engine, NUM_FITTED, SEED))
    other = roofline.fit(roofline.balanced(fold.other_engines, NUM_FITTED, SEED))
    shown = ", ".join(f"{name} {value:.3g}" for name, value in roofline.coefficients_of(same).items())
    print(f"{fold.model} on {fold.backend}, from the others: {shown}", flush=True)
    return [
        Told(
            row,
            {
                "same_engine": roofline.predicted(row, roofline.coefficients_of(same, row.is_blackwell)),
                "other_engines": roofline.predicted(row, roofline.coefficients_of(other, row.is_blackwell)),
                "shipped": roofline.as_shipped(row),
            },
        )
        for row in fold.own[::every]
    ]


# -- parts of the rows ----------------------------------------------------------------------------------------------


def sources(told: Sequence[Told]) -> dict[str, list[Told]]:
    """By who measured, and the peer's GPUs. How InferenceX loads its servers is published, of the rest it is not."""
    return {
        "all": list(told),
        "InferenceX's": [one for one in told if one.row.is_sweep],
        "InferenceX's, shapes exact": [one for one in told if one.row.is_sweep and one.row.is_exact],
        "other runs": [one for one in told if not one.row.is_sweep],
        "H100, H200": [one for one in told if not one.row.is_blackwell],
    }


def kinds(told: Sequence[Told]) -> dict[str, list[Told]]:
    parts = sources(told)
    parts["all, none predicted short of memory"] = [one for one in told if not one.said["same_engine"].is_overloaded]
    for backend in sorted({one.row.backend for one in told}):
        parts[backend] = [one for one in told if one.row.backend == backend]
    for model in silicon.SPECS:
        stands = "" if model in silicon.EXACT else " (stood in for)"
        parts[model + stands] = [one for one in told if one.row.model == model]
    return {title: part for title, part in parts.items() if part}


# -- tables ---------------------------------------------------------------------------------------------------------


def errors(told: Sequence[Told], name: str, way: str = "same_engine") -> Errors:
    measured, said = _values(told, name, way)
    return ranking.errors_of(measured, said)


def _values(told: Sequence[Told], name: str, way: str) -> tuple[list[float], list[float]]:
    measure = MEASURES[name]
    return [measure(one.row) for one in told], [measure(one.said[way]) for one in told]


def show_errors(told: Sequence[Told]) -> dict[str, dict[str, float]]:
    print("\n| rows | coefficients | | rows | mean error | median | p90 | signed | nine of ten: measured/predicted |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    parts = [("all", way, told) for way in WAYS]
    parts += [(title, "same_engine", part) for title, part in kinds(told).items() if title != "all"]
    report = {}
    for title, way, part in parts:
        for name in MEASURES:
            found = errors(part, name, way)
            report[f"{title}, {way}, {name}"] = asdict(found)
            print(f"| {title} | {WAYS[way]} | {name} | {_cells(found)} |")
    for name, (mean, median, p90, signed, *_) in PEER.items():
        print(
            f"| H100, H200 | the peer | {name} | 183 | {mean:.1%} | {median:.1%} | {p90:.0%} | {signed:+.1%} | none |"
        )
    return report


def _cells(found: Errors) -> str:
    return (
        f"{found.num:,} | {found.mean:.1%} | {found.median:.1%} | {found.p90:.0%} | {found.signed:+.1%} "
        f"| {found.low:.2f} to {found.high:.2f}"
    )


def show_orders(told: Sequence[Told]) -> dict[str, dict[str, float]]:
    print(
        "\n| pairs over 10 % apart that share | rows | | pairs | in order | 90 % | "
        + " | ".join(list(WAYS.values())[1:])
        + " |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    report = {}
    for title in PAIRS:
        for source, part in sources(told).items():
            for name in MEASURES:
                (found, spread), *rest = (order(part, title, name, way) for way in WAYS)
                low, high = spread
                report[f"{title}, {source}, {name}"] = asdict(found) | {"share": found.share, "low": low, "high": high}
                others = " | ".join(f"{one.share:.1%}" for one, _ in rest)
                between = "" if math.isnan(low) else f"{low:.1%} to {high:.1%}"
                print(
                    f"| {title} | {source} | {name} | {found.num_pairs:,} | {found.share:.1%} | {between} | {others} |"
                )
    for name, (*_, num, share) in PEER.items():
        print(f"| random pairs, the peer | 183 of H100, H200 | {name} | {num} | {share:.0%} | | | |")
    return report


def order(told: Sequence[Told], title: str, name: str, way: str = "same_engine") -> tuple[Order, tuple[float, float]]:
    """Of all pairs, and where it would be with 90 % if other groups had been measured; of random pairs where a group
    is a whole backend, and no such spread."""
    measured, said = _values(told, name, way)
    groups = ranking.groups_of(told, lambda one: PAIRS[title](one.row))
    if title == "engine of any version":
        pairs = ranking.random_pairs(groups, NUM_RANDOM_PAIRS, SEED)
        return ranking.order_of(pairs, measured, said), (math.nan, math.nan)
    orders = ranking.orders_in(groups, measured, said)
    return sum(orders, Order()), ranking.spread_of(orders, SEED)


def show_ceiling(told: Sequence[Told]) -> None:
    """How often measurements of one layout grow with the load: who predicts that they do is wrong in the rest."""
    print("\nOf two runs of one layout, the one with more sequences at a time has the longer time:")
    for source, part in sources(told).items():
        groups = ranking.groups_of(part, lambda one: (*_layout(one.row), one.row.isl, one.row.osl))
        concurrency = [float(one.row.concurrency) for one in part]
        for name, measure in MEASURES.items():
            measured = [measure(one.row) for one in part]
            found = sum(ranking.orders_in(groups, measured, concurrency), Order())
            print(f"  {name} {found.share:.1%} of {found.num_pairs:,} pairs over 10 % apart ({source})")


def show_verdict(told: Sequence[Told]) -> bool:
    """Whether the first of PAIRS is in order as often as the bars ask, over all rows."""
    print()
    is_met = True
    for name, bar in BARS.items():
        shares = {source: order(part, next(iter(PAIRS)), name)[0].share for source, part in sources(told).items()}
        met = shares["all"] >= bar
        shown = ", ".join(f"{source} {share:.1%}" for source, share in shares.items())
        print(f"{name}, bar {bar:.0%}: {'met' if met else 'not met'} ({shown})")
        is_met = is_met and met
    return is_met


if __name__ == "__main__":
    sys.exit(main())
