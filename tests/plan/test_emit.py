"""What is emitted is a config that starts, says what it was planned from, and is the same for the same plan."""

import math
import os
from dataclasses import replace

import pytest
import yaml

from serve_app.config import parse_config
from serve_app.errors import PlanError
from serve_app.experts.layout import stage_layers
from serve_app.fetch.demo import put_demo_tokenizer
from serve_app.fetch.progress import silent
from serve_app.fetch.reference import CONFIG
from serve_app.fetch.write import header, num_bytes, write_configs
from serve_app.model.files import expected_tensors
from serve_app.model.spec import parse_config as parse_model
from serve_app.model.spec import read_spec
from serve_app.plan import emit as emitted
from serve_app.plan.admission import budgets
from serve_app.plan.counts import Precision
from serve_app.plan.deployment import Deployment
from serve_app.plan.emit import arguments, emit, file_name, write
from serve_app.plan.estimate import Cost, estimate
from serve_app.plan.system import System
from serve_app.plan.workload import Lengths, Objective, Workload
from serve_app.runtime import wire
from serve_app.runtime.settings import check, max_context_tokens, slo_config, slots_of
from tests.plan.cases import BETTER, FP16, R10B, REFERENCE, SEED

CHAT = Workload(Lengths.fixed(10_240), Lengths.fixed(128), objective=Objective(ttft_s=10.0))
SEED_COST = Cost(R10B, FP16, REFERENCE, SEED)
LAPTOP = System(
    name="laptop",
    source="a guess, for tests",
    kind="cpu",
    peak_tflops={"bf16": 4.0, "fp32": 2.0},
    memory_gb=8,
    memory_gb_s=20,
    intra_gb_s=1,
    inter_gb_s=1,
)
SHORT = Workload(Lengths.uniform(16, 2_000), Lengths.uniform(8, 64), 8, chunk_tokens=512, objective=CHAT.objective)


@pytest.fixture(scope="module")
def hollow_reference(demo_folder, tmp_path_factory):
    """The reference model with all its headers and, instead of weights, a hole in the file."""
    folder = tmp_path_factory.mktemp("hollow")
    write_configs(CONFIG, folder)
    put_demo_tokenizer(folder, silent)
    tensors = expected_tensors(parse_model(CONFIG))
    (folder / "model.safetensors").write_bytes(head := header(tensors.values()))
    os.truncate(folder / "model.safetensors", len(head) + num_bytes(tensors))
    return folder


def text_of(cost, workload=CHAT, model="org/model", ttft_s=10.0):
    return emit(cost, workload, estimate(cost, workload), budgets(cost, workload, ttft_s), model=model)


def args_of(text):
    (application,) = yaml.safe_load(text)["applications"]
    assert application["import_path"] == "serve_app.app:build"
    return application["args"]


def kv_tokens(config, spec):
    """Tokens that a worker of the largest stage has KV pages for."""
    num_layers = max(map(len, stage_layers(spec.num_layers, config.layout.pp)))
    value_bytes = {"bfloat16": 2, "float32": 4}[config.dtype]
    num_kv_heads = math.ceil(spec.num_kv_heads / config.layout.tp)
    page_bytes = 2 * num_layers * config.scheduler.page_tokens * num_kv_heads * spec.head_dim * value_bytes
    return int(config.worker.kv_gib * 2**30) // page_bytes * config.scheduler.page_tokens


@pytest.mark.parametrize("which", ["demo", "reference"])
@pytest.mark.parametrize(
    "deployment",
    [
        Deployment(),
        Deployment(pp=2),
        Deployment(pp=2, dp=2, standby=2, spares=1),
        Deployment(tp=2, pp=3, dp=3),
        Deployment(4, 4, 2, standby=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_what_is_emitted_can_be_served(which, deployment, precision, demo_folder, hollow_reference):
    folder = demo_folder if which == "demo" else hollow_reference
    spec = read_spec(folder)
    cost = Cost(spec, Precision(*[precision] * 4), LAPTOP, deployment)
    config = parse_config(args_of(text_of(cost, SHORT, model=which)))
    assert check(config.model_copy(update={"model": str(folder)})) == spec
    assert (config.layout.tp, config.layout.pp, config.layout.dp) == (deployment.tp, deployment.pp, deployment.dp)
    assert slots_of(config, spec) == deployment.slots(spec)
    assert config.worker.num_gpus == 0 and config.device == "cpu"
    room = kv_tokens(config, spec)
    assert room >= max_context_tokens(config, spec) >= SHORT.most_tokens
    assert room >= config.scheduler.max_running * SHORT.most_tokens, "as many as may run at a time"


def test_the_same_plan_is_the_same_bytes_and_another_is_not():
    again = text_of(Cost(R10B, FP16, REFERENCE.model_copy(), Deployment(4, 4, 2, standby=2)))
    assert text_of(SEED_COST).encode() == again.encode()
    assert text_of(replace(SEED_COST, deployment=replace(SEED, standby=1))) != again


def test_it_parses_to_what_was_planned():
    tokens = budgets(SEED_COST, CHAT, 10.0)
    config = parse_config(args_of(text_of(SEED_COST)))
    assert config.model == "org/model" and config.device == "cuda" and config.dtype == "bfloat16"
    assert config.layout.model_dump() == {"tp": 4, "pp": 4, "dp": 2, "stage_layers": None}
    assert (config.worker.primary_slots, config.worker.standby_slots, config.worker.num_gpus) == (8, 2, 1)
    assert config.scheduler.max_step_tokens == CHAT.chunk_tokens
    assert config.limits.max_queued_tokens == tokens[2]
    assert config.limits.queued_tokens_by_replicas == {1: tokens[1]}
    assert [slo_config(config).queued_tokens(num) for num in (1, 2)] == [tokens[1], tokens[2]]
    assert config.slo.ttft_s == 10.0 and config.slo.itl_ms is None
    fitting = estimate(SEED_COST, CHAT).kv_tokens
    assert 0.95 * fitting < kv_tokens(config, R10B) <= fitting
    assert (
        config.num_ingress * config.limits.max_connections
        >= 2 * config.scheduler.max_running + config.limits.max_queued
    )


def test_a_shorter_objective_between_tokens_comes_along():
    workload = replace(CHAT, objective=Objective(ttft_s=5, tpot_ms=40))
    config = parse_config(args_of(text_of(SEED_COST, workload, ttft_s=5.0)))
    assert (config.slo.ttft_s, config.slo.itl_ms) == (5.0, 40.0)


def test_without_an_objective_everybody_is_let_in():
    workload = replace(CHAT, objective=Objective())
    config = parse_config(args_of(text_of(SEED_COST, workload)))
    assert config.slo.ttft_s is None and config.limits.queued_tokens_by_replicas is None


def test_stages_that_differ_are_written_out():
    args = args_of(text_of(replace(SEED_COST, deployment=Deployment(tp=2, pp=3, spares=2))))
    assert args["layout"]["stage_layers"] == [5, 6, 5]
    assert args["resilience"] == {"spares": 2}
    assert "stage_layers" not in args_of(text_of(SEED_COST))["layout"]


def test_the_longest_prompt_is_not_refused_for_its_length_alone():
    workload = replace(CHAT, isl=Lengths.of([(1_000, 0.999), (30_000, 0.001)]), objective=Objective(ttft_s=0.12))
    tokens = budgets(SEED_COST, workload, 0.12)
    assert 0 < tokens[1] < 30_000, "else the case is no test"
    config = parse_config(args_of(text_of(SEED_COST, workload, ttft_s=0.12)))
    assert config.limits.queued_tokens_by_replicas == {1: 30_000}


def test_the_head_says_what_was_planned_from_what():
    text = text_of(SEED_COST)
    head = text[: text.index("proxy_location")].splitlines()
    assert all(line.startswith("#") for line in head)
    found = estimate(SEED_COST, CHAT)
    for words in ("org/model on 32 x reference", "10.568 B parameters", "TP 4 x PP 4 x DP 2", "within 10 s"):
        assert any(words in line for line in head), words
    assert any(f"{found.output_tokens_s:,.0f} output tokens/s" in line for line in head)
    assert any("has not been calibrated" in line for line in head)
    assert any(f"{budgets(SEED_COST, CHAT, 10.0)[2]:,} prompt tokens may wait" in line for line in head)


def test_one_cell_of_several_is_written_and_the_others_are_named():
    text = text_of(replace(SEED_COST, deployment=BETTER))
    assert "one cell of 4 that are planned, for 32 workers in all" in text
    assert args_of(text)["layout"] == {"tp": 4, "pp": 1, "dp": 2}
    assert "cell of" not in text_of(SEED_COST)


def test_names_cannot_break_out_of_the_comment():
    system = REFERENCE.model_copy(update={"name": "a\nproxy_location: Disabled\u2028x\x00", "source": "b\r\nc: 1"})
    text = text_of(replace(SEED_COST, system=system), model="m: [x]\n# y")
    assert yaml.safe_load(text)["proxy_location"] == "HeadOnly"
    assert args_of(text)["model"] == "m: [x]\n# y"


def test_what_octavo_does_not_compute_in_is_not_written():
    cost = replace(SEED_COST, precision=Precision("bf16", "fp8", "bf16", "fp16"))
    with pytest.raises(PlanError, match=r"experts in fp8 .* can be planned, and not be served yet"):
        text_of(cost)


def test_steps_too_large_for_a_message_are_not_written():
    assert (wire.MAX_PART_BYTES, parse_config({}).scheduler.page_tokens) == (emitted.MESSAGE_BYTES, emitted.PAGE_TOKENS)
    most = wire.MAX_PART_BYTES // (R10B.hidden_size * 4)
    with pytest.raises(PlanError, match=f"plan with at most {most}"):
        text_of(SEED_COST, replace(CHAT, chunk_tokens=most + 1))


def test_an_objective_that_a_prompt_alone_misses_is_not_written():
    workload = replace(CHAT, objective=Objective(ttft_s=0.01))
    with pytest.raises(PlanError, match=r"one of 10240 tokens takes longer than the objective of 0\.01 s"):
        text_of(SEED_COST, workload, ttft_s=0.01)


def test_a_layout_that_does_not_fit_is_not_written():
    small = replace(SEED_COST, system=REFERENCE.model_copy(update={"memory_gb": 5.0}))
    with pytest.raises(PlanError, match="holds not even one sequence"):
        arguments(small, CHAT, estimate(small, CHAT), {1: 1, 2: 2}, model="m")


def test_a_file_is_written_once_and_never_over_another(tmp_path):
    name = file_name(SEED_COST, "/models/Some Model")
    assert name == "some-model-reference-tp4-pp4-dp2.yaml"
    path = write(tmp_path / "new", name, text := text_of(SEED_COST))
    assert path.read_bytes() == text.encode()
    assert write(tmp_path / "new", name, text) == path
    path.write_text("mine")
    with pytest.raises(PlanError, match="says something else"):
        write(tmp_path / "new", name, text)
    assert path.read_text() == "mine"


def test_a_folder_that_cannot_be_is_said_in_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PlanError, match="cannot be written: "):
        write(tmp_path / "file", "x.yaml", "text")
