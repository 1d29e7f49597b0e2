"""`octavo simulate` says what it ran through, and how to see a failure again."""

import json

import pytest
from typer.testing import CliRunner

from serve_app import cli
from serve_app.sim import many, show
from serve_app.sim.simulation import SimulationError, simulate


@pytest.fixture
def octavo():
    return lambda *args: CliRunner().invoke(cli.app, ["simulate", *map(str, args)])


def fail_at(seed):
    def run(which, **options):
        if which == seed:
            raise SimulationError(seed, "r1 ends twice")
        return simulate(which, **options)

    return run


def test_totals_come_as_json(octavo):
    result = octavo("--seeds", 8, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["tally"]["seeds"] == 8
    assert found["tally"]["tokens"] > 100
    assert found["failures"] == {}


def test_a_failure_names_the_command_that_replays_it(octavo, monkeypatch):
    monkeypatch.setattr(many, "simulate", fail_at(5))
    result = octavo("--seeds", 8)
    assert result.exit_code == 1
    assert "seed 5: r1 ends twice" in result.stderr
    assert "octavo simulate --seeds 1 --first-seed 5 --trace" in result.stderr
    assert result.stdout.startswith("8 seeds, ")


def test_a_trace_is_printed_up_to_the_failure(octavo, monkeypatch):
    monkeypatch.setattr(show, "simulate", fail_at(2))
    result = octavo("--seeds", 2, "--first-seed", 1, "--trace")
    assert result.exit_code == 1
    assert "engine 1 starts" in result.stdout
    assert "seed 2: r1 ends twice" in result.stderr


def test_a_trace_is_not_json(octavo):
    result = octavo("--seeds", 1, "--trace", "--json")
    assert result.exit_code == 1
    assert "leave --json out" in str(result.exception)
