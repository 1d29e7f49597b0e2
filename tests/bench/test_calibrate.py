"""A calibration end to end on a tiny model: real workers, a system that the planner reads, nothing left behind."""

import math

import pytest
import torch

from serve_app.bench.calibrate import remote, run
from serve_app.bench.calibrate.machine import Machine
from serve_app.bench.calibrate.rehearsal import rehearse
from serve_app.bench.calibrate.run import Served, bare_system, observations_of, precision_of
from serve_app.bench.calibrate.show import as_data, as_yaml, mended_tables, tables, write
from serve_app.bench.calibrate.steady import Load, Seen, seen
from serve_app.bench.calibrate.steps import step_of_parts
from serve_app.bench.measure import BenchError, Trace
from serve_app.engine.pace import Observed, Work
from serve_app.plan.closed_loop import step_of
from serve_app.plan.deployment import Deployment
from serve_app.plan.estimate import estimate
from serve_app.plan.fit import Case
from serve_app.plan.ops import Step
from serve_app.plan.systems import read_system
from serve_app.runtime.snapshot import PaceView, ReplicasPace
from tests.bench.test_cell import tiny, worker_processes
from tests.plan.test_fit import SPEC

__all__ = ["tiny"]

MACHINE = Machine("Test CPU", "cpu", 1, 2, {"bf16": 0.1, "fp32": 0.05}, 4.0, 10.0, 1.0)
LOADS = (Load(4, 24, 6), Load(1, 60, 4))


@pytest.fixture(scope="module")
def found(tiny):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "LOADS", LOADS)
        said = []
        calibrated = run.calibrate([tiny], 1, 1.0, said.append, [Deployment(), Deployment(pp=2)])
    assert said[-1] == "fitting"
    return calibrated


def test_a_calibration_makes_a_system_that_the_planner_reads(found, tmp_path):
    path = tmp_path / "this-machine.yaml"
    write(found.system, path)
    system = read_system(str(path))
    assert system == found.system
    assert system.kind == "cpu"
    assert system.efficiency.layer_us > 0
    assert system.ttft_interval.low < system.ttft_interval.high
    case = found.served[0].case
    told = estimate(case.cost(system), run.workload_of(LOADS[0]))
    assert 0 < told.ttft_s.low < told.ttft_s.value
    assert told.output_tokens_s > 0


def test_it_tells_how_well_it_fits(found):
    assert len(found.fitted.ratios) == len(found.observations)
    assert {o.kind for o in found.observations} == {"alone", "interval"}
    assert {one.case.deployment.pp for one in found.served} <= {1, 2}
    assert all(one.ttft_s > 0 and one.seen.ttft_s > 0 and one.seen.output_tokens_s > 0 for one in found.served)
    assert "link" in as_yaml(found.system)
    data = as_data(found)
    assert len(data["steps"]) == len(found.observations)
    assert [table.row_count > 0 for table in tables(found)] == [True] * 3


def test_no_worker_outlives_it(found):
    assert found.served
    assert worker_processes() == []


def test_a_running_cell_mends_the_system(found, tiny, monkeypatch):
    case, system = found.served[0].case, found.system
    works = [Work(0, 1 + i % 4, (1 + i % 4) * 0.03) for i in range(40)] + [Work(24, i % 3, 0.4) for i in range(10)]
    cost = case.cost(system)
    steps = [Observed(work, 2.0 * cost.interval_s(step_of(work))) for work in works]
    view = PaceView(tiny, 1, 1, 1, 512, [ReplicasPace(1, [], steps)])
    monkeypatch.setattr(remote, "ask", lambda url: view)
    mended = remote.mend("http://anywhere", system, None)
    assert mended.before.ratio == pytest.approx(2.0, rel=0.01)
    assert mended.after.ratio == pytest.approx(1.0, abs=0.1)
    assert len(list(mended_tables(mended))) == 2
    monkeypatch.setattr(remote, "ask", lambda url: PaceView(tiny, 1, 1, 1, 512, []))
    with pytest.raises(BenchError, match="has not observed a step"):
        remote.mend("http://anywhere", system, None)


def test_a_server_that_is_not_there_is_said():
    with pytest.raises(BenchError, match="does not answer"):
        remote.ask("http://127.0.0.1:9")


def test_what_was_not_measured_is_said():
    system = bare_system(MACHINE)
    assert "inter_gb_s is that of the loopback" in system.source
    assert system.peak_tflops == {"bf16": 0.1, "fp32": 0.05}
    assert (system.gpus_per_node, system.intra_gb_s, system.efficiency.kv_block) == (2, 1.0, 128.0)


def test_only_what_happened_while_all_places_were_taken_counts():
    traces = [Trace(0.0, [1.0, 2.0]), Trace(10.0, [12.0, 13.0, 15.0]), Trace(11.0, [12.0]), Trace(19.0, [])]
    row = seen(Load(2, 8, 3), traces, 5.0, 20.0, [])
    assert row.num_requests == 2
    assert row.ttft_s == pytest.approx((2.0 + 1.0) / 2)
    assert row.tpot_s == pytest.approx(1.5)
    assert row.output_tokens_s == pytest.approx(4 / 15)
    with pytest.raises(BenchError, match="came and went"):
        seen(Load(2, 8, 3), traces[:1], 5.0, 20.0, [])


def test_steps_of_one_size_become_one_and_outliers_none():
    case = Case(SPEC, precision_of(torch.device("cpu")), Deployment())
    alike = [Observed(Work(0, 8, 1.0 + i / 100), 0.05) for i in range(30)] + [Observed(Work(0, 8, 1.0), 5.0)]
    (only,) = observations_of(case, alike)
    assert only.seconds == pytest.approx(0.05)
    assert only.step.decode_rows == 8
    assert math.isclose(only.step.decode_kv, 1e3 * 1.145, rel_tol=0.1)
    several = [Observed(Work(0, rows, rows / 10), rows / 100) for rows in (1, 2, 4, 8) for _ in range(4)]
    assert sorted(o.step.decode_rows for o in observations_of(case, several)) == [1, 2, 4, 8]


def test_in_a_pipeline_only_steps_behind_their_like_are_told():
    case = Case(SPEC, precision_of(torch.device("cpu")), Deployment(pp=2))
    decode, prompt = Observed(Work(0, 8, 1.0), 0.05), Observed(Work(300, 0, 45.0), 0.4)
    (only,) = observations_of(case, [decode, decode, prompt, decode, decode, decode, prompt])
    assert (only.step.decode_rows, only.step.prompt_tokens, only.seconds) == (8, 0, pytest.approx(0.05))


def test_replicas_that_work_for_each_other_are_told_by_whole_runs():
    case = Case(SPEC, precision_of(torch.device("cpu")), Deployment(dp=2))
    observed = [Observed(Work(0, 1 + i % 7, 1.0), 0.05) for i in range(40)]
    runs = list(observations_of(case, observed))
    assert 1 < len(runs) <= 3
    assert all(run.seconds == pytest.approx(0.05 * len(run.steps)) for run in runs)
    few = Served(case, seen_of(Load(2, 50, 5), observed))
    assert list(few.observations()) == []
    assert len(list(Served(case, seen_of(Load(8, 50, 5), observed)).observations())) == len(runs)


def seen_of(load, observed):
    return Seen(load, 10, 1.0, 0.1, 10.0, observed)


def test_a_rehearsal_is_the_real_engine_at_the_models_prices():
    system = bare_system(MACHINE)
    for deployment in (Deployment(), Deployment(pp=2), Deployment(dp=2)):
        case = Case(SPEC, precision_of(torch.device("cpu")), deployment)
        cost = case.cost(system)
        alone = rehearse(case, system, Load(1, 40, 8))
        assert alone.ttft_s == pytest.approx(cost.latency_s(Step.prompt(40, sampled=1), num_peers=1), rel=0.05)
        assert alone.tpot_s == pytest.approx(cost.latency_s(Step.decode(1, 44), num_peers=1), rel=0.05)
        several = rehearse(case, system, Load(8, 40, 8))
        assert several.output_tokens_s > alone.output_tokens_s
        assert several.ttft_s > alone.ttft_s


def test_the_steps_that_are_run_are_those_that_are_priced():
    step = step_of_parts([(1, 99), (1, 199), (64, 128)])
    assert step == Step.decode(1, 100) + Step.decode(1, 200) + Step.prompt(64, 128, sampled=1)
