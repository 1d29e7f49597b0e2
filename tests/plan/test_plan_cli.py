"""`octavo plan` and `octavo audit` as a user runs them: one sentence and status 2 for what cannot be planned."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from serve_app.cli import main

REFERENCE = ["plan", "--preset", "reference-10b", "--system", "reference"]
QWEN = ["plan", "--preset", "qwen3-30b-a3b", "--system", "h100"]
DECLARED = Path(__file__).parent / "parallel-strategy.yaml"

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def octavo(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """(status, stdout, stderr), in this process."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["octavo", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


# -- what cannot be planned --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("no model is given: --preset", ["plan"]),
        ("no system is given: --system", ["plan", "--preset", "reference-10b"]),
        ("--preset 'refrence-10b'", ["plan", "--preset", "refrence-10b", "--system", "reference"]),
        ("near it are reference-10b", ["plan", "--preset", "refrence-10b", "--system", "reference"]),
        ("system 'h1000'", ["plan", "--preset", "reference-10b", "--system", "h1000"]),
        ("contradict", [*REFERENCE, "--model", "somewhere"]),
        ("not on this machine: `octavo fetch no/such`", ["plan", "--model", "no/such", "--system", "h100"]),
        ("model 'nowhere'", ["plan", "--model", "./nowhere", "--system", "h100"]),
        ("model ''", ["plan", "--model", "", "--system", "h100"]),
        ("--total-gpus", QWEN),
        ("--total-gpus must be 1 to", [*QWEN, "--total-gpus", "0"]),
        ("--total-gpus must be 1 to", [*QWEN, "--total-gpus", "-1"]),
        ("--total-gpus must be 1 to", [*QWEN, "--total-gpus", "1000000000"]),
        ("--concurrency and --rate both say the load", [*REFERENCE, "--rate", "3", "--concurrency", "4"]),
        ("both say the number of GPUs", [*REFERENCE, "--total-gpus", "8", "--target-concurrency", "4"]),
        ("both say the load", [*REFERENCE, "--rate", "8", "--target-request-rate", "4"]),
        ("--layout says how many", [*REFERENCE, "--layout", "tp4", "--target-request-rate", "4"]),
        ("cells2 in it", [*REFERENCE, "--layout", "tp4,pp4,dp2", "--total-gpus", "64"]),
        ("--layout 'foo'", [*REFERENCE, "--layout", "foo"]),
        ("--layout 'tp0'", [*REFERENCE, "--layout", "tp0"]),
        ("20 attention heads", [*REFERENCE, "--layout", "tp64"]),
        ("16 layers", [*REFERENCE, "--layout", "pp17"]),
        ("--across-nodes allows it", [*REFERENCE, "--layout", "dp16"]),
        ("spares1, but --spares is 2", [*REFERENCE, "--layout", "tp4,spares1", "--spares", "2"]),
        ("--spares must be", [*REFERENCE, "--spares", "-1"]),
        ("--standby must be", [*REFERENCE, "--standby", "-1"]),
        ("7 spares of each cell leave none", [*QWEN, "--total-gpus", "7", "--spares", "7"]),
        ("--kill 32: there is no GPU 32", [*REFERENCE, "--kill", "32"]),
        ("--from 'tp99'", [*REFERENCE, "--from", "tp99"]),
        ("--ttft must be above 0", [*REFERENCE, "--ttft", "nan"]),
        ("--tpot must be above 0", [*REFERENCE, "--tpot", "0"]),
        ("--rate must be above 0", [*REFERENCE, "--rate", "inf"]),
        ("--burstiness must be above 0", [*REFERENCE, "--burstiness", "-1"]),
        ("--chunk-tokens must be above 0", [*REFERENCE, "--chunk-tokens", "0"]),
        ("--availability is a share", [*REFERENCE, "--availability", "99.9"]),
        ("--prefix is a share", [*REFERENCE, "--prefix", "1"]),
        ("--isl", [*REFERENCE, "--isl", "10240:128"]),
        ("--osl 'many'", [*REFERENCE, "--osl", "many"]),
        ("32768 positions", [*REFERENCE, "--isl", "40000"]),
        ("--dtype: system reference has no peak_tflops for fp8", [*REFERENCE, "--dtype", "fp8"]),
        ("--dtype: precision 'bf17'", [*REFERENCE, "--dtype", "bf17"]),
        ("top_k = 17 must be 1 to 16", [*REFERENCE, "--top-k", "17"]),
        ("--top-n", [*REFERENCE, "--top-n", "0"]),
        ("--strict-sla", [*QWEN, "--total-gpus", "8", "--strict-sla"]),
        ("--view training takes --concurrency", [*REFERENCE, "--rate", "3", "--view", "training"]),
        ("evenly over 2 replicas", [*REFERENCE, "--concurrency", "127", "--view", "training"]),
        ("a shape without weights", [*REFERENCE, "--save-dir", "somewhere"]),
        ("--csv", [*REFERENCE, "--csv", "/nowhere/at/all.csv"]),
        ("/nowhere/at/all.html cannot be written", [*REFERENCE, "--html", "/nowhere/at/all.html"]),
        ("/nowhere.yaml cannot be read", [*REFERENCE, "--audit", "/nowhere.yaml"]),
        ("/nowhere.yaml cannot be read", ["audit", "/nowhere.yaml"]),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[3:]),
)
def test_what_cannot_be_planned_is_one_sentence_that_names_the_option(
    octavo: Run, words: str, arguments: list[str]
) -> None:
    assert_refused(octavo, words, *arguments)


def assert_refused(octavo: Run, words: str, *arguments: object) -> str:
    status, printed, complaint = octavo(*arguments)
    assert (status, printed) == (2, ""), complaint
    assert complaint.startswith("octavo: ")
    assert complaint.count("\n") == 1
    assert words in complaint
    return complaint


def test_an_objective_that_nothing_meets_is_told_with_what_comes_nearest(octavo: Run) -> None:
    complaint = assert_refused(octavo, "TTFT p99", *QWEN, "--total-gpus", "8", "--ttft", "0.0001")
    assert "instead of 0.0001 s" in complaint
    complaint = assert_refused(octavo, "throughput", *QWEN, "--total-gpus", "8", "--rate", "1000000")
    assert "so that the load takes about" in complaint
    assert_refused(octavo, "do not carry this load", *QWEN, "--target-request-rate", "1000000")


def test_an_objective_that_a_named_layout_misses_is_told_beside_it(octavo: Run) -> None:
    status, printed, _ = octavo(*REFERENCE, "--layout", "tp4,pp4,dp2", "--ttft", "0.0001")
    assert status == 0
    assert "misses the objective: TTFT p99" in printed


def test_experts_that_no_layout_can_hold_are_told_with_the_memory_they_take(octavo: Run) -> None:
    arguments = ["plan", "--preset", "qwen3-235b-a22b", "--system", "l4", "--total-gpus", "4"]
    complaint = assert_refused(octavo, "expert weights", *arguments)
    assert "not even TP4 PP1 DP1 EP4" in complaint


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"model_type": "mixtral", "hid', "is not valid JSON"),
        ('{"model_type": "mamba"}', "model_type 'mamba' is not supported"),
        ('{"model_type": "mixtral", "vocab_size": 32000}', "num_attention_heads"),
        ("[]", "config.json"),
    ],
)
def test_a_config_that_is_broken_is_named_with_its_field(octavo: Run, tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "config.json").write_text(content)
    assert_refused(octavo, words, "plan", "--model", tmp_path, "--system", "h100", "--total-gpus", "8")
    assert_refused(octavo, words, "plan", "--model", tmp_path / "config.json", "--system", "h100", "--total-gpus", "8")


def test_nothing_is_written_where_something_cannot_be_shown(octavo: Run, tmp_path: Path) -> None:
    assert_refused(octavo, "--kill 99", *QWEN, "--total-gpus", "8", "--kill", "99", "--csv", tmp_path / "front.csv")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--rank", "best"], ["--view", "sales"], ["--total-gpus", "many"], ["--prest"]])
def test_an_option_that_is_not_understood_ends_the_same_way(octavo: Run, arguments: list[str]) -> None:
    status, printed, complaint = octavo(*REFERENCE, *arguments)
    assert (status, printed) == (2, "")
    assert arguments[0] in complaint


# -- what can ----------------------------------------------------------------------------------------------------------


def test_the_founding_document_is_answered_by_one_command(octavo: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    status, printed, complaint = octavo(*REFERENCE)
    assert (status, complaint) == (0, "")
    for said in ("TP4 PP4 DP2 EP8: 32 GPUs", "N-1", "better", "4 x (TP4 PP1 DP2 EP8)", "rejected", "bound by"):
        assert said in printed, said


def test_the_json_of_one_command_is_the_same_bytes_each_time(octavo: Run) -> None:
    first, again = octavo(*REFERENCE, "--json"), octavo(*REFERENCE, "--json")
    assert first == again
    assert json.loads(first[1])["layout"]["text"] == "TP4 PP4 DP2 EP8"


def test_files_are_the_same_bytes_each_time_and_named(octavo: Run, tmp_path: Path) -> None:
    written = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        files = ["--save-dir", folder, "--csv", folder / "front.csv", "--html", folder / "page.html"]
        status, printed, _ = octavo(*QWEN, "--total-gpus", "8", "--ttft", "2", "--json", *files)
        assert status == 0
        assert sorted(json.loads(printed)["written"]) == sorted(map(str, folder.iterdir()))
        written.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert written[0] == written[1]
    config = next(content for name, content in written[0].items() if name.endswith(".yaml"))
    assert yaml.safe_load(config)["applications"][0]["args"]["model"] == "Qwen/Qwen3-30B-A3B"


def test_a_loss_turns_the_ranking_around_and_one_command_shows_it(octavo: Run) -> None:
    load = ["--total-gpus", "32", "--isl", "2048", "--osl", "128", "--rate", "400"]
    _, printed, _ = octavo(*REFERENCE, *load)
    assert "Ranked by the worst survivable state (--rank worst), the first would be 16 x" in printed
    _, told, _ = octavo(*REFERENCE, *load, "--json")
    ranking = json.loads(told)["ranking"]
    assert ranking["candidates"][0]["layout"]["cells"] == 8
    assert ranking["first_by_other_ranking"]["layout"]["cells"] == 16


def test_the_names_that_are_known_are_listed(octavo: Run) -> None:
    _, printed, _ = octavo("plan", "--list")
    assert "reference-10b" in printed
    assert "h100" in printed
    _, told, _ = octavo("plan", "--list", "--json")
    assert {"models", "systems"} == set(json.loads(told))


def test_an_audit_of_figures_that_do_not_all_hold_ends_with_1(octavo: Run) -> None:
    status, printed, _ = octavo("audit", DECLARED)
    assert status == 1
    assert "does not hold" in " ".join(printed.split())
    status, told, _ = octavo("audit", DECLARED, "--json")
    findings = json.loads(told)
    assert status == 1
    assert findings["num_flagged"] == sum(one["verdict"] != "holds" for one in findings["findings"]) > 10


def test_an_audit_of_figures_that_hold_ends_with_0(octavo: Run, tmp_path: Path) -> None:
    path = tmp_path / "declared.yaml"
    sizes = "{layers: 16, hidden: 512, expert_hidden: 1024, experts_per_layer: 16, dtype: fp16}"
    path.write_text(f"hardware: {{gpus: 32, nodes: 4}}\nmodel: {sizes}\nlayout: {{tp: 4, pp: 4, dp: 2}}\n")
    status, printed, complaint = octavo("audit", path)
    assert (status, complaint) == (0, ""), printed


def test_declared_figures_go_along_with_a_plan(octavo: Run) -> None:
    status, told, _ = octavo(*REFERENCE, "--audit", DECLARED, "--json")
    assert status == 0
    assert json.loads(told)["audit"]["num_flagged"] > 10


def test_a_plan_imports_neither_torch_nor_ray() -> None:
    """Nor what they bring along."""
    script = (
        "import sys; from serve_app.cli import main\n"
        "sys.argv = ['octavo', *sys.argv[1:]]\n"
        "try: main()\n"
        "except SystemExit as ended: assert not ended.code, ended.code\n"
        "found = {'torch', 'ray', 'numpy', 'zmq', 'huggingface_hub', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    command = [sys.executable, "-c", script, *REFERENCE, "--kill", "13", "--scaling", "--json"]
    ended = subprocess.run(command, capture_output=True, timeout=60, check=False, text=True)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["story"]["gpu"] == 13
