"""A benchmark of a cell of processes: real workers, a real trace, and nothing left behind."""

import json

import psutil
import pytest

from serve_app.bench.cell import CellBench
from serve_app.bench.measure import BenchError, Workload
from tests.model.families import make_tiny, make_tiny_tokenizer

WORKLOAD = Workload(batch=3, prompt_tokens=20, output_tokens=5)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny("mixtral", folder)
    make_tiny_tokenizer(folder, 512)
    return str(folder)


def worker_processes():
    return [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]


def test_a_cell_is_measured_and_traced_and_leaves_nothing_behind(tiny, tmp_path):
    trace = tmp_path / "trace.json"
    with CellBench(tiny, {"pp": 2, "dp": 1, "tp": 1}, 1, [WORKLOAD]) as cell:
        row = cell.run(WORKLOAD, lambda num_tokens: None)
        assert row.output_tokens_per_s > 0
        assert len(worker_processes()) == 2
        cell.trace(WORKLOAD, trace)
        assert all(resident > 0 for resident in cell.resident_bytes().values())
    assert worker_processes() == []
    events = json.loads(trace.read_text())["traceEvents"]
    assert [event["args"]["name"] for event in events if event["ph"] == "M"] == ["w0.0.0", "w1.0.0"]
    for row in (0, 1):
        names = {event["name"].split()[0] for event in events if event["ph"] == "X" and event["tid"] == row}
        assert {"step", "idle", "attention", "experts"} <= names
        steps = [event for event in events if event["tid"] == row and event["name"].startswith("step")]
        assert len(steps) >= WORKLOAD.output_tokens
        assert all(event["dur"] >= 0 for event in steps)


def test_a_worker_that_dies_ends_the_benchmark_with_a_word(tiny):
    with CellBench(tiny, {"pp": 2}, 1, [WORKLOAD]) as cell:
        worker_processes()[0].kill()
        with pytest.raises(BenchError, match="ended with status -9"):
            cell.run(WORKLOAD, lambda num_tokens: None)
