"""The audit catches every figure of the founding document that does not hold, by computing it, and says what would."""

import copy
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.errors import PlanError
from serve_app.plan.audit import Finding, audit, parse_declared, read_declared
from serve_app.plan.audit.readings import Formula, agrees, matching

DOCUMENT = Path(__file__).parent / "parallel-strategy.yaml"
FIGURES: dict[str, Any] = yaml.safe_load(DOCUMENT.read_text(encoding="utf-8"))

HOLDS, NOT, ONLY_IF = "holds", "does not hold", "holds only if"
MISSING, UNDEFINED, TRAINING = "missing", "undefined", "not applicable in serving"

# Rows of the reading's table A1: its number, ours, the verdict, and what the reading says of it.
ROWS: list[tuple[int, str, str, list[str]]] = [
    (1, "total parameters", NOT, ["2560/5120 have 10.57 B", "2048/6144 have 9.998 B", "397 experts per layer"]),
    (2, "total experts", HOLDS, ["16 per layer x 16 layers"]),
    (3, "GPUs", HOLDS, []),
    (3, "modules", HOLDS, []),
    (3, "TP groups", HOLDS, []),
    (3, "GPUs per stage", HOLDS, []),
    (3, "GPUs per replica", HOLDS, []),
    (3, "layers per stage", HOLDS, []),
    (4, "expert parallelism", ONLY_IF, ["TP x DP inside one stage", "share one copy"]),
    (5, "expert groups", NOT, ["4 groups x 8 GPUs x 64 experts", "EP 4", "16 experts", "exists 2 times"]),
    (6, "experts per GPU", HOLDS, ["2 per layer x 4 layers"]),
    (7, "expert memory", NOT, ["10e9 parameters x 2 / 32 GPUs", "= 0.625", "8 experts x 3 x 2560 x 5120 x 2 = 0.629"]),
    (8, "attention memory", ONLY_IF, ["hidden size 1024", "neither cut by TP nor by PP = 0.134"]),
    (9, "activations", ONLY_IF, ["training: 128 x 10240 tokens x 512 x 2 x 4 layers", "GiB = 5"]),
    (10, "optimizer", NOT, ["what is left of 0.3 x 64 GB", "43 bytes per parameter", "3.75 GB", "2.5 GB"]),
    (11, "total memory", HOLDS, ["12.0 GB", "weights 0.72", "standby 0.16", "KV 6.71"]),
    (11, "share of memory", HOLDS, []),
    (12, "KV cache", MISSING, ["6.71 GB", "1.34 GB", "998 such sequences"]),
    (13, "peak memory", NOT, ["19.2 + 3 x memory.expert_gb", "= 21.06"]),
    (14, "headroom", HOLDS, ["998 sequences"]),
    (15, "throughput", ONLY_IF, ["prefill", "1.00 B parameters active", "no attention scores, no links, no bubble"]),
    (16, "required throughput", ONLY_IF, ["top-1: prompts up to 3,680 tokens", "top-2: never"]),
    (17, "decode throughput", MISSING, ["1.7 / 6.3 ms", "120 tokens/ms is no rate of answers"]),
    (18, "total throughput", HOLDS, []),
    (18, "throughput margin", HOLDS, []),
    (19, "batch time", ONLY_IF, ["at the required rate = 0.4096", "0.525 / 0.750 s"]),
    (20, "TTFT", NOT, ["20.75 batches", "2,656 requests", "27.2 M", "24.90 batches", "97.5%", "0.85 of"]),
    (21, "TTFT limit", HOLDS, ["24.9 / 17.4 M tokens"]),
    (21, "TTFT margin", HOLDS, []),
    (22, "TP bandwidth", NOT, ["bandwidth of the memory, copied", "1.4 ms at 1,800", "5.6 ms at 450", "50.3 ms at 50"]),
    (23, "synchronization latency", NOT, ["32 all-reduces of a step"]),
    (24, "nodes", NOT, ["4 nodes", "a stage (8 GPUs) is a node"]),
    (24, "visible devices", NOT, ["one process for each GPU"]),
    (25, "gradient synchronization", TRAINING, ["training"]),
    (25, "stage checkpoints", TRAINING, ["computing 10,240 tokens again takes 0.03 / 0.04 s"]),
    (25, "rollback", TRAINING, ["nothing is rolled back"]),
    (26, "standby experts", HOLDS, ["as free slots", "1 lost: 10, 2 lost: 11, 3 lost: 13, 4 lost: 16", "25%", "0.472"]),
    (27, "recovery time", HOLDS, ["load 0.682 GB 0.03", "the bytes are the least of it"]),
    (28, "expert redundancy", NOT, ["2 of 16 experts in 4 layers", "41% of tokens (top-1), 67%", "all 32 GPUs"]),
    (29, "capacity after a loss", MISSING, ["50% of throughput", "1.05 / 1.50 s"]),
    (30, "memory alert", HOLDS, ["2.6 times"]),
    (31, "throughput alert", NOT, ["3 GPUs must die before it fires", "idle traffic always fires it"]),
    (32, "TTFT alert", NOT, ["two targets", "8.5 and 9.5"]),
    (33, "expert load alert", UNDEFINED, ["no capacity of its own"]),
    (34, "uniform load", ONLY_IF, ["where experts lie, not where tokens go"]),
    (35, "GPU utilization", ONLY_IF, ["another quantity"]),
    (36, "linear scaling", ONLY_IF, ["beyond 64"]),
    (37, "more experts", HOLDS, ["32 per layer, 16 on a GPU: a model of 20.1 B"]),
    (38, "larger model", HOLDS, ["no limit of memory"]),
    (39, "larger batch", HOLDS, []),
    (40, "longer sequences", ONLY_IF, ["100 tokens/ms is not asked", "no gradient checkpointing", "63.6 / 47.7"]),
    (41, "smaller dtype", ONLY_IF, ["only on hardware that computes in fp8"]),
]


def figures(**changes: object) -> dict[str, Any]:
    """The document's, with some changed, `section__name`; None takes one out."""
    found = copy.deepcopy(FIGURES)
    for field, value in changes.items():
        section, name = field.split("__")
        if value is None:
            found[section].pop(name, None)
        else:
            found.setdefault(section, {})[name] = value
    return found


def findings(**changes: object) -> dict[str, Finding]:
    return {finding.row: finding for finding in audit(parse_declared(figures(**changes)))}


@cache
def of_document() -> dict[str, Finding]:
    return findings()


# -- the document ---------------------------------------------------------------------------------------------------


def test_all_41_rows_of_the_reading_are_judged_and_one_that_it_has_elsewhere() -> None:
    assert {number for number, *_ in ROWS} == set(range(1, 42))
    assert set(of_document()) - {row for _, row, *_ in ROWS} == {"launch line"}


@pytest.mark.parametrize(("number", "row", "verdict", "said"), ROWS, ids=lambda value: str(value)[:30])
def test_a_row_gets_its_verdict_and_the_reading_that_makes_it_true(
    number: int, row: str, verdict: str, said: list[str]
) -> None:
    finding = of_document()[row]
    assert finding.verdict == verdict, finding
    assert finding.is_flagged == (verdict != HOLDS)
    for words in said:
        assert words in finding.reading, finding


def test_the_launch_line_starts_another_model() -> None:
    finding = of_document()["launch line"]
    assert finding.verdict == NOT
    assert finding.reading == "launch.hidden = 1024 is not model.hidden = 512"
    assert "the launch line's hidden size 1024 has 0.9055 B (experts 0.805" in of_document()["total parameters"].reading


def test_what_is_shown_beside_a_figure_is_computed() -> None:
    found = of_document()
    shown = {row: found[row].computed for row in ("total parameters", "expert memory", "KV cache", "smaller dtype")}
    assert shown == {
        "total parameters": "0.436 B (experts 0.403, attention 0.017, embedding 0.016)",
        "expert memory": "0.02517 GB",
        "KV cache": "6.71 GB",
        "smaller dtype": "experts 0.315 GB instead of 0.629 GB",
    }


def test_the_file_is_read_as_it_is() -> None:
    assert audit(read_declared(DOCUMENT)) == list(of_document().values())


# -- other figures, other verdicts ----------------------------------------------------------------------------------

MENDED: dict[str, object] = {
    "model__total_params_b": 10.57,
    "model__hidden": 2560,
    "model__expert_hidden": 5120,
    "model__top_k": 1,
    "hardware__nodes": 4,
    "hardware__visible_devices": list(range(8)),
    "hardware__tflops_8_bit": 800,
    "layout__ep_groups": 4,
    "layout__gpus_per_ep_group": 8,
    "layout__experts_per_ep_group": 64,
    "layout__standby_experts_per_gpu": 8,
    "memory__expert_gb": 0.629,
    "memory__attention_gb": 0.0524,
    "memory__activation_gb": 0.377,
    "memory__optimizer_gb": 0,
    "memory__kv_gb": 6.71,
    "memory__total_gb": 7.77,
    "memory__peak_gb": 7.77,
    "memory__share": 0.121,
    "memory__headroom_share": 0.879,
    "performance__tokens_ms_gpu": 81,
    "performance__required_tokens_ms_gpu": 60,
    "performance__decode_tokens_ms_gpu": 0.6,
    "performance__total_tokens_ms": 2592,
    "performance__margin": 0.35,
    "performance__batch_s": 0.506,
    "performance__ttft_s": 0.5,
    "performance__ttft_margin_s": 9.5,
    "links__tp_group_tb_s": 0.45,
    "links__sync_us": 10,
    "training__gradient_sync_steps": None,
    "training__checkpoint_layers": None,
    "training__rollback": False,
    "resilience__capacity_after_loss": 0.5,
    "alerts__tokens_ms_gpu": 79,
    "alerts__ttft_s": 8.5,
    "alerts__expert_capacity_tokens_s": 1000,
    "alerts__gpu_utilization": [0.5, 0.7],
    "launch__hidden": 2560,
    "launch__nodes": 4,
}


def test_figures_that_are_right_hold_and_what_stays_is_conditions() -> None:
    found = findings(**MENDED)
    flagged = {row: finding.verdict for row, finding in found.items() if finding.is_flagged}
    conditions = ("expert parallelism", "uniform load", "throughput alert", "linear scaling")
    assert flagged == dict.fromkeys(conditions, ONLY_IF)
    assert len(found) == len(of_document()) - 2  # without the two of training that are not declared any more


@pytest.mark.parametrize(
    ("row", "verdict", "changes"),
    [
        ("total parameters", HOLDS, {"model__total_params_b": 0.436}),
        ("total parameters", ONLY_IF, {"model__hidden": 2560, "model__expert_hidden": 5120}),
        ("total experts", NOT, {"model__total_experts": 255}),
        ("GPUs", NOT, {"hardware__gpus": 31}),
        ("modules", NOT, {"layout__modules": 10}),
        ("TP groups", NOT, {"layout__tp_groups": 4}),
        ("GPUs per stage", NOT, {"layout__gpus_per_stage": 16}),
        ("GPUs per replica", NOT, {"layout__gpus_per_replica": 8}),
        ("layers per stage", NOT, {"model__layers": 18}),
        ("expert parallelism", HOLDS, {"layout__tp": 1, "layout__dp": 8}),
        ("expert parallelism", NOT, {"layout__ep": 3}),
        ("expert groups", HOLDS, {"layout__ep": 4, "layout__experts_per_ep_group": 64}),
        ("expert groups", NOT, {"layout__ep_groups": None}),
        ("experts per GPU", NOT, {"layout__experts_per_gpu": 7}),
        ("expert memory", HOLDS, {"memory__expert_gb": 0.0252}),
        ("expert memory", NOT, {"memory__expert_gb": 0.9}),
        ("attention memory", HOLDS, {"memory__attention_gb": 0.0524}),
        ("attention memory", NOT, {"memory__attention_gb": 0.3}),
        ("activations", ONLY_IF, {"memory__activation_gb": 1.1}),
        ("activations", NOT, {"memory__activation_gb": 0.2}),
        ("optimizer", TRAINING, {"memory__optimizer_gb": 3.75}),
        ("optimizer", HOLDS, {"memory__optimizer_gb": 0}),
        ("total memory", NOT, {"memory__total_gb": 22}),
        ("share of memory", NOT, {"memory__share": 0.4}),
        ("KV cache", HOLDS, {"memory__kv_gb": 6.71}),
        ("KV cache", ONLY_IF, {"memory__kv_gb": 6.25}),
        ("KV cache", NOT, {"memory__kv_gb": 1.34}),
        ("KV cache", NOT, {"memory__kv_gb": 3}),
        ("peak memory", HOLDS, {"memory__peak_gb": 19.2}),
        ("headroom", NOT, {"memory__headroom_share": 0.5}),
        ("throughput", HOLDS, {"performance__tokens_ms_gpu": 57}),
        ("throughput", NOT, {"performance__tokens_ms_gpu": 300}),
        ("throughput", ONLY_IF, {"performance__tokens_ms_gpu": 70}),
        ("required throughput", HOLDS, {"performance__required_tokens_ms_gpu": 50}),
        ("required throughput", NOT, {"performance__required_tokens_ms_gpu": 200}),
        ("decode throughput", HOLDS, {"performance__decode_tokens_ms_gpu": 0.6}),
        ("decode throughput", ONLY_IF, {"performance__decode_tokens_ms_gpu": 2}),
        ("decode throughput", NOT, {"performance__decode_tokens_ms_gpu": 120}),
        ("total throughput", NOT, {"performance__total_tokens_ms": 4000}),
        ("throughput margin", NOT, {"performance__margin": 0.3}),
        ("batch time", HOLDS, {"performance__batch_s": 0.341}),
        ("batch time", NOT, {"performance__batch_s": 0.2}),
        ("TTFT", HOLDS, {"performance__ttft_s": 0.7}),
        ("TTFT", NOT, {"performance__ttft_s": 0.01}),
        ("TTFT limit", ONLY_IF, {"performance__ttft_limit_s": 0.2}),
        ("TTFT limit", NOT, {"performance__ttft_limit_s": 0.01}),
        ("TTFT margin", NOT, {"performance__ttft_margin_s": 2}),
        ("TP bandwidth", HOLDS, {"links__tp_group_tb_s": 0.9}),
        ("synchronization latency", HOLDS, {"links__sync_us": 8}),
        ("nodes", HOLDS, {"hardware__nodes": 4}),
        ("nodes", HOLDS, {"hardware__most_gpus_per_node": 72}),
        ("visible devices", HOLDS, {"hardware__visible_devices": [0, 1, 2, 3]}),
        ("rollback", HOLDS, {"training__rollback": False}),
        ("standby experts", NOT, {"layout__standby_experts_per_gpu": 1}),
        ("recovery time", ONLY_IF, {"resilience__recovery_s": 2}),
        ("recovery time", NOT, {"resilience__recovery_s": 0.05}),
        ("expert redundancy", HOLDS, {"layout__standby_experts_per_gpu": 8}),
        ("expert redundancy", HOLDS, {"layout__ep": 4}),
        ("expert redundancy", HOLDS, {"resilience__redundancy_within_group": False}),
        ("capacity after a loss", HOLDS, {"resilience__capacity_after_loss": 0.5}),
        ("capacity after a loss", NOT, {"resilience__capacity_after_loss": 1.0}),
        ("memory alert", NOT, {"alerts__memory_gb": 40}),
        ("throughput alert", ONLY_IF, {"alerts__tokens_ms_gpu": 117}),
        ("throughput alert", NOT, {"alerts__tokens_ms_gpu": 130}),
        ("TTFT alert", HOLDS, {"alerts__ttft_s": 8.5}),
        ("TTFT alert", NOT, {"alerts__ttft_s": 12, "alerts__ttft_target_s": 12}),
        ("expert load alert", HOLDS, {"alerts__expert_capacity_tokens_s": 1000}),
        ("uniform load", HOLDS, {"resilience__uniform_load": False}),
        ("GPU utilization", HOLDS, {"alerts__gpu_utilization": [0.5, 0.7]}),
        ("linear scaling", NOT, {"goals__linear_to_gpus": 65}),
        ("more experts", NOT, {"goals__experts": 500}),
        ("more experts", NOT, {"goals__experts": 160_000}),
        ("larger model", NOT, {"goals__params_b": 2000, "goals__params_gpus": 64}),
        ("larger batch", NOT, {"goals__batch": 2048}),
        ("longer sequences", HOLDS, {"performance__required_tokens_ms_gpu": 40}),
        ("longer sequences", NOT, {"goals__sequence": 1_000_000}),
        ("smaller dtype", HOLDS, {"hardware__tflops_8_bit": 800}),
        ("launch line", HOLDS, {"launch__hidden": 512}),
        ("launch line", NOT, {"launch__hidden": 512, "launch__tp": 8}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_changed_figure_changes_the_verdict(row: str, verdict: str, changes: dict[str, object]) -> None:
    finding = findings(**changes)[row]
    assert finding.verdict == verdict, finding


def test_a_figure_that_nothing_is_declared_to_check_against_is_undefined_by_name() -> None:
    finding = findings(hardware__tflops=None)["throughput"]
    assert finding.verdict == UNDEFINED
    assert finding.declared == "120.0"
    assert finding.reading == "it cannot be checked while hardware.tflops is not declared"


def test_no_figure_is_so_large_that_the_audit_does_not_end() -> None:
    most = 10**9
    huge = {"hardware__gpus": most, "alerts__tokens_ms_gpu": 1e-3, "goals__experts": 16 * 10**7, "goals__batch": most}
    found = findings(**huge)
    assert found["throughput alert"].reading.startswith("999991667 GPUs must die")
    assert found["more experts"].verdict == found["larger batch"].verdict == NOT


def test_what_nobody_says_is_missing_only_where_it_can_be_computed() -> None:
    assert "KV cache" not in {finding.row for finding in audit(parse_declared({"model": {"total_params_b": 10}}))}


def test_few_figures_are_enough_for_the_checks_between_them() -> None:
    found = audit(parse_declared({"model": {"layers": 16, "experts_per_layer": 16, "total_experts": 256}}))
    assert [(finding.row, finding.verdict) for finding in found] == [("total experts", HOLDS)]


# -- readings -------------------------------------------------------------------------------------------------------


def test_figures_agree_to_one_percent_or_in_all_their_digits() -> None:
    assert agrees(0.41, 0.4096)
    assert agrees(100.0, 100.9)
    assert agrees(0.13, 0.1342)  # rounded, or cut off
    assert agrees(0.62, 0.6291)  # cut off
    assert not agrees(0.62, 0.6001)
    assert not agrees(10.0, 10.57)
    assert not agrees(1.0, float("inf"))


def test_a_reading_that_contradicts_nothing_comes_before_a_nearer_one_that_does() -> None:
    formulas = [Formula("exact", 5.0, "model.hidden"), Formula("near", 5.04), Formula("far", 6.0)]
    assert [formula.text for formula in matching(5.0, formulas)] == ["near", "exact"]


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__colour": 1}, "`model.colour` is no figure that is known"),
        ({"model__layers": 0}, "`model.layers` = 0"),
        ({"model__layers": "many"}, "`model.layers` = 'many'"),
        ({"model__layers": True}, "`model.layers` = True"),
        ({"hardware__mfu": 60}, "`hardware.mfu` = 60"),
        ({"hardware__tflops": float("inf")}, "`hardware.tflops` = inf"),
        ({"hardware__memory_gb": float("nan")}, "`hardware.memory_gb` = nan"),
        ({"model__dtype": "fp17"}, "`model.dtype` = 'fp17'"),
        ({"layout__pp": 32}, "layout cannot hold the model: num_stages=32 must not exceed the model's 16 layers"),
        ({"layout__pp": 10**9}, "`layout.pp` = 1000000000"),
        ({"model__heads": 7}, "model.hidden = 512 is no multiple of model.heads = 7"),
        ({"model__kv_heads": 3}, "model.kv_heads = 3 does not divide the 4 attention heads"),
        ({"model__top_k": 17}, "model.top_k = 17 exceeds the 16 experts of a layer"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_figures_are_refused_in_a_sentence_that_names_them(changes: dict[str, object], words: str) -> None:
    with pytest.raises(PlanError) as caught:
        findings(**changes)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "declares nothing"),
        (b"- 1", "declares nothing"),
        (b"a: [", "is not valid YAML"),
        (b"\xff\xfe\x00", "is not valid YAML"),
        (b"a: 2024-99-99", "is not valid YAML"),
        (b"model: {}", "nothing of what is declared can be checked"),
        (b"model: 3", "`model` = 3"),
        (b"1: 2", "declared figures cannot be read"),
    ],
    ids=str,
)
def test_a_bad_file_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "declared.yaml"
    path.write_bytes(content)
    with pytest.raises(PlanError, match=words):
        audit(read_declared(path))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"none\.yaml cannot be read"):
        read_declared(tmp_path / "none.yaml")


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.floats(0, 1))
def test_whatever_is_left_out_or_changed_there_are_findings_or_one_sentence(seed: int, share: float) -> None:
    """No division by zero, no traceback: sections lose figures, and some are multiplied."""
    rng = random.Random(seed)
    found: dict[str, Any] = {}
    for section, values in FIGURES.items():
        kept = {name: value for name, value in values.items() if rng.random() >= share}
        for name, value in kept.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and rng.random() < 0.2:
                kept[name] = max(1, int(value * rng.choice([0, 0.5, 2, 3, 100]))) if isinstance(value, int) else value
        found[section] = kept
    try:
        for finding in audit(parse_declared(found)):
            assert finding.row and finding.declared and finding.reading is not None
            assert finding.computed or finding.verdict == UNDEFINED
    except PlanError as error:
        assert "\n" not in str(error)
