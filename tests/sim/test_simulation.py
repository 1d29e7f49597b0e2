"""The engine that serves holds in 2,000 virtual cells; engines with a planted fault do not hold for long."""

from functools import partial
from hashlib import sha256

import pytest

from serve_app.sim.many import run_many
from serve_app.sim.simulation import SimulationError, simulate
from serve_app.sim.world import Tally
from tests.sim.planted import CORES, MEMBERSHIPS, cell_of

NUM_SEEDS = 2_000
FOUND_WITHIN = 200  # seeds


def test_two_thousand_seeds_hold():
    total, failures = Tally(), {}
    for outcome in run_many(range(NUM_SEEDS), num_processes=2):
        total.add(outcome.tally)
        failures.update(outcome.failures)
    assert not failures, f"seeds that failed: {failures}"
    assert total.seeds == NUM_SEEDS
    # what was to be borne has happened
    assert min(total.deaths, total.freezes, total.engine_deaths, total.replays) > NUM_SEEDS / 2
    assert total.tokens > 20 * NUM_SEEDS


def logged(seed):
    lines = []
    tally = simulate(seed, trace=lines.append)
    return sha256("\n".join(lines).encode()).hexdigest(), tally, len(lines)


@pytest.mark.parametrize("seed", [3, 77])
def test_a_seed_is_the_same_run_each_time(seed):
    first = logged(seed)
    assert first[2] > 20
    assert logged(seed) == first


@pytest.mark.parametrize(
    "make",
    [partial(cell_of, core=core) for core in CORES] + [partial(cell_of, members=members) for members in MEMBERSHIPS],
    ids=[fault.__name__ for fault in CORES + MEMBERSHIPS],
)
def test_a_planted_fault_is_found(make, capsys):
    for seed in range(FOUND_WITHIN):
        try:
            simulate(seed, make)
        except SimulationError as error:
            with capsys.disabled():
                print(f"\n{error}")
            return
    pytest.fail(f"not found within {FOUND_WITHIN} seeds")
