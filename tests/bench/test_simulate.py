"""`octavo simulate serve`: a plan's steps cost what the planner says, and its figures are those of a load test."""

import json
from dataclasses import replace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from serve_app import cli
from serve_app.bench.serve.report import read_report
from serve_app.bench.serve.verdict import Run
from serve_app.bench.simulate.figures import judge
from serve_app.bench.simulate.loads import draw_pairs, read_loss
from serve_app.bench.simulate.plan_costs import PlanCosts
from serve_app.bench.simulate.subject import Wanted, find_subject, read_config, read_pace
from serve_app.engine.pace import dot, fit
from serve_app.engine.request import Emission
from serve_app.errors import ConfigError, PlanError
from serve_app.plan.counts import Precision
from serve_app.plan.deployment import Deployment
from serve_app.plan.estimate import Cost
from serve_app.plan.inputs import read_model
from serve_app.plan.ops import Step
from serve_app.plan.system import Efficiency, System
from serve_app.plan.workload import Lengths
from serve_app.sim.serving.costs import StepWork
from serve_app.sim.serving.ledger import Ledger, Load
from serve_app.sim.serving.losses import Phases
from serve_app.sim.serving.many import Simulation, serve

SYSTEM = System(
    name="made",
    source="made up",
    peak_tflops={"bf16": 100},
    memory_gb=64,
    memory_gb_s=1000,
    intra_gb_s=100,
    inter_gb_s=10,
    efficiency=Efficiency(layer_us=3, step_us=20, row_us=1, attention_mfu=0.3, attention_bandwidth=0.5),
    contention={1: 1.0, 4: 2.0, 16: 6.0},
)
SPEC = read_model("reference-small")
PLANNED = ("--preset", "reference-small", "--layout", "tp1,pp2,dp2,cells2", "--system", "h100")


@pytest.fixture
def octavo():
    def run(*args):
        return CliRunner().invoke(cli.app, ["simulate", "serve", *map(str, args)])

    return run


@pytest.fixture
def pace(tmp_path):
    """A calibration's file: 0.1 s a step, 4 ms a prompt token, 10 ms a row."""
    steps = [[[n, r, 0.0], 0.1 + 0.004 * n + 0.01 * r] for n in (0, 64, 192, 384) for r in (0, 1, 8) if n + r]
    path = tmp_path / "pace.json"
    path.write_text(json.dumps(steps))
    return path


# -- costs ------------------------------------------------------------------------------------------------------------


@given(
    prompt=st.integers(0, 8_192),
    start=st.integers(0, 20_000),
    rows=st.integers(0, 512),
    context=st.integers(1, 20_000),
    num_busy=st.integers(1, 4),
    layout=st.sampled_from([Deployment(1, 1, 1), Deployment(4, 4, 2), Deployment(2, 3, 4), Deployment(1, 1, 16)]),
    kv_block=st.sampled_from([0.0, 256.0]),
)
def test_a_stage_takes_what_the_planner_says(prompt, start, rows, context, num_busy, layout, kv_block):
    system = SYSTEM.model_copy(update={"efficiency": SYSTEM.efficiency.model_copy(update={"kv_block": kv_block})})
    cost = Cost(SPEC, Precision(), system, layout)
    costs = PlanCosts(cost)
    step = Step.prompt(prompt, start, sampled=1.0) if prompt else Step()
    if rows:
        step += Step.decode(rows, context)
    work = StepWork(prompt, step.pairs, int(step.prompt_kv), rows, int(step.decode_kv), int(step.sampled))
    for _ in range(2):  # the second time it is remembered
        for number, stage in enumerate(cost.stages):
            seconds = stage.seconds(step, num_peers=num_busy)
            assert costs.stage_s(number, work, num_busy) == pytest.approx(seconds, rel=1e-9)


def test_workers_slow_each_other_down_as_the_system_says():
    costs = PlanCosts(Cost(SPEC, Precision(), SYSTEM, Deployment(2, 2, 4)))  # 16 workers, of which 8 are on one node
    assert [costs.slowdown(num) for num in (1, 2, 4, 8)] == [0.5, 1.0, 1.0, 1.0]
    calm = SYSTEM.model_copy(update={"contention": {}})
    assert PlanCosts(Cost(SPEC, Precision(), calm, Deployment(2, 2, 4))).slowdown(3) == 1.0


def test_a_calibration_gives_its_costs_back(pace):
    seen = read_pace(pace)
    costs = fit(seen, [1.0] * len(seen))
    assert dot(costs, (1.0, 300.0, 5.0, 0.0)) == pytest.approx(0.1 + 1.2 + 0.05, rel=0.02)


def test_a_replica_has_no_more_pages_than_could_ever_be_of_use():
    """They are kept in lists; with ten times as many all would come out the same."""
    lengths = Lengths.of([(100, 1), (700, 1)])
    wanted = Wanted(
        None, "reference-small", "tp1,pp2,dp2", None, "h100", "bf16", None, 0, lengths, lengths, 0.05, True, 512, 6
    )
    setup = find_subject(wanted).setup
    assert setup.num_pages == 6 * (-(-1_400 // 32) + 1) + 1
    pairs = draw_pairs(lengths, lengths, seed=3)
    load = Load.of((0.002 * i, *next(pairs)) for i in range(120))
    few, many = (serve(Simulation(replace(setup, num_pages=times * setup.num_pages)), load).ledger for times in (1, 10))
    assert 0 < few.reasons.total() < 120
    assert (few.last_s.tobytes(), few.reasons) == (many.last_s.tobytes(), many.reasons)


# -- figures ----------------------------------------------------------------------------------------------------------


def test_figures_are_those_of_a_load_test():
    load = Load.of([(0.0, 10, 3), (1.0, 10, 2), (2.0, 10, 2), (3.0, 10, 1), (4.0, 10, 2)])
    ledger = Ledger(5)
    for number, at_s in enumerate(load.at_s):
        ledger.ask(number, at_s)
    for rid, first, at_s, finish in (
        ("0", 0, 1.0, None),
        ("0", 1, 2.0, None),
        ("1", 0, 3.5, None),
        ("0", 2, 4.0, "length"),
        ("1", 1, 4.5, "length"),
    ):
        ledger.hear(Emission(rid, first, [7], [], 0, finish), at_s)
    ledger.refuse(2, "ttft")
    ledger.hear(Emission("3", 0, [], [], 0, "abort"), 9.0)
    ledger.refuse(4, "ttft")
    ledger.ask(4, 6.0)
    ledger.hear(Emission("4", 0, [7], [], 0, None), 7.0)
    ledger.hear(Emission("4", 1, [7], [], 0, "length"), 9.0)
    found = judge(Run("1x", 1.0, "poisson", 5.0), load, ledger, 2.0)
    assert (found.sent, found.admitted, found.refused, found.gave_up, found.errors) == (5, 4, 1, 1, 0)
    assert found.attainment == 2 / 4, "the first, and the last since it came back; the second was late"
    assert found.goodput_per_s == 2 / 9.0
    assert found.goodput_tokens_per_s == 5 / 9.0
    assert (found.ttft_p50_s, found.ttft_p99_s) == (1.0, 6.0), "who gave up counts with what it waited"
    assert found.itl_p99_s == pytest.approx(2.0, rel=0.01)
    assert (found.reasons, found.refusals, found.retried, found.retry_admitted) == ({"ttft": 2}, 2, 1, 1.0)
    assert found.timeline.sent == [1, 1, 1, 1, 1, 0, 1]
    assert found.timeline.refused == [0, 0, 1, 0, 1, 0, 0]
    assert found.timeline.let_in == [1, 1, 0, 1, 0, 0, 1]


def test_lengths_are_drawn_as_often_as_they_weigh():
    pairs = draw_pairs(Lengths.of([(10, 1), (1_000, 3)]), Lengths.fixed(5), seed=1)
    drawn = [next(pairs) for _ in range(4_000)]
    assert {answer for _, answer in drawn} == {5}
    assert sum(prompt == 1_000 for prompt, _ in drawn) == pytest.approx(3_000, abs=120)


# -- losses -----------------------------------------------------------------------------------------------------------


def test_a_loss_takes_its_phases_from_the_plan_unless_told():
    loss = read_loss("t=30, worker=5, load=2.5", Phases(0.1, 0.2, 0.3, 0.4), 2, 8)
    assert (loss.at_s, loss.cell, loss.worker, loss.phases) == (30.0, 0, 5, Phases(0.1, 0.2, 2.5, 0.4))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("t=30", "worker is missing"),
        ("worker=1", "t is missing"),
        ("t=1,worker=8", "worker must be below 8"),
        ("t=1,worker=1,cell=2", "cell must be below 2"),
        ("t=-1,worker=1", "t must be 0 or more"),
        ("t=nan,worker=1", "t must be 0 or more"),
        ("t=soon,worker=1", "'soon' is no number"),
        ("t=1,worker=1,pause=3", "'pause' is none of"),
    ],
)
def test_a_loss_that_cannot_be_is_refused(text, words):
    with pytest.raises(PlanError, match=words):
        read_loss(text, Phases(), 2, 8)


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_same_options_are_the_same_report_and_a_load_test_can_read_it(octavo, tmp_path):
    options = (*PLANNED, "--isl", "64:512", "--osl", 8, "--requests", 60, "--rate", 40, "--kill", "t=0.5,worker=1")
    one, other = octavo(*options, "--json", "--processes", 1), octavo(*options, "--json", "--processes", 1)
    assert one.exit_code == 0, one.output
    assert one.stdout == other.stdout
    path = tmp_path / "report.json"
    path.write_text(one.stdout)
    (run,) = read_report(path).runs
    assert 40 < run.sent == run.admitted < 80
    assert run.attainment == 1.0
    found = json.loads(one.stdout)
    assert (found["num_gpus"], found["deployment"]) == (8, "2 x (TP1 PP2 DP2 EP2)")
    (outage,) = found["outages"]
    assert outage["replica"] == 1
    assert 0 < outage["pause_s"] < outage["whole_s"] < 60
    assert "simulated in" in one.stderr


def test_a_load_is_recorded_and_replayed_and_its_pipeline_traced(octavo, tmp_path):
    record, chrome = tmp_path / "load.jsonl", tmp_path / "trace.json"
    options = (*PLANNED, "--json", "--processes", 1)
    one = octavo(*options, "--requests", 30, "--rate", 20, "--osl", 4, "--record", record, "--pattern", "burst")
    other = octavo(*options, "--trace", record, "--chrome-trace", chrome)
    ones, others = (json.loads(result.stdout)["runs"][0] for result in (one, other))
    assert ones["ttfts"] == others["ttfts"]
    assert ones["itl_p99_s"] == others["itl_p99_s"]
    assert (ones["pattern"], others["pattern"]) == ("burst", "trace")
    names = {event["args"]["name"] for event in json.loads(chrome.read_text())["traceEvents"] if event["ph"] == "M"}
    assert {"cell 0 replica 0 stage 0", "cell 0 replica 0 stage 1"} <= names


def test_a_config_with_a_measured_pace(octavo, pace, tmp_path):
    """A prompt of 64 tokens goes through two stages of 0.1 + 0.256 s each."""
    config = tmp_path / "config.yaml"
    args = {"model": "reference-10b", "layout": {"pp": 2, "dp": 2}, "worker": {"kv_gib": 8.0}}
    application = {"name": "octavo", "import_path": "serve_app.app:build", "args": args}
    config.write_text(yaml.safe_dump({"applications": [application]}))
    options = ("--config", config, "--pace", pace, "--isl", 64, "--osl", 2, "--json", "--processes", 1)
    alone = json.loads(octavo(*options, "--requests", 12, "--rate", 0.05, "--seed", 2).stdout)
    (run,) = alone["runs"]
    assert run["ttft_p50_s"] == pytest.approx(2 * 0.356, rel=0.05)
    crowd = json.loads(octavo(*options, "--requests", 200, "--rate", "3x").stdout)
    full_s = 0.1 + 512 * 0.004 + 8 * 0.01  # a step with eight prompts
    assert crowd["capacity"]["requests_per_s"] == pytest.approx(2 * 8 / full_s, rel=0.1)
    assert crowd["attainment"] >= 0.99
    assert crowd["refused"] > 20
    wide = json.loads(octavo(*options, "--requests", 40, "--rate", 9, "--no-admission").stdout)
    assert wide["refused"] == 0


@pytest.mark.parametrize(
    ("args", "words", "status"),
    [
        (("--preset", "reference-small", "--system", "h100"), "--layout is missing", 2),
        (("--system", "h100"), "either --config, or --model", 2),
        (("--preset", "reference-small", "--layout", "tp1"), "either --system", 2),
        (("--preset", "no-such", "--layout", "tp1", "--system", "h100"), "no-such", 2),
        (("--preset", "reference-small", "--layout", "tp1", "--system", "h1000"), "h1000", 2),
        (("--preset", "reference-small", "--layout", "tp64", "--system", "h100"), "does not fit the model", 2),
        ((*PLANNED, "--kill", "t=1,worker=99"), "worker must be below 4", 2),
        ((*PLANNED, "--rate", "fast"), "--rate fast is no rate", 1),
        ((*PLANNED, "--compare", "x.json"), "say where, with --plot", 1),
        ((*PLANNED, "--pace", "x.json"), "either --system", 2),
        ((*PLANNED, "--chrome-trace", "t.json", "--chrome-cell", 2), "there are 2 cells", 2),
        (("--config", "no-such.yaml", "--system", "h100"), "no-such.yaml cannot be read", 1),
    ],
)
def test_what_cannot_be_simulated_is_refused_in_a_sentence(octavo, args, words, status):
    error = octavo(*args).exception
    assert words in str(error)
    assert error.status == status


def test_options_of_the_group_do_not_go_before_serve():
    result = CliRunner().invoke(cli.app, ["simulate", "--seeds", "3", "serve", *PLANNED])
    assert "--seeds is for" in str(result.exception)


def test_files_of_something_else_are_refused(tmp_path):
    path = tmp_path / "x"
    for content, words in (("{}", "no calibration"), ("[]", "too few"), ('[[[1,2,"x"],3]]', "no calibration")):
        path.write_text(content)
        with pytest.raises(PlanError, match=words):
            read_pace(path)
    for content, words in (("a: [", "not YAML"), ("[]", "no Ray Serve config"), ("applications: []", "has no appl")):
        path.write_text(content)
        with pytest.raises(ConfigError, match=words):
            read_config(path)
